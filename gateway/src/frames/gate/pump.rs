//! The data path: what the two threads do, and the reads and writes that others share with them.

use super::{
    Gate, GateError, GateThread, Inbound, MAX_DRAIN, Outbound, OutputState, Shared, device,
};
use crate::frames::MAX_FRAME;
use crate::frames::commit::Pushed;
use crate::frames::input_log::LogWriter;
use crate::frames::parting::Heard;
use crate::frames::young;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use replicator::Epoch;
use replicator::sys::tap::Tap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Instant;

/// Frames moved in one hold of a lock.
const BATCH: usize = 64;

#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The device had nothing more.
    Drained,
    /// There may be more.
    More,
}

/// Reads a frame if one waits.
pub(super) fn read_one(tap: &Tap, buffer: &mut [u8]) -> Result<Option<usize>, GateError> {
    loop {
        match tap.read(buffer) {
            Ok(n) => return Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(device("read", tap, e)),
        }
    }
}

impl Shared {
    /// The body of a data thread: until the gate stops or the device dies.
    pub(super) fn run(&self, which: GateThread) {
        let source = match which {
            GateThread::Outbound => &self.inner,
            GateThread::Inbound => &self.outer,
        };
        let mut scratch = vec![0; MAX_FRAME].into_boxed_slice();
        if let Err(error) = self.pump(which, source, &mut scratch) {
            self.totals.failed.store(true, Relaxed);
            tracing::error!(%error, ?which, "the gate has stopped moving frames");
        }
    }

    fn pump(&self, which: GateThread, source: &Tap, scratch: &mut [u8]) -> Result<(), GateError> {
        loop {
            let mut fds = [
                PollFd::new(source.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(device("poll", source, e.into())),
            }
            loop {
                if self.stopping.load(Acquire) {
                    return Ok(());
                }
                let step = match which {
                    GateThread::Outbound => self.step_out(scratch)?,
                    GateThread::Inbound => self.step_in()?,
                };
                if step == Step::Drained {
                    break;
                }
            }
        }
    }

    /// Moves a batch from the container into the core, or straight out.
    fn step_out(&self, scratch: &mut [u8]) -> Result<Step, GateError> {
        if self.passing.load(Acquire) {
            return self.pass_one(scratch);
        }
        let mut waits = false;
        let step = self.take_batch(&mut waits);
        // Without the lock: whoever is woken needs it, and may be more urgent than we are.
        if waits {
            self.tell_output();
        }
        step
    }

    /// `waits` says whether the open epoch has its first frame now.
    fn take_batch(&self, waits: &mut bool) -> Result<Step, GateError> {
        let mut out = self.outbound.lock();
        for _ in 0..BATCH {
            if self.outbound.is_wanted() || out.writes_through() {
                return Ok(Step::More);
            }
            match self.take_one(&mut out)? {
                Some(pushed) => *waits |= pushed == Pushed::First,
                None => return Ok(Step::Drained),
            }
        }
        Ok(Step::More)
    }

    /// Pass-through: one frame from the container to the clients. The writer lock keeps it behind
    /// everything that is being released.
    fn pass_one(&self, scratch: &mut [u8]) -> Result<Step, GateError> {
        let _writer = self.writer();
        let out = self.outbound.lock();
        if !out.writes_through() {
            return Ok(Step::More);
        }
        let Some(n) = read_one(&self.inner, scratch)? else { return Ok(Step::Drained) };
        drop(out);
        self.young.outbound(&scratch[..n]);
        self.bypass.left(&scratch[..n], &self.young);
        let written = self.write_out(std::iter::once(&scratch[..n]));
        self.totals.passed.fetch_add(written as u64, Relaxed);
        self.totals.out_dropped.fetch_add(1 - written as u64, Relaxed);
        Ok(Step::More)
    }

    /// Reads one frame of the container into the open epoch, or to nowhere while unplugged. None: there is none.
    fn take_one(&self, out: &mut Outbound) -> Result<Option<Pushed>, GateError> {
        let Some(n) = read_one(&self.inner, out.core.room())? else { return Ok(None) };
        if out.output == OutputState::Open {
            let protected = !out.core.is_pass_through();
            let frame = &out.core.room()[..n];
            self.young.outbound(frame);
            if protected {
                self.young.held(frame);
                out.flows.held(frame);
                self.standing.held();
            }
            return Ok(Some(out.core.pushed(n)));
        }
        Ok(Some(Pushed::Dropped))
    }

    /// Takes everything out of the inner TAP. The core is not in pass-through, or output is
    /// discarded.
    pub(super) fn drain(&self, out: &mut Outbound) -> Result<(), GateError> {
        for _ in 0..MAX_DRAIN {
            if self.take_one(out)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Moves a batch from the clients to the container or to the backlog.
    fn step_in(&self) -> Result<Step, GateError> {
        let mut inbound = self.inbound.lock();
        let Inbound { plugged, diverted, backlog, log, buffer } = &mut *inbound;
        for _ in 0..BATCH {
            if self.inbound.is_wanted() {
                return Ok(Step::More);
            }
            let Some(n) = read_one(&self.outer, buffer)? else { return Ok(Step::Drained) };
            let frame = &buffer[..n];
            if *plugged {
                self.deliver(frame, log.as_mut());
            } else if *diverted {
                self.log(frame, log.as_mut());
            } else {
                backlog.push(Instant::now(), frame);
            }
        }
        Ok(Step::More)
    }

    /// Gives a frame to the container, and a copy to the input log if there is a backup for it.
    pub(super) fn deliver(&self, frame: &[u8], log: Option<&mut LogWriter>) {
        if let Heard::Handled(answer) = self.young.heard(frame) {
            // Lost, it is asked for again.
            let _ = answer.map(|answer| self.outer.write(&answer));
            return;
        }
        if young::may_begin(frame) && self.standing.stands() {
            self.totals.kept_out.fetch_add(1, Relaxed);
            return;
        }
        self.young.inbound(frame);
        self.bypass.came(frame);
        let counter = match self.inner.write(frame) {
            Ok(()) => &self.totals.in_frames,
            // A full backlog of the kernel or a device that is down: as on a wire, it is lost.
            Err(_) => &self.totals.in_dropped,
        };
        counter.fetch_add(1, Relaxed);
        // Afterwards: this wakes whoever sends it, while the container is at work already. No epoch ends
        // in between, as input is locked.
        self.log(frame, log);
    }

    fn log(&self, frame: &[u8], log: Option<&mut LogWriter>) {
        let epoch = Epoch(self.open_epoch.load(Acquire));
        if let (Some(log), true) = (log, epoch != Epoch::NONE) {
            log.push(epoch, frame);
        }
    }

    /// Writes frames to the outer TAP in order, with the writer lock held. Returns how many the
    /// kernel took; the others were refused for longer than the patience, or for good.
    pub(super) fn write_out<'a>(&self, frames: impl Iterator<Item = &'a [u8]>) -> usize {
        let mut give_up_at = None;
        frames.filter(|frame| self.write_patiently(frame, &mut give_up_at)).count()
    }

    fn write_patiently(&self, frame: &[u8], give_up_at: &mut Option<Instant>) -> bool {
        loop {
            match self.outer.write(frame) {
                Ok(()) => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e)
                    if e.kind() == io::ErrorKind::WouldBlock
                        || e.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
                Err(_) => return false,
            }
            let now = Instant::now();
            if now >= *give_up_at.get_or_insert(now + self.patience) {
                return false;
            }
            let mut fds = [PollFd::new(self.outer.as_fd(), PollFlags::POLLOUT)];
            // Whatever poll says, the write is tried again, until the patience ends.
            let _ = poll(&mut fds, PollTimeout::from(1u8));
        }
    }
}

// The threads own a share of `Shared`, so it must be fit to be shared.
const _: fn() = || {
    fn shareable<T: Send + Sync>() {}
    shareable::<Gate>();
};
