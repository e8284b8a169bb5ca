//! A seeded run of two hosts, the arbiter and the links between them.
//!
//! Both hosts have the same parts: a backup's core for as long as the agent lives, and a primary's
//! core while the container runs there. Streams keep their order and lose nothing until a cut or a
//! crash breaks the connection (what a real transport makes of loss is delay); pulses are
//! lost, doubled and overtake each other, and come seldom while a container has nothing to do. Hosts stall, crash, restart and hand over; the arbiter
//! answers late. Checked at every step:
//!
//! - OC-1 and FO-1 as a client sees them: whatever leaves belongs to a history that contains all
//!   that has left before. Output of an epoch leaves with its release, output of a side that acts
//!   alone as soon as it is made.
//! - CP-2: a promotion goes on from a checkpoint that the side holds whole, and that contains all
//!   that has left.
//! - FO-1: no two sides are promoted in one generation, nor both may release.
//! - RB-1: no more checkpoints are in flight than the depth.
//! - In the end, when the weather is calm, the container is protected again, and after a while nobody is
//!   suspected any longer (FO-3).
//!
//! A run is repeated by its seed alone; `nilicon sim --seed N` tells what happened in it. The checks are
//! assertions, as everything that the cores themselves assert counts as well: [`simulate`] catches them.

mod chronicle;
#[cfg(test)]
mod tests;
mod watched;
mod world;

use super::primary::OnLoss;
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{Seen, World};

/// Steps of a millisecond that a run takes before the weather turns fair.
pub const STEPS: u32 = 6000;

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

/// A mistake that a run must bring to light. It is made by what stands around the cores here; they
/// know nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// Output of the epoch after the one that was proven leaves as well.
    ReleaseOneEpochEarly,
    /// An old generation is taken for the newest.
    WelcomeAnOldGeneration,
    /// Whoever asks the arbiter is granted what he wants.
    SkipTheArbiter,
    /// A provisional checkpoint counts.
    PromoteFromProvisional,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What a check said that did not hold; none if all did.
    pub finding: Option<String>,
    /// How often what happened, if the run came to its end.
    pub counts: Vec<(&'static str, u64)>,
    /// What happened last, as many lines as were asked for.
    pub trace: Vec<String>,
}

/// Runs a seed, with a mistake or without, and keeps the last `lines` of what happened. A panic hook
/// of the caller hears of a finding, too.
pub fn simulate(seed: u64, steps: u32, mistake: Option<Mistake>, lines: usize) -> Outcome {
    chronicle::begin(lines);
    let result = catch_unwind(AssertUnwindSafe(|| run(seed, steps, mistake)));
    let trace = chronicle::end();
    match result {
        Ok(seen) => Outcome { finding: None, counts: seen.counts(), trace },
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let finding = text.unwrap_or_else(|| "a check failed without a word".to_owned());
            Outcome { finding: Some(finding), counts: Vec::new(), trace }
        }
    }
}

fn run(seed: u64, steps: u32, mistake: Option<Mistake>) -> Seen {
    let mut world = World::new(seed, rules_of(seed), mistake);
    for _ in 0..steps {
        world.step();
    }
    world.calm_down();
    world.seen
}

impl Seen {
    /// All counts by name.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("releases", self.releases),
            ("promotions", self.promotions),
            ("second promotions", self.second_promotions),
            ("full copies", self.full_copies),
            ("demotions", self.demotions),
            ("takebacks", self.takebacks),
            ("hand overs", self.hand_overs),
            ("returns", self.returns),
            ("degraded", self.degraded),
            ("denied", self.denied),
            ("lives", self.lives),
            ("restarts", self.restarts),
            ("rests", self.rests),
            ("losses at rest", self.rest_losses),
        ]
    }
}
