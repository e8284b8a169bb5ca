//! The parts without I/O, one by one: coding a page, decoding it, a whole checkpoint both ways, holding
//! and releasing a frame.
//!
//! `cargo bench -p gateway` runs them; `-- --save-baseline before` and `-- --baseline before`
//! compare two builds.
#![allow(missing_docs, reason = "what criterion's macros make has no documentation")]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use gateway::frames::commit::{Bounds, CommitCore};
use replicator::ack::{AckLedger, CommitProof};
use replicator::image::Process;
use replicator::image::State;
use replicator::image::pages::{Content, PageSet, Run};
use replicator::wire::delta::{Page, PageCoder, decode_onto};
use replicator::wire::{Assembly, CheckpointBuilder, Decoder, Limits, Progress};
use replicator::{Epoch, Generation};
use std::hint::black_box;

const PAGE: usize = size_of::<Page>();

/// Random bytes of which only the first `random` differ from a pattern.
fn page(seed: u64, random: usize) -> Page {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut page = [0x5a; PAGE];
    page[..random].iter_mut().for_each(|byte| *byte = rng.u8(..));
    page
}

/// Pages as they change: a few words, half of it, all of it.
fn pages(c: &mut Criterion) {
    let before = page(1, PAGE);
    let mut few = before;
    (0..8).for_each(|word| few[word * 512] ^= 0xff);
    let mut half = before;
    half[..PAGE / 2].copy_from_slice(&page(2, PAGE / 2)[..PAGE / 2]);
    let all = page(3, PAGE);
    let text = page(4, PAGE / 4);
    let mut group = c.benchmark_group("page");
    group.throughput(Throughput::Bytes(PAGE as u64));
    for (name, now) in
        [("same", before), ("8 words", few), ("half", half), ("random", all), ("repetitive", text)]
    {
        let mut coder = PageCoder::default();
        let mut out = Vec::with_capacity(2 * PAGE);
        group.bench_function(format!("encode {name}"), |b| {
            b.iter(|| {
                out.clear();
                black_box(coder.encode(Some(&before), black_box(&now), &mut out))
            });
        });
        out.clear();
        let coding = coder.encode(Some(&before), &now, &mut out);
        group.bench_function(format!("decode {name}"), |b| {
            b.iter_batched_ref(
                || before,
                |page| decode_onto(page, true, coding, black_box(&out)).expect("own coding"),
                BatchSize::SmallInput,
            );
        });
    }
}

/// Pages of one process, every third one, so that each is a run.
fn checkpoint(count: usize, seed: u64) -> PageSet {
    let mut set = PageSet::default();
    for index in 0..count {
        let content = Content::Data(set.bytes.len());
        let start = (0x10_0000 + index * 3 * PAGE) as u64;
        set.runs.push(Run { process: 0, start, count: 1, content });
        let mut now = page(index as u64, PAGE / 2);
        now[(seed as usize * 8) % PAGE] ^= 0x5a;
        set.bytes.extend_from_slice(&now);
    }
    set
}

/// A checkpoint after a full one: into frames, and back out of the bytes of all of them.
fn checkpoints(c: &mut Criterion) {
    let state =
        State { processes: vec![Process { pid: 1, ..Process::default() }], ..State::default() };
    let frames = |builder: &mut CheckpointBuilder, pages: &PageSet, epoch: u64| {
        let mut bytes = Vec::new();
        let mut send = |frame: bytes::Bytes| bytes.extend_from_slice(&frame);
        send(builder.begin(Generation::FIRST, Epoch(epoch), epoch == 1));
        builder.pages(pages, &state.owners(), &mut send).expect("all of it is there");
        let finished = builder.finish(&state, &mut send).expect("it encodes");
        send(finished.end);
        bytes
    };
    let take = |decoder: &mut Decoder, assembly: &mut Assembly, bytes: &[u8]| {
        decoder.feed(bytes);
        let mut complete = 0;
        while let Some(frame) = decoder.next().expect("whole frames") {
            complete += u32::from(matches!(assembly.push(&frame), Ok(Progress::Complete(..))));
        }
        assembly.fold();
        assert_eq!(complete, 1);
    };
    let mut group = c.benchmark_group("checkpoint");
    for count in [30, 500, 5_000] {
        let sets = [checkpoint(count, 1), checkpoint(count, 2)];
        let mut builder = CheckpointBuilder::new(Limits::default());
        let mut epoch = 1;
        frames(&mut builder, &sets[0], epoch);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{count} pages into frames"), |b| {
            b.iter(|| {
                epoch += 1;
                black_box(frames(&mut builder, &sets[epoch as usize % 2], epoch));
            });
        });
        // What is decoded is of one stream, which begins anew for each.
        let mut builder = CheckpointBuilder::new(Limits::default());
        let first = frames(&mut builder, &sets[0], 1);
        let second = frames(&mut builder, &sets[1], 2);
        group.bench_function(format!("{count} pages out of frames"), |b| {
            b.iter_batched(
                || {
                    let (mut decoder, mut assembly) =
                        (Decoder::default(), Assembly::new(Limits::default()));
                    take(&mut decoder, &mut assembly, &first);
                    (decoder, assembly)
                },
                |(mut decoder, mut assembly)| {
                    take(&mut decoder, &mut assembly, &second);
                    (decoder, assembly)
                },
                BatchSize::LargeInput,
            );
        });
    }
}

fn proof(ledger: &mut AckLedger, epoch: u64) -> CommitProof {
    ledger.sent(Epoch(epoch), epoch);
    ledger.acknowledge(Generation::FIRST, Epoch(epoch), epoch).expect("in order")
}

/// An epoch of the commit core: frames in, sealed, released, buffers back.
fn commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("commit");
    for (frames, size) in [(1, 66), (50, 230), (64, 65_536)] {
        let frame = vec![7_u8; size];
        let mut core = CommitCore::new(Bounds::default());
        core.protect(Generation::FIRST, Epoch(0));
        let (mut ledger, mut epoch) = (AckLedger::new(Generation::FIRST), 0);
        group.throughput(Throughput::Elements(frames));
        group.bench_function(format!("{frames} frames of {size} bytes"), |b| {
            b.iter(|| {
                for _ in 0..frames {
                    black_box(core.push(&frame));
                }
                epoch += 1;
                core.seal(Epoch(epoch)).expect("the next one");
                let output = core.release(proof(&mut ledger, epoch)).expect("it is committed");
                core.recycle(output);
            });
        });
    }
}

criterion_group!(benches, pages, checkpoints, commit);
criterion_main!(benches);
