//! The backup's core, input by input.

use super::*;

const G: Generation = Generation(1);
const LINK: LinkId = LinkId(5);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn receipt(epoch: u64) -> Receipt {
    Receipt { generation: G, epoch: Epoch(epoch), digest: epoch, provisional: false }
}

fn ask(base: u64, wanted: u64) -> Action {
    Action::Ask { base: Generation(base), wanted: Generation(wanted) }
}

fn complete(epoch: u64) -> Input {
    Input::Complete { link: LINK, receipt: receipt(epoch) }
}

fn syncing() -> Backup {
    let mut b = Backup::new(Config::default(), Generation(0), ms(0));
    let hello = Input::Hello { link: LINK, generation: G };
    assert_eq!(b.handle(ms(0), hello), [Action::Welcome(LINK)]);
    b
}

fn ready() -> Backup {
    let mut b = syncing();
    assert_eq!(
        b.handle(ms(1), complete(1)),
        [Action::Apply(receipt(1)), Action::Ack { link: LINK, receipt: receipt(1) }]
    );
    b
}

fn until_it_acts(b: &mut Backup) -> Vec<Action> {
    loop {
        let at = b.next_deadline().expect("it waits for something");
        let actions = b.handle(at, Input::Tick);
        if !actions.is_empty() {
            return actions;
        }
    }
}

fn grant(b: &mut Backup, generation: u64) -> Vec<Action> {
    let generation = Generation(generation);
    b.handle(ms(500), Input::Verdict { generation, verdict: Verdict::Granted })
}

#[test]
fn silence_leads_to_a_promotion_from_the_last_complete_epoch() {
    let mut b = ready();
    b.handle(ms(2), complete(2));
    assert_eq!(until_it_acts(&mut b), [ask(1, 2)]);
    let promote = Action::Promote { generation: Generation(2), from: Epoch(2) };
    assert_eq!(grant(&mut b, 2), [Action::Close(LINK), promote]);
    assert_eq!(b.handle(ms(501), complete(3)), [], "nothing is acknowledged any more");
    b.handle(ms(502), Input::Running);
    assert_eq!(b.state(), State::Promoted { generation: Generation(2) });
    let link = LinkId(6);
    assert_eq!(
        b.handle(ms(503), Input::Hello { link, generation: G }),
        [Action::Refuse { link, code: RefuseCode::Promoted, newest: Generation(2) }]
    );
}

/// Its pulses come, but nothing that they tell of moves.
#[test]
fn a_primary_that_only_beats_is_replaced() {
    let mut b = ready();
    let stall = Config::default().times.stall.as_millis() as u64;
    let beat = |b: &mut Backup, at, work| {
        let marks = Marks { work, runtime: at, ..Marks::default() };
        let mut actions = b.handle(ms(at), Input::Pulse { link: LINK, marks });
        actions.extend(b.handle(ms(at), Input::Tick));
        actions
    };
    let at_work = (10..2 * stall).step_by(10).find(|at| !beat(&mut b, *at, *at).is_empty());
    assert_eq!(at_work, None);
    let hung = (2 * stall..9 * stall).step_by(10).find(|at| !beat(&mut b, *at, 7).is_empty());
    assert_eq!(hung, Some(3 * stall - 10), "so long after the last step");
    assert!(matches!(b.state(), State::Asking { .. }));
    beat(&mut b, 3 * stall + 10, 7);
    assert!(matches!(b.state(), State::Asking { .. }), "a further pulse takes nothing back");
    beat(&mut b, 3 * stall + 20, 8);
    assert_eq!(b.state(), State::Ready { last: Epoch(1) }, "work does");
}

/// A connection can break while the primary lives and makes a new one.
#[test]
fn pulses_keep_a_primary_alive_that_connects_anew_but_not_for_ever() {
    let mut b = ready();
    assert_eq!(b.handle(ms(10), Input::Lost(LINK)), []);
    let stall = Config::default().times.stall.as_millis() as u64;
    let mut asked_at = None;
    for at in (10..3 * stall).step_by(10) {
        let marks = Marks { work: at, runtime: at, ..Marks::default() };
        b.handle(ms(at), Input::Pulse { link: LINK, marks });
        if !b.handle(ms(at), Input::Tick).is_empty() {
            asked_at = Some(at);
            break;
        }
    }
    let timeout = Config::default().times.timeout.as_millis() as u64;
    assert_eq!(asked_at, Some(stall + timeout));
}

/// What still comes in at the old side follows the container.
#[test]
fn the_connection_of_a_hand_over_is_not_closed_by_the_promotion() {
    let mut b = ready();
    let bye = Input::Bye { link: LINK, bye: Bye::Switchover, last: Epoch(1) };
    assert_eq!(b.handle(ms(2), bye), [ask(1, 2)]);
    assert_eq!(grant(&mut b, 2), [Action::Promote { generation: Generation(2), from: Epoch(1) }]);
    assert_eq!(b.handle(ms(501), complete(2)), [], "but nothing of it is acknowledged");
}

#[test]
fn without_a_complete_checkpoint_nothing_is_promoted() {
    let mut b = syncing();
    assert_eq!(until_it_acts(&mut b), [Action::Close(LINK), Action::Lost]);
    assert_eq!(b.state(), State::Waiting);
    assert_eq!(b.handle(ms(300), Input::Promote), []);
    assert_eq!(grant(&mut b, 2), []);
}

#[test]
fn life_takes_a_suspicion_back_and_its_grant_is_void() {
    let mut b = ready();
    until_it_acts(&mut b);
    b.handle(ms(300), Input::Heard(LINK));
    assert_eq!(b.state(), State::Ready { last: Epoch(1) });
    assert_eq!(grant(&mut b, 2), []);
    assert_eq!(b.handle(ms(510), complete(2)).len(), 2, "it goes on as backup");
    assert_eq!(until_it_acts(&mut b), [ask(1, 3)], "2 is used up");
}

/// Somebody has acted alone in a newer generation: what is held here is of the past.
#[test]
fn a_denial_makes_the_copy_void() {
    let mut b = ready();
    until_it_acts(&mut b);
    let verdict = Verdict::Denied { newest: Generation(2) };
    let denied = Input::Verdict { generation: Generation(2), verdict };
    assert_eq!(b.handle(ms(100), denied), [Action::Close(LINK), Action::Discard]);
    assert_eq!((b.state(), b.next_deadline()), (State::Waiting, None));
    let link = LinkId(6);
    let old = Input::Hello { link, generation: G };
    assert!(matches!(b.handle(ms(101), old)[..], [Action::Refuse { .. }]));
    let new = Input::Hello { link, generation: Generation(2) };
    assert_eq!(b.handle(ms(102), new), [Action::Welcome(link)]);
}

#[test]
fn a_primary_of_a_newer_generation_makes_the_copy_void() {
    let mut b = ready();
    let link = LinkId(6);
    let hello = Input::Hello { link, generation: Generation(2) };
    assert_eq!(
        b.handle(ms(2), hello),
        [Action::Close(LINK), Action::Discard, Action::Welcome(link)]
    );
    assert_eq!(b.state(), State::Syncing);
}

#[test]
fn nobody_promotes_from_a_provisional_checkpoint() {
    let mut b = syncing();
    let receipt = Receipt { provisional: true, ..receipt(1) };
    assert_eq!(
        b.handle(ms(1), Input::Complete { link: LINK, receipt }),
        [Action::Apply(receipt), Action::Ack { link: LINK, receipt }]
    );
    assert_eq!(b.state(), State::Syncing);
    assert_eq!(until_it_acts(&mut b), [Action::Close(LINK), Action::Lost]);
    let mut b = ready();
    let provisional =
        Input::Complete { link: LINK, receipt: Receipt { epoch: Epoch(2), ..receipt } };
    assert_eq!(b.handle(ms(2), provisional), [Action::Close(LINK)], "out of place");
}

#[test]
fn one_that_asks_is_told_who_runs_the_container() {
    let link = LinkId(6);
    let answer = |code, newest| Action::Refuse { link, code, newest: Generation(newest) };
    let mut b = Backup::new(Config::default(), Generation(3), ms(0));
    assert_eq!(b.handle(ms(0), Input::Inquiry(link)), [answer(RefuseCode::Vacant, 3)]);
    b.handle(ms(1), Input::Begin(Generation(3)));
    assert_eq!(b.state(), State::Waiting, "not in a generation that was");
    b.handle(ms(1), Input::Begin(Generation(4)));
    assert_eq!(b.handle(ms(2), Input::Inquiry(link)), [answer(RefuseCode::Promoted, 4)]);
    b.handle(ms(3), Input::Demoted(Generation(5)));
    assert_eq!(b.handle(ms(4), Input::Inquiry(link)), [answer(RefuseCode::Vacant, 5)]);
}

/// The agent of the primary has died and started again within the detector's time-out.
#[test]
fn one_that_asks_while_its_copy_is_here_has_died() {
    let mut b = ready();
    let link = LinkId(6);
    let answer = Action::Refuse { link, code: RefuseCode::Promoted, newest: G };
    assert_eq!(b.handle(ms(3), Input::Inquiry(link)), [answer, ask(1, 2)]);
    b.handle(ms(4), Input::Heard(LINK));
    assert_eq!(grant(&mut b, 2).len(), 2);
}

#[test]
fn a_switchover_promotes_at_once_and_life_does_not_stop_it() {
    let mut b = ready();
    let bye = |last| Input::Bye { link: LINK, bye: Bye::Switchover, last: Epoch(last) };
    assert_eq!(b.handle(ms(2), bye(2)), [], "not the epoch that is held");
    assert_eq!(b.handle(ms(2), bye(1)), [ask(1, 2)]);
    b.handle(ms(3), Input::Heard(LINK));
    assert_eq!(b.handle(ms(3), complete(2)), []);
    assert_eq!(grant(&mut b, 2).len(), 1);
}

#[test]
fn a_stop_is_no_death() {
    let mut b = ready();
    let bye = Input::Bye { link: LINK, bye: Bye::Stop, last: Epoch(1) };
    assert_eq!(b.handle(ms(2), bye), [Action::Discard]);
    assert_eq!((b.state(), b.next_deadline()), (State::Waiting, None));
}

#[test]
fn a_primary_that_comes_back_resyncs_and_the_old_copy_stays_good_meanwhile() {
    let mut b = ready();
    b.handle(ms(2), Input::Lost(LINK));
    let link = LinkId(6);
    let hello = Input::Hello { link, generation: G };
    assert_eq!(b.handle(ms(20), hello), [Action::Welcome(link)]);
    assert_eq!(b.state(), State::Ready { last: Epoch(1) });
    assert_eq!(b.handle(ms(21), complete(2)), [], "of the old connection");
    assert_eq!(until_it_acts(&mut b), [ask(1, 2)]);
    let promote = Action::Promote { generation: Generation(2), from: Epoch(1) };
    assert_eq!(grant(&mut b, 2), [Action::Close(link), promote]);
}

#[test]
fn an_older_generation_is_refused() {
    let mut b = Backup::new(Config::default(), Generation(4), ms(0));
    let code = RefuseCode::StaleGeneration;
    let refused = Action::Refuse { link: LINK, code, newest: Generation(4) };
    assert_eq!(b.handle(ms(0), Input::Hello { link: LINK, generation: Generation(3) }), [refused]);
}

/// A survivor whose new backup is gone before it has caught up goes on in the generation that it has.
/// It was said to run nothing then, and the other host began a second life.
#[test]
fn one_that_goes_on_alone_says_that_it_runs_the_container() {
    let mut b = ready();
    until_it_acts(&mut b);
    grant(&mut b, 2);
    b.handle(ms(600), Input::Running);
    let link = LinkId(9);
    for (at, generation) in [(700, 2), (800, 2), (900, 3)] {
        b.handle(ms(at), Input::RunsOn(Generation(generation)));
        let (code, newest) = (RefuseCode::Promoted, Generation(generation));
        let answer = Action::Refuse { link, code, newest };
        assert_eq!(b.handle(ms(at + 1), Input::Inquiry(link)), [answer]);
    }
}

/// One that sends its first full copy on a busy machine is often late, and to give it up has it begin
/// the copy anew, on a machine that is as busy.
#[test]
fn a_first_copy_is_waited_for_longer_than_a_takeover() {
    let given_up = |b: &mut Backup| loop {
        let at = b.next_deadline().expect("it waits for something");
        if !b.handle(at, Input::Tick).is_empty() {
            return at;
        }
    };
    let stall = Config::default().times.stall;
    assert!(given_up(&mut syncing()) >= stall);
    assert!(given_up(&mut ready()) < stall / 2, "with a whole copy the usual time counts");
}

#[test]
fn it_rests_with_its_primary() {
    let mut b = Backup::new(Config::default(), Generation(0), ms(0));
    assert_eq!(b.pace(), Pace::Usual, "there is nobody to doubt");
    let pulse = |at, pace| {
        let marks = Marks { work: at, runtime: at, pace, ..Marks::default() };
        Input::Pulse { link: LINK, marks }
    };
    b.handle(ms(0), Input::Hello { link: LINK, generation: G });
    assert_eq!(b.pace(), Pace::Doubts, "no pulse has come yet");
    b.handle(ms(1), pulse(1, Pace::Rests));
    assert_eq!(b.pace(), Pace::Usual, "there is no copy yet");
    b.handle(ms(1), complete(1));
    b.handle(ms(2), pulse(2, Pace::Usual));
    assert_eq!(b.pace(), Pace::Usual);
    b.handle(ms(3), pulse(3, Pace::Rests));
    assert_eq!(b.pace(), Pace::Rests);
    let rest = Config::default().times.rest;
    assert_eq!(b.next_deadline(), Some(ms(3) + rest));
    b.handle(ms(10), complete(2));
    assert_eq!(b.pace(), Pace::Rests, "a checkpoint for which nobody waits");

    b.handle(ms(20), pulse(4, Pace::Rests));
    b.handle(ms(20) + rest, pulse(5, Pace::Rests));
    assert_eq!(b.handle(ms(20) + rest * 5 / 2, Input::Tick), []);
    assert_eq!(b.pace(), Pace::Doubts, "a pulse was lost");
    b.handle(ms(100), pulse(6, Pace::Rests));
    assert_eq!(b.pace(), Pace::Rests);
    assert_eq!(until_it_acts(&mut b), [ask(1, 2)]);
    assert_eq!(b.pace(), Pace::Usual);
    assert_eq!(b.silence(ms(190)), ms(90), "three pauses");
}
