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
/// go on as the old ones do.
#[test]
fn young_connections_survive_as_old_ones_do() {
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
    let done = benchmark.wait(PATIENCE).expect_success();
    for bad in ["rror", "reset", "losed", "refused"] {
        assert!(!done.stderr.contains(bad) && !done.stdout.contains(bad), "{done}");
    }
    assert_eq!(old.ask("set mark 1"), "+OK");
    drop(old);
    bed.destroy();
}

/// A server writes 1 MB, closes and thinks no more of it. A client that reads slowly gets all of
/// it, although the host that it came from is gone.
#[test]
fn what_a_closed_socket_had_to_send_arrives_after_a_failover() {
    arrives_after_a_failover("closed", 500);
}

/// The same within one epoch: no checkpoint has ever had a descriptor with those bytes.
#[test]
fn what_was_written_and_closed_at_once_arrives_after_a_failover() {
    arrives_after_a_failover("atonce", 0);
}

fn arrives_after_a_failover(tag: &str, pause_ms: u32) {
    const ALL: usize = 1 << 20;
    let server = format!(
        "command: [{RELAY}, --give, \"0.0.0.0:6379\", \"{ALL}\", \"{pause_ms}\"]\n    \
         ready: {{ tcp: 6379 }}"
    );
    let bed = Bed::new(tag, &Sketch::of(&server));
    bed.deploy();
    let console = bed.state().join("store.console");
    let gave = || {
        let text = std::fs::read_to_string(&console).unwrap_or_default();
        text.lines().filter(|line| *line == "gave all").count()
    };
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    // Nobody reads, so that most of it waits at the server.
    let before = gave();
    nilicon_tests::until("the server to have closed", || (gave() > before).then_some(()));
    let epoch = bed.store().expect("deployed")["epoch"].as_u64().expect("a number");
    // Its kernel asks for room ever more seldom, and says nothing else: what it answers to this ends epochs.
    let knock = "exec 3<>/dev/tcp/10.77.0.10/1";
    bed.until_store("it is in a checkpoint", |store| {
        let _refused = bed.exec("client", &["timeout", "5", "bash", "-c", knock]);
        store["epoch"].as_u64() > Some(epoch + 2)
    });
    bed.fault("kill-host:alpha");
    bed.until_store("beta runs it", |store| store["primary"] == "beta");
    let got = client.all_bytes();
    assert_eq!(got.len(), ALL);
    assert!(got.iter().enumerate().all(|(i, b)| *b == (i % 251) as u8));
    // And so do later ones.
    assert_eq!(bed.connect(RELAY, "client", "10.77.0.10:6379").all_bytes().len(), ALL);
    bed.destroy();
}

/// Connections that live for a moment: the server answers and closes at once, within one epoch. No
/// client misses a byte, none gets a reset, wherever its connection was when the host was lost.
#[test]
fn short_connections_end_well_over_a_failover() {
    end_well_over_a_failover("short", 3000, 1600);
}

/// The same with more than a new connection may send at once.
#[test]
fn long_answers_on_short_connections_end_well_over_a_failover() {
    end_well_over_a_failover("longer", 200_000, 800);
}

fn end_well_over_a_failover(tag: &str, all: usize, times: usize) {
    let server = format!(
        "command: [{RELAY}, --give, \"0.0.0.0:6379\", \"{all}\", \"0\"]\n    ready: {{ tcp: 6379 }}"
    );
    let bed = Bed::new(tag, &Sketch::of(&server));
    bed.deploy();
    let console = bed.state().join("store.console");
    let (all, times) = (all.to_string(), times.to_string());
    let line = [RELAY, "--fetch", "10.77.0.10:6379", &all, &times];
    let mut clients = bed.start_exec("client", &line);
    nilicon_tests::until("the load to be under way", || {
        let text = std::fs::read_to_string(&console).unwrap_or_default();
        (text.lines().filter(|line| *line == "gave all").count() > 200).then_some(())
    });
    assert!(!clients.has_ended(), "it ended before the fault, which so proves nothing");
    bed.fault("kill-host:alpha");
    clients.wait(PATIENCE).expect_success();
    assert_eq!(bed.store().expect("still there")["primary"], "beta");
    bed.destroy();
}

/// A server that is too busy to accept has acknowledged what clients sent; they wait for an
/// answer over the failover, and get it.
#[test]
fn clients_in_the_accept_queue_are_answered_after_a_failover() {
    if !["redis-server", "redis-cli"].into_iter().all(is_installed) {
        return;
    }
    const CLIENTS: usize = 12;
    let asleep = REDIS.replace("--save,", "--enable-debug-command, \"yes\", --save,");
    let bed = Bed::new("queue", &Sketch::of(&asleep));
    bed.deploy();
    let mut first = bed.connect(RELAY, "client", "10.77.0.10:6379");
    assert_eq!(first.ask("PING"), "+PONG");
    first.send("DEBUG SLEEP 5\r\n");
    let mut clients: Vec<_> =
        (0..CLIENTS).map(|_| bed.connect(RELAY, "client", "10.77.0.10:6379")).collect();
    // More than one segment from each but the last, which says nothing yet.
    // The first sends more than fits a receive buffer: some of it waits at the client.
    let value = |i: usize| format!("{i}-").repeat(if i == 0 { 150_000 } else { 1500 });
    for (i, client) in clients.iter_mut().enumerate().take(CLIENTS - 1) {
        let (key, value) = (format!("key{i}"), value(i));
        let (k, v) = (key.len(), value.len());
        client.send(&format!("*3\r\n$3\r\nSET\r\n${k}\r\n{key}\r\n${v}\r\n{value}\r\n"));
    }
    // Established (01), to port 6379, with nothing unacknowledged.
    nilicon_tests::until("all are in the queue", || {
        let table = bed.exec("client", &["cat", "/proc/net/tcp"]).expect_success().stdout;
        let waiting = table.lines().filter(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.len() > 4
                && fields[2].ends_with(":18EB")
                && fields[3] == "01"
                && fields[4].starts_with("00000000:")
        });
        (waiting.count() >= CLIENTS).then_some(())
    });
    // The queue is in a checkpoint when what was sent after it has been acknowledged.
    bed.fault("kill-host:alpha");
    for client in clients.iter_mut().take(CLIENTS - 1) {
        assert_eq!(client.line(), "+OK");
    }
    assert_eq!(first.line(), "+OK");
    assert_eq!(clients[CLIENTS - 1].ask("STRLEN key3"), ":3000");
    for (i, client) in clients.iter_mut().enumerate().take(CLIENTS - 1) {
        let asked = client.ask(&format!("GET key{i}"));
        assert_eq!((asked, client.line()), (format!("${}", value(i).len()), value(i)));
    }
    let store = bed.store().expect("still there");
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &2.into()));
    drop((first, clients));
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

/// Everything over IPv6: the clients' network, the container and the checkpoints. A client knows
/// the container by its global and by its link-local address, and by its second one, of IPv4, it
/// would be there as well.
#[test]
fn connections_over_ipv6_survive_too() {
    if !is_installed("redis-server") {
        return;
    }
    let bed = Bed::of_ipv6("six", &Sketch::of(REDIS));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "[fd00:77::10]:6379");
    assert_eq!(client.ask("SET a 1"), "+OK");
    let info = bed.exec("client", &["ip", "-6", "neigh", "show", "fd00:77::10"]).expect_success();
    let mac = info.stdout.split_whitespace().skip_while(|w| *w != "lladdr").nth(1);
    let mac: Vec<u8> = mac
        .expect("a neighbour")
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).expect("a number"))
        .collect();
    let near = format!(
        "fe80::{:x}:{:x}:{:x}:{:x}%eth0:6379",
        u16::from(mac[0] ^ 2) << 8 | u16::from(mac[1]),
        u16::from(mac[2]) << 8 | 0xff,
        0xfe00 | u16::from(mac[3]),
        u16::from(mac[4]) << 8 | u16::from(mac[5]),
    );
    let mut neighbour = bed.connect(RELAY, "client", &near);
    assert_eq!(neighbour.ask("SET b 2"), "+OK");
    let mut idle = bed.connect(RELAY, "client", "[fd00:77::10]:6379");
    assert_eq!(idle.ask("PING"), "+PONG");
    assert_eq!(bed.store().expect("deployed")["protected"], true);

    bed.fault("kill-host:alpha");
    for value in 0..20 {
        assert_eq!(client.ask(&format!("SET a {value}")), "+OK");
        assert_eq!(neighbour.ask(&format!("SET b {value}")), "+OK");
    }
    assert_eq!((idle.ask("GET a"), idle.line()), ("$2".to_owned(), "19".to_owned()));
    let store = bed.store().expect("still there");
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &2.into()));
    let mut late = bed.connect(RELAY, "client", "[fd00:77::10]:6379");
    assert_eq!((late.ask("GET b"), late.line()), ("$2".to_owned(), "19".to_owned()));
    drop((client, neighbour, idle, late));
    bed.destroy();
}
