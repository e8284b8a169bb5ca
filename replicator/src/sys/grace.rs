//! Waiting for whatever processors are in the middle of (membarrier(2)).

use super::error::{SysError, SysResult, check};

/// Which commands there are, as bits (MEMBARRIER_CMD_QUERY).
const QUERY: i32 = 0;
/// MEMBARRIER_CMD_GLOBAL.
const GLOBAL: i32 = 1;

fn membarrier(command: i32) -> SysResult<i64> {
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    check(result, "membarrier", || "all processors".to_owned())
}

/// Whether [`wait_for_processors`] will work.
///
/// # Errors
/// It will not: EOPNOTSUPP on a kernel with processors without ticks (nohz_full).
pub(crate) fn is_possible() -> SysResult<()> {
    if membarrier(QUERY)? & i64::from(GLOBAL) != 0 {
        return Ok(());
    }
    Err(SysError::errno("membarrier", "all processors", libc::EOPNOTSUPP))
}

/// Waits for a grace period of the kernel's RCU: each packet that a processor was handling when this was called is
/// handled when it returns, some tens of milliseconds later. What is queued, or comes in meanwhile, is not waited for.
///
/// # Errors
/// As [`is_possible`] says, with EINVAL.
pub(crate) fn wait_for_processors() -> SysResult<()> {
    membarrier(GLOBAL).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_kernel_can_do_it() {
        super::is_possible().unwrap();
        super::wait_for_processors().unwrap();
    }
}
