//! The load of a run: each client is a process of its own in the namespace of its node.
//!
//! ```text
//! run                                   nilicon __client
//!  |-- stdin: one line, ClientSpec -------->|  connect, populate, load
//!  |<------------ stdout: Progress a line --|
//!  |-- stdin: "stop" ---------------------->|  drain, audit
//!  |<-------------- stdout: Report, or Failed
//! ```
//! Invariant: a client does not outlive its run. It ends at the end of its standard input, and
//! [`Clients`] kills and reaps what is left when it is dropped.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use netns_tools::lab::Lab;
use netns_tools::topology::{Client, ClientProtocol, Topology};
use nilicon_clients::Protocol;
use nilicon_clients::load::{self, LoadConfig, LoadHandle, Phase};
use serde::{Deserialize, Serialize};

use super::report::ClientReport;
use crate::agent::monotonic_us;

/// How often a client looks at itself.
const LOOK: Duration = Duration::from_millis(10);
/// How often it says what it sees, if nothing special happens.
const TELL: Duration = Duration::from_millis(100);
/// How many of these moments the rate is taken over: a second.
const RATE_OVER: usize = 10;
/// The line that ends the load.
const STOP: &str = "stop";
/// Exit code of a client whose run has gone.
const ABANDONED: i32 = 3;

/// What load a client process makes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ClientSpec {
    target: SocketAddr,
    protocol: Protocol,
    counters: bool,
    connections: usize,
    pipeline: usize,
    value_size: (usize, usize),
    keys: u64,
    read_ratio: f64,
    rate: Option<f64>,
    churn: Option<f64>,
    history: Option<usize>,
    duration: Option<Duration>,
    seed: u64,
    populate_bytes: u64,
    prefix: String,
    reply_timeout: Duration,
}

/// What a client is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ClientPhase {
    Connecting,
    Populating,
    Running,
    Auditing,
}

/// A client at one moment. Times are CLOCK_MONOTONIC in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct ClientProgress {
    pub(super) phase: ClientPhase,
    pub(super) populated_bytes: u64,
    pub(super) requests: u64,
    pub(super) replies: u64,
    /// Replies per second over the last second.
    pub(super) rate: f64,
    /// Milliseconds since the last reply, while requests wait; else 0.
    pub(super) gap_ms: f64,
    pub(super) errors: u64,
    /// When it last saw a reply to its load.
    pub(super) last_reply_us: Option<u64>,
    /// When its load was over.
    pub(super) load_over_us: Option<u64>,
}

/// What a client process says, one a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    Progress(ClientProgress),
    Report(Box<ClientReport>),
    Failed(String),
}

impl ClientSpec {
    /// The load that a topology's client number `index` makes.
    fn of(
        topology: &Topology,
        index: usize,
        client: &Client,
        seed: u64,
        reply_timeout: Duration,
    ) -> Result<Self> {
        let target = topology
            .target_socket(&client.target)
            .with_context(|| format!("there is no container {}", client.target.container))?;
        Ok(Self {
            target,
            protocol: match client.protocol {
                ClientProtocol::Resp => Protocol::Resp,
                ClientProtocol::Memcached => Protocol::Memcached,
                ClientProtocol::Http => Protocol::Http,
            },
            counters: client.counters,
            connections: client.connections,
            pipeline: client.pipeline,
            value_size: (client.value_size.min as usize, client.value_size.max as usize),
            keys: client.keys.max(client.connections as u64),
            read_ratio: client.read_ratio.get(),
            rate: client.rate.map(|rate| rate as f64),
            churn: client.churn.map(|rate| rate as f64),
            history: client.history,
            duration: client.duration.map(|duration| *duration),
            seed: seed.wrapping_add(index as u64),
            populate_bytes: client.populate.map_or(0, |size| size.0),
            // Clients of one server must not write each other's keys.
            prefix: format!("{}-{index}:", client.name()),
            reply_timeout,
        })
    }

    fn config(self) -> LoadConfig {
        LoadConfig {
            protocol: self.protocol,
            counters: self.counters,
            connections: self.connections,
            pipeline: self.pipeline,
            value_size: self.value_size,
            keys: self.keys,
            read_ratio: self.read_ratio,
            rate: self.rate,
            churn: self.churn,
            history: self.history,
            duration: self.duration,
            seed: self.seed,
            populate_bytes: self.populate_bytes,
            prefix: self.prefix,
            reply_timeout: self.reply_timeout,
            ..LoadConfig::new(self.target)
        }
    }
}

/// One client process, as its run knows it.
#[derive(Debug)]
pub(super) struct ClientState {
    /// The client's name.
    pub(super) name: String,
    /// The newest that it said about itself.
    pub(super) progress: Option<ClientProgress>,
    /// What it found in the end.
    pub(super) report: Option<ClientReport>,
    stdin: Option<ChildStdin>,
    child: Child,
}

impl ClientState {
    /// Whether it has come so far.
    pub(super) fn has_reached(&self, phase: ClientPhase) -> bool {
        self.report.is_some() || self.progress.is_some_and(|progress| progress.phase >= phase)
    }
}

/// All clients of a run.
#[derive(Debug)]
pub(super) struct Clients {
    /// In the order of the topology.
    pub(super) all: Vec<ClientState>,
    said: Receiver<(usize, Option<Message>)>,
    lab: Lab,
}

impl Clients {
    /// Starts all clients of a lab.
    ///
    /// # Errors
    /// A process cannot be started.
    pub(super) fn start(lab: &Lab, seed: u64, reply_timeout: Duration) -> Result<Self> {
        let (say, said) = channel();
        let mut clients = Self { all: Vec::new(), said, lab: lab.clone() };
        for (index, client) in lab.topology().clients.iter().enumerate() {
            let spec = ClientSpec::of(lab.topology(), index, client, seed, reply_timeout)?;
            let state = clients
                .start_one(index, client, &spec, say.clone())
                .with_context(|| format!("cannot start the client {}", client.name()))?;
            clients.all.push(state);
        }
        Ok(clients)
    }

    fn start_one(
        &self,
        index: usize,
        client: &Client,
        spec: &ClientSpec,
        say: Sender<(usize, Option<Message>)>,
    ) -> Result<ClientState> {
        let mut command = Command::new(super::own_program()?);
        command
            .arg("__client")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.log(index))?)
            // Ctrl-C is for the run, which then ends its clients.
            .process_group(0);
        let mut child = self.lab.namespace(&client.node)?.spawn(&mut command)?;
        let mut stdin = child.stdin.take().context("the process has no standard input")?;
        let stdout = child.stdout.take().context("the process has no standard output")?;
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let message = serde_json::from_str(&line)
                    .unwrap_or_else(|error| Message::Failed(format!("it said {line:?}: {error}")));
                // The run may be gone, and then nobody needs to know.
                let _ = say.send((index, Some(message)));
            }
            let _ = say.send((index, None));
        });
        let mut text = serde_json::to_string(spec)?;
        text.push('\n');
        stdin.write_all(text.as_bytes())?;
        Ok(ClientState {
            name: client.name().to_owned(),
            progress: None,
            report: None,
            stdin: Some(stdin),
            child,
        })
    }

    fn log(&self, index: usize) -> std::path::PathBuf {
        self.lab.directory().join(format!("client-{index}.log"))
    }

    /// Takes in what the clients have said; waits up to `patience` for the first word.
    ///
    /// # Errors
    /// A client could not do its work, or ended without a report.
    pub(super) fn listen(&mut self, patience: Duration) -> Result<()> {
        let mut next = self.said.recv_timeout(patience).ok();
        while let Some((index, message)) = next {
            let client = &mut self.all[index];
            match message {
                Some(Message::Progress(progress)) => client.progress = Some(progress),
                Some(Message::Report(report)) => client.report = Some(*report),
                Some(Message::Failed(why)) => bail!("the client {} failed: {why}", client.name),
                None if client.report.is_none() => {
                    let status = client.child.wait().context("cannot wait for a client")?;
                    let name = client.name.clone();
                    let tail = super::deploy::tail_of(&self.log(index));
                    return Err(anyhow!(
                        "the client {name} ended without a report ({status}){tail}"
                    ));
                }
                None => {}
            }
            next = self.said.try_recv().ok();
        }
        Ok(())
    }

    /// Whether all have come so far.
    pub(super) fn have_reached(&self, phase: ClientPhase) -> bool {
        self.all.iter().all(|client| client.has_reached(phase))
    }

    /// Whether all have reported.
    pub(super) fn are_done(&self) -> bool {
        self.all.iter().all(|client| client.report.is_some())
    }

    /// Ends the load of all clients; they go on to their audit.
    pub(super) fn stop(&mut self) {
        for stdin in self.all.iter_mut().filter_map(|client| client.stdin.as_mut()) {
            // One that is done already does not read this.
            let _ = writeln!(stdin, "{STOP}").and_then(|()| stdin.flush());
        }
    }

    /// Replies per second over all clients, the longest present wait in milliseconds, and errors.
    pub(super) fn pulse(&self) -> (f64, f64, u64) {
        let now = self.all.iter().filter_map(|client| client.progress);
        now.fold((0.0, 0.0, 0), |(rate, gap, errors), progress| {
            (rate + progress.rate, f64::max(gap, progress.gap_ms), errors + progress.errors)
        })
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        for client in &mut self.all {
            drop(client.stdin.take());
            // It has ended, or ends now; either way it is reaped.
            let _ = client.child.kill();
            let _ = client.child.wait();
        }
    }
}

/// The client process: reads what load to make from standard input, makes it, tells.
///
/// # Errors
/// Standard input holds no description of a load.
pub(super) fn client_main() -> Result<()> {
    let mut line = String::new();
    io::stdin().read_line(&mut line).context("cannot read what load to make")?;
    let spec: ClientSpec =
        serde_json::from_str(&line).context("`__client` is for internal use; see `nilicon run`")?;
    let handle = LoadHandle::new();
    let stopper = handle.clone();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if line == STOP {
                stopper.stop();
            }
        }
        std::process::exit(ABANDONED);
    });
    let watched = handle.clone();
    thread::spawn(move || watch(&watched));
    let resets = super::resets::count(spec.target).context("cannot listen for resets")?;
    let message = match load::run_blocking(spec.config(), handle) {
        Ok(report) => {
            let resets = resets.load(Relaxed);
            Message::Report(Box::new(ClientReport { resets, ..ClientReport::from(report) }))
        }
        Err(error) => Message::Failed(crate::chain::chain(&anyhow!(error))),
    };
    tell(&message);
    Ok(())
}

fn tell(message: &Message) {
    if let Ok(text) = serde_json::to_string(message) {
        let mut out = io::stdout().lock();
        // Without a reader the end of standard input ends this process.
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }
}

/// Events per second, from the oldest count to the newest.
fn rate_of(counts: &VecDeque<(Instant, u64)>) -> f64 {
    let (Some((from, before)), Some((to, after))) = (counts.front(), counts.back()) else {
        return 0.0;
    };
    let seconds = to.duration_since(*from).as_secs_f64();
    if seconds > 0.0 { (after - before) as f64 / seconds } else { 0.0 }
}

/// Looks at the load all the time and tells now and then.
fn watch(handle: &LoadHandle) {
    let mut told: Option<(Instant, ClientPhase)> = None;
    let mut counts: VecDeque<(Instant, u64)> = VecDeque::new();
    let (mut last_reply_us, mut load_over_us, mut seen) = (None, None, 0);
    loop {
        let now = handle.progress();
        let phase = match now.phase {
            Phase::Idle | Phase::Connecting => ClientPhase::Connecting,
            Phase::Populating => ClientPhase::Populating,
            Phase::Running => ClientPhase::Running,
            Phase::Auditing => ClientPhase::Auditing,
            Phase::Done => return,
        };
        if phase >= ClientPhase::Running && now.replies > seen && load_over_us.is_none() {
            last_reply_us = Some(monotonic_us());
        }
        seen = now.replies;
        if phase > ClientPhase::Running && load_over_us.is_none() {
            load_over_us = Some(monotonic_us());
        }
        if told.is_none_or(|(at, told)| told != phase || at.elapsed() >= TELL) {
            told = Some((Instant::now(), phase));
            if counts.len() > RATE_OVER {
                counts.pop_front();
            }
            counts.push_back((Instant::now(), now.replies));
            tell(&Message::Progress(ClientProgress {
                phase,
                populated_bytes: now.populated_bytes,
                requests: now.requests,
                replies: now.replies,
                rate: rate_of(&counts),
                gap_ms: now.gap_ms,
                errors: now.errors,
                last_reply_us,
                load_over_us,
            }));
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_of_a_load_survives_the_pipe() {
        let topology = Topology::parse("demo", super::super::demo::TOPOLOGY).unwrap();
        let timeout = Duration::from_secs(9);
        let spec = ClientSpec::of(&topology, 0, &topology.clients[0], 5, timeout).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<ClientSpec>(&text).unwrap(), spec);
        let config = spec.config();
        assert_eq!(config.target, "10.77.0.10:6379".parse().unwrap());
        assert_eq!((config.seed, config.prefix.as_str()), (5, "client-0:"));
        assert_eq!((config.populate_bytes, config.reply_timeout), (20_000_000, timeout));
    }

    #[test]
    fn a_rate_needs_two_counts() {
        let start = Instant::now();
        let mut counts = VecDeque::from([(start, 100)]);
        assert_eq!(rate_of(&counts), 0.0);
        counts.push_back((start + Duration::from_millis(500), 350));
        assert_eq!(rate_of(&counts), 500.0);
    }

    #[test]
    fn phases_are_in_order() {
        use ClientPhase::{Auditing, Connecting, Populating, Running};
        assert!(Connecting < Populating && Populating < Running && Running < Auditing);
    }
}
