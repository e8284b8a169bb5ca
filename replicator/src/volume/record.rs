//! What a checkpoint says of a volume, and how it is written down.
//!
//! A sequence of records, each with its length in front. The last record about a thing wins.

use super::{Attributes, Ino, Shape};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;

/// A file with everything but its names and contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub shape: Shape,
    /// Mode, owner, size, times.
    pub attributes: Attributes,
    /// Extended attributes in order of name, ours not among them.
    pub xattrs: Vec<(OsString, Vec<u8>)>,
}

/// Bytes, written down in one piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&[u8]>::deserialize(deserializer).map(|bytes| Self(bytes.to_vec()))
    }
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// What follows is about all files: what it does not name is not there. The first record of its volume.
    Whole {
        /// Contents of files have come ahead of it ([`super::Journals::seed`]).
        seeded: bool,
    },
    /// A file is new or has changed.
    Node(Box<Node>),
    /// What an entry of a directory refers to now.
    Entry {
        /// The directory.
        parent: Ino,
        /// The name in it.
        name: OsString,
        /// The file; none: there is no such entry.
        target: Option<Ino>,
    },
    /// Bytes of a file. Where they reach beyond its size in [`Record::Node`], the size wins.
    Data {
        /// The file.
        ino: Ino,
        /// Offset in it.
        offset: u64,
        /// Its bytes there.
        bytes: Blob,
    },
    /// A range of a file that reads as zeros.
    Hole {
        /// The file.
        ino: Ino,
        /// Offset in it.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// The file is no more: it has no name and nobody has it open.
    Gone(Ino),
}

/// Why bytes are no records.
#[derive(Debug, thiserror::Error)]
#[error("no record at byte {at}: {why}")]
pub(super) struct RecordError {
    at: usize,
    why: String,
}

impl Record {
    /// Appends it to `out`.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        // Writing to a vector does not fail, and all that a record holds can be encoded.
        let filled = postcard::to_extend(self, std::mem::take(out)).unwrap_or_default();
        *out = filled;
        let len = (out.len() - at - 4) as u32;
        out[at..at + 4].copy_from_slice(&len.to_le_bytes());
    }

    /// The first record in `bytes`, if there is one.
    pub(super) fn first(bytes: &[u8]) -> Option<Record> {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let body = rest.get(..u32::from_le_bytes(*len) as usize)?;
        postcard::from_bytes(body).ok()
    }

    /// All records in `bytes`.
    pub(super) fn decode_all(bytes: &[u8]) -> Result<Vec<Record>, RecordError> {
        let mut all = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let error = |why: String| RecordError { at, why };
            let (len, rest) =
                bytes[at..].split_first_chunk::<4>().ok_or_else(|| error("cut short".into()))?;
            let len = u32::from_le_bytes(*len) as usize;
            let body = rest.get(..len).ok_or_else(|| error("cut short".into()))?;
            match postcard::take_from_bytes(body) {
                Ok((record, [])) => all.push(record),
                Ok((_, left)) => return Err(error(format!("{} bytes are left over", left.len()))),
                Err(e) => return Err(error(e.to_string())),
            }
            at += 4 + len;
        }
        Ok(all)
    }
}
