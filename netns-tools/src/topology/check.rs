//! The rules of topology files that types cannot express. Each broken rule is reported at the
//! value that breaks it; all of them are found in one pass.

mod events;

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use miette::NamedSource;

use super::error::{Problem, similar};
use super::model::{
    ArbiterKind, Client, Container, Device, Link, NodeKind, OnBackupLoss, Protect, Topology,
};
use super::names::{Cidr, Endpoint};
use super::spans::Spans;
use super::volumes::{self, VolumeKind};

/// Longest name of a lab, node or container: `nilicon-LAB-NODE` and the names derived from it
/// stay short enough to read in a table.
const LONGEST_NAME: usize = 20;
/// Shortest `stall`: a working agent takes a step of its work several times in it.
const MIN_STALL: Duration = Duration::from_millis(1500);
/// Longest name of an interface (IFNAMSIZ without its end).
const LONGEST_INTERFACE: usize = 15;
/// Names that the kernel or a deployed lab uses for interfaces of its own.
const RESERVED_INTERFACES: [&str; 3] = ["lo", crate::BRIDGE_DEVICE, "all"];

/// All broken rules, in the order of the sections of a file.
pub(super) fn problems(topology: &Topology, source: &Arc<NamedSource<String>>) -> Vec<Problem> {
    let spans = Spans::of(source.inner());
    let mut check =
        Check { topology, source, spans, problems: Vec::new(), addresses: Unique::new() };
    check.names();
    check.links();
    check.containers();
    check.subnets();
    check.protections();
    check.witness();
    check.clients();
    check.events();
    check.problems
}

/// Where each value was first used, by path.
struct Unique<T>(HashMap<T, String>);

impl<T: Hash + Eq> Unique<T> {
    fn new() -> Self {
        Self(HashMap::new())
    }

    /// The path of the first use, if this is not it.
    fn first_use(&mut self, value: T, path: &str) -> Option<String> {
        match self.0.entry(value) {
            std::collections::hash_map::Entry::Occupied(first) => Some(first.get().clone()),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(path.to_owned());
                None
            }
        }
    }
}

struct Check<'a> {
    topology: &'a Topology,
    source: &'a Arc<NamedSource<String>>,
    spans: Spans,
    problems: Vec<Problem>,
    addresses: Unique<IpAddr>,
}

impl Check<'_> {
    fn at_value(&mut self, path: &str, message: impl Into<String>, help: Option<String>) {
        let place = self.spans.value(path);
        self.problems.push(Problem::new(self.source, place, message.into(), help));
    }

    fn at_key(&mut self, path: &str, message: impl Into<String>, help: Option<String>) {
        let place = self.spans.key(path);
        self.problems.push(Problem::new(self.source, place, message.into(), help));
    }

    /// The line that a path stands in, for "first used in line N".
    fn line(&self, path: &str) -> usize {
        Problem::new(self.source, self.spans.value(path), String::new(), None).line
    }

    fn names(&mut self) {
        let topology = self.topology;
        if let Some(message) = bad_name("the lab", &topology.name) {
            self.at_value("name", message, None);
        }
        if topology.nodes.is_empty() {
            self.at_value("nodes", "a lab needs at least one node", None);
        }
        for (name, node) in &topology.nodes {
            if let Some(message) = bad_name("a node", name) {
                self.at_key(&format!("nodes/{name}"), message, None);
            }
            if node.metrics.is_some() && node.kind != NodeKind::Host {
                let path = format!("nodes/{name}/metrics");
                self.at_key(&path, "only a host has metrics: no agent runs elsewhere", None);
            }
        }
        for name in topology.containers.keys() {
            if let Some(message) = bad_name("a container", name) {
                self.at_key(&format!("containers/{name}"), message, None);
            }
        }
    }

    fn links(&mut self) {
        let mut interfaces = Unique::new();
        for (index, link) in self.topology.links.iter().enumerate() {
            let path = format!("links/{index}");
            if link.endpoints.len() != 2 {
                let message = format!("a link has two endpoints, not {}", link.endpoints.len());
                self.at_value(&format!("{path}/endpoints"), message, None);
                continue;
            }
            for (number, end) in link.endpoints.iter().enumerate() {
                let path = format!("{path}/endpoints/{number}");
                self.endpoint(&path, end);
                if let Some(first) = interfaces.first_use(end.clone(), &path) {
                    let line = self.line(&first);
                    let message =
                        format!("the interface {end} already ends the link in line {line}");
                    self.at_value(&path, message, None);
                }
            }
            if link.endpoints[0].node == link.endpoints[1].node {
                let message = format!("both ends are at {}", link.endpoints[0].node);
                self.at_value(&format!("{path}/endpoints/1"), message, None);
            }
            self.link_values(&path, link);
        }
    }

    fn endpoint(&mut self, path: &str, end: &Endpoint) {
        self.node(path, &end.node);
        let interface = &end.interface;
        let printable = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
        if interface.len() > LONGEST_INTERFACE {
            let message = format!(
                "the interface name `{interface}` has {} characters; Linux allows {LONGEST_INTERFACE}",
                interface.len()
            );
            self.at_value(path, message, None);
        } else if !interface.chars().all(printable) || interface.starts_with('.') {
            self.at_value(path, format!("`{interface}` cannot name an interface"), None);
        } else if RESERVED_INTERFACES.contains(&interface.as_str()) {
            self.at_value(path, format!("the interface name `{interface}` is taken"), None);
        }
    }

    fn link_values(&mut self, path: &str, link: &Link) {
        for (node, address) in &link.addresses {
            let path = format!("{path}/addresses/{node}");
            let kind = self.topology.nodes.get(node).map(|node| node.kind);
            if !link.endpoints.iter().any(|end| end.node == *node) {
                let ends = link.endpoints.iter().map(|end| end.node.as_str());
                let help = did_you_mean(node, ends);
                self.at_key(&path, format!("this link does not end at `{node}`"), help);
            } else if kind == Some(NodeKind::Bridge) {
                let message = format!("`{node}` is a bridge, and its ports have no addresses");
                self.at_value(&path, message, None);
            }
            self.address(&path, *address);
        }
        let mut addresses = link.addresses.iter();
        if let (Some((_, one)), Some((node, two))) = (addresses.next(), addresses.next())
            && !one.same_subnet(*two)
        {
            let message = format!("{two} is not in {}, the subnet of the other end", one.subnet());
            self.at_value(&format!("{path}/addresses/{node}"), message, None);
        }
        if !(576..=9216).contains(&link.mtu) {
            let message = format!("an MTU is from 576 to 9216 bytes, not {}", link.mtu);
            self.at_value(&format!("{path}/mtu"), message, None);
        }
        if let Some(impair) = &link.impair {
            if impair.jitter > impair.delay {
                let message = format!(
                    "the jitter {} is more than the delay {}: frames cannot arrive before they leave",
                    impair.jitter, impair.delay
                );
                self.at_value(&format!("{path}/impair/jitter"), message, None);
            }
            if impair.queue == 0 {
                let message = "a queue of 0 frames would drop everything";
                self.at_value(&format!("{path}/impair/queue"), message, None);
            }
        }
    }

    fn address(&mut self, path: &str, address: Cidr) {
        if let Some(first) = self.addresses.first_use(address.ip, path) {
            let line = self.line(&first);
            let message = format!("the address {} is already used in line {line}", address.ip);
            self.at_value(path, message, None);
        }
    }

    fn containers(&mut self) {
        let topology = self.topology;
        let mut macs = Unique::new();
        for (name, container) in &topology.containers {
            let path = format!("containers/{name}");
            match &container.command {
                None if container.embedded.is_none() => {
                    let help = "give it a `command`, or `embedded: {}` for the built-in server";
                    let message = format!("the container {name} has nothing to run");
                    self.at_key(&path, message, Some(help.to_owned()));
                }
                Some(command) if command.first().is_none_or(String::is_empty) => {
                    self.at_value(&format!("{path}/command"), "the command is empty", None);
                }
                _ => {}
            }
            if container.embedded.as_ref().is_some_and(|embedded| embedded.threads == 0) {
                let path = format!("{path}/embedded/threads");
                self.at_value(&path, "the server needs at least one thread", None);
            }
            self.address(&format!("{path}/address"), container.address);
            for (number, address) in container.also.iter().enumerate() {
                self.address(&format!("{path}/also/{number}"), *address);
            }
            let outside = |ip: &IpAddr| container.addresses().all(|a| !a.contains(*ip));
            if let Some(gateway) = container.gateway.filter(outside) {
                let subnet = container.address.subnet();
                let message = format!("the gateway {gateway} is not in the subnet {subnet}");
                self.at_value(&format!("{path}/gateway"), message, None);
            }
            if let Some(mac) = topology.mac_of(name)
                && let Some(first) = macs.first_use(mac, &path)
            {
                let line = self.line(&first);
                let message = format!("the MAC address {mac} is already used in line {line}");
                self.at_value(&format!("{path}/mac"), message, None);
            }
            self.volumes(&path, container);
            self.home(&path, name, container);
        }
    }

    fn volumes(&mut self, path: &str, container: &Container) {
        if !volumes::is_plain(&container.volume_directory) {
            let message = "the directory for volumes must be an absolute path without `.` or `..`";
            self.at_value(&format!("{path}/volume-directory"), message, None);
        }
        for (number, volume) in container.volumes.iter().enumerate() {
            let path = format!("{path}/volumes/{number}");
            for (key, message, help) in volumes::faults(volume) {
                self.at_value(&format!("{path}/{key}"), message, help);
            }
            let mut others = container.volumes[..number].iter();
            if let Some(first) = others.find(|v| volumes::hide(&v.path, &volume.path)) {
                let message = format!(
                    "`{}` and the volume `{}` would hide each other; each file is of one volume",
                    volume.path, first.path
                );
                self.at_value(&format!("{path}/path"), message, None);
            }
            let is_ours = matches!(volume.kind, VolumeKind::Replicated | VolumeKind::ReadOnly);
            if container.device == Device::Veth && is_ours {
                let message = "a container with a plain veth has nothing of ours: no volumes but \
                               `shared` and `ephemeral` ones";
                let help = "leave out its `device`, or the volume";
                self.at_value(&format!("{path}/kind"), message, Some(help.into()));
            }
        }
    }

    /// Where a container runs, and whether its uplink is there.
    fn home(&mut self, path: &str, name: &str, container: &Container) {
        let topology = self.topology;
        if let Some(host) = &container.host {
            self.host(&format!("{path}/host"), host);
            if let Some(protect) = topology.protection_of(name).filter(|p| p.primary != *host) {
                let message = format!("{name} starts on its primary, {}", protect.primary);
                self.at_value(&format!("{path}/host"), message, None);
            }
        }
        let hosts = topology.hosts_of(name);
        if hosts.is_empty() {
            let help = "name a `host`, or protect it";
            let message = format!("the container {name} runs on no host");
            self.at_key(path, message, Some(help.to_owned()));
        }
        for host in hosts {
            let known = topology.endpoints_of(host).map(|(_, end)| end.interface.as_str());
            let known: Vec<&str> = known.collect();
            let is_host = topology.nodes.get(host).is_some_and(|node| node.kind == NodeKind::Host);
            if is_host && !known.contains(&container.uplink.as_str()) {
                let uplink = &container.uplink;
                let message = format!("the host {host} has no interface `{uplink}`");
                let help = did_you_mean(uplink, known);
                self.at_value(&format!("{path}/uplink"), message, help);
            }
        }
    }

    /// Everything that a bridge joins is in one subnet.
    fn subnets(&mut self) {
        let topology = self.topology;
        for bridge in topology.nodes_of(NodeKind::Bridge) {
            let mut joined: Vec<(String, Cidr)> = Vec::new();
            for (index, _) in topology.endpoints_of(bridge) {
                let link = &topology.links[index];
                for end in link.endpoints.iter().filter(|end| end.node != bridge) {
                    if let Some(address) = link.addresses.get(&end.node) {
                        joined.push((format!("links/{index}/addresses/{}", end.node), *address));
                    }
                    for (name, container) in topology.containers_on(&end.node) {
                        let path = format!("containers/{name}/address");
                        if container.uplink == end.interface
                            && joined.iter().all(|(known, _)| *known != path)
                        {
                            joined.push((path, container.address));
                        }
                    }
                }
            }
            // What has a fixed place gives the subnet; a container that is elsewhere is wrong.
            joined.sort_by_key(|(path, _)| path.starts_with("containers/"));
            let Some((_, first)) = joined.first().cloned() else { continue };
            for (path, address) in joined.into_iter().filter(|(_, a)| !a.same_subnet(first)) {
                let subnet = first.subnet();
                let message = format!("{address} is not in {subnet}, the subnet at {bridge}");
                self.at_value(&path, message, None);
            }
        }
    }

    fn protections(&mut self) {
        let topology = self.topology;
        let mut protected = Unique::new();
        let mut ports = Unique::new();
        for (index, protect) in topology.protect.iter().enumerate() {
            let path = format!("protect/{index}");
            let at_container = format!("{path}/container");
            self.container(&at_container, &protect.container);
            if let Some(first) = protected.first_use(&protect.container, &at_container) {
                let line = self.line(&first);
                let message = format!("{} is already protected in line {line}", protect.container);
                self.at_value(&at_container, message, None);
            }
            let device = topology.containers.get(&protect.container).map(|c| c.device);
            if device == Some(Device::Veth) {
                let message = "a container with a plain veth cannot be protected: nothing holds \
                               its output";
                let help = "leave out its `device`, or its protection";
                self.at_value(&at_container, message, Some(help.into()));
            }
            let primary_is_host = self.host(&format!("{path}/primary"), &protect.primary);
            let backup_is_host = self.host(&format!("{path}/backup"), &protect.backup);
            if protect.primary == protect.backup {
                let message = "the backup is the primary: it would be lost with it";
                self.at_value(&format!("{path}/backup"), message, None);
            } else if primary_is_host && backup_is_host {
                self.replication_link(&path, protect);
            }
            // Either host can be the backup, so that each listens there.
            let pulses = protect.pulse_port.map(|port| ("pulse-port", port));
            for (key, port) in [("port", protect.port)].into_iter().chain(pulses) {
                let at_port = format!("{path}/{key}");
                for host in [&protect.primary, &protect.backup] {
                    let first = ports.first_use((host.clone(), port), &at_port);
                    if let Some(first) = first.filter(|first| *first != at_port) {
                        let line = self.line(first.rsplit_once('/').map_or("", |(path, _)| path));
                        let message = format!(
                            "the host {host} listens on port {port} for the protection in line \
                             {line}"
                        );
                        self.at_value(
                            &at_port,
                            message,
                            Some(format!("give each its own `{key}`")),
                        );
                        break;
                    }
                }
            }
            self.arbiter(&path, protect);
            if protect.epoch.min > protect.epoch.max || protect.epoch.max.is_zero() {
                let message = "the shortest epoch is longer than the longest, or both are 0";
                self.at_value(&format!("{path}/epoch"), message, None);
            }
            let detector = &protect.detector;
            if detector.heartbeat.is_zero() || *detector.timeout < *detector.heartbeat * 2 {
                let message = "the timeout must leave room for two heartbeats at least";
                self.at_value(&format!("{path}/detector"), message, None);
            }
            if detector.most() < *detector.timeout || *detector.stall < MIN_STALL {
                let message = "`most` is at least the timeout, and `stall` at least 1500ms";
                self.at_value(&format!("{path}/detector"), message, None);
            }
        }
    }

    fn arbiter(&mut self, path: &str, protect: &Protect) {
        if protect.arbiter == ArbiterKind::Witness && self.topology.witness.is_none() {
            let help = "add `witness: { node: NAME }` to the topology";
            let message = "the topology has no witness";
            self.at_value(&format!("{path}/arbiter"), message, Some(help.to_owned()));
        }
        if protect.on_backup_loss == OnBackupLoss::Degrade && protect.arbiter == ArbiterKind::None {
            let message = "the backup may have taken over: to go on alone needs an arbiter's word";
            let help = "say `arbiter: witness` or `arbiter: manual`";
            self.at_value(&format!("{path}/on-backup-loss"), message, Some(help.to_owned()));
        }
        let ArbiterKind::Etcd(members) = &protect.arbiter else { return };
        let bad = |member: &&String| {
            let rest = member.strip_prefix("http://").unwrap_or_default();
            rest.is_empty() || rest.contains('/')
        };
        let message = match (members.is_empty(), members.iter().find(bad)) {
            (true, _) => "it names no member of the etcd".to_owned(),
            (false, Some(member)) => format!("`{member}` is no address of an etcd"),
            (false, None) => return,
        };
        let help = "write `arbiter: { etcd: [\"http://10.79.0.3:2379\"] }`, without a path; for TLS \
                    put a proxy before it";
        self.at_value(&format!("{path}/arbiter"), message, Some(help.to_owned()));
    }

    fn witness(&mut self) {
        let topology = self.topology;
        let Some(witness) = &topology.witness else { return };
        if !self.host("witness/node", &witness.node) {
            return;
        }
        if topology.containers_on(&witness.node).next().is_some() {
            let message = format!("`{}` runs containers: it would be lost with them", witness.node);
            self.at_value("witness/node", message, None);
        }
        if topology.witness_socket().is_none() {
            let message = format!("the node `{}` has no address", witness.node);
            self.at_value("witness/node", message, None);
        }
    }

    fn replication_link(&mut self, path: &str, protect: &Protect) {
        let topology = self.topology;
        let path = format!("{path}/over");
        for host in [&protect.primary, &protect.backup] {
            let Some(interface) = topology.replication_interface(protect, host) else {
                let message =
                    format!("no link joins {} and {} directly", protect.primary, protect.backup);
                let help = "add one, or say which interface of the hosts to use with `over`";
                self.at_value(&path, message, Some(help.to_owned()));
                return;
            };
            let known = topology.endpoints_of(host).map(|(_, end)| end.interface.as_str());
            let known: Vec<&str> = known.collect();
            if !known.contains(&interface) {
                let message = format!("the host {host} has no interface `{interface}`");
                self.at_value(&path, message, did_you_mean(interface, known));
            } else if topology.address_of(host, interface).is_none() {
                let message = format!("checkpoints need an address at {host}:{interface}");
                self.at_value(&path, message, None);
            }
        }
    }

    fn clients(&mut self) {
        for (index, client) in self.topology.clients.iter().enumerate() {
            let path = format!("clients/{index}");
            if self.node(&format!("{path}/node"), &client.node)
                && self.topology.nodes[&client.node].kind == NodeKind::Bridge
            {
                let message = format!("`{}` is a bridge: no load can run in it", client.node);
                self.at_value(&format!("{path}/node"), message, None);
            }
            self.container(&format!("{path}/target"), &client.target.container);
            self.client_numbers(&path, client);
        }
    }

    fn client_numbers(&mut self, path: &str, client: &Client) {
        let numbers = [
            ("connections", client.connections == 0),
            ("pipeline", client.pipeline == 0),
            ("keys", client.keys == 0),
            ("value-size", client.value_size.max == 0),
            ("rate", client.rate == Some(0)),
            ("churn", client.churn == Some(0)),
            ("history", client.history == Some(0)),
        ];
        for (key, _) in numbers.iter().filter(|(_, zero)| *zero) {
            self.at_value(&format!("{path}/{key}"), format!("`{key}` must not be 0"), None);
        }
    }

    /// Whether there is such a node; complains if not.
    fn node(&mut self, path: &str, name: &str) -> bool {
        let nodes = &self.topology.nodes;
        if !nodes.contains_key(name) {
            let help = did_you_mean(name, nodes.keys().map(String::as_str));
            self.at_value(path, format!("there is no node `{name}`"), help);
            return false;
        }
        true
    }

    /// Whether there is such a host; complains if not.
    fn host(&mut self, path: &str, name: &str) -> bool {
        if !self.node(path, name) {
            return false;
        }
        let host = self.topology.nodes[name].kind == NodeKind::Host;
        if !host {
            let message = format!("the node `{name}` is not of kind `host`");
            self.at_value(path, message, None);
        }
        host
    }

    fn container(&mut self, path: &str, name: &str) {
        let containers = &self.topology.containers;
        if !containers.contains_key(name) {
            let help = did_you_mean(name, containers.keys().map(String::as_str));
            self.at_value(path, format!("there is no container `{name}`"), help);
        }
    }
}

fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    similar(word, known).map(|similar| format!("did you mean `{similar}`?"))
}

fn bad_name(what: &str, name: &str) -> Option<String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let usable = (1..=LONGEST_NAME).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with('-');
    (!usable).then(|| {
        format!(
            "`{name}` cannot name {what}: 1 to {LONGEST_NAME} lower-case letters, digits and \
             dashes, not beginning with a dash"
        )
    })
}
