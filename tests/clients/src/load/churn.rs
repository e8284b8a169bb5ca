//! Connections that come and go beside the load: every second one is closed as soon as it is open,
//! the others ask for a key that nobody writes, and close when they have the answer.
//!
//! Invariants: at most [`MAX_OPEN`] are open at once, beyond which opening falls behind its schedule;
//! each one that does not go as it should is counted as broken, and described.

use super::LoadConfig;
use super::connection::Wire;
use super::ledger::Story;
use super::stats::Shared;
use crate::protocol::{Answer, Request};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::interval;

/// Connections that are open, or being opened, at once.
const MAX_OPEN: usize = 1024;

/// Opens connections until the load is to stop, and waits for the last of them.
pub(super) async fn run(config: Arc<LoadConfig>, shared: Arc<Shared>, rate: f64) {
    let mut pace = interval(Duration::from_secs_f64(1.0 / rate));
    let mut stopped = shared.stopped();
    let mut open = JoinSet::new();
    for number in 0u64.. {
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stop| *stop) => break,
            _ = pace.tick() => {}
        }
        while open.try_join_next().is_some() {}
        if open.len() >= MAX_OPEN {
            open.join_next().await;
        }
        open.spawn(one(number, config.clone(), shared.clone()));
    }
    open.join_all().await;
}

async fn one(number: u64, config: Arc<LoadConfig>, shared: Arc<Shared>) {
    let begun = shared.now();
    let who = format!("churn {number}");
    let broke = |why: String| {
        shared.broke(0, shared.now(), shared.now().saturating_sub(begun), &who, &why);
    };
    // In a pause of the service a connection waits as long as an answer may.
    let limit = config.reply_timeout;
    let mut wire = match Wire::connect(config.target, config.protocol, limit).await {
        Ok(wire) => wire,
        Err(error) => return broke(format!("cannot connect: {error}")),
    };
    shared.churned();
    if number.is_multiple_of(2) {
        return;
    }
    let key = format!("{}absent", config.prefix);
    wire.dialogue.put(Request::Get(key.as_bytes()));
    let answer = match wire.send(limit).await {
        Ok(()) => wire.reply(limit).await,
        Err(why) => Err(why),
    };
    match answer {
        Ok(Answer::Value(None)) => {}
        Ok(other) => {
            let (expected, got) = ("nothing".to_owned(), format!("{other:?}"));
            shared.failed(0, true, &who, &Story { command: format!("get {key}"), expected, got });
        }
        Err(why) => broke(why.to_string()),
    }
}
