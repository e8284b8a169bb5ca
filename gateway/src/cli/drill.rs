//! `nilicon drill`: the same run many times, with its fault at another moment each time.
//!
//! Invariant: a run is repeated exactly by its seed alone: run i of a drill with seed s is the
//! only run of a drill with seed s + i.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use netns_tools::topology::Topology;
use serde::Serialize;

use super::args::{DrillArgs, Output};
use super::drill_faults::{self, DrillFault};
use super::faults;
use super::files::FilesReport;
use super::histories::Histories;
use super::numbers::{Spread, micros, millis};
use super::progress::Progress;
use super::report::{FailoverReport, RunReport};
use super::run::{self, Plan, REPLY_TIMEOUT, run_once};
use super::signals::{self, Interrupted};

/// What all runs together found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct DrillReport {
    pub(super) topology: String,
    pub(super) runs: u32,
    /// Runs that recovered; see [`RunReport`].
    pub(super) recovered: u32,
    pub(super) lost_writes: u64,
    pub(super) wrong_replies: u64,
    pub(super) broken_connections: u64,
    /// Connections that a client has seen established and that were reset from the other side, by what
    /// passed on its wire.
    pub(super) resets: u64,
    /// Connections that came and went beside the load.
    pub(super) churned: u64,
    /// Whether all histories of shared keys can be explained; null if there are none, or one could not
    /// be judged.
    pub(super) linearizable: Option<bool>,
    /// What those histories were.
    pub(super) histories: Histories,
    /// What the files of replicated volumes were found to be; null if there are none.
    pub(super) files: Option<FilesReport>,
    /// The longest wait of a client in each run.
    pub(super) gap_ms: Spread<f64>,
    /// The same by fault.
    pub(super) by_fault: BTreeMap<String, FaultFigures>,
    /// Every stop of every run.
    pub(super) stop_us: Spread<u64>,
    /// From suspicion until the container ran again.
    pub(super) failover_ms: MedianAndMax,
    /// The same by phase, after how long it took to notice; in order, and none without a failover.
    pub(super) failover_phases_ms: Vec<PhaseFigures>,
    pub(super) seed: u64,
    /// Whether output waited for its checkpoint. If not, this was the control, and loss is what
    /// it is there to show.
    pub(super) output_commit: bool,
    pub(super) failed: Vec<FailedRun>,
}

/// What the runs with one fault found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct FaultFigures {
    pub(super) runs: u32,
    /// Runs that recovered, and in which no client found anything wrong.
    pub(super) clean: u32,
    pub(super) gap_ms: Spread<f64>,
}

/// The middle and the worst.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct MedianAndMax {
    pub(super) p50: f64,
    pub(super) max: f64,
}

/// What one phase of a failover took in all runs that had one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct PhaseFigures {
    pub(super) phase: &'static str,
    #[serde(flatten)]
    pub(super) took: MedianAndMax,
}

/// A run that was no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct FailedRun {
    /// Its number, from 1.
    pub(super) run: u32,
    /// Its seed.
    pub(super) seed: u64,
    pub(super) why: String,
}

impl MedianAndMax {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let spread = Spread::of(values);
        Self { p50: spread.p50, max: spread.max }
    }
}

/// The figures of each phase.
fn by_phase<'a>(failovers: impl Iterator<Item = &'a FailoverReport>) -> Vec<PhaseFigures> {
    let mut phases: Vec<(&'static str, Vec<f64>)> = Vec::new();
    for failover in failovers {
        let detect = ("detect", failover.detect_ms.unwrap_or(failover.phases.silence));
        for (phase, ms) in [detect].into_iter().chain(failover.phases.in_order()) {
            match phases.iter_mut().find(|(name, _)| *name == phase) {
                Some((_, all)) => all.push(ms),
                None => phases.push((phase, vec![ms])),
            }
        }
    }
    let figures = |(phase, all): (_, Vec<f64>)| PhaseFigures {
        phase,
        took: MedianAndMax::of(all.into_iter()),
    };
    phases.into_iter().map(figures).collect()
}

/// One run: a report, or why there is none.
type Outcome = (u64, Result<RunReport, String>);

/// The figures of the runs with each fault; `faults` are those of the runs, in order.
fn by_fault(faults: &[String], outcomes: &[Outcome]) -> BTreeMap<String, FaultFigures> {
    let mut runs: BTreeMap<String, Vec<&Outcome>> = BTreeMap::new();
    for (fault, outcome) in faults.iter().zip(outcomes) {
        runs.entry(fault.clone()).or_default().push(outcome);
    }
    let figures = |all: Vec<&Outcome>| {
        let reports = || all.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
        FaultFigures {
            runs: all.len() as u32,
            clean: reports().filter(|report| report.complaint().is_none()).count() as u32,
            gap_ms: Spread::of(reports().map(RunReport::gap_ms)),
        }
    };
    runs.into_iter().map(|(fault, all)| (fault, figures(all))).collect()
}

impl DrillReport {
    fn of(
        topology: &str,
        seed: u64,
        output_commit: bool,
        faults: &[String],
        outcomes: &[Outcome],
    ) -> Self {
        let reports = || outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
        let sum = |figure| reports().map(|report| report.sum(figure)).sum();
        let failovers = || reports().flat_map(|report| &report.failovers);
        let failed = outcomes.iter().zip(1..).filter_map(|((seed, outcome), run)| {
            let why = match outcome {
                Ok(report) => report.complaint()?,
                Err(error) => error.clone(),
            };
            Some(FailedRun { run, seed: *seed, why })
        });
        let histories = Histories::of(reports());
        Self {
            topology: topology.to_owned(),
            runs: outcomes.len() as u32,
            recovered: reports().filter(|report| report.recovered).count() as u32,
            lost_writes: sum(|c| c.lost_writes),
            wrong_replies: sum(|c| c.wrong_replies),
            broken_connections: sum(|c| c.broken_connections),
            resets: sum(|c| c.resets),
            churned: sum(|c| c.churned),
            linearizable: histories.linearizable(),
            histories,
            files: files_of(reports()),
            gap_ms: Spread::of(reports().map(RunReport::gap_ms)),
            by_fault: by_fault(faults, outcomes),
            stop_us: Spread::of(
                reports().flat_map(|report| report.records.iter().map(|epoch| epoch.stop_us)),
            ),
            failover_ms: MedianAndMax::of(failovers().map(|f| f.total_ms)),
            failover_phases_ms: by_phase(failovers()),
            seed,
            output_commit,
            failed: failed.collect(),
        }
    }

    /// Whether the drill showed what it is there to show: that nothing is lost, or, in the
    /// control without output commit, that something is.
    fn is_success(&self) -> bool {
        if self.output_commit {
            self.failed.is_empty()
        } else {
            // A broken connection is no lost promise.
            self.lost_writes + self.wrong_replies > 0 || self.linearizable == Some(false)
        }
    }

    fn text(&self) -> String {
        let Self {
            runs, recovered, lost_writes, wrong_replies, broken_connections, resets, ..
        } = self;
        let mut lines = vec![
            format!("{}: {recovered} of {runs} runs recovered", self.topology),
            format!(
                "  {lost_writes} acknowledged writes lost, {wrong_replies} wrong replies, \
                 {broken_connections} broken connections, {resets} resets"
            ),
            format!(
                "  gap       median {}, 99 % {}, max {}",
                millis(self.gap_ms.p50),
                millis(self.gap_ms.p99),
                millis(self.gap_ms.max)
            ),
            format!(
                "  failover  median {}, max {}",
                millis(self.failover_ms.p50),
                millis(self.failover_ms.max)
            ),
            format!(
                "  stop      median {}, 99 % {}, max {}",
                micros(self.stop_us.p50),
                micros(self.stop_us.p99),
                micros(self.stop_us.max)
            ),
            format!("  seed      {}", self.seed),
        ];
        let phase = |p: &PhaseFigures| format!("{} {}", p.phase, millis(p.took.p50));
        if !self.failover_phases_ms.is_empty() {
            let phases: Vec<String> = self.failover_phases_ms.iter().map(phase).collect();
            lines.insert(4, format!("            of it {} (medians)", phases.join(", ")));
        }
        lines.extend(self.histories.line().map(|line| format!("  history   {line}")));
        lines.extend(self.files.as_ref().map(|f| {
            let wrong = if f.wrong.is_empty() { "all as they should be" } else { "NOT ALL WHOLE" };
            format!("  files     {} compared, {} checked, {wrong}", f.compared, f.checked)
        }));
        if self.by_fault.len() > 1 {
            lines.extend(self.by_fault.iter().map(|(fault, found)| {
                format!(
                    "  {fault:<16} {} of {} clean, gap median {}, max {}",
                    found.clean,
                    found.runs,
                    millis(found.gap_ms.p50),
                    millis(found.gap_ms.max)
                )
            }));
        }
        if !self.output_commit {
            let found =
                if self.is_success() { "it is lost, as it must be" } else { "NOTHING IS LOST" };
            lines.push(format!(
                "  UNSAFE    output did not wait for checkpoints; this is the control: {found}"
            ));
        }
        lines.join("\n")
    }
}

/// What the files of all runs together were found to be.
fn files_of<'a>(reports: impl Iterator<Item = &'a RunReport>) -> Option<FilesReport> {
    reports.filter_map(|report| report.files.clone()).reduce(|mut all, one| {
        all.compared += one.compared;
        all.checked += one.checked;
        all.wrong.extend(one.wrong);
        all
    })
}

/// `nilicon drill`. Returns whether it was a success.
pub(super) fn drill(args: &DrillArgs) -> Result<bool> {
    signals::catch()?;
    let topology = args.topology.load()?;
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let mut progress = Progress::new();
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut injected = Vec::new();
    for run in 0..args.runs {
        let seed = seed.wrapping_add(run.into());
        let (plan, fault) = plan_of(&topology, args, seed)?;
        injected.push(fault);
        let faults: Vec<String> = plan
            .topology
            .events
            .iter()
            .map(|event| format!("{} at {:.2} s", faults::describe(event), event.at.as_secs_f64()))
            .collect();
        let head = format!("run {:>3}/{}  seed {seed}  {}", run + 1, args.runs, faults.join(", "));
        let outcome = run_once(&plan, &mut |moment| run::show(&mut progress, &moment));
        progress.clear();
        let outcome = match outcome {
            // What stops the first run would stop all others too.
            Err(error) if run == 0 || error.is::<Interrupted>() => return Err(error),
            outcome => outcome.map_err(|error| crate::chain::chain(&error)),
        };
        say(args, &format!("{head}  {}", line_of(&outcome)));
        if let Some(why) = complaint(&outcome).filter(|_| args.output_commit.is_on()) {
            eprintln!("{head}: {why}\n  repeat it with: {}", repeat(args, seed));
            outcome.as_ref().into_iter().for_each(run::eprint_logs);
        }
        outcomes.push((seed, outcome));
    }
    let report =
        DrillReport::of(&topology.name, seed, args.output_commit.is_on(), &injected, &outcomes);
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => println!("{}", report.text()),
    }
    Ok(report.is_success())
}

/// The run with this seed, and the name of its fault.
fn plan_of(topology: &Topology, args: &DrillArgs, seed: u64) -> Result<(Plan, String)> {
    let mut topology = topology.clone();
    let duration: Duration = *args.duration;
    let asked = args.fault.or(topology.events.is_empty().then_some(DrillFault::Any));
    let name = match asked.map(|fault| fault.of_seed(&topology, seed)) {
        Some(fault) => {
            fault.put_into(&mut topology)?;
            fault.name()
        }
        None => faults::word(topology.events[0].fault).to_owned(),
    };
    topology.events = drill_faults::at_random(&topology.events, duration, seed);
    let plan = Plan {
        topology,
        duration: Some(duration),
        seed,
        output_commit: args.output_commit.is_on(),
        reply_timeout: REPLY_TIMEOUT,
        switchovers: 0,
        keep: false,
    };
    Ok((plan, name))
}

/// One line of progress: part of the text, beside JSON only on a terminal.
fn say(args: &DrillArgs, line: &str) {
    use std::io::IsTerminal;
    match args.output.output {
        Output::Text => println!("{line}"),
        Output::Json if std::io::stderr().is_terminal() => eprintln!("{line}"),
        Output::Json => {}
    }
}

fn complaint(outcome: &Result<RunReport, String>) -> Option<String> {
    match outcome {
        Ok(report) => report.complaint(),
        Err(error) => Some(error.clone()),
    }
}

fn line_of(outcome: &Result<RunReport, String>) -> String {
    let Ok(report) = outcome else { return "FAILED".to_owned() };
    let gap = millis(report.gap_ms());
    let failover = report
        .failover
        .as_ref()
        .map_or_else(String::new, |failover| format!(", failover {}", millis(failover.total_ms)));
    match report.complaint() {
        None => format!("recovered, gap {gap}{failover}"),
        Some(complaint) if !report.output_commit => format!("{complaint}, gap {gap}"),
        Some(_) => format!("FAILED, gap {gap}{failover}"),
    }
}

/// The command that repeats one run.
fn repeat(args: &DrillArgs, seed: u64) -> String {
    let fault = args.fault.map_or_else(String::new, |fault| format!(" --fault {}", fault.name()));
    format!(
        "nilicon drill {} --runs 1 --seed {seed}{fault} --duration {}",
        args.topology.path.display(),
        args.duration
    )
}

#[cfg(test)]
mod tests {
    use super::super::args::{Arguments, Verb};
    use super::super::histories;
    use super::super::report::{ClientReport, EpochReport, NamedReport};
    use super::*;
    use crate::agent::status::EpochRecord;
    use clap::Parser;

    fn report(gap_ms: f64, lost_writes: u64) -> RunReport {
        let report = ClientReport { gap_ms, lost_writes, ..ClientReport::default() };
        RunReport {
            topology: "redis".to_owned(),
            recovered: true,
            why: None,
            output_commit: true,
            linearizable: None,
            duration_s: 6.0,
            clients: vec![NamedReport { name: "client".to_owned(), report }],
            epochs: EpochReport::default(),
            failover: None,
            failovers: Vec::new(),
            faults: Vec::new(),
            files: None,
            moves: None,
            containers: Vec::new(),
            logs: String::new(),
            records: [100, 300]
                .map(|stop_us| EpochRecord { stop_us, ..EpochRecord::default() })
                .into(),
        }
    }

    #[test]
    fn one_bad_run_fails_the_drill_and_tells_its_seed() {
        let outcomes =
            vec![(7, Ok(report(50.0, 0))), (8, Ok(report(90.0, 3))), (9, Err("no".to_owned()))];
        let faults = ["kill-host", "cut-out", "kill-host"].map(str::to_owned);
        let drill = DrillReport::of("redis", 7, true, &faults, &outcomes);
        let found = |fault: &str| (drill.by_fault[fault].runs, drill.by_fault[fault].clean);
        assert_eq!((found("kill-host"), found("cut-out")), ((2, 1), (1, 0)));
        assert!(!drill.is_success());
        assert_eq!((drill.runs, drill.recovered, drill.lost_writes), (3, 2, 3));
        assert_eq!((drill.gap_ms.p50, drill.gap_ms.max, drill.stop_us.p50), (50.0, 90.0, 100));
        let failed: Vec<_> = drill.failed.iter().map(|f| (f.run, f.seed, &f.why[..])).collect();
        assert_eq!(failed, [(2, 8, "3 acknowledged writes lost"), (3, 9, "no")]);
        assert!(DrillReport::of("redis", 7, true, &faults, &outcomes[..1]).is_success());
    }

    #[test]
    fn failovers_are_told_by_phase() {
        use crate::agent::status::FailoverPhases;
        let with = |apply: f64, detect_ms| {
            let phases = FailoverPhases { apply, silence: 4.0, ..FailoverPhases::default() };
            let failover = FailoverReport {
                container: "redis".to_owned(),
                host: "beta".to_owned(),
                generation: 2,
                epoch: 9,
                detect_ms,
                outage_ms: None,
                phases,
                total_ms: apply,
                connections: 1,
                silent_peers: 0,
                replayed_frames: 0,
            };
            RunReport { failovers: vec![failover], ..report(50.0, 0) }
        };
        let outcomes = vec![(1, Ok(with(2.0, Some(30.0)))), (2, Ok(with(6.0, None)))];
        let drill = DrillReport::of("redis", 1, true, &[], &outcomes);
        let names: Vec<_> = drill.failover_phases_ms.iter().map(|p| p.phase).collect();
        assert_eq!(names[..3], ["detect", "fence", "apply"]);
        let max = |at: usize| drill.failover_phases_ms[at].took.max;
        assert_eq!((max(0), max(1), max(2)), (30.0, 0.0, 6.0));
        assert!(drill.text().contains("of it detect "), "{}", drill.text());
        let none = DrillReport::of("redis", 1, true, &[], &[(1, Ok(report(50.0, 0)))]);
        assert!(!none.text().contains("of it"));
    }

    #[test]
    fn the_control_must_lose_something() {
        let calm = DrillReport::of("redis", 1, false, &[], &[(1, Ok(report(50.0, 0)))]);
        assert!(!calm.is_success());
        assert!(calm.text().contains("NOTHING IS LOST"));
        let lossy = DrillReport::of("redis", 1, false, &[], &[(1, Ok(report(50.0, 1)))]);
        assert!(lossy.is_success());
        assert!(lossy.text().contains("UNSAFE"));
        let mut odd = report(50.0, 0);
        odd.clients[0].report.history = Some(histories::tests::history(Some(false)));
        let odd = DrillReport::of("redis", 1, false, &[], &[(1, Ok(odd))]);
        assert!(odd.is_success() && odd.linearizable == Some(false));
        assert!(odd.text().contains("1 NOT LINEARIZABLE"));
    }

    #[test]
    fn a_run_is_repeated_by_its_seed_alone() {
        let line = "nilicon drill a.yml --runs 9 --seed 100 --fault cut-link --duration 4s";
        let Verb::Drill(args) = Arguments::parse_from(line.split(' ')).command else { panic!() };
        let again = repeat(&args, 103);
        let Verb::Drill(once) = Arguments::parse_from(again.split(' ')).command else { panic!() };
        let mut topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        topology.events.clear();
        let fourth = plan_of(&topology, &args, 103).unwrap().0;
        let (only, fault) = plan_of(&topology, &once, once.seed.unwrap()).unwrap();
        assert_eq!(fault, "cut-link");
        assert_eq!(fourth.topology, only.topology);
        assert_eq!((fourth.seed, fourth.duration), (only.seed, only.duration));
    }
}
