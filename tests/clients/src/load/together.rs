//! Connections beside the load that write the same few keys, and write down what they were told and
//! when. In the end it is judged whether a single register for each key can have said all of it: see
//! [`history`](crate::history). So nobody's own rules are asked, only what was seen.
//!
//! ```text
//! connect -> every key is 0 -> get, set, increment; a short pause; again -> get every key -> judge
//! ```
//! Invariants: an operation is asked before its first byte is sent and answered after its last byte is
//! received, by one clock. A request whose connection broke, or that got an error, stays without an
//! answer: it may have happened. At most [`MAX_OPERATIONS`] are kept; then the connections ask no more.

use super::LoadConfig;
use super::connection::{Broken, Wire};
use super::ledger::{Story, describe_answer};
use super::stats::Shared;
use crate::history::{self, Answer, Call, Operation, Verdict};
use crate::protocol::{self, Request};
use crate::resp::parse_integer;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Keys that all of them share.
const KEYS: usize = 3;
/// Longest pause of a connection between an answer and its next question, in milliseconds.
const PAUSE_MS: u64 = 4;
/// Operations of all connections together.
const MAX_OPERATIONS: usize = 400_000;
/// What the judge may remember of one key: some hundred MB.
const JUDGE_LIMIT: usize = 2_000_000;
/// Between the numbers that are set, so that no increments reach from one to the next.
const APART: i64 = 1_000_000;

/// What the history of the shared keys says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryReport {
    /// Connections that wrote it.
    pub connections: usize,
    /// Operations in it.
    pub operations: u64,
    /// Those of them that got no answer.
    pub unanswered: u64,
    /// Whether it can be explained; none if that was too hard to tell, or it could not begin.
    pub linearizable: Option<bool>,
    /// The first key that cannot be explained.
    pub offence: Option<Offence>,
}

/// A key whose history no register can have made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offence {
    /// The key.
    pub key: String,
    /// What happened around it, a line each.
    pub operations: Vec<String>,
}

/// An operation with the number of its key.
type Noted = (usize, Operation);

/// The connections, before the load.
#[derive(Debug)]
pub(super) struct Together {
    wires: Vec<Wire>,
    keys: Arc<[String]>,
}

/// What they have seen, and those that are left.
#[derive(Debug)]
pub(super) struct Seen {
    keys: Arc<[String]>,
    connections: usize,
    survivors: Vec<Wire>,
    operations: Vec<Noted>,
    /// Whether every key was 0 when it began.
    begun: bool,
}

impl Together {
    pub(super) fn new(wires: Vec<Wire>, config: &LoadConfig) -> Self {
        let keys = (0..KEYS).map(|number| format!("{}shared-{number}", config.prefix));
        Self { wires, keys: keys.collect() }
    }

    /// Sets every key to 0. Without that there is nothing to begin with, and nobody asks.
    async fn begin(&mut self, config: &LoadConfig, shared: &Shared) -> bool {
        let Some(wire) = self.wires.first_mut() else { return false };
        for key in self.keys.iter() {
            match ask(wire, key, Call::Set(0), config.reply_timeout).await {
                Ok(Ok(_)) => {}
                Ok(Err(other)) => {
                    tell(shared, 0, key, Call::Set(0), &other);
                    return false;
                }
                Err(why) => {
                    let who = "together, before the load,";
                    shared.broke(0, shared.now(), Duration::ZERO, who, &why.to_string());
                    return false;
                }
            }
        }
        true
    }

    /// Asks over all connections until the load is to stop.
    pub(super) async fn run(mut self, config: Arc<LoadConfig>, shared: Arc<Shared>) -> Seen {
        let (keys, connections) = (self.keys.clone(), self.wires.len());
        let begun = self.begin(&config, &shared).await;
        let mut seen =
            Seen { keys, connections, survivors: Vec::new(), operations: Vec::new(), begun };
        if !begun {
            return seen;
        }
        let mut tasks = JoinSet::new();
        for (client, wire) in self.wires.into_iter().enumerate() {
            let most = MAX_OPERATIONS / connections;
            let (keys, config, shared) = (self.keys.clone(), config.clone(), shared.clone());
            let rng = fastrand::Rng::with_seed(config.seed ^ ((client as u64 + 1) << 40));
            let asker = Asker { client, connections, wire, keys, rng, most, noted: Vec::new() };
            tasks.spawn(asker.run(config, shared));
        }
        for (wire, mut noted) in tasks.join_all().await {
            seen.survivors.extend(wire);
            seen.operations.append(&mut noted);
        }
        seen
    }
}

/// One of the connections.
struct Asker {
    client: usize,
    connections: usize,
    wire: Wire,
    keys: Arc<[String]>,
    rng: fastrand::Rng,
    most: usize,
    noted: Vec<Noted>,
}

impl Asker {
    async fn run(
        mut self,
        config: Arc<LoadConfig>,
        shared: Arc<Shared>,
    ) -> (Option<Wire>, Vec<Noted>) {
        let mut stopped = shared.stopped();
        while self.noted.len() < self.most {
            let pause = Duration::from_millis(self.rng.u64(..PAUSE_MS));
            tokio::select! {
                biased;
                _ = stopped.wait_for(|stop| *stop) => break,
                () = sleep(pause) => {}
            }
            let key = self.rng.usize(..KEYS);
            let call = match self.rng.u8(..10) {
                0..4 => Call::Get,
                4..7 => Call::Set(self.number()),
                _ => Call::Increment,
            };
            let asked = shared.now();
            let answer = ask(&mut self.wire, &self.keys[key], call, config.reply_timeout).await;
            let now = shared.now();
            let mut operation =
                Operation { client: self.client, call, asked: nanos(asked), answered: None };
            let lasts = match answer {
                Ok(Ok(answer)) => {
                    operation.answered = Some((nanos(now), answer));
                    true
                }
                Ok(Err(other)) => {
                    tell(&shared, self.client, &self.keys[key], call, &other);
                    true
                }
                Err(why) => {
                    let who = format!("together {}", self.client);
                    shared.broke(0, now, now.saturating_sub(asked), &who, &why.to_string());
                    false
                }
            };
            self.noted.push((key, operation));
            if !lasts {
                return (None, self.noted);
            }
        }
        (Some(self.wire), self.noted)
    }

    /// A number that nobody else ever sets.
    fn number(&self) -> i64 {
        (self.noted.len() * self.connections + self.client + 1) as i64 * APART
    }
}

impl Seen {
    /// Reads every key once more and judges.
    pub(super) async fn judge(mut self, config: &LoadConfig, shared: &Shared) -> HistoryReport {
        if self.begun {
            self.read_all(config, shared).await;
        }
        let unanswered = self.operations.iter().filter(|(_, o)| o.answered.is_none()).count();
        let mut report = HistoryReport {
            connections: self.connections,
            operations: self.operations.len() as u64,
            unanswered: unanswered as u64,
            linearizable: self.begun.then_some(true),
            offence: None,
        };
        for (number, key) in self.keys.iter().enumerate() {
            let own = self.operations.iter().filter(|(of, _)| *of == number);
            let own: Vec<Operation> = own.map(|(_, operation)| *operation).collect();
            match history::check(Some(0), &own, JUDGE_LIMIT) {
                Verdict::Linearizable => {}
                Verdict::Unknown => report.linearizable = None,
                Verdict::Violation(violation) => {
                    report.linearizable = Some(false);
                    let operations = violation.story();
                    report.offence = Some(Offence { key: key.clone(), operations });
                    break;
                }
            }
        }
        report
    }

    /// What all keys are in the end, over any connection, or over a new one.
    async fn read_all(&mut self, config: &LoadConfig, shared: &Shared) {
        if self.survivors.is_empty() {
            let limit = config.connect_timeout;
            self.survivors.extend(Wire::connect(config.target, config.protocol, limit).await.ok());
        }
        while let Some(wire) = self.survivors.last_mut() {
            match read_each(wire, &self.keys, self.connections, config, shared).await {
                Ok(mut noted) => return self.operations.append(&mut noted),
                Err(why) => {
                    self.survivors.pop();
                    let who = "together, in the end,";
                    shared.broke(0, shared.now(), Duration::ZERO, who, &why.to_string());
                }
            }
        }
    }
}

async fn read_each(
    wire: &mut Wire,
    keys: &[String],
    client: usize,
    config: &LoadConfig,
    shared: &Shared,
) -> Result<Vec<Noted>, Broken> {
    let mut noted = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        let asked = nanos(shared.now());
        match ask(wire, key, Call::Get, config.reply_timeout).await? {
            Ok(answer) => {
                let answered = Some((nanos(shared.now()), answer));
                noted.push((number, Operation { client, call: Call::Get, asked, answered }));
            }
            Err(other) => tell(shared, client, key, Call::Get, &other),
        }
    }
    Ok(noted)
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// Asks, and waits for the answer; the inner error is one that does not fit.
async fn ask(
    wire: &mut Wire,
    key: &str,
    call: Call,
    limit: Duration,
) -> Result<Result<Answer, protocol::Answer>, Broken> {
    let name = key.as_bytes();
    match call {
        Call::Get => wire.dialogue.put(Request::Get(name)),
        Call::Set(value) => wire.dialogue.put(Request::Set(name, value.to_string().as_bytes())),
        Call::Increment => wire.dialogue.put(Request::Increment(name)),
    }
    wire.send(limit).await?;
    let answer = wire.reply(limit).await?;
    Ok(match (call, &answer) {
        (Call::Get, protocol::Answer::Value(None)) => Ok(Answer::Value(None)),
        (Call::Get, protocol::Answer::Value(Some(text))) => {
            parse_integer(text.trim_ascii()).map(|value| Answer::Value(Some(value))).ok_or(answer)
        }
        (Call::Set(_), protocol::Answer::Done) => Ok(Answer::Done),
        (Call::Increment, protocol::Answer::Number(value)) => Ok(Answer::Value(Some(*value))),
        _ => Err(answer),
    })
}

/// Counts an answer that does not fit what was asked.
fn tell(shared: &Shared, client: usize, key: &str, call: Call, got: &protocol::Answer) {
    let story = Story {
        command: format!("{call:?} {key}"),
        expected: "an answer to it".into(),
        got: describe_answer(got),
    };
    shared.failed(0, true, &format!("together {client}"), &story);
}
