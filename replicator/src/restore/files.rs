//! Named pipes, inotify instances, handles of processes and namespaces.

use super::error::sys;
use super::objects::Place;
use crate::image::files::Watch;
use crate::sys::{SysError, SysResult, inotify, pidfd};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, OwnedFd};

/// Opens a named pipe without waiting for the other side.
pub(super) fn fifo(path: &str, flags: i32, place: &Place) -> SysResult<OwnedFd> {
    let outside = format!("/proc/{}/root{path}", place.init);
    let flags = flags & libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let flags = OFlag::from_bits_retain(flags);
    sys(open(outside.as_str(), flags, Mode::empty()), "open", || path.to_owned())
}

/// An inotify instance whose watches have the numbers that they had.
pub(super) fn instance(watches: &[Watch], place: &Place) -> SysResult<OwnedFd> {
    let fd = inotify::new()?;
    for watch in watches {
        let outside = format!("/proc/{}/root{}", place.init, watch.path);
        let mask = watch.mask | libc::IN_DONT_FOLLOW;
        loop {
            let number = inotify::add(fd.as_fd(), &outside, mask)?;
            if number == watch.number {
                break;
            }
            if number > watch.number {
                let what = format!("{} as watch {}", watch.path, watch.number);
                return Err(SysError::errno("inotify_add_watch", what, libc::EEXIST));
            }
            inotify::remove(fd.as_fd(), number)?;
        }
        drain(&fd)?;
    }
    drain(&fd)?;
    // Whether it blocks is set with the other flags.
    sys(fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())), "F_SETFL", || "inotify".into())?;
    Ok(fd)
}

/// Takes away what the watches that only counted have left (IN_IGNORED).
fn drain(fd: &OwnedFd) -> SysResult<()> {
    let mut buffer = [0; 4096];
    loop {
        match nix::unistd::read(fd, &mut buffer) {
            Err(nix::Error::EAGAIN) => return Ok(()),
            other => sys(other, "read", || "inotify".into())?,
        };
    }
}

/// A handle of a process of the container; 0: of one that has ended.
pub(super) fn handle(pid: i32, place: &Place) -> SysResult<OwnedFd> {
    if pid != 0 {
        let host = place.hosts.get(&pid).copied();
        let object = || format!("pid {pid}");
        return pidfd::open(host.ok_or_else(|| SysError::errno("search", object(), libc::ESRCH))?);
    }
    let failed = |call| move |source| SysError { call, object: "true".into(), source };
    let mut child = std::process::Command::new("true")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .map_err(failed("spawn"))?;
    let handle = pidfd::open(child.id() as i32);
    child.wait().map_err(failed("wait"))?;
    handle
}

/// A namespace of a process of the container.
pub(super) fn namespace(pid: i32, name: &str, flags: i32, place: &Place) -> SysResult<OwnedFd> {
    let host = place.hosts.get(&pid).copied().unwrap_or(place.init);
    let flags = OFlag::from_bits_retain(flags & libc::O_ACCMODE | libc::O_CLOEXEC);
    let path = format!("/proc/{host}/ns/{name}");
    sys(open(path.as_str(), flags, Mode::empty()), "open", || path.clone())
}
