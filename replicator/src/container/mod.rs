//! Launching a container: a process tree in namespaces of its own.
//!
//! ```text
//! launch --- a short-lived thread: unshare(pid, time), clocks set, spawn
//!   |          program __container-init = pid 1 of the new pid namespace
//!   |            unshare(mount, net, uts, ipc), /proc, host name, lo
//!   | <- ready --|
//!   | (the caller seizes pid 1, makes the network, ...)
//!   | -- go ---->|  Start: becomes the command     Spare: never told; is taken over
//! ```
//! Invariant: nothing of the command runs before [`Launched::go`], so that whoever must see
//! everything (the tracer, the gateway) is there first; and pid 1 ends by itself if the launcher
//! dies before that.

mod conceive;
mod init;

pub use conceive::{Conception, conceive};
pub use init::{INIT_COMMAND, init_main};

use crate::image::Clocks;
use crate::sys::ptrace;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, gettid};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Where a container has a tmpfs of its own, for POSIX shared memory and semaphores.
pub const SHM: &str = "/dev/shm";

/// What to launch, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Name for messages.
    pub name: String,
    /// Host name inside.
    pub hostname: String,
    /// Program and arguments; the program is searched in the PATH of `env`.
    pub command: Vec<String>,
    /// The whole environment of the command.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub workdir: PathBuf,
    /// File that standard output and error are appended to; made if it is not there.
    pub console: PathBuf,
    /// A cgroup.procs file to write the container's pid to.
    pub cgroup_procs: Option<PathBuf>,
    /// Our own binary to execute again, usually /proc/self/exe. It must call [`init_main`] when
    /// its first argument is [`INIT_COMMAND`].
    pub program: PathBuf,
    /// What the container's clocks are to read now; none: the host's.
    pub clocks: Option<Clocks>,
    /// Directories on which it gets a tmpfs of its own; made if they are not there.
    pub tmpfs: Vec<PathBuf>,
    /// Directories of the host that it cannot change.
    pub read_only: Vec<PathBuf>,
}

/// What a new container is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It runs the command.
    Start,
    /// It waits to be made into a copy of another container, see [`crate::restore`].
    Spare,
}

/// Why a container could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The host refused something.
    #[error("container {name}: cannot {doing}: {source}")]
    Host {
        /// The container's name.
        name: String,
        /// What was tried.
        doing: String,
        /// The answer.
        source: io::Error,
    },
    /// Pid 1 of the new container says what it could not do.
    #[error("container {name}: {reason}")]
    Inside {
        /// The container's name.
        name: String,
        /// In its words.
        reason: String,
    },
}

/// From pid 1 to the launcher.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Ready,
    Failed(String),
}

/// From the launcher to pid 1.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    spec: ContainerSpec,
    role: Role,
}

/// One byte to pid 1: run the command.
const GO: u8 = b'g';

fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    stream.write_all(&(body.len() as u32).to_le_bytes())?;
    stream.write_all(&body)
}

/// The next message, or none at the end of the stream.
fn receive<T: for<'a> Deserialize<'a>>(stream: &mut UnixStream) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    match stream.read_exact(&mut len) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut body = vec![0; u32::from_le_bytes(len) as usize];
    stream.read_exact(&mut body)?;
    postcard::from_bytes(&body).map(Some).map_err(io::Error::other)
}

/// A container whose pid 1 waits for [`Launched::go`], or runs. Dropping it kills the container
/// and reaps it.
#[derive(Debug)]
pub struct Launched {
    /// Pid of the container's init as the host sees it.
    pub pid: i32,
    /// The same as the container sees it.
    root: i32,
    /// Its end is the end of all: it is the first of a pid namespace.
    ends_all: bool,
    name: String,
    control: UnixStream,
    clock_offsets: ClockOffsets,
    /// Where it has a tmpfs of its own.
    tmpfs: Vec<String>,
    reaped: bool,
}

/// Nanoseconds that the container's clocks are ahead of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffsets {
    /// CLOCK_MONOTONIC
    pub monotonic: i64,
    /// CLOCK_BOOTTIME
    pub boottime: i64,
}

impl ClockOffsets {
    fn to_reach(clocks: Clocks) -> Self {
        let here = Self::default().now();
        Self {
            monotonic: clocks.monotonic as i64 - here.monotonic as i64,
            boottime: clocks.boottime as i64 - here.boottime as i64,
        }
    }

    /// What clocks with these offsets read now.
    pub fn now(&self) -> Clocks {
        Clocks {
            monotonic: (nanoseconds(ClockId::CLOCK_MONOTONIC) + self.monotonic) as u64,
            boottime: (nanoseconds(ClockId::CLOCK_BOOTTIME) + self.boottime) as u64,
        }
    }

    /// In the format of /proc/PID/timens_offsets, see time_namespaces(7).
    fn to_lines(self) -> String {
        const S: i64 = 1_000_000_000;
        let line =
            |clock: &str, ns: i64| format!("{clock} {} {}\n", ns.div_euclid(S), ns.rem_euclid(S));
        line("monotonic", self.monotonic) + &line("boottime", self.boottime)
    }
}

fn nanoseconds(clock: ClockId) -> i64 {
    let t = clock_gettime(clock).expect("the clock exists on every Linux");
    t.tv_sec() * 1_000_000_000 + t.tv_nsec()
}

/// Makes the namespaces and their pid 1, which waits. Returns when it is ready.
pub fn launch(spec: &ContainerSpec, role: Role) -> Result<Launched, LaunchError> {
    let host = |doing: &str| {
        let (name, doing) = (spec.name.clone(), doing.to_string());
        move |source: io::Error| LaunchError::Host { name, doing, source }
    };
    let (control, theirs) = UnixStream::pair().map_err(host("make a socket pair"))?;
    let clock_offsets = spec.clocks.map(ClockOffsets::to_reach).unwrap_or_default();
    let program = spec.program.clone();
    // The thread's children live in other namespaces from here on, so it must not live on.
    let spawn = move || -> Result<u32, (&'static str, io::Error)> {
        unshare(CloneFlags::CLONE_NEWPID | CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
            .map_err(|e| ("make pid and time namespaces (needs root)", e.into()))?;
        if clock_offsets != ClockOffsets::default() {
            // thread-self has no such file, but a thread's own entry in /proc does.
            std::fs::write(format!("/proc/{}/timens_offsets", gettid()), clock_offsets.to_lines())
                .map_err(|e| ("set the clocks of the time namespace", e))?;
        }
        let mut command = Command::new(&program);
        command.arg(INIT_COMMAND).stdin(std::os::fd::OwnedFd::from(theirs)).stdout(Stdio::null());
        command.spawn().map(|child| child.id()).map_err(|e| ("execute its own program again", e))
    };
    let pid = std::thread::Builder::new()
        .name("launch".into())
        .spawn(spawn)
        .map_err(host("start a thread"))?
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        .map_err(|(doing, e)| host(doing)(e))? as i32;
    let name = spec.name.clone();
    let own = spec.tmpfs.iter().map(|at| at.to_string_lossy().into_owned());
    let tmpfs = std::iter::once(SHM.to_owned()).chain(own).collect();
    let mut launched = Launched {
        pid,
        root: 1,
        ends_all: true,
        name,
        control,
        clock_offsets,
        tmpfs,
        reaped: false,
    };
    if let Some(path) = &spec.cgroup_procs {
        let doing = format!("write its pid to {}", path.display());
        std::fs::write(path, pid.to_string()).map_err(host(&doing))?;
    }
    send(&mut launched.control, &Order { spec: spec.clone(), role })
        .map_err(host("tell its init what to do"))?;
    match receive(&mut launched.control).map_err(host("hear from its init"))? {
        Some(Report::Ready) => Ok(launched),
        Some(Report::Failed(reason)) => {
            Err(LaunchError::Inside { name: spec.name.clone(), reason })
        }
        None => {
            let reason = "its init ended before it was ready".to_string();
            Err(LaunchError::Inside { name: spec.name.clone(), reason })
        }
    }
}

impl Launched {
    /// Lets the command run, and returns when it has been executed. The caller may have seized
    /// pid 1, but without PTRACE_O_TRACEEXEC: this call would wait for its stop.
    pub fn go(&mut self) -> Result<(), LaunchError> {
        let name = || self.name.clone();
        let host = |doing: &str, source| LaunchError::Host {
            name: name(),
            doing: doing.to_string(),
            source,
        };
        self.control.write_all(&[GO]).map_err(|e| host("start its command", e))?;
        match receive(&mut self.control).map_err(|e| host("hear from its init", e))? {
            None => Ok(()),
            Some(Report::Failed(reason)) => Err(LaunchError::Inside { name: name(), reason }),
            Some(Report::Ready) => {
                Err(LaunchError::Inside { name: name(), reason: "its init is confused".into() })
            }
        }
    }

    /// Pid of the container's first process in its own pid namespace.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// The container's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How far the container's clocks are ahead of the host's.
    pub fn clock_offsets(&self) -> ClockOffsets {
        self.clock_offsets
    }

    /// Where it has a tmpfs of its own.
    pub(crate) fn tmpfs(&self) -> &[String] {
        &self.tmpfs
    }

    /// The other end of pid 1's standard input, for passing descriptors to a spare.
    pub(crate) fn control(&self) -> &UnixStream {
        &self.control
    }

    /// Tells that somebody has waited for pid 1 already, so that its number may be another's.
    pub fn mark_reaped(&mut self) {
        self.reaped = true;
    }

    /// Kills all processes of the container and reaps those that are ours. From the thread that
    /// traces them, if they are traced.
    pub fn end(&mut self) {
        if self.reaped {
            return;
        }
        self.reaped = true;
        if !self.ends_all {
            end_each(self.pid);
            return;
        }
        // ESRCH can only mean that it has ended, and then there is nothing left to kill.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        reap(self.pid);
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until a killed pid 1 of a pid namespace is gone. The kernel keeps it until all others
/// are, and keeps each traced thread until its tracer has waited for it, in any order: so ask
/// for all of them in turn.
fn reap(init: i32) {
    let mut tasks = Vec::new();
    loop {
        members(init, &mut tasks);
        for &tid in tasks.iter().rev() {
            let ended = matches!(ptrace::poll_wait(tid), Ok(Some((_, s))) if s.is_end());
            if ended && tid == init {
                return;
            }
        }
        if !std::path::Path::new(&format!("/proc/{init}")).exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

/// Kills a stopped tree whose root is not the first of a pid namespace, and waits until all of
/// its threads are gone.
fn end_each(root: i32) {
    let mut tasks = Vec::new();
    members(root, &mut tasks);
    for &task in &tasks {
        // Threads other than leaders take their process with them, too.
        let _ = kill(Pid::from_raw(task), Signal::SIGKILL);
    }
    while !tasks.is_empty() {
        tasks.retain(|tid| {
            let ended = matches!(ptrace::poll_wait(*tid), Ok(Some((_, s))) if s.is_end());
            !ended && std::path::Path::new(&format!("/proc/{tid}")).exists()
        });
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

/// All threads of a process and of its descendants, as the host numbers them; they replace what is
/// in `tasks`. One that has ended is left out.
pub fn members(init: i32, tasks: &mut Vec<i32>) {
    tasks.clear();
    let mut processes = vec![init];
    while let Some(pid) = processes.pop() {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for tid in entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()) {
            tasks.push(tid);
            let children = format!("/proc/{pid}/task/{tid}/children");
            if let Ok(children) = std::fs::read_to_string(children) {
                processes.extend(children.split_whitespace().filter_map(|c| c.parse::<i32>().ok()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_offsets_have_positive_nanoseconds() {
        let offsets = ClockOffsets { monotonic: -1_500_000_000, boottime: 2_000_000_001 };
        assert_eq!(offsets.to_lines(), "monotonic -2 500000000\nboottime 2 1\n");
    }
}
