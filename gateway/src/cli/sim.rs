//! `nilicon sim`: runs of the simulation by their seeds, and what happened in them.
//!
//! Invariant: a finding ends with the code of a failure, and names the seed that repeats it.

use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::{Result, bail};
use replicator::protocol::simulation::{Mistake, Outcome, simulate};
use serde::Serialize;

use super::args::{Output, SimArgs};
use super::numbers::grouped;
use super::progress::Progress;
use super::signals;

/// Lines that are told of what happened before a finding.
const LAST: usize = 60;
/// Lines that are told of the run of a single seed.
const ALL: usize = 200_000;

/// What runs of the simulation found.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct SimReport {
    /// The first seed.
    seed: u64,
    /// Seeds that were run.
    seeds: u64,
    steps: u32,
    mutation: Option<&'static str>,
    /// How often what happened, over all runs that came to their end.
    counts: BTreeMap<&'static str, u64>,
    found: Option<Finding>,
    /// What happened, if there was but one seed.
    trace: Vec<String>,
}

/// A check that did not hold.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Finding {
    seed: u64,
    what: String,
    /// The last that happened before.
    trace: Vec<String>,
    /// The command that repeats it.
    repeat: String,
}

/// `nilicon sim`. Returns whether nothing was found.
pub(super) fn sim(args: &SimArgs) -> Result<bool> {
    signals::catch()?;
    let Some(end) = args.seed.checked_add(args.seeds) else {
        bail!("there are no {} seeds from {} on", args.seeds, args.seed)
    };
    let hook = std::panic::take_hook();
    // A check that does not hold is a finding, and told as one.
    std::panic::set_hook(Box::new(|_| {}));
    let report = run(args, end);
    std::panic::set_hook(hook);
    let report = report?;
    let text = match args.output.output {
        Output::Json => serde_json::to_string_pretty(&report)? + "\n",
        Output::Text => text(&report),
    };
    // A trace is long, and whoever has read enough of it closes the pipe.
    let _ = io::stdout().lock().write_all(text.as_bytes());
    Ok(report.found.is_none())
}

fn run(args: &SimArgs, end: u64) -> Result<SimReport> {
    let mistake = args.mutation.map(Mutation::mistake);
    let mut report = SimReport {
        seed: args.seed,
        seeds: 0,
        steps: args.steps,
        mutation: args.mutation.map(Mutation::name),
        counts: BTreeMap::new(),
        found: None,
        trace: Vec::new(),
    };
    let mut progress = Progress::new();
    let lines = if args.seeds == 1 { ALL } else { 0 };
    for seed in args.seed..end {
        signals::check()?;
        progress.update(|| format!("seed {seed}, {} to go", end - seed));
        let outcome = simulate(seed, args.steps, mistake, lines);
        report.seeds += 1;
        for (name, count) in &outcome.counts {
            *report.counts.entry(name).or_default() += count;
        }
        if let Some(what) = outcome.finding {
            // The same again, this time with what happens.
            let Outcome { mut trace, .. } = simulate(seed, args.steps, mistake, LAST.max(lines));
            let last = trace.split_off(trace.len().saturating_sub(LAST));
            let repeat = repeat(args, seed);
            report.found = Some(Finding { seed, what, trace: last, repeat });
            report.trace = trace;
            break;
        }
        report.trace = outcome.trace;
    }
    progress.clear();
    Ok(report)
}

/// The command that repeats one run.
fn repeat(args: &SimArgs, seed: u64) -> String {
    let mutation = args
        .mutation
        .map_or_else(String::new, |mutation| format!(" --mutation {}", mutation.name()));
    format!("nilicon sim --seed {seed} --steps {}{mutation}", args.steps)
}

fn text(report: &SimReport) -> String {
    let mut lines = report.trace.clone();
    let with = report.mutation.map_or_else(String::new, |name| format!(" with {name}"));
    if let Some(Finding { seed, what, trace, repeat }) = &report.found {
        lines.extend(trace.iter().cloned());
        lines.push(format!("seed {seed}{with}: FOUND: {what}"));
        lines.push(format!("  after {} seeds; repeat it with: {repeat}", report.seeds));
    } else {
        let SimReport { seed, seeds, steps, .. } = report;
        lines.push(format!("{seeds} seeds from {seed}{with}, {steps} steps each: nothing found"));
    }
    let counts = report.counts.iter().map(|(name, count)| format!("{name} {}", grouped(*count)));
    let counts: Vec<String> = counts.collect();
    if !counts.is_empty() {
        lines.push(format!("  {}", counts.join(", ")));
    }
    lines.join("\n") + "\n"
}

/// A mistake around the cores, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Mutation {
    /// Output leaves one epoch early.
    EarlyRelease,
    /// An old generation is taken for the newest.
    OldGeneration,
    /// The arbiter grants whatever is asked.
    SkipArbiter,
    /// A checkpoint whose output did not wait for it counts.
    Provisional,
}

impl Mutation {
    fn mistake(self) -> Mistake {
        match self {
            Self::EarlyRelease => Mistake::ReleaseOneEpochEarly,
            Self::OldGeneration => Mistake::WelcomeAnOldGeneration,
            Self::SkipArbiter => Mistake::SkipTheArbiter,
            Self::Provisional => Mistake::PromoteFromProvisional,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::EarlyRelease => "early-release",
            Self::OldGeneration => "old-generation",
            Self::SkipArbiter => "skip-arbiter",
            Self::Provisional => "provisional",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::{Arguments, Verb};
    use super::*;
    use clap::Parser;

    fn args(line: &str) -> SimArgs {
        let words = ["nilicon", "sim"].into_iter().chain(line.split_whitespace());
        let Verb::Sim(args) = Arguments::parse_from(words).command else { panic!() };
        args
    }

    #[test]
    fn a_mutation_is_found_and_its_seed_repeats_it() {
        let many = args("--seed 0 --seeds 400 --steps 6000 --mutation early-release");
        let report = run(&many, 400).unwrap();
        let found = report.found.clone().expect("one of them");
        assert!(
            text(&report).contains(&format!("seed {} with early-release: FOUND: ", found.seed))
        );
        let again = args(found.repeat.strip_prefix("nilicon sim ").unwrap());
        assert_eq!((again.seed, again.seeds), (found.seed, 1));
        let again = run(&again, found.seed + 1).unwrap();
        assert_eq!(again.found.unwrap(), found);
    }

    #[test]
    fn without_a_mutation_a_seed_tells_what_happened() {
        let report = run(&args("--seed 3 --steps 500"), 4).unwrap();
        assert_eq!((report.seeds, &report.found), (1, &None));
        assert!(report.trace.len() > 100 && report.counts["releases"] > 0, "{report:?}");
        assert!(text(&report).contains("1 seeds from 3, 500 steps each: nothing found\n"));
        assert_eq!(run(&args("--seeds 3 --steps 500"), 3).unwrap().trace, Vec::<String>::new());
    }
}
