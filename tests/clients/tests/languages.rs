//! The load in every language, against servers that are right, and against some that are not: each
//! fault is reported, in the right field.

mod common;

use common::config;
use common::fake::{Act, Ask, Fake, Fault};
use nilicon_clients::Protocol;
use nilicon_clients::load::{self, LoadConfig, LoadHandle, Report};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

const BOTH: [Protocol; 2] = [Protocol::Memcached, Protocol::Http];

fn run(protocol: Protocol, target: SocketAddr) -> Report {
    let config = LoadConfig { protocol, fresh_audit: true, ..config(target) };
    load::run_blocking(config, LoadHandle::new()).unwrap()
}

/// The load on a server that does `act` to the request that `which` chooses, once.
fn with_fault(protocol: Protocol, act: Act, which: fn(Ask, &str) -> bool) -> Report {
    let fault = Fault { act, which, after: 300 };
    let fake = Fake::start(protocol, Some(fault));
    let report = run(protocol, fake.address);
    assert!(fake.did_it(), "the fault never happened");
    report
}

fn figures(report: &Report) -> (u64, u64, u64) {
    (report.lost_writes, report.wrong_replies, report.broken_connections)
}

#[test]
fn honest_servers_are_not_accused() {
    for protocol in BOTH {
        let fake = Fake::start(protocol, None);
        let report = run(protocol, fake.address);
        assert!(report.is_clean(), "{protocol:?}: {report:#?}");
        assert!(report.reads > 100 && report.acknowledged_writes > 100, "{report:#?}");
    }
}

#[test]
fn a_write_that_was_acknowledged_and_forgotten_is_lost() {
    for protocol in BOTH {
        // Nobody writes or reads it again before the audit: every write from then on is forgotten.
        let report = with_fault(protocol, Act::ForgetFromNowOn, |ask, _| ask == Ask::Set);
        assert!(report.lost_writes > 0, "{protocol:?}: {report:#?}");
        assert_eq!(report.broken_connections, 0, "{protocol:?}: {report:#?}");
    }
}

#[test]
fn a_damaged_value_is_a_wrong_reply() {
    for protocol in BOTH {
        let report = with_fault(protocol, Act::Damage, |ask, _| ask == Ask::Get);
        assert_eq!(figures(&report), (0, 1, 0), "{protocol:?}: {report:#?}");
    }
}

#[test]
fn a_counter_that_goes_back_is_wrong() {
    for protocol in BOTH {
        let report = with_fault(protocol, Act::Damage, |ask, key| {
            ask == Ask::Increment && key.contains("c:")
        });
        assert!(report.wrong_replies > 0, "{protocol:?}: {report:#?}");
        assert_eq!((report.lost_writes, report.broken_connections), (0, 0), "{report:#?}");
    }
}

#[test]
fn an_answer_that_comes_twice_is_wrong() {
    for protocol in BOTH {
        let report = with_fault(protocol, Act::Double, |ask, _| ask == Ask::Set);
        assert!(report.wrong_replies > 0, "{protocol:?}: {report:#?}");
        assert_eq!(report.lost_writes, 0, "{protocol:?}: {report:#?}");
    }
}

#[test]
fn a_connection_that_is_closed_is_broken_and_its_keys_are_still_audited() {
    for protocol in BOTH {
        let report = with_fault(protocol, Act::Close, |_, _| true);
        assert_eq!(figures(&report), (0, 0, 1), "{protocol:?}: {report:#?}");
    }
}

#[test]
fn a_server_that_speaks_another_language_is_found_out() {
    let fake = Fake::start(Protocol::Memcached, None);
    let report = run(Protocol::Http, fake.address);
    assert!(report.broken_connections > 0 || report.wrong_replies > 0, "{report:#?}");
}

#[test]
fn closed_loop_on_memcached() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = Command::new("memcached");
    command.args(["-u", "root", "-l", "127.0.0.1", "-U", "0", "-p", &free.port().to_string()]);
    let Ok(mut child) = command.stderr(Stdio::null()).spawn() else {
        println!("skipped: memcached is not installed");
        return;
    };
    while TcpStream::connect(free).is_err() {
        assert_eq!(child.try_wait().unwrap(), None, "memcached ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    let report = run(Protocol::Memcached, free);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(report.is_clean(), "{report:#?}");
    assert!(report.reads > 100 && report.acknowledged_writes > 100, "{report:#?}");
}
