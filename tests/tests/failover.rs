//! `run` and `drill`: faults under load, and the verdict of verifying clients.

use nilicon_tests::{Bed, Done, EMBEDDED, REDIS, Sketch, is_installed, until};
use serde_json::Value;
use std::time::{Duration, Instant};

/// What every run must report, and as what.
fn expect_whole(report: &Value) {
    for pointer in [
        "/duration_s",
        "/clients/0/requests",
        "/clients/0/acknowledged_writes",
        "/clients/0/reads",
        "/clients/0/lost_writes",
        "/clients/0/wrong_replies",
        "/clients/0/broken_connections",
        "/clients/0/gap_ms",
        "/clients/0/connection_gap_ms",
        "/clients/0/latency_us/p50",
        "/clients/0/latency_us/p99",
        "/clients/0/latency_us/max",
        "/clients/0/rate_per_s",
        "/clients/0/connections",
        "/epochs/committed",
        "/epochs/stop_us/p50",
        "/epochs/stop_us/p99",
        "/epochs/stop_us/max",
        "/epochs/stop_us_by_stage/memory",
        "/epochs/interval_us/p50",
        "/epochs/dirty_pages/p50",
        "/epochs/stop_pages/p50",
        "/epochs/wire_bytes/p50",
        "/epochs/wire_bytes/total",
        "/epochs/commit_us/p50",
    ] {
        let value = report.pointer(pointer);
        assert!(value.is_some_and(Value::is_number), "{pointer} is {value:?} in {report:#}");
    }
    assert_eq!(report["output_commit"], true);
    assert!(report["containers"].is_array() && report["faults"].is_array());
}

fn number(report: &Value, pointer: &str) -> f64 {
    report
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("{pointer}: {report:#}"))
}

/// Nothing lost, wrong or broken, and there was something to lose.
fn expect_clean(report: &Value) {
    assert_eq!(report["recovered"], true, "{report:#}");
    assert_eq!(report["why"], Value::Null, "{report:#}");
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(number(report, &format!("/clients/0/{figure}")), 0.0, "{figure}: {report:#}");
    }
    assert!(number(report, "/clients/0/acknowledged_writes") > 100.0, "{report:#}");
    assert!(number(report, "/epochs/committed") > 10.0, "{report:#}");
    let at = |percent| number(report, &format!("/epochs/stop_us/{percent}"));
    assert!(0.0 < at("p50") && at("p50") <= at("p99") && at("p99") <= at("max"), "{report:#}");
}

/// The container is on beta, in the second generation, and the figures fit each other.
fn expect_failover(report: &Value) {
    let failover = &report["failover"];
    assert_eq!(failover["host"], "beta", "{report:#}");
    assert_eq!(failover["generation"], 2, "{report:#}");
    for phase in ["fence", "apply", "prepare", "probe", "connect", "finish", "plug", "run"] {
        assert!(failover["phases_ms"][phase].is_number(), "{phase}: {report:#}");
    }
    let (total, outage) = (number(failover, "/total_ms"), number(failover, "/outage_ms"));
    assert!(0.0 < total && total <= outage, "{report:#}");
    // From suspicion until the container runs again nobody is answered.
    assert!(number(report, "/clients/0/gap_ms") >= total, "{report:#}");
    assert_eq!(failover["connections"], report["clients"][0]["connections"], "{report:#}");
    assert_eq!(report["failovers"].as_array().map(Vec::len), Some(1));
    let store = &report["containers"][0];
    assert_eq!(
        (&store["primary"], &store["generation"]),
        (&"beta".into(), &2.into()),
        "{report:#}"
    );
}

/// Five seconds of load with a fault in the middle.
fn run(bed: &Bed, fault: &str) -> Value {
    let fault = format!("{fault}@2s");
    let done = bed.run("run", &["--duration", "5s", "--fault", &fault, "-o", "json"]);
    let report = done.expect_success().json();
    expect_whole(&report);
    bed.expect_gone();
    report
}

#[test]
fn the_built_in_server_survives_the_loss_of_its_host() {
    let bed = Bed::new("host", &Sketch::of(EMBEDDED).loaded());
    let report = run(&bed, "kill-host:alpha");
    expect_clean(&report);
    expect_failover(&report);
    assert_eq!(report["faults"][0]["fault"], "kill-host:alpha");
    assert!(number(&report, "/faults/0/killed") >= 2.0, "the agent and a container: {report:#}");
}

#[test]
fn redis_survives_the_loss_of_its_host() {
    if !is_installed("redis-server") {
        return;
    }
    let bed = Bed::new("redis", &Sketch::of(REDIS).loaded());
    let report = run(&bed, "kill-host:alpha");
    expect_clean(&report);
    expect_failover(&report);
}

/// What has left the first host over the link of checkpoints so far, in packets.
fn sent(bed: &Bed) -> u64 {
    let text = bed.exec("alpha", &["cat", "/proc/net/dev"]).expect_success().stdout;
    let link = text.lines().find_map(|line| line.trim().strip_prefix("repl:")).expect("the link");
    link.split_whitespace().nth(9).and_then(|n| n.parse().ok()).expect("a counter")
}

/// Nobody asks for a while, so both hosts rest, and hear little of each other. The loss of one is
/// noticed all the same, and who comes then is served, as is who was there before.
#[test]
fn an_idle_container_is_taken_over_and_serves_who_comes_then() {
    const STORE: &str = "10.77.0.10:6379";
    let relay = env!("CARGO_BIN_EXE_relay");
    let bed = Bed::new("rest", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut before = bed.connect(relay, "client", STORE);
    assert_eq!(before.ask("SET a 1"), "+OK");
    // Some 100 packets a second while it rests, and more than 600 while it does not.
    until("both rest", || {
        let begun = sent(&bed);
        std::thread::sleep(Duration::from_secs(1));
        (sent(&bed) - begun < 300).then_some(())
    });
    bed.fault("kill-host:alpha");
    let lost = Instant::now();
    let mut after = bed.connect(relay, "client", STORE);
    assert_eq!((after.ask("GET a"), after.line()), ("$1".to_owned(), "1".to_owned()));
    let outage = lost.elapsed();
    assert!(outage < Duration::from_secs(10), "{outage:?}");
    assert_eq!((before.ask("GET a"), before.line()), ("$1".to_owned(), "1".to_owned()));
    let store = bed.until_store("it runs at its backup", |store| store["primary"] == "beta");
    assert_eq!(store["generation"], 2, "{store:#}");
    // By the pulses that did not come: a connection that says nothing is given up after two seconds.
    let record = std::fs::read_to_string(bed.state().join("beta.store.failover")).expect("one");
    let record = serde_json::from_str(&record).expect("a record");
    let silence = number(&record, "/phases_ms/silence");
    assert!((50.0..1500.0).contains(&silence), "{record:#}");
    drop((before, after));
    bed.destroy();
}

#[test]
fn the_container_does_not_go_on_without_its_agent() {
    let bed = Bed::new("agent", &Sketch::of(EMBEDDED).loaded());
    let report = run(&bed, "kill-agent:alpha");
    expect_clean(&report);
    expect_failover(&report);
}

/// The old primary lives, sees its clients, and has lost only its backup: the one place where two
/// could speak with one voice.
#[test]
fn a_primary_cut_off_from_its_backup_is_silenced() {
    let bed = Bed::new("repl", &Sketch::of(EMBEDDED).loaded());
    let report = run(&bed, "cut-link:alpha:repl");
    expect_clean(&report);
    expect_failover(&report);
}

#[test]
fn a_primary_cut_off_from_everything_is_replaced() {
    let bed = Bed::new("alone", &Sketch::of(EMBEDDED).loaded());
    let report = run(&bed, "cut-link:alpha");
    expect_clean(&report);
    expect_failover(&report);
}

/// The old primary comes back with its link, hears of the newer generation, and ends its copy.
#[test]
fn a_primary_that_comes_back_gives_way() {
    let bed = Bed::new("back", &Sketch::of(EMBEDDED).loaded());
    let faults = ["--fault", "cut-link:alpha@2s", "--fault", "heal-link:alpha@3500ms"];
    let line: Vec<&str> = ["--duration", "7s", "-o", "json"].into_iter().chain(faults).collect();
    let report = bed.run("run", &line).expect_success().json();
    expect_whole(&report);
    expect_clean(&report);
    expect_failover(&report);
}

/// The topology file of the double failover: there and back over the same connections.
#[test]
fn two_failovers_in_a_row_lose_nothing() {
    let bed = Bed::new("twice", &Sketch::of(EMBEDDED));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies/twice.topo.yml");
    let text = std::fs::read_to_string(file).expect("the example");
    bed.write(&text.replace("name: twice", &format!("name: {}", bed.name)));
    let report = bed.run("run", &["-o", "json"]).expect_success().json();
    expect_whole(&report);
    expect_clean(&report);
    let hosts = report["failovers"].as_array().expect("failovers").iter();
    let hosts: Vec<_> = hosts.map(|f| (f["host"].clone(), f["generation"].clone())).collect();
    assert_eq!(hosts, [("beta".into(), 2.into()), ("alpha".into(), 3.into())], "{report:#}");
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["generation"]), (&"alpha".into(), &3.into()));
    bed.expect_gone();
}

#[test]
fn a_run_without_a_fault_has_no_failover() {
    let bed = Bed::new("calm", &Sketch::of(EMBEDDED).loaded());
    let report = bed.run("run", &["--duration", "3s", "-o", "json"]).expect_success().json();
    expect_whole(&report);
    expect_clean(&report);
    assert_eq!(report["failover"], Value::Null);
    assert_eq!(report["containers"][0]["primary"], "alpha");
    assert_eq!(report["containers"][0]["protected"], true);
}

#[test]
fn the_report_for_people_says_the_same() {
    let event = "{ at: 2s, fault: kill-host, node: alpha }";
    let bed = Bed::new("text", &Sketch::of(EMBEDDED).loaded().with_event(event));
    let done = bed.run("run", &["--duration", "4s"]).expect_success();
    let first = done.stdout.lines().next().unwrap_or_default();
    assert_eq!(first, format!("{}: recovered, nothing lost", bed.name), "{done}");
    for part in ["kill-host:alpha at 2.0", "store is on beta", "committed", "a median stop"] {
        assert!(done.stdout.contains(part), "{part}: {done}");
    }
}

fn drill(bed: &Bed, arguments: &[&str]) -> Done {
    let mut line = vec!["--fault", "kill-host", "--duration", "3s", "-o", "json"];
    line.extend(arguments);
    bed.run("drill", &line)
}

/// The control: what the clients find without output commit shows that they would find a loss,
/// and so what it is worth that they find none with it.
#[test]
fn without_output_commit_something_is_lost() {
    let bed = Bed::new("control", &Sketch::of(EMBEDDED).loaded());
    let report = drill(&bed, &["--runs", "4", "--output-commit", "off"]).expect_success().json();
    let sum: f64 = ["/lost_writes", "/wrong_replies", "/broken_connections"]
        .iter()
        .map(|figure| number(&report, figure))
        .sum();
    assert!(sum > 0.0, "{report:#}");
    assert_eq!(report["output_commit"], false);
    bed.expect_gone();
}

#[test]
fn a_drill_loses_nothing() {
    let bed = Bed::new("drill", &Sketch::of(EMBEDDED).loaded());
    let report = drill(&bed, &["--runs", "3", "--seed", "11"]).expect_success().json();
    assert_eq!((&report["runs"], &report["recovered"]), (&3.into(), &3.into()), "{report:#}");
    assert_eq!(report["failed"], Value::Array(Vec::new()));
    assert_eq!(report["seed"], 11);
    assert!(number(&report, "/failover_ms/p50") > 0.0);
    bed.expect_gone();
}

/// When alpha and beta spoke to the clients in the container's name, by the kernel's time: both uplinks
/// are watched while the hosts cannot hear each other, and both see the clients.
fn voices(tag: &str, output_commit: &str) -> (Vec<i128>, Vec<i128>) {
    const UPLINK: &str = env!("CARGO_BIN_EXE_uplink");
    const MAC: &str = "02:00:00:00:77:10";
    let bed = Bed::new(tag, &Sketch::of(&format!("{EMBEDDED}\n    mac: '{MAC}'")).loaded());
    let fault = ["--fault", "cut-link:alpha:repl@5s", "--output-commit", output_commit];
    let line: Vec<&str> = ["--duration", "10s", "-o", "json"].into_iter().chain(fault).collect();
    let run = bed.start("run", &line);
    bed.until_store("the load runs", |store| store["epoch"].as_u64() > Some(20));
    let watch = |host| bed.start_exec(host, &[UPLINK, "lan", MAC, "9"]);
    let (alpha, beta) = (watch("alpha"), watch("beta"));
    let ready = |watcher: &nilicon_tests::Running| watcher.printed().starts_with("ready");
    nilicon_tests::until("the watchers", || (ready(&alpha) && ready(&beta)).then_some(()));
    let store = bed.until_store("nothing has happened yet", |store| store["phase"].is_string());
    assert_eq!(store["primary"], "alpha", "{store:#}");
    let frames = |watcher: nilicon_tests::Running| -> Vec<i128> {
        let done = watcher.wait(std::time::Duration::from_secs(60)).expect_success();
        done.stdout.lines().skip(1).map(|line| line.parse().expect("a time")).collect()
    };
    let voices = (frames(alpha), frames(beta));
    // Without output commit something may be lost, and the run says so.
    let done = run.wait(std::time::Duration::from_secs(200));
    if output_commit == "on" {
        expect_clean(&done.expect_success().json());
    }
    assert!(!voices.0.is_empty() && !voices.1.is_empty(), "both have spoken: {voices:?}");
    bed.expect_gone();
    voices
}

/// Of the two sides of a cut never more than one speaks: nothing leaves the old primary once the new
/// one has said its first word, though its container runs on, and its clients still ask it.
#[test]
fn on_a_cut_link_never_more_than_one_side_speaks() {
    let (alpha, beta) = voices("voices", "on");
    let (last, first) = (alpha.iter().max(), beta.iter().min());
    assert!(last < first, "alpha spoke until {last:?}, beta from {first:?} on");
}

/// The control: without output commit both do, and it shows.
#[test]
fn without_output_commit_both_sides_speak() {
    let (alpha, beta) = voices("voicesun", "off");
    assert!(alpha.iter().max() > beta.iter().min(), "a second voice was not heard");
}
