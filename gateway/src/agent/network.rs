//! The two ends of a container's network on a host: the device inside its namespace, and the
//! bridge port that leads to its clients.

use crate::chain::chain;
use crate::frames::Mac;
use crate::frames::announce::Announcer;
use crate::frames::gate::Gate;
use crate::frames::resume::LocalNet;
use anyhow::{Context, Result};
use netns_tools::links::Network;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{Cidr, Container, Topology};
use replicator::bypass::{Bypass, Side};
use replicator::sys::tap::{LinkSetup, Tap, TapOptions};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The container's own name of its device.
pub(super) const INNER: &str = "eth0";
/// What the container sees of the cable around the gate.
const CABLE: &str = "nilicon";
/// Frames that a TAP queues towards us before it drops. During a stop both queues fill.
const QUEUE: u32 = 16_384;
/// The kernel's limit of an interface name, without the terminating zero.
const NAME_MAX: usize = 15;
/// Announcements, and the pause between them.
const ANNOUNCEMENTS: u32 = 3;
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(100);

/// A container's place in the network, from the topology.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Name of the container.
    pub(super) name: String,
    /// Hardware address, the same on every host.
    pub(super) mac: Mac,
    /// IP addresses.
    pub(super) addresses: Vec<Cidr>,
    /// Default gateway.
    pub(super) gateway: Option<IpAddr>,
    /// The host's interface that leads to clients.
    pub(super) uplink: String,
}

impl Place {
    /// Says at once that the container is here now, and again a little later from a thread of its own:
    /// it may have been elsewhere before, and its neighbours and switches remember that.
    pub(super) fn announce(&self, gate: Arc<Gate>) -> Result<()> {
        let addresses: Vec<_> = self.all_addresses().iter().map(|a| a.ip).collect();
        let mut announcer = Announcer::new(self.mac, &addresses, ANNOUNCEMENTS, ANNOUNCE_PAUSE);
        for frame in announcer.due(Instant::now()) {
            gate.send(frame)?;
        }
        std::thread::Builder::new().name("announce".into()).spawn(move || {
            while let Some(at) = announcer.next_deadline() {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                for frame in announcer.due(Instant::now()) {
                    if let Err(error) = gate.send(frame) {
                        tracing::debug!(%error, "announcement");
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Of a container of a topology.
    pub(super) fn of(topology: &Topology, name: &str, container: &Container) -> Result<Self> {
        let mac = topology.mac_of(name).context("the container has no MAC address")?;
        Ok(Self {
            name: name.to_owned(),
            mac: Mac(mac.0),
            addresses: container.addresses().collect(),
            gateway: container.gateway,
            uplink: container.uplink.clone(),
        })
    }

    /// Every address that neighbours may know, the one of the link that the kernel derives from
    /// the hardware address (RFC 4291, appendix A) included.
    pub(super) fn all_addresses(&self) -> Vec<Cidr> {
        let mut all = self.addresses.clone();
        if self.uses_ipv6() {
            all.push(Cidr { ip: link_local(self.mac).into(), prefix: 64 });
        }
        all
    }

    fn uses_ipv6(&self) -> bool {
        self.addresses.iter().any(|a| a.ip.is_ipv6())
    }

    /// For probing peers.
    pub(super) fn local_net(&self) -> LocalNet {
        LocalNet {
            mac: self.mac,
            addresses: self.all_addresses().iter().map(|a| (a.ip, a.prefix)).collect(),
            gateways: self.gateway.into_iter().collect(),
        }
    }

    /// Makes the container's device in the network namespace of process `pid`, with its address,
    /// up and with a carrier.
    pub(super) fn make_inner(&self, pid: i32) -> Result<Tap> {
        let namespace = Namespace::of_process(pid).context("enter the container's network")?;
        self.set_sysctls(&namespace);
        let tap = namespace.enter(|| Tap::create(INNER, TapOptions::default()))??;
        tap.configure(LinkSetup {
            mac: Some(self.mac.0),
            up: Some(true),
            txqueuelen: Some(QUEUE),
            mtu: None,
        })?;
        self.set_addresses(&Network::open(&namespace)?)?;
        Ok(tap)
    }

    /// Joins the network namespace of process `pid` to the uplink by a plain veth, with the
    /// container's addresses: nothing of ours is in between.
    pub(super) fn make_veth(&self, pid: i32) -> Result<()> {
        let namespace = Namespace::of_process(pid).context("enter the container's network")?;
        self.set_sysctls(&namespace);
        let (network, bridge) = self.uplink_bridge()?;
        let outer = short("nl-", &self.name);
        network.add_veth(&outer, &namespace, INNER)?;
        network.set_bridge(&outer, &bridge)?;
        let inside = Network::open(&namespace)?;
        inside.set_mac(INNER, netns_tools::topology::Mac(self.mac.0))?;
        inside.set_up(INNER)?;
        network.set_up(&outer)?;
        self.set_addresses(&inside)
    }

    /// Opens a way around the gate for the container with this process, from a thread of its own: nobody waits
    /// for it, and without it frames go through the gate.
    pub(super) fn bypass(&self, gate: Arc<Gate>, pid: i32) {
        let place = self.clone();
        let opens = std::thread::Builder::new().name("bypass".into()).spawn(move || {
            match place.make_bypass(&gate, pid) {
                Ok((bypass, cable)) => {
                    let open = gate.open_bypass(bypass, cable);
                    tracing::debug!(container = place.name, open, "the bypass");
                }
                Err(error) => tracing::info!(
                    container = place.name,
                    error = chain(&error),
                    "no bypass: its frames go through the gate"
                ),
            }
        });
        if let Err(error) = opens {
            tracing::info!(%error, "no bypass");
        }
    }

    /// Lays the cable, and ties the programs to its ends and to the gate's devices.
    fn make_bypass(&self, gate: &Gate, pid: i32) -> Result<(Bypass, Cable)> {
        let namespace = Namespace::of_process(pid).context("enter the container's network")?;
        let here = Namespace::of_process(std::process::id() as i32)?;
        let (inside, network) = (Network::open(&namespace)?, Network::open(&here)?);
        let cable = Cable(short("nlc-", &self.name));
        network.add_veth(&cable.0, &namespace, CABLE)?;
        for (namespace, network, end) in
            [(&namespace, &inside, CABLE), (&here, &network, cable.0.as_str())]
        {
            // It would announce itself.
            let key = format!("net.ipv6.conf.{end}.disable_ipv6");
            if let Err(error) = namespace.set_sysctl(&key, "1") {
                tracing::debug!(%error, "sysctl not set");
            }
            network.set_up(end)?;
        }
        let side = |network: &Network, device: &str, cable: &str| -> Result<Side> {
            Ok(Side { device: network.get(device)?.index, cable: network.get(cable)?.index })
        };
        let inner = side(&inside, gate.inner_name(), CABLE)?;
        let outer = side(&network, gate.outer_name(), &cable.0)?;
        let mut bypass = Bypass::new()?;
        bypass.tie_outer(outer)?;
        namespace.enter(|| bypass.tie_inner(inner))??;
        Ok((bypass, cable))
    }

    fn set_sysctls(&self, namespace: &Namespace) {
        for (key, value) in self.sysctls() {
            // A kernel without IPv6 has no such file, and nothing to switch off.
            if let Err(error) = namespace.set_sysctl(key, value) {
                tracing::debug!(%error, "sysctl not set");
            }
        }
    }

    fn set_addresses(&self, inside: &Network) -> Result<()> {
        inside.set_up("lo")?;
        for address in &self.addresses {
            inside.add_address(INNER, *address)?;
        }
        if let Some(gateway) = self.gateway {
            inside.set_default_route(INNER, gateway)?;
        }
        Ok(())
    }

    /// What the container's network is told before its device is made. Without an address of IPv6
    /// its kernel says nothing of that by itself. With one, it takes its addresses from here
    /// alone, and at once: the same ones come up in two places, and nobody has to be asked
    /// whether they are free.
    fn sysctls(&self) -> &'static [(&'static str, &'static str)] {
        match self.uses_ipv6() {
            false => &[
                ("net.ipv6.conf.all.disable_ipv6", "1"),
                ("net.ipv6.conf.default.disable_ipv6", "1"),
            ],
            true => &[
                ("net.ipv6.conf.all.disable_ipv6", "0"),
                ("net.ipv6.conf.default.disable_ipv6", "0"),
                ("net.ipv6.conf.all.accept_dad", "0"),
                ("net.ipv6.conf.default.accept_dad", "0"),
                ("net.ipv6.conf.default.addr_gen_mode", "0"),
                ("net.ipv6.conf.default.use_tempaddr", "0"),
                ("net.ipv6.conf.default.accept_ra", "0"),
                ("net.ipv6.conf.default.router_solicitations", "0"),
            ],
        }
    }

    /// Makes the port towards the clients in this process's network namespace: a TAP in the
    /// uplink, if that is a bridge, or else in a bridge made for the uplink.
    pub(super) fn make_outer(&self) -> Result<Tap> {
        let (network, bridge) = self.uplink_bridge()?;
        let tap = Tap::create(&short("nl-", &self.name), TapOptions::default())?;
        tap.configure(LinkSetup { mac: None, up: Some(true), txqueuelen: Some(QUEUE), mtu: None })?;
        network.set_bridge(tap.name(), &bridge)?;
        Ok(tap)
    }

    /// The bridge that leads to the clients, and this process's network, where it is.
    fn uplink_bridge(&self) -> Result<(Network, String)> {
        // Several containers may be the first to need the same one.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
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
        Ok((network, bridge))
    }
}

/// A cable around a gate, by its name here. Dropped, it is removed, both ends.
#[derive(Debug)]
struct Cable(String);

impl Drop for Cable {
    fn drop(&mut self) {
        let removed = || -> Result<()> {
            let here = Namespace::of_process(std::process::id() as i32)?;
            Ok(Network::open(&here)?.delete(&self.0)?)
        };
        if let Err(error) = removed() {
            tracing::debug!(cable = self.0, error = chain(&error), "the cable is not removed");
        }
    }
}

/// The link-local address with the modified EUI-64 of a hardware address.
fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    let high = (a ^ 2) << 8 | b;
    Ipv6Addr::new(0xfe80, 0, 0, 0, high, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
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
    fn the_link_local_address_is_the_one_that_the_kernel_takes() {
        let mac = Mac([2, 0, 0, 0xaa, 0xbb, 0x01]);
        assert_eq!(link_local(mac), "fe80::ff:feaa:bb01".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn long_names_stay_apart() {
        assert_eq!(short("nl-", "redis"), "nl-redis");
        let (a, b) = (short("nl-", "a-very-long-name-1"), short("nl-", "a-very-long-name-2"));
        assert!(a.len() <= NAME_MAX && b.len() <= NAME_MAX && a != b);
    }
}
