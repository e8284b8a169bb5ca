//! Handshakes: connections that no descriptor of the container names yet.
//!
//! The gate shows every SYN, and every frame of a connection that began with one it has shown, to
//! the [`Tracker`]. From a client's SYN until a checkpoint has the connection's descriptor, or
//! the container has said something on it (it has been accepted, then), the tracker knows what a
//! checkpoint cannot read from the kernel: sequence numbers, what was agreed on, and the bytes
//! that the client has sent. A takeover gives it all to the restored container's kernel
//! ([`replicator::young`]).
//!
//! Bounded (RB-1): what goes beyond is not known any more, and its client gets a reset at a
//! failover. Does no I/O and has no clock.

use super::wire::{self, TcpView, before};
use super::{HEADER, Mac};
use replicator::image::net::Young;
use smoltcp::wire::{TcpControl, TcpOption, TcpRepr, TcpSeqNumber, TcpTimestampRepr};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Bytes kept of one connection.
const MAX_BYTES: usize = 1 << 20;
/// Bytes kept of all.
const MAX_TOTAL: usize = 16 << 20;
/// After this the container's kernel has given up a handshake that was not answered.
const GIVEN_UP: Duration = Duration::from_secs(70);
/// Payload of an injected segment: fits every link and both families.
const SEGMENT: usize = 1200;

/// The container's side and the client's.
type Key = (SocketAddr, SocketAddr);

#[derive(Debug)]
struct Flow {
    young: Young,
    answered: bool,
    /// When the container's clock was seen.
    clock_at: Instant,
    /// Place in the accept queue.
    place: u64,
    begun: Instant,
}

/// The young connections of a container.
#[derive(Debug, Default)]
pub struct Tracker {
    flows: HashMap<Key, Flow>,
    bytes: usize,
    places: u64,
    dropped: u64,
}

/// Whether this may be the first segment of a connection. Cheap: no more than three bytes are
/// looked at in frames that are no TCP.
pub fn may_begin(frame: &[u8]) -> bool {
    const SYN_AND_ACK: u8 = 0x12;
    let at = |i: usize| frame.get(HEADER + i).copied().unwrap_or(0);
    let tcp = match (at(12), at(13)) {
        (8, 0) if at(23) == 6 => 14 + usize::from(at(14) & 15) * 4,
        (0x86, 0xdd) if at(20) == 6 => 54,
        _ => return false,
    };
    at(tcp + 13) & SYN_AND_ACK == 0x02
}

impl Tracker {
    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Connections that are not known any more because a bound was reached.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// A frame that the container receives.
    pub fn inbound(&mut self, frame: &[u8], now: Instant) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let key = (view.to, view.from);
        if view.tcp.syn() && !view.tcp.ack() {
            self.begin(key, &view, now);
            return;
        }
        if view.tcp.rst() {
            self.remove(&key);
            return;
        }
        let Some(flow) = self.flows.get_mut(&key).filter(|f| f.answered) else { return };
        let y = &mut flow.young;
        y.window = view.tcp.window_len();
        if let (Some((theirs, _)), Some((val, _))) = (&mut y.timestamp, timestamp(&view)) {
            *theirs = val;
        }
        let seen = view.tcp.ack() && view.ack() == y.server_isn.wrapping_add(1);
        if seen && !y.acknowledged {
            y.acknowledged = true;
            flow.place = self.places;
            self.places += 1;
        }
        let payload = view.tcp.payload();
        let next = y.client_isn.wrapping_add(1).wrapping_add(y.received.len() as u32);
        if y.fin || before(next, view.seq()) {
            return;
        }
        let known = next.wrapping_sub(view.seq()) as usize;
        if let Some(new) = payload.get(known..) {
            y.received.extend_from_slice(new);
            y.fin = view.tcp.fin();
            self.bytes += new.len();
            if y.received.len() > MAX_BYTES || self.bytes > MAX_TOTAL {
                self.dropped += 1;
                self.remove(&key);
            }
        }
    }

    /// A frame that the container has sent.
    pub fn outbound(&mut self, frame: &[u8], now: Instant) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let key = (view.from, view.to);
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let y = &mut flow.young;
        if view.tcp.syn() && view.tcp.ack() && view.ack() == y.client_isn.wrapping_add(1) {
            if flow.answered && y.server_isn == view.seq() {
                clock(flow, &view, now);
                return;
            }
            flow.answered = true;
            y.server_isn = view.seq();
            y.syn_ack = frame.to_vec();
            agree(y, &view);
            clock(flow, &view, now);
        } else if view.tcp.rst() || view.tcp.fin() || !view.tcp.payload().is_empty() {
            // It was accepted, or is over.
            self.remove(&key);
        } else {
            clock(flow, &view, now);
        }
    }

    fn begin(&mut self, key: Key, view: &TcpView<'_>, now: Instant) {
        let same = self.flows.get(&key).is_some_and(|f| f.young.client_isn == view.seq());
        if same {
            return;
        }
        self.remove(&key);
        self.flows.retain(|_, f| f.young.acknowledged || now < f.begun + GIVEN_UP);
        if self.flows.len() >= replicator::young::MAX {
            self.dropped += 1;
            return;
        }
        let mut young = Young {
            local: key.0,
            remote: key.1,
            peer_mac: view.mac.0,
            client_isn: view.seq(),
            server_isn: 0,
            mss: 0,
            window_scale: None,
            sack: false,
            ecn: view.tcp.ece() && view.tcp.cwr(),
            timestamp: None,
            acknowledged: false,
            window: view.tcp.window_len(),
            received: Vec::new(),
            fin: false,
            syn_ack: Vec::new(),
        };
        for option in options(view) {
            match option {
                TcpOption::MaxSegmentSize(mss) => young.mss = mss,
                TcpOption::WindowScale(shift) => young.window_scale = Some((shift.min(14), 0)),
                TcpOption::SackPermitted => young.sack = true,
                TcpOption::TimeStamp { tsval, .. } => young.timestamp = Some((tsval, 0)),
                _ => {}
            }
        }
        let flow = Flow { young, answered: false, clock_at: now, place: 0, begun: now };
        self.flows.insert(key, flow);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(flow) = self.flows.remove(key) {
            self.bytes -= flow.young.received.len();
        }
    }

    /// A checkpoint has the descriptor of this connection.
    pub fn forget(&mut self, local: SocketAddr, remote: SocketAddr) {
        self.remove(&(local, remote));
    }

    /// A connection that this container was restored with.
    pub fn restore(&mut self, young: &Young, now: Instant) {
        let key = (young.local, young.remote);
        self.remove(&key);
        self.bytes += young.received.len();
        let young = young.clone();
        let flow = Flow { young, answered: true, clock_at: now, place: self.places, begun: now };
        self.places += 1;
        self.flows.insert(key, flow);
    }

    /// All that our kernel has answered, in the order in which they are to be accepted.
    pub fn snapshot(&self, now: Instant) -> Vec<Young> {
        let waits = |f: &&Flow| {
            f.answered && (f.young.acknowledged || now.duration_since(f.begun) < GIVEN_UP)
        };
        let mut flows: Vec<&Flow> = self.flows.values().filter(waits).collect();
        flows.sort_by_key(|f| (f.young.acknowledged, f.place));
        let young = flows.into_iter().map(|f| {
            let passed = now.saturating_duration_since(f.clock_at).as_millis() as u32;
            let timestamp = f.young.timestamp.map(|(a, b)| (a, b.wrapping_add(passed)));
            Young { timestamp, ..f.young.clone() }
        });
        young.collect()
    }
}

/// What both sides have offered counts.
fn agree(y: &mut Young, view: &TcpView<'_>) {
    let (mut scale, mut sack, mut stamped) = (None, false, false);
    for option in options(view) {
        match option {
            TcpOption::WindowScale(shift) => scale = Some(shift.min(14)),
            TcpOption::SackPermitted => sack = true,
            TcpOption::TimeStamp { .. } => stamped = true,
            _ => {}
        }
    }
    y.window_scale = y.window_scale.zip(scale).map(|((theirs, _), ours)| (theirs, ours));
    y.sack &= sack;
    y.ecn &= view.tcp.ece();
    y.timestamp = y.timestamp.filter(|_| stamped);
}

/// Takes the container's clock from a frame of its own.
fn clock(flow: &mut Flow, view: &TcpView<'_>, now: Instant) {
    if let (Some((_, ours)), Some((val, _))) = (&mut flow.young.timestamp, timestamp(view)) {
        *ours = val;
        flow.clock_at = now;
    }
}

fn options<'a>(view: &TcpView<'a>) -> impl Iterator<Item = TcpOption<'a>> {
    let mut rest = view.tcp.options();
    std::iter::from_fn(move || {
        let (next, option) = TcpOption::parse(rest).ok()?;
        rest = next;
        (option != TcpOption::EndOfList).then_some(option)
    })
}

fn timestamp(view: &TcpView<'_>) -> Option<(u32, u32)> {
    options(view).find_map(|option| match option {
        TcpOption::TimeStamp { tsval, tsecr } => Some((tsval, tsecr)),
        _ => None,
    })
}

/// The segments that make the connection at the restored container, to be injected in this
/// order: the client's acknowledgement, what it has sent, its end. `elapsed` is the time since
/// the checkpoint.
pub fn segments(young: &Young, to: Mac, elapsed: Duration) -> Vec<Vec<u8>> {
    let echo = |(theirs, ours): (u32, u32)| {
        TcpTimestampRepr::new(theirs, ours.wrapping_add(elapsed.as_millis() as u32))
    };
    let mut frames = Vec::new();
    let mut say = |at: usize, payload: &[u8], control| {
        let seq = young.client_isn.wrapping_add(1).wrapping_add(at as u32);
        let repr = TcpRepr {
            src_port: young.remote.port(),
            dst_port: young.local.port(),
            control,
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: Some(TcpSeqNumber(young.server_isn.wrapping_add(1) as i32)),
            window_len: young.window,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: young.timestamp.map(echo),
            payload,
        };
        let macs = (Mac(young.peer_mac), to);
        frames.extend(wire::tcp(macs, young.remote.ip(), young.local.ip(), &repr));
    };
    say(0, &[], TcpControl::None);
    for (number, part) in young.received.chunks(SEGMENT).enumerate() {
        say(number * SEGMENT, part, TcpControl::Psh);
    }
    if young.fin {
        say(young.received.len(), &[], TcpControl::Fin);
    }
    frames
}

#[cfg(test)]
mod tests;
