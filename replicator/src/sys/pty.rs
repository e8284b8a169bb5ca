//! Pseudo terminals: ioctl_tty(2), TIOCGPTPEER and its kin, on either end.

use super::error::{SysResult, check};
use libc::{c_int, c_ulong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const TIOCGPTN: c_ulong = 0x8004_5430;
const TIOCSPTLCK: c_ulong = 0x4004_5431;
const TIOCGDEV: c_ulong = 0x8004_5432;
const TIOCGPKT: c_ulong = 0x8004_5438;
const TIOCGPTLCK: c_ulong = 0x8004_5439;
const TIOCGEXCL: c_ulong = 0x8004_5440;
const TIOCGPTPEER: c_ulong = 0x5441;
const TCGETS2: c_ulong = 0x802c_542a;
const TCSETS2: c_ulong = 0x402c_542b;

/// struct termios2: input, output, control and local flags, discipline, 19 characters, speeds.
pub type Termios = [u8; 44];

/// Columns, rows and pixels: struct winsize.
pub type Window = [u16; 4];

fn control(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    at: *mut c_void,
    name: &'static str,
) -> SysResult<c_int> {
    // SAFETY: callers give the address of a live value of the size that the request reads or
    // writes, or a number where it takes one.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, at) };
    check(r.into(), name, || format!("fd {}", fd.as_raw_fd())).map(|r| r as c_int)
}

fn get(fd: BorrowedFd<'_>, request: c_ulong, name: &'static str) -> SysResult<c_int> {
    let mut value: c_int = 0;
    control(fd, request, (&raw mut value).cast(), name)?;
    Ok(value)
}

fn set(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    mut value: c_int,
    name: &'static str,
) -> SysResult<()> {
    control(fd, request, (&raw mut value).cast(), name).map(drop)
}

/// The number that a controlling end has.
pub fn index(controlling: BorrowedFd<'_>) -> SysResult<u32> {
    get(controlling, TIOCGPTN, "TIOCGPTN").map(|n| n as u32)
}

/// Major and minor number of the terminal behind a descriptor.
pub fn device(fd: BorrowedFd<'_>) -> SysResult<(u32, u32)> {
    let dev = get(fd, TIOCGDEV, "TIOCGDEV")? as u32;
    Ok(((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00)))
}

/// Opens the other end of a controlling end.
pub fn peer(controlling: BorrowedFd<'_>, flags: c_int) -> SysResult<OwnedFd> {
    let flags = (flags | libc::O_NOCTTY | libc::O_CLOEXEC) as usize;
    let fd = control(controlling, TIOCGPTPEER, flags as *mut c_void, "TIOCGPTPEER")?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the other end cannot be opened.
pub fn is_locked(controlling: BorrowedFd<'_>) -> SysResult<bool> {
    get(controlling, TIOCGPTLCK, "TIOCGPTLCK").map(|n| n != 0)
}

/// Says whether the other end cannot be opened.
pub fn set_locked(controlling: BorrowedFd<'_>, locked: bool) -> SysResult<()> {
    set(controlling, TIOCSPTLCK, locked.into(), "TIOCSPTLCK")
}

/// Whether a controlling end is in packet mode.
pub fn has_packets(controlling: BorrowedFd<'_>) -> SysResult<bool> {
    get(controlling, TIOCGPKT, "TIOCGPKT").map(|n| n != 0)
}

/// Puts a controlling end in packet mode, or out of it.
pub fn set_packets(controlling: BorrowedFd<'_>, packets: bool) -> SysResult<()> {
    set(controlling, libc::TIOCPKT, packets.into(), "TIOCPKT")
}

/// Whether nobody else may open this end.
pub fn is_exclusive(fd: BorrowedFd<'_>) -> SysResult<bool> {
    get(fd, TIOCGEXCL, "TIOCGEXCL").map(|n| n != 0)
}

/// Keeps others from opening this end.
pub fn set_exclusive(fd: BorrowedFd<'_>) -> SysResult<()> {
    control(fd, libc::TIOCEXCL, std::ptr::null_mut(), "TIOCEXCL").map(drop)
}

/// Attributes of the terminal, by either end.
pub fn attributes(fd: BorrowedFd<'_>) -> SysResult<Termios> {
    let mut value: Termios = [0; 44];
    control(fd, TCGETS2, value.as_mut_ptr().cast(), "TCGETS2")?;
    Ok(value)
}

/// Sets the attributes at once, by either end.
pub fn set_attributes(fd: BorrowedFd<'_>, value: &Termios) -> SysResult<()> {
    let mut value = *value;
    control(fd, TCSETS2, value.as_mut_ptr().cast(), "TCSETS2").map(drop)
}

/// Its size.
pub fn window(fd: BorrowedFd<'_>) -> SysResult<Window> {
    let mut value: Window = [0; 4];
    control(fd, libc::TIOCGWINSZ, value.as_mut_ptr().cast(), "TIOCGWINSZ")?;
    Ok(value)
}

/// Sets its size.
pub fn set_window(fd: BorrowedFd<'_>, value: &Window) -> SysResult<()> {
    let mut value = *value;
    control(fd, libc::TIOCSWINSZ, value.as_mut_ptr().cast(), "TIOCSWINSZ").map(drop)
}

/// Session and foreground group of the terminal behind a controlling end, as the caller numbers
/// them; none if it is nobody's controlling terminal.
pub fn session(controlling: BorrowedFd<'_>) -> SysResult<Option<(i32, i32)>> {
    match get(controlling, libc::TIOCGSID, "TIOCGSID") {
        Ok(session) => Ok(Some((session, get(controlling, libc::TIOCGPGRP, "TIOCGPGRP")?))),
        Err(e) if e.code() == libc::ENOTTY => Ok(None),
        Err(e) => Err(e),
    }
}

/// Stops output (TCOOFF) or lets it go on (TCOON), see tcflow(3).
pub fn set_flow(fd: BorrowedFd<'_>, on: bool) -> SysResult<()> {
    let action = if on { libc::TCOON } else { libc::TCOOFF };
    control(fd, libc::TCXONC, action as usize as *mut c_void, "TCXONC").map(drop)
}

/// Puts bytes into the input of the other end as if they had been typed (TIOCSTI). When it returns they
/// have been through the line discipline with the attributes of this moment; what is written to the
/// master goes through it some time later. Needs CAP_SYS_ADMIN.
pub fn feed(peer: BorrowedFd<'_>, bytes: &[u8]) -> SysResult<()> {
    for byte in bytes {
        let at = (&raw const *byte).cast_mut().cast();
        control(peer, libc::TIOCSTI, at, "TIOCSTI")?;
    }
    Ok(())
}

/// What poll(2) says at once, POLLPRI included.
pub fn events(fd: BorrowedFd<'_>) -> SysResult<i16> {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLPRI;
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, which is ours.
    let r = unsafe { libc::poll(&mut entry, 1, 0) };
    check(r.into(), "poll", || format!("fd {}", fd.as_raw_fd()))?;
    Ok(entry.revents)
}
