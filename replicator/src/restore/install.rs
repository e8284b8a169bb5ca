//! Handing descriptors to the container's processes: in bulk over a unix socket (SCM_RIGHTS),
//! received in ascending order so that each lands on its own number.

use super::error::{Doing, RestoreError, sys};
use super::script::Script;
use super::spare::{CHANNEL, Stub};
use crate::image::{Description, Fd, Kind, State};
use crate::sys::{SysError, SysResult, descriptors, memory};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Most descriptors in one message (SCM_MAX_FD).
const MAX_IN_MESSAGE: usize = 253;
/// Messages in flight at a time, few enough for the socket's buffer.
const MAX_MESSAGES: usize = 32;
/// A gap between numbers that is worth filling for a while.
const MAX_FILLED: i32 = 512;

/// How a list of numbers is reached by a kernel that always gives the lowest free one.
#[derive(Debug, Default, PartialEq, Eq)]
struct Layout {
    /// Numbers to occupy before, so that they are skipped.
    fillers: Vec<i32>,
    /// How many descriptors land on their numbers by themselves, from the first on.
    direct: usize,
    /// Where each later one lands first.
    landing: i32,
}

/// `numbers` ascend.
fn lay_out(numbers: &[i32]) -> Layout {
    let mut layout = Layout::default();
    let mut next = 0;
    for &number in numbers {
        if number - next > MAX_FILLED {
            break;
        }
        layout.fillers.extend(next..number);
        layout.direct += 1;
        next = number + 1;
    }
    layout.landing = next;
    layout
}

/// Gives a process its descriptors. `made` are the descriptions, by index.
pub(super) fn install(
    script: &mut Script,
    channel: &UnixStream,
    stub: &Stub,
    fds: &[Fd],
    made: &[OwnedFd],
) -> Result<(), RestoreError> {
    const DOING: &str = "install the descriptors";
    // The channel moves above them all.
    let above = fds.last().map_or(0, |f| f.number) + 1;
    let channel_number = above.max(CHANNEL + 1);
    let numbers: Vec<i32> = fds.iter().map(|f| f.number).collect();
    let layout = lay_out(&numbers);
    raise_limit(script, stub.host, channel_number).doing(stub.pid, DOING)?;
    let cloexec = libc::O_CLOEXEC as u64;
    script.call("dup3", libc::SYS_dup3, &[CHANNEL as u64, channel_number as u64, cloexec]);
    script.call("close", libc::SYS_close, &[CHANNEL as u64]);
    for &filler in &layout.fillers {
        script.call("dup3", libc::SYS_dup3, &[channel_number as u64, filler as u64, cloexec]);
    }
    script.run_ok(stub.host).doing(stub.pid, DOING)?;

    let mut raw = Vec::with_capacity(fds.len());
    for fd in fds {
        let found = made.get(fd.description as usize);
        raw.push(found.map(AsRawFd::as_raw_fd).ok_or_else(|| RestoreError::Impossible {
            pid: stub.pid,
            object: format!("descriptor {}", fd.number),
            reason: format!("the checkpoint has no description {}", fd.description),
        })?);
    }
    let (direct, later) = raw.split_at(layout.direct);
    let pass = Pass { channel, number: channel_number, host: stub.host };
    pass.in_bulk(script, direct, &numbers).doing(stub.pid, DOING)?;
    for (one, number) in later.iter().zip(&numbers[layout.direct..]) {
        let landing = layout.landing;
        pass.in_bulk(script, &[*one], &[landing]).doing(stub.pid, DOING)?;
        script.call("dup3", libc::SYS_dup3, &[landing as u64, *number as u64, 0]);
        script.call("close", libc::SYS_close, &[landing as u64]);
    }

    for fd in fds.iter().filter(|f| f.close_on_exec) {
        room(script, stub)?;
        let args = [fd.number as u64, libc::F_SETFD as u64, libc::FD_CLOEXEC as u64];
        script.call("fcntl(F_SETFD)", libc::SYS_fcntl, &args);
    }
    for filler in layout.fillers {
        room(script, stub)?;
        script.call("close", libc::SYS_close, &[filler as u64]);
    }
    script.call("close", libc::SYS_close, &[channel_number as u64]);
    script.run_ok(stub.host).doing(stub.pid, DOING).map(drop)
}

fn room(script: &mut Script, stub: &Stub) -> Result<(), RestoreError> {
    if !script.has_room(0, 2) {
        script.run_ok(stub.host).doing(stub.pid, "install the descriptors")?;
    }
    Ok(())
}

/// Lets the process have descriptors up to this number; its own limit comes later.
fn raise_limit(script: &mut Script, host: i32, number: i32) -> SysResult<()> {
    let limit = u64::from(libc::RLIMIT_NOFILE);
    // 1024 is what most processes start with.
    if number < 1024 {
        return Ok(());
    }
    let place = script.words(&[0, 0]);
    script.call("prlimit(RLIMIT_NOFILE)", libc::SYS_prlimit64, &[0, limit, 0, place]);
    script.run_ok(host)?;
    let mut now = [0; 16];
    memory::read(host, place, &mut now)?;
    let hard = u64::from_ne_bytes(now[8..].try_into().expect("eight bytes"));
    // To raise the hard limit takes CAP_SYS_RESOURCE.
    let wanted = hard.max(number as u64 + 1);
    let wanted = script.words(&[wanted, wanted]);
    script.call("prlimit(RLIMIT_NOFILE)", libc::SYS_prlimit64, &[0, limit, wanted, 0]);
    script.run_ok(host).map(drop)
}

struct Pass<'a> {
    channel: &'a UnixStream,
    /// Its number in the process.
    number: i32,
    host: i32,
}

impl Pass<'_> {
    /// Sends descriptors and lets the process receive them; they must land on these numbers.
    fn in_bulk(&self, script: &mut Script, fds: &[RawFd], numbers: &[i32]) -> SysResult<()> {
        const CONTROL: usize = 16 + 4 * MAX_IN_MESSAGE + 4;
        let mut done = 0;
        for wave in fds.chunks(MAX_IN_MESSAGE * MAX_MESSAGES) {
            let messages: Vec<&[RawFd]> = wave.chunks(MAX_IN_MESSAGE).collect();
            let byte = script.data(&[0]);
            let iov = script.words(&[byte, 1]);
            let mut controls = Vec::new();
            for part in &messages {
                let control = script.data(&[0; CONTROL]);
                let len = 16 + 4 * part.len() as u64;
                controls.push((control, part.len()));
                // struct msghdr: name, its length, iov, its count, control, its length, flags.
                let header = script.words(&[0, 0, iov, 1, control, len.next_multiple_of(8), 0]);
                script.call("recvmsg", libc::SYS_recvmsg, &[self.number as u64, header, 0]);
                let rights = [ControlMessage::ScmRights(part)];
                let sent = sendmsg::<UnixAddr>(
                    self.channel.as_raw_fd(),
                    &[IoSlice::new(&[0])],
                    &rights,
                    MsgFlags::MSG_DONTWAIT,
                    None,
                );
                sys(sent, "sendmsg", || format!("{} descriptors", part.len()))?;
            }
            script.run_ok(self.host)?;
            for (control, count) in controls {
                let mut got = vec![0; 16 + 4 * count];
                memory::read(self.host, control, &mut got)?;
                let landed = got[16..].chunks_exact(4).map(|n| n.try_into().expect("four bytes"));
                let wanted = &numbers[done..done + count];
                if !landed.map(i32::from_ne_bytes).eq(wanted.iter().copied()) {
                    let object = format!("descriptors {wanted:?}, which landed elsewhere");
                    return Err(SysError::errno("recvmsg", object, libc::EBADF));
                }
                done += count;
            }
        }
        Ok(())
    }
}

/// Fills the interest lists of the epoll instances. Each remembers descriptor numbers, so a
/// process that holds it must do it; the first that does.
pub(super) fn fill_epolls(
    script: &mut Script,
    state: &State,
    host_of: impl Fn(i32) -> Option<i32>,
) -> Result<(), RestoreError> {
    let mut filled = vec![false; state.descriptions.len()];
    for process in &state.processes {
        let Some(host) = host_of(process.pid) else { continue };
        let doing = "fill the interest list of an epoll instance";
        for fd in &process.fds {
            let index = fd.description as usize;
            let targets = match state.descriptions.get(index).map(|d| &d.kind) {
                Some(Kind::Epoll(targets) | Kind::EpollPast { targets, .. }) => targets,
                _ => continue,
            };
            if std::mem::replace(&mut filled[index], true) {
                continue;
            }
            for target in targets {
                if !script.has_room(16, 1) {
                    script.run_ok(host).doing(process.pid, doing)?;
                }
                let mut event = [0; 12];
                event[..4].copy_from_slice(&target.events.to_ne_bytes());
                event[4..].copy_from_slice(&target.data.to_ne_bytes());
                let event = script.data(&event);
                let args = [fd.number as u64, libc::EPOLL_CTL_ADD as u64, target.fd as u64, event];
                let object = format!("descriptor {} in epoll {}", target.fd, fd.number);
                script.call_on("epoll_ctl", object, libc::SYS_epoll_ctl, &args);
            }
        }
        if !script.is_empty() {
            script.run_ok(host).doing(process.pid, doing)?;
        }
    }
    Ok(())
}

/// Adds what epoll instances watch under numbers that mean something else by now. The numbers are
/// taken in a table of descriptors for that alone.
pub(super) fn fill_past(state: &State, made: &[OwnedFd]) -> SysResult<()> {
    let has_past = |d: &Description| matches!(d.kind, Kind::EpollPast { .. });
    if !state.descriptions.iter().any(has_past) {
        return Ok(());
    }
    descriptors::in_table_of_its_own(|| {
        for (description, epoll) in state.descriptions.iter().zip(made) {
            let Kind::EpollPast { past, .. } = &description.kind else { continue };
            for (target, file) in past {
                let lost = || SysError::errno("search", format!("file {file}"), libc::ENOENT);
                let file = made.get(*file as usize).ok_or_else(lost)?;
                descriptors::watch_as(epoll.as_fd(), file.as_fd(), target)?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_filled_and_wide_ones_jumped() {
        let plain = lay_out(&[0, 1, 2, 3]);
        assert_eq!(plain, Layout { fillers: vec![], direct: 4, landing: 4 });
        let gaps = lay_out(&[1, 2, 5, 6]);
        assert_eq!(gaps, Layout { fillers: vec![0, 3, 4], direct: 4, landing: 7 });
        let wide = lay_out(&[0, 5000, 5001]);
        assert_eq!(wide, Layout { fillers: vec![], direct: 1, landing: 1 });
        assert_eq!(lay_out(&[]), Layout::default());
    }
}
