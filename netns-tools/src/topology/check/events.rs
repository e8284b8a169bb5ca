//! The rules of faults: what they happen to is there, and can have them.

use super::{Check, did_you_mean};
use crate::topology::model::{Event, Fault};
use crate::topology::names::Endpoint;

impl Check<'_> {
    pub(super) fn events(&mut self) {
        for (index, event) in self.topology.events.iter().enumerate() {
            let path = format!("events/{index}");
            self.event(&path, event);
            if let Some(end) = self.topology.duration.filter(|end| event.at > *end) {
                let message = format!("the run is over after {end}");
                self.at_value(&format!("{path}/at"), message, None);
            }
        }
    }

    fn event(&mut self, path: &str, event: &Event) {
        let at_fault = format!("{path}/fault");
        match (event.fault, &event.node, &event.link) {
            (fault, Some(node), None) if fault.is_of_host() => {
                self.host(&format!("{path}/node"), node);
            }
            (fault, _, _) if fault.is_of_host() => {
                self.at_value(&at_fault, "this fault needs a `node` and no `link`", None);
            }
            (fault, None, Some(end)) => self.event_at(path, fault, end),
            (fault, _, _) if fault.needs_impair() => {
                self.at_value(&at_fault, "this fault needs a `link` and no `node`", None);
            }
            (_, Some(node), None) => {
                self.node(&format!("{path}/node"), node);
            }
            _ => {
                self.at_value(&at_fault, "this fault needs either a `node` or a `link`", None);
            }
        }
    }

    /// A fault of the link with this end.
    fn event_at(&mut self, path: &str, fault: Fault, end: &Endpoint) {
        let Some((_, link)) = self.topology.link_at(end) else {
            let ends = self.topology.links.iter().flat_map(|link| &link.endpoints);
            let ends: Vec<String> = ends.map(Endpoint::to_string).collect();
            let help = did_you_mean(&end.to_string(), ends.iter().map(String::as_str));
            self.at_value(&format!("{path}/link"), format!("no link ends at {end}"), help);
            return;
        };
        if fault.needs_impair() && link.impair.is_none() {
            let message = format!("the frames of the link at {end} do not pass through user space");
            let help = "give the link `impair: {}`";
            self.at_value(&format!("{path}/link"), message, Some(help.to_owned()));
        }
    }
}
