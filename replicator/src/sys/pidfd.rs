//! Handles of processes and their descriptors: pidfd_open(2), pidfd_getfd(2), kcmp(2).

use super::error::{SysResult, check};
use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// KCMP_FILE of kcmp(2).
const KCMP_FILE: i32 = 0;

/// A handle of a process, close-on-exec.
pub fn open(pid: i32) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(fd, "pidfd_open", || format!("pid {pid}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A handle of a thread, close-on-exec (kernel 6.9).
pub fn open_thread(tid: i32) -> SysResult<OwnedFd> {
    /// PIDFD_THREAD of linux/pidfd.h.
    const THREAD: i32 = libc::O_EXCL;
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, THREAD) };
    let fd = check(fd, "pidfd_open", || format!("tid {tid}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A duplicate of another process's descriptor. Close it soon: while it lives, closing the
/// original does not close the object (a TCP socket sends no FIN).
pub fn get_fd(pidfd: BorrowedFd<'_>, number: i32) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = check(fd, "pidfd_getfd", || format!("descriptor {number}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether two descriptors of two processes are the same open file description, and if not, in
/// which order their descriptions are: any, but the same as long as both live.
pub fn compare_files(pid_a: i32, fd_a: i32, pid_b: i32, fd_b: i32) -> SysResult<Ordering> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, pid_a, pid_b, KCMP_FILE, fd_a, fd_b) };
    let r = check(r, "kcmp", || format!("fd {fd_a} of pid {pid_a}, fd {fd_b} of pid {pid_b}"))?;
    Ok(match r {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    })
}
