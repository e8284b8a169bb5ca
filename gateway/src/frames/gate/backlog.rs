//! What clients sent while the container could not receive: kept, bounded, replayed at the plug.

use crate::frames::{HEADER, Mac};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Bounds of the frames that wait while the gate is unplugged. Beyond them the oldest go.
#[derive(Clone, Copy, Debug)]
pub struct BacklogBounds {
    /// Bytes.
    pub bytes: usize,
    /// Frames.
    pub frames: usize,
    /// Older frames are not replayed: their senders have given up or sent again.
    pub age: Duration,
}

impl Default for BacklogBounds {
    fn default() -> Self {
        Self { bytes: 16 << 20, frames: 1 << 14, age: Duration::from_secs(10) }
    }
}

/// Frames with the time they came at, oldest first.
#[derive(Debug)]
pub(super) struct Backlog {
    bounds: BacklogBounds,
    mac: Option<Mac>,
    frames: VecDeque<(Instant, Box<[u8]>)>,
    bytes: usize,
    dropped: u64,
}

impl Backlog {
    pub(super) fn new(bounds: BacklogBounds, mac: Option<Mac>) -> Self {
        Self { bounds, mac, frames: VecDeque::new(), bytes: 0, dropped: 0 }
    }

    /// Keeps a frame, if it is for the container: a bridge floods what it does not know.
    pub(super) fn push(&mut self, now: Instant, frame: &[u8]) {
        let Some(destination) = frame.get(HEADER..HEADER + 6) else { return };
        let group = destination[0] & 1 == 1;
        if !group && self.mac.is_some_and(|mac| mac.0 != destination) {
            return;
        }
        self.bytes += frame.len();
        self.frames.push_back((now, frame.into()));
        while self.bytes > self.bounds.bytes || self.frames.len() > self.bounds.frames {
            let Some((_, oldest)) = self.frames.pop_front() else { break };
            self.bytes -= oldest.len();
            self.dropped += 1;
        }
    }

    /// Everything young enough, oldest first; empties the backlog.
    pub(super) fn take(&mut self, now: Instant) -> impl Iterator<Item = Box<[u8]>> {
        self.bytes = 0;
        let age = self.bounds.age;
        self.frames
            .drain(..)
            .filter(move |(at, _)| now.saturating_duration_since(*at) <= age)
            .map(|(_, frame)| frame)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(|(_, frame)| &**frame)
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn frame_to(mac: [u8; 6], last: u8) -> Vec<u8> {
        let mut f = vec![0; HEADER + 14];
        f[HEADER..HEADER + 6].copy_from_slice(&mac);
        f.push(last);
        f
    }

    #[test]
    fn keeps_what_is_for_us_and_young_within_its_bounds() {
        let t0 = Instant::now();
        let bounds = BacklogBounds { bytes: 1000, frames: 3, age: Duration::from_secs(1) };
        let mut b = Backlog::new(bounds, Some(US));
        b.push(t0, &frame_to([2, 0, 0, 0, 0, 9], 0));
        b.push(t0, b"short");
        assert_eq!(b.len(), 0, "flooded or broken");
        for i in 1..=2 {
            b.push(t0, &frame_to(US.0, i));
        }
        let later = t0 + Duration::from_secs(5);
        b.push(later, &frame_to([0xff; 6], 3));
        b.push(later, &frame_to(US.0, 4));
        assert_eq!((b.len(), b.dropped()), (3, 1));
        let kept: Vec<u8> = b.take(later).map(|f| f[f.len() - 1]).collect();
        assert_eq!(kept, [3, 4], "frame 2 is too old");
        assert_eq!(b.len(), 0);
    }
}
