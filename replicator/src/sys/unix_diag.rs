//! What the kernel says of a unix socket: sock_diag(7), UNIX_DIAG.

use super::error::{SysError, SysResult, check};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// UDIAG_SHOW_NAME | _VFS | _PEER | _ICONS | _RQLEN
const SHOW: u32 = 0x1f;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_VFS: u16 = 1;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
const MESSAGE: usize = 16;
/// State of a listening socket (tcp_states.h).
const LISTEN: u8 = 10;

/// A diagnostics socket of one network namespace.
#[derive(Debug)]
pub struct UnixDiag {
    pub(super) socket: OwnedFd,
}

/// A unix socket as its namespace sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSeen {
    /// It listens, and this is the length of the queue that listen(2) was called with.
    pub backlog: Option<u32>,
    /// The name it is bound to: a path, or zero and an abstract name.
    pub name: Option<Vec<u8>>,
    /// Inode and device of the file of a path.
    pub file: Option<(u32, u32)>,
    /// Inode of the socket it is connected to; 0 if that has no descriptor any more or not yet.
    pub peer: Option<u32>,
    /// For each connection that waits to be accepted, the inode of the socket that asked for it;
    /// 0 if it was closed.
    pub pending: Vec<u32>,
    /// Bytes that wait to be read here, of a datagram socket those of the first message.
    pub unread: u32,
    /// RCV_SHUTDOWN 1 | SEND_SHUTDOWN 2
    pub shut: u8,
}

impl UnixDiag {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> SysResult<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .map_err(|e| SysError::errno("socket", "NETLINK_SOCK_DIAG", e as i32))?;
        Ok(Self { socket })
    }

    /// The unix socket with this inode. ENOENT: there is none in this namespace.
    pub fn look(&self, inode: u32) -> SysResult<UnixSeen> {
        let mut m = Vec::with_capacity(HEADER + 24);
        m.extend(((HEADER + 24) as u32).to_ne_bytes());
        m.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        m.extend(NLM_F_REQUEST.to_ne_bytes());
        m.extend([0; 8]);
        m.extend([libc::AF_UNIX as u8, 0, 0, 0]);
        m.extend(u32::MAX.to_ne_bytes());
        m.extend(inode.to_ne_bytes());
        m.extend(SHOW.to_ne_bytes());
        m.extend(u64::MAX.to_ne_bytes());
        let fd = self.socket.as_raw_fd();
        let what = || format!("unix socket with inode {inode}");
        // SAFETY: the kernel reads the message.
        let r = unsafe { libc::send(fd, m.as_ptr().cast(), m.len(), 0) };
        check(r as i64, "send to sock_diag", what)?;
        // The kernel's answer is at most a page.
        let mut answer = [0u8; 4096];
        // SAFETY: the kernel writes at most the length of the buffer.
        let n = unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0) };
        let n = check(n as i64, "recv from sock_diag", what)? as usize;
        let answer = &answer[..n];
        let kind = word(answer, 4).unwrap_or(0) as u16;
        if kind == NLMSG_ERROR {
            let errno = word(answer, HEADER).unwrap_or(0) as i32;
            return Err(SysError::errno("sock_diag", what(), -errno));
        }
        Ok(parse(answer))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
}

fn parse(answer: &[u8]) -> UnixSeen {
    let mut seen = UnixSeen::default();
    let listens = answer.get(HEADER + 2) == Some(&LISTEN);
    let mut at = HEADER + MESSAGE;
    while let Some(head) = word(answer, at) {
        let (len, attribute) = ((head & 0xffff) as usize, (head >> 16) as u16);
        let Some(value) = answer.get(at + 4..at + len) else { break };
        match attribute {
            UNIX_DIAG_NAME => seen.name = Some(name(value)),
            UNIX_DIAG_VFS => seen.file = word(value, 0).zip(word(value, 4)),
            UNIX_DIAG_PEER => seen.peer = word(value, 0),
            UNIX_DIAG_ICONS => {
                seen.pending = (0..value.len() / 4).filter_map(|i| word(value, 4 * i)).collect();
            }
            UNIX_DIAG_RQLEN if listens => seen.backlog = word(value, 4),
            UNIX_DIAG_RQLEN => seen.unread = word(value, 0).unwrap_or(0),
            UNIX_DIAG_SHUTDOWN => seen.shut = value.first().copied().unwrap_or(0),
            _ => {}
        }
        at += (len + 3) & !3;
    }
    seen
}

/// A path is a string in C, an abstract name begins with zero and may hold more.
fn name(value: &[u8]) -> Vec<u8> {
    if value.first() == Some(&0) {
        return value.to_vec();
    }
    value.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    fn inode(fd: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        std::fs::metadata(path).expect("a socket").ino() as u32
    }

    #[test]
    fn sockets_are_what_they_were_made() {
        let diag = UnixDiag::open().expect("diag");
        let bytes = format!("nilicon-diag-{}\0x", std::process::id());
        let address = SocketAddr::from_abstract_name(&bytes).expect("a name");
        let listener = UnixListener::bind_addr(&address).expect("bound");
        let seen = diag.look(inode(&listener)).expect("there");
        let name = [b"\0", bytes.as_bytes()].concat();
        assert_eq!(seen.name.as_ref(), Some(&name));
        assert!(seen.backlog.is_some() && seen.peer.is_none() && seen.pending.is_empty());
        let client = UnixStream::connect_addr(&address).expect("connected");
        assert_eq!(diag.look(inode(&listener)).expect("there").pending, [inode(&client)]);
        assert_eq!(diag.look(inode(&client)).expect("there").peer, Some(0));
        let (server, _) = listener.accept().expect("accepted");
        server.shutdown(std::net::Shutdown::Write).expect("shut");
        nix::unistd::write(&client, b"four").expect("written");
        let seen = diag.look(inode(&server)).expect("there");
        assert_eq!((seen.peer, seen.unread, seen.shut), (Some(inode(&client)), 4, 2));
        assert_eq!(seen.name, Some(name));
        let gone = inode(&client);
        drop(client);
        assert_eq!(diag.look(gone).expect_err("closed").code(), libc::ENOENT);
        assert_eq!(diag.look(inode(&server)).expect("there").peer, Some(0));
    }
}
