//! The parts without I/O, one by one: coding a page, decoding it, holding and releasing a frame.
//!
//! `cargo bench -p gateway` runs them; `-- --save-baseline before` and `-- --baseline before`
//! compare two builds.
#![allow(missing_docs, reason = "what criterion's macros make has no documentation")]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use gateway::frames::commit::{Bounds, CommitCore};
use replicator::ack::{AckLedger, CommitProof};
use replicator::wire::delta::{Page, PageCoder, decode_onto};
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

criterion_group!(benches, pages, commit);
criterion_main!(benches);
