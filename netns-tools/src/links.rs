//! Interfaces, addresses and routes of a namespace, over rtnetlink.
//!
//! A [`Network`] is a netlink socket inside one namespace. Everything that changes something first
//! looks whether it is already so: doing it twice is doing it once. The calls block; they may be
//! made from asynchronous code too, but hold its thread meanwhile (a call takes well under a
//! millisecond).

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags};
use netlink_packet_route::link::{
    BridgePortState, BridgeStpState, InfoBridgePort, InfoData, InfoPortData, InfoVeth, State,
};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use nix::errno::Errno;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::namespace::{Namespace, NamespaceError};
use crate::topology::{Cidr, Mac};

/// The queueing discipline that drops everything without an error for the sender.
const BLACKHOLE: &str = "blackhole";

/// What failed on which interface of which namespace.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The namespace cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// No netlink socket.
    #[error("cannot open a netlink socket in {namespace}: {source}")]
    Socket {
        /// The namespace.
        namespace: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {action} {interface} in {namespace}: {message}")]
    Refused {
        /// What was to be done.
        action: String,
        /// The interface.
        interface: String,
        /// The namespace.
        namespace: String,
        /// What the kernel answered.
        message: String,
    },
    /// There is no such interface.
    #[error("there is no interface {interface} in {namespace} (is the lab deployed whole?)")]
    Missing {
        /// The interface.
        interface: String,
        /// The namespace.
        namespace: String,
    },
}

/// An interface as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its number in its namespace.
    pub index: u32,
    /// `veth`, `bridge`, `tun`; empty for lo.
    pub kind: String,
    /// Whether it is switched on.
    pub up: bool,
    /// Whether something is connected to it.
    pub carrier: bool,
    /// Whether it drops everything that is sent through it: a cut link.
    pub cut: bool,
    /// Whether frames pass: it is switched on and connected, and not cut.
    pub ready: bool,
    /// Its MAC address; lo has zeros.
    pub mac: Option<Mac>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Packets that may wait to be sent.
    pub queue_len: u32,
    /// The bridge that it is a port of.
    pub bridge: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<Cidr>,
}

/// The network of one namespace.
#[derive(Debug)]
pub struct Network {
    /// Only none while it is dropped.
    runtime: Option<Runtime>,
    handle: Handle,
    namespace: String,
}

impl Network {
    /// Opens a netlink socket inside the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or there are no descriptors left.
    pub fn open(namespace: &Namespace) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Socket { namespace: namespace.name().into(), source };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let (connection, handle, _) = namespace
            .enter(|| {
                let _inside = runtime.enter();
                rtnetlink::new_connection()
            })?
            .map_err(failed)?;
        runtime.spawn(connection);
        Ok(Self { runtime: Some(runtime), handle, namespace: namespace.name().to_owned() })
    }

    /// Waits for `future` on a thread of its own, as the caller may be inside another runtime.
    fn wait<F>(&self, future: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        let runtime = self.runtime.as_ref().expect("it is only taken by drop");
        std::thread::scope(|scope| match scope.spawn(|| runtime.block_on(future)).join() {
            Ok(output) => output,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// Waits for a request and names its failure.
    fn request<F>(&self, action: &str, interface: &str, future: F) -> Result<(), LinkError>
    where
        F: Future<Output = Result<(), rtnetlink::Error>> + Send,
    {
        self.wait(future).map_err(|error| self.refused(action, interface, &error))
    }

    /// Like [`Network::request`], but one failure is as good as success.
    fn request_unless<F>(
        &self,
        fine: Errno,
        action: &str,
        interface: &str,
        future: F,
    ) -> Result<(), LinkError>
    where
        F: Future<Output = Result<(), rtnetlink::Error>> + Send,
    {
        match self.wait(future) {
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -(fine as i32) => {
                Ok(())
            }
            Err(error) => Err(self.refused(action, interface, &error)),
            Ok(()) => Ok(()),
        }
    }

    fn refused(&self, action: &str, interface: &str, error: &rtnetlink::Error) -> LinkError {
        let message = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
            other => other.to_string(),
        };
        LinkError::Refused {
            action: action.to_owned(),
            interface: interface.to_owned(),
            namespace: self.namespace.clone(),
            message,
        }
    }

    /// All interfaces of the namespace.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub fn interfaces(&self) -> Result<Vec<Interface>, LinkError> {
        let dump = async {
            let links: Vec<_> = self.handle.link().get().execute().try_collect().await?;
            let addresses: Vec<_> = self.handle.address().get().execute().try_collect().await?;
            let qdiscs: Vec<_> = self.handle.qdisc().get().execute().try_collect().await?;
            Ok::<_, rtnetlink::Error>((links, addresses, qdiscs))
        };
        let (links, addresses, qdiscs) =
            self.wait(dump).map_err(|error| self.refused("list", "the interfaces", &error))?;
        let mut interfaces: Vec<Interface> = links.iter().map(described).collect();
        for interface in &mut interfaces {
            let here = addresses.iter().filter(|message| message.header.index == interface.index);
            interface.addresses = here
                .filter_map(|message| {
                    let ip = message.attributes.iter().find_map(address_in)?;
                    Some(Cidr { ip, prefix: message.header.prefix_len })
                })
                .collect();
            interface.cut |= qdiscs.iter().any(|qdisc| {
                qdisc.header.index as u32 == interface.index
                    && qdisc.attributes.contains(&TcAttribute::Kind(BLACKHOLE.to_owned()))
            });
            interface.ready &= !interface.cut;
        }
        Ok(interfaces)
    }

    /// One interface, if it is there.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub fn find(&self, name: &str) -> Result<Option<Interface>, LinkError> {
        Ok(self.interfaces()?.into_iter().find(|interface| interface.name == name))
    }

    /// One interface.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, name: &str) -> Result<Interface, LinkError> {
        self.find(name)?.ok_or_else(|| LinkError::Missing {
            interface: name.to_owned(),
            namespace: self.namespace.clone(),
        })
    }

    /// Whether frames pass an interface.
    ///
    /// # Errors
    /// It is not there.
    pub fn is_ready(&self, name: &str) -> Result<bool, LinkError> {
        // Asked for a single interface, the kernel first catches up with the carrier; left alone, it
        // may take a second until it does.
        let index = self.get(name)?.index;
        let asked = self.handle.link().get().match_index(index).execute();
        let answer: Result<Vec<LinkMessage>, _> = self.wait(asked.try_collect());
        answer.map_err(|error| self.refused("look at", name, &error))?;
        Ok(self.get(name)?.ready)
    }

    /// Joins this namespace and another by a cable: interface `name` here, `peer_name` there.
    ///
    /// # Errors
    /// A name is taken by something else.
    pub fn add_veth(&self, name: &str, peer: &Namespace, peer_name: &str) -> Result<(), LinkError> {
        let far = Self::open(peer)?;
        if self.find(name)?.is_some() && far.find(peer_name)?.is_some() {
            return Ok(());
        }
        // One end alone is left over from a namespace that is just going away.
        self.delete(name)?;
        far.delete(peer_name)?;
        let there = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer_name)
            .setns_by_fd(peer.as_fd().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new(name, peer_name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(there)))
            .build();
        self.request("make the veth pair", name, self.handle.link().add(message).execute())
    }

    /// Makes a bridge: no spanning tree, no waiting before a port forwards.
    ///
    /// # Errors
    /// The name is taken by something else.
    pub fn add_bridge(&self, name: &str) -> Result<(), LinkError> {
        if self.find(name)?.is_some_and(|interface| interface.kind == "bridge") {
            return Ok(());
        }
        let message = LinkBridge::new(name)
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .mcast_snooping(false)
            .build();
        self.request("make the bridge", name, self.handle.link().add(message).execute())
    }

    /// Makes an interface a port of a bridge.
    ///
    /// # Errors
    /// One of them is missing.
    pub fn set_bridge(&self, name: &str, bridge: &str) -> Result<(), LinkError> {
        let bridge = self.get(bridge)?.index;
        if self.get(name)?.bridge == Some(bridge) {
            return Ok(());
        }
        self.change("add to a bridge the interface", name, |link| link.controller(bridge))
    }

    /// Switches an interface on.
    ///
    /// # Errors
    /// It is missing.
    pub fn set_up(&self, name: &str) -> Result<(), LinkError> {
        self.change("switch on", name, LinkMessageBuilder::up)
    }

    /// Switches an interface off: it loses its routes, and what is connected to it its carrier.
    ///
    /// # Errors
    /// It is missing.
    pub fn set_down(&self, name: &str) -> Result<(), LinkError> {
        self.change("switch off", name, LinkMessageBuilder::down)
    }

    /// Sets the MAC address.
    ///
    /// # Errors
    /// The interface is missing or does not allow it.
    pub fn set_mac(&self, name: &str, mac: Mac) -> Result<(), LinkError> {
        if self.get(name)?.mac == Some(mac) {
            return Ok(());
        }
        self.change("set the MAC address of", name, |link| link.address(mac.0.to_vec()))
    }

    /// Sets the largest packet, in bytes.
    ///
    /// # Errors
    /// The interface is missing or does not allow it.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), LinkError> {
        if self.get(name)?.mtu == mtu {
            return Ok(());
        }
        self.change("set the MTU of", name, |link| link.mtu(mtu))
    }

    /// Sets how many packets may wait to be sent.
    ///
    /// # Errors
    /// The interface is missing or does not allow it.
    pub fn set_queue_len(&self, name: &str, packets: u32) -> Result<(), LinkError> {
        if self.get(name)?.queue_len == packets {
            return Ok(());
        }
        self.change("set the queue length of", name, |link| link.txqueuelen(packets))
    }

    /// Moves an interface to another namespace. It loses its addresses.
    ///
    /// # Errors
    /// It is missing, or its name is taken there.
    pub fn move_to(&self, name: &str, namespace: &Namespace) -> Result<(), LinkError> {
        let fd = namespace.as_fd().as_raw_fd();
        self.change("move to another namespace", name, |link| link.setns_by_fd(fd))
    }

    /// Adds an address, which can be used at once: nobody is asked whether it is free, not even by
    /// a kernel that would ask for no time but has not come to it yet.
    ///
    /// # Errors
    /// The interface is missing, or the address is used by another one.
    pub fn add_address(&self, name: &str, address: Cidr) -> Result<(), LinkError> {
        let interface = self.get(name)?;
        if interface.addresses.contains(&address) {
            return Ok(());
        }
        let mut request = self.handle.address().add(interface.index, address.ip, address.prefix);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        self.request(&format!("add the address {address} to"), name, request.execute())
    }

    /// Adds a default route through `gateway`, or replaces the one there is.
    ///
    /// # Errors
    /// The gateway is not reachable over the interface.
    pub fn set_default_route(&self, name: &str, gateway: IpAddr) -> Result<(), LinkError> {
        let index = self.get(name)?.index;
        let message = match gateway {
            IpAddr::V4(gateway) => rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .build(),
            IpAddr::V6(gateway) => rtnetlink::RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .build(),
        };
        let request = self.handle.route().add(message).replace().execute();
        self.request(&format!("set the default route through {gateway} of"), name, request)
    }

    /// The gateways of the default routes of IPv4.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub fn default_gateways(&self) -> Result<Vec<IpAddr>, LinkError> {
        let message = rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let dump = self.handle.route().get(message).execute().try_collect();
        let routes: Vec<RouteMessage> =
            self.wait(dump).map_err(|error| self.refused("list", "the routes", &error))?;
        let defaults = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        Ok(defaults.flat_map(|route| &route.attributes).filter_map(gateway_in).collect())
    }

    /// Deletes an interface, and with it the other end of a veth pair. That there is none of that
    /// name is no error.
    ///
    /// # Errors
    /// The kernel does not allow it.
    pub fn delete(&self, name: &str) -> Result<(), LinkError> {
        match self.find(name)? {
            None => Ok(()),
            Some(interface) => {
                let request = self.handle.link().del(interface.index).execute();
                self.request_unless(Errno::ENODEV, "delete", name, request)
            }
        }
    }

    /// Cuts what an interface sends, without any error for the sender. A port of a bridge neither
    /// sends nor receives any more, which also stops those that write frames past the queue of the
    /// interface at its other end.
    ///
    /// # Errors
    /// The interface is missing.
    pub fn cut(&self, name: &str) -> Result<(), LinkError> {
        let interface = self.get(name)?;
        if interface.bridge.is_some() {
            return self.set_port_state(&interface, BridgePortState::Disabled);
        }
        let mut message = TcMessage::with_index(interface.index as i32);
        message.header.parent = TcHandle::ROOT;
        message.attributes.push(TcAttribute::Kind(BLACKHOLE.to_owned()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let mut handle = self.handle.clone();
        let send = async move {
            let mut answers = handle.request(request)?;
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload
                    && error.code.is_some()
                {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
            }
            Ok(())
        };
        self.request("cut", name, send)
    }

    /// Takes [`Network::cut`] back.
    ///
    /// # Errors
    /// The interface is missing.
    pub fn heal(&self, name: &str) -> Result<(), LinkError> {
        let interface = self.get(name)?;
        if !interface.cut {
            return Ok(());
        }
        if interface.bridge.is_some() {
            return self.set_port_state(&interface, BridgePortState::Forwarding);
        }
        let mut request = self.handle.qdisc().del(interface.index as i32);
        request.message_mut().header.parent = TcHandle::ROOT;
        self.request("heal", name, request.execute())
    }

    fn set_port_state(&self, port: &Interface, state: BridgePortState) -> Result<(), LinkError> {
        let message = LinkBridgePort::new(port.index).state(state).build();
        let request = self.handle.link().set_port(message).execute();
        // A port whose cable is not in yet opens by itself when it is.
        self.request_unless(Errno::ENETDOWN, "set the state of the port", &port.name, request)
    }

    fn change(
        &self,
        action: &str,
        name: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), LinkError> {
        let message = change(LinkUnspec::new_with_index(self.get(name)?.index)).build();
        self.request(action, name, self.handle.link().set(message).execute())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A plain drop would panic inside asynchronous code.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn described(message: &LinkMessage) -> Interface {
    let mut interface = Interface {
        name: String::new(),
        index: message.header.index,
        kind: String::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        cut: false,
        ready: false,
        mac: None,
        mtu: 0,
        queue_len: 0,
        bridge: None,
        addresses: Vec::new(),
    };
    let (mut operational, mut forwarding) = (State::Unknown, true);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::TxQueueLen(packets) => interface.queue_len = *packets,
            LinkAttribute::Controller(bridge) => interface.bridge = Some(*bridge),
            LinkAttribute::Address(mac) => {
                interface.mac = mac.as_slice().try_into().ok().map(Mac);
            }
            LinkAttribute::OperState(state) => operational = *state,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => interface.kind = kind_name(kind),
                        LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                            forwarding =
                                port.contains(&InfoBridgePort::State(BridgePortState::Forwarding));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // The kernel starts to send some time after it has seen the carrier, and says so by this state;
    // what is sent before is lost. Only devices whose carrier never changes have no such state.
    let starts_at_once = matches!(interface.kind.as_str(), "tun" | "");
    let working = interface.up
        && interface.carrier
        && (operational == State::Up || (operational == State::Unknown && starts_at_once));
    interface.cut = working && !forwarding;
    interface.ready = working && forwarding;
    interface
}

fn kind_name(kind: &InfoKind) -> String {
    match kind {
        InfoKind::Veth => "veth".to_owned(),
        InfoKind::Bridge => "bridge".to_owned(),
        InfoKind::Tun => "tun".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn address_in(attribute: &AddressAttribute) -> Option<IpAddr> {
    match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    }
}

fn gateway_in(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some((*ip).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some((*ip).into()),
        _ => None,
    }
}
