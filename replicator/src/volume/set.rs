//! All volumes of a container, whose changes are one part of its checkpoints.
//!
//! ```text
//!  BASE/journal-*   checkpoints of all of them that are not carried out yet
//!  BASE/NAME/tree   the files
//!  BASE/NAME/loose  files without a name that are open
//! ```
//! In a checkpoint the part of each volume stands behind its place in the list (2 bytes) and its
//! length (8 bytes). What directories hold that nobody changes ([`ReadOnly`]) stands before them all,
//! in the first checkpoint.

use super::disk::Disk;
use super::live::Place;
use super::record::Record;
use super::seeds::{self, Seeds};
use super::{MOST_BYTES, ReadOnly, Volume, VolumeError, journal, read_only};
use crate::{Epoch, Generation};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a buffer that are kept for the next checkpoint: a full copy is many times that.
const KEPT: usize = 1 << 20;

/// Bytes of a piece that say which volume it is of.
const INDEX: usize = 2;

/// What the next checkpoint says.
#[derive(Debug)]
struct Pending {
    /// What was taken and is not in a finished checkpoint yet, of each volume.
    parts: Vec<Vec<u8>>,
    /// It is about all files: the first one of a copy.
    full: bool,
    /// Contents of files go ahead of it.
    seeded: bool,
    /// Of which the next are those of this volume, from there on.
    next: (usize, Place),
}

/// The volumes of a container on one host.
#[derive(Debug)]
pub struct Volumes {
    base: PathBuf,
    list: Vec<Arc<Volume>>,
    seeds: Seeds,
    pending: Mutex<Pending>,
    /// Directories that nobody changes: the first checkpoint of a copy says what is in them.
    read_only: Option<Arc<ReadOnly>>,
    durable: bool,
}

impl Volumes {
    /// Opens the volumes with these names under `base`, and makes what is not there. A
    /// checkpoint that a journal holds is carried out. `durable`: what is committed outlives a
    /// loss of power of this host.
    pub fn open(base: &Path, names: &[String], durable: bool) -> Result<Self, VolumeError> {
        let me = Self::open_as_it_is(base, names, durable)?;
        journal::clear_part(base)?;
        for found in journal::read_all(base)? {
            tracing::info!(base = %base.display(), generation = %found.generation,
                epoch = %found.epoch, "a checkpoint's files are completed from the journal");
            me.apply(found.generation, found.epoch, &found.payload)?;
            journal::clear_up_to(base, found.generation, found.epoch)?;
        }
        me.seeds.clear_all()?;
        Ok(me)
    }

    /// As [`Volumes::open`], but leaves journals alone: for whoever has their checkpoints, the
    /// first of which is a full one.
    pub fn open_as_it_is(
        base: &Path,
        names: &[String],
        durable: bool,
    ) -> Result<Self, VolumeError> {
        let disk = Disk::new(base);
        std::fs::create_dir_all(base).map_err(disk.failed("making the directory"))?;
        let open = |name: &String| Volume::open(&base.join(name)).map(Arc::new);
        let list = names.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let parts = vec![Vec::new(); list.len()];
        let pending = Pending { parts, full: false, seeded: false, next: (0, Place::FIRST) };
        let (seeds, pending) = (Seeds::new(base, names), Mutex::new(pending));
        Ok(Self { base: base.to_owned(), list, seeds, pending, read_only: None, durable })
    }

    /// Beside these directories that nobody changes.
    pub fn with_read_only(self, read_only: Option<Arc<ReadOnly>>) -> Self {
        Self { read_only, ..self }
    }

    /// The volumes, in the order of their names.
    pub fn list(&self) -> &[Arc<Volume>] {
        &self.list
    }

    /// The next checkpoint is a full one: everything counts as changed.
    pub fn begin_full(&self) {
        let mut pending = self.begin_anew(true);
        for (volume, out) in self.list.iter().zip(&mut pending.parts) {
            out.clear();
            volume.all_changed();
        }
    }

    /// Nobody is interested in what has changed so far: the next checkpoint will be a full one.
    pub fn forget_changes(&self) {
        let mut pending = self.begin_anew(false);
        for (volume, out) in self.list.iter().zip(&mut pending.parts) {
            out.clear();
            volume.none_changed();
        }
    }

    fn begin_anew(&self, full: bool) -> MutexGuard<'_, Pending> {
        let mut pending = self.pending();
        (pending.full, pending.seeded, pending.next) = (full, false, (0, Place::FIRST));
        pending
    }

    /// Reads a piece of the contents that have changed, to be sent ahead of the full checkpoint that comes next
    /// ([`Journals::seed`]), while files are written to. False: it has been through all files, nothing is in
    /// `out`, and it would begin with those again that have changed meanwhile. So what is left ([`Volumes::unread`])
    /// is little, unless more is written than is read.
    ///
    /// [`Journals::seed`]: super::Journals::seed
    pub fn seed(&self, out: &mut Vec<u8>) -> Result<bool, VolumeError> {
        let mut pending = self.pending();
        pending.seeded = true;
        while let Some(volume) = self.list.get(pending.next.0) {
            let (index, from) = pending.next;
            out.clear();
            out.extend_from_slice(&(index as u16).to_le_bytes());
            let next = volume.seed(from, out)?;
            pending.next = next.map_or((index + 1, Place::FIRST), |place| (index, place));
            if next.is_some() || out.len() > INDEX {
                return Ok(true);
            }
        }
        pending.next = (0, Place::FIRST);
        out.clear();
        Ok(false)
    }

    /// How many bytes of contents have changed and were not read yet, holes among them.
    pub fn unread(&self) -> u64 {
        self.list.iter().map(|volume| volume.unread()).sum()
    }

    /// Removes files that have no name and that nobody has open.
    pub fn sweep(&self) -> Result<(), VolumeError> {
        let removing = Disk::new(&self.base);
        let swept = self.list.iter().try_for_each(|volume| volume.sweep());
        swept.map_err(removing.failed("removing files without a name"))
    }

    /// Reads what has changed of contents while files are written to; gives the bytes read.
    pub fn precopy(&self) -> Result<usize, VolumeError> {
        let mut pending = self.pending();
        let mut read = 0;
        let held: usize = pending.parts.iter().map(Vec::len).sum();
        let mut room = MOST_BYTES.saturating_sub(held as u64);
        for (volume, out) in self.list.iter().zip(&mut pending.parts) {
            let more = volume.precopy(out, room)?;
            room = room.saturating_sub(more as u64);
            read += more;
        }
        Ok(read)
    }

    /// Takes what has changed since. Nobody changes anything meanwhile: the container's threads
    /// stand still. It stays here until [`Volumes::take`].
    pub fn seal(&self) -> Result<(), VolumeError> {
        let mut pending = self.pending();
        self.list.iter().zip(&mut pending.parts).try_for_each(|(volume, out)| volume.seal(out))
    }

    /// Hands out what was sealed, for the checkpoint that has succeeded.
    pub fn take(&self, out: &mut Vec<u8>) {
        out.clear();
        let mut pending = self.pending();
        let mut begin = Vec::new();
        if std::mem::take(&mut pending.full) {
            Record::Whole { seeded: std::mem::take(&mut pending.seeded) }.encode(&mut begin);
            if let Some(read_only) = &self.read_only {
                read_only.write_down(out);
            }
        }
        for (index, part) in pending.parts.iter_mut().enumerate() {
            let len = begin.len() + part.len();
            if len > 0 {
                out.extend_from_slice(&(index as u16).to_le_bytes());
                out.extend_from_slice(&(len as u64).to_le_bytes());
                out.extend_from_slice(&begin);
                out.append(part);
                part.shrink_to(KEPT);
            }
        }
    }

    /// Writes a checkpoint's part down and carries it out.
    pub fn commit(
        &self,
        generation: Generation,
        epoch: Epoch,
        payload: &[u8],
    ) -> Result<(), VolumeError> {
        if payload.is_empty() {
            return Ok(());
        }
        keep(&self.base, &self.seeds, generation, epoch, payload, self.durable)?;
        self.carry_out(generation, epoch, payload)
    }

    /// Carries out what [`Journals::keep`] has written down of a checkpoint. After an error the files
    /// are not those of any checkpoint before [`Volumes::open`] has read the journal again.
    ///
    /// [`Journals::keep`]: super::Journals::keep
    pub fn carry_out(
        &self,
        generation: Generation,
        epoch: Epoch,
        payload: &[u8],
    ) -> Result<(), VolumeError> {
        if payload.is_empty() {
            return Ok(());
        }
        self.apply(generation, epoch, payload)?;
        if self.durable {
            for volume in &self.list {
                volume.sync()?;
            }
        }
        journal::clear_up_to(&self.base, generation, epoch)?;
        match is_seeded(payload) {
            true => self.seeds.clear_up_to(generation, epoch),
            false => Ok(()),
        }
    }

    fn apply(
        &self,
        generation: Generation,
        epoch: Epoch,
        payload: &[u8],
    ) -> Result<(), VolumeError> {
        let misfit = |why: String| VolumeError::Misfit { root: self.base.clone(), why };
        let seeds = seeds::of(generation, epoch);
        for part in parts(payload) {
            let (index, part) = part.map_err(misfit)?;
            let volume = self.list.get(usize::from(index)).ok_or_else(|| {
                misfit(format!("volume {index} is not one of {}", self.list.len()))
            })?;
            volume.apply(&Record::decode_all(part).map_err(|e| misfit(e.to_string()))?, &seeds)?;
        }
        Ok(())
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of a checkpoint, each with the place of its volume.
fn parts(payload: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), String>> {
    let (mut rest, mut error) = match read_only::behind(payload) {
        Ok((_, rest)) => (rest, None),
        Err(why) => (&payload[..0], Some(why.to_owned())),
    };
    std::iter::from_fn(move || {
        if let Some(why) = error.take() {
            return Some(Err(why));
        }
        let left = std::mem::take(&mut rest);
        if left.is_empty() {
            return None;
        }
        let Some((head, body)) = left.split_first_chunk::<10>() else {
            return Some(Err("its end is missing".into()));
        };
        let index = u16::from_le_bytes([head[0], head[1]]);
        let len = u64::from_le_bytes(std::array::from_fn(|i| head[2 + i]));
        let Some((part, next)) =
            usize::try_from(len).ok().and_then(|len| body.split_at_checked(len))
        else {
            return Some(Err(format!("{} bytes of {len} are there", body.len())));
        };
        rest = next;
        Some(Ok((index, part)))
    })
}

/// Whether contents of files came ahead of a checkpoint.
fn is_seeded(payload: &[u8]) -> bool {
    let seeded = |part: &[u8]| Record::first(part) == Some(Record::Whole { seeded: true });
    parts(payload).any(|part| part.is_ok_and(|(_, part)| seeded(part)))
}

/// Writes a checkpoint down, with what came ahead of it.
pub(super) fn keep(
    base: &Path,
    seeds: &Seeds,
    generation: Generation,
    epoch: Epoch,
    payload: &[u8],
    durable: bool,
) -> Result<(), VolumeError> {
    if is_seeded(payload) {
        seeds.settle(generation, epoch, durable)?;
    }
    journal::write(base, generation, epoch, payload, durable)
}
