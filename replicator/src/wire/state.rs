//! Coding of the state: pieces of its bytes, each against the same place of the state before.
//!
//! Two states in a row have most bytes in common (registers and queues differ), though not
//! always at the same offset. Each piece of 32 KiB is coded as edits of the state before ([`edit`]); where that
//! does not make it much shorter, as an LZ4 block whose dictionary is what the
//! state before held there and 16 KiB to either side. What LZ4 would make nothing of, such as queues of
//! random bytes, is not given to it: that takes longest.

use super::codec::WireError;
use super::delta::PageCoder;
use super::edit::{self, Job, Jump};
use super::message::Kind;
use crate::image::pages::PAGE;
use lz4_flex::block::{
    compress_into, compress_into_with_dict, decompress_into, decompress_into_with_dict,
    get_maximum_output_size,
};
use smallvec::SmallVec;

/// Bytes of state in one chunk.
pub(super) const PIECE: usize = 32 << 10;

/// How far the dictionary reaches beyond the piece, either way.
const MARGIN: usize = 16 << 10;

/// total length, offset (u32 each), coding (u8), then the body.
const PREFIX: usize = 9;

const RAW: u8 = 1;
const LZ4: u8 = 2;
const LZ4_BEFORE: u8 = 3;
const EDITS: u8 = 4;

/// Edits of at most this part of a piece are taken without trying anything else.
const SHORT: usize = 4;

/// A coding must save this part of a piece at least.
const SAVED: usize = 8;

fn dictionary(before: &[u8], offset: usize) -> &[u8] {
    let end = (offset + PIECE + MARGIN).min(before.len());
    &before[offset.saturating_sub(MARGIN).min(end)..end]
}

/// Where edits of the piece at `offset` begin in the state before.
fn origin(before: &[u8], offset: usize) -> usize {
    offset.min(before.len())
}

/// A state that is coded piece by piece, from the first to the last.
pub(super) struct Pieces<'a> {
    before: &'a [u8],
    state: &'a [u8],
    /// Where it goes on in the state before.
    jumps: &'a [Jump],
    /// Where the state before goes on with what follows the pieces so far, as far as that is known.
    at: usize,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(before: &'a [u8], state: &'a [u8], jumps: &'a [Jump]) -> Self {
        Self { before, state, jumps, at: 0 }
    }

    /// Those of this piece, from its begin.
    fn jumps(&self, offset: usize, len: usize) -> SmallVec<[Jump; 4]> {
        let first = self.jumps.partition_point(|jump| jump.new < offset);
        let its = self.jumps[first..].iter().take_while(|jump| jump.new < offset + len);
        its.map(|jump| Jump { new: jump.new - offset, ..*jump }).collect()
    }

    /// Appends the payload of the chunk that holds the piece at `offset`.
    pub(super) fn encode(&mut self, offset: usize, coder: &mut PageCoder, out: &mut Vec<u8>) {
        let len = self.state.len().min(offset + PIECE) - offset;
        let jumps = self.jumps(offset, len);
        let Self { before, state, at, .. } = self;
        if !encode_piece(before, state, offset, (at, &jumps), coder, out) {
            let aligned = Jump { new: 0, old: origin(before, offset) };
            let last = jumps.last().unwrap_or(&aligned);
            *at = (last.old + len - last.new).min(before.len());
        }
    }
}

/// Appends the payload of the chunk that holds the piece at `offset`. Whether it is edits, and `at` has moved.
fn encode_piece(
    before: &[u8],
    state: &[u8],
    offset: usize,
    (at, jumps): (&mut usize, &[Jump]),
    coder: &mut PageCoder,
    out: &mut Vec<u8>,
) -> bool {
    let piece = &state[offset..state.len().min(offset + PIECE)];
    out.extend_from_slice(&(state.len() as u32).to_le_bytes());
    out.extend_from_slice(&(offset as u32).to_le_bytes());
    let (tag, body) = (out.len(), out.len() + 1);
    out.push(EDITS);
    let origin = origin(before, offset);
    let (most, mut next) = (piece.len() - piece.len() / SAVED, *at);
    let job = Job { old: before, new: piece, jumps, origin };
    let edited = !before.is_empty() && edit::encode(job, &mut next, most, out);
    let short = edited && out.len() - body <= piece.len() / SHORT;
    let dense = !short && is_dense(piece, coder);
    if short || edited && dense {
        *at = next;
        return true;
    }
    out.truncate(body);
    if dense {
        out[tag] = RAW;
        out.extend_from_slice(piece);
        return false;
    }
    out.resize(body + get_maximum_output_size(piece.len()), 0);
    let dict = dictionary(before, offset);
    let packed = if dict.is_empty() {
        out[tag] = LZ4;
        compress_into(piece, &mut out[body..])
    } else {
        out[tag] = LZ4_BEFORE;
        compress_into_with_dict(piece, &mut out[body..], dict)
    };
    match packed {
        Ok(len) if len < piece.len() => out.truncate(body + len),
        _ => {
            out[tag] = RAW;
            out.truncate(body);
            out.extend_from_slice(piece);
        }
    }
    false
}

/// Whether LZ4 would save next to nothing of a piece, judged by two pages of it.
fn is_dense(piece: &[u8], coder: &mut PageCoder) -> bool {
    let quarter = piece.len() / 4;
    let samples = [quarter, 3 * quarter].map(|at| piece[at..].first_chunk::<PAGE>());
    samples.into_iter().all(|page| {
        page.is_some_and(|page| coder.packed(page).is_none_or(|len| len > PAGE - PAGE / SAVED))
    })
}

/// Appends the piece in a chunk's payload to `state`, which holds the pieces before it.
pub(super) fn decode_piece(
    before: &[u8],
    at: u64,
    payload: &[u8],
    cap: usize,
    state: &mut Vec<u8>,
) -> Result<(), WireError> {
    let fail =
        |offset: u64, what: &str| Err(WireError::payload(at + offset, Kind::StateChunk, what));
    let Some((prefix, body)) = payload.split_first_chunk::<PREFIX>() else {
        return fail(0, "shorter than its prefix");
    };
    let number = |i: usize| u32::from_le_bytes(std::array::from_fn(|n| prefix[i + n])) as usize;
    let (total, offset) = (number(0), number(4));
    if total > cap {
        return fail(0, "the state is larger than allowed");
    }
    if offset != state.len() || offset >= total {
        return fail(4, "not the next piece");
    }
    let len = PIECE.min(total - offset);
    if offset == 0 {
        // As much as it was, and no more on the word of a peer.
        state.reserve(total.min(before.len() + PIECE));
    }
    state.resize(offset + len, 0);
    let piece = &mut state[offset..];
    let done = match prefix[8] {
        RAW if body.len() == len => {
            piece.copy_from_slice(body);
            Ok(len)
        }
        LZ4 => decompress_into(body, piece),
        LZ4_BEFORE => decompress_into_with_dict(body, piece, dictionary(before, offset)),
        EDITS => match edit::decode(before, origin(before, offset), body, piece) {
            Some(()) => Ok(len),
            None => return fail(PREFIX as u64, "is no edit of the state before"),
        },
        _ => return fail(8, "unknown coding or wrong length"),
    };
    match done {
        Ok(n) if n == len => Ok(()),
        _ => fail(PREFIX as u64, "does not decompress to its length"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(before: &[u8], state: &[u8]) -> usize {
        round_trip_with(before, state, &[])
    }

    fn round_trip_with(before: &[u8], state: &[u8], jumps: &[Jump]) -> usize {
        let (mut back, mut sent) = (Vec::new(), 0);
        let mut pieces = Pieces::new(before, state, jumps);
        let mut coder = PageCoder::default();
        for offset in (0..state.len()).step_by(PIECE) {
            let mut out = Vec::new();
            pieces.encode(offset, &mut coder, &mut out);
            sent += out.len();
            assert!(out.len() <= Kind::StateChunk.cap());
            decode_piece(before, 0, &out, 4 << 20, &mut back).unwrap();
        }
        assert!(back == state);
        sent
    }

    #[test]
    fn an_unchanged_state_costs_next_to_nothing() {
        let mut rng = fastrand::Rng::with_seed(1);
        let state: Vec<u8> = (0..100_000).map(|_| rng.u8(..)).collect();
        assert!(round_trip(&[], &state) >= state.len());
        assert!(round_trip(&state, &state) < 1000);
        let mut shifted = vec![1, 2, 3];
        shifted.extend_from_slice(&state);
        assert!(round_trip(&state, &shifted) < 1000);
    }

    #[test]
    fn what_is_random_travels_as_it_is_but_for_what_is_as_before() {
        let mut rng = fastrand::Rng::with_seed(2);
        let mut random = |len: usize| (0..len).map(|_| rng.u8(..)).collect::<Vec<u8>>();
        let (before, fresh) = (random(10 * PIECE), random(10 * PIECE));
        let sent = round_trip(&before, &fresh);
        assert!((fresh.len()..fresh.len() + 200).contains(&sent), "{sent}");
        let (mut some, new) = (before.clone(), 3 * PIECE / 8);
        some.chunks_mut(PIECE).for_each(|piece| piece[..new].copy_from_slice(&fresh[..new]));
        let sent = round_trip(&before, &some);
        assert!((10 * new..10 * new + 400).contains(&sent), "{sent}");
        let text = b"the same words, again and again. ".repeat(10_000);
        assert!(round_trip(&before, &text) < text.len() / 20);
    }

    /// Each of four queues loses its first part and gets another behind its end.
    #[test]
    fn of_queues_only_what_is_new_travels() {
        let mut rng = fastrand::Rng::with_seed(4);
        let mut random = |len: usize| (0..len).map(|_| rng.u8(..)).collect::<Vec<u8>>();
        let (len, fresh) = (8 * PIECE, 3 * PIECE);
        let (mut before, mut state, mut jumps) = (random(500), random(500), Vec::new());
        for gone in [3 * PIECE, PIECE / 2, 7 * PIECE, 0] {
            let (head, queue, new) = (random(200), random(len), random(fresh));
            before.extend_from_slice(&head);
            state.extend_from_slice(&head);
            jumps.push(Jump { new: state.len(), old: before.len() + gone });
            before.extend_from_slice(&queue);
            state.extend_from_slice(&queue[gone..]);
            state.extend_from_slice(&new);
            jumps.push(Jump { new: state.len(), old: before.len() });
        }
        let sent = round_trip_with(&before, &state, &jumps);
        // Pieces that are new for the most part travel whole.
        assert!((4 * fresh..4 * (fresh + PIECE / 2)).contains(&sent), "{sent}");
        let without = round_trip(&before, &state);
        assert!(without > 2 * sent, "{without}");
    }

    proptest! {
        #[test]
        fn decoding_gives_the_state_back(
            before in prop::collection::vec(any::<u8>(), 0..70_000),
            cut in 0..70_000usize,
            more in prop::collection::vec(any::<u8>(), 1..40_000),
        ) {
            let mut state = before[..cut.min(before.len())].to_vec();
            state.extend_from_slice(&more);
            round_trip(&before, &state);
        }

        #[test]
        fn hostile_pieces_never_panic(
            mut body in prop::collection::vec(any::<u8>(), 0..300),
            coding in 0u8..6,
        ) {
            if body.len() > PREFIX {
                body[..8].copy_from_slice(&[200, 0, 0, 0, 0, 0, 0, 0]);
                body[8] = coding;
            }
            let _ = decode_piece(&[7; 1000], 0, &body, 1000, &mut Vec::new());
        }
    }
}
