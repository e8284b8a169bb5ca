//! A packet socket that hears the segments of TCP which open, end or reset connections, of all devices
//! of a network namespace: packet(7), and a classic filter so that nothing else is copied.

use super::error::{SysError, SysResult, check};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// FIN | SYN | RST
const FLAGS: u32 = 0x07;
/// One instruction of a classic filter: code, jumps if true and if false, operand.
const fn op(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// From the IP header on: unfragmented TCP over IPv4, or over IPv6 without extension headers.
const FILTER: [libc::sock_filter; 17] = [
    op(0x30, 0, 0, 0),       // A = byte 0
    op(0x54, 0, 0, 0xf0),    // its version
    op(0x15, 0, 7, 0x40),    // 4, or go to 10
    op(0x30, 0, 0, 9),       // protocol
    op(0x15, 0, 10, 6),      // TCP, or drop
    op(0x28, 0, 0, 6),       // fragment offset
    op(0x45, 8, 0, 0x1fff),  // a later fragment: drop
    op(0xb1, 0, 0, 0),       // X = length of the IP header
    op(0x50, 0, 0, 13),      // flags of TCP
    op(0x45, 6, 5, FLAGS),   // keep, or drop
    op(0x15, 0, 4, 0x60),    // 6, or drop
    op(0x30, 0, 0, 6),       // next header
    op(0x15, 0, 2, 6),       // TCP, or drop
    op(0x30, 0, 0, 40 + 13), // flags of TCP
    op(0x45, 1, 0, FLAGS),   // keep, or drop
    op(0x06, 0, 0, 0),       // drop
    op(0x06, 0, 0, 256),     // keep as much
];

/// Bytes of a packet that are kept.
pub const KEPT: usize = 256;

/// Bytes of packets that wait to be read.
const BUFFER: usize = 64 << 20;

/// Hears them; packets begin with their IP header.
#[derive(Debug)]
pub struct Handshakes(OwnedFd);

impl Handshakes {
    /// Opens one in the calling thread's network namespace. Needs CAP_NET_RAW.
    pub fn open() -> SysResult<Self> {
        let failed = |e: Errno| SysError::errno("socket", "AF_PACKET", e as i32);
        // Without a protocol it hears nothing before the filter is there.
        let (family, kind) = (AddressFamily::Packet, SockType::Datagram);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
        let program =
            libc::sock_fprog { len: FILTER.len() as u16, filter: FILTER.as_ptr().cast_mut() };
        // SAFETY: the kernel copies the program, which it only reads, during the call.
        let r = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as u32,
            )
        };
        check(r.into(), "setsockopt(SO_ATTACH_FILTER)", || "AF_PACKET".into())?;
        let mut address: libc::sockaddr_ll = bytes_of_zero();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a whole address, which the kernel reads.
        let r = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        check(r.into(), "bind", || "AF_PACKET".into())?;
        // Whoever listens may wait for a processor while a link lets go of hundreds of them at once.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER);
        }
        Ok(Self(socket))
    }

    /// How many packets did not fit since this was last asked.
    pub fn missed(&self) -> SysResult<u32> {
        // struct tpacket_stats: packets, drops.
        let mut stats = [0u32; 2];
        let mut len = size_of_val(&stats) as u32;
        // SAFETY: the kernel writes at most `len` bytes, which is what there is.
        let r = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        };
        check(r.into(), "getsockopt(PACKET_STATISTICS)", || "AF_PACKET".into())?;
        Ok(stats[1])
    }

    /// Waits for the next packet; gives its first bytes. ENOBUFS never: what does not fit is lost, see
    /// [`Handshakes::missed`].
    pub fn next<'a>(&self, buffer: &'a mut [u8; KEPT]) -> SysResult<&'a [u8]> {
        loop {
            match recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()) {
                Ok(n) => return Ok(&buffer[..n]),
                Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(e) => return Err(SysError::errno("recv", "AF_PACKET", e as i32)),
            }
        }
    }
}

impl AsFd for Handshakes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn bytes_of_zero() -> libc::sockaddr_ll {
    // SAFETY: plain numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn what_did_not_fit_is_told_once() {
        let Ok(heard) = Handshakes::open() else { return };
        setsockopt(&heard.0, sockopt::RcvBuf, &0).expect("as little as there can be");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        for _ in 0..50 {
            drop(TcpStream::connect(listener.local_addr().expect("bound")).expect("open"));
            drop(listener.accept().expect("accepted"));
        }
        assert!(heard.missed().expect("told") > 0);
    }

    #[test]
    fn connections_are_heard_to_open_and_end_but_their_data_is_not() {
        let Ok(heard) = Handshakes::open() else { return };
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let port = listener.local_addr().expect("bound").port();
            let mut client =
                TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
            let (mut server, _) = listener.accept().expect("accepted");
            client.write_all(&[7; 5000]).expect("sent");
            server.read_exact(&mut [0; 5000]).expect("received");
            drop(client);
            drop(server);
            let mut flags = 0;
            let mut buffer = [0; KEPT];
            while flags & 1 == 0 {
                let packet = heard.next(&mut buffer).expect("heard");
                let at = if packet[0] >> 4 == 4 { usize::from(packet[0] & 15) * 4 } else { 40 };
                let ports: Vec<u16> = packet[at..at + 4]
                    .chunks(2)
                    .map(|b| u16::from_be_bytes([b[0], b[1]]))
                    .collect();
                if ports.contains(&port) {
                    assert!(packet[at + 13] & 7 != 0, "only these");
                    flags |= packet[at + 13];
                }
            }
            assert!(flags & 2 != 0, "it was heard to open before it was heard to end");
        }
    }
}
