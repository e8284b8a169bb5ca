//! Who may act alone (FO-1).
//!
//! A side that wants to go on without the other asks an arbiter for a generation. A generation
//! is granted once, and only above all granted before, so that of two sides that ask, one at
//! most goes on.

use crate::Generation;

/// The answer of an arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The generation belongs to the one who asked.
    Granted,
    /// It does not; this is the newest that was granted.
    Denied {
        /// The newest generation granted to anybody.
        newest: Generation,
    },
}

/// Grants generations.
pub trait Arbiter {
    /// Asks for a generation. Once it was granted, it is granted to nobody else.
    fn may_promote(&mut self, generation: Generation) -> Verdict;
}

/// Grants every generation newer than those it has seen: for two hosts without a witness.
///
/// It cannot tell a dead peer from a cut link, and it need not, to keep clients from seeing two
/// histories: an old primary that still runs behind a cut releases nothing, because only the
/// backup's acknowledgements release, and a promoted backup gives none. What it cannot keep is
/// the service, when the backup promotes although the primary lives: the old primary's clients
/// are taken over. And it knows only its own side: with it, a primary may never go on
/// unprotected by its own decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unopposed {
    newest: Generation,
}

impl Unopposed {
    /// An arbiter that has seen this generation.
    pub fn new(newest: Generation) -> Self {
        Self { newest }
    }
}

impl Arbiter for Unopposed {
    fn may_promote(&mut self, generation: Generation) -> Verdict {
        if generation <= self.newest {
            return Verdict::Denied { newest: self.newest };
        }
        self.newest = generation;
        Verdict::Granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_granted_once_and_only_upwards() {
        let mut a = Unopposed::new(Generation(1));
        let denied = |n| Verdict::Denied { newest: Generation(n) };
        assert_eq!(a.may_promote(Generation(1)), denied(1));
        assert_eq!(a.may_promote(Generation(4)), Verdict::Granted);
        assert_eq!(a.may_promote(Generation(4)), denied(4));
        assert_eq!(a.may_promote(Generation(2)), denied(4));
    }
}
