//! What travels between primary and backup, as bytes.
//!
//! ```text
//! primary                                                   backup
//!   Hello {container, clocks, network}        ->
//!                                             <-  Welcome | Refuse {reason}
//!   VolumeSeed ...  (ahead of a full one)     ->
//!   CheckpointBegin {full, follows, ...}      ->
//!   PageChunk ...  (any number, pre-copy too) ->
//!   StateChunk ...                            ->
//!   VolumeChunk ...                           ->
//!   CheckpointEnd {digest, counts}            ->
//!                                             <-  Ack {epoch, digest}
//!   Input {open epoch, bytes}                 ->  (a stream of its own)
//!   Heartbeat                                <->  (datagrams)
//!   pulse                                    <->  (UDP beside the connection)
//!   Bye {reason}                             <->
//! ```
//!
//! [`codec`] frames messages, [`message`] says what they hold, [`delta`] codes single pages,
//! [`pulse`] is the smallest sign of life, [`shadow`] remembers the last version of each page on both sides. [`CheckpointBuilder`] turns
//! a checkpoint into frames, [`Assembly`] turns frames into a checkpoint, whole or not at all
//! (CP-2). Nothing here touches a socket.

pub mod assembly;
pub mod builder;
pub mod codec;
pub mod delta;
mod edit;
mod files;
pub mod message;
pub mod pulse;
mod queues;
pub mod shadow;
mod state;

pub use assembly::{Assembly, Checkpoint, Limits, Progress, Receipt};
pub use builder::{BuildError, CheckpointBuilder, Finished};
pub use codec::{Decoder, Frame, WireError};
pub use files::{seed, seed_of};
pub use message::Message;

#[cfg(test)]
mod tests;
