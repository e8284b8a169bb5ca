//! The load generator must see what is wrong: each fault is reported, in the right field.

mod common;

use common::{Action, Embedded, config, proxy, run};
use nilicon_clients::load::{self, LoadConfig, LoadHandle, Phase};
use nilicon_clients::resp::Reply;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

#[test]
fn without_faults_the_proxy_changes_nothing() {
    let server = Embedded::start(2);
    let target = proxy(server.address, Box::new(|_, reply| Action::Send(vec![reply])));
    let report = run(LoadConfig { fresh_audit: true, ..config(target) });
    assert!(report.is_clean(), "{report:#?}");
    assert!(report.requests > 100);
}

/// What a failover without output commit does: writes that clients were told of are gone.
#[test]
fn a_rollback_is_seen_while_the_load_runs() {
    let server = Embedded::start(2);
    let handle = LoadHandle::new();
    let watcher = thread::spawn({
        let (handle, store) = (handle.clone(), server.store.clone());
        move || {
            await_replies(&handle, 1000);
            let old = store.snapshot();
            await_replies(&handle, 5000);
            store.restore(&old);
            let then = handle.progress().replies;
            await_replies(&handle, then + 5000);
            handle.stop();
        }
    });
    let config = LoadConfig { duration: None, ..config(server.address) };
    let report = load::run_blocking(config, handle).unwrap();
    watcher.join().unwrap();
    assert!(report.wrong_replies > 0, "{report:#?}");
    assert!(report.lost_writes > 0, "{report:#?}");
    assert_eq!(report.broken_connections, 0);
}

/// Without one read in the load, the audit alone finds a rollback.
#[test]
fn a_rollback_at_the_end_is_found_by_the_audit() {
    let server = Embedded::start(2);
    let old = Mutex::new(None);
    let seen = AtomicU64::new(0);
    let store = server.store.clone();
    let rolled_back = AtomicBool::new(false);
    // The first read of the audit comes back as a bulk string; before it, all go back in time.
    let fault = move |_, reply: Reply| {
        if seen.fetch_add(1, SeqCst) == 2000 {
            *old.lock().unwrap() = Some(store.snapshot());
        }
        if matches!(reply, Reply::Bulk(_)) && !rolled_back.swap(true, SeqCst) {
            store.restore(old.lock().unwrap().as_ref().expect("2000 replies before the audit"));
        }
        Action::Send(vec![reply])
    };
    let target = proxy(server.address, Box::new(fault));
    let handle = LoadHandle::new();
    let stopper = thread::spawn({
        let handle = handle.clone();
        move || {
            await_replies(&handle, 6000);
            handle.stop();
        }
    });
    let config =
        LoadConfig { read_ratio: 0.0, duration: None, fresh_audit: true, ..config(target) };
    let report = load::run_blocking(config, handle).unwrap();
    stopper.join().unwrap();
    assert!(report.lost_writes > 50, "{report:#?}");
    assert_eq!((report.wrong_replies, report.broken_connections), (0, 0), "{report:#?}");
    assert!(report.notes.iter().any(|note| note.contains("audit")), "{report:#?}");
}

#[test]
fn an_old_counter_is_a_wrong_reply() {
    let server = Embedded::start(2);
    let count = AtomicU64::new(0);
    let fault = move |_, reply| match reply {
        // Integers are counters, but for the first, of the reset, on each connection.
        Reply::Integer(value) if value > 5 && count.fetch_add(1, SeqCst) == 20 => {
            Action::Send(vec![Reply::Integer(value - 5)])
        }
        reply => Action::Send(vec![reply]),
    };
    let target = proxy(server.address, Box::new(fault));
    let report = run(LoadConfig { connections: 1, keys: 50, ..config(target) });
    assert!(report.wrong_replies > 0, "{report:#?}");
    assert_eq!((report.lost_writes, report.broken_connections), (0, 0), "{report:#?}");
    assert!(report.notes[0].contains("INCR"), "{report:#?}");
}

#[test]
fn a_reset_is_a_broken_connection_and_its_keys_are_still_audited() {
    let server = Embedded::start(2);
    let count = AtomicU64::new(0);
    let fault = move |number, reply| match number == 1 && count.fetch_add(1, SeqCst) == 500 {
        true => Action::Reset,
        false => Action::Send(vec![reply]),
    };
    let target = proxy(server.address, Box::new(fault));
    let report = run(config(target));
    assert_eq!(report.broken_connections, 1, "{report:#?}");
    assert_eq!((report.lost_writes, report.wrong_replies), (0, 0), "{report:#?}");
    assert!(report.notes[0].contains("reset"), "{report:#?}");
}

#[test]
fn when_all_connections_break_a_fresh_one_audits() {
    let server = Embedded::start(2);
    let count = AtomicU64::new(0);
    let fault = move |number, reply| match number == 0 && count.fetch_add(1, SeqCst) == 500 {
        true => Action::Reset,
        false => Action::Send(vec![reply]),
    };
    let target = proxy(server.address, Box::new(fault));
    let report = run(LoadConfig { connections: 1, ..config(target) });
    assert_eq!(report.broken_connections, 1, "{report:#?}");
    assert_eq!((report.lost_writes, report.wrong_replies), (0, 0), "{report:#?}");
}

#[test]
fn a_request_never_answered_breaks_its_connection() {
    let server = Embedded::start(2);
    let count = AtomicU64::new(0);
    let fault = move |number, reply| match number == 2 && count.fetch_add(1, SeqCst) == 300 {
        true => Action::Send(Vec::new()),
        false => Action::Send(vec![reply]),
    };
    let target = proxy(server.address, Box::new(fault));
    let reply_timeout = Duration::from_secs(2);
    let duration = Some(Duration::from_millis(500));
    let report = run(LoadConfig { pipeline: 1, reply_timeout, duration, ..config(target) });
    assert_eq!(report.broken_connections, 1, "{report:#?}");
    assert_eq!((report.lost_writes, report.wrong_replies), (0, 0), "{report:#?}");
    assert!(report.connection_gap_ms >= 2000.0, "{report:#?}");
    assert!(report.notes[0].contains("no reply within 2s"), "{report:#?}");
}

#[test]
fn two_swapped_replies_are_wrong() {
    let server = Embedded::start(2);
    let (count, held) = (AtomicU64::new(0), Mutex::new(None));
    // Swaps one pair of different values somewhere after the start.
    let fault = move |_, reply: Reply| {
        let mut held = held.lock().unwrap();
        match held.take() {
            Some(first) => Action::Send(vec![reply, first]),
            None if matches!(reply, Reply::Bulk(Some(_))) && count.fetch_add(1, SeqCst) == 200 => {
                *held = Some(reply);
                Action::Send(Vec::new())
            }
            None => Action::Send(vec![reply]),
        }
    };
    let target = proxy(server.address, Box::new(fault));
    let report = run(LoadConfig { connections: 1, pipeline: 16, ..config(target) });
    assert_eq!(report.wrong_replies, 2, "{report:#?}");
    assert_eq!((report.lost_writes, report.broken_connections), (0, 0), "{report:#?}");
}

#[test]
fn a_server_that_is_gone_has_lost_everything() {
    let server = Embedded::start(1);
    let config = LoadConfig { duration: None, ..config(server.address) };
    let handle = LoadHandle::new();
    let stopper = thread::spawn({
        let handle = handle.clone();
        move || {
            await_replies(&handle, 2000);
            drop(server);
            handle.stop();
        }
    });
    let report = load::run_blocking(config, handle).unwrap();
    stopper.join().unwrap();
    assert!(report.broken_connections >= 4, "{report:#?}");
    assert!(report.lost_writes >= 200, "{report:#?}");
}

/// Waits until a load has seen so many replies.
fn await_replies(handle: &LoadHandle, replies: u64) {
    while handle.progress().replies < replies {
        assert_ne!(handle.progress().phase, Phase::Done, "the load ended before {replies} replies");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What nobody wrote is there: the connections that come and go do not take it.
#[test]
fn a_churning_connection_checks_its_answer() {
    let server = Embedded::start(1);
    let config = LoadConfig { churn: Some(100.0), ..config(server.address) };
    let mut other = TcpStream::connect(server.address).unwrap();
    let key = format!("{}absent", config.prefix);
    write!(other, "SET {key} here\r\n").unwrap();
    other.read_exact(&mut [0; 5]).unwrap();
    let report = run(config);
    assert!(report.wrong_replies > 0, "{report:#?}");
    assert!(report.notes.iter().any(|note| note.contains("churn")), "{report:#?}");
}

/// A server that ends while connections come and go: each that cannot be opened is counted.
#[test]
fn a_connection_that_cannot_be_opened_is_counted() {
    let server = Embedded::start(1);
    let proxied = proxy(server.address, Box::new(|_, reply| Action::Send(vec![reply])));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap();
    // Takes the connections of the load, and hears no more.
    let relay = thread::spawn(move || {
        for _ in 0..4 {
            let (mut near, _) = listener.accept().unwrap();
            let mut far = TcpStream::connect(proxied).unwrap();
            let (mut a, mut b) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut a, &mut b));
            thread::spawn(move || std::io::copy(&mut far, &mut near));
        }
    });
    let report = run(LoadConfig { churn: Some(50.0), ..config(target) });
    relay.join().unwrap();
    assert!(report.broken_connections > 0, "{report:#?}");
    assert_eq!((report.lost_writes, report.wrong_replies), (0, 0), "{report:#?}");
}

/// A key goes back to what it was a while ago: no single answer is wrong, only all of them together.
#[test]
fn a_shared_key_that_goes_back_in_time_is_found() {
    let server = Embedded::start(2);
    let config = LoadConfig { history: Some(4), duration: None, ..config(server.address) };
    let key = format!("{}shared-1", config.prefix);
    let (handle, address) = (LoadHandle::new(), server.address);
    let meddler = thread::spawn({
        let (handle, key) = (handle.clone(), key.clone());
        move || {
            let mut other = BufReader::new(TcpStream::connect(address).unwrap());
            let mut ask = |command: String| {
                other.get_mut().write_all(command.as_bytes()).unwrap();
                let mut line = String::new();
                other.read_line(&mut line).unwrap();
                if line.starts_with('$') && line != "$-1\r\n" {
                    line.clear();
                    other.read_line(&mut line).unwrap();
                }
                line.trim_end().to_owned()
            };
            // Long enough apart for others to have written in between, some of the times.
            for round in 1..20 {
                await_replies(&handle, round * 2000);
                let before = ask(format!("GET {key}\r\n"));
                await_replies(&handle, round * 2000 + 1000);
                assert_eq!(ask(format!("SET {key} {before}\r\n")), "+OK");
            }
            handle.stop();
        }
    });
    let report = load::run_blocking(config, handle).unwrap();
    meddler.join().unwrap();
    assert!(!report.is_clean(), "{report:#?}");
    assert_eq!((report.lost_writes, report.wrong_replies), (0, 0), "{report:#?}");
    let history = report.history.unwrap();
    assert_eq!(history.linearizable, Some(false));
    let offence = history.offence.unwrap();
    assert_eq!(offence.key, key);
    println!("{:#?}", offence.operations);
    assert!(offence.operations.iter().any(|line| line.contains("none of these can be next")));
}
