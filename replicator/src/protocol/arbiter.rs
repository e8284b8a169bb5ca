//! Who may act alone (FO-1).
//!
//! A side that wants to go on without the other asks an arbiter. It names the generation that its
//! state is of (its base) and the one that it wants. The arbiter advances from the newest
//! generation that it has granted, as compare-and-swap does:
//!
//! ```text
//! wanted <= newest          denied (granted again, if it is the same side that asks again)
//! base   >= newest          granted: its state is of the newest life
//! the newest is its own     granted: what was granted to it before was not used, or has ended
//! else                      denied: the other side has acted in a generation that it knows not of
//! ```
//! So of two sides that part, one at most goes on; and a copy from before the other side went on
//! alone is worth nothing, for good.

use crate::Generation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The answer of an arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The generation belongs to the one who asked.
    Granted,
    /// It does not; this is the newest that was granted.
    Denied {
        /// The newest generation granted to anybody.
        newest: Generation,
    },
}

/// What a side asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The container.
    pub container: String,
    /// The host that asks.
    pub host: String,
    /// The generation that its state is of.
    pub base: Generation,
    /// The generation that it wants.
    pub wanted: Generation,
}

/// Grants generations.
pub trait Arbiter {
    /// Decides about a claim. What was granted is granted to nobody else.
    fn decide(&mut self, claim: &Claim) -> Verdict;
}

/// Grants the backup what it asks for: for two hosts without a witness.
///
/// It cannot tell a dead peer from a cut link, and it need not, to keep clients from seeing two
/// histories: an old primary that still runs behind a cut releases nothing, because only the
/// backup's acknowledgements release, and a promoted backup gives none. What it cannot keep is
/// the service, when the backup promotes although the primary lives: the old primary's clients
/// are taken over. And it knows only one side: with it, a primary may never go on unprotected by
/// its own decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unopposed;

impl Arbiter for Unopposed {
    fn decide(&mut self, _: &Claim) -> Verdict {
        Verdict::Granted
    }
}

/// The newest grant of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Its generation.
    pub generation: Generation,
    /// Who has it.
    pub host: String,
}

/// The arbiter that both sides ask: it remembers the newest grant of each container. Whoever
/// keeps one must write it down before an answer leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants(BTreeMap<String, Grant>);

impl Grants {
    /// The newest grant of a container.
    pub fn newest(&self, container: &str) -> Option<&Grant> {
        self.0.get(container)
    }

    /// What somebody else has written down of a container.
    pub fn remember(&mut self, container: &str, grant: Grant) {
        self.0.insert(container.to_owned(), grant);
    }

    /// Containers that are known.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Arbiter for Grants {
    fn decide(&mut self, claim: &Claim) -> Verdict {
        if let Some(Grant { generation, host }) = self.0.get(&claim.container) {
            let own = *host == claim.host;
            let newest = *generation;
            if claim.wanted <= newest {
                let again = own && claim.wanted == newest;
                return if again { Verdict::Granted } else { Verdict::Denied { newest } };
            }
            if claim.base < newest && !own {
                return Verdict::Denied { newest };
            }
        }
        let grant = Grant { generation: claim.wanted, host: claim.host.clone() };
        self.0.insert(claim.container.clone(), grant);
        Verdict::Granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(host: &str, base: u64, wanted: u64) -> Claim {
        Claim {
            container: "store".into(),
            host: host.into(),
            base: Generation(base),
            wanted: Generation(wanted),
        }
    }

    fn denied(newest: u64) -> Verdict {
        Verdict::Denied { newest: Generation(newest) }
    }

    #[test]
    fn of_two_that_part_one_goes_on() {
        for (first, second) in [("alpha", "beta"), ("beta", "alpha")] {
            let mut g = Grants::default();
            assert_eq!(g.decide(&claim("alpha", 0, 1)), Verdict::Granted, "its first life");
            assert_eq!(g.decide(&claim(first, 1, 2)), Verdict::Granted);
            assert_eq!(g.decide(&claim(first, 1, 2)), Verdict::Granted, "the answer was lost");
            assert_eq!(g.decide(&claim(second, 1, 2)), denied(2));
            assert_eq!(g.decide(&claim(second, 1, 3)), denied(2), "its state is old");
            assert_eq!(g.decide(&claim(second, 2, 3)), Verdict::Granted, "after a resync");
        }
    }

    #[test]
    fn a_grant_that_was_not_used_hinders_only_the_other_side() {
        let mut g = Grants::default();
        g.decide(&claim("alpha", 0, 1));
        assert_eq!(g.decide(&claim("beta", 1, 2)), Verdict::Granted);
        assert_eq!(g.decide(&claim("alpha", 1, 2)), denied(2));
        assert_eq!(g.decide(&claim("beta", 1, 3)), Verdict::Granted);
    }

    #[test]
    fn containers_do_not_concern_each_other() {
        let mut g = Grants::default();
        g.decide(&claim("alpha", 4, 5));
        let other = Claim { container: "other".into(), ..claim("beta", 0, 1) };
        assert_eq!(g.decide(&other), Verdict::Granted);
    }
}
