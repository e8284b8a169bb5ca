//! `nilicon bench`: what protection costs, against the same container without it.
//!
//! ```text
//! for each round:  for each load:  veth, gateway, protected      (each a lab of its own)
//!                                  the next round begins with another of the three
//! ```
//! Invariant: what is compared was measured side by side. A ratio or a difference is taken within
//! one round, and the median over the rounds is told; the modes take turns in going first, so that
//! a machine that warms up, or cools down, favours none.

mod against;
mod args;
mod cores;
mod figures;
mod idle;
mod plots;
mod scale;
mod table;
mod work;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use netns_tools::lab::Lab;
use netns_tools::topology::{Device, Event, Fault, Period, Topology, Volume, VolumeKind};

use super::args::Output;
use super::progress::Progress;
use super::report::RunReport;
use super::run::{self, Moment, Plan, REPLY_TIMEOUT, run_once};
use super::signals;
pub(super) use args::BenchArgs;
use cores::{Cores, Usage};
pub(super) use figures::Load;
use figures::{BenchReport, Mode, Point, Sample, Timeline};

/// Part of the load before the host is lost, in the run that is there for its timeline.
const FAILOVER_AT: f64 = 0.4;
/// How often a run is tried whose protection does not last, as on a machine that others keep busy.
const ATTEMPTS: u32 = 3;

/// `nilicon bench`. Returns whether nothing was lost, wrong or broken in any run.
pub(super) fn bench(args: &BenchArgs) -> Result<bool> {
    signals::catch()?;
    let topology = args.topology.load()?;
    let file = args.topology.path.display();
    ensure!(!topology.protect.is_empty(), "{file} needs a protected container to measure anything");
    if let Some(folder) = &args.plots {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let cores = Cores::split()?;
    if args.scale {
        return measure_scale(args, &topology, cores.as_ref());
    }
    if args.idle {
        let rows = idle::measure(args, &topology, cores.as_ref())?;
        return told(args, &rows, || idle::text(&rows));
    }
    if let Some(other) = &args.against {
        let report = against::measure(args, &topology, other)?;
        return told(args, &report, || against::text(&report));
    }
    if let Some((name, _)) =
        topology.containers.iter().find(|(_, c)| c.volumes.iter().any(Volume::is_root))
    {
        bail!(
            "{file} cannot be measured: without nilicon {name}, whose root is a volume, would write over the \
             files of this host; give it volumes in the places that it writes to instead of `/`"
        );
    }
    if let Some(port) = work::port(&topology) {
        let report = work::measure(args, &topology, cores.as_ref(), port)?;
        return told(args, &report, || work::text(&report));
    }
    ensure!(!topology.clients.is_empty(), "{file} needs a client to measure anything");
    let mut bench = Bench {
        args,
        topology,
        cores,
        progress: Progress::new(),
        samples: Vec::new(),
        repeated: 0,
    };
    for round in 0..args.rounds {
        bench.round(round)?;
    }
    let failover = match &args.plots {
        Some(_) => Some(bench.failover()?),
        None => None,
    };
    bench.progress.clear();
    let report = BenchReport::of(
        &bench.topology.name,
        figures::Setting::here(args, bench.cores.as_ref()),
        &bench.samples,
        failover,
        bench.repeated,
    );
    if let Some(folder) = &args.plots {
        write_into(folder, &report, &bench.samples)?;
    }
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text => print!("{}", table::of(&report)),
    }
    Ok(report.complaints.is_empty())
}

/// Prints what was found.
fn told(
    args: &BenchArgs,
    found: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> Result<bool> {
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(found)?),
        Output::Text => print!("{}", text()),
    }
    Ok(true)
}

/// `nilicon bench --scale`.
fn measure_scale(args: &BenchArgs, topology: &Topology, cores: Option<&Cores>) -> Result<bool> {
    let rows = scale::measure(topology, cores, args.only.as_deref(), &mut Progress::new())?;
    if let Some(folder) = &args.plots {
        let json = serde_json::to_string_pretty(&rows)?;
        for (name, text) in [("scale.json", json), ("scale.svg", plots::scale(&rows)?)] {
            let path = folder.join(name);
            std::fs::write(&path, text)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    told(args, &rows, || scale::text(&rows))
}

fn write_into(folder: &Path, report: &BenchReport, samples: &[Sample]) -> Result<()> {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    write("bench.json", serde_json::to_string_pretty(report)?)?;
    for (name, picture) in plots::all(report, samples)? {
        write(name, picture)?;
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a BenchArgs,
    topology: Topology,
    cores: Option<Cores>,
    progress: Progress,
    samples: Vec<Sample>,
    /// Runs that were made again.
    repeated: usize,
}

impl Bench<'_> {
    /// Every load in every mode, once.
    fn round(&mut self, round: u32) -> Result<()> {
        let all_reads = match &self.args.read_ratio[..] {
            [] => vec![None],
            parts => parts.iter().copied().map(Some).collect(),
        };
        for &connections in &self.args.connections {
            for &reads in &all_reads {
                // Parts are parts of what this finds.
                let mut loads = vec![Load::Closed];
                let more = self.args.loads.iter().copied().filter(|load| *load != Load::Closed);
                loads.extend(more);
                for load in loads {
                    let point = Point { connections, load, reads };
                    let rate = match load {
                        Load::Closed | Load::Saturation => None,
                        Load::Part(part) => Some(self.part_of_most(point, part.get())?),
                    };
                    let first = round as usize % Mode::ALL.len();
                    for mode in Mode::ALL.iter().cycle().skip(first).take(Mode::ALL.len()) {
                        self.measure(round, point, rate, *mode)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A part of what an unprotected container was found to do.
    fn part_of_most(&self, point: Point, part: f64) -> Result<u64> {
        let most = Point { load: Load::Closed, ..point };
        let most = figures::rate_of(&self.samples, most, Mode::Veth);
        ensure!(most > 0.0, "the unprotected container answers nobody");
        Ok(((most * part) as u64).max(1))
    }

    fn measure(&mut self, round: u32, point: Point, rate: Option<u64>, mode: Mode) -> Result<()> {
        let mut topology = in_mode(&self.topology, mode);
        let client = topology.clients.first_mut().context("the topology has no client")?;
        (client.connections, client.rate, client.duration) = (point.connections, rate, None);
        if point.load == Load::Saturation {
            client.pipeline = self.args.pipeline;
        }
        if let Some(reads) = point.reads {
            client.read_ratio = reads;
        }
        let head = format!("round {}/{}  {point}  {mode}", round + 1, self.args.rounds);
        for left in (0..ATTEMPTS).rev() {
            let (mut report, usage) = self.run(topology.clone(), *self.args.load, round, &head)?;
            let bare = if mode == Mode::Protected {
                figures::not_protected(&report, &topology)
            } else {
                None
            };
            if let Some(why) = bare {
                if left > 0 {
                    self.repeated += 1;
                    continue;
                }
                let what = format!("protection did not last, {ATTEMPTS} times ({why})");
                report.why = report.why.or(Some(what));
            }
            self.samples.push(Sample::of(round, point, mode, report, usage));
            break;
        }
        Ok(())
    }

    /// One run of the protected lab that loses its host, for the timeline of a failover.
    fn failover(&mut self) -> Result<Timeline> {
        let mut topology = in_mode(&self.topology, Mode::Protected);
        let node = topology.protect.first().map(|protect| protect.primary.clone());
        let at = Period::ms((self.args.load.as_millis() as f64 * FAILOVER_AT) as u64);
        topology.events = vec![Event { at, fault: Fault::KillHost, node, link: None }];
        let (report, _) = self.run(topology, *self.args.load, 0, "the loss of the host")?;
        if let Some(complaint) = report.complaint() {
            bail!("the failover for the timeline: {complaint}");
        }
        Timeline::of(&report).context("there was no failover")
    }

    fn run(
        &mut self,
        topology: Topology,
        load: Duration,
        seed: u32,
        head: &str,
    ) -> Result<(RunReport, Usage)> {
        let name = topology.name.clone();
        let plan = Plan {
            topology,
            duration: Some(load),
            seed: u64::from(seed) + 1,
            output_commit: true,
            reply_timeout: REPLY_TIMEOUT,
            switchovers: 0,
            keep: false,
        };
        let (cores, progress) = (&self.cores, &mut self.progress);
        let (mut watched, mut trouble) = (Watched::default(), None);
        let report = run_once(&plan, &mut |moment| {
            trouble = trouble.take().or(watched.look(&name, cores.as_ref(), &moment).err());
            if let Moment::Load(_, elapsed) = &moment {
                progress.update(|| format!("{head}  {:.0} s", elapsed.as_secs_f64()));
            } else {
                run::show(progress, &moment);
            }
        });
        let report = report.with_context(|| head.to_owned())?;
        match trouble {
            Some(trouble) => Err(trouble.context(head.to_owned())),
            None => Ok((report, watched.usage)),
        }
    }
}

/// What is done and seen beside a run.
#[derive(Default)]
struct Watched {
    before: Usage,
    usage: Usage,
}

impl Watched {
    fn look(&mut self, lab: &str, cores: Option<&Cores>, moment: &Moment<'_>) -> Result<()> {
        match (moment, cores) {
            (Moment::Protected(view), Some(cores)) => cores.pin(view)?,
            (Moment::LoadBegins, _) => self.before = Usage::of(&Lab::open(lab)?),
            (Moment::Auditing, _) => self.usage = Usage::of(&Lab::open(lab)?).since(&self.before),
            _ => {}
        }
        Ok(())
    }
}

/// The same lab with its containers in a mode, without faults, and with its first client alone.
fn in_mode(topology: &Topology, mode: Mode) -> Topology {
    let mut topology = topology.clone();
    topology.events.clear();
    topology.clients.truncate(1);
    if mode == Mode::Protected {
        return topology;
    }
    let homes: Vec<_> =
        topology.containers.keys().map(|name| topology.home_of(name).map(str::to_owned)).collect();
    topology.protect.clear();
    topology.witness = None;
    for (container, home) in topology.containers.values_mut().zip(homes) {
        container.host = home;
        if mode == Mode::Veth {
            container.device = Device::Veth;
            container.volumes.iter_mut().for_each(without_us);
        }
    }
    topology
}

/// A volume as a container has it that nobody replicates.
fn without_us(volume: &mut Volume) {
    let kind = match volume.kind {
        VolumeKind::Replicated => VolumeKind::Ephemeral,
        VolumeKind::ReadOnly => VolumeKind::Shared,
        other => other,
    };
    let path = std::mem::take(&mut volume.path);
    *volume = Volume { path, kind, fsync: None, durable: None, start: None, check: None };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_plain_without_us() {
        let text = super::super::demo::TOPOLOGY.replacen(
            "    uplink: lan\n",
            "    uplink: lan\n    volumes:\n      - { path: /srv/a, kind: replicated, start: empty, check: 'true' }\n      \
             - { path: /srv/b, kind: read-only }\n      - { path: /srv/c, kind: ephemeral }\n",
            1,
        );
        let topology = Topology::parse("demo", &text).unwrap();
        let kinds = |mode| {
            let lab = in_mode(&topology, mode);
            let text = serde_json::to_string(&lab).unwrap();
            assert_eq!(Topology::parse("again", &text).unwrap(), lab);
            lab.containers
                .values()
                .flat_map(|c| c.volumes.clone())
                .map(|v| v.kind)
                .collect::<Vec<_>>()
        };
        use VolumeKind::{Ephemeral, ReadOnly, Replicated, Shared};
        assert_eq!(kinds(Mode::Veth), [Ephemeral, Shared, Ephemeral]);
        assert_eq!(kinds(Mode::Gateway), [Replicated, ReadOnly, Ephemeral]);
    }

    #[test]
    fn what_is_compared_differs_in_its_protection_alone() {
        let topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let protected = in_mode(&topology, Mode::Protected);
        assert_eq!((protected.protect.len(), protected.events.len()), (1, 0));
        for mode in [Mode::Gateway, Mode::Veth] {
            let mut bare = in_mode(&topology, mode);
            assert!(bare.protect.is_empty());
            let home = topology.protect[0].primary.as_str();
            for (name, container) in &mut bare.containers {
                assert_eq!(container.host.as_deref(), Some(home));
                assert_eq!(container.device == Device::Veth, mode == Mode::Veth);
                container.host = protected.containers[name].host.clone();
                container.device = Device::Gateway;
            }
            assert_eq!(bare.containers, protected.containers);
            assert_eq!(bare.clients, protected.clients);
            // What a lab is made of passes through its file.
            let text = serde_json::to_string(&in_mode(&topology, mode)).unwrap();
            assert_eq!(Topology::parse("again", &text).unwrap(), in_mode(&topology, mode));
        }
    }
}
