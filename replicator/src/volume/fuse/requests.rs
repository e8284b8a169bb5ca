//! What the kernel asks of a volume, request by request. Permissions, locks, the sticky bit and
//! all caching are the kernel's part (`default_permissions`); here is what becomes of the rest.
//!
//! The kernel counts what it was told of: each answer with a file in it counts once, and
//! [`Volume::forget`] takes back. While the count is above zero, a file without a name stays.

use super::Fsync;
use super::answers::{
    FOREVER, attr, attributes, done, entry, ino, nothing_there, time, value, without_privileges,
};
use super::files::Files;
use super::listings::Listings;
use crate::volume::live::DEFAULT_ACL;
use crate::volume::{Change, Found, Ino, Opened, Shape, Volume};
use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// Bytes in one request at most.
const LARGEST: u32 = 1 << 20;

/// Bytes of a name at most: the kernel's FUSE takes longer ones, and no disk does.
const NAME_MAX: usize = 255;

/// Answers requests for one volume.
#[derive(Debug)]
pub(super) struct Requests {
    volume: Arc<Volume>,
    fsync: Fsync,
    files: Files,
    listings: Listings,
}

impl Requests {
    pub(super) fn new(volume: Arc<Volume>, fsync: Fsync) -> Self {
        let listings = Listings::of(&volume);
        Self { volume, fsync, files: Files::default(), listings }
    }

    fn file(&self, ino: Ino) -> io::Result<Opened> {
        self.files.get(&self.volume, ino)
    }

    /// What of a mode the umask leaves. An access list for new files takes its place.
    fn masked(&self, parent: Ino, mode: u32, umask: u32) -> u32 {
        match self.volume.get_xattr(parent, OsStr::new(DEFAULT_ACL)) {
            Ok(_) => mode,
            Err(_) => mode & !umask,
        }
    }

    fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        shape: &Shape,
        mode: u32,
        umask: u32,
    ) -> io::Result<Found> {
        let mode = self.masked(ino(parent), mode, umask);
        self.volume.make(ino(parent), name, shape, mode, (req.uid(), req.gid()), true)
    }

    fn sync(&self, result: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match self.fsync {
            // Whoever is outside hears of it when the epoch that holds the data is committed.
            Fsync::Commit => Ok(()),
            Fsync::Local => result(),
        }
    }
}

impl Filesystem for Requests {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(LARGEST);
        let _ = config.set_max_readahead(LARGEST);
        let _ = config.set_max_background(64);
        // KILLPRIV_V2: without it each write is preceded by a question for capabilities.
        // EXPORT_SUPPORT: files are found by number. The rest: fewer questions.
        let needed = InitFlags::FUSE_HANDLE_KILLPRIV_V2 | InitFlags::FUSE_EXPORT_SUPPORT;
        config.add_capabilities(needed).map_err(|missing| {
            io::Error::other(format!("the kernel's FUSE has no {missing:?} (kernel 5.11 has)"))
        })?;
        for wanted in [
            InitFlags::FUSE_POSIX_ACL | InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name.len() > NAME_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        // These two are asked for when a file is opened by its number.
        let result = match name.as_encoded_bytes() {
            b"." => self.volume.by_number(ino(parent), true),
            b".." => self.volume.by_number(self.volume.parent(ino(parent)), true),
            _ => self.volume.lookup(ino(parent), name, true),
        };
        match result {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => nothing_there(reply),
            other => entry(reply, other),
        }
    }

    fn forget(&self, _req: &Request, node: INodeNo, times: u64) {
        self.files.close(ino(node));
        if let Err(e) = self.volume.forget(ino(node), times) {
            tracing::warn!(ino = node.0, "a file that nobody has any more stays: {e}");
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        attr(reply, self.volume.stat(ino(node)));
    }

    fn setattr(
        &self,
        req: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, mtime) = (atime.map(time), mtime.map(time));
        let mode = mode.map(|m| m & 0o7777);
        let mut change = Change { mode, uid, gid, size, atime, mtime };
        let result = (|| {
            if size.is_some() && mode.is_none() && req.uid() != 0 {
                change.mode = without_privileges(self.volume.stat(ino(node))?.meta.mode());
            }
            self.volume.change(ino(node), &change)
        })();
        attr(reply, result);
    }

    fn readlink(&self, _req: &Request, node: INodeNo, reply: ReplyData) {
        match self.volume.read_link(ino(node)) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(e) => reply.error(e.into()),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let shape = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => Shape::File,
            libc::S_IFIFO => Shape::Fifo,
            libc::S_IFSOCK => Shape::Socket,
            libc::S_IFCHR => Shape::Character(device.into()),
            libc::S_IFBLK => Shape::Block(device.into()),
            _ => return reply.error(Errno::EINVAL),
        };
        entry(reply, self.make(req, parent, name, &shape, mode, umask));
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        entry(reply, self.make(req, parent, name, &Shape::Directory, mode, umask));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.volume.unlink(ino(parent), name, false));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.volume.unlink(ino(parent), name, true));
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let shape = Shape::Symlink(target.as_os_str().to_owned());
        entry(reply, self.make(req, parent, name, &shape, 0o777, 0));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (ino(parent), ino(new_parent));
        done(reply, self.volume.rename(from, name, to, new_name, flags.bits()));
    }

    fn link(&self, _: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.volume.link(ino(node), ino(parent), name, true));
    }

    /// The kernel takes this for an answer to all later ones: nobody need know who has a file open.
    fn open(&self, _req: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    /// The same of files that are made and opened at once: they are made, by [`Filesystem::mknod`].
    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// And of what is closed.
    fn flush(
        &self,
        _req: &Request,
        _node: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn read(
        &self,
        _req: &Request,
        node: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        match self.file(ino(node)).and_then(|opened| opened.read(offset, &mut buffer)) {
            Ok(n) => reply.data(&buffer[..n]),
            Err(e) => reply.error(e.into()),
        }
    }

    fn write(
        &self,
        _req: &Request,
        node: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let result = (|| {
            let written = self.volume.write(&self.file(ino(node))?, offset, data)?;
            if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
                let mode = without_privileges(self.volume.stat(ino(node))?.meta.mode());
                if mode.is_some() {
                    self.volume.change(ino(node), &Change { mode, ..Change::default() })?;
                }
            }
            // Pages that are written back are within the file, and are all written or not.
            if written < data.len() && write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            Ok(written)
        })();
        match result {
            Ok(written) => reply.written(written as u32),
            Err(e) => reply.error(e.into()),
        }
    }

    fn fsync(&self, _: &Request, node: INodeNo, _: FileHandle, data: bool, reply: ReplyEmpty) {
        done(reply, self.sync(|| self.file(ino(node))?.sync(data)));
    }

    fn opendir(&self, _req: &Request, _node: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(self.listings.next()), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _req: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.listings.list(ino(node), fh.0, offset, false, |name, next, found| {
            let kind = FileType::from_std(found.meta.file_type());
            let kind = kind.unwrap_or(FileType::RegularFile);
            reply.add(INodeNo(found.ino.0), next, kind, name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e.into()),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.listings.list(ino(node), fh.0, offset, true, |name, next, found| {
            let attr = attributes(found);
            reply.add(attr.ino, next, name, &FOREVER, &attr, Generation(0))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e.into()),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _node: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings.close(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, node: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(reply, self.sync(|| self.volume.sync_directory(ino(node))));
    }

    fn statfs(&self, _req: &Request, _node: INodeNo, reply: ReplyStatfs) {
        match self.volume.room() {
            Ok(s) => reply.statfs(
                s.blocks(),
                s.blocks_free(),
                s.blocks_available(),
                s.files(),
                s.files_free(),
                s.block_size() as u32,
                s.name_max() as u32,
                s.fragment_size() as u32,
            ),
            Err(e) => reply.error(e.into()),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        done(reply, self.volume.set_xattr(ino(node), name, value, flags));
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        value(reply, size, self.volume.get_xattr(ino(node), name));
    }

    fn listxattr(&self, _req: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.volume.list_xattrs(ino(node)).map(|names| {
            let ended = |n: OsString| [n.as_encoded_bytes(), b"\0"].concat();
            names.into_iter().flat_map(ended).collect::<Vec<u8>>()
        });
        value(reply, size, names);
    }

    fn removexattr(&self, _req: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.volume.remove_xattr(ino(node), name));
    }

    fn access(&self, _req: &Request, _node: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _req: &Request,
        node: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let opened = self.file(ino(node));
        done(reply, opened.and_then(|o| self.volume.allocate(&o, offset, length, mode)));
    }

    fn lseek(
        &self,
        _req: &Request,
        node: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.file(ino(node)).and_then(|opened| opened.seek(offset, whence)) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(e.into()),
        }
    }
}
