//! A gate that frames go by in the kernel, between two real network stacks.
#![allow(missing_docs, unreachable_pub)]

mod bed;

use bed::*;
use gateway::frames::commit::Unprotected;
use gateway::frames::gate::GateConfig;
use netns_tools::links::Network;
use netns_tools::namespace::Namespace as Kernels;
use replicator::ack::AckLedger;
use replicator::bypass::{Bypass, Side};
use replicator::{Epoch, Generation};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const BULK: usize = 64 << 20;
const INSIDE: &str = "inside";
const OUTSIDE: &str = "outside";

/// The kernel's name for a namespace of the bed.
fn kernels(namespace: &Namespace) -> Kernels {
    Kernels::of_process(namespace.run(|| nix::unistd::gettid().as_raw())).unwrap()
}

/// Says that it was removed.
struct Cable(Kernels);

impl Drop for Cable {
    fn drop(&mut self) {
        Network::open(&self.0).unwrap().delete(OUTSIDE).unwrap();
    }
}

/// Lays a cable between the bed's namespaces and opens a bypass over it. Whether it is open.
fn open(bed: &Bed) -> bool {
    let (inside, outside) = (kernels(&bed.container), kernels(&bed.client));
    let (inner, outer) = (Network::open(&inside).unwrap(), Network::open(&outside).unwrap());
    outer.add_veth(OUTSIDE, &inside, INSIDE).unwrap();
    inner.set_up(INSIDE).unwrap();
    outer.set_up(OUTSIDE).unwrap();
    let side = |network: &Network, device: &str, cable: &str| Side {
        device: network.get(device).unwrap().index,
        cable: network.get(cable).unwrap().index,
    };
    let (inner, outer) = (side(&inner, "eth0", INSIDE), side(&outer, "out0", OUTSIDE));
    let mut bypass = Bypass::new().unwrap();
    outside.enter(|| bypass.tie_outer(outer)).unwrap().unwrap();
    inside.enter(|| bypass.tie_inner(inner)).unwrap().unwrap();
    bed.gate.open_bypass(bypass, Cable(outside))
}

fn bed() -> Bed {
    let bed = Bed::plugged(GateConfig::default());
    assert!(open(&bed));
    bed
}

/// Asks and answers; the server answers first, so that the connection is known afterwards.
fn talk(server: &mut TcpStream, client: &mut TcpStream, rounds: u32) {
    for i in 0..rounds {
        let mut got = [0; 4];
        client.write_all(&i.to_be_bytes()).unwrap();
        server.read_exact(&mut got).unwrap();
        server.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(u32::from_be_bytes(got), i);
    }
}

/// Frames through the gate and by it, both ways.
fn frames(bed: &Bed) -> [u64; 2] {
    let c = bed.gate.counters();
    [c.passed_frames + c.in_frames, c.bypassed_out_frames + c.bypassed_in_frames]
}

fn has_cable(bed: &Bed) -> bool {
    Network::open(&kernels(&bed.client)).unwrap().find(OUTSIDE).unwrap().is_some()
}

#[test]
fn what_was_accepted_goes_by_the_gate_both_ways() {
    let bed = bed();
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 3);
    let before = frames(&bed);
    talk(&mut server, &mut client, 500);
    bulk(server.try_clone().unwrap(), client.try_clone().unwrap(), BULK).join().unwrap();
    bulk(client, server, BULK).join().unwrap();
    let after = frames(&bed);
    assert!(after[1] - before[1] > 1000, "{before:?} {after:?}");
    // The gate sees what ends the connection, and nothing else of it.
    assert!(after[0] - before[0] < 10, "{before:?} {after:?}");
}

#[test]
fn of_ipv6_as_well() {
    let bed = Bed::plugged(GateConfig::default());
    for (namespace, device, address) in
        [(&bed.container, "eth0", "fd00::1/64"), (&bed.client, "out0", "fd00::2/64")]
    {
        let kernels = kernels(namespace);
        kernels.set_sysctl("net.ipv6.conf.all.accept_dad", "0").unwrap();
        kernels.set_sysctl(&format!("net.ipv6.conf.{device}.accept_dad"), "0").unwrap();
        let network = Network::open(&kernels).unwrap();
        network.add_address(device, address.parse().unwrap()).unwrap();
    }
    assert!(open(&bed));
    let listener = bed.container.run(|| TcpListener::bind("[fd00::1]:0")).unwrap();
    let at = listener.local_addr().unwrap();
    let mut client =
        bed.client.run(move || TcpStream::connect_timeout(&at, LONG)).expect("through the gate");
    let (mut server, _) = listener.accept().unwrap();
    talk(&mut server, &mut client, 3);
    let before = frames(&bed);
    talk(&mut server, &mut client, 100);
    let after = frames(&bed);
    assert!(after[1] - before[1] >= 200, "{before:?} {after:?}");
}

/// A connection from a port that has just been used.
fn again(from: SocketAddr, to: SocketAddr) -> nix::Result<TcpStream> {
    use nix::sys::socket::*;
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { unreachable!() };
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(from))?;
    connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(to))?;
    Ok(fd.into())
}

#[test]
fn the_gate_follows_how_connections_begin_and_end() {
    let bed = bed();
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 10);
    // Nobody has accepted this one, and what it has said is known.
    let (listener, at) = bed.listen();
    let mut early = bed.client.run(move || TcpStream::connect_timeout(&at, LONG)).unwrap();
    early.write_all(b"hello").unwrap();
    let until = Instant::now() + LONG;
    let young = |port: u16| {
        let remote = |y: &replicator::image::net::Young| y.remote.port() == port;
        bed.gate.young().into_iter().find(remote)
    };
    let port = early.local_addr().unwrap().port();
    while young(port).is_none_or(|y| y.received != b"hello") && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(young(port).expect("a young connection").received, b"hello");
    drop(listener);

    // One whose client has closed its side is not taken for a new one.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    let by = frames(&bed)[1];
    for _ in 0..5 {
        server.write_all(b"more").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
    }
    assert_eq!(frames(&bed)[1], by);

    // One that goes by the gate ends, and another begins between the same two ends.
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 10);
    let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    drop(server);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    let listener = bed.container.run(move || TcpListener::bind(to)).unwrap();
    let mut again = bed.client.run(move || again(from, to)).expect("the same two ends once more");
    again.write_all(b"early").unwrap();
    let until = Instant::now() + LONG;
    while young(from.port()).is_none_or(|y| y.received != b"early") && Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(young(from.port()).expect("young again").received, b"early");
    drop(listener);
}

#[test]
fn nothing_goes_by_a_gate_that_protects() {
    let bed = bed();
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 10);
    // Somebody talks all the time.
    let (mut busy, busy_client) = bed.connection();
    let reader = std::thread::spawn(move || {
        let mut client = busy_client;
        std::io::copy(&mut client, &mut std::io::sink())
    });
    let writer = std::thread::spawn(move || while busy.write_all(&[7; 1000]).is_ok() {});
    for round in 0..5 {
        let seen_by = frames(&bed)[1];
        let until = Instant::now() + LONG;
        while frames(&bed)[1] < seen_by + 50 && Instant::now() < until {
            std::thread::yield_now();
        }
        assert!(frames(&bed)[1] >= seen_by + 50, "round {round}");
        bed.gate.protect(Generation::FIRST, Epoch::NONE);
        let before = (bed.client.received("out0"), frames(&bed)[1]);
        server.write_all(b"held").unwrap();
        assert!(readable(bed.gate.output_waits(), LONG));
        std::thread::sleep(SHORT);
        assert_eq!((bed.client.received("out0"), frames(&bed)[1]), before, "round {round}");
        assert!(!bed.gate.has_bypass() && !has_cable(&bed));
        assert!(!open(&bed), "a protected gate has none");

        bed.gate.seal(Epoch(1)).unwrap();
        let mut ledger = AckLedger::new(Generation::FIRST);
        ledger.sent(Epoch(1), 1);
        let proof = ledger.acknowledge(Generation::FIRST, Epoch(1), 1).unwrap();
        assert!(bed.gate.release(proof).unwrap() > 0);
        bed.gate.pass_through(Unprotected::GrantedByArbiter);
        let mut got = [0; 4];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"held");
        assert!(open(&bed));
        talk(&mut server, &mut client, 3);
    }
    drop(bed);
    // Their network is gone.
    drop((writer, reader));
}

#[test]
fn a_stream_is_whole_wherever_it_goes() {
    let bed = bed();
    for _ in 0..5 {
        let (server, client) = bed.connection();
        let back = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let streams = [bulk(server, client, BULK), bulk(back.0, back.1, BULK)];
        std::thread::sleep(Duration::from_millis(2));
        commit_while(&bed.gate, || std::thread::sleep(Duration::from_millis(30)));
        bed.gate.pass_through(Unprotected::GrantedByArbiter);
        assert!(open(&bed));
        streams.into_iter().for_each(|stream| stream.join().unwrap());
    }
}

#[test]
fn input_that_is_held_stays_outside_at_once() {
    let bed = bed();
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 3);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            client.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Held, it is full soon.
                let _ = client.write(&[5; 200]);
            }
        });
        for round in 0..10 {
            assert!(bed.gate.has_bypass());
            let mut got = vec![0; 1000];
            server.read_exact(&mut got).unwrap();
            let hold = bed.gate.hold_input();
            let before = bed.container.received("eth0");
            let cable = has_cable(&bed);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(bed.container.received("eth0"), before, "round {round}");
            assert!(!cable && !bed.gate.has_bypass());
            drop(hold);
            assert!(open(&bed));
            server.write_all(b"x").unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        // What it waits for has room.
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        while !writer.is_finished() {
            match server.read(&mut [0; 1 << 16]) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
        }
    });
}

#[test]
fn an_unplugged_container_says_nothing_by_it() {
    let bed = bed();
    let (mut server, mut client) = bed.connection();
    talk(&mut server, &mut client, 10);
    bed.gate.unplug();
    let before = bed.client.received("out0");
    server.write_all(b"into the void").unwrap();
    std::thread::sleep(SHORT);
    assert_eq!(bed.client.received("out0"), before);
    assert!(!open(&bed), "an unplugged gate has none");
    bed.gate.plug().unwrap();
    let mut got = [0; 13];
    client.read_exact(&mut got).expect("the container's TCP sends it again");
    assert_eq!(&got, b"into the void");
}

#[test]
fn a_gate_has_one_bypass_and_removes_it() {
    let bed = bed();
    let (inside, outside) = (kernels(&bed.container), kernels(&bed.client));
    let outer = Network::open(&outside).unwrap();
    outer.add_veth("second", &inside, "second").unwrap();
    assert!(!bed.gate.open_bypass(Bypass::new().unwrap(), ()), "it has one");
    assert!(bed.gate.has_bypass() && has_cable(&bed));
    let Bed { gate, .. } = bed;
    drop(gate);
    assert!(outer.find(OUTSIDE).unwrap().is_none());
}
