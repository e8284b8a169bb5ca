//! Counts connections that a client has seen established and that were reset from the other side, by
//! what passed on its wire and not by what its sockets say: also of those that it has closed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use replicator::sys::packet::{Handshakes, KEPT};
use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};

/// Connections with one server, by the client's address and port.
#[derive(Debug)]
struct Resets {
    server: SocketAddr,
    /// Those that were seen to be established and did not end in good order, and which sides have
    /// said that they have nothing more to send.
    established: HashMap<SocketAddr, Ends>,
}

#[derive(Debug, Default)]
struct Ends {
    client: bool,
    server: bool,
}

impl Resets {
    fn new(server: SocketAddr) -> Self {
        Self { server, established: HashMap::new() }
    }

    /// Takes a packet in, from its IP header on; whether it resets a connection that was seen to be
    /// established.
    fn heard(&mut self, packet: &[u8]) -> bool {
        let Some((from, to, tcp)) = segment(packet) else { return false };
        let (syn, ack, rst) = (tcp.syn(), tcp.ack(), tcp.rst());
        let client = match (from == self.server, to == self.server) {
            (true, _) => to,
            (_, true) => from,
            _ => return false,
        };
        if from == self.server {
            if syn && ack {
                self.established.entry(client).or_default();
            }
            if rst {
                return self.established.remove(&client).is_some();
            }
        } else if rst || (syn && !ack) {
            // It gave up, or begins anew.
            self.established.remove(&client);
        }
        if tcp.fin()
            && let Some(ends) = self.established.get_mut(&client)
        {
            *(if from == self.server { &mut ends.server } else { &mut ends.client }) = true;
            if ends.client && ends.server {
                // What answers a late copy of the last word resets nothing any more.
                self.established.remove(&client);
            }
        }
        false
    }
}

/// Addresses and header of a segment.
fn segment(packet: &[u8]) -> Option<(SocketAddr, SocketAddr, TcpPacket<&[u8]>)> {
    let (from, to, payload): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let (ip, len) = (Ipv4Packet::new_unchecked(packet), usize::from(packet[0] & 15) * 4);
            (packet.len() >= 20 && ip.next_header() == IpProtocol::Tcp).then_some(())?;
            (ip.src_addr().into(), ip.dst_addr().into(), packet.get(len..)?)
        }
        6 => {
            let ip = Ipv6Packet::new_unchecked(packet);
            (packet.len() >= 40 && ip.next_header() == IpProtocol::Tcp).then_some(())?;
            (ip.src_addr().into(), ip.dst_addr().into(), &packet[40..])
        }
        _ => return None,
    };
    (payload.len() >= 20).then_some(())?;
    let tcp = TcpPacket::new_unchecked(payload);
    let at = |ip, port| SocketAddr::new(ip, port);
    Some((at(from, tcp.src_port()), at(to, tcp.dst_port()), tcp))
}

/// Listens for the rest of the process's life, in a thread of its own and in the network namespace of the
/// caller. Gives the count.
///
/// # Errors
/// It must not listen.
pub(super) fn count(server: SocketAddr) -> anyhow::Result<Arc<AtomicU64>> {
    let heard = Handshakes::open()?;
    let count = Arc::new(AtomicU64::new(0));
    let counter = count.clone();
    std::thread::Builder::new().name("resets".into()).spawn(move || {
        let mut resets = Resets::new(server);
        let mut buffer = [0; KEPT];
        while let Ok(packet) = heard.next(&mut buffer) {
            if resets.heard(packet) {
                counter.fetch_add(1, Relaxed);
            }
        }
    })?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    fn packet(from: &str, to: &str, flags: u8) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut bytes = match (from.ip(), to.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let mut head = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
                head.extend(a.octets());
                head.extend(b.octets());
                head
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let mut head = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
                head.extend(a.octets());
                head.extend(b.octets());
                head
            }
            _ => unreachable!("one family"),
        };
        bytes.extend(from.port().to_be_bytes());
        bytes.extend(to.port().to_be_bytes());
        bytes.extend([0; 8]);
        bytes.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn only_a_reset_of_what_was_established_counts_and_only_once() {
        for (server, client) in
            [("10.0.0.1:6379", "10.0.0.2:40000"), ("[fd00::1]:6379", "[fd00::2]:40000")]
        {
            let mut resets = Resets::new(server.parse().unwrap());
            let mut heard = |from, to, flags| resets.heard(&packet(from, to, flags));
            assert!(!heard(client, server, SYN));
            assert!(!heard(server, client, RST | ACK), "refused, but never established");
            assert!(!heard(client, server, SYN));
            assert!(!heard(server, client, SYN | ACK));
            assert!(heard(server, client, RST));
            assert!(!heard(server, client, RST), "counted already");
            assert!(!heard(server, client, SYN | ACK));
            assert!(!heard(client, server, RST), "the client's own");
            assert!(!heard(server, client, RST));
            assert!(!heard(server, client, SYN | ACK));
            assert!(!heard(client, server, FIN | ACK));
            assert!(heard(server, client, RST), "the server had not closed yet");
            assert!(!heard(server, client, SYN | ACK));
            assert!(!heard(client, server, FIN | ACK));
            assert!(!heard(server, client, FIN | ACK));
            assert!(!heard(server, client, RST), "it had ended in good order");
        }
    }

    #[test]
    fn odd_packets_are_nothing() {
        let mut resets = Resets::new("10.0.0.1:6379".parse().unwrap());
        let whole = packet("10.0.0.1:6379", "10.0.0.2:40000", RST);
        for len in 0..whole.len() {
            assert!(!resets.heard(&whole[..len]));
        }
        for first in 0..=255 {
            let mut odd = whole.clone();
            odd[0] = first;
            assert!(!resets.heard(&odd));
        }
    }
}
