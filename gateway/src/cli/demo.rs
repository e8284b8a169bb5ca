//! `nilicon demo`: the whole story in less than half a minute, told as it happens.

use std::time::Duration;

use anyhow::Result;
use netns_tools::topology::{Event, Fault, Topology};

use super::clock::time_of_day;
use super::journal::Failover;
use super::numbers::{bytes, grouped, micros, millis};
use super::progress::Progress;
use super::report::{InjectedFault, RunReport};
use super::run::{self, Moment, Plan, run_once};
use super::{is_installed, signals};

/// The lab of the demo.
pub(super) const TOPOLOGY: &str = include_str!("../../../topologies/demo.topo.yml");

/// Redis in memory only: its files would not move to the other host.
const REDIS: [&str; 11] = [
    "redis-server",
    "--port",
    "6379",
    "--bind",
    "0.0.0.0",
    "--save",
    "",
    "--appendonly",
    "no",
    "--protected-mode",
    "no",
];
/// So soon a client gives up here: the demo must end in time, also when it goes wrong.
const REPLY_TIMEOUT: Duration = Duration::from_secs(6);
/// When it is told how the load goes.
const FIGURES_AT: Duration = Duration::from_secs(3);

/// `nilicon demo`. Returns whether nothing was lost.
pub(super) fn demo() -> Result<bool> {
    signals::catch()?;
    let topology = topology(is_installed("redis-server"))?;
    let mut story = Story {
        progress: Progress::new(),
        workload: workload(&topology),
        data: topology.clients.iter().filter_map(|client| Some(client.populate?.0)).sum(),
        figures_told: false,
    };
    story.say("A lab of network namespaces: two hosts, alpha and beta, a switch, a client.");
    let plan = Plan {
        duration: topology.duration.map(|duration| *duration),
        topology,
        seed: 1,
        output_commit: true,
        reply_timeout: REPLY_TIMEOUT,
        switchovers: 0,
        keep: false,
    };
    let report = run_once(&plan, &mut |moment| story.tell(moment))?;
    story.end(&report);
    Ok(report.is_success())
}

/// The lab of the demo. With Redis the container runs that: it has never heard of nilicon.
fn topology(with_redis: bool) -> Result<Topology> {
    let mut topology = Topology::parse("the demo", TOPOLOGY)?;
    for container in topology.containers.values_mut().filter(|_| with_redis) {
        container.command = Some(REDIS.iter().map(|&word| word.to_owned()).collect());
    }
    Ok(topology)
}

/// What the container runs, in words.
fn workload(topology: &Topology) -> String {
    let container = topology.containers.values().next();
    match container.and_then(|container| container.command.as_ref()?.first()) {
        Some(program) => format!("An unmodified {program}"),
        None => "A key-value server (redis-server is not installed here)".to_owned(),
    }
}

struct Story {
    progress: Progress,
    workload: String,
    /// Bytes that the clients load before.
    data: u64,
    figures_told: bool,
}

impl Story {
    fn say(&mut self, text: &str) {
        self.progress.clear();
        println!("{}  {text}", time_of_day());
    }

    fn tell(&mut self, moment: Moment<'_>) {
        match &moment {
            Moment::Protected(view) => {
                for container in &view.containers {
                    let name = |host: &Option<String>| host.clone().unwrap_or_default();
                    let (home, backup) = (name(&container.primary), name(&container.backup));
                    let (what, address) = (&self.workload, &container.address);
                    let text = format!("{what} runs on {home} at {address}.");
                    self.say(&text);
                    self.say(&format!("{backup} holds a copy, at most a few ms old."));
                    self.say(&format!("No packet leaves {home} before {backup} has its state."));
                }
            }
            Moment::LoadBegins => {
                let text = format!(
                    "{} are loaded. The client reads and writes, and checks every answer.",
                    bytes(self.data)
                );
                self.say(&text);
            }
            Moment::Load(clients, elapsed) if !self.figures_told && *elapsed >= FIGURES_AT => {
                self.figures_told = true;
                let (rate, _, errors) = clients.pulse();
                let rate = grouped(rate as u64);
                self.say(&format!("{rate} requests a second, {errors} errors so far."));
            }
            Moment::Fault(event) => self.tell_fault(event),
            Moment::FailedOver(failover, fault) => self.tell_failover(failover, *fault),
            Moment::Auditing => self.say("The load ends. The client reads back all it wrote ..."),
            _ => {}
        }
        run::show(&mut self.progress, &moment);
    }

    fn tell_fault(&mut self, event: &Event) {
        let node = event.node.as_deref().unwrap_or("a host");
        match event.fault {
            Fault::KillHost => self.say(&format!(
                "{node} loses power, NOW: its links fall silent, all its processes are killed."
            )),
            fault => self.say(&format!("{} happens to {node}, NOW.", super::faults::word(fault))),
        }
    }

    fn tell_failover(&mut self, failover: &Failover, fault: Option<&InjectedFault>) {
        let record = &failover.record;
        let span = |from: u64, to: u64| micros(to.saturating_sub(from));
        let noticed = fault.map_or_else(String::new, |fault| {
            format!(" noticed after {} and", span(fault.at_us, record.suspected_at_us))
        });
        self.say(&format!(
            "{}{noticed} took over in {}: the same address, the same {} connections.",
            failover.host,
            span(record.suspected_at_us, record.running_at_us),
            record.connections
        ));
    }

    fn end(&mut self, report: &RunReport) {
        let connections: usize = report.clients.iter().map(|c| c.report.connections).sum();
        let broken = report.sum(|c| c.broken_connections);
        self.say("What the clients saw:");
        let facts = [
            ("longest pause", millis(report.gap_ms())),
            ("broken connections", format!("{broken} of {connections}")),
            (
                "lost writes",
                format!(
                    "{} of {} that were acknowledged",
                    report.sum(|c| c.lost_writes),
                    grouped(report.sum(|c| c.acknowledged_writes))
                ),
            ),
            (
                "wrong answers",
                format!(
                    "{} of {}",
                    report.sum(|c| c.wrong_replies),
                    grouped(report.sum(|c| c.requests))
                ),
            ),
            (
                "checkpoints",
                format!(
                    "{}, each stopped the server for {} (median)",
                    grouped(report.epochs.committed as u64),
                    micros(report.epochs.stop_us.p50)
                ),
            ),
        ];
        for (what, value) in facts {
            println!("            {what:<19} {value}");
        }
        match report.complaint() {
            None => self.say("Nothing lost. The lab is gone again."),
            Some(complaint) => {
                self.say(&format!("THIS WENT WRONG: {complaint}."));
                run::eprint_logs(report);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lab_of_the_demo_is_fit_for_its_story() {
        let topology = topology(false).unwrap();
        assert_eq!(topology.name, "demo");
        assert_eq!(topology.containers.len(), 1);
        let [event] = &topology.events[..] else { panic!("one fault") };
        assert_eq!(event.fault, Fault::KillHost);
        assert_eq!(event.node.as_deref(), Some(topology.protect[0].primary.as_str()));
        let duration = *topology.duration.unwrap();
        assert!(*event.at > FIGURES_AT && *event.at < duration);
        assert_eq!(topology.clients[0].target.port, 6379, "where Redis listens");
        assert!(duration + REPLY_TIMEOUT < Duration::from_secs(20), "it must fit half a minute");
    }
}
