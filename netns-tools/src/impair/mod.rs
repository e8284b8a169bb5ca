//! Impaired links: frames pass through user space and are lost, delayed, copied, reordered.
//!
//! [`Impairment`] decides ([`engine`]); [`run_link`] is the process that carries the frames of one
//! link. That process outlives the command that deployed the lab, and ends with the lab.

pub mod engine;
mod shuttle;

pub use engine::{Counts, Impairment};
pub use shuttle::{ShuttleError, run_link};
