//! UDP, raw and ICMP sockets, and netlink.
//!
//! A datagram that waited is sent to its socket again from the address that it came from: by a raw
//! socket, within the container's network. That happens before the socket is connected, when it
//! takes datagrams from anyone.

use super::error::sys;
use super::options;
use super::sockets::bind_to;
use crate::image::net::{
    Datagram, DatagramSocket, Membership, NetlinkSocket, RawOptions, sockaddr_storage,
};
use crate::sys::{SysError, SysResult, sockopt};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockaddrStorage, bind, connect, sendto};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const MCAST_JOIN_GROUP: i32 = 42;
const NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const UDP_HEADER: usize = 8;

/// A socket as it was, in the network of the calling thread.
pub(super) fn datagram(image: &DatagramSocket) -> SysResult<OwnedFd> {
    let domain = if image.v6 { libc::AF_INET6 } else { libc::AF_INET };
    let fd = sockopt::open(domain, image.kind, image.protocol)?;
    options::before_bind(fd.as_fd(), &image.options)?;
    if let Some(local) = image.local {
        bind_to(&fd, local)?;
    }
    fill(&fd, image)?;
    for group in &image.groups {
        join(fd.as_fd(), image.v6, group)?;
    }
    if let Some(remote) = image.remote {
        let address = SockaddrStorage::from(remote);
        sys(connect(fd.as_raw_fd(), &address), "connect", || remote.to_string())?;
    }
    options::set(fd.as_fd(), &image.options)?;
    Ok(fd)
}

fn fill(fd: &OwnedFd, image: &DatagramSocket) -> SysResult<()> {
    if image.queue.is_empty() {
        return Ok(());
    }
    // Room as before, and no other peculiarity yet.
    let is_room = |o: &&(i32, i32, Vec<u8>)| (o.0, o.1) == (libc::SOL_SOCKET, libc::SO_RCVBUF);
    let room: RawOptions = image.options.iter().filter(is_room).cloned().collect();
    options::set(fd.as_fd(), &room)?;
    let port = image.local.map_or(0, |a| a.port());
    for message in &image.queue {
        inject(message, port)?;
    }
    Ok(())
}

/// Sends a datagram that seems to come from where it came from.
fn inject(message: &Datagram, port: u16) -> SysResult<()> {
    let what = || format!("a datagram from {} to {} port {port}", message.from, message.to);
    let v6 = message.to.is_ipv6();
    let domain = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    let raw = sockopt::open(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    sockopt::set_i32(raw.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 1 << 18)?;
    let packet = packet(message, port)
        .ok_or_else(|| SysError::errno("send again", what(), libc::EAFNOSUPPORT))?;
    let to = SockaddrStorage::from(SocketAddr::new(message.to, 0));
    let sent = sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty());
    sys(sent, "sendto", what).map(drop)
}

/// An IP packet with a UDP datagram. The kernel fills in what it may of an IPv4 header.
fn packet(message: &Datagram, port: u16) -> Option<Vec<u8>> {
    let len = UDP_HEADER + message.bytes.len();
    let (mut packet, mut sum) = (Vec::with_capacity(40 + len), 0u32);
    match (message.from.ip(), message.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = (20 + len) as u16;
            packet.extend([0x45, 0]);
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, libc::IPPROTO_UDP as u8, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum += add(&packet[12..20]);
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((len as u16).to_be_bytes());
            packet.extend([libc::IPPROTO_UDP as u8, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum += add(&packet[8..40]);
        }
        _ => return None,
    }
    let mut udp = Vec::with_capacity(len);
    udp.extend(message.from.port().to_be_bytes());
    udp.extend(port.to_be_bytes());
    udp.extend((len as u16).to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(&message.bytes);
    sum += libc::IPPROTO_UDP as u32 + len as u32 + add(&udp);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean that there is no checksum.
    let checksum = match !(sum as u16) {
        0 => 0xffff,
        other => other,
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(udp);
    Some(packet)
}

/// The sum of the words, for the checksum of the internet (RFC 1071).
fn add(bytes: &[u8]) -> u32 {
    let word = |w: &[u8]| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

fn join(fd: BorrowedFd<'_>, v6: bool, group: &Membership) -> SysResult<()> {
    let level = if v6 { libc::IPPROTO_IPV6 } else { libc::IPPROTO_IP };
    let index = interface(&group.interface)?;
    // struct group_req: interface, group.
    let mut request = [0; 8 + 128];
    request[..4].copy_from_slice(&index.to_ne_bytes());
    request[8..].copy_from_slice(&sockaddr_storage(group.group));
    sockopt::set(fd, level, MCAST_JOIN_GROUP, &request)
}

/// The index of an interface in the network of the calling thread.
fn interface(name: &str) -> SysResult<u32> {
    let path = "/proc/thread-self/net/igmp";
    let text = std::fs::read_to_string(path).map_err(|source| SysError {
        call: "read",
        object: path.into(),
        source,
    })?;
    let found = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let index = words.next()?.parse().ok()?;
        (words.next()? == name).then_some(index)
    });
    found.ok_or_else(|| SysError::errno("search", format!("interface {name}"), libc::ENODEV))
}

/// A netlink socket.
pub(super) fn netlink(image: &NetlinkSocket) -> SysResult<OwnedFd> {
    let fd = sockopt::open(libc::AF_NETLINK, image.kind, image.protocol)?;
    options::set(fd.as_fd(), &image.options)?;
    if image.port != 0 {
        let address = NetlinkAddr::new(image.port, 0);
        let object = || format!("netlink port {}", image.port);
        sys(bind(fd.as_raw_fd(), &address), "bind", object)?;
    }
    for group in &image.groups {
        sockopt::set_i32(fd.as_fd(), NETLINK, NETLINK_ADD_MEMBERSHIP, *group as i32)?;
    }
    Ok(fd)
}
