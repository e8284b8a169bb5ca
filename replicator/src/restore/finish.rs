//! Failover: a spare that is up to date becomes a running container, in phases.

use super::error::{Doing, RestoreError};
use super::objects::{self, Place};
use super::script::Script;
use super::space::Special;
use super::spare::{Spare, Stub};
use super::tcp::{self, Connected, Peer, Segment};
use super::{
    advice, filters, install, locks, process, settings, sockets, space, sysv, timers, tree,
};
use crate::image::net::{TcpConnection, TcpState};
use crate::image::task::{Scheduling, TimeUnit, Wait};
use crate::image::{Description, Kind, Mapping, Process, Regs, Source, State, Thread, VdsoPart};
use crate::sys::namespace::is_ours;
use crate::sys::ptrace::{self, reg};
use crate::sys::remote::{self, Call, SCRATCH, SCRATCH_LEN};
use crate::sys::{SysError, SysResult, memory, sched};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::Shutdown;
use nix::unistd::Pid;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the phases of a failover took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FinishTimes {
    /// Making the open file descriptions.
    pub objects: Duration,
    /// Memory fields, signal dispositions, groups, working directories.
    pub attributes: Duration,
    /// Handing over the descriptors, filling interest lists.
    pub descriptors: Duration,
    /// Creating the threads; limits.
    pub threads: Duration,
    /// Connecting the TCP connections.
    pub connect: Duration,
    /// Writing what their peers have not got.
    pub unsent: Duration,
    /// Credentials, registers, signals, the end of the scratch area.
    pub complete: Duration,
}

impl FinishTimes {
    /// All phases together.
    pub fn total(&self) -> Duration {
        self.objects
            + self.attributes
            + self.descriptors
            + self.threads
            + self.connect
            + self.unsent
            + self.complete
    }
}

/// What the gateway must do for connections that could not be restored by themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumption {
    /// Connections whose peer had closed its side: send the container this FIN.
    pub fins: Vec<Segment>,
    /// Connections that the peer knows nothing of: send the container this RST.
    pub resets: Vec<Segment>,
    /// Connections whose peer has everything and our FIN: send the container this ACK, after
    /// [`Spare::close_sides`].
    pub acks: Vec<Segment>,
}

/// A restored process, all of whose threads are stopped and traced by the calling thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Pid in the container.
    pub pid: i32,
    /// Pid as the host sees it.
    pub host: i32,
    /// Its threads' ids as the host sees them, the leader first.
    pub tids: Vec<i32>,
}

/// What the phases hand on to each other.
#[derive(Debug, Default)]
pub(super) struct Finishing {
    /// TCP sockets to connect: place (see [`connection`]), socket.
    sockets: Vec<(usize, OwnedFd)>,
    /// Sockets with bytes to write or a side to close: place, socket, bytes.
    unsent: Vec<(usize, OwnedFd, Vec<u8>)>,
    /// TCP listeners: index of the description, socket.
    listeners: Vec<(usize, OwnedFd)>,
    /// Sockets whose own side is to be closed after the peer's.
    last: Vec<OwnedFd>,
    restored: Vec<Restored>,
    /// Where each thread of `restored` goes on.
    addresses: Vec<Vec<u64>>,
    times: FinishTimes,
    stage: Stage,
}

/// Phases done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Following,
    Prepared,
    Connected,
    Complete,
}

/// Keeps the calling thread on the processor that the spare's processes use: a remote call is
/// several times cheaper without a message between processors. If it is real-time so are they meanwhile, and the
/// threads that they make: each call would wait for whoever else wants that processor.
struct Together {
    own: Option<CpuSet>,
    /// Threads that were made real-time, and what they were.
    raised: Vec<(i32, Scheduling)>,
}

impl Together {
    /// All of it is for speed: without it all is right, but slower.
    fn with(host: i32, threads: impl Iterator<Item = i32>) -> Self {
        let own = Pid::from_raw(0);
        let before = sched_getaffinity(own).ok();
        if let Ok(theirs) = sched_getaffinity(Pid::from_raw(host)) {
            let _ = sched_setaffinity(own, &theirs);
        }
        let raise = |priority: u32, tid| {
            let was = sched::attributes(tid).ok()?;
            sched::set_fifo_with_children(tid, priority as i32).ok()?;
            Some((tid, was))
        };
        let raised = match sched::attributes(0) {
            Ok(a) if a.policy == libc::SCHED_FIFO as u32 => {
                threads.filter_map(|tid| raise(a.priority, tid)).collect()
            }
            _ => Vec::new(),
        };
        Self { own: before, raised }
    }

    /// These threads were made meanwhile by one that is known.
    fn made(&mut self, by: i32, tids: &[i32]) {
        if let Some((_, was)) = self.raised.iter().find(|(tid, _)| *tid == by).copied() {
            self.raised.extend(tids.iter().map(|tid| (*tid, was)));
        }
    }
}

impl Drop for Together {
    fn drop(&mut self) {
        for (tid, was) in &self.raised {
            if let Err(error) = sched::set_attributes(*tid, was) {
                tracing::debug!(tid, %error, "it stays real-time");
            }
        }
        if let Some(before) = &self.own {
            let _ = sched_setaffinity(Pid::from_raw(0), before);
        }
    }
}

impl Spare {
    /// Phase a: everything that does not depend on what the peers have: attributes, descriptors,
    /// threads. After it the spare can no longer follow checkpoints.
    pub fn prepare(&mut self) -> Result<(), RestoreError> {
        self.expect(Stage::Following)?;
        let mut together = Together::with(self.pid(), self.stubs.iter().map(|s| s.host));
        self.attempt(Self::prepare_all)?;
        for restored in &self.finishing.restored {
            together.made(restored.host, restored.tids.get(1..).unwrap_or_default());
        }
        self.finishing.stage = Stage::Prepared;
        Ok(())
    }

    fn expect(&self, stage: Stage) -> Result<(), RestoreError> {
        if self.finishing.stage == stage && !self.state.processes.is_empty() {
            return Ok(());
        }
        Err(RestoreError::Refused {
            pid: 1,
            object: "the failover".into(),
            reason: format!("its phases are out of order (it is {:?})", self.finishing.stage),
        })
    }

    /// How far the container's clock is past the checkpoint.
    fn elapsed(&self) -> Duration {
        let now = self.launched.clock_offsets().now().monotonic;
        Duration::from_nanos(now.saturating_sub(self.state.clocks.monotonic))
    }

    fn prepare_all(&mut self) -> Result<(), RestoreError> {
        let start = Instant::now();
        self.land()?;
        self.held.seal().doing(1, "seal the memory objects")?;
        let init = self.pid();
        tree::rename_all(init, &self.held, &self.state.tmpfs)
            .doing(1, "name the files of a tmpfs")?;
        tree::remove_others(init, self.launched.tmpfs(), &self.state.tmpfs)
            .doing(1, "remove files of a tmpfs")?;
        self.host_names()?;
        sysv::make_all(init, &self.state).doing(1, "make System V objects")?;
        let hosts = self.stubs.iter().map(|s| (s.pid, s.host)).collect();
        let elapsed = self.elapsed();
        let Self { state, stubs, script, held, terminals, strict, .. } = self;
        terminals.fill(state).doing(1, "fill a terminal")?;
        let place = Place { held, init, elapsed, hosts, terminals, strict: *strict };
        let made = objects::create_all(state, &place, script).map_err(|(index, source)| {
            let holds = |p: &&Process| p.fds.iter().any(|f| f.description as usize == index);
            let pid = state.processes.iter().find(holds).map_or(1, |p| p.pid);
            RestoreError::Kernel { pid, doing: "make an open file", source }
        })?;
        let farewells = objects::create_farewells(state, &place).doing(1, "make a socket")?;
        let objects = Instant::now();
        for p in &state.processes {
            let stub = find(stubs, p.pid)?;
            process::attributes(script, stub, p)?;
            process::actions(script, stub, p)?;
            advice::repeat(script, stub, p)?;
        }
        terminals.settle(state, stubs, script, self.launched.control())?;
        let attributes = Instant::now();
        for p in &state.processes {
            let stub = find(stubs, p.pid)?;
            install::install(script, self.launched.control(), stub, &p.fds, &made)?;
        }
        let host_of = |pid| stubs.iter().find(|s| s.pid == pid).map(|s| s.host);
        install::fill_epolls(script, state, host_of)?;
        install::fill_past(state, &made).doing(1, "fill an epoll instance")?;
        locks::of_descriptions(state, &made).doing(1, "lock a file")?;
        locks::of_processes(state, script, &place)?;
        locks::owners(state, &made, &place).doing(1, "set who is told of events")?;
        locks::signals(state, script, &place)?;
        terminals.finish(state).doing(1, "lock a terminal")?;
        let descriptors = Instant::now();
        for p in &state.processes {
            let stub = find(stubs, p.pid)?;
            let addresses = p.threads.iter().map(|t| process::resume_address(stub.host, t));
            let addresses: SysResult<Vec<u64>> = addresses.collect();
            let addresses = addresses.doing(p.pid, "read the restartable sequences")?;
            let tids = process::threads(script, stub, p)?;
            process::limits(script, stub, p)?;
            self.finishing.addresses.push(addresses);
            self.finishing.restored.push(Restored { pid: p.pid, host: stub.host, tids });
        }
        for (i, fd) in made.into_iter().enumerate() {
            match state.descriptions[i].kind {
                Kind::Tcp(_) => self.finishing.sockets.push((i, fd)),
                Kind::TcpListener(_) => self.finishing.listeners.push((i, fd)),
                _ => {}
            }
        }
        let first = state.descriptions.len();
        self.finishing.sockets.extend((first..).zip(farewells));
        let times = &mut self.finishing.times;
        times.objects = objects - start;
        times.attributes = attributes - objects;
        times.descriptors = descriptors - attributes;
        times.threads = descriptors.elapsed();
        let FinishTimes { objects, attributes, descriptors, threads, .. } = times;
        tracing::debug!(?objects, ?attributes, ?descriptors, ?threads, "prepared");
        Ok(())
    }

    /// Host name and domain name.
    fn host_names(&mut self) -> Result<(), RestoreError> {
        let Some((host, domain)) = &self.state.names else { return Ok(()) };
        // Without a namespace of its own, the name is that of the host.
        if is_ours(self.launched.pid, "uts").doing(1, "look for its namespace")? {
            return Ok(());
        }
        let script = &mut self.script;
        for (name, number, text) in [
            ("sethostname", libc::SYS_sethostname, host),
            ("setdomainname", libc::SYS_setdomainname, domain),
        ] {
            let at = script.data(text.as_bytes());
            script.call_on(name, text.clone(), number, &[at, text.len() as u64]);
        }
        script.run_ok(self.launched.pid).doing(1, "set the host name").map(drop)
    }

    /// Phase b: connects the TCP connections. `answers` tells what each one's peer expects. The
    /// network must have its addresses and routes, and be unplugged.
    pub fn connect(
        &mut self,
        answers: impl Fn(&TcpConnection) -> Peer,
    ) -> Result<Resumption, RestoreError> {
        self.expect(Stage::Prepared)?;
        let start = Instant::now();
        let elapsed = self.elapsed();
        let resumption = self.attempt(|spare| {
            let mut resumption = Resumption::default();
            for (index, fd) in std::mem::take(&mut spare.finishing.sockets) {
                let Some(c) = connection(&spare.state, index) else { continue };
                if c.state == TcpState::Closed {
                    continue;
                }
                let peer = if c.state.is_synchronized() { answers(c) } else { Peer::Silent };
                let done =
                    tcp::restore(&fd, c, peer, elapsed).doing(1, "restore a TCP connection")?;
                resumption.add(c, peer, &done);
                if tcp::is_unfinished(c, &done.unsent) {
                    spare.finishing.unsent.push((index, fd, done.unsent));
                }
            }
            Ok(resumption)
        })?;
        self.finishing.times.connect = start.elapsed();
        self.finishing.stage = Stage::Connected;
        Ok(resumption)
    }

    /// Connections that listeners make from now on have room for so many bytes that are not read.
    pub fn widen_listeners(&mut self, bytes: usize) -> Result<(), RestoreError> {
        self.attempt(|spare| {
            for (index, fd) in &spare.finishing.listeners {
                if let Kind::TcpListener(l) = &spare.state.descriptions[*index].kind {
                    sockets::widen(fd, &l.options, bytes).doing(1, "widen a listener")?;
                }
            }
            Ok(())
        })
    }

    /// Listeners are again what they were before [`Spare::widen_listeners`].
    pub fn narrow_listeners(&mut self) -> Result<(), RestoreError> {
        self.attempt(|spare| {
            for (index, fd) in std::mem::take(&mut spare.finishing.listeners) {
                if let Kind::TcpListener(l) = &spare.state.descriptions[index].kind {
                    sockets::set_buffers(fd.as_fd(), &l.options).doing(1, "narrow a listener")?;
                }
            }
            Ok(())
        })
    }

    /// Phase c, when output can leave: writes what the peers have not got, and closes sides that
    /// were closed.
    pub fn push_unsent(&mut self) -> Result<(), RestoreError> {
        let start = Instant::now();
        self.attempt(|spare| {
            for (index, fd, bytes) in std::mem::take(&mut spare.finishing.unsent) {
                let Some(c) = connection(&spare.state, index) else { continue };
                tcp::go_on(&fd, c, &bytes).doing(1, "go on with a TCP connection")?;
                if c.state == TcpState::LastAck {
                    spare.finishing.last.push(fd);
                }
            }
            Ok(())
        })?;
        self.finishing.times.unsent = start.elapsed();
        Ok(())
    }

    /// When the container has received the FINs of [`Resumption::fins`]: closes its own side of
    /// connections whose peer had closed first.
    pub fn close_sides(&mut self) -> Result<(), RestoreError> {
        self.attempt(|spare| {
            for fd in std::mem::take(&mut spare.finishing.last) {
                tcp::shut(&fd, Shutdown::Write).doing(1, "close a TCP connection")?;
            }
            Ok(())
        })
    }

    /// Phase d: credentials, registers and signals; the scratch area goes. Nothing runs yet.
    pub fn complete(&mut self) -> Result<Vec<Restored>, RestoreError> {
        self.expect(Stage::Connected)?;
        let start = Instant::now();
        let threads = self.finishing.restored.iter().flat_map(|r| &r.tids);
        let together = Together::with(self.pid(), threads.copied());
        self.attempt(Self::complete_all)?;
        // From now on a listener ends when the program closes it.
        self.finishing.listeners.clear();
        drop(together);
        for (p, restored) in self.state.processes.iter().zip(&self.finishing.restored) {
            settings::from_outside(p, restored, &self.affinity)
                .doing(p.pid, "set how its threads are scheduled")?;
        }
        self.finishing.times.complete = start.elapsed();
        self.finishing.stage = Stage::Complete;
        Ok(self.finishing.restored.clone())
    }

    fn complete_all(&mut self) -> Result<(), RestoreError> {
        let elapsed = self.elapsed();
        let Self { state, script, specials, finishing, launched, .. } = self;
        let now = process::credentials_now(launched.pid).doing(1, "read the credentials")?;
        for ((p, restored), addresses) in
            state.processes.iter().zip(&finishing.restored).zip(&finishing.addresses)
        {
            timers::set(script, restored.host, p, elapsed)?;
            for (thread, &tid) in p.threads.iter().zip(&restored.tids).rev() {
                filters::set(script, p, thread, tid)?;
                signals(script, p, thread);
                let creds = thread.settings.creds.as_ref().unwrap_or(&p.creds);
                if *creds != now {
                    process::credentials(script, creds, &now);
                }
                if thread.settings.death_signal != 0 {
                    // Changing the user would clear it.
                    let args = [libc::PR_SET_PDEATHSIG as u64, thread.settings.death_signal as u64];
                    script.call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, &args);
                }
                if tid != restored.host && !script.is_empty() {
                    script.run_ok(tid).doing(p.pid, "set signals and credentials")?;
                }
            }
            // What is left in the script is the leader's, which goes on to the last calls.
            let dumpable = u64::from(p.dumpable & 1);
            let args = [libc::PR_SET_DUMPABLE as u64, dumpable];
            script.call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, &args);
            let gadget = send_home(script, specials, restored.host, p)?;
            let munmap = Call::new(libc::SYS_munmap, &[SCRATCH, SCRATCH_LEN]);
            let result = remote::call_at(restored.host, gadget, munmap)
                .doing(p.pid, "take the scratch area away")?;
            if result != 0 {
                let source = SysError::errno("munmap", "the scratch area", -result as i32);
                return Err(RestoreError::Kernel { pid: p.pid, doing: "complete", source });
            }
            for ((thread, &tid), &rip) in p.threads.iter().zip(&restored.tids).zip(addresses) {
                registers(tid, thread, rip, elapsed).doing(p.pid, "set the registers")?;
                filters::enforce(thread, tid)?;
            }
        }
        Ok(())
    }

    /// How long the phases took.
    pub fn times(&self) -> FinishTimes {
        self.finishing.times
    }

    /// Lets all threads run, still traced by the calling thread.
    pub fn resume_all(&mut self) -> Result<(), RestoreError> {
        self.halt()?;
        self.each_thread(|tid| ptrace::cont(tid, 0))
    }

    /// Lets all threads run, and traces them no longer.
    pub fn detach_all(&mut self) -> Result<(), RestoreError> {
        self.halt()?;
        // The first that run may end the others.
        self.each_thread(|tid| match ptrace::detach(tid, 0) {
            Err(e) if e.is_gone() => Ok(()),
            other => other,
        })
    }

    /// Processes that job control had stopped stop again before they run.
    fn halt(&mut self) -> Result<(), RestoreError> {
        for (p, restored) in self.state.processes.iter().zip(&self.finishing.restored) {
            if p.place.stopped {
                kill(Pid::from_raw(restored.host), Signal::SIGSTOP)
                    .map_err(|e| SysError::errno("kill", format!("pid {}", p.pid), e as i32))
                    .doing(p.pid, "stop it again")?;
            }
        }
        Ok(())
    }

    fn each_thread(&mut self, f: impl Fn(i32) -> SysResult<()>) -> Result<(), RestoreError> {
        self.expect(Stage::Complete)?;
        for restored in &self.finishing.restored {
            for &tid in restored.tids.iter().rev() {
                f(tid).doing(restored.pid, "let a thread run")?;
            }
        }
        Ok(())
    }
}

/// A connection by its place: a description, or behind them one that has none.
fn connection(state: &State, index: usize) -> Option<&TcpConnection> {
    match state.descriptions.get(index) {
        Some(Description { kind: Kind::Tcp(c), .. }) => Some(c),
        Some(_) => None,
        None => state.farewells.get(index - state.descriptions.len()),
    }
}

impl Resumption {
    fn add(&mut self, c: &TcpConnection, peer: Peer, done: &Connected) {
        let segment =
            Segment { local: c.local, remote: c.remote, seq: done.rcv_nxt, ack: done.una };
        let has_all = tcp::has_all(c, peer);
        if peer == Peer::Gone && !has_all {
            self.resets.push(segment);
            return;
        }
        let fin = c.state.has_received_fin();
        if fin {
            self.fins.push(segment);
        }
        if has_all {
            let seq = segment.seq.wrapping_add(u32::from(fin));
            self.acks.push(Segment { seq, ack: segment.ack.wrapping_add(1), ..segment });
        }
    }
}

/// Queues a thread's pending signals, the leader's with those of the whole process: only a
/// thread itself may send itself just any siginfo.
fn signals(script: &mut Script, p: &Process, thread: &Thread) {
    let number = |info: &[u8]| info.first_chunk().map_or(0, |n| i32::from_ne_bytes(*n)) as u64;
    for info in &thread.pending {
        let at = script.data(info);
        let args = [p.pid as u64, thread.tid as u64, number(info), at];
        script.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &args);
    }
    if thread.tid == p.pid {
        for info in &p.pending {
            let at = script.data(info);
            let args = [p.pid as u64, number(info), at];
            script.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &args);
        }
    }
}

/// Moves the kernel's mappings to where the program expects them, with everything else that
/// waits in the script. Gives the address of a `syscall` instruction that stays.
fn send_home(
    script: &mut Script,
    specials: &[Special],
    host: i32,
    p: &Process,
) -> Result<u64, RestoreError> {
    const DOING: &str = "move the vdso home";
    let mut gadget = None;
    let mut homes = Vec::new();
    let mut moved = Vec::new();
    for special in specials {
        let here = |m: &&Mapping| m.source == Source::Vdso(special.part);
        let Some(home) = p.mappings.iter().find(here) else { continue };
        if home.end - home.start != special.len {
            return Err(RestoreError::Impossible {
                pid: p.pid,
                object: format!("{:?} of {} bytes", special.part, home.end - home.start),
                reason: format!("this kernel's has {}; run the same kernel on both", special.len),
            });
        }
        if special.part == VdsoPart::Vdso {
            let end = special.start + special.len;
            let found = remote::find_gadget(host, special.start, end).doing(p.pid, DOING)?;
            gadget = Some(home.start + (found - special.start));
        }
        homes.push(home.start);
        moved.push(*special);
    }
    space::move_specials(script, &moved, &homes);
    script.run_ok(host).doing(p.pid, DOING)?;
    gadget.ok_or_else(|| RestoreError::Impossible {
        pid: p.pid,
        object: "the vdso".into(),
        reason: "the checkpoint has none; a program that unmapped it cannot be restored".into(),
    })
}

/// ERESTARTNOHAND, ERESTARTNOINTR and ERESTARTSYS of the kernel's linux/errno.h.
const MADE_AGAIN: std::ops::RangeInclusive<i64> = -514..=-512;

fn registers(tid: i32, thread: &Thread, rip: u64, elapsed: Duration) -> SysResult<()> {
    let mut regs = thread.regs;
    regs[reg::RIP] = rip;
    let result = regs[reg::ORIG_RAX];
    regs[reg::ORIG_RAX] = if MADE_AGAIN.contains(&(result as i64)) {
        // Behind its call, as if that had been interrupted just now: the kernel makes it again, or
        // ends it with EINTR if a signal has come by then.
        regs[reg::RIP] += 2;
        std::mem::replace(&mut regs[reg::RAX], result)
    } else {
        // Not in a system call: nothing is to be restarted.
        u64::MAX
    };
    if let Some(wait) = thread.wait {
        shorten(tid, wait, elapsed, &mut regs);
    }
    if !thread.xstate.is_empty() {
        ptrace::set_xstate(tid, &thread.xstate)?;
    }
    ptrace::set_regs(tid, &regs)?;
    ptrace::set_blocked(tid, thread.blocked)
}

/// Leaves a call that is made again only the time that its wait has left. If there is no room for
/// it below the stack, it begins with all of it.
fn shorten(tid: i32, wait: Wait, elapsed: Duration, regs: &mut Regs) {
    let Some(register) = regs.get(usize::from(wait.register)).copied() else { return };
    let left = wait.left.map(Duration::from_nanos).or_else(|| {
        let mut bytes = [0; 16];
        memory::read(tid, register, &mut bytes).ok()?;
        wait.unit.decode(&bytes)
    });
    let Some(left) = left else { return };
    let place = TimeUnit::place(regs[reg::RSP]);
    let (value, bytes) = wait.unit.encode(left.saturating_sub(elapsed), place);
    if bytes.is_none_or(|bytes| memory::write(tid, place, &bytes).is_ok()) {
        regs[usize::from(wait.register)] = value;
    }
}

fn find(stubs: &[Stub], pid: i32) -> Result<&Stub, RestoreError> {
    stubs.iter().find(|s| s.pid == pid).ok_or_else(|| RestoreError::Impossible {
        pid,
        object: "the process".into(),
        reason: "the spare does not have it".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn threads_are_real_time_while_a_real_time_thread_waits_for_them() {
        let mut child = Command::new("sh")
            .args(["-c", "read line; sleep 60 & wait"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("a child");
        let pid = child.id() as i32;
        let mut stdin = child.stdin.take().expect("piped");
        let own = sched_getaffinity(Pid::from_raw(0)).expect("known");
        let class = || sched::attributes(pid).expect("it lives");
        let before = class();
        let class_of = |tid| {
            let a = sched::attributes(tid).expect("it lives");
            (a.policy, a.priority)
        };
        let together = Together::with(pid, [pid].into_iter());
        assert_eq!(class_of(pid), (0, 0), "by an ordinary one");
        drop(together);
        assert_eq!(class(), before, "by an ordinary one");
        sched::set_fifo(7).expect("real-time");
        let mut together = Together::with(pid, [pid].into_iter());
        let now = class_of(pid);
        // What it makes meanwhile is as it is, or its first step would have to wait.
        std::io::Write::write_all(&mut stdin, b"\n").expect("told");
        let children = format!("/proc/{pid}/task/{pid}/children");
        let born: i32 = loop {
            let all = std::fs::read_to_string(&children).expect("it lives");
            match all.split(' ').find_map(|n| n.parse().ok()) {
                Some(born) => break born,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let as_born = class_of(born);
        together.made(pid, &[born]);
        drop(together);
        let after = (class(), class_of(born));
        sched::set_ordinary().expect("ordinary");
        let _ = kill(Pid::from_raw(born), Signal::SIGKILL);
        child.kill().and_then(|()| child.wait()).expect("it ends");
        assert_eq!((now, as_born), ((libc::SCHED_FIFO as u32, 7), (libc::SCHED_FIFO as u32, 7)));
        assert_eq!(after, (before, (0, 0)));
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).expect("known"), own);
    }
}
