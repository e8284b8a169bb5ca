//! The time from a round, or a stop, to the stop after it, and what makes the notes of it doubtful (see [`super`]).

use super::Counts;
use crate::capture::glance::Note;
use crate::capture::guards::Guards;
use crate::sys::procmap::Extent;

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

/// The time from a round, or a stop, to the stop after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Window {
    #[default]
    Shut,
    /// Its notes are taken, and the scan of its round is under way.
    Begun(Beginning),
    /// The scan has passed all of the memory.
    Open(Beginning),
}

/// What was seen before the scan; of the flushes, what there must be after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    memory: u64,
    flushes: u64,
    ended: u64,
    sequence: u64,
}

/// What is seen in a stop.
pub(super) struct Seen<'a> {
    pub(super) counts: &'a Counts,
    /// Faults that must have been counted of each known thread, in order of their numbers.
    pub(super) expected: &'a [(i32, u64)],
    pub(super) sequence: Option<u64>,
    pub(super) is_strange: bool,
    pub(super) is_quiet: bool,
    /// None: not all were kept.
    pub(super) notes: Option<&'a [Note]>,
    pub(super) extents: &'a [Extent],
    pub(super) guards: &'a Guards,
}

fn expected_of(expected: &[(i32, u64)], tid: i32) -> Option<u64> {
    let at = expected.binary_search_by_key(&tid, |(t, _)| *t).ok()?;
    Some(expected[at].1)
}

/// Whether no thread is in a fault that was noted before `expected` was read, which was before `counts` were.
pub(super) fn are_out(counts: &Counts, expected: &[(i32, u64)]) -> bool {
    let is_out = |&(tid, count): &(i32, u64)| {
        expected_of(expected, tid).is_some_and(|expected| count >= expected)
    };
    counts.threads.iter().all(is_out)
}

impl Window {
    /// Whether it is one of this memory, with these mappings.
    pub(super) fn is_of(&self, memory: u64, sequence: Option<u64>) -> bool {
        matches!(self, Self::Open(begun) if begun.memory == memory && Some(begun.sequence) == sequence)
    }

    /// A scan is about to begin. `expected` was read after all older notes were forgotten, and before
    /// `counts`: a thread of which no more is counted than was expected then is in a fault that was
    /// noted before.
    pub(super) fn begin(counts: &Counts, expected: &[(i32, u64)], sequence: Option<u64>) -> Self {
        match sequence {
            Some(sequence) if are_out(counts, expected) => {
                let Counts { memory, flushes, ended, .. } = *counts;
                Self::Begun(Beginning { memory, flushes, ended, sequence })
            }
            _ => Self::Shut,
        }
    }

    /// All threads stand still, so that nobody is in a fault, and scans have passed all of the memory that may have been
    /// written since the last ones. They have flushed translations as often since the glance of `counts`.
    pub(super) fn begin_in_stop(counts: &Counts, sequence: Option<u64>, flushes: u64) -> Self {
        let Counts { memory, ended, .. } = *counts;
        let flushes = counts.flushes.wrapping_add(flushes);
        let open = |sequence| Self::Open(Beginning { memory, flushes, ended, sequence });
        sequence.map_or(Self::Shut, open)
    }

    /// A scan of some of the memory has flushed translations as often.
    pub(super) fn flushed(&mut self, flushes: u64) {
        if let Self::Open(begun) = self {
            begun.flushes = begun.flushes.wrapping_add(flushes);
        }
    }

    /// Of one that has begun in this stop, after another glance.
    pub(super) fn stands_at(&mut self, counts: &Counts, sequence: Option<u64>) {
        if matches!(self, Self::Open(_)) {
            *self = Self::begin_in_stop(counts, sequence, 0);
        }
    }

    /// The scan has passed all of the memory, and has flushed translations as often.
    pub(super) fn scanned(&mut self, flushes: u64) {
        *self = match *self {
            Self::Begun(begun) => {
                Self::Open(Beginning { flushes: begun.flushes.wrapping_add(flushes), ..begun })
            }
            _ => Self::Shut,
        }
    }

    /// All threads stand still: whether everything that was written lies around the notes.
    pub(super) fn judge(self, seen: &Seen<'_>) -> Result<(), Doubt> {
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
        let mut window = Window::begin(&counts(), &[(1, 100), (2, 200)], Some(8));
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

    /// Of a window during which nothing has happened, but for flushes of translations.
    fn judged_calm(window: Window, flushes: u64) -> Result<(), Doubt> {
        window.judge(&Seen {
            counts: &Counts { flushes, ..counts() },
            expected: &[(1, 100), (2, 200)],
            sequence: Some(8),
            is_strange: false,
            is_quiet: true,
            notes: Some(&[]),
            extents: &[],
            guards: &Guards::default(),
        })
    }

    #[test]
    fn a_window_begins_with_no_fault_under_way_and_a_whole_scan() {
        let begun = |expected: &[(i32, u64)], sequence| {
            Window::begin(&counts(), expected, sequence) != Window::Shut
        };
        assert!(begun(&[(1, 100), (2, 200)], Some(8)));
        // Faults that were noted and counted between the two looks.
        assert!(begun(&[(0, 3), (1, 90), (2, 200)], Some(8)));
        assert!(!begun(&[(1, 101), (2, 200)], Some(8)), "it is in a fault");
        assert!(!begun(&[(1, 100)], Some(8)), "it is new");
        assert!(!begun(&[(1, 100), (2, 200)], None));
        let mut window = Window::begin(&counts(), &[(1, 100), (2, 200)], Some(8));
        assert_eq!(judged_calm(window, 10), Err(Doubt::Unscanned));
        window.scanned(0);
        assert_eq!(judged_calm(window, 10), Ok(()));
        // A scan that no glance came before.
        window.scanned(0);
        assert_eq!(judged_calm(window, 10), Err(Doubt::Unscanned));
    }

    #[test]
    fn a_window_that_begins_in_a_stop_counts_what_scans_flush() {
        let mut window = Window::begin_in_stop(&counts(), Some(8), 3);
        assert_eq!(judged_calm(window, 13), Ok(()));
        assert_eq!(judged_calm(window, 12), Err(Doubt::Flushed));
        window.flushed(2);
        assert_eq!(judged_calm(window, 15), Ok(()));
        assert!(window.is_of(77, Some(8)));
        assert!(
            !window.is_of(78, Some(8)) && !window.is_of(77, Some(9)) && !window.is_of(77, None)
        );
        // Another glance in that stop, after calls in the process.
        window.stands_at(&Counts { flushes: 20, ..counts() }, Some(8));
        assert_eq!(judged_calm(window, 20), Ok(()));
        assert_eq!(Window::begin_in_stop(&counts(), None, 3), Window::Shut);
        let mut shut = Window::Shut;
        shut.stands_at(&counts(), Some(8));
        shut.flushed(1);
        assert_eq!(shut, Window::Shut);
        let mut begun = Window::begin(&counts(), &[(1, 100), (2, 200)], Some(8));
        begun.flushed(1);
        begun.scanned(3);
        assert_eq!(
            judged_calm(begun, 13),
            Ok(()),
            "one that has not begun to scan has not flushed"
        );
    }
}
