//! The primary's decisions: when a stop may begin, what is released, when to give up.
//!
//! ```text
//!              Connected                  Lost, silence, wrong digest
//! Connecting ------------> Protected -------------------------------> Severed
//!     ^ |                   |  |  ^ ^                                  | | |
//!     +-+ retry             |  |  | +------ Connected (full copy) -----+ | |
//!                           |  |  | caught up                          | |
//!                           |  | CatchingUp <--- Connected --- Alone <--+ |
//!                           |  |     +------------- Lost -------^ granted |
//!                           |  +-- hand over, all committed --> HandedOver|
//!                           +------ a newer generation ------> Demoted <--+
//! ```
//!
//! The only way to a release is a checked acknowledgement over the present connection (OC-1,
//! OC-3). While severed nothing is released: the container's output waits for a backup, for the
//! arbiter, or for its operator. `Demoted`, `HandedOver` and `Stopped` are final; the container
//! must not run on.
//!
//! `Alone` is the one state in which output needs no proof. A side comes there by a promotion or
//! by a grant, both in a generation that is its own: no copy of that generation is anywhere. What
//! a new backup gets while it catches up is provisional, so that it cannot promote from it. From
//! the first lasting checkpoint on, output is held; once that may have left, there is no way back
//! to `Alone` in the same generation.
//!
//! A primary rests ([`Pace`]) while nobody waits for anything: its container is quiet and protected, what
//! it sends is acknowledged at once, and the backup's pulses come and are not in doubt.

use super::LinkId;
use super::arbiter::Verdict;
use super::detector::{Config as Times, Detector, Pace};
use crate::ack::{AckError, AckLedger, CommitProof};
use crate::wire::message::{Bye, RefuseCode};
use crate::{Epoch, Generation};
use std::time::Duration;

/// Settings of a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Checkpoints that may be in flight; no stop begins beyond.
    pub depth: usize,
    /// When silence of the backup means that it is gone.
    pub times: Times,
    /// Pause between attempts to connect.
    pub retry: Duration,
    /// What to do without a backup that had a copy.
    pub on_loss: OnLoss,
    /// How long a backup may be gone before that is done.
    pub patience: Duration,
    /// How long a backup may leave a checkpoint unacknowledged, where the loss of it is acted on.
    pub slowest: Duration,
    /// A backup that acknowledges a provisional checkpoint within this time has caught up.
    pub calm: Duration,
    /// Checkpoints that a backup may acknowledge without having applied one: how fast it takes those
    /// says nothing.
    pub unapplied: u32,
}

/// What to do when the backup of a protected container is lost, or too slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// Hold output until there is a backup again.
    #[default]
    Freeze,
    /// Go on unprotected, once the arbiter has granted it.
    Degrade,
    /// End the container.
    Stop,
}

/// Provisional checkpoints beyond those after which a backup counts as caught up, however slow it is.
const MOST_ROUNDS: u32 = 8;

impl Default for Config {
    fn default() -> Self {
        Self {
            depth: 4,
            times: Times::default(),
            retry: Duration::from_millis(200),
            on_loss: OnLoss::Freeze,
            patience: Duration::from_millis(1000),
            slowest: Duration::from_millis(2000),
            calm: Duration::from_millis(50),
            unapplied: 1,
        }
    }
}

/// Why protection was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Severance {
    /// The transport gave up.
    #[error("the connection to the backup was lost")]
    Lost,
    /// Nothing was heard.
    #[error("the backup was silent for {0:?}")]
    Silence(Duration),
    /// An acknowledgement was wrong.
    #[error("the backup acknowledged what was not sent: {0}")]
    Acknowledgement(AckError),
    /// It does not take the container.
    #[error("the backup refuses the container ({0:?})")]
    Refused(RefuseCode),
    /// It said that it leaves.
    #[error("the backup leaves ({0:?})")]
    Bye(Bye),
    /// It lives and does not keep up.
    #[error("the backup has acknowledged nothing for {0:?}")]
    Slow(Duration),
}

/// Where the primary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No backup has taken the container yet.
    Connecting {
        /// When to try again; `None` while an attempt is under way.
        retry_at: Option<Duration>,
    },
    /// This side alone may act in its generation: output needs no proof.
    Alone {
        /// When to try again; `None` while an attempt is under way.
        retry_at: Option<Duration>,
    },
    /// A new backup gets provisional checkpoints; output needs no proof still.
    CatchingUp {
        /// Provisional checkpoints that it has acknowledged.
        rounds: u32,
    },
    /// A backup takes checkpoints.
    Protected {
        /// Whether it holds a first full copy.
        synced: bool,
    },
    /// The backup is gone; nothing is released.
    Severed {
        /// Why.
        reason: Severance,
        /// When to try again; `None` while an attempt is under way.
        retry_at: Option<Duration>,
    },
    /// The backup was asked to take over. Final.
    HandedOver,
    /// The backup was lost, and the policy is to end the container then. Final.
    Stopped,
    /// Another host runs the container in a newer generation. Final.
    Demoted {
        /// That generation.
        by: Generation,
    },
}

/// What happens to a primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Time passes.
    Tick,
    /// The attempt succeeded; the backup said welcome.
    Connected(LinkId),
    /// The backup, or the transport on its behalf, refused.
    Refused {
        /// The connection.
        link: LinkId,
        /// Why.
        code: RefuseCode,
        /// The newest generation that it knows.
        newest: Generation,
    },
    /// The attempt failed or the connection broke.
    Lost(LinkId),
    /// The backup says that it leaves.
    Bye {
        /// The connection.
        link: LinkId,
        /// Why.
        bye: Bye,
        /// The newest generation that it knows.
        newest: Generation,
    },
    /// Anything else was heard of the backup.
    Heard(LinkId),
    /// A pulse of the backup.
    Pulse {
        /// The connection that it belongs to.
        link: LinkId,
        /// How its next ones come.
        pace: Pace,
    },
    /// Whether the container has been quiet for a while: no output waits or is about to.
    Quiet(bool),
    /// All frames of a checkpoint but its last are with the transport. Give this before the
    /// last.
    ///
    /// The last frame may leave only if [`Primary::sends_on`] says so of the link afterwards.
    Sent {
        /// The connection that it goes over.
        link: LinkId,
        /// Its epoch.
        epoch: Epoch,
        /// Its digest.
        digest: u64,
        /// Its output did not wait for it.
        provisional: bool,
    },
    /// An acknowledgement.
    Ack {
        /// The connection.
        link: LinkId,
        /// As in the message.
        generation: Generation,
        /// As in the message.
        epoch: Epoch,
        /// As in the message.
        digest: u64,
    },
    /// The operator wants the backup to take over from this epoch, the last one. The container
    /// stands still.
    HandOver {
        /// Number of its last checkpoint.
        last: Epoch,
    },
    /// The arbiter's answer.
    Verdict {
        /// What was asked for.
        generation: Generation,
        /// The answer.
        verdict: Verdict,
    },
}

/// What a primary must do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Connect, and say hello in this core's generation.
    Connect(LinkId),
    /// The next checkpoint must be a full one.
    BeginFull,
    /// Output may leave.
    Release(CommitProof),
    /// Protection is interrupted: close the connection, release nothing.
    Severed(LinkId, Severance),
    /// From the next checkpoint on output is held: the backup has caught up.
    Hold,
    /// Output leaves without proof from now on, first what is held: this side acts alone in this
    /// generation.
    GoAlone(Generation),
    /// Ask the arbiter whether this side may act alone.
    Ask {
        /// The generation that this side is in.
        base: Generation,
        /// The one that it wants.
        wanted: Generation,
    },
    /// End the container: its backup is lost.
    Stop,
    /// Say goodbye with the last epoch; the container must not run here any longer.
    HandOver {
        /// The connection.
        link: LinkId,
        /// The last epoch.
        last: Epoch,
    },
    /// The container must not run here any longer; what it put out since the last release is
    /// void.
    Demoted {
        /// The newer generation.
        by: Generation,
    },
}

/// The primary of a container.
#[derive(Debug)]
pub struct Primary {
    config: Config,
    generation: Generation,
    state: State,
    link: LinkId,
    ledger: AckLedger,
    detector: Detector,
    committed: Epoch,
    handing_over: Option<Epoch>,
    /// Nothing that a backup may promote from was sent in this generation, which is this side's
    /// own.
    may_be_alone: bool,
    /// When the backup last made progress with what is in flight.
    progress: Duration,
    /// When to act on the loss of the backup.
    decide_at: Option<Duration>,
    asked: Option<Generation>,
    /// The container has been quiet for a while.
    quiet: bool,
    /// The backup's last pulse over the present connection: when, and how the next ones come.
    pulse: Option<(Duration, Pace)>,
    pace: Pace,
}

impl Primary {
    /// A primary of this generation. `ledger` is one of the same generation; another than
    /// [`AckLedger::new`] makes is for experiments.
    pub fn new(config: Config, generation: Generation, ledger: AckLedger, now: Duration) -> Self {
        Self {
            config,
            generation,
            state: State::Connecting { retry_at: Some(now) },
            link: LinkId(0),
            ledger,
            detector: Detector::new(config.times, now),
            committed: Epoch::NONE,
            handing_over: None,
            may_be_alone: false,
            progress: now,
            decide_at: None,
            asked: None,
            quiet: false,
            pulse: None,
            pace: Pace::Usual,
        }
    }

    /// A primary that acts alone: it was promoted in this generation, from the epoch `from`.
    pub fn alone(config: Config, ledger: AckLedger, from: Epoch, now: Duration) -> Self {
        let generation = ledger.generation();
        let mut me = Self::new(config, generation, ledger, now);
        me.state = State::Alone { retry_at: Some(now) };
        me.committed = from;
        me.may_be_alone = true;
        me
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Its generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The newest epoch that the backup holds.
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// Checkpoints sent and not acknowledged.
    pub fn in_flight(&self) -> usize {
        self.ledger.in_flight()
    }

    /// How its pulses come now.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// As [`Primary::pace`], but for whoever was given up, and may be dead: he need not hear more.
    pub fn pace_of_pulses(&self) -> Pace {
        if matches!(self.state, State::Alone { .. }) { Pace::Rests } else { self.pace }
    }

    /// Whether output needs no proof.
    pub fn is_alone(&self) -> bool {
        matches!(self.state, State::Alone { .. } | State::CatchingUp { .. })
    }

    /// Whether the checkpoint that is taken now is provisional.
    pub fn is_catching_up(&self) -> bool {
        matches!(self.state, State::CatchingUp { .. })
    }

    /// Whether what was given as [`Input::Sent`] for this connection may leave.
    pub fn sends_on(&self, link: LinkId) -> bool {
        let takes = matches!(self.state, State::CatchingUp { .. } | State::Protected { .. });
        takes && link == self.link
    }

    /// Checkpoints that may be in flight now. Those of a backup that catches up go one by one.
    pub fn depth(&self) -> usize {
        if self.is_catching_up() { 1 } else { self.config.depth }
    }

    /// Whether a stop may begin now: there is a backup, and fewer checkpoints are in flight than
    /// the depth.
    pub fn may_begin_stop(&self) -> bool {
        matches!(self.state, State::CatchingUp { .. } | State::Protected { .. })
            && self.handing_over.is_none()
            && self.ledger.in_flight() < self.depth()
    }

    /// When to give [`Input::Tick`].
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::Connecting { retry_at } | State::Alone { retry_at } => retry_at,
            State::Severed { retry_at, .. } => retry_at.into_iter().chain(self.decide_at).min(),
            State::CatchingUp { .. } | State::Protected { .. } => {
                self.detector.next_deadline().into_iter().chain(self.slow_at()).min()
            }
            State::HandedOver | State::Stopped | State::Demoted { .. } => None,
        }
    }

    /// When a backup that makes no progress counts as lost.
    fn slow_at(&self) -> Option<Duration> {
        let watched = self.config.on_loss != OnLoss::Freeze
            && self.ledger.in_flight() > 0
            && matches!(self.state, State::Protected { .. });
        watched.then_some(self.progress + self.config.slowest)
    }

    /// Takes an input; gives what to do, in order.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        let actions = self.take(now, input);
        self.pace = if self.may_rest(now) { Pace::Rests } else { Pace::Usual };
        self.detector.rest(self.pace == Pace::Rests);
        actions
    }

    /// A backup that is not heard twice is to hear more.
    fn may_rest(&self, now: Duration) -> bool {
        let heard = self.pulse.is_some_and(|(at, pace)| {
            now.saturating_sub(at) <= self.config.times.rest * 5 / 2 && pace != Pace::Doubts
        });
        let settled =
            self.state == State::Protected { synced: true } && self.handing_over.is_none();
        // One that computes without output has checkpoints now and then.
        let taken = self.ledger.in_flight() == 0
            || now.saturating_sub(self.progress) < self.config.times.rest;
        self.quiet && heard && settled && taken
    }

    fn take(&mut self, now: Duration, input: Input) -> Vec<Action> {
        if matches!(self.state, State::HandedOver | State::Stopped | State::Demoted { .. }) {
            return Vec::new();
        }
        match input {
            Input::Tick => self.tick(now),
            Input::Connected(link) if link == self.link => self.connected(now),
            Input::Refused { link, code, newest } if link == self.link => {
                self.outranked(newest).unwrap_or_else(|| self.sever(now, Severance::Refused(code)))
            }
            Input::Lost(link) if link == self.link => self.sever(now, Severance::Lost),
            Input::Bye { link, bye, newest } if link == self.link => {
                self.outranked(newest).unwrap_or_else(|| self.sever(now, Severance::Bye(bye)))
            }
            Input::Heard(link) if link == self.link => {
                self.detector.life(now);
                Vec::new()
            }
            Input::Pulse { link, pace } if link == self.link => {
                self.detector.life(now);
                self.pulse = Some((now, pace));
                Vec::new()
            }
            Input::Quiet(quiet) => {
                self.quiet = quiet;
                Vec::new()
            }
            Input::Sent { link, epoch, digest, provisional } => {
                if self.sends_on(link) {
                    self.sent(now, epoch, digest, provisional)
                } else {
                    Vec::new()
                }
            }
            Input::Ack { link, generation, epoch, digest } if link == self.link => {
                self.ack(now, generation, epoch, digest)
            }
            Input::HandOver { last } => {
                let ready = matches!(self.state, State::Protected { .. });
                self.handing_over = ready.then_some(last);
                self.try_hand_over().into_iter().collect()
            }
            Input::Verdict { generation, verdict } => self.verdict(now, generation, verdict),
            // Of a connection that is given up.
            _ => Vec::new(),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        match &mut self.state {
            State::Connecting { retry_at }
            | State::Alone { retry_at }
            | State::Severed { retry_at, .. } => {
                if retry_at.is_some_and(|at| at <= now) {
                    *retry_at = None;
                    self.link.0 += 1;
                    actions.push(Action::Connect(self.link));
                }
                actions.extend(self.decide(now));
            }
            State::CatchingUp { .. } | State::Protected { .. } => {
                let slow = self.slow_at().is_some_and(|at| at <= now);
                if let Some(s) = self.detector.tick(now) {
                    return self.sever(now, Severance::Silence(s.silence));
                }
                if slow {
                    return self.sever(now, Severance::Slow(self.config.slowest));
                }
            }
            State::HandedOver | State::Stopped | State::Demoted { .. } => {}
        }
        actions
    }

    /// What the policy says about a backup that has been gone for too long.
    fn decide(&mut self, now: Duration) -> Option<Action> {
        self.decide_at.filter(|at| *at <= now)?;
        self.decide_at = None;
        match self.config.on_loss {
            OnLoss::Freeze => None,
            OnLoss::Stop => {
                self.state = State::Stopped;
                Some(Action::Stop)
            }
            OnLoss::Degrade => {
                let (base, wanted) = (self.generation, self.generation.next());
                self.asked = Some(wanted);
                Some(Action::Ask { base, wanted })
            }
        }
    }

    /// A grant counts whatever has happened meanwhile: the generation is taken, so that nobody
    /// may act in the one before. A denial leaves everything as it is: the other side will say
    /// what became of it.
    fn verdict(&mut self, now: Duration, generation: Generation, verdict: Verdict) -> Vec<Action> {
        if self.asked != Some(generation) || verdict != Verdict::Granted {
            return Vec::new();
        }
        let mut actions = Vec::new();
        if matches!(self.state, State::CatchingUp { .. } | State::Protected { .. }) {
            actions.push(Action::Severed(self.link, Severance::Lost));
        }
        self.asked = None;
        self.decide_at = None;
        self.handing_over = None;
        self.generation = generation;
        self.ledger = self.ledger.empty_of(generation);
        self.may_be_alone = true;
        // An attempt that is under way says hello in the old generation.
        self.link.0 += 1;
        self.state = State::Alone { retry_at: Some(now) };
        actions.push(Action::GoAlone(generation));
        actions
    }

    fn connected(&mut self, now: Duration) -> Vec<Action> {
        let next = match self.state {
            State::Connecting { retry_at: None } | State::Severed { retry_at: None, .. } => {
                State::Protected { synced: false }
            }
            State::Alone { retry_at: None } => State::CatchingUp { rounds: 0 },
            _ => return Vec::new(),
        };
        // What was in flight before is covered by the full copy that comes first.
        self.ledger = self.ledger.empty_of(self.generation);
        self.detector = Detector::new(self.config.times, now);
        self.decide_at = None;
        self.progress = now;
        self.pulse = None;
        self.state = next;
        vec![Action::BeginFull]
    }

    fn sent(&mut self, now: Duration, epoch: Epoch, digest: u64, provisional: bool) -> Vec<Action> {
        if self.ledger.in_flight() == 0 {
            self.progress = now;
        }
        self.may_be_alone &= provisional;
        self.ledger.sent(epoch, digest).map(Action::Release).into_iter().collect()
    }

    fn ack(
        &mut self,
        now: Duration,
        generation: Generation,
        epoch: Epoch,
        digest: u64,
    ) -> Vec<Action> {
        if !self.sends_on(self.link) {
            return Vec::new();
        }
        self.detector.life(now);
        let proof = match self.ledger.acknowledge(generation, epoch, digest) {
            Ok(proof) => proof,
            Err(e) => {
                return self
                    .outranked(generation)
                    .unwrap_or_else(|| self.sever(now, Severance::Acknowledgement(e)));
            }
        };
        let took = now.saturating_sub(std::mem::replace(&mut self.progress, now));
        self.committed = proof.epoch();
        let mut actions = Vec::new();
        match &mut self.state {
            State::CatchingUp { rounds } => {
                *rounds += 1;
                // The first one was the full copy, which takes long to apply.
                let more = rounds.saturating_sub(self.config.unapplied);
                if more > 0 && (took <= self.config.calm || more >= MOST_ROUNDS) {
                    self.state = State::Protected { synced: false };
                    actions.push(Action::Hold);
                }
            }
            State::Protected { synced } => {
                *synced = true;
                // The control has released it when it was sent.
                if !self.ledger.is_control() {
                    actions.push(Action::Release(proof));
                }
                actions.extend(self.try_hand_over());
            }
            _ => {}
        }
        actions
    }

    fn try_hand_over(&mut self) -> Option<Action> {
        let ready = self.handing_over == Some(self.committed)
            && self.state == State::Protected { synced: true }
            && self.ledger.in_flight() == 0;
        ready.then(|| {
            self.state = State::HandedOver;
            Action::HandOver { link: self.link, last: self.committed }
        })
    }

    fn outranked(&mut self, newest: Generation) -> Option<Vec<Action>> {
        (newest > self.generation).then(|| {
            self.state = State::Demoted { by: newest };
            vec![Action::Demoted { by: newest }]
        })
    }

    /// Does not cancel a hand-over for good: the operator is told by the action and asks again.
    fn sever(&mut self, now: Duration, reason: Severance) -> Vec<Action> {
        self.handing_over = None;
        let later = Some(now + self.config.retry);
        // A refusal is worth telling; a peer that is not there yet is not.
        let told = |link| match reason {
            Severance::Lost => Vec::new(),
            _ => vec![Action::Severed(link, reason)],
        };
        match &mut self.state {
            State::Connecting { retry_at } | State::Alone { retry_at } => {
                *retry_at = later;
                return told(self.link);
            }
            State::Severed { retry_at, .. } => {
                *retry_at = later;
                return Vec::new();
            }
            _ => {}
        }
        let was_protected = matches!(self.state, State::Protected { .. });
        if self.may_be_alone {
            // Nobody can promote from what was sent so far.
            self.state = State::Alone { retry_at: later };
            let mut actions = vec![Action::Severed(self.link, reason)];
            if was_protected {
                actions.push(Action::GoAlone(self.generation));
            }
            return actions;
        }
        // The first attempt is made at once: a backup that still hears nothing after its
        // timeout takes over, though only the connection broke.
        let at_once = matches!(reason, Severance::Lost | Severance::Silence(_));
        let retry_at = if at_once { Some(now) } else { later };
        self.state = State::Severed { reason, retry_at };
        self.decide_at =
            (self.config.on_loss != OnLoss::Freeze).then(|| now + self.config.patience);
        vec![Action::Severed(self.link, reason)]
    }
}

#[cfg(test)]
mod tests;
