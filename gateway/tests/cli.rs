//! The command as its users meet it: exit codes, what is printed where, and that no lab is left
//! behind. Needs root, and makes labs with names of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

fn nilicon(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nilicon"));
    command.args(arguments).stdin(Stdio::null()).output().expect("the command starts")
}

fn demo_topology() -> String {
    topology("demo.topo.yml").display().to_string()
}

fn topology(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../topologies").join(file)
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A name for a lab, which is destroyed in the end, whatever happens.
struct LabName(String);

impl LabName {
    fn new(what: &str) -> Self {
        Self(format!("{what}-{}", std::process::id()))
    }

    fn namespaces(&self) -> usize {
        let prefix = format!("nilicon-{}-", self.0);
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count()
    }

    fn is_gone(&self) -> bool {
        self.namespaces() == 0 && !Path::new("/run/nilicon").join(&self.0).exists()
    }
}

impl Drop for LabName {
    fn drop(&mut self) {
        nilicon(&["destroy", &self.0]);
    }
}

#[test]
fn bad_usage_is_2_and_a_bad_file_is_1_with_the_place() {
    assert_eq!(nilicon(&[]).status.code(), Some(2));
    assert!(err(&nilicon(&[])).contains("Usage: nilicon <COMMAND>"));
    assert_eq!(nilicon(&["run", "x.yml", "--fault", "melt:alpha@1s"]).status.code(), Some(2));
    let missing = nilicon(&["validate", "no-such.yml"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).contains("no-such.yml"));

    let path = std::env::temp_dir().join(format!("nilicon-cli-{}.yml", std::process::id()));
    let text = std::fs::read_to_string(demo_topology()).unwrap();
    std::fs::write(&path, text.replace("kind: host", "kind: hots")).unwrap();
    let bad = nilicon(&["run", &path.display().to_string()]);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(err(&bad).contains("did you mean") || err(&bad).contains("known are"), "{}", err(&bad));
    assert!(out(&bad).is_empty());
}

#[test]
fn every_example_is_valid_and_the_schema_is_json() {
    for entry in std::fs::read_dir(topology("")).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "yml") {
            let valid = nilicon(&["validate", &path.display().to_string()]);
            assert!(valid.status.success(), "{}", err(&valid));
        }
    }
    let schema: Value = serde_json::from_str(&out(&nilicon(&["schema"]))).unwrap();
    assert!(schema["properties"]["containers"].is_object());
}

#[test]
fn the_doctor_finds_this_machine_fit() {
    let found = nilicon(&["doctor", "-o", "json"]);
    let found_json: Value = serde_json::from_str(&out(&found)).unwrap();
    assert_eq!(found_json["ready"], true, "{found_json:#}");
    assert_eq!(found.status.code(), Some(0));
    for check in found_json["checks"].as_array().unwrap() {
        assert_eq!(check["ok"] == true, check["fix"].is_null(), "{check}");
    }
}

#[test]
fn a_lab_is_deployed_looked_at_broken_and_destroyed() {
    let lab = LabName::new("cli-lab");
    let deployed = nilicon(&["deploy", &demo_topology(), "--name", &lab.0]);
    assert!(deployed.status.success(), "{}", err(&deployed));
    assert!(err(&deployed).is_empty(), "quiet in a pipe: {}", err(&deployed));

    let view: Value =
        serde_json::from_str(&out(&nilicon(&["inspect", &lab.0, "-o", "json"]))).unwrap();
    assert_eq!(view["containers"][0]["primary"], "alpha");
    assert_eq!(view["containers"][0]["protected"], true);
    assert_eq!(view["nodes"][0]["role"], "primary");
    assert!(view["nodes"][1]["agent_pid"].is_u64());

    let inside = nilicon(&["exec", &lab.0, "client", "--", "cat", "/proc/net/dev"]);
    assert!(out(&inside).contains("eth0"), "{}", out(&inside));
    let code = nilicon(&["exec", &lab.0, "store", "--", "sh", "-c", "exit 7"]);
    assert_eq!(code.status.code(), Some(7));
    let nowhere = nilicon(&["exec", &lab.0, "gamma", "--", "true"]);
    assert!(err(&nowhere).contains("it has alpha, beta"), "{}", err(&nowhere));

    let taken = nilicon(&["run", &demo_topology(), "--name", &lab.0]);
    assert_eq!(taken.status.code(), Some(1));
    assert!(err(&taken).contains("is in use"), "{}", err(&taken));

    let fault = nilicon(&["fault", &lab.0, "kill-host:alpha"]);
    assert!(fault.status.success(), "{}", err(&fault));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = out(&nilicon(&["inspect", &lab.0, "-o", "json"]));
        let view: Value = serde_json::from_str(&text).unwrap();
        if view["containers"][0]["primary"] == "beta" {
            break;
        }
        assert!(Instant::now() < deadline, "beta does not take over: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }

    assert!(nilicon(&["destroy", &lab.0]).status.success());
    assert!(lab.is_gone());
    assert!(nilicon(&["destroy", &lab.0]).status.success(), "there is no such lab: no error");
    assert_eq!(nilicon(&["inspect", &lab.0]).status.code(), Some(1));
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let lab = LabName::new("cli-int");
    let mut run = Command::new(env!("CARGO_BIN_EXE_nilicon"))
        .args(["run", &demo_topology(), "--name", &lab.0, "--duration", "300s"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while lab.namespaces() == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(Pid::from_raw(run.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert!(lab.is_gone());
}
