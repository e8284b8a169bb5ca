//! Volumes on the real kernel: processes work in a mount namespace of their own on a volume that is
//! served through FUSE, are stopped at any moment, and what a checkpoint brings to another
//! directory is what they had, byte by byte, wherever its commit is killed. Needs root.
//!
//! What is tested is in [`torture`], [`served`] and [`full`]. `NILICON_SEEDS` sets the number of seeds of
//! the torture, `NILICON_SEED` the first. The processes are this program again, with their part in
//! `NILICON_PART`.

mod full;
mod process;
mod served;
mod torture;
mod tree;
mod work;

use replicator::volume::Volumes;
use replicator::{Epoch, Generation};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const PART: &str = "NILICON_PART";

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("nilicon-files-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("a directory for the test");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cannot() -> bool {
    let may = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !may {
        eprintln!("not run: needs root and /dev/fuse");
    }
    !may
}

fn open(base: &Path) -> Volumes {
    Volumes::open(base, &["data".into()], false).expect("the volume opens")
}

/// What this program is when it was started by itself; in a run of the tests it is nothing.
#[test]
fn part() {
    let Ok(part) = std::env::var(PART) else { return };
    let words: Vec<&str> = part.split(' ').collect();
    match words[..] {
        ["hold"] => process::hold(),
        ["work", holder, at, seed] => {
            work::work(holder, Path::new(at), seed.parse().expect("a number"));
        }
        ["commit", base, payload, epoch] => {
            // What came ahead of it is there already.
            let volumes = Volumes::open_as_it_is(Path::new(base), &["data".into()], false);
            let volumes = volumes.expect("opens");
            let payload = fs::read(payload).expect("a payload");
            println!("ready");
            let epoch = Epoch(epoch.parse().expect("a number"));
            volumes.commit(Generation::FIRST, epoch, &payload).expect("it is carried out");
        }
        _ => panic!("no part: {part}"),
    }
}
