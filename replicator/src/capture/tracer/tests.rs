//! What a kill in the middle of a freeze must not do, leave the tracer waiting for ever; and what another tracer
//! has left.

use super::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;

/// The first process of a pid namespace of its own, with a thread beside its leader.
struct First {
    launcher: Child,
    pid: i32,
}

const PROGRAM: &str = "import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print('ready', flush=True)
time.sleep(600)";

impl First {
    fn start() -> Option<Self> {
        let mut launcher = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "/usr/bin/python3", "-c", PROGRAM])
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        BufReader::new(launcher.stdout.take()?).read_line(&mut line).ok()?;
        let children =
            std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", launcher.id())).ok()?;
        let pid = children.trim().parse().ok();
        let started = pid.map(|pid| Self { launcher, pid });
        if line.is_empty() || started.is_none() {
            println!("skipped: no pid namespaces, or no python");
            return None;
        }
        started
    }
}

impl Drop for First {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// A tracer that is dropped leaves its threads traced by whoever dropped it.
#[test]
fn threads_that_a_dropped_tracer_has_left_are_not_taken_for_seized() {
    let Some(first) = First::start() else { return };
    let pid = first.pid;
    let tried = std::thread::spawn(move || {
        Tracer::gentle().seize(pid).expect("seized");
        let mut second = Tracer::new();
        second.seize(pid).map(|()| second.len()).map_err(|e| e.code())
    });
    assert_eq!(tried.join().expect("no panic"), Err(libc::EPERM));
}

#[test]
fn a_kill_between_the_stop_of_a_thread_and_of_its_leader_ends_the_freeze() {
    let Some(first) = First::start() else { return };
    let pid = first.pid;
    let (done, outcome) = channel();
    // A tracer belongs to the thread that made it. One that hangs must not hang the test.
    std::thread::spawn(move || {
        let mut tracer = Tracer::new();
        tracer.seize(pid).expect("seized");
        let others: Vec<i32> = tracer.threads_of(pid).into_iter().filter(|t| *t != pid).collect();
        assert!(!others.is_empty());
        for tid in others {
            ptrace::interrupt(tid).expect("asked");
            tracer.wait_stopped(tid).expect("stopped");
        }
        let first = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(first, nix::sys::signal::Signal::SIGKILL).expect("killed");
        let _ = done.send(tracer.freeze().map_err(|e| e.to_string()));
    });
    let outcome = outcome.recv_timeout(Duration::from_secs(30)).expect("it waits for ever");
    assert_eq!(outcome, Err(CaptureError::Ended.to_string()));
}

/// It makes children all the time, and is raised as in a freeze. One of them is as if it had not been.
#[test]
fn who_is_made_by_a_raised_thread_is_what_it_would_have_been() {
    use crate::sys::sched;
    let child = Command::new("sh").args(["-c", "while :; do (:); done"]).spawn().expect("sh");
    let pid = child.id() as i32;
    struct End(Child);
    impl Drop for End {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let _end = End(child);
    sched::set_nice_of(pid, 5).expect("less is always allowed");
    let traced = move || {
        if let Err(error) = sched::set_fifo(1) {
            return println!("skipped: {error}");
        }
        let mut tracer = Tracer::new();
        tracer.seize(pid).expect("seized");
        let begin = Instant::now();
        // A child may have ended before it stands still.
        while tracer.stopped().count() < 2 {
            assert!(begin.elapsed() < Duration::from_secs(30), "it makes nobody");
            tracer.thaw().expect("it goes on");
            tracer.haste.begin();
            tracer.haste.look(0, [pid].into_iter());
            assert_ne!(sched::attributes(pid).expect("it lives").policy, 0);
            while tracer.len() < 2 && begin.elapsed() < Duration::from_secs(30) {
                tracer.pump().expect("it lives");
            }
            tracer.freeze().expect("all stand still");
            for tid in tracer.all() {
                let is = sched::attributes(tid).expect("it stands still");
                assert_eq!((is.policy, is.nice), (0, 5), "{tid} of {pid}");
            }
        }
        tracer.detach().expect("let go");
    };
    std::thread::spawn(traced).join().expect("no panic");
}
