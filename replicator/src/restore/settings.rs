//! Settings of processes and threads that most leave as they were. What is as a fresh process has
//! it costs nothing.

use super::finish::Restored;
use super::script::Script;
use crate::image::Process;
use crate::sys::{SysError, SysResult, sched};
use nix::sched::CpuSet;

/// Settings that the process makes itself, its root directory last: paths are the container's
/// until then.
pub(super) fn of_process(script: &mut Script, p: &Process) {
    let s = &p.settings;
    if s.personality != 0 {
        let args = [u64::from(s.personality)];
        script.call("personality", libc::SYS_personality, &args);
    }
    if s.no_huge_pages {
        let args = [libc::PR_SET_THP_DISABLE as u64, 1, 0, 0, 0];
        script.call("prctl(PR_SET_THP_DISABLE)", libc::SYS_prctl, &args);
    }
    for bit in (0..32).filter(|bit| s.membarrier & (1 << bit) != 0) {
        script.call("membarrier", libc::SYS_membarrier, &[1 << bit, 0, 0]);
    }
    if let Some(root) = &s.root {
        let path = script.text(root);
        script.call_on("chroot", root.clone(), libc::SYS_chroot, &[path]);
    }
}

/// Settings that are made from outside when nothing runs yet. `processors` are those that threads
/// may run on here.
pub(super) fn from_outside(p: &Process, restored: &Restored, processors: &CpuSet) -> SysResult<()> {
    out_of_memory_score(p, restored)?;
    for (thread, &tid) in p.threads.iter().zip(&restored.tids) {
        let s = &thread.settings;
        let here: Vec<usize> =
            (0..CpuSet::count()).filter(|c| processors.is_set(*c).unwrap_or(false)).collect();
        let wanted = |cpu: &usize| match &s.processors {
            None => true,
            Some(set) => set.get(cpu / 64).is_some_and(|word| word & (1 << (cpu % 64)) != 0),
        };
        let both: Vec<usize> = here.iter().copied().filter(wanted).collect();
        sched::set_affinity(tid, if both.is_empty() { &here } else { &both })?;
        let class = &s.scheduling;
        if (class.policy, class.nice, class.flags) != (0, 0, 0) {
            let mut class = *class;
            if class.policy != libc::SCHED_DEADLINE as u32 {
                // What the kernel says there for other classes is none of the program's.
                (class.runtime, class.deadline, class.period) = (0, 0, 0);
            }
            if let Err(error) = sched::set_attributes(tid, &class) {
                tracing::warn!(pid = p.pid, tid = thread.tid, %error,
                    "a thread's scheduling class cannot be had here; it runs as an ordinary one");
            }
        }
        if sched::io_priority(tid)? != s.io_priority {
            sched::set_io_priority(tid, s.io_priority)?;
        }
    }
    Ok(())
}

/// A score that cannot be lowered here (that takes CAP_SYS_RESOURCE) stays higher, with a warning.
fn out_of_memory_score(p: &Process, restored: &Restored) -> SysResult<()> {
    let path = format!("/proc/{}/oom_score_adj", restored.host);
    let failed = |call| move |path, source| SysError { call, object: path, source };
    let now = std::fs::read_to_string(&path).map_err(|e| failed("read")(path.clone(), e))?;
    let wanted = p.settings.oom_score_adj;
    if now.trim().parse() == Ok(wanted) {
        return Ok(());
    }
    match std::fs::write(&path, wanted.to_string()) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            tracing::warn!(pid = p.pid, wanted, "the out-of-memory score cannot be lowered here");
            Ok(())
        }
        other => other.map_err(|e| failed("write")(path.clone(), e)),
    }
}
