//! Pages that changed: asynchronous write protection on every mapping, scanned and set again in
//! one pass.
//!
//! A *round* takes the pages written since the round before and copies them. Rounds run while
//! the container runs (pre-copy) and once more in the stop; a page written after its round is
//! seen by the next, so copies torn by a running writer are always taken again.
//!
//! What is written to pinned pages is seen by no round: see [`super::direct`].
//!
//! Mappings that are new, or that replaced an old one at the same place, are not registered for
//! write protection; the scan says so, and such a mapping is taken whole and marked fresh.

use super::glance::MappingGlance;
mod copy;
mod noted;
mod scan;

pub(super) use noted::Counts;
use noted::Noted;
pub(super) use scan::{Helpers, Job};

use super::guards::Guards;
use super::objects::Objects;
use super::{CaptureError, Glances, maps};
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::image::{Mapping, Source};
use crate::sys::memory::ForcedMemory;
use crate::sys::pagemap::{self, Buffer, Pagemap, Region, Scan};
use crate::sys::procmap::{Extent, ProcMap};
use crate::sys::remote::{SCRATCH, SCRATCH_LEN};
use crate::sys::{SysError, SysResult, uffd};
use maps::Vma;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// The tracked address space of one process.
#[derive(Debug)]
pub(super) struct AddressSpace {
    pid: i32,
    /// Pid in the container: the mark of this process's runs until the checkpoint is whole.
    mark: u32,
    uffd: OwnedFd,
    pagemap: Arc<Pagemap>,
    buffer: Buffer,
    procmap: ProcMap,
    glance: Option<MappingGlance>,
    /// What a glance tells is compared with what there is.
    checked: bool,
    forced: ForcedMemory,
    extents: Vec<Extent>,
    look: Vec<Extent>,
    /// What stood for their state just before `extents` were listed, if anything does.
    sequence: Option<u64>,
    vmas: Vec<Vma>,
    spans: Vec<(u64, u64)>,
    /// Watched mappings of objects, whose pages are the objects'.
    shared: Vec<Shared>,
    /// Ranges first seen since the last checkpoint.
    fresh: Vec<(u64, u64)>,
    /// Runs to copy again: they were marked clean but could not be read while running.
    carry: Vec<Region>,
    regions: Vec<Region>,
    guards: Guards,
    changed: bool,
    /// The mappings are those of the last round, and a job scans their pages.
    begun: bool,
    noted: Noted,
    /// How often the scans of this round have flushed translations at least.
    flushes: u64,
    /// How many pages they have found.
    found: u64,
}

/// A mapping of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shared {
    start: u64,
    end: u64,
    id: u32,
    offset: u64,
}

impl AddressSpace {
    /// Tracks a process whose userfaultfd was made in it and given to us.
    pub(super) fn new(pid: i32, mark: i32, uffd: OwnedFd, glances: Glances) -> SysResult<Self> {
        uffd::enable_async_wp(uffd.as_fd())?;
        let glance = match glances {
            Glances::Off => None,
            Glances::On | Glances::Noted | Glances::Checked => MappingGlance::open(pid),
        };
        Ok(Self {
            glance,
            checked: glances == Glances::Checked,
            pid,
            mark: mark as u32,
            uffd,
            pagemap: Arc::new(Pagemap::open(pid)?),
            buffer: Buffer::default(),
            procmap: ProcMap::open(pid)?,
            forced: ForcedMemory::open(pid)?,
            extents: Vec::new(),
            look: Vec::new(),
            sequence: None,
            vmas: Vec::new(),
            spans: Vec::new(),
            shared: Vec::new(),
            fresh: Vec::new(),
            carry: Vec::new(),
            regions: Vec::new(),
            guards: Guards::default(),
            changed: true,
            begun: false,
            noted: Noted::new(match glances {
                Glances::Off => None,
                Glances::On => Some(noted::WORTH),
                Glances::Noted | Glances::Checked => Some(noted::WORTH / 4),
            }),
            flushes: 0,
            found: 0,
        })
    }

    /// The notes of its faults.
    pub(super) fn noted(&mut self) -> &mut Noted {
        &mut self.noted
    }

    /// Takes the pages written since the last round and copies them into `pages`. `stopped` says
    /// that no thread runs: then what cannot be copied is an error. What a job was given of it by
    /// [`AddressSpace::begin`] is that job's. `sequence` is what stood for the state of the mappings
    /// before the call.
    pub(super) fn round(
        &mut self,
        pages: &mut PageSet,
        objects: &mut Objects,
        stopped: bool,
        job: Option<&Job>,
        sequence: Option<u64>,
    ) -> Result<(), CaptureError> {
        (self.flushes, self.found) = (0, 0);
        let result = self.try_round(pages, objects, stopped, job, sequence);
        match &result {
            Ok(true) if !stopped => self.noted.scanned(self.found, self.flushes),
            _ => self.noted.shut(),
        }
        if result.is_err() {
            objects.suspect_all();
            self.keep();
        }
        if !stopped {
            self.noted.consider(self.spans.iter().map(|(start, end)| end - start).sum());
        }
        result.map(drop)
    }

    /// What was scanned counts as clean from now on, so it must not be forgotten.
    fn keep(&mut self) {
        self.carry.append(&mut self.regions);
        self.extents.clear();
    }

    /// Begins a round, of a stop or (`running`) before it, whose scan is left to a job if the mappings are
    /// still the same. `sequence` is what stands for their state now.
    pub(super) fn begin(
        &mut self,
        job: &mut Job,
        sequence: Option<u64>,
        running: bool,
    ) -> SysResult<()> {
        self.begun = self.is_as_listed(sequence)? && !self.spans.is_empty();
        let Self { noted, spans, extents, guards, .. } = self;
        let sequence = sequence.filter(|_| self.begun);
        let knows = !running && noted.judge(self.pid, sequence, extents, guards, spans);
        if self.begun {
            let some = if knows && !self.checked { noted.parts() } else { spans };
            some.iter().for_each(|(start, end)| job.add(&self.pagemap, self.pid, *start, *end));
        }
        Ok(())
    }

    /// Keeps what a job has found although the stop has failed.
    pub(super) fn give_up(&mut self, job: &Job) {
        if std::mem::take(&mut self.begun) {
            // Whatever it says, all is looked at anew.
            let _ = job.collect(self.pid, &mut self.buffer, &mut self.regions);
            self.keep();
        }
    }

    /// Whether the mappings are those in `extents`. `sequence` was read before this is called.
    fn is_as_listed(&mut self, sequence: Option<u64>) -> SysResult<bool> {
        let known = sequence.is_some() && sequence == self.sequence && !self.extents.is_empty();
        if known && !self.checked {
            return Ok(true);
        }
        list(&mut self.glance, &self.procmap, &mut self.look)?;
        self.sequence = sequence;
        let same = self.look == self.extents;
        if known && !same {
            let object = format!("pid {}, whose mappings have changed unseen", self.pid);
            return Err(SysError::errno("a glance", object, libc::EIO));
        }
        Ok(same)
    }

    fn try_round(
        &mut self,
        pages: &mut PageSet,
        objects: &mut Objects,
        stopped: bool,
        job: Option<&Job>,
        sequence: Option<u64>,
    ) -> Result<bool, CaptureError> {
        self.regions.clear();
        self.regions.append(&mut self.carry);
        let carried = self.regions.len();
        let scanned = match job.filter(|_| std::mem::take(&mut self.begun)) {
            Some(job) => {
                let scan = job.collect(self.pid, &mut self.buffer, &mut self.regions)?;
                scan == Scan::Complete && self.scan_shared(objects)? == Scan::Complete
            }
            None => {
                self.is_as_listed(sequence)?
                    && !self.spans.is_empty()
                    && self.scan_shared(objects)? == Scan::Complete
                    && self.scan_spans()? == Scan::Complete
            }
        };
        if !scanned {
            self.relist(pages, objects, stopped)?;
        } else if self.noted.is_beginning() {
            let found = &self.regions[carried..];
            self.flushes += noted::flushes(found, &self.extents);
            self.found = found.iter().map(|r| (r.end - r.start) / PAGE as u64).sum();
        } else if stopped && self.scan_later()? == Scan::Complete && self.checked {
            self.check_notes(carried)?;
        }
        for region in &self.regions {
            self.guards.remove(region.start, region.end);
        }
        self.copy(pages, stopped)?;
        Ok(scanned)
    }

    /// Compares what a scan of all memory has found, behind what was `carried`, with what notes tell of.
    /// Pages that were never there may count as written again, and are zero (MADV_DONTNEED).
    fn check_notes(&mut self, carried: usize) -> SysResult<()> {
        let mut page = [0; PAGE];
        for region in self.noted.unexplained(&self.regions[carried..]) {
            for address in (region.start..region.end).step_by(PAGE) {
                if self.forced.read(address, &mut page).is_ok() && page.iter().any(|b| *b != 0) {
                    let what = format!("pid {}, {address:#x}, written but not noted", self.pid);
                    return Err(SysError::errno("a note of faults", what, libc::EIO));
                }
            }
        }
        Ok(())
    }

    /// Appends what was written in a range to the regions, see [`Pagemap::take_written`].
    fn take(&mut self, start: u64, end: u64, wanted: u64) -> SysResult<Scan> {
        self.pagemap.take_written(start, end, wanted, &mut self.buffer, &mut self.regions)
    }

    /// The same, written pages only, to a list of the caller's.
    fn take_into(&mut self, start: u64, end: u64, out: &mut Vec<Region>) -> SysResult<Scan> {
        self.pagemap.take_written(start, end, pagemap::WRITTEN, &mut self.buffer, out)
    }

    /// Takes what was written in the process's own memory since the round before.
    fn scan_spans(&mut self) -> SysResult<Scan> {
        for at in 0..self.spans.len() {
            let (start, end) = self.spans[at];
            let scan = self.take(start, end, pagemap::WRITTEN)?;
            if scan != Scan::Complete {
                return Ok(scan);
            }
        }
        Ok(Scan::Complete)
    }

    /// The same in a stop, of what calls in the process have written since its scan began.
    fn scan_later(&mut self) -> SysResult<Scan> {
        let Self { noted, spans, pagemap, buffer, regions, .. } = self;
        for (start, end) in noted.later(spans) {
            let scan = pagemap.take_written(*start, *end, pagemap::WRITTEN, buffer, regions)?;
            if scan != Scan::Complete {
                return Ok(scan);
            }
        }
        Ok(Scan::Complete)
    }

    /// After a stop, while the process runs: adds what it has not looked at.
    pub(super) fn add_rest(&mut self, job: &mut Job) {
        let Self { noted, spans, pagemap, pid, .. } = self;
        noted.rest(spans).iter().for_each(|(start, end)| job.add(pagemap, *pid, *start, *end));
    }

    /// What was found written there. None: it cannot be told.
    pub(super) fn see_rest(&mut self, job: &Job) -> Result<Option<Vec<Region>>, CaptureError> {
        let mut found = Vec::new();
        match job.collect(self.pid, &mut self.buffer, &mut found) {
            Ok(Scan::Complete) => Ok(Some(found)),
            Ok(_) => Ok(None),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Tells the objects what was written through mappings of this process.
    fn scan_shared(&mut self, objects: &mut Objects) -> SysResult<Scan> {
        let mut found = Vec::new();
        for at in 0..self.shared.len() {
            let Shared { start, end, id, offset } = self.shared[at];
            found.clear();
            let scan = self.take_into(start, end, &mut found)?;
            objects.written(id, start, offset, &found);
            found.iter().for_each(|r| self.guards.remove(r.start, r.end));
            if self.noted.is_beginning() {
                self.flushes += noted::flushes(&found, &self.extents);
            }
            if scan != Scan::Complete {
                return Ok(scan);
            }
        }
        Ok(Scan::Complete)
    }

    /// Gives mappings of objects the numbers of these.
    fn name_objects(&mut self, objects: &mut Objects, stopped: bool) -> Result<bool, CaptureError> {
        let mut complete = true;
        for vma in &mut self.vmas {
            let Some(object) = &vma.object else { continue };
            match objects.of_mapping(self.pid, vma, object) {
                Ok(number) => {
                    if let Source::Object { id, .. } = &mut vma.mapping.source {
                        *id = number;
                    }
                }
                Err(e) if e.is_gone() && !stopped => complete = false,
                Err(e) => return Err(e),
            }
        }
        Ok(complete)
    }

    /// Whether its mappings were all seen at a round. Before that, and after one that failed, it may have
    /// objects that [`AddressSpace::shared_objects`] does not tell.
    pub(super) fn is_listed(&self) -> bool {
        !self.extents.is_empty()
    }

    /// Objects whose pages may be written through mappings of this process.
    pub(super) fn shared_objects(&self) -> impl Iterator<Item = u32> {
        self.shared.iter().map(|s| s.id)
    }

    /// Reads the mappings and no pages, for a survey.
    pub(super) fn look(&mut self, objects: &mut Objects) -> Result<(), CaptureError> {
        self.vmas = maps::read(self.pid, objects.own_devices())?;
        self.name_objects(objects, true)?;
        Ok(())
    }

    /// Reads all mappings anew, registers those that are not, and takes their pages.
    fn relist(
        &mut self,
        pages: &mut PageSet,
        objects: &mut Objects,
        stopped: bool,
    ) -> Result<(), CaptureError> {
        self.changed = true;
        // It is known for a list that was read after it only.
        self.sequence = None;
        self.vmas = maps::read(self.pid, objects.own_devices())?;
        self.guards.keep_within(&self.vmas);
        let named = self.name_objects(objects, stopped)?;
        list(&mut self.glance, &self.procmap, &mut self.extents)?;
        let agreed = maps::agree(&self.vmas, &self.extents);
        let mut registered = false;
        self.spans.clear();
        let shared_before = std::mem::take(&mut self.shared);
        for at in 0..self.vmas.len() {
            let (start, end) = (self.vmas[at].mapping.start, self.vmas[at].mapping.end);
            if !self.vmas[at].is_trackable() {
                continue;
            }
            if let Some((id, offset)) = self.vmas[at].shared_object() {
                let shared = Shared { start, end, id, offset };
                registered = true;
                if self.list_shared(shared, objects)? {
                    self.shared.push(shared);
                }
                continue;
            }
            let before = self.regions.len();
            let mut scan = self.take(start, end, pagemap::WRITTEN)?;
            if scan != Scan::Complete {
                // Memory that is watched and memory that is not never share a mapping. If this is
                // none any more, a part of it may have been watched and just counted as clean:
                // what was found is kept, and the next look starts anew.
                let now = self.procmap.next(start)?;
                if now.is_none_or(|e| (e.start, e.end) != (start, end)) {
                    self.extents.clear();
                    continue;
                }
                self.regions.truncate(before);
                match uffd::register(self.uffd.as_fd(), start, end) {
                    Ok(()) => registered = true,
                    Err(e) if e.code() == libc::EPERM && self.vmas[at].is_shared_file() => continue,
                    // The mapping went away while the container runs: the next look shows it.
                    Err(e) if e.code() == libc::ENOMEM || e.code() == libc::EINVAL => {
                        self.extents.clear();
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                }
                scan = self.take_fresh(at, pages)?;
            }
            if scan != Scan::Complete {
                self.extents.clear();
                continue;
            }
            match self.spans.last_mut() {
                Some((_, last)) if *last == start => *last = end,
                _ => self.spans.push((start, end)),
            }
        }
        for gone in shared_before.iter().filter(|s| !self.shared.contains(s)) {
            objects.suspect(gone.id);
        }
        if registered && self.glance.is_some() && !self.extents.is_empty() {
            // From now on we watch them, and nothing else may be new about them.
            list(&mut self.glance, &self.procmap, &mut self.look)?;
            let place = |e: &Extent| Extent { watcher: 0, ..*e };
            match self.look.iter().map(place).eq(self.extents.iter().map(place)) {
                true => std::mem::swap(&mut self.look, &mut self.extents),
                false => self.extents.clear(),
            }
        }
        if !agreed || !named {
            // A thread changed its mappings between the two looks: the next look must not find
            // them as they were.
            self.extents.clear();
        }
        Ok(())
    }

    /// Watches a mapping of an object and tells the object what was written through it. Says
    /// whether the mapping is one to look at again.
    fn list_shared(&mut self, shared: Shared, objects: &mut Objects) -> SysResult<bool> {
        let Shared { start, end, id, offset } = shared;
        let mut found = Vec::new();
        let scan = self.take_into(start, end, &mut found)?;
        if scan == Scan::Complete {
            objects.written(id, start, offset, &found);
            found.iter().for_each(|r| self.guards.remove(r.start, r.end));
            return Ok(true);
        }
        // What was written while it was not watched is found by comparison, from now on.
        objects.suspect(id);
        // None can be made while it is watched, see `guards::refuse_stuck`.
        self.guards.remove(start, end);
        self.find_guards(start, end)?;
        self.fresh.push((start, end));
        cut_out(&mut self.regions, start, end);
        match uffd::register(self.uffd.as_fd(), start, end) {
            Ok(()) => {}
            // It cannot be written through.
            Err(e) if e.code() == libc::EPERM => return Ok(false),
            Err(e) if e.code() == libc::ENOMEM || e.code() == libc::EINVAL => {
                self.extents.clear();
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
        found.clear();
        let scan = self.take_into(start, end, &mut found)?;
        if scan != Scan::Complete {
            self.extents.clear();
        }
        Ok(scan == Scan::Complete)
    }

    /// Takes every page of a mapping that was just registered.
    fn take_fresh(&mut self, at: usize, pages: &mut PageSet) -> Result<Scan, CaptureError> {
        let Mapping { start, end, .. } = self.vmas[at].mapping;
        self.guards.remove(start, end);
        // One that was watched before (a watch that ended, see `Guards`) does not count as written.
        self.find_guards(start, end)?;
        self.fresh.push((start, end));
        cut_out(&mut self.regions, start, end);
        if !pages.runs.is_empty() {
            // What an earlier round took at this place belonged to another mapping.
            let count = ((end - start) / PAGE as u64) as u32;
            pages.runs.push(Run { process: self.mark, start, count, content: Content::Dropped });
        }
        let before = self.regions.len();
        let wanted = pagemap::WRITTEN
            | pagemap::PRESENT
            | pagemap::SWAPPED
            | pagemap::FILE
            | pagemap::PFNZERO;
        let scan = self.take(start, end, wanted)?;
        let private_file = matches!(
            self.vmas[at].mapping.source,
            Source::File { shared: false, .. } | Source::Object { shared: false, .. }
        );
        let mut kept = before;
        for i in before..self.regions.len() {
            let r = self.regions[i];
            let there = r.categories & (pagemap::PRESENT | pagemap::SWAPPED) != 0;
            let zero = r.categories & pagemap::PFNZERO != 0;
            let from_file = private_file && r.categories & pagemap::FILE != 0;
            if there && !zero && !from_file {
                self.regions[kept] = r;
                kept += 1;
            }
        }
        self.regions.truncate(kept);
        Ok(scan)
    }

    /// Looks for guard regions in a range, and keeps them in mind.
    fn find_guards(&mut self, start: u64, end: u64) -> SysResult<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        self.pagemap.guards(start, end, &mut found)?;
        found.iter().for_each(|(start, end)| self.guards.add(*start, *end));
        Ok(found)
    }

    /// The guard regions that the last round knows.
    pub(super) fn guards(&self) -> &Guards {
        &self.guards
    }

    /// The mappings for the checkpoint, those new since the last one marked fresh.
    pub(super) fn mappings(&self) -> Vec<Mapping> {
        let mut out = Vec::with_capacity(self.vmas.len() + self.fresh.len());
        for vma in &self.vmas {
            if !vma.is_part_of_image() {
                continue;
            }
            split_fresh(&vma.mapping, &self.fresh, &mut out);
        }
        out
    }

    /// The mappings are read anew in the next round, whatever they look like.
    pub(super) fn read_anew(&mut self) {
        self.extents.clear();
    }

    /// Whether a change of what was said of mappings is one of the mappings.
    pub(super) fn shows_flags(&self) -> bool {
        self.glance.is_some()
    }

    /// Whether the mappings changed since the last checkpoint.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    /// Whether the mappings changed since the last checkpoint, and forgets it.
    pub(super) fn finish(&mut self) -> bool {
        self.fresh.clear();
        std::mem::replace(&mut self.changed, false)
    }

    /// The mapping named `[vdso]`.
    pub(super) fn vdso(vmas: &[Vma]) -> Option<(u64, u64)> {
        use crate::image::VdsoPart;
        vmas.iter()
            .find(|v| v.mapping.source == Source::Vdso(VdsoPart::Vdso))
            .map(|v| (v.mapping.start, v.mapping.end))
    }

    /// The mappings as last read.
    pub(super) fn vmas(&self) -> &[Vma] {
        &self.vmas
    }
}

/// All mappings, in order of address.
fn list(
    glance: &mut Option<MappingGlance>,
    procmap: &ProcMap,
    out: &mut Vec<Extent>,
) -> SysResult<()> {
    match glance {
        Some(glance) => glance.list(out).map(drop),
        None => procmap.list(out),
    }
}

/// Removes what lies in `start..end` from the regions.
fn cut_out(regions: &mut Vec<Region>, start: u64, end: u64) {
    let mut behind = Vec::new();
    regions.retain_mut(|r| {
        if r.start < end && r.end > end {
            behind.push(Region { start: end.max(r.start), ..*r });
        }
        if r.end > start && r.start < end {
            r.end = start;
        }
        r.start < r.end
    });
    regions.append(&mut behind);
}

/// Cuts a mapping at the borders of the fresh ranges within it. A mapping of ours that grew is
/// old in one part and fresh in the other, although the kernel shows one.
fn split_fresh(mapping: &Mapping, fresh: &[(u64, u64)], out: &mut Vec<Mapping>) {
    let overlap = |(s, e): &&(u64, u64)| *s < mapping.end && *e > mapping.start;
    let mut cuts: Vec<u64> = fresh
        .iter()
        .filter(overlap)
        .flat_map(|(s, e)| [*s, *e])
        .filter(|c| *c > mapping.start && *c < mapping.end)
        .chain([mapping.end])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut start = mapping.start;
    for end in cuts {
        let is_fresh = fresh.iter().any(|(s, e)| *s <= start && *e >= end);
        let mut part = mapping.clone();
        part.start = start;
        part.end = end;
        part.fresh = is_fresh;
        part.source = mapping.source.behind(start - mapping.start);
        match out.last_mut() {
            // Neighbours cut from one mapping with the same mark are one.
            Some(last) if last.end == start && last.fresh == is_fresh && start > mapping.start => {
                last.end = end;
            }
            _ => out.push(part),
        }
        start = end;
    }
}

/// Drops from `runs` what lies outside the mappings of its process: memory that was there in a
/// round of pre-copy and was unmapped before the stop.
pub(super) fn clip(runs: &mut Vec<Run>, mark: i32, mappings: &[Mapping]) {
    let mut out = Vec::with_capacity(runs.len());
    for run in runs.drain(..) {
        if run.process != mark as u32 {
            out.push(run);
            continue;
        }
        let end = run.start + u64::from(run.count) * PAGE as u64;
        for m in mappings {
            let (s, e) = (run.start.max(m.start), end.min(m.end));
            if s >= e {
                continue;
            }
            let content = match run.content {
                Content::Data(at) => Content::Data(at + (s - run.start) as usize),
                Content::Dropped => Content::Dropped,
            };
            let count = ((e - s) / PAGE as u64) as u32;
            out.push(Run { process: run.process, start: s, count, content });
        }
    }
    *runs = out;
}

/// Whether an address range is our own scratch area.
pub(super) fn is_scratch(start: u64, end: u64) -> bool {
    start < SCRATCH + SCRATCH_LEN && end > SCRATCH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(start: u64, end: u64, fresh: bool) -> Mapping {
        Mapping { start, end, prot: 3, grows_down: false, source: Source::Anonymous, fresh }
    }

    #[test]
    fn a_grown_mapping_is_fresh_in_its_new_part_only() {
        let mut out = Vec::new();
        split_fresh(&anonymous(0x1000, 0x9000, false), &[(0x5000, 0x9000)], &mut out);
        assert_eq!(out, [anonymous(0x1000, 0x5000, false), anonymous(0x5000, 0x9000, true)]);
        out.clear();
        split_fresh(
            &anonymous(0x1000, 0x9000, false),
            &[(0x5000, 0x6000), (0x6000, 0x9000)],
            &mut out,
        );
        assert_eq!(out, [anonymous(0x1000, 0x5000, false), anonymous(0x5000, 0x9000, true)]);
        out.clear();
        split_fresh(&anonymous(0x1000, 0x2000, false), &[(0x1000, 0x2000)], &mut out);
        assert_eq!(out, [anonymous(0x1000, 0x2000, true)]);
    }

    #[test]
    fn regions_keep_what_lies_beside_a_cut() {
        let region = |start, end| Region { start, end, categories: 2 };
        let mut regions = vec![
            region(0, 2),
            region(1, 5),
            region(3, 4),
            region(2, 9),
            region(5, 7),
            region(7, 8),
        ];
        cut_out(&mut regions, 3, 6);
        let kept = [(0, 2), (1, 3), (2, 3), (7, 8), (6, 9), (6, 7)];
        assert_eq!(regions, kept.map(|(start, end)| region(start, end)));
    }

    #[test]
    fn runs_outside_the_mappings_are_clipped() {
        let run = |start, count, at| Run { process: 1, start, count, content: Content::Data(at) };
        let mut runs = vec![run(0x1000, 4, 0), run(0x8000, 1, 4 * PAGE)];
        clip(&mut runs, 1, &[anonymous(0x2000, 0x4000, false)]);
        assert_eq!(runs, [run(0x2000, 2, PAGE)]);
    }
}
