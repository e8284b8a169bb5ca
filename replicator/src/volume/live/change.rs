//! What a file system can be asked: each change is made on the disk, in the names, and noted.

use super::super::disk::{Shape, Time, step};
use super::super::record::Node;
use super::{Inner, Opened, Volume};
use crate::volume::Ino;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::{Statvfs, statvfs};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that was found.
#[derive(Debug)]
pub struct Found {
    /// Its number.
    pub ino: Ino,
    /// What stat(2) says of it on the host's file system.
    pub meta: Metadata,
    /// Its names.
    pub links: u32,
}

/// What is to be changed of a file's attributes.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "as in Attributes")]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

/// Where the access list is kept that new files of a directory get.
pub(in crate::volume) const DEFAULT_ACL: &str = "system.posix_acl_default";

fn code<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

fn loose(ino: Ino) -> PathBuf {
    Path::new("loose").join(ino.to_string())
}

impl Volume {
    /// The file of this name in a directory. With `remember` it is not forgotten before
    /// [`Volume::forget`].
    pub fn lookup(&self, parent: Ino, name: &OsStr, remember: bool) -> io::Result<Found> {
        let mut inner = self.inner();
        let Some(ino) = inner.tree.get(parent, name) else { return code(libc::ENOENT) };
        inner.found(ino, remember)
    }

    /// The file with this number, whether it has a name or not.
    pub fn by_number(&self, ino: Ino, remember: bool) -> io::Result<Found> {
        self.inner().found(ino, remember)
    }

    /// The kernel has forgotten a file that it was told of `times` times.
    pub fn forget(&self, ino: Ino, times: u64) -> io::Result<()> {
        let mut inner = self.inner();
        if let Some(known) = inner.tree.known.get_mut(&ino) {
            known.lookups = known.lookups.saturating_sub(times);
            return inner.drop_unused(ino);
        }
        Ok(())
    }

    /// There is no kernel any more that knows any of the files. Those without a name stay until
    /// [`Volume::sweep`].
    pub fn forget_all(&self) {
        self.inner().tree.known.values_mut().for_each(|known| known.lookups = 0);
    }

    /// Removes files that have no name and that nobody has open.
    pub fn sweep(&self) -> io::Result<()> {
        let mut inner = self.inner();
        let all: Vec<Ino> = inner.tree.known.keys().copied().collect();
        all.into_iter().try_for_each(|ino| inner.drop_unused(ino))
    }

    /// What stat(2) says of a file.
    pub fn stat(&self, ino: Ino) -> io::Result<Found> {
        self.inner().found(ino, false)
    }

    /// The regular file at this path from the volume's root.
    pub fn file_at(&self, path: &Path) -> Option<Ino> {
        let inner = self.inner();
        let ino = inner.tree.at(path)?;
        inner.disk.meta(&inner.tree.path(ino)).is_ok_and(|m| m.is_file()).then_some(ino)
    }

    /// If this file, or a directory that it may be in, loses a name later, [`Volume::take_moved`] says so.
    pub fn note(&self, ino: Ino) {
        self.inner().tree.noted.insert(ino);
    }

    /// Whether a file that was noted has lost a name since this was asked last.
    pub fn take_moved(&self) -> bool {
        std::mem::take(&mut self.inner().tree.moved)
    }

    /// Everything of a file but its names and contents.
    pub fn node(&self, ino: Ino) -> io::Result<Node> {
        let inner = self.inner();
        inner.disk.node(&inner.known_path(ino)?, ino)
    }

    /// Where a symbolic link leads.
    pub fn read_link(&self, ino: Ino) -> io::Result<OsString> {
        match self.node(ino)?.shape {
            Shape::Symlink(target) => Ok(target),
            _ => code(libc::EINVAL),
        }
    }

    /// Makes a file. `owner`: user and group.
    pub fn make(
        &self,
        parent: Ino,
        name: &OsStr,
        shape: &Shape,
        mode: u32,
        owner: (u32, u32),
        remember: bool,
    ) -> io::Result<Found> {
        self.inner().make(parent, name, shape, mode, owner, remember)
    }

    /// Gives a file another name.
    pub fn link(&self, ino: Ino, parent: Ino, name: &OsStr, remember: bool) -> io::Result<Found> {
        let mut inner = self.inner();
        let from = inner.known_path(ino)?;
        if inner.tree.children(ino).is_some() {
            return code(libc::EPERM);
        }
        if inner.tree.links(ino) == 0 {
            return code(libc::ENOENT);
        }
        let to = inner.new_path(parent, name)?;
        inner.disk.link(&from, &to)?;
        inner.tree.link(parent, name, ino);
        inner.dirty.entry(parent, name);
        inner.dirty.node(ino);
        inner.found(ino, remember)
    }

    /// Takes a name away, of a file or (`directory`) of an empty directory.
    pub fn unlink(&self, parent: Ino, name: &OsStr, directory: bool) -> io::Result<()> {
        let mut inner = self.inner();
        let Some(ino) = inner.tree.get(parent, name) else { return code(libc::ENOENT) };
        match (inner.tree.children(ino), directory) {
            (Some(_), false) => return code(libc::EISDIR),
            (None, true) => return code(libc::ENOTDIR),
            (Some(children), true) if !children.is_empty() => return code(libc::ENOTEMPTY),
            _ => {}
        }
        inner.take_name(parent, name, ino)?;
        inner.drop_unused(ino)
    }

    /// renameat2(2) with RENAME_NOREPLACE (1), RENAME_EXCHANGE (2) or RENAME_WHITEOUT (4, also with 1) in
    /// `flags`.
    pub fn rename(
        &self,
        parent: Ino,
        name: &OsStr,
        new_parent: Ino,
        new_name: &OsStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner().rename((parent, name), (new_parent, new_name), flags)
    }

    /// Changes attributes; the size of a regular file is one.
    pub fn change(&self, ino: Ino, change: &Change) -> io::Result<Found> {
        let mut inner = self.inner();
        let path = inner.known_path(ino)?;
        if let Some(size) = change.size {
            if inner.tree.children(ino).is_some() {
                return code(libc::EISDIR);
            }
            let old = inner.disk.meta(&path)?.size();
            inner.disk.resize(&path, size)?;
            // What was cut off reads as zeros if the file grows again.
            inner.dirty.range(ino, size, old);
        }
        inner.dirty.node(ino);
        if change.uid.is_some() || change.gid.is_some() {
            inner.disk.owner(&path, change.uid, change.gid)?;
        }
        if let Some(mode) = change.mode {
            inner.disk.mode(&path, mode)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            inner.disk.times(&path, change.atime, change.mtime)?;
        }
        inner.found(ino, false)
    }

    /// Opens a regular file.
    pub fn open_file(&self, ino: Ino) -> io::Result<Opened> {
        let inner = self.inner();
        let path = inner.known_path(ino)?;
        let file = Arc::new(inner.disk.open(&path, true)?);
        Ok(Opened { ino, file })
    }

    /// Writes to an open file; gives how much, which is less than all where the disk has become full.
    pub fn write(&self, opened: &Opened, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.inner();
        // Noted first: a write that fails halfway has changed something as well.
        inner.dirty.range(opened.ino, offset, offset + bytes.len() as u64);
        step()?;
        let mut written = 0;
        while written < bytes.len() {
            match opened.file.write_at(&bytes[written..], offset + written as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(more) => written += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if written == 0 => return Err(e),
                // Told as an error, the kernel would not learn that the file has grown.
                Err(_) => break,
            }
        }
        Ok(written)
    }

    /// fallocate(2): plain, KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE.
    pub fn allocate(&self, opened: &Opened, offset: u64, len: u64, mode: i32) -> io::Result<()> {
        let known =
            libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !known != 0 {
            return code(libc::EOPNOTSUPP);
        }
        let mut inner = self.inner();
        let changes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        inner.dirty.range(opened.ino, offset, if changes { offset + len } else { offset });
        inner.dirty.node(opened.ino);
        step()?;
        let flags = FallocateFlags::from_bits_truncate(mode);
        fallocate(&*opened.file, flags, offset as i64, len as i64).map_err(io::Error::from)
    }

    /// The entries of a directory in order of name.
    pub fn entries(&self, ino: Ino) -> io::Result<Vec<(OsString, Found)>> {
        let mut inner = self.inner();
        let Some(children) = inner.tree.children(ino) else { return code(libc::ENOTDIR) };
        let all: Vec<_> = children.iter().map(|(n, i)| (n.clone(), *i)).collect();
        all.into_iter().map(|(name, ino)| Ok((name, inner.found(ino, false)?))).collect()
    }

    /// The names in a directory, in order.
    pub fn names_in(&self, ino: Ino) -> io::Result<Vec<OsString>> {
        match self.inner().tree.children(ino) {
            Some(children) => Ok(children.keys().cloned().collect()),
            None => code(libc::ENOTDIR),
        }
    }

    /// Has the disk write a directory.
    pub fn sync_directory(&self, ino: Ino) -> io::Result<()> {
        let path = {
            let inner = self.inner();
            inner.disk.at(&inner.known_path(ino)?)
        };
        File::open(path)?.sync_all()
    }

    /// How much room the disk has.
    pub fn room(&self) -> io::Result<Statvfs> {
        statvfs(&self.root()).map_err(io::Error::from)
    }

    /// The directory that a directory is in; itself for the root and for one that was removed.
    pub fn parent(&self, ino: Ino) -> Ino {
        let inner = self.inner();
        let known = inner.tree.known.get(&ino);
        known.and_then(|k| k.links.first()).map_or(ino, |(parent, _)| *parent)
    }

    /// Names of extended attributes.
    pub fn list_xattrs(&self, ino: Ino) -> io::Result<Vec<OsString>> {
        let inner = self.inner();
        inner.disk.xattrs(&inner.known_path(ino)?)
    }

    /// Value of an extended attribute.
    pub fn get_xattr(&self, ino: Ino, name: &OsStr) -> io::Result<Vec<u8>> {
        let inner = self.inner();
        inner.disk.get_xattr(&inner.known_path(ino)?, name)
    }

    /// Sets an extended attribute; flags as in setxattr(2).
    pub fn set_xattr(&self, ino: Ino, name: &OsStr, value: &[u8], flags: i32) -> io::Result<()> {
        let mut inner = self.inner();
        let path = inner.known_path(ino)?;
        inner.disk.set_xattr(&path, name, value, flags)?;
        inner.dirty.node(ino);
        Ok(())
    }

    /// Takes an extended attribute away.
    pub fn remove_xattr(&self, ino: Ino, name: &OsStr) -> io::Result<()> {
        let mut inner = self.inner();
        let path = inner.known_path(ino)?;
        inner.disk.remove_xattr(&path, name)?;
        inner.dirty.node(ino);
        Ok(())
    }
}

impl Inner {
    fn known_path(&self, ino: Ino) -> io::Result<PathBuf> {
        if self.tree.known.contains_key(&ino) {
            Ok(self.tree.path(ino))
        } else {
            code(libc::ESTALE)
        }
    }

    /// The path of a name that is not there yet.
    fn new_path(&self, parent: Ino, name: &OsStr) -> io::Result<PathBuf> {
        if self.tree.children(parent).is_none() {
            return code(libc::ENOTDIR);
        }
        if parent != Ino::ROOT && self.tree.links(parent) == 0 {
            return code(libc::ENOENT);
        }
        if self.tree.get(parent, name).is_some() {
            return code(libc::EEXIST);
        }
        Ok(self.tree.path(parent).join(name))
    }

    fn found(&mut self, ino: Ino, remember: bool) -> io::Result<Found> {
        let path = self.known_path(ino)?;
        let meta = self.disk.meta(&path)?;
        let links = match self.tree.known.get_mut(&ino) {
            None => return code(libc::ESTALE),
            Some(known) => {
                known.lookups += u64::from(remember);
                match &known.children {
                    Some(_) if ino == Ino::ROOT || !known.links.is_empty() => meta.nlink() as u32,
                    _ => known.links.len() as u32,
                }
            }
        };
        Ok(Found { ino, meta, links })
    }

    fn make(
        &mut self,
        parent: Ino,
        name: &OsStr,
        shape: &Shape,
        mode: u32,
        owner: (u32, u32),
        remember: bool,
    ) -> io::Result<Found> {
        let path = self.new_path(parent, name)?;
        let above = self.disk.meta(&self.tree.path(parent))?;
        let inherits = above.mode() & libc::S_ISGID != 0;
        let (uid, gid) = if inherits { (owner.0, above.gid()) } else { owner };
        let is_directory = *shape == Shape::Directory;
        let mode = if inherits && is_directory { mode | libc::S_ISGID } else { mode };
        // A list of the directory for new files says, with the mode, what this one gets.
        let listed = !matches!(shape, Shape::Symlink(_))
            && self.disk.get_xattr(&self.tree.path(parent), OsStr::new(DEFAULT_ACL)).is_ok();
        let ino = Ino(self.next);
        self.next += 1;
        self.disk.make(&path, ino, shape, if listed { mode & 0o777 } else { 0o600 })?;
        self.tree.add(ino, is_directory);
        self.tree.link(parent, name, ino);
        self.dirty.entry(parent, name);
        self.dirty.node(ino);
        self.disk.owner(&path, Some(uid), Some(gid))?;
        if listed {
            let given = self.disk.meta(&path)?.mode() & 0o777;
            self.disk.mode(&path, given | mode & 0o7000)?;
        } else if !matches!(shape, Shape::Symlink(_)) {
            self.disk.mode(&path, mode & 0o7777)?;
        }
        self.found(ino, remember)
    }

    /// A file loses a name; one that loses its last becomes loose.
    fn take_name(&mut self, parent: Ino, name: &OsStr, ino: Ino) -> io::Result<()> {
        let path = self.tree.path(parent).join(name);
        if self.tree.links(ino) > 1 {
            self.disk.remove(&path, false)?;
        } else {
            self.disk.rename(&path, &loose(ino))?;
        }
        self.tree.unlink(parent, name);
        self.dirty.entry(parent, name);
        self.dirty.node(ino);
        Ok(())
    }

    fn drop_unused(&mut self, ino: Ino) -> io::Result<()> {
        let Some(known) = self.tree.known.get(&ino) else { return Ok(()) };
        if ino == Ino::ROOT || known.lookups > 0 || !known.links.is_empty() {
            return Ok(());
        }
        self.disk.remove(&loose(ino), known.children.is_some())?;
        self.tree.known.remove(&ino);
        self.tree.noted.remove(&ino);
        self.dirty.gone(ino);
        Ok(())
    }

    fn rename(&mut self, from: (Ino, &OsStr), to: (Ino, &OsStr), flags: u32) -> io::Result<()> {
        let Some(ino) = self.tree.get(from.0, from.1) else { return code(libc::ENOENT) };
        let old = self.tree.get(to.0, to.1);
        let (path, new_path) =
            (self.tree.path(from.0).join(from.1), self.tree.path(to.0).join(to.1));
        let is_directory = self.tree.children(ino).is_some();
        let leaves_whiteout = flags & libc::RENAME_WHITEOUT != 0;
        if leaves_whiteout && flags & libc::RENAME_EXCHANGE != 0 {
            return code(libc::EINVAL);
        }
        let flags = flags & !libc::RENAME_WHITEOUT;
        if self.tree.children(to.0).is_none() {
            return code(libc::ENOTDIR);
        }
        if to.0 != Ino::ROOT && self.tree.links(to.0) == 0 {
            return code(libc::ENOENT);
        }
        if is_directory && self.tree.is_within(to.0, ino) {
            return code(libc::EINVAL);
        }
        match (flags, old) {
            (0 | libc::RENAME_NOREPLACE, None) => {}
            (libc::RENAME_NOREPLACE, Some(_)) => return code(libc::EEXIST),
            (libc::RENAME_EXCHANGE, None) => return code(libc::ENOENT),
            (libc::RENAME_EXCHANGE, Some(old)) => {
                if self.tree.children(old).is_some() && self.tree.is_within(from.0, old) {
                    return code(libc::EINVAL);
                }
                if old == ino {
                    return Ok(());
                }
                self.disk.exchange(&path, &new_path)?;
                self.tree.unlink(from.0, from.1);
                self.tree.unlink(to.0, to.1);
                self.tree.link(to.0, to.1, ino);
                self.tree.link(from.0, from.1, old);
                self.dirty.node(old);
                self.note_renamed(from, to, ino);
                return Ok(());
            }
            (0, Some(old)) if old == ino => return Ok(()),
            (0, Some(old)) => {
                match (is_directory, self.tree.children(old)) {
                    (false, Some(_)) => return code(libc::EISDIR),
                    (true, None) => return code(libc::ENOTDIR),
                    (true, Some(children)) if !children.is_empty() => {
                        return code(libc::ENOTEMPTY);
                    }
                    _ => {}
                }
                self.take_name(to.0, to.1, old)?;
            }
            _ => return code(libc::EINVAL),
        }
        let renamed = match leaves_whiteout {
            true => self.change_places_with_whiteout(from, to, &path, &new_path).map(Some),
            false => self.disk.rename(&path, &new_path).map(|()| None),
        };
        let whiteout = match renamed {
            Ok(whiteout) => whiteout,
            Err(e) => {
                if let Some(old) = old {
                    self.give_back(to, old, &new_path)?;
                }
                return Err(e);
            }
        };
        self.tree.unlink(from.0, from.1);
        if let Some(whiteout) = whiteout {
            self.tree.unlink(to.0, to.1);
            self.tree.link(from.0, from.1, whiteout);
        }
        self.tree.link(to.0, to.1, ino);
        self.note_renamed(from, to, ino);
        match old {
            Some(old) => self.drop_unused(old),
            None => Ok(()),
        }
    }

    /// Makes what an overlay file system takes for "there is nothing", a character device 0:0, at a name that is free,
    /// and has a file change places with it. Gives the number of that device.
    fn change_places_with_whiteout(
        &mut self,
        from: (Ino, &OsStr),
        to: (Ino, &OsStr),
        path: &Path,
        new_path: &Path,
    ) -> io::Result<Ino> {
        let whiteout = self.make(to.0, to.1, &Shape::Character(0), 0, (0, 0), false)?.ino;
        if let Err(e) = self.disk.exchange(path, new_path) {
            self.take_name(to.0, to.1, whiteout)?;
            self.drop_unused(whiteout)?;
            return Err(e);
        }
        self.dirty.entry(from.0, from.1);
        Ok(whiteout)
    }

    /// A file gets the name back that it lost for one that could not take it.
    fn give_back(&mut self, at: (Ino, &OsStr), ino: Ino, path: &Path) -> io::Result<()> {
        if self.tree.links(ino) > 0 {
            self.disk.link(&self.tree.path(ino), path)?;
        } else {
            self.disk.rename(&loose(ino), path)?;
        }
        self.tree.link(at.0, at.1, ino);
        Ok(())
    }

    fn note_renamed(&mut self, from: (Ino, &OsStr), to: (Ino, &OsStr), ino: Ino) {
        self.dirty.entry(from.0, from.1);
        self.dirty.entry(to.0, to.1);
        self.dirty.node(ino);
    }
}
