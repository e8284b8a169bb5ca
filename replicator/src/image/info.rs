//! What an image says of itself: when and where it was taken, and in which namespaces the tree was.

use super::object::Attributes;
use serde::{Deserialize, Serialize};

/// The head of an image, before any state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Release of nilicon that wrote it.
    pub release: String,
    /// When it was taken: milliseconds since 1970.
    pub taken_ms: u64,
    /// Kernel release there.
    pub kernel: String,
    /// Which boot of that machine: clocks start anew at each.
    pub boot: String,
    /// Host name there.
    pub host: String,
    /// The tree's root, in the pid namespace of the tree.
    pub root: i32,
    /// The same as nilicon saw it.
    pub host_pid: i32,
    /// Command line of the root, for people.
    pub command: String,
    /// Number of processes.
    pub processes: u32,
    /// In which namespaces the root was.
    pub namespaces: Vec<Namespace>,
    /// What a restore finds cut off, in words.
    pub notes: Vec<String>,
    /// The tmpfs mounts that the tree has and its host has not, outer ones first.
    pub tmpfs: Vec<TmpfsMount>,
}

/// A tmpfs of the tree's own mount namespace. What is in it is part of the state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsMount {
    /// Where it is mounted.
    pub point: String,
    /// Options of the mount, as /proc/PID/mountinfo has them (`rw,nosuid,nodev`).
    pub options: String,
    /// What mount(2) is to be told of its limits (`size=1024k`).
    pub limits: String,
    /// Mode and owner of its root directory.
    pub attributes: Attributes,
}

/// A namespace of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Which kind.
    pub kind: NamespaceKind,
    /// It was another than that of nilicon, which took the image.
    pub own: bool,
    /// Its inode, which tells namespaces of one boot apart.
    pub inode: u64,
}

/// Kinds of namespaces, see namespaces(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in namespaces(7)")]
pub enum NamespaceKind {
    Pid,
    Net,
    Mount,
    Uts,
    Ipc,
    Time,
    User,
    Cgroup,
}

impl NamespaceKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Pid,
        Self::Net,
        Self::Mount,
        Self::Uts,
        Self::Ipc,
        Self::Time,
        Self::User,
        Self::Cgroup,
    ];

    /// Its name in /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Mount => "mnt",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::Time => "time",
            Self::User => "user",
            Self::Cgroup => "cgroup",
        }
    }
}

impl Info {
    /// Whether the tree was in a namespace of its own of this kind.
    pub fn own(&self, kind: NamespaceKind) -> bool {
        self.namespaces.iter().any(|n| n.kind == kind && n.own)
    }
}
