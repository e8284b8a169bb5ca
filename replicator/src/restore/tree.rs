//! The names in a container's own tmpfs, put right at the failover. Until then its files are
//! kept under any name, for a file that has lost its last name cannot be given one again.

use super::error::sys;
use super::shared::{Held, give_path};
use crate::image::tree::{EntryKind, TmpfsEntry};
use crate::sys::{SysError, SysResult};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, mkfifo, unlinkat};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// Makes the names of the spare's tmpfs those of the checkpoint. `init` is the container's.
pub(super) fn rename_all(init: i32, held: &Held, entries: &[TmpfsEntry]) -> SysResult<()> {
    for entry in entries {
        let path = outside(init, &entry.path);
        let there = fs::symlink_metadata(&path).ok();
        match &entry.kind {
            EntryKind::Directory => {
                if !there.is_some_and(|m| m.is_dir()) {
                    let made = fs::create_dir_all(&path);
                    made.map_err(|source| failed("mkdir", entry, source))?;
                }
            }
            EntryKind::File(id) => {
                let (inode, link) = held.link(*id)?;
                if there.as_ref().is_some_and(|m| m.ino() == inode) {
                    continue;
                }
                if there.is_some() {
                    fs::remove_file(&path).map_err(|source| failed("unlink", entry, source))?;
                }
                let follow = AtFlags::AT_SYMLINK_FOLLOW;
                let done = linkat(AT_FDCWD, link.as_str(), AT_FDCWD, path.as_str(), follow);
                sys(done, "linkat", || entry.path.clone())?;
            }
            EntryKind::Symlink(target) => {
                let _ = fs::remove_file(&path);
                std::os::unix::fs::symlink(target, &path)
                    .map_err(|source| failed("symlink", entry, source))?;
            }
            EntryKind::Fifo => {
                sys(mkfifo(path.as_str(), Mode::empty()), "mkfifo", || entry.path.clone())?;
            }
        }
    }
    for entry in entries.iter().filter(|e| !matches!(e.kind, EntryKind::Symlink(_))) {
        give_path(&outside(init, &entry.path), &entry.attributes)
            .map_err(|source| failed("chown, chmod", entry, source))?;
    }
    Ok(())
}

/// Takes away what the checkpoint does not have: names in these tmpfs mounts of the spare.
pub(super) fn remove_others(init: i32, points: &[String], entries: &[TmpfsEntry]) -> SysResult<()> {
    let wanted: BTreeSet<&str> = entries.iter().map(|e| e.path.as_str()).collect();
    for point in points {
        // Without a tmpfs of its own, it shows ours, which stays as it is.
        let device = |path: &str| fs::metadata(path).ok().map(|m| m.dev());
        if device(&outside(init, point)) == device(point) {
            continue;
        }
        let mut todo = vec![point.clone()];
        let mut directories = Vec::new();
        while let Some(inside) = todo.pop() {
            let Ok(all) = fs::read_dir(outside(init, &inside)) else { continue };
            for entry in all.flatten() {
                let path = format!("{inside}/{}", entry.file_name().to_string_lossy());
                let is_directory = entry.file_type().is_ok_and(|t| t.is_dir());
                if is_directory {
                    todo.push(path.clone());
                }
                if !wanted.contains(path.as_str()) {
                    directories.push((path, is_directory));
                }
            }
        }
        for (path, is_directory) in directories.into_iter().rev() {
            let flag =
                if is_directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
            sys(unlinkat(AT_FDCWD, outside(init, &path).as_str(), flag), "unlinkat", || {
                path.clone()
            })?;
        }
    }
    Ok(())
}

pub(super) fn outside(init: i32, path: &str) -> String {
    format!("/proc/{init}/root{path}")
}

fn failed(call: &'static str, entry: &TmpfsEntry, source: std::io::Error) -> SysError {
    SysError { call, object: entry.path.clone(), source }
}
