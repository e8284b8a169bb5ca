//! Where a container keeps its files, if somebody has said so. What it has open for writing elsewhere
//! stays behind at a failover, so it is refused by name (CP-3).
//!
//! Invariant: nothing is refused that a checkpoint carries: files in these places, in a tmpfs of the
//! container's own, without a name, or mapped shared and writable; nor devices, pipes and sockets.

use super::fdinfo::Info;
use super::objects::{Class, Key, Objects};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The places, and what is mounted in the container, into which one that is its root does not reach; by
/// default everywhere.
#[derive(Debug, Default)]
pub(super) struct Homes(Option<(Vec<PathBuf>, Vec<PathBuf>)>);

impl Homes {
    /// Only in these directories, and these files. What is mounted in the root is not of it.
    pub(super) fn only(places: Vec<PathBuf>, mounts: Vec<PathBuf>) -> Self {
        Self(Some((places, mounts)))
    }

    /// Why a file may not be open like this; none: it may. `fd` is its entry in /proc.
    pub(super) fn refuse(
        &self,
        link: &str,
        mode: u32,
        info: &Info,
        objects: &Objects,
        fd: impl FnOnce() -> String,
    ) -> Option<String> {
        let (places, mounts) = self.0.as_ref()?;
        if !is_written(mode, info.flags) || is_in(places, mounts, link) {
            return None;
        }
        // One that cannot be looked at is gone by now.
        let device = fs::metadata(fd()).ok()?.dev();
        let device = nix::sys::stat::major(device) << 32 | nix::sys::stat::minor(device);
        let is_object = [Class::File, Class::Tmpfs]
            .iter()
            .any(|&class| objects.knows(Key { class, device, inode: info.inode }));
        let why = format!(
            "the file {link}, open for writing and in no volume; name a volume that holds it \
             (`replicated`; or `shared`, if both hosts see the same storage there)"
        );
        (!is_object).then_some(why)
    }
}

fn is_written(mode: u32, flags: i32) -> bool {
    mode & libc::S_IFMT == libc::S_IFREG
        && flags & libc::O_PATH == 0
        && flags & libc::O_ACCMODE != libc::O_RDONLY
}

fn is_in(places: &[PathBuf], mounts: &[PathBuf], link: &str) -> bool {
    let root = Path::new("/");
    let is_around =
        |place: &&PathBuf| place.as_path() != root && Path::new(link).starts_with(place);
    places.iter().any(|place| is_around(&place))
        || places.iter().any(|place| place == root) && !mounts.iter().any(|mount| is_around(&mount))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_that_are_written_to_count() {
        assert!(is_written(libc::S_IFREG | 0o644, libc::O_RDWR | libc::O_APPEND));
        assert!(is_written(libc::S_IFREG, libc::O_WRONLY));
        assert!(!is_written(libc::S_IFREG, libc::O_RDONLY));
        assert!(!is_written(libc::S_IFREG, libc::O_PATH | libc::O_RDWR));
        assert!(!is_written(libc::S_IFCHR, libc::O_RDWR), "/dev/null");
        assert!(!is_written(libc::S_IFIFO, libc::O_RDWR));
    }

    #[test]
    fn places_are_directories_and_files() {
        let places = ["/srv/data", "/run/x.console"].map(PathBuf::from);
        let mounts = ["/", "/run", "/srv/data", "/srv/data/inner"].map(PathBuf::from);
        let is_in = |places: &[PathBuf], link| is_in(places, &mounts, link);
        assert!(is_in(&places, "/srv/data/a/b"));
        assert!(is_in(&places, "/srv/data/inner/b"), "who names a place answers for what is in it");
        assert!(is_in(&places, "/run/x.console"));
        assert!(!is_in(&places, "/srv/database"));
        assert!(!is_in(&places, "/run/x.console2"));
        let root = ["/", "/run/x.console"].map(PathBuf::from);
        assert!(is_in(&root, "/etc/passwd"));
        assert!(is_in(&root, "/run/x.console"));
        assert!(!is_in(&root, "/run/y"), "another file system is mounted there");
    }
}
