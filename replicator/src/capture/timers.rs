//! POSIX timers (timer_create(2)): /proc/PID/timers lists them, the process itself tells when
//! they go off.
//!
//! The list is read in the stop, from a file that is kept open (1 us): a timer made since the last
//! look must not be missed. Only a process that has timers is asked for more.

use super::CaptureError;
use super::threads::run_unnoticed;
use crate::image::Thread;
use crate::image::task::{IntervalTimer, PosixTimer};
use crate::sys::memory;
use crate::sys::remote::{Batch, Call, DATA};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Where the times of all timers are written in the scratch area.
const TIMES_AT: u64 = DATA + 0x2000;
/// struct itimerspec: interval, then value, in seconds and nanoseconds.
const TIME_LEN: usize = 32;
/// Most timers of one process: what fits into the scratch area.
const MOST: usize = 4096;

/// The list of one process's timers.
#[derive(Debug)]
pub(super) struct Timers {
    list: File,
    text: Vec<u8>,
}

impl Timers {
    /// Opens the list.
    pub(super) fn open(pid: i32) -> Result<Self, CaptureError> {
        let path = format!("/proc/{pid}/timers");
        let list = File::open(&path).map_err(|e| CaptureError::proc(&path, e))?;
        Ok(Self { list, text: Vec::new() })
    }

    /// The timers of a stopped process with these threads, host numbers first.
    pub(super) fn capture(
        &mut self,
        pid: i32,
        tids: &[i32],
        threads: &[Thread],
        batch: &mut Batch,
    ) -> Result<Vec<PosixTimer>, CaptureError> {
        let path = || format!("/proc/{pid}/timers");
        self.read().map_err(|e| CaptureError::proc(&path(), e))?;
        if self.text.is_empty() {
            return Ok(Vec::new());
        }
        let text = String::from_utf8_lossy(&self.text);
        let inner = |host: i32| tids.iter().position(|t| *t == host).map(|i| threads[i].tid);
        let mut timers = parse(&text, inner)
            .ok_or_else(|| CaptureError::proc(&path(), std::io::ErrorKind::InvalidData.into()))?;
        if timers.len() > MOST {
            return Err(CaptureError::unsupported(
                format!("pid {pid}"),
                format!("it has {} POSIX timers; at most {MOST} are protected", timers.len()),
            ));
        }
        for (i, timer) in timers.iter().enumerate() {
            let at = TIMES_AT + (i * TIME_LEN) as u64;
            batch.push(Call::new(libc::SYS_timer_gettime, &[timer.id as u64, at]));
        }
        let leader = threads.first().and_then(|t| t.rseq);
        run_unnoticed(batch, pid, leader)?;
        let mut times = vec![0; timers.len() * TIME_LEN];
        memory::read(pid, TIMES_AT, &mut times)?;
        for (timer, time) in timers.iter_mut().zip(times.chunks_exact(TIME_LEN)) {
            let word = |i: usize| u64::from_ne_bytes(time[8 * i..8 * i + 8].try_into().expect("8"));
            timer.time = IntervalTimer {
                interval: word(0) * 1_000_000_000 + word(1),
                value: word(2) * 1_000_000_000 + word(3),
            };
        }
        timers.sort_by_key(|t| t.id);
        Ok(timers)
    }

    fn read(&mut self) -> std::io::Result<()> {
        let mut done = 0;
        self.text.resize(self.text.capacity().max(256), 0);
        loop {
            let n = self.list.read_at(&mut self.text[done..], done as u64)?;
            done += n;
            if n == 0 {
                self.text.truncate(done);
                return Ok(());
            }
            if done == self.text.len() {
                self.text.resize(2 * done, 0);
            }
        }
    }
}

/// Four lines a timer, see proc_pid_timers(5). `inner` gives the container's number of a thread.
fn parse(text: &str, inner: impl Fn(i32) -> Option<i32>) -> Option<Vec<PosixTimer>> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            timers.push(PosixTimer { id: value.parse().ok()?, ..PosixTimer::default() });
        }
        let timer = timers.last_mut()?;
        match key {
            "signal" => {
                let (signal, word) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                // A null pointer is written as (null) or (____ptrval____) by some kernels.
                timer.word = u64::from_str_radix(word, 16)
                    .ok()
                    .or_else(|| word.starts_with("(null").then_some(0))?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let (kind, number) = whom.split_once('.')?;
                timer.notify = match (how, kind) {
                    ("none", _) => libc::SIGEV_NONE,
                    ("signal", "tid") => libc::SIGEV_THREAD_ID,
                    ("signal", _) => libc::SIGEV_SIGNAL,
                    _ => return None,
                };
                if timer.notify == libc::SIGEV_THREAD_ID {
                    // Its thread may have ended: then it tells nobody.
                    match inner(number.parse().ok()?) {
                        Some(tid) => timer.tid = tid,
                        None => timer.notify = libc::SIGEV_NONE,
                    }
                }
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => {}
        }
    }
    Some(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_proc_is_understood() {
        let text = "ID: 0\nsignal: 14/0000000000000000\nnotify: signal/pid.77\nClockID: 1\n\
                    ID: 3\nsignal: 34/00007fff86e452a8\nnotify: signal/tid.78\nClockID: -6\n\
                    ID: 4\nsignal: 0/0000000000000001\nnotify: none/pid.77\nClockID: 0\n";
        let timers = parse(text, |host| (host == 78).then_some(2)).expect("well formed");
        let plain = PosixTimer { signal: 14, clock: 1, ..PosixTimer::default() };
        assert_eq!(timers[0], plain);
        let (id, word, tid) = (3, 0x7fff_86e4_52a8, 2);
        let notify = libc::SIGEV_THREAD_ID;
        let second = PosixTimer { id, signal: 34, word, tid, notify, clock: -6, ..plain };
        assert_eq!(timers[1], second);
        assert_eq!((timers[2].id, timers[2].notify, timers[2].word), (4, libc::SIGEV_NONE, 1));
        assert_eq!(parse("", |_| None), Some(vec![]));
        assert_eq!(parse("signal: 1/0\n", |_| None), None);
    }
}
