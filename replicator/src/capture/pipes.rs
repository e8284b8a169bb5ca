//! Pipes and what is in them.

use super::CaptureError;
use super::files::Builder;
use crate::image::{Pipe, State};
use crate::sys::sockopt::in_queue;
use crate::sys::{SysError, pidfd};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Whether it is a named pipe, and its inode.
pub(super) type Key = (bool, u64);

/// Captures a pipe with the first end that is met; gives its index. `empty` is how much it may hold,
/// if it is known to hold nothing.
pub(super) fn pipe(
    handle: BorrowedFd<'_>,
    number: i32,
    key: Key,
    empty: Option<u32>,
    builder: &mut Builder,
    state: &mut State,
) -> Result<u32, CaptureError> {
    if let Some(at) = builder.pipes.get(&key) {
        return Ok(*at);
    }
    let pipe = match empty {
        Some(capacity) => Pipe { capacity, contents: Vec::new(), packets: Vec::new() },
        None => read(&pidfd::get_fd(handle, number)?, number)?,
    };
    state.pipes.push(pipe);
    let at = state.pipes.len() as u32 - 1;
    builder.pipes.insert(key, at);
    Ok(at)
}

fn read(end: &OwnedFd, number: i32) -> Result<Pipe, CaptureError> {
    let capacity = nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_GETPIPE_SZ)
        .map_err(|e| SysError::errno("F_GETPIPE_SZ", format!("descriptor {number}"), e as i32))?;
    let (contents, packets) = pipe_contents(end, capacity as usize)?;
    Ok(Pipe { capacity: capacity as u32, contents, packets })
}

/// Copies what a pipe holds with tee(2), which consumes nothing.
/// Gives the bytes, and the length of each packet.
fn pipe_contents(end: &OwnedFd, capacity: usize) -> Result<(Vec<u8>, Vec<u32>), CaptureError> {
    let waiting = in_queue(end.as_fd())?;
    if waiting == 0 {
        return Ok(Default::default());
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
    let mut packets = Vec::new();
    let mut got = 0;
    while got < n {
        let read = nix::unistd::read(&read, &mut contents[got..]).map_err(failed("read"))?;
        packets.push(read as u32);
        got += read;
    }
    if n != waiting {
        let what = format!("{n} of {waiting} bytes");
        return Err(SysError::errno("tee", what, libc::EIO).into());
    }
    Ok((contents, packets))
}
