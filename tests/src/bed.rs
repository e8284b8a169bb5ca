//! A lab of a test: its name, its topology file, and its end.
//!
//! Invariant: there is one bed at a time on a machine, and when a test has passed, nothing of its
//! lab is left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Done, Running, nilicon};
use crate::leftovers::leftovers;
use crate::relay::Relay;
use crate::sketch::Sketch;

/// By this variable the processes of a lab are found, whatever else they are.
const MARK: &str = "NILICON_TEST_LAB";
/// How often something is looked at that is waited for.
const LOOK: Duration = Duration::from_millis(20);
/// How long it may take: much longer than it does.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something.
///
/// # Panics
/// It finds nothing for a minute.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(LOOK);
    }
}

/// A lab that can be made, and is gone in the end.
#[derive(Debug)]
pub struct Bed {
    /// The lab's name.
    pub name: String,
    /// Its topology file.
    pub file: String,
    directory: PathBuf,
    /// Tests run one at a time, also those of other test programs.
    _turn: File,
}

impl Bed {
    /// A lab whose name ends with `tag` (at most eight letters), of a sketch.
    ///
    /// # Panics
    /// The test does not run as root.
    pub fn new(tag: &str, sketch: &Sketch) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "end-to-end tests make namespaces: run as root");
        let turn = File::create(std::env::temp_dir().join("nilicon-tests.lock")).expect("a lock");
        turn.lock().expect("wait for other tests");
        let name = format!("e2e-{}-{tag}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        fs::create_dir_all(&directory).expect("a directory");
        let file = directory.join("lab.topo.yml").display().to_string();
        let bed = Self { name, file, directory, _turn: turn };
        bed.write(&sketch.text(&bed.name, &bed.mark().replace('=', ": ")));
        bed
    }

    /// As [`Bed::new`], with addresses of IPv6.
    pub fn of_ipv6(tag: &str, sketch: &Sketch) -> Self {
        let bed = Self::new(tag, sketch);
        bed.write(&sketch.text_of_ipv6(&bed.name, &bed.mark().replace('=', ": ")));
        bed
    }

    /// Replaces the topology file.
    pub fn write(&self, text: &str) {
        fs::write(&self.file, text).expect("write the topology");
    }

    /// The topology file's text.
    pub fn text(&self) -> String {
        fs::read_to_string(&self.file).expect("read the topology")
    }

    /// A directory for this test.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What nilicon keeps about the lab.
    pub fn state(&self) -> PathBuf {
        Path::new("/run/nilicon").join(&self.name)
    }

    fn mark(&self) -> String {
        format!("{MARK}={}", self.name)
    }

    /// Runs nilicon to its end: a verb, the topology file, and more arguments.
    pub fn run(&self, verb: &str, arguments: &[&str]) -> Done {
        self.start(verb, arguments).wait(PATIENCE * 5)
    }

    /// Starts nilicon beside the test, with the same arguments as [`Bed::run`].
    pub fn start(&self, verb: &str, arguments: &[&str]) -> Running {
        self.start_with(verb, arguments, &[])
    }

    /// As [`Bed::start`], with more variables, which the agents inherit.
    pub fn start_with(
        &self,
        verb: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Running {
        let mut line = vec![verb, &self.file];
        line.extend(arguments);
        let environment = [&[(MARK, self.name.as_str())], environment].concat();
        Running::start(&line, &environment, &self.directory)
    }

    /// Makes the lab, and waits until the container is protected.
    #[track_caller]
    pub fn deploy(&self) -> Done {
        self.run("deploy", &[]).expect_success()
    }

    /// Injects a fault.
    #[track_caller]
    pub fn fault(&self, fault: &str) -> Done {
        self.run("fault", &[fault]).expect_success()
    }

    /// Removes the lab; nothing must be left of it.
    #[track_caller]
    pub fn destroy(&self) {
        let done = self.run("destroy", &[]).expect_success();
        assert!(done.stdout.contains("is gone"), "{done}");
        self.expect_gone();
    }

    /// Runs a command in the network of a node.
    pub fn exec(&self, node: &str, command: &[&str]) -> Done {
        self.start_exec(node, command).wait(PATIENCE * 5)
    }

    /// Starts a command in the network of a node.
    pub fn start_exec(&self, node: &str, command: &[&str]) -> Running {
        let line: Vec<&str> = [node, "--"].iter().chain(command).copied().collect();
        self.start("exec", &line)
    }

    /// Connects from a node; `program` is `env!("CARGO_BIN_EXE_relay")`.
    pub fn connect(&self, program: &str, node: &str, address: &str) -> Relay {
        Relay::connect(program, &self.name, node, address)
    }

    /// What `inspect` says.
    #[track_caller]
    pub fn inspect(&self) -> Value {
        nilicon(&["inspect", &self.name, "-o", "json"]).expect_success().json()
    }

    /// What `inspect` says about the container; none while there is no lab.
    pub fn store(&self) -> Option<Value> {
        let done = nilicon(&["inspect", &self.name, "-o", "json"]);
        (done.code == Some(0)).then(|| done.json()["containers"][0].clone())
    }

    /// Waits until what `inspect` says about the container is as wanted.
    #[track_caller]
    pub fn until_store(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            last = self.store();
            if let Some(store) = last.as_ref().filter(|store| wanted(store)) {
                return store.clone();
            }
            std::thread::sleep(LOOK);
        }
        panic!("waited too long until {what}; it is {last:#?}");
    }

    /// What is left of the lab.
    pub fn leftovers(&self) -> Vec<String> {
        leftovers(&self.name, &self.mark())
    }

    /// Fails if anything is left of the lab.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn expect_gone(&self) {
        let left = self.leftovers();
        assert!(left.is_empty(), "left of {}: {left:#?}", self.name);
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let done = nilicon(&["destroy", &self.name]);
        // Its file may be gone or broken on purpose; then it never was a lab.
        let left = self.leftovers();
        let removed = fs::remove_dir_all(&self.directory);
        if !std::thread::panicking() {
            assert!(left.is_empty(), "left after {done}: {left:#?}");
            removed.expect("remove the directory of the test");
        }
    }
}
