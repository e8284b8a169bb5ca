//! The process that carries the frames of one impaired link.
//!
//! ```text
//! node A                      this process                     node B
//! TAP device  --read-->  [reader] -> Impairment -> [writer]  --write-->  TAP device
//!             <--write-- [writer] <- Impairment <- [reader]  <--read--
//! ```
//! The devices exist as long as the process does. Cutting and healing are done from outside, at
//! the devices, as on any other link. At SIGHUP the process reads again what it does to frames: a
//! fault may have changed it ([`crate::lab::weather`]).

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use tokio::signal::unix::{SignalKind, signal};
use tun_tap::{Iface, Mode};

use super::engine::{Counts, Impairment};
use crate::lab::{Lab, LabError};
use crate::links::{LinkError, Network};
use crate::namespace::{Namespace, NamespaceError};
use crate::topology::Endpoint;

/// Room for the largest frame that a link of a lab can carry, with its header.
const LARGEST_FRAME: usize = 9216 + 64;

/// Why a link cannot be carried.
#[derive(Debug, thiserror::Error)]
pub enum ShuttleError {
    /// The lab is not there.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Its topology has no such impaired link.
    #[error("the lab {lab} has no impaired link number {index}")]
    NoSuchLink {
        /// The lab.
        lab: String,
        /// The number asked for.
        index: usize,
    },
    /// The namespace of a node cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The device of an end cannot be made.
    #[error("cannot make the TAP device {endpoint}: {source} (is its name taken?)")]
    Device {
        /// The end.
        endpoint: Endpoint,
        /// Why.
        source: io::Error,
    },
    /// The devices cannot be taken away again.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The process cannot wait for signals.
    #[error("cannot wait for a signal: {0}")]
    Signal(#[source] io::Error),
}

/// One direction, shared by its reader and its writer.
struct Direction {
    state: Mutex<State>,
    changed: Condvar,
    start: Instant,
}

struct State {
    link: Impairment<Vec<u8>>,
    over: bool,
}

impl Direction {
    fn new(link: Impairment<Vec<u8>>, start: Instant) -> Arc<Self> {
        let state = Mutex::new(State { link, over: false });
        Arc::new(Self { state, changed: Condvar::new(), start })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes frames from a device until it is gone.
    fn read(&self, from: &Iface) {
        let mut buffer = vec![0; LARGEST_FRAME];
        loop {
            match from.recv(&mut buffer) {
                Ok(len) => {
                    self.lock().link.push(self.start.elapsed(), buffer[..len].to_vec());
                    self.changed.notify_one();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.lock().over = true;
        self.changed.notify_one();
    }

    /// Hands frames to a device when they are due, until there are no more.
    fn write(&self, to: &Iface) {
        let mut state = self.lock();
        while !state.over {
            let now = self.start.elapsed();
            let frames = state.link.pop(now);
            if !frames.is_empty() {
                drop(state);
                for frame in frames {
                    // A device that is switched off takes none: the frame is lost, as on a cable.
                    let _ = to.send(&frame);
                }
                state = self.lock();
                continue;
            }
            state = match state.link.next_deadline() {
                Some(due) => {
                    let wait = self.changed.wait_timeout(state, due - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// Carries the frames of link number `index` of a deployed lab. Returns what became of them in
/// each direction when the process is asked to end by SIGTERM or SIGINT.
///
/// To be called in a process of its own: it takes these signals and SIGHUP for itself.
///
/// # Errors
/// There is no such link, or its devices cannot be made.
pub fn run_link(lab: &str, index: usize) -> Result<[Counts; 2], ShuttleError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(ShuttleError::Signal)?;
    let (mut terminate, mut interrupt, mut changed) = {
        let _inside = runtime.enter();
        let handle = |kind| signal(kind).map_err(ShuttleError::Signal);
        let ends = (handle(SignalKind::terminate())?, handle(SignalKind::interrupt())?);
        (ends.0, ends.1, handle(SignalKind::hangup())?)
    };

    let no_such_link = || ShuttleError::NoSuchLink { lab: lab.to_owned(), index };
    let opened = Lab::open(lab)?;
    let link = opened.topology().links.get(index).ok_or_else(no_such_link)?;
    let seed = link.impair.as_ref().ok_or_else(no_such_link)?.seed;
    let [ahead, behind] = opened.weather_of(index)?;
    let [one, two] = link.endpoints.as_slice() else { return Err(no_such_link()) };
    let (here, there) = (opened.namespace(&one.node)?, opened.namespace(&two.node)?);
    let (one, two) = (Arc::new(device(&here, one)?), Arc::new(device(&there, two)?));

    let start = Instant::now();
    let forth = Direction::new(Impairment::new(ahead, seed), start);
    let back = Direction::new(Impairment::new(behind, !seed), start);
    let mut threads = Vec::new();
    for (direction, from, to) in [(&forth, &one, &two), (&back, &two, &one)] {
        let (reading, from) = (Arc::clone(direction), Arc::clone(from));
        threads.push(thread::spawn(move || reading.read(&from)));
        let (writing, to) = (Arc::clone(direction), Arc::clone(to));
        threads.push(thread::spawn(move || writing.write(&to)));
    }
    tracing::info!(lab, index, "the link works");

    runtime.block_on(async {
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                _ = changed.recv() => {}
            }
            match opened.weather_of(index) {
                Ok([ahead, behind]) => {
                    forth.lock().link.change(ahead);
                    back.lock().link.change(behind);
                    tracing::info!(lab, index, "the weather has changed");
                }
                Err(error) => tracing::error!(lab, index, %error, "the weather stays"),
            }
        }
    });
    // Without their devices the readers end, and the writers after them.
    Network::open(&here)?.delete(one.name())?;
    Network::open(&there)?.delete(two.name())?;
    for thread in threads {
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
    let counts = [forth.lock().link.counts(), back.lock().link.counts()];
    tracing::info!(lab, index, ?counts, "the link has ended");
    Ok(counts)
}

/// Makes the device of one end. Made inside the namespace it takes a millisecond; made outside and
/// moved in it would take twenty.
fn device(namespace: &Namespace, endpoint: &Endpoint) -> Result<Iface, ShuttleError> {
    let made = namespace.enter(|| Iface::without_packet_info(&endpoint.interface, Mode::Tap))?;
    made.map_err(|source| ShuttleError::Device { endpoint: endpoint.clone(), source })
}
