//! Whether a process may have read past the page cache (O_DIRECT) while a round of pre-copy took pages
//! of its memory.
//!
//! Such a read pins the pages of its buffer at its beginning. What it brings is written to them later, past
//! the page table: by a device, or by whoever serves the file. So a page that a round takes in between
//! stays protected, and nobody notices its new contents.
//!
//! ```text
//!  stop | the program runs:  a read begins --- a round takes a page --- the read ends | stop
//! ```
//! In a stop no read is under way: threads stop outside of system calls, and reads that go on without them
//! (io_uring, io_submit(2)) are refused. So the pages that rounds have taken since the last checkpoint are
//! read again there, of a process of which both is true:
//!
//! - It has read more often than it had before the first of these rounds. A read that was under way
//!   in one has ended by the stop, and was counted then.
//! - A look at its descriptors, of which there is one before each round and one in each stop, has shown one
//!   that is read past the page cache; or it has read from a disk since the last stop. The kernel counts that
//!   where a read begins, so that it tells of descriptors, too, that no look has seen; but also
//!   of ordinary reads of what is not in the page cache.
//!
//! Where rounds have taken much, as a first copy does, all threads stand still for a moment before the next
//! round: these reads have ended then, and what the rounds have taken is read again while the program runs.

use super::{CaptureError, Capturer, Tracked};

/// Pages that are read again in a stop sooner than threads are stopped for them before it.
const FEW: usize = 2048;

/// What the kernel has counted of a process's reads, those of threads that have ended included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reads {
    /// Calls that have ended: read(2) and its like.
    pub(super) calls: u64,
    /// Bytes from disks, of reads that have begun.
    pub(super) from_disks: u64,
}

/// What is remembered of one process. Where the kernel does not count, any read is possible.
#[derive(Debug, Default)]
pub(super) struct Direct {
    at_checkpoint: Option<Reads>,
    /// Before the first round since then, if there was one.
    at_round: Option<Option<Reads>>,
    now: Option<Reads>,
}

impl Direct {
    /// For a process that stands still.
    pub(super) fn new(reads: Option<Reads>) -> Self {
        Self { at_checkpoint: reads, ..Self::default() }
    }

    /// A round is about to begin.
    pub(super) fn round(&mut self, reads: impl FnOnce() -> Option<Reads>) {
        self.at_round.get_or_insert_with(reads);
    }

    /// All threads stand still: whether what rounds have taken must be read again. `seen` says that a look has
    /// shown a descriptor for such reads.
    pub(super) fn was_possible(&mut self, now: Option<Reads>, seen: bool) -> bool {
        self.now = now;
        let Some(at_round) = self.at_round else { return false };
        let differs = |then: Option<Reads>, of: fn(Reads) -> u64| {
            then.zip(now).is_none_or(|(then, now)| of(then) != of(now))
        };
        differs(at_round, |r| r.calls) && (seen || differs(self.at_checkpoint, |r| r.from_disks))
    }

    /// What rounds have taken is right now.
    pub(super) fn finish(&mut self) {
        (self.at_checkpoint, self.at_round) = (self.now, None);
    }
}

impl Capturer {
    /// Between two rounds, if much is to be read again: does that now.
    pub(super) fn read_again_ahead(&mut self) -> Result<(), CaptureError> {
        let much = self.pages.pages() >= self.settled.1 + FEW;
        if !much || !self.processes.values().any(|t| t.files.have_shown_direct()) {
            return Ok(());
        }
        self.freeze()?;
        let mut doubtful = Vec::new();
        let mut look = |(pid, tracked): (&i32, &mut Tracked)| {
            tracked.threads.glance()?;
            doubtful.extend(tracked.may_have_read_directly(*pid).then_some(*pid));
            Ok::<(), CaptureError>(())
        };
        let looked = self.processes.iter_mut().try_for_each(&mut look);
        self.tracer.thaw()?;
        looked?;
        for pid in &doubtful {
            match self.processes[pid].space.take_again(&mut self.pages, self.settled.0) {
                // It has just ended; pump will hear of it.
                Err(e) if !e.is_gone() => return Err(e.into()),
                _ => {}
            }
        }
        if !doubtful.is_empty() {
            self.objects.take_again();
            self.objects.copy(&mut self.pages)?;
        }
        self.objects.settle();
        self.processes.values_mut().for_each(|tracked| tracked.direct.finish());
        self.settled = (self.pages.runs.len(), self.pages.pages());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(calls: u64, from_disks: u64) -> Option<Reads> {
        Some(Reads { calls, from_disks })
    }

    #[test]
    fn only_a_process_that_has_read_past_the_cache_since_a_round_is_read_again() {
        let mut direct = Direct::new(reads(5, 100));
        assert!(!direct.was_possible(reads(9, 200), true), "no round has taken anything");
        direct.round(|| reads(5, 100));
        direct.round(|| reads(9, 200));
        assert!(!direct.was_possible(reads(5, 200), true), "none has ended");
        assert!(!direct.was_possible(reads(6, 100), false), "of sockets, say");
        assert!(direct.was_possible(reads(6, 100), true));
        assert!(direct.was_possible(reads(6, 200), false), "by a descriptor that is gone");
        direct.finish();
        assert!(!direct.was_possible(reads(7, 300), true), "a new epoch");
        direct.round(|| reads(6, 300));
        assert!(
            direct.was_possible(reads(7, 300), false),
            "from the disk it came before the round"
        );
    }

    #[test]
    fn where_nothing_is_counted_any_read_is_possible() {
        let mut direct = Direct::new(None);
        assert!(!direct.was_possible(None, true));
        direct.round(|| None);
        assert!(direct.was_possible(None, false));
    }
}
