//! Locks on files, and who is told of events on a description.

use super::CaptureError;
use super::fdinfo::Lock;
use crate::image::State;
use crate::image::files::{FileLock, LockKind, Owner};
use crate::sys::locks;
use std::collections::HashMap;
use std::os::fd::BorrowedFd;

/// Adds what the fdinfo of a descriptor of process `pid` (inside) says of locks.
pub(super) fn add(
    found: &[Lock],
    description: u32,
    pid: i32,
    what: &str,
    state: &mut State,
) -> Result<(), CaptureError> {
    for lock in found {
        let kind = match (lock.kind.as_str(), lock.mode.as_str()) {
            ("FLOCK", _) => LockKind::Flock,
            ("POSIX", _) => LockKind::Process(pid),
            ("OFDLCK", _) => LockKind::Open,
            ("LEASE", "ACTIVE") => LockKind::Lease(pid),
            ("LEASE", _) => return Err(CaptureError::Transient("a lease is being broken")),
            (other, _) => {
                let why = format!("a lock of kind {other}");
                return Err(CaptureError::unsupported(what.to_owned(), why));
            }
        };
        let (exclusive, start, end) = (lock.exclusive, lock.start, lock.end);
        let lock = FileLock { description, kind, exclusive, start, end };
        // Every descriptor of the description shows it.
        let same = |l: &FileLock| match (l.kind, kind) {
            (LockKind::Lease(_), LockKind::Lease(_)) => l.description == description,
            _ => *l == lock,
        };
        if !state.locks.iter().any(same) {
            state.locks.push(lock);
        }
    }
    Ok(())
}

/// Who is told of events on a descriptor: kind, pid outside, signal.
pub(super) type Told = (i32, i32, i32);

/// Reads it; none if nobody is.
pub(super) fn told(fd: BorrowedFd<'_>) -> Result<Option<Told>, CaptureError> {
    match locks::owner(fd) {
        Ok((_, 0, 0)) => Ok(None),
        Ok(told) => Ok(Some(told)),
        // A descriptor that was opened with O_PATH.
        Err(e) if e.code() == libc::EBADF => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Adds it to a state; `inner` are the pids inside by those outside.
pub(super) fn add_owner(
    (kind, pid, signal): Told,
    description: u32,
    inner: &HashMap<i32, i32>,
    what: &str,
    state: &mut State,
) -> Result<(), CaptureError> {
    let inside = inner.get(&pid).copied();
    let Some(pid) = (if pid == 0 { Some(0) } else { inside }) else {
        let why = "its events are told to a thread, or to a process that is not in the container";
        return Err(CaptureError::unsupported(what.to_owned(), why.into()));
    };
    state.owners.push(Owner { description, kind, pid, signal });
    Ok(())
}
