//! Where a stop looks for written pages: around the faults that were noted since the round of pre-copy
//! before it, if they can be all; else everywhere.
//!
//! ```text
//! threads run | glance, notes begin | scan of the round (protects) | notes  ...  | stop: glance, judgement | run again
//!             |<------------------------ the window ----------------------------->| scan of parts, or of all | confirmation
//! ```
//! After the scan of a round every page that it has passed is protected, so that whoever writes to one
//! must fault there first. Invariant: unless [`Window::judge`] doubts, each page whose contents
//! have changed since lies in a part (2 MB, what one page of page tables translates) around a noted address.
//! What it doubts, and why:
//!
//! | doubt | a page may have changed unnoted because |
//! |---|---|
//! | [`Doubt::Unscanned`] | no round has passed all of the memory since the stop before |
//! | [`Doubt::Mapped`] | mappings have changed, or it is another memory (execve) |
//! | [`Doubt::Thread`] | a thread is new, or the kernel has counted faults of it that are not noted: futex(2), direct I/O; or one was not handled, which hides such a fault |
//! | [`Doubt::Ended`] | a thread has ended that the kernel had counted faults of |
//! | [`Doubt::Strange`] | somebody has taken the lock of its memory outside of a noted fault (process_vm_writev(2), ptrace(2), guard regions), a thread has faulted that nobody knows (a child of vfork(2)), or a fault has ended in SIGSEGV or SIGBUS |
//! | [`Doubt::Flushed`] | translations were flushed that our own scan has not: pages have gone (madvise(2)), or moved |
//! | [`Doubt::Moved`] | pages are being moved, and go without a flush meanwhile |
//! | [`Doubt::Many`] | there were more faults than are kept |
//! | [`Doubt::Astray`] | a noted fault is none that the kernel would handle, and may hide one |
//!
//! A window does not begin while a fault is under way that was noted before it, nor where there is swap space:
//! pages that are swapped out go without a flush, too.
//!
//! All that is knowledge of one kernel, which may be wrong, so no checkpoint rests on it alone: it is
//! **confirmed** before anybody gets it. When the threads run again, all memory that the stop has
//! not looked at is looked at, without protecting anything: whoever finds a page written there that was not
//! noted since the stop ([`Noted::confirm`]) has found one that the stop has missed, or one that the
//! program has just changed in a way that nothing notes. Both times the epoch is taken back, and the
//! notes are not believed for a while.

use crate::capture::glance::{Note, Notes};
use crate::capture::guards::Guards;
use crate::image::pages::PAGE;
use crate::sys::pagemap::Region;
use crate::sys::procmap::Extent;
use std::time::{Duration, Instant};

/// Memory of fewer bytes is scanned at once sooner than it is worth notes and their confirmation.
pub(super) const WORTH: u64 = 256 << 20;
/// Around more notes than this a stop does not look.
const MANY: usize = 256;
/// Of a program that writes more pages from one round to the next, faults are not all kept until they have been
/// confirmed.
const BUSY: u64 = 1024;
/// For how long notes are not believed once they were refuted; each time for twice as long, up to the second.
const DISBELIEF: Duration = Duration::from_secs(1);
const MOST_DISBELIEF: Duration = Duration::from_secs(64);
/// What one page of page tables translates.
const PART: u64 = 2 << 20;
/// A page is being moved for a shorter time than this.
const QUIET: Duration = Duration::from_millis(500);

/// What the kernel has counted of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::capture) struct Counts {
    /// What stands for its memory; 0: nothing is known.
    pub(in crate::capture) memory: u64,
    /// How often translations of its memory were flushed.
    pub(in crate::capture) flushes: u64,
    /// Faults of threads that have ended.
    pub(in crate::capture) ended: u64,
    /// Faults of each thread, in order of their numbers.
    pub(in crate::capture) threads: Vec<(i32, u64)>,
}

/// Why a stop looks everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    Unscanned,
    Mapped,
    Thread(i32),
    Ended,
    Strange,
    Flushed,
    Moved,
    Many,
    Astray(Note),
}

/// The time from a round to the stop after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Window {
    #[default]
    Shut,
    /// Its notes are taken, and the scan of its round is under way.
    Begun(Beginning),
    /// The scan has passed all of the memory.
    Open(Beginning),
}

/// What was seen before the scan; of the flushes, what there must be after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Beginning {
    memory: u64,
    flushes: u64,
    ended: u64,
    sequence: u64,
}

/// What is seen in a stop.
struct Seen<'a> {
    counts: &'a Counts,
    /// Faults that must have been counted of each known thread, in order of their numbers.
    expected: &'a [(i32, u64)],
    sequence: Option<u64>,
    is_strange: bool,
    is_quiet: bool,
    /// None: not all were kept.
    notes: Option<&'a [Note]>,
    extents: &'a [Extent],
    guards: &'a Guards,
}

fn expected_of(expected: &[(i32, u64)], tid: i32) -> Option<u64> {
    let at = expected.binary_search_by_key(&tid, |(t, _)| *t).ok()?;
    Some(expected[at].1)
}

impl Window {
    /// A scan is about to begin. `expected` was read after all older notes were forgotten, and before
    /// `counts`: a thread of which no more is counted than was expected then is in a fault that was
    /// noted before.
    fn begin(
        counts: &Counts,
        expected: &[(i32, u64)],
        sequence: Option<u64>,
        is_quiet: bool,
    ) -> Self {
        let is_out = |&(tid, count): &(i32, u64)| {
            expected_of(expected, tid).is_some_and(|expected| count >= expected)
        };
        match sequence {
            Some(sequence) if is_quiet && counts.threads.iter().all(is_out) => {
                let Counts { memory, flushes, ended, .. } = *counts;
                Self::Begun(Beginning { memory, flushes, ended, sequence })
            }
            _ => Self::Shut,
        }
    }

    /// The scan has passed all of the memory, and has flushed translations as often.
    fn scanned(&mut self, flushes: u64) {
        *self = match *self {
            Self::Begun(begun) => {
                Self::Open(Beginning { flushes: begun.flushes.wrapping_add(flushes), ..begun })
            }
            _ => Self::Shut,
        }
    }

    /// All threads stand still: whether everything that was written lies around the notes.
    fn judge(self, seen: &Seen<'_>) -> Result<(), Doubt> {
        let Self::Open(begun) = self else { return Err(Doubt::Unscanned) };
        let counts = seen.counts;
        if counts.memory != begun.memory || seen.sequence != Some(begun.sequence) {
            return Err(Doubt::Mapped);
        }
        if seen.is_strange {
            return Err(Doubt::Strange);
        }
        let differs = |(tid, count): &&(i32, u64)| expected_of(seen.expected, *tid) != Some(*count);
        if let Some((tid, _)) = counts.threads.iter().find(differs) {
            return Err(Doubt::Thread(*tid));
        }
        if counts.ended != begun.ended {
            return Err(Doubt::Ended);
        }
        if counts.flushes != begun.flushes {
            return Err(Doubt::Flushed);
        }
        if !seen.is_quiet {
            return Err(Doubt::Moved);
        }
        let notes = seen.notes.ok_or(Doubt::Many)?;
        match notes.iter().find(|note| !is_handled(note, seen.extents, seen.guards)) {
            Some(note) => Err(Doubt::Astray(*note)),
            None => Ok(()),
        }
    }
}

/// Whether the kernel handles such a fault, by access_error() of its arch/x86/mm/fault.c.
fn is_handled(note: &Note, extents: &[Extent], guards: &Guards) -> bool {
    const THERE: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const INSTRUCTION: u64 = 1 << 4;
    const ORDINARY: u64 = THERE | WRITE | USER | INSTRUCTION;
    let at = extents.partition_point(|e| e.end <= note.address);
    let Some(extent) = extents.get(at).filter(|e| e.start <= note.address) else { return false };
    let has = |bit| note.error & bit != 0;
    let [read, write, execute] = [1, 2, 4].map(|bit| extent.flags & bit != 0);
    let permitted = match () {
        _ if note.error & !ORDINARY != 0 => false,
        _ if has(WRITE) => write,
        _ if has(INSTRUCTION) => execute && !has(THERE),
        _ => !has(THERE) && (read || write || execute),
    };
    permitted && !guards.has(note.address)
}

/// How often a scan that found this has flushed translations, or less: once for each page of page tables of
/// each mapping in which it has protected something (pagemap_scan_pmd_entry() of fs/proc/task_mmu.c). Where
/// a mapping has all of such a page and all was found, there may be none at all, and nothing to flush.
pub(super) fn flushes(found: &[Region], extents: &[Extent]) -> u64 {
    let (mut count, mut last, mut covered) = (0, None, 0);
    for region in found {
        let mut at = region.start;
        while at < region.end {
            let index = extents.partition_point(|e| e.end <= at);
            let Some(extent) = extents.get(index).filter(|e| e.start <= at) else { break };
            let start = at / PART * PART;
            let end = region.end.min(extent.end).min(start + PART);
            if last != Some((index, start)) {
                (last, covered) = (Some((index, start)), 0);
                count += 1;
            }
            covered += end - at;
            if covered == PART {
                count -= 1;
            }
            at = end;
        }
    }
    count
}

/// Replaces the contents of `out` by the parts around these addresses, as far as they lie in spans.
/// Addresses and spans lie in order.
fn parts(addresses: &[u64], spans: &[(u64, u64)], out: &mut Vec<(u64, u64)>) {
    out.clear();
    for address in addresses {
        let start = address / PART * PART;
        let end = start + PART;
        let first = spans.partition_point(|(_, e)| *e <= start);
        for (s, e) in spans[first..].iter().take_while(|(s, _)| *s < end) {
            let (start, end) = (start.max(*s), end.min(*e));
            match out.last_mut() {
                Some((_, last)) if start < *last => {}
                Some((_, last)) if start == *last => *last = end,
                _ => out.push((start, end)),
            }
        }
    }
}

/// Whether each page that was found written in these spans has a note, or is in a part all of which was found
/// and which has one. All of them lie in order.
fn are_noted(found: &[Region], noted: &[u64], spans: &[(u64, u64)]) -> bool {
    let has = |start: u64, end: u64| {
        let at = noted.partition_point(|address| *address < start);
        noted.get(at).is_some_and(|address| *address < end)
    };
    let was_found = |part: u64| {
        let first = spans.partition_point(|(_, end)| *end <= part);
        let within = spans[first..].iter().take_while(|(start, _)| *start < part + PART);
        within.into_iter().all(|(start, end)| {
            let (start, end) = (part.max(*start), (part + PART).min(*end));
            let at = found.partition_point(|r| r.end <= start);
            found.get(at).is_some_and(|r| r.start <= start && r.end >= end)
        })
    };
    found.iter().all(|r| {
        (r.start / PART * PART..r.end).step_by(PART as usize).all(|part| {
            let (start, end) = (r.start.max(part), r.end.min(part + PART));
            (has(part, part + PART) && was_found(part))
                || (start..end).step_by(PAGE).all(|page| has(page, page + PAGE as u64))
        })
    })
}

/// The notes of one process, if it has any, and what is made of them.
#[derive(Debug)]
pub(in crate::capture) struct Noted {
    /// Of how many bytes its memory must be; none: nothing is to be noted.
    worth: Option<u64>,
    notes: Option<Notes>,
    window: Window,
    counts: Counts,
    expected: Vec<(i32, u64)>,
    list: Vec<Note>,
    /// Where we have written since the last stop.
    ours: Vec<u64>,
    addresses: Vec<u64>,
    parts: Vec<(u64, u64)>,
    /// Parts around notes that are newer than the last judgement.
    later: Vec<(u64, u64)>,
    /// What the last stop did, if it had notes: look around them.
    trusted: Option<bool>,
    /// Of a stop that did: the memory that it looked at, the state of its mappings, and how many notes there
    /// were.
    stopped: (u64, Option<u64>, usize),
    /// What it has not looked at.
    rest: Vec<(u64, u64)>,
    /// Until when notes are not believed, and for how long that was.
    disbelieved: Option<(Instant, Duration)>,
    /// When pages were last moved, as the kernel said and when we heard it.
    moved: (Duration, Instant),
}

impl Noted {
    /// For a process of which nothing is known yet.
    pub(super) fn new(worth: Option<u64>) -> Self {
        Self {
            worth,
            notes: None,
            window: Window::Shut,
            counts: Counts::default(),
            expected: Vec::new(),
            list: Vec::new(),
            ours: Vec::new(),
            addresses: Vec::new(),
            parts: Vec::new(),
            later: Vec::new(),
            trusted: None,
            stopped: (0, None, 0),
            rest: Vec::new(),
            disbelieved: None,
            moved: (Duration::MAX, Instant::now()),
        }
    }

    /// What the last glance has counted is to be put there.
    pub(in crate::capture) fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }

    /// A glance at threads that run is about to be taken, before the scan of a round.
    pub(in crate::capture) fn before_glance(&mut self) {
        self.window = Window::Shut;
        if let Some(notes) = &self.notes {
            notes.begin(&mut self.expected);
        }
    }

    /// The glance was taken, and has shown the state of the mappings.
    pub(in crate::capture) fn after_glance(&mut self, sequence: Option<u64>) {
        if self.notes.as_ref().is_some_and(|notes| notes.memory() == self.counts.memory) {
            let is_believed = self.disbelieved.is_none_or(|(until, _)| Instant::now() >= until);
            let is_quiet = self.is_quiet() && is_believed && has_no_swap();
            self.window = Window::begin(&self.counts, &self.expected, sequence, is_quiet);
        }
    }

    /// Whether pages have not been moved for a while.
    fn is_quiet(&mut self) -> bool {
        let Some(notes) = &self.notes else { return false };
        let moved = notes.moved();
        if moved != self.moved.0 {
            self.moved = (moved, Instant::now());
        }
        self.moved.1.elapsed() >= QUIET
    }

    /// Whether it matters what a scan has found.
    pub(super) fn is_beginning(&self) -> bool {
        matches!(self.window, Window::Begun(_))
    }

    /// A round has scanned all of the memory, has found so many pages, and has flushed translations so often,
    /// or more often.
    pub(super) fn scanned(&mut self, found: u64, flushes: u64) {
        self.window.scanned(flushes);
        if found > BUSY {
            self.shut();
        }
    }

    /// What was noted tells nothing any more.
    pub(in crate::capture) fn shut(&mut self) {
        self.window = Window::Shut;
    }

    /// Between rounds: begins to note faults of a process with so much memory, or ends it.
    pub(super) fn consider(&mut self, bytes: u64) {
        let Some(worth) = self.worth else { return };
        let has = |notes: &Notes| notes.memory() == self.counts.memory && bytes >= worth / 2;
        if self.notes.as_ref().is_some_and(|notes| !has(notes)) {
            self.notes = None;
            self.shut();
        }
        if self.notes.is_none() && bytes >= worth && self.counts.memory != 0 {
            self.notes = Notes::open(self.counts.memory);
            self.worth = self.notes.is_some().then_some(worth);
            self.moved = (Duration::MAX, Instant::now());
        }
    }

    /// We have written to its memory while it stood still.
    pub(in crate::capture) fn wrote(&mut self, address: u64) {
        if self.notes.is_some() {
            self.ours.push(address);
        }
    }

    /// All threads stand still, and a glance was taken: whether what was written lies in
    /// [`Noted::parts`].
    pub(super) fn judge(
        &mut self,
        pid: i32,
        sequence: Option<u64>,
        extents: &[Extent],
        guards: &Guards,
        spans: &[(u64, u64)],
    ) -> bool {
        self.trusted = None;
        let window = std::mem::take(&mut self.window);
        let is_quiet = self.is_quiet();
        let Some(notes) = &mut self.notes else {
            self.ours.clear();
            return false;
        };
        notes.expected(&mut self.expected);
        let are_all = notes.read(&mut self.list) && self.list.len() <= MANY;
        let seen = Seen {
            counts: &self.counts,
            expected: &self.expected,
            sequence,
            is_strange: notes.is_strange(),
            is_quiet,
            notes: are_all.then_some(&self.list),
            extents,
            guards,
        };
        let judged = window.judge(&seen);
        if let Err(doubt) = judged {
            tracing::debug!(pid, ?doubt, "all memory is looked through");
            if self.counts.memory == notes.memory() {
                notes.set_threads(&self.counts.threads);
            }
        }
        self.trusted = Some(judged.is_ok());
        self.stopped = (self.counts.memory, sequence, self.list.len());
        self.parts.clear();
        if judged.is_err() {
            self.ours.clear();
            return false;
        }
        self.addresses.clear();
        self.addresses.extend(self.list.iter().map(|note| note.address));
        self.addresses.append(&mut self.ours);
        self.addresses.sort_unstable();
        parts(&self.addresses, spans, &mut self.parts);
        true
    }

    /// Where to look for what was written.
    pub(super) fn parts(&self) -> &[(u64, u64)] {
        &self.parts
    }

    /// Where calls have written that were made in the process since the last judgement, while it stood still:
    /// the kernel keeps the processor's number in its memory (rseq(2)).
    pub(super) fn later(&mut self, spans: &[(u64, u64)]) -> &[(u64, u64)] {
        self.later.clear();
        let judged = self.list.len();
        if let Some(notes) = self.notes.as_ref().filter(|_| self.trusted.is_some()) {
            let are_all = notes.read(&mut self.list);
            self.stopped.2 = self.list.len();
            match are_all {
                true => {
                    self.addresses.clear();
                    let newer = self.list[judged.min(self.list.len())..].iter();
                    self.addresses.extend(newer.map(|note| note.address));
                    self.addresses.sort_unstable();
                    parts(&self.addresses, spans, &mut self.later);
                }
                false => self.later.extend_from_slice(spans),
            }
        }
        &self.later
    }

    /// What of these spans the last stop has not looked at, if it looked around notes.
    pub(super) fn rest(&mut self, spans: &[(u64, u64)]) -> &[(u64, u64)] {
        self.rest.clear();
        if self.trusted == Some(true) {
            let Self { parts, later, rest, .. } = self;
            let mut looked: Vec<(u64, u64)> = parts.iter().chain(&*later).copied().collect();
            looked.sort_unstable();
            let mut looked = looked.into_iter().peekable();
            for &(mut start, end) in spans {
                while let Some((from, to)) = looked.next_if(|(from, _)| *from < end) {
                    if start < from {
                        rest.push((start, from));
                    }
                    start = start.max(to);
                }
                if start < end {
                    rest.push((start, end));
                }
            }
        }
        &self.rest
    }

    /// The threads still stand, and this is what stands for the state of their mappings now.
    pub(in crate::capture) fn stands_at(&mut self, sequence: Option<u64>) {
        self.stopped.1 = sequence;
    }

    /// Whether each page that was `found` written in [`Noted::rest`] after the last stop was noted since then, and
    /// it is still the same memory with the same mappings, by a glance that was taken after the look.
    ///
    /// A part in which nobody had touched anything has no page of page tables, and cannot be protected: once one of
    /// its pages is there all others count as written.
    pub(in crate::capture) fn confirms(&mut self, found: &[Region], sequence: Option<u64>) -> bool {
        let (memory, mapped, before) = self.stopped;
        let is_same = (self.counts.memory, sequence) == (memory, mapped);
        let mut is_noted = || {
            let Some(notes) = &self.notes else { return false };
            if !notes.read(&mut self.list) {
                return false;
            }
            self.addresses.clear();
            self.addresses.extend(self.list.iter().skip(before).map(|note| note.address));
            self.addresses.sort_unstable();
            are_noted(found, &self.addresses, &self.rest)
        };
        is_same && (found.is_empty() || is_noted())
    }

    /// Notes are not believed for a while.
    pub(in crate::capture) fn disbelieve(&mut self) {
        let time = self.disbelieved.map_or(DISBELIEF, |(_, last)| (last * 2).min(MOST_DISBELIEF));
        self.disbelieved = Some((Instant::now() + time, time));
        self.trusted = None;
    }

    /// What of these written pages is explained by no note.
    pub(super) fn unexplained(&self, found: &[Region]) -> Vec<Region> {
        let mut left = found.to_vec();
        if self.trusted == Some(true) {
            let explained = self.parts.iter().chain(&self.later);
            explained.for_each(|(start, end)| super::cut_out(&mut left, *start, *end));
        } else {
            left.clear();
        }
        left
    }

    /// Whether the last stop looked around notes only, if it had any.
    pub(in crate::capture) fn was_trusted(&self) -> Option<bool> {
        self.trusted
    }
}

fn has_no_swap() -> bool {
    nix::sys::sysinfo::sysinfo().is_ok_and(|info| info.swap_total() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u64 = 1;
    const WRITE: u64 = 2;

    fn extent(start: u64, end: u64, flags: u64) -> Extent {
        Extent { start, end, flags, offset: 0, inode: 0, watcher: 0 }
    }

    fn counts() -> Counts {
        Counts { memory: 77, flushes: 10, ended: 5, threads: vec![(1, 100), (2, 200)] }
    }

    fn note(address: u64, error: u64) -> Note {
        Note { address, error }
    }

    /// A window that judges well, and what of it an argument changes.
    struct Case {
        counts: Counts,
        expected: Vec<(i32, u64)>,
        sequence: Option<u64>,
        is_strange: bool,
        is_quiet: bool,
        notes: Option<Vec<Note>>,
        guards: Guards,
    }

    fn judged(change: impl FnOnce(&mut Case)) -> Result<(), Doubt> {
        let mut window = Window::begin(&counts(), &[(1, 100), (2, 200)], Some(8), true);
        window.scanned(3);
        let mut now = counts();
        now.flushes += 3;
        now.threads[0].1 += 1;
        let mut case = Case {
            counts: now,
            expected: vec![(1, 101), (2, 200)],
            sequence: Some(8),
            is_strange: false,
            is_quiet: true,
            notes: Some(vec![note(0x1000, 7)]),
            guards: Guards::default(),
        };
        change(&mut case);
        window.judge(&Seen {
            counts: &case.counts,
            expected: &case.expected,
            sequence: case.sequence,
            is_strange: case.is_strange,
            is_quiet: case.is_quiet,
            notes: case.notes.as_deref(),
            extents: &[extent(0x1000, 0x2000, READ | WRITE), extent(0x2000, 0x3000, READ)],
            guards: &case.guards,
        })
    }

    #[test]
    fn every_doubt_is_raised() {
        assert_eq!(judged(|_| ()), Ok(()));
        assert_eq!(judged(|c| c.sequence = Some(9)), Err(Doubt::Mapped));
        assert_eq!(judged(|c| c.sequence = None), Err(Doubt::Mapped));
        assert_eq!(judged(|c| c.counts.memory = 78), Err(Doubt::Mapped));
        assert_eq!(judged(|c| c.is_strange = true), Err(Doubt::Strange));
        // A fault that the kernel took for itself, and one that was not handled.
        assert_eq!(judged(|c| c.counts.threads[1].1 += 1), Err(Doubt::Thread(2)));
        assert_eq!(judged(|c| c.expected[1].1 += 1), Err(Doubt::Thread(2)));
        assert_eq!(judged(|c| c.counts.threads.push((3, 0))), Err(Doubt::Thread(3)));
        assert_eq!(judged(|c| c.counts.ended += 1), Err(Doubt::Ended));
        for change in [1, -1i64 as u64] {
            let flushed = |c: &mut Case| c.counts.flushes = c.counts.flushes.wrapping_add(change);
            assert_eq!(judged(flushed), Err(Doubt::Flushed));
        }
        assert_eq!(judged(|c| c.is_quiet = false), Err(Doubt::Moved));
        assert_eq!(judged(|c| c.notes = None), Err(Doubt::Many));
        for astray in [
            note(0x3000, 6),
            note(0xfff, 6),
            note(0x2000, 7),
            note(0x2000, 5),
            note(0x1000, 0x14),
            note(0x1000, 0x27),
        ] {
            let noted = |c: &mut Case| c.notes.as_mut().expect("notes").push(astray);
            assert_eq!(judged(noted), Err(Doubt::Astray(astray)));
        }
        assert_eq!(judged(|c| c.notes = Some(vec![note(0x2000, 4), note(0x1fff, 6)])), Ok(()));
        assert_eq!(judged(|c| c.guards.add(0x1000, 0x2000)), Err(Doubt::Astray(note(0x1000, 7))));
    }

    #[test]
    fn a_window_begins_with_no_fault_under_way_and_a_whole_scan() {
        let begun = |expected: &[(i32, u64)], sequence, quiet| {
            Window::begin(&counts(), expected, sequence, quiet) != Window::Shut
        };
        assert!(begun(&[(1, 100), (2, 200)], Some(8), true));
        // Faults that were noted and counted between the two looks.
        assert!(begun(&[(0, 3), (1, 90), (2, 200)], Some(8), true));
        assert!(!begun(&[(1, 101), (2, 200)], Some(8), true), "it is in a fault");
        assert!(!begun(&[(1, 100)], Some(8), true), "it is new");
        assert!(!begun(&[(1, 100), (2, 200)], None, true));
        assert!(!begun(&[(1, 100), (2, 200)], Some(8), false));
        let guards = Guards::default();
        let seen = Seen {
            counts: &counts(),
            expected: &[(1, 100), (2, 200)],
            sequence: Some(8),
            is_strange: false,
            is_quiet: true,
            notes: Some(&[]),
            extents: &[],
            guards: &guards,
        };
        let mut window = Window::begin(&counts(), &[(1, 100), (2, 200)], Some(8), true);
        assert_eq!(window.judge(&seen), Err(Doubt::Unscanned));
        window.scanned(0);
        assert_eq!(window.judge(&seen), Ok(()));
        // A scan that no glance came before.
        window.scanned(0);
        assert_eq!(window.judge(&seen), Err(Doubt::Unscanned));
    }

    #[test]
    fn flushes_are_counted_low() {
        let region = |start, end| Region { start, end, categories: 2 };
        let extents = [
            extent(PART / 2, 2 * PART, 3),
            extent(2 * PART, 2 * PART + 0x3000, 3),
            extent(2 * PART + 0x3000, 6 * PART, 3),
        ];
        let count = |found: &[Region]| flushes(found, &extents);
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[region(PART, PART + 0x1000), region(PART + 0x2000, PART + 0x3000)]), 1);
        // A mapping of two pages, both written; and its neighbour.
        assert_eq!(count(&[region(2 * PART, 2 * PART + 0x3000)]), 1);
        assert_eq!(count(&[region(2 * PART, 2 * PART + 0x4000)]), 2);
        // All of a page of page tables: it may not be there. One part of it: it is.
        assert_eq!(count(&[region(3 * PART, 4 * PART)]), 0);
        assert_eq!(count(&[region(3 * PART, 4 * PART - 0x1000)]), 1);
        assert_eq!(count(&[region(3 * PART - 0x1000, 5 * PART + 0x1000)]), 2);
        assert_eq!(count(&[region(PART / 2, PART)]), 1);
        // What lies in no mapping counts nothing.
        assert_eq!(count(&[region(0, 0x1000), region(6 * PART, 7 * PART)]), 0);
    }

    #[test]
    fn the_rest_is_what_a_stop_has_not_looked_at() {
        let spans = [(0x1000, 0x9000), (0xa000, 0xc000), (0xd000, 0xe000)];
        let mut noted = Noted::new(None);
        assert_eq!(noted.rest(&spans), [], "it has looked everywhere");
        noted.trusted = Some(true);
        assert_eq!(noted.rest(&spans), spans);
        noted.parts = vec![(0x1000, 0x2000), (0x4000, 0x5000), (0xa000, 0xc000)];
        noted.later = vec![(0x4000, 0x5000), (0x8000, 0x9000)];
        assert_eq!(noted.rest(&spans), [(0x2000, 0x4000), (0x5000, 0x8000), (0xd000, 0xe000)]);
    }

    #[test]
    fn other_memory_other_mappings_and_pages_without_a_note_refute() {
        let confirmed = |memory, sequence, found: &[Region]| {
            let mut noted = Noted::new(None);
            (noted.trusted, noted.stopped) = (Some(true), (77, Some(8), 0));
            noted.counts.memory = memory;
            noted.confirms(found, sequence)
        };
        assert!(confirmed(77, Some(8), &[]));
        assert!(!confirmed(78, Some(8), &[]));
        assert!(!confirmed(77, Some(9), &[]));
        assert!(!confirmed(77, None, &[]));
        assert!(!confirmed(77, Some(8), &[Region { start: 0x1000, end: 0x2000, categories: 2 }]));
        let mut noted = Noted::new(None);
        let times: Vec<u64> = (0..8)
            .map(|_| {
                noted.disbelieve();
                noted.disbelieved.expect("for a while").1.as_secs()
            })
            .collect();
        assert_eq!(times, [1, 2, 4, 8, 16, 32, 64, 64]);
    }

    #[test]
    fn each_page_has_a_note_or_its_part_was_empty() {
        let region = |start, end| Region { start, end, categories: 2 };
        let spans = [(0x3000, 2 * PART), (3 * PART, 6 * PART)];
        let page = |n: u64| region(n * 0x1000, (n + 1) * 0x1000);
        let noted = |found: &[Region], noted: &[u64]| are_noted(found, noted, &spans);
        assert!(noted(&[], &[]));
        assert!(noted(&[page(5), page(7)], &[0x5008, 0x6000, 0x7ff8]));
        assert!(!noted(&[page(5), page(7)], &[0x5008, 0x6000]));
        assert!(noted(&[region(0x5000, 0x7000)], &[0x5008, 0x6000]));
        assert!(!noted(&[region(0x5000, 0x8000)], &[0x5008, 0x6000]), "three pages, two notes");
        // A part that nobody had touched, up to where the span begins or ends.
        assert!(noted(&[region(3 * PART, 4 * PART)], &[3 * PART + 0x9000]));
        assert!(noted(&[region(0x3000, PART)], &[0x9000]));
        assert!(!noted(&[region(0x4000, PART)], &[0x9000]), "not all of it");
        assert!(!noted(&[region(3 * PART, 4 * PART)], &[4 * PART]), "a note of another one");
        assert!(!noted(&[region(3 * PART, 5 * PART)], &[3 * PART]), "two, and one has none");
        assert!(noted(&[region(3 * PART, 5 * PART)], &[3 * PART, 5 * PART - 1]));
    }

    #[test]
    fn parts_lie_in_spans_and_once() {
        let spans = [(0x1000, PART + 0x5000), (PART + 0x8000, 3 * PART), (9 * PART, 10 * PART)];
        let of = |addresses: &[u64]| {
            let mut out = vec![(1, 2)];
            parts(addresses, &spans, &mut out);
            out
        };
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[0x10, 0x2000]), [(0x1000, PART)]);
        let both = [(PART, PART + 0x5000), (PART + 0x8000, 2 * PART)];
        assert_eq!(of(&[PART + 0x6000, PART + 0x9000]), both);
        assert_eq!(of(&[0, PART]), [(0x1000, PART + 0x5000), both[1]]);
        assert_eq!(of(&[PART, 2 * PART]), [both[0], (PART + 0x8000, 3 * PART)]);
        assert_eq!(of(&[5 * PART, 9 * PART + 7, u64::MAX >> 1]), [(9 * PART, 10 * PART)]);
    }
}
