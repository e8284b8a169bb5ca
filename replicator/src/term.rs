//! The two counters that order everything: epochs within a generation, generations within a life.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The number of a checkpoint. Epoch `e` ends with the stop whose state is checkpoint `e`; the
/// output that the container produced since stop `e - 1` belongs to it. The first checkpoint,
/// a full copy, is epoch 1; 0 is never on the wire.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch before any checkpoint.
    pub const NONE: Epoch = Epoch(0);

    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The fencing term. It grows by one at each promotion; messages of an older one are refused.
/// The first primary of a container runs in generation 1.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of a container's first primary.
    pub const FIRST: Generation = Generation(1);

    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Generation {
        Generation(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
