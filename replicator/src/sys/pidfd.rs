//! Handles of processes and their descriptors: pidfd_open(2), pidfd_getfd(2), kcmp(2).

use super::error::{SysResult, check};
use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// KCMP_FILE and KCMP_EPOLL_TFD of kcmp(2).
const KCMP_FILE: i32 = 0;
const KCMP_EPOLL_TFD: i32 = 7;

/// What tasks can have in common, by its number in kcmp(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// An address space.
    Memory = 1,
    /// A table of descriptors.
    Descriptors = 2,
    /// Working directory, root directory and umask.
    Directories = 3,
}

impl Table {
    /// The flag of clone(2) that shares it.
    pub fn flag(self) -> &'static str {
        match self {
            Table::Memory => "CLONE_VM",
            Table::Descriptors => "CLONE_FILES",
            Table::Directories => "CLONE_FS",
        }
    }
}

/// Whether two tasks, processes or threads, have a table in common.
pub fn share(a: i32, b: i32, table: Table) -> SysResult<bool> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, a, b, table as i32, 0, 0) };
    check(r, "kcmp", || format!("tasks {a} and {b}")).map(|r| r == 0)
}

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

/// Whether an epoll instance watches a file: both by the pid and number of a descriptor, the entry
/// by the number that it was added under and its index among those with this number.
pub fn is_watched(file: (i32, i32), epoll: (i32, i32), number: i32, nth: u32) -> SysResult<bool> {
    // struct kcmp_epoll_slot of linux/kcmp.h.
    let slot = [epoll.1 as u32, number as u32, nth];
    let at = slot.as_ptr();
    // SAFETY: the kernel reads the three words of `slot`.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, file.0, epoll.0, KCMP_EPOLL_TFD, file.1, at) };
    let object = || format!("descriptor {number} in epoll {} of pid {}", epoll.1, epoll.0);
    check(r, "kcmp(KCMP_EPOLL_TFD)", object).map(|r| r == 0)
}
