//! The number of a kernel function, from the kernel's own type information (BTF).

use std::io;

/// Where a kernel with CONFIG_DEBUG_INFO_BTF shows it.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const KIND_FUNC: u32 = 12;

/// The BTF id of a function of the running kernel.
pub(super) fn function(name: &str) -> io::Result<u32> {
    let btf = std::fs::read(VMLINUX)?;
    find(&btf, name).ok_or_else(|| {
        io::Error::new(io::ErrorKind::Unsupported, format!("this kernel has no {name}"))
    })
}

fn find(btf: &[u8], name: &str) -> Option<u32> {
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    if btf.get(..2)? != MAGIC.to_ne_bytes() {
        return None;
    }
    let header = word(btf, 4)? as usize;
    let section = |at: usize| {
        let start = header + word(btf, at)? as usize;
        btf.get(start..start + word(btf, at + 4)? as usize)
    };
    let (types, strings) = (section(8)?, section(16)?);
    let mut wanted = vec![0];
    wanted.extend(name.bytes());
    wanted.push(0);
    let (mut at, mut id) = (0, 0);
    while at + 12 <= types.len() {
        id += 1;
        let (name_at, info) = (word(types, at)? as usize, word(types, at + 4)?);
        let (kind, members) = (info >> 24 & 31, (info & 0xffff) as usize);
        // The byte before a name is the end of another.
        if kind == KIND_FUNC && strings.get(name_at.checked_sub(1)?..)?.starts_with(&wanted) {
            return Some(id);
        }
        at += 12 + extra(kind, members)?;
    }
    None
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

    #[test]
    fn functions_are_found_by_their_whole_name() {
        let strings = b"\0int\0tcp_open\0open\0";
        let mut types: Vec<u32> = Vec::new();
        types.extend([1, 1 << 24, 4, 32]); // int
        types.extend([0, 13 << 24 | 1, 1, 0, 1]); // a prototype with one parameter
        types.extend([5, 12 << 24, 2]); // tcp_open
        types.extend([14, 12 << 24, 2]); // open
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        btf.extend(header.iter().flat_map(|w| w.to_ne_bytes()));
        btf.extend(&types);
        btf.extend(strings);
        assert_eq!(find(&btf, "open"), Some(4));
        assert_eq!(find(&btf, "tcp_open"), Some(3));
        assert_eq!(find(&btf, "pen"), None);
        assert_eq!(find(&btf, "int"), None, "not a function");
        for len in 0..btf.len() {
            find(&btf[..len], "none");
        }
    }
}
