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
//! The threshold is the timeout, and more for a peer that was late and lived: twice its longest
//! pause of the last [`MEMORY`], up to [`Config::most`].
//!
//! A heart may go on beating when the rest is dead. So a pulse tells how far the peer's work is
//! ([`Marks`]); marks that stand still for [`Config::stall`] make it suspect, and further pulses do
//! not take that back before a mark has moved.

use std::time::Duration;

/// How long a pause of a peer that lived is remembered, at least.
pub const MEMORY: Duration = Duration::from_secs(10);

/// How many times longer work may stand still that was announced to be long.
const LONG: u32 = 10;

/// Times of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Pause between the peer's signs of life.
    pub interval: Duration,
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
    /// A sign of life every 10 ms, suspicion after 90 ms, whatever happens.
    fn default() -> Self {
        let timeout = Duration::from_millis(90);
        Self {
            interval: Duration::from_millis(10),
            timeout,
            most: timeout,
            first: timeout,
            stall: Duration::from_secs(3),
        }
    }
}

impl Config {
    /// Pause after which the detector wants to be called again.
    fn beat(&self) -> Duration {
        self.interval.min(self.timeout / 4)
    }
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
    /// The longest pauses, of this window of time and the one before.
    pauses: (Duration, Duration),
    window: Duration,
}

impl Detector {
    /// Starts to watch: the peer is alive now.
    pub fn new(config: Config, now: Duration) -> Self {
        Self {
            config,
            last_life: now,
            last_call: now,
            listened: Duration::ZERO,
            suspected: false,
            pulsed: false,
            least: Duration::ZERO,
            work: Still::default(),
            runtime: Still::default(),
            long: false,
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
        alive
    }

    /// Looks at the time. Gives a suspicion once; a sign of life takes it back.
    pub fn tick(&mut self, now: Duration) -> Option<Suspicion> {
        self.pass(now);
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
        (!self.suspected).then_some(self.last_call + left.min(self.config.beat()))
    }

    /// How long the peer has been silent.
    pub fn silence(&self, now: Duration) -> Duration {
        now.saturating_sub(self.last_life)
    }

    /// The silence that makes the peer suspect now.
    pub fn threshold(&self) -> Duration {
        let Config { timeout, most, first, .. } = self.config;
        let usual = if self.pulsed {
            (self.pauses.0.max(self.pauses.1) * 2).clamp(timeout, most.max(timeout))
        } else {
            first.max(timeout)
        };
        usual.max(self.least)
    }

    /// Whether the peer is suspected.
    pub fn is_suspected(&self) -> bool {
        self.suspected
    }

    fn pass(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.last_call).min(self.config.beat() * 2);
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
        self.pauses.0 = self.pauses.0.max(self.listened);
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
        while let Some(at) = d.next_deadline().filter(|at| *at <= until) {
            if let Some(s) = d.tick(at) {
                return Some((at, s));
            }
        }
        None
    }

    /// A pulse every 2 ms, 25 ms of silence, at most 100.
    fn pulses() -> Config {
        let (interval, timeout) = (ms(2), ms(25));
        Config { interval, timeout, most: ms(100), first: ms(500), stall: ms(1000) }
    }

    fn marks(n: u64) -> Marks {
        Marks { work: n, runtime: n, long: false }
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
        assert_eq!(beat(&mut d, 0, 100, marks), None);
        assert_eq!(d.threshold(), ms(25), "one that is in time");
        assert_eq!(run(&mut d, ms(118)), None);
        d.pulse(ms(118), marks(118));
        assert_eq!(d.threshold(), ms(40), "twice its pause of 20 ms");
        // Each time as late as it may be.
        for at in [156, 230] {
            assert_eq!(run(&mut d, ms(at)), None);
            d.pulse(ms(at), marks(at));
        }
        assert_eq!(d.threshold(), ms(100), "the most");
        assert_eq!(beat(&mut d, 232, 30_000, marks), None);
        assert_eq!(d.threshold(), ms(25), "that was long ago");
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
        let long = |at| Marks { work: 7, runtime: at, long: true };
        assert_eq!(beat(&mut d, 0, 9_000, long), None);
        assert_eq!(beat(&mut d, 9_000, 20_000, long).unwrap().0, ms(10_000));
        let mut d = Detector::new(pulses(), ms(0));
        let hung = |at| Marks { work: at, runtime: 7, long: true };
        assert_eq!(beat(&mut d, 0, 20_000, hung).unwrap().0, ms(1000));
    }
}
