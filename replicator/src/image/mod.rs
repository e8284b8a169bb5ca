//! What a checkpoint is made of: the state of a container's processes, apart from page contents.
//!
//! A checkpoint is a [`State`] and a set of pages ([`pages::PageSet`]). The state is complete in
//! every checkpoint (it is small); the pages are those that changed since the checkpoint before.
//! Types here hold plain data with no descriptors in them: they can be sent, stored, compared.
//!
//! Pids, tids and descriptor numbers are those that the container itself sees.

pub mod advice;
pub mod file;
pub mod files;
pub mod info;
pub mod net;
pub mod object;
pub mod options;
pub mod pages;
#[cfg(test)]
mod pinned;
pub mod sysv;
pub mod task;
pub mod terminal;
pub mod tree;
pub mod unix;

use object::Object;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use sysv::{MessageQueue, Semaphores};
use tree::TmpfsEntry;

/// The state of a container at a stop.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Parents stand before their children; the first is the container's init, pid 1.
    pub processes: Vec<Process>,
    /// Open file descriptions, which one or more descriptors refer to by index.
    pub descriptions: Vec<Description>,
    /// Pipes, which two or more descriptions refer to by index.
    pub pipes: Vec<Pipe>,
    /// The container's clocks at the stop.
    pub clocks: Clocks,
    /// Memory that processes may share, which mappings and descriptions refer to by number.
    pub objects: Vec<Object>,
    /// All names in the container's own tmpfs mounts.
    pub tmpfs: Vec<TmpfsEntry>,
    /// System V semaphores of the container's ipc namespace.
    pub semaphores: Vec<Semaphores>,
    /// System V message queues of it.
    pub message_queues: Vec<MessageQueue>,
    /// Unix sockets, which descriptions and each other refer to by index.
    pub unix_sockets: Vec<unix::UnixSocket>,
    /// Processes that have ended and were not waited for.
    pub ended: Vec<task::Ended>,
    /// Connections that no descriptor names yet, in the order in which they are to be accepted.
    pub young: Vec<net::Young>,
    /// Connections that the program has closed and whose peers have not acknowledged everything.
    pub farewells: Vec<net::TcpConnection>,
    /// Connections that were closed within one epoch, by what the gate saw of their end.
    pub partings: Vec<net::Parting>,
    /// Host name and domain name, if the container has its own.
    pub names: Option<(String, String)>,
    /// What stands for the code of the kernel's vdso, which must be the same where the container
    /// goes on; 0: unknown.
    pub vdso: u64,
    /// Locks on files.
    pub locks: Vec<files::FileLock>,
    /// Who is told of events.
    pub owners: Vec<files::Owner>,
}

impl State {
    /// Whether what is in the pipe with this index are packets: one read gives one of them.
    pub fn has_packets(&self, pipe: u32) -> bool {
        let is_it = |d: &&Description| match &d.kind {
            Kind::Pipe(index) | Kind::Fifo { pipe: index, .. } => *index == pipe,
            _ => false,
        };
        let in_packets = |d: &Description| {
            d.flags & libc::O_DIRECT != 0 && d.flags & libc::O_ACCMODE != libc::O_RDONLY
        };
        self.pipes.get(pipe as usize).is_some_and(|p| p.packets.len() > 1)
            || self.descriptions.iter().filter(is_it).any(in_packets)
    }
}

impl State {
    /// Whom pages belong to, in the order that [`pages::Run::process`] counts: processes by pid,
    /// then objects by their (negative) owner number.
    pub fn owners(&self) -> Vec<i32> {
        let processes = self.processes.iter().map(|p| p.pid);
        processes.chain(self.objects.iter().map(Object::owner)).collect()
    }
}

/// The container's clocks, in nanoseconds, as its processes read them (time namespace included).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// CLOCK_MONOTONIC
    pub monotonic: u64,
    /// CLOCK_BOOTTIME
    pub boottime: u64,
}

/// One process (thread group).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Pid in the container's namespace.
    pub pid: i32,
    /// Parent's pid; 0 for the container's init.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The mappings in order of address. Shared, as most checkpoints have those of the one before.
    pub mappings: Arc<Vec<Mapping>>,
    /// Fields of the kernel's mm_struct that prctl(2) PR_SET_MM_MAP sets.
    pub mm: MmFields,
    /// The auxiliary vector, as /proc/PID/auxv gives it.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// The program, as /proc/PID/exe gives it.
    pub exe: String,
    /// The threads; the first is the leader, whose tid is `pid`.
    pub threads: Vec<Thread>,
    /// Signal dispositions other than the default.
    pub actions: Vec<SignalAction>,
    /// Signals pending for the whole process: raw siginfo_t of 128 bytes each.
    pub pending: Vec<Vec<u8>>,
    /// Descriptors in order of number.
    pub fds: Vec<Fd>,
    /// Working directory, as the container sees it.
    pub cwd: String,
    /// File mode creation mask.
    pub umask: u32,
    /// Resource limits as (resource, soft, hard), RLIM_INFINITY as u64::MAX.
    pub limits: Vec<(u32, u64, u64)>,
    /// User, groups and capabilities.
    pub creds: Credentials,
    /// prctl(2) PR_GET_DUMPABLE: 0, 1 or 2.
    pub dumpable: u8,
    /// Timers that send it signals.
    pub timers: task::Timers,
    /// Where it stands in the tree, beside its numbers.
    pub place: task::Place,
    /// Settings that most processes leave as they were.
    pub settings: task::ProcessSettings,
    /// What it has said of its memory, in order of address.
    pub advice: Vec<advice::Advice>,
}

/// Fields for prctl(2) PR_SET_MM_MAP, in the order of struct prctl_mm_map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after struct prctl_mm_map in linux/prctl.h")]
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// User and group ids, supplementary groups and capability sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file-system user id.
    pub uids: [u32; 4],
    /// Real, effective, saved and file-system group id.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding and ambient capability sets.
    pub caps: [u64; 5],
    /// prctl(2) PR_GET_NO_NEW_PRIVS
    pub no_new_privs: bool,
    /// prctl(2) PR_GET_SECUREBITS, "keep capabilities" among them.
    pub securebits: u32,
}

/// One mapping of a process's address space, page aligned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// PROT_READ | PROT_WRITE | PROT_EXEC
    pub prot: u8,
    /// MAP_GROWSDOWN
    pub grows_down: bool,
    /// What backs it.
    pub source: Source,
    /// The mapping was made since the checkpoint before: whatever a spare holds in this range is
    /// void, and this checkpoint carries every page of it. True for all in a full checkpoint.
    pub fresh: bool,
}

/// What backs a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// Private anonymous memory, heap and stacks included.
    Anonymous,
    /// A file by its path in the container.
    File {
        /// Path in the container's mount namespace.
        path: String,
        /// Offset of `start` in the file, in bytes.
        offset: u64,
        /// MAP_SHARED
        shared: bool,
        /// Where it is.
        home: Home,
        /// Of a shared one of a file in a volume: it was opened for writing too, and so can be written through after
        /// mprotect(2), if not now.
        writable: bool,
    },
    /// The kernel's vdso code page or its data pages; they are moved, never copied.
    Vdso(VdsoPart),
    /// A part of an [`Object`].
    Object {
        /// Its number.
        id: u32,
        /// Offset of `start` in it, in bytes.
        offset: u64,
        /// MAP_SHARED: all pages are the object's. Otherwise pages that the process wrote are
        /// its own.
        shared: bool,
    },
}

impl Source {
    /// The source of what lies `bytes` behind.
    #[must_use]
    pub fn behind(&self, bytes: u64) -> Self {
        let mut source = self.clone();
        if let Source::File { offset, .. } | Source::Object { offset, .. } = &mut source {
            *offset += bytes;
        }
        source
    }
}

/// Where a file is that is mapped: what is in a volume a spare maps when it has the volume, in its takeover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Home {
    /// Both hosts have it at its path.
    #[default]
    Host,
    /// In a volume. The number is that of the file, by which it is found if it is at no path any more.
    Volume(u64),
    /// In the upper layer of a root that is a volume, as the file with this number.
    Root(u64),
}

impl Mapping {
    /// Whether it is of a file that a spare does not have before its takeover.
    pub fn is_late(&self) -> bool {
        matches!(self.source, Source::File { home: Home::Volume(_) | Home::Root(_), .. })
    }
}

/// Which of the kernel's own mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in /proc/PID/maps")]
pub enum VdsoPart {
    Vdso,
    Vvar,
    VvarVclock,
}

/// One thread, stopped outside of any system call (or about to enter it again).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Tid in the container's namespace.
    pub tid: i32,
    /// struct user_regs_struct as an array of its 27 fields, ready to resume: an interrupted
    /// system call has been set back to its own instruction.
    pub regs: Regs,
    /// The extended state (PTRACE_GETREGSET, NT_X86_XSTATE), standard format.
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub blocked: u64,
    /// Signals pending for this thread: raw siginfo_t of 128 bytes each.
    pub pending: Vec<Vec<u8>>,
    /// Head and length of the robust futex list; head 0 for none.
    pub robust_list: (u64, u64),
    /// Address set by set_tid_address(2); 0 for none.
    pub tid_address: u64,
    /// Registered restartable sequences area, if any.
    pub rseq: Option<Rseq>,
    /// stack_t: pointer, flags and size of the alternate signal stack.
    pub altstack: (u64, u64, u64),
    /// Thread name, at most 15 bytes.
    pub comm: String,
    /// The wait that it is in, if that has a time-out.
    pub wait: Option<task::Wait>,
    /// Settings that most threads leave as they were.
    pub settings: task::ThreadSettings,
}

/// The 27 words of the kernel's struct user_regs_struct on x86-64, in its order.
pub type Regs = [u64; 27];

/// A registration of restartable sequences, see rseq(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of the area.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// The signature it was registered with.
    pub signature: u32,
}

/// A signal disposition, as the kernel's struct kernel_sigaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    /// Signal number, 1 to 64.
    pub signal: u8,
    /// Handler address, 0 for default, 1 for ignore.
    pub handler: u64,
    /// SA_ flags.
    pub flags: u64,
    /// Return trampoline.
    pub restorer: u64,
    /// Signals blocked while the handler runs.
    pub mask: u64,
}

/// One descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    /// Its number.
    pub number: i32,
    /// Index into [`State::descriptions`].
    pub description: u32,
    /// FD_CLOEXEC
    pub close_on_exec: bool,
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// File status flags and access mode (O_*), as fcntl(2) F_GETFL gives them, without
    /// O_CLOEXEC.
    pub flags: i32,
    /// What it is.
    pub kind: Kind,
}

/// What an open file description refers to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Kind {
    /// A file, directory or character device by its path in the container.
    File {
        /// Path in the container's mount namespace.
        path: String,
        /// File offset.
        offset: u64,
    },
    /// One end of a pipe: index into [`State::pipes`]; the access mode is in the flags.
    Pipe(u32),
    /// An eventfd.
    EventFd {
        /// Its counter.
        count: u64,
        /// EFD_SEMAPHORE
        semaphore: bool,
    },
    /// A timerfd.
    TimerFd(TimerFd),
    /// An epoll instance.
    Epoll(Vec<EpollTarget>),
    /// A unix socket: index into [`State::unix_sockets`].
    Unix(u32),
    /// A listening TCP socket.
    TcpListener(Box<net::TcpListener>),
    /// A TCP socket that is or was connected.
    Tcp(Box<net::TcpConnection>),
    /// A TCP socket neither connected nor listening.
    InetIdle(Box<net::InetIdle>),
    /// An [`Object`] opened like a file: a memfd, a deleted file.
    Object {
        /// Its number.
        id: u32,
        /// File offset.
        offset: u64,
    },
    /// An end of a named pipe.
    Fifo {
        /// Path in the container's mount namespace.
        path: String,
        /// Index into [`State::pipes`].
        pipe: u32,
    },
    /// A signalfd with its mask (bit 0: signal 1).
    SignalFd(u64),
    /// An inotify instance.
    Inotify(Vec<files::Watch>),
    /// A handle of the process with this pid; 0: of one that has ended.
    PidFd(i32),
    /// A namespace of the process with this pid.
    Namespace {
        /// Pid in the container.
        pid: i32,
        /// As in /proc/PID/ns.
        name: String,
    },
    /// A UDP, raw or ICMP socket.
    Datagram(Box<net::DatagramSocket>),
    /// A netlink socket.
    Netlink(Box<net::NetlinkSocket>),
    /// The controlling end of a pseudo terminal, with all that is known of it.
    Terminal(Box<terminal::Terminal>),
    /// The other end of the one with this number.
    TerminalEnd(u32),
    /// An epoll instance that also watches files whose numbers were closed or are others' by now.
    EpollPast {
        /// What it watches under numbers that mean the same still.
        targets: Vec<EpollTarget>,
        /// The others, each with the index of its file in [`State::descriptions`].
        past: Vec<(EpollTarget, u32)>,
    },
}

// One of a thousand connections is put into a state while the container stands still.
const _: () = assert!(size_of::<Description>() <= 64);

/// A timerfd, see timerfd_create(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    /// Clock id.
    pub clock: i32,
    /// Expirations not read yet.
    pub ticks: u64,
    /// TFD_TIMER_ flags it was set with.
    pub set_flags: i32,
    /// Nanoseconds to the next expiration at the stop (0: disarmed).
    pub value: u64,
    /// Interval in nanoseconds.
    pub interval: u64,
}

impl TimerFd {
    /// Whether it has expired more often than it has counted: a periodic one counts only its first
    /// expiration until somebody reads or asks it.
    pub fn owes(&self) -> bool {
        self.value == 0 && self.ticks != 0 && self.interval != 0
    }
}

/// One entry of an epoll interest list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// The descriptor number it was added under, in the process that holds the epoll instance.
    pub fd: i32,
    /// EPOLL event mask and flags.
    pub events: u32,
    /// User data.
    pub data: u64,
}

/// A pipe and its contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    /// Capacity, as fcntl(2) F_GETPIPE_SZ gives it.
    pub capacity: u32,
    /// Bytes in it, oldest first.
    #[serde(with = "serde_bytes")]
    pub contents: Vec<u8>,
    /// Lengths of the pieces that one read gives at most (packet mode, O_DIRECT); their sum is
    /// that of the contents.
    pub packets: Vec<u32>,
}
