//! What is written down about deployed labs, in `/run/nilicon/LAB`: a copy of the topology, and
//! the processes that belong to the lab. It is gone after a restart of the machine, as the lab is.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::LabError;
use crate::process::ProcessId;
use crate::topology::{Impair, Topology};

const ROOT: &str = "/run/nilicon";
const TOPOLOGY: &str = "topology.json";
const PROCESSES: &str = "pids.json";

/// A process that belongs to a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Helper {
    /// What it is called, such as `agent-alpha`; a lab has one process of a name.
    pub name: String,
    /// Which process it is.
    #[serde(flatten)]
    pub process: ProcessId,
}

/// The directory of a lab.
pub(super) fn directory(lab: &str) -> PathBuf {
    Path::new(ROOT).join(lab)
}

/// The names of all labs that something is written down about, sorted.
pub(super) fn labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir(ROOT) else { return Vec::new() };
    let dirs = entries.flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> =
        dirs.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> LabError {
    let path = path.to_owned();
    move |source| LabError::State { path, source }
}

/// Keeps every other deploying, destroying and registering process waiting while it lives.
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn take() -> Result<Self, LabError> {
        let path = Path::new(ROOT).join("lock");
        let take = || {
            fs::create_dir_all(ROOT)?;
            let file = File::create(&path)?;
            file.lock()?;
            Ok(Self { _file: file })
        };
        take().map_err(failed(&path))
    }
}

/// Writes a file so that it is there whole or not at all.
fn write(path: &Path, text: &str) -> Result<(), LabError> {
    let next = path.with_extension("new");
    let write = || {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&next, text)?;
        fs::rename(&next, path)
    };
    write().map_err(failed(path))
}

/// The copy of a lab's topology; none if the lab is not deployed.
pub(super) fn topology(lab: &str) -> Result<Option<Topology>, LabError> {
    let path = directory(lab).join(TOPOLOGY);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(Topology::parse(&path.display().to_string(), &text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(&path)(error)),
    }
}

pub(super) fn write_topology(topology: &Topology) -> Result<(), LabError> {
    let path = directory(&topology.name).join(TOPOLOGY);
    let text = serde_json::to_string_pretty(topology).map_err(io::Error::from);
    write(&path, &text.map_err(failed(&path))?)
}

/// The processes of a lab, dead ones too.
pub(super) fn helpers(lab: &str) -> Result<Vec<Helper>, LabError> {
    let path = directory(lab).join(PROCESSES);
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(io::Error::from).map_err(failed(&path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(&path)(error)),
    }
}

/// Adds a process, in the place of an earlier one of the same name. The caller holds the lock.
pub(super) fn add_helper(lab: &str, helper: Helper, _: &Lock) -> Result<(), LabError> {
    let mut all = helpers(lab)?;
    all.retain(|known| known.name != helper.name && known.process.is_alive());
    all.push(helper);
    let path = directory(lab).join(PROCESSES);
    let text = serde_json::to_string_pretty(&all).map_err(io::Error::from);
    write(&path, &text.map_err(failed(&path))?)
}

/// What an impaired link does to frames in each direction, where that is not as the topology says.
pub(super) fn weather(lab: &str, link: usize) -> Result<Option<[Impair; 2]>, LabError> {
    let path = directory(lab).join(format!("link-{link}.json"));
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(io::Error::from).map_err(failed(&path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(&path)(error)),
    }
}

pub(super) fn write_weather(lab: &str, link: usize, weather: &[Impair; 2]) -> Result<(), LabError> {
    let path = directory(lab).join(format!("link-{link}.json"));
    let text = serde_json::to_string_pretty(weather).map_err(io::Error::from);
    write(&path, &text.map_err(failed(&path))?)
}

/// Forgets a lab.
pub(super) fn remove(lab: &str, _: &Lock) -> Result<(), LabError> {
    let path = directory(lab);
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&path)(error)),
        _ => Ok(()),
    }
}
