//! What programs and people read: metrics, JSON, the schema, the help.

use nilicon_tests::{Bed, Done, EMBEDDED, Sketch, nilicon};
use serde_json::Value;

const RELAY: &str = env!("CARGO_BIN_EXE_relay");

/// The metrics of a host, as Prometheus gets them.
fn metrics(bed: &Bed, host: &str) -> String {
    let mut connection = bed.connect(RELAY, host, "127.0.0.1:9464");
    connection.send("GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert_eq!(connection.line(), "HTTP/1.1 200 OK");
    connection.rest()
}

/// The value of a metric of the container, by its name and the rest of its labels.
fn value(text: &str, name: &str) -> Option<f64> {
    let prefix = format!("{name}{{container=\"store\"");
    let line = text.lines().find(|line| line.starts_with(&prefix))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[test]
fn check_tells_of_a_container_by_its_name() {
    let bed = Bed::new("check", &Sketch::of(EMBEDDED));
    bed.deploy();
    let name = format!("{}:store", bed.name);
    let report = nilicon(&["check", &name, "-o", "json"]).expect_success().json();
    assert_eq!(
        (&report["ready"], &report["objects"][0]["kind"]),
        (&true.into(), &"container".into())
    );
    nilicon(&["check", &name]).expect_success();
    bed.destroy();
    nilicon(&["check", &name]).expect_complaint(&["neither a process nor a container"]);
}

#[test]
fn metrics_are_prometheus_text_in_base_units() {
    let bed = Bed::new("prom", &Sketch::of(EMBEDDED));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    for _ in 0..20 {
        assert_eq!(client.ask("SET a 1"), "+OK");
    }
    drop(client);
    let text = metrics(&bed, "alpha");
    for name in
        ["nilicon_stop_seconds_count", "nilicon_commit_seconds_sum", "nilicon_dirty_pages_count"]
    {
        assert!(value(&text, name).is_some_and(|value| value > 0.0), "{name} in {text}");
    }
    assert_eq!(value(&text, "nilicon_protected"), Some(1.0), "{text}");
    assert!(value(&text, "nilicon_committed_epoch").is_some_and(|epoch| epoch > 1.0), "{text}");
    assert!(value(&text, "nilicon_wire_bytes_total").is_some_and(|bytes| bytes > 0.0), "{text}");
    // A stop takes some hundred microseconds: in any other unit the sum would be above this.
    assert!(value(&text, "nilicon_stop_seconds_sum").is_some_and(|sum| sum < 60.0), "{text}");
    for host in ["alpha", "beta"] {
        expect_conventions(&metrics(&bed, host));
    }
    let backup = metrics(&bed, "beta");
    assert!(value(&backup, "nilicon_apply_seconds_count").is_some_and(|n| n > 0.0), "{backup}");

    bed.fault("kill-host:alpha");
    bed.until_store("beta runs it", |store| store["primary"] == "beta");
    expect_conventions(&metrics(&bed, "beta"));
    bed.destroy();
}

/// Without a backup nobody holds output: what clients say to a connection that is accepted does not pass the
/// agent. As soon as there is one again, it does.
#[test]
fn who_is_let_alone_goes_by_the_gate_until_a_backup_comes() {
    let bed = Bed::new("bypass", &Sketch::of(EMBEDDED));
    let policy = "over: repl\n    arbiter: manual\n    on-backup-loss: degrade\n";
    bed.write(&bed.text().replace("over: repl\n", policy));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    let gate = |name: &str| {
        value(&metrics(&bed, "alpha"), &format!("nilicon_gateway_{name}_frames_total"))
            .unwrap_or(0.0)
    };
    let mut round = 0;
    let mut ask = |client: &mut nilicon_tests::Relay| {
        round += 1;
        assert_eq!(client.ask(&format!("SET a {round}")), "+OK");
        round
    };
    for _ in 0..20 {
        ask(&mut client);
    }
    bed.fault("kill-agent:beta");
    let allow = |host: &str| {
        let allowed = || bed.run("allow", &["store", host]).code == Some(0);
        nilicon_tests::until("somebody asks", || allowed().then_some(()));
    };
    allow("alpha");
    bed.until_store("it runs alone", |store| store["phase"] == "unprotected");
    nilicon_tests::until("it goes by the gate", || {
        ask(&mut client);
        (gate("bypassed_out") > 0.0 && gate("bypassed_in") > 0.0).then_some(())
    });

    bed.fault("restart-agent:beta");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    // What a host publishes is up to a second old.
    let by_and_last = [(); 2].map(|()| {
        let released = gate("released");
        nilicon_tests::until("it goes through the gate", || {
            ask(&mut client);
            (gate("released") > released + 20.0).then_some(())
        });
        (gate("bypassed_out"), ask(&mut client))
    });
    let [(before, _), (after, last)] = by_and_last;
    assert_eq!(before, after);
    bed.fault("kill-host:alpha");
    allow("beta");
    let expected = last.to_string();
    assert_eq!(client.ask("GET a"), format!("${}", expected.len()));
    assert_eq!(client.line(), expected);
    drop(client);
    bed.destroy();
}

/// Names start with the program's, counters end in `_total`, and no unit is a fraction of one.
fn expect_conventions(text: &str) {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let types: Vec<(&str, &str)> = types.filter_map(|line| line.split_once(' ')).collect();
    assert!(!types.is_empty(), "no metric in {text}");
    for (name, kind) in types {
        assert!(name.starts_with("nilicon_"), "{name}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        for part in ["_ms", "_us", "_millis", "_micros", "_kb", "_mb", "milliseconds"] {
            assert!(!name.contains(part), "{name}");
        }
    }
}

#[test]
fn the_doctor_finds_this_machine_fit() {
    let report = nilicon(&["doctor", "-o", "json"]).expect_success().json();
    assert_eq!(report["ready"], true);
    let checks = report["checks"].as_array().expect("checks");
    assert!(checks.len() > 10);
    for check in checks {
        assert!(check["name"].is_string() && check["found"].is_string(), "{check}");
        let (ok, needed) = (check["ok"] == true, check["needed"] == true);
        assert!(ok || !needed, "{check}");
        assert_eq!(ok, check["fix"].is_null(), "what lacks has a remedy: {check}");
    }
    for name in ["volumes", "a root as a volume"] {
        let check = checks.iter().find(|check| check["name"] == name).expect("it is asked for");
        // Other tests have both, and would fail here.
        assert_eq!(check["found"], "works", "{check}");
    }
    let text = nilicon(&["doctor"]).expect_success().stdout;
    assert!(text.ends_with("This machine can run and protect containers.\n"), "{text}");
}

#[test]
fn the_schema_knows_all_sections_of_a_file() {
    let schema = nilicon(&["schema"]).expect_success().json();
    let keys = schema["properties"].as_object().expect("properties");
    let mut keys: Vec<&str> = keys.keys().map(String::as_str).collect();
    keys.sort_unstable();
    let all = [
        "clients",
        "containers",
        "duration",
        "events",
        "links",
        "name",
        "nodes",
        "protect",
        "witness",
    ];
    assert_eq!(keys, all);
    assert_eq!(schema["additionalProperties"], false);
    assert!(schema["properties"]["links"]["description"].is_string());
}

#[test]
fn without_arguments_it_helps() {
    let done = nilicon(&[]).expect_code(2);
    for verb in ["demo", "run", "drill", "deploy", "destroy", "inspect", "exec", "fault", "doctor"]
    {
        assert!(done.stderr.contains(&format!("\n  {verb} ")), "{verb}: {done}");
        let help = nilicon(&[verb, "--help"]).expect_success();
        assert!(help.stdout.contains(&format!("Usage: nilicon {verb}")), "{help}");
    }
    assert!(!done.stderr.contains("__"), "what is internal is not shown: {done}");
    let version = nilicon(&["--version"]).expect_success();
    assert!(version.stdout.starts_with("nilicon "), "{version}");
}

fn objects(done: &Done) -> Value {
    let json = done.json();
    assert!(json.is_object(), "{done}");
    json
}

#[test]
fn inspect_tells_programs_and_people_the_same() {
    let bed = Bed::new("look", &Sketch::of(EMBEDDED));
    bed.deploy();
    let all = objects(&nilicon(&["inspect", "-o", "json"]).expect_success());
    let labs = all["labs"].as_array().expect("labs");
    let ours = labs.iter().find(|lab| lab["name"] == bed.name.as_str()).expect("our lab");
    let by_file = objects(&nilicon(&["inspect", &bed.file, "-o", "json"]).expect_success());
    assert_eq!(by_file["nodes"], ours["nodes"]);
    for node in by_file["nodes"].as_array().expect("nodes") {
        let namespace = node["namespace"].as_str().expect("a name");
        assert!(std::path::Path::new("/run/netns").join(namespace).exists(), "{node}");
    }
    let text = nilicon(&["inspect", &bed.name]).expect_success().stdout;
    let row = text.lines().find(|line| line.contains("10.77.0.10")).expect("the container's row");
    let words: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(words[..6], ["store", "10.77.0.10", "alpha", "beta", "yes", "1"], "{text}");
    bed.destroy();
    let all = objects(&nilicon(&["inspect", "-o", "json"]).expect_success());
    let labs = all["labs"].as_array().expect("labs");
    assert!(labs.iter().all(|lab| lab["name"] != bed.name.as_str()), "{all:#}");
}

#[test]
fn exec_is_transparent() {
    let bed = Bed::new("exec", &Sketch::of(EMBEDDED));
    bed.deploy();
    bed.exec("client", &["sh", "-c", "exit 7"]).expect_code(7);
    bed.exec("client", &["sh", "-c", "kill -9 $$"]).expect_code(137);
    let said = bed.exec("client", &["sh", "-c", "cat /sys/class/net/eth0/address; echo x >&2"]);
    assert_eq!(said.stderr, "x\n", "{said}");
    // Also the network of the container, wherever it is.
    let inside = |bed: &Bed| bed.exec("store", &["sh", "-c", "cat /proc/net/fib_trie"]);
    assert!(inside(&bed).expect_success().stdout.contains("10.77.0.10"));
    bed.fault("kill-host:alpha");
    bed.until_store("beta runs it", |store| store["primary"] == "beta");
    assert!(inside(&bed).expect_success().stdout.contains("10.77.0.10"));
    bed.exec("nowhere", &["true"]).expect_complaint(&["has no nowhere; it has alpha"]);
    let missing = bed.exec("client", &["no-such-program"]).expect_code(127);
    assert!(missing.stderr.contains("cannot run no-such-program"), "{missing}");
    bed.exec("client", &["/etc/hostname"]).expect_code(126);
    bed.destroy();
}

/// Two labs of one file stand beside each other: nothing of a lab is shared but the machine.
#[test]
fn one_file_makes_two_labs() {
    let bed = Bed::new("one", &Sketch::of(EMBEDDED));
    bed.deploy();
    let other = format!("{}2", bed.name);
    bed.run("deploy", &["--name", &other]).expect_success();
    nilicon(&["fault", &other, "kill-host:alpha"]).expect_success();
    let done = nilicon(&["destroy", &other]).expect_success();
    assert!(done.stdout.contains("4 namespaces"), "{done}");
    let store = bed.store().expect("it stands");
    assert_eq!((&store["primary"], &store["protected"]), (&"alpha".into(), &true.into()));
    bed.destroy();
}
