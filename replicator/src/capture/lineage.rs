//! Places in the tree that no live process tells of: those that have ended and were not waited
//! for, and the numbers of sessions and groups that outlive their leaders.

use super::{CaptureError, process, tracer};
use crate::image::task::Ended;
use std::collections::{BTreeSet, HashMap};

/// Processes that have ended, by host pid, until their parents have waited for them. Only they
/// are looked at in a stop.
#[derive(Debug, Default)]
pub(super) struct Remains(BTreeSet<i32>);

impl Remains {
    /// A process has ended; its parent may not have waited for it yet.
    pub(super) fn add(&mut self, pid: i32) {
        self.0.insert(pid);
    }

    /// Looks for those among the children of these processes that ended before we came.
    pub(super) fn find(&mut self, processes: &[i32]) -> Result<(), CaptureError> {
        for &pid in processes {
            for tid in tracer::tids(pid)? {
                for child in children(pid, tid) {
                    if process::ended(child)?.is_some() {
                        self.0.insert(child);
                    }
                }
            }
        }
        Ok(())
    }

    /// Those that are still there, parents by the container's numbers. All threads are stopped.
    pub(super) fn capture(
        &mut self,
        inner_pids: &HashMap<i32, i32>,
    ) -> Result<Vec<Ended>, CaptureError> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let mut all = Vec::new();
        let mut gone = Vec::new();
        for &pid in &self.0 {
            match process::ended(pid)? {
                Some(mut ended) if !inner_pids.contains_key(&pid) => {
                    ended.ppid = *inner_pids
                        .get(&ended.ppid)
                        .ok_or(CaptureError::Transient("a process is changing its parent"))?;
                    all.push(ended);
                }
                _ => gone.push(pid),
            }
        }
        for pid in gone {
            self.0.remove(&pid);
        }
        Ok(all)
    }
}

/// Host pids of the children of a thread.
pub(super) fn children(pid: i32, tid: i32) -> Vec<i32> {
    let path = format!("/proc/{pid}/task/{tid}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|c| c.parse().ok()).collect()
}
