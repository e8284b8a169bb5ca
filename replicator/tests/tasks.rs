//! What processes and threads have besides memory and descriptors: timers, places in the tree,
//! settings. Each kind is a program of its own (`subjects/tasks.py`) that looks again after it
//! was captured, killed and restored. Needs root and Python 3.

mod common;

use common::{Original, Scratch, wait_until};
use nix::libc;
use replicator::capture::Capturer;
use replicator::restore::Peer;
use replicator::sys::unix_diag::UnixDiag;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SUBJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/tasks.py");

/// A good part of what the waits last: they would end too late if they began anew.
const AWHILE: Duration = Duration::from_secs(3);

/// Longer than any kind waits for something by itself.
const PATIENCE: Duration = Duration::from_secs(90);

/// The interpreter, or none if there is none.
fn python() -> Option<String> {
    let found = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    found.ok().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

fn lines(console: &Path, start: &str) -> Vec<String> {
    let text = std::fs::read_to_string(console).expect("console");
    assert!(!text.contains("FAILED"), "{text}");
    text.lines().filter(|l| l.starts_with(start)).map(str::to_owned).collect()
}

/// Runs a group of kinds through some checkpoints, a kill and a restore.
fn survive(group: &str) {
    let Some(python) = python() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let dir = Scratch::new(&format!("tasks-{group}"));
    // One kind by name, while it is worked on: NILICON_TEST_KIND=name.
    let only = std::env::var("NILICON_TEST_KIND").ok();
    let command = [python.as_str(), SUBJECT, only.as_deref().unwrap_or(group)];
    let mut original = Original::start(&dir, &command);
    let console = original.console();
    let mut all = 0;
    original.pump_until("it counts its kinds", || {
        let count = lines(&console, "kinds ");
        all = count.first().map_or(0, |line| line[6..].parse().expect("a number"));
        all > 0
    });
    // Stopped again and again from the beginning, and for a while, so that waits are met in all
    // their states.
    wait_until("all kinds are there", || {
        original.checkpoint();
        lines(&console, "ready ").len() == all
    });
    let mut spare = original.spare();
    original.capturer.begin_full();
    let begin = Instant::now();
    let mut stops = 0;
    while begin.elapsed() < AWHILE {
        original.follow(&mut spare);
        stops += 1;
    }
    println!("{stops} stops");
    original.kill();
    std::fs::write(&console, "").expect("empty console");
    spare.prepare().expect("prepare");
    spare.connect(|_| Peer::Silent).expect("connect");
    spare.complete().expect("complete");
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    spare.detach_all().expect("let go");
    std::fs::write(dir.0.join("verify"), "").expect("written");
    let begin = Instant::now();
    while lines(&console, "kind ").len() < all {
        let text = || std::fs::read_to_string(&console).expect("console");
        assert!(begin.elapsed() < PATIENCE, "only these have looked again: {}", text());
        std::thread::sleep(Duration::from_millis(10));
    }
    for line in lines(&console, "kind ") {
        println!("{line}");
    }
}

#[test]
fn timers_survive() {
    survive("timers");
}

/// A timer that has gone off goes on only when its signal is taken, so a checkpoint without that signal would
/// have lost the timer for good. It goes off at any moment of a stop.
#[test]
fn a_timer_that_goes_off_in_a_stop_leaves_its_signal() {
    const PROGRAM: &str = "import signal, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
print('ready', flush=True)
while True:
    time.sleep(0.01)";
    let Some(python) = python() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let dir = Scratch::new("tasks-alarm");
    let mut original = Original::start(&dir, &[&python, "-c", PROGRAM]);
    let console = original.console();
    original.pump_until("its timer runs", || !lines(&console, "ready").is_empty());
    let mut gone_off = 0;
    for _ in 0..400 {
        original.checkpoint();
        let process = &original.state.processes[0];
        let timer = process.timers.interval[0];
        assert_eq!(timer.interval, 1_000_000);
        if timer.value == 0 {
            gone_off += 1;
            let is_alarm = |info: &Vec<u8>| info[0] == libc::SIGALRM as u8;
            assert!(process.pending.iter().any(is_alarm), "neither its time nor its signal");
        }
    }
    println!("it had gone off in {gone_off} of 400 stops");
}

/// The program is nearly always in the middle of making a process or a thread, and the kernel tells nobody of what
/// is being made at the moment of the seizure.
#[test]
fn whoever_is_being_made_at_the_seizure_is_not_missed() {
    const PROGRAM: &str = "import os, threading
def start():
    while True:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
threading.Thread(target=start).start()
print('ready', flush=True)
while True:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)";
    const TIMES: usize = 100;
    let Some(python) = python() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let dir = Scratch::new("tasks-made");
    let console = dir.0.join("console");
    let out = || File::create(&console).expect("a file");
    let mut command = Command::new(python);
    command.args(["-c", PROGRAM]).stdin(Stdio::null()).stdout(out()).stderr(out());
    let child = Ended(command.spawn().expect("started"));
    let pid = child.0.id() as i32;
    wait_until("it makes them", || !lines(&console, "ready").is_empty());
    for time in 0..TIMES {
        let held =
            Capturer::adopt_gently(pid, UnixDiag::open().expect("diag")).and_then(Capturer::hold);
        let held = held.unwrap_or_else(|e| panic!("time {time}: {e}"));
        let state = &held.state;
        let (mut tids, mut children) = (0, 0);
        for process in &state.processes {
            for entry in std::fs::read_dir(format!("/proc/{}/task", process.pid)).expect("tasks") {
                let path = entry.expect("a task").path();
                let of = std::fs::read_to_string(path.join("children")).expect("children");
                children += of.split_whitespace().count();
                tids += 1;
            }
        }
        let threads: usize = state.processes.iter().map(|p| p.threads.len()).sum();
        let others = state.processes.len() - 1 + state.ended.len();
        held.release().expect("let go");
        assert_eq!((threads, others), (tids, children), "time {time}: threads, processes");
    }
}

/// CLONE_UNTRACED keeps the news of a child from its parent's tracer.
#[test]
fn a_child_that_is_to_have_no_tracer_is_found() {
    const PROGRAM: &str = "import ctypes, os, signal
libc = ctypes.CDLL(None)
os.read(0, 1)
if libc.syscall(56, 0x00800000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:
    if os.fork() == 0:
        print('made', flush=True)
while True:
    signal.pause()";
    let Some(python) = python() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let dir = Scratch::new("tasks-untraced");
    let mut original = Original::start(&dir, &[&python, "-c", PROGRAM]);
    let console = original.console();
    original.pump_until("it has children", || !lines(&console, "made").is_empty());
    wait_until("they are all seen", || {
        original.checkpoint();
        original.state.processes.len() == 3
    });
    let mut spare = original.spare();
    for _ in 0..3 {
        original.follow(&mut spare);
    }
    assert_eq!(original.state.processes.len(), 3);
}

/// Killed in the end.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn waits_survive() {
    survive("waits");
}

#[test]
fn the_tree_survives() {
    survive("tree");
}

#[test]
fn settings_survive() {
    survive("settings");
}

#[test]
fn signals_survive() {
    survive("signals");
}

#[test]
fn programs_survive() {
    survive("programs");
}
