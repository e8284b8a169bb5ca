//! Writes down what leaves a host for its clients in the name of a container.
//!
//! `uplink INTERFACE MAC SECONDS`: a line for each frame with this source that leaves by the interface of
//! the namespace it runs in, with the kernel's time in nanoseconds. Ends after so long.

use nix::libc::ETH_P_ALL;
use nix::sys::socket::sockopt::ReceiveTimestampns;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
    recvmsg, setsockopt, socket,
};
use nix::sys::time::TimeSpec;
use std::io::{IoSliceMut, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Of `sll_pkttype`: the host itself sends it.
const OUTGOING: u8 = nix::libc::PACKET_OUTGOING;
const _: () = assert!(ETH_P_ALL == 3);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match &arguments[..] {
        [interface, mac, seconds] => watch(interface, mac, seconds),
        _ => Err("usage: uplink INTERFACE MAC SECONDS".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("uplink: {error}");
            ExitCode::FAILURE
        }
    }
}

fn watch(interface: &str, mac: &str, seconds: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mac = mac.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let mac: Vec<u8> = mac.collect::<Result<_, _>>()?;
    let end = Instant::now() + Duration::from_secs(seconds.parse()?);
    let device = nix::net::if_::if_nametoindex(interface)? as usize;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let all = socket(AddressFamily::Packet, SockType::Raw, flags, Some(SockProtocol::EthAll))?;
    setsockopt(&all, ReceiveTimestampns, &true)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    let mut frame = [0u8; 64];
    while Instant::now() < end {
        let mut space = nix::cmsg_space!(TimeSpec);
        let mut parts = [IoSliceMut::new(&mut frame)];
        let heard =
            recvmsg::<LinkAddr>(all.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
        let message = match heard {
            Ok(message) => message,
            Err(nix::errno::Errno::EAGAIN) => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let wanted = message
            .address
            .is_some_and(|from| from.ifindex() == device && from.pkttype() == OUTGOING);
        let time = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::ScmTimestampns(time) => Some(time),
            _ => None,
        });
        let length = message.bytes;
        if let Some(time) = time.filter(|_| wanted && length >= 14)
            && frame[6..12] == mac[..]
        {
            writeln!(
                out,
                "{}",
                time.tv_sec() as i128 * 1_000_000_000 + i128::from(time.tv_nsec())
            )?;
        }
    }
    Ok(())
}
