//! Volumes on a disk that is full: where the processes are, and where the copy is.

use crate::process::{Process, thread_in_namespace};
use crate::tree::{on_disk, same};
use crate::{Scratch, cannot, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use replicator::volume::{ServeOptions, Served};
use replicator::{Epoch, Generation};
use std::fs;
use std::path::{Path, PathBuf};

/// A file system of 400 KiB, in a mount namespace that only this thread has.
fn small_disk(at: &Path) {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
    fs::create_dir(at).expect("a directory");
    let none = MsFlags::empty();
    mount(Some("small"), at, Some("tmpfs"), none, Some("size=400k")).expect("a tmpfs");
}

/// VO-11
#[test]
fn a_full_disk_is_one_error_and_no_damage() {
    if cannot() {
        return;
    }
    let there = Scratch::new();
    let scratch = Scratch::new();
    let base = scratch.0.join("small");
    std::thread::scope(|s| {
        let inside = || {
            small_disk(&base);
            let primary = open(&base);
            let holder = Process::start("hold");
            let pid = thread_in_namespace(&holder);
            let at = scratch.0.join("at");
            let volume = primary.list()[0].clone();
            let mut served =
                Served::start("data", volume, ServeOptions::default()).expect("served");
            served.attach(pid, &at).expect("mounted");
            let seen = PathBuf::from(format!("/proc/{pid}/root{}", at.display()));
            // The program hears of it, and what it has is what arrives.
            fs::write(seen.join("a"), [1; 100_000]).expect("there is room");
            let error = fs::write(seen.join("b"), vec![2; 400_000]).expect_err("no room");
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            primary.begin_full();
            primary.seal().expect("it can be read");
            let mut payload = Vec::new();
            primary.take(&mut payload);
            let backup = open(&there.0);
            backup.commit(Generation::FIRST, Epoch(1), &payload).expect("there is room");
            same("written as far as it went", &on_disk(&there.0).0, &on_disk(&base).0);
            drop(served);

            // A backup without room says so, and has what it had.
            fs::remove_dir_all(base.join("data")).expect("removed");
            let full = open(&base);
            let before = on_disk(&base).0;
            let error =
                full.commit(Generation::FIRST, Epoch(1), &[payload.clone(), payload].concat());
            let error = error.expect_err("no room").to_string();
            assert!(error.contains("the disk is full"), "{error}");
            drop(full);
            drop(open(&base));
            same("nothing of it", &on_disk(&base).0, &before);
        };
        s.spawn(inside).join().expect("no panic inside");
    });
}
