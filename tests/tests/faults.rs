//! Faults that go by: links that get worse for a while, and a container that is killed. Nothing is
//! lost, nothing is wrong, no connection is reset, and the container is protected again.

use nilicon_tests::{Bed, EMBEDDED, Relay, Sketch};
use serde_json::Value;

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const STORE: &str = "10.77.0.10:6379";

/// Load on twenty connections, and others that come and go, with this policy.
fn sketch(policy: &str) -> Sketch {
    let mut sketch = Sketch::of(EMBEDDED).loaded();
    sketch.clients[0] = sketch.clients[0].replace(" }", ", churn: 100 }");
    sketch.protection = policy.to_owned();
    sketch
}

/// A drill of one run with this fault, on a bed whose container fails over when it is killed.
fn drill(tag: &str, fault: &str) {
    let bed = Bed::new(tag, &sketch("on-container-loss: failover"));
    let line = ["--runs", "1", "--seed", "3", "--duration", "5s", "--fault", fault, "-o", "json"];
    let report = bed.run("drill", &line).expect_success().json();
    // That it is protected again is part of this.
    assert_eq!((&report["runs"], &report["recovered"]), (&1.into(), &1.into()), "{report:#}");
    for figure in ["lost_writes", "wrong_replies", "broken_connections", "resets"] {
        assert_eq!(report[figure], 0, "{figure}: {report:#}");
    }
    assert!(report["churned"].as_u64().is_some_and(|n| n > 100), "{report:#}");
    assert_eq!(report["failed"], Value::Array(Vec::new()));
    assert_eq!(report["by_fault"][fault]["clean"], 1, "{report:#}");
    bed.expect_gone();
}

#[test]
fn a_slow_link_of_checkpoints() {
    drill("slow", "slow-link");
}

#[test]
fn a_link_of_checkpoints_that_loses_copies_reorders_and_changes() {
    drill("lossy", "lossy-link");
}

#[test]
fn a_primary_that_does_not_hear_its_backup() {
    drill("deaf", "cut-in");
}

#[test]
fn a_primary_that_its_backup_does_not_hear() {
    drill("mute", "cut-out");
}

#[test]
fn a_slow_link_to_the_clients() {
    drill("slowcli", "slow-clients");
}

#[test]
fn a_link_to_the_clients_that_loses_copies_reorders_and_changes() {
    drill("losscli", "lossy-clients");
}

#[test]
fn clients_that_do_not_hear_and_clients_that_are_not_heard() {
    drill("deafcli", "cut-clients-out");
    drill("mutecli", "cut-clients-in");
}

#[test]
fn a_killed_container_goes_on_at_its_backup() {
    drill("killed", "kill-container");
}

/// There and back under load. Its backup is told that it was killed, and need not find out.
#[test]
fn a_killed_container_goes_back_and_nothing_is_lost() {
    let bed = Bed::new("killback", &sketch("on-container-loss: restart"));
    let line = ["--duration", "9s", "--fault", "kill-container:alpha@2s", "-o", "json"];
    let report = bed.run("run", &line).expect_success().json();
    assert_eq!((&report["recovered"], &report["why"]), (&true.into(), &Value::Null), "{report:#}");
    let client = &report["clients"][0];
    for figure in ["lost_writes", "wrong_replies", "broken_connections", "resets"] {
        assert_eq!(client[figure], 0, "{figure}: {report:#}");
    }
    assert!(client["churned"].as_u64().is_some_and(|n| n > 100), "{report:#}");
    let failovers = report["failovers"].as_array().expect("failovers");
    let hosts: Vec<_> = failovers.iter().map(|f| (&f["host"], &f["generation"])).collect();
    assert_eq!(hosts, [(&"beta".into(), &2.into()), (&"alpha".into(), &3.into())], "{report:#}");
    // One that is silent for so long is told of by nobody.
    let detected = failovers[0]["detect_ms"].as_f64().expect("a time");
    assert!(detected < 1500.0, "{report:#}");
    let store = &report["containers"][0];
    assert_eq!((&store["primary"], &store["protected"]), (&"alpha".into(), &true.into()));
    bed.expect_gone();
}

/// A bed with this policy, and a client that has been answered.
fn start(tag: &str, policy: &str) -> (Bed, Relay) {
    let mut sketch = Sketch::of(EMBEDDED);
    sketch.protection = policy.to_owned();
    let bed = Bed::new(tag, &sketch);
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    (bed, client)
}

/// Killed twice: there and back, over one connection.
#[test]
fn a_killed_container_can_be_killed_again() {
    let (bed, mut client) = start("again", "on-container-loss: failover");
    for (host, other, generation) in [("alpha", "beta", 2), ("beta", "alpha", 3)] {
        bed.until_store("it is protected", |store| store["protected"] == true);
        bed.fault(&format!("kill-container:{host}"));
        let value = generation.to_string();
        assert_eq!(client.ask(&format!("SET a {value}")), "+OK");
        let store = bed.until_store("it is protected again", |store| {
            store["protected"] == true && store["primary"] == other
        });
        assert_eq!(store["generation"], generation, "{store:#}");
        assert_eq!((client.ask("GET a"), client.line()), ("$1".to_owned(), value));
    }
    drop(client);
    bed.destroy();
}

/// With the policy `restart` it is soon back where it was killed. Killed there again it stays away, as
/// what killed it is there.
#[test]
fn a_killed_container_goes_back_to_its_host_once() {
    let (bed, mut client) = start("restart", "on-container-loss: restart");
    bed.until_store("it is protected", |store| store["protected"] == true);
    bed.fault("kill-container:alpha");
    assert_eq!(client.ask("SET a 2"), "+OK");
    let store = bed.until_store("it is back and protected", |store| {
        store["protected"] == true && store["primary"] == "alpha"
    });
    assert_eq!(store["generation"], 3, "there and back: {store:#}");
    assert_eq!((client.ask("GET a"), client.line()), ("$1".to_owned(), "2".to_owned()));
    bed.fault("kill-container:alpha");
    assert_eq!(client.ask("SET a 3"), "+OK");
    let store = bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &4.into()));
    // There it goes on; it would have been moved as soon as it was protected.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let store = bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &4.into()));
    drop(client);
    bed.destroy();
}

#[test]
fn a_killed_container_has_ended_by_default() {
    let (bed, client) = start("ended", "");
    drop(client);
    bed.fault("kill-container:alpha");
    let store = bed.until_store("it has ended", |store| store["phase"] == "ended");
    let reason = store["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("killed by signal 9"), "{store:#}");
    assert_eq!((&store["primary"], &store["protected"]), (&Value::Null, &false.into()));
    bed.destroy();
}

/// One that ends by itself has ended, whatever the policy says of one that is killed.
#[test]
fn a_container_that_ends_by_itself_says_how() {
    let mut sketch = Sketch::of("command: [COMMAND]");
    sketch.protection = "on-container-loss: failover".to_owned();
    let bed = Bed::new("exit", &sketch);
    let end = bed.directory().join("end");
    let script = format!("while [ ! -e {} ]; do sleep 0.1; done; exit 7", end.display());
    bed.write(&bed.text().replace("COMMAND", &format!("sh, -c, \"{script}\"")));
    bed.deploy();
    std::fs::write(&end, "").expect("written");
    let store = bed.until_store("it has ended", |store| store["phase"] == "ended");
    let reason = store["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("exited with code 7"), "{store:#}");
    assert_eq!(store["primary"], Value::Null, "{store:#}");
    bed.destroy();
}

/// Without a backup that has a copy nobody goes on, and that is said.
#[test]
fn a_killed_container_without_a_backup_is_lost_and_that_is_said() {
    let (bed, client) = start("nobody", "on-container-loss: failover");
    drop(client);
    bed.fault("kill-agent:beta");
    bed.fault("kill-container:alpha");
    let store = bed.until_store("it is lost", |store| store["phase"] == "failed");
    let reason = store["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("killed by signal 9; its backup"), "{store:#}");
    bed.destroy();
}
