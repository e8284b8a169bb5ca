//! TCP connections in every state that has a descriptor, captured on the real kernel and brought
//! to life again. Needs root.

mod common;

use common::{CONTAINER, Lan, Original, Scratch, network_of, wait_until};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
use replicator::image::Kind;
use replicator::image::net::{TcpConnection, TcpState};
use replicator::image::options::INTS;
use replicator::restore::{Peer, Segment};
use replicator::sys::sockopt;
use replicator::sys::tap::{Tap, VNET_HDR};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PORT: u16 = 7000;
/// Where the container connects to.
const OUTSIDE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 77, 0, 1), 7999);
const DATA: usize = 100_000;
const TCP: i32 = libc::IPPROTO_TCP;
const SOCKET: i32 = libc::SOL_SOCKET;

fn data() -> Vec<u8> {
    (0..DATA).map(|i| (i * 31 % 251) as u8).collect()
}

fn state(fd: BorrowedFd<'_>) -> u8 {
    let mut info = [0; 8];
    sockopt::get(fd, TCP, libc::TCP_INFO, &mut info).expect("TCP_INFO");
    info[0]
}

/// The states of tcp_states.h that are looked for.
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;
const SYN_SENT: u8 = 2;

/// Not a test: the program that runs in the container.
#[test]
fn subject() {
    if std::env::var_os(common::SUBJECT).is_some() {
        run();
    }
}

fn await_file(name: &str) {
    wait_until(name, || Path::new(name).exists());
}

fn until_state(what: &str, fd: BorrowedFd<'_>, wanted: u8) {
    wait_until(&format!("{what} is in state {wanted}"), || state(fd) == wanted);
}

fn run() {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).expect("bound");
    set_on_listener(listener.as_fd());
    println!("listening");
    let mut named: BTreeMap<String, TcpStream> = BTreeMap::new();
    while named.len() < 8 {
        let (mut stream, _) = listener.accept().expect("accepted");
        let mut name = [0; 2];
        stream.read_exact(&mut name).expect("a name");
        named.insert(String::from_utf8_lossy(&name).into_owned(), stream);
    }
    let of = |name: &str| named.get(name).expect("connected");
    of("f2").shutdown(Shutdown::Write).expect("shut");
    until_state("f2", of("f2").as_fd(), FIN_WAIT2);
    of("rd").shutdown(Shutdown::Read).expect("shut");
    of("en").shutdown(Shutdown::Write).expect("shut");
    until_state("en", of("en").as_fd(), CLOSE);
    until_state("er", of("er").as_fd(), CLOSE);
    set_on_connection(of("op").as_fd());
    let before = (read_back(of("op").as_fd()), read_back(listener.as_fd()));
    let (to_self, from_self) = loopback();
    println!("quiet");

    await_file("cut");
    for (name, wanted) in [("f1", FIN_WAIT1), ("la", LAST_ACK), ("cl", FIN_WAIT1)] {
        let mut stream = of(name);
        if name == "f1" {
            sockopt::set_i32(stream.as_fd(), SOCKET, libc::SO_SNDBUF, 4 * DATA as i32)
                .expect("set");
            stream.write_all(&data()).expect("written");
        }
        stream.shutdown(Shutdown::Write).expect("shut");
        until_state(name, stream.as_fd(), wanted);
    }
    println!("shut");
    until_state("cl", of("cl").as_fd(), CLOSING);
    let kind = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let dialling = socket(AddressFamily::Inet, SockType::Stream, kind, None).expect("a socket");
    let to = SockaddrIn::from(SocketAddrV4::new(OUTSIDE.0, OUTSIDE.1));
    assert_eq!(connect(dialling.as_raw_fd(), &to), Err(nix::errno::Errno::EINPROGRESS));
    assert_eq!(state(dialling.as_fd()), SYN_SENT);
    println!("ready");

    // Here it is stopped and goes on elsewhere.
    await_file("look");
    let first = ["f2", "rd", "la", "cl"].map(|n| format!("{n}={}", state(of(n).as_fd())));
    println!("states {}", first.join(" "));
    assert_eq!(before.0, read_back(of("op").as_fd()));
    assert_eq!(before.1, read_back(listener.as_fd()));
    assert!(has(of("rd").as_fd(), libc::POLLRDHUP));
    assert_eq!(of("rd").read(&mut [0; 9]).expect("read"), 0);
    of("rd").write_all(b"still").expect("written");
    let mut left = String::new();
    of("en").read_to_string(&mut left).expect("read");
    assert_eq!(left, "left");
    let mut lost = [0; 4];
    of("er").read_exact(&mut lost).expect("read");
    let error = of("er").read(&mut [0]).expect_err("it was reset");
    assert_eq!((&lost, error.kind()), (b"lost", ErrorKind::ConnectionReset));
    assert_eq!(through(&to_self, &from_self), (to_self.2, from_self.2));
    println!("inside");
    wait_until("it is connected", || has(dialling.as_fd(), libc::POLLOUT));
    assert_eq!(sockopt::get_i32(dialling.as_fd(), SOCKET, libc::SO_ERROR).expect("error"), 0);
    let mut dialled = TcpStream::from(dialling);
    dialled.set_nonblocking(false).expect("set");
    let mut word = String::new();
    dialled.read_to_string(&mut word).expect("read");
    println!("dialled {word}");
    let mut late = String::new();
    of("f2").read_to_string(&mut late).expect("read");
    println!("late {late}");
    for name in ["f1", "la", "cl", "f2"] {
        until_state(name, of(name).as_fd(), CLOSE);
        println!("over {name}");
    }
    println!("verified");
    await_file("end");
}

fn has(fd: BorrowedFd<'_>, event: i16) -> bool {
    sockopt::events(fd).expect("polled") & event != 0
}

/// One end of a connection inside the container, what was written to it and how much.
type End = (TcpStream, u8, usize);

/// A connection over the loopback with both receive queues and both send queues full.
fn loopback() -> (End, End) {
    let door = TcpListener::bind("127.0.0.1:0").expect("bound");
    let a = TcpStream::connect(door.local_addr().expect("address")).expect("connected");
    let (b, _) = door.accept().expect("accepted");
    let fill = |mut stream: &TcpStream, byte: u8| {
        stream.set_nonblocking(true).expect("set");
        let mut written = 0;
        loop {
            match stream.write(&[byte; 4096]) {
                Ok(n) => written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        stream.set_nonblocking(false).expect("set");
        written
    };
    let (from_a, from_b) = (fill(&a, 1), fill(&b, 2));
    ((a, 1, from_a), (b, 2, from_b))
}

/// Reads at each end what was written at the other; gives how much of a's and b's there was.
fn through(a: &End, b: &End) -> (usize, usize) {
    for end in [a, b] {
        end.0.shutdown(Shutdown::Write).expect("shut");
    }
    let drain = |mut stream: &TcpStream, byte: u8| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("read");
        assert!(bytes.iter().all(|b| *b == byte));
        bytes.len()
    };
    std::thread::scope(|scope| {
        let at_a = scope.spawn(|| drain(&a.0, b.1));
        (drain(&b.0, a.1), at_a.join().expect("no panic"))
    })
}

fn set_on_listener(fd: BorrowedFd<'_>) {
    for (level, name, value) in [
        (TCP, libc::TCP_MAXSEG, 1100),
        (TCP, libc::TCP_FASTOPEN, 5),
        (TCP, libc::TCP_SAVE_SYN, 1),
        (SOCKET, libc::SO_RCVLOWAT, 3),
    ] {
        sockopt::set_i32(fd, level, name, value).expect("set");
    }
    // Its children inherit it; they read a byte at a time.
    sockopt::set_i32(fd, SOCKET, libc::SO_RCVLOWAT, 1).expect("set");
}

fn set_on_connection(fd: BorrowedFd<'_>) {
    for (level, name, value) in [
        (TCP, libc::TCP_NODELAY, 1),
        (TCP, libc::TCP_KEEPIDLE, 11),
        (TCP, libc::TCP_KEEPINTVL, 12),
        (TCP, libc::TCP_KEEPCNT, 13),
        (TCP, libc::TCP_USER_TIMEOUT, 4321),
        (TCP, libc::TCP_NOTSENT_LOWAT, 5000),
        (TCP, libc::TCP_LINGER2, 20),
        (TCP, libc::TCP_SYNCNT, 3),
        (TCP, 36, 1),     // TCP_INQ
        (TCP, 44, 5_000), // TCP_RTO_MAX_MS
        (TCP, libc::TCP_QUICKACK, 0),
        (SOCKET, libc::SO_KEEPALIVE, 1),
        (SOCKET, libc::SO_SNDBUF, 50_000),
        (SOCKET, libc::SO_RCVBUF, 60_000),
        (SOCKET, libc::SO_RCVLOWAT, 7),
        (SOCKET, libc::SO_OOBINLINE, 1),
        (SOCKET, libc::SO_PRIORITY, 5),
        (SOCKET, libc::SO_MARK, 9),
        (SOCKET, libc::SO_PEEK_OFF, 2),
        (SOCKET, libc::SO_MAX_PACING_RATE, 1 << 20),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
    ] {
        sockopt::set_i32(fd, level, name, value).expect("set");
    }
    sockopt::set(fd, TCP, libc::TCP_CONGESTION, b"reno").expect("set");
    sockopt::set(fd, SOCKET, libc::SO_BINDTODEVICE, b"eth0").expect("set");
    let timeout: Vec<u8> = [3i64, 500_000].iter().flat_map(|v| v.to_ne_bytes()).collect();
    sockopt::set(fd, SOCKET, libc::SO_RCVTIMEO, &timeout).expect("set");
}

/// Every option that a program can read back, as text.
fn read_back(fd: BorrowedFd<'_>) -> Vec<String> {
    let mut all: Vec<(i32, i32)> = INTS.iter().map(|o| (o.level, o.name)).collect();
    let more = [
        (TCP, libc::TCP_NODELAY),
        (TCP, libc::TCP_KEEPIDLE),
        (TCP, libc::TCP_KEEPINTVL),
        (TCP, libc::TCP_KEEPCNT),
        (TCP, libc::TCP_USER_TIMEOUT),
        (TCP, libc::TCP_QUICKACK),
        (TCP, libc::TCP_MAXSEG),
        (TCP, libc::TCP_DEFER_ACCEPT),
        (TCP, libc::TCP_CONGESTION),
        (SOCKET, libc::SO_REUSEADDR),
        (SOCKET, libc::SO_REUSEPORT),
        (SOCKET, libc::SO_KEEPALIVE),
        (SOCKET, libc::SO_SNDBUF),
        (SOCKET, libc::SO_RCVBUF),
        (SOCKET, libc::SO_PRIORITY),
        (SOCKET, libc::SO_MARK),
        (SOCKET, libc::SO_BINDTODEVICE),
        (SOCKET, libc::SO_RCVTIMEO),
        (SOCKET, libc::SO_SNDTIMEO),
        (SOCKET, libc::SO_LINGER),
    ];
    all.extend(more);
    let mut text = Vec::new();
    for (level, name) in all {
        let mut value = [0; 16];
        if let Ok(n) = sockopt::get(fd, level, name, &mut value) {
            text.push(format!("{level}/{name}={:?}", &value[..n]));
        }
    }
    text
}

fn console(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("console");
    assert!(!text.contains("panicked"), "{text}");
    text
}

/// Shows what the container's program said if the test fails.
struct Tell(std::path::PathBuf);

impl Drop for Tell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", std::fs::read_to_string(&self.0).unwrap_or_default());
        }
    }
}

/// Sends a segment without data to the container, as if a peer had sent it.
fn forge(from_tap: &Tap, s: &Segment, fin: bool) {
    let v4 = |a: SocketAddr| match a {
        SocketAddr::V4(a) => a.ip().octets(),
        SocketAddr::V6(_) => panic!("IPv4 only"),
    };
    let (from, to) = (v4(s.remote), v4(s.local));
    let sum = |parts: &[&[u8]]| {
        let bytes: Vec<u8> = parts.concat();
        let mut sum: u32 =
            bytes.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    };
    let mut tcp = Vec::new();
    tcp.extend(s.remote.port().to_be_bytes());
    tcp.extend(s.local.port().to_be_bytes());
    tcp.extend(s.seq.to_be_bytes());
    tcp.extend(s.ack.to_be_bytes());
    tcp.extend([0x50, 0x10 | u8::from(fin), 0xff, 0xff, 0, 0, 0, 0]);
    let check = sum(&[&from, &to, &[0, 6, 0, 20], &tcp]);
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    let mut ip = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
    ip.extend(from);
    ip.extend(to);
    let check = sum(&[&ip]);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut frame = vec![0; VNET_HDR];
    frame.extend([2, 0, 0, 0, 0x77, 2, 2, 0, 0, 0, 0x77, 9, 8, 0]);
    frame.extend(ip);
    frame.extend(tcp);
    from_tap.write(&frame).expect("sent");
}

#[test]
fn connections_go_on_in_every_state_that_has_a_descriptor() {
    let dir = Scratch::new("connections");
    let lan = Lan::new("states");
    let exe = std::env::current_exe().expect("a path");
    let command =
        [exe.to_str().expect("a path"), "subject", "--exact", "--nocapture", "--test-threads=1"];
    let mut original = Original::start_with(&dir, &command, |pid| lan.connect(pid, "first"));
    lan.plug("first");
    let path = original.console();
    let _tell = Tell(path.clone());
    original.pump_until("it listens", || console(&path).contains("listening"));
    let mut clients = BTreeMap::new();
    for name in ["f1", "f2", "la", "cl", "rd", "en", "er", "op"] {
        let connect = || TcpStream::connect((CONTAINER, PORT)).expect("connected");
        let mut client = lan.namespace.enter(connect).expect("entered");
        client.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        client.write_all(name.as_bytes()).expect("sent");
        clients.insert(name, client);
    }
    clients["la"].shutdown(Shutdown::Write).expect("shut");
    (&clients["en"]).write_all(b"left").expect("sent");
    clients["en"].shutdown(Shutdown::Write).expect("shut");
    let mut rude = clients.remove("er").expect("connected");
    rude.write_all(b"lost").expect("sent");
    let at_once: Vec<u8> = [1i32, 0].iter().flat_map(|v| v.to_ne_bytes()).collect();
    sockopt::set(rude.as_fd(), SOCKET, libc::SO_LINGER, &at_once).expect("set");
    drop(rude);
    original.pump_until("it is quiet", || console(&path).contains("quiet"));
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    lan.connect(spare.pid(), "second");

    // From now on the container's frames reach nobody, while it hears its peers.
    network_of(original.launched.pid, || {
        let nobody = "neigh replace 10.77.0.1 lladdr 02:00:00:00:de:ad nud permanent dev eth0";
        let done = Command::new("ip").args(nobody.split(' ')).status().expect("ip runs");
        assert!(done.success());
    });
    std::fs::write(dir.0.join("cut"), "").expect("written");
    original.pump_until("it has shut", || console(&path).contains("shut"));
    clients["cl"].shutdown(Shutdown::Write).expect("shut");
    original.pump_until("it is ready", || console(&path).contains("ready"));
    original.follow(&mut spare);
    let names: BTreeMap<u16, &str> =
        clients.iter().map(|(name, c)| (c.local_addr().expect("address").port(), *name)).collect();
    let kinds = original.state.descriptions.iter().filter_map(|d| match &d.kind {
        Kind::Tcp(c) => Some(&**c),
        _ => None,
    });
    let captured: Vec<&TcpConnection> = kinds.collect();
    let named = |name| {
        let found = captured.iter().find(|c| names.get(&c.remote.port()) == Some(&name));
        (*found.expect("captured")).clone()
    };
    for (name, state) in [
        ("f1", TcpState::FinWait1),
        ("f2", TcpState::FinWait2),
        ("la", TcpState::LastAck),
        ("cl", TcpState::Closing),
        ("rd", TcpState::Established),
        ("op", TcpState::Established),
    ] {
        assert_eq!(named(name).state, state, "{name}");
    }
    assert_eq!(named("f1").send_queue, data());
    assert!(named("rd").shut_read && !named("op").shut_read);
    let ended = captured.iter().filter(|c| c.state == TcpState::Closed);
    let ended: Vec<_> = ended.map(|c| (c.receive_queue.as_slice(), c.error)).collect();
    assert_eq!(ended.len(), 2, "{ended:?}");
    assert!(ended.contains(&(b"left", false)) && ended.contains(&(b"lost", true)), "{ended:?}");
    let dialled = captured.iter().find(|c| c.state == TcpState::SynSent).expect("captured");
    assert_eq!(dialled.remote, SocketAddr::from((OUTSIDE.0, OUTSIDE.1)));
    drop(captured);
    lan.unplug("first");
    let _ = original.kill();

    spare.prepare().expect("prepare");
    let expects = |c: &TcpConnection| match names.get(&c.remote.port()) {
        Some(&"f2") => Peer::Expects(c.write_seq.wrapping_add(1)),
        _ => Peer::Expects(c.write_seq.wrapping_sub(c.send_queue.len() as u32)),
    };
    let tap = lan.tap("forge");
    let door = lan.namespace.enter(|| TcpListener::bind(OUTSIDE)).expect("entered").expect("bound");
    let resumption = spare.connect(expects).expect("connect");
    let ports = |segments: &[Segment]| {
        let mut found: Vec<_> =
            segments.iter().filter_map(|s| names.get(&s.remote.port()).copied()).collect();
        found.sort();
        found
    };
    assert_eq!(ports(&resumption.fins), ["cl", "la"]);
    assert_eq!((ports(&resumption.acks), resumption.resets.len()), (vec!["f2"], 0));
    lan.plug("second");
    spare.push_unsent().expect("go on");
    spare.complete().expect("complete");
    resumption.fins.iter().for_each(|s| forge(&tap, s, true));
    // A bridge may take a moment to let a frame through.
    std::thread::sleep(Duration::from_millis(50));
    spare.close_sides().expect("sides");
    resumption.acks.iter().for_each(|s| forge(&tap, s, false));
    std::thread::sleep(Duration::from_millis(50));
    spare.detach_all().expect("let go");
    std::fs::write(dir.0.join("look"), "").expect("written");

    let (mut outside, _) = door.accept().expect("it dials again");
    outside.write_all(b"welcome").expect("sent");
    drop(outside);
    wait_until("it has told its states", || console(&path).contains("states"));
    (&clients["f2"]).write_all(b"news").expect("sent");
    clients["f2"].shutdown(Shutdown::Write).expect("shut");
    let rest = |name| {
        let mut bytes = Vec::new();
        let mut client: &TcpStream = &clients[name];
        client.read_to_end(&mut bytes).expect("no reset");
        bytes
    };
    assert!(rest("f1") == data());
    clients["f1"].shutdown(Shutdown::Write).expect("shut");
    for name in ["f2", "la", "cl", "en"] {
        assert_eq!(rest(name), b"", "{name}");
    }
    let mut still = [0; 5];
    (&clients["rd"]).read_exact(&mut still).expect("a word");
    assert_eq!(&still, b"still");
    wait_until("all is verified", || console(&path).contains("verified"));
    let text = console(&path);
    assert!(text.contains("late news") && text.contains("dialled welcome"), "{text}");
    let states = text.lines().find_map(|l| l.strip_prefix("states ")).expect("a line");
    let allowed = ["la=9 cl=11", "la=7 cl=11", "la=9 cl=7", "la=7 cl=7"];
    assert!(allowed.iter().any(|a| states == format!("f2=5 rd=1 {a}")), "{states}");
    std::fs::write(dir.0.join("end"), "").expect("written");
}
