//! What works for a container beside its stop thread: the core's shell, its tasks, and how they
//! reach the other host.

use super::{DEPTH, Place, Seen};
use crate::agent::backup::{self, Standby};
use crate::agent::journal::Journal;
use crate::agent::primary::{self, LinkSettings, Shell};
use crate::frames::gate::GateThread;
use crate::frames::input_log;
use anyhow::{Context, Result};
use netns_tools::topology::{OnBackupLoss, Protect};
use replicator::ack::AckLedger;
use replicator::container::Launched;
use replicator::image::Clocks;
use replicator::protocol::detector;
use replicator::protocol::primary::{Config, OnLoss, Primary};
use replicator::transport::link::PrimaryConfig;
use replicator::transport::{HostRole, Identity};
use replicator::wire::message::{Hello, Role as WireRole};
use replicator::{Epoch, Generation};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Silence that makes a peer suspect that has not sent a pulse yet, at least.
const WITHOUT_PULSES: Duration = Duration::from_millis(500);

impl Place {
    pub(super) fn make_shell(
        &self,
        launched: &Launched,
        reader: input_log::LogReader,
        generation: Generation,
        from: Option<Epoch>,
        standby: Option<&Arc<Standby>>,
    ) -> Result<(Arc<Shell>, Tasks)> {
        let options = &self.options;
        let name = &self.network.name;
        let times = self.times(Seen::FromPrimary);
        let ledger = if options.output_commit {
            AckLedger::new(generation)
        } else {
            AckLedger::without_output_commit(generation)
        };
        let on_loss = self.protect.as_ref().map_or(OnLoss::Freeze, on_loss);
        // The full copy while it is applied, what waits in the queue, and one that waits for room.
        let unapplied = backup::DEPTH as u32 + 2;
        let config = Config { depth: DEPTH, times, on_loss, unapplied, ..Config::default() };
        let core = match from {
            Some(from) => Primary::alone(config, ledger, from, Duration::ZERO),
            None => Primary::new(config, generation, ledger, Duration::ZERO),
        };
        let journal = Journal::open(&options.topology.name, &options.host, name);
        let status = self.status.clone();
        let control = !options.output_commit;
        let (shell, wishes) = Shell::new(name, core, control, status, journal, standby.cloned())?;
        let Some(protect) = &self.protect else { return Ok((shell, Tasks::default())) };

        let offsets = launched.clock_offsets();
        let settings = Arc::new(LinkSettings {
            config: self.link_config(protect, generation, WireRole::Primary)?,
            offsets: (offsets.monotonic, offsets.boottime),
        });
        let setup = self.thread_setup.clone();
        let releaser = shell.clone();
        let release = std::thread::Builder::new().name("release".into()).spawn(move || {
            setup(GateThread::Outbound);
            primary::release_all(releaser, wishes.releases);
        })?;
        let connected = primary::keep_connected(shell.clone(), wishes.connects, settings);
        let others = vec![
            self.runtime.spawn(connected),
            self.runtime.spawn(primary::beat(shell.clone())),
            self.runtime.spawn(primary::send_input(shell.clone(), reader)),
        ];
        Ok((shell, Tasks { release: Some(release), others }))
    }

    /// How the other host's silence is judged.
    pub(in crate::agent) fn times(&self, seen: Seen) -> detector::Config {
        self.protect.as_ref().map_or_else(detector::Config::default, |p| {
            let detector = &p.detector;
            let (timeout, most) = (*detector.timeout, detector.most());
            let (timeout, most) = match seen {
                Seen::FromBackup => (timeout, most),
                Seen::FromPrimary => ((timeout * 4).max(most), (timeout * 4).max(most)),
            };
            detector::Config {
                interval: *detector.heartbeat,
                // Both sides expect the same of each other.
                rest: detector::Config::rest_of(*detector.heartbeat, detector.most()),
                timeout,
                most,
                first: most.max(WITHOUT_PULSES),
                stall: *detector.stall,
            }
        })
    }

    /// The other host of a protection.
    pub(in crate::agent) fn peer<'a>(&self, protect: &'a Protect) -> &'a str {
        if protect.primary == self.options.host { &protect.backup } else { &protect.primary }
    }

    /// The address of a host on the link that checkpoints travel over.
    pub(in crate::agent) fn address(&self, protect: &Protect, host: &str) -> Result<IpAddr> {
        self.options
            .topology
            .replication_address(protect, host)
            .with_context(|| format!("host {host} has no address on the replication link"))
    }

    /// How to reach the other host.
    pub(in crate::agent) fn link_config(
        &self,
        protect: &Protect,
        generation: Generation,
        role: WireRole,
    ) -> Result<PrimaryConfig> {
        let options = &self.options;
        let peer = self.peer(protect);
        Ok(PrimaryConfig {
            bind: SocketAddr::new(self.address(protect, &options.host)?, 0),
            peer: SocketAddr::new(self.address(protect, peer)?, protect.port),
            peer_host: peer.to_owned(),
            identity: Identity::load(&options.pki, &options.host, HostRole::Host)?,
            generation,
            hello: Hello {
                container: self.network.name.clone(),
                host: options.host.clone(),
                role,
                network: Vec::new(),
                clocks: Clocks::default(),
                pulse_port: 0,
            },
        })
    }
}

/// What works for a container beside its stop thread, and ends with its time here.
#[derive(Default)]
pub(super) struct Tasks {
    release: Option<JoinHandle<()>>,
    others: Vec<tokio::task::JoinHandle<()>>,
}

impl Tasks {
    /// Waits until all that was proven has left. The shell has been told to end.
    pub(super) fn join_release(&mut self) {
        if let Some(release) = self.release.take()
            && release.join().is_err()
        {
            tracing::error!("the releasing thread ended in a panic");
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.others.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn on_loss(protect: &Protect) -> OnLoss {
    match protect.on_backup_loss {
        OnBackupLoss::Freeze => OnLoss::Freeze,
        OnBackupLoss::Degrade => OnLoss::Degrade,
        OnBackupLoss::Stop => OnLoss::Stop,
    }
}
