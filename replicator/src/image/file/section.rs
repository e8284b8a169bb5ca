//! The frame around each section of an image.
//!
//! ```text
//!  0      4      6         8       12       16           20         28
//!  +------+------+---------+-------+--------+------------+----------+---------
//!  | NISC | kind | version | index | length | head check | checksum | payload
//!  +------+------+---------+-------+--------+------------+----------+---------
//! ```
//! Little-endian. The head check covers the 16 bytes before it, so a damaged length is noticed
//! before it is believed; the checksum (XXH3-64, seeded with the head check) covers the payload.
//! `index` counts the sections of a file from 0. These sums find accidents, not intent.

use std::io::{self, Read};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// First bytes of a section.
pub const MAGIC: [u8; 4] = *b"NISC";
/// Bytes before the payload.
pub const HEAD: usize = 28;
/// Memory set aside for a payload before its bytes are there.
const AHEAD: usize = 1 << 20;

/// What a section holds. 0 is no kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// [`Info`](crate::image::info::Info)
    Info = 1,
    /// [`State`](crate::image::State) without processes.
    Objects = 2,
    /// One [`Process`](crate::image::Process).
    Process = 3,
    /// Pages of one process.
    Pages = 4,
    /// Counts and digest.
    End = 5,
}

impl Kind {
    /// By its number in a file.
    pub fn from_file(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Info,
            2 => Self::Objects,
            3 => Self::Process,
            4 => Self::Pages,
            5 => Self::End,
            _ => return None,
        })
    }

    /// The version of its payload that this release writes and reads.
    pub fn version(self) -> u16 {
        1
    }

    /// Most bytes that a payload may have.
    pub fn cap(self) -> usize {
        match self {
            Self::Info => 1 << 20,
            Self::Objects => 256 << 20,
            Self::Process => 64 << 20,
            Self::Pages => super::PAGES_IN_SECTION + (1 << 20),
            Self::End => 64,
        }
    }
}

/// Why a file is no image, or a damaged one.
#[derive(Debug, thiserror::Error)]
#[error("at byte {at}: {fault}")]
pub struct FileError {
    /// Offset in the file.
    pub at: u64,
    /// What is wrong there.
    pub fault: Fault,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file does not begin as an image does.
    #[error("this is no image of nilicon")]
    NoImage,
    /// Another format.
    #[error("the image has format {found}, this release reads {}", super::FORMAT)]
    Format {
        /// What it has.
        found: u32,
    },
    /// The header of the file was damaged.
    #[error("the file's header is damaged")]
    Header,
    /// No section starts here.
    #[error("no section starts here (found {found:02x?})")]
    Magic {
        /// What stands there.
        found: [u8; 4],
    },
    /// The head of a section was damaged.
    #[error("the head of section {index} is damaged")]
    HeadCheck {
        /// Its place in the file.
        index: u32,
    },
    /// A kind that this release does not know.
    #[error("section {index} is of the unknown kind {found}; was it written by a newer release?")]
    Unknown {
        /// Its place.
        index: u32,
        /// The kind.
        found: u16,
    },
    /// A version that this release does not know.
    #[error("section {index} ({kind:?}) has version {found}, this release reads {}", kind.version())]
    Version {
        /// Its place.
        index: u32,
        /// Its kind.
        kind: Kind,
        /// Its version.
        found: u16,
    },
    /// Longer than its kind may be.
    #[error("section {index} ({kind:?}) claims {len} bytes, at most {} are allowed", kind.cap())]
    TooLong {
        /// Its place.
        index: u32,
        /// Its kind.
        kind: Kind,
        /// The length that it claims.
        len: u32,
    },
    /// The file ends within it.
    #[error("the file ends within section {index} ({what})")]
    Truncated {
        /// Its place.
        index: u32,
        /// Its kind, or what part.
        what: String,
    },
    /// Its payload was damaged.
    #[error("the contents of section {index} ({kind:?}) are damaged")]
    Checksum {
        /// Its place.
        index: u32,
        /// Its kind.
        kind: Kind,
    },
    /// Its payload does not parse, or has bytes left over.
    #[error("section {index} ({kind:?}) is malformed: {what}")]
    Payload {
        /// Its place.
        index: u32,
        /// Its kind.
        kind: Kind,
        /// What about it.
        what: String,
    },
    /// It is doubled, or not where it belongs.
    #[error("section {index} ({kind:?}) does not belong here: {why}")]
    OutOfPlace {
        /// Its place.
        index: u32,
        /// Its kind.
        kind: Kind,
        /// Why.
        why: String,
    },
    /// It is not there.
    #[error("section {kind:?} is missing ({why})")]
    Missing {
        /// Its kind.
        kind: Kind,
        /// What stands there instead.
        why: String,
    },
    /// Bytes behind the last section.
    #[error("bytes are left over behind the last section")]
    LeftOver,
    /// All sections are sound, but not those that were written together.
    #[error("the digest over the whole file does not match")]
    Digest,
    /// The disk failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl FileError {
    pub(super) fn new(at: u64, fault: Fault) -> Self {
        Self { at, fault }
    }
}

/// Puts head and payload of a section behind each other.
pub fn encode(out: &mut Vec<u8>, kind: Kind, index: u32, payload: &[u8]) {
    debug_assert!(payload.len() <= kind.cap(), "{kind:?} of {} bytes", payload.len());
    let start = out.len();
    out.extend(MAGIC);
    out.extend((kind as u16).to_le_bytes());
    out.extend(kind.version().to_le_bytes());
    out.extend(index.to_le_bytes());
    out.extend((payload.len() as u32).to_le_bytes());
    let check = xxh3_64(&out[start..]) as u32;
    out.extend(check.to_le_bytes());
    out.extend(xxh3_64_with_seed(payload, check.into()).to_le_bytes());
    out.extend_from_slice(payload);
}

/// Reads the section with this index, which starts at `at`, into `raw`: head and payload. None at
/// the end of the file.
pub fn read(
    source: &mut impl Read,
    at: u64,
    index: u32,
    raw: &mut Vec<u8>,
) -> Result<Option<Kind>, FileError> {
    let fail = |offset: u64, fault| Err(FileError::new(at + offset, fault));
    raw.clear();
    take(source, HEAD, raw).map_err(|e| FileError::new(at, e.into()))?;
    if raw.is_empty() {
        return Ok(None);
    }
    if raw.len() < HEAD {
        return fail(raw.len() as u64, Fault::Truncated { index, what: "its head".into() });
    }
    let half = |i: usize| u16::from_le_bytes([raw[i], raw[i + 1]]);
    let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|n| raw[i + n]));
    let magic: [u8; 4] = std::array::from_fn(|n| raw[n]);
    if magic != MAGIC {
        return fail(0, Fault::Magic { found: magic });
    }
    let check = word(16);
    if xxh3_64(&raw[..16]) as u32 != check {
        return fail(16, Fault::HeadCheck { index });
    }
    let Some(kind) = Kind::from_file(half(4)) else {
        return fail(4, Fault::Unknown { index, found: half(4) });
    };
    if half(6) != kind.version() {
        return fail(6, Fault::Version { index, kind, found: half(6) });
    }
    if word(8) != index {
        let why = format!("it was section {} of its file", word(8));
        return fail(8, Fault::OutOfPlace { index, kind, why });
    }
    let len = word(12);
    if len as usize > kind.cap() {
        return fail(12, Fault::TooLong { index, kind, len });
    }
    let sum = u64::from_le_bytes(std::array::from_fn(|n| raw[20 + n]));
    take(source, len as usize, raw).map_err(|e| FileError::new(at, e.into()))?;
    if raw.len() < HEAD + len as usize {
        return fail(raw.len() as u64, Fault::Truncated { index, what: format!("{kind:?}") });
    }
    if xxh3_64_with_seed(&raw[HEAD..], check.into()) != sum {
        return fail(20, Fault::Checksum { index, kind });
    }
    Ok(Some(kind))
}

/// Appends up to `len` bytes; memory follows what is there and not what is claimed.
fn take(source: &mut impl Read, len: usize, out: &mut Vec<u8>) -> io::Result<()> {
    out.reserve(len.min(AHEAD));
    source.take(len as u64).read_to_end(out).map(drop)
}
