//! The commit core: the container's output, kept by epoch until the backup holds the epoch.
//!
//! Invariants: OC-1 (nothing leaves before its proof), OC-2 (in order, none lost or doubled but
//! for counted drops at the bound), OC-3 (no way around the proof, by type), RB-1 (bounded).
//!
//! ```text
//!            push                seal(e)               release(proof)
//!   frame ─────────► Buffer<Open> ──────► Buffer<Sealed> ───────────► Buffer<Released> ─► frames
//!                                            (queue)         ▲
//!                                                   proof.epoch() >= e
//! ```
//!
//! Only a released buffer shows its frames, and only two things release one: a
//! [`CommitProof`], which the check of an acknowledgement alone can make, and
//! [`CommitCore::pass_through`], which says when it is allowed.
//!
//! ```compile_fail,E0451
//! use replicator::{Epoch, Generation, ack::CommitProof};
//! let forged = CommitProof { generation: Generation(1), epoch: Epoch(7) };
//! ```
//!
//! ```compile_fail,E0599
//! use gateway::frames::commit::EpochBuffer;
//! use replicator::Epoch;
//! let sealed = EpochBuffer::new().seal(Epoch(1));
//! sealed.frames(); // only a released buffer has them
//! ```
//!
//! The core does no I/O, knows no clock and allocates nothing per frame: frames lie one behind
//! the other in chunks of [`CHUNK`] bytes, which are used again.

use super::MAX_FRAME;
use replicator::ack::CommitProof;
use replicator::{Epoch, Generation};
use std::collections::VecDeque;

/// Bytes in one chunk of a buffer.
pub const CHUNK: usize = 1 << 20;

/// Bounds of what a [`CommitCore`] holds. A frame beyond them is dropped and counted.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of frames over all buffers.
    pub bytes: usize,
    /// Frames over all buffers.
    pub frames: usize,
    /// Unused chunks kept for the next epochs; more are given back.
    pub spare_chunks: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { bytes: 256 << 20, frames: 1 << 18, spare_chunks: 32 }
    }
}

/// State of an [`EpochBuffer`] that still takes frames.
#[derive(Debug)]
pub struct Open(());

/// State of an [`EpochBuffer`] that waits for its proof.
#[derive(Debug)]
pub struct Sealed {
    epoch: Epoch,
}

/// State of an [`EpochBuffer`] whose frames may leave.
#[derive(Debug)]
pub struct Released(());

#[derive(Clone, Copy, Debug)]
struct FrameRef {
    chunk: u32,
    at: u32,
    len: u32,
}

/// The frames of one epoch. Its state is in its type: see the [module](self).
#[derive(Debug)]
pub struct EpochBuffer<S> {
    /// Each of [`CHUNK`] bytes; the last one is being filled.
    chunks: Vec<Box<[u8]>>,
    /// Bytes used of the last chunk.
    used: usize,
    frames: Vec<FrameRef>,
    bytes: usize,
    state: S,
}

impl<S> EpochBuffer<S> {
    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether it holds no frame.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes of its frames.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn into_state<T>(self, state: T) -> EpochBuffer<T> {
        let EpochBuffer { chunks, used, frames, bytes, state: _ } = self;
        EpochBuffer { chunks, used, frames, bytes, state }
    }
}

impl Default for EpochBuffer<Open> {
    fn default() -> Self {
        Self::new()
    }
}

impl EpochBuffer<Open> {
    /// An empty buffer.
    pub fn new() -> Self {
        Self { chunks: Vec::new(), used: 0, frames: Vec::new(), bytes: 0, state: Open(()) }
    }

    /// Closes the buffer: it is the output of `epoch`, complete.
    pub fn seal(self, epoch: Epoch) -> EpochBuffer<Sealed> {
        self.into_state(Sealed { epoch })
    }

    /// Space for one frame.
    fn room(&mut self, spare: &mut Vec<Box<[u8]>>) -> &mut [u8] {
        if self.chunks.is_empty() || CHUNK - self.used < MAX_FRAME {
            self.chunks.push(spare.pop().unwrap_or_else(|| vec![0; CHUNK].into_boxed_slice()));
            self.used = 0;
        }
        let last = self.chunks.len() - 1;
        &mut self.chunks[last][self.used..self.used + MAX_FRAME]
    }

    /// The frame that was written to the start of [`EpochBuffer::room`] belongs to the epoch.
    fn keep(&mut self, len: usize) {
        let (chunk, at) = (self.chunks.len() as u32 - 1, self.used as u32);
        self.frames.push(FrameRef { chunk, at, len: len as u32 });
        self.used += len;
        self.bytes += len;
    }
}

impl EpochBuffer<Sealed> {
    /// The epoch whose output this is.
    pub fn epoch(&self) -> Epoch {
        self.state.epoch
    }

    /// Lets the frames go, if the proof covers this epoch; else the buffer comes back unchanged.
    /// The caller has checked that the proof is of its own generation.
    pub fn release(self, proof: &CommitProof) -> Result<EpochBuffer<Released>, Self> {
        if self.state.epoch <= proof.epoch() {
            Ok(self.into_state(Released(())))
        } else {
            Err(self)
        }
    }
}

impl EpochBuffer<Released> {
    /// The frames in the order the container sent them.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames
            .iter()
            .map(|f| &self.chunks[f.chunk as usize][f.at as usize..(f.at + f.len) as usize])
    }
}

/// Buffers that may leave, oldest first. Give it back with [`CommitCore::recycle`].
#[derive(Debug, Default)]
#[must_use = "the frames are in nobody else's hands: dropping this loses them"]
pub struct Output {
    buffers: Vec<EpochBuffer<Released>>,
}

impl Output {
    /// All frames, in the order the container sent them.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.buffers.iter().flat_map(EpochBuffer::frames)
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.buffers.iter().map(EpochBuffer::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why output may leave without proof; see [`CommitCore::pass_through`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unprotected {
    /// No backup has ever been able to promote: protection has not started.
    NotYetProtected,
    /// The arbiter has granted that this side acts alone, so that no backup will promote.
    GrantedByArbiter,
}

/// What became of a pushed frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Held, and the first of its epoch: output waits.
    First,
    /// Held.
    Held,
    /// Dropped and counted: a bound was reached.
    Dropped,
}

/// What one [`CommitCore::seal`] closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SealedOutput {
    /// Frames in the epoch.
    pub frames: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// An order that cannot be followed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Nothing is held, so nothing can be sealed or released.
    #[error("epoch {0}: the output is not protected; start protection first")]
    NotProtected(Epoch),
    /// The epoch is not after the last one sealed.
    #[error("cannot seal epoch {asked} after epoch {last}")]
    Order {
        /// What was to be sealed.
        asked: Epoch,
        /// The last epoch that was sealed.
        last: Epoch,
    },
    /// The proof is of another generation.
    #[error("proof of generation {got} in generation {ours}: another side may act now")]
    Generation {
        /// The proof's.
        got: Generation,
        /// Ours.
        ours: Generation,
    },
}

/// Totals since the core was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitCounters {
    /// Frames held now.
    pub held_frames: usize,
    /// Bytes held now.
    pub held_bytes: usize,
    /// Epochs sealed and not released.
    pub held_epochs: usize,
    /// Frames let go.
    pub released_frames: u64,
    /// Bytes let go.
    pub released_bytes: u64,
    /// Epochs let go.
    pub released_epochs: u64,
    /// Frames dropped at a bound.
    pub dropped_frames: u64,
    /// Frames given up by [`CommitCore::abandon`].
    pub abandoned_frames: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    PassThrough,
    Protected { generation: Generation, last_sealed: Epoch },
}

/// The buffers of one container, oldest first. It starts in pass-through.
#[derive(Debug)]
pub struct CommitCore {
    bounds: Bounds,
    mode: Mode,
    open: EpochBuffer<Open>,
    sealed: VecDeque<EpochBuffer<Sealed>>,
    spare_chunks: Vec<Box<[u8]>>,
    spare_frames: Vec<Vec<FrameRef>>,
    counters: CommitCounters,
}

impl CommitCore {
    /// An empty core in pass-through.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            mode: Mode::PassThrough,
            open: EpochBuffer::new(),
            sealed: VecDeque::new(),
            spare_chunks: Vec::new(),
            spare_frames: Vec::new(),
            counters: CommitCounters::default(),
        }
    }

    /// Whether output leaves without proof.
    pub fn is_pass_through(&self) -> bool {
        self.mode == Mode::PassThrough
    }

    /// The epoch whose output is being collected; none in pass-through.
    pub fn open_epoch(&self) -> Option<Epoch> {
        match self.mode {
            Mode::PassThrough => None,
            Mode::Protected { last_sealed, .. } => Some(last_sealed.next()),
        }
    }

    /// Whether the open epoch has output, for which a commit is worth while.
    pub fn output_waits(&self) -> bool {
        !self.open.is_empty()
    }

    /// Frames that wait in the open epoch.
    pub fn open_frames(&self) -> usize {
        self.open.len()
    }

    /// From now on every frame waits for a proof of `generation`. The next epoch to be sealed is
    /// after `last_sealed` ([`Epoch::NONE`] before the first checkpoint). Call it while the
    /// container is stopped for the checkpoint that starts protection: what left before belongs
    /// to that checkpoint's past, and nothing is held at this moment, so nothing overtakes.
    ///
    /// In protection already (a new generation), frames held before stay in their epochs and wait
    /// for the new generation's proofs.
    pub fn protect(&mut self, generation: Generation, last_sealed: Epoch) {
        self.mode = Mode::Protected { generation, last_sealed };
    }

    /// From now on output leaves without proof, first of all what was held, which comes back in
    /// order and must be written before anything new.
    ///
    /// The rule: allowed only where no backup can promote, because a backup that did would know
    /// nothing of what the clients have seen. The argument says which of the two cases it is.
    pub fn pass_through(&mut self, why: Unprotected) -> Output {
        let _ = why;
        self.mode = Mode::PassThrough;
        let mut buffers: Vec<_> =
            self.sealed.drain(..).map(|b| b.into_state(Released(()))).collect();
        let open = self.fresh();
        buffers.push(open.into_state(Released(())));
        self.count_released(&buffers);
        Output { buffers }
    }

    /// Space of [`MAX_FRAME`] bytes to read the next frame into; [`CommitCore::pushed`] then
    /// makes it part of the open epoch.
    pub fn room(&mut self) -> &mut [u8] {
        self.open.room(&mut self.spare_chunks)
    }

    /// The frames of the open epoch, in the order in which the container sent them.
    pub(super) fn frames_of_open_epoch(&self) -> impl Iterator<Item = &[u8]> {
        self.open
            .frames
            .iter()
            .map(|f| &self.open.chunks[f.chunk as usize][f.at as usize..(f.at + f.len) as usize])
    }

    /// Adds the first `len` bytes of [`CommitCore::room`] to the open epoch.
    ///
    /// # Panics
    /// If there was no call of `room` before, or `len` exceeds it.
    pub fn pushed(&mut self, len: usize) -> Pushed {
        assert!(len <= MAX_FRAME && !self.open.chunks.is_empty(), "room() comes first");
        let c = &mut self.counters;
        if c.held_bytes + len > self.bounds.bytes || c.held_frames >= self.bounds.frames {
            c.dropped_frames += 1;
            return Pushed::Dropped;
        }
        c.held_bytes += len;
        c.held_frames += 1;
        let first = self.open.is_empty();
        self.open.keep(len);
        if first { Pushed::First } else { Pushed::Held }
    }

    /// Copies a frame into the open epoch. One longer than [`MAX_FRAME`] is dropped.
    pub fn push(&mut self, frame: &[u8]) -> Pushed {
        let Some(room) = self.room().get_mut(..frame.len()) else {
            self.counters.dropped_frames += 1;
            return Pushed::Dropped;
        };
        room.copy_from_slice(frame);
        self.pushed(frame.len())
    }

    /// Closes `epoch`: what was pushed since the last seal is its output.
    pub fn seal(&mut self, epoch: Epoch) -> Result<SealedOutput, CommitError> {
        let Mode::Protected { last_sealed, .. } = &mut self.mode else {
            return Err(CommitError::NotProtected(epoch));
        };
        if epoch <= *last_sealed {
            return Err(CommitError::Order { asked: epoch, last: *last_sealed });
        }
        *last_sealed = epoch;
        let sealed = self.fresh().seal(epoch);
        let summary = SealedOutput { frames: sealed.len(), bytes: sealed.bytes() };
        self.sealed.push_back(sealed);
        self.counters.held_epochs += 1;
        Ok(summary)
    }

    /// Lets go the output of every sealed epoch that the proof covers, oldest first.
    pub fn release(&mut self, proof: CommitProof) -> Result<Output, CommitError> {
        match self.mode {
            Mode::PassThrough => return Err(CommitError::NotProtected(proof.epoch())),
            Mode::Protected { generation, .. } if generation != proof.generation() => {
                return Err(CommitError::Generation { got: proof.generation(), ours: generation });
            }
            Mode::Protected { .. } => {}
        }
        let mut buffers = Vec::new();
        while let Some(buffer) = self.sealed.pop_front() {
            match buffer.release(&proof) {
                Ok(released) => buffers.push(released),
                Err(not_yet) => {
                    self.sealed.push_front(not_yet);
                    break;
                }
            }
        }
        self.count_released(&buffers);
        Ok(Output { buffers })
    }

    /// Throws away everything held, for the side that lost an arbitration: none of it may ever
    /// leave. Returns the number of frames.
    pub fn abandon(&mut self) -> usize {
        let mut buffers: Vec<_> =
            self.sealed.drain(..).map(|b| b.into_state(Released(()))).collect();
        buffers.push(self.fresh().into_state(Released(())));
        let frames = std::mem::take(&mut self.counters.held_frames);
        self.counters.held_bytes = 0;
        self.counters.held_epochs = 0;
        self.counters.abandoned_frames += frames as u64;
        self.recycle(Output { buffers });
        frames
    }

    /// Takes buffers back whose frames have left, to use their memory again.
    pub fn recycle(&mut self, output: Output) {
        for buffer in output.buffers {
            for chunk in buffer.chunks {
                if self.spare_chunks.len() < self.bounds.spare_chunks {
                    self.spare_chunks.push(chunk);
                }
            }
            if self.spare_frames.len() < 8 {
                let mut frames = buffer.frames;
                frames.clear();
                self.spare_frames.push(frames);
            }
        }
    }

    /// Totals and what is held.
    pub fn counters(&self) -> CommitCounters {
        self.counters
    }

    /// Puts an empty buffer in the place of the open one, which it returns.
    fn fresh(&mut self) -> EpochBuffer<Open> {
        let mut next = EpochBuffer::new();
        next.frames = self.spare_frames.pop().unwrap_or_default();
        std::mem::replace(&mut self.open, next)
    }

    fn count_released(&mut self, buffers: &[EpochBuffer<Released>]) {
        let c = &mut self.counters;
        for b in buffers {
            c.held_frames -= b.len();
            c.held_bytes -= b.bytes();
            c.released_frames += b.len() as u64;
            c.released_bytes += b.bytes() as u64;
        }
        let epochs = c.held_epochs - self.sealed.len();
        c.held_epochs -= epochs;
        c.released_epochs += epochs as u64;
    }
}

#[cfg(test)]
mod tests;
