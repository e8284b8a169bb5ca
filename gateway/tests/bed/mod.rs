//! Two network namespaces with a gate between them: a container's and a client's.
//!
//! The namespaces have no name; they end with the threads, devices and sockets in them, whatever
//! becomes of the test.

use gateway::frames::Mac;
use gateway::frames::gate::{Gate, GateConfig};
use replicator::ack::AckLedger;
use replicator::sys::tap::{LinkSetup, Tap, TapOptions};
use replicator::{Epoch, Generation};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

pub const CONTAINER_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
pub const CLIENT_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);
pub const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Longest wait for what must happen.
pub const LONG: Duration = Duration::from_secs(30);
/// Wait for what must not happen.
pub const SHORT: Duration = Duration::from_millis(300);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it.
pub struct Namespace {
    jobs: mpsc::Sender<Job>,
}

impl Namespace {
    pub fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            queue.into_iter().for_each(|job| job());
        });
        Self { jobs }
    }

    /// Runs `f` in the namespace. Sockets that it makes stay in there.
    pub fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        let (tx, rx) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(tx.send(f())))).unwrap();
        rx.recv().expect("the job in the namespace panicked")
    }

    fn tap(&self, name: &'static str, mac: Mac, address: Ipv4Addr) -> Tap {
        self.run(move || {
            let tap = Tap::create(name, TapOptions::default()).unwrap();
            tap.configure(LinkSetup {
                mac: Some(mac.0),
                up: Some(true),
                txqueuelen: Some(8192),
                mtu: None,
            })
            .unwrap();
            tap.set_ipv4(address, 24).unwrap();
            tap
        })
    }

    /// Frames that an interface of the namespace has received.
    pub fn received(&self, device: &'static str) -> u64 {
        self.run(move || {
            let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = table.lines().find_map(|l| l.trim().strip_prefix(device)).unwrap();
            line.trim_start_matches(':').split_whitespace().nth(1).unwrap().parse().unwrap()
        })
    }
}

pub struct Bed {
    pub gate: Gate,
    pub container: Namespace,
    pub client: Namespace,
}

impl Bed {
    pub fn new(config: GateConfig) -> Self {
        let (container, client) = (Namespace::new(), Namespace::new());
        let inner = container.tap("eth0", CONTAINER_MAC, CONTAINER);
        let outer = client.tap("out0", CLIENT_MAC, CLIENT);
        let config = GateConfig { mac: Some(CONTAINER_MAC), ..config };
        Self { gate: Gate::start(inner, outer, config).unwrap(), container, client }
    }

    pub fn plugged(config: GateConfig) -> Self {
        let bed = Self::new(config);
        bed.gate.plug().unwrap();
        bed
    }

    pub fn listen(&self) -> (std::net::TcpListener, SocketAddr) {
        let l = self.container.run(|| std::net::TcpListener::bind((CONTAINER, 0)).unwrap());
        let at = l.local_addr().unwrap();
        (l, at)
    }

    /// A connection between the two: (in the container, at the client).
    pub fn connection(&self) -> (std::net::TcpStream, std::net::TcpStream) {
        let (listener, at) = self.listen();
        let client = self.client.run(move || std::net::TcpStream::connect_timeout(&at, LONG));
        let client = client.expect("connect through the gate");
        let (server, _) = listener.accept().unwrap();
        for s in [&server, &client] {
            s.set_nodelay(true).unwrap();
            s.set_read_timeout(Some(LONG)).unwrap();
            s.set_write_timeout(Some(LONG)).unwrap();
        }
        (server, client)
    }
}

/// Plays primary and backup: seals an epoch every 5 ms and releases it 1 ms later.
pub fn commit_while<R>(gate: &Gate, f: impl FnOnce() -> R) -> R {
    let stop = AtomicBool::new(false);
    gate.protect(Generation::FIRST, Epoch::NONE);
    std::thread::scope(|scope| {
        let committer = scope.spawn(|| {
            let mut ledger = AckLedger::new(Generation::FIRST);
            let mut epoch = Epoch::NONE;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
                epoch = epoch.next();
                let hold = gate.hold_input();
                gate.seal(epoch).unwrap();
                drop(hold);
                ledger.sent(epoch, epoch.0);
                std::thread::sleep(Duration::from_millis(1));
                let proof = ledger.acknowledge(Generation::FIRST, epoch, epoch.0).unwrap();
                gate.release(proof).unwrap();
            }
        });
        let stop_also_on_panic = StopOnDrop(&stop);
        let result = f();
        drop(stop_also_on_panic);
        committer.join().unwrap();
        result
    })
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads until `count` bytes have come and checks that byte i is i modulo 251.
pub fn expect_pattern(stream: &mut std::net::TcpStream, count: usize) {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < count {
        let n = std::io::Read::read(stream, &mut buffer).unwrap();
        assert!(n > 0, "the stream ended after {at} of {count} bytes");
        for (i, b) in buffer[..n].iter().enumerate() {
            assert_eq!(usize::from(*b), (at + i) % 251, "byte {}", at + i);
        }
        at += n;
    }
    assert_eq!(at, count);
}

/// Bytes that [`expect_pattern`] expects.
pub fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i % 251) as u8).collect()
}

/// Sends one way and checks at the other end.
pub fn bulk(
    mut from: std::net::TcpStream,
    mut to: std::net::TcpStream,
    count: usize,
) -> JoinHandle<()> {
    let sender = std::thread::spawn(move || {
        std::io::Write::write_all(&mut from, &pattern(count)).unwrap();
    });
    std::thread::spawn(move || {
        expect_pattern(&mut to, count);
        sender.join().unwrap();
    })
}

/// Whether a descriptor is readable within a time.
pub fn readable(fd: impl AsFd, within: Duration) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(within).unwrap()).unwrap() == 1
}
