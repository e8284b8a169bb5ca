//! What a program has said of parts of its memory: madvise(2), mlock(2), mseal(2).

use serde::{Deserialize, Serialize};

/// A range of addresses and what holds for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Bits, see the constants.
    pub bits: u32,
}

#[allow(missing_docs, reason = "named after the argument of madvise(2), mlock2(2), mseal(2)")]
impl Advice {
    pub const DONTFORK: u32 = 1;
    pub const WIPEONFORK: u32 = 1 << 1;
    pub const DONTDUMP: u32 = 1 << 2;
    pub const MERGEABLE: u32 = 1 << 3;
    pub const HUGEPAGE: u32 = 1 << 4;
    pub const NOHUGEPAGE: u32 = 1 << 5;
    pub const SEQUENTIAL: u32 = 1 << 6;
    pub const RANDOM: u32 = 1 << 7;
    pub const LOCKED: u32 = 1 << 8;
    pub const LOCKED_ON_FAULT: u32 = 1 << 9;
    pub const SEALED: u32 = 1 << 10;
    pub const GUARD: u32 = 1 << 11;
}
