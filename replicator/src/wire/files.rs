//! Coding of what a checkpoint says of volumes: its bytes in pieces, in order, each packed with LZ4
//! where that makes it shorter.
//!
//! ```text
//!  offset 8 | length 4 | coding 1 | body
//! ```
//! What it says is opaque here ([`crate::volume`] knows). A piece is taken only where the one before
//! ended, so that what is assembled is what was cut up, or nothing.

use super::codec::{self, WireError};
use super::message::Kind;
use crate::{Epoch, Generation};
use bytes::Bytes;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

/// Bytes of one piece before it is packed.
pub(super) const PIECE: usize = 128 << 10;

/// Offset (u64), length (u32), coding (u8).
const PREFIX: usize = 13;

const RAW: u8 = 1;
const LZ4: u8 = 2;

/// Appends the payload of the chunk that holds the piece at `offset`.
pub(super) fn encode_piece(all: &[u8], offset: usize, out: &mut Vec<u8>) {
    let piece = &all[offset..all.len().min(offset + PIECE)];
    out.extend_from_slice(&(offset as u64).to_le_bytes());
    out.extend_from_slice(&(piece.len() as u32).to_le_bytes());
    let (tag, body) = (out.len(), out.len() + 1);
    out.resize(body + get_maximum_output_size(piece.len()), 0);
    match compress_into(piece, &mut out[body..]) {
        Ok(len) if len < piece.len() => {
            out[tag] = LZ4;
            out.truncate(body + len);
        }
        _ => {
            out[tag] = RAW;
            out.truncate(body);
            out.extend_from_slice(piece);
        }
    }
}

/// The frame of a piece of contents that goes ahead of a full checkpoint ([`crate::volume::Volumes::seed`]), at most
/// 128 KiB. One without bytes begins.
pub fn seed(generation: Generation, epoch: Epoch, piece: &[u8]) -> Bytes {
    debug_assert!(piece.len() <= PIECE, "a piece of {} bytes", piece.len());
    let mut out = Vec::with_capacity(codec::HEADER + piece.len() / 2);
    codec::open(&mut out);
    if !piece.is_empty() {
        encode_piece(piece, 0, &mut out);
    }
    codec::close(&mut out, 0, Kind::VolumeSeed, 0, generation, epoch);
    out.into()
}

/// The piece in the payload of a [`super::Message::VolumeSeed`], whose frame began at `at` of its stream.
pub fn seed_of(at: u64, payload: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut piece = Vec::new();
    if !payload.is_empty() {
        decode(Kind::VolumeSeed, at + codec::HEADER as u64, payload, PIECE, &mut piece)?;
    }
    Ok(piece)
}

/// Appends the piece in a chunk's payload to `all`, which holds the pieces before it and may have
/// `cap` bytes.
pub(super) fn decode_piece(
    at: u64,
    payload: &[u8],
    cap: usize,
    all: &mut Vec<u8>,
) -> Result<(), WireError> {
    decode(Kind::VolumeChunk, at, payload, cap, all)
}

fn decode(
    kind: Kind,
    at: u64,
    payload: &[u8],
    cap: usize,
    all: &mut Vec<u8>,
) -> Result<(), WireError> {
    let fail = |offset: u64, what: &str| Err(WireError::payload(at + offset, kind, what));
    let Some((prefix, body)) = payload.split_first_chunk::<PREFIX>() else {
        return fail(0, "shorter than its prefix");
    };
    let offset = u64::from_le_bytes(std::array::from_fn(|i| prefix[i]));
    let len = u32::from_le_bytes(std::array::from_fn(|i| prefix[8 + i])) as usize;
    let before = all.len();
    if offset != before as u64 {
        return fail(0, "not the next piece");
    }
    if len == 0 || len > PIECE {
        return fail(8, "a piece of this length is never sent");
    }
    if before + len > cap {
        return fail(8, "more of files than allowed");
    }
    match prefix[12] {
        RAW if body.len() == len => all.extend_from_slice(body),
        LZ4 => {
            all.resize(before + len, 0);
            match decompress_into(body, &mut all[before..]) {
                Ok(n) if n == len => {}
                _ => return fail(PREFIX as u64, "does not decompress to its length"),
            }
        }
        _ => return fail(12, "unknown coding or wrong length"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_gives_the_bytes_back(
            parts in prop::collection::vec((any::<u8>(), 1..90_000usize, any::<bool>()), 0..8),
        ) {
            let mut rng = fastrand::Rng::with_seed(3);
            let mut all = Vec::new();
            for (byte, len, noise) in parts {
                all.extend((0..len).map(|_| if noise { rng.u8(..) } else { byte }));
            }
            let mut back = Vec::new();
            for offset in (0..all.len()).step_by(PIECE) {
                let mut out = Vec::new();
                encode_piece(&all, offset, &mut out);
                prop_assert!(out.len() <= Kind::VolumeChunk.cap());
                decode_piece(0, &out, all.len(), &mut back).unwrap();
            }
            prop_assert!(back == all);
        }

        #[test]
        fn a_piece_that_goes_ahead_is_a_frame(piece in prop::collection::vec(any::<u8>(), 0..3000)) {
            let frame = seed(Generation(2), Epoch(7), &piece);
            let mut decoder = codec::Decoder::default();
            decoder.feed(&frame);
            let frame = decoder.next().unwrap().unwrap();
            prop_assert_eq!((frame.generation, frame.epoch), (Generation(2), Epoch(7)));
            let crate::wire::Message::VolumeSeed(payload) = frame.message else { panic!() };
            prop_assert!(seed_of(frame.at, &payload).unwrap() == piece);
            if let Some((_, cut)) = payload.split_last() {
                prop_assert!(cut.is_empty() || seed_of(0, cut).is_err());
            }
        }

        #[test]
        fn hostile_pieces_never_panic(
            mut body in prop::collection::vec(any::<u8>(), 0..300),
            coding in 0u8..4,
            len in 0u32..400,
        ) {
            if body.len() > PREFIX {
                body[..8].copy_from_slice(&7u64.to_le_bytes());
                body[8..12].copy_from_slice(&len.to_le_bytes());
                body[12] = coding;
            }
            let mut all = vec![1; 7];
            let _ = decode_piece(0, &body, 300, &mut all);
            prop_assert!(all.len() <= 300);
        }
    }
}
