//! [`Spare`]: taking over a fresh container, and folding checkpoints in.

use super::error::{Doing, RestoreError};
use super::finish::Finishing;
use super::landing::OnOther;
use super::lineage::Corpse;
use super::script::Script;
use super::shared::Held;
use super::space::{self, ASIDE, Givers, Special, Target};
use super::terminals::Terminals;
use crate::container::Launched;
use crate::image::pages::{Edits, PageSet};
use crate::image::{Process, State, VdsoPart};
use crate::sys::memory::ForcedMemory;
use crate::sys::remote::{self, Call};
use crate::sys::{SysError, SysResult, ptrace};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use std::borrow::Cow;
use std::sync::Arc;

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
    /// Session in the container, as the kernel has it now.
    pub(super) sid: i32,
    /// Process group in the container, as the kernel has it now.
    pub(super) pgid: i32,
    /// When the process that it stands for was made.
    pub(super) born: u64,
    /// What its parent is sent when it ends.
    pub(super) exit_signal: i32,
    /// Whether orphans become its children.
    pub(super) subreaper: bool,
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
    pub(super) corpses: Vec<Corpse>,
    pub(super) state: Arc<State>,
    pub(super) script: Script,
    pub(super) specials: Vec<Special>,
    pub(super) finishing: Finishing,
    pub(super) affinity: CpuSet,
    pub(super) held: Held,
    pub(super) terminals: Terminals,
    pub(super) on_other: OnOther,
    /// An open file that is not here is an error, whatever it was open for.
    pub(super) strict: bool,
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
        let (sid, pgid) = session_of(host).doing(root, "read the session")?;
        let stub = Stub {
            pid: root,
            ppid: 0,
            sid,
            pgid,
            born: 0,
            exit_signal: libc::SIGCHLD,
            subreaper: false,
            host,
            forced,
        };
        Ok(Spare {
            stubs: vec![stub],
            corpses: Vec::new(),
            state: Arc::default(),
            script,
            specials,
            finishing: Finishing::default(),
            affinity,
            held: Held::default(),
            terminals: Terminals::default(),
            on_other: OnOther::default(),
            strict: false,
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

    /// From now on every open file must be here. Whoever brings an image back can put the file there
    /// and try again; a container that has lost its host cannot wait for that.
    pub fn insist_on_files(&mut self) {
        self.strict = true;
    }

    /// Folds one complete checkpoint in. `pages` are those that changed since the checkpoint that
    /// was folded in before (all of them, the first time).
    pub fn apply(&mut self, state: &State, pages: &PageSet) -> Result<(), RestoreError> {
        self.apply_edited(&Arc::new(state.clone()), &Edits::default(), pages)
    }

    /// As [`Spare::apply`], after these edits of the pages of the checkpoint before.
    pub fn apply_edited(
        &mut self,
        state: &Arc<State>,
        edits: &Edits,
        pages: &PageSet,
    ) -> Result<(), RestoreError> {
        check(state, self.launched.root())?;
        if state.vdso != 0 && state.vdso != self.vdso {
            return Err(RestoreError::Refused {
                pid: 1,
                object: "the vdso".into(),
                reason: "this host's kernel has another one; run the same kernel on both".into(),
            });
        }
        self.attempt(|spare| spare.fold(state, edits, pages))
    }

    /// Brings in more pages of the checkpoint that was folded in last.
    pub fn add_pages(&mut self, pages: &PageSet) -> Result<(), RestoreError> {
        self.attempt(|spare| {
            let Self { state, stubs, script, held, .. } = spare;
            let first = state.processes.len() as u32;
            for runs in pages.runs.chunk_by(|a, b| a.process == b.process) {
                if runs[0].process >= first {
                    held.fill(&state.objects, first, runs, &pages.bytes)
                        .doing(1, "fill the memory objects")?;
                    continue;
                }
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

    fn fold(
        &mut self,
        state: &Arc<State>,
        edits: &Edits,
        pages: &PageSet,
    ) -> Result<(), RestoreError> {
        self.follow_terminals(state).doing(1, "make a terminal")?;
        self.follow_tree(state)?;
        self.held.follow(self.launched.pid, &state.objects).doing(1, "make the memory objects")?;
        let place = |p: &Process| self.stubs.iter().position(|s| s.pid == p.pid);
        let order: Vec<usize> = state.processes.iter().filter_map(place).collect();
        let (runs, changes) =
            (in_order(&pages.runs, |r| r.process), in_order(&edits.list, |e| e.process));
        let (mut runs, mut changes) = (&*runs, &*changes);
        for (index, (process, at)) in state.processes.iter().zip(order).enumerate() {
            let stub = &self.stubs[at];
            let target = Target { pid: stub.pid, host: stub.host, forced: &stub.forced };
            let known = self.state.processes.iter().find(|p| p.pid == process.pid);
            let old = known.map_or(&[][..], |p| &p.mappings);
            let givers = Givers { held: &self.held, channel: self.launched.control() };
            space::remap(&target, &mut self.script, &givers, old, &process.mappings)?;
            let count = changes.partition_point(|e| e.process <= index as u32);
            let (mine, rest) = changes.split_at(count);
            changes = rest;
            space::edit(&target, &process.mappings, mine, edits)?;
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
}

/// What belongs to processes, one process after the other, and otherwise as it was.
fn in_order<T: Clone>(list: &[T], process: impl Fn(&T) -> u32) -> Cow<'_, [T]> {
    if list.is_sorted_by_key(&process) {
        return Cow::Borrowed(list);
    }
    let mut sorted = list.to_vec();
    sorted.sort_by_key(process);
    Cow::Owned(sorted)
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

/// Session and process group of a process, as they are numbered in its own pid namespace.
fn session_of(host: i32) -> SysResult<(i32, i32)> {
    let path = format!("/proc/{host}/status");
    let text = std::fs::read_to_string(&path);
    let text = text.map_err(|source| SysError { call: "read", object: path.clone(), source })?;
    let last = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|l| l.strip_prefix(name)?.split_whitespace().last()?.parse().ok())
    };
    last("NSsid:")
        .zip(last("NSpgid:"))
        .ok_or_else(|| SysError::errno("parse", path.clone(), libc::EINVAL))
}

/// Puts all signal dispositions back.
fn default_actions(script: &mut Script) {
    let default = script.words(&[0; 4]);
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s)) {
        let args = [signal as u64, default, 0, 8];
        script.call_on("rt_sigaction", format!("signal {signal}"), libc::SYS_rt_sigaction, &args);
    }
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
    for ended in &state.ended {
        let has = |pid| state.processes.iter().any(|p| p.pid == pid);
        if ended.pid == root || has(ended.pid) || !has(ended.ppid) {
            return Err(RestoreError::Refused {
                pid: ended.pid,
                object: "the ended process".into(),
                reason: "it lives too, or has no parent".into(),
            });
        }
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
