//! Another process's memory: process_vm_readv(2), process_vm_writev(2), /proc/PID/mem.

use super::error::{SysError, SysResult};
use libc::{c_void, iovec};
use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;

/// The kernel's limit of segments in one call (UIO_MAXIOV).
const MAX_SEGMENTS: usize = 1024;

/// A range of another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: usize,
}

fn short(call: &'static str, pid: i32, at: u64) -> SysError {
    SysError::errno(call, format!("pid {pid} near {at:#x}"), libc::EFAULT)
}

/// Reads `buf.len()` bytes at `address`.
pub fn read(pid: i32, address: u64, buf: &mut [u8]) -> SysResult<()> {
    let len = buf.len();
    read_vectored(pid, &[Range { start: address, len }], buf)
}

/// Segments of one call. Most calls have few of the most that there can be, so none is written ahead.
type Segments = [MaybeUninit<iovec>; MAX_SEGMENTS];

const fn no_segments() -> Segments {
    [const { MaybeUninit::uninit() }; MAX_SEGMENTS]
}

/// Describes these ranges, at most [`MAX_SEGMENTS`]; gives their bytes.
fn describe(ranges: &[Range], segments: &mut Segments) -> usize {
    let mut total = 0;
    for (slot, range) in segments.iter_mut().zip(ranges) {
        slot.write(iovec { iov_base: range.start as *mut c_void, iov_len: range.len });
        total += range.len;
    }
    total
}

/// Reads several ranges into one buffer, one after the other. `buf` must be exactly as long as
/// all ranges together.
pub fn read_vectored(pid: i32, ranges: &[Range], buf: &mut [u8]) -> SysResult<()> {
    let len = buf.len();
    // SAFETY: the bytes are initialised, and only ever written to through this.
    let buf = unsafe { std::slice::from_raw_parts_mut(buf.as_mut_ptr().cast(), len) };
    read_into(pid, ranges, buf)
}

/// Reads several ranges, one after the other, to the end of a buffer, which is as before if that fails.
pub fn read_appended(pid: i32, ranges: &[Range], out: &mut Vec<u8>) -> SysResult<()> {
    let (used, total) = (out.len(), ranges.iter().map(|r| r.len).sum());
    out.reserve(total);
    read_into(pid, ranges, &mut out.spare_capacity_mut()[..total])?;
    // SAFETY: the kernel has written these bytes behind the ones that were there.
    unsafe { out.set_len(used + total) };
    Ok(())
}

/// All of `buf` is written if that is well.
fn read_into(pid: i32, ranges: &[Range], buf: &mut [MaybeUninit<u8>]) -> SysResult<()> {
    assert_eq!(ranges.iter().map(|r| r.len).sum::<usize>(), buf.len());
    let mut remote = no_segments();
    let mut rest = buf;
    for chunk in ranges.chunks(MAX_SEGMENTS) {
        let total = describe(chunk, &mut remote);
        let (now, later) = rest.split_at_mut(total);
        rest = later;
        let local = iovec { iov_base: now.as_mut_ptr().cast(), iov_len: now.len() };
        // SAFETY: `local` describes `now`, which is ours and writable; the first remote segments were
        // written, and are addresses of another process, which the kernel checks.
        let n = unsafe {
            libc::process_vm_readv(pid, &local, 1, remote.as_ptr().cast(), chunk.len() as u64, 0)
        };
        if n < 0 {
            return Err(SysError::last("process_vm_readv", format!("pid {pid}")));
        }
        if n as usize != total {
            return Err(short("process_vm_readv", pid, chunk[0].start));
        }
    }
    Ok(())
}

/// Writes `buf` at `address`; the pages must be writable for the process.
pub fn write(pid: i32, address: u64, buf: &[u8]) -> SysResult<()> {
    write_vectored(pid, &[Range { start: address, len: buf.len() }], buf)
}

/// Writes one buffer into several ranges, one after the other. `buf` must be exactly as long as
/// all ranges together, and the pages writable for the process.
pub fn write_vectored(pid: i32, ranges: &[Range], buf: &[u8]) -> SysResult<()> {
    debug_assert_eq!(ranges.iter().map(|r| r.len).sum::<usize>(), buf.len());
    let mut remote = no_segments();
    let mut rest = buf;
    for chunk in ranges.chunks(MAX_SEGMENTS) {
        let total = describe(chunk, &mut remote);
        let (now, later) = rest.split_at(total);
        rest = later;
        let local = iovec { iov_base: now.as_ptr() as *mut c_void, iov_len: now.len() };
        // SAFETY: `local` describes `now`, which the kernel only reads; the first remote segments were
        // written, and are addresses of another process, which the kernel checks.
        let n = unsafe {
            libc::process_vm_writev(pid, &local, 1, remote.as_ptr().cast(), chunk.len() as u64, 0)
        };
        if n < 0 {
            return Err(SysError::last("process_vm_writev", format!("pid {pid}")));
        }
        if n as usize != total {
            return Err(short("process_vm_writev", pid, chunk[0].start));
        }
    }
    Ok(())
}

/// Writes several buffers, each to its own address, in order; the pages must be writable for the
/// process.
pub fn write_scattered(pid: i32, pieces: &[(u64, &[u8])]) -> SysResult<()> {
    let (mut local, mut remote) = (no_segments(), no_segments());
    for chunk in pieces.chunks(MAX_SEGMENTS) {
        let mut total = 0;
        for ((here, there), (address, bytes)) in local.iter_mut().zip(&mut remote).zip(chunk) {
            here.write(iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: bytes.len() });
            there.write(iovec { iov_base: *address as *mut c_void, iov_len: bytes.len() });
            total += bytes.len();
        }
        let count = chunk.len() as u64;
        // SAFETY: the first `count` segments of either were written; the local ones describe slices of `pieces`, which the kernel
        // only reads; the remote segments are addresses of another process, which it checks.
        let n = unsafe {
            libc::process_vm_writev(
                pid,
                local.as_ptr().cast(),
                count,
                remote.as_ptr().cast(),
                count,
                0,
            )
        };
        if n < 0 {
            return Err(SysError::last("process_vm_writev", format!("pid {pid}")));
        }
        if n as usize != total {
            return Err(short("process_vm_writev", pid, chunk[0].0));
        }
    }
    Ok(())
}

/// /proc/PID/mem, which writes to read-only private pages too (the kernel's FOLL_FORCE).
#[derive(Debug)]
pub struct ForcedMemory {
    pid: i32,
    file: File,
}

impl ForcedMemory {
    /// Opens it. The process must be traced by the caller to be written to.
    pub fn open(pid: i32) -> SysResult<Self> {
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| SysError { call: "open", object: path, source })?;
        Ok(Self { pid, file })
    }

    /// Writes at an address, whatever the protection of a private mapping there.
    pub fn write(&self, address: u64, buf: &[u8]) -> SysResult<()> {
        self.file.write_all_at(buf, address).map_err(|source| SysError {
            call: "pwrite /proc/PID/mem",
            object: format!("pid {} at {address:#x}", self.pid),
            source,
        })
    }

    /// Reads at an address, whatever the protection.
    pub fn read(&self, address: u64, buf: &mut [u8]) -> SysResult<()> {
        self.file.read_exact_at(buf, address).map_err(|source| SysError {
            call: "pread /proc/PID/mem",
            object: format!("pid {} at {address:#x}", self.pid),
            source,
        })
    }
}
