//! What an open file description is, and what there is to say of it. What a checkpoint cannot hold
//! is refused by name.

use super::seen::Seen;
use super::{Builder, Files, Holder, Whole};
use crate::capture::fdinfo::{self, Info};
use crate::capture::objects::{Class, Objects};
use crate::capture::{
    ATTRIBUTES, CaptureError, inet, inotify, options, pipes, tcp, terminals, unix,
};
use crate::image::Kind;
use crate::image::net::RawOptions;
use crate::sys::descriptors::count_expirations;
use crate::sys::{SysError, pidfd};
use nix::sys::stat::{major, minor};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

impl Files {
    pub(super) fn describe(
        &mut self,
        holder: Holder<'_>,
        number: i32,
        info: &Info,
        whole: &mut Whole<'_>,
        what: &str,
    ) -> Result<Kind, CaptureError> {
        let Holder { pid, handle, place } = holder;
        let seen = self.look(pid, handle, number, info, ATTRIBUTES)?;
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
            "anon_inode:[timerfd]" => {
                let mut timer = info.timer;
                if timer.owes() {
                    count_expirations(pidfd::get_fd(handle, number)?.as_fd())?;
                    timer = fdinfo::info(pid, number)?.timer;
                }
                if timer.value != 0 {
                    timer.value += builder.since_clocks();
                }
                Ok(Kind::TimerFd(timer))
            }
            "anon_inode:[signalfd]" => Ok(Kind::SignalFd(info.signals.unwrap_or(0))),
            "anon_inode:inotify" | "anon_inode:[inotify]" => {
                let dup = pidfd::get_fd(handle, number)?;
                let known = (&mut memory.paths, memory.layer.as_deref());
                inotify::instance(dup.as_fd(), place, info, what, known)
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
                let key = (false, info.inode);
                pipes::pipe(handle, number, key, info.empty_pipe, builder, state).map(Kind::Pipe)
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
                    let pipe = pipes::pipe(handle, number, key, info.empty_pipe, builder, state)?;
                    return Ok(Kind::Fifo { path, pipe });
                }
                let fd = || format!("/proc/{pid}/fd/{number}");
                if let Some(why) = memory.homes.refuse(link, seen.mode, info, objects, fd) {
                    return refuse(why);
                }
                file(seen, info, what)
            }
            link => match link.split_once(":[") {
                Some((name, _)) if !name.starts_with("anon_inode") => {
                    namespace(name, info.inode, builder, what)
                }
                _ => refuse(format!("{}; close it, or run the program without", known_as(link))),
            },
        }
    }
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
pub(super) fn deleted(
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
    let own = objects.systems().own.contains(&(major(stat.st_dev) << 32 | minor(stat.st_dev)));
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

fn file(seen: &mut Seen, info: &Info, what: &str) -> Result<Kind, CaptureError> {
    let link = &seen.link;
    if link.starts_with("/dev/pts/") || link.starts_with("/dev/tty") {
        return Err(CaptureError::unsupported(what.into(), format!("the terminal {link}")));
    }
    Ok(Kind::File { path: seen.take_path(), offset: info.pos })
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
    for (outside, inside) in builder.inner.iter() {
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
