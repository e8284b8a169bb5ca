//! The agent: it runs one host's part of a topology, in a lab or on a real machine.
//!
//! For each container that its host has a part in there is one thread, which keeps the warm spare
//! while the container runs elsewhere ([`backup`]), and the container while it runs here
//! ([`worker`]). Roles change; the thread, the address and the identity stay.

mod backup;
pub mod control;
#[cfg(feature = "etcd")]
mod etcd;
mod journal;
mod judge;
mod network;
mod orphans;
mod pace;
mod plain;
mod primary;
mod seeding;
mod ship;
pub mod status;
mod stop;
mod takeover;
mod urgency;
pub mod volumes;
mod worker;
mod young;

pub use journal::monotonic_us;

use anyhow::{Context, Result};
use backup::{Applier, SharedClocks, Standby};
use journal::Memory;
use judge::Judge;
use metrics_exporter_prometheus::PrometheusBuilder;
use netns_tools::cgroup::Cgroup;
use netns_tools::topology::{Container, Device, Protect, Topology, VolumeKind, Workload};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use primary::{SharedStatus, lock};
use replicator::Generation;
use replicator::container::ContainerSpec;
use replicator::protocol::backup::Backup;
use replicator::sys::sched;
use replicator::transport::admission::Notice;
use replicator::transport::backup::BackupConfig;
use replicator::transport::{BackupEndpoint, HostRole, Identity, Pulse, SharedBackup};
use replicator::wire::Limits;
use replicator::wire::message::Role as WireRole;
use status::{AgentStatus, ContainerStatus, Phase, Request, Role};
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use volumes::Files;
use worker::{Duty, Place, Seen};

/// Most threads of the runtime that carries checkpoints and heartbeats, no more than it has processors (they would
/// only wake each other), and their nice value: clients
/// wait for what they carry, but real-time ones would be woken by each frame of the input log and
/// take the processor from those very clients.
const WORKERS: usize = 2;
const NICE: i32 = -10;
/// Tasks that a busy worker runs before it looks for timers and datagrams again. One task may work
/// for a millisecond (decoding, encryption): with many of them in a row heartbeats would be late.
const EVENT_INTERVAL: u32 = 4;
/// How long the threads of containers may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// The topology.
    pub topology: Topology,
    /// The host whose part to run.
    pub host: String,
    /// Directory of certificates.
    pub pki: PathBuf,
    /// Whether output waits for its checkpoint. Without it clients can lose what they were
    /// promised: only for experiments.
    pub output_commit: bool,
}

/// Runs the part of a host in the current network namespace, until SIGTERM, SIGINT or
/// [`Request::Stop`].
///
/// # Errors
/// The topology has no such host, or the agent could not start its part. A container that fails
/// later is told by its status.
pub fn run(options: AgentOptions) -> Result<()> {
    let node = options
        .topology
        .nodes
        .get(&options.host)
        .with_context(|| format!("the topology has no node '{}'", options.host))?;
    let metrics_at = node.metrics;
    // A heart that goes on beating without a head would keep the backup from taking over.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        std::process::abort();
    }));
    let listener = control::claim(&options.topology.name, &options.host)?;
    // Before any other thread: the stop threads learn of their containers by signalfd.
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).context("block SIGCHLD")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(1, |n| n.get().min(WORKERS)))
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .on_thread_start(|| {
            if let Err(error) = sched::set_ordinary().and_then(|()| sched::set_nice(NICE)) {
                tracing::debug!(%error, "the runtime runs at ordinary priority");
            }
        })
        .build()?;
    let _entered = runtime.enter();
    if let Some(address) = metrics_at {
        PrometheusBuilder::new()
            .with_http_listener(address)
            .install()
            .with_context(|| format!("cannot serve metrics at {address}"))?;
    }
    let mut agent =
        Agent { options: Arc::new(options), parts: Vec::new(), runtime: runtime.handle().clone() };
    agent.start()?;
    let stop = Arc::new(Notify::new());
    agent.serve_control(listener, stop.clone())?;
    tracing::info!(host = agent.options.host, "the agent runs");
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut term, mut int) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = stop.notified() => {}
        }
        anyhow::Ok(())
    })?;
    agent.end();
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

/// One container's part on this host.
struct Part {
    status: SharedStatus,
    duty: Arc<Duty>,
    thread: Option<JoinHandle<()>>,
    done: Arc<AtomicBool>,
    cgroup: Cgroup,
}

struct Agent {
    options: Arc<AgentOptions>,
    runtime: tokio::runtime::Handle,
    parts: Vec<Part>,
}

impl Agent {
    fn start(&mut self) -> Result<()> {
        let options = self.options.clone();
        std::thread::Builder::new().name("warm-up".into()).spawn(|| {
            replicator::capture::warm_up();
            orphans::warm_up()
        })?;
        let topology = &options.topology;
        for (name, container) in topology.containers_on(&options.host) {
            let protect = topology.protection_of(name);
            let part = self.place(name, container, protect).and_then(|place| match protect {
                Some(protect) => self.start_side(place, protect),
                None if container.device == Device::Veth => {
                    Part::of(&place).spawn(format!("plain-{name}"), move || place.run_plain())
                }
                None => Part::of(&place).spawn(format!("stop-{name}"), move || place.run_alone()),
            });
            let part = part.with_context(|| format!("container {name}"))?;
            self.parts.push(part);
        }
        Ok(())
    }

    fn place(&self, name: &str, container: &Container, protect: Option<&Protect>) -> Result<Place> {
        let (spec, cgroup) = self.spec(name, container)?;
        let role = if protect.is_some() { Role::Backup } else { Role::Primary };
        let status = ContainerStatus {
            name: name.to_owned(),
            address: container.address.ip.to_string(),
            role,
            phase: if protect.is_some() { Phase::Waiting } else { Phase::Starting },
            protected: false,
            generation: if protect.is_some() { 0 } else { Generation::FIRST.0 },
            epoch: 0,
            pid: None,
            reason: None,
        };
        Ok(Place {
            options: self.options.clone(),
            network: network::Place::of(&self.options.topology, name, container)?,
            spec,
            files: Files::of(&self.options.topology, &self.options.host, name, container)?,
            homes: container.volumes.iter().map(|v| PathBuf::from(&v.path)).collect(),
            cgroup,
            ready: container.ready.clone(),
            protect: protect.cloned(),
            status: Arc::new(Mutex::new(status)),
            runtime: self.runtime.clone(),
            thread_setup: worker::gate_threads(),
            duty: Arc::default(),
        })
    }

    /// The part of one of the two hosts of a protected container. Both begin alike, but the one
    /// where the container is at home asks the other whether it may begin there.
    fn start_side(&self, place: Place, protect: &Protect) -> Result<Part> {
        let options = &self.options;
        let (lab, host) = (&options.topology.name, &options.host);
        let name = place.network.name.clone();
        let times = place.times(Seen::FromBackup);
        let memory = Memory::recall(lab, host, &name)?;
        let config = replicator::protocol::backup::Config { times };
        let of_files = place.files.as_ref().map_or(Generation::default(), |f| f.generation());
        let core = Backup::new(config, memory.newest().max(of_files), Duration::ZERO);
        let journals = place.files.as_ref().map(|files| files.journals());
        let (tell, notices) = mpsc::unbounded_channel();
        let depth = backup::DEPTH as u32;
        let clocks = SharedClocks::default();
        let read = clocks.clone();
        let address = place.address(protect, host)?;
        let pulse = Arc::new(Pulse::start(
            SocketAddr::new(address, protect.pulse_port.unwrap_or(0)),
            times.into(),
        )?);
        let (beating, port) = (pulse.clone(), pulse.port());
        let core = Arc::new_cyclic(|me: &Weak<SharedBackup>| {
            let me = me.clone();
            let tell = move |notice| {
                let notice = match notice {
                    Notice::Pulses(session) => {
                        if let Some(listener) = me.upgrade() {
                            beating.meet(*session, listener);
                        }
                        return;
                    }
                    other => other,
                };
                if let Notice::Admitted(_, _, hello) = &notice {
                    *lock(&read) = Some((hello.clocks, Instant::now()));
                }
                let _ = tell.send(notice);
            };
            SharedBackup::new(core, Instant::now(), &name, host, depth, tell)
                .with_pulses_at(port)
                .with_journals(journals)
        });
        let endpoint = BackupEndpoint::bind(BackupConfig {
            bind: SocketAddr::new(address, protect.port),
            peer_host: place.peer(protect).to_owned(),
            identity: Identity::load(&options.pki, host, HostRole::Host)?,
            limits: Limits::default(),
        })?;
        let judge = Judge::of(options, protect)?;
        let shell = Standby::new(&place, core.clone(), endpoint.clone(), judge, memory, pulse);
        let (orders_in, orders) = mpsc::unbounded_channel();
        let (checkpoints_in, checkpoints) = mpsc::channel(backup::DEPTH);
        self.runtime.spawn(endpoint.serve(core, checkpoints_in));
        self.runtime.spawn(backup::follow(shell.clone(), notices, orders_in.clone()));
        self.runtime.spawn(backup::beat(shell.clone()));
        if protect.primary == *host {
            let question = place.link_config(protect, Generation::default(), WireRole::Backup)?;
            let files = place.files.clone();
            self.runtime.spawn(backup::find_out(shell.clone(), files, question, orders_in));
        }
        place.duty.stands_by(shell.clone());
        let part = Part::of(&place);
        let applier =
            Applier { place, shell, lab: lab.clone(), checkpoints, orders, warm: None, clocks };
        part.spawn(format!("side-{name}"), move || applier.run())
    }

    fn spec(&self, name: &str, container: &Container) -> Result<(ContainerSpec, Cgroup)> {
        let lab = &self.options.topology.name;
        let program = std::env::current_exe().context("where is this program?")?;
        let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
        let any = if container.addresses().any(|a| a.ip.is_ipv6()) { "[::]" } else { "0.0.0.0" };
        let command = match container.workload(|p| is_installed(&path, p)) {
            Workload::Command(wanted, arguments) => {
                // By this name, this program itself, wherever it is.
                let own = (wanted == OWN_NAME).then(|| program.to_string_lossy().into_owned());
                let first = own.unwrap_or_else(|| wanted.to_owned());
                std::iter::once(first).chain(arguments.iter().cloned()).collect()
            }
            Workload::Embedded(e) => vec![
                program.to_string_lossy().into_owned(),
                "__server".into(),
                "--threads".into(),
                e.threads.to_string(),
                "--listen".into(),
                format!("{any}:{}", e.port),
            ],
        };
        let mut env: Vec<(String, String)> =
            container.environment.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        if !container.environment.contains_key("PATH") {
            env.push(("PATH".into(), path));
        }
        let tmpfs = volumes::paths(container, VolumeKind::Ephemeral).collect();
        let read_only = volumes::paths(container, VolumeKind::ReadOnly).collect();
        let cgroup = Cgroup::create(lab, &self.options.host, name)?;
        let spec = ContainerSpec {
            name: name.to_owned(),
            hostname: name.to_owned(),
            command,
            env,
            workdir: PathBuf::from(&container.workdir),
            console: status::state_dir(lab).join(format!("{name}.console")),
            cgroup_procs: Some(cgroup.path().join("cgroup.procs")),
            program,
            clocks: None,
            tmpfs,
            read_only,
        };
        Ok((spec, cgroup))
    }

    fn serve_control(&self, listener: UnixListener, stop: Arc<Notify>) -> Result<()> {
        let parts: Vec<(SharedStatus, Arc<Duty>)> =
            self.parts.iter().map(|p| (p.status.clone(), p.duty.clone())).collect();
        let host = self.options.host.clone();
        control::serve(listener, move |request| {
            let duty_of = |container: &str| {
                let part = parts.iter().find(|(status, _)| lock(status).name == container);
                part.map(|(_, duty)| duty).ok_or_else(|| "it has no part here".to_owned())
            };
            let done = match &request {
                Request::Switchover { container } => {
                    duty_of(container).and_then(|duty| duty.hand_over())
                }
                Request::Allow { container } => duty_of(container).and_then(|duty| duty.allow()),
                Request::Status | Request::Stop => Ok(()),
            };
            let refusal = done.err();
            let status = AgentStatus {
                host: host.clone(),
                pid: std::process::id(),
                containers: parts.iter().map(|(s, _)| lock(s).clone()).collect(),
                refusal,
            };
            if request == Request::Stop {
                stop.notify_one();
            }
            status
        })
    }

    /// Ends all containers, and waits for it as long as is reasonable.
    fn end(&mut self) {
        for part in &self.parts {
            part.duty.end();
        }
        let deadline = Instant::now() + ENDING;
        for part in &mut self.parts {
            while !part.done.load(Ordering::Acquire) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            match part.thread.take() {
                Some(thread) if part.done.load(Ordering::Acquire) => {
                    let _ = thread.join();
                }
                _ => tracing::warn!(container = lock(&part.status).name, "did not end in time"),
            }
            if let Err(error) = part.cgroup.remove() {
                tracing::debug!(%error, "its cgroup stays");
            }
        }
        let _ = std::fs::remove_file(status::control_socket(
            &self.options.topology.name,
            &self.options.host,
        ));
    }
}

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The command of a topology that stands for this program.
const OWN_NAME: &str = "nilicon";

fn is_installed(path: &str, program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).exists();
    }
    path.split(':').any(|dir| Path::new(dir).join(program).exists())
}

impl Part {
    /// A part that has not begun yet.
    fn of(place: &Place) -> Part {
        Part {
            status: place.status.clone(),
            duty: place.duty.clone(),
            thread: None,
            done: Arc::default(),
            cgroup: place.cgroup.clone(),
        }
    }

    fn spawn(mut self, name: String, run: impl FnOnce() + Send + 'static) -> Result<Part> {
        let finished = self.done.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            run();
            finished.store(true, Ordering::Release);
        })?;
        self.thread = Some(thread);
        Ok(self)
    }
}
