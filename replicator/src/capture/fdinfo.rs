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
    pub(super) epoll: Vec<EpollTarget>,
    pub(super) eventfd: Option<(u64, bool)>,
    pub(super) timer: TimerFd,
    pub(super) locked: bool,
}

/// proc_pid_fdinfo(5).
pub(super) fn info(pid: i32, number: i32) -> Result<Info, CaptureError> {
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
