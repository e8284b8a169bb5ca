//! The primary's core, input by input.

use super::*;

const G: Generation = Generation(2);
const LINK: LinkId = LinkId(1);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn protected() -> Primary {
    let mut p = Primary::new(Config::default(), G, AckLedger::new(G), ms(0));
    assert_eq!(p.handle(ms(0), Input::Tick), [Action::Connect(LINK)]);
    assert!(!p.may_begin_stop());
    assert_eq!(p.handle(ms(1), Input::Connected(LINK)), [Action::BeginFull]);
    p
}

fn ack(epoch: u64, digest: u64) -> Input {
    Input::Ack { link: LINK, generation: G, epoch: Epoch(epoch), digest }
}

fn sent(epoch: u64) -> Input {
    Input::Sent { link: LINK, epoch: Epoch(epoch), digest: epoch * 10, provisional: false }
}

#[test]
fn the_depth_bounds_what_is_in_flight_and_acks_release() {
    let mut p = protected();
    for e in 1..=4 {
        assert!(p.may_begin_stop());
        assert_eq!(p.handle(ms(2), sent(e)), []);
    }
    assert!(!p.may_begin_stop());
    let actions = p.handle(ms(3), ack(2, 20));
    assert!(matches!(&actions[..], [Action::Release(proof)] if proof.epoch() == Epoch(2)));
    assert!(p.may_begin_stop());
    assert_eq!(p.state(), State::Protected { synced: true });
}

#[test]
fn a_wrong_digest_severs_and_a_new_connection_begins_anew() {
    let mut p = protected();
    p.handle(ms(2), sent(1));
    let actions = p.handle(ms(3), ack(1, 11));
    assert!(matches!(&actions[..], [Action::Severed(LINK, Severance::Acknowledgement(_))]));
    assert_eq!(p.handle(ms(4), ack(1, 10)), [], "severed: nothing is released");
    assert_eq!(p.next_deadline(), Some(ms(203)));
    assert_eq!(p.handle(ms(203), Input::Tick), [Action::Connect(LinkId(2))]);
    assert_eq!(p.handle(ms(204), Input::Connected(LINK)), [], "the old connection");
    assert_eq!(p.handle(ms(204), Input::Connected(LinkId(2))), [Action::BeginFull]);
    assert_eq!(p.handle(ms(205), ack(1, 10)), [], "of the old connection");
}

#[test]
fn silence_severs() {
    let mut p = protected();
    while let Some(at) = p.next_deadline().filter(|at| *at <= ms(80)) {
        assert_eq!(p.handle(at, Input::Tick), []);
    }
    p.handle(ms(80), Input::Heard(LINK));
    let mut actions = Vec::new();
    while actions.is_empty() {
        actions = p.handle(p.next_deadline().unwrap(), Input::Tick);
    }
    assert_eq!(actions, [Action::Severed(LINK, Severance::Silence(ms(90)))]);
    assert!(!p.may_begin_stop());
}

#[test]
fn a_newer_generation_demotes_for_good() {
    let newest = Generation(3);
    let refused = Input::Refused { link: LINK, code: RefuseCode::StaleGeneration, newest };
    let mut p = protected();
    assert_eq!(p.handle(ms(2), refused), [Action::Demoted { by: newest }]);
    assert_eq!(p.handle(ms(3), Input::Connected(LINK)), []);
    assert_eq!(p.next_deadline(), None);
    let mut p = protected();
    let newer = Input::Ack { link: LINK, generation: newest, epoch: Epoch(1), digest: 0 };
    assert_eq!(p.handle(ms(2), newer), [Action::Demoted { by: newest }]);
}

#[test]
fn a_hand_over_waits_for_the_last_ack_and_releases_nothing_afterwards() {
    let mut p = protected();
    p.handle(ms(2), sent(1));
    assert_eq!(p.handle(ms(3), Input::HandOver { last: Epoch(1) }), []);
    assert!(!p.may_begin_stop());
    let actions = p.handle(ms(4), ack(1, 10));
    assert!(matches!(
        &actions[..],
        [Action::Release(_), Action::HandOver { link: LINK, last: Epoch(1) }]
    ));
    assert_eq!(p.handle(ms(5), ack(1, 10)), []);
    assert_eq!(p.state(), State::HandedOver);
}

#[test]
fn the_control_releases_at_once_and_only_once() {
    let mut p = Primary::new(Config::default(), G, AckLedger::without_output_commit(G), ms(0));
    p.handle(ms(0), Input::Tick);
    p.handle(ms(1), Input::Connected(LINK));
    assert!(matches!(&p.handle(ms(2), sent(1))[..], [Action::Release(_)]));
    assert_eq!(p.handle(ms(3), ack(1, 10)), []);
}

/// Alone in generation 2, connected, catching up.
fn catching_up() -> Primary {
    let mut p = Primary::alone(Config::default(), AckLedger::new(G), Epoch(9), ms(0));
    assert!(p.is_alone());
    assert_eq!(p.handle(ms(0), Input::Tick), [Action::Connect(LINK)]);
    assert_eq!(p.handle(ms(1), Input::Connected(LINK)), [Action::BeginFull]);
    p
}

fn provisional(epoch: u64) -> Input {
    Input::Sent { link: LINK, epoch: Epoch(epoch), digest: epoch * 10, provisional: true }
}

#[test]
fn output_is_held_only_from_the_checkpoint_on_that_counts() {
    let mut p = catching_up();
    assert!(p.may_begin_stop());
    assert_eq!(p.handle(ms(2), provisional(10)), []);
    assert!(!p.may_begin_stop(), "one by one");
    assert_eq!(p.handle(ms(400), ack(10, 100)), [], "the full copy took long");
    assert_eq!(p.handle(ms(401), provisional(11)), []);
    assert_eq!(p.handle(ms(500), ack(11, 110)), [], "not caught up yet");
    assert_eq!(p.handle(ms(501), provisional(12)), []);
    assert_eq!(p.handle(ms(510), ack(12, 120)), [Action::Hold]);
    assert!(!p.is_alone());
    assert_eq!(p.state(), State::Protected { synced: false });
    assert_eq!(p.handle(ms(511), sent(13)), []);
    assert!(matches!(&p.handle(ms(512), ack(13, 130))[..], [Action::Release(_)]));
    assert_eq!(p.state(), State::Protected { synced: true });
}

/// It acknowledges what it has not applied yet; output that waits for it then would wait for long.
#[test]
fn a_backup_that_only_fills_its_queue_has_not_caught_up() {
    let config = Config { unapplied: 3, ..Config::default() };
    let mut p = Primary::alone(config, AckLedger::new(G), Epoch(9), ms(0));
    p.handle(ms(0), Input::Tick);
    p.handle(ms(1), Input::Connected(LINK));
    for e in 10..13 {
        assert_eq!(p.handle(ms(2), provisional(e)), []);
        assert_eq!(p.handle(ms(3), ack(e, e * 10)), [], "at once, but it only has it");
    }
    assert_eq!(p.handle(ms(4), provisional(13)), []);
    assert_eq!(p.handle(ms(504), ack(13, 130)), [], "this one had to wait");
    assert_eq!(p.handle(ms(505), provisional(14)), []);
    assert_eq!(p.handle(ms(506), ack(14, 140)), [Action::Hold]);
}

#[test]
fn a_new_backup_that_goes_again_leaves_the_primary_alone_until_it_could_promote() {
    let mut p = catching_up();
    p.handle(ms(2), provisional(10));
    assert!(matches!(p.handle(ms(3), Input::Lost(LINK))[..], [Action::Severed(..)]));
    assert!(p.is_alone());
    // It comes back and catches up; the connection breaks before anything lasting has left.
    let at = p.next_deadline().unwrap();
    let again = LinkId(2);
    assert_eq!(p.handle(at, Input::Tick), [Action::Connect(again)]);
    p.handle(at, Input::Connected(again));
    let by = |e| Input::Sent { link: again, epoch: Epoch(e), digest: 1, provisional: true };
    let ack = |e| Input::Ack { link: again, generation: G, epoch: Epoch(e), digest: 1 };
    p.handle(at, by(11));
    p.handle(at, ack(11));
    p.handle(at, by(12));
    assert_eq!(p.handle(at, ack(12)), [Action::Hold]);
    let actions = p.handle(at, Input::Lost(again));
    assert!(matches!(actions[..], [Action::Severed(..), Action::GoAlone(G)]), "{actions:?}");
    assert_eq!((p.pace(), p.pace_of_pulses()), (Pace::Usual, Pace::Rests), "nobody listens");
    // A checkpoint for the old connection must not leave: the backup could promote from it.
    let late = Input::Sent { link: again, epoch: Epoch(13), digest: 1, provisional: false };
    assert_eq!(p.handle(at, late), []);
    assert!(!p.sends_on(again));
}

#[test]
fn once_a_lasting_checkpoint_has_left_the_loss_of_the_backup_severs() {
    let mut p = catching_up();
    for e in 10..12 {
        p.handle(ms(2), provisional(e));
        p.handle(ms(3), ack(e, e * 10));
    }
    p.handle(ms(4), sent(12));
    p.handle(ms(5), Input::Lost(LINK));
    assert!(matches!(p.state(), State::Severed { .. }) && !p.is_alone());
}

fn with_policy(on_loss: OnLoss) -> Primary {
    let config = Config { on_loss, ..Config::default() };
    let mut p = Primary::new(config, G, AckLedger::new(G), ms(0));
    p.handle(ms(0), Input::Tick);
    p.handle(ms(1), Input::Connected(LINK));
    p.handle(ms(2), sent(1));
    p.handle(ms(3), ack(1, 10));
    p
}

fn until(p: &mut Primary, wanted: impl Fn(&Action) -> bool) -> Action {
    loop {
        let at = p.next_deadline().expect("it waits for something");
        for action in p.handle(at, Input::Tick) {
            if let Action::Connect(link) = action {
                p.handle(at, Input::Lost(link));
            }
            if wanted(&action) {
                return action;
            }
        }
    }
}

#[test]
fn degrading_waits_for_the_grant_and_changes_the_generation() {
    let mut p = with_policy(OnLoss::Degrade);
    p.handle(ms(10), Input::Lost(LINK));
    let ask = until(&mut p, |a| matches!(a, Action::Ask { .. }));
    assert_eq!(ask, Action::Ask { base: G, wanted: Generation(3) });
    assert!(!p.is_alone(), "not before the grant");
    let verdict = Verdict::Denied { newest: Generation(3) };
    assert_eq!(p.handle(ms(2000), Input::Verdict { generation: Generation(3), verdict }), []);
    assert!(!p.is_alone());
    let verdict = Verdict::Granted;
    let other = Input::Verdict { generation: Generation(4), verdict };
    assert_eq!(p.handle(ms(2001), other), [], "not what was asked for");
    let granted = Input::Verdict { generation: Generation(3), verdict };
    assert_eq!(p.handle(ms(2002), granted), [Action::GoAlone(Generation(3))]);
    assert!(p.is_alone());
    assert_eq!(p.generation(), Generation(3));
}

/// The backup is back when the grant comes. The arbiter will let nobody go on from the old
/// generation any more, so the copy of it is worth nothing.
#[test]
fn a_grant_that_comes_late_counts_too() {
    let mut p = with_policy(OnLoss::Degrade);
    p.handle(ms(10), Input::Lost(LINK));
    until(&mut p, |a| matches!(a, Action::Ask { .. }));
    let at = p.next_deadline().unwrap();
    let Action::Connect(link) = p.handle(at, Input::Tick)[0] else { panic!("it tries on") };
    p.handle(at, Input::Connected(link));
    let granted = Input::Verdict { generation: Generation(3), verdict: Verdict::Granted };
    let actions = p.handle(at, granted);
    assert!(matches!(actions[..], [Action::Severed(..), Action::GoAlone(_)]), "{actions:?}");
}

#[test]
fn the_policy_stop_ends_the_container() {
    let mut p = with_policy(OnLoss::Stop);
    p.handle(ms(10), Input::Lost(LINK));
    assert_eq!(until(&mut p, |a| *a == Action::Stop), Action::Stop);
    assert_eq!((p.state(), p.next_deadline()), (State::Stopped, None));
}

#[test]
fn a_backup_that_lives_and_does_not_keep_up_is_lost_where_that_is_acted_on() {
    for (policy, severed) in [(OnLoss::Freeze, false), (OnLoss::Degrade, true)] {
        let mut p = with_policy(policy);
        p.handle(ms(10), sent(2));
        let mut slow = false;
        for t in (10..3000).step_by(5) {
            p.handle(ms(t), Input::Heard(LINK));
            let actions = p.handle(ms(t), Input::Tick);
            slow |= matches!(actions[..], [Action::Severed(_, Severance::Slow(_))]);
            if slow {
                break;
            }
        }
        assert_eq!(slow, severed, "{policy:?}");
    }
}

#[test]
fn it_rests_while_nobody_waits_and_the_backup_is_heard() {
    let pulse = |pace| Input::Pulse { link: LINK, pace };
    let mut p = protected();
    p.handle(ms(2), sent(1));
    p.handle(ms(2), pulse(Pace::Usual));
    p.handle(ms(2), Input::Quiet(true));
    assert_eq!(p.pace(), Pace::Usual, "the first copy is under way");
    p.handle(ms(3), ack(1, 10));
    assert_eq!(p.pace(), Pace::Rests);
    let asked = p.next_deadline().unwrap();
    p.handle(asked, Input::Tick);
    assert_eq!(p.next_deadline(), Some(asked + Config::default().times.rest), "as seldom");

    p.handle(ms(30), Input::Quiet(false));
    assert_eq!(p.pace(), Pace::Usual, "output waits");
    p.handle(ms(40), Input::Quiet(true));
    assert_eq!(p.pace(), Pace::Rests);
    p.handle(ms(41), sent(2));
    assert_eq!(p.pace(), Pace::Rests, "a checkpoint for which nobody waits");
    p.handle(ms(41) + Config::default().times.rest, Input::Heard(LINK));
    assert_eq!(p.pace(), Pace::Usual, "but it is not acknowledged");
    p.handle(ms(75), ack(2, 20));
    p.handle(ms(76), pulse(Pace::Doubts));
    assert_eq!(p.pace(), Pace::Usual, "the backup has not heard it");
    p.handle(ms(77), pulse(Pace::Rests));
    assert_eq!(p.pace(), Pace::Rests);
    p.handle(ms(110), Input::Heard(LINK));
    p.handle(ms(155), Input::Tick);
    assert_eq!(p.pace(), Pace::Usual, "it has not heard the backup's pulses");
    p.handle(ms(156), pulse(Pace::Rests));
    p.handle(ms(157), Input::HandOver { last: Epoch(3) });
    assert_eq!(p.pace(), Pace::Usual, "a switchover is under way");
}
