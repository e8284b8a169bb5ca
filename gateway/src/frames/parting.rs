//! Connections that the container has closed within one epoch: neither a descriptor nor the
//! capture knows what they have still to say, but the gate has seen it leave.
//!
//! [`Partings`], at the primary, keeps the frames of an epoch that belong to a connection with a
//! FIN in it until the peer has acknowledged them, and its numbers until the peer has closed as
//! well; checkpoints carry them. They are output of
//! that epoch and may leave as soon as its checkpoint is committed. After a failover a
//! [`StandIn`] sends them again until they are acknowledged, and answers what the peer repeats,
//! as the socket would have done: no peer of a connection that is over gets a reset.
//!
//! Bounded (RB-1): beyond a bound a connection is not known any more, and counted. Does no I/O
//! and has no clock.

use super::wire::{self, TcpView, before};
use super::{HEADER, Mac};
use replicator::image::net::Parting;
use smoltcp::wire::{TcpControl, TcpOption, TcpRepr, TcpSeqNumber, TcpTimestampRepr};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Connections known at a time.
const MAX: usize = 4096;
/// Bytes kept of one connection.
const MAX_BYTES: usize = 256 << 10;
/// How long the peer may repeat its end when both sides have closed, at the primary.
const QUIET: Duration = Duration::from_millis(300);
/// After this the container's kernel has given up as well.
const GIVEN_UP: Duration = Duration::from_secs(60);
/// First pause before frames are sent again; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// The container's side and the peer's.
type Key = (SocketAddr, SocketAddr);

#[derive(Debug)]
struct Flow {
    parting: Parting,
    acknowledged: bool,
    /// The peer has closed its side as well.
    answered: bool,
    touched: Instant,
}

/// The connections that are parting.
#[derive(Debug, Default)]
pub struct Partings {
    flows: HashMap<Key, Flow>,
    /// Those whose FIN is in the open epoch.
    fresh: HashSet<Key>,
    /// Peers that have closed their side, and when.
    ended: HashMap<Key, Instant>,
    dropped: u64,
}

/// Whether a frame has a FIN. Cheap: no more than three bytes are looked at in frames that are
/// no TCP.
pub fn has_fin(frame: &[u8]) -> bool {
    const FIN_AND_RST: u8 = 0x05;
    let at = |i: usize| frame.get(HEADER + i).copied().unwrap_or(0);
    let tcp = match (at(12), at(13)) {
        (8, 0) if at(23) == 6 => 14 + usize::from(at(14) & 15) * 4,
        (0x86, 0xdd) if at(20) == 6 => 54,
        _ => return false,
    };
    at(tcp + 13) & FIN_AND_RST == 0x01
}

fn end_of(view: &TcpView<'_>) -> u32 {
    view.seq().wrapping_add(view.tcp.segment_len() as u32)
}

fn clock(view: &TcpView<'_>) -> Option<u32> {
    let mut rest = view.tcp.options();
    while let Ok((next, option)) = TcpOption::parse(rest) {
        match option {
            TcpOption::TimeStamp { tsval, .. } => return Some(tsval),
            TcpOption::EndOfList => return None,
            _ => rest = next,
        }
    }
    None
}

impl Partings {
    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Whether one of the two ends of a connection, the container's and the peer's, has closed it.
    pub fn knows(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.flows.contains_key(&(local, remote)) || self.ended.contains_key(&(local, remote))
    }

    /// Whether the open epoch has a FIN, so that [`Partings::collect`] has something to do.
    pub fn is_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Connections that are not known any more because a bound was reached.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// A frame that the container has sent in the open epoch.
    pub fn outbound(&mut self, frame: &[u8], now: Instant) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let key = (view.from, view.to);
        if view.tcp.rst() || view.tcp.syn() {
            self.remove(&key);
            return;
        }
        let known = self.flows.contains_key(&key);
        let answered = self.ended.remove(&key).is_some();
        if !known && (!view.tcp.fin() || self.flows.len() >= MAX) {
            self.dropped += u64::from(view.tcp.fin());
            return;
        }
        let flow = self.flows.entry(key).or_insert_with(|| {
            let parting = Parting {
                local: key.0,
                remote: key.1,
                peer_mac: wire::destination(frame).map_or([0; 6], |mac| mac.0),
                end: end_of(&view),
                rcv_nxt: view.ack(),
                window: 0,
                timestamp: None,
                frames: Vec::new(),
            };
            Flow { parting, acknowledged: false, answered, touched: now }
        });
        flow.touched = now;
        let p = &mut flow.parting;
        if before(p.rcv_nxt, view.ack()) {
            p.rcv_nxt = view.ack();
        }
        p.window = view.tcp.window_len();
        p.timestamp = clock(&view).or(p.timestamp);
        if view.tcp.fin() && !flow.acknowledged {
            self.fresh.insert(key);
        }
    }

    /// All frames of the open epoch, just before it is sealed.
    pub fn collect<'a>(&mut self, frames: impl Iterator<Item = &'a [u8]>) {
        let fresh = std::mem::take(&mut self.fresh);
        for frame in frames {
            let Some(view) = wire::view_tcp(frame) else { continue };
            let key = (view.from, view.to);
            if view.tcp.segment_len() == 0 || !fresh.contains(&key) {
                continue;
            }
            let Some(flow) = self.flows.get_mut(&key) else { continue };
            flow.parting.frames.push(frame.to_vec());
            if flow.parting.frames.iter().map(Vec::len).sum::<usize>() > MAX_BYTES {
                self.dropped += 1;
                self.remove(&key);
            }
        }
    }

    /// A frame that the container receives.
    pub fn inbound(&mut self, frame: &[u8], now: Instant) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let key = (view.to, view.from);
        if view.tcp.rst() || view.tcp.syn() {
            self.remove(&key);
            return;
        }
        let Some(flow) = self.flows.get_mut(&key) else {
            if view.tcp.fin() {
                if self.ended.len() >= MAX {
                    self.ended.retain(|_, at| now < *at + GIVEN_UP);
                }
                if self.ended.len() < MAX {
                    self.ended.insert(key, now);
                }
            }
            return;
        };
        flow.touched = now;
        flow.answered |= view.tcp.fin();
        if view.tcp.ack() && view.ack() == flow.parting.end {
            flow.acknowledged = true;
            flow.parting.frames = Vec::new();
            self.fresh.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) {
        self.flows.remove(key);
        self.fresh.remove(key);
        self.ended.remove(key);
    }

    /// Those that may have something to say still.
    pub fn snapshot(&mut self, now: Instant) -> Vec<Parting> {
        self.flows.retain(|_, f| {
            let patience = if f.acknowledged && f.answered { QUIET } else { GIVEN_UP };
            now.saturating_duration_since(f.touched) < patience
        });
        self.flows.values().map(|f| f.parting.clone()).collect()
    }
}

#[derive(Debug)]
struct Left {
    parting: Parting,
    next: Option<Instant>,
    pause: Duration,
}

/// Speaks for sockets that are gone.
#[derive(Debug)]
pub struct StandIn {
    left: HashMap<Key, Left>,
    us: Mac,
    since: Instant,
}

/// What a received frame is to the stand-in.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing: the container gets it.
    Not,
    /// It is answered, or needs no answer: the container does not get it.
    Handled(Option<Vec<u8>>),
}

impl StandIn {
    /// For these connections of a container with this hardware address, `elapsed` after their
    /// checkpoint.
    pub fn new(us: Mac, partings: &[Parting], elapsed: Duration, now: Instant) -> Self {
        let left = partings.iter().map(|p| {
            let passed = elapsed.as_millis() as u32;
            let timestamp = p.timestamp.map(|t| t.wrapping_add(passed));
            let parting = Parting { timestamp, ..p.clone() };
            let next = (!p.frames.is_empty()).then_some(now);
            ((p.local, p.remote), Left { parting, next, pause: FIRST_PAUSE })
        });
        Self { left: left.collect(), us, since: now }
    }

    /// Whether there is nobody to speak for.
    pub fn is_done(&self, now: Instant) -> bool {
        self.left.is_empty() || now >= self.since + GIVEN_UP
    }

    /// Frames to send now.
    pub fn due(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for left in self.left.values_mut() {
            if left.next.is_some_and(|at| now >= at) {
                frames.extend(left.parting.frames.iter().cloned());
                left.next = Some(now + left.pause);
                left.pause *= 2;
            }
        }
        frames
    }

    /// When [`StandIn::due`] has something again.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.left.values().filter_map(|left| left.next).min()
    }

    /// Looks at a received frame.
    pub fn inbound(&mut self, frame: &[u8], now: Instant) -> Heard {
        let Some(view) = wire::view_tcp(frame) else { return Heard::Not };
        let key = (view.to, view.from);
        if view.tcp.rst() || view.tcp.syn() {
            // It is over for the peer, or begins anew.
            self.left.remove(&key);
            return Heard::Not;
        }
        let Some(left) = self.left.get_mut(&key) else { return Heard::Not };
        let p = &mut left.parting;
        if view.tcp.ack() && view.ack() == p.end {
            p.frames = Vec::new();
            left.next = None;
        }
        if view.tcp.segment_len() == 0 {
            return Heard::Handled(None);
        }
        let end = end_of(&view);
        if view.tcp.fin() && end == p.rcv_nxt.wrapping_add(1) {
            p.rcv_nxt = end;
        }
        if before(p.rcv_nxt, end) {
            // Bytes that nobody will read: the kernel resets it, as it would have done.
            return Heard::Not;
        }
        let passed = now.saturating_duration_since(self.since).as_millis() as u32;
        let stamp =
            |ours: u32| TcpTimestampRepr::new(ours.wrapping_add(passed), clock(&view).unwrap_or(0));
        let repr = TcpRepr {
            src_port: p.local.port(),
            dst_port: p.remote.port(),
            control: TcpControl::None,
            seq_number: TcpSeqNumber(p.end as i32),
            ack_number: Some(TcpSeqNumber(p.rcv_nxt as i32)),
            window_len: p.window,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: p.timestamp.map(stamp),
            payload: &[],
        };
        let macs = (self.us, Mac(p.peer_mac));
        Heard::Handled(wire::tcp(macs, p.local.ip(), p.remote.ip(), &repr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const PEER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn ends() -> Key {
        ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:4000".parse().unwrap())
    }

    fn frame(ours: bool, seq: u32, ack: u32, control: TcpControl, payload: &[u8]) -> Vec<u8> {
        let (local, remote) = ends();
        let (from, to) = if ours { (local, remote) } else { (remote, local) };
        let repr = TcpRepr {
            src_port: from.port(),
            dst_port: to.port(),
            control,
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: Some(TcpSeqNumber(ack as i32)),
            window_len: 500,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: Some(TcpTimestampRepr::new(1000, 0)),
            payload,
        };
        let macs = if ours { (US, PEER) } else { (PEER, US) };
        wire::tcp(macs, from.ip(), to.ip(), &repr).unwrap()
    }

    /// An answer of five bytes and the end, in one epoch: sequence numbers 900 to 906.
    fn parted(t0: Instant) -> Partings {
        let mut partings = Partings::default();
        let epoch = [
            frame(true, 900, 101, TcpControl::Psh, b"hello"),
            frame(true, 905, 101, TcpControl::Fin, b""),
        ];
        assert!(!has_fin(&epoch[0]) && has_fin(&epoch[1]));
        epoch.iter().for_each(|f| partings.outbound(f, t0));
        assert!(partings.is_fresh());
        partings.collect(epoch.iter().map(Vec::as_slice));
        assert!(!partings.is_fresh());
        partings
    }

    #[test]
    fn what_was_said_last_is_kept_until_it_is_acknowledged() {
        let t0 = Instant::now();
        let mut partings = parted(t0);
        let parting = partings.snapshot(t0).remove(0);
        assert_eq!((parting.frames.len(), parting.end, parting.rcv_nxt), (2, 906, 101));
        partings.inbound(&frame(false, 101, 905, TcpControl::None, b""), t0);
        assert_eq!(partings.snapshot(t0)[0].frames.len(), 2);
        partings.inbound(&frame(false, 101, 906, TcpControl::None, b""), t0);
        assert_eq!(partings.snapshot(t0)[0].frames.len(), 0);
        assert_eq!(partings.snapshot(t0 + QUIET).len(), 1, "the peer has not closed its side");
        partings.inbound(&frame(false, 101, 906, TcpControl::Fin, b""), t0);
        assert!(partings.snapshot(t0 + QUIET).is_empty() && partings.is_empty());
        let mut partings = Partings::default();
        partings.inbound(&frame(false, 100, 900, TcpControl::Fin, b""), t0);
        partings.outbound(&frame(true, 900, 101, TcpControl::Fin, b""), t0);
        partings.inbound(&frame(false, 101, 901, TcpControl::None, b""), t0);
        assert!(partings.snapshot(t0 + QUIET).is_empty(), "the peer closed first");
        let mut partings = parted(t0);
        partings.inbound(&frame(false, 101, 0, TcpControl::Rst, b""), t0);
        assert!(partings.is_empty());
    }

    #[test]
    fn a_stand_in_repeats_it_and_answers_the_peers_end() {
        let t0 = Instant::now();
        let partings = parted(t0).snapshot(t0);
        let mut stand_in = StandIn::new(US, &partings, Duration::from_millis(50), t0);
        assert_eq!(stand_in.due(t0).len(), 2);
        assert_eq!(stand_in.next_deadline(), Some(t0 + FIRST_PAUSE));
        assert_eq!(stand_in.due(t0 + FIRST_PAUSE).len(), 2);
        let all = frame(false, 101, 906, TcpControl::None, b"");
        assert_eq!(stand_in.inbound(&all, t0), Heard::Handled(None));
        assert!(stand_in.next_deadline().is_none());
        // Its end, and the same again.
        for _ in 0..2 {
            let fin = frame(false, 101, 906, TcpControl::Fin, b"");
            let Heard::Handled(Some(answer)) = stand_in.inbound(&fin, t0) else {
                panic!("no answer")
            };
            let view = wire::view_tcp(&answer).unwrap();
            assert_eq!((view.seq(), view.ack(), clock(&view)), (906, 102, Some(1050)));
        }
        let late = frame(false, 102, 906, TcpControl::Psh, b"more");
        assert_eq!(stand_in.inbound(&late, t0), Heard::Not, "the kernel resets it");
        let (local, _) = ends();
        assert!(!stand_in.is_done(t0) && stand_in.is_done(t0 + GIVEN_UP), "{local}");
    }

    #[test]
    fn a_connection_with_too_much_is_dropped_and_counted() {
        let t0 = Instant::now();
        let mut partings = Partings::default();
        let part = vec![1; 50_000];
        let mut epoch: Vec<Vec<u8>> =
            (0..8).map(|i| frame(true, i * 50_000, 101, TcpControl::None, &part)).collect();
        epoch.push(frame(true, 400_000, 101, TcpControl::Fin, b""));
        epoch.iter().for_each(|f| partings.outbound(f, t0));
        partings.collect(epoch.iter().map(Vec::as_slice));
        assert!(partings.is_empty());
        assert_eq!(partings.dropped(), 1);
    }
}
