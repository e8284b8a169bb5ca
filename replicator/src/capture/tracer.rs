//! The threads of a container under ptrace: seized once, stopped and let go at every epoch.
//!
//! Everything here happens on one OS thread, the *stop thread*, because ptrace binds tracees to
//! the thread that seized them. New threads and processes are seized by the kernel as they
//! appear (PTRACE_O_TRACECLONE and its kin); signals pass through on their way.

mod haste;

use super::CaptureError;
use crate::sys::ptrace::{self, Heard, Status};
use crate::sys::{SysError, SysResult};
use haste::Haste;
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

/// The container dies with the agent that traces it, so that a crashed agent leaves no
/// unprotected container behind.
const OPTIONS: i32 = libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEVFORKDONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

/// The same for a tree that must not end with its tracer: a one-shot checkpoint is an episode.
const GENTLE: i32 = OPTIONS & !libc::PTRACE_O_EXITKILL;

/// How long a thread of such a tree may take to stop before the others are let go again.
const VFORK_PATIENCE: Duration = Duration::from_millis(100);

/// Signals that the kernel sends a thread for what it has just done itself.
const FAULTS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// Between two looks at a thread that may never report.
const PAUSE: std::time::Duration = std::time::Duration::from_micros(20);
/// So many of them are a while.
const PAUSES: usize = 25;

#[derive(Debug)]
struct Traced {
    process: i32,
    stopped: bool,
    in_vfork: bool,
    /// It stands still by job control and must go on doing so.
    halted: bool,
    /// It has seccomp filters, which do not count while it is stopped.
    filtered: bool,
}

/// What [`Tracer::pump`] and [`Tracer::freeze`] found out about the tree of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// A process appeared.
    Started(i32),
    /// A process replaced its program: its address space is new.
    Executed(i32),
    /// A process is gone.
    Ended(i32, Status),
}

/// The seized threads of one container, by host tid.
#[derive(Debug)]
pub(super) struct Tracer {
    threads: BTreeMap<i32, Traced>,
    changes: Vec<Change>,
    options: i32,
    haste: Haste,
}

impl Tracer {
    /// A tracer of no thread.
    pub(super) fn new() -> Self {
        Self {
            threads: BTreeMap::new(),
            changes: Vec::new(),
            options: OPTIONS,
            haste: Haste::default(),
        }
    }

    /// A tracer whose threads outlive it.
    pub(super) fn gentle() -> Self {
        Self { options: GENTLE, ..Self::new() }
    }

    /// Whether its threads outlive it.
    pub(super) fn is_gentle(&self) -> bool {
        self.options == GENTLE
    }

    /// Seizes all threads of a process that runs. Repeats until no unseized thread is left.
    pub(super) fn seize(&mut self, pid: i32) -> SysResult<()> {
        loop {
            let mut found = false;
            for tid in tids(pid)? {
                if self.threads.contains_key(&tid) {
                    continue;
                }
                match ptrace::seize(tid, self.options) {
                    Ok(()) => found = true,
                    Err(e) if e.is_gone() => continue,
                    Err(e) if e.code() == libc::EPERM && tid != pid && has_ended(pid, tid) => {
                        continue;
                    }
                    // Born of one that was seized already: its birth is still to be heard of.
                    Err(e)
                        if e.code() == libc::EPERM && !self.threads.is_empty() && is_ours(tid) =>
                    {
                        continue;
                    }
                    Err(e) => return Err(e),
                }
                self.insert(tid, pid);
            }
            if !found {
                return Ok(());
            }
        }
    }

    /// Takes over threads that the calling thread has seized already and that run.
    pub(super) fn adopt_running(&mut self, pid: i32, tids: &[i32]) {
        for &tid in tids {
            self.insert(tid, pid);
        }
    }

    fn insert(&mut self, tid: i32, process: i32) {
        self.threads.insert(
            tid,
            Traced { process, stopped: false, in_vfork: false, halted: false, filtered: false },
        );
        if tid == process {
            self.changes.push(Change::Started(process));
        }
    }

    /// Host tids of a process, leader first.
    pub(super) fn threads_of(&self, pid: i32) -> Vec<i32> {
        let mut all = Vec::new();
        self.list_threads(pid, &mut all);
        all
    }

    /// Host pid of the process that a thread is of.
    pub(super) fn process_of(&self, tid: i32) -> Option<i32> {
        self.threads.get(&tid).map(|t| t.process)
    }

    /// Puts the same into `out`.
    pub(super) fn list_threads(&self, pid: i32, out: &mut Vec<i32>) {
        out.clear();
        out.extend(self.threads.contains_key(&pid).then_some(pid));
        let others = self.threads.iter().filter(|(t, i)| i.process == pid && **t != pid);
        out.extend(others.map(|(t, _)| *t));
    }

    /// Whether this holds for the processes of all threads.
    pub(super) fn is_of(&self, holds: impl Fn(i32) -> bool) -> bool {
        self.threads.values().all(|t| holds(t.process))
    }

    /// Host pids of all processes.
    pub(super) fn processes(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.threads.values().map(|t| t.process).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Host tids of all threads.
    pub(super) fn all(&self) -> Vec<i32> {
        self.threads.keys().copied().collect()
    }

    /// Whether this thread is one of them.
    pub(super) fn has(&self, tid: i32) -> bool {
        self.threads.contains_key(&tid)
    }

    /// Number of threads in all.
    pub(super) fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether none is left.
    pub(super) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// What changed since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Handles all events that wait, without waiting for more. Call it at each SIGCHLD while
    /// the container runs: its signals, clones and forks wait for it.
    pub(super) fn pump(&mut self) -> SysResult<()> {
        while let Some((tid, status)) = ptrace::next_event()? {
            ignore_gone(self.running_event(tid, status))?;
        }
        Ok(())
    }

    fn running_event(&mut self, tid: i32, status: Status) -> SysResult<()> {
        match status {
            Status::Stopped { signal, event } => {
                self.learn(tid)?;
                match event {
                    0 => return self.deliver(tid, signal),
                    libc::PTRACE_EVENT_STOP if is_stop_signal(signal) => {
                        return ptrace::listen(tid);
                    }
                    _ => self.note_event(tid, event)?,
                }
                ptrace::cont(tid, 0)
            }
            end => {
                self.forget(tid, end);
                Ok(())
            }
        }
    }

    /// Lets a signal reach its thread. The kernel spares the first process of a pid namespace
    /// from dying by a fault of its own as long as it is traced, and lets it fault again for ever
    /// (force_sig_info_to_task of kernel/signal.c); without us it would die, so it dies.
    fn deliver(&self, tid: i32, signal: i32) -> SysResult<()> {
        if FAULTS.contains(&signal)
            && let Some(process) = self.threads.get(&tid).map(|t| t.process)
            && ptrace::signal_code(tid)? > 0
            && is_fatal_for_init(tid, signal)?
        {
            tracing::error!(
                pid = process,
                tid,
                signal,
                "the container's first process has crashed"
            );
            let pid = nix::unistd::Pid::from_raw(process);
            return nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .map_err(|e| SysError::errno("kill", format!("pid {process}"), e as i32));
        }
        ptrace::cont(tid, signal)
    }

    /// Registers a thread that the kernel seized for us.
    fn learn(&mut self, tid: i32) -> SysResult<()> {
        if !self.threads.contains_key(&tid) {
            let process = process_of(tid)?;
            self.insert(tid, process);
        }
        Ok(())
    }

    fn note_event(&mut self, tid: i32, event: i32) -> SysResult<()> {
        if matches!(
            event,
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK
        ) {
            // Known from now on, though its own first stop may be yet to come: a freeze must
            // not miss it.
            let new = ptrace::event_message(tid)? as i32;
            ignore_gone(self.learn(new))?;
            self.haste.made(tid, new);
        }
        match event {
            libc::PTRACE_EVENT_VFORK => {
                self.threads.entry(tid).and_modify(|t| t.in_vfork = true);
            }
            libc::PTRACE_EVENT_VFORK_DONE => {
                self.threads.entry(tid).and_modify(|t| t.in_vfork = false);
            }
            libc::PTRACE_EVENT_EXEC => {
                let former = ptrace::event_message(tid)? as i32;
                if former != tid {
                    self.threads.remove(&former);
                    self.haste.renamed(former, tid);
                }
                self.threads.retain(|t, i| i.process != tid || *t == tid);
                self.changes.push(Change::Executed(tid));
            }
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, tid: i32, status: Status) {
        if self.threads.remove(&tid).is_some_and(|t| t.process == tid) {
            self.changes.push(Change::Ended(tid, status));
        }
    }

    /// Stops every thread. On an error too, whoever has stopped by then stands still until
    /// [`Tracer::thaw`]: the caller sees to its interrupted call first.
    pub(super) fn freeze(&mut self) -> Result<(), CaptureError> {
        if self.threads.values().any(|t| t.in_vfork) {
            return Err(CaptureError::Transient("a thread waits in vfork"));
        }
        for (&tid, thread) in &self.threads {
            if !thread.stopped {
                ignore_gone(ptrace::interrupt(tid))?;
            }
        }
        if !self.is_gentle() {
            self.haste.begin();
        }
        let stopped = self.wait_for_all();
        self.haste.end();
        stopped?;
        if self.threads.is_empty() {
            return Err(CaptureError::Ended);
        }
        if self.threads.values().any(|t| t.in_vfork) {
            return Err(CaptureError::Transient("a thread has just called vfork"));
        }
        self.suspend_filters()?;
        Ok(())
    }

    fn wait_for_all(&mut self) -> Result<(), CaptureError> {
        // A thread made meanwhile appears in the table while its maker is waited for. Leaders come
        // last: the kernel tells the end of one only when its other threads have been waited for.
        loop {
            // A thread in vfork does not stop before its child goes on.
            let left = || self.threads.iter().filter(|(_, t)| !t.stopped && !t.in_vfork);
            let Some(first) = left().next().map(|(tid, _)| *tid) else { break };
            let other = left().find(|(tid, t)| t.process != **tid);
            match other.map(|(tid, _)| *tid) {
                Some(tid) => self.wait_stopped(tid)?,
                None if self.threads.values().filter(|t| t.process == first).nth(1).is_some() => {
                    self.wait_leader(first)?;
                }
                None => self.wait_stopped(first)?,
            }
        }
        Ok(())
    }

    /// It was waited for a while: whoever has not stopped may have no processor.
    fn hurry(&mut self) {
        let Self { threads, haste, .. } = self;
        let stopped = threads.values().filter(|t| t.stopped).count();
        let left = threads.iter().filter(|(_, t)| !t.stopped && !t.in_vfork);
        haste.look(stopped, left.map(|(tid, _)| *tid));
    }

    /// What we call in a thread is not what its filters are about: they do not count in a stop.
    fn suspend_filters(&mut self) -> SysResult<()> {
        for (&tid, thread) in &mut self.threads {
            if ptrace::has_filter(tid, 0)? {
                ptrace::set_options(tid, self.options | ptrace::SUSPEND_SECCOMP)?;
                thread.filtered = true;
            }
        }
        Ok(())
    }

    /// Whether a stopped thread has seccomp filters.
    pub(super) fn is_filtered(&self, tid: i32) -> bool {
        self.threads.get(&tid).is_some_and(|t| t.filtered)
    }

    /// Host tids of the threads that are stopped.
    pub(super) fn stopped(&self) -> impl Iterator<Item = i32> + use<'_> {
        self.threads.iter().filter(|(_, t)| t.stopped).map(|(tid, _)| *tid)
    }

    /// Waits for the leader of a process whose other threads have stopped. It may have ended
    /// alone: then nothing comes, for as long as they live. If the process is killed now, it is the others
    /// whose end must be noted first: the first process of a pid namespace waits for that in the kernel.
    fn wait_leader(&mut self, tid: i32) -> Result<(), CaptureError> {
        let begin = Instant::now();
        loop {
            match self.event_or_a_while()? {
                Heard::Event(of, status) => {
                    if of != tid && matches!(status, Status::Stopped { .. }) {
                        ignore_gone(self.learn(of))?;
                    }
                    // Whoever it was, the caller looks who is left.
                    if self.handle_in_freeze(of, status)? {
                        return Ok(());
                    }
                }
                Heard::Nothing | Heard::NoTracee => {
                    self.hurry();
                    if self.has_ended_alone(tid)? {
                        return Err(leader_has_ended(tid));
                    }
                    self.give_up_on_vfork(begin)?;
                }
            }
        }
    }

    /// The next event of any thread, if there is one within a while.
    fn event_or_a_while(&self) -> SysResult<Heard> {
        if self.haste.rings() {
            let heard = ptrace::wait_any()?;
            if heard != Heard::NoTracee {
                return Ok(heard);
            }
        }
        for _ in 0..PAUSES {
            if let Some((tid, status)) = ptrace::next_event()? {
                return Ok(Heard::Event(tid, status));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(Heard::Nothing)
    }

    /// Whether a leader has ended and the other threads of its process live on: stopped, as they were. A
    /// kill lets them run, to their end.
    fn has_ended_alone(&self, leader: i32) -> SysResult<bool> {
        if state_of(leader)?.is_some_and(|s| s != 'Z') {
            return Ok(false);
        }
        for tid in self.threads_of(leader).into_iter().filter(|tid| *tid != leader) {
            // Traced, or by job control as well.
            if !matches!(state_of(tid)?, Some('t' | 'T')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A thread may have called vfork before we came: then it waits for a child that we have stopped.
    fn give_up_on_vfork(&self, begin: Instant) -> Result<(), CaptureError> {
        if self.is_gentle() && begin.elapsed() > VFORK_PATIENCE {
            return Err(CaptureError::Transient("a thread does not stop"));
        }
        Ok(())
    }

    fn wait_stopped(&mut self, tid: i32) -> Result<(), CaptureError> {
        let begin = Instant::now();
        loop {
            if self.is_gentle() && ptrace::poll(tid)?.is_none() {
                self.give_up_on_vfork(begin)?;
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            let (of, status) = match ptrace::wait_now(tid)? {
                Some(status) => (tid, status),
                // One that dies may wait for the end of another one to be noted.
                None => match ptrace::wait_any()? {
                    Heard::Event(of, status) => (of, status),
                    Heard::NoTracee => (tid, Status::Exited(0)),
                    Heard::Nothing => {
                        self.hurry();
                        continue;
                    }
                },
            };
            if of != tid && matches!(status, Status::Stopped { .. }) {
                ignore_gone(self.learn(of))?;
            }
            // Whoever it was, the caller looks who is left.
            if self.handle_in_freeze(of, status)? {
                return Ok(());
            }
        }
    }

    /// Sees to an event of a thread that is to stop. Says whether nothing more is to be
    /// waited for: it has stopped, ended, or called vfork.
    fn handle_in_freeze(&mut self, tid: i32, status: Status) -> Result<bool, CaptureError> {
        match status {
            Status::Stopped { signal, event: libc::PTRACE_EVENT_STOP } => {
                if let Some(t) = self.threads.get_mut(&tid) {
                    t.stopped = true;
                    t.halted = is_stop_signal(signal);
                }
                return Ok(true);
            }
            Status::Stopped { signal, event: 0 } => {
                // Any other stop swallows the interrupt: ask again.
                ignore_gone(ptrace::interrupt(tid))?;
                ignore_gone(self.deliver(tid, signal))?;
            }
            Status::Stopped { event, .. } => {
                ignore_gone(ptrace::interrupt(tid))?;
                self.note_event(tid, event)?;
                ignore_gone(ptrace::cont(tid, 0))?;
                return Ok(event == libc::PTRACE_EVENT_VFORK);
            }
            end => {
                self.forget(tid, end);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lets every stopped thread go on. One that stands still by job control goes on doing so.
    pub(super) fn thaw(&mut self) -> SysResult<()> {
        for (&tid, thread) in &mut self.threads {
            if std::mem::take(&mut thread.stopped) {
                if std::mem::take(&mut thread.filtered) {
                    ignore_gone(ptrace::set_options(tid, self.options))?;
                }
                let go_on = if thread.halted { halt } else { |tid| ptrace::cont(tid, 0) };
                ignore_gone(go_on(tid))?;
            }
        }
        Ok(())
    }

    /// Whether a stopped process stands still by job control, or is about to: one of its threads is
    /// there already.
    pub(super) fn is_halted(&self, pid: i32) -> bool {
        self.threads.values().any(|t| t.halted && t.process == pid)
    }

    /// Lets the container go for good: it runs on without a tracer.
    pub(super) fn detach(&mut self) -> SysResult<()> {
        // Those that stand still first: one in vfork stops only when its child goes on.
        for (&tid, _) in self.threads.iter().filter(|(_, t)| t.stopped) {
            ignore_gone(ptrace::detach(tid, 0))?;
        }
        let running = self.threads.iter().filter(|(_, t)| !t.stopped);
        let mut left: Vec<i32> = running.map(|(tid, _)| *tid).collect();
        for &tid in &left {
            ignore_gone(ptrace::interrupt(tid))?;
        }
        // In any order, for the same reason: its child may be one of these.
        while !left.is_empty() {
            for tid in std::mem::take(&mut left) {
                let signal = match ptrace::poll_wait(tid)? {
                    Some((_, Status::Stopped { signal, event: 0 })) => signal,
                    Some(_) => 0,
                    // The end of a main thread is not told while others run.
                    None if state_of(tid)?.is_none_or(|s| s == 'Z') => 0,
                    None => {
                        left.push(tid);
                        continue;
                    }
                };
                ignore_gone(ptrace::detach(tid, signal))?;
            }
            std::thread::sleep(PAUSE);
        }
        self.threads.clear();
        Ok(())
    }
}

/// What cannot be told apart from a process that has ended, but for its other threads.
pub(super) fn leader_has_ended(pid: i32) -> CaptureError {
    let reason = "its main thread has ended while others run; end the process with it";
    CaptureError::unsupported(format!("pid {pid}"), reason.into())
}

/// Puts a thread back into its group stop. PTRACE_LISTEN wants it in the stop that the kernel
/// reported; if it has made calls for us since, it is led there again.
fn halt(tid: i32) -> SysResult<()> {
    match ptrace::listen(tid) {
        Err(e) if e.code() == libc::EIO => {}
        other => return other,
    }
    ptrace::interrupt(tid)?;
    ptrace::cont(tid, 0)?;
    match ptrace::wait(tid)? {
        Status::Stopped { signal, event: libc::PTRACE_EVENT_STOP } if is_stop_signal(signal) => {
            ptrace::listen(tid)
        }
        // SIGCONT has come meanwhile.
        Status::Stopped { signal, event: 0 } => ptrace::cont(tid, signal),
        Status::Stopped { .. } => ptrace::cont(tid, 0),
        _ => Ok(()),
    }
}

/// The letter of a thread's state in /proc/TID/stat; none if it is gone.
fn state_of(tid: i32) -> SysResult<Option<char>> {
    let path = format!("/proc/{tid}/stat");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.rfind(')').and_then(|at| text[at + 2..].chars().next())),
        // Its end may also come while it is read.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(source) => Err(SysError { call: "read", object: path, source }),
    }
}

fn is_stop_signal(signal: i32) -> bool {
    matches!(signal, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU)
}

/// A thread that is gone is noticed when its end is waited for.
fn ignore_gone(r: SysResult<()>) -> SysResult<()> {
    match r {
        Err(e) if e.is_gone() || e.code() == libc::ENOENT => Ok(()),
        other => other,
    }
}

/// Tids of a process, from /proc/PID/task.
pub(super) fn tids(pid: i32) -> SysResult<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    let failed = |source| SysError { call: "read", object: path.clone(), source };
    let mut all = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        all.extend(name.to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    Ok(all)
}

/// Whether a thread has ended, or is ending so that it cannot be seized any more.
pub(super) fn has_ended(pid: i32, tid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"));
    stat.ok().is_none_or(|s| s.rsplit_once(") ").is_none_or(|(_, s)| s.starts_with(['Z', 'X'])))
}

/// Whether the calling thread traces a thread.
fn is_ours(tid: i32) -> bool {
    tracer_of(tid) == Some(nix::unistd::gettid().as_raw())
}

/// Whether a thread lives and nobody traces it.
pub(super) fn has_none(tid: i32) -> bool {
    status_of(tid).is_ok_and(|text| field(&text, "TracerPid:") == Some("0"))
}

/// Who traces a thread, if anybody.
fn tracer_of(tid: i32) -> Option<i32> {
    let text = status_of(tid).ok()?;
    field(&text, "TracerPid:").and_then(|v| v.parse().ok()).filter(|tracer| *tracer != 0)
}

/// Why a process cannot be seized, if that is because another one traces it: there is one tracer
/// at most.
pub(super) fn traced_by_another(pid: i32) -> Option<CaptureError> {
    let me = nix::unistd::gettid().as_raw();
    let mut tracers = tids(pid).ok()?.into_iter().filter_map(tracer_of);
    let tracer = tracers.find(|tracer| *tracer != me)?;
    let why = format!("process {tracer} traces it (a debugger?); end that first");
    Some(CaptureError::unsupported(format!("pid {pid}"), why))
}

/// The process (thread group) of a thread.
fn process_of(tid: i32) -> SysResult<i32> {
    let text = status_of(tid)?;
    field(&text, "Tgid:")
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| SysError::errno("read", format!("/proc/{tid}/status"), libc::EINVAL))
}

/// Whether a fault ends the process of this thread, and that is the first of a pid namespace
/// other than ours.
fn is_fatal_for_init(tid: i32, signal: i32) -> SysResult<bool> {
    let text = status_of(tid)?;
    let group: Vec<&str> = field(&text, "NStgid:").unwrap_or("").split_whitespace().collect();
    let caught = field(&text, "SigCgt:").and_then(|v| u64::from_str_radix(v, 16).ok());
    let caught = caught.unwrap_or(0) & (1 << (signal - 1)) != 0;
    Ok(!caught && group.len() > 1 && group.last() == Some(&"1"))
}

/// /proc/TID/status, see proc_pid_status(5).
fn status_of(tid: i32) -> SysResult<String> {
    let path = format!("/proc/{tid}/status");
    fs::read_to_string(&path).map_err(|source| SysError { call: "read", object: path, source })
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests;
