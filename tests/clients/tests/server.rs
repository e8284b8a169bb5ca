//! The embedded server: its commands, pipelining, back-pressure, and the tools of Redis.

mod common;

use bytes::BytesMut;
use common::Embedded;
use nilicon_clients::resp::{Limits, Reply, ReplyDecoder, put_command};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;

struct Client {
    stream: TcpStream,
    decoder: ReplyDecoder,
}

impl Client {
    fn new(server: &Embedded) -> Self {
        let stream = TcpStream::connect(server.address).unwrap();
        Self { stream, decoder: ReplyDecoder::new(Limits::default()) }
    }

    fn reply(&mut self) -> Reply {
        let mut buffer = [0; 4096];
        loop {
            if let Some(reply) = self.decoder.next_reply().unwrap() {
                return reply;
            }
            let len = self.stream.read(&mut buffer).unwrap();
            assert_ne!(len, 0, "closed by the server");
            self.decoder.feed(&buffer[..len]);
        }
    }

    fn ask(&mut self, command: &str) -> Reply {
        self.stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        self.reply()
    }

    fn closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}

fn text(reply: &str) -> Reply {
    Reply::Bulk(Some(reply.to_owned().into()))
}

fn ok() -> Reply {
    Reply::Simple("OK".into())
}

#[test]
fn commands_do_what_they_do_in_redis() {
    let server = Embedded::start(2);
    let mut client = Client::new(&server);
    let nil = Reply::Bulk(None);
    let story = [
        ("PING", Reply::Simple("PONG".into())),
        ("ping hello", text("hello")),
        ("ECHO a", text("a")),
        ("GET a", nil.clone()),
        ("SET a 1 XX", nil.clone()),
        ("SET a 1 nx", ok()),
        ("SET a 2 NX", nil.clone()),
        ("SET a 7 XX", ok()),
        ("INCR a", Reply::Integer(8)),
        ("INCRBY a -10", Reply::Integer(-2)),
        ("APPEND a 5", Reply::Integer(3)),
        ("GET a", text("-25")),
        ("APPEND new xyz", Reply::Integer(3)),
        ("MSET b 1 c 2 d 3", ok()),
        ("MGET b nothing d", Reply::Array(Some(vec![text("1"), nil.clone(), text("3")]))),
        ("EXISTS b b nothing", Reply::Integer(2)),
        ("DEL b c nothing", Reply::Integer(2)),
        ("DBSIZE", Reply::Integer(3)),
        ("SELECT 0", ok()),
        ("CLIENT SETNAME x", ok()),
        ("CONFIG GET save", Reply::Array(Some(vec![text("save"), text("")]))),
        ("DEBUG POPULATE 100 p 20", ok()),
        ("DBSIZE", Reply::Integer(103)),
        ("GET p:42", text("value:42\0\0\0\0\0\0\0\0\0\0\0\0")),
        ("FLUSHALL", ok()),
        ("DBSIZE", Reply::Integer(0)),
    ];
    for (command, expected) in story {
        assert_eq!(client.ask(command), expected, "{command}");
    }
    assert!(matches!(client.ask("INFO"), Reply::Bulk(Some(_))));
    client.ask("SET word hello");
    client.ask("SET top 9223372036854775807");
    for bad in ["INCR word", "INCR top", "GET", "SET a 1 ZZ", "MSET a", "NOSUCH", "SELECT 99"] {
        assert!(matches!(client.ask(bad), Reply::Error(_)), "{bad}");
    }
    assert_eq!(client.ask("QUIT"), ok());
    assert!(client.closed());
}

#[test]
fn what_is_not_resp_is_answered_with_an_error_and_closed() {
    let server = Embedded::start(1);
    let mut client = Client::new(&server);
    client.stream.write_all(b"*1\r\n:5\r\n").unwrap();
    assert!(matches!(client.reply(), Reply::Error(text) if text.starts_with(b"ERR Protocol")));
    assert!(client.closed());
    assert_eq!(Client::new(&server).ask("PING"), Reply::Simple("PONG".into()));
}

/// The client sends 64 MiB worth of replies' requests before it reads one.
#[test]
fn a_client_that_does_not_read_gets_all_replies_in_order() {
    let server = Embedded::start(1);
    let mut client = Client::new(&server);
    let value = vec![b'v'; 64 << 10];
    let mut out = BytesMut::new();
    put_command(&mut out, &[b"SET", b"big", &value]);
    for number in 0..1000 {
        put_command(&mut out, &[b"GET", b"big"]);
        put_command(&mut out, &[b"ECHO", format!("{number}").as_bytes()]);
    }
    client.stream.write_all(&out).unwrap();
    // Others are served meanwhile by the same thread.
    assert_eq!(Client::new(&server).ask("PING"), Reply::Simple("PONG".into()));
    assert_eq!(client.reply(), ok());
    for number in 0..1000 {
        assert_eq!(client.reply(), Reply::Bulk(Some(value.clone().into())));
        assert_eq!(client.reply(), text(&number.to_string()));
    }
}

#[test]
fn counters_shared_by_threads_lose_nothing() {
    let server = Embedded::start(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = Client::new(&server);
                for _ in 0..500 {
                    client.ask("INCR n");
                    client.ask("MSET x 1 y 2 z 3");
                    client.ask("DEL z y x");
                }
            });
        }
    });
    assert_eq!(Client::new(&server).ask("GET n"), text("2000"));
}

#[test]
fn shutdown_ends_the_server() {
    let server = Embedded::start(2);
    let mut client = Client::new(&server);
    client.stream.write_all(b"SHUTDOWN NOSAVE\r\n").unwrap();
    server.wait().unwrap();
}

#[test]
fn the_tools_of_redis_work_unmodified() {
    let server = Embedded::start(2);
    let port = server.address.port().to_string();
    let Ok(cli) = Command::new("redis-cli").args(["-p", &port, "SET", "a", "b"]).output() else {
        println!("skipped: redis-cli is not installed");
        return;
    };
    assert_eq!(cli.stdout, b"OK\n", "{cli:?}");
    let cli = Command::new("redis-cli").args(["-p", &port, "--raw", "GET", "a"]).output().unwrap();
    assert_eq!(cli.stdout, b"b\n", "{cli:?}");
    let mut bench = Command::new("redis-benchmark");
    bench.args([
        "-p",
        &port,
        "-t",
        "ping,set,get,incr,mset",
        "-n",
        "2000",
        "-c",
        "10",
        "-P",
        "4",
        "-q",
    ]);
    let Ok(bench) = bench.output() else {
        println!("skipped: redis-benchmark is not installed");
        return;
    };
    let output = String::from_utf8_lossy(&bench.stdout);
    assert!(bench.status.success(), "{bench:?}");
    assert!(bench.stderr.is_empty(), "{bench:?}");
    for test in ["PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET"] {
        assert!(output.contains(test), "{output}");
    }
}
