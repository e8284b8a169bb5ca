//! Maps by numbers of the kernel's: inodes, addresses of its structures, descriptors. A stop looks
//! thousands of them up, and most of the time of the standard hash is its defence against keys that
//! were chosen to collide. These are hardly a program's to choose: it may number its descriptors as
//! it likes, but as the hash takes every bit to the whole word, that helps it little, and all that it
//! could win is a longer stop of its own.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map by such a number.
pub(super) type ByNumber<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Hashes one number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, n: u64) {
        // The fractional part of the golden ratio: neighbours land far apart.
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }

    fn write_i32(&mut self, n: i32) {
        self.write_u64(u64::from(n as u32));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How many are held in place.
const SOME: usize = 4;

/// What has one number: nearly always one thing, or the two ends of a pipe, or a few descriptors of one file (/dev/null).
#[derive(Clone, Debug)]
pub(super) enum Few {
    One(u32),
    Some([u32; SOME], u8),
    Many(Vec<u32>),
}

impl Few {
    /// All of it, in order.
    pub(super) fn all(&self) -> &[u32] {
        match self {
            Few::One(only) => std::slice::from_ref(only),
            Few::Some(some, count) => &some[..usize::from(*count)],
            Few::Many(all) => all,
        }
    }

    /// Puts one more at its place in the order.
    pub(super) fn insert(&mut self, place: usize, it: u32) {
        match self {
            Few::One(only) => {
                *self = Few::Some([*only; SOME], 1);
                self.insert(place, it);
            }
            Few::Some(some, count) if usize::from(*count) < SOME => {
                some.copy_within(place..usize::from(*count), place + 1);
                (some[place], *count) = (it, *count + 1);
            }
            Few::Some(some, _) => {
                let mut all = Vec::with_capacity(4 * SOME);
                all.extend_from_slice(some);
                all.insert(place, it);
                *self = Few::Many(all);
            }
            Few::Many(all) => all.insert(place, it),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::hash::BuildHasher;

    #[test]
    fn a_few_keep_their_order() {
        let mut few = Few::One(5);
        assert_eq!(few.all(), [5]);
        few.insert(0, 9);
        few.insert(2, 7);
        few.insert(1, 1);
        assert_eq!(few.all(), [9, 1, 5, 7]);
        few.insert(4, 3);
        few.insert(0, 2);
        assert_eq!(few.all(), [2, 9, 1, 5, 7, 3]);
    }

    /// What a table looks at first: the lowest bits, and the highest seven.
    #[test]
    fn numbers_as_the_kernel_gives_them_are_spread() {
        let hash = BuildHasherDefault::<Mix>::default();
        let places = |of: &dyn Fn(u64) -> u64| {
            let all = (0..1024).map(|i| hash.hash_one(of(i)));
            let (low, high): (HashSet<_>, HashSet<_>) = all.map(|h| (h % 1024, h >> 57)).unzip();
            (low.len(), high.len())
        };
        for of in [
            &|i| i,
            &|i| 0xffff_8881_0000_0000 + i * 256,
            &|i| 0xffff_8881_0000_0000 + i * 4096,
            &|i| i << 32,
        ] as [&dyn Fn(u64) -> u64; 4]
        {
            let (low, high) = places(of);
            assert!(low > 500 && high > 100, "{low} {high}");
        }
    }
}
