//! A container captured here and brought to life there, on the real kernel. Needs root.

mod common;

use common::{CONTAINER, Lan, Original, Scratch, numbers, wait_until};
use replicator::capture::CaptureError;
use replicator::image::net::TcpConnection;
use replicator::image::task::Scheduling;
use replicator::image::{Kind, State};
use replicator::restore::Peer;
use replicator::sys::sched;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn a_counter_goes_on_where_the_last_checkpoint_was_taken() {
    let dir = Scratch::new("restore-counter");
    let script = "i=0; while :; do i=$((i+1)); echo $i; done";
    let mut original = Original::start(&dir, &["sh", "-c", script]);
    let console = original.console();
    original.pump_until("it counts", || numbers(&console).len() > 100);

    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    for _ in 0..5 {
        let before = numbers(&console).len();
        original.pump_until("it counts on", || numbers(&console).len() > before + 100);
        original.checkpoint();
        original.bring(&mut spare);
    }
    let at_checkpoint = numbers(&console).len() as u64;
    original.kill();
    std::fs::write(&console, "").expect("empty console");

    spare.prepare().expect("prepare");
    let resumption = spare.connect(|_| Peer::Silent).expect("connect");
    assert_eq!(resumption, Default::default());
    spare.push_unsent().expect("nothing to send");
    let restored = spare.complete().expect("complete");
    assert_eq!((restored.len(), restored[0].pid, restored[0].tids.len()), (1, 1, 1));
    assert_eq!(std::fs::read_to_string(&console).expect("console"), "", "nothing runs yet");
    spare.resume_all().expect("resume");
    wait_until("it counts again", || numbers(&console).len() > 100);
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    let after = numbers(&console);
    assert!(after[0] > 500 && after[0] <= at_checkpoint + 1, "{} of {at_checkpoint}", after[0]);
    assert!(after.windows(2).all(|w| w[1] == w[0] + 1), "{after:?}");
}

/// Redis writes a dump under one name and gives it another when it is whole. If its host is lost just
/// then, the checkpoint knows the first name only.
#[test]
fn a_file_that_is_only_written_may_be_gone() {
    let dir = Scratch::new("restore-gone");
    let script = "exec 3>dump; i=0; while :; do i=$((i+1)); echo $i >&3; echo $i; done";
    let mut original = Original::start(&dir, &["sh", "-c", script]);
    let console = original.console();
    original.pump_until("it counts", || numbers(&console).len() > 100);
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    original.kill();
    let (first, second) = (dir.0.join("dump"), dir.0.join("dump.whole"));
    std::fs::rename(&first, &second).expect("renamed");
    let whole = std::fs::read(&second).expect("a dump");
    std::fs::write(&console, "").expect("empty console");

    spare.prepare().expect("prepare");
    spare.connect(|_| Peer::Silent).expect("connect");
    spare.push_unsent().expect("nothing to send");
    spare.complete().expect("complete");
    spare.resume_all().expect("resume");
    wait_until("it counts again", || numbers(&console).len() > 100);
    assert!(!first.exists(), "nobody takes it for a dump");
    assert_eq!(std::fs::read(&second).expect("a dump"), whole, "this one stays as it is");
    let link = std::fs::read_link(format!("/proc/{}/fd/3", spare.pid())).expect("a link");
    assert_eq!(link.to_string_lossy(), format!("{} (deleted)", first.display()));
}

/// What a program would read from another file could be wrong.
#[test]
fn a_file_that_is_read_must_be_there() {
    for (how, strict) in [("3<dump", false), ("3<>dump", false), ("3>dump", true)] {
        let dir = Scratch::new("restore-read");
        let file = dir.0.join("dump");
        std::fs::write(&file, "some").expect("written");
        let script = format!("exec {how}; echo 1; exec sleep 1000");
        let mut original = Original::start(&dir, &["sh", "-c", &script]);
        let console = original.console();
        original.pump_until("it sleeps", || !numbers(&console).is_empty());
        original.checkpoint();
        let mut spare = original.spare();
        original.bring(&mut spare);
        original.kill();
        std::fs::remove_file(&file).expect("removed");
        if strict {
            spare.insist_on_files();
        }
        let error = spare.prepare().expect_err("the file is gone").to_string();
        assert!(error.contains("make an open file"), "{how}: {error}");
    }
}

/// Whoever brings them back is real-time and makes them so for its calls.
#[test]
fn threads_run_as_the_program_has_them_whoever_brings_them_back() {
    const PROGRAM: &str = "import os, threading, time
def sleep():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    time.sleep(1000)
threading.Thread(target=time.sleep, args=[1000]).start()
threading.Thread(target=sleep).start()
time.sleep(0.2)
print(1, flush=True)
time.sleep(1000)";
    let dir = Scratch::new("restore-classes");
    let mut original = Original::start(&dir, &["python3", "-c", PROGRAM]);
    let console = original.console();
    original.pump_until("it sleeps", || !numbers(&console).is_empty());
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    original.kill();

    sched::set_fifo(20).expect("real-time");
    spare.prepare().expect("prepare");
    let prepared = sched::attributes(spare.pid()).expect("read");
    spare.connect(|_| Peer::Silent).expect("connect");
    spare.push_unsent().expect("nothing to send");
    let restored = spare.complete().expect("complete");
    sched::set_ordinary().expect("ordinary");
    let classes: Vec<Scheduling> =
        restored[0].tids.iter().map(|tid| sched::attributes(*tid).expect("read")).collect();
    assert_eq!(classes.iter().map(|c| c.nice).collect::<Vec<_>>(), [0, 0, 5]);
    for class in [prepared].iter().chain(&classes) {
        assert_eq!((class.policy, class.flags, class.priority), (0, 0, 0), "{class:?}");
    }
}

/// Sends a line to redis and gives the first line of the answer.
fn ask(stream: &mut TcpStream, line: &str) -> String {
    stream.write_all(format!("{line}\r\n").as_bytes()).expect("sent");
    answer(stream)
}

fn answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).trim_end().to_string()
}

#[test]
fn redis_goes_on_with_its_memory_threads_and_fifty_connections() {
    if Command::new("redis-server").arg("--version").output().is_err() {
        println!("skipped: redis-server is not installed");
        return;
    }
    let dir = Scratch::new("restore-redis");
    let lan = Lan::new("redis");
    let command = "redis-server --port 6379 --bind 0.0.0.0 --protected-mode no --appendonly no \
                   --enable-debug-command yes --save";
    let mut command: Vec<&str> = command.split_whitespace().collect();
    command.push("");
    let mut original = Original::start_with(&dir, &command, |pid| lan.connect(pid, "first"));
    lan.plug("first");
    let console = original.console();
    original.pump_until("redis is ready", || {
        std::fs::read_to_string(&console).expect("console").contains("Ready to accept")
    });
    let mut clients: Vec<TcpStream> = Vec::new();
    while clients.len() < 50 {
        let connect = || TcpStream::connect((CONTAINER, 6379)).expect("connected");
        let client = lan.namespace.enter(connect).expect("entered");
        client.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
        clients.push(client);
    }
    assert_eq!(ask(&mut clients[0], "DEBUG POPULATE 400000 key 150"), "+OK");

    let mut spare = None;
    for round in 0..6 {
        for i in 0..1000 {
            let at = (i * 7919 + round) % 400_000;
            ask(&mut clients[1], &format!("SET key:{at} changed{round}"));
        }
        for (i, client) in clients.iter_mut().enumerate() {
            assert_eq!(ask(client, &format!("INCR n{i}")), format!(":{}", round + 1));
        }
        match &mut spare {
            None => {
                original.checkpoint();
                let mut fresh = original.spare();
                let begin = Instant::now();
                original.bring(&mut fresh);
                println!("full: {} pages in {:?}", original.pages.pages(), begin.elapsed());
                lan.connect(fresh.pid(), "second");
                spare = Some(fresh);
            }
            Some(spare) => {
                let took = original.follow(spare);
                println!("delta: {} pages in {took:?}", original.pages.pages());
            }
        }
    }
    let mut spare = spare.expect("a spare");
    // An answer that is written while the network is down stays in the send queue.
    clients[2].write_all(b"DEBUG SLEEP 0.2\r\nGET key:3\r\n").expect("sent");
    std::thread::sleep(Duration::from_millis(50));
    lan.unplug("first");
    let waiting = clients[2].local_addr().expect("address");
    let pending = |state: &State| {
        state.descriptions.iter().any(|d| match &d.kind {
            Kind::Tcp(c) => c.remote == waiting && c.send_queue.starts_with(b"+OK"),
            _ => false,
        })
    };
    while !pending(&original.state) {
        original.follow(&mut spare);
    }
    original.kill();

    spare.prepare().expect("prepare");
    let expects =
        |c: &TcpConnection| Peer::Expects(c.write_seq.wrapping_sub(c.send_queue.len() as u32));
    let resumption = spare.connect(expects).expect("connect");
    assert_eq!(resumption, Default::default());
    lan.plug("second");
    spare.push_unsent().expect("send");
    let restored = spare.complete().expect("complete");
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    assert!(restored[0].tids.len() >= 4, "{restored:?}");
    spare.resume_all().expect("resume");
    assert_eq!(answer(&mut clients[2]), "+OK");
    assert!(answer(&mut clients[2]).starts_with('$'));
    answer(&mut clients[2]);
    for (i, client) in clients.iter_mut().enumerate() {
        assert_eq!(ask(client, &format!("INCR n{i}")), ":7");
    }
    assert_eq!(ask(&mut clients[3], "DBSIZE"), ":400050");
    assert_eq!(ask(&mut clients[3], "GET key:5"), "$8");
    assert_eq!(answer(&mut clients[3]), "changed5");
    // Its background threads work, and so do new connections.
    assert_eq!(ask(&mut clients[3], "FLUSHALL ASYNC"), "+OK");
    let connect = || TcpStream::connect((CONTAINER, 6379)).expect("connected");
    let mut late = lan.namespace.enter(connect).expect("entered");
    assert_eq!(ask(&mut late, "DBSIZE"), ":0");
}

/// Not a test: the program that runs in the container of the next one.
#[test]
fn subject() {
    if std::env::var_os(common::SUBJECT).is_some() {
        common::subject::run();
    }
}

/// The last number in the lines of a console that start with a word.
fn last(console: &Path, word: &str) -> u64 {
    let text = std::fs::read_to_string(console).expect("console");
    assert!(!text.contains("panicked"), "{text}");
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut numbers = whole.lines().rev().filter_map(|l| l.strip_prefix(word)?.trim().parse().ok());
    numbers.next().unwrap_or(0)
}

#[test]
fn a_program_with_one_of_everything_goes_on() {
    let dir = Scratch::new("restore-everything");
    let exe = std::env::current_exe().expect("a path");
    let command =
        [exe.to_str().expect("a path"), "subject", "--exact", "--nocapture", "--test-threads=1"];
    let mut original = Original::start(&dir, &command);
    let console = original.console();
    original.pump_until("it ticks", || last(&console, "tick") > 5);
    original.checkpoint();
    let mut spare = original.spare();
    original.bring(&mut spare);
    for _ in 0..5 {
        let before = last(&console, "tick");
        original.pump_until("it ticks on", || last(&console, "tick") > before + 2);
        original.follow(&mut spare);
    }
    let (threads, processes) =
        (original.state.processes[0].threads.len(), original.state.processes.len());
    assert!(threads >= 5 && processes == 2, "{threads} threads, {processes} processes");
    let at_checkpoint = last(&console, "tick");
    original.kill();
    std::fs::write(&console, "").expect("empty console");

    spare.prepare().expect("prepare");
    let resumption = spare.connect(|_| Peer::Silent).expect("connect");
    spare.push_unsent().expect("nothing to send");
    let restored = spare.complete().expect("complete");
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    assert_eq!(restored.len(), 2);
    spare.detach_all().expect("let go");
    wait_until("it ticks again", || last(&console, "tick") > at_checkpoint + 20);
    std::fs::write(dir.0.join(common::subject::VERIFY), "").expect("written");
    let mut text = String::new();
    wait_until("everything is there", || {
        text = std::fs::read_to_string(&console).expect("console");
        assert!(!text.contains("panicked"), "{text}");
        text.contains("verified")
    });
    let verified = text.lines().find_map(|l| l.strip_prefix("verified ")).expect("a line");
    let left: Vec<String> =
        resumption.fins.iter().map(|s| format!("{} {}", s.local, s.remote)).collect();
    assert_eq!(left, [verified], "the connection that its peer has left");
    assert_eq!(resumption.resets, []);
    let heard = last(&console, "heard");
    assert!(heard > at_checkpoint, "{heard} words of {at_checkpoint}");
}

#[test]
fn processes_come_and_go_with_their_sessions_and_users() {
    let dir = Scratch::new("restore-tree");
    let script = r#"
        sh -c 'while [ ! -e stop-a ]; do :; done' & a=$!
        wait $a
        setsid setpriv --reuid 65534 --regid 65534 --clear-groups sh -c '
            while [ ! -e ask ]; do :; done; echo b $$ $PPID $(id -u) $(id -g); exit 7' & b=$!
        sleep 1000 &
        echo started $a $b
        wait $b; echo waited $?
        while :; do sleep 1; done
    "#;
    let mut original = Original::start(&dir, &["sh", "-c", script]);
    let pids = |state: &State| state.processes.iter().map(|p| p.pid).collect::<Vec<_>>();
    while pids(&original.state).len() != 2 {
        original.checkpoint();
    }
    let first = pids(&original.state)[1];
    let mut spare = original.spare();
    original.capturer.begin_full();
    original.follow(&mut spare);
    std::fs::write(dir.0.join("stop-a"), "").expect("written");
    let console = original.console();
    original.pump_until("the second child runs", || {
        std::fs::read_to_string(&console).expect("console").contains("started")
    });
    loop {
        original.follow(&mut spare);
        let now = &original.state.processes;
        let b = now.iter().find(|p| p.sid == p.pid && p.pid != 1);
        if now.len() == 3 && b.is_some_and(|p| p.creds.uids == [65534; 4] && p.exe.contains("sh")) {
            break;
        }
    }
    assert!(!pids(&original.state).contains(&first));
    original.kill();
    std::fs::write(&console, "").expect("empty console");

    spare.prepare().expect("prepare");
    spare.connect(|_| Peer::Silent).expect("connect");
    let restored = spare.complete().expect("complete");
    assert_eq!(restored.len(), 3);
    spare.detach_all().expect("let go");
    std::fs::write(dir.0.join("ask"), "").expect("written");
    wait_until("its parent has waited for it", || {
        std::fs::read_to_string(&console).expect("console").contains("waited 7")
    });
    let text = std::fs::read_to_string(&console).expect("console");
    let line = text.lines().find(|l| l.starts_with("b ")).expect("a line");
    assert!(line.ends_with(" 1 65534 65534"), "{text}");
}

/// No test but the program of the next one: as the first process of a container it crashes.
#[test]
fn crasher() {
    if std::process::id() == 1 {
        std::process::abort();
    }
}

#[test]
fn a_first_process_that_crashes_ends_although_it_is_traced() {
    let dir = Scratch::new("restore-crash");
    let exe = std::env::current_exe().expect("a path");
    let exe = exe.to_str().expect("a path");
    let command = [exe, "crasher", "--exact", "--nocapture", "--test-threads=1"];
    let mut original = Original::start(&dir, &command);
    wait_until("it ends", || matches!(original.capturer.pump(), Err(CaptureError::Ended)));
}
