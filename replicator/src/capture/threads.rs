//! Registers and signal state of stopped threads.

use super::CaptureError;
use crate::image::task::IntervalTimer;
use crate::image::{Regs, Rseq, SignalAction, Thread};
use crate::sys::ptrace::{self, reg};
use crate::sys::remote::{Batch, Call, DATA};
use crate::sys::{SysResult, memory};
use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

/// System calls that return EINTR at every stop instead of being restarted by the kernel
/// (signal(7), "Interruption of system calls and library functions by stop signals").
const EINTR_AT_STOP: [i64; 6] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_io_getevents,
];

/// Registers that tell one wait from another; a call leaves them as they are.
const UNCHANGED: [usize; 12] = [
    reg::RIP,
    reg::RSP,
    reg::RBP,
    reg::RBX,
    reg::RDI,
    reg::RSI,
    reg::RDX,
    reg::R8,
    reg::R12,
    reg::R13,
    reg::R14,
    reg::R15,
];
/// Milliseconds above which a time-out is left alone.
const LONGEST_WAIT: i32 = i32::MAX / 2;
/// ERESTART_RESTARTBLOCK of the kernel's linux/errno.h.
const RESTART_BLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);
/// ERESTARTSYS to ERESTART_RESTARTBLOCK of the kernel's linux/errno.h.
const RESTARTS: std::ops::RangeInclusive<i64> = -516..=-512;
const SIGNALS: u8 = 64;
const ACTION_LEN: usize = 32;
/// Places in the scratch data area.
const ACTIONS_AT: u64 = DATA;
const ALTSTACK_AT: u64 = DATA + 0x1000;
const TID_ADDRESS_AT: u64 = DATA + 0x1100;
const TIMERS_AT: u64 = DATA + 0x1200;

/// What is remembered of a thread between stops.
#[derive(Debug, Default)]
pub(super) struct ThreadCache {
    regs: Option<Regs>,
    tid: i32,
    comm: String,
    tid_address: u64,
    altstack: (u64, u64, u64),
}

/// What only the process itself can tell, asked by one batch of calls in its leader.
#[derive(Debug, Default, Clone)]
pub(super) struct Inner {
    pub(super) actions: Vec<SignalAction>,
    pub(super) brk: u64,
    pub(super) dumpable: u8,
    pub(super) timers: [IntervalTimer; 3],
}

/// The threads of one process and what is known of each.
#[derive(Debug, Default)]
pub(super) struct Threads {
    caches: HashMap<i32, ThreadCache>,
    batch: Batch,
}

/// What is remembered of calls that our stops interrupt, by host tid.
#[derive(Debug, Default)]
pub(super) struct Interrupted {
    waits: HashMap<i32, Wait>,
    /// Numbers of calls that the kernel goes on with as restart_syscall(2).
    restarted: HashMap<i32, i64>,
}

/// A wait of epoll_wait(2) that goes on over several stops.
#[derive(Debug)]
struct Wait {
    /// Registers that a call does not change.
    place: [u64; 12],
    /// The time-out that we wrote, in milliseconds: it tells this wait from the next one.
    written: i32,
    until: Instant,
}

impl Interrupted {
    /// Puts a call that our stop lets fail with EINTR back to its start, in a thread that has
    /// just been stopped, so that the program never sees our stops. A call that a signal
    /// interrupts keeps its EINTR: programs count on it. So does one whose time-out is in the
    /// program's memory, where it would begin anew at each stop and never be over.
    pub(super) fn settle(&mut self, tid: i32) -> SysResult<()> {
        let mut regs = ptrace::regs(tid)?;
        let call = regs[reg::ORIG_RAX] as i64;
        if regs[reg::RAX] as i64 == RESTART_BLOCK && call >= 0 && call != libc::SYS_restart_syscall
        {
            self.restarted.insert(tid, call);
        }
        if regs[reg::RAX] as i64 != EINTR || !EINTR_AT_STOP.contains(&call) {
            return Ok(());
        }
        let timeout_in_memory = match call {
            libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => regs[reg::R10] != 0,
            libc::SYS_io_getevents => regs[reg::R8] != 0,
            _ => false,
        };
        if timeout_in_memory {
            return Ok(());
        }
        let blocked = ptrace::blocked(tid)?;
        for of_process in [false, true] {
            for info in ptrace::pending(tid, of_process)? {
                let signal = i32::from_ne_bytes(info[..4].try_into().expect("four bytes"));
                if (1..=64).contains(&signal) && blocked & (1 << (signal - 1)) == 0 {
                    return Ok(());
                }
            }
        }
        if matches!(call, libc::SYS_epoll_wait | libc::SYS_epoll_pwait) {
            self.shorten(tid, &mut regs);
        }
        rewind(&mut regs);
        ptrace::set_regs(tid, &regs)
    }

    /// Leaves a wait that goes on only the time that it has left. It may last up to an epoch
    /// longer than without us, because its beginning is not known, and never shorter.
    fn shorten(&mut self, tid: i32, regs: &mut Regs) {
        let given = regs[reg::R10] as i32;
        // 0 does not wait, below 0 is for ever, and so is a month.
        if given <= 0 || given > LONGEST_WAIT {
            // A wait that we have let run out gives 0, which is no new one.
            return;
        }
        let place = UNCHANGED.map(|at| regs[at]);
        let now = Instant::now();
        let until = match self.waits.get(&tid) {
            Some(wait) if wait.place == place && wait.written == given => wait.until,
            // One more than was given, so that it can be told from the next call.
            _ => now + Duration::from_millis(given as u64 + 1),
        };
        let left = until.saturating_duration_since(now).as_micros().div_ceil(1000) as i32;
        regs[reg::R10] = left as u64;
        self.waits.insert(tid, Wait { place, written: left, until });
    }

    /// Forgets threads that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(i32) -> bool) {
        self.waits.retain(|tid, _| is_there(*tid));
        self.restarted.retain(|tid, _| is_there(*tid));
    }
}

impl Threads {
    /// Captures all threads of a process, leader first, and what the leader says of the process.
    pub(super) fn capture(
        &mut self,
        tids: &[i32],
        interrupted: &Interrupted,
    ) -> Result<(Vec<Thread>, Inner), CaptureError> {
        let mut all = Vec::with_capacity(tids.len());
        let mut inner = Inner::default();
        for (i, &tid) in tids.iter().enumerate() {
            let live = ptrace::regs(tid)?;
            let rseq = ptrace::rseq(tid)?;
            let cache = self.caches.entry(tid).or_default();
            if i == 0 || cache.regs != Some(live) {
                ask_thread(&mut self.batch);
                if i == 0 {
                    ask_process(&mut self.batch);
                }
                let results = run_unnoticed(&mut self.batch, tid, rseq)?;
                let brk = results.get(2).copied().unwrap_or(0);
                let dumpable = results.get(3).copied().unwrap_or(1);
                read_thread(tid, cache)?;
                if i == 0 {
                    inner = read_process(tid, brk as u64, dumpable as u8)?;
                }
            }
            cache.regs = Some(live);
            if cache.tid == 0 {
                cache.tid = inner_tid(tid)?;
            }
            cache.comm = comm(tid, &cache.comm);
            let call = interrupted.restarted.get(&tid).copied();
            all.push(Self::thread(tid, live, call, rseq, cache)?);
        }
        self.caches.retain(|tid, _| tids.contains(tid));
        Ok((all, inner))
    }

    fn thread(
        tid: i32,
        live: Regs,
        restarted: Option<i64>,
        rseq: Option<Rseq>,
        cache: &ThreadCache,
    ) -> SysResult<Thread> {
        let mut regs = live;
        if regs[reg::ORIG_RAX] as i64 >= 0 && RESTARTS.contains(&(regs[reg::RAX] as i64)) {
            // What restart_syscall(2) goes on with stays behind in this kernel: elsewhere the
            // call itself is made again.
            match (regs[reg::ORIG_RAX] as i64, restarted) {
                (libc::SYS_restart_syscall, Some(call)) => {
                    regs[reg::ORIG_RAX] = call as u64;
                    rewind(&mut regs);
                }
                (libc::SYS_restart_syscall, None) => regs[reg::RAX] = EINTR as u64,
                _ => rewind(&mut regs),
            }
        }
        regs[reg::ORIG_RAX] = u64::MAX;
        let mut xstate = Vec::new();
        ptrace::xstate(tid, &mut xstate)?;
        Ok(Thread {
            tid: cache.tid,
            regs,
            xstate,
            blocked: ptrace::blocked(tid)?,
            pending: ptrace::pending(tid, false)?,
            robust_list: ptrace::robust_list(tid)?,
            tid_address: cache.tid_address,
            rseq,
            altstack: cache.altstack,
            comm: cache.comm.clone(),
        })
    }
}

/// Makes a batch of calls in a stopped thread. The kernel forgets a critical section of rseq when
/// it sees our code run in the thread, so its mark is put back afterwards (rseq(2), rseq_cs is at
/// offset 8).
pub(super) fn run_unnoticed(
    batch: &mut Batch,
    tid: i32,
    rseq: Option<Rseq>,
) -> SysResult<Vec<i64>> {
    let mut section = [0u8; 8];
    if let Some(r) = rseq {
        memory::read(tid, r.address + 8, &mut section)?;
    }
    let results = batch.run(tid)?.to_vec();
    if section != [0; 8]
        && let Some(r) = rseq
    {
        memory::write(tid, r.address + 8, &section)?;
    }
    Ok(results)
}

/// Back to the `syscall` instruction (two bytes), with the number of the call in rax.
fn rewind(regs: &mut Regs) {
    regs[reg::RIP] -= 2;
    regs[reg::RAX] = regs[reg::ORIG_RAX];
    regs[reg::ORIG_RAX] = u64::MAX;
}

fn ask_thread(batch: &mut Batch) {
    batch.push(Call::new(libc::SYS_sigaltstack, &[0, ALTSTACK_AT]));
    // PR_GET_TID_ADDRESS
    batch.push(Call::new(libc::SYS_prctl, &[40, TID_ADDRESS_AT]));
}

fn ask_process(batch: &mut Batch) {
    batch.push(Call::new(libc::SYS_brk, &[0]));
    batch.push(Call::new(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE as u64]));
    for signal in 1..=SIGNALS {
        let at = ACTIONS_AT + u64::from(signal - 1) * ACTION_LEN as u64;
        batch.push(Call::new(libc::SYS_rt_sigaction, &[u64::from(signal), 0, at, 8]));
    }
    for which in 0..3 {
        batch.push(Call::new(libc::SYS_getitimer, &[which, TIMERS_AT + which * 32]));
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn read_thread(tid: i32, cache: &mut ThreadCache) -> SysResult<()> {
    let mut bytes = [0u8; 0x108];
    memory::read(tid, ALTSTACK_AT, &mut bytes)?;
    let flags = word(&bytes, 8) & 0xffff_ffff;
    cache.altstack = (word(&bytes, 0), flags, word(&bytes, 16));
    cache.tid_address = word(&bytes, (TID_ADDRESS_AT - ALTSTACK_AT) as usize);
    Ok(())
}

fn read_process(tid: i32, brk: u64, dumpable: u8) -> SysResult<Inner> {
    let mut bytes = [0u8; SIGNALS as usize * ACTION_LEN];
    memory::read(tid, ACTIONS_AT, &mut bytes)?;
    let mut actions = Vec::new();
    for signal in 1..=SIGNALS {
        if i32::from(signal) == libc::SIGKILL || i32::from(signal) == libc::SIGSTOP {
            continue;
        }
        let at = usize::from(signal - 1) * ACTION_LEN;
        let action = SignalAction {
            signal,
            handler: word(&bytes, at),
            flags: word(&bytes, at + 8),
            restorer: word(&bytes, at + 16),
            mask: word(&bytes, at + 24),
        };
        if action.handler != 0 || action.flags != 0 || action.mask != 0 {
            actions.push(action);
        }
    }
    let mut timers = [0u8; 96];
    memory::read(tid, TIMERS_AT, &mut timers)?;
    // struct itimerval: interval, then value, in seconds and microseconds.
    let time = |at| word(&timers, at) * 1_000_000_000 + word(&timers, at + 8) * 1000;
    let timers =
        [0, 32, 64].map(|at| IntervalTimer { interval: time(at), value: time(at + 16) });
    Ok(Inner { actions, brk, dumpable, timers })
}

/// The tid in the innermost pid namespace.
fn inner_tid(tid: i32) -> Result<i32, CaptureError> {
    let path = format!("/proc/{tid}/status");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    text.lines()
        .find_map(|l| l.strip_prefix("NSpid:"))
        .and_then(|l| l.split_whitespace().last())
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| CaptureError::proc(&path, std::io::ErrorKind::InvalidData.into()))
}

fn comm(tid: i32, known: &str) -> String {
    if !known.is_empty() {
        return known.to_owned();
    }
    fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default().trim_end().to_owned()
}
