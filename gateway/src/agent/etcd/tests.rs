//! Against a real etcd-server, where one is installed.

use super::*;
use crate::agent::AgentOptions;
use crate::agent::judge::Judge;
use netns_tools::topology::{ArbiterKind, Topology};
use proptest::prelude::*;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// An etcd of one member with its data in a directory of its own.
struct Server {
    child: Option<Child>,
    data: PathBuf,
    client: u16,
    peer: u16,
}

/// A port that is free now.
fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    /// None, and said so, if none is installed.
    fn start(tag: &str) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|dir| dir.join("etcd").is_file()) {
            eprintln!("SKIPPED: etcd is not installed (Debian: etcd-server)");
            return None;
        }
        let data = std::env::temp_dir().join(format!("nilicon-etcd-{}-{tag}", std::process::id()));
        let mut server = Self { child: None, data, client: free(), peer: free() };
        server.run();
        Some(server)
    }

    fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    fn run(&mut self) {
        let (client, peer) = (self.address(), format!("http://127.0.0.1:{}", self.peer));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(&self.data)
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let begin = Instant::now();
        while let Err(error) = self.etcd().read("nobody") {
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not answer: {error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// As if its machine had lost power.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn etcd(&self) -> Etcd {
        Etcd::new(&[self.address()], "lab")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
        let _ = std::fs::remove_dir_all(Path::new(&self.data));
    }
}

fn claim(host: &str, base: u64, wanted: u64) -> Claim {
    Claim {
        container: "store".into(),
        host: host.into(),
        base: Generation(base),
        wanted: Generation(wanted),
    }
}

fn denied(newest: u64) -> Verdict {
    Verdict::Denied { newest: Generation(newest) }
}

#[test]
fn of_two_that_part_one_goes_on_and_a_restarted_etcd_remembers_who() {
    let Some(mut server) = Server::start("part") else { return };
    let ask = |etcd: &Etcd, c: Claim| etcd.decide(&c).unwrap();
    let (alpha, beta) = (server.etcd(), server.etcd());
    assert_eq!(ask(&alpha, claim("alpha", 0, 1)), Verdict::Granted, "its first life");
    assert_eq!(ask(&beta, claim("beta", 1, 2)), Verdict::Granted);
    assert_eq!(ask(&beta, claim("beta", 1, 2)), Verdict::Granted, "the answer was lost");
    assert_eq!(ask(&alpha, claim("alpha", 1, 2)), denied(2));
    assert_eq!(ask(&alpha, claim("alpha", 1, 3)), denied(2), "its state is old");
    server.kill();
    let error = alpha.decide(&claim("alpha", 1, 3)).unwrap_err().to_string();
    assert!(error.contains("no member of the etcd answers: http://127.0.0.1:"), "{error}");
    server.run();
    assert_eq!(ask(&alpha, claim("alpha", 1, 3)), denied(2), "it was not forgotten");
    assert_eq!(ask(&alpha, claim("alpha", 2, 3)), Verdict::Granted, "after a resync");
    // Another lab's container of this name is another one.
    let other = Etcd::new(&[server.address()], "other");
    assert_eq!(ask(&other, claim("beta", 0, 1)), Verdict::Granted);
    // A member that is away is passed over.
    let gone = format!("http://127.0.0.1:{}", free());
    let members = Etcd::new(&[gone, server.address()], "lab");
    assert_eq!(ask(&members, claim("beta", 2, 3)), denied(3));
}

/// Many times, both at once, from the same state: never both, and never none.
#[test]
fn of_two_that_ask_at_once_one_is_granted() {
    let Some(server) = Server::start("once") else { return };
    for base in 0..30 {
        let verdicts: Vec<Verdict> = std::thread::scope(|scope| {
            let asking = ["alpha", "beta"].map(|host| {
                let etcd = server.etcd();
                scope.spawn(move || etcd.decide(&claim(host, base, base + 1)).unwrap())
            });
            asking.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let granted = verdicts.iter().filter(|v| **v == Verdict::Granted).count();
        assert_eq!(granted, 1, "{verdicts:?} of generation {}", base + 1);
        assert!(verdicts.contains(&denied(base + 1)), "{verdicts:?}");
    }
}

/// A put that is of an older revision changes nothing.
#[test]
fn what_has_changed_since_it_was_read_is_not_overwritten() {
    let Some(server) = Server::start("old") else { return };
    let (etcd, key) = (server.etcd(), "nilicon/lab/store");
    let before = etcd.read(key).unwrap();
    assert!(before.revision == 0 && before.grant.is_none());
    assert_eq!(etcd.decide(&claim("alpha", 0, 1)).unwrap(), Verdict::Granted);
    let grant = Grant { generation: Generation(1), host: "beta".into() };
    assert!(!etcd.replace(key, before.revision, &grant).unwrap());
    let now = etcd.read(key).unwrap();
    assert_eq!(now.grant.unwrap().host, "alpha");
    // What is not ours is not understood, and nothing is decided by it.
    let put = json!({ "key": encode(key.as_bytes()), "value": encode(b"something else") });
    etcd.ask("put", &put).unwrap();
    let error = etcd.decide(&claim("beta", 1, 2)).unwrap_err().to_string();
    assert!(error.contains("holds no grant"), "{error}");
}

/// A protection that names an etcd is decided by it, and by nobody while it is away.
#[test]
fn who_may_act_alone_is_asked_where_the_topology_says() {
    let Some(mut server) = Server::start("judge") else { return };
    let text = include_str!("../../../../topologies/embedded.topo.yml");
    let mut topology = Topology::parse("embedded", text).unwrap();
    topology.protect[0].arbiter = ArbiterKind::Etcd(vec![server.address()]);
    let judge = |host: &str| {
        let options = AgentOptions {
            topology: topology.clone(),
            host: host.into(),
            pki: PathBuf::new(),
            output_commit: true,
        };
        Judge::of(&options, &topology.protect[0]).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (alpha, beta) = (judge("alpha"), judge("beta"));
    assert_eq!(beta.at_once(&claim("beta", 1, 2)), None);
    assert_eq!(runtime.block_on(beta.ask(claim("beta", 1, 2))), Verdict::Granted);
    assert_eq!(runtime.block_on(alpha.ask(claim("alpha", 1, 2))), denied(2));
    server.kill();
    let asked = async {
        tokio::time::timeout(Duration::from_secs(1), alpha.ask(claim("alpha", 2, 3))).await
    };
    assert!(runtime.block_on(asked).is_err(), "nobody was there to say so");
    server.run();
    assert_eq!(runtime.block_on(alpha.ask(claim("alpha", 2, 3))), Verdict::Granted);
}

#[test]
fn base64_is_that_of_the_rfc() {
    for (plain, coded) in
        [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
    {
        assert_eq!(encode(plain.as_bytes()), coded);
    }
    assert_eq!(decode("Z!=="), None);
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(bytes: Vec<u8>) {
        prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
    }
}
