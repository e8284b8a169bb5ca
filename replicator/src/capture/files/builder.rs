//! Descriptions as they are found in one checkpoint: each once, however many descriptors share it.

use super::{Files, Holder, Memory, Watcher, World};
use crate::capture::fdinfo::{self, Watched};
use crate::capture::numbered::{ByNumber, Few};
use crate::capture::{CaptureError, farewell, locks, pipes, terminals, unix};
use crate::image::{Description, Kind, Pipe, State};
use crate::sys::pidfd;
use std::cmp::Ordering;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Shared by all processes of a container while one checkpoint is taken. It holds duplicates of
/// descriptors: to be dropped before the thaw.
#[derive(Debug)]
pub(in crate::capture) struct Builder {
    /// Host pid and number of the first descriptor of each description.
    pub(in crate::capture) first: Vec<(i32, i32)>,
    /// What stands for the file of each description in a glance; 0: it was not in one.
    pub(in crate::capture) files: Vec<u64>,
    /// The descriptions of each inode, in the order of kcmp(2).
    pub(in crate::capture) by_inode: ByNumber<u64, Few>,
    pub(in crate::capture) pipes: HashMap<pipes::Key, u32>,
    pub(super) unix: unix::Sockets,
    pub(in crate::capture) terminals: terminals::Terminals,
    /// Pids inside by pids outside.
    pub(super) inner: Arc<HashMap<i32, i32>>,
    /// Descriptors that were in flight.
    pub(super) held: Vec<OwnedFd>,
    /// Duplicates of TCP sockets with bytes under way, and their inodes. They outlive the stop.
    pub(super) sending: Vec<(u64, OwnedFd)>,
    /// What epoll instances watch, by the index of the instance, in the order of their targets.
    pub(in crate::capture) watched: Vec<(u32, Vec<Watched>)>,
    /// Empty lists for that.
    pub(super) lists: Vec<Vec<Watched>>,
    /// The description of each file that a glance has shown.
    pub(in crate::capture) by_file: ByNumber<u64, u32>,
    /// What glances have shown of epoll.
    pub(super) watchers: Vec<Watcher>,
    /// Descriptors that a glance has told all of.
    pub(in crate::capture) glanced: usize,
    /// Those of them that had been put together before.
    pub(in crate::capture) resting: usize,
    /// What is to be filled in after the stop.
    pub(super) stamps: Stamps,
    /// When the clocks of the image were read.
    clocks_read: Option<Instant>,
}

/// Memory that one stop after the other uses: the thread that stops has written to it shortly before, so that it is in
/// its cache, and there is nothing to be asked for while the container stands still.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// It is empty and has been made so since the last stop.
    is_ready: bool,
    descriptions: Vec<Description>,
    first: Vec<(i32, i32)>,
    files: Vec<u64>,
    by_inode: ByNumber<u64, Few>,
    by_file: ByNumber<u64, u32>,
    sending: Vec<(u64, OwnedFd)>,
    watchers: Vec<Watcher>,
    stamps: Stamps,
    /// How many pipes there were.
    piped: usize,
    pipes: Vec<Pipe>,
    by_pipe: HashMap<pipes::Key, u32>,
    watched: Vec<(u32, Vec<Watched>)>,
    /// Lists of what epoll instances watch.
    lists: Vec<Vec<Watched>>,
}

/// Timestamps of connections, by the index of their description. The connections themselves have not been looked at
/// for long, and are in nobody's cache: that is not for a stop.
pub(super) type Stamps = Vec<(u32, u32)>;

impl Room {
    /// Makes it empty, with room for so many descriptions, if that is not done.
    pub(super) fn make_ready(&mut self, count: usize) {
        if self.is_ready {
            return;
        }
        self.descriptions.clear();
        self.descriptions.reserve(count);
        // What goes here is taken along by each checkpoint: the memory is another one each time.
        self.descriptions.spare_capacity_mut().fill_with(MaybeUninit::zeroed);
        self.first.clear();
        self.first.reserve(count);
        self.files.clear();
        self.files.reserve(count);
        self.stamps.clear();
        self.stamps.reserve(count);
        self.by_inode.clear();
        self.by_inode.reserve(count);
        self.by_file.clear();
        self.by_file.reserve(count);
        self.watchers.clear();
        self.watchers.reserve(count);
        self.pipes.reserve(self.piped);
        self.by_pipe.clear();
        self.by_pipe.reserve(self.piped);
        self.lists.extend(self.watched.drain(..).map(|(_, list)| list));
        self.is_ready = true;
    }

    /// After the stop: what it has left open of the connections that it has captured.
    pub(super) fn fill_in(&mut self, state: &mut State) {
        for (at, stamp) in self.stamps.drain(..) {
            if let Some(Description { kind: Kind::Tcp(connection), .. }) =
                state.descriptions.get_mut(at as usize)
            {
                connection.timestamp = Some(stamp);
            }
        }
    }
}

/// What is left of a [`Builder`] after the stop.
#[derive(Debug)]
pub(in crate::capture) struct Sockets {
    /// Duplicates of TCP sockets with bytes under way, and their inodes.
    pub(in crate::capture) sending: Vec<(u64, OwnedFd)>,
    by_inode: ByNumber<u64, Few>,
}

impl Sockets {
    /// Whether a descriptor with this inode was captured.
    pub(in crate::capture) fn has(&self, inode: u64) -> bool {
        self.by_inode.contains_key(&inode)
    }

    /// Leaves its memory to the next stop.
    pub(in crate::capture) fn give_back(self, memory: &mut Memory) {
        (memory.room.by_inode, memory.room.sending) = (self.by_inode, self.sending);
    }
}

impl Builder {
    /// `inner` are the pids inside by the pids outside. The clocks of the image have just been read; its descriptions
    /// go to the memory that is ready for them.
    pub(in crate::capture) fn new(
        inner: Arc<HashMap<i32, i32>>,
        memory: &mut Memory,
        state: &mut State,
    ) -> Self {
        let mut room = std::mem::take(&mut memory.room);
        if !room.is_ready {
            room.make_ready(memory.descriptions);
        }
        (state.descriptions, state.pipes) = (room.descriptions, room.pipes);
        Self {
            inner,
            clocks_read: Some(Instant::now()),
            first: room.first,
            files: room.files,
            stamps: room.stamps,
            by_inode: room.by_inode,
            by_file: room.by_file,
            watchers: room.watchers,
            watched: room.watched,
            lists: room.lists,
            pipes: room.by_pipe,
            unix: unix::Sockets::default(),
            terminals: terminals::Terminals::default(),
            held: Vec::new(),
            sending: room.sending,
            glanced: 0,
            resting: 0,
        }
    }

    /// Nanoseconds since the clocks of the image were read: what a timer has left counts from there.
    pub(super) fn since_clocks(&self) -> u64 {
        self.clocks_read.map_or(0, |then| then.elapsed().as_nanos() as u64)
    }

    /// All glances are taken: what they showed of epoll is put in order, each entry once.
    pub(in crate::capture) fn sort_watchers(&mut self) {
        self.watchers.sort_unstable_by_key(|(by, file, ..)| (*by, *file));
        self.watchers.dedup_by_key(|(by, file, ..)| (*by, *file));
    }

    /// What glances have shown of one epoll instance.
    pub(super) fn watchers_of(&self, instance: u64) -> &[Watcher] {
        let from = self.watchers.partition_point(|(by, ..)| *by < instance);
        let len = self.watchers[from..].partition_point(|(by, ..)| *by == instance);
        &self.watchers[from..from + len]
    }

    /// Keeps the duplicate of a connection that has bytes under way.
    pub(super) fn keep(&mut self, inode: u64, dup: OwnedFd, kind: &Kind) {
        if farewell::is_sending(kind) {
            self.sending.push((inode, dup));
        }
    }

    /// Adds a description that was not captured before; gives its index.
    pub(super) fn add(
        &mut self,
        first: (i32, i32),
        place: usize,
        inode: u64,
        flags: i32,
        kind: Kind,
        state: &mut State,
    ) -> u32 {
        let flags = flags & !libc::O_CLOEXEC;
        state.descriptions.push(Description { flags, kind });
        self.index_last(first, place, inode, state)
    }

    /// Makes the last description known; gives its index.
    pub(super) fn index_last(
        &mut self,
        first: (i32, i32),
        place: usize,
        inode: u64,
        state: &State,
    ) -> u32 {
        self.first.push(first);
        self.files.push(0);
        let at = state.descriptions.len() as u32 - 1;
        self.by_inode.entry(inode).and_modify(|all| all.insert(place, at)).or_insert(Few::One(at));
        at
    }

    /// The last description is of this file of a glance.
    pub(super) fn name_file(&mut self, at: u32, file: u64) {
        self.files[at as usize] = file;
        self.by_file.insert(file, at);
    }

    /// [`Builder::known`] and, if it is not, [`Builder::index_last`] of the next description in one, for a file of a glance:
    /// each table is asked once. Gives the description that is known.
    pub(super) fn enter(
        &mut self,
        first: (i32, i32),
        file: u64,
        inode: u64,
        next: u32,
    ) -> Result<Option<u32>, CaptureError> {
        let place = match self.by_file.entry(file) {
            Entry::Occupied(known) => return Ok(Some(*known.get())),
            Entry::Vacant(place) => place,
        };
        match self.by_inode.entry(inode) {
            Entry::Vacant(only) => {
                only.insert(Few::One(next));
            }
            Entry::Occupied(mut others) => match find(&self.first, others.get().all(), first)? {
                Ok(known) => return Ok(Some(known)),
                Err(place) => others.get_mut().insert(place, next),
            },
        }
        place.insert(next);
        self.first.push(first);
        self.files.push(file);
        Ok(None)
    }

    /// The description that this descriptor shares with one captured before, or its place among
    /// those with the same inode. `file` is what stands for it in a glance.
    pub(super) fn known(
        &self,
        pid: i32,
        number: i32,
        file: Option<u64>,
        inode: u64,
    ) -> Result<Result<u32, usize>, CaptureError> {
        match file.and_then(|file| self.by_file.get(&file)) {
            Some(known) => Ok(Ok(*known)),
            None => self.find(pid, number, inode),
        }
    }

    /// The same by what the kernel says of two descriptors, kcmp(2).
    fn find(&self, pid: i32, number: i32, inode: u64) -> Result<Result<u32, usize>, CaptureError> {
        let Some(candidates) = self.by_inode.get(&inode).map(Few::all) else { return Ok(Err(0)) };
        find(&self.first, candidates, (pid, number))
    }

    /// Once the descriptors of all processes were captured: what is in flight, and what can be
    /// checked only now. `init` is the host pid of the container's first process.
    pub(in crate::capture) fn finish(
        mut self,
        init: i32,
        state: &mut State,
        mut world: World<'_>,
    ) -> Result<Sockets, CaptureError> {
        world.memory.descriptions = state.descriptions.len();
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
        if !self.sending.is_empty() && self.watched.iter().any(|(_, all)| !all.is_empty()) {
            let watched: HashSet<u64> =
                self.watched.iter().flat_map(|(_, all)| all).map(|w| w.inode).collect();
            self.sending.retain(|(inode, _)| !watched.contains(inode));
        }
        let piped = state.pipes.len();
        let Self { first, files, by_file, watchers, stamps, sending, by_inode, .. } = self;
        let (watched, lists, by_pipe) = (self.watched, self.lists, self.pipes);
        world.memory.room = Room {
            first,
            files,
            by_file,
            watchers,
            stamps,
            piped,
            by_pipe,
            watched,
            lists,
            ..Room::default()
        };
        Ok(Sockets { sending, by_inode })
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
        let at = self.add((me, number), place, info.inode, info.flags, kind, state);
        if let Some(told) = told {
            locks::add_owner(told, at, &self.inner, what, state)?;
        }
        locks::add(&info.locks, at, 0, what, state)?;
        Ok(at)
    }
}

/// Which of these descriptions, which are in order, this descriptor is one of, or its place among them.
fn find(
    first: &[(i32, i32)],
    candidates: &[u32],
    (pid, number): (i32, i32),
) -> Result<Result<u32, usize>, CaptureError> {
    let (mut low, mut high) = (0, candidates.len());
    while low < high {
        let middle = (low + high) / 2;
        let (other_pid, other) = first[candidates[middle] as usize];
        match pidfd::compare_files(pid, number, other_pid, other)? {
            Ordering::Equal => return Ok(Ok(candidates[middle])),
            Ordering::Less => high = middle,
            Ordering::Greater => low = middle + 1,
        }
    }
    Ok(Err(low))
}
