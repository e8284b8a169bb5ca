//! What the kernel tells of a stopped process at one glance: BPF iterators walk over its descriptors
//! and its threads and copy, for each, what says whether anything about it has changed. Of TCP
//! sockets these are the sequence numbers and windows too, which otherwise need repair mode.
//!
//! Of large programs the page faults are noted, too, by programs at tracepoints.
//!
//! It is a short cut and no promise. A kernel without it (no BTF, no right to load programs,
//! other structures) is looked at as before, one descriptor at a time; so is every descriptor that
//! the glance says too little of.
//!
//! Rows name threads by their numbers in the first pid namespace. Whoever captures from within
//! another one knows other numbers, would find no row of any process, and must not take that for a
//! process without descriptors: there are no glances then.

mod again;
mod descriptors;
mod faults;
mod head;
mod layout;
mod mappings;
mod row;
mod sockets;
mod tasks;

pub(super) use again::Pieces;
pub(super) use descriptors::{Descriptors, Glance};
pub(super) use faults::{Note, Notes};
pub(super) use mappings::MappingGlance;
pub(super) use row::Row;
pub(super) use sockets::{Clock, Tcp, TcpLayout};
pub(super) use tasks::{Task, TaskGlance};

use crate::bpf::asm::{Assembler, FP, Size, helper};
use crate::sys::{SysResult, bpf};
use std::sync::OnceLock;
use tasks::Tasks;

/// The programs, each loaded once in the life of this process. None: this kernel cannot do it.
fn descriptors() -> Option<&'static Descriptors> {
    static LOADED: OnceLock<Option<Descriptors>> = OnceLock::new();
    LOADED.get_or_init(|| loaded(Descriptors::load, "descriptors")).as_ref()
}

fn tasks() -> Option<&'static Tasks> {
    static LOADED: OnceLock<Option<Tasks>> = OnceLock::new();
    LOADED.get_or_init(|| loaded(Tasks::load, "threads")).as_ref()
}

fn mappings() -> Option<&'static mappings::Mappings> {
    static LOADED: OnceLock<Option<mappings::Mappings>> = OnceLock::new();
    LOADED.get_or_init(|| loaded(mappings::Mappings::load, "mappings")).as_ref()
}

fn faults() -> Option<&'static faults::Faults> {
    static LOADED: OnceLock<Option<faults::Faults>> = OnceLock::new();
    let load = || match knows_the_first_numbers().then(faults::Faults::load)? {
        Ok(loaded) => Some(loaded),
        Err(error) => {
            tracing::info!(%error, "stops look through all memory for what was written");
            None
        }
    };
    LOADED.get_or_init(load).as_ref()
}

fn loaded<T>(load: impl Fn() -> SysResult<T>, what: &str) -> Option<T> {
    if !knows_the_first_numbers() {
        tracing::info!("in a pid namespace of its own, stops look at {what} one by one");
        return None;
    }
    match load() {
        Ok(loaded) => Some(loaded),
        Err(error) => {
            tracing::info!(%error, "stops look at {what} one by one");
            None
        }
    }
}

/// The end of every program here: jumps to `last` say that there is no object any more, which the
/// reader is told ([`bpf::END`]); those to `out` that this one is done. Register 7 is where to
/// write to.
fn write_end(a: &mut Assembler) {
    a.label("out");
    a.leave(0);
    a.label("last");
    a.store_value(Size::Byte, FP, -8, bpf::END.into());
    a.mov(1, 7);
    a.place(2, -8);
    a.set(3, 1);
    a.call(helper::SEQ_WRITE);
    a.leave(0);
}

/// Whether pids that we know are those of the first pid namespace, whose inode is PROC_PID_INIT_INO
/// of the kernel's linux/proc_ns.h.
fn knows_the_first_numbers() -> bool {
    let link = std::fs::read_link("/proc/self/ns/pid");
    link.is_ok_and(|link| link.as_os_str() == "pid:[4026531836]")
}

/// Loads what makes stops short, so that the first of them does not. Says whether this kernel can
/// do it.
pub fn warm_up() -> bool {
    let loaded = [descriptors().is_some(), tasks().is_some(), mappings().is_some()];
    // Stops of large programs alone are longer without.
    faults();
    loaded == [true; 3]
}
