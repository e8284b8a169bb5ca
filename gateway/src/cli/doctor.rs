//! `nilicon doctor`: what this machine has and lacks for the job, each with what to do about it.
//!
//! Where the kernel can be asked, it is asked by trying, on objects of this process alone; a
//! version number is only a hint for what cannot be tried.

use std::cmp::Ordering;
use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::thread;

use anyhow::Result;
use netns_tools::cgroup::Cgroup;
use nix::sched::{CloneFlags, unshare};
use nix::sys::utsname::uname;
use replicator::bypass::Bypass;
use replicator::capture::Orphans;
use replicator::sys::{SysError, pidfd, probe, procmap::ProcMap};
use replicator::young::Door;
use serde::Serialize;

use super::args::{Output, OutputArg};
use super::is_installed;

/// What the checks found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Diagnosis {
    /// Whether all that is needed is there.
    ready: bool,
    checks: Vec<Check>,
}

/// One thing that the job needs, or that is good to have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// Whether nothing works without it.
    needed: bool,
    /// What was found.
    found: String,
    /// What to do.
    fix: Option<String>,
}

impl Check {
    fn of(name: &'static str, result: Result<String, String>, fix: &str) -> Self {
        let (ok, found) = match result {
            Ok(found) => (true, found),
            Err(found) => (false, found),
        };
        Self { name, ok, needed: true, found, fix: (!ok).then(|| fix.to_owned()) }
    }

    fn optional(self) -> Self {
        Self { needed: false, ..self }
    }
}

/// `nilicon doctor`. Returns whether all that is needed is there.
pub(super) fn doctor(args: OutputArg) -> Result<bool> {
    let checks = checks();
    let diagnosis =
        Diagnosis { ready: checks.iter().all(|check| check.ok || !check.needed), checks };
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&diagnosis)?),
        Output::Text => print!("{}", text_of(&diagnosis)),
    }
    Ok(diagnosis.ready)
}

fn text_of(diagnosis: &Diagnosis) -> String {
    let mut out = String::new();
    for check in &diagnosis.checks {
        let mark = match (check.ok, check.needed) {
            (true, _) => "ok",
            (false, true) => "LACKS",
            (false, false) => "-",
        };
        out.push_str(&format!("  {mark:<6} {:<28} {}\n", check.name, check.found));
        if let Some(fix) = &check.fix {
            out.push_str(&format!("  {:<6} {:<28} -> {fix}\n", "", ""));
        }
    }
    out.push_str(match diagnosis.ready {
        true => "This machine can run and protect containers.\n",
        false => "This machine lacks something that is needed.\n",
    });
    out
}

fn checks() -> Vec<Check> {
    const KERNEL: &str = "boot a kernel of version 6.11 or later";
    let mut checks = vec![
        Check::of("x86-64", architecture(), "use a machine with an x86-64 processor"),
        Check::of("kernel 6.11", kernel(), KERNEL),
    ];
    let capabilities = capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    let entitled = capabilities.iter().all(|check| check.ok);
    checks.extend(capabilities);
    let said = |result: Result<(), SysError>| {
        result.map(|()| "works".to_owned()).map_err(|error| error.to_string())
    };
    let config = |option: &str| format!("boot a kernel with {option}");
    let mut tried = vec![
        Check::of("namespaces", namespaces(), &config("NET_NS, PID_NS, TIME_NS, IPC_NS, UTS_NS")),
        Check::of(
            "userfaultfd",
            said(probe::async_write_protection()),
            &config("CONFIG_USERFAULTFD"),
        ),
        Check::of("PAGEMAP_SCAN", said(probe::pagemap_scan()), KERNEL),
        Check::of("PROCMAP_QUERY", said(procmap()), KERNEL),
        Check::of("TCP_REPAIR", said(probe::tcp_repair()), &config("CONFIG_CHECKPOINT_RESTORE")),
        Check::of("kcmp", kcmp(), &config("CONFIG_KCMP (CONFIG_CHECKPOINT_RESTORE)")),
        Check::of(
            "ptrace",
            ptrace_scope(fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok()),
            "boot without kernel.yama.ptrace_scope=3: it cannot be lowered while the system runs",
        ),
        Check::of(
            "young connections",
            said(Door::load().map(drop)),
            "boot a kernel of version 6.9 or later with BPF_SYSCALL, NET_CLS_ACT and \
             DEBUG_INFO_BTF; without it a failover resets the connections that a container has \
             not accepted yet",
        )
        .optional(),
        Check::of(
            "closed connections",
            match Orphans::open() {
                Some(_) => Ok("works".to_owned()),
                None => Err("their kernel does not show what they have still to send".to_owned()),
            },
            "boot a kernel with BPF_SYSCALL and DEBUG_INFO_BTF; without it what a program writes \
             and closes at once, beyond some 14 KB, is lost with its host",
        )
        .optional(),
        Check::of(
            "around the gateway",
            said(Bypass::probe()),
            "boot a kernel with BPF_SYSCALL, NET_XGRESS and MEMBARRIER, and without nohz_full; without it \
             a container that is not protected speaks through the gateway, too, which is slower",
        )
        .optional(),
        Check::of(
            "volumes",
            said(probe::fuse()),
            "boot a kernel with CONFIG_FUSE_FS, or make /dev/fuse available here; without it no \
             volume can be replicated",
        )
        .optional(),
        Check::of(
            "a root as a volume",
            said(probe::layers_by_descriptor()),
            "boot a kernel of version 6.13 or later with CONFIG_OVERLAY_FS; without it a volume \
             cannot have the path /",
        )
        .optional(),
        Check::of("/dev/net/tun", tun(), "modprobe tun, or make the device available here"),
        Check::of("cgroups", cgroups(), "mount the unified hierarchy at /sys/fs/cgroup, writable"),
    ];
    if !entitled {
        // What was refused may only have been refused to this user.
        for check in tried.iter_mut().filter(|check| !check.ok) {
            check.fix = Some("get the capabilities above first, and ask again".to_owned());
        }
    }
    checks.extend(tried);
    checks.extend([
        Check::of(
            "two processors",
            processors(),
            "stops take longer where all share one processor",
        )
        .optional(),
        Check::of(
            "redis-server",
            is_installed("redis-server")
                .then(|| "installed".to_owned())
                .ok_or_else(|| "not installed; the built-in server stands in".to_owned()),
            "install it to see an unmodified Redis survive (apt install redis-server)",
        )
        .optional(),
    ]);
    checks
}

fn architecture() -> Result<String, String> {
    let machine = uname().map_err(|error| format!("uname: {error}"))?;
    let machine = machine.machine().to_string_lossy().into_owned();
    if machine == "x86_64" { Ok(machine) } else { Err(machine) }
}

fn kernel() -> Result<String, String> {
    let name = uname().map_err(|error| format!("uname: {error}"))?;
    let release = name.release().to_string_lossy().into_owned();
    if version(&release) >= Some((6, 11)) { Ok(release) } else { Err(release) }
}

/// The first two numbers of a kernel's release, such as 6.18.1-generic.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The capabilities that are needed, from the text of /proc/self/status.
fn capabilities(status: &str) -> Vec<Check> {
    const NEEDED: [(&str, u32, &str); 5] = [
        ("CAP_NET_ADMIN", 12, "to make links and to repair TCP connections"),
        ("CAP_NET_RAW", 13, "to see the frames of the container"),
        ("CAP_SYS_PTRACE", 19, "to take checkpoints of processes"),
        ("CAP_SYS_ADMIN", 21, "to make namespaces"),
        ("CAP_CHECKPOINT_RESTORE", 40, "to restore processes with their numbers"),
    ];
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let check = |(name, bit, why): (&'static str, u32, &str)| {
        let has = held & (1 << bit) != 0;
        let result = if has { Ok("held".to_owned()) } else { Err(format!("lacking, {why}")) };
        Check::of(name, result, &format!("run as root, or grant it (--cap-add {name})"))
    };
    NEEDED.into_iter().map(check).collect()
}

/// Tries to make one of each, in threads that end right away.
fn namespaces() -> Result<String, String> {
    let time = CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME);
    let kinds = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("time", time),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("mount", CloneFlags::CLONE_NEWNS),
    ];
    let mut refused = Vec::new();
    for (name, kind) in kinds {
        let result = thread::spawn(move || unshare(kind)).join();
        if !matches!(result, Ok(Ok(()))) {
            let why = result.ok().and_then(Result::err).map(|errno| errno.to_string());
            refused.push(format!("{name} ({})", why.unwrap_or_else(|| "no answer".to_owned())));
        }
    }
    match refused.is_empty() {
        true => Ok(kinds.map(|(name, _)| name).join(", ")),
        false => Err(format!("refused: {}", refused.join(", "))),
    }
}

fn procmap() -> Result<(), SysError> {
    ProcMap::open(std::process::id() as i32)?.list(&mut Vec::new())
}

fn kcmp() -> Result<String, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| e.to_string())?;
    let (pid, fd) = (std::process::id() as i32, listener.as_raw_fd());
    match pidfd::compare_files(pid, fd, pid, fd) {
        Ok(Ordering::Equal) => Ok("works".to_owned()),
        Ok(_) => Err("a descriptor is not the same as itself".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// What the Yama security module, if it is there, allows.
fn ptrace_scope(scope: Option<String>) -> Result<String, String> {
    match scope.as_deref().map(str::trim) {
        None => Ok("not restricted".to_owned()),
        Some("3") => Err("kernel.yama.ptrace_scope is 3: nobody may trace".to_owned()),
        Some(scope) => Ok(format!("kernel.yama.ptrace_scope is {scope}")),
    }
}

fn tun() -> Result<String, String> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    opened.map(|_| "opens".to_owned()).map_err(|error| error.to_string())
}

fn cgroups() -> Result<String, String> {
    let lab = format!("doctor-{}", std::process::id());
    let group = Cgroup::create(&lab, "host", "container").map_err(|error| error.to_string())?;
    let path = group.path().display().to_string();
    if let Some(all) = Cgroup::of(&lab, None) {
        all.remove().map_err(|error| error.to_string())?;
    }
    let root = path.split("/nilicon/").next().unwrap_or(&path);
    Ok(format!("groups can be made in {root}"))
}

fn processors() -> Result<String, String> {
    let count = thread::available_parallelism().map_or(1, usize::from);
    if count >= 2 { Ok(count.to_string()) } else { Err(count.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_as_numbers() {
        assert_eq!(version("6.18.44-generic"), Some((6, 18)));
        assert!(version("6.9.1") < Some((6, 11)));
        assert!(version("10.0") > Some((6, 11)));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn a_lacking_capability_is_named_with_its_fix() {
        let all = capabilities("CapPrm:\t0\nCapEff:\t000001ffffffffff\n");
        assert!(all.iter().all(|check| check.ok && check.fix.is_none()));
        // All but CAP_SYS_PTRACE (bit 19).
        let most = capabilities("CapEff:\t000001fffff7ffff\n");
        let lacking: Vec<_> = most.iter().filter(|check| !check.ok).collect();
        assert_eq!(lacking.len(), 1);
        assert_eq!(lacking[0].name, "CAP_SYS_PTRACE");
        assert!(lacking[0].fix.as_ref().unwrap().contains("--cap-add CAP_SYS_PTRACE"));
        assert!(capabilities("").iter().all(|check| !check.ok));
    }

    #[test]
    fn yama_forbids_only_at_3() {
        assert!(ptrace_scope(None).is_ok());
        assert!(ptrace_scope(Some("1\n".to_owned())).is_ok());
        assert!(ptrace_scope(Some("3\n".to_owned())).is_err());
    }

    #[test]
    fn what_is_optional_does_not_make_a_machine_unfit() {
        let lacking = Check::of("redis-server", Err("no".to_owned()), "install it").optional();
        let diagnosis = Diagnosis { ready: true, checks: vec![lacking] };
        let text = text_of(&diagnosis);
        assert!(text.contains("-> install it") && !text.contains("LACKS"), "{text}");
    }
}
