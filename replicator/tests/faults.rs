//! Stops that look for written pages around noted faults: whatever a program does to its memory between
//! a round of pre-copy and the stop, the checkpoint is what its memory is, and what no fault tells of makes
//! the stop look everywhere. Needs root and gcc, which `subjects/faults.c` is for.

mod common;

use common::shadow::{Shadow, Snapshot};
use common::{Original, Scratch};
use replicator::Epoch;
use replicator::capture::{Glances, StopTimes, warm_up};
use replicator::image::advice::Advice;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Whether a stop looked around notes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    AroundNotes,
    Everywhere,
}
use Looked::{AroundNotes, Everywhere};

/// How often something is tried that others on the machine may disturb.
const TRIES: usize = 20;

struct Subject {
    original: Original,
    shadow: Shadow,
    snapshot: Snapshot,
    step: u64,
    dir: Scratch,
}

impl Subject {
    /// None if this machine cannot do it.
    fn start(name: &str, glances: Glances) -> Option<Self> {
        if !warm_up() {
            println!("skipped: this kernel shows nothing at a glance");
            return None;
        }
        let dir = Scratch::new(&format!("faults-{name}"));
        let program = dir.0.join("faults");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/faults.c");
        let built = Command::new("gcc")
            .args(["-O1", "-pthread", "-o"])
            .args([program.as_path(), Path::new(source)])
            .status();
        if !built.is_ok_and(|status| status.success()) {
            println!("skipped: gcc does not build it");
            return None;
        }
        let [program, folder] = [&program, &dir.0].map(|p| p.to_str().expect("plain text"));
        let mut original = Original::start(&dir, &[program, folder]);
        original.capturer.set_glances(glances);
        let console = original.console();
        original.pump_until("it is ready", || said(&console).contains("ready"));
        let snapshot = Snapshot { pid: original.launched.pid, wanted: true, memory: Vec::new() };
        let mut me = Self { original, shadow: Shadow::default(), snapshot, step: 0, dir };
        me.stop(|_| ());
        // Pages may have been moved when notes began.
        for _ in 0..12 {
            std::thread::sleep(Duration::from_millis(50));
            me.stop(|_| ());
        }
        Some(me)
    }

    /// A round of pre-copy, something between, a stop; compares the checkpoint with the memory.
    fn stop(&mut self, between: impl FnOnce(&mut Self)) -> StopTimes {
        let o = &mut self.original;
        o.epoch += 1;
        o.capturer.pump().expect("it lives");
        o.capturer.prepare().expect("prepared");
        match o.epoch % 2 {
            0 => o.capturer.precopy_of_idle(),
            _ => o.capturer.precopy(),
        }
        .expect("a round");
        between(self);
        let o = &mut self.original;
        let snapshot = &mut self.snapshot;
        let stopped = o.capturer.stop(Epoch(o.epoch), snapshot, &mut o.state, &mut o.pages);
        let times = stopped.expect("a stop");
        self.shadow.apply(&o.state, &o.pages);
        let (compared, wrong) = self.shadow.wrong(&o.state, &self.snapshot.memory);
        assert!(compared > 20_000, "{compared} pages compared");
        assert_eq!(wrong, 0, "in epoch {}, {} noted", o.epoch, times.noted);
        times
    }

    /// Has it do something.
    fn tell(&mut self, what: &str) {
        self.step += 1;
        let draft = self.dir.0.join("draft");
        std::fs::write(&draft, what).expect("written");
        std::fs::rename(draft, self.dir.0.join(format!("do-{}", self.step))).expect("told");
        let (console, done) = (self.original.console(), format!("done {}\n", self.step));
        self.original.pump_until(what, || said(&console).contains(&done));
    }

    fn once(&mut self, what: &str) -> Looked {
        let times = self.stop(|me| me.tell(what));
        assert_eq!(times.noted + times.doubted, 1, "{what}: one of its processes is noted");
        if times.noted == 1 { AroundNotes } else { Everywhere }
    }

    /// Has it do something between a round and a stop, which then looks there.
    fn does(&mut self, what: &str, looked: Looked) {
        for tries in 1.. {
            match self.once(what) {
                now if now == looked => break,
                AroundNotes => panic!("{what}: it was not doubted"),
                Everywhere => {
                    assert!(tries < TRIES, "{what}: always doubted");
                    // Until no page of anybody is moved.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        println!("{what}: {looked:?}");
    }
}

/// The console, unless the program failed.
fn said(console: &Path) -> String {
    let text = std::fs::read_to_string(console).expect("console");
    assert!(!text.contains("failed"), "{text}");
    text
}

/// Each both with a comparison of notes and pages, and without.
fn in_both_modes(name: &str, of: impl Fn(&mut Subject)) {
    for glances in [Glances::Checked, Glances::Noted] {
        if let Some(mut subject) = Subject::start(name, glances) {
            of(&mut subject);
        }
    }
}

#[test]
fn what_faults_is_found_around_the_notes() {
    in_both_modes("noted", |subject| {
        for what in [
            "0 0 nothing",
            "5 1 store",
            "511 3 store",
            "17000 60 store",
            "900 1 read",
            "7000 2 load",
            "3000 5 threads",
        ] {
            subject.does(what, AroundNotes);
        }
    });
}

#[test]
fn more_faults_than_are_kept_are_doubted() {
    in_both_modes("many", |subject| {
        subject.does("0 400 store", Everywhere);
        subject.does("9 2 store", AroundNotes);
    });
}

#[test]
fn what_the_kernel_faults_for_itself_is_doubted() {
    in_both_modes("kernel", |subject| {
        for what in ["40 1 futex", "60 1 reach", "80 4 populate", "100 1 efault"] {
            subject.does(what, Everywhere);
            subject.does("9 2 store", AroundNotes);
        }
    });
}

#[test]
fn what_goes_without_a_fault_is_doubted() {
    in_both_modes("gone", |subject| {
        for what in ["500 4 zap", "700 3 free", "900 1 zap", "901 1 map", "903 2 protect"] {
            subject.does(what, Everywhere);
            subject.does("9 2 store", AroundNotes);
        }
    });
}

#[test]
fn faults_that_are_not_handled_are_doubted() {
    in_both_modes("signals", |subject| {
        subject.does("40 1 segv", Everywhere);
        subject.does("9 2 store", AroundNotes);
    });
}

#[test]
fn new_threads_and_children_are_doubted() {
    in_both_modes("children", |subject| {
        for what in ["40 2 new thread", "60 2 fork", "80 1 vfork", "90 1 spawn"] {
            subject.does(what, Everywhere);
        }
        // What the child had of its parent's is the parent's alone again, page by page.
        subject.does("2000 2 store", AroundNotes);
    });
}

/// Guards in memory that nobody has touched are made and unmade without a fault or a flush. Not compared
/// with a list of mappings: a flag of theirs changes without the count of changes.
#[test]
fn guards_are_doubted() {
    let started = Subject::start("guards", Glances::Noted);
    let of = |subject: &mut Subject| {
        let guards = |subject: &Subject| -> Vec<(u64, u64)> {
            let all = subject.original.state.processes[0].advice.iter();
            all.filter(|a| a.bits == Advice::GUARD).map(|a| (a.start, a.end)).collect()
        };
        let before = guards(subject);
        subject.does("3 1 guard", Everywhere);
        let with = guards(subject);
        assert_eq!(with.len(), before.len() + 1);
        subject.does("9 2 store", AroundNotes);
        assert_eq!(guards(subject), with);
        subject.does("41 3 guarded", Everywhere);
        subject.does("3 1 no guard", Everywhere);
        assert_eq!(guards(subject), before);
        subject.does("9 2 store", AroundNotes);
    };
    if let Some(mut subject) = started {
        of(&mut subject);
    }
}

/// Without a round before it, and after a stop that was, a stop looks everywhere.
#[test]
fn a_stop_without_a_round_looks_everywhere() {
    in_both_modes("roundless", |subject| {
        subject.does("9 2 store", AroundNotes);
        let o = &mut subject.original;
        o.epoch += 1;
        let times =
            o.capturer.stop(Epoch(o.epoch), &mut subject.snapshot, &mut o.state, &mut o.pages);
        let times = times.expect("a stop");
        assert_eq!((times.noted, times.doubted), (0, 1));
        subject.shadow.apply(&o.state, &o.pages);
        subject.does("9 2 store", AroundNotes);
    });
}

/// As today where nothing is shown at a glance.
#[test]
fn without_glances_nothing_is_noted() {
    let Some(mut subject) = Subject::start("off", Glances::Off) else { return };
    let times = subject.stop(|me| me.tell("9 2 store"));
    assert_eq!((times.noted, times.doubted), (0, 0));
}
