//! Every kind of memory, on the real kernel: a program sets it up, is captured again and again
//! while it changes, is killed, and finds all as it was where it is brought back. Needs root and
//! python3, which `subjects/memory.py` is for.

mod common;

use common::{Original, Scratch, wait_until};
use replicator::restore::{Peer, Spare};
use std::path::Path;
use std::process::Command;

const PYTHON: &str = "/usr/bin/python3";

/// The console, unless the program failed.
fn read(console: &Path) -> String {
    let text = std::fs::read_to_string(console).expect("console");
    let bad = ["panicked", "Traceback", "Error"];
    assert!(!bad.iter().any(|word| text.contains(word)), "{text}");
    text
}

/// Makes a spare into a running container.
fn bring_to_life(spare: &mut Spare) {
    spare.prepare().expect("prepare");
    spare.connect(|_| Peer::Silent).expect("connect");
    spare.push_unsent().expect("nothing to send");
    spare.complete().expect("complete");
    spare.detach_all().expect("let go");
}

/// Another host does not have what `gone` is, and has something else that is called `stale`.
fn be_another_host(dir: &Path) {
    let gone = dir.join("gone");
    if gone.exists() {
        std::fs::remove_dir_all(gone).expect("removed");
    }
    let stale = dir.join("stale");
    if stale.exists() {
        std::fs::write(stale, vec![b'X'; 1 << 20]).expect("written");
    }
}

/// Runs one kind through checkpoints, an end and a restore.
fn survives(kind: &str) {
    if !Path::new(PYTHON).exists() {
        println!("skipped: {PYTHON} is not there");
        return;
    }
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/memory.py");
    let dir = Scratch::new(&format!("memory-{kind}"));
    program_survives(kind, &dir, &[PYTHON, "-B", program, kind]);
}

fn program_survives(kind: &str, dir: &Scratch, command: &[&str]) {
    let mut original = Original::start(dir, command);
    let console = original.console();
    let mut spare = None;
    let mut step = 0;
    loop {
        step += 1;
        let (ready, last) = (format!("ready {step}\n"), format!("last {step}\n"));
        let mut text = String::new();
        original.pump_until(&format!("it is at step {step}"), || {
            text = read(&console);
            text.contains(&ready) || text.contains(&last)
        });
        // Once with changes, once without.
        for _ in 0..2 {
            match &mut spare {
                Some(spare) => drop(original.follow(spare)),
                None => {
                    original.checkpoint();
                    // As for a new backup: what was watched before is watched anew.
                    original.capturer.begin_full();
                    original.checkpoint();
                    let mut fresh = original.spare();
                    original.bring(&mut fresh);
                    spare = Some(fresh);
                }
            }
        }
        let go = dir.0.join(format!("go-{step}"));
        if text.contains(&last) {
            original.kill();
            be_another_host(&dir.0);
            bring_to_life(spare.as_mut().expect("a spare"));
            std::fs::write(go, "").expect("written");
            break;
        }
        std::fs::write(go, "").expect("written");
    }
    let done = format!("kind {kind} ok");
    wait_until(&format!("{kind} is found as it was"), || read(&console).contains(&done));
    println!("{done}");
}

/// The child is known, as a look before a stop has found it, and gone before anybody has looked at its
/// mappings.
#[test]
fn what_a_child_wrote_that_was_hardly_seen_is_captured() {
    if !Path::new(PYTHON).exists() {
        println!("skipped: {PYTHON} is not there");
        return;
    }
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/passing.py");
    let dir = Scratch::new("memory-passing");
    let folder = dir.0.to_str().expect("a path of plain text");
    let mut original = Original::start(&dir, &[PYTHON, "-B", program, folder]);
    let console = original.console();
    let tell = |word: &str| std::fs::write(dir.0.join(word), "").expect("written");
    original.pump_until("it is ready", || read(&console).contains("ready"));
    original.checkpoint();
    original.capturer.begin_full();
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    tell("fork");
    original.pump_until("the child is there", || read(&console).contains("born"));
    original.capturer.prepare().expect("it is found");
    tell("write");
    original.pump_until("the child is gone", || read(&console).contains("gone"));
    original.follow(&mut spare);
    original.kill();
    bring_to_life(&mut spare);
    tell("read");
    wait_until("it says what is there", || read(&console).contains("found"));
    assert!(read(&console).contains("found b'old!new!'"), "{}", read(&console));
}

#[test]
fn vectors() {
    let features = std::fs::read_to_string("/proc/cpuinfo").expect("cpuinfo");
    if !features.contains("avx512f") {
        println!("skipped: this processor has no AVX-512");
        return;
    }
    let dir = Scratch::new("memory-vectors");
    let program = dir.0.join("vectors");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/vectors.c");
    let flags = "-O1 -mgeneral-regs-only -static -nostdlib -ffreestanding -fno-stack-protector";
    let built = Command::new("gcc")
        .args(flags.split(' '))
        .arg("-o")
        .args([program.as_path(), Path::new(source)])
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("skipped: gcc does not build it");
        return;
    }
    program_survives("vectors", &dir, &[program.to_str().expect("a path")]);
}

macro_rules! kinds {
    ($($kind:ident)*) => { $(#[test] fn $kind() { survives(stringify!($kind)); })* };
}

kinds! {
    shared_anonymous
    shared_anonymous_moves
    memfd
    deleted_files
    mapped_files
    posix_shm
    multiprocessing
    system_v_memory
    system_v_messages
    system_v_semaphores
    advice
    guard_regions
    host_names
}
