//! A host that was lost comes back: it must neither harm what runs, nor be needed for it.

use nilicon_tests::{Bed, EMBEDDED, Running, Sketch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::time::{Duration, Instant};

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const STORE: &str = "10.77.0.10:6379";

/// Starts the agent of a host by hand, as an init system does after a restart.
fn restart_agent(bed: &Bed, host: &str) -> Running {
    let binary = nilicon_tests::binary();
    let topology = bed.state().join("topology.json");
    let (binary, topology) = (binary.to_str().expect("text"), topology.to_str().expect("text"));
    bed.start_exec(host, &[binary, "agent", topology, "--host", host])
}

/// While there is no backup no output leaves; when it is back, a full copy brings protection back
/// too, and the connection goes on.
#[test]
fn a_backup_that_comes_back_protects_again() {
    let bed = Bed::new("backup", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:beta");
    let store = bed.until_store("the loss is noticed", |store| store["protected"] == false);
    assert_eq!((&store["primary"], &store["backup"]), (&"alpha".into(), &Value::Null));
    assert!(store["reason"].is_string(), "{store:#}");
    client.send("SET a 2\r\n");
    bed.deploy();
    assert_eq!(client.line(), "+OK");
    let store = bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!((&store["generation"], &store["backup"]), (&1.into(), &"beta".into()));
    // The new copy is worth as much as the first.
    bed.fault("kill-host:alpha");
    assert_eq!(client.ask("GET a"), "$1");
    assert_eq!(client.line(), "2");
    assert_eq!(client.ask("SET a 3"), "+OK");
    drop(client);
    bed.destroy();
}

/// The agent of the old primary knows nothing of the failover. The other side tells it, and from
/// then on it is the backup: the next failover brings the container back.
#[test]
fn an_old_primary_that_comes_back_becomes_the_backup() {
    let bed = Bed::new("primary", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    bed.fault("restart-agent:alpha");
    for round in 0..100 {
        assert_eq!(client.ask(&format!("SET a {round}")), "+OK");
        let mut other = bed.connect(RELAY, "client", STORE);
        assert_eq!(other.ask("GET a"), format!("${}", round.to_string().len()));
        assert_eq!(other.line(), round.to_string());
    }
    let store = bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["backup"]), (&"beta".into(), &"alpha".into()));
    assert_eq!(store["generation"], 2);
    assert_eq!(client.ask("SET a back"), "+OK");
    bed.fault("kill-host:beta");
    assert_eq!((client.ask("GET a"), client.line()), ("$4".to_owned(), "back".to_owned()));
    let store = bed.until_store("alpha has it", |store| store["primary"] == "alpha");
    assert_eq!(store["generation"], 3);
    drop(client);
    bed.destroy();
}

/// Started again before anybody has missed it: it must not begin anew what its backup holds.
#[test]
fn an_agent_that_dies_and_starts_at_once_does_not_begin_a_second_life() {
    let bed = Bed::new("atonce", &Sketch::of(EMBEDDED));
    bed.write(&bed.text().replace("over: repl\n", "over: repl\n    detector: { timeout: 20s }\n"));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:alpha");
    bed.fault("restart-agent:alpha");
    assert_eq!((client.ask("GET a"), client.line()), ("$1".to_owned(), "1".to_owned()));
    let store = bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["backup"]), (&"beta".into(), &"alpha".into()));
    drop(client);
    bed.destroy();
}

/// A hypervisor that pauses the whole machine makes every host find every other one silent. That
/// is nobody's death: nobody takes over, and the connection goes on.
#[test]
fn a_pause_of_the_whole_machine_is_no_death() {
    let bed = Bed::new("pause", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    let view = bed.inspect();
    let nodes = view["nodes"].as_array().expect("nodes").iter();
    let agents: Vec<Pid> = nodes
        .filter_map(|node| node["agent_pid"].as_i64())
        .map(|pid| Pid::from_raw(pid.try_into().expect("a pid")))
        .collect();
    assert_eq!(agents.len(), 2, "{view:#}");
    for round in 0..5 {
        for signal in [Signal::SIGSTOP, Signal::SIGCONT] {
            for agent in &agents {
                kill(*agent, signal).expect("it runs");
            }
            if signal == Signal::SIGSTOP {
                // Longer than the detectors' timeout; how much longer does not matter.
                std::thread::sleep(Duration::from_millis(400));
            }
        }
        assert_eq!(client.ask(&format!("SET a {round}")), "+OK");
    }
    let store = bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["generation"]), (&"alpha".into(), &1.into()));
    drop(client);
    bed.destroy();
}

/// A lab that is deployed again after a failover is made whole: the lost host comes back as the
/// backup.
#[test]
fn deploying_again_after_a_failover_protects_again() {
    let bed = Bed::new("again", &Sketch::of(EMBEDDED));
    bed.deploy();
    bed.fault("kill-host:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    let done = bed.deploy();
    assert!(done.stdout.contains("runs on beta, protected by alpha"), "{done}");
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    drop(client);
    bed.destroy();
}

/// Both agents are lost while nobody had a whole copy. The container begins anew, and in a generation that
/// is newer than any before: what is left of an older one counts no more.
#[test]
fn a_new_life_is_of_a_newer_generation_than_any_before() {
    let bed = Bed::new("anew", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    drop(client);
    bed.fault("kill-agent:beta");
    bed.fault("restart-agent:alpha");
    bed.fault("restart-agent:beta");
    let store = bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!(store["primary"], "alpha", "{store:#}");
    assert!(store["generation"].as_u64() > Some(2), "{store:#}");
    // Who had learned that it is at beta was told that it is not.
    let begun = Instant::now();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("GET a"), "$-1");
    assert!(begun.elapsed() < Duration::from_secs(20), "its neighbours look for it elsewhere");
    drop(client);
    bed.destroy();
}

/// The agent of the old primary comes back where it cannot hear of the failover. It must not
/// answer for the container: that would be a second, empty one.
#[test]
fn an_old_primary_that_hears_nothing_says_nothing() {
    let bed = Bed::new("deaf", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.fault("kill-agent:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    bed.fault("cut-link:alpha:repl");
    let mut agent = restart_agent(&bed, "alpha");
    nilicon_tests::until("alpha to run an agent", || {
        assert!(!agent.has_ended());
        let view = bed.inspect();
        let nodes = view["nodes"].as_array().expect("nodes").clone();
        let is_alpha = |node: &Value| node["name"] == "alpha" && node["agent_pid"].is_number();
        nodes.iter().any(is_alpha).then_some(())
    });
    // Each of these asks anew who has the address.
    for _ in 0..20 {
        bed.exec("client", &["ip", "neigh", "flush", "all"]).expect_success();
        let mut other = bed.connect(RELAY, "client", STORE);
        assert_eq!((other.ask("GET a"), other.line()), ("$1".to_owned(), "1".to_owned()));
    }
    assert_eq!(client.ask("SET a 2"), "+OK");
    drop((client, agent));
    bed.destroy();
}
