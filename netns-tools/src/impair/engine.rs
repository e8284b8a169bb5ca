//! What an impaired link does to the frames of one direction, without sockets or clocks.
//!
//! ```text
//! push -> lost? -> changed? -> room? -> rate: wait for the frames before -> delay, jitter -> pop
//!                                                                 `-> reorder: no delay --^
//! ```
//! The caller says what time it is, as the time since some fixed moment. The same seed and the
//! same calls give the same fate to each frame. At most [`Impair::queue`] frames wait; what comes
//! on top is dropped and counted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::topology::{Impair, Ratio};

/// What has become of the frames so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Handed to the link.
    pub pushed: u64,
    /// Delivered, copies included.
    pub delivered: u64,
    /// Lost on purpose.
    pub lost: u64,
    /// Copied.
    pub duplicated: u64,
    /// Sent ahead of others.
    pub reordered: u64,
    /// Delivered with a bit changed.
    pub corrupted: u64,
    /// Dropped because too many were waiting.
    pub overflowed: u64,
    /// Dropped because the link was cut.
    pub cut: u64,
}

/// One direction of an impaired link.
#[derive(Debug)]
pub struct Impairment<F> {
    config: Impair,
    random: fastrand::Rng,
    waiting: BinaryHeap<Reverse<Waiting<F>>>,
    /// Number of the next frame to wait: what is due at the same time leaves in this order.
    next: u64,
    /// When the link has sent all that it was given, at its rate.
    busy_until: Duration,
    /// When the last frame that keeps its place leaves.
    last_due: Duration,
    is_cut: bool,
    counts: Counts,
}

#[derive(Debug)]
struct Waiting<F> {
    due: Duration,
    number: u64,
    frame: F,
}

impl<F: AsRef<[u8]> + AsMut<[u8]> + Clone> Impairment<F> {
    /// A link in working order. `seed` decides the fate of the frames; each direction of a link
    /// needs one of its own.
    pub fn new(config: Impair, seed: u64) -> Self {
        Self {
            config,
            random: fastrand::Rng::with_seed(seed),
            waiting: BinaryHeap::new(),
            next: 0,
            busy_until: Duration::ZERO,
            last_due: Duration::ZERO,
            is_cut: false,
            counts: Counts::default(),
        }
    }

    /// A frame enters the link.
    pub fn push(&mut self, now: Duration, mut frame: F) {
        self.counts.pushed += 1;
        if self.is_cut {
            self.counts.cut += 1;
            return;
        }
        if self.happens(self.config.loss) {
            self.counts.lost += 1;
            return;
        }
        if self.happens(self.config.corrupt) {
            self.counts.corrupted += 1;
            self.change_a_bit(frame.as_mut());
        }
        let copy = self.happens(self.config.duplicate).then(|| frame.clone());
        self.send(now, frame);
        if let Some(copy) = copy {
            self.counts.duplicated += 1;
            self.send(now, copy);
        }
    }

    fn send(&mut self, now: Duration, frame: F) {
        if self.waiting.len() >= self.config.queue {
            self.counts.overflowed += 1;
            return;
        }
        let sent = self.sent_at(now, frame.as_ref().len());
        let due = if self.happens(self.config.reorder) {
            self.counts.reordered += 1;
            sent
        } else {
            self.last_due = self.last_due.max(sent + self.delay());
            self.last_due
        };
        self.waiting.push(Reverse(Waiting { due, number: self.next, frame }));
        self.next += 1;
    }

    fn change_a_bit(&mut self, frame: &mut [u8]) {
        if !frame.is_empty() {
            let bit = self.random.usize(..frame.len() * 8);
            frame[bit / 8] ^= 1 << (bit % 8);
        }
    }

    /// When the last bit of a frame is on the link.
    fn sent_at(&mut self, now: Duration, bytes: usize) -> Duration {
        let Some(rate) = self.config.rate else { return now };
        let nanos = bytes as u128 * 8 * 1_000_000_000 / u128::from(rate.0.max(1));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.busy_until = self.busy_until.max(now).saturating_add(takes);
        self.busy_until
    }

    fn delay(&mut self) -> Duration {
        let jitter = u64::try_from(self.config.jitter.as_nanos()).unwrap_or(u64::MAX / 2);
        let spread = self.random.u64(0..=jitter.saturating_mul(2));
        (*self.config.delay + Duration::from_nanos(spread))
            .saturating_sub(Duration::from_nanos(jitter))
    }

    fn happens(&mut self, ratio: Ratio) -> bool {
        ratio.get() > 0.0 && self.random.f64() < ratio.get()
    }

    /// When the next frame leaves the link; none while it is empty.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.waiting.peek().map(|Reverse(waiting)| waiting.due)
    }

    /// The frames that have left the link by now, in order.
    pub fn pop(&mut self, now: Duration) -> Vec<F> {
        let mut frames = Vec::new();
        while self.next_deadline().is_some_and(|due| due <= now) {
            if let Some(Reverse(waiting)) = self.waiting.pop() {
                frames.push(waiting.frame);
            }
        }
        self.counts.delivered += frames.len() as u64;
        frames
    }

    /// Cuts the link, losing all that is under way, or heals it.
    pub fn set_cut(&mut self, cut: bool) {
        self.is_cut = cut;
        if cut {
            self.counts.cut += self.waiting.len() as u64;
            self.waiting.clear();
            self.busy_until = Duration::ZERO;
            self.last_due = Duration::ZERO;
        }
    }

    /// From now on this happens to what enters the link; what is under way arrives as it would have.
    pub fn change(&mut self, config: Impair) {
        self.config = config;
    }

    /// Frames under way.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// What has become of the frames so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

impl<F> Waiting<F> {
    fn key(&self) -> (Duration, u64) {
        (self.due, self.number)
    }
}

impl<F> PartialEq for Waiting<F> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<F> Eq for Waiting<F> {}

impl<F> PartialOrd for Waiting<F> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<F> Ord for Waiting<F> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::Period;
    use proptest::prelude::*;

    const FRAMES: u32 = 20_000;

    fn ratio(part: f64) -> Ratio {
        Ratio::new(part).unwrap()
    }

    fn micros(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    /// Sends numbered frames one `gap` apart; returns (number, time under way) as they arrive.
    fn travel(config: Impair, gap: Duration) -> (Vec<(u32, Duration)>, Counts) {
        let mut link = Impairment::new(config, 7);
        let mut arrived = Vec::new();
        let mut note = |link: &mut Impairment<[u8; 4]>, until: Duration| {
            while let Some(due) = link.next_deadline().filter(|due| *due <= until) {
                for frame in link.pop(due) {
                    let number = u32::from_be_bytes(frame);
                    arrived.push((number, due - gap * number));
                }
            }
        };
        for number in 0..FRAMES {
            note(&mut link, gap * number);
            link.push(gap * number, number.to_be_bytes());
        }
        note(&mut link, Duration::MAX);
        (arrived, link.counts())
    }

    /// Whether `count` of [`FRAMES`] is within five standard deviations of what is expected: by
    /// chance it is not once in two million seeds.
    fn plausible(count: u64, part: f64) -> bool {
        let (n, count) = (f64::from(FRAMES), count as f64);
        (count - n * part).abs() <= 5.0 * (n * part * (1.0 - part)).sqrt()
    }

    #[test]
    fn a_link_without_impairment_passes_everything_at_once() {
        let (arrived, counts) = travel(Impair::default(), micros(10));
        assert!(
            arrived.iter().enumerate().all(|(i, (n, late))| i == *n as usize && late.is_zero())
        );
        assert_eq!(counts.delivered, u64::from(FRAMES));
    }

    #[test]
    fn frames_are_lost_and_copied_in_the_stated_parts() {
        let config = Impair { loss: ratio(0.1), duplicate: ratio(0.02), ..Impair::default() };
        let (arrived, counts) = travel(config, micros(10));
        assert!(plausible(counts.lost, 0.1), "{counts:?}");
        assert!(plausible(counts.duplicated, 0.9 * 0.02), "{counts:?}");
        assert_eq!(arrived.len() as u64, u64::from(FRAMES) - counts.lost + counts.duplicated);
        let everything = Impair { loss: ratio(1.0), ..Impair::default() };
        assert!(travel(everything, micros(10)).0.is_empty());
    }

    #[test]
    fn a_changed_frame_differs_by_one_bit() {
        let mut link = Impairment::new(Impair { corrupt: ratio(0.2), ..Impair::default() }, 7);
        let mut changed = 0;
        for number in 0..FRAMES {
            link.push(Duration::ZERO, number.to_be_bytes());
            let arrived = u32::from_be_bytes(link.pop(Duration::ZERO)[0]);
            let bits = (arrived ^ number).count_ones();
            assert!(bits <= 1, "{number} arrives as {arrived}");
            changed += u64::from(bits);
        }
        assert_eq!(changed, link.counts().corrupted);
        assert!(plausible(changed, 0.2), "{changed}");
    }

    #[test]
    fn a_link_that_changes_loses_nothing_that_is_under_way() {
        let mut link = Impairment::new(Impair { delay: Period::ms(9), ..Impair::default() }, 7);
        link.push(Duration::ZERO, [1]);
        link.change(Impair::default().silent());
        link.push(Duration::ZERO, [2]);
        link.change(Impair::default());
        link.push(Duration::ZERO, [3]);
        // In their order, as a delay that shrinks makes none overtake another.
        assert_eq!(link.pop(Duration::from_millis(9)), [[1], [3]]);
    }

    #[test]
    fn delay_is_spread_evenly_by_the_jitter() {
        let config =
            Impair { delay: Period(micros(500)), jitter: Period(micros(100)), ..Impair::default() };
        let (arrived, _) = travel(config, micros(1000));
        let (low, high) = (micros(400), micros(600));
        assert!(arrived.iter().all(|(_, late)| (low..=high).contains(late)));
        let mean = arrived.iter().map(|(_, late)| late.as_secs_f64()).sum::<f64>() / 20_000.0;
        assert!((mean - 500e-6).abs() < 3e-6, "{mean}");
        let early = arrived.iter().filter(|(_, late)| *late < micros(450)).count();
        assert!(plausible(early as u64, 0.25), "{early}");
    }

    #[test]
    fn jitter_alone_never_reorders() {
        let config =
            Impair { delay: Period(micros(500)), jitter: Period(micros(500)), ..Impair::default() };
        let (arrived, _) = travel(config, micros(10));
        assert!(arrived.is_sorted_by_key(|(number, _)| *number));
    }

    #[test]
    fn reordered_frames_overtake() {
        let config =
            Impair { delay: Period(micros(500)), reorder: ratio(0.05), ..Impair::default() };
        let (arrived, counts) = travel(config, micros(10));
        assert!(plausible(counts.reordered, 0.05), "{counts:?}");
        let early = arrived.iter().filter(|(_, late)| late.is_zero()).count();
        assert_eq!(early as u64, counts.reordered);
        assert!(!arrived.is_sorted_by_key(|(number, _)| *number));
    }

    #[test]
    fn a_rate_spaces_frames() {
        let rate = Some("8mbit".parse().unwrap());
        let mut link = Impairment::new(Impair { rate, ..Impair::default() }, 1);
        for _ in 0..10 {
            link.push(Duration::ZERO, vec![0_u8; 1000]);
        }
        assert_eq!(link.next_deadline(), Some(micros(1000)));
        assert_eq!(link.pop(micros(3500)).len(), 3);
        assert_eq!(link.pop(micros(10_000)).len(), 7);
        assert_eq!(link.next_deadline(), None);
    }

    #[test]
    fn the_queue_is_bounded_and_drops_are_counted() {
        let config = Impair { delay: Period(micros(500)), queue: 3, ..Impair::default() };
        let mut link = Impairment::new(config, 1);
        for number in 0..5 {
            link.push(Duration::ZERO, [number]);
        }
        assert_eq!((link.waiting(), link.counts().overflowed), (3, 2));
        assert_eq!(link.pop(micros(500)), [[0], [1], [2]]);
        link.push(micros(500), [5]);
        assert_eq!(link.waiting(), 1);
    }

    #[test]
    fn a_cut_link_loses_what_is_under_way_and_what_comes() {
        let config = Impair { delay: Period(micros(500)), ..Impair::default() };
        let mut link = Impairment::new(config, 1);
        link.push(Duration::ZERO, [1]);
        link.set_cut(true);
        link.push(micros(1), [2]);
        assert!(link.pop(Duration::MAX).is_empty());
        assert_eq!(link.counts().cut, 2);
        link.set_cut(false);
        link.push(micros(2), [3]);
        assert_eq!(link.pop(micros(502)), [[3]]);
    }

    #[test]
    fn a_seed_repeats_its_fates() {
        let config = Impair {
            delay: Period(micros(300)),
            jitter: Period(micros(200)),
            loss: ratio(0.1),
            duplicate: ratio(0.1),
            reorder: ratio(0.1),
            ..Impair::default()
        };
        assert_eq!(travel(config.clone(), micros(50)), travel(config, micros(50)));
    }

    proptest! {
        /// Every frame is accounted for, whatever happens to it.
        #[test]
        fn no_frame_is_unaccounted_for(
            loss in 0.0..1.0, duplicate in 0.0..1.0, reorder in 0.0..1.0,
            delay in 0u64..1000, queue in 1usize..20, seed: u64,
            steps in prop::collection::vec((0u64..300, 0usize..3, prop::bool::weighted(0.05)), 1..200),
        ) {
            let config = Impair {
                delay: Period(micros(delay)), jitter: Period(micros(delay / 2)),
                loss: ratio(loss), duplicate: ratio(duplicate), reorder: ratio(reorder), corrupt: ratio(loss),
                rate: Some("100mbit".parse().unwrap()), queue, seed,
            };
            let mut link = Impairment::new(config, seed);
            let mut now = Duration::ZERO;
            for (wait, frames, cut) in steps {
                now += micros(wait);
                link.set_cut(cut);
                for _ in 0..frames {
                    link.push(now, [0_u8; 100]);
                }
                link.pop(now);
                prop_assert!(link.waiting() <= queue);
                prop_assert!(link.next_deadline().is_none_or(|due| due > now));
                let c = link.counts();
                prop_assert_eq!(
                    c.pushed + c.duplicated,
                    c.delivered + c.lost + c.overflowed + c.cut + link.waiting() as u64
                );
            }
        }
    }
}
