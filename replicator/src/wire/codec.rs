//! Frames: how messages stand in a stream or a datagram.
//!
//! ```text
//!  0      4        5     6      8           16       24      28           32         40
//!  +------+--------+-----+------+-----------+--------+-------+------------+----------+---------
//!  | NILI | version| kind| flags| generation| epoch  | length| head check | checksum | payload
//!  +------+--------+-----+------+-----------+--------+-------+------------+----------+---------
//! ```
//!
//! All numbers are little-endian. The head check covers the 28 bytes before it, so a damaged
//! length is noticed at once and not waited for; the checksum (XXH3-64, seeded with the head
//! check) covers the payload. Nothing is stored before version, kind, flags and length have been
//! found valid. These sums find accidents; TLS below finds intent.

use super::message::{
    Bye, CheckpointEnd, Heartbeat, Hello, Kind, Message, PROTOCOL, Refuse, Welcome,
};
use crate::{Epoch, Generation};
use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// First bytes of each frame.
pub const MAGIC: [u8; 4] = *b"NILI";

/// Bytes before the payload.
pub const HEADER: usize = 40;

/// The one flag there is, valid on CheckpointBegin: the checkpoint builds on none before.
const FULL: u16 = 1;
const PROVISIONAL: u16 = 2;
/// The flags that a kind may have.
fn flags_of(kind: Kind) -> u16 {
    if kind == Kind::CheckpointBegin { FULL | PROVISIONAL } else { 0 }
}

/// The flags of the begin of a checkpoint.
pub(super) fn begin_flags(full: bool, provisional: bool) -> u16 {
    (if full { FULL } else { 0 }) | if provisional { PROVISIONAL } else { 0 }
}

/// What is wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It does not start as a frame does.
    #[error("no frame starts here (found {found:02x?})")]
    Magic {
        /// What stands there.
        found: [u8; 4],
    },
    /// It is of another protocol version.
    #[error("protocol version {found}, this side speaks {PROTOCOL}; install the same release")]
    Version {
        /// What stands there.
        found: u8,
    },
    /// Its kind is unknown.
    #[error("message kind {found} is unknown")]
    Kind {
        /// What stands there.
        found: u8,
    },
    /// Flags are set that its kind does not have.
    #[error("flags {found:#06x} are not valid for {kind:?}")]
    Flags {
        /// The kind.
        kind: Kind,
        /// What stands there.
        found: u16,
    },
    /// It is longer than its kind may be.
    #[error("{kind:?} of {len} bytes, at most {} are allowed", kind.cap())]
    TooLong {
        /// The kind.
        kind: Kind,
        /// The length that it claims.
        len: u32,
    },
    /// The header was damaged.
    #[error("the header's check does not match")]
    HeadCheck,
    /// The payload was damaged.
    #[error("the checksum of {kind:?} does not match")]
    Checksum {
        /// The kind.
        kind: Kind,
    },
    /// The payload does not parse, or has bytes left over.
    #[error("{kind:?} is malformed: {what}")]
    Payload {
        /// The kind.
        kind: Kind,
        /// What about it.
        what: String,
    },
    /// The stream ended within a frame.
    #[error("ends after {have} bytes of a frame")]
    Truncated {
        /// Bytes of it that arrived.
        have: usize,
    },
    /// It has no place where it stands.
    #[error("{kind:?} does not belong here: {why}")]
    OutOfPlace {
        /// The kind.
        kind: Kind,
        /// Why not.
        why: &'static str,
    },
}

/// A stream cannot be decoded any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {fault}")]
pub struct WireError {
    /// Offset in the stream, or in the datagram.
    pub at: u64,
    /// What is wrong there.
    pub fault: Fault,
}

impl WireError {
    pub(super) fn payload(at: u64, kind: Kind, what: impl ToString) -> Self {
        Self { at, fault: Fault::Payload { kind, what: what.to_string() } }
    }
}

/// A message and what its header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Generation of the sender.
    pub generation: Generation,
    /// The epoch that it is about, or [`Epoch::NONE`].
    pub epoch: Epoch,
    /// The message.
    pub message: Message,
    /// Offset of the frame in its stream.
    pub at: u64,
    /// Head check and checksum, from which digests are made.
    pub seal: Seal,
}

/// Head check and checksum of a frame: together they cover all of it.
pub type Seal = [u8; 12];

/// Appends space for a header; the payload goes behind it.
pub(super) fn open(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    start
}

/// Fills the header in that [`open`] made room for; the frame ends where `out` does. Returns
/// its seal.
pub(super) fn close(
    out: &mut [u8],
    start: usize,
    kind: Kind,
    flags: u16,
    generation: Generation,
    epoch: Epoch,
) -> Seal {
    let (head, payload) = out[start..].split_at_mut(HEADER);
    debug_assert!(payload.len() <= kind.cap(), "{kind:?} of {} bytes", payload.len());
    head[..4].copy_from_slice(&MAGIC);
    head[4] = PROTOCOL;
    head[5] = kind as u8;
    head[6..8].copy_from_slice(&flags.to_le_bytes());
    head[8..16].copy_from_slice(&generation.0.to_le_bytes());
    head[16..24].copy_from_slice(&epoch.0.to_le_bytes());
    head[24..28].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let check = xxh3_64(&head[..28]) as u32;
    head[28..32].copy_from_slice(&check.to_le_bytes());
    let sum = xxh3_64_with_seed(payload, check.into());
    head[32..40].copy_from_slice(&sum.to_le_bytes());
    seal_of(head)
}

fn seal_of(head: &[u8]) -> Seal {
    let mut seal = [0; 12];
    seal.copy_from_slice(&head[28..40]);
    seal
}

/// Encodes a message that does not belong to the body of a checkpoint, or does, in a test.
///
/// Fails if it is longer than its kind may be.
pub fn encode(generation: Generation, epoch: Epoch, message: &Message) -> Result<Bytes, WireError> {
    let mut out = Vec::with_capacity(HEADER + 64);
    open(&mut out);
    let mut flags = 0;
    match message {
        Message::Hello(m) => put(&mut out, m),
        Message::Welcome(m) => put(&mut out, m),
        Message::CheckpointBegin { full, provisional, follows } => {
            flags = begin_flags(*full, *provisional);
            out.extend_from_slice(&follows.0.to_le_bytes());
        }
        Message::StateChunk(b)
        | Message::PageChunk(b)
        | Message::VolumeChunk(b)
        | Message::VolumeSeed(b)
        | Message::Input(b) => {
            out.extend_from_slice(b);
        }
        Message::CheckpointEnd(m) => put(&mut out, m),
        Message::Ack { digest } => out.extend_from_slice(&digest.to_le_bytes()),
        Message::Refuse(m) => put(&mut out, m),
        Message::Bye(m) => put(&mut out, m),
        Message::Heartbeat(m) => put(&mut out, m),
    }
    let (kind, len) = (message.kind(), out.len() - HEADER);
    if len > kind.cap() {
        return Err(WireError { at: 0, fault: Fault::TooLong { kind, len: len as u32 } });
    }
    close(&mut out, 0, kind, flags, generation, epoch);
    Ok(out.into())
}

fn put<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    let bytes = postcard::to_allocvec(value).expect("plain data always encodes");
    out.extend_from_slice(&bytes);
}

fn get<T: DeserializeOwned>(at: u64, kind: Kind, payload: &[u8]) -> Result<T, WireError> {
    let (value, rest) =
        postcard::take_from_bytes(payload).map_err(|e| WireError::payload(at, kind, e))?;
    match rest.len() {
        0 => Ok(value),
        n => {
            let left = at + (payload.len() - n) as u64;
            Err(WireError::payload(left, kind, format_args!("{n} bytes are left over")))
        }
    }
}

/// The checked fields of a header.
struct Head {
    kind: Kind,
    flags: u16,
    generation: Generation,
    epoch: Epoch,
    len: usize,
    seal: Seal,
}

impl Head {
    fn parse(at: u64, h: &[u8; HEADER]) -> Result<Self, WireError> {
        let fail = |offset: u64, fault| Err(WireError { at: at + offset, fault });
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|n| h[i + n]));
        let half = |i: usize| u32::from_le_bytes(std::array::from_fn(|n| h[i + n]));
        let magic = std::array::from_fn(|n| h[n]);
        if magic != MAGIC {
            return fail(0, Fault::Magic { found: magic });
        }
        if h[4] != PROTOCOL {
            return fail(4, Fault::Version { found: h[4] });
        }
        if xxh3_64(&h[..28]) as u32 != half(28) {
            return fail(28, Fault::HeadCheck);
        }
        let Some(kind) = Kind::from_wire(h[5]) else {
            return fail(5, Fault::Kind { found: h[5] });
        };
        let flags = u16::from_le_bytes([h[6], h[7]]);
        if flags & !flags_of(kind) != 0 {
            return fail(6, Fault::Flags { kind, found: flags });
        }
        let len = half(24);
        if len as usize > kind.cap() {
            return fail(24, Fault::TooLong { kind, len });
        }
        Ok(Self {
            kind,
            flags,
            generation: Generation(word(8)),
            epoch: Epoch(word(16)),
            len: len as usize,
            seal: seal_of(h),
        })
    }

    fn message(&self, at: u64, payload: Bytes) -> Result<Message, WireError> {
        let kind = self.kind;
        Ok(match kind {
            Kind::Hello => Message::Hello(get::<Hello>(at, kind, &payload)?),
            Kind::Welcome => Message::Welcome(get::<Welcome>(at, kind, &payload)?),
            Kind::CheckpointBegin => {
                let (full, provisional) = (self.flags & FULL != 0, self.flags & PROVISIONAL != 0);
                match <[u8; 8]>::try_from(payload.as_ref()).map(u64::from_le_bytes) {
                    Ok(follows) => {
                        Message::CheckpointBegin { full, provisional, follows: Epoch(follows) }
                    }
                    Err(_) => return Err(WireError::payload(at, kind, "an epoch has 8 bytes")),
                }
            }
            Kind::StateChunk => Message::StateChunk(payload),
            Kind::PageChunk => Message::PageChunk(payload),
            Kind::VolumeChunk => Message::VolumeChunk(payload),
            Kind::VolumeSeed => Message::VolumeSeed(payload),
            Kind::CheckpointEnd => {
                Message::CheckpointEnd(get::<CheckpointEnd>(at, kind, &payload)?)
            }
            Kind::Ack => match <[u8; 8]>::try_from(payload.as_ref()) {
                Ok(d) => Message::Ack { digest: u64::from_le_bytes(d) },
                Err(_) => return Err(WireError::payload(at, kind, "a digest has 8 bytes")),
            },
            Kind::Input => Message::Input(payload),
            Kind::Refuse => Message::Refuse(get::<Refuse>(at, kind, &payload)?),
            Kind::Bye => Message::Bye(get::<Bye>(at, kind, &payload)?),
            Kind::Heartbeat => Message::Heartbeat(get::<Heartbeat>(at, kind, &payload)?),
        })
    }
}

/// Cuts a stream into frames. After an error it gives that error for good.
///
/// It holds at most what was fed since the last frame: feed a bounded piece, take frames out
/// until there is none, feed again; then it is one frame and one piece.
#[derive(Default)]
pub struct Decoder {
    buffer: BytesMut,
    at: u64,
    head: Option<Head>,
    failed: Option<WireError>,
}

impl Decoder {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next frame, if all of it has arrived.
    #[expect(clippy::should_implement_trait, reason = "an iterator would end at None")]
    pub fn next(&mut self) -> Result<Option<Frame>, WireError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        let result = self.step();
        if let Err(e) = &result {
            self.failed = Some(e.clone());
            self.buffer = BytesMut::new();
        }
        result
    }

    fn step(&mut self) -> Result<Option<Frame>, WireError> {
        if self.head.is_none() {
            let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
            let head = Head::parse(self.at, header)?;
            self.buffer.reserve(HEADER + head.len - self.buffer.len().min(HEADER + head.len));
            self.head = Some(head);
        }
        let whole = HEADER + self.head.as_ref().map_or(0, |h| h.len);
        if self.buffer.len() < whole {
            return Ok(None);
        }
        let Some(head) = self.head.take() else { return Ok(None) };
        let payload = self.buffer.split_to(whole).freeze().slice(HEADER..);
        let frame = finish(self.at, head, payload)?;
        self.at += whole as u64;
        Ok(Some(frame))
    }

    /// The stream has ended: an error if it did so within a frame.
    pub fn finish(&mut self) -> Result<(), WireError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        match self.buffer.len() {
            0 => Ok(()),
            have => Err(WireError { at: self.at, fault: Fault::Truncated { have } }),
        }
    }
}

fn finish(at: u64, head: Head, payload: Bytes) -> Result<Frame, WireError> {
    let check = u32::from_le_bytes([head.seal[0], head.seal[1], head.seal[2], head.seal[3]]);
    if xxh3_64_with_seed(&payload, check.into()).to_le_bytes() != head.seal[4..] {
        return Err(WireError { at: at + 32, fault: Fault::Checksum { kind: head.kind } });
    }
    let message = head.message(at + HEADER as u64, payload)?;
    Ok(Frame { generation: head.generation, epoch: head.epoch, message, at, seal: head.seal })
}

/// Decodes a datagram, which is exactly one frame.
pub fn decode_datagram(bytes: &Bytes) -> Result<Frame, WireError> {
    let truncated = WireError { at: 0, fault: Fault::Truncated { have: bytes.len() } };
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Err(truncated) };
    let head = Head::parse(0, header)?;
    let whole = HEADER + head.len;
    if bytes.len() > whole {
        return Err(WireError::payload(whole as u64, head.kind, "bytes are left over"));
    }
    if bytes.len() < whole {
        return Err(truncated);
    }
    finish(0, head, bytes.slice(HEADER..))
}

#[cfg(test)]
mod tests {
    use super::super::message::{RefuseCode, Role};
    use super::*;
    use crate::image::Clocks;

    fn every_message() -> Vec<Message> {
        vec![
            Message::Hello(Hello {
                container: "web".into(),
                host: "alpha".into(),
                role: Role::Primary,
                network: vec![1, 2, 3],
                clocks: Clocks { monotonic: 5, boottime: 6 },
                pulse_port: 40_000,
            }),
            Message::Welcome(Welcome { host: "beta".into(), depth: 4, pulse_port: 40_001 }),
            Message::CheckpointBegin { full: true, provisional: false, follows: Epoch::NONE },
            Message::CheckpointBegin { full: true, provisional: true, follows: Epoch::NONE },
            Message::CheckpointBegin { full: false, provisional: false, follows: Epoch(7) },
            Message::StateChunk(Bytes::from_static(b"state")),
            Message::PageChunk(Bytes::from_static(b"pages")),
            Message::VolumeChunk(Bytes::from_static(b"files")),
            Message::VolumeSeed(Bytes::from_static(b"more of them")),
            Message::CheckpointEnd(CheckpointEnd { digest: u64::MAX, ..Default::default() }),
            Message::Ack { digest: 9 },
            Message::Input(Bytes::from_static(b"in")),
            Message::Refuse(Refuse { code: RefuseCode::Promoted, text: "no".into() }),
            Message::Bye(Bye::Switchover),
            Message::Heartbeat(Heartbeat { role: Role::Backup, progress: 7 }),
        ]
    }

    fn session() -> Vec<u8> {
        let frame = |(i, m)| encode(Generation(3), Epoch(i as u64), m).unwrap();
        every_message().iter().enumerate().flat_map(frame).collect()
    }

    #[test]
    fn messages_come_back_however_the_stream_is_cut() {
        let bytes = session();
        for piece in [1, 7, 40, 41, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for part in bytes.chunks(piece) {
                decoder.feed(part);
                while let Some(f) = decoder.next().unwrap() {
                    assert_eq!((f.generation, f.epoch), (Generation(3), Epoch(got.len() as u64)));
                    got.push(f.message);
                }
            }
            decoder.finish().unwrap();
            assert_eq!(got, every_message());
        }
    }

    /// Frames decoded before the error, and the error.
    fn decode_all(bytes: &[u8]) -> (Vec<Frame>, Result<(), WireError>) {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        let mut frames = Vec::new();
        loop {
            match decoder.next() {
                Ok(Some(f)) => frames.push(f),
                Ok(None) => return (frames, decoder.finish()),
                Err(e) => return (frames, Err(e)),
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_found_in_its_own_frame() {
        let good = session();
        let (frames, end) = decode_all(&good);
        end.unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let (got, end) = decode_all(&bad);
                let e = end.expect_err("damage goes unnoticed");
                let before = frames.iter().filter(|f| f.at <= at as u64).count() - 1;
                assert_eq!(got[..], frames[..before], "byte {at} bit {bit}: {e}");
                assert!(e.at >= frames[before].at);
            }
        }
    }

    #[test]
    fn every_truncation_is_found() {
        let good = session();
        let (frames, _) = decode_all(&good);
        for len in 0..good.len() {
            let (got, end) = decode_all(&good[..len]);
            assert!(frames.starts_with(&got));
            let whole = len == 0 || frames.iter().any(|f| f.at == len as u64);
            assert_eq!(end.is_ok(), whole, "{len} bytes");
        }
    }

    #[test]
    fn a_length_is_checked_before_it_is_believed() {
        let mut out = Vec::new();
        open(&mut out);
        close(&mut out, 0, Kind::Ack, 0, Generation(1), Epoch(1));
        out[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        let check = (xxh3_64(&out[..28]) as u32).to_le_bytes();
        out[28..32].copy_from_slice(&check);
        let (_, end) = decode_all(&out);
        assert!(matches!(end.unwrap_err().fault, Fault::TooLong { kind: Kind::Ack, .. }));
    }

    #[test]
    fn unknown_kinds_versions_and_flags_and_left_over_bytes_are_named() {
        let with = |edit: &dyn Fn(&mut Vec<u8>)| {
            let m = Message::Ack { digest: 1 };
            let mut out = encode(Generation(1), Epoch(1), &m).unwrap().to_vec();
            edit(&mut out);
            let check = xxh3_64(&out[..28]) as u32;
            out[28..32].copy_from_slice(&check.to_le_bytes());
            let sum = xxh3_64_with_seed(&out[HEADER..], check.into());
            out[32..40].copy_from_slice(&sum.to_le_bytes());
            decode_all(&out).1.unwrap_err()
        };
        assert_eq!(with(&|o| o[5] = 0).fault, Fault::Kind { found: 0 });
        assert_eq!(with(&|o| o[5] = 99).to_string(), "at byte 5: message kind 99 is unknown");
        assert_eq!(with(&|o| o[4] = 99).fault, Fault::Version { found: 99 });
        assert_eq!(with(&|o| o[6] = 1).fault, Fault::Flags { kind: Kind::Ack, found: 1 });
        let longer = with(&|o| {
            o.push(0);
            o[24] = 9;
        });
        assert!(matches!(longer.fault, Fault::Payload { kind: Kind::Ack, .. }));
        let bye = with(&|o| {
            o[5] = Kind::Bye as u8;
        });
        assert!(bye.to_string().contains("left over"), "{bye}");
    }

    #[test]
    fn a_datagram_is_exactly_one_frame() {
        let m = Message::Heartbeat(Heartbeat { role: Role::Primary, progress: 1 });
        let good = encode(Generation(1), Epoch(2), &m).unwrap();
        assert_eq!(decode_datagram(&good).unwrap().message, m);
        assert!(decode_datagram(&good.slice(..good.len() - 1)).is_err());
        assert!(decode_datagram(&[&good[..], &[0]].concat().into()).is_err());
    }
}
