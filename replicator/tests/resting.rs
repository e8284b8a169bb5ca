//! Connections at rest among many: a stop takes them as they were put together before, and whatever
//! changes about one of them between that and the stop is seen. Each stop looks at everything one by
//! one as well, and compares. Needs root.

mod common;

use common::stage::{Stage, obey};
use nix::fcntl::{FcntlArg, FdFlag, FlockArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use replicator::capture::warm_up;
use replicator::image::net::TcpConnection;
use replicator::sys::sockopt;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

const PORT: u16 = 7200;
const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const TCP: i32 = libc::IPPROTO_TCP;
/// Connections, besides the one by which the program is told what to do.
const COUNT: usize = 60;
/// Descriptors of connections: that one has two.
const ALL: usize = COUNT + 2;

/// Not a test: the program that runs in the container, and does what it is told.
#[test]
fn subject() {
    if std::env::var_os(common::SUBJECT).is_some() {
        run();
    }
}

fn run() {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut spare: Vec<OwnedFd> = Vec::new();
    let mut locks = Vec::new();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    obey(PORT, |listener, words| {
        let n = |at: usize| words[at].parse::<usize>().expect("a number");
        let event = |data: usize| EpollEvent::new(EpollFlags::EPOLLIN, data as u64);
        match words[0] {
            "accept" => streams.push(listener.accept().expect("accepted").0),
            "write" => streams[n(1)].write_all(&vec![7; n(2)]).expect("written"),
            "read" => streams[n(1)].read_exact(&mut vec![0; n(2)]).expect("read"),
            "set" | "long" => {
                let numbers = words[4..].iter().map(|w| w.parse::<i64>().expect("a number"));
                let value: Vec<u8> = match words[0] {
                    "set" => numbers.flat_map(|v| (v as i32).to_ne_bytes()).collect(),
                    _ => numbers.flat_map(i64::to_ne_bytes).collect(),
                };
                let fd = streams[n(1)].as_fd();
                match sockopt::set(fd, n(2) as i32, n(3) as i32, &value) {
                    // A newer kernel's.
                    Err(e) if e.code() == libc::ENOPROTOOPT => {}
                    set => set.expect("set"),
                }
            }
            "text" => {
                let (fd, text) = (streams[n(1)].as_fd(), words[4].as_bytes());
                sockopt::set(fd, n(2) as i32, n(3) as i32, text).expect("set");
            }
            "keep" => {
                fcntl(&streams[n(1)], FcntlArg::F_SETFD(FdFlag::empty())).expect("set");
            }
            "block" => streams[n(1)].set_nonblocking(n(2) == 0).expect("set"),
            "tell" => {
                let flags = OFlag::O_ASYNC | OFlag::O_RDWR;
                let owner = fcntl(&streams[n(1)], FcntlArg::F_SETFL(flags));
                owner.expect("set");
            }
            "watch" => epoll.add(&streams[n(1)], event(n(2))).expect("added"),
            "change" => epoll.modify(&streams[n(1)], &mut event(n(2))).expect("changed"),
            "forget" => epoll.delete(&streams[n(1)]).expect("taken out"),
            "shut" => streams[n(1)].shutdown(Shutdown::Read).expect("shut"),
            "dup" => spare.push(streams[n(1)].try_clone().expect("a duplicate").into()),
            "undup" => spare.clear(),
            "lock" => {
                let dup = OwnedFd::from(streams[n(1)].try_clone().expect("a duplicate"));
                let lock = nix::fcntl::Flock::lock(dup, FlockArg::LockExclusiveNonblock);
                locks.push(lock.map_err(|(_, e)| e).expect("locked"));
            }
            "close" => drop(streams.remove(n(1))),
            // Another connection at the same number.
            "swap" => {
                let mut old = OwnedFd::from(streams.remove(n(1)));
                let (fresh, _) = listener.accept().expect("accepted");
                nix::unistd::dup2(&fresh, &mut old).expect("put there");
                streams.insert(n(1), old.into());
            }
            other => panic!("{other}?"),
        }
    });
}

/// With all connections.
fn stage(name: &str) -> Stage {
    let mut stage = Stage::new(name, PORT);
    (0..COUNT).for_each(|_| stage.tell("accept"));
    stage.settle();
    stage
}

/// What is done to the connection with this number, and whether a later look need not walk for it.
fn changes(i: usize) -> Vec<(String, bool)> {
    let set =
        |level: i32, name: i32, value: &str| (format!("set {i} {level} {name} {value}"), true);
    let text =
        |level: i32, name: i32, value: &str| (format!("text {i} {level} {name} {value}"), true);
    let long = |name: i32, value: &str| (format!("long {i} {SOCKET} {name} {value}"), true);
    let mut all = vec![
        set(SOCKET, libc::SO_REUSEADDR, "1"),
        set(SOCKET, libc::SO_KEEPALIVE, "1"),
        set(SOCKET, libc::SO_OOBINLINE, "1"),
        set(SOCKET, libc::SO_SNDBUF, "50000"),
        set(SOCKET, libc::SO_RCVBUF, "60000"),
        set(SOCKET, libc::SO_RCVLOWAT, "7"),
        long(libc::SO_RCVTIMEO, "3 500000"),
        long(libc::SO_SNDTIMEO, "4 500000"),
        // On, seven seconds.
        set(SOCKET, libc::SO_LINGER, "1 7"),
        set(SOCKET, libc::SO_PRIORITY, "5"),
        set(SOCKET, libc::SO_MARK, "9"),
        set(SOCKET, libc::SO_PEEK_OFF, "0"),
        set(SOCKET, libc::SO_MAX_PACING_RATE, "1048576"),
        set(SOCKET, libc::SO_TIMESTAMP, "1"),
        set(SOCKET, libc::SO_ZEROCOPY, "1"),
        text(SOCKET, libc::SO_BINDTODEVICE, "eth0"),
        set(IP, libc::IP_TOS, "16"),
        set(IP, libc::IP_TTL, "33"),
        set(IP, libc::IP_RECVERR, "1"),
        set(IP, libc::IP_RECVTTL, "1"),
        set(IP, libc::IP_MTU_DISCOVER, "2"),
        set(IP, libc::IP_MINTTL, "3"),
        set(IP, libc::IP_BIND_ADDRESS_NO_PORT, "1"),
        set(TCP, libc::TCP_NODELAY, "1"),
        set(TCP, libc::TCP_CORK, "1"),
        set(TCP, libc::TCP_KEEPIDLE, "11"),
        set(TCP, libc::TCP_KEEPINTVL, "12"),
        set(TCP, libc::TCP_KEEPCNT, "13"),
        set(TCP, libc::TCP_SYNCNT, "3"),
        set(TCP, libc::TCP_LINGER2, "20"),
        set(TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, "1"),
        set(TCP, libc::TCP_USER_TIMEOUT, "4321"),
        set(TCP, libc::TCP_NOTSENT_LOWAT, "5000"),
        set(TCP, libc::TCP_SAVE_SYN, "1"),
        set(TCP, 36, "1"),     // TCP_INQ
        set(TCP, 44, "5000"),  // TCP_RTO_MAX_MS
        set(TCP, 45, "50000"), // TCP_RTO_MIN_US
        set(TCP, 46, "50000"), // TCP_DELACK_MAX_US
        text(TCP, libc::TCP_CONGESTION, "reno"),
    ];
    let others = [
        (format!("keep {i}"), true),
        (format!("block {i} 0"), true),
        (format!("block {i} 1"), true),
        (format!("write {i} 10"), true),
        // An entry of its own, with an address that was not there.
        (format!("watch {i} 3"), false),
        (format!("change {i} 4"), true),
        (format!("forget {i}"), false),
        (format!("dup {i}"), false),
        ("undup".into(), false),
        (format!("swap {i}"), false),
        (format!("lock {}", i + 1), false),
        (format!("tell {}", i + 2), true),
        (format!("shut {}", i + 3), true),
        (format!("close {}", i + 4), false),
        ("accept".into(), false),
    ];
    all.extend(others);
    all
}

#[test]
fn a_change_of_one_connection_is_seen_among_many() {
    if !warm_up() {
        println!("skipped: this kernel shows descriptors one by one only");
        return;
    }
    let mut stage = stage("resting");
    stage.look_ahead();
    stage.stop();
    let mut rest = ALL;
    for (change, at_once) in changes(20) {
        stage.settle();
        // The first may have to walk.
        stage.look_ahead();
        stage.look_ahead();
        let before = stage.stop();
        println!("{change}: {} rest", before.resting);
        assert!(before.resting + 3 >= rest, "{change}: only {} of {rest} rest", before.resting);
        rest = before.resting;
        stage.look_ahead();
        if change.starts_with("swap") {
            stage.dial();
        }
        stage.tell(&change);
        stage.settle();
        let times = stage.stop();
        if at_once {
            // It and the two of the one by which the program was told.
            let moved = rest - times.resting;
            assert!((2..=3).contains(&moved), "{change}: {} of {rest} rest", times.resting);
        }
        // The same once more, with nothing put together.
        stage.stop();
    }
}

#[test]
fn what_rests_is_in_each_checkpoint_as_it_is_at_that_time() {
    if !warm_up() {
        println!("skipped: this kernel shows descriptors one by one only");
        return;
    }
    let mut stage = stage("rested");
    stage.look_ahead();
    stage.look_ahead();
    stage.stop();
    let before: Vec<TcpConnection> = stage.connections().cloned().collect();
    assert_eq!(before.len(), COUNT + 1);
    stage.look_ahead();
    // The time that counts is that of the stop, not of the look before it.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stage.stop().resting, ALL);
    for (now, before) in stage.connections().zip(&before) {
        let elapsed = now.timestamp.zip(before.timestamp).map(|(n, b)| n.wrapping_sub(b));
        assert!(elapsed.is_some_and(|ms| (290..10_000).contains(&ms)), "{elapsed:?}");
        assert_eq!(&TcpConnection { timestamp: before.timestamp, ..now.clone() }, before);
    }
    // Something arrives between the look and the stop, and is read between the next ones.
    stage.look_ahead();
    stage.clients[5].write_all(b"hello").expect("sent");
    stage.settle();
    assert_eq!(stage.stop().resting, ALL - 1);
    let queues = |stage: &Stage| -> Vec<Vec<u8>> {
        let queues = stage.connections().map(|c| c.receive_queue.clone());
        queues.filter(|q| !q.is_empty()).collect()
    };
    assert_eq!(queues(&stage), [b"hello"]);
    stage.look_ahead();
    stage.look_ahead();
    assert_eq!(stage.stop().resting, ALL - 1, "one with bytes in its queue does not rest");
    assert_eq!(queues(&stage), [b"hello"]);
    stage.look_ahead();
    stage.tell("read 5 5");
    stage.settle();
    stage.stop();
    assert!(queues(&stage).is_empty());
}
