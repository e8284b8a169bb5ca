//! Many send queues at once, of sockets that nobody changes: those of a container that stands still and
//! gets no input. All of them are walked in step, one run of the program for each step, so that
//! what a queue costs is less than one system call.

use super::{Entry, EntryPlaces, Memory, Pages, Places, Range, behind, join};
use crate::sys::SysResult;

/// Steps along a list, or down a tree; a queue with more entries is left to others.
const STEPS: usize = 32;
/// Entries of all queues.
const MOST: usize = 4 << 10;

/// A queue to be read: the address of its struct tcp_sock, the sequence number of its first byte that
/// is not acknowledged, and that behind its last.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Still {
    pub(in crate::capture) at: u64,
    pub(in crate::capture) una: u32,
    pub(in crate::capture) end: u32,
}

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
    let mut rest = &bytes[..];
    let whole = queues.iter().zip(found).zip(same).map(|((queue, found), same)| {
        if found.odd {
            return None;
        }
        let mut pieces = Vec::with_capacity(found.entries.len());
        for entry in found.entries {
            let (its, others) = rest.split_at(entry.len);
            rest = others;
            pieces.push((entry, its));
        }
        let (bytes, fin) = join(pieces, queue.una, queue.end)?;
        (same && !fin).then_some(bytes)
    });
    Ok(whole.collect())
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
            match Entry::new(&places.entry, at, bytes) {
                Some(entry) if behind(entry.end, queues[i].una) => found[i].entries.push(entry),
                Some(_) => {}
                None => found[i].odd = true,
            }
            let follow = |at: u64| (at, listed);
            let end = list(&queues[i]);
            let after = match listed {
                true => [next.value(bytes), 0].map(|at| if at == end { 0 } else { at }),
                false => [left.value(bytes), right.value(bytes)],
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

/// Which queues are still as they were found: a timer of the kernel may have joined two entries to send
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
    // All of them take their turn.
    let queue = |q: &Found| !q.odd && q.entries.iter().filter(|e| !is_same(e)).count() == 0;
    Ok(found.iter().map(queue).collect())
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
    use nix::sched::{CloneFlags, unshare};

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
                    Still { at, una, end }
                };
                sockets.map(|found| still(found.expect("it is there"))).collect()
            };
            // Until all that fits the other side's windows has been acknowledged.
            let asked = loop {
                let (before, now) = (look(&mut orphans), look(&mut orphans));
                if before.iter().zip(&now).all(|(a, b)| a.una == b.una) {
                    break now;
                }
            };
            let found = orphans.still(&asked).expect("they are read");
            for ((known, asked), found) in known.iter().zip(&asked).zip(found) {
                let len = asked.end.wrapping_sub(asked.una) as usize;
                assert!(len > 1000, "{len}");
                let expected = known.written.get(known.written.len() - len..);
                assert!(found.is_some() && found.as_deref() == expected, "{len} of {asked:?}");
            }
            let mut wrong = asked.clone();
            wrong[0].end = wrong[0].end.wrapping_add(1);
            wrong[1].una = wrong[1].una.wrapping_sub(1);
            let found = orphans.still(&wrong).expect("they are read");
            assert!(found[0].is_none() && found[1].is_none());
            assert!(found[2..].iter().all(Option::is_some));
        };
        std::thread::spawn(inside).join().expect("no panic");
    }
}
