//! Labs: a topology made real in namespaces, looked at, broken on purpose, and taken down.
//!
//! [`Lab::deploy`] makes the kernel agree with the topology and can be repeated: it makes what is
//! missing, repairs what was broken, and leaves the rest alone. [`Lab::destroy`] removes whatever
//! is there, however little that is. Faults are in [`fault`].

mod destroy;
pub mod fault;
mod state;
mod weather;

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

pub use destroy::Destroyed;
pub use state::Helper;

use crate::BRIDGE_DEVICE;
use crate::cgroup::CgroupError;
use crate::links::{Interface, LinkError, Network};
use crate::namespace::{Namespace, NamespaceError};
use crate::process::{self, ProcessId, StillThere};
use crate::topology::{Endpoint, Link, NodeKind, Topology, TopologyError};

/// How long the process of an impaired link may take to make its devices.
const LINK_PATIENCE: Duration = Duration::from_secs(20);

/// What failed with a lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// There is no such lab.
    #[error("the lab {lab} is not deployed")]
    NotDeployed {
        /// The lab.
        lab: String,
    },
    /// A lab of that name is there, with another topology.
    #[error("the lab {lab} is deployed with another topology (destroy it first)")]
    Different {
        /// The lab.
        lab: String,
    },
    /// There is no such node, link or process in the lab.
    #[error("the lab {lab} has no {what}")]
    Unknown {
        /// The lab.
        lab: String,
        /// What was asked for.
        what: String,
    },
    /// A link stays dead.
    #[error("no frame passes {endpoint} of the lab {lab} (is its other end switched off?)")]
    NoCarrier {
        /// The lab.
        lab: String,
        /// The end.
        endpoint: Endpoint,
    },
    /// What a link does to frames cannot be changed.
    #[error(
        "the frames of the link at {endpoint} of the lab {lab} do not pass through user space (give \
         it `impair: {{}}` in the topology, and deploy it anew)"
    )]
    NotImpaired {
        /// The lab.
        lab: String,
        /// The end.
        endpoint: Endpoint,
    },
    /// What is written down about the lab cannot be used.
    #[error("cannot use {}: {source} (run as root)", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The copy of the topology cannot be used.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The process of an impaired link does not work.
    #[error("the process of the link {link} {problem}; its output is in {}", log.display())]
    LinkProcess {
        /// The link, by its first end.
        link: String,
        /// What is wrong with it.
        problem: String,
        /// Where its output is.
        log: PathBuf,
    },
    /// A namespace cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A link cannot be set up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A control group cannot be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Processes would not end.
    #[error(transparent)]
    StillThere(#[from] StillThere),
}

/// An impaired link that needs a process to carry its frames: one that calls
/// [`run_link`](crate::impair::run_link) with these values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkTask {
    /// The lab.
    pub lab: String,
    /// The link's number in the topology.
    pub index: usize,
}

/// A deployed lab.
#[derive(Debug, Clone)]
pub struct Lab {
    topology: Topology,
}

/// What there is of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LabState {
    /// Its name.
    pub name: String,
    /// Its nodes, sorted by name.
    pub nodes: Vec<NodeState>,
    /// Its processes.
    pub processes: Vec<HelperState>,
}

/// What there is of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeState {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    /// The name of its namespace.
    pub namespace: String,
    /// Its interfaces but for lo; none if it is not deployed.
    pub interfaces: Option<Vec<Interface>>,
    /// The processes that run in it.
    pub pids: Vec<i32>,
}

/// A process of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HelperState {
    /// What it is called.
    pub name: String,
    /// Its number.
    pub pid: i32,
    /// Whether it runs.
    pub alive: bool,
}

impl Lab {
    /// Makes the kernel agree with the topology. `link_process` says what to run for an impaired
    /// link; it is started in the background and outlives the caller.
    ///
    /// # Errors
    /// The topology breaks a rule, a lab of that name is there with another topology, or something
    /// cannot be made; what was made until then stays, and a second call goes on from there.
    pub fn deploy(
        topology: &Topology,
        mut link_process: impl FnMut(&LinkTask) -> Command,
    ) -> Result<Self, LabError> {
        topology.check()?;
        let lock = state::Lock::take()?;
        match state::topology(&topology.name)? {
            Some(known) if known == *topology => {}
            Some(_) => return Err(LabError::Different { lab: topology.name.clone() }),
            None => state::write_topology(topology)?,
        }
        let lab = Self { topology: topology.clone() };
        for (name, node) in &topology.nodes {
            lab.make_node(name, node.kind)?;
        }
        for (index, link) in topology.links.iter().enumerate() {
            let [one, two] = link.endpoints.as_slice() else { continue };
            if link.impair.is_some() {
                lab.start_link(index, link, &mut link_process, &lock)?;
            } else {
                let peer = lab.namespace(&two.node)?;
                lab.network(&one.node)?.add_veth(&one.interface, &peer, &two.interface)?;
            }
            for end in &link.endpoints {
                lab.make_end(link, end)?;
            }
        }
        for link in &topology.links {
            lab.until_ready(&link.endpoints)?;
        }
        tracing::info!(lab = topology.name, "the lab is deployed");
        Ok(lab)
    }

    /// The lab of that name.
    ///
    /// # Errors
    /// It is not deployed.
    pub fn open(name: &str) -> Result<Self, LabError> {
        match state::topology(name)? {
            Some(topology) => Ok(Self { topology }),
            None => Err(LabError::NotDeployed { lab: name.to_owned() }),
        }
    }

    /// The names of all labs, sorted.
    pub fn list() -> Vec<String> {
        state::labs()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.topology.name
    }

    /// Its topology.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Where files about this lab go; they go away with it.
    pub fn directory(&self) -> PathBuf {
        state::directory(self.name())
    }

    /// The namespace of a node.
    ///
    /// # Errors
    /// There is none.
    pub fn namespace(&self, node: &str) -> Result<Namespace, LabError> {
        Ok(Namespace::open(&Namespace::name_of(self.name(), node))?)
    }

    /// The network of a node.
    ///
    /// # Errors
    /// There is none.
    pub fn network(&self, node: &str) -> Result<Network, LabError> {
        Ok(Network::open(&self.namespace(node)?)?)
    }

    /// Writes down that a process belongs to the lab, in the place of an earlier one of that name.
    /// It is killed when the lab is destroyed.
    ///
    /// # Errors
    /// There is no such process, or it cannot be written down.
    pub fn register_process(&self, name: &str, pid: u32) -> Result<(), LabError> {
        self.register(name, pid, &state::Lock::take()?)
    }

    fn register(&self, name: &str, pid: u32, lock: &state::Lock) -> Result<(), LabError> {
        let process = ProcessId::of(pid as i32).ok_or_else(|| LabError::Unknown {
            lab: self.name().to_owned(),
            what: format!("process {pid} ({name}): it has ended"),
        })?;
        let helper = Helper { name: name.to_owned(), process };
        state::add_helper(self.name(), helper, lock)
    }

    /// The processes written down for the lab, dead ones too.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn processes(&self) -> Result<Vec<Helper>, LabError> {
        state::helpers(self.name())
    }

    /// The process of that name, if it runs.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn process(&self, name: &str) -> Result<Option<ProcessId>, LabError> {
        let found = self.processes()?.into_iter().find(|helper| helper.name == name);
        Ok(found.map(|helper| helper.process).filter(|process| process.is_alive()))
    }

    /// What there is of the lab.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn inspect(&self) -> Result<LabState, LabError> {
        let mut nodes = Vec::new();
        for (name, node) in &self.topology.nodes {
            let mut state = NodeState {
                name: name.clone(),
                kind: node.kind,
                namespace: Namespace::name_of(self.name(), name),
                interfaces: None,
                pids: Vec::new(),
            };
            if let Ok(namespace) = Namespace::open(&state.namespace) {
                let mut interfaces = Network::open(&namespace)?.interfaces()?;
                interfaces.retain(|interface| interface.name != "lo");
                state.interfaces = Some(interfaces);
                let inside = process::in_namespaces(&[namespace.inode()].into());
                state.pids = inside.iter().map(|process| process.pid).collect();
            }
            nodes.push(state);
        }
        let helpers = self.processes()?.into_iter();
        let processes = helpers
            .map(|Helper { name, process }| HelperState {
                name,
                pid: process.pid,
                alive: process.is_alive(),
            })
            .collect();
        Ok(LabState { name: self.name().to_owned(), nodes, processes })
    }

    /// The namespace of a node, and what is in it before any cable is plugged in.
    fn make_node(&self, name: &str, kind: NodeKind) -> Result<(), LabError> {
        let namespace = Namespace::create(&Namespace::name_of(self.name(), name))?;
        if !self.uses_ipv6() {
            // Neighbour discovery and router solicitations would only be noise.
            for which in ["all", "default"] {
                let key = format!("net.ipv6.conf.{which}.disable_ipv6");
                if Path::new("/proc/sys/net/ipv6").exists() {
                    namespace.set_sysctl(&key, "1")?;
                }
            }
        }
        if self.uses_ipv6() {
            // Addresses of a lab are its own: nobody has to be asked whether they are free, which
            // would take a second.
            for which in ["all", "default"] {
                namespace.set_sysctl(&format!("net.ipv6.conf.{which}.accept_dad"), "0")?;
            }
        }
        let network = Network::open(&namespace)?;
        network.set_up("lo")?;
        if kind == NodeKind::Bridge {
            network.add_bridge(BRIDGE_DEVICE)?;
            network.set_up(BRIDGE_DEVICE)?;
        }
        Ok(())
    }

    fn uses_ipv6(&self) -> bool {
        let links = self.topology.links.iter().flat_map(|link| link.addresses.values());
        let containers =
            self.topology.containers.values().flat_map(|container| container.addresses());
        links.copied().chain(containers).any(|address| address.ip.is_ipv6())
    }

    /// One end of a link, whose interface is there.
    fn make_end(&self, link: &Link, end: &Endpoint) -> Result<(), LabError> {
        let network = self.network(&end.node)?;
        let interface = &end.interface;
        network.set_mtu(interface, link.mtu)?;
        // A TAP drops what does not fit its queue; 500 frames are too few for a burst.
        network.set_queue_len(interface, 10_000)?;
        let node = self.topology.nodes.get(&end.node);
        if node.is_some_and(|node| node.kind == NodeKind::Bridge) {
            network.set_bridge(interface, BRIDGE_DEVICE)?;
        }
        if let Some(address) = link.addresses.get(&end.node) {
            network.add_address(interface, *address)?;
        }
        network.heal(interface)?;
        network.set_up(interface)?;
        Ok(())
    }

    /// Waits until frames pass the ends of a link.
    fn until_ready(&self, ends: &[Endpoint]) -> Result<(), LabError> {
        let deadline = Instant::now() + LINK_PATIENCE;
        for end in ends {
            let network = self.network(&end.node)?;
            while !network.is_ready(&end.interface)? {
                if Instant::now() > deadline {
                    let lab = self.name().to_owned();
                    return Err(LabError::NoCarrier { lab, endpoint: end.clone() });
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// The process of an impaired link, and its devices.
    fn start_link(
        &self,
        index: usize,
        link: &Link,
        link_process: &mut impl FnMut(&LinkTask) -> Command,
        lock: &state::Lock,
    ) -> Result<(), LabError> {
        let name = format!("link-{index}");
        let log = self.directory().join(format!("{name}.log"));
        let broken = |problem: String| LabError::LinkProcess {
            link: link.endpoints[0].to_string(),
            problem,
            log: log.clone(),
        };
        if self.process(&name)?.is_none() {
            let output = File::create(&log).and_then(|file| Ok((file.try_clone()?, file)));
            let (out, err) =
                output.map_err(|source| LabError::State { path: log.clone(), source })?;
            let task = LinkTask { lab: self.name().to_owned(), index };
            let child = link_process(&task)
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(err)
                .process_group(0)
                .spawn()
                .map_err(|error| broken(format!("cannot be started: {error}")))?;
            self.register(&name, child.id(), lock)
                .map_err(|_| broken("ended at once".to_owned()))?;
        }
        let deadline = Instant::now() + LINK_PATIENCE;
        loop {
            let mut there = true;
            for end in &link.endpoints {
                there &= self.network(&end.node)?.find(&end.interface)?.is_some();
            }
            if there {
                return Ok(());
            }
            if self.process(&name)?.is_none() {
                return Err(broken("has ended".to_owned()));
            }
            if Instant::now() > deadline {
                return Err(broken("makes no devices".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
