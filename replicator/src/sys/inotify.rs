//! Watches by number, inotify(7), and files by handle, open_by_handle_at(2).

use super::error::{SysError, SysResult, check};
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// MAX_HANDLE_SZ of name_to_handle_at(2).
const MAX_HANDLE: usize = 128;

/// struct file_handle with its bytes.
#[repr(C)]
struct Handle {
    len: u32,
    kind: i32,
    bytes: [u8; MAX_HANDLE],
}

/// An instance without watches, close-on-exec and non-blocking.
pub fn new() -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    let fd = check(fd.into(), "inotify_init1", || "a new instance".into())?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Adds a watch; gives its number.
pub fn add(fd: BorrowedFd<'_>, path: &str, mask: u32) -> SysResult<i32> {
    let text =
        CString::new(path).map_err(|_| SysError::errno("inotify_add_watch", path, libc::EINVAL))?;
    // SAFETY: the path ends with zero.
    let wd = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), text.as_ptr(), mask) };
    check(wd.into(), "inotify_add_watch", || path.into()).map(|wd| wd as i32)
}

/// Takes a watch away.
pub fn remove(fd: BorrowedFd<'_>, wd: i32) -> SysResult<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::inotify_rm_watch(fd.as_raw_fd(), wd) };
    check(r.into(), "inotify_rm_watch", || format!("watch {wd}")).map(drop)
}

/// Opens a file (O_PATH) by its handle; `mount` is any file of its file system.
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, bytes: &[u8]) -> SysResult<OwnedFd> {
    let mut handle = Handle { len: bytes.len() as u32, kind, bytes: [0; MAX_HANDLE] };
    let what = || format!("a handle of type {kind}, {} bytes", bytes.len());
    let room = handle.bytes.get_mut(..bytes.len());
    let room = room.ok_or_else(|| SysError::errno("open_by_handle_at", what(), libc::EINVAL))?;
    room.copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the kernel reads as many bytes of the handle as it says.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut handle, flags)
    };
    let fd = check(fd, "open_by_handle_at", what)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
