//! A container whose program does what it is told over a connection, with clients of it in another network namespace. Each
//! stop looks at everything one by one as well, and compares.

use super::{CONTAINER, Lan, Original, Scratch, wait_until};
use replicator::Epoch;
use replicator::capture::{CaptureError, Glances, NoBoundary, StopTimes};
use replicator::image::Kind;
use replicator::image::net::TcpConnection;
use replicator::sys::sockopt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

/// The part of the program: has `act` do each line that comes over the first connection to this port, with what
/// accepts the others, and says when it is done.
pub fn obey(port: u16, mut act: impl FnMut(&TcpListener, &[&str])) {
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("bound");
    println!("listening");
    let (control, _) = listener.accept().expect("accepted");
    let mut lines = BufReader::new(control.try_clone().expect("a duplicate")).lines();
    while let Some(Ok(line)) = lines.next() {
        act(&listener, &line.split(' ').collect::<Vec<_>>());
        (&control).write_all(b".").expect("answered");
    }
}

/// The container, and its clients.
pub struct Stage {
    pub original: Original,
    pub lan: Lan,
    pub clients: Vec<TcpStream>,
    port: u16,
    control: TcpStream,
    _dir: Scratch,
}

impl Stage {
    /// Runs the test `subject` of the calling program in it, which [`obey`]s at this port.
    pub fn new(name: &str, port: u16) -> Self {
        let dir = Scratch::new(name);
        let lan = Lan::new(name);
        let exe = std::env::current_exe().expect("a path");
        let command = [exe.to_str().expect("a path"), "--exact", "subject", "--nocapture"];
        let mut original = Original::start_with(&dir, &command, |pid| lan.connect(pid, "cable"));
        original.capturer.set_glances(Glances::Checked);
        lan.plug("cable");
        let console = original.console();
        original.pump_until("it listens", || {
            std::fs::read_to_string(&console).is_ok_and(|s| s.contains("listening"))
        });
        let control = dial(&lan, port);
        Self { original, lan, clients: Vec::new(), port, control, _dir: dir }
    }

    /// Another client connects.
    pub fn dial(&mut self) {
        self.clients.push(dial(&self.lan, self.port));
    }

    /// Has the program do something. To accept a connection is to accept that of a client that comes for it.
    pub fn tell(&mut self, line: &str) {
        if line == "accept" {
            self.dial();
        }
        self.control.write_all(format!("{line}\n").as_bytes()).expect("sent");
        self.control.set_nonblocking(true).expect("set");
        let control = &self.control;
        let answered = || (&mut { control }).read(&mut [0]).is_ok_and(|n| n == 1);
        self.original.pump_until(line, answered);
        self.control.set_nonblocking(false).expect("set");
    }

    /// Waits until what was written is acknowledged: on both sides, as a cork (TCP_CORK) keeps it for 200 ms.
    pub fn settle(&self) {
        let quiet = |s: &TcpStream| sockopt::out_queue(s.as_fd()).expect("asked") == 0;
        let sockets = format!("/proc/{}/net/tcp", self.original.launched.pid);
        let is_out =
            |line: &str| line.split_whitespace().nth(4).is_some_and(|q| q.starts_with("00000000:"));
        wait_until("all is sent", || {
            let theirs = std::fs::read_to_string(&sockets).expect("its sockets");
            theirs.lines().skip(1).all(is_out)
                && quiet(&self.control)
                && self.clients.iter().all(quiet)
        });
        // Acknowledgements that wait for data to go with.
        std::thread::sleep(Duration::from_millis(60));
    }

    /// Stops until nothing is in the way of it.
    pub fn stop(&mut self) -> StopTimes {
        let o = &mut self.original;
        o.epoch += 1;
        loop {
            match o.capturer.stop(Epoch(o.epoch), &mut NoBoundary, &mut o.state, &mut o.pages) {
                Err(CaptureError::Transient(_)) => {}
                other => return other.expect("a glance shows what is there"),
            }
        }
    }

    /// A round of pre-copy.
    pub fn look_ahead(&mut self) {
        self.original.capturer.prepare().expect("prepared");
        self.original.capturer.precopy().expect("looked ahead");
    }

    /// All connections of the last stop.
    pub fn connections(&self) -> impl Iterator<Item = &TcpConnection> {
        self.original.state.descriptions.iter().filter_map(|d| match &d.kind {
            Kind::Tcp(c) => Some(&**c),
            _ => None,
        })
    }

    /// That of a client.
    pub fn connection(&self, client: usize) -> &TcpConnection {
        let address = self.clients[client].local_addr().expect("an address");
        self.connections().find(|c| c.remote == address).expect("captured")
    }
}

fn dial(lan: &Lan, port: u16) -> TcpStream {
    let connect = || TcpStream::connect((CONTAINER, port)).expect("connected");
    lan.namespace.enter(connect).expect("entered")
}
