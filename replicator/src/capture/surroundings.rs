//! The namespaces of a container: its host name, and what in them cannot be brought back: mounts
//! and settings of the network that it made, and processes with namespaces or control groups of
//! their own.

use super::{CaptureError, or_copy, sharing};
use crate::sys::namespace::{in_network_of, is_ours};
use crate::sys::route::{RouteWatch, Settings};
use crate::sys::{SysError, SysResult};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind::NotFound;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Namespaces that all processes of a container must share, those of children to come included.
const SHARED: [&str; 8] =
    ["cgroup", "ipc", "mnt", "net", "user", "uts", "pid_for_children", "time_for_children"];

/// Looks at a process between two readings of its namespaces.
const LOOKS: u32 = 16;

#[derive(Debug)]
pub(super) struct Namespaces {
    /// The namespaces of the container's init.
    of_init: Vec<PathBuf>,
    /// Our uts namespace and the container's, if they are two.
    uts: Option<(File, File)>,
    /// Files that tell by poll(2) that a host or domain name has changed, in any namespace, if they are there.
    renames: Option<[File; 2]>,
    /// The names as they were last.
    names: Option<(String, String)>,
    /// A copy of them for the next checkpoint.
    ready: Option<(String, String)>,
    /// The container's mounts and how they were at first, if they are its own.
    mounts: Option<(File, Vec<u8>)>,
    /// The mounts are other ones than at first.
    differ: bool,
    /// The network's settings, if they are watched.
    network: Option<Watched>,
    /// Where the container's init is in the hierarchies of control groups.
    cgroup: String,
    looks: BTreeMap<i32, u32>,
}

/// The settings of a network and how they were at first.
#[derive(Debug)]
struct Watched {
    watch: RouteWatch,
    at_first: Settings,
    differ: bool,
}

impl Namespaces {
    /// Those of the container whose init this is.
    pub(super) fn of(root: i32) -> Result<Self, CaptureError> {
        let open = |path: String| File::open(&path).map_err(|e| CaptureError::proc(&path, e));
        let uts = match is_ours(root, "uts")? {
            true => None,
            false => {
                let ours = open("/proc/thread-self/ns/uts".into())?;
                Some((ours, open(format!("/proc/{root}/ns/uts"))?))
            }
        };
        let mounts = match is_ours(root, "mnt")? {
            true => None,
            false => {
                let file = open(format!("/proc/{root}/mountinfo"))?;
                let at_first = read(&file)?;
                Some((file, at_first))
            }
        };
        let mut of_init = links(root)?;
        for (link, name) in of_init.iter_mut().zip(SHARED) {
            // It may have said already that its children are to have others than its own.
            if let Some(own) = name.strip_suffix("_for_children") {
                let path = format!("/proc/{root}/ns/{own}");
                *link = fs::read_link(&path).map_err(|e| CaptureError::proc(&path, e))?;
            }
        }
        Ok(Self {
            of_init,
            uts,
            renames: renames(),
            names: None,
            ready: None,
            mounts,
            differ: false,
            network: None,
            cgroup: cgroup(root)?,
            looks: BTreeMap::new(),
        })
    }

    /// Takes the network of the container with this init as it should be: whoever runs it sets it
    /// up so on the other host as well.
    pub(super) fn watch_network(&mut self, root: i32) -> Result<(), CaptureError> {
        let watch = in_network_of(root, RouteWatch::open)??;
        let at_first = watch.settings()?;
        self.network = Some(Watched { watch, at_first, differ: false });
        Ok(())
    }

    /// Refuses devices, addresses, routes and rules that were made or taken away since.
    pub(super) fn check_network(&mut self) -> Result<(), CaptureError> {
        let Some(Watched { watch, at_first, differ }) = &mut self.network else { return Ok(()) };
        if !watch.has_news()? && !*differ {
            return Ok(());
        }
        let now = watch.settings()?;
        *differ = now != *at_first;
        let (what, did) = match (now.difference(at_first).next(), at_first.difference(&now).next())
        {
            (Some(new), _) => (new, "made"),
            (None, Some(gone)) => (gone, "taken away"),
            (None, None) => return Ok(()),
        };
        let why = format!(
            "it was {did} by the container, and what a container does to its network is not carried \
             over; say in the topology what it should be"
        );
        Err(CaptureError::unsupported(format!("the {what}"), why))
    }

    /// Refuses a process that has left a namespace of its container, or has a thread that has left
    /// its process. Read at the first look and then from time to time.
    pub(super) fn check(&mut self, pid: i32) -> Result<(), CaptureError> {
        let looks = self.looks.entry(pid).or_default();
        *looks += 1;
        if *looks % LOOKS != 1 {
            return Ok(());
        }
        let group = cgroup(pid)?;
        if group != self.cgroup {
            let why = format!(
                "it is in a control group of its own ({}), and groups that a container makes are not \
                 carried over; run it without",
                group.lines().next().unwrap_or_default()
            );
            return Err(CaptureError::unsupported(format!("pid {pid}"), why));
        }
        for (index, link) in links(pid)?.iter().enumerate() {
            if *link != self.of_init[index] {
                let why = format!(
                    "it has a namespace of its own ({}), and only those of the container are \
                     carried over; run it without (no unshare, no sandbox of its own)",
                    SHARED[index]
                );
                return Err(CaptureError::unsupported(format!("pid {pid}"), why));
            }
        }
        sharing::check_threads(pid)
    }

    /// Forgets a process that ended.
    pub(super) fn forget(&mut self, pid: i32) {
        self.looks.remove(&pid);
    }

    /// Host name and domain name, if the container has its own.
    pub(super) fn names(&mut self) -> SysResult<Option<(String, String)>> {
        let Some((ours, theirs)) = &self.uts else { return Ok(None) };
        // A change is told once, and a name that is set meanwhile is told by the next poll.
        let changed = match &self.renames {
            Some(files) => tells(files.each_ref())?,
            None => true,
        };
        if !changed && self.names.is_some() {
            return Ok(or_copy(self.ready.take(), &self.names));
        }
        let failed = |call| move |e: nix::Error| SysError::errno(call, "uts namespace", e as i32);
        setns(theirs, CloneFlags::CLONE_NEWUTS).map_err(failed("setns"))?;
        let names = nix::sys::utsname::uname();
        setns(ours, CloneFlags::CLONE_NEWUTS).map_err(failed("setns"))?;
        let names = names.map_err(failed("uname"))?;
        let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
        self.names = Some((text(names.nodename()), text(names.domainname())));
        Ok(self.names.clone())
    }

    /// Before a stop: makes the memory that its checkpoint takes along.
    pub(super) fn make_ready(&mut self) {
        if self.ready.is_none() {
            self.ready.clone_from(&self.names);
        }
    }

    /// Refuses mounts that were made or taken away since the container began.
    pub(super) fn check_mounts(&mut self) -> Result<(), CaptureError> {
        let Some((file, at_first)) = &mut self.mounts else { return Ok(()) };
        // A change is told once.
        if !tells([&*file])? && !self.differ {
            return Ok(());
        }
        let now = read(file)?;
        self.differ = now != *at_first;
        if !self.differ {
            return Ok(());
        }
        let (after, before) = (String::from_utf8_lossy(&now), String::from_utf8_lossy(at_first));
        let ours = fs::read_to_string("/proc/thread-self/mountinfo")
            .map_err(|e| CaptureError::proc("/proc/thread-self/mountinfo", e))?;
        let Some(point) = changed_inside(&before, &after, &ours) else {
            (*at_first, self.differ) = (now, false);
            return Ok(());
        };
        let why = "it was mounted, unmounted or changed by the container, and mounts are not protected; \
                   mount it before the container starts";
        Err(CaptureError::unsupported(format!("the mount at {point}"), why.into()))
    }
}

/// What tells of changes of names, see proc_sys_kernel(5).
const RENAMES: [&str; 2] = ["/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname"];

fn renames() -> Option<[File; 2]> {
    let [host, domain] = RENAMES.map(File::open);
    host.ok().zip(domain.ok()).map(Into::into)
}

/// Whether any of these files of /proc tells by poll(2) that what it shows has changed since the file
/// was opened or last told so.
fn tells<const COUNT: usize>(files: [&File; COUNT]) -> SysResult<bool> {
    let mut polled = files.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI));
    let changed = poll(&mut polled, PollTimeout::ZERO);
    changed.map(|n| n > 0).map_err(|e| SysError::errno("poll", "files of /proc", e as i32))
}

/// The control groups of a process, see cgroups(7).
fn cgroup(pid: i32) -> Result<String, CaptureError> {
    let path = format!("/proc/{pid}/cgroup");
    fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))
}

/// The point of a mount that the container has made, changed or taken away; none if it did nothing
/// of the kind. A directory that is removed outside takes what is mounted on it along, in every
/// namespace: what is gone in `ours` too was not the container's doing. Nor is a named namespace that
/// went: the host makes and removes these (`ip netns`), again and again under the same name.
fn changed_inside(before: &str, after: &str, ours: &str) -> Option<String> {
    // proc_pid_mountinfo(5): id, parent, device, root, mount point.
    let place = |line: &str| line.split(' ').skip(2).take(3).map(str::to_owned).collect::<Vec<_>>();
    let missing = |from: &str, line: &str| !from.lines().any(|l| l == line);
    let made = after.lines().find(|line| missing(before, line));
    let gone = || {
        before.lines().filter(|line| missing(after, line)).find(|line| {
            let was = place(line);
            !line.contains(" - nsfs ") && ours.lines().any(|l| place(l) == was)
        })
    };
    let line = made.or_else(gone)?;
    Some(line.split(' ').nth(4).unwrap_or_default().to_owned())
}

fn links(pid: i32) -> Result<Vec<PathBuf>, CaptureError> {
    let link = |name: &&str| {
        let path = format!("/proc/{pid}/ns/{name}");
        match fs::read_link(&path) {
            // A namespace that has no process yet cannot be named.
            Err(e) if e.kind() == NotFound && name.ends_with("_for_children") => Ok(PathBuf::new()),
            other => other.map_err(|e| CaptureError::proc(&path, e)),
        }
    };
    SHARED.iter().map(link).collect()
}

fn read(file: &File) -> Result<Vec<u8>, CaptureError> {
    let mut all = vec![0; 16 << 10];
    let mut used = 0;
    loop {
        let n = file.read_at(&mut all[used..], used as u64);
        used += match n.map_err(|e| CaptureError::proc("mountinfo", e))? {
            0 => break,
            n => n,
        };
        if used == all.len() {
            all.resize(2 * used, 0);
        }
    }
    all.truncate(used);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::changed_inside;

    #[test]
    fn what_went_outside_as_well_was_not_the_containers_doing() {
        let root = "20 1 8:1 / / rw - ext4 /dev/sda rw\n";
        let bind = "31 20 0:8 /a /srv/a rw - ext4 /dev/sdb rw\n";
        let named = "32 20 0:4 net:[1] /run/netns/a rw - nsfs nsfs rw\n";
        let both = format!("{root}{bind}");
        let more = format!("{both}40 20 0:9 / /mnt rw - tmpfs none rw\n");
        // The host numbers its mounts in its own way.
        let host = both.replace("31 20", "91 80").replace("20 1", "80 1");
        let host_without = root.replace("20 1", "80 1");
        assert_eq!(changed_inside(&both, &both, &host), None);
        assert_eq!(changed_inside(&both, root, &host_without), None, "gone everywhere");
        assert_eq!(changed_inside(&both, root, &host).as_deref(), Some("/srv/a"));
        let with_named = format!("{both}{named}");
        assert_eq!(
            changed_inside(&with_named, &both, &format!("{host}{named}")),
            None,
            "made anew"
        );
        assert_eq!(changed_inside(&both, &more, &host).as_deref(), Some("/mnt"));
    }
}
