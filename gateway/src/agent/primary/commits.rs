//! A checkpoint's way from the stop that took it to the release of its output, and its figures.

use super::{Shell, lock};
use crate::agent::journal::monotonic_us;
use crate::agent::status::{CaptureKinds, EpochRecord, StopStages};
use crate::agent::stop::Taken;
use replicator::ack::CommitProof;
use replicator::transport::PrimaryLink;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

// What the shipper does with a checkpoint that was taken.
impl Shell {
    /// The link that a checkpoint goes over; none if it was taken for another one.
    pub(in crate::agent) fn link_for(&self, taken: &Taken) -> Option<Arc<PrimaryLink>> {
        self.current_link().filter(|(link, _)| *link == taken.link).map(|(_, l)| l)
    }

    /// Notes a checkpoint's figures until its acknowledgement.
    pub(in crate::agent) fn note(&self, taken: &Taken, wire_bytes: u64) {
        // Its output did not wait for it: there is no commit to tell of.
        if taken.provisional {
            return;
        }
        let t = &taken.times;
        let sealed = taken.sealed.unwrap_or_else(Instant::now);
        let us = |d: Duration| d.as_micros() as u64;
        let record = EpochRecord {
            epoch: taken.epoch.0,
            generation: taken.generation.0,
            at_us: monotonic_us().saturating_sub(us(sealed.elapsed())),
            interval_us: us(taken.interval),
            stop_us: us(t.total),
            stop_us_by_stage: StopStages {
                hold: us(t.hold),
                freeze: us(t.freeze),
                seal: us(t.seal.saturating_sub(taken.volumes)),
                volumes: us(taken.volumes),
                memory: us(t.memory),
                threads: us(t.threads),
                files: us(t.files),
                thaw: us(t.thaw),
            },
            capture_us_by_kind: CaptureKinds {
                memory: us(t.kinds.memory),
                objects: us(t.kinds.objects),
                threads: us(t.kinds.threads),
                timers: us(t.kinds.timers),
                descriptors: us(t.kinds.descriptors),
                in_flight: us(t.kinds.in_flight),
            },
            confirm_us: us(t.confirm),
            stop_pages: t.stop_pages as u64,
            dirty_pages: t.pages as u64,
            wire_bytes,
            commit_us: 0,
            frames: 0,
        };
        lock(&self.records).insert(taken.epoch.0, (record, sealed));
    }

    /// Processor time that the shipper has used so far.
    pub(in crate::agent) fn shipping(&self) -> Duration {
        Duration::from_nanos(self.shipping.load(Ordering::Relaxed))
    }

    /// A checkpoint has left the shipper, sent or dropped; it has used `time` so far, in all.
    pub(in crate::agent) fn shipped(&self, time: Duration) {
        self.shipping.store(time.as_nanos() as u64, Ordering::Relaxed);
        self.unsent.fetch_sub(1, Ordering::SeqCst);
        self.step();
    }
}

// What the release thread does with a proof.
impl Shell {
    /// Adds the figures of the epochs that are released to `told`.
    fn release(&self, proof: CommitProof, told: &mut Vec<EpochRecord>) {
        let epoch = proof.epoch();
        let gate = self.gate.get().filter(|_| !self.control);
        let released = gate.map_or(Ok(0), |gate| gate.release(proof));
        let now = Instant::now();
        let frames = match released {
            Ok(frames) => frames,
            // It has left already, without proof.
            Err(_) if lock(&self.core).is_alone() => return,
            Err(error) => {
                tracing::error!(container = self.name, %epoch, %error, "output stays");
                return;
            }
        };
        let records = {
            let mut waiting = lock(&self.records);
            let later = waiting.split_off(&(epoch.0 + 1));
            std::mem::replace(&mut *waiting, later)
        };
        told.extend(records.into_values().map(|(record, sealed)| EpochRecord {
            commit_us: (now - sealed).as_micros() as u64,
            frames: frames as u64,
            ..record
        }));
    }

    fn tell(&self, told: &mut Vec<EpochRecord>) {
        let mut journal = lock(&self.journal);
        let name = self.name();
        let stops = metrics::histogram!("nilicon_stop_seconds", "container" => name.clone());
        let dirty = metrics::histogram!("nilicon_dirty_pages", "container" => name.clone());
        let wire = metrics::counter!("nilicon_wire_bytes_total", "container" => name.clone());
        let commits = metrics::histogram!("nilicon_commit_seconds", "container" => name);
        let seconds = |us| Duration::from_micros(us).as_secs_f64();
        for record in told.iter() {
            stops.record(seconds(record.stop_us));
            dirty.record(record.dirty_pages as f64);
            wire.increment(record.wire_bytes);
            commits.record(seconds(record.commit_us));
        }
        journal.write(told);
        told.clear();
    }
}

/// Epochs whose figures are written together, and how long they wait at most: whoever was just answered wants the
/// processor now.
const TOGETHER: usize = 16;
const SOON: Duration = Duration::from_millis(20);

/// Carries releases out, in order, until the shell is gone or its container's time here ends.
pub(in crate::agent) fn release_all(
    shell: Arc<Shell>,
    proofs: std::sync::mpsc::Receiver<Option<CommitProof>>,
) {
    let mut told = Vec::with_capacity(TOGETHER);
    while !shell.must_end() {
        let proof = match told.is_empty() {
            true => proofs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => proofs.recv_timeout(SOON),
        };
        match proof {
            Ok(None) => continue,
            Ok(Some(proof)) => {
                shell.release(proof, &mut told);
                if told.len() < TOGETHER {
                    continue;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        shell.tell(&mut told);
    }
    // What was proven before the end, as in a switchover, leaves.
    proofs.try_iter().flatten().for_each(|proof| shell.release(proof, &mut told));
    shell.tell(&mut told);
}
