//! Programs that know nothing of nilicon, servers and clients, over the loss of a host.

use std::time::Duration;

use nilicon_tests::{Bed, EMBEDDED, MEMCACHED, REDIS, Sketch, is_installed};

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const PATIENCE: Duration = Duration::from_secs(120);

fn redis_cli(bed: &Bed, command: &[&str]) -> String {
    let line: Vec<&str> =
        ["redis-cli", "-h", "10.77.0.10"].iter().chain(command).copied().collect();
    bed.exec("client", &line).expect_success().stdout.trim_end().to_owned()
}

/// The story of the README by hand: deploy, look, break, look, go on, destroy.
#[test]
fn redis_and_its_own_tools_over_a_failover() {
    if !["redis-server", "redis-cli", "redis-benchmark"].into_iter().all(is_installed) {
        return;
    }
    let bed = Bed::new("tools", &Sketch::of(REDIS));
    let said = bed.deploy().stdout;
    assert!(said.contains("store (10.77.0.10) runs on alpha, protected by beta"), "{said}");

    let store = bed.store().expect("deployed");
    assert_eq!((&store["primary"], &store["backup"]), (&"alpha".into(), &"beta".into()));
    assert_eq!((&store["protected"], &store["generation"]), (&true.into(), &1.into()));
    assert_eq!(redis_cli(&bed, &["set", "name", "kept"]), "OK");
    for expected in 1..=5 {
        assert_eq!(redis_cli(&bed, &["incr", "counter"]), expected.to_string());
    }

    // Plain GETs and SETs, and pipelines; enough of them to last over the failover.
    let address = ["-h", "10.77.0.10", "-p", "6379"];
    let load = ["redis-benchmark", "-t", "set,get", "-n", "60000", "-c", "20", "-P", "4", "-q"];
    let line: Vec<&str> = load.into_iter().chain(address).collect();
    let mut benchmark = bed.start_exec("client", &line);
    // So many that all its connections are established; those in the making would be reset.
    nilicon_tests::until("the benchmark to be under way", || {
        let stats = redis_cli(&bed, &["info", "commandstats"]);
        let calls = stats.lines().find_map(|line| line.strip_prefix("cmdstat_set:calls="))?;
        (calls.split(',').next()?.parse::<u64>().ok()? > 2000).then_some(())
    });
    assert!(!benchmark.has_ended(), "it ended before the fault, which so proves nothing");
    bed.fault("kill-host:alpha");
    let done = benchmark.wait(PATIENCE).expect_success();
    for bad in ["rror", "reset", "losed", "refused"] {
        assert!(!done.stderr.contains(bad) && !done.stdout.contains(bad), "{done}");
    }
    assert!(done.stdout.contains("SET") && done.stdout.contains("GET"), "{done}");

    assert_eq!(redis_cli(&bed, &["incr", "counter"]), "6");
    assert_eq!(redis_cli(&bed, &["get", "name"]), "kept");
    let view = bed.inspect();
    let store = &view["containers"][0];
    assert_eq!((&store["primary"], &store["backup"]), (&"beta".into(), &None::<String>.into()));
    assert_eq!((&store["protected"], &store["generation"]), (&false.into(), &2.into()));
    let role = |node: &str| {
        let nodes = view["nodes"].as_array().expect("nodes");
        let found = nodes.iter().find(|n| n["name"] == node).expect("the node");
        (found["role"].as_str().expect("a role").to_owned(), found["agent_pid"].is_number())
    };
    assert_eq!(role("alpha"), ("none".to_owned(), false));
    assert_eq!(role("beta"), ("primary".to_owned(), true));
    bed.destroy();
}

/// A load with a new connection for each request: those that are being made when the host is lost
/// may be reset, as the documentation says. An old one beside them is not, and new ones work.
#[test]
fn where_young_connections_are_reset_an_old_one_is_not() {
    if !["redis-server", "redis-benchmark", "redis-cli"].into_iter().all(is_installed) {
        return;
    }
    let bed = Bed::new("young", &Sketch::of(REDIS));
    bed.deploy();
    let mut old = bed.connect(RELAY, "client", "10.77.0.10:6379");
    let load = ["redis-benchmark", "-t", "set", "-n", "8000", "-c", "20", "-k", "0", "-q"];
    let line: Vec<&str> = load.into_iter().chain(["-h", "10.77.0.10"]).collect();
    let mut benchmark = bed.start_exec("client", &line);
    nilicon_tests::until("the benchmark to begin", || {
        let stats = redis_cli(&bed, &["info", "stats"]);
        let line = stats.lines().find(|line| line.starts_with("total_connections_received:"))?;
        let count: u64 = line.split(':').nth(1)?.trim().parse().ok()?;
        (count > 200).then_some(())
    });
    for value in 0..10 {
        assert_eq!(old.ask(&format!("set mark {value}")), "+OK");
    }
    assert!(!benchmark.has_ended(), "it ended before the fault, which so proves nothing");
    bed.fault("kill-host:alpha");
    assert_eq!((old.ask("get mark"), old.line()), ("$1".to_owned(), "9".to_owned()));
    let done = benchmark.wait(PATIENCE);
    assert!(done.code == Some(0) || done.stderr.contains("Connection reset by peer"), "{done}");
    let line: Vec<&str> =
        line.iter().map(|word| if *word == "8000" { "500" } else { word }).collect();
    bed.exec("client", &line).expect_success();
    assert_eq!(old.ask("set mark 1"), "+OK");
    drop(old);
    bed.destroy();
}

/// Redis saves by a fork; the child is no thread of the server, and not there from the beginning.
#[test]
fn redis_forks_while_it_is_protected_and_after_it_moved() {
    if !["redis-server", "redis-cli"].into_iter().all(is_installed) {
        return;
    }
    let dump = format!("nilicon-e2e-{}.rdb", std::process::id());
    let saving = REDIS.replace("--save,", &format!("--dir, /tmp, --dbfilename, {dump}, --save,"));
    let bed = Bed::new("fork", &Sketch::of(&saving));
    bed.deploy();
    let saved = |bed: &Bed| {
        let before = redis_cli(bed, &["lastsave"]);
        assert!(redis_cli(bed, &["bgsave"]).starts_with("Background saving started"));
        nilicon_tests::until("the background save", || {
            let info = redis_cli(bed, &["info", "persistence"]);
            let is_over = info.contains("rdb_bgsave_in_progress:0");
            is_over.then(|| assert!(info.contains("rdb_last_bgsave_status:ok"), "{before}: {info}"))
        });
    };
    redis_cli(&bed, &["set", "name", "kept"]);
    saved(&bed);
    bed.until_store("it is protected again", |store| store["protected"] == true);
    bed.fault("kill-host:alpha");
    assert_eq!(redis_cli(&bed, &["get", "name"]), "kept");
    saved(&bed);
    assert_eq!(redis_cli(&bed, &["get", "name"]), "kept");
    bed.destroy();
    let _ = std::fs::remove_file(std::path::Path::new("/tmp").join(dump));
}

/// One connection, opened before the fault, sees everything that it wrote.
#[test]
fn memcached_keeps_a_connection_and_its_values() {
    if !is_installed("memcached") {
        return;
    }
    let bed = Bed::new("memc", &Sketch::of(MEMCACHED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:11211");
    let set = |client: &mut nilicon_tests::Relay, key: usize| {
        let value = format!("value of {key} ").repeat(40);
        client.send(&format!("set key-{key} 0 0 {}\r\n{value}\r\n", value.len()));
        assert_eq!(client.line(), "STORED");
    };
    for key in 0..50 {
        set(&mut client, key);
    }
    assert_eq!(bed.store().expect("deployed")["protected"], true);
    bed.fault("kill-host:alpha");
    for key in 50..60 {
        set(&mut client, key);
    }
    for key in 0..60 {
        let value = format!("value of {key} ").repeat(40);
        assert_eq!(
            client.ask(&format!("get key-{key}")),
            format!("VALUE key-{key} 0 {}", value.len())
        );
        assert_eq!(client.line(), value.trim_end());
        assert_eq!(client.line(), "END");
    }
    let store = bed.store().expect("still there");
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &2.into()));
    // A client that comes only now is served too.
    let mut late = bed.connect(RELAY, "client", "10.77.0.10:11211");
    assert!(late.ask("get key-7").starts_with("VALUE key-7 0 "));
    drop((client, late));
    bed.destroy();
}

/// A connection that says nothing for a while is as much alive as a busy one.
#[test]
fn an_idle_connection_survives_too() {
    let bed = Bed::new("idle", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    assert_eq!(client.ask("SET a 1"), "+OK");
    let mut silent = bed.connect(RELAY, "client", "10.77.0.10:6379");
    // The server has accepted it; one in the making would be reset.
    assert_eq!(silent.ask("PING"), "+PONG");
    bed.fault("kill-host:alpha");
    bed.until_store("beta runs it", |store| store["primary"] == "beta");
    assert_eq!(silent.ask("GET a"), "$1");
    assert_eq!(silent.line(), "1");
    assert_eq!(client.ask("SET a 2"), "+OK");
    drop((client, silent));
    bed.destroy();
}
