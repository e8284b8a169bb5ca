//! UDP, raw and ICMP sockets, and netlink.

use super::{Kind, Stage};
use nix::sys::socket::{MsgFlags, NetlinkAddr, bind, getsockname, recv, send};
use replicator::sys::sockopt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

pub const KINDS: &[Kind] = &[
    ("UDP bound, with its options", udp_options),
    ("UDP connected", udp_connected),
    ("UDP with a receive queue", udp_queue),
    ("UDP over IPv6", udp_v6),
    ("UDP not bound, opened and closed between epochs", udp_idle),
    ("UDP multicast memberships", multicast),
    ("raw socket", raw),
    ("ICMP socket", icmp),
    ("netlink with groups", netlink),
    ("TCP socket not connected", tcp_idle),
];

const LOCAL: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

fn udp() -> UdpSocket {
    let socket = UdpSocket::bind(LOCAL).expect("bound");
    socket.set_nonblocking(true).expect("set");
    socket
}

fn address(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().expect("an address")
}

fn heard(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut bytes = vec![0; 65536];
    let (n, from) = socket.recv_from(&mut bytes).expect("received");
    bytes.truncate(n);
    (bytes, from)
}

fn nothing(socket: &UdpSocket) {
    let error = socket.recv_from(&mut [0]).expect_err("nothing is left");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

fn udp_options(stage: &Stage) {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
    let port = address(&socket);
    socket.set_broadcast(true).expect("set");
    socket.set_ttl(17).expect("set");
    stage.first();
    socket.set_multicast_ttl_v4(5).expect("set");
    socket.set_multicast_loop_v4(false).expect("set");
    let fd = socket.as_fd();
    sockopt::set_i32(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000).expect("set");
    sockopt::set_i32(fd, libc::IPPROTO_IP, libc::IP_TOS, 0x10).expect("set");
    sockopt::set_i32(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1).expect("set");
    sockopt::set(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0").expect("set");
    stage.last();
    assert_eq!(address(&socket), port);
    assert!(socket.broadcast().expect("got") && !socket.multicast_loop_v4().expect("got"));
    assert_eq!((socket.ttl().ok(), socket.multicast_ttl_v4().ok()), (Some(17), Some(5)));
    let get = |level, name| sockopt::get_i32(socket.as_fd(), level, name).expect("got");
    assert_eq!(get(libc::SOL_SOCKET, libc::SO_RCVBUF), 140_000);
    assert_eq!(get(libc::IPPROTO_IP, libc::IP_TOS), 0x10);
    assert_eq!(get(libc::IPPROTO_IP, libc::IP_PKTINFO), 1);
    let mut name = [0; 16];
    let fd = socket.as_fd();
    let n = sockopt::get(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut name).expect("got");
    assert_eq!(&name[..n], b"lo\0");
}

fn udp_connected(stage: &Stage) {
    let (a, b) = (udp(), udp());
    a.connect(address(&b)).expect("connected");
    stage.first();
    b.connect(address(&a)).expect("connected");
    b.send(b"early").expect("sent");
    let c = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
    c.connect(address(&b)).expect("connected");
    let local = address(&c);
    stage.last();
    assert_eq!(a.peer_addr().expect("a peer"), address(&b));
    assert_eq!(b.peer_addr().expect("a peer"), address(&a));
    assert_eq!((address(&c), c.peer_addr().expect("a peer")), (local, address(&b)));
    assert_eq!(heard(&a), (b"early".to_vec(), address(&b)));
    a.send(b"on").expect("sent");
    assert_eq!(heard(&b), (b"on".to_vec(), address(&a)));
    c.send(b"not from its peer").expect("sent");
    nothing(&b);
}

fn udp_queue(stage: &Stage) {
    let receiver = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
    receiver.set_nonblocking(true).expect("set");
    let to = (Ipv4Addr::LOCALHOST, address(&receiver).port());
    let (a, b) = (udp(), udp());
    a.send_to(b"one", to).expect("sent");
    stage.first();
    b.send_to(&[2; 40_000], to).expect("sent");
    let from_b = address(&b);
    drop(b);
    a.send_to(b"three", to).expect("sent");
    stage.last();
    assert_eq!(heard(&receiver), (b"one".to_vec(), address(&a)));
    assert_eq!(heard(&receiver), (vec![2; 40_000], from_b));
    assert_eq!(heard(&receiver), (b"three".to_vec(), address(&a)));
    nothing(&receiver);
}

fn udp_v6(stage: &Stage) {
    // Where IPv6 is switched off there is nothing to test but the socket itself.
    let bound = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0));
    let idle = sockopt::open(libc::AF_INET6, libc::SOCK_DGRAM, 0).expect("a socket");
    sockopt::set_i32(idle.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1).expect("set");
    if let Ok(socket) = &bound {
        socket.set_nonblocking(true).expect("set");
        socket.send_to(b"to myself", address(socket)).expect("sent");
    }
    stage.first();
    sockopt::set_i32(idle.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20).expect("set");
    stage.last();
    let get = |name| sockopt::get_i32(idle.as_fd(), libc::IPPROTO_IPV6, name).expect("got");
    assert_eq!((get(libc::IPV6_V6ONLY), get(libc::IPV6_TCLASS)), (1, 0x20));
    if let Ok(socket) = &bound {
        assert_eq!(heard(socket), (b"to myself".to_vec(), address(socket)));
        nothing(socket);
    }
}

fn udp_idle(stage: &Stage) {
    let early = udp();
    let old = address(&early);
    stage.first();
    drop(early);
    let late = sockopt::open(libc::AF_INET, libc::SOCK_DGRAM, 0).expect("a socket");
    stage.last();
    assert_eq!(send(late.as_raw_fd(), b"x", MsgFlags::empty()), Err(nix::Error::EDESTADDRREQ));
    UdpSocket::bind(old).expect("free");
}

fn multicast(stage: &Stage) {
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let joined = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
    joined.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).expect("joined");
    let other = udp();
    stage.first();
    let late = Ipv4Addr::new(239, 1, 2, 4);
    joined.join_multicast_v4(&late, &Ipv4Addr::LOCALHOST).expect("joined");
    joined.leave_multicast_v4(&group, &Ipv4Addr::LOCALHOST).expect("left");
    stage.last();
    let again = |s: &UdpSocket, group| s.join_multicast_v4(group, &Ipv4Addr::LOCALHOST);
    let error = again(&joined, &late).expect_err("it is a member");
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    again(&joined, &group).expect("it has left");
    again(&other, &late).expect("it never was");
}

fn raw(stage: &Stage) {
    let socket = sockopt::open(libc::AF_INET, libc::SOCK_RAW, 253).expect("a socket");
    let fd = socket.as_fd();
    sockopt::set_i32(fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 1).expect("set");
    stage.first();
    // ICMP_FILTER (SOL_RAW)
    let ping = sockopt::open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).expect("a socket");
    sockopt::set_i32(ping.as_fd(), 255, 1, !0).expect("set");
    stage.last();
    let get = |level, name| sockopt::get_i32(fd, level, name).expect("got");
    assert_eq!(get(libc::IPPROTO_IP, libc::IP_HDRINCL), 1);
    assert_eq!(get(libc::SOL_SOCKET, libc::SO_TYPE), libc::SOCK_RAW);
    assert_eq!(get(libc::SOL_SOCKET, libc::SO_PROTOCOL), 253);
    assert_eq!(sockopt::get_i32(ping.as_fd(), 255, 1).expect("got"), !0);
}

fn icmp(stage: &Stage) {
    // Who may have one is a setting of the namespace, which has to hold at the backup too.
    let all = "/proc/sys/net/ipv4/ping_group_range";
    let may = std::fs::read_to_string(all).expect("read").split_whitespace().next() == Some("0");
    let open = || sockopt::open(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP);
    let socket = may.then(|| open().expect("a socket"));
    stage.first();
    stage.last();
    if let Some(socket) = socket {
        let get = |name| sockopt::get_i32(socket.as_fd(), libc::SOL_SOCKET, name).expect("got");
        assert_eq!(get(libc::SO_PROTOCOL), libc::IPPROTO_ICMP);
    }
}

fn netlink(stage: &Stage) {
    const ROUTE: i32 = 0;
    const NETLINK: i32 = 270;
    let socket = sockopt::open(libc::AF_NETLINK, libc::SOCK_RAW, ROUTE).expect("a socket");
    let address = NetlinkAddr::new(4321, libc::RTMGRP_LINK as u32);
    bind(socket.as_raw_fd(), &address).expect("bound");
    stage.first();
    // NETLINK_ADD_MEMBERSHIP, RTNLGRP_NSID; NETLINK_EXT_ACK
    sockopt::set_i32(socket.as_fd(), NETLINK, 1, 28).expect("joined");
    sockopt::set_i32(socket.as_fd(), NETLINK, 11, 1).expect("set");
    stage.last();
    let local = getsockname::<NetlinkAddr>(socket.as_raw_fd()).expect("a name");
    assert_eq!((local.pid(), local.groups()), (4321, libc::RTMGRP_LINK as u32 | 1 << 27));
    assert_eq!(sockopt::get_i32(socket.as_fd(), NETLINK, 11).expect("got"), 1);
    // RTM_GETLINK of all: the kernel answers.
    let mut request = [0u8; 32];
    request[0] = 32;
    request[4..8].copy_from_slice(&[18, 0, 1, 3]);
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).expect("sent");
    assert!(recv(socket.as_raw_fd(), &mut [0; 8192], MsgFlags::empty()).expect("answered") > 16);
}

fn tcp_idle(stage: &Stage) {
    let bound = sockopt::open(libc::AF_INET, libc::SOCK_STREAM, 0).expect("a socket");
    let address = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, 0);
    bind(bound.as_raw_fd(), &address).expect("bound");
    let name = || getsockname::<nix::sys::socket::SockaddrIn>(bound.as_raw_fd()).expect("a name");
    let before = name();
    stage.first();
    stage.last();
    assert_eq!(name(), before);
}
