//! Two programs that compute and have no input, as containers without clients do: an Asian option
//! priced by Monte Carlo, and clusters found in a stream of points.
//!
//! ```text
//! thread t, step s:  random numbers of (seed, t, s) -> its memory is written anew -> its own sum
//! connection:        any line in -> "STEPS RESULT" out; RESULT is "-" until all steps are done
//! ```
//! Invariant: the result depends on the seed, the number of threads and the number of steps alone, not
//! on time or on the order in which threads run. So the same program, moved to another host in the
//! middle of its work, must come to the same result.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};

/// Paths of one step, and moments of a path.
const PATHS: usize = 256;
const MOMENTS: usize = 64;
/// Points of one step, their dimensions, and the clusters.
const POINTS: usize = 512;
const DIMENSIONS: usize = 32;
const CLUSTERS: usize = 20;
/// The option: what it is about today, its price then, the rate, how much it moves, and years.
const SPOT: f64 = 100.0;
const STRIKE: f64 = 105.0;
const RATE: f64 = 0.03;
const MOVES: f64 = 0.25;
const YEARS: f64 = 1.0;

/// `__compute`.
#[derive(Debug, Clone, Args)]
pub(super) struct ComputeArgs {
    /// What it computes.
    #[arg(value_enum)]
    problem: Problem,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Seed of its random numbers.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps of each thread; without it, it goes on for ever.
    #[arg(long)]
    steps: Option<u64>,
    /// Where it tells how far it is; without it, it prints its result and ends.
    #[arg(long)]
    listen: Option<std::net::SocketAddr>,
}

/// What can be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Problem {
    /// The price of an Asian option, by Monte Carlo.
    Options,
    /// Clusters in a stream of points.
    Clusters,
}

/// What one thread does, a step at a time.
trait Worker {
    fn step(&mut self, random: &mut fastrand::Rng);
    /// What it has found.
    fn result(&self) -> u64;
}

/// Prices of all paths of a step, and the payoffs so far in millionths.
struct Options {
    prices: Vec<f64>,
    payoffs: u64,
}

impl Options {
    fn new() -> Self {
        Self { prices: vec![0.0; PATHS * MOMENTS], payoffs: 0 }
    }
}

impl Worker for Options {
    fn step(&mut self, random: &mut fastrand::Rng) {
        let step = YEARS / MOMENTS as f64;
        let (drift, spread) = ((RATE - MOVES * MOVES / 2.0) * step, MOVES * step.sqrt());
        for path in self.prices.chunks_exact_mut(MOMENTS) {
            let mut price = SPOT;
            for moment in path.iter_mut() {
                price *= (drift + spread * normal(random)).exp();
                *moment = price;
            }
        }
        for path in self.prices.chunks_exact(MOMENTS) {
            let mean = path.iter().sum::<f64>() / MOMENTS as f64;
            let payoff = (mean - STRIKE).max(0.0) * (-RATE * YEARS).exp();
            self.payoffs += (payoff * 1e6) as u64;
        }
    }

    fn result(&self) -> u64 {
        self.payoffs
    }
}

/// A number of the standard normal distribution, nearly: the sum of twelve even ones.
fn normal(random: &mut fastrand::Rng) -> f64 {
    (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
}

/// The points of a step, and the centres that follow them.
struct Clusters {
    points: Vec<f32>,
    centres: Vec<f32>,
    counts: [u32; CLUSTERS],
}

impl Clusters {
    fn new() -> Self {
        let spread = |index: usize| (index % 97) as f32 / 97.0;
        Self {
            points: vec![0.0; POINTS * DIMENSIONS],
            centres: (0..CLUSTERS * DIMENSIONS).map(|index| spread(index * 31)).collect(),
            counts: [1; CLUSTERS],
        }
    }
}

impl Worker for Clusters {
    fn step(&mut self, random: &mut fastrand::Rng) {
        self.points.iter_mut().for_each(|value| *value = random.f32());
        for point in self.points.chunks_exact(DIMENSIONS) {
            let distance = |centre: &[f32]| -> f32 {
                centre.iter().zip(point).map(|(c, p)| (c - p) * (c - p)).sum()
            };
            let centres = self.centres.chunks_exact(DIMENSIONS).map(distance).enumerate();
            let nearest = centres.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(index, _)| index);
            // A centre forgets slowly, as its stream goes on.
            self.counts[nearest] = (self.counts[nearest] + 1).min(10_000);
            let part = 1.0 / self.counts[nearest] as f32;
            let centre = &mut self.centres[nearest * DIMENSIONS..][..DIMENSIONS];
            centre.iter_mut().zip(point).for_each(|(c, p)| *c += (p - *c) * part);
        }
    }

    fn result(&self) -> u64 {
        self.centres.iter().fold(0, |sum, value| mixed(sum, u64::from(value.to_bits())))
    }
}

fn mixed(sum: u64, value: u64) -> u64 {
    (sum ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// How far all threads are, and what they have found.
struct Progress {
    done: AtomicU64,
    /// One a thread; 0 until it has done all its steps.
    results: Vec<AtomicU64>,
}

impl Progress {
    /// What all have found together, once they have.
    fn result(&self) -> Option<u64> {
        self.results.iter().try_fold(0, |sum, result| match result.load(Ordering::Acquire) {
            0 => None,
            result => Some(mixed(sum, result)),
        })
    }

    fn line(&self) -> String {
        let result = self.result().map_or("-".to_owned(), |result| format!("{result:016x}"));
        format!("{} {result}\n", self.done.load(Ordering::Acquire))
    }
}

/// One thread's steps; for ever, if there is no number of them.
fn work(worker: &mut dyn Worker, args: &ComputeArgs, thread: usize, progress: &Progress) {
    let mut step = 0;
    while args.steps.is_none_or(|steps| step < steps) {
        let seed = mixed(mixed(args.seed, thread as u64 + 1), step);
        worker.step(&mut fastrand::Rng::with_seed(seed));
        step += 1;
        progress.done.fetch_add(1, Ordering::AcqRel);
    }
    // A result of 0 would look like none.
    progress.results[thread].store(worker.result().max(1), Ordering::Release);
}

/// `nilicon __compute`.
pub(super) fn compute(args: &ComputeArgs) -> Result<()> {
    let results = (0..args.threads.max(1)).map(|_| AtomicU64::new(0)).collect();
    let progress = Arc::new(Progress { done: AtomicU64::new(0), results });
    // Before any work, so that whoever waits for it to be ready measures all of it.
    let listener = match args.listen {
        Some(address) => Some(TcpListener::bind(address).context("cannot listen")?),
        None => None,
    };
    let threads: Vec<_> = (0..args.threads.max(1))
        .map(|thread| {
            let (args, progress) = (args.clone(), progress.clone());
            thread::spawn(move || {
                let mut worker: Box<dyn Worker> = match args.problem {
                    Problem::Options => Box::new(Options::new()),
                    Problem::Clusters => Box::new(Clusters::new()),
                };
                work(&mut *worker, &args, thread, &progress);
            })
        })
        .collect();
    if let Some(listener) = listener {
        for stream in listener.incoming() {
            let (stream, progress) = (stream?, progress.clone());
            // A client that goes away is no matter.
            thread::spawn(move || tell(stream, &progress));
        }
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread has panicked"))?;
    }
    print!("{}", progress.line());
    Ok(())
}

fn tell(mut stream: TcpStream, progress: &Progress) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let asked = BufReader::new(stream.try_clone()?);
    for line in asked.lines() {
        line?;
        stream.write_all(progress.line().as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(problem: Problem) -> ComputeArgs {
        ComputeArgs { problem, threads: 1, seed: 1, steps: Some(3), listen: None }
    }

    fn result(args: &ComputeArgs, worker: &mut dyn Worker) -> u64 {
        let progress = Progress { done: AtomicU64::new(0), results: vec![AtomicU64::new(0)] };
        assert_eq!(progress.line(), "0 -\n");
        work(worker, args, 0, &progress);
        assert_eq!(progress.done.load(Ordering::Relaxed), 3);
        progress.result().unwrap()
    }

    #[test]
    fn the_result_depends_on_the_seed_alone() {
        for problem in [Problem::Options, Problem::Clusters] {
            let of = |seed| {
                let args = ComputeArgs { seed, ..args(problem) };
                match problem {
                    Problem::Options => result(&args, &mut Options::new()),
                    Problem::Clusters => result(&args, &mut Clusters::new()),
                }
            };
            assert_eq!(of(1), of(1));
            assert_ne!(of(1), of(2));
        }
    }

    #[test]
    fn the_price_is_about_right() {
        let mut options = Options::new();
        let steps = 40;
        for step in 0..steps {
            options.step(&mut fastrand::Rng::with_seed(step));
        }
        let price = options.payoffs as f64 / 1e6 / (steps * PATHS as u64) as f64;
        // The exact price of the geometric mean is 4.0; the arithmetic one is a little dearer.
        assert!((3.5..5.0).contains(&price), "{price}");
    }
}
