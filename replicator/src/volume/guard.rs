//! Ends the connections of volumes between kernel and server when the server's process cannot.
//!
//! A process that is killed writes back what it has stored through shared mappings of files in a volume, and waits for the
//! server (fuse_vma_close in the kernel's fs/fuse/file.c). It does so in whoever has its memory last: that can be our own
//! thread that reads it at that moment (process_vm_readv). If we were killed as well, the server is dead, but its
//! descriptors are closed, and the connection ended, only when that thread has ended, which waits for
//! the connection. Nobody would ever come out of that: so somebody else ends it.
//!
//! What it watches is a thread of ours that does nothing else and has no descriptors: a process that dies closes its files in
//! whichever thread ends last, and to close one of a volume is to write it back, and to wait.
//!
//! Invariant: a guard does something only once the thread that has begun it is dead, and ends then.

use super::Served;
use crate::sys::{descriptors, pidfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The argument that makes our binary a guard.
pub const GUARD_COMMAND: &str = "__volume-guard";

/// A process that stands by while volumes are served. Dropping it ends it; to be dropped after them.
#[derive(Debug)]
pub struct Guard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// The guard opens them anew while it begins.
    _aborts: Vec<OwnedFd>,
}

#[derive(Debug, Default)]
struct Shared {
    watch: Mutex<Watch>,
    change: Condvar,
}

#[derive(Debug, Default)]
struct Watch {
    child: Option<Child>,
    over: bool,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Watch> {
    shared.watch.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guard {
    /// For these volumes. `program` is our own binary, usually /proc/self/exe; it must call [`guard_main`] when its first argument
    /// is [`GUARD_COMMAND`]. Returns at once; that there is no guard is logged.
    ///
    /// # Errors
    /// There are no descriptors or threads left.
    pub fn start(program: &Path, served: &[Served]) -> io::Result<Self> {
        let aborts: io::Result<Vec<OwnedFd>> = served.iter().map(Served::abort_handle).collect();
        let (aborts, program) = (aborts?, program.to_owned());
        let numbers: Vec<RawFd> = aborts.iter().map(AsRawFd::as_raw_fd).collect();
        let shared = Arc::<Shared>::default();
        let of_thread = shared.clone();
        // A thread that does nothing else: it dies as soon as it is told to.
        let thread = std::thread::Builder::new().name("guard".into()).spawn(move || {
            let mut watch = lock(&of_thread);
            if !watch.over {
                match begin(&program, &numbers) {
                    Ok(child) => watch.child = Some(child),
                    Err(error) => tracing::warn!(%error, "volumes are served without a guard"),
                }
            }
            if let Err(error) = descriptors::have_none() {
                tracing::warn!(%error, "the guard of volumes may wait for them itself");
            }
            while !watch.over {
                watch = of_thread.change.wait(watch).unwrap_or_else(PoisonError::into_inner);
            }
        })?;
        Ok(Self { shared, thread: Some(thread), _aborts: aborts })
    }
}

fn begin(program: &Path, aborts: &[RawFd]) -> io::Result<Child> {
    let numbers = aborts.iter().map(RawFd::to_string);
    Command::new(program)
        .arg(GUARD_COMMAND)
        .args([std::process::id().to_string(), nix::unistd::gettid().to_string()])
        .args(numbers)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut watch = lock(&self.shared);
        watch.over = true;
        if let Some(mut child) = watch.child.take()
            && let Err(error) = child.kill().and_then(|()| child.wait())
        {
            tracing::debug!(%error, "the guard of volumes had ended");
        }
        drop(watch);
        self.shared.change.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has not panicked: nothing in it does.
            let _ = thread.join();
        }
    }
}

/// Runs the hidden subcommand [`GUARD_COMMAND`]: process and thread that are watched, and the numbers of descriptors of that
/// process that end connections.
pub fn guard_main() -> ! {
    let done = guard(std::env::args().skip(2));
    std::process::exit(i32::from(done.is_err()))
}

fn guard(mut words: impl Iterator<Item = String>) -> io::Result<()> {
    let mut number = || {
        let word = words.next().map(|w| w.parse::<i32>().map_err(io::Error::other));
        word.transpose()
    };
    let missing = || io::Error::from(io::ErrorKind::InvalidInput);
    let (process, thread) = (number()?.ok_or_else(missing)?, number()?.ok_or_else(missing)?);
    let mut aborts = Vec::new();
    while let Some(fd) = number()? {
        aborts.push(File::options().write(true).open(format!("/proc/{process}/fd/{fd}"))?);
    }
    // Who kills all that is in its network, or sends a signal to its group, does not mean us.
    let _ = nix::unistd::setsid();
    let _ = unshare(CloneFlags::CLONE_NEWNET);
    match pidfd::open_thread(thread) {
        Ok(watched) => {
            let mut fds = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
            while let Err(nix::errno::Errno::EINTR) = poll(&mut fds, PollTimeout::NONE) {}
        }
        Err(error) if error.code() == libc::ESRCH => {}
        Err(error) => return Err(error.source),
    }
    // One that has ended already is as good.
    aborts.iter_mut().for_each(|abort| drop(abort.write_all(b"1")));
    Ok(())
}
