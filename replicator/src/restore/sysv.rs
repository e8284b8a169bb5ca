//! System V semaphores and message queues of a spare, made at the failover under their old ids.

use super::error::sys;
use crate::image::State;
use crate::image::sysv::Identity;
use crate::sys::namespace::{in_ipc_of, is_ours};
use crate::sys::{SysError, SysResult, sysv};
use std::fs::File;

/// Makes them in the ipc namespace of the spare.
pub(super) fn make_all(init: i32, state: &State) -> SysResult<()> {
    if state.semaphores.is_empty() && state.message_queues.is_empty() {
        return Ok(());
    }
    in_ipc_of(init, || {
        for set in &state.semaphores {
            let Identity { key, mode, .. } = set.identity;
            ask("sem", &set.identity)?;
            let id = sysv::make_semaphores(key, mode, &set.values)?;
            own(sysv::Kind::Semaphores, id, &set.identity)?;
        }
        for queue in &state.message_queues {
            let Identity { key, mode, .. } = queue.identity;
            ask("msg", &queue.identity)?;
            let id = sysv::make_queue(key, mode, queue.max_bytes)?;
            own(sysv::Kind::Messages, id, &queue.identity)?;
            for (kind, text) in &queue.messages {
                sysv::send_message(id, *kind, text)?;
            }
        }
        Ok(())
    })?
}

/// Makes a segment in the ipc namespace of the spare, and opens its memory. In the host's
/// namespace it may be there still: segments outlive the processes that have them attached.
pub(super) fn segment(init: i32, identity: &Identity, size: u64) -> SysResult<File> {
    let outlives = is_ours(init, "ipc")?;
    in_ipc_of(init, || {
        if outlives && sysv::has_segment(identity.id, identity.key, size) {
            return sysv::open_segment(identity.id, size, true);
        }
        ask("shm", identity)?;
        let id = sysv::make_segment(identity.key, size, identity.mode)?;
        own(sysv::Kind::Segment, id, identity)?;
        sysv::open_segment(id, size, true)
    })?
}

/// Deletes a segment: it goes when nobody has it attached any more.
pub(super) fn delete_segment(init: i32, identity: &Identity) -> SysResult<()> {
    in_ipc_of(init, || sysv::delete_segment(identity.id))?
}

/// Asks for an id, for the next object of its kind that is made in this namespace.
fn ask(kind: &str, identity: &Identity) -> SysResult<()> {
    let path = format!("/proc/sys/kernel/{kind}_next_id");
    std::fs::write(&path, identity.id.to_string()).map_err(|source| SysError {
        call: "write",
        object: path,
        source,
    })
}

fn own(kind: sysv::Kind, id: i32, identity: &Identity) -> SysResult<()> {
    let there = if id == identity.id { Ok(()) } else { Err(nix::Error::EEXIST) };
    sys(there, "ask for an id", || format!("{kind:?} {}, which became {id}", identity.id))?;
    sysv::give(kind, id, identity.uid, identity.gid, identity.mode)
}
