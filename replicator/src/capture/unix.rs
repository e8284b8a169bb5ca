//! Unix sockets. What one descriptor shows is read when the descriptor is met; who is connected
//! to whom, and what waits in the queues, once all of them are known ([`Sockets::join`],
//! [`Sockets::queues`]).
//!
//! Messages are copied by peeking at growing offsets (SO_PEEK_OFF), which keeps their boundaries
//! and gives duplicates of the descriptors that travel with them.

use super::{CaptureError, options};
use crate::image::State;
use crate::image::net::RawOptions;
use crate::image::unix::{UnixCredentials, UnixLink, UnixMessage, UnixName, UnixSocket};
use crate::sys::messages::{self, Peeked};
use crate::sys::sockopt::{get, get_i32, out_queue, set_i32};
use crate::sys::unix_diag::{UnixDiag, UnixSeen};
use crate::sys::{SysError, SysResult};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{UnixAddr, getpeername};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const SOCKET: i32 = libc::SOL_SOCKET;
const IFMT: u32 = libc::S_IFMT;
/// Bytes of a queue that are copied at once.
const PIECE: usize = 64 << 10;

/// Inodes of sockets with an empty message in their queue. The kernel shows such a message to a
/// peek at an offset only once.
pub(super) type Empties = HashSet<u32>;

/// The unix sockets of one checkpoint.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Index by inode, of sockets that were met and of the peers of those.
    index: HashMap<u32, u32>,
    /// For each index: how it was met, if it was.
    met: Vec<Option<Met>>,
}

#[derive(Debug)]
struct Met {
    inode: u32,
    dup: OwnedFd,
    what: String,
    pending: Vec<u32>,
    unread: usize,
    readable: bool,
    error: bool,
}

/// What a descriptor is, for [`Sockets::add`].
pub(super) struct Found<'a> {
    pub(super) dup: OwnedFd,
    pub(super) inode: u32,
    pub(super) kind: i32,
    pub(super) options: Option<RawOptions>,
    /// A process that holds it.
    pub(super) pid: i32,
    pub(super) what: &'a str,
    pub(super) diag: &'a UnixDiag,
    pub(super) inner: &'a HashMap<i32, i32>,
}

impl Sockets {
    /// Reads what the descriptor shows; gives the socket's index.
    pub(super) fn add(&mut self, f: Found<'_>, state: &mut State) -> Result<u32, CaptureError> {
        let what = || f.what.to_owned();
        let seen = f.diag.look(f.inode).map_err(|e| match e.code() {
            libc::ENOENT => CaptureError::unsupported(
                what(),
                "a unix socket of another network namespace; run it without".into(),
            ),
            _ => e.into(),
        })?;
        let fd = f.dup.as_fd();
        let events = readiness(fd)?;
        let link = match (seen.backlog, seen.peer) {
            (Some(backlog), _) => UnixLink::Listening { backlog, pending: Vec::new() },
            (None, None) => UnixLink::None,
            (None, Some(0)) => UnixLink::Closed {
                name: getpeername::<UnixAddr>(fd.as_raw_fd()).ok().and_then(|a| name_of(&a)),
                reset: events.contains(PollFlags::POLLERR),
            },
            (None, Some(peer)) => UnixLink::Peer(self.index_of(peer, state)),
        };
        let at = self.index_of(f.inode, state);
        let name = seen.name.as_ref().map(|n| name(n, &seen, f.pid, f.what)).transpose()?;
        let options = match f.options {
            Some(options) => options,
            None => options::read(fd, (libc::AF_UNIX, f.kind, 0), f.what)?,
        };
        state.unix_sockets[at as usize] = UnixSocket {
            kind: f.kind,
            name,
            link,
            shut: seen.shut,
            queue: Vec::new(),
            peer: peer_credentials(fd, f.inner)?,
            options,
        };
        let readable = seen.backlog.is_none()
            && (seen.unread > 0
                || f.kind != libc::SOCK_STREAM && events.contains(PollFlags::POLLIN));
        self.met[at as usize] = Some(Met {
            inode: f.inode,
            dup: f.dup,
            what: f.what.to_owned(),
            pending: seen.pending,
            unread: seen.unread as usize,
            readable,
            error: events.contains(PollFlags::POLLERR),
        });
        Ok(at)
    }

    fn index_of(&mut self, inode: u32, state: &mut State) -> u32 {
        *self.index.entry(inode).or_insert_with(|| {
            state.unix_sockets.push(UnixSocket::default());
            self.met.push(None);
            self.met.len() as u32 - 1
        })
    }

    /// How many sockets were met or named so far.
    pub(super) fn len(&self) -> usize {
        self.met.len()
    }

    /// Copies the queue of one socket. Gives its messages and, for each, the descriptors that
    /// travel with it.
    pub(super) fn queue(
        &self,
        at: usize,
        state: &State,
        empties: &mut Empties,
        inner: &HashMap<i32, i32>,
    ) -> Result<Vec<(UnixMessage, Vec<OwnedFd>)>, CaptureError> {
        let Some(met) = &self.met[at] else { return Ok(Vec::new()) };
        if !met.readable {
            empties.remove(&met.inode);
            return Ok(Vec::new());
        }
        let socket = &state.unix_sockets[at];
        if met.error && socket.kind != libc::SOCK_STREAM {
            return Err(CaptureError::Transient("a unix socket has an error to tell"));
        }
        let fd = met.dup.as_fd();
        let before = get_i32(fd, SOCKET, libc::SO_PEEK_OFF)?;
        // Behind the last byte an error may wait, which a look would take away.
        let end = (socket.kind != libc::SOCK_DGRAM).then_some(met.unread);
        let peeked = peek_all(fd, end);
        set_i32(fd, SOCKET, libc::SO_PEEK_OFF, before)?;
        let peeked = peeked?;
        let stream = socket.kind == libc::SOCK_STREAM;
        let is_shut = socket.shut & 1 != 0;
        let empty = !stream && peeked.iter().any(|m| m.bytes.is_empty());
        let hidden = peeked.is_empty() && !is_shut;
        if !stream && (empty || hidden || empties.contains(&met.inode)) {
            empties.insert(met.inode);
            return Err(CaptureError::Transient("a unix socket has an empty message queued"));
        }
        let copied: usize = peeked.iter().map(|m| m.bytes.len()).sum();
        if socket.kind != libc::SOCK_DGRAM && copied != met.unread {
            return Err(CaptureError::Transient("the queue of a unix socket is changing"));
        }
        let message = |m: Peeked| {
            let credentials = m.credentials.map(|(pid, uid, gid)| UnixCredentials {
                pid: inner.get(&pid).copied().unwrap_or(0),
                uid,
                gid,
            });
            let from = (socket.kind == libc::SOCK_DGRAM).then(|| name_in(&m.from)).flatten();
            (UnixMessage { bytes: m.bytes, from, rights: Vec::new(), credentials }, m.rights)
        };
        Ok(peeked.into_iter().map(message).collect())
    }

    /// Once all are known: connections that wait to be accepted, and peers that nobody here holds.
    pub(super) fn join(&self, state: &mut State) -> Result<(), CaptureError> {
        for (at, met) in self.met.iter().enumerate() {
            let Some(met) = met else { continue };
            let mut waiting = Vec::new();
            for inode in &met.pending {
                let asking = self.index.get(inode).map(|i| *i as usize);
                let Some((i, asker)) = asking.and_then(|i| Some((i, self.met[i].as_ref()?))) else {
                    if *inode == 0 {
                        return Err(CaptureError::Transient(
                            "a unix connection that was given up waits to be accepted",
                        ));
                    }
                    let why = "a connection from outside the container waits at it";
                    return Err(CaptureError::unsupported(met.what.clone(), why.into()));
                };
                if out_queue(asker.dup.as_fd())? > 0 {
                    return Err(CaptureError::Transient(
                        "a unix connection has sent data and waits to be accepted",
                    ));
                }
                state.unix_sockets[i].link = UnixLink::Pending;
                waiting.push(i as u32);
            }
            if let UnixLink::Listening { pending, .. } = &mut state.unix_sockets[at].link {
                *pending = waiting;
            }
        }
        for socket in &state.unix_sockets {
            // A connection whose other side was closed is shut both ways.
            let closed = matches!(socket.link, UnixLink::Closed { .. });
            if closed && socket.kind != libc::SOCK_DGRAM && socket.shut != 3 {
                return Err(CaptureError::Transient(
                    "a unix connection waits to be accepted outside the container",
                ));
            }
        }
        for (at, met) in self.met.iter().enumerate() {
            if let (Some(met), UnixLink::Peer(peer)) = (met, &state.unix_sockets[at].link)
                && self.met[*peer as usize].is_none()
            {
                let peer = getpeername::<UnixAddr>(met.dup.as_raw_fd()).ok();
                let name = peer.and_then(|a| name_of(&a)).map_or_else(
                    || "without a name".to_owned(),
                    |n| format!("at {}", String::from_utf8_lossy(&n).replace('\0', "@")),
                );
                let why = format!(
                    "a unix socket that is connected to one outside the container ({name}); \
                     use TCP, or run the other side in the container too"
                );
                return Err(CaptureError::unsupported(met.what.clone(), why));
            }
        }
        Ok(())
    }
}

/// Whether it can be read, and whether it has an error to tell.
pub(super) fn readiness(fd: BorrowedFd<'_>) -> SysResult<PollFlags> {
    let mut one = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut one, PollTimeout::ZERO).map_err(|e| SysError::errno("poll", "a socket", e as i32))?;
    Ok(one[0].revents().unwrap_or(PollFlags::empty()))
}

fn peek_all(fd: BorrowedFd<'_>, end: Option<usize>) -> SysResult<Vec<Peeked>> {
    let mut all = Vec::new();
    let (mut offset, mut room) = (0, PIECE);
    set_i32(fd, SOCKET, libc::SO_PEEK_OFF, 0)?;
    while end.is_none_or(|end| offset < end) {
        let message = match messages::peek(fd, room) {
            Err(e) if e.code() == libc::EMSGSIZE && room < 64 << 20 => {
                room *= 4;
                set_i32(fd, SOCKET, libc::SO_PEEK_OFF, offset as i32)?;
                continue;
            }
            other => other?,
        };
        let Some(message) = message else { break };
        let is_empty = message.bytes.is_empty();
        offset += message.bytes.len();
        all.push(message);
        if is_empty {
            break;
        }
    }
    Ok(all)
}

fn peer_credentials(
    fd: BorrowedFd<'_>,
    inner: &HashMap<i32, i32>,
) -> Result<UnixCredentials, CaptureError> {
    let mut raw = [0; 12];
    get(fd, SOCKET, libc::SO_PEERCRED, &mut raw)?;
    let word = |i: usize| u32::from_ne_bytes(raw[i..i + 4].try_into().expect("four bytes"));
    let pid = inner.get(&(word(0) as i32)).copied().unwrap_or(0);
    Ok(UnixCredentials { pid, uid: word(4), gid: word(8) })
}

/// A path, or zero and an abstract name; none for a socket without.
fn name_of(unix: &UnixAddr) -> Option<Vec<u8>> {
    if let Some(path) = unix.path() {
        return Some(path.as_os_str().as_encoded_bytes().to_vec());
    }
    unix.as_abstract().map(|n| [b"\0", n].concat())
}

/// The same from struct sockaddr_un.
fn name_in(raw: &[u8]) -> Option<Vec<u8>> {
    let name = raw.get(2..)?;
    let len = match name.first()? {
        0 => name.len(),
        _ => name.iter().position(|b| *b == 0).unwrap_or(name.len()),
    };
    Some(name[..len].to_vec())
}

/// What the name leads to, as the process `pid` sees it.
fn name(bytes: &[u8], seen: &UnixSeen, pid: i32, what: &str) -> Result<UnixName, CaptureError> {
    let mut name = UnixName { bytes: bytes.to_vec(), ..UnixName::default() };
    let (Some((inode, _)), Some(first)) = (seen.file, bytes.first()) else { return Ok(name) };
    let Ok(text) = std::str::from_utf8(bytes) else {
        let why = "a unix socket whose path is no UTF-8 text".into();
        return Err(CaptureError::unsupported(what.to_owned(), why));
    };
    let base = if *first == b'/' {
        format!("/proc/{pid}/root")
    } else {
        let cwd = format!("/proc/{pid}/cwd");
        let link = std::fs::read_link(&cwd).map_err(|e| CaptureError::proc(&cwd, e))?;
        name.directory = Some(link.to_string_lossy().into_owned());
        format!("{cwd}/")
    };
    let path = format!("{base}{text}");
    match std::fs::metadata(&path) {
        Ok(m) if m.mode() & IFMT == libc::S_IFSOCK && m.ino() as u32 == inode => {
            name.file = Some((m.mode() & 0o7777, m.uid(), m.gid()));
        }
        // It was deleted or moved; its name is known all the same.
        _ => {
            if !Path::new(&path).parent().is_some_and(Path::is_dir) {
                let why = format!("a unix socket at {text}, a directory that is gone");
                return Err(CaptureError::unsupported(what.to_owned(), why));
            }
        }
    }
    Ok(name)
}
