//! The descriptors of a process: a program for the `task_file` iterator, and the rows that it
//! writes.
//!
//! ```text
//! a row:   | head: number, flags, file, inode, who watches it, ... | of a TCP socket: its fields |
//! ```

use super::layout::{Layout, Use, Wanted};
use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::sys::{SysError, SysResult, bpf};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};

/// Places in the head of a row.
mod head {
    pub(super) const FD: usize = 0;
    pub(super) const FLAGS: usize = 4;
    pub(super) const FILE: usize = 8;
    pub(super) const OPERATIONS: usize = 16;
    pub(super) const INODE: usize = 24;
    pub(super) const LOCKS: usize = 32;
    pub(super) const POSITION: usize = 40;
    pub(super) const PRIVATE: usize = 48;
    pub(super) const OWNER: usize = 56;
    pub(super) const CLOEXEC: usize = 64;
    /// The first epoll instance that watches the file, by which number, for what.
    pub(super) const WATCHER: usize = 72;
    pub(super) const WATCHED_AS: usize = 80;
    pub(super) const IS_TCP: usize = 84;
    /// struct epoll_event is packed.
    pub(super) const EVENTS: usize = 88;
    pub(super) const EVENT_DATA: usize = 92;
    pub(super) const TID: usize = 100;
    pub(super) const TIME: usize = 104;
    /// What the file would be if it were an epoll instance or an eventfd.
    pub(super) const EPOLL_REFERENCES: usize = 112;
    pub(super) const EVENTFD_FLAGS: usize = 116;
    pub(super) const EVENTFD_COUNT: usize = 120;
    /// Of a TCP socket: its struct tcp_sock.
    pub(super) const SOCKET: usize = EVENTFD_COUNT;
    /// Entry and directory of its name, and what says whether the name is still there.
    pub(super) const ENTRY: usize = 128;
    pub(super) const PARENT: usize = 136;
    pub(super) const NAME: usize = 144;
    pub(super) const HASHED: usize = 152;
    /// What it would be if it were a pipe.
    pub(super) const PIPE_HEAD: usize = 160;
    pub(super) const PIPE_TAIL: usize = 164;
    pub(super) const PIPE_SLOTS: usize = 168;
    pub(super) const LEN: usize = 176;
}

/// Place of the head on the stack.
const HEAD: i16 = -(head::LEN as i16);
/// A program has 512 bytes of stack.
const STACK: usize = 512;

macro_rules! fields {
    ($($name:ident: $structure:ident $path:literal $used:ident,)*) => {
        /// The fields of a TCP socket that are copied.
        #[allow(dead_code, reason = "some are only compared")]
        #[derive(Clone, Copy)]
        enum Field { $($name,)* }
        const FIELDS: &[Wanted] = &[$((Structure::$structure as usize, $path, Use::$used),)*];
    };
}

/// Structures that fields are in.
enum Structure {
    Tcp,
    Ipv6,
}

fields! {
    Addresses: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_addrpair" Identity,
    Ports: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_portpair" Identity,
    Family: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_family" Identity,
    State: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_state" Data,
    Reuse: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_reuse" Setting,
    ReusePort: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_reuseport" Setting,
    Ipv6Only: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_ipv6only" Setting,
    Device: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_bound_dev_if" Setting,
    RemoteV6: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_v6_daddr" Identity,
    LocalV6: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_v6_rcv_saddr" Identity,
    Cookie: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_cookie" Identity,
    Flags: Tcp "inet_conn.icsk_inet.sk.__sk_common.skc_flags" Setting,
    Disconnects: Tcp "inet_conn.icsk_inet.sk.sk_disconnects" Identity,
    PeekOffset: Tcp "inet_conn.icsk_inet.sk.sk_peek_off" Setting,
    BusyPoll: Tcp "inet_conn.icsk_inet.sk.sk_ll_usec" Setting,
    Locked: Tcp "inet_conn.icsk_inet.sk.sk_userlocks" Setting,
    ReceiveBuffer: Tcp "inet_conn.icsk_inet.sk.sk_rcvbuf" Data,
    SendBuffer: Tcp "inet_conn.icsk_inet.sk.sk_sndbuf" Data,
    Filter: Tcp "inet_conn.icsk_inet.sk.sk_filter" Setting,
    ReceiveTimeout: Tcp "inet_conn.icsk_inet.sk.sk_rcvtimeo" Setting,
    SendTimeout: Tcp "inet_conn.icsk_inet.sk.sk_sndtimeo" Setting,
    LowWater: Tcp "inet_conn.icsk_inet.sk.sk_rcvlowat" Setting,
    Timestamping: Tcp "inet_conn.icsk_inet.sk.sk_tsflags" Setting,
    MaxPacing: Tcp "inet_conn.icsk_inet.sk.sk_max_pacing_rate" Setting,
    Priority: Tcp "inet_conn.icsk_inet.sk.sk_priority" Setting,
    Mark: Tcp "inet_conn.icsk_inet.sk.sk_mark" Setting,
    NoCheck: Tcp "inet_conn.icsk_inet.sk.sk_no_check_tx" Setting,
    Shutdown: Tcp "inet_conn.icsk_inet.sk.sk_shutdown" Data,
    Linger: Tcp "inet_conn.icsk_inet.sk.sk_lingertime" Setting,
    Backlog: Tcp "inet_conn.icsk_inet.sk.sk_max_ack_backlog" Data,
    InetFlags: Tcp "inet_conn.icsk_inet.inet_flags" Setting,
    TimeToLive: Tcp "inet_conn.icsk_inet.uc_ttl" Setting,
    TypeOfService: Tcp "inet_conn.icsk_inet.tos" Setting,
    MinTimeToLive: Tcp "inet_conn.icsk_inet.min_ttl" Setting,
    PathMtu: Tcp "inet_conn.icsk_inet.pmtudisc" Setting,
    PortRange: Tcp "inet_conn.icsk_inet.local_port_range" Setting,
    DeferAccept: Tcp "inet_conn.icsk_accept_queue.rskq_defer_accept" Setting,
    FastOpen: Tcp "inet_conn.icsk_accept_queue.fastopenq.max_qlen" Setting,
    RtoMin: Tcp "inet_conn.icsk_rto_min" Setting,
    RtoMax: Tcp "inet_conn.icsk_rto_max" Setting,
    DelackMax: Tcp "inet_conn.icsk_delack_max" Setting,
    Congestion: Tcp "inet_conn.icsk_ca_ops" Setting,
    Protocol: Tcp "inet_conn.icsk_ulp_ops" Setting,
    SynRetries: Tcp "inet_conn.icsk_syn_retries" Setting,
    UserTimeout: Tcp "inet_conn.icsk_user_timeout" Setting,
    NotSent: Tcp "notsent_lowat" Setting,
    Nagle: Tcp "nonagle" Data,
    QueueLength: Tcp "recvmsg_inq" Setting,
    ThinTimeouts: Tcp "thin_lto" Setting,
    FastOpenConnect: Tcp "fastopen_connect" Setting,
    FastOpenNoCookie: Tcp "fastopen_no_cookie" Setting,
    SaveSyn: Tcp "save_syn" Setting,
    KeepAliveProbes: Tcp "keepalive_probes" Setting,
    KeepAliveTime: Tcp "keepalive_time" Setting,
    KeepAliveInterval: Tcp "keepalive_intvl" Setting,
    Linger2: Tcp "linger2" Setting,
    TxDelay: Tcp "tcp_tx_delay" Setting,
    MaxSegment: Tcp "rx_opt.user_mss" Setting,
    Md5: Tcp "md5sig_info" Setting,
    WriteSeq: Tcp "write_seq" Data,
    SendUna: Tcp "snd_una" Data,
    RcvNxt: Tcp "rcv_nxt" Data,
    CopiedSeq: Tcp "copied_seq" Data,
    Urgent: Tcp "urg_data" Data,
    Repair: Tcp "repair" Data,
    WindowSeq: Tcp "snd_wl1" Data,
    SendWindow: Tcp "snd_wnd" Data,
    MaxWindow: Tcp "max_window" Data,
    ReceiveWindow: Tcp "rcv_wnd" Data,
    WindowUpdate: Tcp "rcv_wup" Data,
    TimestampOffset: Tcp "tsoffset" Data,
    Microseconds: Tcp "tcp_usec_ts" Identity,
    PeerSegment: Tcp "rx_opt.mss_clamp" Identity,
    HasTimestamps: Tcp "rx_opt.tstamp_ok" Identity,
    HasScale: Tcp "rx_opt.wscale_ok" Identity,
    HasSack: Tcp "rx_opt.sack_ok" Identity,
    SendScale: Tcp "rx_opt.snd_wscale" Identity,
    ReceiveScale: Tcp "rx_opt.rcv_wscale" Identity,
    HopLimit: Ipv6 "hop_limit" Setting,
    PathMtuV6: Ipv6 "pmtudisc" Setting,
    TrafficClass: Ipv6 "tclass" Setting,
    Receives: Ipv6 "rxopt.all" Setting,
    MinHops: Ipv6 "min_hopcount" Setting,
}

/// The program, loaded.
#[derive(Debug)]
pub(in crate::capture) struct Descriptors {
    program: OwnedFd,
    tcp: Layout,
}

impl Descriptors {
    pub(super) fn load() -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for fields of the kernel's structures",
            object: "an iterator over descriptors".into(),
            source,
        };
        let (code, tcp, target) = assemble().map_err(failed)?;
        Ok(Self { program: bpf::load_iterator(&code, target)?, tcp })
    }
}

/// The program, the layout of what it says of TCP sockets, and the BTF id of the iterator.
fn assemble() -> io::Result<(Vec<u8>, Layout, u32)> {
    let btf = Btf::of_kernel()?;
    let target = btf.function("bpf_iter_task_file")?;
    let tcp = tcp_layout(&btf)?;
    if tcp.len() > STACK {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the fields are too many"));
    }
    let mut a = Assembler::default();
    a.mov(6, 1);
    write_head(&mut a, &btf)?;
    write_tcp(&mut a, &btf, &tcp)?;
    super::write_end(&mut a);
    Ok((a.finish(), tcp, target))
}

/// Offset of a field, and whether it is an address.
fn offset(btf: &Btf, of: &str, path: &str) -> io::Result<i16> {
    let member = btf.member(btf.structure(of)?, path)?;
    i16::try_from(member.offset).map_err(io::Error::other)
}

/// Reads bytes at the address in register 3 to a place on the stack; zeroes if there are none.
fn peek(a: &mut Assembler, to: i16, len: i32) {
    a.place(1, to);
    a.set(2, len);
    a.call(helper::PROBE_READ);
}

/// Writes a record on the stack to the reader of the iterator.
fn emit(a: &mut Assembler, from: i16, len: usize) {
    a.mov(1, 7);
    a.place(2, from);
    a.set(3, len as i32);
    a.call(helper::SEQ_WRITE);
}

/// Fills the head. Register 6 is the context, 7 where to write to, 8 the file, 9 the task.
fn write_head(a: &mut Assembler, btf: &Btf) -> io::Result<()> {
    use Size::{Double, Word};
    let at = |place: usize| HEAD + place as i16;
    let context = |path| offset(btf, "bpf_iter__task_file", path);
    let file = |path| offset(btf, "file", path);
    if !btf.member(btf.structure("file")?, "f_owner")?.pointer {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "f_owner is no address"));
    }
    a.load(Double, 7, 6, context("meta")?);
    a.load(Double, 7, 7, offset(btf, "bpf_iter_meta", "seq")?);
    a.load(Double, 8, 6, context("file")?);
    a.jump(If::Equal, 8, 0, "last");
    a.load(Double, 9, 6, context("task")?);
    a.jump(If::Equal, 9, 0, "last");
    for place in (0..head::LEN).step_by(8) {
        a.store_value(Double, FP, at(place), 0);
    }
    a.load(Word, 1, 6, context("fd")?);
    a.store(Word, FP, at(head::FD), 1);
    a.load(Word, 1, 9, offset(btf, "task_struct", "pid")?);
    a.store(Word, FP, at(head::TID), 1);
    a.load(Word, 1, 8, file("f_flags")?);
    a.store(Word, FP, at(head::FLAGS), 1);
    a.store(Double, FP, at(head::FILE), 8);
    for (path, place) in [
        ("f_op", head::OPERATIONS),
        ("f_pos", head::POSITION),
        ("private_data", head::PRIVATE),
        ("f_owner", head::OWNER),
    ] {
        a.load(Double, 1, 8, file(path)?);
        a.store(Double, FP, at(place), 1);
    }
    a.load(Double, 2, 8, file("f_inode")?);
    for (path, place) in [("i_ino", head::INODE), ("i_flctx", head::LOCKS)] {
        a.load(Double, 1, 2, offset(btf, "inode", path)?);
        a.store(Double, FP, at(place), 1);
    }
    a.load(Double, 2, 8, file("f_path.dentry")?);
    a.store(Double, FP, at(head::ENTRY), 2);
    for (path, place) in [
        ("d_parent", head::PARENT),
        ("d_name.hash_len", head::NAME),
        ("d_hash.pprev", head::HASHED),
    ] {
        a.load(Double, 1, 2, offset(btf, "dentry", path)?);
        a.store(Double, FP, at(place), 1);
    }
    a.call(helper::KTIME);
    a.store(Double, FP, at(head::TIME), 0);
    // The word of the table that says whether it is closed on exec.
    a.load(Double, 3, 9, offset(btf, "task_struct", "files")?);
    a.load(Double, 3, 3, offset(btf, "files_struct", "fdt")?);
    a.load(Double, 3, 3, offset(btf, "fdtable", "close_on_exec")?);
    a.load(Word, 1, FP, at(head::FD));
    a.shift_right(1, 6);
    a.shift_left(1, 3);
    a.add_reg(3, 1);
    peek(a, at(head::CLOEXEC), 8);
    // The first epoll instance that watches it: what is asked of the item lies close together.
    a.load(Double, 3, 8, file("f_ep")?);
    a.load(Double, 3, 3, offset(btf, "hlist_head", "first")?);
    a.jump(If::Equal, 3, 0, "unwatched");
    let item = |path| offset(btf, "epitem", path);
    let wanted = [
        (item("ffd.fd")?, head::WATCHED_AS, 1),
        (item("ep")?, head::WATCHER, 2),
        (item("event.events")?, head::EVENTS, 1),
        (item("event.data")?, head::EVENT_DATA, 2),
    ];
    let first = wanted.iter().map(|(from, ..)| *from).fold(i16::MAX, i16::min);
    let last = wanted.iter().map(|(from, _, words)| from + 4 * words).fold(0, i16::max);
    let length = (last - first + 7) & !7;
    let copy = HEAD - length;
    if usize::from(copy.unsigned_abs()) > STACK || wanted.iter().any(|(f, ..)| f % 4 != 0) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "an item of epoll is too large"));
    }
    a.add(3, i32::from(first) - i32::from(item("fllink")?));
    peek(a, copy, (last - first).into());
    for (from, place, words) in wanted {
        for word in 0..words {
            a.load(Word, 1, FP, copy + from - first + 4 * word);
            a.store(Word, FP, at(place) + 4 * word, 1);
        }
    }
    a.label("unwatched");
    Ok(())
}

/// Completes the head and writes it, and behind it what there is to say of a TCP socket.
fn write_tcp(a: &mut Assembler, btf: &Btf, tcp: &Layout) -> io::Result<()> {
    use Size::{Double, Word};
    let at = |place: usize| HEAD + place as i16;
    a.mov(1, 8);
    a.call(helper::SOCK_FROM_FILE);
    a.jump(If::Equal, 0, 0, "no socket");
    a.load(Double, 1, 0, offset(btf, "socket", "sk")?);
    a.call(helper::TO_TCP_SOCK);
    a.jump(If::Equal, 0, 0, "no tcp");
    a.mov(9, 0);
    a.store_value(Word, FP, at(head::IS_TCP), 1);
    a.store(Double, FP, at(head::SOCKET), 9);
    emit(a, HEAD, head::LEN);
    let record = -(tcp.len() as i16);
    tcp.clear(a, record);
    tcp.copy(a, Structure::Tcp as usize, 9, record);
    a.load(Double, 2, 9, offset(btf, "tcp_sock", "inet_conn.icsk_inet.pinet6")?);
    tcp.copy(a, Structure::Ipv6 as usize, 2, record);
    emit(a, record, tcp.len());
    a.leave(0);
    a.label("no socket");
    for (of, path, place, len) in [
        ("eventpoll", "refcount", head::EPOLL_REFERENCES, 4),
        ("eventfd_ctx", "flags", head::EVENTFD_FLAGS, 4),
        ("eventfd_ctx", "count", head::EVENTFD_COUNT, 8),
        ("pipe_inode_info", "head", head::PIPE_HEAD, 4),
        ("pipe_inode_info", "tail", head::PIPE_TAIL, 4),
        ("pipe_inode_info", "max_usage", head::PIPE_SLOTS, 4),
    ] {
        a.load(Double, 3, 8, offset(btf, "file", "private_data")?);
        a.add(3, offset(btf, of, path)?.into());
        peek(a, at(place), len);
    }
    a.label("no tcp");
    emit(a, HEAD, head::LEN);
    Ok(())
}

/// The descriptors of one process.
#[derive(Debug)]
pub(in crate::capture) struct Glance {
    link: OwnedFd,
    pid: i32,
    known: &'static Descriptors,
    bytes: Vec<u8>,
    /// Where each row begins.
    rows: Vec<usize>,
    /// A second look.
    again: Vec<u8>,
}

/// What was seen of one descriptor.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Row<'a> {
    head: &'a [u8],
    /// If it is a TCP socket.
    pub(in crate::capture) tcp: Option<Tcp<'a>>,
}

/// What was seen of a TCP socket.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Tcp<'a> {
    layout: &'a Layout,
    record: &'a [u8],
    /// Nanoseconds on the monotonic clock.
    time: u64,
}

/// Where the same lies in a TCP socket that was found in another way.
#[derive(Debug)]
pub(in crate::capture) struct TcpLayout(Layout);

impl TcpLayout {
    pub(in crate::capture) fn new(btf: &Btf) -> io::Result<Self> {
        tcp_layout(btf).map(Self)
    }

    /// What is looked at of the bytes of a struct tcp_sock.
    pub(in crate::capture) fn record(&self, socket: &[u8]) -> Vec<u8> {
        self.0.record(Structure::Tcp as usize, socket)
    }

    /// What a record says that was made at this time (nanoseconds on the monotonic clock).
    pub(in crate::capture) fn show<'a>(&'a self, record: &'a [u8], time: u64) -> Tcp<'a> {
        Tcp { layout: &self.0, record, time }
    }
}

fn tcp_layout(btf: &Btf) -> io::Result<Layout> {
    let structures = [btf.structure("tcp_sock")?, btf.structure("ipv6_pinfo")?];
    Layout::new(btf, &structures, FIELDS)
}

impl Glance {
    /// For the process with this host pid. None if this kernel cannot do it.
    pub(in crate::capture) fn open(pid: i32) -> Option<Self> {
        let known = super::descriptors()?;
        // Of the leader alone: of a whole process the kernel shows them once more, as another thread's.
        match bpf::iterate_thread(known.program.as_fd(), pid) {
            Ok(link) => {
                let (bytes, rows, again) = Default::default();
                Some(Self { link, pid, known, bytes, rows, again })
            }
            Err(error) => {
                tracing::debug!(pid, %error, "its descriptors are looked at one by one");
                None
            }
        }
    }

    /// Looks.
    pub(in crate::capture) fn look(&mut self) -> SysResult<()> {
        self.rows.clear();
        let len = bpf::iterate(self.link.as_fd(), &mut self.bytes)?;
        let cut = || SysError::errno("read", "an iterator over descriptors", libc::EIO);
        let mut at = 0;
        while at < len {
            let row = self.bytes[..len].get(at..at + head::LEN).ok_or_else(cut)?;
            // A thread with descriptors of its own is not looked at.
            if u32_at(row, head::TID) as i32 == self.pid {
                self.rows.push(at);
            }
            let is_tcp = u32_at(row, head::IS_TCP) != 0;
            at += head::LEN + if is_tcp { self.known.tcp.len() } else { 0 };
        }
        if at == len { Ok(()) } else { Err(cut()) }
    }

    /// What the last look saw, by number.
    pub(in crate::capture) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|at| self.row(*at))
    }

    /// Whether the connections that may have both ends in the container have neither sent nor
    /// received anything since the last look.
    pub(in crate::capture) fn stands_still(&mut self) -> SysResult<bool> {
        let is_local = |row: Row<'_>| row.tcp.is_some_and(|tcp| tcp.is_local());
        if !self.rows().any(is_local) {
            return Ok(true);
        }
        std::mem::swap(&mut self.bytes, &mut self.again);
        let looked = self.look();
        std::mem::swap(&mut self.bytes, &mut self.again);
        looked?;
        let now = self.rows.iter().map(|at| self.row_in(&self.again, *at));
        Ok(now.zip(self.rows()).all(|(now, before)| match (now.tcp, before.tcp) {
            (Some(now), Some(before)) => {
                now.sent() == before.sent() && now.received() == before.received()
            }
            (None, None) => true,
            _ => false,
        }))
    }

    fn row(&self, at: usize) -> Row<'_> {
        self.row_in(&self.bytes, at)
    }

    fn row_in<'a>(&self, bytes: &'a [u8], at: usize) -> Row<'a> {
        let head = &bytes[at..at + head::LEN];
        let layout = &self.known.tcp;
        let tcp = (u32_at(head, head::IS_TCP) != 0).then(|| {
            let record = &bytes[at + head::LEN..at + head::LEN + layout.len()];
            Tcp { layout, record, time: u64_at(head, head::TIME) }
        });
        Row { head, tcp }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Row<'_> {
    /// The descriptor.
    pub(in crate::capture) fn number(&self) -> i32 {
        u32_at(self.head, head::FD) as i32
    }

    /// Flags as fdinfo shows them, O_CLOEXEC included.
    pub(in crate::capture) fn flags(&self) -> i32 {
        let flags = u32_at(self.head, head::FLAGS) as i32 & !libc::O_CLOEXEC;
        match u64_at(self.head, head::CLOEXEC) >> (self.number() & 63) & 1 {
            0 => flags,
            _ => flags | libc::O_CLOEXEC,
        }
    }

    /// Stands for the open file description while the process is stopped.
    pub(in crate::capture) fn file(&self) -> u64 {
        u64_at(self.head, head::FILE)
    }

    /// If it is a TCP socket: where it is in the kernel's memory.
    pub(in crate::capture) fn socket(&self) -> u64 {
        u64_at(self.head, head::SOCKET)
    }

    /// Stands for the kind of file.
    pub(in crate::capture) fn operations(&self) -> u64 {
        u64_at(self.head, head::OPERATIONS)
    }

    pub(in crate::capture) fn inode(&self) -> u64 {
        u64_at(self.head, head::INODE)
    }

    pub(in crate::capture) fn position(&self) -> u64 {
        u64_at(self.head, head::POSITION)
    }

    /// Whether anybody has ever locked the file.
    pub(in crate::capture) fn may_be_locked(&self) -> bool {
        u64_at(self.head, head::LOCKS) != 0
    }

    /// Whether anybody may be told of its events (F_SETOWN).
    pub(in crate::capture) fn may_tell(&self) -> bool {
        u64_at(self.head, head::OWNER) != 0
    }

    /// The first epoll instance that watches the file, by which number, events and data. Another
    /// that watches it too is short of an entry then.
    pub(in crate::capture) fn watcher(&self) -> Option<(u64, i32, u32, u64)> {
        let by = u64_at(self.head, head::WATCHER);
        let number = u32_at(self.head, head::WATCHED_AS) as i32;
        let events = u32_at(self.head, head::EVENTS);
        (by != 0).then(|| (by, number, events, u64_at(self.head, head::EVENT_DATA)))
    }

    /// If it is an epoll instance: what stands for it, and how many files it watches.
    pub(in crate::capture) fn as_epoll(&self) -> (u64, usize) {
        let references = u32_at(self.head, head::EPOLL_REFERENCES) as usize;
        (u64_at(self.head, head::PRIVATE), references.wrapping_sub(1))
    }

    /// Stands for its name, if it is a file with a path: for the name itself, that it is there, and
    /// the directory that it is in, not for those above.
    pub(in crate::capture) fn name(&self) -> [u64; 4] {
        let [entry, parent, name, hashed] =
            [head::ENTRY, head::PARENT, head::NAME, head::HASHED].map(|at| u64_at(self.head, at));
        [entry, parent, name, u64::from(hashed != 0)]
    }

    /// If it is a pipe that is empty: how many bytes it may hold.
    pub(in crate::capture) fn as_empty_pipe(&self) -> Option<u32> {
        let [first, behind, slots] =
            [head::PIPE_HEAD, head::PIPE_TAIL, head::PIPE_SLOTS].map(|at| u32_at(self.head, at));
        (first == behind).then_some(slots * 4096)
    }

    /// If it is an eventfd: its count, and whether it is a semaphore.
    pub(in crate::capture) fn as_eventfd(&self) -> (u64, bool) {
        let flags = u32_at(self.head, head::EVENTFD_FLAGS) as i32;
        (u64_at(self.head, head::EVENTFD_COUNT), flags & libc::EFD_SEMAPHORE != 0)
    }
}

impl Tcp<'_> {
    fn get(&self, field: Field) -> u64 {
        self.layout.get(self.record, field as usize)
    }

    fn word(&self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// As in tcp_states.h.
    pub(in crate::capture) fn state(&self) -> u8 {
        self.get(Field::State) as u8
    }

    /// This side and the other, as getsockname(2) and getpeername(2) give them.
    pub(in crate::capture) fn addresses(&self) -> [SocketAddr; 2] {
        let [a, b, c, d] = (self.get(Field::Ports) as u32).to_ne_bytes();
        let ports = [u16::from_ne_bytes([c, d]), u16::from_be_bytes([a, b])];
        if self.get(Field::Family) as i32 == libc::AF_INET {
            let [a, b, c, d, e, f, g, h] = self.get(Field::Addresses).to_ne_bytes();
            let [local, remote] = [Ipv4Addr::new(e, f, g, h), Ipv4Addr::new(a, b, c, d)];
            return [(local, ports[0]).into(), (remote, ports[1]).into()];
        }
        let address = |field, port| {
            let bytes = self.layout.bytes(self.record, field as usize);
            let ip = Ipv6Addr::from(<[u8; 16]>::try_from(bytes).expect("sixteen bytes"));
            let scope = if ip.is_unicast_link_local() { self.word(Field::Device) } else { 0 };
            SocketAddrV6::new(ip, port, 0, scope).into()
        };
        [address(Field::LocalV6, ports[0]), address(Field::RemoteV6, ports[1])]
    }

    /// The address of its congestion control (struct tcp_congestion_ops).
    pub(in crate::capture) fn congestion(&self) -> u64 {
        self.get(Field::Congestion)
    }

    /// A copy of the record, with SO_COOKIE, which the kernel makes up when it is asked for.
    pub(in crate::capture) fn with_cookie(&self, cookie: u64) -> Box<[u8]> {
        let mut record = Box::<[u8]>::from(self.record);
        self.layout.set(&mut record, Field::Cookie as usize, cookie);
        record
    }

    /// Whether a record of before is of the same connection.
    pub(in crate::capture) fn is_of(&self, before: &[u8]) -> bool {
        self.layout.same(self.record, before)
    }

    /// Whether a record of before has the same options, but for those that are shown here.
    pub(in crate::capture) fn has_options_of(&self, before: &[u8]) -> bool {
        self.layout.set_alike(self.record, before)
    }

    /// SO_SNDBUF and SO_RCVBUF, which the kernel changes by itself.
    pub(in crate::capture) fn buffers(&self) -> [i32; 2] {
        [self.word(Field::SendBuffer) as i32, self.word(Field::ReceiveBuffer) as i32]
    }

    /// TCP_NODELAY and TCP_CORK, which programs change from one write to the next.
    pub(in crate::capture) fn delays(&self) -> (bool, bool) {
        let nagle = self.get(Field::Nagle);
        (nagle & 1 != 0, nagle & 2 != 0)
    }

    /// Length of a listener's accept queue.
    pub(in crate::capture) fn backlog(&self) -> u32 {
        self.word(Field::Backlog)
    }

    /// Sequence number after the last byte written, and of the first not acknowledged.
    pub(in crate::capture) fn sent(&self) -> (u32, u32) {
        (self.word(Field::WriteSeq), self.word(Field::SendUna))
    }

    /// Sequence number expected next, and of the first byte not read.
    pub(in crate::capture) fn received(&self) -> (u32, u32) {
        (self.word(Field::RcvNxt), self.word(Field::CopiedSeq))
    }

    /// As TCP_REPAIR_WINDOW gives it.
    pub(in crate::capture) fn window(&self) -> [u32; 5] {
        use Field::{MaxWindow, ReceiveWindow, SendWindow, WindowSeq, WindowUpdate};
        [WindowSeq, SendWindow, MaxWindow, ReceiveWindow, WindowUpdate].map(|f| self.word(f))
    }

    /// The largest segment that the peer takes.
    pub(in crate::capture) fn peer_segment(&self) -> u32 {
        self.word(Field::PeerSegment)
    }

    /// TCP_TIMESTAMP, if timestamps were agreed on: its lowest bit says that they are microseconds.
    pub(in crate::capture) fn timestamp(&self) -> Option<u32> {
        let offset = self.word(Field::TimestampOffset);
        let clock = |unit| ((self.time / unit) as u32).wrapping_add(offset);
        (self.get(Field::HasTimestamps) != 0).then(|| match self.get(Field::Microseconds) {
            0 => clock(1_000_000) & !1,
            _ => clock(1_000) | 1,
        })
    }

    pub(in crate::capture) fn sack(&self) -> bool {
        self.get(Field::HasSack) != 0
    }

    /// Scales of what the peer announces and of what we do, if agreed on.
    pub(in crate::capture) fn scales(&self) -> Option<(u8, u8)> {
        let scales = (self.get(Field::SendScale) as u8, self.get(Field::ReceiveScale) as u8);
        (self.get(Field::HasScale) != 0).then_some(scales)
    }

    /// Whether the program has closed its side for reading, or the peer has closed.
    pub(in crate::capture) fn is_shut_for_reading(&self) -> bool {
        self.get(Field::Shutdown) & 1 != 0
    }

    /// Whether it has something that a glance does not show.
    pub(in crate::capture) fn is_special(&self) -> bool {
        use Field::{Microseconds, Repair, Urgent};
        [Urgent, Repair, Microseconds].iter().any(|f| self.get(*f) != 0)
    }

    /// Whether both ends may be in the container: segments arrive although its input is held.
    pub(in crate::capture) fn is_local(&self) -> bool {
        let [a, b, c, d, ..] = self.get(Field::Addresses).to_ne_bytes();
        let ours = &self.get(Field::Addresses).to_ne_bytes()[4..];
        let v4 = a == 127 || (ours == [a, b, c, d] && ours != [0; 4]);
        let six = |f| self.layout.bytes(self.record, f as usize);
        let (remote, local) = (six(Field::RemoteV6), six(Field::LocalV6));
        let mapped = remote[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        let v6 = remote != [0; 16] && (remote == local || (mapped && remote[12] == 127));
        v4 || v6
    }
}
