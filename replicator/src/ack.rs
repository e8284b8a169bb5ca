//! The check of an acknowledgement, and the proof that it passed (invariant OC-3).
//!
//! A [`CommitProof`] can be made here and nowhere else: the commit core of the gateway takes one
//! by value to release an epoch, so no code path can release output that the backup does not
//! hold.

use crate::{Epoch, Generation};
use std::collections::VecDeque;

/// Proof that the backup holds every byte of all checkpoints up to [`CommitProof::epoch`].
#[derive(Debug, PartialEq, Eq)]
pub struct CommitProof {
    generation: Generation,
    epoch: Epoch,
}

impl CommitProof {
    /// The generation that it holds for.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The newest epoch that it covers.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

/// Why an acknowledgement proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// It is of another generation.
    #[error("acknowledgement of generation {got}, we are in {ours}")]
    Generation {
        /// The generation in the message.
        got: Generation,
        /// Ours.
        ours: Generation,
    },
    /// No checkpoint of that number is waiting for one.
    #[error("acknowledgement of epoch {got}, which is not in flight")]
    Unknown {
        /// The epoch in the message.
        got: Epoch,
    },
    /// The backup received other bytes than were sent.
    #[error("acknowledgement of epoch {epoch} with digest {got:016x}, sent {sent:016x}")]
    Digest {
        /// The epoch in the message.
        epoch: Epoch,
        /// Digest in the message.
        got: u64,
        /// Digest of what was sent.
        sent: u64,
    },
}

/// Checkpoints sent and not acknowledged, in order, with the digest of each.
#[derive(Debug)]
pub struct AckLedger {
    generation: Generation,
    in_flight: VecDeque<(Epoch, u64)>,
    off: bool,
}

impl AckLedger {
    /// An empty ledger of a generation.
    pub fn new(generation: Generation) -> Self {
        Self { generation, in_flight: VecDeque::new(), off: false }
    }

    /// A ledger that proves each epoch as soon as it is sent. UNSAFE for users: output leaves
    /// before the backup holds its checkpoint. It exists for one purpose, as the control of an
    /// experiment: with it a failover must lose acknowledged writes, which shows that the
    /// verifying client can see a loss.
    pub fn without_output_commit(generation: Generation) -> Self {
        Self { generation, in_flight: VecDeque::new(), off: true }
    }

    /// Its generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// An empty ledger of the same kind, of this generation.
    pub fn empty_of(&self, generation: Generation) -> Self {
        Self { generation, in_flight: VecDeque::new(), off: self.off }
    }

    /// Whether this is the control, see [`AckLedger::without_output_commit`].
    pub fn is_control(&self) -> bool {
        self.off
    }

    /// Notes that checkpoint `epoch` was handed to the transport; its whole encoding has this
    /// digest. Gives a proof only in the control.
    pub fn sent(&mut self, epoch: Epoch, digest: u64) -> Option<CommitProof> {
        self.in_flight.push_back((epoch, digest));
        self.off.then_some(CommitProof { generation: self.generation, epoch })
    }

    /// Number of checkpoints in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Checks an acknowledgement. Acknowledgements are cumulative: one of epoch e covers all
    /// before it, because the backup assembles checkpoints in order.
    pub fn acknowledge(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        digest: u64,
    ) -> Result<CommitProof, AckError> {
        if generation != self.generation {
            return Err(AckError::Generation { got: generation, ours: self.generation });
        }
        let at = self
            .in_flight
            .iter()
            .position(|(e, _)| *e == epoch)
            .ok_or(AckError::Unknown { got: epoch })?;
        let sent = self.in_flight[at].1;
        if sent != digest {
            return Err(AckError::Digest { epoch, got: digest, sent });
        }
        self.in_flight.drain(..=at);
        Ok(CommitProof { generation, epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_matching_ack_proves() {
        let mut l = AckLedger::new(Generation(3));
        assert_eq!(l.sent(Epoch(1), 10), None);
        assert_eq!(l.sent(Epoch(2), 20), None);
        assert!(matches!(
            l.acknowledge(Generation(2), Epoch(1), 10),
            Err(AckError::Generation { .. })
        ));
        assert!(matches!(l.acknowledge(Generation(3), Epoch(1), 11), Err(AckError::Digest { .. })));
        assert!(matches!(l.acknowledge(Generation(3), Epoch(3), 0), Err(AckError::Unknown { .. })));
        assert_eq!(l.acknowledge(Generation(3), Epoch(2), 20).unwrap().epoch(), Epoch(2));
        assert_eq!(l.in_flight(), 0);
        assert!(l.acknowledge(Generation(3), Epoch(1), 10).is_err(), "covered already");
    }

    #[test]
    fn the_control_proves_at_once() {
        let mut l = AckLedger::without_output_commit(Generation(1));
        assert_eq!(l.sent(Epoch(1), 1).unwrap().epoch(), Epoch(1));
    }
}
