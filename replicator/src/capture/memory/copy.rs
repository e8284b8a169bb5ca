//! Copying what was written: in large calls where all of it can be read, else part by part, around
//! guard regions, and at last page by page.

use super::AddressSpace;
use crate::capture::CaptureError;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::sys::SysResult;
use crate::sys::memory::{self, Range};
use crate::sys::pagemap::Region;

/// Ranges in one call.
const AT_ONCE: usize = 512;

impl AddressSpace {
    /// Copies the regions that the last scans have found.
    pub(super) fn copy(&mut self, pages: &mut PageSet, stopped: bool) -> Result<(), CaptureError> {
        let (regions, mut ranges) =
            (std::mem::take(&mut self.regions), std::mem::take(&mut self.ranges));
        let result = self.copy_all(&regions, &mut ranges, pages, stopped);
        (self.regions, self.ranges) = (regions, ranges);
        result
    }

    fn copy_all(
        &mut self,
        regions: &[Region],
        ranges: &mut Vec<Range>,
        pages: &mut PageSet,
        stopped: bool,
    ) -> Result<(), CaptureError> {
        for chunk in regions.chunks(AT_ONCE) {
            let range = |r: &Region| Range { start: r.start, len: (r.end - r.start) as usize };
            ranges.clear();
            ranges.extend(chunk.iter().map(range));
            let mut at = pages.bytes.len();
            match memory::read_appended(self.pid, ranges, &mut pages.bytes) {
                Ok(()) => {
                    for r in &*ranges {
                        pages.runs.push(self.run(r, at));
                        at += r.len;
                    }
                }
                Err(e) if e.code() == libc::EFAULT => {
                    for region in chunk {
                        self.copy_region(*region, pages, stopped)?;
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads what rounds of pre-copy have taken of this process once more, each page to its place, but for the
    /// first `settled` runs. What cannot be read any more stays what it was, as it would if nobody
    /// looked. Gives the number of pages.
    pub(in crate::capture) fn take_again(
        &self,
        pages: &mut PageSet,
        settled: usize,
    ) -> SysResult<usize> {
        let PageSet { runs, bytes } = pages;
        let mut ranges = Vec::with_capacity(AT_ONCE);
        let (mut from, mut to, mut taken) = (0, 0, 0);
        for run in runs[settled..].iter().filter(|run| run.process == self.mark) {
            let Content::Data(at) = run.content else { continue };
            if at != to || ranges.len() == AT_ONCE {
                self.read_again(&ranges, &mut bytes[from..to])?;
                ranges.clear();
                (from, to) = (at, at);
            }
            let len = run.count as usize * PAGE;
            ranges.push(Range { start: run.start, len });
            to += len;
            taken += run.count as usize;
        }
        self.read_again(&ranges, &mut bytes[from..to])?;
        Ok(taken)
    }

    /// Reads ranges that lie one after the other in `bytes`, as far as they can be read.
    fn read_again(&self, ranges: &[Range], bytes: &mut [u8]) -> SysResult<()> {
        match memory::read_vectored(self.pid, ranges, bytes) {
            Err(e) if e.code() == libc::EFAULT => {}
            other => return other,
        }
        let addresses = ranges.iter().flat_map(|r| (r.start..r.start + r.len as u64).step_by(PAGE));
        let mut page = [0; PAGE];
        for (address, place) in addresses.zip(bytes.chunks_exact_mut(PAGE)) {
            if self.forced.read(address, &mut page).is_ok() {
                place.copy_from_slice(&page);
            }
        }
        Ok(())
    }

    fn run(&self, range: &Range, at: usize) -> Run {
        Run {
            process: self.mark,
            start: range.start,
            count: (range.len / PAGE) as u32,
            content: Content::Data(at),
        }
    }

    /// For a region in which something cannot be read like the rest.
    fn copy_region(
        &mut self,
        region: Region,
        pages: &mut PageSet,
        stopped: bool,
    ) -> Result<(), CaptureError> {
        if self.try_copy(region, pages)? {
            return Ok(());
        }
        let guards = self.find_guards(region.start, region.end)?;
        let ends = guards.iter().map(|g| g.1);
        let starts = [region.start].into_iter().chain(ends);
        let gaps = starts.zip(guards.iter().map(|g| g.0).chain([region.end]));
        for (start, end) in gaps.filter(|(start, end)| start < end) {
            let part = Region { start, end, ..region };
            if guards.is_empty() || !self.try_copy(part, pages)? {
                self.copy_page_by_page(part, pages, stopped)?;
            }
        }
        Ok(())
    }

    /// Copies a region if all of it can be read.
    fn try_copy(&self, region: Region, pages: &mut PageSet) -> SysResult<bool> {
        let used = pages.bytes.len();
        let range = Range { start: region.start, len: (region.end - region.start) as usize };
        match memory::read_appended(self.pid, &[range], &mut pages.bytes) {
            Ok(()) => {
                pages.runs.push(self.run(&range, used));
                Ok(true)
            }
            Err(e) if e.code() == libc::EFAULT => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// For pages that the process itself may not read, and for those that went away.
    fn copy_page_by_page(
        &mut self,
        region: Region,
        pages: &mut PageSet,
        stopped: bool,
    ) -> Result<(), CaptureError> {
        let mut page = [0u8; PAGE];
        for start in (region.start..region.end).step_by(PAGE) {
            match self.forced.read(start, &mut page) {
                Ok(()) => {
                    let at = pages.bytes.len();
                    pages.bytes.extend_from_slice(&page);
                    pages.runs.push(self.run(&Range { start, len: PAGE }, at));
                }
                Err(_) if !stopped => {
                    self.carry.push(Region { start, end: start + PAGE as u64, categories: 0 });
                }
                Err(e) => {
                    let mapped =
                        self.vmas.iter().any(|v| (v.mapping.start..v.mapping.end).contains(&start));
                    if mapped {
                        return Err(e.into());
                    }
                }
            }
        }
        Ok(())
    }
}
