//! The failure detector: silence becomes suspicion, and so does work that stands still.
//!
//! Every message counts as life; pulses ([`crate::transport::pulse`]) fill the pauses. Only silence
//! that this side listened to counts: a process that was starved (stopped, swapped out, out of CPU,
//! or its whole machine paused) finds a long gap in its own time that says nothing about its peer,
//! and what the peer said meanwhile may still wait to be read. So the detector asks to be called
//! several times per timeout, and each call adds the time since the call before, but at most twice
//! the pause it had asked for. A host that is always slow notices a death later, by the share of the
//! time that it runs; it never fails to notice one.
//!
//! The threshold is the timeout, and more for a peer that was late and lived: three times its longest
//! pause of the last [`MEMORY`], up to [`Config::most`]; five times while it is known for less than
//! [`YOUNG`], in which the longest pause to be expected may not have come yet.
//!
//! A heart may go on beating when the rest is dead. So a pulse tells how far the peer's work is
//! ([`Marks`]); marks that stand still for [`Config::stall`] make it suspect, and further pulses do
//! not take that back before a mark has moved.
//!
//! Where nothing happens, wakes are the cost. So a pulse also says how those after it come
//! ([`Pace`]): from one that rests they come every [`Config::rest`] only, and three of these pauses
//! are its time-out, until a pulse says otherwise. It says so for as long before it does so
//! ([`Config::notice`]): who heard none of that would suspect it anyhow. Who rests himself asks to be called
//! as seldom.
//! With so few pulses a lost one is a large part of a time-out, so after one and a half pauses of silence this
//! side is in doubt: it does not rest, and its pulses say so, which the peer reads with its next one if it lives.

use std::time::Duration;

/// How long a pause of a peer that lived is remembered, at least.
pub const MEMORY: Duration = Duration::from_secs(10);

/// For how long the pauses of a connection are few.
pub const YOUNG: Duration = Duration::from_secs(3);

/// The threshold in longest pauses: of a peer that is known, and of one that hardly is.
const LATE: u32 = 3;
const LATE_AT_FIRST: u32 = 5;

/// How many times longer work may stand still that was announced to be long.
const LONG: u32 = 10;

/// Pauses of a peer that rests without a sign of life that make it suspect.
const PAUSES: u32 = 3;

/// Half pauses after which it is asked to speak up: before its next pulse is due, which is then followed by others
/// at once.
const DOUBT: u32 = 3;

/// How many times more seldom the pulses of a peer that rests are, at most.
const SELDOM: u32 = 17;

/// Times of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Pause between the peer's signs of life.
    pub interval: Duration,
    /// The same of a peer that rests; a third of `most`, or less.
    pub rest: Duration,
    /// Silence that makes a peer suspect; at least three intervals are sensible.
    pub timeout: Duration,
    /// The threshold grows up to this with a peer that is often late. As `timeout`: it is fixed.
    pub most: Duration,
    /// The threshold until the first pulse of a connection.
    pub first: Duration,
    /// A peer whose pulses come, but whose work has stood still for so long, is suspect.
    pub stall: Duration,
}

impl Default for Config {
    /// A sign of life every 10 ms, or 30 while it rests, suspicion after 90 ms, whatever happens.
    fn default() -> Self {
        let timeout = Duration::from_millis(90);
        Self {
            interval: Duration::from_millis(10),
            rest: timeout / PAUSES,
            timeout,
            most: timeout,
            first: timeout,
            stall: Duration::from_secs(3),
        }
    }
}

impl Config {
    /// The pause between pulses of a side that rests.
    pub fn rest_of(interval: Duration, most: Duration) -> Duration {
        (interval * SELDOM).min(most / PAUSES).max(interval)
    }

    /// For how long a side says that it rests before its pulses come more seldom.
    pub fn notice(&self) -> Duration {
        self.rest * PAUSES
    }

    /// Pause after which the detector wants to be called again.
    fn beat(&self) -> Duration {
        self.interval.min(self.timeout / 4)
    }
}

/// How a side's pulses come after one that says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// Every [`Config::interval`].
    #[default]
    Usual,
    /// Nobody waits for anything here: every [`Config::rest`], after [`Config::notice`].
    Rests,
    /// As usual; and the peer, which rests, is late: it is to speak up.
    Doubts,
}

/// How far a peer's work is. Numbers mean nothing but that they change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Changes with every turn of the loop that takes or applies checkpoints.
    pub work: u64,
    /// Changes while its runtime (connections, timers) runs.
    pub runtime: u64,
    /// The work may stand still for long: a full copy is made.
    pub long: bool,
    /// How the next pulses come.
    pub pace: Pace,
}

/// A peer was silent for too long, or does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// How long ago the peer was last heard, the time included that this side did not run.
    pub silence: Duration,
    /// Its pulses come, but its work stands still.
    pub stalled: bool,
}

/// A mark and how long it has stood still.
#[derive(Clone, Copy, Debug, Default)]
struct Still {
    mark: u64,
    listened: Duration,
}

impl Still {
    fn see(&mut self, mark: u64) {
        if mark != self.mark {
            *self = Self { mark, listened: Duration::ZERO };
        }
    }
}

/// Watches one peer.
#[derive(Clone, Debug)]
pub struct Detector {
    config: Config,
    /// When this connection began.
    since: Duration,
    last_life: Duration,
    last_call: Duration,
    /// Silence that was listened to; starts again with each sign of life.
    listened: Duration,
    suspected: bool,
    /// Pulses come.
    pulsed: bool,
    /// The threshold is never less.
    least: Duration,
    work: Still,
    runtime: Still,
    long: bool,
    /// The peer's last pulse said that it rests.
    peer_rests: bool,
    /// This side rests, unless it is in doubt.
    rests: bool,
    /// The pause until the next call that was asked for in the last one.
    asked: Duration,
    /// The longest pauses, of this window of time and the one before.
    pauses: (Duration, Duration),
    window: Duration,
}

impl Detector {
    /// Starts to watch: the peer is alive now.
    pub fn new(config: Config, now: Duration) -> Self {
        Self {
            config,
            since: now,
            last_life: now,
            last_call: now,
            listened: Duration::ZERO,
            suspected: false,
            pulsed: false,
            least: Duration::ZERO,
            work: Still::default(),
            runtime: Still::default(),
            long: false,
            peer_rests: false,
            rests: false,
            asked: config.beat(),
            pauses: (Duration::ZERO, Duration::ZERO),
            window: now,
        }
    }

    /// A new connection: the peer is alive now, and its pulses are yet to come.
    pub fn connected(&mut self, now: Duration) {
        let (pauses, window) = (self.pauses, self.window);
        *self = Self { pauses, window, ..Self::new(self.config, now) };
    }

    /// From now on, and until the next connection, silence is not suspect that is shorter than this.
    pub fn be_patient(&mut self, least: Duration) {
        self.least = least;
    }

    /// The peer was heard. Whether it counts as alive: one that stalls does not.
    pub fn life(&mut self, now: Duration) -> bool {
        self.pass(now);
        let stalled = self.is_stalled();
        if self.pulsed {
            self.remember(now);
        }
        self.last_life = now;
        self.listened = Duration::ZERO;
        self.suspected &= stalled;
        self.asked = self.pause();
        !stalled
    }

    /// A pulse of the peer came. Whether it counts as alive.
    pub fn pulse(&mut self, now: Duration, marks: Marks) -> bool {
        if self.pulsed {
            self.work.see(marks.work);
            self.runtime.see(marks.runtime);
        } else {
            self.work = Still { mark: marks.work, listened: Duration::ZERO };
            self.runtime = Still { mark: marks.runtime, listened: Duration::ZERO };
        }
        self.long = marks.long;
        let alive = self.life(now);
        self.pulsed = true;
        self.peer_rests = marks.pace == Pace::Rests;
        self.asked = self.pause();
        alive
    }

    /// Whether this side rests: then it is called as seldom as its own pulses leave.
    pub fn rest(&mut self, rests: bool) {
        self.rests = rests;
    }

    /// Whether the peer's pulses come, and say that it rests.
    pub fn peer_rests(&self) -> bool {
        self.pulsed && self.peer_rests
    }

    /// Whether the peer is to speak up: it rests and is late, or its pulses do not come.
    pub fn doubts(&self) -> bool {
        !self.pulsed || self.peer_rests && self.listened >= self.config.rest * DOUBT / 2
    }

    /// Looks at the time. Gives a suspicion once; a sign of life takes it back.
    pub fn tick(&mut self, now: Duration) -> Option<Suspicion> {
        self.pass(now);
        self.asked = self.pause();
        let stalled = self.is_stalled();
        if self.suspected || !(stalled || self.listened >= self.threshold()) {
            return None;
        }
        self.suspected = true;
        Some(Suspicion { silence: self.silence(now), stalled })
    }

    /// When to call [`Detector::tick`] again; `None` once the peer is suspected. It is asked for
    /// more often than silence alone would need, because that is how starvation shows.
    pub fn next_deadline(&self) -> Option<Duration> {
        let left = self.threshold().saturating_sub(self.listened);
        (!self.suspected).then_some(self.last_call + left.min(self.pause()))
    }

    /// Pause after which it wants to be called again.
    fn pause(&self) -> Duration {
        if self.rests && !(self.peer_rests && self.doubts()) {
            self.config.rest
        } else {
            self.config.beat()
        }
    }

    /// How long the peer has been silent.
    pub fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.last_life)
    }

    /// The silence that makes the peer suspect now.
    pub fn threshold(&self) -> Duration {
        let Config { timeout, most, first, .. } = self.config;
        let usual = if self.pulsed {
            let known = self.last_call.saturating_sub(self.since) >= YOUNG;
            let times = if known { LATE } else { LATE_AT_FIRST };
            (self.pauses.0.max(self.pauses.1) * times).clamp(timeout, most.max(timeout))
        } else {
            first.max(timeout)
        };
        let rests = match self.peer_rests() {
            true => (self.config.rest * PAUSES).min(most),
            false => Duration::ZERO,
        };
        usual.max(rests).max(self.least)
    }

    /// Whether the peer is suspected.
    pub fn is_suspected(&self) -> bool {
        self.suspected
    }

    fn pass(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.last_call).min(self.asked * 2);
        self.last_call = self.last_call.max(now);
        self.listened += passed;
        self.work.listened += passed;
        self.runtime.listened += passed;
    }

    fn is_stalled(&self) -> bool {
        let stall = self.config.stall;
        let work = if self.long { stall * LONG } else { stall };
        self.pulsed && (self.work.listened >= work || self.runtime.listened >= stall)
    }

    fn remember(&mut self, now: Duration) {
        if now.saturating_sub(self.window) >= MEMORY {
            self.pauses = (Duration::ZERO, self.pauses.0);
            self.window = now;
        }
        // Of a pause that was announced, or that this side slept through, only the excess was late.
        let rests = self.peer_rests || self.rests;
        let meant = if rests { self.config.rest } else { Duration::ZERO };
        self.pauses.0 = self.pauses.0.max(self.listened.saturating_sub(meant));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Calls as often as asked until `until`; gives the first suspicion and its time.
    fn run(d: &mut Detector, until: Duration) -> Option<(Duration, Suspicion)> {
        let mut before = None;
        while let Some(at) = d.next_deadline().filter(|at| *at <= until) {
            assert!(before.replace(at) < Some(at), "it was called at {at:?} for nothing");
            if let Some(s) = d.tick(at) {
                return Some((at, s));
            }
        }
        None
    }

    /// A pulse every 2 ms, 25 ms of silence, at most 99.
    fn pulses() -> Config {
        let (interval, timeout) = (ms(2), ms(25));
        let (most, first, stall) = (ms(99), ms(500), ms(1000));
        Config { interval, rest: Config::rest_of(interval, most), timeout, most, first, stall }
    }

    fn marks(n: u64) -> Marks {
        Marks { work: n, runtime: n, ..Marks::default() }
    }

    /// Pulses with the marks that `of` gives, every 2 ms; the first suspicion and its time.
    fn beat(
        d: &mut Detector,
        from: u64,
        until: u64,
        of: impl Fn(u64) -> Marks,
    ) -> Option<(Duration, Suspicion)> {
        for at in (from..until).step_by(2) {
            d.pulse(ms(at), of(at));
            if let Some(s) = d.tick(ms(at)) {
                return Some((ms(at), s));
            }
        }
        None
    }

    #[test]
    fn silence_is_suspected_once_and_life_takes_it_back() {
        let mut d = Detector::new(Config::default(), ms(0));
        assert_eq!(run(&mut d, ms(80)), None);
        d.life(ms(80));
        let (at, s) = run(&mut d, ms(1000)).unwrap();
        assert_eq!((at, s.silence), (ms(170), ms(90)));
        assert!(d.is_suspected());
        assert_eq!((d.next_deadline(), d.tick(ms(300))), (None, None));
        d.life(ms(400));
        assert_eq!(run(&mut d, ms(1000)).unwrap().0, ms(490));
    }

    #[test]
    fn a_pause_of_this_side_is_no_silence_of_the_peer() {
        let mut d = Detector::new(Config::default(), ms(0));
        assert_eq!(run(&mut d, ms(20)), None);
        assert_eq!(d.tick(ms(520)), None, "it was us who slept");
        let (at, s) = run(&mut d, ms(2000)).unwrap();
        assert_eq!((at, s.silence), (ms(570), ms(570)), "20 ms before, 20 for the pause, 50 after");
    }

    #[test]
    fn a_side_that_is_always_slow_notices_a_death_too() {
        let mut d = Detector::new(Config::default(), ms(0));
        let calls = (1..).find(|i| d.tick(ms(i * 200)).is_some()).unwrap();
        assert_eq!(calls, 5, "90 ms of silence by at most 20 a call");
    }

    #[test]
    fn a_peer_without_pulses_is_given_more_time() {
        let mut d = Detector::new(pulses(), ms(0));
        assert_eq!(run(&mut d, ms(499)), None);
        d.pulse(ms(499), marks(1));
        let (at, s) = run(&mut d, ms(2000)).unwrap();
        assert_eq!((at, s.silence, s.stalled), (ms(524), ms(25), false));
        d.connected(ms(600));
        assert_eq!(run(&mut d, ms(2000)).unwrap().0, ms(1100), "a new connection begins anew");
    }

    #[test]
    fn a_peer_that_is_often_late_is_waited_for_longer_and_not_for_ever() {
        let mut d = Detector::new(pulses(), ms(0));
        assert_eq!(beat(&mut d, 0, 3100, marks), None);
        assert_eq!(d.threshold(), ms(25), "one that is in time");
        assert_eq!(run(&mut d, ms(3118)), None);
        d.pulse(ms(3118), marks(3118));
        assert_eq!(d.threshold(), ms(60), "three times its pause of 20 ms");
        // As late as it may be.
        assert_eq!(run(&mut d, ms(3176)), None);
        d.pulse(ms(3176), marks(3176));
        assert_eq!(d.threshold(), ms(99), "the most");
        assert_eq!(beat(&mut d, 3178, 33_000, marks), None);
        assert_eq!(d.threshold(), ms(25), "that was long ago");
    }

    #[test]
    fn a_peer_that_is_hardly_known_is_waited_for_longer_if_it_is_late_at_all() {
        let mut d = Detector::new(pulses(), ms(0));
        assert_eq!(beat(&mut d, 0, 100, marks), None);
        assert_eq!(d.threshold(), ms(25), "one that is in time");
        assert_eq!(run(&mut d, ms(106)), None);
        d.pulse(ms(108), marks(108));
        assert_eq!(d.threshold(), ms(50), "five times its pause of 10 ms");
        assert_eq!(beat(&mut d, 110, 3100, marks), None);
        assert_eq!(d.threshold(), ms(30), "three times");
    }

    #[test]
    fn a_heart_that_beats_without_a_head_is_suspect() {
        let mut d = Detector::new(pulses(), ms(0));
        assert_eq!(beat(&mut d, 0, 5000, marks), None);
        let hung = |at| Marks { work: 7, ..marks(at) };
        let (at, s) = beat(&mut d, 5000, 20_000, hung).unwrap();
        assert_eq!((at, s.stalled), (ms(5998), true), "a second after the last step");
        assert!(!d.pulse(ms(6002), hung(6002)), "it is not alive for a further pulse");
        assert!(d.is_suspected());
        assert!(d.pulse(ms(6004), marks(6004)), "but when its work goes on");
        assert!(!d.is_suspected());
    }

    #[test]
    fn a_runtime_that_hangs_is_suspect_and_long_work_is_not() {
        let mut d = Detector::new(pulses(), ms(0));
        let long = |at| Marks { work: 7, long: true, ..marks(at) };
        assert_eq!(beat(&mut d, 0, 9_000, long), None);
        assert_eq!(beat(&mut d, 9_000, 20_000, long).unwrap().0, ms(10_000));
        let mut d = Detector::new(pulses(), ms(0));
        let hung = |at| Marks { runtime: 7, long: true, ..marks(at) };
        assert_eq!(beat(&mut d, 0, 20_000, hung).unwrap().0, ms(1000));
    }

    fn resting(n: u64) -> Marks {
        Marks { pace: Pace::Rests, ..marks(n) }
    }

    /// Both rest from `from` on, until the last pulse, at `until`.
    fn rest(d: &mut Detector, from: u64, until: u64) {
        for at in (from..=until).step_by(33) {
            d.pulse(ms(at), resting(at));
            d.rest(true);
            assert_eq!(d.tick(ms(at)), None);
            assert_eq!((d.threshold(), d.doubts()), (ms(99), false), "{at} ms");
            assert_eq!(d.next_deadline(), Some(ms(at + 33)), "asked for as seldom");
        }
    }

    #[test]
    fn a_peer_that_rests_is_waited_for_longer_until_it_says_otherwise() {
        let mut d = Detector::new(pulses(), ms(0));
        assert_eq!(beat(&mut d, 0, 100, marks), None);
        rest(&mut d, 99, 29_997);
        let (at, s) = run(&mut d.clone(), ms(60_000)).unwrap();
        assert_eq!((at, s.silence), (ms(30_096), ms(99)));
        d.pulse(ms(30_005), marks(30_005));
        d.rest(false);
        assert_eq!(d.threshold(), ms(25), "its pauses were meant, and are no lateness");
        assert_eq!(run(&mut d, ms(60_000)).unwrap().0, ms(30_030));
    }

    #[test]
    fn a_time_out_that_is_fixed_is_that_of_rest_as_well() {
        let timeout = ms(25);
        let rest = Config::rest_of(ms(2), timeout);
        assert_eq!(rest, timeout / 3, "so its pauses are shorter");
        let mut d = Detector::new(Config { rest, most: timeout, ..pulses() }, ms(0));
        for at in [2, 10] {
            d.pulse(ms(at), resting(at));
            d.rest(true);
        }
        assert_eq!(run(&mut d, ms(1000)).unwrap().0, ms(35));
        assert_eq!(Config::rest_of(ms(2), ms(4)), ms(2), "nor are they shorter than others");
    }

    #[test]
    fn who_rests_and_is_starved_suspects_nobody_and_is_in_doubt() {
        let mut d = Detector::new(pulses(), ms(0));
        rest(&mut d, 0, 99);
        assert_eq!(d.tick(ms(600)), None, "it was us who slept");
        assert!(d.doubts());
        assert_eq!(d.next_deadline(), Some(ms(602)), "and we do not go on to");
        let (at, s) = run(&mut d, ms(2000)).unwrap();
        assert_eq!((at, s.silence), (ms(633), ms(534)), "66 ms for the pause, 33 after");
        // One that is always slow notices a death, too.
        let mut d = Detector::new(pulses(), ms(0));
        rest(&mut d, 0, 99);
        assert!((1..20).any(|i| d.tick(ms(100 + i * 200)).is_some()));
    }

    /// Pulses of a host that rests and of the one that watches it, half an hour, of five of which one
    /// is lost. How often the watcher was wrong. Where it may not doubt, it is silent instead.
    fn wrong_with_losses(doubts: bool) -> u32 {
        let mut rng = fastrand::Rng::with_seed(60);
        let mut d = Detector::new(pulses(), ms(0));
        let (mut sends_at, mut answers_at) = (0, 0);
        let (mut on_its_way, mut told, mut usual) = (None, Pace::Usual, 0);
        let mut wrong = 0;
        for at in 0..1_800_000 {
            if at >= sends_at {
                let pace = if told == Pace::Doubts { Pace::Usual } else { Pace::Rests };
                on_its_way = (rng.u8(..5) > 0).then_some(pace);
                usual = if pace == Pace::Usual { at } else { usual };
                sends_at = at + if ms(at - usual) >= pulses().notice() { 33 } else { 2 };
            }
            let heard = on_its_way.take();
            if let Some(pace) = heard {
                d.pulse(ms(at), Marks { pace, ..marks(at) });
            }
            if heard.is_some() || at >= answers_at {
                wrong += u32::from(d.tick(ms(at)).is_some());
                let rests = d.peer_rests() && !d.doubts();
                d.rest(rests);
                answers_at = at + if rests { 50 } else { 2 };
                if rng.u8(..5) > 0 {
                    told = if d.doubts() && doubts { Pace::Doubts } else { Pace::Rests };
                }
            }
        }
        wrong
    }

    #[test]
    fn lost_pulses_make_a_peer_that_rests_speak_up() {
        assert!(wrong_with_losses(false) > 5, "three lost in a row are a death");
        assert_eq!(wrong_with_losses(true), 0);
    }
}
