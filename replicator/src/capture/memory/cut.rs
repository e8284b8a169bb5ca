//! Cuts of ranges: what lies within some, and what beside them.

use crate::image::Mapping;
use crate::image::pages::{Content, PAGE, Run};
use crate::sys::pagemap::Region;

/// Removes what lies in `start..end` from the regions.
pub(super) fn cut_out(regions: &mut Vec<Region>, start: u64, end: u64) {
    let mut behind = Vec::new();
    regions.retain_mut(|r| {
        if r.start < end && r.end > end {
            behind.push(Region { start: end.max(r.start), ..*r });
        }
        if r.end > start && r.start < end {
            r.end = start;
        }
        r.start < r.end
    });
    regions.append(&mut behind);
}

/// Cuts a mapping at the borders of the fresh ranges within it. A mapping of ours that grew is
/// old in one part and fresh in the other, although the kernel shows one.
pub(super) fn split_fresh(mapping: &Mapping, fresh: &[(u64, u64)], out: &mut Vec<Mapping>) {
    let overlap = |(s, e): &&(u64, u64)| *s < mapping.end && *e > mapping.start;
    let mut cuts: Vec<u64> = fresh
        .iter()
        .filter(overlap)
        .flat_map(|(s, e)| [*s, *e])
        .filter(|c| *c > mapping.start && *c < mapping.end)
        .chain([mapping.end])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut start = mapping.start;
    for end in cuts {
        let is_fresh = fresh.iter().any(|(s, e)| *s <= start && *e >= end);
        let mut part = mapping.clone();
        part.start = start;
        part.end = end;
        part.fresh = is_fresh;
        part.source = mapping.source.behind(start - mapping.start);
        match out.last_mut() {
            // Neighbours cut from one mapping with the same mark are one.
            Some(last) if last.end == start && last.fresh == is_fresh && start > mapping.start => {
                last.end = end;
            }
            _ => out.push(part),
        }
        start = end;
    }
}

/// Drops from `runs` what lies outside the mappings of its process: memory that was there in a
/// round of pre-copy and was unmapped before the stop.
pub(in crate::capture) fn clip(runs: &mut Vec<Run>, mark: i32, mappings: &[Mapping]) {
    let mut out = Vec::with_capacity(runs.len());
    for run in runs.drain(..) {
        if run.process != mark as u32 {
            out.push(run);
            continue;
        }
        let end = run.start + u64::from(run.count) * PAGE as u64;
        for m in mappings {
            let (s, e) = (run.start.max(m.start), end.min(m.end));
            if s >= e {
                continue;
            }
            let content = match run.content {
                Content::Data(at) => Content::Data(at + (s - run.start) as usize),
                Content::Dropped => Content::Dropped,
            };
            let count = ((e - s) / PAGE as u64) as u32;
            out.push(Run { process: run.process, start: s, count, content });
        }
    }
    *runs = out;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Source;

    fn anonymous(start: u64, end: u64, fresh: bool) -> Mapping {
        Mapping { start, end, prot: 3, grows_down: false, source: Source::Anonymous, fresh }
    }

    #[test]
    fn a_grown_mapping_is_fresh_in_its_new_part_only() {
        let mut out = Vec::new();
        split_fresh(&anonymous(0x1000, 0x9000, false), &[(0x5000, 0x9000)], &mut out);
        assert_eq!(out, [anonymous(0x1000, 0x5000, false), anonymous(0x5000, 0x9000, true)]);
        out.clear();
        split_fresh(
            &anonymous(0x1000, 0x9000, false),
            &[(0x5000, 0x6000), (0x6000, 0x9000)],
            &mut out,
        );
        assert_eq!(out, [anonymous(0x1000, 0x5000, false), anonymous(0x5000, 0x9000, true)]);
        out.clear();
        split_fresh(&anonymous(0x1000, 0x2000, false), &[(0x1000, 0x2000)], &mut out);
        assert_eq!(out, [anonymous(0x1000, 0x2000, true)]);
    }

    #[test]
    fn regions_keep_what_lies_beside_a_cut() {
        let region = |start, end| Region { start, end, categories: 2 };
        let mut regions = vec![
            region(0, 2),
            region(1, 5),
            region(3, 4),
            region(2, 9),
            region(5, 7),
            region(7, 8),
        ];
        cut_out(&mut regions, 3, 6);
        let kept = [(0, 2), (1, 3), (2, 3), (7, 8), (6, 9), (6, 7)];
        assert_eq!(regions, kept.map(|(start, end)| region(start, end)));
    }

    #[test]
    fn runs_outside_the_mappings_are_clipped() {
        let run = |start, count, at| Run { process: 1, start, count, content: Content::Data(at) };
        let mut runs = vec![run(0x1000, 4, 0), run(0x8000, 1, 4 * PAGE)];
        clip(&mut runs, 1, &[anonymous(0x2000, 0x4000, false)]);
        assert_eq!(runs, [run(0x2000, 2, PAGE)]);
    }
}
