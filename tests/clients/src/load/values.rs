//! Values that prove themselves: the label names key and version, the rest follows from both.
//!
//! Invariant: two different (key, version, seed) never give the same bytes, so a value can be
//! checked without having been stored, and a wrong one tells what it is instead.

/// Longest value.
pub(super) const MAX_SIZE: usize = 16 << 20;
/// Typical bytes of a label.
pub(super) const LABEL: usize = 20;

/// How values are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Values {
    pub(super) seed: u64,
    pub(super) size: (usize, usize),
}

/// What a value read turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// The value of this key at this version, every byte of it.
    Version(u32),
    /// Anything else.
    Foreign,
}

impl Values {
    /// Writes a value into `out`, which is cleared first.
    pub(super) fn write(&self, key: u64, version: u32, out: &mut Vec<u8>) {
        use std::io::Write as _;
        out.clear();
        // Writing into a Vec cannot fail.
        let _ = write!(out, "k:{key}:v:{version}:");
        let mut state = mix(self.seed ^ mix(key) ^ mix(u64::from(version)).rotate_left(32)) | 1;
        let (least, most) = self.size;
        let len = (least + (state >> 8) as usize % (most - least + 1)).max(out.len());
        out.reserve(len - out.len());
        while out.len() < len {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let bytes = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            out.extend_from_slice(&bytes[..bytes.len().min(len - out.len())]);
        }
    }

    /// Finds out what a value is; `scratch` is for the value it should be.
    pub(super) fn recognise(&self, key: u64, value: &[u8], scratch: &mut Vec<u8>) -> Seen {
        let Some((of, version)) = label(value) else { return Seen::Foreign };
        if of != key {
            return Seen::Foreign;
        }
        self.write(key, version, scratch);
        if scratch == value { Seen::Version(version) } else { Seen::Foreign }
    }
}

/// Key and version in the label of a value.
fn label(value: &[u8]) -> Option<(u64, u32)> {
    let mut parts = value.split(|&byte| byte == b':');
    let mut next = || parts.next().and_then(|part| str::from_utf8(part).ok());
    let (k, key, v, version) = (next()?, next()?, next()?, next()?);
    let labelled = k == "k" && v == "v";
    labelled.then_some((key.parse().ok()?, version.parse().ok()?))
}

/// Describes a value for people: its label when it has one, else its first bytes.
pub(crate) fn describe(value: &[u8]) -> String {
    match label(value) {
        Some((key, version)) => format!("key {key} version {version} ({} bytes)", value.len()),
        None => {
            format!("\"{}\" ({} bytes)", value[..value.len().min(40)].escape_ascii(), value.len())
        }
    }
}

/// Spreads the bits of a number (the finalizer of splitmix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_recognised_and_one_changed_byte_is_not() {
        let values = Values { seed: 7, size: (30, 300) };
        let (mut value, mut scratch) = (Vec::new(), Vec::new());
        for version in 0..200 {
            values.write(5, version, &mut value);
            assert!((30..=300).contains(&value.len()));
            assert_eq!(values.recognise(5, &value, &mut scratch), Seen::Version(version));
            assert_eq!(values.recognise(6, &value, &mut scratch), Seen::Foreign);
            for at in [0, value.len() / 2, value.len() - 1] {
                value[at] ^= 1;
                assert_ne!(values.recognise(5, &value, &mut scratch), Seen::Version(version));
                value[at] ^= 1;
            }
            let other = Values { seed: 8, ..values };
            assert_eq!(other.recognise(5, &value, &mut scratch), Seen::Foreign);
        }
    }

    #[test]
    fn a_value_is_never_shorter_than_its_label() {
        let mut value = Vec::new();
        Values { seed: 1, size: (0, 0) }.write(123, 45, &mut value);
        assert_eq!(value, b"k:123:v:45:");
        assert_eq!(describe(&value), "key 123 version 45 (11 bytes)");
        assert_eq!(describe(b"OK"), "\"OK\" (2 bytes)");
    }
}
