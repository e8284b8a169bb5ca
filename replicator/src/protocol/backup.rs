//! The backup's decisions: what is acknowledged, when to take over.
//!
//! ```text
//!          Hello             complete            silence, or Bye(Switchover)
//! Waiting ------> Syncing ------------> Ready ------------------------------> Asking
//!    ^               |                  ^ | ^                                   | |
//!    |               | silence          | | | the primary is heard, or denied   | |
//!    +---------------+                  +-+ +-----------------------------------+ |
//!    ^                       complete, Hello (resync)                             | granted
//!    +---- Bye(Stop), Bye(Demoted): the copy is dropped                           v
//!                                                   Promoted <-- running --- Promoting
//! ```
//!
//! - It promotes from the last complete epoch only (CP-2). While a primary that came back sends a
//!   new full copy, the copy before is still the one to promote from: nothing newer was
//!   acknowledged.
//! - From `Promoting` on no checkpoint is acknowledged and no older generation is welcome
//!   (FO-1). The caller makes a checkpoint available to the spare and its acknowledgement in one
//!   step under the lock of this core, so that what was acknowledged is part of the promotion.

use super::LinkId;
use super::arbiter::Verdict;
use super::detector::{Config as Times, Detector};
use crate::wire::Receipt;
use crate::wire::message::{Bye, RefuseCode};
use crate::{Epoch, Generation};
use std::time::Duration;

/// Settings of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// When silence of the primary means that it is dead.
    pub times: Times,
    /// Pause before an arbiter that denied is asked again.
    pub ask_again: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { times: Times::default(), ask_again: Duration::from_millis(500) }
    }
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
    Ask(Generation),
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
    config: Config,
    state: State,
    link: Option<LinkId>,
    /// The newest generation heard of, or asked for.
    newest: Generation,
    /// Generation of the last complete epoch.
    of: Generation,
    detector: Detector,
    ask_at: Option<Duration>,
    /// The primary has stopped for good, or the operator insists: life takes nothing back.
    bound_to_promote: bool,
}

impl Backup {
    /// A backup that has heard of no primary. `newest` is the newest generation known, if the
    /// host remembers one.
    pub fn new(config: Config, newest: Generation, now: Duration) -> Self {
        Self {
            config,
            state: State::Waiting,
            link: None,
            newest,
            of: Generation::default(),
            detector: Detector::new(config.times, now),
            ask_at: None,
            bound_to_promote: false,
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

    /// When to give [`Input::Tick`].
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::Syncing => self.detector.next_deadline(),
            State::Ready { .. } => {
                [self.detector.next_deadline(), self.ask_at].into_iter().flatten().min()
            }
            _ => None,
        }
    }

    /// Takes an input; gives what to do, in order.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Action> {
        match input {
            Input::Tick => self.tick(now),
            Input::Hello { link, generation } => self.hello(now, link, generation),
            Input::Heard(link) if self.link == Some(link) => {
                self.heard(now);
                Vec::new()
            }
            Input::Complete { link, receipt } => self.complete(now, link, receipt),
            Input::Lost(link) if self.link == Some(link) => {
                self.link = None;
                Vec::new()
            }
            Input::Bye { link, bye, last } if self.link == Some(link) => self.bye(bye, last),
            Input::Promote => self.insist(),
            Input::Verdict { generation, verdict } => self.verdict(now, generation, verdict),
            Input::Running => {
                if let State::Promoting { generation, .. } = self.state {
                    self.state = State::Promoted { generation };
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
        // While asking, `newest` is only asked for: its primary may still be the one.
        let floor = match self.state {
            State::Asking { .. } | State::Ready { .. } => self.of,
            State::Waiting | State::Syncing => newest,
            State::Promoting { .. } | State::Promoted { .. } => newest,
        };
        if generation < floor {
            return refuse(RefuseCode::StaleGeneration);
        }
        if self.bound_to_promote {
            return refuse(RefuseCode::Promoted);
        }
        self.newest = newest.max(generation);
        let replaced = self.link.replace(link);
        self.heard(now);
        if self.state == State::Waiting {
            self.state = State::Syncing;
        }
        let mut actions: Vec<Action> = replaced.map(Action::Close).into_iter().collect();
        actions.push(Action::Welcome(link));
        actions
    }

    /// A sign of life takes a suspicion back, even if the arbiter was asked: a grant that comes
    /// later only uses up its generation.
    fn heard(&mut self, now: Duration) {
        self.detector.life(now);
        if self.bound_to_promote {
            return;
        }
        self.ask_at = None;
        if let State::Asking { last, .. } = self.state {
            self.state = State::Ready { last };
        }
    }

    fn complete(&mut self, now: Duration, link: LinkId, receipt: Receipt) -> Vec<Action> {
        if self.link != Some(link) || self.bound_to_promote {
            return Vec::new();
        }
        self.heard(now);
        let stale = match self.state {
            State::Syncing => false,
            State::Ready { last } => {
                receipt.generation < self.of
                    || (receipt.generation == self.of && receipt.epoch <= last)
            }
            State::Waiting => true,
            State::Asking { .. } | State::Promoting { .. } | State::Promoted { .. } => true,
        };
        if stale {
            self.link = None;
            return vec![Action::Close(link)];
        }
        self.of = receipt.generation;
        self.newest = self.newest.max(receipt.generation);
        self.state = State::Ready { last: receipt.epoch };
        vec![Action::Apply(receipt), Action::Ack { link, receipt }]
    }

    fn bye(&mut self, bye: Bye, last: Epoch) -> Vec<Action> {
        match (bye, self.state) {
            (_, State::Promoting { .. } | State::Promoted { .. }) => Vec::new(),
            (Bye::Switchover, State::Ready { last: held }) if held == last => self.insist(),
            // It does not match what is held here, which the primary rules out: treat it as a
            // death, by the detector.
            (Bye::Switchover, _) => Vec::new(),
            (Bye::Stop | Bye::Demoted, _) => {
                self.link = None;
                self.ask_at = None;
                self.bound_to_promote = false;
                self.state = State::Waiting;
                if bye == Bye::Stop {
                    // No one runs it any more: its next life starts at the first generation.
                    self.newest = Generation::default();
                    self.of = Generation::default();
                }
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
        self.ask_at = None;
        self.newest = self.newest.next();
        self.state = State::Asking { generation: self.newest, last };
        vec![Action::Ask(self.newest)]
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        if !matches!(self.state, State::Syncing | State::Ready { .. }) {
            return Vec::new();
        }
        let suspected = self.detector.tick(now).is_some();
        match self.state {
            State::Ready { last } if suspected || self.ask_at.is_some_and(|at| at <= now) => {
                self.ask(last)
            }
            State::Syncing if suspected => {
                self.state = State::Waiting;
                let closed = self.link.take().map(Action::Close);
                closed.into_iter().chain([Action::Lost]).collect()
            }
            _ => Vec::new(),
        }
    }

    fn verdict(&mut self, now: Duration, generation: Generation, v: Verdict) -> Vec<Action> {
        let State::Asking { generation: asked, last } = self.state else { return Vec::new() };
        if asked != generation {
            return Vec::new();
        }
        match v {
            Verdict::Granted => {
                self.state = State::Promoting { generation, from: last };
                let mut actions: Vec<Action> =
                    self.link.take().map(Action::Close).into_iter().collect();
                actions.push(Action::Promote { generation, from: last });
                actions
            }
            Verdict::Denied { newest } => {
                self.newest = self.newest.max(newest);
                self.state = State::Ready { last };
                self.ask_at = Some(now + self.config.ask_again);
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Generation = Generation(1);
    const LINK: LinkId = LinkId(5);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn receipt(epoch: u64) -> Receipt {
        Receipt { generation: G, epoch: Epoch(epoch), digest: epoch }
    }

    fn complete(epoch: u64) -> Input {
        Input::Complete { link: LINK, receipt: receipt(epoch) }
    }

    fn syncing() -> Backup {
        let mut b = Backup::new(Config::default(), Generation(0), ms(0));
        let hello = Input::Hello { link: LINK, generation: G };
        assert_eq!(b.handle(ms(0), hello), [Action::Welcome(LINK)]);
        b
    }

    fn ready() -> Backup {
        let mut b = syncing();
        assert_eq!(
            b.handle(ms(1), complete(1)),
            [Action::Apply(receipt(1)), Action::Ack { link: LINK, receipt: receipt(1) }]
        );
        b
    }

    fn until_it_acts(b: &mut Backup) -> Vec<Action> {
        loop {
            let at = b.next_deadline().expect("it waits for something");
            let actions = b.handle(at, Input::Tick);
            if !actions.is_empty() {
                return actions;
            }
        }
    }

    fn grant(b: &mut Backup, generation: u64) -> Vec<Action> {
        let generation = Generation(generation);
        b.handle(ms(500), Input::Verdict { generation, verdict: Verdict::Granted })
    }

    #[test]
    fn silence_leads_to_a_promotion_from_the_last_complete_epoch() {
        let mut b = ready();
        b.handle(ms(2), complete(2));
        assert_eq!(until_it_acts(&mut b), [Action::Ask(Generation(2))]);
        let promote = Action::Promote { generation: Generation(2), from: Epoch(2) };
        assert_eq!(grant(&mut b, 2), [Action::Close(LINK), promote]);
        assert_eq!(b.handle(ms(501), complete(3)), [], "nothing is acknowledged any more");
        b.handle(ms(502), Input::Running);
        assert_eq!(b.state(), State::Promoted { generation: Generation(2) });
        let link = LinkId(6);
        assert_eq!(
            b.handle(ms(503), Input::Hello { link, generation: G }),
            [Action::Refuse { link, code: RefuseCode::Promoted, newest: Generation(2) }]
        );
    }

    #[test]
    fn without_a_complete_checkpoint_nothing_is_promoted() {
        let mut b = syncing();
        assert_eq!(until_it_acts(&mut b), [Action::Close(LINK), Action::Lost]);
        assert_eq!(b.state(), State::Waiting);
        assert_eq!(b.handle(ms(300), Input::Promote), []);
        assert_eq!(grant(&mut b, 2), []);
    }

    #[test]
    fn life_takes_a_suspicion_back_and_its_grant_is_void() {
        let mut b = ready();
        until_it_acts(&mut b);
        b.handle(ms(300), Input::Heard(LINK));
        assert_eq!(b.state(), State::Ready { last: Epoch(1) });
        assert_eq!(grant(&mut b, 2), []);
        assert_eq!(b.handle(ms(510), complete(2)).len(), 2, "it goes on as backup");
        assert_eq!(until_it_acts(&mut b), [Action::Ask(Generation(3))], "2 is used up");
    }

    #[test]
    fn a_denial_is_asked_again_later() {
        let mut b = ready();
        until_it_acts(&mut b);
        let verdict = Verdict::Denied { newest: Generation(7) };
        b.handle(ms(100), Input::Verdict { generation: Generation(2), verdict });
        assert_eq!(b.next_deadline(), Some(ms(600)));
        assert_eq!(b.handle(ms(600), Input::Tick), [Action::Ask(Generation(8))]);
    }

    #[test]
    fn a_switchover_promotes_at_once_and_life_does_not_stop_it() {
        let mut b = ready();
        let bye = |last| Input::Bye { link: LINK, bye: Bye::Switchover, last: Epoch(last) };
        assert_eq!(b.handle(ms(2), bye(2)), [], "not the epoch that is held");
        assert_eq!(b.handle(ms(2), bye(1)), [Action::Ask(Generation(2))]);
        b.handle(ms(3), Input::Heard(LINK));
        assert_eq!(b.handle(ms(3), complete(2)), []);
        assert_eq!(grant(&mut b, 2).len(), 2);
    }

    #[test]
    fn a_stop_is_no_death() {
        let mut b = ready();
        let bye = Input::Bye { link: LINK, bye: Bye::Stop, last: Epoch(1) };
        assert_eq!(b.handle(ms(2), bye), [Action::Discard]);
        assert_eq!((b.state(), b.next_deadline()), (State::Waiting, None));
    }

    #[test]
    fn a_primary_that_comes_back_resyncs_and_the_old_copy_stays_good_meanwhile() {
        let mut b = ready();
        b.handle(ms(2), Input::Lost(LINK));
        let link = LinkId(6);
        let hello = Input::Hello { link, generation: G };
        assert_eq!(b.handle(ms(20), hello), [Action::Welcome(link)]);
        assert_eq!(b.state(), State::Ready { last: Epoch(1) });
        assert_eq!(b.handle(ms(21), complete(2)), [], "of the old connection");
        assert_eq!(until_it_acts(&mut b), [Action::Ask(Generation(2))]);
        let promote = Action::Promote { generation: Generation(2), from: Epoch(1) };
        assert_eq!(grant(&mut b, 2), [Action::Close(link), promote]);
    }

    #[test]
    fn an_older_generation_is_refused() {
        let mut b = Backup::new(Config::default(), Generation(4), ms(0));
        let code = RefuseCode::StaleGeneration;
        let refused = Action::Refuse { link: LINK, code, newest: Generation(4) };
        assert_eq!(
            b.handle(ms(0), Input::Hello { link: LINK, generation: Generation(3) }),
            [refused]
        );
    }
}
