//! Shared anonymous memory with a descriptor: mapped for a moment, and opened by way of
//! /proc/self/map_files (which takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN).

use super::error::{SysError, SysResult};
use std::fs::{File, OpenOptions};

/// New shared anonymous memory of this length, as mmap(2) with MAP_SHARED and MAP_ANONYMOUS
/// makes it.
pub fn anonymous(len: u64) -> SysResult<File> {
    let len = (len as usize).next_multiple_of(4096).max(4096);
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice, which nothing refers to.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(SysError::last("mmap", format!("{len} bytes of shared memory")));
    }
    let start = at as usize;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + len);
    let file = OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: exactly the mapping made above, which nothing refers to.
    unsafe { libc::munmap(at, len) };
    file.map_err(|source| SysError { call: "open", object: path, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    #[test]
    fn it_can_be_written_and_has_its_length() {
        let file = super::anonymous(10_000).expect("memory");
        assert_eq!(file.metadata().expect("stat").len(), 12_288);
        file.write_all_at(b"here", 8192).expect("written");
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 8192).expect("read");
        assert_eq!(&back, b"here");
    }
}
