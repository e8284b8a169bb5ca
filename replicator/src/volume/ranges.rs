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

    /// Whether it is empty.
    #[cfg(test)]
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
        fn holds_what_was_added(adds in prop::collection::vec((0u64..60, 0u64..12), 0..40)) {
            let (mut ranges, mut model) = (Ranges::default(), [false; 80]);
            for (start, len) in adds {
                ranges.add(start, start + len);
                model[start as usize..(start + len) as usize].fill(true);
            }
            let mut got = [false; 80];
            let mut last = None;
            for (s, e) in ranges.iter() {
                prop_assert!(s < e && last.is_none_or(|l| l < s), "they do not touch");
                last = Some(e);
                got[s as usize..e as usize].fill(true);
            }
            prop_assert_eq!(got, model);
            prop_assert_eq!(ranges.is_empty(), !model.contains(&true));
        }
    }
}
