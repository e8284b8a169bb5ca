//! The backup's decisions: what is acknowledged, when to take over.
//!
//! ```text
//!          Hello             complete            silence, or Bye(Switchover)
//! Waiting ------> Syncing ------------> Ready ------------------------------> Asking
//!  | ^               |                  ^ | ^                                   | |
//!  | |               | silence          | | | the primary is heard              | |
//!  | +---------------+                  +-+ +-----------------------------------+ |
//!  | ^                       complete, Hello (resync)                             | granted
//!  | +---- Bye(Stop), Bye(Demoted), denied: the copy is dropped                   v
//!  | ^                                              Promoted <-- running --- Promoting
//!  | +---- Demoted: it gave way, or ended ---------------+
//!  +--- Begin: a new life starts here -------------------^
//! ```
//! This core lives as long as its host's agent: while the container runs here it is `Promoted`,
//! and tells everybody so.
//!
//! - Only a lasting checkpoint makes it `Ready`: output did not wait for provisional ones.
//! - A hello of a newer generation, or a denial, says that somebody has acted alone since the copy
//!   here was made: it is void.
//! - While there is nothing to promote from, silence is borne for longer: to give a primary up then
//!   helps nobody, and costs it another full copy.
//! - It rests while its primary says that it rests ([`Pace`]), and only where it could take over.
//! - It promotes from the last complete epoch only (CP-2). While a primary that came back sends a
//!   new full copy, the copy before is still the one to promote from: nothing newer was
//!   acknowledged.
//! - From `Promoting` on no checkpoint is acknowledged and no older generation is welcome
//!   (FO-1). The caller makes a checkpoint available to the spare and its acknowledgement in one
//!   step under the lock of this core, so that what was acknowledged is part of the promotion.

use super::LinkId;
use super::arbiter::Verdict;
use super::detector::{Config as Times, Detector, Marks, Pace};
use crate::wire::Receipt;
use crate::wire::message::{Bye, RefuseCode};
use crate::{Epoch, Generation};
use std::time::Duration;

/// Settings of a backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// When silence of the primary means that it is dead.
    pub times: Times,
}

/// Where the backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No primary, and nothing to promote from.
    Waiting,
    /// A primary sends its first full copy; nothing to promote from yet.
    Syncing,
    /// It could take over.
    Ready {
        /// The last complete epoch.
        last: Epoch,
    },
    /// It wants to take over and has asked the arbiter for this generation.
    Asking {
        /// The generation.
        generation: Generation,
        /// The last complete epoch.
        last: Epoch,
    },
    /// It takes over.
    Promoting {
        /// The new generation.
        generation: Generation,
        /// The epoch that it goes on from.
        from: Epoch,
    },
    /// It runs the container; from now on it is a primary.
    Promoted {
        /// Its generation.
        generation: Generation,
    },
}

/// What happens to a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Time passes.
    Tick,
    /// A primary presents itself on a new connection.
    Hello {
        /// The connection.
        link: LinkId,
        /// Its generation.
        generation: Generation,
    },
    /// Anything was heard of the primary.
    Heard(LinkId),
    /// A pulse of the primary. It counts also when its connection is over and there is none yet.
    Pulse {
        /// The connection that it belongs to.
        link: LinkId,
        /// How far the primary's work is.
        marks: Marks,
    },
    /// A checkpoint is complete.
    Complete {
        /// The connection.
        link: LinkId,
        /// What would be acknowledged.
        receipt: Receipt,
    },
    /// The connection broke.
    Lost(LinkId),
    /// The primary says that it leaves.
    Bye {
        /// The connection.
        link: LinkId,
        /// Why.
        bye: Bye,
        /// The last epoch, for a switchover.
        last: Epoch,
    },
    /// The operator wants this side to take over, whatever the primary does.
    Promote,
    /// The arbiter's answer.
    Verdict {
        /// What was asked for.
        generation: Generation,
        /// The answer.
        verdict: Verdict,
    },
    /// The container runs here.
    Running,
    /// The other side, which runs nothing, asks who runs the container.
    Inquiry(LinkId),
    /// A new life of the container starts here, in this generation, if nobody else is known to
    /// run it.
    Begin(Generation),
    /// The container, which runs here, goes on without the other side, in this generation: a new one
    /// or still its own.
    RunsOn(Generation),
    /// The container does not run here any longer; a generation that is known.
    Demoted(Generation),
}

/// What a backup must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take the primary.
    Welcome(LinkId),
    /// Send the primary away.
    Refuse {
        /// The connection.
        link: LinkId,
        /// Why.
        code: RefuseCode,
        /// The newest generation known here.
        newest: Generation,
    },
    /// Close a connection that another one replaces, or that broke the rules.
    Close(LinkId),
    /// Give the checkpoint to the spare.
    Apply(Receipt),
    /// Acknowledge the checkpoint; comes after its [`Action::Apply`].
    Ack {
        /// The connection.
        link: LinkId,
        /// What to acknowledge.
        receipt: Receipt,
    },
    /// Ask the arbiter.
    Ask {
        /// The generation of the copy.
        base: Generation,
        /// The one that is wanted.
        wanted: Generation,
    },
    /// Take over in this generation, from this epoch: first let the spare apply all that was
    /// given to it.
    Promote {
        /// The new generation.
        generation: Generation,
        /// The last complete epoch.
        from: Epoch,
    },
    /// Drop the copy: the container was ended on purpose.
    Discard,
    /// The primary is gone before its first full copy was complete: the container is lost if the
    /// primary does not come back.
    Lost,
}

/// The backup of a container.
#[derive(Debug)]
pub struct Backup {
    state: State,
    link: Option<LinkId>,
    /// The last connection, and when it was lost.
    lost: Option<(LinkId, Duration)>,
    /// The newest generation heard of, or promoted in.
    newest: Generation,
    /// The newest asked for.
    asked: Generation,
    /// Generation of the last complete epoch.
    of: Generation,
    detector: Detector,
    /// For how long pulses keep a primary alive that has no connection, and for how long one may be
    /// silent that sends its first full copy.
    patience: Duration,
    /// The primary has stopped for good, or the operator insists: life takes nothing back.
    bound_to_promote: bool,
    /// The primary hands over: its connection stays until it has sent what came in late.
    handed_over: bool,
}

impl Backup {
    /// A backup that has heard of no primary. `newest` is the newest generation known, if the
    /// host remembers one.
    pub fn new(config: Config, newest: Generation, now: Duration) -> Self {
        Self {
            state: State::Waiting,
            link: None,
            lost: None,
            newest,
            asked: newest,
            of: Generation::default(),
            patience: config.times.stall,
            detector: Detector::new(config.times, now),
            bound_to_promote: false,
            handed_over: false,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The newest generation that it knows.
    pub fn newest(&self) -> Generation {
        self.newest
    }

    /// The connection in use.
    pub fn link(&self) -> Option<LinkId> {
        self.link
    }

    /// How long the primary has been silent.
    pub fn silence(&self, now: Duration) -> Duration {
        self.detector.silence(now)
    }

    /// How its pulses come now.
    pub fn pace(&self) -> Pace {
        match self.state {
            State::Ready { .. } | State::Syncing if self.detector.doubts() => Pace::Doubts,
            State::Ready { .. } if self.link.is_some() && self.detector.peer_rests() => Pace::Rests,
            _ => Pace::Usual,
        }
    }

    /// As [`Backup::pace`], but for a primary that was given up, and may be dead: it need not hear more.
    pub fn pace_of_pulses(&self) -> Pace {
        if matches!(self.state, State::Promoted { .. }) { Pace::Rests } else { self.pace() }
    }

    /// Whether pulses of this connection count.
    fn hears(&self, now: Duration, link: LinkId) -> bool {
        self.link == Some(link)
            || self.link.is_none()
                && self.lost.is_some_and(|(lost, at)| {
                    lost == link && now.saturating_sub(at) < self.patience
                })
    }

    /// When to give [`Input::Tick`].
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::Syncing | State::Ready { .. } => self.detector.next_deadline(),
            _ => None,
        }
    }

    /// Takes an input; gives what to do, in order.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        let actions = self.take(now, input);
        self.detector.rest(self.pace() == Pace::Rests);
        actions
    }

    fn take(&mut self, now: Duration, input: Input) -> Vec<Action> {
        match input {
            Input::Tick => self.tick(now),
            Input::Hello { link, generation } => self.hello(now, link, generation),
            Input::Heard(link) if self.link == Some(link) => {
                if self.detector.life(now) {
                    self.alive();
                }
                Vec::new()
            }
            Input::Pulse { link, marks } if self.hears(now, link) => {
                if self.detector.pulse(now, marks) {
                    self.alive();
                }
                Vec::new()
            }
            Input::Complete { link, receipt } => self.complete(now, link, receipt),
            Input::Lost(link) if self.link == Some(link) => {
                self.link = None;
                self.lost = Some((link, now));
                Vec::new()
            }
            Input::Bye { link, bye, last } if self.link == Some(link) => self.bye(bye, last),
            Input::Promote => self.insist(),
            Input::Verdict { generation, verdict } => self.verdict(generation, verdict),
            Input::Running => {
                if let State::Promoting { generation, .. } = self.state {
                    self.state = State::Promoted { generation };
                }
                Vec::new()
            }
            Input::Inquiry(link) => self.inquiry(link),
            Input::Begin(generation) => {
                if self.state == State::Waiting && generation > self.newest {
                    self.newest = generation;
                    self.state = State::Promoted { generation };
                }
                Vec::new()
            }
            Input::RunsOn(generation) => {
                let runs_here =
                    matches!(self.state, State::Promoting { .. } | State::Promoted { .. });
                if runs_here || self.state == State::Waiting {
                    self.newest = self.newest.max(generation);
                    self.bound_to_promote = false;
                    self.state = State::Promoted { generation: self.newest };
                }
                Vec::new()
            }
            Input::Demoted(newest) => {
                self.newest = self.newest.max(newest);
                if matches!(self.state, State::Promoting { .. } | State::Promoted { .. }) {
                    self.bound_to_promote = false;
                    self.state = State::Waiting;
                }
                Vec::new()
            }
            // Of a connection that was replaced.
            _ => Vec::new(),
        }
    }

    fn hello(&mut self, now: Duration, link: LinkId, generation: Generation) -> Vec<Action> {
        let newest = self.newest;
        let refuse = |code| vec![Action::Refuse { link, code, newest }];
        if matches!(self.state, State::Promoting { .. } | State::Promoted { .. }) {
            return refuse(RefuseCode::Promoted);
        }
        if generation < newest {
            return refuse(RefuseCode::StaleGeneration);
        }
        if self.bound_to_promote {
            return refuse(RefuseCode::Promoted);
        }
        self.newest = generation;
        // The primary has acted alone since the copy here was made.
        let void = matches!(self.state, State::Ready { .. } | State::Asking { .. })
            && generation > self.of;
        if void {
            self.state = State::Waiting;
        }
        let replaced = self.link.replace(link);
        self.detector.connected(now);
        self.alive();
        if self.state == State::Waiting {
            self.state = State::Syncing;
        }
        if self.state == State::Syncing {
            self.detector.be_patient(self.patience);
        }
        let mut actions: Vec<Action> = replaced.map(Action::Close).into_iter().collect();
        actions.extend(void.then_some(Action::Discard));
        actions.push(Action::Welcome(link));
        actions
    }

    /// The other side's agent has just started, so nothing runs there: if there is a copy here,
    /// it is the container's last chance, and there is nothing to wait for.
    fn inquiry(&mut self, link: LinkId) -> Vec<Action> {
        let code = match self.state {
            State::Waiting | State::Syncing => RefuseCode::Vacant,
            _ => RefuseCode::Promoted,
        };
        let mut actions = Vec::new();
        if self.state == State::Syncing {
            self.state = State::Waiting;
            actions.extend(self.link.take().map(Action::Close));
            actions.push(Action::Lost);
        }
        actions.push(Action::Refuse { link, code, newest: self.newest });
        actions.extend(self.insist());
        actions
    }

    /// A sign of life takes a suspicion back, even if the arbiter was asked: a grant that comes
    /// later only uses up its generation.
    fn alive(&mut self) {
        if self.bound_to_promote {
            return;
        }
        if let State::Asking { last, .. } = self.state {
            self.state = State::Ready { last };
        }
    }

    fn complete(&mut self, now: Duration, link: LinkId, receipt: Receipt) -> Vec<Action> {
        if self.link != Some(link) || self.bound_to_promote {
            return Vec::new();
        }
        self.detector.life(now);
        self.alive();
        let stale = match self.state {
            State::Syncing => receipt.generation < self.newest,
            State::Ready { last } => {
                receipt.provisional
                    || receipt.generation < self.of
                    || (receipt.generation == self.of && receipt.epoch <= last)
            }
            State::Waiting => true,
            State::Asking { .. } | State::Promoting { .. } | State::Promoted { .. } => true,
        };
        if stale {
            self.link = None;
            return vec![Action::Close(link)];
        }
        if !receipt.provisional {
            self.of = receipt.generation;
            self.newest = self.newest.max(receipt.generation);
            self.state = State::Ready { last: receipt.epoch };
            self.detector.be_patient(Duration::ZERO);
        }
        vec![Action::Apply(receipt), Action::Ack { link, receipt }]
    }

    fn bye(&mut self, bye: Bye, last: Epoch) -> Vec<Action> {
        match (bye, self.state) {
            (_, State::Promoting { .. } | State::Promoted { .. }) => Vec::new(),
            (Bye::Switchover, State::Ready { last: held }) if held == last => {
                self.handed_over = true;
                self.insist()
            }
            // It does not match what is held here, which the primary rules out: treat it as a
            // death, by the detector.
            (Bye::Switchover, _) => Vec::new(),
            (Bye::Stop | Bye::Demoted, _) => {
                self.link = None;
                self.bound_to_promote = false;
                self.state = State::Waiting;
                vec![Action::Discard]
            }
        }
    }

    fn insist(&mut self) -> Vec<Action> {
        match self.state {
            State::Ready { last } => {
                self.bound_to_promote = true;
                self.ask(last)
            }
            State::Asking { .. } => {
                self.bound_to_promote = true;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn ask(&mut self, last: Epoch) -> Vec<Action> {
        let wanted = self.newest.max(self.asked).next();
        self.asked = wanted;
        self.state = State::Asking { generation: wanted, last };
        vec![Action::Ask { base: self.of, wanted }]
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        if !matches!(self.state, State::Syncing | State::Ready { .. }) {
            return Vec::new();
        }
        let suspected = self.detector.tick(now).is_some();
        match self.state {
            State::Ready { last } if suspected => self.ask(last),
            State::Syncing if suspected => {
                self.state = State::Waiting;
                let closed = self.link.take().map(Action::Close);
                closed.into_iter().chain([Action::Lost]).collect()
            }
            _ => Vec::new(),
        }
    }

    fn verdict(&mut self, generation: Generation, v: Verdict) -> Vec<Action> {
        let asked = match self.state {
            State::Asking { generation, last } => Some((generation, last)),
            _ => None,
        };
        match (v, asked) {
            (Verdict::Granted, Some((asked, last))) if asked == generation => {
                self.newest = generation;
                self.state = State::Promoting { generation, from: last };
                let link = self.link.take();
                let stays = std::mem::take(&mut self.handed_over);
                let mut actions: Vec<Action> =
                    link.filter(|_| !stays).map(Action::Close).into_iter().collect();
                actions.push(Action::Promote { generation, from: last });
                actions
            }
            // A denial is about this side's copy, whatever was heard since it was asked for.
            (Verdict::Denied { newest }, _) if newest > self.of => {
                self.newest = self.newest.max(newest);
                if !matches!(self.state, State::Ready { .. } | State::Asking { .. }) {
                    return Vec::new();
                }
                self.state = State::Waiting;
                self.bound_to_promote = false;
                self.handed_over = false;
                let closed = self.link.take().map(Action::Close);
                closed.into_iter().chain([Action::Discard]).collect()
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
