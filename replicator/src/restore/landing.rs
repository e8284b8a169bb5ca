//! Files that the container writes through a shared mapping. A spare holds their contents apart,
//! since the path may lead to the very file that the primary's container is writing (storage that
//! both hosts see). In the takeover they go to their paths, and the mappings follow.
//!
//! What is mapped of files in volumes ([`Mapping::is_late`]) comes last: they are there now, with what was landed in
//! them. Until then the pages that a process has written to its private ones were in memory in their place.
//!
//! Invariant: a spare touches no file at such a path before [`Spare::prepare`].

use super::error::{Doing, RestoreError};
use super::shared::{Held, failed, give};
use super::space::{self, Givers, Target};
use super::spare::{Spare, Stub};
use super::tree::outside;
use crate::image::object::{Attributes, Object, ObjectKind};
use crate::image::{Home, Mapping, Source};
use crate::sys::pagemap::Pagemap;
use crate::sys::{SysError, SysResult, mount};
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes compared at a time.
const BLOCK: usize = 64 << 10;

/// What to do with a file at the path that is not as the checkpoint has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum OnOther {
    /// It becomes what the checkpoint says: the container goes on from there.
    #[default]
    Overwrite,
    /// It stays, and the restore is refused: somebody has changed it since.
    Refuse,
}

impl Spare {
    /// A file that was changed since the checkpoint is not overwritten; [`Spare::prepare`] then
    /// refuses.
    pub fn keep_other_files(&mut self) {
        self.on_other = OnOther::Refuse;
    }

    /// Puts the files at their paths and maps them.
    pub(super) fn land(&mut self) -> Result<(), RestoreError> {
        self.land_objects()?;
        let Self { launched, state, stubs, script, .. } = self;
        let mut files = Files::default();
        for p in &state.processes {
            let Some(stub) = stubs.iter().find(|s| s.pid == p.pid) else { continue };
            let late: Vec<&Mapping> = p.mappings.iter().filter(|m| m.is_late()).collect();
            if late.is_empty() {
                continue;
            }
            for m in &late {
                files.open(launched.pid, m).doing(p.pid, "open a file that it maps")?;
            }
            let written = written(stub, &late).doing(p.pid, "read what it wrote")?;
            let target = Target { pid: stub.pid, host: stub.host, forced: &stub.forced };
            let parts: Vec<_> = late.iter().filter_map(|m| Some((*m, files.of(m)?))).collect();
            space::map_late(&target, script, launched.control(), &parts)?;
            for (start, bytes) in &written {
                stub.forced.write(*start, bytes).doing(p.pid, "write what it wrote")?;
            }
        }
        Ok(())
    }

    fn land_objects(&mut self) -> Result<(), RestoreError> {
        let Self { held, launched, state, stubs, script, on_other, .. } = self;
        let landed = held.land(launched.pid, *on_other)?;
        if landed.is_empty() {
            return Ok(());
        }
        let givers = Givers { held, channel: launched.control() };
        for p in &state.processes {
            let Some(stub) = stubs.iter().find(|s| s.pid == p.pid) else { continue };
            let target = Target { pid: stub.pid, host: stub.host, forced: &stub.forced };
            space::map_again(&target, script, &givers, &p.mappings, &landed)?;
        }
        Ok(())
    }
}

/// Files in volumes, each opened once.
#[derive(Default)]
struct Files(BTreeMap<(String, Home, bool), File>);

impl Files {
    fn open(&mut self, init: i32, m: &Mapping) -> SysResult<()> {
        let Source::File { path, home, writable, .. } = &m.source else { return Ok(()) };
        if self.of(m).is_none() {
            let file = find(&outside(init, path), *home, *writable);
            let file = file.map_err(|e| SysError { object: path.clone(), ..e })?;
            self.0.insert((path.clone(), *home, *writable), file);
        }
        Ok(())
    }

    fn of(&self, m: &Mapping) -> Option<&File> {
        let Source::File { path, home, writable, .. } = &m.source else { return None };
        self.0.get(&(path.clone(), *home, *writable))
    }
}

/// A file in a volume, which may have got another name since its path was read.
fn find(path: &str, home: Home, writable: bool) -> SysResult<File> {
    let there = File::options().read(true).write(writable).open(path);
    let Home::Volume(number) = home else {
        return there.map_err(|source| SysError { call: "open", object: path.into(), source });
    };
    let is_it = |f: &File| !is_fuse(f) || f.metadata().is_ok_and(|m| m.ino() == number);
    if let Ok(file) = there
        && is_it(&file)
    {
        return Ok(file);
    }
    let mut above = Path::new(path).ancestors().skip(1).filter_map(|d| File::open(d).ok());
    match above.find(is_fuse) {
        Some(directory) => {
            let flags = if writable { OFlag::O_RDWR } else { OFlag::O_RDONLY };
            mount::open_by_node(directory.as_fd(), number, flags).map(File::from)
        }
        None => Err(SysError::errno("open", path, libc::ENOENT)),
    }
}

fn is_fuse(file: &File) -> bool {
    nix::sys::statfs::fstatfs(file)
        .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::FUSE_SUPER_MAGIC)
}

/// Pages of its own that a process has in the place of these mappings.
fn written(stub: &Stub, mappings: &[&Mapping]) -> SysResult<Vec<(u64, Vec<u8>)>> {
    let is_private = |m: &&&Mapping| matches!(m.source, Source::File { shared: false, .. });
    let mut places = Vec::new();
    let pagemap = Pagemap::open(stub.host)?;
    for m in mappings.iter().filter(is_private) {
        pagemap.present(m.start, m.end, &mut places)?;
    }
    let read = |(start, end): (u64, u64)| {
        let mut bytes = vec![0; (end - start) as usize];
        stub.forced.read(start, &mut bytes).map(|()| (start, bytes))
    };
    places.into_iter().map(read).collect()
}

impl Held {
    /// Gives the numbers of the objects that are files at their paths now.
    fn land(&mut self, init: i32, on_other: OnOther) -> Result<Vec<u32>, RestoreError> {
        let mut landed = Vec::new();
        for (id, (object, held)) in &mut self.all {
            let ObjectKind::File { path, attributes } = &object.kind else { continue };
            let outside = outside(init, path);
            let there = open(&outside).doing(1, "open a mapped file")?;
            let file = match there {
                None => create(&outside, object, held, attributes),
                Some(file) => match (differ(held, &file, object.size), on_other) {
                    (Ok(false), _) => Ok(file),
                    (Ok(true), OnOther::Refuse) => {
                        return Err(RestoreError::Impossible {
                            pid: 1,
                            object: format!("the mapping of the file {path}"),
                            reason:
                                "the file was changed since the image was taken; move it away, \
                                     and it is made again from the image"
                                    .into(),
                        });
                    }
                    (Ok(true), OnOther::Overwrite) => {
                        write(held, &file, object.size).map(|()| file)
                    }
                    (Err(e), _) => Err(e),
                },
            };
            let file = file.map_err(|e| failed("bring back", object, e));
            *held = file.doing(1, "bring a mapped file back")?;
            landed.push(*id);
        }
        Ok(landed)
    }
}

/// The file at a path, for reading and writing, if there is one.
fn open(path: &str) -> SysResult<Option<File>> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysError { call: "open", object: path.to_owned(), source }),
    }
}

/// Makes a file that is not there; its directories, too, as its owner's.
fn create(path: &str, object: &Object, held: &File, a: &Attributes) -> io::Result<File> {
    let missing: Vec<&Path> =
        Path::new(path).ancestors().skip(1).take_while(|directory| !directory.exists()).collect();
    for directory in missing.into_iter().rev() {
        fs::create_dir(directory)?;
        std::os::unix::fs::chown(directory, Some(a.uid), Some(a.gid))?;
    }
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    write(held, &file, object.size)?;
    give(&file, a)?;
    Ok(file)
}

/// Whether two files differ, the first of which has this length.
fn differ(held: &File, file: &File, size: u64) -> io::Result<bool> {
    if file.metadata()?.len() != size {
        return Ok(true);
    }
    let mut different = false;
    compare(held, file, size, |_, _| {
        different = true;
        Ok(())
    })?;
    Ok(different)
}

/// Makes the second file like the first. What is alike already is not written.
fn write(held: &File, file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    compare(held, file, size, |at, block| file.write_all_at(block, at))
}

/// Gives `other` each block of the first file that is another in the second.
fn compare(
    held: &File,
    file: &File,
    size: u64,
    mut other: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut ours, mut theirs) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut at = 0;
    while at < size {
        let length = (size - at).min(BLOCK as u64) as usize;
        held.read_exact_at(&mut ours[..length], at)?;
        file.read_exact_at(&mut theirs[..length], at)?;
        if ours[..length] != theirs[..length] {
            other(at, &ours[..length])?;
        }
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        let dir = std::env::temp_dir().join(format!("nilicon-landing-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            fs::write(&path, bytes).expect("written");
            File::options().read(true).write(true).open(path).expect("opened")
        };
        let mut bytes = vec![7; 3 * BLOCK + 5];
        let held = file("held", &bytes);
        let same = file("same", &bytes);
        bytes[BLOCK + 1] = 1;
        bytes.extend([3; 100]);
        let other = file("other", &bytes);
        let size = held.metadata().expect("there").len();
        assert!(!differ(&held, &same, size).expect("read"));
        assert!(differ(&held, &other, size).expect("read"));
        let mut blocks = Vec::new();
        let mut note = |at, _: &[u8]| {
            blocks.push(at);
            Ok(())
        };
        compare(&held, &other, size, &mut note).expect("read");
        assert_eq!(blocks, [BLOCK as u64]);
        write(&held, &other, size).expect("written");
        assert!(!differ(&held, &other, size).expect("read"));
        fs::remove_dir_all(dir).expect("removed");
    }
}
