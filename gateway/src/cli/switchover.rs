//! `nilicon switchover`: moving a container to its other host on purpose.
//!
//! The agent that runs it does the work; this asks for it, waits until the other side runs the
//! container and is protected again, and tells how long it stood still.

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_tools::lab::Lab;
use serde::Serialize;

use super::args::{Output, SwitchoverArgs};
use super::journal;
use super::numbers::{Spread, median, millis};
use super::view::LabView;
use super::{deploy, signals};
use crate::agent::control::request;
use crate::agent::status::{FailoverPhases, Request};

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
pub(super) struct Move {
    pub(super) container: String,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) generation: u64,
    /// From its last stop on the old host until its threads ran on the new one.
    pub(super) pause_ms: f64,
    pub(super) pause_ms_by_phase: MovePhases,
    /// From then on until it was protected again.
    pub(super) resync_ms: f64,
}

/// What a pause is made of, in milliseconds. Probing overlaps preparing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct MovePhases {
    /// The last stop, and its checkpoint on the way to the other side, until that side begins.
    pub(super) hand_over: f64,
    pub(super) fence: f64,
    pub(super) apply: f64,
    pub(super) prepare: f64,
    pub(super) probe: f64,
    pub(super) connect: f64,
    pub(super) finish: f64,
    pub(super) plug: f64,
    pub(super) run: f64,
}

impl MovePhases {
    fn of(hand_over: f64, phases: &FailoverPhases) -> Self {
        Self {
            hand_over,
            fence: phases.fence,
            apply: phases.apply,
            prepare: phases.prepare,
            probe: phases.probe,
            connect: phases.connect,
            finish: phases.finish,
            plug: phases.plug,
            run: phases.run,
        }
    }

    /// Each phase as `figure` says, which is given the way to it.
    fn each(mut figure: impl FnMut(fn(&Self) -> f64) -> f64) -> Self {
        Self {
            hand_over: figure(|p| p.hand_over),
            fence: figure(|p| p.fence),
            apply: figure(|p| p.apply),
            prepare: figure(|p| p.prepare),
            probe: figure(|p| p.probe),
            connect: figure(|p| p.connect),
            finish: figure(|p| p.finish),
            plug: figure(|p| p.plug),
            run: figure(|p| p.run),
        }
    }

    /// All of them in a line.
    fn in_words(&self) -> String {
        let parts = [
            ("hand over", self.hand_over),
            ("fence", self.fence),
            ("apply", self.apply),
            ("prepare", self.prepare),
            ("probe", self.probe),
            ("connect", self.connect),
            ("finish", self.finish),
            ("plug", self.plug),
            ("run", self.run),
        ];
        parts.map(|(name, ms)| format!("{name} {}", millis(ms))).join(", ")
    }
}

/// Many moves, there and back.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Moves {
    pub(super) moves: Vec<Move>,
    pub(super) pause_ms: Spread<f64>,
    /// The median of each phase.
    pub(super) pause_ms_by_phase: MovePhases,
}

impl Moves {
    /// Puts moves together.
    pub(super) fn of(moves: Vec<Move>) -> Self {
        Self {
            pause_ms: Spread::of(moves.iter().map(|done| done.pause_ms)),
            pause_ms_by_phase: MovePhases::each(|phase| {
                median(moves.iter().map(|done| phase(&done.pause_ms_by_phase)))
            }),
            moves,
        }
    }

    /// Two lines for people.
    pub(super) fn lines(&self) -> [String; 2] {
        let Spread { p50, p99, max } = self.pause_ms;
        let (count, p50, p99, max) = (self.moves.len(), millis(p50), millis(p99), millis(max));
        [
            format!("{count} moves: pause median {p50}, 99 % {p99}, max {max}"),
            format!("a median pause: {}", self.pause_ms_by_phase.in_words()),
        ]
    }
}

/// Moves every protected container of a lab there and back, so often, in a thread of its own, which
/// tells of each move and ends at the first that fails.
pub(super) fn in_background(lab: &Lab, times: u32) -> Receiver<Result<Move>> {
    let (say, said) = channel();
    let lab = lab.clone();
    thread::spawn(move || {
        let containers: Vec<String> =
            lab.topology().protect.iter().map(|protect| protect.container.clone()).collect();
        for _ in 0..times {
            thread::sleep(BETWEEN);
            for container in &containers {
                let done = move_once(&lab, container);
                let failed = done.is_err();
                if say.send(done).is_err() || failed {
                    return;
                }
            }
        }
    });
    said
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
    let report = Moves::of(moves);
    match args.output.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
        Output::Text if args.times > 1 => println!("{}", report.lines().join("\n")),
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
    // Both hosts of a lab have one clock. What they say of themselves can be ahead of what they have
    // written down.
    let stopped = wait(PATIENCE, &format!("{from} has not written down its last stop"), || {
        Ok(journal::last_stop(lab, container, &from, record.epoch))
    })?;
    let protected = wait(PATIENCE, &format!("{to} has not written down an epoch"), || {
        Ok(journal::first_commit(lab, container, &to, record.generation))
    })?;
    let hand_over = record.suspected_at_us.saturating_sub(stopped) as f64 / 1e3;
    Ok(Move {
        container: container.to_owned(),
        from,
        to,
        generation: record.generation,
        pause_ms_by_phase: MovePhases::of(hand_over, &record.phases_ms),
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
