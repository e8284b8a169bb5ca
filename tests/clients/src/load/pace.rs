//! The schedule of the open loop: when each request is due, and a timer to wait for it.
//!
//! The timer is a timerfd, because tokio's own counts in whole milliseconds, which is more than
//! the latency being measured. Invariant: due times depend on the schedule alone, never on when
//! replies came, so a stalled server does not make its own delay invisible.

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;

/// The schedule of one connection. Times are counted from the start of the load.
#[derive(Debug)]
pub(super) struct Pacer {
    timer: TimerFd,
    /// The same timer, as tokio reads it: like a pipe that has 8 bytes at each expiry.
    expiry: Receiver,
    next: Duration,
    step: Duration,
}

impl Pacer {
    /// A schedule with its first request due at `first` and one more each `step`. Needs a runtime.
    pub(super) fn new(first: Duration, step: Duration) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let expiry = Receiver::from_owned_fd_unchecked(timer.as_fd().try_clone_to_owned()?)?;
        Ok(Self { timer, expiry, next: first, step })
    }

    /// When the next request was due, if that is not after `now`; moves on to the one after.
    pub(super) fn due(&mut self, now: Duration) -> Option<Duration> {
        let due = self.next;
        if due > now {
            return None;
        }
        self.next += self.step;
        Some(due)
    }

    /// Waits until the next request is due, or a little less.
    pub(super) async fn wait(&self, now: Duration) -> io::Result<()> {
        // A zero would disarm the timer.
        let left = self.next.saturating_sub(now).max(Duration::from_nanos(1));
        self.timer
            .set(Expiration::OneShot(TimeSpec::from_duration(left)), TimerSetTimeFlags::empty())?;
        // Setting the timer took back an expiry that nobody read, so what is ready now may be a
        // stale mark: reading the timer tells.
        loop {
            self.expiry.readable().await?;
            match self.expiry.try_read(&mut [0; 8]) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[tokio::test]
    async fn due_times_follow_the_schedule_however_late_they_are_asked_for() {
        let ms = Duration::from_millis;
        let mut pacer = Pacer::new(ms(3), ms(2)).unwrap();
        assert_eq!(pacer.due(ms(2)), None);
        let due: Vec<_> = std::iter::from_fn(|| pacer.due(ms(8))).collect();
        assert_eq!(due, [ms(3), ms(5), ms(7)]);
        let begun = Instant::now();
        pacer.wait(ms(8)).await.unwrap();
        assert!(begun.elapsed() >= ms(1));
        pacer.wait(ms(10)).await.unwrap();
    }
}
