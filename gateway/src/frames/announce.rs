//! Announcements of a takeover: the container's addresses are here now.
//!
//! Switches learn the port from the hardware address that frames come from, and neighbours keep
//! the same IP and MAC pair, so a takeover needs just one frame from the new place. Which kind a
//! neighbour heeds differs, so both are sent: for IPv4 an ARP request and a reply about oneself
//! (RFC 5227, 3), for IPv6 an unsolicited neighbour advertisement (RFC 4861, 7.2.6). They may be
//! lost, so they are sent a few times.

use super::{Mac, wire};
use smoltcp::wire::{ArpOperation, IPV6_LINK_LOCAL_ALL_NODES, NdiscNeighborFlags, NdiscRepr};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Gratuitous ARP: a request and a reply, both about `address` at `mac`.
pub fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> [Vec<u8>; 2] {
    let us = (mac, address);
    [
        wire::arp(
            Mac::BROADCAST,
            wire::arp_repr(ArpOperation::Request, us, (Mac([0; 6]), address)),
        ),
        wire::arp(Mac::BROADCAST, wire::arp_repr(ArpOperation::Reply, us, (mac, address))),
    ]
}

/// An unsolicited neighbour advertisement to all nodes, which overrides what they knew.
pub fn neighbour_advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    let all_nodes = (Mac([0x33, 0x33, 0, 0, 0, 1]), IPV6_LINK_LOCAL_ALL_NODES);
    let repr = NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::OVERRIDE,
        target_addr: address,
        lladdr: Some(mac.into()),
    };
    wire::ndisc((mac, address), all_nodes, repr)
}

/// Says when to send which announcements; it sends nothing itself.
#[derive(Debug)]
pub struct Announcer {
    frames: Vec<Vec<u8>>,
    interval: Duration,
    left: u32,
    next: Option<Instant>,
}

impl Announcer {
    /// Announces every address `times` times, at once and then after each `interval`.
    pub fn new(mac: Mac, addresses: &[IpAddr], times: u32, interval: Duration) -> Self {
        let mut frames = Vec::new();
        for address in addresses {
            match address.to_canonical() {
                IpAddr::V4(a) => frames.extend(gratuitous_arp(mac, a)),
                IpAddr::V6(a) => frames.push(neighbour_advertisement(mac, a)),
            }
        }
        Self { frames, interval, left: times, next: None }
    }

    /// What to send now; mostly nothing.
    pub fn due(&mut self, now: Instant) -> &[Vec<u8>] {
        if self.left == 0 || self.next.is_some_and(|at| now < at) {
            return &[];
        }
        self.left -= 1;
        self.next = Some(now + self.interval);
        &self.frames
    }

    /// When there is something to send again. None when all is said.
    /// Before the first call of [`Announcer::due`] this is none, too: that one is due at once.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.next.filter(|_| self.left > 0)
    }

    /// Whether all has been sent.
    pub fn is_done(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::HEADER;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

    #[test]
    fn announcements_tell_who_has_the_address() {
        let v4 = Ipv4Addr::new(10, 0, 0, 1);
        for frame in gratuitous_arp(MAC, v4) {
            assert_eq!(frame.len(), HEADER + 42);
            assert_eq!(frame[HEADER..HEADER + 6], [0xff; 6]);
            assert_eq!(wire::read_neighbour(&frame), Some((v4.into(), MAC)));
        }
        let v6: Ipv6Addr = "fd00::7".parse().unwrap();
        let frame = neighbour_advertisement(MAC, v6);
        assert_eq!(wire::read_neighbour(&frame), Some((v6.into(), MAC)));
    }

    #[test]
    fn they_are_repeated_as_often_as_asked() {
        let addresses = ["10.0.0.1".parse().unwrap(), "fd00::7".parse().unwrap()];
        let second = Duration::from_secs(1);
        let mut a = Announcer::new(MAC, &addresses, 2, second);
        let t0 = Instant::now();
        assert_eq!(a.due(t0).len(), 3);
        assert_eq!(a.next_deadline(), Some(t0 + second));
        assert!(a.due(t0).is_empty());
        assert_eq!(a.due(t0 + second).len(), 3);
        assert!(a.is_done() && a.next_deadline().is_none());
        assert!(a.due(t0 + 9 * second).is_empty());
    }
}
