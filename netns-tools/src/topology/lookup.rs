//! Questions about a topology that its users ask.

use std::net::{IpAddr, SocketAddr};

use super::model::{Container, Embedded, Fault, Link, NodeKind, Protect, Topology, Workload};
use super::names::{Cidr, Endpoint, Mac};

impl Topology {
    /// The names of the nodes of one kind, sorted.
    pub fn nodes_of(&self, kind: NodeKind) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(move |(_, node)| node.kind == kind).map(|(name, _)| name.as_str())
    }

    /// The link that ends at `endpoint`, and its number in [`Topology::links`].
    pub fn link_at(&self, endpoint: &Endpoint) -> Option<(usize, &Link)> {
        self.links.iter().enumerate().find(|(_, link)| link.endpoints.contains(endpoint))
    }

    /// All ends at `node`, with the number of their link.
    pub fn endpoints_of<'a>(
        &'a self,
        node: &'a str,
    ) -> impl Iterator<Item = (usize, &'a Endpoint)> {
        self.links.iter().enumerate().flat_map(move |(index, link)| {
            link.endpoints.iter().filter(move |end| end.node == node).map(move |end| (index, end))
        })
    }

    /// The address of an interface of a node.
    pub fn address_of(&self, node: &str, interface: &str) -> Option<Cidr> {
        let endpoint = Endpoint { node: node.to_owned(), interface: interface.to_owned() };
        self.link_at(&endpoint)?.1.addresses.get(node).copied()
    }

    /// The protection of a container.
    pub fn protection_of(&self, container: &str) -> Option<&Protect> {
        self.protect.iter().find(|protect| protect.container == container)
    }

    /// The host that a container starts on: its primary, or the host it names.
    pub fn home_of(&self, container: &str) -> Option<&str> {
        match self.protection_of(container) {
            Some(protect) => Some(&protect.primary),
            None => self.containers.get(container)?.host.as_deref(),
        }
    }

    /// The hosts that a container can run on: its home, and the backup if it has one.
    pub fn hosts_of(&self, container: &str) -> Vec<&str> {
        let backup = self.protection_of(container).map(|protect| protect.backup.as_str());
        self.home_of(container).into_iter().chain(backup).collect()
    }

    /// The containers that can run on a host, sorted by name.
    pub fn containers_on<'a>(
        &'a self,
        host: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Container)> {
        self.containers
            .iter()
            .filter(move |(name, _)| self.hosts_of(name).contains(&host))
            .map(|(name, container)| (name.as_str(), container))
    }

    /// The MAC address of a container; none if there is no such container.
    pub fn mac_of(&self, container: &str) -> Option<Mac> {
        let mac = self.containers.get(container)?.mac;
        Some(mac.unwrap_or_else(|| Mac::derived_from(&format!("{}/{container}", self.name))))
    }

    /// The interface of `host` that the checkpoints of `protect` travel over.
    pub fn replication_interface<'a>(
        &'a self,
        protect: &'a Protect,
        host: &str,
    ) -> Option<&'a str> {
        if let Some(over) = &protect.over {
            return Some(over);
        }
        let link = self.links.iter().find(|link| {
            [&protect.primary, &protect.backup]
                .iter()
                .all(|node| link.endpoints.iter().any(|end| end.node == **node))
        })?;
        link.endpoints.iter().find(|end| end.node == host).map(|end| end.interface.as_str())
    }

    /// The address of `host` that the checkpoints of `protect` travel over.
    pub fn replication_address(&self, protect: &Protect, host: &str) -> Option<IpAddr> {
        let interface = self.replication_interface(protect, host)?;
        self.address_of(host, interface).map(|address| address.ip)
    }

    /// Where the backup of `protect` receives checkpoints.
    pub fn backup_socket(&self, protect: &Protect) -> Option<SocketAddr> {
        let ip = self.replication_address(protect, &protect.backup)?;
        Some(SocketAddr::new(ip, protect.port))
    }

    /// Where the witness listens: the first address of its node.
    pub fn witness_socket(&self) -> Option<SocketAddr> {
        let witness = self.witness.as_ref()?;
        let addresses = self.links.iter().filter_map(|link| link.addresses.get(&witness.node));
        addresses.map(|address| SocketAddr::new(address.ip, witness.port)).next()
    }

    /// Whether a node is the witness's, and so has no agent.
    pub fn is_witness(&self, node: &str) -> bool {
        self.witness.as_ref().is_some_and(|witness| witness.node == node)
    }

    /// Where a client connects to; none if there is no such container.
    pub fn target_socket(&self, target: &super::Target) -> Option<SocketAddr> {
        let container = self.containers.get(&target.container)?;
        Some(SocketAddr::new(container.address.ip, target.port))
    }
}

impl Fault {
    /// Whether it happens to a host, and not to a link.
    pub fn is_of_host(self) -> bool {
        !matches!(
            self,
            Fault::CutLink
                | Fault::CutOut
                | Fault::CutIn
                | Fault::SlowLink
                | Fault::LossyLink
                | Fault::HealLink
        )
    }

    /// Whether it needs a link that goes through user space, named by one of its ends.
    pub fn needs_impair(self) -> bool {
        matches!(self, Fault::SlowLink | Fault::LossyLink)
    }
}

impl Container {
    /// What to run here. `installed` tells whether a program can be found; where it cannot, the
    /// built-in server stands in if the file allows it.
    pub fn workload(&self, installed: impl FnOnce(&str) -> bool) -> Workload<'_> {
        const BUILT_IN: &Embedded = &Embedded { threads: 1, port: 6379 };
        match (self.command.as_deref().and_then(<[String]>::split_first), &self.embedded) {
            (Some((program, _)), Some(embedded)) if !installed(program) => {
                Workload::Embedded(embedded)
            }
            (Some((program, arguments)), _) => Workload::Command(program, arguments),
            (None, embedded) => Workload::Embedded(embedded.as_ref().unwrap_or(BUILT_IN)),
        }
    }
}
