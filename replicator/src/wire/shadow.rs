//! The last version of each page, as both sides know it.
//!
//! The primary holds what it sent, the backup what it received in complete checkpoints; the two
//! are equal whenever a checkpoint begins, which is what deltas rest on. A shadow takes as much
//! memory as the container's pages that were ever sent and are still mapped (zero pages take
//! none), and never more than its limit: at the limit a new page is not remembered, and is then
//! sent without reference to an earlier version.
//!
//! Invariant: a page that is remembered is what the spare holds there. So of a mapping that is new only
//! what the same checkpoint has brought is remembered; what another mapping at its place held is not.

use super::delta::{Page, is_same, is_zero};
use crate::image::State;
use crate::image::pages::PAGE;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Pages that one slab of memory holds (1 MiB).
const SLAB: usize = 256;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The slot of a page that is all zero: no memory behind it.
const ZERO: u32 = u32::MAX;

static ZERO_PAGE: Page = [0; PAGE];

/// Names a page of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageKey {
    /// The process, by its pid in the container; below 0 an object (see
    /// [`image::object`](crate::image::object)).
    pub pid: i32,
    /// Address of its first byte; in an object, its offset.
    pub address: u64,
}

/// Folds what it is given by multiplication; keys come from an authenticated peer or from our
/// own kernel.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64((*b).into());
        }
    }

    fn write_i32(&mut self, n: i32) {
        self.write_u64(n as u64);
    }

    fn write_u64(&mut self, n: u64) {
        let wide = u128::from(self.0 ^ n ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = wide as u64 ^ (wide >> 64) as u64;
    }
}

/// A map by page.
pub type PageMap<T> = HashMap<PageKey, T, BuildHasherDefault<KeyHasher>>;

/// Where a version lies, and in which checkpoint it was last said what it is.
#[derive(Clone, Copy)]
struct Place {
    slot: u32,
    told: u32,
}

/// The versions.
pub struct Shadow {
    index: PageMap<Place>,
    /// Number of the checkpoint that is being sent, or folded in.
    now: u32,
    slabs: Vec<Box<[Page]>>,
    free: Vec<u32>,
    limit: usize,
    layout: Vec<(i32, u64, u64)>,
    /// The layout before, if the last state had another.
    before: Option<Vec<(i32, u64, u64)>>,
}

impl Shadow {
    /// An empty shadow that remembers at most `limit` pages.
    pub fn new(limit: usize) -> Self {
        let limit = limit.min(ZERO as usize - SLAB);
        Self {
            index: PageMap::default(),
            now: 0,
            slabs: Vec::new(),
            free: Vec::new(),
            limit,
            layout: Vec::new(),
            before: None,
        }
    }

    /// Forgets all versions and gives their memory back.
    pub fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// What is said from now on belongs to another checkpoint than what was said before.
    pub fn begin(&mut self) {
        self.now = self.now.wrapping_add(1);
    }

    /// Number of pages remembered, zero pages included.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Bytes of memory that the versions take.
    pub fn bytes(&self) -> usize {
        self.slabs.len() * SLAB * PAGE
    }

    /// The last version of a page.
    pub fn get(&self, key: PageKey) -> Option<&Page> {
        self.index.get(&key).map(|place| self.page(place.slot))
    }

    /// Hands the last version of a page to `code`, then replaces it by `current`.
    pub fn replace<T>(
        &mut self,
        key: PageKey,
        current: &Page,
        code: impl FnOnce(Option<&Page>) -> T,
    ) -> T {
        let slot = self.tell(key);
        let result = code(slot.map(|slot| self.page(slot)));
        self.store(key, slot, current);
        result
    }

    /// Replaces the version of a page.
    pub fn put(&mut self, key: PageKey, current: &Page) {
        let slot = self.tell(key);
        self.store(key, slot, current);
    }

    /// The slot of a page, of which something is said now.
    fn tell(&mut self, key: PageKey) -> Option<u32> {
        let place = self.index.get_mut(&key)?;
        place.told = self.now;
        Some(place.slot)
    }

    fn remember(&mut self, key: PageKey, slot: u32) -> Option<Place> {
        self.index.insert(key, Place { slot, told: self.now })
    }

    /// Changes some bytes of a page that is remembered.
    pub fn edit(&mut self, key: PageKey, at: usize, bytes: &[u8]) {
        let Some(mut slot) = self.tell(key) else { return };
        if slot == ZERO {
            slot = self.take_slot();
            *self.page_mut(slot) = ZERO_PAGE;
            self.remember(key, slot);
        }
        self.page_mut(slot)[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Forgets `count` pages from an address on.
    pub fn forget(&mut self, pid: i32, start: u64, count: u64) {
        self.forget_if(pid, start, count, |_| true);
    }

    fn forget_if(&mut self, pid: i32, start: u64, count: u64, is_gone: impl Fn(Place) -> bool) {
        let free = &mut self.free;
        let mut leave = |place: Place| {
            if place.slot != ZERO {
                free.push(place.slot);
            }
        };
        if count > self.index.len() as u64 {
            let end = start.saturating_add(count.saturating_mul(PAGE as u64));
            self.index.retain(|key, place| {
                let within = key.pid == pid && (start..end).contains(&key.address);
                let gone = within && is_gone(*place);
                if gone {
                    leave(*place);
                }
                !gone
            });
            return;
        }
        for i in 0..count {
            let key = PageKey { pid, address: start.wrapping_add(i * PAGE as u64) };
            if self.index.get(&key).is_some_and(|place| is_gone(*place))
                && let Some(place) = self.index.remove(&key)
            {
                leave(place);
            }
        }
    }

    /// Forgets the pages that are no longer in a mapping of the container, and those of new mappings that
    /// nothing was said of since [`Shadow::begin`]. Both sides call it
    /// with the state of the same checkpoint.
    pub fn follow(&mut self, state: &State) {
        self.before = None;
        // In a first checkpoint all is new, and was just said.
        if !self.layout.is_empty() {
            let now = self.now;
            for process in &state.processes {
                for m in process.mappings.iter().filter(|m| m.fresh) {
                    let count = (m.end - m.start).div_ceil(PAGE as u64);
                    self.forget_if(process.pid, m.start, count, |place| place.told != now);
                }
            }
        }
        let mut layout: Vec<(i32, u64, u64)> = Vec::with_capacity(self.layout.len());
        for process in &state.processes {
            for m in process.mappings.iter() {
                match layout.last_mut() {
                    Some(last) if last.0 == process.pid && last.2 == m.start => last.2 = m.end,
                    _ => layout.push((process.pid, m.start, m.end)),
                }
            }
        }
        for object in &state.objects {
            let pages = object.size.div_ceil(PAGE as u64);
            layout.push((object.owner(), 0, pages.saturating_mul(PAGE as u64)));
        }
        layout.sort_unstable();
        if layout == self.layout {
            return;
        }
        if self.layout.is_empty() {
            self.keep_within(&layout);
        }
        for (pid, start, end) in without(&self.layout, &layout) {
            self.forget(pid, start, end.saturating_sub(start).div_ceil(PAGE as u64));
        }
        self.before = Some(std::mem::replace(&mut self.layout, layout));
    }

    /// The state that was followed last counts for nothing, since the other side never hears of it: the next one is
    /// compared with the one before. What was forgotten stays so.
    pub fn take_back(&mut self) {
        if let Some(before) = self.before.take() {
            self.layout = before;
        }
    }

    /// What came with a first checkpoint and was unmapped before its stop is in no layout before.
    fn keep_within(&mut self, layout: &[(i32, u64, u64)]) {
        let free = &mut self.free;
        self.index.retain(|key, place| {
            let at = layout.partition_point(|l| (l.0, l.2) <= (key.pid, key.address));
            let stays = layout.get(at).is_some_and(|l| l.0 == key.pid && l.1 <= key.address);
            if !stays && place.slot != ZERO {
                free.push(place.slot);
            }
            stays
        });
    }

    /// All versions in order of page, for tests.
    #[cfg(test)]
    pub(super) fn versions(&self) -> Vec<(PageKey, Page)> {
        let mut all: Vec<_> = self.index.iter().map(|(k, at)| (*k, *self.page(at.slot))).collect();
        all.sort_unstable_by_key(|(k, _)| *k);
        all
    }

    fn page(&self, slot: u32) -> &Page {
        if slot == ZERO {
            return &ZERO_PAGE;
        }
        &self.slabs[slot as usize / SLAB][slot as usize % SLAB]
    }

    fn store(&mut self, key: PageKey, slot: Option<u32>, current: &Page) {
        if is_zero(current) {
            if slot == Some(ZERO) || (slot.is_none() && self.index.len() >= self.limit) {
                return;
            }
            if let Some(old) = self.remember(key, ZERO) {
                self.free.push(old.slot);
            }
            return;
        }
        let slot = match slot {
            // Most of it is as before, and what is not written need not go back to memory.
            Some(slot) if slot != ZERO => return update(self.page_mut(slot), current),
            None if self.index.len() >= self.limit => return,
            _ => {
                let slot = self.take_slot();
                self.remember(key, slot);
                slot
            }
        };
        *self.page_mut(slot) = *current;
    }

    /// The memory of a slot that is not [`ZERO`].
    fn page_mut(&mut self, slot: u32) -> &mut Page {
        &mut self.slabs[slot as usize / SLAB][slot as usize % SLAB]
    }

    fn take_slot(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        let first = (self.slabs.len() * SLAB) as u32;
        self.slabs.push(vec![[0; PAGE]; SLAB].into_boxed_slice());
        self.free.extend((first + 1..first + SLAB as u32).rev());
        first
    }
}

/// Makes a version the current one, cache line by cache line.
fn update(version: &mut Page, current: &Page) {
    let lines = version.as_chunks_mut::<LINE>().0.iter_mut();
    for (old, new) in lines.zip(current.as_chunks::<LINE>().0) {
        if !is_same(old, new) {
            *old = *new;
        }
    }
}

/// The parts of `old` that `new` does not cover; both sorted, without overlap.
fn without(old: &[(i32, u64, u64)], new: &[(i32, u64, u64)]) -> Vec<(i32, u64, u64)> {
    let mut gone = Vec::new();
    for &(pid, mut start, end) in old {
        let from = new.partition_point(|n| (n.0, n.2) <= (pid, start));
        for &(_, s, e) in new[from..].iter().take_while(|n| n.0 == pid && n.1 < end) {
            if s > start {
                gone.push((pid, start, s));
            }
            start = start.max(e);
        }
        if start < end {
            gone.push((pid, start, end));
        }
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Mapping, Process, Source};
    use std::sync::Arc;

    fn key(address: u64) -> PageKey {
        PageKey { pid: 1, address }
    }

    fn state(ranges: &[(u64, u64)]) -> State {
        let mappings = ranges
            .iter()
            .map(|&(start, end)| Mapping {
                start,
                end,
                prot: 3,
                grows_down: false,
                source: Source::Anonymous,
                fresh: false,
            })
            .collect();
        State {
            processes: vec![Process { pid: 1, mappings: Arc::new(mappings), ..Process::default() }],
            ..State::default()
        }
    }

    #[test]
    fn it_remembers_and_gives_memory_back() {
        let mut s = Shadow::new(1000);
        for i in 0..600u64 {
            s.put(key(i * 4096), &[i as u8 | 1; PAGE]);
        }
        assert_eq!(s.bytes(), 3 << 20);
        assert_eq!(s.get(key(5 * 4096)), Some(&[5; PAGE]));
        s.put(key(5 * 4096), &[0; PAGE]);
        assert_eq!(s.get(key(5 * 4096)), Some(&[0; PAGE]));
        s.put(key(5 * 4096), &[7; PAGE]);
        assert_eq!(s.get(key(5 * 4096)), Some(&[7; PAGE]));
        s.forget(1, 0, 10);
        assert_eq!((s.get(key(0)), s.len()), (None, 590));
        s.forget(1, 0, u64::MAX);
        assert_eq!(s.len(), 0);
        s.put(key(0), &[1; PAGE]);
        assert_eq!(s.bytes(), 3 << 20, "slots are used again");
    }

    #[test]
    fn beyond_its_limit_a_page_is_not_remembered() {
        let mut s = Shadow::new(1);
        s.put(key(0), &[1; PAGE]);
        s.put(key(4096), &[1; PAGE]);
        s.put(key(8192), &[0; PAGE]);
        assert_eq!((s.get(key(4096)), s.get(key(8192)), s.len()), (None, None, 1));
        s.put(key(0), &[2; PAGE]);
        assert_eq!(s.get(key(0)), Some(&[2; PAGE]));
    }

    #[test]
    fn pages_of_vanished_mappings_are_forgotten() {
        let mut s = Shadow::new(100);
        s.follow(&state(&[(0, 0x10000)]));
        for i in 0..16 {
            s.put(key(i * 4096), &[1; PAGE]);
        }
        s.follow(&state(&[(0x1000, 0x3000), (0x5000, 0x6000), (0xf000, 0x20000)]));
        let left: Vec<u64> = (0..16).filter(|i| s.get(key(i * 4096)).is_some()).collect();
        assert_eq!(left, [1, 2, 5, 15]);
        s.follow(&State::default());
        assert!(s.is_empty());
    }
}
