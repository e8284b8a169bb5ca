//! The gate: two TAPs, the commit core between them, and the threads that move frames.
//!
//! Keeps OC-1 and OC-2 (through the [commit core](super::commit)), its part of CP-1 (input is held
//! and output drained when it says so) and of FO-2 (unplugged means unplugged), and RB-1.
//!
//! # Who may block whom, and for how long
//! | lock | taken by | held for |
//! |---|---|---|
//! | inbound | inbound thread | a batch of frames; lets go after the frame in hand (0.5-3 us) when the stop thread comes |
//! | | [`Gate::hold_input`], [`Gate::plug`], [`Gate::probe`] | as long as the guard lives, the backlog's replay, the deadline |
//! | outbound (the core) | outbound thread | a batch of reads; lets go after the frame in hand (0.5-2 us) when the stop thread comes |
//! | | [`Gate::seal`] | draining what the container left: at most its TAP's queue |
//! | | [`Gate::release`] | moving buffers, about a microsecond, at its start and end |
//! | bypass | outbound and inbound thread, while there is one | asking the kernel to know or forget a connection |
//! | writer | [`Gate::release`], [`Gate::pass_through`], [`Gate::protect`], outbound thread in pass-through | writing the frames to the outer TAP (0.7 us, with 64 KiB 2.7 us each) |
//!
//! Order: writer before outbound, inbound before outbound, each before bypass; no one takes inbound and writer. So, once protection
//! has started, the stop thread waits for one frame of each data thread at most, never for a release. That holds
//! while those threads run: on a busy machine put them ahead of ordinary work in
//! [`GateConfig::thread_setup`], or one that is preempted in the middle of a frame makes a stop
//! last some scheduler ticks. The releasing thread needs the same while it moves buffers.
//!
//! # States
//! ```text
//!            inbound frames             outbound frames
//! start ──►  backlog (bounded)          discarded            unplugged
//!   open_output()                       follow the core
//!   plug()   backlog, then straight in  follow the core      plugged
//!   unplug() back to the first line
//! ```
//! and the core is in pass-through until [`Gate::protect`]. While it is, and plugged, accepted connections may go
//! by the gate in the kernel ([`Gate::open_bypass`]).

mod backlog;
mod bypass;
mod counters;
mod flows;
mod pump;
mod standing;
mod track;

pub use backlog::BacklogBounds;
pub use counters::GateCounters;
pub use flows::{Ends, Waiting};

use super::commit::{Bounds, CommitCore, CommitError, Output, SealedOutput, Unprotected};
use super::input_log::LogWriter;
use super::parting::Heard;
use super::resume::PeerProbe;
use super::urgent::{UrgentGuard, UrgentLock};
use super::{MAX_FRAME, Mac};
use backlog::Backlog;
use counters::Totals;
use flows::Flows;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use replicator::ack::CommitProof;
use replicator::sys::tap::Tap;
use replicator::{Epoch, Generation};
use standing::Standing;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use track::Young;

/// Most frames that a seal takes out of the inner TAP; the rest belongs to the next epoch.
const MAX_DRAIN: usize = 1 << 16;

/// The threads of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateThread {
    /// From the container to the core, or straight out in pass-through.
    Outbound,
    /// From the clients to the container.
    Inbound,
}

/// Runs first in each thread of a gate, to set its priority or its processor.
pub type ThreadSetup = Arc<dyn Fn(GateThread) + Send + Sync>;

/// How a gate works.
#[derive(Default)]
pub struct GateConfig {
    /// Bounds of the held output.
    pub bounds: Bounds,
    /// Bounds of the input that waits while unplugged.
    pub backlog: BacklogBounds,
    /// The container's hardware address: frames to others are not worth a place in the backlog.
    pub mac: Option<Mac>,
    /// Longest time that one release waits for the outer device to take frames again, before it
    /// drops and counts the rest. `None`: 5 ms.
    pub patience: Option<Duration>,
    /// Longest time that held output waits before first segments of new connections are kept out.
    /// `None`: 500 ms.
    pub standing: Option<Duration>,
    /// Gets a copy of each inbound frame while the output is protected.
    pub input_log: Option<LogWriter>,
    /// Runs first in each thread.
    pub thread_setup: Option<ThreadSetup>,
}

impl std::fmt::Debug for GateConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GateConfig").field("bounds", &self.bounds).finish_non_exhaustive()
    }
}

/// What went wrong at a gate.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The core refused.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// A device cannot carry what the gate needs.
    #[error("{0} has no virtio_net_hdr; create it with TapOptions {{ vnet: true }}")]
    NoHeader(String),
    /// A device failed.
    #[error("{call} on {device}: {source}; is the interface up, and does its namespace live?")]
    Device {
        /// The call.
        call: &'static str,
        /// Name of the interface.
        device: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A resource of the process was refused.
    #[error("{call}: {source}; raise the limits of open files and threads")]
    Resource {
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Probing answers would reach the container.
    #[error("peers can be probed only while the gate is unplugged")]
    Plugged,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OutputState {
    /// What comes out of the container is thrown away.
    Discard,
    /// The core decides.
    Open,
}

#[derive(Debug)]
struct Outbound {
    core: CommitCore,
    output: OutputState,
    flows: Flows,
}

impl Outbound {
    fn writes_through(&self) -> bool {
        self.output == OutputState::Open && self.core.is_pass_through()
    }
}

#[derive(Debug)]
struct Inbound {
    plugged: bool,
    /// Input goes to the log and nowhere else; see [`InputHold::divert`].
    diverted: bool,
    backlog: Backlog,
    log: Option<LogWriter>,
    buffer: Box<[u8]>,
}

#[derive(Debug)]
struct Shared {
    inner: Tap,
    outer: Tap,
    inbound: UrgentLock<Inbound>,
    outbound: UrgentLock<Outbound>,
    writer: Mutex<()>,
    /// [`Outbound::writes_through`], for a look without the lock.
    passing: AtomicBool,
    /// Number of the open epoch, 0 in pass-through.
    open_epoch: AtomicU64,
    /// Readable while the open epoch has output.
    output_waits: EventFd,
    /// Readable once the threads shall end.
    stop: EventFd,
    stopping: AtomicBool,
    patience: Duration,
    totals: Totals,
    standing: Standing,
    /// Connections that are not accepted yet.
    young: Young,
    bypass: bypass::Slot,
}

/// A running gate. Dropping it ends its threads and closes both devices.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// While it lives, no frame enters the container; see [`Gate::hold_input`].
#[derive(Debug)]
#[must_use = "input flows again as soon as this is dropped"]
pub struct InputHold<'a> {
    guard: UrgentGuard<'a, Inbound>,
}

impl InputHold<'_> {
    /// From now on, the end of the hold included, input goes to the input log only: the container
    /// stands still for good, and whoever runs it next gets it. [`Gate::plug`] ends it.
    pub fn divert(&mut self) {
        self.guard.plugged = false;
        self.guard.diverted = true;
    }
}

impl Gate {
    /// Starts the threads between `inner` (the container's device) and `outer` (towards the
    /// clients). The gate starts unplugged and in pass-through.
    pub fn start(inner: Tap, outer: Tap, config: GateConfig) -> Result<Gate, GateError> {
        for tap in [&inner, &outer] {
            if !tap.vnet() {
                return Err(GateError::NoHeader(tap.name().to_owned()));
            }
        }
        let eventfd = || {
            EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map_err(|e| GateError::Resource { call: "eventfd", source: e.into() })
        };
        let shared = Arc::new(Shared {
            inner,
            outer,
            inbound: UrgentLock::new(Inbound {
                plugged: false,
                diverted: false,
                backlog: Backlog::new(config.backlog, config.mac),
                log: config.input_log,
                buffer: vec![0; MAX_FRAME].into_boxed_slice(),
            }),
            outbound: UrgentLock::new(Outbound {
                core: CommitCore::new(config.bounds),
                output: OutputState::Discard,
                flows: Flows::default(),
            }),
            writer: Mutex::new(()),
            passing: AtomicBool::new(false),
            open_epoch: AtomicU64::new(0),
            output_waits: eventfd()?,
            stop: eventfd()?,
            stopping: AtomicBool::new(false),
            patience: config.patience.unwrap_or(Duration::from_millis(5)),
            totals: Totals::default(),
            standing: Standing::new(config.standing.unwrap_or(Duration::from_millis(500))),
            young: Young::default(),
            bypass: bypass::Slot::default(),
        });
        let mut gate = Gate { shared, threads: Vec::new() };
        for which in [GateThread::Outbound, GateThread::Inbound] {
            let (shared, setup) = (gate.shared.clone(), config.thread_setup.clone());
            let name = match which {
                GateThread::Outbound => "gate-out",
                GateThread::Inbound => "gate-in",
            };
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    if let Some(setup) = setup {
                        setup(which);
                    }
                    shared.run(which);
                })
                .map_err(|source| GateError::Resource { call: "start a thread", source })?;
            gate.threads.push(thread);
        }
        Ok(gate)
    }

    /// Ends the threads and gives the devices back (inner, outer), to be used again: closing them
    /// is slow.
    pub fn into_taps(self) -> (Tap, Tap) {
        let shared = self.shared.clone();
        drop(self);
        let shared = Arc::into_inner(shared).expect("the threads have ended and held the others");
        (shared.inner, shared.outer)
    }

    /// Holds the input: once this returns no frame is being written to the container's device,
    /// and none will be until the guard is dropped (but by [`Gate::inject`]). Frames wait in the
    /// outer TAP's queue, whose length bounds them.
    ///
    /// The same thread must not call [`Gate::plug`], [`Gate::unplug`], [`Gate::probe`] or
    /// [`Gate::hold_input`] while it has the guard: it would wait for itself.
    pub fn hold_input(&self) -> InputHold<'_> {
        InputHold { guard: self.shared.without_bypass(|| self.shared.inbound.lock_urgent()) }
    }

    /// Protects the output from now on: see [`CommitCore::protect`].
    pub fn protect(&self, generation: Generation, last_sealed: Epoch) {
        let shared = &*self.shared;
        shared.bypass.shut();
        {
            let _writer = shared.writer();
            let mut out = shared.outbound.lock_urgent();
            out.core.protect(generation, last_sealed);
            shared.publish(&mut out);
        }
        shared.bypass.close();
    }

    /// Takes what the container has sent out of the inner TAP, in the calling thread, and closes
    /// `epoch` with it. Call it while every thread of the container is frozen and input is held.
    ///
    /// A frame that another processor is still moving from the interface's queueing discipline to
    /// the TAP is missed and belongs to the next epoch: it leaves later than it might, and
    /// [`Gate::output_waits`] tells of it.
    pub fn seal(&self, epoch: Epoch) -> Result<SealedOutput, GateError> {
        let shared = &*self.shared;
        let mut out = shared.outbound.lock_urgent();
        if out.core.is_pass_through() {
            return Err(CommitError::NotProtected(epoch).into());
        }
        shared.drain(&mut out)?;
        shared.young.collect(out.core.frames_of_open_epoch());
        let sealed = out.core.seal(epoch)?;
        out.flows.sealed();
        shared.publish(&mut out);
        Ok(sealed)
    }

    /// Writes the output of every sealed epoch that the proof covers to the outer TAP, in the
    /// calling thread, and returns the number of frames. Releases that overlap go one after the
    /// other. Blocks for the writing: 0.7 us a frame, up to 2.7 us for one of 64 KiB.
    pub fn release(&self, proof: CommitProof) -> Result<usize, GateError> {
        let shared = &*self.shared;
        let _writer = shared.writer();
        let (output, open) = {
            let mut out = shared.outbound.lock();
            let output = out.core.release(proof)?;
            shared.standing.moved(out.core.counters().held_frames > 0);
            (output, out.output == OutputState::Open)
        };
        Ok(shared.let_out(output, open))
    }

    /// Lets output leave without proof from now on, first what is held, and returns the number of
    /// those frames. The argument says why this is allowed: see [`CommitCore::pass_through`].
    pub fn pass_through(&self, why: Unprotected) -> usize {
        let shared = &*self.shared;
        let _writer = shared.writer();
        let (output, open) = {
            let mut out = shared.outbound.lock_urgent();
            let output = out.core.pass_through(why);
            shared.standing.moved(false);
            shared.publish(&mut out);
            (output, out.output == OutputState::Open)
        };
        shared.let_out(output, open)
    }

    /// Throws away all output that is held: see [`CommitCore::abandon`].
    pub fn abandon(&self) -> usize {
        let _writer = self.shared.writer();
        let mut out = self.shared.outbound.lock_urgent();
        let frames = out.core.abandon();
        self.shared.standing.moved(false);
        self.shared.publish(&mut out);
        frames
    }

    /// Frames of output that wait in the open epoch; and for how many clients, and how many more may be about to ask.
    pub fn output(&self) -> (usize, Waiting) {
        let mut out = self.shared.outbound.lock_urgent();
        let frames = out.core.open_frames();
        if frames == 0 {
            self.shared.forget_output();
        }
        (frames, out.flows.waiting(Instant::now()))
    }

    /// Adds the connections on which the container has said something in the epoch that was sealed last.
    /// IPv4 as on the wire.
    pub fn spoken(&self, into: &mut HashSet<Ends>) {
        into.extend(self.shared.outbound.lock_urgent().flows.spoken());
    }

    /// Becomes readable when the open epoch has its first frame, and stops being so when the
    /// epoch is sealed. Where the two come together it may become so once more, without a frame: until
    /// [`Gate::output`] was asked. Only to be polled, not read.
    pub fn output_waits(&self) -> BorrowedFd<'_> {
        self.shared.output_waits.as_fd()
    }

    /// Lets output go its way (held or passed through, as the core says) while input still goes to
    /// the backlog. What the container's kernel sent until now, half restored, is thrown away.
    /// For sockets that send as soon as they leave repair mode.
    pub fn open_output(&self) -> Result<(), GateError> {
        let shared = &*self.shared;
        let mut out = shared.outbound.lock_urgent();
        if out.output == OutputState::Discard {
            shared.drain(&mut out)?;
            out.output = OutputState::Open;
            shared.publish(&mut out);
        }
        Ok(())
    }

    /// Connects both ways: opens the output, writes the backlog to the container and then lets
    /// input straight in.
    pub fn plug(&self) -> Result<(), GateError> {
        self.open_output()?;
        let mut inbound = self.shared.inbound.lock_urgent();
        let Inbound { plugged, diverted, backlog, log, .. } = &mut *inbound;
        *plugged = true;
        *diverted = false;
        for frame in backlog.take(Instant::now()) {
            self.shared.deliver(&frame, log.as_mut());
        }
        Ok(())
    }

    /// Takes a frame that came in elsewhere, as if it came in here now: it waits for the plug, or
    /// for the end of a stop.
    pub fn receive(&self, frame: &[u8]) {
        let mut inbound = self.shared.inbound.lock();
        let Inbound { plugged, backlog, log, .. } = &mut *inbound;
        if *plugged {
            self.shared.deliver(frame, log.as_mut());
        } else {
            backlog.push(Instant::now(), frame);
        }
    }

    /// Cuts the container off: nothing is written to it, input goes to an empty backlog, and its
    /// output is thrown away. Output held before stays held.
    pub fn unplug(&self) {
        self.shared.bypass.shut();
        {
            let mut inbound = self.shared.inbound.lock_urgent();
            inbound.plugged = false;
            inbound.diverted = false;
            inbound.backlog.clear();
            let mut out = self.shared.outbound.lock_urgent();
            out.output = OutputState::Discard;
            self.shared.publish(&mut out);
        }
        self.shared.bypass.close();
    }

    /// Forgets the backlog: what came before this moment is in a checkpoint or of no use.
    pub fn clear_backlog(&self) {
        self.shared.inbound.lock_urgent().backlog.clear();
    }

    /// From now on copies of inbound frames go there, for a new backup; or nowhere.
    pub fn log_input(&self, log: Option<LogWriter>) {
        self.shared.inbound.lock_urgent().log = log;
    }

    /// Writes a frame to the container, plugged or not: replay of the input log, FIN and RST of
    /// peers ([`super::resume`]).
    pub fn inject(&self, frame: &[u8]) -> Result<(), GateError> {
        let shared = &*self.shared;
        shared.young.inbound(frame);
        shared.inner.write(frame).map_err(|e| device("write", &shared.inner, e))?;
        shared.totals.injected.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Writes a frame of the input log to the container, as if it came now.
    pub fn replay(&self, frame: &[u8]) -> Result<(), GateError> {
        match self.shared.young.heard(frame) {
            Heard::Not => self.inject(frame),
            Heard::Handled(Some(answer)) => self.send(&answer),
            Heard::Handled(None) => Ok(()),
        }
    }

    /// Writes a frame of our own to the clients' side: announcements and probes. It is none of
    /// the container's and needs no proof, so it must carry nothing that the container said.
    pub fn send(&self, frame: &[u8]) -> Result<(), GateError> {
        let shared = &*self.shared;
        shared.outer.write(frame).map_err(|e| device("write", &shared.outer, e))?;
        shared.totals.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Asks the peers where they are, in the calling thread, until all have answered or the
    /// deadline has passed. Every other frame that arrives goes to the backlog. Unplugged only.
    pub fn probe(&self, probe: &mut PeerProbe, deadline: Instant) -> Result<(), GateError> {
        let shared = &*self.shared;
        let mut inbound = shared.inbound.lock_urgent();
        let Inbound { plugged, backlog, buffer, .. } = &mut *inbound;
        if *plugged {
            return Err(GateError::Plugged);
        }
        backlog.iter().for_each(|frame| probe.learn_from(frame));
        loop {
            let now = Instant::now();
            for frame in probe.due(now) {
                self.send(&frame)?;
            }
            if probe.is_done() || now >= deadline {
                return Ok(());
            }
            let until = probe.next_deadline().map_or(deadline, |d| d.min(deadline));
            // Rounded up, so that the time has come when poll returns.
            let wait = until.saturating_duration_since(now).as_millis().min(1000) as u16 + 1;
            let mut fds = [PollFd::new(shared.outer.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(wait)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(device("poll", &shared.outer, e.into())),
            }
            while let Some(n) = pump::read_one(&shared.outer, buffer)? {
                let now = Instant::now();
                if !probe.observe(&buffer[..n]) {
                    backlog.push(now, &buffer[..n]);
                }
                if now >= deadline {
                    break;
                }
            }
        }
    }

    /// Totals and what is held, as of now.
    pub fn counters(&self) -> GateCounters {
        self.shared.counters()
    }

    /// Whether output waits for proofs.
    pub fn is_protected(&self) -> bool {
        self.shared.open_epoch.load(Ordering::Acquire) != 0
    }

    /// Name of the device on the clients' side.
    pub fn outer_name(&self) -> &str {
        self.shared.outer.name()
    }

    /// Name of the container's device.
    pub fn inner_name(&self) -> &str {
        self.shared.inner.name()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.close_bypass();
        self.shared.stopping.store(true, Ordering::Release);
        // An eventfd takes a one from anybody; it fails only at its maximum.
        let _ = self.shared.stop.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn writer(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the state of the core visible to those who do not lock it. With the lock held.
    fn publish(&self, out: &mut Outbound) {
        self.passing.store(out.writes_through(), Ordering::Release);
        let open = out.core.open_epoch().unwrap_or(Epoch::NONE);
        self.open_epoch.store(open.0, Ordering::Release);
        match out.core.output_waits() {
            true => self.tell_output(),
            false => self.forget_output(),
        }
    }

    /// Makes the notifier readable, after the frame that it tells of was taken.
    fn tell_output(&self) {
        // Cannot fail: nobody writes that often.
        let _ = self.output_waits.write(1);
    }

    /// Makes it not readable: nothing waits, with the lock held.
    fn forget_output(&self) {
        // Nothing to be read is as good.
        let _ = self.output_waits.read();
    }

    /// Writes released frames out, with the writer lock held, and returns how many left.
    fn let_out(&self, output: Output, open: bool) -> usize {
        let written = if open { self.write_out(output.frames()) } else { 0 };
        let lost = output.len() - written;
        self.totals.out_dropped.fetch_add(lost as u64, Ordering::Relaxed);
        self.outbound.lock().core.recycle(output);
        written
    }
}

fn device(call: &'static str, tap: &Tap, source: io::Error) -> GateError {
    GateError::Device { call, device: tap.name().to_owned(), source }
}
