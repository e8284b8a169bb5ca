//! From a checkpoint to frames.
//!
//! Pages may be added in any number of calls, so that rounds of pre-copy travel while the
//! container still runs; the state and the end come after the stop. A chunk leaves as soon as it
//! is full, and at the end of each call.

use super::codec::{self, Seal};
use super::delta::{Coding, Page, PageCoder};
use super::files;
use super::message::{CheckpointEnd, Kind};
use super::queues::{self, LongQueue};
use super::shadow::{PageKey, Shadow};
use super::state::{PIECE, Pieces};
use super::{Limits, Message};
use crate::image::State;
use crate::image::pages::{Content, PAGE, PageSet, Run};
use crate::{Epoch, Generation};
use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

/// A page chunk is closed when it has this many bytes.
const CHUNK: usize = 240 << 10;

/// What stands before the pages of a run: tag, pid, address, count.
pub(super) const RUN_PREFIX: usize = 1 + 4 + 8 + 4;

pub(super) const RUN_DATA: u8 = 1;
pub(super) const RUN_DROPPED: u8 = 2;

/// Why a checkpoint cannot be put into frames.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A run names a process that the caller's table does not have.
    #[error("a run of pages belongs to process {index}, of {known} known ones")]
    UnknownProcess {
        /// The run's index.
        index: u32,
        /// Length of the table.
        known: usize,
    },
    /// A run reaches beyond the bytes of its set.
    #[error("the run of {count} pages at {start:#x} reaches beyond its buffer")]
    Short {
        /// Address of the run.
        start: u64,
        /// Its pages.
        count: u32,
    },
    /// The state is larger than the backup takes.
    #[error("the state has {len} bytes, at most {cap} are carried; socket queues are its bulk")]
    StateTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        cap: usize,
    },
    /// What the checkpoint says of volumes is larger than the backup takes.
    #[error(
        "{len} bytes of files have changed, at most {cap} are carried in one checkpoint; the first \
         one carries all files of replicated volumes"
    )]
    FilesTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        cap: usize,
    },
    /// The state does not encode.
    #[error("the state of epoch {epoch} cannot be encoded")]
    State {
        /// The epoch.
        epoch: Epoch,
        /// The encoder's reason.
        source: postcard::Error,
    },
}

/// A checkpoint that was put into frames, all but its last one.
#[derive(Debug)]
pub struct Finished {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its digest, which the acknowledgement must bring back.
    pub digest: u64,
    /// The frame that completes it. Note the digest in the
    /// [`AckLedger`](crate::ack::AckLedger) first, then send this: the acknowledgement may come
    /// at any time afterwards.
    pub end: Bytes,
    /// Pages with contents.
    pub pages: u64,
    /// Bytes of all its frames.
    pub bytes: u64,
}

/// A state that was sent.
#[derive(Default)]
struct Sent {
    bytes: Vec<u8>,
    queues: Vec<LongQueue>,
}

/// Puts the checkpoints of one connection into frames. It holds the shadow of what was sent.
pub struct CheckpointBuilder {
    shadow: Shadow,
    coder: PageCoder,
    limits: Limits,
    state: Sent,
    /// The state before it, and the epoch before [`CheckpointBuilder::last`].
    before: (Sent, Epoch),
    generation: Generation,
    epoch: Epoch,
    /// The epoch that was finished last.
    last: Epoch,
    chunk: Vec<u8>,
    digest: Xxh3,
    sums: CheckpointEnd,
    bytes: u64,
    /// Processes that pages of this checkpoint belong to.
    touched: Vec<i32>,
}

impl CheckpointBuilder {
    /// A builder for a new connection; its first checkpoint must be a full one.
    pub fn new(limits: Limits) -> Self {
        Self {
            shadow: Shadow::new(limits.pages),
            coder: PageCoder::default(),
            limits,
            state: Sent::default(),
            before: (Sent::default(), Epoch::NONE),
            generation: Generation::default(),
            epoch: Epoch::NONE,
            last: Epoch::NONE,
            chunk: Vec::new(),
            digest: Xxh3::new(),
            sums: CheckpointEnd::default(),
            bytes: 0,
            touched: Vec::new(),
        }
    }

    /// Begins a checkpoint; one that was begun before and not finished is dropped. After a
    /// dropped one the next must be full, because the backup's shadow lacks its pages.
    pub fn begin(&mut self, generation: Generation, epoch: Epoch, full: bool) -> Bytes {
        self.begin_as(generation, epoch, full, false)
    }

    /// As [`CheckpointBuilder::begin`]; a `provisional` checkpoint is one whose output does not
    /// wait for it, so that nobody may promote from it.
    pub fn begin_as(
        &mut self,
        generation: Generation,
        epoch: Epoch,
        full: bool,
        provisional: bool,
    ) -> Bytes {
        if full {
            self.shadow.clear();
            self.state = Sent::default();
        }
        self.shadow.begin();
        self.generation = generation;
        self.epoch = epoch;
        self.chunk.clear();
        self.touched.clear();
        self.digest = Xxh3::new();
        self.sums = CheckpointEnd::default();
        let mut out = Vec::new();
        codec::open(&mut out);
        let flags = codec::begin_flags(full, provisional);
        let follows = if full { Epoch::NONE } else { self.last };
        out.extend_from_slice(&follows.0.to_le_bytes());
        let seal = codec::close(&mut out, 0, Kind::CheckpointBegin, flags, generation, epoch);
        self.digest.update(&seal);
        self.bytes = out.len() as u64;
        out.into()
    }

    /// Adds pages; `pids` names the owners that the runs refer to by index ([`State::owners`],
    /// if it is known already). Full chunks, and
    /// the last one, go to `send`.
    pub fn pages(
        &mut self,
        set: &PageSet,
        pids: &[i32],
        mut send: impl FnMut(Bytes),
    ) -> Result<(), BuildError> {
        for run in &set.runs {
            let pid = *pids
                .get(run.process as usize)
                .ok_or(BuildError::UnknownProcess { index: run.process, known: pids.len() })?;
            if !self.touched.contains(&pid) {
                self.touched.push(pid);
            }
            match run.content {
                Content::Dropped => self.dropped(pid, run, &mut send),
                Content::Data(offset) => {
                    let len = run.count as usize * PAGE;
                    let bytes = offset
                        .checked_add(len)
                        .and_then(|end| set.bytes.get(offset..end))
                        .ok_or(BuildError::Short { start: run.start, count: run.count })?;
                    self.data(pid, run.start, bytes, &mut send);
                }
            }
        }
        self.flush(&mut send);
        Ok(())
    }

    /// Adds what the checkpoint says of volumes ([`crate::volume::Volumes::take`]), once.
    pub fn files(&mut self, all: &[u8], mut send: impl FnMut(Bytes)) -> Result<(), BuildError> {
        let cap = self.limits.volume_bytes;
        if all.len() > cap {
            return Err(BuildError::FilesTooLarge { len: all.len(), cap });
        }
        for offset in (0..all.len()).step_by(files::PIECE) {
            let mut out = Vec::with_capacity(codec::HEADER + files::PIECE);
            codec::open(&mut out);
            files::encode_piece(all, offset, &mut out);
            let seal = self.seal(&mut out, Kind::VolumeChunk);
            self.count_chunk(&seal, out.len());
            send(out.into());
        }
        self.sums.volume_bytes = all.len() as u64;
        Ok(())
    }

    /// Adds the state and completes the checkpoint. Everything but the last frame goes to
    /// `send`.
    pub fn finish(
        &mut self,
        state: &State,
        mut send: impl FnMut(Bytes),
    ) -> Result<Finished, BuildError> {
        let epoch = self.epoch;
        let encoded =
            postcard::to_allocvec(state).map_err(|source| BuildError::State { epoch, source })?;
        let cap = self.limits.state_bytes;
        if encoded.len() > cap {
            return Err(BuildError::StateTooLarge { len: encoded.len(), cap });
        }
        let queues = queues::find(state, &encoded);
        let before = std::mem::take(&mut self.state);
        let jumps = queues::jumps(&before.queues, &queues);
        let mut pieces = Pieces::new(&before.bytes, &encoded, &jumps);
        for offset in (0..encoded.len()).step_by(PIECE) {
            let mut out = Vec::with_capacity(codec::HEADER + PIECE + PIECE / 8);
            codec::open(&mut out);
            pieces.encode(offset, &mut self.coder, &mut out);
            let seal = self.seal(&mut out, Kind::StateChunk);
            self.count_chunk(&seal, out.len());
            send(out.into());
        }
        self.sums.state_bytes = encoded.len() as u64;
        self.state = Sent { bytes: encoded, queues };
        self.before = (before, self.last);
        // The backup drops pages of processes that ended before the stop; so does the shadow.
        let owners = state.owners();
        for pid in self.touched.drain(..) {
            if !owners.contains(&pid) {
                self.shadow.forget(pid, 0, u64::MAX);
            }
        }
        self.shadow.follow(state);
        self.sums.digest = self.digest.digest();
        let end = Message::CheckpointEnd(self.sums);
        let end = codec::encode(self.generation, epoch, &end).expect("it is shorter than its cap");
        self.bytes += end.len() as u64;
        self.last = epoch;
        let (digest, pages, bytes) = (self.sums.digest, self.sums.pages, self.bytes);
        Ok(Finished { epoch, digest, end, pages, bytes })
    }

    /// Nothing of the checkpoint that was finished last has left or will: the next one builds on what that
    /// one was to build on. `runs` and `pids` are all that was given to [`CheckpointBuilder::pages`] for it. Not for a full
    /// one, and once.
    ///
    /// Its pages are coded whole the next time: the backup may remember versions of pages that this side has
    /// forgotten, but not the other way round.
    pub fn take_back<'a>(&mut self, runs: impl IntoIterator<Item = &'a Run>, pids: &[i32]) {
        for run in runs {
            if let Some(pid) = pids.get(run.process as usize) {
                self.shadow.forget(*pid, run.start, run.count.into());
            }
        }
        self.shadow.take_back();
        (self.state, self.last) = std::mem::take(&mut self.before);
    }

    /// Bytes of memory that the versions of pages sent take.
    pub fn shadow_bytes(&self) -> usize {
        self.shadow.bytes()
    }

    fn dropped(&mut self, pid: i32, run: &Run, send: &mut impl FnMut(Bytes)) {
        self.shadow.forget(pid, run.start, run.count.into());
        self.room(RUN_PREFIX, send);
        self.run(RUN_DROPPED, pid, run.start, run.count);
    }

    fn data(&mut self, pid: i32, start: u64, bytes: &[u8], send: &mut impl FnMut(Bytes)) {
        let mut run_at = None;
        let mut count = 0u32;
        for (i, page) in bytes.as_chunks::<PAGE>().0.iter().enumerate() {
            let key = PageKey { pid, address: start.wrapping_add((i * PAGE) as u64) };
            let at = match run_at {
                Some(at) if self.chunk.len() + 3 + PAGE <= CHUNK => at,
                _ => {
                    self.close_run(run_at, count);
                    self.room(RUN_PREFIX + 3 + PAGE, send);
                    let at = self.chunk.len();
                    self.run(RUN_DATA, key.pid, key.address, 0);
                    run_at = Some(at);
                    count = 0;
                    at
                }
            };
            debug_assert!(at >= codec::HEADER);
            self.page(key, page);
            count += 1;
            self.sums.pages += 1;
        }
        self.close_run(run_at, count);
    }

    fn page(&mut self, key: PageKey, page: &Page) {
        let (chunk, coder) = (&mut self.chunk, &mut self.coder);
        let tag = chunk.len();
        chunk.extend_from_slice(&[0; 3]);
        let coding = self.shadow.replace(key, page, |previous| coder.encode(previous, page, chunk));
        chunk[tag] = coding as u8;
        let len = (chunk.len() - tag - 3) as u16;
        chunk[tag + 1..tag + 3].copy_from_slice(&len.to_le_bytes());
        if matches!(coding, Coding::Zero | Coding::Same) {
            chunk.truncate(tag + 1);
        }
    }

    fn run(&mut self, tag: u8, pid: i32, start: u64, count: u32) {
        self.chunk.push(tag);
        self.chunk.extend_from_slice(&pid.to_le_bytes());
        self.chunk.extend_from_slice(&start.to_le_bytes());
        self.chunk.extend_from_slice(&count.to_le_bytes());
        self.sums.runs += 1;
    }

    fn close_run(&mut self, at: Option<usize>, count: u32) {
        if let Some(at) = at {
            self.chunk[at + RUN_PREFIX - 4..at + RUN_PREFIX].copy_from_slice(&count.to_le_bytes());
        }
    }

    /// Makes sure that a chunk is open and has room for `more` bytes.
    fn room(&mut self, more: usize, send: &mut impl FnMut(Bytes)) {
        if self.chunk.len() + more > CHUNK {
            self.flush(send);
        }
        if self.chunk.is_empty() {
            codec::open(&mut self.chunk);
        }
    }

    fn flush(&mut self, send: &mut impl FnMut(Bytes)) {
        if self.chunk.is_empty() {
            return;
        }
        // A small chunk leaves the big buffer in place for the next.
        let mut out = if self.chunk.len() < CHUNK / 2 {
            let out = self.chunk.clone();
            self.chunk.clear();
            out
        } else {
            std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK + PAGE))
        };
        let seal = self.seal(&mut out, Kind::PageChunk);
        self.count_chunk(&seal, out.len());
        send(out.into());
    }

    fn seal(&self, out: &mut [u8], kind: Kind) -> Seal {
        codec::close(out, 0, kind, 0, self.generation, self.epoch)
    }

    fn count_chunk(&mut self, seal: &Seal, len: usize) {
        self.digest.update(seal);
        self.sums.chunks += 1;
        self.bytes += len as u64;
    }
}
