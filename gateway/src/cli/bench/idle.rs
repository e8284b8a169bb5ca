//! What protection takes while nobody asks for anything: epochs, and processor time of the agents.
//!
//! The topology's containers stand without clients, unprotected behind their gateway, and protected.
//! What a program does by itself (a server that looks at its clock ten times a second) is in the
//! container's own column.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use netns_tools::topology::Topology;
use serde::Serialize;

use super::super::deploy::Standing;
use super::super::numbers::median;
use super::super::progress::Progress;
use super::super::view::LabView;
use super::super::{journal, signals};
use super::args::BenchArgs;
use super::cores::{Cores, Usage};
use super::figures::{self, Mode, Runs};
use super::scale::until_copied;
use crate::agent::monotonic_us;

/// What comes after the first copy is over by then.
const SETTLES: Duration = Duration::from_secs(2);
/// How long the first copy may take to be applied.
const PATIENCE: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(50);

/// What one mode takes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    mode: Mode,
    runs: usize,
    epochs_per_s: Runs,
    /// Seconds of processor time a second, the median of each.
    cpu: Usage,
    /// Of all agents together.
    agents: Runs,
}

/// Measures with the gateway alone, and protected.
///
/// # Errors
/// A lab cannot be made.
pub(super) fn measure(
    args: &BenchArgs,
    topology: &Topology,
    cores: Option<&Cores>,
) -> Result<Vec<Row>> {
    let mut progress = Progress::new();
    let mut found = [(Mode::Gateway, Vec::new()), (Mode::Protected, Vec::new())];
    for round in 0..args.rounds {
        for (mode, runs) in &mut found {
            progress.show(&format!("round {}/{}  idle  {mode}", round + 1, args.rounds));
            runs.push(once(topology, cores, *mode, *args.load)?);
        }
    }
    progress.clear();
    Ok(found.iter().map(|(mode, runs)| row(*mode, runs)).collect())
}

/// Epochs a second, and processor time.
fn once(
    topology: &Topology,
    cores: Option<&Cores>,
    mode: Mode,
    length: Duration,
) -> Result<(f64, Usage)> {
    let mut topology = super::in_mode(topology, mode);
    topology.clients.clear();
    let standing = Standing::deploy_new(&topology, true, false)?;
    let view = standing.until_protected(&mut |_| {})?;
    if let Some(cores) = cores {
        cores.pin(&view)?;
    }
    let lab = standing.lab();
    until_copied(lab, PATIENCE)?;
    sleep(SETTLES)?;
    let (begun, before) = (monotonic_us(), Usage::of(lab));
    sleep(length)?;
    let (over, usage) = (monotonic_us(), Usage::of(lab).since(&before));
    if let Some(bare) = figures::bare(&LabView::ask(lab).containers, &topology) {
        bail!("{bare}");
    }
    let epochs = journal::epochs(lab, &(begun..=over));
    Ok((epochs.len() as f64 * 1e6 / (over - begun) as f64, usage))
}

fn sleep(length: Duration) -> Result<()> {
    let end = Instant::now() + length;
    while Instant::now() < end {
        signals::check()?;
        std::thread::sleep(NAP.min(end.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

fn row(mode: Mode, runs: &[(f64, Usage)]) -> Row {
    let cpu = |part: fn(&Usage) -> f64| median(runs.iter().map(|(_, usage)| part(usage)));
    Row {
        mode,
        runs: runs.len(),
        epochs_per_s: Runs::of(runs.iter().map(|(epochs, _)| *epochs)),
        cpu: Usage {
            container: cpu(|usage| usage.container),
            primary: cpu(|usage| usage.primary),
            backup: cpu(|usage| usage.backup),
            ..Usage::default()
        },
        agents: Runs::of(runs.iter().map(|(_, usage)| usage.primary + usage.backup)),
    }
}

/// The rows as text.
pub(super) fn text(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<14}{:>10}{:>12}{:>10}{:>9}{:>12}\n",
        "idle", "epochs/s", "container", "primary", "backup", "both agents"
    );
    let percent = |part: f64| format!("{:.2} %", part * 100.0);
    for row in rows {
        text += &format!(
            "{:<14}{:>10.2}{:>12}{:>10}{:>9}{:>12}\n",
            row.mode.to_string(),
            row.epochs_per_s.median,
            percent(row.cpu.container),
            percent(row.cpu.primary),
            percent(row.cpu.backup),
            percent(row.agents.median),
        );
    }
    text + "(processor time, in parts of a core)\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_agents_count_together() {
        let of = |primary, backup| (0.0, Usage { primary, backup, ..Usage::default() });
        let row = row(Mode::Protected, &[of(0.01, 0.004), of(0.03, 0.002), of(0.02, 0.02)]);
        assert_eq!((row.cpu.primary, row.cpu.backup), (0.02, 0.004));
        assert_eq!((row.agents.median, row.runs), (0.032, 3));
        let text = text(&[row]);
        assert!(text.lines().any(|line| line.starts_with("protected") && line.ends_with("3.20 %")));
    }
}
