//! Builder and assembly together, against a small model of a container's memory.

use super::codec::{Decoder, Frame};
use super::*;
use crate::image::pages::{Content, Edits, PAGE, PageSet, Run};
use crate::image::{Mapping, Process, Source, State, Thread};
use crate::{Epoch, Generation};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

type Memory = BTreeMap<(i32, u64), Vec<u8>>;

const GENERATION: Generation = Generation(1);

/// A container whose memory changes at random.
struct Model {
    rng: fastrand::Rng,
    memory: Memory,
    state: State,
}

impl Model {
    fn new(seed: u64) -> Self {
        let process = |pid| Process {
            pid,
            threads: vec![Thread { tid: pid, xstate: vec![0; 2000], ..Thread::default() }],
            ..Process::default()
        };
        let mut model = Self {
            rng: fastrand::Rng::with_seed(seed),
            memory: Memory::new(),
            state: State { processes: vec![process(1), process(7)], ..State::default() },
        };
        model.remap();
        model
    }

    /// Changes which 16-page blocks are mapped, and forgets what was in the others.
    fn remap(&mut self) {
        for p in &mut self.state.processes {
            let before = std::mem::take(&mut p.mappings);
            for block in 1..8u64 {
                if self.rng.u8(..4) > 0 {
                    let old = before.iter().find(|m| m.start == block << 16);
                    Arc::make_mut(&mut p.mappings).push(Mapping {
                        start: block << 16,
                        end: (block + 1) << 16,
                        prot: 3,
                        grows_down: false,
                        source: Source::Anonymous,
                        fresh: old.is_some_and(|m| m.fresh),
                    });
                }
            }
        }
        let state = &self.state;
        self.memory.retain(|(pid, address), _| {
            state.processes.iter().any(|p| {
                p.pid == *pid && p.mappings.iter().any(|m| (m.start..m.end).contains(address))
            })
        });
    }

    /// Another mapping takes the place of one, or several; nobody has written there yet.
    fn renew(&mut self) {
        for p in &mut self.state.processes {
            for m in Arc::make_mut(&mut p.mappings).iter_mut().filter(|_| self.rng.u8(..4) == 0) {
                m.fresh = true;
                let pid = p.pid;
                self.memory.retain(|(of, at), _| *of != pid || !(m.start..m.end).contains(at));
            }
        }
    }

    /// The checkpoint is taken.
    fn settle(&mut self) {
        let mappings = self.state.processes.iter_mut().flat_map(|p| Arc::make_mut(&mut p.mappings));
        mappings.for_each(|m| m.fresh = false);
    }

    /// Some pages change; the set says which.
    fn change(&mut self) -> PageSet {
        let mut set = PageSet::default();
        for _ in 0..self.rng.usize(..30) {
            let index = self.rng.usize(..2);
            let process = &self.state.processes[index];
            let pid = process.pid;
            let Some(m) = self.rng.choice(process.mappings.iter()) else { continue };
            let first = self.rng.u64(..16);
            let count = self.rng.u64(1..=16 - first);
            let start = m.start + first * PAGE as u64;
            let mut content = Content::Dropped;
            if self.rng.u8(..6) == 0 {
                for i in 0..count {
                    self.memory.remove(&(pid, start + i * PAGE as u64));
                }
            } else {
                content = Content::Data(set.bytes.len());
                for i in 0..count {
                    let key = (pid, start + i * PAGE as u64);
                    let page = self.memory.entry(key).or_insert_with(|| vec![0; PAGE]);
                    write(&mut self.rng, page);
                    set.bytes.extend_from_slice(page);
                }
            }
            set.runs.push(Run { process: index as u32, start, count: count as u32, content });
        }
        self.state.processes[0].threads[0].regs[3] = self.rng.u64(..);
        set
    }

    /// As [`Model::remap`], where it may not be the first time since the last checkpoint: what a capture says then of what is
    /// mapped anew.
    fn remap_anew(&mut self) -> PageSet {
        let starts = |p: &Process| p.mappings.iter().map(|m| m.start).collect::<Vec<_>>();
        let before: Vec<_> = self.state.processes.iter().map(starts).collect();
        self.remap();
        let mut set = PageSet::default();
        for (index, p) in self.state.processes.iter_mut().enumerate() {
            let is_new = |m: &&mut Mapping| !before[index].contains(&m.start);
            for m in Arc::make_mut(&mut p.mappings).iter_mut().filter(is_new) {
                m.fresh = true;
                let (process, count) = (index as u32, ((m.end - m.start) / PAGE as u64) as u32);
                set.runs.push(Run { process, start: m.start, count, content: Content::Dropped });
            }
        }
        set
    }

    /// Removes what lies in no mapping any more, as a capture does.
    fn clip(&self, sets: &mut [PageSet]) {
        for set in sets {
            set.runs.retain(|run| {
                let mappings = &self.state.processes[run.process as usize].mappings;
                mappings.iter().any(|m| (m.start..m.end).contains(&run.start))
            });
        }
    }

    /// All of memory, as a full copy.
    fn full(&self) -> PageSet {
        let mut set = PageSet::default();
        for ((pid, start), page) in &self.memory {
            let content = Content::Data(set.bytes.len());
            set.bytes.extend_from_slice(page);
            let process = u32::from(*pid == 7);
            set.runs.push(Run { process, start: *start, count: 1, content });
        }
        set
    }
}

fn write(rng: &mut fastrand::Rng, page: &mut [u8]) {
    match rng.u8(..5) {
        0 => page.fill(0),
        1 => rng.fill(page),
        2 => page.fill(rng.u8(..)),
        _ => {
            for _ in 0..rng.usize(1..20) {
                let at = rng.usize(..PAGE);
                page[at] = rng.u8(..);
            }
        }
    }
}

/// What an applier does with a checkpoint.
fn apply(memory: &mut Memory, checkpoint: &Checkpoint) {
    if checkpoint.full {
        memory.clear();
    }
    for p in &checkpoint.state.processes {
        for m in p.mappings.iter().filter(|m| m.fresh) {
            memory.retain(|(pid, at), _| *pid != p.pid || !(m.start..m.end).contains(at));
        }
    }
    for edit in &checkpoint.edits.list {
        let pid = checkpoint.state.processes[edit.process as usize].pid;
        let page = memory.get_mut(&(pid, edit.page())).expect("the version before");
        page[edit.offset()..][..edit.len].copy_from_slice(checkpoint.edits.of(edit));
    }
    for run in &checkpoint.pages.runs {
        let pid = checkpoint.state.processes[run.process as usize].pid;
        for i in 0..run.count as usize {
            let key = (pid, run.start + (i * PAGE) as u64);
            match run.content {
                Content::Dropped => {
                    memory.remove(&key);
                }
                Content::Data(at) => {
                    memory.insert(key, checkpoint.pages.bytes[at + i * PAGE..][..PAGE].to_vec());
                }
            }
        }
    }
    memory.retain(|(pid, address), _| {
        checkpoint
            .state
            .processes
            .iter()
            .any(|p| p.pid == *pid && p.mappings.iter().any(|m| (m.start..m.end).contains(address)))
    });
}

/// What the checkpoint of an epoch says of volumes: nothing, a little, several pieces.
fn of_files(epoch: u64) -> Vec<u8> {
    let len = [0, 100, 0, 100, 300_000][epoch as usize % 5];
    (0..len).map(|i| (i as u64 * epoch) as u8).collect()
}

/// One checkpoint as frames, in two rounds of pages.
fn send(
    builder: &mut CheckpointBuilder,
    epoch: u64,
    full: bool,
    sets: &[PageSet],
    state: &State,
) -> (Vec<Bytes>, u64) {
    let mut frames = vec![builder.begin(GENERATION, Epoch(epoch), full)];
    for set in sets {
        builder.pages(set, &[1, 7], |b| frames.push(b)).unwrap();
    }
    builder.files(&of_files(epoch), |b| frames.push(b)).unwrap();
    let finished = builder.finish(state, |b| frames.push(b)).unwrap();
    frames.push(finished.end);
    assert_eq!(finished.bytes, frames.iter().map(|f| f.len() as u64).sum::<u64>());
    (frames, finished.digest)
}

fn frames(bytes: &[Bytes]) -> Vec<Frame> {
    let mut decoder = Decoder::default();
    let mut out = Vec::new();
    for b in bytes {
        decoder.feed(b);
        while let Some(f) = decoder.next().unwrap() {
            out.push(f);
        }
    }
    decoder.finish().unwrap();
    out
}

fn receive(assembly: &mut Assembly, bytes: &[Bytes]) -> (Receipt, std::sync::Arc<Checkpoint>) {
    let frames = frames(bytes);
    let (last, body) = frames.split_last().unwrap();
    for f in body {
        assert_eq!(assembly.push(f).unwrap(), Progress::Partial);
    }
    match assembly.push(last).unwrap() {
        Progress::Complete(receipt, checkpoint) => {
            assert!(checkpoint.files == of_files(receipt.epoch.0));
            (receipt, checkpoint)
        }
        Progress::Partial => panic!("the end completes nothing"),
    }
}

#[test]
fn memory_rebuilt_from_checkpoints_equals_the_model() {
    for seed in 0..20 {
        let mut model = Model::new(seed);
        let mut builder = CheckpointBuilder::new(Limits::default());
        let mut assembly = Assembly::new(Limits::default());
        let mut rebuilt = Memory::new();
        let mut number = 1;
        for epoch in 1..60 {
            let full = epoch == 1 || epoch % 23 == 0;
            let mut sets = Vec::new();
            if full {
                sets.push(model.full());
            } else if model.rng.u8(..3) == 0 {
                model.renew();
            }
            for _ in 0..model.rng.usize(1..4) {
                sets.push(model.change());
            }
            if model.rng.u8(..3) == 0 {
                model.remap();
            }
            while !full && model.rng.u8(..3) == 0 {
                // It comes to nothing, and what it said is said again by the next.
                send(&mut builder, number, full, &sets, &model.state);
                builder.take_back(sets.iter().flat_map(|set| &set.runs), &[1, 7]);
                number += 1;
                if model.rng.bool() {
                    sets.push(model.remap_anew());
                    model.clip(&mut sets);
                }
                sets.push(model.change());
            }
            let (bytes, digest) = send(&mut builder, number, full, &sets, &model.state);
            let (receipt, checkpoint) = receive(&mut assembly, &bytes);
            let epoch = Epoch(number);
            assert_eq!(
                receipt,
                Receipt { generation: GENERATION, epoch, digest, provisional: false },
                "seed {seed}"
            );
            number += 1;
            assert_eq!((checkpoint.full, &*checkpoint.state), (full, &model.state));
            apply(&mut rebuilt, &checkpoint);
            assert!(rebuilt == model.memory, "seed {seed} epoch {epoch}");
            model.settle();
        }
    }
}

#[test]
fn pages_of_a_process_that_ended_before_the_stop_fall_away() {
    let mut model = Model::new(1);
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut assembly = Assembly::new(Limits::default());
    let both = model.state.clone();
    let set = PageSet {
        runs: vec![
            Run { process: 1, start: 0x10000, count: 1, content: Content::Data(0) },
            Run { process: 0, start: 0x10000, count: 1, content: Content::Data(PAGE) },
        ],
        bytes: [vec![1; PAGE], vec![2; PAGE]].concat(),
    };
    model.state.processes.remove(1);
    let (bytes, _) = send(&mut builder, 1, true, std::slice::from_ref(&set), &model.state);
    let (_, checkpoint) = receive(&mut assembly, &bytes);
    assert_eq!(checkpoint.pages.runs, [set.runs[1]]);
    // Its pid comes back: neither side may remember the page.
    let (bytes, _) = send(&mut builder, 2, false, std::slice::from_ref(&set), &both);
    let (_, checkpoint) = receive(&mut assembly, &bytes);
    assert_eq!(checkpoint.pages.runs, [set.runs[0]], "and the other's page is as it was");
}

#[test]
fn a_big_copy_is_cut_into_chunks_and_unchanged_pages_cost_little() {
    let mut model = Model::new(3);
    let pages = 2000;
    let mut bytes = vec![0; pages * PAGE];
    model.rng.fill(&mut bytes);
    let content = Content::Data(0);
    let run = Run { process: 0, start: 0x10000, count: pages as u32, content };
    let set = PageSet { runs: vec![run], bytes };
    let mappings = Arc::make_mut(&mut model.state.processes[0].mappings);
    mappings.truncate(1);
    mappings[0].start = 0x10000;
    mappings[0].end = 0x10000 + (pages * PAGE) as u64;
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut assembly = Assembly::new(Limits::default());
    let (first, _) = send(&mut builder, 1, true, std::slice::from_ref(&set), &model.state);
    assert!(first.len() > 30 && first.iter().all(|f| f.len() <= 256 << 10));
    let (_, checkpoint) = receive(&mut assembly, &first);
    assert_eq!(checkpoint.pages, set, "one run again");
    let (second, _) = send(&mut builder, 2, false, std::slice::from_ref(&set), &model.state);
    assert!(second.iter().map(Bytes::len).sum::<usize>() < pages + 1000);
    let (_, checkpoint) = receive(&mut assembly, &second);
    assert_eq!((&checkpoint.pages, &checkpoint.edits), (&PageSet::default(), &Edits::default()));
}

#[test]
fn anything_missing_twice_or_out_of_order_completes_nothing() {
    let mut model = Model::new(5);
    let sets = [model.full(), model.change(), model.change()];
    let mut builder = CheckpointBuilder::new(Limits::default());
    let good = frames(&send(&mut builder, 1, true, &sets, &model.state).0);
    let completes = |frames: &[Frame]| {
        let mut assembly = Assembly::new(Limits::default());
        frames.iter().any(|f| matches!(assembly.push(f), Ok(Progress::Complete(..))))
    };
    assert!(completes(&good));
    for i in 0..good.len() {
        let mut missing = good.clone();
        missing.remove(i);
        assert!(!completes(&missing), "without frame {i}");
        let mut twice = good.clone();
        twice.insert(i, good[i].clone());
        let last = i + 1 == good.len();
        assert_eq!(completes(&twice), last, "frame {i} twice");
        if i > 0 {
            let mut swapped = good.clone();
            swapped.swap(i - 1, i);
            assert!(!completes(&swapped), "frame {i} early");
        }
        let mut other = good.clone();
        other[i].epoch = Epoch(9);
        assert!(!completes(&other), "frame {i} of another epoch");
    }
}

#[test]
fn an_incomplete_checkpoint_leaves_no_trace() {
    let mut model = Model::new(8);
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut assembly = Assembly::new(Limits::default());
    let first = [model.full(), model.change()];
    receive(&mut assembly, &send(&mut builder, 1, true, &first, &model.state).0);
    let before = assembly.versions();
    let second = model.change();
    let cut = frames(&send(&mut builder, 2, false, &[second], &model.state).0);
    for f in &cut[..cut.len() - 1] {
        assembly.push(f).unwrap();
    }
    assert!(assembly.is_open());
    assert!(assembly.push(&cut[0]).is_err(), "a begin within a checkpoint");
    assert!(!assembly.is_open());
    assert!(assembly.versions() == before);
}

#[test]
fn a_checkpoint_builds_on_the_one_that_was_sent_before() {
    let mut model = Model::new(8);
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut assembly = Assembly::new(Limits::default());
    let begin = |b: &mut CheckpointBuilder, e, full| frames(&[b.begin(GENERATION, Epoch(e), full)]);
    assert!(assembly.push(&begin(&mut builder, 1, false)[0]).is_err(), "no base");
    assert!(assembly.push(&begin(&mut builder, 0, true)[0]).is_err(), "epoch 0");
    let set = model.change();
    receive(&mut assembly, &send(&mut builder, 5, true, &[set], &model.state).0);
    let set = model.change();
    let lost = send(&mut builder, 6, false, &[set], &model.state);
    assert!(assembly.push(&begin(&mut builder, 7, false)[0]).is_err(), "a gap");
    receive(&mut assembly, &lost.0);
    let set = model.change();
    receive(&mut assembly, &send(&mut builder, 9, false, &[set], &model.state).0);
    assert!(assembly.push(&begin(&mut builder, 9, true)[0]).is_err(), "the same again");
    assert!(assembly.push(&begin(&mut builder, 12, true)[0]).is_ok(), "a full one needs no base");
}

#[test]
fn caps_hold() {
    let mut model = Model::new(2);
    let set = PageSet {
        runs: vec![Run { process: 0, start: 0x10000, count: 9, content: Content::Data(0) }],
        bytes: vec![0; 9 * PAGE],
    };
    let limits = Limits { pages: 8, ..Limits::default() };
    let mut builder = CheckpointBuilder::new(Limits::default());
    let sent = frames(&send(&mut builder, 1, true, &[set], &model.state).0);
    let mut assembly = Assembly::new(limits);
    let errors = sent.iter().filter_map(|f| assembly.push(f).err()).collect::<Vec<_>>();
    assert!(errors[0].to_string().contains("more pages than allowed"), "{}", errors[0]);
    let run = Run { process: 0, start: 0x10000, count: 4, content: Content::Data(0) };
    let set = PageSet { runs: vec![run], bytes: vec![7; 4 * PAGE] };
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut assembly = Assembly::new(Limits { pages: 4, ..Limits::default() });
    let once = std::slice::from_ref(&set);
    receive(&mut assembly, &send(&mut builder, 1, true, once, &model.state).0);
    let again = vec![set; 3];
    let sent = frames(&send(&mut builder, 2, false, &again, &model.state).0);
    let errors = sent.iter().filter_map(|f| assembly.push(f).err()).collect::<Vec<_>>();
    assert!(errors[0].to_string().contains("more edits than allowed"), "{}", errors[0]);
    let mut builder = CheckpointBuilder::new(Limits::default());
    model.state.processes[0].auxv = vec![1; 5000];
    let limits = Limits { state_bytes: 4096, ..Limits::default() };
    let mut small = CheckpointBuilder::new(limits);
    small.begin(GENERATION, Epoch(1), true);
    assert!(matches!(
        small.finish(&model.state, |_| {}),
        Err(BuildError::StateTooLarge { cap: 4096, .. })
    ));
    let limits = Limits { volume_bytes: 200_000, ..Limits::default() };
    let mut small = CheckpointBuilder::new(limits);
    small.begin(GENERATION, Epoch(4), true);
    let error = small.files(&of_files(4), |_| {}).expect_err("more than the limit");
    assert!(matches!(error, BuildError::FilesTooLarge { len: 300_000, cap: 200_000 }));
    let sent = frames(&send(&mut builder, 4, true, &[], &model.state).0);
    let mut assembly = Assembly::new(limits);
    let errors = sent.iter().filter_map(|f| assembly.push(f).err()).collect::<Vec<_>>();
    assert!(errors[0].to_string().contains("more of files than allowed"), "{}", errors[0]);
}

/// Damage below the checksums: only a hostile peer can send it. Chunks are edited in place and
/// handed over with valid frames around them.
#[test]
fn hostile_chunks_give_errors_and_nothing_else() {
    let mut model = Model::new(13);
    let sets = [model.full(), model.change()];
    let mut builder = CheckpointBuilder::new(Limits::default());
    let good = frames(&send(&mut builder, 4, true, &sets, &model.state).0);
    let mut rng = fastrand::Rng::with_seed(4);
    for round in 0..3000 {
        let mut assembly = Assembly::new(Limits { pages: 4096, ..Limits::default() });
        let mut bad = good.clone();
        let victim = rng.usize(1..bad.len() - 1);
        if let Message::PageChunk(b) | Message::StateChunk(b) | Message::VolumeChunk(b) =
            &mut bad[victim].message
        {
            let mut bytes = b.to_vec();
            if !bytes.is_empty() {
                for _ in 0..rng.usize(1..4) {
                    let at =
                        rng.usize(..bytes.len().min(if round % 2 == 0 { 64 } else { 1 << 20 }));
                    bytes[at] = rng.u8(..);
                }
                bytes.truncate(rng.usize(bytes.len() / 2..=bytes.len()));
            }
            *b = bytes.into();
        }
        for f in &bad {
            if assembly.push(f).is_err() {
                break;
            }
        }
    }
}

/// A recorded session, damaged in every byte and cut at every byte: checkpoints that were
/// complete before come out, the one concerned and those after never.
#[test]
fn a_damaged_session_delivers_nothing_from_the_damage_on() {
    let mut model = Model::new(21);
    let mut builder = CheckpointBuilder::new(Limits::default());
    let mut session = Vec::new();
    let mut ends = Vec::new();
    for epoch in 1..=3 {
        let content = Content::Data(0);
        let run = Run { process: 0, start: 0x10000 * epoch, count: 1, content };
        let set = PageSet { runs: vec![run], bytes: vec![epoch as u8; PAGE] };
        model.state.processes[0].threads[0].regs[0] = epoch;
        let (bytes, _) = send(&mut builder, epoch, epoch == 1, &[set], &model.state);
        bytes.iter().for_each(|b| session.extend_from_slice(b));
        ends.push(session.len());
    }
    let complete = |bytes: &[u8]| {
        let (mut decoder, mut assembly) = (Decoder::default(), Assembly::new(Limits::default()));
        let mut complete = Vec::new();
        decoder.feed(bytes);
        while let Ok(Some(frame)) = decoder.next() {
            match assembly.push(&frame) {
                Ok(Progress::Complete(_, c)) => complete.push(c),
                Ok(Progress::Partial) => {}
                Err(_) => break,
            }
        }
        complete
    };
    let good = complete(&session);
    assert_eq!(good.len(), 3);
    for at in 0..session.len() {
        let whole = ends.iter().filter(|end| **end <= at).count();
        assert_eq!(complete(&session[..at]), good[..whole], "cut at {at}");
        let mut bad = session.clone();
        bad[at] ^= 1 << (at % 8);
        assert_eq!(complete(&bad), good[..whole], "damaged at {at}");
    }
}
