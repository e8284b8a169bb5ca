//! The root of a tree that is to be restored: a process with a given pid, in the caller's
//! namespaces or in new ones, that waits to be made into the root.
//!
//! Unlike a launched container it needs no program of its own and may have any pid. Invariant: it
//! runs no code of a program before it is taken over, and it is gone if it never is.

use super::{ClockOffsets, LaunchError, Launched};
use crate::image::Clocks;
use crate::image::info::{NamespaceKind, TmpfsMount};
use crate::sys::birth::{Link, chain};
use crate::sys::loopback;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{gettid, sethostname};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Which root, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conception {
    /// Name for messages.
    pub name: String,
    /// Its pid. In a new pid namespace it must be 1.
    pub pid: i32,
    /// The session that it is to be in, if its leader must be made for that, and is no more then.
    pub session: Option<i32>,
    /// The process group, likewise.
    pub group: Option<i32>,
    /// Namespaces to be made new.
    pub new: Vec<NamespaceKind>,
    /// The tmpfs mounts that a new mount namespace is to have.
    pub tmpfs: Vec<TmpfsMount>,
    /// Host name of a new uts namespace.
    pub hostname: String,
    /// What the clocks of a new time namespace are to read.
    pub clocks: Clocks,
}

/// Makes it.
pub fn conceive(plan: &Conception) -> Result<Launched, LaunchError> {
    let host = |doing: &str| {
        let (name, doing) = (plan.name.clone(), doing.to_string());
        move |source: io::Error| LaunchError::Host { name, doing, source }
    };
    let (control, theirs) = UnixStream::pair().map_err(host("make a socket pair"))?;
    let has = |kind| plan.new.contains(&kind);
    let clock_offsets = match has(NamespaceKind::Time) {
        true => ClockOffsets::to_reach(plan.clocks),
        false => ClockOffsets::default(),
    };
    let mut links = Vec::new();
    let link = |pid, session, group, mount_proc| Link { pid, session, group, mount_proc };
    links.extend(plan.session.map(|sid| link(sid, true, false, false)));
    let group = plan.group.filter(|g| Some(*g) != plan.session);
    links.extend(group.map(|pgid| link(pgid, false, true, false)));
    let mount_proc = has(NamespaceKind::Pid) && has(NamespaceKind::Mount);
    links.push(link(plan.pid, false, false, mount_proc));
    // A thread of its own: what it enters, and is born of it, must not be ours.
    let made = std::thread::scope(|scope| {
        let maker = || -> Result<i32, (&'static str, io::Error)> {
            enter_new(plan, clock_offsets)?;
            chain(&links, theirs.as_fd(), control.as_fd())
                .map_err(|e| ("make a process with its pid", io::Error::other(e.to_string())))
        };
        let thread = std::thread::Builder::new().name("conceive".into());
        let thread = thread.spawn_scoped(scope, maker).map_err(|e| ("start a thread", e))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    let pid = made.map_err(|(doing, e)| host(doing)(e))?;
    Ok(Launched {
        pid,
        root: plan.pid,
        ends_all: has(NamespaceKind::Pid),
        name: plan.name.clone(),
        control,
        clock_offsets,
        tmpfs: plan.tmpfs.iter().map(|m| m.point.clone()).chain([super::SHM.to_owned()]).collect(),
        reaped: false,
    })
}

/// Makes the new namespaces around the calling thread and its children to be.
fn enter_new(plan: &Conception, offsets: ClockOffsets) -> Result<(), (&'static str, io::Error)> {
    use NamespaceKind::{Cgroup, Ipc, Mount, Net, Pid, Time, User, Uts};
    let mut flags = CloneFlags::empty();
    for kind in &plan.new {
        flags |= match kind {
            Pid => CloneFlags::CLONE_NEWPID,
            Net => CloneFlags::CLONE_NEWNET,
            Mount => CloneFlags::CLONE_NEWNS,
            Uts => CloneFlags::CLONE_NEWUTS,
            Ipc => CloneFlags::CLONE_NEWIPC,
            Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
            Cgroup => CloneFlags::CLONE_NEWCGROUP,
            User => return Err(("make a user namespace", io::ErrorKind::Unsupported.into())),
        };
    }
    if flags.is_empty() {
        return Ok(());
    }
    unshare(flags).map_err(|e| ("make new namespaces (needs root)", e.into()))?;
    let has = |kind| plan.new.contains(&kind);
    if has(Time) {
        std::fs::write(format!("/proc/{}/timens_offsets", gettid()), offsets.to_lines())
            .map_err(|e| ("set the clocks of the time namespace", e))?;
    }
    if has(Mount) {
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(|e| ("make mounts private", e.into()))?;
        for own in &plan.tmpfs {
            mount_tmpfs(own).map_err(|e| {
                let why = io::Error::other(format!("{}: {e}", own.point));
                ("mount the tmpfs that it had (make its directory first)", why)
            })?;
        }
    }
    if has(Uts) {
        sethostname(&plan.hostname).map_err(|e| ("set the host name", e.into()))?;
    }
    if has(Net) {
        let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|e| ("make a socket", e.into()))?;
        loopback::up(any.as_fd()).map_err(|e| ("bring lo up", io::Error::other(e.to_string())))?;
    }
    Ok(())
}

/// A tmpfs as it was.
fn mount_tmpfs(own: &TmpfsMount) -> nix::Result<()> {
    let mut flags = MsFlags::empty();
    for option in own.options.split(',') {
        flags |= match option {
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            _ => MsFlags::empty(),
        };
    }
    let a = &own.attributes;
    let mut data = format!("mode={:o},uid={},gid={}", a.mode, a.uid, a.gid);
    if !own.limits.is_empty() {
        data = format!("{data},{}", own.limits);
    }
    mount(Some("tmpfs"), own.point.as_str(), Some("tmpfs"), flags, Some(data.as_str()))
}
