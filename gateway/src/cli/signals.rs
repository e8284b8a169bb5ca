//! Ctrl-C and SIGTERM: a command that has a lab standing must take it down before it ends.
//!
//! The signal only sets a flag; the command looks at it wherever it waits, and leaves by the way
//! of every error, so that its guards do their work. The handlers are the process's own: programs
//! that it starts do not inherit them.

use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// The command was told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {0}")]
pub(super) struct Interrupted(Signal);

impl Interrupted {
    /// The exit code that shells expect after this signal.
    pub(super) fn exit_code(self) -> u8 {
        128 + self.0 as u8
    }
}

/// From now on signals are noted instead of ending the process.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn catch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot start the thread that waits for signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        let caught = |kind| signal(kind).context("cannot wait for signals");
        (caught(SignalKind::interrupt())?, caught(SignalKind::terminate())?)
    };
    let wait = async move {
        loop {
            let received = tokio::select! {
                Some(()) = interrupt.recv() => Signal::SIGINT,
                Some(()) = terminate.recv() => Signal::SIGTERM,
                else => return,
            };
            RECEIVED.store(received as i32, Ordering::SeqCst);
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || runtime.block_on(wait))
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}

/// Whether the command may go on.
///
/// # Errors
/// It was told to end.
pub(super) fn check() -> Result<(), Interrupted> {
    match Signal::try_from(RECEIVED.load(Ordering::SeqCst)) {
        Ok(signal) => Err(Interrupted(signal)),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!(Interrupted(Signal::SIGINT).exit_code(), 130);
        assert_eq!(Interrupted(Signal::SIGTERM).exit_code(), 143);
    }
}
