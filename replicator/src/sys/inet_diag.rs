//! TCP sockets of a network namespace that no descriptor gives the address of: sock_diag(7),
//! INET_DIAG. Their rows also tell of protections that nothing else shows (TCP-MD5).

use super::error::{SysError, SysResult, check};
use super::unix_diag::UnixDiag;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// struct inet_diag_req_v2.
const REQUEST: usize = 56;
/// struct inet_diag_msg.
const ROW: usize = 72;
const INET_DIAG_MD5SIG: u16 = 18;

/// A TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpRow {
    /// As in tcp_states.h.
    pub state: u8,
    /// This side.
    pub local: SocketAddr,
    /// The other side.
    pub remote: SocketAddr,
    /// SO_COOKIE.
    pub cookie: u64,
    /// Inode of its descriptor, 0 for none.
    pub inode: u32,
    /// Not yet acknowledged.
    pub unacknowledged: u32,
    /// It has keys for TCP-MD5.
    pub md5: bool,
}

/// The TCP sockets in these states (a bit each, by their numbers) of one family.
pub fn sockets(diag: &UnixDiag, family: i32, states: u32) -> SysResult<Vec<TcpRow>> {
    let what = || format!("TCP sockets of family {family} in states {states:#x}");
    send(diag, &request(family, states, NLM_F_REQUEST | NLM_F_DUMP), what)?;
    let mut rows = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let n = receive(diag, &mut buffer, what)?;
        let mut rest = &buffer[..n];
        while rest.len() >= HEADER {
            let len = u32_at(rest, 0) as usize;
            let Some(message) = rest.get(HEADER..len.max(HEADER)) else { break };
            match u16::from_ne_bytes([rest[4], rest[5]]) {
                NLMSG_DONE => return Ok(rows),
                NLMSG_ERROR => {
                    let errno = message.get(..4).map_or(0, |_| u32_at(message, 0)) as i32;
                    return Err(SysError::errno("sock_diag", what(), -errno));
                }
                _ => rows.extend(row(message)),
            }
            rest = rest.get((len + 3) & !3..).unwrap_or_default();
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn row(m: &[u8]) -> Option<TcpRow> {
    let fixed = m.get(..ROW)?;
    let port = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
    let ip = |at: usize| -> IpAddr {
        if i32::from(fixed[0]) == libc::AF_INET {
            Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]).into()
        } else {
            let octets: [u8; 16] = fixed[at..at + 16].try_into().expect("sixteen bytes");
            Ipv6Addr::from(octets).into()
        }
    };
    let mut md5 = false;
    let mut at = ROW;
    while let Some(head) = m.get(at..at + 4) {
        let len = u16::from_ne_bytes([head[0], head[1]]) as usize;
        if len < 4 {
            break;
        }
        md5 |= u16::from_ne_bytes([head[2], head[3]]) == INET_DIAG_MD5SIG && len > 4;
        at += (len + 3) & !3;
    }
    Some(TcpRow {
        state: fixed[1],
        local: SocketAddr::new(ip(8), port(4)),
        remote: SocketAddr::new(ip(24), port(6)),
        cookie: u64::from(u32_at(fixed, 44)) | u64::from(u32_at(fixed, 48)) << 32,
        inode: u32_at(fixed, 68),
        unacknowledged: u32_at(fixed, 60),
        md5,
    })
}

/// The socket with exactly these addresses, if it is there.
pub fn find(
    diag: &UnixDiag,
    local: SocketAddr,
    remote: Option<SocketAddr>,
) -> SysResult<Option<TcpRow>> {
    let what = || format!("the TCP socket at {local}");
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut m = request(family, u32::MAX, NLM_F_REQUEST);
    let id = HEADER + 8;
    let mut put = |port: usize, ip: usize, a: SocketAddr| {
        m[id + port..id + port + 2].copy_from_slice(&a.port().to_be_bytes());
        match a.ip() {
            IpAddr::V4(a) => m[id + ip..id + ip + 4].copy_from_slice(&a.octets()),
            IpAddr::V6(a) => m[id + ip..id + ip + 16].copy_from_slice(&a.octets()),
        }
    };
    put(0, 4, local);
    if let Some(remote) = remote {
        put(2, 20, remote);
    }
    // Any cookie.
    m[id + 40..id + 48].fill(0xff);
    send(diag, &m, what)?;
    let mut buffer = [0u8; 4096];
    let n = receive(diag, &mut buffer, what)?;
    if n < HEADER {
        return Ok(None);
    }
    let kind = u16::from_ne_bytes([buffer[4], buffer[5]]);
    Ok((kind != NLMSG_ERROR).then(|| row(&buffer[HEADER..n])).flatten())
}

fn request(family: i32, states: u32, flags: u16) -> Vec<u8> {
    // The kernel tells of keys only beside struct tcp_info (inet_sk_diag_fill): INET_DIAG_INFO.
    const INFO: u8 = 1 << 1;
    let mut m = Vec::with_capacity(HEADER + REQUEST);
    m.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    m.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    m.extend(flags.to_ne_bytes());
    m.extend([0; 8]);
    m.extend([family as u8, libc::IPPROTO_TCP as u8, INFO, 0]);
    m.extend(states.to_ne_bytes());
    m.resize(HEADER + REQUEST, 0);
    m
}

fn send(diag: &UnixDiag, message: &[u8], what: impl Fn() -> String) -> SysResult<()> {
    let fd = diag.socket.as_raw_fd();
    // SAFETY: the kernel reads the message.
    let r = unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), 0) };
    check(r as i64, "send to sock_diag", what).map(drop)
}

fn receive(diag: &UnixDiag, buffer: &mut [u8], what: impl Fn() -> String) -> SysResult<usize> {
    let fd = diag.socket.as_raw_fd();
    // SAFETY: the kernel writes at most the length of the buffer.
    let n = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    check(n as i64, "recv from sock_diag", what).map(|n| n as usize)
}
