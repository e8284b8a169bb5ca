//! A container's other side: the protocol core and the connections, which live as long as the agent;
//! and beside them the thread that has the warm spare ([`applier`]), and what hosts ask each other
//! ([`ask`]).
//!
//! ```text
//!  link (QUIC) ──checkpoints (bounded)──► applier thread: spare.apply
//!      │  └─ acknowledged when complete, before it is applied    │
//!      └─ hello, heartbeats, input log ─► core ─ Ask ─► arbiter  │
//!                                          └──── Promote ────────┴─► takeover
//! ```
//! The applier takes every checkpoint that was acknowledged before it carries out a promotion:
//! they are in its channel by then, because the core acknowledges and delivers under one lock.

mod applier;
mod ask;

pub(super) use applier::{Applier, SharedClocks, Warm, ms};
pub(super) use ask::{find_out, leave_to_backup};

use super::journal::Memory;
use super::judge::Judge;
use super::primary::{SharedStatus, lock};
use super::status::{Phase, Role};
use super::urgency;
use super::volumes::Files;
use super::worker::Place;
use crate::frames::gate::Gate;
use crate::frames::input_log::{InputLog, LoggedFrame};
use bytes::Bytes;
use replicator::protocol::arbiter::Claim;
use replicator::protocol::backup::{Action, Input};
use replicator::protocol::detector::Pace;
use replicator::sys::sched;
use replicator::transport::admission::Notice;
use replicator::transport::link::LinkError;
use replicator::transport::{BackupEndpoint, Event, Pulse, SharedBackup};
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
/// Pause between heartbeats over the connection, which keep it alive where pulses do not arrive.
const BEAT: Duration = Duration::from_millis(10);
/// The same while pulses arrive and say that nothing happens: less than a third of what a connection lives without,
/// and less than half of the shortest time after which work that stands still is suspect.
const SELDOM: Duration = Duration::from_millis(600);

/// A container that is killed twice within this time at one host stays away from it.
const QUIET: Duration = Duration::from_secs(60);

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
    /// The other host, where the container was killed, wants it back.
    wanted_back: AtomicBool,
    /// When the container was killed here last.
    killed: Mutex<Option<Instant>>,
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
            wanted_back: AtomicBool::new(false),
            killed: Mutex::default(),
        })
    }

    /// What this side asks of the arbiter.
    pub(super) fn claim(&self, base: Generation, wanted: Generation) -> Claim {
        Claim { container: self.name.clone(), host: self.host.clone(), base, wanted }
    }

    /// The container does not run here any longer.
    pub(super) fn give_way(&self, newest: Generation) {
        self.wanted_back.store(false, Ordering::Release);
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

    /// Whether the other host wants the container back, which was killed there.
    pub(super) fn is_wanted_back(&self) -> bool {
        self.wanted_back.load(Ordering::Acquire)
    }

    /// The container was killed here; whether that is the first time for [`QUIET`].
    pub(super) fn killed_here(&self) -> bool {
        let before = lock(&self.killed).replace(Instant::now());
        before.is_none_or(|before| before.elapsed() > QUIET)
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
                // It runs elsewhere, whatever was asked before.
                shell.wanted_back.store(false, Ordering::Release);
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
            Notice::WantedBack => {
                tracing::warn!(
                    container = shell.name,
                    "it was killed at the other host, and goes back there once it is protected"
                );
                shell.wanted_back.store(true, Ordering::Release);
            }
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
    if let Err(error) = sched::set_fifo_of(thread, urgency::PRIORITY) {
        tracing::debug!(%error, "a takeover competes with ordinary work");
    }
}

/// The pause between heartbeats over the connection.
pub(super) fn pause_of(pace: Pace) -> Duration {
    match pace {
        Pace::Usual | Pace::Doubts => BEAT,
        Pace::Rests => SELDOM,
    }
}

/// Sends heartbeats that keep the connection, and looks after what else has its time.
pub(super) async fn beat(shell: Arc<Standby>) {
    let mut received = Vec::new();
    loop {
        // Without a connection there is nothing to keep.
        let stands_alone = received.is_empty() && shell.core.next_deadline().is_none();
        let pause = if stands_alone { SELDOM } else { pause_of(shell.core.pace()) };
        tokio::time::sleep(pause).await;
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
        // While it rests the primary's keep the connection: they are confirmed by the transport.
        if shell.core.pace() != Pace::Rests {
            shell.endpoint.heartbeat(generation, epoch, progress);
        }
        if shell.core.next_deadline().is_some_and(|d| d <= shell.core.now()) {
            shell.core.handle(Input::Tick);
        }
    }
}
