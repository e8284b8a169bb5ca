//! Named network namespaces, and work inside them.
//!
//! A namespace is named by a mount in `/run/netns`, as iproute2 does it, so that `ip netns exec`
//! finds it. The only way in is [`Namespace::enter`]: it runs a closure in a thread of its own,
//! which ends inside the namespace; no other thread ever changes its namespace, so none can be
//! left in the wrong one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

/// Where named namespaces are mounted.
const DIRECTORY: &str = "/run/netns";
const NONE: Option<&Path> = None;

/// What failed on which namespace.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the network namespace {name}: {source}{}", hint(source))]
pub struct NamespaceError {
    action: &'static str,
    name: String,
    source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (run as root)",
        io::ErrorKind::NotFound => " (is the lab deployed?)",
        _ => "",
    }
}

impl NamespaceError {
    /// The error of the system.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

/// A network namespace, held open: it lasts as long as this value, whatever happens to its name.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
    inode: u64,
}

impl Namespace {
    /// The name of the namespace of a node of a lab.
    pub fn name_of(lab: &str, node: &str) -> String {
        format!("nilicon-{lab}-{node}")
    }

    /// The path that names a namespace.
    pub fn path_of(name: &str) -> PathBuf {
        Path::new(DIRECTORY).join(name)
    }

    /// Makes a namespace, or opens the one of that name.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN and a writable `/run`.
    pub fn create(name: &str) -> Result<Self, NamespaceError> {
        let failed =
            |source: io::Error| NamespaceError { action: "make", name: name.into(), source };
        if !is_mounted(name) {
            share_directory().map_err(failed)?;
            let path = Self::path_of(name);
            File::create(&path).map_err(failed)?;
            on_thread(|| -> nix::Result<()> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                mount(Some("/proc/thread-self/ns/net"), &path, NONE, MsFlags::MS_BIND, NONE)
            })
            .map_err(|errno| failed(errno.into()))?;
        }
        Self::open(name)
    }

    /// Opens the namespace of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn open(name: &str) -> Result<Self, NamespaceError> {
        let failed =
            |source: io::Error| NamespaceError { action: "open", name: name.into(), source };
        if !is_mounted(name) {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
        let file = File::open(Self::path_of(name)).map_err(failed)?;
        let inode = file.metadata().map_err(failed)?.ino();
        Ok(Self { name: name.to_owned(), file, inode })
    }

    /// Opens the namespace that a process is in.
    ///
    /// # Errors
    /// There is no such process, or it belongs to somebody else.
    pub fn of_process(pid: i32) -> Result<Self, NamespaceError> {
        let name = format!("of process {pid}");
        let open = || {
            let file = File::open(format!("/proc/{pid}/ns/net"))?;
            let inode = file.metadata()?.ino();
            Ok((file, inode))
        };
        match open() {
            Ok((file, inode)) => Ok(Self { name, file, inode }),
            Err(source) => Err(NamespaceError { action: "open", name, source }),
        }
    }

    /// Takes the name away. The namespace itself ends with its last process and descriptor. That
    /// there is none of that name is no error.
    ///
    /// # Errors
    /// The mount cannot be undone.
    pub fn delete(name: &str) -> Result<(), NamespaceError> {
        let path = Self::path_of(name);
        let failed = |source| NamespaceError { action: "delete", name: name.into(), source };
        while is_mounted(name) {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|errno| failed(errno.into()))?;
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// All names in use that begin with `prefix`, sorted.
    pub fn list(prefix: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name());
        let mut names: Vec<String> = names
            .filter_map(|name: OsString| name.into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What tells it from every other namespace: the inode of `/proc/PID/ns/net` of its processes.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` in a fresh thread inside the namespace and returns its result. Sockets and
    /// devices that it opens belong to the namespace and can be used from everywhere. Blocks until
    /// `work` is done.
    ///
    /// # Errors
    /// The namespace cannot be entered (needs CAP_SYS_ADMIN).
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        on_thread(|| setns(&self.file, CloneFlags::CLONE_NEWNET).map(|()| work())).map_err(
            |errno| NamespaceError {
                action: "enter",
                name: self.name.clone(),
                source: errno.into(),
            },
        )
    }

    /// Starts a process inside the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, NamespaceError> {
        self.enter(|| command.spawn())?.map_err(|source| NamespaceError {
            action: "start a program in",
            name: self.name.clone(),
            source,
        })
    }

    /// Sets a network sysctl of the namespace, by its dotted name: `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// There is no such sysctl, or it does not accept the value.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<(), NamespaceError> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.enter(|| fs::write(path, value))?.map_err(|source| NamespaceError {
            action: "set a sysctl in",
            name: self.name.clone(),
            source: io::Error::new(source.kind(), format!("{key} = {value}: {source}")),
        })
    }

    /// The value of a network sysctl of the namespace.
    ///
    /// # Errors
    /// There is no such sysctl.
    pub fn sysctl(&self, key: &str) -> Result<String, NamespaceError> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        let value = self.enter(|| fs::read_to_string(path))?.map_err(|source| NamespaceError {
            action: "read a sysctl in",
            name: self.name.clone(),
            source: io::Error::new(source.kind(), format!("{key}: {source}")),
        })?;
        Ok(value.trim_end().to_owned())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Whether the name is a namespace, and not only the file that one is mounted on.
fn is_mounted(name: &str) -> bool {
    statfs(&Namespace::path_of(name)).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

/// Makes the directory a shared mount, so that a name made in one mount namespace is known, and
/// can be taken away, in the others.
fn share_directory() -> io::Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    let share = || mount(NONE, DIRECTORY, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE);
    match share() {
        // It is no mount yet: mount it on itself.
        Err(Errno::EINVAL) => {
            mount(Some(DIRECTORY), DIRECTORY, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
            Ok(share()?)
        }
        other => Ok(other?),
    }
}
