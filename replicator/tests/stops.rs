//! The order of a stop (CP-1), and what is refused by name (CP-3).

use replicator::Epoch;
use replicator::capture::{Boundary, CaptureError, Capturer, NoBoundary};
use replicator::image::State;
use replicator::image::pages::PageSet;
use replicator::sys::unix_diag::UnixDiag;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Killed(Child);

impl Killed {
    /// A shell that runs `script`, which must end with `exec sleep 600`; returns once it sleeps.
    fn shell(script: &str) -> Self {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let me = Self(child);
        let begin = Instant::now();
        let asleep = || {
            let file = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", me.pid()));
            file("comm").is_ok_and(|c| c == "sleep\n")
                && file("syscall").is_ok_and(|s| s.starts_with("230 "))
        };
        while !asleep() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it does not get to sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
        me
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn adopt(pid: i32) -> Capturer {
    Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopt")
}

/// Whether the process stands still for its tracer.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    stat[stat.rfind(')').expect("a name") + 2..].starts_with('t')
}

struct Recorder {
    pid: i32,
    seen: Vec<(&'static str, bool)>,
}

impl Boundary for Recorder {
    fn hold_input(&mut self) {
        self.seen.push(("hold", is_stopped(self.pid)));
    }
    fn seal(&mut self, epoch: Epoch) {
        assert_eq!(epoch, Epoch(7));
        self.seen.push(("seal", is_stopped(self.pid)));
    }
    fn release_input(&mut self) {
        self.seen.push(("release", is_stopped(self.pid)));
    }
}

#[test]
fn input_is_held_before_the_freeze_and_output_sealed_within_it() {
    let sleeper = Killed::shell("exec sleep 600");
    let mut capturer = adopt(sleeper.pid());
    capturer.prepare().expect("prepare");
    capturer.precopy().expect("pre-copy");
    let mut recorder = Recorder { pid: sleeper.pid(), seen: Vec::new() };
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.stop(Epoch(7), &mut recorder, &mut state, &mut pages).expect("stop");
    assert_eq!(recorder.seen, [("hold", false), ("seal", true), ("release", false)]);
    assert_eq!(state.processes.len(), 1);
    assert!(pages.pages() > 0, "the first checkpoint is full");
}

/// The error of the first checkpoint of a shell script.
fn refusal(script: &str) -> CaptureError {
    let child = Killed::shell(script);
    let mut capturer = adopt(child.pid());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut recorder = Recorder { pid: child.pid(), seen: Vec::new() };
    let refused = capturer
        .prepare()
        .and_then(|()| capturer.precopy().map(drop))
        .and_then(|()| capturer.stop(Epoch(7), &mut recorder, &mut state, &mut pages).map(drop))
        .expect_err("it cannot be protected");
    assert!(!is_stopped(child.pid()), "a refused container runs on");
    assert!(recorder.seen.iter().all(|(what, _)| *what != "seal"), "nothing was sealed");
    refused
}

fn assert_names(error: &CaptureError, object: &str, reason: &str) {
    match error {
        CaptureError::Unsupported { object: o, reason: r } => {
            assert!(o.contains(object) && r.contains(reason), "{o}: {r}");
        }
        other => panic!("not a refusal: {other}"),
    }
}

#[test]
fn a_deleted_file_with_other_names_is_refused_by_name() {
    let path = format!("/tmp/nilicon-stops-{}", std::process::id());
    let error = refusal(&format!("exec 9>{path}; ln {path} {path}.too; rm {path}; exec sleep 600"));
    let _ = std::fs::remove_file(format!("{path}.too"));
    assert_names(&error, "descriptor 9", &path);
}

#[test]
fn a_deleted_working_directory_is_refused_by_name() {
    let path = format!("/tmp/nilicon-stops-dir-{}", std::process::id());
    let error = refusal(&format!("mkdir {path}; cd {path}; rmdir {path}; exec sleep 600"));
    assert_names(&error, "pid", "working directory");
}

#[test]
fn the_end_of_the_container_is_told() {
    let mut sleeper = Killed::shell("exec sleep 600");
    let mut capturer = adopt(sleeper.pid());
    capturer.prepare().expect("prepare");
    sleeper.0.kill().expect("kill");
    let begin = Instant::now();
    loop {
        match capturer.pump() {
            Err(CaptureError::Ended) => break,
            other => other.expect("pump"),
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "its end goes unnoticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let error = capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages);
    assert!(matches!(error, Err(CaptureError::Ended)));
}
