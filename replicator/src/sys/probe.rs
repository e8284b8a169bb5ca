//! Trying what the kernel can do, on objects of this process alone, for `nilicon doctor`.

use super::error::{SysError, SysResult, check};
use super::{mount, pagemap, sockopt, uffd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

/// Whether a userfaultfd(2) with asynchronous write protection can be made (kernel 6.7).
///
/// # Errors
/// It cannot; the call that was refused says why.
pub fn async_write_protection() -> SysResult<()> {
    own_uffd().map(drop)
}

/// A userfaultfd of this process itself, with asynchronous write protection.
pub(crate) fn own_uffd() -> SysResult<OwnedFd> {
    let flags = libc::O_CLOEXEC as u64 | uffd::USER_MODE_ONLY;
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }, "userfaultfd", || {
        "a new descriptor".to_owned()
    })?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    uffd::enable_async_wp(fd.as_fd())?;
    Ok(fd)
}

/// Whether written pages can be asked for (PAGEMAP_SCAN, kernel 6.7).
///
/// # Errors
/// They cannot.
pub fn pagemap_scan() -> SysResult<()> {
    // The first page is never mapped: nothing is found, and nothing is changed.
    let page = 4096;
    let map = pagemap::Pagemap::open(std::process::id() as i32)?;
    let mut buffer = pagemap::Buffer::default();
    map.take_written(0, page, pagemap::WRITTEN, &mut buffer, &mut Vec::new()).map(|_| ())
}

/// Whether a TCP socket can be put into repair mode.
///
/// # Errors
/// It cannot, or there are no TCP sockets at all.
pub fn tcp_repair() -> SysResult<()> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| super::SysError::errno("socket", "AF_INET", errno as i32))?;
    sockopt::set_i32(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
}

/// Whether a file system can be served by this process, and its connection be ended.
///
/// # Errors
/// There is no FUSE, or no right to it.
pub fn fuse() -> SysResult<()> {
    let path = "/dev/fuse";
    let opened = std::fs::File::options().read(true).write(true).open(path);
    opened.map_err(|source| SysError { call: "open", object: path.to_owned(), source })?;
    mount::Setup::begin("fuse")?;
    mount::Setup::begin("fusectl").map(drop)
}

/// Whether an overlay takes its layers as descriptors (kernel 6.13).
///
/// # Errors
/// It does not, or there are no overlays.
pub fn layers_by_descriptor() -> SysResult<()> {
    let setup = mount::Setup::begin("overlay")?;
    let root = std::fs::File::open("/").map_err(|source| SysError {
        call: "open",
        object: "/".to_owned(),
        source,
    })?;
    setup.file("lowerdir+", root.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_can_do_it() {
        async_write_protection().unwrap();
        pagemap_scan().unwrap();
        tcp_repair().unwrap();
    }
}
