//! Processes by number and start time, so that a number that has been given to another process
//! since is never taken for the old one.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How long killed processes may take to go. A process ends as soon as the kernel lets go of what
/// it was doing.
const PATIENCE: Duration = Duration::from_secs(10);

/// Processes that would not end.
#[derive(Debug, thiserror::Error)]
#[error("processes {pids:?} are still there {PATIENCE:?} after SIGKILL (see /proc/PID/stack)")]
pub struct StillThere {
    /// Their numbers.
    pub pids: Vec<i32>,
}

/// One process, told apart from all others that have had or will have its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this number now, unless all its threads have ended and it only waits to
    /// be reaped.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may contain anything, even parentheses: the fields begin after the last one.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let start_time = fields.nth(18)?.parse().ok()?;
        let ended = matches!(state, "Z" | "X") && threads_of(pid).all(|thread| thread == pid);
        (!ended).then_some(Self { pid, start_time })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, if it still runs.
    pub fn signal(self, signal: Signal) {
        if self.is_alive() {
            // It may end at this moment, which is as good.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// The processes whose network namespace has one of these inodes.
pub fn in_namespaces(inodes: &HashSet<u64>) -> Vec<ProcessId> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| namespace_of(*pid).is_some_and(|inode| inodes.contains(&inode)))
        .filter_map(ProcessId::of)
        .collect()
}

/// The inode of the network namespace of a process.
pub fn namespace_of(pid: i32) -> Option<u64> {
    let inode = |path| fs::metadata(path).ok().map(|metadata| metadata.ino());
    inode(format!("/proc/{pid}/ns/net")).or_else(|| {
        // The first thread may have ended before the others.
        threads_of(pid).find_map(|thread| inode(format!("/proc/{pid}/task/{thread}/ns/net")))
    })
}

fn threads_of(pid: i32) -> impl Iterator<Item = i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Kills what `find` finds until it finds nothing, as a process may have started another before
/// it was killed. Never kills the calling process. Returns how many were killed.
///
/// # Errors
/// Some would not end.
pub fn kill_all(find: impl Fn() -> Vec<ProcessId>) -> Result<usize, StillThere> {
    let own = std::process::id() as i32;
    let deadline = Instant::now() + PATIENCE;
    let mut killed = HashSet::new();
    loop {
        let mut found = find();
        found.retain(|process| process.pid != own && process.is_alive());
        if found.is_empty() {
            return Ok(killed.len());
        }
        if Instant::now() > deadline {
            return Err(StillThere { pids: found.iter().map(|process| process.pid).collect() });
        }
        for process in found {
            if killed.insert(process) {
                process.signal(Signal::SIGKILL);
            }
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_killed_process_is_told_from_a_living_one() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessId::of(child.id() as i32).unwrap();
        assert!(process.is_alive());
        let later = ProcessId { start_time: process.start_time + 1, ..process };
        assert!(!later.is_alive(), "another process with the same number");
        later.signal(Signal::SIGKILL);
        assert!(process.is_alive());
        assert_eq!(kill_all(|| vec![process]).unwrap(), 1);
        assert!(!process.is_alive(), "dead, though not reaped yet");
        child.wait().unwrap();
    }

    #[test]
    fn the_caller_is_never_killed() {
        let own = ProcessId::of(std::process::id() as i32).unwrap();
        assert_eq!(kill_all(|| vec![own]).unwrap(), 0);
        let inode = namespace_of(own.pid).unwrap();
        assert!(in_namespaces(&HashSet::from([inode])).contains(&own));
    }
}
