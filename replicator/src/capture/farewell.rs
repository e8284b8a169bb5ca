//! Connections that the program has closed while bytes of it were under way.
//!
//! Without a descriptor nobody can read what such a socket still has to send; lost with the host,
//! the peer would lack the end of it. So of each connection that had something under way at a
//! stop, a duplicate of its descriptor is kept until the next one. If the program has closed it
//! meanwhile, the socket lives on by the duplicate: it is closed for writing here, and is in the
//! checkpoints until its peer has acknowledged everything and closed as well.
//!
//! The price: the FIN of such a connection leaves an epoch later. Connections with nothing under
//! way are closed by the program alone.

use super::{CaptureError, tcp};
use crate::image::net::{TcpConnection, TcpState};
use crate::image::{Kind, State};
use crate::sys::SysResult;
use crate::sys::sockopt::{get, in_queue};
use crate::sys::unix_diag::UnixDiag;
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the kernel waits for the end of a peer that has everything (tcp_fin_timeout).
const FIN_WAIT: Duration = Duration::from_secs(60);

/// Duplicates that are kept.
#[derive(Debug, Default)]
pub(super) struct Farewells {
    /// What had bytes under way at the last stop, in the order of the sockets' inodes, each once.
    sending: Vec<(u64, OwnedFd)>,
    /// What the program has closed.
    closed: Vec<(OwnedFd, Instant)>,
    /// When this was looked through last.
    at: Option<Instant>,
}

/// Whether a captured connection is worth a duplicate.
pub(super) fn is_sending(kind: &Kind) -> bool {
    matches!(kind, Kind::Tcp(c) if c.state.is_synchronized() && !c.send_queue.is_empty())
}

impl Farewells {
    /// In a stop, when all descriptors are captured: `sending` are those with bytes under way,
    /// `is_open` tells whether an inode was among them all. Leaves `sending` empty, with room for the next.
    pub(super) fn settle(
        &mut self,
        sending: &mut Vec<(u64, OwnedFd)>,
        is_open: impl Fn(u64) -> bool,
        state: &mut State,
        diag: &UnixDiag,
    ) -> Result<(), CaptureError> {
        self.at = Some(Instant::now());
        sending.sort_unstable_by_key(|(inode, _)| *inode);
        sending.dedup_by_key(|(inode, _)| *inode);
        std::mem::swap(&mut self.sending, sending);
        for (_, fd) in sending.drain(..).filter(|(inode, _)| !is_open(*inode)) {
            if !resets(fd.as_fd())? {
                // Fails when the peer has reset it: then there is nothing to close.
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Write);
                self.closed.push((fd, Instant::now()));
            }
        }
        for (fd, since) in std::mem::take(&mut self.closed) {
            if let Some(connection) = under_way(fd.as_fd(), since, diag)? {
                state.farewells.push(connection);
                self.closed.push((fd, since));
            }
        }
        Ok(())
    }

    /// Whether anything is kept: the end of such a connection waits for the next stop.
    pub(super) fn are_kept(&self) -> bool {
        !self.sending.is_empty() || !self.closed.is_empty()
    }

    /// Lets go if the last stop was so long ago.
    pub(super) fn let_go_after(&mut self, time: Duration) {
        if self.at.is_some_and(|at| at.elapsed() > time) {
            self.let_go();
        }
    }

    /// No checkpoint follows: the kernel does the rest.
    pub(super) fn let_go(&mut self) {
        *self = Self::default();
    }
}

/// Whether a close of this socket is a reset: bytes were not read, or the program wants it so.
fn resets(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut linger = [0u8; 8];
    get(fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut linger)?;
    let at_once = linger[..4] != [0; 4] && linger[4..] == [0; 4];
    Ok(at_once || in_queue(fd)? > 0)
}

/// The connection, while its peer has not acknowledged everything, or has not closed its side
/// either.
fn under_way(
    fd: BorrowedFd<'_>,
    since: Instant,
    diag: &UnixDiag,
) -> Result<Option<TcpConnection>, CaptureError> {
    if in_queue(fd)? > 0 {
        // The peer speaks to nobody: closed, the socket answers with a reset.
        return Ok(None);
    }
    match tcp::tcp(fd, "a closed connection", None, diag)? {
        Kind::Tcp(c) => {
            let waits = match c.state {
                TcpState::FinWait1 | TcpState::Closing | TcpState::LastAck => true,
                TcpState::FinWait2 => since.elapsed() < FIN_WAIT,
                _ => false,
            };
            Ok(waits.then_some(*c))
        }
        _ => Ok(None),
    }
}
