//! Directories of a container whose files go with it: what a topology says of them, and the rules.
//! The comments of the types are also the descriptions in the JSON schema.
//!
//! Invariant: no two volumes of a container overlap, so that each file has one owner; and a kind or
//! an option that has no effect yet is refused by name, never taken silently.

use std::path::{Component, Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where files would hide what a container needs of the system, or of us.
const TAKEN: [&str; 5] = ["/proc", "/sys", "/dev", "/run/nilicon", "/var/lib/nilicon"];

/// A directory of a container, and what becomes of its files at a failover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Volume {
    /// The directory as the container sees it. It is made if it is not there, but for `read-only`. `/` is
    /// what a container writes anywhere, over the files of its host.
    pub path: String,
    /// What becomes of its files.
    pub kind: VolumeKind,
    /// When fsync(2) answers; only of `replicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fsync: Option<FsyncRule>,
    /// Whether what is committed outlives a loss of power of the backup as well; only of
    /// `replicated`. If one of a container's volumes is durable, all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable: Option<bool>,
    /// What is in it when the container begins (not when it goes on elsewhere); only of
    /// `replicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<VolumeStart>,
    /// A line of shell that says whether the files are whole, by its exit code; only of `replicated`.
    /// `run` and `drill` have it judge a copy of them when the lab is gone, with that copy as its
    /// working directory and the container's in WORKDIR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<String>,
}

/// What becomes of the files of a volume at a failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeKind {
    /// They are part of each checkpoint: at the backup they are those of the committed epoch.
    Replicated,
    /// A tmpfs of the container's own: its files are part of each checkpoint as memory is, and
    /// end with the container.
    Ephemeral,
    /// Both hosts see the same storage at this path. Nothing is mounted and nothing is carried:
    /// it is the user's word that it is so.
    Shared,
    /// The host's files at this path, which the container cannot change. Protection begins only if
    /// they are the same on both hosts.
    ReadOnly,
}

/// When fsync(2) in a replicated volume answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FsyncRule {
    /// At once. Whoever is told of it over the network is told when the backup has the files.
    #[default]
    Commit,
    /// When the files are on the disk of the host where the container runs as well.
    Local,
}

/// What is in a volume when its container begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeStart {
    /// What was in it when the container last ran.
    #[default]
    Kept,
    /// Nothing.
    Empty,
}

impl Volume {
    /// Whether it is what a container writes anywhere, over the files of its host.
    pub fn is_root(&self) -> bool {
        self.path == "/"
    }

    /// The name of its directory on a host: its path, with `-` for `/`. Two paths never have the
    /// same.
    pub fn directory_name(&self) -> String {
        let mut name = String::new();
        if self.is_root() {
            // No other begins with one.
            name.push('-');
        }
        for c in self.path.trim_start_matches('/').chars() {
            match c {
                '/' => name.push('-'),
                '-' => name.push_str("%2d"),
                '%' => name.push_str("%25"),
                c => name.push(c),
            }
        }
        name
    }
}

/// Something that is wrong with a volume: the key that it is about, what, and what to do.
pub(super) type Fault = (&'static str, String, Option<String>);

/// What is wrong with a volume by itself.
pub(super) fn faults(volume: &Volume) -> Vec<Fault> {
    let mut all = Vec::new();
    let path = &volume.path;
    if path == "/" {
        if volume.kind != VolumeKind::Replicated {
            let message = "the container's root as a whole can only be `replicated`";
            let help = "name the directories in it, each a volume of its own, such as /var/lib";
            all.push(("path", message.into(), Some(help.into())));
        }
    } else if !is_plain(path) {
        let message = format!("`{path}` is no path of a directory: absolute, without `.` or `..`");
        all.push(("path", message, None));
    } else if let Some(taken) = TAKEN.iter().find(|taken| overlap(path, taken)) {
        all.push(("path", format!("`{path}` and {taken} would hide each other"), None));
    }
    if volume.kind != VolumeKind::Replicated {
        let set = [
            ("fsync", volume.fsync.is_some()),
            ("durable", volume.durable.is_some()),
            ("start", volume.start.is_some()),
            ("check", volume.check.is_some()),
        ];
        for (key, _) in set.into_iter().filter(|(_, set)| *set) {
            let message = format!("only volumes of kind `replicated` have `{key}`");
            all.push((key, message, None));
        }
    }
    all
}

/// An absolute path in its shortest form, of more than the root.
pub(super) fn is_plain(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    let shortest: std::path::PathBuf = Path::new(path).components().collect();
    parts.next() == Some(Component::RootDir)
        && path.len() > 1
        && !path.contains('\0')
        && shortest.as_os_str() == path
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Whether two volumes would hide each other: others lie over the root.
pub(super) fn hide(one: &str, other: &str) -> bool {
    if one == "/" || other == "/" { one == other } else { overlap(one, other) }
}

/// Whether one of two directories is in the other, or both are one.
pub(super) fn overlap(one: &str, other: &str) -> bool {
    let (one, other) = (Path::new(one), Path::new(other));
    one.starts_with(other) || other.starts_with(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_have_names_of_their_own() {
        let name = |path: &str| {
            let kind = VolumeKind::Replicated;
            let volume = Volume {
                path: path.into(),
                kind,
                fsync: None,
                durable: None,
                start: None,
                check: None,
            };
            volume.directory_name()
        };
        assert_eq!(name("/var/lib/redis"), "var-lib-redis");
        assert_ne!(name("/a-b"), name("/a/b"));
        assert_ne!(name("/a%2db"), name("/a-b"));
        assert_eq!(name("/"), "-");
        assert_ne!(name("/-"), name("/"));
    }

    #[test]
    fn paths() {
        for good in ["/a", "/var/lib/redis", "/a b/c"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in ["", "/", "a", "./a", "/a/", "/a/../b", "/a//b", "/a/./b"] {
            assert!(!is_plain(bad), "{bad}");
        }
        assert!(overlap("/a", "/a/b") && overlap("/a/b", "/a") && overlap("/a", "/a"));
        assert!(!overlap("/a", "/ab"));
    }
}
