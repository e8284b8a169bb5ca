//! `nilicon witness` and `nilicon allow`: the two arbiters that one can have.

use anyhow::{Context, Result, bail};
use netns_tools::topology::Topology;
use replicator::transport::{HostRole, Identity, Ledger, WitnessEndpoint};

use super::args::{AllowArgs, WitnessArgs};
use super::deploy;
use crate::agent::control::request;
use crate::agent::status::{Request, state_dir};

/// `nilicon witness`: until SIGTERM or SIGINT.
pub(super) fn witness(args: &WitnessArgs) -> Result<()> {
    let topology = Topology::load(&args.topology)?;
    let witness = topology.witness.as_ref().context("the topology has no witness")?;
    let address = topology.witness_socket().context("the witness has no address")?;
    let directory = state_dir(&topology.name);
    let pki = args.pki.clone().unwrap_or_else(|| directory.join("pki"));
    let state = args.state.clone().unwrap_or_else(|| directory.join("witness.grants"));
    let identity = Identity::load(&pki, &witness.node, HostRole::Witness)?;
    let ledger = Ledger::open(&state)
        .with_context(|| format!("cannot use what was granted ({})", state.display()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut term, mut int) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let endpoint = WitnessEndpoint::bind(address, &identity, ledger)?;
        tracing::info!(%address, "the witness listens");
        let served = endpoint.serve(|peer, told| match told {
            Ok((claim, verdict)) => {
                tracing::info!(container = claim.container, host = claim.host, base = %claim.base,
                    wanted = %claim.wanted, ?verdict, "asked");
            }
            Err(error) => tracing::warn!(%peer, %error, "turned away"),
        });
        tokio::select! {
            () = served => bail!("the witness hears nothing any more"),
            _ = term.recv() => Ok(()),
            _ = int.recv() => Ok(()),
        }
    })
}

/// `nilicon allow`.
pub(super) fn allow(args: &AllowArgs) -> Result<()> {
    let lab = deploy::open(&args.lab)?;
    let order = Request::Allow { container: args.container.clone() };
    let answer = request(lab.name(), &args.host, &order)?;
    if let Some(refusal) = answer.refusal {
        bail!("{} at {}: {refusal}", args.container, args.host);
    }
    println!("{} may go on at {}", args.container, args.host);
    Ok(())
}
