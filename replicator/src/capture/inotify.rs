//! What an inotify instance watches. The kernel tells inode and handle; the path is found by the
//! handle, and remembered as long as it leads there.

use super::CaptureError;
use super::fdinfo::{Info, Watch};
use crate::image::{Kind, files};
use crate::sys::inotify::open_by_handle;
use crate::sys::sockopt::in_queue;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

/// Paths by device and inode.
pub(super) type Paths = HashMap<(u64, u64), String>;

/// The highest number of a watch: a restore comes to a number by counting.
const MOST: i32 = 1 << 18;

/// Captures an instance. `pid` is a process whose mounts count.
pub(super) fn instance(
    fd: BorrowedFd<'_>,
    pid: i32,
    info: &Info,
    what: &str,
    paths: &mut Paths,
) -> Result<Kind, CaptureError> {
    if in_queue(fd)? > 0 {
        return Err(CaptureError::Transient("an inotify instance has events queued"));
    }
    let mut watches = Vec::with_capacity(info.watches.len());
    for watch in &info.watches {
        if watch.number > MOST {
            let why = format!("watch {} of an inotify instance; the most is {MOST}", watch.number);
            return Err(CaptureError::unsupported(what.to_owned(), why));
        }
        let key = (watch.device, watch.inode);
        let leads = |path: &str| {
            let outside = format!("/proc/{pid}/root{path}");
            std::fs::symlink_metadata(outside).is_ok_and(|m| m.ino() == watch.inode)
        };
        let path = match paths.get(&key).filter(|p| leads(p)) {
            Some(known) => known.clone(),
            None => {
                let found = find(watch, pid)?.filter(|p| leads(p));
                let path = found.ok_or_else(|| {
                    let why = format!(
                        "an inotify watch of inode {}, to which no path leads",
                        watch.inode
                    );
                    CaptureError::unsupported(what.to_owned(), why)
                })?;
                paths.insert(key, path.clone());
                path
            }
        };
        watches.push(files::Watch { number: watch.number, path, mask: watch.mask });
    }
    watches.sort_by_key(|w| w.number);
    Ok(Kind::Inotify(watches))
}

/// The path of what is watched, by its handle on one of the mounts of its device.
fn find(watch: &Watch, pid: i32) -> Result<Option<String>, CaptureError> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = std::fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    let device = format!("{}:{}", watch.device >> 20, watch.device & 0xf_ffff);
    for line in text.lines() {
        let mut words = line.split(' ');
        if words.nth(2) != Some(&device) {
            continue;
        }
        let Some(point) = words.nth(1) else { continue };
        let Ok(mount) = File::open(format!("/proc/{pid}/root{point}")) else { continue };
        let (kind, handle) = &watch.handle;
        if let Ok(found) = open_by_handle(mount.as_fd(), *kind, handle)
            && let Ok(link) = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
            && let Some(text) = link.to_str()
        {
            return Ok(Some(text.to_owned()));
        }
    }
    Ok(None)
}
