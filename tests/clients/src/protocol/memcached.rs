//! The text protocol of memcached.
//!
//! Counters are made by the request that resets them, as `incr` counts only what is there.

use super::lines::{Lines, length, unexpected};
use super::{Answer, Language, ProtocolError, Request, Verb};
use crate::load::describe;
use crate::resp::parse_integer;
use bytes::{BufMut as _, Bytes, BytesMut};
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(super) struct Memcached {
    input: Lines,
    /// Requests without an answer: what was asked, and of which key if the answer names it.
    asked: VecDeque<(Verb, Vec<u8>)>,
    /// The head of a value whose data has not come: its key and its length.
    head: Option<(Bytes, usize)>,
}

impl Memcached {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn step(&mut self) -> Result<Option<Answer>, ProtocolError> {
        if self.head.is_none() {
            let Some(line) = self.input.until(b"\r\n")? else { return Ok(None) };
            let Some(head) = line.strip_prefix(b"VALUE ") else {
                return Ok(Some(self.judge(&line)));
            };
            // VALUE key flags length
            let mut words = head.split(|byte| *byte == b' ');
            let (key, _flags, len) = (words.next(), words.next(), words.next().and_then(length));
            let (Some(key), Some(len), None) = (key, len, words.next()) else {
                return Err(unexpected("the head of a value", &line));
            };
            self.head = Some((line.slice_ref(key), len));
        }
        let Some((key, len)) = &self.head else { return Ok(None) };
        let Some(value) = self.input.exactly(*len, b"\r\nEND\r\n")? else { return Ok(None) };
        let answer = match self.asked.pop_front() {
            Some((Verb::Get, asked)) if asked == key[..] => Answer::Value(Some(value)),
            Some((Verb::Get, _)) => {
                Answer::Other(format!("{} of \"{}\"", describe(&value), key.escape_ascii()))
            }
            _ => Answer::Other(format!("the value {}", describe(&value))),
        };
        self.head = None;
        Ok(Some(answer))
    }

    fn judge(&mut self, line: &[u8]) -> Answer {
        match (self.asked.pop_front().map(|asked| asked.0), line) {
            (Some(Verb::Get), b"END") => Answer::Value(None),
            (Some(Verb::Set | Verb::Reset), b"STORED") => Answer::Done,
            (Some(Verb::Increment), line) if parse_integer(line).is_some_and(|n| n >= 0) => {
                parse_integer(line).map_or(Answer::Done, Answer::Number)
            }
            (_, line) => Answer::Other(describe(line)),
        }
    }
}

fn put_value(out: &mut BytesMut, key: &[u8], value: &[u8]) {
    out.put_slice(b"set ");
    out.put_slice(key);
    out.put_slice(format!(" 0 0 {}\r\n", value.len()).as_bytes());
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

impl Language for Memcached {
    fn put(&mut self, request: Request<'_>, out: &mut BytesMut) {
        let key = match request {
            Request::Get(key) => {
                out.put_slice(b"get ");
                out.put_slice(key);
                out.put_slice(b"\r\n");
                key
            }
            Request::Set(key, value) => {
                put_value(out, key, value);
                key
            }
            Request::Increment(key) => {
                out.put_slice(b"incr ");
                out.put_slice(key);
                out.put_slice(b" 1\r\n");
                key
            }
            Request::Reset(key) => {
                put_value(out, key, b"0");
                key
            }
            Request::SetMany(pairs) => {
                for (key, value) in pairs {
                    self.put(Request::Set(key, value), out);
                }
                return;
            }
        };
        let verb = Verb::of(request);
        let named = if verb == Verb::Get { key.to_vec() } else { Vec::new() };
        self.asked.push_back((verb, named));
    }

    fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.input.buffer
    }

    fn answer(&mut self) -> Result<Option<Answer>, ProtocolError> {
        self.step()
    }
}
