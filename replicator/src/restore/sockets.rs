//! Internet sockets that are not connected, and the options of all.

use super::error::sys;
use crate::image::net::{InetIdle, SocketOptions, TcpConnection, TcpListener};
use crate::image::options::INTS;
use crate::sys::{SysError, SysResult, sockopt};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect,
    getsockname, listen, send, socket,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const SOL_SOCKET: i32 = libc::SOL_SOCKET;
const TCP: i32 = libc::IPPROTO_TCP;
/// SO_BUF_LOCK of socket(7).
const SO_BUF_LOCK: i32 = 72;
/// The kernel's defaults for TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT.
const KEEP_ALIVE_DEFAULT: [i32; 3] = [7200, 75, 9];

/// A new socket in the network namespace of the calling thread.
fn new(v6: bool, kind: SockType) -> SysResult<OwnedFd> {
    let family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    sys(socket(family, kind, SockFlag::SOCK_CLOEXEC, None), "socket", || format!("{family:?}"))
}

/// A TCP socket for a connection from this address; it is connected later.
pub(super) fn unconnected(local: &SocketAddr) -> SysResult<OwnedFd> {
    new(local.is_ipv6(), SockType::Stream)
}

/// A listening socket.
pub(super) fn listener(image: &TcpListener) -> SysResult<OwnedFd> {
    let fd = new(image.local.is_ipv6(), SockType::Stream)?;
    before_bind(fd.as_fd(), &image.options, image.local.is_ipv6(), true)?;
    // Its own connections, restored beside it, must not be in its way.
    sockopt::set_i32(fd.as_fd(), SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind_to(&fd, image.local)?;
    set_options(fd.as_fd(), &image.options, true)?;
    let backlog = Backlog::new(image.backlog.min(i32::MAX as u32) as i32);
    let backlog = backlog.unwrap_or(Backlog::MAXCONN);
    sys(listen(&fd, backlog), "listen", || image.local.to_string())?;
    Ok(fd)
}

/// A socket that is neither connected nor listening.
pub(super) fn idle(image: &InetIdle) -> SysResult<OwnedFd> {
    let stream = image.kind == libc::SOCK_STREAM;
    let fd = new(image.v6, if stream { SockType::Stream } else { SockType::Datagram })?;
    before_bind(fd.as_fd(), &image.options, image.v6, stream)?;
    if let Some(local) = image.local {
        bind_to(&fd, local)?;
    }
    set_options(fd.as_fd(), &image.options, stream)?;
    Ok(fd)
}

/// A socket whose connection is over, with what was received and not read, and an error if one
/// waited to be read: the end of a short connection to ourselves. Its error is ECONNRESET,
/// whatever it was, and its own port is another one.
pub(super) fn ended(image: &TcpConnection) -> SysResult<OwnedFd> {
    let v6 = image.local.is_ipv6();
    let loopback: IpAddr = match v6 {
        true => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        false => Ipv4Addr::LOCALHOST.into(),
    };
    let object = || "a connection to ourselves".to_string();
    let door = new(v6, SockType::Stream)?;
    bind_to(&door, SocketAddr::new(loopback, 0))?;
    sys(listen(&door, Backlog::new(1).unwrap_or(Backlog::MAXCONN)), "listen", object)?;
    let at: SockaddrStorage = sys(getsockname(door.as_raw_fd()), "getsockname", object)?;
    let fd = new(v6, SockType::Stream)?;
    let bytes = image.receive_queue.as_slice();
    let size = (4 * bytes.len() + 65536).min(i32::MAX as usize / 2) as i32;
    sockopt::set_i32(fd.as_fd(), SOL_SOCKET, libc::SO_RCVBUFFORCE, size)?;
    sys(connect(fd.as_raw_fd(), &at), "connect", object)?;
    let accepted = std::net::TcpListener::from(door).accept();
    let (peer, _) =
        accepted.map_err(|source| SysError { call: "accept", object: object(), source })?;
    sockopt::set_i32(peer.as_fd(), SOL_SOCKET, libc::SO_SNDBUFFORCE, size)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let n = sys(send(peer.as_raw_fd(), rest, flags), "send", || {
            format!("{} bytes that were received", rest.len())
        })?;
        rest = &rest[n..];
    }
    // Closed with a linger time of nothing it resets, and no port of it waits.
    let at_once: Vec<u8> = [1i32, 0].iter().flat_map(|v| v.to_ne_bytes()).collect();
    sockopt::set(peer.as_fd(), SOL_SOCKET, libc::SO_LINGER, &at_once)?;
    drop(peer);
    set_options(fd.as_fd(), &image.options, true)?;
    if !image.error {
        // Reading the error clears it.
        sockopt::get_i32(fd.as_fd(), SOL_SOCKET, libc::SO_ERROR)?;
    }
    Ok(fd)
}

/// Binds to an address.
pub(super) fn bind_to(fd: &OwnedFd, local: SocketAddr) -> SysResult<()> {
    let object = || format!("{local} (is the address there?)");
    sys(bind(fd.as_raw_fd(), &SockaddrStorage::from(local)), "bind", object)
}

/// What decides whether bind(2) succeeds.
pub(super) fn before_bind(
    fd: BorrowedFd<'_>,
    o: &SocketOptions,
    v6: bool,
    tcp: bool,
) -> SysResult<()> {
    if v6 {
        let v6_only = i32::from(o.v6_only);
        sockopt::set_i32(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, v6_only)?;
    }
    if o.reuse_port {
        sockopt::set_i32(fd, SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    }
    if !o.device.is_empty() {
        sockopt::set(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, o.device.as_bytes())?;
    }
    if o.max_segment > 0 && tcp {
        sockopt::set_i32(fd, TCP, libc::TCP_MAXSEG, o.max_segment)?;
    }
    set_more(fd, o, true)
}

/// The options beyond the common ones that are set before or after bind(2).
fn set_more(fd: BorrowedFd<'_>, o: &SocketOptions, early: bool) -> SysResult<()> {
    for &(level, name, value) in &o.more {
        let found = INTS.iter().find(|i| (i.level, i.name) == (level, name));
        if found.is_some_and(|i| i.early == early) {
            sockopt::set_i32(fd, level, name, value)?;
        }
    }
    Ok(())
}

/// Buffer sizes; before data is put into the queues.
pub(super) fn set_buffers(fd: BorrowedFd<'_>, o: &SocketOptions) -> SysResult<()> {
    for (name, force, size) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, o.buffers[0]),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, o.buffers[1]),
    ] {
        // What getsockopt gives is twice what setsockopt takes.
        if size > 0 && sockopt::get_i32(fd, SOL_SOCKET, name)? != size {
            sockopt::set_i32(fd, SOL_SOCKET, force, size / 2)?;
        }
    }
    // Setting a size has locked it: whether the kernel may grow it is what it was.
    sockopt::set_i32(fd, SOL_SOCKET, SO_BUF_LOCK, o.buffer_lock & 3)
}

/// Room for so many received bytes, counted as the kernel counts small segments.
pub(super) fn widen(fd: &OwnedFd, o: &SocketOptions, bytes: usize) -> SysResult<()> {
    let half = (4 * bytes).min(i32::MAX as usize / 2) as i32;
    if half > o.buffers[1] / 2 {
        sockopt::set_i32(fd.as_fd(), SOL_SOCKET, libc::SO_RCVBUFFORCE, half)?;
        sockopt::set_i32(fd.as_fd(), SOL_SOCKET, SO_BUF_LOCK, o.buffer_lock & 3)?;
    }
    Ok(())
}

/// All options that a fresh socket does not have already. After bind(2).
pub(super) fn set_options(fd: BorrowedFd<'_>, o: &SocketOptions, tcp: bool) -> SysResult<()> {
    let set = |level, name, value: i32, default: i32| match value == default {
        true => Ok(()),
        false => sockopt::set_i32(fd, level, name, value),
    };
    sockopt::set_i32(fd, SOL_SOCKET, libc::SO_REUSEADDR, i32::from(o.reuse_addr))?;
    set_buffers(fd, o)?;
    set(SOL_SOCKET, libc::SO_KEEPALIVE, i32::from(o.keep_alive), 0)?;
    set(SOL_SOCKET, libc::SO_MARK, o.mark as i32, 0)?;
    if o.linger.0 != 0 {
        let linger: Vec<u8> =
            [o.linger.0, o.linger.1].iter().flat_map(|v| v.to_ne_bytes()).collect();
        sockopt::set(fd, SOL_SOCKET, libc::SO_LINGER, &linger)?;
    }
    set_more(fd, o, false)?;
    // After IP_TOS, which sets it as well.
    sockopt::set_i32(fd, SOL_SOCKET, libc::SO_PRIORITY, o.priority)?;
    for (name, (seconds, micros)) in
        [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO].into_iter().zip(o.timeouts)
    {
        if (seconds, micros) != (0, 0) {
            let value: Vec<u8> = [seconds, micros].iter().flat_map(|v| v.to_ne_bytes()).collect();
            sockopt::set(fd, SOL_SOCKET, name, &value)?;
        }
    }
    if !tcp {
        return Ok(());
    }
    let names = [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_KEEPCNT];
    for ((name, value), default) in
        names.into_iter().zip(o.keep_alive_timing).zip(KEEP_ALIVE_DEFAULT)
    {
        if value > 0 {
            set(TCP, name, value, default)?;
        }
    }
    set(TCP, libc::TCP_NODELAY, i32::from(o.no_delay), 0)?;
    set(TCP, libc::TCP_CORK, i32::from(o.cork), 0)?;
    set(TCP, libc::TCP_USER_TIMEOUT, o.user_timeout as i32, 0)?;
    set(TCP, libc::TCP_DEFER_ACCEPT, o.defer_accept, 0)?;
    // Where acknowledgements are delayed; a fresh socket sends its first ones at once.
    set(TCP, libc::TCP_QUICKACK, i32::from(o.quick_ack), 1)?;
    set_congestion(fd, &o.congestion)
}

fn set_congestion(fd: BorrowedFd<'_>, name: &str) -> SysResult<()> {
    let mut buf = [0; 16];
    let len = sockopt::get(fd, TCP, libc::TCP_CONGESTION, &mut buf)?;
    let now = buf[..len].split(|b| *b == 0).next().unwrap_or_default();
    if name.is_empty() || now == name.as_bytes() {
        return Ok(());
    }
    sockopt::set(fd, TCP, libc::TCP_CONGESTION, name.as_bytes())
}
