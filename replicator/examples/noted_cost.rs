//! What notes of a program's faults (docs/decisions.md, 79) cost the others on the host: faults, and mappings made
//! and unmade, of a process that nobody looks at, in turns while faults of another one are noted and while
//! none are.
//!
//! ```text
//! cargo run --release -p replicator --example noted_cost -- [ROUNDS]
//! ```

use replicator::Epoch;
use replicator::capture::{Capturer, Glances, NoBoundary, StopTimes, warm_up};
use replicator::image::State;
use replicator::image::pages::{PAGE, PageSet};
use replicator::sys::unix_diag::UnixDiag;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of the program whose faults are noted: more than the least that is worth notes.
const SUBJECT: &str =
    "import time; x = bytearray(400 << 20); print('x', flush=True); time.sleep(600)";
const PAGES: usize = 16_384;
const MAPPINGS: usize = 20_000;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Nanoseconds of one fault, and of one mapping that is made and unmade.
fn measure() -> [f64; 2] {
    let mut memory = memmap2::MmapMut::map_anon(PAGES * PAGE).expect("memory");
    memory.advise(memmap2::Advice::NoHugePage).expect("said");
    let begin = Instant::now();
    memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    let faults = begin.elapsed();
    let begin = Instant::now();
    for _ in 0..MAPPINGS {
        drop(memmap2::MmapMut::map_anon(PAGE).expect("memory"));
    }
    let mappings = begin.elapsed();
    let each = |time: Duration, count: usize| time.as_nanos() as f64 / count as f64;
    [each(faults, PAGES), each(mappings, MAPPINGS)]
}

/// Stops until one has looked around notes.
fn begin_notes(pid: i32) -> Capturer {
    let diag = UnixDiag::open().expect("diag");
    let mut capturer = Capturer::adopt(pid, diag).expect("adopted");
    capturer.set_glances(Glances::Noted);
    let (mut state, mut pages) = (State::default(), PageSet::default());
    for epoch in 1..1000 {
        let mut stop = || {
            capturer.pump()?;
            capturer.prepare()?;
            capturer.precopy()?;
            capturer.stop(Epoch(epoch), &mut NoBoundary, &mut state, &mut pages)
        };
        if stop().is_ok_and(|StopTimes { noted, .. }| noted > 0) {
            return capturer;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("no stop believes its notes");
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(9, |a| a.parse().expect("a number of rounds"));
    if !warm_up() {
        println!("this kernel shows nothing at a glance, and faults are not noted");
        return;
    }
    let child = Command::new("python3").args(["-c", SUBJECT]).stdout(Stdio::piped()).spawn();
    let mut child = Killed(child.expect("python3"));
    child.0.stdout.take().expect("a pipe").read_exact(&mut [0]).expect("it is ready");
    let pid = child.0.id() as i32;
    let mut all: [[Vec<f64>; 2]; 2] = Default::default();
    for round in 0..2 * rounds {
        let capturer = (round % 2 == 1).then(|| begin_notes(pid));
        measure();
        for (values, value) in all[round % 2].iter_mut().zip(measure()) {
            values.push(value);
        }
        if let Some(capturer) = capturer {
            capturer.detach().expect("let go");
        }
    }
    println!("ns, median of {rounds} rounds each: without notes, with notes, ratio");
    let [without, with] = all.map(|both| {
        both.map(|mut values| {
            values.sort_unstable_by(f64::total_cmp);
            values[values.len() / 2]
        })
    });
    for (i, what) in ["fault", "mmap and munmap"].iter().enumerate() {
        println!("{what:<16} {:>7.0} {:>7.0} {:>6.3}", without[i], with[i], with[i] / without[i]);
    }
}
