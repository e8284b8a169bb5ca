//! What reaches the cores: messages, signs of life, and answers of the arbiter.

use super::{Message, Snapshot, World};
use crate::Generation;
use crate::protocol::LinkId;
use crate::protocol::arbiter::{Arbiter, Claim, Verdict};
use crate::protocol::detector::{Marks, Pace};
use crate::protocol::simulation::{Mistake, Rules};
use crate::protocol::{backup, primary};
use crate::wire::Receipt;
use crate::wire::message::{Bye, RefuseCode};
use std::time::Duration;

impl World {
    pub(super) fn deliver(&mut self, at: usize) {
        loop {
            let due = |q: &(Duration, usize, usize, Message)| q.2 == at && q.0 <= self.now;
            let Some(i) = self.queue.iter().position(due) else { break };
            let (_, c, _, m) = self.queue.remove(i).expect("just found");
            if !self.connections[c].forgotten[at] {
                self.receive(at, c, m);
            }
        }
        let mut here = self.beats.clone();
        here.retain(|b| b.1 == at && b.0 <= self.now);
        self.beats.retain(|b| b.1 != at || b.0 > self.now);
        for (_, _, c, pace) in here {
            if !self.connections[c].forgotten[at] {
                self.heard(at, c, pace);
            }
        }
        let now = self.now;
        let due: Vec<_> =
            self.verdicts.iter().filter(|v| v.1 == at && v.0 <= now).copied().collect();
        self.verdicts.retain(|v| v.1 != at || v.0 > now);
        for (_, _, incarnation, generation, verdict) in due {
            let Some(side) = self.sides[at].as_mut() else { return };
            if side.incarnation != incarnation {
                continue;
            }
            match &mut side.life {
                Some(life) => {
                    let input = primary::Input::Verdict { generation, verdict };
                    let actions = life.core.handle(now, input);
                    self.primary_does(at, actions);
                }
                None => self.backup_input(at, backup::Input::Verdict { generation, verdict }),
            }
        }
    }

    pub(super) fn heard(&mut self, at: usize, c: usize, pace: Pace) {
        if self.connections[c].from == at {
            self.primary_input(at, c, |link| primary::Input::Pulse { link, pace });
        } else {
            let now = self.now.as_millis() as u64;
            let marks = Marks { work: now, runtime: now, long: false, pace };
            self.backup_input(at, backup::Input::Pulse { link: LinkId(c as u64), marks });
        }
    }

    pub(super) fn backup_input(&mut self, at: usize, input: backup::Input) {
        let Some(side) = self.sides[at].as_mut() else { return };
        let asking = |s| matches!(s, backup::State::Asking { .. });
        let was = asking(side.backup.state());
        let actions = side.backup.handle(self.now, input);
        let is = matches!(side.backup.state(), backup::State::Ready { .. });
        self.seen.takebacks += u64::from(was && is);
        self.backup_does(at, actions);
    }

    /// An input of the life whose connection this is, if it lives.
    pub(super) fn primary_input(
        &mut self,
        at: usize,
        c: usize,
        input: impl FnOnce(LinkId) -> primary::Input,
    ) {
        let Some((tenure, link)) = self.connections[c].link else { return };
        let life = self.sides[at].as_mut().and_then(|s| s.life.as_mut());
        let Some(life) = life.filter(|l| l.tenure == tenure) else { return };
        let input = input(link);
        if input == primary::Input::Connected(link) {
            life.connection = Some(c);
        }
        let actions = life.core.handle(self.now, input);
        self.primary_does(at, actions);
    }

    pub(super) fn receive(&mut self, at: usize, c: usize, m: Message) {
        let link = LinkId(c as u64);
        match m {
            Message::Hello(mut generation) => {
                self.forget_generations(at, &mut generation);
                self.backup_input(at, backup::Input::Hello { link, generation });
            }
            Message::Inquiry => self.backup_input(at, backup::Input::Inquiry(link)),
            Message::Checkpoint { mut snapshot, full, follows } => {
                self.forget_generations(at, &mut snapshot.generation);
                snapshot.provisional &= self.mistake != Some(Mistake::PromoteFromProvisional);
                let side = self.sides[at].as_mut().expect("it receives");
                // What the assembly guarantees: an increment has its base.
                if !full && side.base.get(&c) != Some(&follows) {
                    return;
                }
                side.base.insert(c, snapshot.epoch);
                let Snapshot { generation, epoch, provisional, .. } = snapshot;
                let receipt = Receipt { generation, epoch, digest: epoch.0 ^ 77, provisional };
                let actions =
                    side.backup.handle(self.now, backup::Input::Complete { link, receipt });
                if actions.iter().any(|a| matches!(a, backup::Action::Apply(_))) {
                    side.held = Some(snapshot);
                }
                self.backup_does(at, actions);
            }
            Message::Bye(last) => {
                self.backup_input(at, backup::Input::Bye { link, bye: Bye::Switchover, last });
            }
            Message::Broken if self.connections[c].from != at => {
                self.backup_input(at, backup::Input::Lost(link));
            }
            Message::Broken => self.primary_input(at, c, primary::Input::Lost),
            Message::Welcome => self.primary_input(at, c, primary::Input::Connected),
            Message::Refuse(code, newest) if self.connections[c].link.is_none() => {
                self.answered(at, code, newest);
            }
            Message::Refuse(code, newest) => {
                self.primary_input(at, c, |link| primary::Input::Refused { link, code, newest });
            }
            Message::Ack(Receipt { mut generation, epoch, digest, .. }) => {
                let life = self.sides[at].as_ref().and_then(|s| s.life.as_ref());
                if let (Some(Mistake::WelcomeAnOldGeneration), Some(life)) = (self.mistake, life) {
                    generation = life.core.generation();
                }
                self.primary_input(at, c, |link| primary::Input::Ack {
                    link,
                    generation,
                    epoch,
                    digest,
                });
            }
        }
    }

    pub(super) fn forget_generations(&self, at: usize, generation: &mut Generation) {
        if let (Some(Mistake::WelcomeAnOldGeneration), Some(side)) = (self.mistake, &self.sides[at])
        {
            *generation = side.backup.newest().max(*generation);
        }
    }

    /// The other side has said who runs the container.
    pub(super) fn answered(&mut self, at: usize, code: RefuseCode, newest: Generation) {
        let side = self.sides[at].as_mut().expect("it asked");
        if code != RefuseCode::Vacant || side.asks_at.is_none() {
            return;
        }
        let mut base = newest.max(side.backup.newest());
        if let (Rules::Witness(_), Some(grant)) = (self.rules, self.grants.newest("store")) {
            base = base.max(grant.generation);
        }
        let generation = base.next();
        side.backup.handle(self.now, backup::Input::Begin(generation));
        if side.backup.state() != (backup::State::Promoted { generation }) {
            return;
        }
        side.asks_at = None;
        assert!(self.sides[1 - at].as_ref().is_none_or(|s| s.life.is_none()), "a second life");
        if let Rules::Witness(_) = self.rules {
            let host = "alpha".into();
            let claim = Claim { container: "store".into(), host, base, wanted: generation };
            assert_eq!(self.grants.decide(&claim), Verdict::Granted);
        }
        // All that was is lost, and said to be.
        self.promised = None;
        self.promoted.push(generation);
        self.seen.lives += 1;
        self.live(at, generation, None);
    }
}
