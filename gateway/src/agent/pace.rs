//! When the next stop begins: a core without I/O or clock.
//!
//! ```text
//!  last stop        min                          budget                max
//!     |--------------|-----------------------------|---------------------|
//!      no stop        output waits, gathered, and   output waits          anything was done
//!                     the container idles enough
//! ```
//! Output ends an epoch, because clients wait for it. It is given a moment to gather: while more
//! keeps coming, the container is still answering. What holds stops back is their cost, the time
//! that the container stands still and its first writes to protected pages: at most a share of the
//! time since the last stop, plus whatever the container slept of it. A container that waits for
//! its clients loses nothing by a stop, so that these get their answers at once; one that computes
//! all the time is left alone until the stop has become cheap enough. Without output there is no
//! hurry: the longest epoch ends one only if enough was done for it to be worth repeating after a
//! failover, so that an idle container has no epochs at all.
//!
//! All times are on one clock of the caller's.

use std::time::Duration;

/// First write to a page after it was protected, as the container feels it.
const FAULT: Duration = Duration::from_nanos(850);
/// Most time that output gathers, in units of [`Rates::gather`].
const GATHERINGS: u32 = 8;
/// Weight of the newest cost in the average: one in so many.
const MEMORY: u32 = 4;
/// A look at least so often while the budget is used up.
const GLANCE: Duration = Duration::from_micros(500);
/// The part of the longest epoch that the container must have computed for an epoch without
/// output.
const WORTH: u32 = 20;

/// How often to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    /// No epoch is shorter.
    pub(super) min: Duration,
    /// Output never waits longer than this for its stop.
    pub(super) max: Duration,
    /// The part of a busy container's time that stops may cost, from 0 to 1; 0 for no limit.
    pub(super) share: f64,
    /// How long output must have been quiet.
    pub(super) gather: Duration,
}

impl Rates {
    /// For a container that is not protected.
    pub(super) fn never() -> Self {
        Self { min: Duration::MAX, max: Duration::MAX, share: 0.0, gather: Duration::ZERO }
    }
}

/// What the stop thread sees.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Look {
    /// Now.
    pub(super) now: Duration,
    /// A backup waits for its first copy.
    pub(super) awaited: bool,
    /// The backup holds a copy that it could take over with, and nothing waits for the next stop.
    pub(super) settled: bool,
    /// Frames of output that wait for the stop.
    pub(super) output: usize,
    /// Processor time that the container has used so far, in all.
    pub(super) used: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Stop the container.
    Stop,
    /// Look again after this time, or as soon as output waits.
    OnOutput(Duration),
    /// Look again after this time.
    After(Duration),
}

/// Decides when to stop.
#[derive(Clone, Debug)]
pub(super) struct Pacer {
    rates: Rates,
    /// End of the last stop, and the processor time used until then.
    last: (Duration, Duration),
    /// What a stop costs, on average.
    cost: Duration,
    /// Output that waits: since when, frames at the last change, and when that was.
    waiting: Option<(Duration, usize, Duration)>,
}

impl Pacer {
    /// A pacer whose container has just been stopped, in a way.
    pub(super) fn new(rates: Rates, now: Duration) -> Self {
        Self { rates, last: (now, Duration::ZERO), cost: Duration::ZERO, waiting: None }
    }

    /// The container has been stopped for `stop` and goes on; `pages` were written in the epoch.
    pub(super) fn stopped(&mut self, now: Duration, used: Duration, stop: Duration, pages: usize) {
        let cost = stop + FAULT * pages as u32;
        self.cost = match self.cost {
            Duration::ZERO => cost,
            before => before - before / MEMORY + cost / MEMORY,
        };
        (self.last, self.waiting) = ((now, used), None);
    }

    /// A stop was taken back; the next is tried after `pause`, whatever it costs.
    pub(super) fn taken_back(&mut self, now: Duration, pause: Duration) {
        let again = (now + pause).saturating_sub(self.rates.min);
        self.last.0 = again;
    }

    /// Time since the last stop.
    pub(super) fn since(&self, now: Duration) -> Duration {
        now.saturating_sub(self.last.0)
    }

    /// What to do now.
    pub(super) fn look(&mut self, look: Look) -> Next {
        let Rates { min, max, gather, .. } = self.rates;
        let since = self.since(look.now);
        if since < min {
            return Next::After(min - since);
        }
        if look.awaited {
            return Next::Stop;
        }
        let busy = look.used.saturating_sub(self.last.1);
        let frames = look.output;
        if frames == 0 {
            self.waiting = None;
            let worth = !look.settled || busy >= max / WORTH;
            return match since >= max && worth {
                true => Next::Stop,
                false => Next::OnOutput(if since < max { max - since } else { max }),
            };
        }
        if since >= max {
            return Next::Stop;
        }
        let (begun, before, changed) = *self.waiting.get_or_insert((look.now, frames, look.now));
        let changed = if before == frames { changed } else { look.now };
        self.waiting = Some((begun, frames, changed));
        let quiet = look.now - changed;
        if quiet < gather && look.now - begun < gather * GATHERINGS {
            return Next::After((gather - quiet).min(max - since));
        }
        let short = self.short_of_budget(since, busy);
        if short.is_zero() { Next::Stop } else { Next::After(short.min(GLANCE).min(max - since)) }
    }

    /// How much of its cost a stop could not justify now.
    fn short_of_budget(&self, since: Duration, busy: Duration) -> Duration {
        if self.rates.share <= 0.0 {
            return Duration::ZERO;
        }
        let slept = since.saturating_sub(busy);
        self.cost.saturating_sub(slept + since.mul_f64(self.rates.share))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATES: Rates = Rates { min: us(500), max: us(30_000), share: 0.1, gather: us(100) };

    const fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    /// Looks as often as asked; `output` and `used` tell of a time what is so then. Gives when it
    /// stops.
    fn run(
        pacer: &mut Pacer,
        from: Duration,
        output: impl Fn(Duration) -> usize,
        used: impl Fn(Duration) -> Duration,
    ) -> Duration {
        let mut now = from;
        for _ in 0..10_000 {
            let (output, used) = (output(now), used(now));
            let look = Look { now, output, used, settled: true, awaited: false };
            now += match pacer.look(look) {
                Next::Stop => return now,
                Next::After(pause) => pause.max(us(1)),
                // Output wakes it.
                Next::OnOutput(pause) => pause.min(us(10)),
            };
        }
        panic!("it never stops");
    }

    fn pacer(cost: Duration) -> Pacer {
        let mut pacer = Pacer::new(RATES, us(0));
        pacer.stopped(us(0), us(0), cost, 0);
        pacer
    }

    #[test]
    fn who_sleeps_is_stopped_as_soon_as_its_output_is_quiet() {
        let output = |now| usize::from(now >= us(700)) + usize::from(now >= us(760));
        let at = run(&mut pacer(us(300)), us(0), output, |_| us(50));
        assert!((us(800)..us(1000)).contains(&at), "{at:?}: after the second frame");
        let at = run(&mut pacer(us(300)), us(0), |_| 1, |_| us(50));
        assert!((us(600)..us(700)).contains(&at), "{at:?}: not before the shortest epoch");
    }

    #[test]
    fn who_computes_pays_a_tenth_and_no_more() {
        let at = run(&mut pacer(us(300)), us(0), |_| 1, |now| now);
        assert!((us(3000)..us(3600)).contains(&at), "{at:?}");
        let at = run(&mut pacer(us(5000)), us(0), |_| 1, |now| now * 2);
        assert_eq!(at, us(30_000), "output waits no longer than this");
        let mut free = pacer(us(5000));
        free.rates.share = 0.0;
        assert!(run(&mut free, us(0), |_| 1, |now| now) < us(700), "no limit");
    }

    #[test]
    fn output_that_never_ends_is_not_gathered_for_ever() {
        let frames = |now: Duration| now.as_micros() as usize;
        let at = run(&mut pacer(us(10)), us(0), frames, |_| us(0));
        assert!((us(1200)..us(1500)).contains(&at), "{at:?}");
    }

    #[test]
    fn an_idle_container_has_no_epochs() {
        let mut p = pacer(us(300));
        for ms in 1..1400 {
            let look = Look { now: us(ms * 1000), used: us(ms), settled: true, ..Look::default() };
            assert_ne!(p.look(look), Next::Stop, "{ms} ms: 0.1 % of a processor");
        }
        let now = us(1_400_000);
        let awaited = Look { now, settled: true, awaited: true, ..Look::default() };
        assert_eq!(p.look(awaited), Next::Stop, "but a new backup gets its copy");
        let catching_up = Look { now, settled: false, ..Look::default() };
        assert_eq!(p.look(catching_up), Next::Stop, "and what is missing since");
        let at = run(&mut pacer(us(300)), us(0), |_| 0, |now| now / 2);
        assert_eq!(at, us(30_000), "without output, but at work");
    }

    #[test]
    fn a_stop_that_was_taken_back_is_tried_again_soon() {
        let mut p = pacer(us(300));
        p.taken_back(us(10_000), us(1000));
        assert_eq!(run(&mut p, us(10_000), |_| 0, |now| now), us(10_000 + 1000 + 29_500));
        p.taken_back(us(10_000), us(1000));
        let at = run(&mut p, us(10_000), |_| 1, |_| us(0));
        assert!((us(11_000)..us(11_300)).contains(&at), "{at:?}");
    }

    #[test]
    fn equal_limits_make_a_fixed_interval() {
        let mut p = pacer(us(300));
        p.rates.min = p.rates.max;
        assert_eq!(run(&mut p, us(0), |_| 1, |_| us(0)), us(30_000));
    }

    #[test]
    fn the_average_follows_what_stops_cost() {
        let mut p = pacer(us(300));
        for _ in 0..20 {
            p.stopped(us(0), us(0), us(1000), 1000);
        }
        assert!((us(1800)..us(1900)).contains(&p.cost), "{:?}: the faults count", p.cost);
    }
}
