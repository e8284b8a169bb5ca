//! Reads past the page cache: the kernel pins their pages, and what it brings comes past the page tables
//! by which written pages are seen. A file system of the test answers such a read when the program has
//! been through a round of pre-copy. Needs root and python3.

mod common;
#[path = "direct/late.rs"]
mod late;

use common::{Original, Scratch, wait_until};
use late::Late;
use replicator::capture::Glances;
use replicator::restore::{Peer, Spare};
use std::path::{Path, PathBuf};
use std::process::Command;

const PYTHON: &str = "/usr/bin/python3";

/// A program of `subjects/direct.py`, captured once, and its file.
struct Subject {
    original: Original,
    spare: Spare,
    // Each goes before what it is on.
    _disk: Option<Disk>,
    late: Late,
    dir: Scratch,
}

/// Where the program reads from.
enum Source {
    /// A file of the late file system.
    File,
    /// One that its server has read so however it was opened.
    Straight,
    /// A disk whose contents are a file of the late file system.
    Disk,
    /// An ordinary file, read through the page cache.
    Cached,
}

impl Subject {
    /// None if this machine cannot do it.
    fn start(source: &Source, memory: &str, what: &str, glances: Glances) -> Option<Self> {
        if !Path::new(PYTHON).exists() {
            println!("skipped: {PYTHON} is not there");
            return None;
        }
        let dir = Scratch::new(&format!("direct-{memory}-{what}"));
        let late = Late::mount(&dir.0.join("late"))?;
        let (path, how, disk) = match source {
            Source::File => (late.path("file"), "direct", None),
            Source::Straight => (late.path("straight"), "plain", None),
            Source::Disk => {
                let disk = Disk::of(&late.path("file"))?;
                (disk.0.clone(), "direct", Some(disk))
            }
            Source::Cached => {
                let path = dir.0.join("cached");
                std::fs::copy(late.path("file"), &path).expect("copied");
                (path, "plain", None)
            }
        };
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/direct.py");
        let [folder, path] = [&dir.0, &path].map(|p| p.to_str().expect("a path of plain text"));
        let command = [PYTHON, "-B", program, folder, path, how, memory, what];
        let mut original = Original::start(&dir, &command);
        original.capturer.set_glances(glances);
        let console = original.console();
        original.pump_until("it is ready", || read(&console).contains("ready"));
        original.checkpoint();
        original.capturer.begin_full();
        original.checkpoint();
        let mut spare = original.spare();
        original.bring(&mut spare);
        // Nothing of the first copy is left to be taken.
        original.follow(&mut spare);
        Some(Self { original, spare, _disk: disk, late, dir })
    }

    fn tell(&self, word: &str) {
        std::fs::write(self.dir.0.join(word), "").expect("written");
    }

    fn wait_for(&mut self, word: &str) {
        let console = self.original.console();
        self.original.pump_until(&format!("it says {word}"), || read(&console).contains(word));
    }

    /// A round of pre-copy of the one kind or the other.
    fn round(&mut self, of_idle: bool) {
        let capturer = &mut self.original.capturer;
        capturer.prepare().expect("nothing new");
        let copied = if of_idle { capturer.precopy_of_idle() } else { capturer.precopy() };
        copied.expect("a round");
    }

    /// The next checkpoint, with a round before it. Gives the number of pages that were read again.
    fn checkpoint(&mut self) -> usize {
        let times = self.original.checkpoint();
        self.original.bring(&mut self.spare);
        times.again
    }

    /// Lets the last checkpoint go on; gives what it finds.
    fn finds(mut self) -> String {
        let console = self.original.kill();
        self.spare.prepare().expect("prepare");
        self.spare.connect(|_| Peer::Silent).expect("connect");
        self.spare.push_unsent().expect("nothing to send");
        self.spare.complete().expect("complete");
        self.spare.detach_all().expect("let go");
        std::fs::write(self.dir.0.join("look"), "").expect("written");
        wait_until("it says what is there", || read(&console).contains("found"));
        read(&console).lines().last().unwrap_or_default().to_owned()
    }
}

/// The console, unless the program failed.
fn read(console: &Path) -> String {
    let text = std::fs::read_to_string(console).expect("console");
    assert!(!text.contains("Traceback") && !text.contains("Error"), "{text}");
    text
}

/// A loop device, which goes with the test.
struct Disk(PathBuf);

impl Disk {
    fn of(file: &Path) -> Option<Self> {
        let made =
            Command::new("losetup").args(["--read-only", "--find", "--show"]).arg(file).output();
        let made = made.ok().filter(|made| made.status.success());
        let path = made.map(|made| String::from_utf8_lossy(&made.stdout).trim().to_owned());
        if path.is_none() {
            println!("skipped: there are no loop devices");
        }
        path.map(|path| Self(path.into()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A round of pre-copy while the read is under way; the answer; a stop.
fn read_late(source: Source, memory: &str, what: &str, glances: Glances) {
    let Some(mut subject) = Subject::start(&source, memory, what, glances) else { return };
    subject.late.hold();
    subject.tell("read");
    subject.original.pump_until("it reads", || subject.late.is_asked());
    if what == "closed" {
        subject.tell("close");
        subject.wait_for("closed");
    }
    subject.round(!matches!(source, Source::File));
    subject.late.answer();
    subject.wait_for("done");
    assert_ne!(subject.checkpoint(), 0);
    assert_eq!(subject.checkpoint(), 0, "nothing was read meanwhile");
    assert_eq!(subject.finds(), "found all");
}

#[test]
fn what_a_direct_read_brings_between_a_round_and_the_stop_is_captured() {
    for source in [Source::File, Source::Straight] {
        read_late(source, "private", "open", Glances::On);
    }
}

#[test]
fn so_it_is_in_shared_memory() {
    read_late(Source::File, "shared", "open", Glances::On);
}

#[test]
fn so_it_is_without_glances() {
    for source in [Source::File, Source::Straight] {
        read_late(source, "private", "open", Glances::Off);
    }
}

/// No look at descriptors has shown it: what the kernel counts as read does.
#[test]
fn so_it_is_of_a_descriptor_that_is_closed_while_it_is_read() {
    for glances in [Glances::On, Glances::Off] {
        read_late(Source::Disk, "private", "closed", glances);
    }
}

/// Reads and stores at any moment, with rounds and stops in between. Gives the number of pages that were read
/// again.
fn read_always(source: &Source, memory: &str) -> Option<usize> {
    let mut subject = Subject::start(source, memory, "always", Glances::On)?;
    subject.tell("read");
    let mut again = 0;
    for stop in 0..60 {
        subject.round(stop % 2 == 0);
        again += subject.checkpoint();
    }
    println!("{memory}: {again} pages were read again in 60 stops");
    assert_eq!(subject.finds(), "found all", "{memory}");
    Some(again)
}

#[test]
fn whatever_is_read_and_written_meanwhile_is_whole() {
    for memory in ["private", "shared"] {
        assert_ne!(read_always(&Source::File, memory), Some(0));
    }
}

#[test]
fn reads_through_the_page_cache_cost_nothing() {
    assert!(read_always(&Source::Cached, "private").is_none_or(|again| again == 0));
}

/// A first copy is much, and so would be the stop.
#[test]
fn much_is_read_again_before_the_stop() {
    let started = Subject::start(&Source::File, "private", "always", Glances::On);
    let Some(mut subject) = started else { return };
    subject.tell("read");
    // In the first round all memory is taken.
    subject.original.capturer.begin_full();
    subject.original.capturer.prepare().expect("watched anew");
    let all = subject.original.capturer.precopy().expect("a round");
    let again = subject.original.checkpoint().again;
    println!("{again} of {all} pages were read again in the stop");
    assert!(all > 4096 && again < all / 4, "{again} of {all}");
    subject.spare = subject.original.spare();
    subject.original.bring(&mut subject.spare);
    assert_eq!(subject.finds(), "found all");
}
