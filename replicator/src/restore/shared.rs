//! The memory objects of a spare: made in our own process, filled by write(2), and given to the
//! container's processes by descriptor to map.

use super::error::sys;
use super::script::Script;
use super::spare::CHANNEL;
use super::sysv;
use super::tree::outside;
use crate::image::object::{Attributes, Object, ObjectKind};
use crate::image::pages::{Content, PAGE, Run};
use crate::sys::{SysError, SysResult, shmem};
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown, unlink};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Objects by number.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) all: BTreeMap<u32, (Object, File)>,
}

impl Held {
    /// Makes what is new, and gives each its length. What is gone stays until [`Held::prune`],
    /// because mappings may refer to it. `init` is the container's.
    pub(super) fn follow(&mut self, init: i32, objects: &[Object]) -> SysResult<()> {
        for object in objects {
            let before = self.all.get(&object.id).filter(|_| !object.fresh);
            if before.is_some_and(|(o, _)| o == object) {
                continue;
            }
            let file = match self.all.remove(&object.id).filter(|_| !object.fresh) {
                Some((_, file)) => file,
                None => make(init, object)?,
            };
            if !matches!(object.kind, ObjectKind::Anonymous | ObjectKind::SystemV { .. }) {
                file.set_len(object.size).map_err(|source| failed("ftruncate", object, source))?;
            }
            self.all.insert(object.id, (object.clone(), file));
        }
        Ok(())
    }

    /// Lets go of what the checkpoint does not have. `before` are those of the checkpoint before.
    pub(super) fn prune(
        &mut self,
        init: i32,
        before: &[Object],
        objects: &[Object],
    ) -> SysResult<()> {
        let lives = |o: &&Object| matches!(o.kind, ObjectKind::SystemV { deleted: false, .. });
        let find = |all: &[Object], id| all.iter().find(|o: &&Object| o.id == id).cloned();
        for old in before.iter().filter(lives) {
            if !find(objects, old.id).as_ref().is_some_and(|o| lives(&o))
                && let ObjectKind::SystemV { identity, .. } = &old.kind
            {
                sysv::delete_segment(init, identity)?;
            }
        }
        for new in objects {
            if let ObjectKind::SystemV { identity, deleted: true } = &new.kind
                && find(before, new.id).is_none()
            {
                sysv::delete_segment(init, identity)?;
            }
        }
        self.all.retain(|id, _| objects.iter().any(|o| o.id == *id));
        Ok(())
    }

    /// The id to attach an object by, if it is a segment of System V shared memory.
    pub(super) fn segment(&self, id: u32) -> Option<i32> {
        match self.all.get(&id)?.0.kind {
            ObjectKind::SystemV { identity, .. } => Some(identity.id),
            _ => None,
        }
    }

    /// Brings pages in. Runs count owners from `first` on as the objects.
    pub(super) fn fill(
        &self,
        objects: &[Object],
        first: u32,
        runs: &[Run],
        bytes: &[u8],
    ) -> SysResult<()> {
        for run in runs {
            let index = run.process.checked_sub(first);
            let object = index.and_then(|i| objects.get(i as usize));
            let held = object.and_then(|o| self.all.get(&o.id));
            let Some((object, file)) = held else {
                let what = format!("memory object {:?}", index);
                return Err(SysError::errno("write pages", what, libc::ENOENT));
            };
            let len = (u64::from(run.count) * PAGE as u64)
                .min(object.size.next_multiple_of(PAGE as u64).saturating_sub(run.start));
            match run.content {
                // Beyond the end there is nothing.
                _ if len == 0 => {}
                Content::Dropped => {
                    let flags =
                        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    let done = fallocate(file, flags, run.start as i64, len as i64);
                    done.map_err(|e| failed("fallocate", object, e.into()))?;
                }
                Content::Data(at) => {
                    let len = len.min(object.size - run.start) as usize;
                    let piece = bytes.get(at..at + len).ok_or_else(|| {
                        SysError::errno("write pages", named(object), libc::EINVAL)
                    })?;
                    file.write_all_at(piece, run.start)
                        .map_err(|source| failed("pwrite", object, source))?;
                }
            }
        }
        Ok(())
    }

    /// Opens an object again, as a description of its own.
    pub(super) fn open(&self, id: u32, flags: i32) -> SysResult<OwnedFd> {
        let (_, file) = self.get(id)?;
        let past =
            libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOFOLLOW | libc::O_TMPFILE;
        let flags = OFlag::from_bits_retain(flags & !past | libc::O_CLOEXEC);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        sys(open(path.as_str(), flags, Mode::empty()), "open", || format!("memory object {id}"))
    }

    fn get(&self, id: u32) -> SysResult<&(Object, File)> {
        let missing = || SysError::errno("open", format!("memory object {id}"), libc::ENOENT);
        self.all.get(&id).ok_or_else(missing)
    }

    /// Lets the process that runs the script receive the object's descriptor, which becomes its
    /// lowest free one. `channel` is the other end of the processes' own.
    pub(super) fn pass(&self, script: &mut Script, channel: &UnixStream, id: u32) -> SysResult<()> {
        let (object, file) = self.get(id)?;
        // What is sealed against writing could not be sealed again with a mapping that may be
        // made writable.
        let reopened;
        let fd = match &object.kind {
            ObjectKind::Memfd { seals, .. } if seals & SEAL_WRITE != 0 => {
                reopened = self.open(id, libc::O_RDONLY)?;
                reopened.as_raw_fd()
            }
            _ => file.as_raw_fd(),
        };
        pass(script, channel, fd, named(object))
    }

    /// An object's inode, and a path by which another name for it can be made.
    pub(super) fn link(&self, id: u32) -> SysResult<(u64, String)> {
        use std::os::unix::fs::MetadataExt;
        let (object, file) = self.get(id)?;
        let meta = file.metadata().map_err(|source| failed("fstat", object, source))?;
        Ok((meta.ino(), format!("/proc/self/fd/{}", file.as_raw_fd())))
    }

    /// Puts seals and modes on, now that no page will be written by us any more.
    pub(super) fn seal(&self) -> SysResult<()> {
        for (object, file) in self.all.values() {
            let done = match &object.kind {
                // A file has its own since it was put at its path.
                ObjectKind::Anonymous | ObjectKind::SystemV { .. } | ObjectKind::File { .. } => {
                    Ok(())
                }
                ObjectKind::Deleted { attributes, .. } | ObjectKind::Tmpfs { attributes, .. } => {
                    give(file, attributes)
                }
                ObjectKind::Memfd { seals, attributes, .. } => {
                    give(file, attributes).and_then(|()| {
                        let seals = SealFlag::from_bits_retain(*seals as i32);
                        if seals.is_empty() {
                            return Ok(());
                        }
                        fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(drop)
                    })
                }
            };
            done.map_err(|e| failed("fchown, fchmod or F_ADD_SEALS", object, e.into()))?;
        }
        Ok(())
    }
}

/// Lets the process that runs the script receive a descriptor, which becomes its lowest free one. `channel` is the
/// other end of the processes' own.
pub(super) fn pass(
    script: &mut Script,
    channel: &UnixStream,
    fd: RawFd,
    name: String,
) -> SysResult<()> {
    let byte = script.data(&[0]);
    let iov = script.words(&[byte, 1]);
    let control = script.data(&[0; 24]);
    // struct msghdr: name, its length, iov, its count, control, its length, flags.
    let header = script.words(&[0, 0, iov, 1, control, 24, 0]);
    let call = [CHANNEL as u64, header, 0];
    script.call_on("recvmsg", name.clone(), libc::SYS_recvmsg, &call);
    let rights = [fd];
    let rights = [ControlMessage::ScmRights(&rights)];
    let sent = sendmsg::<UnixAddr>(
        channel.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &rights,
        MsgFlags::MSG_DONTWAIT,
        None,
    );
    sys(sent, "sendmsg", || name).map(drop)
}

const SEAL_WRITE: u32 = libc::F_SEAL_WRITE as u32;

pub(super) fn give(file: &File, a: &Attributes) -> nix::Result<()> {
    fchown(file, Some(Uid::from_raw(a.uid)), Some(Gid::from_raw(a.gid)))?;
    fchmod(file, Mode::from_bits_retain(a.mode))
}

fn named(object: &Object) -> String {
    match &object.kind {
        ObjectKind::Anonymous => format!("shared memory of {} bytes", object.size),
        ObjectKind::Memfd { name, .. } => format!("memfd {name:?}"),
        ObjectKind::Deleted { path, .. } => format!("the deleted file {path}"),
        ObjectKind::Tmpfs { path, .. } | ObjectKind::File { path, .. } => path.clone(),
        ObjectKind::SystemV { identity, .. } => format!("System V segment {}", identity.id),
    }
}

pub(super) fn failed(call: &'static str, object: &Object, source: std::io::Error) -> SysError {
    SysError { call, object: named(object), source }
}

fn make(init: i32, object: &Object) -> SysResult<File> {
    match &object.kind {
        ObjectKind::Anonymous => shmem::anonymous(object.size),
        ObjectKind::Memfd { name, .. } => memfd(name),
        // What has that path here is not to be touched before the takeover.
        ObjectKind::File { .. } => memfd("file"),
        ObjectKind::SystemV { identity, .. } => sysv::segment(init, identity, object.size),
        ObjectKind::Tmpfs { path, .. } => {
            tmpfs_file(init, path).map_err(|source| failed("open", object, source))
        }
        ObjectKind::Deleted { path, .. } => nameless(init, path),
    }
}

/// An empty file without a name, which had the name `path` in the container.
pub(super) fn nameless(init: i32, path: &str) -> SysResult<File> {
    deleted(init, path).or_else(|error| {
        // Its contents are what counts; the name can only be read back.
        tracing::warn!(path, %error, "a deleted file is brought back as a memfd");
        memfd(path.rsplit('/').next().unwrap_or("deleted"))
    })
}

fn memfd(name: &str) -> SysResult<File> {
    // The kernel takes at most 249 bytes.
    let name = name.get(..name.len().min(249)).unwrap_or("memfd");
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    sys(memfd_create(name, flags), "memfd_create", || format!("memfd {name:?}")).map(File::from)
}

/// Mode and owner of a path.
pub(super) fn give_path(path: &str, a: &Attributes) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::os::unix::fs::chown(path, Some(a.uid), Some(a.gid))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(a.mode))
}

/// A file in the spare's own tmpfs. Another file that has its name keeps a different one.
fn tmpfs_file(init: i32, path: &str) -> std::io::Result<File> {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    let outside = outside(init, path);
    if let Some(parent) = Path::new(&outside).parent() {
        fs::create_dir_all(parent)?;
    }
    if let Ok(there) = fs::symlink_metadata(&outside) {
        fs::rename(&outside, format!("{outside}.nilicon-{}", there.ino()))?;
    }
    File::options().read(true).write(true).create_new(true).open(&outside)
}

/// A file that has no name any more: made under the one it had if that is free.
fn deleted(init: i32, path: &str) -> nix::Result<File> {
    let outside = outside(init, path);
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match open(outside.as_str(), flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
        Ok(file) => {
            unlink(outside.as_str())?;
            Ok(file.into())
        }
        Err(nix::Error::EEXIST) => {
            let directory = Path::new(&outside).parent().unwrap_or(Path::new("/"));
            open(directory, flags | OFlag::O_TMPFILE, mode).map(File::from)
        }
        Err(e) => Err(e),
    }
}
