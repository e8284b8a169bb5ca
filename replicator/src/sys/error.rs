//! One error for all kernel calls: which call, on what, and the kernel's answer.

use std::io;

/// A kernel call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} on {object}: {source}{}", hint(call, source))]
pub struct SysError {
    /// The call or request, as its manual page names it.
    pub call: &'static str,
    /// What it was applied to: "pid 4211", "fd 7 of pid 4211", a path.
    pub object: String,
    /// The kernel's answer.
    pub source: io::Error,
}

/// Result of a kernel call.
pub type SysResult<T> = Result<T, SysError>;

impl SysError {
    /// The error in `errno`, of this thread's last call.
    pub fn last(call: &'static str, object: impl Into<String>) -> Self {
        Self { call, object: object.into(), source: io::Error::last_os_error() }
    }

    /// An error with the given number.
    pub fn errno(call: &'static str, object: impl Into<String>, errno: i32) -> Self {
        Self { call, object: object.into(), source: io::Error::from_raw_os_error(errno) }
    }

    /// The error number, 0 if it is none of the kernel's.
    pub fn code(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }

    /// Whether the process or thread is no more.
    pub fn is_gone(&self) -> bool {
        self.code() == libc::ESRCH
    }
}

fn hint(call: &str, source: &io::Error) -> &'static str {
    match (call, source.raw_os_error()) {
        (c, Some(libc::EPERM)) if c.starts_with("PTRACE") || c == "process_vm_readv" => {
            " (needs CAP_SYS_PTRACE; see `nilicon doctor`)"
        }
        (c, Some(libc::EPERM)) if c.starts_with("TCP_REPAIR") => {
            " (needs CAP_NET_ADMIN in the namespace's owner)"
        }
        (_, Some(libc::EPERM | libc::EACCES)) => " (needs root; see `nilicon doctor`)",
        _ => "",
    }
}

/// Turns the -1 of a call into the error in `errno`.
pub(crate) fn check(r: i64, call: &'static str, object: impl FnOnce() -> String) -> SysResult<i64> {
    if r < 0 { Err(SysError::last(call, object())) } else { Ok(r) }
}
