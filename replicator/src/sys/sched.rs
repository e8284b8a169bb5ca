//! Where and when our threads run: sched_setscheduler(2), sched_setaffinity(2), setpriority(2).

use super::error::{SysResult, check};
use crate::image::task::Scheduling;

/// SCHED_RESET_ON_FORK: threads and processes made by a real-time thread are ordinary.
const RESET_ON_FORK: i32 = 0x4000_0000;

/// Makes the calling thread real-time (SCHED_FIFO) with a priority from 1 to 99. Children are
/// ordinary.
pub fn set_fifo(priority: i32) -> SysResult<()> {
    set_fifo_of(0, priority)
}

/// As [`set_fifo_of`], and what it makes, threads and children, begins as real-time, too.
pub fn set_fifo_with_children(tid: i32, priority: i32) -> SysResult<()> {
    fifo(tid, libc::SCHED_FIFO, priority)
}

/// As [`set_fifo`], for another thread (0: the calling one).
pub fn set_fifo_of(tid: i32, priority: i32) -> SysResult<()> {
    fifo(tid, libc::SCHED_FIFO | RESET_ON_FORK, priority)
}

fn fifo(tid: i32, policy: i32, priority: i32) -> SysResult<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the kernel reads one struct sched_param.
    let r = unsafe { libc::sched_setscheduler(tid, policy, &param) };
    check(r.into(), "sched_setscheduler(SCHED_FIFO)", || format!("tid {tid}, 0 is this one"))
        .map(drop)
}

/// Makes the calling thread an ordinary one again (SCHED_OTHER); its nice value counts, and it is no [patient](set_patient)
/// one any more.
pub fn set_ordinary() -> SysResult<()> {
    // sched_setscheduler(2) would leave it the slice that it was given; no time is what asks for the usual one.
    set_fair(nice_of(0)?, 0)
}

/// Makes the calling thread an ordinary one that works for long: others with its priority go before it as soon as they
/// have something to do (from Linux 6.12 on; before, it is as any other).
pub fn set_patient(nice: i32) -> SysResult<()> {
    /// The longest slice that there is, in nanoseconds.
    const SLICE: u64 = 100_000_000;
    set_fair(nice, SLICE)
}

fn set_fair(nice: i32, slice: u64) -> SysResult<()> {
    const FLAG_RESET_ON_FORK: u64 = 1;
    let policy = libc::SCHED_OTHER as u32;
    let ordinary = Scheduling { policy, flags: FLAG_RESET_ON_FORK, nice, ..Scheduling::default() };
    set_attributes(0, &Scheduling { runtime: slice, ..ordinary })
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

/// The nice value of a thread (0: the calling one), whatever its class.
pub fn nice_of(tid: i32) -> SysResult<i32> {
    // SAFETY: no pointers. The kernel gives 20 less the value, so that none is negative.
    let r = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    check(r, "getpriority", || format!("tid {tid}, 0 is this one")).map(|r| 20 - r as i32)
}

/// Sets the nice value of the calling thread, -20 to 19.
pub fn set_nice(nice: i32) -> SysResult<()> {
    set_nice_of(0, nice)
}

/// As [`set_nice`], for another thread (0: the calling one).
pub fn set_nice_of(tid: i32, nice: i32) -> SysResult<()> {
    // SAFETY: no pointers. On Linux the value is the thread's, not the process's.
    let r = unsafe { libc::setpriority(libc::PRIO_PROCESS, tid as libc::id_t, nice) };
    check(r.into(), "setpriority", || format!("tid {tid} to {nice}, 0 is this one")).map(drop)
}

/// Processor time that the calling thread has used so far, clock_gettime(2).
pub fn thread_time() -> std::time::Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_or(std::time::Duration::ZERO, std::time::Duration::from)
}

/// IOPRIO_WHO_PROCESS of ioprio_set(2): one thread.
const ONE_THREAD: i32 = 1;

/// struct sched_attr in its first version, which all kernels since 3.14 take.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}
const _: () = assert!(size_of::<SchedAttr>() == 48);

/// Scheduling class, priority and nice value of a thread, see sched_getattr(2).
pub fn attributes(tid: i32) -> SysResult<Scheduling> {
    let mut a = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the kernel writes at most `size` bytes of `a`.
    let r = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &mut a, size, 0) };
    check(r, "sched_getattr", || format!("tid {tid}"))?;
    let SchedAttr { policy, flags, nice, priority, runtime, deadline, period, .. } = a;
    Ok(Scheduling { policy, flags, nice, priority, runtime, deadline, period })
}

/// Sets them.
pub fn set_attributes(tid: i32, s: &Scheduling) -> SysResult<()> {
    let a = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: s.policy,
        flags: s.flags,
        nice: s.nice,
        priority: s.priority,
        runtime: s.runtime,
        deadline: s.deadline,
        period: s.period,
    };
    // SAFETY: the kernel reads one struct sched_attr of the size that it says.
    let r = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &a, 0) };
    check(r, "sched_setattr", || format!("tid {tid}, policy {}", s.policy)).map(drop)
}

/// The input and output priority of a thread, see ioprio_get(2).
pub fn io_priority(tid: i32) -> SysResult<i32> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_THREAD, tid) };
    check(r, "ioprio_get", || format!("tid {tid}")).map(|p| p as i32)
}

/// Sets it.
pub fn set_io_priority(tid: i32, priority: i32) -> SysResult<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_THREAD, tid, priority) };
    check(r, "ioprio_set", || format!("tid {tid}")).map(drop)
}

/// The processors that a thread may run on, as a bit set without trailing zeros.
pub fn processors(tid: i32) -> SysResult<Vec<u64>> {
    let mut set = [0u64; 16];
    // SAFETY: the kernel writes at most the given number of bytes into `set`.
    let r = unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&set), set.as_mut_ptr())
    };
    check(r, "sched_getaffinity", || format!("tid {tid}"))?;
    let used = set.iter().rposition(|w| *w != 0).map_or(0, |i| i + 1);
    Ok(set[..used].to_vec())
}

/// Lets a thread run on these processors alone.
pub fn set_processors(tid: i32, set: &[u64]) -> SysResult<()> {
    // SAFETY: the kernel reads the given number of bytes of `set`.
    let r =
        unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, size_of_val(set), set.as_ptr()) };
    check(r, "sched_setaffinity", || format!("tid {tid}")).map(drop)
}

/// Number of processors that run.
pub fn online() -> u32 {
    // SAFETY: no pointers.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patient_thread_is_ordinary_again_after_it_was_real_time() {
        let of = || attributes(0).expect("its own");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let usual = of();
                set_nice(3).expect("less is always allowed");
                set_patient(3).expect("as nice as before");
                // A kernel before 6.12 has one slice for all.
                assert!(of().runtime >= usual.runtime);
                if let Err(error) = set_fifo(1) {
                    println!("not real-time: {error}");
                }
                set_ordinary().expect("less is always allowed");
                let now = of();
                assert_eq!((now.policy, now.nice, now.runtime), (usual.policy, 3, usual.runtime));
            });
        });
    }
}
