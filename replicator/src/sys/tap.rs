//! TAP devices: Ethernet interfaces whose other end is a file descriptor.
//!
//! See the kernel's `Documentation/networking/tuntap.rst` and netdevice(7). A [`Tap`] belongs to
//! the network namespace that the creating thread was in; entering the namespace first and
//! creating the device there takes about a millisecond, moving a finished one sixteen or more.
//! Closing one takes as long: open early, keep it, and never close it while a failover waits.
//!
//! With [`TapOptions::vnet`] every frame carries a `struct virtio_net_hdr` of [`VNET_HDR`] bytes
//! in front. It says what is still to be done to the frame (checksum to be filled in, segments to
//! be cut), so that frames of 64 KiB pass in one read and one write. Without that header the
//! offloads stay off: frames that need them could not be understood.

use nix::errno::Errno;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of the header in front of each frame of a device with [`TapOptions::vnet`].
pub const VNET_HDR: usize = 10;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// What to ask for, best first; older kernels refuse unknown bits with EINVAL.
const OFFLOADS: [u32; 4] = [
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
    TUN_F_CSUM,
    0,
];

const _: () = assert!(size_of::<libc::ifreq>() == 40);

/// What failed on a device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name does not fit an interface name.
    #[error("interface name {0:?} must have 1 to 15 bytes")]
    Name(String),
    /// A call of the kernel failed.
    #[error("{call} on {name}: {source}; {fix}")]
    Call {
        /// The request.
        call: &'static str,
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: io::Error,
        /// What to do about it.
        fix: &'static str,
    },
}

/// How to create a [`Tap`].
#[derive(Clone, Copy, Debug)]
pub struct TapOptions {
    /// Frames carry a virtio_net_hdr, and offloads are on.
    pub vnet: bool,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self { vnet: true }
    }
}

/// What [`Tap::configure`] sets; `None` leaves as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkSetup {
    /// Hardware address.
    pub mac: Option<[u8; 6]>,
    /// Administratively up or down.
    pub up: Option<bool>,
    /// Frames that the kernel queues towards the reader before it drops.
    pub txqueuelen: Option<u32>,
    /// Largest payload of a frame in bytes.
    pub mtu: Option<u32>,
}

/// A TAP device, its descriptor nonblocking and closed on exec. It vanishes when dropped.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// A socket of the device's namespace for requests that go by interface name.
    control: OwnedFd,
    name: String,
    vnet: bool,
    offload: u32,
}

impl Tap {
    /// Creates interface `name` in the calling thread's network namespace.
    pub fn create(name: &str, options: TapOptions) -> Result<Tap, TapError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/']) {
            return Err(TapError::Name(name.to_owned()));
        }
        let fail = |call, source, fix| TapError::Call { call, name: name.to_owned(), source, fix };
        let fd: OwnedFd = {
            use std::os::unix::fs::OpenOptionsExt;
            std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open("/dev/net/tun")
                .map_err(|e| fail("open /dev/net/tun", e, "load the tun driver, run as root"))?
                .into()
        };
        let mut request = request(name);
        let flags =
            libc::IFF_TAP | libc::IFF_NO_PI | if options.vnet { libc::IFF_VNET_HDR } else { 0 };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        ioctl_ifreq(fd.as_fd(), TUNSETIFF, &mut request).map_err(|e| {
            fail("TUNSETIFF", e, "is the name free, and is CAP_NET_ADMIN held in the namespace?")
        })?;
        let offload = if options.vnet {
            set_offload(fd.as_fd())
                .map_err(|e| fail("TUNSETOFFLOAD", e, "the kernel's tun driver is too old"))?
        } else {
            0
        };
        let unlimited: libc::c_int = libc::c_int::MAX;
        // SAFETY: TUNSETSNDBUF reads one int behind the pointer, which lives across the call.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETSNDBUF, &raw const unlimited) };
        Errno::result(r)
            .map_err(|e| fail("TUNSETSNDBUF", e.into(), "the tun driver is too old"))?;
        // SAFETY: socket(2) takes no pointers.
        let r = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        let raw = Errno::result(r)
            .map_err(|e| fail("socket", e.into(), "raise the limit of open files"))?;
        // SAFETY: socket returned a fresh descriptor that nobody else owns.
        let control = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Tap { fd, control, name: name.to_owned(), vnet: options.vnet, offload })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether frames carry a virtio_net_hdr.
    pub fn vnet(&self) -> bool {
        self.vnet
    }

    /// Offloads in effect (TUN_F_ bits of linux/if_tun.h).
    pub fn offload(&self) -> u32 {
        self.offload
    }

    /// Sets address, state, queue length and MTU. May be called from any namespace.
    pub fn configure(&self, setup: LinkSetup) -> Result<(), TapError> {
        if let Some(mac) = setup.mac {
            let mut r = request(&self.name);
            let mut sa_data = [0; 14];
            for (to, from) in sa_data.iter_mut().zip(mac) {
                *to = from as libc::c_char;
            }
            r.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data };
            self.control("SIOCSIFHWADDR", libc::SIOCSIFHWADDR, &mut r)?;
        }
        if let Some(mtu) = setup.mtu {
            let mut r = request(&self.name);
            r.ifr_ifru.ifru_mtu = mtu as libc::c_int;
            self.control("SIOCSIFMTU", libc::SIOCSIFMTU, &mut r)?;
        }
        if let Some(length) = setup.txqueuelen {
            let mut r = request(&self.name);
            r.ifr_ifru.ifru_metric = length as libc::c_int;
            self.control("SIOCSIFTXQLEN", libc::SIOCSIFTXQLEN, &mut r)?;
        }
        if let Some(up) = setup.up {
            let mut r = request(&self.name);
            self.control("SIOCGIFFLAGS", libc::SIOCGIFFLAGS, &mut r)?;
            let up_bit = libc::IFF_UP as libc::c_short;
            // SAFETY: SIOCGIFFLAGS has just written this member.
            let flags = unsafe { r.ifr_ifru.ifru_flags };
            r.ifr_ifru.ifru_flags = if up { flags | up_bit } else { flags & !up_bit };
            self.control("SIOCSIFFLAGS", libc::SIOCSIFFLAGS, &mut r)?;
        }
        Ok(())
    }

    /// Gives the interface its first IPv4 address.
    pub fn set_ipv4(&self, address: Ipv4Addr, prefix: u8) -> Result<(), TapError> {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        for (call, code, value) in [
            ("SIOCSIFADDR", libc::SIOCSIFADDR, address),
            ("SIOCSIFNETMASK", libc::SIOCSIFNETMASK, Ipv4Addr::from(mask)),
        ] {
            let mut r = request(&self.name);
            let mut sa_data = [0; 14];
            // struct sockaddr_in: port in the first two bytes, then the address.
            for (to, from) in sa_data[2..].iter_mut().zip(value.octets()) {
                *to = from as libc::c_char;
            }
            r.ifr_ifru.ifru_addr =
                libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data };
            self.control(call, code, &mut r)?;
        }
        Ok(())
    }

    /// Reads one frame (with its header, see [`Tap::vnet`]) into `buffer`. A longer frame is cut.
    /// `WouldBlock` when none waits.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.fd, buffer)?)
    }

    /// Hands one frame (with its header) to the kernel, as if it had come in on the wire.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        nix::unistd::write(&self.fd, frame)?;
        Ok(())
    }

    fn control(
        &self,
        call: &'static str,
        code: libc::c_ulong,
        request: &mut libc::ifreq,
    ) -> Result<(), TapError> {
        ioctl_ifreq(self.control.as_fd(), code, request).map_err(|source| TapError::Call {
            call,
            name: self.name.clone(),
            source,
            fix: "was the interface removed or renamed, and is the value in its range?",
        })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A zeroed request that names an interface. The name was checked to fit.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data; all zero bytes are a valid value of every member.
    let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in r.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    r
}

fn ioctl_ifreq(
    fd: BorrowedFd<'_>,
    code: libc::c_ulong,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: every request passed here reads and writes one struct ifreq, exclusively borrowed.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), code, request as *mut libc::ifreq) };
    Ok(Errno::result(r).map(drop)?)
}

/// Switches on as many offloads as the kernel knows and returns them.
fn set_offload(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut last = Errno::EINVAL;
    for wanted in OFFLOADS {
        // SAFETY: TUNSETOFFLOAD takes its bits as a plain integer argument.
        let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(wanted)) };
        match Errno::result(r) {
            Ok(_) => return Ok(wanted),
            Err(e) => last = e,
        }
    }
    Err(last.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_new_namespace(f: impl FnOnce() + Send + 'static) {
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            f();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_device_is_created_configured_and_refuses_its_name_twice() {
        in_new_namespace(|| {
            let tap = Tap::create("tap0", TapOptions::default()).unwrap();
            assert!(tap.vnet());
            assert_eq!(tap.offload() & TUN_F_TSO4, TUN_F_TSO4);
            let mac = [2, 0, 0, 0, 0, 9];
            tap.configure(LinkSetup {
                mac: Some(mac),
                up: Some(true),
                txqueuelen: Some(4321),
                mtu: Some(1400),
            })
            .unwrap();
            tap.set_ipv4(Ipv4Addr::new(10, 1, 2, 3), 24).unwrap();
            let mut r = request("tap0");
            ioctl_ifreq(tap.control.as_fd(), libc::SIOCGIFHWADDR, &mut r).unwrap();
            // SAFETY: SIOCGIFHWADDR has just written this member.
            let got = unsafe { r.ifr_ifru.ifru_hwaddr.sa_data };
            assert_eq!(got.map(|c| c as u8)[..6], mac);
            ioctl_ifreq(tap.control.as_fd(), libc::SIOCGIFTXQLEN, &mut r).unwrap();
            // SAFETY: SIOCGIFTXQLEN has just written this member.
            assert_eq!(unsafe { r.ifr_ifru.ifru_metric }, 4321);

            let again = Tap::create("tap0", TapOptions { vnet: false }).unwrap_err();
            assert!(again.to_string().contains("TUNSETIFF on tap0"), "{again}");
        });
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        for bad in ["", "sixteen-bytes-xx", "a/b"] {
            assert!(matches!(Tap::create(bad, TapOptions::default()), Err(TapError::Name(_))));
        }
    }

    #[test]
    fn the_kernels_first_frame_can_be_read() {
        in_new_namespace(|| {
            let tap = Tap::create("tap1", TapOptions { vnet: false }).unwrap();
            tap.configure(LinkSetup { up: Some(true), ..LinkSetup::default() }).unwrap();
            tap.set_ipv4(Ipv4Addr::new(10, 1, 2, 3), 24).unwrap();
            let socket = std::net::UdpSocket::bind("10.1.2.3:0").unwrap();
            socket.send_to(b"x", "10.1.2.4:9").unwrap();
            let mut buffer = [0; 2048];
            let arp = loop {
                match tap.read(&mut buffer) {
                    Ok(n) if buffer[12..14] == [8, 6] => break n,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    Err(e) => panic!("{e}"),
                }
            };
            assert_eq!(arp, 42, "who has 10.1.2.4?");
        });
    }
}
