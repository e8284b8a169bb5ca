//! Files of the host that answer requests. The kernel does not tell who opens or closes a file (see
//! [`super::requests`]), so one is opened when it is first read or written, and stays open while there is room.
//!
//! Invariant: what is here is the file that has the number now. A number is given away again to no other file, and
//! the kernel forgets a number before the file is removed.

use crate::volume::{Ino, Opened, Volume};
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Files that are kept open of one volume.
const MOST: usize = 256;

/// Files that are open, with when each was last asked for.
#[derive(Debug, Default)]
pub(super) struct Files(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    open: HashMap<Ino, (Opened, u64)>,
    now: u64,
}

impl Files {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file, opened if it is not.
    pub(super) fn get(&self, volume: &Volume, ino: Ino) -> io::Result<Opened> {
        if let Some(opened) = self.kept().find(ino) {
            return Ok(opened);
        }
        // Opened with the lock released: a disk may take its time. Of two that open the same, one is dropped.
        let opened = volume.open_file(ino)?;
        self.kept().keep(&opened);
        Ok(opened)
    }

    /// The kernel has forgotten a file, which may be removed now.
    pub(super) fn close(&self, ino: Ino) {
        self.kept().open.remove(&ino);
    }
}

impl Kept {
    fn find(&mut self, ino: Ino) -> Option<Opened> {
        self.now += 1;
        let (opened, used) = self.open.get_mut(&ino)?;
        *used = self.now;
        Some(opened.clone())
    }

    fn keep(&mut self, opened: &Opened) {
        if self.open.len() >= MOST
            && let Some(oldest) =
                self.open.iter().min_by_key(|(_, (_, used))| *used).map(|(ino, _)| *ino)
        {
            self.open.remove(&oldest);
        }
        self.open.insert(opened.ino, (opened.clone(), self.now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::Shape;
    use std::ffi::OsString;

    #[test]
    fn those_that_nobody_asks_for_are_closed_when_there_are_too_many() {
        let root = std::env::temp_dir().join(format!("nilicon-files-{}", std::process::id()));
        std::fs::create_dir_all(&root).expect("a directory");
        let volume = Volume::open(&root).expect("a volume");
        let files = Files::default();
        let made: Vec<Ino> = (0..=MOST)
            .map(|n| {
                let name = OsString::from(n.to_string());
                let made = volume.make(Ino::ROOT, &name, &Shape::File, 0o600, (0, 0), false);
                made.expect("made").ino
            })
            .collect();
        let is_open = |ino: Ino| files.kept().open.contains_key(&ino);
        for ino in &made[..MOST] {
            files.get(&volume, *ino).expect("opened");
        }
        files.get(&volume, made[0]).expect("asked for again");
        files.get(&volume, made[MOST]).expect("one too many");
        assert_eq!(files.kept().open.len(), MOST);
        assert!(is_open(made[0]) && is_open(made[MOST]), "those asked for last");
        assert!(!is_open(made[1]), "the one that nobody asked for longest");
        files.close(made[0]);
        assert!(!is_open(made[0]));
        assert!(files.get(&volume, Ino(u64::MAX)).is_err(), "there is none");
        std::fs::remove_dir_all(&root).expect("removed");
    }
}
