//! Unix sockets.
//!
//! Whom a socket was connected by (SO_PEERCRED) cannot be set: socketpair(2), listen(2) and
//! connect(2) must be called by the process with that pid, with those ids. So the spare's
//! processes make the sockets; we take duplicates and do the rest:
//!
//! ```text
//! create   pairs: socketpair, or by a listening socket that lives for the moment, if one side
//!          shows its name; the others; names; listening sockets with the connections that wait
//! fill     queues, with the descriptors in flight, from their senders; datagram peers
//! settle   options, shutdowns; ends that were closed are closed
//! ```
//! A name whose path does not lead to its socket any more is made beside it and removed after.

use super::objects::Place;
use super::options;
use super::script::Script;
use super::unix_queues::is_pair;
use crate::image::State;
use crate::image::unix::{UnixCredentials, UnixLink, UnixName, UnixSocket};
use crate::sys::{SysError, SysResult, memory, pidfd};
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Backlog of a listening socket that lives for the moment, and the most connections made by it
/// at once.
const AT_ONCE: usize = 100;

/// Sockets made so far, by index in the state.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub(super) fds: Vec<Option<OwnedFd>>,
    /// The other ends of sockets whose peer was closed.
    pub(super) closed: Vec<Option<OwnedFd>>,
    /// Where the file of a name is, if not at its path: it goes in the end.
    pub(super) asides: Vec<Option<PathBuf>>,
    /// The same of sockets that are not in the state.
    pub(super) leftovers: Vec<PathBuf>,
    /// Senders that are not in the state, by name.
    pub(super) ghosts: BTreeMap<Vec<u8>, OwnedFd>,
    /// Whether a name was bound, not come by as that of a listening socket.
    bound: Vec<bool>,
}

/// Makes the sockets of a state.
struct Maker<'a> {
    script: &'a mut Script,
    place: &'a Place<'a>,
    state: &'a State,
    made: Made,
    /// Descriptors in the spare's processes, to be closed there: host pid and number.
    opened: Vec<(i32, i32)>,
    handles: BTreeMap<i32, OwnedFd>,
    asides: usize,
}

/// Where connections were made: type and name of the listening socket, and who had it listen.
type Meeting<'a> = (i32, &'a [u8], UnixCredentials);

/// One side of a connection: a socket of the state, or one that was closed.
#[derive(Clone, Copy)]
struct Side<'a> {
    index: Option<usize>,
    name: Option<&'a UnixName>,
    /// Who made it, as the other side sees it.
    creator: UnixCredentials,
}

/// Makes all unix sockets of a state. The calling thread is in the container's network.
pub(super) fn create(script: &mut Script, state: &State, place: &Place) -> SysResult<Made> {
    let count = state.unix_sockets.len();
    if count == 0 {
        return Ok(Made::default());
    }
    let none = |n| (0..n).map(|_| None).collect::<Vec<_>>();
    let made = Made {
        fds: none(count),
        closed: none(count),
        asides: (0..count).map(|_| None).collect(),
        bound: vec![false; count],
        ..Made::default()
    };
    let mut maker = Maker {
        script,
        place,
        state,
        made,
        opened: Vec::new(),
        handles: BTreeMap::new(),
        asides: 0,
    };
    maker.connections()?;
    maker.others()?;
    maker.ghosts()?;
    maker.close_remote()?;
    Ok(maker.made)
}

impl Maker<'_> {
    /// Streams, seqpackets and datagram pairs that are connected to each other.
    fn connections(&mut self) -> SysResult<()> {
        let state = self.state;
        let closed_names: Vec<Option<UnixName>> =
            state.unix_sockets.iter().map(closed_name).collect();
        let mut plain: BTreeMap<UnixCredentials, Vec<[Side<'_>; 2]>> = BTreeMap::new();
        let mut named: BTreeMap<Meeting<'_>, Vec<[Side<'_>; 2]>> = BTreeMap::new();
        for (i, socket) in state.unix_sockets.iter().enumerate() {
            let other = match &socket.link {
                UnixLink::Peer(j) if is_pair(state, i, *j as usize) && i < *j as usize => {
                    let other = &state.unix_sockets[*j as usize];
                    let (index, name) = (Some(*j as usize), other.name.as_ref());
                    Side { index, name, creator: socket.peer }
                }
                UnixLink::Closed { .. } => {
                    Side { index: None, name: closed_names[i].as_ref(), creator: socket.peer }
                }
                _ => continue,
            };
            let creator =
                other.index.map_or(UnixCredentials::default(), |j| state.unix_sockets[j].peer);
            let this = Side { index: Some(i), name: socket.name.as_ref(), creator };
            let listens = |side: &Side<'_>| {
                side.name.is_some_and(|n| {
                    state.unix_sockets.iter().any(|s| {
                        matches!(s.link, UnixLink::Listening { .. })
                            && s.name.as_ref().is_some_and(|m| m.bytes == n.bytes)
                    })
                })
            };
            let pair = if listens(&this) || (this.name.is_some() && !listens(&other)) {
                [other, this]
            } else {
                [this, other]
            };
            // The second is the one that was accepted, if one was.
            match pair[1].name {
                Some(name) if socket.kind != libc::SOCK_DGRAM => {
                    let key = (socket.kind, name.bytes.as_slice(), pair[1].creator);
                    named.entry(key).or_default().push(pair);
                }
                _ => plain.entry(socket.peer).or_default().push(pair),
            }
        }
        for (creator, pairs) in plain {
            for some in pairs.chunks(AT_ONCE) {
                self.socketpairs(creator, some)?;
            }
        }
        for ((kind, _, creator), pairs) in named {
            for some in pairs.chunks(AT_ONCE) {
                self.accepted(kind, creator, some)?;
            }
        }
        Ok(())
    }

    fn socketpairs(&mut self, creator: UnixCredentials, pairs: &[[Side<'_>; 2]]) -> SysResult<()> {
        let state = self.state;
        let mut at = Vec::new();
        let host = self.act_as(creator, |script| {
            for [a, b] in pairs {
                let kind = a.index.or(b.index).map_or(1, |i| state.unix_sockets[i].kind);
                let room = script.words(&[0]);
                let args = [libc::AF_UNIX as u64, kind as u64, 0, room];
                script.call("socketpair", libc::SYS_socketpair, &args);
                at.push(room);
            }
        })?;
        for (pair, room) in pairs.iter().zip(at) {
            let mut numbers = [0; 8];
            memory::read(host, room, &mut numbers)?;
            for (side, n) in pair.iter().zip(numbers.chunks_exact(4)) {
                let number = i32::from_ne_bytes(n.try_into().expect("four bytes"));
                self.opened.push((host, number));
                let fd = self.take(host, number)?;
                if let Some(name) = side.name {
                    self.bind_side(host, number, side.index, name)?;
                }
                self.give(pair, side, fd);
            }
        }
        Ok(())
    }

    fn give(&mut self, pair: &[Side<'_>; 2], side: &Side<'_>, fd: OwnedFd) {
        match side.index {
            Some(i) => self.made.fds[i] = Some(fd),
            None => {
                let survivor = pair.iter().find_map(|s| s.index).unwrap_or(0);
                self.made.closed[survivor] = Some(fd);
            }
        }
    }

    /// Connections to a name: by a socket that listens there for the moment.
    fn accepted(
        &mut self,
        kind: i32,
        creator: UnixCredentials,
        pairs: &[[Side<'_>; 2]],
    ) -> SysResult<()> {
        let Some(name) = pairs.first().and_then(|p| p[1].name) else { return Ok(()) };
        let nonblock = libc::SOCK_NONBLOCK as u64 | kind as u64;
        let owner = self.host_of(creator.pid);
        let listener = self.remote_socket(owner, kind)?;
        let aside = self.bind(owner, listener, name, false)?;
        self.open_to_all(name, aside.as_deref())?;
        let backlog = AT_ONCE as u64 + 1;
        self.act_as(creator, |script| {
            script.call("listen", libc::SYS_listen, &[listener as u64, backlog]);
            let args = [listener as u64, libc::F_SETFL as u64, libc::O_NONBLOCK as u64];
            script.call("fcntl(F_SETFL)", libc::SYS_fcntl, &args);
        })?;
        for pair in pairs {
            let asker = pair[0];
            let host = self.host_of(asker.creator.pid);
            let number = self.remote_socket(host, nonblock as i32)?;
            if let Some(own) = asker.name {
                self.bind_side(host, number, asker.index, own)?;
            }
            self.connect(asker.creator, number, name, aside.as_deref())?;
            let fd = self.take(host, number)?;
            self.give(pair, &asker, fd);
            let accepted =
                self.script.call("accept4", libc::SYS_accept4, &[listener as u64, 0, 0, 0]);
            let number = self.script.run_ok(owner)?[accepted] as i32;
            self.opened.push((owner, number));
            let fd = self.take(owner, number)?;
            self.give(pair, &pair[1], fd);
        }
        self.close_now(owner, listener)?;
        if let Some(path) = aside {
            remove(&path)?;
        }
        Ok(())
    }

    /// Sockets that are not connected, that listen, and datagram sockets that send to one of many.
    fn others(&mut self) -> SysResult<()> {
        let state = self.state;
        let mut rest: Vec<usize> =
            (0..state.unix_sockets.len()).filter(|i| self.made.fds[*i].is_none()).collect();
        // Where a path leads today is made last.
        rest.sort_by_key(|i| {
            state.unix_sockets[*i].name.as_ref().is_some_and(|n| n.file.is_some())
        });
        for i in rest {
            let socket = &state.unix_sockets[i];
            if socket.link == UnixLink::Pending {
                continue;
            }
            let creator = socket.peer;
            let host = self.host_of(creator.pid);
            let number = self.remote_socket(host, socket.kind)?;
            if let Some(name) = &socket.name {
                self.bind_side(host, number, Some(i), name)?;
            }
            let fd = self.take(host, number)?;
            if let UnixLink::Listening { backlog, pending } = &socket.link {
                options::set(fd.as_fd(), &socket.options)?;
                let room = u64::from(*backlog).max(pending.len() as u64);
                self.act_as(creator, |script| {
                    script.call("listen", libc::SYS_listen, &[number as u64, room]);
                })?;
                self.waiting(i, pending)?;
                if room != u64::from(*backlog) {
                    let args = [number as u64, u64::from(*backlog)];
                    self.script.call("listen", libc::SYS_listen, &args);
                    self.script.run_ok(host)?;
                }
            }
            self.made.fds[i] = Some(fd);
        }
        for (i, socket) in state.unix_sockets.iter().enumerate() {
            if let Some(name) = &socket.name
                && let Some(file) = name.file
                && self.made.bound[i]
                && self.made.asides[i].is_none()
            {
                attributes(&self.outside(name), file)?;
            }
        }
        Ok(())
    }

    /// Senders of messages that have ended since.
    fn ghosts(&mut self) -> SysResult<()> {
        let all = &self.state.unix_sockets;
        for name in all.iter().flat_map(|s| &s.queue).filter_map(|m| m.from.as_ref()) {
            let lives = |s: &UnixSocket| s.name.as_ref().is_some_and(|n| n.bytes == *name);
            let is_dead = |s: &UnixSocket| matches!(&s.link, UnixLink::Closed { name: Some(n), .. } if n == name);
            if all.iter().any(|s| lives(s) || is_dead(s)) || self.made.ghosts.contains_key(name) {
                continue;
            }
            let number = self.remote_socket(self.place.init, libc::SOCK_DGRAM)?;
            self.bind_side(self.place.init, number, None, &nowhere(name))?;
            let fd = self.take(self.place.init, number)?;
            self.made.ghosts.insert(name.clone(), fd);
        }
        Ok(())
    }

    fn bind_side(
        &mut self,
        host: i32,
        number: i32,
        index: Option<usize>,
        name: &UnixName,
    ) -> SysResult<()> {
        let aside = self.bind(host, number, name, true)?;
        match index {
            Some(i) => (self.made.asides[i], self.made.bound[i]) = (aside, true),
            None => self.made.leftovers.extend(aside),
        }
        Ok(())
    }

    /// Connections that wait to be accepted at socket `i`.
    fn waiting(&mut self, i: usize, pending: &[u32]) -> SysResult<()> {
        let state = self.state;
        let listener = &state.unix_sockets[i];
        for &asker in pending {
            let asker = asker as usize;
            let Some(socket) = state.unix_sockets.get(asker) else { continue };
            let Some(name) = &listener.name else {
                return Err(SysError::errno("connect", "a listener without a name", libc::EINVAL));
            };
            let creator = self.holder_of(asker);
            let host = self.host_of(creator.pid);
            let number = self.remote_socket(host, socket.kind | libc::SOCK_NONBLOCK)?;
            if let Some(own) = &socket.name {
                self.bind_side(host, number, Some(asker), own)?;
            }
            let aside = self.made.asides[i].clone();
            if name.bytes.first() != Some(&0) {
                self.open_to_all(name, aside.as_deref())?;
            }
            self.connect(creator, number, name, aside.as_deref())?;
            self.made.fds[asker] = Some(self.take(host, number)?);
        }
        Ok(())
    }

    /// Who holds a socket: the best guess of who has made its connection.
    fn holder_of(&self, socket: usize) -> UnixCredentials {
        let is_it =
            |d: &crate::image::Description| d.kind == crate::image::Kind::Unix(socket as u32);
        let holds = |p: &&crate::image::Process| {
            let mut fds = p.fds.iter().map(|f| f.description as usize);
            fds.any(|d| self.state.descriptions.get(d).is_some_and(is_it))
        };
        self.state.processes.iter().find(holds).map_or(UnixCredentials::default(), |p| {
            UnixCredentials { pid: p.pid, uid: p.creds.uids[1], gid: p.creds.gids[1] }
        })
    }

    fn host_of(&self, pid: i32) -> i32 {
        self.place.hosts.get(&pid).copied().unwrap_or(self.place.init)
    }

    /// Calls made by a process with these ids; gives its host pid. All must succeed.
    fn act_as(&mut self, who: UnixCredentials, calls: impl FnOnce(&mut Script)) -> SysResult<i32> {
        const SAME: u64 = u64::MAX;
        let host = self.host_of(who.pid);
        let [uid, gid] = [who.uid, who.gid].map(|id| if id == u32::MAX { 0 } else { id });
        let become_ids = |script: &mut Script, uid: u32, gid: u32| {
            let calls: [(_, _, u32); 2] =
                [("setresgid", libc::SYS_setresgid, gid), ("setresuid", libc::SYS_setresuid, uid)];
            for (name, number, id) in if uid == 0 { [calls[1], calls[0]] } else { calls } {
                script.call(name, number, &[SAME, u64::from(id), SAME]);
            }
        };
        let other = uid != 0 || gid != 0;
        if other {
            become_ids(self.script, uid, gid);
        }
        calls(self.script);
        if other {
            become_ids(self.script, 0, 0);
        }
        self.script.run_ok(host)?;
        Ok(host)
    }

    fn remote_socket(&mut self, host: i32, kind: i32) -> SysResult<i32> {
        let args = [libc::AF_UNIX as u64, kind as u64, 0];
        let at = self.script.call("socket", libc::SYS_socket, &args);
        let number = self.script.run_ok(host)?[at] as i32;
        self.opened.push((host, number));
        Ok(number)
    }

    fn take(&mut self, host: i32, number: i32) -> SysResult<OwnedFd> {
        let handle = match self.handles.entry(host) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => e.insert(pidfd::open(host)?),
        };
        pidfd::get_fd(handle.as_fd(), number)
    }

    fn close_now(&mut self, host: i32, number: i32) -> SysResult<()> {
        self.opened.retain(|o| *o != (host, number));
        self.script.call("close", libc::SYS_close, &[number as u64]);
        self.script.run_ok(host).map(drop)
    }

    fn close_remote(&mut self) -> SysResult<()> {
        let opened = std::mem::take(&mut self.opened);
        for &host in self.handles.keys() {
            let own = opened.iter().filter(|(h, _)| *h == host);
            for chunk in own.collect::<Vec<_>>().chunks(1000) {
                for (_, number) in chunk {
                    self.script.call("close", libc::SYS_close, &[*number as u64]);
                }
                self.script.run_ok(host)?;
            }
        }
        Ok(())
    }

    /// Binds a socket in a process. `lasting`: its file stays where it is, if it was there. Gives
    /// where the file is now if it is to go in the end.
    fn bind(
        &mut self,
        host: i32,
        number: i32,
        name: &UnixName,
        lasting: bool,
    ) -> SysResult<Option<PathBuf>> {
        let is_path = name.bytes.first() != Some(&0);
        let outside = self.outside(name);
        let stays = lasting && name.file.is_some();
        let mut kept = None;
        if is_path && let Ok(found) = std::fs::symlink_metadata(&outside) {
            if stays && found.file_type().is_socket() {
                remove(&outside)?;
            } else if stays {
                let what = format!("unix socket at {}", show(name));
                return Err(SysError::errno("bind (another file is there)", what, libc::EEXIST));
            } else {
                let aside = self.aside(&outside);
                rename(&outside, &aside)?;
                kept = Some(aside);
            }
        }
        if let (true, Some(directory)) = (is_path, &name.directory) {
            let at = self.script.text(directory);
            self.script.call_on("chdir", directory.clone(), libc::SYS_chdir, &[at]);
        }
        let (address, len) = address(&name.bytes);
        let at = self.script.data(&address);
        let args = [number as u64, at, len];
        self.script.call_on("bind", show(name), libc::SYS_bind, &args);
        self.script.run_ok(host)?;
        if !is_path || stays {
            return Ok(None);
        }
        let ours = self.aside(&outside);
        rename(&outside, &ours)?;
        if let Some(kept) = kept {
            rename(&kept, &outside)?;
        }
        Ok(Some(ours))
    }

    fn connect(
        &mut self,
        who: UnixCredentials,
        number: i32,
        name: &UnixName,
        aside: Option<&Path>,
    ) -> SysResult<()> {
        let bytes = match aside {
            _ if name.bytes.first() == Some(&0) => name.bytes.clone(),
            // Inside, without the way to the container's root.
            Some(aside) => {
                let inside = aside.strip_prefix(self.root()).unwrap_or(aside);
                Path::new("/").join(inside).as_os_str().as_encoded_bytes().to_vec()
            }
            None => absolute(name).into_bytes(),
        };
        let (address, len) = address(&bytes);
        let object = show(name);
        self.act_as(who, |script| {
            let at = script.data(&address);
            script.call_on("connect", object, libc::SYS_connect, &[number as u64, at, len]);
        })
        .map(drop)
    }

    /// Whoever connected could; now the file has the rights of the moment.
    fn open_to_all(&self, name: &UnixName, aside: Option<&Path>) -> SysResult<()> {
        if name.bytes.first() == Some(&0) {
            return Ok(());
        }
        let path = aside.map_or_else(|| self.outside(name), Path::to_path_buf);
        std::fs::set_permissions(&path, Permissions::from_mode(0o777)).map_err(|source| SysError {
            call: "chmod",
            object: path.display().to_string(),
            source,
        })
    }

    fn root(&self) -> PathBuf {
        format!("/proc/{}/root", self.place.init).into()
    }

    /// The path of a name, from outside the container.
    fn outside(&self, name: &UnixName) -> PathBuf {
        outside(self.place.init, name)
    }

    fn aside(&mut self, path: &Path) -> PathBuf {
        self.asides += 1;
        path.with_file_name(format!(".nilicon-{}", self.asides))
    }
}

/// The path of a name, from outside the container whose first process has this host pid.
pub(super) fn outside(init: i32, name: &UnixName) -> PathBuf {
    format!("/proc/{init}/root{}", absolute(name)).into()
}

fn absolute(name: &UnixName) -> String {
    let text = String::from_utf8_lossy(&name.bytes).into_owned();
    match &name.directory {
        Some(directory) => format!("{}/{text}", directory.trim_end_matches('/')),
        None => text,
    }
}

fn closed_name(socket: &UnixSocket) -> Option<UnixName> {
    match &socket.link {
        UnixLink::Closed { name: Some(bytes), .. } => Some(nowhere(bytes)),
        _ => None,
    }
}

/// A name that leads nowhere any more. Where a relative path was bound nobody knows: anywhere
/// will do.
fn nowhere(bytes: &[u8]) -> UnixName {
    let relative = !matches!(bytes.first(), Some(0 | b'/'));
    let directory = relative.then(|| "/tmp".to_owned());
    UnixName { bytes: bytes.to_vec(), directory, file: None }
}

fn show(name: &UnixName) -> String {
    String::from_utf8_lossy(&name.bytes).replace('\0', "@")
}

/// struct sockaddr_un and its length for a name.
fn address(name: &[u8]) -> (Vec<u8>, u64) {
    let mut raw = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    raw.extend(name);
    if name.first() != Some(&0) {
        raw.push(0);
    }
    let len = raw.len() as u64;
    (raw, len)
}

fn attributes(path: &Path, (mode, uid, gid): (u32, u32, u32)) -> SysResult<()> {
    let failed = |call| move |source| SysError { call, object: path.display().to_string(), source };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(failed("chown"))?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("chmod"))
}

pub(super) fn remove(path: &Path) -> SysResult<()> {
    std::fs::remove_file(path).map_err(|source| SysError {
        call: "unlink",
        object: path.display().to_string(),
        source,
    })
}

fn rename(from: &Path, to: &Path) -> SysResult<()> {
    std::fs::rename(from, to).map_err(|source| SysError {
        call: "rename",
        object: from.display().to_string(),
        source,
    })
}
