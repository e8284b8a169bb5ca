//! The tree of a spare's processes, kept like the container's: who is whose child, in which
//! session and group, and who has ended without being waited for.
//!
//! ```text
//! a child in its parent's session        its parent makes it
//! a child in another living session      a sibling there makes it (CLONE_PARENT), or a passing
//!                                        child of a member does and leaves it an orphan
//! a child in a session without members   a passing leader with the session's number
//! a group without members                a passing leader, a child of whoever joins it
//! ```
//! The kernel does the rest here as there: orphans go to the nearest subreaper, groups and
//! sessions outlive their leaders, ended processes wait for their parents. What comes out
//! otherwise is an error: the spare is lost, and a new one is made from a full checkpoint.

use super::error::{Doing, RestoreError};
use super::script::Script;
use super::space;
use super::spare::{Spare, Stub};
use crate::image::State;
use crate::image::task::Ended;
use crate::sys::memory::ForcedMemory;
use crate::sys::{SysError, SysResult, ptrace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;

/// Numbers for passing processes are tried from here downwards.
const HIGHEST_PID: i32 = 32_767;

/// A process of the container that has ended, in the spare.
#[derive(Debug)]
pub(super) struct Corpse {
    pid: i32,
    ppid: i32,
    pgid: i32,
    born: u64,
    host: i32,
}

/// Who a process is to be.
#[derive(Clone, Copy, Debug)]
struct Identity {
    pid: i32,
    ppid: i32,
    pgid: i32,
    sid: i32,
    born: u64,
    exit_signal: i32,
}

fn living(state: &State) -> impl Iterator<Item = Identity> {
    state.processes.iter().map(|p| Identity {
        pid: p.pid,
        ppid: p.ppid,
        pgid: p.pgid,
        sid: p.sid,
        born: p.place.born,
        exit_signal: p.place.exit_signal,
    })
}

fn of_ended(e: &Ended) -> Identity {
    let &Ended { pid, ppid, pgid, sid, born, exit_signal, .. } = e;
    Identity { pid, ppid, pgid, sid, born, exit_signal }
}

impl Spare {
    /// Makes the tree that of a checkpoint. Afterwards there is a stub for each process.
    pub(super) fn follow_tree(&mut self, state: &State) -> Result<(), RestoreError> {
        self.set_subreapers(state)?;
        self.remove_gone(state)?;
        self.give_terminals(state)?;
        self.create_all(state)?;
        self.set_subreapers(state)?;
        self.set_groups(state)?;
        self.give_terminals(state)?;
        for ended in &state.ended {
            self.die(ended)?;
        }
        for who in living(state) {
            let stub = self.stubs.iter().find(|s| s.pid == who.pid);
            if let Some(parent) = stub.map(|s| s.ppid).filter(|parent| *parent != who.ppid) {
                let reason = format!("it became a child of pid {parent} here");
                return Err(impossible(who.pid, format!("its place under {}", who.ppid), reason));
            }
        }
        Ok(())
    }

    /// Creates who is not there yet: after their parents and the leaders of their sessions.
    fn create_all(&mut self, state: &State) -> Result<(), RestoreError> {
        let mut missing: Vec<Identity> = living(state)
            .chain(state.ended.iter().map(of_ended))
            .filter(|who| !self.has(who.pid))
            .collect();
        while !missing.is_empty() {
            let waits_for = |pid: i32| missing.iter().any(|m| m.pid == pid);
            let ready = missing.iter().position(|who| {
                !waits_for(who.ppid) && (who.sid == who.pid || !waits_for(who.sid))
            });
            let who = missing.remove(ready.unwrap_or(0));
            self.create(who, state)?;
        }
        Ok(())
    }

    fn has(&self, pid: i32) -> bool {
        self.stubs.iter().any(|s| s.pid == pid) || self.corpses.iter().any(|c| c.pid == pid)
    }

    fn set_subreapers(&mut self, state: &State) -> Result<(), RestoreError> {
        for p in &state.processes {
            let Some(stub) = self.stubs.iter_mut().find(|s| s.pid == p.pid) else { continue };
            if stub.subreaper != p.place.subreaper {
                stub.subreaper = p.place.subreaper;
                let args = [libc::PR_SET_CHILD_SUBREAPER as u64, stub.subreaper.into(), 0, 0, 0];
                self.script.call("prctl(PR_SET_CHILD_SUBREAPER)", libc::SYS_prctl, &args);
                self.script.run_ok(stub.host).doing(p.pid, "make it a subreaper")?;
            }
        }
        Ok(())
    }

    /// Ends the processes that are no more, or whose number another process has now, and lets
    /// those be waited for that their parents have waited for.
    fn remove_gone(&mut self, state: &State) -> Result<(), RestoreError> {
        let is_there = |pid: i32, born: u64| {
            state.processes.iter().any(|p| p.pid == pid && p.place.born == born)
        };
        let is_ended =
            |pid: i32, born: u64| state.ended.iter().any(|e| e.pid == pid && e.born == born);
        let root = self.launched.root();
        while let Some(at) = self
            .stubs
            .iter()
            .position(|s| s.pid != root && !is_there(s.pid, s.born) && !is_ended(s.pid, s.born))
        {
            let stub = self.stubs.remove(at);
            Arc::make_mut(&mut self.state).processes.retain(|p| p.pid != stub.pid);
            self.end(&stub)?;
        }
        while let Some(at) = self.corpses.iter().position(|c| !is_ended(c.pid, c.born)) {
            let corpse = self.corpses.remove(at);
            self.wait_for(corpse.pid, corpse.ppid)?;
        }
        Ok(())
    }

    /// Kills a stub and has its parent wait for it.
    fn end(&mut self, stub: &Stub) -> Result<(), RestoreError> {
        const DOING: &str = "end the process";
        kill(Pid::from_raw(stub.host), Signal::SIGKILL)
            .map_err(|e| SysError::errno("kill", format!("pid {}", stub.host), e as i32))
            .doing(stub.pid, DOING)?;
        while !ptrace::wait(stub.host).doing(stub.pid, DOING)?.is_end() {}
        self.wait_for(stub.pid, stub.ppid)?;
        self.reparent(stub.pid)
    }

    fn wait_for(&mut self, pid: i32, parent: i32) -> Result<(), RestoreError> {
        let flags = (libc::__WALL | libc::WNOHANG) as u64;
        let host = self.host_of(parent)?;
        let args = [pid as u64, 0, flags, 0];
        self.script.call_on("wait4", format!("pid {pid}"), libc::SYS_wait4, &args);
        let done = self.script.run_ok(host).doing(pid, "have its parent wait for it")?;
        if done == [i64::from(pid)] {
            return Ok(());
        }
        Err(impossible(pid, "its end".into(), format!("pid {parent} cannot wait for it")))
    }

    /// Notes whose children the orphans of a process have become.
    fn reparent(&mut self, dead: i32) -> Result<(), RestoreError> {
        let hosts: Vec<(i32, i32)> = self.stubs.iter().map(|s| (s.host, s.pid)).collect();
        let stubs = self.stubs.iter_mut().map(|s| (s.pid, s.host, &mut s.ppid));
        let corpses = self.corpses.iter_mut().map(|c| (c.pid, c.host, &mut c.ppid));
        for (pid, host, ppid) in stubs.chain(corpses).filter(|(.., ppid)| **ppid == dead) {
            let parent = parent_of(host).doing(pid, "find its new parent")?;
            *ppid = hosts.iter().find(|(h, _)| *h == parent).map_or(0, |(_, pid)| *pid);
        }
        Ok(())
    }

    fn host_of(&self, pid: i32) -> Result<i32, RestoreError> {
        let stub = self.stubs.iter().find(|s| s.pid == pid);
        stub.map(|s| s.host).ok_or_else(|| {
            impossible(pid, "the process".into(), "the spare does not have it".into())
        })
    }

    /// Creates a process as the child of its parent, in its session.
    fn create(&mut self, who: Identity, state: &State) -> Result<(), RestoreError> {
        let Some(parent) = self.stubs.iter().position(|s| s.pid == who.ppid) else {
            let place = format!("its place under pid {}", who.ppid);
            return Err(impossible(who.pid, place, "no such process".into()));
        };
        // A leader makes its session when the first other in it is made: its children may be from
        // before.
        if who.sid != who.pid
            && let Some(leader) =
                self.stubs.iter().position(|s| s.pid == who.sid && s.sid != who.sid)
        {
            self.lead_session(leader)?;
            self.give_terminals(state)?;
        }
        let (from, flags, passing) = if self.stubs[parent].sid == who.sid || who.sid == who.pid {
            (parent, 0, None)
        } else if let Some(sibling) = self.stubs.iter().position(|s| {
            s.sid == who.sid && s.ppid == who.ppid && s.exit_signal == who.exit_signal
        }) {
            (sibling, libc::CLONE_PARENT, None)
        } else if let Some(member) = self.stubs.iter().position(|s| s.sid == who.sid) {
            let number = self.free_number(state);
            let passing = self.spawn(member, 0, Identity { pid: number, ..who })?;
            (passing, 0, Some(passing))
        } else {
            let passing = self.spawn(parent, 0, Identity { pid: who.sid, ..who })?;
            self.lead_session(passing)?;
            (passing, libc::CLONE_PARENT, Some(passing))
        };
        self.spawn(from, flags, who)?;
        if let Some(passing) = passing {
            let passing = self.stubs.remove(passing);
            self.end(&passing)?;
        }
        Ok(())
    }

    fn lead_session(&mut self, at: usize) -> Result<(), RestoreError> {
        let stub = &mut self.stubs[at];
        self.script.call("setsid", libc::SYS_setsid, &[]);
        self.script.run_ok(stub.host).doing(stub.pid, "start its session")?;
        (stub.sid, stub.pgid) = (stub.pid, stub.pid);
        Ok(())
    }

    fn free_number(&self, state: &State) -> i32 {
        let used = |n: i32| {
            let lives = state.processes.iter().any(|p| {
                [p.pid, p.sid, p.pgid].contains(&n) || p.threads.iter().any(|t| t.tid == n)
            });
            lives
                || state.ended.iter().any(|e| [e.pid, e.sid, e.pgid].contains(&n))
                || self.stubs.iter().any(|s| [s.pid, s.sid, s.pgid].contains(&n))
                || self.corpses.iter().any(|c| [c.pid, c.pgid].contains(&n))
        };
        (2..=HIGHEST_PID).rev().find(|n| !used(*n)).unwrap_or(HIGHEST_PID)
    }

    /// A new stub, made by another. Gives its index, which is the last.
    fn spawn(&mut self, maker: usize, flags: i32, who: Identity) -> Result<usize, RestoreError> {
        let doing = "create the process";
        let pid = who.pid;
        let script = &mut self.script;
        let maker = &self.stubs[maker];
        let tid = script.data(&pid.to_ne_bytes());
        // The child of CLONE_PARENT has the signal of its maker.
        let (signal, ppid) = match flags {
            libc::CLONE_PARENT => (0, maker.ppid),
            _ => (who.exit_signal as u64, maker.pid),
        };
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size,
        // tls, set_tid, set_tid_size, cgroup.
        let args = script.words(&[flags as u64, 0, 0, 0, signal, 0, 0, 0, tid, 1, 0]);
        script.call_on("clone3", format!("pid {pid}"), libc::SYS_clone3, &[args, 88]);
        let mut born = Vec::new();
        script.run_ok_spawning(maker.host, &mut born).doing(pid, doing)?;
        let Some(&host) = born.first() else {
            let source = SysError::errno("PTRACE_EVENT_FORK", format!("pid {pid}"), libc::ECHILD);
            return Err(RestoreError::Kernel { pid, doing, source });
        };
        let stub = Stub {
            pid,
            ppid,
            sid: maker.sid,
            pgid: maker.pgid,
            born: who.born,
            exit_signal: who.exit_signal,
            subreaper: false,
            host,
            forced: ForcedMemory::open(host).doing(pid, doing)?,
        };
        self.stubs.push(stub);
        space::wipe(script);
        script.run_ok(host).doing(pid, "empty the memory")?;
        Ok(self.stubs.len() - 1)
    }

    /// Sessions and process groups of all, leaders first.
    fn set_groups(&mut self, state: &State) -> Result<(), RestoreError> {
        const DOING: &str = "set session and process group";
        let all = || living(state).chain(state.ended.iter().map(of_ended));
        for who in all() {
            let Some(at) = self.stubs.iter().position(|s| s.pid == who.pid) else { continue };
            if who.sid != self.stubs[at].sid && who.sid == who.pid {
                self.lead_session(at)?;
            } else if who.sid != self.stubs[at].sid && who.sid != 0 {
                let reason = "it has joined a session that it was not born in".into();
                return Err(impossible(who.pid, format!("session {}", who.sid), reason));
            }
        }
        let is_leader = |who: &Identity| who.pgid == who.pid;
        for who in all().filter(is_leader).chain(all().filter(|who| !is_leader(who))) {
            let Some(at) = self.stubs.iter().position(|s| s.pid == who.pid) else { continue };
            if who.pgid == 0 || self.stubs[at].pgid == who.pgid {
                continue;
            }
            let stub = &self.stubs[at];
            let host = stub.host;
            let exists = who.pgid == who.pid
                || self.stubs.iter().any(|s| s.pgid == who.pgid && s.sid == stub.sid)
                || self.corpses.iter().any(|c| c.pgid == who.pgid);
            let passing = match exists {
                true => None,
                false => {
                    let leader = self.spawn(at, 0, Identity { pid: who.pgid, ..who })?;
                    self.script.call("setpgid", libc::SYS_setpgid, &[0, 0]);
                    self.script.run_ok(self.stubs[leader].host).doing(who.pgid, DOING)?;
                    Some(leader)
                }
            };
            let object = format!("group {}", who.pgid);
            self.script.call_on("setpgid", object, libc::SYS_setpgid, &[0, who.pgid as u64]);
            self.script.run_ok(host).doing(who.pid, DOING)?;
            self.stubs[at].pgid = who.pgid;
            if let Some(passing) = passing {
                let passing = self.stubs.remove(passing);
                self.end(&passing)?;
            }
        }
        Ok(())
    }

    /// Lets a stub end as its process has, if it has not yet.
    fn die(&mut self, ended: &Ended) -> Result<(), RestoreError> {
        let Some(at) = self.stubs.iter().position(|s| s.pid == ended.pid) else { return Ok(()) };
        let stub = self.stubs.remove(at);
        end_as(&mut self.script, stub.host, ended).doing(stub.pid, "end it as it has ended")?;
        Arc::make_mut(&mut self.state).processes.retain(|p| p.pid != stub.pid);
        let Stub { pid, ppid, pgid, born, host, .. } = stub;
        self.corpses.push(Corpse { pid, ppid, pgid, born, host });
        self.reparent(pid)
    }
}

/// Ends a traced process of one thread, with a status as wait(2) gives it.
fn end_as(script: &mut Script, host: i32, ended: &Ended) -> SysResult<()> {
    let name = script.text(&ended.comm);
    script.call("prctl(PR_SET_NAME)", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
    // No core file is written once more.
    let none = script.words(&[0, 0]);
    script.call("prlimit", libc::SYS_prlimit64, &[0, u64::from(libc::RLIMIT_CORE), none, 0]);
    if ended.uid != 0 {
        let uid = u64::from(ended.uid);
        script.call("setresuid", libc::SYS_setresuid, &[uid, uid, uid]);
    }
    let signal = libc::WTERMSIG(ended.status);
    if signal == 0 {
        let code = libc::WEXITSTATUS(ended.status) as u64;
        script.call("exit_group", libc::SYS_exit_group, &[code]);
        return match script.run(host) {
            Err(e) if e.is_gone() => Ok(()),
            Err(e) => Err(e),
            Ok(_) => Err(SysError::errno("exit_group", format!("pid {host}"), libc::EBUSY)),
        };
    }
    script.run_ok(host)?;
    let failed = |e: nix::errno::Errno| SysError::errno("kill", format!("pid {host}"), e as i32);
    // It was born with all signals blocked.
    ptrace::set_blocked(host, 0)?;
    kill(Pid::from_raw(host), Signal::try_from(signal).map_err(failed)?).map_err(failed)?;
    match ptrace::cont(host, 0) {
        // SIGKILL waits for nobody.
        Err(e) if e.is_gone() => {}
        other => other?,
    }
    loop {
        match ptrace::wait(host)? {
            ptrace::Status::Stopped { signal, event: 0 } => ptrace::cont(host, signal)?,
            ptrace::Status::Stopped { .. } => ptrace::cont(host, 0)?,
            _ => return Ok(()),
        }
    }
}

/// The parent of a process, both as the host numbers them.
fn parent_of(host: i32) -> SysResult<i32> {
    let path = format!("/proc/{host}/status");
    let text = std::fs::read_to_string(&path);
    let text = text.map_err(|source| SysError { call: "read", object: path.clone(), source })?;
    let line = text.lines().find_map(|l| l.strip_prefix("PPid:"));
    line.and_then(|v| v.trim().parse().ok())
        .ok_or_else(|| SysError::errno("read", path, libc::EINVAL))
}

fn impossible(pid: i32, object: String, reason: String) -> RestoreError {
    RestoreError::Impossible { pid, object, reason }
}
