//! Resumption of TCP: where are the peers?
//!
//! A restored socket must know the peer's rcv_nxt. Restored with its old send queue it would wait
//! for timers of one to three seconds, and if the peer is ahead of the checkpoint's snd_una, its
//! acknowledgements would be taken for nonsense for good. So before the sockets are restored the
//! gateway asks each peer:
//!
//! ```text
//!  gateway (as the container)                         peer
//!     │ ACK, no data, seq = snd_una - 1                │   a byte that it has already:
//!     │ ─────────────────────────────────────────────► │   it must answer with an ACK
//!     │ ◄───────────────────────────────────────────── │   (RFC 9293, 3.10.7.4)
//!     │                       ACK, ack = its rcv_nxt   │
//!     │ or: RST                                        │   it knows no such connection
//! ```
//!
//! What lies between snd_una and the answer has arrived; the rest the restored socket sends by
//! itself. A Linux peer gives such an answer at most once in 500 ms for a connection, so a probe
//! is repeated only after that.
//!
//! Both sides may have to find each other first: the probe asks for the neighbours that it does
//! not know from earlier frames, and answers when they ask for the container.
//!
//! [`PeerProbe`] does no I/O and has no clock. A segment of ours can be forged into a restored
//! socket with [`PeerSegment`]: the FIN that it had received, the RST that it had drawn.

use super::wire::{self, before};
use super::{HEADER, Mac};
use replicator::image::net::TcpConnection;
use replicator::restore::Segment;
use smoltcp::wire::{
    ArpOperation, NdiscNeighborFlags, NdiscRepr, TcpControl, TcpRepr, TcpSeqNumber,
    TcpTimestampRepr,
};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Between two probes of one connection: more than the 500 ms in which a peer stays silent.
const PROBE_AGAIN: Duration = Duration::from_millis(550);
/// Between two questions for one hardware address.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Replies to neighbours between two calls of [`PeerProbe::due`]; they ask again.
const MAX_REPLIES: usize = 256;

/// One connection of the container, as its checkpoint has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The container's side.
    pub local: SocketAddr,
    /// The peer.
    pub remote: SocketAddr,
    /// First sequence number that the peer had not acknowledged.
    pub snd_una: u32,
    /// Sequence number expected next from the peer.
    pub rcv_nxt: u32,
    /// Receive window to announce, as it goes on the wire (scaled).
    pub window: u16,
    /// The container's TCP clock now, if timestamps were agreed on.
    pub timestamp: Option<u32>,
}

impl Connection {
    /// The connection of a checkpoint whose stop was `since_stop` ago.
    pub fn of_checkpoint(c: &TcpConnection, since_stop: Duration) -> Self {
        let [_, _, _, rcv_wnd, _] = c.window;
        let shift = c.window_scale.map_or(0, |(_, ours)| u32::from(ours).min(14));
        let elapsed = since_stop.as_millis() as u32;
        Connection {
            local: c.local,
            remote: c.remote,
            snd_una: c.write_seq.wrapping_sub(c.send_queue.len() as u32),
            rcv_nxt: c.rcv_nxt,
            window: (rcv_wnd >> shift).min(u32::from(u16::MAX)) as u16,
            timestamp: c.timestamp.map(|clock| clock.wrapping_add(elapsed)),
        }
    }
}

/// The container's place in its network.
#[derive(Clone, Debug)]
pub struct LocalNet {
    /// Its hardware address.
    pub mac: Mac,
    /// Its addresses, with the length of their prefixes: what is on the link.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Its default gateways, at most one of a family counts.
    pub gateways: Vec<IpAddr>,
}

impl LocalNet {
    /// The neighbour that takes frames for `remote`.
    fn next_hop(&self, remote: IpAddr) -> IpAddr {
        let on_link = self.addresses.iter().any(|(a, prefix)| same_prefix(*a, remote, *prefix));
        let router = self.gateways.iter().find(|g| g.is_ipv4() == remote.is_ipv4());
        match router {
            Some(router) if !on_link => *router,
            _ => remote,
        }
    }
}

fn same_prefix(a: IpAddr, b: IpAddr, prefix: u8) -> bool {
    let bits = |a: IpAddr| match a {
        IpAddr::V4(a) => (u128::from(u32::from(a)) << 96, 32),
        IpAddr::V6(a) => (u128::from(a), 128),
    };
    let ((a_bits, width), (b_bits, b_width)) = (bits(a), bits(b));
    let shift = 128 - u32::from(prefix).min(width);
    width == b_width && (a_bits ^ b_bits).checked_shr(shift).unwrap_or(0) == 0
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has not answered.
    Silent,
    /// It has the connection.
    Alive {
        /// Sequence number that it expects next from the container.
        rcv_nxt: u32,
        /// Window that it announced, as on the wire (not scaled back).
        window: u16,
    },
    /// It answered with a reset.
    Gone,
}

#[derive(Debug)]
struct Peer {
    connection: Connection,
    next_hop: IpAddr,
    mac: Option<Mac>,
    probed: Option<Instant>,
    answer: Answer,
}

/// Asks the peers of a list of connections; see the [module](self).
#[derive(Debug)]
pub struct PeerProbe {
    net: LocalNet,
    peers: Vec<Peer>,
    /// (local, remote) to the place in `peers`.
    index: HashMap<(SocketAddr, SocketAddr), usize>,
    /// Peers without a hardware address, by the addresses (the peer's, the next hop's) that give it.
    unresolved: HashMap<IpAddr, Vec<usize>>,
    /// When each unknown neighbour was asked for last.
    asked: HashMap<IpAddr, Option<Instant>>,
    silent: usize,
    /// Answers to neighbours that asked for the container; at most [`MAX_REPLIES`].
    replies: Vec<Vec<u8>>,
}

impl PeerProbe {
    /// A probe of these connections. Addresses of IPv4 in IPv6 form count as what they are.
    pub fn new(net: LocalNet, connections: impl IntoIterator<Item = Connection>) -> Self {
        let mut probe = Self {
            net,
            peers: vec![],
            index: HashMap::new(),
            unresolved: HashMap::new(),
            asked: HashMap::new(),
            silent: 0,
            replies: vec![],
        };
        for mut connection in connections {
            connection.local = canonical(connection.local);
            connection.remote = canonical(connection.remote);
            let next_hop = probe.net.next_hop(connection.remote.ip());
            let key = (connection.local, connection.remote);
            let at = probe.peers.len();
            if probe.index.insert(key, at).is_some() {
                tracing::warn!(?key, "a connection is twice in the checkpoint");
            }
            probe.asked.insert(next_hop, None);
            for address in [next_hop, connection.remote.ip()] {
                probe.unresolved.entry(address).or_default().push(at);
            }
            let answer = Answer::Silent;
            probe.peers.push(Peer { connection, next_hop, mac: None, probed: None, answer });
            probe.silent += 1;
        }
        probe
    }

    /// States that frames for `address` go to `mac`.
    pub fn learn(&mut self, address: IpAddr, mac: Mac) {
        for at in self.unresolved.remove(&address.to_canonical()).unwrap_or_default() {
            self.peers[at].mac.get_or_insert(mac);
        }
    }

    /// Learns from a frame that the container has received where its sender is.
    pub fn learn_from(&mut self, frame: &[u8]) {
        if self.unresolved.is_empty() {
            return;
        }
        match wire::read_neighbour(frame) {
            Some((address, mac)) if mac != self.net.mac => self.learn(address, mac),
            _ => {}
        }
    }

    /// Frames to send now: questions for hardware addresses and answers to such, and probes.
    pub fn due(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let mut frames = std::mem::take(&mut self.replies);
        let is_due = |last: Option<Instant>, pause| last.is_none_or(|at| now >= at + pause);
        for peer in &mut self.peers {
            if peer.answer != Answer::Silent {
                continue;
            }
            if let Some(mac) = peer.mac {
                if is_due(peer.probed, PROBE_AGAIN) {
                    peer.probed = Some(now);
                    frames.extend(probe_frame((self.net.mac, mac), &peer.connection));
                }
            } else if let Some(last) = self.asked.get_mut(&peer.next_hop)
                && is_due(*last, ASK_AGAIN)
            {
                *last = Some(now);
                let from = (self.net.mac, peer.connection.local.ip());
                frames.extend(question(from, peer.next_hop));
            }
        }
        frames
    }

    /// When [`PeerProbe::due`] has something again, if no answer comes before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let silent = self.peers.iter().filter(|p| p.answer == Answer::Silent);
        silent
            .filter_map(|p| match p.mac {
                Some(_) => p.probed.map(|at| at + PROBE_AGAIN),
                None => self.asked.get(&p.next_hop).copied().flatten().map(|at| at + ASK_AGAIN),
            })
            .min()
    }

    /// Looks at a received frame. True if it was an answer and nothing else, so that the
    /// container has no use for it.
    pub fn observe(&mut self, frame: &[u8]) -> bool {
        self.learn_from(frame);
        if let Some((target, asker)) = wire::read_question(frame) {
            return self.reply(target, asker);
        }
        let Some(segment) = wire::read_tcp(frame) else { return false };
        let Some(at) = self.index.get(&(segment.to, segment.from)) else { return false };
        let peer = &mut self.peers[*at];
        let answer = if segment.rst {
            // Not a stale one, nor one that somebody made up without seeing the connection.
            if segment.seq.wrapping_sub(peer.connection.rcv_nxt) > 1 << 30 {
                return false;
            }
            Answer::Gone
        } else {
            let Some(rcv_nxt) = segment.ack else { return false };
            let known = match peer.answer {
                Answer::Alive { rcv_nxt, .. } => rcv_nxt,
                Answer::Gone => return false,
                Answer::Silent => peer.connection.snd_una,
            };
            if before(rcv_nxt, known) {
                return false;
            }
            Answer::Alive { rcv_nxt, window: segment.window }
        };
        if peer.answer == Answer::Silent {
            self.silent -= 1;
        }
        peer.answer = answer;
        segment.bare && !segment.rst
    }

    /// A neighbour has forgotten where the container is, so that its answer would not arrive;
    /// nobody else can tell it, as the container is unplugged.
    fn reply(&mut self, target: IpAddr, (asker, mac): (IpAddr, Mac)) -> bool {
        let ours = self.net.addresses.iter().any(|(a, _)| a.to_canonical() == target);
        if !ours || self.replies.len() >= MAX_REPLIES {
            return false;
        }
        let us = self.net.mac;
        self.replies.push(match (target, asker) {
            (IpAddr::V4(target), IpAddr::V4(asker)) => {
                wire::arp(mac, wire::arp_repr(ArpOperation::Reply, (us, target), (mac, asker)))
            }
            (IpAddr::V6(target_addr), IpAddr::V6(asker)) => {
                let flags = NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE;
                let lladdr = Some(us.into());
                let repr = NdiscRepr::NeighborAdvert { flags, target_addr, lladdr };
                wire::ndisc((us, target_addr), (mac, asker), repr)
            }
            _ => return false,
        });
        true
    }

    /// Whether every peer has answered.
    pub fn is_done(&self) -> bool {
        self.silent == 0
    }

    /// What each peer answered, in the order of the connections given.
    pub fn answers(&self) -> impl Iterator<Item = (&Connection, Answer)> {
        self.peers.iter().map(|p| (&p.connection, p.answer))
    }

    /// Hardware address to which frames for each peer go, in the same order, as far as known.
    pub fn macs(&self) -> impl Iterator<Item = (&Connection, Option<Mac>)> {
        self.peers.iter().map(|p| (&p.connection, p.mac))
    }
}

fn canonical(a: SocketAddr) -> SocketAddr {
    SocketAddr::new(a.ip().to_canonical(), a.port())
}

fn seq(n: u32) -> TcpSeqNumber {
    TcpSeqNumber(n as i32)
}

fn probe_frame(macs: (Mac, Mac), c: &Connection) -> Option<Vec<u8>> {
    let repr = TcpRepr {
        src_port: c.local.port(),
        dst_port: c.remote.port(),
        control: TcpControl::None,
        seq_number: seq(c.snd_una.wrapping_sub(1)),
        ack_number: Some(seq(c.rcv_nxt)),
        window_len: c.window,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: c.timestamp.map(|tsval| TcpTimestampRepr::new(tsval, 0)),
        payload: &[],
    };
    wire::tcp(macs, c.local.ip(), c.remote.ip(), &repr)
}

/// Who has `target`? Asked as the container.
fn question(from: (Mac, IpAddr), target: IpAddr) -> Option<Vec<u8>> {
    match (from.1, target) {
        (IpAddr::V4(us), IpAddr::V4(target)) => {
            let unknown = (Mac([0; 6]), target);
            let repr = wire::arp_repr(ArpOperation::Request, (from.0, us), unknown);
            Some(wire::arp(Mac::BROADCAST, repr))
        }
        (IpAddr::V6(us), IpAddr::V6(target_addr)) => {
            let lladdr = Some(from.0.into());
            let repr = NdiscRepr::NeighborSolicit { target_addr, lladdr };
            Some(wire::ndisc((from.0, us), wire::solicited_node(target_addr), repr))
        }
        _ => None,
    }
}

/// A segment from a peer to the container that we make up, for [`super::gate::Gate::inject`]:
/// one that the container's kernel had already processed, and whose effect (a closed side, a
/// reset) no socket option can restore.
#[derive(Clone, Copy, Debug)]
pub struct PeerSegment {
    /// The container's hardware address.
    pub to_mac: Mac,
    /// The neighbour that it seems to come from; any unicast address does.
    pub from_mac: Mac,
    /// The container's side of the connection.
    pub to: SocketAddr,
    /// The peer.
    pub from: SocketAddr,
    /// Its sequence number: for a FIN and for a reset the rcv_nxt of the restored socket.
    pub seq: u32,
    /// What it acknowledges: the snd_una of the restored socket.
    pub ack: u32,
    /// Window as on the wire.
    pub window: u16,
    /// Timestamp value and echo, if agreed on.
    pub timestamp: Option<(u32, u32)>,
}

impl PeerSegment {
    /// What the peer of a restored connection says from where both were.
    pub fn of_restored(segment: &Segment, to_mac: Mac, from_mac: Mac) -> Self {
        Self {
            to_mac,
            from_mac,
            to: segment.local,
            from: segment.remote,
            seq: segment.seq,
            ack: segment.ack,
            window: u16::MAX,
            timestamp: None,
        }
    }

    /// The peer has closed its side.
    pub fn fin(&self) -> Option<Vec<u8>> {
        self.build(TcpControl::Fin)
    }

    /// The peer has reset the connection.
    pub fn rst(&self) -> Option<Vec<u8>> {
        self.build(TcpControl::Rst)
    }

    /// An acknowledgement. `None`, as with the others, if the addresses are of two families.
    pub fn ack(&self) -> Option<Vec<u8>> {
        self.build(TcpControl::None)
    }

    fn build(&self, control: TcpControl) -> Option<Vec<u8>> {
        let (from, to) = (canonical(self.from), canonical(self.to));
        let repr = TcpRepr {
            src_port: from.port(),
            dst_port: to.port(),
            control,
            seq_number: seq(self.seq),
            ack_number: Some(seq(self.ack)),
            window_len: self.window,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: self.timestamp.map(|(val, echo)| TcpTimestampRepr::new(val, echo)),
            payload: &[],
        };
        wire::tcp((self.from_mac, self.to_mac), from.ip(), to.ip(), &repr)
    }
}

/// Destination of a frame, if it has one.
pub fn destination(frame: &[u8]) -> Option<Mac> {
    frame.get(HEADER..HEADER + 6).map(Mac::from_bytes)
}

#[cfg(test)]
mod tests;
