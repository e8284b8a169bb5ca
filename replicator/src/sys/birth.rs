//! A process with a chosen pid: clone3(2) with set_tid.
//!
//! The new process is a fork of this one that does nothing but wait to be seized; its memory and
//! descriptors are taken away by whoever made it. A session or process group whose leader is no
//! more is made again by *ancestors*: each is born with the leader's pid, becomes leader, makes
//! the next one as its own sibling (CLONE_PARENT) and ends.

use super::error::{SysError, SysResult, check};
use std::os::fd::{AsRawFd, BorrowedFd};

/// One process of a chain; the last is the one that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its pid, in the pid namespace that children of the calling thread are born in.
    pub pid: i32,
    /// Starts a session of its own: setsid(2).
    pub session: bool,
    /// Starts a process group of its own: setpgid(2).
    pub group: bool,
    /// Mounts /proc anew first.
    pub mount_proc: bool,
}

/// Whether the kernel still keeps a number for a process, thread, group or session, so that
/// [`chain`] could not give it: also in the moment after its last holder has left /proc.
///
/// F_SETOWN (fcntl(2)) looks a number up just as clone3(2) does, whatever it is the number of.
pub fn is_kept(pid: i32) -> SysResult<bool> {
    let object = || format!("pid {pid}");
    let file = std::fs::File::open("/dev/null").map_err(|source| SysError {
        call: "open",
        object: "/dev/null".into(),
        source,
    })?;
    // SAFETY: no pointers; the description is ours alone, and gone at the end.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, pid) };
    match check(r.into(), "fcntl(F_SETOWN)", object) {
        Ok(_) => Ok(true),
        Err(e) if e.code() == libc::ESRCH => Ok(false),
        Err(e) => Err(e),
    }
}

/// What a process of the chain tells: its place, and an errno or 0.
type Word = [i32; 2];

/// Waits of the last process of the chain, in seconds, before it gives up.
const PATIENCE: i64 = 3600;

/// struct clone_args of clone3(2), up to set_tid_size and cgroup.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

/// Makes the processes of a chain, each a child of this process. Gives the last one's pid as this
/// process sees it. It has `control` as its standard input, all signals blocked, and waits.
///
/// `ear` is the other end of `control`.
pub fn chain(links: &[Link], control: BorrowedFd<'_>, ear: BorrowedFd<'_>) -> SysResult<i32> {
    let all = !0u64;
    let mut before = 0u64;
    let how = libc::SIG_BLOCK;
    // SAFETY: both words are ours and live; 8 is the size of the kernel's sigset_t.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &all, &mut before, 8) };
    check(r, "rt_sigprocmask", || "this thread".into())?;
    let born = clone(links[0].pid, 0);
    if born == 0 {
        live(links, 0, control.as_raw_fd());
    }
    let how = libc::SIG_SETMASK;
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &before, 0usize, 8) };
    let object = |link: &Link| format!("pid {}", link.pid);
    if born < 0 {
        return Err(SysError::errno("clone3", object(&links[0]), -born as i32));
    }
    let mut word: Word = [0; 2];
    // SAFETY: the kernel writes at most the eight bytes of `word`.
    let n = unsafe { libc::recv(ear.as_raw_fd(), (&raw mut word).cast(), 8, 0) };
    for link in &links[..links.len() - 1] {
        reap(if link.pid == links[0].pid { born as i32 } else { link.pid });
    }
    let [at, errno] = if n == 8 { word } else { [0, libc::ESRCH] };
    if errno != 0 {
        if links.len() == 1 {
            reap(born as i32);
        }
        let link = links.get(at as usize).unwrap_or(&links[0]);
        return Err(SysError::errno("clone3 or setsid", object(link), errno));
    }
    // In a chain all are in the namespace of the caller: numbers mean the same.
    Ok(if links.len() == 1 { born as i32 } else { links[links.len() - 1].pid })
}

/// Waits for a process that is about to end.
fn reap(pid: i32) {
    // SAFETY: no pointers.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
}

/// clone3(2) as fork(2) does it, with a pid. 0 in the child, -errno on failure.
fn clone(pid: i32, flags: u64) -> i64 {
    let exit_signal = if flags == 0 { libc::SIGCHLD as u64 } else { 0 };
    let set_tid = (&raw const pid) as u64;
    let args = CloneArgs { flags, exit_signal, set_tid, set_tid_size: 1, ..Default::default() };
    // SAFETY: the structure and the pid in it live through the call. Without CLONE_VM the child
    // has a copy of all memory; it makes system calls only (see `live`), so that locks which other
    // threads hold do not matter.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if r < 0 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { r }
}

/// What a new process does. System calls only: no allocation, no locks.
fn live(links: &[Link], at: usize, control: i32) -> ! {
    let link = &links[at];
    let mut errno = 0;
    if link.session {
        errno = errno_of(libc::SYS_setsid, [0; 5]);
    } else if link.group {
        errno = errno_of(libc::SYS_setpgid, [0; 5]);
    }
    if errno == 0 && link.mount_proc {
        let (name, place) = (c"proc".as_ptr() as usize, c"/proc".as_ptr() as usize);
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        errno = errno_of(libc::SYS_mount, [name, place, name, flags as usize, 0]);
    }
    if errno == 0 && at + 1 < links.len() {
        let r = clone(links[at + 1].pid, libc::CLONE_PARENT as u64);
        if r == 0 {
            live(links, at + 1, control);
        }
        if r > 0 {
            end(0);
        }
        tell(control, at + 1, -r as i32);
        end(1);
    }
    if errno == 0 {
        errno = errno_of(libc::SYS_dup2, [control as usize, 0, 0, 0, 0]);
    }
    tell(if errno == 0 { 0 } else { control }, at, errno);
    if errno != 0 {
        end(1);
    }
    let time = libc::timespec { tv_sec: PATIENCE, tv_nsec: 0 };
    // SAFETY: the structure lives through the call. Signals are blocked: only a tracer, or the
    // end of its time, ends the wait.
    unsafe { libc::syscall(libc::SYS_nanosleep, &raw const time, 0usize) };
    end(1)
}

fn errno_of(number: i64, a: [usize; 5]) -> i32 {
    // SAFETY: callers pass numbers and static texts.
    let r = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4]) };
    if r < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) } else { 0 }
}

fn tell(fd: i32, at: usize, errno: i32) {
    let word: Word = [at as i32, errno];
    // SAFETY: eight bytes of a live array.
    unsafe { libc::syscall(libc::SYS_write, fd, &raw const word, 8) };
}

fn end(code: i32) -> ! {
    // SAFETY: no pointers; it does not return.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{Pid, getpgid, getsid};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    /// Pids that nobody has.
    fn free(count: usize) -> Vec<i32> {
        let base = 20_000 + (std::process::id() as i32 * 37) % 10_000;
        (base..).filter(|p| kill(Pid::from_raw(*p), None).is_err()).take(count).collect()
    }

    #[test]
    fn the_last_of_a_chain_has_its_pid_its_group_and_its_session() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let pids = free(3);
        let link =
            |at: usize, session, group| Link { pid: pids[at], session, group, mount_proc: false };
        let links = [link(0, true, false), link(1, false, true), link(2, false, false)];
        let pid = chain(&links, theirs.as_fd(), ours.as_fd()).expect("born");
        let born = Pid::from_raw(pid);
        assert_eq!(pid, pids[2]);
        assert_eq!(getsid(Some(born)).expect("a session").as_raw(), pids[0]);
        assert_eq!(getpgid(Some(born)).expect("a group").as_raw(), pids[1]);
        let taken = chain(&links[2..], theirs.as_fd(), ours.as_fd()).expect_err("taken");
        assert_eq!(taken.code(), libc::EEXIST);
        // The number of a group that has members cannot be given either.
        let taken = chain(&[links[0], links[1]], theirs.as_fd(), ours.as_fd()).expect_err("used");
        assert_eq!(taken.code(), libc::EEXIST);
        for pid in &pids {
            assert!(is_kept(*pid).expect("asked"), "process, group and session have their numbers");
        }
        kill(born, Signal::SIGKILL).expect("killed");
        reap(pid);
        // Whoever reads /proc may see it gone before the kernel has given the number back.
        let begin = std::time::Instant::now();
        while pids.iter().any(|pid| is_kept(*pid).expect("asked")) {
            assert!(begin.elapsed().as_secs() < 60, "the numbers are not given back");
            std::thread::yield_now();
        }
        chain(&links[2..], theirs.as_fd(), ours.as_fd()).expect("free again");
        kill(Pid::from_raw(pids[2]), Signal::SIGKILL).expect("killed");
        reap(pids[2]);
    }
}
