//! Established TCP connections, put together in repair mode (tcp(7), TCP_REPAIR).
//!
//! What was written and not acknowledged comes back in one of two ways. If the peer has told
//! what it expects next, that much counts as acknowledged and the rest is written once more by
//! plain send(2) after repair mode: it leaves at once, with timers as for new data. Otherwise the
//! queue is put back as sent: the kernel will retransmit it when its timer runs out.

use super::error::sys;
use super::sockets;
use crate::image::net::{TcpConnection, TcpState};
use crate::sys::{SysResult, sockopt};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, Shutdown, SockaddrStorage, connect, send, shutdown};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

const TCP: i32 = libc::IPPROTO_TCP;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Leaves repair mode without a window probe.
const REPAIR_OFF_NO_PROBE: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// The least and the largest TCP_MAXSEG.
const SEGMENT_SIZES: (u32, u32) = (88, 32_767);
/// Most bytes put into a queue by one call.
const CHUNK: usize = 32 << 10;

/// What is known of the other side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It expects this sequence number next.
    Expects(u32),
    /// It has not answered.
    Silent,
    /// It knows nothing of the connection (it answered with a reset).
    Gone,
}

/// What the gateway must send to a restored container in the peer's name, so that the container
/// learns what it knew before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The container's side: the destination.
    pub local: SocketAddr,
    /// The peer: the source.
    pub remote: SocketAddr,
    /// Sequence number of the FIN or RST.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
}

/// How a connection's queue comes back.
#[derive(Debug, PartialEq, Eq)]
struct Split<'a> {
    /// First sequence number not acknowledged.
    una: u32,
    /// Put back as sent.
    sent: &'a [u8],
    /// Written anew, after repair mode.
    unsent: &'a [u8],
}

fn split(c: &TcpConnection, peer: Peer) -> Split<'_> {
    let queue = c.send_queue.as_slice();
    let una = c.write_seq.wrapping_sub(queue.len() as u32);
    match peer {
        // It has our FIN, which comes after all bytes.
        _ if has_all(c, peer) => Split { una: c.write_seq, sent: &[], unsent: &[] },
        Peer::Expects(next) => match queue.get(next.wrapping_sub(una) as usize..) {
            Some(rest) => Split { una: next, sent: &[], unsent: rest },
            // It expects what was never written here (or was acknowledged long ago): an old or
            // wrong answer is none.
            None => Split { una, sent: queue, unsent: &[] },
        },
        Peer::Silent => Split { una, sent: queue, unsent: &[] },
        Peer::Gone => Split { una: c.write_seq, sent: &[], unsent: &[] },
    }
}

/// Whether the peer is known to have received everything and our FIN.
pub(super) fn has_all(c: &TcpConnection, peer: Peer) -> bool {
    match peer {
        Peer::Expects(next) => c.state.has_sent_fin() && next == c.write_seq.wrapping_add(1),
        // A peer that both sides have said farewell to, with nothing left to say, is gone because
        // it got our FIN.
        Peer::Gone => {
            matches!(c.state, TcpState::Closing | TcpState::LastAck) && c.send_queue.is_empty()
        }
        Peer::Silent => c.state == TcpState::FinWait2,
    }
}

/// A connection restored.
pub(super) struct Connected {
    /// Bytes to be written once the network is there.
    pub(super) unsent: Vec<u8>,
    /// Our next sequence number as the peer will see it acknowledged.
    pub(super) una: u32,
    /// Sequence number expected from the peer, its FIN not counted.
    pub(super) rcv_nxt: u32,
}

/// Connects a fresh socket of the right family, without a packet. `elapsed` is the time since the
/// checkpoint.
pub(super) fn restore(
    fd: &OwnedFd,
    c: &TcpConnection,
    peer: Peer,
    elapsed: Duration,
) -> SysResult<Connected> {
    let socket = fd.as_fd();
    let split = split(c, peer);
    if c.state == TcpState::SynSent {
        return prepare_to_dial(fd, c);
    }
    // The peer's FIN takes a sequence number; it is received anew.
    let fin = u32::from(c.state.has_received_fin());
    let rcv_nxt = c.rcv_nxt.wrapping_sub(fin);
    let set = |name, value| sockopt::set_i32(socket, TCP, name, value);
    set(TCP_REPAIR, 1)?;
    set(TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    set(TCP_QUEUE_SEQ, split.una as i32)?;
    set(TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    set(TCP_QUEUE_SEQ, rcv_nxt.wrapping_sub(c.receive_queue.len() as u32) as i32)?;
    // No SO_REUSEADDR here: it would undo what repair mode allows, and bind would fail beside a
    // listener.
    sockets::before_bind(socket, &c.options, c.local.is_ipv6(), true)?;
    sockets::bind_to(fd, c.local)?;
    let to = SockaddrStorage::from(c.remote);
    let object = || format!("{} from {} (is there a route?)", c.remote, c.local);
    // The size of segments is worked out when it connects and not when the option below tells
    // what the peer takes: without this it would stay at the least.
    set(libc::TCP_MAXSEG, c.mss.clamp(SEGMENT_SIZES.0, SEGMENT_SIZES.1) as i32)?;
    sys(connect(fd.as_raw_fd(), &to), "connect", object)?;
    set(libc::TCP_MAXSEG, 0)?;
    sockopt::set(socket, TCP, TCP_REPAIR_OPTIONS, &agreed(c))?;
    if c.mss > SEGMENT_SIZES.1 && c.local.is_ipv4() {
        // Over the loopback segments are larger; a change of IP options works it out again.
        sockopt::set(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &[])?;
    }
    if let Some(then) = c.timestamp {
        set(TCP_TIMESTAMP, clock(then, elapsed) as i32)?;
    }
    sockets::set_buffers(socket, &c.options)?;
    fill(fd, RECEIVE_QUEUE, &c.receive_queue)?;
    let room = grow_send_buffer(socket, split.sent.len())?;
    fill(fd, SEND_QUEUE, split.sent)?;
    if let Some(before) = room {
        restore_send_buffer(socket, before)?;
    }
    set(TCP_REPAIR_QUEUE, 0)?;
    sockopt::set(socket, TCP, TCP_REPAIR_WINDOW, &window(c, rcv_nxt))?;
    set(TCP_REPAIR, REPAIR_OFF_NO_PROBE)?;
    sockets::set_options(socket, &c.options, true)?;
    Ok(Connected { unsent: split.unsent.to_vec(), una: split.una, rcv_nxt })
}

/// A socket that will send the SYN of the checkpoint again, with the same sequence number: the
/// peer may have answered the first one, and no answer to that can have left.
fn prepare_to_dial(fd: &OwnedFd, c: &TcpConnection) -> SysResult<Connected> {
    let socket = fd.as_fd();
    let set = |name, value| sockopt::set_i32(socket, TCP, name, value);
    let first = c.write_seq.wrapping_sub(1);
    set(TCP_REPAIR, 1)?;
    set(TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    set(TCP_QUEUE_SEQ, first as i32)?;
    set(TCP_REPAIR_QUEUE, 0)?;
    sockets::before_bind(socket, &c.options, c.local.is_ipv6(), true)?;
    sockets::bind_to(fd, c.local)?;
    set(TCP_REPAIR, REPAIR_OFF_NO_PROBE)?;
    sockets::set_options(socket, &c.options, true)?;
    Ok(Connected { unsent: Vec::new(), una: c.write_seq, rcv_nxt: 0 })
}

/// Begins to connect, without waiting for the answer.
fn dial(fd: &OwnedFd, c: &TcpConnection) -> SysResult<()> {
    let object = || format!("{} from {} (is there a route?)", c.remote, c.local);
    let flags = sys(fcntl(fd, FcntlArg::F_GETFL), "F_GETFL", object)?;
    let set = |flags| sys(fcntl(fd, FcntlArg::F_SETFL(flags)), "F_SETFL", object).map(drop);
    let flags = OFlag::from_bits_retain(flags);
    set(flags | OFlag::O_NONBLOCK)?;
    let result = connect(fd.as_raw_fd(), &SockaddrStorage::from(c.remote));
    set(flags)?;
    match result {
        Err(nix::errno::Errno::EINPROGRESS) => Ok(()),
        other => sys(other, "connect", object),
    }
}

/// What a restored connection does as soon as the network is there: it sends what its peer has
/// not got, and closes the sides that the program has closed.
pub(super) fn go_on(fd: &OwnedFd, c: &TcpConnection, unsent: &[u8]) -> SysResult<()> {
    if c.state == TcpState::SynSent {
        return dial(fd, c);
    }
    if !unsent.is_empty() {
        push(fd, unsent)?;
    }
    if c.shut_read {
        shut(fd, Shutdown::Read)?;
    }
    // A peer that closed first must be heard first.
    if c.state.has_sent_fin() && c.state != TcpState::LastAck {
        shut(fd, Shutdown::Write)?;
    }
    Ok(())
}

/// Whether [`go_on`] has something to do.
pub(super) fn is_unfinished(c: &TcpConnection, unsent: &[u8]) -> bool {
    c.state == TcpState::SynSent || c.state.has_sent_fin() || c.shut_read || !unsent.is_empty()
}

/// Closes a side.
pub(super) fn shut(fd: &OwnedFd, how: Shutdown) -> SysResult<()> {
    match shutdown(fd.as_raw_fd(), how) {
        // The peer has reset it meanwhile.
        Err(nix::errno::Errno::ENOTCONN) => Ok(()),
        other => sys(other, "shutdown", || format!("{how:?}")),
    }
}

/// struct tcp_repair_opt for what the two sides agreed on.
fn agreed(c: &TcpConnection) -> Vec<u8> {
    const MSS: u32 = 2;
    const WINDOW: u32 = 3;
    const SACK_PERMITTED: u32 = 4;
    const TIMESTAMP: u32 = 8;
    let mut words = vec![MSS, c.mss];
    if let Some((theirs, ours)) = c.window_scale {
        words.extend([WINDOW, u32::from(theirs) | u32::from(ours) << 16]);
    }
    if c.sack {
        words.extend([SACK_PERMITTED, 0]);
    }
    if c.timestamp.is_some() {
        words.extend([TIMESTAMP, 0]);
    }
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// The timestamp clock now. Its lowest bit is a flag to setsockopt: whether it counts
/// microseconds instead of milliseconds.
fn clock(then: u32, elapsed: Duration) -> u32 {
    let passed = if then & 1 == 1 { elapsed.as_micros() } else { elapsed.as_millis() };
    (then.wrapping_add(passed as u32) & !1) | (then & 1)
}

/// struct tcp_repair_window, with nothing in it beyond `rcv_nxt`, as the kernel demands.
fn window(c: &TcpConnection, rcv_nxt: u32) -> Vec<u8> {
    let [wl1, wnd, max, rcv_wnd, rcv_wup] = c.window;
    let at_most = |seq: u32, limit: u32| {
        if (limit.wrapping_sub(seq) as i32) < 0 { limit } else { seq }
    };
    let wup = at_most(rcv_wup, rcv_nxt);
    let words = [at_most(wl1, rcv_nxt.wrapping_add(rcv_wnd)), wnd, max.max(wnd), rcv_wnd, wup];
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// Puts bytes into a queue of a socket in repair mode.
fn fill(fd: &OwnedFd, queue: i32, bytes: &[u8]) -> SysResult<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    sockopt::set_i32(fd.as_fd(), TCP, TCP_REPAIR_QUEUE, queue)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(CHUNK)];
        let object = || format!("{} of {} bytes for queue {queue}", rest.len(), bytes.len());
        let n = sys(send(fd.as_raw_fd(), part, MsgFlags::MSG_DONTWAIT), "send", object)?;
        rest = &rest[n..];
    }
    Ok(())
}

/// Makes room for this many bytes in the send buffer; gives what it was if it had to grow.
fn grow_send_buffer(socket: BorrowedFd<'_>, bytes: usize) -> SysResult<Option<(i32, i32)>> {
    const SO_BUF_LOCK: i32 = 72;
    let size = sockopt::get_i32(socket, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    // Segments are charged with up to about twice their bytes.
    let need = 4 * bytes + 65536;
    if bytes == 0 || size as usize >= need {
        return Ok(None);
    }
    let lock = sockopt::get_i32(socket, libc::SOL_SOCKET, SO_BUF_LOCK)?;
    let half = (need / 2).min(i32::MAX as usize / 2) as i32;
    sockopt::set_i32(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, half)?;
    Ok(Some((size, lock)))
}

fn restore_send_buffer(socket: BorrowedFd<'_>, (size, lock): (i32, i32)) -> SysResult<()> {
    const SO_BUF_LOCK: i32 = 72;
    sockopt::set_i32(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size / 2)?;
    sockopt::set_i32(socket, libc::SOL_SOCKET, SO_BUF_LOCK, lock)
}

/// Writes what the peer has not got, at once and in order.
fn push(fd: &OwnedFd, bytes: &[u8]) -> SysResult<()> {
    let socket = fd.as_fd();
    let room = grow_send_buffer(socket, bytes.len())?;
    let no_delay = sockopt::get_i32(socket, TCP, libc::TCP_NODELAY)?;
    sockopt::set_i32(socket, TCP, libc::TCP_NODELAY, 1)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(fd.as_raw_fd(), rest, flags) {
            Ok(n) => rest = &rest[n..],
            // The peer has reset it meanwhile: the program will see that.
            Err(nix::errno::Errno::EPIPE | nix::errno::Errno::ECONNRESET) => break,
            Err(e) => return sys(Err(e), "send", || format!("{} unsent bytes", rest.len())),
        }
    }
    sockopt::set_i32(socket, TCP, libc::TCP_NODELAY, no_delay)?;
    match room {
        Some(before) => restore_send_buffer(socket, before),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::net::SocketOptions;

    fn connection() -> TcpConnection {
        TcpConnection {
            local: "10.0.0.1:80".parse().expect("address"),
            remote: "10.0.0.2:999".parse().expect("address"),
            state: TcpState::Established,
            write_seq: 2,
            rcv_nxt: 100,
            send_queue: b"abcdef".to_vec(),
            receive_queue: vec![],
            window: [99, 10, 5, 1000, 101],
            mss: 1460,
            sack: true,
            window_scale: Some((7, 9)),
            timestamp: Some(1000),
            options: SocketOptions::default(),
            shut_read: false,
            error: false,
        }
    }

    #[test]
    fn what_the_peer_has_is_not_sent_again() {
        let c = connection();
        // The queue spans the wrap of sequence numbers: -4 to 1.
        let una = 2u32.wrapping_sub(6);
        let all = Split { una, sent: b"abcdef", unsent: b"" };
        assert_eq!(split(&c, Peer::Silent), all);
        assert_eq!(split(&c, Peer::Expects(una)), Split { una, sent: b"", unsent: b"abcdef" });
        assert_eq!(split(&c, Peer::Expects(0)), Split { una: 0, sent: b"", unsent: b"ef" });
        assert_eq!(split(&c, Peer::Expects(2)), Split { una: 2, sent: b"", unsent: b"" });
        assert_eq!(split(&c, Peer::Expects(3)), all, "nobody can expect that");
        assert_eq!(split(&c, Peer::Expects(una.wrapping_sub(1))), all);
        assert_eq!(split(&c, Peer::Gone), Split { una: 2, sent: b"", unsent: b"" });
    }

    #[test]
    fn a_fin_of_ours_counts_as_the_last_thing_that_the_peer_may_have() {
        let c = TcpConnection { state: TcpState::FinWait1, ..connection() };
        let all = Split { una: 2, sent: b"", unsent: b"" };
        assert_eq!(split(&c, Peer::Expects(3)), all);
        assert!(has_all(&c, Peer::Expects(3)) && !has_all(&c, Peer::Expects(2)));
        assert!(!has_all(&c, Peer::Gone), "it may have gone without the rest");
        let last = TcpConnection { state: TcpState::LastAck, send_queue: vec![], ..connection() };
        assert!(has_all(&last, Peer::Gone) && !has_all(&last, Peer::Silent));
    }

    #[test]
    fn the_window_stays_within_what_the_kernel_takes() {
        let words: Vec<u32> = window(&connection(), 100)
            .chunks(4)
            .map(|w| u32::from_ne_bytes(w.try_into().expect("four bytes")))
            .collect();
        assert_eq!(words, [99, 10, 10, 1000, 100]);
    }

    #[test]
    fn the_timestamp_clock_keeps_its_unit() {
        assert_eq!(clock(1000, Duration::from_millis(7)), 1006);
        assert_eq!(clock(1001, Duration::from_millis(7)), 8001);
    }
}
