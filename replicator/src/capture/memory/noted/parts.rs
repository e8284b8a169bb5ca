//! Where notes and written pages lie: parts of memory, none larger than what one page of page tables
//! translates.

use crate::image::pages::PAGE;
use crate::sys::pagemap::Region;
use crate::sys::procmap::Extent;

/// What one page of page tables translates.
const PART: u64 = 2 << 20;

/// How often a scan that found this has flushed translations, or less: once for each page of page tables of
/// each mapping in which it has protected something (pagemap_scan_pmd_entry() of fs/proc/task_mmu.c). Where
/// a mapping has all of such a page and all was found, there may be none at all, and nothing to flush.
pub(in crate::capture::memory) fn flushes(found: &[Region], extents: &[Extent]) -> u64 {
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

/// Where something was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) address: u64,
    /// Its page was there and protected. If it was not, its page of page tables may be new: whatever lies there is not protected.
    pub(super) was_there: bool,
}

/// Replaces the contents of `out` by the parts around these places, as far as they lie in spans: of what one
/// page of page tables translates, all or what lies between the first and the last page. Places and spans lie in order.
pub(super) fn parts(places: &[Place], spans: &[(u64, u64)], out: &mut Vec<(u64, u64)>) {
    const PAGE: u64 = crate::image::pages::PAGE as u64;
    out.clear();
    for within in places.chunk_by(|a, b| a.address / PART == b.address / PART) {
        let (first, last) = (within[0], within[within.len() - 1]);
        let (start, end) = match within.iter().all(|place| place.was_there) {
            true => (first.address / PAGE * PAGE, last.address / PAGE * PAGE + PAGE),
            false => (first.address / PART * PART, first.address / PART * PART + PART),
        };
        let from = spans.partition_point(|(_, e)| *e <= start);
        for (s, e) in spans[from..].iter().take_while(|(s, _)| *s < end) {
            let (start, end) = (start.max(*s), end.min(*e));
            match out.last_mut() {
                Some((_, last)) if start == *last && start % PART == 0 => *last = end,
                _ => out.push((start, end)),
            }
        }
    }
}

/// Whether each page that was found written in these spans has a note, or is in a part all of which was found
/// and which has one. All of them lie in order.
pub(super) fn are_noted(found: &[Region], noted: &[u64], spans: &[(u64, u64)]) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent { start, end, flags: 3, offset: 0, inode: 0, watcher: 0 }
    }

    #[test]
    fn flushes_are_counted_low() {
        let region = |start, end| Region { start, end, categories: 2 };
        let extents = [
            extent(PART / 2, 2 * PART),
            extent(2 * PART, 2 * PART + 0x3000),
            extent(2 * PART + 0x3000, 6 * PART),
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
        // A part that was given back, up to where the span begins or ends.
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
        let of = |addresses: &[u64], was_there| {
            let places: Vec<Place> =
                addresses.iter().map(|&address| Place { address, was_there }).collect();
            let mut out = vec![(1, 2)];
            parts(&places, &spans, &mut out);
            out
        };
        assert_eq!(of(&[], false), []);
        assert_eq!(of(&[0x10, 0x2000], false), [(0x1000, PART)]);
        let both = [(PART, PART + 0x5000), (PART + 0x8000, 2 * PART)];
        assert_eq!(of(&[PART + 0x6000, PART + 0x9000], false), both);
        assert_eq!(of(&[0, PART], false), [(0x1000, PART + 0x5000), both[1]]);
        assert_eq!(of(&[PART, 2 * PART], false), [both[0], (PART + 0x8000, 3 * PART)]);
        let far = [5 * PART, 9 * PART + 7, u64::MAX >> 1];
        assert_eq!(of(&far, false), [(9 * PART, 10 * PART)]);
        // Pages that were there: those between the first and the last of one page of page tables.
        assert_eq!(of(&far, true), [(9 * PART, 9 * PART + 0x1000)]);
        assert_eq!(of(&[0x10, 0x2008, 0x4ff8], true), [(0x1000, 0x5000)]);
        let around = [(PART + 0x4000, PART + 0x5000), (PART + 0x8000, PART + 0xa000)];
        assert_eq!(of(&[PART + 0x4000, PART + 0x9000], true), around);
        let three = [PART - 1, PART, 2 * PART - 1];
        let merged = [(PART - 0x1000, PART + 0x5000), (PART + 0x8000, 2 * PART)];
        assert_eq!(of(&three, true), merged);
        assert_eq!(of(&[PART], true), [(PART, PART + 0x1000)]);
    }

    #[test]
    fn one_page_that_was_not_there_is_enough_to_look_around_it() {
        let place = |address, was_there| Place { address, was_there };
        let places = [place(0x1000, true), place(0x3000, false), place(PART, true)];
        let mut out = Vec::new();
        parts(&places, &[(0, 2 * PART)], &mut out);
        assert_eq!(out, [(0, PART + 0x1000)]);
    }
}
