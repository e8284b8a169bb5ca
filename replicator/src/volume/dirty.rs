//! What of a volume has changed since it was last taken.

use super::Ino;
use super::ranges::Ranges;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};

/// What changed; see [`super::Record`] for what becomes of it.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// Files whose attributes changed, and the ranges written.
    pub(super) nodes: BTreeMap<Ino, Ranges>,
    /// Entries of directories.
    pub(super) entries: BTreeSet<(Ino, OsString)>,
    /// Files that are no more.
    pub(super) gone: BTreeSet<Ino>,
}

impl Dirty {
    pub(super) fn node(&mut self, ino: Ino) {
        self.nodes.entry(ino).or_default();
    }

    pub(super) fn range(&mut self, ino: Ino, start: u64, end: u64) {
        self.nodes.entry(ino).or_default().add(start, end);
    }

    /// An entry, and with it the directory's times.
    pub(super) fn entry(&mut self, parent: Ino, name: &OsStr) {
        self.entries.insert((parent, name.to_owned()));
        self.node(parent);
    }

    pub(super) fn gone(&mut self, ino: Ino) {
        self.nodes.remove(&ino);
        self.gone.insert(ino);
    }

    /// The first file from this number on of which bytes were written.
    pub(super) fn written_from(&self, ino: Ino) -> Option<(Ino, &Ranges)> {
        let mut all = self.nodes.range(ino..).filter(|(_, ranges)| !ranges.is_empty());
        all.next().map(|(ino, ranges)| (*ino, ranges))
    }

    /// Bytes of this range have been read.
    pub(super) fn read(&mut self, ino: Ino, start: u64, end: u64) {
        if let Some(ranges) = self.nodes.get_mut(&ino) {
            ranges.remove(start, end);
        }
    }

    /// Length of all ranges.
    pub(super) fn bytes(&self) -> u64 {
        self.nodes.values().map(Ranges::bytes).sum()
    }

    /// Takes the files and ranges, for pre-copy.
    pub(super) fn take_nodes(&mut self) -> BTreeMap<Ino, Ranges> {
        std::mem::take(&mut self.nodes)
    }
}
