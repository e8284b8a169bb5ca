//! What becomes of a container whose processes were killed, or that cannot be protected any longer.
//!
//! Invariant: whatever it is, the status and the log say so, and no output leaves before the backup
//! has agreed never to take over.

use super::Place;
use crate::agent::backup::{self, Standby};
use crate::agent::primary::{self, Shell, lock};
use crate::agent::status::{Phase, Role};
use crate::chain::chain;
use crate::frames::commit::Unprotected;
use crate::frames::gate::Gate;
use netns_tools::topology::OnContainerLoss;
use nix::sys::signal::Signal;
use replicator::Generation;
use replicator::capture::{CaptureError, Capturer};
use replicator::sys::ptrace::Status;
use replicator::wire::message::{Bye, Role as WireRole};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Place {
    /// What to do about a container whose processes have ended: if they were killed, and its policy
    /// is that it goes on at its backup then, this says so. Its end is told in any case.
    pub(super) fn was_killed(&self, capturer: &mut Capturer) -> Option<String> {
        let (name, end) = (&self.network.name, capturer.how_it_ended()?);
        let how = match end {
            Status::Exited(code) => format!("its first process has exited with code {code}"),
            Status::Killed(signal) => format!("its first process was killed by signal {signal}"),
            Status::Stopped { .. } => return None,
        };
        tracing::info!(container = name, how, "its processes have ended");
        lock(&self.status).reason = Some(how.clone());
        if end != Status::Killed(Signal::SIGKILL as i32) {
            return None;
        }
        let policy = self.protect.as_ref().map(|p| p.on_container_loss);
        let word = match policy.unwrap_or_default() {
            OnContainerLoss::Stop => "stop",
            OnContainerLoss::Failover => "failover",
            OnContainerLoss::Restart => "restart",
        };
        metrics::counter!("nilicon_killed_total", "container" => name.clone(), "policy" => word)
            .increment(1);
        (word != "stop").then_some(how)
    }

    /// Leaves a container whose processes are gone to the backup.
    pub(super) fn leave(&self, standby: &Arc<Standby>, why: String) {
        {
            let mut status = lock(&self.status);
            (status.role, status.phase) = (Role::Backup, Phase::Waiting);
            (status.protected, status.pid) = (false, None);
        }
        let Some(protect) = &self.protect else { return };
        standby.admitted.store(false, Ordering::Release);
        let first = standby.killed_here();
        let role = match protect.on_container_loss {
            OnContainerLoss::Restart if first => WireRole::Bereft,
            OnContainerLoss::Restart => {
                tracing::error!(
                    container = self.network.name,
                    "killed twice within a minute: it \
                    stays at its backup; nilicon switchover moves it back"
                );
                WireRole::Backup
            }
            OnContainerLoss::Failover | OnContainerLoss::Stop => WireRole::Backup,
        };
        match self.link_config(protect, Generation::default(), role) {
            Ok(question) => {
                self.runtime.spawn(backup::leave_to_backup(standby.clone(), question, why));
            }
            Err(error) => {
                let container = &self.network.name;
                tracing::error!(container, error = chain(&error), "the backup is not told");
            }
        }
    }

    /// Ends the protection of a container that goes on (CP-3): loudly, and only after the backup
    /// has agreed never to take over. If it cannot be asked, output stays held. Whether it leaves.
    pub(super) fn end_protection(&self, shell: &Shell, gate: &Gate, why: &str) -> bool {
        let name = &self.network.name;
        primary::count_unprotectable(name, "unprotected");
        let agreed = self.runtime.block_on(primary::say_goodbye(shell, Bye::Stop));
        primary::tell_protected(name, false);
        let mut status = lock(&self.status);
        status.protected = false;
        if agreed {
            gate.pass_through(Unprotected::GrantedByArbiter);
            tracing::error!(container = name, reason = %why,
                "cannot be protected any longer; it goes on unprotected");
            (status.phase, status.reason) = (Phase::Unprotected, Some(why.to_string()));
        } else {
            tracing::error!(container = name, reason = %why,
                "cannot be protected any longer, and its backup does not answer; output stays held");
            let reason = format!("{why}; the backup does not answer, so output stays held");
            (status.phase, status.reason) = (Phase::Severed, Some(reason));
        }
        agreed
    }
}

/// All reasons why a container cannot be protected, the one that ended its protection first.
pub(super) fn reasons(capturer: &mut Capturer, why: &CaptureError) -> String {
    let mut all = vec![why.to_string()];
    if let Ok(survey) = capturer.survey(false) {
        for refusal in survey.refusals {
            let text = format!("{}: {}", refusal.object, refusal.reason);
            if !all.contains(&text) {
                all.push(text);
            }
        }
    }
    all.join(" | ")
}
