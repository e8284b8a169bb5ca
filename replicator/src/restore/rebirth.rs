//! A tree brought back from an image, in one go: no spare that follows, and no network to plug in.
//!
//! ```text
//! image -> are its pids free? -> root (conceive) -> Spare -> pages, section by section
//!       -> prepare, connect, complete -> detached: it runs, and is nobody's but its parent's
//! ```
//! Invariant: on an error nothing of the tree is left.

use super::{RestoreError, Resumption, Spare};
use crate::capture::other_end;
use crate::container::{Conception, LaunchError, conceive};
use crate::image::State;
use crate::image::file::{FileError, Reader};
use crate::image::info::NamespaceKind;
use crate::image::net::TcpConnection;
use crate::image::pages::PageSet;
use crate::restore::Peer;
use crate::sys::birth::is_kept;
use nix::unistd::{getpgrp, getsid};
use std::io::Read;
use std::time::{Duration, Instant};

/// How long an ended process may keep its pid until its parent has waited for it.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a number that no process has may be kept: until the kernel is done with its last
/// holder, unless it is the number of a group or session.
const GIVING_BACK: Duration = Duration::from_secs(3);

/// Which namespaces a tree comes back in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// New ones where it had its own, the caller's where it had those of the host.
    #[default]
    AsTaken,
    /// The caller's.
    Here,
    /// New ones of all kinds but user and cgroup.
    New,
}

/// Why a tree could not be brought back.
#[derive(Debug, thiserror::Error)]
pub enum RebirthError {
    /// The image is damaged.
    #[error("the image is damaged: {0}")]
    File(#[from] FileError),
    /// A process has its pid.
    #[error(
        "pid {pid} is taken by {by}; end that process, or restore into a pid namespace of its own \
         (--namespaces new, if the tree's root is pid 1)"
    )]
    Taken {
        /// The pid.
        pid: i32,
        /// What has it.
        by: String,
    },
    /// It cannot come back in the namespaces that were asked for.
    #[error("{0}")]
    Place(String),
    /// Its first process could not be made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The rest of it could not be made.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// A tree that runs again. Its root is a child of the calling process, and traced by nobody.
#[derive(Debug)]
pub struct Reborn {
    /// Pid of the root as the caller sees it.
    pub pid: i32,
    /// Number of processes.
    pub processes: usize,
    /// What its TCP connections still have to be told.
    pub resumption: Resumption,
    /// What is not quite as it was, in words.
    pub notes: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

/// Brings the tree of an image back. All of it happens on the calling thread.
pub fn rebirth<R: Read>(reader: &mut Reader<R>, place: Place) -> Result<Reborn, RebirthError> {
    let begin = Instant::now();
    let mut notes = reader.info().notes.clone();
    let mut state = reader.state().clone();
    let mut plan = Conception {
        name: format!("the tree of pid {}", reader.info().root),
        pid: reader.info().root,
        new: new_namespaces(reader, place)?,
        hostname: reader.info().host.clone(),
        clocks: state.clocks,
        ..Conception::default()
    };
    if plan.new.contains(&NamespaceKind::Mount) {
        plan.tmpfs.clone_from(&reader.info().tmpfs);
    } else if let Some(own) = reader.info().tmpfs.first() {
        return Err(RebirthError::Place(format!(
            "the tree has a tmpfs of its own at {}, and would find the caller's files there; restore it \
             into a mount namespace of its own (--namespaces as-taken or new)",
            own.point
        )));
    }
    if !plan.new.contains(&NamespaceKind::Time) && boot() != reader.info().boot {
        notes.push("the image is of another boot: its clocks may have gone back".into());
    }
    if !plan.new.contains(&NamespaceKind::Pid) {
        adopt_session(&mut state, &mut plan, &mut notes);
        let own = state.processes.iter().flat_map(|p| p.threads.iter().map(|t| t.tid));
        let ended = state.ended.iter().map(|e| e.pid);
        for pid in own.chain(ended).chain(plan.session).chain(plan.group) {
            free(pid)?;
        }
    }
    let mut spare = Spare::new(conceive(&plan)?)?;
    spare.keep_other_files();
    spare.insist_on_files();
    spare.apply(&state, &PageSet::default())?;
    let mut pages = PageSet::default();
    while reader.next_pages(&mut pages)? {
        spare.add_pages(&pages)?;
    }
    spare.prepare()?;
    let resumption = spare.connect(|c| peer(&state, c))?;
    spare.push_unsent()?;
    let processes = spare.complete()?.len();
    spare.detach_all()?;
    let mut launched = spare.into_launched();
    // From here on it is on its own.
    launched.mark_reaped();
    let took = begin.elapsed();
    Ok(Reborn { pid: launched.pid, processes, resumption, notes, took })
}

/// What the other end of a connection within the tree expects.
fn peer(state: &State, c: &TcpConnection) -> Peer {
    other_end(state, c).map_or(Peer::Silent, |other| Peer::Expects(other.rcv_nxt))
}

fn new_namespaces<R: Read>(
    reader: &Reader<R>,
    place: Place,
) -> Result<Vec<NamespaceKind>, RebirthError> {
    use NamespaceKind::{Cgroup, Ipc, Mount, Net, Pid, Time, User, Uts};
    let info = reader.info();
    let new = match place {
        Place::Here => Vec::new(),
        Place::New => vec![Pid, Net, Mount, Uts, Ipc, Time],
        // Its cgroup namespace is but a view, and a new one would be another.
        Place::AsTaken => {
            NamespaceKind::ALL.into_iter().filter(|k| info.own(*k) && *k != Cgroup).collect()
        }
    };
    if new.contains(&User) {
        let why = "the tree was in a user namespace of its own, which cannot be made again; \
                   restore it from within one, with --namespaces host";
        return Err(RebirthError::Place(why.into()));
    }
    if new.contains(&Pid) && info.root != 1 {
        return Err(RebirthError::Place(format!(
            "the root of the tree has pid {}, and in a new pid namespace it would have to be pid \
             1; restore it into the namespaces of the caller (--namespaces host)",
            info.root
        )));
    }
    Ok(new)
}

/// A session or group that is led from outside the tree: its leader is made again for a moment if
/// it is no more; if it lives, it cannot be joined, and the caller's stands in for it.
fn adopt_session(state: &mut State, plan: &mut Conception, notes: &mut Vec<String>) {
    let Some(root) = state.processes.first() else { return };
    let (pid, sid, pgid) = (root.pid, root.sid, root.pgid);
    let is_free = |p: i32| free(p).is_ok();
    let ours = getsid(None).map_or(0, |p| p.as_raw());
    if sid != pid && sid != ours {
        if is_free(sid) {
            plan.session = Some(sid);
        } else {
            notes.push(format!(
                "session {sid} is led by a process outside of the image: the tree goes on in \
                 session {ours}"
            ));
            for p in state.processes.iter_mut().filter(|p| p.sid == sid) {
                p.sid = ours;
            }
        }
    }
    let (leads, inherited) = (sid == pid || pgid == pid, plan.session == Some(pgid));
    if leads || inherited {
        return;
    }
    let group = getpgrp().as_raw();
    if is_free(pgid) {
        plan.group = Some(pgid);
    } else if pgid != group || plan.session.is_some() {
        notes.push(format!(
            "process group {pgid} is led by a process outside of the image: the tree goes on in \
             group {group}"
        ));
        let group = plan.session.unwrap_or(group);
        for p in state.processes.iter_mut().filter(|p| p.pgid == pgid) {
            p.pgid = group;
        }
    }
}

/// Finds a pid free, or becoming so.
fn free(pid: i32) -> Result<(), RebirthError> {
    let begin = Instant::now();
    loop {
        let kept = is_kept(pid).map_err(|e| RebirthError::Place(e.to_string()))?;
        if !kept {
            return Ok(());
        }
        let (by, patience) = holder(pid);
        if begin.elapsed() > patience {
            return Err(RebirthError::Taken { pid, by });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Who keeps a number, and how long that may last if it is about to be given back.
fn holder(pid: i32) -> (String, Duration) {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return ("a process group or session of that number".into(), GIVING_BACK);
    };
    let (name, rest) = stat.rsplit_once(')').unwrap_or((&stat, ""));
    let name = name.split_once('(').map_or("", |(_, name)| name);
    match rest.trim_start().starts_with(['Z', 'X']) {
        true => (format!("{name}, which has ended but was not waited for by its parent"), PATIENCE),
        false => (name.to_owned(), Duration::ZERO),
    }
}

/// Which boot this is.
pub fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_string()
}
