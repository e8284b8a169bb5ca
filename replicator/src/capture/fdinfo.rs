//! /proc/PID/fdinfo: one read gives the flags, offset and inode of a descriptor and, for epoll,
//! eventfd, timerfd and others, all of their state.

use super::CaptureError;
use crate::image::{EpollTarget, TimerFd};
use std::fs;

/// fdinfo of one descriptor.
#[derive(Clone, Debug, Default)]
pub(super) struct Info {
    pub(super) pos: u64,
    pub(super) flags: i32,
    pub(super) inode: u64,
    pub(super) mount: u64,
    /// What stands for its name in a glance, see `Row::name`.
    pub(super) name: Option<[u64; 4]>,
    /// If it is a pipe that a glance showed empty: how many bytes it may hold.
    pub(super) empty_pipe: Option<u32>,
    /// Not of fdinfo: what stands for the kind of file, if a glance showed it.
    pub(super) operations: u64,
    pub(super) epoll: Vec<EpollTarget>,
    /// The files of these, in the same order.
    pub(super) watched: Vec<Watched>,
    pub(super) eventfd: Option<(u64, bool)>,
    pub(super) timer: TimerFd,
    pub(super) locks: Vec<Lock>,
    /// Mask of a signalfd.
    pub(super) signals: Option<u64>,
    /// Host pid of a pidfd; -1: it has ended.
    pub(super) pidfd: Option<i32>,
    pub(super) watches: Vec<Watch>,
}

/// A line of a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lock {
    /// FLOCK, POSIX, OFDLCK, LEASE
    pub(super) kind: String,
    /// ADVISORY, or of a lease ACTIVE, BREAKING, BREAKER.
    pub(super) mode: String,
    pub(super) exclusive: bool,
    pub(super) start: u64,
    pub(super) end: Option<u64>,
}

/// A watch of an inotify instance: number, what (device as the kernel numbers it, inode, type and
/// bytes of the file handle), flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watch {
    pub(super) number: i32,
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) mask: u32,
    pub(super) handle: (i32, Vec<u8>),
}

/// proc_pid_fdinfo(5).
pub(super) fn info(pid: i32, number: i32) -> Result<Info, CaptureError> {
    let path = format!("/proc/{pid}/fdinfo/{number}");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    parse_info(&text)
        .ok_or_else(|| CaptureError::proc(&path, std::io::ErrorKind::InvalidData.into()))
}

/// A file that an epoll instance watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watched {
    pub(super) inode: u64,
    /// What stands for it in glances; 0: not known.
    pub(super) file: u64,
}

fn parse_info(text: &str) -> Option<Info> {
    let mut i = Info::default();
    let mut semaphore = false;
    let mut count = None;
    for line in text.lines() {
        if let Some(watch) = line.strip_prefix("inotify ") {
            i.watches.push(watch_line(watch)?);
            continue;
        }
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "pos" => i.pos = value.parse().ok()?,
            "flags" => i.flags = i32::from_str_radix(value, 8).ok()?,
            "ino" => i.inode = value.parse().ok()?,
            "mnt_id" => i.mount = value.parse().ok()?,
            "tfd" => {
                let (target, inode) = epoll_target(value)?;
                i.watched.push(Watched { inode, file: 0 });
                i.epoll.push(target);
            }
            "eventfd-count" => count = Some(u64::from_str_radix(value, 16).ok()?),
            "eventfd-semaphore" => semaphore = value == "1",
            "lock" => i.locks.push(lock(value)?),
            "sigmask" => i.signals = Some(u64::from_str_radix(value, 16).ok()?),
            "Pid" => i.pidfd = Some(value.parse().ok()?),
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
fn epoll_target(value: &str) -> Option<(EpollTarget, u64)> {
    let mut words = value.split_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut events = None;
    let mut data = None;
    let mut inode = 0;
    while let Some(word) = words.next() {
        if let Some(number) = word.strip_prefix("ino:") {
            inode = u64::from_str_radix(number, 16).ok()?;
        }
        match word {
            "events:" => events = u32::from_str_radix(words.next()?, 16).ok(),
            "data:" => data = u64::from_str_radix(words.next()?, 16).ok(),
            _ => {}
        }
    }
    Some((EpollTarget { fd, events: events?, data: data? }, inode))
}

/// `1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF`
fn lock(value: &str) -> Option<Lock> {
    let mut words = value.split_whitespace().skip(1);
    let (kind, mode) = (words.next()?.to_owned(), words.next()?.to_owned());
    let exclusive = words.next()? == "WRITE";
    let (start, end) = (words.nth(2)?.parse().ok()?, words.next()?.parse().ok());
    Some(Lock { kind, mode, exclusive, start, end })
}

/// `wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1
/// f_handle:7e9e0000640d1b6d`
fn watch_line(line: &str) -> Option<Watch> {
    let mut w = Watch::default();
    for word in line.split_whitespace() {
        let (key, value) = word.split_once(':')?;
        let hex = || u64::from_str_radix(value, 16).ok();
        match key {
            "wd" => w.number = value.parse().ok()?,
            "ino" => w.inode = hex()?,
            "sdev" => w.device = hex()?,
            "mask" => w.mask = hex()? as u32,
            "fhandle-type" => w.handle.0 = hex()? as i32,
            "f_handle" => {
                let byte = |at: usize| u8::from_str_radix(value.get(at..at + 2)?, 16).ok();
                w.handle.1 = (0..value.len() / 2).map_while(|i| byte(2 * i)).collect();
            }
            _ => {}
        }
    }
    Some(w)
}

/// `(seconds, nanoseconds)`
fn timespec(value: &str) -> Option<u64> {
    let (s, ns) = value.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some(s.trim().parse::<u64>().ok()? * 1_000_000_000 + ns.trim().parse::<u64>().ok()?)
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
        assert_eq!(i.watched, [Watched { inode: 6, file: 0 }]);
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
        let lock = Lock {
            kind: "FLOCK".into(),
            mode: "ADVISORY".into(),
            exclusive: true,
            start: 0,
            end: None,
        };
        assert_eq!(i.expect("a file").locks, [lock]);
        let i = parse_info(
            "pos:\t0\nflags:\t02\n\
             inotify wd:3 ino:9e sdev:800013 mask:fce ignored_mask:0 fhandle-bytes:8 \
             fhandle-type:1 f_handle:7e9e0000\n",
        );
        let handle = (1, vec![0x7e, 0x9e, 0, 0]);
        let watch = Watch { number: 3, device: 0x80_0013, inode: 0x9e, mask: 0xfce, handle };
        assert_eq!(i.expect("an inotify instance").watches, [watch]);
        assert!(parse_info("pos:\tx\n").is_none());
    }
}
