//! What protection costs a program that computes and has no clients: how much of its work is left.
//!
//! A topology without clients whose container runs `nilicon __compute` is measured like this: each
//! round the container runs unprotected, with the gateway, and protected, in turns, and is asked how
//! many steps it has done, at the beginning and at the end.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_tools::lab::Lab;
use netns_tools::topology::{NodeKind, Topology};
use serde::Serialize;

use super::super::deploy::Standing;
use super::super::numbers::{grouped, median};
use super::super::progress::Progress;
use super::super::view::LabView;
use super::super::{journal, signals};
use super::args::BenchArgs;
use super::cores::{Cores, Usage};
use super::figures::{self, EpochFigures, Mode, Runs, Setting};
use super::scale::until_copied;
use super::table;
use crate::agent::monotonic_us;
use crate::agent::status::EpochRecord;

/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(60);
const NAP: Duration = Duration::from_millis(50);

/// What all modes did.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    topology: String,
    #[serde(flatten)]
    setting: Setting,
    modes: Vec<Row>,
}

/// What one mode did.
#[derive(Debug, Clone, Serialize)]
struct Row {
    mode: Mode,
    runs: usize,
    steps_per_s: Runs,
    /// Against the unprotected container in the same round.
    ratio: Runs,
    /// Seconds of processor time a second, the median of each.
    cpu: Usage,
    /// Only where there are epochs.
    epochs: Option<EpochFigures>,
}

struct Sample {
    steps_per_s: f64,
    seconds: f64,
    usage: Usage,
    epochs: Vec<EpochRecord>,
}

/// Where the protected container of a topology without clients tells of its work; none if it is no
/// program that computes.
pub(super) fn port(topology: &Topology) -> Option<u16> {
    let protect = topology.protect.first().filter(|_| topology.clients.is_empty())?;
    let command = topology.containers.get(&protect.container)?.command.as_ref()?;
    if command.get(1).map(String::as_str) != Some("__compute") {
        return None;
    }
    let at = command.iter().position(|word| word == "--listen")?;
    command.get(at + 1)?.parse::<SocketAddr>().ok().map(|address| address.port())
}

/// Measures all modes.
///
/// # Errors
/// A lab cannot be made, or the container does not answer.
pub(super) fn measure(
    args: &BenchArgs,
    topology: &Topology,
    cores: Option<&Cores>,
    port: u16,
) -> Result<Report> {
    let mut progress = Progress::new();
    let mut samples = Mode::ALL.map(|_| Vec::new());
    for round in 0..args.rounds as usize {
        for turn in 0..Mode::ALL.len() {
            let index = (round + turn) % Mode::ALL.len();
            let mode = Mode::ALL[index];
            let head = format!("round {}/{}  work  {mode}", round + 1, args.rounds);
            progress.show(&head);
            let sample = once(topology, cores, port, mode, *args.load).with_context(|| head)?;
            samples[index].push(sample);
        }
    }
    progress.clear();
    let bare: Vec<f64> = samples[0].iter().map(|sample| sample.steps_per_s).collect();
    Ok(Report {
        topology: topology.name.clone(),
        setting: Setting::here(args, cores),
        modes: Mode::ALL.iter().zip(&samples).map(|(mode, own)| row(*mode, own, &bare)).collect(),
    })
}

fn once(
    topology: &Topology,
    cores: Option<&Cores>,
    port: u16,
    mode: Mode,
    length: Duration,
) -> Result<Sample> {
    let topology = super::in_mode(topology, mode);
    let standing = Standing::deploy_new(&topology, true, false)?;
    let view = standing.until_protected(&mut |_| {})?;
    if let Some(cores) = cores {
        cores.pin(&view)?;
    }
    let lab = standing.lab();
    if mode == Mode::Protected {
        until_copied(lab, PATIENCE)?;
    }
    let mut connection = connect(lab, port)?;
    steps(&mut connection)?;
    let (begun, before, first) = (monotonic_us(), Usage::of(lab), steps(&mut connection)?);
    let (start, end) = (Instant::now(), Instant::now() + length);
    while Instant::now() < end {
        signals::check()?;
        std::thread::sleep(NAP.min(end.saturating_duration_since(Instant::now())));
    }
    let (last, seconds) = (steps(&mut connection)?, start.elapsed().as_secs_f64());
    ensure!(last > first, "it has done nothing in {length:?}: does it go on for ever?");
    if let Some(bare) = figures::bare(&LabView::ask(lab).containers, &topology) {
        bail!("{bare}");
    }
    Ok(Sample {
        steps_per_s: (last - first) as f64 / seconds,
        seconds,
        usage: Usage::of(lab).since(&before),
        epochs: journal::epochs(lab, &(begun..=monotonic_us())),
    })
}

fn connect(lab: &Lab, port: u16) -> Result<BufReader<TcpStream>> {
    let topology = lab.topology();
    let node = topology.nodes_of(NodeKind::Client).next().context("it has no client node")?;
    let container = topology.containers.values().next().context("it has no container")?;
    let address = SocketAddr::new(container.address.ip, port);
    lab.namespace(node)?.enter(|| -> Result<_> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)
            .with_context(|| format!("cannot ask {address} for its work"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(BufReader::new(stream))
    })?
}

/// How many steps it has done.
fn steps(connection: &mut BufReader<TcpStream>) -> Result<u64> {
    connection.get_mut().write_all(b"\n")?;
    let mut line = String::new();
    connection.read_line(&mut line).context("it does not answer")?;
    let steps = line.split_whitespace().next().and_then(|steps| steps.parse().ok());
    steps.with_context(|| format!("it says {line:?}, and not how many steps it has done"))
}

fn row(mode: Mode, own: &[Sample], bare: &[f64]) -> Row {
    let cpu = |part: fn(&Usage) -> f64| median(own.iter().map(|sample| part(&sample.usage)));
    let epochs: Vec<&EpochRecord> = own.iter().flat_map(|sample| &sample.epochs).collect();
    Row {
        mode,
        runs: own.len(),
        steps_per_s: Runs::of(own.iter().map(|sample| sample.steps_per_s)),
        ratio: Runs::of(own.iter().zip(bare).map(|(sample, bare)| sample.steps_per_s / bare)),
        cpu: Usage {
            container: cpu(|usage| usage.container),
            primary: cpu(|usage| usage.primary),
            backup: cpu(|usage| usage.backup),
            ..Usage::default()
        },
        epochs: EpochFigures::of(&epochs, own.iter().map(|sample| sample.seconds).sum()),
    }
}

/// The report as text.
pub(super) fn text(report: &Report) -> String {
    let setting = &report.setting;
    let mut text = format!(
        "{}: {} rounds of {:.0} s, kernel {}\n  {:<14}{:>10}{:>8}{:>15}{:>12}{:>9}{:>8}\n",
        report.topology,
        setting.rounds,
        setting.load_s,
        setting.kernel,
        "",
        "steps/s",
        "ratio",
        "least..most",
        "container",
        "primary",
        "backup"
    );
    for row in &report.modes {
        text += &format!(
            "  {:<14}{:>10}{:>8.3}{:>15}{:>12.2}{:>9.2}{:>8.2}\n",
            row.mode.to_string(),
            grouped(row.steps_per_s.median as u64),
            row.ratio.median,
            format!("{:.3}..{:.3}", row.ratio.min, row.ratio.max),
            row.cpu.container,
            row.cpu.primary,
            row.cpu.backup,
        );
    }
    for epochs in report.modes.iter().filter_map(|row| row.epochs.as_ref()) {
        text += &table::of_epochs(epochs);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let sample = |steps_per_s| Sample {
            steps_per_s,
            seconds: 1.0,
            usage: Usage::default(),
            epochs: Vec::new(),
        };
        let row = row(Mode::Protected, &[sample(90.0), sample(190.0)], &[100.0, 200.0]);
        assert_eq!((row.ratio.min, row.ratio.max), (0.9, 0.95));
        assert!(row.epochs.is_none());
    }

    #[test]
    fn only_a_program_that_computes_is_asked_for_its_work() {
        let mut topology = Topology::parse("demo", super::super::super::demo::TOPOLOGY).unwrap();
        assert_eq!(port(&topology), None);
        topology.clients.clear();
        assert_eq!(port(&topology), None);
        let command = "nilicon __compute options --listen 0.0.0.0:7000";
        let words = command.split(' ').map(str::to_owned).collect();
        topology.containers.values_mut().next().unwrap().command = Some(words);
        assert_eq!(port(&topology), Some(7000));
    }
}
