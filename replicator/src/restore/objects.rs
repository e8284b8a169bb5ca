//! Open file descriptions, made in our own process: files, pipes, eventfds, timerfds, unix socket
//! pairs, epoll instances, sockets. They are handed to the container's processes afterwards, so
//! that a description which several of them share is one.

use super::error::sys;
use super::script::Script;
use super::shared::Held;
use super::terminals::Terminals;
use super::{datagrams, files, shared, sockets, unix, unix_queues};
use crate::image::net::TcpState;
use crate::image::{Description, Kind, Pipe, State, TimerFd};
use crate::sys::{SysError, SysResult, descriptors};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd as NixTimer, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{Whence, lseek, pipe2, write};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A description that could not be made: its index, and why.
pub(super) type Failed = (usize, SysError);

/// Where descriptions are made.
pub(super) struct Place<'a> {
    /// The memory objects.
    pub(super) held: &'a Held,
    /// Pid of the container's init as the host sees it.
    pub(super) init: i32,
    /// How far the container's clock is past the checkpoint.
    pub(super) elapsed: Duration,
    /// Host pids of all processes by their pids inside.
    pub(super) hosts: BTreeMap<i32, i32>,
    /// The terminals.
    pub(super) terminals: &'a Terminals,
    /// Every file must be there.
    pub(super) strict: bool,
}

/// Makes all descriptions of a checkpoint, in order. TCP connections are sockets without
/// addresses yet. `script` is empty, for calls that the spare's processes must make.
pub(super) fn create_all(
    state: &State,
    place: &Place<'_>,
    script: &mut Script,
) -> Result<Vec<OwnedFd>, Failed> {
    let begin = Instant::now();
    let mut pipes = Pipes::new(state);
    let mut made: Vec<Option<OwnedFd>> = state.descriptions.iter().map(|_| None).collect();
    for (i, d) in state.descriptions.iter().enumerate() {
        let fd = match &d.kind {
            Kind::File { path, offset } => file(place, d.flags, path, *offset),
            Kind::Pipe(index) => pipes.end(*index, d.flags),
            Kind::EventFd { count, semaphore } => event_fd(*count, *semaphore),
            Kind::TimerFd(timer) => timer_fd(timer, place.elapsed + begin.elapsed()),
            Kind::Epoll(_) | Kind::EpollPast { .. } => {
                sys(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC), "epoll_create1", text).map(|e| e.0)
            }
            Kind::Object { id, offset } => object(place.held, *id, d.flags, *offset),
            Kind::Fifo { path, pipe } => pipes.fifo(*pipe, path, d.flags, place),
            Kind::SignalFd(mask) => descriptors::signal_fd(*mask),
            Kind::Inotify(watches) => files::instance(watches, place),
            Kind::PidFd(pid) => files::handle(*pid, place),
            Kind::Namespace { pid, name } => files::namespace(*pid, name, d.flags, place),
            Kind::Terminal(t) => place.terminals.master(t.index),
            Kind::TerminalEnd(index) => place.terminals.end(*index, d.flags),
            Kind::Datagram(_) | Kind::Netlink(_) => continue,
            Kind::Unix(_) | Kind::TcpListener(_) | Kind::Tcp(_) | Kind::InetIdle(_) => continue,
        };
        made[i] = Some(fd.and_then(|fd| with_flags(fd, d)).map_err(|e| (i, e))?);
    }
    in_network_of(place.init, || {
        // All unix sockets are made together; an error names the one.
        let is_unix = |d: &Description| matches!(d.kind, Kind::Unix(_));
        let first = state.descriptions.iter().position(is_unix).unwrap_or(0);
        let unix = unix::create(script, state, place).map_err(|e| (first, e))?;
        for (i, d) in state.descriptions.iter().enumerate() {
            let fd = match &d.kind {
                Kind::Unix(index) => duplicate(&unix, *index),
                Kind::TcpListener(l) => sockets::listener(l),
                Kind::InetIdle(s) => sockets::idle(s),
                Kind::Datagram(s) => datagrams::datagram(s),
                Kind::Netlink(s) => datagrams::netlink(s),
                Kind::Tcp(c) if c.state == TcpState::Closed => sockets::ended(c),
                Kind::Tcp(c) => sockets::unconnected(&c.local),
                _ => continue,
            };
            made[i] = Some(fd.and_then(|fd| with_flags(fd, d)).map_err(|e| (i, e))?);
        }
        let filled = unix_queues::fill(state, &unix, &made, place);
        filled.and_then(|()| unix_queues::settle(state, unix)).map_err(|e| (first, e))
    })
    .unwrap_or_else(|e| Err((0, e)))?;
    Ok(made.into_iter().flatten().collect())
}

fn duplicate(unix: &unix::Made, index: u32) -> SysResult<OwnedFd> {
    let object = || format!("unix socket {index}");
    let fd = unix.fds.get(index as usize).and_then(Option::as_ref);
    let fd = fd.ok_or_else(|| SysError::errno("search", object(), libc::ENOENT))?;
    fd.try_clone().map_err(|source| SysError { call: "dup", object: object(), source })
}

/// Makes the sockets of connections that no process has a descriptor of any more.
pub(super) fn create_farewells(state: &State, place: &Place<'_>) -> SysResult<Vec<OwnedFd>> {
    if state.farewells.is_empty() {
        return Ok(Vec::new());
    }
    let make = || state.farewells.iter().map(|c| sockets::unconnected(&c.local)).collect();
    in_network_of(place.init, make)?
}

fn text() -> String {
    "a new descriptor".into()
}

/// Runs something while the calling thread is in the network namespace of a process.
fn in_network_of<T>(pid: i32, f: impl FnOnce() -> T) -> SysResult<T> {
    let open = |path: String| {
        File::open(&path).map_err(|source| SysError { call: "open", object: path, source })
    };
    let ours = open("/proc/thread-self/ns/net".into())?;
    let theirs = open(format!("/proc/{pid}/ns/net"))?;
    let enter = |ns: &File| sys(setns(ns, CloneFlags::CLONE_NEWNET), "setns", || "network".into());
    enter(&theirs)?;
    let result = f();
    enter(&ours)?;
    Ok(result)
}

/// Sets the status flags that a description was not made with.
fn with_flags(fd: OwnedFd, d: &Description) -> SysResult<OwnedFd> {
    // O_ASYNC is for the process: the signal tells the number of its descriptor.
    const CAN_CHANGE: i32 = libc::O_APPEND | libc::O_DIRECT | libc::O_NONBLOCK;
    let wanted = d.flags & CAN_CHANGE;
    let is_plain = wanted == 0 && !matches!(d.kind, Kind::Unix(_));
    if matches!(d.kind, Kind::File { .. } | Kind::Object { .. }) || is_plain {
        return Ok(fd);
    }
    let arg = FcntlArg::F_SETFL(OFlag::from_bits_retain(wanted));
    sys(fcntl(&fd, arg), "F_SETFL", || format!("flags {wanted:#o}"))?;
    Ok(fd)
}

/// A file by its path in the container: through the root directory of its init, so that the
/// container's mounts count. One that is open for writing only and is not there (it was given another
/// name since the checkpoint, or is on a disk that this host has not) goes on without a name: what is
/// written to it is nobody's, but no reader can take it for what the file held.
fn file(place: &Place<'_>, flags: i32, path: &str, offset: u64) -> SysResult<OwnedFd> {
    let past = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
    let only_written = flags & (libc::O_ACCMODE | libc::O_PATH) == libc::O_WRONLY;
    let flags = OFlag::from_bits_retain((flags & !past) | libc::O_CLOEXEC | libc::O_NOCTTY);
    let outside = format!("/proc/{}/root{path}", place.init);
    let opened = match open(outside.as_str(), flags, Mode::empty()) {
        Err(nix::Error::ENOENT) if only_written && !place.strict => {
            tracing::warn!(path, "a file that is written is not here; it goes on without a name");
            let nameless = shared::nameless(place.init, path)?;
            let path = format!("/proc/self/fd/{}", nameless.as_raw_fd());
            open(path.as_str(), flags, Mode::empty())
        }
        other => other,
    };
    let fd = sys(opened, "open", || path.to_string())?;
    if offset != 0 {
        sys(lseek(&fd, offset as i64, Whence::SeekSet), "lseek", || path.to_string())?;
    }
    Ok(fd)
}

/// A memory object as a file.
fn object(held: &Held, id: u32, flags: i32, offset: u64) -> SysResult<OwnedFd> {
    let fd = held.open(id, flags)?;
    if offset != 0 {
        sys(lseek(&fd, offset as i64, Whence::SeekSet), "lseek", text)?;
    }
    Ok(fd)
}

/// Pipes, made when their first end is wanted, and both ends kept until all are made.
struct Pipes<'a> {
    state: &'a State,
    made: Vec<Option<Ends>>,
    /// Named pipes, held open for reading and writing until all ends are made.
    named: Vec<Option<OwnedFd>>,
}

struct Ends {
    /// Reading and writing end.
    fds: [OwnedFd; 2],
    /// Whether a description has become this end already.
    given: [bool; 2],
}

impl<'a> Pipes<'a> {
    fn new(state: &'a State) -> Self {
        Self {
            state,
            made: state.pipes.iter().map(|_| None).collect(),
            named: state.pipes.iter().map(|_| None).collect(),
        }
    }

    fn end(&mut self, index: u32, flags: i32) -> SysResult<OwnedFd> {
        let object = || format!("pipe {index}");
        let image = self.state.pipes.get(index as usize);
        let image = image.ok_or_else(|| SysError::errno("search", object(), libc::ENOENT))?;
        let ends = match &mut self.made[index as usize] {
            Some(ends) => ends,
            slot => slot.insert(new_pipe(image, self.state.has_packets(index))?),
        };
        let mode = flags & libc::O_ACCMODE;
        let side = usize::from(mode != libc::O_RDONLY);
        if mode != libc::O_RDWR && !std::mem::replace(&mut ends.given[side], true) {
            let copy = ends.fds[side].try_clone();
            return copy.map_err(|source| SysError { call: "dup", object: object(), source });
        }
        // One more description of the same pipe: only open(2) makes it.
        let path = format!("/proc/thread-self/fd/{}", ends.fds[side].as_raw_fd());
        let flags = OFlag::from_bits_retain(mode | libc::O_CLOEXEC);
        sys(open(path.as_str(), flags, Mode::empty()), "open", object)
    }
}

impl Pipes<'_> {
    /// An end of a named pipe.
    fn fifo(&mut self, index: u32, path: &str, flags: i32, place: &Place) -> SysResult<OwnedFd> {
        let missing = || SysError::errno("search", format!("pipe {index}"), libc::ENOENT);
        let image = self.state.pipes.get(index as usize).ok_or_else(missing)?;
        if let slot @ None = &mut self.named[index as usize] {
            let keeper = files::fifo(path, libc::O_RDWR, place)?;
            fill_pipe(image, self.state.has_packets(index), &keeper)?;
            *slot = Some(keeper);
        }
        let fd = files::fifo(path, flags, place)?;
        sys(fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())), "F_SETFL", || path.to_owned())?;
        Ok(fd)
    }
}

fn new_pipe(image: &Pipe, packets: bool) -> SysResult<Ends> {
    let (read, write_end) = sys(pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK), "pipe2", text)?;
    fill_pipe(image, packets, &write_end)?;
    for end in [&read, &write_end] {
        sys(fcntl(end, FcntlArg::F_SETFL(OFlag::empty())), "F_SETFL", text)?;
    }
    Ok(Ends { fds: [read, write_end], given: [false; 2] })
}

/// Sets the capacity and writes the contents. `write_end` does not block.
fn fill_pipe(image: &Pipe, packets: bool, write_end: &OwnedFd) -> SysResult<()> {
    let capacity = image.capacity as i32;
    if capacity != 0 {
        let object = || format!("{capacity} bytes");
        sys(fcntl(write_end, FcntlArg::F_SETPIPE_SZ(capacity)), "F_SETPIPE_SZ", object)?;
    }
    let mut rest = image.contents.as_slice();
    if packets {
        let flags = OFlag::O_NONBLOCK | OFlag::O_DIRECT;
        sys(fcntl(write_end, FcntlArg::F_SETFL(flags)), "F_SETFL", text)?;
    }
    for len in &image.packets {
        let (mut piece, later) = rest.split_at(rest.len().min(*len as usize));
        while !piece.is_empty() {
            let object = || format!("{} bytes to a pipe", piece.len());
            let n = sys(write(write_end, piece), "write", object)?;
            piece = &piece[n..];
        }
        rest = later;
    }
    Ok(())
}

fn event_fd(count: u64, semaphore: bool) -> SysResult<OwnedFd> {
    let mut flags = EfdFlags::EFD_CLOEXEC;
    flags.set(EfdFlags::EFD_SEMAPHORE, semaphore);
    let start = count.min(u64::from(u32::MAX));
    let event = sys(EventFd::from_value_and_flags(start as u32, flags), "eventfd", text)?;
    if count > start {
        sys(event.write(count - start), "write", || "an eventfd".into())?;
    }
    Ok(OwnedFd::from(event))
}

fn timer_fd(image: &TimerFd, elapsed: Duration) -> SysResult<OwnedFd> {
    let clock = match image.clock {
        libc::CLOCK_REALTIME => ClockId::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME => ClockId::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_ALARM => ClockId::CLOCK_REALTIME_ALARM,
        libc::CLOCK_BOOTTIME_ALARM => ClockId::CLOCK_BOOTTIME_ALARM,
        _ => ClockId::CLOCK_MONOTONIC,
    };
    let object = || format!("clock {}", image.clock);
    let timer = sys(NixTimer::new(clock, TimerFlags::TFD_CLOEXEC), "timerfd_create", object)?;
    let (value, ticks) = due(image, elapsed);
    if value != 0 {
        let left = TimeSpec::from_duration(Duration::from_nanos(value));
        let when = match image.interval {
            0 => Expiration::OneShot(left),
            n => {
                Expiration::IntervalDelayed(left, TimeSpec::from_duration(Duration::from_nanos(n)))
            }
        };
        let (when, flags) = cancelled_on_set(image, when, left)?;
        sys(timer.set(when, flags), "timerfd_settime", object)?;
    }
    if ticks != 0 {
        descriptors::set_timer_ticks(timer.as_fd(), ticks)?;
    }
    Ok(OwnedFd::from(timer))
}

/// Nanoseconds to a timer's next expiration (0: disarmed), and how often it has expired unread, when
/// it has stood still for `elapsed`: its clock went on.
fn due(image: &TimerFd, elapsed: Duration) -> (u64, u64) {
    // A periodic timer that nobody reads rests after an expiration: it shows no time left.
    let rests = image.owes();
    let value = if rests { image.interval } else { image.value };
    let elapsed = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    match (value.checked_sub(elapsed), image.interval) {
        _ if value == 0 => (0, image.ticks),
        (Some(left @ 1..), _) => (left, image.ticks),
        // It expires as soon as it is set.
        (_, 0) => (1, image.ticks),
        (_, interval) => {
            let over = elapsed - value;
            (interval - over % interval, image.ticks + 1 + over / interval)
        }
    }
}

/// A timer that a change of the clock ends (TFD_TIMER_CANCEL_ON_SET) must be set to a time of day.
fn cancelled_on_set(
    image: &TimerFd,
    when: Expiration,
    left: TimeSpec,
) -> SysResult<(Expiration, TimerSetTimeFlags)> {
    let flags = TimerSetTimeFlags::from_bits_truncate(image.set_flags);
    if !flags.contains(TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET) {
        return Ok((when, TimerSetTimeFlags::empty()));
    }
    let clock = nix::time::ClockId::CLOCK_REALTIME;
    let now = sys(nix::time::clock_gettime(clock), "clock_gettime", || "the time of day".into())?;
    let when = match when {
        Expiration::IntervalDelayed(_, every) => Expiration::IntervalDelayed(now + left, every),
        _ => Expiration::OneShot(now + left),
    };
    Ok((when, flags))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::State;

    #[test]
    fn a_periodic_timer_expires_while_it_stands_still() {
        let timer =
            |value, interval, ticks| TimerFd { value, interval, ticks, ..TimerFd::default() };
        let after = |timer: &TimerFd, nanos| due(timer, Duration::from_nanos(nanos));
        assert_eq!(after(&timer(0, 0, 0), 9), (0, 0), "disarmed");
        assert_eq!(after(&timer(0, 0, 3), 9), (0, 3), "disarmed and unread");
        assert_eq!(after(&timer(10, 0, 0), 4), (6, 0));
        assert_eq!(after(&timer(10, 0, 0), 10), (1, 0), "at once");
        assert_eq!(after(&timer(10, 5, 2), 4), (6, 2));
        assert_eq!(after(&timer(10, 5, 2), 10), (5, 3));
        assert_eq!(after(&timer(10, 5, 2), 21), (4, 5));
        assert_eq!(after(&timer(0, 5, 2), 5), (5, 3), "one that rests");
    }

    fn read(fd: &OwnedFd) -> Vec<u8> {
        let mut buf = vec![0; 256 << 10];
        let n = nix::unistd::read(fd, &mut buf).expect("read");
        buf.truncate(n);
        buf
    }

    fn make(state: &State, elapsed: Duration) -> Vec<OwnedFd> {
        let held = Held::default();
        let init = std::process::id() as i32;
        let terminals = Terminals::default();
        let hosts = BTreeMap::new();
        let strict = false;
        let place = Place { held: &held, init, elapsed, hosts, terminals: &terminals, strict };
        create_all(state, &place, &mut Script::default()).expect("made")
    }

    fn described(flags: i32, kind: Kind) -> Description {
        Description { flags, kind }
    }

    #[test]
    fn pipes_have_their_contents_and_each_end_its_descriptions() {
        let contents: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        let state = State {
            pipes: vec![
                Pipe { capacity: 256 << 10, contents: contents.clone(), packets: vec![200_000] },
                Pipe { capacity: 65536, contents: b"last words".to_vec(), packets: vec![10] },
            ],
            descriptions: vec![
                described(libc::O_RDONLY, Kind::Pipe(0)),
                described(libc::O_WRONLY | libc::O_NONBLOCK, Kind::Pipe(0)),
                described(libc::O_RDONLY | libc::O_NONBLOCK, Kind::Pipe(0)),
                described(libc::O_RDONLY, Kind::Pipe(1)),
            ],
            ..State::default()
        };
        let made = make(&state, Duration::ZERO);
        assert_eq!(read(&made[0]), contents);
        write(&made[1], b"x").expect("written");
        assert_eq!(read(&made[2]), b"x", "another description of the same end");
        for (fd, d) in made.iter().zip(&state.descriptions) {
            let flags = fcntl(fd, FcntlArg::F_GETFL).expect("flags");
            let known = libc::O_ACCMODE | libc::O_NONBLOCK;
            assert_eq!(flags & known, d.flags & known);
        }
        assert_eq!(read(&made[3]), b"last words");
        assert_eq!(read(&made[3]), b"", "nobody can write any more");
    }

    #[test]
    fn counters_and_timers_go_on() {
        let hour = 3_600_000_000_000;
        let timer = |value, interval, ticks| {
            let clock = libc::CLOCK_MONOTONIC;
            Kind::TimerFd(TimerFd { clock, ticks, set_flags: 0, value, interval })
        };
        let state = State {
            descriptions: vec![
                described(libc::O_RDWR, Kind::EventFd { count: 1 << 40, semaphore: false }),
                described(libc::O_RDWR, timer(hour, hour, 5)),
                described(libc::O_RDWR, timer(hour, 0, 0)),
                described(libc::O_RDWR | libc::O_NONBLOCK, timer(0, 0, 0)),
                described(libc::O_RDWR, timer(0, 1_000_000, 2)),
            ],
            ..State::default()
        };
        let made = make(&state, Duration::from_secs(3600));
        let number = |fd| u64::from_ne_bytes(read(fd).try_into().expect("eight bytes"));
        assert_eq!(number(&made[0]), 1 << 40);
        assert_eq!(number(&made[1]), 6, "five before, and one meanwhile");
        assert_eq!(number(&made[2]), 1, "due by now");
        assert!(nix::unistd::read(&made[3], &mut [0; 8]).is_err(), "not armed");
        assert!(number(&made[4]) >= 2, "expired, and to be armed by this read");
        assert!(number(&made[4]) >= 1, "periodic");
    }
}
