//! One stop (CP-1): freeze, capture, seal, thaw.

use super::memory::Job;
use super::times::{Lap, spent};
use super::{
    Boundary, CaptureError, Capturer, StopTimes, files, guards, memory, process, refusals, sysv,
    terminals, tracer,
};
use crate::Epoch;
use crate::image::pages::PageSet;
use crate::image::task::{Place, ProcessSettings, Timers};
use crate::image::tree::EntryKind;
use crate::image::{Clocks, Credentials, Kind, Process, Source, State};
use crate::sys::{SysError, ptrace};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

/// Most pages of a stop that is confirmed while they are put into frames.
const COPIED_AGAIN: usize = 128;

/// A stop that may come to nothing yet, see [`Capturer::confirm`].
#[derive(Debug)]
#[must_use = "what was taken counts once it is confirmed"]
pub struct Taken {
    times: StopTimes,
    begin: Instant,
    /// All memory was looked at while the container stood still.
    stood: bool,
    confirmed: bool,
}

impl Taken {
    /// Whether nothing is left to be confirmed.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    /// How long its stages took so far.
    pub fn times(&self) -> StopTimes {
        self.times
    }
}

impl Capturer {
    /// Stops the container, captures what changed and lets it go on (CP-1). The result replaces
    /// the contents of `state` and `pages`.
    ///
    /// On an error the container runs on, and what was copied so far is kept for the next try. If `boundary`
    /// was told to seal the epoch meanwhile, its number is used up: the next checkpoint has a later one,
    /// builds on what this one was to build on, and covers the output of both.
    pub fn stop(
        &mut self,
        epoch: Epoch,
        boundary: &mut dyn Boundary,
        state: &mut State,
        pages: &mut PageSet,
    ) -> Result<StopTimes, CaptureError> {
        let mut taken = self.take(epoch, boundary, state, pages)?;
        self.confirm(&mut taken)?;
        Ok(taken.times)
    }

    /// The first half of [`Capturer::stop`]: `state` and `pages` are what a checkpoint consists of, unless
    /// [`Capturer::confirm`] finds that a page was missed. So they can be put into frames meanwhile, but none of
    /// these may leave. Of many pages there would have to be a second copy: such a stop is confirmed here.
    ///
    /// # Errors
    /// As [`Capturer::stop`].
    pub fn take(
        &mut self,
        epoch: Epoch,
        boundary: &mut dyn Boundary,
        state: &mut State,
        pages: &mut PageSet,
    ) -> Result<Taken, CaptureError> {
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
            let stood = self.leave_rest();
            let thawed = if stays { Ok(()) } else { self.tracer.thaw() };
            times.thaw = lap.next();
            let captured = captured?;
            thawed?;
            Ok((captured, stood))
        });
        times.total = begin.elapsed();
        boundary.release_input();
        let (result, stood) = result?;
        *state = result;
        self.files.fill_in(state);
        times.stop_pages = self.pages.pages() - before;
        times.pages = self.pages.pages();
        let mut taken = Taken { times, begin, stood, confirmed: false };
        if self.rest.is_none() || stood || times.pages > COPIED_AGAIN {
            self.look_at_rest(&mut taken)?;
            std::mem::swap(pages, &mut self.pages);
            self.finish_runs(state, pages);
            self.finish(state.objects.iter().map(|o| o.id));
        } else {
            pages.runs.clone_from(&self.pages.runs);
            pages.bytes.clone_from(&self.pages.bytes);
            self.finish_runs(state, pages);
            self.unconfirmed.clear();
            self.unconfirmed.extend(state.objects.iter().map(|o| o.id));
        }
        Ok(taken)
    }

    /// The second half of [`Capturer::stop`], while the container runs: looks at the memory that the stop has not looked at.
    ///
    /// # Errors
    /// As [`Capturer::stop`]: what was taken is no checkpoint then.
    pub fn confirm(&mut self, taken: &mut Taken) -> Result<(), CaptureError> {
        if !taken.confirmed {
            if let Some(job) = &self.rest {
                job.let_help();
            }
            self.look_at_rest(taken)?;
            let objects = std::mem::take(&mut self.unconfirmed);
            self.finish(objects.iter().copied());
            self.unconfirmed = objects;
        }
        Ok(())
    }

    fn look_at_rest(&mut self, taken: &mut Taken) -> Result<(), CaptureError> {
        let confirmed = self.is_all(taken.stood);
        taken.times.confirm = taken.begin.elapsed() - taken.times.total;
        taken.confirmed = confirmed?;
        match taken.confirmed {
            true => Ok(()),
            false => Err(CaptureError::Transient("a page was written and not noted")),
        }
    }

    /// The container is about to run again: whether everything was looked at that the stop leaves out. If not, a helper
    /// goes on only if it does not take a processor that is needed.
    fn leave_rest(&mut self) -> bool {
        let idle = std::mem::take(&mut self.idle);
        let Some(job) = &self.rest else { return true };
        if !idle {
            job.leave();
        }
        job.is_done()
    }

    /// Whether the last stop has looked everywhere where it had to. `stood` says that all of the rest was looked at in it.
    fn is_all(&mut self, stood: bool) -> Result<bool, CaptureError> {
        let Some(job) = self.rest.take() else { return Ok(true) };
        let mut all = true;
        for tracked in self.processes.values_mut() {
            all &= tracked.confirm(&job, stood)?;
        }
        Ok(all)
    }

    pub(super) fn capture(
        &mut self,
        times: &mut StopTimes,
        lap: &mut Lap,
    ) -> Result<State, CaptureError> {
        self.attach_new()?;
        let job = self.begin_scan()?;
        spent(&mut times.memory, &mut times.kinds.memory, lap);
        let captured = self.capture_with(&job, times, lap);
        if captured.is_err() {
            self.give_up(&job);
        }
        captured
    }

    /// Keeps what a job has found although nobody will take it.
    pub(super) fn give_up(&mut self, job: &Job) {
        self.processes.values_mut().for_each(|t| t.space.give_up(job));
    }

    /// Lets the scan of all memory begin, elsewhere if there is a processor for it, and a look at what it leaves
    /// out.
    fn begin_scan(&mut self) -> Result<Arc<Job>, CaptureError> {
        for (tid, address) in self.interrupted.take_written() {
            let process = self.tracer.process_of(tid).and_then(|pid| self.processes.get_mut(&pid));
            if let Some(tracked) = process {
                tracked.space.noted().wrote(address);
            }
        }
        // First of all, as it takes longest where there is something to help with.
        for tracked in self.processes.values_mut() {
            if let Some(pieces) = tracked.files.begin_glance() {
                self.helpers.call(&pieces);
            }
        }
        let [mut job, mut rest] = self.take_jobs();
        let (Some(taking), Some(looking)) = (Arc::get_mut(&mut job), Arc::get_mut(&mut rest))
        else {
            return Err(CaptureError::Transient("a search for written pages goes on"));
        };
        for tracked in self.processes.values_mut() {
            if self.still {
                // What stands still cannot be taken back.
                tracked.space.noted().shut();
            }
            let sequence = tracked.glance(false)?;
            if !self.refusals.collecting() {
                tracked.space.begin(taking, sequence, false)?;
                tracked.space.add_rest(looking);
            }
        }
        self.jobs = [Some(job.clone()), Some(rest.clone())];
        self.helpers.call(&job);
        self.helpers.call(&rest);
        self.rest = Some(rest);
        Ok(job)
    }

    fn capture_with(
        &mut self,
        job: &Job,
        times: &mut StopTimes,
        lap: &mut Lap,
    ) -> Result<State, CaptureError> {
        self.interrupted.clocks_are_read();
        let mut state = State { clocks: self.clocks()?, ..State::default() };
        state.processes = std::mem::take(&mut self.ready_processes);
        self.list_in_order()?;
        let order = std::mem::take(&mut self.order);
        let inner_pids = self.inner_pids();
        let mut builder = files::Builder::new(inner_pids.clone(), &mut self.files, &mut state);
        for pid in &order {
            let tracked = self.processes.get_mut(pid).ok_or(CaptureError::Ended)?;
            tracked.files.glance(&mut builder)?;
            tracked.files.read_queues(&mut self.files);
        }
        builder.sort_watchers();
        let mut tids = std::mem::take(&mut self.tids);
        spent(&mut times.files, &mut times.kinds.descriptors, lap);
        for pid in &order {
            let tracked = self.processes.get_mut(pid).ok_or(CaptureError::Ended)?;
            self.tracer.list_threads(*pid, &mut tids);
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
            let creds = &tracked.attributes.creds;
            tracked.threads.add_credentials(&tids, (creds, securebits), &mut threads)?;
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
            // What has gone off since the glance is no timer any more, but a signal.
            let may_be_signals = tracked.threads.may_go_off() || !timers.posix.is_empty();
            if may_be_signals {
                for (thread, tid) in threads.iter_mut().zip(&tids) {
                    thread.pending = ptrace::pending(*tid, false)?;
                }
            }
            spent(&mut times.threads, &mut times.kinds.timers, lap);
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
            if self.refusals.collecting() {
                tracked.space.look(&mut self.objects)?;
            } else {
                if tracked.may_have_read_directly(*pid) {
                    times.again += tracked.space.take_again(&mut self.pages, self.settled.0)?;
                    self.objects.take_again();
                }
                tracked.space.round(&mut self.pages, &mut self.objects, true, Some(job), None)?;
                match tracked.space.noted().was_trusted() {
                    Some(true) => times.noted += 1,
                    Some(false) => times.doubted += 1,
                    None => {}
                }
            }
            refuse_mappings(*pid, &tracked.space, &mut self.refusals)?;
            let mappings = tracked.space.take_mappings();
            let stuck = guards::refuse_stuck(*pid, &threads, tracked.space.vmas());
            self.refusals.admit(stuck)?;
            let advice =
                tracked.advice.take(*pid, tracked.attributes.locked, tracked.space.is_changed());
            let mut advice = self.refusals.admit(advice)?.unwrap_or_default();
            tracked.space.guards().add_to(&mut advice);
            spent(&mut times.memory, &mut times.kinds.memory, lap);
            let a = super::or_copy(tracked.ready.take().unwrap_or_default(), &tracked.attributes);
            let mut mm = a.mm;
            mm.brk = inner.brk;
            state.processes.push(Process {
                pid: a.pid,
                ppid: inner_pids.get(&a.ppid).copied().unwrap_or(0),
                pgid: a.pgid,
                sid: a.sid,
                mappings,
                mm,
                auxv: a.auxv,
                exe: a.exe,
                threads,
                actions: inner.actions,
                // Whatever a glance says: a timer whose callback runs in that moment has no time left and no signal yet.
                pending: ptrace::pending(*pid, true)?,
                fds,
                cwd: a.cwd,
                umask: a.umask,
                limits: a.limits,
                creds: Credentials { securebits, ..a.creds },
                dumpable: inner.dumpable,
                timers,
                place: Place {
                    born: a.born,
                    exit_signal: a.exit_signal,
                    subreaper: inner.subreaper,
                    stopped: self.tracer.is_halted(*pid),
                },
                settings: ProcessSettings {
                    root: a.root,
                    personality: inner.personality,
                    oom_score_adj: a.oom_score_adj,
                    no_huge_pages: inner.no_huge_pages,
                    membarrier: inner.membarrier,
                },
                advice,
            });
            spent(&mut times.threads, &mut times.kinds.threads, lap);
        }
        (self.order, self.tids) = (order, tids);
        state.ended = self.remains.capture(&inner_pids)?;
        let world =
            files::World { diag: &self.diag, objects: &mut self.objects, memory: &mut self.files };
        (times.glanced, times.resting) = (builder.glanced, builder.resting);
        let finished = builder.finish(self.root, &mut state, world);
        if let Some(mut sockets) = self.refusals.admit(finished)? {
            let mut sending = std::mem::take(&mut sockets.sending);
            let settled =
                self.farewells.settle(&mut sending, |i| sockets.has(i), &mut state, &self.diag);
            sockets.sending = sending;
            self.refusals.admit(settled)?;
            sockets.give_back(&mut self.files);
        }
        spent(&mut times.files, &mut times.kinds.in_flight, lap);
        // Last: memory that travels between processes as a descriptor is an object as well.
        let taken = self.take_objects(&mut state);
        self.refusals.admit(taken)?;
        spent(&mut times.memory, &mut times.kinds.objects, lap);
        for tracked in self.processes.values_mut() {
            tracked.look_once_more()?;
        }
        // Input is held, but not what the container sends to itself.
        for tracked in self.processes.values_mut() {
            if !tracked.files.stands_still()? {
                return Err(CaptureError::Transient("a TCP connection has just received data"));
            }
        }
        spent(&mut times.files, &mut times.kinds.in_flight, lap);
        Ok(state)
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
        self.write_back()?;
        let mappings = state.processes.iter().flat_map(|p| p.mappings.iter());
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

    /// The processes' numbers inside by those outside.
    fn inner_pids(&mut self) -> Arc<HashMap<i32, i32>> {
        let now = || self.processes.iter().map(|(pid, t)| (*pid, t.attributes.pid));
        let known = &self.inner_pids;
        if known.len() != self.processes.len() || now().any(|(k, v)| known.get(&k) != Some(&v)) {
            self.inner_pids = Arc::new(now().collect());
        }
        self.inner_pids.clone()
    }

    /// Host pids, parents before children, the container's init first.
    pub(super) fn in_order(&mut self) -> Result<Vec<i32>, CaptureError> {
        self.list_in_order()?;
        Ok(self.order.clone())
    }

    /// Puts them into [`Capturer::order`].
    fn list_in_order(&mut self) -> Result<(), CaptureError> {
        let order = &mut self.order;
        order.clear();
        order.push(self.root);
        let mut at = 0;
        while let Some(parent) = order.get(at).copied() {
            let children = self.processes.iter().filter(|(_, t)| t.attributes.ppid == parent);
            order.extend(children.map(|(p, _)| *p).filter(|p| *p != self.root));
            at += 1;
        }
        if order.len() == self.processes.len() {
            Ok(())
        } else if self.refusals.collecting() {
            // The parent of some was refused.
            order.clear();
            order.extend(self.processes.keys());
            Ok(())
        } else {
            // An orphan was adopted by init since its attributes were read.
            Err(CaptureError::Transient("a process is changing its parent"))
        }
    }

    /// After the thaw: runs get the index of their owner instead of its number, and what lies
    /// outside the mappings goes.
    pub(super) fn finish_runs(&self, state: &State, pages: &mut PageSet) {
        for tracked in self.processes.values().filter(|t| t.space.is_changed()) {
            if let Some(p) = state.processes.iter().find(|p| p.pid == tracked.attributes.pid) {
                memory::clip(&mut pages.runs, p.pid, &p.mappings);
            }
        }
        let owners = state.owners();
        pages.runs.retain_mut(|run| {
            let index = owners.iter().position(|o| *o as u32 == run.process);
            run.process = index.unwrap_or(0) as u32;
            index.is_some()
        });
    }

    /// The checkpoint, which has these objects, is whole: the next one begins.
    pub(super) fn finish(&mut self, objects: impl Iterator<Item = u32> + Clone) {
        self.objects.finish(objects);
        self.settled = (0, 0);
        self.pages.clear();
        for tracked in self.processes.values_mut() {
            tracked.direct.finish();
            tracked.files.finish();
            tracked.space.finish();
        }
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

/// Refuses mappings that cannot be part of a checkpoint.
fn refuse_mappings(
    pid: i32,
    space: &memory::AddressSpace,
    refusals: &mut refusals::Refusals,
) -> Result<(), CaptureError> {
    for v in space.vmas() {
        if let Some(why) = v.refused {
            let object =
                format!("mapping {:#x}-{:#x} of pid {pid}", v.mapping.start, v.mapping.end);
            let error = CaptureError::unsupported(object, why.into());
            refusals.admit::<()>(Err(error))?;
        }
    }
    Ok(())
}
