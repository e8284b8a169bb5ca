//! getsockopt(2), setsockopt(2), poll(2) and the queue ioctls of sockets, see socket(7) and tcp(7).

use super::error::{SysResult, check};
use libc::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Reads an option into `buf`; gives the length that the kernel wrote.
pub fn get(fd: BorrowedFd<'_>, level: c_int, name: c_int, buf: &mut [u8]) -> SysResult<usize> {
    let mut len = buf.len() as libc::socklen_t;
    // SAFETY: `buf` is ours and `len` its length.
    let r =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buf.as_mut_ptr().cast(), &mut len) };
    check(r.into(), "getsockopt", || format!("fd {} level {level} option {name}", fd.as_raw_fd()))?;
    Ok(len as usize)
}

/// Reads an int option.
pub fn get_i32(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> SysResult<i32> {
    let mut buf = [0u8; 4];
    get(fd, level, name, &mut buf)?;
    Ok(i32::from_ne_bytes(buf))
}

/// Sets an option from bytes.
pub fn set(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &[u8]) -> SysResult<()> {
    // SAFETY: the kernel reads `value` only.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast::<c_void>(),
            value.len() as libc::socklen_t,
        )
    };
    check(r.into(), if name == 19 && level == 6 { "TCP_REPAIR" } else { "setsockopt" }, || {
        format!("fd {} level {level} option {name}", fd.as_raw_fd())
    })
    .map(drop)
}

/// Sets an int option.
pub fn set_i32(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: i32) -> SysResult<()> {
    set(fd, level, name, &value.to_ne_bytes())
}

/// What poll(2) says of a descriptor without waiting, POLLRDHUP included.
pub fn events(fd: BorrowedFd<'_>) -> SysResult<i16> {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, which is ours.
    let r = unsafe { libc::poll(&mut entry, 1, 0) };
    check(r.into(), "poll", || format!("fd {}", fd.as_raw_fd()))?;
    Ok(entry.revents)
}

/// A socket of any family, type and protocol, close-on-exec.
pub fn open(domain: c_int, kind: c_int, protocol: c_int) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    let what = || format!("family {domain}, type {kind}, protocol {protocol}");
    let fd = check(fd.into(), "socket", what)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// Bytes that wait to be read (SIOCINQ).
pub fn in_queue(fd: BorrowedFd<'_>) -> SysResult<usize> {
    queue(fd, 0x541b, "SIOCINQ")
}

/// Bytes written that the peer has not acknowledged (SIOCOUTQ).
pub fn out_queue(fd: BorrowedFd<'_>) -> SysResult<usize> {
    queue(fd, 0x5411, "SIOCOUTQ")
}

fn queue(fd: BorrowedFd<'_>, request: libc::c_ulong, name: &'static str) -> SysResult<usize> {
    let mut n: c_int = 0;
    // SAFETY: both requests write one int.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, &mut n) };
    check(r.into(), name, || format!("fd {}", fd.as_raw_fd()))?;
    Ok(n as usize)
}
