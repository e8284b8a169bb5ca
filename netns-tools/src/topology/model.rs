//! What a topology file can say, field by field. These comments are also the descriptions in the
//! JSON schema, so they are written for the person who writes the file.
//!
//! The types hold plain values; where a value stands in the file is kept apart (`spans`), so that
//! users of the model never see it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::names::{Cidr, Endpoint, Mac, Target};
use super::units::{BitRate, Period, Ratio, Size, SizeRange};
use super::volumes::Volume;

/// A lab: machines and switches, the links between them, the containers that run there, who
/// protects them, the load, and the faults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Topology {
    /// The lab's name: lower-case letters, digits and dashes, at most 20.
    pub name: String,
    /// The nodes by name (lower-case letters, digits and dashes, at most 20).
    pub nodes: BTreeMap<String, Node>,
    /// The cables.
    #[serde(default)]
    pub links: Vec<Link>,
    /// The containers by name (lower-case letters, digits and dashes, at most 20).
    #[serde(default)]
    pub containers: BTreeMap<String, Container>,
    /// Which containers survive the loss of their host, and where.
    #[serde(default)]
    pub protect: Vec<Protect>,
    /// The load.
    #[serde(default)]
    pub clients: Vec<Client>,
    /// The faults, at times counted from the start of the load.
    #[serde(default)]
    pub events: Vec<Event>,
    /// The machine that decides who may act alone, for the containers that ask it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<Witness>,
    /// How long a run of the lab lasts; without it, until the last client is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Period>,
}

/// A machine or a switch; each is a network namespace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Node {
    /// What the node is.
    pub kind: NodeKind,
    /// Where the agent of a host serves its metrics as Prometheus text, inside the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NodeKind {
    /// A machine that runs an agent and containers.
    Host,
    /// A machine that load comes from.
    Client,
    /// A switch that joins all links that end at it.
    Bridge,
}

/// A cable between two nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Link {
    /// Its two ends, as `node:interface`.
    pub endpoints: Vec<Endpoint>,
    /// The address of an end, by the name of its node. An end without one gets none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub addresses: BTreeMap<String, Cidr>,
    /// The largest packet in bytes, without its Ethernet header.
    #[serde(default = "defaults::mtu")]
    pub mtu: u32,
    /// What the link does to frames. The link then goes through user space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub impair: Option<Impair>,
}

/// What an impaired link does to the frames of each direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Impair {
    /// Time that every frame takes.
    pub delay: Period,
    /// A frame's delay differs from `delay` by at most this much, evenly spread. It never makes
    /// one frame overtake another; `reorder` does.
    pub jitter: Period,
    /// Part of the frames that is lost.
    pub loss: Ratio,
    /// Part of the frames that arrives twice.
    pub duplicate: Ratio,
    /// Part of the frames that skips the delay, and so overtakes others.
    pub reorder: Ratio,
    /// Part of the frames that arrives with one bit changed.
    pub corrupt: Ratio,
    /// Speed of the link; without it, as fast as it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<BitRate>,
    /// Frames that may be under way in one direction; those beyond are dropped.
    pub queue: usize,
    /// The same seed gives the same fate to the same sequence of frames.
    pub seed: u64,
}

impl Default for Impair {
    fn default() -> Self {
        Self {
            delay: Period::default(),
            jitter: Period::default(),
            loss: Ratio::default(),
            duplicate: Ratio::default(),
            reorder: Ratio::default(),
            corrupt: Ratio::default(),
            rate: None,
            queue: 10_000,
            seed: 1,
        }
    }
}

/// A container: one program with its own network address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Container {
    /// The program and its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// The built-in key-value server (it speaks the Redis protocol). Beside a `command` it stands
    /// in where that program is not installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedded: Option<Embedded>,
    /// The host it starts on. A protected container starts on its primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its address. It keeps it when it moves.
    pub address: Cidr,
    /// Its MAC address; by default derived from the names of the lab and the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Where its default route leads; by default it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The interface of its hosts that leads to its clients.
    pub uplink: String,
    /// When it counts as started; by default at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
    /// Environment variables of the program.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// The program's working directory; if it is relative, from the directory of the topology file.
    #[serde(default = "defaults::workdir")]
    pub workdir: String,
    /// More addresses of it, of either family; it keeps them as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Cidr>,
    /// What joins it to the network.
    #[serde(default, skip_serializing_if = "Device::is_gateway")]
    pub device: Device,
    /// Directories whose files go with it, or are seen by both of its hosts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Where its hosts keep the files of its replicated volumes: each in
    /// `DIRECTORY/LAB/HOST/CONTAINER`.
    #[serde(default = "defaults::volume_directory")]
    pub volume_directory: String,
}

/// What joins a container to the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A TAP with the gateway behind it, which can hold its output.
    #[default]
    Gateway,
    /// A plain veth in a bridge, without any part of ours in between: what the others are
    /// compared with. Cannot be protected.
    Veth,
}

impl Device {
    /// Whether it is the default.
    fn is_gateway(&self) -> bool {
        *self == Self::Gateway
    }
}

impl Container {
    /// All its addresses, the first one first.
    pub fn addresses(&self) -> impl Iterator<Item = Cidr> {
        std::iter::once(self.address).chain(self.also.iter().copied())
    }
}

/// What a container runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Workload<'a> {
    /// An installed program: its name and its arguments.
    Command(&'a str, &'a [String]),
    /// The built-in server.
    Embedded(&'a Embedded),
}

/// The built-in key-value server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Embedded {
    /// Worker threads.
    pub threads: usize,
    /// The TCP port it listens on.
    pub port: u16,
}

impl Default for Embedded {
    fn default() -> Self {
        Self { threads: 1, port: 6379 }
    }
}

/// When a container counts as started, so that its protection may begin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Ready {
    /// As soon as this TCP port accepts a connection.
    pub tcp: u16,
    /// How long to wait for that before giving up.
    #[serde(default = "defaults::ready_timeout")]
    pub timeout: Period,
}

/// The protection of one container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Protect {
    /// The container.
    pub container: String,
    /// The host it runs on.
    pub primary: String,
    /// The host it goes on at when the primary is lost.
    pub backup: String,
    /// The interface of both hosts that checkpoints travel over; by default the link that joins
    /// the two hosts directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
    /// The UDP port of the backup that checkpoints are sent to.
    #[serde(default = "defaults::port")]
    pub port: u16,
    /// The UDP port on which each host expects the other's pulses, for firewalls; by default any
    /// that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulse_port: Option<u16>,
    /// How often a checkpoint is taken.
    #[serde(default)]
    pub epoch: Epochs,
    /// When the other side counts as lost.
    #[serde(default)]
    pub detector: Detector,
    /// Who decides which side may act alone when the two have lost each other.
    #[serde(default)]
    pub arbiter: ArbiterKind,
    /// What the primary does when its backup is lost, or too slow.
    #[serde(default)]
    pub on_backup_loss: OnBackupLoss,
    /// What happens when the container comes to hold something that cannot be protected.
    #[serde(default)]
    pub on_unprotectable: OnUnprotectable,
    /// What happens when the container's first process is killed (SIGKILL). One that ends in any
    /// other way has ended.
    #[serde(default)]
    pub on_container_loss: OnContainerLoss,
}

/// Who decides which side may act alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ArbiterKind {
    /// Nobody: the backup may take over, the primary may never go on without its backup.
    #[default]
    None,
    /// The topology's witness.
    Witness,
    /// The operator, with `nilicon allow`.
    Manual,
    /// An etcd, by the addresses of its members, such as `http://10.79.0.3:2379`. Needs a `nilicon`
    /// that was built with the feature `etcd`.
    Etcd(Vec<String>),
}

/// What a primary does without its backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnBackupLoss {
    /// Its output waits for a backup.
    #[default]
    Freeze,
    /// It goes on unprotected, once the arbiter agrees. Needs an arbiter.
    Degrade,
    /// The container ends.
    Stop,
}

/// What happens to a container that holds something that cannot be protected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnUnprotectable {
    /// Its protection ends, with the backup's consent, and it goes on.
    #[default]
    Unprotected,
    /// No output leaves until the thing is gone.
    Freeze,
    /// The container ends.
    Stop,
}

/// What happens to a container whose first process is killed (SIGKILL).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnContainerLoss {
    /// It has ended.
    #[default]
    Stop,
    /// It goes on at its backup from the last checkpoint, once the arbiter agrees.
    Failover,
    /// It goes on at its backup, and comes back to this host as soon as that has a whole copy
    /// again.
    Restart,
}

/// A small third machine that both hosts can reach, and that remembers who may act alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Witness {
    /// The node it runs in: a host without containers, with an address.
    pub node: String,
    /// The UDP port it listens on.
    #[serde(default = "defaults::witness_port")]
    pub port: u16,
}

/// How often a checkpoint is taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Epochs {
    /// The shortest epoch: output that waits ends an epoch, but not sooner than this.
    pub min: Period,
    /// The longest epoch, while there is anything to save.
    pub max: Period,
    /// The part of the container's time that stops may cost while it is busy; 0 for no limit.
    pub stop_share: Ratio,
    /// How long output must have been quiet before it ends an epoch.
    pub gather: Period,
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            min: Period(Duration::from_micros(500)),
            max: Period::ms(30),
            stop_share: Ratio::tenth(),
            gather: Period(Duration::from_micros(100)),
        }
    }
}

/// When the other side counts as lost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Detector {
    /// How often each side says that it is alive; up to thirteen times more seldom while nobody waits for the
    /// container, but at least four times within `most`.
    pub heartbeat: Period,
    /// How long the primary may be silent before it counts as lost; four of the longer pauses while
    /// nobody waits for the container. The backup is given four times as long, and half a second at
    /// least.
    pub timeout: Period,
    /// The time-out grows up to this with a host that is often late: three times its longest pause of the
    /// last 10 s, five times in the first 3 s of a connection. By default four time-outs; as `timeout`, it is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub most: Option<Period>,
    /// A primary that says that it is alive, but takes no step of its work for so long, counts as
    /// lost.
    pub stall: Period,
}

impl Detector {
    /// Up to how much the time-out may grow.
    pub fn most(&self) -> Duration {
        self.most.map_or(*self.timeout * 4, |most| *most)
    }
}

impl Default for Detector {
    fn default() -> Self {
        Self {
            heartbeat: Period::ms(2),
            timeout: Period::ms(25),
            most: None,
            stall: Period::ms(3000),
        }
    }
}

/// A load: connections that send requests to a key-value service and check every answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Client {
    /// A name for reports; by default that of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The node it runs in.
    pub node: String,
    /// What it connects to, as `container:port`.
    pub target: Target,
    /// The language that the service speaks.
    #[serde(default)]
    pub protocol: ClientProtocol,
    /// Whether a part of the writes increments counters; if not, all writes set keys.
    #[serde(default = "defaults::counters")]
    pub counters: bool,
    /// Connections.
    #[serde(default = "defaults::connections")]
    pub connections: usize,
    /// Requests that each connection sends before it waits for an answer.
    #[serde(default = "defaults::pipeline")]
    pub pipeline: usize,
    /// Size of a value, or a range of sizes, in bytes.
    #[serde(default = "defaults::value_size")]
    pub value_size: SizeRange,
    /// Different keys.
    #[serde(default = "defaults::keys")]
    pub keys: u64,
    /// Data to load before the measured load starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub populate: Option<Size>,
    /// Part of the requests that reads.
    #[serde(default = "defaults::read_ratio")]
    pub read_ratio: Ratio,
    /// Requests a second, over all connections, sent whether or not answers come back. Without
    /// it, each connection sends its next request when it has its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Connections opened and closed again each second beside the others: every second one is
    /// closed at once, the rest ask for something first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub churn: Option<u64>,
    /// Connections beside the others that get, set and increment a few keys which they share, and
    /// write down what they see and when. In the end it is judged whether that history is
    /// linearizable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<usize>,
    /// How long the load lasts; by default as long as the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Period>,
}

impl Client {
    /// The name for reports.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.node)
    }
}

/// A language of key-value services.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ClientProtocol {
    /// That of Redis, version 2.
    #[default]
    Resp,
    /// The text protocol of memcached.
    Memcached,
    /// HTTP/1.1 over connections that stay: `GET`, `PUT` and `DELETE` of `/KEY`, and `POST` to
    /// increment. The answer repeats the header `X-Sequence` of its request.
    Http,
}

/// A fault at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Event {
    /// When, counted from the start of the load.
    pub at: Period,
    /// What happens.
    pub fault: Fault,
    /// The node it happens to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// For what happens to a link: one end of it. Without it, all links of `node`; `slow-link` and
    /// `lossy-link` need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<Endpoint>,
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The host loses power: its agent and its containers end, its links go down.
    KillHost,
    /// The agent of a host is killed.
    KillAgent,
    /// The agent of a host is started again.
    RestartAgent,
    /// The host has power again: its links go up, its agent is started.
    ReviveHost,
    /// The agent of a host stands still (SIGSTOP).
    PauseAgent,
    /// It goes on (SIGCONT).
    WakeAgent,
    /// The agent of a host gets no more memory than it has; when it needs some, it ends.
    FillMemory,
    /// There is memory again: an agent that ended for want of it is started.
    FreeMemory,
    /// A link carries nothing any more.
    CutLink,
    /// A link carries nothing any more that its `link` end sends; the other direction works.
    CutOut,
    /// A link carries nothing any more that its `link` end ought to receive; the other direction
    /// works.
    CutIn,
    /// A link that has an `impair` takes 20 ms for each frame, and passes 20 Mbit a second.
    SlowLink,
    /// A link that has an `impair` loses frames, copies them, changes their order and their bits.
    LossyLink,
    /// A link works again as the topology says.
    HealLink,
    /// The processes of the containers that run on a host are killed (SIGKILL), as by the kernel
    /// when memory is short.
    KillContainer,
}

mod defaults {
    use super::{Period, Ratio, SizeRange};

    pub(super) fn mtu() -> u32 {
        1500
    }
    pub(super) fn workdir() -> String {
        "/".to_owned()
    }
    pub(super) fn volume_directory() -> String {
        "/var/lib/nilicon".to_owned()
    }
    pub(super) fn ready_timeout() -> Period {
        Period::ms(10_000)
    }
    pub(super) fn port() -> u16 {
        7878
    }
    pub(super) fn witness_port() -> u16 {
        7879
    }
    pub(super) fn counters() -> bool {
        true
    }
    pub(super) fn connections() -> usize {
        50
    }
    pub(super) fn pipeline() -> usize {
        1
    }
    pub(super) fn value_size() -> SizeRange {
        SizeRange { min: 150, max: 150 }
    }
    pub(super) fn keys() -> u64 {
        100_000
    }
    pub(super) fn read_ratio() -> Ratio {
        Ratio::half()
    }
}
