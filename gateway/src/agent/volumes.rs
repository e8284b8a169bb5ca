//! The volumes of a container on this host: where the files of replicated ones are, who may change
//! them, and how they are served; and that read-only ones are the same on both hosts.
//!
//! ```text
//!  runs here:       Files::begin / go_on ─► Volumes ─► FUSE ─► container      journals shut
//!  runs elsewhere:  Files::copy ─► Volumes ◄─ carry_out ◄─ Journals ◄─ seed, keep   journals open
//! ```
//! Invariant: a directory is either written by the container here or made like another host's, never
//! both: journals are kept only while the container does not run here, and those of epochs that it
//! did not go on from are gone before it does. The generation that the files are of stands beside
//! them, so that a host does not begin with files that are older than the other's.

use super::primary::lock;
use super::status::STATE_ROOT;
use anyhow::{Context, Result, bail};
use netns_tools::topology::{Container, FsyncRule, Topology, VolumeKind, VolumeStart};
use replicator::Generation;
use replicator::volume::{
    Fsync, Guard, Journals, Known, ReadOnly, ServeOptions, Served, VolumeError, Volumes,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// File beside the volumes with the generation that they are of.
const GENERATION: &str = "generation";

/// A replicated volume as the topology has it.
#[derive(Debug)]
struct Planned {
    /// Where the container sees it.
    path: PathBuf,
    options: ServeOptions,
    start: VolumeStart,
    /// It is the container's root, over the files of its host.
    is_root: bool,
}

/// The volumes of a container on this host.
#[derive(Debug)]
pub(super) struct Files {
    base: PathBuf,
    names: Vec<String>,
    plan: Vec<Planned>,
    /// What stays the host's in a root.
    kept: Vec<PathBuf>,
    durable: bool,
    journals: Arc<Journals>,
    read_only: Option<Arc<ReadOnly>>,
    marked: Mutex<Generation>,
}

/// Volumes that the container on this host works with.
#[derive(Debug)]
pub(super) struct InUse {
    pub(super) volumes: Arc<Volumes>,
    /// The first is its root.
    has_root: bool,
    /// Ends with the container.
    served: Vec<Served>,
    /// Ends them if this process cannot; after them.
    _guard: Option<Guard>,
}

/// Where a host keeps the files of a container's volumes.
pub fn directory(topology: &Topology, host: &str, name: &str, container: &Container) -> PathBuf {
    Path::new(&container.volume_directory).join(&topology.name).join(host).join(name)
}

/// Where a container has its volumes of a kind.
pub(super) fn paths(container: &Container, kind: VolumeKind) -> impl Iterator<Item = PathBuf> {
    let ours = container.volumes.iter().filter(move |v| v.kind == kind);
    ours.map(|v| PathBuf::from(&v.path))
}

impl Files {
    /// Those that the topology names; none if it names no replicated and no read-only volume.
    pub(super) fn of(
        topology: &Topology,
        host: &str,
        name: &str,
        container: &Container,
    ) -> Result<Option<Arc<Self>>> {
        let kind = VolumeKind::Replicated;
        let ours: Vec<_> = container.volumes.iter().filter(|v| v.kind == kind).collect();
        let fixed: Vec<_> = paths(container, VolumeKind::ReadOnly).collect();
        if ours.is_empty() && fixed.is_empty() {
            return Ok(None);
        }
        let read_only = (!fixed.is_empty()).then(|| Arc::new(ReadOnly::new(fixed)));
        let base = directory(topology, host, name, container);
        let durable = ours.iter().any(|v| v.durable == Some(true));
        let plan = ours.iter().map(|v| Planned {
            path: PathBuf::from(&v.path),
            options: ServeOptions {
                read_only: false,
                fsync: match v.fsync.unwrap_or_default() {
                    FsyncRule::Commit => Fsync::Commit,
                    FsyncRule::Local => Fsync::Local,
                },
            },
            start: v.start.unwrap_or_default(),
            is_root: v.is_root(),
        });
        // Its console is there.
        let kept =
            paths(container, VolumeKind::Shared).chain([PathBuf::from(STATE_ROOT)]).collect();
        let marked = read_generation(&base)?;
        let names: Vec<String> = ours.iter().map(|v| v.directory_name()).collect();
        let journals = Journals::new(&base, &names, durable).with_read_only(read_only.clone());
        Ok(Some(Arc::new(Self {
            plan: plan.collect(),
            kept,
            durable,
            journals: Arc::new(journals),
            names,
            read_only,
            marked: Mutex::new(marked),
            base,
        })))
    }

    /// Where checkpoints are written down before they are acknowledged.
    pub(super) fn journals(&self) -> Arc<Journals> {
        self.journals.clone()
    }

    /// The generation that the files here are of; 0 if there are none.
    pub(super) fn generation(&self) -> Generation {
        *lock(&self.marked)
    }

    /// Refuses to begin with files that are of before `newest`, the last generation that is known.
    pub(super) fn check_are_newest(&self, newest: Generation) -> Result<()> {
        let here = self.generation();
        let all_begin_empty = self.plan.iter().all(|v| v.start == VolumeStart::Empty);
        if all_begin_empty || here == Generation::default() || here >= newest {
            return Ok(());
        }
        bail!(
            "the files in {} are of generation {here}, and the container has run elsewhere in \
             generation {newest} since then: make the host with the newer files its primary in the \
             topology; or, if these are to count, write {newest} to {}",
            self.base.display(),
            self.base.join(GENERATION).display()
        )
    }

    /// Notes that the files here are of this generation.
    pub(super) fn mark(&self, generation: Generation) -> Result<()> {
        let mut marked = lock(&self.marked);
        if *marked == generation {
            return Ok(());
        }
        let path = self.base.join(GENERATION);
        let next = self.base.join("generation.new");
        std::fs::write(&next, format!("{}\n", generation.0))
            .and_then(|()| std::fs::rename(&next, &path))
            .with_context(|| format!("write {}", path.display()))?;
        *marked = generation;
        Ok(())
    }

    /// For a new life of the container, whose first process waits as `pid`.
    pub(super) fn begin(&self, generation: Generation, pid: i32) -> Result<InUse> {
        self.look_at_read_only()?;
        // What was acknowledged here when the container ran elsewhere is carried out.
        let mut volumes = self.open()?;
        self.journals.shut()?;
        if self.plan.iter().any(|v| v.start == VolumeStart::Empty) {
            drop(volumes);
            for (name, _) in
                self.names.iter().zip(&self.plan).filter(|(_, v)| v.start == VolumeStart::Empty)
            {
                let path = self.base.join(name);
                std::fs::remove_dir_all(&path)
                    .with_context(|| format!("empty the volume in {}", path.display()))?;
            }
            volumes = self.open()?;
        }
        volumes.sweep()?;
        self.mark(generation)?;
        self.serve(Arc::new(volumes), pid)
    }

    /// For a copy of a container that runs elsewhere. It begins with a full checkpoint, and does
    /// not look at what is here.
    pub(super) fn copy(&self) -> Result<Arc<Volumes>> {
        self.look_at_read_only()?;
        let volumes = Volumes::open_as_it_is(&self.base, &self.names, self.durable)?;
        Ok(Arc::new(volumes.with_read_only(self.read_only.clone())))
    }

    fn look_at_read_only(&self) -> Result<()> {
        Ok(self.read_only.as_ref().map_or(Ok(()), |all| all.look())?)
    }

    /// For a container that goes on here with the files of its last checkpoint, in the tree of
    /// processes whose first is `pid`.
    pub(super) fn go_on(
        &self,
        generation: Generation,
        volumes: Arc<Volumes>,
        pid: i32,
    ) -> Result<InUse> {
        self.journals.shut()?;
        self.mark(generation)?;
        self.serve(volumes, pid)
    }

    /// The container does not run here any longer.
    pub(super) fn give_way(&self) {
        self.journals.reopen();
    }

    fn open(&self) -> Result<Volumes> {
        let volumes = Volumes::open(&self.base, &self.names, self.durable)?;
        Ok(volumes.with_read_only(self.read_only.clone()))
    }

    fn serve(&self, volumes: Arc<Volumes>, pid: i32) -> Result<InUse> {
        let (mut served, mut has_root) = (Vec::with_capacity(self.plan.len()), false);
        let mut all: Vec<_> = self.names.iter().zip(&self.plan).zip(volumes.list()).collect();
        // The others are mounted in it.
        all.sort_by_key(|((_, planned), _)| !planned.is_root);
        for ((name, planned), volume) in all {
            let mut one = Served::start(name, volume.clone(), planned.options)?;
            if planned.is_root {
                one.become_root(pid, &self.kept)?;
                has_root = true;
            } else {
                one.attach(pid, &planned.path)?;
            }
            served.push(one);
        }
        let guard =
            (!served.is_empty()).then(|| Guard::start(Path::new("/proc/self/exe"), &served));
        let guard = guard.transpose().context("begin the guard of volumes")?;
        Ok(InUse { volumes, has_root, served, _guard: guard })
    }
}

impl InUse {
    /// What a capture needs to know of its root, if that is a volume, and of the other volumes.
    pub(super) fn known(&self) -> Result<(Option<Known>, Vec<Known>), VolumeError> {
        let (root, others) = self.served.split_at(usize::from(self.has_root));
        let root = root.first().map(Served::known).transpose()?;
        Ok((root, others.iter().map(Served::known).collect::<Result<_, _>>()?))
    }
}

fn read_generation(base: &Path) -> Result<Generation> {
    let path = base.join(GENERATION);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let number = text.trim().parse();
            number
                .map(Generation)
                .with_context(|| format!("{} holds no generation: {text:?}", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Generation::default()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}
