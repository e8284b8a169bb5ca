//! The stop thread of a primary: it runs the container under ptrace and takes a checkpoint of it
//! whenever output waits, or the longest epoch has passed.
//!
//! In a stop it is real-time (SCHED_FIFO), and does nothing that could be done before or after:
//! encoding, sending, logging and bookkeeping belong to the [shipper](super::ship). A stop of a large program may have to be
//! confirmed when the container runs again; one that is not comes to nothing, and its number is used up. Pre-copy of a
//! container that is at work runs at ordinary priority: it can keep a processor busy for long, and the kernel takes the
//! processor away from real-time threads that do so, heartbeats included. Two sets of
//! buffers go round between the two threads; when both are with the shipper no stop begins, which
//! bounds what waits (RB-1).

use super::network::Place;
use super::orphans::Closed;
use super::pace::{self, Look, Pacer};
use super::primary::{Next, Shell};
use super::seeding::Copying;
use super::ship::Verdict;
use super::urgency::RealTime;
use super::young;
use crate::frames::gate::{Gate, InputHold};
use anyhow::{Context, Result};
use netns_tools::topology::OnUnprotectable;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signalfd::SignalFd;
use nix::sys::time::TimeSpec;
use replicator::capture::{self, Boundary, CaptureError, Capturer, StopTimes};
use replicator::image::State;
use replicator::image::net::{Parting, Young};
use replicator::image::pages::PageSet;
use replicator::protocol::LinkId;
use replicator::protocol::primary::{Input, State as Stand};
use replicator::sys::sched;
use replicator::volume::{VolumeError, Volumes};
use replicator::{Epoch, Generation};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::oneshot;

/// How long a stop that was taken back waits before it is tried again.
const RETRY: Duration = Duration::from_millis(1);
/// For how long stops may be taken back in a row before protection is given up.
const MAX_TRANSIENT: Duration = Duration::from_secs(10);
/// For how long something that cannot be captured may be there before protection ends. A program
/// that lives for a moment (a child that asks a name service over a unix socket) only delays a
/// checkpoint, and the output that waits for it.
const GRACE: Duration = Duration::from_secs(1);
/// How long a stop waits before it is tried again while the container is frozen.
const FROZEN_RETRY: Duration = Duration::from_millis(100);
/// How much longer than asked for a sleep may be, in nanoseconds.
const SLACK_NS: u64 = 1_000;
/// Without a stop for so long, nothing is kept for the next one.
const NO_STOP: Duration = Duration::from_secs(1);
/// Without output for so long, and without stops that are less than half of it apart, the container is
/// quiet.
const QUIET: Duration = Duration::from_secs(1);
/// Longest sleep when nothing is due.
const IDLE: Duration = Duration::from_millis(200);
/// After so long without a backup none is about to come back.
const LET_ALONE: Duration = Duration::from_secs(1);
/// Pages in one round of pre-copy that make another round worth its while.
const ANOTHER_ROUND: usize = 500;
/// Bytes of a buffer for files that are kept for the next checkpoint: a full copy is many times that.
const FILES_KEPT: usize = 1 << 20;
/// Most rounds of pre-copy before one stop.
const MAX_ROUNDS: usize = 4;
/// A container that has computed less than this since the last stop has answered somebody and sleeps
/// again.
const HARDLY: Duration = Duration::from_micros(250);

/// A checkpoint on its way to the shipper, or empty buffers on their way back.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// The connection that it is for.
    pub(super) link: LinkId,
    /// Its number.
    pub(super) epoch: Epoch,
    /// Whether it builds on none before.
    pub(super) full: bool,
    /// Its output did not wait for it.
    pub(super) provisional: bool,
    /// It is none, but a piece of the files that goes ahead of one.
    pub(super) seed: bool,
    /// The generation that it is of.
    pub(super) generation: Generation,
    /// The state.
    pub(super) state: State,
    /// The pages.
    pub(super) pages: PageSet,
    /// What has changed of replicated volumes.
    pub(super) files: Vec<u8>,
    /// How long the stages of the stop took.
    pub(super) times: StopTimes,
    /// How much of sealing output was spent on volumes.
    pub(super) volumes: Duration,
    /// When output was sealed.
    pub(super) sealed: Option<Instant>,
    /// Whether it is one, if that is not known yet.
    pub(super) verdict: Option<Verdict>,
    /// Time since the stop before.
    pub(super) interval: Duration,
}

/// Waits until a descriptor is readable or the time has passed. Which is not told: look.
pub(super) fn sleep_on(fds: &mut [PollFd<'_>], time: Duration) -> Result<()> {
    match ppoll(fds, Some(TimeSpec::from(time)), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e).context("poll"),
    }
}

/// Empties the signal descriptor.
pub(super) fn drain_signals(signals: &SignalFd) {
    while let Ok(Some(_)) = signals.read_signal() {}
}

struct GateBoundary<'a> {
    gate: &'a Gate,
    volumes: Option<&'a Volumes>,
    /// How long they took.
    volumes_took: Duration,
    volumes_failed: Option<VolumeError>,
    hold: Option<InputHold<'a>>,
    /// Output does not wait, so there is nothing to seal.
    control: bool,
    /// The container stands still afterwards.
    last: bool,
    sealed: Option<Instant>,
    error: Option<crate::frames::gate::GateError>,
    /// Until the container runs again, or until the checkpoint is with the shipper.
    real_time: Option<RealTime>,
    /// Clients wait for nothing but this checkpoint.
    urgent: bool,
    young: Vec<Young>,
    partings: Vec<Parting>,
}

impl Boundary for GateBoundary<'_> {
    fn hold_input(&mut self) {
        self.hold = Some(self.gate.hold_input());
    }

    fn seal(&mut self, epoch: Epoch) {
        if let Some(volumes) = self.volumes {
            let begin = Instant::now();
            // Output that nothing stands for is not sealed.
            if let Err(error) = volumes.seal() {
                self.volumes_failed = Some(error);
                return;
            }
            self.volumes_took = begin.elapsed();
        }
        if self.control {
            self.sealed = Some(Instant::now());
            return;
        }
        match self.gate.seal(epoch) {
            Ok(_) => self.sealed = Some(Instant::now()),
            Err(e) => self.error = Some(e),
        }
        self.young = self.gate.young();
        self.partings = self.gate.partings();
    }

    fn release_input(&mut self) {
        if !self.urgent {
            self.real_time = None;
        }
        if let Some(hold) = self.hold.as_mut().filter(|_| self.last && self.sealed.is_some()) {
            hold.divert();
        }
        self.hold = None;
    }
}

/// The loop of the stop thread.
pub(super) struct StopLoop {
    pub(super) capturer: Capturer,
    pub(super) gate: Arc<Gate>,
    pub(super) shell: Arc<Shell>,
    /// Of the container's first process.
    pub(super) pid: i32,
    /// Since when it is let alone, and whether a bypass was opened since.
    pub(super) alone: Option<(Duration, bool)>,
    pub(super) signals: SignalFd,
    /// Its clock starts with `origin`.
    pub(super) pacer: Pacer,
    pub(super) origin: Instant,
    /// A channel in which nobody waits for a thread that has no processor: see [`ship`](super::ship).
    pub(super) to_ship: Sender<Taken>,
    pub(super) from_ship: Receiver<Taken>,
    pub(super) epoch: Epoch,
    pub(super) transient_since: Option<Instant>,
    /// When somebody last waited for something, and whether the shell was told that this is long ago.
    pub(super) stirred: (Duration, bool),
    pub(super) on_unprotectable: OnUnprotectable,
    /// Whether the container is connected to its clients.
    pub(super) plugged: bool,
    pub(super) network: Place,
    pub(super) buffers: Vec<Taken>,
    /// The last checkpoint of a switchover: the container stands still.
    pub(super) still: Option<Standing>,
    /// Its replicated volumes.
    pub(super) volumes: Option<Arc<Volumes>>,
    /// A new backup gets their files.
    pub(super) copying: Option<Copying>,
    /// They could not be read: what was taken of them, and pages of the stop, is lost, so that no
    /// checkpoint may follow.
    pub(super) seal_failed: Option<VolumeError>,
    /// What a stop has taken is lost, so that the next checkpoint must be a full one.
    pub(super) lost: bool,
    /// The connections that it has closed.
    pub(super) closed: Closed,
    /// The container hardly ran in the last epoch, and a stop takes little.
    pub(super) rests: bool,
    /// Whoever waits for output of such a container is real-time already when it comes.
    pub(super) poised: Option<RealTime>,
}

/// A container that stands still after its last checkpoint here.
#[derive(Debug)]
pub(super) struct Standing {
    last: Epoch,
    told: bool,
}

/// Why the loop ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// The container's processes ended.
    Ended,
    /// The agent was told to stop, or this side was demoted.
    Told,
    /// The container holds something that cannot be protected.
    Unprotectable(CaptureError),
}

/// A volume that cannot be read ends protection.
pub(super) fn of_volumes(error: VolumeError) -> CaptureError {
    CaptureError::Unsupported { object: "a replicated volume".into(), reason: error.to_string() }
}

impl StopLoop {
    /// Runs until the container or the agent ends.
    pub(super) fn run(&mut self) -> Result<Ending> {
        // Only now: the container has inherited what it had before.
        if let Err(error) = nix::sys::prctl::set_timerslack(SLACK_NS) {
            tracing::debug!(%error, "sleeps take a little longer than asked for");
        }
        loop {
            if self.shell.must_end() {
                return Ok(Ending::Told);
            }
            self.shell.worked(self.shell.full_is_due());
            match self.turn() {
                Ok(()) => {}
                Err(CaptureError::Ended) => return Ok(Ending::Ended),
                Err(e) => return Ok(Ending::Unprotectable(e)),
            }
        }
    }

    fn turn(&mut self) -> Result<(), CaptureError> {
        self.shell.attend(true);
        self.take_back_buffers();
        self.shell.settle_output(&self.gate);
        self.settle_bypass();
        if self.still.is_some() {
            return self.stand();
        }
        if !self.plugged && self.shell.is_welcome() {
            self.shell.protect_output(&self.gate, self.epoch);
            self.gate.plug().map_err(|error| {
                tracing::error!(%error, "the container cannot be connected to its clients");
                CaptureError::Transient("the gate does not open")
            })?;
            self.plugged = true;
            if let Err(error) = self.network.announce(self.gate.clone()) {
                tracing::warn!(%error, "its neighbours are not told where it is");
            }
        }
        self.capturer.let_go_after(NO_STOP);
        if let Some(volumes) = self.volumes.as_ref().filter(|_| self.shell.begins_anew()) {
            volumes.forget_changes();
            self.copying = None;
        }
        let next = if self.buffers.is_empty() || !self.shell.may_begin_stop() {
            self.stirs();
            pace::Next::After(IDLE)
        } else if self.seed()? {
            self.stirs();
            return self.capturer.pump();
        } else if self.shell.hands_over() {
            self.stirs();
            pace::Next::Stop
        } else {
            self.shell.attend(false);
            let (output, waiting) = self.gate.output();
            let look = Look {
                now: self.origin.elapsed(),
                awaited: self.shell.full_is_due(),
                settled: self.shell.is_settled() && !self.capturer.keeps_connections(),
                output,
                all_wait: waiting.all(),
                used: self.capturer.cpu_time(),
            };
            let next = self.pacer.look(look);
            self.tell_quiet(look, next);
            next
        };
        match next {
            pace::Next::Stop => {
                self.checkpoint()?;
                // Of the stop itself.
                drain_signals(&self.signals);
            }
            pace::Next::OnOutput(time) => {
                if self.rests {
                    self.poised.get_or_insert_with(RealTime::start);
                }
                self.sleep(time, true)?;
            }
            pace::Next::After(time) => {
                self.poised = None;
                self.sleep(time, false)?;
            }
        }
        self.capturer.pump()
    }

    /// Lets connections go by the gate once it is clear that no backup comes back at once.
    fn settle_bypass(&mut self) {
        if !self.shell.is_let_alone() {
            self.alone = None;
            return;
        }
        let now = self.origin.elapsed();
        let (since, bypassed) = self.alone.get_or_insert((now, false));
        if !*bypassed && now - *since >= LET_ALONE {
            *bypassed = true;
            self.network.bypass(self.gate.clone(), self.pid);
        }
    }

    /// Somebody waits for something.
    fn stirs(&mut self) {
        let (since, quiet) = &mut self.stirred;
        *since = self.origin.elapsed();
        if std::mem::take(quiet) {
            self.shell.handle(Input::Quiet(false));
        }
    }

    /// Tells the shell when the container has been quiet for a while. Stops of its own accord, of a
    /// program that looks at its clock, change nothing as long as they are rare.
    fn tell_quiet(&mut self, look: Look, next: pace::Next) {
        let works = next == pace::Next::Stop && self.pacer.since(look.now) < QUIET / 2;
        if look.awaited || !look.settled || look.output > 0 || works {
            self.stirs();
        } else if !self.stirred.1 && look.now.saturating_sub(self.stirred.0) >= QUIET {
            self.stirred.1 = true;
            self.shell.handle(Input::Quiet(true));
        }
    }

    /// Sleeps until the time has passed or something happens to the container or its backup.
    fn sleep(&mut self, time: Duration, or_output: bool) -> Result<(), CaptureError> {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shell.wake(), PollFlags::POLLIN),
        ];
        if or_output {
            fds.push(PollFd::new(self.gate.output_waits(), PollFlags::POLLIN));
        }
        sleep_on(&mut fds, time).map_err(|_| CaptureError::Transient("poll failed"))?;
        self.shell.awake();
        drain_signals(&self.signals);
        Ok(())
    }

    /// Waits until the last checkpoint is with the backup and says so to the core, or lets the
    /// container go on if that cannot be.
    fn stand(&mut self) -> Result<(), CaptureError> {
        let Some(standing) = &mut self.still else { return Ok(()) };
        let protected = matches!(self.shell.state(), Stand::Protected { .. });
        if !protected && !self.shell.must_end() {
            tracing::warn!(container = self.shell.name(), "the switchover came to nothing");
            self.still = None;
            self.shell.keeps_it();
            self.capturer.go_on()?;
            return self.gate.plug().map_err(|error| {
                tracing::error!(%error, "the container cannot be connected to its clients");
                CaptureError::Transient("the gate does not open")
            });
        }
        if !standing.told && self.shell.all_shipped() {
            standing.told = true;
            self.shell.handle(Input::HandOver { last: standing.last });
        }
        if !self.shell.must_end() {
            let mut fds = [PollFd::new(self.shell.wake(), PollFlags::POLLIN)];
            sleep_on(&mut fds, IDLE).map_err(|_| CaptureError::Transient("poll failed"))?;
            self.shell.awake();
        }
        Ok(())
    }

    fn take_back_buffers(&mut self) {
        loop {
            match self.from_ship.try_recv() {
                Ok(mut taken) => {
                    taken.seed = false;
                    taken.pages.clear();
                    taken.files.clear();
                    taken.files.shrink_to(FILES_KEPT);
                    self.buffers.push(taken);
                }
                Err(_) => return,
            }
        }
    }

    fn checkpoint(&mut self) -> Result<(), CaptureError> {
        let Some(mut taken) = self.buffers.pop() else { return Ok(()) };
        // It is in the way of the first stop for a backup, and of no other.
        self.gate.close_bypass();
        let begun = self.origin.elapsed();
        let Next { link, full, provisional, generation } = self.shell.next();
        let last = !provisional && self.shell.hands_over();
        (taken.link, taken.full, taken.epoch) = (link, full, self.epoch);
        (taken.provisional, taken.generation) = (provisional, generation);
        if full {
            // Its files have gone ahead over another connection.
            if !self.has_seeded(link) {
                self.shell.full_again(link);
                self.buffers.push(taken);
                return Ok(());
            }
            self.capturer.begin_full();
        }
        let idle = !full && self.pacer.busy(self.capturer.cpu_time()) < HARDLY;
        // Somebody waits for what this takes, and it takes little. Files may take long.
        self.rests = idle && self.volumes.is_none();
        let result = self.prepare_and_stop(&mut taken, last, idle);
        if let Some(error) = self.seal_failed.take() {
            if last {
                self.capturer.go_on()?;
            }
            return Err(of_volumes(error));
        }
        let mut stopped = match result {
            Ok(Some(stopped)) => stopped,
            Ok(None) => {
                if full {
                    self.shell.full_again(link);
                }
                self.buffers.push(taken);
                return Ok(());
            }
            Err(CaptureError::Ended) => return Err(CaptureError::Ended),
            // Whatever else failed has changed nothing in the container: it is tried again.
            Err(e) => {
                if last {
                    self.capturer.go_on()?;
                }
                if std::mem::take(&mut self.lost) || full {
                    self.shell.full_again(link);
                }
                self.buffers.push(taken);
                return self.taken_back(e);
            }
        };
        let (now, used) = (self.origin.elapsed(), self.capturer.cpu_time());
        taken.interval = self.pacer.since(now);
        let times = taken.times;
        self.hand_over(taken, &mut stopped)?;
        // Nobody waits for anything now.
        self.capturer.make_ready();
        if !stopped.is_confirmed() {
            return Ok(());
        }
        if self.transient_since.take().is_some() {
            self.shell.unfreeze();
        }
        if last {
            self.still = Some(Standing { last: self.epoch, told: false });
        }
        // A full copy says nothing about the next epoch.
        if !full {
            self.pacer.prepared((now - begun).saturating_sub(times.total + times.confirm));
        }
        let pages = if full { 0 } else { times.pages };
        self.pacer.stopped(now, used, times.total, pages);
        let work = sched::thread_time() + self.shell.shipping();
        if full {
            self.pacer.copied(work)
        } else {
            self.pacer.worked(work)
        }
        self.epoch = self.epoch.next();
        Ok(())
    }

    /// Gives a checkpoint to the shipper, who codes it while the rest of its stop is confirmed. One that turns out
    /// to be none is taken back.
    fn hand_over(
        &mut self,
        mut taken: Taken,
        stopped: &mut capture::Taken,
    ) -> Result<(), CaptureError> {
        let (tell, verdict) = oneshot::channel();
        taken.verdict = (!stopped.is_confirmed()).then_some(verdict);
        self.shell.taken();
        if self.to_ship.blocking_send(taken).is_err() {
            return Err(CaptureError::Transient("the shipper has ended"));
        }
        match self.capturer.confirm(stopped) {
            // Nobody hears it where it was known before, or the shipper has dropped the checkpoint.
            Ok(()) => {
                let _ = tell.send(stopped.times().confirm);
                Ok(())
            }
            Err(CaptureError::Ended) => Err(CaptureError::Ended),
            Err(error) => {
                self.closed.take_back();
                self.epoch = self.epoch.next();
                self.taken_back(error)
            }
        }
    }

    /// `idle` says that the container has hardly done anything since the last stop. None: more output is to come first.
    fn prepare_and_stop(
        &mut self,
        taken: &mut Taken,
        last: bool,
        idle: bool,
    ) -> Result<Option<capture::Taken>, CaptureError> {
        let hasty = self.pacer.was_hasty();
        let poised = self.poised.take();
        let real_time = self.rests.then(|| poised.unwrap_or_else(RealTime::start));
        self.capturer.prepare()?;
        for round in 0..MAX_ROUNDS {
            let copied = match idle && round == 0 {
                true => self.capturer.precopy_of_idle()?,
                false => self.capturer.precopy()?,
            };
            if copied < ANOTHER_ROUND {
                break;
            }
            drain_signals(&self.signals);
            self.capturer.pump()?;
        }
        if hasty && self.gate.output().0 > 1 {
            return Ok(None);
        }
        if let Some(volumes) = &self.volumes
            && let Err(error) = volumes.precopy()
        {
            self.seal_failed = Some(error);
            return Err(CaptureError::Transient("volumes cannot be read"));
        }
        // What is provisional has no output that waits for it.
        if !taken.provisional {
            self.shell.protect_output(&self.gate, self.epoch);
        }
        if last {
            self.capturer.stand_still();
        }
        let mut boundary = GateBoundary {
            gate: &self.gate,
            volumes: self.volumes.as_deref(),
            volumes_took: Duration::ZERO,
            volumes_failed: None,
            hold: None,
            control: self.shell.is_control() || taken.provisional,
            last,
            sealed: None,
            error: None,
            real_time: real_time.or_else(|| Some(RealTime::start())),
            urgent: self.rests,
            young: Vec::new(),
            partings: Vec::new(),
        };
        let (state, pages) = (&mut taken.state, &mut taken.pages);
        let mut stopped = self.capturer.take(self.epoch, &mut boundary, state, pages);
        self.poised = boundary.real_time.take();
        // What was taken of files cannot be put back, and nothing counts that was not sealed.
        let at_once = taken.full || self.volumes.is_some() || boundary.error.is_some();
        if let Some(Err(error)) =
            stopped.as_mut().ok().filter(|_| at_once).map(|taken| self.capturer.confirm(taken))
        {
            stopped = Err(error);
        }
        if let Some(error) = boundary.volumes_failed {
            self.seal_failed = Some(error);
            return Err(CaptureError::Transient("volumes cannot be read"));
        }
        if stopped.is_err() && boundary.sealed.is_some() {
            // No checkpoint of it will be sent. The next one has a number of its own, and says what this one
            // would have said, also of those to whom something was said.
            self.closed.hear(&self.gate);
            self.epoch = self.epoch.next();
        }
        let stopped = stopped?;
        taken.times = stopped.times();
        taken.volumes = boundary.volumes_took;
        if let Some(error) = boundary.error {
            tracing::error!(%error, "output cannot be sealed");
            self.lost = true;
            return Err(CaptureError::Transient("output cannot be sealed"));
        }
        taken.sealed = boundary.sealed;
        if let Some(volumes) = &self.volumes {
            volumes.take(&mut taken.files);
            self.copying = self.copying.filter(|_| !taken.full);
        }
        if !taken.provisional {
            self.closed.add(&mut taken.state, &self.gate);
        }
        young::add(&mut taken.state, boundary.young, boundary.partings, &self.gate);
        Ok(Some(stopped))
    }

    fn taken_back(&mut self, why: CaptureError) -> Result<(), CaptureError> {
        match why {
            CaptureError::Transient(_) | CaptureError::Unsupported { .. } => {
                tracing::debug!(%why, "a stop was taken back");
            }
            _ => tracing::warn!(%why, "a stop has failed and is tried again"),
        }
        metrics::counter!("nilicon_stops_taken_back_total", "container" => self.shell.name())
            .increment(1);
        let since = *self.transient_since.get_or_insert_with(Instant::now);
        let refused = match why {
            CaptureError::Unsupported { .. } if since.elapsed() > GRACE => why,
            _ if since.elapsed() > MAX_TRANSIENT => CaptureError::Unsupported {
                object: "the container".into(),
                reason: format!("no checkpoint for {MAX_TRANSIENT:?}: {why}"),
            },
            _ => {
                self.pacer.taken_back(self.origin.elapsed(), RETRY);
                return Ok(());
            }
        };
        if self.on_unprotectable != OnUnprotectable::Freeze {
            return Err(refused);
        }
        self.shell.freeze(&refused.to_string());
        self.pacer.taken_back(self.origin.elapsed(), FROZEN_RETRY);
        Ok(())
    }

    /// Looks after the container without taking checkpoints, until it or the agent ends.
    pub(super) fn only_look_after(&mut self) -> Result<Ending> {
        self.poised = None;
        self.capturer.let_go();
        while !self.shell.must_end() {
            match self.capturer.pump() {
                Ok(()) => {}
                Err(CaptureError::Ended) => return Ok(Ending::Ended),
                Err(e) => return Err(e.into()),
            }
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.shell.wake(), PollFlags::POLLIN),
            ];
            sleep_on(&mut fds, IDLE)?;
            self.shell.awake();
            drain_signals(&self.signals);
            if let Some(volumes) = &self.volumes {
                volumes.forget_changes();
            }
        }
        Ok(Ending::Told)
    }
}
