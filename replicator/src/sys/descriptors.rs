//! Descriptors of this process: close_range(2), the tick count of a timerfd.

use super::error::{SysResult, check};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// TFD_IOC_SET_TICKS of timerfd_create(2).
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// Marks all descriptors from `first` on as close-on-exec.
pub fn close_on_exec_from(first: u32) -> SysResult<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: no pointers; descriptors stay open until an exec, where nobody uses them any more.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    check(r, "close_range", || format!("descriptors from {first} on")).map(drop)
}

/// Sets the number of expirations of a timerfd that nobody has read yet (at least 1).
pub fn set_timer_ticks(fd: BorrowedFd<'_>, ticks: u64) -> SysResult<()> {
    // SAFETY: the request reads one u64.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &ticks) };
    check(r.into(), "TFD_IOC_SET_TICKS", || format!("fd {}", fd.as_raw_fd())).map(drop)
}

/// A signalfd for a mask of signals (bit 0: signal 1), close-on-exec.
pub fn signal_fd(mask: u64) -> SysResult<OwnedFd> {
    // SAFETY: the kernel reads one u64.
    let fd = unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), libc::SFD_CLOEXEC)
    };
    let fd = check(fd, "signalfd4", || format!("mask {mask:#x}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
