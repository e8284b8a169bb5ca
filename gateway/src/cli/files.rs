//! The files of a run's replicated volumes, judged when its load is over: while everything is
//! protected both hosts must have the same; and when the lab is gone, what the next failover would
//! have gone on from must be whole to the program that knows it (a volume's `check`).
//!
//! Invariant: a check sees a copy, so that it may write; and the copy is that of a whole checkpoint.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_tools::topology::Topology;
use replicator::volume::{UPPER, Volumes};
use serde::Serialize;

use super::signals;
use super::view::LabView;
use super::volume::{Named, place, replicated, settled};

/// For how long differences may be those of an epoch on its way, or of work that the container does
/// without being asked, such as to save all it has.
const SETTLED: Duration = Duration::from_secs(30);
/// How long a check may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two looks at one.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of what a check has said that are told.
const TOLD: usize = 600;

/// What the files of a run were found to be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct FilesReport {
    /// Volumes whose files were compared between the hosts.
    pub(super) compared: usize,
    /// Volumes whose files were judged by their check.
    pub(super) checked: usize,
    /// What was not as it should be.
    pub(super) wrong: Vec<String>,
}

impl FilesReport {
    /// Compares the files of all containers that are protected; none if there are no volumes.
    pub(super) fn compare(topology: &Topology, view: &LabView) -> Option<Self> {
        let mut all = replicated(topology).peekable();
        all.peek()?;
        let mut found = Self::default();
        for volume in all {
            let container = view.container(volume.container).filter(|c| c.protected);
            let hosts = container.and_then(|c| c.primary.as_deref().zip(c.backup.as_deref()));
            let Some((here, there)) = hosts else { continue };
            let places = [here, there].map(|host| place(topology, host, &volume));
            let wrong =
                settled(&places[0], &places[1], SETTLED).unwrap_or_else(|e| Some(e.to_string()));
            let Named { container, path, .. } = volume;
            found.wrong.extend(wrong.map(|what| {
                format!("the files of {container} in {path} differ on {here} and {there}: {what}")
            }));
            found.compared += 1;
        }
        Some(found)
    }

    /// Has all files judged. The lab must be gone.
    pub(super) fn check(&mut self, topology: &Topology, view: &LabView) -> Result<()> {
        for volume in replicated(topology) {
            let Some(check) = volume.check else { continue };
            let Some(container) = view.container(volume.container) else { continue };
            // The backup's are whole, as a failover would find them; without one the only ones.
            let backup = container.backup.as_deref().filter(|_| container.protected);
            let Some(host) = backup.or(container.primary.as_deref()) else { continue };
            let Named { container, path, .. } = &volume;
            let judged = judge(topology, host, &volume, check);
            let judged =
                judged.with_context(|| format!("check the files of {container} in {path}"));
            self.wrong.extend(judged?.map(|why| {
                format!("the files of {container} in {path} on {host} are not whole: {why}")
            }));
            self.checked += 1;
        }
        Ok(())
    }
}

/// A directory that goes with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("nilicon: {} is not gone: {error}", self.0.display());
        }
    }
}

/// What a check says against the files that a host has; none if they are whole.
fn judge(
    topology: &Topology,
    host: &str,
    volume: &Named<'_>,
    check: &str,
) -> Result<Option<String>> {
    let at = place(topology, host, volume);
    let base = at.parent().context("the directory of volumes has no name")?;
    let container = &topology.containers[volume.container];
    let names = replicated(topology).filter(|v| v.container == volume.container).map(|v| v.name);
    // What was acknowledged and is only in a journal is carried out.
    let durable = container.volumes.iter().any(|v| v.durable == Some(true));
    drop(Volumes::open(base, &names.collect::<Vec<_>>(), durable)?);
    let name = format!("nilicon-check-{}-{}", std::process::id(), volume.name);
    let scratch = Scratch(std::env::temp_dir().join(name));
    std::fs::create_dir(&scratch.0)
        .with_context(|| format!("make the directory {}", scratch.0.display()))?;
    // Whoever the files belong to must get there.
    let copy = scratch.0.join("files");
    let done = Command::new("cp").arg("-a").args([&at.join("tree"), &copy]).status();
    let done = done.context("run cp")?;
    ensure!(done.success(), "cp -a {} ended with {done}", at.join("tree").display());
    // Of a root: what was written, by the paths that it had.
    let inside = if volume.path == "/" { copy.join(UPPER) } else { copy };
    let (status, said) = run(check, &inside, &container.workdir, &scratch.0.join("said"))?;
    let said = said.trim().replace('\n', " | ");
    Ok((!status.success()).then(|| format!("`{check}` ended with {status}: {said}")))
}

/// Runs a line of shell, and gives the end of what it has said.
fn run(check: &str, at: &Path, workdir: &str, said: &Path) -> Result<(ExitStatus, String)> {
    let mut out = File::options().read(true).write(true).create_new(true).open(said)?;
    let mut child = Command::new("sh")
        .args(["-c", check])
        .current_dir(at)
        .env("WORKDIR", workdir)
        .stdin(std::process::Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out.try_clone()?)
        .spawn()
        .context("run sh")?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let stopped = signals::check();
        if stopped.is_err() || begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            stopped?;
            bail!("`{check}` has not ended after {PATIENCE:?}");
        }
        std::thread::sleep(LOOK);
    };
    let len = out.seek(SeekFrom::End(0))?;
    out.seek(SeekFrom::Start(len.saturating_sub(TOLD as u64)))?;
    let mut bytes = Vec::new();
    out.read_to_end(&mut bytes)?;
    Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_runs_among_the_files_and_is_told_of() {
        let at =
            Scratch(std::env::temp_dir().join(format!("nilicon-files-{}", std::process::id())));
        std::fs::create_dir(&at.0).unwrap();
        std::fs::write(at.0.join("data"), "x").unwrap();
        let told =
            |line: &str, name: &str| run(line, &at.0, "/work/dir", &at.0.join(name)).unwrap();
        let (status, said) = told("cat data; echo \" $WORKDIR\" >&2; exit 3", "one");
        assert_eq!((status.code(), &said[..]), (Some(3), "x /work/dir\n"));
        assert!(told("test -f data", "two").0.success());
        let (_, said) = told("seq 1000", "three");
        assert!(said.ends_with("999\n1000\n") && said.len() <= TOLD, "{said}");
    }
}
