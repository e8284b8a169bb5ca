//! Where the time of a stop goes.

use std::time::{Duration, Instant};

/// How long capturing took in a stop, by kind of state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindTimes {
    /// Mappings and pages of processes.
    pub memory: Duration,
    /// Memory that is shared, files of a tmpfs, System V objects, names.
    pub objects: Duration,
    /// Registers, signals, credentials and the tree.
    pub threads: Duration,
    /// Timers that send signals.
    pub timers: Duration,
    /// Descriptors, with the sockets that they are of.
    pub descriptors: Duration,
    /// What travels through sockets, and connections that no descriptor names any more.
    pub in_flight: Duration,
}

/// How long each stage of a stop took.
#[derive(Clone, Copy, Debug, Default)]
pub struct StopTimes {
    /// Holding input.
    pub hold: Duration,
    /// Stopping all threads.
    pub freeze: Duration,
    /// Draining and sealing output.
    pub seal: Duration,
    /// The last round: mappings, scan and copy.
    pub memory: Duration,
    /// Registers and signals.
    pub threads: Duration,
    /// Descriptors and sockets.
    pub files: Duration,
    /// The three before, by kind.
    pub kinds: KindTimes,
    /// Letting all threads go on.
    pub thaw: Duration,
    /// From the hold to the thaw: the stop time.
    pub total: Duration,
    /// After it, while the container ran: looking at the memory that the stop has not looked at.
    pub confirm: Duration,
    /// Pages copied in the stop.
    pub stop_pages: usize,
    /// Pages copied in all, pre-copy included.
    pub pages: usize,
    /// Pages of processes that pre-copy had taken and that were read again, as a read past the page cache
    /// may have been under way then.
    pub again: usize,
    /// Processes whose written pages were looked for around the faults that were noted, and nowhere else.
    pub noted: usize,
    /// Processes whose faults were noted and that were looked through all the same, as some may be missing.
    pub doubted: usize,
    /// Descriptors that one glance told all of.
    pub glanced: usize,
    /// Connections of these that were put together before the stop: nothing about them had changed.
    pub resting: usize,
    /// Threads that were not asked: a glance told that they would answer as before.
    pub unasked: usize,
}

/// Counts the time since the last lap for a stage and for a kind.
pub(super) fn spent(stage: &mut Duration, kind: &mut Duration, lap: &mut Lap) {
    let time = lap.next();
    *stage += time;
    *kind += time;
}

/// The time since it was made, or asked last.
pub(super) struct Lap(pub(super) Instant);

impl Lap {
    pub(super) fn next(&mut self) -> Duration {
        let now = Instant::now();
        let d = now - self.0;
        self.0 = now;
        d
    }
}
