//! One-shot images of programs that know nothing of it: each of `tests/oneshot/*.c` starts in the
//! host's namespaces, becomes a daemon, sets up its state; it is written to a file and let run,
//! written again and ended, brought back under its pids, told to check, and says PASS or why not.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nilicon_tests::binary;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a program may take for a step, on a machine that is busy with others.
const PATIENCE: Duration = Duration::from_secs(60);
/// Programs under way at a time.
const SIDE_BY_SIDE: usize = 4;

struct Bench(PathBuf);

impl Bench {
    fn new(name: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("nilicon-oneshot-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        Self(dir)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sources() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("oneshot");
    let mut all: Vec<PathBuf> =
        fs::read_dir(dir).expect("sources").map(|entry| entry.expect("an entry").path()).collect();
    all.retain(|path| path.extension().is_some_and(|e| e == "c"));
    all.sort();
    all
}

fn compile(source: &Path, dir: &Path) -> PathBuf {
    let program = dir.join(source.file_stem().expect("a name"));
    let done = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(source)
        .output()
        .expect("cc is installed");
    assert!(
        done.status.success(),
        "{}: {}",
        source.display(),
        String::from_utf8_lossy(&done.stderr)
    );
    program
}

/// A daemon under test; killed with all its children in the end, if it still runs.
struct Daemon {
    pid: i32,
    out: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for pid in tree(self.pid) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A process and its descendants.
fn tree(root: i32) -> Vec<i32> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|c| c.parse::<i32>().ok()));
        }
        at += 1;
    }
    all
}

/// Runs a command and gives what it printed, or how it failed.
fn nilicon(arguments: &[&str]) -> Result<String, String> {
    let done = Command::new(binary()).args(arguments).stdin(Stdio::null()).output();
    let done = done.expect("nilicon starts");
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned()),
        false => Err(format!(
            "nilicon {}: {}: {}",
            arguments.join(" "),
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        )),
    }
}

fn wait_for(path: &Path, what: &str) -> Result<String, String> {
    let begin = Instant::now();
    loop {
        match fs::read_to_string(path) {
            Ok(text) => return Ok(text.trim().to_owned()),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(format!("{what}: {e}")),
        }
        if begin.elapsed() > PATIENCE {
            let log = fs::read_to_string(path.with_extension("out.log")).unwrap_or_default();
            return Err(format!("{what}: waited in vain {log}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn start(program: &Path) -> Result<Daemon, String> {
    let (pidfile, out) = (program.with_extension("pid"), program.with_extension("out"));
    for old in [&pidfile, &out] {
        let _ = fs::remove_file(old);
    }
    let status = Command::new(program)
        .args([&pidfile, &out])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let status = status.map_err(|e| e.to_string())?;
    if !status.success() {
        return Err(format!("it did not start: {status}"));
    }
    let pid = match wait_for(&pidfile, "its pidfile") {
        Ok(pid) => pid.parse().map_err(|_| "its pidfile holds no pid".to_owned())?,
        Err(e) => return Err(fs::read_to_string(&out).unwrap_or(e)),
    };
    Ok(Daemon { pid, out })
}

fn status(pid: i32, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Nothing of nilicon is left in these processes.
fn expect_untouched(pids: &[i32]) -> Result<(), String> {
    for &pid in pids {
        let tracer = status(pid, "TracerPid");
        if tracer.as_deref() != Some("0") {
            return Err(format!("pid {pid} is traced by {tracer:?}"));
        }
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
        if maps.starts_with("00010000-") {
            return Err(format!("pid {pid} has kept the scratch area"));
        }
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| e.to_string())?.flatten() {
            let link = fs::read_link(fd.path()).unwrap_or_default();
            if link.to_string_lossy().contains("userfaultfd") {
                return Err(format!("pid {pid} has kept a userfaultfd"));
            }
        }
    }
    Ok(())
}

/// The whole way of one program.
fn round(program: &Path) -> Result<(), String> {
    let image = program.with_extension("img");
    let image = image.to_str().expect("a path");
    let daemon = start(program)?;
    let pid = daemon.pid.to_string();
    let before = tree(daemon.pid);

    nilicon(&["checkpoint", &pid, "--to", image, "--leave-running"])?;
    expect_untouched(&before)?;
    nilicon(&["image", "verify", image])?;
    nilicon(&["checkpoint", &pid, "--to", image])?;
    for pid in &before {
        if status(*pid, "State").is_some_and(|s| !s.starts_with('Z')) {
            return Err(format!("pid {pid} has outlived its checkpoint"));
        }
    }
    let restored = nilicon(&["restore", image, "--detach"])?;
    if restored != pid {
        return Err(format!("it came back as {restored} instead of {pid}"));
    }
    let after = tree(daemon.pid);
    let (mut a, mut b) = (before.clone(), after.clone());
    (a.sort_unstable(), b.sort_unstable());
    if a != b {
        return Err(format!("processes {a:?} came back as {b:?}"));
    }
    expect_untouched(&after)?;
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).map_err(|e| format!("SIGTERM: {e}"))?;
    let said = wait_for(&daemon.out, "its verdict")?;
    match said.as_str() {
        "PASS" => Ok(()),
        other => Err(other.to_owned()),
    }
}

#[test]
fn every_program_passes_after_its_checkpoint_and_restore() {
    let bench = Bench::new("programs");
    let only = std::env::var("NILICON_ONESHOT").ok();
    let mut sources = sources();
    sources
        .retain(|s| only.as_ref().is_none_or(|name| s.file_stem().is_some_and(|n| n == &**name)));
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let name = source.file_stem().expect("a name").to_string_lossy().into_owned();
                    let begin = Instant::now();
                    let result = round(&compile(source, &bench.0));
                    let took = begin.elapsed().as_secs_f64();
                    match result {
                        Ok(()) => println!("PASS {name} ({took:.2} s)"),
                        Err(why) => {
                            println!("FAIL {name} ({took:.2} s): {why}");
                            failed.lock().expect("no panic").push(name);
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic");
    assert!(failed.is_empty() && !sources.is_empty(), "failed: {failed:?}");
}
