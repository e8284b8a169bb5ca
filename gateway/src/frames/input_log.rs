//! The input log: a copy of what the container received and no committed checkpoint contains.
//!
//! At the primary the gate writes each inbound frame with the epoch that was open when the
//! container got it ([`LogWriter`]), and the agent takes them in batches ([`LogReader`]) and sends
//! them to the backup. There an [`InputLog`] keeps those of epochs that are not committed. After
//! a failover the backup injects them, so that no client has to wait for its retransmission timer.
//!
//! The log is a help and not a promise: what it loses, TCP sends again. So every bound (RB-1)
//! drops and counts, and nothing ever waits for the log.

use bytes::{Bytes, BytesMut};
use replicator::Epoch;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Bytes that the writer reserves at a time.
const CHUNK: usize = 256 << 10;

/// One inbound frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedFrame {
    /// The epoch that was open when the container received it: checkpoints from this epoch on
    /// contain its effect.
    pub epoch: Epoch,
    /// The frame with its virtio_net_hdr.
    pub frame: Bytes,
}

#[derive(Debug, Default)]
struct Pending {
    frames: Vec<LoggedFrame>,
    bytes: usize,
    dropped: u64,
}

#[derive(Debug)]
struct Channel {
    pending: Mutex<Pending>,
    filled: Notify,
    max_bytes: usize,
    max_frames: usize,
}

impl Channel {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The gate's end of the log.
#[derive(Debug)]
pub struct LogWriter {
    channel: Arc<Channel>,
    chunk: BytesMut,
}

/// The sender's end of the log.
#[derive(Debug)]
pub struct LogReader {
    channel: Arc<Channel>,
}

/// A log from the gate to the sender that holds at most so many bytes and frames; further frames
/// are dropped and counted until the reader has taken some.
pub fn channel(max_bytes: usize, max_frames: usize) -> (LogWriter, LogReader) {
    let channel = Arc::new(Channel {
        pending: Mutex::default(),
        filled: Notify::new(),
        max_bytes,
        max_frames,
    });
    (LogWriter { channel: channel.clone(), chunk: BytesMut::new() }, LogReader { channel })
}

impl LogWriter {
    /// Adds a frame, or drops and counts it. Never waits for the reader.
    pub fn push(&mut self, epoch: Epoch, frame: &[u8]) {
        if self.chunk.capacity() - self.chunk.len() < frame.len() {
            self.chunk = BytesMut::with_capacity(CHUNK.max(frame.len()));
        }
        let mut pending = self.channel.pending();
        if pending.bytes + frame.len() > self.channel.max_bytes
            || pending.frames.len() >= self.channel.max_frames
        {
            pending.dropped += 1;
            return;
        }
        self.chunk.extend_from_slice(frame);
        let frame = self.chunk.split().freeze();
        pending.bytes += frame.len();
        let first = pending.frames.is_empty();
        pending.frames.push(LoggedFrame { epoch, frame });
        drop(pending);
        if first {
            self.channel.filled.notify_one();
        }
    }

    /// Frames dropped because the reader was too slow.
    pub fn dropped(&self) -> u64 {
        self.channel.pending().dropped
    }
}

impl LogReader {
    /// All frames that wait, oldest first; maybe none.
    pub fn take(&mut self) -> Vec<LoggedFrame> {
        let mut pending = self.channel.pending();
        pending.bytes = 0;
        std::mem::take(&mut pending.frames)
    }

    /// Waits until [`LogReader::take`] has something to give (it may, rarely, give nothing).
    pub async fn filled(&mut self) {
        self.channel.filled.notified().await;
    }

    /// Frames dropped because this reader was too slow.
    pub fn dropped(&self) -> u64 {
        self.channel.pending().dropped
    }
}

/// The backup's store of logged frames.
#[derive(Debug)]
pub struct InputLog {
    frames: VecDeque<LoggedFrame>,
    bytes: usize,
    committed: Epoch,
    max_bytes: usize,
    max_frames: usize,
    dropped: u64,
}

impl InputLog {
    /// An empty log. Beyond these bounds the oldest frames are dropped and counted.
    pub fn new(max_bytes: usize, max_frames: usize) -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            committed: Epoch::NONE,
            max_bytes,
            max_frames,
            dropped: 0,
        }
    }

    /// Adds a frame; one that a committed checkpoint contains is not kept.
    pub fn push(&mut self, frame: LoggedFrame) {
        if frame.epoch <= self.committed {
            return;
        }
        self.bytes += frame.frame.len();
        self.frames.push_back(frame);
        while self.bytes > self.max_bytes || self.frames.len() > self.max_frames {
            let Some(oldest) = self.frames.pop_front() else { break };
            self.bytes -= oldest.frame.len();
            self.dropped += 1;
        }
    }

    /// The checkpoint of `epoch` is committed: what it contains is not needed any more.
    pub fn committed(&mut self, epoch: Epoch) {
        self.committed = self.committed.max(epoch);
        let keep_from = self.committed;
        let bytes = &mut self.bytes;
        // Batches arrive in order, so that the front is the oldest; retain also bears disorder.
        self.frames.retain(|f| {
            let keep = f.epoch > keep_from;
            if !keep {
                *bytes -= f.frame.len();
            }
            keep
        });
    }

    /// The frames that checkpoint `last_committed` does not contain, in the order of arrival.
    /// The log is empty afterwards.
    pub fn take_for_replay(&mut self, last_committed: Epoch) -> Vec<Bytes> {
        self.committed(last_committed);
        self.bytes = 0;
        self.frames.drain(..).map(|f| f.frame).collect()
    }

    /// Frames in the log.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes in the log.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Frames dropped at the bound.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(epoch: u64, byte: u8) -> LoggedFrame {
        LoggedFrame { epoch: Epoch(epoch), frame: Bytes::from(vec![byte; 10]) }
    }

    #[test]
    fn only_what_no_checkpoint_contains_is_replayed() {
        let mut log = InputLog::new(1000, 1000);
        for (e, b) in [(1, 1), (1, 2), (2, 3), (3, 4)] {
            log.push(frame(e, b));
        }
        log.committed(Epoch(1));
        log.push(frame(1, 9));
        assert_eq!((log.len(), log.bytes()), (2, 20));
        let first_bytes: Vec<u8> = log.take_for_replay(Epoch(2)).iter().map(|f| f[0]).collect();
        assert_eq!(first_bytes, [4]);
        assert!(log.is_empty() && log.bytes() == 0);
    }

    #[test]
    fn at_the_bound_the_oldest_goes() {
        let mut log = InputLog::new(25, 100);
        for b in 0..4 {
            log.push(frame(1, b));
        }
        assert_eq!((log.len(), log.bytes(), log.dropped()), (2, 20, 2));
        assert_eq!(log.take_for_replay(Epoch::NONE)[0][0], 2);
    }

    #[test]
    fn a_slow_reader_costs_frames_and_no_time() {
        let (mut writer, mut reader) = channel(30, 100);
        for b in 0..5 {
            writer.push(Epoch(1), &[b; 10]);
        }
        let taken = reader.take();
        assert_eq!(taken.iter().map(|f| f.frame[0]).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(reader.dropped(), 2);
        writer.push(Epoch(2), &[7; 10]);
        assert_eq!(reader.take(), [LoggedFrame { epoch: Epoch(2), frame: vec![7; 10].into() }]);
        assert!(reader.take().is_empty());
    }

    #[test]
    fn the_reader_is_woken() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut writer, mut reader) = channel(1 << 20, 100);
        let pushing = std::thread::spawn(move || writer.push(Epoch(4), b"frame"));
        runtime.block_on(reader.filled());
        pushing.join().unwrap();
        assert_eq!(reader.take()[0].epoch, Epoch(4));
    }

    proptest! {
        #[test]
        fn replay_is_the_uncommitted_suffix(
            steps in prop::collection::vec((1u64..20, any::<bool>()), 0..60),
            last in 0u64..20,
        ) {
            let mut log = InputLog::new(usize::MAX, usize::MAX);
            let mut model: Vec<(u64, u8)> = Vec::new();
            let mut committed = 0;
            for (i, (epoch, commit)) in steps.into_iter().enumerate() {
                if commit {
                    committed = committed.max(epoch);
                    log.committed(Epoch(epoch));
                } else {
                    log.push(frame(epoch, i as u8));
                    model.push((epoch, i as u8));
                    if epoch <= committed {
                        model.pop();
                    }
                }
            }
            let want: Vec<u8> = model
                .iter()
                .filter(|(e, _)| *e > committed.max(last))
                .map(|(_, b)| *b)
                .collect();
            let got: Vec<u8> =
                log.take_for_replay(Epoch(last)).iter().map(|f| f[0]).collect();
            prop_assert_eq!(got, want);
        }
    }
}
