//! Whether two directories of a volume hold the same, for whoever wants to see it: what names lead to
//! which files, and all of each file but the time when it was last read. It reads the disks and asks
//! no agent, so it holds for a moment when nothing is written.

use super::Ino;
use super::disk::{Disk, Shape};
use super::record::Node;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

/// A file by a name, with a digest of its bytes.
pub(super) type Seen = (Node, u64);

/// All names in a directory, with the files that they lead to.
pub(super) type Listing = BTreeMap<PathBuf, Seen>;

/// All names in a volume's directory.
fn look(root: &Path) -> io::Result<Listing> {
    let disk = Disk::new(root);
    let mut all = Listing::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(inside) = todo.pop() {
        let path = Path::new("tree").join(&inside);
        let failed = |e: io::Error| {
            io::Error::new(e.kind(), format!("reading {}: {e}", disk.at(&path).display()))
        };
        // A file that was put there by hand has no number yet.
        let ino = disk.number(&path).map_err(failed)?.unwrap_or(Ino(0));
        let mut node = disk.node(&path, ino).map_err(failed)?;
        node.attributes.atime = (0, 0);
        let digest = contents(&disk, &path, &inside, &node, &mut todo).map_err(failed)?;
        all.insert(inside, (node, digest));
    }
    Ok(all)
}

/// A digest of what is in a file; the names in a directory are to be looked at next.
pub(super) fn contents(
    disk: &Disk,
    path: &Path,
    inside: &Path,
    node: &Node,
    todo: &mut Vec<PathBuf>,
) -> io::Result<u64> {
    match node.shape {
        Shape::File => return disk.open(path, false).and_then(digest_of),
        Shape::Directory => {
            for entry in std::fs::read_dir(disk.at(path))? {
                todo.push(inside.join(entry?.file_name()));
            }
        }
        _ => {}
    }
    Ok(0)
}

fn digest_of(mut file: std::fs::File) -> io::Result<u64> {
    let mut sum = Xxh3::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(sum.digest()),
            Ok(n) => sum.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Files and a digest over all that the directory of a volume holds.
pub fn digest(root: &Path) -> io::Result<(usize, u64)> {
    let all = look(root)?;
    let mut sum = Xxh3::new();
    for (name, seen) in &all {
        // As bytes: not all names are UTF-8.
        let bytes = postcard::to_stdvec(&(name.as_os_str(), seen)).map_err(io::Error::other)?;
        sum.update(&bytes);
    }
    Ok((all.len(), sum.digest()))
}

/// The first difference between the directories of a volume, in words; none if they hold the same.
pub fn difference(one: &Path, other: &Path) -> io::Result<Option<String>> {
    let (ours, theirs) = (look(one)?, look(other)?);
    let (one, other) = (one.display().to_string(), other.display().to_string());
    Ok(first_difference((&ours, &one), (&theirs, &other)))
}

/// The first difference between what is in two places.
pub(super) fn first_difference(
    (ours, one): (&Listing, &str),
    (theirs, other): (&Listing, &str),
) -> Option<String> {
    for (name, seen) in ours {
        let Some(there) = theirs.get(name) else {
            return Some(format!("{} is only in {one}", shown(name)));
        };
        if let Some(what) = apart(seen, there) {
            return Some(format!("{}: {what}", shown(name)));
        }
    }
    let more = theirs.keys().find(|name| !ours.contains_key(*name));
    more.map(|name| format!("{} is only in {other}", shown(name)))
}

/// A name in a volume as people write it.
fn shown(name: &Path) -> String {
    Path::new("/").join(name).display().to_string()
}

fn apart((a, digest_a): &Seen, (b, digest_b): &Seen) -> Option<String> {
    let (x, y) = (&a.attributes, &b.attributes);
    let differs = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        Some(format!("{what} {a:?} and {b:?}"))
    };
    match () {
        () if a.shape != b.shape => differs("kind", &a.shape, &b.shape),
        () if x.size != y.size => differs("size", &x.size, &y.size),
        () if digest_a != digest_b => Some("other contents".into()),
        () if x.mode != y.mode => Some(format!("mode {:o} and {:o}", x.mode, y.mode)),
        () if (x.uid, x.gid) != (y.uid, y.gid) => {
            differs("owner", &(x.uid, x.gid), &(y.uid, y.gid))
        }
        () if x.mtime != y.mtime => differs("time of change", &x.mtime, &y.mtime),
        () if a.xattrs != b.xattrs => Some("other extended attributes".into()),
        () if a.ino != b.ino => differs("it is file", &a.ino.0, &b.ino.0),
        () => None,
    }
}
