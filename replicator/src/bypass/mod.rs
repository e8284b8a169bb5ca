//! A way around the gate, in the kernel, for connections that need none: while nobody holds output, segments
//! of connections that the container has accepted go from its device to its clients', and back, without a
//! process that reads and writes them.
//!
//! ```text
//!  container's namespace                                     host's namespace
//!   eth0 ── egress ── known? ──► cable ═══════════ cable ── ingress ──► arrives at the port to the clients
//!   eth0 ◄── arrives ── ingress ── cable ═════════ cable ◄── known? ── egress ── the port
//! ```
//! Four small programs do it, tied to the two devices and to the two ends of a veth (the cable). What they do
//! not know goes on to the gate: whatever is no TCP, and the first and last segments of connections, whose
//! connection is forgotten by that. So nobody who follows how connections begin and end misses anything.
//!
//! Invariant: once [`Bypass::close`] has returned, no frame is on its way by it, in no queue of the kernel, and
//! none will be.

mod program;

use crate::sys::bpf::{self, Words};
use crate::sys::{SysError, SysResult, grace};
use nix::sched::{CloneFlags, unshare};
use program::{From, key};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

/// Most connections that are known at a time; of more, those that were used least lately go through the gate.
pub const MAX: u32 = 1 << 14;
/// Longest wait for the queues between devices. They empty within microseconds, unless a processor has no time
/// for its packets at all.
const PATIENCE: Duration = Duration::from_secs(2);

/// Devices on one side, by their indices in that side's network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// What the gate reads and writes the other end of.
    pub device: u32,
    /// The cable's end.
    pub cable: u32,
}

/// Frames that went by a bypass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bypassed {
    /// From the container.
    pub out_frames: u64,
    /// From its clients.
    pub in_frames: u64,
}

/// One side's programs at work.
#[derive(Debug)]
struct Tied {
    deciding: OwnedFd,
    arriving: OwnedFd,
}

/// The programs and what they know. Dropping it without [`Bypass::close`] ends their work as well, but leaves
/// what is on its way to itself.
#[derive(Debug)]
pub struct Bypass {
    flows: OwnedFd,
    words: Words,
    tied: Vec<Tied>,
}

impl Bypass {
    /// A bypass that is closed and knows no connection. Its programs have to be tied to both sides before it
    /// carries anything.
    ///
    /// # Errors
    /// The kernel refuses: CAP_BPF and CAP_NET_ADMIN are needed. Or it could not be closed, as the kernel does not wait for
    /// what processors are in the middle of (nohz_full).
    pub fn new() -> SysResult<Self> {
        grace::is_possible()?;
        let flows = bpf::forgetful_map(program::KEY, program::VALUE, MAX)?;
        Ok(Self { flows, words: Words::new(program::WORDS)?, tied: Vec::new() })
    }

    /// Whether this kernel can do it: ties the programs to the loopback of a network namespace that is made for that.
    ///
    /// # Errors
    /// It cannot.
    ///
    /// # Panics
    /// Never: the thread that tries does not.
    pub fn probe() -> SysResult<()> {
        let inside = || {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|e| SysError::errno("unshare", "the network", e as i32))?;
            let mut bypass = Self::new()?;
            let side = Side { device: 1, cable: 1 };
            bypass.tie_inner(side)?;
            bypass.tie_outer(side)?;
            bypass.close().map(drop)
        };
        std::thread::scope(|scope| scope.spawn(inside).join().expect("no panic"))
    }

    /// Ties programs to the container's side, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel refuses, or there are no such devices.
    pub fn tie_inner(&mut self, side: Side) -> SysResult<()> {
        self.tie(From::Container, side)
    }

    /// Ties programs to the clients' side, in the calling thread's network namespace.
    ///
    /// # Errors
    /// As of [`Bypass::tie_inner`].
    pub fn tie_outer(&mut self, side: Side) -> SysResult<()> {
        self.tie(From::Clients, side)
    }

    fn tie(&mut self, from: From, side: Side) -> SysResult<()> {
        let (flows, words) = (self.flows.as_raw_fd(), self.words.map().as_raw_fd());
        let deciding = bpf::load(&program::deciding(from, flows, words, side.cable))?;
        let arriving = bpf::load(&program::arriving(side.device))?;
        // What comes out of the cable has a place to go before anything goes in.
        let arriving = bpf::at_ingress(arriving.as_fd(), side.cable)?;
        let deciding = bpf::at_egress(deciding.as_fd(), side.device)?;
        self.tied.push(Tied { deciding, arriving });
        Ok(())
    }

    /// Lets frames of known connections go by it from now on.
    pub fn open(&self) {
        self.words.at(program::OPEN).store(1, SeqCst);
    }

    /// Lets a connection go by it: the container's end, and the client's, as on the wire.
    ///
    /// # Errors
    /// The kernel refuses; the connection goes through the gate then.
    pub fn learn(&self, local: SocketAddr, remote: SocketAddr) -> SysResult<()> {
        bpf::set(self.flows.as_fd(), &key_of(local, remote), &[0; program::VALUE])
    }

    /// Has a connection go through the gate again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&self, local: SocketAddr, remote: SocketAddr) -> SysResult<()> {
        bpf::unset(self.flows.as_fd(), &key_of(local, remote))
    }

    /// What has gone by it.
    pub fn bypassed(&self) -> Bypassed {
        let count = |word| self.words.at(word).load(Relaxed);
        Bypassed { out_frames: count(program::OUT), in_frames: count(program::IN) }
    }

    /// Says that it is closed, so that at most the frames of this moment still go by it.
    pub fn shut(&self) {
        self.words.at(program::OPEN).store(0, SeqCst);
    }

    /// Closes it and waits until every frame that went by it has arrived: some tens of milliseconds. Gives what
    /// went by it in all.
    ///
    /// # Errors
    /// A frame may still be in a queue after two seconds. The bypass is closed nevertheless.
    pub fn close(self) -> Result<Bypassed, SysError> {
        self.shut();
        let Self { words, tied, .. } = self;
        // The kernel waits here, with each, until no processor runs the program: no frame gets in after that.
        let arriving: Vec<OwnedFd> = tied
            .into_iter()
            .map(|Tied { deciding, arriving }| {
                drop(deciding);
                arriving
            })
            .collect();
        let through_the_cable = until_drained();
        // And here, until none is between the cable and the device's queue.
        drop(arriving);
        let to_the_devices = until_drained();
        // The last ones may be out of the queues, and in the hands of a processor.
        let handled = grace::wait_for_processors();
        let count = |word| words.at(word).load(Relaxed);
        let bypassed = Bypassed { out_frames: count(program::OUT), in_frames: count(program::IN) };
        through_the_cable.and(to_the_devices).and(handled).map(|()| bypassed)
    }
}

fn key_of(local: SocketAddr, remote: SocketAddr) -> [u8; program::KEY] {
    let mut bytes = [0; program::KEY];
    for (at, port_at, end) in
        [(key::OURS, key::OUR_PORT, local), (key::THEIRS, key::THEIR_PORT, remote)]
    {
        let family = match end.ip().to_canonical() {
            IpAddr::V4(ip) => {
                bytes[at..at + 4].copy_from_slice(&ip.octets());
                4u32
            }
            IpAddr::V6(ip) => {
                bytes[at..at + 16].copy_from_slice(&ip.octets());
                6
            }
        };
        bytes[port_at..port_at + 2].copy_from_slice(&end.port().to_be_bytes());
        bytes[key::FAMILY..].copy_from_slice(&family.to_ne_bytes());
    }
    bytes
}

/// Waits until each processor's queue of frames that have arrived at virtual devices was empty once. They are
/// first in, first out, so whatever was in one of them at the beginning is through.
fn until_drained() -> SysResult<()> {
    const TABLE: &str = "/proc/net/softnet_stat";
    let failed = |source| SysError { call: "read", object: TABLE.into(), source };
    let since = Instant::now();
    let mut waiting: Option<Vec<usize>> = None;
    loop {
        let table = std::fs::read_to_string(TABLE).map_err(failed)?;
        let mut full = busy_queues(&table);
        if let Some(before) = &waiting {
            full.retain(|queue| before.contains(queue));
        }
        if full.is_empty() {
            return Ok(());
        }
        if since.elapsed() > PATIENCE {
            return Err(SysError::errno("wait for the queues of", TABLE, libc::ETIMEDOUT));
        }
        waiting = Some(full);
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The queues that are not empty, by their line in the table.
fn busy_queues(table: &str) -> Vec<usize> {
    /// Column of the queue's length.
    const LENGTH: usize = 11;
    let empty = |line: &str| line.split_whitespace().nth(LENGTH) == Some("00000000");
    table.lines().enumerate().filter(|(_, line)| !empty(line)).map(|(i, _)| i).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_programs() {
        Bypass::probe().expect("run as root");
    }

    #[test]
    fn a_connection_has_the_same_key_however_its_addresses_are_written() {
        let plain: SocketAddr = "10.1.2.3:80".parse().unwrap();
        let mapped: SocketAddr = "[::ffff:10.1.2.3]:80".parse().unwrap();
        let client: SocketAddr = "10.1.2.4:5000".parse().unwrap();
        assert_eq!(key_of(plain, client), key_of(mapped, client));
        assert_ne!(key_of(plain, client), key_of(client, plain));
    }

    #[test]
    fn queues_that_are_not_empty_are_found() {
        let line = |length: &str| format!("{} {length} 00000000", ["00000001"; 11].join(" "));
        let table = [line("00000000"), line("0000000a"), line("00000000")].join("\n");
        assert_eq!(busy_queues(&table), [1]);
        until_drained().unwrap();
    }
}
