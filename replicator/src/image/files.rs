//! Watches, locks and owners in a checkpoint.

use serde::{Deserialize, Serialize};

/// A watch of an inotify instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its number.
    pub number: i32,
    /// What it watches, as the container sees it.
    pub path: String,
    /// IN_ flags.
    pub mask: u32,
}

/// Whose lock it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// flock(2): the description's, of the whole file.
    Flock,
    /// fcntl(2) F_SETLK: that of the process with this pid.
    Process(i32),
    /// fcntl(2) F_OFD_SETLK: the description's.
    Open,
    /// fcntl(2) F_SETLEASE, set by the process with this pid.
    Lease(i32),
}

/// A lock on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// Index into [`super::State::descriptions`].
    pub description: u32,
    /// Whose.
    pub kind: LockKind,
    /// Exclusive (for writing) instead of shared.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; none: to the end of the file.
    pub end: Option<u64>,
}

/// Who is told of events on a description, see fcntl(2) F_SETOWN_EX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Index into [`super::State::descriptions`].
    pub description: u32,
    /// F_OWNER_PID 1, F_OWNER_PGRP 2.
    pub kind: i32,
    /// Pid or process group in the container; 0 for nobody.
    pub pid: i32,
    /// F_SETSIG
    pub signal: i32,
}
