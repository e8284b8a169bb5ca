//! Topology files: the examples load, and every broken rule is reported at its place.

use netns_tools::topology::{self, Topology, TopologyError, Workload};

/// A small lab without faults; each case below breaks one thing in it.
const GOOD: &str = "\
name: lab
nodes:
  alpha: { kind: host }
  beta: { kind: host }
  client: { kind: client }
  lan: { kind: bridge }
links:
  - endpoints: [alpha:lan, lan:alpha]
  - endpoints: [beta:lan, lan:beta]
  - endpoints: [client:eth0, lan:client]
    addresses: { client: 10.77.0.1/24 }
  - endpoints: [alpha:repl, beta:repl]
    addresses: { alpha: 10.78.0.1/30, beta: 10.78.0.2/30 }
    impair: { delay: 50us, jitter: 10us, loss: 0.1%, rate: 1gbit }
containers:
  redis:
    command: [redis-server]
    address: 10.77.0.10/24
    uplink: lan
protect:
  - container: redis
    primary: alpha
    backup: beta
    epoch: { min: 5ms, max: 30ms }
clients:
  - node: client
    target: redis:6379
events:
  - { at: 5s, fault: kill-host, node: alpha }
  - { at: 6s, fault: cut-link, link: beta:repl }
duration: 9s
";

/// Replaces `old` by `new` in the good lab; `new` marks with `^` where the complaint must point.
fn broken(old: &str, new: &str) -> (String, usize, usize) {
    let (before, rest) = GOOD.split_once(old).unwrap_or_else(|| panic!("`{old}` is not there"));
    let (start, end) = new.split_once('^').unwrap_or(("", new));
    let head = format!("{before}{start}");
    let line = head.matches('\n').count() + 1;
    let column = head.chars().rev().take_while(|c| *c != '\n').count() + 1;
    (format!("{head}{end}{rest}"), line, column)
}

#[track_caller]
fn refused(old: &str, new: &str, message: &str) -> TopologyError {
    let (text, line, column) = broken(old, new);
    let error = Topology::parse("lab.topo.yml", &text).expect_err(new);
    let about = error.problems().iter().find(|problem| problem.message.contains(message));
    let problem = about.unwrap_or_else(|| panic!("no `{message}` in {:?}", error.problems()));
    assert_eq!((problem.line, problem.column), (line, column), "{}", problem.message);
    error
}

#[test]
fn the_good_lab_is_good() {
    let lab = Topology::parse("lab.topo.yml", GOOD).unwrap();
    let protect = lab.protection_of("redis").unwrap();
    assert_eq!(lab.backup_socket(protect).unwrap().to_string(), "10.78.0.2:7878");
    assert_eq!(lab.replication_interface(protect, "alpha"), Some("repl"));
    assert_eq!(lab.hosts_of("redis"), ["alpha", "beta"]);
    assert_eq!(lab.target_socket(&lab.clients[0].target).unwrap().to_string(), "10.77.0.10:6379");
    assert_eq!(lab.mac_of("redis"), lab.mac_of("redis"));
    assert_eq!(lab.containers_on("beta").count(), 1);
    assert_eq!(lab.containers_on("client").count(), 0);
    assert_eq!(lab.containers["redis"].workload(|_| true), Workload::Command("redis-server", &[]));
}

#[test]
fn a_lab_survives_being_written_and_read() {
    let lab = Topology::parse("lab.topo.yml", GOOD).unwrap();
    let text = serde_json::to_string(&lab).unwrap();
    assert_eq!(Topology::parse("copy", &text).unwrap(), lab);
}

#[test]
fn words_of_a_command_need_no_quotes() {
    let text = GOOD.replace("[redis-server]", "[redis-server, --port, 6379, --appendonly, no, '']");
    let lab = Topology::parse("lab.topo.yml", &text).unwrap();
    let words = lab.containers["redis"].command.as_deref().unwrap();
    assert_eq!(words, ["redis-server", "--port", "6379", "--appendonly", "no", ""]);
}

#[test]
fn keys_and_words_that_are_misspelt() {
    let error = refused("uplink: lan", "^upling: lan", "no key `upling`");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `uplink`?"));
    let error = refused("fault: kill-host", "fault: ^kil-host", "`kil-host` is not known");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `kill-host`?"));
    refused("address: 10.77.0.10/24\n    ", "^", "the key `address` is missing");
}

#[test]
fn quantities_of_the_wrong_kind() {
    refused("delay: 50us", "delay: ^50 parsecs", "`50 parsecs` is not a time");
    refused("loss: 0.1%", "loss: ^110%", "`110%` is not a part of a whole");
    refused("rate: 1gbit", "rate: ^fast", "`fast` is not a rate");
    refused("10.77.0.10/24", "^10.77.0.10", "`10.77.0.10` is not an address with its prefix");
    refused("redis:6379", "^redis", "`redis` is not a target");
    refused("jitter: 10us", "jitter: ^10ms", "the jitter 10ms is more than the delay 50us");
}

#[test]
fn volumes() {
    let with = |text: &str| format!("uplink: lan\n    volumes:\n{text}");
    let refused = |text: &str, message: &str| refused("uplink: lan", &with(text), message);
    let good = GOOD.replacen(
        "uplink: lan",
        &with(
            "      - { path: /var/lib/redis, kind: replicated, fsync: local, durable: true }\n      \
             - { path: /var/tmp, kind: ephemeral }\n      - { path: /srv/nfs, kind: shared }\n      \
             - { path: /srv/layers, kind: read-only }\n      - { path: /, kind: replicated, durable: true }",
        ),
        1,
    );
    let lab = Topology::parse("lab.topo.yml", &good).expect("good");
    assert_eq!(lab.containers["redis"].volumes[0].directory_name(), "var-lib-redis");
    assert!(lab.containers["redis"].volumes[4].is_root());
    assert_eq!(lab.containers["redis"].volume_directory, "/var/lib/nilicon");
    let error =
        refused("      - { path: /a, kind: replicated, ^fsyncs: local }", "no key `fsyncs`");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `fsync`?"));
    refused("      - { path: /a, kind: ^drbd }", "`drbd` is not known here");
    refused("      - { path: ^a/b, kind: shared }", "is no path of a directory");
    refused("      - { path: ^/a/../b, kind: shared }", "is no path of a directory");
    refused("      - { path: ^/dev/shm, kind: ephemeral }", "and /dev would hide each other");
    refused(
        "      - { path: /a/b, kind: replicated }\n      - { path: ^/a, kind: shared }",
        "`/a` and the volume `/a/b` would hide each other",
    );
    let error = refused("      - { path: ^/, kind: read-only }", "root as a whole");
    assert!(error.problems()[0].help.as_deref().is_some_and(|h| h.contains("directories")));
    refused(
        "      - { path: /, kind: replicated }\n      - { path: ^/, kind: replicated }",
        "would hide each other",
    );
    refused("      - { path: /a, kind: read-only, fsync: ^local }", "only volumes of kind");
    refused("      - { path: /a, kind: shared, durable: ^true }", "only volumes of kind");
    refused("      - { path: /a, kind: shared, check: ^true }", "only volumes of kind");
    refused("      - { path: /a, kind: ephemeral, start: ^empty }", "only volumes of kind");
    let on_a_veth = |kind: &str| {
        let volume =
            format!("{}    device: veth", with(&format!("      - {{ path: /a, kind: {kind} }}\n")));
        let text = GOOD.replacen("uplink: lan", &volume, 1);
        let error = Topology::parse("lab.topo.yml", &text).expect_err("it is protected as well");
        error.problems().iter().any(|p| p.message.contains("has nothing of ours"))
    };
    assert_eq!(["replicated", "read-only"].map(on_a_veth), [true; 2]);
    assert_eq!(["ephemeral", "shared"].map(on_a_veth), [false; 2]);
}

#[test]
fn names() {
    refused("name: lab", "name: ^Lab_1", "`Lab_1` cannot name the lab");
    let long = "name: ^a-name-of-more-than-20";
    refused("name: lab", long, "cannot name the lab");
    refused("  client: {", "  ^Client: {", "`Client` cannot name a node");
}

#[test]
fn links() {
    let error = refused("[beta:lan,", "[^betta:lan,", "there is no node `betta`");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `beta`?"));
    refused("[beta:lan,", "[^alpha:lan,", "alpha:lan already ends the link in line 8");
    refused("client:eth0", "^client:a-long-interface", "has 16 characters; Linux allows 15");
    refused("client:eth0", "^client:lo", "`lo` is taken");
    refused("[alpha:lan, lan:alpha]", "^[alpha:lan]", "two endpoints, not 1");
    refused("[alpha:repl, beta:repl]", "[alpha:repl, ^alpha:repl2]", "both ends are at alpha");
    refused("{ client: 10.77.0.1/24 }", "{ ^clint: 10.77.0.1/24 }", "does not end at `clint`");
    refused("10.78.0.2/30", "^10.78.0.6/30", "not in 10.78.0.0/30, the subnet of the other end");
    refused("10.78.0.2/30", "^10.78.0.1/30", "10.78.0.1 is already used in line 13");
}

#[test]
fn containers() {
    refused("10.77.0.10/24", "^10.77.1.10/24", "not in 10.77.0.0/24, the subnet at lan");
    refused("10.77.0.10/24", "^10.77.0.1/24", "10.77.0.1 is already used in line 11");
    refused("uplink: lan", "uplink: ^lam", "the host alpha has no interface `lam`");
    refused("uplink: lan", "uplink: lan\n    gateway: ^10.78.0.1", "not in the subnet");
    refused("uplink: lan", "uplink: lan\n    host: ^beta", "redis starts on its primary, alpha");
    refused("[redis-server]", "^[]", "the command is empty");
    let (text, line, column) = broken("    command: [redis-server]\n", "");
    let error = Topology::parse("lab", &text).unwrap_err();
    assert!(error.problems()[0].message.contains("nothing to run"), "{error}");
    assert_eq!((error.problems()[0].line, error.problems()[0].column), (line - 1, column + 2));
}

#[test]
fn protections() {
    refused("primary: alpha", "primary: ^client", "`client` is not of kind `host`");
    refused("backup: beta", "backup: ^alpha", "the backup is the primary");
    refused("backup: beta", "backup: ^gamma", "there is no node `gamma`");
    refused("container: redis", "container: ^reddis", "there is no container `reddis`");
    let veth = GOOD.replace("uplink: lan", "uplink: lan\n    device: veth");
    let error = Topology::parse("lab.topo.yml", &veth).unwrap_err();
    assert!(error.to_string().contains("a plain veth cannot be protected"), "{error}");
    refused("backup: beta", "backup: beta\n    over: ^lan", "need an address at alpha:lan");
    refused("backup: beta", "backup: beta\n    over: ^rep", "alpha has no interface `rep`");
    refused("{ min: 5ms, max: 30ms }", "^{ min: 50ms, max: 30ms }", "longer than the longest");
    let error =
        refused("backup: beta", "backup: beta\n    on-container-loss: ^failovr", "is not known");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `failover`?"));
    refused("backup: beta", "backup: beta\n    detector: ^{ timeout: 3ms }", "two heartbeats");
    let ports = "backup: beta\n    port: 7000\n    pulse-port: ^7000";
    refused("backup: beta", ports, "the host alpha listens on port 7000");
    let etcd = |members: &str| format!("backup: beta\n    arbiter: ^{{ etcd: [{members}] }}");
    refused("backup: beta", &etcd(""), "it names no member");
    refused("backup: beta", &etcd("\"https://10.79.0.3:2379\""), "no address of an etcd");
    let good = etcd("\"http://10.79.0.3:2379\"").replace('^', "");
    Topology::parse("lab", &GOOD.replace("backup: beta", &good)).unwrap();
    refused("backup: beta", "backup: beta\n    detector: ^{ most: 20ms }", "at least the timeout");
    refused("backup: beta", "backup: beta\n    detector: ^{ stall: 100ms }", "at least 1500ms");
}

#[test]
fn clients_and_events() {
    refused("- node: client", "- node: ^cleint", "there is no node `cleint`");
    refused("- node: client", "- node: ^lan", "`lan` is a bridge");
    refused("target: redis:6379", "target: ^redit:6379", "there is no container `redit`");
    refused("redis:6379\n", "redis:6379\n    connections: ^0\n", "`connections` must not be 0");
    refused("kill-host, node: alpha", "kill-host, node: ^alfa", "there is no node `alfa`");
    refused("fault: kill-host, node: alpha", "fault: ^kill-host", "needs a `node`");
    refused("link: beta:repl", "link: ^beta:rep", "no link ends at beta:rep");
    let error = refused("fault: kill-host", "fault: ^slow-lnk", "`slow-lnk` is not known");
    assert_eq!(error.problems()[0].help.as_deref(), Some("did you mean `slow-link`?"));
    let fault = "fault: kill-host, node: alpha";
    refused(fault, "fault: ^lossy-link, node: alpha", "needs a `link` and no `node`");
    let error = refused(fault, "fault: slow-link, link: ^alpha:lan", "through user space");
    assert_eq!(error.problems()[0].help.as_deref(), Some("give the link `impair: {}`"));
    refused(fault, "fault: kill-container, node: ^client", "is not of kind `host`");
    refused(fault, "fault: cut-in, link: ^alpha:lam", "no link ends at alpha:lam");
    refused("at: 5s", "at: ^10s", "the run is over after 9s");
}

#[test]
fn every_problem_is_reported_at_once() {
    let text =
        GOOD.replace("- node: client", "- node: nobody").replace("backup: beta", "backup: x");
    let error = Topology::parse("lab.topo.yml", &text).unwrap_err();
    assert_eq!(error.problems().len(), 2, "{:?}", error.problems());
    assert!(error.to_string().contains("and one more problem"), "{error}");
}

#[test]
fn a_report_shows_the_line() {
    let error = refused("uplink: lan", "uplink: ^lam", "no interface");
    let report = format!("{:?}", miette::Report::new(error));
    println!("{report}");
    assert!(report.contains("uplink: lam"), "{report}");
    assert!(report.contains("did you mean `lan`?"), "{report}");
}

#[test]
fn text_that_is_not_yaml() {
    for text in ["", "name: [", "- 1\n- 2\n", "name: a\nname: b\n", "\u{0}"] {
        let error = Topology::parse("lab.topo.yml", text).unwrap_err();
        assert_eq!(error.problems().len(), 1, "{text:?}: {error}");
    }
}

#[test]
fn a_file_without_content_is_called_empty() {
    for text in ["", "\n\n", "# nothing yet\n---\n"] {
        let error = Topology::parse("lab.topo.yml", text).unwrap_err();
        assert!(error.to_string().contains("the file is empty"), "{text:?}: {error}");
    }
}

#[test]
fn a_truncated_file_is_complained_of_at_its_end() {
    for (text, place) in [
        ("name: a\nnodes: {alpha: {kind: host\n", "line 2, column 27: unclosed bracket"),
        ("nodes: {}\nname: \"y", "line 2, column 9: unclosed quote"),
    ] {
        let error = Topology::parse("lab.topo.yml", text).unwrap_err();
        assert!(error.to_string().contains(place), "{text:?}: {error}");
    }
}

#[test]
fn the_examples_load() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies");
    let mut found = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // The programs that some containers run.
            continue;
        }
        let lab = Topology::load(&path).unwrap_or_else(|e| panic!("{:?}", miette::Report::new(e)));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name, format!("{}.topo.yml", lab.name), "a file is named after its lab");
        found += 1;
    }
    assert!(found > 0);
}

#[test]
fn a_relative_working_directory_is_counted_from_the_file() {
    let file = std::env::temp_dir().join(format!("nilicon-workdir-{}.yml", std::process::id()));
    for (workdir, expected) in [
        ("workdir: services", std::env::temp_dir().join("services")),
        ("workdir: /srv", "/srv".into()),
        ("environment: {}", "/".into()),
    ] {
        let text = GOOD.replace("    uplink: lan", &format!("    uplink: lan\n    {workdir}"));
        std::fs::write(&file, text).unwrap();
        let lab = Topology::load(&file).unwrap();
        assert_eq!(std::path::Path::new(&lab.containers["redis"].workdir), expected);
    }
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn the_schema_knows_every_section() {
    let schema = topology::schema();
    for section in ["nodes", "links", "containers", "protect", "clients", "events", "duration"] {
        assert!(schema["properties"][section].is_object(), "{section} in {schema}");
    }
    assert_eq!(schema["additionalProperties"], false);
}
