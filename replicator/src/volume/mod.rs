//! Volumes: directories whose contents are part of a checkpoint.
//!
//! ```text
//!  container ─ system calls ─► FUSE ─► Volume::{write, rename, ...} ─► ROOT/tree
//!                                        └─ marks what changed (Dirty)
//!  a copy begins ─ Volumes::seed ──► contents, in pieces ─► Journals::seed
//!  pre-copy, stop ── Volume::take ──► records ──► checkpoint ──► backup
//!  backup: Journals::keep (before the ack) ─► Volumes::carry_out (in order) ─► journal gone
//! ```
//! What travels is state, not operations: of each file that changed its attributes, of each
//! directory entry that changed what it refers to now, of each range that was written its bytes
//! now. So the last word on a thing wins, a full copy is "everything changed", it can be read
//! while the files are written to (what changes meanwhile is read again), and applying a
//! checkpoint twice, or again after half of it, ends in the same place (VO-2).
//!
//! Files have numbers of our own ([`Ino`]), kept in an extended attribute, so that what was renamed,
//! linked or unlinked while it is open is the same file at the backup. A file without a name
//! that is still open stands in `ROOT/loose` under its number.
//!
//! Invariants: VO-1 the backup's directory is that of a whole checkpoint, or will be as soon as
//! its journal is read; VO-2 a journal may be applied any number of times.

mod compare;
mod dirty;
mod disk;
mod fuse;
mod guard;
mod journal;
mod live;
mod ranges;
mod read_only;
mod record;
mod seeds;
mod set;
#[cfg(test)]
mod tests;
mod tree;

pub use compare::{difference, digest};
pub use disk::{Attributes, Shape, Time};
pub use fuse::{Fsync, Known, ROOT_SOURCE, ServeOptions, Served, UPPER};
pub use guard::{GUARD_COMMAND, Guard, guard_main};
pub use journal::Journals;
pub use live::{Change, Found, Opened, Volume};
pub use read_only::ReadOnly;
pub use record::{Blob, Node, Record};
pub use set::Volumes;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Number of a file in its volume. It is never used again while anybody may know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// The volume's own directory.
    pub const ROOT: Ino = Ino(1);
}

impl std::fmt::Display for Ino {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Bytes of contents that a checkpoint may have of all volumes. They are in memory at both hosts; what a copy begins
/// with need not be ([`Volumes::seed`]).
pub const MOST_BYTES: u64 = 4 << 30;

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The file system answered with an error.
    #[error("volume {}: {doing}: {source}{}", root.display(), hint(source))]
    Io {
        /// The volume's directory.
        root: PathBuf,
        /// What was tried.
        doing: String,
        /// The answer.
        source: std::io::Error,
    },
    /// The journal of a checkpoint is damaged.
    #[error(
        "the journal {} is damaged ({why}); without it the files beside it may be of no one moment: \
         remove the directory, and this side gets a new copy",
        path.display()
    )]
    Journal {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A directory that nobody changes is not the same on both hosts.
    #[error(
        "the read-only volume {} is not the same on both hosts: {first}; make it the same, with \
         modes, owners and times of files (rsync -aX does)",
        at.display()
    )]
    Differs {
        /// The directory.
        at: PathBuf,
        /// The first name that differs, and how.
        first: String,
    },
    /// A checkpoint cannot say so much.
    #[error(
        "volume {}: {bytes} bytes of it would be in one checkpoint, where there is room for {most}: more is written \
         than goes to the backup; keep what need not go along elsewhere, or have it on storage that both hosts see \
         (kind: shared)",
        root.display()
    )]
    TooMuch {
        /// The volume's directory.
        root: PathBuf,
        /// How much has changed, holes left out.
        bytes: u64,
        /// How much there is room for.
        most: u64,
    },
    /// A checkpoint says something about files that cannot be.
    #[error("volume {}: the checkpoint does not fit its files: {why}", root.display())]
    Misfit {
        /// The volume's directory.
        root: PathBuf,
        /// What does not fit.
        why: String,
    },
}

fn hint(source: &std::io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            " (the disk is full: nothing of this checkpoint is in the files before there is room)"
        }
        Some(libc::EROFS) => " (it must be writable on both hosts)",
        Some(libc::EOPNOTSUPP) => " (ext4, xfs, btrfs and tmpfs have what volumes need)",
        Some(libc::EACCES | libc::EPERM) => " (needs root and a directory that root may write)",
        _ => "",
    }
}
