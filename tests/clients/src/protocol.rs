//! What the load generator asks of a server, and what it is answered, in whatever language the
//! server speaks.
//!
//! ```text
//! Request --put--> bytes to send          bytes received --answer--> Answer
//!           \______ one Language of one connection ______/
//! ```
//!
//! Invariants: a request is one message, and each message has one answer, in the order of requests;
//! an answer that does not fit its request is [`Answer::Other`] and never taken for another; bytes
//! that are no answer at all end the connection.

mod http;
mod lines;
mod memcached;
mod resp;

use crate::resp::RespError;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;

#[cfg(test)]
mod tests;

/// The language that a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// That of Redis, version 2.
    #[default]
    Resp,
    /// The text protocol of memcached.
    Memcached,
    /// HTTP/1.1 with connections that stay: GET and PUT of a path, POST to count, DELETE. Each
    /// request has a number (`X-Sequence`), which the answer must repeat.
    Http,
}

impl Protocol {
    /// A connection's state in this language.
    pub(crate) fn begin(self) -> Box<dyn Language> {
        match self {
            Self::Resp => Box::new(resp::Resp::new()),
            Self::Memcached => Box::new(memcached::Memcached::new()),
            Self::Http => Box::new(http::Http::new()),
        }
    }

    /// Whether one request can set many keys.
    pub(crate) fn sets_many(self) -> bool {
        self == Self::Resp
    }

    /// Requests in flight where the load does not say how many: servers of HTTP need not take more
    /// than one at a time.
    pub(crate) fn window(self, wanted: usize, pipeline: usize) -> usize {
        if self == Self::Http { pipeline } else { wanted }
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Request<'a> {
    /// The value of a key.
    Get(&'a [u8]),
    /// That a key has a value.
    Set(&'a [u8], &'a [u8]),
    /// That all these keys have their values; only where [`Protocol::sets_many`].
    SetMany(&'a [(Vec<u8>, Vec<u8>)]),
    /// That a counter is one more, and what it is then.
    Increment(&'a [u8]),
    /// That a counter is back at nothing.
    Reset(&'a [u8]),
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is done.
    Done,
    /// A value, or that there is none.
    Value(Option<Bytes>),
    /// A number.
    Number(i64),
    /// Something else, such as an error; described for people.
    Other(String),
}

/// Why what was received is no answer at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    /// Not RESP.
    #[error("the reply is not RESP: {0}")]
    Resp(#[from] RespError),
    /// A line without end.
    #[error("a line or head of more than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A value above what anyone has asked for.
    #[error("a value of {len} bytes")]
    TooLarge {
        /// Its length.
        len: usize,
    },
    /// Something that stands where it must not.
    #[error("expected {expected}, got \"{}\"", got.escape_ascii())]
    Unexpected {
        /// What should have come.
        expected: &'static str,
        /// The first bytes that came.
        got: Vec<u8>,
    },
}

/// One side of a connection in one language: requests become bytes, bytes become answers. No I/O.
pub(crate) trait Language: Debug + Send {
    /// Appends a request to `out`, and remembers that its answer will come.
    fn put(&mut self, request: Request<'_>, out: &mut BytesMut);

    /// What was received; readers append to it.
    fn buffer_mut(&mut self) -> &mut BytesMut;

    /// The next whole answer; `None` until more bytes come.
    ///
    /// # Errors
    /// The stream is no answer in this language, and has lost its framing.
    fn answer(&mut self) -> Result<Option<Answer>, ProtocolError>;
}

/// A language and what is to be sent in it.
#[derive(Debug)]
pub(crate) struct Dialogue {
    language: Box<dyn Language>,
    /// Requests to be sent.
    pub(crate) out: BytesMut,
}

impl Dialogue {
    pub(crate) fn new(protocol: Protocol) -> Self {
        Self { language: protocol.begin(), out: BytesMut::new() }
    }

    /// Asks.
    pub(crate) fn put(&mut self, request: Request<'_>) {
        self.language.put(request, &mut self.out);
    }

    pub(crate) fn buffer_mut(&mut self) -> &mut BytesMut {
        self.language.buffer_mut()
    }

    pub(crate) fn answer(&mut self) -> Result<Option<Answer>, ProtocolError> {
        self.language.answer()
    }
}

/// What was asked, as far as it decides what fits as an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Get,
    Set,
    Increment,
    Reset,
}

impl Verb {
    fn of(request: Request<'_>) -> Self {
        match request {
            Request::Get(_) => Self::Get,
            Request::Set(..) | Request::SetMany(_) => Self::Set,
            Request::Increment(_) => Self::Increment,
            Request::Reset(_) => Self::Reset,
        }
    }
}
