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

/// Bytes of a queue, and the sequence number of the first of them.
pub(in crate::capture) type Bytes = (u32, Vec<u8>);

/// An entry that is looked at in this step: of which queue, where, and whether it is in the list.
type Look = (usize, u64, bool);

/// What is read of one queue.
#[derive(Clone, Default)]
struct Found {
    entries: Vec<Entry>,
    /// It is not as it should be.
    odd: bool,
}

/// Reads queues, in the order in which they are asked for. None: another way must be found for it.
///
/// # Errors
/// The kernel refuses, or something is not where it should be.
pub(in crate::capture) fn read(
    memory: &mut Memory,
    places: &Places,
    pages: &Pages,
    queues: &[Still],
) -> SysResult<Vec<Option<Vec<u8>>>> {
    let (found, bytes, same) = look(memory, places, pages, queues)?;
    let mut rest = &bytes[..];
    let mut same = &same[..];
    let whole = queues.iter().zip(found).map(|(queue, found)| {
        let pieces = pieces(found, &mut rest, &mut same)?;
        let same = pieces.iter().all(|(.., same)| *same);
        let pieces = pieces.into_iter().map(|(entry, its, _)| (entry, its)).collect();
        let (bytes, fin) = join(pieces, queue.from, queue.end)?;
        (same && !fin).then_some(bytes)
    });
    Ok(whole.collect())
}

/// Reads queues while the container runs, as far as they go: without what was written or acknowledged meanwhile. None:
/// nothing of it can be counted on.
///
/// # Errors
/// As of [`read`]; most of all EFAULT.
pub(in crate::capture) fn read_moving(
    memory: &mut Memory,
    places: &Places,
    pages: &Pages,
    queues: &[Still],
) -> SysResult<Vec<Option<Bytes>>> {
    let (found, bytes, same) = look(memory, places, pages, queues)?;
    // Last of all.
    let noted = |queue: &Still| (queue.at + places.socket.una.offset as u64, 4);
    let now = memory.read(&queues.iter().map(noted).collect::<Vec<Range>>())?;
    let now = now.as_chunks::<4>().0.iter().map(|una| u32::from_ne_bytes(*una));
    let mut rest = &bytes[..];
    let mut same = &same[..];
    let told = queues.iter().zip(found).zip(now).map(|((queue, found), una)| {
        let pieces = pieces(found, &mut rest, &mut same)?;
        prefix(pieces, queue.from, if behind(una, queue.from) { una } else { queue.from })
    });
    Ok(told.collect())
}

/// An entry, its bytes, and whether it was the same after they were read.
type Piece<'a> = (Entry, &'a [u8], bool);

/// The entries of a queue with what is theirs of all bytes; none if something of them is odd.
fn pieces<'a>(found: Found, bytes: &mut &'a [u8], same: &mut &[bool]) -> Option<Vec<Piece<'a>>> {
    if found.odd {
        return None;
    }
    let mut pieces = Vec::with_capacity(found.entries.len());
    for entry in found.entries {
        let (its, others) = bytes.split_at(entry.len);
        let (is_same, more) = same.split_first()?;
        (*bytes, *same) = (others, more);
        pieces.push((entry, its, *is_same));
    }
    Some(pieces)
}

/// The bytes behind `una`, up to the first entry that is missing or has changed.
fn prefix(mut pieces: Vec<Piece<'_>>, from: u32, una: u32) -> Option<Bytes> {
    pieces.retain(|(entry, ..)| behind(entry.end, una));
    pieces.sort_by_key(|(entry, ..)| entry.place_in(from));
    let mut bytes = Vec::new();
    let mut at = una;
    for (i, (entry, its, same)) in pieces.iter().enumerate() {
        let follows = if i == 0 { !behind(entry.seq, una) } else { entry.seq == at };
        if !follows || !same || entry.flags != 0 {
            break;
        }
        let before = una.wrapping_sub(entry.begin()) as i32;
        bytes.extend_from_slice(its.get(before.max(0) as usize..).unwrap_or_default());
        at = entry.end;
    }
    (!bytes.is_empty()).then_some((una, bytes))
}

/// The entries of queues, all of their bytes, and of each entry whether it was the same after those were read.
fn look(
    memory: &mut Memory,
    places: &Places,
    pages: &Pages,
    queues: &[Still],
) -> SysResult<(Vec<Found>, Vec<u8>, Vec<bool>)> {
    let mut found = walk(memory, places, queues)?;
    describe(memory, places, &mut found)?;
    let mut ranges = Vec::new();
    for queue in found.iter_mut().filter(|queue| !queue.odd) {
        let before = ranges.len();
        if queue.entries.iter().try_for_each(|e| e.ranges(pages, &mut ranges)).is_err() {
            ranges.truncate(before);
            queue.odd = true;
        }
    }
    let bytes = memory.read(&ranges)?;
    let same = are_the_same(memory, places, &found)?;
    Ok((found, bytes, same))
}

/// Finds the entries.
fn walk(memory: &mut Memory, places: &Places, queues: &[Still]) -> SysResult<Vec<Found>> {
    let EntryPlaces { size, next, left, right, .. } = places.entry;
    let list = |queue: &Still| queue.at + places.socket.list.offset as u64;
    let tree = |queue: &Still| queue.at + places.socket.tree.offset as u64;
    let heads: Vec<Range> = queues.iter().flat_map(|q| [(list(q), 8), (tree(q), 8)]).collect();
    let bytes = memory.read(&heads)?;
    let mut found = vec![Found::default(); queues.len()];
    let mut looks: Vec<Look> = Vec::with_capacity(queues.len());
    for (i, (queue, heads)) in queues.iter().zip(bytes.as_chunks::<16>().0).enumerate() {
        let [first, root] =
            [0, 8].map(|at| u64::from_ne_bytes(heads[at..at + 8].try_into().expect("eight bytes")));
        looks.extend((first != list(queue)).then_some((i, first, true)));
        looks.extend((root != 0).then_some((i, root, false)));
    }
    let mut all = 0;
    for _ in 0..STEPS {
        all += looks.len();
        if looks.is_empty() || all > MOST {
            break;
        }
        let ranges: Vec<Range> = looks.iter().map(|(_, at, _)| (*at, size)).collect();
        let bytes = memory.read(&ranges)?;
        let mut then = Vec::with_capacity(looks.len());
        for ((i, at, listed), bytes) in looks.into_iter().zip(bytes.chunks_exact(size)) {
            let mut all_behind = true;
            match Entry::new(&places.entry, at, bytes) {
                Some(entry) => {
                    // Left of it is what comes before it.
                    all_behind = behind(entry.seq, queues[i].from);
                    if behind(entry.end, queues[i].from) {
                        found[i].entries.push(entry);
                    }
                }
                None => found[i].odd = true,
            }
            let follow = |at: u64| (at, listed);
            let end = list(&queues[i]);
            let after = match listed {
                true => [next.value(bytes), 0].map(|at| if at == end { 0 } else { at }),
                false => [if all_behind { left.value(bytes) } else { 0 }, right.value(bytes)],
            };
            let after = after.into_iter().filter(|at| *at != 0).map(follow);
            then.extend(after.map(|(at, listed)| (i, at, listed)));
        }
        looks = then;
    }
    // Too long, or it has no end.
    looks.iter().for_each(|(i, ..)| found[*i].odd = true);
    Ok(found)
}

/// Which entries are still as they were found: a timer of the kernel may have joined two to send
/// them again, and freed one of them.
fn are_the_same(memory: &mut Memory, places: &Places, found: &[Found]) -> SysResult<Vec<bool>> {
    let (size, shared) = (places.entry.size, places.shared.size);
    let entries = found.iter().filter(|queue| !queue.odd).flat_map(|queue| &queue.entries);
    let ranges: Vec<Range> = entries.flat_map(|e| [(e.at, size), (e.shared, shared)]).collect();
    let bytes = memory.read(&ranges)?;
    let mut bytes = bytes.chunks_exact(size + shared);
    let mut is_same = |entry: &Entry| {
        let now = bytes.next().map(|bytes| bytes.split_at(size)).and_then(|(bytes, shared)| {
            Entry::new(&places.entry, entry.at, bytes)?.with(&places.shared, shared)
        });
        now.as_ref() == Some(entry)
    };
    let entries = found.iter().filter(|queue| !queue.odd).flat_map(|queue| &queue.entries);
    Ok(entries.map(&mut is_same).collect())
}

/// Adds what the entries have in pages.
fn describe(memory: &mut Memory, places: &Places, found: &mut [Found]) -> SysResult<()> {
    let size = places.shared.size;
    let whole = |queue: &&Found| !queue.odd;
    let entries = found.iter().filter(whole).flat_map(|queue| &queue.entries);
    let ranges: Vec<Range> = entries.map(|e| (e.shared, size)).collect();
    let bytes = memory.read(&ranges)?;
    let mut bytes = bytes.chunks_exact(size);
    for queue in found.iter_mut().filter(|queue| !queue.odd) {
        let with = |e: Entry| e.with(&places.shared, bytes.next()?);
        let entries = std::mem::take(&mut queue.entries);
        let count = entries.len();
        // All of them take their turn, also behind one that is odd.
        let all: Vec<Option<Entry>> = entries.into_iter().map(with).collect();
        queue.entries = all.into_iter().flatten().collect();
        queue.odd = queue.entries.len() != count;
    }
    Ok(())
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
            let found = orphans.still(&asked).expect("they are read");
            for ((known, asked), found) in known.iter().zip(&asked).zip(found) {
                let len = asked.end.wrapping_sub(asked.from) as usize;
                assert!(len > 1000, "{len}");
                let expected = known.written.get(known.written.len() - len..);
                assert!(found.is_some() && found.as_deref() == expected, "{len} of {asked:?}");
            }
            let mut wrong = asked.clone();
            wrong[0].end = wrong[0].end.wrapping_add(1);
            wrong[1].from = wrong[1].from.wrapping_sub(1);
            let found = orphans.still(&wrong).expect("they are read");
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
                    let Ok(found) = orphans.moving(&asked) else { continue };
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
