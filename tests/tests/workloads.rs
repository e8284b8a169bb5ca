//! Programs that are no servers, and many containers at once.

use std::time::{Duration, Instant};

use nilicon_tests::{Bed, EMBEDDED, Sketch, nilicon, until};
use serde_json::Value;

/// How long all steps may take: much longer than they do.
const PATIENCE: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(200);

/// Where a program that computes tells how far it is.
const ASK: &str = "exec 3<>/dev/tcp/10.77.0.10/7000 && echo >&3 && head -n 1 <&3";

/// Steps done by all threads, and the result, which is `-` until all are done.
fn ask(bed: &Bed) -> Option<(u64, String)> {
    let done = bed.exec("client", &["timeout", "10", "bash", "-c", ASK]);
    let (steps, result) = done.stdout.trim().split_once(' ')?;
    Some((steps.parse().ok()?, result.to_owned()))
}

/// The last steps and the result; a busy machine takes its time.
fn until_done(bed: &Bed) -> (u64, String) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(bed) {
            Some((done, result)) if result != "-" => return (done, result),
            last => assert!(Instant::now() < deadline, "it is never done: {last:?}"),
        }
        std::thread::sleep(LOOK);
    }
}

/// Loses its host in the middle of its work; its result is the one that it has without that.
fn comes_to_the_same_result(problem: &str, tag: &str, steps: u64) {
    let steps_each = steps.to_string();
    let line = ["--threads", "2", "--steps", &steps_each];
    let quoted: Vec<String> = line.iter().map(|word| format!("\"{word}\"")).collect();
    let store = format!(
        "command: [nilicon, __compute, {problem}, {}, --listen, \"0.0.0.0:7000\"]\n    \
         ready: {{ tcp: 7000 }}",
        quoted.join(", ")
    );
    let bed = Bed::new(tag, &Sketch::of(&store));
    bed.deploy();
    let before = until("the first steps", || ask(&bed).filter(|(done, _)| *done > steps / 100));
    assert_eq!(before.1, "-", "it was too quick to be interrupted: {before:?}");
    bed.fault("kill-host:alpha");
    let after = until("an answer of the other host", || ask(&bed));
    assert!(after.0 >= before.0, "what it has told is not taken back: {before:?}, {after:?}");
    assert_eq!(after.1, "-", "it was ready before its host was lost: {after:?}");
    let last = until_done(&bed);
    let alone = nilicon(&[&["__compute", problem][..], &line].concat()).expect_success();
    assert_eq!(format!("{} {}", last.0, last.1), alone.stdout.trim(), "{alone}");
    assert_eq!(last.0, 2 * steps);
    bed.destroy();
}

/// Two threads, their random numbers, and floating-point registers in the middle of an expression.
#[test]
fn the_price_of_an_option_is_the_same_after_a_failover() {
    comes_to_the_same_result("options", "options", 30_000);
}

/// Two threads whose memory is another one with each step.
#[test]
fn the_clusters_of_a_stream_are_the_same_after_a_failover() {
    comes_to_the_same_result("clusters", "clusters", 30_000);
}

/// One pair of agents, eight containers, each with clients that check every answer.
#[test]
fn eight_containers_go_on_at_once() {
    let bed = Bed::new("eight", &Sketch::of(EMBEDDED));
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies/eight.topo.yml");
    let text = std::fs::read_to_string(example).expect("the example");
    assert!(text.contains("name: eight\n"));
    bed.write(&text.replace("name: eight\n", &format!("name: {}\n", bed.name)));
    let report = bed.run("run", &["--duration", "7s", "-o", "json"]).expect_success().json();
    assert_eq!((&report["recovered"], &report["why"]), (&true.into(), &Value::Null), "{report:#}");
    let clients = report["clients"].as_array().expect("clients");
    assert_eq!(clients.len(), 8);
    for client in clients {
        for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
            assert_eq!(client[figure], 0, "{figure}: {client:#}");
        }
        assert!(client["acknowledged_writes"].as_u64() > Some(100), "{client:#}");
    }
    let failovers = report["failovers"].as_array().expect("failovers");
    let mut moved: Vec<&str> = failovers.iter().filter_map(|f| f["container"].as_str()).collect();
    moved.sort_unstable();
    moved.dedup();
    assert_eq!(moved.len(), 8, "{report:#}");
    bed.expect_gone();
}
