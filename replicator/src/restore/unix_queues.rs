//! What waits in unix sockets, and what can be set only after it was put there.

use super::error::sys;
use super::objects::Place;
use super::options;
use super::unix::{Made, outside, remove};
use crate::image::State;
use crate::image::unix::{UnixLink, UnixMessage};
use crate::sys::{SysError, SysResult, sockopt};
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
    UnixCredentials, connect, send, sendmsg, shutdown, socket,
};
use nix::sys::stat::Mode;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

const SOCKET: i32 = libc::SOL_SOCKET;

/// Fills the queues, then connects datagram sockets to those that they send to. `descriptions`
/// are all that were made, by index. The calling thread is in the container's network.
pub(super) fn fill(
    state: &State,
    made: &Made,
    descriptions: &[Option<OwnedFd>],
    place: &Place,
) -> SysResult<()> {
    let all = &state.unix_sockets;
    for (i, socket) in all.iter().enumerate().filter(|(_, s)| !s.queue.is_empty()) {
        let peer = match &socket.link {
            UnixLink::Peer(j) if is_pair(state, i, *j as usize) => made.fds[*j as usize].as_ref(),
            UnixLink::Closed { .. } => made.closed[i].as_ref(),
            _ => None,
        };
        if let Some(peer) = peer {
            // Every message is charged with more than its bytes.
            let room = socket.queue.iter().map(|m| 2 * m.bytes.len() + 4096).sum();
            with_room(peer, room, || {
                socket.queue.iter().try_for_each(|m| put(peer, None, m, descriptions, place))
            })?;
            continue;
        }
        let receiver = reach(state, made, i, place)?;
        for message in &socket.queue {
            let nameless;
            let sender = match sender(state, made, message) {
                Some(known) => known,
                None => {
                    nameless = new_datagram()?;
                    &nameless
                }
            };
            with_room(sender, 2 * message.bytes.len() + 4096, || {
                put(sender, Some(&receiver.0), message, descriptions, place)
            })?;
        }
    }
    for (i, socket) in all.iter().enumerate() {
        if let (UnixLink::Peer(j), Some(fd)) = (&socket.link, &made.fds[i])
            && socket.kind == libc::SOCK_DGRAM
            && !is_pair(state, i, *j as usize)
        {
            let (address, _file) = reach(state, made, *j as usize, place)?;
            sys(connect(fd.as_raw_fd(), &address), "connect", || "a datagram socket".into())?;
        }
    }
    Ok(())
}

/// Options, shutdowns and ends that were closed; names that lead nowhere go.
pub(super) fn settle(state: &State, mut made: Made) -> SysResult<()> {
    let socket_of = |i: usize| made.fds[i].as_ref().map(|fd| (fd, &state.unix_sockets[i]));
    for (fd, socket) in (0..made.fds.len()).filter_map(socket_of) {
        options::set(fd.as_fd(), &socket.options)?;
    }
    for (i, closed) in made.closed.iter_mut().enumerate() {
        let Some(closed) = closed.take() else { continue };
        if let (Some(fd), UnixLink::Closed { reset: true, .. }) =
            (&made.fds[i], &state.unix_sockets[i].link)
        {
            let object = || "what a closed peer had not read".into();
            sys(send(fd.as_raw_fd(), b"x", MsgFlags::MSG_DONTWAIT), "send", object)?;
        }
        drop(closed);
    }
    for (fd, socket) in (0..made.fds.len()).filter_map(socket_of) {
        let how = match (socket.shut & 3, &socket.link) {
            (0, _) | (_, UnixLink::Closed { .. }) => continue,
            (1, _) => Shutdown::Read,
            (2, _) => Shutdown::Write,
            _ => Shutdown::Both,
        };
        sys(shutdown(fd.as_raw_fd(), how), "shutdown", || "a unix socket".into())?;
    }
    made.asides.iter().flatten().chain(&made.leftovers).try_for_each(|path| remove(path))
}

/// Whether two sockets are one connection, and not a datagram socket and one of many that send
/// to it.
pub(super) fn is_pair(state: &State, i: usize, j: usize) -> bool {
    let all = &state.unix_sockets;
    let mutual = all.get(j).is_some_and(|o| o.link == UnixLink::Peer(i as u32));
    mutual && (all[i].kind != libc::SOCK_DGRAM || all[i].name.is_none() || all[j].name.is_none())
}

/// A socket that has the name of a message's sender.
fn sender<'a>(state: &State, made: &'a Made, message: &UnixMessage) -> Option<&'a OwnedFd> {
    let from = message.from.as_ref()?;
    let all = state.unix_sockets.iter().enumerate();
    for (i, socket) in all.filter(|(_, s)| s.kind == libc::SOCK_DGRAM) {
        if socket.name.as_ref().is_some_and(|n| n.bytes == *from) {
            return made.fds[i].as_ref();
        }
        if matches!(&socket.link, UnixLink::Closed { name: Some(n), .. } if n == from) {
            return made.closed[i].as_ref();
        }
    }
    made.ghosts.get(from)
}

/// An address that leads to a socket, and what must stay open while it is used.
fn reach(
    state: &State,
    made: &Made,
    i: usize,
    place: &Place,
) -> SysResult<(UnixAddr, Option<OwnedFd>)> {
    let object = || format!("unix socket {i}, which has no name");
    let Some(name) = state.unix_sockets.get(i).and_then(|s| s.name.as_ref()) else {
        return Err(SysError::errno("search", object(), libc::ENOENT));
    };
    if let Some((0, rest)) = name.bytes.split_first() {
        return sys(UnixAddr::new_abstract(rest), "sockaddr", object).map(|a| (a, None));
    }
    let path = made.asides[i].clone().unwrap_or_else(|| outside(place.init, name));
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = sys(open(&path, flags, Mode::empty()), "open", || path.display().to_string())?;
    // Any path is short enough this way.
    let short = format!("/proc/thread-self/fd/{}", file.as_raw_fd());
    sys(UnixAddr::new(short.as_str()), "sockaddr", object).map(|a| (a, Some(file)))
}

fn new_datagram() -> SysResult<OwnedFd> {
    let made = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    sys(made, "socket", || "unix datagram".into())
}

/// Does something while a socket may send this much.
fn with_room(socket: &OwnedFd, need: usize, f: impl FnOnce() -> SysResult<()>) -> SysResult<()> {
    let before = sockopt::get_i32(socket.as_fd(), SOCKET, libc::SO_SNDBUF)?;
    let set = |half| sockopt::set_i32(socket.as_fd(), SOCKET, libc::SO_SNDBUFFORCE, half);
    if need <= before as usize {
        return f();
    }
    set(need.min(i32::MAX as usize / 2) as i32)?;
    f()?;
    set(before / 2)
}

/// Sends one message, of a stream in as many parts as it takes.
fn put(
    sender: &OwnedFd,
    to: Option<&UnixAddr>,
    message: &UnixMessage,
    descriptions: &[Option<OwnedFd>],
    place: &Place,
) -> SysResult<()> {
    let mut rights: Vec<RawFd> = Vec::with_capacity(message.rights.len());
    for &index in &message.rights {
        let fd = descriptions.get(index as usize).and_then(Option::as_ref);
        rights.push(fd.map(AsRawFd::as_raw_fd).ok_or_else(|| {
            SysError::errno("search", format!("description {index}"), libc::ENOENT)
        })?);
    }
    let credentials = message.credentials.map(|c| {
        let pid = place.hosts.get(&c.pid).copied().unwrap_or(place.init);
        UnixCredentials::from(libc::ucred { pid, uid: c.uid, gid: c.gid })
    });
    let mut rest = message.bytes.as_slice();
    loop {
        let mut control = Vec::new();
        if !rights.is_empty() {
            control.push(ControlMessage::ScmRights(&rights));
        }
        control.extend(credentials.as_ref().map(ControlMessage::ScmCredentials));
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg(sender.as_raw_fd(), &[IoSlice::new(rest)], &control, flags, to);
        let n = sys(sent, "sendmsg", || format!("{} bytes to a unix socket", rest.len()))?;
        rest = &rest[n..];
        if rest.is_empty() {
            return Ok(());
        }
        drop(control);
        rights.clear();
    }
}
