//! Connections that the container has closed and whose kernel has something to say on them still. No
//! descriptor names them, and the gate has seen only what has left: so their kernel is asked.
//!
//! To be asked for are those on which the container has said something in the epoch that was sealed
//! ([`Gate::spoken`]) and that the checkpoint does not name, and those that were found the time before. It
//! happens after the stop: what a program has closed it cannot add to, and what its peer
//! acknowledges meanwhile it has.

use super::takeover::key;
use crate::frames::gate::{Ends, Gate};
use replicator::capture::Orphans;
use replicator::image::net::TcpConnection;
use replicator::image::{Kind, State};
use replicator::sys::namespace::in_network_of;
use std::collections::HashSet;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The one who reads them, for all containers of this agent.
fn reader() -> Option<&'static Mutex<Orphans>> {
    static READER: OnceLock<Option<Mutex<Orphans>>> = OnceLock::new();
    READER.get_or_init(|| Orphans::open().map(Mutex::new)).as_ref()
}

/// Makes the reader, which takes some milliseconds, so that the first stop does not. Says whether this
/// kernel can do it.
pub(super) fn warm_up() -> bool {
    reader().is_some()
}

/// The connections that a container has closed.
#[derive(Debug)]
pub(super) struct Closed {
    /// The container, and its first process.
    name: String,
    pid: i32,
    /// Those to be asked for.
    asked: HashSet<Ends>,
}

impl Closed {
    /// `pid` is the container's first process; `left` are those that it was restored with.
    pub(super) fn of(name: &str, pid: i32, left: Vec<Ends>) -> Self {
        Self { name: name.to_owned(), pid, asked: left.into_iter().collect() }
    }

    /// Those of a checkpoint that its container was restored with.
    pub(super) fn restored(state: &State) -> Vec<Ends> {
        state.farewells.iter().map(|c| key(c.local, c.remote)).collect()
    }

    /// Adds what was closed to a checkpoint whose output has just been sealed.
    pub(super) fn add(&mut self, state: &mut State, gate: &Gate) {
        gate.spoken(&mut self.asked);
        strike_out(&mut self.asked, state);
        if self.asked.is_empty() {
            return;
        }
        let Some(reader) = reader() else {
            self.asked.clear();
            return;
        };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<TcpConnection> = Vec::new();
        let entered = in_network_of(self.pid, || {
            self.asked.retain(|(local, remote)| match reader.find(*local, *remote) {
                Ok(Some(connection)) => {
                    found.push(connection);
                    true
                }
                Ok(None) => false,
                Err(error) => {
                    tracing::debug!(%local, %remote, %error, "a closed connection is not read");
                    metrics::counter!("nilicon_closed_unread_total", "container" => self.name.clone())
                        .increment(1);
                    true
                }
            });
        });
        if let Err(error) = entered {
            tracing::debug!(%error, "closed connections are not read");
        }
        state.farewells.append(&mut found);
    }
}

/// Removes those that the checkpoint names by a descriptor, or by one of ours.
fn strike_out(asked: &mut HashSet<Ends>, state: &State) {
    let named = state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Tcp(c) => Some(&**c),
        _ => None,
    });
    let mut all = named.chain(&state.farewells);
    while !asked.is_empty()
        && let Some(c) = all.next()
    {
        asked.remove(&key(c.local, c.remote));
    }
}
