//! One-shot images of programs that know nothing of it: each of `tests/oneshot/*.c` starts in the
//! host's namespaces, becomes a daemon, sets up its state; it is written to a file and let run,
//! written again and ended, brought back under its pids, told to check, and says PASS or why not. Those
//! of `tests/oneshot/alone` make namespaces of their own, so that each is a tree for itself.

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
use serde_json::Value;

/// How long a program may take for a step, on a machine that is busy with others.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often each program is ended and brought back: what was restored can be captured again.
const ROUNDS: usize = 2;
/// How often the tree of all programs is ended and brought back, if `NILICON_ROUNDS` does not say.
const ROUNDS_TOGETHER: usize = 20;
/// Programs under way at a time.
const SIDE_BY_SIDE: usize = 4;
/// Programs whose processes come and go.
const RESTLESS: [&str; 3] = ["hasty", "spawning", "vforks"];

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

/// The programs of `tests/oneshot`.
fn sources() -> Vec<PathBuf> {
    sources_in("oneshot")
}

fn sources_in(dir: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
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
        if begin.elapsed() > PATIENCE * 3 {
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
    let is_restless = RESTLESS.iter().any(|name| program.ends_with(name));
    let members = || if is_restless { vec![daemon.pid] } else { tree(daemon.pid) };
    let before = members();

    nilicon(&["checkpoint", &pid, "--to", image, "--leave-running"])?;
    expect_untouched(&before)?;
    nilicon(&["image", "verify", image])?;
    for _ in 0..ROUNDS {
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
        let (mut a, mut b) = (before.clone(), members());
        a.sort_unstable();
        b.sort_unstable();
        if a != b {
            return Err(format!("processes {a:?} came back as {b:?}"));
        }
        expect_untouched(&b)?;
    }
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
    sources.extend(sources_in("oneshot/alone"));
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
                        Ok(()) => println!("kind {name} ok ({took:.2} s)"),
                        Err(why) => {
                            println!("kind {name} FAILED ({took:.2} s): {why}");
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

/// The numbers by which the kernel names tasks in its own lists are others there.
#[test]
fn whoever_is_in_a_pid_namespace_finds_all_descriptors_there() {
    const INSIDE: &str = "NILICON_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        let bench = Bench::new("inside");
        for name in ["pipeline", "files"] {
            assert_eq!(round(&built(name, &bench)), Ok(()), "{name}");
        }
        return;
    }
    let name = "whoever_is_in_a_pid_namespace_finds_all_descriptors_there";
    // The shell waits for the orphans that a daemon leaves.
    let done = Command::new("unshare")
        .args(["-pf", "--mount-proc", "sh", "-c", "\"$0\" \"$@\"; exit $?"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare starts");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{}{said}", String::from_utf8_lossy(&done.stdout));
}

/// All programs as one tree: `NILICON_ROUNDS=200` for the long way.
#[test]
fn a_tree_that_uses_every_kind_at_once_never_notices() {
    let bench = Bench::new("together");
    let next = AtomicUsize::new(0);
    let sources = sources();
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::SeqCst)) {
                    compile(source, &bench.0);
                }
            });
        }
    });
    let together = Path::new(env!("CARGO_MANIFEST_DIR")).join("oneshot/together/everything.c");
    let rounds = std::env::var("NILICON_ROUNDS").map_or(ROUNDS_TOGETHER, |n| n.parse().expect("n"));
    let daemon = start(&compile(&together, &bench.0)).expect("started");
    let pid = daemon.pid.to_string();
    let path = bench.0.join("everything.img");
    let image = path.to_str().expect("a path");
    let begin = Instant::now();
    for round in 1..=rounds {
        let taken = nilicon(&["checkpoint", &pid, "--to", image]);
        let taken = taken.unwrap_or_else(|why| panic!("round {round}: {why}"));
        // Whoever is its parent now may not have waited for it yet.
        let state = status(daemon.pid, "State");
        let lives = state.is_some_and(|state| !state.starts_with('Z'));
        assert!(!lives, "round {round}: it has outlived its checkpoint");
        let restored = nilicon(&["restore", image, "--detach"]);
        assert_eq!(restored.as_deref(), Ok(&*pid), "round {round}");
        // A program speaks before it is told to only if it has failed.
        let said = verdicts(&bench.0);
        assert!(said.is_empty(), "round {round}: {said:#?}");
        if round == 1 || round == rounds {
            let taken = taken.split_once(": ").map_or("", |(_, taken)| taken);
            println!("round {round} ({:.1} s): {taken}", begin.elapsed().as_secs_f64());
        }
    }
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("told");
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
    println!("kind together ok, {rounds} times");
}

/// What the programs of the tree have said.
fn verdicts(dir: &Path) -> Vec<String> {
    let is_verdict = |name: &String| name.ends_with(".all");
    let read = |name: String| {
        let text = fs::read_to_string(dir.join(&name)).unwrap_or_else(|e| e.to_string());
        format!("{name}: {}", text.trim_end())
    };
    names_in(dir).into_iter().filter(is_verdict).map(read).collect()
}

/// A program of the bench by its name, built.
fn built(name: &str, bench: &Bench) -> PathBuf {
    let source = sources().into_iter().find(|s| s.file_stem().is_some_and(|n| n == name));
    compile(&source.expect("its source"), &bench.0)
}

/// It waits while the tree goes into the image and comes back, and is there before the wait is.
#[test]
fn a_signal_that_waits_at_a_restore_ends_the_wait_of_its_thread() {
    let bench = Bench::new("pending");
    let daemon = start(&built("interrupted", &bench)).expect("started");
    let (pid, image) = (daemon.pid.to_string(), bench.0.join("image"));
    let is = |wanted: &str| status(daemon.pid, "State").is_some_and(|s| s.starts_with(wanted));
    let until = |wanted: &str| {
        let begin = Instant::now();
        while !is(wanted) {
            assert!(begin.elapsed() < PATIENCE, "{wanted}: {:?}", status(daemon.pid, "State"));
            std::thread::yield_now();
        }
    };
    until("S");
    kill(Pid::from_raw(daemon.pid), Signal::SIGSTOP).expect("told to stop");
    until("T");
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("told to end");
    let image = image.to_str().expect("a path");
    nilicon(&["checkpoint", &pid, "--to", image]).expect("an image");
    assert_eq!(nilicon(&["restore", image, "--detach"]).as_deref(), Ok(&*pid));
    until("T");
    kill(Pid::from_raw(daemon.pid), Signal::SIGCONT).expect("told to go on");
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn what_cannot_be_captured_runs_on_and_leaves_no_file() {
    let bench = Bench::new("refused");
    // Its pipe ends at us, who are outside of the tree.
    let mut child = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sleep");
    let pid = child.id().to_string();
    let image = bench.0.join("image");
    let refused = nilicon(&["checkpoint", &pid, "--to", image.to_str().expect("a path")]);
    // It was let go a moment ago, and is about to sleep on.
    let begin = Instant::now();
    let sleeps = || status(child.id() as i32, "State").is_some_and(|s| s.starts_with('S'));
    while !sleeps() && begin.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    let is_asleep = sleeps();
    let checked =
        Command::new(binary()).args(["check", &pid, "-o", "json"]).output().expect("runs");
    let untouched = expect_untouched(&[child.id() as i32]);
    child.kill().expect("killed");
    child.wait().expect("waited for");
    let refused = refused.expect_err("a pipe to the outside");
    assert!(
        refused.contains("descriptor 0") && refused.contains("outside of the tree"),
        "{refused}"
    );
    assert!(is_asleep);
    assert_eq!(untouched, Ok(()));
    assert_eq!(names_in(&bench.0), Vec::<String>::new());
    assert_eq!(checked.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&checked.stdout).expect("json");
    assert_eq!(report["ready"], false);
    let objects = report["objects"].as_array().expect("objects");
    let row = objects.iter().find(|o| o["protected"] == false).expect("a refusal");
    assert_eq!(
        (&row["kind"], &row["object"]),
        (&Value::from("descriptor"), &Value::from(format!("descriptor 0 of pid {pid}")))
    );
    assert!(row["why"].as_str().is_some_and(|w| w.contains("a pipe that pid")), "{row}");
    assert!(row["remedy"].as_str().is_some_and(|w| w.contains("/dev/null")), "{row}");
}

#[test]
fn a_connection_whose_other_end_is_nobodys_is_refused() {
    let bench = Bench::new("closing");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("oneshot/refused/closing.c");
    let daemon = start(&compile(&source, &bench.0)).expect("started");
    let image = bench.0.join("image");
    let image = image.to_str().expect("a path");
    let refused = nilicon(&["checkpoint", &daemon.pid.to_string(), "--to", image]);
    let refused = refused.expect_err("its peers have closed");
    assert!(refused.contains("the TCP connection 127.0.0.1:"), "{refused}");
    assert!(!Path::new(image).exists());
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("told");
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
}

#[test]
fn a_survey_names_everything_and_disturbs_nothing() {
    let bench = Bench::new("survey");
    let daemon = start(&built("sockets", &bench)).expect("started");
    let report = nilicon(&["check", &daemon.pid.to_string(), "-o", "json"]).expect("ready");
    expect_untouched(&tree(daemon.pid)).expect("untouched");
    let report: Value = serde_json::from_str(&report).expect("json");
    assert_eq!(report["ready"], true);
    let objects = report["objects"].as_array().expect("objects");
    let count = |kind: &str| objects.iter().filter(|o| o["kind"] == kind).count();
    assert_eq!((count("process"), count("threads"), count("namespace")), (1, 1, 8));
    // A listener, six ends of connections, a pair, a socket for datagrams.
    assert_eq!(count("socket"), 10, "{report:#}");
    assert!(count("mapping") > 10 && count("descriptor") >= 3);
    let text = nilicon(&["check", &daemon.pid.to_string()]).expect("ready");
    assert!(text.contains("can be protected") && text.contains("tcp listener 127.0.0.1"), "{text}");
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("told");
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
    let gone = Command::new(binary()).args(["check", "no-such-container"]).output().expect("runs");
    assert_eq!(gone.status.code(), Some(1));
    let usage = Command::new(binary()).args(["check"]).output().expect("runs");
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn images_are_shown_compared_and_verified() {
    let bench = Bench::new("image");
    let program = built("tree", &bench);
    let daemon = start(&program).expect("started");
    let pid = daemon.pid.to_string();
    let path = |name: &str| bench.0.join(name).to_str().expect("a path").to_owned();
    let (one, two) = (path("one"), path("two"));
    nilicon(&["checkpoint", &pid, "--to", &one, "--leave-running"]).expect("an image");
    nilicon(&["checkpoint", &pid, "--to", &two, "--leave-running"]).expect("another");
    let shown = nilicon(&["image", "show", &one, "-o", "json"]).expect("shown");
    let shown: Value = serde_json::from_str(&shown).expect("json");
    let processes = shown["processes"].as_array().expect("processes");
    assert_eq!(processes.len(), 6);
    assert_eq!(shown["info"]["root"], daemon.pid);
    assert!(processes[1..].iter().all(|p| p["ppid"] == daemon.pid && p["name"] == "tree"));
    assert!(shown["pages"].as_u64() > Some(10) && shown["bytes"].as_u64() > Some(40960));
    let text = nilicon(&["image", "show", &one]).expect("shown");
    assert!(text.contains("namespaces  those of the host") && text.contains("pipe 0"), "{text}");

    assert_eq!(nilicon(&["image", "diff", &one, &one]).as_deref(), Ok("the same tree"));
    let diff = Command::new(binary()).args(["image", "diff", &one, &two, "-o", "json"]).output();
    let diff = diff.expect("runs");
    assert_eq!(diff.status.code(), Some(1), "it has gone on meanwhile");
    let diff: Value = serde_json::from_slice(&diff.stdout).expect("json");
    let differences = diff["differences"].as_array().expect("a list");
    let place = format!("pid {pid} ");
    assert!(differences.iter().any(|d| d["place"].as_str().is_some_and(|p| p.starts_with(&place))));

    nilicon(&["image", "verify", &one]).expect("whole");
    let mut bytes = fs::read(&one).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&two, &bytes).expect("written");
    let damaged = Command::new(binary()).args(["image", "verify", &two]).output().expect("runs");
    assert_eq!(damaged.status.code(), Some(1));
    let said = String::from_utf8_lossy(&damaged.stdout).into_owned();
    assert!(said.contains("NOT WHOLE: at byte ") && said.contains("damaged"), "{said}");
    let refused = nilicon(&["restore", &two, "--detach"]).expect_err("damaged");
    assert!(refused.contains("nothing of it runs"), "{refused}");
    // Its pids are taken: by itself.
    let taken = nilicon(&["restore", &one, "--detach"]).expect_err("taken");
    assert!(taken.contains(&format!("pid {pid} is taken by tree")), "{taken}");
    kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("told");
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
}

#[test]
fn whoever_restores_can_wait_and_passes_signals_on() {
    let bench = Bench::new("wait");
    let daemon = start(&built("env", &bench)).expect("started");
    let image = bench.0.join("image");
    let image = image.to_str().expect("a path");
    nilicon(&["checkpoint", &daemon.pid.to_string(), "--to", image]).expect("an image");
    let mut waiting = Command::new(binary()).args(["restore", image]).spawn().expect("runs");
    let begin = Instant::now();
    // It runs when it sleeps, traced by nobody, as a child of who restored it.
    while status(daemon.pid, "TracerPid").as_deref() != Some("0")
        || status(daemon.pid, "Name").as_deref() != Some("env")
        || !status(daemon.pid, "State").is_some_and(|s| s.starts_with('S'))
    {
        assert!(begin.elapsed() < PATIENCE, "it does not run");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(status(daemon.pid, "PPid"), Some(waiting.id().to_string()));
    kill(Pid::from_raw(waiting.id() as i32), Signal::SIGTERM).expect("told");
    assert_eq!(waiting.wait().expect("waited for").code(), Some(0));
    assert_eq!(wait_for(&daemon.out, "its verdict").as_deref(), Ok("PASS"));
}

#[test]
fn a_tree_in_a_pid_namespace_of_its_own_comes_back_in_a_new_one() {
    let bench = Bench::new("unshare");
    let out = bench.0.join("out");
    let script = format!(
        "n=0; while [ ! -e {0}.stop ]; do n=$((n+1)); echo $$ $n >>{0}; sleep 0.01; done; exit 7",
        out.display()
    );
    let mut outside = Command::new("unshare")
        .args(["-pf", "--mount-proc", "setsid", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("unshare");
    let lines = || fs::read_to_string(&out).unwrap_or_default().lines().count();
    let begin = Instant::now();
    while lines() < 5 {
        assert!(begin.elapsed() < PATIENCE, "it does not run");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = *tree(outside.id() as i32).get(1).expect("a child");
    let image = bench.0.join("image");
    let image = image.to_str().expect("a path");
    nilicon(&["checkpoint", &pid.to_string(), "--to", image]).expect("an image");
    outside.wait().expect("it has ended with its child");
    let then = lines();
    let shown = nilicon(&["image", "show", image]).expect("shown");
    assert!(shown.contains("namespaces  pid, mnt"), "{shown}");
    let mut waiting = Command::new(binary()).args(["restore", image]).spawn().expect("runs");
    while lines() < then + 5 {
        assert!(begin.elapsed() < PATIENCE, "it does not go on");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(out.with_extension("stop"), "").expect("told");
    assert_eq!(waiting.wait().expect("waited for").code(), Some(7), "its own code");
    let text = fs::read_to_string(&out).expect("its output");
    let numbers: Vec<usize> = text
        .lines()
        .map(|l| l.split_once(' ').filter(|(pid, _)| *pid == "1").expect(l).1.parse().expect(l))
        .collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "{numbers:?}");
}
