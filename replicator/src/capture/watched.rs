//! What epoll instances watch: files, although the program names numbers.
//!
//! An entry lives as long as its file. When the number that it was added under is closed, or is
//! another file's by now, and somebody has the file still, events of it come as before. Invariant: an
//! entry of a checkpoint is of the file that the kernel watches, never of what its number is now.

use super::CaptureError;
use super::fdinfo::Watched;
use super::files::Builder;
use super::numbered::{ByNumber, Few};
use crate::image::{EpollTarget, Fd, Kind, Process, State};
use crate::sys::pidfd;

impl Builder {
    /// Once all descriptors are known: finds the files of all entries. One that nobody has any more
    /// but we, for the time of the stop, goes.
    pub(super) fn name_watched(&self, state: &mut State) -> Result<(), CaptureError> {
        for (at, watched) in &self.watched {
            let holds = |p: &&Process| p.fds.iter().any(|f| f.description == *at);
            let Some(holder) = state.processes.iter().find(holds) else { continue };
            let Kind::Epoll(targets) = &state.descriptions[*at as usize].kind else { continue };
            // Nearly always all of them are what their numbers say.
            let is_here = |(target, file): (&EpollTarget, &Watched)| {
                let it = description_at(&holder.fds, target.fd);
                file.file != 0 && it.is_some_and(|it| self.files[it as usize] == file.file)
            };
            if targets.iter().zip(watched).all(is_here) {
                continue;
            }
            let mut numbers = Numbers { targets, nth: None };
            let (mut here, mut past) = (Vec::with_capacity(targets.len()), Vec::new());
            for (i, (target, file)) in targets.iter().zip(watched).enumerate() {
                let now = description_at(&holder.fds, target.fd);
                match self.description_of(*at, *file, target, || numbers.nth(i), now)? {
                    Some(it) if now == Some(it) => here.push(*target),
                    Some(it) => past.push((*target, it)),
                    None => {}
                }
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
        nth: impl FnOnce() -> u32,
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
        let nth = nth();
        for it in likely.iter().chain(candidates) {
            let file = self.first[*it as usize];
            if pidfd::is_watched(file, (holder, instance), target.fd, nth)? {
                return Ok(Some(*it));
            }
        }
        Ok(None)
    }
}

/// The index of each entry among those with its number, counted when the first is asked for.
struct Numbers<'a> {
    targets: &'a [EpollTarget],
    nth: Option<Vec<u32>>,
}

impl Numbers<'_> {
    fn nth(&mut self, of: usize) -> u32 {
        let count = || {
            let mut counts = ByNumber::<i32, u32>::default();
            counts.reserve(self.targets.len());
            let next = |target: &EpollTarget| {
                let count = counts.entry(target.fd).or_default();
                *count += 1;
                *count - 1
            };
            self.targets.iter().map(next).collect()
        };
        self.nth.get_or_insert_with(count)[of]
    }
}

/// The description at a number. Descriptors are in order, mostly without a hole, so it is looked for
/// where it would be then.
fn description_at(fds: &[Fd], number: i32) -> Option<u32> {
    let at = usize::try_from(number).ok()?.min(fds.len().checked_sub(1)?);
    let behind = fds[at].number.checked_sub(number)?;
    let found = match usize::try_from(behind) {
        Ok(0) => return Some(fds[at].description),
        // As many numbers are missing at most.
        Ok(holes) => {
            let from = at.saturating_sub(holes);
            let found = fds[from..at].binary_search_by_key(&number, |fd| fd.number);
            found.map(|found| from + found)
        }
        Err(_) => return None,
    };
    found.ok().map(|found| fds[found].description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_found_with_holes_between_them() {
        let numbers = [vec![], vec![5], vec![0, 1, 2], vec![0, 1, 4, 5, 9], vec![3, 70, 71, 900]];
        for numbers in numbers {
            let fd = |number: &i32| Fd {
                number: *number,
                description: *number as u32 * 2,
                close_on_exec: false,
            };
            let fds: Vec<Fd> = numbers.iter().map(fd).collect();
            for number in -1..1000 {
                let there = numbers.contains(&number).then_some(number as u32 * 2);
                assert_eq!(description_at(&fds, number), there, "{number} of {numbers:?}");
            }
        }
    }
}
