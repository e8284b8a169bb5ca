//! The loopback device of a new network namespace: netdevice(7), SIOCSIFFLAGS.

use super::error::{SysResult, check};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Brings `lo` up in the network namespace that `socket` (any socket) was made in.
pub fn up(socket: BorrowedFd<'_>) -> SysResult<()> {
    // SAFETY: an all-zero ifreq is valid: an empty name and flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request reads one ifreq.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    check(r.into(), "SIOCSIFFLAGS", || "device lo".into()).map(drop)
}
