//! Linux networking for labs of namespaces.
//!
//! [`topology`] reads and checks the files that describe a lab; [`lab`] makes the lab of one, takes
//! it down, and breaks it on purpose. Below them: [`namespace`], [`links`], [`cgroup`],
//! [`process`], and [`impair`] for links that lose, delay and reorder.
//!
//! This crate knows nothing of checkpoints or of what runs in a container.

pub mod cgroup;
pub mod impair;
pub mod lab;
pub mod links;
pub mod namespace;
pub mod process;
pub mod topology;

/// The bridge device inside a node of kind `bridge`.
pub const BRIDGE_DEVICE: &str = "br0";
