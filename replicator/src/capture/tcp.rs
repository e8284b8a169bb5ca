//! Internet sockets from outside, through a duplicate of their descriptor.
//!
//! Sequence numbers and windows need repair mode (tcp(7), TCP_REPAIR); it is left without a
//! window probe, so that the peer notices nothing. Two pitfalls: leaving repair mode clears
//! SO_REUSEADDR, and while the send queue is selected in repair mode anything the kernel would
//! transmit counts as sent and is not, so that queue stays selected as briefly as possible.

use super::CaptureError;
use crate::image::Kind;
use crate::image::net::{InetIdle, SocketOptions, TcpConnection, TcpListener, TcpState};
use crate::sys::sockopt::{get, get_i32, in_queue, out_queue, set_i32};
use crate::sys::{SysError, SysResult};
use nix::sys::socket::{MsgFlags, SockaddrStorage, getpeername, getsockname, recv};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;
const REPAIR_ON: i32 = 1;
const REPAIR_OFF_NO_WINDOW_PROBE: i32 = -1;
const NO_QUEUE: i32 = 0;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
const INFO_TIMESTAMPS: u8 = 1;
const INFO_SACK: u8 = 2;
const INFO_WINDOW_SCALE: u8 = 4;

/// The kernel's numbers of tcp_states.h.
mod state {
    pub(super) const ESTABLISHED: u8 = 1;
    pub(super) const CLOSE: u8 = 7;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LISTEN: u8 = 10;
}

/// What rarely changes of a connection, read just before the stop so that the stop does not pay
/// for it.
#[derive(Clone, Debug)]
pub(super) struct Ahead {
    local: SocketAddr,
    remote: SocketAddr,
    options: SocketOptions,
}

/// Reads it, if the socket is a connection.
pub(super) fn ahead(fd: BorrowedFd<'_>, what: &str) -> Result<Option<Ahead>, CaptureError> {
    let mut info = [0u8; 8];
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    if !matches!(info[0], state::ESTABLISHED | state::CLOSE_WAIT) {
        return Ok(None);
    }
    let Ok(remote) = peer(fd) else { return Ok(None) };
    let mut ulp = [0u8; 16];
    if get(fd, libc::IPPROTO_TCP, TCP_ULP, &mut ulp).is_ok_and(|n| n > 0 && ulp[0] != 0) {
        return Err(CaptureError::unsupported(what.into(), "a TCP socket with kernel TLS".into()));
    }
    Ok(Some(Ahead { local: local(fd)?, remote, options: options(fd, true)? }))
}

/// Captures a TCP socket. `what` names it in errors; `known` is what was read of it just before.
pub(super) fn tcp(
    fd: BorrowedFd<'_>,
    what: &str,
    known: Option<&Ahead>,
) -> Result<Kind, CaptureError> {
    let mut info = [0u8; 104];
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let state = info[0];
    match state {
        state::LISTEN => {
            let backlog = u32::from_ne_bytes(info[28..32].try_into().expect("four bytes"));
            Ok(Kind::TcpListener(TcpListener {
                local: local(fd)?,
                backlog,
                options: options(fd, true)?,
            }))
        }
        state::ESTABLISHED | state::CLOSE_WAIT => {
            let gone = CaptureError::Transient("a TCP connection is opening or closing");
            match known {
                Some(known) => connection(fd, &info, state, known),
                None => connection(fd, &info, state, &ahead(fd, what)?.ok_or(gone)?),
            }
        }
        state::CLOSE => match peer(fd) {
            // A socket that was never connected, or whose connection ended: the kernel keeps
            // no peer of either.
            Ok(remote) => Ok(Kind::Tcp(Box::new(closed(fd, Some(remote))?))),
            Err(_) => match idle(fd, libc::SOCK_STREAM)? {
                // What is left of an accepted connection shows its listener's address, which is
                // not its own: bound to it, it would be in the listener's way.
                Kind::InetIdle(socket) if has_ended(fd)? => {
                    Ok(Kind::InetIdle(InetIdle { local: None, ..socket }))
                }
                kind => Ok(kind),
            },
        },
        // SYN_SENT, FIN_WAIT and the like pass by themselves; the stop is tried again.
        _ => Err(CaptureError::Transient("a TCP connection is opening or closing")),
    }
}

/// Whether a socket without a peer had one: it has received segments (tcpi_segs_in).
fn has_ended(fd: BorrowedFd<'_>) -> SysResult<bool> {
    const SEGMENTS_IN: usize = 140;
    let mut info = [0u8; SEGMENTS_IN + 4];
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(info[SEGMENTS_IN..] != [0; 4])
}

fn idle(fd: BorrowedFd<'_>, kind: i32) -> Result<Kind, CaptureError> {
    let v6 = get_i32(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6;
    let local = local(fd).ok().filter(|a| a.port() != 0);
    let options = options(fd, kind == libc::SOCK_STREAM)?;
    Ok(Kind::InetIdle(InetIdle { v6, kind, local, options }))
}

fn closed(fd: BorrowedFd<'_>, remote: Option<SocketAddr>) -> Result<TcpConnection, CaptureError> {
    let local = local(fd)?;
    Ok(TcpConnection {
        local,
        remote: remote.unwrap_or(local),
        state: TcpState::Closed,
        write_seq: 0,
        rcv_nxt: 0,
        send_queue: Vec::new(),
        receive_queue: peek(fd, in_queue(fd)?)?,
        window: [0; 5],
        mss: 536,
        sack: false,
        window_scale: None,
        timestamp: None,
        options: options(fd, true)?,
    })
}

fn connection(
    fd: BorrowedFd<'_>,
    info: &[u8; 104],
    state: u8,
    known: &Ahead,
) -> Result<Kind, CaptureError> {
    let flags = info[5];
    let Ahead { local, remote, options } = known.clone();
    let timestamp = (flags & INFO_TIMESTAMPS != 0)
        .then(|| get_i32(fd, libc::IPPROTO_TCP, TCP_TIMESTAMP).map(|t| t as u32))
        .transpose()?;
    let unread = in_queue(fd)?;
    let receive_queue = peek(fd, unread)?;
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)?;
    let repaired = in_repair(fd);
    let grown = in_queue(fd).is_ok_and(|now| now != unread);
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WINDOW_PROBE)?;
    if options.reuse_addr {
        set_i32(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    let r = repaired?;
    if grown {
        // A segment that was inside the container's own network when its input was held.
        return Err(CaptureError::Transient("a TCP connection has just received data"));
    }
    let scales = (info[6] & 15, info[6] >> 4);
    Ok(Kind::Tcp(Box::new(TcpConnection {
        local,
        remote,
        state: if state == state::CLOSE_WAIT { TcpState::CloseWait } else { TcpState::Established },
        write_seq: r.write_seq,
        rcv_nxt: r.rcv_nxt,
        send_queue: r.send_queue,
        receive_queue,
        window: r.window,
        mss: r.mss,
        sack: flags & INFO_SACK != 0,
        window_scale: (flags & INFO_WINDOW_SCALE != 0).then_some(scales),
        timestamp,
        options,
    })))
}

struct Repaired {
    write_seq: u32,
    rcv_nxt: u32,
    send_queue: Vec<u8>,
    window: [u32; 5],
    mss: u32,
}

fn in_repair(fd: BorrowedFd<'_>) -> SysResult<Repaired> {
    const TCP: i32 = libc::IPPROTO_TCP;
    let unacknowledged = out_queue(fd)?;
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let write_seq = get_i32(fd, TCP, TCP_QUEUE_SEQ);
    let send_queue = peek_tail(fd, unacknowledged);
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    let rcv_nxt = get_i32(fd, TCP, TCP_QUEUE_SEQ);
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let mut raw = [0u8; 20];
    get(fd, TCP, TCP_REPAIR_WINDOW, &mut raw)?;
    let word = |i: usize| u32::from_ne_bytes(raw[i * 4..i * 4 + 4].try_into().expect("4 bytes"));
    Ok(Repaired {
        write_seq: write_seq? as u32,
        rcv_nxt: rcv_nxt? as u32,
        send_queue: send_queue?,
        window: [word(0), word(1), word(2), word(3), word(4)],
        // In repair mode this is what the peer announced (mss_clamp).
        mss: get_i32(fd, TCP, libc::TCP_MAXSEG)? as u32,
    })
}

/// Copies `len` bytes of the selected queue and leaves them there.
pub(super) fn peek(fd: BorrowedFd<'_>, len: usize) -> SysResult<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; len];
    let n = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).map_err(
        |e| SysError::errno("recv(MSG_PEEK)", format!("fd {}", fd.as_raw_fd()), e as i32),
    )?;
    if n != len {
        let what = format!("fd {}: {n} of {len} bytes", fd.as_raw_fd());
        return Err(SysError::errno("recv(MSG_PEEK)", what, libc::EIO));
    }
    Ok(bytes)
}

/// Copies the last `len` bytes of the send queue, which repair mode has selected. The kernel
/// copies from the head, which may hold bytes that were acknowledged already (a segment is freed
/// when all of it was), gives the length of all, and does not heed the length asked for.
fn peek_tail(fd: BorrowedFd<'_>, len: usize) -> SysResult<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; len];
    loop {
        let n = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
            .map_err(|e| SysError::errno("recv(MSG_PEEK)", "a send queue", e as i32))?;
        if n < len {
            let what = format!("a send queue: {n} of {len} bytes");
            return Err(SysError::errno("recv(MSG_PEEK)", what, libc::EIO));
        }
        if n <= bytes.len() {
            bytes.truncate(n);
            return Ok(bytes.split_off(n - len));
        }
        bytes.resize(n, 0);
    }
}

fn options(fd: BorrowedFd<'_>, tcp: bool) -> SysResult<SocketOptions> {
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
        let mut name = [0u8; 16];
        let n = get(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name)?;
        let name = &name[..n];
        let end = name.iter().position(|b| *b == 0).unwrap_or(n);
        o.congestion = String::from_utf8_lossy(&name[..end]).into_owned();
    }
    Ok(o)
}

fn local(fd: BorrowedFd<'_>) -> Result<SocketAddr, CaptureError> {
    let a = getsockname::<SockaddrStorage>(fd.as_raw_fd())
        .map_err(|e| SysError::errno("getsockname", "a socket", e as i32))?;
    address(&a).ok_or_else(|| SysError::errno("getsockname", "a socket", libc::EAFNOSUPPORT).into())
}

fn peer(fd: BorrowedFd<'_>) -> Result<SocketAddr, CaptureError> {
    let a = getpeername::<SockaddrStorage>(fd.as_raw_fd())
        .map_err(|e| SysError::errno("getpeername", "a socket", e as i32))?;
    address(&a).ok_or_else(|| SysError::errno("getpeername", "a socket", libc::EAFNOSUPPORT).into())
}

fn address(a: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = a.as_sockaddr_in() {
        return Some(SocketAddr::from((v4.ip(), v4.port())));
    }
    let v6 = a.as_sockaddr_in6()?;
    Some(SocketAddr::from((Ipv6Addr::from(v6.ip().octets()), v6.port())))
}
