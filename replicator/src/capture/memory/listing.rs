//! Mappings that are new, or others than they were: they are read anew, registered, and taken whole.

use super::cut::cut_out;
use super::{AddressSpace, Shared};
use crate::capture::CaptureError;
use crate::capture::glance::MappingGlance;
use crate::capture::maps;
use crate::capture::objects::Objects;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::image::{Mapping, Source};
use crate::sys::pagemap::{self, Scan};
use crate::sys::procmap::{Extent, ProcMap};
use crate::sys::{SysResult, uffd};
use std::os::fd::AsFd;

impl AddressSpace {
    /// Reads all mappings anew, registers those that are not, and takes their pages.
    pub(super) fn relist(
        &mut self,
        pages: &mut PageSet,
        objects: &mut Objects,
        stopped: bool,
    ) -> Result<(), CaptureError> {
        (self.changed, self.ready) = (true, None);
        // It is known for a list that was read after it only.
        self.sequence = None;
        let vmas = maps::read(self.pid, objects.systems())?;
        let vmas_before = std::mem::replace(&mut self.vmas, vmas);
        for vma in &mut self.vmas {
            if !vma.keep_home(&vmas_before) {
                vma.find_home(objects.systems());
            }
            vma.look_at_file(self.pid);
        }
        self.written_back.clear();
        self.written_back.extend(self.vmas.iter().filter_map(maps::Vma::written_back));
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
                self.vmas[at].find_home(objects.systems());
            }
            if scan == Scan::Complete && self.vmas[at].is_nameless_now(&vmas_before) {
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
    pub(super) fn find_guards(&mut self, start: u64, end: u64) -> SysResult<Vec<(u64, u64)>> {
        let mut found = Vec::new();
        self.pagemap.guards(start, end, &mut found)?;
        found.iter().for_each(|(start, end)| self.guards.add(*start, *end));
        Ok(found)
    }
}

/// All mappings, in order of address.
pub(super) fn list(
    glance: &mut Option<MappingGlance>,
    procmap: &ProcMap,
    out: &mut Vec<Extent>,
) -> SysResult<()> {
    match glance {
        Some(glance) => glance.list(out).map(drop),
        None => procmap.list(out),
    }
}
