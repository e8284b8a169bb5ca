//! The two ends of a container's network on a host: the device inside its namespace, and the
//! bridge port that leads to its clients.

use crate::frames::Mac;
use crate::frames::resume::LocalNet;
use anyhow::{Context, Result};
use netns_tools::links::Network;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{Container, Topology};
use replicator::sys::tap::{LinkSetup, Tap, TapOptions};
use std::net::IpAddr;

/// The container's own name of its device.
const INNER: &str = "eth0";
/// Frames that a TAP queues towards us before it drops. During a stop both queues fill.
const QUEUE: u32 = 16_384;
/// The kernel's limit of an interface name, without the terminating zero.
const NAME_MAX: usize = 15;

/// A container's place in the network, from the topology.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Name of the container.
    pub(super) name: String,
    /// Hardware address, the same on every host.
    pub(super) mac: Mac,
    /// IP address.
    pub(super) ip: IpAddr,
    /// Length of its prefix.
    pub(super) prefix: u8,
    /// Default gateway.
    pub(super) gateway: Option<IpAddr>,
    /// The host's interface that leads to clients.
    pub(super) uplink: String,
}

impl Place {
    /// Of a container of a topology.
    pub(super) fn of(topology: &Topology, name: &str, container: &Container) -> Result<Self> {
        let mac = topology.mac_of(name).context("the container has no MAC address")?;
        Ok(Self {
            name: name.to_owned(),
            mac: Mac(mac.0),
            ip: container.address.ip,
            prefix: container.address.prefix,
            gateway: container.gateway,
            uplink: container.uplink.clone(),
        })
    }

    /// For probing peers.
    pub(super) fn local_net(&self) -> LocalNet {
        LocalNet {
            mac: self.mac,
            addresses: vec![(self.ip, self.prefix)],
            gateways: self.gateway.into_iter().collect(),
        }
    }

    /// Makes the container's device in the network namespace of process `pid`, with its address,
    /// up and with a carrier.
    pub(super) fn make_inner(&self, pid: i32) -> Result<Tap> {
        let namespace = Namespace::of_process(pid).context("enter the container's network")?;
        // IPv6 is not carried yet; without it the container's kernel says nothing by itself.
        for (key, value) in
            [("net.ipv6.conf.all.disable_ipv6", "1"), ("net.ipv6.conf.default.disable_ipv6", "1")]
        {
            // A kernel without IPv6 has no such file, and nothing to switch off.
            if let Err(error) = namespace.set_sysctl(key, value) {
                tracing::debug!(%error, "sysctl not set");
            }
        }
        let tap = namespace.enter(|| Tap::create(INNER, TapOptions::default()))??;
        tap.configure(LinkSetup {
            mac: Some(self.mac.0),
            up: Some(true),
            txqueuelen: Some(QUEUE),
            mtu: None,
        })?;
        let network = Network::open(&namespace)?;
        network.set_up("lo")?;
        let cidr = netns_tools::topology::Cidr { ip: self.ip, prefix: self.prefix };
        network.add_address(INNER, cidr)?;
        if let Some(gateway) = self.gateway {
            network.set_default_route(INNER, gateway)?;
        }
        Ok(tap)
    }

    /// Makes the port towards the clients in this process's network namespace: a TAP in the
    /// uplink, if that is a bridge, or else in a bridge made for the uplink.
    pub(super) fn make_outer(&self) -> Result<Tap> {
        let here = Namespace::of_process(std::process::id() as i32)?;
        let network = Network::open(&here)?;
        let uplink = network
            .get(&self.uplink)
            .with_context(|| format!("container {}: its uplink", self.name))?;
        let bridge = if uplink.kind == "bridge" {
            uplink.name
        } else {
            let bridge = short("nlb-", &self.uplink);
            network.add_bridge(&bridge)?;
            network.set_up(&bridge)?;
            network.set_bridge(&self.uplink, &bridge)?;
            network.set_up(&self.uplink)?;
            bridge
        };
        let tap = Tap::create(&short("nl-", &self.name), TapOptions::default())?;
        tap.configure(LinkSetup { mac: None, up: Some(true), txqueuelen: Some(QUEUE), mtu: None })?;
        network.set_bridge(tap.name(), &bridge)?;
        Ok(tap)
    }
}

/// An interface name from a prefix and a name that may be too long for it: the end gives way to
/// a digest of the whole.
fn short(prefix: &str, name: &str) -> String {
    if prefix.len() + name.len() <= NAME_MAX {
        return format!("{prefix}{name}");
    }
    let digest = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let digest = format!("{:04x}", digest & 0xffff);
    let keep = NAME_MAX - prefix.len() - digest.len();
    format!("{prefix}{}{digest}", &name[..keep])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_stay_apart() {
        assert_eq!(short("nl-", "redis"), "nl-redis");
        let (a, b) = (short("nl-", "a-very-long-name-1"), short("nl-", "a-very-long-name-2"));
        assert!(a.len() <= NAME_MAX && b.len() <= NAME_MAX && a != b);
    }
}
