//! Internet sockets in a checkpoint.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Options that most sockets share; read with getsockopt(2), set again at restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the SO_ and TCP_ constants")]
pub struct SocketOptions {
    pub reuse_addr: bool,
    pub reuse_port: bool,
    pub keep_alive: bool,
    /// Seconds before the first probe, between probes, and the number of probes.
    pub keep_alive_timing: [i32; 3],
    /// Send and receive buffer as getsockopt gives them (twice what was set), and whether the
    /// program set them (SOCK_SNDBUF_LOCK 1 | SOCK_RCVBUF_LOCK 2, from SO_BUF_LOCK).
    pub buffers: [i32; 2],
    pub buffer_lock: i32,
    /// struct linger: on, seconds.
    pub linger: (i32, i32),
    pub no_delay: bool,
    pub cork: bool,
    pub user_timeout: u32,
    pub defer_accept: i32,
    pub quick_ack: bool,
    pub v6_only: bool,
    pub congestion: String,
    pub mark: u32,
    pub priority: i32,
    /// Options of [`super::options::INTS`] that are not at their default: level, name, value.
    pub more: Vec<(i32, i32, i32)>,
    /// SO_BINDTODEVICE: the interface's name, or nothing.
    pub device: String,
    /// SO_RCVTIMEO and SO_SNDTIMEO: seconds and microseconds; zero for none.
    pub timeouts: [(i64, i64); 2],
    /// TCP_MAXSEG as set before the connection; 0 for none.
    pub max_segment: i32,
}

/// A listening TCP socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpListener {
    /// Bound address.
    pub local: SocketAddr,
    /// Length of the accept queue that listen(2) was called with.
    pub backlog: u32,
    /// Its options.
    pub options: SocketOptions,
}

/// State names as in the kernel's tcp_states.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TcpState {
    /// Open both ways.
    Established,
    /// The peer has closed its side; the program has not.
    CloseWait,
    /// Nothing is left of the connection but the descriptor.
    Closed,
    /// The program has closed its side; the peer has not acknowledged that.
    FinWait1,
    /// The program has closed its side, and the peer knows.
    FinWait2,
    /// Both have closed, this side first; the peer has not acknowledged our end.
    Closing,
    /// Both have closed, the peer first; it has not acknowledged our end.
    LastAck,
    /// connect(2) is under way.
    SynSent,
}

impl TcpState {
    /// Whether the program has closed its side: a FIN follows the send queue.
    pub fn has_sent_fin(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::Closing | Self::LastAck)
    }

    /// Whether the peer has closed its side: its FIN is counted in `rcv_nxt`.
    pub fn has_received_fin(self) -> bool {
        matches!(self, Self::CloseWait | Self::Closing | Self::LastAck)
    }

    /// Whether there is a peer that knows of the connection.
    pub fn is_synchronized(self) -> bool {
        !matches!(self, Self::Closed | Self::SynSent)
    }
}

/// A TCP connection, captured in repair mode (tcp(7), TCP_REPAIR).
///
/// Sequence numbers are absolute. `send_queue` ends at `write_seq`; its first byte is the first
/// that the peer has not acknowledged. `receive_queue` ends at `rcv_nxt`; its first byte is the
/// first that the program has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// This side.
    pub local: SocketAddr,
    /// The other side.
    pub remote: SocketAddr,
    /// State at the stop.
    pub state: TcpState,
    /// Sequence number after the last byte that the program has written, our FIN not counted. In
    /// `SynSent` the SYN is counted.
    pub write_seq: u32,
    /// Sequence number expected next from the peer, its FIN counted.
    pub rcv_nxt: u32,
    /// Written but not acknowledged.
    #[serde(with = "serde_bytes")]
    pub send_queue: Vec<u8>,
    /// Received but not read.
    #[serde(with = "serde_bytes")]
    pub receive_queue: Vec<u8>,
    /// TCP_REPAIR_WINDOW: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// Maximum segment size that the peer takes (mss_clamp).
    pub mss: u32,
    /// Selective acknowledgement was agreed on.
    pub sack: bool,
    /// Window scales (ours to shift what the peer announces, ours that we announce), if agreed.
    pub window_scale: Option<(u8, u8)>,
    /// Timestamps were agreed on, and this is our clock (TCP_TIMESTAMP) at the stop.
    pub timestamp: Option<u32>,
    /// Its options.
    pub options: SocketOptions,
    /// The program has shut its side for reading (SHUT_RD), and the peer has not closed.
    pub shut_read: bool,
    /// An error waits to be read (SO_ERROR); only in `Closed`.
    pub error: bool,
}

/// A socket that is neither connected nor listening.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InetIdle {
    /// AF_INET6 instead of AF_INET.
    pub v6: bool,
    /// SOCK_STREAM or SOCK_DGRAM.
    pub kind: i32,
    /// Bound address, if any.
    pub local: Option<SocketAddr>,
    /// Its options.
    pub options: SocketOptions,
}

/// Options as getsockopt(2) gives them: level, name and value.
pub type RawOptions = Vec<(i32, i32, Vec<u8>)>;

/// A connection that no descriptor names yet: its handshake is under way, or it waits in a
/// listener's accept queue. What is known of it the gateway has seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Young {
    /// The container's side.
    pub local: SocketAddr,
    /// The client.
    pub remote: SocketAddr,
    /// The hardware address that the client's frames come from.
    pub peer_mac: [u8; 6],
    /// Sequence number of the client's SYN.
    pub client_isn: u32,
    /// Sequence number of our SYN.
    pub server_isn: u32,
    /// Maximum segment size that the client takes.
    pub mss: u16,
    /// Window scales of the client and ours, if both offered one.
    pub window_scale: Option<(u8, u8)>,
    /// Both offered selective acknowledgement.
    pub sack: bool,
    /// Both offered explicit congestion notification.
    pub ecn: bool,
    /// The client's clock as last seen, and ours at the stop, if both offered timestamps.
    pub timestamp: Option<(u32, u32)>,
    /// The client has acknowledged our SYN: for it the connection is established.
    pub acknowledged: bool,
    /// Window that the client announced last, as on the wire.
    pub window: u16,
    /// What the client has sent.
    #[serde(with = "serde_bytes")]
    pub received: Vec<u8>,
    /// The client has closed its side after that.
    pub fin: bool,
    /// The frame with our SYN, to be sent again to a client that has not answered.
    #[serde(with = "serde_bytes")]
    pub syn_ack: Vec<u8>,
}

/// A connection that the program has closed, and what it has still to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parting {
    /// The container's side.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// The hardware address that frames to the peer go to.
    pub peer_mac: [u8; 6],
    /// Sequence number after our FIN.
    pub end: u32,
    /// Sequence number expected next from the peer.
    pub rcv_nxt: u32,
    /// Window that was announced last, as on the wire.
    pub window: u16,
    /// Our clock as last sent, if timestamps were agreed on.
    pub timestamp: Option<u32>,
    /// Frames that the peer has not acknowledged, the one with the FIN last.
    pub frames: Vec<Vec<u8>>,
}

/// A UDP, raw or ICMP socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatagramSocket {
    /// AF_INET6 instead of AF_INET.
    pub v6: bool,
    /// SOCK_DGRAM or SOCK_RAW.
    pub kind: i32,
    /// IPPROTO_ of its packets.
    pub protocol: i32,
    /// Bound address, if any.
    pub local: Option<SocketAddr>,
    /// Address it is connected to, if any.
    pub remote: Option<SocketAddr>,
    /// Datagrams that wait to be read, oldest first.
    pub queue: Vec<Datagram>,
    /// Multicast groups that it has joined.
    pub groups: Vec<Membership>,
    /// Its options.
    pub options: RawOptions,
}

/// A datagram that waits to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Sender.
    pub from: SocketAddr,
    /// Address of ours that it was sent to.
    pub to: IpAddr,
    /// Its bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// A multicast group that a socket has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// By way of this interface.
    pub interface: String,
    /// The group.
    pub group: IpAddr,
}

/// A netlink socket without messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// SOCK_RAW or SOCK_DGRAM.
    pub kind: i32,
    /// NETLINK_ family.
    pub protocol: i32,
    /// Port id it is bound to; 0: not bound.
    pub port: u32,
    /// Groups that it listens to.
    pub groups: Vec<u32>,
    /// Its options.
    pub options: RawOptions,
}

/// struct sockaddr_storage with an address and port 0.
pub fn sockaddr_storage(address: IpAddr) -> [u8; 128] {
    let mut raw = [0; 128];
    match address {
        IpAddr::V4(a) => {
            raw[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            raw[4..8].copy_from_slice(&a.octets());
        }
        IpAddr::V6(a) => {
            raw[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            raw[8..24].copy_from_slice(&a.octets());
        }
    }
    raw
}
