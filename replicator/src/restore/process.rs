//! What belongs to a process as a whole, and its threads: all but registers and signals pending.

use super::error::{Doing, RestoreError};
use super::script::Script;
use super::settings;
use super::spare::Stub;
use super::tree::outside;
use crate::image::{Credentials, Process, Thread};
use crate::sys::remote::DATA_LEN;
use crate::sys::{SysError, SysResult, memory, ptrace};

const PR_SET_MM_MAP: u64 = 14;
/// Signals that a stub's children can have sent it: SIGCHLD and a few others.
const FORGOTTEN: usize = 4;
const CLONE_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// Memory fields, signal dispositions, umask, working directory.
pub(super) fn attributes(
    script: &mut Script,
    stub: &Stub,
    p: &Process,
) -> Result<(), RestoreError> {
    memory_fields(script, stub, p);
    script.call("umask", libc::SYS_umask, &[u64::from(p.umask)]);
    if !p.cwd.is_empty() {
        let cwd = script.text(&p.cwd);
        script.call_on("chdir", p.cwd.clone(), libc::SYS_chdir, &[cwd]);
    }
    settings::of_process(script, p);
    script.run_ok(stub.host).doing(stub.pid, "set the attributes").map(drop)
}

/// Signal dispositions. What came to the stub itself while it followed is forgotten.
pub(super) fn actions(script: &mut Script, stub: &Stub, p: &Process) -> Result<(), RestoreError> {
    for a in &p.actions {
        let action = script.words(&[a.handler, a.flags, a.restorer, a.mask]);
        let args = [u64::from(a.signal), action, 0, 8];
        script.call_on(
            "rt_sigaction",
            format!("signal {}", a.signal),
            libc::SYS_rt_sigaction,
            &args,
        );
    }
    script.run_ok(stub.host).doing(stub.pid, "set the signal dispositions")?;
    // Its children have ended: one signal of each kind at most.
    let (all, now) = (script.words(&[u64::MAX]), script.words(&[0, 0]));
    for _ in 0..FORGOTTEN {
        script.call("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, &[all, 0, now, 8]);
    }
    script.run(stub.host).doing(stub.pid, "forget signals of the stub").map(drop)
}

/// PR_SET_MM_MAP with the program's file, see prctl(2).
fn memory_fields(script: &mut Script, stub: &Stub, p: &Process) {
    let m = &p.mm;
    let mut exe_fd = u32::MAX;
    let is_there = || std::fs::metadata(outside(stub.host, &p.exe)).is_ok();
    if !p.exe.is_empty() && !is_there() {
        // It was removed or renamed after it was started: what counts of it is mapped.
        tracing::warn!(pid = p.pid, exe = p.exe, "the program is not at its path any more");
    } else if !p.exe.is_empty() {
        let path = script.text(&p.exe);
        let args = [path, (libc::O_RDONLY | libc::O_CLOEXEC) as u64, 0];
        script.call_on("open", p.exe.clone(), libc::SYS_open, &args);
        // No other descriptor is open below the channel: the file became 0.
        exe_fd = 0;
    }
    let auxv = script.data(&p.auxv);
    let fields = [
        m.start_code,
        m.end_code,
        m.start_data,
        m.end_data,
        m.start_brk,
        m.brk,
        m.start_stack,
        m.arg_start,
        m.arg_end,
        m.env_start,
        m.env_end,
        auxv,
        p.auxv.len() as u64 | u64::from(exe_fd) << 32,
    ];
    let map = script.words(&fields);
    let args = [libc::PR_SET_MM as u64, PR_SET_MM_MAP, map, 8 * fields.len() as u64, 0];
    script.call("prctl(PR_SET_MM_MAP)", libc::SYS_prctl, &args);
    if exe_fd == 0 {
        script.call("close", libc::SYS_close, &[0]);
    }
}

/// Resource limits. A hard limit that cannot be raised here (that takes CAP_SYS_RESOURCE) stays
/// lower, with a warning: better a container with a lower limit than none.
pub(super) fn limits(script: &mut Script, stub: &Stub, p: &Process) -> Result<(), RestoreError> {
    const DOING: &str = "set the resource limits";
    let mut places = Vec::with_capacity(p.limits.len());
    for (resource, ..) in &p.limits {
        let place = script.words(&[0, 0]);
        places.push(place);
        script.call("prlimit", libc::SYS_prlimit64, &[0, u64::from(*resource), 0, place]);
    }
    if places.is_empty() {
        return Ok(());
    }
    script.run_ok(stub.host).doing(stub.pid, DOING)?;
    let mut now = vec![0; 16 * places.len()];
    memory::read(stub.host, places[0], &mut now).doing(stub.pid, DOING)?;
    let word = |at: usize| u64::from_ne_bytes(now[at..at + 8].try_into().expect("eight bytes"));
    let mut asked = Vec::new();
    for (i, &(resource, soft, hard)) in p.limits.iter().enumerate() {
        let has = (word(16 * i), word(16 * i + 8));
        if has != (soft, hard) {
            let wanted = script.words(&[soft, hard]);
            script.call("prlimit", libc::SYS_prlimit64, &[0, u64::from(resource), wanted, 0]);
            asked.push((resource, soft, has.1));
        }
    }
    let results = script.run(stub.host).doing(stub.pid, DOING)?;
    for ((resource, soft, hard), result) in asked.into_iter().zip(results) {
        if result == -i64::from(libc::EPERM) {
            tracing::warn!(pid = stub.pid, resource, hard, "a hard limit cannot be raised here");
            let lower = script.words(&[soft.min(hard), hard]);
            script.call("prlimit", libc::SYS_prlimit64, &[0, u64::from(resource), lower, 0]);
        } else if result < 0 {
            let source = SysError::errno("prlimit", format!("resource {resource}"), -result as i32);
            return Err(RestoreError::Kernel { pid: stub.pid, doing: DOING, source });
        }
    }
    script.run_ok(stub.host).doing(stub.pid, DOING).map(drop)
}

/// Creates the threads but for the leader, with their tids. Gives the host's tids of all.
pub(super) fn threads(
    script: &mut Script,
    stub: &Stub,
    p: &Process,
) -> Result<Vec<i32>, RestoreError> {
    let mut tids = vec![stub.host];
    let rest = p.threads.get(1..).unwrap_or_default();
    for part in rest.chunks(DATA_LEN / 256) {
        for thread in part {
            let tid = script.data(&thread.tid.to_ne_bytes());
            let args = script.words(&[CLONE_FLAGS as u64, 0, 0, 0, 0, 0, 0, 0, tid, 1, 0]);
            script.call_on("clone3", format!("tid {}", thread.tid), libc::SYS_clone3, &[args, 88]);
        }
        script.run_ok_spawning(stub.host, &mut tids).doing(stub.pid, "create the threads")?;
    }
    if tids.len() != p.threads.len() {
        let source = SysError::errno("PTRACE_EVENT_CLONE", "a thread", libc::ECHILD);
        return Err(RestoreError::Kernel { pid: stub.pid, doing: "create the threads", source });
    }
    for (thread, &tid) in p.threads.iter().zip(&tids) {
        one_thread(script, thread);
        script.run_ok(tid).doing(stub.pid, "set up a thread")?;
    }
    Ok(tids)
}

/// What the kernel keeps for each thread.
fn one_thread(script: &mut Script, t: &Thread) {
    const SS_ONSTACK: u64 = 1;
    const SS_DISABLE: u64 = 2;
    let name = script.text(&t.comm);
    script.call("prctl(PR_SET_NAME)", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
    script.call("set_tid_address", libc::SYS_set_tid_address, &[t.tid_address]);
    let (head, len) = t.robust_list;
    let len = if head == 0 { 24 } else { len };
    script.call("set_robust_list", libc::SYS_set_robust_list, &[head, len]);
    if let Some(rseq) = t.rseq {
        let args = [rseq.address, u64::from(rseq.len), 0, u64::from(rseq.signature)];
        script.call("rseq", libc::SYS_rseq, &args);
    }
    let (pointer, flags, size) = t.altstack;
    let flags = if size == 0 { SS_DISABLE } else { flags & !SS_ONSTACK };
    let stack = script.words(&[pointer, flags & 0xffff_ffff, size]);
    script.call("sigaltstack", libc::SYS_sigaltstack, &[stack, 0]);
    let args = [libc::PR_SET_TIMERSLACK as u64, t.settings.timer_slack];
    script.call("prctl(PR_SET_TIMERSLACK)", libc::SYS_prctl, &args);
}

/// Where a thread goes on that was inside a restartable sequence: at its abort handler, since it
/// has been preempted. Must be read before the area is registered.
pub(super) fn resume_address(host: i32, t: &Thread) -> SysResult<u64> {
    const CRITICAL_SECTION: u64 = 8;
    let rip = t.regs[ptrace::reg::RIP];
    let Some(rseq) = t.rseq else { return Ok(rip) };
    let mut pointer = [0; 8];
    memory::read(host, rseq.address + CRITICAL_SECTION, &mut pointer)?;
    let pointer = u64::from_ne_bytes(pointer);
    if pointer == 0 {
        return Ok(rip);
    }
    // struct rseq_cs: version and flags, start, length, abort handler.
    let mut section = [0; 32];
    if memory::read(host, pointer, &mut section).is_err() {
        return Ok(rip);
    }
    let word = |i: usize| u64::from_ne_bytes(section[8 * i..8 * i + 8].try_into().expect("8"));
    let (start, len, abort) = (word(1), word(2), word(3));
    Ok(if rip.wrapping_sub(start) < len { abort } else { rip })
}

/// User, groups and capabilities of one thread, which has those of `now`. It cannot get a
/// capability that it does not have.
pub(super) fn credentials(script: &mut Script, c: &Credentials, now: &Credentials) {
    const NO_SETUID_FIXUP: u64 = 1 << 2;
    const KEEP_CAPS: u64 = 1 << 4;
    const CAP_SETPCAP: u32 = 8;
    let can = now.caps[1];
    let [inheritable, permitted, effective, bounding, ambient] = c.caps;
    let [inheritable, permitted, effective, ambient] =
        [inheritable, permitted, effective, ambient].map(|caps| caps & can);
    let prctl = |script: &mut Script, name, args: &[u64]| {
        script.call(name, libc::SYS_prctl, args);
    };
    // Changing user ids must not touch the capabilities: those are set one by one below.
    let bits = NO_SETUID_FIXUP | KEEP_CAPS;
    prctl(script, "prctl(PR_SET_SECUREBITS)", &[libc::PR_SET_SECUREBITS as u64, bits]);
    let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let list = script.data(&groups);
    script.call("setgroups", libc::SYS_setgroups, &[c.groups.len() as u64, list]);
    let [real, effective_id, saved, fs] = c.gids.map(u64::from);
    script.call("setresgid", libc::SYS_setresgid, &[real, effective_id, saved]);
    script.call("setfsgid", libc::SYS_setfsgid, &[fs]);
    let [real, effective_id, saved, fs] = c.uids.map(u64::from);
    script.call("setresuid", libc::SYS_setresuid, &[real, effective_id, saved]);
    script.call("setfsuid", libc::SYS_setfsuid, &[fs]);
    for bit in (0..64).filter(|b| now.caps[3] & !bounding & (1 << b) != 0) {
        let args = [libc::PR_CAPBSET_DROP as u64, bit];
        prctl(script, "prctl(PR_CAPBSET_DROP)", &args);
    }
    // Setting the securebits takes CAP_SETPCAP, and they can forbid to raise ambient capabilities:
    // those come first, and the last capability goes last.
    let setpcap = can & (1 << CAP_SETPCAP);
    capset(script, [effective | setpcap, permitted | setpcap, inheritable]);
    for bit in (0..64).filter(|b| ambient & (1 << b) != 0) {
        let args = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, bit, 0, 0];
        prctl(script, "prctl(PR_CAP_AMBIENT)", &args);
    }
    let bits = u64::from(c.securebits);
    prctl(script, "prctl(PR_SET_SECUREBITS)", &[libc::PR_SET_SECUREBITS as u64, bits]);
    capset(script, [effective, permitted, inheritable]);
    if c.no_new_privs {
        prctl(script, "prctl(PR_SET_NO_NEW_PRIVS)", &[libc::PR_SET_NO_NEW_PRIVS as u64, 1]);
    }
}

/// Version 3 of capset(2): two elements of effective, permitted, inheritable, low halves first.
fn capset(script: &mut Script, sets: [u64; 3]) {
    let header = script.data(&[0x2008_0522u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat());
    let (low, high) = (sets.map(|c| c as u32), sets.map(|c| (c >> 32) as u32));
    let sets: Vec<u8> = low.iter().chain(&high).flat_map(|w| w.to_ne_bytes()).collect();
    let sets = script.data(&sets);
    script.call("capset", libc::SYS_capset, &[header, sets]);
}

/// Credentials of a process by its status file in /proc.
pub(super) fn credentials_now(host: i32) -> SysResult<Credentials> {
    let path = format!("/proc/{host}/status");
    let text = std::fs::read_to_string(&path).map_err(|source| SysError {
        call: "read",
        object: path,
        source,
    })?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or("").trim()
    };
    let ids = |name| {
        let mut all = field(name).split_whitespace().map(|n| n.parse().unwrap_or(0));
        std::array::from_fn(|_| all.next().unwrap_or(0))
    };
    let caps = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
        .map(|name| u64::from_str_radix(field(name), 16).unwrap_or(0));
    Ok(Credentials {
        uids: ids("Uid"),
        gids: ids("Gid"),
        groups: field("Groups").split_whitespace().filter_map(|g| g.parse().ok()).collect(),
        caps,
        no_new_privs: field("NoNewPrivs") == "1",
        securebits: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Rseq;

    #[test]
    fn a_thread_inside_a_restartable_sequence_goes_on_where_it_is_aborted() {
        const START: u64 = 0x5000_1000;
        const ABORT: u64 = 0x5000_9000;
        // struct rseq_cs: version and flags, start, length, abort handler.
        let section = [0u64, START, 0x20, ABORT];
        // struct rseq: processor numbers, then the section.
        let area = [0u64, section.as_ptr() as u64, 0, 0];
        let empty = [0u64; 4];
        let me = std::process::id() as i32;
        let resumes_at = |area: &[u64; 4], rip| {
            let address = area.as_ptr() as u64;
            let rseq = Some(Rseq { address, len: 32, signature: 0x5305_3053 });
            let mut thread = Thread { rseq, ..Thread::default() };
            thread.regs[ptrace::reg::RIP] = rip;
            resume_address(me, &thread).expect("an address")
        };
        assert_eq!(resumes_at(&area, START), ABORT);
        assert_eq!(resumes_at(&area, START + 0x1f), ABORT);
        for outside in [START - 1, START + 0x20, ABORT] {
            assert_eq!(resumes_at(&area, outside), outside);
        }
        assert_eq!(resumes_at(&empty, START), START, "in no section");
        let thread = Thread::default();
        assert_eq!(resume_address(me, &thread).expect("an address"), 0, "not registered");
    }
}
