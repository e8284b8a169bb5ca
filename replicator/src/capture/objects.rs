//! Memory objects: shared anonymous memory, memfds, deleted files, files that are written through
//! a mapping; and their pages.
//!
//! Stores through a mapping that is watched are seen by the scan of each process that has it.
//! Other ways to write an object are not: a mapping that came or went since the last look (its
//! process may have ended, too), and write(2) on a descriptor. An object that may have been
//! written in such a way is *suspect*, and is compared page by page with what the last checkpoints
//! said. A checkpoint has each object's pages once, whoever maps it.

use super::sysv::Segment;
use super::{CaptureError, maps};
use crate::image::object::{Attributes, Object, ObjectKind};
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::sys::pagemap::Region;
use crate::sys::{SysError, SysResult};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use xxhash_rust::xxh3::xxh3_64;

/// Pages read at a time.
const BLOCK: usize = 64;

/// Which kind of object an inode is; numbers of different kinds may be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Anonymous,
    Memfd,
    Deleted,
    /// In a tmpfs of the container's own, deleted or not.
    Tmpfs,
    /// The inode is the segment's id.
    SystemV,
    /// By its path on a file system of the host, and mapped shared.
    File,
}

/// What identifies an object while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) class: Class,
    pub(super) device: u64,
    pub(super) inode: u64,
}

#[derive(Debug)]
struct Known {
    key: Key,
    name: String,
    /// Keeps the inode, so that its number stays its own; and reads it.
    file: File,
    size: u64,
    /// For each page, what stands for the version last taken; 0: all zero.
    versions: Vec<u64>,
    dirty: Vec<(u64, u64)>,
    /// What was dirty since the last checkpoint and is copied already, and whether all was compared.
    taken: Vec<(u64, u64)>,
    compared: bool,
    suspect: bool,
    changed: (i64, i64),
    fresh: bool,
    used: bool,
    segment: Option<Segment>,
    /// For a file by path: one of its mappings, as a link in /proc.
    link: Option<String>,
}

/// All objects of a container.
#[derive(Debug, Default)]
pub(super) struct Objects {
    by_key: BTreeMap<Key, u32>,
    known: BTreeMap<u32, Known>,
    next: u32,
    systems: maps::FileSystems,
    /// A file has got another name since its mappings were read, or has none any more.
    renamed: bool,
}

impl Objects {
    /// None yet. `own` are the devices of the container's own tmpfs mounts.
    pub(super) fn new(own: &[u64]) -> Self {
        Self { systems: maps::FileSystems::new(own.to_vec()), ..Self::default() }
    }

    /// Where what is mapped can be.
    pub(super) fn systems(&self) -> &maps::FileSystems {
        &self.systems
    }

    /// The same, to be told of more.
    pub(super) fn systems_mut(&mut self) -> &mut maps::FileSystems {
        &mut self.systems
    }

    /// The next checkpoint is a full one: every object is new.
    pub(super) fn clear(&mut self) {
        self.by_key.clear();
        self.known.clear();
    }

    /// The number of the object that a mapping is a part of.
    pub(super) fn of_mapping(
        &mut self,
        pid: i32,
        vma: &maps::Vma,
        object: &maps::Object,
    ) -> Result<u32, CaptureError> {
        let (start, end) = (vma.mapping.start, vma.mapping.end);
        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        let id = self.number(object.key, &object.name, || {
            let file = File::open(&path).map_err(|e| CaptureError::proc(&path, e))?;
            let stat = stat(&file)?;
            // Another mapping may have taken its place.
            if stat.st_ino != object.key.inode {
                return Err(CaptureError::proc(
                    &path,
                    std::io::Error::from_raw_os_error(libc::ENOENT),
                ));
            }
            Ok(file)
        })?;
        if object.key.class == Class::File
            && let Some(known) = self.known.get_mut(&id)
        {
            known.name.clone_from(&object.name);
            known.link = Some(path);
        }
        Ok(id)
    }

    /// Whether mappings must be read anew because a file has another name, and forgets it.
    pub(super) fn take_renamed(&mut self) -> bool {
        std::mem::take(&mut self.renamed)
    }

    /// The number of the object that a descriptor is of, given a duplicate of it.
    pub(super) fn of_descriptor(
        &mut self,
        class: Class,
        name: &str,
        dup: OwnedFd,
    ) -> Result<u32, CaptureError> {
        use nix::sys::stat::{major, minor};
        let stat = stat(&dup)?;
        let device = major(stat.st_dev) << 32 | minor(stat.st_dev);
        let class = if self.systems.own.contains(&device) { Class::Tmpfs } else { class };
        let key = Key { class, device, inode: stat.st_ino };
        self.number(key, name, || {
            // A duplicate would share the offset, and keep seals and the last close from working.
            use std::os::fd::AsRawFd;
            let path = format!("/proc/self/fd/{}", dup.as_raw_fd());
            File::open(&path).map_err(|e| CaptureError::proc(&path, e))
        })
    }

    pub(super) fn number(
        &mut self,
        key: Key,
        name: &str,
        open: impl FnOnce() -> Result<File, CaptureError>,
    ) -> Result<u32, CaptureError> {
        if let Some(id) = self.by_key.get(&key) {
            return Ok(*id);
        }
        let file = open()?;
        let id = self.next;
        self.next += 1;
        let known = Known {
            key,
            name: name.to_owned(),
            file,
            size: 0,
            versions: Vec::new(),
            dirty: Vec::new(),
            taken: Vec::new(),
            compared: false,
            suspect: true,
            changed: (0, 0),
            fresh: true,
            used: false,
            segment: None,
            link: None,
        };
        self.known.insert(id, known);
        self.by_key.insert(key, id);
        Ok(id)
    }

    /// Whether an object has a number.
    pub(super) fn knows(&self, key: Key) -> bool {
        self.by_key.contains_key(&key)
    }

    /// What the list of segments says of an object.
    pub(super) fn note_segment(&mut self, id: u32, segment: Segment) {
        if let Some(known) = self.known.get_mut(&id) {
            known.segment = Some(segment);
        }
    }

    /// For an object that is a segment, what the list says of it, if it is in the list.
    pub(super) fn segment(&self, id: u32) -> Option<Option<Segment>> {
        let known = self.known.get(&id)?;
        (known.key.class == Class::SystemV).then_some(known.segment)
    }

    /// The device of the kernel's own tmpfs.
    pub(super) fn kernel_tmpfs(&self) -> u64 {
        maps::kernel_tmpfs().unwrap_or(u64::MAX)
    }

    /// The object may have been written unseen.
    pub(super) fn suspect(&mut self, id: u32) {
        if let Some(known) = self.known.get_mut(&id) {
            known.suspect = true;
        }
    }

    /// What a process can map that has not inherited it may have been written unseen: all but shared
    /// anonymous memory, which has no name.
    pub(super) fn suspect_named(&mut self) {
        let named = |known: &&mut Known| known.key.class != Class::Anonymous;
        self.known.values_mut().filter(named).for_each(|known| known.suspect = true);
    }

    /// Any object may have been written unseen.
    pub(super) fn suspect_all(&mut self) {
        self.known.values_mut().for_each(|k| k.suspect = true);
    }

    /// Pages that were written through a mapping: `offset` is that of the address `base`.
    pub(super) fn written(&mut self, id: u32, base: u64, offset: u64, regions: &[Region]) {
        if let Some(known) = self.known.get_mut(&id) {
            let range = |r: &Region| (r.start - base + offset, r.end - base + offset);
            known.dirty.extend(regions.iter().map(range));
        }
    }

    /// What was copied since the last checkpoint may have been written since, unseen.
    pub(super) fn take_again(&mut self) {
        for known in self.known.values_mut() {
            known.suspect |= known.compared;
            known.dirty.append(&mut known.taken);
        }
    }

    /// What was copied so far is right.
    pub(super) fn settle(&mut self) {
        for known in self.known.values_mut() {
            known.compared = false;
            known.taken.clear();
        }
    }

    /// Copies what was written since the last look.
    pub(super) fn copy(&mut self, pages: &mut PageSet) -> Result<(), CaptureError> {
        for (id, known) in &mut self.known {
            self.renamed |= known.copy(*id, pages)?;
        }
        Ok(())
    }

    /// The objects that mappings and descriptors of this checkpoint refer to.
    pub(super) fn take(&mut self, used: impl Iterator<Item = u32>) -> SysResult<Vec<Object>> {
        if self.known.is_empty() {
            return Ok(Vec::new());
        }
        for id in used {
            if let Some(known) = self.known.get_mut(&id) {
                known.used = true;
            }
        }
        let mut all = Vec::new();
        for (id, known) in &mut self.known {
            if std::mem::take(&mut known.used) {
                all.push(known.describe(*id)?);
            }
        }
        Ok(all)
    }

    /// The checkpoint with these objects is whole.
    pub(super) fn finish(&mut self, taken: impl Iterator<Item = u32> + Clone) {
        self.settle();
        self.known.retain(|id, known| {
            known.fresh = false;
            taken.clone().any(|taken| taken == *id)
        });
        self.by_key.retain(|_, id| self.known.contains_key(id));
    }
}

impl Known {
    /// Says whether it is a file that has another name now.
    fn copy(&mut self, id: u32, pages: &mut PageSet) -> Result<bool, CaptureError> {
        let mut renamed = false;
        // Shared anonymous memory has no name by which it could be written but its mappings.
        if self.key.class != Class::Anonymous || self.suspect {
            let stat = stat(&self.file)?;
            let changed = (stat.st_ctime, stat.st_ctime_nsec);
            if changed != self.changed {
                self.suspect = true;
                renamed = self.is_renamed();
            }
            self.changed = changed;
            self.size = stat.st_size as u64;
        }
        self.copy_pages(id, pages)?;
        Ok(renamed)
    }

    /// Whether the link to its mapping, if that is there still, leads to another path.
    fn is_renamed(&self) -> bool {
        let link = self.link.as_ref().and_then(|link| std::fs::read_link(link).ok());
        link.is_some_and(|now| now.as_os_str() != self.name.as_str())
    }

    fn copy_pages(&mut self, id: u32, pages: &mut PageSet) -> Result<(), CaptureError> {
        let count = self.size.div_ceil(PAGE as u64) as usize;
        if count < self.versions.len() {
            let gone = self.versions.len() - count;
            let start = (count * PAGE) as u64;
            push(pages, id, start, gone as u32, Content::Dropped);
        }
        self.versions.resize(count, 0);
        if self.suspect {
            self.dirty.clear();
            self.compare(id, pages)?;
            (self.suspect, self.compared) = (false, true);
            return Ok(());
        }
        let dirty = std::mem::take(&mut self.dirty);
        for (start, end) in &dirty {
            if let Err(e) = self.copy_range(id, *start, *end, pages) {
                self.suspect = true;
                return Err(e);
            }
        }
        self.taken.extend_from_slice(&dirty);
        self.dirty = dirty;
        self.dirty.clear();
        Ok(())
    }

    /// Takes every page that differs from what was taken last.
    fn compare(&mut self, id: u32, pages: &mut PageSet) -> Result<(), CaptureError> {
        let mut at = 0;
        while at < self.size {
            let seek = |from: u64, whence| match lseek(&self.file, from as i64, whence) {
                Ok(at) => Ok(at as u64),
                Err(nix::Error::ENXIO) => Ok(self.size),
                Err(e) => Err(SysError::errno("lseek", self.name.clone(), e as i32)),
            };
            let data = seek(at, Whence::SeekData)?;
            let hole = seek(data, Whence::SeekHole)?;
            // What was a page of data and is a hole now reads as zero.
            let (first, last) =
                (at as usize / PAGE, (data as usize / PAGE).min(self.versions.len()));
            for page in first..last {
                if std::mem::take(&mut self.versions[page]) != 0 {
                    push(pages, id, (page * PAGE) as u64, 1, Content::Dropped);
                }
            }
            self.copy_range(id, data / PAGE as u64 * PAGE as u64, hole, pages)?;
            at = hole;
        }
        Ok(())
    }

    /// Takes the pages in a range that differ from what was taken last.
    fn copy_range(
        &mut self,
        id: u32,
        start: u64,
        end: u64,
        pages: &mut PageSet,
    ) -> Result<(), CaptureError> {
        let mut block = [0; BLOCK * PAGE];
        let end = end.min(self.size);
        let mut at = start;
        while at < end {
            let wanted = (end - at).min(block.len() as u64) as usize;
            let got = self.fill(&mut block[..wanted], at)?;
            block[got..wanted.next_multiple_of(PAGE)].fill(0);
            for page in block[..wanted.next_multiple_of(PAGE)].as_chunks::<PAGE>().0 {
                let version = version(page);
                let slot = &mut self.versions[at as usize / PAGE];
                if std::mem::replace(slot, version) != version {
                    if version == 0 {
                        push(pages, id, at, 1, Content::Dropped);
                    } else {
                        let offset = pages.bytes.len();
                        pages.bytes.extend_from_slice(page);
                        push(pages, id, at, 1, Content::Data(offset));
                    }
                }
                at += PAGE as u64;
            }
        }
        Ok(())
    }

    /// Reads up to the end of the object.
    fn fill(&self, block: &mut [u8], at: u64) -> Result<usize, CaptureError> {
        let mut got = 0;
        while got < block.len() {
            let read = self.file.read_at(&mut block[got..], at + got as u64);
            match read.map_err(|e| CaptureError::proc(&self.name, e))? {
                0 => break,
                n => got += n,
            }
        }
        Ok(got)
    }

    fn describe(&self, id: u32) -> SysResult<Object> {
        let stat = stat(&self.file)?;
        let attributes =
            Attributes { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid };
        let name = self.name.clone();
        let kind = match self.key.class {
            Class::Anonymous => ObjectKind::Anonymous,
            Class::Memfd => ObjectKind::Memfd {
                name: name.trim_start_matches("/memfd:").to_owned(),
                seals: fcntl(&self.file, FcntlArg::F_GET_SEALS)
                    .map_err(|e| SysError::errno("F_GET_SEALS", name, e as i32))?
                    as u32,
                attributes,
            },
            Class::Deleted => ObjectKind::Deleted { path: name, attributes },
            Class::Tmpfs => ObjectKind::Tmpfs { path: name, attributes },
            Class::File => ObjectKind::File { path: name, attributes },
            Class::SystemV => {
                let missing = || SysError::errno("search in /proc/sysvipc/shm", name, libc::ENOENT);
                let Segment { identity, deleted, .. } = self.segment.ok_or_else(missing)?;
                ObjectKind::SystemV { identity, deleted }
            }
        };
        Ok(Object { id, kind, size: self.size, fresh: self.fresh })
    }
}

fn stat(file: impl std::os::fd::AsFd) -> SysResult<FileStat> {
    fstat(file).map_err(|e| SysError::errno("fstat", "a memory object", e as i32))
}

/// What stands for the contents of a page: 0 for zero, else a hash that is not 0.
fn version(page: &[u8; PAGE]) -> u64 {
    if page.iter().all(|b| *b == 0) { 0 } else { xxh3_64(page) | 1 }
}

/// Adds a run of an object's pages, or makes the last run longer.
fn push(pages: &mut PageSet, id: u32, start: u64, count: u32, content: Content) {
    let process = Object::owner_of(id) as u32;
    if let Some(last) = pages.runs.last_mut()
        && last.process == process
        && last.start + u64::from(last.count) * PAGE as u64 == start
    {
        let follows = match (last.content, content) {
            (Content::Data(from), Content::Data(at)) => from + last.count as usize * PAGE == at,
            (Content::Dropped, Content::Dropped) => true,
            _ => false,
        };
        if follows {
            last.count += count;
            return;
        }
    }
    pages.runs.push(Run { process, start, count, content });
}
