//! Faults: cutting links, cutting the power of a host, and mending both.
//!
//! A cut link is silent: no program gets an error and no carrier is lost, frames just do not arrive.
//!
//! A host without power says nothing any more: its links go down *before* its processes are killed,
//! as the kernel would otherwise tell their peers (FIN, RST) what a dead machine could not.

use std::collections::HashSet;

use nix::sys::signal::Signal;

use super::{Lab, LabError};
use crate::cgroup::Cgroup;
use crate::process::{self, ProcessId};
use crate::topology::{Endpoint, NodeKind};

/// What dies with a host besides the processes in its own namespace.
#[derive(Debug, Clone, Default)]
pub struct Victims {
    /// Inodes of further network namespaces: those of its containers.
    pub namespaces: HashSet<u64>,
    /// Further processes.
    pub processes: Vec<ProcessId>,
}

impl Lab {
    /// Cuts the link that ends at `endpoint`.
    ///
    /// # Errors
    /// There is no such link, or the lab is not deployed whole.
    pub fn cut_link(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        for end in self.link_ends(endpoint)? {
            self.network(&end.node)?.cut(&end.interface)?;
        }
        Ok(())
    }

    /// Cuts one direction of a link: what `endpoint` sends is lost, what it receives is not.
    ///
    /// # Errors
    /// There is no such link, or the lab is not deployed whole.
    pub fn cut_out(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        self.link_ends(endpoint)?;
        if self.is_impaired(endpoint) {
            return self.silence(endpoint, true);
        }
        Ok(self.network(&endpoint.node)?.cut(&endpoint.interface)?)
    }

    /// Cuts what a node sends on all its links.
    ///
    /// # Errors
    /// There is no such node, or the lab is not deployed whole.
    pub fn cut_out_of(&self, node: &str) -> Result<(), LabError> {
        self.ends_of(node)?.iter().try_for_each(|end| self.cut_out(end))
    }

    /// Cuts the other direction: what `endpoint` receives is lost, what it sends is not. A link to a
    /// bridge needs an `impair` for that: the port of a bridge is cut both ways.
    ///
    /// # Errors
    /// There is no such link, it cannot be cut in one direction, or the lab is not deployed whole.
    pub fn cut_in(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        let ends = self.link_ends(endpoint)?;
        if self.is_impaired(endpoint) {
            return self.silence(endpoint, false);
        }
        for end in ends.iter().filter(|end| *end != endpoint) {
            if self.topology().nodes.get(&end.node).is_some_and(|n| n.kind == NodeKind::Bridge) {
                let (lab, endpoint) = (self.name().to_owned(), endpoint.clone());
                return Err(LabError::NotImpaired { lab, endpoint });
            }
            self.network(&end.node)?.cut(&end.interface)?;
        }
        Ok(())
    }

    /// Cuts what a node receives on all its links.
    ///
    /// # Errors
    /// As for [`Lab::cut_in`].
    pub fn cut_in_of(&self, node: &str) -> Result<(), LabError> {
        self.ends_of(node)?.iter().try_for_each(|end| self.cut_in(end))
    }

    /// Makes the link that ends at `endpoint` work again, also after its host was without power, and
    /// waits until it does.
    ///
    /// # Errors
    /// There is no such link, or the lab is not deployed whole.
    pub fn heal_link(&self, endpoint: &Endpoint) -> Result<(), LabError> {
        let ends = self.link_ends(endpoint)?;
        if self.is_impaired(endpoint) {
            self.clear_weather(endpoint)?;
        }
        for end in ends {
            let network = self.network(&end.node)?;
            network.heal(&end.interface)?;
            network.set_up(&end.interface)?;
        }
        self.until_ready(ends)
    }

    /// Cuts all links of a node.
    ///
    /// # Errors
    /// There is no such node, or the lab is not deployed whole.
    pub fn cut_node(&self, node: &str) -> Result<(), LabError> {
        self.ends_of(node)?.iter().try_for_each(|end| self.cut_link(end))
    }

    /// Makes all links of a node work again.
    ///
    /// # Errors
    /// There is no such node, or the lab is not deployed whole.
    pub fn heal_node(&self, node: &str) -> Result<(), LabError> {
        self.ends_of(node)?.iter().try_for_each(|end| self.heal_link(end))
    }

    /// Cuts the power of a host: its links go down, and everything that runs in its namespace, in
    /// its control groups and among `victims` is killed. Returns how many processes were killed.
    /// The calling process is spared.
    ///
    /// # Errors
    /// There is no such node, or a process would not end.
    pub fn kill_host(&self, node: &str, victims: &Victims) -> Result<usize, LabError> {
        let network = self.network(node)?;
        for end in self.ends_of(node)? {
            network.set_down(&end.interface)?;
        }
        let mut inodes = victims.namespaces.clone();
        inodes.insert(self.namespace(node)?.inode());
        let cgroup = Cgroup::of(self.name(), Some(node));
        let killed = process::kill_all(|| {
            let mut all = process::in_namespaces(&inodes);
            all.extend(&victims.processes);
            all.extend(cgroup.iter().flat_map(Cgroup::processes));
            all
        })?;
        tracing::info!(lab = self.name(), node, killed, "the host has lost its power");
        Ok(killed)
    }

    /// Kills the agent of a host: the process registered as [`Lab::agent_name`]. Returns whether it
    /// ran.
    ///
    /// # Errors
    /// It would not end.
    pub fn kill_agent(&self, node: &str) -> Result<bool, LabError> {
        self.kill_process(&Self::agent_name(node))
    }

    /// The name to register the agent of a host by.
    pub fn agent_name(node: &str) -> String {
        format!("agent-{node}")
    }

    /// Kills the process of that name. Returns whether it ran.
    ///
    /// # Errors
    /// It would not end.
    pub fn kill_process(&self, name: &str) -> Result<bool, LabError> {
        let found: Vec<_> = self.process(name)?.into_iter().collect();
        Ok(process::kill_all(|| found.clone())? > 0)
    }

    /// Sends a signal to the process of that name. Returns whether it runs.
    ///
    /// # Errors
    /// The lab's list of processes cannot be read.
    pub fn signal_process(&self, name: &str, signal: Signal) -> Result<bool, LabError> {
        let found = self.process(name)?;
        if let Some(process) = found {
            process.signal(signal);
        }
        Ok(found.is_some())
    }

    fn link_ends(&self, endpoint: &Endpoint) -> Result<&[Endpoint], LabError> {
        match self.topology().link_at(endpoint) {
            Some((_, link)) => Ok(&link.endpoints),
            None => Err(self.no_link_at(endpoint)),
        }
    }

    pub(super) fn no_link_at(&self, endpoint: &Endpoint) -> LabError {
        self.unknown(format!("link that ends at {endpoint}"))
    }

    fn ends_of(&self, node: &str) -> Result<Vec<Endpoint>, LabError> {
        if !self.topology().nodes.contains_key(node) {
            return Err(self.unknown(format!("node {node}")));
        }
        Ok(self.topology().endpoints_of(node).map(|(_, end)| end.clone()).collect())
    }

    fn unknown(&self, what: String) -> LabError {
        LabError::Unknown { lab: self.name().to_owned(), what }
    }
}
