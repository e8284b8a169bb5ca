//! Notes of page faults: programs at tracepoints of the kernel that note where a process which stops are
//! taken of has faulted, so that a stop looks for written pages there and nowhere else. What a window of
//! notes proves, and when it proves nothing, is said in [`Noted`](crate::capture::memory).
//!
//! ```text
//! event                        of a process that is noted, the program
//! page_fault_user, _kernel     notes address and error code, and counts the fault of the thread
//! mmap_lock_acquire_returned   counts whoever takes its lock outside of a fault that is noted
//! signal_generate              counts a fault that was not handled (SIGSEGV, SIGBUS)
//! set_, remove_migration_pte   (of anybody) keeps the time
//! ```
//! A process is known by its memory (mm_struct), so that what a child does in it between vfork(2) and
//! execve(2) is seen as well. Of a thread the program keeps how many faults the kernel must have counted
//! (`min_flt` and `maj_flt`) when it faults next: a fault that the kernel took for itself, in between and
//! unseen by the tracepoint, makes it one more.
//!
//! Invariant: the program writes that number before it writes the note, and whoever begins a window
//! clears the notes before reading the number. So a fault is noted in the window, or the number says that
//! it began before.
//!
//! Programs are attached while a process is noted. To all others each event costs one look at a hash table.

use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::sys::bpf::Words;
use crate::sys::{SysError, SysResult, bpf};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// The last kernel whose sources say what this relies on: which lock a change of memory takes, when
/// a fault is counted, where the translations of a page are flushed.
const LAST_KNOWN: (u32, u32) = (6, 18);

/// Processes and threads that can be noted at the same time; powers of two.
const SLOTS: usize = 64;
const THREADS: usize = 4096;
/// Notes of one process from the beginning of a window to the end of its confirmation; a power of two.
const NOTES: usize = 4096;
/// Words of the shared memory. Of a thread: faults that must have been counted at its next, and
/// whether the fault it is in may take the lock.
const OF_THREAD: usize = 2;
/// Of a process: notes, and what was seen of it that cannot be accounted for.
const OF_PROCESS: usize = 2;
const OF_NOTE: usize = 2;
const PROCESSES_AT: usize = THREADS * OF_THREAD;
const NOTES_AT: usize = PROCESSES_AT + SLOTS * OF_PROCESS;
const MOVED_AT: usize = NOTES_AT + SLOTS * NOTES * OF_NOTE;
const WORDS: usize = MOVED_AT + 1;

/// A fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::capture) struct Note {
    pub(in crate::capture) address: u64,
    /// Bits of the processor: 0 the page was there, 1 a write, 4 to get an instruction, and more.
    pub(in crate::capture) error: u64,
}

impl Note {
    /// The page was there, and protected.
    pub(in crate::capture) fn was_there(&self) -> bool {
        self.error & 1 != 0
    }
}

/// The programs, loaded, and what they share with us.
#[derive(Debug)]
pub(super) struct Faults {
    processes: OwnedFd,
    threads: OwnedFd,
    words: Words,
    programs: Vec<OwnedFd>,
    used: Mutex<Used>,
}

/// What is in use.
#[derive(Debug)]
struct Used {
    links: Vec<OwnedFd>,
    slots: [bool; SLOTS],
    /// Places of threads that are free.
    threads: Vec<u16>,
}

impl Faults {
    pub(super) fn load() -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for events of the kernel",
            object: "notes of page faults".into(),
            source,
        };
        refuse_unknown_kernels().map_err(failed)?;
        let btf = Btf::of_kernel().map_err(failed)?;
        let processes = bpf::hash_map(8, 4, SLOTS as u32)?;
        let threads = bpf::hash_map(4, 4, THREADS as u32)?;
        let words = Words::new(WORDS)?;
        let fds = [processes.as_fd(), threads.as_fd(), words.map()].map(|fd| fd.as_raw_fd());
        let code = Code { btf: &btf, processes: fds[0], threads: fds[1], words: fds[2] };
        let (fault, lock) = (code.fault(), code.lock());
        let mut events = vec![
            ("page_fault_user", fault.map_err(failed)?),
            ("mmap_lock_acquire_returned", lock.map_err(failed)?),
            ("signal_generate", code.signal().map_err(failed)?),
        ];
        events.push(("page_fault_kernel", events[0].1.clone()));
        if btf.function("migrate_pages").is_ok() {
            events.push(("set_migration_pte", code.moved()));
            events.push(("remove_migration_pte", code.moved()));
        }
        let mut programs = Vec::new();
        for (event, code) in events {
            let target = btf.tracepoint(event).map_err(failed)?;
            programs.push(bpf::load_tracepoint(&code, target)?);
        }
        let free = (0..THREADS as u16).rev().collect();
        let used = Mutex::new(Used { links: Vec::new(), slots: [false; SLOTS], threads: free });
        Ok(Self { processes, threads, words, programs, used })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// What is relied on is not promised by any kernel.
fn refuse_unknown_kernels() -> io::Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse().ok());
    match numbers.next().zip(numbers.next()) {
        Some(version) if version <= LAST_KNOWN => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, format!("kernel {}", release.trim()))),
    }
}

/// What the programs are put together from. In all of them register 8 is the place of the process.
struct Code<'a> {
    btf: &'a Btf,
    processes: i32,
    threads: i32,
    words: i32,
}

impl Code<'_> {
    fn task(&self, path: &str) -> io::Result<i16> {
        let member = self.btf.member(self.btf.structure("task_struct")?, path)?;
        i16::try_from(member.offset).map_err(io::Error::other)
    }

    /// Finds the process whose memory register 1 is, which is kept on the stack at -8.
    fn find_process(&self, a: &mut Assembler) {
        a.store(Size::Double, FP, -8, 1);
        a.map(1, self.processes);
        a.place(2, -8);
        a.call(helper::MAP_LOOKUP);
        a.jump(If::Equal, 0, 0, "out");
        a.load(Size::Word, 8, 0, 0);
        a.mask(8, SLOTS as i32 - 1);
    }

    /// Puts the address of the words of the thread whose number register 1 is into register 9; the
    /// threads of nobody are strange.
    fn find_thread(&self, a: &mut Assembler) {
        a.store(Size::Word, FP, -16, 1);
        a.map(1, self.threads);
        a.place(2, -16);
        a.call(helper::MAP_LOOKUP);
        a.jump(If::Equal, 0, 0, "strange");
        a.load(Size::Word, 1, 0, 0);
        a.mask(1, THREADS as i32 - 1);
        a.shift_left(1, (8 * OF_THREAD as i32).ilog2() as i32);
        a.map_value(9, self.words);
        a.add_reg(9, 1);
    }

    /// Puts what the kernel has counted of the task in register 7 into register 4.
    fn count(&self, a: &mut Assembler) -> io::Result<()> {
        a.load(Size::Double, 4, 7, self.task("min_flt")?);
        a.load(Size::Double, 1, 7, self.task("maj_flt")?);
        a.add_reg(4, 1);
        Ok(())
    }

    /// Puts the address of the words of the process into register 2.
    fn process(&self, a: &mut Assembler) {
        a.mov(1, 8);
        a.shift_left(1, (8 * OF_PROCESS as i32).ilog2() as i32);
        a.map_value(2, self.words);
        a.add(2, 8 * PROCESSES_AT as i32);
        a.add_reg(2, 1);
    }

    /// Something of the process cannot be accounted for.
    fn strange(&self, a: &mut Assembler) {
        self.process(a);
        a.set(3, 1);
        a.fetch_add(2, 8, 3);
    }

    /// Ends a program, whose other ways lead here.
    fn finish(&self, mut a: Assembler) -> Vec<u8> {
        a.label("out");
        a.leave(0);
        a.label("strange");
        self.strange(&mut a);
        a.leave(0);
        a.finish()
    }

    fn fault(&self) -> io::Result<Vec<u8>> {
        use Size::{Double, Word};
        let mut a = Assembler::default();
        a.mov(6, 1);
        // The kernel's own memory is not theirs.
        a.load(Double, 1, 6, 0);
        a.jump(If::Less, 1, 0, "out");
        a.call(helper::CURRENT_TASK);
        a.mov(7, 0);
        a.load(Double, 1, 7, self.task("mm")?);
        self.find_process(&mut a);
        // A fault that the kernel has forbidden itself is not handled, and not counted.
        a.load(Word, 1, 7, self.task("pagefault_disabled")?);
        a.jump(If::NotEqual, 1, 0, "out");
        a.load(Word, 1, 7, self.task("pid")?);
        self.find_thread(&mut a);
        self.count(&mut a)?;
        a.load(Double, 5, 9, 0);
        a.jump_reg(If::Equal, 4, 5, "as expected");
        self.strange(&mut a);
        a.label("as expected");
        a.add(4, 1);
        a.store(Double, 9, 0, 4);
        a.store_value(Double, 9, 8, 1);
        self.process(&mut a);
        a.set(3, 1);
        a.fetch_add(2, 0, 3);
        a.jump(If::Above, 3, NOTES as i32 - 1, "out");
        a.shift_left(3, (8 * OF_NOTE as i32).ilog2() as i32);
        a.mov(1, 8);
        a.shift_left(1, (8 * OF_NOTE as i32 * NOTES as i32).ilog2() as i32);
        a.map_value(2, self.words);
        a.add(2, 8 * NOTES_AT as i32);
        a.add_reg(2, 1);
        a.add_reg(2, 3);
        a.load(Double, 1, 6, 0);
        a.store(Double, 2, 0, 1);
        a.load(Double, 1, 6, 16);
        a.store(Double, 2, 8, 1);
        Ok(self.finish(a))
    }

    /// Whoever takes the lock of a memory without having faulted in it may change pages unseen. We do not,
    /// or say so.
    fn lock(&self) -> io::Result<Vec<u8>> {
        use Size::Double;
        let mut a = Assembler::default();
        a.load(Double, 1, 1, 0);
        self.find_process(&mut a);
        a.call(helper::CURRENT_IDS);
        a.mov(1, 0);
        a.shift_right(1, 32);
        a.jump(If::Equal, 1, std::process::id() as i32, "out");
        a.mov(1, 0);
        self.find_thread(&mut a);
        a.call(helper::CURRENT_TASK);
        a.mov(7, 0);
        a.load(Double, 1, 7, self.task("mm")?);
        a.load(Double, 2, FP, -8);
        a.jump_reg(If::NotEqual, 1, 2, "strange");
        // In a fault that was noted: it is not counted yet.
        self.count(&mut a)?;
        a.add(4, 1);
        a.load(Double, 5, 9, 0);
        a.jump_reg(If::NotEqual, 4, 5, "strange");
        a.load(Double, 5, 9, 8);
        a.jump(If::Equal, 5, 0, "strange");
        a.store_value(Double, 9, 8, 0);
        Ok(self.finish(a))
    }

    fn signal(&self) -> io::Result<Vec<u8>> {
        use Size::Double;
        let mut a = Assembler::default();
        a.load(Double, 2, 1, 0);
        a.jump(If::Equal, 2, libc::SIGSEGV, "fault");
        a.jump(If::NotEqual, 2, libc::SIGBUS, "out");
        a.label("fault");
        a.load(Double, 7, 1, 16);
        a.load(Double, 1, 7, self.task("mm")?);
        self.find_process(&mut a);
        self.strange(&mut a);
        a.label("out");
        a.leave(0);
        Ok(a.finish())
    }

    fn moved(&self) -> Vec<u8> {
        let mut a = Assembler::default();
        a.call(helper::KTIME);
        a.map_value(1, self.words);
        a.add(1, 8 * MOVED_AT as i32);
        a.store(Size::Double, 1, 0, 0);
        a.leave(0);
        a.finish()
    }
}

/// The notes of one process, which ends with this.
#[derive(Debug)]
pub(in crate::capture) struct Notes {
    known: &'static Faults,
    slot: usize,
    memory: u64,
    /// Threads in order, and their places.
    threads: Vec<(i32, u16)>,
}

impl Notes {
    /// Begins to note the faults in a memory (the address of its mm_struct). None if the kernel cannot
    /// do it, or too many are noted already.
    pub(in crate::capture) fn open(memory: u64) -> Option<Self> {
        let known = super::faults()?;
        let mut used = known.used();
        let slot = used.slots.iter().position(|taken| !taken)?;
        if used.links.is_empty() {
            let attached: SysResult<Vec<OwnedFd>> =
                known.programs.iter().map(|p| bpf::at_tracepoint(p.as_fd())).collect();
            match attached {
                Ok(links) => used.links = links,
                Err(error) => {
                    tracing::debug!(%error, "page faults are not noted");
                    return None;
                }
            }
        }
        used.slots[slot] = true;
        drop(used);
        let me = Self { known, slot, memory, threads: Vec::new() };
        me.begin(&mut Vec::new());
        let number = (slot as u32).to_ne_bytes();
        match bpf::set(known.processes.as_fd(), &memory.to_ne_bytes(), &number) {
            Ok(()) => Some(me),
            Err(error) => {
                tracing::debug!(%error, "page faults are not noted");
                None
            }
        }
    }

    /// The memory that this is of.
    pub(in crate::capture) fn memory(&self) -> u64 {
        self.memory
    }

    fn of_process(&self, word: usize) -> usize {
        PROCESSES_AT + self.slot * OF_PROCESS + word
    }

    fn expected_at(place: u16) -> usize {
        usize::from(place) * OF_THREAD
    }

    /// Forgets all notes, and only then replaces the contents of `expected` by what must have been counted
    /// of each known thread when it next faults.
    pub(in crate::capture) fn begin(&self, expected: &mut Vec<(i32, u64)>) {
        for word in 0..OF_PROCESS {
            self.known.words.at(self.of_process(word)).swap(0, Ordering::SeqCst);
        }
        self.expected(expected);
    }

    /// The same without forgetting, in order of their numbers.
    pub(in crate::capture) fn expected(&self, expected: &mut Vec<(i32, u64)>) {
        expected.clear();
        let of = |place| self.known.words.at(Self::expected_at(place)).load(Ordering::SeqCst);
        expected.extend(self.threads.iter().map(|(tid, place)| (*tid, of(*place))));
    }

    /// Whether something was seen of the process that is no noted fault.
    pub(in crate::capture) fn is_strange(&self) -> bool {
        self.known.words.at(self.of_process(1)).load(Ordering::SeqCst) != 0
    }

    /// How many there are.
    pub(in crate::capture) fn count(&self) -> usize {
        self.known.words.at(self.of_process(0)).load(Ordering::SeqCst) as usize
    }

    /// Replaces the contents of `out` by the notes. False if there were more than are kept.
    pub(in crate::capture) fn read(&self, out: &mut Vec<Note>) -> bool {
        out.clear();
        let count = self.count();
        let first = NOTES_AT + self.slot * NOTES * OF_NOTE;
        let word = |at| self.known.words.at(at).load(Ordering::SeqCst);
        out.extend((0..count.min(NOTES)).map(|i| {
            let at = first + i * OF_NOTE;
            Note { address: word(at), error: word(at + 1) }
        }));
        count <= NOTES
    }

    /// These are its threads, in order, all of which stand still, and what the kernel has counted of each.
    pub(in crate::capture) fn set_threads(&mut self, counted: &[(i32, u64)]) {
        let Self { known, threads, .. } = self;
        threads.retain(|(tid, place)| {
            let stays = counted.binary_search_by_key(tid, |(t, _)| *t).is_ok();
            if !stays {
                known.forget(*tid, *place);
            }
            stays
        });
        for &(tid, count) in counted {
            let place = match threads.binary_search_by_key(&tid, |(t, _)| *t) {
                Ok(at) => threads[at].1,
                Err(at) => {
                    let Some(place) = known.used().threads.pop() else { continue };
                    threads.insert(at, (tid, place));
                    let number = u32::from(place).to_ne_bytes();
                    // One that is not there is strange at its first fault.
                    let _ = bpf::set(known.threads.as_fd(), &tid.to_ne_bytes(), &number);
                    place
                }
            };
            known.words.at(Self::expected_at(place)).store(count, Ordering::SeqCst);
            known.words.at(Self::expected_at(place) + 1).store(0, Ordering::SeqCst);
        }
    }

    /// When a page of anybody was last moved to other memory, by the monotonic clock.
    pub(in crate::capture) fn moved(&self) -> Duration {
        Duration::from_nanos(self.known.words.at(MOVED_AT).load(Ordering::SeqCst))
    }
}

impl Faults {
    fn forget(&self, tid: i32, place: u16) {
        let _ = bpf::unset(self.threads.as_fd(), &tid.to_ne_bytes());
        self.used().threads.push(place);
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        let _ = bpf::unset(self.known.processes.as_fd(), &self.memory.to_ne_bytes());
        for (tid, place) in self.threads.drain(..) {
            self.known.forget(tid, place);
        }
        let mut used = self.known.used();
        used.slots[self.slot] = false;
        if !used.slots.contains(&true) {
            used.links.clear();
        }
    }
}
