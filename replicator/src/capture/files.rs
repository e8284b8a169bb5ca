//! Descriptors of a process and the open file descriptions behind them.
//!
//! One read of /proc/PID/fdinfo/N a descriptor ([`fdinfo`]) tells most of it. The link in
//! /proc/PID/fd is read when the inode behind a number changes. Two descriptors are one
//! description when kcmp(2) says so; it also gives an order, so that a description is found among
//! many by halving.
//!
//! Where the kernel can show all descriptors at one [`glance`](super::glance), fdinfo is read only
//! of those that it says too little of, and TCP connections with nothing new in their queues cost
//! no system call at all ([`remembered`](super::remembered)).

use super::fdinfo::{self, Info, Watched};
use super::glance::{Glance, Row};
use super::objects::{Class, Objects};
use super::refusals::Refusals;
use super::remembered::{self, Remembered};
use super::unix::{self, Empties};
use super::{
    CaptureError, Glances, farewell, inet, inotify, locks, options, pipes, tcp, terminals,
};
use crate::image::net::RawOptions;
use crate::image::{Description, EpollTarget, Fd, Kind, State};
use crate::sys::sockopt::get_i32;
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, pidfd};
use nix::sys::stat::{major, minor};
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// What a descriptor number referred to at the last look.
#[derive(Clone, Debug)]
struct Seen {
    inode: u64,
    mount: u64,
    /// The kind of file, if a glance showed it.
    operations: u64,
    link: String,
    domain: i32,
    kind: i32,
    protocol: i32,
    /// Flags and the rest of a TCP connection, if they were read just before this stop.
    ahead: Option<(i32, tcp::Ahead)>,
    /// Options of another socket, if they were read just before this stop.
    options: Option<RawOptions>,
    /// What is remembered of a TCP socket.
    known: tcp::Known,
    /// st_mode of a file that has a path.
    mode: u32,
    /// Who is told of events, if that was read.
    told: Option<Option<locks::Told>>,
    /// If a glance showed a TCP socket.
    remembered: Option<Remembered>,
}

/// Remembered between stops, one for a process.
#[derive(Debug, Default)]
pub(super) struct Files {
    seen: HashMap<i32, Seen>,
    glance: Option<Glance>,
    /// What a glance tells is compared with what there is.
    checked: bool,
}

/// Remembered between stops, one for a container.
#[derive(Debug, Default)]
pub(super) struct Memory {
    empties: Empties,
    paths: inotify::Paths,
}

/// Shared by all processes of a container while one checkpoint is taken. It holds duplicates of
/// descriptors: to be dropped before the thaw.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Host pid and number of the first descriptor of each description.
    pub(super) first: Vec<(i32, i32)>,
    /// The descriptions of each inode, in the order of kcmp(2).
    pub(super) by_inode: HashMap<u64, Vec<u32>>,
    pub(super) pipes: HashMap<pipes::Key, u32>,
    unix: unix::Sockets,
    pub(super) terminals: terminals::Terminals,
    /// Pids inside by pids outside.
    inner: HashMap<i32, i32>,
    /// Descriptors that were in flight.
    held: Vec<OwnedFd>,
    /// Duplicates of TCP sockets with bytes under way, and their inodes. They outlive the stop.
    sending: Vec<(u64, OwnedFd)>,
    /// What epoll instances watch, by the index of the instance, in the order of their targets.
    pub(super) watched: Vec<(u32, Vec<Watched>)>,
    /// The description of each file that a glance has shown.
    pub(super) by_file: HashMap<u64, u32>,
    /// What glances have shown of epoll: the instance, the file watched, and how.
    watchers: Vec<(u64, u64, EpollTarget, u64)>,
    /// Descriptors that a glance has told all of.
    pub(super) glanced: usize,
}

/// What is left of a [`Builder`] after the stop.
#[derive(Debug)]
pub(super) struct Sockets {
    /// Duplicates of TCP sockets with bytes under way, and their inodes.
    pub(super) sending: Vec<(u64, OwnedFd)>,
    by_inode: HashMap<u64, Vec<u32>>,
}

impl Sockets {
    /// Whether a descriptor with this inode was captured.
    pub(super) fn has(&self, inode: u64) -> bool {
        self.by_inode.contains_key(&inode)
    }
}

/// A process that holds a descriptor, or this one with a duplicate.
#[derive(Clone, Copy)]
struct Holder<'a> {
    pid: i32,
    handle: BorrowedFd<'a>,
    /// Whose root and working directory count.
    place: i32,
}

/// What a checkpoint knows besides the state.
pub(super) struct World<'a> {
    pub(super) diag: &'a UnixDiag,
    pub(super) objects: &'a mut Objects,
    pub(super) memory: &'a mut Memory,
}

impl World<'_> {
    fn with<'a>(&'a mut self, builder: &'a mut Builder, state: &'a mut State) -> Whole<'a> {
        let World { diag, objects, memory } = self;
        Whole { builder, state, diag, objects, memory }
    }
}

/// What a description may add to.
struct Whole<'a> {
    builder: &'a mut Builder,
    state: &'a mut State,
    diag: &'a UnixDiag,
    objects: &'a mut Objects,
    memory: &'a mut Memory,
}

/// What a glance has shown of a descriptor, if that is all there is to say.
struct Glanced {
    kind: Kind,
    watched: Vec<Watched>,
}

impl Seen {
    /// Whether a glance shows the same kind of thing.
    fn is_of(&self, row: &Row<'_>) -> bool {
        self.operations == row.operations() && self.inode == row.inode()
    }

    /// Whether what fdinfo has besides flags, offset and inode counts.
    fn needs_fdinfo(&self) -> bool {
        self.link.starts_with("anon_inode:") || self.link.starts_with("pidfd:")
    }

    fn is_tcp(&self) -> bool {
        matches!(self.domain, libc::AF_INET | libc::AF_INET6)
            && self.kind == libc::SOCK_STREAM
            && self.protocol == libc::IPPROTO_TCP
    }

    fn is_socket(&self) -> bool {
        self.domain != 0
    }
}

impl Files {
    /// For the process with this host pid.
    pub(super) fn open(pid: i32, glances: Glances) -> Self {
        let glance = if glances == Glances::Off { None } else { Glance::open(pid) };
        Self { glance, checked: glances == Glances::Checked, ..Self::default() }
    }

    /// Reads what rarely changes of sockets, while the container runs.
    pub(super) fn look_ahead(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        objects: &mut Objects,
        diag: &UnixDiag,
    ) -> Result<(), CaptureError> {
        let Some(mut glance) = self.glance.take() else {
            for number in numbers(pid)? {
                self.look_ahead_at(pid, handle, number, None, objects, diag)?;
            }
            return Ok(());
        };
        let looked = glance.look().map_err(CaptureError::from).and_then(|()| {
            glance.rows().try_for_each(|row| {
                if self.is_up_to_date(&row) {
                    return Ok(());
                }
                self.look_ahead_at(pid, handle, row.number(), Some(&row), objects, diag)
            })
        });
        self.glance = Some(glance);
        looked
    }

    /// Whether a look ahead would read nothing new.
    fn is_up_to_date(&self, row: &Row<'_>) -> bool {
        let Some(seen) = self.seen.get(&row.number()).filter(|s| s.is_of(row)) else {
            return false;
        };
        if row.may_tell() || seen.link.ends_with(" (deleted)") {
            return false;
        }
        match (row.tcp, &seen.remembered) {
            (Some(tcp), Some(remembered)) => remembered.is_of(tcp),
            (Some(_), None) => false,
            _ => !seen.is_socket(),
        }
    }

    fn look_ahead_at(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        row: Option<&Row<'_>>,
        objects: &mut Objects,
        diag: &UnixDiag,
    ) -> Result<(), CaptureError> {
        // A descriptor that is closed meanwhile is looked at in the stop, if it is there.
        let Ok(info) = self.info(pid, number, row) else { return Ok(()) };
        let Ok(seen) = self.look(pid, handle, number, &info) else { return Ok(()) };
        let is_deleted = seen.link.ends_with(" (deleted)");
        let link = seen.link.clone();
        let Ok(dup) = pidfd::get_fd(handle, number) else { return Ok(()) };
        seen.told = Some(locks::told(dup.as_fd())?);
        if !seen.is_socket() && !is_deleted {
            return Ok(());
        }
        if is_deleted {
            // Known now, its contents are copied before the stop. What is wrong with it is
            // said in the stop, if it is there still.
            let name = link.trim_end_matches(" (deleted)");
            let _ = deleted(name, dup, &info, objects, "");
            return Ok(());
        }
        let what = format!("descriptor {number} of pid {pid}");
        if let Some(tcp) = row.and_then(|r| r.tcp) {
            seen.remembered = remembered::remember(dup.as_fd(), tcp, &what, diag)?;
        } else if seen.is_tcp() {
            let ahead = tcp::ahead(dup.as_fd(), &what, Some(&mut seen.known), diag)?;
            seen.ahead = ahead.map(|ahead| (info.flags, ahead));
        } else {
            let socket = (seen.domain, seen.kind, seen.protocol);
            seen.options = Some(options::read(dup.as_fd(), socket, &what)?);
        }
        Ok(())
    }

    /// What fdinfo says of a descriptor, or as much of it as a glance does if that is enough.
    fn info(&self, pid: i32, number: i32, row: Option<&Row<'_>>) -> Result<Info, CaptureError> {
        let Some(row) = row else { return fdinfo::info(pid, number) };
        let (operations, mount) = (row.operations(), 0);
        let seen = self.seen.get(&number).filter(|s| s.is_of(row));
        if row.may_be_locked() || seen.is_none_or(Seen::needs_fdinfo) {
            return Ok(Info { mount, operations, ..fdinfo::info(pid, number)? });
        }
        let (pos, flags, inode) = (row.position(), row.flags(), row.inode());
        Ok(Info { pos, flags, inode, mount, operations, ..Info::default() })
    }

    /// In a stop: looks at all descriptors at once, if that is possible, and tells what epoll
    /// instances watch.
    pub(super) fn glance(&mut self, builder: &mut Builder) -> Result<(), CaptureError> {
        let Some(glance) = &mut self.glance else { return Ok(()) };
        glance.look()?;
        for row in glance.rows() {
            if let Some((by, fd, events, data)) = row.watcher() {
                let target = EpollTarget { fd, events, data };
                builder.watchers.push((by, row.file(), target, row.inode()));
            }
        }
        Ok(())
    }

    /// Whether no connection within the container has moved on since [`Files::glance`].
    pub(super) fn stands_still(&mut self) -> Result<bool, CaptureError> {
        Ok(self.glance.as_mut().map_or(Ok(true), Glance::stands_still)?)
    }

    /// A descriptor of which the glance of this stop says all.
    fn glanced(
        &mut self,
        handle: BorrowedFd<'_>,
        row: &Row<'_>,
        builder: &mut Builder,
    ) -> Result<Option<Glanced>, CaptureError> {
        let number = row.number();
        let Some(seen) = self.seen.get_mut(&number).filter(|s| s.is_of(row)) else {
            return Ok(None);
        };
        if row.may_be_locked() {
            return Ok(None);
        }
        let mut watched = Vec::new();
        let kind = match (row.tcp, seen.link.as_str()) {
            (Some(tcp), _) => {
                let Some(remembered) = seen.remembered.as_mut().filter(|r| r.is_of(tcp)) else {
                    return Ok(None);
                };
                let kind = remembered.take(tcp, || pidfd::get_fd(handle, number))?;
                if row.watcher().is_none() && farewell::is_sending(&kind) {
                    builder.keep(row.inode(), pidfd::get_fd(handle, number)?, &kind);
                }
                kind
            }
            (None, "anon_inode:[eventpoll]") => {
                let (instance, count) = row.as_epoll();
                let entries = builder.watchers_of(instance);
                if entries.len() != count {
                    return Ok(None);
                }
                let file =
                    |&(_, file, _, inode): &(u64, u64, EpollTarget, u64)| Watched { inode, file };
                watched = entries.iter().map(file).collect();
                Kind::Epoll(entries.iter().map(|(.., target, _)| *target).collect())
            }
            (None, "anon_inode:[eventfd]") => {
                let (count, semaphore) = row.as_eventfd();
                Kind::EventFd { count, semaphore }
            }
            _ => return Ok(None),
        };
        builder.glanced += 1;
        Ok(Some(Glanced { kind, watched }))
    }

    /// A TCP connection that was looked at just before and is still the one of this number.
    fn connection(
        &mut self,
        handle: BorrowedFd<'_>,
        number: i32,
        what: impl Fn() -> String,
        builder: &mut Builder,
        diag: &UnixDiag,
    ) -> Result<Option<(Info, Kind)>, CaptureError> {
        let Some(seen) = self.seen.get_mut(&number) else { return Ok(None) };
        let Some((before, ahead)) = seen.ahead.take() else { return Ok(None) };
        let dup = pidfd::get_fd(handle, number)?;
        let stat =
            nix::sys::stat::fstat(&dup).map_err(|e| SysError::errno("fstat", what(), e as i32))?;
        if stat.st_ino != seen.inode {
            return Ok(None);
        }
        // Whether it blocks is often changed right after it was accepted.
        let flags = nix::fcntl::fcntl(&dup, nix::fcntl::FcntlArg::F_GETFL)
            .map_err(|e| SysError::errno("F_GETFL", what(), e as i32))?;
        let flags = flags | before & libc::O_CLOEXEC;
        let kind = tcp::tcp(dup.as_fd(), &what(), Some(&ahead), diag)?;
        builder.keep(seen.inode, dup, &kind);
        Ok(Some((Info { flags, inode: seen.inode, ..Info::default() }, kind)))
    }

    /// Captures all descriptors of a process (host pid) into `state`.
    pub(super) fn capture(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        builder: &mut Builder,
        state: &mut State,
        world: World<'_>,
        refusals: &mut Refusals,
    ) -> Result<Vec<Fd>, CaptureError> {
        let holder = Holder { pid, handle, place: pid };
        let glance = self.glance.take();
        let mut whole = (builder, state, world, refusals);
        let captured = match &glance {
            Some(glance) => glance
                .rows()
                .filter_map(|row| {
                    self.capture_one(holder, row.number(), Some(&row), &mut whole).transpose()
                })
                .collect(),
            None => numbers(pid).and_then(|numbers| {
                let one = |number| self.capture_one(holder, number, None, &mut whole).transpose();
                numbers.into_iter().filter_map(one).collect()
            }),
        };
        self.glance = glance;
        let fds: Vec<Fd> = captured?;
        self.seen.retain(|n, _| fds.binary_search_by_key(n, |fd| fd.number).is_ok());
        Ok(fds)
    }

    /// Captures a descriptor; none if it was refused and the survey goes on.
    fn capture_one(
        &mut self,
        holder: Holder<'_>,
        number: i32,
        row: Option<&Row<'_>>,
        (builder, state, world, refusals): &mut (
            &mut Builder,
            &mut State,
            World<'_>,
            &mut Refusals,
        ),
    ) -> Result<Option<Fd>, CaptureError> {
        let Holder { pid, handle, .. } = holder;
        let what = || format!("descriptor {number} of pid {pid}");
        let ready = match row {
            Some(row) => self.glanced(handle, row, builder).map(|found| {
                found.map(|Glanced { kind, watched }| {
                    let (flags, inode) = (row.flags(), row.inode());
                    (Info { flags, inode, watched, ..Info::default() }, kind)
                })
            }),
            None => self.connection(handle, number, what, builder, world.diag),
        };
        let Some(ready) = refusals.admit(ready)? else { return Ok(None) };
        let (info, ready) = match ready {
            Some((info, kind)) => (info, Some(kind)),
            None => (self.info(pid, number, row)?, None),
        };
        let known = row.and_then(|row| builder.by_file.get(&row.file()).copied());
        // Only where there is another of the same inode is its place among them to be found.
        let found = match (known, row) {
            (Some(known), _) => Ok(known),
            (None, Some(_)) if !builder.by_inode.contains_key(&info.inode) => Err(0),
            _ => builder.find(pid, number, info.inode)?,
        };
        let description = match found {
            Ok(known) => known,
            Err(place) => {
                if self.checked
                    && let Some(kind) = &ready
                {
                    let mut whole = world.with(builder, state);
                    self.check(holder, number, kind, &mut whole, &what())?;
                }
                let kind = match ready {
                    Some(kind) => Ok(kind),
                    None => {
                        let mut whole = world.with(builder, state);
                        self.describe(holder, number, &info, &mut whole, &what())
                    }
                };
                let Some(kind) = refusals.admit(kind)? else { return Ok(None) };
                let at = builder.add((pid, number), place, &info, kind, state);
                if let Some(row) = row {
                    builder.by_file.insert(row.file(), at);
                }
                if !info.watched.is_empty() {
                    builder.watched.push((at, info.watched.clone()));
                }
                let told = match row {
                    Some(row) if !row.may_tell() => None,
                    _ => self.told(handle, number, info.flags)?,
                };
                if let Some(told) = told {
                    let inner = &builder.inner;
                    refusals.admit(locks::add_owner(told, at, inner, &what(), state))?;
                }
                at
            }
        };
        if !info.locks.is_empty() {
            let inside = builder.inner.get(&pid).copied().unwrap_or(0);
            locks::add(&info.locks, description, inside, &what(), state)?;
        }
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        Ok(Some(Fd { number, description, close_on_exec }))
    }

    /// Compares what a glance has told with what there is.
    fn check(
        &mut self,
        holder: Holder<'_>,
        number: i32,
        glanced: &Kind,
        whole: &mut Whole<'_>,
        what: &str,
    ) -> Result<(), CaptureError> {
        let info = fdinfo::info(holder.pid, number)?;
        let operations = self.seen.get(&number).map_or(0, |s| s.operations);
        let info = Info { mount: 0, operations, ..info };
        let there = self.describe(holder, number, &info, whole, what)?;
        // The duplicate that it may have kept.
        whole.builder.sending.retain(|(inode, _)| *inode != info.inode);
        if alike(glanced, &there) {
            return Ok(());
        }
        let why = format!("a glance shows {glanced:?}, and it is {there:?}");
        Err(CaptureError::unsupported(what.to_owned(), why))
    }

    /// Who is told of events on a descriptor: as it was just before, or as it is.
    fn told(
        &mut self,
        handle: BorrowedFd<'_>,
        number: i32,
        flags: i32,
    ) -> Result<Option<locks::Told>, CaptureError> {
        match self.seen.get(&number).and_then(|s| s.told) {
            Some(known) if flags & libc::O_ASYNC == 0 => Ok(known),
            _ => locks::told(pidfd::get_fd(handle, number)?.as_fd()),
        }
    }

    fn describe(
        &mut self,
        holder: Holder<'_>,
        number: i32,
        info: &Info,
        whole: &mut Whole<'_>,
        what: &str,
    ) -> Result<Kind, CaptureError> {
        let Holder { pid, handle, place } = holder;
        let seen = self.look(pid, handle, number, info)?;
        if seen.is_socket() {
            let dup = pidfd::get_fd(handle, number)?;
            return socket(dup, seen, info, place, whole, what);
        }
        let Whole { builder, state, objects, memory, .. } = whole;
        let refuse = |why: String| Err(CaptureError::unsupported(what.to_owned(), why));
        match seen.link.as_str() {
            "anon_inode:[eventpoll]" => Ok(Kind::Epoll(info.epoll.clone())),
            "anon_inode:[eventfd]" => {
                let (count, semaphore) = info.eventfd.unwrap_or_default();
                Ok(Kind::EventFd { count, semaphore })
            }
            "anon_inode:[timerfd]" => Ok(Kind::TimerFd(info.timer)),
            "anon_inode:[signalfd]" => Ok(Kind::SignalFd(info.signals.unwrap_or(0))),
            "anon_inode:inotify" | "anon_inode:[inotify]" => {
                let dup = pidfd::get_fd(handle, number)?;
                inotify::instance(dup.as_fd(), place, info, what, &mut memory.paths)
            }
            "anon_inode:[io_uring]" => refuse(
                "an io_uring instance: what it holds cannot be read from outside; tell the \
                 program to do without (node: UV_USE_IO_URING=0)"
                    .into(),
            ),
            link if link.starts_with("pidfd:") || link == "anon_inode:[pidfd]" => {
                pidfd_of(info, builder, what)
            }
            link if link.starts_with("pipe:") => {
                pipes::pipe(handle, number, (false, info.inode), builder, state).map(Kind::Pipe)
            }
            link if link.starts_with('/') => {
                if terminals::may_be(link) && info.flags & libc::O_PATH == 0 {
                    let dup = pidfd::get_fd(handle, number)?;
                    if let Some(kind) = builder.terminals.describe(dup, link, what)? {
                        return Ok(kind);
                    }
                }
                // The root of that file system is the only place for queues. One that was unlinked
                // looks like any other file that was.
                let name = link.strip_suffix(" (deleted)").unwrap_or(link);
                if !name[1..].contains('/')
                    && !name.starts_with("/memfd:")
                    && is_queue(&pidfd::get_fd(handle, number)?)
                {
                    let why = "use a System V queue (msgget), or a socket";
                    return refuse(format!("the POSIX message queue {name}; {why}"));
                }
                if let Some(name) = link.strip_suffix(" (deleted)") {
                    let dup = pidfd::get_fd(handle, number)?;
                    return deleted(name, dup, info, objects, what);
                }
                let is_fifo = seen.mode & libc::S_IFMT == libc::S_IFIFO;
                if info.flags & libc::O_PATH == 0 && is_fifo {
                    let path = link.to_owned();
                    let key = (true, info.inode);
                    let pipe = pipes::pipe(handle, number, key, builder, state)?;
                    return Ok(Kind::Fifo { path, pipe });
                }
                file(link, info, what)
            }
            link => match link.split_once(":[") {
                Some((name, _)) if !name.starts_with("anon_inode") => {
                    namespace(name, info.inode, builder, what)
                }
                _ => refuse(format!("{}; close it, or run the program without", known_as(link))),
            },
        }
    }

    /// What the number refers to: remembered, or looked up when its inode is another.
    fn look(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        info: &Info,
    ) -> Result<&mut Seen, CaptureError> {
        let same = self.seen.get(&number).is_some_and(|s| {
            s.inode == info.inode
                && s.mount == info.mount
                && s.operations == info.operations
                && !s.link.starts_with('/')
        });
        if !same {
            let path = format!("/proc/{pid}/fd/{number}");
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
            let mode = match before {
                _ if !link.starts_with('/') => 0,
                Some(before) if before.link == link => before.mode,
                _ => fs::metadata(&path).map_err(|e| CaptureError::proc(&path, e))?.mode(),
            };
            let told = before.and_then(|s| s.told);
            let known = tcp::Known::default();
            let seen = Seen {
                inode,
                mount,
                operations,
                remembered: None,
                link,
                domain,
                kind,
                protocol,
                ahead,
                options,
                known,
                mode,
                told,
            };
            self.seen.insert(number, seen);
        }
        self.seen.get_mut(&number).ok_or(CaptureError::Ended)
    }
}

impl Builder {
    /// `inner` are the pids inside by the pids outside.
    pub(super) fn new(inner: HashMap<i32, i32>) -> Self {
        Self { inner, ..Self::default() }
    }

    /// All glances are taken: what they showed of epoll is put in order, each entry once.
    pub(super) fn sort_watchers(&mut self) {
        self.watchers.sort_unstable_by_key(|(by, file, ..)| (*by, *file));
        self.watchers.dedup_by_key(|(by, file, ..)| (*by, *file));
    }

    /// What glances have shown of one epoll instance.
    fn watchers_of(&self, instance: u64) -> &[(u64, u64, EpollTarget, u64)] {
        let from = self.watchers.partition_point(|(by, ..)| *by < instance);
        let len = self.watchers[from..].partition_point(|(by, ..)| *by == instance);
        &self.watchers[from..from + len]
    }

    /// Keeps the duplicate of a connection that has bytes under way.
    fn keep(&mut self, inode: u64, dup: OwnedFd, kind: &Kind) {
        if farewell::is_sending(kind) {
            self.sending.push((inode, dup));
        }
    }

    /// Adds a description that was not captured before; gives its index.
    fn add(
        &mut self,
        first: (i32, i32),
        place: usize,
        info: &Info,
        kind: Kind,
        state: &mut State,
    ) -> u32 {
        let flags = info.flags & !libc::O_CLOEXEC;
        state.descriptions.push(Description { flags, kind });
        self.first.push(first);
        let at = state.descriptions.len() as u32 - 1;
        self.by_inode.entry(info.inode).or_default().insert(place, at);
        at
    }

    /// The description that this descriptor shares with one captured before, or its place among
    /// those with the same inode.
    fn find(&self, pid: i32, number: i32, inode: u64) -> Result<Result<u32, usize>, CaptureError> {
        let Some(candidates) = self.by_inode.get(&inode) else { return Ok(Err(0)) };
        let (mut low, mut high) = (0, candidates.len());
        while low < high {
            let middle = (low + high) / 2;
            let (other_pid, other) = self.first[candidates[middle] as usize];
            match pidfd::compare_files(pid, number, other_pid, other)? {
                Ordering::Equal => return Ok(Ok(candidates[middle])),
                Ordering::Less => high = middle,
                Ordering::Greater => low = middle + 1,
            }
        }
        Ok(Err(low))
    }

    /// Once the descriptors of all processes were captured: what is in flight, and what can be
    /// checked only now. `init` is the host pid of the container's first process.
    pub(super) fn finish(
        mut self,
        init: i32,
        state: &mut State,
        mut world: World<'_>,
    ) -> Result<Sockets, CaptureError> {
        let mut at = 0;
        // Descriptors in flight can be unix sockets, with a queue of their own.
        while at < self.unix.len() {
            let queue = self.unix.queue(at, state, &mut world.memory.empties, &self.inner)?;
            let mut messages = Vec::with_capacity(queue.len());
            for (mut message, rights) in queue {
                for fd in rights {
                    message.rights.push(self.in_flight(fd, init, state, &mut world)?);
                }
                messages.push(message);
            }
            state.unix_sockets[at].queue = messages;
            at += 1;
        }
        self.unix.join(state)?;
        self.terminals.finish(init, &self.inner, state)?;
        self.name_watched(state)?;
        // A duplicate would keep the file in the interest list after the program has closed it,
        // and events would come for what the program knows no longer.
        let watched: HashSet<u64> =
            self.watched.iter().flat_map(|(_, all)| all).map(|w| w.inode).collect();
        self.sending.retain(|(inode, _)| !watched.contains(inode));
        Ok(Sockets { sending: self.sending, by_inode: self.by_inode })
    }

    /// The description behind a duplicate that travels in a message.
    fn in_flight(
        &mut self,
        fd: OwnedFd,
        init: i32,
        state: &mut State,
        world: &mut World<'_>,
    ) -> Result<u32, CaptureError> {
        let me = std::process::id() as i32;
        let number = fd.as_raw_fd();
        let info = fdinfo::info(me, number)?;
        let place = match self.find(me, number, info.inode)? {
            Ok(known) => return Ok(known),
            Err(place) => place,
        };
        let handle = pidfd::open(me)?;
        let holder = Holder { pid: me, handle: handle.as_fd(), place: init };
        let what = "a descriptor that travels through a unix socket";
        let mut files = Files::default();
        let mut whole = world.with(self, state);
        let kind = files.describe(holder, number, &info, &mut whole, what)?;
        if info.locks.iter().any(|l| l.kind != "FLOCK" && l.kind != "OFDLCK") {
            let why = "a lock or lease of a process that does not hold the descriptor any more";
            return Err(CaptureError::unsupported(what.into(), why.into()));
        }
        if matches!(kind, Kind::Epoll(_)) {
            let why = "an epoll instance that no process holds; let one keep it".into();
            return Err(CaptureError::unsupported(what.into(), why));
        }
        let told = locks::told(fd.as_fd())?;
        self.held.push(fd);
        let at = self.add((me, number), place, &info, kind, state);
        if let Some(told) = told {
            locks::add_owner(told, at, &self.inner, what, state)?;
        }
        locks::add(&info.locks, at, 0, what, state)?;
        Ok(at)
    }
}

/// Whether two looks at one thing agree, but for what passes between them.
fn alike(glanced: &Kind, there: &Kind) -> bool {
    match (glanced, there) {
        (Kind::Epoll(a), Kind::Epoll(b)) => a.len() == b.len() && a.iter().all(|t| b.contains(t)),
        (Kind::Tcp(a), Kind::Tcp(b)) => {
            let mut a = a.clone();
            let elapsed = b.timestamp.unwrap_or(0).wrapping_sub(a.timestamp.unwrap_or(0));
            a.timestamp = b.timestamp;
            // Whether it answers at once changes with the traffic.
            a.options.quick_ack = b.options.quick_ack;
            a == *b && elapsed < 10_000
        }
        (Kind::TcpListener(a), Kind::TcpListener(b)) => {
            let mut a = a.clone();
            a.options.quick_ack = b.options.quick_ack;
            a == *b
        }
        (a, b) => a == b,
    }
}

fn numbers(pid: i32) -> Result<Vec<i32>, CaptureError> {
    let path = format!("/proc/{pid}/fd");
    let mut all = Vec::with_capacity(64);
    for entry in fs::read_dir(&path).map_err(|e| CaptureError::proc(&path, e))? {
        let name = entry.map_err(|e| CaptureError::proc(&path, e))?.file_name();
        all.extend(name.to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    all.sort_unstable();
    Ok(all)
}

/// What an anonymous inode of this name is to people.
fn known_as(link: &str) -> String {
    let name = link.trim_start_matches("anon_inode:").trim_matches(['[', ']']);
    let what = match name {
        "userfaultfd" => "memory that it pages in by itself (userfaultfd)",
        "perf_event" => "a performance counter (perf)",
        "fanotify" => "a watch over file systems (fanotify)",
        name if name.starts_with("bpf") => return format!("an object of BPF ({name})"),
        _ => return format!("a descriptor of {link}"),
    };
    what.into()
}

/// Whether it is a file of huge pages.
fn is_huge(fd: &OwnedFd) -> bool {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    nix::sys::statfs::fstatfs(fd).is_ok_and(|s| s.filesystem_type().0 == HUGETLBFS_MAGIC)
}

/// Whether it is a POSIX message queue.
fn is_queue(fd: &OwnedFd) -> bool {
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    nix::sys::statfs::fstatfs(fd).is_ok_and(|s| s.filesystem_type().0 == MQUEUE_MAGIC)
}

/// A memfd, or a file that was deleted: its contents are part of the checkpoint.
fn deleted(
    name: &str,
    dup: OwnedFd,
    info: &Info,
    objects: &mut Objects,
    what: &str,
) -> Result<Kind, CaptureError> {
    let stat = nix::sys::stat::fstat(&dup)
        .map_err(|e| SysError::errno("fstat", what.to_owned(), e as i32))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        let why = format!("{name}, which was deleted and is no regular file; close it");
        return Err(CaptureError::unsupported(what.into(), why));
    }
    let own = objects.own_devices().contains(&(major(stat.st_dev) << 32 | minor(stat.st_dev)));
    if stat.st_nlink > 0 && !own && !name.starts_with("/memfd:") {
        let why = format!(
            "the file {name}, which was deleted but has other names; delete those too, or open one"
        );
        return Err(CaptureError::unsupported(what.into(), why));
    }
    if info.flags & libc::O_PATH != 0 {
        let why = format!("the file {name}, which was deleted, by O_PATH; close it");
        return Err(CaptureError::unsupported(what.into(), why));
    }
    if is_huge(&dup) {
        let why = format!("{name}, which has huge pages (MFD_HUGETLB); plain pages work");
        return Err(CaptureError::unsupported(what.into(), why));
    }
    let class = if name.starts_with("/memfd:") { Class::Memfd } else { Class::Deleted };
    let id = objects.of_descriptor(class, name, dup)?;
    Ok(Kind::Object { id, offset: info.pos })
}

fn file(link: &str, info: &Info, what: &str) -> Result<Kind, CaptureError> {
    if link.starts_with("/dev/pts/") || link.starts_with("/dev/tty") {
        return Err(CaptureError::unsupported(what.into(), format!("the terminal {link}")));
    }
    Ok(Kind::File { path: link.to_owned(), offset: info.pos })
}

fn socket(
    dup: OwnedFd,
    seen: &mut Seen,
    info: &Info,
    place: i32,
    whole: &mut Whole<'_>,
    what: &str,
) -> Result<Kind, CaptureError> {
    use libc::{AF_INET, AF_INET6, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP};
    let ahead = seen.options.take();
    let socket = (seen.domain, seen.kind, seen.protocol);
    let fd = dup.as_fd();
    let options = |ahead: Option<RawOptions>| match ahead {
        Some(known) => Ok(known),
        None => options::read(fd, socket, what),
    };
    match socket {
        (AF_INET | AF_INET6, libc::SOCK_STREAM, IPPROTO_TCP) => {
            let kind = tcp::tcp(fd, what, None, whole.diag)?;
            whole.builder.keep(info.inode, dup, &kind);
            Ok(kind)
        }
        (AF_INET | AF_INET6, _, libc::IPPROTO_MPTCP) => {
            let why = "an MPTCP socket; plain TCP works";
            Err(CaptureError::unsupported(what.into(), why.into()))
        }
        (AF_INET | AF_INET6, libc::SOCK_DGRAM, IPPROTO_UDP | IPPROTO_ICMP | IPPROTO_ICMPV6)
        | (AF_INET | AF_INET6, libc::SOCK_RAW, _) => {
            let (inode, empties) = (info.inode as u32, &mut whole.memory.empties);
            inet::datagram(fd, inode, socket, options(ahead)?, place, what, empties)
        }
        (libc::AF_NETLINK, ..) => inet::netlink(fd, socket, options(ahead)?, what),
        (libc::AF_UNIX, kind, _) => {
            let options = Some(options(ahead)?);
            let Whole { builder, state, diag, .. } = whole;
            let (inode, inner, pid) = (info.inode as u32, &builder.inner, place);
            let found = unix::Found { dup, inode, kind, options, pid, what, diag, inner };
            builder.unix.add(found, state).map(Kind::Unix)
        }
        (libc::AF_PACKET, ..) => {
            let why = "a packet socket, which sees frames that no checkpoint knows; run it without";
            Err(CaptureError::unsupported(what.into(), why.into()))
        }
        (domain, kind, protocol) => Err(CaptureError::unsupported(
            what.into(),
            format!(
                "a socket of family {domain}, type {kind}, protocol {protocol}; UDP, TCP, raw, \
                 netlink and unix sockets work"
            ),
        )),
    }
}

fn pidfd_of(info: &Info, builder: &Builder, what: &str) -> Result<Kind, CaptureError> {
    match info.pidfd.unwrap_or(0) {
        -1 => Ok(Kind::PidFd(0)),
        pid => builder.inner.get(&pid).map(|inside| Kind::PidFd(*inside)).ok_or_else(|| {
            let why = format!("a pidfd of pid {pid}, which is no live process of the container");
            CaptureError::unsupported(what.to_owned(), why)
        }),
    }
}

/// A namespace that one of the container's processes lives in.
fn namespace(name: &str, inode: u64, builder: &Builder, what: &str) -> Result<Kind, CaptureError> {
    let names = [name.to_owned(), format!("{name}_for_children")];
    for (outside, inside) in &builder.inner {
        for name in &names {
            let there = fs::metadata(format!("/proc/{outside}/ns/{name}"));
            if there.is_ok_and(|m| m.ino() == inode) {
                return Ok(Kind::Namespace { pid: *inside, name: name.clone() });
            }
        }
    }
    let why = format!("a namespace ({name}) that none of the container's processes lives in");
    Err(CaptureError::unsupported(what.to_owned(), why))
}
