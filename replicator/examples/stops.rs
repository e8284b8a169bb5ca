//! Stops of a redis-server without a network between, for who works at the stop path: what each stage
//! and each kind of object takes.
//!
//! ```text
//! cargo run --release -p replicator --example stops -- [MEGABYTES [CONNECTIONS [STOPS [ACTIVE]]]] [noted]
//! ```
//! Before each stop every connection, or so many of them, sets one key, and the answers are left in the
//! sockets' queues.
//! With `noted`, stops look for written pages where the server has faulted only.
//! In turns, what was written is looked for before the stop by one processor or by two.
//! Pinned: the server to the first processor, the stops to the last.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use replicator::Epoch;
use replicator::capture::{CaptureError, Capturer, Glances, NoBoundary, StopTimes, warm_up};
use replicator::image::State;
use replicator::image::pages::PageSet;
use replicator::sys::{sched, unix_diag::UnixDiag};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pin(pid: i32, core: usize) {
    let mut set = CpuSet::new();
    set.set(core).expect("a processor");
    sched_setaffinity(Pid::from_raw(pid), &set).expect("pinned");
}

/// One reply that is a line.
fn line(stream: &mut TcpStream) {
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).expect("an answer");
    }
}

fn main() {
    let (words, numbers): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|a| a == "noted");
    let mut numbers = numbers.iter().map(|a| a.parse::<usize>().expect("a number"));
    let (data, count, stops) = (
        numbers.next().unwrap_or(100),
        numbers.next().unwrap_or(50),
        numbers.next().unwrap_or(500),
    );
    let active = numbers.next().unwrap_or(count);
    let port = 20_000 + (std::process::id() % 20_000) as u16;
    let child = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--save", "", "--enable-debug-command", "yes"])
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed");
    let server = Killed(child);
    let pid = server.0.id() as i32;
    let mut control = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let keys = data * 1_000_000 / 250;
    write!(control, "DEBUG POPULATE {keys} k 150\r\n").expect("sent");
    line(&mut control);
    let connect = |_| {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        stream.set_nodelay(true).expect("set");
        stream
    };
    let mut clients: Vec<TcpStream> = (0..count).map(connect).collect();
    write!(control, "PING\r\n").expect("sent");
    line(&mut control);
    let last = std::thread::available_parallelism().map_or(1, |n| n.get()) - 1;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads") {
        let name = task.expect("a thread").file_name();
        pin(name.to_string_lossy().parse().expect("a number"), 0);
    }
    pin(0, last);
    warm_up();
    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopted");
    if !words.is_empty() {
        capturer.set_glances(Glances::Noted);
    }
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let mut all: [Vec<(Duration, StopTimes)>; 2] = Default::default();
    let mut key = 7;
    for round in 0..stops + 20 {
        for client in clients.iter_mut().take(active) {
            key = key * 31 % keys.max(1) + 1;
            write!(client, "SET k:{key} {round:0150}\r\n").expect("sent");
        }
        for client in clients.iter_mut().take(active) {
            // Without taking it: the answers stay.
            while client.peek(&mut [0; 5]).is_ok_and(|n| n < 5) {}
        }
        let begin = Instant::now();
        let done = loop {
            let _ = sched::set_fifo(20);
            capturer.pump().expect("it runs");
            let ahead = match round % 2 {
                0 => capturer.prepare().and_then(|()| capturer.precopy().map(drop)),
                _ => capturer.prepare().and_then(|()| capturer.precopy_of_idle().map(drop)),
            };
            let done = ahead.and_then(|()| {
                let before = begin.elapsed();
                let epoch = Epoch(round as u64 + 1);
                let times = capturer.stop(epoch, &mut NoBoundary, &mut state, &mut pages)?;
                Ok((before, times))
            });
            let _ = sched::set_ordinary();
            match done {
                Err(CaptureError::Transient(_)) => std::thread::sleep(Duration::from_millis(1)),
                other => break other.expect("a stop"),
            }
        };
        if round >= 20 {
            all[round % 2].push(done);
        }
        for client in clients.iter_mut().take(active) {
            line(client);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    capturer.detach().expect("let go");
    println!(
        "{data} MB, {count} connections, {active} of them active, {stops} stops: us at 50 % and 99 %"
    );
    for (how, all) in ["one processor before the stop:", "two processors:"].iter().zip(&all) {
        println!("{how}");
        table(all);
    }
}

fn table(all: &[(Duration, StopTimes)]) {
    let tell = |name: &str, of: &dyn Fn(&(Duration, StopTimes)) -> Duration| {
        let mut values: Vec<Duration> = all.iter().map(of).collect();
        values.sort_unstable();
        let at =
            |part: usize| values[(values.len() * part / 100).min(values.len() - 1)].as_micros();
        println!("  {name:<12} {:>7} {:>7}", at(50), at(99));
    };
    tell("before", &|x| x.0);
    tell("both", &|x| x.0 + x.1.total);
    tell("stop", &|x| x.1.total);
    tell("freeze", &|x| x.1.freeze);
    tell("memory", &|x| x.1.memory);
    tell("threads", &|x| x.1.threads);
    tell("files", &|x| x.1.files);
    tell("thaw", &|x| x.1.thaw);
    tell("confirm", &|x| x.1.confirm);
    tell("k:memory", &|x| x.1.kinds.memory);
    tell("k:objects", &|x| x.1.kinds.objects);
    tell("k:threads", &|x| x.1.kinds.threads);
    tell("k:timers", &|x| x.1.kinds.timers);
    tell("k:descriptors", &|x| x.1.kinds.descriptors);
    tell("k:in flight", &|x| x.1.kinds.in_flight);
    let mut pages: Vec<usize> = all.iter().map(|x| x.1.pages).collect();
    pages.sort_unstable();
    println!("  pages        {:>7}", pages[pages.len() / 2]);
    let noted = all.iter().filter(|x| x.1.noted > 0 && x.1.doubted == 0).count();
    println!("  noted        {noted:>7} of {}", all.len());
}
