//! Who is asked when a side wants to act alone, and how.

use super::backup::Standby;
use super::primary::lock;
#[cfg(not(feature = "etcd"))]
use anyhow::bail;
use anyhow::{Context, Result};
use netns_tools::topology::{ArbiterKind, Protect};
use replicator::Generation;
use replicator::protocol::arbiter::{Arbiter, Claim, Unopposed, Verdict};
use replicator::transport::{HostRole, Identity, WitnessClient};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::Notify;

/// Pause before a witness that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// The arbiter of a container.
pub(super) enum Judge {
    /// There is none: the backup may always take over, the primary may never go on alone.
    Unopposed,
    /// The topology's witness.
    Witness(WitnessClient),
    /// The operator.
    Manual(Operator),
    /// An etcd.
    #[cfg(feature = "etcd")]
    Etcd(super::etcd::Etcd),
}

/// What an operator is asked.
#[derive(Default)]
pub(super) struct Operator {
    asked: Mutex<Option<Claim>>,
    allowed: Notify,
}

impl Judge {
    /// The one that a protection names.
    pub(super) fn of(options: &super::AgentOptions, protect: &Protect) -> Result<Self> {
        Ok(match &protect.arbiter {
            ArbiterKind::None => Self::Unopposed,
            ArbiterKind::Manual => Self::Manual(Operator::default()),
            #[cfg(feature = "etcd")]
            ArbiterKind::Etcd(members) => {
                Self::Etcd(super::etcd::Etcd::new(members, &options.topology.name))
            }
            #[cfg(not(feature = "etcd"))]
            ArbiterKind::Etcd(_) => bail!(
                "its arbiter is an etcd, which this nilicon was built without: build it with \
                 `cargo build --release --features etcd`, on both hosts"
            ),
            ArbiterKind::Witness => {
                let topology = &options.topology;
                let name = topology.witness.as_ref().map(|witness| witness.node.clone());
                Self::Witness(WitnessClient {
                    name: name.context("the topology has no witness")?,
                    address: topology.witness_socket().context("the witness has no address")?,
                    identity: Identity::load(&options.pki, &options.host, HostRole::Host)?,
                })
            }
        })
    }

    /// The answer, where nobody need be asked for it.
    pub(super) fn at_once(&self, claim: &Claim) -> Option<Verdict> {
        matches!(self, Self::Unopposed).then(|| Unopposed.decide(claim))
    }

    /// Asks until there is an answer.
    pub(super) async fn ask(&self, claim: Claim) -> Verdict {
        match self {
            Self::Unopposed => Unopposed.decide(&claim),
            Self::Witness(witness) => loop {
                match witness.ask(&claim).await {
                    Ok(verdict) => return verdict,
                    Err(error) => {
                        tracing::warn!(container = claim.container, witness = witness.name, %error,
                            "the witness does not answer; nobody may act alone");
                    }
                }
                tokio::time::sleep(ASK_AGAIN).await;
            },
            #[cfg(feature = "etcd")]
            Self::Etcd(etcd) => loop {
                let (etcd, asked) = (etcd.clone(), claim.clone());
                let decided = tokio::task::spawn_blocking(move || etcd.decide(&asked)).await;
                match decided.context("the question ended in a panic").flatten() {
                    Ok(verdict) => return verdict,
                    Err(error) => {
                        tracing::warn!(
                            container = claim.container,
                            error = crate::chain::chain(&error),
                            "the etcd does not answer; nobody may act alone"
                        );
                    }
                }
                tokio::time::sleep(ASK_AGAIN).await;
            },
            Self::Manual(operator) => {
                tracing::error!(container = claim.container, wanted = %claim.wanted,
                    "an operator must say whether this side may go on alone (nilicon allow)");
                *lock(&operator.asked) = Some(claim);
                operator.allowed.notified().await;
                Verdict::Granted
            }
        }
    }

    /// The operator says yes to what was asked; refused if nothing was.
    pub(super) fn allow(&self) -> Result<(), String> {
        let Self::Manual(operator) = self else {
            return Err("its arbiter is not the operator".into());
        };
        match lock(&operator.asked).take() {
            Some(_) => {
                operator.allowed.notify_one();
                Ok(())
            }
            None => Err("it does not ask to act alone".into()),
        }
    }

    /// The generation for a new life of a container that nobody runs, newer than `newest`. The
    /// operator has said yes to it by starting both agents.
    pub(super) async fn begin(&self, standby: &Standby, newest: Generation) -> Generation {
        if matches!(self, Self::Unopposed | Self::Manual(_)) {
            return newest.next();
        }
        let mut base = newest;
        loop {
            let wanted = base.next();
            match self.ask(standby.claim(base, wanted)).await {
                Verdict::Granted => return wanted,
                Verdict::Denied { newest } => base = newest.max(wanted),
            }
        }
    }
}
