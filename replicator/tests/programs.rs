//! Real programs of several processes, captured while clients use them and brought back. Needs
//! root; a program that is not installed is left out.

mod common;

use common::{CONTAINER, Lan, Original, Scratch};
use replicator::image::net::TcpConnection;
use replicator::restore::Peer;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

const NGINX: &str = "/usr/sbin/nginx";

/// A keep-alive connection to the web server.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(lan: &Lan) -> Self {
        let begin = Instant::now();
        loop {
            let connect = || TcpStream::connect((CONTAINER, 8080));
            match lan.namespace.enter(connect).expect("entered") {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
                    return Self(BufReader::new(stream));
                }
                Err(e) => assert!(begin.elapsed() < Duration::from_secs(30), "{e}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks for a page on the same connection as before.
    fn get(&mut self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.0.get_mut().write_all(request.as_bytes()).expect("sent");
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            assert_ne!(self.0.read_line(&mut line).expect("an answer"), 0, "it hung up");
            let head = line.trim().to_ascii_lowercase();
            assert!(!head.starts_with("http/1.1 5"), "{head}");
            if let Some(number) = head.strip_prefix("content-length:") {
                length = number.trim().parse().expect("a number");
            }
            if head.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).expect("a body");
        String::from_utf8(body).expect("text")
    }

    /// Connections accepted, connections handled, requests: counted by all workers together.
    fn counts(&mut self) -> [u64; 3] {
        let text = self.get("/status");
        let line = text.lines().nth(2).expect("three lines");
        let mut numbers = line.split_whitespace().map(|n| n.parse().expect("a number"));
        std::array::from_fn(|_| numbers.next().expect("three numbers"))
    }
}

#[test]
fn nginx_goes_on_with_master_workers_and_keep_alive_clients() {
    if !Path::new(NGINX).exists() {
        println!("skipped: {NGINX} is not there");
        return;
    }
    let dir = Scratch::new("programs-nginx");
    let here = dir.0.display();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {here}/{kind};"))
        .join(" ");
    let configuration = format!(
        "daemon off; worker_processes 3; pid {here}/pid; error_log {here}/console info;
         events {{ worker_connections 200; }}
         http {{ {temporary} access_log {here}/access;
             limit_req_zone $binary_remote_addr zone=one:4m rate=100000r/s;
             server {{ listen 8080 reuseport; root {here}; limit_req zone=one burst=1000 nodelay;
                 location /status {{ stub_status; }} }} }}"
    );
    std::fs::write(dir.0.join("conf"), configuration).expect("written");
    let page = "a page that nginx sends from a file\n".repeat(3000);
    std::fs::write(dir.0.join("page"), &page).expect("written");
    let lan = Lan::new("nginx");
    let conf = dir.0.join("conf");
    let command =
        [NGINX, "-p", dir.0.to_str().expect("a path"), "-c", conf.to_str().expect("path")];
    let mut original = Original::start_with(&dir, &command, |pid| lan.connect(pid, "first"));
    lan.plug("first");
    original.pump_until("its workers run", || {
        let text = std::fs::read_to_string(dir.0.join("console")).expect("console");
        text.matches("start worker process ").count() == 3
    });
    let mut clients: Vec<Client> = (0..20).map(|_| Client::connect(&lan)).collect();
    let mut spare = None;
    let mut counts = [0; 3];
    for round in 0..5 {
        counts = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                for client in &mut clients {
                    assert_eq!(client.get("/page"), page);
                }
                clients[round].counts()
            });
            // Its signals wait for us.
            original.pump_until("nginx has answered", || asking.is_finished());
            asking.join().expect("no panic")
        });
        assert_eq!(counts, [20, 20, 21 * (round as u64 + 1)]);
        match &mut spare {
            Some(spare) => drop(original.follow(spare)),
            None => {
                original.checkpoint();
                let mut fresh = original.spare();
                original.bring(&mut fresh);
                lan.connect(fresh.pid(), "second");
                spare = Some(fresh);
            }
        }
    }
    assert_eq!(original.state.processes.len(), 4);
    lan.unplug("first");
    original.kill();

    let mut spare = spare.expect("a spare");
    spare.prepare().expect("prepare");
    let expects =
        |c: &TcpConnection| Peer::Expects(c.write_seq.wrapping_sub(c.send_queue.len() as u32));
    let resumption = spare.connect(expects).expect("connect");
    assert_eq!(resumption, Default::default());
    lan.plug("second");
    spare.push_unsent().expect("send");
    assert_eq!(spare.complete().expect("complete").len(), 4);
    println!("{:?}, total {:?}", spare.times(), spare.times().total());
    spare.resume_all().expect("resume");
    for client in &mut clients {
        assert_eq!(client.get("/page"), page);
    }
    let after = clients[0].counts();
    assert_eq!(after, [20, 20, counts[2] + 21], "the workers count together still");
    let mut late = Client::connect(&lan);
    assert_eq!(late.get("/page"), page);
    println!("kind nginx ok");
}
