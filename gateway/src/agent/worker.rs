//! A container that runs here: begun, made ready, protected, given away or ended.

use super::AgentOptions;
use super::backup::{self, Standby};
use super::journal::Journal;
use super::network::Place as NetworkPlace;
use super::pace::{Pacer, Rates};
use super::primary::{self, LinkSettings, SharedStatus, Shell, lock};
use super::ship;
use super::status::{Phase, Role};
use super::stop::{Ending, StopLoop, Taken, become_stop_thread, drain_signals, sleep_on};
use super::volumes::{Files, InUse};
use crate::chain::chain;
use crate::frames::commit::Unprotected;
use crate::frames::gate::{Gate, GateConfig, ThreadSetup};
use crate::frames::input_log;
use anyhow::{Context, Result, anyhow, bail};
use netns_tools::cgroup::Cgroup;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{OnBackupLoss, OnContainerLoss, OnUnprotectable, Protect, Ready};
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use replicator::ack::AckLedger;
use replicator::capture::{CaptureError, Capturer};
use replicator::container::{self, ContainerSpec, Launched};
use replicator::image::Clocks;
use replicator::protocol::detector;
use replicator::protocol::primary::{Config, OnLoss, Primary, State};
use replicator::sys::ptrace::Status;
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use replicator::transport::link::PrimaryConfig;
use replicator::transport::{HostRole, Identity};
use replicator::wire::message::{Bye, Hello, Role as WireRole};
use replicator::{Epoch, Generation};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
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

/// Silence that makes a peer suspect that has not sent a pulse yet, at least.
const WITHOUT_PULSES: Duration = Duration::from_millis(500);

/// Whose silence is judged by whom. A backup that is thought dead for nothing costs a full copy, and
/// to find out late that it is dead costs no client anything but its policy's patience.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    /// The primary's, by its backup.
    FromBackup,
    /// The backup's, by its primary.
    FromPrimary,
}

/// What every part of a container on this host needs to know.
pub(super) struct Place {
    pub(super) options: Arc<AgentOptions>,
    pub(super) network: NetworkPlace,
    pub(super) spec: ContainerSpec,
    /// Its replicated volumes here.
    pub(super) files: Option<Arc<Files>>,
    pub(super) cgroup: Cgroup,
    pub(super) ready: Option<Ready>,
    pub(super) protect: Option<Protect>,
    pub(super) status: SharedStatus,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) thread_setup: ThreadSetup,
    pub(super) duty: Arc<Duty>,
}

/// What a part does at the moment, for whoever gives it orders from outside.
#[derive(Default)]
pub(super) struct Duty {
    end: AtomicBool,
    shell: Mutex<Option<Arc<Shell>>>,
    standby: OnceLock<Arc<Standby>>,
}

impl Duty {
    /// Tells the part to end.
    pub(super) fn end(&self) {
        self.end.store(true, Ordering::Release);
        if let Some(shell) = &*lock(&self.shell) {
            shell.end();
        }
    }

    pub(super) fn must_end(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }

    /// A part of a protected container.
    pub(super) fn stands_by(&self, standby: Arc<Standby>) {
        let _ = self.standby.set(standby);
    }

    /// The operator lets this side act alone; refused with the reason.
    pub(super) fn allow(&self) -> Result<(), String> {
        self.standby.get().map_or_else(|| Err("it is not protected".into()), |s| s.judge.allow())
    }

    /// Asks for a switchover; refused with the reason.
    pub(super) fn hand_over(&self) -> Result<(), String> {
        match &*lock(&self.shell) {
            Some(shell) => shell.hand_over(),
            None => Err("it does not run here".into()),
        }
    }
}

/// A container that the calling thread has under ptrace.
pub(super) struct Life {
    /// Before the container, so that they end after it.
    pub(super) files: Option<InUse>,
    pub(super) launched: Launched,
    pub(super) capturer: Capturer,
    pub(super) gate: Arc<Gate>,
    pub(super) signals: SignalFd,
    pub(super) generation: Generation,
    /// The epoch that it went on from; none if it began here.
    pub(super) from: Option<Epoch>,
}

/// How a container's time here ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Its processes, or the agent, ended.
    Over,
    /// It runs elsewhere in this generation, or will soon.
    Moved(Generation),
}

impl Place {
    /// Begins a new life of the container, in the calling thread.
    pub(super) fn begin(&self, generation: Generation) -> Result<Life> {
        {
            let mut status = lock(&self.status);
            (status.role, status.phase) = (Role::Primary, Phase::Starting);
            (status.generation, status.epoch, status.reason) = (generation.0, 0, None);
        }
        let signals = become_stop_thread()?;
        let mut launched = container::launch(&self.spec, container::Role::Start)?;
        let pid = launched.pid;
        // Mounted before the mounts are looked at, and before the command sees anything.
        let files = self.files.as_ref().map(|files| files.begin(generation, pid)).transpose()?;
        // Opened while pid 1 still waits: a command that ends at once takes its /proc entry along.
        let network = Namespace::of_process(pid)?;
        let mut capturer = Capturer::adopt(pid, network.enter(UnixDiag::open)??)?;
        let inner = self.network.make_inner(pid)?;
        capturer.watch_network()?;
        let outer = self.network.make_outer()?;
        let gate = Arc::new(Gate::start(
            inner,
            outer,
            GateConfig {
                mac: Some(self.network.mac),
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
        Ok(Life { files, launched, capturer, gate, signals, generation, from: None })
    }

    /// Runs an unprotected container from its begin to its end.
    pub(super) fn run_alone(&self) {
        let result = self.begin(Generation::FIRST).and_then(|life| self.lead(life, None));
        self.tell_end(result.map(drop));
    }

    /// The last status of a container that has ended here.
    pub(super) fn tell_end(&self, result: Result<()>) {
        let name = &self.network.name;
        primary::tell_protected(name, false);
        let mut status = lock(&self.status);
        status.protected = false;
        match result {
            Ok(()) => {
                if !matches!(status.phase, Phase::Demoted | Phase::Failed) {
                    status.phase = Phase::Ended;
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

    /// Runs a container until it, its time here or the agent ends. Afterwards it is gone from
    /// here.
    pub(super) fn lead(&self, life: Life, standby: Option<&Arc<Standby>>) -> Result<Outcome> {
        let Life { files, mut launched, capturer, gate, signals, generation, from } = life;
        let (pid, name) = (launched.pid, &self.network.name);
        let (writer, reader) = input_log::channel(LOG_BYTES, LOG_FRAMES);
        gate.log_input(Some(writer));
        // A protected container that begins answers nobody before its backup has taken it.
        let plugged = from.is_some() || self.protect.is_none();
        if plugged {
            gate.plug()?;
        }
        {
            let mut status = lock(&self.status);
            status.phase = if plugged { Phase::Unprotected } else { Phase::Waiting };
            status.pid = Some(pid);
        }
        tracing::info!(container = name, pid, plugged, %generation, "the container runs");

        let (shell, mut tasks) = self.make_shell(&launched, reader, generation, from, standby)?;
        shell.set_gate(gate.clone());
        *lock(&self.duty.shell) = Some(shell.clone());
        if self.duty.must_end() {
            shell.end();
        }
        let (to_ship, taken) = sync_channel(BUFFERS);
        let (back, from_ship) = sync_channel(BUFFERS);
        let shipper = shell.clone();
        std::thread::Builder::new()
            .name("ship".into())
            .spawn(move || ship::run(shipper, taken, back))?;
        let rates = self.protect.as_ref().map_or_else(Rates::never, |p| Rates {
            min: *p.epoch.min,
            max: *p.epoch.max,
            share: p.epoch.stop_share.get(),
            gather: *p.epoch.gather,
        });
        let mut stops = StopLoop {
            capturer,
            gate: gate.clone(),
            shell: shell.clone(),
            signals,
            pacer: Pacer::new(rates, Duration::ZERO),
            origin: Instant::now(),
            to_ship,
            from_ship,
            epoch: from.map_or(Epoch(1), Epoch::next),
            transient_since: None,
            on_unprotectable: self.on_unprotectable(),
            plugged,
            buffers: (0..BUFFERS).map(|_| Taken::default()).collect(),
            still: None,
            volumes: files.as_ref().map(|files| files.volumes.clone()),
            seal_failed: None,
        };
        let mut ending = stops.run();
        if let Ok(Ending::Unprotectable(why)) = ending {
            let reasons = reasons(&mut stops.capturer, &why);
            ending = match self.on_unprotectable() {
                OnUnprotectable::Unprotected => {
                    self.end_protection(&shell, &gate, &reasons);
                    stops.only_look_after()
                }
                // A freeze waits in the stops; what comes here will not pass.
                OnUnprotectable::Freeze | OnUnprotectable::Stop => {
                    primary::count_unprotectable(&self.network.name, "stop");
                    Err(anyhow!("{reasons}; it ends, as its policy (on-unprotectable) says"))
                }
            };
        }
        *lock(&self.duty.shell) = None;
        if shell.state() != State::HandedOver {
            gate.unplug();
        }
        let killed = match ending {
            Ok(Ending::Ended) => self.was_killed(&mut stops.capturer),
            _ => None,
        };
        let outcome = match shell.state() {
            State::Demoted { by } => Outcome::Moved(by),
            State::HandedOver => Outcome::Moved(shell.generation()),
            _ if killed.is_some() => Outcome::Moved(shell.generation()),
            _ => Outcome::Over,
        };
        if let (Outcome::Moved(newest), Some(standby)) = (&outcome, standby) {
            // From now on whoever runs it may make this side its backup.
            if let Some(files) = &self.files {
                files.give_way();
            }
            standby.give_way(*newest);
        }
        match shell.state() {
            State::HandedOver => {
                self.runtime.block_on(primary::say_goodbye(&shell, Bye::Switchover));
            }
            State::Demoted { .. } => {}
            _ if killed.is_some() => {
                primary::break_off(&shell);
                if let Some((standby, why)) = standby.zip(killed) {
                    self.leave(standby, why);
                }
            }
            _ => {
                self.runtime.block_on(primary::say_goodbye(&shell, Bye::Stop));
            }
        }
        shell.end();
        tasks.join_release();
        gate.unplug();
        launched.end();
        ending.map(|_| outcome)
    }

    /// What to do about a container whose processes have ended: if they were killed, and its policy
    /// is that it goes on at its backup then, this says so. Its end is told in any case.
    fn was_killed(&self, capturer: &mut Capturer) -> Option<String> {
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
        let word = if policy == Some(OnContainerLoss::Failover) { "failover" } else { "stop" };
        metrics::counter!("nilicon_killed_total", "container" => name.clone(), "policy" => word)
            .increment(1);
        (policy == Some(OnContainerLoss::Failover)).then_some(how)
    }

    /// Leaves a container whose processes are gone to the backup.
    fn leave(&self, standby: &Arc<Standby>, why: String) {
        {
            let mut status = lock(&self.status);
            (status.role, status.phase) = (Role::Backup, Phase::Waiting);
            (status.protected, status.pid) = (false, None);
        }
        let Some(protect) = &self.protect else { return };
        standby.admitted.store(false, Ordering::Release);
        match self.link_config(protect, Generation::default(), WireRole::Backup) {
            Ok(question) => {
                self.runtime.spawn(backup::leave_to_backup(standby.clone(), question, why));
            }
            Err(error) => {
                let container = &self.network.name;
                tracing::error!(container, error = chain(&error), "the backup is not told");
            }
        }
    }

    /// Says at once, before protection starts, all that will end it if it stays (CP-3).
    fn look_before(&self, capturer: &mut Capturer) {
        match capturer.survey(false) {
            Ok(survey) => {
                for refusal in survey.refusals {
                    tracing::warn!(
                        container = self.network.name,
                        object = refusal.object,
                        reason = refusal.reason,
                        "cannot be protected"
                    );
                }
            }
            // The stop that comes next says it again, and is heeded.
            Err(error) => tracing::warn!(container = self.network.name, %error, "not looked at"),
        }
    }

    fn on_unprotectable(&self) -> OnUnprotectable {
        self.protect.as_ref().map_or_else(OnUnprotectable::default, |p| p.on_unprotectable)
    }

    /// Ends the protection of a container that goes on (CP-3): loudly, and only after the backup
    /// has agreed never to take over. If it cannot be asked, output stays held.
    fn end_protection(&self, shell: &Shell, gate: &Gate, why: &str) {
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
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let check = scope
                .spawn(|| self.until_accepting(network, ready, &|| over.load(Ordering::Relaxed)));
            let pumped = pump_while(|| !check.is_finished(), capturer, signals);
            over.store(true, Ordering::Relaxed);
            let ready = check.join().map_err(|_| anyhow::anyhow!("the check panicked"))?;
            pumped.with_context(|| format!("see {}", self.spec.console.display()))?;
            ready
        })
    }

    /// Waits until the container accepts connections, or `over` says that there is no use.
    pub(super) fn until_accepting(
        &self,
        network: &Namespace,
        ready: &Ready,
        over: &dyn Fn() -> bool,
    ) -> Result<()> {
        let address = SocketAddr::new(self.network.addresses[0].ip, ready.tcp);
        let timeout: Duration = *ready.timeout;
        let begin = Instant::now();
        while begin.elapsed() < timeout && !over() {
            if network.enter(|| TcpStream::connect(address))?.is_ok() {
                return Ok(());
            }
            std::thread::sleep(READY_PAUSE);
        }
        bail!(
            "{address} does not accept connections after {timeout:?}; see {}",
            self.spec.console.display()
        );
    }

    fn make_shell(
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
        let unapplied = super::backup::DEPTH as u32 + 2;
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
            setup(crate::frames::gate::GateThread::Outbound);
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
    pub(super) fn times(&self, seen: Seen) -> detector::Config {
        self.protect.as_ref().map_or_else(detector::Config::default, |p| {
            let detector = &p.detector;
            let (timeout, most) = (*detector.timeout, detector.most());
            let (timeout, most) = match seen {
                Seen::FromBackup => (timeout, most),
                Seen::FromPrimary => ((timeout * 4).max(most), (timeout * 4).max(most)),
            };
            detector::Config {
                interval: *detector.heartbeat,
                timeout,
                most,
                first: most.max(WITHOUT_PULSES),
                stall: *detector.stall,
            }
        })
    }

    /// The other host of a protection.
    pub(super) fn peer<'a>(&self, protect: &'a Protect) -> &'a str {
        if protect.primary == self.options.host { &protect.backup } else { &protect.primary }
    }

    /// The address of a host on the link that checkpoints travel over.
    pub(super) fn address(&self, protect: &Protect, host: &str) -> Result<IpAddr> {
        self.options
            .topology
            .replication_address(protect, host)
            .with_context(|| format!("host {host} has no address on the replication link"))
    }

    /// How to reach the other host.
    pub(super) fn link_config(
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
struct Tasks {
    release: Option<JoinHandle<()>>,
    others: Vec<tokio::task::JoinHandle<()>>,
}

impl Tasks {
    /// Waits until all that was proven has left. The shell has been told to end.
    fn join_release(&mut self) {
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

/// The set-up of the gate's threads: ahead of ordinary work. Real-time ones would be woken by every
/// single frame of a client on the same processor, and take it from the client.
pub(super) fn gate_threads() -> ThreadSetup {
    const NICE: i32 = -10;
    Arc::new(|which| {
        if let Err(error) = sched::set_ordinary().and_then(|()| sched::set_nice(NICE)) {
            tracing::debug!(?which, %error, "a thread of the gate runs at ordinary priority");
        }
    })
}
