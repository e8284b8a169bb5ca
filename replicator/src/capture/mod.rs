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

mod adopt;
mod advice;
mod direct;
mod error;
mod farewell;
mod fdinfo;
mod files;
mod glance;
mod guards;
mod helpers;
mod homes;
mod inet;
mod inotify;
mod lineage;
mod locks;
mod maps;
mod memory;
mod namespaces;
mod numbered;
mod objects;
mod one_shot;
mod options;
mod orphans;
mod outside;
mod pipes;
mod process;
mod refusals;
mod remembered;
mod sharing;
mod stop;
mod surroundings;
mod survey;
mod sysv;
mod tcp;
mod tcp_options;
mod terminals;
mod threads;
mod timers;
mod times;
mod tmpfs;
mod tracer;
mod unix;
mod waits;
mod watched;

use crate::Epoch;
use crate::image::Process;
use crate::image::pages::PageSet;
use crate::sys::ptrace::Status;
use crate::sys::remote::Batch;
use crate::sys::unix_diag::UnixDiag;
use crate::volume::Known;
use memory::{AddressSpace, Job};
use process::Attributes;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracer::{Change, Tracer};

pub use error::CaptureError;
pub use glance::warm_up;
pub use namespaces::namespaces_of;
pub use one_shot::{Held, about, other_end};
pub use orphans::Orphans;
pub use refusals::Refusal;
pub use stop::Taken;
pub use survey::Survey;
pub use times::{KindTimes, StopTimes};

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

/// What was copied before a stop, if it is still equal to what there is; otherwise another copy.
fn or_copy<T: Clone + PartialEq>(before: T, now: &T) -> T {
    if before == *now { before } else { now.clone() }
}

struct Tracked {
    handle: OwnedFd,
    space: AddressSpace,
    advice: advice::Advices,
    threads: threads::Threads,
    files: files::Files,
    direct: direct::Direct,
    /// The round of pre-copy that was begun looks around notes.
    has_notes: bool,
    attributes: Attributes,
    /// A copy of them, of which the next checkpoint takes what it needs.
    ready: Option<Attributes>,
    /// They were read while it ran, and are others than in the stop before.
    is_doubtful: bool,
    /// When they were last read while it ran.
    read: Option<Instant>,
    timers: timers::Timers,
}

/// How long what /proc says of a process counts where a glance shows changes of almost all of it: not
/// new names of directories far above those that it is in.
const ATTRIBUTES: Duration = Duration::from_millis(100);

impl Tracked {
    /// Reads what rarely changes while the process runs, so that a stop need not.
    fn read_ahead(&mut self, pid: i32) -> Result<(), CaptureError> {
        let begin = Instant::now();
        if self.threads.shows_settings() && self.read.is_some_and(|t| begin - t < ATTRIBUTES) {
            return Ok(());
        }
        let attributes = process::read(pid, Some(&self.attributes))?;
        self.threads.look_ahead()?;
        self.is_doubtful |= attributes != self.attributes;
        (self.attributes, self.read) = (attributes, Some(begin));
        Ok(())
    }

    /// Before a stop, while it runs: makes the memory that its checkpoint takes along.
    fn make_ready(&mut self) {
        self.threads.make_ready();
        self.files.make_ready();
        self.advice.make_ready(self.space.guards().len());
        self.ready.get_or_insert_with(|| self.attributes.clone());
    }

    /// Takes a glance at its threads. If they are `running`, a window of notes begins, which a scan of all
    /// memory must follow.
    fn glance(&mut self, running: bool) -> Result<Option<u64>, CaptureError> {
        let noted = self.space.noted();
        if running {
            noted.before_glance();
        }
        let sequence = self.threads.glance()?;
        self.threads.count_faults(noted.counts());
        if running {
            noted.after_glance(sequence);
        }
        Ok(sequence)
    }

    /// After a stop: whether it has looked everywhere, or what it has not looked at,
    /// which the job looks at, shows that it need not. `stood` says that the job was done while the threads stood
    /// still.
    fn confirm(&mut self, job: &Job, stood: bool) -> Result<bool, CaptureError> {
        if self.space.noted().was_trusted() != Some(true) {
            return Ok(true);
        }
        let confirmed = self.look_at_rest(job, stood);
        if !matches!(confirmed, Ok(true)) {
            self.space.noted().disbelieve();
        }
        confirmed
    }

    fn look_at_rest(&mut self, job: &Job, stood: bool) -> Result<bool, CaptureError> {
        let Some(found) = self.space.see_rest(job)? else { return Ok(false) };
        if stood {
            return Ok(found.is_empty());
        }
        let sequence = match self.threads.glance() {
            Err(e) if e.is_gone() => return Ok(false),
            other => other?,
        };
        let noted = self.space.noted();
        self.threads.count_faults(noted.counts());
        Ok(noted.confirms(&found, sequence))
    }

    /// At the end of a stop: what stands for the mappings may be another, though they are the same, if we have
    /// asked the process.
    fn look_once_more(&mut self) -> Result<(), CaptureError> {
        if self.threads.has_asked() && self.space.noted().must_know_where_it_stands() {
            let sequence = self.glance(false)?;
            self.space.noted().stands_at(sequence);
        }
        Ok(())
    }

    /// Begins a round of pre-copy around the notes since the last stop, if it has enough of them.
    fn begin_around_notes(&mut self, pid: i32, job: &mut Job) -> Result<(), CaptureError> {
        self.space.consider_notes();
        self.has_notes = false;
        if self.space.noted().is_enough() {
            self.space.noted().look_so_far();
            let sequence = self.glance(false)?;
            self.has_notes = self.space.begin_around_notes(job, sequence);
        }
        if self.has_notes {
            self.direct.round(|| self.threads.reads(pid));
        }
        Ok(())
    }

    /// Takes a glance, and begins a round of pre-copy of all its memory with it.
    fn begin_round(&mut self, pid: i32, job: &mut Job) -> Result<(), CaptureError> {
        let sequence = self.glance(true)?;
        self.direct.round(|| self.threads.reads(pid));
        Ok(self.space.begin(job, sequence, true)?)
    }

    /// A round of pre-copy, which a job may have begun. `look_ahead` has looked at the descriptors.
    fn round(
        &mut self,
        pid: i32,
        pages: &mut PageSet,
        objects: &mut objects::Objects,
        job: Option<&Job>,
    ) -> Result<(), CaptureError> {
        let mut sequence = None;
        if job.is_none() {
            sequence = self.glance(true)?;
            self.direct.round(|| self.threads.reads(pid));
        }
        self.space.round(pages, objects, false, job, sequence)
    }

    /// All threads stand still, and a glance was taken: whether it may have read past the page cache
    /// while a round took its pages.
    fn may_have_read_directly(&mut self, pid: i32) -> bool {
        let seen = self.files.have_shown_direct();
        self.direct.was_possible(self.threads.reads(pid), seen)
    }
}

/// The clock of a process's processor time, as clock_getcpuclockid(3) would give it after asking the kernel
/// whether there is such a process; to read it asks the same.
fn processor_clock(pid: i32) -> nix::time::ClockId {
    /// CPUCLOCK_SCHED of a process, in the kernel's `include/linux/posix-timers_types.h`.
    const SCHED: i32 = 2;
    nix::time::ClockId::from_raw((!pid) << 3 | SCHED)
}

/// How descriptors are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Glances {
    /// All at once, where the kernel can.
    #[default]
    On,
    /// As that, with notes of page faults of smaller programs as well.
    Noted,
    /// One by one, as on a kernel that cannot; for comparison.
    Off,
    /// At once and one by one, and all memory as well as where faults were noted; a difference is an error.
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
    /// Runs and pages of these that no read past the page cache has made wrong.
    settled: (usize, usize),
    batch: Batch,
    interrupted: waits::Interrupted,
    /// How its init has ended.
    end: Option<Status>,
    /// It ran while it was seized, and has not stood still since.
    may_miss: bool,
    /// When it was last looked for who was made without our being told.
    looked: Option<Instant>,
    /// The next stop that succeeds does not end.
    still: bool,
    /// It hardly ran before this stop, and a helper may have its processor when it has run for a moment.
    idle: bool,
    /// Looks at what a stop leaves out.
    rest: Option<Arc<Job>>,
    /// For copies that helpers make.
    copies: Vec<u8>,
    /// For the next stop: what will be searched in it and after it, the list of processes that its checkpoint takes along,
    /// their order, and their numbers inside by those outside.
    jobs: [Option<Arc<Job>>; 2],
    ready_processes: Vec<Process>,
    order: Vec<i32>,
    tids: Vec<i32>,
    inner_pids: Arc<HashMap<i32, i32>>,
    /// The objects of a checkpoint that is to be confirmed.
    unconfirmed: Vec<u32>,
    glances: Glances,
    refusals: refusals::Refusals,
    remains: lineage::Remains,
    farewells: farewell::Farewells,
    /// Takes part while the container stands still.
    helpers: helpers::Helpers,
}

impl Capturer {
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
        let used =
            |pid: &i32| nix::time::clock_gettime(processor_clock(*pid)).ok().map(Duration::from);
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
                    if let Change::Ended(pid, status) = change {
                        self.remains.add(pid);
                        if pid == self.root {
                            self.end = Some(status);
                        }
                    }
                    self.namespaces.forget(pid);
                    match self.processes.remove(&pid) {
                        // Since then it may have mapped others, of those that have a name.
                        Some(t) if t.space.is_listed() => {
                            t.space.shared_objects().for_each(|o| self.objects.suspect(o));
                            self.objects.suspect_named();
                        }
                        // It came and went unseen, or half seen.
                        _ => self.objects.suspect_all(),
                    }
                }
            }
        }
    }

    /// How the container's init has ended, once [`CaptureError::Ended`] was given.
    pub fn how_it_ended(&mut self) -> Option<Status> {
        self.follow_changes();
        self.end
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
        self.settled = (0, 0);
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
        let cleaned = self.freeze_known().and_then(|()| self.remove_scratch());
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
        self.helpers.follow();
        self.files.open_queues(self.glances != Glances::Off);
        self.find_untold()?;
        self.make_ready();
        if self.knows_all() {
            return Ok(());
        }
        self.freeze()?;
        let result = self.attach_new();
        self.tracer.thaw()?;
        result
    }

    /// While the container runs: makes the memory that the next checkpoint takes along, so that its stop asks for
    /// none. [`Capturer::prepare`] does it too; it is nothing that anybody should wait for.
    pub fn make_ready(&mut self) {
        self.processes.values_mut().for_each(Tracked::make_ready);
        self.files.make_ready();
        self.namespaces.make_ready();
        self.ready_processes.reserve(self.processes.len() + 1);
        self.order.reserve(self.processes.len() + 1);
        self.jobs = self.take_jobs().map(Some);
    }

    /// The jobs of the last stop if they are nobody else's any more, as good as new, or others: one for the next stop and
    /// one for after it.
    fn take_jobs(&mut self) -> [Arc<Job>; 2] {
        let [taken, seen] = std::mem::take(&mut self.jobs).map(|job| job.and_then(Job::renew));
        let new = |job: fn() -> Job| move || Arc::new(job());
        [taken.unwrap_or_else(new(Job::to_take)), seen.unwrap_or_else(new(Job::to_look))]
    }

    /// Whether every process is watched.
    fn knows_all(&self) -> bool {
        self.tracer.is_of(|pid| self.processes.contains_key(&pid))
    }

    fn pids(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.tracer.processes();
        // Parents were there before their children, but pids wrap around; the order is made
        // exact when the state is put together.
        all.sort_by_key(|p| (*p != self.root, *p));
        all
    }

    fn freeze(&mut self) -> Result<(), CaptureError> {
        let frozen = self.freeze_known();
        let done = frozen.and_then(|()| self.find_missed());
        if done.is_err() {
            self.tracer.thaw()?;
        }
        done
    }

    /// As [`Capturer::freeze`], but whoever is not seized yet may run on, and after an error all stand still.
    fn freeze_known(&mut self) -> Result<(), CaptureError> {
        let frozen = self.tracer.freeze();
        self.settle().and(frozen)
    }

    fn settle(&mut self) -> Result<(), CaptureError> {
        self.interrupted.retain(|tid| self.tracer.has(tid));
        let Self { tracer, interrupted, .. } = self;
        tracer.stopped().try_for_each(|tid| interrupted.settle(tid))?;
        Ok(())
    }

    /// From now on a device, address, route or rule that is made or taken away in the container's
    /// network is refused (CP-3).
    pub fn watch_network(&mut self) -> Result<(), CaptureError> {
        self.namespaces.watch_network(self.root)
    }

    /// From now on a file that is open for writing outside of these directories, and is none of these
    /// files, is refused by name, unless a checkpoint carries what is in it.
    /// What is mounted in a root that is one of them is not of it, unless it is one itself.
    ///
    /// # Errors
    /// The container has ended.
    pub fn keep_files_in(&mut self, places: Vec<PathBuf>) -> Result<(), CaptureError> {
        self.files.keep_in(places, tmpfs::mount_points(self.root)?);
        Ok(())
    }

    /// Its root is an overlay ([`crate::volume::Served::become_root`]), and what it writes is in this volume, also
    /// the programs and libraries among it.
    pub fn keep_root_in(&mut self, layer: Known) {
        self.files.keep_root_in(layer.volume.clone());
        if let Some(device) = self.tmpfs.root_layer() {
            self.objects.systems_mut().layer = Some((device, layer));
        }
    }

    /// The container has this volume: what is mapped of it is found when it gets another name, and what is written
    /// through mappings is in it when an epoch is sealed.
    pub fn keep_volume(&mut self, volume: Known) {
        self.objects.systems_mut().served.push(volume);
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
        self.precopy_with(false)
    }

    /// The same for a container that does nothing at the moment: its processors look for written pages,
    /// too, as they do in a stop.
    pub fn precopy_of_idle(&mut self) -> Result<usize, CaptureError> {
        self.idle = true;
        self.precopy_with(true)
    }

    fn precopy_with(&mut self, helped: bool) -> Result<usize, CaptureError> {
        self.read_again_ahead()?;
        let job = self.begin_round(helped)?;
        let copied = self.copy_ahead(&job, helped);
        if copied.is_err() {
            self.give_up(&job);
        }
        self.copies = job.give_back();
        copied
    }

    /// Lets the scan of a round begin: around notes where that is enough, and if it is `helped` by a processor of
    /// the container everywhere else.
    fn begin_round(&mut self, helped: bool) -> Result<Arc<Job>, CaptureError> {
        let mut job = Job::to_copy(std::mem::take(&mut self.copies));
        for (pid, tracked) in &mut self.processes {
            let begun = tracked.begin_around_notes(*pid, &mut job).and_then(|()| {
                match helped && !tracked.has_notes {
                    true => tracked.begin_round(*pid, &mut job),
                    false => Ok(()),
                }
            });
            match begun {
                Err(e) if !e.is_gone() => return Err(e),
                _ => {}
            }
        }
        let job = Arc::new(job);
        if helped {
            self.helpers.call(&job);
        }
        Ok(job)
    }

    fn copy_ahead(&mut self, job: &Job, helped: bool) -> Result<usize, CaptureError> {
        let Self { processes, pages, objects, diag, namespaces, files, .. } = self;
        let before = pages.pages();
        for (pid, tracked) in processes {
            match namespaces.check(*pid) {
                Err(e) if !e.is_gone() => return Err(e),
                _ => {}
            }
            // Pages last: what is written meanwhile is left for the stop.
            let read = tracked.read_ahead(*pid).and_then(|()| {
                let handle = tracked.handle.as_fd();
                tracked.files.look_ahead(*pid, handle, objects, diag)?;
                tracked.files.read_queues_ahead(files);
                Ok(())
            });
            let round = match tracked.has_notes {
                true => tracked.space.round_around_notes(pages, job),
                false => tracked.round(*pid, pages, objects, helped.then_some(job)),
            };
            match (round, read) {
                (Ok(()), Ok(())) => {
                    tracked.space.make_ready();
                    let locked = tracked.attributes.locked;
                    let (changed, shown) =
                        (tracked.space.is_changed(), tracked.space.shows_flags());
                    match tracked.advice.look(*pid, locked, changed, shown) {
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
        self.write_back()?;
        Ok(self.pages.pages() - before)
    }

    /// Has what was stored through mappings of files in volumes written to these.
    fn write_back(&mut self) -> Result<(), CaptureError> {
        let files = self.processes.values().flat_map(|t| t.space.written_back()).copied();
        Ok(self.objects.systems_mut().write_back(&files.collect())?)
    }

    /// Copies what was written to objects. Says whether the mappings must be read anew first.
    fn copy_objects(&mut self) -> Result<bool, CaptureError> {
        self.objects.copy(&mut self.pages)?;
        let renamed = self.objects.take_renamed() | self.objects.systems().take_moved();
        if renamed {
            self.processes.values_mut().for_each(|t| t.space.read_anew());
        }
        Ok(renamed)
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
}
