//! TCP sockets that a glance ([`super::glance`]) shows: what rarely changes of them is read while
//! the container runs, and in the stop only what was sent or received since the last one.
//!
//! What is remembered counts for a socket only if the glance in the stop shows the same connection
//! (its cookie, addresses, what was agreed on) with the same options. Bytes of its queues that were
//! read at an earlier stop count as long as their sequence numbers say that they are the same: a
//! byte of a stream never changes.

use super::glance::Tcp;
use super::{CaptureError, tcp};
use crate::image::Kind;
use crate::image::net::{SocketOptions, TcpConnection, TcpListener, TcpState};
use crate::sys::sockopt::get;
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, SysResult};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
const SO_COOKIE: i32 = 57;
/// Longer queues are read at each stop, one by one.
const KEPT: usize = 8 << 20;
/// Memory that is not given back when a queue becomes short.
const ROOM: usize = 64 << 10;
/// Room for so much more than there is in a queue is made, at least.
const ANSWER: usize = 64;
/// More than any queue can hold: the numbers are not what they should be.
const ABSURD: u32 = 1 << 30;

/// Gives a buffer at least this room, and not many times as much.
fn fit(bytes: &mut Vec<u8>, room: usize) {
    bytes.reserve(room.saturating_sub(bytes.len()));
    if bytes.capacity() > ROOM.max(4 * room) {
        bytes.shrink_to(room);
    }
}

/// What is remembered of a TCP socket.
#[derive(Clone, Debug)]
pub(super) struct Remembered {
    record: Box<[u8]>,
    what: What,
    sent: Queue,
    received: Queue,
    /// A copy of the connection for the next stop, which saves it the time to make one.
    ready: Option<Box<TcpConnection>>,
    /// The same of a listener.
    listener: Option<Box<TcpListener>>,
}

#[derive(Clone, Debug)]
enum What {
    /// As far as it rarely changes.
    Connection(Box<TcpConnection>),
    Listener(TcpListener),
}

/// The last bytes of a stream that were in a queue, and the sequence number behind them.
#[derive(Clone, Debug, Default)]
struct Queue {
    end: u32,
    bytes: Vec<u8>,
}

impl Queue {
    /// The bytes from `start` to `end`, if they are all here.
    fn get(&self, start: u32, end: u32) -> Option<&[u8]> {
        let len = end.wrapping_sub(start) as usize;
        let from = self.bytes.len().checked_sub(len)?;
        (end == self.end).then(|| &self.bytes[from..])
    }

    /// How far the bytes from `start` to `end` are here.
    fn reaches(&self, start: u32, end: u32) -> u32 {
        let missing = end.wrapping_sub(self.end);
        let here = end.wrapping_sub(start).checked_sub(missing).map(|here| here as usize);
        if here.is_some_and(|here| here <= self.bytes.len()) { self.end } else { start }
    }

    /// Adds bytes that begin at `start`, which may be here in part, and forgets what is before `una`, if it is
    /// much.
    fn add(&mut self, una: u32, start: u32, bytes: &[u8]) {
        let end = start.wrapping_add(bytes.len() as u32);
        if self.reaches(una, start) == start && start != una {
            let unneeded = self.bytes.len() - start.wrapping_sub(una) as usize;
            // What is left is moved, which is worth it if it is the smaller part.
            if unneeded > self.bytes.len() / 2 {
                self.bytes.drain(..unneeded);
            }
            self.bytes.extend_from_slice(bytes);
            self.end = end;
        } else {
            self.keep(end, bytes);
        }
    }

    /// Makes room for a little more than there is; gives how much there is room for. Much more is given back.
    fn make_room(&mut self) -> usize {
        let room = self.bytes.len() + (self.bytes.len() / 4).max(ANSWER);
        fit(&mut self.bytes, room);
        room
    }

    fn keep(&mut self, end: u32, bytes: &[u8]) {
        self.bytes.clear();
        // What is not kept must not look like an empty queue with this end.
        self.end = if bytes.len() <= KEPT { end } else { end.wrapping_sub(ABSURD) };
        if bytes.len() <= KEPT {
            self.bytes.extend_from_slice(bytes);
        }
    }
}

/// Reads what is to be remembered of a socket, while the container runs. `seen` was seen before.
/// None for one in a state that passes.
pub(super) fn remember(
    fd: BorrowedFd<'_>,
    seen: Tcp<'_>,
    what: &str,
    diag: &UnixDiag,
) -> Result<Option<Remembered>, CaptureError> {
    let mut cookie = [0u8; 8];
    get(fd, libc::SOL_SOCKET, SO_COOKIE, &mut cookie)?;
    let what = match seen.state() {
        LISTEN => What::Listener(tcp::listener_ahead(fd, what, diag)?),
        ESTABLISHED => match tcp::ahead(fd, what, None, diag)? {
            Some(tcp::Ahead { local, remote, options }) => {
                What::Connection(Box::new(rarely_changes(seen, local, remote, options)))
            }
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    let record = seen.with_cookie(u64::from_ne_bytes(cookie));
    let (sent, received) = Default::default();
    let mut remembered = Remembered { record, what, sent, received, ready: None, listener: None };
    remembered.make_ready();
    Ok(Some(remembered))
}

/// A connection without what changes from one stop to the next.
fn rarely_changes(
    seen: Tcp<'_>,
    local: SocketAddr,
    remote: SocketAddr,
    options: SocketOptions,
) -> TcpConnection {
    TcpConnection {
        local,
        remote,
        state: TcpState::Established,
        write_seq: 0,
        rcv_nxt: 0,
        send_queue: Vec::new(),
        receive_queue: Vec::new(),
        window: [0; 5],
        mss: seen.peer_segment(),
        sack: seen.sack(),
        window_scale: seen.scales(),
        timestamp: None,
        options,
        shut_read: false,
        error: false,
    }
}

impl Remembered {
    /// Whether it counts for what is seen now.
    pub(super) fn is_of(&self, seen: Tcp<'_>) -> bool {
        let state = match self.what {
            What::Connection(_) => ESTABLISHED,
            What::Listener(_) => LISTEN,
        };
        seen.state() == state
            && seen.is_of(&self.record)
            && seen.has_options_of(&self.record)
            && !seen.is_special()
    }

    /// Which bytes of its send queue would have to be read now, if it is a connection with a queue that is worth to be
    /// kept: from this sequence number to that.
    pub(super) fn lacks(&self, seen: Tcp<'_>) -> Option<(u32, u32)> {
        let What::Connection(_) = &self.what else { return None };
        let (write_seq, una) = seen.sent();
        let len = write_seq.wrapping_sub(una) as usize;
        let from = self.sent.reaches(una, write_seq);
        (len > 0 && len <= KEPT && from != write_seq).then_some((from, write_seq))
    }

    /// Bytes of its send queue, which begin at `start`; the queue itself at `una`, as far as that was seen.
    pub(super) fn learn(&mut self, una: u32, start: u32, bytes: &[u8]) {
        self.sent.add(una, start, bytes);
    }

    /// Makes the copy that the next stop takes, if it is not there. True, for chains of conditions.
    pub(super) fn make_ready(&mut self) -> bool {
        if let What::Connection(it) = &self.what {
            let connection = self.ready.get_or_insert_with(|| it.clone());
            // With room for what was in its queues of late, and a little more.
            fit(&mut connection.send_queue, self.sent.make_room());
            fit(&mut connection.receive_queue, self.received.make_room());
        }
        true
    }

    /// The same for a listener.
    pub(super) fn make_listener_ready(&mut self) {
        if let What::Listener(it) = &self.what {
            self.listener.get_or_insert_with(|| Box::new(it.clone()));
        }
    }

    /// The connection as it is now, for which [`Remembered::is_of`] was true, if nothing is in its
    /// queues. It counts, but for its timestamp, as long as a glance shows the same.
    pub(super) fn at_rest(&mut self, seen: Tcp<'_>) -> Option<Box<TcpConnection>> {
        let ((written, una), (next, copied)) = (seen.sent(), seen.received());
        if written != una || next != copied || matches!(self.what, What::Listener(_)) {
            return None;
        }
        let nothing = || Err(SysError::errno("open", "a queue without bytes", libc::ENODATA));
        match self.take(seen, nothing) {
            Ok(Kind::Tcp(connection)) => Some(connection),
            _ => None,
        }
    }

    /// Takes back what [`Remembered::at_rest`] gave.
    pub(super) fn give_back(&mut self, connection: Box<TcpConnection>) {
        self.ready = Some(connection);
    }

    /// The socket as it is in a stop, for which [`Remembered::is_of`] was true. `open` gives a
    /// duplicate of its descriptor, if one is needed.
    pub(super) fn take(
        &mut self,
        seen: Tcp<'_>,
        open: impl Fn() -> SysResult<OwnedFd>,
    ) -> Result<Kind, CaptureError> {
        let mut connection = match &self.what {
            What::Listener(l) => {
                let mut listener = self.listener.take().unwrap_or_else(|| Box::new(l.clone()));
                listener.backlog = seen.backlog();
                options_now(seen, &mut listener.options);
                return Ok(Kind::TcpListener(listener));
            }
            What::Connection(it) => self.ready.take().unwrap_or_else(|| it.clone()),
        };
        let (write_seq, una) = seen.sent();
        let (rcv_nxt, copied) = seen.received();
        let (unacknowledged, unread) = (write_seq.wrapping_sub(una), rcv_nxt.wrapping_sub(copied));
        if unacknowledged > ABSURD || unread > ABSURD {
            return Err(CaptureError::Transient("a TCP connection is changing"));
        }
        let mut dup = None;
        connection.receive_queue.clear();
        match self.received.get(copied, rcv_nxt) {
            _ if unread == 0 => {}
            Some(bytes) => connection.receive_queue.extend_from_slice(bytes),
            None => {
                let fd = dup.insert(open()?);
                tcp::peek_into(fd.as_fd(), unread as usize, &mut connection.receive_queue)?;
                self.received.keep(rcv_nxt, &connection.receive_queue);
            }
        }
        connection.send_queue.clear();
        match self.sent.get(una, write_seq) {
            _ if unacknowledged == 0 => {}
            Some(bytes) => connection.send_queue.extend_from_slice(bytes),
            None => {
                let fd = match dup {
                    Some(fd) => fd,
                    None => open()?,
                };
                let (len, queue) = (unacknowledged as usize, &mut connection.send_queue);
                tcp::unacknowledged(fd.as_fd(), len, &connection.options, queue)?;
                self.sent.keep(write_seq, queue);
            }
        }
        options_now(seen, &mut connection.options);
        (connection.write_seq, connection.rcv_nxt) = (write_seq, rcv_nxt);
        connection.window = seen.window();
        connection.timestamp = seen.timestamp();
        connection.shut_read = seen.is_shut_for_reading();
        Ok(Kind::Tcp(connection))
    }
}

/// The options that a glance shows.
fn options_now(seen: Tcp<'_>, options: &mut SocketOptions) {
    options.buffers = seen.buffers();
    (options.no_delay, options.cork) = seen.delays();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read before the stop, and the rest in it.
    #[test]
    fn a_queue_grows_by_what_is_read_of_it() {
        let first = u32::MAX - 3;
        let mut queue = Queue::default();
        assert_eq!(queue.reaches(first, 2), first, "nothing is here");
        queue.add(first, first, b"abcdef");
        assert_eq!((queue.reaches(first, 2), queue.get(first, 2)), (2, Some(&b"abcdef"[..])));
        assert_eq!(queue.reaches(first, 9), 2, "more was written");
        assert_eq!(queue.reaches(first.wrapping_sub(1), 9), first.wrapping_sub(1), "not all");
        assert_eq!(queue.reaches(3, 9), 3, "all of it was acknowledged");
        queue.add(0, 2, b"ghi");
        assert_eq!(queue.get(0, 5), Some(&b"efghi"[..]));
        assert_eq!(queue.get(first, 5), None, "forgotten");
        // Some were acknowledged while they were read.
        queue.add(0, 6, b"kl");
        assert_eq!((queue.get(6, 8), queue.get(5, 8)), (Some(&b"kl"[..]), None));
        queue.keep(20, &vec![1; KEPT + 1]);
        assert_eq!(queue.reaches(10, 30), 10, "not kept");
    }

    #[test]
    fn bytes_count_only_with_their_sequence_numbers() {
        let mut queue = Queue::default();
        queue.keep(5, b"hello");
        assert_eq!(queue.get(0, 5), Some(&b"hello"[..]));
        assert_eq!(queue.get(3, 5), Some(&b"lo"[..]), "some were acknowledged");
        assert_eq!(queue.get(5, 5), Some(&b""[..]));
        assert_eq!(queue.get(0, 6), None, "one more was written");
        assert_eq!(queue.get(5, 10), None, "as many others were written");
        assert_eq!(queue.get(u32::MAX, 5), None, "more than was read");
        queue.keep(2, b"wrapped");
        assert_eq!(queue.get(u32::MAX, 2), Some(&b"ped"[..]));
        let long = vec![1; KEPT + 1];
        queue.keep(9, &long);
        assert_eq!(queue.get(9, 9), None);
        assert_eq!(queue.get(8, 9), None, "not kept");
    }
}
