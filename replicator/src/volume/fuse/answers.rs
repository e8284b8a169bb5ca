//! Between the kernel's words and ours: numbers, times, attributes, and what an answer looks like.

use crate::volume::{Found, Ino, Time};
use fuser::{
    Errno, FileAttr, FileType, Generation, INodeNo, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyXattr,
    TimeOrNow,
};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long the kernel may believe an answer. Nobody else changes the files.
pub(super) const FOREVER: Duration = Duration::from_secs(1 << 24);

pub(super) fn ino(node: INodeNo) -> Ino {
    Ino(node.0)
}

fn moment((seconds, nanoseconds): Time) -> SystemTime {
    let part = Duration::from_nanos(nanoseconds.unsigned_abs());
    match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds) + part,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + part,
    }
}

pub(super) fn time(asked: TimeOrNow) -> Time {
    let moment = match asked {
        TimeOrNow::SpecificTime(moment) => moment,
        TimeOrNow::Now => SystemTime::now(),
    };
    match moment.duration_since(UNIX_EPOCH) {
        Ok(after) => (after.as_secs() as i64, after.subsec_nanos().into()),
        Err(e) if e.duration().subsec_nanos() == 0 => (-(e.duration().as_secs() as i64), 0),
        Err(e) => {
            let before = e.duration();
            (-(before.as_secs() as i64) - 1, 1_000_000_000 - i64::from(before.subsec_nanos()))
        }
    }
}

pub(super) fn attributes(found: &Found) -> FileAttr {
    let meta = &found.meta;
    FileAttr {
        ino: INodeNo(found.ino.0),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: moment((meta.atime(), meta.atime_nsec())),
        mtime: moment((meta.mtime(), meta.mtime_nsec())),
        ctime: moment((meta.ctime(), meta.ctime_nsec())),
        crtime: UNIX_EPOCH,
        kind: FileType::from_std(meta.file_type()).unwrap_or(FileType::RegularFile),
        perm: (meta.mode() & 0o7777) as u16,
        nlink: found.links,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: meta.rdev() as u32,
        blksize: 4096,
        flags: 0,
    }
}

/// A mode without the bits that a write by somebody else takes away; none if it has none of them.
pub(super) fn without_privileges(mode: u32) -> Option<u32> {
    let group = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    let left = mode & !(libc::S_ISUID | group);
    (left != mode).then_some(left & 0o7777)
}

pub(super) fn entry(reply: ReplyEntry, result: io::Result<Found>) {
    match result {
        Ok(found) => reply.entry(&FOREVER, &attributes(&found), Generation(0)),
        Err(e) => reply.error(e.into()),
    }
}

pub(super) fn done(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e.into()),
    }
}

pub(super) fn value(reply: ReplyXattr, size: u32, result: io::Result<Vec<u8>>) {
    match result {
        Err(e) => reply.error(e.into()),
        Ok(bytes) if size == 0 => reply.size(bytes.len() as u32),
        Ok(bytes) if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(bytes) => reply.data(&bytes),
    }
}

/// Attributes, for as long as the kernel likes.
pub(super) fn attr(reply: ReplyAttr, result: io::Result<Found>) {
    match result {
        Ok(found) => reply.attr(&FOREVER, &attributes(&found)),
        Err(e) => reply.error(e.into()),
    }
}

/// The kernel may remember that there is no such name.
pub(super) fn nothing_there(reply: ReplyEntry) {
    let none = FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    };
    reply.entry(&FOREVER, &none, Generation(0));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_what_they_were() {
        for there in [(0, 0), (5, 7), (-1, 0), (-1, 999_999_999), (-7, 1)] {
            assert_eq!(time(TimeOrNow::SpecificTime(moment(there))), there);
        }
    }

    #[test]
    fn a_write_by_somebody_else_takes_away_what_it_must() {
        assert_eq!(without_privileges(0o100_644), None);
        assert_eq!(without_privileges(0o104_755), Some(0o755));
        assert_eq!(without_privileges(0o102_755), Some(0o755));
        // Without the right to execute it is no set-group-ID bit.
        assert_eq!(without_privileges(0o102_644), None);
    }
}
