//! Closed connections that have still something to send: a program writes much and closes, and its
//! kernel sends the rest by itself. No descriptor names such a socket, so no system call tells its
//! bytes; they are read from the kernel's memory.

use crate::image::net::TcpConnection;
use crate::sys::SysResult;
use std::net::SocketAddr;

/// Reads what closed sockets have still to send.
#[derive(Debug)]
pub struct Orphans {}

impl Orphans {
    /// None: this kernel cannot do it.
    pub fn open() -> Option<Self> {
        None
    }

    /// The connection with these addresses, if it is one that the program has closed and whose peer
    /// has not acknowledged all of it. To be called in the network namespace of the container.
    ///
    /// None: there is no such connection, or the program has it open still, or the peer has everything
    /// and knows that it was all.
    ///
    /// # Errors
    /// EAGAIN: it changed all the time while it was read; that can be tried again.
    pub fn find(&mut self, _: SocketAddr, _: SocketAddr) -> SysResult<Option<TcpConnection>> {
        Ok(None)
    }
}
