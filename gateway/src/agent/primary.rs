//! A container's primary: the protocol core, and the shells around it.
//!
//! ```text
//!  stop thread ──Taken──► shipper ──frames──► link (QUIC) ──acks──► core ──proof──► gate.release
//!       ▲  └────────────◄ buffers ◄──┘                               ▲
//!       └─ wake (may a stop begin?) ─────────── heartbeats, timers ──┘
//! ```
//! Decisions are made by [`replicator::protocol::primary`]; here its inputs are gathered and its
//! actions carried out. Releases have a thread of their own, because writing an epoch's frames can
//! take milliseconds.

use super::backup::Standby;
use super::journal::{Journal, monotonic_us};
use super::status::{CaptureKinds, ContainerStatus, EpochRecord, Phase, Role, StopStages};
use super::stop::Taken;
use crate::frames::commit::Unprotected;
use crate::frames::gate::Gate;
use crate::frames::input_log::LogReader;
use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};
use replicator::ack::CommitProof;
use replicator::image::Clocks;
use replicator::protocol::LinkId;
use replicator::protocol::detector::Marks;
use replicator::protocol::primary::{Action, Input, Primary, State};
use replicator::transport::link::PrimaryConfig;
use replicator::transport::pulse::Listener;
use replicator::transport::{LinkError, PrimaryEvent, PrimaryLink};
use replicator::wire::message::{Bye, Hello};
use replicator::{Epoch, Generation};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Pause between snapshots of the gate's counters for the metrics.
const PUBLISH: Duration = Duration::from_secs(1);
/// How long others may hold the link when we want to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// For how long input that comes in here after a switchover follows the container.
const LATE: Duration = Duration::from_millis(50);

/// What the next checkpoint builds on.
#[derive(Clone, Copy, Debug, Default)]
struct Base {
    link: LinkId,
    full: bool,
}

/// What the next checkpoint is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next {
    /// The connection that it is for.
    pub(super) link: LinkId,
    /// Whether it builds on none before.
    pub(super) full: bool,
    /// Its output does not wait for it.
    pub(super) provisional: bool,
    pub(super) generation: Generation,
}

/// The status of a container, shared with the control socket.
pub(super) type SharedStatus = Arc<Mutex<ContainerStatus>>;

/// Locks, whatever happened to another holder.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the core wants done by others: connections to make, and proofs for the release thread.
/// Neither channel needs a bound: the core has one attempt to connect at a time, and no more
/// proofs than checkpoints in flight.
pub(super) struct Wishes {
    pub(super) connects: mpsc::UnboundedReceiver<LinkId>,
    pub(super) releases: std::sync::mpsc::Receiver<CommitProof>,
}

/// The core of a primary and what surrounds it; shared by its threads and tasks.
pub(super) struct Shell {
    name: String,
    core: Mutex<Primary>,
    origin: Instant,
    wake: EventFd,
    base: Mutex<Base>,
    link: Mutex<Option<(LinkId, Arc<PrimaryLink>)>>,
    connect: mpsc::UnboundedSender<LinkId>,
    releases: Mutex<std::sync::mpsc::Sender<CommitProof>>,
    gate: OnceLock<Arc<Gate>>,
    output_protected: AtomicBool,
    /// The control of an experiment: output never waits.
    control: bool,
    unsent: AtomicUsize,
    /// Processor time that the shipper has used, in nanoseconds.
    shipping: AtomicU64,
    progress: AtomicU64,
    end: AtomicBool,
    /// The operator wants the backup to take over.
    handing_over: AtomicBool,
    /// This host's other core; none if the container is not protected.
    standby: Option<Arc<Standby>>,
    /// No backup is wanted any longer.
    retired: AtomicBool,
    /// What keeps output from leaving, though the backup is there.
    frozen: Mutex<Option<String>>,
    status: SharedStatus,
    records: Mutex<BTreeMap<u64, (EpochRecord, Instant)>>,
    journal: Mutex<Journal>,
    me: Weak<Shell>,
}

/// Publishes whether a loss of this host would be survived.
pub(super) fn tell_protected(container: &str, protected: bool) {
    metrics::gauge!("nilicon_protected", "container" => container.to_owned())
        .set(f64::from(u8::from(protected)));
}

/// Counts that a container came to hold something that cannot be protected.
pub(super) fn count_unprotectable(container: &str, policy: &'static str) {
    let container = container.to_owned();
    metrics::counter!("nilicon_unprotectable_total", "container" => container, "policy" => policy)
        .increment(1);
}

impl Shell {
    /// A shell around `core`.
    pub(super) fn new(
        name: &str,
        core: Primary,
        control: bool,
        status: SharedStatus,
        journal: Journal,
        standby: Option<Arc<Standby>>,
    ) -> Result<(Arc<Self>, Wishes)> {
        let (connect, connects) = mpsc::unbounded_channel();
        let (releases, proofs) = std::sync::mpsc::channel();
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let shell = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            name: name.to_owned(),
            core: Mutex::new(core),
            origin: Instant::now(),
            wake,
            base: Mutex::default(),
            link: Mutex::default(),
            connect,
            releases: Mutex::new(releases),
            gate: OnceLock::new(),
            output_protected: AtomicBool::new(false),
            control,
            unsent: AtomicUsize::new(0),
            shipping: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            end: AtomicBool::new(false),
            handing_over: AtomicBool::new(false),
            standby,
            retired: AtomicBool::new(false),
            frozen: Mutex::default(),
            status,
            records: Mutex::default(),
            journal: Mutex::new(journal),
        });
        Ok((shell, Wishes { connects, releases: proofs }))
    }

    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    /// The gate, once there is one.
    pub(super) fn set_gate(&self, gate: Arc<Gate>) {
        let _ = self.gate.set(gate);
    }

    /// Readable when the stop thread should look again.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The stop thread has looked.
    pub(super) fn awake(&self) {
        let _ = self.wake.read();
    }

    fn wake_up(&self) {
        let _ = self.wake.write(1);
    }

    /// Tells the stop thread to end the container.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        self.wake_up();
    }

    pub(super) fn must_end(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }

    /// Whether a backup has taken the container in this start.
    pub(super) fn is_welcome(&self) -> bool {
        matches!(lock(&self.core).state(), State::Protected { .. })
    }

    /// Whether a stop may begin: there is a backup and the pipeline has room.
    pub(super) fn may_begin_stop(&self) -> bool {
        let core = lock(&self.core);
        let unsent = self.unsent.load(Ordering::Acquire);
        core.may_begin_stop() && core.in_flight() + unsent < core.depth()
    }

    /// Whether the next checkpoint must be a full one.
    pub(super) fn full_is_due(&self) -> bool {
        lock(&self.base).full
    }

    /// Whether nothing is kept for the next checkpoint, as there is nobody to send it to: it will
    /// be a full one.
    pub(super) fn begins_anew(&self) -> bool {
        use State::{Alone, Connecting, Severed};
        matches!(lock(&self.core).state(), Alone { .. } | Connecting { .. } | Severed { .. })
    }

    /// Whether the backup holds a copy that it could take over with, or is given none.
    pub(super) fn is_settled(&self) -> bool {
        matches!(lock(&self.core).state(), State::Protected { synced: true })
    }

    /// What the next checkpoint must be. The caller takes that one.
    pub(super) fn next(&self) -> Next {
        let core = lock(&self.core);
        let mut base = lock(&self.base);
        Next {
            link: base.link,
            full: std::mem::take(&mut base.full),
            provisional: core.is_catching_up(),
            generation: core.generation(),
        }
    }

    /// The generation that this side works in.
    pub(super) fn generation(&self) -> Generation {
        lock(&self.core).generation()
    }

    /// How the core stands.
    pub(super) fn state(&self) -> State {
        lock(&self.core).state()
    }

    /// The operator wants the backup to take over. Refused, with the reason, if it could not.
    pub(super) fn hand_over(&self) -> Result<(), String> {
        match self.state() {
            State::Protected { synced: true } => {
                self.handing_over.store(true, Ordering::Release);
                self.wake_up();
                Ok(())
            }
            state => Err(format!("it has no backup that could go on with it ({state:?})")),
        }
    }

    /// Whether it is to be handed over.
    pub(super) fn hands_over(&self) -> bool {
        self.handing_over.load(Ordering::Acquire)
    }

    /// Nothing came of it.
    pub(super) fn keeps_it(&self) {
        self.handing_over.store(false, Ordering::Release);
    }

    /// Whether all checkpoints that were taken have left the shipper.
    pub(super) fn all_shipped(&self) -> bool {
        self.unsent.load(Ordering::Acquire) == 0
    }

    /// The container holds something that cannot be protected; no output leaves until it is gone,
    /// because no checkpoint can be taken. The backup can go on from the last one.
    pub(super) fn freeze(&self, why: &str) {
        if lock(&self.frozen).replace(why.to_owned()).is_none() {
            count_unprotectable(&self.name, "freeze");
            tracing::error!(
                container = self.name,
                reason = why,
                "cannot be protected; no output leaves until that is gone"
            );
        }
        self.follow_state();
    }

    /// A checkpoint could be taken.
    pub(super) fn unfreeze(&self) {
        if lock(&self.frozen).take().is_some() {
            tracing::warn!(container = self.name, "can be protected again; output leaves");
            self.follow_state();
        }
    }

    /// Says why it is not protected, unless that was said when its backup was told goodbye.
    fn say_why(&self, why: String) {
        if !self.retired.load(Ordering::Acquire) {
            lock(&self.status).reason = Some(why);
        }
    }

    /// A full checkpoint for this connection was not taken after all.
    pub(super) fn full_again(&self, link: LinkId) {
        let mut base = lock(&self.base);
        if base.link == link {
            base.full = true;
        }
    }

    /// A checkpoint was handed to the shipper.
    pub(super) fn taken(&self) {
        self.unsent.fetch_add(1, Ordering::AcqRel);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether output leaves without waiting, which is only for experiments.
    pub(super) fn is_control(&self) -> bool {
        self.control
    }

    /// Holds output from now on; the first epoch is `epoch`. Does nothing the second time.
    pub(super) fn protect_output(&self, gate: &Gate, epoch: Epoch) {
        if !self.control && !self.output_protected.swap(true, Ordering::AcqRel) {
            gate.protect(self.generation(), Epoch(epoch.0.saturating_sub(1)));
            lock(&self.status).phase = Phase::Syncing;
        }
    }

    /// Lets output go where this side acts alone. Like [`Shell::protect_output`] for the stop
    /// thread only, so that the two cannot overtake each other.
    pub(super) fn settle_output(&self, gate: &Gate) {
        if lock(&self.core).is_alone() && self.output_protected.swap(false, Ordering::AcqRel) {
            let frames = gate.pass_through(Unprotected::GrantedByArbiter);
            tracing::warn!(container = self.name, frames, "output leaves without waiting");
        }
    }

    /// Gives the core a checkpoint whose last frame is about to leave. Whether it may.
    pub(super) fn sent(&self, taken: &Taken, digest: u64) -> bool {
        let (link, epoch, provisional) = (taken.link, taken.epoch, taken.provisional);
        self.handle(Input::Sent { link, epoch, digest, provisional });
        lock(&self.core).sends_on(link)
    }

    /// Gives the core an input and carries out its actions.
    pub(super) fn handle(&self, input: Input) {
        let heard = matches!(input, Input::Heard(_));
        let actions = lock(&self.core).handle(self.origin.elapsed(), input);
        let idle = actions.is_empty() && heard;
        for action in actions {
            self.act(action);
        }
        if !idle {
            self.follow_state();
            self.wake_up();
        }
    }

    fn act(&self, action: Action) {
        match action {
            Action::Connect(link) => {
                let _ = self.connect.send(link);
            }
            Action::BeginFull => {
                let link = lock(&self.link).as_ref().map_or(LinkId(0), |(l, _)| *l);
                *lock(&self.base) = Base { link, full: true };
            }
            Action::Release(proof) => {
                let _ = lock(&self.releases).send(proof);
            }
            Action::Severed(link, why) => {
                let mut current = lock(&self.link);
                if let Some((l, connection)) = current.take_if(|(l, _)| *l == link) {
                    tracing::debug!(link = %l, "closed");
                    connection.close("the primary gives this connection up");
                }
                let alone = lock(&self.core).is_alone();
                let then =
                    if alone { "it goes on unprotected" } else { "no output leaves meanwhile" };
                tracing::warn!(container = self.name, reason = %why, "the backup is gone; {then}");
                self.say_why(why.to_string());
            }
            Action::Hold => {
                tracing::info!(container = self.name, "the backup has caught up");
            }
            Action::GoAlone(generation) => {
                metrics::counter!("nilicon_alone_total", "container" => self.name()).increment(1);
                tracing::error!(container = self.name, %generation,
                    "the backup is gone, and the arbiter agrees: it goes on unprotected");
                lock(&self.status).generation = generation.0;
                if let Some(standby) = &self.standby {
                    standby.moved_on(generation);
                }
            }
            Action::Ask { base, wanted } => self.ask(base, wanted),
            Action::Stop => {
                tracing::error!(
                    container = self.name,
                    "the backup is gone; the container ends, as its policy says"
                );
                lock(&self.status).reason =
                    Some("its backup was lost, and its policy is to stop".into());
                self.end();
            }
            Action::HandOver { last, .. } => {
                tracing::info!(container = self.name, epoch = %last, "handed over");
                self.end();
            }
            Action::Demoted { by } => {
                tracing::warn!(container = self.name, generation = %by,
                    "another host runs the container in a newer generation; it ends here");
                if let Some(gate) = self.gate.get() {
                    gate.unplug();
                    gate.abandon();
                }
                self.end();
            }
        }
    }

    fn release(&self, proof: CommitProof) {
        let epoch = proof.epoch();
        let gate = self.gate.get().filter(|_| !self.control);
        let released = gate.map_or(Ok(0), |gate| gate.release(proof));
        let now = Instant::now();
        let frames = match released {
            Ok(frames) => frames,
            // It has left already, without proof.
            Err(_) if lock(&self.core).is_alone() => return,
            Err(error) => {
                tracing::error!(container = self.name, %epoch, %error, "output stays");
                return;
            }
        };
        let records = {
            let mut waiting = lock(&self.records);
            let later = waiting.split_off(&(epoch.0 + 1));
            std::mem::replace(&mut *waiting, later)
        };
        let mut journal = lock(&self.journal);
        for (mut record, sealed) in records.into_values() {
            record.commit_us = (now - sealed).as_micros() as u64;
            record.frames = frames as u64;
            metrics::histogram!("nilicon_commit_seconds", "container" => self.name())
                .record((now - sealed).as_secs_f64());
            journal.write(&record);
        }
    }

    /// Copies the core's state to the status.
    fn follow_state(&self) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        let (state, committed) = {
            let core = lock(&self.core);
            (core.state(), core.committed())
        };
        let frozen = lock(&self.frozen).clone();
        let mut status = lock(&self.status);
        status.epoch = committed.0;
        status.protected = matches!(state, State::Protected { synced: true });
        status.phase = match state {
            State::Protected { synced: true } => {
                status.reason = None;
                Phase::Protected
            }
            State::Protected { synced: false } | State::CatchingUp { .. } => Phase::Syncing,
            State::Alone { .. } => Phase::Unprotected,
            State::Severed { .. } => Phase::Severed,
            State::Stopped => Phase::Failed,
            State::Demoted { .. } | State::HandedOver => {
                status.role = Role::None;
                Phase::Demoted
            }
            State::Connecting { .. } => status.phase,
        };
        if let Some(why) = &frozen {
            (status.protected, status.phase) = (false, Phase::Severed);
            status.reason = Some(why.clone());
        }
        tell_protected(&self.name, status.protected);
        metrics::gauge!("nilicon_committed_epoch", "container" => self.name())
            .set(committed.0 as f64);
    }

    fn ask(&self, base: Generation, wanted: Generation) {
        let Some(standby) = self.standby.clone() else { return };
        let Some(me) = self.me.upgrade() else { return };
        tracing::warn!(container = self.name, %wanted, "asking the arbiter to go on alone");
        standby.runtime.clone().spawn(async move {
            let verdict = standby.judge.ask(standby.claim(base, wanted)).await;
            tracing::warn!(container = me.name, %wanted, ?verdict, "the arbiter has answered");
            me.handle(Input::Verdict { generation: wanted, verdict });
        });
    }

    fn current_link(&self) -> Option<(LinkId, Arc<PrimaryLink>)> {
        lock(&self.link).clone()
    }
}

/// What the thread that beats tells a primary.
struct Ear(Weak<Shell>);

impl Listener for Ear {
    fn pulse(&self, link: LinkId, _: Marks) {
        if let Some(shell) = self.0.upgrade() {
            shell.handle(Input::Heard(link));
        }
    }

    fn tick(&self) {}
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

    /// The stop thread has come around; whether what it does next may take long.
    pub(super) fn worked(&self, long: bool) {
        if let Some(standby) = &self.standby {
            standby.pulse.vitals().worked();
            standby.pulse.vitals().takes_long(long);
        }
    }
}

// What the shipper does with a checkpoint that was taken.
impl Shell {
    /// The link that a checkpoint goes over; none if it was taken for another one.
    pub(super) fn link_for(&self, taken: &Taken) -> Option<Arc<PrimaryLink>> {
        self.current_link().filter(|(link, _)| *link == taken.link).map(|(_, l)| l)
    }

    /// Notes a checkpoint's figures until its acknowledgement.
    pub(super) fn note(&self, taken: &Taken, wire_bytes: u64) {
        // Its output did not wait for it: there is no commit to tell of.
        if taken.provisional {
            return;
        }
        let t = &taken.times;
        let sealed = taken.sealed.unwrap_or_else(Instant::now);
        let us = |d: Duration| d.as_micros() as u64;
        let record = EpochRecord {
            epoch: taken.epoch.0,
            generation: taken.generation.0,
            at_us: monotonic_us().saturating_sub(us(sealed.elapsed())),
            interval_us: us(taken.interval),
            stop_us: us(t.total),
            stop_us_by_stage: StopStages {
                hold: us(t.hold),
                freeze: us(t.freeze),
                seal: us(t.seal.saturating_sub(taken.volumes)),
                volumes: us(taken.volumes),
                memory: us(t.memory),
                threads: us(t.threads),
                files: us(t.files),
                thaw: us(t.thaw),
            },
            capture_us_by_kind: CaptureKinds {
                memory: us(t.kinds.memory),
                objects: us(t.kinds.objects),
                threads: us(t.kinds.threads),
                timers: us(t.kinds.timers),
                descriptors: us(t.kinds.descriptors),
                in_flight: us(t.kinds.in_flight),
            },
            stop_pages: t.stop_pages as u64,
            dirty_pages: t.pages as u64,
            wire_bytes,
            commit_us: 0,
            frames: 0,
        };
        metrics::histogram!("nilicon_stop_seconds", "container" => self.name())
            .record(t.total.as_secs_f64());
        metrics::histogram!("nilicon_dirty_pages", "container" => self.name())
            .record(t.pages as f64);
        metrics::counter!("nilicon_wire_bytes_total", "container" => self.name())
            .increment(wire_bytes);
        lock(&self.records).insert(taken.epoch.0, (record, sealed));
    }

    /// Processor time that the shipper has used so far.
    pub(super) fn shipping(&self) -> Duration {
        Duration::from_nanos(self.shipping.load(Ordering::Relaxed))
    }

    /// A checkpoint has left the shipper, sent or dropped; it has used `time` so far, in all.
    pub(super) fn shipped(&self, time: Duration) {
        self.shipping.store(time.as_nanos() as u64, Ordering::Relaxed);
        self.unsent.fetch_sub(1, Ordering::AcqRel);
        self.wake_up();
    }
}

/// Carries releases out, in order, until the shell is gone or its container's time here ends.
pub(super) fn release_all(shell: Arc<Shell>, proofs: std::sync::mpsc::Receiver<CommitProof>) {
    while !shell.must_end() {
        match proofs.recv_timeout(Duration::from_millis(200)) {
            Ok(proof) => shell.release(proof),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
    // What was proven before the end, as in a switchover, leaves.
    proofs.try_iter().for_each(|proof| shell.release(proof));
}

/// Where the backup is and who we are.
pub(super) struct LinkSettings {
    /// As for [`PrimaryLink::connect`], but for the clocks in its hello.
    pub(super) config: PrimaryConfig,
    /// Offsets of the container's clocks from the host's, in nanoseconds.
    pub(super) offsets: (i64, i64),
}

/// The container's clocks now.
pub(super) fn clocks_now(offsets: (i64, i64)) -> Clocks {
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
pub(super) async fn keep_connected(
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
    shell.handle(match event {
        PrimaryEvent::Ack { generation, epoch, digest } => {
            Input::Ack { link, generation, epoch, digest }
        }
        PrimaryEvent::Heartbeat { .. } => Input::Heard(link),
        PrimaryEvent::Bye { bye, newest } => Input::Bye { link, bye, newest },
        PrimaryEvent::Lost(reason) => {
            tracing::info!(container = shell.name, reason, "connection lost");
            Input::Lost(link)
        }
    });
}

/// Sends heartbeats that keep the connection, and gives the core its time.
pub(super) async fn beat(shell: Arc<Shell>) {
    let mut ticks = tokio::time::interval(super::backup::BEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut published = Instant::now();
    let mut received = (LinkId(0), 0);
    loop {
        ticks.tick().await;
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
        let due = lock(&shell.core).next_deadline().is_some_and(|d| d <= shell.origin.elapsed());
        if due {
            shell.handle(Input::Tick);
        }
    }
}

/// Sends what clients said to the backup as well.
pub(super) async fn send_input(shell: Arc<Shell>, mut log: LogReader) {
    loop {
        log.filled().await;
        let frames = log.take();
        let Some((_, link)) = shell.current_link() else { continue };
        for logged in frames {
            link.input(logged.epoch, logged.frame);
        }
    }
}

/// Tells the backup that there is nothing to protect any longer, so that it does not take over,
/// or that it is to take over now; and makes no new connection. Whether the backup has heard it;
/// true if there never was one.
pub(super) async fn say_goodbye(shell: &Shell, bye: Bye) -> bool {
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
