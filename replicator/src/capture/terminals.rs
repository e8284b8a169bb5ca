//! Pseudo terminals of the container: both ends, what waits in them, whom they control.
//!
//! A terminal is known by its controlling end, which the container must hold: what the other side
//! of a terminal does outside of it (a window, ssh) is in no checkpoint.

use super::CaptureError;
use crate::image::terminal::{OtherEnd, Terminal};
use crate::image::{Kind, State};
use crate::pty as queues;
use crate::sys::{SysError, pty};
use nix::sys::stat::{FileStat, SFlag, fstat, major, minor};
use nix::unistd::{Pid, getpgid};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

const PTMX: (u64, u64) = (5, 2);
const DEV_TTY: (u64, u64) = (5, 0);
const UNIX98: u64 = 136;

/// What a stop has met so far. It holds duplicates: to be dropped before the thaw.
#[derive(Debug, Default)]
pub(super) struct Terminals {
    masters: BTreeMap<u32, OwnedFd>,
    /// Numbers whose other end is open, and where that was found.
    ends: BTreeMap<u32, String>,
    /// Processes (host pids) that a terminal controlled before the stop, and its number.
    controlled: Vec<(i32, u32)>,
}

/// Whether a path may be one of a terminal.
pub(super) fn may_be(path: &str) -> bool {
    path.contains("/pts/")
        || path.contains("/tty")
        || path.ends_with("/ptmx")
        || path.ends_with("/console")
}

/// What /proc/PID/stat says of a controlling terminal: its number; none if there is none.
pub(super) fn of_stat(word: i32) -> Result<Option<u32>, (u32, u32)> {
    let dev = word as u32;
    let (major, minor) = ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00));
    match (major, minor) {
        (0, 0) => Ok(None),
        (major, index) if u64::from(major) == UNIX98 => Ok(Some(index)),
        other => Err(other),
    }
}

impl Terminals {
    /// What a descriptor of a terminal is; none if it is of something else.
    pub(super) fn describe(
        &mut self,
        dup: OwnedFd,
        path: &str,
        what: &str,
    ) -> Result<Option<Kind>, CaptureError> {
        let stat = fstat(&dup).map_err(|e| SysError::errno("fstat", what.to_owned(), e as i32))?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR {
            return Ok(None);
        }
        let refuse = |why: String| Err(CaptureError::unsupported(what.to_owned(), why));
        let number = match device(&stat) {
            PTMX => {
                let index = pty::index(dup.as_fd())?;
                self.masters.insert(index, dup);
                let path = path.to_owned();
                return Ok(Some(Kind::Terminal(Box::new(Terminal {
                    index,
                    path,
                    ..Terminal::default()
                }))));
            }
            (UNIX98, index) => index as u32,
            DEV_TTY => match pty::device(dup.as_fd())? {
                (major, index) if u64::from(major) == UNIX98 => index,
                _ => return refuse(format!("the terminal {path}; {REMEDY}")),
            },
            // Other terminals of the kernel: consoles and serial lines.
            (4 | 5 | 204, _) => return refuse(format!("the terminal {path}; {REMEDY}")),
            _ => return Ok(None),
        };
        if path.ends_with(" (deleted)") {
            let why = format!("the terminal {path}, whose other end was closed; close it");
            return refuse(why);
        }
        self.ends.entry(number).or_insert_with(|| what.to_owned());
        Ok(Some(Kind::TerminalEnd(number)))
    }

    /// A process that a terminal controls.
    pub(super) fn add_controlled(&mut self, pid: i32, terminal: u32) {
        self.controlled.push((pid, terminal));
    }

    /// Reads all, and puts back what had to be taken out for that. `inner` are pids inside by
    /// those outside, `init` the container's first process.
    pub(super) fn finish(
        &self,
        init: i32,
        inner: &HashMap<i32, i32>,
        state: &mut State,
    ) -> Result<(), CaptureError> {
        for (index, what) in &self.ends {
            if !self.masters.contains_key(index) {
                let why =
                    format!("the terminal /dev/pts/{index}, whose other end is outside; {REMEDY}");
                return Err(CaptureError::unsupported(what.clone(), why));
            }
        }
        for (pid, index) in &self.controlled {
            if !self.masters.contains_key(index) {
                let why = format!(
                    "the terminal /dev/pts/{index} controls it, whose other end is outside; run it \
                     in a session of its own (setsid)"
                );
                return Err(CaptureError::unsupported(format!("pid {pid}"), why));
            }
        }
        if self.masters.is_empty() {
            return Ok(());
        }
        let mut all = Vec::new();
        for (at, d) in state.descriptions.iter().enumerate() {
            let Kind::Terminal(t) = &d.kind else { continue };
            let Some(master) = self.masters.get(&t.index) else { continue };
            let mut t = (**t).clone();
            self.read(init, master, &mut t)?;
            all.push((at, t));
        }
        for (_, t) in &mut all {
            let Some(master) = self.masters.get(&t.index) else { continue };
            set_session(master, inner, state, t)?;
        }
        for (at, t) in all {
            state.descriptions[at].kind = Kind::Terminal(Box::new(t));
        }
        Ok(())
    }

    fn read(&self, init: i32, master: &OwnedFd, t: &mut Terminal) -> Result<(), CaptureError> {
        let fd = master.as_fd();
        t.packets = pty::has_packets(fd)?;
        if t.packets && pty::events(fd)? & libc::POLLPRI != 0 {
            return Err(CaptureError::Transient("the state of a terminal is to be read"));
        }
        let termios = pty::attributes(fd)?;
        t.attributes = termios.to_vec();
        t.window = pty::window(fd)?;
        t.locked = pty::is_locked(fd)?;
        t.other = queues::other_end(fd, self.ends.contains_key(&t.index))?;
        // As long as nobody has opened it, opening it would show.
        if t.other == OtherEnd::New {
            let there =
                nix::sys::stat::stat(format!("/proc/{init}/root/dev/pts/{}", t.index).as_str());
            if let Ok(stat) = there {
                t.owner = owner(&stat);
            }
            return Ok(());
        }
        let peer = queues::open_peer(fd, t.locked)?;
        let stat = fstat(&peer).map_err(|e| SysError::errno("fstat", "a terminal", e as i32))?;
        t.owner = owner(&stat);
        t.exclusive = pty::is_exclusive(peer.as_fd())?;
        let taken = queues::drain(fd, peer.as_fd(), t, &termios);
        // Whatever was taken out goes back, also after a failure.
        let back = queues::fill(fd, peer.as_fd(), t, &termios);
        taken.and(back)?;
        Ok(())
    }
}

const REMEDY: &str = "let it log to a file or to its console, and give it no terminal";

fn device(stat: &FileStat) -> (u64, u64) {
    (major(stat.st_rdev), minor(stat.st_rdev))
}

fn owner(stat: &FileStat) -> (u32, u32, u32) {
    (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid)
}

/// Whom it controls, in the container's numbers.
fn set_session(
    master: &OwnedFd,
    inner: &HashMap<i32, i32>,
    state: &State,
    t: &mut Terminal,
) -> Result<(), CaptureError> {
    let Some((session, group)) = pty::session(master.as_fd())? else { return Ok(()) };
    t.session = *inner.get(&session).ok_or_else(|| {
        let why = "the session that it controls is led from outside; start it with setsid inside";
        CaptureError::unsupported(format!("the terminal /dev/pts/{}", t.index), why.into())
    })?;
    for (host, pid) in inner {
        let Some(process) = state.processes.iter().find(|p| p.pid == *pid) else { continue };
        if process.sid != t.session {
            continue;
        }
        if getpgid(Some(Pid::from_raw(*host))).is_ok_and(|g| g.as_raw() == group) {
            t.foreground = process.pgid;
        }
        let path = format!("/proc/{host}/stat");
        let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
        let word = text.rfind(')').and_then(|at| text[at + 2..].split_whitespace().nth(7 - 3));
        if word == Some("0") {
            t.without.push(*pid);
        }
    }
    t.without.sort_unstable();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_terminals() {
        assert_eq!(of_stat(0), Ok(None));
        assert_eq!(of_stat(0x8803), Ok(Some(3)));
        assert_eq!(of_stat(0x0010_8801), Ok(Some(0x101)));
        assert_eq!(of_stat(0x0401), Err((4, 1)));
        assert!(may_be("/dev/pts/0") && may_be("/dev/tty1") && may_be("/dev/ptmx"));
        assert!(!may_be("/dev/null") && !may_be("/var/log/x"));
    }
}
