//! Descriptors of a process and the open file descriptions behind them.
//!
//! One read of /proc/PID/fdinfo/N a descriptor gives flags, offset, inode and, for epoll,
//! eventfd and timerfd, all of their state. The link in /proc/PID/fd is read when the inode
//! behind a number changes.

use super::refusals::Refusals;
use super::{CaptureError, tcp};
use crate::image::{Description, EpollTarget, Fd, Kind, Pipe, State, TimerFd, UnixPair};
use crate::sys::sockopt::{get_i32, in_queue};
use crate::sys::unix_diag::UnixDiag;
use crate::sys::{SysError, pidfd};
use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// fdinfo of one descriptor.
#[derive(Clone, Debug, Default)]
struct Info {
    pos: u64,
    flags: i32,
    inode: u64,
    mount: u64,
    epoll: Vec<EpollTarget>,
    eventfd: Option<(u64, bool)>,
    timer: TimerFd,
    locked: bool,
}

/// What a descriptor number referred to at the last look.
#[derive(Clone, Debug)]
struct Seen {
    inode: u64,
    mount: u64,
    link: String,
    domain: i32,
    kind: i32,
    protocol: i32,
    /// Flags and the rest of a TCP connection, if they were read just before this stop.
    ahead: Option<(i32, tcp::Ahead)>,
}

/// Remembered between stops, one for a process.
#[derive(Debug, Default)]
pub(super) struct Files {
    seen: HashMap<i32, Seen>,
}

/// Shared by all processes of a container while one checkpoint is taken.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Host pid and number of the first descriptor of each description, and its inode.
    first: Vec<(i32, i32, u64)>,
    pipes: HashMap<u64, u32>,
    pairs: HashMap<u32, (u32, u8)>,
}

impl Seen {
    fn is_tcp(&self) -> bool {
        matches!(self.domain, libc::AF_INET | libc::AF_INET6)
            && self.kind == libc::SOCK_STREAM
            && self.protocol == libc::IPPROTO_TCP
    }
}

impl Files {
    /// Reads what rarely changes of TCP connections, while the container runs.
    pub(super) fn look_ahead(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
    ) -> Result<(), CaptureError> {
        for number in numbers(pid)? {
            // A descriptor that is closed meanwhile is looked at in the stop, if it is there.
            let Ok(info) = info(pid, number) else { continue };
            let Ok(seen) = self.look(pid, handle, number, &info) else { continue };
            if !seen.is_tcp() {
                continue;
            }
            let Ok(dup) = pidfd::get_fd(handle, number) else { continue };
            let what = format!("descriptor {number} of pid {pid}");
            let ahead = tcp::ahead(dup.as_fd(), &what)?.map(|ahead| (info.flags, ahead));
            if let Some(seen) = self.seen.get_mut(&number) {
                seen.ahead = ahead;
            }
        }
        Ok(())
    }

    /// A TCP connection that was looked at just before and is still the one of this number.
    fn connection(
        &mut self,
        handle: BorrowedFd<'_>,
        number: i32,
        what: impl Fn() -> String,
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
        let kind = tcp::tcp(dup.as_fd(), &what(), Some(&ahead))?;
        Ok(Some((Info { flags, inode: seen.inode, ..Info::default() }, kind)))
    }

    /// Captures all descriptors of a process (host pid) into `state`.
    pub(super) fn capture(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        builder: &mut Builder,
        state: &mut State,
        diag: &UnixDiag,
        refusals: &mut Refusals,
    ) -> Result<Vec<Fd>, CaptureError> {
        let mut out = Vec::new();
        let numbers = numbers(pid)?;
        for &number in &numbers {
            let what = || format!("descriptor {number} of pid {pid}");
            let Some(connection) = refusals.admit(self.connection(handle, number, what))? else {
                continue;
            };
            if let Some((info, kind)) = connection {
                let description = match builder.known(pid, number, &info, state)? {
                    Some(at) => at,
                    None => builder.add(pid, number, &info, kind, state),
                };
                let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
                out.push(Fd { number, description, close_on_exec });
                continue;
            }
            let info = info(pid, number)?;
            let description = match builder.known(pid, number, &info, state)? {
                Some(at) => at,
                None => {
                    let kind = self.describe(pid, handle, number, &info, builder, state, diag);
                    let Some(kind) = refusals.admit(kind)? else { continue };
                    builder.add(pid, number, &info, kind, state)
                }
            };
            let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
            out.push(Fd { number, description, close_on_exec });
        }
        self.seen.retain(|n, _| numbers.binary_search(n).is_ok());
        Ok(out)
    }

    #[allow(clippy::too_many_arguments, reason = "one private step of capture")]
    fn describe(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        info: &Info,
        builder: &mut Builder,
        state: &mut State,
        diag: &UnixDiag,
    ) -> Result<Kind, CaptureError> {
        let what = || format!("descriptor {number} of pid {pid}");
        if info.locked {
            let why = "a file lock (flock, fcntl, lease); these are not protected yet";
            return Err(CaptureError::unsupported(what(), why.into()));
        }
        let seen = self.look(pid, handle, number, info)?;
        let link = seen.link.as_str();
        if link.starts_with("socket:") {
            let dup = pidfd::get_fd(handle, number)?;
            return match (seen.domain, seen.kind, seen.protocol) {
                (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                    tcp::tcp(dup.as_fd(), &what(), None)
                }
                (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => {
                    tcp::udp(dup.as_fd(), &what())
                }
                (libc::AF_UNIX, kind, _) => {
                    unix(&dup, info.inode as u32, kind, builder, state, diag, &what())
                }
                (domain, kind, protocol) => Err(CaptureError::unsupported(
                    what(),
                    format!("a socket of family {domain}, type {kind}, protocol {protocol}"),
                )),
            };
        }
        match link {
            "anon_inode:[eventpoll]" => Ok(Kind::Epoll(info.epoll.clone())),
            "anon_inode:[eventfd]" => {
                let (count, semaphore) = info.eventfd.unwrap_or_default();
                Ok(Kind::EventFd { count, semaphore })
            }
            "anon_inode:[timerfd]" => Ok(Kind::TimerFd(info.timer)),
            _ if link.starts_with("pipe:") => pipe(handle, number, info.inode, builder, state),
            _ if link.starts_with('/') => file(link, info, &what()),
            other => Err(CaptureError::unsupported(what(), format!("a descriptor of {other}"))),
        }
    }

    /// What the number refers to: remembered, or looked up when its inode is another.
    fn look(
        &mut self,
        pid: i32,
        handle: BorrowedFd<'_>,
        number: i32,
        info: &Info,
    ) -> Result<&Seen, CaptureError> {
        let same = self.seen.get(&number).is_some_and(|s| {
            s.inode == info.inode && s.mount == info.mount && !s.link.starts_with('/')
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
            let (inode, mount) = (info.inode, info.mount);
            self.seen
                .insert(number, Seen { inode, mount, link, domain, kind, protocol, ahead: None });
        }
        Ok(&self.seen[&number])
    }
}

impl Builder {
    /// Adds a description that was not captured before; gives its index.
    fn add(&mut self, pid: i32, number: i32, info: &Info, kind: Kind, state: &mut State) -> u32 {
        let flags = info.flags & !libc::O_CLOEXEC;
        state.descriptions.push(Description { flags, kind });
        self.first.push((pid, number, info.inode));
        state.descriptions.len() as u32 - 1
    }

    /// The description that this descriptor shares with one captured before, if any.
    fn known(
        &self,
        pid: i32,
        number: i32,
        info: &Info,
        state: &State,
    ) -> Result<Option<u32>, CaptureError> {
        for (at, (other_pid, other, inode)) in self.first.iter().enumerate() {
            let flags = state.descriptions[at].flags;
            if *inode == info.inode
                && flags == info.flags & !libc::O_CLOEXEC
                && pidfd::same_file(pid, number, *other_pid, *other)?
            {
                return Ok(Some(at as u32));
            }
        }
        Ok(None)
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

/// proc_pid_fdinfo(5).
fn info(pid: i32, number: i32) -> Result<Info, CaptureError> {
    let path = format!("/proc/{pid}/fdinfo/{number}");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    parse_info(&text)
        .ok_or_else(|| CaptureError::proc(&path, std::io::ErrorKind::InvalidData.into()))
}

fn parse_info(text: &str) -> Option<Info> {
    let mut i = Info::default();
    let mut semaphore = false;
    let mut count = None;
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "pos" => i.pos = value.parse().ok()?,
            "flags" => i.flags = i32::from_str_radix(value, 8).ok()?,
            "ino" => i.inode = value.parse().ok()?,
            "mnt_id" => i.mount = value.parse().ok()?,
            "tfd" => i.epoll.push(epoll_target(value)?),
            "eventfd-count" => count = Some(u64::from_str_radix(value, 16).ok()?),
            "eventfd-semaphore" => semaphore = value == "1",
            "lock" => i.locked = true,
            "clockid" => i.timer.clock = value.parse().ok()?,
            "ticks" => i.timer.ticks = value.parse().ok()?,
            "settime flags" => i.timer.set_flags = i32::from_str_radix(value, 8).ok()?,
            "it_value" => i.timer.value = timespec(value)?,
            "it_interval" => i.timer.interval = timespec(value)?,
            _ => {}
        }
    }
    i.eventfd = count.map(|c| (c, semaphore));
    Some(i)
}

/// `8 events: 19 data: 8 pos:0 ino:1234 sdev:9` behind `tfd:`
fn epoll_target(value: &str) -> Option<EpollTarget> {
    let mut words = value.split_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut events = None;
    let mut data = None;
    while let Some(word) = words.next() {
        match word {
            "events:" => events = u32::from_str_radix(words.next()?, 16).ok(),
            "data:" => data = u64::from_str_radix(words.next()?, 16).ok(),
            _ => {}
        }
    }
    Some(EpollTarget { fd, events: events?, data: data? })
}

/// `(seconds, nanoseconds)`
fn timespec(value: &str) -> Option<u64> {
    let (s, ns) = value.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some(s.trim().parse::<u64>().ok()? * 1_000_000_000 + ns.trim().parse::<u64>().ok()?)
}

fn file(link: &str, info: &Info, what: &str) -> Result<Kind, CaptureError> {
    if link.ends_with(" (deleted)") {
        let why = format!("the file {link}, which is open and deleted");
        return Err(CaptureError::unsupported(what.into(), why));
    }
    if link.starts_with("/dev/pts/") || link.starts_with("/dev/tty") {
        return Err(CaptureError::unsupported(what.into(), format!("the terminal {link}")));
    }
    Ok(Kind::File { path: link.to_owned(), offset: info.pos })
}

fn pipe(
    handle: BorrowedFd<'_>,
    number: i32,
    inode: u64,
    builder: &mut Builder,
    state: &mut State,
) -> Result<Kind, CaptureError> {
    if let Some(at) = builder.pipes.get(&inode) {
        return Ok(Kind::Pipe(*at));
    }
    let dup = pidfd::get_fd(handle, number)?;
    let capacity = nix::fcntl::fcntl(&dup, nix::fcntl::FcntlArg::F_GETPIPE_SZ)
        .map_err(|e| SysError::errno("F_GETPIPE_SZ", format!("descriptor {number}"), e as i32))?;
    let contents = pipe_contents(&dup, capacity as usize)?;
    state.pipes.push(Pipe { capacity: capacity as u32, contents });
    let at = state.pipes.len() as u32 - 1;
    builder.pipes.insert(inode, at);
    Ok(Kind::Pipe(at))
}

/// Copies what a pipe holds with tee(2), which consumes nothing.
fn pipe_contents(end: &OwnedFd, capacity: usize) -> Result<Vec<u8>, CaptureError> {
    let waiting = in_queue(end.as_fd())?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    let failed = |call| move |e: nix::Error| SysError::errno(call, "a pipe", e as i32);
    // Through /proc, so that it works on a duplicate of the write end as well.
    let source = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", end.as_raw_fd()))
        .map_err(|e| CaptureError::proc("/proc/self/fd of a pipe", e))?;
    let (read, write) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).map_err(failed("pipe2"))?;
    nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(capacity as i32))
        .map_err(failed("F_SETPIPE_SZ"))?;
    let n = nix::fcntl::tee(&source, &write, waiting, nix::fcntl::SpliceFFlags::SPLICE_F_NONBLOCK)
        .map_err(failed("tee"))?;
    let mut contents = vec![0; n];
    let mut got = 0;
    while got < n {
        got += nix::unistd::read(&read, &mut contents[got..]).map_err(failed("read"))?;
    }
    if n != waiting {
        let what = format!("{n} of {waiting} bytes");
        return Err(SysError::errno("tee", what, libc::EIO).into());
    }
    Ok(contents)
}

fn unix(
    dup: &OwnedFd,
    inode: u32,
    kind: i32,
    builder: &mut Builder,
    state: &mut State,
    diag: &UnixDiag,
    what: &str,
) -> Result<Kind, CaptureError> {
    if get_i32(dup.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0 {
        let why = "a listening unix socket; these are not protected yet";
        return Err(CaptureError::unsupported(what.into(), why.into()));
    }
    let Some(peer) = diag.peer(inode)? else {
        let why = "a unix socket that is not one of a pair; these are not protected yet";
        return Err(CaptureError::unsupported(what.into(), why.into()));
    };
    let waiting = in_queue(dup.as_fd())?;
    if waiting > 0 && kind != libc::SOCK_STREAM {
        return Err(CaptureError::Transient("a unix socket has messages queued"));
    }
    let bytes = tcp::peek(dup.as_fd(), waiting)?;
    let queue = if bytes.is_empty() { Vec::new() } else { vec![bytes] };
    let (pair, side) = match builder.pairs.get(&inode) {
        Some(found) => *found,
        None => {
            let mut pair = UnixPair { kind, ..UnixPair::default() };
            pair.closed = [false, true];
            state.unix_pairs.push(pair);
            let pair = state.unix_pairs.len() as u32 - 1;
            builder.pairs.insert(peer, (pair, 1));
            (pair, 0)
        }
    };
    let image = &mut state.unix_pairs[pair as usize];
    image.queues[usize::from(side)] = queue;
    image.closed[usize::from(side)] = false;
    Ok(Kind::UnixPair { pair, side })
}

/// Checks what can be checked only when all descriptors of all processes are known.
pub(super) fn check_whole(state: &State) -> Result<(), CaptureError> {
    for pair in &state.unix_pairs {
        if pair.closed[1] {
            let why = "a unix socket whose peer is outside the container";
            return Err(CaptureError::unsupported("the container".into(), why.into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_every_kind() {
        let i = parse_info("pos:\t17\nflags:\t02104002\nmnt_id:\t15\nino:\t99\n").expect("a file");
        assert_eq!((i.pos, i.inode, i.mount), (17, 99, 15));
        assert_ne!(i.flags & libc::O_CLOEXEC, 0);
        let i = parse_info(
            "pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t1\n\
             tfd:        8 events:       19 data:         deadbeef  pos:0 ino:6 sdev:9\n",
        )
        .expect("an epoll instance");
        assert_eq!(i.epoll, [EpollTarget { fd: 8, events: 0x19, data: 0xdead_beef }]);
        let i = parse_info(
            "pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t1\nclockid: 1\nticks: 2\n\
             settime flags: 01\nit_value: (1, 5)\nit_interval: (0, 7)\n",
        )
        .expect("a timerfd");
        assert_eq!(
            i.timer,
            TimerFd { clock: 1, ticks: 2, set_flags: 1, value: 1_000_000_005, interval: 7 }
        );
        let i =
            parse_info("pos:\t0\nflags:\t02\neventfd-count:               a\n").expect("eventfd");
        assert_eq!(i.eventfd, Some((10, false)));
        let i =
            parse_info("pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 7 00:2f:9 0 EOF\n");
        assert!(i.expect("a file").locked);
        assert!(parse_info("pos:\tx\n").is_none());
    }
}
