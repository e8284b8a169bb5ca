//! Locks on files and who is told of events.
//!
//! A lock of a description can be set by anyone who holds it; one of a process only by the
//! process, and not before it has all its descriptors: closing any that leads to the same file
//! drops it.

use super::error::{Doing, RestoreError};
use super::objects::Place;
use super::script::Script;
use crate::image::State;
use crate::image::files::{FileLock, LockKind};
use crate::sys::{SysResult, locks};
use std::os::fd::{AsFd, OwnedFd};

/// Locks of descriptions, and owners. `made` are the descriptions, by index.
pub(super) fn of_descriptions(state: &State, made: &[OwnedFd]) -> SysResult<()> {
    for lock in &state.locks {
        let Some(fd) = made.get(lock.description as usize) else { continue };
        match lock.kind {
            LockKind::Flock => locks::flock(fd.as_fd(), lock.exclusive)?,
            LockKind::Open => {
                let range = locks::range(lock.exclusive, lock.start, lock.end);
                locks::lock_open(fd.as_fd(), &range)?;
            }
            LockKind::Process(_) | LockKind::Lease(_) => {}
        }
    }
    Ok(())
}

/// Locks of processes, once they hold their descriptors.
pub(super) fn of_processes(
    state: &State,
    script: &mut Script,
    place: &Place,
) -> Result<(), RestoreError> {
    const DOING: &str = "lock a file";
    for lock in &state.locks {
        let (LockKind::Process(pid) | LockKind::Lease(pid)) = lock.kind else { continue };
        let process = state.processes.iter().find(|p| p.pid == pid);
        let fd = process.and_then(|p| p.fds.iter().find(|f| f.description == lock.description));
        let (Some(fd), Some(host)) = (fd, place.hosts.get(&pid)) else { continue };
        call(script, fd.number as u64, lock);
        script.run_ok(*host).doing(pid, DOING)?;
    }
    Ok(())
}

/// Lets a process ask for the signals of a description: they tell the number that it is asked by.
pub(super) fn signals(
    state: &State,
    script: &mut Script,
    place: &Place,
) -> Result<(), RestoreError> {
    for (at, d) in state.descriptions.iter().enumerate() {
        if d.flags & libc::O_ASYNC == 0 {
            continue;
        }
        let holder = state.processes.iter().find_map(|p| {
            let fd = p.fds.iter().find(|f| f.description as usize == at)?;
            Some((p.pid, fd.number, place.hosts.get(&p.pid)?))
        });
        let Some((pid, number, host)) = holder else { continue };
        let flags = d.flags & (libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NONBLOCK);
        let args = [number as u64, libc::F_SETFL as u64, flags as u64];
        script.call("fcntl(F_SETFL)", libc::SYS_fcntl, &args);
        script.run_ok(*host).doing(pid, "ask for the signals of a descriptor")?;
    }
    Ok(())
}

fn call(script: &mut Script, number: u64, lock: &FileLock) {
    if let LockKind::Lease(_) = lock.kind {
        let kind = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        let args = [number, libc::F_SETLEASE as u64, kind as u64];
        script.call("fcntl(F_SETLEASE)", libc::SYS_fcntl, &args);
        return;
    }
    let at = script.data(&locks::bytes(&locks::range(lock.exclusive, lock.start, lock.end)));
    let args = [number, libc::F_SETLK as u64, at];
    script.call("fcntl(F_SETLK)", libc::SYS_fcntl, &args);
}

/// Who is told of events; after the leases, whose holders are told if nobody else is.
pub(super) fn owners(state: &State, made: &[OwnedFd], place: &Place) -> SysResult<()> {
    for owner in &state.owners {
        let Some(fd) = made.get(owner.description as usize) else { continue };
        let host = place.hosts.get(&owner.pid).copied().unwrap_or(0);
        locks::set_owner(fd.as_fd(), owner.kind, host, owner.signal)?;
    }
    Ok(())
}
