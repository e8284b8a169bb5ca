//! Directories that are open. Each is read as it was when it was read from the start, so that a
//! place in it means the same however names come and go meanwhile.

use crate::volume::{Found, Ino, Volume};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The directories of one volume that the kernel has open, by its handles of them.
#[derive(Debug)]
pub(super) struct Listings {
    volume: Arc<Volume>,
    open: Mutex<HashMap<u64, Arc<Vec<OsString>>>>,
    next: AtomicU64,
}

impl Listings {
    pub(super) fn of(volume: &Arc<Volume>) -> Self {
        let (open, next) = Default::default();
        Self { volume: volume.clone(), open, next }
    }

    /// A new handle.
    pub(super) fn next(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The kernel has closed it.
    pub(super) fn close(&self, handle: u64) {
        self.open().remove(&handle);
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Vec<OsString>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names in a directory, as they were when it was read from the start.
    fn names(&self, directory: Ino, handle: u64, offset: u64) -> io::Result<Arc<Vec<OsString>>> {
        let mut listings = self.open();
        if offset > 0
            && let Some(names) = listings.get(&handle)
        {
            return Ok(names.clone());
        }
        let names = Arc::new(self.volume.names_in(directory)?);
        listings.insert(handle, names.clone());
        Ok(names)
    }

    /// What follows `offset` in a directory; `put` is given each entry with the offset behind it,
    /// and says whether there is no room. Offset 0 is ".", 1 is "..", the rest are the names. An
    /// entry of which nothing can be told ends the list; the error is the next list's, so that
    /// the kernel has heard of all that count as looked up.
    pub(super) fn list(
        &self,
        directory: Ino,
        handle: u64,
        offset: u64,
        remember: bool,
        mut put: impl FnMut(&OsStr, u64, &Found) -> bool,
    ) -> io::Result<()> {
        let names = self.names(directory, handle, offset)?;
        let mut is_empty = true;
        for at in offset.. {
            let (name, looked_up) = match at {
                0 => (OsStr::new("."), self.volume.stat(directory)),
                1 => (OsStr::new(".."), self.volume.stat(self.volume.parent(directory))),
                _ => {
                    let Some(name) = names.get(at as usize - 2) else { break };
                    (name.as_os_str(), self.volume.lookup(directory, name, remember))
                }
            };
            let found = match looked_up {
                Ok(found) => found,
                // Gone meanwhile.
                Err(e) if at > 1 && e.kind() == io::ErrorKind::NotFound => continue,
                Err(_) if !is_empty => break,
                Err(e) => return Err(e),
            };
            if put(name, at + 1, &found) {
                // The kernel does not hear of this one.
                if remember && at > 1 {
                    self.volume.forget(found.ino, 1)?;
                }
                break;
            }
            is_empty = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::tests::Scratch;
    use crate::volume::{Shape, Volumes};

    /// What a list says: all names, and how it ends.
    fn listed(listings: &Listings, offset: u64, room: usize) -> (Vec<String>, io::Result<()>) {
        let mut all = Vec::new();
        let end = listings.list(Ino::ROOT, 7, offset, true, |name, _, _| {
            let is_full = all.len() == room;
            if !is_full {
                all.push(name.to_string_lossy().into_owned());
            }
            is_full
        });
        (all, end)
    }

    #[test]
    fn an_entry_that_cannot_be_looked_up_is_an_error_of_its_own() {
        let base = Scratch::new();
        let volumes = Volumes::open(&base.0, &["data".to_owned()], false).expect("opened");
        let volume = &volumes.list()[0];
        let mut files = Vec::new();
        for name in ["a", "b", "c"] {
            let (root, shape) = (Ino::ROOT, Shape::File);
            let made = volume.make(root, OsStr::new(name), &shape, 0o600, (0, 0), false);
            files.push(made.expect("made").ino);
        }
        let listings = Listings::of(volume);
        assert_eq!(listed(&listings, 0, 9).0, [".", "..", "a", "b", "c"]);
        // Nobody but the volume changes its files; a lookup that fails is made here by one who does.
        let place = base.0.join("data/tree");
        std::fs::rename(&place, base.0.join("elsewhere")).expect("moved");
        std::fs::write(&place, "no directory").expect("written");
        let (names, end) = listed(&listings, 2, 9);
        assert_eq!(names, [""; 0]);
        assert_eq!(end.expect_err("it cannot be told").raw_os_error(), Some(libc::ENOTDIR));
        std::fs::remove_file(&place).expect("removed");
        std::fs::rename(base.0.join("elsewhere"), &place).expect("moved");
        // What did not fit is not remembered: without a name the file is gone.
        assert_eq!(listed(&listings, 2, 1).0, ["a"]);
        for (ino, name) in files.iter().zip(["a", "b", "c"]) {
            volume.unlink(Ino::ROOT, OsStr::new(name), false).expect("unlinked");
            let times = if name == "a" { 2 } else { 1 };
            volume.forget(*ino, times).expect("forgotten");
        }
        assert_eq!(volume.loose(), []);
    }
}
