//! Contents of files that come ahead of the checkpoint that begins a copy, so that it need not hold
//! all of them at once.
//!
//! ```text
//!  BASE/NAME/seed-new/INO                 while they come
//!  BASE/NAME/seed-GENERATION-EPOCH/INO    since the journal of that checkpoint was written
//! ```
//! A piece is the place of its volume in the list (2 bytes) and records of contents; one without bytes begins. They
//! are of no one moment: what was written since they were read is in the checkpoint, which says so of itself
//! ([`Record::Whole`]), and is nothing without them. When it is carried out, its files begin as links to those here,
//! so that it can be carried out again (VO-2); the volume is what it was until then.
//!
//! Invariant: VO-19 a journal whose checkpoint builds on these finds them, whole, wherever a process was killed: they
//! get their name before it is there, and go after it.

use super::disk::{Disk, is_dead, step};
use super::live::punch;
use super::record::Record;
use super::{Ino, VolumeError};
use crate::{Epoch, Generation};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const NEW: &str = "seed-new";
/// What the names of directories begin with whose checkpoint has a journal.
const PREFIX: &str = "seed-";

/// Bytes of a piece at most.
pub(super) const PIECE: usize = 128 << 10;

fn name_of(generation: Generation, epoch: Epoch) -> String {
    format!("{PREFIX}{:016x}-{:016x}", generation.0, epoch.0)
}

/// Where the checkpoint with this name finds what came ahead of it, in a volume.
pub(super) fn of(generation: Generation, epoch: Epoch) -> PathBuf {
    PathBuf::from(name_of(generation, epoch))
}

/// The seeds of the volumes of a container.
#[derive(Debug)]
pub(super) struct Seeds {
    volumes: Vec<Disk>,
}

/// Who sends them, and the file that the last piece was for.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    of: Option<u64>,
    last: Option<(usize, Ino, File)>,
}

impl Seeds {
    pub(super) fn new(base: &Path, names: &[String]) -> Self {
        Self { volumes: names.iter().map(|name| Disk::new(&base.join(name))).collect() }
    }

    /// Takes a piece from `link`. One that begins makes room first; `kept` says which journals there are.
    pub(super) fn take(
        &self,
        incoming: &mut Incoming,
        link: u64,
        piece: &[u8],
        kept: impl Fn() -> Result<Vec<(Generation, Epoch)>, VolumeError>,
    ) -> Result<(), VolumeError> {
        if piece.is_empty() {
            if incoming.of.is_none_or(|of| of <= link) {
                *incoming = Incoming::default();
                let kept: Vec<String> = kept()?.into_iter().map(|(g, e)| name_of(g, e)).collect();
                self.clear(|name| kept.iter().all(|kept| kept != name))?;
                self.make_room()?;
                incoming.of = Some(link);
            }
            return Ok(());
        }
        let Some((place, records)) = piece.split_first_chunk::<2>() else {
            return Err(self.misfit(0, "a piece of its files is cut short"));
        };
        let place = usize::from(u16::from_le_bytes(*place));
        if incoming.of != Some(link) {
            return Err(self.misfit(place, "a piece of its files comes before the first"));
        }
        let records =
            Record::decode_all(records).map_err(|e| self.misfit(place, &e.to_string()))?;
        records.iter().try_for_each(|record| self.write(incoming, place, record))
    }

    fn misfit(&self, place: usize, why: &str) -> VolumeError {
        let volume = self.volumes.get(place).or(self.volumes.first());
        let root = volume.map_or_else(PathBuf::new, |disk| disk.root().to_owned());
        VolumeError::Misfit { root, why: why.to_owned() }
    }

    fn make_room(&self) -> Result<(), VolumeError> {
        self.volumes.iter().try_for_each(|disk| {
            let made = step().and_then(|()| fs::create_dir_all(disk.at(Path::new(NEW))));
            made.map_err(disk.failed("making room for a copy of its files"))
        })
    }

    fn write(
        &self,
        incoming: &mut Incoming,
        place: usize,
        record: &Record,
    ) -> Result<(), VolumeError> {
        let ino = match record {
            Record::Data { ino, .. } | Record::Hole { ino, .. } => *ino,
            other => {
                return Err(self.misfit(place, &format!("{other:?} comes ahead of its checkpoint")));
            }
        };
        let Some(disk) = self.volumes.get(place) else {
            let why = format!("volume {place} is not one of {}", self.volumes.len());
            return Err(self.misfit(place, &why));
        };
        let failed = || disk.failed(format!("writing a copy of file {ino}"));
        if incoming.last.as_ref().is_none_or(|(p, i, _)| (*p, *i) != (place, ino)) {
            let mut options = OpenOptions::new();
            options.write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let path = disk.at(&Path::new(NEW).join(ino.to_string()));
            let file = options.open(path).map_err(failed())?;
            incoming.last = Some((place, ino, file));
        }
        let Some((.., file)) = &incoming.last else { return Ok(()) };
        let written = step().and_then(|()| match record {
            Record::Data { offset, bytes, .. } => file.write_all_at(&bytes.0, *offset),
            Record::Hole { offset, len, .. } => punch(file, *offset, *len),
            _ => Ok(()),
        });
        written.map_err(|error| {
            incoming.last = None;
            // What has come is of no use without the rest, and takes room.
            if !is_dead() {
                incoming.of = None;
                let _ = self.clear(|name| name == NEW);
            }
            failed()(error)
        })
    }

    /// Gives what has come its checkpoint, whose journal is to be written next. `durable`: it outlives a loss of
    /// power.
    pub(super) fn settle(
        &self,
        generation: Generation,
        epoch: Epoch,
        durable: bool,
    ) -> Result<(), VolumeError> {
        let name = name_of(generation, epoch);
        for disk in &self.volumes {
            let failed = || disk.failed("keeping a copy of its files");
            let to = disk.at(Path::new(&name));
            if durable {
                let synced = File::open(disk.root())
                    .and_then(|f| nix::unistd::syncfs(&f).map_err(io::Error::from));
                synced.map_err(failed())?;
            }
            let done = step().and_then(|()| fs::rename(disk.at(Path::new(NEW)), &to));
            match done {
                // A process that was killed had come so far.
                Err(e) if e.kind() == ErrorKind::NotFound && to.is_dir() => {}
                other => other.map_err(failed())?,
            }
            if durable {
                File::open(disk.root()).and_then(|d| d.sync_all()).map_err(failed())?;
            }
        }
        Ok(())
    }

    /// Takes away what checkpoints up to this one were built on: their journals are gone.
    pub(super) fn clear_up_to(
        &self,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), VolumeError> {
        let last = name_of(generation, epoch);
        self.clear(|name| name != NEW && *name <= *last)
    }

    /// Takes away what one checkpoint was built on.
    pub(super) fn clear_one(
        &self,
        generation: Generation,
        epoch: Epoch,
    ) -> Result<(), VolumeError> {
        let gone = name_of(generation, epoch);
        self.clear(|name| name == gone)
    }

    /// Takes everything away.
    pub(super) fn clear_all(&self) -> Result<(), VolumeError> {
        self.clear(|_| true)
    }

    fn clear(&self, is_over: impl Fn(&str) -> bool) -> Result<(), VolumeError> {
        for disk in &self.volumes {
            clear_in(disk, &is_over).map_err(disk.failed("removing a copy of its files"))?;
        }
        Ok(())
    }
}

fn clear_in(disk: &Disk, is_over: impl Fn(&str) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(disk.root()) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let name = entry?.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(PREFIX) && is_over(name)) {
            step()?;
            match fs::remove_dir_all(disk.at(Path::new(&name))) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}
