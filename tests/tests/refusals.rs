//! What cannot work is refused in words that say what is wrong, where, and what to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nilicon_tests::{Bed, EMBEDDED, Sketch, nilicon, nilicon_as_nobody, until};
use nix::sys::signal::Signal;
use serde_json::Value;

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const PATIENCE: Duration = Duration::from_secs(60);

/// Changes a topology file in one place, and returns line and column of that, as in `12:5`.
fn spoil(bed: &Bed, good: &str, bad: &str, at: &str) -> String {
    let text = bed.text();
    assert_eq!(text.matches(good).count(), 1, "{good:?} is not once in\n{text}");
    let text = text.replace(good, bad);
    bed.write(&text);
    let offset = text.find(bad).and_then(|start| Some(start + text[start..].find(at)?));
    let before = &text[..offset.expect("it is there now")];
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("{}:{column}", before.matches('\n').count() + 1)
}

/// All verbs that read the file refuse it alike, and make nothing.
fn expect_refusal(bed: &Bed, words: &[&str]) {
    for verb in ["validate", "deploy", "run"] {
        bed.run(verb, &[]).expect_complaint(words);
    }
    bed.expect_gone();
}

#[test]
fn a_misspelt_key_is_pointed_at() {
    let bed = Bed::new("key", &Sketch::of(EMBEDDED));
    let place = spoil(&bed, "uplink: lan", "uplnk: lan", "uplnk");
    expect_refusal(&bed, &["there is no key `uplnk` here", "did you mean `uplink`?", &place]);
}

#[test]
fn an_unknown_node_is_pointed_at() {
    let bed = Bed::new("node", &Sketch::of(EMBEDDED));
    let place = spoil(&bed, "primary: alpha", "primary: alhpa", "alhpa");
    expect_refusal(&bed, &["there is no node `alhpa`", &place]);
}

#[test]
fn an_address_used_twice_is_pointed_at_with_its_first_use() {
    let bed = Bed::new("address", &Sketch::of(EMBEDDED));
    let place = spoil(&bed, "address: 10.77.0.10/24", "address: 10.77.0.1/24", "10.77.0.1/24");
    let first = bed.text().lines().position(|line| line.contains("client: 10.77.0.1/24"));
    let first = format!("is already used in line {}", first.expect("the client's address") + 1);
    expect_refusal(&bed, &["the address 10.77.0.1", &first, &place]);
}

#[test]
fn every_mistake_of_a_file_is_told_at_once() {
    let bed = Bed::new("all", &Sketch::of(EMBEDDED));
    spoil(&bed, "primary: alpha", "primary: alhpa", "alhpa");
    spoil(&bed, "uplink: lan", "uplink: wan", "wan");
    let found = ["there is no node `alhpa`", "the host beta has no interface `wan`"];
    expect_refusal(&bed, &found);
}

#[test]
fn a_file_that_is_cut_short_empty_or_no_text_is_refused() {
    let bed = Bed::new("short", &Sketch::of(EMBEDDED));
    let whole = bed.text();
    let mut refused = 0;
    for cut in (0..whole.len()).step_by(31) {
        bed.write(&whole[..cut]);
        let done = bed.run("validate", &[]);
        // Where a section ends, what is there may be a smaller topology.
        if done.code != Some(0) {
            refused += 1;
            done.expect_complaint(&["is not a usable topology: line"]);
        }
    }
    assert!(refused > 10, "{refused}");
    bed.write("");
    expect_refusal(&bed, &["is not a usable topology: line 1, column 1"]);
    fs::write(&bed.file, [0xff, 0xfe, 0, 1, 2]).expect("write");
    expect_refusal(&bed, &["cannot read the topology file", "UTF-8"]);
    fs::remove_file(&bed.file).expect("remove");
    expect_refusal(&bed, &["cannot read the topology file", "No such file"]);
}

#[test]
fn a_program_that_is_not_installed_is_named() {
    let store = "command: [no-such-server-anywhere, --port, \"6379\"]\n    ready: { tcp: 6379 }";
    let bed = Bed::new("program", &Sketch::of(store));
    bed.run("deploy", &[])
        .expect_complaint(&["store has failed on alpha", "no-such-server-anywhere"]);
    bed.destroy();
    bed.run("run", &["--duration", "2s"]).expect_complaint(&["no-such-server-anywhere"]);
    bed.expect_gone();
}

#[test]
fn a_program_that_ends_at_once_is_told() {
    let bed = Bed::new("ends", &Sketch::of("command: [/bin/false]\n    ready: { tcp: 6379 }"));
    bed.run("deploy", &[]).expect_complaint(&["store has", "on alpha", "ended"]);
    bed.destroy();
}

#[test]
fn a_program_that_never_listens_is_told() {
    let store = "command: [sleep, \"1000\"]\n    ready: { tcp: 6379, timeout: 1s }";
    let bed = Bed::new("deaf", &Sketch::of(store));
    let words = ["10.77.0.10:6379 does not accept connections after 1s", "store.console"];
    bed.run("deploy", &[]).expect_complaint(&words);
    bed.destroy();
}

#[test]
fn without_rights_it_says_so() {
    let bed = Bed::new("nobody", &Sketch::of(EMBEDDED));
    let readable = std::env::temp_dir().join(format!("{}.yml", bed.name));
    fs::copy(&bed.file, &readable).expect("copy the topology");
    let file = readable.to_str().expect("text");
    for verb in ["deploy", "run"] {
        nilicon_as_nobody(&[verb, file]).expect_complaint(&["Permission denied", "run as root"]);
    }
    nilicon_as_nobody(&["validate", file]).expect_success();
    nilicon_as_nobody(&["schema"]).expect_success();
    let doctor = nilicon_as_nobody(&["doctor", "-o", "json"]).expect_code(1).json();
    assert_eq!(doctor["ready"], false);
    let checks = doctor["checks"].as_array().expect("checks");
    let rights = checks.iter().find(|check| check["name"] == "CAP_SYS_ADMIN").expect("the check");
    assert_eq!(rights["ok"], false);
    assert!(rights["fix"].as_str().is_some_and(|fix| fix.contains("run as root")), "{rights}");
    fs::remove_file(readable).expect("remove the copy");
    bed.expect_gone();
}

#[test]
fn a_fault_that_cannot_happen_is_refused() {
    let bed = Bed::new("fault", &Sketch::of(EMBEDDED).loaded());
    let run = |fault: &str| bed.run("run", &["--duration", "2s", "--fault", fault]);
    run("kill-host:gamma@1s").expect_complaint(&["there is no node gamma", "alpha, beta"]);
    run("cut-link:alpha:eth7@1s").expect_complaint(&["no link ends at alpha:eth7"]);
    run("kill-host:alpha@5s").expect_complaint(&["would come after the run", "--duration"]);
    let done = run("melt:alpha@1s").expect_code(2);
    assert!(done.stderr.contains("known are kill-host"), "{done}");
    bed.expect_gone();
    nilicon(&["fault", &bed.name, "kill-host:alpha"]).expect_complaint(&["is not deployed"]);
    nilicon(&["exec", &bed.name, "alpha", "--", "true"]).expect_complaint(&["is not deployed"]);
    nilicon(&["inspect", &bed.name]).expect_complaint(&["is not deployed"]);
}

/// Gives alpha a certificate of one authority, and beta one of another.
fn mixed_keys(bed: &Bed) -> PathBuf {
    let authority = |name: &str, host: &str| {
        let dir = bed.directory().join(name);
        let path = dir.to_str().expect("text").to_owned();
        nilicon(&["pki", "init", &path]).expect_success();
        nilicon(&["pki", "issue", &path, host]).expect_success();
        dir
    };
    let ours = authority("ours", "alpha");
    let theirs = authority("theirs", "beta");
    for file in ["beta.host.pem", "beta.host-key.pem"] {
        fs::copy(theirs.join(file), ours.join(file)).expect("copy a certificate");
    }
    ours
}

/// Where `deploy` finds keys it makes no others.
fn lay_keys(bed: &Bed, keys: &Path) {
    let into = bed.state().join("pki");
    fs::create_dir_all(&into).expect("make the state directory");
    for file in fs::read_dir(keys).expect("list keys").flatten() {
        fs::copy(file.path(), into.join(file.file_name())).expect("copy a key");
    }
}

#[test]
fn a_backup_of_another_authority_gets_nothing() {
    let bed = Bed::new("keys", &Sketch::of(EMBEDDED));
    lay_keys(&bed, &mixed_keys(&bed));
    let deploy = bed.start("deploy", &[]);
    let store = bed.until_store("the certificate is refused", |store| {
        store["reason"].as_str().is_some_and(|reason| reason.contains("certificate"))
    });
    assert_eq!(store["protected"], false);
    assert_eq!((&store["primary"], &store["epoch"]), (&Value::Null, &0.into()));
    deploy.signal(Signal::SIGINT);
    deploy.wait(PATIENCE).expect_code(130);
    bed.destroy();
}

/// A container whose backup cannot be reached from the beginning does not begin: its backup may run
/// it already.
#[test]
fn without_a_reachable_backup_it_answers_nobody_and_says_why() {
    let mut sketch = Sketch::of(EMBEDDED);
    sketch.replication = "impair: { loss: 100% }".to_owned();
    let bed = Bed::new("dead", &sketch);
    let deploy = bed.start("deploy", &[]);
    let store = bed.until_store("it says why it is not protected", |store| {
        store["reason"].as_str().is_some_and(|reason| reason.starts_with("no backup: "))
    });
    assert_eq!((&store["primary"], &store["protected"]), (&Value::Null, &false.into()));
    assert_eq!(store["phase"], "waiting");
    let neighbour = "ip neigh flush all; timeout 1 bash -c 'echo > /dev/tcp/10.77.0.10/6379'";
    let knock = bed.exec("client", &["bash", "-c", neighbour]);
    assert!(knock.code != Some(0), "{knock}");
    let text = nilicon(&["inspect", &bed.name]).expect_success().stdout;
    assert!(text.contains("NO") && text.contains("no backup: "), "{text}");
    deploy.signal(Signal::SIGINT);
    deploy.wait(PATIENCE).expect_code(130);
    bed.destroy();
}

/// The pid of the agent of a host.
fn agent_of(bed: &Bed, host: &str) -> Value {
    let view = bed.inspect();
    let nodes = view["nodes"].as_array().expect("nodes");
    nodes.iter().find(|node| node["name"] == host).expect("the host")["agent_pid"].clone()
}

/// Starts an agent by hand in the network of a host of the lab.
fn agent(bed: &Bed, host: &str) -> nilicon_tests::Done {
    let binary = nilicon_tests::binary();
    let topology = bed.state().join("topology.json");
    let (binary, topology) = (binary.to_str().expect("text"), topology.to_str().expect("text"));
    bed.exec(host, &[binary, "agent", topology, "--host", host])
}

/// It must find out before it touches anything of the first.
#[test]
fn a_second_agent_of_a_host_ends_and_disturbs_nothing() {
    let mut sketch = Sketch::of(EMBEDDED);
    sketch.metrics = false;
    let bed = Bed::new("second", &sketch);
    bed.deploy();
    for host in ["alpha", "beta"] {
        let first = agent_of(&bed, host);
        agent(&bed, host).expect_complaint(&[&format!("another agent of host {host}")]);
        assert_eq!(agent_of(&bed, host), first);
        let epoch = bed.store().expect("deployed")["epoch"].as_u64();
        let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
        assert_eq!(client.ask("SET a 1"), "+OK");
        drop(client);
        bed.until_store("checkpoints go on", |store| {
            store["protected"] == true && store["epoch"].as_u64() > epoch
        });
    }
    bed.fault("kill-host:alpha");
    bed.until_store("beta takes over", |store| store["primary"] == "beta");
    bed.destroy();
}

#[test]
fn an_agent_of_a_host_that_is_not_in_the_file_is_refused() {
    let bed = Bed::new("unknown", &Sketch::of(EMBEDDED));
    let done = nilicon(&["agent", &bed.file, "--host", "gamma"]);
    done.expect_complaint(&["the topology has no node 'gamma'"]);
}

#[test]
fn a_metrics_address_in_use_is_named() {
    let bed = Bed::new("metrics", &Sketch::of(EMBEDDED));
    bed.deploy();
    bed.fault("kill-agent:alpha");
    let taken = bed.start_exec("alpha", &[RELAY, "--listen", "127.0.0.1:9464"]);
    until("the address to be taken", || {
        let probe = bed.exec("alpha", &[RELAY, "127.0.0.1:9464", "5"]);
        (probe.stdout == "taken\n").then_some(())
    });
    agent(&bed, "alpha").expect_complaint(&["cannot serve metrics at 127.0.0.1:9464"]);
    drop(taken);
    bed.destroy();
}

#[test]
fn a_lab_that_stands_with_another_topology_is_not_touched() {
    let bed = Bed::new("other", &Sketch::of(EMBEDDED));
    bed.deploy();
    let pid = agent_of(&bed, "alpha");
    bed.deploy();
    assert_eq!(agent_of(&bed, "alpha"), pid, "the second time there is nothing to do");
    spoil(&bed, "10.77.0.10/24", "10.77.0.11/24", "10.77.0.11");
    bed.run("deploy", &[])
        .expect_complaint(&["is deployed with another topology", "destroy it first"]);
    bed.run("run", &["--duration", "2s"]).expect_complaint(&["is in use"]);
    assert_eq!(agent_of(&bed, "alpha"), pid);
    bed.destroy();
}
