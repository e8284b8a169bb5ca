//! Where a stop looks for written pages: around the faults that were noted since the round of pre-copy
//! before it, or since the stop before it, if they can be all; else everywhere.
//!
//! ```text
//! threads run | glance, notes begin | scan of the round (protects) | notes  ...  | stop: glance, judgement | run again
//!             |<------------------------ the window ----------------------------->| scan of parts, or of all | ...
//! stop: glance, judgement, scan of parts, or of all (protects), notes begin | notes  ...  | stop: glance, judgement
//!                                                               |<----- the window ---->| scan of parts, or of all
//! ```
//! After its scan every page that was not found is protected, and those that were found are protected again, so that
//! whoever writes to one must fault there first. Invariant: unless [`Window::judge`] doubts, each page whose contents
//! have changed since is a noted one, or lies in a part (2 MB, what one page of page tables translates) around a page
//! that was not there.
//! What it doubts, and why:
//!
//! | doubt | a page may have changed unnoted because |
//! |---|---|
//! | [`window::Doubt::Unscanned`] | neither a round nor the stop before has passed all of the memory |
//! | [`window::Doubt::Mapped`] | mappings have changed, or it is another memory (execve) |
//! | [`window::Doubt::Thread`] | a thread is new, or the kernel has counted faults of it that are not noted: futex(2), direct I/O; or one was not handled, which hides such a fault |
//! | [`window::Doubt::Ended`] | a thread has ended that the kernel had counted faults of |
//! | [`window::Doubt::Strange`] | somebody has taken the lock of its memory outside of a noted fault (process_vm_writev(2), ptrace(2), guard regions), a thread has faulted that nobody knows (a child of vfork(2)), or a fault has ended in SIGSEGV or SIGBUS |
//! | [`window::Doubt::Flushed`] | translations were flushed that our own scan has not: pages have gone (madvise(2)), or moved |
//! | [`window::Doubt::Moved`] | pages are being moved, and go without a flush meanwhile |
//! | [`window::Doubt::Many`] | there were more faults than are kept |
//! | [`window::Doubt::Astray`] | a noted fault is none that the kernel would handle, and may hide one |
//!
//! A window does not begin while a fault is under way that was noted before it, nor where there is swap space:
//! pages that are swapped out go without a flush, too.
//!
//! All that is knowledge of one kernel, which may be wrong, so no checkpoint rests on it alone: it is
//! **confirmed** before anybody gets it. All memory that the stop does not look at is looked at without
//! protecting anything, by a helper while the stop does other things, and what is left of it when the threads
//! run again: whoever finds a page written there that was not
//! noted since the stop ([`Noted::confirms`]) has found one that the stop has missed, or one that the
//! program has just changed in a way that nothing notes. Both times the epoch comes to nothing, and the
//! notes are not believed for a while.
//!
//! Of a program that does little between two stops a round looks around the notes since the first ([`Noted::is_enough`]),
//! and copies what it finds and protects there. It ends no window, but whoever writes to these pages once more is noted once
//! more, so that the second stop looks around later notes only. Unless a thread was in a fault before that scan: it may write
//! after it.

mod parts;
mod window;

pub(super) use parts::flushes;

use super::cut::cut_out;
use crate::capture::glance::{Note, Notes};
use crate::capture::guards::Guards;
use crate::sys::pagemap::Region;
use crate::sys::procmap::Extent;
use parts::{Place, are_noted, parts};
use std::time::{Duration, Instant};
use window::{Seen, Window};

/// Memory of fewer bytes is scanned at once sooner than it is worth notes and their confirmation.
pub(super) const WORTH: u64 = 64 << 20;
/// Around so many notes a round looks sooner than it has scanned all memory, and a stop may have as many more.
const FEW: usize = MANY / 2;
/// Around more notes than this a stop does not look.
const MANY: usize = 256;
/// Of a program that writes more pages from one round to the next, faults are not all kept until they have been
/// confirmed.
const BUSY: u64 = 1024;
/// For how long a program that has is not noted.
const BUSY_FOR: Duration = Duration::from_secs(1);
/// For how long notes are not believed once they were refuted; each time for twice as long, up to the second.
const DISBELIEF: Duration = Duration::from_secs(1);
const MOST_DISBELIEF: Duration = Duration::from_secs(64);
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
    places: Vec<Place>,
    parts: Vec<(u64, u64)>,
    /// Parts around notes that are newer than the last judgement.
    later: Vec<(u64, u64)>,
    /// A round has looked around so many notes since the last stop.
    looked: usize,
    /// What the last stop did, if it had notes: look around them.
    trusted: Option<bool>,
    /// Of a stop: the memory that it looked at, the state of its mappings, and how many notes there
    /// were.
    stopped: (u64, Option<u64>, usize),
    /// What it has not looked at.
    rest: Vec<(u64, u64)>,
    /// Until when notes are not believed, and for how long that was.
    disbelieved: Option<(Instant, Duration)>,
    /// When it was last found to write too much.
    busy: Option<Instant>,
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
            places: Vec::new(),
            parts: Vec::new(),
            later: Vec::new(),
            looked: 0,
            trusted: None,
            stopped: (0, None, 0),
            rest: Vec::new(),
            disbelieved: None,
            busy: None,
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
        self.looked = 0;
        if let Some(notes) = &self.notes {
            notes.begin(&mut self.expected);
        }
    }

    /// The glance was taken, and has shown the state of the mappings.
    pub(in crate::capture) fn after_glance(&mut self, sequence: Option<u64>) {
        if self.may_begin() {
            self.window = Window::begin(&self.counts, &self.expected, sequence);
        }
    }

    /// Whether notes of this memory may be believed at present.
    fn may_begin(&mut self) -> bool {
        let is_of_it = |notes: &Notes| notes.memory() == self.counts.memory;
        let is_believed = self.disbelieved.is_none_or(|(until, _)| Instant::now() >= until);
        self.notes.as_ref().is_some_and(is_of_it) && is_believed && self.is_quiet() && has_no_swap()
    }

    /// Whether a round may look around the notes since the last stop, instead of everywhere.
    pub(in crate::capture) fn is_enough(&self) -> bool {
        let few = |notes: &Notes| notes.count() <= FEW && !notes.is_strange();
        matches!(self.window, Window::Open(_)) && self.notes.as_ref().is_some_and(few)
    }

    /// By a glance: it is still the same memory, with the same mappings.
    pub(super) fn is_same(&self, sequence: Option<u64>) -> bool {
        self.window.is_of(self.counts.memory, sequence)
    }

    /// All threads stand still, and what was written was taken. Since the glance these scans have found so many
    /// pages, and have flushed translations so often, or more often.
    pub(super) fn taken(&mut self, found: u64, flushes: u64) {
        let (_, sequence, _) = self.stopped;
        if self.is_busy(found) || self.trusted.is_none() || !self.may_begin() {
            return;
        }
        if let Some(notes) = &self.notes {
            notes.begin(&mut self.expected);
            (self.stopped.2, self.looked) = (0, 0);
            self.window = Window::begin_in_stop(&self.counts, sequence, flushes);
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

    /// Whether it matters how often a scan has flushed translations.
    pub(super) fn has_notes(&self) -> bool {
        self.notes.is_some()
    }

    /// A round has scanned all of the memory, has found so many pages, and has flushed translations so often,
    /// or more often.
    pub(super) fn scanned(&mut self, found: u64, flushes: u64) {
        self.window.scanned(flushes);
        self.is_busy(found);
    }

    /// Whether a scan has found so many pages that notes are of no use; each fault would be noted all the same.
    fn is_busy(&mut self, found: u64) -> bool {
        let is_busy = found > BUSY;
        if is_busy {
            self.busy = Some(Instant::now());
            self.shut();
        }
        is_busy
    }

    /// What was noted tells nothing any more.
    pub(in crate::capture) fn shut(&mut self) {
        self.window = Window::Shut;
    }

    /// Between rounds: begins to note faults of a process with so much memory that is not busy, or ends it.
    pub(super) fn consider(&mut self, bytes: u64) {
        let Some(worth) = self.worth else { return };
        self.busy = self.busy.filter(|since| since.elapsed() < BUSY_FOR);
        let is_calm = self.busy.is_none();
        let has =
            |notes: &Notes| notes.memory() == self.counts.memory && bytes >= worth / 2 && is_calm;
        if self.notes.as_ref().is_some_and(|notes| !has(notes)) {
            self.notes = None;
            self.shut();
        }
        if self.notes.is_none() && bytes >= worth && self.counts.memory != 0 && is_calm {
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
        self.places.clear();
        self.places.extend(self.list[self.looked..].iter().map(place));
        let ours = self.ours.drain(..).map(|address| Place { address, was_there: false });
        self.places.extend(ours);
        self.places.sort_unstable();
        parts(&self.places, spans, &mut self.parts);
        true
    }

    /// While threads run, before a glance: a round is to look around the notes so far.
    pub(in crate::capture) fn look_so_far(&mut self) {
        if let Some(notes) = &self.notes {
            notes.read(&mut self.list);
            notes.expected(&mut self.expected);
        }
    }

    /// After the glance: where that is. The notes stay, since the fault of one may be under way.
    pub(super) fn so_far(&mut self, spans: &[(u64, u64)]) -> &[(u64, u64)] {
        self.places.clear();
        self.places.extend(self.list[self.looked..].iter().map(place));
        self.places.sort_unstable();
        parts(&self.places, spans, &mut self.parts);
        &self.parts
    }

    /// That was scanned, which has flushed translations so often: the stop need not look there once more, unless somebody
    /// was in a fault.
    pub(super) fn looked_so_far(&mut self, flushes: u64) {
        self.window.flushed(flushes);
        if window::are_out(&self.counts, &self.expected) {
            self.looked = self.list.len();
        }
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
                    self.places.clear();
                    self.places.extend(self.list[judged.min(self.list.len())..].iter().map(place));
                    self.places.sort_unstable();
                    parts(&self.places, spans, &mut self.later);
                }
                false => self.later.extend_from_slice(spans),
            }
        }
        &self.later
    }

    /// What of these spans the stop does not look at, if it looks around notes.
    pub(super) fn rest(&mut self, spans: &[(u64, u64)]) -> &[(u64, u64)] {
        self.rest.clear();
        if self.trusted == Some(true) {
            let Self { parts, rest, .. } = self;
            let mut looked = parts.iter().copied().peekable();
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

    /// The threads still stand, and a glance was taken: this is what stands for the state of their mappings now.
    pub(in crate::capture) fn stands_at(&mut self, sequence: Option<u64>) {
        self.stopped.1 = sequence;
        self.window.stands_at(&self.counts, sequence);
    }

    /// The same if a window has begun, or the stop looks around notes.
    pub(in crate::capture) fn must_know_where_it_stands(&self) -> bool {
        self.trusted == Some(true) || matches!(self.window, Window::Open(_))
    }

    /// What was found written in [`Noted::rest`], without what calls have written that the stop has looked at.
    pub(super) fn without_later(&self, found: &mut Vec<Region>) {
        self.later.iter().for_each(|(start, end)| cut_out(found, *start, *end));
    }

    /// Whether each page that was `found` written in [`Noted::rest`] after the last stop was noted since then, and
    /// it is still the same memory with the same mappings, by a glance that was taken after the look.
    ///
    /// Memory that was given back (MADV_DONTNEED) is not protected any more: a part of it counts as written as a whole.
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
        self.shut();
    }

    /// What of these written pages is explained by no note.
    pub(super) fn unexplained(&self, found: &[Region]) -> Vec<Region> {
        let mut left = found.to_vec();
        if self.trusted == Some(true) {
            let explained = self.parts.iter().chain(&self.later);
            explained.for_each(|(start, end)| cut_out(&mut left, *start, *end));
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

fn place(note: &Note) -> Place {
    Place { address: note.address, was_there: note.was_there() }
}

fn has_no_swap() -> bool {
    nix::sys::sysinfo::sysinfo().is_ok_and(|info| info.swap_total() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_what_a_stop_has_not_looked_at() {
        let spans = [(0x1000, 0x9000), (0xa000, 0xc000), (0xd000, 0xe000)];
        let mut noted = Noted::new(None);
        assert_eq!(noted.rest(&spans), [], "it has looked everywhere");
        noted.trusted = Some(true);
        assert_eq!(noted.rest(&spans), spans);
        noted.parts = vec![(0x1000, 0x2000), (0x4000, 0x5000), (0xa000, 0xc000)];
        assert_eq!(noted.rest(&spans), [(0x2000, 0x4000), (0x5000, 0x9000), (0xd000, 0xe000)]);
        noted.later = vec![(0x4000, 0x5000), (0x8000, 0x9000)];
        let region = |start, end| Region { start, end, categories: 2 };
        let mut found = vec![region(0x2000, 0x3000), region(0x7000, 0x9000)];
        noted.without_later(&mut found);
        assert_eq!(found, [region(0x2000, 0x3000), region(0x7000, 0x8000)]);
    }

    #[test]
    fn a_stop_need_not_look_where_a_round_has_unless_a_thread_was_in_a_fault() {
        let looked = |counted: &[(i32, u64)]| {
            let mut noted = Noted::new(None);
            noted.window = Window::begin_in_stop(&noted.counts, Some(8), 0);
            noted.list = vec![Note { address: 0x5008, error: 7 }; 3];
            noted.expected = vec![(1, 100), (2, 200)];
            noted.counts.threads = counted.to_vec();
            assert_eq!(noted.so_far(&[(0x1000, 0x9000)]), [(0x5000, 0x6000)]);
            noted.looked_so_far(2);
            noted.so_far(&[(0x1000, 0x9000)]).is_empty()
        };
        assert!(looked(&[(1, 100), (2, 201)]));
        assert!(!looked(&[(1, 99), (2, 200)]), "it is in one that was noted before");
        assert!(!looked(&[(1, 100), (2, 200), (3, 0)]), "nobody knows this one");
    }

    #[test]
    fn a_program_that_writes_much_is_busy_for_a_while() {
        let mut noted = Noted::new(Some(WORTH));
        noted.window = Window::begin_in_stop(&noted.counts, Some(8), 0);
        noted.scanned(BUSY, 0);
        assert!(noted.busy.is_none());
        noted.scanned(BUSY + 1, 0);
        assert_eq!(noted.window, Window::Shut);
        noted.consider(WORTH);
        assert!(noted.busy.is_some(), "not over yet");
        noted.busy = Some(Instant::now() - BUSY_FOR);
        noted.consider(0);
        assert!(noted.busy.is_none());
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
}
