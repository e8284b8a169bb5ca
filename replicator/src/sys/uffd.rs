//! Asynchronous write protection by userfaultfd(2), on a descriptor that belongs to another
//! process's address space (made there, duplicated here).

use super::error::{SysError, SysResult};
use std::os::fd::{AsRawFd, BorrowedFd};

/// UFFD_USER_MODE_ONLY: allowed for every process, and asynchronous write protection needs no
/// more.
pub const USER_MODE_ONLY: u64 = 1;

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Switches a new userfaultfd to asynchronous write protection.
pub fn enable_async_wp(fd: BorrowedFd<'_>) -> SysResult<()> {
    let features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM;
    let mut arg = ApiArg { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the request reads and writes one struct uffdio_api.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut arg) } {
        0 => Ok(()),
        _ => Err(SysError::last("UFFDIO_API with WP_ASYNC", "userfaultfd")),
    }
}

/// Registers a mapping for write protection. EINVAL: a mapping of the kernel's own; EPERM: a
/// shared mapping of a file opened read-only, in which nothing can be written.
pub fn register(fd: BorrowedFd<'_>, start: u64, end: u64) -> SysResult<()> {
    let mut arg = RegisterArg { start, len: end - start, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the request reads and writes one struct uffdio_register.
    match unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &mut arg) } {
        0 => Ok(()),
        _ => Err(SysError::last("UFFDIO_REGISTER", format!("{start:#x}-{end:#x}"))),
    }
}
