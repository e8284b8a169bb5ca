//! The bypass of a gate: which connections may go by it, and when there is one at all.
//!
//! Invariants (OC-1, CP-1, FO-2): none is there once [`Gate::protect`] or [`Gate::unplug`] has returned, or while input
//! is held, and none comes up then: it is opened under the locks of both directions, by a gate in a state that
//! has one. Who changes that state shuts the bypass, makes the change, and waits until nothing is on its way
//! around the gate any more, some tens of milliseconds. Who holds input waits first, as nothing may come in then.

use super::{Gate, Shared, Young};
use crate::frames::{HEADER, wire};
use replicator::bypass::{Bypass, Bypassed};
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A bypass, and what it runs over.
struct Way {
    bypass: Bypass,
    /// The cable: removed by its drop.
    _over: Box<dyn Any + Send>,
}

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.bypass.fmt(f)
    }
}

/// A place for one.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// From just before one is opened until it is closed for good.
    there: AtomicBool,
    way: Mutex<Option<Way>>,
    /// Held while one is opened or closed.
    turn: Mutex<()>,
    /// What went by those that are closed.
    out_frames: AtomicU64,
    in_frames: AtomicU64,
}

/// Whether a frame begins or ends a connection. Cheap: no more than three bytes are looked at in frames that are
/// no TCP.
fn begins_or_ends(frame: &[u8]) -> bool {
    const FIN_SYN_RST: u8 = 0x07;
    let at = |i: usize| frame.get(HEADER + i).copied().unwrap_or(0);
    let tcp = match (at(12), at(13)) {
        (8, 0) if at(23) == 6 => 14 + usize::from(at(14) & 15) * 4,
        (0x86, 0xdd) if at(20) == 6 => 54,
        _ => return false,
    };
    at(tcp + 13) & FIN_SYN_RST != 0
}

impl Slot {
    fn way(&self) -> MutexGuard<'_, Option<Way>> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_there(&self) -> bool {
        self.there.load(Ordering::Acquire)
    }

    /// The gate has let out a frame of the container. What it has said something on, it has accepted: nobody
    /// has to follow how that connection begins any more.
    pub(super) fn left(&self, frame: &[u8], young: &Young) {
        if !self.is_there() {
            return;
        }
        if begins_or_ends(frame) {
            return self.forget(frame);
        }
        let Some(view) = wire::view_tcp(frame).filter(|v| !v.tcp.payload().is_empty()) else {
            return;
        };
        let way = self.way();
        let Some(way) = way.as_ref() else { return };
        // Under the lock, so that an end that comes in just now is either known here or forgets this afterwards.
        if !young.is_parting(view.from, view.to)
            && let Err(error) = way.bypass.learn(view.from, view.to)
        {
            tracing::debug!(%error, "a connection goes through the gate");
        }
    }

    /// The container gets a frame from the gate.
    pub(super) fn came(&self, frame: &[u8]) {
        if self.is_there() && begins_or_ends(frame) {
            self.forget(frame);
        }
    }

    /// The kernel has forgotten it when it saw this; a frame that was in the gate's hands then may have brought it back.
    fn forget(&self, frame: &[u8]) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let way = self.way();
        let Some(way) = way.as_ref() else { return };
        for (local, remote) in [(view.from, view.to), (view.to, view.from)] {
            if let Err(error) = way.bypass.forget(local, remote) {
                tracing::debug!(%error, "a connection that is over stays in the bypass");
            }
        }
    }

    /// All that went by one.
    pub(super) fn bypassed(&self) -> Bypassed {
        let now = self.way().as_ref().map(|way| way.bypass.bypassed()).unwrap_or_default();
        Bypassed {
            out_frames: self.out_frames.load(Ordering::Relaxed) + now.out_frames,
            in_frames: self.in_frames.load(Ordering::Relaxed) + now.in_frames,
        }
    }

    /// Lets nothing more go by it. Takes no time.
    pub(super) fn shut(&self) {
        if self.is_there()
            && let Some(way) = &*self.way()
        {
            way.bypass.shut();
        }
    }

    /// Closes it for good.
    pub(super) fn close(&self) {
        if !self.is_there() {
            return;
        }
        self.shut();
        let _turn = self.turn();
        let way = self.way().take();
        if let Some(Way { bypass, _over }) = way {
            let so_far = bypass.bypassed();
            let all = bypass.close().unwrap_or_else(|error| {
                tracing::error!(%error, "frames may be on their way around the gate still");
                so_far
            });
            self.out_frames.fetch_add(all.out_frames, Ordering::Relaxed);
            self.in_frames.fetch_add(all.in_frames, Ordering::Relaxed);
        }
        self.there.store(false, Ordering::Release);
    }
}

impl Shared {
    /// Takes a lock at a moment when there is no bypass, so that there is none until it is let go.
    pub(super) fn without_bypass<G>(&self, lock: impl Fn() -> G) -> G {
        loop {
            self.bypass.close();
            let guard = lock();
            if !self.bypass.is_there() {
                return guard;
            }
        }
    }
}

impl Gate {
    /// Lets connections that the container has accepted go by the gate from now on, until something needs them
    /// to come through it: [`Gate::protect`], [`Gate::hold_input`], [`Gate::unplug`], [`Gate::close_bypass`]. Its
    /// programs are tied to the gate's devices. `over` is dropped after it.
    ///
    /// Whether it is open: only a plugged gate in pass-through has a bypass, and only one.
    pub fn open_bypass(&self, bypass: Bypass, over: impl Send + 'static) -> bool {
        let shared = &*self.shared;
        let _turn = shared.bypass.turn();
        let inbound = shared.inbound.lock();
        let out = shared.outbound.lock();
        if !inbound.plugged || !out.writes_through() || shared.bypass.is_there() {
            return false;
        }
        shared.bypass.there.store(true, Ordering::Release);
        bypass.open();
        *shared.bypass.way() = Some(Way { bypass, _over: Box::new(over) });
        true
    }

    /// Has everything come through the gate again, and waits until nothing is on its way around it. Costs
    /// nothing if there is no bypass.
    pub fn close_bypass(&self) {
        self.shared.bypass.close();
    }

    /// Whether there is a bypass.
    pub fn has_bypass(&self) -> bool {
        self.shared.bypass.is_there()
    }
}
