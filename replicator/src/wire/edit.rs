//! One string of bytes against another that it has much in common with, though not always at the same place.
//!
//! What is alike is copied, from where the last copy has ended or some bytes further or nearer, and what is new
//! follows. Made for states: most of them is as before at the same place, numbers differ in place, and now and
//! then something has grown or shrunk and moves all behind it. There comparing is a tenth of the work of LZ4,
//! whose table is filled with all that could be copied before a byte is looked at.
//!
//! ```text
//! skip (signed), bytes to copy, new bytes: a number of variable length each; then the new bytes; and so on
//! ```
//!
//! Decoding trusts nothing: it gives exactly as many bytes as are expected of exactly those that came, or none.

use memchr::memmem;

/// Bytes that must be alike for the two strings to be in step again.
const STEP: usize = 16;

/// How far the new string is looked through, byte by byte, for the place where it is in step again with nothing
/// moved.
const IN_PLACE: usize = 256;

/// How far either string is looked through for what the other goes on with.
const WINDOW: usize = 16 << 10;

/// Bytes that may have changed beside what has grown or shrunk, such as its length.
const BESIDE: usize = 4;

/// Appends to `out` what makes `new` of `old`, and moves `at`, where the copying begins, to where it has ended.
/// `origin` is where a decoder begins. Says no, and leaves both as they were, if that takes more than `most` bytes.
pub(super) fn encode(
    old: &[u8],
    origin: usize,
    at: &mut usize,
    new: &[u8],
    most: usize,
    out: &mut Vec<u8>,
) -> bool {
    let begin = out.len();
    let (mut from, mut i, mut skip) = (*at, 0, *at as i64 - origin as i64);
    loop {
        let alike = common(&old[from..], &new[i..]);
        (from, i) = (from + alike, i + alike);
        let step = match i < new.len() {
            true => in_step(&old[from..], &new[i..]),
            false => Step { new: 0, old: 0 },
        };
        put(out, zigzag(skip));
        put(out, alike as u64);
        put(out, step.new as u64);
        if out.len() - begin + step.new > most {
            out.truncate(begin);
            return false;
        }
        out.extend_from_slice(&new[i..i + step.new]);
        (i, from, skip) = (i + step.new, from + step.old, step.old as i64);
        if i == new.len() {
            *at = from;
            return true;
        }
    }
}

/// Fills `new` from `old`, see [`encode`]. `None` if the body is malformed.
pub(super) fn decode(old: &[u8], origin: usize, mut body: &[u8], new: &mut [u8]) -> Option<()> {
    let (mut from, mut i) = (origin, 0);
    while !body.is_empty() {
        let skip = unzigzag(take(&mut body)?);
        from = usize::try_from(i64::try_from(from).ok()?.checked_add(skip)?).ok()?;
        let alike = usize::try_from(take(&mut body)?).ok()?;
        let same = old.get(from..from.checked_add(alike)?)?;
        new.get_mut(i..i + alike)?.copy_from_slice(same);
        (from, i) = (from + alike, i + alike);
        let len = usize::try_from(take(&mut body)?).ok()?;
        let (fresh, rest) = body.split_at_checked(len)?;
        new.get_mut(i..i + len)?.copy_from_slice(fresh);
        (body, i) = (rest, i + len);
    }
    (i == new.len()).then_some(())
}

/// How far either string goes on before they are in step again.
struct Step {
    new: usize,
    old: usize,
}

/// Looks for where two strings that differ in their first bytes are in step again; at the end of the new one
/// they always are.
fn in_step(old: &[u8], new: &[u8]) -> Step {
    let is_at = |a: usize, b: usize| {
        let here = new.get(a..a + STEP);
        here.is_some() && here == old.get(b..b + STEP)
    };
    if let Some(n) = (1..IN_PLACE).find(|n| is_at(*n, *n)) {
        return Step { new: n, old: n };
    }
    for beside in 0..BESIDE {
        let grown = old
            .get(beside..beside + STEP)
            .and_then(|needle| memmem::find(&new[..new.len().min(WINDOW)], needle));
        if let Some(n) = grown {
            return Step { new: n, old: beside };
        }
        let shrunk = new
            .get(beside..beside + STEP)
            .and_then(|needle| memmem::find(&old[..old.len().min(WINDOW)], needle));
        if let Some(n) = shrunk {
            return Step { new: beside, old: n };
        }
    }
    // A queue that holds other bytes now, as many as before.
    if let Some(n) = (IN_PLACE..WINDOW).step_by(STEP).find(|n| is_at(*n, *n)) {
        return Step { new: n, old: n };
    }
    Step { new: new.len(), old: new.len().min(old.len()) }
}

/// Number of bytes that both begin with.
fn common(a: &[u8], b: &[u8]) -> usize {
    let lines = a.as_chunks::<64>().0.iter().zip(b.as_chunks::<64>().0);
    let whole = lines.take_while(|(a, b)| a == b).count() * 64;
    whole + a[whole..].iter().zip(&b[whole..]).take_while(|(a, b)| a == b).count()
}

fn zigzag(n: i64) -> u64 {
    (n << 1 ^ n >> 63) as u64
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// Seven bits a byte, low ones first.
fn put(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn take(body: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..63).step_by(7) {
        let (&byte, rest) = body.split_first()?;
        *body = rest;
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In pieces, as states are. Gives the length of the coded ones.
    fn round_trip(old: &[u8], new: &[u8]) -> usize {
        let (mut at, mut sent) = (0, 0);
        for (n, piece) in new.chunks(1000).enumerate() {
            let origin = (n * 1000).min(old.len());
            at = if n == 0 { origin } else { at };
            let mut out = vec![7];
            assert!(encode(old, origin, &mut at, piece, usize::MAX, &mut out));
            assert!(at <= old.len());
            let mut back = vec![0; piece.len()];
            decode(old, origin, &out[1..], &mut back).expect("well formed");
            assert!(back == piece);
            sent += out.len() - 1;
        }
        sent
    }

    #[test]
    fn what_has_changed_grown_or_shrunk_costs_about_its_bytes() {
        let mut rng = fastrand::Rng::with_seed(3);
        let old: Vec<u8> = (0..40_000).map(|_| rng.u8(..)).collect();
        assert!(round_trip(&old, &old) <= 40 * 5);
        let mut new = old.clone();
        new[5_000..5_008].fill(1);
        new.splice(12_344..12_345, [9; 600]);
        new.drain(30_000..30_400);
        let sent = round_trip(&old, &new);
        assert!((600..900).contains(&sent), "{sent}");
    }

    #[test]
    fn what_would_be_too_long_is_left_alone() {
        let mut out = vec![1, 2];
        let mut at = 3;
        assert!(!encode(&[0; 100], 0, &mut at, &[5; 100], 50, &mut out));
        assert_eq!((at, out), (3, vec![1, 2]));
    }

    proptest! {
        #[test]
        fn decoding_gives_it_back(
            old in prop::collection::vec(0u8..4, 0..5_000),
            edits in prop::collection::vec((0..5_000usize, 0..40usize, prop::collection::vec(any::<u8>(), 0..40)), 0..12),
        ) {
            let mut new = old.clone();
            for (at, gone, more) in edits {
                let at = at.min(new.len());
                let end = (at + gone).min(new.len());
                new.splice(at..end, more);
            }
            round_trip(&old, &new);
        }

        #[test]
        fn hostile_bodies_never_panic(
            body in prop::collection::vec(any::<u8>(), 0..200),
            len in 0..300usize,
            origin in 0..200usize,
        ) {
            let _ = decode(&[7; 100], origin, &body, &mut vec![0; len]);
        }
    }
}
