//! What closed connections have still to send, read from the kernel's memory and compared with what was
//! written, byte by byte. Needs root.

mod common;

use common::{Scratch, wait_until};
use netns_tools::links::Network;
use netns_tools::namespace::Namespace;
use nix::sched::{CloneFlags, unshare};
use nix::sys::sendfile::sendfile;
use replicator::capture::Orphans;
use replicator::image::net::{TcpConnection, TcpState};
use replicator::sys::{SysResult, loopback, sockopt};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

const DATA: usize = 200_000;
const TCP: i32 = libc::IPPROTO_TCP;
const SOCKET: i32 = libc::SOL_SOCKET;

/// Bytes without a pattern, other ones each time.
fn data(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::fill(&mut bytes);
    bytes
}

/// None where the kernel cannot do it.
fn opened() -> Option<Orphans> {
    let orphans = Orphans::open();
    if orphans.is_none() {
        println!("skipped: this kernel's memory is not read");
    }
    orphans
}

/// A network of this thread's own.
fn alone() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own");
    let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    loopback::up(any.as_fd()).expect("lo is up");
}

fn set(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) {
    sockopt::set_i32(fd, level, name, value).expect("set");
}

/// One that takes few bytes that are not read.
fn narrow_listener(at: &str) -> TcpListener {
    let listener = TcpListener::bind(at).expect("bound");
    set(listener.as_fd(), SOCKET, libc::SO_RCVBUF, 4096);
    listener
}

/// A connection: who writes, who reads, and its addresses as the writer has them.
struct Pair {
    writer: TcpStream,
    reader: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
}

impl Pair {
    fn new(listener: &TcpListener, to: SocketAddr) -> Self {
        let writer = TcpStream::connect(to).expect("connected");
        set(writer.as_fd(), SOCKET, libc::SO_SNDBUFFORCE, 8 << 20);
        let (reader, _) = listener.accept().expect("accepted");
        let local = writer.local_addr().expect("an address");
        let remote = writer.peer_addr().expect("an address");
        Self { writer, reader, local, remote }
    }

    /// Over the loopback, with little room for what is not read.
    fn narrow() -> Self {
        let listener = narrow_listener("127.0.0.1:0");
        Self::new(&listener, listener.local_addr().expect("an address"))
    }
}

/// As it is when it does not change just then.
fn quiet(mut find: impl FnMut() -> SysResult<Option<TcpConnection>>) -> Option<TcpConnection> {
    loop {
        match find() {
            Err(e) if e.code() == libc::EAGAIN => {}
            other => return other.expect("read"),
        }
    }
}

/// The connection, once all that the reader has, read or not, is acknowledged.
fn settled(
    orphans: &mut Orphans,
    pair: (SocketAddr, SocketAddr),
    reader: &TcpStream,
    read: usize,
    all: &[u8],
) -> TcpConnection {
    let mut found = None;
    wait_until("all that has come is acknowledged", || {
        let c = quiet(|| orphans.find(pair.0, pair.1)).expect("there");
        assert!(all.ends_with(&c.send_queue), "other bytes than were written");
        let there = read + sockopt::in_queue(reader.as_fd()).expect("asked");
        let settled = c.send_queue.len() + there == all.len();
        found = Some(c);
        settled
    });
    found.expect("looked at")
}

/// What repair mode tells of a connection that is open.
struct Repaired {
    sequences: [u32; 2],
    window: [u32; 5],
    mss: u32,
    timestamp: u32,
    congestion: String,
    send_buffer: i32,
}

fn repaired(fd: BorrowedFd<'_>) -> Repaired {
    let mut congestion = [0; 16];
    sockopt::get(fd, TCP, libc::TCP_CONGESTION, &mut congestion).expect("TCP_CONGESTION");
    set(fd, TCP, 19, 1);
    let sequence = |queue| {
        set(fd, TCP, 20, queue);
        sockopt::get_i32(fd, TCP, 21).expect("TCP_QUEUE_SEQ") as u32
    };
    let sequences = [sequence(2), sequence(1)];
    set(fd, TCP, 20, 0);
    let mut raw = [0; 20];
    sockopt::get(fd, TCP, 29, &mut raw).expect("TCP_REPAIR_WINDOW");
    let mut words = raw.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w));
    let mss = sockopt::get_i32(fd, TCP, libc::TCP_MAXSEG).expect("TCP_MAXSEG") as u32;
    set(fd, TCP, 19, -1);
    Repaired {
        sequences,
        window: std::array::from_fn(|_| words.next().expect("five words")),
        mss,
        timestamp: sockopt::get_i32(fd, TCP, 24).expect("TCP_TIMESTAMP") as u32,
        congestion: String::from_utf8_lossy(&congestion).trim_end_matches('\0').into(),
        send_buffer: sockopt::get_i32(fd, SOCKET, libc::SO_SNDBUF).expect("SO_SNDBUF"),
    }
}

fn until_acknowledged(pair: &Pair) {
    wait_until("what has come is acknowledged", || {
        let left = sockopt::out_queue(pair.writer.as_fd()).expect("asked");
        left + sockopt::in_queue(pair.reader.as_fd()).expect("asked") == DATA
    });
}

/// One that is open and then closed, and read to its end.
fn closes_and_is_read(orphans: &mut Orphans, listener: &TcpListener, to: SocketAddr) {
    let all = data(DATA);
    let mut pair = Pair::new(listener, to);
    pair.writer.set_nodelay(true).expect("set");
    pair.writer.write_all(&all).expect("written");
    until_acknowledged(&pair);
    let (local, remote) = (pair.local, pair.remote);
    assert_eq!(quiet(|| orphans.find(local, remote)), None, "it is open");
    let open = repaired(pair.writer.as_fd());
    until_acknowledged(&pair);
    drop(pair.writer);

    let mut reader = pair.reader;
    let first = settled(orphans, (local, remote), &reader, 0, &all);
    assert!(first.send_queue.len() > DATA / 2);
    assert_eq!((first.local, first.remote, first.state), (local, remote, TcpState::FinWait1));
    assert_eq!([first.write_seq, first.rcv_nxt], open.sequences);
    assert_eq!((first.window, first.mss), (open.window, open.mss));
    assert!(first.timestamp.expect("agreed on").wrapping_sub(open.timestamp) < 60_000);
    assert!(first.sack && first.window_scale.is_some());
    assert!(first.options.no_delay);
    assert_eq!(first.options.congestion, open.congestion);
    assert_eq!(first.options.buffers[0], open.send_buffer);
    let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    let same = quiet(|| orphans.find(plain(local), plain(remote))).expect("there");
    assert_eq!((same.local, same.send_queue), (local, first.send_queue.clone()));
    assert_eq!(quiet(|| orphans.find(remote, local)), None, "the other side is open");

    let mut read = vec![0; 50_000];
    reader.read_exact(&mut read).expect("read");
    let later = settled(orphans, (local, remote), &reader, read.len(), &all);
    assert!(later.send_queue.len() < first.send_queue.len());
    assert_eq!(later.write_seq, first.write_seq);
    reader.read_to_end(&mut read).expect("read");
    assert!(read == all);
    wait_until("nothing is left", || quiet(|| orphans.find(local, remote)).is_none());
}

#[test]
fn a_closed_connection_shows_what_it_has_still_to_send() {
    let Some(mut orphans) = opened() else { return };
    alone();
    let v4 = narrow_listener("127.0.0.1:0");
    let port = v4.local_addr().expect("an address").port();
    closes_and_is_read(&mut orphans, &v4, (Ipv4Addr::LOCALHOST, port).into());
    let mapped = (Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port);
    closes_and_is_read(&mut orphans, &v4, mapped.into());
    let v6 = narrow_listener("[::1]:0");
    closes_and_is_read(&mut orphans, &v6, v6.local_addr().expect("an address"));
    let nobody = (Ipv6Addr::LOCALHOST, 9).into();
    assert_eq!(quiet(|| orphans.find(nobody, nobody)), None);
    assert_eq!(quiet(|| orphans.find((Ipv4Addr::LOCALHOST, port).into(), nobody)), None);
    let listens = v4.local_addr().expect("an address");
    assert_eq!(quiet(|| orphans.find(listens, (Ipv4Addr::LOCALHOST, 9).into())), None);
}

#[test]
fn one_that_both_sides_have_closed() {
    let Some(mut orphans) = opened() else { return };
    alone();
    let all = data(DATA);
    for peer_first in [true, false] {
        let Pair { mut writer, mut reader, local, remote } = Pair::narrow();
        if peer_first {
            reader.shutdown(Shutdown::Write).expect("shut");
            assert_eq!(writer.read(&mut [0]).expect("read"), 0);
        }
        writer.write_all(&all).expect("written");
        drop(writer);
        let state = if peer_first { TcpState::LastAck } else { TcpState::FinWait1 };
        let before = settled(&mut orphans, (local, remote), &reader, 0, &all);
        assert_eq!(before.state, state);
        if !peer_first {
            reader.shutdown(Shutdown::Write).expect("shut");
            wait_until("both have closed", || {
                let found = quiet(|| orphans.find(local, remote)).expect("there");
                found.state == TcpState::Closing && found.rcv_nxt == before.rcv_nxt + 1
            });
        }
        let mut read = Vec::new();
        reader.read_to_end(&mut read).expect("read");
        assert!(read == all);
        wait_until("nothing is left", || quiet(|| orphans.find(local, remote)).is_none());
    }
}

/// What waits in a queue is bounded, not what was written.
#[test]
fn eight_mebibytes_are_read_and_one_byte_more_is_an_error() {
    const MOST: usize = 8 << 20;
    let Some(mut orphans) = opened() else { return };
    alone();
    for more in [0, 1] {
        let pair = Pair::narrow();
        set(pair.writer.as_fd(), SOCKET, libc::SO_SNDBUFFORCE, 32 << 20);
        let mut all = data(DATA);
        (&pair.writer).write_all(&all).expect("written");
        until_acknowledged(&pair);
        let left = sockopt::out_queue(pair.writer.as_fd()).expect("asked");
        all.extend(data(MOST + more - left));
        (&pair.writer).write_all(&all[DATA..]).expect("written");
        let Pair { writer, mut reader, local, remote } = pair;
        assert_eq!(sockopt::out_queue(writer.as_fd()).expect("asked"), MOST + more);
        drop(writer);
        let mut read = Vec::new();
        if more > 0 {
            wait_until("it is looked at in a quiet moment", || {
                let error = orphans.find(local, remote).expect_err("it is too much").code();
                assert!(error == libc::EFBIG || error == libc::EAGAIN, "{error}");
                error == libc::EFBIG
            });
            // It is little enough again as soon as the peer has taken some.
            read.resize(50_000, 0);
            reader.read_exact(&mut read).expect("read");
        }
        let found = settled(&mut orphans, (local, remote), &reader, read.len(), &all);
        assert_eq!(found.send_queue.len() == MOST, more == 0);
    }
}

/// Two networks with a cable between them; the calling thread is in the first.
struct Cable {
    names: [String; 2],
    far: Namespace,
    ends: [Network; 2],
}

impl Cable {
    fn new(name: &str) -> Self {
        let names = ["a", "b"].map(|end| format!("nl-{name}-{end}-{}", std::process::id()));
        let [near, far] = [0, 1].map(|i| Namespace::create(&names[i]).expect("a namespace"));
        let ends = [&near, &far].map(|n| Network::open(n).expect("its network"));
        ends[0].add_veth("eth0", &far, "eth0").expect("a cable");
        for (end, address) in ends.iter().zip(["10.78.0.1/24", "10.78.0.2/24"]) {
            end.add_address("eth0", address.parse().expect("cidr")).expect("address");
            end.set_up("eth0").expect("up");
        }
        let file = std::fs::File::open(Namespace::path_of(&names[0])).expect("a namespace");
        nix::sched::setns(file, CloneFlags::CLONE_NEWNET).expect("entered");
        Self { names, far, ends }
    }

    fn listener(&self) -> TcpListener {
        self.far.enter(|| narrow_listener("10.78.0.2:0")).expect("entered")
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| drop(Namespace::delete(name)));
    }
}

#[test]
fn what_was_written_in_small_pieces_and_from_a_file_or_is_an_end_alone() {
    let Some(mut orphans) = opened() else { return };
    let cable = Cable::new("small");
    let listener = cable.listener();
    let to = listener.local_addr().expect("an address");
    let scratch = Scratch::new("orphans");
    let all = data(DATA);
    std::fs::write(scratch.0.join("file"), &all).expect("written");
    let file = std::fs::File::open(scratch.0.join("file")).expect("there");
    let [small, from_file, mixed, end, bound] = std::array::from_fn(|_| Pair::new(&listener, to));
    sockopt::set(bound.writer.as_fd(), SOCKET, libc::SO_BINDTODEVICE, b"eth0\0").expect("bound");

    // From now on nothing arrives.
    cable.ends[1].set_down("eth0").expect("down");
    small.writer.set_nodelay(true).expect("set");
    for piece in all.chunks(97) {
        (&small.writer).write_all(piece).expect("written");
    }
    let sent = sendfile(&from_file.writer, &file, None, DATA).expect("sent");
    assert_eq!(sent, DATA);
    for (i, piece) in all.chunks(5_000).enumerate() {
        let mut offset = i as i64 * 5_000;
        match i % 2 {
            0 => (&mixed.writer).write_all(piece).expect("written"),
            _ => {
                let n = sendfile(&mixed.writer, &file, Some(&mut offset), piece.len());
                assert_eq!(n, Ok(piece.len()));
            }
        }
    }
    (&bound.writer).write_all(&all).expect("written");
    for (pair, expected) in
        [(small, &all[..]), (from_file, &all), (mixed, &all), (end, &[]), (bound, &all)]
    {
        let Pair { writer, reader: _reader, local, remote } = pair;
        assert_eq!(quiet(|| orphans.find(local, remote)), None, "it is open");
        drop(writer);
        let found = quiet(|| orphans.find(local, remote)).expect("there");
        assert_eq!(found.state, TcpState::FinWait1);
        assert!(found.send_queue == expected, "{} bytes", found.send_queue.len());
    }
}

/// Reads connections that end, again and again. Gives how many were read.
fn finds_while_it_is_read(orphans: &mut Orphans, listener: &TcpListener, finds: usize) -> usize {
    const ROUND: usize = 4 << 20;
    let to = listener.local_addr().expect("an address");
    let (mut tried, mut some, mut changing, mut rounds) = (0, 0, 0, 0);
    while tried < finds {
        let Pair { mut writer, mut reader, local, remote } = Pair::new(listener, to);
        rounds += 1;
        let all = &data(ROUND);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut read = Vec::with_capacity(ROUND);
                reader.read_to_end(&mut read).expect("read");
                assert!(read == *all);
            });
            writer.write_all(all).expect("written");
            drop(writer);
            let mut write_seq = None;
            loop {
                tried += 1;
                match orphans.find(local, remote) {
                    Ok(Some(c)) => {
                        some += 1;
                        let len = c.send_queue.len();
                        assert!(c.send_queue == all[ROUND - len..], "{len} bytes");
                        assert_eq!(c.write_seq, *write_seq.get_or_insert(c.write_seq));
                    }
                    Ok(None) => break,
                    Err(e) => {
                        assert_eq!(e.code(), libc::EAGAIN, "{e}");
                        changing += 1;
                    }
                }
            }
        });
    }
    println!("{tried} in {rounds} connections: {some} read, {changing} changed all the time");
    assert!(changing * 10 < tried);
    some
}

#[test]
fn it_is_read_while_the_peer_reads_at_full_speed() {
    let Some(mut orphans) = opened() else { return };
    alone();
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    assert!(finds_while_it_is_read(&mut orphans, &listener, 2000) > 200);
    let cable = Cable::new("speed");
    let listener = cable.far.enter(|| TcpListener::bind("10.78.0.2:0").expect("bound"));
    let listener = listener.expect("entered");
    assert!(finds_while_it_is_read(&mut orphans, &listener, 2000) > 200);
}

#[test]
#[ignore = "a measurement"]
fn what_it_costs() {
    const TIMES: u32 = 2000;
    let begin = Instant::now();
    let Some(mut orphans) = opened() else { return };
    println!("the first: {:?}", begin.elapsed());
    let begin = Instant::now();
    drop(opened());
    println!("another: {:?}", begin.elapsed());
    let cable = Cable::new("cost");
    let wide = cable.far.enter(|| TcpListener::bind("10.78.0.2:0").expect("bound"));
    let (wide, narrow) = (wide.expect("entered"), cable.listener());
    let sizes = [0, 1_000, 100_000, 1_000_000];
    let pair = |l: &TcpListener| Pair::new(l, l.local_addr().expect("an address"));
    let pairs: Vec<_> = sizes.iter().map(|size| (*size, [pair(&wide), pair(&narrow)])).collect();
    cable.ends[1].set_down("eth0").expect("down");
    for (size, pairs) in pairs {
        for (window, pair) in ["wide", "narrow"].iter().zip(pairs) {
            let Pair { mut writer, reader: _reader, local, remote } = pair;
            writer.write_all(&data(size)).expect("written");
            let time = |orphans: &mut Orphans, there: bool| {
                let mut times: Vec<Duration> = Vec::new();
                for _ in 0..TIMES {
                    let begin = Instant::now();
                    let found = orphans.find(local, remote).expect("read");
                    times.push(begin.elapsed());
                    assert_eq!(found.is_some(), there);
                }
                times.sort();
                (times[times.len() / 2], times[times.len() * 99 / 100])
            };
            let open = time(&mut orphans, false);
            drop(writer);
            let closed = time(&mut orphans, true);
            println!("{size} bytes, {window} window: open {open:?}, closed {closed:?}");
        }
    }
    let nobody = (Ipv4Addr::LOCALHOST, 9).into();
    let begin = Instant::now();
    (0..TIMES).for_each(|_| assert_eq!(orphans.find(nobody, nobody).expect("asked"), None));
    println!("nobody: {:?}", begin.elapsed() / TIMES);
}
