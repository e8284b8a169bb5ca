//! Seccomp filters: given back as the first of the last calls of a thread. They do not count as long
//! as we make calls in it (PTRACE_O_SUSPEND_SECCOMP), and do when it runs.

use super::error::{Doing, RestoreError};
use super::script::Script;
use super::spare::TRACE_OPTIONS;
use crate::image::task::Filter;
use crate::image::{Process, Thread};
use crate::sys::ptrace;

const SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u64 = 1;
const FLAG_LOG: u64 = 1 << 1;
const FLAG_TSYNC_ESRCH: u64 = 1 << 4;
/// Bytes of an instruction.
const INSTRUCTION: usize = 8;

/// Whether all threads have the same filters. Then they share them, so that a later filter can be
/// given to all of them at once.
fn are_shared(p: &Process) -> bool {
    let filters = |t: &Thread| t.settings.filters.clone();
    p.threads.len() > 1 && p.threads[1..].iter().all(|t| filters(t) == filters(&p.threads[0]))
}

/// Has a thread set its filters; the leader, who comes last, for all that share them.
pub(super) fn set(
    script: &mut Script,
    p: &Process,
    thread: &Thread,
    tid: i32,
) -> Result<(), RestoreError> {
    const DOING: &str = "set the seccomp filters";
    let filters = &thread.settings.filters;
    let shared = are_shared(p);
    if filters.is_empty() || (shared && thread.tid != p.pid) {
        return Ok(());
    }
    let options = TRACE_OPTIONS | ptrace::SUSPEND_SECCOMP;
    ptrace::set_options(tid, options).doing(p.pid, DOING)?;
    for Filter { program, log } in filters {
        if !script.has_room(program.len() + 16, 1) {
            script.run_ok(tid).doing(p.pid, DOING)?;
        }
        let at = script.data(program);
        // struct sock_fprog: number of instructions, where they are.
        let program = script.words(&[(program.len() / INSTRUCTION) as u64, at]);
        let mut flags = if shared { FLAG_TSYNC | FLAG_TSYNC_ESRCH } else { 0 };
        if *log {
            flags |= FLAG_LOG;
        }
        script.call("seccomp", libc::SYS_seccomp, &[SET_MODE_FILTER, flags, program]);
    }
    Ok(())
}

/// From now on they count.
pub(super) fn enforce(thread: &Thread, tid: i32) -> Result<(), RestoreError> {
    if thread.settings.filters.is_empty() {
        return Ok(());
    }
    ptrace::set_options(tid, TRACE_OPTIONS).doing(thread.tid, "enforce the seccomp filters")
}
