//! Connections without a descriptor at the two ends of a failover: which of them a checkpoint
//! carries, and how they go on at a restored container.

use super::backup::Warm;
use super::takeover::key;
use crate::frames::gate::Gate;
use crate::frames::{Mac, young};
use anyhow::{Context, Result};
use netns_tools::namespace::Namespace;
use replicator::image::net::{Parting, TcpListener, Young};
use replicator::image::{Kind, State};
use replicator::young::Door;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// No handshake lasts longer.
const HANDSHAKE: Duration = Duration::from_secs(70);

/// Adds those that no descriptor of the checkpoint names. The gate forgets the young ones that
/// have one.
pub(super) fn add(state: &mut State, mut young: Vec<Young>, partings: Vec<Parting>, gate: &Gate) {
    if young.is_empty() && partings.is_empty() {
        return;
    }
    let connections = state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Tcp(c) => Some(key(c.local, c.remote)),
        _ => None,
    });
    let farewells = state.farewells.iter().map(|c| key(c.local, c.remote));
    let known: HashSet<_> = connections.chain(farewells).collect();
    young.retain(|y| !known.contains(&(y.local, y.remote)));
    let unknown = |p: &Parting| !known.contains(&(p.local, p.remote));
    state.partings = partings.into_iter().filter(unknown).collect();
    state.young = young;
    gate.grown_up(known.into_iter());
}

/// Lets the gate speak for connections that the container had closed; from a thread of its own
/// while there are any.
pub(super) fn stand_in(gate: &Arc<Gate>, mac: Mac, state: &State, elapsed: Duration) -> Result<()> {
    if state.partings.is_empty() {
        return Ok(());
    }
    gate.stand_in(mac, &state.partings, elapsed);
    let mut pause = gate.speak()?;
    // It ends when the gate does.
    let gate = Arc::downgrade(gate);
    std::thread::Builder::new().name("stand-in".into()).spawn(move || {
        while let Some(time) = pause {
            std::thread::sleep(time);
            let Some(gate) = gate.upgrade() else { return };
            pause = gate.speak().unwrap_or_else(|error| {
                tracing::debug!(%error, "stand-in");
                Some(Duration::from_secs(1))
            });
        }
    })?;
    Ok(())
}

/// Gives a restored container, whose listeners are there and whose gate is unplugged, its young
/// connections. Clients that have not acknowledged our SYN get it once more.
pub(super) fn restore(warm: &mut Warm, mac: Mac, state: &State, elapsed: Duration) -> Result<()> {
    if state.young.is_empty() {
        return Ok(());
    }
    let Some(door) = warm.door.take() else {
        tracing::warn!(
            count = state.young.len(),
            "connections that were not accepted yet are reset: this kernel cannot restore them"
        );
        return Ok(());
    };
    for young in &state.young {
        door.expect(young, elapsed)?;
    }
    let gate = &warm.gate;
    gate.adopt_young(&state.young);
    // The primary has acknowledged all of it, so no client sends it again: it must fit.
    let most = state.young.iter().map(|y| y.received.len()).max().unwrap_or(0);
    warm.spare.widen_listeners(most)?;
    for young in &state.young {
        if !young.acknowledged {
            gate.send(&young.syn_ack)?;
        } else if !young.received.is_empty() || !defers(state, young) {
            for frame in young::segments(young, mac, elapsed) {
                gate.inject(&frame)?;
            }
        }
    }
    warm.spare.narrow_listeners()?;
    // Until clients in the middle of their handshake have answered or given up.
    shut(Some(door), HANDSHAKE);
    Ok(())
}

/// The way in for young connections, at the device of the spare with this pid. To attach a program
/// takes milliseconds, as all processors must have heard of it: so it is there before it is needed,
/// and lets everything pass until then.
pub(super) fn door(pid: i32) -> Result<Door> {
    let mut door = Door::load()?;
    Namespace::of_process(pid).context("enter the container's network")?.enter(|| {
        let device = nix::net::if_::if_nametoindex(super::network::INNER)
            .context("the container's device")?;
        door.open(device).context("a program at the container's device")
    })??;
    Ok(door)
}

/// Takes it away after this time. That takes as long, and nobody waits for it.
pub(super) fn shut(door: Option<Door>, after: Duration) {
    let Some(door) = door else { return };
    let close = move || {
        std::thread::sleep(after);
        drop(door);
    };
    if let Err(error) = std::thread::Builder::new().name("door".into()).spawn(close) {
        tracing::debug!(%error, "the program at the container's device is taken away at once");
    }
}

/// Whether its listener wants to hear of connections only when data has come (TCP_DEFER_ACCEPT).
fn defers(state: &State, young: &Young) -> bool {
    let is_it = |l: &TcpListener| {
        let ip = l.local.ip().to_canonical();
        l.local.port() == young.local.port() && (ip.is_unspecified() || ip == young.local.ip())
    };
    state.descriptions.iter().any(|d| match &d.kind {
        Kind::TcpListener(l) => is_it(l) && l.options.defer_accept != 0,
        _ => false,
    })
}
