//! A container that runs here, from its begin ([`begin`]) over its work, beside which its shell is
//! ([`shell`]), to its end; also one that it was not meant to have ([`loss`]).

mod begin;
mod loss;
mod shell;

use super::AgentOptions;
use super::backup::Standby;
use super::network::Place as NetworkPlace;
use super::orphans::Closed;
use super::pace::{Pacer, Rates};
use super::primary::{self, SharedStatus, Shell, lock};
use super::ship;
use super::status::{Phase, Role};
use super::stop::{Ending, StopLoop, Taken};
use super::volumes::{Files, InUse};
use crate::chain::chain;
use crate::frames::gate::{Ends, Gate, ThreadSetup};
use crate::frames::input_log;
use anyhow::{Result, anyhow};
use loss::reasons;
use netns_tools::cgroup::Cgroup;
use netns_tools::topology::{OnUnprotectable, Protect, Ready};
use nix::sys::signalfd::SignalFd;
use replicator::capture::Capturer;
use replicator::container::{ContainerSpec, Launched};
use replicator::protocol::primary::State;
use replicator::sys::sched;
use replicator::wire::message::Bye;
use replicator::{Epoch, Generation};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// Checkpoints in flight.
const DEPTH: usize = 4;
/// Sets of buffers between the stop thread and the shipper.
const BUFFERS: usize = 2;
/// Bounds of the input log on its way to the sender.
const LOG_BYTES: usize = 16 << 20;
const LOG_FRAMES: usize = 1 << 15;
/// Whose silence is judged by whom. A backup that is thought dead for nothing costs a full copy, and
/// to find out late that it is dead costs no client anything but its policy's patience.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    /// The primary's, by its backup.
    FromBackup,
    /// The backup's, by its primary.
    FromPrimary,
}

/// What every part of a container on this host needs to know.
pub(super) struct Place {
    pub(super) options: Arc<AgentOptions>,
    pub(super) network: NetworkPlace,
    pub(super) spec: ContainerSpec,
    /// Its replicated volumes here.
    pub(super) files: Option<Arc<Files>>,
    /// Where it has volumes of any kind.
    pub(super) homes: Vec<PathBuf>,
    pub(super) cgroup: Cgroup,
    pub(super) ready: Option<Ready>,
    pub(super) protect: Option<Protect>,
    pub(super) status: SharedStatus,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) thread_setup: ThreadSetup,
    pub(super) duty: Arc<Duty>,
}

/// What a part does at the moment, for whoever gives it orders from outside.
#[derive(Default)]
pub(super) struct Duty {
    end: AtomicBool,
    /// For the one who waits for that.
    ended: Notify,
    shell: Mutex<Option<Arc<Shell>>>,
    standby: OnceLock<Arc<Standby>>,
}

impl Duty {
    /// Tells the part to end.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        self.ended.notify_one();
        if let Some(shell) = &*lock(&self.shell) {
            shell.end();
        }
    }

    pub(super) fn must_end(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }

    /// Waits until the part may be told to end. Only one of its threads may wait.
    pub(super) async fn told_to_end(&self) {
        self.ended.notified().await;
    }

    /// A part of a protected container.
    pub(super) fn stands_by(&self, standby: Arc<Standby>) {
        let _ = self.standby.set(standby);
    }

    /// The operator lets this side act alone; refused with the reason.
    pub(super) fn allow(&self) -> Result<(), String> {
        self.standby.get().map_or_else(|| Err("it is not protected".into()), |s| s.judge.allow())
    }

    /// Asks for a switchover; refused with the reason.
    pub(super) fn hand_over(&self) -> Result<(), String> {
        match &*lock(&self.shell) {
            Some(shell) => shell.hand_over(),
            None => Err("it does not run here".into()),
        }
    }
}

/// A container that the calling thread has under ptrace.
pub(super) struct Life {
    /// Before the container, so that they end after it.
    pub(super) files: Option<InUse>,
    pub(super) launched: Launched,
    pub(super) capturer: Capturer,
    pub(super) gate: Arc<Gate>,
    pub(super) signals: SignalFd,
    pub(super) generation: Generation,
    /// The epoch that it went on from; none if it began here.
    pub(super) from: Option<Epoch>,
    /// Connections that it had closed before.
    pub(super) closed: Vec<Ends>,
}

/// How a container's time here ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Its processes, or the agent, ended.
    Over,
    /// It runs elsewhere in this generation, or will soon.
    Moved(Generation),
}

impl Place {
    /// Runs an unprotected container from its begin to its end.
    pub(super) fn run_alone(&self) {
        // Files that are kept are newer from now on than those of any copy of an earlier life.
        let files = self.files.as_ref();
        let generation = files.map_or(Generation::FIRST, |files| files.generation().next());
        let result = self.begin(generation).and_then(|life| self.lead(life, None));
        self.tell_end(result.map(drop));
    }

    /// The last status of a container that has ended here.
    pub(super) fn tell_end(&self, result: Result<()>) {
        let name = &self.network.name;
        primary::tell_protected(name, false);
        let mut status = lock(&self.status);
        status.protected = false;
        match result {
            Ok(()) => {
                if !matches!(status.phase, Phase::Demoted | Phase::Failed) {
                    status.phase = Phase::Ended;
                }
                tracing::info!(container = name, phase = ?status.phase, "the container has ended");
            }
            Err(error) => {
                tracing::error!(container = name, error = chain(&error), "failed");
                (status.phase, status.reason) = (Phase::Failed, Some(chain(&error)));
            }
        }
        (status.role, status.pid) = (Role::None, None);
    }

    /// Runs a container until it, its time here or the agent ends. Afterwards it is gone from
    /// here.
    pub(super) fn lead(&self, life: Life, standby: Option<&Arc<Standby>>) -> Result<Outcome> {
        let Life { files, mut launched, capturer, gate, signals, generation, from, closed } = life;
        let (pid, name) = (launched.pid, &self.network.name);
        let (writer, reader) = input_log::channel(LOG_BYTES, LOG_FRAMES);
        gate.log_input(Some(writer));
        // A protected container that begins answers nobody before its backup has taken it.
        let plugged = from.is_some() || self.protect.is_none();
        if plugged {
            gate.plug()?;
        }
        // A takeover has said so before.
        if plugged && from.is_none() {
            self.network.announce(gate.clone())?;
        }
        if self.protect.is_none() {
            self.network.bypass(gate.clone(), pid);
        }
        {
            let mut status = lock(&self.status);
            status.phase = if plugged { Phase::Unprotected } else { Phase::Waiting };
            status.pid = Some(pid);
        }
        tracing::info!(container = name, pid, plugged, %generation, "the container runs");

        let (shell, mut tasks) = self.make_shell(&launched, reader, generation, from, standby)?;
        shell.set_gate(gate.clone());
        *lock(&self.duty.shell) = Some(shell.clone());
        if self.duty.must_end() {
            shell.end();
        }
        let (to_ship, taken) = mpsc::channel(BUFFERS);
        let (back, from_ship) = mpsc::channel(BUFFERS);
        let shipper = shell.clone();
        std::thread::Builder::new()
            .name("ship".into())
            .spawn(move || ship::run(shipper, taken, back))?;
        let rates = self.protect.as_ref().map_or_else(Rates::never, |p| Rates {
            min: *p.epoch.min,
            max: *p.epoch.max,
            share: p.epoch.stop_share.get(),
            gather: *p.epoch.gather,
        });
        let mut stops = StopLoop {
            capturer,
            gate: gate.clone(),
            shell: shell.clone(),
            pid,
            alone: None,
            signals,
            pacer: Pacer::new(rates, Duration::ZERO),
            origin: Instant::now(),
            to_ship,
            from_ship,
            epoch: from.map_or(Epoch(1), Epoch::next),
            transient_since: None,
            stirred: (Duration::ZERO, false),
            on_unprotectable: self.on_unprotectable(),
            plugged,
            network: self.network.clone(),
            buffers: (0..BUFFERS).map(|_| Taken::default()).collect(),
            still: None,
            volumes: files.as_ref().map(|files| files.volumes.clone()),
            copying: None,
            seal_failed: None,
            lost: false,
            closed: Closed::of(name, pid, closed),
            rests: false,
            poised: None,
        };
        let mut ending = stops.run();
        if let Ok(Ending::Unprotectable(why)) = ending {
            let reasons = reasons(&mut stops.capturer, &why);
            ending = match self.on_unprotectable() {
                OnUnprotectable::Unprotected => {
                    if self.end_protection(&shell, &gate, &reasons) {
                        self.network.bypass(gate.clone(), pid);
                    }
                    stops.only_look_after()
                }
                // A freeze waits in the stops; what comes here will not pass.
                OnUnprotectable::Freeze | OnUnprotectable::Stop => {
                    primary::count_unprotectable(&self.network.name, "stop");
                    Err(anyhow!("{reasons}; it ends, as its policy (on-unprotectable) says"))
                }
            };
        }
        *lock(&self.duty.shell) = None;
        if shell.state() != State::HandedOver {
            gate.unplug();
        }
        let killed = match ending {
            Ok(Ending::Ended) => self.was_killed(&mut stops.capturer),
            _ => None,
        };
        let outcome = match shell.state() {
            State::Demoted { by } => Outcome::Moved(by),
            State::HandedOver => Outcome::Moved(shell.generation()),
            _ if killed.is_some() => Outcome::Moved(shell.generation()),
            _ => Outcome::Over,
        };
        if let (Outcome::Moved(newest), Some(standby)) = (&outcome, standby) {
            // From now on whoever runs it may make this side its backup.
            if let Some(files) = &self.files {
                files.give_way();
            }
            standby.give_way(*newest);
        }
        match shell.state() {
            State::HandedOver => {
                self.runtime.block_on(primary::say_goodbye(&shell, Bye::Switchover));
            }
            State::Demoted { .. } => {}
            _ if killed.is_some() => {
                primary::break_off(&shell);
                if let Some((standby, why)) = standby.zip(killed) {
                    self.leave(standby, why);
                }
            }
            _ => {
                self.runtime.block_on(primary::say_goodbye(&shell, Bye::Stop));
            }
        }
        shell.end();
        tasks.join_release();
        gate.unplug();
        launched.end();
        ending.map(|_| outcome)
    }

    /// A topology that names volumes says where the container's files are: others that it writes to
    /// would stay behind. Its console is not its own.
    pub(super) fn watch_files(&self, capturer: &mut Capturer, files: Option<&InUse>) -> Result<()> {
        if let Some(files) = files {
            let (root, others) = files.known()?;
            root.into_iter().for_each(|root| capturer.keep_root_in(root));
            others.into_iter().for_each(|volume| capturer.keep_volume(volume));
        }
        if self.homes.is_empty() {
            return Ok(());
        }
        let console = self.spec.console.clone();
        Ok(capturer.keep_files_in(self.homes.iter().cloned().chain([console]).collect())?)
    }

    fn on_unprotectable(&self) -> OnUnprotectable {
        self.protect.as_ref().map_or_else(OnUnprotectable::default, |p| p.on_unprotectable)
    }
}

/// The set-up of the gate's threads: ahead of ordinary work. Real-time ones would be woken by every
/// single frame of a client on the same processor, and take it from the client.
pub(super) fn gate_threads() -> ThreadSetup {
    const NICE: i32 = -10;
    Arc::new(|which| {
        if let Err(error) = sched::set_ordinary().and_then(|()| sched::set_nice(NICE)) {
            tracing::debug!(?which, %error, "a thread of the gate runs at ordinary priority");
        }
    })
}
