//! Reads everything back at the end and compares it with the histories.
//!
//! Invariant: each history is audited whole by one connection, any will do; what cannot be read
//! back by any, not even a fresh one, counts as lost.

use super::LoadConfig;
use super::connection::{Broken, Connection, Wire};
use super::ledger::{Judgement, Layout, Ledger, Story};
use super::stats::Shared;
use crate::protocol::Request;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// Reads in flight on one connection.
const WINDOW: usize = 64;
/// Fresh connections for an audit.
const FRESH: usize = 4;

/// Audits all histories: over the connections that survived, then over fresh ones if asked for,
/// or if something is left because none survived.
pub(super) async fn run(
    connections: Vec<Connection>,
    layout: &Layout,
    config: &LoadConfig,
    shared: &Arc<Shared>,
) {
    let mut survivors = Vec::new();
    let mut ledgers = Vec::new();
    for connection in connections {
        ledgers.push(connection.ledger);
        if !connection.broken {
            survivors.push(connection.wire);
        }
    }
    let mut round = Round { wires: survivors, done: Vec::new(), left: ledgers };
    round = round.run(shared, config, "a surviving connection").await;
    let mut counted = 0;
    if !read_shared_counter(&mut round.wires, layout, config, shared, &mut counted).await
        || config.fresh_audit
        || !round.left.is_empty()
    {
        round.wires = fresh(config, shared).await;
        if config.fresh_audit {
            round.left.append(&mut round.done);
        }
        round = round.run(shared, config, "a fresh connection").await;
        if !read_shared_counter(&mut round.wires, layout, config, shared, &mut counted).await {
            give_up(shared, "the shared counter", shared.counter.acknowledged() as u64);
        }
    }
    for ledger in &round.left {
        let lost = (0..ledger.audit_len()).map(|at| ledger.unread(at)).sum();
        give_up(shared, "all keys and counters of a connection", lost);
    }
}

/// Counts what nobody could read back as lost.
fn give_up(shared: &Shared, what: &str, lost: u64) {
    let (expected, got) = ("to read it back".into(), "no connection to read it over".into());
    shared.failed(lost, false, "audit", &Story { command: what.into(), expected, got });
}

async fn fresh(config: &LoadConfig, shared: &Shared) -> Vec<Wire> {
    let mut wires = Vec::new();
    while wires.len() < FRESH {
        match Wire::connect(config.target, config.protocol, config.connect_timeout).await {
            Ok(wire) => wires.push(wire),
            Err(error) => {
                let (who, why) = ("a fresh connection for the audit", error.to_string());
                shared.broke(0, shared.now(), Duration::ZERO, who, &why);
                break;
            }
        }
    }
    wires
}

/// Histories to be audited, and the connections to do it with.
struct Round {
    wires: Vec<Wire>,
    done: Vec<Ledger>,
    left: Vec<Ledger>,
}

impl Round {
    /// Audits what is left over all wires at once; a wire that breaks is counted and dropped, and
    /// its history is left to another.
    async fn run(self, shared: &Arc<Shared>, config: &LoadConfig, who: &'static str) -> Self {
        let (limit, window) =
            (config.reply_timeout, config.protocol.window(WINDOW, config.pipeline));
        let todo = Arc::new(Mutex::new(self.left));
        let mut tasks = JoinSet::new();
        for mut wire in self.wires {
            let (todo, shared) = (todo.clone(), shared.clone());
            tasks.spawn(async move {
                let mut done = Vec::new();
                loop {
                    let next = todo.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some(mut ledger) = next else { return (Some(wire), done) };
                    match read_back(&mut wire, &mut ledger, &shared, limit, window).await {
                        Ok(()) => done.push(ledger),
                        Err(why) => {
                            todo.lock().unwrap_or_else(PoisonError::into_inner).push(ledger);
                            let (now, who) = (shared.now(), format!("{who}, in the audit,"));
                            shared.broke(0, now, Duration::ZERO, &who, &why.to_string());
                            return (None, done);
                        }
                    }
                }
            });
        }
        let mut round = Self { wires: Vec::new(), done: self.done, left: Vec::new() };
        for (wire, mut done) in tasks.join_all().await {
            round.wires.extend(wire);
            round.done.append(&mut done);
        }
        round.left = std::mem::take(&mut todo.lock().unwrap_or_else(PoisonError::into_inner));
        round
    }
}

/// Reads back all of one history.
async fn read_back(
    wire: &mut Wire,
    ledger: &mut Ledger,
    shared: &Shared,
    limit: Duration,
    window: usize,
) -> Result<(), Broken> {
    let all = ledger.audit_len();
    for from in (0..all).step_by(window) {
        let window = from..all.min(from + window);
        window.clone().for_each(|at| ledger.put_audit(at, &mut wire.dialogue));
        wire.send(limit).await?;
        for at in window {
            let reply = wire.reply(limit).await?;
            tell(shared, &ledger.judge_audit(at, &reply));
        }
    }
    Ok(())
}

/// Audits the counter of all over any of the wires; whether one could.
async fn read_shared_counter(
    wires: &mut Vec<Wire>,
    layout: &Layout,
    config: &LoadConfig,
    shared: &Shared,
    counted: &mut i64,
) -> bool {
    if !config.counters {
        return true;
    }
    while let Some(wire) = wires.last_mut() {
        wire.dialogue.put(Request::Get(&layout.shared_counter()));
        let answer = match wire.send(config.reply_timeout).await {
            Ok(()) => wire.reply(config.reply_timeout).await,
            Err(why) => Err(why),
        };
        match answer {
            Ok(reply) => {
                tell(shared, &shared.counter.judge_audit(counted, &reply));
                return true;
            }
            Err(why) => {
                wires.pop();
                let (now, who) = (shared.now(), "a connection, in the audit,");
                shared.broke(0, now, Duration::ZERO, who, &why.to_string());
            }
        }
    }
    false
}

fn tell(shared: &Shared, judgement: &Judgement) {
    if let Some(story) = &judgement.story {
        shared.failed(judgement.lost, judgement.wrong, "audit", story);
    }
}
