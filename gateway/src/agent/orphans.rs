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
use replicator::sys::SysResult;
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
    /// Those that were when the last checkpoint was taken.
    before: HashSet<Ends>,
}

impl Closed {
    /// `pid` is the container's first process; `left` are those that it was restored with.
    pub(super) fn of(name: &str, pid: i32, left: Vec<Ends>) -> Self {
        let asked = left.into_iter().collect();
        Self { name: name.to_owned(), pid, asked, before: HashSet::new() }
    }

    /// Those of a checkpoint that its container was restored with.
    pub(super) fn restored(state: &State) -> Vec<Ends> {
        state.farewells.iter().map(|c| key(c.local, c.remote)).collect()
    }

    /// Keeps in mind to whom something was said in the epoch that was just sealed.
    pub(super) fn hear(&mut self, gate: &Gate) {
        gate.spoken(&mut self.asked);
    }

    /// Adds what was closed to a checkpoint whose output has just been sealed.
    pub(super) fn add(&mut self, state: &mut State, gate: &Gate) {
        self.hear(gate);
        self.before.clone_from(&self.asked);
        strike_out(&mut self.asked, state);
        if self.asked.is_empty() {
            return;
        }
        let Some(reader) = reader() else {
            self.asked.clear();
            return;
        };
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |(local, remote): Ends| reader.find(local, remote);
        if let Err(error) = in_network_of(self.pid, || self.ask(state, find)) {
            tracing::debug!(%error, "closed connections are not read");
        }
    }

    /// That checkpoint has come to nothing: who was asked for is asked for again.
    pub(super) fn take_back(&mut self) {
        self.asked.extend(self.before.drain());
    }

    /// Asks for those that may be there. What is there still goes into the checkpoint, and is asked for the
    /// next time; so is what cannot be read now.
    fn ask(
        &mut self,
        state: &mut State,
        mut find: impl FnMut(Ends) -> SysResult<Option<TcpConnection>>,
    ) {
        let Self { asked, name, .. } = self;
        asked.retain(|ends| match find(*ends) {
            Ok(Some(connection)) => {
                state.farewells.push(connection);
                true
            }
            Ok(None) => false,
            Err(error) => {
                let (local, remote) = ends;
                tracing::debug!(%local, %remote, %error, "a closed connection is not read");
                metrics::counter!("nilicon_closed_unread_total", "container" => name.clone())
                    .increment(1);
                true
            }
        });
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use replicator::image::Description;
    use replicator::image::net::{SocketOptions, TcpState};
    use replicator::sys::SysError;
    use std::net::SocketAddr;

    /// The connection of a client's port.
    fn ends(port: u16) -> Ends {
        (SocketAddr::from(([10, 77, 0, 10], 80)), SocketAddr::from(([10, 77, 0, 1], port)))
    }

    fn connection((local, remote): Ends) -> TcpConnection {
        TcpConnection {
            local,
            remote,
            state: TcpState::FinWait1,
            write_seq: 1005,
            rcv_nxt: 2000,
            send_queue: b"hello".to_vec(),
            receive_queue: Vec::new(),
            window: [0; 5],
            mss: 1460,
            sack: true,
            window_scale: None,
            timestamp: None,
            options: SocketOptions::default(),
            shut_read: false,
            error: false,
        }
    }

    /// The same, as a socket of IPv6 has it.
    fn mapped((local, remote): Ends) -> Ends {
        let mapped = |a: SocketAddr| match a.ip() {
            std::net::IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), a.port()),
            std::net::IpAddr::V6(_) => a,
        };
        (mapped(local), mapped(remote))
    }

    fn asked(ports: impl IntoIterator<Item = u16>) -> HashSet<Ends> {
        ports.into_iter().map(ends).collect()
    }

    fn closed(ports: impl IntoIterator<Item = u16>) -> Closed {
        Closed::of("store", 1, ports.into_iter().map(ends).collect())
    }

    #[test]
    fn what_the_checkpoint_names_is_not_asked_for() {
        let open = |c| Description { flags: 0, kind: Kind::Tcp(Box::new(c)) };
        let other = Description { flags: 0, kind: Kind::Pipe(0) };
        let mut state = State {
            descriptions: vec![
                other,
                open(connection(ends(1))),
                open(connection(mapped(ends(2)))),
                open(connection(ends(9))),
            ],
            farewells: vec![connection(mapped(ends(3)))],
            ..State::default()
        };
        let mut left = asked(1..=5);
        // It has the addresses of one that is open, the other way round.
        let (local, remote) = ends(1);
        left.insert((remote, local));
        strike_out(&mut left, &state);
        assert_eq!(left, asked(4..=5).into_iter().chain([(remote, local)]).collect());
        state.descriptions.clear();
        strike_out(&mut left, &state);
        assert_eq!(left.len(), 3, "nobody names them");
    }

    #[test]
    fn what_is_there_is_a_farewell_each_time_until_it_has_gone() {
        let mut closed = closed(1..=3);
        let mut first = State::default();
        first.farewells.push(connection(ends(9)));
        let unread = || SysError::errno("read", "a send queue", Errno::EFBIG as i32);
        let mut questions = HashSet::new();
        closed.ask(&mut first, |ends| {
            questions.insert(ends);
            match ends.1.port() {
                1 => Ok(Some(connection(ends))),
                2 => Ok(None),
                _ => Err(unread()),
            }
        });
        assert_eq!(questions, asked(1..=3));
        assert_eq!(first.farewells, [connection(ends(9)), connection(ends(1))]);
        // What could not be read may be small enough the next time.
        let mut second = State::default();
        let mut questions = HashSet::new();
        closed.ask(&mut second, |ends| {
            questions.insert(ends);
            Ok((ends.1.port() == 3).then(|| connection(ends)))
        });
        assert_eq!(questions, asked([1, 3]), "the second was gone");
        assert_eq!(second.farewells, [connection(ends(3))]);
        assert_eq!(closed.asked, asked([3]), "now the first is gone, too");
    }

    #[test]
    fn who_was_named_by_a_checkpoint_that_came_to_nothing_is_asked_for_again() {
        let mut closed = closed(1..=3);
        closed.before.clone_from(&closed.asked);
        let mut state = State { farewells: vec![connection(ends(1))], ..State::default() };
        strike_out(&mut closed.asked, &state);
        closed.ask(&mut state, |_| Ok(None));
        assert_eq!(closed.asked, asked([]));
        closed.take_back();
        assert_eq!(closed.asked, asked(1..=3));
    }

    #[test]
    fn who_goes_on_with_a_checkpoint_asks_for_its_farewells() {
        let farewells = vec![connection(ends(1)), connection(mapped(ends(2)))];
        let state = State { farewells, ..State::default() };
        let closed = Closed::of("store", 1, Closed::restored(&state));
        assert_eq!(closed.asked, asked(1..=2));
    }
}
