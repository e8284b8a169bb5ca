//! What faults make of a link for a while. A link that is worse already stays so.

use std::time::Duration;

use super::model::Impair;
use super::units::{BitRate, Period, Ratio};

/// Of a slow link: what each frame takes, bits a second, and frames under way, so that what was
/// sent arrives within a second or is lost.
const SLOW_DELAY: Period = Period::ms(20);
const SLOW_RATE: BitRate = BitRate(20_000_000);
const SLOW_QUEUE: usize = 200;

/// Of a lossy link: the least delay, as what overtakes needs something to overtake, and parts of
/// the frames that are lost, arrive twice, overtake others, or are changed.
const LOSSY_DELAY: Period = Period(Duration::from_millis(1));
const LOST: f64 = 0.05;
const DOUBLED: f64 = 0.02;
const REORDERED: f64 = 0.05;
const CORRUPT: f64 = 0.02;

impl Impair {
    /// As a slow link: late, and narrow.
    #[must_use]
    pub fn slow(&self) -> Self {
        Self {
            delay: self.delay.max(SLOW_DELAY),
            rate: Some(self.rate.map_or(SLOW_RATE, |rate| rate.min(SLOW_RATE))),
            queue: self.queue.min(SLOW_QUEUE),
            ..self.clone()
        }
    }

    /// As a lossy link: frames are lost, copied, overtaken and changed.
    #[must_use]
    pub fn lossy(&self) -> Self {
        Self {
            delay: self.delay.max(LOSSY_DELAY),
            loss: at_least(self.loss, LOST),
            duplicate: at_least(self.duplicate, DOUBLED),
            reorder: at_least(self.reorder, REORDERED),
            corrupt: at_least(self.corrupt, CORRUPT),
            ..self.clone()
        }
    }

    /// As a cut link: nothing arrives.
    #[must_use]
    pub fn silent(&self) -> Self {
        Self { loss: at_least(self.loss, 1.0), ..self.clone() }
    }
}

fn at_least(part: Ratio, least: f64) -> Ratio {
    Ratio::new(part.get().max(least)).unwrap_or(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_is_worse_already_stays_so() {
        let slow = Impair { delay: Period::ms(90), queue: 7, ..Impair::default() }.slow();
        assert_eq!((slow.delay, slow.queue, slow.rate), (Period::ms(90), 7, Some(SLOW_RATE)));
        let half = Ratio::new(0.5).unwrap();
        let lossy = Impair { loss: half, ..Impair::default() }.lossy();
        assert_eq!((lossy.loss, lossy.corrupt.get()), (half, CORRUPT));
        assert_eq!(lossy.silent().loss.get(), 1.0);
    }
}
