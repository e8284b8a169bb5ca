//! Limits of a process's resources, prlimit(2).

use super::error::check;
use super::{SysError, SysResult};
use std::io;

/// Sets how much memory of its own (RLIMIT_DATA) a process gets, in bytes; `None`: as much as it may
/// choose itself. Only the soft limit changes, which may be lifted again without any right.
///
/// # Errors
/// There is no such process, or it belongs to somebody else.
pub fn set_data(pid: i32, bytes: Option<u64>) -> SysResult<()> {
    let what = || format!("RLIMIT_DATA of pid {pid}");
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one struct rlimit64.
    let r = unsafe { libc::prlimit64(pid, libc::RLIMIT_DATA, std::ptr::null(), &mut limit) };
    check(r.into(), "prlimit", what)?;
    limit.rlim_cur = bytes.map_or(limit.rlim_max, |bytes| bytes.min(limit.rlim_max));
    // SAFETY: the kernel reads one struct rlimit64.
    let r = unsafe { libc::prlimit64(pid, libc::RLIMIT_DATA, &limit, std::ptr::null_mut()) };
    check(r.into(), "prlimit", what).map(drop)
}

/// How much memory of its own a process has, in bytes, as RLIMIT_DATA counts it.
///
/// # Errors
/// There is no such process.
pub fn data_of(pid: i32) -> SysResult<u64> {
    let failed = |source| SysError { call: "read", object: format!("/proc/{pid}/status"), source };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(failed)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.map(|kb| kb << 10).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_gets_no_more_and_then_more_again() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pid = child.id() as i32;
        let soft = || {
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
            let line = limits.lines().find(|l| l.starts_with("Max data size")).expect("data");
            line.split_whitespace().nth(3).expect("soft").to_owned()
        };
        let before = soft();
        // A program that has just begun may have none yet.
        assert!(data_of(std::process::id() as i32).expect("its size") > 0);
        data_of(pid).expect("its size");
        set_data(pid, Some(4 << 20)).expect("less");
        assert_eq!(soft(), (4 << 20).to_string());
        set_data(pid, None).expect("more");
        assert_eq!(soft(), before);
        child.kill().expect("ended");
        child.wait().expect("ended");
        assert!(set_data(pid, None).is_err() && data_of(pid).is_err());
    }
}
