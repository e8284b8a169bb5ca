//! What a tree in the host's namespaces shares with processes outside of it. A pipe whose other
//! end is outside comes back with that end closed: it is refused where the program counts on it
//! (standard input, output, error), and told of elsewhere (what a launcher has leaked).

use super::refusals::Refusals;
use super::{CaptureError, process};
use crate::image::{Description, Kind, State};
use std::collections::BTreeMap;
use std::fs;

/// Standard input, output and error.
const STANDARD: std::ops::RangeInclusive<i32> = 0..=2;

/// Looks for pipes that processes outside hold as well. All threads of the tree are stopped.
/// Gives what will be cut off, in words.
pub(super) fn check(tree: &[i32], refusals: &mut Refusals) -> Result<Vec<String>, CaptureError> {
    let mut pipes: BTreeMap<String, Vec<(i32, i32)>> = BTreeMap::new();
    for &pid in tree {
        for (number, link) in links(pid) {
            if link.starts_with("pipe:[") {
                pipes.entry(link).or_default().push((pid, number));
            }
        }
    }
    let mut notes = Vec::new();
    if pipes.is_empty() {
        return Ok(notes);
    }
    for entry in fs::read_dir("/proc").map_err(|e| CaptureError::proc("/proc", e))?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if tree.contains(&pid) {
            continue;
        }
        let mine = links(pid);
        let shared = mine.iter().filter_map(|(_, link)| pipes.remove(link));
        for (holder, number) in shared.flatten() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let object = format!("descriptor {number} of pid {holder}");
            let what = format!(
                "a pipe that pid {pid} ({}) outside of the tree holds, too",
                name.trim_end()
            );
            if STANDARD.contains(&number) {
                let why = format!(
                    "{what}; start the program with its input and output from and to a file or \
                     /dev/null"
                );
                refusals.admit::<()>(Err(CaptureError::unsupported(object, why)))?;
            } else {
                notes.push(format!("{object} is {what}: a restore finds that end closed"));
            }
        }
    }
    Ok(notes)
}

/// Terminals that control processes of the tree and whose other end is outside, in words.
pub(super) fn terminals(tree: &[i32], state: &State) -> Result<Vec<String>, CaptureError> {
    let inside = |index: u32| {
        let is_it = |d: &Description| matches!(&d.kind, Kind::Terminal(t) if t.index == index);
        state.descriptions.iter().any(is_it)
    };
    let mut notes = Vec::new();
    for &pid in tree {
        match super::terminals::of_stat(process::read(pid, None)?.terminal) {
            Ok(None) => {}
            Ok(Some(index)) if inside(index) => {}
            _ => notes.push(format!(
                "the terminal that controls pid {pid} is outside of the tree: a restore finds none"
            )),
        }
    }
    Ok(notes)
}

/// Number and link of each descriptor; none of a process that is gone meanwhile.
fn links(pid: i32) -> Vec<(i32, String)> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let one = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()))
    };
    entries.flatten().filter_map(one).collect()
}
