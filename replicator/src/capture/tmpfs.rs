//! The container's own tmpfs mounts, such as its /dev/shm: their files are part of a checkpoint. And what else
//! there is to know of its mounts.
//!
//! An empty one costs one fstatfs(2) in a stop. The contents of its files are those of objects
//! ([`super::objects`]).

use super::CaptureError;
use super::objects::{Class, Key, Objects};
use crate::image::info::TmpfsMount;
use crate::image::object::Attributes;
use crate::image::tree::{EntryKind, TmpfsEntry};
use crate::sys::{SysError, mount};
use crate::volume::ROOT_SOURCE;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

/// Names that one tmpfs may hold.
const MOST: usize = 100_000;

/// The tmpfs mounts that a container has and its host has not.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    all: Vec<Mount>,
    devices: Vec<u64>,
    /// The device of an overlay of ours that is the container's root.
    root_layer: Option<u64>,
    /// Devices of those that may be read past the page cache however a file was opened.
    uncached: Arc<[u64]>,
}

#[derive(Debug)]
struct Mount {
    point: String,
    device: u64,
    directory: File,
}

impl Mounts {
    /// Those of the container whose init this is.
    pub(super) fn find(root: i32) -> Result<Self, CaptureError> {
        let read = |path: &str| fs::read_to_string(path).map_err(|e| CaptureError::proc(path, e));
        let ours: Vec<u64> =
            whole("tmpfs", &read("/proc/thread-self/mountinfo")?).map(|m| m.1).collect();
        let theirs = read(&format!("/proc/{root}/mountinfo"))?;
        let mut me = Self {
            root_layer: root_layer(&theirs),
            uncached: uncached(&theirs).collect(),
            ..Self::default()
        };
        for (point, device) in whole("tmpfs", &theirs) {
            if ours.contains(&device) {
                continue;
            }
            let path = format!("/proc/{root}/root{point}");
            let directory = File::open(&path).map_err(|e| CaptureError::proc(&path, e))?;
            me.devices.push(device);
            me.all.push(Mount { point, device, directory });
        }
        Ok(me)
    }

    /// Their devices, major above minor.
    pub(super) fn devices(&self) -> &[u64] {
        &self.devices
    }

    /// The device of an overlay of ours that is the container's root, major above minor: what
    /// /proc/PID/maps says of files in it.
    pub(super) fn root_layer(&self) -> Option<u64> {
        self.root_layer
    }

    /// Devices of file systems that may be read past the page cache whatever the flags of a descriptor, major
    /// above minor.
    pub(super) fn uncached(&self) -> &Arc<[u64]> {
        &self.uncached
    }

    /// All names in them, directories first; the files become known objects.
    pub(super) fn walk(&self, objects: &mut Objects) -> Result<Vec<TmpfsEntry>, CaptureError> {
        let mut all = Vec::new();
        for mount in &self.all {
            let usage = nix::sys::statvfs::fstatvfs(&mount.directory)
                .map_err(|e| SysError::errno("fstatvfs", mount.point.clone(), e as i32))?;
            // The root directory is the one file that is always there.
            if usage.files() - usage.files_free() > 1 {
                mount.walk(objects, &mut all)?;
            }
        }
        Ok(all)
    }
}

impl Mount {
    fn walk(&self, objects: &mut Objects, all: &mut Vec<TmpfsEntry>) -> Result<(), CaptureError> {
        let base = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        let mut todo = vec![String::new()];
        while let Some(inside) = todo.pop() {
            let outside = format!("{base}/{inside}");
            let failed = |e| CaptureError::proc(&format!("{}/{inside}", self.point), e);
            for entry in fs::read_dir(&outside).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let Ok(name) = entry.file_name().into_string() else {
                    let what = format!("{}/{}", self.point, entry.file_name().display());
                    return Err(CaptureError::unsupported(what, "a name that is not UTF-8".into()));
                };
                let inside = if inside.is_empty() { name } else { format!("{inside}/{name}") };
                let path = format!("{}/{inside}", self.point);
                let failed = |e| CaptureError::proc(&path, e);
                let meta = fs::symlink_metadata(entry.path()).map_err(failed)?;
                let attributes =
                    Attributes { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() };
                let kind = if meta.is_file() {
                    let key = Key { class: Class::Tmpfs, device: self.device, inode: meta.ino() };
                    let open = || File::open(entry.path()).map_err(failed);
                    EntryKind::File(objects.number(key, &path, open)?)
                } else if meta.is_dir() {
                    todo.push(inside);
                    EntryKind::Directory
                } else if meta.is_symlink() {
                    let target = fs::read_link(entry.path()).map_err(failed)?;
                    EntryKind::Symlink(target.to_string_lossy().into_owned())
                } else if meta.file_type().is_fifo() {
                    EntryKind::Fifo
                } else if meta.file_type().is_socket() {
                    // The socket that is bound to it makes it.
                    continue;
                } else {
                    let why = "a device in the container's own tmpfs".to_owned();
                    return Err(CaptureError::unsupported(path, why));
                };
                all.push(TmpfsEntry { path, attributes, kind });
                if all.len() > MOST {
                    let why = format!("a tmpfs with more than {MOST} names");
                    return Err(CaptureError::unsupported(self.point.clone(), why));
                }
            }
        }
        Ok(())
    }
}

/// The tmpfs mounts that a tree with this root has and its host has not, outer ones first.
pub(super) fn own_mounts(root: i32) -> Result<Vec<TmpfsMount>, CaptureError> {
    let mounts = Mounts::find(root)?;
    let path = format!("/proc/{root}/mountinfo");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    let mut all = Vec::new();
    for mount in &mounts.all {
        let is_it = |line: &&str| line.split(' ').nth(4) == Some(&mount.point);
        // The last of several at one place is the one that is seen.
        let Some(line) = text.lines().rfind(is_it) else { continue };
        let meta = mount.directory.metadata().map_err(|e| CaptureError::proc(&mount.point, e))?;
        all.push(TmpfsMount {
            point: mount.point.clone(),
            options: line.split(' ').nth(5).unwrap_or_default().to_owned(),
            limits: limits(line.rsplit(' ').next().unwrap_or_default()),
            attributes: Attributes { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() },
        });
    }
    Ok(all)
}

/// What limits a tmpfs, among its options in mountinfo; see tmpfs(5).
fn limits(options: &str) -> String {
    let is_limit = |o: &&str| ["size=", "nr_inodes=", "huge="].iter().any(|l| o.starts_with(l));
    options.split(',').filter(is_limit).collect::<Vec<_>>().join(",")
}

/// Mount points and devices of file systems of a kind that a mountinfo has as a whole, see
/// proc_pid_mountinfo(5).
fn whole(kind: &str, mountinfo: &str) -> impl Iterator<Item = (String, u64)> {
    mounts(mountinfo).filter_map(move |mount| {
        let Line { kind: of, root, point, device, .. } = mount;
        (of == kind && root == "/").then(|| (point.to_owned(), device))
    })
}

/// The device of a root that [`crate::volume::Served::become_root`] has made.
fn root_layer(mountinfo: &str) -> Option<u64> {
    let is_ours = |m: &Line<'_>| (m.kind, m.source, m.point) == ("overlay", ROOT_SOURCE, "/");
    mounts(mountinfo).find(is_ours).map(|m| m.device)
}

/// What is mounted in the tree with this root, by path.
pub(super) fn mount_points(root: i32) -> Result<Vec<PathBuf>, CaptureError> {
    let path = format!("/proc/{root}/mountinfo");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    Ok(mounts(&text).map(|m| mount::plain(m.point)).collect())
}

/// Devices of file systems whose servers, or mount options, may say that reads pass the page cache by. We
/// serve ours through it.
fn uncached(mountinfo: &str) -> impl Iterator<Item = u64> {
    mounts(mountinfo).filter_map(|Line { kind, device, .. }| {
        let family = kind.split('.').next().unwrap_or_default();
        let passes = ["fuse", "fuseblk", "virtiofs", "9p", "cifs", "smb3"].contains(&family);
        (passes && kind != "fuse.nilicon").then_some(device)
    })
}

/// A line of a mountinfo.
struct Line<'a> {
    kind: &'a str,
    /// The directory of its file system that is mounted, and where.
    root: &'a str,
    point: &'a str,
    device: u64,
    source: &'a str,
}

fn mounts(mountinfo: &str) -> impl Iterator<Item = Line<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(2);
        let (major, minor) = fields.next()?.split_once(':')?;
        let (root, point) = (fields.next()?, fields.next()?);
        let device = major.parse::<u64>().ok()? << 32 | minor.parse::<u64>().ok()?;
        let mut right = right.split(' ');
        let (kind, source) = (right.next()?, right.next()?);
        Some(Line { kind, root, point, device, source })
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn tmpfs_mounts_of_a_mountinfo() {
        let text = "22 1 0:21 / /dev/shm rw,nosuid shared:3 - tmpfs tmpfs rw,size=65536k\n\
                    23 1 0:22 / /proc rw - proc proc rw\n\
                    24 1 0:21 /inner /bound rw - tmpfs tmpfs rw\n";
        assert_eq!(super::whole("tmpfs", text).collect::<Vec<_>>(), [("/dev/shm".to_owned(), 21)]);
    }

    #[test]
    fn a_root_of_ours_among_others() {
        let text = "21 1 0:40 / / rw - overlay overlay rw\n\
                    22 1 0:41 / / rw - overlay nilicon rw,lowerdir=/\n\
                    23 1 0:42 / /a rw - overlay nilicon rw\n";
        assert_eq!(super::root_layer(text), Some(41));
        assert_eq!(super::root_layer("21 1 0:40 / / rw - overlay overlay rw\n"), None);
    }

    #[test]
    fn file_systems_that_may_be_read_past_the_page_cache() {
        let text = "22 1 0:21 / /a rw - ext4 /dev/vda rw\n\
                    23 1 0:22 /part /b rw shared:3 - fuse.sshfs x rw\n\
                    24 1 0:23 / /c rw - fuse.nilicon data rw\n\
                    25 1 0:24 / /d rw - fusectl none rw\n\
                    26 1 0:25 / /e rw - 9p share rw\n";
        assert_eq!(super::uncached(text).collect::<Vec<_>>(), [22, 25]);
    }
}
