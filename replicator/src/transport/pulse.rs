//! Signs of life from a thread of its own, over a socket of its own.
//!
//! What a busy runtime does to heartbeats in its tasks (a large checkpoint to decode, a full queue)
//! looks like death to a peer that expects one every few milliseconds. This thread does nothing
//! else: it sleeps until a pulse is due, reads those that have come, is real-time, above all that works
//! for long, and allocates nothing in its loop. It judges as well: after each pulse that it sends, the
//! core that watches the peer is given its time. Nobody judges in between, so that it need not wake for
//! each pulse that comes: wakes are most of what an idle agent costs.
//!
//! So that it does not speak for the dead, a pulse says how far the agent's work is
//! ([`Vitals`]); whether that is life is for the other side to judge.
//!
//! There is at most one session, that of the present connection. It stays when the connection
//! breaks, until the next one: an agent that lives says so also while it connects anew.

use super::link::LinkError;
use crate::protocol::LinkId;
use crate::protocol::detector::Marks;
use crate::sys::sched;
use crate::wire::pulse::{End, LABEL, LENGTH, MATERIAL, Pulses};
use quinn::Connection;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Real-time priority. It needs some microseconds for each pulse, so it stands above what works
/// for milliseconds (stops: 20, gate: 10, runtime: 5).
const PRIORITY: i32 = 25;

/// Most datagrams looked at for each pulse that is sent; one or two come meanwhile.
const BATCH: usize = 128;

/// How far this agent's work for a container is; read by the thread, written by those who work.
#[derive(Debug, Default)]
pub struct Vitals {
    work: AtomicU64,
    runtime: AtomicU64,
    long: AtomicBool,
}

impl Vitals {
    /// The loop that takes or applies checkpoints has come around.
    pub fn worked(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
    }

    /// A task of the runtime had its turn.
    pub fn ran(&self) {
        self.runtime.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the work may take long now.
    pub fn takes_long(&self, long: bool) {
        self.long.store(long, Ordering::Relaxed);
    }

    fn marks(&self) -> Marks {
        Marks {
            work: self.work.load(Ordering::Relaxed),
            runtime: self.runtime.load(Ordering::Relaxed),
            long: self.long.load(Ordering::Relaxed),
        }
    }
}

/// Who wants to know of the peer's pulses. Called from the thread; must neither block nor take long.
pub trait Listener: Send + Sync {
    /// A pulse of the connection's peer.
    fn pulse(&self, link: LinkId, marks: Marks);
    /// Time passes.
    fn tick(&self);
}

/// The pulses of one connection.
pub struct Session {
    link: LinkId,
    peer: SocketAddr,
    pulses: Pulses,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pulses of {} with {}", self.link, self.peer)
    }
}

impl Session {
    /// Those of a connection whose peer listens for them on `port`.
    pub(super) fn of(
        connection: &Connection,
        link: LinkId,
        end: End,
        port: u16,
    ) -> Result<Self, LinkError> {
        let mut material = [0; MATERIAL];
        connection
            .export_keying_material(&mut material, LABEL, &[])
            .map_err(|_| LinkError::tls("the session gives no keys for pulses"))?;
        let mut peer = connection.remote_address();
        peer.set_port(port);
        Ok(Self { link, peer, pulses: Pulses::new(&material, end) })
    }
}

type Current = Option<(Session, Arc<dyn Listener>)>;

struct Shared {
    current: Mutex<Current>,
    vitals: Arc<Vitals>,
    over: AtomicBool,
    refused: AtomicU64,
}

impl Shared {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that beats and listens; it ends when this is dropped.
pub struct Pulse {
    shared: Arc<Shared>,
    port: u16,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts the thread, with a socket at `address`; its port may be 0 for any that is free. Each end
    /// beats once in `interval`.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub fn start(address: SocketAddr, interval: Duration) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Bind { address, source };
        let socket = UdpSocket::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let port = socket.local_addr().map_err(failed)?.port();
        let shared = Arc::new(Shared {
            current: Mutex::default(),
            vitals: Arc::default(),
            over: AtomicBool::new(false),
            refused: AtomicU64::new(0),
        });
        let beating = shared.clone();
        let thread = std::thread::Builder::new()
            .name("pulse".into())
            .spawn(move || {
                if let Err(error) = sched::set_fifo(PRIORITY) {
                    tracing::warn!(%error, "a busy machine may look dead to the other host");
                }
                beat(&beating, &socket, interval);
            })
            .map_err(failed)?;
        Ok(Self { shared, port, thread: Some(thread) })
    }

    /// The UDP port on which the peer's pulses are expected.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where this agent's work is noted.
    pub fn vitals(&self) -> &Arc<Vitals> {
        &self.shared.vitals
    }

    /// From now on pulses are those of this session.
    pub fn meet(&self, session: Session, listener: Arc<dyn Listener>) {
        let before = self.shared.current().replace((session, listener));
        drop(before);
    }

    /// Datagrams that were no pulses of the session.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn beat(shared: &Shared, socket: &UdpSocket, interval: Duration) {
    let mut due = Instant::now();
    while !shared.over.load(Ordering::Acquire) {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // First of all: what was said meanwhile is no silence.
        listen(shared, socket);
        let now = Instant::now();
        // A pulse that was missed is not made up for.
        due = (due + interval).max(now + interval / 2);
        let mut current = shared.current();
        let Some((session, listener)) = &mut *current else { continue };
        let pulse = session.pulses.next(shared.vitals.marks());
        // A pulse that cannot leave is a lost one.
        let _ = socket.send_to(&pulse, session.peer);
        let listener = listener.clone();
        drop(current);
        listener.tick();
    }
}

/// Reads what has come.
fn listen(shared: &Shared, socket: &UdpSocket) {
    let mut datagram = [0; LENGTH + 1];
    for _ in 0..BATCH {
        let length = match socket.recv_from(&mut datagram) {
            Ok((length, _)) => length,
            Err(e) if is_over(&e) => return,
            // What the network says of an earlier pulse of ours.
            Err(_) => continue,
        };
        let mut current = shared.current();
        let Some((session, listener)) = &mut *current else { continue };
        match session.pulses.believe(&datagram[..length]) {
            Ok(marks) => {
                let (link, listener) = (session.link, listener.clone());
                drop(current);
                listener.pulse(link, marks);
            }
            Err(_) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn is_over(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Heard(Mutex<Sender<(LinkId, Marks)>>);

    impl Listener for Heard {
        fn pulse(&self, link: LinkId, marks: Marks) {
            let _ = self.0.lock().unwrap().send((link, marks));
        }
        fn tick(&self) {}
    }

    fn side(
        material: &[u8; MATERIAL],
        end: End,
        pulse: &Pulse,
        peer: u16,
    ) -> Receiver<(LinkId, Marks)> {
        let (send, receive) = channel();
        let peer = SocketAddr::from(([127, 0, 0, 1], peer));
        let session = Session { link: LinkId(3), peer, pulses: Pulses::new(material, end) };
        pulse.meet(session, Arc::new(Heard(Mutex::new(send))));
        receive
    }

    #[test]
    fn two_ends_hear_each_other_and_how_far_they_are() {
        let bind = SocketAddr::from(([127, 0, 0, 1], 0));
        let (a, b) = [(); 2].map(|()| Pulse::start(bind, Duration::from_millis(2)).unwrap()).into();
        let at_a = side(&[5; MATERIAL], End::Caller, &a, b.port());
        let at_b = side(&[5; MATERIAL], End::Called, &b, a.port());
        let patience = Duration::from_secs(60);
        assert_eq!(at_a.recv_timeout(patience).unwrap().0, LinkId(3));
        a.vitals().worked();
        a.vitals().ran();
        a.vitals().takes_long(true);
        let changed = Marks { work: 1, runtime: 1, long: true };
        while at_b.recv_timeout(patience).unwrap().1 != changed {}
        // Of another session: heard by nobody any longer.
        let at_b = side(&[6; MATERIAL], End::Called, &b, a.port());
        while b.refused() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(at_b.try_recv().is_err());
    }
}
