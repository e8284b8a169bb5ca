//! The hosts, the connections between them, and the weather.

mod actions;
mod inputs;

use super::chronicle::{self, name_of};
use super::watched::{Backup, Primary};
use super::{Mistake, Rules};
use crate::protocol::LinkId;
use crate::protocol::arbiter::{Grants, Verdict};
use crate::protocol::backup;
use crate::protocol::detector::{self, Pace};
use crate::protocol::primary;
use crate::wire::Receipt;
use crate::wire::message::RefuseCode;
use crate::{Epoch, Generation};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const STEP: Duration = Duration::from_millis(1);
/// For how long a container has had nothing to do when its core is told.
const QUIET: Duration = Duration::from_millis(50);
/// Steps after which fair weather has come to stay, and those for which it is watched then.
const SETTLES: u32 = 2500;
const WATCHED: u32 = 1500;
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
    Checkpoint { snapshot: Snapshot, full: bool, follows: Epoch },
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
    /// The last one that a checkpoint was made of.
    last: Epoch,
    full: bool,
    /// Since when nothing happens in it, and until when.
    idle: Option<(Duration, Duration)>,
    /// Its core knows of that.
    quiet: bool,
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
    /// When its last pulses left, and the last that did not say that it rests.
    beaten: Duration,
    restless: Duration,
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
    pub rests: u64,
    pub rest_losses: u64,
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
    /// Pulses on their way: when, to whom, over which connection, and how the next ones come.
    beats: Vec<(Duration, usize, usize, Pace)>,
    cut: bool,
    calm: bool,
    /// The weather has been fair for long: nobody is suspected any longer.
    fair: bool,
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
            fair: false,
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
            beaten: Duration::ZERO,
            restless: self.now,
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
        self.idle(at, protected);
        let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
        let idle = life.idle.is_some();
        if !life.still && !idle {
            life.now.1 += 1;
        }
        let now = life.now;
        if life.core.is_alone() {
            self.leaves(now, "FO-1: alone");
        }
        let Some(life) = self.sides[at].as_mut().and_then(|s| s.life.as_mut()) else { return };
        if !life.still && !idle && takes && life.core.may_begin_stop() {
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
        if self.rng.u32(..20) == 0 {
            // A stop that came to nothing: its output waits for the next one.
            life.taken.insert(life.next, life.now);
            life.next = life.next.next();
        }
        let (epoch, full) = (life.next, std::mem::take(&mut life.full));
        let follows = std::mem::replace(&mut life.last, epoch);
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
            self.send(c, 1 - at, Message::Checkpoint { snapshot, full, follows });
        }
        self.primary_does(at, actions);
    }

    /// The container has nothing to do for a while, and after some of it its core is told so.
    fn idle(&mut self, at: usize, protected: bool) {
        let begins = protected && self.rng.u32(..400) == 0;
        let length = Duration::from_millis(self.rng.u64(100..2000));
        let now = self.now;
        let life = self.sides[at].as_mut().and_then(|s| s.life.as_mut()).expect("it runs");
        life.idle = match life.idle {
            None if begins => Some((now, now + length)),
            idle => idle.filter(|(_, until)| protected && now < *until),
        };
        let quiet = life.idle.is_some_and(|(since, _)| now - since >= QUIET);
        if quiet != std::mem::replace(&mut life.quiet, quiet) {
            let actions = life.core.handle(now, primary::Input::Quiet(quiet));
            assert!(actions.is_empty(), "{actions:?}");
            self.seen.rests += u64::from(life.core.pace() == Pace::Rests);
        }
    }

    /// Both ends of a connection say that they live, seldom while they rest.
    fn beat(&mut self, at: usize) {
        let side = self.sides[at].as_ref().expect("it lives");
        let pace = match &side.life {
            Some(life) => life.core.pace(),
            None => side.backup.pace(),
        };
        let times = detector::Config::default();
        let rests = pace == Pace::Rests && self.now - side.restless >= times.notice();
        let pause = if rests { times.rest } else { times.interval };
        if self.now < side.beaten + pause {
            return;
        }
        let side = self.sides[at].as_mut().expect("it lives");
        side.beaten = self.now;
        if pace != Pace::Rests {
            side.restless = self.now;
        }
        for c in 0..self.connections.len() {
            let connection = &self.connections[c];
            if !connection.alive || connection.link.is_none() || self.cut || self.chance(10) {
                continue;
            }
            for _ in 0..if self.chance(20) { 2 } else { 1 } {
                let when = self.delay();
                self.beats.push((when, 1 - at, c, pace));
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
                    return self.stay_protected();
                }
            }
            if round < 3 {
                self.crash(round % 2);
            }
        }
        panic!("not protected in fair weather: {:#?}", self.sides);
    }

    /// In fair weather nobody is suspected, whether he works or rests.
    fn stay_protected(&mut self) {
        // What the weather has left on its way is over by then.
        for _ in 0..SETTLES {
            self.step();
        }
        self.fair = true;
        for _ in 0..WATCHED {
            self.step();
        }
    }
}
