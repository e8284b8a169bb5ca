//! What a tree in the host's namespaces shares with processes outside of it: a pipe would come
//! back as another one, so that one side speaks to nobody.

use super::CaptureError;
use std::collections::BTreeMap;
use std::fs;

/// Refuses pipes that processes outside hold as well. All threads of the tree are stopped.
pub(super) fn check(tree: &[i32]) -> Result<(), CaptureError> {
    let mut pipes = BTreeMap::new();
    for &pid in tree {
        for (number, link) in links(pid) {
            if link.starts_with("pipe:[") {
                pipes.entry(link).or_insert((pid, number));
            }
        }
    }
    if pipes.is_empty() {
        return Ok(());
    }
    for entry in fs::read_dir("/proc").map_err(|e| CaptureError::proc("/proc", e))?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        if tree.contains(&pid) {
            continue;
        }
        for (_, link) in links(pid) {
            if let Some((holder, number)) = pipes.get(&link) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                return Err(CaptureError::unsupported(
                    format!("descriptor {number} of pid {holder}"),
                    format!(
                        "a pipe whose other end pid {pid} ({}) outside of the tree holds; start \
                         the program with its output to a file or to /dev/null",
                        name.trim_end()
                    ),
                ));
            }
        }
    }
    Ok(())
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
