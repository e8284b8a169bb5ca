//! Descriptors of a process and the open file descriptions behind them.
//!
//! One read of /proc/PID/fdinfo/N a descriptor ([`fdinfo`]) tells most of it. The link in
//! /proc/PID/fd is read when the inode behind a number changes. Two descriptors are one
//! description when kcmp(2) says so; it also gives an order, so that a description is found among
//! many by halving.
//!
//! Where the kernel can show all descriptors at one [`glance`](super::glance), fdinfo is read only
//! of those that it says too little of, and TCP connections with nothing new in their queues cost
//! no system call at all ([`remembered`](super::remembered)); those about which nothing at all is new cost
//! next to nothing ([`resting`]).

mod ahead;
mod builder;
mod describe;
mod resting;
mod seen;

use super::fdinfo::{self, Info, Watched};
use super::glance::{Glance, Pieces, Row};
use super::numbered::ByNumber;
use super::objects::Objects;
use super::orphans::{Orphans, Still};
use super::refusals::Refusals;
use super::remembered::Remembered;
use super::unix::Empties;
use super::{CaptureError, Glances, farewell, homes, inotify, locks, tcp};
use crate::image::{EpollTarget, Fd, Kind, State};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, pidfd};
use crate::volume::Volume;
use builder::Room;
use resting::Resting;
use seen::Seen;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

pub(super) use builder::Builder;

/// Remembered between stops, one for a process.
#[derive(Debug, Default)]
pub(super) struct Files {
    seen: ByNumber<i32, Seen>,
    /// The numbers that the last stop found, until the others are forgotten.
    found: Vec<i32>,
    /// Whether there are others.
    may_be_closed: bool,
    /// For the next checkpoint: room for its descriptors.
    fds: Vec<Fd>,
    /// What it takes along was made since the last one.
    is_ready: bool,
    glance: Option<Glance>,
    /// Of each row of the glance.
    resting: Vec<Option<Resting>>,
    /// What the glance shows of epoll, in order, if that is known.
    watchers: Vec<Watcher>,
    knows_watchers: bool,
    /// What a glance tells is compared with what there is.
    checked: bool,
    /// Whether looks have shown a descriptor that is read past the page cache: since the last checkpoint,
    /// and between that and the one before.
    direct: [bool; 2],
    /// Devices of file systems that may be read so whatever the flags of a descriptor.
    uncached: Arc<[u64]>,
    /// What is being looked at, as errors name it. Kept, so that nothing is allocated for each.
    about: String,
}

/// Remembered between stops, one for a container.
#[derive(Debug, Default)]
pub(super) struct Memory {
    empties: Empties,
    paths: inotify::Paths,
    /// What takes all that is written to the container's root, if that is an overlay.
    layer: Option<Arc<Volume>>,
    /// Where files may be open for writing.
    homes: homes::Homes,
    /// How many descriptions there were at the last checkpoint.
    descriptions: usize,
    room: Room,
    /// Reads send queues; none if this kernel cannot, or if it was not asked for.
    queues: Option<Option<Orphans>>,
    asked: Asked,
}

/// Queues that are to be read.
#[derive(Debug, Default)]
struct Asked {
    /// Their descriptors, and the first sequence number that was not acknowledged.
    of: Vec<(i32, u32)>,
    queues: Vec<Still>,
}

/// So many queues, or so many bytes of them, are read before the stop as well.
const MANY_QUEUES: usize = 8;
const MANY_BYTES: u64 = 64 << 10;
/// How often queues are read in a stop that the kernel is still sending from.
const TRIES: usize = 3;

impl Memory {
    /// The container's root is an overlay with this upper layer.
    pub(super) fn keep_root_in(&mut self, layer: Arc<Volume>) {
        self.layer = Some(layer);
    }

    /// Files may be open for writing only in these places, and not where anything is mounted in the root.
    pub(super) fn keep_in(&mut self, places: Vec<PathBuf>, mounts: Vec<PathBuf>) {
        self.homes = homes::Homes::only(places, mounts);
    }

    /// After the thaw: what the stop has left open of the state that it has captured.
    pub(super) fn fill_in(&mut self, state: &mut State) {
        self.room.fill_in(state);
    }

    /// Makes ready the memory that a stop needs, while the container runs.
    pub(super) fn make_ready(&mut self) {
        // There will be about as many as there were.
        self.room.make_ready(self.descriptions);
    }

    /// For `glances`: what reads many send queues at once.
    pub(super) fn open_queues(&mut self, glances: bool) {
        if glances {
            self.queues.get_or_insert_with(Orphans::open);
        }
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

/// What a glance shows of epoll: the instance, the file that it watches, how, and the inode of that.
type Watcher = (u64, u64, EpollTarget, u64);

/// What a stop puts a checkpoint together from.
type Build<'a, 'b> = (&'a mut Builder, &'a mut State, World<'b>, &'a mut Refusals);

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

impl Files {
    /// For the process with this host pid.
    pub(super) fn open(pid: i32, glances: Glances, uncached: &Arc<[u64]>) -> Self {
        let glance = match glances {
            Glances::Off => None,
            Glances::On | Glances::Noted => Glance::open(pid),
            Glances::Checked => Glance::open(pid).map(Glance::always_again),
        };
        let (checked, uncached) = (glances == Glances::Checked, uncached.clone());
        Self { glance, checked, uncached, ..Self::default() }
    }

    /// Before a stop, while the process runs: makes the memory that its checkpoint takes along.
    pub(super) fn make_ready(&mut self) {
        if std::mem::replace(&mut self.is_ready, true) {
            return;
        }
        self.fds.reserve(self.found.len());
        self.seen.values_mut().for_each(Seen::make_ready);
    }

    /// In a stop, before [`Files::glance`]: begins that, if there is much to look at.
    pub(super) fn begin_glance(&mut self) -> Option<Arc<Pieces>> {
        self.glance.as_mut()?.begin()
    }

    /// In a stop: looks at all descriptors at once, if that is possible, and tells what epoll
    /// instances watch.
    pub(super) fn glance(&mut self, builder: &mut Builder) -> Result<(), CaptureError> {
        let Some(mut glance) = self.glance.take() else { return Ok(()) };
        let looked = glance.look();
        self.heed(&glance);
        match self.knows_watchers {
            true => builder.watchers.extend_from_slice(&self.watchers),
            false => resting::add_watchers(&glance, &mut builder.watchers),
        }
        self.glance = Some(glance);
        Ok(looked?)
    }

    /// In a stop, after [`Files::glance`]: reads all at once what connections with the world have under way and
    /// was not read before. What is not read so is read one by one, later.
    pub(super) fn read_queues(&mut self, memory: &mut Memory) {
        let Memory { queues: Some(Some(reader)), asked, .. } = memory else { return };
        for _ in 0..TRIES {
            self.ask_for_queues(asked);
            if asked.queues.is_empty() {
                return;
            }
            let read = reader.still(&asked.queues, |nth, bytes| {
                let _ = self.learn(asked.of[nth], asked.queues[nth].from, bytes);
            });
            if let Err(error) = read {
                tracing::debug!(%error, "send queues are read once more, or one by one");
            }
        }
    }

    /// The same while the container runs, after a look ahead, if there are many: then the stop has only to read what is
    /// written since.
    pub(super) fn read_queues_ahead(&mut self, memory: &mut Memory) {
        let Memory { queues: Some(Some(reader)), asked, .. } = memory else { return };
        self.ask_for_queues(asked);
        let lens = asked.queues.iter().map(|q| u64::from(q.end.wrapping_sub(q.from)));
        if asked.queues.len() < MANY_QUEUES && lens.sum::<u64>() < MANY_BYTES {
            return;
        }
        let read = reader.moving(&asked.queues, |nth, start, bytes| {
            if let Some(remembered) = self.learn(asked.of[nth], start, bytes) {
                // The stop takes along as much, and a little more.
                remembered.make_ready();
            }
        });
        if let Err(error) = read {
            tracing::debug!(%error, "send queues are left for the stop");
        }
    }

    /// The queues of which something would have to be read.
    fn ask_for_queues(&self, asked: &mut Asked) {
        asked.queues.clear();
        asked.of.clear();
        let Some(glance) = &self.glance else { return };
        for nth in 0..glance.len() {
            // Nothing is in its queues.
            if self.rests(nth) {
                continue;
            }
            let row = glance.nth(nth);
            let Some(tcp) = row.tcp.filter(|tcp| !tcp.is_local()) else { continue };
            let seen = self.seen.get(&row.number()).filter(|s| s.is_of(&row));
            let remembered = seen.and_then(|s| s.remembered.as_ref()).filter(|r| r.is_of(tcp));
            if let Some((from, end)) = remembered.and_then(|r| r.lacks(tcp)) {
                asked.of.push((row.number(), tcp.sent().1));
                asked.queues.push(Still { at: row.socket(), from, end });
            }
        }
    }

    /// Bytes of a send queue that was [asked for](Asked::of), which begin at `start`.
    fn learn(
        &mut self,
        (number, una): (i32, u32),
        start: u32,
        bytes: &[u8],
    ) -> Option<&mut Remembered> {
        let remembered = self.seen.get_mut(&number)?.remembered.as_mut()?;
        remembered.learn(una, start, bytes);
        Some(remembered)
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
                let mut targets = std::mem::take(&mut seen.targets);
                targets.extend(entries.iter().map(|(.., target, _)| *target));
                seen.watches = targets.len();
                let mut list = builder.lists.pop().unwrap_or_default();
                list.clear();
                list.extend(builder.watchers_of(instance).iter().map(file));
                watched = list;
                Kind::Epoll(targets)
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
        self.forget_closed();
        self.is_ready = false;
        let glance = self.glance.take();
        let mut whole = (builder, state, world, refusals);
        let captured = match &glance {
            Some(glance) => self.capture_rows(holder, glance, &mut whole),
            None => numbers(pid).and_then(|numbers| {
                let one = |number| self.capture_one(holder, number, None, &mut whole).transpose();
                numbers.into_iter().filter_map(one).collect()
            }),
        };
        self.glance = glance;
        let fds: Vec<Fd> = captured?;
        self.found.clear();
        self.found.extend(fds.iter().map(|fd| fd.number));
        self.may_be_closed = true;
        Ok(fds)
    }

    /// Forgets the numbers that the last stop did not find: before the next look at them, and that
    /// is after the stop.
    fn forget_closed(&mut self) {
        if std::mem::take(&mut self.may_be_closed) {
            self.seen.retain(|number, _| self.found.binary_search(number).is_ok());
        }
    }

    /// Captures the descriptors that a glance has shown.
    fn capture_rows(
        &mut self,
        holder: Holder<'_>,
        glance: &Glance,
        whole: &mut Build<'_, '_>,
    ) -> Result<Vec<Fd>, CaptureError> {
        let mut fds = std::mem::take(&mut self.fds);
        fds.reserve(glance.len());
        for nth in 0..glance.len() {
            if let Some(time) = glance.time().filter(|_| self.rests(nth)) {
                fds.extend(self.capture_resting(holder, nth, time, whole)?);
            } else {
                let row = glance.nth(nth);
                fds.extend(self.capture_one(holder, row.number(), Some(&row), whole)?);
            }
        }
        Ok(fds)
    }

    /// Captures a descriptor; none if it was refused and the survey goes on.
    fn capture_one(
        &mut self,
        holder: Holder<'_>,
        number: i32,
        row: Option<&Row<'_>>,
        (builder, state, world, refusals): &mut Build<'_, '_>,
    ) -> Result<Option<Fd>, CaptureError> {
        let Holder { pid, handle, .. } = holder;
        let what = || about(number, pid);
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
        let (mut info, ready) = match ready {
            Some((info, kind)) => (info, Some(kind)),
            None => (self.info(pid, number, row)?, None),
        };
        let file = row.map(Row::file);
        let description = match builder.known(pid, number, file, info.inode)? {
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
                        let mut about = std::mem::take(&mut self.about);
                        about.clear();
                        write_about(&mut about, number, pid);
                        let mut whole = world.with(builder, state);
                        let described = self.describe(holder, number, &info, &mut whole, &about);
                        self.about = about;
                        described
                    }
                };
                let Some(kind) = refusals.admit(kind)? else { return Ok(None) };
                let at = builder.add((pid, number), place, info.inode, info.flags, kind, state);
                if let Some(file) = file {
                    builder.name_file(at, file);
                }
                if !info.watched.is_empty() {
                    builder.watched.push((at, std::mem::take(&mut info.watched)));
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
        self.note(number, info.inode, info.flags);
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
}

fn about(number: i32, pid: i32) -> String {
    let mut out = String::new();
    write_about(&mut out, number, pid);
    out
}

fn write_about(out: &mut String, number: i32, pid: i32) {
    use std::fmt::Write;
    // To a string nothing can fail.
    let _ = write!(out, "descriptor {number} of pid {pid}");
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
