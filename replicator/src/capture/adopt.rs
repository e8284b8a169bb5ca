//! Taking a container's processes over, all of its tree at the start and each new one later: seized,
//! their memory watched, what cannot be protected refused (CP-3).

use super::memory::AddressSpace;
use super::tracer::{self, Tracer};
use super::{
    CaptureError, Capturer, Glances, Tracked, advice, direct, farewell, files, helpers, lineage,
    maps, namespaces, objects, process, refusals, sharing, surroundings, sysv, threads, timers,
    tmpfs, waits,
};
use crate::image::pages::PageSet;
use crate::sys::remote::{self, Batch, Call, SCRATCH};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, pidfd, ptrace, uffd};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks for who was made without our being told.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

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

    pub(super) fn empty(root: i32, diag: UnixDiag) -> Result<Self, CaptureError> {
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
            settled: (0, 0),
            batch: Batch::new(),
            interrupted: waits::Interrupted::default(),
            end: None,
            may_miss: false,
            looked: None,
            still: false,
            idle: false,
            rest: None,
            copies: Vec::new(),
            jobs: [None, None],
            ready_processes: Vec::new(),
            order: Vec::new(),
            tids: Vec::new(),
            inner_pids: Arc::default(),
            unconfirmed: Vec::new(),
            glances: Glances::On,
            refusals: refusals::Refusals::default(),
            remains: lineage::Remains::default(),
            farewells: farewell::Farewells::default(),
            helpers: helpers::Helpers::of(root),
        })
    }

    pub(super) fn seize_tree(&mut self) -> Result<(), CaptureError> {
        self.may_miss = true;
        self.seize_from(vec![self.root])?;
        if self.tracer.is_empty() { Err(CaptureError::Ended) } else { Ok(()) }
    }

    /// A thread that was in the middle of making another one when it was seized makes it without telling us: the
    /// kernel asks whether anybody wants to know before it copies (kernel_clone of kernel/fork.c). Now that all of the
    /// tree stands still, everybody has finished, and whoever was missed is seen in /proc.
    ///
    /// # Errors
    /// [`CaptureError::Transient`] if somebody was missed: he has been seized, and runs.
    pub(super) fn find_missed(&mut self) -> Result<(), CaptureError> {
        if !self.may_miss {
            return Ok(());
        }
        let missed = self.unknown()?;
        if missed.is_empty() {
            self.may_miss = false;
            return Ok(());
        }
        self.seize_missed(missed)?;
        Err(CaptureError::Transient("it was making a process or a thread when it was seized"))
    }

    /// While the tree runs, now and then: whoever was made with CLONE_UNTRACED (clone(2)), which keeps the news from
    /// a tracer. He belongs to the tree all the same.
    pub(super) fn find_untold(&mut self) -> Result<(), CaptureError> {
        if self.may_miss || self.looked.is_some_and(|at| at.elapsed() < LOOK_AGAIN) {
            return Ok(());
        }
        let mut untold = self.unknown()?;
        // Of the others we are about to hear.
        untold.retain(|pid| tracer::tids(*pid).is_ok_and(|t| t.into_iter().any(tracer::has_none)));
        if !untold.is_empty() {
            self.may_miss = true;
            self.seize_missed(untold)?;
        }
        self.looked = Some(Instant::now());
        Ok(())
    }

    /// Processes of the tree, or with threads, that we have not heard of. Those that have ended are noted.
    fn unknown(&mut self) -> Result<Vec<i32>, CaptureError> {
        let mut found = Vec::new();
        for pid in self.tracer.processes() {
            let tids = match tracer::tids(pid) {
                // Killed meanwhile, which is heard of later.
                Err(e) if e.is_gone() || e.code() == libc::ENOENT => continue,
                tids => tids?,
            };
            for tid in tids {
                if !self.tracer.has(tid) && !tracer::has_ended(pid, tid) {
                    found.push(pid);
                }
                for child in lineage::children(pid, tid) {
                    if self.tracer.has(child) {
                        continue;
                    }
                    match process::ended(child)? {
                        Some(_) => self.remains.add(child),
                        None => found.push(child),
                    }
                }
            }
        }
        Ok(found)
    }

    fn seize_missed(&mut self, missed: Vec<i32>) -> Result<(), CaptureError> {
        let known = self.tracer.all();
        self.seize_from(missed)?;
        for tid in self.tracer.all() {
            if !known.contains(&tid) {
                self.interrupted.look(tid);
            }
        }
        Ok(())
    }

    /// Seizes these processes and all of their descendants.
    fn seize_from(&mut self, mut todo: Vec<i32>) -> Result<(), CaptureError> {
        let is_gone = |e: &SysError| e.is_gone() || e.code() == libc::ENOENT;
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
                Err(e) if e.code() == libc::EPERM => {
                    return Err(tracer::traced_by_another(pid).unwrap_or_else(|| e.into()));
                }
                other => other?,
            };
            for tid in tids {
                todo.extend(lineage::children(pid, tid));
            }
        }
        Ok(())
    }

    /// Watches every process that is not watched yet. All threads are stopped.
    pub(super) fn attach_new(&mut self) -> Result<(), CaptureError> {
        self.follow_changes();
        if self.knows_all() {
            return Ok(());
        }
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
        sharing::check_process(pid, self.processes.keys().copied())?;
        if !ptrace::is_wide(pid)? {
            let why = "it is a program of 32 bits; use one of 64";
            return Err(CaptureError::unsupported(format!("pid {pid}"), why.into()));
        }
        let attributes = process::read(pid, None)?;
        let vmas = maps::read(pid, self.objects.systems())?;
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
                libc::EACCES => CaptureError::unsupported(
                    format!("pid {pid}"),
                    "it may not have new executable memory (PR_SET_MDWE, or a security module), \
                     which nilicon needs for itself; run it without"
                        .into(),
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
        let mut threads = threads::Threads::open(pid, self.glances);
        threads.glance()?;
        Ok(Tracked {
            space: AddressSpace::new(pid, attributes.pid, uffd?, self.glances)?,
            advice: advice::Advices::default(),
            handle,
            direct: direct::Direct::new(threads.reads(pid)),
            has_notes: false,
            threads,
            files: files::Files::open(pid, self.glances, self.tmpfs.uncached()),
            attributes,
            ready: None,
            is_doubtful: true,
            read: None,
            timers: timers::Timers::open(pid)?,
        })
    }
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
