//! Coding of the state: pieces of its bytes, each against the same place of the state before.
//!
//! Two states in a row have most bytes in common (registers and queues differ), though not
//! always at the same offset. Each piece of 32 KiB is coded as edits of the state before ([`edit`]); where that
//! does not make it much shorter, as an LZ4 block whose dictionary is what the
//! state before held there and 16 KiB to either side.

use super::codec::WireError;
use super::edit;
use super::message::Kind;
use lz4_flex::block::{
    compress_into, compress_into_with_dict, decompress_into, decompress_into_with_dict,
    get_maximum_output_size,
};

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

/// Edits may take this part of a piece: of what is longer, LZ4 may make less.
const SHORT: usize = 4;

fn dictionary(before: &[u8], offset: usize) -> &[u8] {
    let end = (offset + PIECE + MARGIN).min(before.len());
    &before[offset.saturating_sub(MARGIN).min(end)..end]
}

/// Where edits of the piece at `offset` begin in the state before.
fn origin(before: &[u8], offset: usize) -> usize {
    offset.min(before.len())
}

/// Appends the payload of the chunk that holds the piece at `offset`. `at` is where the state before goes on
/// with what follows the pieces so far, as far as that is known: 0 at first.
pub(super) fn encode_piece(
    before: &[u8],
    state: &[u8],
    offset: usize,
    at: &mut usize,
    out: &mut Vec<u8>,
) {
    let piece = &state[offset..state.len().min(offset + PIECE)];
    out.extend_from_slice(&(state.len() as u32).to_le_bytes());
    out.extend_from_slice(&(offset as u32).to_le_bytes());
    let (tag, body) = (out.len(), out.len() + 1);
    out.push(EDITS);
    let origin = origin(before, offset);
    if !before.is_empty() && edit::encode(before, origin, at, piece, piece.len() / SHORT, out) {
        return;
    }
    *at = (origin + piece.len()).min(before.len());
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
        let (mut back, mut sent, mut at) = (Vec::new(), 0, 0);
        for offset in (0..state.len()).step_by(PIECE) {
            let mut out = Vec::new();
            encode_piece(before, state, offset, &mut at, &mut out);
            sent += out.len();
            assert!(out.len() <= Kind::StateChunk.cap());
            decode_piece(before, 0, &out, 1 << 20, &mut back).unwrap();
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
