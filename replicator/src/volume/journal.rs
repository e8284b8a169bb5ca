//! Journals: each is one checkpoint's statements about files, whole in a file before the first of
//! them is carried out.
//!
//! ```text
//!  magic 8 | generation 8 | epoch 8 | length 8 | xxh3 8 | payload
//! ```
//! One is written under another name and renamed, so that a damaged one is damage and no accident
//! of the moment. A backup writes an epoch's journal before it acknowledges the epoch, and carries
//! it out when its memory is as far: so there may be several, which are carried out in order.

use super::disk::{is_dead, step};
use super::seeds::{Incoming, Seeds};
use super::set::keep;
use super::{ReadOnly, VolumeError, read_only};
use crate::{Epoch, Generation};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use xxhash_rust::xxh3::Xxh3;

const MAGIC: &[u8; 8] = b"NILIVOL1";
const HEADER: usize = 40;
/// What the names of journals begin with; generation and epoch follow, so that they sort by age.
const PREFIX: &str = "journal-";
/// One that is not whole yet.
const NEW: &str = "journal.new";

/// Where the checkpoints of a backup are written down before they are acknowledged. Shared by the
/// connections, which keep, and the thread that carries out.
#[derive(Debug)]
pub struct Journals {
    base: PathBuf,
    durable: bool,
    /// Directories here that must be what the primary's are.
    read_only: Option<Arc<ReadOnly>>,
    seeds: Seeds,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Whether this side takes checkpoints at all.
    open: bool,
    /// What comes ahead of one.
    incoming: Incoming,
}

impl Journals {
    /// For the volumes with these names under `base`. `durable`: what is kept outlives a loss of power.
    pub fn new(base: &Path, names: &[String], durable: bool) -> Self {
        let state = Mutex::new(State { open: true, incoming: Incoming::default() });
        let seeds = Seeds::new(base, names);
        Self { base: base.to_owned(), durable, read_only: None, seeds, state }
    }

    /// Beside these directories that nobody changes.
    pub fn with_read_only(self, read_only: Option<Arc<ReadOnly>>) -> Self {
        Self { read_only, ..self }
    }

    /// Writes down what a checkpoint says of volumes, if directories that nobody changes are as it
    /// says. Does nothing once they are shut: then no checkpoint is acknowledged either.
    pub fn keep(
        &self,
        generation: Generation,
        epoch: Epoch,
        payload: &[u8],
    ) -> Result<(), VolumeError> {
        let misfit = |why: &str| VolumeError::Misfit { root: self.base.clone(), why: why.into() };
        let (told, payload) = read_only::behind(payload).map_err(misfit)?;
        if let Some(told) = told {
            // Before the lock: a promotion does not wait until they are read.
            let here = self.read_only.as_ref().ok_or_else(|| {
                misfit("it has read-only volumes, and this side's topology has none")
            })?;
            here.compare(told)?;
        }
        let mut state = self.state();
        if state.open && !payload.is_empty() {
            std::fs::create_dir_all(&self.base).map_err(|source| VolumeError::Io {
                root: self.base.clone(),
                doing: "making the directory".into(),
                source,
            })?;
            keep(&self.base, &self.seeds, generation, epoch, payload, self.durable)?;
            // What came ahead of it is no longer open to whoever sent it.
            state.incoming = Incoming::default();
        }
        Ok(())
    }

    /// Takes a piece of what comes ahead of a full checkpoint over `link`; an empty one begins, and takes away what
    /// came over another. The newest connection that has begun is the one that counts.
    pub fn seed(&self, link: u64, piece: &[u8]) -> Result<(), VolumeError> {
        let mut state = self.state();
        match state.open {
            true => self.seeds.take(&mut state.incoming, link, piece, || kept(&self.base)),
            false => Ok(()),
        }
    }

    /// Takes back what was kept of a checkpoint that is not acknowledged.
    pub fn take_back(&self, generation: Generation, epoch: Epoch) -> Result<(), VolumeError> {
        let _state = self.state();
        clear(&self.base, generation, epoch)?;
        self.seeds.clear_one(generation, epoch)
    }

    /// The files are used here from now on: nothing is kept any more, and what is there and was
    /// not carried out never will be.
    pub fn shut(&self) -> Result<(), VolumeError> {
        let mut state = self.state();
        (state.open, state.incoming) = (false, Incoming::default());
        clear_all(&self.base)?;
        self.seeds.clear_all()
    }

    /// They are not used here any longer.
    pub fn reopen(&self) {
        self.state().open = true;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A journal that was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) generation: Generation,
    pub(super) epoch: Epoch,
    pub(super) payload: Vec<u8>,
}

fn file(base: &Path, generation: Generation, epoch: Epoch) -> PathBuf {
    base.join(format!("{PREFIX}{:016x}-{:016x}", generation.0, epoch.0))
}

fn is_journal(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(PREFIX))
}

/// The checkpoints that have a journal.
fn kept(base: &Path) -> Result<Vec<(Generation, Epoch)>, VolumeError> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let parse = |path: PathBuf| {
        let (generation, epoch) =
            path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
        Some((Generation(number(generation)?), Epoch(number(epoch)?)))
    };
    Ok(all(base)?.into_iter().filter_map(parse).collect())
}

/// All journals, the oldest first.
fn all(base: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let failed = |source| VolumeError::Io {
        root: base.to_owned(),
        doing: "looking for journals".into(),
        source,
    };
    let entries = match std::fs::read_dir(base) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if is_journal(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn sum(head: &[u8], payload: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(head);
    sum.update(payload);
    sum.digest()
}

/// Writes the journal. `durable`: it outlives a loss of power.
pub(super) fn write(
    base: &Path,
    generation: Generation,
    epoch: Epoch,
    payload: &[u8],
    durable: bool,
) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Io {
        root: base.to_owned(),
        doing: format!("writing the journal of epoch {epoch}"),
        source,
    };
    let mut head = Vec::with_capacity(HEADER);
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&generation.0.to_le_bytes());
    head.extend_from_slice(&epoch.0.to_le_bytes());
    head.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    let sum = sum(&head, payload);
    head.extend_from_slice(&sum.to_le_bytes());
    let new = base.join(NEW);
    step().map_err(failed)?;
    let mut out = std::fs::File::create(&new).map_err(failed)?;
    let written = out.write_all(&head).and_then(|()| {
        // A kill in the middle leaves a part of it.
        let half = payload.len() / 2;
        out.write_all(&payload[..half])?;
        step()?;
        out.write_all(&payload[half..])?;
        if durable { out.sync_data() } else { Ok(()) }
    });
    if let Err(error) = written {
        if !is_dead() {
            let _ = std::fs::remove_file(&new);
        }
        return Err(failed(error));
    }
    step().map_err(failed)?;
    std::fs::rename(&new, file(base, generation, epoch)).map_err(failed)?;
    if durable {
        std::fs::File::open(base).and_then(|d| d.sync_all()).map_err(failed)?;
    }
    Ok(())
}

/// All journals in order.
pub(super) fn read_all(base: &Path) -> Result<Vec<Found>, VolumeError> {
    all(base)?.into_iter().map(|path| read(base, path)).collect()
}

fn read(base: &Path, path: PathBuf) -> Result<Found, VolumeError> {
    let bytes = std::fs::read(&path).map_err(|source| VolumeError::Io {
        root: base.to_owned(),
        doing: "reading a journal".into(),
        source,
    })?;
    let bad = |why: String| VolumeError::Journal { path: path.clone(), why };
    let Some((head, payload)) = bytes.split_at_checked(HEADER) else {
        return Err(bad(format!("{} bytes are less than its head", bytes.len())));
    };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    if &head[..8] != MAGIC {
        return Err(bad("it does not begin as a journal".into()));
    }
    if word(24) != payload.len() as u64 {
        return Err(bad(format!("{} bytes instead of {}", payload.len(), word(24))));
    }
    if word(32) != sum(&head[..32], payload) {
        return Err(bad("the checksum is wrong".into()));
    }
    let (generation, epoch) = (Generation(word(8)), Epoch(word(16)));
    if path != file(base, generation, epoch) {
        return Err(bad(format!("it is of epoch {epoch} of generation {generation}")));
    }
    Ok(Found { generation, epoch, payload: payload.to_vec() })
}

/// Takes one journal away: it is never to be carried out.
fn clear(base: &Path, generation: Generation, epoch: Epoch) -> Result<(), VolumeError> {
    remove(base, &file(base, generation, epoch))
}

/// Takes the journals of all epochs up to this one away: they are done, or were overtaken by a full
/// copy.
pub(super) fn clear_up_to(
    base: &Path,
    generation: Generation,
    epoch: Epoch,
) -> Result<(), VolumeError> {
    let last = file(base, generation, epoch);
    all(base)?.iter().filter(|path| **path <= last).try_for_each(|path| remove(base, path))
}

/// Takes all journals away.
fn clear_all(base: &Path) -> Result<(), VolumeError> {
    remove(base, &base.join(NEW))?;
    all(base)?.iter().try_for_each(|path| remove(base, path))
}

/// Takes away what was left of a journal that never became whole.
pub(super) fn clear_part(base: &Path) -> Result<(), VolumeError> {
    remove(base, &base.join(NEW))
}

fn remove(base: &Path, path: &Path) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Io {
        root: base.to_owned(),
        doing: "removing a journal".into(),
        source,
    };
    step().map_err(failed)?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}
