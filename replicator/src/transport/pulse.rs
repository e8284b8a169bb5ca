//! Signs of life from a thread of its own, over a socket of its own.
//!
//! What a busy runtime does to heartbeats in its tasks (a large checkpoint to decode, a full queue)
//! looks like death to a peer that expects one every few milliseconds. This thread does nothing
//! else: it sleeps until a pulse is due, reads those that have come, is real-time, above all that works
//! for long, and allocates nothing in its loop. It judges as well: after each pulse that it sends, the
//! core that watches the peer is given its time. Nobody judges in between, so that it need not wake for
//! each pulse that comes: wakes are most of what an idle agent costs.
//!
//! A side that rests ([`Pace`]) beats seventeen times more seldom, at most. The end that was called, which is the
//! backup's, is then woken by the other's pulse and answers it, so that it hears at once when that
//! rests no longer; its own clock only counts where no pulse comes. Who stirs wakes this thread.
//!
//! So that it does not speak for the dead, a pulse says how far the agent's work is
//! ([`Vitals`]); whether that is life is for the other side to judge.
//!
//! There is at most one session, that of the present connection. It stays when the connection
//! breaks, until the next one: an agent that lives says so also while it connects anew.

use super::link::LinkError;
use crate::protocol::LinkId;
use crate::protocol::detector::{Config, Marks, Pace};
use crate::sys::sched;
use crate::wire::pulse::{End, LABEL, LENGTH, MATERIAL, Pulses};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use quinn::Connection;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Real-time priority. It needs some microseconds for each pulse, so it stands above what works
/// for milliseconds (stops: 20, gate: 10, runtime: 5).
const PRIORITY: i32 = 25;

/// Most datagrams looked at for each pulse that is sent; one or two come meanwhile.
const BATCH: usize = 128;

/// When pulses come; as in [`Config`].
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// The pause between them.
    pub interval: Duration,
    /// The pause while this side rests.
    pub rest: Duration,
    /// How long it says so before.
    pub notice: Duration,
}

impl From<Config> for Rhythm {
    fn from(times: Config) -> Self {
        Self { interval: times.interval, rest: times.rest, notice: times.notice() }
    }
}

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

    fn marks(&self, pace: Pace) -> Marks {
        Marks {
            work: self.work.load(Ordering::Relaxed),
            runtime: self.runtime.load(Ordering::Relaxed),
            long: self.long.load(Ordering::Relaxed),
            pace,
        }
    }
}

/// Who wants to know of the peer's pulses. Called from the thread; must neither block nor take long.
pub trait Listener: Send + Sync {
    /// A pulse of the connection's peer.
    fn pulse(&self, link: LinkId, marks: Marks);
    /// Time passes.
    fn tick(&self);
    /// How this side's pulses come now.
    fn pace(&self) -> Pace;
}

/// The pulses of one connection.
pub struct Session {
    link: LinkId,
    peer: SocketAddr,
    end: End,
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
        Ok(Self { link, peer, end, pulses: Pulses::new(&material, end) })
    }
}

type Current = Option<(Session, Arc<dyn Listener>)>;

struct Shared {
    current: Mutex<Current>,
    vitals: Arc<Vitals>,
    /// Ends the thread's sleep.
    wake: EventFd,
    over: AtomicBool,
    refused: AtomicU64,
}

impl Shared {
    fn wake_up(&self) {
        let _ = self.wake.write(1);
    }

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
    /// Starts the thread, with a socket at `address`; its port may be 0 for any that is free.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub fn start(address: SocketAddr, rhythm: Rhythm) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Bind { address, source };
        let socket = UdpSocket::bind(address).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let port = socket.local_addr().map_err(failed)?.port();
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| failed(errno.into()))?;
        let shared = Arc::new(Shared {
            current: Mutex::default(),
            wake,
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
                beat(&beating, &socket, rhythm);
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
        self.stir();
    }

    /// The next pulse leaves at once: this side rests no longer.
    pub fn stir(&self) {
        self.shared.wake_up();
    }

    /// Datagrams that were no pulses of the session.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.wake_up();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn beat(shared: &Shared, socket: &UdpSocket, rhythm: Rhythm) {
    let Rhythm { interval, rest, notice } = rhythm;
    let mut due = Instant::now();
    // When this side last said that it does not rest.
    let mut restless = due;
    let mut answers = false;
    while !shared.over.load(Ordering::Acquire) {
        let stirred = sleep(shared, socket, due, answers);
        // First of all: what was said meanwhile is no silence.
        let heard = listen(shared, socket);
        let now = Instant::now();
        // What is no pulse is not answered.
        if now < due && !stirred && !heard {
            continue;
        }
        let listener = shared.current().as_ref().map(|(_, listener)| listener.clone());
        let Some(listener) = listener else {
            (due, answers) = (now + rest, false);
            continue;
        };
        listener.tick();
        let pace = listener.pace();
        let mut current = shared.current();
        let Some((session, _)) = &mut *current else { continue };
        let pulse = session.pulses.next(shared.vitals.marks(pace));
        // A pulse that cannot leave is a lost one.
        let _ = socket.send_to(&pulse, session.peer);
        if pace != Pace::Rests {
            restless = now;
        }
        let rests = now.duration_since(restless) >= notice;
        answers = rests && session.end == End::Called;
        let pause = match (rests, answers) {
            (false, _) => interval,
            (true, false) => rest,
            // The other side's pulse comes first, if it comes. If not, it is time for doubt.
            (true, true) => rest * 3 / 2,
        };
        // A pulse that was missed is not made up for, and one that came early is none the less one.
        due = (due.min(now) + pause).max(now + pause / 2);
    }
}

/// Sleeps until a pulse is due or somebody stirs, which is told; and until a datagram comes, where
/// those are answered.
fn sleep(shared: &Shared, socket: &UdpSocket, due: Instant, answers: bool) -> bool {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = [readable(shared.wake.as_fd()), readable(socket.as_fd())];
    let fds = if answers { &mut fds[..] } else { &mut fds[..1] };
    let time = due.saturating_duration_since(Instant::now());
    let woken = ppoll(fds, Some(TimeSpec::from(time)), None).is_ok_and(|ready| ready > 0);
    let stirred = woken && fds[0].any().unwrap_or(false);
    stirred && shared.wake.read().is_ok()
}

/// Reads what has come; whether a pulse was among it.
fn listen(shared: &Shared, socket: &UdpSocket) -> bool {
    let mut datagram = [0; LENGTH + 1];
    let mut heard = false;
    for _ in 0..BATCH {
        let length = match socket.recv_from(&mut datagram) {
            Ok((length, _)) => length,
            Err(e) if is_over(&e) => break,
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
                heard = true;
            }
            Err(_) => {
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    heard
}

fn is_over(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Heard {
        told: Mutex<Sender<(LinkId, Marks)>>,
        rests: Arc<AtomicBool>,
    }

    impl Listener for Heard {
        fn pulse(&self, link: LinkId, marks: Marks) {
            let _ = self.told.lock().unwrap().send((link, marks));
        }
        fn tick(&self) {}
        fn pace(&self) -> Pace {
            if self.rests.load(Ordering::Relaxed) { Pace::Rests } else { Pace::Usual }
        }
    }

    fn side(
        material: &[u8; MATERIAL],
        end: End,
        pulse: &Pulse,
        peer: u16,
    ) -> Receiver<(LinkId, Marks)> {
        side_that_may_rest(material, end, pulse, peer).0
    }

    fn side_that_may_rest(
        material: &[u8; MATERIAL],
        end: End,
        pulse: &Pulse,
        peer: u16,
    ) -> (Receiver<(LinkId, Marks)>, Arc<AtomicBool>) {
        let (send, receive) = channel();
        let peer = SocketAddr::from(([127, 0, 0, 1], peer));
        let session = Session { link: LinkId(3), peer, end, pulses: Pulses::new(material, end) };
        let rests = Arc::new(AtomicBool::new(false));
        let heard = Heard { told: Mutex::new(send), rests: rests.clone() };
        pulse.meet(session, Arc::new(heard));
        (receive, rests)
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Waits for a pulse that says this.
    fn until(heard: &Receiver<(LinkId, Marks)>, says: impl Fn(Marks) -> bool) {
        let begin = Instant::now();
        while !says(heard.recv_timeout(PATIENCE / 2).expect("a pulse").1) {
            assert!(begin.elapsed() < PATIENCE, "none says so");
        }
    }

    #[test]
    fn two_ends_hear_each_other_and_how_far_they_are() {
        let bind = SocketAddr::from(([127, 0, 0, 1], 0));
        let rhythm =
            Rhythm { interval: Duration::from_millis(2), rest: PATIENCE, notice: PATIENCE };
        let (a, b) = [(); 2].map(|()| Pulse::start(bind, rhythm).unwrap()).into();
        let at_a = side(&[5; MATERIAL], End::Caller, &a, b.port());
        let at_b = side(&[5; MATERIAL], End::Called, &b, a.port());
        assert_eq!(at_a.recv_timeout(PATIENCE).unwrap().0, LinkId(3));
        a.vitals().worked();
        a.vitals().ran();
        a.vitals().takes_long(true);
        let changed = Marks { work: 1, runtime: 1, long: true, pace: Pace::Usual };
        until(&at_b, |marks| marks == changed);
        // Of another session: heard by nobody any longer.
        let at_b = side(&[6; MATERIAL], End::Called, &b, a.port());
        while b.refused() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(at_b.try_recv().is_err());
    }

    /// Both rest; then one of them stirs, and the other one hears of it long before its own time.
    #[test]
    fn who_rests_beats_seldom_and_is_woken() {
        let bind = SocketAddr::from(([127, 0, 0, 1], 0));
        let (interval, notice) = (Duration::from_millis(2), Duration::from_millis(100));
        let rhythm = Rhythm { interval, rest: PATIENCE, notice };
        let (a, b) = [(); 2].map(|()| Pulse::start(bind, rhythm).unwrap()).into();
        let (at_a, a_rests) = side_that_may_rest(&[5; MATERIAL], End::Caller, &a, b.port());
        let (at_b, b_rests) = side_that_may_rest(&[5; MATERIAL], End::Called, &b, a.port());
        let pace = |heard: &Receiver<(LinkId, Marks)>| {
            heard.recv_timeout(PATIENCE / 2).expect("a pulse").1.pace
        };
        a_rests.store(true, Ordering::Relaxed);
        until(&at_b, |marks| marks.pace == Pace::Rests);
        b_rests.store(true, Ordering::Relaxed);
        // Until it has said so for as long as it must.
        let (begin, mut said) = (Instant::now(), 0);
        while at_b.recv_timeout(Duration::from_millis(500)).is_ok() {
            assert!(begin.elapsed() < PATIENCE, "it does not rest");
            said += 1;
        }
        assert!(said > 3, "{said} of some fifty: two lost ones would be missed");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(at_b.try_iter().count(), 0, "a hundred, if it did not rest");
        // What is no pulse is not answered. The caller reads answers when it is woken the next time.
        let answers = || {
            a.stir();
            std::thread::sleep(Duration::from_millis(100));
            at_a.try_iter().count()
        };
        answers();
        let stranger = UdpSocket::bind(bind).expect("a socket");
        stranger.send_to(b"a pulse", (bind.ip(), b.port())).expect("sent");
        while b.refused() == 0 {
            assert!(begin.elapsed() < PATIENCE * 2, "it was not looked at");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(answers(), 1, "that to the pulse before");

        a_rests.store(false, Ordering::Relaxed);
        a.stir();
        until(&at_b, |marks| marks.pace == Pace::Usual);
        until(&at_a, |marks| marks.pace == Pace::Rests);
        at_a.try_iter().for_each(drop);
        assert_eq!(pace(&at_a), Pace::Rests, "what comes is answered, also by one that rests");
    }
}
