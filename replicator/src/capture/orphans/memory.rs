//! The kernel's memory: a program copies ranges of it, and another finds the socket of a
//! connection. Both are run on demand, and share memory with us.
//!
//! ```text
//!  0         requests: address, place, length     ... answered with what the helper says
//!  REQUESTS  what a connection is found by, what was found, the time
//!  HEAD      copies
//! ```

use crate::bpf::asm::{Assembler, If, Size, helper};
use crate::sys::{SysError, SysResult, bpf};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Requests of one run, and bytes of each.
const MOST: usize = 256;
const REQUEST: usize = 16;
const REQUESTS: usize = MOST * REQUEST;
/// struct bpf_sock_tuple and its length.
const TUPLE: usize = REQUESTS;
const TUPLE_LEN: usize = REQUESTS + 40;
/// Address of the socket that was found.
const SOCKET: usize = REQUESTS + 48;
/// Nanoseconds on the monotonic clock after the copies.
const TIME: usize = REQUESTS + 56;
const HEAD: usize = REQUESTS + 64;
/// Copies of one run, and of one request; the verifier is shown it by these bits.
const ROOM: usize = 512 << 10;
const PIECE: usize = 32 << 10;
const PLACES: i32 = ROOM as i32 - 1;
const LENGTHS: i32 = 2 * PIECE as i32 - 1;
/// In a length: the address is in an earlier copy, at the place that the request has for it.
const INDIRECT: i32 = 1 << 30;
const LEN: usize = HEAD + ROOM + 2 * PIECE;
/// Index of the loopback device.
const LOOPBACK: u32 = 1;

/// A range of the kernel's memory: address and bytes.
pub(super) type Range = (u64, usize);

/// Where a copy is from: an address, or one that is in an earlier copy of the same run.
#[derive(Debug)]
enum Source {
    At(u64),
    In(usize),
}

/// Where a copy is from, and its length.
type Request = (Source, usize);

/// The programs, loaded.
#[derive(Debug)]
pub(super) struct Memory {
    shared: bpf::Shared,
    copy: OwnedFd,
    find: OwnedFd,
    /// Of the last run; room for those of the next.
    requests: Vec<Request>,
}

impl Memory {
    pub(super) fn open() -> SysResult<Self> {
        let shared = bpf::Shared::new(LEN)?;
        let map = shared.map().as_raw_fd();
        let copy = bpf::load(&assemble_copy(map))?;
        let find = bpf::load(&assemble_find(map))?;
        Ok(Self { shared, copy, find, requests: Vec::with_capacity(MOST) })
    }

    fn word(&mut self, at: usize) -> u64 {
        u64::from_ne_bytes(self.shared.bytes()[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Copies ranges, in this order and one after the other.
    ///
    /// # Errors
    /// EFAULT: one of them is not there.
    pub(super) fn read(&mut self, ranges: &[Range]) -> SysResult<Vec<u8>> {
        let mut out = Vec::new();
        self.read_into(ranges, &mut out)?;
        Ok(out)
    }

    /// As [`Memory::read`], to memory that is used again; what was in it is gone.
    pub(super) fn read_into(&mut self, ranges: &[Range], out: &mut Vec<u8>) -> SysResult<()> {
        out.clear();
        out.reserve(ranges.iter().map(|r| r.1).sum());
        let mut requests = std::mem::take(&mut self.requests);
        let read = self.read_with(ranges, &mut requests, out);
        self.requests = requests;
        read
    }

    fn read_with(
        &mut self,
        ranges: &[Range],
        requests: &mut Vec<Request>,
        out: &mut Vec<u8>,
    ) -> SysResult<()> {
        let pieces = ranges.iter().flat_map(|&(at, len)| {
            let piece = move |from: usize| (at.wrapping_add(from as u64), (len - from).min(PIECE));
            (0..len).step_by(PIECE).map(piece)
        });
        requests.clear();
        let mut used = 0;
        for (at, len) in pieces {
            if requests.len() == MOST || used + len > ROOM {
                self.copy(requests, out)?;
                requests.clear();
                used = 0;
            }
            requests.push((Source::At(at), len));
            used += len;
        }
        self.copy(requests, out)
    }

    /// Copies so many bytes of each of `count` structures, of which each has the address of the next
    /// in it.
    ///
    /// # Errors
    /// EFAULT: one of them is not there.
    pub(super) fn follow(&mut self, from: Range, next: usize, count: usize) -> SysResult<Vec<u8>> {
        let mut out = Vec::new();
        self.follow_into(from, next, count, &mut out)?;
        Ok(out)
    }

    /// As [`Memory::follow`], to memory that is used again; what was in it is gone.
    pub(super) fn follow_into(
        &mut self,
        (mut at, len): Range,
        next: usize,
        count: usize,
        out: &mut Vec<u8>,
    ) -> SysResult<()> {
        out.clear();
        out.reserve(len * count);
        let mut requests = std::mem::take(&mut self.requests);
        let mut read = Ok(());
        while read.is_ok() && out.len() < len * count {
            let some = (count - out.len() / len).min(MOST).min(ROOM / len);
            let source = |i: usize| match i.checked_sub(1) {
                None => Source::At(at),
                Some(before) => Source::In(before * len + next),
            };
            requests.clear();
            requests.extend((0..some).map(|i| (source(i), len)));
            read = self.copy(&requests, out);
            if read.is_ok() {
                let last = &out[out.len() - len + next..][..8];
                at = u64::from_ne_bytes(last.try_into().expect("eight bytes"));
            }
        }
        self.requests = requests;
        read
    }

    /// One run.
    fn copy(&mut self, requests: &[Request], out: &mut Vec<u8>) -> SysResult<()> {
        let bytes = self.shared.bytes();
        let slots = bytes[..REQUESTS].chunks_exact_mut(REQUEST);
        let mut used = 0;
        for (slot, (source, len)) in slots.zip(requests) {
            let (from, how) = match source {
                Source::At(at) => (*at, 0),
                Source::In(place) => (*place as u64, INDIRECT),
            };
            slot[..8].copy_from_slice(&from.to_ne_bytes());
            slot[8..12].copy_from_slice(&(used as u32).to_ne_bytes());
            slot[12..].copy_from_slice(&(*len as i32 | how).to_ne_bytes());
            used += len;
        }
        if requests.len() < MOST {
            bytes[requests.len() * REQUEST..][..REQUEST].fill(0);
        }
        self.shared.run(self.copy.as_fd(), LOOPBACK)?;
        if (0..requests.len()).any(|i| self.word(i * REQUEST) != 0) {
            let what = "the kernel's memory";
            return Err(SysError::errno("bpf_probe_read_kernel", what, libc::EFAULT));
        }
        out.extend_from_slice(&self.shared.bytes()[HEAD..HEAD + used]);
        Ok(())
    }

    /// When the last range was copied: nanoseconds on the monotonic clock.
    pub(super) fn time(&mut self) -> u64 {
        self.word(TIME)
    }

    /// The address of the TCP socket (struct tcp_sock) of a connection in the calling thread's
    /// network namespace. It may be gone at any time, and its memory another's.
    pub(super) fn find(&mut self, local: SocketAddr, remote: SocketAddr) -> SysResult<Option<u64>> {
        let Some(tuple) = tuple(local, remote) else { return Ok(None) };
        let bytes = self.shared.bytes();
        bytes[TUPLE..TUPLE + tuple.len()].copy_from_slice(&tuple);
        bytes[TUPLE_LEN..TUPLE_LEN + 4].copy_from_slice(&(tuple.len() as u32).to_ne_bytes());
        if let Some(at) = self.find_at(LOOPBACK)? {
            return Ok(Some(at));
        }
        // A socket that is bound to a device is found by way of that device only.
        let devices = nix::net::if_::if_nameindex()
            .map_err(|e| SysError::errno("if_nameindex", "the network namespace", e as i32))?;
        for device in devices.iter().map(|d| d.index()).filter(|i| *i != LOOPBACK) {
            if let Some(at) = self.find_at(device)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    fn find_at(&mut self, device: u32) -> SysResult<Option<u64>> {
        self.shared.run(self.find.as_fd(), device)?;
        let at = self.word(SOCKET);
        Ok((at != 0).then_some(at))
    }
}

/// struct bpf_sock_tuple of a segment that arrives. A socket of IPv6 that speaks to an address of
/// IPv4 is found by that one.
fn tuple(local: SocketAddr, remote: SocketAddr) -> Option<Vec<u8>> {
    let mut tuple = Vec::with_capacity(36);
    match (remote.ip().to_canonical(), local.ip().to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => tuple.extend([a, b].iter().flat_map(|ip| ip.octets())),
        (IpAddr::V6(a), IpAddr::V6(b)) => tuple.extend([a, b].iter().flat_map(|ip| ip.octets())),
        _ => return None,
    }
    tuple.extend([remote.port(), local.port()].iter().flat_map(|p| p.to_be_bytes()));
    Some(tuple)
}

/// Register 6 is the shared memory, 7 the number of requests so far, 8 the request, 9 its length.
fn assemble_copy(map: i32) -> Vec<u8> {
    let mut a = Assembler::default();
    a.map_value(6, map);
    a.set(7, 0);
    a.mov(8, 6);
    a.label("next");
    a.load(Size::Word, 9, 8, 12);
    a.jump(If::Equal, 9, 0, "done");
    a.load(Size::Double, 3, 8, 0);
    a.jump(If::AnyBit, 9, INDIRECT, "indirect");
    a.label("copy");
    a.load(Size::Word, 1, 8, 8);
    a.mask(1, PLACES);
    a.add_reg(1, 6);
    a.add(1, HEAD as i32);
    a.mov(2, 9);
    a.mask(2, LENGTHS);
    a.call(helper::PROBE_READ);
    a.store(Size::Double, 8, 0, 0);
    a.add(8, REQUEST as i32);
    a.add(7, 1);
    a.jump(If::NotEqual, 7, MOST as i32, "next");
    a.label("done");
    a.call(helper::KTIME);
    a.store(Size::Double, 6, TIME as i16, 0);
    a.leave(0);
    a.label("indirect");
    a.mask(3, PLACES);
    a.add_reg(3, 6);
    a.load(Size::Double, 3, 3, HEAD as i16);
    a.jump(If::Always, 0, 0, "copy");
    a.finish()
}

/// Register 6 is the shared memory, 8 the socket.
fn assemble_find(map: i32) -> Vec<u8> {
    let mut a = Assembler::default();
    a.mov(7, 1);
    a.map_value(6, map);
    a.store_value(Size::Double, 6, SOCKET as i16, 0);
    a.mov(1, 7);
    a.mov(2, 6);
    a.add(2, TUPLE as i32);
    a.set(3, 12);
    a.load(Size::Word, 4, 6, TUPLE_LEN as i16);
    a.jump(If::Equal, 4, 12, "look up");
    a.set(3, 36);
    a.label("look up");
    a.set(4, -1); // BPF_F_CURRENT_NETNS
    a.set(5, 0);
    a.call(helper::LOOKUP_TCP);
    a.jump(If::Equal, 0, 0, "none");
    a.mov(8, 0);
    a.mov(1, 8);
    a.call(helper::TO_TCP_SOCK);
    a.jump(If::Equal, 0, 0, "release");
    a.store(Size::Double, 6, SOCKET as i16, 0);
    a.label("release");
    a.mov(1, 8);
    a.call(helper::RELEASE);
    a.label("none");
    a.leave(0);
    a.finish()
}
