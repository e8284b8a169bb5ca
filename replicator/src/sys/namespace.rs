//! The calling thread in other namespaces for a moment: setns(2).

use super::error::{SysError, SysResult};
use nix::sched::{CloneFlags, setns};
use std::fs::{self, File};

/// Runs something while the calling thread is in the ipc namespace of a process.
pub fn in_ipc_of<T>(pid: i32, f: impl FnOnce() -> T) -> SysResult<T> {
    inside(pid, "ipc", CloneFlags::CLONE_NEWIPC, f)
}

/// Runs something while the calling thread is in the network namespace of a process.
pub fn in_network_of<T>(pid: i32, f: impl FnOnce() -> T) -> SysResult<T> {
    inside(pid, "net", CloneFlags::CLONE_NEWNET, f)
}

fn inside<T>(pid: i32, name: &str, kind: CloneFlags, f: impl FnOnce() -> T) -> SysResult<T> {
    let open = |path: String| {
        File::open(&path).map_err(|source| SysError { call: "open", object: path, source })
    };
    let ours = open(format!("/proc/thread-self/ns/{name}"))?;
    let theirs = open(format!("/proc/{pid}/ns/{name}"))?;
    let enter = |ns: &File| {
        setns(ns, kind)
            .map_err(|e| SysError::errno("setns", format!("{name} namespace of {pid}"), e as i32))
    };
    enter(&theirs)?;
    let result = f();
    enter(&ours)?;
    Ok(result)
}

/// Whether a process is in the calling thread's namespace of this name (see /proc/PID/ns).
pub fn is_ours(pid: i32, name: &str) -> SysResult<bool> {
    let link = |path: String| {
        fs::read_link(&path).map_err(|source| SysError { call: "readlink", object: path, source })
    };
    Ok(link(format!("/proc/thread-self/ns/{name}"))? == link(format!("/proc/{pid}/ns/{name}"))?)
}
