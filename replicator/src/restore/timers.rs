//! Timers that send signals, made again with the time that they have left.

use super::error::{Doing, RestoreError};
use super::script::Script;
use crate::image::Process;
use crate::image::task::{IntervalTimer, PosixTimer, Timers};
use crate::sys::{SysError, SysResult, memory};
use std::time::Duration;

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Ids that a kernel without PR_TIMER_CREATE_RESTORE_IDS (before 6.16) is led past.
const MOST_IDS: i32 = 100_000;

/// Gives a process its timers, through its leader. It has stood still for `elapsed`.
pub(super) fn set(
    script: &mut Script,
    host: i32,
    p: &Process,
    elapsed: Duration,
) -> Result<(), RestoreError> {
    if p.timers == Timers::default() {
        return Ok(());
    }
    let alarm_waits = p.pending.iter().any(|info| info.first() == Some(&(libc::SIGALRM as u8)));
    interval(script, &p.timers.interval, alarm_waits, elapsed);
    script.run_ok(host).doing(p.pid, "set the interval timers")?;
    if p.timers.posix.is_empty() {
        return Ok(());
    }
    posix(script, host, &p.timers.posix, elapsed).doing(p.pid, "create the POSIX timers")
}

fn interval(script: &mut Script, all: &[IntervalTimer; 3], alarm_waits: bool, elapsed: Duration) {
    for (which, timer) in all.iter().enumerate() {
        let mut timer = *timer;
        // The kernel goes on with the real timer when its signal is taken.
        if which == 0 && timer.value == 0 && alarm_waits {
            timer.value = timer.interval;
        }
        if timer.value == 0 {
            continue;
        }
        // The others count processor time, which has not passed.
        let past = if which == 0 { elapsed } else { Duration::ZERO };
        let value = script.words(&words(timer, past, 1000));
        let args = [which as u64, value, 0];
        script.call_on("setitimer", format!("timer {which}"), libc::SYS_setitimer, &args);
    }
}

fn posix(
    script: &mut Script,
    host: i32,
    timers: &[PosixTimer],
    elapsed: Duration,
) -> SysResult<()> {
    // An older kernel says EINVAL and counts the ids up.
    let restore_ids = |on| [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0];
    script.call("prctl", libc::SYS_prctl, &restore_ids(1));
    script.run(host)?;
    for timer in timers {
        create(script, host, timer)?;
        if timer.time.value == 0 {
            continue;
        }
        let past = if timer.counts_work() { Duration::ZERO } else { elapsed };
        let value = script.words(&words(timer.time, past, 1));
        let args = [timer.id as u64, 0, value, 0];
        let object = format!("timer {}", timer.id);
        script.call_on("timer_settime", object, libc::SYS_timer_settime, &args);
        script.run_ok(host)?;
    }
    script.call("prctl", libc::SYS_prctl, &restore_ids(0));
    script.run(host).map(drop)
}

/// Creates a timer that is not set, with its id.
fn create(script: &mut Script, host: i32, timer: &PosixTimer) -> SysResult<()> {
    // struct sigevent: value, signal and notify, thread; 64 bytes.
    let how = u64::from(timer.signal as u32) | (timer.notify as u64) << 32;
    for _ in 0..MOST_IDS {
        let event = script.words(&[timer.word, how, timer.tid as u64, 0, 0, 0, 0, 0]);
        let place = script.data(&timer.id.to_ne_bytes());
        let args = [timer.clock as i64 as u64, event, place];
        let object = format!("timer {}", timer.id);
        script.call_on("timer_create", object, libc::SYS_timer_create, &args);
        script.run_ok(host)?;
        let mut id = [0; 4];
        memory::read(host, place, &mut id)?;
        let id = i32::from_ne_bytes(id);
        if id == timer.id {
            return Ok(());
        }
        script.call("timer_delete", libc::SYS_timer_delete, &[id as u64]);
        script.run_ok(host)?;
        if id > timer.id {
            break;
        }
    }
    let object = format!("id {}, which this kernel does not give", timer.id);
    Err(SysError::errno("timer_create", object, libc::EBUSY))
}

/// struct itimerval or itimerspec: interval and value, each in seconds and parts of `unit`
/// nanoseconds. What should have gone off meanwhile goes off at once.
fn words(timer: IntervalTimer, past: Duration, unit: u64) -> [u64; 4] {
    const SECOND: u64 = 1_000_000_000;
    let left = timer.value.saturating_sub(past.as_nanos() as u64).max(unit);
    [timer.interval / SECOND, timer.interval % SECOND / unit, left / SECOND, left % SECOND / unit]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_overdue_goes_off_at_once_and_nothing_is_switched_off() {
        let timer = IntervalTimer { value: 1_500_000_000, interval: 2_000_000_500 };
        let past = Duration::from_millis(400);
        assert_eq!(words(timer, past, 1), [2, 500, 1, 100_000_000]);
        assert_eq!(words(timer, past, 1000), [2, 0, 1, 100_000]);
        assert_eq!(words(timer, Duration::from_secs(9), 1000), [2, 0, 0, 1]);
        assert_eq!(words(timer, Duration::from_secs(9), 1), [2, 500, 0, 1]);
    }
}
