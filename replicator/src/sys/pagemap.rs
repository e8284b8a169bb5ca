//! Which pages were written: the PAGEMAP_SCAN request on /proc/PID/pagemap (kernel 6.7 and
//! later, Documentation/admin-guide/mm/pagemap.rst).

use super::error::{SysError, SysResult};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

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
/// The page is a guard (MADV_GUARD_INSTALL). Kernel 6.16.
const GUARD: u64 = 1 << 8;
/// The same in an entry of the file itself (PM_GUARD_REGION). Kernel 6.15.
const GUARD_BIT: u64 = 1 << 58;
const PAGE: u64 = 4096;
/// Entries of the file read at a time.
const ENTRIES: usize = 4096;

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

/// Regions that one request finds at most.
const ROOM: usize = 2048;

/// Where the kernel writes what it finds.
#[derive(Debug)]
pub struct Buffer {
    /// All zero between scans.
    found: Vec<Region>,
}

impl Default for Buffer {
    fn default() -> Self {
        Self { found: vec![Region::default(); ROOM] }
    }
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
        buffer: &mut Buffer,
        out: &mut Vec<Region>,
    ) -> SysResult<Scan> {
        self.scan(start, end, (WP_MATCHING | CHECK_WPASYNC, returned), buffer, out)
    }

    /// The same, but leaves them as they are, for the next scan to find them as well.
    pub fn see_written(
        &self,
        start: u64,
        end: u64,
        buffer: &mut Buffer,
        out: &mut Vec<Region>,
    ) -> SysResult<Scan> {
        self.scan(start, end, (CHECK_WPASYNC, WRITTEN), buffer, out)
    }

    fn scan(
        &self,
        start: u64,
        end: u64,
        (flags, returned): (u64, u64),
        buffer: &mut Buffer,
        out: &mut Vec<Region>,
    ) -> SysResult<Scan> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start,
            end,
            category_mask: WRITTEN,
            return_mask: returned,
            ..ScanArg::default()
        };
        loop {
            arg.vec = buffer.found.as_mut_ptr() as u64;
            arg.vec_len = ROOM as u64;
            // SAFETY: `vec` and `vec_len` describe the buffer's regions, which live on.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            let error =
                (n < 0).then(|| SysError::last("PAGEMAP_SCAN", format!("pid {}", self.pid)));
            // A scan that ends with EPERM fills the vector without a count.
            let filled = match usize::try_from(n) {
                Ok(n) => n,
                Err(_) => buffer.found.iter().position(|r| r.end == 0).unwrap_or(ROOM),
            };
            out.extend_from_slice(&buffer.found[..filled]);
            buffer.found[..filled].fill(Region::default());
            match error {
                None if arg.walk_end >= end => return Ok(Scan::Complete),
                None => arg.start = arg.walk_end,
                Some(e) if e.code() == libc::EPERM => {
                    return Ok(Scan::Unregistered(arg.walk_end));
                }
                Some(e) => return Err(e),
            }
        }
    }

    /// Appends the guard regions in `start..end` to `out`, as far as the kernel tells of them.
    pub fn guards(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> SysResult<()> {
        let (mut regions, what) = ([Region::default(); 64], (GUARD, GUARD));
        let seen = self.find((start, end), what, &mut regions, |r| out.push((r.start, r.end)));
        match seen {
            Err((at, e)) if e.code() == libc::EINVAL => self.guards_by_entry(at, end, out),
            other => other.map_err(|(_, e)| e),
        }
    }

    /// Appends the runs of pages in `start..end` that are in memory or in swap to `out`, the shared zero page left out.
    pub fn present(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> SysResult<()> {
        let (mut regions, what) = ([Region::default(); 64], (PRESENT | SWAPPED, PFNZERO));
        let add = |r: &Region| {
            if r.categories == 0 {
                out.push((r.start, r.end));
            }
        };
        self.find((start, end), what, &mut regions, add).map_err(|(_, e)| e)
    }

    /// Gives the runs of pages with one of these categories, each with those of the others that it has. An error
    /// comes with where the scan was.
    fn find(
        &self,
        (start, end): (u64, u64),
        (any, told): (u64, u64),
        regions: &mut [Region],
        found: impl FnMut(&Region),
    ) -> Result<(), (u64, SysError)> {
        let mut found = found;
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end,
            category_anyof_mask: any,
            return_mask: told,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            ..ScanArg::default()
        };
        while arg.start < end {
            // SAFETY: `vec` and `vec_len` describe `regions`, which lives on.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            if n < 0 {
                let error = SysError::last("PAGEMAP_SCAN", format!("pid {}", self.pid));
                return Err((arg.start, error));
            }
            regions[..n as usize].iter().for_each(&mut found);
            arg.start = arg.walk_end;
        }
        Ok(())
    }

    /// The same for a kernel that cannot scan for them.
    fn guards_by_entry(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> SysResult<()> {
        let mut bytes = vec![0; ENTRIES * 8];
        let mut at = start;
        while at < end {
            let wanted = ((end - at) / PAGE).min(ENTRIES as u64) as usize * 8;
            let n = self.file.read_at(&mut bytes[..wanted], at / PAGE * 8).map_err(|source| {
                SysError { call: "read", object: format!("/proc/{}/pagemap", self.pid), source }
            })?;
            if n < 8 {
                return Ok(());
            }
            for entry in bytes[..n].as_chunks().0 {
                if u64::from_ne_bytes(*entry) & GUARD_BIT != 0 {
                    match out.last_mut() {
                        Some((_, last)) if *last == at => *last += PAGE,
                        _ => out.push((at, at + PAGE)),
                    }
                }
                at += PAGE;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_are_found_in_either_way() {
        const LEN: usize = 300 * PAGE as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping of our own, which nothing else refers to.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let start = at as u64;
        let mut wanted = Vec::new();
        for page in (3..290).step_by(2) {
            let guard = start + page * PAGE;
            // SAFETY: a page of that mapping; MADV_GUARD_INSTALL makes it fault.
            let done = unsafe { libc::madvise(guard as *mut libc::c_void, PAGE as usize, 102) };
            if done != 0 {
                println!("skipped: this kernel has no guard regions");
                return;
            }
            wanted.push((guard, guard + PAGE));
        }
        let pagemap = Pagemap::open(std::process::id() as i32).expect("pagemap");
        let (mut scanned, mut read) = (Vec::new(), Vec::new());
        let end = start + LEN as u64;
        pagemap.guards(start, end, &mut scanned).expect("scanned");
        pagemap.guards_by_entry(start, end, &mut read).expect("read");
        assert_eq!(scanned, wanted);
        assert_eq!(read, wanted);
    }
}
