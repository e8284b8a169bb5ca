//! One volume: what its file system does, what has changed of it, and how another host's changes
//! get into it. Everything that changes a name or a byte goes through one lock, so that a seal
//! sees a file's bytes and the note that they changed together or not at all.

mod apply;
mod change;

use super::dirty::Dirty;
use super::disk::Disk;
use super::ranges::Ranges;
use super::record::{Blob, Record};
use super::tree::Tree;
use super::{Ino, VolumeError, seeds};
use nix::unistd::{Whence, lseek64};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) use apply::punch;
pub(super) use change::DEFAULT_ACL;
pub use change::{Change, Found};

/// Bytes in one record at most.
const PIECE: u64 = 128 << 10;

/// With no more files and entries than this that have changed, all are read in the stop.
const MANY: usize = if cfg!(test) { 3 } else { 256 };
/// So many are read at a time while files are written to.
const FEW: usize = 64;
/// More than a record takes without its bytes.
const HEAD: usize = 64;
/// With less room than this in a piece that goes ahead, the next one is begun.
const LEAST: u64 = 4 << 10;

/// A regular file that is open.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Its number.
    pub ino: Ino,
    pub(super) file: Arc<File>,
}

impl Opened {
    /// Reads up to `buffer.len()` bytes; fewer at the end of the file.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut got = 0;
        while got < buffer.len() {
            match self.file.read_at(&mut buffer[got..], offset + got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(got)
    }

    /// Where the next data or hole is: lseek(2) with SEEK_DATA or SEEK_HOLE.
    pub fn seek(&self, offset: i64, whence: i32) -> io::Result<i64> {
        let whence = match whence {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        lseek64(&*self.file, offset, whence).map_err(io::Error::from)
    }

    /// Has the disk write the file; with `data` only what is needed to read it again.
    pub fn sync(&self, data: bool) -> io::Result<()> {
        if data { self.file.sync_data() } else { self.file.sync_all() }
    }
}

/// How far contents have been read that go ahead of a checkpoint: up to this offset of this file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    ino: Ino,
    offset: u64,
}

impl Place {
    /// The beginning of a file.
    pub(super) const fn of(ino: Ino) -> Self {
        Self { ino, offset: 0 }
    }

    /// Where the first file begins.
    pub(super) const FIRST: Self = Self::of(Ino::ROOT);
}

#[derive(Debug)]
struct Inner {
    disk: Disk,
    tree: Tree,
    dirty: Dirty,
    next: u64,
}

/// A volume on this host.
#[derive(Debug)]
pub struct Volume {
    inner: Mutex<Inner>,
}

impl Volume {
    /// Opens a volume's directory, and makes what is not there.
    pub(super) fn open(root: &Path) -> Result<Self, VolumeError> {
        let mut inner = Inner {
            disk: Disk::new(root),
            tree: Tree::default(),
            dirty: Dirty::default(),
            next: 2,
        };
        inner.look_around().map_err(inner.disk.failed("reading the directory"))?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its directory on this host.
    pub fn root(&self) -> PathBuf {
        self.inner().disk.root().to_owned()
    }

    /// Where a file is, by one of its names, from the volume's root; none if it has none, or is not there.
    pub fn path_of(&self, ino: Ino) -> Option<PathBuf> {
        let inner = self.inner();
        let path = inner.tree.known.contains_key(&ino).then(|| inner.tree.path(ino))?;
        path.strip_prefix("tree").ok().map(Path::to_owned)
    }

    /// Everything counts as changed.
    pub(super) fn all_changed(&self) {
        let Inner { tree, dirty, disk, .. } = &mut *self.inner();
        *dirty = Dirty::default();
        for (&ino, known) in &tree.known {
            let size = match known.children {
                None => disk.meta(&tree.path(ino)).map_or(0, |m| m.size()),
                Some(_) => 0,
            };
            dirty.range(ino, 0, size);
            for name in known.children.iter().flat_map(|c| c.keys()) {
                dirty.entry(ino, name);
            }
        }
    }

    /// Nothing counts as changed.
    pub(super) fn none_changed(&self) {
        self.inner().dirty = Dirty::default();
    }

    /// Reads the contents that have changed, and counts them as unchanged; gives their length. There is room for so
    /// many bytes.
    pub(super) fn precopy(&self, out: &mut Vec<u8>, room: u64) -> Result<usize, VolumeError> {
        let before = out.len();
        let mut inner = self.inner();
        inner.check_room(room)?;
        let nodes = inner.dirty.take_nodes();
        nodes.keys().for_each(|ino| inner.dirty.node(*ino));
        drop(inner);
        for (ino, ranges) in nodes {
            if ranges.is_empty() {
                continue;
            }
            let inner = self.inner();
            let path = inner.tree.path(ino);
            // One that is gone meanwhile has nothing to be read.
            let Ok(file) = inner.disk.open(&path, false) else { continue };
            let failed = inner.disk.failed(format!("reading {}", path.display()));
            drop(inner);
            let size = contents(ino, &file, &ranges, out).map_err(failed)?;
            // What was cut off, and reads as zeros if the file grows again, is not done with.
            let mut inner = self.inner();
            for (start, end) in ranges.iter().filter(|(_, end)| *end > size) {
                inner.dirty.range(ino, start.max(size), end);
            }
        }
        self.write_many(out)?;
        Ok(out.len() - before)
    }

    /// Attributes and entries are read in the stop, but for most of many.
    fn write_many(&self, out: &mut Vec<u8>) -> Result<(), VolumeError> {
        let mut from = Ino::ROOT;
        loop {
            let mut inner = self.inner();
            if inner.dirty.nodes.len() + inner.dirty.entries.len() <= MANY {
                return Ok(());
            }
            // Those with contents that were not read are not done with.
            let few = |(ino, _): (&Ino, &Ranges)| *ino;
            let nodes: Vec<Ino> = inner.dirty.nodes.range(from..).take(FEW).map(few).collect();
            let entries: Vec<_> = (0..FEW).map_while(|_| inner.dirty.entries.pop_first()).collect();
            if nodes.is_empty() && entries.is_empty() {
                return Ok(());
            }
            from = nodes.last().map_or(Ino(u64::MAX), |ino| Ino(ino.0 + 1));
            let mut some = Dirty { entries: entries.into_iter().collect(), ..Dirty::default() };
            for ino in nodes {
                if inner.dirty.nodes.get(&ino).is_some_and(Ranges::is_empty) {
                    inner.dirty.nodes.remove(&ino);
                    some.node(ino);
                }
            }
            inner.write_down(&some, out)?;
        }
    }

    /// Reads some of the contents that have changed, from this place on, and counts them as unchanged: records that
    /// make a piece of at most [`seeds::PIECE`] bytes. Gives where to go on, or nothing at the end.
    pub(super) fn seed(
        &self,
        from: Place,
        out: &mut Vec<u8>,
    ) -> Result<Option<Place>, VolumeError> {
        let mut at = from;
        loop {
            let mut inner = self.inner();
            let Some((ino, ranges)) = inner.dirty.written_from(at.ino) else { return Ok(None) };
            if ino != at.ino {
                at = Place::of(ino);
            }
            let room = seeds::PIECE.saturating_sub(out.len() + HEAD) as u64;
            if room < LEAST {
                return Ok(Some(at));
            }
            let path = inner.tree.path(ino);
            let failed = || inner.disk.failed(format!("reading {}", path.display()));
            // One that is gone meanwhile has nothing to be read, and what lies behind the end of one that was cut is
            // not read now.
            let next = match inner.disk.open(&path, false) {
                Ok(file) => {
                    let part = next_part(&file, ranges, at.offset, room).map_err(failed())?;
                    part.map(|part| (file, part))
                }
                Err(_) => None,
            };
            let Some((file, Part { start, end, is_hole })) = next else {
                at = Place::of(Ino(ino.0 + 1));
                continue;
            };
            let failed = failed();
            inner.dirty.read(ino, start, end);
            drop(inner);
            if is_hole {
                Record::Hole { ino, offset: start, len: end - start }.encode(out);
            } else {
                read_data(ino, &file, start, end, out).map_err(failed)?;
            }
            // What is written there again is for the next time.
            at.offset = end;
        }
    }

    /// How many bytes have changed and were not read yet, holes among them.
    pub(super) fn unread(&self) -> u64 {
        self.inner().dirty.bytes()
    }

    /// Takes all that has changed.
    pub(super) fn seal(&self, out: &mut Vec<u8>) -> Result<(), VolumeError> {
        let mut inner = self.inner();
        let dirty = std::mem::take(&mut inner.dirty);
        let result = inner.write_down(&dirty, out);
        if result.is_err() {
            inner.dirty = dirty;
        }
        result
    }

    /// Files without a name.
    #[cfg(test)]
    pub(super) fn loose(&self) -> Vec<Ino> {
        let inner = self.inner();
        let is_loose = |ino: &&Ino| **ino != Ino::ROOT && inner.tree.links(**ino) == 0;
        inner.tree.known.keys().filter(is_loose).copied().collect()
    }

    /// All names of a file.
    #[cfg(test)]
    pub(super) fn names(&self, ino: Ino) -> Vec<(Ino, OsString)> {
        self.inner().tree.known.get(&ino).map(|k| k.links.clone()).unwrap_or_default()
    }

    /// Has the disk write everything.
    pub(super) fn sync(&self) -> Result<(), VolumeError> {
        let inner = self.inner();
        let synced = File::open(inner.disk.root())
            .and_then(|f| nix::unistd::syncfs(&f).map_err(io::Error::from));
        synced.map_err(inner.disk.failed("syncfs"))
    }

    /// Carries out what a checkpoint says.
    /// Contents that came ahead of it are in `seeds`, in the volume's directory.
    pub(super) fn apply(&self, records: &[Record], seeds: &Path) -> Result<(), VolumeError> {
        self.inner().apply(records, seeds)
    }
}

impl Inner {
    /// Learns what is on the disk. Files without a number get one.
    fn look_around(&mut self) -> io::Result<()> {
        for part in ["tree", "loose"] {
            fs::create_dir_all(self.disk.at(Path::new(part)))?;
        }
        self.tree = Tree::default();
        self.tree.add(Ino::ROOT, true);
        if self.disk.number(Path::new("tree"))? != Some(Ino::ROOT) {
            self.disk.mark(Path::new("tree"), Ino::ROOT)?;
        }
        let mut seen: HashMap<Ino, u64> = HashMap::new();
        let mut unnumbered: Vec<(Ino, OsString)> = Vec::new();
        let mut todo = Vec::new();
        for entry in fs::read_dir(self.disk.at(Path::new("loose")))? {
            let entry = entry?;
            let Some(ino) = entry.file_name().to_str().and_then(|n| n.parse().ok()).map(Ino) else {
                continue;
            };
            let path = Path::new("loose").join(entry.file_name());
            // It may have been made and not been given its number.
            self.disk.mark(&path, ino)?;
            let meta = self.disk.meta(&path)?;
            seen.insert(ino, meta.ino());
            self.tree.add(ino, meta.is_dir());
            self.next = self.next.max(ino.0 + 1);
            if meta.is_dir() {
                todo.push(ino);
            }
        }
        todo.push(Ino::ROOT);
        while let Some(parent) = todo.pop() {
            let directory = self.tree.path(parent);
            for entry in fs::read_dir(self.disk.at(&directory))? {
                let name = entry?.file_name();
                let path = directory.join(&name);
                let meta = self.disk.meta(&path)?;
                let number = self.disk.number(&path)?.filter(|ino| {
                    // A copy of a file that took the attribute along is another file.
                    seen.get(ino).is_none_or(|other| *other == meta.ino()) && *ino != Ino::ROOT
                });
                let Some(ino) = number else {
                    unnumbered.push((parent, name));
                    continue;
                };
                if seen.insert(ino, meta.ino()).is_none() {
                    self.tree.add(ino, meta.is_dir());
                    if meta.is_dir() {
                        todo.push(ino);
                    }
                }
                self.next = self.next.max(ino.0 + 1);
                self.tree.link(parent, &name, ino);
            }
        }
        self.number_new(unnumbered)
    }

    fn number_new(&mut self, mut todo: Vec<(Ino, OsString)>) -> io::Result<()> {
        let mut given: HashMap<u64, Ino> = HashMap::new();
        while let Some((parent, name)) = todo.pop() {
            let path = self.tree.path(parent).join(&name);
            let meta = self.disk.meta(&path)?;
            if let Some(&ino) = given.get(&meta.ino()) {
                self.tree.link(parent, &name, ino);
                continue;
            }
            let ino = Ino(self.next);
            self.next += 1;
            self.disk.mark(&path, ino)?;
            given.insert(meta.ino(), ino);
            self.tree.add(ino, meta.is_dir());
            self.tree.link(parent, &name, ino);
            if meta.is_dir() {
                for entry in fs::read_dir(self.disk.at(&path))? {
                    todo.push((ino, entry?.file_name()));
                }
            }
        }
        Ok(())
    }

    /// Refuses to read more than there is room for, before any of it is in memory.
    fn check_room(&self, room: u64) -> Result<(), VolumeError> {
        // Holes are looked for only where that can make a difference.
        if self.dirty.bytes() <= room {
            return Ok(());
        }
        let mut bytes = 0;
        for (&ino, ranges) in self.dirty.nodes.iter().filter(|(_, r)| !r.is_empty()) {
            let Ok(file) = self.disk.open(&self.tree.path(ino), false) else { continue };
            bytes += data(&file, ranges).map_err(self.disk.failed("looking for holes"))?;
        }
        match bytes <= room {
            true => Ok(()),
            false => {
                let root = self.disk.root().to_owned();
                Err(VolumeError::TooMuch { root, bytes, most: room })
            }
        }
    }

    fn write_down(&self, dirty: &Dirty, out: &mut Vec<u8>) -> Result<(), VolumeError> {
        for (&ino, ranges) in &dirty.nodes {
            if !self.tree.known.contains_key(&ino) {
                continue;
            }
            let path = self.tree.path(ino);
            let mut read = || -> io::Result<Record> {
                if !ranges.is_empty()
                    && let Ok(file) = self.disk.open(&path, false)
                {
                    contents(ino, &file, ranges, &mut *out)?;
                }
                Ok(Record::Node(Box::new(self.disk.node(&path, ino)?)))
            };
            let node = read().map_err(self.disk.failed(format!("reading {}", path.display())))?;
            node.encode(out);
        }
        for (parent, name) in &dirty.entries {
            let target = self.tree.get(*parent, name);
            Record::Entry { parent: *parent, name: name.clone(), target }.encode(out);
        }
        for ino in &dirty.gone {
            Record::Gone(*ino).encode(out);
        }
        Ok(())
    }
}

/// Where data begins, from there on; beyond all files if there is nothing but a hole up to the end.
fn next_data(file: &File, at: u64) -> io::Result<u64> {
    match lseek64(file, at as i64, Whence::SeekData) {
        Ok(n) => Ok(n as u64),
        Err(nix::Error::ENXIO) => Ok(u64::MAX),
        Err(e) => Err(e.into()),
    }
}

/// How much of these ranges of a file is data, and no hole.
fn data(file: &File, ranges: &Ranges) -> io::Result<u64> {
    let mut bytes = 0;
    for (start, end) in ranges.iter() {
        let mut at = start;
        while at < end {
            let begin = next_data(file, at)?;
            if begin >= end {
                break;
            }
            let stop = lseek64(file, begin as i64, Whence::SeekHole)? as u64;
            bytes += stop.min(end) - begin;
            at = stop;
        }
    }
    Ok(bytes)
}

/// What is in these ranges of a file now, as far as it reaches; gives its size.
fn contents(ino: Ino, file: &File, ranges: &Ranges, out: &mut Vec<u8>) -> io::Result<u64> {
    let size = file.metadata()?.len();
    for (start, end) in ranges.iter() {
        let end = end.min(size);
        let mut at = start;
        while at < end {
            let data = next_data(file, at)?.min(end);
            if data > at {
                let len = data - at;
                Record::Hole { ino, offset: at, len }.encode(out);
                at += len;
                continue;
            }
            match read_data(ino, file, at, end.min(at + PIECE), out)? {
                0 => break,
                n => at += n,
            }
        }
    }
    Ok(size)
}

/// What is in this range of a file now; gives how much of it there is.
fn read_data(ino: Ino, file: &File, at: u64, end: u64, out: &mut Vec<u8>) -> io::Result<u64> {
    let mut bytes = vec![0; (end - at) as usize];
    let n = file.read_at(&mut bytes, at)?;
    if n > 0 {
        bytes.truncate(n);
        Record::Data { ino, offset: at, bytes: Blob(bytes) }.encode(out);
    }
    Ok(n as u64)
}

/// A part of a file that is all data, or all hole.
struct Part {
    start: u64,
    end: u64,
    is_hole: bool,
}

/// The first part of these ranges from this offset on that the file reaches; of data at most `room` bytes.
fn next_part(file: &File, ranges: &Ranges, from: u64, room: u64) -> io::Result<Option<Part>> {
    let size = file.metadata()?.len();
    let Some((start, end)) = ranges.from(from).filter(|(start, _)| *start < size) else {
        return Ok(None);
    };
    let end = end.min(size);
    let data = next_data(file, start)?.min(end);
    if data > start {
        return Ok(Some(Part { start, end: data, is_hole: true }));
    }
    Ok(Some(Part { start, end: end.min(start + room), is_hole: false }))
}
