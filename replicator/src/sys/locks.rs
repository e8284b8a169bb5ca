//! Locks on files and who is told of events: flock(2), fcntl(2).

use super::error::{SysResult, check};
use std::os::fd::{AsRawFd, BorrowedFd};

/// F_OWNER_PGRP of fcntl(2).
pub const OWNER_GROUP: i32 = 2;

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// struct f_owner_ex
#[repr(C)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

/// Locks a whole file for a description, without waiting.
pub fn flock(fd: BorrowedFd<'_>, exclusive: bool) -> SysResult<()> {
    let how = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: no pointers.
    let r = unsafe { libc::flock(fd.as_raw_fd(), how | libc::LOCK_NB) };
    check(r.into(), "flock", || format!("fd {}", fd.as_raw_fd())).map(drop)
}

/// struct flock for a range from `start` to `end`, both included; to the end of the file for none.
pub fn range(exclusive: bool, start: u64, end: Option<u64>) -> libc::flock {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as i64,
        l_len: end.map_or(0, |end| (end - start + 1) as i64),
        l_pid: 0,
    }
}

/// The bytes of a struct flock.
pub fn bytes(lock: &libc::flock) -> Vec<u8> {
    let mut raw = vec![0; size_of::<libc::flock>()];
    raw[..2].copy_from_slice(&lock.l_type.to_ne_bytes());
    raw[2..4].copy_from_slice(&lock.l_whence.to_ne_bytes());
    raw[8..16].copy_from_slice(&lock.l_start.to_ne_bytes());
    raw[16..24].copy_from_slice(&lock.l_len.to_ne_bytes());
    raw
}

const _: () = assert!(size_of::<libc::flock>() == 32);
const _: () = assert!(std::mem::offset_of!(libc::flock, l_len) == 16);

/// Locks a range for a description, without waiting.
pub fn lock_open(fd: BorrowedFd<'_>, lock: &libc::flock) -> SysResult<()> {
    // SAFETY: the kernel reads the structure.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, lock) };
    check(r.into(), "fcntl(F_OFD_SETLK)", || format!("fd {}", fd.as_raw_fd())).map(drop)
}

/// Who is told of events on a description (kind, id; 0 for nobody), and by which signal (0 for the
/// default).
pub fn owner(fd: BorrowedFd<'_>) -> SysResult<(i32, i32, i32)> {
    let mut owner = OwnerEx { kind: 0, pid: 0 };
    let what = || format!("fd {}", fd.as_raw_fd());
    // SAFETY: the kernel writes the structure.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    check(r.into(), "fcntl(F_GETOWN_EX)", what)?;
    // SAFETY: no pointers.
    let signal = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) };
    let signal = check(signal.into(), "fcntl(F_GETSIG)", what)?;
    Ok((owner.kind, owner.pid, signal as i32))
}

/// Sets both.
pub fn set_owner(fd: BorrowedFd<'_>, kind: i32, pid: i32, signal: i32) -> SysResult<()> {
    let owner = OwnerEx { kind, pid };
    let what = || format!("fd {}", fd.as_raw_fd());
    // SAFETY: the kernel reads the structure.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
    check(r.into(), "fcntl(F_SETOWN_EX)", what)?;
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETSIG, signal) };
    check(r.into(), "fcntl(F_SETSIG)", what).map(drop)
}

/// The lease that is held by way of a description: F_RDLCK, F_WRLCK or F_UNLCK.
pub fn lease(fd: BorrowedFd<'_>) -> SysResult<i32> {
    // SAFETY: no pointers.
    let kind = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETLEASE) };
    check(kind.into(), "fcntl(F_GETLEASE)", || format!("fd {}", fd.as_raw_fd())).map(|k| k as i32)
}

/// Takes or gives back a lease.
pub fn set_lease(fd: BorrowedFd<'_>, kind: i32) -> SysResult<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, kind) };
    check(r.into(), "fcntl(F_SETLEASE)", || format!("fd {}", fd.as_raw_fd())).map(drop)
}
