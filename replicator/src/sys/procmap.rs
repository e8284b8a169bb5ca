//! The mappings of a process: the PROCMAP_QUERY request on /proc/PID/maps (kernel 6.11 and
//! later), for a cheap look at whether anything changed.

use super::error::{SysError, SysResult};
use std::fs::File;
use std::os::fd::AsRawFd;

const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
const COVERING_OR_NEXT: u64 = 0x10;

#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<Query>() == 104);

/// What identifies a mapping, without its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// 1 readable, 2 writable, 4 executable; more where more is known.
    pub flags: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Inode of the file, 0 for none.
    pub inode: u64,
    /// What stands for the userfaultfd that watches it; 0: none, or not known.
    pub watcher: u64,
}

/// An open /proc/PID/maps.
#[derive(Debug)]
pub struct ProcMap {
    pid: i32,
    file: File,
}

impl ProcMap {
    /// Opens it.
    pub fn open(pid: i32) -> SysResult<Self> {
        let path = format!("/proc/{pid}/maps");
        let file =
            File::open(&path).map_err(|source| SysError { call: "open", object: path, source })?;
        Ok(Self { pid, file })
    }

    /// Replaces the contents of `out` by all mappings in order of address.
    pub fn list(&self, out: &mut Vec<Extent>) -> SysResult<()> {
        out.clear();
        let mut from = 0;
        while let Some(extent) = self.next(from)? {
            out.push(extent);
            from = extent.end;
        }
        Ok(())
    }

    /// The mapping that covers an address, or the first one behind it.
    pub fn next(&self, address: u64) -> SysResult<Option<Extent>> {
        let mut q = Query {
            size: size_of::<Query>() as u64,
            query_flags: COVERING_OR_NEXT,
            query_addr: address,
            ..Query::default()
        };
        // SAFETY: the request reads and writes one struct procmap_query.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), PROCMAP_QUERY, &mut q) } < 0 {
            let error = SysError::last("PROCMAP_QUERY", format!("pid {}", self.pid));
            return if error.code() == libc::ENOENT { Ok(None) } else { Err(error) };
        }
        Ok(Some(Extent {
            start: q.vma_start,
            end: q.vma_end,
            flags: q.vma_flags & 15,
            offset: q.vma_offset,
            inode: q.inode,
            watcher: 0,
        }))
    }
}
