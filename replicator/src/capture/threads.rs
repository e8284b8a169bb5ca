//! Registers and signal state of stopped threads.
//!
//! Where the kernel can show them at one [`glance`](super::glance), threads and processes are asked
//! only for what has changed.

use super::direct::Reads;
use super::glance::{Task, TaskGlance};
use super::memory::Counts;
use super::waits::Interrupted;
use super::{CaptureError, Glances, process};
use crate::image::task::{Filter, IntervalTimer, Scheduling, ThreadSettings};
use crate::image::{Credentials, Regs, Rseq, SignalAction, Thread};
use crate::sys::remote::{Batch, Call, DATA};
use crate::sys::{SysError, SysResult, memory, ptrace, sched};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;

const SIGNALS: u8 = 64;
const ACTION_LEN: usize = 32;
/// Places in the scratch data area.
const ACTIONS_AT: u64 = DATA;
const ALTSTACK_AT: u64 = DATA + 0x1000;
const TID_ADDRESS_AT: u64 = DATA + 0x1100;
const NAME_AT: u64 = DATA + 0x1110;
const DEATH_SIGNAL_AT: u64 = DATA + 0x1120;
const UIDS_AT: u64 = DATA + 0x1124;
const CAPS_AT: u64 = DATA + 0x1130;
const CAPS_HEADER_AT: u64 = DATA + 0x1150;
const TIME_STAMP_AT: u64 = DATA + 0x1148;
const SUBREAPER_AT: u64 = DATA + 0x1260;
const TIMERS_AT: u64 = DATA + 0x1200;

/// What is remembered of a thread between stops.
#[derive(Debug, Default)]
pub(super) struct ThreadCache {
    regs: Option<Regs>,
    tid: i32,
    comm: String,
    tid_address: u64,
    altstack: (u64, u64, u64),
    death_signal: i32,
    timer_slack: u64,
    securebits: u32,
    /// Real, effective and saved user id, and the effective, permitted and inheritable set.
    rights: ([u32; 3], [u64; 3]),
    filters: Vec<Filter>,
    outside: Option<Outside>,
    name: Option<fs::File>,
    /// What a glance saw when the thread was asked last, and when it was read from outside.
    seen: Vec<u8>,
    seen_outside: Vec<u8>,
    /// Made for the next checkpoint, before its stop.
    ready: Option<Ready>,
}

/// What a checkpoint takes along of a thread: memory that the stop need not ask for. It counts for what it is equal to.
#[derive(Debug)]
struct Ready {
    xstate: Vec<u8>,
    comm: String,
    outside: Outside,
    filters: Vec<Filter>,
}

impl ThreadCache {
    /// Copies of what a checkpoint takes along.
    fn copies(&self) -> Ready {
        Ready {
            xstate: vec![0; ptrace::XSTATE_MAX],
            comm: self.comm.clone(),
            outside: self.outside.clone().unwrap_or_default(),
            filters: self.filters.clone(),
        }
    }

    /// What the thread has said of itself.
    fn answers(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let settings = (self.timer_slack, self.securebits, self.death_signal, self.comm.clone());
        (self.tid_address, self.altstack, settings, self.rights)
    }
}

/// What is read of a thread without its help.
#[derive(Debug, Clone, Default, PartialEq)]
struct Outside {
    scheduling: Scheduling,
    processors: Option<Vec<u64>>,
    io_priority: i32,
}

/// What only the process itself can tell, asked by one batch of calls in its leader.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Inner {
    pub(super) actions: Vec<SignalAction>,
    pub(super) brk: u64,
    pub(super) dumpable: u8,
    pub(super) timers: [IntervalTimer; 3],
    pub(super) group: i32,
    pub(super) session: i32,
    pub(super) personality: u32,
    pub(super) no_huge_pages: bool,
    pub(super) membarrier: u32,
    pub(super) subreaper: bool,
}

/// The threads of one process and what is known of each.
#[derive(Debug, Default)]
pub(super) struct Threads {
    caches: HashMap<i32, ThreadCache>,
    batch: Batch,
    glance: Option<TaskGlance>,
    /// What a glance tells is compared with what there is.
    checked: bool,
    /// What the process said last, and its group and session outside then.
    inner: Inner,
    group: Option<(i32, i32)>,
    /// For the next checkpoint: a list with room for all threads, and what the process has said.
    ready: Option<(Vec<Thread>, Inner)>,
    unasked: usize,
    /// Whether the first of them was asked in the last capture.
    has_asked: bool,
    undoes: bool,
}

impl Threads {
    /// Of the process with this host pid.
    pub(super) fn open(pid: i32, glances: Glances) -> Self {
        let glance = if glances == Glances::Off { None } else { TaskGlance::open(pid) };
        Self { glance, checked: glances == Glances::Checked, ..Self::default() }
    }

    /// Takes a glance at them, if there are any: to be done before [`Threads::capture`]. Gives a
    /// number that is another one once the mappings have changed.
    pub(super) fn glance(&mut self) -> SysResult<Option<u64>> {
        let Some(glance) = &mut self.glance else { return Ok(None) };
        glance.look()?;
        Ok(glance.sequence())
    }

    /// What the kernel has counted of the process's reads by the last glance, or by now where there are
    /// none.
    pub(super) fn reads(&self, pid: i32) -> Option<Reads> {
        self.glance.as_ref().and_then(TaskGlance::reads).or_else(|| process::reads(pid))
    }

    /// Puts what the kernel has counted of the process's faults by the last glance into `out`, if there was
    /// one that shows it.
    pub(super) fn count_faults(&self, out: &mut Counts) {
        match &self.glance {
            Some(glance) => glance.count_faults(out),
            None => out.memory = 0,
        }
    }

    /// Captures all threads of a process, leader first, and what the leader says of the process.
    /// `is_filtered` says of which seccomp filters are to be read.
    pub(super) fn capture(
        &mut self,
        tids: &[i32],
        interrupted: &Interrupted,
        is_filtered: impl Fn(i32) -> bool,
    ) -> Result<(Vec<Thread>, Inner), CaptureError> {
        (self.unasked, self.has_asked) = (0, false);
        let group = tids.first().and_then(|pid| group_and_session(*pid));
        let (mut all, inner) = self.ready.take().unwrap_or_default();
        for (i, &tid) in tids.iter().enumerate() {
            let live = ptrace::regs(tid)?;
            let seen = self.glance.as_ref().and_then(|g| g.task(tid));
            let rseq = match seen.map(|s| s.rseq()) {
                Some((0, ..)) => None,
                Some((address, len, signature)) => Some(Rseq { address, len, signature }),
                None => ptrace::rseq(tid)?,
            };
            let cache = self.caches.entry(tid).or_default();
            let knows = seen.is_some_and(|s| s.answers_as(&cache.seen));
            let unchanged = i > 0
                || group.is_some()
                    && group == self.group
                    && self.glance.as_ref().is_some_and(TaskGlance::is_unchanged);
            let asks = match seen {
                Some(_) => !(knows && unchanged),
                None => i == 0 || cache.regs != Some(live),
            };
            self.unasked += usize::from(!asks);
            if asks || self.checked {
                self.has_asked |= i == 0;
                let asked = ask_thread(&mut self.batch);
                let of_process = (i == 0).then(|| ask_process(&mut self.batch));
                // Version 3 of capget(2).
                memory::write(tid, CAPS_HEADER_AT, &0x2008_0522u64.to_ne_bytes())?;
                let results = run_unnoticed(&mut self.batch, tid, rseq)?;
                let before = (!asks).then(|| (cache.answers(), self.inner.clone()));
                let time_stamp = read_thread(tid, &results[asked..], cache)?;
                if let Some(at) = of_process {
                    self.inner = read_process(tid, &results[at..])?;
                }
                refuse_restricted(tid, time_stamp, &results[asked..])?;
                if let Some(before) = before
                    && before != (cache.answers(), self.inner.clone())
                {
                    let now = (cache.answers(), &self.inner);
                    let why = format!("a glance shows {before:?}, and it is {now:?}");
                    return Err(CaptureError::unsupported(format!("thread {tid}"), why));
                }
                cache.seen.clear();
                if let Some(seen) = seen {
                    cache.seen.extend_from_slice(seen.record);
                }
                if i == 0
                    && let Some(glance) = &mut self.glance
                {
                    glance.remember();
                    self.group = group;
                }
            }
            cache.regs = Some(live);
            if is_filtered(tid) {
                read_filters(tid, &mut cache.filters)?;
            }
            if cache.tid == 0 {
                cache.tid = inner_tid(tid)?;
            }
            let seen = self.glance.as_ref().and_then(|g| g.task(tid));
            if !self.undoes
                && let (Some(glance), Some(seen)) = (&self.glance, seen)
                && glance.undoes(seen)
            {
                self.undoes = true;
                tracing::warn!(tid, "what SEM_UNDO would undo when it ends is not carried over");
            }
            let outside = cache.outside.take();
            let is_known = seen.is_some_and(|s| s.is_outside_as(&cache.seen_outside));
            cache.outside = Some(match outside {
                Some(outside) if is_known && !self.checked => outside,
                before => {
                    let now = Outside::read(tid)?;
                    if is_known && before.as_ref().is_some_and(|before| *before != now) {
                        let why = format!("a glance shows {before:?}, and it is {now:?}");
                        return Err(CaptureError::unsupported(format!("thread {tid}"), why));
                    }
                    cache.seen_outside.clear();
                    cache.seen_outside.extend(seen.iter().flat_map(|s| s.record));
                    now
                }
            });
            all.push(Self::thread(tid, live, interrupted, rseq, cache, seen)?);
        }
        self.caches.retain(|tid, _| tids.contains(tid));
        Ok((all, super::or_copy(inner, &self.inner)))
    }

    /// Before a stop, while they run: makes the memory that its checkpoint takes along.
    pub(super) fn make_ready(&mut self) {
        for cache in self.caches.values_mut().filter(|cache| cache.ready.is_none()) {
            cache.ready = Some(cache.copies());
        }
        let Self { ready, caches, inner, .. } = self;
        ready.get_or_insert_with(|| (Vec::with_capacity(caches.len() + 1), inner.clone()));
    }

    /// Whether one of them has made a semaphore change that is to be undone when it ends.
    pub(super) fn undoes(&self) -> bool {
        self.undoes
    }

    /// Whether the first of them was asked in the last capture. One of the calls that it makes then takes the
    /// lock of its memory (brk(2)).
    pub(super) fn has_asked(&self) -> bool {
        self.has_asked
    }

    /// How many threads were not asked in the last capture.
    pub(super) fn unasked(&self) -> usize {
        self.unasked
    }

    /// Whether a timer of setitimer(2) may have gone off since the last glance.
    pub(super) fn may_go_off(&self) -> bool {
        self.glance.as_ref().is_none_or(TaskGlance::may_go_off)
    }

    /// Whether a glance tells that /proc would say of the process what it did when
    /// [`Threads::remember_outside`] was last called.
    pub(super) fn is_unchanged_outside(&self) -> bool {
        self.glance.as_ref().is_some_and(TaskGlance::is_unchanged_outside)
    }

    /// Whether glances tell of changes, and are believed.
    pub(super) fn shows_settings(&self) -> bool {
        self.glance.is_some() && !self.checked
    }

    /// All that /proc says of the process has just been read, in a stop.
    pub(super) fn remember_outside(&mut self) {
        if let Some(glance) = &mut self.glance {
            glance.remember_outside();
        }
    }

    /// Before the stop: names, which others can change while a thread sleeps.
    pub(super) fn look_ahead(&mut self) -> Result<(), CaptureError> {
        for (&tid, cache) in &mut self.caches {
            let path = || format!("/proc/{tid}/comm");
            let failed = |e| CaptureError::proc(&path(), e);
            if cache.name.is_none() {
                cache.name = Some(fs::File::open(path()).map_err(failed)?);
            }
            let mut name = [0; 32];
            let file = cache.name.as_ref().expect("just opened");
            let n = file.read_at(&mut name, 0).map_err(failed)?;
            cache.comm.clear();
            cache.comm.push_str(String::from_utf8_lossy(&name[..n]).trim_end_matches('\n'));
        }
        Ok(())
    }

    /// Whether the leader has other rights than these: they were read before the stop.
    pub(super) fn are_stale(&self, pid: i32, creds: &Credentials) -> bool {
        self.caches.get(&pid).is_none_or(|c| c.rights != rights_of(creds))
    }

    /// Adds the credentials of threads whose rights are not those of their process.
    pub(super) fn add_credentials(
        &self,
        tids: &[i32],
        (of_process, securebits): (&Credentials, u32),
        threads: &mut [Thread],
    ) -> Result<(), CaptureError> {
        let usual = rights_of(of_process);
        for (tid, thread) in tids.iter().zip(threads).skip(1) {
            let Some(cache) = self.caches.get(tid) else { continue };
            if cache.rights != usual || cache.securebits != securebits {
                let creds = process::credentials(*tid)?;
                let creds = Credentials { securebits: cache.securebits, ..creds };
                let usual = Credentials { securebits, ..of_process.clone() };
                thread.settings.creds = (creds != usual).then_some(creds);
            }
        }
        Ok(())
    }

    /// Of a thread that was captured.
    pub(super) fn securebits(&self, tid: i32) -> u32 {
        self.caches.get(&tid).map_or(0, |c| c.securebits)
    }

    fn thread(
        tid: i32,
        live: Regs,
        interrupted: &Interrupted,
        rseq: Option<Rseq>,
        cache: &mut ThreadCache,
        seen: Option<Task<'_>>,
    ) -> SysResult<Thread> {
        let (regs, wait) = interrupted.image(tid, &live);
        let ready = cache.ready.take().unwrap_or_else(|| cache.copies());
        let Ready { mut xstate, comm, outside, filters } = ready;
        ptrace::xstate(tid, &mut xstate)?;
        let outside = match &cache.outside {
            Some(now) => super::or_copy(outside, now),
            None => Outside::default(),
        };
        // They come and never go.
        let filters =
            if filters.len() == cache.filters.len() { filters } else { cache.filters.clone() };
        let robust_list = match seen {
            Some(seen) => seen.robust_list(),
            None => ptrace::robust_list(tid)?,
        };
        let pending = match seen {
            Some(seen) if seen.nothing_pends() => Vec::new(),
            _ => ptrace::pending(tid, false)?,
        };
        Ok(Thread {
            tid: cache.tid,
            regs,
            xstate,
            blocked: ptrace::blocked(tid)?,
            pending,
            robust_list,
            tid_address: cache.tid_address,
            rseq,
            altstack: cache.altstack,
            comm: super::or_copy(comm, &cache.comm),
            wait,
            settings: ThreadSettings {
                scheduling: outside.scheduling,
                processors: outside.processors,
                io_priority: outside.io_priority,
                timer_slack: cache.timer_slack,
                death_signal: cache.death_signal,
                creds: None,
                filters,
            },
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

/// Reads the seccomp filters of a thread that are not known yet. They come and never go, but that
/// those of another thread can take their place with more behind them (TSYNC).
fn read_filters(tid: i32, known: &mut Vec<Filter>) -> Result<(), CaptureError> {
    let unread = |e: SysError| match e.code() {
        libc::EMEDIUMTYPE => {
            let why = "it has a seccomp filter that is no classic BPF program; run it without";
            CaptureError::unsupported(format!("tid {tid}"), why.into())
        }
        _ => e.into(),
    };
    while ptrace::has_filter(tid, known.len())? {
        let (program, log) = ptrace::filter(tid, known.len()).map_err(unread)?;
        let filter = Filter { program, log };
        if filter.asks() {
            let why = "it has a seccomp filter that asks a listener (SECCOMP_RET_USER_NOTIF); run it \
                       without";
            return Err(CaptureError::unsupported(format!("tid {tid}"), why.into()));
        }
        known.push(filter);
    }
    Ok(())
}

impl Outside {
    fn read(tid: i32) -> SysResult<Self> {
        let processors = sched::processors(tid)?;
        let all = processors.iter().map(|w| w.count_ones()).sum::<u32>() >= sched::online();
        Ok(Self {
            scheduling: sched::attributes(tid)?,
            processors: (!all).then_some(processors),
            io_priority: sched::io_priority(tid)?,
        })
    }
}

fn rights_of(creds: &Credentials) -> ([u32; 3], [u64; 3]) {
    let [real, effective, saved, _] = creds.uids;
    let [inheritable, permitted, effective_caps, ..] = creds.caps;
    ([real, effective, saved], [effective_caps, permitted, inheritable])
}

/// Gives the index of the first result.
fn ask_thread(batch: &mut Batch) -> usize {
    let prctl = |batch: &mut Batch, option: i32, at| {
        batch.push(Call::new(libc::SYS_prctl, &[option as u64, at]))
    };
    const PR_GET_TID_ADDRESS: i32 = 40;
    let first = prctl(batch, libc::PR_GET_TIMERSLACK, 0);
    prctl(batch, libc::PR_GET_SECUREBITS, 0);
    batch.push(Call::new(libc::SYS_sigaltstack, &[0, ALTSTACK_AT]));
    prctl(batch, PR_GET_TID_ADDRESS, TID_ADDRESS_AT);
    prctl(batch, libc::PR_GET_NAME, NAME_AT);
    prctl(batch, libc::PR_GET_PDEATHSIG, DEATH_SIGNAL_AT);
    let ids = [UIDS_AT, UIDS_AT + 4, UIDS_AT + 8];
    batch.push(Call::new(libc::SYS_getresuid, &ids));
    batch.push(Call::new(libc::SYS_capget, &[CAPS_HEADER_AT, CAPS_AT]));
    prctl(batch, libc::PR_GET_TSC, TIME_STAMP_AT);
    batch.push(Call::new(libc::SYS_prctl, &[PR_GET_MDWE, 0, 0, 0, 0]));
    batch.push(Call::new(libc::SYS_arch_prctl, &[ARCH_GET_CPUID, 0]));
    first
}

const PR_GET_MDWE: u64 = 66;
const ARCH_GET_CPUID: u64 = 0x1011;

/// Refuses a thread for which the processor or the memory does less than usual. `results` are those
/// of [`ask_thread`].
fn refuse_restricted(tid: i32, time_stamp: i32, results: &[i64]) -> Result<(), CaptureError> {
    let forbidden = [
        (time_stamp == libc::PR_TSC_SIGSEGV, "the time stamp counter (PR_SET_TSC)"),
        (results[9] > 0, "memory that becomes executable (PR_SET_MDWE)"),
        (results[10] == 0, "the instruction CPUID (ARCH_SET_CPUID)"),
    ];
    match forbidden.into_iter().find(|(is, _)| *is) {
        Some((_, what)) => {
            let why =
                format!("{what} is forbidden to it, which is not carried over; run it without");
            Err(CaptureError::unsupported(format!("thread {tid}"), why))
        }
        None => Ok(()),
    }
}

/// Gives the index of the first result.
fn ask_process(batch: &mut Batch) -> usize {
    const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
    let prctl = |option: i32, at| Call::new(libc::SYS_prctl, &[option as u64, at, 0, 0, 0]);
    let first = batch.push(Call::new(libc::SYS_brk, &[0]));
    batch.push(prctl(libc::PR_GET_DUMPABLE, 0));
    batch.push(Call::new(libc::SYS_getpgid, &[0]));
    batch.push(Call::new(libc::SYS_getsid, &[0]));
    batch.push(Call::new(libc::SYS_personality, &[0xffff_ffff]));
    batch.push(prctl(libc::PR_GET_THP_DISABLE, 0));
    batch.push(Call::new(libc::SYS_membarrier, &[MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0]));
    batch.push(prctl(libc::PR_GET_CHILD_SUBREAPER, SUBREAPER_AT));
    for signal in 1..=SIGNALS {
        let at = ACTIONS_AT + u64::from(signal - 1) * ACTION_LEN as u64;
        batch.push(Call::new(libc::SYS_rt_sigaction, &[u64::from(signal), 0, at, 8]));
    }
    for which in 0..3 {
        batch.push(Call::new(libc::SYS_getitimer, &[which, TIMERS_AT + which * 32]));
    }
    first
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// `results` are those of [`ask_thread`]. Gives what PR_GET_TSC says.
fn read_thread(tid: i32, results: &[i64], cache: &mut ThreadCache) -> SysResult<i32> {
    let mut bytes = [0u8; (CAPS_HEADER_AT - ALTSTACK_AT) as usize];
    memory::read(tid, ALTSTACK_AT, &mut bytes)?;
    let at = |place: u64| (place - ALTSTACK_AT) as usize;
    let half = |place: u64| {
        u32::from_ne_bytes(bytes[at(place)..at(place) + 4].try_into().expect("four bytes"))
    };
    let flags = word(&bytes, 8) & 0xffff_ffff;
    cache.altstack = (word(&bytes, 0), flags, word(&bytes, 16));
    cache.tid_address = word(&bytes, at(TID_ADDRESS_AT));
    cache.timer_slack = results[0] as u64;
    cache.securebits = results[1] as u32;
    let name = &bytes[at(NAME_AT)..at(NAME_AT) + 16];
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    cache.comm = String::from_utf8_lossy(&name[..end]).into_owned();
    cache.death_signal = half(DEATH_SIGNAL_AT) as i32;
    let ids = [UIDS_AT, UIDS_AT + 4, UIDS_AT + 8].map(half);
    // Effective, permitted and inheritable, first the low halves, then the high ones.
    let set =
        |i: u64| u64::from(half(CAPS_AT + 4 * i)) | u64::from(half(CAPS_AT + 12 + 4 * i)) << 32;
    cache.rights = (ids, [0, 1, 2].map(set));
    Ok(half(TIME_STAMP_AT) as i32)
}

/// `results` are those of [`ask_process`].
fn read_process(tid: i32, results: &[i64]) -> SysResult<Inner> {
    let &[brk, dumpable, group, session, personality, no_huge_pages, membarrier, ..] = results
    else {
        return Err(SysError::errno("remote system calls", format!("tid {tid}"), libc::EIO));
    };
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
    let mut subreaper = [0; 4];
    memory::read(tid, SUBREAPER_AT, &mut subreaper)?;
    Ok(Inner {
        actions,
        brk: brk as u64,
        dumpable: dumpable as u8,
        timers,
        group: group as i32,
        session: session as i32,
        personality: personality as u32,
        no_huge_pages: no_huge_pages == 1,
        membarrier: membarrier.max(0) as u32,
        subreaper: subreaper != [0; 4],
    })
}

/// Process group and session by their numbers here.
fn group_and_session(pid: i32) -> Option<(i32, i32)> {
    let pid = nix::unistd::Pid::from_raw(pid);
    let (group, session) = (nix::unistd::getpgid(Some(pid)), nix::unistd::getsid(Some(pid)));
    Some((group.ok()?.as_raw(), session.ok()?.as_raw()))
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
