//! A set of byte ranges of a file, none of which touch.

use std::collections::BTreeMap;

/// Ranges by their first byte, with one past their last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..end`, joined with what touches it.
    pub(super) fn add(&mut self, mut start: u64, mut end: u64) {
        if start >= end {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            (start, end) = (start.min(s), end.max(e));
            self.0.remove(&s);
        }
        self.0.insert(start, end);
    }

    /// Takes `start..end` out.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        while let Some((&s, &e)) = self.0.range(..end).next_back() {
            if e <= start || start >= end {
                return;
            }
            self.0.remove(&s);
            if e > end {
                self.0.insert(end, e);
            }
            if s < start {
                self.0.insert(s, start);
                return;
            }
        }
    }

    /// The first range that reaches beyond this, without what is before it.
    pub(super) fn from(&self, at: u64) -> Option<(u64, u64)> {
        let around = self.0.range(..at).next_back().filter(|(_, end)| **end > at);
        let (start, end) = around.or_else(|| self.0.range(at..).next())?;
        Some((at.max(*start), *end))
    }

    /// Length of all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }

    /// Whether it is empty.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(s, e)| (*s, *e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn holds_what_was_added(
            changes in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..40),
        ) {
            let (mut ranges, mut model) = (Ranges::default(), [false; 80]);
            for (adds, start, len) in changes {
                match adds {
                    true => ranges.add(start, start + len),
                    false => ranges.remove(start, start + len),
                }
                model[start as usize..(start + len) as usize].fill(adds);
            }
            let mut got = [false; 80];
            let mut last = None;
            for (s, e) in ranges.iter() {
                prop_assert!(s < e && last.is_none_or(|l| l < s), "they do not touch");
                last = Some(e);
                got[s as usize..e as usize].fill(true);
            }
            prop_assert_eq!(got, model);
            for at in 0..80 {
                let first = got[at..].iter().position(|held| *held).map(|i| (at + i) as u64);
                prop_assert_eq!(ranges.from(at as u64).map(|(start, _)| start), first);
            }
            prop_assert_eq!(ranges.bytes(), got.iter().filter(|held| **held).count() as u64);
            prop_assert_eq!(ranges.is_empty(), !model.contains(&true));
        }
    }
}
