//! The bytes that a TCP socket has still to send: the list of what was not sent yet, and the tree of
//! what was sent and not acknowledged (a red-black tree by sequence numbers). Each entry is a struct
//! sk_buff with bytes of its own and bytes in pages.
//!
//! Nobody stands still for us: an acknowledgement frees entries, and a transmission moves or splits
//! them. So a byte counts only if, after it was read, its entry is as it was before, and the socket has
//! not taken note that the byte was acknowledged, which it does before it frees anything.

pub(super) mod still;

use super::memory::{Memory, Range};
use super::pages::Pages;
use crate::bpf::btf::{Btf, Member};
use crate::sys::{SysError, SysResult};
use smallvec::SmallVec;
use std::collections::HashSet;
use std::io;

/// More entries than that, or more bytes, are not read.
const MOST: usize = 16 << 10;
const MOST_BYTES: usize = 8 << 20;
/// Flags of TCP's header.
const FIN: u64 = 1;
const SYN: u64 = 2;

/// Where the fields lie that a queue is read by.
#[derive(Debug)]
pub(super) struct Places {
    socket: SocketPlaces,
    entry: EntryPlaces,
    shared: SharedPlaces,
}

/// In a struct tcp_sock.
#[derive(Debug)]
struct SocketPlaces {
    size: usize,
    list: Member,
    list_len: Member,
    tree: Member,
    write_seq: Member,
    una: Member,
}

/// In a struct sk_buff, of which so many bytes are read.
#[derive(Debug)]
struct EntryPlaces {
    size: usize,
    next: Member,
    left: Member,
    right: Member,
    len: Member,
    data_len: Member,
    head: Member,
    data: Member,
    end: Member,
    control: Member,
    /// In its control block.
    seq: Member,
    end_seq: Member,
    flags: Member,
}

/// In a struct skb_shared_info, of which so many bytes are read.
#[derive(Debug)]
struct SharedPlaces {
    size: usize,
    count: Member,
    more: Member,
    fragments: Member,
    /// Bytes of a fragment, and what is in it.
    fragment: usize,
    page: Member,
    len: Member,
    offset: Member,
}

impl Places {
    pub(super) fn new(btf: &Btf) -> io::Result<Self> {
        let within = |name| btf.structure(name).map(|id| move |path: &str| btf.member(id, path));
        let of = within("tcp_sock")?;
        let socket = SocketPlaces {
            size: btf.size_of("tcp_sock")?,
            list: of("inet_conn.icsk_inet.sk.sk_write_queue.next")?,
            list_len: of("inet_conn.icsk_inet.sk.sk_write_queue.qlen")?,
            tree: of("inet_conn.icsk_inet.sk.tcp_rtx_queue.rb_node")?,
            write_seq: of("write_seq")?,
            una: of("snd_una")?,
        };
        let (of, control) = (within("sk_buff")?, within("tcp_skb_cb")?);
        let mut entry = EntryPlaces {
            size: 0,
            next: of("next")?,
            left: of("rbnode.rb_left")?,
            right: of("rbnode.rb_right")?,
            len: of("len")?,
            data_len: of("data_len")?,
            head: of("head")?,
            data: of("data")?,
            end: of("end")?,
            control: of("cb")?,
            seq: control("seq")?,
            end_seq: control("end_seq")?,
            flags: control("tcp_flags")?,
        };
        let last = [entry.right, entry.data_len, entry.head, entry.data, entry.end, entry.control];
        entry.size = last.iter().map(Member::end).max().unwrap_or(0);
        let (of, fragment) = (within("skb_shared_info")?, within("skb_frag")?);
        let fragments = of("frags")?;
        let shared = SharedPlaces {
            size: fragments.end(),
            count: of("nr_frags")?,
            more: of("frag_list")?,
            fragments,
            fragment: btf.size_of("skb_frag")?,
            page: fragment("netmem")?,
            len: fragment("len")?,
            offset: fragment("offset")?,
        };
        Ok(Self { socket, entry, shared })
    }

    /// The range of a struct tcp_sock.
    pub(super) fn socket(&self, at: u64) -> Range {
        (at, self.socket.size)
    }

    /// Sequence number after the last byte written, our FIN counted, and of the first not
    /// acknowledged.
    pub(super) fn sent(&self, socket: &[u8]) -> (u32, u32) {
        let SocketPlaces { write_seq, una, .. } = &self.socket;
        (write_seq.value(socket) as u32, una.value(socket) as u32)
    }
}

/// Fragments of most entries: an answer is bytes of a page, and perhaps of the next.
const USUAL: usize = 2;

/// An entry, as far as it must not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    at: u64,
    /// Sequence numbers of its first byte and after its last, SYN and FIN counted.
    seq: u32,
    end: u32,
    flags: u64,
    /// Bytes of its own and of all.
    own: Range,
    len: usize,
    /// Where its struct skb_shared_info is.
    shared: u64,
    pub(super) fragments: SmallVec<[Fragment; USUAL]>,
}

/// Bytes in pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    /// The address of the struct page of the first.
    pub(super) page: u64,
    pub(super) offset: usize,
    pub(super) len: usize,
}

/// What is to be tried again.
pub(super) fn changing() -> SysError {
    SysError::errno("read", "the send queue of a connection that is changing", libc::EAGAIN)
}

/// Whether a sequence number is behind another.
fn behind(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) as i32 > 0
}

impl Entry {
    fn new(places: &EntryPlaces, at: u64, bytes: &[u8]) -> Option<Self> {
        let get = |field: &Member| field.value(bytes);
        let control = |field: &Member| field.value(&bytes[places.control.offset..]);
        let (len, in_pages) = (get(&places.len) as usize, get(&places.data_len) as usize);
        Some(Self {
            at,
            seq: control(&places.seq) as u32,
            end: control(&places.end_seq) as u32,
            flags: control(&places.flags) & (FIN | SYN),
            own: (get(&places.data), len.checked_sub(in_pages)?),
            len,
            shared: get(&places.head).wrapping_add(get(&places.end)),
            fragments: SmallVec::new(),
        })
    }

    /// The entry with what its struct skb_shared_info says, if both fit each other: it is in the
    /// middle of a change otherwise.
    fn with(mut self, places: &SharedPlaces, bytes: &[u8]) -> Option<Self> {
        self.learn(places, bytes).then_some(self)
    }

    /// Adds what its struct skb_shared_info says. Whether it fits.
    fn learn(&mut self, places: &SharedPlaces, bytes: &[u8]) -> bool {
        let slots = bytes[places.fragments.offset..].chunks_exact(places.fragment);
        let count = places.count.value(bytes) as usize;
        if count > slots.len() || places.more.value(bytes) != 0 {
            return false;
        }
        let fragment = |slot: &[u8]| Fragment {
            page: places.page.value(slot),
            offset: places.offset.value(slot) as usize,
            len: places.len.value(slot) as usize,
        };
        self.fragments.extend(slots.take(count).map(fragment));
        let counted = (self.flags & FIN) + (self.flags & SYN) / SYN;
        let in_pages: usize = self.fragments.iter().map(|f| f.len).sum();
        self.own.1 + in_pages == self.len
            && self.end.wrapping_sub(self.seq) as usize == self.len + counted as usize
    }

    /// Where its bytes are.
    fn ranges(&self, pages: &Pages, ranges: &mut Vec<Range>) -> SysResult<()> {
        ranges.push(self.own);
        for f in &self.fragments {
            let what = "bytes of a connection that are not in memory";
            let at = pages.address(f.page);
            let at = at.ok_or_else(|| SysError::errno("read", what, libc::EOPNOTSUPP))?;
            ranges.push((at.wrapping_add(f.offset as u64), f.len));
        }
        Ok(())
    }

    /// How far behind a sequence number it begins.
    pub(super) fn place_in(&self, una: u32) -> i32 {
        self.seq.wrapping_sub(una) as i32
    }

    /// Those of its bytes that are behind a sequence number.
    fn behind<'a>(&self, una: u32, its: &'a [u8]) -> &'a [u8] {
        let before = una.wrapping_sub(self.begin()) as i32;
        its.get(before.max(0) as usize..).unwrap_or_default()
    }

    /// Sequence number of its first byte.
    fn begin(&self) -> u32 {
        self.seq.wrapping_add((self.flags & SYN != 0).into())
    }
}

/// The entries of a socket, whose bytes are given too, that hold what is behind `una`: a list that
/// may have changed while it was read.
fn find(memory: &mut Memory, places: &Places, at: u64, socket: &[u8]) -> SysResult<Vec<Entry>> {
    let EntryPlaces { size, next, left, right, .. } = places.entry;
    let (_, una) = places.sent(socket);
    let mut seen = HashSet::new();
    let mut entries = Vec::new();
    let mut add = |at: u64, bytes: &[u8]| {
        if !at.is_multiple_of(8) || !seen.insert(at) || seen.len() > MOST {
            return Err(changing());
        }
        let entry = Entry::new(&places.entry, at, bytes).ok_or_else(changing)?;
        if behind(entry.end, una) {
            entries.push(entry);
        }
        Ok(())
    };
    let end = at + places.socket.list.offset as u64;
    let mut here = places.socket.list.value(socket);
    let len = places.socket.list_len.value(socket) as usize;
    while here != end {
        // Not more at a time than are worth it if the list is shorter now.
        let bytes = memory.follow((here, size), next.offset, len.clamp(1, 256))?;
        for bytes in bytes.chunks_exact(size) {
            if here != end {
                add(here, bytes)?;
                here = next.value(bytes);
            }
        }
    }
    let mut level = vec![places.socket.tree.value(socket)];
    level.retain(|at| *at != 0);
    while !level.is_empty() {
        let ranges: Vec<Range> = level.iter().map(|at| (*at, size)).collect();
        let bytes = memory.read(&ranges)?;
        let mut below = Vec::new();
        for (at, bytes) in level.iter().zip(bytes.chunks_exact(size)) {
            add(*at, bytes)?;
            below.extend([left.value(bytes), right.value(bytes)].iter().filter(|at| **at != 0));
        }
        level = below;
    }
    Ok(entries)
}

/// The entries of a socket with all that is to know of them.
pub(super) fn entries(
    memory: &mut Memory,
    places: &Places,
    at: u64,
    socket: &[u8],
) -> SysResult<Vec<Entry>> {
    // What is not there was there when another entry told of it.
    let gone = |e: SysError| if e.code() == libc::EFAULT { changing() } else { e };
    let found = find(memory, places, at, socket).map_err(gone)?;
    let ranges: Vec<Range> = found.iter().map(|e| (e.shared, places.shared.size)).collect();
    let bytes = memory.read(&ranges).map_err(gone)?;
    let whole = found.into_iter().zip(bytes.chunks_exact(places.shared.size));
    whole.map(|(e, bytes)| e.with(&places.shared, bytes).ok_or_else(changing)).collect()
}

/// The socket, and the bytes from the first that is not acknowledged to the last.
#[derive(Debug)]
pub(super) struct Unsent {
    /// struct tcp_sock.
    pub(super) socket: Vec<u8>,
    pub(super) bytes: Vec<u8>,
    /// The FIN is behind them.
    pub(super) fin: bool,
}

/// Reads what the socket at this address, whose bytes were read before, has still to send.
///
/// # Errors
/// EAGAIN, and perhaps EFAULT: it changed meanwhile. EFBIG: it is very much.
pub(super) fn read(
    memory: &mut Memory,
    places: &Places,
    pages: &Pages,
    at: u64,
    socket: &[u8],
) -> SysResult<Unsent> {
    let mut entries = entries(memory, places, at, socket)?;
    if entries.iter().map(|e| e.len).sum::<usize>() > MOST_BYTES {
        return Err(SysError::errno("read", "the send queue of a connection", libc::EFBIG));
    }
    let mut ranges = Vec::new();
    entries.iter().try_for_each(|e| e.ranges(pages, &mut ranges))?;
    let bytes = memory.read(&ranges)?;
    // Once more, and the socket last: what it has not noted as acknowledged was there until now.
    let (size, shared) = (places.entry.size, places.shared.size);
    let mut ranges: Vec<Range> = entries.iter().map(|e| (e.at, size)).collect();
    ranges.extend(entries.iter().map(|e| (e.shared, shared)));
    ranges.push(places.socket(at));
    let again = memory.read(&ranges)?;
    let (of_entries, rest) = again.split_at(entries.len() * size);
    let (of_shared, socket) = rest.split_at(entries.len() * shared);
    let (end, una) = places.sent(socket);
    let mut pieces = Vec::with_capacity(entries.len());
    let mut rest = &bytes[..];
    let now = of_entries.chunks_exact(size).zip(of_shared.chunks_exact(shared));
    for (entry, (bytes, shared)) in entries.drain(..).zip(now) {
        let (its, others) = rest.split_at(entry.len);
        rest = others;
        if behind(entry.end, una) {
            let now = Entry::new(&places.entry, entry.at, bytes);
            if now.and_then(|e| e.with(&places.shared, shared)).as_ref() != Some(&entry) {
                return Err(changing());
            }
            pieces.push((entry, its));
        }
    }
    pieces.sort_unstable_by_key(|(entry, _)| entry.place_in(una));
    let mut bytes = Vec::new();
    let pieces = pieces.iter().map(|(entry, its)| (entry, *its));
    let fin = join(pieces, una, end, &mut bytes).ok_or_else(changing)?;
    Ok(Unsent { socket: socket.to_vec(), bytes, fin })
}

/// Puts entries together that hold all from one sequence number to another, in their order, and tells whether the
/// last has a FIN. None: something is missing, or too much.
fn join<'a>(
    pieces: impl Iterator<Item = (&'a Entry, &'a [u8])>,
    una: u32,
    end: u32,
    bytes: &mut Vec<u8>,
) -> Option<bool> {
    bytes.clear();
    bytes.reserve(end.wrapping_sub(una).min(MOST_BYTES as u32) as usize);
    let (mut at, mut fin) = (una, false);
    for (i, (entry, its)) in pieces.enumerate() {
        let follows = if i == 0 { !behind(entry.seq, una) } else { entry.seq == at };
        if !follows || fin {
            return None;
        }
        bytes.extend_from_slice(entry.behind(una, its));
        (at, fin) = (entry.end, entry.flags & FIN != 0);
    }
    (at == end).then_some(fin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(seq: u32, len: usize, flags: u64) -> Entry {
        let counted = (flags & FIN) as u32;
        let end = seq.wrapping_add(len as u32 + counted);
        Entry { at: 8, seq, end, flags, own: (0, len), len, shared: 0, fragments: SmallVec::new() }
    }

    fn join(mut pieces: Vec<(Entry, &[u8])>, una: u32, end: u32) -> Option<(Vec<u8>, bool)> {
        pieces.sort_by_key(|(entry, _)| entry.place_in(una));
        let mut bytes = b"of the queue before".to_vec();
        let pieces = pieces.iter().map(|(entry, its)| (entry, *its));
        super::join(pieces, una, end, &mut bytes).map(|fin| (bytes, fin))
    }

    #[test]
    fn entries_are_put_together_without_a_gap() {
        let first = u32::MAX - 2;
        let some = || vec![(piece(2, 3, FIN), &b"fgh"[..]), (piece(first, 5, 0), &b"abcde"[..])];
        assert_eq!(join(some(), first, 6), Some((b"abcdefgh".to_vec(), true)));
        assert_eq!(join(some(), 0, 6), Some((b"defgh".to_vec(), true)), "three are acknowledged");
        assert_eq!(join(some(), first, 7), None, "something is behind it");
        assert_eq!(join(some(), first.wrapping_sub(1), 6), None, "something is before it");
        let gap = vec![(piece(0, 3, 0), &b"abc"[..]), (piece(4, 1, FIN), &b"e"[..])];
        assert_eq!(join(gap, 0, 6), None);
        assert_eq!(join(vec![(piece(4, 0, FIN), &b""[..])], 4, 5), Some((Vec::new(), true)));
        assert_eq!(join(vec![(piece(2, 2, FIN), &b"cd"[..])], 4, 5), Some((Vec::new(), true)));
        assert_eq!(join(Vec::new(), 4, 4), Some((Vec::new(), false)));
        assert_eq!(join(Vec::new(), 4, 5), None);
    }
}
