//! Launching containers on the real kernel. Needs root.

use replicator::container::{ContainerSpec, LaunchError, Role, launch};
use replicator::image::Clocks;
use std::path::{Path, PathBuf};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nilicon-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn spec(dir: &Path, command: &[&str]) -> ContainerSpec {
    ContainerSpec {
        name: "test".into(),
        hostname: "inside".into(),
        command: command.iter().map(|s| s.to_string()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("COLOUR".into(), "green".into())],
        workdir: dir.into(),
        console: dir.join("console"),
        cgroup_procs: None,
        program: env!("CARGO_BIN_EXE_container-init").into(),
        clocks: None,
        tmpfs: Vec::new(),
        read_only: Vec::new(),
    }
}

fn wait_for_line(path: &Path, last: &str) -> String {
    loop {
        let text = std::fs::read_to_string(path).expect("console");
        if text.lines().any(|l| l == last) {
            return text;
        }
        std::thread::yield_now();
    }
}

#[test]
fn the_command_runs_as_pid_1_in_namespaces_of_its_own() {
    let dir = Scratch::new("launch");
    let script = "echo $$ $(hostname) $COLOUR $(pwd) $(ls /proc/self/fd | wc -l); \
                  cat /proc/uptime; echo done; read x";
    let mut spec = spec(&dir.0, &["sh", "-c", script]);
    spec.clocks = Some(Clocks { monotonic: 5_000_000_000_000, boottime: 7_000_000_000_000 });
    let mut launched = launch(&spec, Role::Start).expect("launched");
    assert_eq!(std::fs::read_to_string(&spec.console).expect("console"), "", "nothing ran yet");
    launched.go().expect("runs");
    let text = wait_for_line(&spec.console, "done");
    let lines: Vec<&str> = text.lines().collect();
    // 0, 1, 2 and the directory that ls reads.
    assert_eq!(lines[0], format!("1 inside green {} 4", dir.0.display()));
    let uptime: f64 = lines[1].split(' ').next().expect("a number").parse().expect("a number");
    assert!((7000.0..8000.0).contains(&uptime), "{uptime}");
    let pid = launched.pid;
    drop(launched);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_missing_program_is_named() {
    let dir = Scratch::new("launch-missing");
    let spec = spec(&dir.0, &["no-such-program"]);
    let error = launch(&spec, Role::Start).expect("launched").go().expect_err("cannot run");
    assert!(matches!(&error, LaunchError::Inside { .. }));
    assert!(error.to_string().contains("cannot run no-such-program"), "{error}");
    assert!(error.to_string().contains("no such program"), "{error}");
}

#[test]
fn a_spare_waits_and_goes_with_its_handle() {
    let dir = Scratch::new("launch-spare");
    let launched = launch(&spec(&dir.0, &[]), Role::Spare).expect("launched");
    let status = std::fs::read_to_string(format!("/proc/{}/status", launched.pid)).expect("status");
    let inside = status.lines().find(|l| l.starts_with("NSpid:")).expect("pids");
    assert!(inside.ends_with("\t1"), "{inside}");
}
