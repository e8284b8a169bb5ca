//! Every kind of descriptor, captured here and brought to life there, on the real kernel. Needs
//! root. What is tested is in `kinds`; each line `kind NAME ok` is a promise.

mod common;
mod kinds;

use common::{Original, Scratch, wait_until};
use kinds::Kind;
use replicator::restore::Peer;

/// Runs a program that holds these kinds through a failover, with changes between two epochs.
/// `program` is the test that it is.
fn fail_over(program: &str, kinds: &[Kind]) {
    let dir = Scratch::new(&format!("kinds-{program}"));
    let exe = std::env::current_exe().expect("a path");
    let exe = exe.to_str().expect("a path");
    let command = [exe, program, "--exact", "--nocapture", "--test-threads=1"];
    let mut original = Original::start(&dir, &command);
    let console = original.console();
    let says = |word: &str| {
        let text = std::fs::read_to_string(&console).expect("console");
        assert!(!text.contains("FAILED"), "{text}");
        text.lines().any(|l| l == word)
    };
    original.pump_until("all is set up", || says("ready"));
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    std::fs::write(dir.0.join(kinds::CHANGE), "").expect("written");
    original.pump_until("all is changed", || says("changed"));
    for _ in 0..3 {
        original.follow(&mut spare);
    }
    original.kill();

    spare.prepare().expect("prepare");
    spare.connect(|_| Peer::Silent).expect("connect");
    spare.push_unsent().expect("nothing to send");
    spare.complete().expect("complete");
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    spare.detach_all().expect("let go");
    std::fs::write(dir.0.join(kinds::VERIFY), "").expect("written");
    let read = || std::fs::read_to_string(&console).expect("console");
    wait_until("all is verified", || read().lines().any(|l| l == "done"));
    let text = read();
    for (name, _) in kinds {
        let verdict = text.lines().find(|l| l.starts_with(&format!("kind {name} ")));
        println!("continuous {}", verdict.unwrap_or("none"));
    }
    assert!(!text.contains("FAILED"), "{text}");
    for (name, _) in kinds {
        assert!(text.contains(&format!("kind {name} ok")), "{name}: {text}");
    }
}

/// Whether this process is to be the program of a test.
fn is_program() -> bool {
    std::env::var_os(common::SUBJECT).is_some()
}

/// Not a test: the program of the next one.
#[test]
fn unix_program() {
    if is_program() {
        kinds::run(kinds::unix::KINDS);
    }
}

/// Not a test: a program that the program of the next one starts.
#[test]
fn unix_client() {
    if let Some(path) = std::env::var_os(kinds::unix::CLIENT) {
        kinds::unix::client(path.to_str().expect("text"));
    }
}

#[test]
fn unix_sockets_go_on() {
    fail_over("unix_program", kinds::unix::KINDS);
}

/// Not a test: the program of the next one.
#[test]
fn files_program() {
    if is_program() {
        kinds::run(kinds::files::KINDS);
    }
}

#[test]
fn files_pipes_locks_and_event_descriptors_go_on() {
    fail_over("files_program", kinds::files::KINDS);
}

/// Not a test: the program of the next one.
#[test]
fn internet_program() {
    if is_program() {
        kinds::run(kinds::internet::KINDS);
    }
}

#[test]
fn datagram_raw_and_netlink_sockets_go_on() {
    fail_over("internet_program", kinds::internet::KINDS);
}

/// Not a test: the program of the next one.
#[test]
fn terminals_program() {
    if is_program() {
        kinds::run(kinds::terminals::KINDS);
    }
}

#[test]
fn terminals_go_on() {
    fail_over("terminals_program", kinds::terminals::KINDS);
}
