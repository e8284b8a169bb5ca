//! What a network namespace is set up to do, and whether that has changed: rtnetlink(7).

use super::error::{SysError, SysResult, check};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

/// RTMGRP_ bits: links, addresses, routes and rules of both families.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;
const GET_LINK: u16 = 18;
const GET_ADDRESS: u16 = 22;
const GET_ROUTE: u16 = 26;
const GET_RULE: u16 = 34;
/// NLM_F_REQUEST | NLM_F_DUMP
const DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// IFA_F_PERMANENT: not given by a router.
const PERMANENT: u8 = 0x80;
const SCOPE_LINK: u8 = 253;
/// RTPROT_: up to the kernel's own, and what routers say (redirect, RA).
const PROTOCOLS_OF_THE_KERNEL: [u8; 4] = [0, 1, 2, 9];
/// RT_TABLE_LOCAL
const LOCAL: u8 = 255;
const ATTRIBUTE_DST: u16 = 1;
const ATTRIBUTE_IFA_LOCAL: u16 = 2;
const ATTRIBUTE_IFNAME: u16 = 3;
const ATTRIBUTE_OIF: u16 = 4;
const ATTRIBUTE_GATEWAY: u16 = 5;
const ATTRIBUTE_PRIORITY: u16 = 6;

/// Devices, addresses, routes and rules of a network namespace that somebody has made there, in
/// words. What the kernel makes by itself is left out: link-local addresses, routes to its own
/// addresses and networks, and what routers announce.
pub type Settings = BTreeSet<String>;

/// Watches the settings of one network namespace.
#[derive(Debug)]
pub struct RouteWatch {
    news: OwnedFd,
    asked: OwnedFd,
}

impl RouteWatch {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> SysResult<Self> {
        let failed = |call| move |e: Errno| SysError::errno(call, "NETLINK_ROUTE", e as i32);
        let new = || {
            let flags = SockFlag::SOCK_CLOEXEC;
            let route = SockProtocol::NetlinkRoute;
            socket(AddressFamily::Netlink, SockType::Raw, flags, route).map_err(failed("socket"))
        };
        let me = Self { news: new()?, asked: new()? };
        bind(me.news.as_raw_fd(), &NetlinkAddr::new(0, GROUPS)).map_err(failed("bind"))?;
        Ok(me)
    }

    /// Whether anything has changed since the last call.
    pub fn has_news(&self) -> SysResult<bool> {
        let mut heard = false;
        loop {
            let mut buffer = [0u8; 256];
            match recv(self.news.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                // More was told than the queue holds.
                Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(heard),
                Err(e) => return Err(SysError::errno("recv", "NETLINK_ROUTE", e as i32)),
            }
        }
    }

    /// The settings as they are now.
    pub fn settings(&self) -> SysResult<Settings> {
        let mut all = Settings::new();
        let mut names = BTreeMap::new();
        self.dump(GET_LINK, 16, |m| {
            let index = word(m, 4).unwrap_or(0);
            if let Some(name) = attribute(m, 16, ATTRIBUTE_IFNAME) {
                let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
                all.insert(format!("device {name}"));
                names.insert(index, name);
            }
        })?;
        let name_of =
            |index: u32| names.get(&index).map_or_else(|| format!("device {index}"), Clone::clone);
        self.dump(GET_ADDRESS, 8, |m| all.extend(address(m, &name_of)))?;
        self.dump(GET_ROUTE, 12, |m| all.extend(route(m, &name_of)))?;
        self.dump(GET_RULE, 12, |m| all.extend(rule(m)))?;
        Ok(all)
    }

    /// Asks for all objects of a kind; `len` is that of the kind's fixed part.
    fn dump(&self, kind: u16, len: usize, mut each: impl FnMut(&[u8])) -> SysResult<()> {
        let mut request = Vec::with_capacity(HEADER + len);
        request.extend(((HEADER + len) as u32).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(DUMP.to_ne_bytes());
        request.extend([0; 8]);
        request.resize(HEADER + len, 0);
        let what = || format!("rtnetlink request {kind}");
        let failed = |call| move |e: Errno| SysError::errno(call, what(), e as i32);
        send(self.asked.as_raw_fd(), &request, MsgFlags::empty()).map_err(failed("send"))?;
        let mut buffer = vec![0u8; 32 << 10];
        loop {
            let n = match recv(self.asked.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(failed("recv"))?,
            };
            let mut rest = &buffer[..n];
            while let Some(len) = word(rest, 0).map(|l| l as usize) {
                let Some(message) = rest.get(..len).filter(|m| m.len() >= HEADER) else { break };
                match word(message, 4).unwrap_or(0) as u16 {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let errno = word(message, HEADER).unwrap_or(0) as i32;
                        return check(if errno == 0 { 0 } else { -1 }, "rtnetlink", what)
                            .map(drop)
                            .map_err(|_| SysError::errno("rtnetlink", what(), -errno));
                    }
                    _ => each(&message[HEADER..]),
                }
                rest = rest.get((len + 3) & !3..).unwrap_or_default();
            }
        }
    }
}

/// An address, from struct ifaddrmsg and its attributes.
fn address(m: &[u8], name_of: &dyn Fn(u32) -> String) -> Option<String> {
    let &[_, prefix, flags, scope, ..] = m else { return None };
    if flags & PERMANENT == 0 || scope == SCOPE_LINK {
        return None;
    }
    let own = attribute(m, 8, ATTRIBUTE_IFA_LOCAL).or_else(|| attribute(m, 8, ATTRIBUTE_DST));
    let device = name_of(word(m, 4)?);
    // Bringing a loopback device up gives it these.
    let own = ip(own?)?;
    (!own.is_loopback()).then(|| format!("address {own}/{prefix} of {device}"))
}

/// A route, from struct rtmsg and its attributes.
fn route(m: &[u8], name_of: &dyn Fn(u32) -> String) -> Option<String> {
    let &[family, prefix, _, _, table, protocol, _, kind, ..] = m else { return None };
    // Beside the families of addresses there are routes of multicast.
    let known = [libc::AF_INET as u8, libc::AF_INET6 as u8].contains(&family);
    if !known || PROTOCOLS_OF_THE_KERNEL.contains(&protocol) || table == LOCAL {
        return None;
    }
    let number = |a: u16| attribute(m, 12, a).and_then(|v| word(v, 0));
    let to = attribute(m, 12, ATTRIBUTE_DST).and_then(ip);
    let to = to.map_or_else(|| format!("default ({family})"), |to| format!("{to}/{prefix}"));
    let via = attribute(m, 12, ATTRIBUTE_GATEWAY).and_then(ip);
    let via = via.map_or(String::new(), |via| format!(" via {via}"));
    let device = number(ATTRIBUTE_OIF).map_or(String::new(), |i| format!(" by {}", name_of(i)));
    let metric = number(ATTRIBUTE_PRIORITY).unwrap_or(0);
    Some(format!("route to {to}{via}{device} (table {table}, metric {metric}, type {kind})"))
}

/// A rule of routing, from struct fib_rule_hdr and its attributes.
fn rule(m: &[u8]) -> Option<String> {
    let &[family, ..] = m else { return None };
    let priority = attribute(m, 12, ATTRIBUTE_PRIORITY).and_then(|v| word(v, 0)).unwrap_or(0);
    let sum = xxhash_rust::xxh3::xxh3_64(m);
    Some(format!("rule with priority {priority} (family {family}, {sum:x})"))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).map(|b| u32::from_ne_bytes(b.try_into().expect("four bytes")))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|b| Ipv4Addr::from(b).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|b| Ipv6Addr::from(b).into()),
        _ => None,
    }
}

/// The value of an attribute behind a fixed part.
fn attribute(m: &[u8], fixed: usize, wanted: u16) -> Option<&[u8]> {
    let mut at = fixed;
    loop {
        let head = word(m, at)?;
        let (len, kind) = ((head & 0xffff) as usize, (head >> 16) as u16 & 0x3fff);
        let value = m.get(at + 4..at + len)?;
        if kind == wanted {
            return Some(value);
        }
        at += (len + 3) & !3;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::process::Command;

    fn ip_command(line: &str) {
        let done = Command::new("ip").args(line.split(' ')).output().expect("ip is installed");
        assert!(done.status.success(), "ip {line}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// What came and what went.
    fn changes(watch: &RouteWatch, line: &str) -> (Vec<String>, Vec<String>) {
        let before = watch.settings().expect("asked");
        assert!(
            !watch.has_news().expect("asked") || line.starts_with("link"),
            "quiet before {line}"
        );
        ip_command(line);
        assert!(watch.has_news().expect("asked"), "{line} is heard of");
        let after = watch.settings().expect("asked");
        let less = |a: &Settings, b: &Settings| a.difference(b).cloned().collect();
        (less(&after, &before), less(&before, &after))
    }

    #[test]
    fn what_somebody_sets_up_is_told_and_what_the_kernel_does_is_not() {
        if !nix::unistd::Uid::effective().is_root()
            || Command::new("ip").arg("-V").output().is_err()
        {
            return;
        }
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            let watch = RouteWatch::open().expect("opened");
            let devices: Vec<String> = watch.settings().expect("asked").into_iter().collect();
            assert!(devices.contains(&"device lo".to_owned()), "{devices:?}");
            assert_eq!(changes(&watch, "link set lo up"), (vec![], vec![]));
            let made = |line: &str, what: &str| {
                // Of a device that comes up the kernel may say more a moment later.
                while watch.has_news().expect("asked") {}
                let (new, gone) = changes(&watch, line);
                assert!(gone.is_empty() && new.len() == 1 && new[0].starts_with(what), "{new:?}");
            };
            made("tuntap add dev t0 mode tap", "device t0");
            ip_command("link set t0 up");
            made("addr add 10.9.0.1/24 dev t0", "address 10.9.0.1/24 of t0");
            made("addr add fd00::1/64 dev t0 nodad", "address fd00::1/64 of t0");
            made("route add 10.10.0.0/16 via 10.9.0.2", "route to 10.10.0.0/16 via 10.9.0.2 by t0");
            made("rule add from 10.9.0.1 table 100", "rule with priority");
            let (new, gone) = changes(&watch, "addr del 10.9.0.1/24 dev t0");
            assert!(new.is_empty(), "{new:?}");
            // The route that needed it goes along.
            assert_eq!(gone.len(), 2, "{gone:?}");
        });
        thread.join().expect("no panic");
    }

    #[test]
    fn odd_messages_are_no_settings() {
        let name_of = |index: u32| index.to_string();
        for len in 0..40 {
            let bytes = vec![0xff; len];
            let _ = (address(&bytes, &name_of), route(&bytes, &name_of), rule(&bytes));
        }
        assert_eq!(attribute(&[0; 40], 8, 1), None);
    }
}
