//! What a glance shows of a stopped process is what there is: descriptors that change in every way
//! between the look ahead and the stop, each stop compared with a look at them one by one. Needs
//! root.

mod common;

use common::stage::{Stage, obey};
use common::{Original, Scratch, wait_until};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use replicator::Epoch;
use replicator::capture::{CaptureError, Glances, NoBoundary, warm_up};
use replicator::image::{Kind, Process};
use replicator::sys::sockopt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

const PORT: u16 = 7100;

/// Not a test: the program that runs in the container, and does what it is told.
#[test]
fn subject() {
    if std::env::var_os(common::SUBJECT).is_some() {
        run();
    }
}

fn run() {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut epolls: Vec<Epoll> = Vec::new();
    let mut events: Vec<EventFd> = Vec::new();
    let mut spare: Vec<OwnedFd> = Vec::new();
    let mut files: Vec<std::fs::File> = Vec::new();
    let mut memory = Vec::new();
    let event = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
    obey(PORT, |listener, words| {
        let n = |at: usize| words[at].parse::<usize>().expect("a number");
        match words[0] {
            "accept" => streams.push(listener.accept().expect("accepted").0),
            "write" => streams[n(1)].write_all(&vec![n(3) as u8; n(2)]).expect("written"),
            "read" => streams[n(1)].read_exact(&mut vec![0; n(2)]).expect("read"),
            "set" => {
                let fd = streams[n(1)].as_fd();
                sockopt::set_i32(fd, n(2) as i32, n(3) as i32, n(4) as i32).expect("set");
            }
            "listener" => {
                let fd = listener.as_fd();
                sockopt::set_i32(fd, n(1) as i32, n(2) as i32, n(3) as i32).expect("set");
            }
            "close" => drop(streams.remove(n(1))),
            "create" => files.push(std::fs::File::create(words[1]).expect("made")),
            "directory" => std::fs::create_dir(words[1]).expect("made"),
            "rename" => std::fs::rename(words[1], words[2]).expect("renamed"),
            "pipe" => {
                let (read, write) = nix::unistd::pipe().expect("a pipe");
                spare.extend([read, write]);
            }
            "fill" => drop(nix::unistd::write(&spare[1], &vec![7; n(1)]).expect("written")),
            "empty" => drop(nix::unistd::read(&spare[0], &mut vec![0; n(1)]).expect("read")),
            "widen" => {
                fcntl(&spare[0], FcntlArg::F_SETPIPE_SZ(n(1) as i32)).expect("set");
            }
            "map" => {
                // So much that the kernel makes a mapping of it.
                memory.push(vec![1u8; n(1) << 20]);
            }
            "unmap" => drop(memory.pop()),
            "dup" => spare.push(streams[n(1)].try_clone().expect("a duplicate").into()),
            "undup" => spare.clear(),
            "keep" => {
                fcntl(&streams[n(1)], FcntlArg::F_SETFD(FdFlag::empty())).expect("set");
            }
            "block" => streams[n(1)].set_nonblocking(n(2) == 0).expect("set"),
            "epoll" => epolls.push(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll")),
            "watch" => epolls[n(1)].add(&streams[n(2)], event(n(3) as u64)).expect("added"),
            "change" => {
                epolls[n(1)].modify(&streams[n(2)], &mut event(n(3) as u64)).expect("changed");
            }
            "forget" => epolls[n(1)].delete(&streams[n(2)]).expect("taken out"),
            "event" => events.push(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd")),
            "count" => drop(events[n(1)].write(n(2) as u64).expect("counted")),
            // Another kind of thing at the same number, with the same inode.
            "swap" => {
                let number = events[n(1)].as_fd().as_raw_fd();
                drop(events.remove(n(1)));
                // The lowest number that is free.
                let fresh = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
                assert_eq!(fresh.0.as_raw_fd(), number);
                epolls.push(fresh);
            }
            // It can be told nothing meanwhile.
            "flood" => {
                let mut stream = streams[n(1)].try_clone().expect("a duplicate");
                std::thread::spawn(move || {
                    for round in 0..4u8 {
                        wait_until("it is told", || Path::new(&format!("go{round}")).exists());
                        stream.write_all(&[round; 100]).expect("written");
                        std::fs::write(format!("done{round}"), "").expect("said");
                    }
                });
            }
            other => panic!("{other}?"),
        }
    });
}

#[test]
fn whatever_changes_before_a_stop_is_seen_in_it() {
    if !warm_up() {
        println!("skipped: this kernel shows descriptors one by one only");
        return;
    }
    let mut stage = Stage::new("glances", PORT);
    let set = |i, level, name, value| format!("set {i} {level} {name} {value}");
    let steps: Vec<String> = [
        "accept",
        "accept",
        "epoll",
        "epoll",
        "watch 0 0 7",
        "watch 0 1 8",
        "change 0 1 9",
        "forget 0 0",
        "watch 1 1 3",
        "watch 0 0 2",
        "forget 1 1",
        "dup 0",
        "undup",
        "event",
        "count 0 3",
        "event",
        "swap 0",
        "write 0 100 1",
        "write 1 5000 2",
        "keep 0",
        "block 1 0",
        "block 1 1",
    ]
    .map(String::from)
    .into_iter()
    .chain([
        set(0, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        set(0, libc::IPPROTO_TCP, libc::TCP_CORK, 1),
        set(0, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
        set(0, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 777),
        set(0, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 7777),
        set(0, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        set(0, libc::SOL_SOCKET, libc::SO_SNDBUF, 100_000),
        set(0, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 2),
        set(0, libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
        set(0, libc::IPPROTO_IP, libc::IP_TOS, 8),
        set(0, libc::IPPROTO_IP, libc::IP_TTL, 9),
        set(0, libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        set(0, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        format!("listener {} {} 1", libc::SOL_SOCKET, libc::SO_KEEPALIVE),
        "close 0".into(),
        "accept".into(),
    ])
    .collect();
    let mut glanced = 0;
    for step in &steps {
        stage.look_ahead();
        stage.does(step);
        stage.stop();
        // Nothing has changed since: now all can be seen at once.
        stage.look_ahead();
        let times = stage.stop();
        println!("{step}: {} descriptors at a glance", times.glanced);
        glanced = times.glanced;
    }
    // The listener, three connections, three epoll instances, an eventfd.
    assert!(glanced >= 8, "only {glanced} at a glance");
}

#[test]
fn queues_are_what_they_are_at_each_stop() {
    if !warm_up() {
        println!("skipped: this kernel shows descriptors one by one only");
        return;
    }
    let mut stage = Stage::new("queues", PORT);
    for _ in 0..2 {
        stage.does("accept");
    }
    stage.look_ahead();
    stage.stop();
    // What the container has received and not read.
    for (round, bytes) in [b"one".as_slice(), b"two2", b"three"].into_iter().enumerate() {
        stage.clients[0].write_all(bytes).expect("sent");
        stage.settle();
        stage.stop();
        let queue = stage.connection(0).receive_queue.clone();
        assert!(queue.ends_with(bytes), "round {round}: {queue:?}");
        stage.stop();
        assert_eq!(stage.connection(0).receive_queue, queue, "nothing has changed");
    }
    stage.does("read 0 3");
    stage.stop();
    assert_eq!(stage.connection(0).receive_queue, b"two2three");
    // As many bytes as were read, and others: the length alone says nothing.
    stage.does("read 0 4");
    stage.clients[0].write_all(b"four").expect("sent");
    stage.settle();
    stage.stop();
    assert_eq!(stage.connection(0).receive_queue, b"threefour");

    // What it has sent and nobody acknowledges, because the cable is cut. So it is told in another
    // way.
    stage.does("flood 1");
    stage.look_ahead();
    stage.lan.unplug("cable");
    let mut sent = Vec::new();
    for round in 0..4u8 {
        std::fs::write(stage.original.dir.join(format!("go{round}")), "").expect("told");
        let done = stage.original.dir.join(format!("done{round}"));
        stage.original.pump_until("it has written", || done.exists());
        sent.extend([round; 100]);
        stage.stop();
        assert_eq!(stage.connection(1).send_queue, sent, "round {round}");
        stage.stop();
        assert_eq!(stage.connection(1).send_queue, sent, "nothing has changed");
    }
}

#[test]
fn whatever_a_thread_changes_before_a_stop_is_seen_in_it() {
    if !warm_up() {
        println!("skipped: this kernel shows threads one by one only");
        return;
    }
    let dir = Scratch::new("settings");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/subjects/settings.py");
    let mut original = Original::start(&dir, &["python3", script]);
    original.capturer.set_glances(Glances::Checked);
    let console = original.console();
    let says = |word: &str| std::fs::read_to_string(&console).is_ok_and(|s| s.contains(word));
    original.pump_until("it is ready", || says("ready"));
    let look_ahead = |o: &mut Original| {
        let tried = o.capturer.prepare().and_then(|()| o.capturer.precopy());
        assert!(tried.is_ok(), "{tried:?}");
    };
    let stop = |o: &mut Original| loop {
        o.epoch += 1;
        match o.capturer.stop(Epoch(o.epoch), &mut NoBoundary, &mut o.state, &mut o.pages) {
            Err(CaptureError::Transient(_)) => {}
            other => return other.expect("a glance shows what is there").unasked,
        }
    };
    look_ahead(&mut original);
    stop(&mut original);
    let shows = |p: &Process| {
        let of_threads = p
            .threads
            .iter()
            .map(|t| (t.blocked, t.pending.len(), t.altstack, &t.comm, &t.settings));
        let of_threads: Vec<_> = of_threads.collect();
        let outside = (p.umask, &p.cwd, &p.limits, &p.creds);
        format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {outside:?} {of_threads:?}",
            p.actions,
            p.pending.len(),
            p.mm.brk,
            p.dumpable,
            p.place,
            p.settings,
        )
    };
    let mut before = String::new();
    let (mut changes, mut number) = (0, 0);
    while !says("through") {
        // What was read ahead is old at the stop.
        look_ahead(&mut original);
        std::fs::write(dir.0.join(format!("go{number}")), "").expect("told");
        let done = dir.0.join(format!("done{number}"));
        original.pump_until("it is done", || done.exists());
        stop(&mut original);
        let now = shows(&original.state.processes[0]);
        changes += usize::from(now != before);
        look_ahead(&mut original);
        let unasked = stop(&mut original);
        let again = shows(&original.state.processes[0]);
        assert!(now == again, "change {number}: {now}\nis {again}");
        before = again;
        let runs = p_has_timers(&original);
        println!("change {number}: {unasked} not asked");
        assert!(unasked >= 1 || runs, "change {number}: it is asked although nothing changes");
        number += 1;
        original.pump_until("it waits", || says("through") || number < 39);
    }
    assert!(changes >= 28, "{changes} of {number} changes show");
}

fn p_has_timers(original: &Original) -> bool {
    original.state.processes[0].timers.interval.iter().any(|t| t.value != 0)
}

#[test]
fn names_pipes_and_mappings_are_what_they_are_at_each_stop() {
    if !warm_up() {
        println!("skipped: this kernel shows descriptors one by one only");
        return;
    }
    let mut stage = Stage::new("names", PORT);
    // Believed, or it would be looked at one by one.
    stage.original.capturer.set_glances(Glances::On);
    let at = stage.original.dir.to_string_lossy().into_owned();
    let steps = [
        format!("directory {at}/a"),
        format!("create {at}/a/one"),
        format!("rename {at}/a/one {at}/a/two"),
        format!("directory {at}/b"),
        format!("rename {at}/a/two {at}/b/two"),
        format!("create {at}/other"),
        format!("rename {at}/other {at}/b/two"),
        format!("rename {at}/b/two {at}/a/three"),
        "pipe".into(),
        "fill 100".into(),
        "empty 60".into(),
        "empty 40".into(),
        "widen 1048576".into(),
        "fill 70000".into(),
        "empty 70000".into(),
        "undup".into(),
        "map 3".into(),
        "map 40".into(),
        "unmap".into(),
        "map 40".into(),
        "unmap".into(),
    ];
    for step in &steps {
        stage.look_ahead();
        stage.does(step);
        stage.stop();
        stage.shows_what_there_is(step);
        stage.stop();
        stage.shows_what_there_is(step);
    }
}

impl Stage {
    /// Has the program do something, and waits until all of it is sent.
    fn does(&mut self, line: &str) {
        self.tell(line);
        self.settle();
    }

    /// Compares paths, pipes and mappings of the last stop with /proc.
    fn shows_what_there_is(&self, step: &str) {
        let (state, pid) = (&self.original.state, self.original.launched.pid);
        let process = &state.processes[0];
        for fd in &process.fds {
            let link = std::fs::read_link(format!("/proc/{pid}/fd/{}", fd.number)).expect("there");
            let there = link.to_string_lossy();
            match &state.descriptions[fd.description as usize].kind {
                Kind::File { path, .. } => assert_eq!(*path, there, "{step}"),
                Kind::Object { .. } => assert!(there.ends_with(" (deleted)"), "{step}: {there}"),
                Kind::Pipe(at) => {
                    let pipe = &state.pipes[*at as usize];
                    let end = std::fs::File::open(format!("/proc/{pid}/fd/{}", fd.number));
                    // The end that writes cannot be read.
                    let Ok(end) = end else { continue };
                    let waits = sockopt::in_queue(end.as_fd()).expect("asked");
                    let holds = fcntl(&end, FcntlArg::F_GETPIPE_SZ).expect("asked");
                    let shown = (pipe.contents.len(), pipe.capacity as i32);
                    assert_eq!(shown, (waits, holds), "{step}");
                }
                _ => {}
            }
        }
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        let shown = process.mappings.iter().map(|m| (m.start, m.end));
        let shown: Vec<_> = shown.collect();
        for line in maps.lines().filter(|l| l.contains(" rw-p ") && !l.contains('[')) {
            let (start, end) =
                line.split(' ').next().expect("a range").split_once('-').expect("two");
            let number = |hex| u64::from_str_radix(hex, 16).expect("hexadecimal");
            let (start, end) = (number(start), number(end));
            // A mapping may be shown in parts; the scratch area is ours.
            let covered: u64 =
                shown.iter().map(|(s, e)| (*e).min(end).saturating_sub((*s).max(start))).sum();
            assert!(covered == end - start || end <= 0x50000, "{step}: {line}");
        }
    }
}
