//! BPF programs, maps and iterators: bpf(2). Just what small programs at the ingress and egress of devices
//! need, programs that write what they see of a process into a file, programs that are run on
//! demand and leave what they see in memory that is shared with them, and programs that the kernel runs
//! at its tracepoints, whose memory can be looked at while they write to it.

use super::error::{SysError, SysResult, check};
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;

const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const MAP_DELETE: i32 = 3;
const PROG_LOAD: i32 = 5;
const PROG_TEST_RUN: i32 = 10;
const RAW_TRACEPOINT_OPEN: i32 = 17;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
const MAP_TYPE_HASH: u32 = 1;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_LRU_HASH: u32 = 9;
/// BPF_F_MMAPABLE.
const MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const PROG_TYPE_TRACING: u32 = 26;
/// BPF_TRACE_RAW_TP.
const TRACE_RAW_TP: u32 = 23;
/// BPF_TRACE_ITER.
const TRACE_ITER: u32 = 28;
/// Place of attach_btf_id in a request to load a program.
const ATTACH_BTF_ID: usize = 108;
/// BPF_TCX_INGRESS.
const TCX_INGRESS: u32 = 46;
/// BPF_TCX_EGRESS.
const TCX_EGRESS: u32 = 47;
/// As much of union bpf_attr as is used here.
const ATTR: usize = 144;
/// Bytes of the verifier's log that an error shows.
const LOG: usize = 64 << 10;

/// The fields of a request, one after the other.
struct Attr([u8; ATTR], usize);

impl Attr {
    fn new() -> Self {
        Self([0; ATTR], 0)
    }

    fn word(mut self, value: u32) -> Self {
        self.0[self.1..self.1 + 4].copy_from_slice(&value.to_ne_bytes());
        self.1 += 4;
        self
    }

    fn pointer(self, bytes: &[u8]) -> Self {
        self.address(bytes.as_ptr() as u64)
    }

    fn address(mut self, address: u64) -> Self {
        self.0[self.1..self.1 + 8].copy_from_slice(&address.to_ne_bytes());
        self.1 += 8;
        self
    }

    fn call(&self, command: i32) -> i64 {
        // SAFETY: the kernel reads the request; the buffers that it points to are borrowed by the
        // callers until this returns, and the only one that is written (the log) is theirs alone.
        unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), ATTR) }
    }

    /// A command that answers in the request itself, as BPF_PROG_TEST_RUN does.
    fn call_answering(&mut self, command: i32) -> i64 {
        // SAFETY: as in `call`; the kernel writes no more than the request is long, and it is ours.
        unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), ATTR) }
    }

    fn open(&self, command: i32, name: &'static str, what: &str) -> SysResult<OwnedFd> {
        let fd = check(self.call(command), name, || what.to_owned())?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}

/// A hash table with keys and values of these sizes.
pub fn hash_map(key: usize, value: usize, entries: u32) -> SysResult<OwnedFd> {
    table(MAP_TYPE_HASH, key, value, entries)
}

/// Such a table that makes room for a new entry by dropping one that has not been asked for lately.
pub fn forgetful_map(key: usize, value: usize, entries: u32) -> SysResult<OwnedFd> {
    table(MAP_TYPE_LRU_HASH, key, value, entries)
}

fn table(kind: u32, key: usize, value: usize, entries: u32) -> SysResult<OwnedFd> {
    let attr = Attr::new().word(kind).word(key as u32).word(value as u32).word(entries);
    attr.open(MAP_CREATE, "BPF_MAP_CREATE", "a hash table")
}

/// Sets an entry. The sizes must be those of the map.
pub fn set(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> SysResult<()> {
    let attr = Attr::new().word(map.as_raw_fd() as u32).word(0).pointer(key).pointer(value);
    check(attr.call(MAP_UPDATE), "BPF_MAP_UPDATE_ELEM", || "a hash table".into()).map(drop)
}

/// Removes an entry, if it is there.
pub fn unset(map: BorrowedFd<'_>, key: &[u8]) -> SysResult<()> {
    let attr = Attr::new().word(map.as_raw_fd() as u32).word(0).pointer(key);
    match check(attr.call(MAP_DELETE), "BPF_MAP_DELETE_ELEM", || "a hash table".into()) {
        Err(e) if e.code() != libc::ENOENT => Err(e),
        _ => Ok(()),
    }
}

/// Words of memory that programs write to at any time: a map with one value. They are looked at and set
/// one by one.
#[derive(Debug)]
pub struct Words {
    map: OwnedFd,
    memory: MmapRaw,
    count: usize,
}

impl Words {
    /// So many words of eight bytes, all zero.
    pub fn new(count: usize) -> SysResult<Self> {
        let len = count * 8;
        let attr = Attr::new().word(MAP_TYPE_ARRAY).word(4).word(len as u32).word(1).word(MMAPABLE);
        let map = attr.open(MAP_CREATE, "BPF_MAP_CREATE", "memory of a tracepoint's program")?;
        let memory = MmapOptions::new().len(len).map_raw(&map).map_err(|source| SysError {
            call: "mmap",
            object: "memory of a tracepoint's program".into(),
            source,
        })?;
        Ok(Self { map, memory, count })
    }

    /// The map.
    pub fn map(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// One of the words.
    pub fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "word {index} of {}", self.count);
        // SAFETY: the word lies within the mapping, which is as long-lived as the borrow and begins
        // with a page, so that it is aligned; whoever else accesses it (programs in the kernel, other
        // threads by this function) does so by single accesses of the whole word.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(index)) }
    }
}

/// Memory that this process shares with programs which it runs: a map with one value.
#[derive(Debug)]
pub struct Shared {
    map: OwnedFd,
    bytes: MmapMut,
}

impl Shared {
    /// So many bytes, zeroed.
    pub fn new(len: usize) -> SysResult<Self> {
        let attr = Attr::new().word(MAP_TYPE_ARRAY).word(4).word(len as u32).word(1).word(MMAPABLE);
        let map = attr.open(MAP_CREATE, "BPF_MAP_CREATE", "shared memory")?;
        // SAFETY: nobody else has the map; the programs that do run while nothing of these bytes is borrowed, see
        // `map`.
        let bytes = unsafe { MmapOptions::new().len(len).map_mut(&map) };
        let failed = |source| SysError { call: "mmap", object: "shared memory".into(), source };
        Ok(Self { map, bytes: bytes.map_err(failed)? })
    }

    /// The map. A program that has it runs in [`Shared::run`] alone, of this memory or of other memory that it
    /// shares: then nothing that was borrowed of these bytes lives on meanwhile.
    pub fn map(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Runs a program for packets once, for an empty one that comes by the device with this index of
    /// the calling thread's network namespace.
    pub fn run(&mut self, program: BorrowedFd<'_>, device: u32) -> SysResult<()> {
        const PACKET: usize = 64;
        /// Places of ifindex in struct __sk_buff, and of ctx_size_in in a request.
        const IFINDEX: usize = 40;
        const CONTEXT: usize = 40;
        let mut context = [0u8; IFINDEX + 4];
        context[IFINDEX..].copy_from_slice(&device.to_ne_bytes());
        let packet = [0u8; PACKET];
        let mut attr = Attr::new().word(program.as_raw_fd() as u32).word(0).word(PACKET as u32);
        attr = attr.word(0).pointer(&packet);
        attr.1 = CONTEXT;
        attr = attr.word(context.len() as u32).word(0).pointer(&context);
        let r = attr.call_answering(PROG_TEST_RUN);
        check(r, "BPF_PROG_TEST_RUN", || format!("device {device}")).map(drop)
    }
}

/// Loads a program for packets that arrive at a device, under the GPL as its kernel functions
/// demand.
pub fn load(instructions: &[u8]) -> SysResult<OwnedFd> {
    load_as(instructions, PROG_TYPE_SCHED_CLS, 0, 0, "a program for packets")
}

/// Loads a program for an iterator; `target` is the BTF id of the iterator's function.
pub fn load_iterator(instructions: &[u8], target: u32) -> SysResult<OwnedFd> {
    load_as(instructions, PROG_TYPE_TRACING, TRACE_ITER, target, "a program for an iterator")
}

/// Loads a program for a tracepoint; `target` is the BTF id of the type named after it.
pub fn load_tracepoint(instructions: &[u8], target: u32) -> SysResult<OwnedFd> {
    load_as(instructions, PROG_TYPE_TRACING, TRACE_RAW_TP, target, "a program for a tracepoint")
}

/// Has the kernel run a program at its tracepoint until the descriptor is closed.
pub fn at_tracepoint(program: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    // The name of the tracepoint is part of the program.
    let attr = Attr::new().address(0).word(program.as_raw_fd() as u32);
    attr.open(RAW_TRACEPOINT_OPEN, "BPF_RAW_TRACEPOINT_OPEN", "a tracepoint")
}

fn load_as(
    instructions: &[u8],
    kind: u32,
    attach_type: u32,
    target: u32,
    what: &str,
) -> SysResult<OwnedFd> {
    const LICENSE: &[u8] = b"GPL\0";
    /// Place of expected_attach_type.
    const ATTACH_TYPE: usize = 68;
    let request = |level: u32, log: (u64, usize)| {
        let mut attr = Attr::new()
            .word(kind)
            .word((instructions.len() / 8) as u32)
            .pointer(instructions)
            .pointer(LICENSE)
            .word(level)
            .word(log.1 as u32)
            .address(log.0);
        attr.1 = ATTACH_TYPE;
        attr = attr.word(attach_type);
        attr.1 = ATTACH_BTF_ID;
        attr.word(target)
    };
    match request(0, (0, 0)).open(PROG_LOAD, "BPF_PROG_LOAD", what) {
        Ok(fd) => Ok(fd),
        Err(error) => {
            let mut log = vec![0u8; LOG];
            let again = request(1, (log.as_mut_ptr() as u64, LOG));
            // It fails again, and says why.
            let _ = again.open(PROG_LOAD, "BPF_PROG_LOAD", what);
            let end = log.iter().position(|b| *b == 0).unwrap_or(LOG);
            let text = String::from_utf8_lossy(&log[..end]);
            let last = text.lines().rev().find(|l| !l.starts_with("processed")).unwrap_or("");
            let object = format!("{what} ({last})");
            Err(SysError { call: "BPF_PROG_LOAD", object, source: error.source })
        }
    }
}

/// Ties an iterator's program to the threads or descriptors of one process.
pub fn iterate_process(program: BorrowedFd<'_>, pid: i32) -> SysResult<OwnedFd> {
    iterate_task(program, 0, pid)
}

/// Ties an iterator's program to one thread.
pub fn iterate_thread(program: BorrowedFd<'_>, tid: i32) -> SysResult<OwnedFd> {
    iterate_task(program, tid, 0)
}

fn iterate_task(program: BorrowedFd<'_>, tid: i32, pid: i32) -> SysResult<OwnedFd> {
    // union bpf_iter_link_info: tid, pid of the whole process, pidfd.
    let mut info = [0u8; 16];
    info[..4].copy_from_slice(&tid.to_ne_bytes());
    info[4..8].copy_from_slice(&pid.to_ne_bytes());
    let mut attr = Attr::new().word(program.as_raw_fd() as u32).word(0).word(TRACE_ITER).word(0);
    attr = attr.pointer(&info).word(info.len() as u32);
    attr.open(LINK_CREATE, "BPF_LINK_CREATE", &format!("pid {}", tid.max(pid)))
}

/// What an iterator's program writes when it is called for the last time, without an object: one byte.
/// Everything else that it writes are words of four bytes, so that the length tells whether it was there.
pub const END: u8 = 0xff;

/// Runs an iterator from its beginning and puts what its program wrote at the beginning of `out`,
/// which grows as needed. Gives the number of bytes, without [`END`].
///
/// It reads up to that byte and no further: some of the kernel's iterators do not know that they were
/// at their end (`task_vma` of one thread begins again where a writer had last waited for its lock, or
/// where the buffer had been full, and never ends).
///
/// # Errors
/// The kernel refuses, or nothing more comes although the program has not been told of the end (EIO).
pub fn iterate(link: BorrowedFd<'_>, out: &mut Vec<u8>) -> SysResult<usize> {
    // As much as the kernel keeps for a reader: less would cut a record in two.
    const ROOM: usize = 32 << 10;
    let attr = Attr::new().word(link.as_raw_fd() as u32);
    let fd = attr.open(ITER_CREATE, "BPF_ITER_CREATE", "an iterator")?;
    let mut used = 0;
    loop {
        if out.len() < used + ROOM {
            out.resize((used + ROOM).next_power_of_two(), 0);
        }
        match nix::unistd::read(&fd, &mut out[used..]) {
            Ok(0) => return Err(SysError::errno("read", "an iterator without end", libc::EIO)),
            Ok(n) => used += n,
            // It has gone a long way without a word.
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(e) => return Err(SysError::errno("read", "an iterator", e as i32)),
        }
        if used % 4 != 0 {
            return Ok(used - 1);
        }
    }
}

/// Runs a program on what arrives at the device with this index of the calling thread's network
/// namespace, until the descriptor is closed. Closing waits until no processor runs it any more.
pub fn at_ingress(program: BorrowedFd<'_>, device: u32) -> SysResult<OwnedFd> {
    at(program, device, TCX_INGRESS, "the ingress of the container's device")
}

/// Runs a program on what is sent through the device with this index of the calling thread's network
/// namespace, before it is queued there, until the descriptor is closed. Closing waits as with [`at_ingress`].
pub fn at_egress(program: BorrowedFd<'_>, device: u32) -> SysResult<OwnedFd> {
    at(program, device, TCX_EGRESS, "the egress of a device")
}

fn at(program: BorrowedFd<'_>, device: u32, place: u32, what: &str) -> SysResult<OwnedFd> {
    let attr = Attr::new().word(program.as_raw_fd() as u32).word(device).word(place);
    attr.open(LINK_CREATE, "BPF_LINK_CREATE", what)
}
