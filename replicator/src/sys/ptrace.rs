//! ptrace(2) and waitpid(2) for seized threads. All calls on a tracee must come from the thread
//! that seized it.

use super::error::{SysError, SysResult, check};
use crate::image::{Regs, Rseq};
use libc::{c_long, c_uint, c_void, iovec};

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GETSIGMASK: c_uint = 0x420a;
const PTRACE_SETSIGMASK: c_uint = 0x420b;
const PTRACE_PEEKSIGINFO: c_uint = 0x4209;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: c_uint = 0x420d;
/// An option: filters of seccomp do not count as long as it is set. Takes CAP_SYS_ADMIN.
pub const SUSPEND_SECCOMP: i32 = 1 << 21;
/// More than any processor's extended state (AVX-512 with AMX is 11 KiB).
pub const XSTATE_MAX: usize = 16 << 10;

/// Indices into [`Regs`].
#[allow(missing_docs, reason = "named after struct user_regs_struct")]
pub mod reg {
    pub const R15: usize = 0;
    pub const R14: usize = 1;
    pub const R13: usize = 2;
    pub const R12: usize = 3;
    pub const RBP: usize = 4;
    pub const RBX: usize = 5;
    pub const R11: usize = 6;
    pub const R10: usize = 7;
    pub const R9: usize = 8;
    pub const R8: usize = 9;
    pub const RAX: usize = 10;
    pub const RCX: usize = 11;
    pub const RDX: usize = 12;
    pub const RSI: usize = 13;
    pub const RDI: usize = 14;
    pub const ORIG_RAX: usize = 15;
    pub const RIP: usize = 16;
    pub const CS: usize = 17;
    pub const EFLAGS: usize = 18;
    pub const RSP: usize = 19;
    pub const SS: usize = 20;
    pub const FS_BASE: usize = 21;
    pub const GS_BASE: usize = 22;
}

const _: () = assert!(size_of::<libc::user_regs_struct>() == size_of::<Regs>());

/// What a waited-for tracee did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It stopped with a signal, of a ptrace event if `event` is not 0 (PTRACE_EVENT_).
    Stopped {
        /// The signal that it stopped with.
        signal: i32,
        /// PTRACE_EVENT_ number or 0.
        event: i32,
    },
    /// It exited with this code.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
}

impl Status {
    fn from_raw(raw: i32) -> Status {
        if libc::WIFSTOPPED(raw) {
            Status::Stopped { signal: libc::WSTOPSIG(raw), event: raw >> 16 }
        } else if libc::WIFSIGNALED(raw) {
            Status::Killed(libc::WTERMSIG(raw))
        } else {
            Status::Exited(libc::WEXITSTATUS(raw))
        }
    }

    /// Whether it is the stop that [`interrupt`] asks for (or a group stop).
    pub fn is_event_stop(self) -> bool {
        matches!(self, Status::Stopped { event: libc::PTRACE_EVENT_STOP, .. })
    }

    /// Whether the tracee is gone.
    pub fn is_end(self) -> bool {
        !matches!(self, Status::Stopped { .. })
    }
}

fn request(req: c_uint, name: &'static str, tid: i32, addr: usize, data: usize) -> SysResult<i64> {
    // SAFETY: callers pass addresses of live buffers of the size that the request reads or
    // writes; the kernel checks the tid.
    let r: c_long = unsafe { libc::ptrace(req, tid, addr as *mut c_void, data as *mut c_void) };
    check(r, name, || format!("tid {tid}"))
}

/// Attaches without stopping. `options` are PTRACE_O_ bits.
pub fn seize(tid: i32, options: i32) -> SysResult<()> {
    request(libc::PTRACE_SEIZE, "PTRACE_SEIZE", tid, 0, options as usize).map(drop)
}

/// Sets the options (PTRACE_O_ bits) of a stopped tracee.
pub fn set_options(tid: i32, options: i32) -> SysResult<()> {
    let options = options as usize;
    request(libc::PTRACE_SETOPTIONS, "PTRACE_SETOPTIONS", tid, 0, options).map(drop)
}

/// Whether a stopped tracee has so many seccomp filters and one more. Without the right to know
/// (CAP_SYS_ADMIN, and no filter of our own) it says no.
pub fn has_filter(tid: i32, index: usize) -> SysResult<bool> {
    // Nearly all have none: that is no error, and there is nothing to be allocated for it.
    // SAFETY: without a buffer only the length of the program is asked for.
    let r = unsafe {
        let (at, none) = (index as *mut c_void, std::ptr::null_mut::<c_void>());
        libc::ptrace(PTRACE_SECCOMP_GET_FILTER, tid, at, none)
    };
    match nix::errno::Errno::last_raw() {
        _ if r >= 0 => Ok(true),
        libc::EINVAL | libc::ENOENT | libc::EACCES => Ok(false),
        // One that is no classic program.
        libc::EMEDIUMTYPE => Ok(true),
        code => Err(SysError::errno("PTRACE_SECCOMP_GET_FILTER", format!("tid {tid}"), code)),
    }
}

/// A seccomp filter of a stopped tracee, the oldest first: its instructions (struct sock_filter),
/// and whether what it does is logged.
pub fn filter(tid: i32, index: usize) -> SysResult<(Vec<u8>, bool)> {
    const FLAG_LOG: u64 = 1 << 1;
    let name = "PTRACE_SECCOMP_GET_FILTER";
    let count = request(PTRACE_SECCOMP_GET_FILTER, name, tid, index, 0)? as usize;
    let mut program = vec![0u8; 8 * count];
    let data = program.as_mut_ptr() as usize;
    request(PTRACE_SECCOMP_GET_FILTER, name, tid, index, data)?;
    // struct seccomp_metadata: which filter, its flags.
    let mut metadata = [index as u64, 0];
    let (name, data) = ("PTRACE_SECCOMP_GET_METADATA", metadata.as_mut_ptr() as usize);
    request(PTRACE_SECCOMP_GET_METADATA, name, tid, size_of_val(&metadata), data)?;
    Ok((program, metadata[1] & FLAG_LOG != 0))
}

/// Asks a seized tracee to stop; wait for it with [`wait`].
pub fn interrupt(tid: i32) -> SysResult<()> {
    request(libc::PTRACE_INTERRUPT, "PTRACE_INTERRUPT", tid, 0, 0).map(drop)
}

/// Lets a stopped tracee run, with a signal to deliver or 0.
pub fn cont(tid: i32, signal: i32) -> SysResult<()> {
    request(libc::PTRACE_CONT, "PTRACE_CONT", tid, 0, signal as usize).map(drop)
}

/// Lets a tracee in a group stop stay in it, listening for events.
pub fn listen(tid: i32) -> SysResult<()> {
    request(libc::PTRACE_LISTEN, "PTRACE_LISTEN", tid, 0, 0).map(drop)
}

/// Executes one instruction of a stopped tracee.
pub fn step(tid: i32) -> SysResult<()> {
    request(libc::PTRACE_SINGLESTEP, "PTRACE_SINGLESTEP", tid, 0, 0).map(drop)
}

/// Lets a stopped tracee go for good; it gets `signal`, the one that it was stopped by, or 0.
pub fn detach(tid: i32, signal: i32) -> SysResult<()> {
    request(libc::PTRACE_DETACH, "PTRACE_DETACH", tid, 0, signal as usize).map(drop)
}

/// The message of the last event (PTRACE_GETEVENTMSG): the new tid of a clone, for example.
pub fn event_message(tid: i32) -> SysResult<u64> {
    let mut message = 0u64;
    let data = (&raw mut message) as usize;
    request(libc::PTRACE_GETEVENTMSG, "PTRACE_GETEVENTMSG", tid, 0, data)?;
    Ok(message)
}

/// Why the signal was sent that a tracee has stopped with: si_code of sigaction(2). Above 0 the
/// kernel sent it, for a fault of the thread or a timer; else somebody did.
pub fn signal_code(tid: i32) -> SysResult<i32> {
    let mut info = [0i32; 32];
    let data = info.as_mut_ptr() as usize;
    request(libc::PTRACE_GETSIGINFO, "PTRACE_GETSIGINFO", tid, 0, data)?;
    Ok(info[2])
}

/// Waits for a tracee (waitpid(2) with __WALL).
pub fn wait(tid: i32) -> SysResult<Status> {
    loop {
        let mut raw = 0;
        // SAFETY: `raw` is ours and live.
        let r = unsafe { libc::waitpid(tid, &mut raw, libc::__WALL) };
        if r == tid {
            return Ok(Status::from_raw(raw));
        }
        if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Err(SysError::last("waitpid", format!("tid {tid}")));
        }
    }
}

/// Whether a [`wait`] for a tracee would return at once, also because there is none; the event
/// stays.
pub fn poll(tid: i32) -> SysResult<Option<()>> {
    // SAFETY: an all-zero siginfo_t is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: `info` is ours and live.
    let r = unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, &mut info, flags) };
    if r < 0 {
        return match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::ECHILD) => Ok(Some(())),
            Some(libc::EINTR) => Ok(None),
            _ => Err(SysError::last("waitid", format!("tid {tid}"))),
        };
    }
    // SAFETY: the kernel fills si_pid in for a child's event, and leaves 0 if there was none.
    Ok((unsafe { info.si_pid() } != 0).then_some(()))
}

/// The next event of one tracee (`tid`) or any child of this thread's process (-1), without
/// waiting.
pub fn poll_wait(tid: i32) -> SysResult<Option<(i32, Status)>> {
    Ok(match hear(tid, libc::WNOHANG)? {
        Heard::Event(tid, status) => Some((tid, status)),
        Heard::Nothing | Heard::NoTracee => None,
    })
}

/// The event of a tracee, if it waits. One that is gone has ended.
pub fn wait_now(tid: i32) -> SysResult<Option<Status>> {
    Ok(match hear(tid, libc::WNOHANG)? {
        Heard::Event(_, status) => Some(status),
        Heard::NoTracee => Some(Status::Exited(0)),
        Heard::Nothing => None,
    })
}

/// Waits until any tracee of the calling thread has an event to tell, or a signal comes. For whoever waits
/// for one of several: a thread that dies may wait in the kernel until its tracer has taken note of
/// the end of another one.
pub fn wait_any() -> SysResult<Heard> {
    hear(-1, libc::__WNOTHREAD)
}

/// As [`wait`], where all other tracees of the calling thread stand still. If one of them has an
/// event to tell, it was killed, perhaps with this one: then its end may never come as long as
/// nobody takes note of theirs, so a tracee that is on its way out gives ESRCH.
pub fn wait_unless_exiting(tid: i32) -> SysResult<Status> {
    loop {
        if let Some(status) = wait_now(tid)? {
            return Ok(status);
        }
        // SAFETY: an all-zero siginfo_t is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let kinds = libc::WEXITED | libc::WSTOPPED;
        let flags = kinds | libc::WNOWAIT | libc::__WALL | libc::__WNOTHREAD;
        // SAFETY: `info` is ours and live.
        let r = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, flags) };
        // SAFETY: waitid has filled it in, or it is all zeros.
        if r == 0 && unsafe { info.si_pid() } != tid {
            if is_exiting(tid) {
                return Err(SysError::errno("waitpid", format!("tid {tid}"), libc::ESRCH));
            }
            std::thread::sleep(OTHERS);
        }
    }
}

/// Pause between looks at a tracee while another one has something to tell.
const OTHERS: std::time::Duration = std::time::Duration::from_micros(50);

/// Whether a thread is on its way out, as proc_pid_stat(5) tells it (PF_EXITING), or gone.
fn is_exiting(tid: i32) -> bool {
    const EXITING: u64 = 4;
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{tid}/stat")) else { return true };
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse().ok());
    flags.is_none_or(|flags: u64| flags & EXITING != 0)
}

/// The next event of any tracee of the calling thread, without waiting. Children of other
/// threads of this process are left alone (__WNOTHREAD).
pub fn next_event() -> SysResult<Option<(i32, Status)>> {
    Ok(match hear(-1, libc::WNOHANG | libc::__WNOTHREAD)? {
        Heard::Event(tid, status) => Some((tid, status)),
        Heard::Nothing | Heard::NoTracee => None,
    })
}

/// What waitpid(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Of this tracee.
    Event(i32, Status),
    /// Nothing yet, or a signal came first.
    Nothing,
    /// There is none to hear of.
    NoTracee,
}

/// Asks for the event of a tracee, or of any (-1).
fn hear(who: i32, flags: i32) -> SysResult<Heard> {
    let mut raw = 0;
    // SAFETY: `raw` is ours and live.
    let r = unsafe { libc::waitpid(who, &mut raw, libc::__WALL | flags) };
    match r {
        0 => Ok(Heard::Nothing),
        r if r > 0 => Ok(Heard::Event(r, Status::from_raw(raw))),
        _ => match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::ECHILD) => Ok(Heard::NoTracee),
            Some(libc::EINTR) => Ok(Heard::Nothing),
            _ => Err(SysError::last("waitpid", format!("tid {who}"))),
        },
    }
}

/// General registers of a stopped tracee.
pub fn regs(tid: i32) -> SysResult<Regs> {
    get_regs(tid).map(|(regs, _)| regs)
}

/// Registers, and how many bytes of them the kernel gave.
fn get_regs(tid: i32) -> SysResult<(Regs, usize)> {
    let mut regs: Regs = [0; 27];
    let mut iov = iovec { iov_base: regs.as_mut_ptr().cast(), iov_len: size_of::<Regs>() };
    let data = (&raw mut iov) as usize;
    request(libc::PTRACE_GETREGSET, "PTRACE_GETREGSET", tid, NT_PRSTATUS, data)?;
    Ok((regs, iov.iov_len))
}

/// Whether a stopped tracee runs code of 64 bits: the kernel gives fewer registers otherwise.
pub fn is_wide(tid: i32) -> SysResult<bool> {
    get_regs(tid).map(|(_, len)| len == size_of::<Regs>())
}

/// Sets the general registers of a stopped tracee.
pub fn set_regs(tid: i32, regs: &Regs) -> SysResult<()> {
    let iov = iovec { iov_base: regs.as_ptr() as *mut c_void, iov_len: size_of::<Regs>() };
    let data = (&raw const iov) as usize;
    request(libc::PTRACE_SETREGSET, "PTRACE_SETREGSET", tid, NT_PRSTATUS, data).map(drop)
}

/// Extended state of a stopped tracee, into a buffer that is used again.
pub fn xstate(tid: i32, out: &mut Vec<u8>) -> SysResult<()> {
    // Nothing to do for a buffer that was made with as much.
    out.resize(XSTATE_MAX, 0);
    let mut iov = iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let data = (&raw mut iov) as usize;
    request(libc::PTRACE_GETREGSET, "PTRACE_GETREGSET", tid, NT_X86_XSTATE, data)?;
    out.truncate(iov.iov_len);
    Ok(())
}

/// Sets the extended state of a stopped tracee.
pub fn set_xstate(tid: i32, state: &[u8]) -> SysResult<()> {
    let iov = iovec { iov_base: state.as_ptr() as *mut c_void, iov_len: state.len() };
    let data = (&raw const iov) as usize;
    request(libc::PTRACE_SETREGSET, "PTRACE_SETREGSET", tid, NT_X86_XSTATE, data).map(drop)
}

/// Blocked signals of a stopped tracee.
pub fn blocked(tid: i32) -> SysResult<u64> {
    let mut mask = 0u64;
    let data = (&raw mut mask) as usize;
    request(PTRACE_GETSIGMASK, "PTRACE_GETSIGMASK", tid, 8, data)?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped tracee.
pub fn set_blocked(tid: i32, mask: u64) -> SysResult<()> {
    let data = (&raw const mask) as usize;
    request(PTRACE_SETSIGMASK, "PTRACE_SETSIGMASK", tid, 8, data).map(drop)
}

#[repr(C)]
struct PeekArgs {
    offset: u64,
    flags: u32,
    count: i32,
}

/// Pending signals of a stopped tracee, its own or those of its whole process, as raw
/// siginfo_t of 128 bytes each.
pub fn pending(tid: i32, of_process: bool) -> SysResult<Vec<Vec<u8>>> {
    const BATCH: usize = 8;
    let mut all = Vec::new();
    loop {
        let args =
            PeekArgs { offset: all.len() as u64, flags: of_process as u32, count: BATCH as i32 };
        let mut infos = [[0u8; 128]; BATCH];
        let n = request(
            PTRACE_PEEKSIGINFO,
            "PTRACE_PEEKSIGINFO",
            tid,
            (&raw const args) as usize,
            infos.as_mut_ptr() as usize,
        )? as usize;
        all.extend(infos[..n].iter().map(|i| i.to_vec()));
        if n < BATCH {
            return Ok(all);
        }
    }
}

#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    address: u64,
    len: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// The restartable sequences area that a stopped tracee has registered.
pub fn rseq(tid: i32) -> SysResult<Option<Rseq>> {
    let mut c = RseqConfiguration::default();
    let data = (&raw mut c) as usize;
    request(
        PTRACE_GET_RSEQ_CONFIGURATION,
        "PTRACE_GET_RSEQ_CONFIGURATION",
        tid,
        size_of::<RseqConfiguration>(),
        data,
    )?;
    Ok((c.address != 0).then_some(Rseq { address: c.address, len: c.len, signature: c.signature }))
}

/// Head and length of a thread's robust futex list, see get_robust_list(2).
pub fn robust_list(tid: i32) -> SysResult<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both words are ours and live.
    let r = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &mut head, &mut len) };
    check(r, "get_robust_list", || format!("tid {tid}"))?;
    Ok((head, len))
}
