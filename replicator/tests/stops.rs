//! The order of a stop (CP-1), and what is refused by name (CP-3).

use replicator::Epoch;
use replicator::capture::{Boundary, CaptureError, Capturer, NoBoundary};
use replicator::image::advice::Advice;
use replicator::image::pages::PageSet;
use replicator::image::{Source, State};
use replicator::sys::sched;
use replicator::sys::unix_diag::UnixDiag;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Killed(Child);

impl Killed {
    /// A shell that runs `script`, which must end with `exec sleep 600`; returns once it sleeps.
    fn shell(script: &str) -> Self {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let me = Self(child);
        let begin = Instant::now();
        let asleep = || {
            let file = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", me.pid()));
            file("comm").is_ok_and(|c| c == "sleep\n")
                && file("syscall").is_ok_and(|s| s.starts_with("230 "))
        };
        while !asleep() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it does not get to sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
        me
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn adopt(pid: i32) -> Capturer {
    Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopt")
}

/// Whether the process stands still for its tracer.
fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    stat[stat.rfind(')').expect("a name") + 2..].starts_with('t')
}

struct Recorder {
    pid: i32,
    seen: Vec<(&'static str, bool)>,
}

impl Boundary for Recorder {
    fn hold_input(&mut self) {
        self.seen.push(("hold", is_stopped(self.pid)));
    }
    fn seal(&mut self, epoch: Epoch) {
        assert_eq!(epoch, Epoch(7));
        self.seen.push(("seal", is_stopped(self.pid)));
    }
    fn release_input(&mut self) {
        self.seen.push(("release", is_stopped(self.pid)));
    }
}

#[test]
fn input_is_held_before_the_freeze_and_output_sealed_within_it() {
    let sleeper = Killed::shell("exec sleep 600");
    let mut capturer = adopt(sleeper.pid());
    capturer.prepare().expect("prepare");
    capturer.precopy().expect("pre-copy");
    let mut recorder = Recorder { pid: sleeper.pid(), seen: Vec::new() };
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.stop(Epoch(7), &mut recorder, &mut state, &mut pages).expect("stop");
    assert_eq!(recorder.seen, [("hold", false), ("seal", true), ("release", false)]);
    assert_eq!(state.processes.len(), 1);
    assert!(pages.pages() > 0, "the first checkpoint is full");
}

/// The error of the first checkpoint of a shell script.
fn refusal(script: &str) -> CaptureError {
    let child = Killed::shell(script);
    let mut capturer = adopt(child.pid());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut recorder = Recorder { pid: child.pid(), seen: Vec::new() };
    let refused = capturer
        .prepare()
        .and_then(|()| capturer.precopy().map(drop))
        .and_then(|()| capturer.stop(Epoch(7), &mut recorder, &mut state, &mut pages).map(drop))
        .expect_err("it cannot be protected");
    assert!(!is_stopped(child.pid()), "a refused container runs on");
    assert!(recorder.seen.iter().all(|(what, _)| *what != "seal"), "nothing was sealed");
    refused
}

fn assert_names(error: &CaptureError, object: &str, reason: &str) {
    match error {
        CaptureError::Unsupported { object: o, reason: r } => {
            assert!(o.contains(object) && r.contains(reason), "{o}: {r}");
        }
        other => panic!("not a refusal: {other}"),
    }
}

#[test]
fn a_deleted_file_with_other_names_is_refused_by_name() {
    let path = format!("/tmp/nilicon-stops-{}", std::process::id());
    let error = refusal(&format!("exec 9>{path}; ln {path} {path}.too; rm {path}; exec sleep 600"));
    let _ = std::fs::remove_file(format!("{path}.too"));
    assert_names(&error, "descriptor 9", &path);
}

#[test]
fn a_mount_that_the_container_made_is_refused_by_name() {
    let ready = std::env::temp_dir().join(format!("nilicon-stops-mnt-{}", std::process::id()));
    std::fs::create_dir_all(&ready).expect("a directory");
    let point = ready.display();
    let script = format!("read x; mount -t tmpfs none {point}; exec sleep 600");
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", &script]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = Killed(command.spawn().expect("unshare starts"));
    let begin = Instant::now();
    let comm = |pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    while comm(child.pid()) != "sh\n" {
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut capturer = adopt(child.pid());
    drop(child.0.stdin.take());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut epoch = 0;
    let error = loop {
        assert!(begin.elapsed() < Duration::from_secs(20), "it is not refused");
        epoch += 1;
        let taken = capturer
            .pump()
            .and_then(|()| capturer.prepare())
            .and_then(|()| capturer.precopy().map(drop))
            .and_then(|()| {
                let epoch = Epoch(epoch);
                capturer.stop(epoch, &mut NoBoundary, &mut state, &mut pages).map(drop)
            });
        match taken {
            Err(error @ CaptureError::Unsupported { .. }) => break error,
            Ok(()) | Err(CaptureError::Transient(_)) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_names(&error, &format!("mount at {point}"), "not protected");
    drop(capturer);
    drop(child);
    let _ = std::fs::remove_dir(&ready);
}

#[test]
fn a_deleted_working_directory_is_refused_by_name() {
    let path = format!("/tmp/nilicon-stops-dir-{}", std::process::id());
    let error = refusal(&format!("mkdir {path}; cd {path}; rmdir {path}; exec sleep 600"));
    assert_names(&error, "pid", "working directory");
}

#[test]
fn a_main_thread_that_has_ended_is_refused_by_name() {
    // The main thread ends by exit(2), which ends no other.
    let script = "import ctypes, threading, time\n\
                  threading.Thread(target=time.sleep, args=(600,)).start()\n\
                  ctypes.CDLL(None).syscall(60, 0)";
    let Ok(child) = Command::new("python3").args(["-c", script]).spawn() else {
        println!("skipped: python3 is not installed");
        return;
    };
    let child = Killed(child);
    let begin = Instant::now();
    let ended = || {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", child.pid()));
        text.is_ok_and(|t| t.contains(") Z"))
    };
    while !ended() {
        assert!(begin.elapsed() < Duration::from_secs(20), "its main thread does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = Capturer::adopt(child.pid(), UnixDiag::open().expect("diag")).err();
    assert_names(&error.expect("it cannot be protected"), "pid", "main thread has ended");
}

#[test]
fn a_main_thread_that_ends_later_is_refused_by_name() {
    let script = "import ctypes, os, threading, time\n\
                  threading.Thread(target=time.sleep, args=(600,)).start()\n\
                  print('ready', flush=True)\n\
                  os.read(0, 1)\n\
                  ctypes.CDLL(None).syscall(60, 0)";
    let child = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: python3 is not installed");
        return;
    };
    let mut line = [0; 6];
    child.stdout.as_mut().expect("piped").read_exact(&mut line).expect("ready");
    let mut child = Killed(child);
    let mut capturer = adopt(child.pid());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.prepare().expect("prepare");
    capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages).expect("stop");
    assert_eq!(state.processes[0].threads.len(), 2);
    child.0.stdin.as_mut().expect("piped").write_all(b"x").expect("told");
    let begin = Instant::now();
    let error = loop {
        capturer.pump().expect("pump");
        match capturer.stop(Epoch(2), &mut NoBoundary, &mut state, &mut pages) {
            Ok(_) => assert!(begin.elapsed() < Duration::from_secs(20), "it goes unnoticed"),
            Err(error) => break error,
        }
    };
    assert_names(&error, "pid", "main thread has ended");
    capturer.detach().expect("it can be let go");
}

/// A Python program that prints "ready" and reads a byte from its standard input; none without
/// Python.
fn python(script: &str) -> Option<Killed> {
    let child = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        println!("skipped: python3 is not installed");
        return None;
    };
    let mut line = [0; 6];
    child.stdout.as_mut().expect("piped").read_exact(&mut line).expect("ready");
    Some(Killed(child))
}

/// Lets the program go on and takes checkpoints until one is refused.
fn refused_later(child: &mut Killed, capturer: &mut Capturer) -> CaptureError {
    let (mut state, mut pages) = (State::default(), PageSet::default());
    child.0.stdin.as_mut().expect("piped").write_all(b"x").expect("told");
    let begin = Instant::now();
    for epoch in 2.. {
        let taken = capturer.pump().and_then(|()| {
            capturer.precopy()?;
            capturer.stop(Epoch(epoch), &mut NoBoundary, &mut state, &mut pages)
        });
        match taken {
            Ok(_) => assert!(begin.elapsed() < Duration::from_secs(60), "it goes unnoticed"),
            Err(CaptureError::Transient(_)) => {}
            Err(error) => return error,
        }
    }
    unreachable!()
}

/// Shared memory with a guard region (MADV_GUARD_INSTALL) that is made before or after `read`.
fn guarded(before: bool) -> Option<Killed> {
    let guard = "libc.madvise(ctypes.c_void_p(at + 8192), ctypes.c_size_t(4096), 102)";
    let (early, late) = if before { (guard, "") } else { ("", guard) };
    let script = format!(
        "import ctypes, mmap, os\n\
         libc = ctypes.CDLL(None)\n\
         m = mmap.mmap(-1, 32768)\n\
         m[8192] = 1\n\
         at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
         {early}\n\
         print('ready', flush=True)\n\
         os.read(0, 1)\n\
         {late}\n\
         os.read(0, 1)"
    );
    python(&script)
}

#[test]
fn a_guard_region_in_shared_memory_is_captured() {
    let Some(child) = guarded(true) else { return };
    let mut capturer = adopt(child.pid());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.prepare().expect("prepare");
    for epoch in 1..3 {
        capturer.stop(Epoch(epoch), &mut NoBoundary, &mut state, &mut pages).expect("stop");
        let process = &state.processes[0];
        let guards: Vec<_> = process.advice.iter().filter(|a| a.bits == Advice::GUARD).collect();
        let [guard] = guards[..] else { panic!("{guards:?}") };
        let around = process.mappings.iter().find(|m| (m.start..m.end).contains(&guard.start));
        assert!(matches!(around.expect("a mapping").source, Source::Object { shared: true, .. }));
        assert_eq!(guard.end - guard.start, 4096);
    }
}

#[test]
fn a_guard_region_that_shared_memory_gets_while_it_is_watched_is_refused_by_name() {
    let Some(mut child) = guarded(false) else { return };
    let mut capturer = adopt(child.pid());
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.prepare().expect("prepare");
    capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages).expect("stop");
    let error = refused_later(&mut child, &mut capturer);
    assert_names(&error, "memory at", "guard region");
    // Nothing watches the memory any more: the call comes to its end, and the program to its own.
    capturer.detach().expect("it can be let go");
    child.0.stdin.as_mut().expect("piped").write_all(b"x").expect("told");
    assert!(child.0.wait().expect("waited").success());
}

#[test]
fn the_end_of_the_container_is_told() {
    let mut sleeper = Killed::shell("exec sleep 600");
    let mut capturer = adopt(sleeper.pid());
    capturer.prepare().expect("prepare");
    sleeper.0.kill().expect("kill");
    let begin = Instant::now();
    loop {
        match capturer.pump() {
            Err(CaptureError::Ended) => break,
            other => other.expect("pump"),
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "its end goes unnoticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let error = capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages);
    assert!(matches!(error, Err(CaptureError::Ended)));
}

/// Waits until nice(1) has done what it is for.
fn wait_for_nice(program: &Killed, nice: i32) {
    let begin = Instant::now();
    while sched::nice_of(program.pid()).expect("it runs") != nice {
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not get there");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a shell does that always wants a processor.
const BUSY: &str = "while :; do :; done";

/// A program without input or output.
fn run(program: &str, args: &[&str]) -> Killed {
    let mut command = Command::new(program);
    let child = command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    Killed(child.spawn().expect("a program starts"))
}

/// How long a program takes to stand still, sorted; and it is as it was afterwards. None: the
/// test may not be real-time.
fn freezes_of(program: &Killed) -> Option<Vec<Duration>> {
    let pid = program.pid();
    let nice = sched::nice_of(pid).expect("it runs");
    let stops = move || {
        if let Err(error) = sched::set_fifo(20) {
            println!("skipped: {error}");
            return None;
        }
        let mut capturer = adopt(pid);
        let (mut state, mut pages) = (State::default(), PageSet::default());
        let mut freezes = Vec::new();
        let begin = Instant::now();
        while freezes.len() < 40 && begin.elapsed() < Duration::from_secs(60) {
            let stopped = capturer.pump().and_then(|()| capturer.prepare());
            let stopped = stopped
                .and_then(|()| capturer.precopy())
                .and_then(|_| capturer.stop(Epoch(7), &mut NoBoundary, &mut state, &mut pages));
            match stopped {
                Ok(times) => freezes.push(times.freeze),
                Err(CaptureError::Transient(_)) => continue,
                Err(error) => panic!("{error}"),
            }
            for thread in state.processes.iter().flat_map(|p| &p.threads) {
                let is = thread.settings.scheduling;
                assert_eq!((is.policy, is.nice), (0, nice), "tid {}", thread.tid);
            }
            // It does something until the next one.
            std::thread::sleep(Duration::from_millis(30));
        }
        capturer.detach().expect("let go");
        freezes.sort_unstable();
        println!("{} stops, freezes of {:?} to {:?}", freezes.len(), freezes[0], freezes.last());
        Some(freezes)
    };
    let freezes = std::thread::spawn(stops).join().expect("no panic")?;
    let used = || std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let before = used();
    let begin = Instant::now();
    while used() == before {
        assert!(begin.elapsed() < Duration::from_secs(60), "it does not go on");
        std::thread::sleep(Duration::from_millis(30));
    }
    let now = sched::attributes(pid).expect("it lives");
    assert_eq!((now.policy, now.nice), (0, nice));
    Some(freezes)
}

/// Others want the container's processor, and are far more important. Its threads, and what they make all the
/// time, go first on their way to a stop, and only there.
#[test]
fn a_stop_does_not_wait_for_a_thread_that_waits_for_a_processor() {
    let program = run("nice", &["-n", "5", "sh", "-c", "while :; do (:); done"]);
    wait_for_nice(&program, 5);
    let important = || run("nice", &["-n", "-20", "sh", "-c", BUSY]);
    let important: [Killed; 10] = std::array::from_fn(|_| important());
    let last = *sched::affinity(0).expect("its own").last().expect("at least one");
    for one in important.iter().chain([&program]) {
        sched::set_affinity(one.pid(), &[last]).expect("it may be there");
    }
    let Some(freezes) = freezes_of(&program) else { return };
    let median = freezes[freezes.len() / 2];
    // Otherwise it takes a turn of each of the others, of some milliseconds, and more than one.
    assert!(median < Duration::from_millis(10), "{median:?}");
}

/// A group of processes that goes with the test.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let begin = Instant::now();
        while std::fs::remove_dir(&self.0).is_err() && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(30));
        }
    }
}

/// A group that may use a twentieth of a processor, and of that as much as real-time.
fn poor_group() -> Option<Group> {
    let old = Path::new("/sys/fs/cgroup/cpu");
    let (root, share) = match old.join("cpu.cfs_quota_us").exists() {
        true => (old, ("cpu.cfs_quota_us", "5000")),
        false => (Path::new("/sys/fs/cgroup"), ("cpu.max", "5000 100000")),
    };
    let group = Group(root.join(format!("nilicon-stops-{}", std::process::id())));
    std::fs::create_dir(&group.0).ok()?;
    let write = |(name, value): (&str, &str)| std::fs::write(group.0.join(name), value);
    let real_time = ("cpu.rt_runtime_us", "5000");
    if group.0.join(real_time.0).exists() {
        write(real_time).ok()?;
    }
    write(share).ok()?;
    Some(group)
}

/// As above, where nobody else wants the processor.
#[test]
fn a_stop_does_not_wait_for_a_thread_whose_share_is_used_up() {
    let Some(group) = poor_group() else {
        println!("skipped: no groups with a share of the processor");
        return;
    };
    let program = run("sh", &["-c", BUSY]);
    std::fs::write(group.0.join("cgroup.procs"), program.pid().to_string()).expect("moved");
    let Some(freezes) = freezes_of(&program) else { return };
    let median = freezes[freezes.len() / 2];
    // Otherwise it takes the rest of a period of 100 ms.
    assert!(median < Duration::from_millis(10), "{median:?}");
}
