//! Options of sockets other than TCP: all that getsockopt(2) gives and setsockopt(2) takes.

use super::CaptureError;
use crate::image::net::RawOptions;
use crate::sys::sockopt::get;
use std::os::fd::BorrowedFd;

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const UDP: i32 = libc::IPPROTO_UDP;
const NETLINK: i32 = 270;

/// Level, name and length; in the order in which a restore sets them.
type Table = &'static [(i32, i32, usize)];

/// Of all families. SO_TIMESTAMPING and the time-outs are structures.
const ALL: Table = &[
    (SOCKET, libc::SO_REUSEADDR, 4),
    (SOCKET, libc::SO_REUSEPORT, 4),
    (SOCKET, libc::SO_SNDBUF, 4),
    (SOCKET, libc::SO_RCVBUF, 4),
    // SO_BUF_LOCK: which of the sizes the program set.
    (SOCKET, 72, 4),
    (SOCKET, libc::SO_BROADCAST, 4),
    (SOCKET, libc::SO_DONTROUTE, 4),
    (SOCKET, libc::SO_KEEPALIVE, 4),
    (SOCKET, libc::SO_OOBINLINE, 4),
    (SOCKET, libc::SO_PRIORITY, 4),
    (SOCKET, libc::SO_LINGER, 8),
    (SOCKET, libc::SO_RCVLOWAT, 4),
    // SO_RCVTIMEO_NEW, SO_SNDTIMEO_NEW
    (SOCKET, 66, 16),
    (SOCKET, 67, 16),
    (SOCKET, libc::SO_TIMESTAMP, 4),
    (SOCKET, libc::SO_TIMESTAMPNS, 4),
    (SOCKET, 63, 4),
    (SOCKET, 64, 4),
    (SOCKET, libc::SO_TIMESTAMPING, 8),
    (SOCKET, libc::SO_MARK, 4),
    (SOCKET, libc::SO_RXQ_OVFL, 4),
    (SOCKET, libc::SO_PEEK_OFF, 4),
    (SOCKET, libc::SO_SELECT_ERR_QUEUE, 4),
    (SOCKET, libc::SO_BUSY_POLL, 4),
];

const UNIX: Table = &[
    (SOCKET, libc::SO_PASSCRED, 4),
    (SOCKET, libc::SO_PASSSEC, 4),
    // SO_PASSPIDFD, SO_PASSRIGHTS
    (SOCKET, 76, 4),
    (SOCKET, 83, 4),
];

/// Of both internet families.
const INET: Table = &[
    (SOCKET, libc::SO_BINDTODEVICE, 16),
    (IP, libc::IP_TOS, 4),
    (IP, libc::IP_TTL, 4),
    (IP, libc::IP_RECVOPTS, 4),
    (IP, libc::IP_RETOPTS, 4),
    (IP, libc::IP_PKTINFO, 4),
    (IP, libc::IP_MTU_DISCOVER, 4),
    (IP, libc::IP_RECVERR, 4),
    (IP, libc::IP_RECVTTL, 4),
    (IP, libc::IP_RECVTOS, 4),
    (IP, libc::IP_FREEBIND, 4),
    (IP, libc::IP_TRANSPARENT, 4),
    (IP, libc::IP_RECVORIGDSTADDR, 4),
    (IP, libc::IP_MINTTL, 4),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT, 4),
    (IP, libc::IP_MULTICAST_IF, 4),
    (IP, libc::IP_MULTICAST_TTL, 4),
    (IP, libc::IP_MULTICAST_LOOP, 4),
    (IP, libc::IP_MULTICAST_ALL, 4),
];

const INET6: Table = &[
    (IPV6, libc::IPV6_V6ONLY, 4),
    (IPV6, libc::IPV6_UNICAST_HOPS, 4),
    (IPV6, libc::IPV6_MULTICAST_HOPS, 4),
    (IPV6, libc::IPV6_MULTICAST_LOOP, 4),
    (IPV6, libc::IPV6_MTU_DISCOVER, 4),
    (IPV6, libc::IPV6_RECVERR, 4),
    (IPV6, libc::IPV6_RECVPKTINFO, 4),
    (IPV6, libc::IPV6_RECVHOPLIMIT, 4),
    (IPV6, libc::IPV6_DONTFRAG, 4),
    (IPV6, libc::IPV6_TCLASS, 4),
    (IPV6, libc::IPV6_RECVTCLASS, 4),
    (IPV6, libc::IPV6_FREEBIND, 4),
    (IPV6, libc::IPV6_TRANSPARENT, 4),
];

const UDP_OPTIONS: Table = &[
    (UDP, libc::UDP_CORK, 4),
    // UDP_NO_CHECK6_TX and _RX, UDP_SEGMENT, UDP_GRO
    (UDP, 101, 4),
    (UDP, 102, 4),
    (UDP, 103, 4),
    (UDP, 104, 4),
];

const RAW: Table = &[
    (IP, libc::IP_HDRINCL, 4),
    // ICMP_FILTER (SOL_RAW) and ICMP6_FILTER
    (255, 1, 4),
    (libc::IPPROTO_ICMPV6, 1, 32),
];

/// NETLINK_PKTINFO, _BROADCAST_ERROR, _NO_ENOBUFS, _LISTEN_ALL_NSID, _CAP_ACK, _EXT_ACK and
/// _GET_STRICT_CHK.
const NETLINK_OPTIONS: Table = &[
    (NETLINK, 3, 4),
    (NETLINK, 4, 4),
    (NETLINK, 5, 4),
    (NETLINK, 8, 4),
    (NETLINK, 10, 4),
    (NETLINK, 11, 4),
    (NETLINK, 12, 4),
];

/// Reads the options of a socket of this family, type and protocol.
pub(super) fn read(
    fd: BorrowedFd<'_>,
    (domain, kind, protocol): (i32, i32, i32),
    what: &str,
) -> Result<RawOptions, CaptureError> {
    let mut out = RawOptions::new();
    let mut add = |table: Table| {
        for &(level, name, len) in table {
            let mut value = [0; 32];
            // What this kind of socket does not have is refused by the kernel.
            if let Ok(n) = get(fd, level, name, &mut value[..len])
                && n > 0
            {
                out.push((level, name, value[..n].to_vec()));
            }
        }
    };
    add(ALL);
    match domain {
        libc::AF_UNIX => add(UNIX),
        libc::AF_NETLINK => add(NETLINK_OPTIONS),
        libc::AF_INET => add(INET),
        libc::AF_INET6 => [INET, INET6].into_iter().for_each(&mut add),
        _ => {}
    }
    if protocol == libc::IPPROTO_UDP && kind == libc::SOCK_DGRAM {
        add(UDP_OPTIONS);
    }
    if kind == libc::SOCK_RAW && domain != libc::AF_NETLINK {
        add(RAW);
    }
    let mut filter = [0; 0];
    // Without room it gives the number of instructions.
    if get(fd, SOCKET, libc::SO_GET_FILTER, &mut filter).is_ok_and(|n| n > 0) {
        let why = "a socket with a filter program (SO_ATTACH_FILTER); run it without";
        return Err(CaptureError::unsupported(what.to_owned(), why.into()));
    }
    Ok(out)
}
