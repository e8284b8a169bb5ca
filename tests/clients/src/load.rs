//! A load generator that believes nothing: it keeps the history of all it was promised and checks
//! each reply against it, byte for byte.
//!
//! ```text
//! connect -> populate (every key, version 1) -> load (checked) -> drain -> audit (read all back)
//! ```
//!
//! Each connection owns the keys that only it writes, so the history of a key is the order of
//! requests on one connection, and a reply is right or wrong, never "possible". A connection that
//! breaks is counted and never opened again: to a client of a protected service it must not
//! happen.
//!
//! Invariant: `lost_writes` and `wrong_replies` are zero only if every write that was
//! acknowledged, in populate or load, was read back at the end, or replaced by a later one.

mod audit;
mod churn;
mod connection;
mod ledger;
mod pace;
mod stats;
mod together;
mod values;

pub use stats::{LatencySummary, LoadHandle, Phase, Progress, Report};
pub use together::{HistoryReport, Offence};

use crate::Protocol;
use connection::{Connection, Wire};
use ledger::{Layout, Ledger};
use pace::Pacer;
use stats::Shared;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use together::Together;
use tokio::task::JoinSet;
use values::Values;

pub(crate) use values::describe;

/// Connections opened at the same time at the start, so that the listener's backlog holds them.
const CONNECT_AT_ONCE: usize = 64;

/// What load to make. Start from [`LoadConfig::new`].
#[derive(Debug, Clone)]
pub struct LoadConfig {
    /// The server.
    pub target: SocketAddr,
    /// What it speaks.
    pub protocol: Protocol,
    /// Whether a part of the writes increments counters, one of them shared by all connections;
    /// otherwise all writes set keys.
    pub counters: bool,
    /// Connections, all opened at the start; at least 1.
    pub connections: usize,
    /// Requests that a connection keeps in flight in the closed loop; at least 1.
    pub pipeline: usize,
    /// Bytes in a value, least and most. A value is never shorter than its own label.
    pub value_size: (usize, usize),
    /// Keys that are written, of all connections together; at least one for each connection.
    pub keys: u64,
    /// Share of requests that read, from 0 to 1. The others set keys or increment counters.
    pub read_ratio: f64,
    /// Requests per second of all connections together, on a fixed schedule (open loop); `None`
    /// sends as fast as replies come (closed loop).
    pub rate: Option<f64>,
    /// Connections opened and closed again each second beside the load; every second one of them
    /// is closed at once, the others ask for something first.
    pub churn: Option<f64>,
    /// Connections beside the load that read and write the same few keys, and whose history is judged
    /// in the end.
    pub history: Option<usize>,
    /// How long; `None` until [`LoadHandle::stop`].
    pub duration: Option<Duration>,
    /// Seed of the sequence of requests and of the values.
    pub seed: u64,
    /// Bytes of values loaded at the start. Above what `keys` take, further keys are made that
    /// are only read.
    pub populate_bytes: u64,
    /// Start of all key names; two generators at one server need two.
    pub prefix: String,
    /// Also reads everything back over fresh connections at the end.
    pub fresh_audit: bool,
    /// Limit for opening a connection.
    pub connect_timeout: Duration,
    /// A request without a reply for so long breaks its connection.
    pub reply_timeout: Duration,
}

impl LoadConfig {
    /// RESP: a closed loop of 8 connections, one request each at a time, half of them reads of 10,000
    /// keys of 64 to 1024 bytes, until stopped.
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            protocol: Protocol::Resp,
            counters: true,
            connections: 8,
            pipeline: 1,
            value_size: (64, 1024),
            keys: 10_000,
            read_ratio: 0.5,
            rate: None,
            churn: None,
            history: None,
            duration: None,
            seed: 1,
            populate_bytes: 0,
            prefix: "nilicon:".to_owned(),
            fresh_audit: false,
            connect_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), LoadError> {
        let (least, most) = self.value_size;
        let bad = if self.connections == 0 {
            "connections is 0, give at least 1"
        } else if self.pipeline == 0 {
            "pipeline is 0, give at least 1"
        } else if least > most || most > values::MAX_SIZE {
            "value_size must be (least, most) with most at most 16 MiB"
        } else if self.keys < self.connections as u64 || self.key_count() > u64::from(u32::MAX) {
            "keys must be at least one for each connection, and below 2^32 with those populated"
        } else if !(0.0..=1.0).contains(&self.read_ratio) {
            "read_ratio must be between 0 and 1"
        } else if self.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            "rate must be above 0; leave it out for a closed loop"
        } else if self.churn.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            "churn must be above 0; leave it out for connections that stay"
        } else if self.history == Some(0) {
            "history must be at least one connection; leave it out for none"
        } else {
            return Ok(());
        };
        Err(LoadError::Config(bad))
    }

    /// Keys in all: those written, and those only read that fill up to `populate_bytes`.
    fn key_count(&self) -> u64 {
        let mean = ((self.value_size.0 + self.value_size.1) / 2).max(values::LABEL) as u64;
        self.keys.max(self.populate_bytes.div_ceil(mean))
    }
}

/// Why a load could not begin. What happens later is in the [`Report`].
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A setting that makes no sense.
    #[error("load configuration: {0}")]
    Config(&'static str),
    /// A connection could not be opened.
    #[error("cannot connect to {target}; is the server there and reachable?")]
    Connect {
        /// The server.
        target: SocketAddr,
        /// What the kernel said, or that the time was up.
        #[source]
        source: std::io::Error,
    },
    /// No runtime, no timer.
    #[error("cannot set up the load generator")]
    Setup(#[source] std::io::Error),
}

/// Runs a load on a runtime of its own, of one thread: the calling one. Sockets are therefore
/// made in the network namespace of the caller.
///
/// # Errors
/// When the load cannot begin, see [`LoadError`].
pub fn run_blocking(config: LoadConfig, handle: LoadHandle) -> Result<Report, LoadError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(LoadError::Setup)?;
    runtime.block_on(run(config, handle))
}

/// Runs a load on the current tokio runtime, which needs its I/O and time drivers; `handle` must
/// be new, it watches and stops this load.
///
/// # Errors
/// When the load cannot begin, see [`LoadError`].
pub async fn run(config: LoadConfig, handle: LoadHandle) -> Result<Report, LoadError> {
    config.check()?;
    let shared = handle.shared();
    let config = Arc::new(config);
    shared.enter(Phase::Connecting);
    let wires = connect_all(&config, config.connections).await?;
    let together = connect_all(&config, config.history.unwrap_or(0)).await?;
    let layout = Arc::new(Layout {
        prefix: config.prefix.clone(),
        connections: config.connections as u64,
        written: config.keys,
        counters: config.counters,
        keys: config.key_count(),
        values: Values { seed: config.seed, size: config.value_size },
    });
    let connections = wires.into_iter().enumerate().map(|(number, wire)| Connection {
        number,
        wire,
        ledger: Ledger::new(layout.clone(), shared.counter.clone(), number as u64),
        shared: shared.clone(),
        config: config.clone(),
        broken: false,
    });
    let mut connections: Vec<Connection> = connections.collect();

    shared.enter(Phase::Populating);
    let begun = tokio::time::Instant::now();
    connections = each(connections, |mut connection| async move {
        connection.populate().await;
        connection
    })
    .await;
    let populate = begun.elapsed();

    let paces = pacers(&config, connections.len())?;
    shared.begin_load();
    let stopper = stopper(&shared, config.duration);
    let mut churn = JoinSet::new();
    if let Some(rate) = config.churn {
        churn.spawn(churn::run(config.clone(), shared.clone(), rate));
    }
    let mut history = JoinSet::new();
    if config.history.is_some() {
        history.spawn(Together::new(together, &config).run(config.clone(), shared.clone()));
    }
    let paced: Vec<_> = connections.into_iter().zip(paces).collect();
    connections = each(paced, |(mut connection, pace)| async move {
        connection.load(pace).await;
        connection
    })
    .await;
    drop(stopper);
    let lasted = shared.end_load();
    // The load is over when all its connections are broken, too.
    shared.stop();
    churn.join_all().await;
    let seen = history.join_all().await.pop();

    shared.enter(Phase::Auditing);
    audit::run(connections, &layout, &config, &shared).await;
    let history = match seen {
        Some(seen) => Some(seen.judge(&config, &shared).await),
        None => None,
    };
    shared.enter(Phase::Done);
    Ok(Report { history, ..shared.report(config.connections, lasted, populate) })
}

/// Ends the load after its time. Aborted when dropped.
fn stopper(shared: &Arc<Shared>, duration: Option<Duration>) -> JoinSet<()> {
    let shared = shared.clone();
    let mut task = JoinSet::new();
    if let Some(duration) = duration {
        task.spawn(async move {
            tokio::time::sleep(duration).await;
            shared.stop();
        });
    }
    task
}

/// Schedules for the open loop, staggered so that the load as a whole is even.
fn pacers(config: &LoadConfig, count: usize) -> Result<Vec<Option<Pacer>>, LoadError> {
    let Some(rate) = config.rate else { return Ok((0..count).map(|_| None).collect()) };
    let step = Duration::from_secs_f64(count as f64 / rate);
    let pacer = |number: usize| Pacer::new(step.mul_f64(number as f64 / count as f64), step);
    (0..count).map(|number| pacer(number).map(Some).map_err(LoadError::Setup)).collect()
}

async fn connect_all(config: &LoadConfig, count: usize) -> Result<Vec<Wire>, LoadError> {
    let mut wires = Vec::with_capacity(count);
    while wires.len() < count {
        let mut group = JoinSet::new();
        for _ in 0..CONNECT_AT_ONCE.min(count - wires.len()) {
            group.spawn(Wire::connect(config.target, config.protocol, config.connect_timeout));
        }
        for wire in group.join_all().await {
            let target = config.target;
            wires.push(wire.map_err(|source| LoadError::Connect { target, source })?);
        }
    }
    Ok(wires)
}

/// Runs one step on all items at once; the results come in any order.
async fn each<T, U, F, Fut>(items: Vec<T>, step: F) -> Vec<U>
where
    U: Send + 'static,
    F: Fn(T) -> Fut,
    Fut: Future<Output = U> + Send + 'static,
{
    items.into_iter().map(step).collect::<JoinSet<U>>().join_all().await
}
