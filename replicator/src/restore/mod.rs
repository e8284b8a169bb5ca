//! The warm spare: a stopped copy of a container, kept up to date and brought to life at failover.
//!
//! ```text
//!             apply(checkpoint 1, 2, 3 ...)          failover
//! launch -> Spare: processes, mappings, pages --> prepare   descriptions, descriptors, threads
//!                                                 connect   TCP connections, asking their peers
//!                                                 (the caller plugs the network in)
//!                                                 push_unsent
//!                                                 complete  registers, signals; scratch unmapped
//!                                                 resume_all / detach_all
//! ```
//! All of it happens by system calls that the stopped processes make on our behalf
//! ([`crate::sys::remote`]) and by writing to their memory. Every call comes from the one thread
//! that made the [`Spare`] (ptrace demands it).
//!
//! Invariants: a spare holds exactly the last checkpoint that was folded in, or is lost and says
//! so ([`RestoreError::spare_is_lost`]); cost follows the difference to the checkpoint before;
//! no process of it runs an instruction of its program before [`Spare::resume_all`].

mod advice;
mod datagrams;
mod error;
mod files;
mod filters;
mod finish;
mod install;
mod landing;
mod lineage;
mod locks;
mod objects;
mod options;
mod pages;
mod plan;
mod process;
mod rebirth;
mod script;
mod settings;
mod shared;
mod sockets;
mod space;
mod spare;
mod sysv;
mod tcp;
mod terminals;
mod timers;
mod tree;
mod unix;
mod unix_queues;

pub use error::RestoreError;
pub use finish::{FinishTimes, Restored, Resumption};
pub use plan::{Step, plan};
pub use rebirth::{Place, RebirthError, Reborn, boot, rebirth};
pub use spare::{Spare, TRACE_OPTIONS};
pub use tcp::{Peer, Segment};
