//! What many clients see of the same keys, judged by a checker of linearizability.

use nilicon_tests::{Bed, EMBEDDED, REDIS, Sketch, is_installed};
use serde_json::Value;

/// A bed whose clients share keys; the load beside them is small.
fn bed(tag: &str, store: &str) -> Bed {
    let client = "{ node: client, target: 'store:6379', connections: 4, keys: 1000, history: 8 }";
    let mut sketch = Sketch::of(store);
    sketch.clients.push(client.to_owned());
    Bed::new(tag, &sketch)
}

fn expect_linearizable(report: &Value) {
    assert_eq!(report["linearizable"], true, "{report:#}");
    let history = &report["clients"][0]["history"];
    assert_eq!((&history["connections"], &history["linearizable"]), (&8.into(), &true.into()));
    assert_eq!((&history["unanswered"], &history["offence"]), (&0.into(), &Value::Null));
    assert!(history["operations"].as_u64().is_some_and(|count| count > 500), "{report:#}");
}

#[test]
fn many_clients_see_one_register_through_the_loss_of_its_host() {
    let store = if is_installed("redis-server") { REDIS } else { EMBEDDED };
    let bed = bed("register", store);
    let line = ["--duration", "5s", "--fault", "kill-host:alpha@2s", "-o", "json"];
    let report = bed.run("run", &line).expect_success().json();
    assert_eq!(report["failover"]["host"], "beta", "{report:#}");
    expect_linearizable(&report);
    let line = ["--runs", "2", "--duration", "3s", "--fault", "kill-host", "-o", "json"];
    let report = bed.run("drill", &line).expect_success().json();
    assert_eq!(report["linearizable"], true, "{report:#}");
    assert_eq!(
        (&report["histories"]["judged"], &report["histories"]["violated"]),
        (&2.into(), &0.into())
    );
    bed.expect_gone();
}

/// The control: checkpoints no longer arrive, answers leave all the same, and then the host is gone.
/// What clients were told meanwhile is forgotten, and no order explains that.
#[test]
fn without_output_commit_the_history_cannot_be_explained() {
    let bed = bed("forget", EMBEDDED);
    let faults = ["cut-link:alpha:repl@2s", "kill-host:alpha@2030ms"];
    let mut line = vec!["--duration", "4s", "--output-commit", "off"];
    line.extend(faults.iter().flat_map(|fault| ["--fault", fault]));
    let done = bed.run("run", &line);
    for part in ["is not linearizable", "1 NOT LINEARIZABLE", "none of these can be next"] {
        assert!(done.stdout.contains(part), "{part}: {done}");
    }
    line.extend(["-o", "json"]);
    let report = bed.run("run", &line).json();
    assert_eq!(report["linearizable"], false, "{report:#}");
    let offence = &report["clients"][0]["history"]["offence"];
    assert!(offence["key"].as_str().is_some_and(|key| key.contains("shared")), "{report:#}");
    assert!(offence["operations"].as_array().is_some_and(|lines| lines.len() > 2), "{report:#}");
    // The same faults where output waits.
    let mut line = vec!["--duration", "4s", "-o", "json"];
    line.extend(faults.iter().flat_map(|fault| ["--fault", fault]));
    expect_linearizable(&bed.run("run", &line).expect_success().json());
    bed.expect_gone();
}
