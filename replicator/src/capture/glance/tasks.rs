//! The threads of a process: a program for the `task` iterator, and the rows that it writes.
//!
//! What only a thread itself can tell costs a batch of calls made in it, and a process is asked for
//! its 64 signal actions so. All of that is kept in a few structures of the kernel, which are copied
//! here as they are: as long as they are the same, so are the answers. (Blocked signals are not
//! among them: in a call that changes them for its time, others count than those shown here.)
//!
//! What is read in /proc (umask, working directory, groups and their like) is told in the same way: the
//! fields behind it are the same, or it is read again. A path counts by the mount, the directory and
//! its last name, so that a directory that takes the place of another in memory is another.
//!
//! ```text
//! a row:   | tid, is it the leader | fields of the thread, groups | of the leader: of the process, actions |
//! ```

use super::layout::{Layout, Use, Wanted};
use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::capture::direct::Reads;
use crate::capture::memory::Counts;
use crate::sys::{SysError, SysResult, bpf};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Bytes before the fields: the thread, and whether it leads its process.
const HEAD: usize = 8;
/// struct k_sigaction, 64 times.
const ACTIONS: usize = 64 * 32;
/// As many bytes as a program has of stack.
const STACK: usize = 512;
/// The first supplementary groups of a thread, of four bytes each. Of more, their list counts as
/// the same as long as it is at its place and as long.
const GROUPS: usize = 32 * 4;

const TASK: usize = 0;
const CRED: usize = 1;
const GROUP_INFO: usize = 2;
const IO: usize = 3;
const UNDO: usize = 4;
/// The process of the thread, of which [`PROCESS`] has no room for more, and its memory.
const GROUP: usize = 5;
const MEMORY: usize = 6;
const MM: usize = 0;
const SIGNAL: usize = 1;
const OF_PROCESS: usize = 2;
const FS: usize = 3;
const PWD: usize = 4;
const ROOT: usize = 5;

const THREAD: &[Wanted] = &[
    (TASK, "pending.signal", Use::Data),
    (TASK, "robust_list", Use::Data),
    (TASK, "rseq", Use::Data),
    (TASK, "rseq_len", Use::Data),
    (TASK, "rseq_sig", Use::Data),
    (TASK, "sas_ss_sp", Use::Setting),
    (TASK, "sas_ss_size", Use::Setting),
    (TASK, "sas_ss_flags", Use::Setting),
    (TASK, "clear_child_tid", Use::Setting),
    (TASK, "comm", Use::Setting),
    (TASK, "pdeath_signal", Use::Setting),
    (TASK, "timer_slack_ns", Use::Setting),
    (CRED, "uid", Use::Setting),
    (CRED, "suid", Use::Setting),
    (CRED, "euid", Use::Setting),
    (CRED, "securebits", Use::Setting),
    (CRED, "cap_inheritable", Use::Setting),
    (CRED, "cap_permitted", Use::Setting),
    (CRED, "cap_effective", Use::Setting),
    (GROUP_INFO, "ngroups", Use::Outside),
    (CRED, "group_info", Use::Outside),
    (CRED, "gid", Use::Outside),
    (CRED, "sgid", Use::Outside),
    (CRED, "egid", Use::Outside),
    (CRED, "fsuid", Use::Outside),
    (CRED, "fsgid", Use::Outside),
    (CRED, "cap_bset", Use::Outside),
    (CRED, "cap_ambient", Use::Outside),
    (TASK, "policy", Use::Outside),
    (TASK, "static_prio", Use::Outside),
    (TASK, "rt_priority", Use::Outside),
    (TASK, "cpus_mask", Use::Outside),
    (IO, "ioprio", Use::Outside),
    (TASK, "real_parent", Use::Outside),
    (TASK, "exit_signal", Use::Outside),
    (TASK, "atomic_flags", Use::Outside),
    (TASK, "seccomp.mode", Use::Outside),
    (TASK, "sysvsem.undo_list", Use::Data),
    (UNDO, "list_proc.next", Use::Data),
];
const PENDING: usize = 0;
const ROBUST: usize = 1;
const RSEQ: usize = 2;
const RSEQ_LEN: usize = 3;
const RSEQ_SIGNATURE: usize = 4;
const GROUP_COUNT: usize = 19;
const UNDO_LIST: usize = 37;
const UNDO_FIRST: usize = 38;

const PROCESS: &[Wanted] = &[
    (SIGNAL, "real_timer.state", Use::Data),
    (SIGNAL, "it", Use::Data),
    (SIGNAL, "it_real_incr", Use::Setting),
    (SIGNAL, "is_child_subreaper", Use::Setting),
    (MM, "brk", Use::Setting),
    (MM, "flags", Use::Setting),
    (MM, "membarrier_state", Use::Setting),
    (OF_PROCESS, "personality", Use::Setting),
    (SIGNAL, "rlim", Use::Outside),
    (SIGNAL, "oom_score_adj", Use::Outside),
    (SIGNAL, "tty", Use::Outside),
    (MM, "locked_vm", Use::Outside),
    (FS, "umask", Use::Outside),
    (FS, "pwd", Use::Outside),
    (FS, "root", Use::Outside),
    (PWD, "d_parent", Use::Outside),
    (PWD, "d_name.hash_len", Use::Outside),
    (ROOT, "d_parent", Use::Outside),
    (ROOT, "d_name.hash_len", Use::Outside),
    (MM, "start_code", Use::Outside),
    (MM, "end_code", Use::Outside),
    (MM, "start_data", Use::Outside),
    (MM, "end_data", Use::Outside),
    (MM, "start_brk", Use::Outside),
    (MM, "start_stack", Use::Outside),
    (MM, "arg_start", Use::Outside),
    (MM, "arg_end", Use::Outside),
    (MM, "env_start", Use::Outside),
    (MM, "env_end", Use::Outside),
];
/// What of [`PROCESS`] counts how often mappings were changed, in the kernels that have it, the newest
/// first. The lock that whoever changes them holds (mmap_lock, for writing) counts there.
const SEQUENCES: [&str; 2] = ["mm_lock_seq.sequence", "mm_lock_seq"];
/// What of a thread, and of a process for the threads that have ended, counts reads in the kernels that do:
/// calls, and bytes from disks.
const READS: [&str; 2] = ["ioac.syscr", "ioac.read_bytes"];
/// What counts faults: the memory of a thread, its own faults, those of threads that have ended, and how
/// often translations of the memory were flushed.
const FAULTS: [Wanted; 6] = [
    (TASK, "mm", Use::Data),
    (TASK, "min_flt", Use::Data),
    (TASK, "maj_flt", Use::Data),
    (GROUP, "min_flt", Use::Data),
    (GROUP, "maj_flt", Use::Data),
    (MEMORY, "context.tlb_gen", Use::Data),
];
const REAL_TIMER: usize = 0;
const CPU_TIMERS: usize = 1;

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Tasks {
    program: OwnedFd,
    thread: Layout,
    process: Layout,
    /// The field of the process that counts changes of its mappings.
    sequence: Option<usize>,
    /// The first of the four fields of a thread that count reads: its own, then those of threads that have
    /// ended.
    reads: Option<usize>,
    /// The first of those that count faults, [`FAULTS`].
    faults: Option<usize>,
    /// Where the head of a list of semaphores to be undone lies in its structure.
    undo_head: u64,
}

impl Tasks {
    pub(super) fn load() -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for fields of the kernel's structures",
            object: "an iterator over threads".into(),
            source,
        };
        let btf = Btf::of_kernel().map_err(failed)?;
        let (mut of_thread, mut of_process) = (THREAD.to_vec(), PROCESS.to_vec());
        let memory = btf.structure("mm_struct").map_err(failed)?;
        let counts = |path: &&str| btf.member(memory, path).is_ok_and(|m| m.size == 4);
        let sequence = SEQUENCES.into_iter().find(counts).map(|path| {
            of_process.push((MM, path, Use::Data));
            of_process.len() - 1
        });
        let plain = of_thread.len();
        of_thread.extend(READS.map(|path| (TASK, path, Use::Data)));
        of_thread.extend(READS.map(|path| (GROUP, path, Use::Data)));
        let counting = of_thread.len();
        of_thread.extend(FAULTS);
        // The kernel does not count some, or they are too many.
        let lengths = [of_thread.len(), counting, plain];
        let tried = lengths.map(|len| (len, assemble(&btf, &of_thread[..len], &of_process)));
        let mut possible = tried.into_iter().skip_while(|(len, t)| t.is_err() && *len > plain);
        let (len, assembled) = possible.next().expect("the last one is kept");
        let (code, thread, process) = assembled.map_err(failed)?;
        let reads = (len > plain).then_some(plain);
        let faults = (len > counting).then_some(counting);
        let target = btf.function("bpf_iter_task").map_err(failed)?;
        let undo_head = offset(&btf, "sem_undo_list", "list_proc").map_err(failed)? as u64;
        let program = bpf::load_iterator(&code, target)?;
        Ok(Self { program, thread, process, sequence, reads, faults, undo_head })
    }
}

fn offset(btf: &Btf, of: &str, path: &str) -> io::Result<i16> {
    let member = btf.member(btf.structure(of)?, path)?;
    i16::try_from(member.offset).map_err(io::Error::other)
}

/// Register 6 is the context, 7 where to write to, 8 the task.
fn assemble(
    btf: &Btf,
    of_thread: &[Wanted],
    of_process: &[Wanted],
) -> io::Result<(Vec<u8>, Layout, Layout)> {
    use Size::{Double, Word};
    let task = |path| offset(btf, "task_struct", path);
    let structures = |names: &[&str]| -> io::Result<Vec<u32>> {
        names.iter().map(|name| btf.structure(name)).collect()
    };
    let names = [
        "task_struct",
        "cred",
        "group_info",
        "io_context",
        "sem_undo_list",
        "signal_struct",
        "mm_struct",
    ];
    let thread = Layout::new(btf, &structures(&names)?, of_thread)?;
    let names = ["mm_struct", "signal_struct", "task_struct", "fs_struct", "dentry", "dentry"];
    let process = Layout::new(btf, &structures(&names)?, of_process)?;
    if HEAD + thread.len() + GROUPS > STACK || process.len() > STACK {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the fields are too many"));
    }
    let mut a = Assembler::default();
    let emit = |a: &mut Assembler, len: usize| {
        a.mov(1, 7);
        a.place(2, -(len as i16));
        a.set(3, len as i32);
        a.call(helper::SEQ_WRITE);
    };
    a.mov(6, 1);
    a.load(Double, 7, 6, offset(btf, "bpf_iter__task", "meta")?);
    a.load(Double, 7, 7, offset(btf, "bpf_iter_meta", "seq")?);
    a.load(Double, 8, 6, offset(btf, "bpf_iter__task", "task")?);
    a.jump(If::Equal, 8, 0, "last");
    let row = -((HEAD + thread.len() + GROUPS) as i16);
    let record = row + HEAD as i16;
    thread.clear(&mut a, record);
    a.load(Word, 1, 8, task("pid")?);
    a.store(Word, FP, row, 1);
    a.load(Word, 2, 8, task("tgid")?);
    // Whether they are the same, 0 if so.
    a.push(0x1f, 1, 2, 0, 0);
    a.store(Word, FP, row + 4, 1);
    thread.copy(&mut a, TASK, 8, record);
    a.load(Double, 2, 8, task("cred")?);
    thread.copy(&mut a, CRED, 2, record);
    a.load(Double, 9, 2, offset(btf, "cred", "group_info")?);
    thread.copy(&mut a, GROUP_INFO, 9, record);
    a.load(Double, 2, 8, task("io_context")?);
    thread.copy(&mut a, IO, 2, record);
    a.load(Double, 2, 8, task("sysvsem.undo_list")?);
    thread.copy(&mut a, UNDO, 2, record);
    a.load(Double, 2, 8, task("signal")?);
    thread.copy(&mut a, GROUP, 2, record);
    a.load(Double, 2, 8, task("mm")?);
    thread.copy(&mut a, MEMORY, 2, record);
    a.place(1, -(GROUPS as i16));
    a.set(2, GROUPS as i32);
    a.mov(3, 9);
    a.add(3, offset(btf, "group_info", "gid")?.into());
    a.call(helper::PROBE_READ);
    // Whether it is the leader, again.
    a.load(Word, 9, FP, row + 4);
    emit(&mut a, HEAD + thread.len() + GROUPS);
    a.jump(If::NotEqual, 9, 0, "out");
    let record = -(process.len() as i16);
    process.clear(&mut a, record);
    a.load(Double, 2, 8, task("mm")?);
    process.copy(&mut a, MM, 2, record);
    a.load(Double, 2, 8, task("signal")?);
    process.copy(&mut a, SIGNAL, 2, record);
    process.copy(&mut a, OF_PROCESS, 8, record);
    a.load(Double, 9, 8, task("fs")?);
    process.copy(&mut a, FS, 9, record);
    a.load(Double, 2, 9, offset(btf, "fs_struct", "pwd.dentry")?);
    process.copy(&mut a, PWD, 2, record);
    a.load(Double, 2, 9, offset(btf, "fs_struct", "root.dentry")?);
    process.copy(&mut a, ROOT, 2, record);
    emit(&mut a, process.len());
    a.load(Double, 9, 8, task("sighand")?);
    a.add(9, offset(btf, "sighand_struct", "action")?.into());
    for _ in 0..ACTIONS / STACK {
        a.place(1, -(STACK as i16));
        a.set(2, STACK as i32);
        a.mov(3, 9);
        a.call(helper::PROBE_READ);
        emit(&mut a, STACK);
        a.add(9, STACK as i32);
    }
    super::write_end(&mut a);
    Ok((a.finish(), thread, process))
}

/// The threads of one process.
#[derive(Debug)]
pub(in crate::capture) struct TaskGlance {
    link: OwnedFd,
    known: &'static Tasks,
    bytes: Vec<u8>,
    /// Threads, and where their fields begin.
    rows: Vec<(i32, usize)>,
    /// Where the fields of the leader and of the process begin.
    leader: usize,
    process: usize,
    /// Those that count for what was asked last.
    before: Vec<u8>,
    /// Those of leader and process that count for what was read from outside last.
    outside: [Vec<u8>; 2],
}

/// What was seen of a thread.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Task<'a> {
    layout: &'static Layout,
    /// Its record, to be kept and compared.
    pub(in crate::capture) record: &'a [u8],
}

impl TaskGlance {
    /// For the process with this host pid. None if this kernel cannot do it.
    pub(in crate::capture) fn open(pid: i32) -> Option<Self> {
        let known = super::tasks()?;
        match bpf::iterate_process(known.program.as_fd(), pid) {
            Ok(link) => {
                let (bytes, rows, (leader, process), before, outside) = Default::default();
                Some(Self { link, known, bytes, rows, leader, process, before, outside })
            }
            Err(error) => {
                tracing::debug!(pid, %error, "its threads are asked one by one");
                None
            }
        }
    }

    /// Looks at a stopped process.
    pub(in crate::capture) fn look(&mut self) -> SysResult<()> {
        self.rows.clear();
        self.process = usize::MAX;
        let len = bpf::iterate(self.link.as_fd(), &mut self.bytes)?;
        let cut = || SysError::errno("read", "an iterator over threads", libc::EIO);
        let (thread, process) = (&self.known.thread, &self.known.process);
        let mut at = 0;
        while at < len {
            let head: &[u8; HEAD] = self.bytes[..len][at..].first_chunk().ok_or_else(cut)?;
            let [tid, follows] = [0, 4].map(|i| [head[i], head[i + 1], head[i + 2], head[i + 3]]);
            let (fields, groups) = (at + HEAD, at + HEAD + thread.len());
            self.rows.push((i32::from_ne_bytes(tid), fields));
            at = groups + GROUPS;
            let row = self.bytes[..len].get_mut(fields..at).ok_or_else(cut)?;
            // What lies behind the list belongs to others.
            let count = thread.get(row, GROUP_COUNT) as usize;
            let behind = (count * 4).min(GROUPS);
            row[thread.len() + behind..].fill(0);
            if follows == [0; 4] {
                self.leader = fields;
                self.process = at;
                at += process.len() + ACTIONS;
            }
        }
        if at == len { Ok(()) } else { Err(cut()) }
    }

    /// What the last look saw of a thread.
    pub(in crate::capture) fn task(&self, tid: i32) -> Option<Task<'_>> {
        let at = self.rows.iter().find(|(t, _)| *t == tid)?.1;
        self.task_at(at)
    }

    fn task_at(&self, at: usize) -> Option<Task<'_>> {
        let layout = &self.known.thread;
        let record = self.bytes.get(at..at.checked_add(layout.len() + GROUPS)?)?;
        Some(Task { layout, record })
    }

    /// Whether a System V semaphore is to be undone when a thread ends (SEM_UNDO of semop(2)), or was
    /// and its set is there still.
    pub(in crate::capture) fn undoes(&self, thread: Task<'_>) -> bool {
        let [list, first] = [UNDO_LIST, UNDO_FIRST].map(|f| thread.layout.get(thread.record, f));
        list != 0 && first != list + self.known.undo_head
    }

    fn of_process(&self) -> Option<&[u8]> {
        self.bytes.get(self.process..self.process.checked_add(self.known.process.len() + ACTIONS)?)
    }

    /// A number that is another one once the mappings of the process have changed.
    pub(in crate::capture) fn sequence(&self) -> Option<u64> {
        Some(self.known.process.get(self.of_process()?, self.known.sequence?))
    }

    /// What the kernel has counted of the process's reads, if it does.
    pub(in crate::capture) fn reads(&self) -> Option<Reads> {
        let Tasks { thread, reads: Some(first), .. } = self.known else { return None };
        let counted = |record: &[u8], first: usize| Reads {
            calls: thread.get(record, first),
            from_disks: thread.get(record, first + 1),
        };
        let of_ended = counted(self.task_at(self.leader)?.record, first + READS.len());
        self.rows.iter().try_fold(of_ended, |sum, (_, at)| {
            let of_one = counted(self.task_at(*at)?.record, *first);
            Some(Reads {
                calls: sum.calls.wrapping_add(of_one.calls),
                from_disks: sum.from_disks.wrapping_add(of_one.from_disks),
            })
        })
    }

    /// Puts what the kernel has counted of the process's faults into `out`, if it is shown.
    pub(in crate::capture) fn count_faults(&self, out: &mut Counts) {
        out.threads.clear();
        out.memory = 0;
        let Tasks { thread, faults: Some(first), .. } = self.known else { return };
        let known = self.of_process().and_then(|_| self.task_at(self.leader));
        let Some(leader) = known else { return };
        let get = |record: &[u8], field: usize| thread.get(record, first + field);
        let sum =
            |record: &[u8], field: usize| get(record, field).wrapping_add(get(record, field + 1));
        out.memory = get(leader.record, 0);
        out.ended = sum(leader.record, 3);
        out.flushes = get(leader.record, 5);
        let of_one = |(tid, at): &(i32, usize)| Some((*tid, sum(self.task_at(*at)?.record, 1)));
        out.threads.extend(self.rows.iter().filter_map(of_one));
        out.threads.sort_unstable();
    }

    /// Whether a timer of setitimer(2) runs: then no answer counts for long.
    fn has_timers(&self, now: &[u8]) -> bool {
        let layout = &self.known.process;
        layout.get(now, REAL_TIMER) != 0 || layout.bytes(now, CPU_TIMERS).iter().any(|b| *b != 0)
    }

    /// Whether a timer of setitimer(2) ran at the last look, or it is not known.
    pub(in crate::capture) fn may_go_off(&self) -> bool {
        self.of_process().is_none_or(|now| self.has_timers(now))
    }

    /// Whether the process would answer as it did at the last [`TaskGlance::remember`].
    pub(in crate::capture) fn is_unchanged(&self) -> bool {
        let Some(now) = self.of_process() else { return false };
        let (layout, fields) = (&self.known.process, self.known.process.len());
        self.before.len() == now.len()
            && !self.has_timers(now)
            && layout.set_alike(&now[..fields], &self.before[..fields])
            && now[fields..] == self.before[fields..]
    }

    /// The process has just been asked.
    pub(in crate::capture) fn remember(&mut self) {
        let mut before = std::mem::take(&mut self.before);
        before.clear();
        if let Some(now) = self.of_process().filter(|now| !self.has_timers(now)) {
            before.extend_from_slice(now);
        }
        self.before = before;
    }

    /// Whether what is read of the process from outside is what it was at the last
    /// [`TaskGlance::remember_outside`].
    pub(in crate::capture) fn is_unchanged_outside(&self) -> bool {
        let (Some(leader), Some(now)) = (self.task_at(self.leader), self.of_process()) else {
            return false;
        };
        let [of_leader, of_process] = &self.outside;
        let layout = &self.known.process;
        leader.is_outside_as(of_leader) && layout.outside_alike(&now[..layout.len()], of_process)
    }

    /// All that is read from outside has just been read.
    pub(in crate::capture) fn remember_outside(&mut self) {
        let mut before = std::mem::take(&mut self.outside);
        before.iter_mut().for_each(Vec::clear);
        if let (Some(leader), Some(now)) = (self.task_at(self.leader), self.of_process()) {
            before[0].extend_from_slice(leader.record);
            before[1].extend_from_slice(&now[..self.known.process.len()]);
        }
        self.outside = before;
    }
}

impl Task<'_> {
    /// Whether the thread would answer as it did when this record of it was seen.
    pub(in crate::capture) fn answers_as(&self, before: &[u8]) -> bool {
        self.layout.set_alike(self.record, before)
    }

    /// Whether what is read of the thread from outside is what it was when this record was seen.
    pub(in crate::capture) fn is_outside_as(&self, before: &[u8]) -> bool {
        let fields = self.layout.len();
        self.layout.outside_alike(self.record, before) && self.record[fields..] == before[fields..]
    }

    /// Whether no signal waits for it alone.
    pub(in crate::capture) fn nothing_pends(&self) -> bool {
        self.layout.get(self.record, PENDING) == 0
    }

    /// Head of the list of robust futexes, and the length of its structure.
    pub(in crate::capture) fn robust_list(&self) -> (u64, u64) {
        // struct robust_list_head; the kernel takes no other.
        (self.layout.get(self.record, ROBUST), 24)
    }

    /// Area, length and signature of its restartable sequences.
    pub(in crate::capture) fn rseq(&self) -> (u64, u32, u32) {
        let get = |field| self.layout.get(self.record, field);
        (get(RSEQ), get(RSEQ_LEN) as u32, get(RSEQ_SIGNATURE) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::process;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn a_glance_counts_reads_as_proc_does() {
        let mut sleeper = Command::new("sleep").arg("100").spawn().expect("started");
        let pid = sleeper.id() as i32;
        let Some(mut glance) = TaskGlance::open(pid) else {
            println!("skipped: no glances");
            sleeper.kill().expect("killed");
            drop(sleeper.wait());
            return;
        };
        // It reads its libraries first.
        let agree = (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            glance.look().expect("a look");
            let reads = glance.reads();
            reads == process::reads(pid) && reads.is_none_or(|r| r.calls > 0)
        });
        sleeper.kill().expect("killed");
        sleeper.wait().expect("ended");
        assert!(agree);
    }
}
