//! What epoll instances watch: files, although the program names numbers.
//!
//! An entry lives as long as its file. When the number that it was added under is closed, or is
//! another file's by now, and somebody has the file still, events of it come as before. Invariant: an
//! entry of a checkpoint is of the file that the kernel watches, never of what its number is now.

use super::CaptureError;
use super::fdinfo::Watched;
use super::files::Builder;
use super::numbered::{ByNumber, Few};
use crate::image::{EpollTarget, Kind, Process, State};
use crate::sys::pidfd;

impl Builder {
    /// Once all descriptors are known: finds the files of all entries. One that nobody has any more
    /// but we, for the time of the stop, goes.
    pub(super) fn name_watched(&self, state: &mut State) -> Result<(), CaptureError> {
        for (at, watched) in &self.watched {
            let holds = |p: &&Process| p.fds.iter().any(|f| f.description == *at);
            let Some(holder) = state.processes.iter().find(holds) else { continue };
            let Kind::Epoll(targets) = &state.descriptions[*at as usize].kind else { continue };
            // The index of an entry among those with its number.
            let mut nth = ByNumber::<i32, u32>::default();
            nth.reserve(targets.len());
            let (mut here, mut past) = (Vec::with_capacity(targets.len()), Vec::new());
            for (target, file) in targets.iter().zip(watched) {
                let count = nth.entry(target.fd).or_default();
                let now = holder.fds.binary_search_by_key(&target.fd, |f| f.number);
                let now = now.ok().map(|at| holder.fds[at].description);
                match self.description_of(*at, *file, target, *count, now)? {
                    Some(it) if now == Some(it) => here.push(*target),
                    Some(it) => past.push((*target, it)),
                    None => {}
                }
                *count += 1;
            }
            state.descriptions[*at as usize].kind = match past.is_empty() {
                true => Kind::Epoll(here),
                false => Kind::EpollPast { targets: here, past },
            };
        }
        Ok(())
    }

    /// The description of a file that the instance at `at` watches; `now` is what its number is.
    fn description_of(
        &self,
        at: u32,
        watched: Watched,
        target: &EpollTarget,
        nth: u32,
        now: Option<u32>,
    ) -> Result<Option<u32>, CaptureError> {
        if let Some(it) = self.by_file.get(&watched.file) {
            return Ok(Some(*it));
        }
        let Some(candidates) = self.by_inode.get(&watched.inode).map(Few::all) else {
            return Ok(None);
        };
        // The usual case, without a question to the kernel.
        if let [only] = candidates[..]
            && now == Some(only)
        {
            return Ok(now);
        }
        let (holder, instance) = self.first[at as usize];
        // Most often it is what its number says.
        let likely = now.filter(|it| candidates.contains(it));
        for it in likely.iter().chain(candidates) {
            let file = self.first[*it as usize];
            if pidfd::is_watched(file, (holder, instance), target.fd, nth)? {
                return Ok(Some(*it));
            }
        }
        Ok(None)
    }
}
