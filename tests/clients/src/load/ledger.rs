//! The history of what one connection wrote, and the judgement on each reply: no I/O, no clock.
//!
//! Replies come in the order of requests and nobody else writes these keys, so when a request is
//! made it is known what its reply must be.
//!
//! Invariants: a GET must give the version set last before it on this connection; an own counter
//! gives its last reply plus one; the shared counter gives more than anyone had been told when
//! the request was made. At the end each key is at its last acknowledged version or a later one
//! that was sent, and each counter is between the increments acknowledged and those sent.

use super::values::{Seen, Values, describe};
use crate::protocol::{Answer, Dialogue, Request};
use crate::resp::parse_integer;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

#[cfg(test)]
mod tests;

/// Counters that each connection owns.
const COUNTERS: usize = 4;
/// One write in so many increments an own counter.
const OWN_INCREMENT: usize = 8;
/// One write in so many increments the shared counter.
const SHARED_INCREMENT: usize = 32;
/// One read in so many reads a key that is never written, where there are such.
const COLD_READ: usize = 16;

/// How the keys of a load are named and shared out: key g belongs to connection g modulo their
/// number; those below `written` are written.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) prefix: String,
    pub(super) connections: u64,
    pub(super) written: u64,
    pub(super) keys: u64,
    pub(super) counters: bool,
    pub(super) values: Values,
}

/// The counter that all connections increment.
#[derive(Debug, Default)]
pub(super) struct SharedCounter {
    sent: AtomicI64,
    acknowledged: AtomicI64,
    highest: AtomicI64,
}

/// The history of one connection's keys and counters.
#[derive(Debug)]
pub(super) struct Ledger {
    layout: Arc<Layout>,
    shared: Arc<SharedCounter>,
    owner: u64,
    /// Number of own keys that are written; the others are only read.
    written: usize,
    /// For each own key the last version acknowledged and the last one sent; 0 is none.
    acknowledged: Vec<u32>,
    sent: Vec<u32>,
    counters: [Counter; COUNTERS],
    /// Losses counted already, by key: the acknowledged version that was missing.
    counted: HashMap<usize, u32>,
    scratch: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counter {
    sent: i64,
    acknowledged: i64,
    last: i64,
    /// Increments counted as lost already.
    counted: i64,
}

/// A request in flight, with what its reply is judged by. Keys are counted within the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Set {
        key: u32,
        version: u32,
    },
    /// `floor` is the version that was acknowledged when the request was made.
    Get {
        key: u32,
        expected: u32,
        floor: u32,
    },
    Increment {
        counter: u32,
    },
    /// `floor` is the highest value anyone had been told when the request was made.
    IncrementShared {
        floor: i64,
    },
}

/// The judgement on one reply.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Judgement {
    /// A write is acknowledged by it.
    pub(super) acknowledged: bool,
    /// Acknowledged writes that it shows to be gone, not counted before.
    pub(super) lost: u64,
    /// It contradicts the history.
    pub(super) wrong: bool,
    /// For people, when something is lost or wrong.
    pub(super) story: Option<Story>,
}

/// What was asked, expected, and got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Story {
    pub(super) command: String,
    pub(super) expected: String,
    pub(super) got: String,
}

impl Layout {
    fn key(&self, global: u64) -> Vec<u8> {
        format!("{}k:{global}", self.prefix).into_bytes()
    }

    fn counter(&self, owner: u64, number: usize) -> Vec<u8> {
        format!("{}c:{owner}:{number}", self.prefix).into_bytes()
    }

    /// The name of the shared counter.
    pub(super) fn shared_counter(&self) -> Vec<u8> {
        format!("{}shared", self.prefix).into_bytes()
    }
}

impl Ledger {
    pub(super) fn new(layout: Arc<Layout>, shared: Arc<SharedCounter>, owner: u64) -> Self {
        let own = |all: u64| all.saturating_sub(owner).div_ceil(layout.connections) as usize;
        let (keys, written) = (own(layout.keys), own(layout.written));
        Self {
            layout,
            shared,
            owner,
            written,
            acknowledged: vec![0; keys],
            sent: vec![0; keys],
            counters: [Counter::default(); COUNTERS],
            counted: HashMap::new(),
            scratch: Vec::new(),
        }
    }

    fn global(&self, key: usize) -> u64 {
        key as u64 * self.layout.connections + self.owner
    }

    /// Number of own keys.
    pub(super) fn keys(&self) -> usize {
        self.sent.len()
    }

    fn own_counters(&self) -> usize {
        if self.layout.counters { COUNTERS } else { 0 }
    }

    /// Number of counters to be reset, left by an earlier load perhaps: the own ones, and the shared
    /// one if this is the first ledger.
    pub(super) fn resets(&self) -> usize {
        self.own_counters() + usize::from(self.layout.counters && self.owner == 0)
    }

    /// Asks for a reset of one of them.
    pub(super) fn put_reset(&self, counter: usize, out: &mut Dialogue) {
        let name = match counter < COUNTERS {
            true => self.layout.counter(self.owner, counter),
            false => self.layout.shared_counter(),
        };
        out.put(Request::Reset(&name));
    }

    /// Judges the answer to [`Ledger::put_reset`].
    pub(super) fn judge_reset(&self, answer: &Answer) -> Judgement {
        match answer {
            Answer::Done | Answer::Number(_) => Judgement::default(),
            other => wrong("reset of a counter".into(), "done".into(), other),
        }
    }

    /// Sets the first version of keys from `from` on by one request, of about `bytes` and at least
    /// one key; which keys.
    pub(super) fn put_first(
        &mut self,
        from: usize,
        bytes: usize,
        out: &mut Dialogue,
    ) -> Range<usize> {
        let mut pairs = Vec::new();
        let (mut to, mut len) = (from, 0);
        while to < self.keys() && len < bytes {
            let global = self.global(to);
            let mut value = Vec::new();
            self.layout.values.write(global, 1, &mut value);
            let key = self.layout.key(global);
            len += key.len() + value.len();
            pairs.push((key, value));
            self.sent[to] = 1;
            to += 1;
        }
        match &pairs[..] {
            [(key, value)] => out.put(Request::Set(key, value)),
            pairs => out.put(Request::SetMany(pairs)),
        }
        from..to
    }

    /// Judges the reply to [`Ledger::put_first`].
    pub(super) fn judge_first(&mut self, keys: Range<usize>, reply: &Answer) -> Judgement {
        if *reply == Answer::Done {
            self.acknowledged[keys].fill(1);
            return Judgement { acknowledged: true, ..Judgement::default() };
        }
        wrong(format!("SET of {} keys", keys.len()), "OK".into(), reply)
    }

    /// Chooses a request and puts it.
    pub(super) fn ask(&mut self, rng: &mut fastrand::Rng, reads: f64, out: &mut Dialogue) -> Asked {
        if rng.f64() < reads {
            let cold = self.written < self.keys() && rng.usize(..COLD_READ) == 0;
            let from = if cold { self.written..self.keys() } else { 0..self.written };
            let key = rng.usize(from);
            out.put(Request::Get(&self.layout.key(self.global(key))));
            let (expected, floor) = (self.sent[key], self.acknowledged[key]);
            return Asked::Get { key: key as u32, expected, floor };
        }
        if self.layout.counters && rng.usize(..SHARED_INCREMENT) == 0 {
            out.put(Request::Increment(&self.layout.shared_counter()));
            self.shared.sent.fetch_add(1, Ordering::Relaxed);
            let floor = self.shared.highest.load(Ordering::Relaxed);
            return Asked::IncrementShared { floor };
        }
        if self.layout.counters && rng.usize(..OWN_INCREMENT) == 0 {
            let counter = rng.usize(..COUNTERS);
            out.put(Request::Increment(&self.layout.counter(self.owner, counter)));
            self.counters[counter].sent += 1;
            return Asked::Increment { counter: counter as u32 };
        }
        let key = rng.usize(..self.written);
        let (global, version) = (self.global(key), self.sent[key] + 1);
        self.sent[key] = version;
        self.layout.values.write(global, version, &mut self.scratch);
        out.put(Request::Set(&self.layout.key(global), &self.scratch));
        Asked::Set { key: key as u32, version }
    }

    /// Judges the reply to a request of [`Ledger::ask`]; replies must be given in their order.
    pub(super) fn judge(&mut self, asked: Asked, reply: &Answer) -> Judgement {
        match asked {
            Asked::Set { key, version } => {
                if *reply == Answer::Done {
                    self.acknowledged[key as usize] = version;
                    return Judgement { acknowledged: true, ..Judgement::default() };
                }
                let global = self.global(key as usize);
                wrong(format!("SET key {global} version {version}"), "OK".into(), reply)
            }
            Asked::Get { key, expected, floor } => {
                let (key, seen) = (key as usize, self.seen(key as usize, reply));
                if seen == Some(expected) {
                    return Judgement::default();
                }
                let command = format!("GET key {}", self.global(key));
                let mut judgement = wrong(command, version_name(expected), reply);
                judgement.lost = self.missing(key, floor, seen);
                judgement
            }
            Asked::Increment { counter } => {
                let state = &mut self.counters[counter as usize];
                let expected = state.last + 1;
                let acknowledged = matches!(reply, Answer::Number(_));
                if let Answer::Number(value) = reply {
                    state.last = *value;
                    state.acknowledged += 1;
                }
                if *reply == Answer::Number(expected) {
                    return Judgement { acknowledged, ..Judgement::default() };
                }
                let command = format!("INCR counter {counter} of connection {}", self.owner);
                Judgement { acknowledged, ..wrong(command, expected.to_string(), reply) }
            }
            Asked::IncrementShared { floor } => {
                let Answer::Number(value) = *reply else {
                    return wrong("INCR shared counter".into(), "an integer".into(), reply);
                };
                self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                self.shared.highest.fetch_max(value, Ordering::Relaxed);
                if value > floor {
                    return Judgement { acknowledged: true, ..Judgement::default() };
                }
                let expected = format!("more than {floor}");
                let judgement = wrong("INCR shared counter".into(), expected, reply);
                Judgement { acknowledged: true, ..judgement }
            }
        }
    }

    /// Number of things to read back.
    pub(super) fn audit_len(&self) -> usize {
        self.keys() + self.own_counters()
    }

    /// Asks for thing `at`, to read it back.
    pub(super) fn put_audit(&self, at: usize, out: &mut Dialogue) {
        let name = match at.checked_sub(self.keys()) {
            None => self.layout.key(self.global(at)),
            Some(counter) => self.layout.counter(self.owner, counter),
        };
        out.put(Request::Get(&name));
    }

    /// Judges what was read back.
    pub(super) fn judge_audit(&mut self, at: usize, reply: &Answer) -> Judgement {
        if let Some(counter) = at.checked_sub(self.keys()) {
            let command = format!("audit of counter {counter} of connection {}", self.owner);
            let state = &mut self.counters[counter];
            return judge_total(command, state.acknowledged, state.sent, &mut state.counted, reply);
        }
        let (floor, sent) = (self.acknowledged[at], self.sent[at]);
        let seen = self.seen(at, reply);
        if seen.is_some_and(|version| (floor..=sent).contains(&version)) {
            return Judgement::default();
        }
        let lost = self.missing(at, floor, seen);
        let expected = match floor == sent {
            true => version_name(floor),
            false => format!("{} to {sent}", version_name(floor)),
        };
        let command = format!("audit of key {}", self.global(at));
        let judgement = wrong(command, expected, reply);
        // An older version is a loss and no more; anything else was never to be there at all.
        Judgement { lost, wrong: seen.is_none_or(|version| version > sent), ..judgement }
    }

    /// Acknowledged writes that are lost if what `at` stands for cannot be read back at all.
    pub(super) fn unread(&self, at: usize) -> u64 {
        match at.checked_sub(self.keys()) {
            None => u64::from(self.acknowledged[at] > 0),
            Some(counter) => self.counters[counter].acknowledged as u64,
        }
    }

    /// The version that a reply holds of a key, 0 for nil, or none if it is something else.
    fn seen(&mut self, key: usize, reply: &Answer) -> Option<u32> {
        match reply {
            Answer::Value(None) => Some(0),
            Answer::Value(Some(value)) => {
                let global = self.global(key);
                match self.layout.values.recognise(global, value, &mut self.scratch) {
                    Seen::Version(version) => Some(version),
                    Seen::Foreign => None,
                }
            }
            _ => None,
        }
    }

    /// 1 if an older version than `floor` was seen and that loss was not counted before.
    fn missing(&mut self, key: usize, floor: u32, seen: Option<u32>) -> u64 {
        let older = seen.is_some_and(|version| version < floor);
        u64::from(older && self.counted.insert(key, floor) != Some(floor))
    }
}

impl SharedCounter {
    /// Judges the value read back; `counted` keeps how many losses were counted.
    pub(super) fn judge_audit(&self, counted: &mut i64, reply: &Answer) -> Judgement {
        let acknowledged = self.acknowledged();
        let sent = self.sent.load(Ordering::Relaxed);
        judge_total("audit of the shared counter".into(), acknowledged, sent, counted, reply)
    }

    /// Increments acknowledged.
    pub(super) fn acknowledged(&self) -> i64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// Judges a counter at the end: between increments acknowledged and sent.
fn judge_total(
    command: String,
    least: i64,
    most: i64,
    counted: &mut i64,
    reply: &Answer,
) -> Judgement {
    let value = match reply {
        Answer::Value(None) => Some(0),
        Answer::Value(Some(text)) => parse_integer(text.trim_ascii()),
        _ => None,
    };
    if value.is_some_and(|value| (least..=most).contains(&value)) {
        return Judgement::default();
    }
    let missing = value.map_or(0, |value| (least - value - *counted).max(0));
    *counted += missing;
    let above = value.is_none_or(|value| value > most);
    let judgement = wrong(command, format!("{least} to {most}"), reply);
    Judgement { lost: missing as u64, wrong: above, ..judgement }
}

fn wrong(command: String, expected: String, reply: &Answer) -> Judgement {
    let story = Some(Story { command, expected, got: describe_answer(reply) });
    Judgement { acknowledged: false, lost: 0, wrong: true, story }
}

fn version_name(version: u32) -> String {
    if version == 0 { "nil".into() } else { format!("version {version}") }
}

/// Describes an answer for people.
pub(super) fn describe_answer(answer: &Answer) -> String {
    match answer {
        Answer::Done => "OK".into(),
        Answer::Number(value) => value.to_string(),
        Answer::Value(None) => "nil".into(),
        Answer::Value(Some(value)) => describe(value),
        Answer::Other(text) => text.clone(),
    }
}
