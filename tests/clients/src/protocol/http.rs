//! HTTP/1.1 over connections that stay, as far as a key-value service needs it.
//!
//! | request | answer |
//! |---|---|
//! | `GET /KEY` | 200 and the value, 404 if there is none |
//! | `PUT /KEY`, the value as its body | 200, 201 or 204 |
//! | `POST /KEY` | 200, the counter after one more as decimal text |
//! | `DELETE /KEY` | 200, 204, or 404 if there was none |
//!
//! Bodies have a `Content-Length`; chunks are not understood. Every request has the header
//! `X-Sequence` with its number on this connection, from 1, and its answer must have the same: so an
//! answer that was left out, doubled or taken from another connection shows even when all say 204.

use super::lines::{Lines, length, unexpected};
use super::{Answer, Language, ProtocolError, Request, Verb};
use crate::resp::parse_integer;
use bytes::{BufMut as _, Bytes, BytesMut};
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(super) struct Http {
    input: Lines,
    /// Requests without an answer, and their numbers.
    asked: VecDeque<(Verb, u64)>,
    sent: u64,
    /// The head of an answer whose body has not come.
    head: Option<Head>,
}

#[derive(Debug)]
struct Head {
    status: u16,
    length: usize,
    sequence: Option<u64>,
}

impl Http {
    pub(super) fn new() -> Self {
        Self::default()
    }

    fn step(&mut self) -> Result<Option<Answer>, ProtocolError> {
        if self.head.is_none() {
            let Some(text) = self.input.until(b"\r\n\r\n")? else { return Ok(None) };
            self.head = Some(head(&text)?);
        }
        let Some(Head { length, .. }) = self.head else { return Ok(None) };
        let Some(body) = self.input.exactly(length, b"")? else { return Ok(None) };
        let Some(Head { status, sequence, .. }) = self.head.take() else { return Ok(None) };
        let Some((verb, number)) = self.asked.pop_front() else {
            return Ok(Some(Answer::Other(format!("HTTP {status}"))));
        };
        if sequence != Some(number) {
            let of = sequence.map_or("no request".to_owned(), |n| format!("request {n}"));
            let text = format!("HTTP {status}, an answer to {of} in the place of {number}");
            return Ok(Some(Answer::Other(text)));
        }
        Ok(Some(judge(verb, status, body)))
    }
}

fn judge(verb: Verb, status: u16, body: Bytes) -> Answer {
    let number = || parse_integer(body.trim_ascii()).map(Answer::Number);
    let answer = match (verb, status) {
        (Verb::Get, 200) => Some(Answer::Value(Some(body.clone()))),
        (Verb::Get, 404) => Some(Answer::Value(None)),
        (Verb::Set, 200 | 201 | 204) | (Verb::Reset, 200 | 204 | 404) => Some(Answer::Done),
        (Verb::Increment, 200) => number(),
        _ => None,
    };
    answer.unwrap_or_else(|| {
        let text = body[..body.len().min(40)].escape_ascii();
        Answer::Other(format!("HTTP {status} \"{text}\" ({} bytes)", body.len()))
    })
}

/// Status line and the fields that matter.
fn head(text: &[u8]) -> Result<Head, ProtocolError> {
    let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end);
    let first = lines.next().unwrap_or_default();
    let status = first.strip_prefix(b"HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(length);
    let Some(status) = status.and_then(|status| u16::try_from(status).ok()) else {
        return Err(unexpected("HTTP/1.1 and a status", first));
    };
    // These have no body, whatever else they say.
    let bare = matches!(status, 204 | 304);
    let (mut len, mut sequence) = (bare.then_some(0), None);
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return Err(unexpected("a header", line));
        };
        let (name, value) = (line[..colon].to_ascii_lowercase(), line[colon + 1..].trim_ascii());
        match &name[..] {
            b"content-length" if !bare => {
                let known = length(value).ok_or_else(|| unexpected("a length", value))?;
                len = Some(known);
            }
            b"transfer-encoding" if !bare => {
                return Err(unexpected("a Content-Length", line));
            }
            b"x-sequence" => sequence = length(value).map(|number| number as u64),
            _ => {}
        }
    }
    let length = len.ok_or_else(|| unexpected("a Content-Length", first))?;
    Ok(Head { status, length, sequence })
}

impl Language for Http {
    fn put(&mut self, request: Request<'_>, out: &mut BytesMut) {
        let (method, key, body): (&str, _, Option<&[u8]>) = match request {
            Request::Get(key) => ("GET", key, None),
            Request::Set(key, value) => ("PUT", key, Some(value)),
            Request::Increment(key) => ("POST", key, Some(b"")),
            Request::Reset(key) => ("DELETE", key, None),
            Request::SetMany(pairs) => {
                for (key, value) in pairs {
                    self.put(Request::Set(key, value), out);
                }
                return;
            }
        };
        self.sent += 1;
        self.asked.push_back((Verb::of(request), self.sent));
        out.put_slice(method.as_bytes());
        out.put_slice(b" /");
        out.put_slice(key);
        let number = self.sent;
        out.put_slice(format!(" HTTP/1.1\r\nHost: nilicon\r\nX-Sequence: {number}\r\n").as_bytes());
        if let Some(body) = body {
            out.put_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        out.put_slice(b"\r\n");
        out.put_slice(body.unwrap_or_default());
    }

    fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.input.buffer
    }

    fn answer(&mut self) -> Result<Option<Answer>, ProtocolError> {
        self.step()
    }
}
