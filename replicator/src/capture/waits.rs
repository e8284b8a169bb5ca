//! Waits that our stops interrupt, and how they go on without the program noticing.
//!
//! ```text
//! the kernel says      calls                                    what happens
//! -516 (RESTARTBLOCK)  nanosleep, poll, futex with a time-out   the kernel goes on with them itself
//! -514 (RESTARTNOHAND) select, pselect6, ppoll                  likewise: it has written what is left
//! -4   (EINTR)         epoll_wait, semop, rt_sigtimedwait, ...  turned into -514 by us, with the time
//!                                                               that is left
//! ```
//! A call that we put back carries a mark in the upper half of orig_rax: the kernel looks at the
//! lower half alone, puts the whole into rax to make the call again, and keeps it. So the next stop
//! knows the wait again, and the program never sees the mark.
//!
//! Nobody but the kernel moves a thread back to its `syscall` instruction, and it does so when it lets
//! the thread go on. A signal that comes before ends the call with EINTR, as it must: had the thread
//! been moved back by us, its handler would run first, and the wait begin after it, on memory below
//! the stack that the handler has used. An image has the call at its instruction, and in orig_rax the
//! result (-512 to -514) that a restore puts there for the kernel.
//!
//! When a wait began is not known; it is counted from the first stop that sees it. So it may last
//! up to an epoch longer than without us, and never shorter.

use crate::image::Regs;
use crate::image::task::{TimeUnit, Wait};
use crate::sys::ptrace::{self, reg};
use crate::sys::{SysResult, memory, pidfd, sockopt};
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// ERESTARTNOHAND and ERESTART_RESTARTBLOCK of the kernel's linux/errno.h.
const RESTART_NO_HAND: i64 = -514;
const RESTART_BLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);
/// ERESTARTSYS to ERESTART_RESTARTBLOCK.
const RESTARTS: std::ops::RangeInclusive<i64> = -516..=-512;

/// Calls that end with EINTR at every stop, though no signal came (signal(7), "Interruption of
/// system calls and library functions by stop signals"); select and ppoll only if they cannot
/// write what is left.
const EINTR_AT_STOP: [i64; 10] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_ppoll,
];
/// Calls that end so if their socket has a time-out for receiving (SO_RCVTIMEO).
const RECEIVING: [i64; 7] = [
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
];
/// The same for sending (SO_SNDTIMEO).
const SENDING: [i64; 6] = [
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_connect,
];

/// What is remembered of waits between stops, by host tid.
#[derive(Debug)]
pub(super) struct Interrupted {
    waits: HashMap<i32, Ongoing>,
    /// Calls that others had interrupted before we came, and that go on as restart_syscall(2).
    before: HashMap<i32, i64>,
    /// Threads that the kernel has moved back to go on with their wait by restart_syscall(2), and
    /// that were stopped before they made that call.
    moved_back: HashSet<i32>,
    last_mark: u32,
    /// Where we have written to memory, and of which thread.
    written: Vec<(i32, u64)>,
    /// When the clocks of the image were read: what is left counts from there.
    read_at: Instant,
}

impl Default for Interrupted {
    fn default() -> Self {
        let (waits, before, moved_back, written) = Default::default();
        Self { waits, before, moved_back, last_mark: 0, written, read_at: Instant::now() }
    }
}

#[derive(Debug)]
struct Ongoing {
    /// What the call carries; 0 for one that the kernel goes on with.
    mark: u32,
    call: i64,
    until: Option<Instant>,
    timeout: Option<Timeout>,
}

/// A relative time-out among the arguments of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timeout {
    register: usize,
    unit: TimeUnit,
}

impl Interrupted {
    /// Sees to a thread that has just been stopped. A call that a signal interrupts keeps its
    /// EINTR: programs count on it.
    pub(super) fn settle(&mut self, tid: i32) -> SysResult<()> {
        let mut regs = ptrace::regs(tid)?;
        let Some(mut call) = number(&regs) else { return Ok(()) };
        if call == libc::SYS_restart_syscall
            && let Some(earlier) = self.before.remove(&tid)
        {
            call = earlier;
        }
        self.moved_back.remove(&tid);
        match regs[reg::RAX] as i64 {
            RESTART_BLOCK if call != libc::SYS_restart_syscall => self.begins(tid, call, &regs),
            libc::SYS_restart_syscall if is_at_call(tid, &regs)? => {
                self.moved_back.insert(tid);
                match call != libc::SYS_restart_syscall && self.resumed(tid, call).is_none() {
                    true => self.begins(tid, call, &regs),
                    false => Ok(()),
                }
            }
            EINTR if EINTR_AT_STOP.contains(&call) => {
                if signal_comes(tid)? {
                    return Ok(());
                }
                let timeout = timeout_of(call, &regs);
                let known = self.known(tid, &regs);
                let until = match (known, timeout) {
                    (Some(until), _) => until,
                    (None, Some(t)) => given(tid, t, &regs)?.map(|g| Instant::now() + g),
                    (None, None) => None,
                };
                if let (Some(timeout), Some(until)) = (timeout, until) {
                    if !write_left(tid, timeout, left(until), &mut regs) {
                        // No room below its stack: it sees the EINTR that signal(7) allows.
                        return Ok(());
                    }
                    // A struct timespec at most, in one page or two.
                    let place = TimeUnit::place(regs[reg::RSP]);
                    self.written.extend([(tid, place), (tid, place + 15)]);
                }
                self.put_back(tid, call, until, timeout, &mut regs)
            }
            EINTR if RECEIVING.contains(&call) || SENDING.contains(&call) => {
                self.settle_socket(tid, call, &mut regs)
            }
            _ => Ok(()),
        }
    }

    /// A wait that the kernel goes on with itself is seen for the first time since it began, or since
    /// the kernel told what was left of it.
    fn begins(&mut self, tid: i32, call: i64, regs: &Regs) -> SysResult<()> {
        let timeout = timeout_of(call, regs);
        let until = match timeout {
            Some(t) => left_of(tid, call, t, regs)?.map(|left| Instant::now() + left),
            None => None,
        };
        self.waits.insert(tid, Ongoing { mark: 0, call, until, timeout });
        Ok(())
    }

    /// The wait of this thread, if it is one that the kernel goes on with and of this call, or of any
    /// for restart_syscall(2).
    fn resumed(&self, tid: i32, call: i64) -> Option<&Ongoing> {
        let is =
            |w: &&Ongoing| w.mark == 0 && (call == libc::SYS_restart_syscall || w.call == call);
        self.waits.get(&tid).filter(is)
    }

    /// Finds out which call a thread is in that goes on as restart_syscall(2), by where it sleeps
    /// and by its arguments. The thread runs.
    pub(super) fn look(&mut self, tid: i32) {
        let read =
            |name| std::fs::read_to_string(format!("/proc/{tid}/{name}")).unwrap_or_default();
        let entered = read("syscall");
        let mut words = entered.split_whitespace();
        if words.next().and_then(|w| w.parse().ok()) != Some(libc::SYS_restart_syscall) {
            return;
        }
        let first = words.next().and_then(|w| u64::from_str_radix(w.strip_prefix("0x")?, 16).ok());
        // Four calls go on so. Where a thread sleeps is a name of the kernel's symbol table.
        let call = match read("wchan").as_str() {
            w if w.contains("poll") => libc::SYS_poll,
            w if w.contains("futex") => libc::SYS_futex,
            // nanosleep(2) has a pointer where clock_nanosleep(2) has a small number.
            _ if first.is_some_and(|a| i32::try_from(a as i64).is_ok()) => {
                libc::SYS_clock_nanosleep
            }
            _ => libc::SYS_nanosleep,
        };
        self.before.insert(tid, call);
    }

    /// A call on a socket with a time-out: it is made again until the time is over.
    fn settle_socket(&mut self, tid: i32, call: i64, regs: &mut Regs) -> SysResult<()> {
        let name = if RECEIVING.contains(&call) { libc::SO_RCVTIMEO } else { libc::SO_SNDTIMEO };
        let Some(given) = socket_timeout(tid, regs[reg::RDI] as i32, name)? else { return Ok(()) };
        if signal_comes(tid)? {
            return Ok(());
        }
        let until = self.known(tid, regs).flatten().unwrap_or_else(|| Instant::now() + given);
        if left(until) > Duration::ZERO {
            return self.put_back(tid, call, Some(until), None, regs);
        }
        let over = if call == libc::SYS_connect { libc::EINPROGRESS } else { libc::EAGAIN };
        regs[reg::RAX] = -i64::from(over) as u64;
        regs[reg::ORIG_RAX] = u64::MAX;
        ptrace::set_regs(tid, regs)
    }

    /// The end of the wait that this thread is in, if it is one that we have put back.
    fn known(&self, tid: i32, regs: &Regs) -> Option<Option<Instant>> {
        let mark = (regs[reg::ORIG_RAX] >> 32) as u32;
        self.waits.get(&tid).filter(|w| mark != 0 && w.mark == mark).map(|w| w.until)
    }

    fn put_back(
        &mut self,
        tid: i32,
        call: i64,
        until: Option<Instant>,
        timeout: Option<Timeout>,
        regs: &mut Regs,
    ) -> SysResult<()> {
        // A wait keeps its mark: a thread that only waits looks the same at each stop.
        let mark = match self.known(tid, regs) {
            Some(_) => (regs[reg::ORIG_RAX] >> 32) as u32,
            None => {
                self.last_mark = self.last_mark % i32::MAX as u32 + 1;
                self.last_mark
            }
        };
        self.waits.insert(tid, Ongoing { mark, call, until, timeout });
        regs[reg::RAX] = RESTART_NO_HAND as u64;
        regs[reg::ORIG_RAX] = call as u64 | u64::from(mark) << 32;
        ptrace::set_regs(tid, regs)
    }

    /// Where we have written to memory since this was last asked, and of which thread.
    pub(super) fn take_written(&mut self) -> impl Iterator<Item = (i32, u64)> {
        self.written.drain(..)
    }

    /// Tells that the clocks of the image are read now.
    pub(super) fn clocks_are_read(&mut self) {
        self.read_at = Instant::now();
    }

    /// Nanoseconds since the clocks of the image were read.
    pub(super) fn since_clocks(&self) -> u64 {
        self.read_at.elapsed().as_nanos() as u64
    }

    /// The registers of a stopped thread as they go into the image, where no kernel remembers the
    /// call, and the wait that it is in.
    pub(super) fn image(&self, tid: i32, live: &Regs) -> (Regs, Option<Wait>) {
        let mut regs = *live;
        let known = self.waits.get(&tid);
        let mark = (live[reg::ORIG_RAX] >> 32) as u32;
        let marked = known.filter(|w| mark != 0 && w.mark == mark);
        let rax = live[reg::RAX] as i64;
        let mut wait = None;
        regs[reg::ORIG_RAX] = u64::MAX;
        match number(live) {
            Some(call) if self.moved_back.contains(&tid) => match self.resumed(tid, call) {
                Some(w) => {
                    (regs[reg::RAX], regs[reg::ORIG_RAX]) = (w.call as u64, RESTART_NO_HAND as u64);
                    wait = w.image(self.read_at);
                }
                // Begun before we came.
                None => {
                    regs[reg::RIP] += 2;
                    regs[reg::RAX] = EINTR as u64;
                }
            },
            Some(libc::SYS_restart_syscall) if RESTARTS.contains(&rax) => match known {
                Some(w) if w.mark == 0 => {
                    rewind(&mut regs, w.call, rax);
                    wait = w.image(self.read_at);
                }
                // Begun before we came: what it was is not known.
                _ => regs[reg::RAX] = EINTR as u64,
            },
            Some(call) if RESTARTS.contains(&rax) => {
                rewind(&mut regs, call, rax);
                wait = match (marked, rax, timeout_of(call, live)) {
                    (Some(w), ..) => w.image(self.read_at),
                    (_, RESTART_BLOCK, _) => known.and_then(|w| w.image(self.read_at)),
                    (_, RESTART_NO_HAND, Some(t)) => Some(t.image(None)),
                    _ => None,
                };
            }
            // The kernel has moved it back already, and stopped it before it could make the call.
            Some(_) if live[reg::RAX] == live[reg::ORIG_RAX] => {
                if let Some(w) = marked {
                    (regs[reg::RAX], regs[reg::ORIG_RAX]) = (w.call as u64, RESTART_NO_HAND as u64);
                    wait = w.image(self.read_at);
                }
            }
            _ => {}
        }
        (regs, wait)
    }

    /// Forgets threads that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(i32) -> bool) {
        self.waits.retain(|tid, _| is_there(*tid));
        self.before.retain(|tid, _| is_there(*tid));
        self.moved_back.retain(|tid| is_there(*tid));
    }
}

impl Ongoing {
    fn image(&self, at: Instant) -> Option<Wait> {
        let (timeout, until) = (self.timeout?, self.until?);
        Some(timeout.image(Some(until.saturating_duration_since(at).as_nanos() as u64)))
    }
}

impl Timeout {
    fn image(self, left: Option<u64>) -> Wait {
        Wait { register: self.register as u8, unit: self.unit, left }
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// The system call that a stopped thread is in. Its number is the lower half of orig_rax.
fn number(regs: &Regs) -> Option<i64> {
    let whole = regs[reg::ORIG_RAX] as i64;
    (whole >= 0).then_some(i64::from(whole as i32))
}

/// Whether a stopped thread is about to make a system call.
fn is_at_call(tid: i32, regs: &Regs) -> SysResult<bool> {
    let mut instruction = [0; 2];
    match memory::read(tid, regs[reg::RIP], &mut instruction) {
        Err(e) if e.code() == libc::EFAULT => return Ok(false),
        other => other?,
    }
    Ok(instruction == [0x0f, 0x05])
}

/// Back to the `syscall` instruction (two bytes), with the number of the call in rax, and in orig_rax
/// the result by which a kernel makes it again. What the kernel here would have gone on with itself is
/// made again there.
fn rewind(regs: &mut Regs, call: i64, result: i64) {
    regs[reg::RIP] -= 2;
    regs[reg::RAX] = call as u64;
    regs[reg::ORIG_RAX] = if result == RESTART_BLOCK { RESTART_NO_HAND } else { result } as u64;
}

/// Where a call has its time-out, if that is relative and not for ever.
fn timeout_of(call: i64, regs: &Regs) -> Option<Timeout> {
    const FUTEX_COMMAND: u64 = 0x7f;
    let (register, unit) = match call {
        libc::SYS_nanosleep => (reg::RDI, TimeUnit::Timespec),
        libc::SYS_clock_nanosleep => {
            // Clocks of processor time stand still with the program.
            let wall = !matches!(regs[reg::RDI] as i32, 2 | 3 | i32::MIN..=-1);
            if regs[reg::RSI] & libc::TIMER_ABSTIME as u64 != 0 || !wall {
                return None;
            }
            (reg::RDX, TimeUnit::Timespec)
        }
        // All other commands of futex(2) have an absolute time.
        libc::SYS_futex if regs[reg::RSI] & FUTEX_COMMAND == libc::FUTEX_WAIT as u64 => {
            (reg::R10, TimeUnit::Timespec)
        }
        libc::SYS_poll => (reg::RDX, TimeUnit::Milliseconds),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (reg::R10, TimeUnit::Milliseconds),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => (reg::R10, TimeUnit::Timespec),
        libc::SYS_ppoll | libc::SYS_rt_sigtimedwait => (reg::RDX, TimeUnit::Timespec),
        libc::SYS_io_getevents | libc::SYS_pselect6 => (reg::R8, TimeUnit::Timespec),
        libc::SYS_select => (reg::R8, TimeUnit::Timeval),
        _ => return None,
    };
    let finite = match unit {
        TimeUnit::Milliseconds => regs[register] as i32 >= 0,
        TimeUnit::Timespec | TimeUnit::Timeval => regs[register] != 0,
    };
    finite.then_some(Timeout { register, unit })
}

/// The time-out that the program has given.
fn given(tid: i32, timeout: Timeout, regs: &Regs) -> SysResult<Option<Duration>> {
    read_time(tid, timeout.unit, regs[timeout.register])
}

/// What is left of a wait that the kernel has just interrupted: sleeping calls write it, if they
/// are given a place.
fn left_of(tid: i32, call: i64, timeout: Timeout, regs: &Regs) -> SysResult<Option<Duration>> {
    let place = match call {
        libc::SYS_nanosleep => regs[reg::RSI],
        libc::SYS_clock_nanosleep => regs[reg::R10],
        _ => 0,
    };
    match place {
        0 => given(tid, timeout, regs),
        at => read_time(tid, TimeUnit::Timespec, at),
    }
}

fn read_time(tid: i32, unit: TimeUnit, value: u64) -> SysResult<Option<Duration>> {
    if unit == TimeUnit::Milliseconds {
        return Ok(u32::try_from(value as i32).ok().map(|ms| Duration::from_millis(ms.into())));
    }
    let mut bytes = [0; 16];
    match memory::read(tid, value, &mut bytes) {
        // Unmapped while the call waits: nothing to go by.
        Err(e) if e.code() == libc::EFAULT => return Ok(None),
        other => other?,
    }
    Ok(unit.decode(&bytes))
}

/// Gives an interrupted call the time that is left, in its register or below the red zone of its
/// stack, where nothing is kept (the psABI for x86-64, 3.2.2). Says whether that was possible.
fn write_left(tid: i32, timeout: Timeout, left: Duration, regs: &mut Regs) -> bool {
    let place = TimeUnit::place(regs[reg::RSP]);
    let (value, bytes) = timeout.unit.encode(left, place);
    if let Some(bytes) = bytes
        && memory::write(tid, place, &bytes).is_err()
    {
        return false;
    }
    regs[timeout.register] = value;
    true
}

/// Whether a signal waits that a thread will take.
fn signal_comes(tid: i32) -> SysResult<bool> {
    let blocked = ptrace::blocked(tid)?;
    for of_process in [false, true] {
        for info in ptrace::pending(tid, of_process)? {
            let signal = i32::from_ne_bytes(info[..4].try_into().expect("four bytes"));
            if (1..=64).contains(&signal) && blocked & (1 << (signal - 1)) == 0 {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// SO_RCVTIMEO or SO_SNDTIMEO of a socket; none for no time-out, or what is no socket.
fn socket_timeout(tid: i32, fd: i32, name: i32) -> SysResult<Option<Duration>> {
    let thread = pidfd::open_thread(tid)?;
    let Ok(socket) = pidfd::get_fd(thread.as_fd(), fd) else { return Ok(None) };
    let mut bytes = [0; 16];
    if sockopt::get(socket.as_fd(), libc::SOL_SOCKET, name, &mut bytes).is_err() {
        return Ok(None);
    }
    Ok(TimeUnit::Timeval.decode(&bytes).filter(|t| *t > Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_call(call: i64, rax: i64) -> Regs {
        let mut regs = [0; 27];
        regs[reg::RIP] = 0x1002;
        regs[reg::ORIG_RAX] = call as u64;
        regs[reg::RAX] = rax as u64;
        regs
    }

    #[test]
    fn calls_that_the_kernel_would_go_on_with_are_made_again_elsewhere() {
        let mut waits = Interrupted::default();
        let (regs, wait) = waits.image(7, &in_call(libc::SYS_read, -512));
        assert_eq!((regs[reg::RIP], regs[reg::RAX]), (0x1000, 0));
        assert_eq!((regs[reg::ORIG_RAX] as i64, wait), (-512, None));
        // One that was begun before we came ends early.
        let restart = in_call(libc::SYS_restart_syscall, RESTART_BLOCK);
        assert_eq!(waits.image(7, &restart).0[reg::RAX] as i64, EINTR);
        let timeout = Some(Timeout { register: reg::RDX, unit: TimeUnit::Milliseconds });
        let until = Some(waits.read_at + Duration::from_secs(100));
        let poll = Ongoing { mark: 0, call: libc::SYS_poll, until, timeout };
        waits.waits.insert(7, poll);
        let (regs, wait) = waits.image(7, &restart);
        assert_eq!((regs[reg::RIP], regs[reg::RAX]), (0x1000, libc::SYS_poll as u64));
        assert_eq!(regs[reg::ORIG_RAX] as i64, RESTART_NO_HAND);
        assert_eq!(wait.and_then(|w| w.left), Some(100_000_000_000));
    }

    #[test]
    fn a_call_that_was_put_back_is_known_whether_or_not_the_kernel_has_moved_it_back() {
        let mut waits = Interrupted::default();
        let until = Some(waits.read_at + Duration::from_secs(100));
        let timeout = Some(Timeout { register: reg::R10, unit: TimeUnit::Milliseconds });
        let call = libc::SYS_epoll_wait;
        waits.waits.insert(7, Ongoing { mark: 3, call, until, timeout });
        let marked = call as u64 | 3 << 32;
        let mut live = in_call(0, RESTART_NO_HAND);
        live[reg::ORIG_RAX] = marked;
        let (put_back, wait) = waits.image(7, &live);
        assert_eq!(wait.and_then(|w| w.left), Some(100_000_000_000));
        (live[reg::RIP], live[reg::RAX]) = (live[reg::RIP] - 2, marked);
        assert_eq!(waits.image(7, &live), (put_back, wait));
        assert_eq!((put_back[reg::RIP], put_back[reg::RAX]), (0x1000, call as u64));
        assert_eq!(put_back[reg::ORIG_RAX] as i64, RESTART_NO_HAND);
        // It has ended since.
        live[reg::RAX] = 1;
        assert_eq!(waits.image(7, &live).1, None);
    }

    /// It has RAX 219 and stands at its `syscall`, and the kernel's memory of the wait is lost
    /// elsewhere.
    #[test]
    fn a_wait_that_was_about_to_go_on_is_the_same_wait() {
        let child = std::process::Command::new("sleep").arg("600").spawn().expect("sleep starts");
        let pid = child.id() as i32;
        let _child = Killed(child);
        ptrace::seize(pid, libc::PTRACE_O_EXITKILL).expect("seized");
        let call = || std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        while !call().starts_with("230 ") {
            std::thread::yield_now();
        }
        ptrace::interrupt(pid).expect("interrupted");
        assert!(ptrace::wait(pid).expect("stopped").is_event_stop());
        let mut live = ptrace::regs(pid).expect("registers");
        assert_eq!(live[reg::RAX] as i64, RESTART_BLOCK);
        let mut waits = Interrupted::default();
        waits.settle(pid).expect("settled");
        waits.clocks_are_read();
        let (usual, wait) = waits.image(pid, &live);
        assert!(wait.and_then(|w| w.left) > Some(500_000_000_000));
        // As the kernel does when it lets the thread go on.
        (live[reg::RIP], live[reg::RAX]) = (live[reg::RIP] - 2, libc::SYS_restart_syscall as u64);
        for orig in [libc::SYS_clock_nanosleep, libc::SYS_restart_syscall] {
            live[reg::ORIG_RAX] = orig as u64;
            ptrace::set_regs(pid, &live).expect("moved back");
            waits.settle(pid).expect("settled");
            assert_eq!(waits.image(pid, &live), (usual, wait), "{orig}");
        }
        // Whoever sees it for the first time so knows what it is, or that it cannot be known.
        live[reg::ORIG_RAX] = libc::SYS_clock_nanosleep as u64;
        ptrace::set_regs(pid, &live).expect("moved back");
        let mut waits = Interrupted::default();
        waits.settle(pid).expect("settled");
        assert_eq!(waits.image(pid, &live).0, usual);
        assert!(waits.image(pid, &live).1.is_some());
        live[reg::ORIG_RAX] = libc::SYS_restart_syscall as u64;
        ptrace::set_regs(pid, &live).expect("moved back");
        let mut waits = Interrupted::default();
        waits.settle(pid).expect("settled");
        let (early, none) = waits.image(pid, &live);
        assert_eq!((early[reg::RIP], early[reg::RAX] as i64), (live[reg::RIP] + 2, EINTR));
        assert_eq!(none, None);
    }

    struct Killed(std::process::Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_result_is_no_call() {
        let waits = Interrupted::default();
        let regs = in_call(-1, -512);
        let same = waits.image(7, &regs);
        assert_eq!((same.0[reg::RIP], same.0[reg::RAX] as i64, same.1), (0x1002, -512, None));
        let done = in_call(libc::SYS_read, 5);
        assert_eq!(waits.image(7, &done).0[reg::RAX], 5);
    }

    #[test]
    fn absolute_times_and_waits_without_end_have_no_time_out() {
        let mut regs = in_call(libc::SYS_clock_nanosleep, RESTART_BLOCK);
        (regs[reg::RDI], regs[reg::RSI], regs[reg::RDX]) = (1, 1, 0x5000);
        assert_eq!(timeout_of(libc::SYS_clock_nanosleep, &regs), None);
        regs[reg::RSI] = 0;
        assert!(timeout_of(libc::SYS_clock_nanosleep, &regs).is_some());
        // FUTEX_WAIT_BITSET
        (regs[reg::RSI], regs[reg::R10]) = (9, 0x5000);
        assert_eq!(timeout_of(libc::SYS_futex, &regs), None);
        regs[reg::RDX] = -1i64 as u64;
        assert_eq!(timeout_of(libc::SYS_poll, &regs), None);
        regs[reg::R10] = 0;
        assert_eq!(timeout_of(libc::SYS_semtimedop, &regs), None);
    }
}
