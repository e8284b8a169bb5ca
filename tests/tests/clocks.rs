//! A clock that steps forward or back by an hour makes no difference: nothing that detects, decides,
//! replicates or judges reads the time of day. That can be seen in the sources, and only there: a
//! test that steps the clock would step it for everybody on the machine.

use std::fs;
use std::path::{Path, PathBuf};

/// What reads the time of day.
const READS: [&str; 6] =
    ["SystemTime", "UNIX_EPOCH", "CLOCK_REALTIME", "UnixTime", "gettimeofday", "libc::time("];

/// Who may, and what for.
const MAY: [(&str, &str); 6] = [
    ("gateway/src/cli/clock.rs", "names of files, and dates in reports"),
    ("gateway/src/cli/bench/figures.rs", "the date of a bench"),
    ("replicator/src/capture/one_shot.rs", "when an image was taken, for whoever reads it"),
    ("replicator/src/restore/objects.rs", "timers of the container that are of that clock"),
    ("replicator/src/volume/fuse/requests.rs", "the times that files bear"),
    ("replicator/src/transport/pki.rs", "its test that certificates do not depend on it"),
];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn nothing_that_protects_reads_the_time_of_day() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
    let mut found = Vec::new();
    for crate_of_ours in ["netns-tools", "replicator", "gateway", "tests/clients"] {
        sources(&root.join(crate_of_ours).join("src"), &mut found);
    }
    assert!(found.len() > 200, "the sources are not where they ought to be: {found:?}");
    let mut readers = Vec::new();
    for path in found {
        let text = fs::read_to_string(&path).expect("text");
        if READS.iter().any(|word| text.contains(word)) {
            let name = path.strip_prefix(root).expect("of this workspace").display().to_string();
            readers.push(name);
        }
    }
    readers.sort();
    let strangers: Vec<&String> =
        readers.iter().filter(|name| MAY.iter().all(|(known, _)| known != name)).collect();
    assert!(strangers.is_empty(), "these read the time of day: {strangers:?}");
    for (known, why) in MAY {
        assert!(readers.iter().any(|name| name == known), "{known} does not any more ({why})");
    }
}
