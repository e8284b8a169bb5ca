//! What the tests of capture and restore share: a container to capture, a spare to fill.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part of it")]

pub mod shadow;
pub mod stage;
pub mod subject;

use netns_tools::links::Network;
use netns_tools::namespace::Namespace;
use nix::sched::{CloneFlags, setns};
use replicator::capture::{CaptureError, Capturer, NoBoundary, StopTimes};
use replicator::container::{ContainerSpec, Launched, Role, launch};
use replicator::image::pages::{Content, PAGE, PageSet};
use replicator::image::{Source, State};
use replicator::restore::Spare;
use replicator::sys::tap::{Tap, TapOptions};
use replicator::sys::unix_diag::UnixDiag;
use replicator::wire::codec::Decoder;
use replicator::wire::{Assembly, Checkpoint, CheckpointBuilder, Limits, Progress};
use replicator::{Epoch, Generation};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Set in the environment of every container that a test makes.
pub const SUBJECT: &str = "NILICON_TEST_SUBJECT";

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// One of its own, also for tests that run at the same time.
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nilicon-{name}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A container that runs a command with a directory for its files.
pub fn spec(dir: &Path, command: &[&str]) -> ContainerSpec {
    ContainerSpec {
        name: "test".into(),
        hostname: "inside".into(),
        command: command.iter().map(|s| s.to_string()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), (SUBJECT.into(), "yes".into())],
        workdir: dir.into(),
        console: dir.join("console"),
        cgroup_procs: None,
        program: env!("CARGO_BIN_EXE_container-init").into(),
        clocks: None,
        tmpfs: Vec::new(),
        read_only: Vec::new(),
    }
}

/// Waits without a hurry for what must come.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The numbers in a file, one a line.
pub fn numbers(path: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(path).expect("a file of numbers");
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|l| l.parse().expect("a number")).collect()
}

/// Runs something in the network namespace of a process.
pub fn network_of<T: Send>(pid: i32, f: impl FnOnce() -> T + Send) -> T {
    let inside = move || {
        let namespace = File::open(format!("/proc/{pid}/ns/net")).expect("a namespace");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
        f()
    };
    std::thread::scope(|scope| scope.spawn(inside).join().expect("no panic inside"))
}

/// The way of checkpoints to a spare.
struct Wire {
    builder: CheckpointBuilder,
    decoder: Decoder,
    assembly: Assembly,
    epoch: Epoch,
}

impl Wire {
    fn new() -> Self {
        let limits = Limits::default();
        let builder = CheckpointBuilder::new(limits);
        let (decoder, assembly) = (Decoder::default(), Assembly::new(limits));
        Self { builder, decoder, assembly, epoch: Epoch::NONE }
    }

    fn carry(&mut self, state: &State, pages: &PageSet) -> Arc<Checkpoint> {
        let full = self.epoch == Epoch::NONE;
        self.epoch = self.epoch.next();
        let Self { builder, decoder, .. } = self;
        decoder.feed(&builder.begin(Generation(1), self.epoch, full));
        builder.pages(pages, &state.owners(), |b| decoder.feed(&b)).expect("pages");
        let finished = builder.finish(state, |b| decoder.feed(&b)).expect("a state");
        decoder.feed(&finished.end);
        loop {
            let frame = decoder.next().expect("well formed").expect("the end is not there yet");
            if let Progress::Complete(_, checkpoint) = self.assembly.push(&frame).expect("in order")
            {
                return checkpoint;
            }
        }
    }
}

/// The spare's first process has in its own memory what this checkpoint says.
fn check_memory(spare: &Spare, state: &State, pages: &PageSet) {
    let mut last = BTreeMap::new();
    for run in pages.runs.iter().filter(|run| run.process == 0) {
        for i in 0..run.count as usize {
            let at = match run.content {
                Content::Data(at) => Some(at + i * PAGE),
                Content::Dropped => None,
            };
            last.insert(run.start + (i * PAGE) as u64, at);
        }
    }
    let memory = File::open(format!("/proc/{}/mem", spare.pid())).expect("its memory");
    let mut page = [0; PAGE];
    for (address, at) in last {
        let Some(at) = at else { continue };
        let mappings = &state.processes[0].mappings;
        let own = mappings.iter().any(|m| {
            let private = match m.source {
                Source::File { shared, .. } | Source::Object { shared, .. } => !shared,
                Source::Anonymous => true,
                Source::Vdso(_) => false,
            };
            private && (m.start..m.end).contains(&address)
        });
        if own {
            memory.read_exact_at(&mut page, address).expect("read");
            assert!(page == pages.bytes[at..at + PAGE], "page {address:#x} of the spare");
        }
    }
}

/// A running container that is captured.
pub struct Original {
    pub dir: PathBuf,
    pub capturer: Capturer,
    pub launched: Launched,
    pub state: State,
    pub pages: PageSet,
    pub epoch: u64,
    wire: Wire,
}

impl Original {
    pub fn start(dir: &Scratch, command: &[&str]) -> Self {
        Self::start_with(dir, command, |_| ())
    }

    /// As [`Original::start`]; `network` is called with its pid before the command runs.
    pub fn start_with(dir: &Scratch, command: &[&str], network: impl FnOnce(i32)) -> Self {
        let mut launched = launch(&spec(&dir.0, command), Role::Start).expect("launched");
        network(launched.pid);
        let pid = launched.pid;
        let diag = network_of(pid, || UnixDiag::open().expect("unix_diag"));
        let mut capturer = Capturer::adopt(pid, diag).expect("adopted");
        // Its exec is an event that this thread must handle.
        std::thread::scope(|scope| {
            let going = scope.spawn(|| launched.go());
            while !going.is_finished() {
                capturer.pump().expect("it lives");
            }
            going.join().expect("no panic").expect("runs");
        });
        let (state, pages) = Default::default();
        Self { dir: dir.0.clone(), capturer, launched, state, pages, epoch: 0, wire: Wire::new() }
    }

    pub fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    /// Takes the next checkpoint.
    pub fn checkpoint(&mut self) -> StopTimes {
        self.epoch += 1;
        let begin = Instant::now();
        loop {
            let tried =
                self.capturer.pump().and_then(|()| self.capturer.prepare()).and_then(|()| {
                    // It need not be idle: that is a guess.
                    match self.epoch % 2 {
                        0 => self.capturer.precopy_of_idle()?,
                        _ => self.capturer.precopy()?,
                    };
                    let epoch = Epoch(self.epoch);
                    self.capturer.stop(epoch, &mut NoBoundary, &mut self.state, &mut self.pages)
                });
            match tried {
                Ok(times) => return times,
                // Programs that live for a moment hold what cannot be captured for a moment.
                Err(CaptureError::Transient(_) | CaptureError::Unsupported { .. })
                    if begin.elapsed() < Duration::from_secs(20) => {}
                Err(e) => panic!("cannot capture: {e}"),
            }
        }
    }

    /// An empty spare with clocks that go on from the last checkpoint.
    pub fn spare(&mut self) -> Spare {
        self.wire = Wire::new();
        let mut spec = spec(&self.dir, &[]);
        spec.clocks = Some(self.state.clocks);
        let launched = launch(&spec, Role::Spare).expect("launched");
        Spare::new(launched).expect("an empty spare")
    }

    /// Folds the last checkpoint into the spare that was made last, as it comes out of the wire. Gives the
    /// time that folding took.
    pub fn bring(&mut self, spare: &mut Spare) -> Duration {
        let checkpoint = self.wire.carry(&self.state, &self.pages);
        let Checkpoint { state, edits, pages, .. } = &*checkpoint;
        assert!(**state == self.state, "a state as it was sent");
        let begin = Instant::now();
        spare.apply_edited(state, edits, pages).expect("folded in");
        let took = begin.elapsed();
        check_memory(spare, &self.state, &self.pages);
        took
    }

    /// Takes the next checkpoint and
    /// folds it into the spare. Gives the time that folding took.
    pub fn follow(&mut self, spare: &mut Spare) -> Duration {
        self.checkpoint();
        self.bring(spare)
    }

    /// Handles events until something holds.
    pub fn pump_until(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        wait_until(what, || {
            self.capturer.pump().expect("it lives");
            holds()
        });
    }

    /// Ends it; gives the path of its console.
    pub fn kill(self) -> PathBuf {
        let console = self.console();
        let Original { capturer, mut launched, .. } = self;
        launched.end();
        drop(capturer);
        console
    }
}

/// A network in a namespace of its own: a bridge, with a cable for the original and one for its
/// spare, which has the same addresses and is not plugged in at first.
pub struct Lan {
    pub namespace: Namespace,
    name: String,
    network: Network,
}

pub const CONTAINER: &str = "10.77.0.2";

impl Lan {
    pub fn new(name: &str) -> Self {
        let name = format!("nl-{name}-{}", std::process::id());
        let namespace = Namespace::create(&name).expect("a namespace");
        let network = Network::open(&namespace).expect("its network");
        let lan = Self { namespace, name, network };
        lan.network.add_bridge("br0").expect("a bridge");
        lan.network.add_address("br0", "10.77.0.1/24".parse().expect("cidr")).expect("address");
        lan.network.set_up("br0").expect("up");
        lan
    }

    /// Gives a container its eth0, whose other end `cable` is not plugged in.
    pub fn connect(&self, pid: i32, cable: &str) {
        let inside = Namespace::of_process(pid).expect("its namespace");
        self.network.add_veth(cable, &inside, "eth0").expect("a cable");
        self.network.set_up(cable).expect("up");
        let inside = Network::open(&inside).expect("its network");
        inside.set_mac("eth0", "02:00:00:00:77:02".parse().expect("mac")).expect("mac");
        let address = format!("{CONTAINER}/24");
        inside.add_address("eth0", address.parse().expect("cidr")).expect("address");
        inside.set_up("eth0").expect("up");
    }

    pub fn plug(&self, cable: &str) {
        self.network.set_bridge(cable, "br0").expect("plugged in");
        wait_until("the cable is ready", || self.network.is_ready(cable).expect("asked"));
    }

    /// A device in the bridge, to send frames from.
    pub fn tap(&self, name: &str) -> Tap {
        let make = || Tap::create(name, TapOptions::default()).expect("a TAP");
        let tap = self.namespace.enter(make).expect("entered");
        self.network.set_up(name).expect("up");
        self.plug(name);
        tap
    }

    pub fn unplug(&self, cable: &str) {
        self.network.set_down(cable).expect("down");
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let _ = Namespace::delete(&self.name);
    }
}
