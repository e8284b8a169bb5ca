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
use super::record::Record;
use super::{MOST_BYTES, ReadOnly, Volume, VolumeError, journal, read_only};
use crate::{Epoch, Generation};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a buffer that are kept for the next checkpoint: a full copy is many times that.
const KEPT: usize = 1 << 20;

/// The volumes of a container on one host.
#[derive(Debug)]
pub struct Volumes {
    base: PathBuf,
    list: Vec<Arc<Volume>>,
    /// What was taken and is not in a finished checkpoint yet, of each volume.
    pending: Mutex<Vec<Vec<u8>>>,
    /// Directories that nobody changes, and whether the next checkpoint says what is in them.
    read_only: Option<Arc<ReadOnly>>,
    tell: AtomicBool,
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
            me.apply(&found.payload)?;
            journal::clear_up_to(base, found.generation, found.epoch)?;
        }
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
        let pending = Mutex::new(vec![Vec::new(); list.len()]);
        let (base, tell) = (base.to_owned(), AtomicBool::new(false));
        Ok(Self { base, list, pending, read_only: None, tell, durable })
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
        let mut pending = self.pending();
        for (volume, out) in self.list.iter().zip(&mut *pending) {
            out.clear();
            Record::Whole.encode(out);
            volume.all_changed();
        }
        self.tell.store(true, Ordering::Release);
    }

    /// Nobody is interested in what has changed so far: the next checkpoint will be a full one.
    pub fn forget_changes(&self) {
        let mut pending = self.pending();
        for (volume, out) in self.list.iter().zip(&mut *pending) {
            out.clear();
            volume.none_changed();
        }
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
        let held: usize = pending.iter().map(Vec::len).sum();
        let mut room = MOST_BYTES.saturating_sub(held as u64);
        for (volume, out) in self.list.iter().zip(&mut *pending) {
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
        self.list.iter().zip(&mut *pending).try_for_each(|(volume, out)| volume.seal(out))
    }

    /// Hands out what was sealed, for the checkpoint that has succeeded.
    pub fn take(&self, out: &mut Vec<u8>) {
        out.clear();
        if self.tell.swap(false, Ordering::AcqRel)
            && let Some(read_only) = &self.read_only
        {
            read_only.write_down(out);
        }
        for (index, part) in self.pending().iter_mut().enumerate() {
            if !part.is_empty() {
                out.extend_from_slice(&(index as u16).to_le_bytes());
                out.extend_from_slice(&(part.len() as u64).to_le_bytes());
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
        journal::write(&self.base, generation, epoch, payload, self.durable)?;
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
        self.apply(payload)?;
        if self.durable {
            for volume in &self.list {
                volume.sync()?;
            }
        }
        journal::clear_up_to(&self.base, generation, epoch)
    }

    fn apply(&self, payload: &[u8]) -> Result<(), VolumeError> {
        let misfit = |why: String| VolumeError::Misfit { root: self.base.clone(), why };
        let mut rest = read_only::behind(payload).map_err(|e| misfit(e.into()))?.1;
        while !rest.is_empty() {
            let Some((head, body)) = rest.split_first_chunk::<10>() else {
                return Err(misfit("its end is missing".into()));
            };
            let index = u16::from_le_bytes([head[0], head[1]]);
            let len = u64::from_le_bytes(std::array::from_fn(|i| head[2 + i]));
            let part = usize::try_from(len).ok().and_then(|len| body.split_at_checked(len));
            let Some((part, next)) = part else {
                return Err(misfit(format!("{} bytes of {len} are there", body.len())));
            };
            let volume = self.list.get(usize::from(index)).ok_or_else(|| {
                misfit(format!("volume {index} is not one of {}", self.list.len()))
            })?;
            volume.apply(&Record::decode_all(part).map_err(|e| misfit(e.to_string()))?)?;
            rest = next;
        }
        Ok(())
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
