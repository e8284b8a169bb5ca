//! Descriptors of this process: close_range(2), the tick count of a timerfd, entries of epoll.

use super::error::{SysError, SysResult, check};
use crate::image::EpollTarget;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// TFD_IOC_SET_TICKS of timerfd_create(2).
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// Marks all descriptors from `first` on as close-on-exec.
pub fn close_on_exec_from(first: u32) -> SysResult<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: no pointers; descriptors stay open until an exec, where nobody uses them any more.
    let r = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    check(r, "close_range", || format!("descriptors from {first} on")).map(drop)
}

/// Gives the calling thread a table of descriptors of its own, with nothing in it; other threads keep theirs. For a thread
/// that uses none from then on.
pub fn have_none() -> SysResult<()> {
    let flags = libc::CLOSE_RANGE_UNSHARE;
    // SAFETY: no pointers; the table of the other threads stays as it is, and this one is said to use none.
    let r = unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, flags) };
    check(r, "close_range", || "all descriptors of a thread".into()).map(drop)
}

/// Sets the number of expirations of a timerfd that nobody has read yet (at least 1).
pub fn set_timer_ticks(fd: BorrowedFd<'_>, ticks: u64) -> SysResult<()> {
    // SAFETY: the request reads one u64.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &ticks) };
    check(r.into(), "TFD_IOC_SET_TICKS", || format!("fd {}", fd.as_raw_fd())).map(drop)
}

/// Has a timerfd count the expirations that it owes: after the first one that nobody reads the kernel
/// counts no more, until it is read or asked (`timerfd_gettime(2)`).
pub fn count_expirations(fd: BorrowedFd<'_>) -> SysResult<()> {
    let mut left = std::mem::MaybeUninit::<libc::itimerspec>::uninit();
    // SAFETY: the kernel writes one itimerspec, which nobody reads.
    let r = unsafe { libc::timerfd_gettime(fd.as_raw_fd(), left.as_mut_ptr()) };
    check(r.into(), "timerfd_gettime", || format!("fd {}", fd.as_raw_fd())).map(drop)
}

/// A signalfd for a mask of signals (bit 0: signal 1), close-on-exec.
pub fn signal_fd(mask: u64) -> SysResult<OwnedFd> {
    // SAFETY: the kernel reads one u64.
    let fd = unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), libc::SFD_CLOEXEC)
    };
    let fd = check(fd, "signalfd4", || format!("mask {mask:#x}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs something in a thread with a table of descriptors of its own, a copy of ours: what it does
/// to numbers there is seen by nobody.
pub fn in_table_of_its_own<T: Send>(run: impl FnOnce() -> SysResult<T> + Send) -> SysResult<T> {
    let inside = || {
        // SAFETY: no pointers; no other thread has the new table.
        let r = unsafe { libc::unshare(libc::CLONE_FILES) };
        check(r.into(), "unshare", || "a table of descriptors".into())?;
        run()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("descriptors".into());
        let thread = thread.spawn_scoped(scope, inside).map_err(|source| SysError {
            call: "clone",
            object: "a thread".into(),
            source,
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Adds a file to an epoll instance under the number of `target`, whatever that is here. Only within
/// [`in_table_of_its_own`]: for a moment the number is the file's.
pub fn watch_as(
    epoll: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    target: &EpollTarget,
) -> SysResult<()> {
    let number = target.fd;
    let object = || format!("descriptor {number} in an epoll instance");
    // What has the number here stays open under another.
    // SAFETY: no pointers.
    let aside = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    let at = |fd: BorrowedFd<'_>| match fd.as_raw_fd() {
        it if it == number => aside,
        it => it,
    };
    let (epoll, file) = (at(epoll), at(file));
    // SAFETY: no pointers. The number is nobody else's: the table is this thread's alone.
    let taken = unsafe { libc::dup3(file, number, libc::O_CLOEXEC) };
    let taken = check(taken.into(), "dup3", object);
    let mut event = libc::epoll_event { events: target.events, u64: target.data };
    let added = taken.and_then(|_| {
        // SAFETY: the kernel reads one struct epoll_event.
        let r = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, number, &mut event) };
        check(r.into(), "epoll_ctl", object)
    });
    // SAFETY: no pointers; puts back what was there before.
    unsafe {
        match aside {
            -1 => libc::close(number),
            aside => {
                libc::dup3(aside, number, libc::O_CLOEXEC);
                libc::close(aside)
            }
        }
    };
    added.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// The numbers and data of what an epoll instance watches.
    fn entries(epoll: &OwnedFd) -> Vec<(i32, u64)> {
        let path = format!("/proc/self/fdinfo/{}", epoll.as_raw_fd());
        let text = std::fs::read_to_string(path).expect("fdinfo");
        let entry = |line: &str| {
            let words: Vec<&str> = line.strip_prefix("tfd:")?.split_whitespace().collect();
            Some((words[0].parse().ok()?, u64::from_str_radix(words[4], 16).ok()?))
        };
        let mut all: Vec<(i32, u64)> = text.lines().filter_map(entry).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_file_is_watched_under_any_number_and_the_number_is_as_before() {
        // SAFETY: the kernel gives new descriptors.
        let (epoll, file) = unsafe {
            let epoll = OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC));
            (epoll, OwnedFd::from_raw_fd(libc::eventfd(1, libc::EFD_CLOEXEC)))
        };
        // Its own, that of the instance, one that is free, one of the standard ones.
        let numbers = [file.as_raw_fd(), epoll.as_raw_fd(), 700, 0];
        in_table_of_its_own(|| {
            for (data, fd) in numbers.into_iter().enumerate() {
                let target = EpollTarget { fd, events: libc::EPOLLIN as u32, data: data as u64 };
                watch_as(epoll.as_fd(), file.as_fd(), &target)?;
            }
            Ok(())
        })
        .expect("added");
        let mut wanted: Vec<(i32, u64)> = numbers.into_iter().zip(0..).collect();
        wanted.sort_unstable();
        assert_eq!(entries(&epoll), wanted);
        let link = std::fs::read_link(format!("/proc/self/fd/{}", epoll.as_raw_fd()));
        assert_eq!(link.expect("there").to_string_lossy(), "anon_inode:[eventpoll]");
        assert!(!std::path::Path::new("/proc/self/fd/700").exists());
    }
}
