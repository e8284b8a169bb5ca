//! TCP sockets as a glance shows them: which fields of the kernel's structures are copied, and what
//! they say.
//!
//! Invariant: every field that an option is kept in is in the list, so that a record with the same
//! settings is of a socket with the same options.

use super::layout::{Layout, Use, Wanted};
use crate::bpf::btf::Btf;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

macro_rules! fields {
    ($($name:ident: $structure:ident $path:literal $used:ident,)*) => {
        /// The fields of a TCP socket that are copied.
        #[allow(dead_code, reason = "some are only compared")]
        #[derive(Clone, Copy)]
        enum Field { $($name,)* }
        const FIELDS: &[Wanted] = &[$((Structure::$structure as usize, $path, Use::$used),)*];
    };
}

/// Structures that fields are in.
#[derive(Clone, Copy)]
pub(super) enum Structure {
    Tcp,
    Ipv6,
}

fields! {
    Addresses: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_addrpair" Identity,
    Ports: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_portpair" Identity,
    Family: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_family" Identity,
    State: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_state" Data,
    Reuse: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_reuse" Setting,
    ReusePort: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_reuseport" Setting,
    Ipv6Only: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_ipv6only" Setting,
    Device: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_bound_dev_if" Setting,
    RemoteV6: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_v6_daddr" Identity,
    LocalV6: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_v6_rcv_saddr" Identity,
    Cookie: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_cookie" Identity,
    Flags: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_flags" Setting,
    Disconnects: Tcp "inet_conn.icsk_inet.sk.sk_disconnects" Identity,
    PeekOffset: Tcp "inet_conn.icsk_inet.sk.sk_peek_off" Setting,
    BusyPoll: Tcp "inet_conn.icsk_inet.sk.sk_ll_usec" Setting,
    Locked: Tcp "inet_conn.icsk_inet.sk.sk_userlocks" Setting,
    ReceiveBuffer: Tcp "inet_conn.icsk_inet.sk.sk_rcvbuf" Data,
    SendBuffer: Tcp "inet_conn.icsk_inet.sk.sk_sndbuf" Data,
    Filter: Tcp "inet_conn.icsk_inet.sk.sk_filter" Setting,
    ReceiveTimeout: Tcp "inet_conn.icsk_inet.sk.sk_rcvtimeo" Setting,
    SendTimeout: Tcp "inet_conn.icsk_inet.sk.sk_sndtimeo" Setting,
    LowWater: Tcp "inet_conn.icsk_inet.sk.sk_rcvlowat" Setting,
    Timestamping: Tcp "inet_conn.icsk_inet.sk.sk_tsflags" Setting,
    MaxPacing: Tcp "inet_conn.icsk_inet.sk.sk_max_pacing_rate" Setting,
    Priority: Tcp "inet_conn.icsk_inet.sk.sk_priority" Setting,
    Mark: Tcp "inet_conn.icsk_inet.sk.sk_mark" Setting,
    NoCheck: Tcp "inet_conn.icsk_inet.sk.sk_no_check_tx" Setting,
    Shutdown: Tcp "inet_conn.icsk_inet.sk.sk_shutdown" Data,
    Linger: Tcp "inet_conn.icsk_inet.sk.sk_lingertime" Setting,
    Backlog: Tcp "inet_conn.icsk_inet.sk.sk_max_ack_backlog" Data,
    InetFlags: Tcp "inet_conn.icsk_inet.inet_flags" Setting,
    TimeToLive: Tcp "inet_conn.icsk_inet.uc_ttl" Setting,
    TypeOfService: Tcp "inet_conn.icsk_inet.tos" Setting,
    MinTimeToLive: Tcp "inet_conn.icsk_inet.min_ttl" Setting,
    PathMtu: Tcp "inet_conn.icsk_inet.pmtudisc" Setting,
    PortRange: Tcp "inet_conn.icsk_inet.local_port_range" Setting,
    DeferAccept: Tcp "inet_conn.icsk_accept_queue.rskq_defer_accept" Setting,
    FastOpen: Tcp "inet_conn.icsk_accept_queue.fastopenq.max_qlen" Setting,
    RtoMin: Tcp "inet_conn.icsk_rto_min" Setting,
    RtoMax: Tcp "inet_conn.icsk_rto_max" Setting,
    DelackMax: Tcp "inet_conn.icsk_delack_max" Setting,
    Congestion: Tcp "inet_conn.icsk_ca_ops" Setting,
    Protocol: Tcp "inet_conn.icsk_ulp_ops" Setting,
    SynRetries: Tcp "inet_conn.icsk_syn_retries" Setting,
    UserTimeout: Tcp "inet_conn.icsk_user_timeout" Setting,
    NotSent: Tcp "notsent_lowat" Setting,
    Nagle: Tcp "nonagle" Data,
    QueueLength: Tcp "recvmsg_inq" Setting,
    ThinTimeouts: Tcp "thin_lto" Setting,
    FastOpenConnect: Tcp "fastopen_connect" Setting,
    FastOpenNoCookie: Tcp "fastopen_no_cookie" Setting,
    SaveSyn: Tcp "save_syn" Setting,
    KeepAliveProbes: Tcp "keepalive_probes" Setting,
    KeepAliveTime: Tcp "keepalive_time" Setting,
    KeepAliveInterval: Tcp "keepalive_intvl" Setting,
    Linger2: Tcp "linger2" Setting,
    TxDelay: Tcp "tcp_tx_delay" Setting,
    MaxSegment: Tcp "rx_opt.user_mss" Setting,
    Md5: Tcp "md5sig_info" Setting,
    WriteSeq: Tcp "write_seq" Data,
    SendUna: Tcp "snd_una" Data,
    RcvNxt: Tcp "rcv_nxt" Data,
    CopiedSeq: Tcp "copied_seq" Data,
    Urgent: Tcp "urg_data" Data,
    Repair: Tcp "repair" Data,
    WindowSeq: Tcp "snd_wl1" Data,
    SendWindow: Tcp "snd_wnd" Data,
    MaxWindow: Tcp "max_window" Data,
    ReceiveWindow: Tcp "rcv_wnd" Data,
    WindowUpdate: Tcp "rcv_wup" Data,
    TimestampOffset: Tcp "tsoffset" Data,
    Microseconds: Tcp "tcp_usec_ts" Identity,
    PeerSegment: Tcp "rx_opt.mss_clamp" Identity,
    HasTimestamps: Tcp "rx_opt.tstamp_ok" Identity,
    HasScale: Tcp "rx_opt.wscale_ok" Identity,
    HasSack: Tcp "rx_opt.sack_ok" Identity,
    SendScale: Tcp "rx_opt.snd_wscale" Identity,
    ReceiveScale: Tcp "rx_opt.rcv_wscale" Identity,
    HopLimit: Ipv6 "hop_limit" Setting,
    PathMtuV6: Ipv6 "pmtudisc" Setting,
    TrafficClass: Ipv6 "tclass" Setting,
    Receives: Ipv6 "rxopt.all" Setting,
    MinHops: Ipv6 "min_hopcount" Setting,
}

/// What was seen of a TCP socket.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Tcp<'a> {
    layout: &'a Layout,
    record: &'a [u8],
    /// Nanoseconds on the monotonic clock.
    time: u64,
}

/// What the timestamps of a connection are taken from.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Clock {
    offset: u32,
    microseconds: bool,
}

impl Clock {
    /// TCP_TIMESTAMP at this time (nanoseconds on the monotonic clock).
    pub(in crate::capture) fn at(self, time: u64) -> u32 {
        let now = |unit| ((time / unit) as u32).wrapping_add(self.offset);
        if self.microseconds { now(1_000) | 1 } else { now(1_000_000) & !1 }
    }
}

/// Where what is looked at lies in a TCP socket, and in what is copied of it.
#[derive(Debug)]
pub(in crate::capture) struct TcpLayout(pub(super) Layout);

impl TcpLayout {
    pub(in crate::capture) fn new(btf: &Btf) -> io::Result<Self> {
        let structures = [btf.structure("tcp_sock")?, btf.structure("ipv6_pinfo")?];
        Layout::new(btf, &structures, FIELDS).map(Self)
    }

    /// What is looked at of the bytes of a struct tcp_sock.
    pub(in crate::capture) fn record(&self, socket: &[u8]) -> Vec<u8> {
        self.0.record(Structure::Tcp as usize, socket)
    }

    /// Where sequence numbers are in a struct tcp_sock that move when anything is sent or received.
    pub(super) fn sequences(&self) -> [usize; 4] {
        [Field::WriteSeq, Field::SendUna, Field::RcvNxt, Field::CopiedSeq]
            .map(|field| self.0.offset(field as usize))
    }

    /// What a record says that was made at this time (nanoseconds on the monotonic clock).
    pub(in crate::capture) fn show<'a>(&'a self, record: &'a [u8], time: u64) -> Tcp<'a> {
        Tcp { layout: &self.0, record, time }
    }
}

impl Tcp<'_> {
    fn get(&self, field: Field) -> u64 {
        self.layout.get(self.record, field as usize)
    }

    fn word(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// As in tcp_states.h.
    pub(in crate::capture) fn state(&self) -> u8 {
        self.get(Field::State) as u8
    }

    /// This side and the other, as getsockname(2) and getpeername(2) give them.
    pub(in crate::capture) fn addresses(&self) -> [SocketAddr; 2] {
        let [a, b, c, d] = (self.get(Field::Ports) as u32).to_ne_bytes();
        let ports = [u16::from_ne_bytes([c, d]), u16::from_be_bytes([a, b])];
        if self.get(Field::Family) as i32 == libc::AF_INET {
            let [a, b, c, d, e, f, g, h] = self.get(Field::Addresses).to_ne_bytes();
            let [local, remote] = [Ipv4Addr::new(e, f, g, h), Ipv4Addr::new(a, b, c, d)];
            return [(local, ports[0]).into(), (remote, ports[1]).into()];
        }
        let address = |field, port| {
            let bytes = self.layout.bytes(self.record, field as usize);
            let ip = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).expect("sixteen bytes"));
            let scope = if ip.is_unicast_link_local() { self.word(Field::Device) } else { 0 };
            SocketAddrV6::new(ip, port, 0, scope).into()
        };
        [address(Field::LocalV6, ports[0]), address(Field::RemoteV6, ports[1])]
    }

    /// The address of its congestion control (struct tcp_congestion_ops).
    pub(in crate::capture) fn congestion(&self) -> u64 {
        self.get(Field::Congestion)
    }

    /// A copy of the record, with SO_COOKIE, which the kernel makes up when it is asked for.
    pub(in crate::capture) fn with_cookie(&self, cookie: u64) -> Box<[u8]> {
        let mut record = Box::<[u8]>::from(self.record);
        self.layout.set(&mut record, Field::Cookie as usize, cookie);
        record
    }

    /// Whether a record of before is of the same connection.
    pub(in crate::capture) fn is_of(&self, before: &[u8]) -> bool {
        self.layout.same(self.record, before)
    }

    /// Whether a record of before has the same options, but for those that are shown here.
    pub(in crate::capture) fn has_options_of(&self, before: &[u8]) -> bool {
        self.layout.set_alike(self.record, before)
    }

    /// SO_SNDBUF and SO_RCVBUF, which the kernel changes by itself.
    pub(in crate::capture) fn buffers(&self) -> [i32; 2] {
        [self.word(Field::SendBuffer) as i32, self.word(Field::ReceiveBuffer) as i32]
    }

    /// TCP_NODELAY and TCP_CORK, which programs change from one write to the next.
    pub(in crate::capture) fn delays(&self) -> (bool, bool) {
        let nagle = self.get(Field::Nagle);
        (nagle & 1 != 0, nagle & 2 != 0)
    }

    /// Length of a listener's accept queue.
    pub(in crate::capture) fn backlog(&self) -> u32 {
        self.word(Field::Backlog)
    }

    /// Sequence number after the last byte written, and of the first not acknowledged.
    pub(in crate::capture) fn sent(&self) -> (u32, u32) {
        (self.word(Field::WriteSeq), self.word(Field::SendUna))
    }

    /// Sequence number expected next, and of the first byte not read.
    pub(in crate::capture) fn received(&self) -> (u32, u32) {
        (self.word(Field::RcvNxt), self.word(Field::CopiedSeq))
    }

    /// As TCP_REPAIR_WINDOW gives it.
    pub(in crate::capture) fn window(&self) -> [u32; 5] {
        use Field::{MaxWindow, ReceiveWindow, SendWindow, WindowSeq, WindowUpdate};
        [WindowSeq, SendWindow, MaxWindow, ReceiveWindow, WindowUpdate].map(|f| self.word(f))
    }

    /// The largest segment that the peer takes.
    pub(in crate::capture) fn peer_segment(&self) -> u32 {
        self.word(Field::PeerSegment)
    }

    /// TCP_TIMESTAMP, if timestamps were agreed on: its lowest bit says that they are microseconds.
    pub(in crate::capture) fn timestamp(&self) -> Option<u32> {
        self.clock().map(|clock| clock.at(self.time))
    }

    /// The clock behind that.
    pub(in crate::capture) fn clock(&self) -> Option<Clock> {
        let offset = self.word(Field::TimestampOffset);
        let microseconds = self.get(Field::Microseconds) != 0;
        (self.get(Field::HasTimestamps) != 0).then_some(Clock { offset, microseconds })
    }

    pub(in crate::capture) fn sack(&self) -> bool {
        self.get(Field::HasSack) != 0
    }

    /// Scales of what the peer announces and of what we do, if agreed on.
    pub(in crate::capture) fn scales(&self) -> Option<(u8, u8)> {
        let scales = (self.get(Field::SendScale) as u8, self.get(Field::ReceiveScale) as u8);
        (self.get(Field::HasScale) != 0).then_some(scales)
    }

    /// Whether the program has closed its side for reading, or the peer has closed.
    pub(in crate::capture) fn is_shut_for_reading(&self) -> bool {
        self.get(Field::Shutdown) & 1 != 0
    }

    /// Whether it has something that a glance does not show.
    pub(in crate::capture) fn is_special(&self) -> bool {
        use Field::{Microseconds, Repair, Urgent};
        [Urgent, Repair, Microseconds].iter().any(|f| self.get(*f) != 0)
    }

    /// Whether both ends may be in the container: segments arrive although its input is held.
    pub(in crate::capture) fn is_local(&self) -> bool {
        let [a, b, c, d, ..] = self.get(Field::Addresses).to_ne_bytes();
        let ours = &self.get(Field::Addresses).to_ne_bytes()[4..];
        let v4 = a == 127 || (ours == [a, b, c, d] && ours != [0; 4]);
        let six = |f| self.layout.bytes(self.record, f as usize);
        let (remote, local) = (six(Field::RemoteV6), six(Field::LocalV6));
        let mapped = remote[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let v6 = remote != [0; 16] && (remote == local || (mapped && remote[12] == 127));
        v4 || v6
    }
}
