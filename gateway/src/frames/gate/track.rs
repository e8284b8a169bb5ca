//! What the gate shows to those who remember connections without a descriptor: the tracker of
//! young ones, the partings, and after a failover the stand-in. While there are none it costs a
//! look at the flags of segments.

use super::{Gate, GateError};
use crate::frames::Mac;
use crate::frames::parting::{Heard, Partings, StandIn, has_fin};
use crate::frames::young::{Tracker, may_begin};
use replicator::image::net::{Parting, Young as Connection};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a stand-in that only listens is asked whether it is done.
const LISTEN: Duration = Duration::from_secs(1);

/// The tracker, shared by both directions. Its lock is taken last, and for one frame.
#[derive(Debug, Default)]
pub(super) struct Young {
    tracker: Mutex<Tracker>,
    /// It knows of some. Set before the frame that it is about goes on, so that no answer is
    /// missed.
    some: AtomicBool,
    partings: Mutex<Partings>,
    /// There are partings.
    parting: AtomicBool,
    stand_in: Mutex<Option<StandIn>>,
    /// There is a stand-in.
    standing: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Young {
    fn tracker(&self) -> MutexGuard<'_, Tracker> {
        lock(&self.tracker)
    }

    fn with<T>(&self, f: impl FnOnce(&mut Tracker) -> T) -> T {
        let mut tracker = self.tracker();
        let result = f(&mut tracker);
        self.some.store(!tracker.is_empty(), Relaxed);
        result
    }

    /// A frame is about to be given to the container.
    pub(super) fn inbound(&self, frame: &[u8]) {
        if self.some.load(Relaxed) || may_begin(frame) {
            self.with(|t| t.inbound(frame, Instant::now()));
        }
        if self.parting.load(Relaxed) || has_fin(frame) {
            lock(&self.partings).inbound(frame, Instant::now());
        }
    }

    /// A frame from the clients, before the container gets it.
    pub(super) fn heard(&self, frame: &[u8]) -> Heard {
        match self.standing.load(Relaxed) {
            false => Heard::Not,
            true => lock(&self.stand_in)
                .as_mut()
                .map_or(Heard::Not, |s| s.inbound(frame, Instant::now())),
        }
    }

    /// A frame of the open epoch.
    pub(super) fn held(&self, frame: &[u8]) {
        if self.parting.load(Relaxed) || has_fin(frame) {
            let mut partings = lock(&self.partings);
            partings.outbound(frame, Instant::now());
            self.parting.store(!partings.is_empty(), Relaxed);
        }
    }

    /// Whether one of the two ends has said on this connection that it is done.
    pub(super) fn is_parting(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        lock(&self.partings).knows(local, remote)
    }

    /// The open epoch is about to be sealed with these frames.
    pub(super) fn collect<'a>(&self, frames: impl Iterator<Item = &'a [u8]>) {
        if self.parting.load(Relaxed) {
            let mut partings = lock(&self.partings);
            if partings.is_fresh() {
                partings.collect(frames);
            }
        }
    }

    /// A frame came from the container.
    pub(super) fn outbound(&self, frame: &[u8]) {
        if self.some.load(Relaxed) {
            self.with(|t| t.outbound(frame, Instant::now()));
        }
    }
}

impl Gate {
    /// The connections that the container has not accepted yet, or has accepted and said nothing
    /// on: those without a descriptor are its accept queues. Call it with input held, after
    /// [`Gate::seal`].
    pub fn young(&self) -> Vec<Connection> {
        match self.shared.young.some.load(Relaxed) {
            true => self.shared.young.tracker().snapshot(Instant::now()),
            false => Vec::new(),
        }
    }

    /// The connections that the container has closed, or shut for writing: those without a
    /// descriptor have nobody else to remember them. Call it where [`Gate::young`] is called.
    pub fn partings(&self) -> Vec<Parting> {
        let young = &self.shared.young;
        if !young.parting.load(Relaxed) {
            return Vec::new();
        }
        let mut partings = lock(&young.partings);
        let snapshot = partings.snapshot(Instant::now());
        young.parting.store(!partings.is_empty(), Relaxed);
        snapshot
    }

    /// Speaks from now on for connections that were closed before this container was restored.
    pub fn stand_in(&self, us: Mac, partings: &[Parting], elapsed: Duration) {
        let young = &self.shared.young;
        let stand_in = StandIn::new(us, partings, elapsed, Instant::now());
        *lock(&young.stand_in) = Some(stand_in);
        young.standing.store(true, Relaxed);
    }

    /// Sends what the stand-in has to say now. Gives the time until it has again; none when it is
    /// done.
    pub fn speak(&self) -> Result<Option<Duration>, GateError> {
        let young = &self.shared.young;
        let now = Instant::now();
        let (frames, next) = {
            let mut stand_in = lock(&young.stand_in);
            let Some(s) = stand_in.as_mut() else { return Ok(None) };
            if s.is_done(now) {
                young.standing.store(false, Relaxed);
                *stand_in = None;
                return Ok(None);
            }
            (s.due(now), s.next_deadline())
        };
        frames.iter().try_for_each(|frame| self.send(frame))?;
        // Without a deadline it has only to listen, until its time is over.
        Ok(Some(next.map_or(LISTEN, |at| at.saturating_duration_since(now).min(LISTEN))))
    }

    /// Checkpoints have these connections, as (local, remote), by their descriptors.
    pub fn grown_up(&self, connections: impl Iterator<Item = (SocketAddr, SocketAddr)>) {
        if self.shared.young.some.load(Relaxed) {
            self.shared.young.with(|t| connections.for_each(|(l, r)| t.forget(l, r)));
        }
    }

    /// The container was restored with these.
    pub fn adopt_young(&self, connections: &[Connection]) {
        self.shared.young.with(|t| connections.iter().for_each(|y| t.restore(y, Instant::now())));
    }
}
