//! What is left of a lab, found without asking nilicon.

use std::fs;
use std::path::Path;

/// Where control groups may be: the unified hierarchy, that of mixed systems, the freezer's.
const CGROUP_ROOTS: [&str; 3] =
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"];

/// Everything that is still there of a lab: namespaces, state, control groups, devices, and
/// processes with `mark` (as `NAME=value`) in their environment.
pub fn leftovers(lab: &str, mark: &str) -> Vec<String> {
    let mut found = Vec::new();
    let prefix = format!("nilicon-{lab}-");
    let namespaces = names_in("/run/netns").into_iter().chain(names_in("/var/run/netns"));
    found.extend(namespaces.filter(|name| name.starts_with(&prefix)));
    let state = format!("/run/nilicon/{lab}");
    let groups = CGROUP_ROOTS.map(|root| format!("{root}/nilicon/{lab}"));
    let paths = std::iter::once(state).chain(groups);
    found.extend(paths.filter(|path| Path::new(path).exists()));
    // Devices belong in the namespaces of the lab, never in that of the machine.
    found.extend(names_in("/sys/class/net").into_iter().filter(|name| name.starts_with("nl")));
    for (pid, environment) in environments() {
        if environment.split('\0').any(|variable| variable == mark) {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            found.push(format!("process {pid}: {}", line.replace('\0', " ")));
        }
    }
    found
}

fn names_in(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// All processes that run, with their environments. What only waits to be reaped has none.
fn environments() -> impl Iterator<Item = (u32, String)> {
    names_in("/proc").into_iter().filter_map(|name| {
        let pid = name.parse().ok()?;
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        Some((pid, String::from_utf8_lossy(&environment).into_owned()))
    })
}
