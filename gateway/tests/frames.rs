//! The gate between two real network stacks.
#![allow(missing_docs, unreachable_pub)]

mod bed;

use bed::*;
use gateway::frames::HEADER;
use gateway::frames::announce::Announcer;
use gateway::frames::commit::Unprotected;
use gateway::frames::gate::{GateConfig, GateError};
use gateway::frames::input_log::{self, LoggedFrame};
use gateway::frames::resume::{Answer, Connection, LocalNet, PeerProbe, PeerSegment};
use replicator::ack::{AckLedger, CommitProof};
use replicator::{Epoch, Generation};
use smoltcp::wire::{EthernetFrame, EthernetProtocol, Ipv4Packet, TcpPacket};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const BULK: usize = 64 << 20;
const G: Generation = Generation::FIRST;

fn proof(ledger: &mut AckLedger, epoch: u64) -> CommitProof {
    ledger.sent(Epoch(epoch), epoch);
    ledger.acknowledge(G, Epoch(epoch), epoch).unwrap()
}

fn ping_pong(server: &mut TcpStream, client: &mut TcpStream, rounds: usize) {
    for i in 0..rounds {
        let mut got = [0; 4];
        client.write_all(&(i as u32).to_be_bytes()).unwrap();
        server.read_exact(&mut got).unwrap();
        server.write_all(&got).unwrap();
        client.read_exact(&mut got).unwrap();
        assert_eq!(u32::from_be_bytes(got), i as u32);
    }
}

#[test]
fn unprotected_traffic_passes_both_ways_in_large_frames() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    ping_pong(&mut server, &mut client, 500);
    let before = bed.gate.counters();
    bulk(server.try_clone().unwrap(), client.try_clone().unwrap(), BULK).join().unwrap();
    let middle = bed.gate.counters();
    bulk(client, server, BULK).join().unwrap();
    let after = bed.gate.counters();
    let frames = [middle.passed_frames - before.passed_frames, after.in_frames - middle.in_frames];
    let of_one_mtu = (BULK / 1448) as u64;
    assert!(frames.iter().all(|n| *n < of_one_mtu / 4), "{frames:?} against {of_one_mtu}");
    assert_eq!((after.commit.dropped_frames, after.in_dropped_frames), (0, 0));
}

#[test]
fn committed_traffic_passes_both_ways() {
    let bed = Bed::plugged(GateConfig::default());
    commit_while(&bed.gate, || {
        let (mut server, mut client) = bed.connection();
        ping_pong(&mut server, &mut client, 20);
        let out = bulk(server.try_clone().unwrap(), client.try_clone().unwrap(), BULK / 4);
        let inwards = bulk(client, server, BULK / 4);
        out.join().unwrap();
        inwards.join().unwrap();
    });
    let c = bed.gate.counters();
    assert!(c.commit.released_frames > 0 && c.commit.dropped_frames == 0, "{c:?}");
    assert!(c.commit.released_epochs > 20);
}

#[test]
fn nothing_passes_before_its_release() {
    let bed = Bed::new(GateConfig::default());
    bed.gate.protect(G, Epoch::NONE);
    let seen_before = bed.client.received("out0");
    bed.gate.plug().unwrap();
    let (_listener, at) = bed.listen();
    // The very ARP reply waits for its epoch, so the client does not even get to send its SYN.
    let connecting =
        bed.client.run(move || std::thread::spawn(move || TcpStream::connect_timeout(&at, LONG)));
    assert!(readable(bed.gate.output_waits(), LONG), "the container has answered");
    std::thread::sleep(SHORT);
    assert!(!connecting.is_finished());
    assert_eq!(bed.client.received("out0"), seen_before);

    // Sealed is not released.
    bed.gate.seal(Epoch(1)).unwrap();
    std::thread::sleep(SHORT);
    assert_eq!(bed.client.received("out0"), seen_before);

    let mut ledger = AckLedger::new(G);
    assert!(bed.gate.release(proof(&mut ledger, 1)).unwrap() > 0);
    assert!(bed.client.received("out0") > seen_before);
    let mut epoch = 1;
    let until = Instant::now() + LONG;
    while !connecting.is_finished() && Instant::now() < until {
        readable(bed.gate.output_waits(), SHORT);
        epoch += 1;
        bed.gate.seal(Epoch(epoch)).unwrap();
        bed.gate.release(proof(&mut ledger, epoch)).unwrap();
    }
    connecting.join().unwrap().expect("the released SYN-ACK completes the connection");
}

#[test]
fn who_calls_while_output_stands_is_heard_when_it_moves_again() {
    let bed = Bed::plugged(GateConfig { standing: Some(SHORT), ..GateConfig::default() });
    let (mut server, _client) = bed.connection();
    let (listener, at) = bed.listen();
    bed.gate.protect(G, Epoch::NONE);
    server.write_all(b"x").unwrap();
    assert!(readable(bed.gate.output_waits(), LONG));
    std::thread::sleep(2 * SHORT);
    let call = move || std::thread::spawn(move || TcpStream::connect_timeout(&at, LONG));
    let connecting = bed.client.run(call);
    let begin = Instant::now();
    while bed.gate.counters().kept_out_frames == 0 {
        assert!(begin.elapsed() < LONG, "it is let in");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Its kernel has heard nothing, so there is nothing that it could forget.
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut ledger = AckLedger::new(G);
    let (mut epoch, until) = (0, Instant::now() + LONG);
    while !connecting.is_finished() && Instant::now() < until {
        epoch += 1;
        bed.gate.seal(Epoch(epoch)).unwrap();
        bed.gate.release(proof(&mut ledger, epoch)).unwrap();
        readable(bed.gate.output_waits(), SHORT / 2);
    }
    connecting.join().unwrap().expect("the client has repeated its call");
}

#[test]
fn the_notifier_tells_of_the_first_frame_and_falls_silent_at_the_seal() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    bed.gate.protect(G, Epoch::NONE);
    let mut ledger = AckLedger::new(G);
    let mut epoch = 0;
    for _ in 0..20 {
        server.write_all(b"x").unwrap();
        // Where a frame came together with the seal before, it tells of that once more.
        while bed.gate.output().0 == 0 {
            assert!(readable(bed.gate.output_waits(), LONG));
        }
        epoch += 1;
        let sealed = bed.gate.seal(Epoch(epoch)).unwrap();
        assert!(sealed.frames >= 1);
        bed.gate.release(proof(&mut ledger, epoch)).unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    // A seal takes everything that the container's kernel has queued, in the calling thread.
    server.write_all(b"y").unwrap();
    epoch += 1;
    assert!(bed.gate.seal(Epoch(epoch)).unwrap().frames >= 1);
    assert!(matches!(bed.gate.seal(Epoch(epoch)), Err(GateError::Commit(_))));
}

#[test]
fn a_notifier_that_is_late_is_silenced_by_whoever_asks() {
    // Unplugged: no output comes by itself.
    let bed = Bed::new(GateConfig::default());
    bed.gate.protect(G, Epoch::NONE);
    assert!(!readable(bed.gate.output_waits(), Duration::ZERO));
    // As the gate's thread does when its frame was sealed in between.
    nix::unistd::write(bed.gate.output_waits(), &1u64.to_ne_bytes()).unwrap();
    assert!(readable(bed.gate.output_waits(), LONG));
    assert_eq!(bed.gate.output().0, 0);
    assert!(!readable(bed.gate.output_waits(), Duration::ZERO));
}

#[test]
fn held_input_stays_outside() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    for round in 0..20u8 {
        let hold = bed.gate.hold_input();
        let before = bed.container.received("eth0");
        client.write_all(&[round; 100]).unwrap();
        if round == 0 {
            std::thread::sleep(SHORT);
        }
        server.set_nonblocking(true).unwrap();
        assert_eq!(server.read(&mut [0; 100]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(bed.container.received("eth0"), before);
        drop(hold);
        server.set_nonblocking(false).unwrap();
        let mut got = [0; 100];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 100]);
    }
}

#[test]
fn input_that_comes_before_the_plug_is_not_lost() {
    let bed = Bed::new(GateConfig::default());
    let (listener, at) = bed.listen();
    let server = bed.container.run(|| UdpSocket::bind((CONTAINER, 0)).unwrap());
    let to = server.local_addr().unwrap();
    let (connecting, _client) = bed.client.run(move || {
        let udp = UdpSocket::bind((CLIENT, 0)).unwrap();
        udp.send_to(b"early", to).unwrap();
        (std::thread::spawn(move || TcpStream::connect_timeout(&at, LONG)), udp)
    });
    std::thread::sleep(SHORT);
    assert!(bed.gate.counters().backlog_frames > 0);
    assert!(!connecting.is_finished());
    bed.gate.plug().unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let mut buffer = [0; 10];
    let (n, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"early");
    connecting.join().unwrap().unwrap();
    listener.accept().unwrap();
    assert_eq!(bed.gate.counters().backlog_frames, 0);
}

#[test]
fn an_unplugged_container_says_nothing() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    ping_pong(&mut server, &mut client, 3);
    bed.gate.unplug();
    let before = bed.client.received("out0");
    server.write_all(b"into the void").unwrap();
    std::thread::sleep(SHORT);
    assert_eq!(bed.client.received("out0"), before);
    bed.gate.plug().unwrap();
    let mut got = [0; 13];
    client.read_exact(&mut got).expect("the container's TCP sends it again");
    assert_eq!(&got, b"into the void");
}

#[test]
fn releases_that_overlap_keep_the_order() {
    let bed = Bed::plugged(GateConfig::default());
    let (from, to) = (
        bed.container.run(|| UdpSocket::bind((CONTAINER, 0)).unwrap()),
        bed.client.run(|| UdpSocket::bind((CLIENT, 0)).unwrap()),
    );
    to.set_read_timeout(Some(LONG)).unwrap();
    from.connect(to.local_addr().unwrap()).unwrap();
    from.send(b"find the neighbour").unwrap();
    to.recv(&mut [0; 100]).unwrap();

    bed.gate.protect(G, Epoch::NONE);
    let (epochs, each) = (60u64, 4u64);
    let proofs = Mutex::new(Vec::new());
    let mut ledger = AckLedger::new(G);
    for epoch in 1..=epochs {
        for i in 0..each {
            from.send(&((epoch - 1) * each + i).to_be_bytes()).unwrap();
        }
        bed.gate.seal(Epoch(epoch)).unwrap();
        proofs.lock().unwrap().push(proof(&mut ledger, epoch));
    }
    proofs.lock().unwrap().reverse();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some(proof) = { proofs.lock().unwrap().pop() } {
                    bed.gate.release(proof).unwrap();
                }
            });
        }
    });
    // A frame that another processor was still queueing at the last seal is of the next epoch.
    to.set_read_timeout(Some(SHORT)).unwrap();
    let (mut epoch, mut want, until) = (epochs, 0, Instant::now() + LONG);
    while want < epochs * each {
        let mut got = [0; 8];
        match to.recv(&mut got) {
            Ok(_) => {
                assert_eq!(u64::from_be_bytes(got), want);
                want += 1;
            }
            Err(_) => {
                assert!(
                    Instant::now() < until,
                    "datagram {want} is lost: {:?}",
                    bed.gate.counters()
                );
                epoch += 1;
                bed.gate.seal(Epoch(epoch)).unwrap();
                bed.gate.release(proof(&mut ledger, epoch)).unwrap();
            }
        }
    }
}

#[test]
fn what_was_held_leaves_first_when_this_side_goes_on_alone() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    bed.gate.protect(G, Epoch::NONE);
    server.write_all(b"held ").unwrap();
    bed.gate.seal(Epoch(1)).unwrap();
    server.write_all(b"open ").unwrap();
    assert!(readable(bed.gate.output_waits(), LONG));
    assert!(bed.gate.pass_through(Unprotected::GrantedByArbiter) >= 1);
    server.write_all(b"free").unwrap();
    let mut got = [0; 14];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"held open free");
}

#[test]
fn frames_that_the_outer_device_refuses_are_counted_and_sent_again_by_tcp() {
    let bed = Bed::plugged(GateConfig::default());
    let (mut server, mut client) = bed.connection();
    let out0 = |state: &'static str| {
        bed.client.run(move || {
            let ip = Command::new("ip").args(["link", "set", "out0", state]).status();
            assert!(ip.unwrap().success());
        });
    };
    bed.gate.protect(G, Epoch::NONE);
    server.write_all(b"again").unwrap();
    assert!(readable(bed.gate.output_waits(), LONG));
    let sealed = bed.gate.seal(Epoch(1)).unwrap();
    out0("down");
    let mut ledger = AckLedger::new(G);
    assert_eq!(bed.gate.release(proof(&mut ledger, 1)).unwrap(), 0);
    assert_eq!(bed.gate.counters().out_dropped_frames, sealed.frames as u64);
    out0("up");
    bed.gate.pass_through(Unprotected::GrantedByArbiter);
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"again");
}

/// Header fields of a TCP segment from the log: (seq, ack, length with SYN and FIN).
fn tcp_of(frame: &[u8], to: SocketAddr) -> Option<(u32, u32, u32)> {
    let ethernet = EthernetFrame::new_checked(&frame[HEADER..]).ok()?;
    if ethernet.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
    (tcp.dst_port() == to.port())
        .then(|| (tcp.seq_number().0 as u32, tcp.ack_number().0 as u32, tcp.segment_len() as u32))
}

/// A connection on which the server has sent `sent` bytes and the client `asked`, all received.
struct Talk {
    bed: Bed,
    server: TcpStream,
    client: TcpStream,
    log: Vec<LoggedFrame>,
    /// The client's rcv_nxt and snd_nxt, by the segments that it sent.
    rcv_nxt: u32,
    snd_nxt: u32,
}

fn talk(sent: usize, asked: usize) -> Talk {
    let (writer, mut reader) = input_log::channel(1 << 24, 1 << 14);
    let bed = Bed::plugged(GateConfig { input_log: Some(writer), ..GateConfig::default() });
    let (server, client, log) = commit_while(&bed.gate, || {
        let (mut server, mut client) = bed.connection();
        client.write_all(&pattern(asked)).unwrap();
        expect_pattern(&mut server, asked);
        server.write_all(&pattern(sent)).unwrap();
        expect_pattern(&mut client, sent);
        // The client's acknowledgement may be delayed: one more byte brings it.
        client.write_all(b"!").unwrap();
        server.read_exact(&mut [0]).unwrap();
        // What the container has is in the log once nobody is at it any more.
        drop(bed.gate.hold_input());
        let log: Vec<_> = reader.take();
        (server, client, log)
    });
    let at = server.local_addr().unwrap();
    let segments: Vec<_> = log.iter().filter_map(|f| tcp_of(&f.frame, at)).collect();
    let (isn, _, syn) = segments[0];
    assert_eq!(syn, 1, "the log begins with the SYN");
    let first_ack = segments.iter().find(|(seq, ..)| *seq != isn).unwrap().1;
    let rcv_nxt = first_ack.wrapping_add(sent as u32);
    assert_eq!(segments.last().unwrap().1, rcv_nxt);
    let snd_nxt = isn.wrapping_add(asked as u32 + 2);
    Talk { bed, server, client, log, rcv_nxt, snd_nxt }
}

#[test]
fn a_peers_answer_to_the_probe_is_its_rcv_nxt() {
    let mut t = talk(1000, 300);
    // More that never leaves, as if the primary had died with it.
    t.server.write_all(&[9; 300]).unwrap();
    t.bed.gate.unplug();

    let alive = Connection {
        local: t.server.local_addr().unwrap(),
        remote: t.client.local_addr().unwrap(),
        // The checkpoint is older than the last acknowledgement.
        snd_una: t.rcv_nxt.wrapping_sub(400),
        rcv_nxt: t.snd_nxt,
        window: 500,
        timestamp: None,
    };
    let mut unknown = alive;
    unknown.remote.set_port(if alive.remote.port() == 9 { 10 } else { 9 });
    let net =
        LocalNet { mac: CONTAINER_MAC, addresses: vec![(CONTAINER.into(), 24)], gateways: vec![] };
    let mut probe = PeerProbe::new(net, [alive, unknown]);
    let started = Instant::now();
    t.bed.gate.probe(&mut probe, started + LONG).unwrap();
    assert!(probe.is_done(), "no answer in {:?}", started.elapsed());
    let answers: Vec<_> = probe.answers().map(|(_, answer)| answer).collect();
    assert!(
        matches!(answers[0], Answer::Alive { rcv_nxt, .. } if rcv_nxt == t.rcv_nxt),
        "{answers:?}, the client expects {}",
        t.rcv_nxt
    );
    assert_eq!(answers[1], Answer::Gone);
    t.bed.gate.plug().unwrap();
    let again = t.bed.gate.probe(&mut probe, started);
    assert!(matches!(again, Err(GateError::Plugged)));
}

#[test]
fn an_ipv6_peer_is_found_and_answers() {
    let bed = Bed::new(GateConfig::default());
    // Of the hardware addresses (RFC 4291, appendix A); the client takes its own when it is sure
    // that nobody else has it, so the first questions stay without an answer.
    let (us, peer) = ("[fe80::ff:fe00:1]:80", "[fe80::ff:fe00:2]:9");
    let connection = Connection {
        local: us.parse().unwrap(),
        remote: peer.parse().unwrap(),
        snd_una: 5,
        rcv_nxt: 7,
        window: 500,
        timestamp: Some(1),
    };
    let net = LocalNet {
        mac: CONTAINER_MAC,
        addresses: vec![(connection.local.ip(), 64)],
        gateways: vec![],
    };
    let mut probe = PeerProbe::new(net, [connection]);
    bed.gate.probe(&mut probe, Instant::now() + LONG).unwrap();
    assert_eq!(probe.answers().next().unwrap().1, Answer::Gone);
    assert_eq!(probe.macs().next().unwrap().1, Some(CLIENT_MAC));
}

#[test]
fn a_deadline_ends_the_wait_for_a_silent_peer() {
    let bed = Bed::new(GateConfig::default());
    let nobody = Connection {
        local: SocketAddr::new(CONTAINER.into(), 80),
        remote: "10.9.0.77:9".parse().unwrap(),
        snd_una: 5,
        rcv_nxt: 7,
        window: 500,
        timestamp: None,
    };
    let net =
        LocalNet { mac: CONTAINER_MAC, addresses: vec![(CONTAINER.into(), 24)], gateways: vec![] };
    let mut probe = PeerProbe::new(net, [nobody]);
    bed.gate.probe(&mut probe, Instant::now() + SHORT).unwrap();
    assert!(!probe.is_done());
    assert_eq!(probe.answers().next().unwrap().1, Answer::Silent);
    assert!(bed.gate.counters().sent_frames >= 2, "it asked more than once");
}

#[test]
fn an_announcement_changes_what_a_neighbour_knows() {
    let bed = Bed::plugged(GateConfig::default());
    let _connection = bed.connection();
    let known = || {
        bed.client.run(|| {
            let table = std::fs::read_to_string("/proc/thread-self/net/arp").unwrap();
            let line = table.lines().find(|l| l.starts_with(&format!("{CONTAINER} "))).unwrap();
            line.split_whitespace().nth(3).unwrap().to_owned()
        })
    };
    assert_eq!(known(), "02:00:00:00:00:01");
    let moved = gateway::frames::Mac([2, 0, 0, 0, 0, 0x77]);
    let interval = SHORT;
    let mut announcer = Announcer::new(moved, &[CONTAINER.into()], 100, interval);
    // The kernel believes no second change within a second of the first.
    while known() != "02:00:00:00:00:77" {
        assert!(!announcer.is_done());
        for frame in announcer.due(Instant::now()) {
            bed.gate.send(frame).unwrap();
        }
        std::thread::sleep(interval / 3);
    }
}

fn from_client(t: &Talk) -> PeerSegment {
    PeerSegment {
        to_mac: CONTAINER_MAC,
        from_mac: CLIENT_MAC,
        to: t.server.local_addr().unwrap(),
        from: t.client.local_addr().unwrap(),
        seq: t.snd_nxt,
        ack: t.rcv_nxt,
        window: 500,
        timestamp: None,
    }
}

#[test]
fn an_injected_fin_closes_the_peers_side() {
    let mut t = talk(10, 10);
    t.bed.gate.unplug();
    t.bed.gate.inject(&from_client(&t).fin().unwrap()).unwrap();
    assert_eq!(t.server.read(&mut [0]).unwrap(), 0);
    t.server.write_all(b"this side is open still").unwrap();
}

#[test]
fn an_injected_reset_resets() {
    let mut t = talk(10, 10);
    t.bed.gate.unplug();
    t.bed.gate.inject(&from_client(&t).rst().unwrap()).unwrap();
    assert_eq!(t.server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn the_log_has_every_inbound_frame_with_its_epoch() {
    let t = talk(10, 100_000);
    let at = t.server.local_addr().unwrap();
    let mut next = None;
    for frame in &t.log {
        let Some((seq, _, len)) = tcp_of(&frame.frame, at) else { continue };
        // On a busy machine the client may send something twice.
        let gap = seq.wrapping_sub(*next.get_or_insert(seq)) as i32;
        assert!(gap <= 0, "{gap} bytes are missing before {seq}");
        next = next.map(|n: u32| n.wrapping_add((gap + len as i32).max(0) as u32));
    }
    assert_eq!(next, Some(t.snd_nxt));
    let epochs: Vec<u64> = t.log.iter().map(|f| f.epoch.0).collect();
    assert!(epochs.is_sorted() && epochs[0] >= 1 && epochs.last() > epochs.first(), "{epochs:?}");
    drop(t.client);
}

#[test]
fn the_devices_come_back_and_threads_are_set_up() {
    let set_up = Arc::new(Mutex::new(Vec::new()));
    let seen = set_up.clone();
    let bed = Bed::plugged(GateConfig {
        thread_setup: Some(Arc::new(move |which| seen.lock().unwrap().push(which))),
        ..GateConfig::default()
    });
    let _ = bed.connection();
    let Bed { gate, container: _container, client: _client } = bed;
    let (inner, outer) = gate.into_taps();
    assert_eq!((inner.name(), outer.name()), ("eth0", "out0"));
    assert_eq!(set_up.lock().unwrap().len(), 2);
}
