//! In which namespaces a process is, see namespaces(7).

use super::CaptureError;
use crate::image::info::{Namespace, NamespaceKind};
use std::fs;

/// Inode of one namespace of a process.
fn inode(pid: &str, kind: NamespaceKind) -> Result<u64, CaptureError> {
    let path = format!("/proc/{pid}/ns/{}", kind.name());
    let link = fs::read_link(&path).map_err(|e| CaptureError::proc(&path, e))?;
    let link = link.to_string_lossy();
    link.split_once('[')
        .and_then(|(_, rest)| rest.strip_suffix(']')?.parse().ok())
        .ok_or_else(|| CaptureError::proc(&path, std::io::ErrorKind::InvalidData.into()))
}

/// The namespaces of a process, compared with those of the caller.
pub fn namespaces_of(pid: i32) -> Result<Vec<Namespace>, CaptureError> {
    let mut all = Vec::new();
    for kind in NamespaceKind::ALL {
        let theirs = inode(&pid.to_string(), kind)?;
        all.push(Namespace { kind, own: theirs != inode("thread-self", kind)?, inode: theirs });
    }
    Ok(all)
}

/// Refuses a process that has gone into another namespace than the root of its tree.
pub(super) fn check_same(root: i32, pid: i32) -> Result<(), CaptureError> {
    for kind in NamespaceKind::ALL {
        if pid != root && inode(&pid.to_string(), kind)? != inode(&root.to_string(), kind)? {
            return Err(CaptureError::unsupported(
                format!("pid {pid}"),
                format!(
                    "its {} namespace is not that of the tree's root {root}; run it without one of \
                     its own (no unshare, no sandbox of its own)",
                    kind.name()
                ),
            ));
        }
    }
    Ok(())
}
