//! What /proc says of a process and what rarely changes. It is read just before the stop, and in
//! the stop only if it has changed since the stop before: a [`glance`](super::glance) tells that for
//! next to nothing.

use super::CaptureError;
use super::direct::Reads;
use crate::image::task::Ended;
use crate::image::{Credentials, MmFields};
use std::fs;

/// Attributes read from /proc.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Attributes {
    pub(super) pid: i32,
    pub(super) ppid: i32,
    pub(super) pgid: i32,
    pub(super) sid: i32,
    pub(super) mm: MmFields,
    pub(super) auxv: Vec<u8>,
    pub(super) exe: String,
    pub(super) cwd: String,
    pub(super) umask: u32,
    pub(super) limits: Vec<(u32, u64, u64)>,
    pub(super) creds: Credentials,
    pub(super) born: u64,
    pub(super) exit_signal: i32,
    /// Its controlling terminal as the kernel numbers it; 0 for none.
    pub(super) terminal: i32,
    pub(super) root: Option<String>,
    pub(super) oom_score_adj: i32,
    /// Locked memory in KiB.
    pub(super) locked: u64,
    /// /proc/PID/status: 0, 1 (strict) or 2 (filters).
    pub(super) seccomp: u8,
}

/// Reads them. `before` gives what cannot change without an exec (auxv, exe).
pub(super) fn read(pid: i32, before: Option<&Attributes>) -> Result<Attributes, CaptureError> {
    let base = format!("/proc/{pid}");
    let text = |name: &str| {
        let path = format!("{base}/{name}");
        fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))
    };
    let link = |name: &str| {
        let path = format!("{base}/{name}");
        fs::read_link(&path)
            .map(|p| p.to_string_lossy().into_owned())
            .map_err(|e| CaptureError::proc(&path, e))
    };
    let mut a = Attributes::default();
    match before {
        Some(b) => (a.auxv, a.exe) = (b.auxv.clone(), b.exe.clone()),
        None => {
            let path = format!("{base}/auxv");
            a.auxv = fs::read(&path).map_err(|e| CaptureError::proc(&path, e))?;
            a.exe = link("exe")?;
        }
    }
    let refuse = |what: &str| CaptureError::unsupported(format!("pid {pid}"), what.to_owned());
    if a.exe.ends_with(" (deleted)") {
        let why =
            "the file of its program was deleted or replaced; start it anew from one that stays";
        return Err(refuse(why));
    }
    a.cwd = link("cwd")?;
    if a.cwd.ends_with(" (deleted)") {
        return Err(refuse("its working directory was deleted; start it in one that stays"));
    }
    let root = link("root")?;
    if root.ends_with(" (deleted)") {
        return Err(refuse("its root directory was deleted; run it in one that stays"));
    }
    a.root = (root != "/").then_some(root);
    let adjusted = text("oom_score_adj")?;
    a.oom_score_adj = adjusted.trim().parse().map_err(|_| invalid(&base, "oom_score_adj"))?;
    status(&text("status")?, &mut a).ok_or_else(|| invalid(&base, "status"))?;
    if a.seccomp == 1 {
        return Err(refuse("it runs in the strict mode of seccomp; filters work"));
    }
    stat(&text("stat")?, &mut a).ok_or_else(|| invalid(&base, "stat"))?;
    a.limits = limits(&text("limits")?).ok_or_else(|| invalid(&base, "limits"))?;
    Ok(a)
}

fn invalid(base: &str, name: &str) -> CaptureError {
    CaptureError::proc(&format!("{base}/{name}"), std::io::ErrorKind::InvalidData.into())
}

fn status(text: &str, a: &mut Attributes) -> Option<()> {
    let last = |v: &str| v.split_whitespace().last()?.parse::<i32>().ok();
    let four = |v: &str| -> Option<[u32; 4]> {
        let all: Vec<u32> = v.split_whitespace().map_while(|x| x.parse().ok()).collect();
        all.try_into().ok()
    };
    let hex = |v: &str| u64::from_str_radix(v.trim(), 16).ok();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        match key {
            "NSpid" => a.pid = last(value)?,
            "NSpgid" => a.pgid = last(value)?,
            "NSsid" => a.sid = last(value)?,
            "Uid" => a.creds.uids = four(value)?,
            "Gid" => a.creds.gids = four(value)?,
            "Groups" => {
                a.creds.groups = value.split_whitespace().map_while(|g| g.parse().ok()).collect();
            }
            "Umask" => a.umask = u32::from_str_radix(value.trim(), 8).ok()?,
            "CapInh" => a.creds.caps[0] = hex(value)?,
            "CapPrm" => a.creds.caps[1] = hex(value)?,
            "CapEff" => a.creds.caps[2] = hex(value)?,
            "CapBnd" => a.creds.caps[3] = hex(value)?,
            "CapAmb" => a.creds.caps[4] = hex(value)?,
            "NoNewPrivs" => a.creds.no_new_privs = value.trim() == "1",
            "VmLck" => a.locked = value.split_whitespace().next()?.parse().ok()?,
            "Seccomp" => a.seccomp = value.trim().parse().ok()?,
            _ => {}
        }
    }
    (a.pid > 0).then_some(())
}

/// proc_pid_stat(5). `ppid` is the host's number here; the caller translates it.
fn stat(text: &str, a: &mut Attributes) -> Option<()> {
    let rest = &text[text.rfind(')')? + 2..];
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Field n of the manual page is at n - 3.
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    a.ppid = fields.get(1)?.parse().ok()?;
    a.born = field(22)?;
    a.exit_signal = fields.get(38 - 3)?.parse().ok()?;
    a.terminal = fields.get(7 - 3)?.parse().ok()?;
    a.mm = MmFields {
        start_code: field(26)?,
        end_code: field(27)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk: 0,
        start_stack: field(28)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
    };
    Some(())
}

/// What is left of a process that has ended; none if it is gone or lives. Its parent's pid is the
/// host's number here.
pub(super) fn ended(pid: i32) -> Result<Option<Ended>, CaptureError> {
    let base = format!("/proc/{pid}");
    let text = |name: &str| {
        let path = format!("{base}/{name}");
        fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))
    };
    let read = || -> Result<Option<Ended>, CaptureError> {
        let stat_text = text("stat")?;
        let rest = stat_text.rfind(')').map_or("", |at| &stat_text[at + 2..]);
        if !rest.starts_with('Z') {
            return Ok(None);
        }
        let mut a = Attributes::default();
        status(&text("status")?, &mut a).ok_or_else(|| invalid(&base, "status"))?;
        stat(&stat_text, &mut a).ok_or_else(|| invalid(&base, "stat"))?;
        let code = rest.split_whitespace().nth(52 - 3).and_then(|v| v.parse().ok());
        let name = stat_text.find('(').zip(stat_text.rfind(')'));
        Ok(Some(Ended {
            pid: a.pid,
            ppid: a.ppid,
            pgid: a.pgid,
            sid: a.sid,
            born: a.born,
            exit_signal: a.exit_signal,
            status: code.ok_or_else(|| invalid(&base, "stat"))?,
            uid: a.creds.uids[0],
            comm: name.map_or(String::new(), |(from, to)| stat_text[from + 1..to].to_owned()),
        }))
    };
    match read() {
        Err(e) if e.is_gone() => Ok(None),
        other => other,
    }
}

/// What the kernel has counted of a process's reads (proc_pid_io(5)), if it counts them.
pub(super) fn reads(pid: i32) -> Option<Reads> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.strip_prefix(": ")?.parse().ok()
    };
    Some(Reads { calls: value("syscr")?, from_disks: value("read_bytes")? })
}

/// The credentials of one thread.
pub(super) fn credentials(tid: i32) -> Result<Credentials, CaptureError> {
    let path = format!("/proc/{tid}/status");
    let text = fs::read_to_string(&path).map_err(|e| CaptureError::proc(&path, e))?;
    let mut a = Attributes::default();
    status(&text, &mut a).ok_or_else(|| invalid(&format!("/proc/{tid}"), "status"))?;
    Ok(a.creds)
}

/// The order of lines in /proc/PID/limits and the resources that they are for.
const RESOURCES: [(&str, u32); 16] = [
    ("Max cpu time", libc::RLIMIT_CPU),
    ("Max file size", libc::RLIMIT_FSIZE),
    ("Max data size", libc::RLIMIT_DATA),
    ("Max stack size", libc::RLIMIT_STACK),
    ("Max core file size", libc::RLIMIT_CORE),
    ("Max resident set", libc::RLIMIT_RSS),
    ("Max processes", libc::RLIMIT_NPROC),
    ("Max open files", libc::RLIMIT_NOFILE),
    ("Max locked memory", libc::RLIMIT_MEMLOCK),
    ("Max address space", libc::RLIMIT_AS),
    ("Max file locks", libc::RLIMIT_LOCKS),
    ("Max pending signals", libc::RLIMIT_SIGPENDING),
    ("Max msgqueue size", libc::RLIMIT_MSGQUEUE),
    ("Max nice priority", libc::RLIMIT_NICE),
    ("Max realtime priority", libc::RLIMIT_RTPRIO),
    ("Max realtime timeout", libc::RLIMIT_RTTIME),
];

fn limits(text: &str) -> Option<Vec<(u32, u64, u64)>> {
    let value = |v: &str| if v == "unlimited" { Some(u64::MAX) } else { v.parse::<u64>().ok() };
    let mut out = Vec::with_capacity(16);
    for line in text.lines().skip(1) {
        let Some((name, resource)) = RESOURCES.iter().find(|(n, _)| line.starts_with(n)) else {
            continue;
        };
        let mut fields = line[name.len()..].split_whitespace();
        out.push((*resource, value(fields.next()?)?, value(fields.next()?)?));
    }
    (out.len() == RESOURCES.len()).then_some(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn our_own_attributes() {
        let me = std::process::id() as i32;
        let a = super::read(me, None).expect("attributes");
        assert_eq!(a.pid, me);
        assert_eq!(a.limits.len(), 16);
        assert!(a.mm.start_code < a.mm.end_code && !a.auxv.is_empty());
        assert_eq!(a.creds.uids[0], nix::unistd::getuid().as_raw());
    }
}
