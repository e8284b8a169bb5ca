//! Internet sockets from outside, through a duplicate of their descriptor.
//!
//! Sequence numbers and windows need repair mode (tcp(7), TCP_REPAIR); it is left without a
//! window probe, so that the peer notices nothing. Two pitfalls: leaving repair mode clears
//! SO_REUSEADDR, and while the send queue is selected in repair mode anything the kernel would
//! transmit counts as sent and is not, so that queue stays selected as briefly as possible.

use super::{CaptureError, tcp_options as options};
use crate::image::Kind;
use crate::image::net::{InetIdle, SocketOptions, TcpConnection, TcpListener, TcpState};
use crate::sys::sockopt::{events, get, get_i32, in_queue, out_queue, set_i32};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, SysResult, inet_diag};
use nix::sys::socket::{MsgFlags, SockaddrStorage, getpeername, getsockname, recv};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;
const TCP_AO_INFO: i32 = 40;
const SO_COOKIE: i32 = 57;
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
    pub(super) const SYN_SENT: u8 = 2;
    pub(super) const CLOSE: u8 = 7;
    pub(super) const LISTEN: u8 = 10;
}

/// The states of a connection that both sides know of.
pub(super) fn synchronized(state: u8) -> Option<TcpState> {
    Some(match state {
        1 => TcpState::Established,
        4 => TcpState::FinWait1,
        5 => TcpState::FinWait2,
        8 => TcpState::CloseWait,
        9 => TcpState::LastAck,
        11 => TcpState::Closing,
        _ => return None,
    })
}

/// What rarely changes of a connection, read just before the stop so that the stop does not pay
/// for it.
#[derive(Clone, Debug)]
pub(super) struct Ahead {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) options: SocketOptions,
}

/// What is remembered of a socket from one look ahead to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    looks: u8,
    more: Vec<(i32, i32, i32)>,
}

/// Options that programs set once if at all are read again only at every so many looks.
const LOOK_AGAIN: u8 = 8;

/// Reads it, if the socket is a connection, and refuses what cannot be carried over.
pub(super) fn ahead(
    fd: BorrowedFd<'_>,
    what: &str,
    known: Option<&mut Known>,
    diag: &UnixDiag,
) -> Result<Option<Ahead>, CaptureError> {
    let mut info = [0u8; 8];
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let listens = info[0] == state::LISTEN;
    let first = known.as_ref().is_none_or(|k| k.looks == 0);
    if first && (listens || synchronized(info[0]).is_some()) {
        refuse(fd, what, diag, listens)?;
    }
    let looks = known.as_ref().map_or(0, |k| k.looks);
    if listens && let Some(known) = known {
        known.looks = 1;
        return Ok(None);
    }
    if synchronized(info[0]).is_none() {
        return Ok(None);
    }
    let Ok(remote) = peer(fd) else { return Ok(None) };
    let options = match known {
        Some(known) => {
            if looks.is_multiple_of(LOOK_AGAIN) {
                known.more = options::more(fd, true)?;
            }
            known.looks = looks.checked_add(1).unwrap_or(LOOK_AGAIN);
            options::common(fd, true, known.more.clone())?
        }
        None => options::all(fd, true)?,
    };
    Ok(Some(Ahead { local: local(fd)?, remote, options }))
}

fn listener(fd: BorrowedFd<'_>, backlog: u32) -> Result<TcpListener, CaptureError> {
    let mut options = options::all(fd, true)?;
    options.max_segment = max_segment(fd)?;
    Ok(TcpListener { local: local(fd)?, backlog, options })
}

/// What rarely changes of a listener.
pub(super) fn listener_ahead(
    fd: BorrowedFd<'_>,
    what: &str,
    diag: &UnixDiag,
) -> Result<TcpListener, CaptureError> {
    refuse(fd, what, diag, true)?;
    listener(fd, 0)
}

/// What a checkpoint cannot hold of a TCP socket.
fn refuse(
    fd: BorrowedFd<'_>,
    what: &str,
    diag: &UnixDiag,
    listens: bool,
) -> Result<(), CaptureError> {
    let no = |why: &str| Err(CaptureError::unsupported(what.into(), why.into()));
    let mut ulp = [0u8; 16];
    if get(fd, libc::IPPROTO_TCP, TCP_ULP, &mut ulp).is_ok_and(|n| n > 0 && ulp[0] != 0) {
        return no("a TCP socket with kernel TLS; TLS in the program works");
    }
    // A kernel without TCP-AO does not know the option; a socket without keys says ENOENT.
    if get(fd, libc::IPPROTO_TCP, TCP_AO_INFO, &mut [0u8; 64]).is_ok() {
        return no("a TCP socket with TCP-AO, whose keys cannot be read; plain TCP works");
    }
    if get(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &mut []).is_ok_and(|n| n > 0) {
        return no("a socket with a packet filter (SO_ATTACH_FILTER); run it without");
    }
    let remote = if listens { None } else { peer(fd).ok() };
    if inet_diag::find(diag, local(fd)?, remote)?.is_some_and(|row| row.md5) {
        return no("a TCP socket with TCP-MD5, whose keys cannot be carried over; plain TCP works");
    }
    Ok(())
}

/// Captures a TCP socket. `what` names it in errors; `known` is what was read of it just before.
pub(super) fn tcp(
    fd: BorrowedFd<'_>,
    what: &str,
    known: Option<&Ahead>,
    diag: &UnixDiag,
) -> Result<Kind, CaptureError> {
    let mut info = [0u8; 104];
    get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    if let Some(state) = synchronized(info[0]) {
        let gone = CaptureError::Transient("a TCP connection is opening or closing");
        return match known {
            Some(known) => connection(fd, &info, state, known),
            None => connection(fd, &info, state, &ahead(fd, what, None, diag)?.ok_or(gone)?),
        };
    }
    match info[0] {
        state::LISTEN => {
            let backlog = u32::from_ne_bytes(info[28..32].try_into().expect("four bytes"));
            // Nobody has looked at it before: a survey, an image, a listener that is new.
            refuse(fd, what, diag, true)?;
            Ok(Kind::TcpListener(Box::new(listener(fd, backlog)?)))
        }
        state::SYN_SENT => connecting(fd, what, diag),
        state::CLOSE if has_ended(fd)? => Ok(Kind::Tcp(Box::new(closed(fd)?))),
        state::CLOSE => idle(fd, libc::SOCK_STREAM),
        // SYN_RECV of a fast open, and what a socket passes through within one call.
        _ => Err(CaptureError::Transient("a TCP connection is opening or closing")),
    }
}

/// A connection whose connect(2) is under way. The kernel does not tell its remote address by
/// getpeername(2).
fn connecting(fd: BorrowedFd<'_>, what: &str, diag: &UnixDiag) -> Result<Kind, CaptureError> {
    let mut cookie = [0u8; 8];
    get(fd, libc::SOL_SOCKET, SO_COOKIE, &mut cookie)?;
    let local = local(fd)?;
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let rows = inet_diag::sockets(diag, family, 1 << state::SYN_SENT)?;
    let cookie = u64::from_ne_bytes(cookie);
    let row = rows.into_iter().find(|row| row.cookie == cookie);
    let row = row.ok_or(CaptureError::Transient("a TCP connection is opening"))?;
    if row.md5 {
        let why = "a TCP socket with TCP-MD5, whose keys cannot be carried over; plain TCP works";
        return Err(CaptureError::unsupported(what.into(), why.into()));
    }
    let options = options::all(fd, true)?;
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)?;
    let write_seq = set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
        .and_then(|()| get_i32(fd, libc::IPPROTO_TCP, TCP_QUEUE_SEQ));
    leave_repair(fd, &options)?;
    Ok(Kind::Tcp(Box::new(TcpConnection {
        state: TcpState::SynSent,
        remote: row.remote,
        write_seq: write_seq? as u32,
        ..empty(local, options)
    })))
}

/// TCP_MAXSEG of a socket that is not connected: what the program has set, or the default.
fn max_segment(fd: BorrowedFd<'_>) -> SysResult<i32> {
    const DEFAULT: i32 = 536;
    let value = get_i32(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)?;
    Ok(if value == DEFAULT { 0 } else { value })
}

/// Leaves repair mode, which clears SO_REUSEADDR, with everything as it was.
fn leave_repair(fd: BorrowedFd<'_>, options: &SocketOptions) -> SysResult<()> {
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    end_repair(fd, options)
}

/// The same with any queue selected.
fn end_repair(fd: BorrowedFd<'_>, options: &SocketOptions) -> SysResult<()> {
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WINDOW_PROBE)?;
    match options.reuse_addr {
        true => set_i32(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        false => Ok(()),
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
    let stream = kind == libc::SOCK_STREAM;
    let mut options = options::all(fd, stream)?;
    if stream {
        options.max_segment = max_segment(fd)?;
    }
    Ok(Kind::InetIdle(Box::new(InetIdle { v6, kind, local, options })))
}

/// What is left of a connection: what was received and not read, and whether it ended badly.
fn closed(fd: BorrowedFd<'_>) -> Result<TcpConnection, CaptureError> {
    let local = local(fd)?;
    Ok(TcpConnection {
        receive_queue: peek(fd, in_queue(fd)?)?,
        error: events(fd)? & libc::POLLERR != 0,
        ..empty(local, options::all(fd, true)?)
    })
}

fn empty(local: SocketAddr, options: SocketOptions) -> TcpConnection {
    TcpConnection {
        local,
        remote: SocketAddr::new(local.ip(), 0),
        state: TcpState::Closed,
        write_seq: 0,
        rcv_nxt: 0,
        send_queue: Vec::new(),
        receive_queue: Vec::new(),
        window: [0; 5],
        mss: 536,
        sack: false,
        window_scale: None,
        timestamp: None,
        options,
        shut_read: false,
        error: false,
    }
}

fn connection(
    fd: BorrowedFd<'_>,
    info: &[u8; 104],
    state: TcpState,
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
    let repaired = in_repair(fd, state);
    let grown = in_queue(fd).is_ok_and(|now| now != unread);
    leave_repair(fd, &options)?;
    let r = repaired?;
    if grown {
        // A segment that was inside the container's own network when its input was held.
        return Err(CaptureError::Transient("a TCP connection has just received data"));
    }
    let scales = (info[6] & 15, info[6] >> 4);
    let hung_up = events(fd)? & libc::POLLRDHUP != 0;
    Ok(Kind::Tcp(Box::new(TcpConnection {
        local,
        remote,
        state,
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
        shut_read: hung_up && !state.has_received_fin(),
        error: false,
    })))
}

struct Repaired {
    write_seq: u32,
    rcv_nxt: u32,
    send_queue: Vec<u8>,
    window: [u32; 5],
    mss: u32,
}

fn in_repair(fd: BorrowedFd<'_>, state: TcpState) -> SysResult<Repaired> {
    const TCP: i32 = libc::IPPROTO_TCP;
    // Our FIN has a sequence number and no byte.
    let fin = u32::from(state.has_sent_fin());
    let open = if state == TcpState::FinWait2 { 0 } else { fin as usize };
    let unacknowledged = out_queue(fd)?.saturating_sub(open);
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    let write_seq = get_i32(fd, TCP, TCP_QUEUE_SEQ);
    let mut send_queue = Vec::new();
    let read = peek_tail(fd, unacknowledged, &mut send_queue);
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    let rcv_nxt = get_i32(fd, TCP, TCP_QUEUE_SEQ);
    set_i32(fd, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let mut raw = [0u8; 20];
    get(fd, TCP, TCP_REPAIR_WINDOW, &mut raw)?;
    let word = |i: usize| u32::from_ne_bytes(raw[i * 4..i * 4 + 4].try_into().expect("4 bytes"));
    Ok(Repaired {
        write_seq: (write_seq? as u32).wrapping_sub(fin),
        rcv_nxt: rcv_nxt? as u32,
        send_queue: read.map(|()| send_queue)?,
        window: [word(0), word(1), word(2), word(3), word(4)],
        // In repair mode this is what the peer announced (mss_clamp).
        mss: get_i32(fd, TCP, libc::TCP_MAXSEG)? as u32,
    })
}

/// The last `len` bytes that a connection with these options has written; none of them is
/// acknowledged. In place of what is in `out`.
pub(super) fn unacknowledged(
    fd: BorrowedFd<'_>,
    len: usize,
    options: &SocketOptions,
    out: &mut Vec<u8>,
) -> Result<(), CaptureError> {
    set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)?;
    let bytes = set_i32(fd, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
        .and_then(|()| peek_tail(fd, len, out));
    // The queue counts only in repair mode, which begins with none the next time.
    end_repair(fd, options)?;
    match bytes {
        Err(e) if e.code() == libc::EIO => {
            Err(CaptureError::Transient("a TCP connection has just been acknowledged"))
        }
        other => Ok(other?),
    }
}

/// Copies `len` bytes of the selected queue and leaves them there.
pub(super) fn peek(fd: BorrowedFd<'_>, len: usize) -> SysResult<Vec<u8>> {
    let mut bytes = Vec::new();
    peek_into(fd, len, &mut bytes)?;
    Ok(bytes)
}

/// The same, in place of what is in `out`.
pub(super) fn peek_into(fd: BorrowedFd<'_>, len: usize, out: &mut Vec<u8>) -> SysResult<()> {
    out.clear();
    if len == 0 {
        return Ok(());
    }
    out.resize(len, 0);
    let n =
        recv(fd.as_raw_fd(), out, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).map_err(|e| {
            SysError::errno("recv(MSG_PEEK)", format!("fd {}", fd.as_raw_fd()), e as i32)
        })?;
    if n != len {
        let what = format!("fd {}: {n} of {len} bytes", fd.as_raw_fd());
        return Err(SysError::errno("recv(MSG_PEEK)", what, libc::EIO));
    }
    Ok(())
}

/// Copies the last `len` bytes of the send queue, which repair mode has selected. The kernel
/// copies from the head, which may hold bytes that were acknowledged already (a segment is freed
/// when all of it was), gives the length of all, and does not heed the length asked for.
fn peek_tail(fd: BorrowedFd<'_>, len: usize, bytes: &mut Vec<u8>) -> SysResult<()> {
    bytes.clear();
    if len == 0 {
        return Ok(());
    }
    bytes.resize(len, 0);
    loop {
        let n = recv(fd.as_raw_fd(), bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
            .map_err(|e| SysError::errno("recv(MSG_PEEK)", "a send queue", e as i32))?;
        if n < len {
            let what = format!("a send queue: {n} of {len} bytes");
            return Err(SysError::errno("recv(MSG_PEEK)", what, libc::EIO));
        }
        if n <= bytes.len() {
            bytes.truncate(n);
            bytes.drain(..n - len);
            return Ok(());
        }
        bytes.resize(n, 0);
    }
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
    let ip = Ipv6Addr::from(v6.ip().octets());
    Some(SocketAddrV6::new(ip, v6.port(), v6.flowinfo(), v6.scope_id()).into())
}
