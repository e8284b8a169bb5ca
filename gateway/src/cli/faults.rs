//! Faults as the command line writes them, when they happen, and making them happen.
//!
//! A fault on the command line becomes the same [`Event`] as one in a topology file, and is
//! checked by the same rules.

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};
use netns_tools::lab::Lab;
use netns_tools::lab::fault::Victims;
use netns_tools::process::{self, ProcessId};
use netns_tools::topology::{Endpoint, Event, Fault, NodeKind, Period, Topology};
use nix::sys::signal::Signal;
use replicator::sys::limits;

use super::view::LabView;
use crate::agent::status::Role;

/// All that can happen.
const FAULTS: [Fault; 15] = [
    Fault::KillHost,
    Fault::KillAgent,
    Fault::RestartAgent,
    Fault::ReviveHost,
    Fault::PauseAgent,
    Fault::WakeAgent,
    Fault::FillMemory,
    Fault::FreeMemory,
    Fault::CutLink,
    Fault::CutOut,
    Fault::CutIn,
    Fault::SlowLink,
    Fault::LossyLink,
    Fault::HealLink,
    Fault::KillContainer,
];

/// Reads `WHAT:NODE` or `WHAT:NODE:IFACE`; the fault happens at once.
pub(super) fn parse(text: &str) -> Result<Event, String> {
    let (what, place) = text
        .split_once(':')
        .ok_or_else(|| format!("`{text}` is not a fault such as kill-host:alpha"))?;
    let fault = FAULTS.into_iter().find(|fault| word(*fault) == what).ok_or_else(|| {
        let known: Vec<&str> = FAULTS.into_iter().map(word).collect();
        format!("`{what}` is not known; known are {}", known.join(", "))
    })?;
    let at = Period::default();
    if !place.contains(':') {
        if place.is_empty() {
            return Err(format!("`{text}` names no node"));
        }
        if fault.needs_impair() {
            return Err(format!("{what} happens to one link: {what}:NODE:IFACE"));
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
        let link = topology.link_at(end).map(|(_, link)| link);
        let link = link.with_context(|| format!("{}: no link ends at {end}", describe(event)))?;
        ensure!(
            !event.fault.needs_impair() || link.impair.is_some(),
            "{}: its frames do not pass through user space; give the link `impair: {{}}`",
            describe(event)
        );
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
        Fault::FillMemory => "fill-memory",
        Fault::FreeMemory => "free-memory",
        Fault::CutLink => "cut-link",
        Fault::CutOut => "cut-out",
        Fault::CutIn => "cut-in",
        Fault::SlowLink => "slow-link",
        Fault::LossyLink => "lossy-link",
        Fault::HealLink => "heal-link",
        Fault::KillContainer => "kill-container",
    }
}

/// The host that cannot run its containers any more after this fault, if there is one.
pub(super) fn host_lost_by(event: &Event) -> Option<&str> {
    match event.fault {
        // Without a link named, all links of the node are cut.
        Fault::KillHost
        | Fault::KillAgent
        | Fault::KillContainer
        | Fault::PauseAgent
        | Fault::FillMemory
        | Fault::CutLink
        | Fault::CutOut => event.node.as_deref(),
        // What only is not heard goes on, or gives way.
        Fault::CutIn
        | Fault::SlowLink
        | Fault::LossyLink
        | Fault::HealLink
        | Fault::RestartAgent
        | Fault::ReviveHost
        | Fault::WakeAgent
        | Fault::FreeMemory => None,
    }
}

/// Whether nothing is left of these faults, given in the order in which they happened.
pub(super) fn all_have_gone_by<'a>(events: impl Iterator<Item = &'a Event>) -> bool {
    let mut broken: HashSet<(bool, String)> = HashSet::new();
    for event in events {
        let place = event.link.as_ref().map(Endpoint::to_string).or_else(|| event.node.clone());
        let place = place.unwrap_or_default();
        let of_host = event.fault.is_of_host();
        match event.fault {
            // The container goes on elsewhere, and both hosts are whole.
            Fault::KillContainer => {}
            Fault::RestartAgent | Fault::WakeAgent | Fault::FreeMemory | Fault::HealLink => {
                broken.remove(&(of_host, place));
            }
            Fault::ReviveHost => broken.retain(|(_, other)| *other != place),
            Fault::KillHost => {
                broken.extend([(true, place.clone()), (false, place)]);
            }
            Fault::KillAgent
            | Fault::PauseAgent
            | Fault::FillMemory
            | Fault::CutLink
            | Fault::CutOut
            | Fault::CutIn
            | Fault::SlowLink
            | Fault::LossyLink => {
                broken.insert((of_host, place));
            }
        }
    }
    broken.is_empty()
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
        (Fault::FillMemory, Some(node), _) => {
            let agent = lab.process(&super::deploy::agent_name(node)).with_context(what)?;
            let agent = agent.with_context(|| format!("{}: its agent does not run", what()))?;
            limits::set_data(agent.pid, Some(limits::data_of(agent.pid)?)).with_context(what)?;
            Ok(0)
        }
        (Fault::FreeMemory, Some(node), _) => {
            match lab.process(&super::deploy::agent_name(node)).with_context(what)? {
                Some(agent) => limits::set_data(agent.pid, None).with_context(what)?,
                None => super::deploy::restart_agent(lab, node).with_context(what)?,
            }
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
        (Fault::CutIn, _, Some(end)) => lab.cut_in(end).with_context(what).map(|()| 0),
        (Fault::CutIn, Some(node), _) => lab.cut_in_of(node).with_context(what).map(|()| 0),
        (Fault::SlowLink, _, Some(end)) => lab.slow_link(end).with_context(what).map(|()| 0),
        (Fault::LossyLink, _, Some(end)) => lab.lossy_link(end).with_context(what).map(|()| 0),
        (Fault::SlowLink | Fault::LossyLink, _, None) => bail!("{}: it names no link", what()),
        (Fault::KillContainer, Some(node), _) => {
            let here = before.containers_at(node).filter(|part| part.role == Role::Primary);
            let first: Vec<ProcessId> = here.filter_map(|part| ProcessId::of(part.pid?)).collect();
            ensure!(!first.is_empty(), "{}: no container runs at {node}", what());
            // The kernel kills the others with it.
            process::kill_all(|| first.clone()).with_context(what)
        }
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
    use std::time::Duration;

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
            "fill-memory:beta",
            "free-memory:beta",
            "cut-link:alpha",
            "cut-out:alpha:repl",
            "cut-in:alpha:repl",
            "slow-link:alpha:repl",
            "lossy-link:alpha:repl",
            "kill-container:alpha",
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
    fn what_has_gone_by_is_known() {
        let gone = |texts: &[&str]| {
            let events: Vec<Event> = texts.iter().map(|text| parse(text).unwrap()).collect();
            all_have_gone_by(events.iter())
        };
        assert!(gone(&["kill-container:alpha"]));
        assert!(gone(&["kill-agent:beta", "restart-agent:beta"]));
        assert!(!gone(&["kill-agent:beta", "restart-agent:alpha"]));
        assert!(gone(&["lossy-link:alpha:repl", "heal-link:alpha:repl"]));
        assert!(!gone(&["cut-in:alpha:repl", "heal-link:alpha:lan"]));
        assert!(gone(&["kill-host:alpha", "revive-host:alpha"]));
        assert!(!gone(&["kill-host:alpha", "restart-agent:alpha"]), "without its links");
        assert!(gone(&["fill-memory:beta", "free-memory:beta"]) && !gone(&["fill-memory:beta"]));
        assert!(!gone(&["pause-agent:alpha"]) && gone(&["pause-agent:alpha", "wake-agent:alpha"]));
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
        assert!(error("slow-link:alpha@1s").contains("slow-link:NODE:IFACE"));
        assert!(error("kill-container:alpha:repl@1s").contains("kill-container:NODE"));
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
        assert!(check("slow-link:beta:repl").unwrap_err().contains("`impair: {}`"));
        assert!(check("cut-link:beta:eth7").unwrap_err().contains("no link ends at beta:eth7"));
    }
}
