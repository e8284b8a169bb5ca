//! A backup that gets no memory: its agent, or the spare. The primary does what its policy says, nothing
//! is lost, it is said, and protection comes back when there is room.

use nilicon_tests::{Bed, EMBEDDED, Relay, Sketch, is_installed};
use std::process::Command;
use std::time::{Duration, Instant};

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const STORE: &str = "10.77.0.10:6379";
/// What is written: many megabytes, more than any room that is left.
const KEYS: usize = 20_000;
const SIZE: usize = 2048;
/// For what comes by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// A protected container, and a client that has been answered.
fn start(tag: &str, policy: &str) -> (Bed, Relay) {
    let mut sketch = Sketch::of(EMBEDDED);
    sketch.protection = policy.to_owned();
    let bed = Bed::new(tag, &sketch);
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    bed.until_store("it is protected", |store| store["protected"] == true);
    (bed, client)
}

/// The agent of a host.
fn agent(bed: &Bed, host: &str) -> u64 {
    let lab = bed.inspect();
    let nodes = lab["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|node| node["name"] == host).expect("the host");
    node["agent_pid"].as_u64().expect("it runs")
}

/// The first process of the spare that an agent keeps.
fn spare(agent: u64) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{agent}/task")).expect("threads");
    let children = tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let all: String = children.collect();
    all.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("it has a spare")
}

/// From now on a process gets no more memory than it has, but for a megabyte.
fn no_more_for(pid: u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let size = status.lines().find_map(|line| line.strip_prefix("VmData:")).expect("its size");
    let size: u64 = size.trim().trim_end_matches(" kB").parse().expect("a number");
    let limit = format!("--data={}", (size << 10) + (1 << 20));
    let done = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(done.expect("prlimit runs").success());
}

/// Writes more than there is room for; the answer is yet to come.
fn write_much(client: &mut Relay) {
    client.send(&format!("DEBUG POPULATE {KEYS} big {SIZE}\r\n"));
}

/// It is all there after the loss of the primary.
fn expect_all(bed: &Bed, mut client: Relay) {
    bed.until_store("it is protected again", |store| store["protected"] == true);
    bed.fault("kill-host:alpha");
    assert_eq!((client.ask("GET a"), client.line()), ("$1".to_owned(), "1".to_owned()));
    for at in [0, KEYS / 2, KEYS - 1] {
        assert_eq!(client.ask(&format!("GET big:{at}")), format!("${SIZE}"));
        assert!(client.line().starts_with(&format!("value:{at}")));
    }
    drop(client);
    let store = bed.until_store("beta has it", |store| store["primary"] == "beta");
    assert_eq!(store["phase"], "unprotected", "{store:#}");
    bed.destroy();
}

fn log(bed: &Bed, host: &str) -> String {
    std::fs::read_to_string(bed.state().join(format!("{host}.log"))).expect("a log")
}

/// The agent of the backup ends, as one that the kernel ends, in the middle of what is written.
fn lose_backup(bed: &Bed, client: &mut Relay) {
    bed.fault("fill-memory:beta");
    write_much(client);
    let said = nilicon_tests::until("the backup's agent to end", || {
        let lab = bed.inspect();
        let beta =
            &lab["nodes"].as_array()?.iter().find(|node| node["name"] == "beta")?["agent_pid"];
        beta.is_null().then(|| log(bed, "beta"))
    });
    assert!(said.contains("memory") || said.contains("Cannot allocate"), "{said}");
}

/// Clients wait until there is another one.
#[test]
fn an_agent_that_gets_no_memory_is_a_lost_backup() {
    let (bed, mut client) = start("nomem", "");
    lose_backup(&bed, &mut client);
    let store = bed.until_store("the loss is noticed", |store| store["phase"] == "severed");
    assert_eq!((&store["primary"], &store["protected"]), (&"alpha".into(), &false.into()));
    assert!(store["reason"].is_string(), "{store:#}");
    bed.fault("free-memory:beta");
    assert_eq!(client.line(), "+OK");
    expect_all(&bed, client);
}

/// With `degrade` they do not: once the arbiter has agreed, what they wait for leaves unprotected.
#[test]
fn a_backup_without_memory_is_done_without() {
    let (bed, mut client) = start("nomemdeg", "arbiter: manual\non-backup-loss: degrade");
    lose_backup(&bed, &mut client);
    nilicon_tests::until("alpha to ask", || {
        log(&bed, "alpha").contains("an operator must say").then_some(())
    });
    // Nobody has agreed yet.
    std::thread::sleep(Duration::from_millis(500));
    assert!(!client.has_more());
    bed.run("allow", &["store", "alpha"]).expect_success();
    assert_eq!(client.line(), "+OK");
    let store = bed.until_store("it runs alone", |store| store["phase"] == "unprotected");
    assert_eq!((&store["primary"], &store["generation"]), (&"alpha".into(), &2.into()));
    bed.fault("free-memory:beta");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!(client.ask(&format!("GET big:{}", KEYS - 1)), format!("${SIZE}"));
    drop(client);
    bed.destroy();
}

/// With `stop` the container ends, and what was not committed is never answered.
#[test]
fn without_memory_for_its_backup_a_container_ends_if_that_is_wanted() {
    let (bed, mut client) = start("nomemstop", "on-backup-loss: stop");
    lose_backup(&bed, &mut client);
    let store = bed.until_store("it ends", |store| store["phase"] == "failed");
    let reason = store["reason"].as_str().expect("a reason");
    assert!(reason.contains("its policy is to stop"), "{store:#}");
    assert_eq!((&store["primary"], &store["protected"]), (&serde_json::Value::Null, &false.into()));
    bed.fault("free-memory:beta");
    // Nobody closes the connection: it ends with the lab.
    bed.destroy();
    assert_eq!(client.rest(), "", "an answer that was not committed");
}

/// The spare is given up, and a new one is made: it has room.
#[test]
fn a_spare_that_gets_no_memory_is_made_anew() {
    if !is_installed("prlimit") {
        return;
    }
    let (bed, mut client) = start("sparemem", "");
    no_more_for(spare(agent(&bed, "beta")));
    write_much(&mut client);
    assert_eq!(client.line(), "+OK");
    // It is applied beside what follows.
    let begin = Instant::now();
    let said = loop {
        let said = log(&bed, "beta");
        if said.contains("the warm spare cannot follow") || begin.elapsed() > PATIENCE {
            break said;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(said.contains("the warm spare cannot follow"), "{said}");
    assert!(said.contains("Cannot allocate memory"), "{said}");
    // Until the primary has noticed, it says that it is protected still.
    nilicon_tests::until("the primary to come back", || {
        let said = log(&bed, "beta");
        let since = said.rsplit("the warm spare cannot follow").next()?;
        since.contains("a primary presents itself").then_some(())
    });
    expect_all(&bed, client);
}
