//! A container's other side: the protocol core and the connections, which live as long as the agent,
//! and the thread that keeps the warm spare up to date, brings it to life, and then runs it.
//!
//! ```text
//!  link (QUIC) ──checkpoints (bounded)──► applier thread: spare.apply
//!      │  └─ acknowledged when complete, before it is applied    │
//!      └─ hello, heartbeats, input log ─► core ─ Ask ─► arbiter  │
//!                                          └──── Promote ────────┴─► takeover
//! ```
//! The applier takes every checkpoint that was acknowledged before it carries out a promotion:
//! they are in its channel by then, because the core acknowledges and delivers under one lock.

use super::journal::Memory;
use super::judge::Judge;
use super::primary::{SharedStatus, lock};
use super::status::{FailoverPhases, Phase, Role};
use super::stop::{self, RealTime, become_stop_thread};
use super::takeover::{self, Takeover};
use super::volumes::Files;
use super::worker::{Life, Outcome, Place};
use crate::chain::chain;
use crate::frames::gate::{Gate, GateConfig};
use crate::frames::input_log::{InputLog, LoggedFrame};
use anyhow::{Context, Result};
use bytes::Bytes;
use netns_tools::namespace::Namespace;
use replicator::capture::Capturer;
use replicator::container;
use replicator::image::Clocks;
use replicator::protocol::arbiter::Claim;
use replicator::protocol::backup::{Action, Input, State};
use replicator::restore::Spare;
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use replicator::transport::admission::Notice;
use replicator::transport::link::{LinkError, PrimaryConfig};
use replicator::transport::{BackupEndpoint, Event, PrimaryLink, Pulse, SharedBackup};
use replicator::volume::Volumes;
use replicator::wire::Checkpoint;
use replicator::wire::message::{Bye, RefuseCode};
use replicator::young::Door;
use replicator::{Epoch, Generation};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Checkpoints that may wait for the applier; then acknowledgements wait.
pub(super) const DEPTH: usize = 4;
/// Bounds of the input log at the backup.
const LOG_BYTES: usize = 64 << 20;
const LOG_FRAMES: usize = 1 << 17;
/// As ordinary work: nobody waits for it before a failover, and then it is real-time.
const NICE: i32 = 0;
/// How much the spare's clocks are set ahead: at least what a hello takes, so that no clock of the
/// container steps back at a failover.
const CLOCK_MARGIN: Duration = Duration::from_millis(5);
/// Longest sleep of the applier when nothing is due.
const IDLE: Duration = Duration::from_millis(200);
/// Pause between heartbeats over the connection, which keep it alive where pulses do not arrive.
pub(super) const BEAT: Duration = Duration::from_millis(10);
/// Pause before the other side is asked again who runs the container.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// For how long a backup that does not answer is asked to go on with a container that was killed. It
/// takes over by itself, if it only cannot be reached.
const LAST_CHANCE: Duration = Duration::from_secs(10);

/// What the applier is told apart from checkpoints.
#[derive(Debug)]
pub(super) enum Order {
    /// A primary was admitted.
    Admitted,
    /// Take over.
    Promote(Generation, Epoch),
    /// The copy is void.
    Discard,
    /// A new life of the container begins here.
    Begin(Generation),
}

/// What a primary has received and no checkpoint contains.
struct Late {
    log: InputLog,
    /// Where it goes instead, once the container goes on here.
    gate: Weak<Gate>,
}

impl Default for Late {
    fn default() -> Self {
        Self { log: InputLog::new(LOG_BYTES, LOG_FRAMES), gate: Weak::new() }
    }
}

/// What connections, timers and the applier share, for as long as the agent lives.
pub(super) struct Standby {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) core: Arc<SharedBackup>,
    pub(super) endpoint: Arc<BackupEndpoint>,
    pub(super) judge: Judge,
    pub(super) memory: Memory,
    files: Option<Arc<Files>>,
    log: Mutex<Late>,
    pub(super) status: SharedStatus,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) pulse: Arc<Pulse>,
    progress: AtomicU64,
    /// The applier's thread.
    applier: AtomicI32,
    suspicion: Mutex<Option<(Instant, Duration)>>,
    /// A primary was admitted since the agent's start.
    pub(super) admitted: AtomicBool,
}

impl Standby {
    pub(super) fn new(
        place: &Place,
        core: Arc<SharedBackup>,
        endpoint: Arc<BackupEndpoint>,
        judge: Judge,
        memory: Memory,
        pulse: Arc<Pulse>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: place.network.name.clone(),
            host: place.options.host.clone(),
            core,
            endpoint,
            judge,
            memory,
            files: place.files.clone(),
            log: Mutex::default(),
            status: place.status.clone(),
            runtime: place.runtime.clone(),
            pulse,
            progress: AtomicU64::new(0),
            applier: AtomicI32::new(0),
            suspicion: Mutex::default(),
            admitted: AtomicBool::new(false),
        })
    }

    /// What this side asks of the arbiter.
    pub(super) fn claim(&self, base: Generation, wanted: Generation) -> Claim {
        Claim { container: self.name.clone(), host: self.host.clone(), base, wanted }
    }

    /// The container does not run here any longer.
    pub(super) fn give_way(&self, newest: Generation) {
        self.memory.keep(newest);
        self.core.handle(Input::Demoted(newest));
    }

    /// The container runs on here without the other side, in this generation.
    pub(super) fn moved_on(&self, generation: Generation) {
        self.memory.keep(generation);
        if let Some(Err(error)) = self.files.as_ref().map(|files| files.mark(generation)) {
            tracing::error!(container = self.name, %error,
                "files that are newer than the other host's do not say so");
        }
        self.core.handle(Input::RunsOn(generation));
    }

    fn clear_log(&self) {
        *lock(&self.log) = Late::default();
    }

    /// The frames that the primary had received since `from`. Those that are yet to come, of a
    /// primary that hands over, go to this gate at once.
    fn replay_to(&self, gate: &Arc<Gate>, from: Epoch) -> Vec<Bytes> {
        let mut late = lock(&self.log);
        late.gate = Arc::downgrade(gate);
        late.log.take_for_replay(from)
    }

    /// The primary has received a frame.
    fn logged(&self, frame: LoggedFrame) {
        let mut late = lock(&self.log);
        match late.gate.upgrade() {
            Some(gate) => {
                drop(late);
                metrics::counter!("nilicon_late_frames_total", "container" => self.name.clone())
                    .increment(1);
                gate.receive(&frame.frame);
            }
            None => late.log.push(frame),
        }
    }

    /// When the primary was suspected, and for how long it had been silent.
    pub(super) fn suspicion(&self) -> (Instant, Duration) {
        lock(&self.suspicion).unwrap_or_else(|| (Instant::now(), Duration::ZERO))
    }
}

/// Handles what the core and its connections tell, one after the other.
pub(super) async fn follow(
    shell: Arc<Standby>,
    mut notices: mpsc::UnboundedReceiver<Notice>,
    orders: mpsc::UnboundedSender<Order>,
) {
    while let Some(notice) = notices.recv().await {
        match notice {
            Notice::Admitted(_, generation, hello) => {
                tracing::info!(container = shell.name, primary = hello.host, %generation,
                    "a primary presents itself");
                shell.admitted.store(true, Ordering::Release);
                shell.memory.keep(generation);
                let mut status = lock(&shell.status);
                status.role = Role::Backup;
                status.generation = generation.0;
                (status.phase, status.reason) = (Phase::Syncing, None);
                let _ = orders.send(Order::Admitted);
            }
            Notice::Event(_, event) => heard(&shell, event),
            // Taken by whoever beats.
            Notice::Pulses(_) => {}
            Notice::TurnedAway(peer, error) => {
                metrics::counter!("nilicon_peers_turned_away_total").increment(1);
                tracing::warn!(container = shell.name, %peer, %error, "turned away");
            }
            Notice::Action(action) => act(&shell, &orders, action),
        }
    }
}

fn heard(shell: &Standby, event: Event) {
    match event {
        Event::Heard(_) => {}
        Event::Input { epoch, bytes, .. } => {
            shell.logged(LoggedFrame { epoch, frame: bytes });
        }
        Event::Bye { bye, .. } => {
            tracing::info!(container = shell.name, ?bye, "the primary says goodbye");
        }
        Event::Lost(error @ LinkError::Files { .. }) => {
            tracing::error!(container = shell.name, %error, "not protected here");
            let mut status = lock(&shell.status);
            (status.phase, status.protected) = (Phase::Failed, false);
            status.reason = Some(error.to_string());
        }
        Event::Lost(error) => {
            tracing::info!(container = shell.name, %error, "connection to the primary is over");
        }
    }
}

fn act(shell: &Arc<Standby>, orders: &mpsc::UnboundedSender<Order>, action: Action) {
    match action {
        Action::Ask { base, wanted } => {
            let now = Instant::now();
            let silence = shell.core.silence();
            *lock(&shell.suspicion) = Some((now, silence));
            tracing::warn!(container = shell.name, ?silence, generation = %wanted,
                "asking to take over from the primary");
            metrics::counter!("nilicon_takeovers_asked_total", "container" => shell.name.clone())
                .increment(1);
            let claim = shell.claim(base, wanted);
            // Without a witness there is nothing to wait for.
            match shell.judge.at_once(&claim) {
                Some(verdict) => shell.core.handle(Input::Verdict { generation: wanted, verdict }),
                None => {
                    let shell = shell.clone();
                    shell.runtime.clone().spawn(async move {
                        let verdict = shell.judge.ask(claim).await;
                        tracing::warn!(container = shell.name, generation = %wanted, ?verdict,
                            "the arbiter has answered");
                        shell.core.handle(Input::Verdict { generation: wanted, verdict });
                    });
                }
            }
        }
        Action::Promote { generation, from } => {
            // It may be in the middle of a checkpoint, and wait for a processor.
            hurry(shell.applier.load(Ordering::Acquire));
            let _ = orders.send(Order::Promote(generation, from));
        }
        Action::Close(link) => shell.endpoint.close(link, "the backup closes this connection"),
        Action::Discard => {
            let mut status = lock(&shell.status);
            (status.phase, status.protected) = (Phase::Waiting, false);
            // The container's next life counts its epochs anew.
            shell.clear_log();
            let _ = orders.send(Order::Discard);
        }
        Action::Lost => {
            let mut status = lock(&shell.status);
            status.phase = Phase::Waiting;
            status.reason = Some("the primary was lost before its first full copy".into());
            let _ = orders.send(Order::Discard);
        }
        Action::Welcome(_) | Action::Refuse { .. } | Action::Apply(_) | Action::Ack { .. } => {}
    }
}

/// Makes a thread real-time that clients wait for; it makes itself ordinary again.
pub(super) fn hurry(thread: i32) {
    if let Err(error) = sched::set_fifo_of(thread, stop::PRIORITY) {
        tracing::debug!(%error, "a takeover competes with ordinary work");
    }
}

/// Sends heartbeats that keep the connection, and looks after what else has its time.
pub(super) async fn beat(shell: Arc<Standby>) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut received = Vec::new();
    loop {
        ticks.tick().await;
        shell.pulse.vitals().ran();
        // A large checkpoint on a busy machine can hold up heartbeats and take long to be
        // complete; what has arrived of it is a sign of life as well.
        let now = shell.endpoint.received();
        for (link, _) in now.iter().filter(|of_link| !received.contains(*of_link)) {
            shell.core.handle(Input::Heard(*link));
        }
        received = now;
        let (generation, epoch) = {
            let status = lock(&shell.status);
            (Generation(status.generation), Epoch(status.epoch))
        };
        let progress = shell.progress.load(Ordering::Relaxed);
        shell.endpoint.heartbeat(generation, epoch, progress);
        if shell.core.next_deadline().is_some_and(|d| d <= shell.core.now()) {
            shell.core.handle(Input::Tick);
        }
    }
}

/// The warm spare and its place in the network.
pub(super) struct Warm {
    pub(super) spare: Spare,
    /// The files of its replicated volumes.
    pub(super) files: Option<Arc<Volumes>>,
    pub(super) gate: Arc<Gate>,
    pub(super) last: Option<(Arc<Checkpoint>, Instant)>,
    /// For connections that are not accepted yet, if this kernel can restore them.
    pub(super) door: Option<Door>,
}

/// Asks the other side who runs the container, until that is known: an agent that starts must not
/// begin a second life of it. Either a primary comes, or nobody is known to run it, and then it
/// begins here.
pub(super) async fn find_out(
    standby: Arc<Standby>,
    files: Option<Arc<Files>>,
    config: PrimaryConfig,
    orders: mpsc::UnboundedSender<Order>,
) {
    loop {
        if standby.admitted.load(Ordering::Acquire) {
            return;
        }
        match PrimaryLink::inquire(config.clone()).await {
            Ok((RefuseCode::Vacant, newest)) => {
                let base = newest.max(standby.core.newest());
                if let Some(Err(error)) = files.as_ref().map(|f| f.check_are_newest(base)) {
                    tracing::error!(container = standby.name, %error, "not begun");
                    let mut status = lock(&standby.status);
                    (status.phase, status.reason) = (Phase::Failed, Some(error.to_string()));
                    return;
                }
                let generation = standby.judge.begin(&standby, base).await;
                if standby.core.begin(generation) {
                    standby.memory.keep(generation);
                    let _ = orders.send(Order::Begin(generation));
                    return;
                }
            }
            Ok((code, generation)) => {
                tracing::info!(container = standby.name, ?code, %generation,
                    "the container is not to begin here");
                lock(&standby.status).reason =
                    Some(format!("the other side runs it in generation {generation}, or will"));
            }
            Err(error) => {
                tracing::info!(container = standby.name, %error, "who runs the container?");
                let reason = format!("no backup: {error}");
                lock(&standby.status).reason = Some(reason);
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Tells the other side that the container runs here no longer, though nobody has ended it: its
/// copy there is the container's last chance. Until it has heard, comes as a primary, or does not
/// answer for [`LAST_CHANCE`].
pub(super) async fn leave_to_backup(standby: Arc<Standby>, config: PrimaryConfig, why: String) {
    let name = &standby.name;
    tracing::error!(container = name, why, "the backup is asked to go on with it");
    let begin = Instant::now();
    let lost = loop {
        if standby.admitted.load(Ordering::Acquire) {
            return;
        }
        match PrimaryLink::inquire(config.clone()).await {
            Ok((RefuseCode::Vacant, _)) => break "its backup has no whole copy".to_owned(),
            Ok(_) => {
                lock(&standby.status).reason = Some(format!("{why}; its backup is to go on"));
                return;
            }
            Err(error) if begin.elapsed() > LAST_CHANCE => {
                break format!("its backup does not answer: {error}");
            }
            Err(_) => tokio::time::sleep(ASK_AGAIN).await,
        }
    };
    tracing::error!(container = name, why, lost, "the container is lost");
    let mut status = lock(&standby.status);
    (status.role, status.phase) = (Role::None, Phase::Failed);
    status.reason = Some(format!("{why}; {lost}"));
}

/// What the applier thread has.
pub(super) struct Applier {
    pub(super) place: Place,
    pub(super) shell: Arc<Standby>,
    pub(super) lab: String,
    pub(super) checkpoints: mpsc::Receiver<Arc<Checkpoint>>,
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    pub(super) warm: Option<Warm>,
    pub(super) clocks: SharedClocks,
}

/// What the container's clocks read when its primary presented itself.
pub(super) type SharedClocks = Arc<Mutex<Option<(Clocks, Instant)>>>;

enum Next {
    Checkpoint(Arc<Checkpoint>),
    Order(Order),
    Over,
}

impl Applier {
    /// Runs until the agent ends: keeps the copy while the container runs elsewhere, and the
    /// container while it runs here.
    pub(super) fn run(mut self) {
        self.shell.applier.store(nix::unistd::gettid().as_raw(), Ordering::Release);
        while let Some(begun) = self.stand_by() {
            let led = begun.and_then(|life| self.place.lead(life, Some(&self.shell)));
            if let Some(files) = &self.place.files {
                files.give_way();
            }
            let newest = self.shell.core.newest();
            match led {
                Ok(Outcome::Moved(_)) => {
                    self.shell.clear_log();
                    let mut status = lock(&self.place.status);
                    // Unless it is known already that nobody could go on with it.
                    if status.phase != Phase::Failed {
                        (status.role, status.phase) = (Role::Backup, Phase::Waiting);
                        (status.protected, status.pid) = (false, None);
                    }
                }
                Ok(Outcome::Over) => {
                    self.shell.give_way(newest);
                    self.place.tell_end(Ok(()));
                }
                Err(error) => {
                    self.shell.give_way(newest);
                    self.place.tell_end(Err(error));
                }
            }
        }
    }

    /// Follows the primary until the container is to run here; none at the agent's end.
    fn stand_by(&mut self) -> Option<Result<Life>> {
        if let Err(error) = sched::set_ordinary().and_then(|()| sched::set_nice(NICE)) {
            tracing::debug!(%error, "the applier runs at ordinary priority");
        }
        loop {
            self.shell.pulse.vitals().worked();
            match self.next() {
                Next::Checkpoint(checkpoint) => self.apply(&checkpoint),
                Next::Order(Order::Admitted) => {
                    if self.warm.is_none()
                        && let Err(error) = self.launch()
                    {
                        self.fail("no warm spare can be made here", &error);
                    }
                }
                // A copy that has come since then is a good one: orders and checkpoints do not
                // keep their order among each other.
                Next::Order(Order::Discard) => {
                    if self.shell.core.state() == State::Waiting {
                        self.warm = None;
                    }
                }
                Next::Order(Order::Promote(generation, from)) => {
                    let what = "the container could not be brought to life";
                    return Some(self.promote(generation, from).context(what));
                }
                Next::Order(Order::Begin(generation)) => {
                    self.warm = None;
                    return Some(self.place.begin(generation));
                }
                Next::Over => return None,
            }
        }
    }

    fn next(&mut self) -> Next {
        let duty = self.place.duty.clone();
        let (checkpoints, orders) = (&mut self.checkpoints, &mut self.orders);
        self.place.runtime.block_on(async {
            loop {
                if duty.must_end() {
                    return Next::Over;
                }
                tokio::select! {
                    biased;
                    Some(checkpoint) = checkpoints.recv() => return Next::Checkpoint(checkpoint),
                    Some(order) = orders.recv() => return Next::Order(order),
                    () = tokio::time::sleep(IDLE) => {}
                }
            }
        })
    }

    fn fail(&mut self, what: &str, error: &anyhow::Error) {
        tracing::error!(container = self.shell.name, error = chain(error), "{what}");
        let mut status = lock(&self.shell.status);
        status.phase = Phase::Failed;
        status.protected = false;
        status.reason = Some(format!("{what}: {}", chain(error)));
    }

    fn launch(&mut self) -> Result<()> {
        let (clocks, told_at) =
            lock(&self.clocks).context("no primary has said what its clocks read")?;
        let mut spec = self.place.spec.clone();
        let since = (told_at.elapsed() + CLOCK_MARGIN).as_nanos() as u64;
        spec.clocks =
            Some(Clocks { monotonic: clocks.monotonic + since, boottime: clocks.boottime + since });
        let launched = container::launch(&spec, container::Role::Spare)?;
        let pid = launched.pid;
        let inner = self.place.network.make_inner(pid).context("the spare's network")?;
        let outer = self.place.network.make_outer()?;
        let spare = Spare::new(launched)?;
        let gate = Gate::start(
            inner,
            outer,
            GateConfig {
                mac: Some(self.place.network.mac),
                thread_setup: Some(self.place.thread_setup.clone()),
                ..GateConfig::default()
            },
        )?;
        lock(&self.shell.status).pid = Some(pid);
        let files = self.place.files.as_ref().map(|files| files.copy()).transpose()?;
        let door = Door::load();
        if let Err(error) = &door {
            tracing::warn!(container = self.shell.name, %error,
                "connections that are not accepted yet will be reset by a failover");
        }
        self.warm = Some(Warm { spare, files, gate: Arc::new(gate), last: None, door: door.ok() });
        Ok(())
    }

    /// Folds a checkpoint in. A spare that cannot follow is given up: the primary is sent away,
    /// and when it comes back it sends a full copy.
    fn apply(&mut self, checkpoint: &Arc<Checkpoint>) {
        // A full copy says nothing about what is only here, so it goes into an empty spare.
        if checkpoint.full && self.warm.as_ref().is_none_or(|warm| warm.last.is_some()) {
            self.warm = None;
            if let Err(error) = self.launch() {
                return self.give_up(checkpoint.epoch, &error);
            }
        }
        let Some(warm) = &mut self.warm else {
            tracing::debug!(epoch = %checkpoint.epoch, "a checkpoint without a spare");
            return;
        };
        let last = warm.last.as_ref().map(|(c, _)| c.epoch.next());
        if !checkpoint.full && last != Some(checkpoint.epoch) {
            let error = anyhow::anyhow!("the spare waits for epoch {last:?}");
            return self.give_up(checkpoint.epoch, &error);
        }
        let received = Instant::now();
        if let Some(files) = &warm.files
            && let Err(error) =
                files.carry_out(checkpoint.generation, checkpoint.epoch, &checkpoint.files)
        {
            let context = format!("the files of epoch {}", checkpoint.epoch);
            let error = anyhow::Error::new(error).context(context);
            return self.give_up(checkpoint.epoch, &error);
        }
        if checkpoint.full
            && let Some(Err(error)) =
                self.place.files.as_ref().map(|files| files.mark(checkpoint.generation))
        {
            return self.give_up(checkpoint.epoch, &error);
        }
        match warm.spare.apply(&checkpoint.state, &checkpoint.pages) {
            Ok(()) => {
                metrics::histogram!("nilicon_apply_seconds", "container" => self.shell.name.clone())
                    .record(received.elapsed().as_secs_f64());
                warm.last = Some((checkpoint.clone(), received));
                self.shell.progress.fetch_add(1, Ordering::Relaxed);
                lock(&self.shell.log).log.committed(checkpoint.epoch);
                let mut status = lock(&self.shell.status);
                status.epoch = checkpoint.epoch.0;
                status.generation = checkpoint.generation.0;
                let ready = matches!(self.shell.core.state(), State::Ready { .. });
                if status.phase != Phase::Failed && ready {
                    (status.phase, status.protected) = (Phase::Protected, true);
                }
            }
            Err(error) => {
                let error =
                    anyhow::Error::new(error).context(format!("epoch {}", checkpoint.epoch));
                self.give_up(checkpoint.epoch, &error);
            }
        }
    }

    fn give_up(&mut self, epoch: Epoch, error: &anyhow::Error) {
        self.warm = None;
        self.fail("the warm spare cannot follow", error);
        let Some(link) = self.shell.core.link() else { return };
        self.shell.core.handle(Input::Bye { link, bye: Bye::Demoted, last: epoch });
        self.shell.endpoint.close(link, "the warm spare cannot follow");
    }

    fn promote(&mut self, generation: Generation, from: Epoch) -> Result<Life> {
        let fenced = Instant::now();
        let (suspected, silence) = self.shell.suspicion();
        self.shell.memory.keep(generation);
        let signals = become_stop_thread()?;
        let real_time = RealTime::start();
        lock(&self.place.status).phase = Phase::Promoting;
        // Everything that was acknowledged is in the channel by now.
        while let Ok(checkpoint) = self.checkpoints.try_recv() {
            self.apply(&checkpoint);
        }
        let mut warm = self.warm.take().context("there is no warm spare")?;
        let last = warm.last.as_ref().map(|(c, _)| c.epoch);
        anyhow::ensure!(last == Some(from), "the spare holds epoch {last:?}, not {from}");
        let phases = FailoverPhases {
            silence: ms(silence),
            fence: ms(fenced - suspected),
            apply: ms(fenced.elapsed()),
            ..FailoverPhases::default()
        };
        // Before anything is opened by its path.
        let files = match (&self.place.files, warm.files.take()) {
            (Some(files), Some(volumes)) => {
                Some(files.go_on(generation, volumes, warm.spare.pid())?)
            }
            _ => None,
        };
        let place = &self.place.network;
        let takeover = Takeover { place, generation, from, suspected, phases };
        let gate = warm.gate.clone();
        let logged = || self.shell.replay_to(&gate, from);
        let (record, tree) = takeover::run(&takeover, &mut warm, logged)?;
        drop(real_time);
        // What the checkpoint has open without a name is open by now.
        if let Some(Err(error)) = files.as_ref().map(|files| files.volumes.sweep()) {
            tracing::warn!(container = self.shell.name, %error, "files without a name stay");
        }
        self.shell.core.handle(Input::Running);
        let name = &self.shell.name;
        {
            let mut status = lock(&self.place.status);
            (status.role, status.phase) = (Role::Primary, Phase::Unprotected);
            (status.protected, status.reason) = (false, None);
            (status.generation, status.epoch) = (generation.0, from.0);
        }
        super::journal::write_failover(&self.lab, &self.shell.host, name, &record);
        tracing::warn!(container = name, %generation, epoch = %from,
            total_ms = record.phases_ms.total, "the container runs here now");
        let diag = Namespace::of_process(warm.spare.pid())?.enter(UnixDiag::open)??;
        let mut capturer = Capturer::adopt_running(&tree, diag)?;
        capturer.watch_network()?;
        let Warm { spare, gate, .. } = warm;
        let launched = spare.into_launched();
        Ok(Life { files, launched, capturer, gate, signals, generation, from: Some(from) })
    }
}

/// Milliseconds with fractions.
pub(super) fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
