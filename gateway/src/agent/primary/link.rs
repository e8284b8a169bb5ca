//! A primary's connection to its backup: made, kept alive, listened to, and ended well.

use super::{Shell, lock};
use crate::agent::backup::pause_of;
use crate::frames::input_log::LogReader;
use replicator::image::Clocks;
use replicator::protocol::LinkId;
use replicator::protocol::detector::{Marks, Pace};
use replicator::protocol::primary::{Input, Primary};
use replicator::transport::link::PrimaryConfig;
use replicator::transport::pulse::Listener;
use replicator::transport::{LinkError, PrimaryEvent, PrimaryLink};
use replicator::wire::message::{Bye, Hello};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Pause between snapshots of the gate's counters for the metrics.
const PUBLISH: Duration = Duration::from_secs(1);
/// How long others may hold the link when we want to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// For how long input that comes in here after a switchover follows the container.
const LATE: Duration = Duration::from_millis(50);

/// What the thread that beats tells a primary. It waits for nobody: what comes while somebody else has the
/// core counts as lost, and the next comes soon.
struct Ear(Weak<Shell>);

impl Listener for Ear {
    fn pulse(&self, link: LinkId, marks: Marks) {
        if let Some(shell) = self.0.upgrade()
            && let Some(core) = shell.core_if_free()
        {
            shell.handle_with(core, Input::Pulse { link, pace: marks.pace });
        }
    }

    /// Silence counts only as far as it was listened to: it is asked for as often as pulses come.
    fn tick(&self) {
        if let Some(shell) = self.0.upgrade()
            && let Some(core) = shell.core_if_free()
        {
            shell.tick_with(core);
        }
    }

    fn pace(&self) -> Pace {
        match self.0.upgrade().is_some_and(|shell| shell.rests.load(Ordering::Acquire)) {
            true => Pace::Rests,
            false => Pace::Usual,
        }
    }
}

// Signs of life.
impl Shell {
    /// From now on pulses are those of this connection.
    fn beat_for(&self, link: LinkId, connection: &PrimaryLink, port: u16) {
        let Some(standby) = self.standby.as_ref().filter(|_| port != 0) else { return };
        match connection.pulses(link, port) {
            Ok(session) => standby.pulse.meet(session, Arc::new(Ear(self.me.clone()))),
            Err(error) => tracing::warn!(container = self.name, %error, "no pulses"),
        }
    }

    /// Gives the core its time, if it wants it.
    fn tick(&self) {
        self.tick_with(lock(&self.core));
    }

    fn tick_with(&self, core: MutexGuard<'_, Primary>) {
        if core.next_deadline().is_some_and(|d| d <= self.origin.elapsed()) {
            self.handle_with(core, Input::Tick);
        }
    }

    /// Hands the container over to the host where it was killed, if that wants it and has a whole
    /// copy by now. One that comes to nothing is tried again.
    fn go_back(&self) {
        let wanted = self.standby.as_ref().is_some_and(|standby| standby.is_wanted_back());
        if wanted && !self.hands_over() && self.hand_over().is_ok() {
            tracing::warn!(container = self.name, "it goes back to where it was killed");
        }
    }

    /// The stop thread has come around; whether what it does next may take long.
    pub(in crate::agent) fn worked(&self, long: bool) {
        if let Some(standby) = &self.standby {
            standby.pulse.vitals().worked();
            standby.pulse.vitals().takes_long(long);
        }
    }
}

/// Where the backup is and who we are.
pub(in crate::agent) struct LinkSettings {
    /// As for [`PrimaryLink::connect`], but for the clocks in its hello.
    pub(in crate::agent) config: PrimaryConfig,
    /// Offsets of the container's clocks from the host's, in nanoseconds.
    pub(in crate::agent) offsets: (i64, i64),
}

/// The container's clocks now.
pub(in crate::agent) fn clocks_now(offsets: (i64, i64)) -> Clocks {
    let read = |clock, offset: i64| {
        nix::time::clock_gettime(clock)
            .map(|t| (t.tv_sec() * 1_000_000_000 + t.tv_nsec() + offset) as u64)
            .unwrap_or(0)
    };
    Clocks {
        monotonic: read(nix::time::ClockId::CLOCK_MONOTONIC, offsets.0),
        boottime: read(nix::time::ClockId::CLOCK_BOOTTIME, offsets.1),
    }
}

/// Connects whenever the core asks for it, until the shell is gone.
pub(in crate::agent) async fn keep_connected(
    shell: Arc<Shell>,
    mut connects: mpsc::UnboundedReceiver<LinkId>,
    settings: Arc<LinkSettings>,
) {
    while let Some(link) = connects.recv().await {
        if shell.retired.load(Ordering::Acquire) {
            return;
        }
        let mut config = settings.config.clone();
        config.generation = shell.generation();
        config.hello = Hello {
            clocks: clocks_now(settings.offsets),
            pulse_port: shell.standby.as_ref().map_or(0, |standby| standby.pulse.port()),
            ..config.hello
        };
        let events = shell.clone();
        let connected = PrimaryLink::connect(config, move |event| hear(&events, link, event)).await;
        match connected {
            Ok((connection, welcome)) => {
                tracing::info!(container = shell.name, backup = welcome.host, "connected");
                shell.beat_for(link, &connection, welcome.pulse_port);
                *lock(&shell.link) = Some((link, Arc::new(connection)));
                shell.handle(Input::Connected(link));
            }
            Err(LinkError::Refused { code, text, newest }) => {
                tracing::warn!(container = shell.name, text, "the backup refuses");
                shell.handle(Input::Refused { link, code, newest });
            }
            Err(error) => {
                tracing::info!(container = shell.name, %error, "no backup yet");
                shell.say_why(format!("no backup: {error}"));
                shell.handle(Input::Lost(link));
            }
        }
    }
}

fn hear(shell: &Shell, link: LinkId, event: PrimaryEvent) {
    let input = match event {
        PrimaryEvent::Ack { generation, epoch, digest } => {
            Input::Ack { link, generation, epoch, digest }
        }
        PrimaryEvent::Heartbeat { .. } => Input::Heard(link),
        PrimaryEvent::Bye { bye, newest } => Input::Bye { link, bye, newest },
        PrimaryEvent::Lost(reason) => {
            tracing::info!(container = shell.name, reason, "connection lost");
            shell.handle(Input::Lost(link));
            // Such as that its disk is full.
            if let Some(said) = reason.strip_prefix(LinkError::CLOSED) {
                shell.say_what_it_said(said);
            }
            return;
        }
    };
    shell.handle(input);
}

/// Sends heartbeats that keep the connection, and gives the core its time.
pub(in crate::agent) async fn beat(shell: Arc<Shell>) {
    let mut published = Instant::now();
    let mut received = (LinkId(0), 0);
    loop {
        let pace = lock(&shell.core).pace();
        tokio::time::sleep(pause_of(pace)).await;
        if published.elapsed() >= PUBLISH
            && let Some(gate) = shell.gate.get()
        {
            gate.counters().publish(&shell.name);
            published = Instant::now();
        }
        if let Some((id, link)) = shell.current_link() {
            // What its transport confirms of a large checkpoint is a sign of life as well.
            let now = (id, link.received());
            if now != received {
                received = now;
                shell.handle(Input::Heard(id));
            }
            let committed = lock(&shell.core).committed();
            link.heartbeat(committed, shell.progress.load(Ordering::Relaxed));
        }
        shell.go_back();
        shell.tick();
    }
}

/// Sends what clients said to the backup as well.
pub(in crate::agent) async fn send_input(shell: Arc<Shell>, mut log: LogReader) {
    loop {
        log.filled().await;
        let frames = log.take();
        let Some((_, link)) = shell.current_link() else { continue };
        for logged in frames {
            link.input(logged.epoch, logged.frame);
        }
    }
}

/// Ends the connection without a word, and makes no new one: the backup is to go on with what it
/// has.
pub(in crate::agent) fn break_off(shell: &Shell) {
    shell.retired.store(true, Ordering::Release);
    if let Some((_, link)) = lock(&shell.link).take() {
        link.close("the container's processes were killed");
    }
}

/// Tells the backup that there is nothing to protect any longer, so that it does not take over,
/// or that it is to take over now; and makes no new connection. Whether the backup has heard it;
/// true if there never was one.
pub(in crate::agent) async fn say_goodbye(shell: &Shell, bye: Bye) -> bool {
    shell.retired.store(true, Ordering::Release);
    let last = lock(&shell.core).committed();
    if bye == Bye::Switchover
        && let Some((_, link)) = shell.current_link()
    {
        // What came in here meanwhile, and what comes before everybody knows where the container
        // is now, follows it.
        let said = link.say_bye(bye, last).await;
        tokio::time::sleep(LATE).await;
        lock(&shell.link).take();
        link.close_well();
        return said.is_ok();
    }
    let link = lock(&shell.link).take().map(|(_, link)| link);
    let Some(link) = link else {
        return shell.control || !shell.output_protected.load(Ordering::Acquire);
    };
    // The shipper and the heartbeat let go of it within moments.
    let patience = Instant::now() + GOODBYE;
    let mut shared = link;
    let link = loop {
        match Arc::try_unwrap(shared) {
            Ok(link) => break link,
            Err(again) if Instant::now() < patience => shared = again,
            Err(_) => return false,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    match link.bye(bye, last).await {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(container = shell.name, %error, "the backup did not hear our goodbye");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::journal::Journal;
    use crate::agent::status::{ContainerStatus, Phase, Role};
    use replicator::Generation;
    use replicator::ack::AckLedger;
    use replicator::protocol::primary::Config;
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    #[test]
    fn a_pulse_leaves_while_somebody_has_the_core() {
        let ledger = AckLedger::new(Generation(1));
        let core = Primary::new(Config::default(), Generation(1), ledger, Duration::ZERO);
        let journal = Journal::open("none", "alpha", "web");
        let status = ContainerStatus {
            name: "web".into(),
            address: String::new(),
            role: Role::Primary,
            phase: Phase::Starting,
            protected: false,
            generation: 1,
            epoch: 0,
            pid: None,
            reason: None,
        };
        let status = Arc::new(Mutex::new(status));
        let (shell, _wishes) =
            Shell::new("web", core, false, status, journal, None).expect("a shell");
        let ear = Ear(Arc::downgrade(&shell));
        let held = lock(&shell.core);
        let (done, left) = channel();
        std::thread::spawn(move || {
            ear.tick();
            ear.pulse(LinkId(1), Marks::default());
            let _ = done.send(ear.pace());
        });
        let pace = left.recv_timeout(Duration::from_secs(30)).expect("it waits for the core");
        assert_eq!(pace, Pace::Usual);
        drop(held);
    }
}
