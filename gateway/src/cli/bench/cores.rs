//! Who runs where, and how much processor time each takes.
//!
//! A container that shares its core with its clients and the agents is slowed down by them, not
//! by its protection: so it gets the first core for itself, and all else the others.

use std::fs;

use anyhow::{Context, Result};
use netns_tools::lab::Lab;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, SysconfVar, sysconf};
use replicator::container::members;
use serde::Serialize;

use super::super::view::LabView;
use crate::agent::monotonic_us;

/// The cores of the container and of everything else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Cores {
    pub(super) container: usize,
    pub(super) others: Vec<usize>,
}

impl Cores {
    /// Gives this process, and all that it will start, the cores after the first. None if it has
    /// only one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn split() -> Result<Option<Self>> {
        let mine = sched_getaffinity(Pid::from_raw(0)).context("which cores are there?")?;
        let mut all = (0..CpuSet::count()).filter(|core| mine.is_set(*core).unwrap_or(false));
        let container = all.next().context("there is no core to run on")?;
        let others: Vec<usize> = all.collect();
        if others.is_empty() {
            return Ok(None);
        }
        pin(0, &others)?;
        Ok(Some(Self { container, others }))
    }

    /// Gives every container of a lab, where it runs, its core. Threads that it makes later stay
    /// there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn pin(&self, view: &LabView) -> Result<()> {
        for container in &view.containers {
            let Some(host) = &container.primary else { continue };
            let parts = view.parts(&container.name).filter(|(at, _)| at == host);
            for pid in parts.filter_map(|(_, part)| part.pid) {
                for thread in threads(pid) {
                    // One that ended meanwhile needs no core.
                    let alive = || fs::metadata(format!("/proc/{thread}")).is_ok();
                    pin(thread, &[self.container])
                        .or_else(|e| if alive() { Err(e) } else { Ok(()) })?;
                }
            }
        }
        Ok(())
    }
}

fn pin(thread: i32, cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    sched_setaffinity(Pid::from_raw(thread), &set).context("cannot choose the cores")
}

fn threads(root: i32) -> Vec<i32> {
    let mut all = Vec::new();
    members(root, &mut all);
    all
}

/// Processor time, in seconds; between two moments, in seconds a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Usage {
    /// The containers, where they run.
    pub(super) container: f64,
    /// The agents of the hosts that run them.
    pub(super) primary: f64,
    /// The agents of their backups.
    pub(super) backup: f64,
    /// When, in seconds.
    #[serde(skip)]
    pub(super) at: f64,
}

impl Usage {
    /// Of a lab, so far.
    pub(super) fn of(lab: &Lab) -> Self {
        let view = LabView::ask(lab);
        let mut usage = Self { at: monotonic_us() as f64 / 1e6, ..Self::default() };
        for container in &view.containers {
            let parts = view.parts(&container.name);
            let pid = parts
                .filter(|(host, _)| Some(*host) == container.primary.as_deref())
                .find_map(|(_, part)| part.pid);
            usage.container += pid.map_or(0.0, tree_seconds);
        }
        for node in &view.nodes {
            let seconds = node.agent_pid.map_or(0.0, |pid| process_seconds(pid as i32));
            let is = |host: &Option<String>| host.as_deref() == Some(node.name.as_str());
            if view.containers.iter().any(|container| is(&container.primary)) {
                usage.primary += seconds;
            } else if view.containers.iter().any(|container| is(&container.backup)) {
                usage.backup += seconds;
            }
        }
        usage
    }

    /// What was used a second since then.
    pub(super) fn since(&self, before: &Self) -> Self {
        let span = (self.at - before.at).max(1e-9);
        let part = |now: f64, then: f64| (now - then).max(0.0) / span;
        Self {
            container: part(self.container, before.container),
            primary: part(self.primary, before.primary),
            backup: part(self.backup, before.backup),
            at: self.at,
        }
    }
}

fn tree_seconds(root: i32) -> f64 {
    threads(root).into_iter().filter(|tid| is_leader(*tid)).map(process_seconds).sum()
}

fn is_leader(thread: i32) -> bool {
    fs::read_to_string(format!("/proc/{thread}/status"))
        .is_ok_and(|status| status.contains(&format!("Tgid:\t{thread}\n")))
}

/// User and system time of all threads of a process, proc_pid_stat(5).
fn process_seconds(pid: i32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    ticks(&stat).unwrap_or(0) as f64 / ticks_a_second()
}

/// Fields 14 and 15. The second may contain spaces and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn ticks_a_second() -> f64 {
    match sysconf(SysconfVar::CLK_TCK) {
        Ok(Some(ticks)) if ticks > 0 => ticks as f64,
        _ => 100.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_an_odd_name_is_read_like_any_other() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 120 34 0 0 20 0 1 0 5 1 2";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn work_takes_time() {
        let me = std::process::id() as i32;
        let before = process_seconds(me);
        let mut sum = 0_u64;
        while process_seconds(me) <= before {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(1));
        }
        assert!(threads(me).contains(&me) && tree_seconds(me) > before);
    }

    #[test]
    fn usage_is_told_by_the_second() {
        let then = Usage { container: 1.0, primary: 2.0, backup: 0.5, at: 10.0 };
        let now = Usage { container: 3.0, primary: 2.5, backup: 0.5, at: 14.0 };
        let used = now.since(&then);
        assert_eq!((used.container, used.primary, used.backup), (0.5, 0.125, 0.0));
    }
}
