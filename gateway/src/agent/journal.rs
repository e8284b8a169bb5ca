//! Records for whoever looks later: one line an epoch, one file a failover. They are written off
//! the stop path, and a write that fails is reported once and changes nothing else.

use super::primary::lock;
use super::status::{EpochRecord, FailoverRecord, epochs_file, failover_file, generation_file};
use anyhow::{Context, Result};
use replicator::Generation;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// CLOCK_MONOTONIC in microseconds: comparable between processes of one host.
pub fn monotonic_us() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|t| Duration::from(t).as_micros() as u64)
        .unwrap_or(0)
}

/// The journal of epochs of one container on one host.
#[derive(Debug)]
pub(super) struct Journal {
    file: Option<File>,
    lines: Vec<u8>,
}

impl Journal {
    /// Goes on behind what is there: the container may have been here before.
    pub(super) fn open(lab: &str, host: &str, container: &str) -> Self {
        let path = epochs_file(lab, host, container);
        let file = append(&path)
            .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "no journal"))
            .ok();
        Self { file, lines: Vec::new() }
    }

    /// Adds records, in one call.
    pub(super) fn write(&mut self, records: &[EpochRecord]) {
        let Some(file) = self.file.as_mut().filter(|_| !records.is_empty()) else { return };
        self.lines.clear();
        let add = |record| {
            serde_json::to_writer(&mut self.lines, record)?;
            self.lines.push(b'\n');
            Ok::<(), std::io::Error>(())
        };
        let written = records.iter().try_for_each(add).and_then(|()| file.write_all(&self.lines));
        if let Err(error) = written {
            tracing::warn!(%error, "the journal of epochs ends here");
            self.file = None;
        }
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).open(path)
}

/// Adds the record of a failover to those before it, one a line.
pub(super) fn write_failover(lab: &str, host: &str, container: &str, record: &FailoverRecord) {
    let path = failover_file(lab, host, container);
    let mut line = serde_json::to_vec(record).unwrap_or_default();
    line.push(b'\n');
    if let Err(error) = append(&path).and_then(|mut file| file.write_all(&line)) {
        tracing::warn!(%error, path = %path.display(), "no record of the failover");
    }
}

/// The newest generation that this host has heard of: it must not go back when the agent starts
/// again, or an old primary would be welcome (FO-1).
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
    newest: Mutex<Generation>,
}

impl Memory {
    /// Reads what is known.
    ///
    /// # Errors
    /// There is something, and it cannot be read: then nothing can be said to be new.
    pub(super) fn recall(lab: &str, host: &str, container: &str) -> Result<Self> {
        let path = generation_file(lab, host, container);
        let newest = match std::fs::read_to_string(&path) {
            Ok(text) => Generation(
                text.trim()
                    .parse()
                    .with_context(|| format!("{} holds no generation: {text:?}", path.display()))?,
            ),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Generation::default(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        Ok(Self { path, newest: Mutex::new(newest) })
    }

    pub(super) fn newest(&self) -> Generation {
        *lock(&self.newest)
    }

    /// Writes a generation down, if it is newer than what is known.
    pub(super) fn keep(&self, generation: Generation) {
        let mut newest = lock(&self.newest);
        if generation <= *newest {
            return;
        }
        *newest = generation;
        let next = self.path.with_extension("generation.new");
        let written = std::fs::write(&next, generation.0.to_string())
            .and_then(|()| std::fs::rename(&next, &self.path));
        if let Err(error) = written {
            tracing::error!(%error, path = %self.path.display(),
                "a restart of this agent would forget the generation");
        }
    }
}
