//! Registers and signal state of stopped threads.

use super::CaptureError;
use super::waits::Interrupted;
use crate::image::task::IntervalTimer;
use crate::image::{Regs, Rseq, SignalAction, Thread};
use crate::sys::ptrace;
use crate::sys::remote::{Batch, Call, DATA};
use crate::sys::{SysResult, memory};
use std::collections::HashMap;
use std::fs;

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
            all.push(Self::thread(tid, live, interrupted, rseq, cache)?);
        }
        self.caches.retain(|tid, _| tids.contains(tid));
        Ok((all, inner))
    }

    fn thread(
        tid: i32,
        live: Regs,
        interrupted: &Interrupted,
        rseq: Option<Rseq>,
        cache: &ThreadCache,
    ) -> SysResult<Thread> {
        let (regs, wait) = interrupted.image(tid, &live);
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
            wait,
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
    let timers = [0, 32, 64].map(|at| IntervalTimer { interval: time(at), value: time(at + 16) });
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
