//! The primary's decisions: when a stop may begin, what is released, when to give up.
//!
//! ```text
//!              Connected                  Lost, silence, wrong digest
//! Connecting ------------> Protected -------------------------------> Severed
//!     ^ |                   |  |  ^                                    |   |
//!     +-+ retry             |  |  +------- Connected (full copy) ------+   |
//!                           |  +-- hand over, all committed --> HandedOver |
//!                           +------ a newer generation ------> Demoted <---+
//! ```
//!
//! The only way to a release is a checked acknowledgement over the present connection (OC-1,
//! OC-3). While severed nothing is released: the container's output waits for a backup, or for
//! its operator. `Demoted` and `HandedOver` are final; the container must not run on.

use super::LinkId;
use super::detector::{Config as Times, Detector};
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
}

impl Default for Config {
    fn default() -> Self {
        Self { depth: 4, times: Times::default(), retry: Duration::from_millis(200) }
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
}

/// Where the primary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No backup has taken the container yet.
    Connecting {
        /// When to try again; `None` while an attempt is under way.
        retry_at: Option<Duration>,
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
    /// All frames of a checkpoint but its last are with the transport. Give this before the
    /// last.
    Sent {
        /// Its epoch.
        epoch: Epoch,
        /// Its digest.
        digest: u64,
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
    /// The operator wants the backup to take over. The container is stopped for good and its
    /// last checkpoint was given as [`Input::Sent`].
    HandOver,
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
    handing_over: bool,
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
            handing_over: false,
        }
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

    /// Whether a stop may begin now: there is a backup, and fewer checkpoints are in flight than
    /// the depth.
    pub fn may_begin_stop(&self) -> bool {
        matches!(self.state, State::Protected { .. })
            && !self.handing_over
            && self.ledger.in_flight() < self.config.depth
    }

    /// When to give [`Input::Tick`].
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::Connecting { retry_at } | State::Severed { retry_at, .. } => retry_at,
            State::Protected { .. } => self.detector.next_deadline(),
            State::HandedOver | State::Demoted { .. } => None,
        }
    }

    /// Takes an input; gives what to do, in order.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        if matches!(self.state, State::HandedOver | State::Demoted { .. }) {
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
            Input::Sent { epoch, digest } => self.sent(epoch, digest),
            Input::Ack { link, generation, epoch, digest } if link == self.link => {
                self.ack(now, generation, epoch, digest)
            }
            Input::HandOver => {
                self.handing_over = matches!(self.state, State::Protected { .. });
                self.try_hand_over().into_iter().collect()
            }
            // Of a connection that is given up.
            _ => Vec::new(),
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        match &mut self.state {
            State::Connecting { retry_at } | State::Severed { retry_at, .. } => {
                if retry_at.is_some_and(|at| at <= now) {
                    *retry_at = None;
                    self.link.0 += 1;
                    return vec![Action::Connect(self.link)];
                }
            }
            State::Protected { .. } => {
                if let Some(s) = self.detector.tick(now) {
                    return self.sever(now, Severance::Silence(s.silence));
                }
            }
            State::HandedOver | State::Demoted { .. } => {}
        }
        Vec::new()
    }

    fn connected(&mut self, now: Duration) -> Vec<Action> {
        let waits = matches!(
            self.state,
            State::Connecting { retry_at: None } | State::Severed { retry_at: None, .. }
        );
        if !waits {
            return Vec::new();
        }
        // What was in flight before is covered by the full copy that comes first.
        self.ledger = match self.ledger.is_control() {
            true => AckLedger::without_output_commit(self.generation),
            false => AckLedger::new(self.generation),
        };
        self.detector = Detector::new(self.config.times, now);
        self.state = State::Protected { synced: false };
        vec![Action::BeginFull]
    }

    fn sent(&mut self, epoch: Epoch, digest: u64) -> Vec<Action> {
        if !matches!(self.state, State::Protected { .. }) {
            return Vec::new();
        }
        self.ledger.sent(epoch, digest).map(Action::Release).into_iter().collect()
    }

    fn ack(
        &mut self,
        now: Duration,
        generation: Generation,
        epoch: Epoch,
        digest: u64,
    ) -> Vec<Action> {
        let State::Protected { synced } = &mut self.state else { return Vec::new() };
        self.detector.life(now);
        match self.ledger.acknowledge(generation, epoch, digest) {
            Ok(proof) => {
                *synced = true;
                self.committed = proof.epoch();
                // The control has released it when it was sent.
                let released = !self.ledger.is_control();
                let mut actions = Vec::new();
                if released {
                    actions.push(Action::Release(proof));
                }
                actions.extend(self.try_hand_over());
                actions
            }
            Err(e) => self
                .outranked(generation)
                .unwrap_or_else(|| self.sever(now, Severance::Acknowledgement(e))),
        }
    }

    fn try_hand_over(&mut self) -> Option<Action> {
        let ready = self.handing_over
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
        self.handing_over = false;
        let retry_at = Some(now + self.config.retry);
        match &mut self.state {
            State::Connecting { retry_at: at } => {
                *at = retry_at;
                // A refusal is worth telling; a peer that is not there yet is not.
                match reason {
                    Severance::Lost => Vec::new(),
                    _ => vec![Action::Severed(self.link, reason)],
                }
            }
            State::Severed { retry_at: at, .. } => {
                *at = retry_at;
                Vec::new()
            }
            _ => {
                // The first attempt is made at once: a backup that still hears nothing after its
                // timeout takes over, though only the connection broke.
                let at_once = matches!(reason, Severance::Lost | Severance::Silence(_));
                let retry_at = if at_once { Some(now) } else { retry_at };
                self.state = State::Severed { reason, retry_at };
                vec![Action::Severed(self.link, reason)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Generation = Generation(2);
    const LINK: LinkId = LinkId(1);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn protected() -> Primary {
        let mut p = Primary::new(Config::default(), G, AckLedger::new(G), ms(0));
        assert_eq!(p.handle(ms(0), Input::Tick), [Action::Connect(LINK)]);
        assert!(!p.may_begin_stop());
        assert_eq!(p.handle(ms(1), Input::Connected(LINK)), [Action::BeginFull]);
        p
    }

    fn ack(epoch: u64, digest: u64) -> Input {
        Input::Ack { link: LINK, generation: G, epoch: Epoch(epoch), digest }
    }

    fn sent(epoch: u64) -> Input {
        Input::Sent { epoch: Epoch(epoch), digest: epoch * 10 }
    }

    #[test]
    fn the_depth_bounds_what_is_in_flight_and_acks_release() {
        let mut p = protected();
        for e in 1..=4 {
            assert!(p.may_begin_stop());
            assert_eq!(p.handle(ms(2), sent(e)), []);
        }
        assert!(!p.may_begin_stop());
        let actions = p.handle(ms(3), ack(2, 20));
        assert!(matches!(&actions[..], [Action::Release(proof)] if proof.epoch() == Epoch(2)));
        assert!(p.may_begin_stop());
        assert_eq!(p.state(), State::Protected { synced: true });
    }

    #[test]
    fn a_wrong_digest_severs_and_a_new_connection_begins_anew() {
        let mut p = protected();
        p.handle(ms(2), sent(1));
        let actions = p.handle(ms(3), ack(1, 11));
        assert!(matches!(&actions[..], [Action::Severed(LINK, Severance::Acknowledgement(_))]));
        assert_eq!(p.handle(ms(4), ack(1, 10)), [], "severed: nothing is released");
        assert_eq!(p.next_deadline(), Some(ms(203)));
        assert_eq!(p.handle(ms(203), Input::Tick), [Action::Connect(LinkId(2))]);
        assert_eq!(p.handle(ms(204), Input::Connected(LINK)), [], "the old connection");
        assert_eq!(p.handle(ms(204), Input::Connected(LinkId(2))), [Action::BeginFull]);
        assert_eq!(p.handle(ms(205), ack(1, 10)), [], "of the old connection");
    }

    #[test]
    fn silence_severs() {
        let mut p = protected();
        while let Some(at) = p.next_deadline().filter(|at| *at <= ms(80)) {
            assert_eq!(p.handle(at, Input::Tick), []);
        }
        p.handle(ms(80), Input::Heard(LINK));
        let mut actions = Vec::new();
        while actions.is_empty() {
            actions = p.handle(p.next_deadline().unwrap(), Input::Tick);
        }
        assert_eq!(actions, [Action::Severed(LINK, Severance::Silence(ms(90)))]);
        assert!(!p.may_begin_stop());
    }

    #[test]
    fn a_newer_generation_demotes_for_good() {
        let newest = Generation(3);
        let refused = Input::Refused { link: LINK, code: RefuseCode::StaleGeneration, newest };
        let mut p = protected();
        assert_eq!(p.handle(ms(2), refused), [Action::Demoted { by: newest }]);
        assert_eq!(p.handle(ms(3), Input::Connected(LINK)), []);
        assert_eq!(p.next_deadline(), None);
        let mut p = protected();
        let newer = Input::Ack { link: LINK, generation: newest, epoch: Epoch(1), digest: 0 };
        assert_eq!(p.handle(ms(2), newer), [Action::Demoted { by: newest }]);
    }

    #[test]
    fn a_hand_over_waits_for_the_last_ack_and_releases_nothing_afterwards() {
        let mut p = protected();
        p.handle(ms(2), sent(1));
        assert_eq!(p.handle(ms(3), Input::HandOver), []);
        assert!(!p.may_begin_stop());
        let actions = p.handle(ms(4), ack(1, 10));
        assert!(matches!(
            &actions[..],
            [Action::Release(_), Action::HandOver { link: LINK, last: Epoch(1) }]
        ));
        assert_eq!(p.handle(ms(5), ack(1, 10)), []);
        assert_eq!(p.state(), State::HandedOver);
    }

    #[test]
    fn the_control_releases_at_once_and_only_once() {
        let mut p = Primary::new(Config::default(), G, AckLedger::without_output_commit(G), ms(0));
        p.handle(ms(0), Input::Tick);
        p.handle(ms(1), Input::Connected(LINK));
        assert!(matches!(&p.handle(ms(2), sent(1))[..], [Action::Release(_)]));
        assert_eq!(p.handle(ms(3), ack(1, 10)), []);
    }
}
