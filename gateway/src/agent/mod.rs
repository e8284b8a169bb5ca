//! The agent: it runs one host's part of a topology, in a lab or on a real machine.
//!
//! For each container that starts on its host it runs a [home](worker) with a stop thread, a
//! shipper and a gate; for each that it backs up, an applier with a warm spare.

mod backup;
pub mod control;
mod journal;
mod network;
mod primary;
mod ship;
pub mod status;
mod stop;
mod takeover;
mod worker;

pub use journal::monotonic_us;

use anyhow::{Context, Result};
use backup::{Applier, BackupShell};
use metrics_exporter_prometheus::PrometheusBuilder;
use netns_tools::cgroup::Cgroup;
use netns_tools::topology::{Container, Protect, Topology, Workload};
use network::Place;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use primary::{SharedStatus, Shell, lock};
use replicator::Generation;
use replicator::container::ContainerSpec;
use replicator::protocol::LinkId;
use replicator::protocol::backup::Backup;
use replicator::protocol::detector;
use replicator::sys::sched;
use replicator::transport::backup::BackupConfig;
use replicator::transport::{BackupEndpoint, HostRole, Identity, SharedBackup};
use replicator::wire::Limits;
use status::{AgentStatus, ContainerStatus, Phase, Request, Role};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// Threads of the runtime that carries checkpoints and heartbeats, and their real-time priority:
/// clients wait for what they carry, and a late heartbeat looks like a dead host.
const WORKERS: usize = 2;
const WORKER_PRIORITY: i32 = 5;
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
        .worker_threads(WORKERS)
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .on_thread_start(|| {
            if let Err(error) = sched::set_fifo(WORKER_PRIORITY) {
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
    let mut agent = Agent { options: Arc::new(options), parts: Vec::new() };
    agent.start(runtime.handle())?;
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
    thread: Option<JoinHandle<()>>,
    end: Box<dyn Fn() + Send>,
    done: Arc<AtomicBool>,
    cgroup: Cgroup,
}

struct Agent {
    options: Arc<AgentOptions>,
    parts: Vec<Part>,
}

impl Agent {
    fn start(&mut self, runtime: &tokio::runtime::Handle) -> Result<()> {
        let options = self.options.clone();
        let topology = &options.topology;
        for (name, container) in topology.containers_on(&options.host) {
            let protect = topology.protection_of(name);
            let part = match protect {
                Some(p) if p.backup == options.host => {
                    self.start_backup(runtime, name, container, p)
                }
                _ => self.start_home(runtime, name, container, protect),
            };
            let part = part.with_context(|| format!("container {name}"))?;
            self.parts.push(part);
        }
        Ok(())
    }

    fn status_of(&self, container: &Container, name: &str, role: Role) -> SharedStatus {
        Arc::new(Mutex::new(ContainerStatus {
            name: name.to_owned(),
            address: container.address.ip.to_string(),
            role,
            phase: if role == Role::Backup { Phase::Waiting } else { Phase::Starting },
            protected: false,
            generation: if role == Role::Backup { 0 } else { Generation::FIRST.0 },
            epoch: 0,
            pid: None,
            reason: None,
        }))
    }

    fn start_home(
        &self,
        runtime: &tokio::runtime::Handle,
        name: &str,
        container: &Container,
        protect: Option<&Protect>,
    ) -> Result<Part> {
        let (spec, cgroup) = self.spec(name, container)?;
        let status = self.status_of(container, name, Role::Primary);
        let shell: Arc<OnceLock<Arc<Shell>>> = Arc::default();
        let home = worker::Home {
            options: self.options.clone(),
            place: Place::of(&self.options.topology, name, container)?,
            spec,
            ready: container.ready.clone(),
            protect: protect.cloned(),
            status: status.clone(),
            runtime: runtime.clone(),
            thread_setup: worker::gate_threads(),
            shell: shell.clone(),
        };
        let end = move || {
            if let Some(shell) = shell.get() {
                shell.end();
            }
        };
        Part::spawn(format!("stop-{name}"), status, cgroup, end, move || home.run())
    }

    fn start_backup(
        &self,
        runtime: &tokio::runtime::Handle,
        name: &str,
        container: &Container,
        protect: &Protect,
    ) -> Result<Part> {
        let options = &self.options;
        let (spec, cgroup) = self.spec(name, container)?;
        let status = self.status_of(container, name, Role::Backup);
        let times = detector::Config {
            interval: *protect.detector.heartbeat,
            timeout: *protect.detector.timeout,
        };
        let origin = Instant::now();
        let config = replicator::protocol::backup::Config { times, ..Default::default() };
        let core = Backup::new(config, Generation(0), Duration::ZERO);
        let (tell, notices) = mpsc::unbounded_channel();
        let core = Arc::new(SharedBackup::new(
            core,
            origin,
            name,
            &options.host,
            backup::DEPTH as u32,
            move |notice| {
                let _ = tell.send(notice);
            },
        ));
        let bind = options
            .topology
            .backup_socket(protect)
            .with_context(|| format!("host {} has no address on the link", protect.backup))?;
        let endpoint = BackupEndpoint::bind(BackupConfig {
            bind,
            peer_host: protect.primary.clone(),
            identity: Identity::load(&options.pki, &options.host, HostRole::Host)?,
            limits: Limits::default(),
        })?;
        let shell = BackupShell::new(name, core.clone(), endpoint.clone(), status.clone())?;
        let (orders_in, orders) = mpsc::unbounded_channel();
        let (checkpoints_in, checkpoints) = mpsc::channel(backup::DEPTH);
        runtime.spawn(endpoint.serve(core.clone(), checkpoints_in));
        runtime.spawn(backup::follow(shell.clone(), notices, orders_in));
        runtime.spawn(backup::beat(shell.clone(), times.interval));
        let applier = Applier {
            shell: shell.clone(),
            place: Place::of(&options.topology, name, container)?,
            spec,
            lab: options.topology.name.clone(),
            host: options.host.clone(),
            checkpoints,
            orders,
            runtime: runtime.clone(),
            thread_setup: worker::gate_threads(),
            warm: None,
            link: LinkId::default(),
        };
        let end = move || shell.end();
        Part::spawn(format!("apply-{name}"), status, cgroup, end, move || applier.run())
    }

    fn spec(&self, name: &str, container: &Container) -> Result<(ContainerSpec, Cgroup)> {
        let lab = &self.options.topology.name;
        let program = std::env::current_exe().context("where is this program?")?;
        let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
        let command = match container.workload(|p| is_installed(&path, p)) {
            Workload::Command(program, arguments) => {
                std::iter::once(program.to_owned()).chain(arguments.iter().cloned()).collect()
            }
            Workload::Embedded(e) => vec![
                program.to_string_lossy().into_owned(),
                "__server".into(),
                "--threads".into(),
                e.threads.to_string(),
                "--listen".into(),
                format!("0.0.0.0:{}", e.port),
            ],
        };
        let mut env: Vec<(String, String)> =
            container.environment.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        if !container.environment.contains_key("PATH") {
            env.push(("PATH".into(), path));
        }
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
        };
        Ok((spec, cgroup))
    }

    fn serve_control(&self, listener: UnixListener, stop: Arc<Notify>) -> Result<()> {
        let statuses: Vec<SharedStatus> = self.parts.iter().map(|p| p.status.clone()).collect();
        let host = self.options.host.clone();
        control::serve(listener, move |request| {
            let status = AgentStatus {
                host: host.clone(),
                pid: std::process::id(),
                containers: statuses.iter().map(|s| lock(s).clone()).collect(),
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
            (part.end)();
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

fn is_installed(path: &str, program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).exists();
    }
    path.split(':').any(|dir| Path::new(dir).join(program).exists())
}

impl Part {
    fn spawn(
        name: String,
        status: SharedStatus,
        cgroup: Cgroup,
        end: impl Fn() + Send + 'static,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<Part> {
        let done = Arc::new(AtomicBool::new(false));
        let finished = done.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            run();
            finished.store(true, Ordering::Release);
        })?;
        Ok(Part { status, thread: Some(thread), end: Box::new(end), done, cgroup })
    }
}
