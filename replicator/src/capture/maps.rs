//! /proc/PID/maps as mappings of the image.

use super::memory::is_scratch;
use crate::image::{Mapping, Source, VdsoPart};
use crate::sys::procmap::Extent;
use crate::sys::{SysError, SysResult};
use std::fs;

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub(super) mapping: Mapping,
    /// Why it cannot be part of a checkpoint, if so.
    pub(super) refused: Option<&'static str>,
    vsyscall: bool,
    inode: u64,
}

impl Vma {
    /// Which memory it is that other processes may share.
    pub(super) fn shared_memory(&self) -> Option<u64> {
        (self.mapping.source == Source::SharedAnonymous).then_some(self.inode)
    }

    /// Whether its pages can be written and so must be watched.
    pub(super) fn is_trackable(&self) -> bool {
        !self.vsyscall
            && !matches!(self.mapping.source, Source::Vdso(_))
            && !is_scratch(self.mapping.start, self.mapping.end)
    }

    /// Whether a checkpoint has it.
    pub(super) fn is_part_of_image(&self) -> bool {
        !self.vsyscall && !is_scratch(self.mapping.start, self.mapping.end)
    }

    pub(super) fn is_shared_file(&self) -> bool {
        matches!(self.mapping.source, Source::File { shared: true, .. })
    }
}

/// Reads all mappings of a process.
pub(super) fn read(pid: i32) -> SysResult<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read(&path).map_err(|source| SysError {
        call: "read",
        object: path.clone(),
        source,
    })?;
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .map(|l| parse(l).ok_or_else(|| SysError::errno("parse", path.clone(), libc::EINVAL)))
        .collect()
}

/// Whether two ways of asking for the mappings gave the same answer.
pub(super) fn agree(vmas: &[Vma], extents: &[Extent]) -> bool {
    // The page of vsyscall is the same everywhere and belongs to no process.
    let mut vmas = vmas.iter().filter(|v| !v.vsyscall);
    let mut extents = extents.iter();
    loop {
        match (vmas.next(), extents.next()) {
            (Some(vma), Some(extent)) => {
                let Mapping { start, end, prot, .. } = vma.mapping;
                if (start, end, u64::from(prot)) != (extent.start, extent.end, extent.flags & 7) {
                    return false;
                }
            }
            (None, None) => return true,
            _ => return false,
        }
    }
}

fn parse(line: &str) -> Option<Vma> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let _device = fields.next()?;
    let inode: u64 = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim_start();
    let prot = u8::from(rights[0] == b'r')
        | u8::from(rights[1] == b'w') << 1
        | u8::from(rights[2] == b'x') << 2;
    let shared = rights[3] == b's';
    let mut refused = None;
    let source = match name {
        "[vdso]" => Source::Vdso(VdsoPart::Vdso),
        "[vvar]" => Source::Vdso(VdsoPart::Vvar),
        "[vvar_vclock]" => Source::Vdso(VdsoPart::VvarVclock),
        "/dev/zero (deleted)" if shared => Source::SharedAnonymous,
        _ if inode != 0 => {
            if name.ends_with(" (deleted)") {
                refused = Some("a mapped file that was deleted, or memory shared by descriptor");
            } else if shared && prot & 2 != 0 {
                refused = Some("a file mapped shared and writable");
            }
            Source::File { path: unescape(name), offset, shared }
        }
        _ => Source::Anonymous,
    };
    Some(Vma {
        mapping: Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            prot,
            grows_down: name == "[stack]",
            source,
            fresh: false,
        },
        refused,
        vsyscall: name == "[vsyscall]",
        inode,
    })
}

/// The kernel writes a line feed in a path as \012.
fn unescape(path: &str) -> String {
    path.replace("\\012", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let v =
            parse("55d0c000-55d0d000 r-xp 00001000 fd:00 1234                       /usr/bin/x")
                .expect("a file");
        assert_eq!((v.mapping.start, v.mapping.end, v.mapping.prot), (0x55d0c000, 0x55d0d000, 5));
        assert!(
            matches!(v.mapping.source, Source::File { ref path, offset: 0x1000, shared: false } if path == "/usr/bin/x")
        );
        let v = parse("7ffd0000-7ffd2000 rw-p 00000000 00:00 0                          [stack]")
            .expect("a stack");
        assert!(v.mapping.grows_down && v.mapping.source == Source::Anonymous);
        let v = parse("7000-8000 rw-s 00000000 00:01 55   /memfd:x (deleted)").expect("memfd");
        assert!(v.refused.is_some());
        assert!(parse("garbage").is_none());
    }

    #[test]
    fn a_mapping_that_grew_between_two_looks_shows() {
        let text = ["1000-3000 rw-p 00000000 00:00 0", "3000-9000 ---p 00000000 00:00 0"];
        let vmas: Vec<Vma> = text.iter().filter_map(|line| parse(line)).collect();
        let extent = |start, end, flags| Extent { start, end, flags, offset: 0, inode: 0 };
        assert!(agree(&vmas, &[extent(0x1000, 0x3000, 3), extent(0x3000, 0x9000, 0)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x4000, 3), extent(0x4000, 0x9000, 0)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x3000, 3), extent(0x3000, 0x9000, 1)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x3000, 3)]));
    }
}
