//! A container without gateway and protection: a plain veth, a process that nobody traces. It is
//! what the others are measured against, and so shares everything with them that is not ours.

use super::primary::lock;
use super::status::{Phase, Role};
use super::worker::Place;
use anyhow::{Result, ensure};
use netns_tools::namespace::Namespace;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use replicator::container::{self, Launched};
use std::time::Duration;

/// Pause between looks whether the container, or the agent, ends.
const LOOK: Duration = Duration::from_millis(10);

impl Place {
    /// Runs the container from its begin to its end.
    pub(super) fn run_plain(&self) {
        self.tell_end(self.lead_plain());
    }

    fn lead_plain(&self) -> Result<()> {
        let mut launched = container::launch(&self.spec, container::Role::Start)?;
        let pid = launched.pid;
        let network = Namespace::of_process(pid)?;
        self.network.make_veth(pid)?;
        launched.go()?;
        self.tell(pid, Phase::Starting);
        let over = || self.duty.must_end() || has_ended(&launched);
        if let Some(ready) = &self.ready {
            let accepting = self.until_accepting(&network, ready, &over);
            let console = self.spec.console.display();
            ensure!(!has_ended(&launched), "the container's program has ended; see {console}");
            accepting?;
        }
        self.tell(pid, Phase::Unprotected);
        while !over() {
            std::thread::sleep(LOOK);
        }
        launched.end();
        Ok(())
    }

    fn tell(&self, pid: i32, phase: Phase) {
        let mut status = lock(&self.status);
        (status.role, status.phase, status.pid) = (Role::Primary, phase, Some(pid));
    }
}

/// Whether its first process has ended. It is left to be reaped with the rest.
fn has_ended(launched: &Launched) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let state = waitid(Id::Pid(Pid::from_raw(launched.pid)), flags);
    !matches!(state, Ok(WaitStatus::StillAlive))
}
