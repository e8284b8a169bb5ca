//! Options of internet sockets, read with getsockopt(2).

use crate::image::net::SocketOptions;
use crate::image::options::{INTS, On};
use crate::sys::SysResult;
use crate::sys::sockopt::{get, get_i32};
use std::os::fd::BorrowedFd;

/// All options of a socket.
pub(super) fn all(fd: BorrowedFd<'_>, tcp: bool) -> SysResult<SocketOptions> {
    common(fd, tcp, more(fd, tcp)?)
}

/// Those of [`INTS`] that are not at their default.
pub(super) fn more(fd: BorrowedFd<'_>, tcp: bool) -> SysResult<Vec<(i32, i32, i32)>> {
    let v6 = get_i32(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6;
    let exists = |on| match on {
        On::All => true,
        On::V6 => v6,
        On::Tcp => tcp,
    };
    let mut more = Vec::new();
    for option in INTS.iter().filter(|o| exists(o.on)) {
        // An option that this kernel does not have is set by nobody.
        match get_i32(fd, option.level, option.name) {
            Ok(value) if value != option.default => more.push((option.level, option.name, value)),
            _ => {}
        }
    }
    Ok(more)
}

/// The options that most programs set, and `more`.
pub(super) fn common(
    fd: BorrowedFd<'_>,
    tcp: bool,
    more: Vec<(i32, i32, i32)>,
) -> SysResult<SocketOptions> {
    const SO_BUF_LOCK: i32 = 72;
    let so = |name| get_i32(fd, libc::SOL_SOCKET, name);
    let mut linger = [0u8; 8];
    get(fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut linger)?;
    let half = |i: usize| i32::from_ne_bytes(linger[i..i + 4].try_into().expect("four bytes"));
    let mut o = SocketOptions {
        reuse_addr: so(libc::SO_REUSEADDR)? != 0,
        reuse_port: so(libc::SO_REUSEPORT)? != 0,
        keep_alive: so(libc::SO_KEEPALIVE)? != 0,
        buffers: [so(libc::SO_SNDBUF)?, so(libc::SO_RCVBUF)?],
        buffer_lock: so(SO_BUF_LOCK)?,
        linger: (half(0), half(4)),
        mark: so(libc::SO_MARK)? as u32,
        priority: so(libc::SO_PRIORITY)?,
        more,
        device: text(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE)?,
        timeouts: [timeout(fd, libc::SO_RCVTIMEO)?, timeout(fd, libc::SO_SNDTIMEO)?],
        ..SocketOptions::default()
    };
    if so(libc::SO_DOMAIN)? == libc::AF_INET6 {
        o.v6_only = get_i32(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)? != 0;
    }
    if tcp {
        let t = |name| get_i32(fd, libc::IPPROTO_TCP, name);
        o.keep_alive_timing =
            [t(libc::TCP_KEEPIDLE)?, t(libc::TCP_KEEPINTVL)?, t(libc::TCP_KEEPCNT)?];
        o.no_delay = t(libc::TCP_NODELAY)? != 0;
        o.cork = t(libc::TCP_CORK)? != 0;
        o.user_timeout = t(libc::TCP_USER_TIMEOUT)? as u32;
        o.defer_accept = t(libc::TCP_DEFER_ACCEPT)?;
        o.quick_ack = t(libc::TCP_QUICKACK)? != 0;
        o.congestion = text(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION)?;
    }
    Ok(o)
}

fn text(fd: BorrowedFd<'_>, level: i32, name: i32) -> SysResult<String> {
    let mut text = [0u8; 16];
    let n = get(fd, level, name, &mut text)?;
    let text = &text[..n];
    let end = text.iter().position(|b| *b == 0).unwrap_or(n);
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// struct timeval.
fn timeout(fd: BorrowedFd<'_>, name: i32) -> SysResult<(i64, i64)> {
    let mut raw = [0u8; 16];
    get(fd, libc::SOL_SOCKET, name, &mut raw)?;
    let half = |i: usize| i64::from_ne_bytes(raw[i..i + 8].try_into().expect("eight bytes"));
    Ok((half(0), half(8)))
}
