//! A small key-value server speaking RESP: the workload for a container when no Redis is there.
//!
//! ```text
//!            pipe (stop)                     eventfd (wake)
//! listener --epoll--> acceptor --round robin--> worker 1..N: epoll, its connections
//!                                                   |
//!                                              sharded store (futexes)
//! ```
//!
//! It is a plain program on purpose: threads, futexes, epoll, eventfd, a pipe and TCP, the kernel
//! objects that a checkpoint of an ordinary server has to cover, and no signal handlers (SIGTERM
//! ends it). Invariant: a reply is written after its command took effect in the store, and the
//! replies of a connection are in the order of its commands.

mod commands;
mod store;
mod worker;

pub use store::{Snapshot, Store};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{self, sockopt};
use std::io::{self, PipeReader, PipeWriter, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use worker::{Worker, WorkerInbox};

/// Connections that may wait to be accepted, as in Redis.
const BACKLOG: i32 = 511;
/// How long accepting pauses when descriptors or memory have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// What [`run`] needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerConfig {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Worker threads, each with its own epoll and connections; at least 1.
    pub threads: usize,
}

/// Serves until the command SHUTDOWN comes; SIGTERM ends the process as is its default.
///
/// # Errors
/// When the address cannot be listened on, or the kernel denies threads or descriptors.
pub fn run(config: ServerConfig) -> io::Result<()> {
    Server::bind(config)?.run()
}

/// A server that listens and does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    stop_signal: PipeReader,
    threads: usize,
    shared: Arc<Shared>,
}

/// Stops a server from another thread.
#[derive(Debug, Clone)]
pub struct ServerHandle(Arc<Shared>);

/// What acceptor and workers share.
#[derive(Debug)]
struct Shared {
    store: Arc<Store>,
    address: SocketAddr,
    connections: AtomicUsize,
    stopping: AtomicBool,
    stop: PipeWriter,
}

impl Shared {
    fn stop(&self) {
        if !self.stopping.swap(true, Ordering::SeqCst) {
            // One byte always fits into the empty pipe; a closed one means it stopped already.
            let _ = (&self.stop).write_all(b"x");
        }
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

impl ServerHandle {
    /// Asks the server to stop; its `run` returns soon after.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Server {
    /// Binds the address; connections wait until [`Server::run`].
    ///
    /// # Errors
    /// When the address is taken or not ours.
    pub fn bind(config: ServerConfig) -> io::Result<Self> {
        let listener = listen(config.listen).map_err(|error| {
            io::Error::new(error.kind(), format!("listen on {}: {error}", config.listen))
        })?;
        let address = listener.local_addr()?;
        let (stop_signal, stop) = io::pipe()?;
        let shared = Shared {
            store: Arc::new(Store::new()),
            address,
            connections: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            stop,
        };
        Ok(Self { listener, stop_signal, threads: config.threads.max(1), shared: Arc::new(shared) })
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.address
    }

    /// What it holds.
    pub fn store(&self) -> Arc<Store> {
        self.shared.store.clone()
    }

    /// A handle to stop it by.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(self.shared.clone())
    }

    /// Serves until [`ServerHandle::stop`] or the command SHUTDOWN.
    ///
    /// # Errors
    /// When the kernel denies threads or descriptors.
    pub fn run(self) -> io::Result<()> {
        let mut inboxes = Vec::new();
        let mut threads = Vec::new();
        for number in 0..self.threads {
            let inbox = Arc::new(WorkerInbox::new()?);
            let worker = Worker::new(inbox.clone(), self.shared.clone())?;
            let name = format!("worker-{number}");
            threads.push(thread::Builder::new().name(name).spawn(move || worker.run())?);
            inboxes.push(inbox);
        }
        let accepted = self.accept_loop(&inboxes);
        self.shared.stopping.store(true, Ordering::SeqCst);
        inboxes.iter().for_each(|inbox| inbox.wake());
        let mut result = accepted;
        for thread in threads {
            let ended =
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
            result = result.and(ended);
        }
        result
    }

    fn accept_loop(&self, inboxes: &[Arc<WorkerInbox>]) -> io::Result<()> {
        const LISTENER: u64 = 0;
        const STOP: u64 = 1;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&self.listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        epoll.add(&self.stop_signal, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        let mut turn = 0;
        let mut events = [EpollEvent::empty(); 2];
        while !self.shared.stopping() {
            match epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            loop {
                match self.listener.accept() {
                    Ok((stream, _)) => {
                        inboxes[turn % inboxes.len()].give(stream);
                        turn += 1;
                    }
                    Err(error) => match error.kind() {
                        io::ErrorKind::WouldBlock => break,
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                        // Out of descriptors or memory: those that wait stay in the backlog.
                        _ => {
                            tracing::warn!(%error, "cannot accept a connection");
                            thread::sleep(ACCEPT_PAUSE);
                            break;
                        }
                    },
                }
            }
        }
        Ok(())
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let family = match address {
        SocketAddr::V4(_) => socket::AddressFamily::Inet,
        SocketAddr::V6(_) => socket::AddressFamily::Inet6,
    };
    let flags = socket::SockFlag::SOCK_CLOEXEC | socket::SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(family, socket::SockType::Stream, flags, None)?;
    socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    let name = socket::SockaddrStorage::from(address);
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &name)?;
    socket::listen(&fd, socket::Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(fd))
}
