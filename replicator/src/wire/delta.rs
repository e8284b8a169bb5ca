//! Coding of one page: nothing, the changed words, LZ4, or the page itself, by size.
//!
//! The common page of an epoch differs from its last version in a few words. Both sides hold
//! that version ([`super::shadow`]), so only these words travel: pairs of (words to skip, words
//! that follow), each a variable-length integer, then the words. A page that changed a lot is
//! tried with LZ4, and sent raw where that does not help.
//!
//! Decoding trusts nothing: every count is checked against the page before a byte is written,
//! and a coding must use up its bytes exactly.

use crate::image::pages::PAGE;
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

/// The bytes of a page.
pub type Page = [u8; PAGE];

const WORD: usize = 8;
const WORDS: usize = PAGE / WORD;

/// A delta of at most this many bytes is taken without trying anything else.
const SMALL_DELTA: usize = PAGE / 4;

/// A coding that saves less than this many bytes is not worth its decoding.
const WORTHWHILE: usize = 64;

/// How a page is coded. The numbers are those on the wire; 0 is never valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Coding {
    /// All bytes are zero; no body.
    Zero = 1,
    /// As the version before; no body.
    Same = 2,
    /// The words that differ from the version before.
    Delta = 3,
    /// One LZ4 block.
    Lz4 = 4,
    /// The page.
    Raw = 5,
}

impl TryFrom<u8> for Coding {
    type Error = DeltaError;

    fn try_from(tag: u8) -> Result<Self, DeltaError> {
        Ok(match tag {
            1 => Self::Zero,
            2 => Self::Same,
            3 => Self::Delta,
            4 => Self::Lz4,
            5 => Self::Raw,
            _ => return Err(DeltaError::UnknownCoding { tag }),
        })
    }
}

/// Why a coded page cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// No coding has this number.
    #[error("page coding {tag} is unknown")]
    UnknownCoding {
        /// What stands there.
        tag: u8,
    },
    /// It refers to a version that this side does not hold.
    #[error("page is coded against a version before, and none is held")]
    NoPrevious,
    /// The body is too short, too long or reaches past the end of the page.
    #[error("{coding:?} page with a body of {len} bytes is malformed")]
    Malformed {
        /// The coding.
        coding: Coding,
        /// Length of its body in bytes.
        len: usize,
    },
}

/// Codes pages; holds scratch memory (about 12 KiB) so that nothing is allocated for a page.
pub struct PageCoder {
    table: CompressTable,
    scratch: Vec<u8>,
}

impl Default for PageCoder {
    fn default() -> Self {
        Self { table: CompressTable::small(), scratch: vec![0; get_maximum_output_size(PAGE)] }
    }
}

impl PageCoder {
    /// Packs a page with LZ4 into the scratch memory. Gives the length.
    pub(super) fn packed(&mut self, page: &Page) -> Option<usize> {
        compress_into_with_table(page, &mut self.scratch, &mut self.table).ok()
    }

    /// Appends the coded page to `out`; at most [`PAGE`] bytes.
    pub fn encode(&mut self, previous: Option<&Page>, current: &Page, out: &mut Vec<u8>) -> Coding {
        let start = out.len();
        let mut delta = None;
        if let Some(previous) = previous {
            let changed = changed_words(previous, current);
            if changed.iter().all(|m| *m == 0) {
                return Coding::Same;
            }
            let words: usize = changed.iter().map(|m| m.count_ones() as usize).sum();
            if words * WORD < PAGE - WORTHWHILE {
                encode_delta(&changed, current, out);
                delta = Some(out.len() - start);
                if delta.is_some_and(|len| len <= SMALL_DELTA) {
                    // A page that became zero in few words is cheaper still as such.
                    if !is_zero(current) {
                        return Coding::Delta;
                    }
                }
            }
        }
        if is_zero(current) {
            out.truncate(start);
            return Coding::Zero;
        }
        let packed = self.packed(current).unwrap_or(usize::MAX);
        let best_else = delta.unwrap_or(PAGE).min(PAGE - WORTHWHILE);
        if packed < best_else {
            out.truncate(start);
            out.extend_from_slice(&self.scratch[..packed]);
            Coding::Lz4
        } else if delta.is_some_and(|len| len <= PAGE - WORTHWHILE) {
            Coding::Delta
        } else {
            out.truncate(start);
            out.extend_from_slice(current);
            Coding::Raw
        }
    }
}

/// Decodes a page on top of its version before: `page` holds that version on entry if
/// `has_previous`, and anything otherwise. On an error its contents are undefined.
pub fn decode_onto(
    page: &mut Page,
    has_previous: bool,
    coding: Coding,
    body: &[u8],
) -> Result<(), DeltaError> {
    let malformed = DeltaError::Malformed { coding, len: body.len() };
    match coding {
        Coding::Zero if body.is_empty() => page.fill(0),
        Coding::Same | Coding::Delta if !has_previous => return Err(DeltaError::NoPrevious),
        Coding::Same if body.is_empty() => {}
        Coding::Delta => apply_delta(page, body).ok_or(malformed)?,
        Coding::Lz4 => match decompress_into(body, page) {
            Ok(PAGE) => {}
            _ => return Err(malformed),
        },
        Coding::Raw if body.len() == PAGE => page.copy_from_slice(body),
        Coding::Zero | Coding::Same | Coding::Raw => return Err(malformed),
    }
    Ok(())
}

/// Decodes a page into `out`; see [`decode_onto`].
pub fn decode_page(
    previous: Option<&Page>,
    coding: Coding,
    body: &[u8],
    out: &mut Page,
) -> Result<(), DeltaError> {
    if let Some(previous) = previous {
        out.copy_from_slice(previous);
    }
    decode_onto(out, previous.is_some(), coding, body)
}

/// Whether all bytes are zero.
pub fn is_zero(page: &Page) -> bool {
    page.chunks_exact(256).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// Whether two cache lines are the same: without a call, and without looking for where they differ.
pub(super) fn is_same(a: &[u8; 64], b: &[u8; 64]) -> bool {
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0);
    words.fold(0, |all, (a, b)| all | (u64::from_ne_bytes(*a) ^ u64::from_ne_bytes(*b))) == 0
}

/// One bit for each word, set where the two differ.
fn changed_words(previous: &Page, current: &Page) -> [u64; WORDS / 64] {
    let mut masks = [0u64; WORDS / 64];
    let pairs = previous.as_chunks::<64>().0.iter().zip(current.as_chunks::<64>().0);
    for (block, (a, b)) in pairs.enumerate() {
        if is_same(a, b) {
            continue;
        }
        let mut mask = 0u64;
        for (i, (x, y)) in a.chunks_exact(WORD).zip(b.chunks_exact(WORD)).enumerate() {
            mask |= u64::from(x != y) << i;
        }
        masks[block / 8] |= mask << (8 * (block % 8));
    }
    masks
}

/// First word at or after `from` whose bit equals `set`, or the number of words.
fn find(masks: &[u64; WORDS / 64], from: usize, set: bool) -> usize {
    let mut at = from;
    while at < WORDS {
        let word = if set { masks[at / 64] } else { !masks[at / 64] };
        let rest = word >> (at % 64);
        if rest != 0 {
            return at + rest.trailing_zeros() as usize;
        }
        at = (at / 64 + 1) * 64;
    }
    WORDS
}

fn encode_delta(changed: &[u64; WORDS / 64], current: &Page, out: &mut Vec<u8>) {
    let mut done = 0;
    loop {
        let first = find(changed, done, true);
        if first == WORDS {
            return;
        }
        let end = find(changed, first, false);
        put_count(out, first - done);
        put_count(out, end - first);
        out.extend_from_slice(&current[first * WORD..end * WORD]);
        done = end;
    }
}

/// Gives what a delta changes, in order: the place in the page and the bytes there. `None` if it is
/// malformed. Deltas that [`PageCoder`] never makes (empty ones, empty
/// runs) are refused too, so that each page has few codings.
fn walk_delta<'a>(mut body: &'a [u8], mut each: impl FnMut(usize, &'a [u8])) -> Option<()> {
    let mut at = 0;
    while !body.is_empty() || at == 0 {
        let first = at + take_count(&mut body)?;
        let count = take_count(&mut body)?;
        let end = first + count;
        if count == 0 || end > WORDS {
            return None;
        }
        let (words, rest) = body.split_at_checked(count * WORD)?;
        each(first * WORD, words);
        body = rest;
        at = end;
    }
    Some(())
}

fn apply_delta(page: &mut Page, body: &[u8]) -> Option<()> {
    walk_delta(body, |at, words| page[at..at + words.len()].copy_from_slice(words))
}

/// What a delta changes, see [`Coding::Delta`]: calls `each` with the place in the page and the bytes there,
/// in order. On an error some of it was given already.
pub fn decode_edits<'a>(
    body: &'a [u8],
    each: impl FnMut(usize, &'a [u8]),
) -> Result<(), DeltaError> {
    let malformed = DeltaError::Malformed { coding: Coding::Delta, len: body.len() };
    walk_delta(body, each).ok_or(malformed)
}

/// A count below 2^14 in one or two bytes, low bits first.
fn put_count(out: &mut Vec<u8>, count: usize) {
    if count < 0x80 {
        out.push(count as u8);
    } else {
        out.push((count & 0x7f) as u8 | 0x80);
        out.push((count >> 7) as u8);
    }
}

fn take_count(body: &mut &[u8]) -> Option<usize> {
    let (&low, rest) = body.split_first()?;
    *body = rest;
    if low < 0x80 {
        return Some(low.into());
    }
    let (&high, rest) = body.split_first()?;
    *body = rest;
    (high < 0x80).then_some(usize::from(low & 0x7f) | usize::from(high) << 7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(previous: Option<&Page>, current: &Page) -> (Coding, usize) {
        let mut out = vec![9];
        let coding = PageCoder::default().encode(previous, current, &mut out);
        let mut page = [0x55; PAGE];
        decode_page(previous, coding, &out[1..], &mut page).unwrap();
        assert!(page == *current, "{coding:?}");
        assert!(out.len() <= PAGE + 1);
        (coding, out.len() - 1)
    }

    fn noise(seed: u64) -> Page {
        let mut page = [0; PAGE];
        fastrand::Rng::with_seed(seed).fill(&mut page);
        page
    }

    #[test]
    fn each_coding_is_chosen_where_it_is_smallest() {
        let before = noise(1);
        assert_eq!(round_trip(None, &[0; PAGE]), (Coding::Zero, 0));
        assert_eq!(round_trip(Some(&before), &[0; PAGE]), (Coding::Zero, 0));
        assert_eq!(round_trip(Some(&before), &before), (Coding::Same, 0));
        let mut after = before;
        after[4090] ^= 1;
        assert_eq!(round_trip(Some(&before), &after), (Coding::Delta, 11));
        assert_eq!(round_trip(Some(&before), &noise(2)), (Coding::Raw, PAGE));
        let mut text = [b'x'; PAGE];
        text[7] = b'y';
        assert_eq!(round_trip(None, &text).0, Coding::Lz4);
        assert_eq!(round_trip(Some(&before), &text).0, Coding::Lz4);
    }

    #[test]
    fn a_delta_against_nothing_is_refused() {
        let mut page = [0; PAGE];
        assert_eq!(decode_onto(&mut page, false, Coding::Same, &[]), Err(DeltaError::NoPrevious));
        assert_eq!(
            decode_onto(&mut page, false, Coding::Delta, &[0, 1]),
            Err(DeltaError::NoPrevious)
        );
        assert!(Coding::try_from(0).is_err() && Coding::try_from(6).is_err());
    }

    proptest! {
        #[test]
        fn decoding_gives_the_page_back(
            seed in any::<u64>(),
            edits in prop::collection::vec((0..PAGE, 1..300usize, any::<u8>()), 0..40),
            had in any::<bool>(),
            zero in any::<bool>(),
        ) {
            let before = if zero { [0; PAGE] } else { noise(seed) };
            let mut after = before;
            for (at, len, byte) in edits {
                let end = (at + len).min(PAGE);
                after[at..end].fill(byte);
            }
            round_trip(had.then_some(&before), &after);
        }

        #[test]
        fn hostile_bodies_never_panic(
            tag in 1u8..6,
            body in prop::collection::vec(any::<u8>(), 0..5000),
            had in any::<bool>(),
        ) {
            let mut page = [0; PAGE];
            let _ = decode_onto(&mut page, had, Coding::try_from(tag).unwrap(), &body);
        }
    }
}
