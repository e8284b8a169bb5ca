//! UDP, raw and ICMP sockets, and netlink.
//!
//! Datagrams are copied by peeking at growing offsets (SO_PEEK_OFF); memberships of multicast
//! groups by asking the socket about each group that the namespace has (MCAST_MSFILTER).

use super::CaptureError;
use super::unix::{Empties, readiness};
use crate::image::Kind;
use crate::image::net::{Datagram, DatagramSocket, Membership, NetlinkSocket, RawOptions};
use crate::sys::sockopt::{get, get_i32, out_queue, set_i32};
use crate::sys::{SysError, SysResult, messages};
use nix::poll::PollFlags;
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

const SOCKET: i32 = libc::SOL_SOCKET;
const MCAST_MSFILTER: i32 = 48;
const NETLINK: i32 = 270;
const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// The longest datagram.
const LONGEST: usize = 65536;
/// MCAST_EXCLUDE
const ALL_SENDERS: u32 = 0;

/// What a socket is: domain, type, protocol.
pub(super) type Socket = (i32, i32, i32);

/// Captures a UDP, raw or ICMP socket of process `pid`.
pub(super) fn datagram(
    fd: BorrowedFd<'_>,
    inode: u32,
    (domain, kind, protocol): Socket,
    options: RawOptions,
    pid: i32,
    what: &str,
    empties: &mut Empties,
) -> Result<Kind, CaptureError> {
    let v6 = domain == libc::AF_INET6;
    let is_udp = kind == libc::SOCK_DGRAM && protocol == libc::IPPROTO_UDP;
    let local = getsockname::<SockaddrStorage>(fd.as_raw_fd())
        .map_err(|e| SysError::errno("getsockname", what, e as i32))?;
    // The port of a raw socket is its protocol.
    let bound = |a: &SocketAddr| match kind {
        libc::SOCK_RAW => !a.ip().is_unspecified(),
        _ => a.port() != 0,
    };
    let local = address(&local).filter(bound);
    let remote = getpeername::<SockaddrStorage>(fd.as_raw_fd()).ok();
    let waits = readiness(fd)?.contains(PollFlags::POLLIN);
    let mut queue = Vec::new();
    if waits && !is_udp {
        return Err(CaptureError::Transient("a raw socket has packets queued"));
    }
    if waits {
        queue = datagrams(fd, v6, inode, empties)?;
    } else {
        empties.remove(&inode);
    }
    let on = |level, name| {
        let mut all = options.iter();
        all.any(|(l, n, v)| (*l, *n) == (level, name) && v.iter().any(|b| *b != 0))
    };
    if !queue.is_empty() && (on(SOCKET, libc::SO_REUSEPORT) || on(SOCKET, libc::SO_REUSEADDR)) {
        return Err(CaptureError::Transient("a UDP socket that shares its port has data queued"));
    }
    if on(libc::IPPROTO_UDP, libc::UDP_CORK) && out_queue(fd)? > 0 {
        return Err(CaptureError::Transient("a corked UDP socket has data to send"));
    }
    let groups = memberships(fd, v6, pid, what)?;
    let remote = remote.as_ref().and_then(address);
    let socket = DatagramSocket { v6, kind, protocol, local, remote, queue, groups, options };
    Ok(Kind::Datagram(Box::new(socket)))
}

fn datagrams(
    fd: BorrowedFd<'_>,
    v6: bool,
    inode: u32,
    empties: &mut Empties,
) -> Result<Vec<Datagram>, CaptureError> {
    // Ask for the address that each was sent to.
    let asked: &[(i32, i32)] = match v6 {
        false => &[(libc::IPPROTO_IP, libc::IP_PKTINFO)],
        true => {
            &[(libc::IPPROTO_IP, libc::IP_PKTINFO), (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)]
        }
    };
    let mut before = vec![(SOCKET, libc::SO_PEEK_OFF, get_i32(fd, SOCKET, libc::SO_PEEK_OFF)?)];
    for (level, name) in asked {
        before.push((*level, *name, get_i32(fd, *level, *name)?));
        set_i32(fd, *level, *name, 1)?;
    }
    let peeked = peek_all(fd);
    for (level, name, value) in before {
        set_i32(fd, level, name, value)?;
    }
    let peeked = peeked?;
    if peeked.is_empty() || peeked.iter().any(|m| m.bytes.is_empty()) || empties.contains(&inode) {
        empties.insert(inode);
        return Err(CaptureError::Transient("a UDP socket has an empty datagram queued"));
    }
    let mut queue = Vec::with_capacity(peeked.len());
    for message in peeked {
        let from = sockaddr(&message.from);
        let (Some(from), Some(to)) = (from, message.to) else {
            return Err(CaptureError::Transient("a UDP socket has an error queued"));
        };
        let broadcast = matches!(to, IpAddr::V4(a) if a.is_broadcast());
        if to.is_multicast() || broadcast || to.is_ipv4() != from.is_ipv4() {
            return Err(CaptureError::Transient("a UDP socket has a multicast datagram queued"));
        }
        queue.push(Datagram { from, to, bytes: message.bytes });
    }
    Ok(queue)
}

fn peek_all(fd: BorrowedFd<'_>) -> SysResult<Vec<messages::Peeked>> {
    let mut all = Vec::new();
    let mut offset = 0;
    loop {
        set_i32(fd, SOCKET, libc::SO_PEEK_OFF, offset)?;
        let Some(message) = messages::peek(fd, LONGEST)? else { return Ok(all) };
        let len = message.bytes.len() as i32;
        offset += len;
        all.push(message);
        if len == 0 {
            return Ok(all);
        }
    }
}

fn address(a: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = a.as_sockaddr_in() {
        return Some(SocketAddr::from((v4.ip(), v4.port())));
    }
    a.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6)))
}

/// From struct sockaddr_in or sockaddr_in6; an IPv4 address in the form of IPv6 becomes one.
fn sockaddr(raw: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*raw.first_chunk()?));
    let port = u16::from_be_bytes(*raw.get(2..)?.first_chunk()?);
    let ip = match family {
        libc::AF_INET => IpAddr::from(*raw.get(4..)?.first_chunk::<4>()?),
        libc::AF_INET6 => IpAddr::from(*raw.get(8..)?.first_chunk::<16>()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Groups and interfaces that the namespace of a process listens to.
fn groups(pid: i32, v6: bool) -> Result<Vec<(u32, String, IpAddr)>, CaptureError> {
    let path = format!("/proc/{pid}/net/{}", if v6 { "igmp6" } else { "igmp" });
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| CaptureError::proc(&path, e))?,
    };
    Ok(parse_groups(&text, v6))
}

fn parse_groups(text: &str, v6: bool) -> Vec<(u32, String, IpAddr)> {
    let mut all = Vec::new();
    let mut interface = (0, String::new());
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if v6 {
            let [index, name, group, ..] = words.as_slice() else { continue };
            let group = u128::from_str_radix(group, 16).map(Ipv6Addr::from_bits);
            if let (Ok(index), Ok(group)) = (index.parse(), group) {
                all.push((index, (*name).to_owned(), group.into()));
            }
        } else if line.starts_with(char::is_numeric) {
            let [index, name, ..] = words.as_slice() else { continue };
            interface = (index.parse().unwrap_or(0), (*name).to_owned());
        } else if let Some(group) = words.first().and_then(|w| u32::from_str_radix(w, 16).ok()) {
            let group = Ipv4Addr::from(group.to_ne_bytes());
            all.push((interface.0, interface.1.clone(), group.into()));
        }
    }
    // These everybody listens to.
    all.retain(|(_, _, group)| match group {
        IpAddr::V4(a) => *a != Ipv4Addr::new(224, 0, 0, 1),
        IpAddr::V6(a) => !matches!(a.segments(), [0xff01 | 0xff02, 0, 0, 0, 0, 0, 0, 1]),
    });
    all
}

fn memberships(
    fd: BorrowedFd<'_>,
    v6: bool,
    pid: i32,
    what: &str,
) -> Result<Vec<Membership>, CaptureError> {
    let level = if v6 { libc::IPPROTO_IPV6 } else { libc::IPPROTO_IP };
    let mut out = Vec::new();
    for (index, interface, group) in groups(pid, v6)? {
        // struct group_filter: interface, group, mode, number of sources.
        let mut filter = [0; 8 + 128 + 8];
        filter[..4].copy_from_slice(&index.to_ne_bytes());
        filter[8..136].copy_from_slice(&crate::image::net::sockaddr_storage(group));
        match get(fd, level, MCAST_MSFILTER, &mut filter) {
            Ok(_) => {
                let word =
                    |at: usize| filter[at..at + 4].first_chunk().map(|w| u32::from_ne_bytes(*w));
                if (word(136), word(140)) != (Some(ALL_SENDERS), Some(0)) {
                    let why = format!("a socket that listens to some senders of {group} only");
                    return Err(CaptureError::unsupported(what.to_owned(), why));
                }
                out.push(Membership { interface, group });
            }
            // Another socket listens to it.
            Err(e) if matches!(e.code(), libc::EADDRNOTAVAIL | libc::EINVAL | libc::ENODEV) => {}
            // A kind of socket that listens to none.
            Err(e) if matches!(e.code(), libc::ENOPROTOOPT | libc::EOPNOTSUPP) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(out)
}

/// Captures a netlink socket that waits for nothing.
pub(super) fn netlink(
    fd: BorrowedFd<'_>,
    (_, kind, protocol): Socket,
    options: RawOptions,
    what: &str,
) -> Result<Kind, CaptureError> {
    if readiness(fd)?.contains(PollFlags::POLLIN) {
        return Err(CaptureError::Transient("a netlink socket has messages queued"));
    }
    let local = getsockname::<SockaddrStorage>(fd.as_raw_fd())
        .map_err(|e| SysError::errno("getsockname", what, e as i32))?;
    let port = local.as_netlink_addr().map_or(0, |a| a.pid());
    let mut mask = [0; 64];
    let n = get(fd, NETLINK, NETLINK_LIST_MEMBERSHIPS, &mut mask)?;
    let bits = mask[..n.min(mask.len())].iter().enumerate();
    let groups = bits.flat_map(|(i, byte)| {
        (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| (8 * i + bit + 1) as u32)
    });
    let groups = groups.collect();
    Ok(Kind::Netlink(Box::new(NetlinkSocket { kind, protocol, port, groups, options })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_families() {
        let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                  1\tlo        :     2      V3\n\
                  \t\t\t\tFB0000E0     1 0:00000000\t\t0\n\
                  \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let found = parse_groups(v4, false);
        assert_eq!(found, [(1, "lo".into(), Ipv4Addr::new(224, 0, 0, 251).into())]);
        let v6 = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n\
                  1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        let group: IpAddr = "ff02::fb".parse().expect("an address");
        assert_eq!(parse_groups(v6, true), [(2, "eth0".into(), group)]);
    }
}
