//! Many send queues at once. All of them are walked in step, one run of the program for each step, so that
//! what a queue costs is less than one system call.
//!
//! In a stop nobody changes them: the container stands still and gets no input. While it runs, entries are added, and
//! acknowledged ones are freed, at any time. Then those count that are the same after their bytes were read, up to the
//! first that is not (it may have been joined with the next, which is free then and looks as before), and of their bytes
//! those that the socket has not noted as acknowledged after all that, which it does before it frees anything.

use super::{Entry, EntryPlaces, Memory, Pages, Places, Range, behind, join};
use crate::sys::SysResult;

/// Steps along a list, or down a tree; a queue with more entries is left to others.
const STEPS: usize = 32;
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
    /// Where its bytes are among those of all.
    at: usize,
    /// It was the same after they were read.
    same: bool,
}

impl Found {
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
        self.look(&mut access, queues)?;
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
        self.look(&mut access, queues)?;
        // Last of all.
        let Access { memory, places, .. } = access;
        let Self { found, odd, ranges, structures, bytes, whole, .. } = self;
        ranges.clear();
        ranges.extend(queues.iter().map(|q| (q.at + places.socket.una.offset as u64, 4)));
        memory.read_into(ranges, structures)?;
        let now = structures.as_chunks::<4>().0.iter().map(|una| u32::from_ne_bytes(*una));
        for ((nth, queue, found), una) in of_each(queues, found).zip(now) {
            let una = if behind(una, queue.from) { una } else { queue.from };
            if !odd[nth] && prefix(found, bytes, una, whole) {
                tell(nth, una, whole);
            }
        }
        Ok(())
    }

    /// Finds the entries of queues, all of their bytes, and whether each entry was the same after those were read.
    fn look(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        self.walk(access, queues)?;
        self.describe(access)?;
        let Self { found, odd, ranges, bytes, .. } = self;
        ranges.clear();
        let mut end = 0;
        for f in found.iter_mut() {
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
        self.compare(access)?;
        self.found.sort_unstable_by_key(|f| (f.of, f.entry.place_in(queues[f.of].from)));
        Ok(())
    }

    /// Finds the entries.
    fn walk(&mut self, access: &mut Access<'_>, queues: &[Still]) -> SysResult<()> {
        let Access { memory, places, .. } = access;
        let Self { found, odd, looks, then, ranges, structures, .. } = self;
        let EntryPlaces { size, next, left, right, .. } = places.entry;
        let list = |queue: &Still| queue.at + places.socket.list.offset as u64;
        let tree = |queue: &Still| queue.at + places.socket.tree.offset as u64;
        ranges.clear();
        ranges.extend(queues.iter().flat_map(|q| [(list(q), 8), (tree(q), 8)]));
        memory.read_into(ranges, structures)?;
        found.clear();
        odd.clear();
        odd.resize(queues.len(), false);
        looks.clear();
        for (i, (queue, heads)) in queues.iter().zip(structures.as_chunks::<16>().0).enumerate() {
            let [first, root] = [0, 8]
                .map(|at| u64::from_ne_bytes(heads[at..at + 8].try_into().expect("eight bytes")));
            looks.extend((first != list(queue)).then_some((i, first, true)));
            looks.extend((root != 0).then_some((i, root, false)));
        }
        let mut all = 0;
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
                        if behind(entry.end, queues[i].from) {
                            found.push(Found { of: i, entry, at: 0, same: false });
                        }
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

    /// Adds what the entries have in pages.
    fn describe(&mut self, access: &mut Access<'_>) -> SysResult<()> {
        let Self { found, odd, ranges, structures, .. } = self;
        let size = access.places.shared.size;
        found.retain(|f| !odd[f.of]);
        ranges.clear();
        ranges.extend(found.iter().map(|f| (f.entry.shared, size)));
        access.memory.read_into(ranges, structures)?;
        for (f, bytes) in found.iter_mut().zip(structures.chunks_exact(size)) {
            odd[f.of] |= !f.entry.learn(&access.places.shared, bytes);
        }
        Ok(())
    }

    /// Which entries are still as they were found: a timer of the kernel may have joined two to send
    /// them again, and freed one of them.
    fn compare(&mut self, access: &mut Access<'_>) -> SysResult<()> {
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
            let now = Entry::new(entry, f.entry.at, bytes).and_then(|e| e.with(shared, more));
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
        if !follows || !f.same || entry.flags != 0 {
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
    use crate::sys::loopback;
    use nix::sched::{CloneFlags, unshare};
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    /// What cannot be what was asked for is not given.
    #[test]
    fn many_queues_are_read_at_once() {
        let inside = || {
            let Some(mut orphans) = Orphans::open() else {
                println!("skipped: this kernel does not show send queues");
                return;
            };
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own");
            let known: Vec<Known> =
                (1..=40).map(|i| Known::new(8000 + 500 * i).expect("a connection")).collect();
            let places = &orphans.kernel.places;
            let look = |orphans: &mut Orphans| -> Vec<Still> {
                let sockets = known.iter().map(|k| k.socket(&mut orphans.memory, places));
                let still = |(at, socket): (u64, Vec<u8>)| {
                    let (end, una) = places.sent(&socket);
                    Still { at, from: una, end }
                };
                sockets.map(|found| still(found.expect("it is there"))).collect()
            };
            // Until all that fits the other side's windows has been acknowledged.
            let asked = loop {
                let (before, now) = (look(&mut orphans), look(&mut orphans));
                if before.iter().zip(&now).all(|(a, b)| a.from == b.from) {
                    break now;
                }
            };
            let still = |orphans: &mut Orphans, asked: &[Still]| {
                let mut found = vec![None; asked.len()];
                let tell = |nth: usize, bytes: &[u8]| found[nth] = Some(bytes.to_vec());
                orphans.still(asked, tell).expect("they are read");
                found
            };
            let found = still(&mut orphans, &asked);
            for ((known, asked), found) in known.iter().zip(&asked).zip(found) {
                let len = asked.end.wrapping_sub(asked.from) as usize;
                assert!(len > 1000, "{len}");
                let expected = known.written.get(known.written.len() - len..);
                assert!(found.is_some() && found.as_deref() == expected, "{len} of {asked:?}");
            }
            let mut wrong = asked.clone();
            wrong[0].end = wrong[0].end.wrapping_add(1);
            wrong[1].from = wrong[1].from.wrapping_sub(1);
            let found = still(&mut orphans, &wrong);
            assert!(found[0].is_none() && found[1].is_none());
            assert!(found[2..].iter().all(Option::is_some));
        };
        std::thread::spawn(inside).join().expect("no panic");
    }

    /// The byte of a stream at this place.
    fn at(place: u32) -> u8 {
        (u64::from(place).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    /// Whoever writes and reads at the other end stops for nobody, and no byte that is given is wrong.
    #[test]
    fn queues_are_read_while_they_move() {
        let inside = || {
            let Some(mut orphans) = Orphans::open() else {
                println!("skipped: this kernel does not show send queues");
                return;
            };
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own");
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("bound");
            loopback::up(listener.as_fd()).expect("it is up");
            let to = (Ipv4Addr::LOCALHOST, listener.local_addr().expect("bound").port());
            let over = AtomicBool::new(false);
            let pairs: Vec<(TcpStream, TcpStream)> = (0..4)
                .map(|_| (TcpStream::connect(to).expect("there"), listener.accept().expect("it").0))
                .collect();
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
                    let over = &over;
                    scope.spawn(move || {
                        let (mut rng, mut place, mut stream) =
                            (fastrand::Rng::with_seed(nth as u64), 0u32, stream);
                        while !over.load(Ordering::Relaxed) {
                            let most = [40, 3000, 100_000][rng.usize(0..3)];
                            let len = rng.u32(1..most);
                            let bytes: Vec<u8> = (place..place + len).map(at).collect();
                            if stream.write_all(&bytes).is_err() {
                                return;
                            }
                            place += len;
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
                    for ((asked, first), found) in asked.iter_mut().zip(&first).zip(found) {
                        if let Ok(socket) = orphans.memory.read(&[places.socket(asked.at)]) {
                            asked.from = places.sent(&socket).1;
                        }
                        let Some((start, bytes)) = found else { continue };
                        let place = start.wrapping_sub(first.from);
                        let found =
                            bytes.iter().zip(place..).position(|(byte, place)| *byte != at(place));
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
