//! What a volume looks like: through its mount, and in the directory where a host has it.

use replicator::sys::xattr;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const ID: &str = "trusted.nilicon.id";

/// All that a checkpoint promises of one name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) ino: u64,
    pub(crate) mode: u32,
    owner: (u32, u32),
    pub(crate) links: u64,
    size: u64,
    mtime: (i64, i64),
    target: Option<PathBuf>,
    xattrs: Vec<(OsString, Vec<u8>)>,
    pub(crate) bytes: u64,
}

pub(crate) type Tree = BTreeMap<PathBuf, Entry>;

/// One file. `by_attribute`: its number is in its attribute, as on the disk.
fn entry(full: &Path, by_attribute: bool) -> io::Result<Entry> {
    let meta = fs::symlink_metadata(full)?;
    let kind = meta.file_type();
    let mut xattrs = Vec::new();
    let mut ino = meta.ino();
    for name in xattr::list(full).map_err(|e| e.source)? {
        let value = xattr::get(full, &name).map_err(|e| e.source)?;
        if name == ID {
            assert!(by_attribute, "the number is nobody's business");
            ino = u64::from_le_bytes(value.try_into().expect("eight bytes"));
        } else {
            xattrs.push((name, value));
        }
    }
    xattrs.sort();
    let bytes = if kind.is_file() { fs::read(full)? } else { Vec::new() };
    Ok(Entry {
        ino,
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        links: if kind.is_dir() { 0 } else { meta.nlink() },
        size: if kind.is_file() { meta.size() } else { 0 },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        target: if kind.is_symlink() { Some(fs::read_link(full)?) } else { None },
        xattrs,
        bytes: xxhash_rust::xxh3::xxh3_64(&bytes),
    })
}

/// Everything under `root`.
pub(crate) fn tree(root: &Path, by_attribute: bool) -> Tree {
    let mut all = Tree::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let entry = entry(&full, by_attribute).expect("it can be read");
        if entry.mode & libc::S_IFMT == libc::S_IFDIR {
            let names = fs::read_dir(&full).expect("it can be read");
            todo.extend(names.map(|e| path.join(e.expect("an entry").file_name())));
        }
        all.insert(path, entry);
    }
    all
}

/// Files without a name. They may go while they are looked at.
pub(crate) fn loose(base: &Path) -> Tree {
    let root = base.join("data/loose");
    let names = fs::read_dir(&root).expect("it can be read");
    let read = |name: OsString| match entry(&root.join(&name), true) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        // Its place there is no link.
        other => Some((name.into(), Entry { links: 0, ..other.expect("it can be read") })),
    };
    names.filter_map(|e| read(e.expect("an entry").file_name())).collect()
}

/// The two parts of a volume on the disk: files with names, and files that are only open.
pub(crate) fn on_disk(base: &Path) -> (Tree, Tree) {
    (tree(&base.join("data/tree"), true), loose(base))
}

pub(crate) fn same(what: &str, got: &Tree, expected: &Tree) {
    for (path, entry) in expected {
        assert_eq!(got.get(path), Some(entry), "{what}: {path:?}");
    }
    let more: Vec<_> = got.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{what}: {more:?} should not be there");
}
