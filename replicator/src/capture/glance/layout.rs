//! Which fields of the kernel's structures a program copies, and where they lie in what it writes.

use crate::bpf::asm::{Assembler, FP, Size};
use crate::bpf::btf::{Btf, Member};
use std::io;

/// What a field is looked at for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Another value is another object.
    Identity,
    /// It was set by the program, and is read with the options of a socket or the settings of a
    /// thread.
    Setting,
    /// It is read in /proc, or by calls that need no help of the thread.
    Outside,
    /// It changes all the time.
    Data,
}

/// A field that is wanted: the structure (an index of the caller's), its path in it, its use.
pub(super) type Wanted = (usize, &'static str, Use);

#[derive(Clone, Copy, Debug)]
struct Slot {
    place: usize,
    source: usize,
    member: Member,
}

/// Where wanted fields lie in a record.
#[derive(Debug)]
pub(super) struct Layout {
    slots: Vec<Slot>,
    len: usize,
    identity: Vec<u64>,
    setting: Vec<u64>,
    outside: Vec<u64>,
}

fn unsupported(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

impl Layout {
    /// Looks the fields up; `structures` are their structures by index.
    pub(super) fn new(btf: &Btf, structures: &[u32], wanted: &[Wanted]) -> io::Result<Self> {
        let mut slots = Vec::with_capacity(wanted.len());
        for &(source, path, _) in wanted {
            let member = btf.member(structures[source], path)?;
            let whole = matches!(member.size, 1 | 2 | 4 | 8) || member.size % 8 == 0;
            if !whole || member.offset % member.size.min(8) != 0 {
                return Err(unsupported(format!("{path} has {} bytes", member.size)));
            }
            slots.push(Slot { place: 0, source, member });
        }
        // Large ones first, so that all are aligned.
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(slots[*i].member.size.min(8)));
        let mut len = 0;
        for i in order {
            slots[i].place = len;
            len += slots[i].member.size;
        }
        let len = len.next_multiple_of(8);
        let mask = |of: Use| {
            let mut bytes = vec![0u8; len];
            for (slot, (.., used)) in slots.iter().zip(wanted).filter(|(_, (.., u))| *u == of) {
                debug_assert_eq!(*used, of);
                let at = slot.place..slot.place + slot.member.size;
                match slot.member.bits {
                    None => bytes[at].fill(0xff),
                    Some((first, count)) => {
                        let bits = ((1u64 << count) - 1) << first;
                        bytes[at.clone()].copy_from_slice(&bits.to_le_bytes()[..at.len()]);
                    }
                }
            }
            bytes.chunks_exact(8).map(word).collect()
        };
        let [identity, setting, outside] = [Use::Identity, Use::Setting, Use::Outside].map(mask);
        Ok(Self { slots, len, identity, setting, outside })
    }

    /// Bytes of a record.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies the fields of one structure, whose address is in `base`, to a record on the stack.
    pub(super) fn copy(&self, a: &mut Assembler, source: usize, base: u8, record: i16) {
        for slot in self.slots.iter().filter(|s| s.source == source) {
            let size = match slot.member.size {
                1 => Size::Byte,
                2 => Size::Half,
                4 => Size::Word,
                _ => Size::Double,
            };
            for part in (0..slot.member.size).step_by(8) {
                a.load(size, 1, base, (slot.member.offset + part) as i16);
                a.store(size, FP, record + (slot.place + part) as i16, 1);
            }
        }
    }

    /// Zeroes what [`Layout::copy`] leaves of a record on the stack: the verifier demands that all
    /// of it is written, and a program that ran before may have left something.
    pub(super) fn clear(&self, a: &mut Assembler, record: i16) {
        for at in (0..self.len).step_by(8) {
            let word = at..at + 8;
            let copied: usize = (self.slots.iter())
                .map(|s| (s.place + s.member.size).min(word.end).saturating_sub(s.place.max(at)))
                .sum();
            if copied < word.len() {
                a.store_value(Size::Double, FP, record + at as i16, 0);
            }
        }
    }

    /// Of each field: the structure, where it is in that, its bytes, and its place in a record.
    pub(super) fn places(&self) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        self.slots.iter().map(|s| (s.source, s.member.offset, s.member.size, s.place))
    }

    /// Where a field is in its structure.
    pub(super) fn offset(&self, field: usize) -> usize {
        self.slots[field].member.offset
    }

    /// A record from the bytes of one structure; fields of others are zero in it.
    pub(super) fn record(&self, source: usize, structure: &[u8]) -> Vec<u8> {
        let mut record = vec![0; self.len];
        for Slot { place, member, .. } in self.slots.iter().filter(|s| s.source == source) {
            let bytes = &structure[member.offset..member.end()];
            record[*place..*place + member.size].copy_from_slice(bytes);
        }
        record
    }

    /// The value of a field of up to eight bytes.
    pub(super) fn get(&self, record: &[u8], field: usize) -> u64 {
        let Slot { place, member, .. } = self.slots[field];
        member.value_in(&record[place..])
    }

    /// Sets a field of eight bytes.
    pub(super) fn set(&self, record: &mut [u8], field: usize, value: u64) {
        let place = self.slots[field].place;
        record[place..place + 8].copy_from_slice(&value.to_ne_bytes());
    }

    /// The bytes of a field.
    pub(super) fn bytes<'a>(&self, record: &'a [u8], field: usize) -> &'a [u8] {
        let Slot { place, member, .. } = self.slots[field];
        &record[place..place + member.size]
    }

    /// Whether two records are of the same object.
    pub(super) fn same(&self, a: &[u8], b: &[u8]) -> bool {
        agree(a, b, &self.identity)
    }

    /// Whether two records of one object have the same settings.
    pub(super) fn set_alike(&self, a: &[u8], b: &[u8]) -> bool {
        agree(a, b, &self.setting)
    }

    /// Whether two records of one object have the same of what is read from outside.
    pub(super) fn outside_alike(&self, a: &[u8], b: &[u8]) -> bool {
        agree(a, b, &self.outside)
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("eight bytes"))
}

fn agree(a: &[u8], b: &[u8], mask: &[u64]) -> bool {
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0).zip(mask);
    a.len() == b.len()
        && words.fold(0, |differ, ((a, b), mask)| {
            differ | (u64::from_ne_bytes(*a) ^ u64::from_ne_bytes(*b)) & mask
        }) == 0
}
