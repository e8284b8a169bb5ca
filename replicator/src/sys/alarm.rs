//! A timer that ends what a thread waits in: timer_create(2) with SIGEV_THREAD_ID.

use super::error::{SysResult, check};
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

/// What the calling thread waits in (waitpid(2), ppoll(2)) ends with EINTR when it rings, and again after each
/// period. So whoever begins to wait a moment too late for it is woken by the next one.
///
/// It uses the last real-time signal, SIGRTMAX, for which the process gets a handler that does nothing.
#[derive(Debug)]
pub struct Alarm {
    id: i32,
}

extern "C" fn nothing(_: i32) {}

/// A handler, once in a process; without SA_RESTART, so that calls end.
fn handle(signal: i32) -> SysResult<()> {
    static HANDLED: OnceLock<i32> = OnceLock::new();
    let set = || {
        // SAFETY: all zeros are an action without flags and with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the handler does nothing, at any time and in any thread.
        match unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } {
            0 => 0,
            _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL),
        }
    };
    match *HANDLED.get_or_init(set) {
        0 => Ok(()),
        code => Err(super::SysError::errno("sigaction", format!("signal {signal}"), code)),
    }
}

impl Alarm {
    /// One for the calling thread, quiet.
    ///
    /// # Errors
    /// The user has too many timers (RLIMIT_SIGPENDING).
    pub fn new() -> SysResult<Self> {
        let signal = libc::SIGRTMAX();
        handle(signal)?;
        // SAFETY: the set is ours, and live.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        }
        // SAFETY: all zeros are a valid struct sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        // SAFETY: no pointers.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut id = 0i32;
        // SAFETY: the kernel reads one struct sigevent and writes one int; both are ours. Its numbers of timers are not
        // those of timer_create(3), which is why the calls are made directly.
        let r = unsafe {
            libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &event, &mut id)
        };
        check(r, "timer_create", || "this thread".into())?;
        Ok(Self { id })
    }

    /// Rings after each period from now on; never again if that is zero.
    pub fn ring_every(&self, period: Duration) -> SysResult<()> {
        let time = libc::timespec {
            tv_sec: period.as_secs() as libc::time_t,
            tv_nsec: period.subsec_nanos().into(),
        };
        let when = libc::itimerspec { it_interval: time, it_value: time };
        let none = std::ptr::null_mut::<libc::itimerspec>();
        // SAFETY: the kernel reads one struct itimerspec.
        let r = unsafe { libc::syscall(libc::SYS_timer_settime, self.id, 0, &when, none) };
        check(r, "timer_settime", || "this thread".into()).map(drop)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: no pointers; the number is that of a timer of ours.
        unsafe { libc::syscall(libc::SYS_timer_delete, self.id) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::poll::ppoll;
    use nix::sys::time::TimeSpec;

    /// Only the thread that made it is woken, until it rings no more.
    #[test]
    fn a_wait_ends_when_it_rings() {
        let wait = |time| ppoll(&mut [], Some(TimeSpec::from(time)), None);
        let long = Duration::from_secs(600);
        std::thread::scope(|scope| {
            let other = scope.spawn(|| wait(Duration::from_millis(50)));
            let alarm = Alarm::new().expect("a timer");
            alarm.ring_every(Duration::from_millis(5)).expect("it is set");
            for _ in 0..3 {
                assert_eq!(wait(long), Err(Errno::EINTR));
            }
            alarm.ring_every(Duration::ZERO).expect("it is set");
            // One may have come before that.
            let _ = wait(Duration::ZERO);
            assert_eq!(wait(Duration::from_millis(20)), Ok(0));
            assert_eq!(other.join().expect("no panic"), Ok(0));
        });
    }
}
