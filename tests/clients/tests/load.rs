//! The load generator against servers that are right: nothing may be reported.

mod common;

use common::{Embedded, config, run};
use nilicon_clients::load::{self, LoadConfig, LoadHandle, Phase, Report};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

fn assert_sound(report: &Report) {
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.notes, Vec::<String>::new());
    assert_eq!(report.latency_us.count, report.requests);
    assert!(report.reads > 0 && report.acknowledged_writes > 0, "{report:#?}");
    assert_eq!(report.reads + report.acknowledged_writes, report.requests);
    let in_timeline: u64 = report.timeline.iter().map(|&count| u64::from(count)).sum();
    assert_eq!(in_timeline, report.requests);
    assert!(report.gap_ms > 0.0 && report.connection_gap_ms >= report.gap_ms, "{report:#?}");
}

#[test]
fn closed_loop_on_the_embedded_server() {
    let server = Embedded::start(2);
    let duration = Some(Duration::from_secs(2));
    let report = run(LoadConfig { duration, fresh_audit: true, ..config(server.address) });
    assert_sound(&report);
    assert!(report.requests > 1000, "{report:#?}");
    assert_eq!(report.connections, 4);
}

#[test]
fn open_loop_keeps_its_rate() {
    let server = Embedded::start(2);
    let report = run(LoadConfig { rate: Some(500.0), pipeline: 1, ..config(server.address) });
    assert_sound(&report);
    // The schedule decides, not the server: the number of requests is the rate times the time.
    let most = 500.0 * report.duration_s + 1.0;
    assert!(report.requests >= 400 && report.requests as f64 <= most, "{report:#?}");
    let us = report.latency_us;
    println!("from due time: p50 {} us, p99 {} us, longest {} us", us.p50, us.p99, us.max);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_threads_may_share_a_load() {
    let server = Embedded::start(2);
    let handle = LoadHandle::new();
    let config = LoadConfig { rate: Some(20_000.0), ..config(server.address) };
    let report = load::run(config, handle.clone()).await.unwrap();
    assert!(report.is_clean(), "{report:#?}");
    assert!(report.requests > 1000, "{report:#?}");
    let progress = handle.progress();
    assert_eq!((progress.phase, progress.errors), (Phase::Done, 0));
    assert_eq!((progress.requests, progress.replies), (report.requests, report.requests));
    assert_eq!(progress.acknowledged, report.acknowledged_writes);
}

#[test]
fn many_connections_and_more_data_than_is_written() {
    let server = Embedded::start(3);
    let config = LoadConfig {
        connections: 150,
        pipeline: 2,
        populate_bytes: 2 << 20,
        value_size: (0, 200),
        ..config(server.address)
    };
    let report = run(config.clone());
    assert_sound(&report);
    assert!(server.store.len() > 15_000);
    // What an earlier load left behind does not confuse the next one.
    assert_sound(&run(LoadConfig { seed: 2, ..config }));
}

#[test]
fn a_report_has_its_documented_fields() {
    let server = Embedded::start(1);
    let duration = Some(Duration::from_millis(50));
    let report = run(LoadConfig { duration, ..config(server.address) });
    let json = serde_json::to_value(&report).unwrap();
    let names: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = [
        "requests",
        "acknowledged_writes",
        "reads",
        "lost_writes",
        "wrong_replies",
        "broken_connections",
        "churned",
        "gap_ms",
        "connection_gap_ms",
        "latency_us",
        "rate_per_s",
        "connections",
        "duration_s",
        "populate_s",
        "history",
        "notes",
        "timeline_ms_bucket",
        "timeline",
    ];
    expected.sort_unstable();
    let mut names = names;
    names.sort_unstable();
    assert_eq!(names, expected);
    for name in ["p50", "p90", "p99", "max", "count"] {
        assert!(json["latency_us"][name].is_u64(), "{name}");
    }
}

#[test]
fn a_load_that_makes_no_sense_is_refused() {
    use nilicon_clients::load::{LoadError, run_blocking};
    let target = SocketAddr::from(([127, 0, 0, 1], 1));
    let refused = |config| run_blocking(config, LoadHandle::new()).unwrap_err();
    for config in [
        LoadConfig { connections: 0, ..config(target) },
        LoadConfig { pipeline: 0, ..config(target) },
        LoadConfig { keys: 3, ..config(target) },
        LoadConfig { value_size: (2, 1), ..config(target) },
        LoadConfig { read_ratio: f64::NAN, ..config(target) },
        LoadConfig { rate: Some(0.0), ..config(target) },
    ] {
        assert!(matches!(refused(config), LoadError::Config(_)));
    }
    assert!(matches!(refused(config(target)), LoadError::Connect { .. }));
}

/// A redis-server of our own, killed when dropped.
struct Redis {
    child: Child,
    address: SocketAddr,
}

impl Redis {
    /// Starts one on a free port; `None` if it is not installed.
    fn start() -> Option<Self> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        let child = command.arg(free.port().to_string()).stdout(Stdio::null()).spawn().ok()?;
        let mut redis = Self { child, address: free };
        while TcpStream::connect(redis.address).is_err() {
            assert_eq!(redis.child.try_wait().unwrap(), None, "redis-server ended");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(redis)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn closed_loop_on_redis() {
    let Some(redis) = Redis::start() else {
        println!("skipped: redis-server is not installed");
        return;
    };
    let config = LoadConfig { populate_bytes: 4 << 20, fresh_audit: true, ..config(redis.address) };
    let report = run(config);
    assert_sound(&report);
    let (rate, gap, p99) = (report.rate_per_s, report.gap_ms, report.latency_us.p99);
    println!("{rate:.0} replies/s, longest gap {gap:.1} ms, p99 {p99} us");
}

#[test]
fn connections_come_and_go_beside_the_load() {
    let server = Embedded::start(2);
    let duration = Some(Duration::from_secs(1));
    let churn = Some(400.0);
    let report = run(LoadConfig { duration, churn, ..config(server.address) });
    assert_sound(&report);
    assert!(report.churned > 20 && report.churned <= 500, "{}", report.churned);
}

/// What a server does that forgets nothing can be explained.
#[test]
fn the_history_of_shared_keys_is_linearizable() {
    let server = Embedded::start(3);
    let report = run(LoadConfig { history: Some(6), ..config(server.address) });
    assert_sound(&report);
    let history = report.history.expect("it was asked for");
    assert_eq!((history.linearizable, history.unanswered), (Some(true), 0), "{history:#?}");
    assert!(history.connections == 6 && history.operations > 100, "{history:#?}");
}
