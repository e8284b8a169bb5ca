//! The failure detector: silence becomes suspicion.
//!
//! Every message counts as life, heartbeats only fill the pauses. Silence is measured by a clock
//! that also runs while this process does not: a process that was starved (stopped, swapped out,
//! out of CPU) finds a long silence that says nothing about its peer. So when the detector was
//! not called for more than half its timeout, although it asked to be called much sooner, it
//! grants the peer one more heartbeat interval to be heard. It does so a bounded number of times
//! in a row, so that a host that is always slow still notices a death.

use std::time::Duration;

/// Grants in a row without a sign of life in between.
pub const MAX_GRANTS: u32 = 3;

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

/// A peer was silent for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// For how long nothing was heard.
    pub silence: Duration,
}

/// Watches one peer.
#[derive(Clone, Debug)]
pub struct Detector {
    config: Config,
    last_life: Duration,
    last_call: Duration,
    deadline: Duration,
    grants: u32,
    suspected: bool,
}

impl Detector {
    /// Starts to watch: the peer is alive now.
    pub fn new(config: Config, now: Duration) -> Self {
        Self {
            config,
            last_life: now,
            last_call: now,
            deadline: now + config.timeout,
            grants: 0,
            suspected: false,
        }
    }

    /// The peer was heard.
    pub fn life(&mut self, now: Duration) {
        self.last_life = now;
        self.last_call = now;
        self.deadline = now + self.config.timeout;
        self.grants = 0;
        self.suspected = false;
    }

    /// Looks at the time. Gives a suspicion once; a sign of life takes it back.
    pub fn tick(&mut self, now: Duration) -> Option<Suspicion> {
        let starved = now.saturating_sub(self.last_call) > self.config.timeout / 2;
        self.last_call = now;
        if starved && self.grants < MAX_GRANTS {
            self.grants += 1;
            self.deadline = self.deadline.max(now + self.config.interval);
        }
        if self.suspected || now < self.deadline {
            return None;
        }
        self.suspected = true;
        Some(Suspicion { silence: now.saturating_sub(self.last_life) })
    }

    /// When to call [`Detector::tick`] again; `None` once the peer is suspected. It is asked for
    /// more often than silence alone would need, because that is how starvation shows.
    pub fn next_deadline(&self) -> Option<Duration> {
        let beat = self.last_call + self.config.interval.min(self.config.timeout / 4);
        (!self.suspected).then_some(self.deadline.min(beat))
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
    fn a_starved_process_grants_the_peer_one_more_interval() {
        let mut d = Detector::new(Config::default(), ms(0));
        assert_eq!(d.tick(ms(500)), None, "it was us who slept");
        d.life(ms(505));
        assert!(!d.is_suspected());
        assert_eq!(d.tick(ms(700)), None);
        let (at, _) = run(&mut d, ms(2000)).unwrap();
        assert_eq!(at, ms(710), "nobody was heard in that interval");
    }

    #[test]
    fn grants_are_bounded() {
        let mut d = Detector::new(Config::default(), ms(0));
        let suspected = (1..).find(|i| d.tick(ms(i * 200)).is_some()).unwrap();
        assert_eq!(suspected, u64::from(MAX_GRANTS) + 1);
    }
}
