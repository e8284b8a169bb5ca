//! What a restored connection within a tree must still hear: that its other end, which nobody
//! held any more, had closed it.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use netns_tools::namespace::Namespace;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use replicator::restore::{Reborn, Segment};

use crate::frames::resume::PeerSegment;
use crate::frames::{HEADER, Mac};

/// Ethernet header of the frames that [`PeerSegment`] makes.
const LINK_HEADER: usize = 14;
const NO_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

/// Sends each connection its FIN or RST over the loopback, in the name of the other end.
pub(super) fn tell_peers(reborn: &Reborn) -> Result<()> {
    let resumption = &reborn.resumption;
    if resumption.fins.is_empty() && resumption.resets.is_empty() {
        return Ok(());
    }
    Namespace::of_process(reborn.pid)?.enter(|| {
        let fins = resumption.fins.iter().map(|s| (s, false));
        fins.chain(resumption.resets.iter().map(|s| (s, true)))
            .try_for_each(|(segment, reset)| tell(segment, reset))
    })?
}

fn tell(segment: &Segment, reset: bool) -> Result<()> {
    let frame = PeerSegment::of_restored(segment, NO_MAC, NO_MAC);
    let frame = if reset { frame.rst() } else { frame.fin() };
    let Some(packet) = frame.as_deref().and_then(|f| f.get(HEADER + LINK_HEADER..)) else {
        return Ok(());
    };
    let family = match segment.local.ip().to_canonical().is_ipv4() {
        true => AddressFamily::Inet,
        false => AddressFamily::Inet6,
    };
    let what = || format!("cannot tell {} that its peer has closed", segment.local);
    let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
        .with_context(what)?;
    let to = SockaddrStorage::from(SocketAddr::new(segment.local.ip().to_canonical(), 0));
    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty()).with_context(what).map(drop)
}
