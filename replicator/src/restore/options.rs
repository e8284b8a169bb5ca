//! Options of sockets other than TCP, set again where a new socket differs.

use crate::image::net::RawOptions;
use crate::sys::{SysResult, sockopt};
use std::os::fd::BorrowedFd;

const SOCKET: i32 = libc::SOL_SOCKET;
/// SO_BUF_LOCK of socket(7).
const SO_BUF_LOCK: i32 = 72;

/// Whether it decides what bind(2) does.
fn is_for_bind(level: i32, name: i32) -> bool {
    matches!(
        (level, name),
        (SOCKET, libc::SO_REUSEADDR | libc::SO_REUSEPORT | libc::SO_BINDTODEVICE)
            | (libc::IPPROTO_IP, libc::IP_FREEBIND | libc::IP_TRANSPARENT)
            | (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)
            | (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY | libc::IPV6_FREEBIND)
            | (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT)
    )
}

/// What must be set before bind(2).
pub(super) fn before_bind(fd: BorrowedFd<'_>, options: &RawOptions) -> SysResult<()> {
    options.iter().filter(|(l, n, _)| is_for_bind(*l, *n)).try_for_each(|o| apply(fd, o))
}

/// All of them. After bind(2), and after the queues were filled.
pub(super) fn set(fd: BorrowedFd<'_>, options: &RawOptions) -> SysResult<()> {
    options
        .iter()
        .filter(|(l, n, _)| (*l, *n) != (SOCKET, SO_BUF_LOCK))
        .try_for_each(|o| apply(fd, o))?;
    // Setting a size has locked it: whether the kernel may change it is what it was.
    options
        .iter()
        .filter(|(l, n, _)| (*l, *n) == (SOCKET, SO_BUF_LOCK))
        .try_for_each(|o| apply(fd, o))
}

fn apply(fd: BorrowedFd<'_>, (level, name, value): &(i32, i32, Vec<u8>)) -> SysResult<()> {
    let mut now = [0; 64];
    let room = value.len().min(now.len());
    if sockopt::get(fd, *level, *name, &mut now[..room]).is_ok_and(|n| n == value.len())
        && now[..room] == value[..]
    {
        return Ok(());
    }
    let force = match (*level, *name) {
        (SOCKET, libc::SO_SNDBUF) => Some(libc::SO_SNDBUFFORCE),
        (SOCKET, libc::SO_RCVBUF) => Some(libc::SO_RCVBUFFORCE),
        _ => None,
    };
    if let (Some(force), Some(size)) = (force, value.first_chunk()) {
        // What getsockopt gives is twice what setsockopt takes.
        return sockopt::set_i32(fd, SOCKET, force, i32::from_ne_bytes(*size) / 2);
    }
    if (*level, *name) == (SOCKET, SO_BUF_LOCK) {
        let lock = value.first_chunk().map_or(0, |v| i32::from_ne_bytes(*v));
        return sockopt::set_i32(fd, SOCKET, SO_BUF_LOCK, lock & 3);
    }
    sockopt::set(fd, *level, *name, value)
}
