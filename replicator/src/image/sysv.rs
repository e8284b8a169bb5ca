//! System V semaphores and message queues, see sysvipc(7). Segments of shared memory are objects.

use serde::{Deserialize, Serialize};

/// What identifies a System V object and says who may use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The id that programs use.
    pub id: i32,
    /// Its key; 0: IPC_PRIVATE.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A set of semaphores.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Semaphores {
    /// Id, key and rights.
    pub identity: Identity,
    /// The value of each.
    pub values: Vec<u16>,
}

/// A queue of messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Id, key and rights.
    pub identity: Identity,
    /// Most bytes that it may hold.
    pub max_bytes: u64,
    /// Type and text of each message, the oldest first.
    pub messages: Vec<(i64, Vec<u8>)>,
}
