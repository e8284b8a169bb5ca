//! The journal: one checkpoint's statements about files, whole in a file before the first of them
//! is carried out.
//!
//! ```text
//!  magic 8 | generation 8 | epoch 8 | length 8 | xxh3 8 | payload
//! ```
//! It is written under another name and renamed, so that a damaged one is damage and no accident
//! of the moment.

use super::VolumeError;
use super::disk::{is_dead, step};
use crate::{Epoch, Generation};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

const MAGIC: &[u8; 8] = b"NILIVOL1";
const HEADER: usize = 40;

/// A journal that was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) generation: Generation,
    pub(super) epoch: Epoch,
    pub(super) payload: Vec<u8>,
}

fn file(base: &Path) -> PathBuf {
    base.join("journal")
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
    let new = base.join("journal.new");
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
    std::fs::rename(&new, file(base)).map_err(failed)?;
    if durable {
        std::fs::File::open(base).and_then(|d| d.sync_all()).map_err(failed)?;
    }
    Ok(())
}

/// The journal, if there is one.
pub(super) fn read(base: &Path) -> Result<Option<Found>, VolumeError> {
    let path = file(base);
    let bytes = match std::fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            let doing = "reading the journal".into();
            return Err(VolumeError::Io { root: base.to_owned(), doing, source });
        }
        Ok(bytes) => bytes,
    };
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
    Ok(Some(Found { generation, epoch, payload: payload.to_vec() }))
}

/// Takes the journal away: all that it says is done.
pub(super) fn clear(base: &Path) -> Result<(), VolumeError> {
    let failed = |source| VolumeError::Io {
        root: base.to_owned(),
        doing: "removing the journal".into(),
        source,
    };
    step().map_err(failed)?;
    match std::fs::remove_file(file(base)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}
