//! /proc/PID/maps as mappings of the image.

use super::memory::is_scratch;
use super::objects::{Class, Key};
use crate::image::{Home, Mapping, Source, VdsoPart};
use crate::sys::procmap::Extent;
use crate::sys::{SysError, SysResult, file_range};
use crate::volume::{Ino, Known, UPPER};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{fstat, major, minor};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

/// What the kernel puts behind the path of a file that was deleted.
const DELETED: &str = " (deleted)";
/// Length of a file that is copied as memory. It is read whole when the kernel says that anything
/// of it has changed.
const LARGEST_FILE: u64 = 256 << 20;

/// The device (major above minor) of the kernel's own tmpfs, where memfds, shared anonymous memory
/// and System V segments are.
pub(super) fn kernel_tmpfs() -> Option<u64> {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let memfd = memfd_create("nilicon", MFdFlags::MFD_CLOEXEC).ok()?;
        fstat(&memfd).ok().map(|s| major(s.st_dev) << 32 | minor(s.st_dev))
    })
}

/// What there is to know of the container's file systems to tell what is mapped. Devices are major above minor.
#[derive(Debug, Default)]
pub(super) struct FileSystems {
    /// Its own tmpfs mounts.
    pub(super) own: Vec<u64>,
    /// Its volumes.
    pub(super) served: Vec<Known>,
    /// A root that is an overlay, and the volume that its upper layer is in.
    pub(super) layer: Option<(u64, Known)>,
    /// Files of these that may be written through mappings, open to have them written back.
    written: BTreeMap<Mapped, File>,
}

/// A file of a volume: the device, that of an overlay if it is in one, and the file's number.
pub(super) type Mapped = (u64, u64);

impl FileSystems {
    /// Its tmpfs mounts; of volumes nothing is known yet.
    pub(super) fn new(own: Vec<u64>) -> Self {
        Self { own, ..Self::default() }
    }

    /// Whether a file that is mapped has got another name, or has none any more, since this was asked last.
    pub(super) fn take_moved(&self) -> bool {
        let all = self.served.iter().chain(self.layer.iter().map(|(_, known)| known));
        all.fold(false, |moved, known| moved | known.volume.take_moved())
    }

    /// The volume that a file is in whose mapping is of this device.
    fn volume(&self, device: u64) -> Option<&Known> {
        let in_layer = || self.layer.as_ref().filter(|l| l.0 == device).map(|(_, known)| known);
        self.served.iter().find(|v| v.device == device).or_else(in_layer)
    }

    /// Has what was stored through mappings of these files written to their volumes. That costs a system call for a
    /// file where nothing was. sync_file_range(2)
    pub(super) fn write_back(&mut self, files: &BTreeSet<Mapped>) -> SysResult<()> {
        self.written.retain(|file, _| files.contains(file));
        for file in files {
            if !self.written.contains_key(file) {
                let Some(known) = self.volume(file.0) else { continue };
                match known.open(Ino(file.1)) {
                    Ok(opened) => self.written.insert(*file, opened),
                    // Nobody has it any more, so nobody has it mapped.
                    Err(e) if e.code() == libc::ESTALE => continue,
                    Err(e) => return Err(e),
                };
            }
            file_range::write_back(&self.written[file])?;
        }
        Ok(())
    }
}

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub(super) mapping: Mapping,
    /// Why it cannot be part of a checkpoint, if so.
    pub(super) refused: Option<&'static str>,
    vsyscall: bool,
    /// The device of the file that it maps, major above minor.
    pub(super) device: u64,
    /// The object that it maps, whose number in `mapping` is not known by reading alone.
    pub(super) object: Option<Object>,
    /// The file that is mapped shared, as the object that it is if it may be written.
    file: Option<Object>,
}

/// An object by what its mapping tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) key: Key,
    /// Path or name, without "(deleted)".
    pub(super) name: String,
}

impl Vma {
    /// Whether its pages can be written and so must be watched.
    pub(super) fn is_trackable(&self) -> bool {
        // What a mapping shows of a volume's file is the volume's.
        let is_left_to_volume = self.mapping.is_late() && self.is_shared_file();
        !self.vsyscall
            && !is_left_to_volume
            && !matches!(self.mapping.source, Source::Vdso(_))
            && !is_scratch(self.mapping.start, self.mapping.end)
    }

    /// The file that may be written through it and is written back at each stop.
    pub(super) fn written_back(&self) -> Option<Mapped> {
        match self.mapping.source {
            Source::File {
                home: Home::Volume(number) | Home::Root(number),
                writable: true,
                ..
            } => Some((self.device, number)),
            _ => None,
        }
    }

    /// Whether a checkpoint has it.
    pub(super) fn is_part_of_image(&self) -> bool {
        !self.vsyscall && !is_scratch(self.mapping.start, self.mapping.end)
    }

    /// The object's number and the offset in it, if its pages are the object's.
    pub(super) fn shared_object(&self) -> Option<(u32, u64)> {
        match self.mapping.source {
            Source::Object { id, offset, shared: true } => Some((id, offset)),
            _ => None,
        }
    }

    /// Makes a shared mapping through which a file may be written, now or after mprotect(2), one
    /// of an object, unless the file is none whose contents can be copied. One of a volume that is not written
    /// through at present is left to the volume, and so is one of a large file.
    pub(super) fn look_at_file(&mut self, pid: i32) {
        let Some(object) = self.file.take() else { return };
        let Mapping { start, end, .. } = self.mapping;
        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        // The link's own mode says how the file was opened.
        let writable = fs::symlink_metadata(&path).is_ok_and(|m| m.mode() & libc::S_IWUSR != 0);
        if !writable && self.mapping.prot & 2 == 0 {
            return;
        }
        if self.mapping.is_late() && self.mapping.prot & 2 == 0 {
            return self.leave_to_volume();
        }
        // What was said of a file that is only read is not so of an object.
        self.refused = None;
        match fs::metadata(&path) {
            Ok(meta) if self.mapping.is_late() && meta.len() > LARGEST_FILE => {
                self.leave_to_volume();
            }
            Ok(meta) if !meta.is_file() => {
                self.refused = Some("a device mapped shared and writable");
            }
            Ok(meta) if meta.len() > LARGEST_FILE => {
                self.refused = Some(
                    "a file of more than 256 MiB mapped shared and writable; keep it in a replicated \
                     volume, or in the container's /dev/shm",
                );
            }
            // If it is gone already, taking its pages says so.
            _ => {
                if let Source::File { offset, .. } = self.mapping.source {
                    self.mapping.source = Source::Object { id: u32::MAX, offset, shared: true };
                    self.object = Some(object);
                }
            }
        }
    }

    fn leave_to_volume(&mut self) {
        if let Source::File { writable, .. } = &mut self.mapping.source {
            *writable = true;
        }
    }

    /// Takes over where its file is from the mapping that was in this place before, if that was of the same file.
    pub(super) fn keep_home(&mut self, before: &[Self]) -> bool {
        let at = before.partition_point(|b| b.mapping.end <= self.mapping.start);
        let Some(known) = before.get(at).filter(|b| b.mapping.start < self.mapping.end) else {
            return false;
        };
        match (&mut self.mapping.source, &known.mapping.source) {
            (
                Source::File { path, shared: false, home, .. },
                Source::File { path: was, shared: false, home: known_home, .. },
            ) if path == was => {
                // The kernel tells which file of a volume it is.
                if matches!(home, Home::Volume(_)) {
                    return home == known_home;
                }
                *home = *known_home;
                self.refused = self.refused.or(known.refused);
                true
            }
            _ => false,
        }
    }

    /// Finds out where a file is whose mapping is new. What the lower layer of a root has, a spare has as
    /// well, also when the file is copied up later: who has mapped it goes on with what was there. So of one that
    /// was copied up already it cannot be told.
    pub(super) fn find_home(&mut self, systems: &FileSystems) {
        let Some(Known { volume, .. }) = systems.volume(self.device) else { return };
        if let Source::File { home: Home::Volume(number), .. } = self.mapping.source {
            return volume.note(Ino(number));
        }
        let Source::File { path, home, .. } = &mut self.mapping.source else { return };
        let above = Path::new(UPPER).join(path.trim_start_matches('/'));
        let Some(ino) = volume.file_at(&above) else { return };
        // An overlay says so of what it has copied up, also if it cannot say which file it was (ovl_set_origin
        // in fs/overlayfs/copy_up.c).
        match volume.get_xattr(ino, OsStr::new("trusted.overlay.origin")) {
            Ok(_) => {
                self.refused = Some(
                    "a file of the host that was written to, mapped to be read or privately; put a \
                     new file in its place (under another name, then rename it)",
                );
            }
            Err(_) => {
                volume.note(ino);
                *home = Home::Root(ino.0);
            }
        }
    }

    /// Whether one of the same place was of a file, and this is of what is left of it: what a process has written to it
    /// a spare cannot keep.
    pub(super) fn is_nameless_now(&self, before: &[Self]) -> bool {
        let is_object = matches!(self.mapping.source, Source::Object { shared: false, .. });
        let at = before.partition_point(|b| b.mapping.end <= self.mapping.start);
        let was = |b: &Self| {
            b.mapping.start < self.mapping.end && matches!(b.mapping.source, Source::File { .. })
        };
        is_object && before.get(at).is_some_and(was)
    }

    pub(super) fn is_shared_file(&self) -> bool {
        use Source::{File, Object};
        matches!(self.mapping.source, File { shared: true, .. } | Object { shared: true, .. })
    }
}

/// Reads all mappings of a process. The rest is for [`Vma::find_home`], and then for [`Vma::look_at_file`].
pub(super) fn read(pid: i32, systems: &FileSystems) -> SysResult<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read(&path).map_err(|source| SysError {
        call: "read",
        object: path.clone(),
        source,
    })?;
    let text = String::from_utf8_lossy(&text);
    let mut all = Vec::new();
    for line in text.lines() {
        let vma = parse(line, systems);
        all.push(vma.ok_or_else(|| SysError::errno("parse", path.clone(), libc::EINVAL))?);
    }
    Ok(all)
}

/// Whether two ways of asking for the mappings gave the same answer.
pub(super) fn agree(vmas: &[Vma], extents: &[Extent]) -> bool {
    // The page of vsyscall is the same everywhere and belongs to no process.
    let mut vmas = vmas.iter().filter(|v| !v.vsyscall);
    let mut extents = extents.iter();
    loop {
        match (vmas.next(), extents.next()) {
            (Some(vma), Some(extent)) => {
                let Mapping { start, end, prot, .. } = vma.mapping;
                if (start, end, u64::from(prot)) != (extent.start, extent.end, extent.flags & 7) {
                    return false;
                }
            }
            (None, None) => return true,
            _ => return false,
        }
    }
}

fn parse(line: &str, systems: &FileSystems) -> Option<Vma> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode: u64 = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim_start();
    let prot = u8::from(rights[0] == b'r')
        | u8::from(rights[1] == b'w') << 1
        | u8::from(rights[2] == b'x') << 2;
    let shared = rights[3] == b's';
    let (mut refused, mut file) = (None, None);
    let number = |hex| u64::from_str_radix(hex, 16).ok();
    let device = number(major)? << 32 | number(minor)?;
    let object = object(name, device, inode, shared, &systems.own);
    let source = match name {
        "[vdso]" => Source::Vdso(VdsoPart::Vdso),
        "[vvar]" => Source::Vdso(VdsoPart::Vvar),
        "[vvar_vclock]" => Source::Vdso(VdsoPart::VvarVclock),
        _ if object.is_some() => Source::Object { id: u32::MAX, offset, shared },
        _ if inode != 0 || name.starts_with('/') => {
            refused = why_refused(name);
            if shared && refused.is_none() {
                let key = Key { class: Class::File, device, inode };
                file = Some(Object { key, name: unescape(name) });
            }
            let home = match systems.served.iter().any(|v| v.device == device) {
                true => Home::Volume(inode),
                false => Home::Host,
            };
            Source::File { path: unescape(name), offset, shared, home, writable: false }
        }
        _ => Source::Anonymous,
    };
    Some(Vma {
        mapping: Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            prot,
            grows_down: name == "[stack]",
            source,
            fresh: false,
        },
        refused,
        vsyscall: name == "[vsyscall]",
        device,
        object,
        file,
    })
}

/// The object that a mapping of this name is a part of, if it is an object that can be captured.
fn object(name: &str, device: u64, inode: u64, shared: bool, own: &[u64]) -> Option<Object> {
    if own.contains(&device) {
        let key = Key { class: Class::Tmpfs, device, inode };
        return Some(Object { key, name: unescape(name.trim_end_matches(DELETED)) });
    }
    let name = name.strip_suffix(DELETED)?;
    let class = match name {
        "/dev/zero" if shared => Class::Anonymous,
        "/[aio]" | "/anon_hugepage" => return None,
        _ if name.starts_with("/SYSV") && Some(device) == kernel_tmpfs() => Class::SystemV,
        _ if name.starts_with("/SYSV") => return None,
        _ if name.starts_with("/memfd:") && Some(device) == kernel_tmpfs() => Class::Memfd,
        _ if name.starts_with("/memfd:") => return None,
        _ => Class::Deleted,
    };
    Some(Object { key: Key { class, device, inode }, name: unescape(name) })
}

/// Why a mapping of a file cannot be part of a checkpoint, if so.
fn why_refused(name: &str) -> Option<&'static str> {
    match name.strip_suffix(DELETED) {
        Some("/[aio]") => Some(
            "an asynchronous I/O context (io_setup); let the program use threads or plain calls",
        ),
        Some("/anon_hugepage") => {
            Some("huge pages that it reserved (MAP_HUGETLB); transparent ones work")
        }
        Some(n) if n.starts_with("/SYSV") => {
            Some("a System V segment of huge pages (SHM_HUGETLB); plain pages work")
        }
        Some(n) if n.starts_with("/memfd:") => {
            Some("a memfd of huge pages (MFD_HUGETLB); plain pages work")
        }
        _ if !name.starts_with('/') => {
            Some("memory of a kernel object (io_uring, perf, a socket); run it without")
        }
        _ => None,
    }
}

/// The kernel writes a line feed in a path as \012.
fn unescape(path: &str) -> String {
    path.replace("\\012", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let v = parse(
            "55d0c000-55d0d000 r-xp 00001000 fd:00 1234                       /usr/bin/x",
            &FileSystems::default(),
        )
        .expect("a file");
        assert_eq!((v.mapping.start, v.mapping.end, v.mapping.prot), (0x55d0c000, 0x55d0d000, 5));
        assert!(
            matches!(v.mapping.source, Source::File { ref path, offset: 0x1000, shared: false, home: Home::Host, writable: false } if path == "/usr/bin/x")
        );
        let v = parse(
            "7ffd0000-7ffd2000 rw-p 00000000 00:00 0                          [stack]",
            &FileSystems::default(),
        )
        .expect("a stack");
        assert!(v.mapping.grows_down && v.mapping.source == Source::Anonymous);
        let v =
            parse("7000-8000 rw-s 00000000 00:01 55   /memfd:x (deleted)", &FileSystems::default())
                .expect("memfd");
        let object = v.object.expect("an object");
        assert_eq!((object.key.class, object.key.inode), (Class::Memfd, 55));
        assert_eq!(object.name, "/memfd:x");
        let refused = |name: &str| {
            parse(&format!("7000-8000 rw-s 00000000 00:01 0   {name}"), &FileSystems::default())
                .and_then(|v| v.refused)
        };
        assert!(refused("/dev/zero (deleted)").is_none());
        assert!(parse("garbage", &FileSystems::default()).is_none());
    }

    #[test]
    fn a_mapping_keeps_its_home_while_it_is_of_the_same_file() {
        let vma = |line: &str, at: Home| {
            let mut vma = parse(line, &FileSystems::default()).expect("a mapping");
            if let Source::File { home, .. } = &mut vma.mapping.source {
                *home = at;
            }
            vma
        };
        let home = |v: &Vma| match v.mapping.source {
            Source::File { home, .. } => home,
            _ => panic!("no file"),
        };
        let before = [vma("7000-9000 r--p 00000000 00:05 12   /lib", Home::Root(3))];
        // A part of it, after mprotect(2), and what is not of it.
        let mut part = vma("8000-9000 rw-p 00001000 00:05 12   /lib", Home::Host);
        assert!(part.keep_home(&before));
        assert_eq!(home(&part), Home::Root(3));
        for other in [
            "8000-9000 rw-p 00001000 00:05 12   /other",
            "9000-a000 rw-p 00001000 00:05 12   /lib",
            "8000-9000 r--s 00001000 00:05 12   /lib",
        ] {
            let mut other = vma(other, Home::Host);
            assert!(!other.keep_home(&before));
            assert_eq!(home(&other), Home::Host);
        }
        // The kernel says itself which file of a volume it is.
        let line = "7000-9000 r--p 00000000 00:07 12   /v/lib";
        let before = [vma(line, Home::Volume(12))];
        assert!(vma(line, Home::Volume(12)).keep_home(&before));
        let mut other = vma(line, Home::Volume(13));
        assert!(!other.keep_home(&before));
        assert_eq!(home(&other), Home::Volume(13));
    }

    #[test]
    fn what_is_left_of_a_file_without_a_name_is_new() {
        let vma = |line: &str| parse(line, &FileSystems::default()).expect("a mapping");
        let before = [vma("7000-9000 r--p 00000000 00:05 12   /lib")];
        let gone = vma("7000-8000 r--p 00000000 00:05 12   /lib (deleted)");
        assert!(gone.is_nameless_now(&before));
        assert!(!gone.is_nameless_now(std::slice::from_ref(&gone)), "it was so before");
        assert!(!before[0].is_nameless_now(&before), "it has its name");
        let beside = vma("9000-a000 r--p 00002000 00:05 12   /lib (deleted)");
        assert!(!beside.is_nameless_now(&before));
        let shared = vma("7000-8000 r--s 00000000 00:05 12   /lib (deleted)");
        assert!(!shared.is_nameless_now(&before), "its pages are the object's");
    }

    #[test]
    fn a_mapping_that_grew_between_two_looks_shows() {
        let text = ["1000-3000 rw-p 00000000 00:00 0", "3000-9000 ---p 00000000 00:00 0"];
        let vmas: Vec<Vma> =
            text.iter().filter_map(|line| parse(line, &FileSystems::default())).collect();
        let extent =
            |start, end, flags| Extent { start, end, flags, offset: 0, inode: 0, watcher: 0 };
        assert!(agree(&vmas, &[extent(0x1000, 0x3000, 3), extent(0x3000, 0x9000, 0)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x4000, 3), extent(0x4000, 0x9000, 0)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x3000, 3), extent(0x3000, 0x9000, 1)]));
        assert!(!agree(&vmas, &[extent(0x1000, 0x3000, 3)]));
    }
}
