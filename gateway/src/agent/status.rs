//! What an agent tells others: its status over the control socket, one record an epoch and one a
//! failover in files beside it.
//!
//! Everything lies in the lab's state directory, `/run/nilicon/LAB/`:
//!
//! | file | what |
//! |---|---|
//! | `HOST.sock` | control socket: one JSON [`Request`] a line, one JSON answer a line |
//! | `HOST.log` | the agent's log |
//! | `HOST.CONTAINER.epochs` | one [`EpochRecord`] a line, written when the epoch is committed |
//! | `HOST.CONTAINER.failover` | one [`FailoverRecord`] a line, written when the container runs again |
//! | `HOST.CONTAINER.generation` | the newest generation that the host has heard of |
//!
//! The files outlive a killed agent, which is what they are for.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where labs keep their state.
pub const STATE_ROOT: &str = "/run/nilicon";

/// State directory of a lab.
pub fn state_dir(lab: &str) -> PathBuf {
    Path::new(STATE_ROOT).join(lab)
}

/// Control socket of a host's agent.
pub fn control_socket(lab: &str, host: &str) -> PathBuf {
    state_dir(lab).join(format!("{host}.sock"))
}

/// Journal of epochs of a container on a host.
pub fn epochs_file(lab: &str, host: &str, container: &str) -> PathBuf {
    state_dir(lab).join(format!("{host}.{container}.epochs"))
}

/// Newest generation of a container that a host has heard of.
pub fn generation_file(lab: &str, host: &str, container: &str) -> PathBuf {
    state_dir(lab).join(format!("{host}.{container}.generation"))
}

/// Records of the failovers of a container to a host.
pub fn failover_file(lab: &str, host: &str, container: &str) -> PathBuf {
    state_dir(lab).join(format!("{host}.{container}.failover"))
}

/// A request on the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Answered by [`AgentStatus`].
    Status,
    /// The container moves to its backup, as soon as that has all of it. Answered by
    /// [`AgentStatus`], with a refusal if it cannot.
    Switchover {
        /// The container.
        container: String,
    },
    /// The operator lets this side act alone in its container's name. Answered by
    /// [`AgentStatus`], with a refusal if it does not ask to.
    Allow {
        /// The container.
        container: String,
    },
    /// The agent ends, its containers with it. Answered by [`AgentStatus`] before it does.
    Stop,
}

/// What a host's agent does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Name of the host.
    pub host: String,
    /// Pid of the agent.
    pub pid: u32,
    /// The containers that it has a part in.
    pub containers: Vec<ContainerStatus>,
    /// Why it does not do what was asked.
    #[serde(default)]
    pub refusal: Option<String>,
}

/// The part of a host in a container's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It runs the container.
    Primary,
    /// It holds the warm spare.
    Backup,
    /// It has had its part: the container ended here.
    None,
}

/// How far a container is, as one host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is being started.
    Starting,
    /// It runs and is not protected.
    Unprotected,
    /// The first full copy is on its way. Output is held already.
    Syncing,
    /// Every epoch is committed before its output leaves.
    Protected,
    /// It runs, but its backup is gone: no output leaves (policy `freeze`).
    Severed,
    /// Primary: it runs, and answers nobody until its backup has taken it. Backup: it waits for a
    /// primary.
    Waiting,
    /// Backup: the container is being brought to life.
    Promoting,
    /// Another host runs the container in a newer generation; here it was ended.
    Demoted,
    /// Its processes ended by themselves.
    Ended,
    /// It could not be started or kept; see the reason.
    Failed,
}

/// The status of one container on one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its name.
    pub name: String,
    /// Its address, without prefix length.
    pub address: String,
    /// What this host is to it.
    pub role: Role,
    /// How far it is.
    pub phase: Phase,
    /// Whether a loss of its host would be survived now.
    pub protected: bool,
    /// Generation that this host works in.
    pub generation: u64,
    /// Newest committed epoch.
    pub epoch: u64,
    /// Host pid of the container's init, if it runs or is kept warm here.
    pub pid: Option<i32>,
    /// Why it failed, ended or is not protected.
    pub reason: Option<String>,
}

/// One committed epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Its number.
    pub epoch: u64,
    /// Generation.
    pub generation: u64,
    /// CLOCK_MONOTONIC of the host at the stop, in microseconds.
    pub at_us: u64,
    /// Time since the stop before.
    pub interval_us: u64,
    /// Stop time: from holding input to the thaw.
    pub stop_us: u64,
    /// Its stages.
    pub stop_us_by_stage: StopStages,
    /// What of it capturing took, by kind of state.
    #[serde(default)]
    pub capture_us_by_kind: CaptureKinds,
    /// After the stop: looking at the memory of large programs that it has not looked at.
    #[serde(default)]
    pub confirm_us: u64,
    /// Pages copied in the stop.
    pub stop_pages: u64,
    /// Pages copied in all, pre-copy included.
    pub dirty_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// From the seal to the checked acknowledgement.
    pub commit_us: u64,
    /// Frames of output that it released.
    pub frames: u64,
}

/// Stages of a stop, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after replicator::capture::StopTimes")]
pub struct StopStages {
    pub hold: u64,
    pub freeze: u64,
    pub seal: u64,
    pub memory: u64,
    pub threads: u64,
    pub files: u64,
    #[serde(default)]
    pub volumes: u64,
    pub thaw: u64,
}

impl StopStages {
    /// All stages in a line, with what is to follow the first number; volumes only if they took time.
    pub fn in_words(&self, unit: &str) -> String {
        let volumes = match self.volumes {
            0 => String::new(),
            took => format!("volumes {took}, "),
        };
        format!(
            "hold {}{unit}, freeze {}, seal {}, memory {}, threads {}, files {}, {volumes}thaw {}",
            self.hold, self.freeze, self.seal, self.memory, self.threads, self.files, self.thaw
        )
    }

    /// Each stage as `figure` says, which is given the way to it.
    pub fn each(mut figure: impl FnMut(fn(&Self) -> u64) -> u64) -> Self {
        Self {
            hold: figure(|s| s.hold),
            freeze: figure(|s| s.freeze),
            seal: figure(|s| s.seal),
            memory: figure(|s| s.memory),
            threads: figure(|s| s.threads),
            files: figure(|s| s.files),
            volumes: figure(|s| s.volumes),
            thaw: figure(|s| s.thaw),
        }
    }
}

/// Capturing in a stop by kind of state, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after replicator::capture::KindTimes")]
pub struct CaptureKinds {
    pub memory: u64,
    pub objects: u64,
    pub threads: u64,
    pub timers: u64,
    pub descriptors: u64,
    pub in_flight: u64,
}

impl CaptureKinds {
    /// Each kind as `figure` says, which is given the way to it.
    pub fn each(mut figure: impl FnMut(fn(&Self) -> u64) -> u64) -> Self {
        Self {
            memory: figure(|k| k.memory),
            objects: figure(|k| k.objects),
            threads: figure(|k| k.threads),
            timers: figure(|k| k.timers),
            descriptors: figure(|k| k.descriptors),
            in_flight: figure(|k| k.in_flight),
        }
    }

    /// All kinds in a line.
    pub fn in_words(&self) -> String {
        format!(
            "memory {} us, objects {}, threads {}, timers {}, descriptors {}, in flight {}",
            self.memory, self.objects, self.threads, self.timers, self.descriptors, self.in_flight
        )
    }
}

/// One failover, by phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverRecord {
    /// Generation of the new primary.
    pub generation: u64,
    /// The epoch that the container went on from.
    pub epoch: u64,
    /// CLOCK_MONOTONIC of the host when the primary was suspected, in microseconds.
    pub suspected_at_us: u64,
    /// The same when the container's threads ran again.
    pub running_at_us: u64,
    /// The phases.
    pub phases_ms: FailoverPhases,
    /// Connections brought back.
    pub connections: u64,
    /// Peers that did not answer the probe.
    pub silent_peers: u64,
    /// Frames replayed from the input log and the backlog.
    pub replayed_frames: u64,
}

/// Phases of a failover at the backup, in milliseconds, in order. Probing overlaps preparing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverPhases {
    /// Last sign of life of the primary to suspicion.
    pub silence: f64,
    /// New generation, arbiter.
    pub fence: f64,
    /// Complete checkpoints not yet folded into the warm spare.
    pub apply: f64,
    /// Descriptors, threads, timers.
    pub prepare: f64,
    /// Asking the peers what they have received (beside `prepare`).
    pub probe: f64,
    /// TCP connections.
    pub connect: f64,
    /// Registers, credentials, signals.
    pub finish: f64,
    /// Plugging in and replaying input.
    pub plug: f64,
    /// Letting all threads run.
    pub run: f64,
    /// From suspicion to running.
    pub total: f64,
}

impl FailoverPhases {
    /// What comes one after the other from the suspicion on, with its name.
    pub(crate) fn in_order(&self) -> [(&'static str, f64); 7] {
        [
            ("fence", self.fence),
            ("apply", self.apply),
            ("prepare", self.prepare),
            ("connect", self.connect),
            ("finish", self.finish),
            ("plug", self.plug),
            ("run", self.run),
        ]
    }
}
