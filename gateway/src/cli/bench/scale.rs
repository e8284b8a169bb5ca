//! What a stop costs, against one property of the container at a time: slopes, not only points.
//!
//! The container is a program of ours that has the shape it is told (`__shape`). It is asked by a
//! few connections in turn; each question makes it write some pages, and its answer ends an epoch.
//! After the last question of the rows that vary the size of the data its host is lost, which
//! shows whether a failover depends on it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_tools::lab::Lab;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{Event, Fault, NodeKind, Period, Ready, Topology};
use serde::Serialize;

use super::super::deploy::Standing;
use super::super::numbers::{bytes, micros};
use super::super::progress::Progress;
use super::super::report::EpochReport;
use super::super::view::LabView;
use super::super::{faults, journal, own_program, signals};
use super::cores::Cores;
use crate::agent::monotonic_us;
use crate::agent::status::FailoverPhases;

/// Where the program listens.
const PORT: u16 = 6379;
/// Questions before it counts: the first epochs after the full copy are not yet like the others.
const WARM_UP: usize = 20;
/// Questions that count.
const QUESTIONS: usize = 150;
/// Connections that ask; the others only exist.
const ASKING: usize = 10;
/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pause between looks for the record of a failover.
const LOOK: Duration = Duration::from_millis(5);
/// How long the first copy of each byte of data may take, at both hosts: fresh memory is dear where
/// the machine is a virtual one.
const COPY_NS_A_BYTE: u64 = 100;
const MB: u64 = 1_000_000;

/// What can vary.
pub(super) const PROPERTIES: [&str; 6] =
    ["data", "dirty", "threads", "processes", "connections", "mappings"];

/// A shape of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Shape {
    /// Bytes of data.
    pub(super) data: u64,
    /// Pages that are written for a question.
    pub(super) dirty: usize,
    pub(super) threads: usize,
    pub(super) processes: usize,
    pub(super) mappings: usize,
    pub(super) connections: usize,
}

/// What all rows have but for their own property.
const PLAIN: Shape =
    Shape { data: 100 * MB, dirty: 500, threads: 1, processes: 1, mappings: 0, connections: 1 };

/// One row: a property at a value.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) property: &'static str,
    pub(super) value: u64,
    #[serde(flatten)]
    shape: Shape,
    #[serde(flatten)]
    pub(super) epochs: EpochReport,
    /// From suspicion until the container ran again.
    failover_ms: Option<f64>,
    /// Its phases.
    failover_phases_ms: Option<FailoverPhases>,
}

/// The properties that vary, each with its values.
fn plan() -> Vec<(&'static str, u64, Shape)> {
    let mut all = Vec::new();
    let mut add = |property, values: &[u64], of: fn(u64) -> Shape| {
        all.extend(values.iter().map(|value| (property, *value, of(*value))));
    };
    let sizes = [10 * MB, 100 * MB, 500 * MB, 1000 * MB, 2000 * MB];
    add("data", &sizes, |data| Shape { data, ..PLAIN });
    add("dirty", &[10, 100, 1_000, 5_000, 20_000], |v| Shape { dirty: v as usize, ..PLAIN });
    add("threads", &[1, 8, 32, 64], |v| Shape { threads: v as usize, ..PLAIN });
    add("processes", &[1, 4, 16, 32], |v| Shape { processes: v as usize, ..PLAIN });
    add("connections", &[1, 10, 100, 1_000], |v| Shape { connections: v as usize, ..PLAIN });
    add("mappings", &[20, 500, 5_000], |v| Shape { mappings: v as usize, ..PLAIN });
    all
}

/// Measures every row, or those of one property.
///
/// # Errors
/// A lab cannot be made, or the container does not answer.
pub(super) fn measure(
    topology: &Topology,
    cores: Option<&Cores>,
    only: Option<&str>,
    progress: &mut Progress,
) -> Result<Vec<Row>> {
    let mut plan = plan();
    plan.retain(|(property, ..)| only.is_none_or(|only| only == *property));
    let count = plan.len();
    let mut rows = Vec::new();
    for (index, (property, value, shape)) in plan.into_iter().enumerate() {
        let head = format!("{property} {value} ({} of {count})", index + 1);
        progress.show(&head);
        let row = of_shape(topology, cores, property, value, shape).with_context(|| head)?;
        rows.push(row);
    }
    progress.clear();
    Ok(rows)
}

fn of_shape(
    topology: &Topology,
    cores: Option<&Cores>,
    property: &'static str,
    value: u64,
    shape: Shape,
) -> Result<Row> {
    let topology = shaped(topology, shape)?;
    let standing = Standing::deploy_new(&topology, true, false)?;
    let view = standing.until_protected(&mut |_| {})?;
    if let Some(cores) = cores {
        cores.pin(&view)?;
    }
    let lab = standing.lab();
    until_copied(lab, PATIENCE + copying(shape))?;
    let mut asking = connect(lab, shape.connections)?;
    ask(&mut asking, WARM_UP)?;
    let begun = monotonic_us();
    ask(&mut asking, QUESTIONS)?;
    let epochs = journal::epochs(lab, &(begun..=monotonic_us()));
    ensure!(!epochs.is_empty(), "there were no epochs");
    let epochs = EpochReport::of(&epochs);
    let phases = if property == "data" { Some(lose_host(lab, &mut asking)?) } else { None };
    let failover_ms = phases.map(|phases| phases.total);
    Ok(Row { property, value, shape, epochs, failover_ms, failover_phases_ms: phases })
}

/// How long the first copy may take.
fn copying(shape: Shape) -> Duration {
    Duration::from_nanos(shape.data * COPY_NS_A_BYTE)
}

/// Waits until the backup has applied all that it has acknowledged, the first copy above all: it is
/// acknowledged when it is there, and applied beside what follows.
pub(super) fn until_copied(lab: &Lab, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let has_all = || {
        let view = LabView::ask(lab);
        view.containers.iter().filter(|container| container.protected).all(|container| {
            let mut parts = view.parts(&container.name);
            let backup = parts.find(|(host, _)| Some(*host) == container.backup.as_deref());
            container.epoch > 0 && backup.is_some_and(|(_, part)| part.epoch >= container.epoch)
        })
    };
    while !has_all() {
        signals::check()?;
        ensure!(
            Instant::now() < deadline,
            "the backup has not applied the first copy within {patience:?}"
        );
        std::thread::sleep(LOOK * 10);
    }
    Ok(())
}

/// The topology with its first protected container in this shape, alone and without load.
fn shaped(topology: &Topology, shape: Shape) -> Result<Topology> {
    let mut topology = super::in_mode(topology, super::Mode::Protected);
    topology.clients.clear();
    topology.protect.truncate(1);
    let name = topology.protect.first().context("nothing is protected")?.container.clone();
    topology.containers.retain(|container, _| *container == name);
    let container = topology.containers.get_mut(&name).context("it is not there")?;
    let program = own_program()?.to_string_lossy().into_owned();
    let mut command = vec![program, "__shape".to_owned()];
    for (flag, value) in [
        ("--memory", shape.data),
        ("--dirty", shape.dirty as u64),
        ("--threads", shape.threads as u64),
        ("--processes", shape.processes as u64),
        ("--mappings", shape.mappings as u64),
    ] {
        command.extend([flag.to_owned(), value.to_string()]);
    }
    let any = if container.address.ip.is_ipv6() { "[::]" } else { "0.0.0.0" };
    command.extend(["--listen".to_owned(), format!("{any}:{PORT}")]);
    container.command = Some(command);
    container.embedded = None;
    let patience = Duration::from_secs(30) + copying(shape);
    container.ready = Some(Ready { tcp: PORT, timeout: Period(patience) });
    Ok(topology)
}

/// Connections from the lab's first client node to its container.
fn connect(lab: &Lab, connections: usize) -> Result<Vec<TcpStream>> {
    let topology = lab.topology();
    let node = topology.nodes_of(NodeKind::Client).next().context("it has no client node")?;
    let container = topology.containers.values().next().context("it has no container")?;
    let address = SocketAddr::new(container.address.ip, PORT);
    let network = Namespace::open(&Namespace::name_of(lab.name(), node))?;
    network.enter(|| -> Result<Vec<TcpStream>> {
        let mut all = Vec::with_capacity(connections);
        for _ in 0..connections {
            let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            all.push(stream);
        }
        Ok(all)
    })?
}

fn ask(connections: &mut [TcpStream], questions: usize) -> Result<()> {
    let asking = connections.len().min(ASKING);
    for question in 0..questions {
        signals::check()?;
        let connection = &mut connections[question % asking];
        let sent = [question as u8];
        connection.write_all(&sent)?;
        let mut answer = [0];
        connection.read_exact(&mut answer).context("it does not answer")?;
        ensure!(answer == sent, "it gave a wrong answer");
    }
    Ok(())
}

/// Loses the host of the container, and waits until all connections are answered again.
fn lose_host(lab: &Lab, connections: &mut [TcpStream]) -> Result<FailoverPhases> {
    let node = lab.topology().protect.first().map(|protect| protect.primary.clone());
    let event = Event { at: Period::default(), fault: Fault::KillHost, node, link: None };
    faults::inject(lab, &event, &LabView::ask(lab))?;
    let count = connections.len().min(ASKING);
    ask(connections, count)?;
    // The record is written once the container runs, so that an answer may come before it.
    let begun = Instant::now();
    loop {
        if let Some(failover) = journal::failovers(lab).pop() {
            return Ok(failover.record.phases_ms);
        }
        ensure!(begun.elapsed() < PATIENCE, "there was no failover");
        std::thread::sleep(LOOK);
    }
}

/// The rows as text.
pub(super) fn text(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<12}{:>9}{:>11}{:>11}{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}\n",
        "", "", "stop p50", "99 %", "freeze", "memory", "threads", "files", "pages", "failover"
    );
    let mut last = "";
    for row in rows {
        let value = if row.property == "data" { bytes(row.value) } else { row.value.to_string() };
        let stages = &row.epochs.stop_us_by_stage;
        let failover = row.failover_ms.map_or(String::new(), |ms| format!("{ms:.1} ms"));
        text += &format!(
            "{:<12}{:>9}{:>11}{:>11}{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}\n",
            if row.property == last { "" } else { row.property },
            value,
            micros(row.epochs.stop_us.p50),
            micros(row.epochs.stop_us.p99),
            stages.freeze,
            stages.memory,
            stages.threads,
            stages.files,
            row.epochs.dirty_pages.p50,
            failover
        );
        last = row.property;
    }
    text + "(stages in us)\n"
}

/// The rows by property, for plots: value and median stop time.
pub(super) fn lines(rows: &[Row]) -> BTreeMap<&'static str, Vec<(f64, f64)>> {
    let mut lines: BTreeMap<&'static str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows {
        let point = (row.value as f64, row.epochs.stop_us.p50 as f64);
        lines.entry(row.property).or_default().push(point);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_property_varies_at_a_time() {
        let mut told: Vec<_> = plan().into_iter().map(|(property, ..)| property).collect();
        told.dedup();
        assert_eq!(told, PROPERTIES);
        for (property, value, shape) in plan() {
            let mut plain = shape;
            match property {
                "data" => plain.data = PLAIN.data,
                "dirty" => plain.dirty = PLAIN.dirty,
                "threads" => plain.threads = PLAIN.threads,
                "processes" => plain.processes = PLAIN.processes,
                "connections" => plain.connections = PLAIN.connections,
                "mappings" => plain.mappings = PLAIN.mappings,
                other => panic!("{other} is no property"),
            }
            assert_eq!(plain, PLAIN, "{property} {value}");
        }
    }

    #[test]
    fn rows_become_a_table_and_a_picture() {
        let rows: Vec<Row> = plan()
            .into_iter()
            .map(|(property, value, shape)| {
                let mut epochs = EpochReport::default();
                (epochs.stop_us.p50, epochs.stop_us_by_stage.files) = (300 + value % 7, 41);
                Row {
                    property,
                    value,
                    shape,
                    epochs,
                    failover_ms: (value == 10 * MB).then_some(2.1),
                    failover_phases_ms: None,
                }
            })
            .collect();
        let text = text(&rows);
        assert_eq!(text.lines().count(), rows.len() + 2);
        assert!(text.contains("2.1 ms") && text.contains("10 MB"), "{text}");
        assert_eq!(lines(&rows).values().map(Vec::len).sum::<usize>(), rows.len());
        let picture = super::super::plots::scale(&rows).unwrap();
        assert!(["mappings", "threads"].iter().all(|name| picture.contains(name)));
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(
            (&json["property"], &json["stop_us"]["p50"]),
            (&"data".into(), &(300 + 10 * MB % 7).into())
        );
    }

    #[test]
    fn the_container_is_told_its_shape() {
        let topology = Topology::parse("demo", super::super::super::demo::TOPOLOGY).unwrap();
        let shape = Shape { threads: 7, ..PLAIN };
        let shaped = shaped(&topology, shape).unwrap();
        let container = shaped.containers.values().next().unwrap();
        let command = container.command.as_ref().unwrap().join(" ");
        assert!(command.contains("--memory 100000000 --dirty 500 --threads 7"), "{command}");
        assert!(shaped.clients.is_empty() && shaped.events.is_empty());
    }
}
