//! Who is connected to whom among unix sockets: sock_diag(7), UNIX_DIAG.

use super::error::{SysError, SysResult, check};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_PEER: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// A diagnostics socket of one network namespace.
#[derive(Debug)]
pub struct UnixDiag {
    socket: OwnedFd,
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

    /// The inode of the peer of the unix socket with this inode, if it is connected.
    pub fn peer(&self, inode: u32) -> SysResult<Option<u32>> {
        let mut m = Vec::with_capacity(HEADER + 24);
        m.extend(((HEADER + 24) as u32).to_ne_bytes());
        m.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        m.extend(NLM_F_REQUEST.to_ne_bytes());
        m.extend([0; 8]);
        m.extend([libc::AF_UNIX as u8, 0, 0, 0]);
        m.extend(u32::MAX.to_ne_bytes());
        m.extend(inode.to_ne_bytes());
        m.extend(UDIAG_SHOW_PEER.to_ne_bytes());
        m.extend(u64::MAX.to_ne_bytes());
        let fd = self.socket.as_raw_fd();
        let what = || format!("unix socket with inode {inode}");
        // SAFETY: the kernel reads the message.
        let r = unsafe { libc::send(fd, m.as_ptr().cast(), m.len(), 0) };
        check(r as i64, "send to sock_diag", what)?;
        let mut answer = [0u8; 512];
        // SAFETY: the kernel writes at most the length of the buffer.
        let n = unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0) };
        let n = check(n as i64, "recv from sock_diag", what)? as usize;
        let answer = &answer[..n];
        let word = |at: usize| {
            answer.get(at..at + 4).map(|b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
        };
        let kind = word(4).unwrap_or(0) as u16;
        if kind == NLMSG_ERROR {
            let errno = word(HEADER).unwrap_or(0) as i32;
            return Err(SysError::errno("sock_diag", what(), -errno));
        }
        let mut at = HEADER + MESSAGE;
        while let Some(head) = word(at) {
            let (len, attribute) = ((head & 0xffff) as usize, (head >> 16) as u16);
            if len < 4 {
                break;
            }
            if attribute == UNIX_DIAG_PEER {
                return Ok(word(at + 4));
            }
            at += (len + 3) & !3;
        }
        Ok(None)
    }
}
