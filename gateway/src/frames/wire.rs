//! Building and reading single frames, for the announcements and the probes.
//!
//! Everything built here is complete: checksums filled in, and an all-zero virtio_net_hdr in
//! front, which says that nothing is left to be done. Everything read here comes from strangers:
//! checked views only, and checksums are not looked at, as those of local senders are unfinished.

use super::{HEADER, Mac};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetFrame, EthernetProtocol, Icmpv6Packet, Icmpv6Repr,
    IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, NdiscRepr, TcpPacket,
    TcpRepr,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const ETHERNET: usize = 14;
const HOP_LIMIT: u8 = 64;

/// A frame with space for `payload` bytes behind its Ethernet header.
fn ethernet(from: Mac, to: Mac, kind: EthernetProtocol, payload: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER + ETHERNET + payload];
    let mut view = EthernetFrame::new_unchecked(&mut frame[HEADER..]);
    view.set_src_addr(from);
    view.set_dst_addr(to);
    view.set_ethertype(kind);
    frame
}

/// An IPv4 ARP frame.
pub(super) fn arp(to: Mac, repr: ArpRepr) -> Vec<u8> {
    let ArpRepr::EthernetIpv4 { source_hardware_addr, .. } = repr else { return Vec::new() };
    let mut frame = ethernet(source_hardware_addr, to, EthernetProtocol::Arp, repr.buffer_len());
    repr.emit(&mut ArpPacket::new_unchecked(&mut frame[HEADER + ETHERNET..]));
    frame
}

/// A neighbour discovery frame. Its hop limit is 255, as receivers demand.
pub(super) fn ndisc(from: (Mac, Ipv6Addr), to: (Mac, Ipv6Addr), repr: NdiscRepr<'_>) -> Vec<u8> {
    let icmp = Icmpv6Repr::Ndisc(repr);
    let ip = Ipv6Repr {
        src_addr: from.1,
        dst_addr: to.1,
        next_header: IpProtocol::Icmpv6,
        payload_len: icmp.buffer_len(),
        hop_limit: 255,
    };
    let length = ip.buffer_len() + icmp.buffer_len();
    let mut frame = ethernet(from.0, to.0, EthernetProtocol::Ipv6, length);
    let mut packet = Ipv6Packet::new_unchecked(&mut frame[HEADER + ETHERNET..]);
    ip.emit(&mut packet);
    let mut payload = Icmpv6Packet::new_unchecked(packet.payload_mut());
    icmp.emit(&from.1, &to.1, &mut payload, &ChecksumCapabilities::default());
    frame
}

/// A TCP segment. Both addresses must be of one family; the ports are those in `repr`.
pub(super) fn tcp(
    macs: (Mac, Mac),
    from: IpAddr,
    to: IpAddr,
    repr: &TcpRepr<'_>,
) -> Option<Vec<u8>> {
    let caps = ChecksumCapabilities::default();
    let length = repr.buffer_len();
    let (src, dst) = (IpAddress::from(from), IpAddress::from(to));
    match (from, to) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let ip = Ipv4Repr {
                src_addr,
                dst_addr,
                next_header: IpProtocol::Tcp,
                payload_len: length,
                hop_limit: HOP_LIMIT,
            };
            let mut frame =
                ethernet(macs.0, macs.1, EthernetProtocol::Ipv4, ip.buffer_len() + length);
            let mut packet = Ipv4Packet::new_unchecked(&mut frame[HEADER + ETHERNET..]);
            ip.emit(&mut packet, &caps);
            let mut segment = TcpPacket::new_unchecked(packet.payload_mut());
            repr.emit(&mut segment, &src, &dst, &caps);
            Some(frame)
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let ip = Ipv6Repr {
                src_addr,
                dst_addr,
                next_header: IpProtocol::Tcp,
                payload_len: length,
                hop_limit: HOP_LIMIT,
            };
            let mut frame =
                ethernet(macs.0, macs.1, EthernetProtocol::Ipv6, ip.buffer_len() + length);
            let mut packet = Ipv6Packet::new_unchecked(&mut frame[HEADER + ETHERNET..]);
            ip.emit(&mut packet);
            let mut segment = TcpPacket::new_unchecked(packet.payload_mut());
            repr.emit(&mut segment, &src, &dst, &caps);
            Some(frame)
        }
        _ => None,
    }
}

/// What a received TCP segment says, as far as resumption asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) seq: u32,
    /// Only if the ACK flag is set.
    pub(super) ack: Option<u32>,
    pub(super) window: u16,
    pub(super) rst: bool,
    /// No data, SYN or FIN.
    pub(super) bare: bool,
}

/// A TCP segment of a frame.
pub(super) struct TcpView<'a> {
    pub(super) mac: Mac,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) tcp: TcpPacket<&'a [u8]>,
}

impl TcpView<'_> {
    pub(super) fn seq(&self) -> u32 {
        self.tcp.seq_number().0 as u32
    }

    pub(super) fn ack(&self) -> u32 {
        self.tcp.ack_number().0 as u32
    }
}

/// Where a frame goes.
pub(super) fn destination(frame: &[u8]) -> Option<Mac> {
    frame.get(HEADER..HEADER + 6).map(Mac::from_bytes)
}

/// Looks at a TCP segment; anything else, fragments and IPv6 extension headers included, is none.
pub(super) fn view_tcp(frame: &[u8]) -> Option<TcpView<'_>> {
    let ethernet = EthernetFrame::new_checked(frame.get(HEADER..)?).ok()?;
    let mac = ethernet.src_addr();
    let (from, to, payload): (IpAddr, IpAddr, &[u8]) = match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
            if ip.next_header() != IpProtocol::Tcp || ip.frag_offset() != 0 {
                return None;
            }
            (ip.src_addr().into(), ip.dst_addr().into(), ip.payload())
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            if ip.next_header() != IpProtocol::Tcp {
                return None;
            }
            (ip.src_addr().into(), ip.dst_addr().into(), ip.payload())
        }
        _ => return None,
    };
    let tcp = TcpPacket::new_checked(payload).ok()?;
    let (from, to) = (SocketAddr::new(from, tcp.src_port()), SocketAddr::new(to, tcp.dst_port()));
    Some(TcpView { mac, from, to, tcp })
}

/// Reads a TCP segment.
pub(super) fn read_tcp(frame: &[u8]) -> Option<Segment> {
    let view = view_tcp(frame)?;
    Some(Segment {
        from: view.from,
        to: view.to,
        seq: view.seq(),
        ack: view.tcp.ack().then(|| view.ack()),
        window: view.tcp.window_len(),
        rst: view.tcp.rst(),
        bare: view.tcp.segment_len() == 0,
    })
}

/// Which hardware address a frame shows for which IP address: its own source, or what it says of
/// another by ARP or neighbour advertisement.
pub(super) fn read_neighbour(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let ethernet = EthernetFrame::new_checked(frame.get(HEADER..)?).ok()?;
    let mac = ethernet.src_addr();
    let (address, mac): (IpAddr, Mac) = match ethernet.ethertype() {
        EthernetProtocol::Arp => {
            let arp = ArpPacket::new_checked(ethernet.payload()).ok()?;
            match ArpRepr::parse(&arp).ok()? {
                ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Request | ArpOperation::Reply,
                    source_hardware_addr,
                    source_protocol_addr,
                    ..
                } => (source_protocol_addr.into(), source_hardware_addr),
                _ => return None,
            }
        }
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
            (ip.src_addr().into(), mac)
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            (advertised(&ip).unwrap_or(ip.src_addr()).into(), mac)
        }
        _ => return None,
    };
    let usable = mac.is_unicast() && !address.is_unspecified() && !address.is_multicast();
    usable.then_some((address, mac))
}

/// The target of a neighbour advertisement; its sender has the address.
fn advertised(ip: &Ipv6Packet<&[u8]>) -> Option<Ipv6Addr> {
    match read_ndisc(ip)? {
        NdiscRepr::NeighborAdvert { target_addr, .. } => Some(target_addr),
        _ => None,
    }
}

fn read_ndisc<'a>(ip: &Ipv6Packet<&'a [u8]>) -> Option<NdiscRepr<'a>> {
    if ip.next_header() != IpProtocol::Icmpv6 {
        return None;
    }
    let icmp = Icmpv6Packet::new_checked(ip.payload()).ok()?;
    let unchecked = ChecksumCapabilities::ignored();
    match Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &unchecked).ok()? {
        Icmpv6Repr::Ndisc(repr) => Some(repr),
        _ => None,
    }
}

/// Reads a question for the owner of an address, by ARP or neighbour solicitation: the address,
/// and who asks. A question without an asker (is the address free?) is none.
pub(super) fn read_question(frame: &[u8]) -> Option<(IpAddr, (IpAddr, Mac))> {
    let ethernet = EthernetFrame::new_checked(frame.get(HEADER..)?).ok()?;
    let (target, asker): (IpAddr, IpAddr) = match ethernet.ethertype() {
        EthernetProtocol::Arp => {
            let arp = ArpPacket::new_checked(ethernet.payload()).ok()?;
            match ArpRepr::parse(&arp).ok()? {
                ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Request,
                    source_protocol_addr,
                    target_protocol_addr,
                    ..
                } => (target_protocol_addr.into(), source_protocol_addr.into()),
                _ => return None,
            }
        }
        EthernetProtocol::Ipv6 => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).ok()?;
            match read_ndisc(&ip)? {
                NdiscRepr::NeighborSolicit { target_addr, .. } => {
                    (target_addr.into(), ip.src_addr().into())
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    let mac = ethernet.src_addr();
    let asks = !asker.is_unspecified() && asker != target && mac.is_unicast();
    asks.then_some((target, (asker, mac)))
}

/// Whether sequence number `a` is before `b` (RFC 9293, 3.4: modulo 2^32).
pub(super) fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Hardware and IP address of the group in which `address` listens for solicitations (RFC 4291,
/// 2.7.1; RFC 2464, 7).
pub(super) fn solicited_node(address: Ipv6Addr) -> (Mac, Ipv6Addr) {
    let o = address.octets();
    let mac = Mac([0x33, 0x33, 0xff, o[13], o[14], o[15]]);
    let low = u16::from_be_bytes([o[14], o[15]]);
    (mac, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(o[13]), low))
}

/// An ARP question or answer from one host.
pub(super) fn arp_repr(
    operation: ArpOperation,
    source: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
) -> ArpRepr {
    ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: source.0,
        source_protocol_addr: source.1,
        target_hardware_addr: target.0,
        target_protocol_addr: target.1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sequence_numbers_wrap() {
        assert!(before(u32::MAX, 0) && !before(0, u32::MAX) && !before(5, 5));
    }

    #[test]
    fn the_solicited_node_group_of_an_address() {
        let (mac, group) = solicited_node("fe80::1:2:aabb:ccdd".parse().unwrap());
        assert_eq!(mac, Mac([0x33, 0x33, 0xff, 0xbb, 0xcc, 0xdd]));
        assert_eq!(group, "ff02::1:ffbb:ccdd".parse::<Ipv6Addr>().unwrap());
    }

    /// Bytes that look like something: a valid start, then noise.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop::sample::select(vec![[8u8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]]);
        let first = prop::sample::select(vec![0x45u8, 0x46, 0x4f, 0x60, 0x00]);
        let proto = prop::sample::select(vec![6u8, 58, 17, 0]);
        (kind, first, proto, prop::collection::vec(any::<u8>(), 0..160)).prop_map(
            |(kind, first, proto, noise)| {
                let mut f = vec![0; HEADER + 12];
                f.extend(kind);
                f.extend(noise);
                for (at, value) in [(0, first), (9, proto), (6, proto)] {
                    if let Some(b) = f.get_mut(HEADER + ETHERNET + at) {
                        *b = value;
                    }
                }
                f
            },
        )
    }

    proptest! {
        #[test]
        fn garbage_is_read_as_nothing_or_something_but_never_panics(
            frame in prop_oneof![prop::collection::vec(any::<u8>(), 0..200), hostile()],
        ) {
            let _ = read_tcp(&frame);
            let _ = read_neighbour(&frame);
            let _ = read_question(&frame);
        }

        #[test]
        fn a_built_segment_reads_back(seq: u32, ack: u32, window: u16, v6: bool, rst: bool) {
            let (from, to): (IpAddr, IpAddr) = if v6 {
                ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap())
            } else {
                ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap())
            };
            let repr = TcpRepr {
                src_port: 80,
                dst_port: 4000,
                control: if rst { smoltcp::wire::TcpControl::Rst } else { smoltcp::wire::TcpControl::None },
                seq_number: smoltcp::wire::TcpSeqNumber(seq as i32),
                ack_number: Some(smoltcp::wire::TcpSeqNumber(ack as i32)),
                window_len: window,
                window_scale: None,
                max_seg_size: None,
                sack_permitted: false,
                sack_ranges: [None; 3],
                timestamp: None,
                payload: &[],
            };
            let frame = tcp((Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])), from, to, &repr).unwrap();
            let got = read_tcp(&frame).unwrap();
            prop_assert_eq!(got, Segment {
                from: SocketAddr::new(from, 80),
                to: SocketAddr::new(to, 4000),
                seq, ack: Some(ack), window, rst, bare: true,
            });
            prop_assert_eq!(read_neighbour(&frame), Some((from, Mac([2, 0, 0, 0, 0, 1]))));
        }
    }
}
