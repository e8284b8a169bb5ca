//! What a descriptor number referred to at the last look: remembered as long as its inode and kind
//! of file are the same.

use super::Files;
use crate::capture::fdinfo::{self, Info};
use crate::capture::glance::Row;
use crate::capture::remembered::Remembered;
use crate::capture::{ATTRIBUTES, CaptureError, locks, or_copy, tcp};
use crate::image::EpollTarget;
use crate::image::net::RawOptions;
use crate::sys::pidfd;
use crate::sys::sockopt::get_i32;
use nix::sys::stat::{major, minor};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// What a descriptor number referred to at the last look.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) inode: u64,
    pub(super) mount: u64,
    /// The kind of file, if a glance showed it.
    pub(super) operations: u64,
    pub(super) link: String,
    /// What stood for the name in `link` when it was read, and when that was.
    name: Option<([u64; 4], Instant)>,
    pub(super) domain: i32,
    pub(super) kind: i32,
    pub(super) protocol: i32,
    /// Flags and the rest of a TCP connection, if they were read just before this stop.
    pub(super) ahead: Option<(i32, tcp::Ahead)>,
    /// Options of another socket, if they were read just before this stop.
    pub(super) options: Option<RawOptions>,
    /// What is remembered of a TCP socket.
    pub(super) known: tcp::Known,
    /// st_mode of a file that has a path.
    pub(super) mode: u32,
    /// Its file system may be read past the page cache whatever the flags of the descriptor.
    uncached: bool,
    /// Who is told of events, if that was read.
    pub(super) told: Option<Option<locks::Told>>,
    /// If a glance showed a TCP socket.
    pub(super) remembered: Option<Remembered>,
    /// For the next checkpoint: a copy of the path, and room for what an epoll instance watches, which were so many.
    path: Option<String>,
    pub(super) targets: Vec<EpollTarget>,
    pub(super) watches: usize,
}

/// When the path of a file is read anew before a stop, so that the stop need not do it.
pub(super) const SOON: Duration = ATTRIBUTES.checked_div(2).expect("not by zero");

impl Seen {
    /// Makes the memory that the next checkpoint takes along.
    pub(super) fn make_ready(&mut self) {
        if self.link.starts_with('/') && self.path.is_none() {
            self.path = Some(self.link.clone());
        }
        if self.targets.capacity() == 0 {
            self.targets.reserve(self.watches);
        }
        if let Some(remembered) = &mut self.remembered {
            remembered.make_listener_ready();
        }
    }

    /// The path, for a checkpoint.
    pub(super) fn take_path(&mut self) -> String {
        or_copy(self.path.take().unwrap_or_default(), &self.link)
    }

    /// Whether a stop would have to read the path anew.
    pub(super) fn is_old(&self, name: [u64; 4]) -> bool {
        let known = |(of, read): &(_, Instant)| *of == name && read.elapsed() < SOON;
        self.link.starts_with('/') && !self.name.as_ref().is_some_and(known)
    }

    /// Whether a glance shows the same kind of thing.
    pub(super) fn is_of(&self, row: &Row<'_>) -> bool {
        self.operations == row.operations() && self.inode == row.inode()
    }

    /// Whether what fdinfo has besides flags, offset and inode counts.
    pub(super) fn needs_fdinfo(&self) -> bool {
        self.link.starts_with("anon_inode:") || self.link.starts_with("pidfd:")
    }

    /// Whether the path is the one that was read, and that is not too long ago.
    fn is_named(&self, info: &Info, within: Duration) -> bool {
        info.name.is_some()
            && self
                .name
                .is_some_and(|(name, read)| Some(name) == info.name && read.elapsed() < within)
    }

    pub(super) fn is_tcp(&self) -> bool {
        matches!(self.domain, libc::AF_INET | libc::AF_INET6)
            && self.kind == libc::SOCK_STREAM
            && self.protocol == libc::IPPROTO_TCP
    }

    pub(super) fn is_socket(&self) -> bool {
        self.domain != 0
    }
}

impl Files {
    /// Notes whether a descriptor that there is now is read past the page cache.
    pub(super) fn note(&mut self, number: i32, inode: u64, flags: i32) {
        let direct = flags & libc::O_DIRECT != 0;
        if self.direct[0] || (!direct && self.uncached.is_empty()) {
            return;
        }
        self.direct[0] = match self.seen.get(&number).filter(|seen| seen.inode == inode) {
            // A pipe with the same flag gives packets.
            Some(seen) => seen.uncached || (direct && !seen.link.starts_with("pipe:")),
            None => direct,
        };
    }

    /// Whether a look has shown a descriptor that is read past the page cache, of late.
    pub(in crate::capture) fn have_shown_direct(&self) -> bool {
        self.direct != [false; 2]
    }

    /// The checkpoint is whole.
    pub(in crate::capture) fn finish(&mut self) {
        self.direct = [false, self.direct[0]];
    }

    /// What fdinfo says of a descriptor, or as much of it as a glance does if that is enough.
    pub(super) fn info(
        &self,
        pid: i32,
        number: i32,
        row: Option<&Row<'_>>,
    ) -> Result<Info, CaptureError> {
        let Some(row) = row else { return fdinfo::info(pid, number) };
        let (operations, mount) = (row.operations(), 0);
        let seen = self.seen.get(&number).filter(|s| s.is_of(row));
        if row.may_be_locked() || seen.is_none_or(Seen::needs_fdinfo) {
            return Ok(Info { mount, operations, ..fdinfo::info(pid, number)? });
        }
        let (pos, flags, inode) = (row.position(), row.flags(), row.inode());
        let (name, empty_pipe) = (Some(row.name()), row.as_empty_pipe());
        Ok(Info { pos, flags, inode, mount, operations, name, empty_pipe, ..Info::default() })
    }

    /// What the number refers to: remembered, or looked up when its inode is another or its path was not read within
    /// this time.
    pub(super) fn look(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        info: &Info,
        within: Duration,
    ) -> Result<&mut Seen, CaptureError> {
        let same = self.seen.get(&number).is_some_and(|s| {
            s.inode == info.inode
                && s.mount == info.mount
                && s.operations == info.operations
                && (!s.link.starts_with('/') || s.is_named(info, within))
        });
        if !same {
            let path = format!("/proc/{pid}/fd/{number}");
            let name = info.name.map(|name| (name, Instant::now()));
            let link = fs::read_link(&path).map_err(|e| CaptureError::proc(&path, e))?;
            let link = link.to_string_lossy().into_owned();
            let (mut domain, mut kind, mut protocol) = (0, 0, 0);
            if link.starts_with("socket:") {
                let dup = pidfd::get_fd(handle, number)?;
                let so = |name| get_i32(dup.as_fd(), libc::SOL_SOCKET, name);
                domain = so(libc::SO_DOMAIN)?;
                kind = so(libc::SO_TYPE)?;
                protocol = so(libc::SO_PROTOCOL)?;
            }
            let (inode, mount, operations) = (info.inode, info.mount, info.operations);
            let (ahead, options) = (None, None);
            // The type of a file stays what it is, and so does who is told.
            let before = self.seen.get(&number).filter(|s| s.inode == inode && s.mount == mount);
            let (mode, uncached) = match before {
                _ if !link.starts_with('/') => (0, false),
                Some(before) if before.link == link => (before.mode, before.uncached),
                _ => {
                    let meta = fs::metadata(&path).map_err(|e| CaptureError::proc(&path, e))?;
                    let device = major(meta.dev()) << 32 | minor(meta.dev());
                    (meta.mode(), self.uncached.contains(&device))
                }
            };
            let told = before.and_then(|s| s.told);
            let known = tcp::Known::default();
            let seen = Seen {
                inode,
                mount,
                operations,
                remembered: None,
                link,
                name,
                domain,
                kind,
                protocol,
                ahead,
                options,
                known,
                mode,
                uncached,
                told,
                path: None,
                targets: Vec::new(),
                watches: 0,
            };
            self.seen.insert(number, seen);
        }
        self.seen.get_mut(&number).ok_or(CaptureError::Ended)
    }
}
