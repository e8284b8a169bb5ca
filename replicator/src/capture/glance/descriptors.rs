//! The descriptors of a process: a program for the `task_file` iterator, and the rows that it
//! writes ([`super::row`]). A process with many connections is looked at in another way as long as its
//! descriptors stay what they are ([`super::again`]).

use super::again::{Again, Pieces, Shape};
use super::head;
use super::layout::Layout;
use super::row::{Row, u32_at, u64_at};
use super::sockets::{Structure, TcpLayout};
use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::sys::{SysError, SysResult, bpf};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Place of the head on the stack.
const HEAD: i16 = -(head::LEN as i16);
/// A program has 512 bytes of stack.
const STACK: usize = 512;

/// With fewer connections than this an iterator is as quick.
const MANY: usize = 48;

/// The program, loaded.
#[derive(Debug)]
pub(in crate::capture) struct Descriptors {
    program: OwnedFd,
    tcp: TcpLayout,
    /// Where later looks find what the rows say, if this kernel can do them.
    shape: Option<Shape>,
}

impl Descriptors {
    pub(super) fn load() -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for fields of the kernel's structures",
            object: "an iterator over descriptors".into(),
            source,
        };
        let btf = Btf::of_kernel().map_err(failed)?;
        let (code, tcp, target) = assemble(&btf).map_err(failed)?;
        let shape = Shape::new(&btf, &tcp).inspect_err(cannot).ok();
        Ok(Self { program: bpf::load_iterator(&code, target)?, tcp, shape })
    }
}

fn cannot(error: &impl std::fmt::Display) {
    tracing::info!(%error, "each stop walks over all connections");
}

/// The program, the layout of what it says of TCP sockets, and the BTF id of the iterator.
fn assemble(btf: &Btf) -> io::Result<(Vec<u8>, TcpLayout, u32)> {
    let target = btf.function("bpf_iter_task_file")?;
    let tcp = TcpLayout::new(btf)?;
    if tcp.0.len() > STACK {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the fields are too many"));
    }
    let mut a = Assembler::default();
    a.mov(6, 1);
    write_head(&mut a, btf)?;
    write_tcp(&mut a, btf, &tcp.0)?;
    super::write_end(&mut a);
    Ok((a.finish(), tcp, target))
}

/// Offset of a field.
pub(super) fn offset(btf: &Btf, of: &str, path: &str) -> io::Result<i16> {
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
    a.store(Double, FP, at(head::TASK), 9);
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
    a.store(Double, FP, at(head::INODE_AT), 2);
    for (path, place) in [("i_ino", head::INODE), ("i_flctx", head::LOCKS)] {
        a.load(Double, 1, 2, offset(btf, "inode", path)?);
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
    a.load(Double, 1, FP, at(head::CLOEXEC));
    a.load(Word, 2, FP, at(head::FD));
    a.mask(2, 63);
    a.shift_right_reg(1, 2);
    a.mask(1, 1);
    a.store(Double, FP, at(head::CLOEXEC), 1);
    // The first epoll instance that watches it: what is asked of the item lies close together.
    a.load(Double, 3, 8, file("f_ep")?);
    a.store(Double, FP, at(head::WATCHERS), 3);
    a.load(Double, 3, 3, offset(btf, "hlist_head", "first")?);
    a.store(Double, FP, at(head::FIRST), 3);
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
    a.load(Double, 1, 9, offset(btf, "tcp_sock", "inet_conn.icsk_inet.pinet6")?);
    a.store(Double, FP, at(head::IPV6), 1);
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
    a.load(Double, 2, 8, offset(btf, "file", "f_path.dentry")?);
    a.store(Double, FP, at(head::ENTRY), 2);
    for (path, place) in [
        ("d_parent", head::PARENT),
        ("d_name.hash_len", head::NAME),
        ("d_hash.pprev", head::HASHED),
    ] {
        a.load(Double, 1, 2, offset(btf, "dentry", path)?);
        a.store(Double, FP, at(place), 1);
    }
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
    second: Vec<u8>,
    /// Later looks, if there are many connections.
    again: Option<Again>,
    /// From so many on.
    many: usize,
    /// What the last look was, if it did not walk: its time, and whether an entry of epoll is another.
    last: Option<(u64, bool)>,
    /// The rows that it has written anew.
    changed: Vec<u32>,
}

impl Glance {
    /// For the process with this host pid. None if this kernel cannot do it.
    pub(in crate::capture) fn open(pid: i32) -> Option<Self> {
        let known = super::descriptors()?;
        // Of the leader alone: of a whole process the kernel shows them once more, as another thread's.
        match bpf::iterate_thread(known.program.as_fd(), pid) {
            Ok(link) => {
                let (bytes, rows, second, changed) = Default::default();
                let (again, last, many) = (None, None, MANY);
                Some(Self { link, pid, known, bytes, rows, second, again, many, last, changed })
            }
            Err(error) => {
                tracing::debug!(pid, %error, "its descriptors are looked at one by one");
                None
            }
        }
    }

    /// The same with later looks however few connections there are, for tests.
    pub(in crate::capture) fn always_again(mut self) -> Self {
        self.many = 0;
        self
    }

    /// Begins the next look, which must follow, if a helper may take part in it.
    pub(in crate::capture) fn begin(&mut self) -> Option<Arc<Pieces>> {
        self.again.as_mut()?.begin(self.rows.len())
    }

    /// Looks.
    pub(in crate::capture) fn look(&mut self) -> SysResult<()> {
        self.changed.clear();
        self.last = None;
        if let (Some(again), Some(shape)) = (&mut self.again, &self.known.shape) {
            match again.look(shape, &self.known.tcp, &self.rows, &mut self.bytes, &mut self.changed)
            {
                Ok(Some(told)) => {
                    self.last = Some(told);
                    return Ok(());
                }
                Ok(None) => again.forget(),
                Err(error) => {
                    tracing::debug!(pid = self.pid, %error, "an iterator looks at its descriptors");
                    self.again = None;
                }
            }
        }
        self.walk()
    }

    /// Looks by an iterator.
    fn walk(&mut self) -> SysResult<()> {
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
            at += head::LEN + if is_tcp { self.known.tcp.0.len() } else { 0 };
        }
        if at == len { Ok(()) } else { Err(cut()) }
    }

    /// After a look that had to walk: prepares that later ones need not, if that is worth it. This is a
    /// look as well.
    pub(in crate::capture) fn learn(&mut self) {
        let tcp = |at: &&usize| u32_at(&self.bytes[**at..], head::IS_TCP) != 0;
        let Some(shape) = &self.known.shape else { return };
        if self.last.is_some() || self.rows.iter().filter(tcp).count() < self.many {
            return;
        }
        if self.again.as_ref().is_none_or(|again| !again.has_room(self.rows.len())) {
            self.again = match Again::open(shape, self.pid, self.rows.len()) {
                Ok(again) => Some(again),
                Err(error) => {
                    cannot(&error);
                    // Not to be tried again and again.
                    self.many = usize::MAX;
                    None
                }
            };
        }
        let Some(again) = &mut self.again else { return };
        match again.learn(shape, &self.known.tcp, &self.rows, &mut self.bytes, &mut self.changed) {
            Ok(told) => self.last = told,
            Err(error) => {
                tracing::debug!(pid = self.pid, %error, "an iterator looks at its descriptors");
                self.again = None;
            }
        }
    }

    /// Number of rows.
    pub(in crate::capture) fn len(&self) -> usize {
        self.rows.len()
    }

    /// One of them, by its place among them.
    pub(in crate::capture) fn nth(&self, nth: usize) -> Row<'_> {
        self.row_in(&self.bytes, self.rows[nth])
    }

    /// What the last look saw, by number.
    pub(in crate::capture) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.len()).map(|nth| self.nth(nth))
    }

    /// The places of the rows that are others than at the look before; none: that is not known of any.
    pub(in crate::capture) fn changed(&self) -> Option<&[u32]> {
        self.last.map(|_| &self.changed[..])
    }

    /// Whether each row says the same of epoll as at the look before, as far as that is known.
    pub(in crate::capture) fn is_watched_as_before(&self) -> bool {
        self.last.is_some_and(|(_, watched_anew)| !watched_anew)
    }

    /// When the last look was, if it was at one time for all rows (nanoseconds on the monotonic clock).
    pub(in crate::capture) fn time(&self) -> Option<u64> {
        self.last.map(|(time, _)| time)
    }

    /// Whether the connections that may have both ends in the container have neither sent nor
    /// received anything since the last look.
    pub(in crate::capture) fn stands_still(&mut self) -> SysResult<bool> {
        if let (Some(again), Some(_)) = (&mut self.again, self.last) {
            return again.stands_still();
        }
        let is_local = |row: Row<'_>| row.tcp.is_some_and(|tcp| tcp.is_local());
        if !self.rows().any(is_local) {
            return Ok(true);
        }
        std::mem::swap(&mut self.bytes, &mut self.second);
        let looked = self.walk();
        std::mem::swap(&mut self.bytes, &mut self.second);
        looked?;
        let now = self.rows.iter().map(|at| self.row_in(&self.second, *at));
        Ok(now.zip(self.rows()).all(|(now, before)| match (now.tcp, before.tcp) {
            (Some(now), Some(before)) => {
                now.sent() == before.sent() && now.received() == before.received()
            }
            (None, None) => true,
            _ => false,
        }))
    }

    fn row_in<'a>(&self, bytes: &'a [u8], at: usize) -> Row<'a> {
        let head = &bytes[at..at + head::LEN];
        let layout = &self.known.tcp;
        let tcp = (u32_at(head, head::IS_TCP) != 0).then(|| {
            let record = &bytes[at + head::LEN..at + head::LEN + layout.0.len()];
            layout.show(record, self.time().unwrap_or(u64_at(head, head::TIME)))
        });
        Row { head, tcp }
    }
}
