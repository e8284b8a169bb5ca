//! What an inotify instance watches. The kernel tells inode and handle; the path is found by the
//! handle, and remembered as long as it leads there. The handle of a file in an overlay has that of a layer
//! in it.

use super::CaptureError;
use super::fdinfo::{Info, Watch};
use crate::image::{Kind, files};
use crate::sys::inotify::open_by_handle;
use crate::sys::sockopt::in_queue;
use crate::volume::{Ino, UPPER, Volume};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Paths by device and inode.
pub(super) type Paths = HashMap<(u64, u64), String>;

/// The highest number of a watch: a restore comes to a number by counting.
const MOST: i32 = 1 << 18;

/// Captures an instance. `pid` is a process whose mounts count, `layer` the volume that takes what is written to its
/// root.
pub(super) fn instance(
    fd: BorrowedFd<'_>,
    pid: i32,
    info: &Info,
    what: &str,
    (paths, layer): (&mut Paths, Option<&Volume>),
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
                let found = match layer {
                    Some(layer) if watch.handle.0 == OF_OVERLAY => in_layers(watch, layer),
                    _ => find(watch, pid)?,
                };
                let found = found.filter(|p| leads(p));
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

/// OVL_FILEID_V1 of linux/exportfs.h, and FILEID_INO64_GEN, as FUSE has it.
const OF_OVERLAY: i32 = 0xf8;
const OF_FUSE: u8 = 0x81;

/// The path of what is watched in an overlay over our own root, whose upper layer is in a volume. It may be another by
/// now, if a directory of the lower layer was renamed.
fn in_layers(watch: &Watch, layer: &Volume) -> Option<String> {
    let (of_layer, kind, handle) = layered(&watch.handle.1)?;
    if of_layer == Layer::Lower {
        let root = File::open("/").ok()?;
        let found = open_by_handle(root.as_fd(), kind.into(), handle).ok()?;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()?;
        return link.to_str().map(str::to_owned);
    }
    let [a, b, ..] = handle.as_chunks::<4>().0 else { return None };
    let [high, low] = [a, b].map(|word| u64::from(u32::from_ne_bytes(*word)));
    let inside = layer.path_of(Ino(high << 32 | low)).filter(|_| kind == OF_FUSE)?;
    let path = Path::new("/").join(inside.strip_prefix(UPPER).ok()?);
    path.to_str().map(str::to_owned)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Upper,
    Lower,
}

/// The layer, and the type and the bytes of its own handle, of struct ovl_fh in the kernel's fs/overlayfs/overlayfs.h: three
/// bytes to align it, version, magic, length from there on, flags, type, UUID, handle.
fn layered(bytes: &[u8]) -> Option<(Layer, u8, &[u8])> {
    const MAGIC: u8 = 0xfb;
    const PATH_UPPER: u8 = 1 << 2;
    const UUID: usize = 16;
    let [_, _, _, 0, MAGIC, len, flags, kind, rest @ ..] = bytes else { return None };
    let len = usize::from(*len).checked_sub(5 + UUID)?;
    let handle = rest.get(UUID..)?.get(..len)?;
    Some((if flags & PATH_UPPER != 0 { Layer::Upper } else { Layer::Lower }, *kind, handle))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_of_an_overlay_have_those_of_a_layer() {
        let of = |flags: u8, kind: u8, handle: &[u8]| {
            let len = 21 + handle.len() as u8;
            let mut bytes = vec![0, 0, 0, 0, 0xfb, len, flags, kind];
            bytes.extend([7; 16]);
            bytes.extend(handle);
            bytes
        };
        let lower = of(0, 1, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(layered(&lower), Some((Layer::Lower, 1, &[1, 2, 3, 4, 5, 6, 7, 8][..])));
        let upper = of(4, 0x81, &[9; 12]);
        assert_eq!(layered(&upper), Some((Layer::Upper, 0x81, &[9; 12][..])));
        // What is behind its end does not count; what is cut short is none.
        assert_eq!(layered(&[&upper[..], &[1, 1]].concat()), layered(&upper));
        (0..upper.len()).for_each(|len| assert_eq!(layered(&upper[..len]), None, "{len} bytes"));
        assert_eq!(layered(&[0, 0, 0, 0, 0xfb, 3, 0, 1]), None);
    }
}
