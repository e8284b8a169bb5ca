//! A seeded run of primary, backup, arbiter and the link between them.
//!
//! Streams keep their order and lose nothing until a cut or a crash breaks the connection (what a
//! real transport makes of loss is delay); heartbeats are lost, doubled and overtake each other.
//! Either host stalls, crashes and restarts. Checked all the time:
//!
//! - OC-1: no release of an epoch before the backup was given all of it.
//! - CP-2: a promotion goes on from an epoch that is complete at the backup, and from none older
//!   than any that was ever released.
//! - FO-1: generations of promotions only grow, and after a promotion the older generation
//!   releases nothing that the promotion does not contain.

use super::LinkId;
use super::arbiter::{Arbiter, Unopposed};
use super::backup::{self, Backup};
use super::primary::{self, Primary};
use crate::ack::AckLedger;
use crate::wire::Receipt;
use crate::wire::message::{Bye, RefuseCode};
use crate::{Epoch, Generation};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const STEP: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug)]
enum ToBackup {
    Hello(Generation),
    Checkpoint { epoch: Epoch, full: bool },
    Bye(Bye, Epoch),
    Broken,
}

#[derive(Clone, Copy, Debug)]
enum ToPrimary {
    Welcome,
    Refuse(RefuseCode, Generation),
    Ack(Receipt),
    Broken,
}

/// One direction of one connection, or the datagrams.
type Queue<M> = VecDeque<(Duration, LinkId, M)>;

#[derive(Default, Debug)]
struct Seen {
    releases: u64,
    promotions: u64,
    resyncs: u64,
    demotions: u64,
    takebacks: u64,
    hand_overs: u64,
}

struct World {
    rng: fastrand::Rng,
    now: Duration,
    primary: Option<Primary>,
    backup: Option<Backup>,
    arbiter: Unopposed,
    to_backup: Queue<ToBackup>,
    to_primary: Queue<ToPrimary>,
    beats: Vec<(Duration, LinkId, bool)>,
    cut: bool,
    /// Milliseconds that a cut lasts on average: from blips to outages.
    cuts_last: u32,
    /// The connection whose ends both exist.
    live: Option<LinkId>,
    next_epoch: Epoch,
    full_next: bool,
    /// What the backup holds.
    held: Option<Epoch>,
    /// The newest that it ever held; a crash of the backup alone takes nothing back.
    ever_held: Option<Epoch>,
    base: BTreeMap<LinkId, Epoch>,
    released: Epoch,
    promoted: Option<(Generation, Epoch)>,
    primary_stalls: Duration,
    backup_stalls: Duration,
    grants: Vec<(Duration, Generation)>,
    seen: Seen,
}

impl World {
    fn new(seed: u64) -> Self {
        let g = Generation::FIRST;
        let now = Duration::ZERO;
        let ledger = AckLedger::new(g);
        Self {
            rng: fastrand::Rng::with_seed(seed),
            now,
            primary: Some(Primary::new(primary::Config::default(), g, ledger, now)),
            backup: Some(Backup::new(backup::Config::default(), Generation(0), now)),
            arbiter: Unopposed::new(g),
            to_backup: Queue::new(),
            to_primary: Queue::new(),
            beats: Vec::new(),
            cut: false,
            cuts_last: [10, 40, 150][seed as usize % 3],
            live: None,
            next_epoch: Epoch(1),
            full_next: true,
            held: None,
            ever_held: None,
            base: BTreeMap::new(),
            released: Epoch::NONE,
            promoted: None,
            primary_stalls: now,
            backup_stalls: now,
            grants: Vec::new(),
            seen: Seen::default(),
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.rng.u32(..one_in) == 0
    }

    fn delay(&mut self) -> Duration {
        let slow = if self.chance(50) { 60 } else { 3 };
        self.now + Duration::from_millis(self.rng.u64(..slow))
    }

    fn send_backup(&mut self, link: LinkId, m: ToBackup) {
        let at = self.delay();
        enqueue(&mut self.to_backup, at, link, m);
    }

    fn send_primary(&mut self, link: LinkId, m: ToPrimary) {
        let at = self.delay();
        enqueue(&mut self.to_primary, at, link, m);
    }

    /// The connection is gone. What was on its way is lost from some point on; each end learns
    /// of it late.
    fn disconnect(&mut self, link: LinkId) {
        let late = Duration::from_millis(self.rng.u64(..2000));
        self.disconnect_noticed(link, late);
    }

    fn disconnect_noticed(&mut self, link: LinkId, late: Duration) {
        if self.live == Some(link) {
            self.live = None;
        }
        let keep = self.rng.usize(..=self.to_backup.len());
        truncate(&mut self.to_backup, link, keep);
        let keep = self.rng.usize(..=self.to_primary.len());
        truncate(&mut self.to_primary, link, keep);
        let late = self.now + late;
        enqueue(&mut self.to_backup, late, link, ToBackup::Broken);
        enqueue(&mut self.to_primary, late, link, ToPrimary::Broken);
    }

    fn primary_does(&mut self, actions: Vec<primary::Action>) {
        for action in actions {
            match action {
                primary::Action::Connect(link) => {
                    if self.cut || self.backup.is_none() {
                        let at = self.now + Duration::from_millis(300);
                        enqueue(&mut self.to_primary, at, link, ToPrimary::Broken);
                    } else {
                        self.live = Some(link);
                        let g = self.primary.as_ref().expect("it acts").generation();
                        self.send_backup(link, ToBackup::Hello(g));
                    }
                }
                primary::Action::BeginFull => {
                    self.full_next = true;
                    self.seen.resyncs += 1;
                }
                primary::Action::Release(proof) => {
                    let e = proof.epoch();
                    assert!(e > self.released, "released twice");
                    let held = self.ever_held;
                    assert!(Some(e) <= held, "OC-1: {e} released, {held:?} held");
                    if let Some((_, from)) = self.promoted {
                        assert!(e <= from, "FO-1: {e} released after a promotion from {from}");
                    }
                    self.released = e;
                    self.seen.releases += 1;
                }
                primary::Action::Severed(link, _) => self.disconnect(link),
                primary::Action::HandOver { link, last } => {
                    self.seen.hand_overs += 1;
                    self.send_backup(link, ToBackup::Bye(Bye::Switchover, last));
                }
                primary::Action::Demoted { .. } => {
                    assert!(self.promoted.is_some(), "demoted by nobody");
                    self.seen.demotions += 1;
                }
            }
        }
    }

    fn backup_does(&mut self, actions: Vec<backup::Action>) {
        for action in actions {
            match action {
                backup::Action::Welcome(link) => self.send_primary(link, ToPrimary::Welcome),
                backup::Action::Refuse { link, code, newest } => {
                    self.send_primary(link, ToPrimary::Refuse(code, newest));
                }
                backup::Action::Close(link) => self.disconnect(link),
                backup::Action::Apply(receipt) => {
                    self.held = Some(receipt.epoch);
                    self.ever_held = self.ever_held.max(self.held);
                }
                backup::Action::Ack { link, receipt } => {
                    assert!(self.held >= Some(receipt.epoch), "acknowledged before applied");
                    assert!(self.promoted.is_none(), "FO-1: acknowledged after the promotion");
                    self.send_primary(link, ToPrimary::Ack(receipt));
                }
                backup::Action::Ask(generation) => {
                    let at = self.delay() + Duration::from_millis(self.rng.u64(..100));
                    self.grants.push((at, generation));
                }
                backup::Action::Promote { generation, from } => {
                    assert_eq!(self.held, Some(from), "CP-2: not the last complete epoch");
                    assert!(from >= self.released, "released {} is lost", self.released);
                    assert!(self.promoted.is_none_or(|(g, _)| g < generation), "FO-1");
                    assert!(generation > Generation::FIRST);
                    self.promoted = Some((generation, from));
                    self.seen.promotions += 1;
                }
                backup::Action::Discard => self.held = None,
                backup::Action::Lost => {}
            }
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        self.weather();
        if self.now >= self.primary_stalls {
            self.step_primary();
        }
        if self.now >= self.backup_stalls {
            self.step_backup();
        }
    }

    /// Cuts, stalls and crashes.
    fn weather(&mut self) {
        if self.chance(if self.cut { self.cuts_last } else { 700 }) {
            self.cut = !self.cut;
            if let Some(link) = self.live.filter(|_| self.cut && self.rng.bool()) {
                self.disconnect(link);
            }
        }
        if let Some(link) = self.live.filter(|_| self.rng.u32(..500) == 0) {
            let late = Duration::from_millis(self.rng.u64(..60));
            self.disconnect_noticed(link, late);
        }
        if self.chance(500) {
            self.primary_stalls = self.now + Duration::from_millis(self.rng.u64(..130));
        }
        if self.chance(500) {
            self.backup_stalls = self.now + Duration::from_millis(self.rng.u64(..130));
        }
        if self.chance(8000) && self.primary.take().is_some() {
            self.live.into_iter().for_each(|l| self.disconnect(l));
        }
        if self.chance(4000) && self.backup.is_some() && self.promoted.is_none() {
            self.backup = None;
            self.held = None;
            self.grants.clear();
            self.live.into_iter().for_each(|l| self.disconnect(l));
        } else if self.backup.is_none() && self.chance(200) {
            let config = backup::Config::default();
            self.backup = Some(Backup::new(config, Generation(0), self.now));
        }
    }

    fn step_primary(&mut self) {
        let Some(mut p) = self.primary.take() else {
            self.to_primary.clear();
            return;
        };
        let mut actions = Vec::new();
        while self.to_primary.front().is_some_and(|m| m.0 <= self.now) {
            let (_, link, m) = self.to_primary.pop_front().expect("looked at");
            let input = match m {
                ToPrimary::Welcome => primary::Input::Connected(link),
                ToPrimary::Refuse(code, newest) => primary::Input::Refused { link, code, newest },
                ToPrimary::Ack(Receipt { generation, epoch, digest }) => {
                    primary::Input::Ack { link, generation, epoch, digest }
                }
                ToPrimary::Broken => primary::Input::Lost(link),
            };
            actions.extend(p.handle(self.now, input));
        }
        for link in self.heard(false) {
            actions.extend(p.handle(self.now, primary::Input::Heard(link)));
        }
        if p.next_deadline().is_some_and(|at| at <= self.now) {
            actions.extend(p.handle(self.now, primary::Input::Tick));
        }
        let ready = p.may_begin_stop();
        let beats = matches!(p.state(), primary::State::Protected { .. });
        if beats && self.chance(1500) {
            actions.extend(p.handle(self.now, primary::Input::HandOver));
        }
        self.primary = Some(p);
        self.primary_does(actions);
        if ready && self.chance(4) {
            self.checkpoint();
        }
        if beats {
            self.beat(true);
        }
    }

    fn checkpoint(&mut self) {
        let (epoch, full) = (self.next_epoch, self.full_next);
        let Some(p) = self.primary.as_mut().filter(|p| p.may_begin_stop()) else { return };
        let actions = p.handle(self.now, primary::Input::Sent { epoch, digest: epoch.0 ^ 77 });
        self.full_next = false;
        self.next_epoch = epoch.next();
        if let Some(link) = self.live {
            self.send_backup(link, ToBackup::Checkpoint { epoch, full });
        }
        self.primary_does(actions);
    }

    fn step_backup(&mut self) {
        let Some(mut b) = self.backup.take() else {
            self.to_backup.clear();
            return;
        };
        let mut actions = Vec::new();
        while self.to_backup.front().is_some_and(|m| m.0 <= self.now) {
            let (_, link, m) = self.to_backup.pop_front().expect("looked at");
            let input = match m {
                ToBackup::Hello(generation) => backup::Input::Hello { link, generation },
                ToBackup::Checkpoint { epoch, full } => {
                    // What the assembly guarantees: an increment has its base.
                    let base = self.base.get(&link);
                    if !full && base.map(|e| e.next()) != Some(epoch) {
                        continue;
                    }
                    self.base.insert(link, epoch);
                    let receipt =
                        Receipt { generation: Generation::FIRST, epoch, digest: epoch.0 ^ 77 };
                    backup::Input::Complete { link, receipt }
                }
                ToBackup::Bye(bye, last) => backup::Input::Bye { link, bye, last },
                ToBackup::Broken => backup::Input::Lost(link),
            };
            let was = b.state();
            actions.extend(b.handle(self.now, input));
            self.count_takeback(was, b.state());
        }
        for link in self.heard(true) {
            let was = b.state();
            actions.extend(b.handle(self.now, backup::Input::Heard(link)));
            self.count_takeback(was, b.state());
        }
        if b.next_deadline().is_some_and(|at| at <= self.now) {
            actions.extend(b.handle(self.now, backup::Input::Tick));
        }
        let due = self.grants.iter().filter(|g| g.0 <= self.now).map(|g| g.1).collect::<Vec<_>>();
        self.grants.retain(|g| g.0 > self.now);
        for generation in due {
            let verdict = self.arbiter.may_promote(generation);
            let input = backup::Input::Verdict { generation, verdict };
            actions.extend(b.handle(self.now, input));
        }
        let promoting = matches!(b.state(), backup::State::Promoting { .. });
        if promoting && self.chance(5) {
            b.handle(self.now, backup::Input::Running);
        }
        self.backup = Some(b);
        self.backup_does(actions);
        self.beat(false);
    }

    fn count_takeback(&mut self, was: backup::State, is: backup::State) {
        let asking = |s| matches!(s, backup::State::Asking { .. });
        self.seen.takebacks += u64::from(asking(was) && !asking(is));
    }

    /// Heartbeats that arrive now, on either side.
    fn heard(&mut self, at_backup: bool) -> Vec<LinkId> {
        let now = self.now;
        let here = |b: &(Duration, LinkId, bool)| b.2 == at_backup && b.0 <= now;
        let links = self.beats.iter().filter(|b| here(b)).map(|b| b.1).collect();
        self.beats.retain(|b| !here(b));
        links
    }

    fn beat(&mut self, to_backup: bool) {
        let Some(link) = self.live else { return };
        let lost = self.cut || self.chance(10);
        if self.now.as_millis().is_multiple_of(10) && !lost {
            for _ in 0..if self.chance(20) { 2 } else { 1 } {
                let at = self.delay();
                self.beats.push((at, link, to_backup));
            }
        }
    }
}

/// A stream keeps its order: nothing arrives before what its connection sent earlier.
fn enqueue<M>(queue: &mut Queue<M>, at: Duration, link: LinkId, m: M) {
    let earlier = queue.iter().filter(|q| q.1 == link).map(|q| q.0).max();
    queue.push_back((at.max(earlier.unwrap_or(at)), link, m));
    queue.make_contiguous().sort_by_key(|q| q.0);
}

fn truncate<M>(queue: &mut Queue<M>, link: LinkId, keep: usize) {
    let mut index = 0;
    queue.retain(|m| {
        index += 1;
        m.1 != link || index <= keep
    });
}

fn run(seed: u64, steps: u32) -> Seen {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step();
    }
    world.seen
}

#[test]
fn no_schedule_breaks_the_invariants() {
    let mut total = Seen::default();
    for seed in 0..1000 {
        let result = std::panic::catch_unwind(|| run(seed, 6000));
        let seen = result.unwrap_or_else(|_| panic!("the run with seed {seed} failed"));
        total.releases += seen.releases;
        total.promotions += seen.promotions;
        total.resyncs += seen.resyncs;
        total.demotions += seen.demotions;
        total.takebacks += seen.takebacks;
        total.hand_overs += seen.hand_overs;
    }
    // The runs must have been where it matters.
    println!("{total:?}");
    assert!(total.releases > 50_000 && total.promotions > 100 && total.resyncs > 400);
    assert!(total.demotions > 20 && total.takebacks > 10 && total.hand_overs > 50);
}
