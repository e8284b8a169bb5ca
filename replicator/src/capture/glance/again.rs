//! Later looks at descriptors that an iterator has shown. Where everything lies is known by then, so a
//! program reads it all without following one address after the other, compares it with what it read the
//! last time, and keeps and tells only what is different.
//!
//! ```text
//!  a head for each runner:  what is asked, the time, and the table of descriptors as it is now
//!  one memory for all:      of each descriptor number, kind, and the addresses of its structures
//!                 changed   of each a byte
//!                 words     of each what was read last
//! ```
//! Of many descriptors a look is in pieces, of which a [helper](crate::capture::helpers) takes some
//! ([`Again::begin`]): nearly all of it is waiting for memory.
//!
//! Invariant: what was read at an address counts only if the same look has found the address where the
//! kernel keeps it. The table leads to the file, that to the inode and the socket, and each of these
//! addresses is one of the words that are compared. A row whose words are the same was read from the right
//! places; where an address is another one, or a number is open that was not, the look fails as a
//! whole, and an iterator has to walk.
//!
//! A process that runs may change all of it meanwhile. Such a look says what a stop will probably find; what it
//! took for unchanged is compared again in the stop.

mod pieces;

pub(in crate::capture) use pieces::Pieces;

use super::descriptors::offset;
use super::head;
use super::row::{u32_at, u64_at};
use super::sockets::{Structure, TcpLayout};
use crate::bpf::asm::{Assembler, FP, If, Size, helper};
use crate::bpf::btf::Btf;
use crate::sys::{SysResult, bpf};
use pieces::{MANY, Runner, Table};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// What is asked: the thread, and which entry is the last.
const TASK: usize = 0;
const COUNT: usize = 8;
/// The entry that is next.
const NEXT: usize = 12;
/// Nanoseconds on the monotonic clock, once all was read.
const TIME: usize = 16;
/// Whose thread it is.
const TID: usize = 24;
/// Of the table: its length, its files, its bits for closing on exec, its bits for open numbers.
const TABLE_LEN: usize = 28;
const FILES: usize = 32;
const ON_EXEC: usize = 40;
const OPEN: usize = 64;
/// Bytes of those that are looked at. With a longer table an iterator walks.
const OPEN_LEN: usize = 2048;
/// Not zero: a connection within the container has moved on.
const MOVED: usize = 48;
const HEAD_LEN: usize = OPEN + OPEN_LEN;
const ENTRY: usize = 64;
/// In an entry: number and kind, and then the address of each [`Base`] that is known.
const KIND: usize = 4;
const IS_TCP: u32 = 1;
const IS_LOCAL: u32 = 2;
/// Index of the loopback device: a program for packets has to be run for one.
const LOOPBACK: u32 = 1;
/// Places on the stack of a program: the entry, its index, and the head.
const AT: i16 = -8;
const INDEX: i16 = -16;
const HEAD: i16 = -24;

/// What words are read in. The addresses of most stand at this place in an entry, as words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Base {
    /// The slot of the table.
    Slot = 0,
    File = 1,
    Inode = 2,
    /// The list of who watches the file, and the first in it.
    Watchers = 3,
    Item = 4,
    /// What the file's private_data leads to.
    Private = 5,
    /// The TCP socket; of another file its name.
    Third = 6,
    /// What it has of IPv6.
    Fourth = 7,
    /// The bit of the table that says whether it is closed on exec.
    OnExec = 8,
}

const BASES: [Base; 9] = [
    Base::Slot,
    Base::File,
    Base::Inode,
    Base::Watchers,
    Base::Item,
    Base::Private,
    Base::Third,
    Base::Fourth,
    Base::OnExec,
];

/// A field of a row: the structure, where it is in that, its bytes, its place in the row.
type Field = (Base, usize, usize, usize);

/// Which words are read of one kind of descriptor, and what of them goes where in a row.
#[derive(Debug)]
struct Words {
    read: Vec<(Base, i16)>,
    /// Place among the words, place in the row, bytes.
    moves: Vec<(usize, usize, usize)>,
}

impl Words {
    fn new(mut fields: Vec<Field>) -> io::Result<Self> {
        fields.sort_unstable();
        let mut read: Vec<(Base, i16)> = Vec::new();
        let mut moves = Vec::new();
        for (base, from, len, to) in fields {
            for word in (from & !7..from + len).step_by(8) {
                let word = (base, i16::try_from(word).map_err(io::Error::other)?);
                if !read.contains(&word) {
                    read.push(word);
                }
            }
            let first = (base, (from & !7) as i16);
            let place = read.iter().position(|w| *w == first).unwrap_or(0);
            moves.push((place * 8 + from % 8, to, len));
        }
        // The words of a field must lie one after the other.
        read.is_sorted()
            .then_some(Self { read, moves })
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "fields overlap"))
    }

    fn len(&self) -> usize {
        self.read.len() * 8
    }

    /// Where a field of a structure lies among the words.
    fn place(&self, base: Base, from: usize) -> usize {
        let word = (base, (from & !7) as i16);
        self.read.iter().position(|w| *w == word).unwrap_or(0) * 8 + from % 8
    }

    /// The words that are read in one structure: offset there, place here.
    fn of(&self, base: Base) -> impl Iterator<Item = (i16, i16)> {
        let all = self.read.iter().enumerate().filter(move |(_, (b, _))| *b == base);
        all.map(|(i, (_, from))| (*from, i as i16 * 8))
    }

    /// Brings a row up to date.
    fn show(&self, words: &[u8], row: &mut [u8]) {
        for (from, to, len) in &self.moves {
            row[*to..to + len].copy_from_slice(&words[*from..from + len]);
        }
    }
}

/// Where everything is in the kernel's structures.
#[derive(Debug)]
pub(super) struct Shape {
    /// bpf_rdonly_cast.
    cast: u32,
    /// Of a thread: number and table. Of that: what it is now, and of this its parts.
    tid: i16,
    files: i16,
    table: i16,
    table_len: i16,
    slots: i16,
    on_exec: i16,
    open: i16,
    /// What an item of epoll is linked to the others of its file by.
    link: u64,
    tcp: Words,
    other: Words,
    /// Sequence numbers: in the socket, and among the words.
    sequences: Vec<(i16, i16)>,
}

impl Shape {
    pub(super) fn new(btf: &Btf, tcp: &TcpLayout) -> io::Result<Self> {
        let field = |base: Base, of: &str, path: &str, place: usize| -> io::Result<Field> {
            let member = btf.member(btf.structure(of)?, path)?;
            Ok((base, member.offset, member.size, place))
        };
        let common = [
            (Base::Slot, "hlist_head", "first", head::FILE),
            (Base::File, "file", "f_flags", head::FLAGS),
            (Base::File, "file", "f_op", head::OPERATIONS),
            (Base::File, "file", "f_pos", head::POSITION),
            (Base::File, "file", "private_data", head::PRIVATE),
            (Base::File, "file", "f_owner", head::OWNER),
            (Base::File, "file", "f_inode", head::INODE_AT),
            (Base::File, "file", "f_ep", head::WATCHERS),
            (Base::Inode, "inode", "i_ino", head::INODE),
            (Base::Inode, "inode", "i_flctx", head::LOCKS),
            (Base::Watchers, "hlist_head", "first", head::FIRST),
            (Base::Item, "epitem", "ffd.fd", head::WATCHED_AS),
            (Base::Item, "epitem", "ep", head::WATCHER),
            (Base::Item, "epitem", "event.events", head::EVENTS),
            (Base::Item, "epitem", "event.data", head::EVENT_DATA),
        ];
        let of_tcp = [
            (Base::Private, "socket", "sk", head::SOCKET),
            (Base::Third, "tcp_sock", "inet_conn.icsk_inet.pinet6", head::IPV6),
        ];
        let of_other = [
            (Base::File, "file", "f_path.dentry", head::ENTRY),
            (Base::Third, "dentry", "d_parent", head::PARENT),
            (Base::Third, "dentry", "d_name.hash_len", head::NAME),
            (Base::Third, "dentry", "d_hash.pprev", head::HASHED),
            (Base::Private, "eventpoll", "refcount", head::EPOLL_REFERENCES),
            (Base::Private, "eventfd_ctx", "flags", head::EVENTFD_FLAGS),
            (Base::Private, "eventfd_ctx", "count", head::EVENTFD_COUNT),
            (Base::Private, "pipe_inode_info", "head", head::PIPE_HEAD),
            (Base::Private, "pipe_inode_info", "tail", head::PIPE_TAIL),
            (Base::Private, "pipe_inode_info", "max_usage", head::PIPE_SLOTS),
        ];
        let kind = |more: &[(Base, &str, &str, usize)]| -> io::Result<Vec<Field>> {
            let mut all = vec![(Base::OnExec, 0, 8, head::CLOEXEC)];
            for (base, of, path, place) in common.iter().chain(more) {
                all.push(field(*base, of, path, *place)?);
            }
            Ok(all)
        };
        let mut fields = kind(&of_tcp)?;
        fields.extend(tcp.0.places().map(|(source, from, len, place)| {
            let six = source == Structure::Ipv6 as usize;
            (if six { Base::Fourth } else { Base::Third }, from, len, head::LEN + place)
        }));
        let (tcp_words, other) = (Words::new(fields)?, Words::new(kind(&of_other)?)?);
        let sequence = |from: usize| (from as i16, tcp_words.place(Base::Third, from) as i16);
        Ok(Self {
            cast: btf.function("bpf_rdonly_cast")?,
            tid: offset(btf, "task_struct", "pid")?,
            files: offset(btf, "task_struct", "files")?,
            table: offset(btf, "files_struct", "fdt")?,
            table_len: offset(btf, "fdtable", "max_fds")?,
            slots: offset(btf, "fdtable", "fd")?,
            on_exec: offset(btf, "fdtable", "close_on_exec")?,
            open: offset(btf, "fdtable", "open_fds")?,
            link: offset(btf, "epitem", "fllink")? as u64,
            sequences: tcp.sequences().map(sequence).to_vec(),
            tcp: tcp_words,
            other,
        })
    }

    /// The words of a row, by what its entry says.
    fn words(&self, kind: u32) -> &Words {
        if kind & IS_TCP != 0 { &self.tcp } else { &self.other }
    }

    /// The addresses that a row has of its structures, in the order of [`Base`], without the first.
    fn addresses(&self, row: &[u8]) -> [u64; 7] {
        let at = |place| u64_at(row, place);
        let item = match at(head::FIRST) {
            0 => 0,
            first => first.wrapping_sub(self.link),
        };
        let [third, fourth] = match u32_at(row, head::IS_TCP) {
            0 => [at(head::ENTRY), 0],
            _ => [at(head::SOCKET), at(head::IPV6)],
        };
        let [file, inode, watchers, private] =
            [head::FILE, head::INODE_AT, head::WATCHERS, head::PRIVATE].map(at);
        [file, inode, watchers, item, private, third, fourth]
    }

    /// Bytes of the words of a row.
    fn stride(&self) -> usize {
        self.tcp.len().max(self.other.len())
    }
}

/// Where everything is in the memory that is shared with the programs, for so many descriptors.
#[derive(Clone, Copy, Debug)]
struct Places {
    capacity: usize,
    changed: usize,
    words: usize,
    stride: usize,
}

impl Places {
    fn new(shape: &Shape, capacity: usize) -> Self {
        let changed = capacity * ENTRY;
        Self { capacity, changed, words: changed + capacity, stride: shape.stride() }
    }

    fn len(&self) -> usize {
        self.words + self.capacity * self.stride
    }
}

/// Later looks at the descriptors of one process.
#[derive(Debug)]
pub(super) struct Again {
    pid: i32,
    /// All but the heads. Not touched while a look is under way.
    shared: bpf::Shared,
    places: Places,
    look: Runner,
    still: Runner,
    pieces: Arc<Pieces>,
    /// Pieces were offered for the next look.
    begun: bool,
    /// How many descriptors are known; none: a walk has to come first.
    known: usize,
    open: Table,
    /// A row that is being written.
    row: Vec<u8>,
}

impl Drop for Again {
    fn drop(&mut self) {
        self.pieces.end();
    }
}

impl Again {
    /// With room for somewhat more than this number of descriptors.
    pub(super) fn open(shape: &Shape, pid: i32, count: usize) -> SysResult<Self> {
        let places = Places::new(shape, (count + count / 4).next_power_of_two().max(64));
        let shared = bpf::Shared::new(places.len())?;
        let map = shared.map().as_raw_fd();
        let looks = || Runner::new(|head| assemble_look(shape, &places, map, head));
        let (look, helper) = (looks()?, looks()?);
        let still = Runner::new(|head| assemble_still(shape, &places, map, head))?;
        let pieces = Pieces::new(pid, helper);
        let (open, row) = Default::default();
        Ok(Self { pid, shared, places, look, still, pieces, begun: false, known: 0, open, row })
    }

    pub(super) fn has_room(&self, count: usize) -> bool {
        count <= self.places.capacity
    }

    /// What was known is no more.
    pub(super) fn forget(&mut self) {
        self.known = 0;
    }

    /// Begins the next look at so many rows, if it is one of many: gives what a helper may take part in. What changes from
    /// now on may be seen or not; [`Again::look`] must follow.
    pub(super) fn begin(&mut self, rows: usize) -> Option<Arc<Pieces>> {
        if std::mem::take(&mut self.begun) {
            // What it has found was not told.
            self.forget();
        }
        self.begun = self.known >= MANY && self.known == rows && self.is_same_table().ok()?;
        self.begun.then(|| {
            self.offer();
            self.pieces.clone()
        })
    }

    /// Whether the process has the same numbers open.
    fn is_same_table(&mut self) -> SysResult<bool> {
        self.look.run(0, 0)?;
        Ok(self.look.is_same_table(self.pid, &self.open))
    }

    fn offer(&mut self) {
        self.pieces.end();
        let (from, to) = (self.places.changed, self.places.changed + self.known);
        self.shared.bytes()[from..to].fill(0);
        self.pieces.offer(self.known);
    }

    /// Looks at all pieces that nobody has taken, and waits for the others. Says whether each was looked at to its end.
    fn finish(&mut self) -> SysResult<bool> {
        let mut whole = true;
        let mut result = Ok(());
        while let Some((from, to)) = self.pieces.claim() {
            match self.look.run(from, to) {
                Ok(came) => whole &= came,
                Err(error) => result = Err(error),
            }
        }
        self.pieces.end();
        result.map(|()| whole && self.pieces.are_whole())
    }

    /// Learns where everything is from rows of a walk, and looks. None: something has changed since.
    /// Gives the time, and that entries of epoll may be others.
    pub(super) fn learn(
        &mut self,
        shape: &Shape,
        tcp: &TcpLayout,
        rows: &[usize],
        bytes: &mut [u8],
        changed: &mut Vec<u32>,
    ) -> SysResult<Option<(u64, bool)>> {
        self.known = 0;
        let Some(first) = rows.first() else { return Ok(None) };
        let task = u64_at(&bytes[*first..], head::TASK);
        self.pieces.end();
        self.look.ask_of(task);
        let shared = self.shared.bytes();
        for (entry, at) in shared.as_chunks_mut::<ENTRY>().0.iter_mut().zip(rows) {
            let row = &bytes[*at..];
            let kind = if u32_at(row, head::IS_TCP) != 0 { IS_TCP } else { 0 };
            entry[..KIND].copy_from_slice(&row[head::FD..head::FD + 4]);
            entry[KIND..8].copy_from_slice(&kind.to_ne_bytes());
            let places = entry[8..].as_chunks_mut::<8>().0.iter_mut();
            for (place, address) in places.zip(shape.addresses(row)) {
                *place = address.to_ne_bytes();
            }
        }
        let is_whole = self.look.run(0, rows.len())?;
        let len = u32_at(self.look.head.bytes(), TABLE_LEN);
        let mut open = vec![0u8; (len / 8) as usize];
        if open.len() > OPEN_LEN {
            return Ok(None);
        }
        for at in rows {
            let number = u32_at(&bytes[*at..], head::FD) as usize;
            let Some(byte) = open.get_mut(number / 8) else { return Ok(None) };
            *byte |= 1 << (number % 8);
        }
        self.open = (len, open);
        changed.clear();
        changed.extend(0..rows.len() as u32);
        let told = is_whole
            && self.look.is_same_table(self.pid, &self.open)
            && self.show(shape, tcp, rows, bytes, changed).is_some();
        self.known = if told { rows.len() } else { 0 };
        self.pieces.ask_of(task, &self.open);
        self.begun = false;
        Ok(told.then(|| (self.look.time(), true)))
    }

    /// Looks, and writes rows anew that are others; `changed` are the places of these. None: a walk is needed.
    /// Gives the time, and whether an entry of epoll is another.
    pub(super) fn look(
        &mut self,
        shape: &Shape,
        tcp: &TcpLayout,
        rows: &[usize],
        bytes: &mut [u8],
        changed: &mut Vec<u32>,
    ) -> SysResult<Option<(u64, bool)>> {
        if self.known == 0 || self.known != rows.len() {
            return Ok(None);
        }
        if !std::mem::take(&mut self.begun) {
            // Numbers come and go most often: the table alone says so at once.
            if !self.is_same_table()? {
                return Ok(None);
            }
            self.offer();
        }
        // The table is as it was once more after all pieces, whoever has taken them.
        if !self.finish()? || !self.is_same_table()? {
            return Ok(None);
        }
        let (from, to) = (self.places.changed, self.places.changed + self.known);
        let marks = &self.shared.bytes()[from..to];
        changed.extend((0..).zip(marks).filter(|(_, mark)| **mark != 0).map(|(i, _)| i));
        let watched_anew = self.show(shape, tcp, rows, bytes, changed);
        Ok(watched_anew.map(|anew| (self.look.time(), anew)))
    }

    /// Writes rows anew. None: what was read was not where it was looked for. Gives whether an entry of
    /// epoll is another.
    fn show(
        &mut self,
        shape: &Shape,
        tcp: &TcpLayout,
        rows: &[usize],
        bytes: &mut [u8],
        changed: &[u32],
    ) -> Option<bool> {
        let Places { words, stride, .. } = self.places;
        let (entries, all) = self.shared.bytes().split_at_mut(words);
        let mut watched_anew = false;
        for nth in changed.iter().map(|nth| *nth as usize) {
            let entry = &mut entries[nth * ENTRY..][..ENTRY];
            let mut kind = u32_at(entry, KIND) & IS_TCP;
            let len = head::LEN + if kind & IS_TCP != 0 { tcp.0.len() } else { 0 };
            let row = &mut bytes[rows[nth]..][..len];
            self.row.clear();
            self.row.extend_from_slice(row);
            shape.words(kind).show(&all[nth * stride..][..stride], &mut self.row);
            let there = entry[8..].as_chunks::<8>().0.iter().map(|a| u64::from_ne_bytes(*a));
            if !there.eq(shape.addresses(&self.row)) {
                return None;
            }
            watched_anew |= row[head::WATCHED] != self.row[head::WATCHED];
            row.copy_from_slice(&self.row);
            if kind & IS_TCP != 0 && tcp.show(&row[head::LEN..], 0).is_local() {
                kind |= IS_LOCAL;
            }
            entry[KIND..8].copy_from_slice(&kind.to_ne_bytes());
        }
        Some(watched_anew)
    }

    /// Whether the connections that may have both ends in the container have neither sent nor received
    /// anything since the last look.
    pub(super) fn stands_still(&mut self) -> SysResult<bool> {
        let entries = &self.shared.bytes()[..self.known * ENTRY];
        if !entries.as_chunks::<ENTRY>().0.iter().any(|e| u32_at(e, KIND) & IS_LOCAL != 0) {
            return Ok(true);
        }
        self.still.put(MOVED, 0);
        let whole = self.still.run(0, self.known)?;
        Ok(whole && u32_at(self.still.head.bytes(), MOVED) == 0)
    }
}

/// Makes the address in register 1 one that can be read from, whatever it is, in register 0: what is not
/// there reads as zero.
fn readable(a: &mut Assembler, shape: &Shape) {
    a.set(2, 0);
    a.kernel_function(shape.cast);
}

/// Begins a loop over the entries that are asked for: register 6 is the shared memory, 7 the words of the entry.
fn write_loop(a: &mut Assembler, places: &Places) {
    use Size::{Double, Word};
    a.label("next");
    a.patience("end");
    a.load(Double, 2, FP, HEAD);
    a.load(Word, 8, 2, NEXT as i16);
    a.load(Word, 1, 2, COUNT as i16);
    a.jump_reg(If::AtLeast, 8, 1, "end");
    a.jump(If::AtLeast, 8, places.capacity as i32, "end");
    a.mov(1, 8);
    a.add(1, 1);
    a.store(Word, 2, NEXT as i16, 1);
    a.store(Double, FP, INDEX, 8);
    a.mov(7, 8);
    a.multiply(7, places.stride as i32);
    a.add_reg(7, 6);
    a.add(7, places.words as i32);
    a.multiply(8, ENTRY as i32);
    a.add_reg(8, 6);
    a.store(Double, FP, AT, 8);
}

/// The program that looks. Register 9 gathers the differences of an entry.
fn assemble_look(shape: &Shape, places: &Places, map: i32, head: i32) -> Vec<u8> {
    use Size::{Double, Word};
    let mut a = Assembler::default();
    a.map_value(6, head);
    a.store(Double, FP, HEAD, 6);
    a.load(Double, 1, 6, TASK as i16);
    readable(&mut a, shape);
    a.load(Word, 1, 0, shape.tid);
    a.store(Word, 6, TID as i16, 1);
    a.load(Double, 1, 0, shape.files);
    readable(&mut a, shape);
    a.load(Double, 1, 0, shape.table);
    readable(&mut a, shape);
    a.load(Double, 1, 0, shape.slots);
    a.store(Double, 6, FILES as i16, 1);
    a.load(Double, 1, 0, shape.on_exec);
    a.store(Double, 6, ON_EXEC as i16, 1);
    a.load(Double, 3, 0, shape.open);
    a.load(Word, 2, 0, shape.table_len);
    a.store(Word, 6, TABLE_LEN as i16, 2);
    a.shift_right(2, 3);
    a.jump(If::Above, 2, OPEN_LEN as i32, "entries");
    a.mov(1, 6);
    a.add(1, OPEN as i32);
    a.call(helper::PROBE_READ);
    a.label("entries");
    a.map_value(6, map);
    write_loop(&mut a, places);
    a.load(Word, 1, 8, KIND as i16);
    a.jump(If::AnyBit, 1, IS_TCP as i32, "tcp");
    write_words(&mut a, shape, &shape.other, places);
    a.label("tcp");
    write_words(&mut a, shape, &shape.tcp, places);
    a.label("end");
    a.call(helper::KTIME);
    a.load(Double, 1, FP, HEAD);
    a.store(Double, 1, TIME as i16, 0);
    a.leave(0);
    a.finish()
}

/// Compares the words of an entry, and keeps them where any is another.
fn write_words(a: &mut Assembler, shape: &Shape, words: &Words, places: &Places) {
    use Size::{Byte, Double};
    touch(a, shape, words);
    a.set(9, 0);
    each_word(a, shape, words, |a, place| {
        a.load(Double, 2, 7, place);
        a.xor_reg(1, 2);
        a.or_reg(9, 1);
    });
    a.jump(If::Equal, 9, 0, "next");
    each_word(a, shape, words, |a, place| a.store(Double, 7, place, 1));
    a.load(Double, 1, FP, INDEX);
    a.add_reg(1, 6);
    a.add(1, places.changed as i32);
    a.store_value(Byte, 1, 0, 1);
    a.jump(If::Always, 0, 0, "next");
}

/// Reads one word of each line of the cache that the next entry takes, if it is of the same kind (else of others, which is no
/// harm). Nothing waits for what is read, so that all of them are on their way at once, while this entry is compared: of a
/// thousand entries, one is seldom there still.
fn touch(a: &mut Assembler, shape: &Shape, words: &Words) {
    const LINE: i16 = 64;
    for base in BASES.into_iter().filter(|base| !matches!(base, Base::Slot | Base::OnExec)) {
        let mut lines: Vec<i16> = words.of(base).map(|(from, _)| from / LINE).collect();
        lines.dedup();
        if lines.is_empty() {
            continue;
        }
        a.load(Size::Double, 2, FP, AT);
        a.load(Size::Double, 1, 2, ENTRY as i16 + 8 * base as i16);
        readable(a, shape);
        for line in lines {
            a.load(Size::Double, 1, 0, line * LINE);
        }
    }
}

/// Reads each word to register 1, for one with its place to be used.
fn each_word(a: &mut Assembler, shape: &Shape, words: &Words, using: impl Fn(&mut Assembler, i16)) {
    use Size::{Double, Word};
    for base in BASES.into_iter().filter(|base| words.of(*base).next().is_some()) {
        a.load(Double, 2, FP, AT);
        match base {
            Base::Slot | Base::OnExec => {
                let table = if base == Base::Slot { FILES } else { ON_EXEC };
                a.load(Word, 2, 2, 0);
                if base == Base::OnExec {
                    a.shift_right(2, 6);
                }
                a.shift_left(2, 3);
                a.load(Double, 3, FP, HEAD);
                a.load(Double, 1, 3, table as i16);
                a.add_reg(1, 2);
            }
            _ => a.load(Double, 1, 2, 8 * base as i16),
        }
        readable(a, shape);
        for (from, place) in words.of(base) {
            a.load(Double, 1, 0, from);
            if base == Base::OnExec {
                a.load(Double, 2, FP, AT);
                a.load(Word, 2, 2, 0);
                a.mask(2, 63);
                a.shift_right_reg(1, 2);
                a.mask(1, 1);
            }
            using(a, place);
        }
    }
}

/// The program that looks whether connections within the container stand still.
fn assemble_still(shape: &Shape, places: &Places, map: i32, head: i32) -> Vec<u8> {
    use Size::{Double, Word};
    let mut a = Assembler::default();
    a.map_value(6, head);
    a.store(Double, FP, HEAD, 6);
    a.map_value(6, map);
    write_loop(&mut a, places);
    a.load(Word, 1, 8, KIND as i16);
    a.mask(1, IS_LOCAL as i32);
    a.jump(If::Equal, 1, 0, "next");
    a.load(Double, 1, 8, 8 * Base::Third as i16);
    readable(&mut a, shape);
    a.set(9, 0);
    for (from, place) in &shape.sequences {
        a.load(Word, 1, 0, *from);
        a.load(Word, 2, 7, *place);
        a.xor_reg(1, 2);
        a.or_reg(9, 1);
    }
    a.jump(If::Equal, 9, 0, "next");
    a.load(Double, 1, FP, HEAD);
    a.store_value(Word, 1, MOVED as i16, 1);
    a.label("end");
    a.leave(0);
    a.finish()
}

#[cfg(test)]
mod tests;
