//! Guard regions: pages that a program has made fault by madvise(2) MADV_GUARD_INSTALL, without a
//! mapping of their own (newer C libraries put one below the stack of each thread).
//!
//! They are found for nothing where there are none: one that is new counts as written and cannot
//! be read, one that is taken away counts as written and can. So a round forgets the guards among
//! what was written and finds those that are (still) there when it copies. One exception: the kernel
//! leaves its mark on guards when a watch ends, so that they count as clean in the next; memory that
//! is watched anew is therefore asked for guards once.

use super::CaptureError;
use super::maps::Vma;
use crate::image::advice::Advice;
use crate::image::{Source, Thread};
use crate::sys::memory;
use crate::sys::ptrace::reg;

const MADV_GUARD_INSTALL: u64 = 102;
/// The instruction that enters the kernel.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The guard regions of one process: ranges in order that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Guards(Vec<(u64, u64)>);

impl Guards {
    /// Pages that are guards now.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let first = self.0.partition_point(|(_, e)| *e < start);
        let behind = self.0.partition_point(|(s, _)| *s <= end);
        let joined = &self.0[first..behind];
        let start = joined.first().map_or(start, |(s, _)| start.min(*s));
        let end = joined.last().map_or(end, |(_, e)| end.max(*e));
        self.0.splice(first..behind, [(start, end)]);
    }

    /// Pages that may be guards no longer.
    pub(super) fn remove(&mut self, start: u64, end: u64) {
        if self.0.is_empty() {
            return;
        }
        let first = self.0.partition_point(|(_, e)| *e <= start);
        let behind = self.0.partition_point(|(s, _)| *s < end);
        if first < behind {
            let (left, right) = (self.0[first].0, self.0[behind - 1].1);
            let kept = [(left, start), (end, right)];
            self.0.splice(first..behind, kept.into_iter().filter(|(s, e)| s < e));
        }
    }

    /// Whether an address is a guard.
    pub(super) fn has(&self, address: u64) -> bool {
        let at = self.0.partition_point(|(_, end)| *end <= address);
        self.0.get(at).is_some_and(|(start, _)| *start <= address)
    }

    /// Forgets those that lie where nothing is mapped any more.
    pub(super) fn keep_within(&mut self, vmas: &[Vma]) {
        if self.0.is_empty() {
            return;
        }
        let mut at = 0;
        for vma in vmas {
            self.remove(at, vma.mapping.start);
            at = vma.mapping.end;
        }
        self.remove(at, u64::MAX);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts them among what was said of memory, in order of address.
    pub(super) fn add_to(&self, all: &mut Vec<Advice>) {
        if self.0.is_empty() {
            return;
        }
        all.extend(self.0.iter().map(|&(start, end)| Advice { start, end, bits: Advice::GUARD }));
        // In place: at the same address a guard comes behind what was said of its mapping.
        all.sort_unstable_by_key(|a| (a.start, a.bits == Advice::GUARD));
    }
}

/// Refuses a process that puts a guard region into memory of a file or an object while it is
/// watched. The kernel clears such memory first, keeps our marks in it, takes them for pages, and
/// begins anew without end (madvise_guard_install of mm/madvise.c).
pub(super) fn refuse_stuck(pid: i32, threads: &[Thread], vmas: &[Vma]) -> Result<(), CaptureError> {
    for thread in threads {
        let regs = &thread.regs;
        let call = regs[reg::RAX] as u32;
        if i64::from(call) != libc::SYS_madvise || regs[reg::RDX] != MADV_GUARD_INSTALL {
            continue;
        }
        let at = regs[reg::RDI];
        let there = vmas.iter().find(|v| (v.mapping.start..v.mapping.end).contains(&at));
        let mut code = [0; 2];
        if there.is_some_and(|v| v.mapping.source != Source::Anonymous)
            && memory::read(pid, regs[reg::RIP], &mut code).is_ok()
            && code == SYSCALL
        {
            let why = "it puts a guard region (MADV_GUARD_INSTALL) into memory of a file or shared \
                       memory, which the kernel does not finish while the memory is watched; use \
                       mprotect(PROT_NONE) there, or guard private anonymous memory";
            let object = format!("memory at {at:#x} of pid {pid}");
            return Err(CaptureError::unsupported(object, why.into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn guards_are_the_pages_last_said_to_be(
            said in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..8), 0..30)
        ) {
            let (mut guards, mut model) = (Guards::default(), [false; 64]);
            for (is, start, len) in said {
                let end = start + len;
                if is { guards.add(start, end) } else { guards.remove(start, end) }
                model[start as usize..end as usize].fill(is);
            }
            let mut pages = [false; 64];
            for (start, end) in &guards.0 {
                prop_assert!(start < end);
                pages[*start as usize..*end as usize].fill(true);
            }
            prop_assert_eq!(pages, model);
            prop_assert!(guards.0.windows(2).all(|w| w[0].1 < w[1].0), "{:?}", guards);
        }
    }
}
