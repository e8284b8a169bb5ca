//! A volume as a file system: a FUSE server of this process, mounted in a container.
//!
//! ```text
//!  start: /dev/fuse ─► fsopen, fsmount ─► detached mount     threads answer requests
//!  attach: move_mount into the container's namespace
//!  drop: unmounted there ─► the connection is aborted ─► the threads end
//! ```
//! Invariants: no request waits for a checkpoint, so that a stop, which waits for the requests of
//! the threads that it stops, never waits for itself; each change is in the volume before it is
//! answered (no write-back cache), so that a seal misses none but stores through a mapping, and a
//! capture has those written ([`Capturer::keep_volume`](crate::capture::Capturer::keep_volume)).

mod answers;
mod files;
mod listings;
mod requests;

use super::{Ino, Volume, VolumeError};
use crate::sys::SysError;
use crate::sys::mount::{self, Place, RootLayers, Setup};
use fuser::{BackgroundSession, Config, Session, SessionACL};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use requests::Requests;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Threads that answer requests of one volume. One may wait for the disk (fsync: local).
const THREADS: usize = 4;

/// What a volume that is a container's root has in it: what was written, and a directory that the kernel works in.
pub const UPPER: &str = "upper";
const WORK: &str = "work";
/// The source that mountinfo names for such a root.
pub const ROOT_SOURCE: &str = "nilicon";

/// When fsync(2) answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fsync {
    /// At once: nothing leaves the container before the backup has the epoch that holds the data.
    #[default]
    Commit,
    /// When this host's disk has the data as well.
    Local,
}

/// How a volume is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// The container may not change it.
    pub read_only: bool,
    /// When fsync(2) answers.
    pub fsync: Fsync,
}

/// A volume that is served on this host. Dropping it ends that, with requests in flight as well.
#[derive(Debug)]
pub struct Served {
    name: String,
    root: PathBuf,
    volume: Arc<Volume>,
    mount: OwnedFd,
    device: u64,
    /// What is written to this file ends the connection with the kernel.
    abort: File,
    place: Option<Place>,
    session: Option<BackgroundSession>,
}

/// What a capture needs to know of a volume that is served.
#[derive(Debug)]
pub struct Known {
    pub(crate) volume: Arc<Volume>,
    /// Major above minor, as in /proc/PID/maps.
    pub(crate) device: u64,
    mount: OwnedFd,
}

impl Known {
    /// Opens a file by its number, to read it.
    pub(crate) fn open(&self, ino: Ino) -> Result<File, SysError> {
        mount::open_by_node(self.mount.as_fd(), ino.0, OFlag::O_RDONLY).map(File::from)
    }
}

fn system(e: SysError) -> (String, io::Error) {
    (format!("{} on {}", e.call, e.object), e.source)
}

impl Served {
    /// Serves `volume`; nothing is mounted anywhere yet but a detached mount.
    pub fn start(
        name: &str,
        volume: Arc<Volume>,
        options: ServeOptions,
    ) -> Result<Self, VolumeError> {
        let root = volume.root();
        let failed = |(what, source): (String, io::Error)| VolumeError::Io {
            root: root.clone(),
            doing: format!("serving it as {name:?}: {what}"),
            source,
        };
        // Some files of each volume stay open here.
        if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
            && soft < hard
        {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|e| failed(("opening /dev/fuse".into(), e)))?;
        let mount = new_mount(name, &device, options).map_err(|e| failed(system(e)))?;
        let requests = Requests::new(volume.clone(), options.fsync);
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let session = Session::from_fd(requests, device.into(), SessionACL::All, config)
            .and_then(Session::spawn)
            .map_err(|e| failed(("talking to the kernel's FUSE".into(), e)))?;
        // From here on an early return drops the mount, and that ends the session.
        let (mount, device) = number(mount).map_err(|e| failed(("its device".into(), e)))?;
        let abort = abort_file(device).map_err(|e| failed(system(e)))?;
        // The kernel reads 128 KiB ahead at most, unless it is told here. It works without.
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), "1024");
        let (name, session) = (name.to_owned(), Some(session));
        Ok(Self { name, root, volume, mount, device, abort, place: None, session })
    }

    /// Attaches the mount at `at` in the mount namespace, and under the root, of process `pid`.
    /// Makes the mount point if it is missing. May be called once.
    pub fn attach(&mut self, pid: i32, at: &Path) -> Result<(), VolumeError> {
        let what = format!("mounting {:?} at {} of pid {pid}", self.name, at.display());
        if self.place.is_some() {
            let source = io::Error::from_raw_os_error(libc::EBUSY);
            return Err(self.failed(format!("{what}: it is mounted already"), source));
        }
        let place = mount::attach(self.mount.as_fd(), pid, at).map_err(|e| {
            let (call, source) = system(e);
            self.failed(format!("{what}: {call}"), source)
        })?;
        self.place = Some(place);
        Ok(())
    }

    /// Makes an overlay of the files of the host and what is in this volume the root of process `pid` and of all in
    /// its mount namespace: whatever they write anywhere comes here. What is at the paths `kept` stays the host's.
    /// To be called while nothing of the container runs, before [`Served::attach`] of others.
    pub fn become_root(&self, pid: i32, kept: &[PathBuf]) -> Result<(), VolumeError> {
        let layer = |name: &str| -> Result<OwnedFd, SysError> {
            let failed = |call| move |e| SysError::errno(call, name, e as i32);
            match nix::sys::stat::mkdirat(&self.mount, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(failed("mkdirat")(e)),
            }
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            nix::fcntl::openat(&self.mount, name, flags, Mode::empty()).map_err(failed("openat"))
        };
        let make = || -> Result<(), SysError> {
            let (upper, work) = (layer(UPPER)?, layer(WORK)?);
            let (upper, work) = (upper.as_fd(), work.as_fd());
            mount::become_root(RootLayers { name: ROOT_SOURCE, upper, work, kept }, pid)
        };
        make().map_err(|e| {
            let (call, source) = system(e);
            self.failed(format!("making it the root of pid {pid}: {call}"), source)
        })
    }

    /// The device number that stat(2) in the container has for all files of the volume; with the
    /// inode number, which is the file's [`Ino`], it tells which file a descriptor refers to.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// What a capture needs to know of it.
    ///
    /// # Errors
    /// The process has too many files open.
    pub fn known(&self) -> Result<Known, VolumeError> {
        let mount = self.mount.try_clone();
        let mount = mount.map_err(|e| self.failed("duplicating its mount".into(), e))?;
        let (major, minor) =
            (nix::sys::stat::major(self.device), nix::sys::stat::minor(self.device));
        Ok(Known { volume: self.volume.clone(), device: major << 32 | minor, mount })
    }

    /// Opens a file by its number, by way of the mount, whether it has a name or not.
    pub fn open(&self, ino: Ino, flags: OFlag) -> Result<OwnedFd, VolumeError> {
        mount::open_by_node(self.mount.as_fd(), ino.0, flags).map_err(|e| {
            let (call, source) = system(e);
            self.failed(format!("opening file {ino}: {call}"), source)
        })
    }

    /// Another descriptor of the file that ends the connection.
    pub(super) fn abort_handle(&self) -> io::Result<OwnedFd> {
        self.abort.try_clone().map(OwnedFd::from)
    }

    fn failed(&self, doing: String, source: io::Error) -> VolumeError {
        VolumeError::Io { root: self.root.clone(), doing, source }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(place) = &self.place
            && let Err(e) = mount::detach(place)
        {
            // Most often the process is no more, and its namespace with it.
            tracing::debug!(volume = self.name, "not unmounted: {e}");
        }
        if let Err(e) = self.abort.write_all(b"1") {
            tracing::warn!(volume = self.name, "the FUSE connection could not be ended: {e}");
            return;
        }
        if let Some(Err(e)) = self.session.take().map(BackgroundSession::join) {
            tracing::warn!(volume = self.name, "the FUSE threads ended with an error: {e}");
        }
        self.volume.forget_all();
    }
}

fn new_mount(name: &str, device: &File, options: ServeOptions) -> Result<OwnedFd, SysError> {
    let setup = Setup::begin("fuse")?;
    setup.set("source", name)?;
    setup.set("subtype", "nilicon")?;
    setup.set("fd", &device.as_raw_fd().to_string())?;
    setup.set("rootmode", "40000")?;
    setup.set("user_id", "0")?;
    setup.set("group_id", "0")?;
    setup.flag("allow_other")?;
    setup.flag("default_permissions")?;
    let read_only = if options.read_only { mount::MOUNT_ATTR_RDONLY } else { 0 };
    setup.mount(mount::MOUNT_ATTR_NODEV | read_only)
}

fn number(mount: OwnedFd) -> io::Result<(OwnedFd, u64)> {
    let mount = File::from(mount);
    let device = mount.metadata()?.dev();
    Ok((mount.into(), device))
}

/// The file of fusectl that ends the connection of this device.
fn abort_file(device: u64) -> Result<File, SysError> {
    let control = Setup::begin("fusectl")?.mount(0)?;
    let connection = (nix::sys::stat::major(device) << 20) | nix::sys::stat::minor(device);
    let path = format!("{connection}/abort");
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let file = nix::fcntl::openat(&control, path.as_str(), flags, nix::sys::stat::Mode::empty());
    file.map(File::from).map_err(|e| SysError::errno("openat", path, e as i32))
}
