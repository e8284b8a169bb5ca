//! The stops of two builds of this program, in turns: what a change of the stop path is worth.
//!
//! Each round runs the topology under its own load, once by each build, as `PROGRAM run`, so that
//! anything that can run a topology can be compared. The builds take turns in going first.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use netns_tools::topology::Topology;
use serde::Serialize;
use serde_json::Value;

use super::super::numbers::micros;
use super::super::progress::Progress;
use super::super::{own_program, signals};
use super::Mode;
use super::args::BenchArgs;
use super::figures::Runs;

/// What is compared, by where it stands in the JSON of a run.
const FIGURES: [(&str, &str); 13] = [
    ("stop p50", "/epochs/stop_us/p50"),
    ("stop 99 %", "/epochs/stop_us/p99"),
    ("hold", "/epochs/stop_us_by_stage/hold"),
    ("freeze", "/epochs/stop_us_by_stage/freeze"),
    ("seal", "/epochs/stop_us_by_stage/seal"),
    ("memory", "/epochs/stop_us_by_stage/memory"),
    ("threads", "/epochs/stop_us_by_stage/threads"),
    ("files", "/epochs/stop_us_by_stage/files"),
    ("thaw", "/epochs/stop_us_by_stage/thaw"),
    ("interval", "/epochs/interval_us/p50"),
    ("commit", "/epochs/commit_us/p50"),
    ("pages written", "/epochs/dirty_pages/p50"),
    ("requests/s", "/clients/0/rate_per_s"),
];

/// Both builds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    own: PathBuf,
    other: PathBuf,
    rounds: u32,
    figures: Vec<Figure>,
}

/// One figure of both; times in microseconds.
#[derive(Debug, Clone, Serialize)]
struct Figure {
    name: &'static str,
    own: Runs,
    other: Runs,
    /// Own in parts of the other, within each round.
    ratio: Runs,
}

/// Measures both.
///
/// # Errors
/// A build cannot run the topology, or clients found something lost, wrong or broken.
pub(super) fn measure(args: &BenchArgs, topology: &Topology, other: &Path) -> Result<Report> {
    let own = own_program()?;
    let other = std::fs::canonicalize(other)
        .with_context(|| format!("{} is no program to compare with", other.display()))?;
    let mut topology = super::in_mode(topology, Mode::Protected);
    let client = topology.clients.first_mut().context("the topology has no client")?;
    client.connections = args.connections.iter().copied().max().unwrap_or(client.connections);
    if let Some(reads) = args.read_ratio.first() {
        client.read_ratio = *reads;
    }
    let file = std::env::temp_dir().join(format!("nilicon-against-{}.yml", std::process::id()));
    std::fs::write(&file, serde_json::to_string(&topology)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let runs = in_turns(args, [&own, &other], &file);
    // Not there any longer, or not ours: either way no matter.
    let _ = std::fs::remove_file(&file);
    let figures = FIGURES.iter().map(|(name, at)| figure(name, at, &runs.0, &runs.1));
    match runs.2 {
        Some(error) => Err(error),
        None => Ok(Report { figures: figures.collect(), own, other, rounds: args.rounds }),
    }
}

type Found = (Vec<Value>, Vec<Value>, Option<anyhow::Error>);

fn in_turns(args: &BenchArgs, programs: [&PathBuf; 2], file: &Path) -> Found {
    let mut progress = Progress::new();
    let mut found = [Vec::new(), Vec::new()];
    for round in 0..args.rounds {
        for turn in 0..2 {
            let index = (round as usize + turn) % 2;
            let program = programs[index];
            progress.show(&format!("round {}/{}  {}", round + 1, args.rounds, program.display()));
            match once(program, file, args, round) {
                Ok(run) => found[index].push(run),
                Err(error) => return (Vec::new(), Vec::new(), Some(error)),
            }
        }
    }
    progress.clear();
    let [own, other] = found;
    (own, other, None)
}

fn once(program: &Path, file: &Path, args: &BenchArgs, round: u32) -> Result<Value> {
    signals::check()?;
    let done = Command::new(program)
        .arg("run")
        .arg(file)
        .args(["--duration", &format!("{}ms", args.load.as_millis())])
        .args(["--seed", &(round + 1).to_string(), "-o", "json"])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if done.stdout.is_empty() {
        bail!(
            "{} could not run the topology ({}); it says why above",
            program.display(),
            done.status
        );
    }
    let run: Value = serde_json::from_slice(&done.stdout)
        .with_context(|| format!("{} has not said what it found", program.display()))?;
    if !done.status.success() {
        bail!("the run of {} was no success: {}", program.display(), run["why"]);
    }
    ensure!(
        run["epochs"]["committed"].as_u64() > Some(0),
        "there were no epochs with {}",
        program.display()
    );
    Ok(run)
}

fn figure(name: &'static str, at: &str, own: &[Value], other: &[Value]) -> Figure {
    let of = |run: &Value| run.pointer(at).and_then(Value::as_f64).unwrap_or(0.0);
    let ratios = own.iter().zip(other).map(|(own, other)| (of(own), of(other)));
    Figure {
        name,
        own: Runs::of(own.iter().map(of)),
        other: Runs::of(other.iter().map(of)),
        ratio: Runs::of(ratios.filter(|(_, other)| *other > 0.0).map(|(own, other)| own / other)),
    }
}

/// The report as text.
pub(super) fn text(report: &Report) -> String {
    let mut text = format!(
        "own:   {}\nother: {}\n{} rounds\n\n{:<16}{:>12}{:>12}{:>8}{:>14}\n",
        report.own.display(),
        report.other.display(),
        report.rounds,
        "",
        "own",
        "other",
        "ratio",
        "least..most"
    );
    for figure in &report.figures {
        let value = |runs: Runs| match figure.name {
            "pages written" | "requests/s" => format!("{:.0}", runs.median),
            _ => micros(runs.median as u64),
        };
        text += &format!(
            "{:<16}{:>12}{:>12}{:>8.2}{:>14}\n",
            figure.name,
            value(figure.own),
            value(figure.other),
            figure.ratio.median,
            format!("{:.2}..{:.2}", figure.ratio.min, figure.ratio.max)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn builds_are_compared_round_by_round() {
        let run = |stop: u64, rate: f64| json!({ "epochs": { "stop_us": { "p50": stop } }, "clients": [{ "rate_per_s": rate }] });
        // The machine became slower.
        let own = [run(300, 1000.0), run(600, 500.0)];
        let other = [run(400, 500.0), run(800, 250.0)];
        let figures: Vec<Figure> =
            FIGURES.iter().map(|(name, at)| figure(name, at, &own, &other)).collect();
        assert_eq!(figures[0].ratio, Runs { median: 0.75, min: 0.75, max: 0.75 });
        let report = Report { own: "a".into(), other: "b".into(), rounds: 2, figures };
        let text = text(&report);
        let line = text.lines().find(|line| line.starts_with("requests/s")).unwrap();
        assert!(line.contains("2.00"), "{text}");
    }
}
