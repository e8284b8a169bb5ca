//! Load generator and embedded server.
//!
//! Two halves that need each other: [`server`] is the workload that a container runs when no
//! Redis is at hand, and [`load`] is the client that keeps the history of everything it was
//! promised and reports each reply that contradicts it. What many connections saw of the same keys is
//! judged by [`history`]. [`resp`] (the Redis protocol, version 2) is the wire format of both; the
//! client speaks the others of [`Protocol`] as well.
#![forbid(unsafe_code)]

pub mod history;
pub mod load;
mod protocol;
pub mod resp;
pub mod server;

pub use protocol::Protocol;
