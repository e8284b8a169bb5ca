//! The hosts, the connections between them, and the weather.

use super::chronicle::{self, name_of};
use super::watched::{Backup, Primary};
use super::{Mistake, Rules};
use crate::ack::AckLedger;
use crate::protocol::LinkId;
use crate::protocol::arbiter::{Arbiter, Claim, Grants, Unopposed, Verdict};
use crate::protocol::backup;
use crate::protocol::primary::{self, OnLoss};
use crate::wire::Receipt;
use crate::wire::message::{Bye, RefuseCode};
use crate::{Epoch, Generation};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const STEP: Duration = Duration::from_millis(1);
/// The host that the topology names as primary: it asks before it begins.
const HOME: usize = 0;

/// A moment in a history: a line of events, and how far along it is.
type Moment = (u64, u64);

#[derive(Clone, Copy, Debug)]
struct Snapshot {
    generation: Generation,
    epoch: Epoch,
    at: Moment,
    provisional: bool,
}

#[derive(Clone, Copy, Debug)]
enum Message {
    Hello(Generation),
    Inquiry,
    Checkpoint { snapshot: Snapshot, full: bool },
    Bye(Epoch),
    Welcome,
    Refuse(RefuseCode, Generation),
    Ack(Receipt),
    Broken,
}

/// A connection, by its number in the list.
#[derive(Debug)]
struct Connection {
    from: usize,
    /// The tenure of the primary that made it, and its name there; none for a question.
    link: Option<(u64, LinkId)>,
    /// Sides that have forgotten it.
    forgotten: [bool; 2],
    /// Both ends exist.
    alive: bool,
}

/// A container that runs.
#[derive(Debug)]
struct Life {
    core: Primary,
    tenure: u64,
    now: Moment,
    still: bool,
    next: Epoch,
    full: bool,
    /// Checkpoints taken, by epoch.
    taken: BTreeMap<Epoch, Moment>,
    connection: Option<usize>,
}

#[derive(Debug)]
struct Side {
    backup: Backup,
    life: Option<Life>,
    held: Option<Snapshot>,
    base: BTreeMap<usize, Epoch>,
    /// When to ask who runs the container.
    asks_at: Option<Duration>,
    incarnation: u64,
}

#[derive(Default, Debug)]
pub(super) struct Seen {
    pub releases: u64,
    pub promotions: u64,
    pub second_promotions: u64,
    pub full_copies: u64,
    pub demotions: u64,
    pub takebacks: u64,
    pub hand_overs: u64,
    pub returns: u64,
    pub degraded: u64,
    pub denied: u64,
    pub lives: u64,
    pub restarts: u64,
}

pub(super) struct World {
    rng: fastrand::Rng,
    rules: Rules,
    mistake: Option<Mistake>,
    now: Duration,
    sides: [Option<Side>; 2],
    /// What each host's disk remembers.
    disks: [Generation; 2],
    grants: Grants,
    /// Answers of the arbiter on their way: when, to whom, in which incarnation.
    verdicts: Vec<(Duration, usize, u64, Generation, Verdict)>,
    connections: Vec<Connection>,
    queue: VecDeque<(Duration, usize, usize, Message)>,
    beats: Vec<(Duration, usize, usize)>,
    cut: bool,
    calm: bool,
    cuts_last: u32,
    stalls: [Duration; 2],
    lines: BTreeMap<u64, Option<Moment>>,
    /// The newest moment that clients know of.
    promised: Option<Moment>,
    promoted: Vec<Generation>,
    tenures: u64,
    incarnations: u64,
    pub(super) seen: Seen,
}

impl World {
    pub(super) fn new(seed: u64, rules: Rules, mistake: Option<Mistake>) -> Self {
        let mut world = Self {
            rng: fastrand::Rng::with_seed(seed),
            rules,
            mistake,
            now: Duration::ZERO,
            sides: [None, None],
            disks: [Generation(0); 2],
            grants: Grants::default(),
            verdicts: Vec::new(),
            connections: Vec::new(),
            queue: VecDeque::new(),
            beats: Vec::new(),
            cut: false,
            calm: false,
            cuts_last: [10, 40, 150, 1500][(seed / 4) as usize % 4],
            stalls: [Duration::ZERO; 2],
            lines: BTreeMap::new(),
            promised: None,
            promoted: Vec::new(),
            tenures: 0,
            incarnations: 0,
            seen: Seen::default(),
        };
        world.start(0);
        world.start(1);
        world
    }

    fn chance(&mut self, one_in: u32) -> bool {
        !self.calm && self.rng.u32(..one_in) == 0
    }

    fn within(&mut self, ms: u64) -> Duration {
        self.now + Duration::from_millis(self.rng.u64(..ms))
    }

    fn delay(&mut self) -> Duration {
        let slow = if self.chance(50) { 60 } else { 3 };
        self.within(slow)
    }

    fn contains(&self, newer: Moment, older: Moment) -> bool {
        let mut at = newer;
        loop {
            if at.0 == older.0 {
                return older.1 <= at.1;
            }
            match self.lines[&at.0] {
                Some(parent) => at = parent,
                None => return false,
            }
        }
    }

    /// Output made up to this moment is with the clients.
    fn leaves(&mut self, at: Moment, what: &str) {
        if let Some(promised) = self.promised {
            // An old primary may learn late of an acknowledgement that came before the promotion.
            if self.contains(promised, at) {
                return;
            }
            assert!(self.contains(at, promised), "{what}: {at:?} knows nothing of {promised:?}");
        }
        self.promised = Some(at);
    }

    fn start(&mut self, at: usize) {
        let newest = self.disks[at];
        chronicle::note(|| format!("{} starts, and remembers {newest}", name_of(at)));
        self.incarnations += 1;
        self.sides[at] = Some(Side {
            backup: Backup::new(backup::Config::default(), newest, self.now).on(at),
            life: None,
            held: None,
            base: BTreeMap::new(),
            asks_at: (at == HOME).then_some(self.now),
            incarnation: self.incarnations,
        });
    }

    fn crash(&mut self, at: usize) {
        chronicle::note(|| format!("{} crashes", name_of(at)));
        self.sides[at] = None;
        for c in 0..self.connections.len() {
            self.connections[c].forgotten[at] = true;
            if self.connections[c].alive {
                self.disconnect(c, 2000);
            }
        }
    }

    fn connect(&mut self, from: usize, link: Option<(u64, LinkId)>, hello: Message) {
        let c = self.connections.len();
        let reaches = !self.cut && self.sides[1 - from].is_some();
        self.connections.push(Connection { from, link, forgotten: [false; 2], alive: reaches });
        if reaches {
            self.send(c, 1 - from, hello);
        } else {
            let at = self.now + Duration::from_millis(300);
            self.enqueue(at, c, from, Message::Broken);
        }
    }

    fn send(&mut self, c: usize, to: usize, m: Message) {
        let at = self.delay();
        self.enqueue(at, c, to, m);
    }

    /// A stream keeps its order: nothing arrives before what its connection sent earlier.
    fn enqueue(&mut self, at: Duration, c: usize, to: usize, m: Message) {
        let same = self.queue.iter().filter(|q| (q.1, q.2) == (c, to));
        let earlier = same.map(|q| q.0).max();
        self.queue.push_back((at.max(earlier.unwrap_or(at)), c, to, m));
        self.queue.make_contiguous().sort_by_key(|q| q.0);
    }

    /// The connection is gone. What was on its way is lost from some point on; each end learns
    /// of it late.
    fn disconnect(&mut self, c: usize, late: u64) {
        self.connections[c].alive = false;
        for to in 0..2 {
            let keep = self.rng.usize(..=self.queue.len());
            let mut index = 0;
            self.queue.retain(|q| {
                index += 1;
                (q.1, q.2) != (c, to) || index <= keep
            });
            let at = self.within(late);
            self.enqueue(at, c, to, Message::Broken);
        }
    }

    /// Actions of the core of the life at `at`.
    fn primary_does(&mut self, at: usize, actions: Vec<primary::Action>) {
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
                primary::Action::Severed(..) => {
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
    fn end(&mut self, at: usize, newest: Generation) {
        let side = self.sides[at].as_mut().expect("it acts");
        side.life = None;
        side.backup.handle(self.now, backup::Input::Demoted(newest));
        self.disks[at] = self.disks[at].max(newest);
    }

    fn ask(&mut self, at: usize, base: Generation, wanted: Generation) {
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

    fn backup_does(&mut self, at: usize, actions: Vec<backup::Action>) {
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
                backup::Action::Ask { base, wanted } => self.ask(at, base, wanted),
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
    fn live(&mut self, at: usize, generation: Generation, from: Option<Snapshot>) {
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
            full: false,
            taken: BTreeMap::new(),
            connection: None,
        });
    }

    pub(super) fn step(&mut self) {
        self.now += STEP;
        chronicle::is(self.now);
        self.weather();
        for at in 0..2 {
            if self.now >= self.stalls[at] && self.sides[at].is_some() {
                self.deliver(at);
                self.tick(at);
                self.work(at);
            }
        }
        self.check();
    }

    fn check(&self) {
        let lives = || self.sides.iter().flatten().filter_map(|s| s.life.as_ref());
        let alone: Vec<_> = lives().filter(|l| l.core.is_alone()).collect();
        assert!(alone.len() < 2, "FO-1: two sides act alone: {alone:?}");
        for life in lives() {
            assert!(life.core.in_flight() <= life.core.depth(), "RB-1");
        }
    }

    /// Cuts, stalls and crashes.
    fn weather(&mut self) {
        let live = self.connections.iter().rposition(|c| c.alive);
        if self.chance(if self.cut { self.cuts_last } else { 700 }) {
            self.cut = !self.cut;
            chronicle::note(|| format!("the link {}", if self.cut { "is cut" } else { "heals" }));
            if let Some(c) = live.filter(|_| self.cut && self.rng.bool()) {
                self.disconnect(c, 2000);
            }
        } else if self.chance(500)
            && let Some(c) = live
        {
            self.disconnect(c, 60);
        }
        for at in 0..2 {
            if self.chance(500) {
                self.stalls[at] = self.within(130);
                let ms = (self.stalls[at] - self.now).as_millis();
                chronicle::note(|| format!("{} stands still for {ms} ms", name_of(at)));
            }
            if self.sides[at].is_none() {
                if self.calm || self.chance(300) {
                    self.seen.restarts += 1;
                    self.start(at);
                }
            } else if self.chance(4000) {
                self.crash(at);
            }
        }
    }

    fn deliver(&mut self, at: usize) {
        loop {
            let due = |q: &(Duration, usize, usize, Message)| q.2 == at && q.0 <= self.now;
            let Some(i) = self.queue.iter().position(due) else { break };
            let (_, c, _, m) = self.queue.remove(i).expect("just found");
            if !self.connections[c].forgotten[at] {
                self.receive(at, c, m);
            }
        }
        let here: Vec<usize> =
            self.beats.iter().filter(|b| b.1 == at && b.0 <= self.now).map(|b| b.2).collect();
        self.beats.retain(|b| b.1 != at || b.0 > self.now);
        for c in here {
            if !self.connections[c].forgotten[at] {
                self.heard(at, c);
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

    fn heard(&mut self, at: usize, c: usize) {
        if self.connections[c].from == at {
            self.primary_input(at, c, primary::Input::Heard);
        } else {
            self.backup_input(at, backup::Input::Heard(LinkId(c as u64)));
        }
    }

    fn backup_input(&mut self, at: usize, input: backup::Input) {
        let Some(side) = self.sides[at].as_mut() else { return };
        let asking = |s| matches!(s, backup::State::Asking { .. });
        let was = asking(side.backup.state());
        let actions = side.backup.handle(self.now, input);
        let is = matches!(side.backup.state(), backup::State::Ready { .. });
        self.seen.takebacks += u64::from(was && is);
        self.backup_does(at, actions);
    }

    /// An input of the life whose connection this is, if it lives.
    fn primary_input(&mut self, at: usize, c: usize, input: impl FnOnce(LinkId) -> primary::Input) {
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

    fn receive(&mut self, at: usize, c: usize, m: Message) {
        let link = LinkId(c as u64);
        match m {
            Message::Hello(mut generation) => {
                self.forget_generations(at, &mut generation);
                self.backup_input(at, backup::Input::Hello { link, generation });
            }
            Message::Inquiry => self.backup_input(at, backup::Input::Inquiry(link)),
            Message::Checkpoint { mut snapshot, full } => {
                self.forget_generations(at, &mut snapshot.generation);
                snapshot.provisional &= self.mistake != Some(Mistake::PromoteFromProvisional);
                let side = self.sides[at].as_mut().expect("it receives");
                // What the assembly guarantees: an increment has its base.
                if !full && side.base.get(&c).map(|e| e.next()) != Some(snapshot.epoch) {
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

    fn forget_generations(&self, at: usize, generation: &mut Generation) {
        if let (Some(Mistake::WelcomeAnOldGeneration), Some(side)) = (self.mistake, &self.sides[at])
        {
            *generation = side.backup.newest().max(*generation);
        }
    }

    /// The other side has said who runs the container.
    fn answered(&mut self, at: usize, code: RefuseCode, newest: Generation) {
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

    fn tick(&mut self, at: usize) {
        let now = self.now;
        let side = self.sides[at].as_mut().expect("it lives");
        if side.life.is_none()
            && side.asks_at.is_some_and(|t| t <= now)
            && side.backup.state() == backup::State::Waiting
        {
            side.asks_at = Some(now + Duration::from_millis(200));
            self.connect(at, None, Message::Inquiry);
        }
        let side = self.sides[at].as_mut().expect("it lives");
        if side.backup.next_deadline().is_some_and(|t| t <= now) {
            self.backup_input(at, backup::Input::Tick);
        }
        let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
        if life.core.next_deadline().is_some_and(|t| t <= now) {
            let actions = life.core.handle(now, primary::Input::Tick);
            self.primary_does(at, actions);
        }
    }

    /// The container runs, and checkpoints are taken.
    fn work(&mut self, at: usize) {
        let (takes, hands_over) = (self.calm || self.rng.u8(..4) == 0, self.chance(1500));
        self.beat(at);
        let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
        let protected = life.core.state() == (primary::State::Protected { synced: true });
        // A stop for a switchover that came to nothing ends with the protection.
        life.still &= protected;
        if !life.still {
            life.now.1 += 1;
        }
        let now = life.now;
        if life.core.is_alone() {
            self.leaves(now, "FO-1: alone");
        }
        let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
        if !life.still && takes && life.core.may_begin_stop() {
            let last = life.next;
            self.checkpoint(at);
            let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
            if hands_over && protected && life.next > last {
                life.still = true;
                let actions = life.core.handle(self.now, primary::Input::HandOver { last });
                self.primary_does(at, actions);
            }
        }
    }

    fn checkpoint(&mut self, at: usize) {
        let life = self.sides[at].as_mut().and_then(|s| s.life.as_mut()).expect("it runs");
        let (epoch, full) = (life.next, std::mem::take(&mut life.full));
        let (generation, provisional) = (life.core.generation(), life.core.is_catching_up());
        let snapshot = Snapshot { generation, epoch, at: life.now, provisional };
        life.next = epoch.next();
        life.taken.insert(epoch, life.now);
        let Some(c) = life.connection else { return };
        let (_, link) = self.connections[c].link.expect("a primary's");
        let digest = epoch.0 ^ 77;
        let input = primary::Input::Sent { link, epoch, digest, provisional };
        let actions = life.core.handle(self.now, input);
        if life.core.sends_on(link) && self.connections[c].alive {
            self.send(c, 1 - at, Message::Checkpoint { snapshot, full });
        }
        self.primary_does(at, actions);
    }

    /// Both ends of a connection say that they live.
    fn beat(&mut self, at: usize) {
        if !self.now.as_millis().is_multiple_of(10) {
            return;
        }
        for c in 0..self.connections.len() {
            let connection = &self.connections[c];
            if !connection.alive || connection.link.is_none() || self.cut || self.chance(10) {
                continue;
            }
            for _ in 0..if self.chance(20) { 2 } else { 1 } {
                let when = self.delay();
                self.beats.push((when, 1 - at, c));
            }
        }
    }

    /// The weather turns fair: whatever has happened, the container is protected soon.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        chronicle::note(|| "the weather turns fair".to_owned());
        self.cut = false;
        // What was granted and not used can leave a primary frozen: its operator restarts it.
        for round in 0..4 {
            for _ in 0..5000 {
                self.step();
                let lives = self.sides.iter().flatten().filter_map(|s| s.life.as_ref());
                let mut states = lives.map(|l| l.core.state());
                if states.any(|s| s == primary::State::Protected { synced: true }) {
                    return;
                }
            }
            if round < 3 {
                self.crash(round % 2);
            }
        }
        panic!("not protected in fair weather: {:#?}", self.sides);
    }
}
