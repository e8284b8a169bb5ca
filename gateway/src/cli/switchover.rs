//! `nilicon switchover`: moving a container to its other host on purpose.
//!
//! The agent that runs it does the work; this asks for it, waits until the other side runs the
//! container and is protected again, and tells how long it stood still.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_tools::lab::Lab;
use serde::Serialize;

use super::args::{Output, SwitchoverArgs};
use super::journal;
use super::numbers::{Spread, millis};
use super::view::LabView;
use super::{deploy, signals};
use crate::agent::control::request;
use crate::agent::status::Request;

/// How long one move may take, its preparation included.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the old side may take to become the backup.
const RESYNC_PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two moves. Linux answers a segment that it knows already at most twice a second
/// (tcp_invalid_ratelimit), so a peer that was asked just now where it is stays silent when it is
/// asked again.
const BETWEEN: Duration = Duration::from_millis(700);
/// How often agents are asked.
const POLL: Duration = Duration::from_millis(10);

/// One move.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Move {
    container: String,
    from: String,
    to: String,
    generation: u64,
    /// From its last stop on the old host until its threads ran on the new one.
    pause_ms: f64,
    /// From then on until it was protected again.
    resync_ms: f64,
}

/// All moves of one call.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Moves {
    moves: Vec<Move>,
    pause_ms: Spread<f64>,
}

/// `nilicon switchover`.
pub(super) fn switchover(args: &SwitchoverArgs) -> Result<()> {
    signals::catch()?;
    let lab = deploy::open(&args.lab)?;
    let container = the_container(&lab, args.container.as_deref())?;
    let mut moves = Vec::new();
    for move_number in 0..args.times {
        if move_number > 0 {
            thread::sleep(BETWEEN);
        }
        let done = move_once(&lab, &container)?;
        if args.output.output == Output::Text {
            println!(
                "{} moved from {} to {} in generation {}: it stood still for {}, and was \
                 protected again {} later",
                done.container,
                done.from,
                done.to,
                done.generation,
                millis(done.pause_ms),
                millis(done.resync_ms)
            );
        }
        moves.push(done);
    }
    let report = Moves { pause_ms: Spread::of(moves.iter().map(|done| done.pause_ms)), moves };
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text if args.times > 1 => println!(
            "{} moves: pause median {}, 99 % {}, max {}",
            args.times,
            millis(report.pause_ms.p50),
            millis(report.pause_ms.p99),
            millis(report.pause_ms.max)
        ),
        Output::Text => {}
    }
    Ok(())
}

/// The one that is meant, or the only one that is protected.
fn the_container(lab: &Lab, asked: Option<&str>) -> Result<String> {
    let protected = || lab.topology().protect.iter().map(|protect| protect.container.as_str());
    match asked {
        Some(name) if protected().any(|known| known == name) => Ok(name.to_owned()),
        Some(name) => bail!("the lab {} protects no container {name}", lab.name()),
        None => match protected().collect::<Vec<_>>()[..] {
            [] => bail!("the lab {} protects no container", lab.name()),
            [only] => Ok(only.to_owned()),
            ref several => bail!("say which container to move: {}", several.join(", ")),
        },
    }
}

fn move_once(lab: &Lab, container: &str) -> Result<Move> {
    let view = LabView::ask(lab);
    let now = view.container(container).context("no agent answers")?;
    let Some(from) = now.primary.clone() else { bail!("{container} does not run anywhere") };
    let generation = now.generation;
    let order = Request::Switchover { container: container.to_owned() };
    let answer = request(lab.name(), &from, &order)?;
    if let Some(refusal) = answer.refusal {
        bail!("{container} cannot move away from {from}: {refusal}");
    }
    let (to, record) = wait(PATIENCE, "the other side did not take it over", || {
        let all = journal::failovers(lab);
        let mut new = all.into_iter().filter(|f| f.container == container);
        Ok(new.find(|f| f.record.generation > generation).map(|f| (f.host, f.record)))
    })?;
    wait(RESYNC_PATIENCE, "it is not protected again", || {
        let view = LabView::ask(lab);
        let now = view.container(container).context("no agent answers")?;
        Ok((now.protected && now.primary.as_deref() == Some(&to)).then_some(()))
    })?;
    // Both hosts of a lab have one clock.
    let stopped = journal::last_stop(lab, container, &from, record.epoch)
        .with_context(|| format!("{from} has not written down its last stop"))?;
    let protected = journal::first_commit(lab, container, &to, record.generation)
        .with_context(|| format!("{to} has not written down an epoch"))?;
    Ok(Move {
        container: container.to_owned(),
        from,
        to,
        generation: record.generation,
        pause_ms: record.running_at_us.saturating_sub(stopped) as f64 / 1e3,
        resync_ms: protected.saturating_sub(record.running_at_us) as f64 / 1e3,
    })
}

fn wait<T>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        signals::check()?;
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what} within {patience:?}; see nilicon inspect");
        }
        thread::sleep(POLL);
    }
}
