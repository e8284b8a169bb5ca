//! RESP, version 2: encoding and incremental decoding of commands and replies, without I/O.
//!
//! ```text
//! bytes in any split --feed--> CommandDecoder --next_command--> Vec<Bytes>   (server side)
//!                              ReplyDecoder   --next_reply----> Reply        (client side)
//! ```
//!
//! Invariants: the result does not depend on how the stream was cut into pieces; whatever comes
//! in, a decoder answers with a value or an error and never panics; what it holds is bounded by
//! [`Limits`]. After an error the stream has lost its framing, so the decoder repeats that error
//! for ever.

use bytes::{BufMut, Bytes, BytesMut};
use std::fmt::Write as _;

#[cfg(test)]
mod tests;

/// Bounds on what a decoder accepts; beyond each the stream is in error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in one line: a length, a status, an inline command.
    pub line: usize,
    /// Bytes in one bulk string.
    pub bulk: usize,
    /// Elements in one message, those of nested arrays included.
    pub elements: usize,
    /// Bytes in one message.
    pub message: usize,
    /// Arrays within arrays.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { line: 64 << 10, bulk: 64 << 20, elements: 1 << 20, message: 256 << 20, depth: 8 }
    }
}

/// Why a stream is not RESP, or more of it than the limits allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RespError {
    /// A line without end.
    #[error("a line is longer than {limit} bytes")]
    LineTooLong {
        /// [`Limits::line`].
        limit: usize,
    },
    /// A line ends with a bare LF, or a CR stands inside it.
    #[error("a line does not end with CR LF, or has a CR inside")]
    LineEnd,
    /// The first byte names no type of message.
    #[error("unknown message type {byte:#04x}")]
    UnknownType {
        /// The byte found.
        byte: u8,
    },
    /// A length or an integer is not a number.
    #[error("{what} is not a number, or out of range")]
    BadNumber {
        /// Which number.
        what: &'static str,
    },
    /// An argument of a command is no bulk string.
    #[error("expected a bulk string, got type {byte:#04x}")]
    ExpectedBulk {
        /// The byte found.
        byte: u8,
    },
    /// A bulk string above the limit.
    #[error("a bulk string of {len} bytes is above the limit of {limit}")]
    BulkTooLarge {
        /// Its length.
        len: u64,
        /// [`Limits::bulk`].
        limit: usize,
    },
    /// A bulk string is not followed by CR LF.
    #[error("a bulk string does not end with CR LF")]
    BulkEnd,
    /// More elements than the limit.
    #[error("a message of {count} elements is above the limit of {limit}")]
    TooManyElements {
        /// Elements announced so far.
        count: u64,
        /// [`Limits::elements`].
        limit: usize,
    },
    /// More bytes than the limit.
    #[error("a message is longer than {limit} bytes")]
    MessageTooLarge {
        /// [`Limits::message`].
        limit: usize,
    },
    /// Arrays nested too deep.
    #[error("arrays are nested deeper than {limit}")]
    TooDeep {
        /// [`Limits::depth`].
        limit: usize,
    },
    /// An inline command with an open quote.
    #[error("unbalanced quotes in an inline command")]
    UnbalancedQuotes,
}

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `+`: a status.
    Simple(Bytes),
    /// `-`: an error.
    Error(Bytes),
    /// `:`: an integer.
    Integer(i64),
    /// `$`: a string of any bytes, or nil.
    Bulk(Option<Bytes>),
    /// `*`: an array, or nil.
    Array(Option<Vec<Reply>>),
}

impl Reply {
    /// Appends the reply in wire format.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Simple(text) => put_line(out, b'+', text),
            Self::Error(text) => put_line(out, b'-', text),
            Self::Integer(value) => put_integer(out, *value),
            Self::Bulk(Some(data)) => put_bulk(out, data),
            Self::Bulk(None) => put_nil(out),
            Self::Array(None) => out.put_slice(b"*-1\r\n"),
            Self::Array(Some(items)) => {
                put_array(out, items.len());
                items.iter().for_each(|item| item.encode(out));
            }
        }
    }
}

/// Appends a command as an array of bulk strings.
pub fn put_command(out: &mut BytesMut, args: &[&[u8]]) {
    put_array(out, args.len());
    args.iter().for_each(|arg| put_bulk(out, arg));
}

/// Appends a status or error line; CR and LF, which cannot stand in one, become blanks.
pub fn put_line(out: &mut BytesMut, kind: u8, text: &[u8]) {
    out.put_u8(kind);
    out.extend(text.iter().map(|&b| if matches!(b, b'\r' | b'\n') { b' ' } else { b }));
    out.put_slice(b"\r\n");
}

/// Appends an integer.
pub fn put_integer(out: &mut BytesMut, value: i64) {
    put_number(out, b':', value);
}

/// Appends a bulk string.
pub fn put_bulk(out: &mut BytesMut, data: &[u8]) {
    put_number(out, b'$', data.len() as i64);
    out.put_slice(data);
    out.put_slice(b"\r\n");
}

/// Appends a nil bulk string.
pub fn put_nil(out: &mut BytesMut) {
    out.put_slice(b"$-1\r\n");
}

/// Appends the head of an array; its `len` elements must follow.
pub fn put_array(out: &mut BytesMut, len: usize) {
    put_number(out, b'*', len as i64);
}

fn put_number(out: &mut BytesMut, kind: u8, value: i64) {
    // Writing into a BytesMut grows it and cannot fail.
    let _ = write!(out, "{}{value}\r\n", kind as char);
}

/// Decodes commands, as a server reads them: arrays of bulk strings, or inline lines.
#[derive(Debug)]
pub struct CommandDecoder {
    input: Input,
    left: usize,
    args: Vec<Bytes>,
}

impl CommandDecoder {
    /// An empty decoder.
    pub fn new(limits: Limits) -> Self {
        Self { input: Input::new(limits), left: 0, args: Vec::new() }
    }

    /// Appends received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.buffer.extend_from_slice(bytes);
    }

    /// Bytes received and not yet part of a command.
    pub fn buffered(&self) -> usize {
        self.input.buffer.len()
    }

    /// The next whole command, at least one argument long; `None` until more bytes come.
    pub fn next_command(&mut self) -> Result<Option<Vec<Bytes>>, RespError> {
        self.input.check()?;
        let result = self.step();
        self.input.remember(result)
    }

    fn step(&mut self) -> Result<Option<Vec<Bytes>>, RespError> {
        while self.left == 0 {
            let Some(first) = self.input.peek() else { return Ok(None) };
            self.input.message = 0;
            if first != b'*' {
                let Some(line) = self.input.line()? else { return Ok(None) };
                let args = split_inline(line.strip_suffix(b"\r").unwrap_or(&line))?;
                if !args.is_empty() {
                    return Ok(Some(args));
                }
                continue;
            }
            let Some(count) = self.input.length("the count of arguments")? else {
                return Ok(None);
            };
            // An empty array is no command; Redis passes over it, so do we.
            self.left = count.unwrap_or(0);
            self.input.elements = 0;
            self.input.count(self.left)?;
        }
        while self.left > 0 {
            if self.input.bulk.is_none() {
                match self.input.peek() {
                    None => return Ok(None),
                    Some(b'$') => {}
                    Some(byte) => return Err(RespError::ExpectedBulk { byte }),
                }
            }
            match self.input.bulk()? {
                None => return Ok(None),
                Some(None) => {
                    return Err(RespError::BadNumber { what: "the length of an argument" });
                }
                Some(Some(data)) => self.args.push(data),
            }
            self.left -= 1;
        }
        Ok(Some(std::mem::take(&mut self.args)))
    }
}

/// Decodes replies, as a client reads them.
#[derive(Debug)]
pub struct ReplyDecoder {
    input: Input,
    /// Arrays begun and not complete, outermost first: elements to come, elements there.
    open: Vec<(usize, Vec<Reply>)>,
}

impl ReplyDecoder {
    /// An empty decoder.
    pub fn new(limits: Limits) -> Self {
        Self { input: Input::new(limits), open: Vec::new() }
    }

    /// Appends received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.buffer.extend_from_slice(bytes);
    }

    /// The receive buffer, for readers that append to it without a copy in between. Only append.
    pub fn buffer_mut(&mut self) -> &mut BytesMut {
        &mut self.input.buffer
    }

    /// The next whole reply; `None` until more bytes come.
    pub fn next_reply(&mut self) -> Result<Option<Reply>, RespError> {
        self.input.check()?;
        let result = self.step();
        self.input.remember(result)
    }

    fn step(&mut self) -> Result<Option<Reply>, RespError> {
        loop {
            let Some(first) = self.input.peek() else { return Ok(None) };
            if self.open.is_empty() && self.input.bulk.is_none() {
                (self.input.message, self.input.elements) = (0, 0);
            }
            let mut reply = match self.element(first)? {
                None => return Ok(None),
                Some(Element::Opened) => continue,
                Some(Element::Whole(reply)) => reply,
            };
            loop {
                let Some((left, items)) = self.open.last_mut() else { return Ok(Some(reply)) };
                items.push(reply);
                *left -= 1;
                if *left > 0 {
                    break;
                }
                reply = Reply::Array(self.open.pop().map(|(_, items)| items));
            }
        }
    }

    fn element(&mut self, first: u8) -> Result<Option<Element>, RespError> {
        if self.input.bulk.is_some() || first == b'$' {
            return Ok(self.input.bulk()?.map(|data| Element::Whole(Reply::Bulk(data))));
        }
        let reply = match first {
            b'+' | b'-' | b':' => {
                let Some(line) = self.input.crlf_line()? else { return Ok(None) };
                let text = line.slice(1..);
                match first {
                    b'+' => Reply::Simple(text),
                    b'-' => Reply::Error(text),
                    _ => Reply::Integer(number(&text, "an integer reply")?),
                }
            }
            b'*' => match self.input.length("the length of an array")? {
                None => return Ok(None),
                Some(None) => Reply::Array(None),
                Some(Some(0)) => Reply::Array(Some(Vec::new())),
                Some(Some(count)) => {
                    if self.open.len() >= self.input.limits.depth {
                        return Err(RespError::TooDeep { limit: self.input.limits.depth });
                    }
                    self.input.count(count)?;
                    self.open.push((count, Vec::new()));
                    return Ok(Some(Element::Opened));
                }
            },
            byte => return Err(RespError::UnknownType { byte }),
        };
        Ok(Some(Element::Whole(reply)))
    }
}

/// What one step of a reply decoder found.
enum Element {
    /// A reply that needs nothing more.
    Whole(Reply),
    /// The head of an array whose elements follow.
    Opened,
}

/// What both decoders share: the buffer and the tokens in it, with their limits.
#[derive(Debug)]
struct Input {
    limits: Limits,
    buffer: BytesMut,
    /// Bytes at the start of the buffer known to hold no LF.
    scanned: usize,
    /// A bulk string whose head was read and whose data has not come yet.
    bulk: Option<usize>,
    /// Elements announced by the current message.
    elements: u64,
    /// Bytes taken by the current message.
    message: usize,
    error: Option<RespError>,
}

impl Input {
    fn new(limits: Limits) -> Self {
        let buffer = BytesMut::new();
        Self { limits, buffer, scanned: 0, bulk: None, elements: 0, message: 0, error: None }
    }

    fn check(&self) -> Result<(), RespError> {
        self.error.clone().map_or(Ok(()), Err)
    }

    fn remember<T>(&mut self, result: Result<T, RespError>) -> Result<T, RespError> {
        result.inspect_err(|error| self.error = Some(error.clone()))
    }

    fn peek(&self) -> Option<u8> {
        self.buffer.first().copied()
    }

    /// Takes a line, without its LF.
    fn line(&mut self) -> Result<Option<Bytes>, RespError> {
        let limit = self.limits.line;
        let found = self.buffer[self.scanned..].iter().position(|&b| b == b'\n');
        let len = found.map_or(self.buffer.len(), |at| self.scanned + at);
        // The CR may be there or still to come; it does not count.
        if len > limit + 1 {
            return Err(RespError::LineTooLong { limit });
        }
        if found.is_none() {
            self.scanned = len;
            return Ok(None);
        }
        self.scanned = 0;
        self.spend(len + 1)?;
        Ok(Some(self.buffer.split_to(len + 1).freeze().slice(..len)))
    }

    /// Takes a line that must end with CR LF, without these.
    fn crlf_line(&mut self) -> Result<Option<Bytes>, RespError> {
        let Some(line) = self.line()? else { return Ok(None) };
        let Some((b'\r', text)) = line.split_last() else { return Err(RespError::LineEnd) };
        if text.contains(&b'\r') {
            return Err(RespError::LineEnd);
        }
        Ok(Some(line.slice(..text.len())))
    }

    /// Takes the head of an array or a bulk string; the inner `None` is nil.
    fn length(&mut self, what: &'static str) -> Result<Option<Option<usize>>, RespError> {
        let Some(line) = self.crlf_line()? else { return Ok(None) };
        match number(&line[1..], what)? {
            -1 => Ok(Some(None)),
            len => match usize::try_from(len) {
                Ok(len) => Ok(Some(Some(len))),
                Err(_) => Err(RespError::BadNumber { what }),
            },
        }
    }

    /// Takes a bulk string; the inner `None` is nil.
    fn bulk(&mut self) -> Result<Option<Option<Bytes>>, RespError> {
        let len = match self.bulk {
            Some(len) => len,
            None => match self.length("the length of a string")? {
                None => return Ok(None),
                Some(None) => return Ok(Some(None)),
                Some(Some(len)) => len,
            },
        };
        let limit = self.limits.bulk;
        if len > limit {
            return Err(RespError::BulkTooLarge { len: len as u64, limit });
        }
        if self.buffer.len() < len + 2 {
            self.bulk = Some(len);
            return Ok(None);
        }
        self.bulk = None;
        self.spend(len + 2)?;
        let data = self.buffer.split_to(len + 2).freeze();
        if &data[len..] != b"\r\n" {
            return Err(RespError::BulkEnd);
        }
        Ok(Some(Some(data.slice(..len))))
    }

    /// Counts elements of the current message against the limit.
    fn count(&mut self, more: usize) -> Result<(), RespError> {
        self.elements = self.elements.saturating_add(more as u64);
        let limit = self.limits.elements;
        if self.elements > limit as u64 {
            return Err(RespError::TooManyElements { count: self.elements, limit });
        }
        Ok(())
    }

    /// Counts bytes of the current message against the limit.
    fn spend(&mut self, bytes: usize) -> Result<(), RespError> {
        self.message += bytes;
        let limit = self.limits.message;
        if self.message > limit {
            return Err(RespError::MessageTooLarge { limit });
        }
        Ok(())
    }
}

/// A decimal number: an optional minus and digits, nothing else.
fn number(text: &[u8], what: &'static str) -> Result<i64, RespError> {
    parse_integer(text).ok_or(RespError::BadNumber { what })
}

/// Reads a decimal integer as RESP and the commands on numbers write it: an optional minus and
/// digits, without a plus or blanks.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if !digits.first()?.is_ascii_digit() {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

/// Cuts an inline command into arguments: blanks between, quotes as in a shell.
fn split_inline(line: &[u8]) -> Result<Vec<Bytes>, RespError> {
    let mut args = Vec::new();
    let mut rest = line.trim_ascii_start();
    while !rest.is_empty() {
        let mut arg = Vec::new();
        let mut quote = None;
        let mut at = 0;
        while at < rest.len() {
            let byte = rest[at];
            match (quote, byte) {
                (None, b) if b.is_ascii_whitespace() => break,
                (None, b'"' | b'\'') => quote = Some(byte),
                (Some(q), b) if q == b => quote = None,
                (Some(_), b'\\') if at + 1 < rest.len() => {
                    at += 1;
                    arg.push(match rest[at] {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        other => other,
                    });
                }
                (_, b) => arg.push(b),
            }
            at += 1;
        }
        if quote.is_some() {
            return Err(RespError::UnbalancedQuotes);
        }
        args.push(Bytes::from(arg));
        rest = rest[at..].trim_ascii_start();
    }
    Ok(args)
}
