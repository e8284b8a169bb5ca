//! What a bench found, put together by pure functions.

use std::fmt;

use netns_tools::topology::{Ratio, Topology, VolumeKind};
use serde::Serialize;

use super::super::clock;
use super::super::numbers::{Spread, median};
use super::super::report::RunReport;
use super::super::view::ContainerView;
use super::args::BenchArgs;
use super::cores::{Cores, Usage};
use crate::agent::status::{EpochRecord, StopStages};

/// What is between a container and its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    /// A plain veth: the container as it is without us.
    Veth,
    /// The gateway, which holds nothing.
    Gateway,
    /// Every frame waits for its checkpoint.
    Protected,
}

impl Mode {
    pub(super) const ALL: [Self; 3] = [Self::Veth, Self::Gateway, Self::Protected];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Veth => "unprotected",
            Self::Gateway => "gateway only",
            Self::Protected => "protected",
        })
    }
}

/// How much the clients ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Load {
    /// Each connection asks again as soon as it has its answer: it waits for one answer at a time, so
    /// that what is answered tells of the latency.
    Closed,
    /// Each connection has many requests in flight: the container has always something to do.
    Saturation,
    /// A part of what the unprotected container answers at most, evenly over time.
    Part(Ratio),
}

impl std::str::FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "closed" => return Ok(Self::Closed),
            "saturation" => return Ok(Self::Saturation),
            _ => {}
        }
        let part: Ratio =
            text.parse().map_err(|error| format!("{error}, or closed, or saturation"))?;
        match part.get() > 0.0 {
            true => Ok(Self::Part(part)),
            false => Err("a load of nothing measures nothing (but see --idle)".to_owned()),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Saturation => f.write_str("saturation"),
            Self::Part(part) => write!(f, "{:.0}%", part.get() * 100.0),
        }
    }
}

impl Serialize for Load {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A load on a number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Point {
    pub(super) connections: usize,
    pub(super) load: Load,
    /// Part of the requests that reads, if it is not the topology's.
    pub(super) reads: Option<Ratio>,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.connections == 1 { "" } else { "s" };
        write!(f, "{} connection{plural}, load {}", self.connections, self.load)?;
        match self.reads {
            Some(reads) => write!(f, ", {:.0}% reads", reads.get() * 100.0),
            None => Ok(()),
        }
    }
}

/// One run.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    round: u32,
    pub(super) point: Point,
    pub(super) mode: Mode,
    rate_per_s: f64,
    latency_us: (u64, u64),
    usage: Usage,
    /// Its epochs, and how long it lasted.
    pub(super) epochs: Vec<EpochRecord>,
    seconds: f64,
    complaint: Option<String>,
}

impl Sample {
    pub(super) fn of(round: u32, point: Point, mode: Mode, run: RunReport, usage: Usage) -> Self {
        let complaint = run.complaint();
        let client = run.clients.first().map(|client| client.report.clone()).unwrap_or_default();
        Self {
            round,
            point,
            mode,
            rate_per_s: client.rate_per_s,
            latency_us: (client.latency_us.p50, client.latency_us.p99),
            usage,
            epochs: run.records,
            seconds: run.duration_s,
            complaint,
        }
    }
}

/// Why a run of the protected lab without faults measured something else than protection.
pub(super) fn not_protected(run: &RunReport, topology: &Topology) -> Option<String> {
    if let Some(failover) = &run.failover {
        return Some(format!("the container moved to {}", failover.host));
    }
    let no_epoch = || run.records.is_empty().then(|| "there was no epoch".to_owned());
    bare(&run.containers, topology).or_else(no_epoch)
}

/// The container that ought to be protected and is not where it was, and why.
pub(super) fn bare(containers: &[ContainerView], topology: &Topology) -> Option<String> {
    let ought = |name: &str| topology.protection_of(name);
    let has_moved = |container: &ContainerView| {
        let home = ought(&container.name).map(|protect| protect.primary.as_str());
        // Files that are kept from one life to the next keep its generation, and the next one begins above.
        let keeps = topology
            .containers
            .get(&container.name)
            .is_some_and(|c| c.volumes.iter().any(|volume| volume.kind == VolumeKind::Replicated));
        container.primary.as_deref() != home || container.generation > 1 && !keeps
    };
    let mut ends = containers.iter().filter(|container| ought(&container.name).is_some());
    let bare = ends.find(|container| !container.protected || has_moved(container))?;
    let reason = bare.reason.as_deref().unwrap_or(match bare.protected {
        true => "it has moved",
        false => "its backup is gone",
    });
    Some(format!("{} was not protected all the time: {reason}", bare.name))
}

/// The median rate of a mode so far; 0 if it was not measured.
pub(super) fn rate_of(samples: &[Sample], point: Point, mode: Mode) -> f64 {
    let of_it = samples.iter().filter(|s| s.point == point && s.mode == mode);
    median(of_it.map(|sample| sample.rate_per_s))
}

/// The middle of some runs, and the ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Runs {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Runs {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let end = |pick: fn(f64, f64) -> f64| values.iter().copied().reduce(pick).unwrap_or(0.0);
        Self { median: median(values.iter().copied()), min: end(f64::min), max: end(f64::max) }
    }
}

/// What all was measured under.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Setting {
    pub(super) version: &'static str,
    pub(super) kernel: String,
    /// UTC.
    pub(super) date: String,
    pub(super) rounds: u32,
    /// Length of each measured load, in seconds.
    pub(super) load_s: f64,
    /// Requests that each connection has in flight for the load `saturation`.
    pub(super) pipeline: usize,
    /// None if there is one core for all.
    pub(super) cores: Option<Cores>,
}

impl Setting {
    pub(super) fn here(args: &BenchArgs, cores: Option<&Cores>) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.trim().to_owned(),
            date: clock::date_and_time(std::time::SystemTime::now()),
            rounds: args.rounds,
            load_s: args.load.as_secs_f64(),
            pipeline: args.pipeline,
            cores: cores.cloned(),
        }
    }
}

/// All that a bench found.
#[derive(Debug, Clone, Serialize)]
pub(super) struct BenchReport {
    pub(super) topology: String,
    #[serde(flatten)]
    pub(super) setting: Setting,
    pub(super) points: Vec<PointFigures>,
    /// The phases of one failover.
    pub(super) failover: Option<Timeline>,
    /// Measurements that were made again because protection had not lasted through them.
    pub(super) repeated: usize,
    /// What clients found lost, wrong or broken; empty if all went well.
    pub(super) complaints: Vec<String>,
}

/// One load in all modes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct PointFigures {
    #[serde(flatten)]
    pub(super) point: Point,
    pub(super) modes: Vec<ModeFigures>,
}

/// One load in one mode. Times in microseconds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ModeFigures {
    pub(super) mode: Mode,
    pub(super) runs: usize,
    pub(super) rate_per_s: Runs,
    /// Against the unprotected container in the same round.
    pub(super) rate_ratio: Runs,
    pub(super) latency_p50_us: Runs,
    pub(super) latency_p99_us: Runs,
    /// More than the unprotected container in the same round.
    pub(super) added_p50_us: Runs,
    pub(super) added_p99_us: Runs,
    /// Seconds of processor time a second, the median of each.
    pub(super) cpu: Usage,
    /// Only where there are epochs.
    pub(super) epochs: Option<EpochFigures>,
}

/// The epochs of all runs of a mode together.
#[derive(Debug, Clone, Serialize)]
pub(super) struct EpochFigures {
    pub(super) count: usize,
    pub(super) per_s: f64,
    pub(super) stop_us: Spread<u64>,
    pub(super) stop_us_by_stage: Stages,
    /// Part of the time that the container stood still.
    pub(super) stopped_share: f64,
    pub(super) interval_us: Spread<u64>,
    /// Pages that were written in an epoch.
    pub(super) dirty_pages: Spread<u64>,
    /// Those of them that were copied in the stop.
    pub(super) stop_pages: Spread<u64>,
    pub(super) wire_bytes: Spread<u64>,
    pub(super) wire_bytes_per_s: f64,
    /// From the seal to the checked acknowledgement.
    pub(super) commit_us: Spread<u64>,
}

/// Each stage of a stop.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Stages {
    pub(super) p50: StopStages,
    pub(super) p99: StopStages,
}

impl EpochFigures {
    /// None if there are no epochs.
    pub(super) fn of(epochs: &[&EpochRecord], seconds: f64) -> Option<Self> {
        if epochs.is_empty() {
            return None;
        }
        let spread =
            |field: fn(&EpochRecord) -> u64| Spread::of(epochs.iter().map(|epoch| field(epoch)));
        let sum = |field: fn(&EpochRecord) -> u64| -> f64 {
            epochs.iter().map(|epoch| field(epoch) as f64).sum()
        };
        let stages = |pick: fn(Spread<u64>) -> u64| {
            StopStages::each(|field| {
                pick(Spread::of(epochs.iter().map(|epoch| field(&epoch.stop_us_by_stage))))
            })
        };
        let seconds = seconds.max(1e-9);
        Some(Self {
            count: epochs.len(),
            per_s: epochs.len() as f64 / seconds,
            stop_us: spread(|epoch| epoch.stop_us),
            stop_us_by_stage: Stages { p50: stages(|s| s.p50), p99: stages(|s| s.p99) },
            stopped_share: sum(|epoch| epoch.stop_us) / 1e6 / seconds,
            interval_us: spread(|epoch| epoch.interval_us),
            dirty_pages: spread(|epoch| epoch.dirty_pages),
            stop_pages: spread(|epoch| epoch.stop_pages),
            wire_bytes: spread(|epoch| epoch.wire_bytes),
            wire_bytes_per_s: sum(|epoch| epoch.wire_bytes) / seconds,
            commit_us: spread(|epoch| epoch.commit_us),
        })
    }
}

/// A failover, from the fault on. Milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Timeline {
    /// Each phase and how long it took, in order.
    pub(super) phases_ms: Vec<(&'static str, f64)>,
    /// From the fault until the container ran again.
    pub(super) outage_ms: f64,
    /// The longest wait of a client.
    pub(super) gap_ms: f64,
}

impl Timeline {
    pub(super) fn of(run: &RunReport) -> Option<Self> {
        let failover = run.failover.as_ref()?;
        let phases = failover.phases;
        let detect = ("detect", failover.detect_ms.unwrap_or(phases.silence));
        Some(Self {
            phases_ms: [detect].into_iter().chain(phases.in_order()).collect(),
            outage_ms: failover.outage_ms?,
            gap_ms: run.gap_ms(),
        })
    }
}

impl BenchReport {
    pub(super) fn of(
        topology: &str,
        setting: Setting,
        samples: &[Sample],
        failover: Option<Timeline>,
        repeated: usize,
    ) -> Self {
        let mut points: Vec<Point> = Vec::new();
        for sample in samples {
            if !points.contains(&sample.point) {
                points.push(sample.point);
            }
        }
        let complaints = samples.iter().filter_map(|sample| {
            let Sample { point, mode, complaint, .. } = sample;
            Some(format!("{point}, {mode}: {}", complaint.as_ref()?))
        });
        Self {
            topology: topology.to_owned(),
            setting,
            complaints: complaints.collect(),
            points: points.into_iter().map(|point| PointFigures::of(point, samples)).collect(),
            failover,
            repeated,
        }
    }
}

impl PointFigures {
    fn of(point: Point, samples: &[Sample]) -> Self {
        let of_mode = |mode| {
            let own: Vec<&Sample> =
                samples.iter().filter(|s| s.point == point && s.mode == mode).collect();
            let bare = |round| {
                samples
                    .iter()
                    .find(|s| s.point == point && s.mode == Mode::Veth && s.round == round)
            };
            ModeFigures::of(mode, &own, bare)
        };
        Self { point, modes: Mode::ALL.into_iter().map(of_mode).collect() }
    }
}

impl ModeFigures {
    /// `bare` knows the unprotected container of each round.
    fn of<'a>(mode: Mode, own: &[&Sample], bare: impl Fn(u32) -> Option<&'a Sample>) -> Self {
        let runs = |figure: fn(&Sample) -> f64| Runs::of(own.iter().map(|sample| figure(sample)));
        let against = |compare: fn(&Sample, &Sample) -> f64| {
            Runs::of(own.iter().filter_map(|s| Some(compare(s, bare(s.round)?))))
        };
        let cpu = |part: fn(&Usage) -> f64| median(own.iter().map(|sample| part(&sample.usage)));
        let epochs: Vec<&EpochRecord> = own.iter().flat_map(|sample| &sample.epochs).collect();
        Self {
            mode,
            runs: own.len(),
            rate_per_s: runs(|s| s.rate_per_s),
            rate_ratio: against(|s, bare| s.rate_per_s / bare.rate_per_s.max(1e-9)),
            latency_p50_us: runs(|s| s.latency_us.0 as f64),
            latency_p99_us: runs(|s| s.latency_us.1 as f64),
            added_p50_us: against(|s, bare| s.latency_us.0 as f64 - bare.latency_us.0 as f64),
            added_p99_us: against(|s, bare| s.latency_us.1 as f64 - bare.latency_us.1 as f64),
            cpu: Usage {
                container: cpu(|u| u.container),
                primary: cpu(|u| u.primary),
                backup: cpu(|u| u.backup),
                ..Usage::default()
            },
            epochs: EpochFigures::of(&epochs, own.iter().map(|sample| sample.seconds).sum()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use netns_tools::topology::Volume;

    /// Two rounds on a machine that became twice as fast, with a gate that costs a tenth and a
    /// protection that costs half.
    pub(in super::super) fn samples() -> Vec<Sample> {
        let point = Point { connections: 50, load: Load::Closed, reads: None };
        let mut all = Vec::new();
        for (round, speed) in [(0, 1.0), (1, 2.0)] {
            for (mode, part, added) in
                [(Mode::Veth, 1.0, 0), (Mode::Gateway, 0.9, 10), (Mode::Protected, 0.5, 700)]
            {
                let epochs = (0..10).map(|i| EpochRecord {
                    stop_us: 400 + i,
                    interval_us: 5000,
                    wire_bytes: 1000,
                    commit_us: 300,
                    at_us: i * 5000,
                    ..EpochRecord::default()
                });
                all.push(Sample {
                    round,
                    point,
                    mode,
                    rate_per_s: 10_000.0 * speed * part,
                    latency_us: (100 + added, 900 + added),
                    usage: Usage { container: 0.8, primary: 0.2, ..Usage::default() },
                    epochs: epochs.filter(|_| mode == Mode::Protected).collect(),
                    seconds: 2.0,
                    complaint: None,
                });
            }
        }
        all
    }

    fn setting() -> Setting {
        Setting {
            version: "0",
            kernel: "6".to_owned(),
            date: String::new(),
            rounds: 2,
            load_s: 2.0,
            pipeline: 32,
            cores: None,
        }
    }

    pub(in super::super) fn report() -> BenchReport {
        let failover = Timeline {
            phases_ms: vec![("detect", 30.0), ("connect", 4.0), ("run", 1.0)],
            outage_ms: 35.0,
            gap_ms: 36.0,
        };
        BenchReport::of("redis", setting(), &samples(), Some(failover), 0)
    }

    #[test]
    fn a_ratio_is_taken_within_its_round() {
        let report = report();
        let [point] = &report.points[..] else { panic!("one load") };
        let [veth, gateway, protected] = &point.modes[..] else { panic!("three modes") };
        assert_eq!(veth.rate_ratio, Runs { median: 1.0, min: 1.0, max: 1.0 });
        assert_eq!(gateway.rate_ratio.median, 0.9);
        // Over both rounds together the rates differ by a factor of two.
        assert_eq!(protected.rate_ratio, Runs { median: 0.5, min: 0.5, max: 0.5 });
        assert_eq!(protected.rate_per_s, Runs { median: 5_000.0, min: 5_000.0, max: 10_000.0 });
        assert_eq!((protected.added_p50_us.median, protected.added_p99_us.median), (700.0, 700.0));
        assert!(veth.epochs.is_none() && gateway.epochs.is_none());
    }

    #[test]
    fn what_was_not_protected_all_the_time_measures_no_protection() {
        let topology = Topology::parse("demo", super::super::super::demo::TOPOLOGY).unwrap();
        let topology = super::super::in_mode(&topology, Mode::Protected);
        let run = || {
            let mut run = super::super::super::report::tests::moved();
            (run.failover, run.records) = (None, vec![EpochRecord::default()]);
            run.containers[0].name = topology.protect[0].container.clone();
            (run.containers[0].protected, run.containers[0].generation) = (true, 1);
            run.containers[0].primary = Some(topology.protect[0].primary.clone());
            run
        };
        let why = |run: &RunReport| not_protected(run, &topology);
        assert_eq!(why(&run()), None);
        let mut bare = run();
        bare.containers[0].protected = false;
        assert!(why(&bare).unwrap().contains("was not protected all the time: its backup is gone"));
        let mut away = run();
        away.containers[0].primary = Some(topology.protect[0].backup.clone());
        assert!(why(&away).unwrap().contains("it has moved"));
        let mut back = run();
        back.containers[0].generation = 3;
        assert!(why(&back).unwrap().contains("it has moved"));
        // Its files are of an earlier life.
        let path = "/srv/a".to_owned();
        let kind = VolumeKind::Replicated;
        let volume = Volume { path, kind, fsync: None, durable: None, start: None, check: None };
        let mut kept = topology.clone();
        kept.containers.values_mut().for_each(|c| c.volumes = vec![volume.clone()]);
        assert_eq!(not_protected(&back, &kept), None);
        assert!(not_protected(&away, &kept).is_some());
        let mut idle = run();
        idle.records.clear();
        assert_eq!(why(&idle).unwrap(), "there was no epoch");
        let moved = super::super::super::report::tests::moved();
        assert!(why(&moved).unwrap().contains("moved to"));
    }

    #[test]
    fn epochs_of_all_rounds_count_together() {
        let report = report();
        let epochs = report.points[0].modes[2].epochs.as_ref().unwrap();
        assert_eq!((epochs.count, epochs.per_s), (20, 5.0));
        assert_eq!((epochs.stop_us.p50, epochs.stop_us.max), (404, 409));
        assert_eq!(epochs.wire_bytes_per_s, 5000.0);
        assert!((epochs.stopped_share - 20.0 * 404.5e-6 / 4.0).abs() < 1e-9);
    }

    #[test]
    fn what_a_client_complains_of_is_told() {
        let mut samples = samples();
        samples[5].complaint = Some("1 acknowledged writes lost".to_owned());
        let report = BenchReport::of("redis", setting(), &samples, None, 0);
        let told = "50 connections, load closed, protected: 1 acknowledged writes lost";
        assert_eq!(report.complaints, [told]);
    }

    #[test]
    fn loads_are_written_as_parts() {
        for load in [Load::Closed, Load::Saturation] {
            assert_eq!(load.to_string().parse(), Ok(load));
        }
        assert_eq!("50%".parse::<Load>().unwrap().to_string(), "50%");
        assert!("0%".parse::<Load>().is_err() && "fast".parse::<Load>().is_err());
    }
}
