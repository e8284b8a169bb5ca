//! Taking a lab down, whatever there is of it.

use std::collections::HashSet;

use serde::Serialize;

use super::{Lab, LabError, state};
use crate::cgroup::Cgroup;
use crate::namespace::Namespace;
use crate::process;

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Destroyed {
    /// Processes killed.
    pub processes: usize,
    /// Namespaces removed.
    pub namespaces: usize,
    /// What could not be removed, and why. Empty if nothing is left.
    pub problems: Vec<String>,
}

impl Lab {
    /// Removes whatever there is of a lab: its processes, everything that runs in its namespaces,
    /// its control groups, its namespaces with all links, and what is written down about it. Goes
    /// on where something cannot be removed, and tells. A lab that is not there is no error.
    pub fn destroy(name: &str) -> Destroyed {
        let mut done = Destroyed::default();
        let lock = match state::Lock::take() {
            Ok(lock) => lock,
            Err(error) => {
                done.problems.push(error.to_string());
                return done;
            }
        };
        let namespaces = namespaces_of(name);
        let inodes: HashSet<u64> = namespaces
            .iter()
            .filter_map(|namespace| Some(Namespace::open(namespace).ok()?.inode()))
            .collect();
        let helpers = done.note(state::helpers(name)).unwrap_or_default();
        let cgroup = Cgroup::of(name, None);

        let killed = process::kill_all(|| {
            let mut all: Vec<_> = helpers.iter().map(|helper| helper.process).collect();
            all.extend(process::in_namespaces(&inodes));
            all.extend(cgroup.iter().flat_map(Cgroup::processes));
            all
        });
        done.processes = done.note(killed.map_err(LabError::from)).unwrap_or(0);
        if let Some(cgroup) = &cgroup {
            done.note(cgroup.remove().map_err(LabError::from));
        }
        for namespace in &namespaces {
            let deleted = Namespace::delete(namespace).map_err(LabError::from);
            done.namespaces += usize::from(done.note(deleted).is_some());
        }
        done.note(state::remove(name, &lock));
        tracing::info!(lab = name, ?done, "the lab is destroyed");
        done
    }
}

impl Destroyed {
    fn note<T>(&mut self, result: Result<T, LabError>) -> Option<T> {
        result.map_err(|error| self.problems.push(error.to_string())).ok()
    }
}

/// The namespaces whose names say that they belong to the lab. The lab `a` has no right to those
/// of the lab `a-b`, though they begin alike.
fn namespaces_of(lab: &str) -> Vec<String> {
    let mut names = Namespace::list(&Namespace::name_of(lab, ""));
    for other in state::labs() {
        if other.len() > lab.len() && other.starts_with(lab) {
            let prefix = Namespace::name_of(&other, "");
            names.retain(|name| !name.starts_with(&prefix));
        }
    }
    names
}
