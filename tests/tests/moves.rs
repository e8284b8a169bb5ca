//! `switchover`: planned moves under load, and what they must not do.

use nilicon_tests::{Bed, EMBEDDED, Sketch};
use serde_json::Value;

const RELAY: &str = env!("CARGO_BIN_EXE_relay");

/// There and back, again and again, while clients verify every answer.
#[test]
fn moves_there_and_back_lose_nothing() {
    let bed = Bed::new("moves", &Sketch::of(EMBEDDED).loaded());
    let run = bed.start("run", &["--duration", "15s", "-o", "json"]);
    // Epochs pass quickly only under load: by then all clients have connected, so that none is in
    // the accept queue, which is not carried over.
    bed.until_store("the load runs", |store| store["epoch"].as_u64() > Some(300));
    let line = ["--times", "6", "-o", "json"];
    let moves = bed.run("switchover", &line).expect_success().json();
    let all = moves["moves"].as_array().expect("moves");
    let to: Vec<&str> = all.iter().filter_map(|m| m["to"].as_str()).collect();
    assert_eq!(to, ["beta", "alpha", "beta", "alpha", "beta", "alpha"], "{moves:#}");
    for one in all {
        assert!(one["pause_ms"].as_f64().is_some_and(|pause| pause > 0.0), "{moves:#}");
    }
    println!("pause: {}", moves["pause_ms"]);
    let report = run.wait(std::time::Duration::from_secs(120)).expect_success().json();
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(report["clients"][0][figure], 0, "{figure}: {report:#}");
    }
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["generation"]), (&"alpha".into(), &7.into()));
    assert_eq!(store["protected"], Value::Bool(true), "{report:#}");
    bed.expect_gone();
}

/// The same as one command, with connections that come and go and with keys that many share; it tells
/// what each pause is made of.
#[test]
fn moves_under_load_are_judged_and_their_pauses_told() {
    let client = "{ node: client, target: 'store:6379', connections: 20, value-size: 150, \
                  keys: 20000, churn: 100, history: 6 }";
    let mut sketch = Sketch::of(EMBEDDED);
    sketch.clients.push(client.to_owned());
    let bed = Bed::new("movers", &sketch.with_event("{ at: 1s, fault: kill-host, node: alpha }"));
    let line = ["--switchovers", "5", "-o", "json"];
    let report = bed.run("run", &line).expect_success().json();
    assert_eq!((&report["recovered"], &report["linearizable"]), (&true.into(), &true.into()));
    for figure in ["lost_writes", "wrong_replies", "broken_connections", "resets"] {
        assert_eq!(report["clients"][0][figure], 0, "{figure}: {report:#}");
    }
    assert_eq!(report["faults"], Value::Array(Vec::new()), "those of the file are left out");
    let moves = report["moves"]["moves"].as_array().expect("moves");
    let to: Vec<&str> = moves.iter().filter_map(|one| one["to"].as_str()).collect();
    assert_eq!(to, ["beta", "alpha", "beta", "alpha", "beta"], "{report:#}");
    for one in moves {
        let figure = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{one:#}"));
        let pause = figure(&one["pause_ms"]);
        // Probing is beside preparing, and so no part of the sum.
        let parts = ["hand_over", "fence", "apply", "prepare", "connect", "finish", "plug", "run"];
        let sum: f64 = parts.iter().map(|phase| figure(&one["pause_ms_by_phase"][*phase])).sum();
        assert!(0.0 < sum && sum <= pause * 1.1 + 1.0, "{one:#}");
    }
    bed.expect_gone();
}

/// Nothing moves to a host that has no copy.
#[test]
fn without_a_backup_nothing_moves() {
    let bed = Bed::new("nobackup", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    bed.run("switchover", &[]).expect_complaint(&["cannot move away from beta", "no backup"]);
    bed.run("switchover", &["nothing"]).expect_complaint(&["protects no container nothing"]);
    assert_eq!(client.ask("SET a 2"), "+OK");
    drop(client);
    bed.destroy();
}

/// The topology of the repository with a witness, as a lab of this test.
fn witnessed(tag: &str) -> Bed {
    let bed = Bed::new(tag, &Sketch::of(EMBEDDED));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies/witness.topo.yml");
    let text = std::fs::read_to_string(file).expect("the example");
    bed.write(&text.replace("name: witness", &format!("name: {}", bed.name)));
    bed
}

fn expect_clean(report: &Value) {
    assert_eq!(report["recovered"], true, "{report:#}");
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(report["clients"][0][figure], 0, "{figure}: {report:#}");
    }
}

/// The primary goes on without its backup, gets it back, and can then be lost.
#[test]
fn with_a_witness_the_loss_of_the_backup_is_no_outage() {
    let bed = witnessed("degrade");
    let report = bed.run("run", &["-o", "json"]).expect_success().json();
    expect_clean(&report);
    // Policy `freeze` would have been silent from the loss of the backup until its return.
    let gap = report["clients"][0]["gap_ms"].as_f64().expect("a number");
    assert!(gap < 3500.0, "it did not go on alone: {report:#}");
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &3.into()));
    bed.expect_gone();
}

/// Both sides live and see the witness and the clients, but not each other: one of them goes on.
#[test]
fn of_two_that_have_lost_each_other_the_witness_lets_one_go_on() {
    let bed = witnessed("parted");
    let text = bed.text();
    let events = text.find("events:").expect("it has some");
    bed.write(&text[..events]);
    let faults = ["--fault", "cut-link:alpha:repl@2s", "--fault", "heal-link:alpha:repl@6s"];
    let line: Vec<&str> = ["--duration", "11s", "-o", "json"].into_iter().chain(faults).collect();
    let report = bed.run("run", &line).expect_success().json();
    expect_clean(&report);
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["backup"]), (&"beta".into(), &"alpha".into()));
    assert_eq!((&store["protected"], &store["generation"]), (&true.into(), &2.into()));
    bed.expect_gone();
}

/// The arbiter is the operator: nobody acts alone unasked, not even the backup.
#[test]
fn an_operator_says_who_goes_on() {
    let bed = Bed::new("manual", &Sketch::of(EMBEDDED));
    let policy = "over: repl\n    arbiter: manual\n    on-backup-loss: degrade\n";
    bed.write(&bed.text().replace("over: repl\n", policy));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.run("allow", &["store", "alpha"]).expect_complaint(&["does not ask to act alone"]);
    bed.fault("kill-agent:beta");
    client.send("SET a 2\r\n");
    let allowed = || bed.run("allow", &["store", "alpha"]).code == Some(0);
    nilicon_tests::until("alpha to ask", || allowed().then_some(()));
    assert_eq!(client.line(), "+OK");
    let store = bed.until_store("it runs alone", |store| store["phase"] == "unprotected");
    assert_eq!((&store["primary"], &store["generation"]), (&"alpha".into(), &2.into()));
    bed.fault("restart-agent:beta");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    drop(client);
    bed.destroy();
}
