//! Memory rebuilt from deltas equals the real memory, under load, epoch after epoch; and so do
//! the mappings, however they change beside a round of pre-copy. And no wait of the program notices.

mod common;

use common::shadow::{Shadow, Snapshot};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};
use replicator::Epoch;
use replicator::capture::{Boundary, CaptureError, Capturer, NoBoundary, StopTimes};
use replicator::image::pages::PageSet;
use replicator::image::{Kind, State};
use replicator::sys::ptrace;
use replicator::sys::unix_diag::UnixDiag;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // Its threads are zombies until their tracer, this thread, has reaped them, and it is
        // one until then.
        while !matches!(self.0.try_wait(), Ok(Some(_)) | Err(_)) {
            if matches!(ptrace::next_event(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("address").port()
}

fn redis() -> Option<(Killed, u16)> {
    let port = free_port();
    let child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--save", "", "--appendonly", "no"])
        .args(["--bind", "127.0.0.1", "--enable-debug-command", "yes"])
        .stdout(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        println!("skipped: redis-server is not installed");
        return None;
    };
    let child = Killed(child);
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(20), "redis-server does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    Some((child, port))
}

/// A round of one kind or the other. The container need not be idle: that is a guess.
fn precopy(capturer: &mut Capturer, epoch: u64) {
    let copied = match epoch % 2 {
        0 => capturer.precopy_of_idle(),
        _ => capturer.precopy(),
    };
    copied.expect("pre-copy");
}

#[test]
fn memory_rebuilt_from_deltas_is_the_real_memory() {
    let Some((server, port)) = redis() else { return };
    let pid = server.0.id() as i32;
    let mut admin = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    admin.write_all(b"DEBUG POPULATE 200000 key 150\r\n").expect("populate");
    let mut answer = [0u8; 64];
    let n = admin.read(&mut answer).expect("answer");
    assert_eq!(&answer[..n], b"+OK\r\n");

    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopt redis");
    capturer.prepare().expect("prepare");
    let load = Command::new("redis-benchmark")
        .args(["-p", &port.to_string(), "-t", "set", "-r", "200000", "-d", "150"])
        .args(["-n", "1000000", "-c", "20", "-q"])
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-benchmark comes with redis-server");
    let load = Killed(load);

    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut shadow = Shadow::default();
    let mut snapshot = Snapshot { pid, ..Snapshot::default() };
    let mut stops: Vec<StopTimes> = Vec::new();
    let mut connections = 0;
    let begin = Instant::now();
    for epoch in 1..=150 {
        let wait = Instant::now();
        while wait.elapsed() < Duration::from_millis(8) {
            capturer.pump().expect("pump");
            std::thread::sleep(Duration::from_millis(1));
        }
        capturer.prepare().expect("prepare");
        precopy(&mut capturer, epoch);
        snapshot.wanted = epoch % 30 == 0;
        let times = match capturer.stop(Epoch(epoch), &mut snapshot, &mut state, &mut pages) {
            Err(CaptureError::Transient(_)) => continue,
            other => other.expect("stop"),
        };
        stops.push(times);
        shadow.apply(&state, &pages);
        connections = connections
            .max(state.descriptions.iter().filter(|d| matches!(d.kind, Kind::Tcp(_))).count());
        if snapshot.wanted {
            let (compared, wrong) = shadow.wrong(&state, &snapshot.memory);
            println!("epoch {epoch}: {compared} pages compared, {wrong} wrong");
            assert!(compared > 5_000, "only {compared} pages compared");
            assert_eq!(wrong, 0, "in epoch {epoch}");
        }
    }
    drop(load);
    assert!(stops.len() > 100, "{} of 150 stops succeeded", stops.len());
    assert!(connections > 20, "{connections} connections captured");
    assert_eq!(state.processes.len(), 1);
    assert!(state.processes[0].threads.len() >= 4, "redis has background threads");
    report(&stops, begin.elapsed());
    capturer.detach().expect("detach");
    admin.write_all(b"PING\r\n").expect("ping");
    let n = admin.read(&mut answer).expect("answer");
    assert_eq!(&answer[..n], b"+PONG\r\n", "redis goes on after the last epoch");
}

fn report(stops: &[StopTimes], took: Duration) {
    let median = |f: fn(&StopTimes) -> Duration| {
        let mut all: Vec<u128> = stops.iter().map(|s| f(s).as_micros()).collect();
        all.sort_unstable();
        (all[all.len() / 2], all[all.len() * 99 / 100])
    };
    println!("{} stops in {took:?}; median and p99 in us:", stops.len());
    println!(
        "  total {:?} freeze {:?} memory {:?} threads {:?} files {:?} thaw {:?}",
        median(|s| s.total),
        median(|s| s.freeze),
        median(|s| s.memory),
        median(|s| s.threads),
        median(|s| s.files),
        median(|s| s.thaw)
    );
    let pages: usize = stops.iter().map(|s| s.stop_pages).sum();
    println!("  pages in a stop, mean {}", pages / stops.len());
}

/// Set in the environment of the program whose mappings change.
const GROWS: &str = "NILICON_TEST_GROWS";

/// No test but the program of the next one: the heap of its second thread, as glibc manages it,
/// grows by one page of mprotect(2) at a time, with pauses.
#[test]
fn the_program_that_grows() {
    if std::env::var_os(GROWS).is_none() {
        return;
    }
    let grow = || {
        let mut random = 1u32;
        loop {
            let mut kept = Vec::new();
            for _ in 0..20_000 {
                kept.push(vec![1u8; 4000]);
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let pause = Duration::from_micros(u64::from(random >> 24));
                let begin = Instant::now();
                while begin.elapsed() < pause {}
            }
        }
    };
    std::thread::spawn(grow).join().expect("it does not end");
}

/// What /proc/PID/maps says while the container is frozen.
struct RealMaps(i32, Vec<(u64, u64, u8)>);

impl Boundary for RealMaps {
    fn hold_input(&mut self) {}
    fn release_input(&mut self) {}
    fn seal(&mut self, _: Epoch) {
        let text = std::fs::read_to_string(format!("/proc/{}/maps", self.0)).expect("maps");
        self.1 = merged(text.lines().filter(|l| !l.ends_with("[vsyscall]")).map(|line| {
            let mut words = line.split(' ');
            let (start, end) = words.next().unwrap().split_once('-').unwrap();
            let prot = words.next().unwrap().bytes().take(3).zip([b'r', b'w', b'x']);
            let prot = prot.enumerate().map(|(bit, (is, set))| u8::from(is == set) << bit).sum();
            (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap(), prot)
        }));
    }
}

/// Neighbours with the same protection as one.
fn merged(all: impl Iterator<Item = (u64, u64, u8)>) -> Vec<(u64, u64, u8)> {
    let mut out: Vec<(u64, u64, u8)> = Vec::new();
    for (start, end, prot) in all {
        match out.last_mut() {
            Some(last) if (last.1, last.2) == (start, prot) => last.1 = end,
            _ => out.push((start, end, prot)),
        }
    }
    out
}

#[test]
fn mappings_that_change_beside_a_round_are_captured_as_they_are() {
    let exe = std::env::current_exe().expect("a path");
    let child = Command::new(exe)
        .args(["--exact", "the_program_that_grows", "--test-threads=1"])
        .env(GROWS, "1")
        .stdout(Stdio::null())
        .spawn()
        .expect("this test starts");
    let child = Killed(child);
    let pid = child.0.id() as i32;
    // Its second thread is the test, its third one grows.
    let begin = Instant::now();
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    while threads() < 3 {
        assert!(begin.elapsed() < Duration::from_secs(20), "it does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopt");
    capturer.prepare().expect("prepare");
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut changes = 0;
    let mut before = Vec::new();
    for epoch in 1..=4_000 {
        capturer.pump().expect("pump");
        precopy(&mut capturer, epoch);
        let mut real = RealMaps(pid, Vec::new());
        match capturer.stop(Epoch(epoch), &mut real, &mut state, &mut pages) {
            Ok(_) => {}
            Err(CaptureError::Transient(_)) => continue,
            Err(error) => panic!("epoch {epoch}: {error}"),
        }
        let ours = state.processes[0].mappings.iter().map(|m| (m.start, m.end, m.prot));
        let ours = merged(ours);
        // The capture's own scratch area is no part of the image.
        let real: Vec<_> =
            real.1.into_iter().filter(|m| ours.contains(m) || m.0 >= 0x6_0000).collect();
        assert_eq!(ours, real, "epoch {epoch}");
        changes += usize::from(before != ours);
        before = ours;
    }
    assert!(changes > 500, "{changes} changes are too few to prove anything");
}

/// Set in the environment of the program that waits, to the file where it counts its time-outs.
const WAITS: &str = "NILICON_TEST_WAITS";
const PATIENCE_MS: u64 = 200;

/// No test but the program of the next one: it waits with epoll_wait(2) for nothing, again and
/// again.
#[test]
fn the_program_that_waits() {
    let Some(path) = std::env::var_os(WAITS) else { return };
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let mut events = [EpollEvent::empty()];
    let begin = Instant::now();
    for count in 1u64.. {
        let found = epoll.wait(&mut events, PATIENCE_MS as u16).expect("no error is shown to it");
        assert_eq!(found, 0);
        let early = count * PATIENCE_MS > begin.elapsed().as_millis() as u64 + 1;
        // Whole at every moment: it may be stopped in the middle.
        let text = if early { "early".to_owned() } else { count.to_string() };
        let mut next = path.clone();
        next.push(".next");
        std::fs::write(&next, text).expect("written");
        std::fs::rename(&next, &path).expect("renamed");
    }
}

#[test]
fn a_wait_of_epoll_ends_in_time_however_often_it_is_stopped() {
    let path = std::env::temp_dir().join(format!("nilicon-waits-{}", std::process::id()));
    let exe = std::env::current_exe().expect("a path");
    let child = Command::new(exe)
        .args(["--exact", "the_program_that_waits", "--test-threads=1"])
        .env(WAITS, &path)
        .stdout(Stdio::null())
        .spawn()
        .expect("this test starts");
    let child = Killed(child);
    let count = || std::fs::read_to_string(&path).unwrap_or_default();
    let begin = Instant::now();
    let patience = Duration::from_secs(20);
    while count().is_empty() {
        assert!(begin.elapsed() < patience, "it does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.0.id() as i32;
    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopt");
    capturer.prepare().expect("prepare");
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let before: u64 = count().parse().expect("not early");
    let (begin, mut epoch) = (Instant::now(), 0);
    while count().parse::<u64>().expect("not early") < before + 3 {
        assert!(begin.elapsed() < patience, "it waits for ever");
        epoch += 1;
        capturer.pump().expect("pump");
        match capturer.stop(Epoch(epoch), &mut NoBoundary, &mut state, &mut pages) {
            Ok(_) | Err(CaptureError::Transient(_)) => {}
            Err(error) => panic!("epoch {epoch}: {error}"),
        }
        // Far more often than it waits for.
        std::thread::sleep(Duration::from_millis(PATIENCE_MS / 10));
    }
    drop(child);
    let _ = std::fs::remove_file(&path);
}
