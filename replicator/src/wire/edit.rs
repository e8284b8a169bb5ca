//! One string of bytes against another that it has much in common with, though not always at the same place.
//!
//! What is alike is copied, from where the last copy has ended or some bytes further or nearer, and what is new
//! follows. Made for states: most of them is as before at the same place, numbers differ in place, and now and
//! then something has grown or shrunk and moves all behind it. There comparing is a tenth of the work of LZ4,
//! whose table is filled with all that could be copied before a byte is looked at. What has moved far is found where
//! the caller says so.
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

/// From this place of the new string on it is likely to go on as the old one does at that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Jump {
    pub(super) new: usize,
    pub(super) old: usize,
}

/// A string to be coded, and what is known of it.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) old: &'a [u8],
    pub(super) new: &'a [u8],
    /// In the order of their places in `new`.
    pub(super) jumps: &'a [Jump],
    /// Where a decoder begins in the old one.
    pub(super) origin: usize,
}

/// Appends to `out` what makes `new` of `old`, and moves `at`, where the copying begins, to where it has ended.
/// Says no, and leaves both as they were, if that takes more than `most` bytes.
pub(super) fn encode(job: Job<'_>, at: &mut usize, most: usize, out: &mut Vec<u8>) -> bool {
    let Job { old, new, jumps, origin } = job;
    let begin = out.len();
    // Where a decoder is.
    let mut there = origin;
    let (mut from, mut i) = (*at, 0);
    let mut jumps = jumps.iter().filter(|jump| jump.old <= old.len()).peekable();
    loop {
        while let Some(jump) = jumps.next_if(|jump| jump.new <= i) {
            from = if jump.new == i { jump.old } else { from };
        }
        let end = jumps.peek().map_or(new.len(), |jump| jump.new.min(new.len()));
        put(out, zigzag(from as i64 - there as i64));
        let alike = common(&old[from..], &new[i..end]);
        (from, i) = (from + alike, i + alike);
        there = from;
        let step = match i < end {
            true => in_step(&old[from..], &new[i..end]),
            false => Step { new: 0, old: 0 },
        };
        put(out, alike as u64);
        put(out, step.new as u64);
        if out.len() - begin + step.new > most {
            out.truncate(begin);
            return false;
        }
        out.extend_from_slice(&new[i..i + step.new]);
        (i, from) = (i + step.new, from + step.old);
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
            let job = Job { old, new: piece, jumps: &[], origin };
            assert!(encode(job, &mut at, usize::MAX, &mut out));
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
        let job = Job { old: &[0; 100], new: &[5; 100], jumps: &[], origin: 0 };
        assert!(!encode(job, &mut at, 50, &mut out));
        assert_eq!((at, out), (3, vec![1, 2]));
    }

    #[test]
    fn what_has_moved_far_is_found_where_it_is_said_to_be() {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut random = |len: usize| (0..len).map(|_| rng.u8(..)).collect::<Vec<u8>>();
        let (old, tail) = (random(200_000), random(100));
        let new = [&old[70_000..80_000], &tail, &old[150_000..160_000]].concat();
        let jumps = [Jump { new: 0, old: 70_000 }, Jump { new: 10_100, old: 150_000 }];
        let code = |jumps| {
            let (mut at, mut out) = (0, Vec::new());
            let job = Job { old: &old, new: &new, jumps, origin: 0 };
            let coded = encode(job, &mut at, new.len(), &mut out);
            let mut back = vec![0; new.len()];
            assert!(!coded || decode(&old, 0, &out, &mut back).is_some() && back == new);
            coded.then_some((out.len(), at))
        };
        let (len, at) = code(&jumps).expect("coded");
        assert!((100..140).contains(&len) && at == 160_000, "{len}, {at}");
        assert_eq!(code(&[]), None);
        // Wrong ones, and those that lead nowhere, only cost bytes.
        let wrong =
            [Jump { new: 5, old: 3 }, Jump { new: 5, old: 200_000 }, Jump { new: 6, old: 200_001 }];
        assert_eq!(code(&wrong), None);
        assert!(code(&[jumps[0], Jump { new: 9_000, old: 200_001 }, jumps[1]]).is_some());
    }

    proptest! {
        #[test]
        fn decoding_gives_it_back_whatever_is_said_of_jumps(
            old in prop::collection::vec(0u8..4, 0..3_000),
            new in prop::collection::vec(0u8..4, 0..3_000),
            mut jumps in prop::collection::vec((0..4_000usize, 0..4_000usize), 0..12),
        ) {
            jumps.sort_unstable();
            let jumps: Vec<Jump> = jumps.into_iter().map(|(new, old)| Jump { new, old }).collect();
            let (mut at, mut out) = (0, Vec::new());
            let job = Job { old: &old, new: &new, jumps: &jumps, origin: 0 };
            prop_assert!(encode(job, &mut at, usize::MAX, &mut out));
            prop_assert!(at <= old.len());
            let mut back = vec![0; new.len()];
            prop_assert!(decode(&old, 0, &out, &mut back).is_some() && back == new);
        }

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
