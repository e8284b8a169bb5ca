//! Histories that a register makes are accepted, those that it cannot have made are refused, and
//! whatever a search of all orders says of a short one is what the checker says.

use super::*;
use proptest::prelude::*;

const LIMIT: usize = 1 << 20;

fn op(client: usize, call: Call, asked: u64, at: u64, answer: Answer) -> Operation {
    Operation { client, call, asked, answered: Some((at, answer)) }
}

fn get(asked: u64, at: u64, value: i64) -> Operation {
    op(1, Call::Get, asked, at, Answer::Value(Some(value)))
}

fn set(asked: u64, at: u64, value: i64) -> Operation {
    op(2, Call::Set(value), asked, at, Answer::Done)
}

fn increment(asked: u64, at: u64, value: i64) -> Operation {
    op(3, Call::Increment, asked, at, Answer::Value(Some(value)))
}

fn unanswered(call: Call, asked: u64) -> Operation {
    Operation { client: 4, call, asked, answered: None }
}

fn accepts(history: &[Operation]) -> bool {
    match check(Some(0), history, LIMIT) {
        Verdict::Linearizable => true,
        Verdict::Violation(_) => false,
        Verdict::Unknown => panic!("the limit is for longer histories"),
    }
}

#[test]
fn one_after_the_other_there_is_one_order() {
    assert!(accepts(&[]));
    assert!(accepts(&[get(0, 1, 0), set(2, 3, 7), increment(4, 5, 8), get(6, 7, 8)]));
    assert!(!accepts(&[set(2, 3, 7), get(4, 5, 0)]), "a stale read");
    assert!(!accepts(&[get(0, 1, 7), set(2, 3, 7)]), "a read of what comes later");
    assert!(!accepts(&[increment(0, 1, 1), increment(2, 3, 1)]), "a lost increment");
    let nothing = op(1, Call::Get, 0, 1, Answer::Value(None));
    assert!(!accepts(&[nothing]), "a lost key");
    assert_eq!(check(None, &[nothing, increment(2, 3, 1)], LIMIT), Verdict::Linearizable);
}

#[test]
fn what_overlaps_may_come_in_any_order() {
    let write = set(0, 10, 7);
    assert!(accepts(&[write, get(1, 2, 0)]) && accepts(&[write, get(1, 2, 7)]));
    assert!(accepts(&[write, get(1, 2, 0), get(3, 4, 7)]));
    assert!(!accepts(&[write, get(1, 2, 7), get(3, 4, 0)]), "it was seen, and then it was not");
    // At one moment counts as overlapping.
    assert!(accepts(&[set(0, 5, 7), get(5, 6, 0)]));
    // Two that did not see each other cannot both have been first.
    assert!(!accepts(&[increment(0, 10, 1), increment(0, 10, 1)]));
    assert!(accepts(&[increment(0, 10, 2), increment(0, 10, 1)]));
}

#[test]
fn without_an_answer_it_may_have_happened_or_not() {
    let write = unanswered(Call::Set(7), 2);
    assert!(accepts(&[write, get(5, 6, 0)]) && accepts(&[write, get(5, 6, 7)]));
    assert!(accepts(&[write, get(3, 4, 0), get(50, 60, 7)]), "it may come late");
    assert!(!accepts(&[write, get(3, 4, 7), get(5, 6, 0)]), "it does not go away again");
    assert!(!accepts(&[write, get(0, 1, 7)]), "it was not asked yet");
    let two = [unanswered(Call::Increment, 0), unanswered(Call::Increment, 0)];
    assert!(accepts(&[two[0], two[1], get(5, 6, 2)]) && !accepts(&[two[0], two[1], get(5, 6, 3)]));
    assert!(accepts(&[unanswered(Call::Get, 0)]));
}

#[test]
fn a_violation_is_told_where_it_shows() {
    let history = [set(0, 1, 3), set(2, 3, 5), get(4, 9, 3), set(10, 11, 9)];
    let Verdict::Violation(violation) = check(Some(0), &history, LIMIT) else { panic!() };
    assert_eq!((violation.ordered, violation.value), (2, Some(5)));
    assert_eq!(violation.stuck.last(), Some(&history[2]));
    let story = violation.story().join("\n");
    for part in ["set 5 (client 2", "2 operations are in order and leave 5", "get -> 3 (client 1"] {
        assert!(story.contains(part), "{part}:\n{story}");
    }
}

/// What a lost host with unsafe output looks like: everything as of an earlier moment.
#[test]
fn a_server_that_goes_back_in_time_is_found_among_many_operations() {
    let mut history = made(&Recipe { clients: 8, operations: 20_000, seed: 5, unanswered: 0.0 });
    assert!(accepts(&history));
    let answered = |o: &Operation| o.answered.expect("all have answers");
    let end = history.iter().map(|o| answered(o).0).max().expect("there are some");
    let number = |o: &Operation| match answered(o).1 {
        Answer::Value(Some(value)) => Some(value),
        _ => None,
    };
    let early = history[..19_000].iter().rev().find_map(number).expect("a number that was told");
    history.push(get(end + 1, end + 2, early));
    let Verdict::Violation(violation) = check(Some(0), &history, LIMIT) else { panic!() };
    assert_eq!(violation.ordered, 20_000);
}

#[test]
fn a_search_that_is_too_long_says_so() {
    let mut history: Vec<Operation> = (1..20).map(|value| set(0, 100, value)).collect();
    history.push(get(200, 201, 77));
    assert_eq!(check(Some(0), &history, 1000), Verdict::Unknown);
}

/// How a true history is made.
#[derive(Debug, Clone)]
struct Recipe {
    clients: usize,
    operations: usize,
    seed: u64,
    unanswered: f64,
}

/// A history as a register makes it that answers at some moment between question and answer. Each
/// number is set once, and far from the others, so that increments of one never reach another. In
/// the order of the moments at which things happen.
fn made(recipe: &Recipe) -> Vec<Operation> {
    let mut rng = fastrand::Rng::with_seed(recipe.seed);
    let mut free = vec![0u64; recipe.clients];
    let mut all = Vec::new();
    for number in 0..recipe.operations {
        let client = rng.usize(..recipe.clients);
        let asked = free[client] + rng.u64(1..30);
        let moment = asked + rng.u64(..30);
        let at = moment + rng.u64(..30);
        free[client] = at;
        let call = match rng.u8(..10) {
            0..4 => Call::Get,
            4..7 => Call::Set((number as i64 + 1) << 32),
            _ => Call::Increment,
        };
        let answered = rng.f64() >= recipe.unanswered;
        let happens = answered || rng.bool();
        all.push((
            moment,
            happens,
            answered,
            Operation { client, call, asked, answered: Some((at, Answer::Done)) },
        ));
    }
    all.sort_by_key(|(moment, ..)| *moment);
    let mut value = 0;
    for (_, happens, answered, operation) in &mut all {
        let Some((at, answer)) = &mut operation.answered else { continue };
        let at = *at;
        match operation.call {
            Call::Get => *answer = Answer::Value(Some(value)),
            _ if !*happens => {}
            Call::Set(new) => value = new,
            Call::Increment => {
                value += 1;
                operation.answered = Some((at, Answer::Value(Some(value))));
            }
        }
        if !*answered {
            operation.answered = None;
        }
    }
    all.into_iter().map(|(.., operation)| operation).collect()
}

fn recipe() -> impl Strategy<Value = Recipe> {
    (1..8usize, 1..120usize, any::<u64>(), prop_oneof![Just(0.0), Just(0.05)]).prop_map(
        |(clients, operations, seed, unanswered)| Recipe { clients, operations, seed, unanswered },
    )
}

/// Whether any order at all explains the history, by trying all.
fn by_all_orders(value: Option<i64>, left: &[Operation]) -> bool {
    if left.iter().all(|operation| operation.answered.is_none()) {
        return true;
    }
    let first = left.iter().filter_map(|o| o.answered).map(|(at, _)| at).min().unwrap();
    left.iter().enumerate().any(|(index, operation)| {
        let rest = || [&left[..index], &left[index + 1..]].concat();
        operation.asked <= first
            && apply(value, operation).is_some_and(|after| by_all_orders(after, &rest()))
    })
}

/// Any short history at all, most of them false.
fn any_history() -> impl Strategy<Value = Vec<Operation>> {
    let call = prop_oneof![Just(Call::Get), (1..3i64).prop_map(Call::Set), Just(Call::Increment),];
    let one = (0..3usize, call, 0..20u64, 0..8u64, 0..4i64, prop::bool::weighted(0.85));
    let operation = one.prop_map(|(client, call, asked, lasts, value, answered)| {
        let answer = match call {
            Call::Set(_) => Answer::Done,
            _ => Answer::Value((value > 0).then_some(value)),
        };
        let answered = answered.then_some((asked + lasts, answer));
        Operation { client, call, asked, answered }
    });
    prop::collection::vec(operation, 0..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn it_says_what_a_search_of_all_orders_says(history in any_history()) {
        let verdict = check(None, &history, LIMIT) == Verdict::Linearizable;
        prop_assert_eq!(verdict, by_all_orders(None, &history));
    }

    #[test]
    fn what_a_register_does_is_accepted(recipe in recipe()) {
        let history = made(&recipe);
        prop_assert_eq!(check(Some(0), &history, LIMIT), Verdict::Linearizable);
    }

    /// An answered read is given what an answered write had replaced before the read was asked.
    #[test]
    fn a_stale_read_is_refused(recipe in recipe(), pick in any::<prop::sample::Index>()) {
        let mut history = made(&recipe);
        let answered_set = |o: &&Operation| matches!(o.call, Call::Set(_)) && o.answered.is_some();
        let sets: Vec<Operation> = history.iter().filter(answered_set).copied().collect();
        let end = |o: &Operation| o.answered.map_or(u64::MAX, |(at, _)| at);
        let mut stale = Vec::new();
        for (index, read) in history.iter().enumerate() {
            if read.call != Call::Get || read.answered.is_none() {
                continue;
            }
            let newer = sets.iter().filter(|set| end(set) < read.asked).max_by_key(|set| set.asked);
            let older = newer.and_then(|newer| sets.iter().find(|set| end(set) < newer.asked));
            if let Some(Call::Set(value)) = older.map(|set| set.call) {
                stale.push((index, value));
            }
        }
        prop_assume!(!stale.is_empty());
        let (index, value) = stale[pick.index(stale.len())];
        let at = end(&history[index]);
        history[index].answered = Some((at, Answer::Value(Some(value))));
        let verdict = check(Some(0), &history, LIMIT);
        prop_assert!(matches!(verdict, Verdict::Violation(_)), "{:?}", verdict);
    }

    /// The last answered write did not happen: the next read sees what was before.
    #[test]
    fn a_write_that_is_lost_after_its_answer_is_refused(recipe in recipe(), counts in any::<bool>()) {
        let mut history = made(&recipe);
        let end = history.iter().filter_map(|o| o.answered).map(|(at, _)| at).max().unwrap_or(0);
        let before = 77 << 40;
        history.push(set(end + 1, end + 2, before));
        history.push(match counts {
            true => increment(end + 3, end + 4, before + 1),
            false => set(end + 3, end + 4, before + 2),
        });
        prop_assert!(accepts(&history));
        history.push(get(end + 5, end + 6, before));
        prop_assert!(!accepts(&history));
    }

    /// Two clients are told that they made the same step.
    #[test]
    fn a_doubled_increment_is_refused(recipe in recipe(), pick in any::<prop::sample::Index>()) {
        let mut history = made(&Recipe { unanswered: 0.0, ..recipe });
        let counts = |o: &&Operation| o.call == Call::Increment;
        let increments: Vec<Operation> = history.iter().filter(counts).copied().collect();
        prop_assume!(!increments.is_empty());
        history.push(increments[pick.index(increments.len())]);
        prop_assert!(!accepts(&history));
    }
}
