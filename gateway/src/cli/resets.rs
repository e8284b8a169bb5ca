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
    /// The last one of each. One that ended in good order stays in mind: a copy of its handshake may
    /// come late.
    seen: HashMap<SocketAddr, Seen>,
}

/// What was seen of a connection since the client's first word.
#[derive(Debug, Default)]
struct Seen {
    established: bool,
    /// Who has said that it has nothing more to send.
    client_ended: bool,
    server_ended: bool,
}

impl Seen {
    fn has_ended(&self) -> bool {
        self.client_ended && self.server_ended
    }
}

impl Resets {
    fn new(server: SocketAddr) -> Self {
        Self { server, seen: HashMap::new() }
    }

    /// Takes a packet in, from its IP header on; whether it resets a connection that was seen to be
    /// established.
    fn heard(&mut self, packet: &[u8]) -> bool {
        let Some((from, to, tcp)) = segment(packet) else { return false };
        let (syn, ack, rst) = (tcp.syn(), tcp.ack(), tcp.rst());
        if from == self.server && (rst || syn) && !is_whole(from.ip(), to.ip(), tcp.as_ref()) {
            return false;
        }
        let client = match (from == self.server, to == self.server) {
            (true, _) => to,
            (_, true) => from,
            _ => return false,
        };
        if from != self.server && syn && !ack {
            self.seen.insert(client, Seen::default());
            return false;
        }
        if rst {
            // What answers a late copy of the last word resets nothing any more.
            let seen = self.seen.remove(&client).filter(|s| s.established && !s.has_ended());
            return from == self.server && seen.is_some();
        }
        let Some(seen) = self.seen.get_mut(&client) else { return false };
        match from == self.server {
            true => {
                seen.established |= syn && ack;
                seen.server_ended |= tcp.fin();
            }
            false => seen.client_ended |= tcp.fin(),
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

/// Whether a segment without data is as it was sent: a link may have changed a bit of it, and then
/// its receiver drops it. One that the kernel has left the check of to a device has only the sum of
/// its pseudo header yet.
fn is_whole(from: IpAddr, to: IpAddr, segment: &[u8]) -> bool {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut pseudo = [octets(from), octets(to)].concat();
    pseudo.extend([0, 6]);
    pseudo.extend((segment.len() as u16).to_be_bytes());
    let pseudo = ones_sum(0, &pseudo);
    ones_sum(pseudo, segment) == u16::MAX || segment[16..18] == pseudo.to_be_bytes()
}

/// The sum of the internet checksum (RFC 1071), not complemented.
fn ones_sum(begin: u16, bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from_be_bytes([0, 0, c[0], *c.get(1).unwrap_or(&0)]));
    let mut sum = words.fold(u32::from(begin), u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
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
                // It counts all the same: what was missed may have been its end in good order, or not.
                if let Ok(missed @ 1..) = heard.missed() {
                    tracing::warn!(
                        missed,
                        "not all packets of clients were heard; resets may be none"
                    );
                }
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
        let at = bytes.len() - 20;
        let mut tcp = TcpPacket::new_unchecked(&mut bytes[at..]);
        tcp.fill_checksum(&from.ip().into(), &to.ip().into());
        bytes
    }

    #[test]
    fn a_reset_that_a_link_has_made_of_something_else_is_none() {
        let (server, client) = ("10.0.0.1:6379", "10.0.0.2:40000");
        let mut resets = Resets::new(server.parse().unwrap());
        assert!(!resets.heard(&packet(client, server, SYN)));
        assert!(!resets.heard(&packet(server, client, SYN | ACK)));
        let mut changed = packet(server, client, ACK);
        changed[20 + 13] |= RST;
        assert!(!resets.heard(&changed));
        // Left to a device: the pseudo header's sum is what stands there.
        let mut unfinished = packet(server, client, RST);
        unfinished[20 + 16..20 + 18].copy_from_slice(&[0, 0]);
        let pseudo = [10, 0, 0, 1, 10, 0, 0, 2, 0, 6, 0, 20];
        unfinished[20 + 16..20 + 18].copy_from_slice(&ones_sum(0, &pseudo).to_be_bytes());
        assert!(resets.heard(&unfinished));
    }

    #[test]
    fn only_a_reset_of_what_was_established_counts_and_only_once() {
        for (server, client) in
            [("10.0.0.1:6379", "10.0.0.2:40000"), ("[fd00::1]:6379", "[fd00::2]:40000")]
        {
            let mut resets = Resets::new(server.parse().unwrap());
            let mut asks = |flags| resets.heard(&packet(client, server, flags));
            assert!(!asks(SYN));
            let mut says = |flags| resets.heard(&packet(server, client, flags));
            assert!(!says(RST | ACK), "refused, but never established");
            open(&mut resets, server, client);
            let mut says = |flags| resets.heard(&packet(server, client, flags));
            assert!(says(RST));
            assert!(!says(RST), "counted already");
            open(&mut resets, server, client);
            let mut asks = |flags| resets.heard(&packet(client, server, flags));
            assert!(!asks(RST), "the client's own");
            assert!(!resets.heard(&packet(server, client, RST)));
            open(&mut resets, server, client);
            assert!(!resets.heard(&packet(client, server, FIN | ACK)));
            let mut says = |flags| resets.heard(&packet(server, client, flags));
            assert!(says(RST), "the server had not closed yet");
            open(&mut resets, server, client);
            assert!(!resets.heard(&packet(client, server, FIN | ACK)));
            let mut says = |flags| resets.heard(&packet(server, client, flags));
            assert!(!says(FIN | ACK));
            assert!(!says(RST), "it had ended in good order");
        }
    }

    /// The link has copied the handshake's second part, and the copy came last.
    #[test]
    fn a_late_copy_of_a_handshake_opens_nothing() {
        let (server, client) = ("10.0.0.1:6379", "10.0.0.2:40000");
        let mut resets = Resets::new(server.parse().unwrap());
        open(&mut resets, server, client);
        assert!(!resets.heard(&packet(client, server, FIN | ACK)));
        for flags in [FIN | ACK, SYN | ACK, RST, SYN | ACK, RST] {
            assert!(!resets.heard(&packet(server, client, flags)));
        }
        open(&mut resets, server, client);
        assert!(resets.heard(&packet(server, client, RST)), "a new one from the same port");
    }

    #[test]
    fn a_handshake_that_the_client_could_not_read_has_opened_nothing() {
        let (server, client) = ("10.0.0.1:6379", "10.0.0.2:40000");
        let mut resets = Resets::new(server.parse().unwrap());
        assert!(!resets.heard(&packet(client, server, SYN)));
        let mut changed = packet(server, client, SYN | ACK);
        changed[20 + 8] ^= 4;
        assert!(!resets.heard(&changed));
        assert!(!resets.heard(&packet(server, client, RST)));
    }

    fn open(resets: &mut Resets, server: &str, client: &str) {
        assert!(!resets.heard(&packet(client, server, SYN)));
        assert!(!resets.heard(&packet(server, client, SYN | ACK)));
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
