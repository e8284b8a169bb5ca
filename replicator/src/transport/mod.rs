//! The connection between primary and backup: QUIC with mutual TLS.
//!
//! | carrier | direction | what |
//! |---|---|---|
//! | one bidirectional stream | primary opens | Hello, checkpoints, Bye; back: Welcome, acks |
//! | one unidirectional stream, sent first | primary opens | the input log |
//! | datagrams | both | heartbeats |
//! | UDP of its own, keyed by the connection | both | pulses ([`pulse`]) |
//!
//! The shells here own sockets and tasks and decide nothing: what is acknowledged, released or
//! refused is decided by the cores in [`crate::protocol`]. Everything runs on the caller's tokio
//! runtime (give it two workers); threads that block talk to it through bounded channels.
//!
//! Bounds (RB-1): [`link::FRAMES`] checkpoint frames wait to be sent, then the sender blocks;
//! [`link::INPUTS`] input records wait, then new ones are dropped and reported; the backup holds
//! as many unapplied checkpoints as its channel takes and one more, then acknowledgements wait.

pub mod admission;
pub mod backup;
pub mod link;
pub mod pki;
pub mod pulse;
pub mod quic;
#[cfg(test)]
mod tests;
pub mod witness;

pub use admission::{Admission, Event, SharedBackup};
pub use backup::BackupEndpoint;
pub use link::{LinkError, PrimaryEvent, PrimaryLink};
pub use pki::{HostRole, Identity, PkiError};
pub use pulse::Pulse;
pub use witness::{Ledger, WitnessClient, WitnessEndpoint};
