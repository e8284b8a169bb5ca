use super::*;
use proptest::prelude::*;
use replicator::ack::AckLedger;

const G: Generation = Generation(1);

fn all(output: &Output) -> Vec<Vec<u8>> {
    output.frames().map(<[u8]>::to_vec).collect()
}

fn proof(ledger: &mut AckLedger, epoch: u64) -> CommitProof {
    ledger.sent(Epoch(epoch), epoch);
    ledger.acknowledge(G, Epoch(epoch), epoch).unwrap()
}

#[test]
fn an_epoch_leaves_with_its_proof_and_not_before() {
    let mut core = CommitCore::new(Bounds::default());
    let mut ledger = AckLedger::new(G);
    core.protect(G, Epoch::NONE);
    assert_eq!(core.open_epoch(), Some(Epoch(1)));
    assert_eq!(core.push(b"syn-ack"), Pushed::First);
    assert_eq!(core.push(b"data"), Pushed::Held);
    assert!(core.output_waits());
    assert_eq!(core.seal(Epoch(1)).unwrap(), SealedOutput { frames: 2, bytes: 11 });
    assert!(!core.output_waits());
    assert_eq!(core.push(b"later"), Pushed::First);
    core.seal(Epoch(2)).unwrap();
    assert_eq!(core.push(b"open"), Pushed::First);

    let out = core.release(proof(&mut ledger, 1)).unwrap();
    assert_eq!(all(&out), [b"syn-ack".to_vec(), b"data".to_vec()]);
    core.recycle(out);
    let counters = core.counters();
    assert_eq!((counters.held_frames, counters.held_bytes, counters.held_epochs), (2, 9, 1));
    // A proof of the open epoch's number covers what is sealed, and never what is open.
    let out = core.release(proof(&mut ledger, 9)).unwrap();
    assert_eq!(all(&out), [b"later".to_vec()]);
    assert_eq!(core.counters().released_epochs, 2);
}

#[test]
fn orders_that_make_no_sense_are_refused() {
    let mut core = CommitCore::new(Bounds::default());
    let mut ledger = AckLedger::new(G);
    assert_eq!(core.seal(Epoch(1)), Err(CommitError::NotProtected(Epoch(1))));
    assert!(core.release(proof(&mut ledger, 1)).is_err());
    core.protect(Generation(2), Epoch(5));
    assert!(matches!(
        core.seal(Epoch(5)),
        Err(CommitError::Order { asked: Epoch(5), last: Epoch(5) })
    ));
    core.push(b"x");
    core.seal(Epoch(6)).unwrap();
    let old = core.release(proof(&mut ledger, 6));
    assert!(matches!(old, Err(CommitError::Generation { got: G, ours: Generation(2) })));
    assert_eq!(core.counters().held_frames, 1);
}

#[test]
fn at_the_bound_new_frames_are_dropped_and_counted() {
    let bounds = Bounds { bytes: 25, frames: 3, spare_chunks: 1 };
    let mut core = CommitCore::new(bounds);
    core.protect(G, Epoch::NONE);
    assert_eq!(core.push(&[1; 10]), Pushed::First);
    assert_eq!(core.push(&[2; 10]), Pushed::Held);
    assert_eq!(core.push(&[3; 10]), Pushed::Dropped, "too many bytes");
    assert_eq!(core.push(&[4; 1]), Pushed::Held);
    assert_eq!(core.push(&[5; 1]), Pushed::Dropped, "too many frames");
    assert_eq!(core.push(&vec![0; MAX_FRAME + 1]), Pushed::Dropped);
    assert_eq!(core.counters().dropped_frames, 3);
    core.seal(Epoch(1)).unwrap();
    let out = core.release(proof(&mut AckLedger::new(G), 1)).unwrap();
    assert_eq!(all(&out), [vec![1; 10], vec![2; 10], vec![4; 1]]);
    assert_eq!(core.counters().held_bytes, 0);
    assert_eq!(core.push(&[6; 10]), Pushed::First, "there is room again");
}

#[test]
fn pass_through_gives_what_was_held_in_order() {
    let mut core = CommitCore::new(Bounds::default());
    core.protect(G, Epoch::NONE);
    core.push(b"sealed");
    core.seal(Epoch(1)).unwrap();
    core.push(b"open");
    let out = core.pass_through(Unprotected::GrantedByArbiter);
    assert_eq!(all(&out), [b"sealed".to_vec(), b"open".to_vec()]);
    assert!(core.is_pass_through() && core.open_epoch().is_none() && !core.output_waits());
    core.protect(G, Epoch(1));
    assert_eq!(core.push(b"x"), Pushed::First);
    assert_eq!(core.open_epoch(), Some(Epoch(2)));
}

#[test]
fn what_is_abandoned_never_leaves() {
    let mut core = CommitCore::new(Bounds::default());
    core.protect(G, Epoch::NONE);
    core.push(b"a");
    core.seal(Epoch(1)).unwrap();
    core.push(b"b");
    assert_eq!(core.abandon(), 2);
    let out = core.release(proof(&mut AckLedger::new(G), 1)).unwrap();
    assert!(out.is_empty());
    assert_eq!(core.counters().held_bytes, 0);
    assert!(core.pass_through(Unprotected::NotYetProtected).is_empty());
}

#[test]
fn memory_is_used_again() {
    let mut core = CommitCore::new(Bounds::default());
    let mut ledger = AckLedger::new(G);
    core.protect(G, Epoch::NONE);
    let frame = vec![7; MAX_FRAME];
    let mut places = std::collections::HashSet::new();
    for epoch in 1..=50 {
        for _ in 0..20 {
            core.push(&frame);
        }
        core.seal(Epoch(epoch)).unwrap();
        let out = core.release(proof(&mut ledger, epoch)).unwrap();
        assert_eq!(out.len(), 20);
        for buffer in &out.buffers {
            places.extend(buffer.chunks.iter().map(|c| c.as_ptr()));
        }
        core.recycle(out);
    }
    assert!(places.len() <= 3, "{} chunks were allocated for 1.3 MiB a time", places.len());
}

#[derive(Clone, Debug)]
enum Op {
    Push(u16),
    Seal(u64),
    Ack(usize),
    PassThrough,
    Protect,
    Abandon,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0u16..3000).prop_map(Op::Push),
        3 => (1u64..3).prop_map(Op::Seal),
        3 => (0usize..8).prop_map(Op::Ack),
        1 => Just(Op::PassThrough),
        2 => Just(Op::Protect),
        1 => Just(Op::Abandon),
    ]
}

/// The thirty lines that the core must agree with: one queue of (epoch, frame).
#[derive(Default)]
struct Model {
    protected: bool,
    last_sealed: u64,
    held: VecDeque<(Option<u64>, Vec<u8>)>,
    left: Vec<Vec<u8>>,
    dropped: u64,
}

impl Model {
    fn push(&mut self, frame: Vec<u8>, b: &Bounds) {
        let bytes: usize = self.held.iter().map(|(_, f)| f.len()).sum();
        if !self.protected {
            self.left.push(frame);
        } else if bytes + frame.len() > b.bytes || self.held.len() >= b.frames {
            self.dropped += 1;
        } else {
            self.held.push_back((None, frame));
        }
    }

    fn seal(&mut self, epoch: u64) {
        self.last_sealed = epoch;
        self.held.iter_mut().for_each(|(e, _)| *e = e.or(Some(epoch)));
    }

    fn release(&mut self, up_to: u64) {
        while self.held.front().is_some_and(|(e, _)| e.is_some_and(|e| e <= up_to)) {
            self.left.extend(self.held.pop_front().map(|(_, f)| f));
        }
    }
}

proptest! {
    #[test]
    fn the_core_agrees_with_the_model(ops in prop::collection::vec(op(), 1..120)) {
        let bounds = Bounds { bytes: 20_000, frames: 12, spare_chunks: 2 };
        let mut core = CommitCore::new(bounds);
        let mut ledger = AckLedger::new(G);
        let mut in_flight: Vec<u64> = Vec::new();
        let mut model = Model::default();
        let mut left: Vec<Vec<u8>> = Vec::new();
        for (i, op) in ops.into_iter().enumerate() {
            match op {
                Op::Push(len) => {
                    let mut frame = (i as u64).to_be_bytes().to_vec();
                    frame.resize(8 + usize::from(len), i as u8);
                    model.push(frame.clone(), &bounds);
                    if core.is_pass_through() { left.push(frame) } else { core.push(&frame); }
                }
                Op::Seal(step) if model.protected => {
                    let epoch = model.last_sealed + step;
                    model.seal(epoch);
                    core.seal(Epoch(epoch)).unwrap();
                    ledger.sent(Epoch(epoch), epoch);
                    in_flight.push(epoch);
                }
                Op::Ack(nth) if model.protected && nth < in_flight.len() => {
                    let epoch = in_flight[nth];
                    in_flight.drain(..=nth);
                    model.release(epoch);
                    let out = core.release(ledger.acknowledge(G, Epoch(epoch), epoch).unwrap()).unwrap();
                    left.extend(all(&out));
                    core.recycle(out);
                }
                Op::PassThrough => {
                    model.protected = false;
                    let frames = std::mem::take(&mut model.held);
                    model.left.extend(frames.into_iter().map(|(_, f)| f));
                    let out = core.pass_through(Unprotected::GrantedByArbiter);
                    left.extend(all(&out));
                    core.recycle(out);
                }
                Op::Protect => {
                    model.protected = true;
                    core.protect(G, Epoch(model.last_sealed));
                }
                Op::Abandon => {
                    prop_assert_eq!(core.abandon(), model.held.len());
                    model.held.clear();
                }
                Op::Seal(_) | Op::Ack(_) => {}
            }
            prop_assert_eq!(&left, &model.left);
            let c = core.counters();
            prop_assert_eq!(c.held_frames, model.held.len());
            prop_assert_eq!(c.held_bytes, model.held.iter().map(|(_, f)| f.len()).sum::<usize>());
            prop_assert_eq!(c.dropped_frames, model.dropped);
            prop_assert_eq!(core.output_waits(), model.held.back().is_some_and(|(e, _)| e.is_none()));
        }
    }
}
