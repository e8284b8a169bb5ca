//! Records for whoever looks later: one line an epoch, one file a failover. They are written off
//! the stop path, and a write that fails is reported once and changes nothing else.

use super::status::{EpochRecord, FailoverRecord, epochs_file, failover_file};
use std::fs::File;
use std::io::Write;
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
    line: Vec<u8>,
}

impl Journal {
    /// Starts an empty one.
    pub(super) fn create(lab: &str, host: &str, container: &str) -> Self {
        let path = epochs_file(lab, host, container);
        let file = File::create(&path)
            .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "no journal"))
            .ok();
        Self { file, line: Vec::new() }
    }

    pub(super) fn write(&mut self, record: &EpochRecord) {
        let Some(file) = &mut self.file else { return };
        self.line.clear();
        let written = serde_json::to_writer(&mut self.line, record)
            .map_err(std::io::Error::from)
            .and_then(|()| {
                self.line.push(b'\n');
                file.write_all(&self.line)
            });
        if let Err(error) = written {
            tracing::warn!(%error, "the journal of epochs ends here");
            self.file = None;
        }
    }
}

/// Writes the record of a failover.
pub(super) fn write_failover(lab: &str, host: &str, container: &str, record: &FailoverRecord) {
    let path = failover_file(lab, host, container);
    let text = serde_json::to_vec(record).unwrap_or_default();
    if let Err(error) = std::fs::write(&path, text) {
        tracing::warn!(%error, path = %path.display(), "no record of the failover");
    }
}
