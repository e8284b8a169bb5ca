//! Directories that nobody changes, such as the layers of an image: they do not travel, but protection
//! begins only if they are the same on both hosts.
//!
//! ```text
//!  primary: look ─► the first checkpoint says what is there
//!  backup:  look ─► compare, before the checkpoint is kept ─► the first difference, by name
//! ```
//! Invariant: no checkpoint is acknowledged that came with a list which this host does not match.
//! Compared are names, kinds, modes, owners, contents, extended attributes, and the times of change of
//! all but directories (servers of files tell them to clients).

use super::compare::{Listing, Seen, contents, first_difference};
use super::disk::{Disk, Shape};
use super::{Ino, VolumeError};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Stands where the part of a volume has its place in the list.
const MARK: [u8; 2] = [0xff; 2];

/// Names in all directories at most.
const MOST: usize = 1 << 20;

/// Directories of this host that nobody changes.
#[derive(Debug)]
pub struct ReadOnly {
    paths: Vec<PathBuf>,
    seen: Mutex<Option<Arc<Vec<Listing>>>>,
}

impl ReadOnly {
    /// Those at these paths; nothing is read yet.
    pub fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, seen: Mutex::default() }
    }

    /// Reads all of them.
    pub fn look(&self) -> Result<(), VolumeError> {
        let mut seen = self.seen();
        *seen = None;
        *seen = Some(self.read()?);
        Ok(())
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Option<Arc<Vec<Listing>>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<Arc<Vec<Listing>>, VolumeError> {
        let mut names = 0;
        let read = |path: &PathBuf| {
            let disk = Disk::new(path);
            list(&disk, &mut names).map_err(disk.failed("reading a directory that nobody changes"))
        };
        self.paths.iter().map(read).collect::<Result<_, _>>().map(Arc::new)
    }

    /// What is there, for a checkpoint.
    pub(super) fn write_down(&self, out: &mut Vec<u8>) {
        let seen = self.seen();
        // All that was read can be encoded.
        let bytes = seen.as_ref().map(|all| postcard::to_stdvec(&by_name(&self.paths, all)));
        let bytes = bytes.and_then(Result::ok).unwrap_or_default();
        out.extend_from_slice(&MARK);
        out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(&bytes);
    }

    /// Compares what is here with what the primary has. After a difference it is read again at the
    /// next try: somebody may have mended it.
    pub(super) fn compare(&self, told: &[u8]) -> Result<(), VolumeError> {
        let mut seen = self.seen();
        let here = match seen.take() {
            Some(here) => here,
            None => self.read()?,
        };
        let differs = |at: &Path, first: String| VolumeError::Differs { at: at.to_owned(), first };
        let root = Path::new("/");
        let there: Vec<(OsString, Vec<(OsString, Seen)>)> = postcard::from_bytes(told)
            .map_err(|e| differs(root, format!("the other host's list cannot be read: {e}")))?;
        if !there.iter().map(|(path, _)| path).eq(self.paths.iter().map(|p| p.as_os_str())) {
            let paths: Vec<_> = there.iter().map(|(path, _)| path).collect();
            let first = format!("there they are {paths:?}, here {:?}", self.paths);
            return Err(differs(root, first));
        }
        for ((path, ours), (_, theirs)) in self.paths.iter().zip(&*here).zip(there) {
            let theirs = theirs.into_iter().map(|(name, seen)| (name.into(), seen)).collect();
            let (backup, primary) = ((ours, "the backup's"), (&theirs, "the primary's"));
            if let Some(first) = first_difference(backup, primary) {
                return Err(differs(path, first));
            }
        }
        *seen = Some(here);
        Ok(())
    }
}

/// Names as bytes: not all of them are UTF-8.
type ByName<'a> = Vec<(&'a OsStr, Vec<(&'a OsStr, &'a Seen)>)>;

fn by_name<'a>(paths: &'a [PathBuf], all: &'a [Listing]) -> ByName<'a> {
    let names =
        |one: &'a Listing| one.iter().map(|(name, seen)| (name.as_os_str(), seen)).collect();
    paths.iter().zip(all).map(|(path, one)| (path.as_os_str(), names(one))).collect()
}

/// All that is in a directory, as it is compared.
fn list(disk: &Disk, names: &mut usize) -> io::Result<Listing> {
    let mut all = Listing::new();
    let mut todo = vec![PathBuf::new()];
    let device = device_of(disk, Path::new(""))?;
    while let Some(path) = todo.pop() {
        let failed =
            |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", disk.at(&path).display()));
        *names += 1;
        if *names > MOST {
            return Err(io::Error::other(format!("there are more than {MOST} names")));
        }
        // The container does not see what is mounted there.
        if device_of(disk, &path).map_err(failed)? != device {
            let why = "another file system is mounted there; name it as a volume of its own";
            return Err(failed(io::Error::other(why)));
        }
        let mut node = disk.node(&path, Ino(0)).map_err(failed)?;
        node.attributes.atime = (0, 0);
        if node.shape == Shape::Directory {
            node.attributes.mtime = (0, 0);
        }
        let digest = contents(disk, &path, &path, &node, &mut todo).map_err(failed)?;
        all.insert(path, (node, digest));
    }
    Ok(all)
}

fn device_of(disk: &Disk, path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    disk.meta(path).map(|meta| meta.dev())
}

/// What a checkpoint says of directories that nobody changes, and what stands behind it.
pub(super) fn behind(payload: &[u8]) -> Result<(Option<&[u8]>, &[u8]), &'static str> {
    let Some(rest) = payload.strip_prefix(&MARK) else { return Ok((None, payload)) };
    let (len, rest) = rest.split_first_chunk::<8>().ok_or("its list is cut short")?;
    let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| "its list is too long")?;
    let (list, rest) = rest.split_at_checked(len).ok_or("its list is cut short")?;
    Ok((Some(list), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Journals, Volumes};
    use crate::{Epoch, Generation};
    use std::fs;
    use std::os::unix::ffi::OsStrExt;

    fn both(dir: &Path) -> [PathBuf; 2] {
        ["here", "there"].map(|name| {
            let at = dir.join(name);
            fs::create_dir_all(at.join("lib")).expect("made");
            fs::write(at.join("lib/a.so"), "a").expect("made");
            fs::write(at.join("z"), "z").expect("made");
            let name = OsStr::from_bytes(b"no \xff text");
            let _ = fs::remove_file(at.join(name));
            std::os::unix::fs::symlink("z", at.join(name)).expect("made");
            [OsStr::new("z"), OsStr::new("lib/a.so"), name]
                .iter()
                .for_each(|name| age(&at.join(name)));
            at
        })
    }

    /// Makes a file one that was written long ago, also if it is a link.
    fn age(path: &Path) {
        let time = nix::sys::time::TimeSpec::new(1, 0);
        let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, flags).expect("set");
    }

    /// What a first checkpoint says of a directory, as if it were at `named`.
    fn told(at: &Path, named: &Path) -> Vec<u8> {
        let mut me = ReadOnly::new(vec![at.to_owned()]);
        me.look().expect("it can be read");
        me.paths = vec![named.to_owned()];
        let mut out = Vec::new();
        me.write_down(&mut out);
        out
    }

    /// VO-12
    #[test]
    fn a_difference_is_refused_with_the_first_name_until_it_is_mended() {
        let dir = crate::volume::tests::Scratch::new();
        let [here, there] = both(&dir.0);
        let journals = Journals::new(&dir.0.join("kept"), &[], false)
            .with_read_only(Some(Arc::new(ReadOnly::new(vec![there.clone()]))));
        let keep = |payload: &[u8]| journals.keep(Generation::FIRST, Epoch(1), payload);
        keep(&told(&here, &there)).expect("they are the same");
        let refused = |change: &dyn Fn(), first: &str| {
            change();
            let journals = Journals::new(&dir.0.join("kept"), &[], false)
                .with_read_only(Some(Arc::new(ReadOnly::new(vec![there.clone()]))));
            let keep = || journals.keep(Generation::FIRST, Epoch(1), &told(&here, &there));
            let error = keep().expect_err("they are not the same").to_string();
            assert!(error.contains(first), "{error}");
            assert!(error.contains(&there.display().to_string()), "{error}");
            fs::remove_dir_all(&there).expect("removed");
            both(&dir.0);
            keep().expect("it was mended");
        };
        let put = |name: &str, what: &str| {
            fs::write(there.join(name), what).expect("written");
            age(&there.join(name));
        };
        refused(&|| put("lib/a.so", "b"), "/lib/a.so: other contents");
        refused(&|| put("lib/b.so", "b"), "/lib/b.so is only in the backup's");
        refused(&|| fs::remove_file(there.join("z")).expect("gone"), "/z is only in the primary's");
        refused(&|| fs::write(there.join("z"), "z").expect("written"), "/z: time of change");
        let mode = || {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(there.join("lib"), fs::Permissions::from_mode(0o700)).expect("set");
        };
        refused(&mode, "/lib: mode");
        let error = Journals::new(&dir.0, &[], false).keep(
            Generation::FIRST,
            Epoch(1),
            &told(&here, &there),
        );
        let error = error.expect_err("it has none").to_string();
        assert!(error.contains("this side's topology has none"), "{error}");
    }

    #[test]
    fn the_list_comes_with_the_first_checkpoint_and_changes_no_volume() {
        let dir = crate::volume::tests::Scratch::new();
        let [here, _] = both(&dir.0);
        let read_only = Arc::new(ReadOnly::new(vec![here]));
        read_only.look().expect("it can be read");
        let open = |name: &str| {
            Volumes::open(&dir.0.join(name), &["data".into()], false).expect("it opens")
        };
        let primary = open("primary").with_read_only(Some(read_only));
        let mut first = Vec::new();
        primary.begin_full();
        primary.seal().expect("sealed");
        primary.take(&mut first);
        assert!(behind(&first).expect("whole").0.is_some());
        for cut in [1, 5, 11, 40] {
            assert!(behind(&first[..first.len().min(cut)]).is_err() || cut < 2, "{cut}");
        }
        open("backup").commit(Generation::FIRST, Epoch(1), &first).expect("carried out");
        let mut second = Vec::new();
        primary.seal().expect("sealed");
        primary.take(&mut second);
        assert!(second.is_empty(), "it is said once");
    }

    #[test]
    fn what_cannot_be_compared_is_told() {
        let missing = ReadOnly::new(vec!["/nowhere/at/all".into()]);
        let error = missing.look().expect_err("it is not there").to_string();
        assert!(error.contains("/nowhere/at/all"), "{error}");
    }
}
