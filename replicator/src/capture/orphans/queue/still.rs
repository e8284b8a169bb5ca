//! Many send queues at once. All of them are walked in step, one run of the program for each step, so that
//! what a queue costs is less than one system call.
//!
//! In a stop nobody changes them: the container stands still and gets no input. While it runs, entries are added, and
//! acknowledged ones are freed, at any time. Then those count that are the same after their bytes were read, up to the
//! first that is not (it may have been joined with the next, which is free then and looks as before), and of their bytes
//! those that the socket has not noted as acknowledged after all that, which it does before it frees anything.
//!
//! And an entry that was freed may be one of another connection at once, with sequence numbers that fit as well. So the
//! walk proves nothing yet then: what it has found is looked at three times, and an entry counts if the second look has a
//! way to it from the heads of its queue, over entries that were the same at the first and the third. Whoever was the same
//! belonged to one queue from the first look to the third, and so do the neighbours that it had in between.

use super::{Entry, EntryPlaces, Memory, Pages, Places, Range, behind, join};
use crate::sys::SysResult;

/// Steps down a tree, or along a list; a queue that needs more is left to others.
const STEPS: usize = 32;
/// A list with more entries is followed by itself, all of it in one run. Most queues have none that wait.
const LONG: usize = 4;
/// Entries of all queues.
const MOST: usize = 4 << 10;

/// A queue to be read: the address of its struct tcp_sock, the sequence number of the first byte that is
/// wanted, which was not acknowledged when it was looked at, and that behind the last.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Still {
    pub(in crate::capture) at: u64,
    pub(in crate::capture) from: u32,
    pub(in crate::capture) end: u32,
}

/// An entry that is looked at in this step: of which queue, where, and whether it is in the list.
type Look = (usize, u64, bool);

/// What is found of a queue.
#[derive(Debug)]
struct Found {
    of: usize,
    entry: Entry,
    /// Where its bytes are among those of all, if they are wanted.
    at: usize,
    /// Its neighbours in the list or tree, before the bytes were read.
    links: [u64; 3],
    /// It was the same after they were read.
    same: bool,
    /// It is of this queue.
    sure: bool,
}

impl Found {
    fn new(of: usize, entry: Entry) -> Self {
        Self { of, entry, at: 0, links: [0; 3], same: false, sure: false }
    }

    /// Whether it has bytes that are wanted.
    fn is_wanted(&self, queues: &[Still]) -> bool {
        behind(self.entry.end, queues[self.of].from)
    }

    fn bytes<'a>(&self, all: &'a [u8]) -> &'a [u8] {
        &all[self.at..self.at + self.entry.len]
    }
}

/// Reads queues. What it needs for that is kept from one time to the next, so that a stop asks for no memory.
#[derive(Debug, Default)]
pub(in crate::capture) struct Reader {
    /// In the order of queues, and of each in that of its bytes.
    found: Vec<Found>,
    /// Of each queue: it is not as it should be.
    odd: Vec<bool>,
    looks: Vec<Look>,
    /// Those of the next step.
    then: Vec<Look>,
    /// Long lists: of which queue, the first entry, and how many there are.
    lists: Vec<(usize, u64, usize)>,
    /// Of each queue: the first of the list and the root of the tree, before the bytes were read.
    heads: Vec<[u64; 2]>,
    /// Entries by queue and address: their places in `found`.
    by_address: Vec<(usize, u64, usize)>,
    ways: Vec<u64>,
    /// Of each queue: the first sequence number that is not acknowledged, after all.
    now: Vec<u32>,
    ranges: Vec<Range>,
    /// Structures of the access.
    structures: Vec<u8>,
    /// What the entries hold.
    bytes: Vec<u8>,
    /// What one queue holds.
    whole: Vec<u8>,
}

/// Where queues are read.
pub(in crate::capture::orphans) struct Access<'a> {
    pub(in crate::capture::orphans) memory: &'a mut Memory,
    pub(in crate::capture::orphans) places: &'a Places,
    pub(in crate::capture::orphans) pages: &'a Pages,
}

impl Reader {
    /// Reads queues, and tells of each the bytes from [`Still::from`] on, by its place among those that were asked for. Of one that
    /// is not told another way must be found.
    ///
    /// # Errors
    /// The kernel refuses, or something is not where it should be.
    pub(in crate::capture::orphans) fn read(
        &mut self,
        mut access: Access<'_>,
        queues: &[Still],
        mut tell: impl FnMut(usize, &[u8]),
    ) -> SysResult<()> {
        self.look(&mut access, queues, false)?;
        let Self { found, odd, bytes, whole, .. } = self;
        for (nth, queue, found) in of_each(queues, found) {
            if odd[nth] || !found.iter().all(|f| f.same) {
                continue;
            }
            let pieces = found.iter().map(|f| (&f.entry, f.bytes(bytes)));
            if join(pieces, queue.from, queue.end, whole) == Some(false) {
                tell(nth, whole);
            }
        }
        Ok(())
    }

    /// Reads queues while the container runs, as far as they go: without what was written or acknowledged meanwhile. Tells of
    /// each the sequence number of the first byte, and the bytes, as far as they can be counted on.
    ///
    /// # Errors
    /// As of [`Reader::read`]; most of all EFAULT.
    pub(in crate::capture::orphans) fn read_moving(
        &mut self,
        mut access: Access<'_>,
        queues: &[Still],
        mut tell: impl FnMut(usize, u32, &[u8]),
    ) -> SysResult<()> {
        self.look(&mut access, queues, true)?;
        // Last of all.
        let Access { memory, places, .. } = access;
        let Self { ranges, structures, now, .. } = self;
        ranges.clear();
        ranges.extend(queues.iter().map(|q| (q.at + places.socket.una.offset as u64, 4)));
        memory.read_into(ranges, structures)?;
        now.clear();
        now.extend(structures.as_chunks::<4>().0.iter().map(|una| u32::from_ne_bytes(*una)));
        let now = std::mem::take(&mut self.now);
        // What is acknowledged may be free, and lead anywhere.
        self.find_ways(|of, entry| behind(entry.end, now[of]));
        let Self { found, odd, bytes, whole, .. } = self;
        for ((nth, queue, found), una) in of_each(queues, found).zip(now.iter().copied()) {
            let una = if behind(una, queue.from) { una } else { queue.from };
            if !odd[nth] && prefix(found, bytes, una, whole) {
                tell(nth, una, whole);
            }
        }
        self.now = now;
        Ok(())
    }

    /// Finds the entries of queues, all of their bytes that are wanted, and whether each entry was the same after those were
    /// read. In the order of queues and bytes. If they move, with the links for [`Reader::find_ways`], and entries that are
    /// not wanted and lead to others.
    fn look(&mut self, access: &mut Access<'_>, queues: &[Still], moving: bool) -> SysResult<()> {
        self.walk(access, queues)?;
        self.found.retain(|f| !self.odd[f.of] && (moving || f.is_wanted(queues)));
        if moving {
            self.link(access, queues)?;
        }
        self.describe(access, queues)?;
        let Self { found, odd, ranges, bytes, .. } = self;
        ranges.clear();
        let mut end = 0;
        for f in found.iter_mut().filter(|f| f.is_wanted(queues)) {
            let before = ranges.len();
            if odd[f.of] || f.entry.ranges(access.pages, ranges).is_err() {
                ranges.truncate(before);
                odd[f.of] = true;
                continue;
            }
            f.at = end;
            end += f.entry.len;
        }
        access.memory.read_into(ranges, bytes)?;
        self.compare(access, queues)?;
        self.found.sort_unstable_by_key(|f| (f.of, f.entry.place_in(queues[f.of].from)));
        Ok(())
    }

    /// Finds the entries.
    fn walk(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        let Access { memory, places, .. } = access;
        let Self { found, odd, looks, then, lists, ranges, structures, .. } = self;
        let EntryPlaces { size, next, left, right, .. } = places.entry;
        let list = |queue: &Still| queue.at + places.socket.list.offset as u64;
        let tree = |queue: &Still| queue.at + places.socket.tree.offset as u64;
        let len = &places.socket.list_len;
        let heads = |q| [(list(q), 8), (tree(q), 8), (q.at + len.offset as u64, len.size)];
        ranges.clear();
        ranges.extend(queues.iter().flat_map(heads));
        memory.read_into(ranges, structures)?;
        found.clear();
        odd.clear();
        odd.resize(queues.len(), false);
        looks.clear();
        lists.clear();
        let heads = structures.chunks_exact(16 + len.size);
        for (i, (queue, heads)) in queues.iter().zip(heads).enumerate() {
            let [first, root] = [0, 8]
                .map(|at| u64::from_ne_bytes(heads[at..at + 8].try_into().expect("eight bytes")));
            let entries = len.value_in(&heads[16..]) as usize;
            if first != list(queue) && entries > LONG {
                lists.push((i, first, entries));
            } else if first != list(queue) {
                looks.push((i, first, true));
            }
            looks.extend((root != 0).then_some((i, root, false)));
        }
        let mut all = 0;
        for (i, mut at, entries) in lists.drain(..) {
            all += entries;
            let followed = all <= MOST
                && memory.follow_into((at, size), next.offset, entries, structures).is_ok();
            if !followed {
                odd[i] = true;
                continue;
            }
            for bytes in structures.chunks_exact(size) {
                match Entry::new(&places.entry, at, bytes) {
                    Some(entry) => found.push(Found::new(i, entry)),
                    None => odd[i] = true,
                }
                at = next.value(bytes);
                if at == list(&queues[i]) {
                    break;
                }
            }
            // It is longer now.
            looks.extend((at != list(&queues[i])).then_some((i, at, true)));
        }
        for _ in 0..STEPS {
            all += looks.len();
            if looks.is_empty() || all > MOST {
                break;
            }
            ranges.clear();
            ranges.extend(looks.iter().map(|(_, at, _)| (*at, size)));
            memory.read_into(ranges, structures)?;
            then.clear();
            for ((i, at, listed), bytes) in looks.drain(..).zip(structures.chunks_exact(size)) {
                let mut all_behind = true;
                match Entry::new(&places.entry, at, bytes) {
                    Some(entry) => {
                        // Left of it is what comes before it.
                        all_behind = behind(entry.seq, queues[i].from);
                        found.push(Found::new(i, entry));
                    }
                    None => odd[i] = true,
                }
                let end = list(&queues[i]);
                let after = match listed {
                    true => [next.value(bytes), 0].map(|at| if at == end { 0 } else { at }),
                    false => [if all_behind { left.value(bytes) } else { 0 }, right.value(bytes)],
                };
                then.extend(after.into_iter().filter(|at| *at != 0).map(|at| (i, at, listed)));
            }
            std::mem::swap(looks, then);
        }
        // Too long, or it has no end.
        looks.iter().for_each(|(i, ..)| odd[*i] = true);
        Ok(())
    }

    /// Notes how the entries hang together now.
    fn link(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        let Self { found, heads, ranges, structures, .. } = self;
        let Places { socket, entry, .. } = access.places;
        let heads_of = |q: &Still| [socket.list, socket.tree].map(|m| (q.at + m.offset as u64, 8));
        ranges.clear();
        ranges.extend(queues.iter().flat_map(heads_of));
        ranges.extend(found.iter().map(|f| (f.entry.at, entry.size)));
        access.memory.read_into(ranges, structures)?;
        let (of_queues, of_entries) = structures.split_at(16 * queues.len());
        heads.clear();
        heads.extend(of_queues.as_chunks::<16>().0.iter().map(|bytes| {
            [0, 8].map(|at| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes")))
        }));
        for (f, bytes) in found.iter_mut().zip(of_entries.chunks_exact(entry.size)) {
            // Where a list has the next, a tree has what is above, and its colour in the last bits.
            f.links = [entry.next, entry.left, entry.right].map(|link| link.value(bytes) & !3);
        }
        Ok(())
    }

    /// Adds what the entries that are wanted have in pages.
    fn describe(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        let Self { found, odd, ranges, structures, .. } = self;
        let size = access.places.shared.size;
        let wanted = |f: &&mut Found| f.is_wanted(queues);
        ranges.clear();
        ranges.extend(found.iter_mut().filter(wanted).map(|f| (f.entry.shared, size)));
        access.memory.read_into(ranges, structures)?;
        let wanted = found.iter_mut().filter(wanted);
        for (f, bytes) in wanted.zip(structures.chunks_exact(size)) {
            odd[f.of] |= !f.entry.learn(&access.places.shared, bytes);
        }
        Ok(())
    }

    /// Finds out which entries that were the same, and that count, can be reached from the heads of their queues.
    fn find_ways(&mut self, counts: impl Fn(usize, &Entry) -> bool) {
        let Self { found, heads, by_address, ways, .. } = self;
        by_address.clear();
        by_address.extend(found.iter().enumerate().map(|(i, f)| (f.of, f.entry.at, i)));
        by_address.sort_unstable();
        for (of, heads) in heads.iter().enumerate() {
            ways.clear();
            ways.extend_from_slice(heads);
            while let Some(at) = ways.pop() {
                let nth = by_address.partition_point(|known| (known.0, known.1) < (of, at));
                let Some(&(_, _, i)) = by_address.get(nth).filter(|k| (k.0, k.1) == (of, at))
                else {
                    continue;
                };
                let f = &mut found[i];
                if !f.sure && f.same && counts(of, &f.entry) {
                    f.sure = true;
                    ways.extend_from_slice(&f.links);
                }
            }
        }
    }

    /// Which entries are still as they were found: a timer of the kernel may have joined two to send
    /// them again, and freed one of them.
    fn compare(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        let Self { found, odd, ranges, structures, .. } = self;
        let Places { entry, shared, .. } = access.places;
        ranges.clear();
        let whole = found.iter().filter(|f| !odd[f.of]);
        ranges
            .extend(whole.flat_map(|f| [(f.entry.at, entry.size), (f.entry.shared, shared.size)]));
        access.memory.read_into(ranges, structures)?;
        let whole = found.iter_mut().filter(|f| !odd[f.of]);
        for (f, bytes) in whole.zip(structures.chunks_exact(entry.size + shared.size)) {
            let (bytes, more) = bytes.split_at(entry.size);
            let now = Entry::new(entry, f.entry.at, bytes);
            let now =
                if f.is_wanted(queues) { now.and_then(|e| e.with(shared, more)) } else { now };
            f.same = now.as_ref() == Some(&f.entry);
        }
        Ok(())
    }
}

/// Each queue with its number and what was found of it.
fn of_each<'a>(
    queues: &'a [Still],
    mut found: &'a [Found],
) -> impl Iterator<Item = (usize, &'a Still, &'a [Found])> {
    queues.iter().enumerate().map(move |(nth, queue)| {
        let (its, others) = found.split_at(found.partition_point(|f| f.of <= nth));
        found = others;
        (nth, queue, its)
    })
}

/// Puts the bytes behind `una` together, up to the first entry that is missing or has changed. Whether there are any.
fn prefix(found: &[Found], all: &[u8], una: u32, bytes: &mut Vec<u8>) -> bool {
    bytes.clear();
    let mut at = una;
    for (i, f) in found.iter().filter(|f| behind(f.entry.end, una)).enumerate() {
        let entry = &f.entry;
        let follows = if i == 0 { !behind(entry.seq, una) } else { entry.seq == at };
        if !follows || !f.sure || entry.flags != 0 {
            break;
        }
        bytes.extend_from_slice(entry.behind(una, f.bytes(all)));
        at = entry.end;
    }
    !bytes.is_empty()
}

#[cfg(test)]
mod tests {
    use super::super::super::{Orphans, pages::Known};
    use super::*;
    use crate::sys::{loopback, sockopt};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{SockaddrIn, bind, connect};
    use smallvec::SmallVec;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpStream};
    use std::os::fd::{AsFd, AsRawFd};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    /// What cannot be what was asked for is not given.
    #[test]
    fn many_queues_are_read_at_once() {
        let inside = || {
            let Some(mut orphans) = Orphans::open() else {
                println!("skipped: this kernel does not show send queues");
                return;
            };
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own");
            // The last two wait in hundreds of entries.
            let lens = (1..=40).map(|i| 8000 + 500 * i).chain([300_000, 1_000_000]);
            let known: Vec<Known> = lens.map(|l| Known::new(l).expect("a connection")).collect();
            let places = &orphans.kernel.places;
            let waiting = known.last().map(|k| k.socket(&mut orphans.memory, places));
            let (_, socket) = waiting.expect("one").expect("it is there");
            assert!(places.socket.list_len.value(&socket) > STEPS as u64, "a long list");
            let look = |orphans: &mut Orphans| -> Vec<Still> {
                let sockets = known.iter().map(|k| k.socket(&mut orphans.memory, places));
                let still = |(at, socket): (u64, Vec<u8>)| {
                    let (end, una) = places.sent(&socket);
                    Still { at, from: una, end }
                };
                sockets.map(|found| still(found.expect("it is there"))).collect()
            };
            let read = |orphans: &mut Orphans, asked: &[Still]| {
                let mut found = vec![None; asked.len()];
                let tell = |nth: usize, bytes: &[u8]| found[nth] = Some(bytes.to_vec());
                orphans.still(asked, tell).expect("they are read");
                found
            };
            // Until all that fits the other side's windows has been acknowledged, and the kernel does not split an
            // entry to probe one.
            let end = Instant::now() + Duration::from_secs(60);
            loop {
                let asked = look(&mut orphans);
                let found = read(&mut orphans, &asked);
                let mut wrong = asked.clone();
                wrong[0].end = wrong[0].end.wrapping_add(1);
                wrong[1].from = wrong[1].from.wrapping_sub(1);
                let of_wrong = read(&mut orphans, &wrong);
                assert!(of_wrong[0].is_none() && of_wrong[1].is_none());
                let all = found.iter().chain(&of_wrong[2..]).all(Option::is_some);
                if !all && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                for ((known, asked), found) in known.iter().zip(&asked).zip(found) {
                    let len = asked.end.wrapping_sub(asked.from) as usize;
                    assert!(len > 1000, "{len}");
                    let expected = known.written.get(known.written.len() - len..);
                    assert!(found.is_some() && found.as_deref() == expected, "{len} of {asked:?}");
                }
                assert!(all);
                break;
            }
        };
        std::thread::spawn(inside).join().expect("no panic");
    }

    fn found(of: usize, address: u64, seq: u32, links: [u64; 3]) -> Found {
        let entry = Entry {
            at: address,
            seq,
            end: seq + 10,
            flags: 0,
            own: (0, 10),
            len: 10,
            shared: 0,
            fragments: SmallVec::new(),
        };
        Found { links, same: true, ..Found::new(of, entry) }
    }

    /// The walk has come to an entry that meanwhile is another connection's.
    #[test]
    fn an_entry_counts_if_there_is_a_way_to_it() {
        let sure = |heads: [u64; 2], una: u32, found: Vec<Found>| {
            let mut reader = Reader { found, heads: vec![[0, 0], heads], ..Reader::default() };
            reader.find_ways(|_, entry| behind(entry.end, una));
            reader.found.iter().map(|f| f.sure).collect::<Vec<_>>()
        };
        // A list of two, and a tree of three; the last is of the queue before.
        let whole = || {
            vec![
                found(1, 0x10, 40, [0x20, 0, 0]),
                found(1, 0x20, 50, [0x100, 0, 0]),
                found(1, 0x30, 20, [0, 0x40, 0x50]),
                found(1, 0x40, 10, [0x30, 0, 0]),
                found(1, 0x50, 30, [0x30, 0, 0]),
                found(0, 0x40, 10, [0, 0, 0]),
            ]
        };
        assert_eq!(sure([0x10, 0x30], 10, whole()), [true, true, true, true, true, false]);
        assert_eq!(sure([0x20, 0x30], 10, whole()), [false, true, true, true, true, false]);
        assert_eq!(sure([0x10, 0], 10, whole()), [true, true, false, false, false, false]);
        // What is acknowledged is not there any more, and leads nowhere.
        assert_eq!(sure([0x10, 0x40], 20, whole()), [true, true, false, false, false, false]);
        let mut changed = whole();
        changed[2].same = false;
        assert_eq!(sure([0x10, 0x30], 10, changed), [true, true, false, false, false, false]);
        // A circle.
        let circle = vec![found(1, 0x10, 40, [0x20, 0, 0]), found(1, 0x20, 50, [0x10, 0, 0])];
        assert_eq!(sure([0x10, 0], 10, circle), [true, true]);
    }

    /// The byte of the nth stream at this place.
    fn at(nth: usize, place: u32) -> u8 {
        (u64::from(place).wrapping_mul(0x9e37_79b9_7f4a_7c15 + nth as u64 * 2) >> 56) as u8
    }

    /// Two ends of a connection over the loopback, which both begin with this sequence number.
    fn connected(first: u32, ports: [u16; 2]) -> (TcpStream, TcpStream) {
        let end = |here: u16, there: u16| {
            let socket = sockopt::open(libc::AF_INET, libc::SOCK_STREAM, 0).expect("a socket");
            let set = |name, value: u32| {
                sockopt::set_i32(socket.as_fd(), libc::IPPROTO_TCP, name, value as i32)
                    .expect("repair mode");
            };
            set(libc::TCP_REPAIR, 1);
            for queue in [1, 2] {
                set(libc::TCP_REPAIR_QUEUE, queue);
                set(libc::TCP_QUEUE_SEQ, first);
            }
            let address = |port| SockaddrIn::new(127, 0, 0, 1, port);
            bind(socket.as_raw_fd(), &address(here)).expect("bound");
            connect(socket.as_raw_fd(), &address(there)).expect("connected");
            // The largest segment, and by what windows are shifted.
            let agreed = [2u32, 32_741, 3, 7 << 16 | 7].map(u32::to_ne_bytes).concat();
            sockopt::set(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &agreed)
                .expect("repair mode");
            socket
        };
        let ends = [end(ports[0], ports[1]), end(ports[1], ports[0])];
        // Each asks the other for its window.
        for end in &ends {
            sockopt::set_i32(end.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, 0).expect("over");
        }
        let [a, b] = ends.map(TcpStream::from);
        (a, b)
    }

    /// Whoever writes and reads at the other end stops for nobody, and no byte that is given is wrong: also not of another
    /// connection, though all of them are at about the same sequence numbers all the time.
    #[test]
    fn queues_are_read_while_they_move() {
        let inside = || {
            let Some(mut orphans) = Orphans::open() else {
                println!("skipped: this kernel does not show send queues");
                return;
            };
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own");
            let socket = sockopt::open(libc::AF_INET, libc::SOCK_STREAM, 0).expect("a socket");
            loopback::up(socket.as_fd()).expect("it is up");
            let over = AtomicBool::new(false);
            let pairs: Vec<(TcpStream, TcpStream)> =
                (0..4).map(|nth| connected(1 << 20, [1000 + nth, 2000 + nth])).collect();
            // How far each has written.
            let far: [AtomicU64; 4] = Default::default();
            let places = &orphans.kernel.places;
            let first: Vec<Still> = pairs
                .iter()
                .map(|(stream, _)| {
                    stream.set_nodelay(true).expect("set");
                    let (local, remote) = (stream.local_addr(), stream.peer_addr());
                    let memory = &mut orphans.memory;
                    let found = memory.find(local.expect("bound"), remote.expect("connected"));
                    let at = found.expect("it can be asked for").expect("it is there");
                    let socket = memory.read(&[places.socket(at)]).expect("it can be read");
                    let (end, una) = places.sent(&socket);
                    assert_eq!(end, una, "nothing was written");
                    Still { at, from: una, end }
                })
                .collect();
            std::thread::scope(|scope| {
                for (nth, (stream, other)) in pairs.iter().enumerate() {
                    let (over, far) = (&over, &far);
                    scope.spawn(move || {
                        let (mut rng, mut place, mut stream) =
                            (fastrand::Rng::with_seed(nth as u64), 0, stream);
                        while !over.load(Ordering::Relaxed) {
                            let most = [40, 3000, 100_000][rng.usize(0..3)];
                            let len = rng.u64(1..most);
                            let bytes: Vec<u8> =
                                (place..place + len).map(|p| at(nth, p as u32)).collect();
                            if stream.write_all(&bytes).is_err() {
                                return;
                            }
                            place += len;
                            far[nth].store(place, Ordering::Relaxed);
                            // Not much further than the slowest.
                            let ahead =
                                |far: &AtomicU64| far.load(Ordering::Relaxed) + 500_000 < place;
                            while far.iter().any(ahead) && !over.load(Ordering::Relaxed) {
                                std::thread::sleep(Duration::from_micros(50));
                            }
                        }
                        let _ = stream.shutdown(Shutdown::Both);
                    });
                    scope.spawn(move || {
                        let (mut rng, mut other) = (fastrand::Rng::with_seed(nth as u64), other);
                        let mut buffer = vec![0; 60_000];
                        while other.read(&mut buffer).is_ok_and(|n| n > 0) {
                            if rng.u8(0..4) == 0 {
                                std::thread::sleep(Duration::from_micros(rng.u64(0..300)));
                            }
                        }
                    });
                }
                let (mut checked, mut wrong) = (0, Vec::new());
                let mut asked = first.clone();
                for _ in 0..3000 {
                    let mut found = vec![None; asked.len()];
                    let tell = |nth: usize, start, bytes: &[u8]| {
                        found[nth] = Some((start, bytes.to_vec()));
                    };
                    if orphans.moving(&asked, tell).is_err() {
                        continue;
                    }
                    let all = asked.iter_mut().zip(&first).zip(found).enumerate();
                    for (nth, ((asked, first), found)) in all {
                        if let Ok(socket) = orphans.memory.read(&[places.socket(asked.at)]) {
                            asked.from = places.sent(&socket).1;
                        }
                        let Some((start, bytes)) = found else { continue };
                        let place = start.wrapping_sub(first.from);
                        let wanted = (0..).map(|i| at(nth, place.wrapping_add(i)));
                        let found = bytes.iter().zip(wanted).position(|(byte, b)| *byte != b);
                        wrong.extend(found.map(|at| (place, at, bytes.len())));
                        checked += bytes.len();
                    }
                }
                over.store(true, Ordering::Relaxed);
                // Whoever waits for room is let go.
                pairs.iter().for_each(|(_, other)| drop(other.shutdown(Shutdown::Both)));
                println!("{checked} bytes were compared");
                assert_eq!(wrong, [], "place, first wrong byte, and bytes of what was given");
                assert!(checked > 1_000_000, "{checked} bytes");
            });
        };
        std::thread::spawn(inside).join().expect("no panic");
    }
}
