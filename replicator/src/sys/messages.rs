//! Messages of sockets with what travels beside their bytes: recvmsg(2), cmsg(3), unix(7).

use super::error::{SysError, SysResult, check};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Room for control messages: 253 descriptors and the small ones.
const CONTROL: usize = 2048;

/// A message that stays in its queue.
#[derive(Debug)]
pub struct Peeked {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The sender's struct sockaddr, as long as the kernel says; empty for none.
    pub from: Vec<u8>,
    /// Duplicates of the descriptors that travel with it.
    pub rights: Vec<OwnedFd>,
    /// Pid, uid and gid of the sender, if the socket asks for them (SO_PASSCRED).
    pub credentials: Option<(i32, u32, u32)>,
    /// Which of our addresses it was sent to (IP_PKTINFO, IPV6_RECVPKTINFO), if asked for.
    pub to: Option<IpAddr>,
}

#[repr(align(8))]
struct Control([u8; CONTROL]);

/// The next message at the socket's SO_PEEK_OFF; none if there is no more. Of a stream it gives
/// at most `room` bytes, and no more than travelled with one set of descriptors; a message that is
/// longer than `room` is an error (EMSGSIZE).
pub fn peek(fd: BorrowedFd<'_>, room: usize) -> SysResult<Option<Peeked>> {
    let what = || format!("fd {}", fd.as_raw_fd());
    let mut bytes = vec![0u8; room];
    let mut name = [0u8; 128];
    let mut control = Control([0; CONTROL]);
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: room };
    // SAFETY: all zeroes are a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as libc::socklen_t;
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to buffers of ours of the lengths that it gives.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, flags) };
    let n = match check(n as i64, "recvmsg(MSG_PEEK)", what) {
        Err(e) if e.code() == libc::EAGAIN => return Ok(None),
        other => other? as usize,
    };
    let (mut rights, mut credentials, mut to) = (Vec::new(), None, None);
    // SAFETY: the kernel has filled the header.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(&header) };
    while !at.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole header within the buffer.
        let (head, data) = unsafe { (*at, libc::CMSG_DATA(at)) };
        // SAFETY: no pointers are followed.
        let len = head.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
        // SAFETY: the kernel says that this much follows.
        let data = unsafe { std::slice::from_raw_parts(data, len) };
        let word = |i: usize| i32::from_ne_bytes(data[4 * i..4 * i + 4].try_into().expect("four"));
        match (head.cmsg_level, head.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                // SAFETY: the kernel has just given us these descriptors.
                let own = |i| unsafe { OwnedFd::from_raw_fd(word(i)) };
                rights.extend((0..len / 4).map(own));
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                credentials = Some((word(0), word(1) as u32, word(2) as u32));
            }
            // struct in_pktinfo: interface, local address, address in the header.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                to = data[8..12].first_chunk::<4>().map(|a| Ipv4Addr::from(*a).into());
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                to = data.first_chunk::<16>().map(|a| Ipv6Addr::from(*a).into());
            }
            _ => {}
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        at = unsafe { libc::CMSG_NXTHDR(&header, at) };
    }
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(SysError::errno("recvmsg(MSG_PEEK)", what(), libc::EMSGSIZE));
    }
    bytes.truncate(n);
    let from = name[..(header.msg_namelen as usize).min(name.len())].to_vec();
    Ok(Some(Peeked { bytes, from, rights, credentials, to }))
}
