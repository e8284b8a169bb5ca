//! What processes share with each other, and what threads do not share with their process, though
//! the kernel lets them: memory, descriptors, and the working directory with its kin (CLONE_VM,
//! CLONE_FILES and CLONE_FS of clone(2), unshare(2) in a thread).
//!
//! A state has one table of descriptors and one memory for each process. Invariant: a tree that
//! has another shape is refused, never taken apart.

use super::{CaptureError, tracer};
use crate::sys::pidfd::{Table, share};
use crate::sys::{SysError, SysResult};

const TABLES: [(Table, &str); 3] = [
    (Table::Memory, "memory"),
    (Table::Descriptors, "table of descriptors"),
    (Table::Directories, "working directory"),
];

/// Refuses a process that shares a table with one of the `others`. No process is in vfork.
pub(super) fn check_process(
    pid: i32,
    others: impl Iterator<Item = i32>,
) -> Result<(), CaptureError> {
    for other in others.filter(|other| *other != pid) {
        for (table, name) in TABLES {
            if unless_gone(share(pid, other, table))? == Some(true) {
                let why = format!(
                    "it shares its {name} with process {other}, of which it is no thread, and that \
                     cannot be brought back; run it without (no clone with {})",
                    table.flag()
                );
                return Err(CaptureError::unsupported(format!("pid {pid}"), why));
            }
        }
    }
    Ok(())
}

/// Refuses a process one of whose threads has a table of its own.
pub(super) fn check_threads(pid: i32) -> Result<(), CaptureError> {
    let Some(tids) = unless_gone(tracer::tids(pid))? else { return Ok(()) };
    for tid in tids.into_iter().filter(|tid| *tid != pid) {
        for (table, name) in &TABLES[1..] {
            if unless_gone(share(pid, tid, *table))? == Some(false) {
                let why = format!(
                    "it has a {name} of its own, apart from its process, and that cannot be brought \
                     back; run it without (no unshare with {})",
                    table.flag()
                );
                return Err(CaptureError::unsupported(format!("thread {tid} of pid {pid}"), why));
            }
        }
    }
    Ok(())
}

/// Whoever has ended shares nothing any more.
fn unless_gone<T>(result: SysResult<T>) -> Result<Option<T>, SysError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_gone() || e.code() == libc::ENOENT => Ok(None),
        Err(e) => Err(e),
    }
}
