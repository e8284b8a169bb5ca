//! Which pages were written: the PAGEMAP_SCAN request on /proc/PID/pagemap (kernel 6.7 and
//! later, Documentation/admin-guide/mm/pagemap.rst).

use super::error::{SysError, SysResult};
use std::fs::File;
use std::os::fd::AsRawFd;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;

/// The page was written since it was last protected, or never was protected.
pub const WRITTEN: u64 = 1 << 1;
/// The page belongs to a file (page cache).
pub const FILE: u64 = 1 << 2;
/// The page is in memory.
pub const PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub const SWAPPED: u64 = 1 << 4;
/// The page is the shared zero page.
pub const PFNZERO: u64 = 1 << 5;

/// A run of pages with the same categories; struct page_region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// Categories (of those asked for).
    pub categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);

/// How a scan ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// The whole range was scanned.
    Complete,
    /// A mapping that is not registered for write protection begins here; what lies before it
    /// was scanned, protected again and is in the output.
    Unregistered(u64),
}

/// An open /proc/PID/pagemap.
#[derive(Debug)]
pub struct Pagemap {
    pid: i32,
    file: File,
}

impl Pagemap {
    /// Opens it.
    pub fn open(pid: i32) -> SysResult<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file =
            File::open(&path).map_err(|source| SysError { call: "open", object: path, source })?;
        Ok(Self { pid, file })
    }

    /// Appends the runs of written pages in `start..end` to `out` and protects them again, in
    /// one pass: a write after it is seen by the next scan. `returned` are the categories wanted
    /// in the output; WRITTEN alone takes the kernel's fast path.
    pub fn take_written(
        &self,
        start: u64,
        end: u64,
        returned: u64,
        out: &mut Vec<Region>,
    ) -> SysResult<Scan> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: WP_MATCHING | CHECK_WPASYNC,
            start,
            end,
            category_mask: WRITTEN,
            return_mask: returned,
            ..ScanArg::default()
        };
        loop {
            let used = out.len();
            let room = 2048;
            // Zeroed, because a scan that ends with EPERM fills the vector without a count.
            out.resize(used + room, Region::default());
            arg.vec = out[used..].as_mut_ptr() as u64;
            arg.vec_len = room as u64;
            // SAFETY: `vec` and `vec_len` describe the zeroed tail of `out`, which lives on.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            if n >= 0 {
                out.truncate(used + n as usize);
                if arg.walk_end >= end {
                    return Ok(Scan::Complete);
                }
                arg.start = arg.walk_end;
                continue;
            }
            let error = SysError::last("PAGEMAP_SCAN", format!("pid {}", self.pid));
            let filled = out[used..].iter().position(|r| r.end == 0).unwrap_or(room);
            out.truncate(used + filled);
            return match error.code() {
                libc::EPERM => Ok(Scan::Unregistered(arg.walk_end)),
                _ => Err(error),
            };
        }
    }
}
