//! Processes of a test: this program again, as somebody else.

use crate::PART;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// This program again, as somebody else. It ends with its owner.
pub(crate) struct Process {
    child: Child,
    _input: ChildStdin,
    _output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a part and waits until it says that it is ready.
    pub(crate) fn start(part: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "part", "--nocapture", "-q"])
            .env(PART, part)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let input = child.stdin.take().expect("a pipe");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let ready = output.by_ref().lines().map_while(Result::ok).any(|l| l.ends_with("ready"));
        assert!(ready, "{part} gets ready");
        Self { child, _input: input, _output: output }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Stops all its threads, wherever they are outside the kernel.
    pub(crate) fn stop(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGSTOP).expect("it is there");
        let status = waitpid(Pid::from_raw(self.pid()), Some(WaitPidFlag::WUNTRACED));
        assert!(matches!(status, Ok(WaitStatus::Stopped(..))), "{status:?}");
    }

    pub(crate) fn run(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).expect("it is there");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has a mount namespace of its own until its input ends.
pub(crate) fn hold() {
    // The first thread's namespace is the process's, so it is a process of one thread that does it.
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
    println!("{} ready", nix::unistd::gettid());
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

/// The thread of the holder that has a namespace of its own: threads of one process may differ.
pub(crate) fn thread_in_namespace(holder: &Process) -> i32 {
    let link = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("a namespace");
    let ours = link(std::process::id() as i32);
    let tasks = fs::read_dir(format!("/proc/{}/task", holder.pid())).expect("threads");
    tasks
        .filter_map(|t| t.ok()?.file_name().to_str()?.parse().ok())
        .find(|tid| link(*tid) != ours)
        .expect("one has")
}
