//! A pulse: the smallest sign of life, one datagram.
//!
//! ```text
//!  0      4         8         16        24       32        40         56
//!  +------+---------+---------+---------+--------+---------+----------+
//!  | NILP | version | session | counter | work   | runtime | tag      |
//!  |      | flags   |         |         |        |         | (HMAC)   |
//!  +------+---------+---------+---------+--------+---------+----------+
//! ```
//! Its keys come from the TLS session of the connection that it belongs to, one for each direction,
//! so that nobody else can make one and none counts twice: the counter of a pulse must be greater than
//! that of the last one that was believed. The flags say how long the work may take, and how the next
//! pulses come. Nothing here allocates.

use crate::protocol::detector::{Marks, Pace};
use ring::hmac;

/// Length of a pulse.
pub const LENGTH: usize = 56;

/// Label under which the keys are taken from the TLS session (RFC 5705, RFC 8446 7.5).
pub const LABEL: &[u8] = b"EXPORTER-nilicon-pulse-1";

/// Bytes taken: the session's number and two keys.
pub const MATERIAL: usize = 8 + 32 + 32;

const MAGIC: [u8; 4] = *b"NILP";
const VERSION: u8 = 1;
const FLAG_LONG: u8 = 1;
const FLAG_RESTS: u8 = 2;
const FLAG_DOUBTS: u8 = 4;
const SIGNED: usize = 40;
const TAG: usize = LENGTH - SIGNED;

/// Which end of a connection this side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It has made the connection.
    Caller,
    /// It was called.
    Called,
}

/// Makes this side's pulses in one session, and believes the other's.
#[derive(Debug)]
pub struct Pulses {
    session: [u8; 8],
    ours: hmac::Key,
    theirs: hmac::Key,
    sent: u64,
    believed: u64,
}

/// Why a datagram is no pulse of this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPulse {
    /// It is something else.
    #[error("not a pulse of a version known here")]
    Format,
    /// It is of another session.
    #[error("a pulse of another session")]
    Session,
    /// It was made without the key.
    #[error("a pulse with a wrong tag")]
    Tag,
    /// It, or a later one, was here before.
    #[error("a pulse that was here before")]
    Replayed,
}

impl Pulses {
    /// Pulses of the session that gave `material` under [`LABEL`].
    pub fn new(material: &[u8; MATERIAL], end: End) -> Self {
        let (session, keys) = material.split_at(8);
        let (calling, called) = keys.split_at(32);
        let key = |bytes| hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let (ours, theirs) = match end {
            End::Caller => (key(calling), key(called)),
            End::Called => (key(called), key(calling)),
        };
        let mut number = [0; 8];
        number.copy_from_slice(session);
        Self { session: number, ours, theirs, sent: 0, believed: 0 }
    }

    /// The next pulse of this side.
    pub fn next(&mut self, marks: Marks) -> [u8; LENGTH] {
        self.sent += 1;
        let mut pulse = [0; LENGTH];
        pulse[..4].copy_from_slice(&MAGIC);
        pulse[4] = VERSION;
        pulse[5] = if marks.long { FLAG_LONG } else { 0 }
            | match marks.pace {
                Pace::Usual => 0,
                Pace::Rests => FLAG_RESTS,
                Pace::Doubts => FLAG_DOUBTS,
            };
        pulse[8..16].copy_from_slice(&self.session);
        for (at, number) in [(16, self.sent), (24, marks.work), (32, marks.runtime)] {
            pulse[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let tag = hmac::sign(&self.ours, &pulse[..SIGNED]);
        pulse[SIGNED..].copy_from_slice(&tag.as_ref()[..TAG]);
        pulse
    }

    /// What a datagram says, if it is a pulse of the other side that was not here before.
    ///
    /// # Errors
    /// It is none; nothing has changed.
    pub fn believe(&mut self, datagram: &[u8]) -> Result<Marks, NoPulse> {
        let pulse: &[u8; LENGTH] = datagram.try_into().map_err(|_| NoPulse::Format)?;
        if pulse[..4] != MAGIC || pulse[4] != VERSION {
            return Err(NoPulse::Format);
        }
        if pulse[8..16] != self.session {
            return Err(NoPulse::Session);
        }
        let tag = hmac::sign(&self.theirs, &pulse[..SIGNED]);
        // In constant time: whoever guesses must not learn how far he is.
        let wrong =
            tag.as_ref()[..TAG].iter().zip(&pulse[SIGNED..]).fold(0, |w, (a, b)| w | (a ^ b));
        if wrong != 0 {
            return Err(NoPulse::Tag);
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&pulse[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let counter = number(16);
        if counter <= self.believed {
            return Err(NoPulse::Replayed);
        }
        self.believed = counter;
        let has = |flag| pulse[5] & flag != 0;
        let pace = match (has(FLAG_RESTS), has(FLAG_DOUBTS)) {
            (_, true) => Pace::Doubts,
            (true, false) => Pace::Rests,
            (false, false) => Pace::Usual,
        };
        Ok(Marks { work: number(24), runtime: number(32), long: has(FLAG_LONG), pace })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(seed: u8) -> (Pulses, Pulses) {
        let material = std::array::from_fn(|i| seed.wrapping_add(i as u8));
        (Pulses::new(&material, End::Caller), Pulses::new(&material, End::Called))
    }

    const MARKS: Marks = Marks { work: 7, runtime: u64::MAX, long: true, pace: Pace::Rests };

    #[test]
    fn a_pulse_says_what_was_meant_both_ways() {
        let (mut a, mut b) = pair(1);
        assert_eq!(b.believe(&a.next(MARKS)), Ok(MARKS));
        for pace in [Pace::Usual, Pace::Rests, Pace::Doubts] {
            let short = Marks { long: false, pace, ..MARKS };
            assert_eq!(a.believe(&b.next(short)), Ok(short));
        }
    }

    #[test]
    fn a_pulse_counts_once_and_an_older_one_never() {
        let (mut a, mut b) = pair(1);
        let (first, second) = (a.next(MARKS), a.next(MARKS));
        assert_eq!(b.believe(&second), Ok(MARKS));
        assert_eq!(b.believe(&second), Err(NoPulse::Replayed));
        assert_eq!(b.believe(&first), Err(NoPulse::Replayed));
        assert_eq!(b.believe(&a.next(MARKS)), Ok(MARKS), "lost ones do no harm");
    }

    #[test]
    fn nobody_else_can_make_one() {
        let (mut a, mut b) = pair(1);
        let (mut other, _) = pair(2);
        assert_eq!(b.believe(&other.next(MARKS)), Err(NoPulse::Session));
        let own = b.next(MARKS);
        assert_eq!(b.believe(&own), Err(NoPulse::Tag), "a reflected one is not the peer's");
        let good = a.next(MARKS);
        for at in 0..LENGTH {
            let mut bad = good;
            bad[at] ^= 1;
            assert!(b.believe(&bad).is_err(), "byte {at}");
        }
        assert_eq!(b.believe(&good[..LENGTH - 1]), Err(NoPulse::Format));
        assert_eq!(b.believe(&[]), Err(NoPulse::Format));
        assert_eq!(b.believe(&good), Ok(MARKS), "none of that has changed anything");
    }
}
