//! One-shot checkpoints: a tree is stopped once, captured whole, and then killed or let go.
//!
//! ```text
//! adopt_gently -> hold -> (the image is written) -> kill      the tree is gone
//!                                               \-> detach    it runs on, no trace left
//! ```
//! Invariant: until [`Held::kill`] nothing was done that the tree could notice. It survives us:
//! it is not traced with PTRACE_O_EXITKILL.

use super::tracer::Tracer;
use super::{CaptureError, Capturer, StopTimes, outside, sysv};
use crate::image::info::Info;
use crate::image::net::{TcpConnection, TcpState};
use crate::image::pages::PageSet;
use crate::image::{Kind, State};
use crate::sys::remote::{self, Call, SCRATCH, SCRATCH_LEN};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, memory, pidfd, ptrace, sockopt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const TCP_REPAIR: i32 = 19;
/// How long what passes by itself is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(2);

/// A tree that stands still, and its checkpoint. Dropping it lets the tree run on.
pub struct Held {
    capturer: Option<Capturer>,
    /// Its state.
    pub state: State,
    /// All its pages.
    pub pages: PageSet,
    /// How long capturing took.
    pub times: StopTimes,
    /// What a restore will find cut off, in words.
    pub notes: Vec<String>,
}

impl Capturer {
    /// As [`Capturer::adopt`], but the tree outlives the caller, and may be in the caller's
    /// namespaces.
    pub fn adopt_gently(root: i32, diag: UnixDiag) -> Result<Self, CaptureError> {
        let mut me = Self::empty(root, diag)?;
        me.tracer = Tracer::gentle();
        if me.sysv.is_none() {
            me.sysv = Some(sysv::SystemV::open_shared(root)?);
        }
        match me.seize_tree() {
            Ok(()) => {
                for tid in me.tracer.all() {
                    me.interrupted.look(tid);
                }
                Ok(me)
            }
            Err(e) => {
                let _ = me.tracer.detach();
                Err(e)
            }
        }
    }

    /// Stops the tree, captures all of it, and leaves it stopped. On an error it runs on.
    pub fn hold(mut self) -> Result<Held, CaptureError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_hold() {
                Ok((state, times, notes)) => {
                    let pages = std::mem::take(&mut self.pages);
                    return Ok(Held { capturer: Some(self), state, pages, times, notes });
                }
                Err(CaptureError::Transient(_)) if Instant::now() < deadline => {
                    self.tracer.thaw()?;
                    // Who has stopped since nobody waited any longer goes on here, and needs the time.
                    self.pump()?;
                    std::thread::sleep(RETRY);
                    self.pump()?;
                    self.begin_full();
                }
                Err(e) => {
                    // The reason counts, not what letting go says of it.
                    let _ = self.detach();
                    return Err(e);
                }
            }
        }
    }

    fn try_hold(&mut self) -> Result<(State, StopTimes, Vec<String>), CaptureError> {
        let begin = Instant::now();
        let mut times = StopTimes::default();
        self.pump()?;
        self.freeze()?;
        times.freeze = begin.elapsed();
        let mut state = self.capture(&mut times, &mut super::times::Lap(Instant::now()))?;
        self.files.fill_in(&mut state);
        let mut notes = outside::check(&self.pids(), &mut self.refusals)?;
        notes.extend(outside::terminals(&self.pids(), &state)?);
        notes.extend(outside::mounts(self.root)?);
        notes.extend(outside::network(self.root)?);
        let undoes = self.processes.iter().filter(|(_, tracked)| tracked.threads.undoes());
        notes.extend(undoes.map(|(pid, _)| {
            format!(
                "pid {pid} has semaphores to be undone when it ends (SEM_UNDO): a restore has not"
            )
        }));
        check_connections(&state)?;
        times.pages = self.pages.pages();
        times.stop_pages = times.pages;
        times.total = begin.elapsed();
        let mut pages = std::mem::take(&mut self.pages);
        self.finish_runs(&state, &mut pages);
        self.finish(state.objects.iter().map(|o| o.id));
        self.pages = pages;
        Ok((state, times, notes))
    }

    /// Takes the scratch areas away. All threads are stopped.
    pub(super) fn remove_scratch(&mut self) -> Result<(), CaptureError> {
        for pid in &self.pids() {
            let vmas = super::maps::read(*pid, self.objects.systems())?;
            let starts = |v: &super::maps::Vma| v.mapping.start == SCRATCH;
            if !vmas.iter().any(starts) || !remote::has_scratch(*pid)? {
                continue;
            }
            let Some((start, end)) = super::AddressSpace::vdso(&vmas) else { continue };
            let gadget = remote::find_gadget(*pid, start, end)?;
            // The kernel forgets a critical section of rseq when it sees other code run, see
            // threads.rs.
            let rseq = ptrace::rseq(*pid)?;
            let mut section = [0u8; 8];
            if let Some(r) = rseq {
                memory::read(*pid, r.address + 8, &mut section)?;
            }
            let munmap = Call::new(libc::SYS_munmap, &[SCRATCH, SCRATCH_LEN]);
            let result = remote::call_at(*pid, gadget, munmap)?;
            if let Some(r) = rseq
                && section != [0; 8]
            {
                memory::write(*pid, r.address + 8, &section)?;
            }
            if result != 0 {
                let object = format!("the scratch area of pid {pid}");
                return Err(SysError::errno("munmap", object, -result as i32).into());
            }
        }
        Ok(())
    }

    /// Duplicates of all TCP connections, in repair mode: they close without a word.
    fn silence(&self, state: &State) -> Result<Vec<OwnedFd>, CaptureError> {
        let mut all = Vec::new();
        for process in &state.processes {
            let Some(tracked) = self.processes.values().find(|t| t.attributes.pid == process.pid)
            else {
                continue;
            };
            for fd in &process.fds {
                let kind = state.descriptions.get(fd.description as usize).map(|d| &d.kind);
                if let Some(Kind::Tcp(c)) = kind
                    && c.state != TcpState::Closed
                {
                    let dup = pidfd::get_fd(tracked.handle.as_fd(), fd.number)?;
                    sockopt::set_i32(dup.as_fd(), libc::IPPROTO_TCP, TCP_REPAIR, 1)?;
                    all.push(dup);
                }
            }
        }
        Ok(all)
    }

    fn kill_all(&mut self) -> Result<(), CaptureError> {
        // Children before parents, so that none is adopted on its way.
        for pid in self.in_order()?.into_iter().rev() {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(e) => {
                    return Err(SysError::errno("kill", format!("pid {pid}"), e as i32).into());
                }
            }
        }
        // A leader is not gone before its threads are, and the first of a pid namespace not
        // before all others: so ask for all of them in turn.
        let mut left = self.tracer.all();
        let deadline = Instant::now() + PATIENCE;
        while let Some(&tid) = left.first() {
            if Instant::now() > deadline {
                let object = format!("tid {tid}, which was killed and has not ended");
                return Err(SysError::errno("wait", object, libc::ETIMEDOUT).into());
            }
            left.retain(|tid| match ptrace::poll_wait(*tid) {
                Ok(Some((_, status))) => !status.is_end(),
                _ => std::path::Path::new(&format!("/proc/{tid}")).exists(),
            });
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }
}

impl Held {
    /// Number of threads in the tree.
    pub fn thread_count(&self) -> usize {
        self.capturer.as_ref().map_or(0, Capturer::thread_count)
    }

    /// Lets the tree run on as if nothing had been.
    pub fn release(mut self) -> Result<(), CaptureError> {
        self.capturer.take().map_or(Ok(()), Capturer::detach)
    }

    /// Ends the tree. On an error nothing was ended yet, or all will be.
    pub fn kill(mut self) -> Result<(), CaptureError> {
        let Some(mut capturer) = self.capturer.take() else { return Ok(()) };
        match capturer.silence(&self.state) {
            Ok(connections) => {
                let killed = capturer.kill_all();
                drop(connections);
                killed
            }
            Err(e) => {
                capturer.detach()?;
                Err(e)
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(capturer) = self.capturer.take()
            && let Err(error) = capturer.detach()
        {
            tracing::error!(%error, "the tree could not be let go");
        }
    }
}

/// What an image of the tree with this root says of itself; its processes are counted later.
pub fn about(root: i32, release: &str) -> Result<Info, CaptureError> {
    let read =
        |path: String| std::fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e));
    if super::tracer::tids(root).is_ok_and(|tids| tids.len() > 1)
        && super::tracer::has_ended(root, root)
    {
        return Err(super::tracer::leader_has_ended(root));
    }
    let command = read(format!("/proc/{root}/cmdline"))?.replace('\0', " ");
    let status = read(format!("/proc/{root}/status"))?;
    let pid = status
        .lines()
        .find_map(|l| l.strip_prefix("NSpid:")?.split_whitespace().last()?.parse().ok())
        .unwrap_or(root);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(Info {
        release: release.into(),
        taken_ms: now.map_or(0, |d| d.as_millis() as u64),
        kernel: read("/proc/sys/kernel/osrelease".into())?.trim().into(),
        boot: crate::restore::boot(),
        host: read("/proc/sys/kernel/hostname".into())?.trim().into(),
        root: pid,
        host_pid: root,
        command: command.trim().into(),
        processes: 0,
        namespaces: super::namespaces_of(root)?,
        notes: Vec::new(),
        tmpfs: super::tmpfs::own_mounts(root)?,
    })
}

/// The other end of a connection, if it is in the same tree.
pub fn other_end<'a>(state: &'a State, c: &TcpConnection) -> Option<&'a TcpConnection> {
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    state.descriptions.iter().find_map(|d| match &d.kind {
        Kind::Tcp(other)
            if plain(other.local) == plain(c.remote)
                && plain(other.remote) == plain(c.local)
                && other.state != TcpState::Closed =>
        {
            Some(&**other)
        }
        _ => None,
    })
}

/// Connections within the tree must have stood still while both ends were captured; the peers of
/// others go on without us, and nothing holds their packets back.
pub(super) fn check_connections(state: &State) -> Result<(), CaptureError> {
    for d in &state.descriptions {
        let Kind::Tcp(c) = &d.kind else { continue };
        if c.state == TcpState::Closed {
            continue;
        }
        match other_end(state, c) {
            Some(other) => {
                let una = c.write_seq.wrapping_sub(c.send_queue.len() as u32);
                if other.rcv_nxt.wrapping_sub(una) as i32 <= -1 {
                    return Err(CaptureError::Transient("data is on its way over the loopback"));
                }
            }
            None => {
                return Err(CaptureError::unsupported(
                    format!("the TCP connection {} - {}", c.local, c.remote),
                    "its other end is outside of the tree, or closed and nobody's; close it before, \
                     or protect the container continuously"
                        .into(),
                ));
            }
        }
    }
    Ok(())
}
