//! A clock that steps forward or back by hours makes no difference: nothing that detects, decides,
//! replicates or judges reads the time of day. The sources show that; and agents show it whose time of
//! day is stepped while they protect. The kernel's clock is left alone, as it is everybody's on the
//! machine: what the agents ask the C library is answered by a library of ours, which is preloaded. What
//! the kernel itself does by its time of day, none of which nilicon uses, is therefore not tested.

use nilicon_tests::{Bed, EMBEDDED, Sketch, is_installed, until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What reads the time of day.
const READS: [&str; 6] =
    ["SystemTime", "UNIX_EPOCH", "CLOCK_REALTIME", "UnixTime", "gettimeofday", "libc::time("];

/// Who may, and what for.
const MAY: [(&str, &str); 7] = [
    ("gateway/src/cli/clock.rs", "names of files, and dates in reports"),
    ("gateway/src/cli/bench/figures.rs", "the date of a bench"),
    ("replicator/src/capture/one_shot.rs", "when an image was taken, for whoever reads it"),
    ("replicator/src/restore/objects.rs", "timers of the container that are of that clock"),
    ("replicator/src/volume/fuse/answers.rs", "the times that files bear"),
    (
        "replicator/src/volume/fuse/requests.rs",
        "the times that files bear, in types of its callers",
    ),
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

/// Forward by ten days and back by twenty under load, and then the loss of the host.
#[test]
fn agents_whose_clocks_step_protect_as_before() {
    if !is_installed("cc") {
        return;
    }
    let bed = Bed::new("clocks", &Sketch::of(EMBEDDED).loaded());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("preload/clock.c");
    let library = bed.directory().join("clock.so");
    let step = bed.directory().join("step");
    let done = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status()
        .expect("cc runs");
    assert!(done.success(), "clock.c does not compile");
    let path = |path: &Path| path.display().to_string();
    let (library, file) = (path(&library), path(&step));
    let environment = [("LD_PRELOAD", library.as_str()), ("NILICON_TEST_STEP", file.as_str())];
    let line = ["--duration", "9s", "--fault", "kill-host:alpha@6s", "-o", "json"];
    let run = bed.start_with("run", &line, &environment);
    // What agents log bears their time of day: the control that their clocks do step.
    let day = || {
        let log = fs::read_to_string(bed.state().join("beta.log")).unwrap_or_default();
        log.lines().last().and_then(|line| line.get(..10).map(str::to_owned))
    };
    let today = until("a line in the log", day);
    let mut epoch = 0;
    for seconds in ["864000", "-864000"] {
        let store = bed.until_store("it is protected", |store| {
            store["protected"] == true && store["epoch"].as_u64() > Some(epoch + 50)
        });
        assert_eq!(store["generation"], 1, "nobody has taken over: {store:#}");
        epoch = store["epoch"].as_u64().expect("a number");
        fs::write(&step, seconds).expect("stepped");
    }
    // It takes over, and says so, ten days ago.
    until("a line by a clock that was stepped", || day().filter(|date| *date != today));
    let report = run.wait(Duration::from_secs(200)).expect_success().json();
    assert_eq!((&report["recovered"], &report["why"]), (&true.into(), &serde_json::Value::Null));
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(report["clients"][0][figure], 0, "{figure}: {report:#}");
    }
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &2.into()));
    bed.expect_gone();
}
