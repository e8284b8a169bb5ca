//! What a process or a thread has besides memory, registers and descriptors, and most have none
//! of: timers, places in the tree, peculiar settings.

use serde::{Deserialize, Serialize};

/// Timers that send signals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timers {
    /// setitimer(2): ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub interval: [IntervalTimer; 3],
    /// timer_create(2), in order of id.
    pub posix: Vec<PosixTimer>,
}

/// An interval timer. Both 0: not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Nanoseconds to the next signal at the stop; 0 for none.
    pub value: u64,
    /// Nanoseconds from one signal to the next; 0 for a single one.
    pub interval: u64,
}

/// A POSIX timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Id that the process knows it by.
    pub id: i32,
    /// Clock id as it was given, dynamic ones of processes and threads included.
    pub clock: i32,
    /// SIGEV_SIGNAL, SIGEV_NONE or SIGEV_THREAD_ID.
    pub notify: i32,
    /// The signal, 0 with SIGEV_NONE.
    pub signal: i32,
    /// The word that comes with it.
    pub word: u64,
    /// The thread that gets it, with SIGEV_THREAD_ID.
    pub tid: i32,
    /// When.
    pub time: IntervalTimer,
}
