//! A receive buffer that is read line by line, and by lengths.

use super::ProtocolError;
use bytes::{Bytes, BytesMut};

/// Longest line, or head of a message.
const MAX_LINE: usize = 64 << 10;
/// Longest value; more than the load ever sets.
const MAX_VALUE: usize = 64 << 20;
/// Bytes that an error shows.
const SHOWN: usize = 60;

/// Bytes received and not read yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub(super) buffer: BytesMut,
    /// Bytes at the start that are known not to hold the end that is looked for.
    scanned: usize,
}

impl Lines {
    /// Takes everything up to `end`, and that too; gives it without its end.
    pub(super) fn until(&mut self, end: &[u8]) -> Result<Option<Bytes>, ProtocolError> {
        let from = self.scanned.saturating_sub(end.len());
        let found = self.buffer[from..].windows(end.len()).position(|window| window == end);
        let Some(at) = found.map(|at| from + at).filter(|at| *at <= MAX_LINE) else {
            if self.buffer.len() > MAX_LINE {
                return Err(ProtocolError::TooLong { limit: MAX_LINE });
            }
            self.scanned = self.buffer.len();
            return Ok(None);
        };
        self.scanned = 0;
        Ok(Some(self.buffer.split_to(at + end.len()).freeze().slice(..at)))
    }

    /// Takes `len` bytes and the `end` that must follow them; gives them without it.
    pub(super) fn exactly(
        &mut self,
        len: usize,
        end: &'static [u8],
    ) -> Result<Option<Bytes>, ProtocolError> {
        if len > MAX_VALUE {
            return Err(ProtocolError::TooLarge { len });
        }
        if self.buffer.len() < len + end.len() {
            return Ok(None);
        }
        let data = self.buffer.split_to(len + end.len()).freeze();
        if &data[len..] != end {
            return Err(unexpected("the end of a value", &data[len..]));
        }
        Ok(Some(data.slice(..len)))
    }
}

pub(super) fn unexpected(expected: &'static str, got: &[u8]) -> ProtocolError {
    ProtocolError::Unexpected { expected, got: got[..got.len().min(SHOWN)].to_vec() }
}

/// A decimal number without a sign.
pub(super) fn length(text: &[u8]) -> Option<usize> {
    let digits = text.iter().all(u8::is_ascii_digit) && !text.is_empty();
    digits.then(|| str::from_utf8(text).ok()?.parse().ok()).flatten()
}
