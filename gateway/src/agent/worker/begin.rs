//! How a container begins: its processes, its network, its command, until it is ready.
//!
//! Invariant: its first process waits in our own code until it is seized and its network is there.

use super::{Life, Place};
use crate::agent::primary::lock;
use crate::agent::status::{Phase, Role};
use crate::agent::stop::{drain_signals, sleep_on};
use crate::agent::urgency::become_stop_thread;
use crate::frames::gate::{Gate, GateConfig};
use anyhow::{Context, Result, bail};
use netns_tools::namespace::Namespace;
use netns_tools::topology::Ready;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signalfd::SignalFd;
use replicator::Generation;
use replicator::capture::{CaptureError, Capturer};
use replicator::container::{self, Launched};
use replicator::sys::unix_diag::UnixDiag;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pause between looks whether the container is ready.
const READY_PAUSE: Duration = Duration::from_millis(5);
/// Longest sleep while the container starts.
const START_PAUSE: Duration = Duration::from_millis(5);

impl Place {
    /// Begins a new life of the container, in the calling thread.
    pub(in crate::agent) fn begin(&self, generation: Generation) -> Result<Life> {
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
        self.watch_files(&mut capturer, files.as_ref())?;
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
        Ok(Life {
            files,
            launched,
            capturer,
            gate,
            signals,
            generation,
            from: None,
            closed: Vec::new(),
        })
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
    pub(in crate::agent) fn until_accepting(
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
