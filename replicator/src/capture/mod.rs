//! Checkpoints of a running container, taken from outside.
//!
//! ```text
//!  container runs      | stop (CP-1)                                          | container runs
//!  pre-copy round(s)   | hold input, freeze, last round, threads, descriptors,| encode, send
//!                      | sockets, seal output, thaw, release input            |
//! ```
//! Output is sealed last: what the frozen container's TCP still sends during the capture
//! (retransmissions, delayed acknowledgements, paced data) says nothing that the captured
//! sockets do not know, and a stop that fails has sealed nothing.
//!
//! [`Capturer`] lives on one OS thread, the stop thread. It keeps CP-1 (the order of a stop) and
//! CP-3 (what cannot be captured is an error that names it, never left out).

mod advice;
mod farewell;
mod fdinfo;
mod files;
mod glance;
mod guards;
mod inet;
mod inotify;
mod lineage;
mod locks;
mod maps;
mod memory;
mod namespaces;
mod objects;
mod one_shot;
mod options;
mod outside;
mod pipes;
mod process;
mod refusals;
mod remembered;
mod surroundings;
mod survey;
mod sysv;
mod tcp;
mod tcp_options;
mod terminals;
mod threads;
mod timers;
mod tmpfs;
mod tracer;
mod unix;
mod waits;
mod watched;

use crate::Epoch;
use crate::image::pages::PageSet;
use crate::image::task::{Place, ProcessSettings, Timers};
use crate::image::tree::EntryKind;
use crate::image::{Clocks, Credentials, Kind, Process, Source, State};
use crate::sys::remote::{self, Batch, Call, SCRATCH};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, pidfd, uffd};
use memory::AddressSpace;
use process::Attributes;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tracer::{Change, Tracer};

pub use glance::warm_up;
pub use namespaces::namespaces_of;
pub use one_shot::{Held, about, other_end};
pub use refusals::Refusal;
pub use survey::Survey;

/// Why a checkpoint could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel refused a call.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A file of /proc could not be read.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The container holds something that is not protected. Protection must not start, or must
    /// end, with this reason.
    #[error("{object}: {reason}")]
    Unsupported {
        /// Where it was found.
        object: String,
        /// What it is, and what to do about it.
        reason: String,
    },
    /// Something is changing just now; the stop was taken back and can be tried again soon.
    #[error("not now: {0}")]
    Transient(&'static str),
    /// The container's processes have ended.
    #[error("the container has ended")]
    Ended,
}

impl CaptureError {
    fn proc(path: &str, source: std::io::Error) -> Self {
        CaptureError::Proc { path: path.to_owned(), source }
    }

    fn unsupported(object: String, reason: String) -> Self {
        CaptureError::Unsupported { object, reason }
    }

    /// Whether a process or thread went away while it was looked at.
    fn is_gone(&self) -> bool {
        match self {
            CaptureError::Sys(e) => e.is_gone(),
            CaptureError::Proc { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
            }
            _ => false,
        }
    }
}

/// The border between a container and the network, as a stop needs it. The gateway implements
/// it; this crate knows nothing of frames.
pub trait Boundary {
    /// From now on nothing reaches the container.
    fn hold_input(&mut self);
    /// All that the container has sent so far belongs to `epoch`; what it sends later does not.
    /// Called once the state was captured, while the container is still frozen.
    fn seal(&mut self, epoch: Epoch);
    /// Ends the hold. Called after each [`Boundary::hold_input`], also when the stop failed.
    fn release_input(&mut self);
}

/// A boundary without a network: for one-shot checkpoints and tests.
#[derive(Debug, Default)]
pub struct NoBoundary;

impl Boundary for NoBoundary {
    fn hold_input(&mut self) {}
    fn seal(&mut self, _: Epoch) {}
    fn release_input(&mut self) {}
}

/// How long capturing took in a stop, by kind of state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindTimes {
    /// Mappings and pages of processes.
    pub memory: Duration,
    /// Memory that is shared, files of a tmpfs, System V objects, names.
    pub objects: Duration,
    /// Registers, signals, credentials and the tree.
    pub threads: Duration,
    /// Timers that send signals.
    pub timers: Duration,
    /// Descriptors, with the sockets that they are of.
    pub descriptors: Duration,
    /// What travels through sockets, and connections that no descriptor names any more.
    pub in_flight: Duration,
}

/// How long each stage of a stop took.
#[derive(Clone, Copy, Debug, Default)]
pub struct StopTimes {
    /// Holding input.
    pub hold: Duration,
    /// Stopping all threads.
    pub freeze: Duration,
    /// Draining and sealing output.
    pub seal: Duration,
    /// The last round: mappings, scan and copy.
    pub memory: Duration,
    /// Registers and signals.
    pub threads: Duration,
    /// Descriptors and sockets.
    pub files: Duration,
    /// The three before, by kind.
    pub kinds: KindTimes,
    /// Letting all threads go on.
    pub thaw: Duration,
    /// From the hold to the thaw: the stop time.
    pub total: Duration,
    /// Pages copied in the stop.
    pub stop_pages: usize,
    /// Pages copied in all, pre-copy included.
    pub pages: usize,
    /// Descriptors that one glance told all of.
    pub glanced: usize,
    /// Threads that were not asked: a glance told that they would answer as before.
    pub unasked: usize,
}

struct Tracked {
    handle: OwnedFd,
    space: AddressSpace,
    advice: advice::Advices,
    threads: threads::Threads,
    files: files::Files,
    attributes: Attributes,
    /// They were read while it ran, and are others than in the stop before.
    is_doubtful: bool,
    timers: timers::Timers,
}

/// How descriptors are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Glances {
    /// All at once, where the kernel can.
    #[default]
    On,
    /// One by one, as on a kernel that cannot; for comparison.
    Off,
    /// At once and one by one; a difference is an error.
    Checked,
}

/// Takes checkpoints of one container. All of it stays on the thread that made it.
pub struct Capturer {
    tracer: Tracer,
    processes: BTreeMap<i32, Tracked>,
    objects: objects::Objects,
    tmpfs: tmpfs::Mounts,
    namespaces: surroundings::Namespaces,
    vdso: u64,
    sysv: Option<sysv::SystemV>,
    root: i32,
    offsets: (i64, i64),
    diag: UnixDiag,
    files: files::Memory,
    pages: PageSet,
    batch: Batch,
    interrupted: waits::Interrupted,
    /// The next stop that succeeds does not end.
    still: bool,
    glances: Glances,
    refusals: refusals::Refusals,
    remains: lineage::Remains,
    farewells: farewell::Farewells,
}

impl Capturer {
    /// Seizes the container whose init has this host pid, with all its descendants. From now on
    /// the container dies with the calling thread's process.
    ///
    /// `diag` must have been opened in the container's network namespace.
    pub fn adopt(root: i32, diag: UnixDiag) -> Result<Self, CaptureError> {
        let mut me = Self::empty(root, diag)?;
        me.seize_tree()?;
        Ok(me)
    }

    /// Takes over processes that the calling thread has seized already and that run: (host pid,
    /// host tids), the container's init first.
    pub fn adopt_running(tree: &[(i32, Vec<i32>)], diag: UnixDiag) -> Result<Self, CaptureError> {
        let root = tree.first().ok_or(CaptureError::Ended)?.0;
        let mut me = Self::empty(root, diag)?;
        for (pid, tids) in tree {
            me.tracer.adopt_running(*pid, tids);
        }
        me.remains.find(&me.tracer.processes())?;
        Ok(me)
    }

    fn empty(root: i32, diag: UnixDiag) -> Result<Self, CaptureError> {
        if process::ended(root)?.is_some() {
            return Err(tracer::leader_has_ended(root));
        }
        let tmpfs = tmpfs::Mounts::find(root)?;
        Ok(Self {
            tracer: Tracer::new(),
            processes: BTreeMap::new(),
            objects: objects::Objects::new(tmpfs.devices()),
            tmpfs,
            namespaces: surroundings::Namespaces::of(root)?,
            vdso: 0,
            sysv: sysv::SystemV::open(root)?,
            root,
            offsets: clock_offsets(root)?,
            diag,
            files: files::Memory::default(),
            pages: PageSet::default(),
            batch: Batch::new(),
            interrupted: waits::Interrupted::default(),
            still: false,
            glances: Glances::On,
            refusals: refusals::Refusals::default(),
            remains: lineage::Remains::default(),
            farewells: farewell::Farewells::default(),
        })
    }

    fn seize_tree(&mut self) -> Result<(), CaptureError> {
        let is_gone = |e: &SysError| e.is_gone() || e.code() == libc::ENOENT;
        let mut todo = vec![self.root];
        while let Some(pid) = todo.pop() {
            let seized = self.tracer.seize(pid).and_then(|()| tracer::tids(pid));
            let tids = match seized {
                Err(e) if pid != self.root && is_gone(&e) => continue,
                // One that has ended cannot be seized.
                Err(e) if e.code() == libc::EPERM && tracer::has_ended(pid, pid) => {
                    match tracer::tids(pid) {
                        Ok(tids) if tids.len() > 1 => return Err(tracer::leader_has_ended(pid)),
                        Ok(_) => self.remains.add(pid),
                        // Its parent has just waited for it.
                        Err(e) if is_gone(&e) => {}
                        Err(e) => return Err(e.into()),
                    }
                    continue;
                }
                other => other?,
            };
            for tid in tids {
                todo.extend(lineage::children(pid, tid));
            }
        }
        if self.tracer.is_empty() { Err(CaptureError::Ended) } else { Ok(()) }
    }

    /// Host pid of the container's init.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// Number of threads in the container.
    pub fn thread_count(&self) -> usize {
        self.tracer.len()
    }

    /// Processor time that the container's processes have used so far, in all: how much it is at
    /// work. Those that have ended count no more.
    pub fn cpu_time(&self) -> Duration {
        let used = |pid: &i32| {
            let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(*pid)).ok()?;
            nix::time::clock_gettime(clock).ok().map(Duration::from)
        };
        self.tracer.processes().iter().filter_map(used).sum()
    }

    /// Handles what the container's threads wait for (signals, clones, exits). To be called
    /// whenever SIGCHLD arrives. Gives [`CaptureError::Ended`] when the container's init is gone.
    pub fn pump(&mut self) -> Result<(), CaptureError> {
        self.tracer.pump()?;
        self.follow_changes();
        if self.tracer.is_empty() { Err(CaptureError::Ended) } else { Ok(()) }
    }

    fn follow_changes(&mut self) {
        for change in self.tracer.take_changes() {
            match change {
                Change::Started(_) => {}
                Change::Executed(pid) | Change::Ended(pid, _) => {
                    if matches!(change, Change::Ended(..)) {
                        self.remains.add(pid);
                    }
                    self.namespaces.forget(pid);
                    match self.processes.remove(&pid) {
                        Some(t) => t.space.shared_objects().for_each(|o| self.objects.suspect(o)),
                        // It came and went unseen.
                        None => self.objects.suspect_all(),
                    }
                }
            }
        }
    }

    /// How descriptors are looked at from the next full checkpoint on.
    pub fn set_glances(&mut self, glances: Glances) {
        self.glances = glances;
    }

    /// Forgets what was captured before: the next checkpoint is a full one.
    pub fn begin_full(&mut self) {
        self.processes.clear();
        self.objects.clear();
        self.pages.clear();
    }

    /// The next stop that succeeds is the last one: the container stands still after it, until
    /// [`Capturer::go_on`].
    pub fn stand_still(&mut self) {
        self.still = true;
    }

    /// Takes [`Capturer::stand_still`] back, and ends the stop if there was one.
    pub fn go_on(&mut self) -> Result<(), CaptureError> {
        self.still = false;
        Ok(self.tracer.thaw()?)
    }

    /// Lets the container go for good, without tracer and without protection. Nothing of ours
    /// stays in it.
    pub fn detach(mut self) -> Result<(), CaptureError> {
        // A stop that is noticed by nobody, also where a call would end with EINTR.
        let cleaned = self.freeze().and_then(|()| self.remove_scratch());
        let detached = self.tracer.detach();
        match cleaned {
            Err(error) if !matches!(error, CaptureError::Ended) => {
                tracing::warn!(%error, "the scratch area of a process stays");
            }
            _ => {}
        }
        Ok(detached?)
    }

    /// Starts to watch the memory of processes that are not watched yet: a short stop, none if
    /// there is no such process. Everything that can be refused without a stop is refused here.
    pub fn prepare(&mut self) -> Result<(), CaptureError> {
        self.follow_changes();
        let pids = self.pids();
        if pids.iter().all(|p| self.processes.contains_key(p)) {
            return Ok(());
        }
        self.freeze()?;
        let result = self.attach_new();
        self.tracer.thaw()?;
        result
    }

    fn pids(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.tracer.processes();
        // Parents were there before their children, but pids wrap around; the order is made
        // exact when the state is put together.
        all.sort_by_key(|p| (*p != self.root, *p));
        all
    }

    fn freeze(&mut self) -> Result<(), CaptureError> {
        let frozen = self.tracer.freeze();
        let done = self.settle().and(frozen);
        if done.is_err() {
            self.tracer.thaw()?;
        }
        done
    }

    fn settle(&mut self) -> Result<(), CaptureError> {
        self.interrupted.retain(|tid| self.tracer.has(tid));
        for tid in self.tracer.stopped() {
            self.interrupted.settle(tid)?;
        }
        Ok(())
    }

    /// Watches every process that is not watched yet. All threads are stopped.
    fn attach_new(&mut self) -> Result<(), CaptureError> {
        self.follow_changes();
        for pid in self.pids() {
            if !self.processes.contains_key(&pid) {
                let attached = self.attach(pid);
                if let Some(tracked) = self.refusals.admit(attached)? {
                    self.processes.insert(pid, tracked);
                }
            }
        }
        Ok(())
    }

    fn attach(&mut self, pid: i32) -> Result<Tracked, CaptureError> {
        namespaces::check_same(self.root, pid)?;
        self.namespaces.check(pid)?;
        let attributes = process::read(pid, None)?;
        let vmas = maps::read(pid, self.objects.own_devices())?;
        let (start, end) = AddressSpace::vdso(&vmas).ok_or_else(|| {
            CaptureError::unsupported(format!("pid {pid}"), "it has no vdso".into())
        })?;
        let gadget = remote::find_gadget(pid, start, end)?;
        if self.vdso == 0 {
            self.vdso = remote::fingerprint(pid, start, end)?;
        }
        // A child made by fork has inherited the scratch area of its parent.
        if !vmas.iter().any(|v| v.mapping.start == SCRATCH) {
            remote::map_scratch(pid, gadget).map_err(|e| match e.code() {
                libc::EEXIST => CaptureError::unsupported(
                    format!("pid {pid}"),
                    format!("it maps memory at {SCRATCH:#x}, which nilicon needs for itself"),
                ),
                _ => e.into(),
            })?;
        }
        let handle = pidfd::open(pid)?;
        let flags = libc::O_CLOEXEC as u64 | uffd::USER_MODE_ONLY;
        self.batch.push(Call::new(libc::SYS_userfaultfd, &[flags]));
        let number = self.batch.run_all_ok(pid)?[0];
        let uffd = pidfd::get_fd(handle.as_fd(), number as i32);
        self.batch.push(Call::new(libc::SYS_close, &[number as u64]));
        self.batch.run_all_ok(pid)?;
        Ok(Tracked {
            space: AddressSpace::new(pid, attributes.pid, uffd?)?,
            advice: advice::Advices::default(),
            handle,
            threads: threads::Threads::open(pid, self.glances),
            files: files::Files::open(pid, self.glances),
            attributes,
            is_doubtful: true,
            timers: timers::Timers::open(pid)?,
        })
    }

    /// From now on a device, address, route or rule that is made or taken away in the container's
    /// network is refused (CP-3).
    pub fn watch_network(&mut self) -> Result<(), CaptureError> {
        self.namespaces.watch_network(self.root)
    }

    /// Whether the end of a connection would wait for the next stop.
    pub fn keeps_connections(&self) -> bool {
        self.farewells.are_kept()
    }

    /// Lets go if the last stop was so long ago.
    pub fn let_go_after(&mut self, time: Duration) {
        self.farewells.let_go_after(time);
    }

    /// No checkpoint follows: what was kept for one goes back to the kernel alone.
    pub fn let_go(&mut self) {
        self.farewells.let_go();
    }

    /// One round of pre-copy: copies what was written since the last round while the container
    /// runs, and reads what rarely changes. Gives the number of pages copied.
    pub fn precopy(&mut self) -> Result<usize, CaptureError> {
        let Self { processes, pages, objects, diag, namespaces, .. } = self;
        let before = pages.pages();
        for (pid, tracked) in processes {
            match namespaces.check(*pid) {
                Err(e) if !e.is_gone() => return Err(e),
                _ => {}
            }
            // Pages last: what is written meanwhile is left for the stop.
            let read = process::read(*pid, Some(&tracked.attributes)).and_then(|attributes| {
                tracked.threads.look_ahead()?;
                let handle = tracked.handle.as_fd();
                let looked = tracked.files.look_ahead(*pid, handle, objects, diag);
                looked.map(|()| attributes)
            });
            let round = tracked.space.round(pages, objects, false);
            match (round, read) {
                (Ok(()), Ok(attributes)) => {
                    tracked.is_doubtful |= attributes != tracked.attributes;
                    tracked.attributes = attributes;
                    let changed = tracked.space.is_changed();
                    match tracked.advice.look(*pid, tracked.attributes.locked, changed) {
                        Err(e) if !e.is_gone() => return Err(e),
                        _ => {}
                    }
                }
                // It has just ended; pump will hear of it.
                (Err(e), _) | (_, Err(e)) if e.is_gone() => {}
                (Err(e), _) | (_, Err(e)) => return Err(e),
            }
        }
        self.look_at_segments()?;
        match self.tmpfs.walk(&mut self.objects) {
            Ok(_) => {}
            // A name that went away meanwhile: the stop sees what is there.
            Err(e) if e.is_gone() => {}
            Err(e) => return Err(e),
        }
        self.copy_objects()?;
        Ok(self.pages.pages() - before)
    }

    /// Copies what was written to objects. Says whether the mappings must be read anew first.
    fn copy_objects(&mut self) -> Result<bool, CaptureError> {
        self.objects.copy(&mut self.pages)?;
        let renamed = self.objects.take_renamed();
        if renamed {
            self.processes.values_mut().for_each(|t| t.space.read_anew());
        }
        Ok(renamed)
    }

    /// Stops the container, captures what changed and lets it go on (CP-1). The result replaces
    /// the contents of `state` and `pages`.
    ///
    /// On an error the container runs on, nothing was sealed, and what was copied so far is kept
    /// for the next try with the same number.
    pub fn stop(
        &mut self,
        epoch: Epoch,
        boundary: &mut dyn Boundary,
        state: &mut State,
        pages: &mut PageSet,
    ) -> Result<StopTimes, CaptureError> {
        let begin = Instant::now();
        let mut times = StopTimes::default();
        let before = self.pages.pages();
        boundary.hold_input();
        times.hold = begin.elapsed();
        let result = self.freeze().and_then(|()| {
            times.freeze = begin.elapsed() - times.hold;
            let mut lap = Lap(Instant::now());
            let captured = self.capture(&mut times, &mut lap);
            if captured.is_ok() {
                boundary.seal(epoch);
                times.seal = lap.next();
            }
            let stays = self.still && captured.is_ok();
            let thawed = if stays { Ok(()) } else { self.tracer.thaw() };
            times.thaw = lap.next();
            let captured = captured?;
            thawed?;
            Ok(captured)
        });
        times.total = begin.elapsed();
        boundary.release_input();
        *state = result?;
        times.stop_pages = self.pages.pages() - before;
        times.pages = self.pages.pages();
        self.finish_pages(state);
        std::mem::swap(pages, &mut self.pages);
        self.pages.clear();
        Ok(times)
    }

    fn capture(&mut self, times: &mut StopTimes, lap: &mut Lap) -> Result<State, CaptureError> {
        self.attach_new()?;
        self.interrupted.clocks_are_read();
        let mut state = State { clocks: self.clocks()?, ..State::default() };
        let order = self.in_order()?;
        let inner_pids: HashMap<i32, i32> =
            self.processes.iter().map(|(pid, t)| (*pid, t.attributes.pid)).collect();
        let mut builder = files::Builder::new(inner_pids.clone());
        for pid in &order {
            let tracked = self.processes.get_mut(pid).ok_or(CaptureError::Ended)?;
            tracked.files.glance(&mut builder)?;
        }
        builder.sort_watchers();
        spent(&mut times.files, &mut times.kinds.descriptors, lap);
        for pid in &order {
            let tracked = self.processes.get_mut(pid).ok_or(CaptureError::Ended)?;
            let tids = self.tracer.threads_of(*pid);
            if tids.first() != Some(pid) {
                let error = tracer::leader_has_ended(*pid);
                self.refusals.admit::<()>(Err(error))?;
                continue;
            }
            let is_filtered = |tid| self.tracer.is_filtered(tid);
            let captured = tracked.threads.capture(&tids, &self.interrupted, is_filtered);
            let Some((mut threads, inner)) = self.refusals.admit(captured)? else { continue };
            times.unasked += tracked.threads.unasked();
            if tracked.attributes.seccomp != 0 && !is_filtered(*pid) {
                let why = "it runs under a seccomp filter that we may not read; give nilicon \
                           CAP_SYS_ADMIN and no filter of its own";
                let error = CaptureError::unsupported(format!("pid {pid}"), why.into());
                self.refusals.admit::<()>(Err(error))?;
            }
            let a = &tracked.attributes;
            if tracked.is_doubtful
                || !tracked.threads.is_unchanged_outside()
                || tracked.threads.are_stale(*pid, &a.creds)
                || (inner.group, inner.session) != (a.pgid, a.sid)
            {
                let read = process::read(*pid, Some(a));
                if let Some(now) = self.refusals.admit(read)? {
                    (tracked.attributes, tracked.is_doubtful) = (now, false);
                    tracked.threads.remember_outside();
                }
            }
            let securebits = tracked.threads.securebits(*pid);
            let creds = Credentials { securebits, ..tracked.attributes.creds.clone() };
            tracked.threads.add_credentials(&tids, &creds, &mut threads)?;
            match terminals::of_stat(tracked.attributes.terminal) {
                // An image has no terminal of its launcher, and says so.
                _ if self.tracer.is_gentle() => {}
                Ok(None) => {}
                Ok(Some(index)) => builder.terminals.add_controlled(*pid, index),
                Err((major, minor)) => {
                    let why = format!(
                        "a terminal of the host ({major}:{minor}) controls it; run it in a session \
                         of its own (setsid)"
                    );
                    let error = CaptureError::unsupported(format!("pid {pid}"), why);
                    self.refusals.admit::<()>(Err(error))?;
                }
            }
            spent(&mut times.threads, &mut times.kinds.threads, lap);
            let posix = tracked.timers.capture(*pid, &tids, &threads, &mut self.batch)?;
            let mut timers = Timers { interval: inner.timers, posix };
            timers.count_from(self.interrupted.since_clocks());
            spent(&mut times.threads, &mut times.kinds.timers, lap);
            if self.refusals.collecting() {
                tracked.space.look(&mut self.objects)?;
            } else {
                tracked.space.round(&mut self.pages, &mut self.objects, true)?;
            }
            let volumes = self.tmpfs.volumes();
            refuse_mappings(*pid, tracked.space.vmas(), volumes, &mut self.refusals)?;
            let mappings = tracked.space.mappings();
            let stuck = guards::refuse_stuck(*pid, &threads, tracked.space.vmas());
            self.refusals.admit(stuck)?;
            let mut advice = tracked.advice.take(*pid, tracked.attributes.locked)?;
            tracked.space.guards().add_to(&mut advice);
            spent(&mut times.memory, &mut times.kinds.memory, lap);
            let handle = tracked.handle.as_fd();
            let world = files::World {
                diag: &self.diag,
                objects: &mut self.objects,
                memory: &mut self.files,
            };
            let refusals = &mut self.refusals;
            let fds =
                tracked.files.capture(*pid, handle, &mut builder, &mut state, world, refusals)?;
            spent(&mut times.files, &mut times.kinds.descriptors, lap);
            let a = &tracked.attributes;
            let mut mm = a.mm;
            mm.brk = inner.brk;
            state.processes.push(Process {
                pid: a.pid,
                ppid: inner_pids.get(&a.ppid).copied().unwrap_or(0),
                pgid: a.pgid,
                sid: a.sid,
                mappings,
                mm,
                auxv: a.auxv.clone(),
                exe: a.exe.clone(),
                threads,
                actions: inner.actions,
                pending: match tracked.threads.nothing_pends() {
                    true => Vec::new(),
                    false => crate::sys::ptrace::pending(*pid, true)?,
                },
                fds,
                cwd: a.cwd.clone(),
                umask: a.umask,
                limits: a.limits.clone(),
                creds,
                dumpable: inner.dumpable,
                timers,
                place: Place {
                    born: a.born,
                    exit_signal: a.exit_signal,
                    subreaper: inner.subreaper,
                    stopped: self.tracer.is_halted(*pid),
                },
                settings: ProcessSettings {
                    root: a.root.clone(),
                    personality: inner.personality,
                    oom_score_adj: a.oom_score_adj,
                    no_huge_pages: inner.no_huge_pages,
                    membarrier: inner.membarrier,
                },
                advice,
            });
            spent(&mut times.threads, &mut times.kinds.threads, lap);
        }
        state.ended = self.remains.capture(&inner_pids)?;
        let world =
            files::World { diag: &self.diag, objects: &mut self.objects, memory: &mut self.files };
        times.glanced = builder.glanced;
        let finished = builder.finish(self.root, &mut state, world);
        if let Some(mut sockets) = self.refusals.admit(finished)? {
            let sending = std::mem::take(&mut sockets.sending);
            let settled =
                self.farewells.settle(sending, |i| sockets.has(i), &mut state, &self.diag);
            self.refusals.admit(settled)?;
        }
        spent(&mut times.files, &mut times.kinds.in_flight, lap);
        // Last: memory that travels between processes as a descriptor is an object as well.
        let taken = self.take_objects(&mut state);
        self.refusals.admit(taken)?;
        spent(&mut times.memory, &mut times.kinds.objects, lap);
        // Input is held, but not what the container sends to itself.
        for tracked in self.processes.values_mut() {
            if !tracked.files.stands_still()? {
                return Err(CaptureError::Transient("a TCP connection has just received data"));
            }
        }
        spent(&mut times.files, &mut times.kinds.in_flight, lap);
        Ok(state)
    }

    /// Makes all segments of System V shared memory known; gives their numbers.
    fn look_at_segments(&mut self) -> Result<Vec<u32>, CaptureError> {
        let Some(sysv) = &mut self.sysv else { return Ok(Vec::new()) };
        let segments = sysv.segments(&mut self.objects)?;
        for (id, segment) in &segments {
            self.objects.note_segment(*id, *segment);
        }
        Ok(segments.into_keys().collect())
    }

    /// The objects that mappings and descriptors of the state refer to, with their last pages.
    fn take_objects(&mut self, state: &mut State) -> Result<(), CaptureError> {
        self.refusals.admit(self.namespaces.check_mounts())?;
        self.refusals.admit(self.namespaces.check_network())?;
        state.names = self.namespaces.names()?;
        state.vdso = self.vdso;
        state.tmpfs = self.tmpfs.walk(&mut self.objects)?;
        let segments = self.look_at_segments()?;
        if let Some(sysv) = &mut self.sysv {
            (state.semaphores, state.message_queues) = sysv.take()?;
        }
        sysv::check_attached(&state.processes, &self.objects)?;
        if self.copy_objects()? {
            return Err(CaptureError::Transient("a mapped file has just got another name"));
        }
        let mappings = state.processes.iter().flat_map(|p| &p.mappings);
        let mapped = mappings.filter_map(|m| match m.source {
            Source::Object { id, .. } => Some(id),
            _ => None,
        });
        let open = state.descriptions.iter().filter_map(|d| match d.kind {
            Kind::Object { id, .. } => Some(id),
            _ => None,
        });
        let named = state.tmpfs.iter().filter_map(|e| match e.kind {
            EntryKind::File(id) => Some(id),
            _ => None,
        });
        state.objects = self.objects.take(mapped.chain(open).chain(named).chain(segments))?;
        Ok(())
    }

    /// Host pids, parents before children, the container's init first.
    fn in_order(&self) -> Result<Vec<i32>, CaptureError> {
        let mut order = vec![self.root];
        let mut at = 0;
        while let Some(parent) = order.get(at).copied() {
            let children = self.processes.iter().filter(|(_, t)| t.attributes.ppid == parent);
            order.extend(children.map(|(p, _)| *p).filter(|p| *p != self.root));
            at += 1;
        }
        if order.len() == self.processes.len() {
            Ok(order)
        } else if self.refusals.collecting() {
            // The parent of some was refused.
            Ok(self.processes.keys().copied().collect())
        } else {
            // An orphan was adopted by init since its attributes were read.
            Err(CaptureError::Transient("a process is changing its parent"))
        }
    }

    /// After the thaw: runs get the index of their owner instead of its number, and what lies
    /// outside the mappings goes.
    fn finish_pages(&mut self, state: &State) {
        self.objects.finish(&state.objects);
        for tracked in self.processes.values_mut() {
            if tracked.space.finish()
                && let Some(p) = state.processes.iter().find(|p| p.pid == tracked.attributes.pid)
            {
                memory::clip(&mut self.pages.runs, p.pid, &p.mappings);
            }
        }
        let owners = state.owners();
        self.pages.runs.retain_mut(|run| {
            let index = owners.iter().position(|o| *o as u32 == run.process);
            run.process = index.unwrap_or(0) as u32;
            index.is_some()
        });
    }

    fn clocks(&self) -> Result<Clocks, CaptureError> {
        let read = |clock, offset: i64| {
            nix::time::clock_gettime(clock)
                .map(|t| (t.tv_sec() * 1_000_000_000 + t.tv_nsec() + offset) as u64)
                .map_err(|e| SysError::errno("clock_gettime", "a clock", e as i32))
        };
        Ok(Clocks {
            monotonic: read(nix::time::ClockId::CLOCK_MONOTONIC, self.offsets.0)?,
            boottime: read(nix::time::ClockId::CLOCK_BOOTTIME, self.offsets.1)?,
        })
    }
}

/// Counts the time since the last lap for a stage and for a kind.
fn spent(stage: &mut Duration, kind: &mut Duration, lap: &mut Lap) {
    let time = lap.next();
    *stage += time;
    *kind += time;
}

struct Lap(Instant);

impl Lap {
    fn next(&mut self) -> Duration {
        let now = Instant::now();
        let d = now - self.0;
        self.0 = now;
        d
    }
}

/// Refuses mappings that cannot be part of a checkpoint. Those of files in a volume (one of these
/// devices) neither, but for shared ones through which the file is written: a spare maps files while
/// its volumes are not mounted.
fn refuse_mappings(
    pid: i32,
    vmas: &[maps::Vma],
    volumes: &[u64],
    refusals: &mut refusals::Refusals,
) -> Result<(), CaptureError> {
    for v in vmas {
        let is_file = matches!(v.mapping.source, Source::File { .. });
        let of_volume = is_file && volumes.contains(&v.device);
        let why = of_volume.then_some(
            "a file of a replicated volume, mapped to be read or privately; keep programs and \
             libraries outside of it, and let the program read its data (no mmap)",
        );
        if let Some(why) = v.refused.or(why) {
            let object =
                format!("mapping {:#x}-{:#x} of pid {pid}", v.mapping.start, v.mapping.end);
            let error = CaptureError::unsupported(object, why.into());
            refusals.admit::<()>(Err(error))?;
        }
    }
    Ok(())
}

/// What the time namespace of a process adds to the host's clocks, in nanoseconds.
fn clock_offsets(pid: i32) -> Result<(i64, i64), CaptureError> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((0, 0)),
        other => other.map_err(|e| CaptureError::proc(&path, e))?,
    };
    let offset = |name: &str| -> i64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or("");
        let mut fields = line.split_whitespace().skip(1).map(|f| f.parse::<i64>().unwrap_or(0));
        fields.next().unwrap_or(0) * 1_000_000_000 + fields.next().unwrap_or(0)
    };
    Ok((offset("monotonic"), offset("boottime")))
}
