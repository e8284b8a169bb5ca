//! Extended attributes of files by path, never through a last symbolic link: xattr(7).

use super::error::{SysResult, check};
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

fn c(bytes: &[u8]) -> CString {
    // A name with a zero byte is cut there; no file and no attribute has one.
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    CString::new(&bytes[..end]).unwrap_or_default()
}

fn on(path: &Path) -> impl FnOnce() -> String {
    let path = path.display().to_string();
    move || path
}

/// Sets an attribute; `flags` are XATTR_CREATE or XATTR_REPLACE. lsetxattr(2)
pub fn set(path: &Path, name: &OsStr, value: &[u8], flags: i32) -> SysResult<()> {
    let (p, n) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()));
    // SAFETY: two strings that end with zero, and a buffer with its own length.
    let r = unsafe {
        libc::lsetxattr(p.as_ptr(), n.as_ptr(), value.as_ptr().cast(), value.len(), flags)
    };
    check(r.into(), "lsetxattr", on(path)).map(drop)
}

/// The value of an attribute. lgetxattr(2)
pub fn get(path: &Path, name: &OsStr) -> SysResult<Vec<u8>> {
    let (p, n) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()));
    // The largest that the kernel has: XATTR_SIZE_MAX.
    fill(path, "lgetxattr", |buffer| {
        // SAFETY: two strings that end with zero, and a buffer with its own length.
        unsafe { libc::lgetxattr(p.as_ptr(), n.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })
}

/// The names of all attributes. llistxattr(2)
pub fn list(path: &Path) -> SysResult<Vec<OsString>> {
    let p = c(path.as_os_str().as_bytes());
    let all = fill(path, "llistxattr", |buffer| {
        // SAFETY: a string that ends with zero, and a buffer with its own length.
        unsafe { libc::llistxattr(p.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    })?;
    let names = all.split(|b| *b == 0).filter(|n| !n.is_empty());
    Ok(names.map(|n| OsString::from_vec(n.to_vec())).collect())
}

/// Takes an attribute away. lremovexattr(2)
pub fn remove(path: &Path, name: &OsStr) -> SysResult<()> {
    let (p, n) = (c(path.as_os_str().as_bytes()), c(name.as_bytes()));
    // SAFETY: two strings that end with zero.
    let r = unsafe { libc::lremovexattr(p.as_ptr(), n.as_ptr()) };
    check(r.into(), "lremovexattr", on(path)).map(drop)
}

/// Calls with a buffer that is large enough, most often with the first.
fn fill(
    path: &Path,
    call: &'static str,
    mut read: impl FnMut(&mut [u8]) -> isize,
) -> SysResult<Vec<u8>> {
    let mut buffer = vec![0; 256];
    let mut n = check(read(&mut buffer) as i64, call, on(path));
    if n.as_ref().is_err_and(|e| e.code() == libc::ERANGE) {
        buffer.resize(64 << 10, 0);
        n = check(read(&mut buffer) as i64, call, on(path));
    }
    buffer.truncate(n? as usize);
    Ok(buffer)
}
