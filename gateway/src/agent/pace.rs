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
//! failover, so that an idle container has no epochs at all. What a program does by the clock (a server
//! that looks ten times a second whether anything has expired) is saved now and then only.
//!
//! What our own threads do for an epoch takes processors from clients and from others as well, and
//! takes about as much for one answer as for fifty. So while some of those who were answered lately
//! do not wait, or output goes on and on, an epoch is long enough for its work to be at most a set
//! part of a processor. That few who wait get their answers at once, and many share an epoch.
//!
//! Pre-copy lies between the decision and the stop, and takes the longer the more was written. The
//! longest epoch is from stop to stop, so the decision comes as much earlier as pre-copy has taken
//! lately.
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
/// Pre-copy begins at most this part of the longest epoch before its end.
const LEAD: u32 = 2;
/// The part of the longest epoch that the container must have computed for an epoch without
/// output.
const WORTH: u32 = 20;
/// A container that computes less than this part of the time, and says nothing, has an epoch after so
/// long.
const LITTLE: u32 = 100;
const LULL: Duration = Duration::from_secs(10);
/// While nothing happens, it is looked at again after this part of the time that it has lasted, and
/// after this time at most.
const CALM: u32 = 8;
const CALMEST: Duration = Duration::from_millis(400);

/// The work of an epoch in units of what the stop thread and the shipper do of it: the transport,
/// and the backup, take about as much again.
const PEERS: u32 = 2;
/// The part of a processor that this work may take while more clients may ask.
const WORK_SHARE: f64 = 0.5;

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
    /// Nobody else is about to ask: all clients that were answered lately wait.
    pub(super) all_wait: bool,
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
    /// Processor time that epochs have taken so far, and what one takes, on average.
    work: (Duration, Duration),
    /// From the decision to the stop, on average.
    lead: Duration,
    /// Output that waits: since when, frames at the last change, and when that was.
    waiting: Option<(Duration, usize, Duration)>,
    /// The last decision took an answer of one frame for all that comes.
    hasty: bool,
}

impl Pacer {
    /// A pacer whose container has just been stopped, in a way.
    pub(super) fn new(rates: Rates, now: Duration) -> Self {
        Self {
            rates,
            last: (now, Duration::ZERO),
            cost: Duration::ZERO,
            work: Default::default(),
            lead: Duration::ZERO,
            waiting: None,
            hasty: false,
        }
    }

    /// The container has been stopped for `stop` and goes on; `pages` were written in the epoch.
    pub(super) fn stopped(&mut self, now: Duration, used: Duration, stop: Duration, pages: usize) {
        self.cost = average(self.cost, stop + FAULT * pages as u32);
        (self.last, self.waiting) = ((now, used), None);
    }

    /// It was stopped so long after [`Next::Stop`] had been said.
    pub(super) fn prepared(&mut self, lead: Duration) {
        self.lead = average(self.lead, lead);
    }

    /// The threads that make checkpoints have used so much processor time so far, in all.
    pub(super) fn worked(&mut self, total: Duration) {
        let (before, work) = self.work;
        self.work = (total, average(work, total.saturating_sub(before) * PEERS));
    }

    /// The same after a full copy, which says nothing of what an epoch takes.
    pub(super) fn copied(&mut self, total: Duration) {
        self.work.0 = total;
    }

    /// Whether the last decision, which is asked about once, took an answer of one frame for all that comes. If
    /// there are more of them by the end of pre-copy, [`Pacer::look`] is to be asked again.
    pub(super) fn was_hasty(&mut self) -> bool {
        std::mem::take(&mut self.hasty)
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

    /// What the container has computed since the last stop, of `used` in all.
    pub(super) fn busy(&self, used: Duration) -> Duration {
        used.saturating_sub(self.last.1)
    }

    /// What to do now.
    pub(super) fn look(&mut self, look: Look) -> Next {
        let Rates { min, max, gather, .. } = self.rates;
        self.hasty = false;
        let worth = max / WORTH;
        let max = max - self.lead.min(max / LEAD);
        let since = self.since(look.now);
        // Without output nothing is due then either.
        if since < min && (look.awaited || look.output > 0) {
            return Next::After(min - since);
        }
        if look.awaited {
            return Next::Stop;
        }
        let busy = self.busy(look.used);
        let frames = look.output;
        if frames == 0 {
            self.waiting = None;
            let works = busy >= since / LITTLE || since >= LULL;
            let worth = !look.settled || busy >= worth && works;
            return match since >= max && worth {
                true => Next::Stop,
                false if since < max => Next::OnOutput(max - since),
                false => Next::OnOutput((since / CALM).min(CALMEST).max(max)),
            };
        }
        if since >= max {
            return Next::Stop;
        }
        let (begun, before, changed) = *self.waiting.get_or_insert((look.now, frames, look.now));
        let changed = if before == frames { changed } else { look.now };
        self.waiting = Some((begun, frames, changed));
        let quiet = look.now - changed;
        // The answer to the only one who asks: what follows it gathers while pre-copy runs.
        let alone = look.all_wait && frames == 1;
        let gather = if alone { gather.saturating_sub(self.lead) } else { gather };
        if quiet < gather && look.now - begun < gather * GATHERINGS {
            return Next::After((gather - quiet).min(max - since));
        }
        let mut short = self.short_of_budget(since, busy);
        if !look.all_wait || quiet < gather {
            short = short.max(self.short_of_work(since));
        }
        self.hasty = alone && short.is_zero();
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

    /// How long it takes until the epoch's work is no more than its share of the time.
    fn short_of_work(&self, since: Duration) -> Duration {
        if self.rates.share <= 0.0 {
            return Duration::ZERO;
        }
        self.work.1.mul_f64(1.0 / WORK_SHARE).saturating_sub(since)
    }
}

/// An average in which the newest value has its weight.
fn average(before: Duration, newest: Duration) -> Duration {
    match before {
        Duration::ZERO => newest,
        before => before - before / MEMORY + newest / MEMORY,
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
        run_with(pacer, from, output, used, true)
    }

    /// As [`run`]; `all_wait` says whether nobody else may ask.
    fn run_with(
        pacer: &mut Pacer,
        from: Duration,
        output: impl Fn(Duration) -> usize,
        used: impl Fn(Duration) -> Duration,
        all_wait: bool,
    ) -> Duration {
        let mut now = from;
        for _ in 0..10_000 {
            let (output, used) = (output(now), used(now));
            let look = Look { now, output, used, settled: true, awaited: false, all_wait };
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
    fn an_answer_of_one_frame_gathers_while_precopy_runs() {
        let mut p = pacer(us(300));
        let begun = |now, at: u64| usize::from(now >= us(at));
        (0..20).for_each(|_| p.prepared(us(60)));
        let at = run(&mut p, us(0), |now| begun(now, 700), |_| us(50));
        assert!((us(740)..us(760)).contains(&at), "{at:?}: 60 us of 100 are to come");
        p.waiting = None;
        let two = |now| begun(now, 700) + begun(now, 715);
        let at = run(&mut p, us(0), two, |_| us(50));
        assert!((us(815)..us(860)).contains(&at), "{at:?}: there was a second one");
        (0..20).for_each(|_| p.prepared(us(400)));
        p.waiting = None;
        let at = run(&mut p, us(0), |now| begun(now, 700), |_| us(50));
        assert_eq!(at, us(700), "all of it is to come");
        assert!(p.was_hasty() && !p.was_hasty());
        // Meanwhile more has come: all of it is awaited.
        let at = run(&mut p, us(900), |_| 3, |_| us(50));
        assert!((us(1_000)..us(1_020)).contains(&at) && !p.was_hasty(), "{at:?}");
        p.waiting = None;
        let at = run_with(&mut p, us(0), |now| begun(now, 700), |_| us(50), false);
        assert!(at >= us(800), "{at:?}: others may be answered as well");
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

    /// Epochs of a container that sleeps, each of which takes `work`; gives the end of the last.
    fn epochs(p: &mut Pacer, from: Duration, n: u32, work: Duration, all_wait: bool) -> Duration {
        let mut total = p.work.0;
        (0..n).fold(from, |from, _| {
            let at = run_with(p, from, |_| 1, |_| us(0), all_wait);
            total += work / PEERS;
            p.stopped(at, us(0), us(300), 0);
            p.worked(total);
            at
        })
    }

    #[test]
    fn while_others_may_ask_the_work_has_its_share_and_no_more() {
        let mut p = pacer(us(300));
        let begin = epochs(&mut p, us(0), 1, us(2000), false);
        let end = epochs(&mut p, begin, 50, us(2000), false);
        let share = us(2000 * 50).as_secs_f64() / (end - begin).as_secs_f64();
        assert!((WORK_SHARE * 0.9..=WORK_SHARE).contains(&share), "{share}");
    }

    #[test]
    fn the_full_copy_makes_no_epoch_longer() {
        let mut p = pacer(us(300));
        p.copied(us(900_000));
        let begin = epochs(&mut p, us(0), 1, us(200), false);
        p.copied(us(9_000_000));
        assert!(epochs(&mut p, begin, 1, us(200), false) - begin < us(1000));
    }

    #[test]
    fn epochs_are_short_again_as_soon_as_all_wait_or_the_work_gets_less() {
        let mut p = pacer(us(300));
        let busy = epochs(&mut p, us(0), 20, us(2000), false);
        let end = epochs(&mut p, busy, 1, us(2000), true);
        assert!(end - busy < us(700), "{:?}: nobody else may ask", end - busy);
        let cheaper = epochs(&mut p, end, 12, us(200), false);
        let last = epochs(&mut p, cheaper, 1, us(200), false) - cheaper;
        assert!(last < us(1200), "{last:?}: twelve epochs later");
    }

    #[test]
    fn output_that_goes_on_is_more_to_come_though_all_wait() {
        let mut p = pacer(us(300));
        epochs(&mut p, us(0), 20, us(2000), true);
        let from = p.last.0;
        let frames = |now: Duration| now.as_micros() as usize;
        let at = run(&mut p, from, frames, |_| us(0)) - from;
        assert!((us(3900)..us(4600)).contains(&at), "{at:?}");
    }

    #[test]
    fn the_longest_epoch_has_its_precopy_within() {
        let mut p = pacer(us(300));
        (0..20).for_each(|_| p.prepared(us(8000)));
        let at = run(&mut p, us(0), |_| 1, |now| now * 2);
        p.cost = us(5000);
        assert!(at < us(3600), "{at:?}: it makes no other epoch longer or shorter");
        let at = run(&mut p, us(0), |_| 1, |now| now * 2);
        assert!((us(21_900)..us(22_100)).contains(&at), "{at:?}: the stop is at 30 ms");
        let at = run(&mut p, us(0), |_| 0, |now| now / 2);
        assert!((us(21_900)..us(22_100)).contains(&at), "{at:?}: nor without output");
        (0..20).for_each(|_| p.prepared(us(500)));
        let at = run(&mut p, us(0), |_| 1, |now| now * 2);
        assert!((us(29_000)..us(29_600)).contains(&at), "{at:?}: it takes less again");
        (0..20).for_each(|_| p.prepared(us(90_000)));
        let at = run(&mut p, us(0), |_| 1, |now| now * 2);
        assert!(at >= us(15_000), "{at:?}: half of the time is the container's");
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

    /// When a container is stopped that says nothing and has used so much.
    fn silent(used: impl Fn(Duration) -> Duration) -> Duration {
        let (mut p, mut now) = (pacer(us(300)), us(0));
        while now < 2 * LULL {
            let look = Look { now, used: used(now), settled: true, ..Look::default() };
            match p.look(look) {
                Next::Stop => return now,
                Next::After(pause) | Next::OnOutput(pause) => now += pause,
            }
        }
        panic!("it never stops");
    }

    #[test]
    fn what_is_done_by_the_clock_is_saved_now_and_then() {
        let at = silent(|now| now / 500);
        assert!((us(10_000_000)..us(10_200_000)).contains(&at), "{at:?}: 0.2 % of a processor");
        let at = silent(|now| now.saturating_sub(us(5_000_000)) + now / 500);
        assert!((us(5_030_000)..us(5_300_000)).contains(&at), "{at:?}: then it works");
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
