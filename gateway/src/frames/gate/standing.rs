//! How long output has stood. While it does, who calls gets no answer: the container's kernel answers
//! each new connection, and the answers wait. Once as many wait as the program lets wait (its backlog), the
//! kernel answers with SYN cookies and forgets earlier connections; when all of these answers leave, those whose
//! connection was forgotten are reset as soon as they speak. So a gate whose output stands does not let first
//! segments of connections in. The client repeats them, as if its network had lost them.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Since when output waits that was held while none left.
#[derive(Debug)]
pub(super) struct Standing {
    origin: Instant,
    /// Nanoseconds from there on, 0: nothing waits.
    since: AtomicU64,
    longest: Duration,
}

impl Standing {
    /// Output that waits for longer than this stands.
    pub(super) fn new(longest: Duration) -> Self {
        Self { origin: Instant::now(), since: AtomicU64::new(0), longest }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64 | 1
    }

    /// A frame is held.
    pub(super) fn held(&self) {
        if self.since.load(Relaxed) == 0 {
            self.since.store(self.now(), Relaxed);
        }
    }

    /// Output has left, or will not, and this says whether more of it is held.
    pub(super) fn moved(&self, more: bool) {
        self.since.store(if more { self.now() } else { 0 }, Relaxed);
    }

    /// Whether output stands.
    pub(super) fn stands(&self) -> bool {
        let since = self.since.load(Relaxed);
        since != 0 && self.now().saturating_sub(since) > self.longest.as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_stands_when_it_has_waited_and_none_has_left() {
        let standing = Standing::new(Duration::ZERO);
        let stands = |standing: &Standing| {
            std::thread::sleep(Duration::from_micros(10));
            standing.stands()
        };
        assert!(!stands(&standing));
        standing.held();
        assert!(stands(&standing));
        standing.moved(false);
        assert!(!stands(&standing));
        standing.held();
        standing.moved(true);
        assert!(stands(&standing));
        let patient = Standing::new(Duration::from_secs(1000));
        patient.held();
        assert!(!stands(&patient));
    }
}
