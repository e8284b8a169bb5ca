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

mod commits;
mod link;

pub(super) use commits::release_all;
pub(super) use link::{LinkSettings, beat, break_off, keep_connected, say_goodbye, send_input};

use super::backup::Standby;
use super::journal::Journal;
use super::status::{ContainerStatus, EpochRecord, Phase, Role};
use super::stop::Taken;
use crate::frames::commit::Unprotected;
use crate::frames::gate::Gate;
use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};
use replicator::ack::CommitProof;
use replicator::protocol::LinkId;
use replicator::protocol::detector::Pace;
use replicator::protocol::primary::{Action, Input, Primary, State};
use replicator::transport::PrimaryLink;
use replicator::{Epoch, Generation};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::Instant;
use tokio::sync::mpsc;

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
    pub(super) releases: std::sync::mpsc::Receiver<Option<CommitProof>>,
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
    /// None only wakes.
    releases: Mutex<std::sync::mpsc::Sender<Option<CommitProof>>>,
    gate: OnceLock<Arc<Gate>>,
    output_protected: AtomicBool,
    /// The control of an experiment: output never waits.
    control: bool,
    unsent: AtomicUsize,
    /// Processor time that the shipper has used, in nanoseconds.
    shipping: AtomicU64,
    progress: AtomicU64,
    /// The stop thread waits for checkpoints to go their way: for room, or for the last of them.
    attentive: AtomicBool,
    /// Pulses may come seldom.
    rests: AtomicBool,
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
            attentive: AtomicBool::new(true),
            rests: AtomicBool::new(false),
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

    /// Whether the stop thread is to be woken for each checkpoint that has gone a step of its way. To be said
    /// before it looks how far they are.
    pub(super) fn attend(&self, attentive: bool) {
        self.attentive.store(attentive, Ordering::SeqCst);
    }

    /// A checkpoint has gone a step of its way: wakes the stop thread if that waits for it. With one client each
    /// epoch takes three steps, and a thread that looks takes the processor from who answers it.
    fn step(&self) {
        if self.attentive.load(Ordering::SeqCst) {
            self.wake_up();
        }
    }

    /// Tells the stop thread to end the container.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        self.wake_up();
        // Who has ended already needs no waking.
        let _ = lock(&self.releases).send(None);
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
        let unsent = self.unsent.load(Ordering::SeqCst);
        core.may_begin_stop() && core.in_flight() + unsent < core.depth()
    }

    /// Whether the next checkpoint must be a full one.
    pub(super) fn full_is_due(&self) -> bool {
        lock(&self.base).full
    }

    /// The connection for which the next checkpoint must be a full one.
    pub(super) fn full_for(&self) -> Option<LinkId> {
        let base = lock(&self.base);
        base.full.then_some(base.link)
    }

    /// Files of `all` bytes go to a new backup, `sent` of them so far.
    pub(super) fn copies_files(&self, all: u64, sent: u64) {
        tracing::info!(container = self.name, all, sent, "a new backup gets its files");
        self.say_why(format!(
            "a new backup gets its files: {} of {} MB",
            sent / 1_000_000,
            all.max(sent) / 1_000_000
        ));
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
        self.unsent.load(Ordering::SeqCst) == 0
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

    /// What a backup said when it closed the connection is more than that it is lost.
    fn say_what_it_said(&self, said: &str) {
        let is_lost = matches!(
            lock(&self.core).state(),
            State::Connecting { .. } | State::Severed { .. } | State::Alone { .. }
        );
        if is_lost && !said.is_empty() {
            self.say_why(format!("the backup is lost: {said}"));
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
        self.unsent.fetch_add(1, Ordering::SeqCst);
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

    /// Whether this side acts alone, its output leaves, and no backup is about to change that.
    pub(super) fn is_let_alone(&self) -> bool {
        let alone = matches!(lock(&self.core).state(), State::Alone { .. });
        alone && !self.control && !self.output_protected.load(Ordering::Acquire)
    }

    /// Gives the core a checkpoint whose last frame is about to leave. Whether it may.
    pub(super) fn sent(&self, taken: &Taken, digest: u64) -> bool {
        let (link, epoch, provisional) = (taken.link, taken.epoch, taken.provisional);
        self.handle(Input::Sent { link, epoch, digest, provisional });
        lock(&self.core).sends_on(link)
    }

    /// Gives the core an input and carries out its actions.
    pub(super) fn handle(&self, input: Input) {
        self.handle_with(lock(&self.core), input);
    }

    /// The core, unless somebody else has it just now. For the thread that beats: who has it may wait for a
    /// processor, and the pulses of a host that lives would wait with him.
    fn core_if_free(&self) -> Option<MutexGuard<'_, Primary>> {
        match self.core.try_lock() {
            Ok(core) => Some(core),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn handle_with(&self, mut core: MutexGuard<'_, Primary>, input: Input) {
        let heard =
            matches!(input, Input::Heard(_) | Input::Pulse { .. } | Input::Quiet(_) | Input::Tick);
        let (rested, before) = (core.pace() == Pace::Rests, core.state());
        let actions = core.handle(self.origin.elapsed(), input);
        let stirs = rested && core.pace() != Pace::Rests;
        self.rests.store(core.pace_of_pulses() == Pace::Rests, Ordering::Release);
        let only_a_step = core.state() == before
            && actions.iter().all(|action| matches!(action, Action::Release(_)));
        drop(core);
        // Somebody waits from now on: the backup is to know, and to be judged as usual.
        if let Some(standby) = self.standby.as_ref().filter(|_| stirs) {
            standby.pulse.stir();
        }
        let silent = actions.is_empty() && only_a_step;
        let idle = actions.is_empty() && heard;
        for action in actions {
            self.act(action);
        }
        if idle {
            return;
        }
        if !silent {
            self.follow_state();
        }
        if only_a_step { self.step() } else { self.wake_up() }
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
                let _ = lock(&self.releases).send(Some(proof));
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
