//! A TCP connection from inside a lab, held by a program of this crate that copies bytes both
//! ways: the test writes the requests and reads the answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::command::binary;

/// How long an answer may take: far longer than any failover.
const PATIENCE: Duration = Duration::from_secs(30);

/// One connection.
#[derive(Debug)]
pub struct Relay {
    child: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

impl Relay {
    /// Connects from a node of a lab to an address. `program` is the relay, which the caller knows
    /// as `env!("CARGO_BIN_EXE_relay")`.
    pub fn connect(program: &str, lab: &str, node: &str, address: &str) -> Self {
        let patience = PATIENCE.as_secs().to_string();
        let mut child = Command::new(binary())
            .args(["exec", lab, node, "--", program, address, &patience])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the relay");
        let (to, from) = (child.stdin.take(), child.stdout.take());
        Self { child, to, from: BufReader::new(from.expect("it has a standard output")) }
    }

    /// Sends.
    #[track_caller]
    pub fn send(&mut self, text: &str) {
        let to = self.to.as_mut().expect("not at its end");
        to.write_all(text.as_bytes()).and_then(|()| to.flush()).expect("send through the relay");
    }

    /// The next line of the answer, without its end.
    ///
    /// # Panics
    /// The connection was closed or broken, or the answer takes too long.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.from.read_line(&mut line).expect("text");
        assert!(read > 0, "the connection is over: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    /// The next bytes that come.
    ///
    /// # Panics
    /// There are not so many.
    #[track_caller]
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.from.read_exact(&mut bytes).expect("so many bytes");
        bytes
    }

    /// Everything that comes until the other side closes, which must not be a reset.
    #[track_caller]
    pub fn all_bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.from.read_to_end(&mut bytes).expect("bytes");
        assert!(self.child.wait().expect("its end").success(), "the connection was broken");
        bytes
    }

    /// Whether there is something of an answer that was not read yet, or the connection is over.
    pub fn has_more(&self) -> bool {
        let mut fds = [PollFd::new(self.from.get_ref().as_fd(), PollFlags::POLLIN)];
        !self.from.buffer().is_empty() || poll(&mut fds, PollTimeout::ZERO).expect("poll") > 0
    }

    /// Sends a line and returns the line that answers it.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> String {
        self.send(&format!("{line}\r\n"));
        self.line()
    }

    /// Everything until the other side closes.
    #[track_caller]
    pub fn rest(mut self) -> String {
        let mut text = String::new();
        self.from.read_to_string(&mut text).expect("text");
        text
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // At the end of its input the relay closes its connection and ends.
        self.to = None;
        let _ = self.child.wait();
    }
}
