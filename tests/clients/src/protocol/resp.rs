//! The protocol of Redis: [`crate::resp`] does the work.

use super::{Answer, Language, ProtocolError, Request};
use crate::load::describe;
use crate::resp::{Limits, Reply, ReplyDecoder, put_array, put_bulk, put_command};
use bytes::BytesMut;

#[derive(Debug)]
pub(super) struct Resp {
    decoder: ReplyDecoder,
}

impl Resp {
    pub(super) fn new() -> Self {
        Self { decoder: ReplyDecoder::new(Limits::default()) }
    }
}

impl Language for Resp {
    fn put(&mut self, request: Request<'_>, out: &mut BytesMut) {
        match request {
            Request::Get(key) => put_command(out, &[b"GET", key]),
            Request::Set(key, value) => put_command(out, &[b"SET", key, value]),
            Request::SetMany(pairs) => {
                put_array(out, 1 + 2 * pairs.len());
                put_bulk(out, b"MSET");
                for (key, value) in pairs {
                    put_bulk(out, key);
                    put_bulk(out, value);
                }
            }
            Request::Increment(key) => put_command(out, &[b"INCR", key]),
            Request::Reset(key) => put_command(out, &[b"DEL", key]),
        }
    }

    fn buffer_mut(&mut self) -> &mut BytesMut {
        self.decoder.buffer_mut()
    }

    fn answer(&mut self) -> Result<Option<Answer>, ProtocolError> {
        Ok(self.decoder.next_reply()?.map(Answer::from))
    }
}

/// The types of RESP tell which answer it is, so what was asked need not be known.
impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Simple(text) if &text[..] == b"OK" => Self::Done,
            Reply::Bulk(value) => Self::Value(value),
            Reply::Integer(value) => Self::Number(value),
            Reply::Simple(text) => Self::Other(format!("status {}", describe(&text))),
            Reply::Error(text) => Self::Other(format!("error {}", describe(&text))),
            Reply::Array(None) => Self::Other("a nil array".into()),
            Reply::Array(Some(items)) => Self::Other(format!("an array of {}", items.len())),
        }
    }
}
