//! Where long queues of connections lie in the bytes of a state. A queue loses bytes at its front and gets others at its
//! end, which moves all behind it: hundreds of kilobytes, while somebody reads a long answer. Sequence numbers say by
//! how much, so that edits of the state before ([`super::edit`]) need not search.

use super::edit::Jump;
use crate::image::net::TcpConnection;
use crate::image::{Kind, State};
use memchr::memmem;
use std::collections::HashMap;
use std::net::SocketAddr;

/// Shorter queues are found by those who compare.
const LONG: usize = 8 << 10;
/// Bytes of a queue that it is looked for by.
const SAMPLE: usize = 64;

/// Whose queue: both addresses, and whether it is the one to be sent.
type Whose = (SocketAddr, SocketAddr, bool);

/// A long queue in the bytes of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LongQueue {
    whose: Whose,
    begin: usize,
    len: usize,
    /// Sequence number of its first byte.
    first: u32,
}

impl LongQueue {
    fn end(&self) -> usize {
        self.begin + self.len
    }
}

/// The long queues of a state, in the order of its bytes.
pub(super) fn find(state: &State, encoded: &[u8]) -> Vec<LongQueue> {
    let mut found = Vec::new();
    let mut from = 0;
    let connections = state.descriptions.iter().filter_map(|description| match &description.kind {
        Kind::Tcp(connection) => Some(connection.as_ref()),
        _ => None,
    });
    for (whose, end, bytes) in connections.flat_map(queues) {
        if bytes.len() < LONG {
            continue;
        }
        let Some(at) = memmem::find(&encoded[from..], &bytes[..SAMPLE]) else { continue };
        let (begin, len) = (from + at, bytes.len());
        if encoded.get(begin..begin + len) == Some(bytes) {
            let first = end.wrapping_sub(len as u32);
            found.push(LongQueue { whose, begin, len, first });
            from = begin + len;
        }
    }
    found
}

/// Both queues of a connection: whose, the sequence number behind it, and its bytes.
fn queues(c: &TcpConnection) -> [(Whose, u32, &[u8]); 2] {
    [
        ((c.local, c.remote, true), c.write_seq, &c.send_queue),
        ((c.local, c.remote, false), c.rcv_nxt, &c.receive_queue),
    ]
}

/// Where queues that were there before go on in the state before.
pub(super) fn jumps(before: &[LongQueue], now: &[LongQueue]) -> Vec<Jump> {
    let before: HashMap<Whose, &LongQueue> = before.iter().map(|q| (q.whose, q)).collect();
    let both = now.iter().filter_map(|q| Some((q, *before.get(&q.whose)?)));
    both.flat_map(|(now, before)| {
        let gone = now.first.wrapping_sub(before.first) as usize;
        let begin = (gone <= before.len).then(|| Jump { new: now.begin, old: before.begin + gone });
        begin.into_iter().chain([Jump { new: now.end(), old: before.end() }])
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(port: u16, begin: usize, len: usize, first: u32) -> LongQueue {
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        LongQueue { whose: (address(80), address(port), true), begin, len, first }
    }

    #[test]
    fn sequence_numbers_say_where_a_queue_goes_on() {
        let before = [queue(1, 100, 1000, u32::MAX - 99), queue(2, 1200, 500, 7)];
        let now = [queue(2, 50, 500, 8), queue(3, 700, 900, 0), queue(1, 2000, 1500, 200)];
        let expected = [
            Jump { new: 50, old: 1201 },
            Jump { new: 550, old: 1700 },
            Jump { new: 2000, old: 400 },
            Jump { new: 3500, old: 1100 },
        ];
        assert_eq!(jumps(&before, &now), expected);
        // Nothing of it is left, or it is another connection with the same addresses.
        assert_eq!(jumps(&before, &[queue(2, 50, 500, 508)]), [Jump { new: 550, old: 1700 }]);
        assert_eq!(jumps(&before, &[queue(2, 50, 500, 6)]), [Jump { new: 550, old: 1700 }]);
        assert_eq!(jumps(&[], &now), []);
    }
}
