//! A small key-value server in memcached's language or in HTTP, which does what it is told.

use nilicon_clients::Protocol;
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    Get,
    Set,
    Increment,
    Reset,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// Writes are acknowledged and not done, from now on.
    ForgetFromNowOn,
    /// The answer has another value or number than it should.
    Damage,
    /// The answer comes twice.
    Double,
    /// The connection is closed instead of an answer.
    Close,
}

/// When it is wrong: at the first request that `which` chooses by what is asked of which key, after
/// so many requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) act: Act,
    pub(crate) which: fn(Ask, &str) -> bool,
    pub(crate) after: u64,
}

#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    protocol: Protocol,
    fault: Option<Fault>,
    store: Mutex<HashMap<String, Vec<u8>>>,
    requests: AtomicU64,
    done: AtomicBool,
    forgets: AtomicBool,
}

struct Request {
    ask: Ask,
    key: String,
    value: Vec<u8>,
    sequence: String,
}

impl Fake {
    /// Its threads end with the connections.
    pub(crate) fn start(protocol: Protocol, fault: Option<Fault>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            protocol,
            fault,
            store: Mutex::default(),
            requests: AtomicU64::default(),
            done: AtomicBool::default(),
            forgets: AtomicBool::default(),
        });
        let served = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), served.clone());
                thread::spawn(move || shared.serve(stream));
            }
        });
        Self { address, shared }
    }

    /// Whether its fault has happened.
    pub(crate) fn did_it(&self) -> bool {
        self.shared.done.load(SeqCst)
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut input = BufReader::new(stream.try_clone()?);
        let mut output = stream;
        loop {
            let request = match self.protocol {
                Protocol::Memcached => memcached(&mut input)?,
                Protocol::Http => http(&mut input)?,
                Protocol::Resp => unreachable!("the embedded server speaks RESP"),
            };
            let Some(request) = request else { return Ok(()) };
            let act = self.act(&request);
            if act == Some(Act::Close) {
                return Ok(());
            }
            let mut value = self.execute(&request);
            if act == Some(Act::Damage)
                && let Some(last) = value.as_mut().and_then(|value| value.last_mut())
            {
                *last = if last.is_ascii_digit() { b'0' + (*last - b'0' + 9) % 10 } else { b'?' };
            }
            let answer = self.answer(&request, value);
            output.write_all(&answer.repeat(if act == Some(Act::Double) { 2 } else { 1 }))?;
        }
    }

    fn act(&self, request: &Request) -> Option<Act> {
        let fault = self.fault?;
        let number = self.requests.fetch_add(1, SeqCst);
        if number < fault.after
            || !(fault.which)(request.ask, &request.key)
            || self.done.swap(true, SeqCst)
        {
            return None;
        }
        self.forgets.store(fault.act == Act::ForgetFromNowOn, SeqCst);
        Some(fault.act)
    }

    fn execute(&self, request: &Request) -> Option<Vec<u8>> {
        let mut store = self.store.lock().unwrap();
        let forgets = self.forgets.load(SeqCst);
        match request.ask {
            Ask::Get => store.get(&request.key).cloned(),
            Ask::Set | Ask::Reset if forgets => None,
            Ask::Set | Ask::Reset => {
                store.insert(request.key.clone(), request.value.clone());
                None
            }
            Ask::Increment => {
                let old = store
                    .get(&request.key)
                    .map_or(0, |text| str::from_utf8(text).unwrap().parse::<i64>().unwrap());
                let new = (old + 1).to_string().into_bytes();
                store.insert(request.key.clone(), new.clone());
                Some(new)
            }
        }
    }

    fn answer(&self, request: &Request, value: Option<Vec<u8>>) -> Vec<u8> {
        let Request { ask, key, sequence, .. } = request;
        if self.protocol == Protocol::Memcached {
            return match (ask, value) {
                (Ask::Get, None) => b"END\r\n".to_vec(),
                (Ask::Get, Some(value)) => {
                    let head = format!("VALUE {key} 0 {}\r\n", value.len());
                    [head.as_bytes(), &value, b"\r\nEND\r\n"].concat()
                }
                (Ask::Increment, value) => [&value.unwrap_or_default()[..], b"\r\n"].concat(),
                _ => b"STORED\r\n".to_vec(),
            };
        }
        let status = match (ask, &value) {
            (_, Some(_)) => "200 OK",
            (Ask::Get, None) => "404 Not Found",
            _ => "204 No Content",
        };
        let body = value.unwrap_or_default();
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nX-Sequence: {sequence}\r\n\r\n"
        );
        [head.as_bytes(), &body].concat()
    }
}

fn line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    Ok((input.read_line(&mut line)? > 0).then(|| line.trim_end().to_owned()))
}

fn memcached(input: &mut impl BufRead) -> io::Result<Option<Request>> {
    let Some(line) = line(input)? else { return Ok(None) };
    let words: Vec<&str> = line.split(' ').collect();
    let ask = match words[0] {
        "get" => Ask::Get,
        "set" => Ask::Set,
        "incr" => Ask::Increment,
        // What is no request gets no answer that fits.
        _ => return Ok(None),
    };
    let mut value = Vec::new();
    if ask == Ask::Set {
        value.resize(words[4].parse::<usize>().unwrap() + 2, 0);
        input.read_exact(&mut value)?;
        value.truncate(value.len() - 2);
    }
    Ok(Some(Request { ask, key: words[1].to_owned(), value, sequence: String::new() }))
}

fn http(input: &mut impl BufRead) -> io::Result<Option<Request>> {
    let Some(first) = line(input)? else { return Ok(None) };
    let words: Vec<&str> = first.split(' ').collect();
    let ask = match words[0] {
        "GET" => Ask::Get,
        "PUT" => Ask::Set,
        "POST" => Ask::Increment,
        _ => Ask::Reset,
    };
    let (mut length, mut sequence) = (0, String::new());
    while let Some(field) = line(input)?.filter(|line| !line.is_empty()) {
        match field.split_once(": ").unwrap() {
            ("Content-Length", value) => length = value.parse().unwrap(),
            ("X-Sequence", value) => value.clone_into(&mut sequence),
            _ => {}
        }
    }
    let mut value = vec![0; length];
    input.read_exact(&mut value)?;
    if ask == Ask::Reset {
        value = b"0".to_vec();
    }
    Ok(Some(Request { ask, key: words[1].to_owned(), value, sequence }))
}
