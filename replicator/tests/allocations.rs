//! What a stop allocates while the container stands still (decisions 92 and 94): nothing for what there is, however much that
//! is, and nothing for what has changed, unless it is more than before.

mod common;

use common::{CONTAINER, Lan, Original, Scratch};
use replicator::Epoch;
use replicator::capture::{Boundary, CaptureError, Capturer};
use replicator::image::pages::PageSet;
use replicator::image::{Kind, State};
use replicator::sys::unix_diag::UnixDiag;
use stats_alloc::{INSTRUMENTED_SYSTEM, Stats, StatsAlloc};
use std::alloc::System;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Counts from the moment input is held until output is sealed.
#[derive(Default)]
struct Counter {
    begin: Stats,
    allocations: usize,
    bytes: usize,
}

impl Boundary for Counter {
    fn hold_input(&mut self) {
        self.begin = ALLOCATOR.stats();
    }

    fn seal(&mut self, _: Epoch) {
        let now = ALLOCATOR.stats();
        let since = now - self.begin;
        self.allocations = since.allocations + since.reallocations;
        self.bytes = since.bytes_allocated;
    }

    fn release_input(&mut self) {}
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program that has so many megabytes, mappings of their own and pipes, and writes into two pages now and then.
fn script(megabytes: usize, mappings: usize, pipes: usize) -> String {
    format!(
        "import mmap, os, time\n\
         data = bytearray(b'x') * ({megabytes} << 20)\n\
         # Neighbours that may not be joined.\n\
         maps = [mmap.mmap(-1, 4096, prot=1 + i % 2 * 2, flags=34) for i in range({mappings})]\n\
         pipes = [os.pipe() for _ in range({pipes})]\n\
         print('ready', flush=True)\n\
         while True:\n    \
             data[5] = data[9000] = data[5] ^ 1\n    \
             time.sleep(0.002)\n"
    )
}

fn program(megabytes: usize, mappings: usize, pipes: usize) -> Killed {
    let script = script(megabytes, mappings, pipes);
    let mut child = Command::new("python3")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let mut line = String::new();
    let out = child.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("a word");
    assert_eq!(line, "ready\n");
    Killed(child)
}

fn adopt(program: &Killed) -> Capturer {
    let diag = UnixDiag::open().expect("diag");
    Capturer::adopt(program.0.id() as i32, diag).expect("adopted")
}

/// Allocations and bytes of the first stop, and of the median one once stops have settled. `between` is called before each.
fn measure(capturer: &mut Capturer, mut between: impl FnMut()) -> [(usize, usize); 2] {
    let (mut state, mut pages) = (State::default(), PageSet::default());
    let (mut first, mut all) = (None, Vec::new());
    for epoch in 1..=80 {
        between();
        let mut counter = Counter::default();
        let mut stop = || {
            capturer.pump()?;
            capturer.prepare()?;
            capturer.precopy()?;
            capturer.stop(Epoch(epoch), &mut counter, &mut state, &mut pages)
        };
        match stop() {
            Ok(_) => {
                let counted = (counter.allocations, counter.bytes);
                first.get_or_insert(counted);
                all.extend((epoch > 20).then_some(counted));
            }
            Err(CaptureError::Transient(_)) => {}
            Err(error) => panic!("no stop: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(all.len() > 20, "{} stops", all.len());
    all.sort_unstable();
    [first.expect("a stop"), all[all.len() / 2]]
}

/// One test, as others would be counted along.
#[test]
fn a_stop_allocates_for_what_has_changed_and_not_for_what_there_is() {
    for (name, program) in [("small", program(1, 0, 0)), ("large", program(200, 400, 200))] {
        let mut capturer = adopt(&program);
        let [first, later] = measure(&mut capturer, || {});
        capturer.detach().expect("let go");
        println!(
            "a {name} program: {first:?} allocations and bytes in its first stop, {later:?} later"
        );
        assert!(first.0 > 0, "something is counted");
        assert_eq!(later, (0, 0), "a {name} program");
    }

    let dir = Scratch::new("allocations");
    let mut original = Original::start(&dir, &["/usr/bin/python3", "-c", &script(1, 10, 10)]);
    let console = original.console();
    let said = || std::fs::read_to_string(&console).is_ok_and(|said| said.contains("ready"));
    original.pump_until("it is ready", said);
    let [first, later] = measure(&mut original.capturer, || {});
    println!("a container: {first:?}, {later:?}");
    assert_eq!(later, (0, 0), "a container");

    of_many_connections();
    of_queues_that_grow();
}

/// Writes to each of so many connections all the time.
fn talker(count: usize, port: u16) -> String {
    format!(
        "import socket, time\n\
         server = socket.create_server(('0.0.0.0', {port}))\n\
         print('ready', flush=True)\n\
         all = [server.accept()[0] for _ in range({count})]\n\
         for one in all: one.setblocking(False)\n\
         print('all', flush=True)\n\
         while True:\n    \
             for one in all:\n        \
                 one.send(b'0123456789')\n    \
             time.sleep(0.0005)\n"
    )
}

/// Nobody acknowledges anything, and each stop finds more than the look before it.
fn of_queues_that_grow() {
    const COUNT: usize = 20;
    let dir = Scratch::new("queues");
    let lan = Lan::new("queues");
    let command = ["/usr/bin/python3", "-c", &talker(COUNT, 7000)];
    let mut original = Original::start_with(&dir, &command, |pid| lan.connect(pid, "cable"));
    lan.plug("cable");
    let console = original.console();
    let said = |word| std::fs::read_to_string(&console).is_ok_and(|said| said.contains(word));
    original.pump_until("it listens", || said("ready"));
    let dial = |_| TcpStream::connect((CONTAINER, 7000)).expect("connected");
    let dial = || (0..COUNT).map(dial).collect::<Vec<_>>();
    let _clients = lan.namespace.enter(dial).expect("entered");
    original.pump_until("it has them all", || said("all"));
    lan.unplug("cable");
    let [first, later] = measure(&mut original.capturer, || {});
    println!("{COUNT} queues that grow: {first:?}, {later:?}");
    original.checkpoint();
    let queues = original.state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Tcp(connection) => Some(connection.send_queue.len()),
        _ => None,
    });
    let queues: Vec<usize> = queues.collect();
    assert!(queues.len() == COUNT && queues.iter().all(|len| *len > 500), "{queues:?}");
    assert_eq!(later, (0, 0), "queues that grow");
}

/// What is in a queue is other bytes each time, and travels; now and then there are more than before.
fn of_many_connections() {
    const COUNT: usize = 50;
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("one").port();
    let server = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--save", ""])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    let Ok(server) = server.map(Killed) else {
        return println!("skipped: redis-server is not installed");
    };
    let connect = |_| loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let mut clients: Vec<TcpStream> = (0..COUNT).map(connect).collect();
    let mut asked = false;
    let mut capturer = adopt(&server);
    let [first, later] = measure(&mut capturer, || {
        for client in &mut clients {
            if asked {
                let mut answer = [0; 64];
                let n = client.read(&mut answer).expect("an answer");
                assert_eq!(answer[n - 1], b'\n');
            }
            client.write_all(b"INCR a\r\n").expect("asked");
        }
        asked = true;
    });
    capturer.detach().expect("let go");
    println!("redis-server with {COUNT} connections that ask all the time: {first:?}, {later:?}");
    assert!(later.0 <= COUNT / 5, "{later:?}");
}
