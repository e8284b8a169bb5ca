//! `nilicon checkpoint` and `nilicon restore`: a process tree into a file, and back.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use netns_tools::namespace::Namespace;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};
use replicator::capture::{self, CaptureError, Capturer, Held};
use replicator::image::file::{Draft, Reader, Writer};
use replicator::restore::{Place, Reborn, rebirth};
use replicator::sys::unix_diag::UnixDiag;

use super::args::{CheckpointArgs, RestoreArgs};
use super::numbers::bytes;
use super::resume;

/// Signals that end a command, or are passed on to a restored program.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// `nilicon checkpoint`.
pub(super) fn checkpoint(args: &CheckpointArgs) -> Result<()> {
    let pid = args.pid;
    refuse_relatives(pid)?;
    // Whoever wants us to end must wait until the tree is what it was.
    let signals = hold_signals()?;
    let mut info = match capture::about(pid, env!("CARGO_PKG_VERSION")) {
        Err(e @ CaptureError::Unsupported { .. }) => return Err(e.into()),
        other => other.with_context(|| format!("pid {pid}: is there such a process?"))?,
    };
    let (draft, file) =
        Draft::create(&args.to).with_context(|| format!("cannot write {}", args.to.display()))?;
    let begin = Instant::now();
    let mut held = seize(pid)?;
    info.notes.clone_from(&held.notes);
    for note in &held.notes {
        eprintln!("nilicon: note: {note}");
    }
    let written = || format!("cannot write {}", args.to.display());
    let mut writer = Writer::begin(file, &info, &mut held.state).with_context(written)?;
    writer.pages(&held.pages).with_context(written)?;
    let file = writer.finish().with_context(written)?;
    if let Ok(Some(signal)) = signals.read_signal() {
        let name = Signal::try_from(signal.ssi_signo as i32).map_or("a signal", Signal::as_str);
        bail!("interrupted by {name}; the tree runs on, nothing was written");
    }
    draft.keep(file).with_context(written)?;
    let (processes, threads) = (held.state.processes.len(), held.thread_count());
    let pages = held.pages.pages();
    let ending = if args.leave_running {
        held.release().context("the image is complete, but the tree could not be let go")?;
        "runs on"
    } else {
        held.kill().context("the image is complete, but the tree could not be ended")?;
        "has ended"
    };
    println!(
        "{}: {processes} processes, {threads} threads, {pages} pages ({}); the tree stood still \
         for {:.1} ms and {ending}",
        args.to.display(),
        bytes(pages as u64 * 4096),
        begin.elapsed().as_secs_f64() * 1e3,
    );
    Ok(())
}

fn seize(pid: i32) -> Result<Held> {
    let capturer = gentle_capturer(pid)?;
    capturer.hold().with_context(|| format!("the tree of pid {pid} runs on"))
}

/// A capturer of a tree that outlives us.
pub(super) fn gentle_capturer(pid: i32) -> Result<Capturer> {
    let diag = Namespace::of_process(pid)?.enter(UnixDiag::open)??;
    Capturer::adopt_gently(pid, diag).with_context(|| format!("cannot trace pid {pid}"))
}

/// A tree that we are part of cannot be stopped by us.
pub(super) fn refuse_relatives(pid: i32) -> Result<()> {
    let mut at = getpid().as_raw();
    while at > 0 {
        ensure!(at != pid, "pid {pid} is this command itself or runs it: it would stop itself");
        let status = std::fs::read_to_string(format!("/proc/{at}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:")?.trim().parse().ok());
        at = parent.unwrap_or(0);
    }
    Ok(())
}

/// Blocks what would end us, to be read from the descriptor.
fn hold_signals() -> Result<SignalFd> {
    let set: SigSet = PASSED_ON.into_iter().collect();
    set.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("cannot wait for signals (signalfd)")
}

/// `nilicon restore`.
pub(super) fn restore(args: &RestoreArgs) -> Result<ExitCode> {
    let mut set: SigSet = PASSED_ON.into_iter().collect();
    set.add(Signal::SIGCHLD);
    set.thread_block().context("cannot block signals")?;
    let path = args.file.display();
    let mut reader = Reader::open(&args.file).with_context(|| format!("cannot read {path}"))?;
    let reborn = rebirth(&mut reader, Place::from(args.namespaces))
        .with_context(|| format!("cannot restore {path}; nothing of it runs"))?;
    resume::tell_peers(&reborn)?;
    for note in &reborn.notes {
        eprintln!("nilicon: note: {note}");
    }
    if args.detach {
        println!("{}", reborn.pid);
        return Ok(ExitCode::SUCCESS);
    }
    let mut line = String::new();
    let _ = write!(
        line,
        "restored pid {} ({} processes) in {:.1} ms",
        reborn.pid,
        reborn.processes,
        reborn.took.as_secs_f64() * 1e3
    );
    eprintln!("nilicon: {line}");
    wait_for(&reborn, &set)
}

/// Waits for the root, passes signals on to it, and ends as it does.
fn wait_for(reborn: &Reborn, set: &SigSet) -> Result<ExitCode> {
    let root = Pid::from_raw(reborn.pid);
    loop {
        match waitpid(root, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(ExitCode::from(code as u8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                eprintln!("nilicon: the restored program was ended by {signal}");
                return Ok(ExitCode::from(128 + signal as u8));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("cannot wait for the restored program"),
        }
        let signal = set.wait().context("cannot wait for signals")?;
        if signal != Signal::SIGCHLD {
            // ESRCH: it has just ended, as the next round finds out.
            let _ = kill(root, signal);
        }
    }
}
