//! The failure detector: silence becomes suspicion.
//!
//! Every message counts as life, heartbeats only fill the pauses. Only silence that this side
//! listened to counts: a process that was starved (stopped, swapped out, out of CPU, or its whole
//! machine paused) finds a long gap in its own time that says nothing about its peer, and what the
//! peer said meanwhile may still wait to be read. So the detector asks to be called several times
//! per timeout, and each call adds the time since the call before, but at most twice the pause it
//! had asked for. A host that is always slow notices a death later, by the share of the time that
//! it runs; it never fails to notice one.

use std::time::Duration;

/// Times of a detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Pause between the peer's heartbeats.
    pub interval: Duration,
    /// Silence that makes a peer suspect; at least three intervals are sensible.
    pub timeout: Duration,
}

impl Default for Config {
    /// A heartbeat every 10 ms, suspicion after 90 ms.
    fn default() -> Self {
        Self { interval: Duration::from_millis(10), timeout: Duration::from_millis(90) }
    }
}

impl Config {
    /// Pause after which the detector wants to be called again.
    fn beat(&self) -> Duration {
        self.interval.min(self.timeout / 4)
    }
}

/// A peer was silent for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// How long ago the peer was last heard, the time included that this side did not run.
    pub silence: Duration,
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
}

impl Detector {
    /// Starts to watch: the peer is alive now.
    pub fn new(config: Config, now: Duration) -> Self {
        Self { config, last_life: now, last_call: now, listened: Duration::ZERO, suspected: false }
    }

    /// The peer was heard.
    pub fn life(&mut self, now: Duration) {
        *self = Self::new(self.config, now);
    }

    /// Looks at the time. Gives a suspicion once; a sign of life takes it back.
    pub fn tick(&mut self, now: Duration) -> Option<Suspicion> {
        let passed = now.saturating_sub(self.last_call);
        self.last_call = now;
        self.listened += passed.min(self.config.beat() * 2);
        if self.suspected || self.listened < self.config.timeout {
            return None;
        }
        self.suspected = true;
        Some(Suspicion { silence: now.saturating_sub(self.last_life) })
    }

    /// When to call [`Detector::tick`] again; `None` once the peer is suspected. It is asked for
    /// more often than silence alone would need, because that is how starvation shows.
    pub fn next_deadline(&self) -> Option<Duration> {
        let left = self.config.timeout.saturating_sub(self.listened);
        (!self.suspected).then_some(self.last_call + left.min(self.config.beat()))
    }

    /// Whether the peer is suspected.
    pub fn is_suspected(&self) -> bool {
        self.suspected
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
}
