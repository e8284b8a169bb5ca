//! Whatever ends a command in the middle: nothing of its lab stays, or `destroy` removes it.

use std::time::Duration;

use nilicon_tests::{Bed, EMBEDDED, Running, Sketch, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// How far a run is when something happens to it.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// The lab is being made.
    Deploying,
    /// The agents have started.
    Syncing,
    /// The load runs.
    Loaded,
    /// The container has moved.
    FailedOver,
}

fn start_run(bed: &Bed, moment: Moment) -> Running {
    let fault = "kill-host:alpha@1s";
    let mut run = bed.start("run", &["--duration", "60s", "--fault", fault]);
    until(&format!("the run to be {moment:?}"), || {
        assert!(!run.has_ended(), "the run ended by itself");
        let there = match moment {
            Moment::Deploying => bed.state().exists(),
            Moment::Syncing => bed.state().join("alpha.sock").exists(),
            Moment::Loaded => bed.leftovers().iter().any(|left| left.contains("__client")),
            Moment::FailedOver => bed.state().join("beta.store.failover").exists(),
        };
        there.then_some(())
    });
    run
}

#[test]
fn ctrl_c_at_any_moment_leaves_nothing() {
    for moment in [Moment::Deploying, Moment::Syncing, Moment::Loaded, Moment::FailedOver] {
        let bed = Bed::new("ctrl-c", &Sketch::of(EMBEDDED).loaded());
        let run = start_run(&bed, moment);
        run.press_ctrl_c();
        let done = run.wait(PATIENCE).expect_code(130);
        assert!(done.stderr.contains("interrupted by SIGINT"), "{moment:?}: {done}");
        bed.expect_gone();
    }
}

#[test]
fn sigterm_leaves_nothing_of_a_lab_with_impaired_links() {
    let mut sketch = Sketch::of(EMBEDDED).loaded();
    sketch.replication = "impair: { delay: 300us, jitter: 100us, loss: 0.1% }".to_owned();
    sketch.protection = "detector: { heartbeat: 5ms, timeout: 200ms }".to_owned();
    let bed = Bed::new("term", &sketch);
    let run = start_run(&bed, Moment::Loaded);
    run.signal(Signal::SIGTERM);
    let done = run.wait(PATIENCE).expect_code(143);
    assert!(done.stderr.contains("interrupted by SIGTERM"), "{done}");
    bed.expect_gone();
}

#[test]
fn ctrl_c_ends_a_drill_and_a_deployment() {
    let bed = Bed::new("verbs", &Sketch::of(EMBEDDED).loaded());
    let drill = bed.start("drill", &["--runs", "50", "--fault", "kill-host"]);
    until("the drill to begin", || bed.state().join("alpha.sock").exists().then_some(()));
    drill.press_ctrl_c();
    drill.wait(PATIENCE).expect_code(130);
    bed.expect_gone();

    // What was asked to stand may stand half made; `destroy` knows what to do with it.
    let deploy = bed.start("deploy", &[]);
    until("the lab to begin", || bed.state().exists().then_some(()));
    deploy.press_ctrl_c();
    let done = deploy.wait(PATIENCE);
    assert!(matches!(done.code, Some(0 | 130)), "{done}");
    bed.destroy();
}

#[test]
fn what_a_killed_run_leaves_is_removed_by_destroy() {
    let bed = Bed::new("killed", &Sketch::of(EMBEDDED).loaded());
    let run = start_run(&bed, Moment::Loaded);
    run.signal(Signal::SIGKILL);
    run.wait(PATIENCE);
    // Nobody reads what a client says any more, so it must not go on for long by itself.
    until("the clients to end", || {
        (!bed.leftovers().iter().any(|left| left.contains("__client"))).then_some(())
    });
    bed.destroy();
}

#[test]
fn a_run_clears_away_what_a_killed_run_left() {
    let bed = Bed::new("again", &Sketch::of(EMBEDDED).loaded());
    let run = start_run(&bed, Moment::Loaded);
    run.signal(Signal::SIGKILL);
    run.wait(PATIENCE);
    let second = bed.run("run", &["--duration", "2s", "-o", "json"]);
    // Its agents live, and may belong to somebody: it says so rather than killing them.
    second.expect_complaint(&["is in use; end that with: nilicon destroy"]);
    kill_agents(&bed);
    bed.run("run", &["--duration", "2s", "-o", "json"]).expect_success();
    bed.expect_gone();
}

fn agents(bed: &Bed) -> Vec<i32> {
    let view = bed.inspect();
    let nodes = view["nodes"].as_array().expect("nodes");
    nodes.iter().filter_map(|node| node["agent_pid"].as_i64()).map(|pid| pid as i32).collect()
}

fn kill_agents(bed: &Bed) {
    let agents = agents(bed);
    assert_eq!(agents.len(), 2);
    for &pid in &agents {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill an agent");
    }
    until("the agents to end", || agents.iter().all(|pid| has_ended(*pid)).then_some(()));
}

/// Whether all threads of a process have ended; it may still wait to be reaped.
fn has_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let waits = stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('Z'));
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.is_empty() || waits && threads <= 1
}

/// The containers must not live on without their agents: nobody holds their output then.
#[test]
fn containers_end_with_their_agents() {
    let bed = Bed::new("agents", &Sketch::of(EMBEDDED));
    bed.deploy();
    kill_agents(&bed);
    until("the containers to end", || {
        (!bed.leftovers().iter().any(|left| left.starts_with("process"))).then_some(())
    });
    let store = bed.store().expect("the lab stands");
    assert_eq!((&store["primary"], &store["phase"]), (&Value::Null, &Value::Null));
    bed.destroy();
}

#[test]
fn a_kept_lab_stands_until_it_is_destroyed() {
    let bed = Bed::new("kept", &Sketch::of(EMBEDDED).loaded());
    let done = bed.run("run", &["--duration", "2s", "--keep"]).expect_success();
    assert!(done.stderr.contains(&format!("nilicon destroy {}", bed.name)), "{done}");
    let store = bed.store().expect("it stands");
    assert_eq!((&store["primary"], &store["protected"]), (&"alpha".into(), &true.into()));
    assert!(!bed.leftovers().iter().any(|left| left.contains("__client")));
    bed.destroy();
    bed.run("destroy", &[]).expect_success();
}

/// An agent that is asked to end does so, and takes its containers along.
#[test]
fn an_agent_ends_on_sigterm() {
    let bed = Bed::new("polite", &Sketch::of(EMBEDDED));
    bed.deploy();
    for pid in agents(&bed) {
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("signal an agent");
    }
    until("agents and containers to end", || {
        (!bed.leftovers().iter().any(|left| left.starts_with("process"))).then_some(())
    });
    bed.destroy();
}
