//! Faults as the command line writes them, when they happen, and making them happen.
//!
//! A fault on the command line becomes the same [`Event`] as one in a topology file, and is
//! checked by the same rules.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use netns_tools::lab::Lab;
use netns_tools::lab::fault::Victims;
use netns_tools::process;
use netns_tools::topology::{Endpoint, Event, Fault, NodeKind, Period, Topology};
use nix::sys::signal::Signal;

use super::view::LabView;

/// Part of the load before which no fault of a drill happens, and after which none does: there
/// must be something to lose, and time to notice the loss.
const DRILL_WINDOW: (f64, f64) = (0.2, 0.7);

/// The faults that a drill can inject at the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DrillFault {
    /// The primary loses power.
    KillHost,
    /// The agent of the primary is killed.
    KillAgent,
    /// All links of the primary are cut; it does not know that it is alone.
    CutLink,
    /// The agent of the primary stands still, and goes on later.
    PauseAgent,
    /// The link for checkpoints is cut for a while.
    CutReplication,
    /// What the primary sends over the link for checkpoints is lost for a while.
    CutOut,
    /// The primary's link to its clients is cut for a while.
    CutClients,
    /// The agent of the backup is killed, and started again later.
    KillBackup,
    /// One of these, chosen by the seed of the run.
    Any,
}

/// How long a fault of a drill lasts that goes by.
const FOR_A_WHILE: Duration = Duration::from_millis(1500);

impl DrillFault {
    /// All but [`DrillFault::Any`].
    const EACH: [Self; 8] = [
        Self::KillHost,
        Self::KillAgent,
        Self::CutLink,
        Self::PauseAgent,
        Self::CutReplication,
        Self::CutOut,
        Self::CutClients,
        Self::KillBackup,
    ];

    /// The fault of a run with this seed.
    pub(super) fn of_seed(self, seed: u64) -> Self {
        match self {
            // Another stream than that of the fault's moment.
            Self::Any => Self::EACH[fastrand::Rng::with_seed(!seed).usize(..Self::EACH.len())],
            other => other,
        }
    }

    /// Its name on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What happens at the hosts of a topology's first protected container, where it starts; the
    /// second event, if there is one, ends what the first began.
    pub(super) fn events(self, topology: &Topology) -> Result<Vec<Event>> {
        let protect = topology.protect.first().context("the topology protects no container")?;
        let (primary, backup) = (&protect.primary, &protect.backup);
        let over = || {
            let interface = topology.replication_interface(protect, primary);
            let interface = interface.context("the hosts have no link for checkpoints")?.to_owned();
            anyhow::Ok(Endpoint { node: primary.clone(), interface })
        };
        let uplink = || {
            let container = topology.containers.get(&protect.container);
            let interface = container.context("there is no such container")?.uplink.clone();
            anyhow::Ok(Endpoint { node: primary.clone(), interface })
        };
        let of_host = |fault, node: &String| (fault, Some(node.clone()), None);
        let of_link = |fault, end| (fault, None, Some(end));
        let parts = match self {
            Self::KillHost => vec![of_host(Fault::KillHost, primary)],
            Self::KillAgent => vec![of_host(Fault::KillAgent, primary)],
            Self::CutLink => vec![of_host(Fault::CutLink, primary)],
            Self::PauseAgent => {
                vec![of_host(Fault::PauseAgent, primary), of_host(Fault::WakeAgent, primary)]
            }
            Self::CutReplication => {
                vec![of_link(Fault::CutLink, over()?), of_link(Fault::HealLink, over()?)]
            }
            Self::CutOut => {
                vec![of_link(Fault::CutOut, over()?), of_link(Fault::HealLink, over()?)]
            }
            Self::CutClients => {
                vec![of_link(Fault::CutLink, uplink()?), of_link(Fault::HealLink, uplink()?)]
            }
            Self::KillBackup => {
                vec![of_host(Fault::KillAgent, backup), of_host(Fault::RestartAgent, backup)]
            }
            Self::Any => bail!("which fault it is depends on the seed"),
        };
        let at = (0..).map(|part| Period(FOR_A_WHILE * part));
        let event = |((fault, node, link), at)| Event { at, fault, node, link };
        Ok(parts.into_iter().zip(at).map(event).collect())
    }
}

/// Reads `WHAT:NODE` or `WHAT:NODE:IFACE`; the fault happens at once.
pub(super) fn parse(text: &str) -> Result<Event, String> {
    let (what, place) = text
        .split_once(':')
        .ok_or_else(|| format!("`{text}` is not a fault such as kill-host:alpha"))?;
    let fault = match what {
        "kill-host" => Fault::KillHost,
        "kill-agent" => Fault::KillAgent,
        "restart-agent" => Fault::RestartAgent,
        "revive-host" => Fault::ReviveHost,
        "pause-agent" => Fault::PauseAgent,
        "wake-agent" => Fault::WakeAgent,
        "cut-link" => Fault::CutLink,
        "cut-out" => Fault::CutOut,
        "heal-link" => Fault::HealLink,
        _ => {
            return Err(format!(
                "`{what}` is not known; known are kill-host, kill-agent, restart-agent, revive-host, \
                 pause-agent, wake-agent, cut-link, cut-out and heal-link"
            ));
        }
    };
    let at = Period::default();
    if !place.contains(':') {
        if place.is_empty() {
            return Err(format!("`{text}` names no node"));
        }
        return Ok(Event { at, fault, node: Some(place.to_owned()), link: None });
    }
    if fault.is_of_host() {
        return Err(format!("{what} happens to a host, not to an interface: {what}:NODE"));
    }
    let link: Endpoint =
        place.parse().map_err(|error: netns_tools::topology::BadValue| error.to_string())?;
    Ok(Event { at, fault, node: None, link: Some(link) })
}

/// Reads a fault and its time, as in `kill-host:alpha@5s`.
pub(super) fn parse_timed(text: &str) -> Result<Event, String> {
    let (fault, at) = text
        .rsplit_once('@')
        .ok_or_else(|| format!("`{text}` has no time; write it as {text}@5s"))?;
    let at = at.parse().map_err(|error: netns_tools::topology::BadValue| error.to_string())?;
    Ok(Event { at, ..parse(fault)? })
}

/// Whether a fault can happen to a topology.
///
/// # Errors
/// It names a node or a link that is not there.
pub(super) fn check(event: &Event, topology: &Topology) -> Result<()> {
    if let Some(node) = &event.node {
        let Some(known) = topology.nodes.get(node) else {
            let nodes: Vec<&str> = topology.nodes.keys().map(String::as_str).collect();
            bail!("{}: there is no node {node}; known are {}", describe(event), nodes.join(", "));
        };
        ensure!(
            !event.fault.is_of_host() || known.kind == NodeKind::Host,
            "{}: {node} is not a host",
            describe(event)
        );
    }
    if let Some(end) = &event.link {
        ensure!(topology.link_at(end).is_some(), "{}: no link ends at {end}", describe(event));
    }
    Ok(())
}

/// A fault as the command line writes it, without its time.
pub(super) fn describe(event: &Event) -> String {
    let place = match (&event.link, &event.node) {
        (Some(end), _) => end.to_string(),
        (None, Some(node)) => node.clone(),
        (None, None) => String::new(),
    };
    format!("{}:{place}", word(event.fault))
}

/// The word for a fault.
pub(super) fn word(fault: Fault) -> &'static str {
    match fault {
        Fault::KillHost => "kill-host",
        Fault::KillAgent => "kill-agent",
        Fault::RestartAgent => "restart-agent",
        Fault::ReviveHost => "revive-host",
        Fault::PauseAgent => "pause-agent",
        Fault::WakeAgent => "wake-agent",
        Fault::CutLink => "cut-link",
        Fault::CutOut => "cut-out",
        Fault::HealLink => "heal-link",
    }
}

/// The host that cannot run its containers any more after this fault, if there is one.
pub(super) fn host_lost_by(event: &Event) -> Option<&str> {
    match event.fault {
        // Without a link named, all links of the node are cut.
        Fault::KillHost | Fault::KillAgent | Fault::PauseAgent | Fault::CutLink | Fault::CutOut => {
            event.node.as_deref()
        }
        Fault::HealLink | Fault::RestartAgent | Fault::ReviveHost | Fault::WakeAgent => None,
    }
}

/// Moves the faults so that the first happens at a random moment of the drill's window; the
/// others keep their distance from it.
pub(super) fn at_random(events: &[Event], duration: Duration, seed: u64) -> Vec<Event> {
    let first = events.iter().map(|event| *event.at).min().unwrap_or_default();
    let (from, to) = DRILL_WINDOW;
    let part = from + (to - from) * fastrand::Rng::with_seed(seed).f64();
    // Whole microseconds are enough, and read well.
    let moment = Duration::from_micros(duration.mul_f64(part).as_micros() as u64);
    let moved = |event: &Event| Event { at: Period(*event.at - first + moment), ..event.clone() };
    let mut events: Vec<Event> = events.iter().map(moved).collect();
    events.sort_by_key(|event| event.at);
    events
}

/// Makes a fault happen. `before` is the lab as it was: it knows where the processes of the
/// containers are. Returns how many processes were killed.
///
/// # Errors
/// The lab is not there, or does not have what the fault names.
pub(super) fn inject(lab: &Lab, event: &Event, before: &LabView) -> Result<usize> {
    let what = || format!("cannot inject {}", describe(event));
    match (event.fault, &event.node, &event.link) {
        (Fault::KillHost, Some(node), _) => {
            lab.kill_host(node, &victims(before, node)).with_context(what)
        }
        (Fault::KillAgent, Some(node), _) => {
            let killed = lab.kill_process(&super::deploy::agent_name(node)).with_context(what)?;
            ensure!(killed, "{}: the agent of {node} does not run", what());
            Ok(1)
        }
        (Fault::PauseAgent | Fault::WakeAgent, Some(node), _) => {
            let pause = event.fault == Fault::PauseAgent;
            let signal = if pause { Signal::SIGSTOP } else { Signal::SIGCONT };
            let name = super::deploy::agent_name(node);
            let runs = lab.signal_process(&name, signal).with_context(what)?;
            ensure!(runs, "{}: the agent of {node} does not run", what());
            Ok(0)
        }
        (Fault::RestartAgent, Some(node), _) => {
            super::deploy::restart_agent(lab, node).with_context(what).map(|()| 0)
        }
        (Fault::ReviveHost, Some(node), _) => {
            lab.heal_node(node).with_context(what)?;
            super::deploy::restart_agent(lab, node).with_context(what).map(|()| 0)
        }
        (Fault::CutLink, _, Some(end)) => lab.cut_link(end).with_context(what).map(|()| 0),
        (Fault::CutLink, Some(node), _) => lab.cut_node(node).with_context(what).map(|()| 0),
        (Fault::CutOut, _, Some(end)) => lab.cut_out(end).with_context(what).map(|()| 0),
        (Fault::CutOut, Some(node), _) => lab.cut_out_of(node).with_context(what).map(|()| 0),
        (Fault::HealLink, _, Some(end)) => lab.heal_link(end).with_context(what).map(|()| 0),
        (Fault::HealLink, Some(node), _) => lab.heal_node(node).with_context(what).map(|()| 0),
        (_, None, None) => bail!("{}: it names no place", what()),
        (_, None, _) => bail!("{}: it names no host", what()),
    }
}

/// The namespaces of the containers, and of the spares, that live on a host.
fn victims(view: &LabView, node: &str) -> Victims {
    let pids = view.containers_at(node).filter_map(|container| container.pid);
    Victims { namespaces: pids.filter_map(process::namespace_of).collect(), processes: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(text: &str) -> Event {
        parse_timed(text).unwrap()
    }

    #[test]
    fn a_fault_reads_as_it_prints() {
        for text in [
            "kill-host:alpha",
            "kill-agent:b",
            "restart-agent:b",
            "revive-host:b",
            "pause-agent:alpha",
            "wake-agent:alpha",
            "cut-link:alpha",
            "cut-out:alpha:repl",
            "heal-link:alpha:repl",
        ] {
            assert_eq!(describe(&parse(text).unwrap()), text);
        }
        assert_eq!(*event("cut-link:alpha:repl@2.5s").at, Duration::from_millis(2500));
        assert_eq!(host_lost_by(&event("cut-link:alpha:repl@1s")), None);
        assert_eq!(host_lost_by(&event("cut-link:alpha@1s")), Some("alpha"));
        assert_eq!(host_lost_by(&event("heal-link:alpha@1s")), None);
    }

    #[test]
    fn a_bad_fault_is_told_how_to_be_a_good_one() {
        let error = |text: &str| parse_timed(text).unwrap_err();
        assert!(error("kill-host:alpha").contains("kill-host:alpha@5s"));
        assert!(error("melt:alpha@1s").contains("known are kill-host"));
        assert!(error("kill-host@1s").contains("not a fault such as"));
        assert!(error("kill-host:@1s").contains("names no node"));
        assert!(error("kill-host:alpha:eth0@1s").contains("kill-host:NODE"));
        assert!(error("kill-host:alpha@soon").contains("a time such as"));
    }

    #[test]
    fn a_fault_is_checked_against_the_topology() {
        let topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let check = |text: &str| check(&parse(text).unwrap(), &topology).map_err(|e| e.to_string());
        assert_eq!(check("kill-host:alpha"), Ok(()));
        assert_eq!(check("cut-link:lan"), Ok(()));
        assert_eq!(check("cut-link:beta:repl"), Ok(()));
        assert!(check("kill-host:gamma").unwrap_err().contains("known are alpha, beta"));
        assert!(check("kill-agent:client").unwrap_err().contains("is not a host"));
        assert!(check("cut-link:beta:eth7").unwrap_err().contains("no link ends at beta:eth7"));
    }

    #[test]
    fn any_fault_is_each_of_them_some_day_and_the_same_for_a_seed() {
        let of = |seed| DrillFault::Any.of_seed(seed);
        for fault in DrillFault::EACH {
            assert!((0..200).any(|seed| of(seed) == fault), "{fault:?} never happens");
        }
        assert!((0..200).all(|seed| of(seed) == of(seed) && of(seed) != DrillFault::Any));
        assert_eq!(DrillFault::PauseAgent.of_seed(7), DrillFault::PauseAgent);
    }

    #[test]
    fn each_fault_of_a_drill_fits_its_topology_and_what_goes_by_ends() {
        let topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let said = |fault: DrillFault| -> Vec<String> {
            let events = fault.events(&topology).unwrap();
            events.iter().for_each(|event| check(event, &topology).unwrap());
            events.iter().map(|e| format!("{}@{}", describe(e), e.at.as_millis())).collect()
        };
        let all: Vec<Vec<String>> = DrillFault::EACH.into_iter().map(said).collect();
        assert_eq!(all[3], ["pause-agent:alpha@0", "wake-agent:alpha@1500"]);
        assert_eq!(all[4], ["cut-link:alpha:repl@0", "heal-link:alpha:repl@1500"]);
        assert_eq!(all[6], ["cut-link:alpha:lan@0", "heal-link:alpha:lan@1500"]);
        assert_eq!(all[7], ["kill-agent:beta@0", "restart-agent:beta@1500"]);
    }

    proptest! {
        #[test]
        fn random_moments_are_in_the_window_and_repeat(seed: u64, ms in 10u64..1_000_000) {
            let duration = Duration::from_millis(ms);
            let events = [event("heal-link:a@7s"), event("cut-link:a@5s")];
            let moved = at_random(&events, duration, seed);
            prop_assert_eq!(&moved, &at_random(&events, duration, seed));
            prop_assert_eq!(moved[0].fault, Fault::CutLink);
            let at = moved[0].at.as_secs_f64() / duration.as_secs_f64();
            prop_assert!((0.199..=0.7).contains(&at), "{}", at);
            prop_assert_eq!(*moved[1].at - *moved[0].at, Duration::from_secs(2));
        }
    }
}
