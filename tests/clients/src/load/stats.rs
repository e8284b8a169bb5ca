//! What is counted, live and at the end.
//!
//! Counters are atomics; what needs more (latencies, the timeline, notes) is under one lock that
//! is taken once for each batch of replies. Invariants: notes, timeline and histogram are bounded;
//! times are counted from the making of the handle.

use super::ledger::{SharedCounter, Story};
use super::together::HistoryReport;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Length of a timeline bucket.
const BUCKET_MS: u64 = 10;
/// Buckets kept: one hour; replies after that are in the totals only.
const MAX_BUCKETS: usize = 360_000;
/// Failures of one kind that are described.
const MAX_NOTES: usize = 10;
/// Longest latency that the histogram tells from longer ones, in microseconds: one hour.
const MAX_LATENCY_US: u64 = 3_600_000_000;

/// What a load did and found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Requests sent, populate and audit not counted.
    pub requests: u64,
    /// Writes acknowledged.
    pub acknowledged_writes: u64,
    /// Reads answered.
    pub reads: u64,
    /// Acknowledged writes found to be gone.
    pub lost_writes: u64,
    /// Replies that contradict the history.
    pub wrong_replies: u64,
    /// Connections that were reset, closed, or left without a reply for too long.
    pub broken_connections: u64,
    /// Longest time, in milliseconds, in which the client as a whole waited and saw no reply.
    pub gap_ms: f64,
    /// Longest time, in milliseconds, that any one connection waited for its next reply.
    pub connection_gap_ms: f64,
    /// Latencies; in the open loop from when a request was due, whether or not it could be sent.
    pub latency_us: LatencySummary,
    /// Replies per second over the load.
    pub rate_per_s: f64,
    /// Connections opened for the load.
    pub connections: usize,
    /// Connections opened and closed again beside the load.
    pub churned: u64,
    /// Length of the load, in seconds, until the last reply.
    pub duration_s: f64,
    /// Time that loading the data took, in seconds.
    pub populate_s: f64,
    /// What the history of shared keys says, if one was written.
    pub history: Option<HistoryReport>,
    /// The first failures, described.
    pub notes: Vec<String>,
    /// Milliseconds in one bucket of the timeline.
    pub timeline_ms_bucket: u64,
    /// Replies in each bucket since the load began.
    pub timeline: Vec<u32>,
}

impl Report {
    /// Whether nothing was lost, wrong or broken, and the history, if there is one, can be explained.
    pub fn is_clean(&self) -> bool {
        let explained = |history: &HistoryReport| history.linearizable == Some(true);
        self.lost_writes == 0
            && self.wrong_replies == 0
            && self.broken_connections == 0
            && self.history.as_ref().is_none_or(explained)
    }
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LatencySummary {
    /// Median.
    pub p50: u64,
    /// 90 %.
    pub p90: u64,
    /// 99 %.
    pub p99: u64,
    /// Longest.
    pub max: u64,
    /// Replies measured.
    pub count: u64,
}

/// What a load is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[repr(u8)]
pub enum Phase {
    /// Nothing yet.
    Idle,
    /// Opening connections.
    Connecting,
    /// Loading the data.
    Populating,
    /// Sending requests.
    Running,
    /// Reading everything back.
    Auditing,
    /// The report is ready.
    Done,
}

/// A load at one moment.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of commands sent to load the data.
    pub populated_bytes: u64,
    /// Requests sent.
    pub requests: u64,
    /// Replies received.
    pub replies: u64,
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Replies per second since the last look.
    pub rate: f64,
    /// Milliseconds since the last reply, while requests wait; else 0.
    pub gap_ms: f64,
    /// Lost, wrong and broken together.
    pub errors: u64,
}

/// Watches one load and stops it. Clones are the same handle.
#[derive(Debug, Clone, Default)]
pub struct LoadHandle(Arc<Shared>);

impl LoadHandle {
    /// A handle for one load.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the load: no more requests, then what is in flight is awaited and all is audited.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Where the load is.
    pub fn progress(&self) -> Progress {
        self.0.progress()
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        self.0.clone()
    }
}

/// A batch of replies of one connection.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) latencies: Vec<Duration>,
    pub(super) acknowledged: u64,
    pub(super) reads: u64,
}

/// The counters of a load.
#[derive(Debug)]
pub(super) struct Shared {
    origin: Instant,
    stop: watch::Sender<bool>,
    phase: AtomicU8,
    populated: AtomicU64,
    requests: AtomicU64,
    replies: AtomicU64,
    acknowledged: AtomicU64,
    reads: AtomicU64,
    lost: AtomicU64,
    wrong: AtomicU64,
    broken: AtomicU64,
    churned: AtomicU64,
    outstanding: AtomicU64,
    /// When the client as a whole last saw a reply, or began to wait for one.
    last_ns: AtomicU64,
    gap_ns: AtomicU64,
    connection_gap_ns: AtomicU64,
    pub(super) counter: Arc<SharedCounter>,
    detail: Mutex<Detail>,
}

#[derive(Debug)]
struct Detail {
    latencies: Histogram<u64>,
    timeline: Vec<u32>,
    begun: Duration,
    described: [usize; 2],
    notes: Vec<String>,
    /// When progress was last looked at, and the replies there were.
    looked: (Duration, u64),
}

impl Default for Shared {
    fn default() -> Self {
        let detail = Detail {
            latencies: Histogram::new_with_bounds(1, MAX_LATENCY_US, 3)
                .expect("the bounds of the histogram are constants that fit"),
            timeline: Vec::new(),
            begun: Duration::ZERO,
            described: [0; 2],
            notes: Vec::new(),
            looked: (Duration::ZERO, 0),
        };
        Self {
            origin: Instant::now(),
            stop: watch::Sender::new(false),
            phase: AtomicU8::new(Phase::Idle as u8),
            populated: AtomicU64::default(),
            requests: AtomicU64::default(),
            replies: AtomicU64::default(),
            acknowledged: AtomicU64::default(),
            reads: AtomicU64::default(),
            lost: AtomicU64::default(),
            wrong: AtomicU64::default(),
            broken: AtomicU64::default(),
            churned: AtomicU64::default(),
            outstanding: AtomicU64::default(),
            last_ns: AtomicU64::default(),
            gap_ns: AtomicU64::default(),
            connection_gap_ns: AtomicU64::default(),
            counter: Arc::default(),
            detail: Mutex::new(detail),
        }
    }
}

impl Shared {
    /// Time since the handle was made.
    pub(super) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Tells when to stop.
    pub(super) fn stopped(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    pub(super) fn begin_load(&self) {
        let now = self.now();
        let mut detail = self.detail();
        detail.begun = now;
        detail.looked = (now, 0);
        self.enter(Phase::Running);
    }

    /// Time since [`Shared::begin_load`].
    pub(super) fn end_load(&self) -> Duration {
        self.now().saturating_sub(self.detail().begun)
    }

    /// When the load began.
    pub(super) fn begun(&self) -> Duration {
        self.detail().begun
    }

    pub(super) fn populated(&self, bytes: usize) {
        self.populated.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts a connection of those that come and go.
    pub(super) fn churned(&self) {
        self.churned.fetch_add(1, Relaxed);
    }

    /// Counts requests sent.
    pub(super) fn sent(&self, count: u64, now: Duration) {
        self.requests.fetch_add(count, Relaxed);
        if self.outstanding.fetch_add(count, Relaxed) == 0 {
            self.last_ns.store(now.as_nanos() as u64, Relaxed);
        }
    }

    /// Counts replies, all received at one moment; `gap` is how long the connection had waited.
    pub(super) fn received(&self, batch: &Batch, now: Duration, gap: Duration) {
        let count = batch.latencies.len() as u64;
        self.replies.fetch_add(count, Relaxed);
        self.acknowledged.fetch_add(batch.acknowledged, Relaxed);
        self.reads.fetch_add(batch.reads, Relaxed);
        self.waited(count, now, gap);
        let mut detail = self.detail();
        for latency in &batch.latencies {
            detail.latencies.saturating_record((latency.as_micros() as u64).max(1));
        }
        let since = now.saturating_sub(detail.begun).as_millis() as u64;
        let bucket = (since / BUCKET_MS) as usize;
        if bucket < MAX_BUCKETS {
            if detail.timeline.len() <= bucket {
                detail.timeline.resize(bucket + 1, 0);
            }
            detail.timeline[bucket] += count as u32;
        }
    }

    /// Notes the end of a wait in which `settled` requests were answered or given up.
    fn waited(&self, settled: u64, now: Duration, gap: Duration) {
        let now = now.as_nanos() as u64;
        self.connection_gap_ns.fetch_max(gap.as_nanos() as u64, Relaxed);
        self.gap_ns.fetch_max(now.saturating_sub(self.last_ns.swap(now, Relaxed)), Relaxed);
        self.outstanding.fetch_sub(settled, Relaxed);
    }

    /// Counts a broken connection that gives up `waiting` requests after waiting for `gap`.
    pub(super) fn broke(&self, waiting: usize, now: Duration, gap: Duration, who: &str, why: &str) {
        self.broken.fetch_add(1, Relaxed);
        if waiting > 0 {
            self.connection_gap_ns.fetch_max(gap.as_nanos() as u64, Relaxed);
            if self.outstanding.fetch_sub(waiting as u64, Relaxed) == waiting as u64 {
                // Nobody else waits: the wait of the whole client ends here, without a reply.
                let waited = (now.as_nanos() as u64).saturating_sub(self.last_ns.load(Relaxed));
                self.gap_ns.fetch_max(waited, Relaxed);
            }
        }
        let text = format!("{who} broke: {why}, {waiting} requests waiting");
        self.note(0, now, &text);
    }

    /// Counts lost writes and a wrong reply.
    pub(super) fn failed(&self, lost: u64, wrong: bool, who: &str, story: &Story) {
        self.lost.fetch_add(lost, Relaxed);
        self.wrong.fetch_add(u64::from(wrong), Relaxed);
        let kind = match (lost, wrong) {
            (0, false) => return,
            (0, true) => "wrong reply".to_owned(),
            (lost, _) => format!("{lost} lost"),
        };
        let Story { command, expected, got } = story;
        let text = format!("{who}, {kind}: {command}: expected {expected}, got {got}");
        self.note(1, self.now(), &text);
    }

    /// Keeps a description, of the first few of a kind (0: connections, 1: replies).
    fn note(&self, kind: usize, now: Duration, text: &str) {
        let mut detail = self.detail();
        detail.described[kind] += 1;
        if detail.described[kind] <= MAX_NOTES {
            let at = now.saturating_sub(detail.begun).as_secs_f64() * 1e3;
            detail.notes.push(format!("{at:.1} ms: {text}"));
        }
    }

    fn progress(&self) -> Progress {
        let (now, replies) = (self.now(), self.replies.load(Relaxed));
        let (since, before) = std::mem::replace(&mut self.detail().looked, (now, replies));
        let elapsed = now.saturating_sub(since).as_secs_f64();
        let waiting = self.outstanding.load(Relaxed) > 0;
        let silent = (now.as_nanos() as u64).saturating_sub(self.last_ns.load(Relaxed));
        Progress {
            phase: self.phase(),
            populated_bytes: self.populated.load(Relaxed),
            requests: self.requests.load(Relaxed),
            replies,
            acknowledged: self.acknowledged.load(Relaxed),
            rate: if elapsed > 0.0 { replies.saturating_sub(before) as f64 / elapsed } else { 0.0 },
            gap_ms: if waiting { silent as f64 / 1e6 } else { 0.0 },
            errors: self.lost.load(Relaxed) + self.wrong.load(Relaxed) + self.broken.load(Relaxed),
        }
    }

    fn phase(&self) -> Phase {
        let phases =
            [Phase::Connecting, Phase::Populating, Phase::Running, Phase::Auditing, Phase::Done];
        let now = self.phase.load(Relaxed);
        phases.into_iter().find(|phase| *phase as u8 == now).unwrap_or(Phase::Idle)
    }

    /// The report of a load that is over.
    pub(super) fn report(
        &self,
        connections: usize,
        lasted: Duration,
        populate: Duration,
    ) -> Report {
        let detail = self.detail();
        let latencies = &detail.latencies;
        let at = |quantile| latencies.value_at_quantile(quantile);
        let (p50, p90, p99) = (at(0.5), at(0.9), at(0.99));
        let latency_us =
            LatencySummary { p50, p90, p99, max: latencies.max(), count: latencies.len() };
        Report {
            requests: self.requests.load(Relaxed),
            acknowledged_writes: self.acknowledged.load(Relaxed),
            reads: self.reads.load(Relaxed),
            lost_writes: self.lost.load(Relaxed),
            wrong_replies: self.wrong.load(Relaxed),
            broken_connections: self.broken.load(Relaxed),
            gap_ms: self.gap_ns.load(Relaxed) as f64 / 1e6,
            connection_gap_ms: self.connection_gap_ns.load(Relaxed) as f64 / 1e6,
            latency_us,
            rate_per_s: self.replies.load(Relaxed) as f64 / lasted.as_secs_f64().max(1e-9),
            connections,
            churned: self.churned.load(Relaxed),
            duration_s: lasted.as_secs_f64(),
            populate_s: populate.as_secs_f64(),
            history: None,
            notes: detail.notes.clone(),
            timeline_ms_bucket: BUCKET_MS,
            timeline: detail.timeline.clone(),
        }
    }

    fn detail(&self) -> MutexGuard<'_, Detail> {
        // Counters only: they stay usable when a thread that held the lock panicked.
        self.detail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
