//! Running the `nilicon` binary, to its end or beside the test.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

/// The user that has no rights on any system.
const NOBODY: &str = "65534";

/// The binary under test: `$NILICON_BIN`, or the newest that this workspace was built to.
///
/// # Panics
/// There is none.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("NILICON_BIN") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "NILICON_BIN is {}, and there is no such file", path.display());
        return path;
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate of a workspace");
    let built =
        ["release", "debug"].map(|kind| workspace.join("target").join(kind).join("nilicon"));
    built.iter().find(|path| path.is_file()).cloned().unwrap_or_else(|| {
        panic!(
            "there is no {}: build it with `cargo build --release`, or say where it is by NILICON_BIN",
            built[0].display()
        )
    })
}

/// Whether a program can be started by its name. Tells if not, so that nobody takes a test that
/// did nothing for one that passed.
pub fn is_installed(program: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&dirs).any(|dir| dir.join(program).is_file());
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

/// A command that has ended.
#[derive(Debug, Clone)]
pub struct Done {
    /// What was run, for messages.
    pub line: String,
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Done {
    /// This, if its exit code is `code`.
    ///
    /// # Panics
    /// It is another one.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// This, if it was a success.
    ///
    /// # Panics
    /// It was none.
    #[track_caller]
    pub fn expect_success(self) -> Self {
        self.expect_code(0)
    }

    /// What it printed, as JSON.
    ///
    /// # Panics
    /// It is no JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON: {error}: {self}"))
    }

    /// Fails unless it failed in words: code 1, no panic, and all of these in what it complained
    /// about.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn expect_complaint(self, words: &[&str]) -> Self {
        let done = self.expect_code(1);
        // Long messages are wrapped and framed where they point into a file.
        let said = flat(&done.stderr);
        for word in words {
            assert!(said.contains(&flat(word)), "it does not say {word:?}: {done}");
        }
        assert!(!said.contains("panicked"), "{done}");
        done
    }
}

/// A text without its line breaks and frames.
fn flat(text: &str) -> String {
    let unframed = text.replace(['│', '╭', '╰', '─', '·', '×', '|'], " ");
    unframed.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, code, stdout, stderr } = self;
        write!(f, "`{line}` ended with {code:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// Runs nilicon to its end.
pub fn nilicon(arguments: &[&str]) -> Done {
    let mut command = Command::new(binary());
    command.args(arguments);
    to_its_end(&mut command, arguments)
}

/// Runs nilicon to its end without any rights.
pub fn nilicon_as_nobody(arguments: &[&str]) -> Done {
    // The binary may lie where nobody may look.
    let readable = std::env::temp_dir().join(format!("nilicon-nobody-{}", std::process::id()));
    fs::copy(binary(), &readable).expect("copy the binary");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]);
    command.arg(&readable).args(arguments);
    let done = to_its_end(&mut command, arguments);
    fs::remove_file(&readable).expect("remove the copy of the binary");
    done
}

fn to_its_end(command: &mut Command, arguments: &[&str]) -> Done {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    Done {
        line: format!("nilicon {}", arguments.join(" ")),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A nilicon that runs beside the test, in a process group of its own as a shell would put it.
/// It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    /// Where its output goes: a pipe that nobody reads could block it.
    output: PathBuf,
}

impl Running {
    /// Starts it with more variables in its environment; `directory` gets its output.
    pub fn start(arguments: &[&str], environment: &[(&str, &str)], directory: &Path) -> Self {
        static STARTED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let output = directory.join(format!("run-{number}"));
        let file = |kind| File::create(output.with_extension(kind)).expect("a file for output");
        let child = Command::new(binary())
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"))
            .process_group(0)
            .spawn()
            .expect("start nilicon");
        Self { line: format!("nilicon {}", arguments.join(" ")), child, output }
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("signal nilicon");
    }

    /// Sends SIGINT to its process group, as a terminal does.
    pub fn press_ctrl_c(&self) {
        killpg(self.pid(), Signal::SIGINT).expect("signal nilicon");
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("wait for nilicon").is_some()
    }

    /// What it has printed so far.
    pub fn printed(&self) -> String {
        let bytes = fs::read(self.output.with_extension("out")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end within `patience`.
    #[track_caller]
    pub fn wait(mut self, patience: Duration) -> Done {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for nilicon") {
                return self.done(status);
            }
            assert!(Instant::now() < deadline, "`{}` does not end", self.line);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn done(&self, status: ExitStatus) -> Done {
        let read = |kind| fs::read(self.output.with_extension(kind)).unwrap_or_default();
        Done {
            line: self.line.clone(),
            code: status.code(),
            stdout: String::from_utf8_lossy(&read("out")).into_owned(),
            stderr: String::from_utf8_lossy(&read("err")).into_owned(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing if it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
