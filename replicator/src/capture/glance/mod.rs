//! What the kernel tells of a stopped process at one glance: a BPF iterator walks over its
//! descriptors and copies, for each, what says whether anything about it has changed. Of TCP
//! sockets these are the sequence numbers and windows too, which otherwise need repair mode.
//!
//! It is a short cut and no promise. A kernel without it (no BTF, no right to load programs,
//! other structures) is looked at as before, one descriptor at a time; so is every descriptor that
//! the glance says too little of.

mod descriptors;
mod layout;

pub(super) use descriptors::{Descriptors, Glance, Row, Tcp};

use std::sync::OnceLock;

/// The programs, loaded once in the life of this process. None: this kernel cannot do it.
fn descriptors() -> Option<&'static Descriptors> {
    static LOADED: OnceLock<Option<Descriptors>> = OnceLock::new();
    let load = || match Descriptors::load() {
        Ok(loaded) => Some(loaded),
        Err(error) => {
            tracing::info!(%error, "stops look at descriptors one by one");
            None
        }
    };
    LOADED.get_or_init(load).as_ref()
}

/// Loads what makes stops short, so that the first of them does not. Says whether this kernel can
/// do it.
pub fn warm_up() -> bool {
    descriptors().is_some()
}
