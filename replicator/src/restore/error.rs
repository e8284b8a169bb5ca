//! Why a spare could not follow or be brought to life.

use crate::container::LaunchError;
use crate::sys::SysError;

/// Why a checkpoint could not be folded in, or a failover not be finished.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The checkpoint cannot be restored here. Nothing was changed: the spare is what it was.
    #[error("pid {pid}: {object}: {reason}; the spare was left as it was")]
    Refused {
        /// Process in the container's numbering.
        pid: i32,
        /// What in it.
        object: String,
        /// Why.
        reason: String,
    },
    /// A kernel call failed half way: the spare is neither the old checkpoint nor the new one.
    #[error("the spare is lost: cannot {doing} of pid {pid}: {source}")]
    Kernel {
        /// Process in the container's numbering.
        pid: i32,
        /// What was being done.
        doing: &'static str,
        /// Which call failed on what.
        source: SysError,
    },
    /// The checkpoint asks for something that cannot be made again.
    #[error("the spare is lost: {object} of pid {pid} cannot be made again: {reason}")]
    Impossible {
        /// Process in the container's numbering.
        pid: i32,
        /// What.
        object: String,
        /// Why.
        reason: String,
    },
    /// An earlier call failed half way; give this spare up and launch a new one.
    #[error("the spare was lost by an earlier failure; launch a new one")]
    Lost,
    /// The container for the spare could not be launched.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

impl RestoreError {
    /// Whether the spare must be given up (and a new one be launched and filled).
    pub fn spare_is_lost(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// Says which process and which step a failed kernel call belongs to.
pub(super) trait Doing<T> {
    fn doing(self, pid: i32, doing: &'static str) -> Result<T, RestoreError>;
}

impl<T> Doing<T> for Result<T, SysError> {
    fn doing(self, pid: i32, doing: &'static str) -> Result<T, RestoreError> {
        self.map_err(|source| RestoreError::Kernel { pid, doing, source })
    }
}

/// The same for the safe wrappers of nix, which know neither call nor object.
pub(super) fn sys<T>(
    result: nix::Result<T>,
    call: &'static str,
    object: impl FnOnce() -> String,
) -> Result<T, SysError> {
    result.map_err(|errno| SysError::errno(call, object(), errno as i32))
}
