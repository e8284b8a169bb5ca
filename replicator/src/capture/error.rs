//! Why a checkpoint could not be taken.

use crate::sys::SysError;

/// Why a checkpoint could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel refused a call.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A file of /proc could not be read.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The container holds something that is not protected. Protection must not start, or must
    /// end, with this reason.
    #[error("{object}: {reason}")]
    Unsupported {
        /// Where it was found.
        object: String,
        /// What it is, and what to do about it.
        reason: String,
    },
    /// Something is changing just now; the stop was taken back and can be tried again soon.
    #[error("not now: {0}")]
    Transient(&'static str),
    /// The container's processes have ended.
    #[error("the container has ended")]
    Ended,
}

impl CaptureError {
    pub(super) fn proc(path: &str, source: std::io::Error) -> Self {
        CaptureError::Proc { path: path.to_owned(), source }
    }

    pub(super) fn unsupported(object: String, reason: String) -> Self {
        CaptureError::Unsupported { object, reason }
    }

    /// Whether a process or thread went away while it was looked at.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            CaptureError::Sys(e) => e.is_gone(),
            CaptureError::Proc { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
            }
            _ => false,
        }
    }
}
