//! Whether what many clients saw of one number can be explained: is their history linearizable?
//!
//! A history is linearizable if its operations can be put in one order in which a single register
//! gives every answer that was given, and in which no operation stands before one that had been
//! answered when it was asked. That is what a server promises that forgets nothing, and it is judged
//! here without any knowledge of who wrote what. A history of several keys is linearizable if that of
//! each key is.
//!
//! The search is that of Wing and Gong ("Testing and Verifying Concurrent Objects", 1993) with the
//! memory of Lowe ("Testing for Linearizability", 2017): a set of operations put in order and the
//! value that they leave are looked at once, whatever their order was.
//!
//! ```text
//! events by time:   call a   call b   return a   call c   return b   return c
//!                     |        |         |
//!                     +--------+---- next may come any call before the first return that is left;
//!                                    a return that is left, and no such call fits: take one back
//! ```
//! An operation without an answer has no return: it may come at any time after its call, or never.
//!
//! Invariants: nothing here reads a clock or a socket. A history is refused only if there is no such
//! order, and accepted only if one was found; the search ends at [`check`]'s limit, and then says that
//! it does not know.

use std::collections::HashSet;
use std::fmt;

#[cfg(test)]
mod tests;

/// Operations that a [`Violation`] tells of, before it and at it.
const TOLD: usize = 8;

/// What was asked of the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// What it is.
    Get,
    /// That it be this.
    Set(i64),
    /// That it be one more, and what it is then. What is not there counts as 0.
    Increment,
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is done.
    Done,
    /// The number, or that there is none.
    Value(Option<i64>),
}

/// One operation of one client. Times are of one clock that only goes forward; the unit is whatever
/// the history has been written in, and [`Operation`] shows it as nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Whose it is; only for those who read of it.
    pub client: usize,
    /// What was asked.
    pub call: Call,
    /// Before it was sent.
    pub asked: u64,
    /// What was answered and when, after it was received; none if no answer came: it may have
    /// happened, then or later, or not.
    pub answered: Option<(u64, Answer)>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ns: u64| ns as f64 / 1e6;
        match self.call {
            Call::Get => write!(f, "get")?,
            Call::Set(value) => write!(f, "set {value}")?,
            Call::Increment => write!(f, "increment")?,
        }
        match self.answered {
            None => write!(f, ", no answer")?,
            Some((_, Answer::Done)) => {}
            Some((_, Answer::Value(value))) => write!(f, " -> {}", Number(value))?,
        }
        write!(f, " (client {}, {:.3} ms", self.client, ms(self.asked))?;
        match self.answered {
            Some((at, _)) => write!(f, " to {:.3} ms)", ms(at)),
            None => write!(f, " on)"),
        }
    }
}

/// A number that may not be there, for people.
struct Number(Option<i64>);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value}"),
            None => write!(f, "nothing"),
        }
    }
}

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none.
    Violation(Box<Violation>),
    /// The search was given up at its limit.
    Unknown,
}

/// Where the longest order ends that could be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Operations in that order.
    pub ordered: usize,
    /// The last of them.
    pub last: Vec<Operation>,
    /// The number that they leave.
    pub value: Option<i64>,
    /// Those of which one had to come next, and none fits. The first of them to be answered stands
    /// at the end.
    pub stuck: Vec<Operation>,
}

impl Violation {
    /// What happened, a line each.
    pub fn story(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.last.iter().map(Operation::to_string).collect();
        lines.push(format!(
            "{} operations are in order and leave {}; none of these can be next:",
            self.ordered,
            Number(self.value)
        ));
        lines.extend(self.stuck.iter().map(Operation::to_string));
        lines
    }
}

/// Judges the history of one number that was `initial` before all of it. At most `limit` pairs of a
/// set and a value are remembered.
pub fn check(initial: Option<i64>, operations: &[Operation], limit: usize) -> Verdict {
    Search::new(initial, operations).run(limit)
}

/// What the number is after an operation; none if the operation cannot have given its answer.
fn apply(value: Option<i64>, operation: &Operation) -> Option<Option<i64>> {
    let (after, answer) = match operation.call {
        Call::Get => (value, Answer::Value(value)),
        Call::Set(new) => (Some(new), Answer::Done),
        Call::Increment => {
            let new = Some(value.unwrap_or(0).wrapping_add(1));
            (new, Answer::Value(new))
        }
    };
    operation.answered.is_none_or(|(_, given)| given == answer).then_some(after)
}

/// Before the first event and behind the last.
const END: usize = 0;

/// What happens at a node of the list of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Call(usize),
    Return(usize),
}

/// The search. Events are a list in both directions; those of an operation that is in the order are
/// not in the list.
struct Search {
    /// Those with an answer by the time of their call, then those without.
    operations: Vec<Operation>,
    /// Event of node i + 1.
    events: Vec<Event>,
    /// The nodes of each operation; the second is [`END`] if there is none.
    nodes: Vec<(usize, usize)>,
    next: Vec<usize>,
    previous: Vec<usize>,
    value: Option<i64>,
    /// The order: operations, and the value before each.
    order: Vec<(usize, Option<i64>)>,
    chosen: Chosen,
    /// The latest return that nothing got past, and what to tell of it.
    furthest: Option<(usize, Violation)>,
}

impl Search {
    fn new(initial: Option<i64>, history: &[Operation]) -> Self {
        let mut operations: Vec<Operation> = history.to_vec();
        // A question without an answer says nothing.
        operations.retain(|operation| operation.call != Call::Get || operation.answered.is_some());
        operations.sort_by_key(|operation| (operation.answered.is_none(), operation.asked));
        let answered = operations.partition_point(|operation| operation.answered.is_some());
        // At one moment calls come first: those were at the same time.
        let mut events: Vec<(u64, bool, Event)> = Vec::new();
        for (index, operation) in operations.iter().enumerate() {
            events.push((operation.asked, false, Event::Call(index)));
            if let Some((at, _)) = operation.answered {
                events.push((at.max(operation.asked), true, Event::Return(index)));
            }
        }
        events.sort_by_key(|(at, is_return, _)| (*at, *is_return));
        let mut nodes = vec![(END, END); operations.len()];
        for (node, (_, _, event)) in (1..).zip(&events) {
            match *event {
                Event::Call(index) => nodes[index].0 = node,
                Event::Return(index) => nodes[index].1 = node,
            }
        }
        let len = events.len() + 1;
        Self {
            chosen: Chosen::new(answered, operations.len()),
            operations,
            events: events.into_iter().map(|(_, _, event)| event).collect(),
            nodes,
            next: (0..len).map(|node| (node + 1) % len).collect(),
            previous: (0..len).map(|node| (node + len - 1) % len).collect(),
            value: initial,
            order: Vec::new(),
            furthest: None,
        }
    }

    fn run(mut self, limit: usize) -> Verdict {
        let mut seen = HashSet::new();
        let mut node = self.next[END];
        while node != END {
            match self.events[node - 1] {
                Event::Call(index) => {
                    node = match apply(self.value, &self.operations[index]) {
                        Some(after) if seen.insert(self.chosen.with(index, after)) => {
                            self.take(index, after);
                            self.next[END]
                        }
                        _ => self.next[node],
                    };
                }
                Event::Return(_) => {
                    self.note(node);
                    let Some(index) = self.take_back() else {
                        let furthest = self.furthest.expect("a return was met, and noted");
                        return Verdict::Violation(Box::new(furthest.1));
                    };
                    node = self.next[self.nodes[index].0];
                }
            }
            if seen.len() > limit {
                return Verdict::Unknown;
            }
        }
        // No return is left.
        Verdict::Linearizable
    }

    /// Puts an operation next in the order.
    fn take(&mut self, index: usize, after: Option<i64>) {
        self.order.push((index, self.value));
        self.value = after;
        self.chosen.set(index);
        let (call, ret) = self.nodes[index];
        self.unlink(call);
        if ret != END {
            self.unlink(ret);
        }
    }

    /// Takes the last one out of the order again.
    fn take_back(&mut self) -> Option<usize> {
        let (index, before) = self.order.pop()?;
        self.value = before;
        self.chosen.clear(index);
        let (call, ret) = self.nodes[index];
        // In the opposite order of their unlinking.
        if ret != END {
            self.link(ret);
        }
        self.link(call);
        Some(index)
    }

    fn unlink(&mut self, node: usize) {
        let (previous, next) = (self.previous[node], self.next[node]);
        self.next[previous] = next;
        self.previous[next] = previous;
    }

    fn link(&mut self, node: usize) {
        let (previous, next) = (self.previous[node], self.next[node]);
        self.next[previous] = node;
        self.previous[next] = node;
    }

    /// Notes a return that the present order cannot get past, if none was further.
    fn note(&mut self, node: usize) {
        if self.furthest.as_ref().is_some_and(|(furthest, _)| *furthest >= node) {
            return;
        }
        let from = self.order.len().saturating_sub(TOLD);
        let last = self.order[from..].iter().map(|(index, _)| self.operations[*index]);
        let mut stuck = Vec::new();
        let mut at = self.next[END];
        while at != node {
            if let Event::Call(index) = self.events[at - 1] {
                stuck.push(index);
            }
            at = self.next[at];
        }
        if let Event::Return(first) = self.events[node - 1] {
            stuck.retain(|index| *index != first);
            stuck.truncate(TOLD);
            stuck.push(first);
        }
        let violation = Violation {
            ordered: self.order.len(),
            last: last.collect(),
            value: self.value,
            stuck: stuck.into_iter().map(|index| self.operations[index]).collect(),
        };
        self.furthest = Some((node, violation));
    }
}

/// The set of operations in the order. Of those with an answer nearly all early ones are in it and
/// nearly all late ones are not, so that what tells two sets apart is short.
struct Chosen {
    answered: usize,
    words: Vec<u64>,
    /// Words from here on are all that is told: the ones before are full.
    low: usize,
    /// Words from here on are empty.
    high: usize,
    /// The words of those without an answer.
    open: Vec<u64>,
}

impl Chosen {
    fn new(answered: usize, all: usize) -> Self {
        let words = vec![0; answered / 64 + 1];
        Self { answered, words, low: 0, high: 0, open: vec![0; (all - answered).div_ceil(64)] }
    }

    fn place(&self, index: usize) -> (bool, usize, u64) {
        match index.checked_sub(self.answered) {
            None => (false, index / 64, 1 << (index % 64)),
            Some(index) => (true, index / 64, 1 << (index % 64)),
        }
    }

    fn set(&mut self, index: usize) {
        match self.place(index) {
            (true, word, bit) => self.open[word] |= bit,
            (false, word, bit) => {
                self.words[word] |= bit;
                self.high = self.high.max(word + 1);
                while self.words.get(self.low) == Some(&u64::MAX) {
                    self.low += 1;
                }
            }
        }
    }

    fn clear(&mut self, index: usize) {
        match self.place(index) {
            (true, word, bit) => self.open[word] &= !bit,
            (false, word, bit) => {
                self.words[word] &= !bit;
                self.low = self.low.min(word);
                while self.high > 0 && self.words[self.high - 1] == 0 {
                    self.high -= 1;
                }
            }
        }
    }

    /// This set with one more, and a value, as something to remember.
    fn with(&mut self, index: usize, value: Option<i64>) -> Box<[u64]> {
        self.set(index);
        let told = self.words.get(self.low..self.high).unwrap_or_default();
        let ends = [self.low as u64, u64::from(value.is_some()), value.unwrap_or(0) as u64];
        let key = ends.iter().chain(&self.open).chain(told).copied().collect();
        self.clear(index);
        key
    }
}
