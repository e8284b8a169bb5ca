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
mod cut;
mod listing;
mod noted;
mod scan;

pub(super) use cut::clip;
use cut::split_fresh;
use listing::list;
pub(super) use noted::Counts;
use noted::Noted;
pub(super) use scan::Job;

use super::guards::Guards;
use super::objects::Objects;
use super::{CaptureError, Glances, maps};
use crate::image::pages::{PAGE, PageSet};
use crate::image::{Mapping, Source};
use crate::sys::memory::{ForcedMemory, Range};
use crate::sys::pagemap::{self, Buffer, Pagemap, Region, Scan};
use crate::sys::procmap::{Extent, ProcMap};
use crate::sys::remote::{SCRATCH, SCRATCH_LEN};
use crate::sys::{SysError, SysResult, uffd};
use maps::{Mapped, Vma};
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
    /// Files of volumes that may be written through mappings, and are no objects.
    written_back: Vec<Mapped>,
    /// Ranges first seen since the last checkpoint.
    fresh: Vec<(u64, u64)>,
    /// Runs to copy again: they were marked clean but could not be read while running.
    carry: Vec<Region>,
    /// Room for those that are copied at a time.
    ranges: Vec<Range>,
    regions: Vec<Region>,
    guards: Guards,
    changed: bool,
    /// What a checkpoint says of them, unless they change.
    ready: Option<Arc<Vec<Mapping>>>,
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
            written_back: Vec::new(),
            fresh: Vec::new(),
            carry: Vec::new(),
            regions: Vec::new(),
            ranges: Vec::new(),
            guards: Guards::default(),
            changed: true,
            ready: None,
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
            Ok(true) if stopped => self.noted.taken(self.found, self.flushes),
            Ok(true) => self.noted.scanned(self.found, self.flushes),
            _ => self.noted.shut(),
        }
        if result.is_err() {
            objects.suspect_all();
            self.keep();
        }
        if !stopped {
            self.consider_notes();
        }
        result.map(drop)
    }

    /// Begins to note faults, or ends it, if its size has changed.
    pub(super) fn consider_notes(&mut self) {
        self.noted.consider(self.spans.iter().map(|(start, end)| end - start).sum());
    }

    /// Begins a round before a stop that looks around the notes since the last one, if these can be all: the
    /// scan is left to a job. A glance was taken after [`Noted::look_so_far`].
    pub(super) fn begin_around_notes(&mut self, job: &mut Job, sequence: Option<u64>) -> bool {
        self.begun = self.noted.is_same(sequence);
        if self.begun {
            let Self { noted, spans, pagemap, pid, .. } = self;
            noted
                .so_far(spans)
                .iter()
                .for_each(|(start, end)| job.add_to_copy(pagemap, *pid, *start, *end));
        }
        self.begun
    }

    /// The rest of such a round.
    pub(super) fn round_around_notes(
        &mut self,
        pages: &mut PageSet,
        job: &Job,
    ) -> Result<(), CaptureError> {
        let result = self.try_around_notes(pages, job);
        match &result {
            Ok(Scan::Complete) => {}
            Ok(_) => self.noted.shut(),
            Err(_) => {
                self.noted.shut();
                self.keep();
            }
        }
        result.map(drop)
    }

    fn try_around_notes(&mut self, pages: &mut PageSet, job: &Job) -> Result<Scan, CaptureError> {
        (self.flushes, self.begun) = (0, false);
        self.regions.clear();
        self.regions.append(&mut self.carry);
        let carried = self.regions.len();
        let whose = (self.pid, self.mark);
        let (scan, copied) =
            job.collect_copied(whose, &mut self.buffer, &mut self.regions, pages)?;
        self.count(carried);
        if scan == Scan::Complete {
            self.noted.looked_so_far(self.flushes);
        }
        for region in &self.regions {
            self.guards.remove(region.start, region.end);
        }
        self.regions.truncate(self.regions.len() - copied);
        self.copy(pages, false)?;
        Ok(scan)
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
        } else {
            self.count(carried);
        }
        let mut known = scanned;
        if scanned && stopped {
            let before = self.regions.len();
            known = self.scan_later()? == Scan::Complete;
            self.count(before);
            if known && self.checked {
                self.check_notes(carried)?;
            }
        }
        for region in &self.regions {
            self.guards.remove(region.start, region.end);
        }
        self.copy(pages, stopped)?;
        Ok(known)
    }

    /// Counts the regions from there on, which a scan has found.
    fn count(&mut self, from: usize) {
        let found = &self.regions[from..];
        if self.noted.has_notes() {
            self.flushes += noted::flushes(found, &self.extents);
        }
        self.found += found.iter().map(|r| (r.end - r.start) / PAGE as u64).sum::<u64>();
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

    /// Adds what the stop does not look at.
    pub(super) fn add_rest(&mut self, job: &mut Job) {
        let Self { noted, spans, pagemap, pid, .. } = self;
        noted.rest(spans).iter().for_each(|(start, end)| job.add(pagemap, *pid, *start, *end));
    }

    /// What was found written there. None: it cannot be told.
    pub(super) fn see_rest(&mut self, job: &Job) -> Result<Option<Vec<Region>>, CaptureError> {
        let mut found = Vec::new();
        match job.collect(self.pid, &mut self.buffer, &mut found) {
            Ok(Scan::Complete) => {
                self.noted.without_later(&mut found);
                Ok(Some(found))
            }
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
            if self.noted.has_notes() {
                self.flushes += noted::flushes(&found, &self.extents);
            }
            if scan != Scan::Complete {
                return Ok(scan);
            }
        }
        Ok(Scan::Complete)
    }

    /// Files of volumes that may be written through its mappings.
    pub(super) fn written_back(&self) -> &[Mapped] {
        &self.written_back
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
        self.vmas = maps::read(self.pid, objects.systems())?;
        for vma in &mut self.vmas {
            vma.find_home(objects.systems());
            vma.look_at_file(self.pid);
        }
        self.name_objects(objects, true)?;
        Ok(())
    }

    /// The guard regions that the last round knows.
    pub(super) fn guards(&self) -> &Guards {
        &self.guards
    }

    /// The mappings for the checkpoint, those new since the last one marked fresh.
    pub(super) fn take_mappings(&self) -> Arc<Vec<Mapping>> {
        match self.ready.clone().filter(|_| !self.changed) {
            Some(ready) => ready,
            None => Arc::new(self.mappings()),
        }
    }

    /// Before a stop: makes them ready, as they are if none is changed.
    pub(super) fn make_ready(&mut self) {
        if !self.changed && self.ready.is_none() {
            self.ready = Some(Arc::new(self.mappings()));
        }
    }

    fn mappings(&self) -> Vec<Mapping> {
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

    /// The checkpoint is whole: the mappings have not changed since then.
    pub(super) fn finish(&mut self) {
        let changed = std::mem::replace(&mut self.changed, false);
        if changed {
            self.fresh.clear();
            self.ready = None;
        }
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

/// Whether an address range is our own scratch area.
pub(super) fn is_scratch(start: u64, end: u64) -> bool {
    start < SCRATCH + SCRATCH_LEN && end > SCRATCH
}
