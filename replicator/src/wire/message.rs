//! The messages, and their numbers on the wire.

use crate::Epoch;
use crate::image::Clocks;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Version of the whole format. A peer with another one is refused.
pub const PROTOCOL: u8 = 5;

/// Which end of the replication a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It runs the container.
    Primary,
    /// It holds the warm spare.
    Backup,
    /// Its container was killed: it holds nothing, and wants the container back from whoever goes on
    /// with it, once it is protected there.
    Bereft,
}

/// First message of a connection, by the primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Name of the container.
    pub container: String,
    /// Name of the host that sends it.
    pub host: String,
    /// What it is. One that is no primary only asks who runs the container; its hello is always
    /// refused, and the code is the answer.
    pub role: Role,
    /// The container's addresses, in the gateway's own encoding.
    pub network: Vec<u8>,
    /// The container's clocks now.
    pub clocks: Clocks,
    /// The UDP port on which it expects pulses; 0 for none.
    pub pulse_port: u16,
}

/// The backup takes the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Name of the host that sends it.
    pub host: String,
    /// Unapplied checkpoints that it holds before acknowledgements wait.
    pub depth: u32,
    /// The UDP port on which it expects pulses; 0 for none.
    pub pulse_port: u16,
}

/// Ends a checkpoint: what must have arrived since its begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointEnd {
    /// Digest over all its frames but this one.
    pub digest: u64,
    /// Chunk frames.
    pub chunks: u64,
    /// Runs of pages, as sent.
    pub runs: u64,
    /// Pages with contents, as sent (a page may come more than once).
    pub pages: u64,
    /// Length of the state before compression.
    pub state_bytes: u64,
    /// Length of what it says of volumes, before compression.
    pub volume_bytes: u64,
}

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who sends it.
    pub role: Role,
    /// Grows while the sender's own work makes progress.
    pub progress: u64,
}

/// Why a backup does not take a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefuseCode {
    /// It has seen a newer generation; the sender must not run any longer.
    StaleGeneration,
    /// It runs the container itself.
    Promoted,
    /// It serves another container.
    WrongContainer,
    /// The certificate is not that of the host expected here.
    WrongPeer,
    /// The message cannot be used.
    Protocol,
    /// To one that asks: nobody runs the container as far as is known here, and no copy of it is
    /// kept.
    Vacant,
}

/// The backup does not take the container. The frame's generation is the newest that it knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// The reason, for programs.
    pub code: RefuseCode,
    /// The reason, for people.
    pub text: String,
}

/// Why a connection ends by intention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Bye {
    /// The primary has stopped for good after the epoch in the frame: the backup takes over.
    Switchover,
    /// Protection or the container was ended by its operator: the spare is to be dropped.
    Stop,
    /// The sender has seen a newer generation.
    Demoted,
}

/// Number of a message kind on the wire; 0 is never valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "as the variants of Message")]
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    CheckpointBegin = 3,
    StateChunk = 4,
    PageChunk = 5,
    CheckpointEnd = 6,
    Ack = 7,
    Input = 8,
    Refuse = 9,
    Bye = 10,
    Heartbeat = 11,
    VolumeChunk = 12,
    VolumeSeed = 13,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 13] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::CheckpointBegin,
        Kind::StateChunk,
        Kind::PageChunk,
        Kind::CheckpointEnd,
        Kind::Ack,
        Kind::Input,
        Kind::Refuse,
        Kind::Bye,
        Kind::Heartbeat,
        Kind::VolumeChunk,
        Kind::VolumeSeed,
    ];

    /// The kind with this number.
    pub fn from_wire(tag: u8) -> Option<Kind> {
        Self::ALL.into_iter().find(|k| *k as u8 == tag)
    }

    /// The longest payload, in bytes. Checked before anything is stored.
    pub fn cap(self) -> usize {
        match self {
            Self::Hello => 16 << 10,
            Self::StateChunk => 64 << 10,
            Self::PageChunk => 512 << 10,
            Self::VolumeChunk | Self::VolumeSeed => 192 << 10,
            Self::Input => 256 << 10,
            Self::Welcome | Self::Refuse => 4 << 10,
            Self::CheckpointBegin | Self::Bye | Self::Heartbeat => 64,
            Self::CheckpointEnd | Self::Ack => 64,
        }
    }
}

/// A message. Generation and epoch are in its [frame](super::Frame).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The primary presents its container.
    Hello(Hello),
    /// The backup takes it.
    Welcome(Welcome),
    /// A checkpoint begins; `full`: it builds on none, and both shadows are empty.
    CheckpointBegin {
        /// Whether it builds on no checkpoint before.
        full: bool,
        /// Its output does not wait for it: nobody may promote from it.
        provisional: bool,
        /// The epoch of the checkpoint that it builds on; none for a full one. Numbers between the two are of
        /// stops that came to nothing.
        follows: Epoch,
    },
    /// Part of the state, coded; see [`super::Assembly`].
    StateChunk(Bytes),
    /// Coded pages; see [`super::Assembly`].
    PageChunk(Bytes),
    /// Part of what the checkpoint says of volumes, coded; see [`super::Assembly`].
    VolumeChunk(Bytes),
    /// Contents of files, coded, ahead of the full checkpoint that comes next; see [`super::seed_of`]. One
    /// without any begins.
    VolumeSeed(Bytes),
    /// The checkpoint is complete.
    CheckpointEnd(CheckpointEnd),
    /// The backup holds every byte of the epoch; with the digest that it computed.
    Ack {
        /// Digest over the checkpoint's frames.
        digest: u64,
    },
    /// Something that came in for the container while the frame's epoch was open.
    Input(Bytes),
    /// The backup does not take the container.
    Refuse(Refuse),
    /// The connection ends by intention.
    Bye(Bye),
    /// A sign of life.
    Heartbeat(Heartbeat),
}

impl Message {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Welcome(_) => Kind::Welcome,
            Self::CheckpointBegin { .. } => Kind::CheckpointBegin,
            Self::StateChunk(_) => Kind::StateChunk,
            Self::PageChunk(_) => Kind::PageChunk,
            Self::VolumeChunk(_) => Kind::VolumeChunk,
            Self::VolumeSeed(_) => Kind::VolumeSeed,
            Self::CheckpointEnd(_) => Kind::CheckpointEnd,
            Self::Ack { .. } => Kind::Ack,
            Self::Input(_) => Kind::Input,
            Self::Refuse(_) => Kind::Refuse,
            Self::Bye(_) => Kind::Bye,
            Self::Heartbeat(_) => Kind::Heartbeat,
        }
    }
}
