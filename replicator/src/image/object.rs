//! Memory that is an object of its own: several processes may map it, or hold it by descriptor,
//! and it lives as long as one does.
//!
//! An object's pages travel once, whoever maps it. They are keyed like pages of a process: by an
//! *owner*, which is a pid (above 0) or stands for an object (below 0), and by their offset.

use super::sysv::Identity;
use serde::{Deserialize, Serialize};

/// An object, by a number that is never used again in the same capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Its number.
    pub id: u32,
    /// What it is.
    pub kind: ObjectKind,
    /// Length in bytes.
    pub size: u64,
    /// It was not in the checkpoint before: whatever a spare holds under this number is void.
    pub fresh: bool,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectKind {
    /// Shared anonymous memory: mmap(2) with MAP_SHARED and MAP_ANONYMOUS.
    Anonymous,
    /// A memfd, see memfd_create(2).
    Memfd {
        /// Its name.
        name: String,
        /// F_GET_SEALS
        seals: u32,
        /// Mode, user and group.
        attributes: Attributes,
    },
    /// A regular file that was deleted and lives on because it is mapped or open.
    Deleted {
        /// Its last path in the container's mount namespace.
        path: String,
        /// Mode, user and group.
        attributes: Attributes,
    },
    /// A regular file in a tmpfs of the container's own; its names are in
    /// [`State::tmpfs`](super::State::tmpfs).
    Tmpfs {
        /// The path at which it was first seen.
        path: String,
        /// Mode, user and group.
        attributes: Attributes,
    },
    /// A segment of System V shared memory, see shmget(2).
    SystemV {
        /// Id, key and rights.
        identity: Identity,
        /// It was deleted, and goes when the last process that has it attached detaches.
        deleted: bool,
    },
    /// A regular file on a file system of the host that is mapped shared and may be written
    /// through the mapping.
    File {
        /// Path in the container's mount namespace.
        path: String,
        /// Mode, user and group.
        attributes: Attributes,
    },
}

/// What stat(2) tells of an object's inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Object {
    /// The owner that stands for an object in keys of pages.
    pub fn owner_of(id: u32) -> i32 {
        -1 - (id & 0x7fff_ffff) as i32
    }

    /// The owner that stands for this object.
    pub fn owner(&self) -> i32 {
        Self::owner_of(self.id)
    }
}
