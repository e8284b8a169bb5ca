//! What a stop allocates while the container stands still (decision 92): for its threads and for what has changed, never for
//! how much there is of it.

use replicator::Epoch;
use replicator::capture::{Boundary, CaptureError, Capturer};
use replicator::image::State;
use replicator::image::pages::PageSet;
use replicator::sys::unix_diag::UnixDiag;
use stats_alloc::{INSTRUMENTED_SYSTEM, Stats, StatsAlloc};
use std::alloc::System;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Counts from the moment input is held until output is sealed.
#[derive(Default)]
struct Counter {
    begin: Stats,
    allocations: usize,
    bytes: usize,
}

impl Boundary for Counter {
    fn hold_input(&mut self) {
        self.begin = ALLOCATOR.stats();
    }

    fn seal(&mut self, _: Epoch) {
        let now = ALLOCATOR.stats();
        let since = now - self.begin;
        self.allocations = since.allocations + since.reallocations;
        self.bytes = since.bytes_allocated;
    }

    fn release_input(&mut self) {}
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program that has so many megabytes, mappings of their own and pipes, and writes into two pages now and then.
fn program(megabytes: usize, mappings: usize, pipes: usize) -> Killed {
    let script = format!(
        "import mmap, os, time\n\
         data = bytearray(b'x') * ({megabytes} << 20)\n\
         # Neighbours that may not be joined.\n\
         maps = [mmap.mmap(-1, 4096, prot=1 + i % 2 * 2, flags=34) for i in range({mappings})]\n\
         pipes = [os.pipe() for _ in range({pipes})]\n\
         print('ready', flush=True)\n\
         while True:\n    \
             data[5] = data[9000] = data[5] ^ 1\n    \
             time.sleep(0.002)\n"
    );
    let mut child = Command::new("python3")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let mut line = String::new();
    let out = child.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("a word");
    assert_eq!(line, "ready\n");
    Killed(child)
}

/// Allocations and bytes of the median stop, once stops have settled.
fn measure(program: &Killed) -> (usize, usize) {
    let diag = UnixDiag::open().expect("diag");
    let mut capturer = Capturer::adopt(program.0.id() as i32, diag).expect("adopted");
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut all = Vec::new();
    for epoch in 1..=60 {
        let mut counter = Counter::default();
        let mut stop = || {
            capturer.pump()?;
            capturer.prepare()?;
            capturer.precopy()?;
            capturer.stop(Epoch(epoch), &mut counter, &mut state, &mut pages)
        };
        match stop() {
            Ok(_) if epoch > 20 => all.push((counter.allocations, counter.bytes)),
            Ok(_) | Err(CaptureError::Transient(_)) => {}
            Err(error) => panic!("no stop: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(all.len() > 20, "{} stops", all.len());
    all.sort_unstable();
    all[all.len() / 2]
}

#[test]
fn a_stop_allocates_for_what_has_changed_and_not_for_what_there_is() {
    let small = measure(&program(1, 0, 0));
    let large = measure(&program(200, 400, 200));
    println!("allocations and bytes of a stop: {small:?}, of a large program {large:?}");
    assert!(small.0 > 0, "something is counted");
    // Lists of what there is grow by doubling.
    assert!(large.0 <= small.0 + 30, "{small:?}, {large:?}");
    assert!(large.1 <= small.1 + (64 << 10), "{small:?}, {large:?}");
}
