//! Closed connections that have still something to send: a program writes much and closes, and its
//! kernel sends the rest by itself. No descriptor names such a socket, so no system call tells its
//! bytes; they are read from the kernel's memory.
//!
//! ```text
//!  addresses --> the socket --> its queues (list, tree) --> entries --> pages --> bytes
//!     a program for packets      programs that copy ranges of the kernel's memory
//! ```
//! Where fields lie is read from the kernel's BTF; the walk is made here, from outside, and nothing of
//! the kernel's is locked or changed.

mod memory;
mod pages;
mod queue;

use super::glance::{Tcp, TcpLayout};
use super::tcp::synchronized;
use crate::bpf::btf::{Btf, Member};
use crate::image::net::{SocketOptions, TcpConnection, TcpState};
use crate::sys::{SysError, SysResult};
use memory::Memory;
use pages::Pages;
pub(super) use queue::still::Still;
use queue::still::{Access, Reader};
use queue::{Places, changing};
use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;

/// How often a socket is looked at that changes all the time.
const TRIES: usize = 20;

/// What is the same as long as the kernel runs.
#[derive(Debug)]
struct Kernel {
    tcp: TcpLayout,
    /// Of a struct tcp_sock: the socket of the program.
    owner: Member,
    /// Of a struct tcp_congestion_ops: its name.
    name: Member,
    places: Places,
    pages: Pages,
}

impl Kernel {
    fn look(memory: &mut Memory) -> SysResult<Self> {
        let failed = |source| SysError {
            call: "look for fields of the kernel's structures",
            object: "closed connections".into(),
            source,
        };
        let btf = Btf::of_kernel().map_err(failed)?;
        let of = |name, path| -> io::Result<Member> { btf.member(btf.structure(name)?, path) };
        let places = Places::new(&btf).map_err(failed)?;
        Ok(Self {
            tcp: TcpLayout::new(&btf).map_err(failed)?,
            owner: of("tcp_sock", "inet_conn.icsk_inet.sk.sk_socket").map_err(failed)?,
            name: of("tcp_congestion_ops", "name").map_err(failed)?,
            pages: Pages::find(memory, &btf, &places)?,
            places,
        })
    }
}

/// Reads what closed sockets have still to send.
#[derive(Debug)]
pub struct Orphans {
    memory: Memory,
    kernel: &'static Kernel,
    reader: Reader,
}

impl Orphans {
    /// None: this kernel cannot do it.
    pub fn open() -> Option<Self> {
        static KERNEL: OnceLock<Option<Kernel>> = OnceLock::new();
        let tell = |error: SysError| {
            tracing::info!(%error, "what closed connections have still to send is not read");
        };
        let mut memory = Memory::open();
        let look = || match &mut memory {
            Ok(memory) => Kernel::look(memory).map_err(tell).ok(),
            Err(_) => None,
        };
        let kernel = KERNEL.get_or_init(look).as_ref();
        match memory {
            Ok(memory) => Some(Self { memory, kernel: kernel?, reader: Reader::default() }),
            Err(error) => {
                tell(error);
                None
            }
        }
    }

    /// The connection with these addresses, if it is one that the program has closed and whose peer
    /// has not acknowledged all of it. To be called in the network namespace of the container.
    ///
    /// None: there is no such connection, or the program has it open still, or the peer has everything
    /// and knows that it was all.
    ///
    /// # Errors
    /// EAGAIN: it changed all the time while it was read; that can be tried again. EFBIG: it has more
    /// than 8 MiB to send.
    pub fn find(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> SysResult<Option<TcpConnection>> {
        let mut error = None;
        for _ in 0..TRIES {
            let Some(at) = self.memory.find(local, remote)? else { return Ok(None) };
            match self.read(at, [local, remote]) {
                Err(e) if e.code() == libc::EAGAIN => error = Some(e),
                // Its memory went away meanwhile, if not each time.
                Err(e) if e.code() == libc::EFAULT => error = error.or(Some(e)),
                other => return other,
            }
        }
        Err(error.unwrap_or_else(changing))
    }

    /// Reads send queues of sockets that nobody changes: those of a container that stands still and gets no input. Tells
    /// the bytes of each, by its place among those that are asked for, if they could be read.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn still(
        &mut self,
        queues: &[Still],
        tell: impl FnMut(usize, &[u8]),
    ) -> SysResult<()> {
        let Self { memory, kernel: Kernel { places, pages, .. }, reader } = self;
        reader.read(Access { memory, places, pages }, queues, tell)
    }

    /// The same while the container runs: as much of each queue as can be counted on, and the sequence number of its first byte.
    ///
    /// # Errors
    /// The kernel refuses, or a socket is gone.
    pub(super) fn moving(
        &mut self,
        queues: &[Still],
        tell: impl FnMut(usize, u32, &[u8]),
    ) -> SysResult<()> {
        let Self { memory, kernel: Kernel { places, pages, .. }, reader } = self;
        reader.read_moving(Access { memory, places, pages }, queues, tell)
    }

    fn read(&mut self, at: u64, asked: [SocketAddr; 2]) -> SysResult<Option<TcpConnection>> {
        let Kernel { tcp, owner, name, places, pages } = self.kernel;
        let socket = self.memory.read(&[places.socket(at)])?;
        let record = tcp.record(&socket);
        let before = tcp.show(&record, self.memory.time());
        // Others, if it is a listener, or the connection has ended since it was found.
        let others = before.addresses().map(plain) != asked.map(plain);
        if others || owner.value(&socket) != 0 || closing(&before).is_none() {
            return Ok(None);
        }
        let unsent = queue::read(&mut self.memory, places, pages, at, &socket)?;
        let time = self.memory.time();
        let name_at = (before.congestion().wrapping_add(name.offset as u64), name.size);
        let congestion = self.memory.read(&[name_at])?;
        let now = tcp.record(&unsent.socket);
        let seen = tcp.show(&now, time);
        if !seen.is_of(&record) {
            return Err(changing());
        }
        let Some(state) = closing(&seen) else { return Ok(None) };
        if !unsent.fin {
            return Err(changing());
        }
        let end = congestion.iter().position(|b| *b == 0).unwrap_or(congestion.len());
        let options = SocketOptions {
            buffers: seen.buffers(),
            no_delay: seen.delays().0,
            congestion: String::from_utf8_lossy(&congestion[..end]).into_owned(),
            ..SocketOptions::default()
        };
        let [local, remote] = seen.addresses();
        Ok(Some(TcpConnection {
            local,
            remote,
            state,
            // Without the FIN.
            write_seq: seen.sent().0.wrapping_sub(1),
            rcv_nxt: seen.received().0,
            send_queue: unsent.bytes,
            receive_queue: Vec::new(),
            window: seen.window(),
            mss: seen.peer_segment(),
            sack: seen.sack(),
            window_scale: seen.scales(),
            timestamp: seen.timestamp(),
            options,
            shut_read: false,
            error: false,
        }))
    }
}

/// Its state, if our FIN is under way.
fn closing(seen: &Tcp<'_>) -> Option<TcpState> {
    let (write_seq, una) = seen.sent();
    let waits = |state: &TcpState| {
        let sent = matches!(state, TcpState::FinWait1 | TcpState::Closing | TcpState::LastAck);
        sent && una != write_seq
    };
    synchronized(seen.state()).filter(waits)
}

/// An address as it is compared: IPv4 within IPv6 is IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
