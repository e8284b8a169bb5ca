//! A lab as its agents see it: which host runs which container now.
//!
//! Each agent knows its own part; where two claim to run a container, the newer generation is
//! right (an old primary that is cut off cannot know better).

use netns_tools::lab::Lab;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{NodeKind, Topology};
use serde::Serialize;

use crate::agent::control::request;
use crate::agent::status::{AgentStatus, ContainerStatus, Phase, Request, Role};

/// What there is of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct LabView {
    /// Its name.
    pub(super) name: String,
    /// Its nodes, sorted by name.
    pub(super) nodes: Vec<NodeView>,
    /// Its containers, sorted by name.
    pub(super) containers: Vec<ContainerView>,
    #[serde(skip)]
    agents: Vec<AgentStatus>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct NodeView {
    /// Its name.
    pub(super) name: String,
    /// What it is.
    pub(super) kind: NodeKind,
    /// The name of its network namespace.
    pub(super) namespace: String,
    /// The pid of its agent, if that answers.
    pub(super) agent_pid: Option<u32>,
    /// What it is to the containers now.
    pub(super) role: Role,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct ContainerView {
    /// Its name.
    pub(super) name: String,
    /// Its address.
    pub(super) address: String,
    /// The host that runs it now.
    pub(super) primary: Option<String>,
    /// The host that keeps a copy of it now.
    pub(super) backup: Option<String>,
    /// Whether it would survive the loss of its host now.
    pub(super) protected: bool,
    /// How far it is.
    pub(super) phase: Option<Phase>,
    /// How often it has been promoted, plus one.
    pub(super) generation: u64,
    /// Newest committed epoch.
    pub(super) epoch: u64,
    /// Why it failed, ended or is not protected.
    pub(super) reason: Option<String>,
}

impl LabView {
    /// Asks all agents of a lab. One that does not answer is left out.
    pub(super) fn ask(lab: &Lab) -> Self {
        let topology = lab.topology();
        let hosts = topology.nodes_of(NodeKind::Host);
        let answers = hosts.filter_map(|host| request(lab.name(), host, &Request::Status).ok());
        Self::of(topology, answers.collect())
    }

    /// What is known without asking anybody: a host that stands still would be waited for.
    pub(super) fn unasked(lab: &Lab) -> Self {
        Self::of(lab.topology(), Vec::new())
    }

    /// Puts together what the agents say.
    pub(super) fn of(topology: &Topology, agents: Vec<AgentStatus>) -> Self {
        let containers: Vec<ContainerView> = topology
            .containers
            .iter()
            .map(|(name, container)| view_of(name, container.address.ip.to_string(), &agents))
            .collect();
        let nodes = topology.nodes.iter().map(|(name, node)| NodeView {
            name: name.clone(),
            kind: node.kind,
            namespace: Namespace::name_of(&topology.name, name),
            agent_pid: agents.iter().find(|agent| agent.host == *name).map(|agent| agent.pid),
            role: role_of(name, &containers),
        });
        Self { name: topology.name.clone(), nodes: nodes.collect(), containers, agents }
    }

    /// The container of that name.
    pub(super) fn container(&self, name: &str) -> Option<&ContainerView> {
        self.containers.iter().find(|container| container.name == name)
    }

    /// What the agent of a host says of its containers.
    pub(super) fn containers_at<'a>(
        &'a self,
        host: &'a str,
    ) -> impl Iterator<Item = &'a ContainerStatus> {
        self.agents.iter().filter(move |agent| agent.host == host).flat_map(|a| &a.containers)
    }

    /// All that the agents say of a container, with the host that says it.
    pub(super) fn parts<'a>(
        &'a self,
        container: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a ContainerStatus)> {
        parts(&self.agents, container)
    }
}

fn parts<'a>(
    agents: &'a [AgentStatus],
    container: &'a str,
) -> impl Iterator<Item = (&'a str, &'a ContainerStatus)> {
    agents.iter().flat_map(move |agent| {
        let own = agent.containers.iter().filter(move |part| part.name == container);
        own.map(|part| (agent.host.as_str(), part))
    })
}

/// Whether a primary in this phase has the container's processes.
fn runs(phase: Phase) -> bool {
    !matches!(phase, Phase::Demoted | Phase::Ended | Phase::Failed)
}

fn view_of(name: &str, address: String, agents: &[AgentStatus]) -> ContainerView {
    let primary = parts(agents, name)
        .filter(|(_, part)| part.role == Role::Primary && runs(part.phase))
        .max_by_key(|(_, part)| part.generation);
    let backup = parts(agents, name)
        .filter(|(_, part)| part.role == Role::Backup && runs(part.phase))
        .max_by_key(|(_, part)| part.generation);
    // Without anybody who runs it, somebody who once did may know why.
    let over =
        parts(agents, name).find(|(_, part)| matches!(part.phase, Phase::Ended | Phase::Failed));
    // Before it begins, the side that is to begin it knows what it waits for.
    let waits = parts(agents, name).find(|(_, part)| part.reason.is_some());
    let told = primary.or(over).or(waits).or(backup);
    let protected = primary.is_some_and(|(_, part)| part.protected);
    let lacks = over.filter(|(_, part)| part.role == Role::Backup);
    let newest = |number: fn(&ContainerStatus) -> u64| {
        let all = parts(agents, name).map(|(_, part)| number(part));
        told.map_or_else(|| all.max().unwrap_or(0), |(_, part)| number(part))
    };
    ContainerView {
        name: name.to_owned(),
        address,
        primary: primary.map(|(host, _)| host.to_owned()),
        backup: backup.map(|(host, _)| host.to_owned()),
        protected,
        phase: told.map(|(_, part)| part.phase),
        generation: newest(|part| part.generation),
        epoch: newest(|part| part.epoch),
        reason: reason_of(told, primary.filter(|_| !protected).and(lacks)),
    }
}

/// Why it is as it is; a primary that is not protected may not know what its backup lacks.
fn reason_of(
    told: Option<(&str, &ContainerStatus)>,
    lacks: Option<(&str, &ContainerStatus)>,
) -> Option<String> {
    let own = told.and_then(|(_, part)| part.reason.clone());
    let theirs = lacks.and_then(|(host, part)| Some(format!("{host}: {}", part.reason.as_ref()?)));
    match (own, theirs) {
        // It may have been told.
        (Some(own), _)
            if lacks.and_then(|l| l.1.reason.as_ref()).is_some_and(|r| own.contains(r)) =>
        {
            Some(own)
        }
        (Some(own), Some(theirs)) => Some(format!("{own}; {theirs}")),
        (own, theirs) => own.or(theirs),
    }
}

fn role_of(node: &str, containers: &[ContainerView]) -> Role {
    let is = |host: &Option<String>| host.as_deref() == Some(node);
    if containers.iter().any(|container| is(&container.primary)) {
        Role::Primary
    } else if containers.iter().any(|container| is(&container.backup)) {
        Role::Backup
    } else {
        Role::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(host: &str, role: Role, phase: Phase, generation: u64) -> AgentStatus {
        let part = ContainerStatus {
            name: "store".to_owned(),
            address: "10.77.0.10".to_owned(),
            role,
            phase,
            protected: phase == Phase::Protected,
            generation,
            epoch: 100 * generation,
            pid: None,
            reason: None,
        };
        AgentStatus { host: host.to_owned(), pid: 7, containers: vec![part], refusal: None }
    }

    fn view(agents: Vec<AgentStatus>) -> LabView {
        LabView::of(&Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap(), agents)
    }

    #[test]
    fn a_healthy_pair() {
        let view = view(vec![
            agent("alpha", Role::Primary, Phase::Protected, 1),
            agent("beta", Role::Backup, Phase::Waiting, 1),
        ]);
        let store = view.container("store").unwrap();
        assert_eq!(store.primary.as_deref(), Some("alpha"));
        assert_eq!(store.backup.as_deref(), Some("beta"));
        assert!(store.protected);
        let roles: Vec<_> = view.nodes.iter().map(|node| (node.name.as_str(), node.role)).collect();
        assert_eq!(roles[..2], [("alpha", Role::Primary), ("beta", Role::Backup)]);
    }

    #[test]
    fn the_newer_generation_is_right() {
        let view = view(vec![
            agent("alpha", Role::Primary, Phase::Severed, 1),
            agent("beta", Role::Primary, Phase::Unprotected, 2),
        ]);
        let store = view.container("store").unwrap();
        assert_eq!(store.primary.as_deref(), Some("beta"));
        assert_eq!((store.generation, store.epoch), (2, 200));
        assert_eq!(store.backup, None);
    }

    #[test]
    fn nobody_answers_or_all_have_failed() {
        let silent = view(vec![]);
        assert_eq!(silent.container("store").unwrap().primary, None);
        assert_eq!(silent.nodes[0].agent_pid, None);
        let mut failed = agent("alpha", Role::None, Phase::Failed, 1);
        failed.containers[0].reason = Some("no such program".to_owned());
        let view = view(vec![agent("beta", Role::Backup, Phase::Waiting, 1), failed]);
        let store = view.container("store").unwrap();
        assert_eq!(store.primary, None);
        assert_eq!(store.reason.as_deref(), Some("no such program"));
        assert_eq!(store.phase, Some(Phase::Failed));
    }

    #[test]
    fn what_a_backup_lacks_is_told_while_nothing_is_protected() {
        let mut alpha = agent("alpha", Role::Primary, Phase::Syncing, 1);
        alpha.containers[0].reason = Some("the backup is gone".to_owned());
        let mut beta = agent("beta", Role::Backup, Phase::Failed, 1);
        beta.containers[0].reason = Some("the disk is full".to_owned());
        let told = |alpha: &AgentStatus, beta: &AgentStatus| {
            let view = view(vec![alpha.clone(), beta.clone()]);
            view.container("store").unwrap().reason.clone()
        };
        assert_eq!(
            told(&alpha, &beta).as_deref(),
            Some("the backup is gone; beta: the disk is full")
        );
        alpha.containers[0].reason = Some("the backup is lost: the disk is full".to_owned());
        assert_eq!(told(&alpha, &beta), alpha.containers[0].reason);
        alpha.containers[0].reason = None;
        assert_eq!(told(&alpha, &beta).as_deref(), Some("beta: the disk is full"));
        alpha.containers[0].protected = true;
        assert_eq!(told(&alpha, &beta), None);
    }
}
