//! The scan of a stop, and the look at what it leaves out, on two processors: a [helper](crate::capture::helpers)
//! looks for written pages while the stop thread reads threads and
//! descriptors. In the round before a stop it copies what it finds as well.
//!
//! A scan protects again what it finds, so nothing of it may be lost: what a stop that fails has found
//! is kept for the next one ([`Job::collect`] is called whatever happened).

use crate::capture::CaptureError;
use crate::capture::helpers::{Help, wait_until};
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::sys::SysResult;
use crate::sys::memory::{self, Range};
use crate::sys::pagemap::{self, Buffer, Pagemap, Region, Scan};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Bytes of memory in one piece.
const PIECE: u64 = 8 << 20;
/// Fewer bytes of memory in fewer pieces are scanned sooner than a helper is awake.
const WORTH: u64 = 32 << 20;
const MANY: usize = 8;
/// For so many pieces there is room at once.
const PIECES: usize = 256;
/// For how long others are left to finish what they do while we let more urgent work run.
const LEISURE: Duration = Duration::from_micros(200);

/// A part of one process's memory.
#[derive(Debug)]
struct Piece {
    pagemap: Arc<Pagemap>,
    process: i32,
    start: u64,
    end: u64,
    /// A helper that scans it copies what it finds.
    copy: bool,
    found: Mutex<Found>,
}

/// What becomes of the pages that are found.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// They are protected.
    Protect,
    /// They are left as they are.
    Leave,
}

#[derive(Debug, Default)]
struct Found {
    regions: Vec<Region>,
    result: Option<SysResult<Scan>>,
    /// Where in [`Job::copies`] the copies of all its regions lie, one after the other.
    copied: Option<usize>,
}

/// What is to be scanned in one stop.
#[derive(Debug)]
pub(in crate::capture) struct Job {
    pieces: Vec<Piece>,
    /// Lists that pieces of other scans had, empty.
    lists: Vec<Vec<Region>>,
    then: Then,
    copies: Mutex<Vec<u8>>,
    /// What was collected has taken the copies along: to this place.
    taken_to: OnceLock<usize>,
    bytes: u64,
    next: AtomicUsize,
    done: AtomicUsize,
    left: AtomicBool,
    /// A helper was given it.
    called: AtomicBool,
    /// For those who wait until the helper can do no more.
    helped: (Mutex<()>, Condvar),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Job {
    /// One that protects what it finds.
    pub(in crate::capture) fn to_take() -> Self {
        Self::new(Then::Protect)
    }

    /// As [`Job::to_take`], for pages of which helpers put copies into a buffer, which is taken back with
    /// [`Job::give_back`].
    pub(in crate::capture) fn to_copy(mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        Self { copies: Mutex::new(buffer), ..Self::new(Then::Protect) }
    }

    /// The buffer for copies, or the one that it was exchanged for.
    pub(in crate::capture) fn give_back(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.copies))
    }

    /// Makes it as good as new if nobody else has it, with the memory that it had.
    pub(in crate::capture) fn renew(mut job: Arc<Self>) -> Option<Arc<Self>> {
        let it = Arc::get_mut(&mut job)?;
        for piece in it.pieces.drain(..) {
            let mut list = piece.found.into_inner().unwrap_or_else(|e| e.into_inner()).regions;
            list.clear();
            if list.capacity() > 0 {
                it.lists.push(list);
            }
        }
        it.copies.get_mut().unwrap_or_else(|e| e.into_inner()).clear();
        it.taken_to = OnceLock::new();
        it.bytes = 0;
        (it.next, it.done) = Default::default();
        (it.left, it.called) = Default::default();
        Some(job)
    }

    /// One that protects nothing, so that the next scan finds the same.
    pub(in crate::capture) fn to_look() -> Self {
        Self::new(Then::Leave)
    }

    fn new(then: Then) -> Self {
        Self {
            pieces: Vec::with_capacity(PIECES),
            lists: Vec::new(),
            then,
            copies: Mutex::default(),
            taken_to: OnceLock::new(),
            bytes: 0,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            left: AtomicBool::new(false),
            called: AtomicBool::new(false),
            helped: Default::default(),
        }
    }

    /// Adds memory of a process.
    pub(super) fn add(&mut self, pagemap: &Arc<Pagemap>, process: i32, start: u64, end: u64) {
        self.add_to(pagemap, process, (start, end), false);
    }

    /// The same; a helper that finds something there copies it. To be collected with
    /// [`Job::collect_copied`].
    pub(super) fn add_to_copy(
        &mut self,
        pagemap: &Arc<Pagemap>,
        process: i32,
        start: u64,
        end: u64,
    ) {
        self.add_to(pagemap, process, (start, end), true);
    }

    fn add_to(
        &mut self,
        pagemap: &Arc<Pagemap>,
        process: i32,
        (start, end): (u64, u64),
        copy: bool,
    ) {
        self.bytes += end - start;
        // No page of page tables lies in two pieces, so that translations are flushed once for it.
        let borders = (start / PIECE * PIECE..end).step_by(PIECE as usize);
        for (start, end) in borders.map(|at| (at.max(start), end.min(at + PIECE))) {
            let regions = self.lists.pop().unwrap_or_default();
            let found = Mutex::new(Found { regions, ..Found::default() });
            let pagemap = pagemap.clone();
            self.pieces.push(Piece { pagemap, process, start, end, copy, found });
        }
    }

    /// Helpers begin no more pieces: whoever collects scans the rest alone.
    pub(in crate::capture) fn leave(&self) {
        self.left.store(true, Ordering::SeqCst);
    }

    /// Whether all pieces were scanned.
    pub(in crate::capture) fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst) == self.pieces.len()
    }

    /// Leaves all of it to a helper, if one has it and keeps it, for as long as that does not take [`LEISURE`].
    pub(in crate::capture) fn let_help(&self) {
        let has = self.called.load(Ordering::SeqCst) && !self.left.load(Ordering::SeqCst);
        if has {
            let (lock_of, come) = &self.helped;
            let _ = come.wait_timeout_while(lock(lock_of), LEISURE, |()| !self.is_done());
        }
    }

    /// Scans pieces until none is left that nobody has begun.
    fn work(&self, buffer: &mut Buffer) {
        while self.scan_next(buffer, false) {}
    }

    /// Scans a piece, unless none is left. A helper copies what it finds.
    fn scan_next(&self, buffer: &mut Buffer, helps: bool) -> bool {
        let next = self.next.fetch_add(1, Ordering::SeqCst);
        let Some(piece) = self.pieces.get(next) else { return false };
        let mut found = lock(&piece.found);
        let Found { regions, result, copied } = &mut *found;
        let (start, end) = (piece.start, piece.end);
        let pagemap = &piece.pagemap;
        *result = Some(match self.then {
            Then::Protect => pagemap.take_written(start, end, pagemap::WRITTEN, buffer, regions),
            Then::Leave => pagemap.see_written(start, end, buffer, regions),
        });
        if helps && piece.copy && matches!(result, Some(Ok(Scan::Complete))) {
            *copied = self.copy(piece.process, regions);
        }
        drop(found);
        self.done.fetch_add(1, Ordering::SeqCst);
        true
    }

    /// Copies regions; gives where, if all of them could be read.
    fn copy(&self, process: i32, regions: &[Region]) -> Option<usize> {
        let range = |r: &Region| Range { start: r.start, len: (r.end - r.start) as usize };
        let ranges: Vec<Range> = regions.iter().map(range).collect();
        let mut copies = lock(&self.copies);
        let at = copies.len();
        memory::read_appended(process, &ranges, &mut copies).is_ok().then_some(at)
    }

    /// As [`Job::collect`]. Regions that were copied are appended to `out` behind all others, and their copies to
    /// `pages`, as those of `mark`. Gives how many are behind.
    pub(super) fn collect_copied(
        &self,
        (process, mark): (i32, u32),
        buffer: &mut Buffer,
        out: &mut Vec<Region>,
        pages: &mut PageSet,
    ) -> Result<(Scan, usize), CaptureError> {
        self.finish(buffer);
        let to = *self.taken_to.get_or_init(|| self.move_copies(&mut pages.bytes));
        let mut behind = Vec::new();
        for piece in self.pieces.iter().filter(|p| p.process == process) {
            let mut found = lock(&piece.found);
            let Some(at) = found.copied.take() else { continue };
            let mut at = to + at;
            for r in found.regions.drain(..) {
                let (start, count) = (r.start, ((r.end - r.start) / PAGE as u64) as u32);
                pages.runs.push(Run { process: mark, start, count, content: Content::Data(at) });
                at += count as usize * PAGE;
                behind.push(r);
            }
        }
        let scan = self.collect(process, buffer, out);
        out.extend_from_slice(&behind);
        Ok((scan?, behind.len()))
    }

    /// Appends all copies; gives where they are.
    fn move_copies(&self, to: &mut Vec<u8>) -> usize {
        let (mut copies, at) = (lock(&self.copies), to.len());
        match at {
            0 => std::mem::swap(&mut *copies, to),
            _ => to.extend_from_slice(&copies),
        }
        at
    }

    /// Scans what is left, waits for what others have begun, and appends what was found in the memory of
    /// a process to `out`. Says whether all of it is watched.
    pub(super) fn collect(
        &self,
        process: i32,
        buffer: &mut Buffer,
        out: &mut Vec<Region>,
    ) -> Result<Scan, CaptureError> {
        self.finish(buffer);
        let mut whole = Ok(Scan::Complete);
        for piece in self.pieces.iter().filter(|p| p.process == process) {
            let mut found = lock(&piece.found);
            out.append(&mut found.regions);
            match found.result.take() {
                None | Some(Ok(Scan::Complete)) => {}
                Some(Ok(other)) => whole = whole.and(Ok(other)),
                Some(Err(e)) => whole = Err(e.into()),
            }
        }
        whole
    }

    /// Scans what is left, and waits for what others have begun.
    fn finish(&self, buffer: &mut Buffer) {
        self.work(buffer);
        wait_until(|| self.is_done());
    }
}

impl Help for Job {
    fn is_worth_it(&self) -> bool {
        self.bytes >= WORTH || self.pieces.len() >= MANY
    }

    fn is_called(&self) {
        self.called.store(true, Ordering::SeqCst);
    }

    fn help(&self, scratch: &mut Buffer) {
        let may_go_on = || !self.left.load(Ordering::SeqCst);
        while may_go_on() && self.scan_next(scratch, true) {}
        let (lock_of, come) = &self.helped;
        drop(lock(lock_of));
        come.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::helpers::Helpers;
    use crate::sys::{probe, uffd};
    use std::os::fd::AsFd;

    const LEN: usize = 96 << 20;

    /// Memory of our own that is watched, with the numbers of its pages that are written.
    fn watched() -> Option<(memmap2::MmapMut, std::os::fd::OwnedFd)> {
        let mut memory = memmap2::MmapMut::map_anon(LEN).expect("memory");
        // No huge pages, and all of it there.
        memory.advise(memmap2::Advice::NoHugePage).expect("said");
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        let fd = probe::own_uffd().ok()?;
        let start = memory.as_ptr() as u64;
        uffd::register(fd.as_fd(), start, start + LEN as u64).ok()?;
        Some((memory, fd))
    }

    #[test]
    fn every_written_page_is_found_once_whoever_scans() {
        let Some((mut memory, _fd)) = watched() else {
            println!("skipped: no userfaultfd");
            return;
        };
        let me = std::process::id() as i32;
        let pagemap = Arc::new(Pagemap::open(me).expect("pagemap"));
        let helper = Helpers::of(me);
        let (start, mut buffer) = (memory.as_ptr() as u64, Buffer::default());
        for round in 0..20 {
            let mut wanted: Vec<u64> = (0..LEN / PAGE)
                .filter(|page| round == 0 || page % (97 + round) == 3)
                .map(|page| start + (page * PAGE) as u64)
                .collect();
            for address in &wanted {
                memory[(address - start) as usize] = round as u8;
            }
            let mut job = Job::to_take();
            job.add(&pagemap, me, start, start + LEN as u64);
            let job = Arc::new(job);
            helper.call(&job);
            let mut found = Vec::new();
            let scan = job.collect(me, &mut buffer, &mut found).expect("scanned");
            assert_eq!(scan, Scan::Complete);
            let mut pages: Vec<u64> =
                found.iter().flat_map(|r| (r.start..r.end).step_by(PAGE)).collect();
            pages.sort_unstable();
            wanted.sort_unstable();
            assert!(pages == wanted, "round {round}: {} and {}", pages.len(), wanted.len());
            let mut again = Vec::new();
            job.collect(me, &mut buffer, &mut again).expect("nothing is left");
            assert!(again.is_empty());
        }
    }

    #[test]
    fn what_helpers_copy_is_what_was_written() {
        let Some((mut memory, _fd)) = watched() else {
            println!("skipped: no userfaultfd");
            return;
        };
        let me = std::process::id() as i32;
        let pagemap = Arc::new(Pagemap::open(me).expect("pagemap"));
        let (start, mut buffer) = (memory.as_ptr() as u64, Buffer::default());
        let half = start + LEN as u64 / 2;
        let mut copies = Vec::new();
        for round in 0..4usize {
            let pages: Vec<usize> = (0..LEN / PAGE).filter(|p| p % (500 + round) == 3).collect();
            for page in &pages {
                memory[page * PAGE + round] = round as u8 + 1;
            }
            let mut job = Job::to_copy(copies);
            job.add_to_copy(&pagemap, me, start, half);
            job.add_to_copy(&pagemap, me, half, start + LEN as u64);
            // Helpers do nothing, half, or all of it; the first two to an empty set.
            // As many as there are: the memory may begin anywhere in a piece.
            let all = job.pieces.len();
            let helped = [0, 6, all, 6][round];
            (0..helped).for_each(|_| assert!(job.scan_next(&mut buffer, true)));
            let mut set = PageSet::default();
            if round > 1 {
                set.bytes.extend_from_slice(&[9; 3 * PAGE]);
            }
            let (mut regions, before) = (Vec::new(), set.pages());
            let (scan, behind) = job
                .collect_copied((me, 7), &mut buffer, &mut regions, &mut set)
                .expect("collected");
            assert_eq!(scan, Scan::Complete);
            let count = |regions: &[Region]| -> usize {
                regions.iter().map(|r| ((r.end - r.start) as usize) / PAGE).sum()
            };
            let (rest, copied) = regions.split_at(regions.len() - behind);
            assert_eq!(
                count(&regions),
                pages.len() + if round == 0 { LEN / PAGE - pages.len() } else { 0 }
            );
            assert_eq!(count(copied) == 0, helped == 0);
            assert_eq!(count(rest) == 0, helped == all);
            assert_eq!(set.pages() - before, count(copied));
            for (run, region) in set.runs.iter().zip(copied) {
                let Content::Data(at) = run.content else { panic!("{run:?}") };
                let (from, len) = ((region.start - start) as usize, run.count as usize * PAGE);
                assert_eq!(
                    (run.process, run.start, len as u64),
                    (7, region.start, region.end - region.start)
                );
                assert!(set.bytes[at..at + len] == memory[from..from + len], "round {round}");
            }
            assert!(set.bytes.starts_with(&vec![9; before * PAGE]), "what was there stays");
            copies = job.give_back();
        }
    }

    #[test]
    fn helpers_begin_nothing_more_of_a_job_that_was_left() {
        let Some((memory, _fd)) = watched() else {
            println!("skipped: no userfaultfd");
            return;
        };
        let me = std::process::id() as i32;
        let pagemap = Arc::new(Pagemap::open(me).expect("pagemap"));
        let (mut job, start) = (Job::to_look(), memory.as_ptr() as u64);
        job.add(&pagemap, me, start, start + LEN as u64);
        let mut buffer = Buffer::default();
        job.leave();
        job.help(&mut buffer);
        assert_eq!(job.done.load(Ordering::SeqCst), 0);
        assert!(!job.is_done());
        job.collect(me, &mut buffer, &mut Vec::new()).expect("scanned");
        assert!(job.is_done());
    }

    #[test]
    fn memory_that_is_not_watched_is_told() {
        let memory = memmap2::MmapMut::map_anon(LEN).expect("memory");
        let me = std::process::id() as i32;
        let pagemap = Arc::new(Pagemap::open(me).expect("pagemap"));
        let (mut job, start) = (Job::to_take(), memory.as_ptr() as u64);
        job.add(&pagemap, me, start, start + LEN as u64);
        let scan = job.collect(me, &mut Buffer::default(), &mut Vec::new()).expect("scanned");
        assert!(matches!(scan, Scan::Unregistered(_)));
    }
}
