//! What a gate counts, and how it tells.

use super::Shared;
use crate::frames::commit::CommitCounters;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Counted on the data path.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) in_frames: AtomicU64,
    pub(super) in_dropped: AtomicU64,
    pub(super) kept_out: AtomicU64,
    pub(super) out_dropped: AtomicU64,
    pub(super) passed: AtomicU64,
    pub(super) injected: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) failed: AtomicBool,
}

/// A snapshot of a gate's totals since its start, and of what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateCounters {
    /// Of the commit core.
    pub commit: CommitCounters,
    /// Frames that left in pass-through.
    pub passed_frames: u64,
    /// Frames allowed to leave that the outer device would not take.
    pub out_dropped_frames: u64,
    /// Frames that the container received from clients.
    pub in_frames: u64,
    /// Frames of the container that went by the gate.
    pub bypassed_out_frames: u64,
    /// Frames of clients that went by the gate.
    pub bypassed_in_frames: u64,
    /// Frames from clients that the inner device would not take.
    pub in_dropped_frames: u64,
    /// First segments of connections that were kept out because output stood.
    pub kept_out_frames: u64,
    /// Frames in the backlog now.
    pub backlog_frames: usize,
    /// Frames dropped at the backlog's bound.
    pub backlog_dropped_frames: u64,
    /// Frames that the input log had no room for.
    pub log_dropped_frames: u64,
    /// Frames of [`super::Gate::inject`].
    pub injected_frames: u64,
    /// Frames of [`super::Gate::send`].
    pub sent_frames: u64,
    /// A device failed and a data thread has ended: nothing moves that way any more.
    pub failed: bool,
}

impl Shared {
    pub(super) fn counters(&self) -> GateCounters {
        let commit = self.outbound.lock().core.counters();
        let inbound = self.inbound.lock();
        let t = &self.totals;
        let bypassed = self.bypass.bypassed();
        GateCounters {
            commit,
            passed_frames: t.passed.load(Relaxed),
            out_dropped_frames: t.out_dropped.load(Relaxed),
            in_frames: t.in_frames.load(Relaxed),
            bypassed_out_frames: bypassed.out_frames,
            bypassed_in_frames: bypassed.in_frames,
            in_dropped_frames: t.in_dropped.load(Relaxed),
            kept_out_frames: t.kept_out.load(Relaxed),
            backlog_frames: inbound.backlog.len(),
            backlog_dropped_frames: inbound.backlog.dropped(),
            log_dropped_frames: inbound.log.as_ref().map_or(0, |log| log.dropped()),
            injected_frames: t.injected.load(Relaxed),
            sent_frames: t.sent.load(Relaxed),
            failed: t.failed.load(Relaxed),
        }
    }
}

impl GateCounters {
    /// Hands the snapshot to the `metrics` recorder, as `nilicon_gateway_...` of a container.
    pub fn publish(&self, container: &str) {
        let counters = [
            ("nilicon_gateway_released_frames_total", self.commit.released_frames),
            ("nilicon_gateway_released_bytes_total", self.commit.released_bytes),
            ("nilicon_gateway_released_epochs_total", self.commit.released_epochs),
            ("nilicon_gateway_dropped_frames_total", self.commit.dropped_frames),
            ("nilicon_gateway_abandoned_frames_total", self.commit.abandoned_frames),
            ("nilicon_gateway_passed_frames_total", self.passed_frames),
            ("nilicon_gateway_out_dropped_frames_total", self.out_dropped_frames),
            ("nilicon_gateway_in_frames_total", self.in_frames),
            ("nilicon_gateway_bypassed_out_frames_total", self.bypassed_out_frames),
            ("nilicon_gateway_bypassed_in_frames_total", self.bypassed_in_frames),
            ("nilicon_gateway_in_dropped_frames_total", self.in_dropped_frames),
            ("nilicon_gateway_kept_out_frames_total", self.kept_out_frames),
            ("nilicon_gateway_backlog_dropped_frames_total", self.backlog_dropped_frames),
            ("nilicon_gateway_log_dropped_frames_total", self.log_dropped_frames),
            ("nilicon_gateway_injected_frames_total", self.injected_frames),
            ("nilicon_gateway_sent_frames_total", self.sent_frames),
        ];
        for (name, value) in counters {
            metrics::counter!(name, "container" => container.to_owned()).absolute(value);
        }
        let gauges = [
            ("nilicon_gateway_held_frames", self.commit.held_frames),
            ("nilicon_gateway_held_bytes", self.commit.held_bytes),
            ("nilicon_gateway_held_epochs", self.commit.held_epochs),
            ("nilicon_gateway_backlog_frames", self.backlog_frames),
            ("nilicon_gateway_failed", usize::from(self.failed)),
        ];
        for (name, value) in gauges {
            metrics::gauge!(name, "container" => container.to_owned()).set(value as f64);
        }
    }
}
