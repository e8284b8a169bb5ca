//! The thread that keeps the warm spare up to date, brings it to life, and then runs it.
//!
//! Invariant: a promotion finds applied all that was acknowledged; a spare that cannot follow is
//! given up as a whole, and said so.

use super::{Order, Standby};
use crate::agent::journal;
use crate::agent::orphans::Closed;
use crate::agent::primary::lock;
use crate::agent::status::{FailoverPhases, Phase, Role};
use crate::agent::takeover::{self, Takeover};
use crate::agent::urgency::RealTime;
use crate::agent::worker::{Life, Outcome, Place};
use crate::agent::young;
use crate::chain::chain;
use crate::frames::gate::{Gate, GateConfig};
use anyhow::{Context, Result};
use netns_tools::namespace::Namespace;
use replicator::capture::Capturer;
use replicator::container;
use replicator::image::Clocks;
use replicator::protocol::backup::{Input, State};
use replicator::restore::Spare;
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use replicator::volume::Volumes;
use replicator::wire::Checkpoint;
use replicator::wire::message::Bye;
use replicator::young::Door;
use replicator::{Epoch, Generation};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// As ordinary work: nobody waits for it before a failover, and then it is real-time.
const NICE: i32 = 0;
/// How much the spare's clocks are set ahead: at least what a hello takes, so that no clock of the
/// container steps back at a failover.
const CLOCK_MARGIN: Duration = Duration::from_millis(5);
/// The warm spare and its place in the network.
pub(in crate::agent) struct Warm {
    pub(in crate::agent) spare: Spare,
    /// The files of its replicated volumes.
    pub(in crate::agent) files: Option<Arc<Volumes>>,
    pub(in crate::agent) gate: Arc<Gate>,
    pub(in crate::agent) last: Option<(Arc<Checkpoint>, Instant)>,
    /// For connections that are not accepted yet, if this kernel can restore them.
    pub(in crate::agent) door: Option<Door>,
}

/// What the applier thread has.
pub(in crate::agent) struct Applier {
    pub(in crate::agent) place: Place,
    pub(in crate::agent) shell: Arc<Standby>,
    pub(in crate::agent) lab: String,
    pub(in crate::agent) checkpoints: mpsc::Receiver<Arc<Checkpoint>>,
    pub(in crate::agent) orders: mpsc::UnboundedReceiver<Order>,
    pub(in crate::agent) warm: Option<Warm>,
    pub(in crate::agent) clocks: SharedClocks,
}

/// What the container's clocks read when its primary presented itself.
pub(in crate::agent) type SharedClocks = Arc<Mutex<Option<(Clocks, Instant)>>>;

enum Next {
    Checkpoint(Arc<Checkpoint>),
    Order(Order),
    Over,
}

impl Applier {
    /// Runs until the agent ends: keeps the copy while the container runs elsewhere, and the
    /// container while it runs here.
    pub(in crate::agent) fn run(mut self) {
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
        if let Err(error) = sched::set_patient(NICE) {
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
                    () = duty.told_to_end() => {}
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
        let door = young::door(pid);
        if let Err(error) = &door {
            tracing::warn!(
                container = self.shell.name,
                error = chain(error),
                "connections that are not accepted yet will be reset by a failover"
            );
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
        let last = warm.last.as_ref().map(|(c, _)| c.epoch);
        if !checkpoint.full && last != Some(checkpoint.follows) {
            let error = anyhow::anyhow!("the spare waits for what follows epoch {last:?}");
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
        let Checkpoint { state, edits, pages, .. } = &**checkpoint;
        match warm.spare.apply_edited(state, edits, pages) {
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
        // First of all, and for all of it: a machine that has other things to do would make clients wait.
        let real_time = RealTime::start();
        let signals = real_time.become_stop_thread()?;
        let (suspected, silence) = self.shell.suspicion();
        self.shell.memory.keep(generation);
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
        let (record, tree) = takeover::run(&takeover, &mut warm, &real_time, logged)?;
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
        journal::write_failover(&self.lab, &self.shell.host, name, &record);
        tracing::warn!(container = name, %generation, epoch = %from,
            total_ms = record.phases_ms.total, "the container runs here now");
        let diag = Namespace::of_process(warm.spare.pid())?.enter(UnixDiag::open)??;
        let mut capturer = Capturer::adopt_running(&tree, diag)?;
        capturer.watch_network()?;
        self.place.watch_files(&mut capturer, files.as_ref())?;
        let Warm { spare, gate, door, last, .. } = warm;
        let closed = last.map_or_else(Vec::new, |(c, _)| Closed::restored(&c.state));
        young::shut(door, Duration::ZERO);
        let launched = spare.into_launched();
        Ok(Life { files, launched, capturer, gate, signals, generation, from: Some(from), closed })
    }
}

/// Milliseconds with fractions.
pub(in crate::agent) fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
