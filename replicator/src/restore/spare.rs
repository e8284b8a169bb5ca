//! [`Spare`]: taking over a fresh container, and folding checkpoints in.

use super::error::{Doing, RestoreError};
use super::finish::Finishing;
use super::script::Script;
use super::shared::Held;
use super::space::{self, ASIDE, Givers, Special, Target};
use crate::container::Launched;
use crate::image::pages::PageSet;
use crate::image::{Process, State, VdsoPart};
use crate::sys::memory::ForcedMemory;
use crate::sys::remote::{self, Call};
use crate::sys::{SysError, SysResult, ptrace};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How every thread of a spare is traced: it dies with its tracer, and what it creates is traced
/// too.
pub const TRACE_OPTIONS: i32 = libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEVFORKDONE
    | libc::PTRACE_O_TRACEEXEC;

/// Descriptor of a spare's processes that the descriptors of the container will come through.
pub(super) const CHANNEL: i32 = 100;

/// A stopped process of a spare.
#[derive(Debug)]
pub(super) struct Stub {
    /// Pid in the container.
    pub(super) pid: i32,
    /// Parent in the container.
    pub(super) ppid: i32,
    /// Session in the container.
    pub(super) sid: i32,
    /// Pid as the host sees it.
    pub(super) host: i32,
    /// Its memory, written past all protection.
    pub(super) forced: ForcedMemory,
}

/// A container kept stopped and in step with the checkpoints of another. Dropping it kills it;
/// so does the end of the thread that made it.
#[derive(Debug)]
pub struct Spare {
    pub(super) stubs: Vec<Stub>,
    pub(super) state: State,
    pub(super) script: Script,
    pub(super) specials: Vec<Special>,
    pub(super) finishing: Finishing,
    pub(super) affinity: CpuSet,
    pub(super) held: Held,
    vdso: u64,
    lost: bool,
    // Last, so that it is dropped last.
    pub(super) launched: Launched,
}

impl Spare {
    /// Makes a container launched as [`Role::Spare`](crate::container::Role::Spare) into an empty
    /// spare: traced by the calling thread, stopped, its memory and descriptors gone.
    pub fn new(launched: Launched) -> Result<Spare, RestoreError> {
        let host = launched.pid;
        let mut script = Script::default();
        let (specials, affinity) = take_over(host, &mut script).doing(1, "take over the memory")?;
        let code = specials.iter().find(|s| s.part == VdsoPart::Vdso);
        let vdso = code.map_or(Ok(0), |s| remote::fingerprint(host, s.start, s.start + s.len));
        let vdso = vdso.doing(1, "read the vdso")?;
        let forced = ForcedMemory::open(host).doing(1, "open the memory")?;
        let root = launched.root();
        let sid = session_of(host).doing(root, "read the session")?;
        let stub = Stub { pid: root, ppid: 0, sid, host, forced };
        Ok(Spare {
            stubs: vec![stub],
            state: State::default(),
            script,
            specials,
            finishing: Finishing::default(),
            affinity,
            held: Held::default(),
            vdso,
            lost: false,
            launched,
        })
    }

    /// Pid of the container's init as the host sees it.
    pub fn pid(&self) -> i32 {
        self.launched.pid
    }

    /// The container that the spare became. It is traced by the calling thread still, unless
    /// [`Spare::detach_all`] was called.
    pub fn into_launched(self) -> Launched {
        self.launched
    }

    /// Folds one complete checkpoint in. `pages` are those that changed since the checkpoint that
    /// was folded in before (all of them, the first time).
    pub fn apply(&mut self, state: &State, pages: &PageSet) -> Result<(), RestoreError> {
        check(state, self.launched.root())?;
        if state.vdso != 0 && state.vdso != self.vdso {
            return Err(RestoreError::Refused {
                pid: 1,
                object: "the vdso".into(),
                reason: "this host's kernel has another one; run the same kernel on both".into(),
            });
        }
        self.attempt(|spare| spare.fold(state, pages))
    }

    /// Brings in more pages of the checkpoint that was folded in last.
    pub fn add_pages(&mut self, pages: &PageSet) -> Result<(), RestoreError> {
        self.attempt(|spare| {
            let Self { state, stubs, script, .. } = spare;
            for runs in pages.runs.chunk_by(|a, b| a.process == b.process) {
                let process = state.processes.get(runs[0].process as usize);
                let stub = process.and_then(|p| stubs.iter().find(|s| s.pid == p.pid));
                let (Some(process), Some(stub)) = (process, stub) else { continue };
                let target = Target { pid: stub.pid, host: stub.host, forced: &stub.forced };
                space::fill(&target, script, &process.mappings, runs, &pages.bytes)?;
            }
            Ok(())
        })
    }

    /// Runs a step after whose failure the spare is lost.
    pub(super) fn attempt<T>(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<T, RestoreError>,
    ) -> Result<T, RestoreError> {
        if self.lost {
            return Err(RestoreError::Lost);
        }
        let result = step(self);
        self.lost = result.as_ref().is_err_and(RestoreError::spare_is_lost);
        result
    }

    fn fold(&mut self, state: &State, pages: &PageSet) -> Result<(), RestoreError> {
        self.remove_gone(state)?;
        self.held.follow(self.launched.pid, &state.objects).doing(1, "make the memory objects")?;
        let mut order = Vec::with_capacity(state.processes.len());
        for process in &state.processes {
            let known = self.stubs.iter().position(|s| s.pid == process.pid);
            order.push(match known {
                Some(at) => at,
                None => {
                    self.create(process, &state.processes)?;
                    self.stubs.len() - 1
                }
            });
        }
        let mut runs = pages.runs.as_slice();
        let mut sorted;
        if !runs.is_sorted_by_key(|r| r.process) {
            sorted = runs.to_vec();
            sorted.sort_by_key(|r| r.process);
            runs = &sorted;
        }
        for (index, (process, at)) in state.processes.iter().zip(order).enumerate() {
            let stub = &self.stubs[at];
            let target = Target { pid: stub.pid, host: stub.host, forced: &stub.forced };
            let known = self.state.processes.iter().find(|p| p.pid == process.pid);
            let old = known.map_or(&[][..], |p| &p.mappings);
            let givers = Givers { held: &self.held, channel: self.launched.control() };
            space::remap(&target, &mut self.script, &givers, old, &process.mappings)?;
            let count = runs.partition_point(|r| r.process <= index as u32);
            let (mine, rest) = runs.split_at(count);
            runs = rest;
            space::fill(&target, &mut self.script, &process.mappings, mine, &pages.bytes)?;
        }
        let first = state.processes.len() as u32;
        self.held
            .fill(&state.objects, first, runs, &pages.bytes)
            .doing(1, "fill the memory objects")?;
        self.held
            .prune(self.launched.pid, &self.state.objects, &state.objects)
            .doing(1, "delete memory objects")?;
        self.state.clone_from(state);
        Ok(())
    }

    /// Ends the processes that are no more, or whose number another process has now.
    fn remove_gone(&mut self, state: &State) -> Result<(), RestoreError> {
        let root = self.launched.root();
        loop {
            // A child whose parent is gone belongs to the init, here as there.
            let alive: Vec<i32> = self.stubs.iter().map(|s| s.pid).collect();
            for stub in self.stubs.iter_mut().filter(|s| s.pid != root) {
                if !alive.contains(&stub.ppid) {
                    stub.ppid = root;
                }
            }
            let gone = self.stubs.iter().position(|s| {
                s.pid != root && !state.processes.iter().any(|p| p.pid == s.pid && p.ppid == s.ppid)
            });
            let Some(at) = gone else { return Ok(()) };
            let stub = self.stubs.remove(at);
            self.state.processes.retain(|p| p.pid != stub.pid);
            end_process(stub.host).doing(stub.pid, "end the process")?;
        }
    }

    /// Creates a process in the spare, as the child of its parent.
    fn create(&mut self, process: &Process, all: &[Process]) -> Result<(), RestoreError> {
        let pid = process.pid;
        let doing = "create the process";
        // `check` has seen that the parent stands before it.
        let parent = self.stubs.iter_mut().find(|s| s.pid == process.ppid);
        let Some(parent) = parent else {
            let object = format!("its place under pid {}", process.ppid);
            return Err(RestoreError::Impossible { pid, object, reason: "no such process".into() });
        };
        let parent_sid = all.iter().find(|p| p.pid == parent.pid).map_or(0, |p| p.sid);
        if parent.sid != process.sid && process.sid == parent.pid && parent_sid == parent.pid {
            self.script.call("setsid", libc::SYS_setsid, &[]);
            parent.sid = parent.pid;
        }
        let tid = self.script.data(&pid.to_ne_bytes());
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size,
        // tls, set_tid, set_tid_size, cgroup.
        let args = self.script.words(&[0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, tid, 1, 0]);
        self.script.call_on("clone3", format!("pid {pid}"), libc::SYS_clone3, &[args, 88]);
        let mut born = Vec::new();
        self.script.run_ok_spawning(parent.host, &mut born).doing(pid, doing)?;
        let Some(&host) = born.first() else {
            let source = SysError::errno("PTRACE_EVENT_FORK", format!("pid {pid}"), libc::ECHILD);
            return Err(RestoreError::Kernel { pid, doing, source });
        };
        let sid = parent.sid;
        let forced = ForcedMemory::open(host).doing(pid, doing)?;
        self.stubs.push(Stub { pid, ppid: process.ppid, sid, host, forced });
        space::wipe(&mut self.script);
        self.script.run_ok(host).doing(pid, "empty the memory").map(drop)
    }
}

/// Seizes and stops a fresh init, gives it the scratch area, and takes everything else away.
fn take_over(host: i32, script: &mut Script) -> SysResult<(Vec<Special>, CpuSet)> {
    let nix = |call, e: nix::errno::Errno| SysError::errno(call, format!("pid {host}"), e as i32);
    let affinity =
        sched_getaffinity(Pid::from_raw(host)).map_err(|e| nix("sched_getaffinity", e))?;
    // All of a spare's processes share one processor: the one we are on while we work on them.
    let mut here = CpuSet::new();
    sched_getcpu().and_then(|cpu| here.set(cpu)).map_err(|e| nix("getcpu", e))?;
    sched_setaffinity(Pid::from_raw(host), &here).map_err(|e| nix("sched_setaffinity", e))?;
    ptrace::seize(host, TRACE_OPTIONS)?;
    ptrace::interrupt(host)?;
    if ptrace::wait(host)?.is_end() {
        return Err(SysError::errno("PTRACE_INTERRUPT", format!("pid {host}"), libc::ESRCH));
    }
    let mut specials = space::specials(host)?;
    let vdso = specials.iter().find(|s| s.part == VdsoPart::Vdso);
    let vdso = vdso.ok_or_else(|| {
        SysError::errno("search for [vdso] in /proc/PID/maps", format!("pid {host}"), libc::ENOENT)
    })?;
    let gadget = remote::find_gadget(host, vdso.start, vdso.start + vdso.len)?;
    if let Some(rseq) = ptrace::rseq(host)? {
        const UNREGISTER: u64 = 1;
        let args = [rseq.address, u64::from(rseq.len), UNREGISTER, u64::from(rseq.signature)];
        let result = remote::call_at(host, gadget, Call::new(libc::SYS_rseq, &args))?;
        if result != 0 {
            let object = format!("pid {host}: unregister");
            return Err(SysError::errno("rseq", object, -result as i32));
        }
    }
    remote::map_scratch(host, gadget)?;
    let mut aside = ASIDE;
    let places: Vec<u64> = specials.iter().map(|s| (aside, aside += s.len).0).collect();
    space::move_specials(script, &specials, &places);
    for (special, place) in specials.iter_mut().zip(places) {
        special.start = place;
    }
    space::wipe(script);
    script.call("dup3", libc::SYS_dup3, &[0, CHANNEL as u64, libc::O_CLOEXEC as u64]);
    script.call("close_range", libc::SYS_close_range, &[0, CHANNEL as u64 - 1, 0]);
    script.call("close_range", libc::SYS_close_range, &[CHANNEL as u64 + 1, u32::MAX.into(), 0]);
    default_actions(script);
    script.run_ok(host)?;
    Ok((specials, affinity))
}

/// The session of a process, as it is numbered in its own pid namespace.
fn session_of(host: i32) -> SysResult<i32> {
    let path = format!("/proc/{host}/status");
    let text = std::fs::read_to_string(&path);
    let text = text.map_err(|source| SysError { call: "read", object: path.clone(), source })?;
    text.lines()
        .find_map(|l| l.strip_prefix("NSsid:")?.split_whitespace().last()?.parse().ok())
        .ok_or_else(|| SysError::errno("parse", path, libc::EINVAL))
}

/// Puts all signal dispositions back, but children may end without a trace: their parents here
/// wait for nobody.
fn default_actions(script: &mut Script) {
    let default = script.words(&[0; 4]);
    let ignore = script.words(&[libc::SIG_IGN as u64, 0, 0, 0]);
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s)) {
        let action = if signal == libc::SIGCHLD { ignore } else { default };
        let args = [signal as u64, action, 0, 8];
        script.call_on("rt_sigaction", format!("signal {signal}"), libc::SYS_rt_sigaction, &args);
    }
}

/// Kills a single-threaded traced process and reaps it; its parent ignores SIGCHLD.
fn end_process(host: i32) -> SysResult<()> {
    kill(Pid::from_raw(host), Signal::SIGKILL)
        .map_err(|e| SysError::errno("kill", format!("pid {host}"), e as i32))?;
    while !ptrace::wait(host)?.is_end() {}
    Ok(())
}

/// What must hold for a checkpoint before a spare is touched.
fn check(state: &State, root: i32) -> Result<(), RestoreError> {
    for (i, process) in state.processes.iter().enumerate() {
        let pid = process.pid;
        let refuse = |object: &str, reason: &str| {
            Err(RestoreError::Refused { pid, object: object.into(), reason: reason.into() })
        };
        if (i == 0) != (pid == root) {
            return refuse("the process", "the first process must be the root, and no other");
        }
        let earlier = &state.processes[..i];
        if i > 0 && !earlier.iter().any(|p| p.pid == process.ppid) {
            return refuse("the process", "its parent does not stand before it");
        }
        if process.threads.first().is_none_or(|t| t.tid != pid) {
            return refuse("the threads", "the first is not the leader");
        }
        if !process.mappings.is_sorted_by(|a, b| a.start < a.end && a.end <= b.start) {
            return refuse("the mappings", "they are out of order or overlap");
        }
        space::check_reserved(pid, &process.mappings)?;
    }
    if state.processes.is_empty() {
        return Err(RestoreError::Refused {
            pid: 1,
            object: "the container".into(),
            reason: "the checkpoint holds no process".into(),
        });
    }
    Ok(())
}
