//! `nilicon pki`: keys and certificates by which hosts know each other.

use anyhow::Result;
use netns_tools::topology::{NodeKind, Topology};
use replicator::transport::HostRole;
use replicator::transport::pki;
use std::path::Path;

use super::args::{KeyRole, PkiVerb};

/// `nilicon pki`.
pub(super) fn pki(verb: &PkiVerb) -> Result<()> {
    match verb {
        PkiVerb::Init { dir } => {
            pki::init(dir)?;
            println!("the authority is in {}; its key must stay there", dir.display());
        }
        PkiVerb::Issue { dir, name, role } => {
            let role = match role {
                KeyRole::Host => HostRole::Host,
                KeyRole::Witness => HostRole::Witness,
            };
            let [certificate, key] = pki::issue(dir, name, role)?;
            println!("{}\n{}", certificate.display(), key.display());
        }
    }
    Ok(())
}

/// Makes an authority and the keys of all hosts of a lab.
///
/// # Errors
/// The directory cannot be written.
pub(super) fn for_lab(dir: &Path, topology: &Topology) -> Result<()> {
    pki::init(dir)?;
    for host in topology.nodes_of(NodeKind::Host) {
        let witness = topology.is_witness(host);
        pki::issue(dir, host, if witness { HostRole::Witness } else { HostRole::Host })?;
    }
    Ok(())
}
