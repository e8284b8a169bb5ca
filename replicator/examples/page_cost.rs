//! The least that a written page costs whoever protects a program: to copy it from its process, to compare it with the
//! version before, and to write what has changed of it into another process. Nothing is found, coded, encrypted, sent or
//! received here, so a checkpoint cannot cost less.
//!
//! ```text
//! cargo run --release -p replicator --example page_cost -- [MEGABYTES [PAGES [ROUNDS]]]
//! ```
//! A program on the first processor writes a word into each of so many pages of its memory, in no order; the last
//! processor does the rest, as in `nilicon bench`.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use replicator::image::pages::PAGE;
use replicator::sys::memory::{self, Range};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

struct Program {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Where its memory begins.
    at: u64,
}

impl Program {
    fn start(megabytes: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .args(["subject", &megabytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let (orders, answers) = (child.stdin.take(), child.stdout.take());
        let (orders, answers) = (orders.expect("a pipe"), BufReader::new(answers.expect("a pipe")));
        let mut program = Self { child, orders, answers, at: 0 };
        program.at = program.answer();
        program
    }

    fn answer(&mut self) -> u64 {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        line.trim().parse().expect("a number")
    }

    /// Has it write a word into these pages.
    fn write(&mut self, pages: &[usize]) {
        let words: Vec<String> = pages.iter().map(usize::to_string).collect();
        writeln!(self.orders, "{}", words.join(" ")).expect("sent");
        self.answer();
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core).expect("a processor");
    sched_setaffinity(Pid::from_raw(0), &set).expect("pinned");
}

/// The program: pages full of words, of which it changes one where it is told to.
fn subject(megabytes: usize) {
    pin(0);
    let mut all = memmap2::MmapMut::map_anon(megabytes << 20).expect("memory");
    all.advise(memmap2::Advice::NoHugePage).expect("said");
    all.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 7) as u8);
    println!("{}", all.as_ptr() as u64);
    for (round, line) in std::io::stdin().lines().enumerate() {
        for page in line.expect("an order").split_whitespace() {
            let at = page.parse::<usize>().expect("a number") * PAGE + round * 8 % PAGE;
            all[at..at + 8].copy_from_slice(&(!round as u64).to_le_bytes());
        }
        println!("{round}");
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, megabytes] = &arguments[..]
        && word == "subject"
    {
        return subject(megabytes.parse().expect("a number"));
    }
    let mut numbers = arguments.iter().map(|a| a.parse::<usize>().expect("a number"));
    let mut number = |usual| numbers.next().unwrap_or(usual);
    let (megabytes, count, rounds) = (number(100), number(2500), number(100));
    pin(std::thread::available_parallelism().map_or(1, |n| n.get()) - 1);
    let (mut program, spare) = (Program::start(megabytes), Program::start(megabytes));
    let mut shadow = vec![0; megabytes << 20];
    memory::read(program.pid(), program.at, &mut shadow).expect("read");
    let mut buffer = Vec::with_capacity(count * PAGE);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut all: [Vec<Duration>; 3] = Default::default();
    for round in 0..rounds {
        let mut pages: Vec<usize> = (0..count).map(|_| rng.usize(..shadow.len() / PAGE)).collect();
        pages.sort_unstable();
        pages.dedup();
        program.write(&pages);
        let place = |base: u64, page: &usize| base + (page * PAGE) as u64;
        let ranges: Vec<Range> =
            pages.iter().map(|p| Range { start: place(program.at, p), len: PAGE }).collect();
        let begin = Instant::now();
        buffer.clear();
        for some in ranges.chunks(512) {
            memory::read_appended(program.pid(), some, &mut buffer).expect("copied");
        }
        let copied = begin.elapsed();
        let begin = Instant::now();
        let mut changes = Vec::with_capacity(count);
        for (page, new) in pages.iter().zip(buffer.as_chunks::<PAGE>().0) {
            let old = &mut shadow[page * PAGE..][..PAGE];
            let lines = old.as_chunks_mut::<64>().0.iter_mut().zip(new.as_chunks::<64>().0);
            for (line, (old, new)) in lines.enumerate().filter(|(_, (old, new))| old != new) {
                *old = *new;
                changes.push((place(spare.at, page) + (line * 64) as u64, &new[..]));
            }
        }
        let compared = begin.elapsed();
        assert_eq!(changes.len(), pages.len(), "round {round}: a line of each page has changed");
        let begin = Instant::now();
        for some in changes.chunks(512) {
            memory::write_scattered(spare.pid(), some).expect("written");
        }
        let written = begin.elapsed();
        for (all, took) in all.iter_mut().zip([copied, compared, written]) {
            all.push(took / pages.len() as u32);
        }
    }
    println!("{megabytes} MB, {count} pages written a round, {rounds} rounds: us a page");
    println!("             50 %    99 %");
    let mut sum = Duration::ZERO;
    for (name, times) in ["copy", "compare", "write"].iter().zip(&mut all) {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
        let us = |time: Duration| time.as_nanos() as f64 / 1e3;
        println!("  {name:<8} {:>6.2}  {:>6.2}", us(at(50)), us(at(99)));
        sum += at(50);
    }
    println!("  all      {:>6.2}", sum.as_nanos() as f64 / 1e3);
}
