//! From a checkpoint's records to files. Every step may have been done before (VO-2).
//!
//! Order: files that are new, loose, with what came ahead of them; contents; entries that refer to something else now are
//! taken away (a file that loses its last name becomes loose); entries are made; files that are
//! gone; attributes, the times of directories last of all.

use super::{Inner, Ino, Record, VolumeError};
use crate::volume::disk::{Shape, step};
use crate::volume::record::Node;
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The last word on each thing.
#[derive(Default)]
struct Words<'a> {
    nodes: BTreeMap<Ino, &'a Node>,
    entries: BTreeMap<(Ino, &'a OsString), Option<Ino>>,
    gone: BTreeSet<Ino>,
    whole: bool,
    /// Where contents that came ahead of it are.
    seeds: Option<&'a Path>,
}

impl Inner {
    pub(super) fn apply(&mut self, records: &[Record], seeds: &Path) -> Result<(), VolumeError> {
        let mut words = Words::default();
        for record in records {
            match record {
                Record::Whole { seeded } => {
                    words.whole = true;
                    words.seeds = seeded.then_some(seeds);
                }
                Record::Node(node) => {
                    words.nodes.insert(node.ino, node);
                }
                Record::Entry { parent, name, target } => {
                    words.entries.insert((*parent, name), *target);
                }
                Record::Gone(ino) => {
                    words.gone.insert(*ino);
                }
                Record::Data { .. } | Record::Hole { .. } => {}
            }
        }
        words.nodes.retain(|ino, _| !words.gone.contains(ino));
        if let Some(seeds) = words.seeds.filter(|seeds| !self.disk.at(seeds).is_dir()) {
            return Err(
                self.misfit(format!("{} came ahead of it, and is missing", seeds.display()))
            );
        }
        if words.whole {
            self.wipe().map_err(self.disk.failed("making room for a full copy"))?;
        }
        self.make_new(&words)?;
        self.fill(records, &words)?;
        self.detach(&words)?;
        self.attach(&words)?;
        for ino in &words.gone {
            if let Some(known) = self.tree.known.get(ino) {
                if !known.links.is_empty() {
                    return Err(self.misfit(format!("file {ino} is gone and has a name")));
                }
                let is_directory = known.children.is_some();
                let removed = self.disk.remove(&self.tree.path(*ino), is_directory);
                removed.map_err(self.disk.failed(format!("removing file {ino}")))?;
                self.tree.known.remove(ino);
            }
        }
        self.dress(&words)
    }

    fn misfit(&self, why: String) -> VolumeError {
        VolumeError::Misfit { root: self.disk.root().to_owned(), why }
    }

    fn wipe(&mut self) -> io::Result<()> {
        self.disk.wipe(Path::new("loose"))?;
        self.disk.wipe(Path::new("tree"))?;
        self.look_around()
    }

    fn make_new(&mut self, words: &Words<'_>) -> Result<(), VolumeError> {
        for (&ino, node) in &words.nodes {
            self.next = self.next.max(ino.0 + 1);
            let is_directory = node.shape == Shape::Directory;
            if let Some(known) = self.tree.known.get(&ino) {
                if known.children.is_some() != is_directory {
                    return Err(self.misfit(format!("file {ino} is of another kind")));
                }
                continue;
            }
            let path = Path::new("loose").join(ino.to_string());
            let made = match self.seed_of(ino, node, words) {
                // Another name of it, as all of this may have to be done again.
                Some(seed) => {
                    self.disk.link(&seed, &path).and_then(|()| self.disk.mark(&path, ino))
                }
                None => self.disk.make(&path, ino, &node.shape, 0o700),
            };
            made.map_err(self.disk.failed(format!("making file {ino}")))?;
            self.tree.add(ino, is_directory);
        }
        Ok(())
    }

    /// What came ahead of a file.
    fn seed_of(&self, ino: Ino, node: &Node, words: &Words<'_>) -> Option<PathBuf> {
        let seed = words.seeds.filter(|_| node.shape == Shape::File)?.join(ino.to_string());
        self.disk.meta(&seed).is_ok_and(|meta| meta.is_file()).then_some(seed)
    }

    fn fill(&mut self, records: &[Record], words: &Words<'_>) -> Result<(), VolumeError> {
        let mut last: Option<(Ino, File)> = None;
        for record in records {
            let (ino, offset, len) = match record {
                Record::Data { ino, offset, bytes } => (*ino, *offset, bytes.0.len() as u64),
                Record::Hole { ino, offset, len } => (*ino, *offset, *len),
                _ => continue,
            };
            if words.gone.contains(&ino) {
                continue;
            }
            // What lies beyond the size is of a time when the file was longer.
            let size = words.nodes.get(&ino).map_or(u64::MAX, |n| n.attributes.size);
            let len = len.min(size.saturating_sub(offset));
            if len == 0 {
                continue;
            }
            if last.as_ref().is_none_or(|(of, _)| *of != ino) {
                if !self.tree.known.contains_key(&ino) {
                    return Err(self.misfit(format!("file {ino} has contents and is not known")));
                }
                let opened = self.disk.open(&self.tree.path(ino), true);
                last = Some((ino, opened.map_err(self.disk.failed(format!("opening {ino}")))?));
            }
            let Some((_, file)) = &last else { continue };
            let written = step().and_then(|()| match record {
                Record::Data { bytes, .. } => file.write_all_at(&bytes.0[..len as usize], offset),
                _ => punch(file, offset, len),
            });
            written.map_err(self.disk.failed(format!("writing {len} bytes to file {ino}")))?;
        }
        for (&ino, node) in &words.nodes {
            if node.shape == Shape::File {
                let path = self.tree.path(ino);
                let sized = self.disk.resize(&path, node.attributes.size);
                sized.map_err(self.disk.failed(format!("setting the size of file {ino}")))?;
            }
        }
        Ok(())
    }

    /// Takes away entries that refer to something else now.
    fn detach(&mut self, words: &Words<'_>) -> Result<(), VolumeError> {
        for (&(parent, name), &target) in &words.entries {
            let Some(held) = self.tree.get(parent, name) else { continue };
            if Some(held) == target {
                continue;
            }
            let path = self.tree.path(parent).join(name);
            let done = if self.tree.links(held) > 1 {
                self.disk.remove(&path, false)
            } else {
                self.disk.rename(&path, &Path::new("loose").join(held.to_string()))
            };
            done.map_err(self.disk.failed(format!("taking away {}", path.display())))?;
            self.tree.unlink(parent, name);
        }
        Ok(())
    }

    fn attach(&mut self, words: &Words<'_>) -> Result<(), VolumeError> {
        for (&(parent, name), &target) in &words.entries {
            let Some(target) = target else { continue };
            if self.tree.get(parent, name) == Some(target) {
                continue;
            }
            if self.tree.children(parent).is_none() || !self.tree.known.contains_key(&target) {
                let why =
                    format!("{name:?} in directory {parent} refers to {target}, which are not");
                return Err(self.misfit(why));
            }
            let path = self.tree.path(parent).join(name);
            let from = self.tree.path(target);
            let done = if self.tree.links(target) > 0 {
                self.disk.link(&from, &path)
            } else {
                self.disk.rename(&from, &path)
            };
            done.map_err(self.disk.failed(format!("making {}", path.display())))?;
            self.tree.link(parent, name, target);
        }
        Ok(())
    }

    fn dress(&mut self, words: &Words<'_>) -> Result<(), VolumeError> {
        let paths: HashMap<Ino, _> =
            words.nodes.keys().map(|ino| (*ino, self.tree.path(*ino))).collect();
        for (ino, node) in &words.nodes {
            let path = &paths[ino];
            let dressed = self.disk.dress(path, node);
            dressed.map_err(self.disk.failed(format!("attributes of {}", path.display())))?;
        }
        Ok(())
    }
}

/// Makes a range read as zeros; the file may have to grow for it.
pub(in crate::volume) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let size = file.metadata()?.len();
    if offset + len > size {
        file.set_len(offset + len)?;
    }
    if offset < size {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, flags, offset as i64, len as i64)?;
    }
    Ok(())
}
