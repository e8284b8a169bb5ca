//! What the tests share: an embedded server on a free port, and a proxy that lies.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod fake;

use bytes::BytesMut;
use nilicon_clients::load::{self, LoadConfig, LoadHandle, Report};
use nilicon_clients::resp::{Limits, Reply, ReplyDecoder};
use nilicon_clients::server::{Server, ServerConfig, ServerHandle, Store};
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// An embedded server, stopped when dropped.
pub(crate) struct Embedded {
    pub(crate) address: SocketAddr,
    pub(crate) store: Arc<Store>,
    handle: ServerHandle,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Embedded {
    pub(crate) fn start(threads: usize) -> Self {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(ServerConfig { listen, threads }).unwrap();
        let (address, store, handle) = (server.local_addr(), server.store(), server.handle());
        Self { address, store, handle, thread: Some(thread::spawn(|| server.run())) }
    }

    /// Waits for the end of a server that was told to stop.
    pub(crate) fn wait(mut self) -> io::Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

/// What a proxy does with one reply.
pub(crate) enum Action {
    /// Passes these on instead.
    Send(Vec<Reply>),
    /// Resets the connection to the client.
    Reset,
}

/// Decides about the replies of one connection; the number is that of the connection.
pub(crate) type Fault = dyn Fn(usize, Reply) -> Action + Send + Sync;

/// Starts a proxy in front of a server. Its threads end with the connections.
pub(crate) fn proxy(server: SocketAddr, fault: Box<Fault>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let fault: Arc<Fault> = fault.into();
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let client = client.unwrap();
            let Ok(upstream) = TcpStream::connect(server) else { return };
            let (from, to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
            thread::spawn(move || pass_commands(from, to));
            let fault = fault.clone();
            thread::spawn(move || pass_replies(number, upstream, client, &*fault));
        }
    });
    address
}

fn pass_commands(mut from: TcpStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
}

fn pass_replies(number: usize, mut from: TcpStream, mut to: TcpStream, fault: &Fault) {
    let mut decoder = ReplyDecoder::new(Limits::default());
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        decoder.feed(&buffer[..len]);
        let mut out = BytesMut::new();
        while let Some(reply) = decoder.next_reply().unwrap() {
            match fault(number, reply) {
                Action::Send(replies) => replies.iter().for_each(|reply| reply.encode(&mut out)),
                Action::Reset => {
                    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    let option = nix::sys::socket::sockopt::Linger;
                    nix::sys::socket::setsockopt(&to, option, &linger).unwrap();
                    // The reset leaves when the last copy of the socket is closed; this makes
                    // the other direction end its reading and drop the other copy.
                    let _ = to.shutdown(Shutdown::Read);
                    return;
                }
            }
        }
        if to.write_all(&out).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

/// A load of a second on a few connections; tests change what matters to them.
pub(crate) fn config(target: SocketAddr) -> LoadConfig {
    LoadConfig {
        connections: 4,
        pipeline: 8,
        value_size: (40, 300),
        keys: 200,
        duration: Some(Duration::from_secs(1)),
        ..LoadConfig::new(target)
    }
}

pub(crate) fn run(config: LoadConfig) -> Report {
    load::run_blocking(config, LoadHandle::new()).unwrap()
}
