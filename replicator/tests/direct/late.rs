//! A file system whose answers come when the test says so.

use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen,
    Request, SessionACL,
};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

const PAGE: u64 = 4096;
const BLOCKS: u64 = 1024;
/// A file, and one that is read past the page cache however it was opened.
const FILE: INodeNo = INodeNo(2);
const STRAIGHT: INodeNo = INodeNo(3);
const FOREVER: Duration = Duration::from_secs(3600);

/// Reads that wait for their answers, if they are to.
#[derive(Default)]
struct Waiting {
    hold: bool,
    reads: Vec<(ReplyData, u64, u32)>,
}

#[derive(Clone, Default)]
struct Files(Arc<Mutex<Waiting>>);

/// The file system, mounted. It goes with the test.
pub(crate) struct Late {
    place: PathBuf,
    files: Files,
    _session: BackgroundSession,
}

impl Late {
    /// None if this machine cannot do it.
    pub(crate) fn mount(place: &Path) -> Option<Self> {
        std::fs::create_dir_all(place).expect("a directory");
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("late".into())];
        config.acl = SessionACL::All;
        let files = Files::default();
        match fuser::spawn_mount(files.clone(), place, &config) {
            Ok(session) => Some(Self { place: place.into(), files, _session: session }),
            Err(error) => {
                println!("skipped: no FUSE: {error}");
                None
            }
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// From now on reads wait.
    pub(crate) fn hold(&self) {
        self.files.waiting().hold = true;
    }

    /// Whether a read waits.
    pub(crate) fn is_asked(&self) -> bool {
        !self.files.waiting().reads.is_empty()
    }

    /// Answers what waits, and what comes from now on.
    pub(crate) fn answer(&self) {
        let mut waiting = self.files.waiting();
        waiting.hold = false;
        waiting.reads.drain(..).for_each(|(reply, offset, size)| answer(reply, offset, size));
    }
}

impl Files {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().expect("no panic")
    }
}

/// Each block is full of a number of its own.
fn answer(reply: ReplyData, offset: u64, size: u32) {
    let end = (offset + u64::from(size)).min(BLOCKS * PAGE);
    let bytes: Vec<u8> = (offset..end).map(|at| (at / PAGE % 251) as u8 + 1).collect();
    reply.data(&bytes);
}

fn attributes(ino: INodeNo) -> FileAttr {
    let is_root = ino == INodeNo::ROOT;
    FileAttr {
        ino,
        size: if is_root { 0 } else { BLOCKS * PAGE },
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if is_root { FileType::Directory } else { FileType::RegularFile },
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("file") => reply.entry(&FOREVER, &attributes(FILE), Generation(0)),
            Some("straight") => reply.entry(&FOREVER, &attributes(STRAIGHT), Generation(0)),
            _ => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &attributes(ino));
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let straight = ino == STRAIGHT;
        let flags = if straight { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut waiting = self.waiting();
        if waiting.hold {
            waiting.reads.push((reply, offset, size));
        } else {
            drop(waiting);
            answer(reply, offset, size);
        }
    }
}
