//! What it costs a busy Redis only that the pages it writes are noted: its memory is made write-protected once an epoch
//! and each first write after that is a fault. Nothing stands still, and nothing is copied or sent.
//! Whoever finds written pages by protecting them cannot cost less. As output waits for the end of its epoch, each request
//! in flight is answered once an epoch, which is the other limit: `at most` is what both of them leave of the server alone.
//!
//! ```text
//! cargo run --release -p replicator --example watch_cost -- [CONNECTIONS [IN_FLIGHT [MEGABYTES [ROUNDS]]]]
//! ```
//! The server has the first processor for itself; its clients, half of whose requests write, and the looks for written
//! pages have the last one. Each round measures the server left alone and epochs of each length, in turns.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use replicator::Epoch;
use replicator::capture::{Capturer, NoBoundary};
use replicator::image::pages::PageSet;
use replicator::image::{Source, State};
use replicator::sys::pagemap::{Buffer, Pagemap, Region, WRITTEN};
use replicator::sys::unix_diag::UnixDiag;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Of the epochs, in milliseconds; 0 leaves the server alone.
const LENGTHS: [u64; 7] = [0, 3, 5, 10, 30, 50, 100];
/// Before each measurement: whatever was protected by the one before is written meanwhile.
const SETTLE: Duration = Duration::from_millis(500);
const MEASURE: Duration = Duration::from_secs(2);
const VALUE: usize = 150;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pin(tid: i32, processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).expect("a processor");
    sched_setaffinity(Pid::from_raw(tid), &set).expect("pinned");
}

/// One that asks for so much at a time, and again once all of it is answered.
struct Client {
    stream: TcpStream,
    /// Ends of lines that are still to come: one for a SET, two for a GET.
    lines: usize,
}

/// Sends as many requests as a client has in flight.
fn ask(client: &mut Client, flight: usize, keys: usize, text: &mut Vec<u8>) {
    text.clear();
    for n in 0..flight {
        let key = fastrand::usize(..keys);
        let name = format!("k:{key}");
        let len = name.len();
        match n % 2 {
            0 => write!(text, "*2\r\n$3\r\nGET\r\n${len}\r\n{name}\r\n"),
            _ => {
                write!(text, "*3\r\n$3\r\nSET\r\n${len}\r\n{name}\r\n${VALUE}\r\n{key:0VALUE$}\r\n")
            }
        }
        .expect("in memory");
    }
    client.lines = flight / 2 + flight.div_ceil(2) * 2;
    client.stream.write_all(text).expect("sent");
}

/// Asks without a pause and counts what is answered.
fn load(
    clients: &mut [Client],
    flight: usize,
    keys: usize,
    answered: &AtomicU64,
    over: &AtomicU64,
) {
    let (mut text, mut room) = (Vec::new(), vec![0; 64 << 10]);
    clients.iter_mut().for_each(|c| ask(c, flight, keys, &mut text));
    while over.load(Ordering::Relaxed) == 0 {
        let ready: Vec<usize> = {
            let mut fds: Vec<PollFd<'_>> =
                clients.iter().map(|c| PollFd::new(c.stream.as_fd(), PollFlags::POLLIN)).collect();
            poll(&mut fds, PollTimeout::from(100u8)).expect("polled");
            fds.iter().enumerate().filter(|(_, f)| f.any() == Some(true)).map(|(i, _)| i).collect()
        };
        for i in ready {
            let client = &mut clients[i];
            let n = client.stream.read(&mut room).expect("answers");
            assert!(n > 0, "the server has ended");
            client.lines -= room[..n].iter().filter(|b| **b == b'\n').count();
            if client.lines == 0 {
                answered.fetch_add(flight as u64, Ordering::Relaxed);
                ask(client, flight, keys, &mut text);
            }
        }
    }
}

/// What one measurement found.
struct Found {
    requests: f64,
    /// Of the server's processor, for a request.
    server_us: f64,
    /// Pages a second.
    pages: f64,
    /// Part of a processor that looks for written pages take.
    looks: f64,
}

fn used(clock: ClockId) -> Duration {
    clock_gettime(clock).expect("a clock").into()
}

fn main() {
    let word = |n: usize, other: usize| {
        std::env::args().nth(n).map_or(other, |w| w.parse().expect("a number"))
    };
    let (count, flight, data, rounds) = (word(1, 50), word(2, 32), word(3, 100), word(4, 5));
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--save", "", "--enable-debug-command", "yes"])
        .stdout(Stdio::null())
        .spawn();
    let server = Killed(child.expect("redis-server is installed"));
    let pid = server.0.id() as i32;
    let connect = || loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let mut control = connect();
    // As the bench counts it.
    let keys = data * 1_000_000 / 250;
    write!(control, "DEBUG POPULATE {keys} k {VALUE}\r\n").expect("sent");
    let n = control.read(&mut [0; 64]).expect("an answer");
    assert!(n > 0, "populated");
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads") {
        let name = task.expect("a thread").file_name();
        pin(name.to_string_lossy().parse().expect("a number"), 0);
    }
    let last = std::thread::available_parallelism().map_or(1, |n| n.get()) - 1;
    pin(0, last);

    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopted");
    let (mut state, mut pages) = (State::default(), PageSet::default());
    capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages).expect("a stop");
    drop(pages);
    let ranges: Vec<(u64, u64)> = state.processes[0]
        .mappings
        .iter()
        .filter(|m| m.prot & nix::libc::PROT_WRITE as u8 != 0 && m.source == Source::Anonymous)
        .map(|m| (m.start, m.end))
        .collect();
    let pagemap = Pagemap::open(pid).expect("opened");
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid)).expect("a clock");

    let mut clients: Vec<Client> =
        (0..count).map(|_| Client { stream: connect(), lines: 0 }).collect();
    let (answered, over) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut all: Vec<Vec<Found>> = LENGTHS.iter().map(|_| Vec::new()).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| load(&mut clients, flight, keys, &answered, &over));
        let (mut buffer, mut found) = (Buffer::default(), Vec::new());
        for _ in 0..rounds {
            for (length, all) in LENGTHS.iter().zip(&mut all) {
                std::thread::sleep(SETTLE);
                let mut look = |found: &mut Vec<Region>| {
                    found.clear();
                    for (start, end) in &ranges {
                        pagemap
                            .take_written(*start, *end, WRITTEN, &mut buffer, found)
                            .expect("looked");
                    }
                };
                if *length > 0 {
                    look(&mut found);
                }
                let now = || (Instant::now(), answered.load(Ordering::Relaxed), used(clock));
                let begin = now();
                let (mut written, mut looks) = (0, Duration::ZERO);
                let mut next = begin.0;
                while begin.0.elapsed() < MEASURE {
                    next += Duration::from_millis(if *length == 0 { 100 } else { *length });
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                    if *length > 0 {
                        let before = used(ClockId::CLOCK_THREAD_CPUTIME_ID);
                        look(&mut found);
                        looks += used(ClockId::CLOCK_THREAD_CPUTIME_ID) - before;
                        written += found.iter().map(|r| (r.end - r.start) / 4096).sum::<u64>();
                    }
                }
                let end = now();
                let (time, requests) = ((end.0 - begin.0).as_secs_f64(), (end.1 - begin.1) as f64);
                all.push(Found {
                    requests: requests / time,
                    server_us: (end.2 - begin.2).as_secs_f64() * 1e6 / requests,
                    pages: written as f64 / time,
                    looks: looks.as_secs_f64() / time,
                });
            }
        }
        over.store(1, Ordering::Relaxed);
    });
    capturer.detach().expect("let go");

    println!(
        "{count} connections, {flight} requests in flight on each, {data} MB, {rounds} rounds: medians"
    );
    println!(
        "  {:<14}{:>11}{:>8}{:>14}{:>10}{:>8}{:>12}{:>8}",
        "epochs",
        "requests/s",
        "ratio",
        "server us/r",
        "pages/s",
        "looks",
        "in flight/s",
        "at most"
    );
    let median = |all: &[Found], of: fn(&Found) -> f64| {
        let mut all: Vec<f64> = all.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let plain = median(&all[0], |f| f.requests);
    for (length, all) in LENGTHS.iter().zip(&all) {
        let requests = median(all, |f| f.requests);
        let server = median(all, |f| f.server_us);
        if *length == 0 {
            println!("  {:<14}{requests:>11.0}{:>8.2}{server:>14.2}", "none", 1.0);
            continue;
        }
        let (pages, looks) = (median(all, |f| f.pages), median(all, |f| f.looks));
        // Each of them is answered once an epoch.
        let turns = (count * flight) as f64 * 1000.0 / *length as f64;
        println!(
            "  {:<14}{requests:>11.0}{:>8.2}{server:>14.2}{pages:>10.0}{looks:>8.2}{turns:>12.0}{:>8.2}",
            format!("of {length} ms"),
            requests / plain,
            requests.min(turns) / plain
        );
    }
}
