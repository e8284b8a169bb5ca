//! The files of a new backup: what is in volumes goes ahead of the first checkpoint, in pieces, while the container
//! runs, so that neither host holds all of it in memory and the checkpoint is small.
//!
//! Invariant: what is read ahead is what the checkpoint for the same connection leaves out; for another connection all
//! begins anew.

use super::stop::{StopLoop, of_volumes};
use replicator::capture::CaptureError;
use replicator::protocol::LinkId;
use replicator::volume::Volumes;
use std::time::{Duration, Instant};

/// With no more than this in volumes, or left to be read, a checkpoint can have it.
const LITTLE: u64 = 64 << 20;

/// How often all files are gone through before the checkpoint comes, however much is left: more is written than the
/// backup takes.
const MOST_PASSES: u32 = 8;

/// Pause between what is said of it.
const TELL: Duration = Duration::from_secs(1);

/// A copy of volumes that has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copying {
    link: LinkId,
    /// What was in them.
    all: u64,
    /// What has gone ahead.
    sent: u64,
    passes: u32,
    told: Option<Instant>,
    /// The rest is the checkpoint's.
    done: bool,
}

impl Copying {
    fn begin(volumes: &Volumes, link: LinkId) -> Self {
        volumes.begin_full();
        let all = volumes.unread();
        Self { link, all, sent: 0, passes: 0, told: None, done: all <= LITTLE }
    }
}

impl StopLoop {
    /// Sends a piece of the files ahead, if a new backup is to get any. Whether it did; if not, a stop may begin.
    pub(super) fn seed(&mut self) -> Result<bool, CaptureError> {
        let Some(link) = self.shell.full_for() else { return Ok(false) };
        let Some(volumes) = self.volumes.clone() else { return Ok(false) };
        let mut copying = match self.copying {
            Some(copying) if copying.link == link => copying,
            _ => Copying::begin(&volumes, link),
        };
        let mut sends = false;
        if !copying.done
            && let Some(mut taken) = self.buffers.pop()
        {
            sends = true;
            (taken.link, taken.epoch, taken.seed) = (link, self.epoch, true);
            taken.generation = self.shell.generation();
            // The first one, which is empty, has the backup make room.
            let begins = copying.told.is_none();
            let more = begins || volumes.seed(&mut taken.files).map_err(of_volumes)?;
            copying.sent += taken.files.len() as u64;
            if copying.told.is_none_or(|told| told.elapsed() >= TELL) {
                copying.told = Some(Instant::now());
                self.shell.copies_files(copying.all, copying.sent);
            }
            if more {
                self.shell.taken();
                if self.to_ship.blocking_send(taken).is_err() {
                    return Err(CaptureError::Transient("the shipper has ended"));
                }
            } else {
                taken.seed = false;
                self.buffers.push(taken);
                copying.passes += 1;
                copying.done = volumes.unread() <= LITTLE || copying.passes == MOST_PASSES;
            }
        }
        self.copying = Some(copying);
        Ok(sends)
    }

    /// Whether the files of this full checkpoint are ready to be taken.
    pub(super) fn has_seeded(&self, link: LinkId) -> bool {
        self.volumes.is_none() || self.copying.is_some_and(|c| c.link == link && c.done)
    }
}
