//! The names of a volume: which file is where. No I/O.

use super::Ino;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

#[derive(Debug, Default)]
pub(super) struct Known {
    /// Directory and name of each of its names; none: it is loose.
    pub(super) links: Vec<(Ino, OsString)>,
    /// Entries, if it is a directory.
    pub(super) children: Option<BTreeMap<OsString, Ino>>,
    /// How often the kernel was told of it and has not forgotten it.
    pub(super) lookups: u64,
}

/// The names of all files.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) known: HashMap<Ino, Known>,
    /// Files whose paths somebody has noted, and whether one has lost a name since that was asked for.
    pub(super) noted: HashSet<Ino>,
    pub(super) moved: bool,
}

impl Tree {
    pub(super) fn add(&mut self, ino: Ino, is_directory: bool) {
        let known = self.known.entry(ino).or_default();
        known.children = is_directory.then(BTreeMap::new);
    }

    pub(super) fn get(&self, parent: Ino, name: &OsStr) -> Option<Ino> {
        self.known.get(&parent)?.children.as_ref()?.get(name).copied()
    }

    pub(super) fn children(&self, ino: Ino) -> Option<&BTreeMap<OsString, Ino>> {
        self.known.get(&ino)?.children.as_ref()
    }

    pub(super) fn links(&self, ino: Ino) -> usize {
        self.known.get(&ino).map_or(0, |k| k.links.len())
    }

    /// Makes an entry refer to a file; what it referred to loses that name.
    pub(super) fn link(&mut self, parent: Ino, name: &OsStr, ino: Ino) {
        self.unlink(parent, name);
        if let Some(children) = self.known.get_mut(&parent).and_then(|k| k.children.as_mut()) {
            children.insert(name.to_owned(), ino);
            self.known.entry(ino).or_default().links.push((parent, name.to_owned()));
        }
    }

    /// Takes an entry away; gives what it referred to.
    pub(super) fn unlink(&mut self, parent: Ino, name: &OsStr) -> Option<Ino> {
        let ino = self.known.get_mut(&parent)?.children.as_mut()?.remove(name)?;
        if let Some(known) = self.known.get_mut(&ino) {
            known.links.retain(|(p, n)| *p != parent || n != name);
            // With a directory all that is in it moves.
            self.moved |= match known.children {
                Some(_) => !self.noted.is_empty(),
                None => self.noted.contains(&ino),
            };
        }
        Some(ino)
    }

    /// What is at a path from the volume's root.
    pub(super) fn at(&self, path: &Path) -> Option<Ino> {
        path.iter().try_fold(Ino::ROOT, |at, name| self.get(at, name))
    }

    /// Where a file is under the volume's directory, by the first of its names.
    pub(super) fn path(&self, ino: Ino) -> PathBuf {
        let mut names: Vec<&OsStr> = Vec::new();
        let mut at = ino;
        let base = loop {
            if at == Ino::ROOT {
                break PathBuf::from("tree");
            }
            match self.known.get(&at).and_then(|k| k.links.first()) {
                Some((parent, name)) => {
                    names.push(name);
                    at = *parent;
                }
                None => break Path::new("loose").join(at.to_string()),
            }
        };
        names.iter().rev().fold(base, |path, name| path.join(name))
    }

    /// Whether `ino` is `directory` or somewhere in it.
    pub(super) fn is_within(&self, ino: Ino, directory: Ino) -> bool {
        let mut at = ino;
        loop {
            if at == directory {
                return true;
            }
            match self.known.get(&at).and_then(|k| k.links.first()) {
                Some((parent, _)) if at != Ino::ROOT => at = *parent,
                _ => return false,
            }
        }
    }
}
