//! `nilicon volume`: what the hosts of a container hold of its replicated volumes, read from their
//! directories.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_tools::topology::{Topology, VolumeKind};
use replicator::volume::{difference, digest};

use super::args::VolumeVerb;
use crate::agent::volumes::directory;

/// For how long differences may be those of an epoch on its way.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// A replicated volume of a container.
pub(super) struct Named<'a> {
    pub(super) container: &'a str,
    pub(super) path: &'a str,
    pub(super) name: String,
    /// What says whether its files are whole.
    pub(super) check: Option<&'a str>,
}

/// Runs `nilicon volume`; whether all is as it should be.
pub(super) fn volume(verb: &VolumeVerb) -> Result<bool> {
    match verb {
        VolumeVerb::Verify { topology } => verify(&topology.load()?),
        VolumeVerb::Digest { topology, host } => print_digests(&topology.load()?, host),
    }
}

/// All replicated volumes of a lab.
pub(super) fn replicated(topology: &Topology) -> impl Iterator<Item = Named<'_>> {
    topology.containers.iter().flat_map(|(container, c)| {
        let ours = c.volumes.iter().filter(|v| v.kind == VolumeKind::Replicated);
        ours.map(move |v| Named {
            container,
            path: &v.path,
            name: v.directory_name(),
            check: v.check.as_deref(),
        })
    })
}

/// Where a host has the files of a volume.
pub(super) fn place(topology: &Topology, host: &str, volume: &Named<'_>) -> PathBuf {
    let container = &topology.containers[volume.container];
    directory(topology, host, volume.container, container).join(&volume.name)
}

fn verify(topology: &Topology) -> Result<bool> {
    let mut count = 0;
    let mut good = true;
    for volume in replicated(topology) {
        let hosts = topology.hosts_of(volume.container);
        let &[one, other] = &hosts[..] else { continue };
        let places = [place(topology, one, &volume), place(topology, other, &volume)];
        for (host, place) in hosts.iter().zip(&places) {
            ensure!(
                place.is_dir(),
                "no files of {host} are in {}: in a lab they come with `deploy`; on another machine, \
                 compare what `nilicon volume digest` prints on both",
                place.display()
            );
        }
        let Named { container, path, .. } = &volume;
        match settled(&places[0], &places[1], PATIENCE)? {
            None => println!("{container} {path}: the same on {one} and {other}"),
            Some(what) => {
                println!("{container} {path}: not the same on {one} and {other}: {what}");
                good = false;
            }
        }
        count += 1;
    }
    ensure!(count > 0, "no protected container of {} has a replicated volume", topology.name);
    Ok(good)
}

/// The first difference that stays for a while: what is on its way is none.
pub(super) fn settled(one: &Path, other: &Path, patience: Duration) -> Result<Option<String>> {
    let deadline = Instant::now() + patience;
    loop {
        let found = difference(one, other);
        // Files come and go while it looks.
        if matches!(found, Ok(None)) || Instant::now() > deadline {
            return found.context("the files cannot be compared");
        }
        std::thread::sleep(LOOK);
    }
}

fn print_digests(topology: &Topology, host: &str) -> Result<bool> {
    if !topology.nodes.contains_key(host) {
        bail!("the topology has no node '{host}'");
    }
    for volume in replicated(topology) {
        if topology.hosts_of(volume.container).contains(&host) {
            let (files, digest) = digest(&place(topology, host, &volume))?;
            println!("{digest:016x} {files} files {} {}", volume.container, volume.path);
        }
    }
    Ok(true)
}
