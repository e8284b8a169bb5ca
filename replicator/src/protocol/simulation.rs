//! A seeded run of two hosts, the arbiter and the links between them.
//!
//! Both hosts have the same parts: a backup's core for as long as the agent lives, and a primary's
//! core while the container runs there. Streams keep their order and lose nothing until a cut or a
//! crash breaks the connection (what a real transport makes of loss is delay); heartbeats are
//! lost, doubled and overtake each other. Hosts stall, crash, restart and hand over; the arbiter
//! answers late. Checked at every step:
//!
//! - OC-1 and FO-1 as a client sees them: whatever leaves belongs to a history that contains all
//!   that has left before. Output of an epoch leaves with its release, output of a side that acts
//!   alone as soon as it is made.
//! - CP-2: a promotion goes on from a checkpoint that the side holds whole, and that contains all
//!   that has left.
//! - FO-1: no two sides are promoted in one generation, nor both may release.
//! - RB-1: no more checkpoints are in flight than the depth.
//! - In the end, when the weather is calm, the container is protected again.

mod world;

use super::primary::OnLoss;
use world::{Seen, World};

/// How the sides may act alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    /// Only the backup, unasked; the primary freezes.
    Unopposed,
    /// Both, and a witness decides.
    Witness(OnLoss),
}

fn rules_of(seed: u64) -> Rules {
    match seed % 4 {
        0 => Rules::Unopposed,
        1 => Rules::Witness(OnLoss::Freeze),
        _ => Rules::Witness(OnLoss::Degrade),
    }
}

/// A mistake that a run must bring to light.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    /// Output of the epoch after the one that was proven leaves as well.
    ReleaseOneEpochEarly,
    /// An old generation is taken for the newest.
    WelcomeAnOldGeneration,
    /// Whoever asks the arbiter is granted what he wants.
    SkipTheArbiter,
    /// A provisional checkpoint counts.
    PromoteFromProvisional,
}

fn run(seed: u64, steps: u32) -> Seen {
    run_with(seed, steps, None)
}

fn run_with(seed: u64, steps: u32, mistake: Option<Mistake>) -> Seen {
    let mut world = World::new(seed, rules_of(seed), mistake);
    for _ in 0..steps {
        world.step();
    }
    world.calm_down();
    world.seen
}

#[test]
fn no_schedule_breaks_the_invariants() {
    // As `SEED=17 cargo test -p replicator simulation`, to see one run again.
    if let Ok(seed) = std::env::var("SEED") {
        println!("{:?}", run(seed.parse().expect("a number"), 6000));
        return;
    }
    let mut total = Seen::default();
    for seed in 0..1000 {
        let result = std::panic::catch_unwind(|| run(seed, 6000));
        let seen = result.unwrap_or_else(|_| panic!("the run with seed {seed} failed"));
        total.add(&seen);
    }
    // The runs must have been where it matters.
    println!("{total:?}");
    assert!(total.releases > 50_000 && total.promotions > 500 && total.full_copies > 2000);
    assert!(total.demotions > 100 && total.takebacks > 10 && total.hand_overs > 100);
    assert!(total.returns > 500 && total.degraded > 30 && total.denied > 20);
    assert!(total.lives > 1000 && total.restarts > 1000 && total.second_promotions > 100);
}

/// What the checks are worth: each of these mistakes is found within a few hundred seeds.
#[test]
fn mistakes_are_found() {
    for mistake in [
        Mistake::ReleaseOneEpochEarly,
        Mistake::WelcomeAnOldGeneration,
        Mistake::SkipTheArbiter,
        Mistake::PromoteFromProvisional,
    ] {
        let fails = |seed: &u64| {
            let tell = std::panic::take_hook();
            std::panic::set_hook(Box::new(|_| {}));
            let found = std::panic::catch_unwind(|| run_with(*seed, 6000, Some(mistake))).is_err();
            std::panic::set_hook(tell);
            found
        };
        let found = (0..400).find(fails);
        println!("{mistake:?}: found with seed {found:?}");
        assert!(found.is_some(), "nobody notices {mistake:?}");
    }
}
