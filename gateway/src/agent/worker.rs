//! The life of a container on its home host: launched, made ready, protected, ended.

use super::AgentOptions;
use super::journal::Journal;
use super::network::Place;
use super::primary::{self, LinkSettings, SharedStatus, Shell, lock};
use super::ship;
use super::status::{Phase, Role};
use super::stop::{Ending, Pace, StopLoop, Taken, become_stop_thread, drain_signals, sleep_on};
use crate::chain::chain;
use crate::frames::commit::Unprotected;
use crate::frames::gate::{Gate, GateConfig, ThreadSetup};
use crate::frames::input_log;
use anyhow::{Context, Result, bail};
use netns_tools::namespace::Namespace;
use netns_tools::topology::{Protect, Ready};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signalfd::SignalFd;
use replicator::ack::AckLedger;
use replicator::capture::{CaptureError, Capturer};
use replicator::container::{self, ContainerSpec, Launched};
use replicator::protocol::detector;
use replicator::protocol::primary::{Config, Primary};
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use replicator::transport::link::PrimaryConfig;
use replicator::transport::{HostRole, Identity};
use replicator::wire::message::{Hello, Role as WireRole};
use replicator::{Epoch, Generation};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Checkpoints in flight.
const DEPTH: usize = 4;
/// Sets of buffers between the stop thread and the shipper.
const BUFFERS: usize = 2;
/// Bounds of the input log on its way to the sender.
const LOG_BYTES: usize = 16 << 20;
const LOG_FRAMES: usize = 1 << 15;
/// Pause between looks whether the container is ready.
const READY_PAUSE: Duration = Duration::from_millis(5);
/// Longest sleep while the container starts.
const START_PAUSE: Duration = Duration::from_millis(5);

/// Everything that a container's home needs to know.
pub(super) struct Home {
    pub(super) options: Arc<AgentOptions>,
    pub(super) place: Place,
    pub(super) spec: ContainerSpec,
    pub(super) ready: Option<Ready>,
    pub(super) protect: Option<Protect>,
    pub(super) status: SharedStatus,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) thread_setup: ThreadSetup,
    /// Where the shell is put once there is one, for whoever ends the agent.
    pub(super) shell: Arc<OnceLock<Arc<Shell>>>,
}

impl Home {
    /// Runs the container on the calling thread until it or the agent ends.
    pub(super) fn run(self) {
        let name = self.place.name.clone();
        let result = self.live();
        let mut status = lock(&self.status);
        status.protected = false;
        match result {
            Ok(ending) => {
                if status.phase != Phase::Demoted {
                    status.phase = StopLoop::phase_of(&ending);
                }
                tracing::info!(container = name, phase = ?status.phase, "the container has ended");
            }
            Err(error) => {
                tracing::error!(container = name, error = chain(&error), "failed");
                (status.phase, status.reason) = (Phase::Failed, Some(chain(&error)));
            }
        }
        (status.role, status.pid) = (Role::None, None);
    }

    fn live(&self) -> Result<Ending> {
        let signals = become_stop_thread()?;
        let mut launched = container::launch(&self.spec, container::Role::Start)?;
        let pid = launched.pid;
        // Opened while pid 1 still waits: a command that ends at once takes its /proc entry along.
        let network = Namespace::of_process(pid)?;
        let mut capturer = Capturer::adopt(pid, network.enter(UnixDiag::open)??)?;
        let inner = self.place.make_inner(pid)?;
        let outer = self.place.make_outer()?;
        let (writer, reader) = input_log::channel(LOG_BYTES, LOG_FRAMES);
        let gate = Arc::new(Gate::start(
            inner,
            outer,
            GateConfig {
                mac: Some(self.place.mac),
                input_log: Some(writer),
                thread_setup: Some(self.thread_setup.clone()),
                ..GateConfig::default()
            },
        )?);
        self.start_command(&mut launched, &mut capturer, &signals)?;
        lock(&self.status).pid = Some(pid);
        self.wait_ready(&network, &mut capturer, &signals)?;
        if self.protect.is_some() {
            self.look_before(&mut capturer);
        }
        // A protected container answers nobody before its backup has taken it in this start: the
        // backup may run it already, in a newer generation that this host has not heard of (FO-1).
        let plugged = self.protect.is_none();
        if plugged {
            gate.plug()?;
        }
        lock(&self.status).phase = if plugged { Phase::Unprotected } else { Phase::Waiting };
        tracing::info!(container = self.place.name, pid, plugged, "the container runs");

        let shell = self.make_shell(&launched, reader)?;
        shell.set_gate(gate.clone());
        let _ = self.shell.set(shell.clone());
        let (to_ship, taken) = sync_channel(BUFFERS);
        let (back, from_ship) = sync_channel(BUFFERS);
        let shipper = shell.clone();
        let generation = Generation::FIRST;
        std::thread::Builder::new()
            .name("ship".into())
            .spawn(move || ship::run(shipper, generation, taken, back))?;
        let pace =
            self.protect.as_ref().map_or(Pace { min: Duration::MAX, max: Duration::MAX }, |p| {
                Pace { min: *p.epoch.min, max: *p.epoch.max }
            });
        let mut stops = StopLoop {
            capturer,
            gate: gate.clone(),
            shell: shell.clone(),
            signals,
            pace,
            to_ship,
            from_ship,
            epoch: Epoch(1),
            last_stop: Instant::now(),
            transient_since: None,
            plugged,
            buffers: (0..BUFFERS).map(|_| Taken::default()).collect(),
        };
        let mut ending = stops.run();
        if let Ok(Ending::Unprotectable(why)) = ending {
            let reasons = reasons(&mut stops.capturer, &why);
            self.end_protection(&shell, &gate, &reasons);
            ending = stops.only_look_after();
        }
        gate.unplug();
        self.runtime.block_on(primary::say_goodbye(&shell));
        launched.end();
        ending
    }

    /// Says at once, before protection starts, all that will end it if it stays (CP-3).
    fn look_before(&self, capturer: &mut Capturer) {
        match capturer.survey(false) {
            Ok(survey) => {
                for refusal in survey.refusals {
                    tracing::warn!(
                        container = self.place.name,
                        object = refusal.object,
                        reason = refusal.reason,
                        "cannot be protected"
                    );
                }
            }
            // The stop that comes next says it again, and is heeded.
            Err(error) => tracing::warn!(container = self.place.name, %error, "not looked at"),
        }
    }

    /// Ends the protection of a container that goes on (CP-3): loudly, and only after the backup
    /// has agreed never to take over. If it cannot be asked, output stays held.
    fn end_protection(&self, shell: &Shell, gate: &Gate, why: &str) {
        let name = &self.place.name;
        metrics::counter!("nilicon_protection_ended_total", "container" => name.clone())
            .increment(1);
        let agreed = self.runtime.block_on(primary::say_goodbye(shell));
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
    }

    /// Lets the command run. Its exec is an event that the calling thread must handle meanwhile.
    fn start_command(
        &self,
        launched: &mut Launched,
        capturer: &mut Capturer,
        signals: &SignalFd,
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let going = scope.spawn(|| launched.go());
            let pumped = pump_while(|| !going.is_finished(), capturer, signals);
            match going.join() {
                Ok(started) => started?,
                Err(_) => bail!("the launch ended in a panic"),
            }
            pumped.with_context(|| format!("see {}", self.spec.console.display()))
        })
    }

    /// Waits until the container accepts connections, if the topology says so.
    fn wait_ready(
        &self,
        network: &Namespace,
        capturer: &mut Capturer,
        signals: &SignalFd,
    ) -> Result<()> {
        let Some(ready) = &self.ready else { return Ok(()) };
        let address = SocketAddr::new(self.place.ip, ready.tcp);
        let timeout: Duration = *ready.timeout;
        let begin = Instant::now();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let check = scope.spawn(|| {
                while begin.elapsed() < timeout && !over.load(Ordering::Relaxed) {
                    let connected = network.enter(|| TcpStream::connect(address))?;
                    if connected.is_ok() {
                        return Ok(true);
                    }
                    std::thread::sleep(READY_PAUSE);
                }
                anyhow::Ok(false)
            });
            let pumped = pump_while(|| !check.is_finished(), capturer, signals);
            over.store(true, Ordering::Relaxed);
            let ready = check.join().map_err(|_| anyhow::anyhow!("the check panicked"))??;
            pumped.with_context(|| format!("see {}", self.spec.console.display()))?;
            if !ready {
                bail!(
                    "{address} does not accept connections after {timeout:?}; see {}",
                    self.spec.console.display()
                );
            }
            Ok(())
        })
    }

    fn make_shell(&self, launched: &Launched, reader: input_log::LogReader) -> Result<Arc<Shell>> {
        let options = &self.options;
        let name = &self.place.name;
        let times = self.protect.as_ref().map_or_else(detector::Config::default, |p| {
            detector::Config { interval: *p.detector.heartbeat, timeout: *p.detector.timeout }
        });
        let ledger = if options.output_commit {
            AckLedger::new(Generation::FIRST)
        } else {
            AckLedger::without_output_commit(Generation::FIRST)
        };
        let config = Config { depth: DEPTH, times, ..Config::default() };
        let core = Primary::new(config, Generation::FIRST, ledger, Duration::ZERO);
        let journal = Journal::create(&options.topology.name, &options.host, name);
        let (shell, wishes) =
            Shell::new(name, core, DEPTH, !options.output_commit, self.status.clone(), journal)?;
        let Some(protect) = &self.protect else { return Ok(shell) };

        let topology = &options.topology;
        let address = |host: &str| {
            topology
                .replication_address(protect, host)
                .with_context(|| format!("host {host} has no address on the replication link"))
        };
        let offsets = launched.clock_offsets();
        let offsets = (offsets.monotonic, offsets.boottime);
        let settings = Arc::new(LinkSettings {
            config: PrimaryConfig {
                bind: SocketAddr::new(address(&options.host)?, 0),
                peer: SocketAddr::new(address(&protect.backup)?, protect.port),
                peer_host: protect.backup.clone(),
                identity: Identity::load(&options.pki, &options.host, HostRole::Host)?,
                generation: Generation::FIRST,
                hello: Hello {
                    container: name.clone(),
                    host: options.host.clone(),
                    role: WireRole::Primary,
                    network: Vec::new(),
                    clocks: primary::clocks_now(offsets),
                },
            },
            offsets,
            heartbeat: times.interval,
        });
        let setup = self.thread_setup.clone();
        let releaser = shell.clone();
        std::thread::Builder::new().name("release".into()).spawn(move || {
            setup(crate::frames::gate::GateThread::Outbound);
            primary::release_all(releaser, wishes.releases);
        })?;
        let beat = settings.heartbeat;
        self.runtime.spawn(primary::keep_connected(shell.clone(), wishes.connects, settings));
        self.runtime.spawn(primary::beat(shell.clone(), beat));
        self.runtime.spawn(primary::send_input(shell.clone(), reader));
        Ok(shell)
    }
}

/// All reasons why a container cannot be protected, the one that ended its protection first.
fn reasons(capturer: &mut Capturer, why: &CaptureError) -> String {
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

fn pump_while(busy: impl Fn() -> bool, capturer: &mut Capturer, signals: &SignalFd) -> Result<()> {
    while busy() {
        match capturer.pump() {
            Ok(()) => {}
            Err(CaptureError::Ended) => bail!("the container's program has ended"),
            Err(e) => return Err(e.into()),
        }
        let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        sleep_on(&mut fds, START_PAUSE)?;
        drain_signals(signals);
    }
    Ok(())
}

/// The set-up of the gate's threads: real-time, below the stop thread.
pub(super) fn gate_threads() -> ThreadSetup {
    const PRIORITY: i32 = 10;
    Arc::new(|which| {
        if let Err(error) = sched::set_fifo(PRIORITY) {
            tracing::debug!(?which, %error, "a thread of the gate runs at ordinary priority");
        }
    })
}
