//! One worker thread: its epoll, its connections, its inbox of new ones.
//!
//! Invariant: what a connection can make the worker hold is bounded: by the limits of the decoder
//! for input, and for output by [`OUTPUT_PAUSE`], above which no further command of that
//! connection is executed until the client has taken its replies.

use super::Shared;
use super::commands::{self, Flow};
use crate::resp::{CommandDecoder, Limits, put_line};
use bytes::{Buf as _, BytesMut};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Unsent replies above which a connection is not served further.
const OUTPUT_PAUSE: usize = 1 << 20;
/// Bytes read at a time.
const READ_SIZE: usize = 64 << 10;
/// Ready connections taken from epoll at a time.
const EVENTS: usize = 128;
/// Token of the inbox; connections count from 1.
const INBOX: u64 = 0;

/// Where the acceptor leaves new connections for a worker.
#[derive(Debug)]
pub(super) struct WorkerInbox {
    streams: Mutex<Vec<TcpStream>>,
    event: EventFd,
}

impl WorkerInbox {
    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { streams: Mutex::default(), event })
    }

    /// Hands a connection over.
    pub(super) fn give(&self, stream: TcpStream) {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        self.wake();
    }

    /// Makes the worker look at its inbox and at the stop flag.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then the worker is awake anyway.
        let _ = self.event.write(1);
    }

    fn take(&self) -> Vec<TcpStream> {
        let _ = self.event.read();
        std::mem::take(&mut *self.streams.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A worker, to be run on its own thread.
#[derive(Debug)]
pub(super) struct Worker {
    epoll: Epoll,
    inbox: Arc<WorkerInbox>,
    shared: Arc<Shared>,
    connections: HashMap<u64, Connection>,
    next_token: u64,
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    decoder: CommandDecoder,
    out: BytesMut,
    interest: EpollFlags,
    /// No more input is taken; it closes once the output is gone.
    closing: bool,
}

impl Worker {
    pub(super) fn new(inbox: Arc<WorkerInbox>, shared: Arc<Shared>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&inbox.event, EpollEvent::new(EpollFlags::EPOLLIN, INBOX))?;
        Ok(Self {
            epoll,
            inbox,
            shared,
            connections: HashMap::new(),
            next_token: INBOX + 1,
            scratch: vec![0; READ_SIZE],
        })
    }

    /// Serves until the server stops.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        while !self.shared.stopping() {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for event in &events[..ready] {
                match event.data() {
                    INBOX => self.adopt(),
                    token => self.serve(token, event.events()),
                }
            }
        }
        Ok(())
    }

    fn adopt(&mut self) {
        for stream in self.inbox.take() {
            let token = self.next_token;
            self.next_token += 1;
            let interest = EpollFlags::EPOLLIN;
            let ready = stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| Ok(self.epoll.add(&stream, EpollEvent::new(interest, token))?));
            if let Err(error) = ready {
                tracing::warn!(%error, "dropping a new connection");
                continue;
            }
            let decoder = CommandDecoder::new(Limits::default());
            let out = BytesMut::new();
            self.shared.connections.fetch_add(1, Ordering::Relaxed);
            let connection = Connection { stream, decoder, out, interest, closing: false };
            self.connections.insert(token, connection);
        }
    }

    fn serve(&mut self, token: u64, ready: EpollFlags) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        let mut alive = Ok(true);
        if ready.intersects(readable) && connection.interest.contains(EpollFlags::EPOLLIN) {
            alive = connection.receive(&mut self.scratch);
        }
        // An error on a connection that is not being read shows when it is written.
        let alive = alive.and_then(|open| {
            connection.closing |= !open;
            connection.proceed(&self.shared)?;
            let wanted = connection.wanted();
            if wanted != connection.interest && !connection.finished() {
                connection.interest = wanted;
                self.epoll.modify(&connection.stream, &mut EpollEvent::new(wanted, token))?;
            }
            Ok(!connection.finished())
        });
        if !alive.unwrap_or(false) {
            self.connections.remove(&token);
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Connection {
    /// Reads what is there, once; `false` at the end of the stream.
    fn receive(&mut self, scratch: &mut [u8]) -> io::Result<bool> {
        match self.stream.read(scratch) {
            Ok(0) => Ok(false),
            Ok(len) => {
                self.decoder.feed(&scratch[..len]);
                Ok(true)
            }
            Err(error) if would_wait(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Executes the commands received and sends the replies, until there is nothing more to
    /// execute or the client does not take its replies.
    fn proceed(&mut self, shared: &Shared) -> io::Result<()> {
        loop {
            let more = self.execute(shared);
            self.send()?;
            if !more || self.out.len() >= OUTPUT_PAUSE {
                return Ok(());
            }
        }
    }

    /// Executes commands until the output is full; whether there may be more of them.
    fn execute(&mut self, shared: &Shared) -> bool {
        while self.out.len() < OUTPUT_PAUSE {
            match self.decoder.next_command() {
                Ok(Some(args)) => match commands::execute(shared, &args, &mut self.out) {
                    Flow::Continue => {}
                    Flow::Close => {
                        self.closing = true;
                        return false;
                    }
                    Flow::Shutdown => {
                        shared.stop();
                        return false;
                    }
                },
                Ok(None) => return false,
                Err(error) => {
                    if !self.closing {
                        put_line(
                            &mut self.out,
                            b'-',
                            format!("ERR Protocol error: {error}").as_bytes(),
                        );
                    }
                    self.closing = true;
                    return false;
                }
            }
        }
        true
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => self.out.advance(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_wait(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn wanted(&self) -> EpollFlags {
        let mut wanted = EpollFlags::empty();
        wanted.set(EpollFlags::EPOLLOUT, !self.out.is_empty());
        wanted.set(EpollFlags::EPOLLIN, !self.closing && self.out.len() < OUTPUT_PAUSE);
        wanted
    }

    fn finished(&self) -> bool {
        self.closing && self.out.is_empty()
    }
}

fn would_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
