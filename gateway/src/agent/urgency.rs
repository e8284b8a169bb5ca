//! Which threads go before others, and when: the stop thread always before ordinary ones, and before all that work for
//! long while somebody waits for it.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use replicator::sys::sched;

/// Real-time priority in a stop; the gate's threads run below it.
pub(super) const PRIORITY: i32 = 20;
/// Nice value between stops.
const NICE: i32 = -10;

/// Makes the calling thread the one that may stop a container, with SIGCHLD as a descriptor.
/// SIGCHLD must be blocked in every thread of the process.
pub(super) fn become_stop_thread() -> Result<SignalFd> {
    // Ordinary threads with this mark give their priority to no child: the container starts as
    // any other program.
    if let Err(error) = sched::set_ordinary() {
        tracing::warn!(%error, "the container may start as a real-time program");
    }
    go_before_others()
}

fn go_before_others() -> Result<SignalFd> {
    if let Err(error) = sched::set_nice(NICE) {
        tracing::warn!(%error, "stops will be longer when the machine is busy");
    }
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("cannot watch the container's processes (signalfd)")
}

/// Real-time while it lives.
pub(super) struct RealTime(());

impl RealTime {
    /// Makes the calling thread real-time, if the system allows it.
    pub(super) fn start() -> Self {
        if let Err(error) = sched::set_fifo(PRIORITY) {
            tracing::debug!(%error, "not real-time");
        }
        Self(())
    }

    /// As [`become_stop_thread`] does. To become an ordinary thread first would mean to wait for a processor.
    pub(super) fn become_stop_thread(&self) -> Result<SignalFd> {
        go_before_others()
    }

    /// Threads that are begun meanwhile are real-time as well, and for good; otherwise they are ordinary.
    pub(super) fn share<T>(&self, begin: impl FnOnce() -> T) -> T {
        let shared = sched::set_fifo_with_children(0, PRIORITY);
        let result = begin();
        if let Err(error) = shared.and_then(|()| sched::set_fifo(PRIORITY)) {
            tracing::debug!(%error, "not real-time");
        }
        result
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        if let Err(error) = sched::set_ordinary() {
            tracing::debug!(%error, "real-time for good");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_waited_for_begins_as_real_time_and_others_do_not() {
        let class = || sched::attributes(0).expect("its own");
        let real_time = RealTime::start();
        let [shared, other] = std::thread::scope(|scope| {
            let shared = real_time.share(|| scope.spawn(class));
            [shared, scope.spawn(class)].map(|thread| thread.join().expect("no panic").policy)
        });
        drop(real_time);
        assert_eq!([shared, other, class().policy], [nix::libc::SCHED_FIFO as u32, 0, 0]);
    }
}
