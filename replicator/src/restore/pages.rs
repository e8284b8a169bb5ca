//! What to do with a checkpoint's pages in one process: which ranges to drop, which to write.
//!
//! Pure. All drops come first, in one batch of remote calls, then all writes in order: so a write
//! that a later drop covers is left out. Pages taken before a mapping went (by a pre-copy round)
//! are left out too.

use crate::image::pages::{Content, PAGE, Run};
use crate::image::{Mapping, Source};

const PROT_WRITE: u8 = libc::PROT_WRITE as u8;

/// A range of addresses.
pub(super) type Span = (u64, u64);

/// How pages get into a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The process may write there itself.
    Plain,
    /// Read-only and private: past the protection.
    Forced,
}

/// Bytes to write to an address, by their offset in the page set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) offset: usize,
    pub(super) way: Way,
}

/// The drops and writes that bring these runs into an address space.
pub(super) fn arrange(runs: &[Run], mappings: &[Mapping]) -> (Vec<Span>, Vec<Write>) {
    let dropped: Vec<(usize, Span)> = runs
        .iter()
        .enumerate()
        .filter(|(_, r)| r.content == Content::Dropped)
        .map(|(i, r)| (i, span(r)))
        .collect();
    let mut drops = Vec::new();
    let mut writes = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        let whole = span(run);
        let first = mappings.partition_point(|m| m.end <= whole.0);
        for m in mappings[first..].iter().take_while(|m| m.start < whole.1) {
            let piece = (whole.0.max(m.start), whole.1.min(m.end));
            match run.content {
                Content::Dropped if can_drop(m) => drops.push(piece),
                Content::Dropped => {}
                Content::Data(offset) => {
                    let Some(way) = way(m) else { continue };
                    let later = dropped.iter().filter(|(at, _)| *at > i).map(|(_, s)| *s);
                    for (start, end) in without(piece, later) {
                        let offset = offset + (start - whole.0) as usize;
                        writes.push(Write { start, len: end - start, offset, way });
                    }
                }
            }
        }
    }
    (drops, writes)
}

fn span(run: &Run) -> Span {
    (run.start, run.start + u64::from(run.count) * PAGE as u64)
}

/// How pages get into this mapping; not at all if they are not the process's own.
pub(super) fn way(m: &Mapping) -> Option<Way> {
    match &m.source {
        Source::Vdso(_) => None,
        // The file or object itself holds what a shared mapping shows.
        Source::File { shared: true, .. } | Source::Object { shared: true, .. } => None,
        _ if m.prot & PROT_WRITE != 0 => Some(Way::Plain),
        Source::Anonymous | Source::File { .. } | Source::Object { .. } => Some(Way::Forced),
    }
}

fn can_drop(m: &Mapping) -> bool {
    !matches!(m.source, Source::Vdso(_) | Source::Object { shared: true, .. })
}

/// What is left of `piece` without the spans `holes`.
fn without(piece: Span, holes: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut left = vec![piece];
    for hole in holes {
        if hole.0 < piece.1 && piece.0 < hole.1 {
            left = left
                .into_iter()
                .flat_map(|(a, b)| [(a, b.min(hole.0)), (a.max(hole.1), b)])
                .filter(|(a, b)| a < b)
                .collect();
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Home;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const P: u64 = PAGE as u64;

    fn mapping(start: u64, pages: u64, prot: i32, source: Source) -> Mapping {
        let prot = prot as u8;
        let (start, end) = (start * P, (start + pages) * P);
        Mapping { start, end, prot, grows_down: false, source, fresh: false }
    }

    fn space() -> Vec<Mapping> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let file = Source::File {
            path: "/f".into(),
            offset: 0,
            shared: false,
            home: Home::Host,
            writable: false,
        };
        vec![
            mapping(10, 4, rw, Source::Anonymous),
            mapping(14, 3, libc::PROT_READ, file),
            mapping(20, 5, rw, Source::Object { id: 1, offset: 0, shared: false }),
            mapping(30, 2, libc::PROT_READ, Source::Vdso(crate::image::VdsoPart::Vdso)),
        ]
    }

    proptest! {
        #[test]
        fn the_last_word_on_each_page_holds(
            items in prop::collection::vec((8u64..34, 1u32..6, any::<bool>()), 0..12)
        ) {
            let mut offset = 0;
            let mut runs = Vec::new();
            for (start, count, dropped) in items {
                let content = if dropped { Content::Dropped } else { Content::Data(offset) };
                runs.push(Run { process: 0, start: start * P, count, content });
                offset += count as usize * PAGE;
            }
            let mapped = |page: u64| {
                space()[..3].iter().any(|m| m.start <= page * P && page * P < m.end)
            };
            // The model: page by page, in order. None: dropped.
            let mut wanted = BTreeMap::new();
            for run in &runs {
                for i in 0..u64::from(run.count) {
                    let page = run.start / P + i;
                    if mapped(page) {
                        wanted.insert(page, match run.content {
                            Content::Data(at) => Some(at + i as usize * PAGE),
                            Content::Dropped => None,
                        });
                    }
                }
            }
            let (drops, writes) = arrange(&runs, &space());
            let mut have = BTreeMap::new();
            for (start, end) in drops {
                have.extend((start / P..end / P).map(|page| (page, None)));
            }
            for w in writes {
                let pages = w.start / P..(w.start + w.len) / P;
                have.extend(pages.enumerate().map(|(i, p)| (p, Some(w.offset + i * PAGE))));
            }
            prop_assert_eq!(have, wanted);
        }
    }
}
