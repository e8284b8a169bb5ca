//! What the cores want done, and the checks of what they do.

use super::{Life, Message, Snapshot, World};
use crate::ack::AckLedger;
use crate::protocol::LinkId;
use crate::protocol::arbiter::{Arbiter, Claim, Unopposed, Verdict};
use crate::protocol::backup;
use crate::protocol::primary::{self, OnLoss};
use crate::protocol::simulation::watched::Primary;
use crate::protocol::simulation::{Mistake, Rules};
use crate::{Epoch, Generation};
use std::collections::BTreeMap;

impl World {
    /// Actions of the core of the life at `at`.
    pub(super) fn primary_does(&mut self, at: usize, actions: Vec<primary::Action>) {
        for action in actions {
            let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
            match action {
                primary::Action::Connect(link) => {
                    let hello = Message::Hello(life.core.generation());
                    let of = Some((life.tenure, link));
                    life.connection = None;
                    self.connect(at, of, hello);
                }
                primary::Action::BeginFull => {
                    life.full = true;
                    self.seen.full_copies += 1;
                    self.seen.returns += u64::from(life.core.is_alone());
                }
                primary::Action::Release(proof) => {
                    let early = self.mistake == Some(Mistake::ReleaseOneEpochEarly);
                    let next = life.taken.get(&proof.epoch().next()).filter(|_| early);
                    let moment = *next.unwrap_or(&life.taken[&proof.epoch()]);
                    assert!(!life.core.is_alone());
                    self.leaves(moment, "OC-1, FO-1: released");
                    self.seen.releases += 1;
                }
                primary::Action::Severed(_, why) => {
                    assert!(!self.fair, "FO-3: the backup is given up in fair weather: {why}");
                    self.seen.rest_losses += u64::from(life.quiet);
                    if let Some(c) = life.connection.take() {
                        self.disconnect(c, 2000);
                    }
                }
                primary::Action::Hold => {}
                primary::Action::GoAlone(generation) => {
                    self.disks[at] = self.disks[at].max(generation);
                    life.still = false;
                    self.seen.degraded += 1;
                    let side = self.sides[at].as_mut().expect("it acts");
                    side.backup.handle(self.now, backup::Input::RunsOn(generation));
                }
                primary::Action::Ask { base, wanted } => self.ask(at, base, wanted),
                primary::Action::Stop => self.end(at, Generation(0)),
                primary::Action::HandOver { last, .. } => {
                    self.seen.hand_overs += 1;
                    if let Some(c) = life.connection {
                        self.send(c, 1 - at, Message::Bye(last));
                    }
                    self.end(at, Generation(0));
                }
                primary::Action::Demoted { by } => {
                    self.seen.demotions += 1;
                    self.end(at, by);
                }
            }
        }
    }

    /// The container does not run here any longer; from now on this side is a backup.
    pub(super) fn end(&mut self, at: usize, newest: Generation) {
        let side = self.sides[at].as_mut().expect("it acts");
        side.life = None;
        side.backup.handle(self.now, backup::Input::Demoted(newest));
        self.disks[at] = self.disks[at].max(newest);
    }

    pub(super) fn ask(&mut self, at: usize, base: Generation, wanted: Generation) {
        let host = ["alpha", "beta"][at].to_owned();
        let claim = Claim { container: "store".into(), host, base, wanted };
        let verdict = match self.rules {
            Rules::Unopposed => Unopposed.decide(&claim),
            Rules::Witness(_) if self.mistake == Some(Mistake::SkipTheArbiter) => Verdict::Granted,
            Rules::Witness(_) => self.grants.decide(&claim),
        };
        self.seen.denied += u64::from(verdict != Verdict::Granted);
        let late = if self.chance(10) { 1500 } else { 20 };
        let when = self.within(late);
        let incarnation = self.sides[at].as_ref().expect("it asks").incarnation;
        self.verdicts.push((when, at, incarnation, wanted, verdict));
    }

    pub(super) fn backup_does(&mut self, at: usize, actions: Vec<backup::Action>) {
        let link = |l: LinkId| l.0 as usize;
        for action in actions {
            let side = self.sides[at].as_mut().expect("it acts");
            match action {
                backup::Action::Welcome(l) => {
                    self.disks[at] = self.disks[at].max(side.backup.newest());
                    side.asks_at = None;
                    self.send(link(l), 1 - at, Message::Welcome);
                }
                backup::Action::Refuse { link: l, code, newest } => {
                    self.send(link(l), 1 - at, Message::Refuse(code, newest));
                }
                backup::Action::Close(l) => self.disconnect(link(l), 2000),
                backup::Action::Apply(_) => {}
                backup::Action::Ack { link: l, receipt } => {
                    let held = side.held.expect("acknowledged before it is held");
                    assert!((held.generation, held.epoch) == (receipt.generation, receipt.epoch));
                    self.send(link(l), 1 - at, Message::Ack(receipt));
                }
                backup::Action::Ask { base, wanted } => {
                    assert!(!self.fair, "FO-3: the primary is suspected in fair weather");
                    self.ask(at, base, wanted);
                }
                backup::Action::Promote { generation, from } => {
                    let held = side.held.take().expect("CP-2: nothing to go on from");
                    assert!(held.epoch == from && !held.provisional, "CP-2: {held:?}");
                    assert!(!self.promoted.contains(&generation), "FO-1: {generation} twice");
                    if let Some(promised) = self.promised {
                        assert!(self.contains(held.at, promised), "{promised:?} is lost");
                    }
                    self.promoted.push(generation);
                    self.seen.promotions += 1;
                    self.seen.second_promotions += u64::from(generation > Generation(2));
                    self.live(at, generation, Some(held));
                    let side = self.sides[at].as_mut().expect("it acts");
                    side.backup.handle(self.now, backup::Input::Running);
                }
                backup::Action::Discard | backup::Action::Lost => side.held = None,
            }
        }
    }

    /// The container lives here from now on.
    pub(super) fn live(&mut self, at: usize, generation: Generation, from: Option<Snapshot>) {
        self.disks[at] = self.disks[at].max(generation);
        self.tenures += 1;
        let line = self.tenures;
        self.lines.insert(line, from.map(|s| s.at));
        let on_loss = match self.rules {
            Rules::Unopposed => OnLoss::Freeze,
            Rules::Witness(on_loss) => on_loss,
        };
        let config = primary::Config { on_loss, ..primary::Config::default() };
        let ledger = AckLedger::new(generation);
        let core = match from {
            None => Primary::new(config, generation, ledger, self.now),
            Some(s) => Primary::alone(config, ledger, s.epoch, self.now),
        };
        let side = self.sides[at].as_mut().expect("it lives");
        side.life = Some(Life {
            core: core.on(at),
            tenure: line,
            now: (line, 0),
            still: false,
            next: from.map_or(Epoch(1), |s| s.epoch.next()),
            last: from.map_or(Epoch::NONE, |s| s.epoch),
            full: false,
            idle: None,
            quiet: false,
            taken: BTreeMap::new(),
            connection: None,
        });
    }
}
