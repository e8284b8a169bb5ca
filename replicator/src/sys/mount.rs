//! Mounts by descriptor: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), and files by handle:
//! open_by_handle_at(2).

use super::error::{SysError, SysResult, check};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

// linux/mount.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
/// No device node of the mount can be opened.
pub const MOUNT_ATTR_NODEV: u64 = 0x04;
/// Nothing of the mount can be changed.
pub const MOUNT_ATTR_RDONLY: u64 = 0x01;

/// A file system that is being set up.
#[derive(Debug)]
pub struct Setup {
    name: String,
    context: OwnedFd,
}

fn owned(n: i64) -> OwnedFd {
    // SAFETY: called with what the kernel has just handed out as a new descriptor.
    unsafe { OwnedFd::from_raw_fd(n as i32) }
}

fn c(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

impl Setup {
    /// Begins with a type of file system. fsopen(2)
    pub fn begin(name: &str) -> SysResult<Self> {
        let c_name = c(name);
        // SAFETY: a string that ends with zero.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, c_name.as_ptr(), FSOPEN_CLOEXEC) };
        let fd = check(fd, "fsopen", || format!("file system {name:?}"))?;
        Ok(Self { name: name.to_owned(), context: owned(fd) })
    }

    fn config(&self, command: u32, key: Option<&str>, value: Option<&str>) -> SysResult<()> {
        let (k, v) = (key.map(c), value.map(c));
        let pointer = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: strings that end with zero, or none.
        let r = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.context.as_raw_fd(),
                command,
                pointer(&k),
                pointer(&v),
                0,
            )
        };
        check(r, "fsconfig", || {
            // The kernel says more where the set-up can be read.
            let mut said = [0; 200];
            let n = self.context.try_clone().map(File::from).and_then(|mut f| f.read(&mut said));
            let said = String::from_utf8_lossy(&said[..n.unwrap_or(0)]).trim().to_owned();
            format!("{} of {:?} ({said})", key.unwrap_or("creation"), self.name)
        })
        .map(drop)
    }

    /// Sets an option that is a word. fsconfig(2)
    pub fn flag(&self, key: &str) -> SysResult<()> {
        self.config(FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Sets an option that has a value. fsconfig(2)
    pub fn set(&self, key: &str, value: &str) -> SysResult<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Makes the file system, and a mount of it that is attached nowhere. fsmount(2)
    pub fn mount(self, attributes: u64) -> SysResult<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None)?;
        let fd = self.context.as_raw_fd();
        // SAFETY: no pointers.
        let r = unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes) };
        Ok(owned(check(r, "fsmount", || format!("file system {:?}", self.name))?))
    }
}

/// A place in the mount namespace, and under the root, of a process. It holds neither.
#[derive(Clone, Debug)]
pub struct Place {
    pid: i32,
    at: PathBuf,
    namespace: u64,
}

fn open_namespace(pid: i32) -> SysResult<(File, u64)> {
    let path = format!("/proc/{pid}/ns/mnt");
    let failed = |source| SysError { call: "open", object: path.clone(), source };
    let file = File::open(&path).map_err(failed)?;
    let ino = file.metadata().map_err(failed)?.ino();
    Ok((file, ino))
}

/// Runs something with the root of `pid`, on a thread of its own in that process's mount namespace.
fn in_mounts_of<T: Send>(
    pid: i32,
    f: impl FnOnce(BorrowedFd<'_>, u64) -> SysResult<T> + Send,
) -> SysResult<T> {
    let inside = || {
        // Before the namespace is another one: /proc is found by this one's paths.
        let path = format!("/proc/{pid}/root");
        let root = nix::fcntl::open(path.as_str(), OFlag::O_PATH | OFlag::O_CLOEXEC, mode())
            .map_err(|e| SysError::errno("open", path, e as i32))?;
        let (namespace, number) = open_namespace(pid)?;
        let object = || format!("mount namespace of pid {pid}");
        // A thread that shares its working directory with others may not go there.
        unshare(CloneFlags::CLONE_FS)
            .map_err(|e| SysError::errno("unshare", object(), e as i32))?;
        setns(namespace, CloneFlags::CLONE_NEWNS)
            .map_err(|e| SysError::errno("setns", object(), e as i32))?;
        f(root.as_fd(), number)
    };
    std::thread::scope(|s| match s.spawn(inside).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn mode() -> nix::sys::stat::Mode {
    nix::sys::stat::Mode::empty()
}

fn below(root: BorrowedFd<'_>, at: &Path, flags: OFlag) -> SysResult<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, at, how)
        .map_err(|e| SysError::errno("openat2", at.display().to_string(), e as i32))
}

/// Makes the directories of a path that are missing, under `root` and nowhere else.
fn make_directories(root: BorrowedFd<'_>, at: &Path) -> SysResult<OwnedFd> {
    let path = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut done = PathBuf::from("/");
    let mut here = below(root, &done, path)?;
    for part in at.components() {
        let std::path::Component::Normal(name) = part else { continue };
        done.push(name);
        here = match below(root, &done, path) {
            Err(e) if e.code() == libc::ENOENT => {
                let mode = nix::sys::stat::Mode::from_bits_truncate(0o755);
                nix::sys::stat::mkdirat(&here, Path::new(name), mode).map_err(|e| {
                    SysError::errno("mkdirat", done.display().to_string(), e as i32)
                })?;
                below(root, &done, path)?
            }
            other => other?,
        };
    }
    Ok(here)
}

/// Attaches a mount at a path of a process, and makes the directory if it is missing.
/// move_mount(2)
pub fn attach(mount: BorrowedFd<'_>, pid: i32, at: &Path) -> SysResult<Place> {
    in_mounts_of(pid, |root, namespace| {
        let target = make_directories(root, at)?;
        let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
        // SAFETY: two empty strings.
        let r = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                mount.as_raw_fd(),
                c"".as_ptr(),
                target.as_raw_fd(),
                c"".as_ptr(),
                flags,
            )
        };
        check(r, "move_mount", || format!("{} of pid {pid}", at.display()))?;
        Ok(Place { pid, at: at.to_owned(), namespace })
    })
}

/// Detaches what is mounted at a place, as long as its process is there and has not gone to another
/// namespace. umount2(2)
pub fn detach(place: &Place) -> SysResult<()> {
    let Place { pid, at, namespace } = place;
    in_mounts_of(*pid, |root, now| {
        if now != *namespace {
            return Ok(());
        }
        let mounted = below(root, at, OFlag::O_PATH)?;
        // /proc of that namespace may be another one's, or none: the thread goes there instead.
        nix::unistd::fchdir(&mounted)
            .map_err(|e| SysError::errno("fchdir", at.display().to_string(), e as i32))?;
        umount2(".", MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|e| SysError::errno("umount2", at.display().to_string(), e as i32))
    })
}

/// struct file_handle with the room that a handle of FUSE takes.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    node: [u32; 3],
}

const _: () = assert!(std::mem::size_of::<Handle>() == 20);

/// Opens a file of a FUSE file system by its number, whether it has a name or not. The file system
/// must be able to look up ".". open_by_handle_at(2)
pub fn open_by_node(mount: BorrowedFd<'_>, node: u64, flags: OFlag) -> SysResult<OwnedFd> {
    /// FILEID_INO64_GEN of linux/exportfs.h, as FUSE writes it: high word, low word, generation.
    const KIND: i32 = 0x81;
    // A mount's own descriptor is only a path, and that is not enough here.
    let at = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let inside = nix::fcntl::openat(mount, ".", at, mode())
        .map_err(|e| SysError::errno("openat", "the root of the mount", e as i32))?;
    let mut handle = Handle { bytes: 12, kind: KIND, node: [(node >> 32) as u32, node as u32, 0] };
    let flags = (flags | OFlag::O_CLOEXEC).bits();
    // SAFETY: a handle with the length that it states.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, inside.as_raw_fd(), &raw mut handle, flags)
    };
    Ok(owned(check(fd, "open_by_handle_at", || format!("file {node}"))?))
}
