//! Where the bytes of a page are, of which the address of its struct page is known.
//!
//! The kernel maps all memory once, and has the struct pages of all memory in one row: the address of
//! the bytes is the address of the struct page times 64 (4096 bytes by 64) and a constant. No file tells
//! the constant, but both rows begin at a multiple of 1 GiB, so a socket whose bytes are known is looked
//! for at each of a few places.

use super::memory::Memory;
use super::queue::{self, Places};
use crate::bpf::btf::Btf;
use crate::sys::{SysError, SysResult, loopback, sockopt};
use nix::sched::{CloneFlags, unshare};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

const GIB: u64 = 1 << 30;
/// Bytes of a struct page.
const PAGE: u64 = 64;
/// What is written to a socket, of which a part fits into the window of the other.
const WRITTEN: usize = 128 << 10;
const WINDOW: i32 = 4096;

/// How addresses of struct pages and of bytes belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    constant: u64,
}

impl Pages {
    /// The address of the bytes of a page. None: it is no page.
    pub(super) fn address(&self, page: u64) -> Option<u64> {
        let scale = 4096 / PAGE;
        page.is_multiple_of(PAGE).then(|| page.wrapping_mul(scale).wrapping_add(self.constant))
    }

    /// Finds the constant by means of a socket, and looks whether it holds for another.
    pub(super) fn find(memory: &mut Memory, btf: &Btf, places: &Places) -> SysResult<Self> {
        let failed = |source| SysError { call: "look for pages", object: "memory".into(), source };
        let size = btf.size_of("page").map_err(failed)?;
        if size as u64 != PAGE || !cfg!(target_arch = "x86_64") {
            return Err(failed(io::Error::other(format!("{size} bytes for a page"))));
        }
        let inside = || {
            // A network of its own: that of the agent may have no loopback, or filters.
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|e| SysError::errno("unshare", "network", e as i32))?;
            let first = Known::new(WRITTEN).map_err(failed)?;
            let pages = first.search(memory, places)?;
            Known::new(WRITTEN).map_err(failed)?.check(memory, places, pages)?;
            Ok(pages)
        };
        std::thread::scope(|scope| scope.spawn(inside).join().expect("no panic"))
    }
}

/// A connection with bytes that we know in its send queue.
pub(super) struct Known {
    pub(super) written: Vec<u8>,
    stream: TcpStream,
    /// It holds the other end, which reads nothing.
    _listener: TcpListener,
}

impl Known {
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let set = |fd, name, value| {
            sockopt::set_i32(fd, libc::SOL_SOCKET, name, value).map_err(|e| e.source)
        };
        loopback::up(listener.as_fd()).map_err(|e| e.source)?;
        set(listener.as_fd(), libc::SO_RCVBUF, WINDOW)?;
        let to = (Ipv4Addr::LOCALHOST, listener.local_addr()?.port());
        let mut stream = TcpStream::connect(to)?;
        set(stream.as_fd(), libc::SO_SNDBUFFORCE, 4 * WRITTEN.max(len) as i32)?;
        stream.set_nonblocking(true)?;
        let written: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(len).collect();
        stream.write_all(&written)?;
        Ok(Self { written, stream, _listener: listener })
    }

    fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.stream.local_addr()?, self.stream.peer_addr()?))
    }

    /// The address of its socket, and the bytes of that.
    pub(super) fn socket(&self, memory: &mut Memory, places: &Places) -> SysResult<(u64, Vec<u8>)> {
        let object = || "a connection of our own".to_owned();
        let failed = |source| SysError { call: "find", object: object(), source };
        let (local, remote) = self.addresses().map_err(failed)?;
        let at = memory.find(local, remote)?;
        let at = at.ok_or_else(|| SysError::errno("find", object(), libc::ENOTCONN))?;
        Ok((at, memory.read(&[places.socket(at)])?))
    }

    fn search(&self, memory: &mut Memory, places: &Places) -> SysResult<Pages> {
        let (at, socket) = self.socket(memory, places)?;
        let entries = queue::entries(memory, places, at, &socket)?;
        let none = || SysError::errno("look for pages", "memory", libc::ENOENT);
        // The last bytes that were written are the last of the queue.
        let last = entries.iter().max_by_key(|e| e.place_in(places.sent(&socket).1));
        let fragment = last.and_then(|e| e.fragments.last()).ok_or_else(none)?;
        let bytes = &self.written[self.written.len() - fragment.len.min(self.written.len())..];
        let scaled = fragment.page.wrapping_mul(4096 / PAGE);
        for far in 0..=memory_gib() {
            for distance in [far.wrapping_mul(GIB), far.wrapping_neg().wrapping_mul(GIB)] {
                // Both are mapped in the same row.
                let start = (at & !(GIB - 1)).wrapping_add(distance).wrapping_add(scaled % GIB);
                let there = memory.read(&[(start + fragment.offset as u64, bytes.len())]);
                if there.is_ok_and(|there| there == bytes) {
                    return Ok(Pages { constant: start.wrapping_sub(scaled) });
                }
            }
        }
        Err(none())
    }

    fn check(&self, memory: &mut Memory, places: &Places, pages: Pages) -> SysResult<()> {
        let (at, socket) = self.socket(memory, places)?;
        let read = queue::read(memory, places, &pages, at, &socket)?;
        let expected = self.written.ends_with(&read.bytes) && read.bytes.len() > WRITTEN / 2;
        let wrong = || SysError::errno("look for pages", "memory", libc::EILSEQ);
        expected.then_some(()).ok_or_else(wrong)
    }
}

/// Up to where memory reaches, in GiB.
fn memory_gib() -> u64 {
    // 00100000-bfffffff : System RAM
    let text = std::fs::read_to_string("/proc/iomem").unwrap_or_default();
    let end = |line: &str| {
        let range = line.strip_suffix(" : System RAM")?.trim();
        u64::from_str_radix(range.split_once('-')?.1, 16).ok()
    };
    text.lines().filter_map(end).max().unwrap_or(0) / GIB + 1
}
