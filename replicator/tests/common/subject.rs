//! A program with one of everything that a checkpoint can hold, which notices if any of it is
//! wrong afterwards. It is the test program itself, run in a container.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Made in the working directory by the test to ask for the last look at everything.
pub const VERIFY: &str = "verify";
const THREADS: usize = 4;

/// Threads that count along, each waking the next.
#[derive(Default)]
struct Ring {
    turn: Mutex<u64>,
    changed: Condvar,
}

impl Ring {
    fn start(self: &Arc<Self>) {
        for i in 1..=THREADS as u64 {
            let ring = self.clone();
            let round = THREADS as u64 + 1;
            let pass = move || loop {
                let mut turn = ring.turn.lock().expect("no panic");
                while *turn % round != i {
                    turn = ring.changed.wait(turn).expect("no panic");
                }
                *turn += 1;
                ring.changed.notify_all();
            };
            std::thread::Builder::new().name(format!("ring-{i}")).spawn(pass).expect("a thread");
        }
    }

    /// Once around; gives the number of hands it went through.
    fn go_around(&self) -> u64 {
        let mut turn = self.turn.lock().expect("no panic");
        *turn += 1;
        self.changed.notify_all();
        while !(*turn).is_multiple_of(THREADS as u64 + 1) {
            turn = self.changed.wait(turn).expect("no panic");
        }
        *turn
    }
}

/// What is set up once and looked at in the end.
struct Kept {
    pipe: (OwnedFd, OwnedFd),
    event: EventFd,
    unix: (OwnedFd, OwnedFd),
    datagrams: (OwnedFd, OwnedFd),
    file: File,
    left: TcpStream,
    unread: (TcpStream, TcpStream),
}

fn set_up(listener: &TcpListener) -> Kept {
    let port = listener.local_addr().expect("address").port();
    let pair = || {
        let a = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        (a, listener.accept().expect("accepted").0)
    };
    let pipe = nix::unistd::pipe().expect("a pipe");
    nix::unistd::write(&pipe.1, b"in the pipe").expect("written");
    let unix = |kind| {
        let pair = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
        pair.expect("a pair")
    };
    let (stream, datagrams) = (unix(SockType::Stream), unix(SockType::Datagram));
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open("file")
        .expect("a file");
    file.write_all(b"0123456789").expect("written");
    file.seek(SeekFrom::Start(4)).expect("sought");
    let (peer, left) = pair();
    drop(peer);
    let mut unread = pair();
    unread.0.write_all(b"in the connection").expect("written");
    let event = EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE).expect("an eventfd");
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    blocked.thread_block().expect("blocked");
    raise(Signal::SIGUSR1).expect("raised");
    umask(Mode::from_bits_truncate(0o027));
    Kept { pipe, event, unix: stream, datagrams, file, left, unread }
}

fn read(fd: impl AsFd) -> String {
    let mut buf = [0; 100];
    let n = nix::unistd::read(fd, &mut buf).expect("read");
    String::from_utf8_lossy(&buf[..n]).into_owned()
}

fn verify(mut kept: Kept) {
    assert_eq!(read(&kept.pipe.0), "in the pipe");
    assert_eq!(kept.event.read().expect("read"), 1, "a semaphore");
    nix::unistd::write(&kept.unix.0, b"through the socket").expect("written");
    assert_eq!(read(&kept.unix.1), "through the socket");
    for message in [&b"one"[..], b"three"] {
        nix::unistd::write(&kept.datagrams.0, message).expect("written");
    }
    assert_eq!(read(&kept.datagrams.1), "one");
    assert_eq!(read(&kept.datagrams.1), "three");
    let mut rest = String::new();
    kept.file.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "456789");
    let mut buf = [0; 17];
    kept.unread.1.read_exact(&mut buf).expect("read");
    assert_eq!(&buf, b"in the connection");
    kept.unread.1.write_all(b"back").expect("written");
    assert_eq!(read(&kept.unread.0), "back");
    let mut usr1 = SigSet::empty();
    usr1.add(Signal::SIGUSR1);
    assert_eq!(usr1.wait().expect("a signal"), Signal::SIGUSR1);
    File::create("made-late").expect("a file");
    let mode = std::fs::metadata("made-late").expect("there").mode();
    assert_eq!(mode & 0o777, 0o640, "the umask");
    let name = std::fs::read_to_string("/proc/thread-self/comm").expect("a name");
    assert_eq!(name.trim(), "subject");
    let exe = std::fs::read_link("/proc/self/exe").expect("a link");
    assert!(exe.to_string_lossy().contains("restore-"), "{exe:?}");
    let local = kept.left.local_addr().expect("address");
    let remote = kept.left.peer_addr().expect("address");
    println!("verified {local} {remote}");
}

/// A child that gives back what it is told.
fn echo(child: &mut (ChildStdin, BufReader<ChildStdout>), tick: u64) {
    writeln!(child.0, "{tick}").expect("told");
    let mut line = String::new();
    child.1.read_line(&mut line).expect("heard");
    assert_eq!(line, format!("child {tick}\n"));
}

/// Runs until it is killed.
#[allow(clippy::zombie_processes, reason = "its child runs as long as it does")]
pub fn run() -> ! {
    const TIMER: u64 = 1;
    const CONNECTION: u64 = 2;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut kept = Some(set_up(&listener));
    let mut talker =
        TcpStream::connect(listener.local_addr().expect("address")).expect("connected");
    let mut hearer = listener.accept().expect("accepted").0;
    talker.set_nodelay(true).expect("set");
    let script = "while read x; do echo child $x; done";
    let mut child = Command::new("sh")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    let mut child = (child.stdin.take().expect("piped"), stdout);
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).expect("a timer");
    let period = TimeSpec::from_duration(Duration::from_millis(5));
    let every = Expiration::Interval(period);
    timer.set(every, TimerSetTimeFlags::empty()).expect("set");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll instance");
    epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER)).expect("added");
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    epoll.add(&hearer, EpollEvent::new(edge, CONNECTION)).expect("added");
    let ring = Arc::new(Ring::default());
    ring.start();
    let (mut tick, mut heard) = (0u64, 0u64);
    let mut events = [EpollEvent::empty(); 4];
    loop {
        let n = match epoll.wait(&mut events, EpollTimeout::from(10_000u16)) {
            Ok(n) => n,
            Err(e) => panic!("epoll_wait: {e}"),
        };
        assert!(n > 0, "the timer has stopped");
        for event in &events[..n] {
            if event.data() == TIMER {
                timer.wait().expect("read");
                tick += 1;
                talker.write_all(&tick.to_ne_bytes()).expect("written");
                echo(&mut child, tick);
                assert_eq!(ring.go_around(), tick * (THREADS as u64 + 1));
                println!("tick {tick}");
            } else {
                let mut word = [0; 8];
                // A wake-up may be one too many, but no word is.
                hearer.set_nonblocking(true).expect("set");
                while hearer.read_exact(&mut word).is_ok() {
                    heard += 1;
                    assert_eq!(u64::from_ne_bytes(word), heard);
                }
                hearer.set_nonblocking(false).expect("set");
                println!("heard {heard}");
            }
        }
        if kept.is_some() && std::path::Path::new(VERIFY).exists() {
            verify(kept.take().expect("once"));
        }
    }
}
