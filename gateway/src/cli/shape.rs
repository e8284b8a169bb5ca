//! A program of any shape: as much memory, as many threads, processes and mappings as it is told,
//! that writes a number of pages for each byte that it is sent, and answers. What a stop costs is
//! measured on it, one property at a time.
//!
//! The answer to a byte is the same byte. Pages are written in an order that visits all of them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use memmap2::MmapMut;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use clap::Args;
use netns_tools::topology::Size;

const PAGE: usize = 4096;
/// Small, so that only their number matters.
const MAPPING: usize = 4 * PAGE;
/// Step from page to page: odd, so that it visits all pages where their number is a power of two,
/// and most otherwise.
const STRIDE: usize = 7919;

/// `__shape`.
#[derive(Debug, Args)]
pub(super) struct ShapeArgs {
    /// Bytes of data.
    #[arg(long, default_value = "1MB")]
    pub(super) memory: Size,
    /// Pages that are written for each byte that it is sent.
    #[arg(long, default_value_t = 0)]
    pub(super) dirty: usize,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    pub(super) threads: usize,
    /// Processes.
    #[arg(long, default_value_t = 1)]
    pub(super) processes: usize,
    /// Mappings besides.
    #[arg(long, default_value_t = 0)]
    pub(super) mappings: usize,
    /// Where it listens.
    #[arg(long, default_value = "0.0.0.0:6379")]
    pub(super) listen: std::net::SocketAddr,
    /// Does nothing, for ever.
    #[arg(long)]
    pub(super) idle: bool,
}

/// `nilicon __shape`.
pub(super) fn shape(args: &ShapeArgs) -> Result<()> {
    if args.idle {
        loop {
            std::thread::park();
        }
    }
    let pages = (args.memory.0 as usize).div_ceil(PAGE).max(1);
    let mut memory = MmapMut::map_anon(pages * PAGE).context("the memory")?;
    let mut random = fastrand::Rng::with_seed(1);
    for page in memory.chunks_exact_mut(PAGE) {
        // A pattern that is not all zero, and is quick to make.
        page[..64].iter_mut().for_each(|byte| *byte = random.u8(..));
    }
    // Neighbours of one kind would become one mapping.
    let mut mappings = Vec::with_capacity(args.mappings);
    for index in 0..args.mappings {
        let mut mapping = MmapMut::map_anon(MAPPING).context("a mapping")?;
        mapping[0] = 1;
        mappings.push(match index % 2 {
            0 => Ok(mapping),
            _ => Err(mapping.make_read_only().context("a mapping that is only read")?),
        });
    }
    for _ in 1..args.threads {
        std::thread::Builder::new().stack_size(64 << 10).spawn(|| {
            loop {
                std::thread::park();
            }
        })?;
    }
    let program = std::env::current_exe()?;
    for _ in 1..args.processes {
        Command::new(&program)
            .args(["__shape", "--idle"])
            .stdin(Stdio::null())
            .spawn()
            .context("one more process")?;
    }
    serve(TcpListener::bind(args.listen)?, &mut memory, args.dirty)
}

/// What an event of the listener says.
const LISTENER: u64 = u64::MAX;

/// Waits with epoll(7), as servers of many connections do: what waits with poll(2) takes itself off the queue of each
/// connection whenever it is stopped.
fn serve(listener: TcpListener, memory: &mut [u8], dirty: usize) -> Result<()> {
    let pages = memory.len() / PAGE;
    let (mut next, mut count, mut accepted) = (0_usize, 0_u8, 0_u64);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let readable = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
    epoll.add(&listener, readable(LISTENER))?;
    let mut connections: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        for event in &events[..ready] {
            if event.data() == LISTENER {
                let (connection, _) = listener.accept()?;
                connection.set_nodelay(true)?;
                epoll.add(&connection, readable(accepted))?;
                connections.insert(accepted, connection);
                accepted += 1;
                continue;
            }
            let Some(connection) = connections.get_mut(&event.data()) else { continue };
            let mut byte = [0];
            if !matches!(connection.read(&mut byte), Ok(1)) {
                connections.remove(&event.data());
                continue;
            }
            count = count.wrapping_add(1);
            for _ in 0..dirty {
                memory[next * PAGE + PAGE / 2] ^= count | 1;
                next = (next + STRIDE) % pages;
            }
            if connection.write_all(&byte).is_err() {
                connections.remove(&event.data());
            }
        }
    }
}
