//! Checkpoints of running containers.
//!
//! This crate knows processes and their kernel state, and nothing of network frames. It takes
//! incremental checkpoints of a container ([`capture`]), carries them to a backup over QUIC
//! ([`transport`], [`protocol`]), keeps a warm spare there and brings it to life ([`restore`]).
//! All `unsafe` code of the project is in [`sys`].

pub mod ack;
mod bpf;
pub mod bypass;
pub mod capture;
pub mod container;
pub mod image;
pub mod protocol;
mod pty;
pub mod restore;
pub mod sys;
mod term;
pub mod transport;
pub mod volume;
pub mod wire;
pub mod young;

pub use term::{Epoch, Generation};
