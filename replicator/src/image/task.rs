//! What a process or a thread has besides memory, registers and descriptors, and most have none
//! of: timers, places in the tree, peculiar settings.

use serde::{Deserialize, Serialize};
use std::time::Duration;

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

impl Timers {
    /// Makes the times count from when the clocks were read, `late` nanoseconds before the timers
    /// were. Never too short, as a timer must not go off early.
    pub fn count_from(&mut self, late: u64) {
        let posix = self.posix.iter_mut().filter(|t| !t.counts_work()).map(|t| &mut t.time);
        let real = &mut self.interval[0];
        for time in posix.chain([real]).filter(|t| t.value != 0) {
            time.value += late;
        }
    }
}

impl PosixTimer {
    /// Whether its clock counts processor time (CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID
    /// and those of clock_getcpuclockid(3)), so that it stands still with the program.
    pub fn counts_work(&self) -> bool {
        self.clock < 0 || matches!(self.clock, 2 | 3)
    }
}

/// A wait with a relative time-out that a thread is in: where its call has the time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Index of the register in [`Regs`](super::Regs).
    pub register: u8,
    /// What the register holds.
    pub unit: TimeUnit,
    /// Nanoseconds left at the stop; none if the memory that the register points to says it.
    pub left: Option<u64>,
}

/// How a system call is given a time-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeUnit {
    /// Milliseconds in a register.
    Milliseconds,
    /// A pointer to struct timespec.
    Timespec,
    /// A pointer to struct timeval.
    Timeval,
}

impl TimeUnit {
    /// Where a structure can be put for a thread with this stack pointer: below its red zone,
    /// where nothing is kept.
    pub fn place(rsp: u64) -> u64 {
        const RED_ZONE: u64 = 128;
        rsp.wrapping_sub(RED_ZONE + 64) & !15
    }

    /// The value for the register, and what to write at `place` if it is a pointer. Rounds up.
    pub fn encode(self, time: Duration, place: u64) -> (u64, Option<[u8; 16]>) {
        let parts = |seconds: u64, rest: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&seconds.to_ne_bytes());
            bytes[8..].copy_from_slice(&rest.to_ne_bytes());
            (place, Some(bytes))
        };
        match self {
            TimeUnit::Milliseconds => {
                let ms = time.as_nanos().div_ceil(1_000_000);
                (u64::try_from(ms).map_or(i32::MAX as u64, |ms| ms.min(i32::MAX as u64)), None)
            }
            TimeUnit::Timespec => parts(time.as_secs(), time.subsec_nanos().into()),
            TimeUnit::Timeval => {
                let us = time.as_nanos().div_ceil(1000);
                parts((us / 1_000_000) as u64, (us % 1_000_000) as u64)
            }
        }
    }

    /// The time in a structure; none if it is not a valid one, or there is no structure.
    pub fn decode(self, bytes: &[u8; 16]) -> Option<Duration> {
        let word =
            |at: usize| i64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (seconds, rest) = (u64::try_from(word(0)).ok()?, u64::try_from(word(8)).ok()?);
        let unit = match self {
            TimeUnit::Milliseconds => return None,
            TimeUnit::Timespec => 1,
            TimeUnit::Timeval => 1000,
        };
        let nanoseconds = rest.checked_mul(unit).filter(|n| *n < 1_000_000_000)?;
        // A time that no clock reaches waits for ever, and must not overflow one either.
        const LONGEST: u64 = 1 << 32;
        (seconds < LONGEST).then(|| Duration::new(seconds, nanoseconds as u32))
    }
}

/// Where a process stands in the tree, beside its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// When it was made, in ticks of the host's clock. With its pid it is one process and no other.
    pub born: u64,
    /// The signal that its parent gets when it ends.
    pub exit_signal: i32,
    /// prctl(2) PR_SET_CHILD_SUBREAPER: orphans among its descendants become its children.
    pub subreaper: bool,
    /// It stands still by job control (SIGSTOP and its like).
    pub stopped: bool,
}

/// A process that has ended and that its parent has not waited for (a zombie).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Pid in the container's namespace.
    pub pid: i32,
    /// Parent's pid.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// When it was made, see [`Place::born`].
    pub born: u64,
    /// See [`Place::exit_signal`].
    pub exit_signal: i32,
    /// How it ended, as wait(2) gives it.
    pub status: i32,
    /// Real user id, which its parent is told.
    pub uid: u32,
    /// Its name.
    pub comm: String,
}

/// Settings of a process that most leave as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSettings {
    /// Root directory as the container's init sees it, if it is another (chroot).
    pub root: Option<String>,
    /// personality(2)
    pub personality: u32,
    /// /proc/PID/oom_score_adj
    pub oom_score_adj: i32,
    /// prctl(2) PR_SET_THP_DISABLE
    pub no_huge_pages: bool,
    /// Registrations of membarrier(2), as MEMBARRIER_CMD_GET_REGISTRATIONS gives them.
    pub membarrier: u32,
}

/// Settings of a thread that most leave as they were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadSettings {
    /// Scheduling class, priority and nice value.
    pub scheduling: Scheduling,
    /// The processors that it may run on as a bit set, if it may not run on all.
    pub processors: Option<Vec<u64>>,
    /// ioprio_set(2)
    pub io_priority: i32,
    /// Timer slack in nanoseconds, prctl(2) PR_SET_TIMERSLACK.
    pub timer_slack: u64,
    /// The signal that it gets when its parent ends, prctl(2) PR_SET_PDEATHSIG.
    pub death_signal: i32,
    /// Its credentials, if they are not those of its process.
    pub creds: Option<super::Credentials>,
    /// Its seccomp filters, the oldest first.
    pub filters: Vec<Filter>,
}

/// A filter of seccomp(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Instructions: struct sock_filter, eight bytes each.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_LOG
    pub log: bool,
}

impl Filter {
    /// Whether it may ask a listener (SECCOMP_RET_USER_NOTIF) what is to happen.
    pub fn asks(&self) -> bool {
        const RETURN_CONSTANT: u16 = 0x06;
        const RETURN_REGISTER: u16 = 0x16;
        const ACTION: u32 = 0xffff_0000;
        const USER_NOTIF: u32 = 0x7fc0_0000;
        self.program.as_chunks::<8>().0.iter().any(|i| {
            let code = u16::from_ne_bytes([i[0], i[1]]);
            let k = u32::from_ne_bytes([i[4], i[5], i[6], i[7]]);
            code == RETURN_REGISTER || (code == RETURN_CONSTANT && k & ACTION == USER_NOTIF)
        })
    }
}

/// struct sched_attr of sched_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after struct sched_attr")]
pub struct Scheduling {
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_ask_are_known() {
        let filter = |code: u16, k: u32| {
            let program = [&code.to_ne_bytes()[..], &[0, 0], &k.to_ne_bytes()].concat();
            Filter { program, log: false }
        };
        assert!(filter(6, 0x7fc0_0000).asks() && filter(6, 0x7fc0_0001).asks());
        assert!(!filter(6, 0x7fff_0000).asks() && !filter(0x20, 0x7fc0_0000).asks());
        assert!(filter(0x16, 0).asks(), "it may be anything");
    }

    #[test]
    fn times_come_back_rounded_up() {
        let time = Duration::new(3, 1_000_001);
        assert_eq!(TimeUnit::Milliseconds.encode(time, 0), (3002, None));
        for (unit, wanted) in
            [(TimeUnit::Timespec, time), (TimeUnit::Timeval, Duration::new(3, 1_001_000))]
        {
            let (at, bytes) = unit.encode(time, 0x4000);
            assert_eq!((at, unit.decode(&bytes.expect("a structure"))), (0x4000, Some(wanted)));
        }
        assert_eq!(TimeUnit::Timespec.decode(&[0xff; 16]), None);
    }
}
