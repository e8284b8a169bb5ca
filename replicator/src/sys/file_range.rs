//! Dirty pages of a file in the page cache.

use super::{SysError, SysResult};
use std::fs::File;
use std::os::fd::AsRawFd;

/// Has what is dirty written to the file system, and waits until it has it. What a disk has not yet is another matter.
/// sync_file_range(2)
pub fn write_back(file: &File) -> SysResult<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no pointers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) } {
        0 => Ok(()),
        _ => Err(SysError::last("sync_file_range", "a file that is mapped")),
    }
}
