//! Processes work on a volume and are stopped at any moment; their files arrive in another directory
//! as they were, though the process that commits them is killed somewhere.

use crate::process::{Process, thread_in_namespace};
use crate::tree::{loose, on_disk, same, tree};
use crate::{Scratch, cannot, open};
use nix::fcntl::OFlag;
use replicator::volume::{Ino, Journals, ServeOptions, Served, Volumes};
use replicator::{Epoch, Generation};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Commits in a process that is killed somewhere, until one gets through.
fn commit_killed(
    rng: &mut fastrand::Rng,
    base: &Path,
    payload: &Path,
    pieces: &[Vec<u8>],
    epoch: u64,
) {
    let journals = Journals::new(base, &["data".into()], false);
    let mut link = 0;
    // They come again over each connection.
    let mut seed = || {
        link += 1;
        pieces.iter().for_each(|piece| journals.seed(link, piece).expect("there is room"));
    };
    let part = format!("commit {} {} {epoch}", base.display(), payload.display());
    let was = on_disk(base);
    for _ in 0..rng.u8(1..3) {
        seed();
        let process = Process::start(&part);
        std::thread::sleep(Duration::from_micros(rng.u64(0..6000)));
        drop(process);
        let journal = base.join("journal").exists();
        drop(open(base));
        if !journal && on_disk(base) == was {
            continue;
        }
        return;
    }
    let volumes = open(base);
    seed();
    let bytes = fs::read(payload).expect("a payload");
    volumes.commit(Generation::FIRST, Epoch(epoch), &bytes).expect("it is carried out");
}

/// Contents that go ahead of a full checkpoint, read so many times while processes write.
fn seeded(primary: &Volumes, passes: u8) -> Vec<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    for _ in 0..passes {
        let mut piece = Vec::new();
        while primary.seed(&mut piece).expect("it can be read") {
            pieces.push(std::mem::take(&mut piece));
        }
    }
    pieces
}

fn torture(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (here, there) = (Scratch::new(), Scratch::new());
    let primary = open(&here.0);
    drop(open(&there.0));
    let holder = Process::start("hold");
    let at = here.0.join("at");
    let volume = primary.list()[0].clone();
    let mut served = Served::start("data", volume, ServeOptions::default()).expect("served");
    let namespace = thread_in_namespace(&holder);
    served.attach(namespace, &at).expect("mounted");
    let workers: Vec<Process> = (0..3)
        .map(|i| Process::start(&format!("work {namespace} {} {}", at.display(), seed * 3 + i)))
        .collect();
    let payload = there.0.join("payload");
    for epoch in 1..=3 {
        let mut pieces = Vec::new();
        if epoch == 1 || rng.u8(0..5) == 0 {
            primary.begin_full();
            if rng.bool() {
                pieces = seeded(&primary, rng.u8(1..4));
            }
        }
        for _ in 0..rng.u8(0..3) {
            std::thread::sleep(Duration::from_millis(rng.u64(1..20)));
            primary.precopy().expect("it can be read");
        }
        std::thread::sleep(Duration::from_millis(rng.u64(1..20)));
        workers.iter().for_each(Process::stop);
        // While they stand still, the kernel may forget files that nobody has open any more.
        let most = loose(&here.0);
        primary.seal().expect("it can be read");
        let now = on_disk(&here.0);
        let seen =
            PathBuf::from(format!("/proc/{namespace}/root")).join(at.strip_prefix("/").expect("/"));
        let seen = tree(&seen, false);
        same(&format!("seed {seed}, epoch {epoch}, through the mount"), &seen, &now.0);
        workers.iter().for_each(Process::run);
        let mut part = Vec::new();
        primary.take(&mut part);
        fs::write(&payload, part).expect("written");
        commit_killed(&mut rng, &there.0, &payload, &pieces, epoch);
        let got = on_disk(&there.0);
        same(&format!("seed {seed}, epoch {epoch}"), &got.0, &now.0);
        for (path, entry) in &now.1 {
            assert_eq!(got.1.get(path), Some(entry), "seed {seed}, epoch {epoch}, open {path:?}");
        }
        for (path, entry) in &got.1 {
            assert_eq!(most.get(path), Some(entry), "seed {seed}, epoch {epoch}, no more {path:?}");
        }
    }
    // Served there, files without a name are found by their numbers.
    let backup = open(&there.0);
    let volume = backup.list()[0].clone();
    let other = Served::start("data", volume, ServeOptions::default()).expect("served");
    for (name, entry) in on_disk(&there.0).1 {
        if entry.mode & libc::S_IFMT == libc::S_IFREG {
            let file = other.open(Ino(entry.ino), OFlag::O_RDWR).expect("opened by number");
            let mut bytes = Vec::new();
            File::from(file).read_to_end(&mut bytes).expect("read");
            assert_eq!(xxhash_rust::xxh3::xxh3_64(&bytes), entry.bytes, "seed {seed}: {name:?}");
        }
    }
    // Workers that are in the middle of something do not keep a server from ending.
    drop(served);
    drop(workers);
}

/// VO-8
#[test]
fn what_processes_had_at_the_stop_is_what_arrives() {
    if cannot() {
        return;
    }
    let seeds = std::env::var("NILICON_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(6);
    let first = std::env::var("NILICON_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    (first..first + seeds).for_each(torture);
}
