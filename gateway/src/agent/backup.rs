//! A container's backup: the protocol core, the connections, and the applier thread that keeps
//! the warm spare up to date and brings it to life.
//!
//! ```text
//!  link (QUIC) ──checkpoints (bounded)──► applier thread: spare.apply
//!      │  └─ acknowledged when complete, before it is applied    │
//!      └─ hello, heartbeats, input log ─► core ─ Ask ─► arbiter  │
//!                                          └──── Promote ────────┴─► takeover
//! ```
//! The applier takes every checkpoint that was acknowledged before it carries out a promotion:
//! they are in its channel by then, because the core acknowledges and delivers under one lock.

use super::network::Place;
use super::primary::{SharedStatus, lock};
use super::status::{FailoverPhases, Phase, Role};
use super::stop::{RealTime, become_stop_thread, drain_signals, sleep_on};
use super::takeover::{self, Takeover};
use crate::chain::chain;
use crate::frames::gate::{Gate, GateConfig};
use crate::frames::input_log::{InputLog, LoggedFrame};
use anyhow::{Context, Result};
use netns_tools::namespace::Namespace;
use nix::poll::{PollFd, PollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use replicator::capture::{CaptureError, Capturer};
use replicator::container::{self, ContainerSpec};
use replicator::image::Clocks;
use replicator::protocol::LinkId;
use replicator::protocol::arbiter::{Arbiter, Unopposed};
use replicator::protocol::backup::{Action, Input};
use replicator::restore::Spare;
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use replicator::transport::admission::Notice;
use replicator::transport::{BackupEndpoint, Event, SharedBackup};
use replicator::wire::Checkpoint;
use replicator::wire::message::Bye;
use replicator::{Epoch, Generation};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Checkpoints that may wait for the applier; then acknowledgements wait.
pub(super) const DEPTH: usize = 4;
/// Bounds of the input log at the backup.
const LOG_BYTES: usize = 64 << 20;
const LOG_FRAMES: usize = 1 << 17;
/// Ahead of ordinary work.
const NICE: i32 = -10;
/// How much the spare's clocks are set ahead: at least what a hello takes, so that no clock of the
/// container steps back at a failover.
const CLOCK_MARGIN: Duration = Duration::from_millis(5);
/// Longest sleep of a container that runs here without protection.
const IDLE: Duration = Duration::from_millis(200);

/// What the applier is told apart from checkpoints.
#[derive(Debug)]
pub(super) enum Order {
    /// A primary was admitted, whose container's clocks read this at that time.
    Admitted(LinkId, Clocks, Instant),
    /// Take over.
    Promote(Generation, Epoch),
    /// The copy is void.
    Discard,
}

/// What connections, timers and the applier share.
pub(super) struct BackupShell {
    pub(super) name: String,
    pub(super) core: Arc<SharedBackup>,
    pub(super) endpoint: Arc<BackupEndpoint>,
    pub(super) log: Mutex<InputLog>,
    pub(super) status: SharedStatus,
    progress: AtomicU64,
    last_life: Mutex<Instant>,
    suspicion: Mutex<Option<(Instant, Duration)>>,
    promoted: AtomicBool,
    end: AtomicBool,
    wake: EventFd,
}

impl BackupShell {
    pub(super) fn new(
        name: &str,
        core: Arc<SharedBackup>,
        endpoint: Arc<BackupEndpoint>,
        status: SharedStatus,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            name: name.to_owned(),
            core,
            endpoint,
            log: Mutex::new(InputLog::new(LOG_BYTES, LOG_FRAMES)),
            status,
            progress: AtomicU64::new(0),
            last_life: Mutex::new(Instant::now()),
            suspicion: Mutex::default(),
            promoted: AtomicBool::new(false),
            end: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        }))
    }

    /// Tells the applier to end.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// When the primary was suspected, and for how long it had been silent.
    pub(super) fn suspicion(&self) -> (Instant, Duration) {
        lock(&self.suspicion).unwrap_or_else(|| (Instant::now(), Duration::ZERO))
    }
}

/// Handles what the core and its connections tell, one after the other.
pub(super) async fn follow(
    shell: Arc<BackupShell>,
    mut notices: mpsc::UnboundedReceiver<Notice>,
    orders: mpsc::UnboundedSender<Order>,
) {
    let mut arbiter = Unopposed::default();
    while let Some(notice) = notices.recv().await {
        match notice {
            Notice::Admitted(link, generation, hello) => {
                tracing::info!(container = shell.name, primary = hello.host, %generation,
                    "a primary presents itself");
                let mut status = lock(&shell.status);
                status.generation = generation.0;
                status.phase = Phase::Syncing;
                let _ = orders.send(Order::Admitted(link, hello.clocks, Instant::now()));
            }
            Notice::Event(_, event) => heard(&shell, event),
            Notice::TurnedAway(peer, error) => {
                metrics::counter!("nilicon_peers_turned_away_total").increment(1);
                tracing::warn!(container = shell.name, %peer, %error, "turned away");
            }
            Notice::Action(action) => act(&shell, &mut arbiter, &orders, action),
        }
    }
}

fn heard(shell: &BackupShell, event: Event) {
    match event {
        Event::Heard(_) => *lock(&shell.last_life) = Instant::now(),
        Event::Input { epoch, bytes, .. } => {
            *lock(&shell.last_life) = Instant::now();
            lock(&shell.log).push(LoggedFrame { epoch, frame: bytes });
        }
        Event::Bye { bye, .. } => {
            tracing::info!(container = shell.name, ?bye, "the primary says goodbye");
        }
        Event::Lost(error) => {
            tracing::info!(container = shell.name, %error, "connection to the primary is over");
        }
    }
}

fn act(
    shell: &BackupShell,
    arbiter: &mut Unopposed,
    orders: &mpsc::UnboundedSender<Order>,
    action: Action,
) {
    match action {
        Action::Ask(generation) => {
            let now = Instant::now();
            let silence = now - *lock(&shell.last_life);
            *lock(&shell.suspicion) = Some((now, silence));
            tracing::warn!(container = shell.name, ?silence, %generation,
                "the primary is silent; asking to take over");
            let verdict = arbiter.may_promote(generation);
            shell.core.handle(Input::Verdict { generation, verdict });
        }
        Action::Promote { generation, from } => {
            let _ = orders.send(Order::Promote(generation, from));
        }
        Action::Close(link) => shell.endpoint.close(link, "the backup closes this connection"),
        Action::Discard => {
            let mut status = lock(&shell.status);
            (status.phase, status.protected) = (Phase::Waiting, false);
            // The container's next life counts its epochs anew.
            *lock(&shell.log) = InputLog::new(LOG_BYTES, LOG_FRAMES);
            let _ = orders.send(Order::Discard);
        }
        Action::Lost => {
            let mut status = lock(&shell.status);
            status.phase = Phase::Waiting;
            status.reason = Some("the primary was lost before its first full copy".into());
        }
        Action::Welcome(_) | Action::Refuse { .. } | Action::Apply(_) | Action::Ack { .. } => {}
    }
}

/// Sends heartbeats and gives the core its time.
pub(super) async fn beat(shell: Arc<BackupShell>, pause: Duration) {
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut received = Vec::new();
    loop {
        ticks.tick().await;
        // A large checkpoint on a busy machine can hold up heartbeats and take long to be
        // complete; what has arrived of it is a sign of life as well.
        let now = shell.endpoint.received();
        for (link, _) in now.iter().filter(|of_link| !received.contains(*of_link)) {
            *lock(&shell.last_life) = Instant::now();
            shell.core.handle(Input::Heard(*link));
        }
        received = now;
        let (generation, epoch) = {
            let status = lock(&shell.status);
            (Generation(status.generation), Epoch(status.epoch))
        };
        if !shell.promoted.load(Ordering::Relaxed) {
            let progress = shell.progress.load(Ordering::Relaxed);
            shell.endpoint.heartbeat(generation, epoch, progress);
        }
        if shell.core.next_deadline().is_some_and(|d| d <= shell.core.now()) {
            shell.core.handle(Input::Tick);
        }
    }
}

/// The warm spare and its place in the network.
pub(super) struct Warm {
    pub(super) spare: Spare,
    pub(super) gate: Arc<Gate>,
    pub(super) last: Option<(Arc<Checkpoint>, Instant)>,
}

/// The applier thread's own.
pub(super) struct Applier {
    pub(super) shell: Arc<BackupShell>,
    pub(super) place: Place,
    pub(super) spec: ContainerSpec,
    pub(super) lab: String,
    pub(super) host: String,
    pub(super) checkpoints: mpsc::Receiver<Arc<Checkpoint>>,
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) thread_setup: crate::frames::gate::ThreadSetup,
    pub(super) warm: Option<Warm>,
    pub(super) link: LinkId,
}

enum Next {
    Checkpoint(Arc<Checkpoint>),
    Order(Order),
    Over,
}

impl Applier {
    /// Runs until the agent ends, or the container that it brought to life does.
    pub(super) fn run(mut self) {
        if let Err(error) = sched::set_ordinary().and_then(|()| sched::set_nice(NICE)) {
            tracing::debug!(%error, "the applier runs at ordinary priority");
        }
        loop {
            match self.next() {
                Next::Checkpoint(checkpoint) => self.apply(&checkpoint),
                Next::Order(Order::Admitted(link, clocks, at)) => {
                    self.link = link;
                    if self.warm.is_none()
                        && let Err(error) = self.launch(clocks, at)
                    {
                        self.fail("no warm spare can be made here", &error);
                    }
                }
                Next::Order(Order::Discard) => self.warm = None,
                Next::Order(Order::Promote(generation, from)) => {
                    if let Err(error) = self.promote(generation, from) {
                        self.fail("the container could not be brought to life", &error);
                    }
                }
                Next::Over => return,
            }
        }
    }

    fn next(&mut self) -> Next {
        let shell = self.shell.clone();
        let (checkpoints, orders) = (&mut self.checkpoints, &mut self.orders);
        self.runtime.block_on(async {
            loop {
                if shell.end.load(Ordering::Acquire) {
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

    fn launch(&mut self, clocks: Clocks, told_at: Instant) -> Result<()> {
        let mut spec = self.spec.clone();
        let since = (told_at.elapsed() + CLOCK_MARGIN).as_nanos() as u64;
        spec.clocks =
            Some(Clocks { monotonic: clocks.monotonic + since, boottime: clocks.boottime + since });
        let launched = container::launch(&spec, container::Role::Spare)?;
        let pid = launched.pid;
        let inner = self.place.make_inner(pid).context("the spare's network")?;
        let outer = self.place.make_outer()?;
        let spare = Spare::new(launched)?;
        let gate = Gate::start(
            inner,
            outer,
            GateConfig {
                mac: Some(self.place.mac),
                thread_setup: Some(self.thread_setup.clone()),
                ..GateConfig::default()
            },
        )?;
        lock(&self.shell.status).pid = Some(pid);
        self.warm = Some(Warm { spare, gate: Arc::new(gate), last: None });
        Ok(())
    }

    /// Folds a checkpoint in. A spare that cannot follow is given up: the primary is sent away,
    /// and when it comes back it sends a full copy.
    fn apply(&mut self, checkpoint: &Arc<Checkpoint>) {
        let Some(warm) = &mut self.warm else {
            tracing::debug!(epoch = %checkpoint.epoch, "a checkpoint without a spare");
            return;
        };
        let received = Instant::now();
        match warm.spare.apply(&checkpoint.state, &checkpoint.pages) {
            Ok(()) => {
                metrics::histogram!("nilicon_apply_seconds", "container" => self.shell.name.clone())
                    .record(received.elapsed().as_secs_f64());
                warm.last = Some((checkpoint.clone(), received));
                self.shell.progress.fetch_add(1, Ordering::Relaxed);
                lock(&self.shell.log).committed(checkpoint.epoch);
                let mut status = lock(&self.shell.status);
                status.epoch = checkpoint.epoch.0;
                status.generation = checkpoint.generation.0;
                if status.phase != Phase::Failed {
                    (status.phase, status.protected) = (Phase::Protected, true);
                }
            }
            Err(error) => {
                self.warm = None;
                let (link, epoch) = (self.link, checkpoint.epoch);
                let error = anyhow::Error::new(error).context(format!("epoch {epoch}"));
                self.fail("the warm spare cannot follow", &error);
                self.shell.core.handle(Input::Bye { link, bye: Bye::Demoted, last: epoch });
                self.shell.endpoint.close(link, "the warm spare cannot follow");
            }
        }
    }

    fn promote(&mut self, generation: Generation, from: Epoch) -> Result<()> {
        let fenced = Instant::now();
        let (suspected, silence) = self.shell.suspicion();
        let signals = become_stop_thread()?;
        lock(&self.shell.status).phase = Phase::Promoting;
        // Everything that was acknowledged is in the channel by now.
        while let Ok(checkpoint) = self.checkpoints.try_recv() {
            self.apply(&checkpoint);
        }
        let warm = self.warm.as_mut().context("there is no warm spare")?;
        let last = warm.last.as_ref().map(|(c, _)| c.epoch);
        anyhow::ensure!(last == Some(from), "the spare holds epoch {last:?}, not {from}");
        let phases = FailoverPhases {
            silence: ms(silence),
            fence: ms(fenced - suspected),
            apply: ms(fenced.elapsed()),
            ..FailoverPhases::default()
        };
        let frames = lock(&self.shell.log).take_for_replay(from);
        let takeover = Takeover { place: &self.place, generation, from, suspected, phases };
        let real_time = RealTime::start();
        let (record, tree) = takeover::run(&takeover, warm, frames)?;
        drop(real_time);
        self.shell.promoted.store(true, Ordering::Relaxed);
        self.shell.core.handle(Input::Running);
        {
            let mut status = lock(&self.shell.status);
            status.role = Role::Primary;
            status.phase = Phase::Unprotected;
            status.protected = false;
            status.generation = generation.0;
            status.epoch = from.0;
        }
        super::journal::write_failover(&self.lab, &self.host, &self.shell.name, &record);
        tracing::warn!(container = self.shell.name, %generation, epoch = %from,
            total_ms = record.phases_ms.total, "the container runs here now");
        let pid = warm.spare.pid();
        let diag = Namespace::of_process(pid)?.enter(UnixDiag::open)??;
        let mut capturer = Capturer::adopt_running(&tree, diag)?;
        let ended = self.keep(&mut capturer, &signals);
        let mut status = lock(&self.shell.status);
        status.phase = Phase::Ended;
        status.reason = ended.err().map(|e| chain(&e));
        Ok(())
    }

    /// Looks after a container that runs here: its signals, clones and exits.
    fn keep(&self, capturer: &mut Capturer, signals: &nix::sys::signalfd::SignalFd) -> Result<()> {
        loop {
            match capturer.pump() {
                Ok(()) => {}
                Err(CaptureError::Ended) => return Ok(()),
                // The container's threads wait for us at their next event: never leave them.
                Err(error) => {
                    tracing::error!(container = self.shell.name, %error,
                        "an event of the container could not be handled");
                }
            }
            if self.shell.end.load(Ordering::Acquire) {
                return Ok(());
            }
            let mut fds = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.shell.wake.as_fd(), PollFlags::POLLIN),
            ];
            sleep_on(&mut fds, IDLE)?;
            drain_signals(signals);
            if let Some(warm) = &self.warm {
                warm.gate.counters().publish(&self.shell.name);
            }
        }
    }
}

/// Milliseconds with fractions.
pub(super) fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
