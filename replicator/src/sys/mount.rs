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
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

// linux/mount.h
const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_SET_FD: u32 = 5;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;
const OPEN_TREE_CLONE: u32 = 1;
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

    fn config(
        &self,
        command: u32,
        key: Option<&str>,
        value: Option<&str>,
        file: Option<BorrowedFd<'_>>,
    ) -> SysResult<()> {
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
                file.map_or(0, |f| f.as_raw_fd()),
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
        self.config(FSCONFIG_SET_FLAG, Some(key), None, None)
    }

    /// Sets an option that has a value. fsconfig(2)
    pub fn set(&self, key: &str, value: &str) -> SysResult<()> {
        self.config(FSCONFIG_SET_STRING, Some(key), Some(value), None)
    }

    /// Sets an option that is an open file or directory. fsconfig(2)
    pub fn file(&self, key: &str, file: BorrowedFd<'_>) -> SysResult<()> {
        self.config(FSCONFIG_SET_FD, Some(key), None, Some(file))
    }

    /// Makes the file system, and a mount of it that is attached nowhere. fsmount(2)
    pub fn mount(self, attributes: u64) -> SysResult<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, None, None, None)?;
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
        move_mount(mount, target.as_fd())
            .map_err(|e| about(e, format_args!("{} of pid {pid}", at.display())))?;
        Ok(Place { pid, at: at.to_owned(), namespace })
    })
}

/// Moves a mount to a directory or file. move_mount(2)
fn move_mount(mount: BorrowedFd<'_>, to: BorrowedFd<'_>) -> SysResult<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (mount.as_raw_fd(), to.as_raw_fd());
    // SAFETY: two empty strings.
    let r =
        unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags) };
    check(r, "move_mount", || "a mount".into()).map(drop)
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

/// What a new root of a container is put together from.
#[derive(Clone, Copy, Debug)]
pub struct RootLayers<'a> {
    /// The source that mountinfo names.
    pub name: &'a str,
    /// A directory that takes what is written.
    pub upper: BorrowedFd<'a>,
    /// A directory beside it that the kernel works in.
    pub work: BorrowedFd<'a>,
    /// What stays the host's own in it, as it is.
    pub kept: &'a [PathBuf],
}

/// Gives a container a root of its own: what it has as its root becomes the lower layer of an overlay, and that
/// becomes the root of all processes in the mount namespace of `pid` that have the old one. What is mounted in
/// the old one moves along. Files of the old one that are mapped keep their paths.
/// pivot_root(2), Documentation/filesystems/overlayfs.rst
///
/// # Errors
/// The kernel refuses; layers by descriptor need Linux 6.13. What was moved by then stays so: the container
/// is of no use any more.
pub fn become_root(layers: RootLayers<'_>, pid: i32) -> SysResult<()> {
    let path = format!("/proc/{pid}/mountinfo");
    let mountinfo = std::fs::read_to_string(&path).map_err(|source| SysError {
        call: "read",
        object: path.clone(),
        source,
    })?;
    let points = mounts_of_root(&mountinfo);
    in_mounts_of(pid, |old, _| {
        let directory = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let new = overlay(&layers, below(old, Path::new("/"), directory)?.as_fd())?;
        let kept = layers.kept.iter().map(|path| Ok((path, clone_mount(old, path)?)));
        let kept: Vec<(&PathBuf, Option<OwnedFd>)> = kept.collect::<SysResult<_>>()?;
        move_mount(new.as_fd(), old).map_err(|e| about(e, "the new root"))?;
        for point in &points {
            let there = match below(new.as_fd(), point, OFlag::O_PATH) {
                Err(e) if e.code() == libc::ENOENT => make_directories(new.as_fd(), point)?,
                other => other?,
            };
            let here = below(old, point, OFlag::O_PATH)?;
            // Otherwise another mount hides it.
            if is_mount(here.as_fd(), point)? {
                move_mount(here.as_fd(), there.as_fd()).map_err(|e| about(e, point.display()))?;
            }
        }
        for (path, clone) in kept {
            let Some(clone) = clone else { continue };
            let there = make_directories(new.as_fd(), path)?;
            let identity = |fd: &OwnedFd| {
                let stat = nix::sys::stat::fstat(fd);
                stat.map(|s| (s.st_dev, s.st_ino))
                    .map_err(|e| SysError::errno("fstat", path.display().to_string(), e as i32))
            };
            // It may lie in something that has just moved along.
            if identity(&there)? != identity(&clone)? {
                move_mount(clone.as_fd(), there.as_fd()).map_err(|e| about(e, path.display()))?;
            }
        }
        let step = |call: &'static str| move |e| SysError::errno(call, "the new root", e as i32);
        nix::unistd::fchdir(&new).map_err(step("fchdir"))?;
        // The old root comes to lie over the new one, and is taken away from there.
        nix::unistd::pivot_root(".", ".").map_err(step("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(step("umount2"))
    })
}

fn about(e: SysError, what: impl std::fmt::Display) -> SysError {
    SysError { object: what.to_string(), ..e }
}

fn overlay(layers: &RootLayers<'_>, lower: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    let setup = Setup::begin("overlay")?;
    setup.set("source", layers.name)?;
    setup.file("lowerdir+", lower)?;
    setup.file("upperdir", layers.upper)?;
    setup.file("workdir", layers.work)?;
    // What programs expect of a rename; and nothing that is of this host only.
    setup.set("redirect_dir", "on")?;
    for word in ["index", "metacopy", "xino"] {
        setup.set(word, "off")?;
    }
    setup.mount(0)
}

/// Whether a directory or file is where a mount begins. statx(2)
fn is_mount(at: BorrowedFd<'_>, path: &Path) -> SysResult<bool> {
    /// STATX_ATTR_MOUNT_ROOT of linux/stat.h.
    const MOUNT_ROOT: u64 = 0x2000;
    // SAFETY: all zeros is a struct statx.
    let mut seen: libc::statx = unsafe { std::mem::zeroed() };
    let fd = at.as_raw_fd();
    // SAFETY: an empty string, and a structure that is written to.
    let r = unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, 0, &raw mut seen) };
    check(r.into(), "statx", || path.display().to_string())?;
    Ok(seen.stx_attributes & MOUNT_ROOT != 0)
}

/// A mount of its own of what is at a path; none if there is nothing.
fn clone_mount(root: BorrowedFd<'_>, path: &Path) -> SysResult<Option<OwnedFd>> {
    let there = match below(root, path, OFlag::O_PATH) {
        Err(e) if e.code() == libc::ENOENT => return Ok(None),
        other => other?,
    };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | libc::AT_EMPTY_PATH as u32;
    // SAFETY: an empty string.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, there.as_raw_fd(), c"".as_ptr(), flags) };
    Ok(Some(owned(check(fd, "open_tree", || path.display().to_string())?)))
}

/// The places of what is mounted on the root itself, see proc_pid_mountinfo(5).
fn mounts_of_root(mountinfo: &str) -> Vec<PathBuf> {
    let lines = || mountinfo.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let root = lines().rfind(|f| f.get(4) == Some(&"/"));
    let number = root.and_then(|f| f.first().map(|n| n.to_string()));
    let mut all: Vec<PathBuf> = lines()
        .filter(|f| f.get(1).map(|n| n.to_string()) == number)
        .filter_map(|f| f.get(4).filter(|point| **point != "/").map(|point| plain(point)))
        .collect();
    all.dedup();
    all
}

/// A path as it is, of one in mountinfo, where blanks and their like are in octal.
pub(crate) fn plain(path: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &behind[3..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_on_the_root() {
        let text = "1 0 0:1 / / rw - rootfs none rw\n\
                    20 1 8:1 / / rw - ext4 /dev/vda rw\n\
                    21 20 0:4 / /proc rw - proc proc rw\n\
                    22 21 0:5 / /proc/inner rw - tmpfs x rw\n\
                    23 20 0:6 / /a\\040b rw - tmpfs x rw\n";
        assert_eq!(mounts_of_root(text), [Path::new("/proc"), Path::new("/a b")]);
        assert!(mounts_of_root("").is_empty());
        let is_mount =
            |path: &str| is_mount(File::open(path).expect("it").as_fd(), Path::new(path));
        assert!(is_mount("/proc").expect("seen"));
        assert!(!is_mount("/proc/self").expect("seen"));
    }
}
