//! Real programs, each by its example in `topologies/`: a short run in which its host loses power,
//! with a client that keeps the history of all it was promised. A program that is not installed is
//! left out, and says so.

use nilicon_tests::{Bed, EMBEDDED, Sketch, is_installed};
use serde_json::Value;

/// The example of this name, in which the fault comes earlier.
fn survives(tag: &str, example: &str, programs: &[&str]) {
    if !programs.iter().copied().all(is_installed) {
        return;
    }
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies");
    let bed = Bed::new(tag, &Sketch::of(EMBEDDED));
    let text = std::fs::read_to_string(format!("{examples}/{example}.topo.yml")).expect("it");
    let changed = [
        (format!("name: {example}\n"), format!("name: {}\n", bed.name)),
        ("{ at: 4s, ".to_owned(), "{ at: 2s, ".to_owned()),
    ];
    let text = changed.iter().fold(text, |text, (old, new)| {
        assert!(text.contains(old), "{example} has no `{old}`");
        text.replace(old, new)
    });
    // Its files go with the test.
    let files =
        format!("    volume-directory: {}/files\n    volumes:\n", bed.directory().display());
    let text = text.replace("    volumes:\n", &files);
    // The copy lies elsewhere.
    bed.write(&text.replace("workdir: services", &format!("workdir: {examples}/services")));
    let report = bed.run("run", &["--duration", "5s", "-o", "json"]).expect_success().json();
    assert_eq!((&report["recovered"], &report["why"]), (&true.into(), &Value::Null), "{report:#}");
    let client = &report["clients"][0];
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(client[figure], 0, "{figure}: {report:#}");
    }
    // There was something to lose, and it was checked.
    for figure in ["acknowledged_writes", "reads"] {
        assert!(client[figure].as_u64() > Some(20), "{figure}: {report:#}");
    }
    let failover = &report["failover"];
    assert_eq!((&failover["host"], &failover["generation"]), (&"beta".into(), &2.into()));
    assert_eq!(failover["connections"], client["connections"], "{report:#}");
    bed.expect_gone();
}

/// Four threads, values and counters in slabs.
#[test]
fn memcached_survives_the_loss_of_its_host() {
    survives("memc", "memcached", &["memcached"]);
}

/// Four threads for the connections, and a child that saves, every second.
#[test]
fn redis_survives_while_it_saves() {
    survives("bgsave", "redis-bgsave", &["redis-server"]);
}

/// A master, three workers of another user, files in the container's own memory.
#[test]
fn nginx_survives_the_loss_of_its_host() {
    survives("nginx", "nginx", &["nginx"]);
}

/// A just-in-time compiler, its threads, and an event loop.
#[test]
fn node_survives_the_loss_of_its_host() {
    survives("node", "node", &["node"]);
}

/// A thread for each connection.
#[test]
fn python_with_threads_survives_the_loss_of_its_host() {
    survives("python", "python", &["python3"]);
}

/// One thread and an event loop.
#[test]
fn python_with_asyncio_survives_the_loss_of_its_host() {
    survives("asyncio", "asyncio", &["python3"]);
}

/// A just-in-time compiler, a garbage collector with its threads, a heap of 256 MB.
#[test]
fn java_survives_the_loss_of_its_host() {
    survives("java", "java", &["java"]);
}

/// Children that live for a moment, pipes and named pipes.
#[test]
fn a_shell_script_with_children_and_pipes_survives_the_loss_of_its_host() {
    survives("shell", "shell", &["bash", "python3", "gzip", "mkfifo"]);
}

/// Django with SQLite in a replicated volume: a transaction for each change, a thread for each
/// connection.
#[test]
fn a_django_site_and_its_database_survive_the_loss_of_their_host() {
    let imports = ["-c", "import django, sqlite3"];
    // The container has no more of the environment.
    let found = std::process::Command::new("/usr/bin/python3").args(imports).env_clear().output();
    if !found.is_ok_and(|done| done.status.success()) {
        eprintln!("SKIPPED: python3-django is not installed");
        return;
    }
    survives("django", "django", &[]);
}
