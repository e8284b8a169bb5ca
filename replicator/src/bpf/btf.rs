//! What the kernel says of itself (BTF): numbers of its functions, and where the fields of its
//! structures lie.

use std::io;

/// Where a kernel with CONFIG_DEBUG_INFO_BTF shows it.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_POINTER: u32 = 2;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC: u32 = 12;

/// The BTF id of a function of the running kernel.
pub(crate) fn function(name: &str) -> io::Result<u32> {
    Btf::of_kernel()?.function(name)
}

/// The type information of a kernel.
#[derive(Debug)]
pub(crate) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins.
    starts: Vec<usize>,
}

/// A field of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Bytes from the beginning of the outermost structure.
    pub(crate) offset: usize,
    /// Bytes. Of a bit field, those that hold its bits.
    pub(crate) size: usize,
    /// Of a bit field, the first bit within these bytes and the number of bits.
    pub(crate) bits: Option<(u32, u32)>,
    /// It is an address.
    pub(crate) pointer: bool,
}

impl Member {
    /// Where the field ends.
    pub(crate) fn end(&self) -> usize {
        self.offset + self.size
    }

    /// The value of a field of up to eight bytes, from the bytes of the outermost structure.
    pub(crate) fn value(&self, structure: &[u8]) -> u64 {
        self.value_in(&structure[self.offset..])
    }

    /// The same from bytes that begin with the field.
    pub(crate) fn value_in(&self, field: &[u8]) -> u64 {
        let mut bytes = [0; 8];
        bytes[..self.size].copy_from_slice(&field[..self.size]);
        let value = u64::from_le_bytes(bytes);
        match self.bits {
            None => value,
            Some((first, count)) => value >> first & ((1 << count) - 1),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Header of a type: offset of its name, kind, number of its parts, flag, size or type.
struct Head {
    name: usize,
    kind: u32,
    parts: usize,
    flag: bool,
    size: u32,
}

impl Btf {
    /// That of the running kernel.
    pub(crate) fn of_kernel() -> io::Result<Self> {
        let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's BTF");
        Self::parse(&std::fs::read(VMLINUX)?).ok_or_else(malformed)
    }

    fn parse(btf: &[u8]) -> Option<Self> {
        if btf.get(..2)? != MAGIC.to_ne_bytes() {
            return None;
        }
        let header = word(btf, 4)? as usize;
        let section = |at: usize| {
            let start = header + word(btf, at)? as usize;
            btf.get(start..start + word(btf, at + 4)? as usize)
        };
        let (types, strings) = (section(8)?.to_vec(), section(16)?.to_vec());
        // Type 0 is void and has no header.
        let mut me = Self { types, strings, starts: vec![usize::MAX] };
        let mut at = 0;
        while at + 12 <= me.types.len() {
            me.starts.push(at);
            let head = me.head_at(at)?;
            at += 12 + extra(head.kind, head.parts)?;
        }
        Some(me)
    }

    fn head_at(&self, at: usize) -> Option<Head> {
        let info = word(&self.types, at + 4)?;
        Some(Head {
            name: word(&self.types, at)? as usize,
            kind: info >> 24 & 31,
            parts: (info & 0xffff) as usize,
            flag: info >> 31 != 0,
            size: word(&self.types, at + 8)?,
        })
    }

    fn head(&self, id: u32) -> Option<Head> {
        self.head_at(*self.starts.get(id as usize)?)
    }

    fn is_named(&self, at: usize, name: &str) -> bool {
        // The byte before a name is the end of another.
        let end = at + name.len();
        at > 0
            && self.strings.get(at..end) == Some(name.as_bytes())
            && self.strings.get(end) == Some(&0)
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let is = |&id: &u32| {
            self.head(id).is_some_and(|h| h.kind == kind && self.is_named(h.name, name))
        };
        (1..self.starts.len() as u32).find(is)
    }

    /// The number of the type that stands for a tracepoint.
    pub(crate) fn tracepoint(&self, name: &str) -> io::Result<u32> {
        self.find(KIND_TYPEDEF, &format!("btf_trace_{name}")).ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, format!("this kernel has no event {name}"))
        })
    }

    /// The number of a function.
    pub(crate) fn function(&self, name: &str) -> io::Result<u32> {
        self.find(KIND_FUNC, name).ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, format!("this kernel has no {name}"))
        })
    }

    /// The number of a structure.
    pub(crate) fn structure(&self, name: &str) -> io::Result<u32> {
        self.find(KIND_STRUCT, name).ok_or_else(|| {
            let what = format!("this kernel has no structure {name}");
            io::Error::new(io::ErrorKind::Unsupported, what)
        })
    }

    /// Bytes of a structure.
    pub(crate) fn size_of(&self, name: &str) -> io::Result<usize> {
        let id = self.structure(name)?;
        self.size(id).ok_or_else(|| io::Error::other(format!("{name} has no size")))
    }

    /// A field of a structure, by its path from there: `a.b.c`.
    pub(crate) fn member(&self, of: u32, path: &str) -> io::Result<Member> {
        self.try_member(of, path).ok_or_else(|| {
            let what = format!("a structure of this kernel has no {path}");
            io::Error::new(io::ErrorKind::Unsupported, what)
        })
    }

    fn try_member(&self, mut id: u32, path: &str) -> Option<Member> {
        let (mut at, mut member) = (0, None);
        for name in path.split('.') {
            let (bit, bits, kind) = self.step(id, name)?;
            at += bit;
            id = self.resolve(kind)?;
            member = Some((bits, id));
        }
        let (bits, id) = member?;
        let pointer = self.head(id)?.kind == KIND_POINTER;
        if bits == 0 {
            let size = self.size(id)?;
            return Some(Member { offset: at / 8, size, bits: None, pointer });
        }
        let (first, last) = (at / 8, (at + bits as usize - 1) / 8);
        let bits = Some((at as u32 % 8, bits));
        Some(Member { offset: first, size: last + 1 - first, bits, pointer })
    }

    /// A field within a structure or a union, also of those within it that have no name: its
    /// first bit, the number of its bits if it is a bit field, its type.
    fn step(&self, id: u32, name: &str) -> Option<(usize, u32, u32)> {
        let start = *self.starts.get(id as usize)?;
        let head = self.head_at(start)?;
        if head.kind != KIND_STRUCT && head.kind != KIND_UNION {
            return None;
        }
        for part in 0..head.parts {
            let at = start + 12 + 12 * part;
            let (named, kind) = (word(&self.types, at)? as usize, word(&self.types, at + 4)?);
            let place = word(&self.types, at + 8)?;
            let (bit, bits) = if head.flag { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            if self.is_named(named, name) {
                return Some((bit as usize, bits, kind));
            }
            if named == 0
                && let Some((inner, bits, kind)) =
                    self.resolve(kind).and_then(|id| self.step(id, name))
            {
                return Some((bit as usize + inner, bits, kind));
            }
        }
        None
    }

    /// The type behind names and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<u32> {
        loop {
            let head = self.head(id)?;
            match head.kind {
                8..=11 | 18 => id = head.size,
                _ => return Some(id),
            }
        }
    }

    fn size(&self, id: u32) -> Option<usize> {
        let head = self.head(self.resolve(id)?)?;
        Some(match head.kind {
            KIND_POINTER => 8,
            // An array: the type of its elements, of its index, their number.
            3 => {
                let at = self.starts[self.resolve(id)? as usize] + 12;
                self.size(word(&self.types, at)?)? * word(&self.types, at + 8)? as usize
            }
            1 | KIND_STRUCT | KIND_UNION | 6 | 19 => head.size as usize,
            _ => return None,
        })
    }
}

/// Bytes that follow the header of a type (kernel documentation, bpf/btf).
fn extra(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        1 | 14 | 17 => 4,
        3 => 12,
        4 | 5 | 15 | 19 => 12 * members,
        6 | 13 => 8 * members,
        0 | 2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        btf.extend(header.iter().flat_map(|w| w.to_ne_bytes()));
        btf.extend(&types);
        btf.extend(strings);
        btf
    }

    #[test]
    fn functions_are_found_by_their_whole_name() {
        let mut types: Vec<u32> = Vec::new();
        types.extend([1, 1 << 24, 4, 32]); // int
        types.extend([0, 13 << 24 | 1, 1, 0, 1]); // a prototype with one parameter
        types.extend([5, 12 << 24, 2]); // tcp_open
        types.extend([14, 12 << 24, 2]); // open
        let bytes = build(&types, b"\0int\0tcp_open\0open\0");
        let btf = Btf::parse(&bytes).expect("well formed");
        assert_eq!(btf.function("open").ok(), Some(4));
        assert_eq!(btf.function("tcp_open").ok(), Some(3));
        assert!(btf.function("pen").is_err());
        assert!(btf.function("int").is_err(), "not a function");
        for len in 0..bytes.len() {
            Btf::parse(&bytes[..len]).map(|b| b.function("none"));
        }
    }

    #[test]
    fn fields_are_found_in_parts_without_a_name_too() {
        let strings = b"\0int\0a\0b\0c\0outer\0inner\0";
        // int; union { int b; }; struct inner { int a; int c:3; }; struct outer { int a; union; inner; }
        let mut types: Vec<u32> = Vec::new();
        types.extend([1, 1 << 24, 4, 32]);
        types.extend([0, 5 << 24 | 1, 4, 7, 1, 0]);
        types.extend([17, 1 << 31 | 4 << 24 | 2, 8, 5, 1, 0, 9, 1, 3 << 24 | 34]);
        types.extend([11, 4 << 24 | 3, 16, 5, 1, 0, 0, 2, 32, 17, 3, 64]);
        let btf = Btf::parse(&build(&types, strings)).expect("well formed");
        let plain = |offset| Member { offset, size: 4, bits: None, pointer: false };
        let outer = btf.structure("outer").expect("there");
        assert_eq!(btf.member(outer, "a").expect("there"), plain(0));
        assert_eq!(btf.member(outer, "b").expect("there"), plain(4));
        assert_eq!(btf.member(outer, "inner.a").expect("there"), plain(8));
        let bits = Member { offset: 12, size: 1, bits: Some((2, 3)), pointer: false };
        assert_eq!(btf.member(outer, "inner.c").expect("there"), bits);
        assert_eq!(bits.value(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0b0001_0111, 0, 0, 0]), 0b101);
        assert_eq!(btf.size_of("outer").expect("there"), 16);
        assert!(btf.member(outer, "c").is_err());
        assert!(btf.structure("nothing").is_err());
    }
}
