//! The decisions of primary and backup, without sockets, clocks or threads.
//!
//! Each core has `handle(now, input) -> actions` and `next_deadline()`. `now` is the time since
//! any fixed origin on a monotonic clock; the caller calls `handle` with `Tick` when the deadline
//! has passed. One seeded simulation drives all of them (see the tests), and the shells around
//! the real transport drive the same code.

pub mod arbiter;
pub mod backup;
pub mod detector;
pub mod primary;
pub mod simulation;

/// Names one connection between the two hosts. What comes from any but the current one is
/// ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

impl std::fmt::Display for LinkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
