//! The shipper: codes checkpoints and hands them to the link, off the stop path.
//!
//! A checkpoint that was taken for a connection that is gone is dropped: what it holds is in the
//! full copy that the next connection begins with. The backup then gets every later epoch, and
//! output of the dropped one waits for them.
//!
//! A small checkpoint comes here before its stop was confirmed, and is coded meanwhile: nothing of it leaves
//! before its [`Verdict`] is known.
//!
//! Invariant: the stop thread, which may be real-time, never waits busily for the shipper, which is not: the shipper
//! may have lost its processor to it. The channels of the standard library do so, with a receiver whose sender is in
//! the middle of sending; where both share a processor that lasts until the kernel throttles real-time threads, 0.95 s.
//! Those between the two are tokio's, in which such a receiver sleeps.

use super::primary::Shell;
use super::stop::Taken;
use bytes::Bytes;
use replicator::image::State;
use replicator::image::pages::PageSet;
use replicator::protocol::LinkId;
use replicator::protocol::primary::Input;
use replicator::sys::sched;
use replicator::transport::link::Closed;
use replicator::wire::{self, BuildError, CheckpointBuilder, Limits};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::oneshot;

/// Ahead of ordinary work, behind everything that is real-time.
const NICE: i32 = -10;

/// Real-time priority of the last checkpoint before a switchover.
const PRIORITY: i32 = 5;

/// Bytes that leave together.
const BATCH: usize = 64 << 10;

/// Why a checkpoint did not leave.
#[derive(Debug, thiserror::Error)]
enum ShipError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Closed(#[from] Closed),
    #[error("the connection that it was taken for is gone")]
    Stale,
}

/// Whether a checkpoint is one, which is known once what its stop has not looked at was looked at: after so long, or
/// never if it is none.
pub(super) type Verdict = oneshot::Receiver<Duration>;

/// Runs until the stop thread is gone.
pub(super) fn run(shell: Arc<Shell>, mut to_ship: Receiver<Taken>, buffers: Sender<Taken>) {
    if let Err(error) = sched::set_nice(NICE) {
        tracing::debug!(%error, "the shipper runs at ordinary priority");
    }
    let mut builder: Option<(LinkId, CheckpointBuilder)> = None;
    while let Some(mut taken) = to_ship.blocking_recv() {
        // The container stands still until this one is with the backup.
        let hurry = shell.hands_over();
        if hurry && let Err(error) = sched::set_fifo(PRIORITY) {
            tracing::debug!(%error, "a switchover competes with ordinary work");
        }
        if let Err(error) = ship(&shell, &mut builder, &mut taken) {
            tracing::info!(epoch = %taken.epoch, %error, "a checkpoint was dropped");
            builder = None;
            if matches!(error, ShipError::Build(_)) {
                // Later ones build on it, so nothing could be acknowledged any more: start anew.
                shell.handle(Input::Lost(taken.link));
            }
        }
        // Taken apart here rather than where the next one is awaited.
        taken.state = State::default();
        if taken.full {
            // As large as the container, and of no use for what follows.
            taken.pages = PageSet::default();
        }
        // The stop thread holds the other end as long as it runs. It is woken when it can have
        // the buffers.
        let _ = buffers.blocking_send(taken);
        shell.shipped(sched::thread_time());
        if hurry && let Err(error) = sched::set_ordinary() {
            tracing::debug!(%error, "real-time for good");
        }
    }
}

/// Frames that leave together: each hand-over wakes the runtime.
#[derive(Default)]
struct Batch {
    frames: Vec<Bytes>,
    bytes: usize,
    /// None leaves before all do.
    keeps: bool,
}

impl Batch {
    /// Adds a frame; gives those that are to leave now.
    fn add(&mut self, frame: Bytes) -> Option<Vec<Bytes>> {
        self.bytes += frame.len();
        self.frames.push(frame);
        (self.bytes >= BATCH && !self.keeps).then(|| {
            self.bytes = 0;
            std::mem::take(&mut self.frames)
        })
    }
}

fn ship(
    shell: &Shell,
    builder: &mut Option<(LinkId, CheckpointBuilder)>,
    taken: &mut Taken,
) -> Result<(), ShipError> {
    let link = shell.link_for(taken).ok_or(ShipError::Stale)?;
    if taken.seed {
        return Ok(link.send_all(vec![wire::seed(taken.generation, taken.epoch, &taken.files)])?);
    }
    if taken.full {
        *builder = Some((taken.link, CheckpointBuilder::new(Limits::default())));
    }
    let builder = match builder {
        Some((of, builder)) if *of == taken.link => builder,
        _ => return Err(ShipError::Stale),
    };
    let mut sent = Ok(());
    let verdict = taken.verdict.take();
    let mut batch = Batch { keeps: verdict.is_some(), ..Batch::default() };
    let mut send = |frame| {
        if let (Ok(()), Some(full)) = (&sent, batch.add(frame)) {
            sent = link.send_all(full);
        }
    };
    send(builder.begin_as(taken.generation, taken.epoch, taken.full, taken.provisional));
    let owners = taken.state.owners();
    builder.pages(&taken.pages, &owners, &mut send)?;
    builder.files(&taken.files, &mut send)?;
    let finished = builder.finish(&taken.state, &mut send)?;
    sent?;
    if let Some(verdict) = verdict {
        let Ok(took) = verdict.blocking_recv() else {
            builder.take_back(&taken.pages.runs, &owners);
            return Ok(());
        };
        taken.times.confirm = took;
    }
    shell.note(taken, finished.bytes);
    // The ledger learns of the digest before the frame leaves that completes the checkpoint.
    if !shell.sent(taken, finished.digest) {
        return Err(ShipError::Stale);
    }
    batch.frames.push(finished.end);
    link.send_all(batch.frames)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_confirmed_is_kept_together() {
        let frame = || Bytes::from(vec![0; BATCH / 2]);
        let mut batch = Batch::default();
        assert!(batch.add(frame()).is_none());
        assert_eq!(batch.add(frame()).map(|frames| frames.len()), Some(2));
        let mut batch = Batch { keeps: true, ..Batch::default() };
        assert!((0..5).all(|_| batch.add(frame()).is_none()));
        assert_eq!(batch.frames.len(), 5);
    }

    /// The one that may be real-time takes what an ordinary one sends, on one processor: it often comes when the
    /// other is in the middle of sending. It must not wait busily then, or the other one never gets to its end.
    #[test]
    fn who_is_real_time_lets_the_sender_end() {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        use nix::unistd::Pid;
        use std::time::Instant;
        const FOR: Duration = Duration::from_secs(3);
        let this = Pid::from_raw(0);
        let allowed = sched_getaffinity(this).expect("its own");
        let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true));
        let mut one = CpuSet::new();
        one.set(first.expect("a processor")).expect("it is one");
        let (send, mut receive) = tokio::sync::mpsc::channel(1 << 10);
        let begin = Instant::now();
        let (longest, taken) = std::thread::scope(|scope| {
            scope.spawn(move || {
                sched_setaffinity(this, &one).expect("one of its own");
                while begin.elapsed() < FOR {
                    let _ = send.try_send(());
                }
            });
            let taker = scope.spawn(move || {
                sched_setaffinity(this, &one).expect("one of its own");
                if let Err(error) = sched::set_fifo(PRIORITY) {
                    eprintln!("SKIPPED: {error}");
                    return (Duration::ZERO, 1);
                }
                let (mut longest, mut taken) = (Duration::ZERO, 0);
                while begin.elapsed() < FOR {
                    std::thread::sleep(Duration::from_micros(20));
                    let since = Instant::now();
                    while receive.try_recv().is_ok() {
                        taken += 1;
                    }
                    longest = longest.max(since.elapsed());
                }
                (longest, taken)
            });
            taker.join().expect("no panic")
        });
        assert!(taken > 0 && longest < Duration::from_millis(700), "{longest:?}, {taken}");
    }
}
