//! The faults of drills: what each of them is in a topology, and when it happens.
//!
//! A fault that goes by is two events: the second ends what the first began, within the load.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use netns_tools::topology::{
    Endpoint, Event, Fault, Impair, OnContainerLoss, Period, Protect, Topology,
};

/// Part of the load before which no fault of a drill happens, and after which none does: there
/// must be something to lose, and time to notice the loss.
const DRILL_WINDOW: (f64, f64) = (0.2, 0.7);
/// Part of the load that is left when the last fault has gone by.
const LEFT: f64 = 0.1;

/// The faults that a drill can inject at the primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DrillFault {
    /// The primary loses power.
    KillHost,
    /// The agent of the primary is killed.
    KillAgent,
    /// The container's processes are killed; its topology says that it goes on then.
    KillContainer,
    /// All links of the primary are cut; it does not know that it is alone.
    CutLink,
    /// The agent of the primary stands still, and goes on later.
    PauseAgent,
    /// The link for checkpoints is cut for a while.
    CutReplication,
    /// What the primary sends over the link for checkpoints is lost for a while.
    CutOut,
    /// What the primary ought to receive over the link for checkpoints is lost for a while.
    CutIn,
    /// The link for checkpoints is slow for a while.
    SlowLink,
    /// The link for checkpoints loses, copies, reorders and changes frames for a while.
    LossyLink,
    /// The primary's link to its clients is cut for a while.
    CutClients,
    /// What the primary sends to its clients is lost for a while.
    CutClientsOut,
    /// What clients send to the primary is lost for a while.
    CutClientsIn,
    /// The primary's link to its clients is slow for a while.
    SlowClients,
    /// The primary's link to its clients loses, copies, reorders and changes frames for a while.
    LossyClients,
    /// The agent of the backup is killed, and started again later.
    KillBackup,
    /// The agent of the backup gets no more memory, and ends if it needs some; later there is some.
    FillBackupMemory,
    /// One of these, chosen by the seed of the run.
    Any,
}

/// How long a fault of a drill lasts that goes by.
const FOR_A_WHILE: Duration = Duration::from_millis(1500);

/// Where on the primary a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    /// The link for checkpoints.
    Replication,
    /// The link to the clients.
    Uplink,
}

impl Wire {
    /// The primary's end of it.
    fn end(self, topology: &Topology, protect: &Protect) -> Result<Endpoint> {
        let primary = &protect.primary;
        let interface = match self {
            Self::Replication => topology
                .replication_interface(protect, primary)
                .context("the hosts have no link for checkpoints")?
                .to_owned(),
            Self::Uplink => {
                let container = topology.containers.get(&protect.container);
                container.context("there is no such container")?.uplink.clone()
            }
        };
        Ok(Endpoint { node: primary.clone(), interface })
    }
}

impl DrillFault {
    /// All but [`DrillFault::Any`].
    const EACH: [Self; 17] = [
        Self::KillHost,
        Self::KillAgent,
        Self::KillContainer,
        Self::CutLink,
        Self::PauseAgent,
        Self::CutReplication,
        Self::CutOut,
        Self::CutIn,
        Self::SlowLink,
        Self::LossyLink,
        Self::CutClients,
        Self::CutClientsOut,
        Self::CutClientsIn,
        Self::SlowClients,
        Self::LossyClients,
        Self::KillBackup,
        Self::FillBackupMemory,
    ];

    /// The fault of a run with this seed.
    pub(super) fn of_seed(self, topology: &Topology, seed: u64) -> Self {
        match self {
            Self::Any => {
                let each = Self::EACH.into_iter().filter(|fault| fault.leaves_one(topology));
                let each: Vec<Self> = each.collect();
                // Another stream than that of the fault's moment.
                each[fastrand::Rng::with_seed(!seed).usize(..each.len())]
            }
            other => other,
        }
    }

    /// Whether somebody goes on with the container after it.
    fn leaves_one(self, topology: &Topology) -> bool {
        let policy = topology.protect.first().map(|protect| protect.on_container_loss);
        let goes_on = |policy| policy != OnContainerLoss::Stop;
        self != Self::KillContainer || policy.is_some_and(goes_on)
    }

    /// Its name on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The link that it happens to, with what begins; healing it is the end.
    fn of_link(self) -> Option<(Wire, Fault)> {
        Some(match self {
            Self::CutReplication => (Wire::Replication, Fault::CutLink),
            Self::CutOut => (Wire::Replication, Fault::CutOut),
            Self::CutIn => (Wire::Replication, Fault::CutIn),
            Self::SlowLink => (Wire::Replication, Fault::SlowLink),
            Self::LossyLink => (Wire::Replication, Fault::LossyLink),
            Self::CutClients => (Wire::Uplink, Fault::CutLink),
            Self::CutClientsOut => (Wire::Uplink, Fault::CutOut),
            Self::CutClientsIn => (Wire::Uplink, Fault::CutIn),
            Self::SlowClients => (Wire::Uplink, Fault::SlowLink),
            Self::LossyClients => (Wire::Uplink, Fault::LossyLink),
            Self::KillHost
            | Self::KillAgent
            | Self::KillContainer
            | Self::CutLink
            | Self::PauseAgent
            | Self::KillBackup
            | Self::FillBackupMemory
            | Self::Any => return None,
        })
    }

    /// Puts what happens at the hosts of a topology's first protected container, where it starts,
    /// in the place of the topology's events. A link whose frames a fault changes, or that it cuts
    /// in one direction at a bridge, passes through user space from the start.
    pub(super) fn put_into(self, topology: &mut Topology) -> Result<()> {
        topology.events = self.events(topology)?;
        let Some((wire, fault)) = self.of_link() else { return Ok(()) };
        let one_way = matches!(fault, Fault::CutOut | Fault::CutIn) && wire == Wire::Uplink;
        if fault.needs_impair() || one_way {
            let protect = topology.protect.first().context("the topology protects no container")?;
            let end = wire.end(topology, protect)?;
            let found = topology.link_at(&end).map(|(index, _)| index);
            let index = found.with_context(|| format!("no link ends at {end}"))?;
            topology.links[index].impair.get_or_insert_with(Impair::default);
        }
        Ok(())
    }

    /// What happens; the second event, if there is one, ends what the first began.
    fn events(self, topology: &Topology) -> Result<Vec<Event>> {
        let protect = topology.protect.first().context("the topology protects no container")?;
        let (primary, backup) = (&protect.primary, &protect.backup);
        let of_host = |fault, node: &String| (fault, Some(node.clone()), None);
        let of_link = |fault, end: &Endpoint| (fault, None, Some(end.clone()));
        let parts = match (self, self.of_link()) {
            (_, Some((wire, fault))) => {
                let end = wire.end(topology, protect)?;
                vec![of_link(fault, &end), of_link(Fault::HealLink, &end)]
            }
            (Self::KillHost, _) => vec![of_host(Fault::KillHost, primary)],
            (Self::KillAgent, _) => vec![of_host(Fault::KillAgent, primary)],
            (Self::KillContainer, _) => vec![of_host(Fault::KillContainer, primary)],
            (Self::CutLink, _) => vec![of_host(Fault::CutLink, primary)],
            (Self::PauseAgent, _) => {
                vec![of_host(Fault::PauseAgent, primary), of_host(Fault::WakeAgent, primary)]
            }
            (Self::KillBackup, _) => {
                vec![of_host(Fault::KillAgent, backup), of_host(Fault::RestartAgent, backup)]
            }
            (Self::FillBackupMemory, _) => {
                vec![of_host(Fault::FillMemory, backup), of_host(Fault::FreeMemory, backup)]
            }
            _ => bail!("which fault it is depends on the seed"),
        };
        let at = (0..).map(|part| Period(FOR_A_WHILE * part));
        let event = |((fault, node, link), at)| Event { at, fault, node, link };
        Ok(parts.into_iter().zip(at).map(event).collect())
    }
}

/// Moves the faults so that the first happens at a random moment of the drill's window; the
/// others keep their distance from it, and happen within the load if there is room.
pub(super) fn at_random(events: &[Event], duration: Duration, seed: u64) -> Vec<Event> {
    let times = || events.iter().map(|event| *event.at);
    let first = times().min().unwrap_or_default();
    let span = times().max().unwrap_or_default() - first;
    let (from, to) = DRILL_WINDOW;
    let part_of_span = span.as_secs_f64() / duration.as_secs_f64();
    let to = to.min(1.0 - LEFT - part_of_span).max(from);
    let part = from + (to - from) * fastrand::Rng::with_seed(seed).f64();
    // Whole microseconds are enough, and read well.
    let moment = Duration::from_micros(duration.mul_f64(part).as_micros() as u64);
    let moved = |event: &Event| Event { at: Period(*event.at - first + moment), ..event.clone() };
    let mut events: Vec<Event> = events.iter().map(moved).collect();
    events.sort_by_key(|event| event.at);
    events
}

#[cfg(test)]
mod tests {
    use super::super::faults::{check, describe, parse_timed};
    use super::*;
    use proptest::prelude::*;

    fn event(text: &str) -> Event {
        parse_timed(text).unwrap()
    }

    fn demo() -> Topology {
        Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap()
    }

    #[test]
    fn any_fault_is_each_of_them_some_day_and_the_same_for_a_seed() {
        let mut topology = demo();
        let of = |topology: &Topology, seed| DrillFault::Any.of_seed(topology, seed);
        let happens = |topology: &Topology, fault| (0..400).any(|seed| of(topology, seed) == fault);
        // By its policy the container would have ended.
        assert!(!happens(&topology, DrillFault::KillContainer));
        topology.protect[0].on_container_loss = OnContainerLoss::Failover;
        for fault in DrillFault::EACH {
            assert!(happens(&topology, fault), "{fault:?} never happens");
        }
        assert!((0..200).all(|seed| of(&topology, seed) == of(&topology, seed)));
        assert!(!happens(&topology, DrillFault::Any));
        assert_eq!(DrillFault::PauseAgent.of_seed(&topology, 7), DrillFault::PauseAgent);
    }

    #[test]
    fn each_fault_of_a_drill_fits_its_topology_and_what_goes_by_ends() {
        let said = |fault: DrillFault| -> Vec<String> {
            let mut topology = demo();
            fault.put_into(&mut topology).unwrap();
            let events = &topology.events;
            events.iter().for_each(|event| check(event, &topology).unwrap());
            events.iter().map(|e| format!("{}@{}", describe(e), e.at.as_millis())).collect()
        };
        DrillFault::EACH.into_iter().for_each(|fault| assert!(!said(fault).is_empty()));
        let of = |fault, events: [&str; 2]| assert_eq!(said(fault), events, "{fault:?}");
        of(DrillFault::PauseAgent, ["pause-agent:alpha@0", "wake-agent:alpha@1500"]);
        of(DrillFault::CutReplication, ["cut-link:alpha:repl@0", "heal-link:alpha:repl@1500"]);
        of(DrillFault::CutIn, ["cut-in:alpha:repl@0", "heal-link:alpha:repl@1500"]);
        of(DrillFault::LossyLink, ["lossy-link:alpha:repl@0", "heal-link:alpha:repl@1500"]);
        of(DrillFault::CutClients, ["cut-link:alpha:lan@0", "heal-link:alpha:lan@1500"]);
        of(DrillFault::SlowClients, ["slow-link:alpha:lan@0", "heal-link:alpha:lan@1500"]);
        of(DrillFault::KillBackup, ["kill-agent:beta@0", "restart-agent:beta@1500"]);
        of(DrillFault::FillBackupMemory, ["fill-memory:beta@0", "free-memory:beta@1500"]);
        assert_eq!(said(DrillFault::KillContainer), ["kill-container:alpha@0"]);
    }

    #[test]
    fn only_what_must_passes_through_user_space() {
        let impaired = |fault: DrillFault| -> Vec<String> {
            let mut topology = demo();
            fault.put_into(&mut topology).unwrap();
            let links = topology.links.iter().filter(|link| link.impair.is_some());
            links.map(|link| link.endpoints[0].to_string()).collect()
        };
        assert!(impaired(DrillFault::CutOut).is_empty());
        assert_eq!(impaired(DrillFault::SlowLink), ["alpha:repl"]);
        assert_eq!(impaired(DrillFault::CutClientsIn), ["alpha:lan"]);
    }

    proptest! {
        #[test]
        fn random_moments_are_in_the_window_and_repeat(seed: u64, ms in 3000u64..1_000_000) {
            let duration = Duration::from_millis(ms);
            let events = [event("heal-link:a@7s"), event("cut-link:a@5s")];
            let moved = at_random(&events, duration, seed);
            prop_assert_eq!(&moved, &at_random(&events, duration, seed));
            prop_assert_eq!(moved[0].fault, Fault::CutLink);
            let at = moved[0].at.as_secs_f64() / duration.as_secs_f64();
            prop_assert!((0.199..=0.7).contains(&at), "{}", at);
            prop_assert_eq!(*moved[1].at - *moved[0].at, Duration::from_secs(2));
            prop_assert!(*moved[1].at < duration, "it heals within the load");
        }
    }
}
