//! Load generator and embedded server, both speaking RESP (the Redis protocol, version 2).
//!
//! Two halves that need each other: [`server`] is the workload that a container runs when no
//! Redis is at hand, and [`load`] is the client that keeps the history of everything it was
//! promised and reports each reply that contradicts it. [`resp`] is the wire format of both.
#![forbid(unsafe_code)]

pub mod load;
pub mod resp;
pub mod server;
