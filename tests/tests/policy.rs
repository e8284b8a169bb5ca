//! What becomes of a container that comes to hold something that cannot be protected, by policy.
//! Here that is the working directory of a shell, which is deleted and left again.

use nilicon_tests::{Bed, Relay, Sketch, is_installed};

const RELAY: &str = env!("CARGO_BIN_EXE_relay");
const STORE: &str = "10.77.0.10:6379";

/// A bed with this policy, and a client that has been answered.
fn start(tag: &str, policy: &str) -> Option<(Bed, Relay)> {
    if !is_installed("redis-server") {
        return None;
    }
    let sketch = Sketch::of("command: [COMMAND]\n    ready: { tcp: 6379 }");
    let bed = Bed::new(tag, &sketch);
    let dir = bed.directory().display().to_string();
    let script = format!(
        "redis-server --port 6379 --bind 0.0.0.0 --save '' --appendonly no --protected-mode no & \
         while :; do if [ -e {dir}/bad ]; then mkdir {dir}/gone; cd {dir}/gone; rmdir {dir}/gone; \
         while [ -e {dir}/bad ]; do sleep 0.1; done; cd {dir}; fi; sleep 0.1; done"
    );
    let text = bed.text().replace("COMMAND", &format!("sh, -c, \"{script}\""));
    bed.write(&text.replace("over: repl\n", &format!("over: repl\n{policy}")));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", STORE);
    assert_eq!(client.ask("SET a 1"), "+OK");
    Some((bed, client))
}

/// From now on the container holds what cannot be protected.
fn spoil(bed: &Bed) {
    std::fs::write(bed.directory().join("bad"), "").expect("written");
}

fn says_why(store: &serde_json::Value) -> bool {
    store["reason"].as_str().is_some_and(|why| why.contains("working directory"))
}

#[test]
fn it_goes_on_unprotected_by_default() {
    let Some((bed, mut client)) = start("goeson", "") else { return };
    spoil(&bed);
    let store = bed.until_store("its protection ends", |s| s["phase"] == "unprotected");
    assert!(says_why(&store) && store["protected"] == false, "{store:#}");
    assert_eq!(client.ask("SET a 2"), "+OK");
    drop(client);
    bed.destroy();
}

#[test]
fn it_is_frozen_until_the_thing_is_gone() {
    let Some((bed, mut client)) = start("frozen", "    on-unprotectable: freeze\n") else { return };
    spoil(&bed);
    let store = bed.until_store("it is frozen", |s| s["phase"] == "severed" && says_why(s));
    assert!(store["protected"] == false && store["primary"] == "alpha", "{store:#}");
    // Longer than a primary may stand still: it tries, and so it lives.
    std::thread::sleep(std::time::Duration::from_secs(4));
    let store = bed.until_store("it is still frozen", |s| s["phase"] == "severed");
    assert!(store["primary"] == "alpha" && store["generation"] == 1, "{store:#}");
    client.send("SET a 2\r\n");
    std::fs::remove_file(bed.directory().join("bad")).expect("removed");
    assert_eq!(client.line(), "+OK");
    let store = bed.until_store("it is protected again", |s| s["protected"] == true);
    assert_eq!(store["generation"], 1);
    bed.fault("kill-host:alpha");
    assert_eq!((client.ask("GET a"), client.line()), ("$1".to_owned(), "2".to_owned()));
    drop(client);
    bed.destroy();
}

#[test]
fn it_ends_if_that_is_wanted() {
    let Some((bed, client)) = start("stopped", "    on-unprotectable: stop\n") else { return };
    drop(client);
    spoil(&bed);
    bed.until_store("it has ended", |s| s["phase"] == "failed" && says_why(s));
    bed.destroy();
}
