//! The files of a container's own tmpfs: names, and which object is behind each.

use super::object::Attributes;
use serde::{Deserialize, Serialize};

/// A name in a tmpfs that belongs to the container alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsEntry {
    /// Path in the container. Directories stand before what is in them.
    pub path: String,
    /// Mode, user and group.
    pub attributes: Attributes,
    /// What it is.
    pub kind: EntryKind,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A regular file: the number of its object.
    File(u32),
    /// A directory; the root of the tmpfs itself is one.
    Directory,
    /// A symbolic link and its target.
    Symlink(String),
    /// A named pipe.
    Fifo,
}
