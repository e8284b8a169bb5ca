//! Where and when our threads run: sched_setscheduler(2), sched_setaffinity(2), setpriority(2).

use super::error::{SysResult, check};

/// SCHED_RESET_ON_FORK: threads and processes made by a real-time thread are ordinary.
const RESET_ON_FORK: i32 = 0x4000_0000;

/// Makes the calling thread real-time (SCHED_FIFO) with a priority from 1 to 99. Children are
/// ordinary.
pub fn set_fifo(priority: i32) -> SysResult<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the kernel reads one struct sched_param.
    let r = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | RESET_ON_FORK, &param) };
    check(r.into(), "sched_setscheduler(SCHED_FIFO)", || "this thread".into()).map(drop)
}

/// Makes the calling thread an ordinary one again (SCHED_OTHER); its nice value counts.
pub fn set_ordinary() -> SysResult<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one struct sched_param.
    let r = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER | RESET_ON_FORK, &param) };
    check(r.into(), "sched_setscheduler(SCHED_OTHER)", || "this thread".into()).map(drop)
}

/// Pins a thread (0: the calling one) to processors.
pub fn set_affinity(tid: i32, cpus: &[usize]) -> SysResult<()> {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        // SAFETY: CPU_SET ignores numbers beyond the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads one cpu_set_t.
    let r = unsafe { libc::sched_setaffinity(tid, size_of::<libc::cpu_set_t>(), &set) };
    check(r.into(), "sched_setaffinity", || format!("tid {tid}, cpus {cpus:?}")).map(drop)
}

/// The processors that a thread (0: the calling one) may run on.
pub fn affinity(tid: i32) -> SysResult<Vec<usize>> {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one cpu_set_t.
    let r = unsafe { libc::sched_getaffinity(tid, size_of::<libc::cpu_set_t>(), &mut set) };
    check(r.into(), "sched_getaffinity", || format!("tid {tid}"))?;
    // SAFETY: CPU_ISSET reads within the set.
    Ok((0..libc::CPU_SETSIZE as usize).filter(|c| unsafe { libc::CPU_ISSET(*c, &set) }).collect())
}

/// Sets the nice value of the calling thread, -20 to 19.
pub fn set_nice(nice: i32) -> SysResult<()> {
    // SAFETY: no pointers. On Linux the value is the thread's, not the process's.
    let r = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    check(r.into(), "setpriority", || format!("this thread to {nice}")).map(drop)
}
