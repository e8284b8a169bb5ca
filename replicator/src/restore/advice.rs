//! What a program has said of its memory, said again at the failover.

use super::error::{Doing, RestoreError};
use super::script::Script;
use super::spare::Stub;
use crate::image::Process;
use crate::image::advice::Advice;

const MSEAL: i64 = 462;
const MADV_GUARD_INSTALL: u64 = 102;

/// Bits that madvise(2) sets, with its argument. The first ones change what a program does, the
/// others are hints, which a kernel may refuse.
const ADVICES: [(u32, i32, bool); 8] = [
    (Advice::DONTFORK, libc::MADV_DONTFORK, false),
    (Advice::WIPEONFORK, libc::MADV_WIPEONFORK, false),
    (Advice::DONTDUMP, libc::MADV_DONTDUMP, false),
    (Advice::MERGEABLE, libc::MADV_MERGEABLE, true),
    (Advice::HUGEPAGE, libc::MADV_HUGEPAGE, true),
    (Advice::NOHUGEPAGE, libc::MADV_NOHUGEPAGE, true),
    (Advice::SEQUENTIAL, libc::MADV_SEQUENTIAL, true),
    (Advice::RANDOM, libc::MADV_RANDOM, true),
];

/// Gives the memory of a process its flags. Its contents are all there.
pub(super) fn repeat(
    script: &mut Script,
    stub: &Stub,
    process: &Process,
) -> Result<(), RestoreError> {
    const DOING: &str = "say again what was said of memory";
    let ranges = |bit| process.advice.iter().filter(move |a| a.bits & bit != 0);
    for (bit, advice, is_hint) in ADVICES {
        for Advice { start, end, .. } in ranges(bit) {
            script.call_on(
                "madvise",
                format!("advice {advice} for {start:#x}-{end:#x}"),
                libc::SYS_madvise,
                &[*start, end - start, advice as u64],
            );
            if is_hint {
                let result = script.run(stub.host).doing(stub.pid, DOING)?;
                if result.iter().any(|r| *r < 0) {
                    tracing::warn!(
                        pid = stub.pid,
                        advice,
                        start,
                        "the kernel takes no such advice"
                    );
                }
            } else if !script.has_room(0, 1) {
                script.run_ok(stub.host).doing(stub.pid, DOING)?;
            }
        }
        if !script.is_empty() {
            script.run_ok(stub.host).doing(stub.pid, DOING)?;
        }
    }
    for a in ranges(Advice::GUARD) {
        if !script.has_room(0, 1) {
            script.run_ok(stub.host).doing(stub.pid, DOING)?;
        }
        let object = format!("a guard region at {:#x}-{:#x}", a.start, a.end);
        let args = [a.start, a.end - a.start, MADV_GUARD_INSTALL];
        script.call_on("madvise", object, libc::SYS_madvise, &args);
    }
    if !script.is_empty() {
        script.run_ok(stub.host).doing(stub.pid, DOING)?;
    }
    for a in ranges(Advice::LOCKED) {
        let on_fault = u64::from(a.bits & Advice::LOCKED_ON_FAULT != 0);
        let object = format!("{:#x}-{:#x}", a.start, a.end);
        let has_guards = ranges(Advice::GUARD).any(|g| g.start < a.end && a.start < g.end);
        if has_guards && !script.is_empty() {
            script.run_ok(stub.host).doing(stub.pid, DOING)?;
        }
        script.call_on("mlock2", object, libc::SYS_mlock2, &[a.start, a.end - a.start, on_fault]);
        if has_guards {
            // It is locked, but the kernel says that not all of it could be brought in.
            script.run(stub.host).doing(stub.pid, DOING)?;
        }
    }
    for a in ranges(Advice::SEALED) {
        script.call_on(
            "mseal",
            format!("{:#x}-{:#x}", a.start, a.end),
            MSEAL,
            &[a.start, a.end - a.start, 0],
        );
    }
    if script.is_empty() {
        return Ok(());
    }
    script.run_ok(stub.host).doing(stub.pid, DOING).map(drop)
}
