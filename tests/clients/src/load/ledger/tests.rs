//! The ledger against a model of the server: honest ones pass, those that forget are found.

use super::*;
use crate::protocol::Protocol;
use crate::resp::{CommandDecoder, Limits, Reply};
use bytes::Bytes;
use proptest::prelude::*;

/// A server in a few lines.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model(HashMap<Bytes, Bytes>);

impl Model {
    fn execute(&mut self, command: &[Bytes]) -> Answer {
        Answer::from(self.reply(command))
    }

    fn reply(&mut self, command: &[Bytes]) -> Reply {
        match &command[0][..] {
            b"GET" => Reply::Bulk(self.0.get(&command[1]).cloned()),
            b"INCR" => {
                let old = self.0.get(&command[1]).map_or(0, |text| parse_integer(text).unwrap());
                self.0.insert(command[1].clone(), (old + 1).to_string().into());
                Reply::Integer(old + 1)
            }
            _ => {
                for [key, value] in command[1..].as_chunks::<2>().0 {
                    self.0.insert(key.clone(), value.clone());
                }
                Reply::Simple("OK".into())
            }
        }
    }
}

/// A ledger with a model server that holds the first version of all its keys.
struct Bench {
    ledger: Ledger,
    model: Model,
    rng: fastrand::Rng,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Self::with(seed, true)
    }

    fn with(seed: u64, counters: bool) -> Self {
        let values = Values { seed, size: (10, 60) };
        let prefix = String::new();
        let layout = Layout { prefix, connections: 3, written: 20, keys: 40, counters, values };
        let mut ledger = Ledger::new(Arc::new(layout), Arc::default(), 1);
        let (mut model, mut out) = (Model::default(), Dialogue::new(Protocol::Resp));
        let keys = ledger.put_first(0, usize::MAX, &mut out);
        assert_eq!(keys.len(), 13);
        let reply = model.execute(&command(&out.out));
        assert!(ledger.judge_first(keys, &reply).acknowledged);
        Self { ledger, model, rng: fastrand::Rng::with_seed(seed) }
    }

    fn ask(&mut self) -> (Asked, Vec<Bytes>) {
        let mut out = Dialogue::new(Protocol::Resp);
        let asked = self.ledger.ask(&mut self.rng, 0.4, &mut out);
        (asked, command(&out.out))
    }

    /// Asks and answers `count` requests, so many in flight at a time.
    fn converse(&mut self, count: usize, depth: usize) {
        for _ in 0..count.div_ceil(depth) {
            let asked: Vec<_> = (0..depth).map(|_| self.ask()).collect();
            for (asked, command) in asked {
                let reply = self.model.execute(&command);
                let judgement = self.ledger.judge(asked, &reply);
                assert_eq!((judgement.lost, judgement.wrong), (0, false), "{judgement:?}");
            }
        }
    }

    /// Lost and wrong in an audit of everything.
    fn audit(&mut self) -> (u64, u64) {
        let (mut lost, mut wrong) = (0, 0);
        for at in 0..self.ledger.audit_len() {
            let mut out = Dialogue::new(Protocol::Resp);
            self.ledger.put_audit(at, &mut out);
            let reply = self.model.execute(&command(&out.out));
            let judgement = self.ledger.judge_audit(at, &reply);
            lost += judgement.lost;
            wrong += u64::from(judgement.wrong);
            assert_eq!(judgement.story.is_some(), judgement != Judgement::default());
        }
        (lost, wrong)
    }

    /// All but the shared counter, which the ledger does not audit.
    fn own(&self) -> Model {
        let mut own = self.model.clone();
        own.0.remove(&self.ledger.layout.shared_counter()[..]);
        own
    }
}

fn command(out: &[u8]) -> Vec<Bytes> {
    let mut decoder = CommandDecoder::new(Limits::default());
    decoder.feed(out);
    decoder.next_command().unwrap().unwrap()
}

proptest! {
    #[test]
    fn an_honest_server_is_never_accused(
        seed: u64, count in 0usize..300, depth in 1usize..20, flying in 0usize..20, applied in 0usize..20,
    ) {
        let mut bench = Bench::new(seed);
        bench.converse(count, depth);
        // The connection breaks: of what was in flight the server has done the first part.
        let cut: Vec<_> = (0..flying).map(|_| bench.ask()).collect();
        for (_, command) in cut.iter().take(applied) {
            bench.model.execute(command);
        }
        prop_assert_eq!(bench.audit(), (0, 0));
    }

    #[test]
    fn a_server_that_went_back_in_time_has_lost_writes(
        seed: u64, before in 0usize..200, after in 0usize..60,
    ) {
        let mut bench = Bench::new(seed);
        bench.converse(before, 4);
        let old = bench.model.clone();
        let old_own = bench.own();
        bench.converse(after, 4);
        let changed = bench.own() != old_own;
        bench.model = old;
        let (lost, wrong) = bench.audit();
        prop_assert_eq!((lost > 0, wrong), (changed, 0));
        // The same losses are not counted again by a second audit.
        prop_assert_eq!(bench.audit(), (0, 0));
    }

    #[test]
    fn any_changed_byte_of_a_value_is_found(seed: u64, which: usize, at: usize) {
        let mut bench = Bench::new(seed);
        bench.converse(50, 2);
        let key = Bytes::from(bench.ledger.layout.key(bench.ledger.global(which % 13)));
        let mut value = bench.model.0[&key].to_vec();
        let len = value.len();
        value[at % len] ^= 0x80;
        bench.model.0.insert(key, value.into());
        prop_assert_eq!(bench.audit(), (0, 1));
    }
}

#[test]
fn the_shared_counter_must_pass_what_was_acknowledged() {
    let mut bench = Bench::new(1);
    let get = |value: i64| Answer::Value(Some(value.to_string().into()));
    let mut counted = 0;
    for value in 1..=5 {
        bench.ledger.shared.sent.fetch_add(1, Ordering::Relaxed);
        let asked = Asked::IncrementShared { floor: value - 1 };
        assert!(!bench.ledger.judge(asked, &Answer::Number(value)).wrong);
    }
    bench.ledger.shared.sent.fetch_add(1, Ordering::Relaxed);
    let asked = Asked::IncrementShared { floor: 5 };
    assert!(bench.ledger.judge(asked, &Answer::Number(5)).wrong);
    let shared = bench.ledger.shared.clone();
    assert_eq!(shared.judge_audit(&mut counted, &get(6)), Judgement::default());
    assert_eq!(shared.judge_audit(&mut counted, &get(4)).lost, 2);
    assert_eq!(shared.judge_audit(&mut counted, &get(4)).lost, 0);
    assert!(shared.judge_audit(&mut counted, &get(7)).wrong);
}

#[test]
fn without_counters_there_are_only_keys() {
    let mut bench = Bench::with(1, false);
    assert_eq!((bench.ledger.resets(), bench.ledger.audit_len()), (0, 13));
    for _ in 0..500 {
        let (asked, command) = bench.ask();
        assert!(matches!(asked, Asked::Get { .. } | Asked::Set { .. }), "{asked:?}");
        let answer = bench.model.execute(&command);
        assert!(!bench.ledger.judge(asked, &answer).wrong);
    }
    assert_eq!(bench.audit(), (0, 0));
}
