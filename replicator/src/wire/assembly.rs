//! From frames to a checkpoint, whole or not at all (CP-2).
//!
//! ```text
//!          Begin                      End, all matches             take
//!   Idle ---------> Open(parts) ----------------------> Complete ---------> Idle
//!    ^                 | anything else
//!    +----- reset -----+  (the error ends the connection)
//! ```
//!
//! Pages are decoded as they arrive, into the checkpoint's own buffer; the shadow is only read
//! until the checkpoint is complete, so an incomplete one leaves no trace in it.
//!
//! Of a page in which little has changed only that is kept, as edits ([`Edits`]): neither is the rest of it
//! copied here, nor into the shadow, nor into the spare. Edits stand on what the spare holds. So pages of
//! mappings that are new, which the spare makes anew, are put together from the shadow.

use super::builder::{RUN_DATA, RUN_DROPPED, RUN_PREFIX};
use super::codec::{Fault, Frame, WireError};
use super::delta::{Coding, Page, decode_edits, decode_onto};
use super::files;
use super::message::{CheckpointEnd, Kind, Message};
use super::shadow::{PageKey, PageMap, Shadow};
use super::state::decode_piece;
use crate::image::State;
use crate::image::pages::{Content, Edit, Edits, PAGE, PageSet, Run};
use crate::volume::MOST_BYTES;
use crate::{Epoch, Generation};
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

/// Memory bounds; both sides use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages in one checkpoint, and pages in the shadow.
    pub pages: usize,
    /// Runs of pages in one checkpoint.
    pub runs: usize,
    /// Bytes of the encoded state.
    pub state_bytes: usize,
    /// Bytes that one checkpoint says of volumes.
    pub volume_bytes: usize,
}

impl Default for Limits {
    /// 16 GiB of pages, four million runs, 256 MiB of state, of files a quarter more than their contents may be.
    fn default() -> Self {
        let volume_bytes = (MOST_BYTES + MOST_BYTES / 4) as usize;
        Self { pages: 4 << 20, runs: 4 << 20, state_bytes: 256 << 20, volume_bytes }
    }
}

/// A complete checkpoint, every byte of it received and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its generation.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
    /// Whether it builds on none before.
    pub full: bool,
    /// The epoch of the one that it builds on, if it is not full.
    pub follows: Epoch,
    /// The state.
    pub state: Arc<State>,
    /// The pages that changed a little: against the checkpoint before, and before `pages`.
    pub edits: Edits,
    /// The pages that changed. Where two runs hold a page, the later says what it is.
    pub pages: PageSet,
    /// What it says of volumes, for [`crate::volume::Volumes`]; empty if no file has changed.
    pub files: Vec<u8>,
}

/// What an acknowledgement of a complete checkpoint says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Generation of the checkpoint.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
    /// The digest that this side computed.
    pub digest: u64,
    /// The checkpoint's output did not wait for it: nobody may promote from it.
    pub provisional: bool,
}

/// What a frame led to.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// More frames are needed.
    Partial,
    /// The checkpoint is complete. Call [`Assembly::fold`] before the next frame, best after the
    /// acknowledgement has left.
    Complete(Receipt, Arc<Checkpoint>),
}

struct Open {
    generation: Generation,
    epoch: Epoch,
    full: bool,
    follows: Epoch,
    provisional: bool,
    digest: Xxh3,
    sums: CheckpointEnd,
    state: Vec<u8>,
    edits: Edits,
    pages: PageSet,
    files: Vec<u8>,
    placed: PageMap<Placed>,
}

/// What is there of a page of a checkpoint that arrives.
#[derive(Clone, Copy, Debug)]
enum Placed {
    /// It stands at this offset of the set's bytes.
    At(usize),
    /// The version before, with edits.
    Edited,
    /// It was dropped.
    Dropped,
}

/// Most edits of one page that are kept as such: each is a range of its own for the kernel, and at some
/// number of them a whole page is written sooner.
const MAX_EDITS: usize = 8;

/// Collects the checkpoints of one connection.
pub struct Assembly {
    limits: Limits,
    shadow: Shadow,
    state: Vec<u8>,
    last: Option<(Generation, Epoch)>,
    open: Option<Box<Open>>,
    complete: Option<Arc<Checkpoint>>,
    /// What the last checkpoint took, as the next one will.
    room: Room,
}

/// Room for the parts of a checkpoint that arrives.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    edits: usize,
    edited_bytes: usize,
    bytes: usize,
    placed: usize,
}

/// Bytes of pages that room is made for in advance: a full copy may have much more.
const MOST_ROOM: usize = 32 << 20;

impl Assembly {
    /// An assembly for a new connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            // Twice the sender's: at its limit the sender may remember a page that stands in
            // another order here.
            shadow: Shadow::new(limits.pages.saturating_mul(2)),
            state: Vec::new(),
            last: None,
            open: None,
            complete: None,
            room: Room::default(),
        }
    }

    /// Takes a frame of the checkpoint stream. After an error the incomplete checkpoint is gone
    /// and the connection must end: what follows has no base.
    pub fn push(&mut self, frame: &Frame) -> Result<Progress, WireError> {
        self.fold();
        let result = match &frame.message {
            Message::CheckpointBegin { full, provisional, follows } => {
                self.begin(frame, *full, *provisional, *follows)
            }
            Message::StateChunk(payload) => self.chunk(frame, |open, shared| {
                let cap = shared.limits.state_bytes;
                decode_piece(shared.state, frame.at + HEADER, payload, cap, &mut open.state)
            }),
            Message::PageChunk(payload) => self.chunk(frame, |open, shared| {
                PageReader { at: frame.at + HEADER, whole: payload.len(), rest: payload }
                    .read(open, shared)
            }),
            Message::VolumeChunk(payload) => self.chunk(frame, |open, shared| {
                let cap = shared.limits.volume_bytes;
                files::decode_piece(frame.at + HEADER, payload, cap, &mut open.files)
            }),
            Message::CheckpointEnd(end) => self.end(frame, end),
            other => Err(out_of_place(frame, other.kind(), "it is no part of a checkpoint")),
        };
        if result.is_err() {
            self.open = None;
        }
        result
    }

    /// Whether a checkpoint is on its way.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Takes the last complete checkpoint into the shadow. This is the costly part of a
    /// completion (a copy of each page) and not needed for the acknowledgement.
    pub fn fold(&mut self) {
        let Some(checkpoint) = self.complete.take() else { return };
        let Checkpoint { state, pages, edits, .. } = &*checkpoint;
        let owners = state.owners();
        self.shadow.begin();
        for edit in &edits.list {
            let Some(&pid) = owners.get(edit.process as usize) else { continue };
            let key = PageKey { pid, address: edit.page() };
            self.shadow.edit(key, edit.offset(), edits.of(edit));
        }
        for run in &pages.runs {
            let Some(&pid) = owners.get(run.process as usize) else { continue };
            match run.content {
                Content::Dropped => self.shadow.forget(pid, run.start, run.count.into()),
                Content::Data(offset) => {
                    let bytes = &pages.bytes[offset..][..run.count as usize * PAGE];
                    for (i, page) in bytes.as_chunks::<PAGE>().0.iter().enumerate() {
                        let address = run.start.wrapping_add((i * PAGE) as u64);
                        self.shadow.put(PageKey { pid, address }, page);
                    }
                }
            }
        }
        self.shadow.follow(state);
    }

    /// The versions of pages held, for tests.
    #[cfg(test)]
    pub(super) fn versions(&mut self) -> Vec<(PageKey, Page)> {
        self.fold();
        self.shadow.versions()
    }

    fn begin(
        &mut self,
        frame: &Frame,
        full: bool,
        provisional: bool,
        follows: Epoch,
    ) -> Result<Progress, WireError> {
        let (generation, epoch) = (frame.generation, frame.epoch);
        let kind = Kind::CheckpointBegin;
        if self.open.is_some() {
            return Err(out_of_place(frame, kind, "the one before has not ended"));
        }
        match self.last {
            _ if epoch == Epoch::NONE => {
                return Err(out_of_place(frame, kind, "epoch 0 is no checkpoint"));
            }
            None if !full => {
                return Err(out_of_place(frame, kind, "the first must be a full copy"));
            }
            Some((g, e)) if g != generation || epoch <= e => {
                return Err(out_of_place(frame, kind, "it does not follow the one before"));
            }
            _ if full != (follows == Epoch::NONE) => {
                return Err(out_of_place(frame, kind, "a full copy follows none, and only that"));
            }
            Some((_, e)) if !full && follows != e => {
                return Err(out_of_place(
                    frame,
                    kind,
                    "the checkpoint that it builds on is missing",
                ));
            }
            _ => {}
        }
        if full {
            self.shadow.clear();
            self.state.clear();
        }
        let room = self.room;
        let mut digest = Xxh3::new();
        digest.update(&frame.seal);
        self.open = Some(Box::new(Open {
            generation,
            epoch,
            full,
            follows,
            provisional,
            digest,
            sums: CheckpointEnd::default(),
            state: Vec::new(),
            edits: Edits {
                list: Vec::with_capacity(room.edits),
                bytes: Vec::with_capacity(room.edited_bytes),
            },
            pages: PageSet { runs: Vec::new(), bytes: Vec::with_capacity(room.bytes) },
            files: Vec::new(),
            placed: PageMap::with_capacity_and_hasher(room.placed, Default::default()),
        }));
        Ok(Progress::Partial)
    }

    fn chunk(
        &mut self,
        frame: &Frame,
        decode: impl FnOnce(&mut Open, &Shared<'_>) -> Result<(), WireError>,
    ) -> Result<Progress, WireError> {
        let open = expect_open(&mut self.open, frame)?;
        open.digest.update(&frame.seal);
        open.sums.chunks += 1;
        let shared = Shared { shadow: &self.shadow, state: &self.state, limits: self.limits };
        decode(open, &shared)?;
        Ok(Progress::Partial)
    }

    fn end(&mut self, frame: &Frame, end: &CheckpointEnd) -> Result<Progress, WireError> {
        let open = expect_open(&mut self.open, frame)?;
        open.sums.digest = open.digest.digest();
        open.sums.state_bytes = open.state.len() as u64;
        open.sums.volume_bytes = open.files.len() as u64;
        let at = frame.at + HEADER;
        if open.sums != *end {
            let what = format!("announces {end:?}, received {:?}", open.sums);
            return Err(WireError::payload(at, Kind::CheckpointEnd, what));
        }
        let state: State = match postcard::take_from_bytes(&open.state) {
            Ok((state, [])) => state,
            Ok((_, rest)) => {
                let what = format!("{} bytes are left over behind the state", rest.len());
                return Err(WireError::payload(at, Kind::CheckpointEnd, what));
            }
            Err(e) => {
                let what = format!("the state does not decode: {e}");
                return Err(WireError::payload(at, Kind::CheckpointEnd, what));
            }
        };
        let Some(open) = self.open.take() else { return Ok(Progress::Partial) };
        let Open {
            generation,
            epoch,
            full,
            follows,
            provisional,
            mut edits,
            mut pages,
            files,
            sums,
            state: bytes,
            placed,
            ..
        } = *open;
        self.room = Room {
            edits: edits.list.len(),
            edited_bytes: edits.bytes.len(),
            bytes: pages.bytes.len(),
            placed: placed.len(),
        };
        if full || self.room.bytes > MOST_ROOM {
            self.room = Room::default();
        }
        by_index(&mut edits, &mut pages, &state);
        put_together(&self.shadow, &state, &mut edits, &mut pages);
        let state = Arc::new(state);
        self.state = bytes;
        self.last = Some((generation, epoch));
        let checkpoint =
            Checkpoint { generation, epoch, full, follows, state, edits, pages, files };
        let checkpoint = Arc::new(checkpoint);
        self.complete = Some(checkpoint.clone());
        let receipt = Receipt { generation, epoch, digest: sums.digest, provisional };
        Ok(Progress::Complete(receipt, checkpoint))
    }
}

const HEADER: u64 = super::codec::HEADER as u64;

fn out_of_place(frame: &Frame, kind: Kind, why: &'static str) -> WireError {
    WireError { at: frame.at, fault: Fault::OutOfPlace { kind, why } }
}

fn expect_open<'a>(
    open: &'a mut Option<Box<Open>>,
    frame: &Frame,
) -> Result<&'a mut Open, WireError> {
    let kind = frame.message.kind();
    match open {
        Some(o) if (o.generation, o.epoch) == (frame.generation, frame.epoch) => Ok(o),
        Some(_) => Err(out_of_place(frame, kind, "it is of another epoch than its begin")),
        None => Err(out_of_place(frame, kind, "no checkpoint has begun")),
    }
}

/// While a checkpoint arrives, runs name their owner by its key; now the order of owners is
/// known. Pages of those that ended before the stop fall away.
fn by_index(edits: &mut Edits, pages: &mut PageSet, state: &State) {
    let owners = state.owners();
    let mut last = None;
    let mut name = |process: &mut u32| {
        let pid = *process as i32;
        let index = match last {
            Some((p, index)) if p == pid => index,
            _ => owners.iter().position(|p| *p == pid),
        };
        last = Some((pid, index));
        *process = index.unwrap_or(0) as u32;
        index.is_some()
    };
    pages.runs.retain_mut(|run| name(&mut run.process));
    edits.list.retain_mut(|edit| name(&mut edit.process));
}

/// Makes whole pages of the edited ones that lie in new mappings, where the spare does not hold the version
/// before. Edits that change nothing are dropped.
fn put_together(shadow: &Shadow, state: &State, edits: &mut Edits, pages: &mut PageSet) {
    let is_new = |edit: &Edit| {
        let process = state.processes.get(edit.process as usize);
        let mappings = process.map_or(&[][..], |p| &p.mappings);
        let at = mappings.partition_point(|m| m.end <= edit.start);
        mappings.get(at).is_some_and(|m| m.start <= edit.start && m.fresh)
    };
    let mut whole: Vec<Edit> = Vec::new();
    if state.processes.iter().any(|p| p.mappings.iter().any(|m| m.fresh)) {
        edits.list.retain(|edit| {
            let new = is_new(edit);
            if new {
                whole.push(*edit);
            }
            !new
        });
    }
    edits.list.retain(|edit| edit.len > 0);
    // In a stable order: of one page, as they were.
    whole.sort_by_key(|edit| (edit.process, edit.page()));
    let mut runs = Vec::new();
    for of_page in whole.chunk_by(|a, b| (a.process, a.page()) == (b.process, b.page())) {
        let Edit { process, .. } = of_page[0];
        let (pid, address) = (state.processes[process as usize].pid, of_page[0].page());
        let Some(version) = shadow.get(PageKey { pid, address }) else { continue };
        let at = pages.bytes.len();
        pages.bytes.extend_from_slice(version);
        for edit in of_page {
            pages.bytes[at + edit.offset()..][..edit.len].copy_from_slice(edits.of(edit));
        }
        runs.push(Run { process, start: address, count: 1, content: Content::Data(at) });
    }
    // What was said of these pages otherwise came later.
    pages.runs.splice(..0, runs);
}

/// What decoding reads of the checkpoints before.
struct Shared<'a> {
    shadow: &'a Shadow,
    state: &'a [u8],
    limits: Limits,
}

/// Reads the payload of a page chunk.
struct PageReader<'a> {
    at: u64,
    whole: usize,
    rest: &'a [u8],
}

impl PageReader<'_> {
    fn error(&self, what: impl ToString) -> WireError {
        WireError::payload(self.at + (self.whole - self.rest.len()) as u64, Kind::PageChunk, what)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (bytes, rest) =
            self.rest.split_first_chunk().ok_or_else(|| self.error("ends within a run"))?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn read(mut self, open: &mut Open, shared: &Shared<'_>) -> Result<(), WireError> {
        while !self.rest.is_empty() {
            let prefix = self.take::<RUN_PREFIX>()?;
            let pid = i32::from_le_bytes(std::array::from_fn(|i| prefix[1 + i]));
            let start = u64::from_le_bytes(std::array::from_fn(|i| prefix[5 + i]));
            let count = u32::from_le_bytes(std::array::from_fn(|i| prefix[13 + i]));
            let len = u64::from(count) * PAGE as u64;
            if count == 0 || start % PAGE as u64 != 0 || start.checked_add(len).is_none() {
                return Err(self.error(format_args!("no run of {count} pages at {start:#x}")));
            }
            open.sums.runs += 1;
            match prefix[0] {
                RUN_DROPPED => self.dropped(open, shared, pid, start, count)?,
                RUN_DATA => {
                    for i in 0..u64::from(count) {
                        let key = PageKey { pid, address: start + i * PAGE as u64 };
                        self.page(open, shared, key)?;
                    }
                }
                tag => return Err(self.error(format_args!("run kind {tag} is unknown"))),
            }
            if open.pages.runs.len() > shared.limits.runs {
                return Err(self.error("more runs than allowed"));
            }
        }
        Ok(())
    }

    fn dropped(
        &mut self,
        open: &mut Open,
        shared: &Shared<'_>,
        pid: i32,
        start: u64,
        count: u32,
    ) -> Result<(), WireError> {
        if open.placed.len() + count as usize > 2 * shared.limits.pages {
            return Err(self.error("more dropped pages than allowed"));
        }
        for i in 0..u64::from(count) {
            open.placed.insert(PageKey { pid, address: start + i * PAGE as u64 }, Placed::Dropped);
        }
        let content = Content::Dropped;
        open.pages.runs.push(Run { process: pid as u32, start, count, content });
        Ok(())
    }

    fn page(
        &mut self,
        open: &mut Open,
        shared: &Shared<'_>,
        key: PageKey,
    ) -> Result<(), WireError> {
        let [tag] = self.take::<1>()?;
        let coding = Coding::try_from(tag).map_err(|e| self.error(e))?;
        let len = match coding {
            Coding::Zero | Coding::Same => 0,
            _ => u16::from_le_bytes(self.take::<2>()?).into(),
        };
        let Some((body, rest)) = self.rest.split_at_checked(len) else {
            return Err(self.error("ends within a page"));
        };
        let held = open.placed.get(&key).copied();
        let previous = match held {
            Some(Placed::At(_) | Placed::Dropped) => None,
            Some(Placed::Edited) | None => shared.shadow.get(key),
        };
        let edits = matches!(coding, Coding::Same | Coding::Delta)
            && previous.is_some()
            && key.pid > 0
            && self.edits(open, shared.limits, key, (coding, body), held.is_some())?;
        if edits {
            open.placed.insert(key, Placed::Edited);
        } else {
            let (offset, has_previous) = match held {
                Some(Placed::At(offset)) => (offset, true),
                _ => {
                    let offset = self.room(open, shared)?;
                    // What is coded without the version before overwrites all of it.
                    let stands_on = matches!(coding, Coding::Same | Coding::Delta);
                    match previous.filter(|_| stands_on) {
                        Some(page) => open.pages.bytes.extend_from_slice(page),
                        None => open.pages.bytes.resize(offset + PAGE, 0),
                    }
                    place(&mut open.pages.runs, key, offset);
                    open.placed.insert(key, Placed::At(offset));
                    (offset, previous.is_some())
                }
            };
            let page: &mut Page =
                (&mut open.pages.bytes[offset..offset + PAGE]).try_into().expect("a page long");
            decode_onto(page, has_previous, coding, body).map_err(|e| self.error(e))?;
        }
        open.sums.pages += 1;
        self.rest = rest;
        Ok(())
    }

    /// Where the next whole page goes.
    fn room(&self, open: &Open, shared: &Shared<'_>) -> Result<usize, WireError> {
        let offset = open.pages.bytes.len();
        if offset + open.edits.bytes.len() >= shared.limits.pages.saturating_mul(PAGE) {
            return Err(self.error("more pages than allowed"));
        }
        Ok(offset)
    }

    /// Keeps what changes of a page as edits of the version before; says no, and keeps nothing, if that is
    /// too much. What is edited already cannot be anything else.
    fn edits(
        &self,
        open: &mut Open,
        limits: Limits,
        key: PageKey,
        (coding, body): (Coding, &[u8]),
        edited: bool,
    ) -> Result<bool, WireError> {
        let Edits { list, bytes } = &mut open.edits;
        if list.len() >= limits.pages.saturating_mul(2) {
            return Err(self.error("more edits than allowed"));
        }
        let (edits_before, bytes_before) = (list.len(), bytes.len());
        let process = key.pid as u32;
        if coding == Coding::Same && body.is_empty() {
            list.push(Edit { process, start: key.address, at: bytes.len(), len: 0 });
            return Ok(true);
        }
        let kept = decode_edits(body, |offset, words| {
            let start = key.address + offset as u64;
            list.push(Edit { process, start, at: bytes.len(), len: words.len() });
            bytes.extend_from_slice(words);
        });
        kept.map_err(|e| self.error(e))?;
        if !edited && list.len() - edits_before > MAX_EDITS {
            list.truncate(edits_before);
            bytes.truncate(bytes_before);
            return Ok(false);
        }
        Ok(true)
    }
}

/// Notes that the page stands at `offset`: the last run grows, or a new one starts.
fn place(runs: &mut Vec<Run>, key: PageKey, offset: usize) {
    if let Some(last) = runs.last_mut()
        && let Content::Data(from) = last.content
        && last.process == key.pid as u32
        && last.start + u64::from(last.count) * PAGE as u64 == key.address
        && from + last.count as usize * PAGE == offset
        && last.count < u32::MAX
    {
        last.count += 1;
        return;
    }
    let content = Content::Data(offset);
    runs.push(Run { process: key.pid as u32, start: key.address, count: 1, content });
}
