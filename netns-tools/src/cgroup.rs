//! Control groups of containers: the way to find every process of a container, whatever it
//! started.
//!
//! A group is `nilicon/LAB/HOST/CONTAINER` in the unified hierarchy, at `/sys/fs/cgroup` or, on
//! systems that mix both kinds, at `/sys/fs/cgroup/unified`; on systems without that, in the
//! freezer hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::{self, ProcessId, StillThere};

/// How long a group may stay busy after its processes have ended, and how often to look.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(1);

/// What failed on which group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no hierarchy to make groups in.
    #[error("no cgroup hierarchy under /sys/fs/cgroup (is it mounted?)")]
    NoHierarchy,
    /// The system refused.
    #[error("cannot {action} the cgroup {}: {source}", path.display())]
    Refused {
        /// What was to be done.
        action: &'static str,
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Processes of the group would not end.
    #[error("the cgroup {} is not empty: {source}", path.display())]
    Busy {
        /// The group.
        path: PathBuf,
        /// Which processes.
        source: StillThere,
    },
}

/// A control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group of a container on a host of a lab; makes it if need be.
    ///
    /// # Errors
    /// There is no hierarchy, or it is not writable.
    pub fn create(lab: &str, host: &str, container: &str) -> Result<Self, CgroupError> {
        let root = root().ok_or(CgroupError::NoHierarchy)?;
        let path = root.join("nilicon").join(lab).join(host).join(container);
        fs::create_dir_all(&path).map_err(|source| CgroupError::Refused {
            action: "make",
            path: path.clone(),
            source,
        })?;
        Ok(Self { path })
    }

    /// The group that holds all groups of a lab, or of a host of it; it need not exist.
    pub fn of(lab: &str, host: Option<&str>) -> Option<Self> {
        let path = root()?.join("nilicon").join(lab);
        Some(Self { path: host.map_or_else(|| path.clone(), |host| path.join(host)) })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts a process, and what it starts from now on, into the group.
    ///
    /// # Errors
    /// There is no such process.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).map_err(|source| {
            CgroupError::Refused { action: "add a process to", path: self.path.clone(), source }
        })
    }

    /// The processes in the group and in the groups below it.
    pub fn processes(&self) -> Vec<ProcessId> {
        let mut found = Vec::new();
        for group in self.with_descendants() {
            let list = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(list.lines().filter_map(|pid| ProcessId::of(pid.parse().ok()?)));
        }
        found
    }

    /// Kills all processes in the group and below it. Returns how many.
    ///
    /// # Errors
    /// Some would not end.
    pub fn kill(&self) -> Result<usize, CgroupError> {
        process::kill_all(|| self.processes())
            .map_err(|source| CgroupError::Busy { path: self.path.clone(), source })
    }

    /// Removes the group and those below it; the processes in them must have ended. That there is
    /// no such group is no error.
    ///
    /// A process that counts as dead, its first thread being a zombie, keeps its group busy until
    /// its last thread has gone: this waits for it.
    ///
    /// # Errors
    /// A group is in use.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + PATIENCE;
        for path in self.with_descendants() {
            loop {
                match fs::remove_dir(&path) {
                    Ok(()) => break,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    Err(e)
                        if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
                    {
                        std::thread::sleep(PAUSE);
                    }
                    Err(source) => {
                        return Err(CgroupError::Refused { action: "remove", path, source });
                    }
                }
            }
        }
        Ok(())
    }

    /// The directories of the group and those below it, each after those below it.
    fn with_descendants(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        let mut open = vec![self.path.clone()];
        while let Some(path) = open.pop() {
            if let Ok(entries) = fs::read_dir(&path) {
                let below = entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
                open.extend(below.map(|entry| entry.path()));
                all.push(path);
            }
        }
        all.reverse();
        all
    }
}

/// The hierarchy to make groups in.
fn root() -> Option<PathBuf> {
    let unified = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.controllers").exists());
    let root = unified.or_else(|| {
        let freezer = "/sys/fs/cgroup/freezer";
        Path::new(freezer).join("cgroup.procs").exists().then_some(freezer)
    });
    root.map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    struct Removed(Cgroup);

    impl Drop for Removed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.remove();
        }
    }

    #[test]
    fn a_group_goes_when_its_last_process_does() {
        let lab = format!("t-cg-last-{}", std::process::id());
        let group = Cgroup::create(&lab, "alpha", "redis").unwrap();
        let whole = Removed(Cgroup::of(&lab, None).unwrap());
        let mut child = Command::new("sleep").arg("0.2").spawn().unwrap();
        group.add(child.id() as i32).unwrap();
        whole.0.remove().unwrap();
        assert!(!whole.0.path().exists());
        child.wait().unwrap();
    }

    #[test]
    fn a_group_finds_and_ends_all_its_processes() {
        let lab = format!("t-cg-{}", std::process::id());
        let group = Cgroup::create(&lab, "alpha", "redis").unwrap();
        let whole = Removed(Cgroup::of(&lab, None).unwrap());
        let script = "read go; sleep 1000 & sleep 1000";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        group.add(child.id() as i32).unwrap();
        drop(child.stdin.take());
        while group.processes().len() < 3 {
            assert!(child.try_wait().unwrap().is_none(), "the script ended");
            std::thread::yield_now();
        }
        assert!(whole.0.kill().unwrap() >= 3);
        assert!(group.processes().is_empty());
        child.wait().unwrap();
        whole.0.remove().unwrap();
        assert!(!whole.0.path().exists());
        whole.0.remove().unwrap();
    }
}
