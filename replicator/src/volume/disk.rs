//! A volume's directory on the disk: one function a change, by path under the volume's root.

use super::record::Node;
use super::{Ino, VolumeError};
use crate::sys::{SysError, xattr};
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
};
use std::path::{Path, PathBuf};

/// Where a file's number is kept.
const ID: &str = "trusted.nilicon.id";

/// A point in time: seconds since 1970 and nanoseconds.
pub type Time = (i64, i64);

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the kinds of inode(7)")]
pub enum Shape {
    File,
    Directory,
    Symlink(OsString),
    Fifo,
    Socket,
    Character(u64),
    Block(u64),
}

/// What can be set of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size of a regular file; 0 of another.
    pub size: u64,
    /// When it was last read, as far as that is kept.
    pub atime: Time,
    /// When it was last written to.
    pub mtime: Time,
}

/// The directory of one volume.
#[derive(Debug)]
pub(super) struct Disk {
    root: PathBuf,
}

#[cfg(test)]
thread_local! {
    /// Changes that are made before the process is killed.
    pub(super) static LEFT: std::cell::Cell<i64> = const { std::cell::Cell::new(i64::MAX) };
}

fn errno(e: nix::Error) -> io::Error {
    e.into()
}

fn source(e: SysError) -> io::Error {
    e.source
}

/// Called before each change; in tests the point where the process is killed.
#[cfg(not(test))]
pub(super) fn step() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(super) fn step() -> io::Result<()> {
    LEFT.set(LEFT.get() - 1);
    if LEFT.get() < 0 { Err(io::Error::other("killed")) } else { Ok(()) }
}

/// Whether a test has killed the process.
pub(super) fn is_dead() -> bool {
    #[cfg(test)]
    return LEFT.get() < 0;
    #[cfg(not(test))]
    false
}

impl Disk {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    /// Gives an error its place.
    pub(super) fn failed<T: Into<String>>(
        &self,
        doing: T,
    ) -> impl FnOnce(io::Error) -> VolumeError + use<T> {
        let (root, doing) = (self.root.clone(), doing.into());
        move |source| VolumeError::Io { root, doing, source }
    }

    /// Makes a file that is not there yet and gives it its number.
    pub(super) fn make(&self, path: &Path, ino: Ino, shape: &Shape, mode: u32) -> io::Result<()> {
        step()?;
        let full = self.at(path);
        let device = |kind, device: u64| {
            mknod(&full, kind, Mode::from_bits_truncate(mode), device).map_err(errno)
        };
        match shape {
            Shape::File => {
                OpenOptions::new().write(true).create_new(true).mode(mode).open(&full).map(drop)?;
            }
            Shape::Directory => fs::DirBuilder::new().mode(mode).create(&full)?,
            Shape::Symlink(target) => symlink(target, &full)?,
            Shape::Fifo => device(SFlag::S_IFIFO, 0)?,
            Shape::Socket => device(SFlag::S_IFSOCK, 0)?,
            Shape::Character(number) => device(SFlag::S_IFCHR, *number)?,
            Shape::Block(number) => device(SFlag::S_IFBLK, *number)?,
        }
        self.mark(path, ino).inspect_err(|_| {
            // One that has no number is none of ours.
            if !is_dead() {
                let is_directory = *shape == Shape::Directory;
                let _ = if is_directory { fs::remove_dir(&full) } else { fs::remove_file(&full) };
            }
        })
    }

    /// Writes a file's number on it.
    pub(super) fn mark(&self, path: &Path, ino: Ino) -> io::Result<()> {
        step()?;
        xattr::set(&self.at(path), OsStr::new(ID), &ino.0.to_le_bytes(), 0).map_err(source)
    }

    /// The number on a file.
    pub(super) fn number(&self, path: &Path) -> io::Result<Option<Ino>> {
        match xattr::get(&self.at(path), OsStr::new(ID)) {
            Ok(bytes) => Ok(bytes.try_into().ok().map(|b| Ino(u64::from_le_bytes(b)))),
            Err(e) if e.code() == libc::ENODATA => Ok(None),
            Err(e) => Err(source(e)),
        }
    }

    pub(super) fn meta(&self, path: &Path) -> io::Result<Metadata> {
        fs::symlink_metadata(self.at(path))
    }

    /// Everything but names and contents.
    pub(super) fn node(&self, path: &Path, ino: Ino) -> io::Result<Node> {
        let meta = self.meta(path)?;
        let kind = meta.file_type();
        let shape = if kind.is_file() {
            Shape::File
        } else if kind.is_dir() {
            Shape::Directory
        } else if kind.is_symlink() {
            Shape::Symlink(fs::read_link(self.at(path))?.into_os_string())
        } else if kind.is_fifo() {
            Shape::Fifo
        } else if kind.is_socket() {
            Shape::Socket
        } else if kind.is_char_device() {
            Shape::Character(meta.rdev())
        } else {
            Shape::Block(meta.rdev())
        };
        let size = if kind.is_file() { meta.size() } else { 0 };
        let attributes = Attributes {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            size,
            atime: (meta.atime(), meta.atime_nsec()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
        };
        let mut xattrs = Vec::new();
        for name in self.xattrs(path)? {
            let value = xattr::get(&self.at(path), &name).map_err(source)?;
            xattrs.push((name, value));
        }
        Ok(Node { ino, shape, attributes, xattrs })
    }

    /// Names of the attributes that are not ours, in order.
    pub(super) fn xattrs(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let mut names = xattr::list(&self.at(path)).map_err(source)?;
        names.retain(|n| n != ID);
        names.sort();
        Ok(names)
    }

    pub(super) fn get_xattr(&self, path: &Path, name: &OsStr) -> io::Result<Vec<u8>> {
        if name == ID {
            return Err(io::Error::from_raw_os_error(libc::ENODATA));
        }
        xattr::get(&self.at(path), name).map_err(source)
    }

    pub(super) fn set_xattr(
        &self,
        path: &Path,
        name: &OsStr,
        value: &[u8],
        flags: i32,
    ) -> io::Result<()> {
        if name == ID {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        step()?;
        xattr::set(&self.at(path), name, value, flags).map_err(source)
    }

    pub(super) fn remove_xattr(&self, path: &Path, name: &OsStr) -> io::Result<()> {
        if name == ID {
            return Err(io::Error::from_raw_os_error(libc::ENODATA));
        }
        step()?;
        xattr::remove(&self.at(path), name).map_err(source)
    }

    /// Makes a file what the node says, its contents excepted.
    pub(super) fn dress(&self, path: &Path, node: &Node) -> io::Result<()> {
        let a = &node.attributes;
        self.owner(path, Some(a.uid), Some(a.gid))?;
        for name in self.xattrs(path)? {
            if !node.xattrs.iter().any(|(n, _)| *n == name) {
                self.remove_xattr(path, &name)?;
            }
        }
        for (name, value) in &node.xattrs {
            self.set_xattr(path, name, value, 0)?;
        }
        if !matches!(node.shape, Shape::Symlink(_)) {
            self.mode(path, a.mode)?;
        }
        self.times(path, Some(a.atime), Some(a.mtime))
    }

    pub(super) fn owner(&self, path: &Path, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        step()?;
        lchown(self.at(path), uid, gid)
    }

    pub(super) fn mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        step()?;
        fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode))
    }

    pub(super) fn times(
        &self,
        path: &Path,
        atime: Option<Time>,
        mtime: Option<Time>,
    ) -> io::Result<()> {
        step()?;
        let spec = |t: Option<Time>| t.map_or(TimeSpec::UTIME_OMIT, |(s, n)| TimeSpec::new(s, n));
        let flags = UtimensatFlags::NoFollowSymlink;
        utimensat(AT_FDCWD, &self.at(path), &spec(atime), &spec(mtime), flags).map_err(errno)
    }

    pub(super) fn resize(&self, path: &Path, size: u64) -> io::Result<()> {
        let file = self.open(path, true)?;
        step()?;
        file.set_len(size)
    }

    /// Opens a regular file. Of anything else an open could wait for ever, or reach a device of
    /// this host.
    pub(super) fn open(&self, path: &Path, write: bool) -> io::Result<File> {
        if !self.meta(path)?.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(write).custom_flags(libc::O_NOFOLLOW | libc::O_NOATIME);
        options.open(self.at(path))
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        step()?;
        fs::rename(self.at(from), self.at(to))
    }

    pub(super) fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        step()?;
        let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
        nix::fcntl::renameat2(AT_FDCWD, &self.at(a), AT_FDCWD, &self.at(b), flags).map_err(errno)
    }

    pub(super) fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        step()?;
        fs::hard_link(self.at(from), self.at(to))
    }

    /// Removes a file or an empty directory.
    pub(super) fn remove(&self, path: &Path, is_directory: bool) -> io::Result<()> {
        step()?;
        let full = self.at(path);
        if is_directory { fs::remove_dir(full) } else { fs::remove_file(full) }
    }

    /// Removes everything in a directory of the volume's root, and makes it again.
    pub(super) fn wipe(&self, path: &Path) -> io::Result<()> {
        step()?;
        match fs::remove_dir_all(self.at(path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        step()?;
        fs::create_dir(self.at(path))
    }
}
