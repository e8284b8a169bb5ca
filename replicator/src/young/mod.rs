//! Young connections: those that no descriptor names yet, in the middle of their handshake or in
//! a listener's accept queue. No system call gives or takes them; here they come back with their
//! own sequence numbers.
//!
//! A small program at the ingress of the restored container's device knows the handshakes that
//! the gateway recorded. When the last segment of one arrives, or is injected, it lets the kernel
//! make the connection (`bpf_sk_assign_tcp_reqsk`, Linux 6.9): straight into the accept queue.
//! What the client had sent is injected after it.

mod program;

use crate::bpf::btf;
use crate::image::net::Young;
use crate::sys::{SysError, SysResult, bpf};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// Most young connections of a container.
pub const MAX: usize = 4096;
/// The smallest segment size that the kernel takes, of IPv4 and of IPv6.
const MIN_MSS: [u16; 2] = [536, 1220];

/// The program and its map, loaded and not attached yet.
#[derive(Debug)]
pub struct Door {
    map: OwnedFd,
    program: OwnedFd,
    link: Option<OwnedFd>,
}

impl Door {
    /// Loads the program. Fails on a kernel that cannot do it.
    pub fn load() -> SysResult<Self> {
        const FUNCTION: &str = "bpf_sk_assign_tcp_reqsk";
        let assign = btf::function(FUNCTION).map_err(|source| SysError {
            call: "look for a kernel function",
            object: FUNCTION.into(),
            source,
        })?;
        let map = bpf::hash_map(program::KEY, program::VALUE, MAX as u32)?;
        let program = bpf::load(&program::assemble(map.as_raw_fd(), assign))?;
        Ok(Self { map, program, link: None })
    }

    /// From now on this connection may be made. `elapsed` is the time since the checkpoint.
    pub fn expect(&self, young: &Young, elapsed: Duration) -> SysResult<()> {
        bpf::set(self.map.as_fd(), &key(young), &value(young, elapsed))
    }

    /// Begins to work at the device with this index, in the calling thread's network namespace.
    pub fn open(&mut self, device: u32) -> SysResult<()> {
        self.link = Some(bpf::at_ingress(self.program.as_fd(), device)?);
        Ok(())
    }
}

fn key(young: &Young) -> [u8; program::KEY] {
    let mut key = [0; program::KEY];
    let mut put = |at: usize, port: usize, address: SocketAddr| {
        match address.ip() {
            IpAddr::V4(ip) => key[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => key[at..at + 16].copy_from_slice(&ip.octets()),
        }
        key[port..port + 2].copy_from_slice(&address.port().to_be_bytes());
    };
    put(0, 32, young.remote);
    put(16, 34, young.local);
    let family: u32 = if young.local.is_ipv4() { 4 } else { 6 };
    key[36..].copy_from_slice(&family.to_ne_bytes());
    key
}

fn value(young: &Young, elapsed: Duration) -> [u8; program::VALUE] {
    let mut value = [0; program::VALUE];
    let mut put = |at: usize, bytes: &[u8]| value[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &young.client_isn.wrapping_add(1).to_ne_bytes());
    put(4, &young.server_isn.wrapping_add(1).to_ne_bytes());
    // struct bpf_tcp_req_attrs: what the client's clock showed, what ours must show now, and what
    // was agreed on.
    let (theirs, ours) = young.timestamp.unwrap_or_default();
    put(8, &theirs.to_ne_bytes());
    put(12, &ours.wrapping_add(elapsed.as_millis() as u32).to_ne_bytes());
    let least = MIN_MSS[usize::from(young.local.is_ipv6())];
    put(16, &young.mss.max(least).to_ne_bytes());
    let (client, server) = young.window_scale.unwrap_or_default();
    put(18, &[server, client, u8::from(young.ecn), u8::from(young.window_scale.is_some())]);
    put(22, &[u8::from(young.sack), u8::from(young.timestamp.is_some())]);
    value
}
