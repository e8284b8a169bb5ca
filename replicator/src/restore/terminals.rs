//! Pseudo terminals of a spare. They are made as soon as a checkpoint has them: a process has the
//! terminal of its session from the moment it is born, so the leader must have it before.
//!
//! Invariant: each is there under its number, in the container's own devpts; what waits in it is
//! put in at the failover.

use super::error::{Doing, RestoreError, sys};
use super::script::Script;
use super::spare::{CHANNEL, Spare, Stub};
use crate::image::terminal::{OtherEnd, Terminal};
use crate::image::{Kind, State};
use crate::pty as queues;
use crate::sys::{SysError, SysResult, pty};
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// More terminals than that are not looked through for a number.
const MOST: usize = 4096;

/// The terminals of a spare, by number.
#[derive(Debug, Default)]
pub(super) struct Terminals(BTreeMap<u32, Made>);

#[derive(Debug)]
struct Made {
    master: OwnedFd,
    /// Pid and birth of the leader whose session it controls.
    leader: Option<(i32, u64)>,
}

fn wanted(state: &State) -> impl Iterator<Item = &Terminal> {
    state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Terminal(t) => Some(&**t),
        _ => None,
    })
}

impl Spare {
    /// Makes the terminals of a checkpoint, and drops those that it has not.
    pub(super) fn follow_terminals(&mut self, state: &State) -> SysResult<()> {
        let born = |pid| state.processes.iter().find(|p| p.pid == pid).map(|p| p.place.born);
        for made in self.terminals.0.values_mut() {
            // The end of a leader frees its terminal.
            let lives = |(pid, at): &(i32, u64)| born(*pid) == Some(*at);
            made.leader = made.leader.filter(lives);
        }
        self.terminals.0.retain(|index, made| {
            let same = |t: &Terminal| made.leader.is_none_or(|(pid, _)| pid == t.session);
            wanted(state).any(|t| t.index == *index && same(t))
        });
        for t in wanted(state) {
            if !self.terminals.0.contains_key(&t.index) {
                let master = make(self.launched.pid, t)?;
                self.terminals.0.insert(t.index, Made { master, leader: None });
            }
        }
        Ok(())
    }

    /// Gives leaders of sessions their terminals.
    pub(super) fn give_terminals(&mut self, state: &State) -> Result<(), RestoreError> {
        for t in wanted(state).filter(|t| t.session != 0) {
            let Some(made) = self.terminals.0.get_mut(&t.index) else { continue };
            let leads = |s: &&Stub| s.pid == t.session && s.sid == s.pid;
            let Some(leader) = self.stubs.iter().find(leads) else { continue };
            let process = state.processes.iter().find(|p| p.pid == leader.pid);
            if made.leader.is_some() || process.is_none_or(|p| p.place.born != leader.born) {
                continue;
            }
            made.leader = Some((leader.pid, leader.born));
            let request = (libc::TIOCSCTTY, "TIOCSCTTY", 0);
            let channel = self.launched.control();
            call(&mut self.script, channel, leader.host, &made.master, request)
                .doing(leader.pid, "give it its terminal")?;
        }
        Ok(())
    }
}

impl Terminals {
    /// The controlling end, for a descriptor.
    pub(super) fn master(&self, index: u32) -> SysResult<OwnedFd> {
        let master = &self.get(index)?.master;
        master.try_clone().map_err(|source| SysError { call: "dup", object: named(index), source })
    }

    /// The other end, opened anew.
    pub(super) fn end(&self, index: u32, flags: i32) -> SysResult<OwnedFd> {
        let kept = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND;
        pty::peer(self.get(index)?.master.as_fd(), flags & kept)
    }

    fn get(&self, index: u32) -> SysResult<&Made> {
        self.0.get(&index).ok_or_else(|| SysError::errno("search", named(index), libc::ENOENT))
    }

    /// Puts in what waits, and sets modes and owners. To be done before any end is handed out.
    pub(super) fn fill(&self, state: &State) -> SysResult<()> {
        for t in wanted(state) {
            let master = self.get(t.index)?.master.as_fd();
            pty::set_window(master, &t.window)?;
            let termios = queues::attributes(t, pty::attributes(master)?);
            if t.other == OtherEnd::New && t.session == 0 {
                pty::set_attributes(master, &termios)?;
                pty::set_packets(master, t.packets)?;
                continue;
            }
            let peer = queues::open_peer(master, false)?;
            let (mode, uid, gid) = t.owner;
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            sys(fchown(&peer, owner.0, owner.1), "fchown", || named(t.index))?;
            let mode = Mode::from_bits_truncate(mode);
            sys(fchmod(&peer, mode), "fchmod", || named(t.index))?;
            queues::fill(master, peer.as_fd(), t, &termios)?;
        }
        Ok(())
    }

    /// Locks, foreground groups, processes that have given their terminal up. When all other ends
    /// were opened.
    pub(super) fn settle(
        &self,
        state: &State,
        stubs: &[Stub],
        script: &mut Script,
        channel: &UnixStream,
    ) -> Result<(), RestoreError> {
        const DOING: &str = "set whom its terminal controls";
        for t in wanted(state) {
            let master = &self.get(t.index).doing(1, DOING)?.master;
            let host = |pid| stubs.iter().find(|s| s.pid == pid).map(|s| s.host);
            if let Some(leader) = host(t.session)
                && t.foreground != 0
            {
                let request = (libc::TIOCSPGRP, "TIOCSPGRP", t.foreground);
                call(script, channel, leader, master, request).doing(t.session, DOING)?;
            }
            for pid in &t.without {
                let Some(host) = host(*pid) else { continue };
                let request = (libc::TIOCNOTTY, "TIOCNOTTY", 0);
                call(script, channel, host, master, request).doing(*pid, DOING)?;
            }
        }
        Ok(())
    }

    /// What keeps others from opening an end, last of all; and the ends are the program's alone.
    pub(super) fn finish(&mut self, state: &State) -> SysResult<()> {
        for t in wanted(state) {
            let master = self.get(t.index)?.master.as_fd();
            if t.exclusive {
                pty::set_exclusive(queues::open_peer(master, false)?.as_fd())?;
            }
            pty::set_locked(master, t.locked)?;
        }
        self.0.clear();
        Ok(())
    }
}

fn named(index: u32) -> String {
    format!("the terminal /dev/pts/{index}")
}

/// A terminal with this number, in the devpts of the container.
fn make(init: i32, t: &Terminal) -> SysResult<OwnedFd> {
    let path = format!("/proc/{init}/root{}", t.path);
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    // The kernel gives the lowest number that is free: those before are held until it comes.
    let mut before = Vec::new();
    while before.len() < MOST {
        let master = sys(open(path.as_str(), flags, Mode::empty()), "open", || t.path.clone())?;
        let index = pty::index(master.as_fd())?;
        if index == t.index {
            pty::set_locked(master.as_fd(), false)?;
            return Ok(master);
        }
        if index > t.index {
            break;
        }
        before.push(master);
    }
    Err(SysError::errno("make a terminal with its number", named(t.index), libc::EBUSY))
}

/// Has a process that has no descriptors but its channel make a request of a terminal.
fn call(
    script: &mut Script,
    channel: &UnixStream,
    host: i32,
    master: &OwnedFd,
    (request, name, argument): (libc::c_ulong, &'static str, i32),
) -> SysResult<()> {
    let peer = queues::open_peer(master.as_fd(), false)?;
    let byte = script.data(&[0]);
    let iov = script.words(&[byte, 1]);
    let control = script.data(&[0; 24]);
    // struct msghdr: name, its length, iov, its count, control, its length, flags.
    let header = script.words(&[0, 0, iov, 1, control, 24, 0]);
    let argument = match argument {
        0 => 0,
        number => script.data(&number.to_ne_bytes()),
    };
    script.call("recvmsg", libc::SYS_recvmsg, &[CHANNEL as u64, header, 0]);
    // It became the lowest free one.
    script.call(name, libc::SYS_ioctl, &[0, request, argument]);
    script.call("close", libc::SYS_close, &[0]);
    let rights = [peer.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&rights)];
    let (fd, data) = (channel.as_raw_fd(), [IoSlice::new(&[0])]);
    let sent = sendmsg::<UnixAddr>(fd, &data, &rights, MsgFlags::MSG_DONTWAIT, None);
    sys(sent, "sendmsg", || "a terminal".into())?;
    script.run_ok(host).map(drop)
}
