//! Which integer options of internet sockets a checkpoint carries, and what a fresh socket has.
//!
//! Only values that are not the default are stored ([`super::net::SocketOptions::more`]), so that
//! an ordinary socket costs nothing here. Options with a meaning of their own (buffers, linger,
//! congestion control) are fields of `SocketOptions`.

/// On which sockets an option exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Every internet socket.
    All,
    /// Those of IPv6.
    V6,
    /// TCP sockets.
    Tcp,
}

/// One option.
#[derive(Clone, Copy, Debug)]
pub struct IntOption {
    /// SOL_SOCKET, IPPROTO_IP, IPPROTO_IPV6 or IPPROTO_TCP.
    pub level: i32,
    /// Its number.
    pub name: i32,
    /// What a socket has when nobody sets it.
    pub default: i32,
    /// Where it exists.
    pub on: On,
    /// It decides whether bind(2) or connect(2) succeeds, or can be set only before them.
    pub early: bool,
}

const fn late(level: i32, name: i32, default: i32, on: On) -> IntOption {
    IntOption { level, name, default, on, early: false }
}

const fn early(level: i32, name: i32, default: i32, on: On) -> IntOption {
    IntOption { level, name, default, on, early: true }
}

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const V6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;

/// The options; see socket(7), ip(7), ipv6(7), tcp(7). Numbers that libc does not name have their
/// names beside them.
pub const INTS: &[IntOption] = &[
    late(SOCKET, libc::SO_RCVLOWAT, 1, On::All),
    late(SOCKET, libc::SO_OOBINLINE, 0, On::All),
    late(SOCKET, libc::SO_BROADCAST, 0, On::All),
    late(SOCKET, libc::SO_DONTROUTE, 0, On::All),
    late(SOCKET, libc::SO_TIMESTAMP, 0, On::All),
    late(SOCKET, libc::SO_TIMESTAMPNS, 0, On::All),
    late(SOCKET, libc::SO_PEEK_OFF, -1, On::All),
    late(SOCKET, libc::SO_BUSY_POLL, 0, On::All),
    late(SOCKET, libc::SO_MAX_PACING_RATE, -1, On::All),
    late(SOCKET, libc::SO_ZEROCOPY, 0, On::All),
    late(SOCKET, libc::SO_RXQ_OVFL, 0, On::All),
    late(SOCKET, 75, 0, On::All), // SO_RCVMARK
    late(SOCKET, libc::SO_NO_CHECK, 0, On::All),
    late(IP, libc::IP_TOS, 0, On::All),
    late(IP, libc::IP_TTL, 64, On::All),
    late(IP, libc::IP_PKTINFO, 0, On::All),
    late(IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_WANT, On::All),
    late(IP, libc::IP_RECVERR, 0, On::All),
    late(IP, libc::IP_RECVTTL, 0, On::All),
    late(IP, libc::IP_RECVTOS, 0, On::All),
    early(IP, libc::IP_FREEBIND, 0, On::All),
    early(IP, libc::IP_TRANSPARENT, 0, On::All),
    late(IP, libc::IP_MINTTL, 0, On::All),
    early(IP, libc::IP_BIND_ADDRESS_NO_PORT, 0, On::All),
    early(IP, 51, 0, On::All), // IP_LOCAL_PORT_RANGE
    late(V6, libc::IPV6_UNICAST_HOPS, 64, On::V6),
    late(V6, libc::IPV6_TCLASS, 0, On::V6),
    late(V6, libc::IPV6_MTU_DISCOVER, libc::IP_PMTUDISC_WANT, On::V6),
    late(V6, libc::IPV6_RECVERR, 0, On::V6),
    late(V6, libc::IPV6_RECVPKTINFO, 0, On::V6),
    late(V6, libc::IPV6_RECVHOPLIMIT, 0, On::V6),
    late(V6, libc::IPV6_RECVTCLASS, 0, On::V6),
    late(V6, libc::IPV6_DONTFRAG, 0, On::V6),
    late(V6, libc::IPV6_MINHOPCOUNT, 0, On::V6),
    early(V6, libc::IPV6_TRANSPARENT, 0, On::V6),
    early(V6, libc::IPV6_FREEBIND, 0, On::V6),
    late(TCP, libc::TCP_SYNCNT, 6, On::Tcp),
    late(TCP, libc::TCP_LINGER2, 60, On::Tcp),
    late(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 0, On::Tcp),
    early(TCP, libc::TCP_FASTOPEN, 0, On::Tcp),
    early(TCP, 30, 0, On::Tcp), // TCP_FASTOPEN_CONNECT
    early(TCP, 34, 0, On::Tcp), // TCP_FASTOPEN_NO_COOKIE
    late(TCP, libc::TCP_NOTSENT_LOWAT, 0, On::Tcp),
    late(TCP, libc::TCP_SAVE_SYN, 0, On::Tcp),
    late(TCP, 36, 0, On::Tcp),       // TCP_INQ
    late(TCP, 37, 0, On::Tcp),       // TCP_TX_DELAY
    late(TCP, 44, 120_000, On::Tcp), // TCP_RTO_MAX_MS
    late(TCP, 45, 200_000, On::Tcp), // TCP_RTO_MIN_US
    late(TCP, 46, 200_000, On::Tcp), // TCP_DELACK_MAX_US
];
