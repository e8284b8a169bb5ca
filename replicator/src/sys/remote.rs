//! System calls made by another process on our behalf.
//!
//! A stopped tracee gets a small *scratch* mapping of its own: a page of code, a table of calls,
//! and room for their arguments. The code walks the table and makes each call in turn, then
//! traps: a whole batch costs one resume and one wait (about 10 us), where a call by itself
//! costs as much each time.
//!
//! ```text
//! SCRATCH            +0x1000                    +0x11000            +SCRATCH_LEN
//! | code (r-x)       | table: 1024 x 64 bytes   | data              |
//! ```
//! A table entry is eight words: number, six arguments, result.

use super::error::{SysError, SysResult};
use super::memory;
use super::ptrace::{self, Status, reg};
use crate::image::Regs;

/// Where the scratch mapping lies: below any address that a program is loaded at.
pub const SCRATCH: u64 = 0x1_0000;
/// Its length in bytes.
pub const SCRATCH_LEN: u64 = 0x4_0000;
const TABLE: u64 = SCRATCH + 0x1000;
/// Most calls in one batch.
pub const MAX_CALLS: usize = 1024;
/// Room for arguments in memory.
pub const DATA: u64 = TABLE + (MAX_CALLS * ENTRY) as u64;
/// Bytes of it.
pub const DATA_LEN: usize = (SCRATCH + SCRATCH_LEN - DATA) as usize;
const ENTRY: usize = 64;

/// The loop. r12 points to the next entry, r13 counts down; a system call clobbers only rax,
/// rcx and r11.
const CODE: [u8; 56] = [
    0x4d, 0x85, 0xed, // loop: test r13, r13
    0x74, 0x32, //             jz done
    0x49, 0x8b, 0x04, 0x24, // mov rax, [r12]
    0x49, 0x8b, 0x7c, 0x24, 0x08, // mov rdi, [r12+8]
    0x49, 0x8b, 0x74, 0x24, 0x10, // mov rsi, [r12+16]
    0x49, 0x8b, 0x54, 0x24, 0x18, // mov rdx, [r12+24]
    0x4d, 0x8b, 0x54, 0x24, 0x20, // mov r10, [r12+32]
    0x4d, 0x8b, 0x44, 0x24, 0x28, // mov r8, [r12+40]
    0x4d, 0x8b, 0x4c, 0x24, 0x30, // mov r9, [r12+48]
    0x0f, 0x05, // syscall
    0x49, 0x89, 0x44, 0x24, 0x38, // mov [r12+56], rax
    0x49, 0x83, 0xc4, 0x40, // add r12, 64
    0x49, 0xff, 0xcd, // dec r13
    0xeb, 0xc9, // jmp loop
    0xcc, // done: int3
];

/// Signals that stay deliverable while a batch runs: the trap that ends it.
const BLOCK_ALL_BUT_TRAP: u64 = !(1 << (libc::SIGTRAP - 1));

/// What is reported of a SIGSTOP that waited, which no mask can block.
const SIGSTOP_COMES: Status = Status::Stopped { signal: libc::SIGSTOP, event: 0 };

/// One system call: number and arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// SYS_ number.
    pub number: i64,
    /// Arguments, the unused ones 0.
    pub args: [u64; 6],
}

impl Call {
    /// A call with up to six arguments.
    pub fn new(number: i64, args: &[u64]) -> Self {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        Self { number, args: all }
    }
}

/// Makes one call in a stopped thread through a `syscall` instruction found at `gadget`, by
/// single step. The thread's registers are put back. Returns what the call returned (-errno
/// included).
pub fn call_at(tid: i32, gadget: u64, call: Call) -> SysResult<i64> {
    let saved = ptrace::regs(tid)?;
    let mask = ptrace::blocked(tid)?;
    ptrace::set_blocked(tid, BLOCK_ALL_BUT_TRAP)?;
    let mut regs = saved;
    regs[reg::RIP] = gadget;
    regs[reg::RAX] = call.number as u64;
    regs[reg::ORIG_RAX] = u64::MAX;
    for (slot, value) in
        [reg::RDI, reg::RSI, reg::RDX, reg::R10, reg::R8, reg::R9].into_iter().zip(call.args)
    {
        regs[slot] = value;
    }
    ptrace::set_regs(tid, &regs)?;
    let mut told_to_stop = false;
    loop {
        ptrace::step(tid)?;
        let status = ptrace::wait_unless_exiting(tid)?;
        if status.is_end() {
            return Err(SysError::errno("remote system call", format!("tid {tid}"), libc::ESRCH));
        }
        told_to_stop |= status == SIGSTOP_COMES;
        if ptrace::regs(tid)?[reg::RIP] != gadget {
            break;
        }
    }
    let result = ptrace::regs(tid)?[reg::RAX] as i64;
    ptrace::set_regs(tid, &saved)?;
    if told_to_stop {
        tell_again(tid)?;
    }
    ptrace::set_blocked(tid, mask)?;
    Ok(result)
}

/// Sends the SIGSTOP again that a thread took while it made calls for us. It waits then as it did
/// before, unless SIGCONT has come meanwhile, which would have taken it back.
fn tell_again(tid: i32) -> SysResult<()> {
    let is_cont = |info: &Vec<u8>| info.first_chunk() == Some(&libc::SIGCONT.to_ne_bytes());
    for of_process in [false, true] {
        if ptrace::pending(tid, of_process)?.iter().any(is_cont) {
            return Ok(());
        }
    }
    let thread = nix::unistd::Pid::from_raw(tid);
    nix::sys::signal::kill(thread, nix::sys::signal::Signal::SIGSTOP)
        .map_err(|e| SysError::errno("kill", format!("tid {tid}"), e as i32))
}

/// How a thread that makes calls is waited for: one that may be killed meanwhile, with others that are
/// traced, or one whose calls make others that have something to tell.
type Wait = fn(i32) -> SysResult<Status>;

/// Gives a stopped process its scratch mapping, by way of a `syscall` instruction at `gadget`.
/// An error EEXIST means that the program itself uses these addresses.
pub fn map_scratch(tid: i32, gadget: u64) -> SysResult<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let mmap =
        Call::new(libc::SYS_mmap, &[SCRATCH, SCRATCH_LEN, prot as u64, flags as u64, u64::MAX, 0]);
    let at = call_at(tid, gadget, mmap)?;
    if at != SCRATCH as i64 {
        return Err(SysError::errno("mmap of the scratch area", format!("tid {tid}"), -at as i32));
    }
    memory::write(tid, SCRATCH, &CODE)?;
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    let protect = Call::new(libc::SYS_mprotect, &[SCRATCH, 0x1000, prot as u64]);
    match call_at(tid, gadget, protect)? {
        0 => Ok(()),
        e => {
            call_at(tid, gadget, Call::new(libc::SYS_munmap, &[SCRATCH, SCRATCH_LEN]))?;
            let object = format!("tid {tid}");
            Err(SysError::errno("mprotect of the scratch area", object, -e as i32))
        }
    }
}

/// Whether what a process has mapped at [`SCRATCH`] is a scratch area.
pub fn has_scratch(tid: i32) -> SysResult<bool> {
    let mut code = [0; CODE.len()];
    memory::read(tid, SCRATCH, &mut code)?;
    Ok(code == CODE)
}

/// Calls to be made together, in order.
#[derive(Debug, Default)]
pub struct Batch {
    table: Vec<u8>,
    results: Vec<i64>,
}

impl Batch {
    /// An empty batch; keep it and use it again.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a call; gives its index among the results of the next run.
    pub fn push(&mut self, call: Call) -> usize {
        let index = self.len();
        self.table.extend(call.number.to_ne_bytes());
        for a in call.args {
            self.table.extend(a.to_ne_bytes());
        }
        self.table.extend([0; 8]);
        index
    }

    /// Number of calls waiting.
    pub fn len(&self) -> usize {
        self.table.len() / ENTRY
    }

    /// Whether no call waits.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Makes the calls in a stopped thread whose process has a scratch mapping, and empties the
    /// batch. Gives the results (-errno included) in order. The thread's registers and signal
    /// mask are put back. More than [`MAX_CALLS`] are made in several rounds.
    ///
    /// If it holds calls of clone, use [`Batch::run_spawning`].
    pub fn run(&mut self, tid: i32) -> SysResult<&[i64]> {
        self.run_with(tid, &mut Vec::new(), ptrace::wait_unless_exiting)
    }

    /// As [`Batch::run`], with calls of clone3(2) among them. `tid` must be traced with
    /// PTRACE_O_TRACECLONE and PTRACE_O_TRACEFORK, so that each new thread or process is traced
    /// too. Adds their ids (as the tracer sees them) to `born` in order of birth, each stopped
    /// before its first instruction.
    pub fn run_spawning(&mut self, tid: i32, born: &mut Vec<i32>) -> SysResult<&[i64]> {
        let known = born.len();
        let done = self.run_with(tid, born, ptrace::wait).map(drop);
        for &new in &born[known..] {
            if ptrace::wait(new)?.is_end() {
                return Err(SysError::errno("clone3", format!("new tid {new}"), libc::ESRCH));
            }
        }
        done?;
        Ok(&self.results)
    }

    fn run_with(&mut self, tid: i32, born: &mut Vec<i32>, wait: Wait) -> SysResult<&[i64]> {
        self.results.clear();
        if self.table.is_empty() {
            return Ok(&self.results);
        }
        let saved = ptrace::regs(tid)?;
        let mask = ptrace::blocked(tid)?;
        ptrace::set_blocked(tid, BLOCK_ALL_BUT_TRAP)?;
        let mut heard = Heard { born, told_to_stop: false };
        let done = self.run_all_tables(tid, &saved, &mut heard, wait);
        // Also after a failure the thread must be what it was: it runs on.
        self.table.clear();
        let told = if heard.told_to_stop { tell_again(tid) } else { Ok(()) };
        let put_back = ptrace::set_regs(tid, &saved).and(ptrace::set_blocked(tid, mask));
        done.and(told).and(put_back)?;
        Ok(&self.results)
    }

    fn run_all_tables(
        &mut self,
        tid: i32,
        saved: &Regs,
        heard: &mut Heard,
        wait: Wait,
    ) -> SysResult<()> {
        for start in (0..self.table.len()).step_by(MAX_CALLS * ENTRY) {
            let end = self.table.len().min(start + MAX_CALLS * ENTRY);
            let part = &mut self.table[start..end];
            memory::write(tid, TABLE, part)?;
            run_table(tid, saved, part.len() / ENTRY, heard, wait)?;
            memory::read(tid, TABLE, part)?;
            self.results.extend(part.chunks_exact(ENTRY).map(|entry| {
                i64::from_ne_bytes(entry[ENTRY - 8..].try_into().expect("eight bytes"))
            }));
        }
        Ok(())
    }

    /// As [`Batch::run`], but any negative result is an error that names the call's number.
    pub fn run_all_ok(&mut self, tid: i32) -> SysResult<&[i64]> {
        let numbers: Vec<i64> = self
            .table
            .chunks_exact(ENTRY)
            .map(|e| i64::from_ne_bytes(e[..8].try_into().expect("eight bytes")))
            .collect();
        let results = self.run(tid)?;
        if let Some(at) = results.iter().position(|r| (-4095..0).contains(r)) {
            return Err(SysError::errno(
                "remote system call",
                format!("tid {tid}, number {} (call {at} of its batch)", numbers[at]),
                -results[at] as i32,
            ));
        }
        Ok(&self.results)
    }
}

/// What a thread tells while it makes calls for us.
struct Heard<'a> {
    /// New threads and processes, in order of birth.
    born: &'a mut Vec<i32>,
    /// A SIGSTOP that waited has come.
    told_to_stop: bool,
}

fn run_table(tid: i32, base: &Regs, calls: usize, heard: &mut Heard, wait: Wait) -> SysResult<()> {
    let mut regs = *base;
    regs[reg::RIP] = SCRATCH;
    regs[reg::ORIG_RAX] = u64::MAX;
    regs[reg::R12] = TABLE;
    regs[reg::R13] = calls as u64;
    ptrace::set_regs(tid, &regs)?;
    ptrace::cont(tid, 0)?;
    loop {
        match wait(tid)? {
            Status::Stopped { signal: libc::SIGTRAP, event: 0 } => return Ok(()),
            SIGSTOP_COMES => {
                heard.told_to_stop = true;
                ptrace::cont(tid, 0)?;
            }
            Status::Stopped { signal, event: 0 } => {
                let at = ptrace::regs(tid)?[reg::RIP];
                return Err(SysError::errno(
                    "remote system calls",
                    format!("tid {tid}: stopped by signal {signal} at {at:#x}"),
                    libc::EFAULT,
                ));
            }
            Status::Stopped { event, .. } => {
                if matches!(event, libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK) {
                    heard.born.push(ptrace::event_message(tid)? as i32);
                }
                ptrace::cont(tid, 0)?;
            }
            Status::Exited(_) | Status::Killed(_) => {
                return Err(SysError::errno(
                    "remote system calls",
                    format!("tid {tid}"),
                    libc::ESRCH,
                ));
            }
        }
    }
}

/// Finds a `syscall` instruction in the vdso, whose mapping is `start..end`.
pub fn find_gadget(pid: i32, start: u64, end: u64) -> SysResult<u64> {
    let mut code = vec![0u8; (end - start) as usize];
    memory::read(pid, start, &mut code)?;
    code.windows(2).position(|w| w == [0x0f, 0x05]).map(|at| start + at as u64).ok_or_else(|| {
        SysError::errno("search for a syscall instruction in the vdso", format!("pid {pid}"), 38)
    })
}

/// What stands for the code of the vdso, whose mapping is `start..end`: two kernels that have the
/// same one can run the same program in the middle of it.
pub fn fingerprint(pid: i32, start: u64, end: u64) -> SysResult<u64> {
    let mut code = vec![0u8; (end - start) as usize];
    memory::read(pid, start, &mut code)?;
    Ok(xxhash_rust::xxh3::xxh3_64(&code) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A process that sleeps, stopped by us, and the address of a `syscall` in it.
    fn stopped_sleeper() -> (Sleeper, i32, u64) {
        let child = Sleeper(Command::new("sleep").arg("600").spawn().expect("sleep starts"));
        let pid = child.0.id() as i32;
        ptrace::seize(pid, libc::PTRACE_O_EXITKILL).expect("seize");
        // Wait until it sleeps in clock_nanosleep: its program is loaded then.
        while !std::fs::read_to_string(format!("/proc/{pid}/syscall"))
            .is_ok_and(|s| s.starts_with("230 "))
        {
            std::thread::yield_now();
        }
        ptrace::interrupt(pid).expect("interrupt");
        assert!(ptrace::wait(pid).expect("wait").is_event_stop());
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        let vdso = maps.lines().find(|l| l.ends_with("[vdso]")).expect("a vdso");
        let (start, end) = vdso.split(' ').next().unwrap().split_once('-').unwrap();
        let hex = |s| u64::from_str_radix(s, 16).expect("hex");
        let gadget = find_gadget(pid, hex(start), hex(end)).expect("gadget");
        (child, pid, gadget)
    }

    #[test]
    fn a_sigstop_that_waits_goes_on_waiting_while_calls_are_made() {
        let (child, pid, gadget) = stopped_sleeper();
        let signal = |signal: i32| {
            let signal = nix::sys::signal::Signal::try_from(signal).expect("a signal");
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("sent");
        };
        let waits = |signal: i32| {
            let all = ptrace::pending(pid, true).expect("asked");
            all.iter().any(|info| info.first_chunk() == Some(&signal.to_ne_bytes()))
        };
        signal(libc::SIGSTOP);
        map_scratch(pid, gadget).expect("scratch");
        assert!(waits(libc::SIGSTOP), "after single calls");
        let mut batch = Batch::new();
        for _ in 0..2 {
            batch.push(Call::new(libc::SYS_getpid, &[]));
            assert_eq!(batch.run(pid).expect("batch"), [i64::from(pid)]);
            assert!(waits(libc::SIGSTOP), "after a batch");
        }
        ptrace::cont(pid, 0).expect("resume");
        assert_eq!(ptrace::wait(pid).expect("wait"), SIGSTOP_COMES);
        ptrace::cont(pid, libc::SIGSTOP).expect("resume");
        let stop = Status::Stopped { signal: libc::SIGSTOP, event: libc::PTRACE_EVENT_STOP };
        assert_eq!(ptrace::wait(pid).expect("wait"), stop, "it stands still");
        drop(child);
    }

    #[test]
    fn a_batch_runs_in_a_sleeping_process_which_then_goes_on() {
        let (_child, pid, gadget) = stopped_sleeper();
        let before = ptrace::regs(pid).expect("registers");
        map_scratch(pid, gadget).expect("scratch");

        let mut batch = Batch::new();
        for _ in 0..MAX_CALLS + 3 {
            batch.push(Call::new(libc::SYS_getpid, &[]));
        }
        batch.push(Call::new(libc::SYS_close, &[12345]));
        let results = batch.run(pid).expect("batch");
        assert_eq!(results.len(), MAX_CALLS + 4);
        assert!(results[..MAX_CALLS + 3].iter().all(|r| *r == i64::from(pid)));
        assert_eq!(results[MAX_CALLS + 3], -i64::from(libc::EBADF));
        assert_eq!(ptrace::regs(pid).expect("registers"), before);
        batch.push(Call::new(libc::SYS_close, &[12345]));
        let error = batch.run_all_ok(pid).expect_err("EBADF");
        assert_eq!(error.code(), libc::EBADF);
        ptrace::cont(pid, 0).expect("resume");
    }
}
