//! From a warm spare to a running container: what happens between suspicion and the first reply.
//!
//! ```text
//!  announce (ARP) ─┬─ probe the peers ──────────┐
//!                  └─ prepare: files, threads ──┴─ connect ─ open output ─ send what peers lack
//!                     ─ registers ─ FIN/RST, input log, backlog ─ plug ─ run
//! ```
//! FO-2: the container's side stays unplugged until its sockets are whole, so that no frame of a
//! client meets a half-built container and draws a reset.

use super::backup::{Warm, ms};
use super::journal::monotonic_us;
use super::network::Place;
use super::status::{FailoverPhases, FailoverRecord};
use super::urgency::RealTime;
use super::young;
use crate::frames::Mac;
use crate::frames::gate::Gate;
use crate::frames::resume::{Answer, Connection, PeerProbe, PeerSegment};
use anyhow::{Result, anyhow};
use bytes::Bytes;
use replicator::image::net::TcpConnection;
use replicator::image::{Kind, State};
use replicator::restore::{Peer, Segment};
use replicator::{Epoch, Generation};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long the takeover waits for peers to say where they are. One that is silent gets what it
/// may lack by retransmission.
const PROBE_PATIENCE: Duration = Duration::from_millis(40);

/// What a takeover is about.
pub(super) struct Takeover<'a> {
    pub(super) place: &'a Place,
    pub(super) generation: Generation,
    pub(super) from: Epoch,
    pub(super) suspected: Instant,
    /// What is known of the phases before.
    pub(super) phases: FailoverPhases,
}

/// The restored processes: host pid and host tids of each, the init first.
pub(super) type Tree = Vec<(i32, Vec<i32>)>;

/// Carries a takeover out. `logged` gives, as late as it can, the frames that the lost primary
/// had received since the checkpoint. The caller is real-time.
pub(super) fn run(
    takeover: &Takeover<'_>,
    warm: &mut Warm,
    real_time: &RealTime,
    logged: impl FnOnce() -> Vec<Bytes>,
) -> Result<(FailoverRecord, Tree)> {
    let (checkpoint, received) = warm.last.clone().ok_or_else(|| anyhow!("no checkpoint"))?;
    let gate = warm.gate.clone();
    let mut phases = takeover.phases;
    let mut lap = Instant::now();
    takeover.place.announce(gate.clone())?;

    let connections: Vec<Connection> = live_connections(&checkpoint.state)
        .map(|c| Connection::of_checkpoint(c, received.elapsed()))
        .collect();
    let count = connections.len();
    let (prepared, probed) = std::thread::scope(|scope| {
        // A takeover waits for it, so it waits for nobody who wants the processor.
        let probing = real_time.share(|| scope.spawn(|| probe(&gate, takeover.place, connections)));
        let prepared = warm.spare.prepare();
        phases.prepare = lap_ms(&mut lap);
        (prepared, probing.join())
    });
    prepared?;
    let (answers, took) = probed.map_err(|_| anyhow!("the probe ended in a panic"))??;
    (phases.probe, lap) = (took, Instant::now());

    let answer = |c: &TcpConnection| match answers.get(&key(c.local, c.remote)) {
        Some((Answer::Alive { rcv_nxt, .. }, _)) => Peer::Expects(*rcv_nxt),
        Some((Answer::Gone, _)) => Peer::Gone,
        _ => Peer::Silent,
    };
    let resumption = warm.spare.connect(answer)?;
    phases.connect = lap_ms(&mut lap);

    gate.open_output()?;
    let elapsed = received.elapsed();
    young::restore(warm, takeover.place.mac, &checkpoint.state, elapsed)?;
    young::stand_in(&gate, takeover.place.mac, &checkpoint.state, elapsed)?;
    let young = lap.elapsed();
    warm.spare.push_unsent()?;
    let unsent = lap.elapsed() - young;
    let restored = warm.spare.complete()?;
    phases.finish = lap_ms(&mut lap);
    tracing::debug!(young = ms(young), unsent = ms(unsent), all = phases.finish, "finish, ms");

    let mac_of = |s: &Segment| answers.get(&key(s.local, s.remote)).and_then(|(_, mac)| *mac);
    let say = |segments: &[Segment], what: fn(&PeerSegment) -> Option<Vec<u8>>| {
        segments.iter().try_for_each(|s| inject(&gate, takeover.place.mac, mac_of(s), s, what))
    };
    say(&resumption.fins, PeerSegment::fin)?;
    warm.spare.close_sides()?;
    say(&resumption.acks, PeerSegment::ack)?;
    say(&resumption.resets, PeerSegment::rst)?;
    let mut replayed = gate.counters().backlog_frames as u64;
    for frame in &logged() {
        // A frame that the device does not take is sent again by its sender.
        match gate.replay(frame) {
            Ok(()) => replayed += 1,
            Err(error) => tracing::debug!(%error, "a logged frame was not replayed"),
        }
    }
    gate.plug()?;
    phases.plug = lap_ms(&mut lap);

    warm.spare.resume_all()?;
    phases.run = lap_ms(&mut lap);
    phases.total = ms(takeover.suspected.elapsed());
    let now = monotonic_us();
    let record = FailoverRecord {
        generation: takeover.generation.0,
        epoch: takeover.from.0,
        suspected_at_us: now - takeover.suspected.elapsed().as_micros() as u64,
        running_at_us: now,
        phases_ms: phases,
        connections: count as u64,
        silent_peers: answers.values().filter(|(a, _)| *a == Answer::Silent).count() as u64,
        replayed_frames: replayed,
    };
    Ok((record, restored.into_iter().map(|r| (r.host, r.tids)).collect()))
}

fn lap_ms(lap: &mut Instant) -> f64 {
    let now = Instant::now();
    ms(now - std::mem::replace(lap, now))
}

fn live_connections(state: &State) -> impl Iterator<Item = &TcpConnection> {
    let named = state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Tcp(c) if c.state.is_synchronized() => Some(&**c),
        _ => None,
    });
    named.chain(&state.farewells)
}

/// IPv4 addresses of dual-stack sockets are told as IPv4, as on the wire.
pub(super) fn key(local: SocketAddr, remote: SocketAddr) -> (SocketAddr, SocketAddr) {
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    (plain(local), plain(remote))
}

type Answers = HashMap<(SocketAddr, SocketAddr), (Answer, Option<Mac>)>;

fn probe(gate: &Gate, place: &Place, connections: Vec<Connection>) -> Result<(Answers, f64)> {
    let start = Instant::now();
    let mut probe = PeerProbe::new(place.local_net(), connections);
    gate.probe(&mut probe, start + PROBE_PATIENCE)?;
    let macs: HashMap<_, _> = probe.macs().map(|(c, mac)| (key(c.local, c.remote), mac)).collect();
    let answers = probe
        .answers()
        .map(|(c, answer)| {
            let key = key(c.local, c.remote);
            (key, (answer, macs.get(&key).copied().flatten()))
        })
        .collect();
    Ok((answers, ms(start.elapsed())))
}

/// Tells the container what it knew of a peer, in the peer's name.
fn inject(
    gate: &Gate,
    mac: Mac,
    peer_mac: Option<Mac>,
    segment: &Segment,
    what: fn(&PeerSegment) -> Option<Vec<u8>>,
) -> Result<()> {
    // Any unicast address does: the container sends its answer to its neighbour table's.
    let from_mac = peer_mac.unwrap_or(Mac([2, 0, 0, 0, 0, 2]));
    let frame = PeerSegment::of_restored(segment, mac, from_mac);
    if let Some(bytes) = what(&frame) {
        gate.inject(&bytes)?;
    }
    Ok(())
}
