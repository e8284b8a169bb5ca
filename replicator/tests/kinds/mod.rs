//! Programs that hold many kinds of objects at once, and look at every property of each after a
//! failover. They are the test program itself, run in a container.
//!
//! Each kind is a function in a thread of its own. It sets its object up, changes it after
//! [`Stage::first`] (between two epochs), and checks it after [`Stage::last`] (brought to life
//! again). The program prints `kind NAME ok` or `kind NAME FAILED: why` for each.

#![allow(unreachable_pub, reason = "part of a test program")]

pub mod files;
pub mod internet;
pub mod terminals;
pub mod unix;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Made in the working directory by the test to let the program go on.
pub const CHANGE: &str = "change";
pub const VERIFY: &str = "verify";

/// A kind by its name.
pub type Kind = (&'static str, fn(&Stage));

#[derive(Default)]
struct Progress {
    /// How many kinds have come to each point, or will not.
    arrived: [usize; 2],
    passed: usize,
}

/// Where a kind's function waits for the test.
pub struct Stage {
    shared: Arc<(Mutex<Progress>, Condvar)>,
    waited: std::cell::Cell<usize>,
}

impl Stage {
    fn wait(&self, point: usize) {
        assert_eq!(self.waited.replace(point + 1), point, "the points come in order");
        let (progress, changed) = &*self.shared;
        let mut progress = progress.lock().expect("no panic");
        progress.arrived[point] += 1;
        changed.notify_all();
        while progress.passed <= point {
            progress = changed.wait(progress).expect("no panic");
        }
    }

    /// Returns when a first checkpoint was taken.
    pub fn first(&self) {
        self.wait(0);
    }

    /// Returns in the program that was brought to life again.
    pub fn last(&self) {
        self.wait(1);
    }
}

/// Runs a program with these kinds, and then sleeps. Every word has a line of its own, whatever
/// others have begun to print.
pub fn run(kinds: &[Kind]) -> ! {
    let shared: Arc<(Mutex<Progress>, Condvar)> = Arc::default();
    let threads: Vec<_> = kinds.iter().map(|(name, kind)| start(name, *kind, &shared)).collect();
    let (progress, changed) = &*shared;
    for (point, (word, file)) in [("ready", CHANGE), ("changed", VERIFY)].iter().enumerate() {
        let mut now = progress.lock().expect("no panic");
        while now.arrived[point] < kinds.len() {
            now = changed.wait(now).expect("no panic");
        }
        drop(now);
        println!("\n{word}");
        while !Path::new(file).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        progress.lock().expect("no panic").passed = point + 1;
        changed.notify_all();
    }
    for thread in threads {
        thread.join().expect("no panic");
    }
    println!("\ndone");
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn start(
    name: &'static str,
    kind: fn(&Stage),
    shared: &Arc<(Mutex<Progress>, Condvar)>,
) -> std::thread::JoinHandle<()> {
    let shared = shared.clone();
    std::thread::spawn(move || {
        let stage = Stage { shared: shared.clone(), waited: Default::default() };
        let result = catch_unwind(AssertUnwindSafe(|| kind(&stage)));
        let mut progress = shared.0.lock().expect("no panic");
        for point in stage.waited.get()..2 {
            progress.arrived[point] += 1;
        }
        shared.1.notify_all();
        match result {
            Ok(()) if stage.waited.get() == 2 => println!("\nkind {name} ok"),
            Ok(()) => println!("\nkind {name} FAILED: it did not wait for the test"),
            Err(why) => {
                let text = why.downcast_ref::<String>().map(String::as_str);
                let text = text.or(why.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                println!("\nkind {name} FAILED: {}", text.replace('\n', " "));
            }
        }
    })
}
