//! What a tree in the host's namespaces shares with processes outside of it. A pipe whose other
//! end is outside comes back with that end closed: it is refused where the program counts on it
//! (standard input, output, error), and told of elsewhere (what a launcher has leaked).

use super::refusals::Refusals;
use super::{CaptureError, process};
use crate::image::{Description, Kind, State};
use crate::sys::namespace::{in_network_of, is_ours};
use crate::sys::route::RouteWatch;
use std::collections::{BTreeMap, BTreeSet};
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

/// Mounts of the tree's own namespace that are no part of an image, in words: all that the host has
/// not, but for /proc and each tmpfs, which a restore makes.
pub(super) fn mounts(root: i32) -> Result<Vec<String>, CaptureError> {
    if is_ours(root, "mnt")? {
        return Ok(Vec::new());
    }
    let read = |path: &str| fs::read_to_string(path).map_err(|e| CaptureError::proc(path, e));
    let theirs = read(&format!("/proc/{root}/mountinfo"))?;
    Ok(mounts_left_out(&theirs, &read("/proc/thread-self/mountinfo")?))
}

/// By the mountinfo of the tree and of its host, see proc_pid_mountinfo(5).
fn mounts_left_out(theirs: &str, ours: &str) -> Vec<String> {
    // Device, root, mount point and type.
    let parts = |line: &str| -> Option<[String; 4]> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2).map(str::to_owned);
        Some([left.next()?, left.next()?, left.next()?, right.split(' ').next()?.to_owned()])
    };
    let known: BTreeSet<_> = ours.lines().filter_map(parts).collect();
    let is_left_out = |mount: &[String; 4]| {
        let [_, inside, point, kind] = mount;
        let is_made = (kind == "tmpfs" && inside == "/") || (kind == "proc" && point == "/proc");
        !is_made && !known.contains(mount)
    };
    theirs
        .lines()
        .filter_map(parts)
        .filter(is_left_out)
        .map(|[_, _, point, kind]| {
            format!(
                "the mount at {point} ({kind}) is no part of an image: a restore finds there what its host has"
            )
        })
        .collect()
}

/// What of the tree's own network is no part of an image, in words.
pub(super) fn network(root: i32) -> Result<Vec<String>, CaptureError> {
    if is_ours(root, "net")? {
        return Ok(Vec::new());
    }
    let mut settings = in_network_of(root, RouteWatch::open)??.settings()?;
    // What every new network has.
    settings.retain(|s| s != "device lo" && !s.starts_with("rule with priority"));
    let all: Vec<_> = settings.into_iter().collect();
    Ok(match all.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "its network ({}) is no part of an image: a restore into a new one finds nothing but lo",
            all.join(", ")
        )],
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_only_the_tree_has_are_told() {
        let line = |id: u32, device: &str, root: &str, point: &str, kind: &str| {
            format!("{id} 1 {device} {root} {point} rw,nosuid shared:7 - {kind} source rw\n")
        };
        let host = line(20, "8:1", "/", "/", "ext4") + &line(21, "0:5", "/", "/proc", "proc");
        let own = [
            line(40, "8:1", "/", "/", "ext4"),
            line(41, "0:77", "/", "/proc", "proc"),
            line(42, "0:78", "/", "/scratch", "tmpfs"),
            line(43, "0:78", "/part", "/elsewhere", "tmpfs"),
            line(44, "8:1", "/data", "/srv", "ext4"),
        ];
        let told = mounts_left_out(&own.concat(), &host);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("the mount at /elsewhere (tmpfs)"), "{told:?}");
        assert!(told[1].starts_with("the mount at /srv (ext4)"), "{told:?}");
        assert!(mounts_left_out("nonsense\n1 2 3 - \n", &host).is_empty());
    }
}
