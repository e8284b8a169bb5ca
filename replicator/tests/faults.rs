//! Stops that look for written pages around noted faults: whatever a program does to its memory between
//! a round of pre-copy and the stop, the checkpoint is what its memory is, and what no fault tells of makes
//! the stop look everywhere. What neither tells of is found when the program runs again, before anybody gets
//! the checkpoint. Needs root and gcc, which `subjects/faults.c` is for.

mod common;

use common::shadow::{Shadow, Snapshot};
use common::{Original, Scratch};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use replicator::Epoch;
use replicator::capture::{CaptureError, Glances, StopTimes, warm_up};
use replicator::image::advice::Advice;
use replicator::image::pages::PAGE;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Whether a stop looked around notes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    AroundNotes,
    Everywhere,
    /// Around notes, and what was found afterwards was not noted.
    Wrongly,
}
use Looked::{AroundNotes, Everywhere, Wrongly};

/// When a program does something that a stop has to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Since the last stop, before a round.
    BeforeRound,
    AfterRound,
}
use When::{AfterRound, BeforeRound};

/// How often something is tried that others on the machine may disturb.
const TRIES: usize = 20;

struct Subject {
    original: Original,
    shadow: Shadow,
    snapshot: Snapshot,
    step: u64,
    /// Stops that were sealed and then refuted.
    refuted: usize,
    /// Stops whose checkpoint was there before they were confirmed, or refuted.
    early: usize,
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
        let pid = original.launched.pid;
        let snapshot = Snapshot { pid, wanted: true, ..Snapshot::default() };
        let (step, refuted, shadow) = (0, 0, Shadow::default());
        let mut me = Self { original, shadow, snapshot, step, refuted, early: 0, dir };
        me.stop(|_| ());
        // Pages may have been moved when notes began.
        for _ in 0..12 {
            std::thread::sleep(Duration::from_millis(50));
            me.stop(|_| ());
        }
        Some(me)
    }

    /// A round of pre-copy, something between, a stop; compares the checkpoint with the memory. One that is
    /// refuted, as others on the machine have moved pages, is followed by another.
    fn stop(&mut self, between: impl FnOnce(&mut Self)) -> StopTimes {
        let before = self.refuted;
        let mut stopped = self.try_stop(between);
        while let Err(error) = &stopped {
            assert!(self.refuted > before && self.refuted < before + TRIES, "{error}");
            stopped = self.try_stop(|_| ());
        }
        stopped.expect("a stop")
    }

    fn try_stop(&mut self, between: impl FnOnce(&mut Self)) -> Result<StopTimes, CaptureError> {
        let o = &mut self.original;
        o.capturer.pump().expect("it lives");
        o.capturer.prepare().expect("prepared");
        match o.epoch % 2 {
            0 => o.capturer.precopy_of_idle(),
            _ => o.capturer.precopy(),
        }
        .expect("a round");
        between(self);
        self.take()
    }

    /// A stop without a round.
    fn take(&mut self) -> Result<StopTimes, CaptureError> {
        let o = &mut self.original;
        o.epoch += 1;
        let epoch = Epoch(o.epoch);
        let snapshot = &mut self.snapshot;
        snapshot.sealed.clear();
        let taken = o.capturer.take(epoch, snapshot, &mut o.state, &mut o.pages);
        let stopped = taken.and_then(|mut taken| {
            self.early += usize::from(!taken.is_confirmed());
            o.capturer.confirm(&mut taken)?;
            assert!(taken.is_confirmed());
            Ok(taken.times())
        });
        if let Err(error) = &stopped
            && self.snapshot.sealed == [epoch]
        {
            assert!(matches!(error, CaptureError::Transient(_)), "{error}");
            self.refuted += 1;
        }
        let times = stopped?;
        self.shadow.apply(&o.state, &o.pages);
        let (compared, wrong) = self.shadow.wrong(&o.state, &self.snapshot.memory);
        assert!(compared > 20_000, "{compared} pages compared");
        assert_eq!(wrong, 0, "in epoch {}, {} noted", o.epoch, times.noted);
        Ok(times)
    }

    /// The address of a page of its area, which begins where it would put it.
    fn page(&self, number: u64) -> u64 {
        let area = self.snapshot.memory.iter().find(|(_, bytes)| bytes.len() > 80 << 20);
        let (start, _) = area.expect("its area");
        (start / (2 << 20) + 1) * (2 << 20) + number * PAGE as u64
    }

    /// Waits until its notes are believed, which takes a while once they were refuted.
    fn is_believed_again(&mut self) {
        std::thread::sleep(Duration::from_secs(2));
        self.does("9 2 store", AroundNotes);
    }

    /// Writes to a page of its area in a way that nothing notes.
    fn store_unnoted(&self, number: u64) -> impl FnOnce() + use<> {
        let (pid, at) = (self.snapshot.pid, self.page(number));
        move || {
            let memory = File::options().write(true).open(format!("/proc/{pid}/mem"));
            let written = memory.expect("its memory").write_all_at(&number.to_ne_bytes(), at + 128);
            written.expect("written");
        }
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

    fn once(&mut self, what: &str, when: When) -> Looked {
        let before = self.refuted;
        let times = match when {
            AfterRound => self.stop(|me| me.tell(what)),
            BeforeRound => {
                self.tell(what);
                self.stop(|_| ())
            }
        };
        assert_eq!(times.noted + times.doubted, 1, "{what}: one of its processes is noted");
        match times.noted {
            _ if self.refuted > before => Wrongly,
            1 => AroundNotes,
            _ => Everywhere,
        }
    }

    /// Has it do something between a round and a stop, which then looks there.
    fn does(&mut self, what: &str, looked: Looked) {
        self.does_at(what, AfterRound, looked);
    }

    fn does_at(&mut self, what: &str, when: When, looked: Looked) {
        for tries in 1.. {
            match self.once(what, when) {
                now if now == looked => break,
                AroundNotes => panic!("{what}: it was not doubted"),
                Wrongly if looked == Everywhere => panic!("{what}: it was not doubted at once"),
                Everywhere | Wrongly => {
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

/// A fault of such a page does not tell whether what lies around it is protected: all of it is looked at.
#[test]
fn a_page_that_was_not_there_is_found_around_its_note() {
    in_both_modes("parts", |subject| {
        // Others may have moved pages at the first.
        let mut parts = 0..8;
        let touch = |part| subject.once(&format!("{part} 1 touch"), AfterRound) == AroundNotes;
        assert!(parts.any(touch), "always doubted");
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

/// A window begins in a stop as well, and a round after it looks around its notes: none of it ends there.
#[test]
fn what_happens_before_a_round_counts_as_what_happens_after_it() {
    in_both_modes("before", |subject| {
        for what in ["0 0 nothing", "5 1 store", "511 3 store", "17000 60 store", "900 1 read"] {
            subject.does_at(what, BeforeRound, AroundNotes);
        }
        // Copied by the round, and written once more.
        subject.does_at("17000 60 store", BeforeRound, AroundNotes);
        subject.does("17000 60 store", AroundNotes);
        // What is doubtful may be seen before the round, which then looks everywhere: the stop need not.
        let doubtful = ["40 1 futex", "60 1 reach", "80 4 populate", "100 1 efault", "500 4 zap"];
        let mapped = ["700 3 free", "901 1 map", "903 2 protect", "40 2 new thread", "80 1 vfork"];
        for what in doubtful.into_iter().chain(mapped) {
            let seen = (0..TRIES).any(|_| subject.once(what, BeforeRound) != Wrongly);
            assert!(seen, "{what}: what was not noted was not doubted");
        }
        subject.does_at("9 2 store", BeforeRound, AroundNotes);
    });
}

#[test]
fn a_stop_without_a_round_looks_around_the_notes_since_the_stop_before() {
    in_both_modes("roundless", |subject| {
        for what in ["0 0 nothing", "5 1 store", "17000 60 store", "7000 2 load"] {
            for tries in 1.. {
                subject.does("9 2 store", AroundNotes);
                subject.tell(what);
                // If not, somebody has moved pages.
                if subject.take().is_ok_and(|times| times.noted == 1) {
                    break;
                }
                assert!(tries < TRIES, "{what}: never around the notes");
            }
        }
    });
}

/// A store of ours, past all tracepoints, is one that a stop misses, whatever the reason may be.
#[test]
fn what_was_missed_is_found_before_anybody_gets_the_checkpoint() {
    let Some(mut subject) = Subject::start("missed", Glances::Noted) else { return };
    for number in [3_000, 20_000] {
        subject.is_believed_again();
        let before = subject.refuted;
        for tries in 1.. {
            match subject.try_stop(|me| me.store_unnoted(number)()) {
                Err(_) => break,
                // It looked everywhere: somebody has moved pages.
                Ok(times) => assert!(times.doubted == 1 && tries < TRIES, "it was missed"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(subject.refuted, before + 1);
        let times = subject.try_stop(|_| ()).expect("it looks everywhere");
        assert_eq!((times.noted, times.doubted), (0, 1), "what was refuted is not believed");
    }
}

/// Without a helper nothing of the rest is looked at while the program stands still, so that its checkpoint is there
/// before it is confirmed, or refuted.
#[test]
fn what_is_taken_before_it_is_confirmed_is_the_checkpoint_if_it_is_one() {
    let all = sched_getaffinity(Pid::from_raw(0)).expect("known");
    let first = (0..CpuSet::count()).find(|cpu| all.is_set(*cpu) == Ok(true)).expect("one");
    let mut one = CpuSet::new();
    one.set(first).expect("a processor");
    sched_setaffinity(Pid::from_raw(0), &one).expect("placed");
    let Some(mut subject) = Subject::start("alone", Glances::Noted) else { return };
    subject.is_believed_again();
    assert!(subject.early > 0, "each was confirmed first");
    for number in [3_000, 20_000] {
        subject.is_believed_again();
        let (refuted, early) = (subject.refuted, subject.early);
        for _ in 0..TRIES {
            if subject.try_stop(|me| me.store_unnoted(number)()).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(subject.refuted == refuted + 1 && subject.early > early);
        // It has the pages of the one that came to nothing, too.
        subject.try_stop(|_| ()).expect("it looks everywhere");
    }
    sched_setaffinity(Pid::from_raw(0), &all).expect("as before");
}

/// The same when the program has just gone on: that stop may have looked everywhere before, and the next one, which
/// is compared with the memory, has it then.
#[test]
fn what_is_written_unnoted_after_a_stop_is_in_the_next_checkpoint() {
    let Some(mut subject) = Subject::start("after", Glances::Noted) else { return };
    for number in [3_000, 20_000] {
        subject.is_believed_again();
        subject.snapshot.afterwards = Some(Box::new(subject.store_unnoted(number)));
        subject.stop(|_| ());
        subject.snapshot.afterwards = None;
        subject.stop(|_| ());
    }
}

/// What faults while the rest is looked at is noted.
#[test]
fn a_program_that_goes_on_writing_is_believed() {
    let Some(mut subject) = Subject::start("writer", Glances::Noted) else { return };
    subject.tell("0 300 steady");
    let (mut noted, mut confirmed) = (0, Duration::ZERO);
    for _ in 0..60 {
        let times = subject.stop(|_| std::thread::sleep(Duration::from_millis(3)));
        noted += times.noted;
        confirmed += times.confirm;
    }
    let refuted = subject.refuted;
    println!(
        "{noted} of 60 stops looked around notes, {refuted} were refuted, {confirmed:?} to confirm"
    );
    assert!(noted > refuted && confirmed > Duration::ZERO);
}

/// Nothing can be said any more after the last stop of a switchover.
#[test]
fn a_stop_after_which_it_stands_still_looks_everywhere() {
    let Some(mut subject) = Subject::start("still", Glances::Noted) else { return };
    subject.does("9 2 store", AroundNotes);
    subject.original.capturer.stand_still();
    let times = subject.stop(|_| ());
    assert_eq!((times.noted, times.doubted), (0, 1));
    subject.original.capturer.go_on().expect("it goes on");
    subject.does("9 2 store", AroundNotes);
}

/// As today where nothing is shown at a glance.
#[test]
fn without_glances_nothing_is_noted() {
    let Some(mut subject) = Subject::start("off", Glances::Off) else { return };
    let times = subject.stop(|me| me.tell("9 2 store"));
    assert_eq!((times.noted, times.doubted), (0, 0));
}
