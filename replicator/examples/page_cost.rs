//! The least that a written page costs whoever protects a program: to copy it from its process, to compare it with the
//! version before, and to write what has changed of it into another process. Nothing is found, coded, encrypted, sent or
//! received here, so a checkpoint cannot cost less.
//!
//! ```text
//! cargo run --release -p replicator --example page_cost -- [MEGABYTES [PAGES [ROUNDS]]]
//! ```
//! In turns, all pages of a round are copied before the first is compared, as in a checkpoint, and so few at a time that
//! copies stay in the processor's cache.
//!
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
    let mut rng = fastrand::Rng::with_seed(1);
    let ways = [usize::MAX, 256, 64, 16];
    let mut all: [[Vec<Duration>; 3]; 4] = Default::default();
    for round in 0..rounds * ways.len() {
        let mut pages: Vec<usize> = (0..count).map(|_| rng.usize(..shadow.len() / PAGE)).collect();
        pages.sort_unstable();
        pages.dedup();
        program.write(&pages);
        let way = round % ways.len();
        let (mut buffer, mut took) =
            (Vec::with_capacity(count.min(ways[way]) * PAGE), [Duration::ZERO; 3]);
        let mut changed = 0;
        for some in pages.chunks(ways[way]) {
            let begin = Instant::now();
            copy(&program, some, &mut buffer);
            took[0] += begin.elapsed();
            let begin = Instant::now();
            let changes = compare(&mut shadow, some, &buffer, spare.at);
            took[1] += begin.elapsed();
            let begin = Instant::now();
            for some in changes.chunks(512) {
                memory::write_scattered(spare.pid(), some).expect("written");
            }
            took[2] += begin.elapsed();
            changed += changes.len();
        }
        assert_eq!(changed, pages.len(), "round {round}: a line of each page has changed");
        for (all, took) in all[way].iter_mut().zip(took) {
            all.push(took / pages.len() as u32);
        }
    }
    println!(
        "{megabytes} MB, {count} pages written a round, {rounds} rounds each: us a page, 50 %"
    );
    println!("  at a time     copy  compare    write      all");
    for (way, all) in ways.iter().zip(&mut all) {
        let median = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            times[times.len() / 2].as_nanos() as f64 / 1e3
        };
        let [copy, compare, write] = all.each_mut().map(median);
        let at_a_time = if *way == usize::MAX { "all".to_owned() } else { way.to_string() };
        let sum = copy + compare + write;
        println!("  {at_a_time:<9} {copy:>8.2} {compare:>8.2} {write:>8.2} {sum:>8.2}");
    }
}

/// Copies these pages of a program.
fn copy(program: &Program, pages: &[usize], buffer: &mut Vec<u8>) {
    buffer.clear();
    let range = |page: &usize| Range { start: program.at + (page * PAGE) as u64, len: PAGE };
    let ranges: Vec<Range> = pages.iter().map(range).collect();
    for some in ranges.chunks(512) {
        memory::read_appended(program.pid(), some, buffer).expect("copied");
    }
}

/// Makes the versions before the ones in `buffer`; gives the lines that differ and where they belong in a program whose
/// memory begins at `at`.
fn compare<'a>(
    shadow: &mut [u8],
    pages: &[usize],
    buffer: &'a [u8],
    at: u64,
) -> Vec<(u64, &'a [u8])> {
    let mut changes = Vec::with_capacity(pages.len());
    for (page, new) in pages.iter().zip(buffer.as_chunks::<PAGE>().0) {
        let old = &mut shadow[page * PAGE..][..PAGE];
        let lines = old.as_chunks_mut::<64>().0.iter_mut().zip(new.as_chunks::<64>().0);
        for (line, (old, new)) in lines.enumerate().filter(|(_, (old, new))| old != new) {
            *old = *new;
            changes.push((at + (page * PAGE + line * 64) as u64, &new[..]));
        }
    }
    changes
}
