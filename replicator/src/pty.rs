//! What waits in a pseudo terminal: taken out, and put back as if it had never been away.
//!
//! A terminal gives nothing away but by reading. So what waits is read, while nothing else runs,
//! and written again in a mode in which no character means anything: the same for a checkpoint,
//! where it goes back at once, and for a restore. Lines that are complete stay so, and what was
//! typed of the next can still be corrected.

use crate::image::terminal::{Line, OtherEnd, Terminal};
use crate::sys::pty::{self, Termios};
use crate::sys::{SysError, SysResult};
use nix::unistd::{read, write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Offsets in [`Termios`].
const IFLAG: usize = 0;
const OFLAG: usize = 4;
const LFLAG: usize = 12;
const CHARACTERS: usize = 17;
const CHARACTER_COUNT: usize = 19;
/// How long the kernel may take to move bytes from one of its buffers to the next.
const PATIENCE: Duration = Duration::from_secs(2);

fn flags(t: &Termios, at: usize) -> u32 {
    u32::from_ne_bytes(t[at..at + 4].try_into().expect("four bytes"))
}

fn set_flags(t: &mut Termios, at: usize, value: u32) {
    t[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn is_canonical(t: &Termios) -> bool {
    flags(t, LFLAG) & libc::ICANON != 0
}

/// The same without any character or flag that changes what is written.
fn plain(t: &Termios, local: u32) -> Termios {
    let mut plain = *t;
    set_flags(&mut plain, IFLAG, 0);
    set_flags(&mut plain, OFLAG, 0);
    set_flags(&mut plain, LFLAG, local);
    plain[CHARACTERS..CHARACTERS + CHARACTER_COUNT].fill(0);
    plain
}

/// The attributes of an image; those of a fresh terminal if there are none.
pub(crate) fn attributes(t: &Terminal, fresh: Termios) -> Termios {
    t.attributes.as_slice().try_into().unwrap_or(fresh)
}

/// The other end, also of a terminal that is locked; reading and writing never wait.
pub(crate) fn open_peer(master: BorrowedFd<'_>, locked: bool) -> SysResult<OwnedFd> {
    if locked {
        pty::set_locked(master, false)?;
    }
    let peer = pty::peer(master, libc::O_RDWR | libc::O_NONBLOCK);
    if locked {
        pty::set_locked(master, true)?;
    }
    peer
}

/// Takes out what waits at both ends. Nothing else may run that has either.
/// `stood` says whether output stood still.
pub(crate) fn drain(
    master: BorrowedFd<'_>,
    peer: BorrowedFd<'_>,
    t: &mut Terminal,
    termios: &Termios,
) -> SysResult<()> {
    let may_stand = pty::events(peer)? & libc::POLLOUT == 0;
    let canonical = is_canonical(termios);
    if canonical {
        while let Some(bytes) = read_some(peer)? {
            let end_of_file = !ends_line(termios, &bytes);
            t.lines.push(Line { bytes, end_of_file });
        }
        let mut raw = *termios;
        set_flags(&mut raw, LFLAG, flags(termios, LFLAG) & !libc::ICANON);
        pty::set_attributes(peer, &raw)?;
    }
    while let Some(bytes) = read_some(peer)? {
        t.typed.extend(bytes);
    }
    if canonical {
        pty::set_attributes(peer, termios)?;
    }
    // Last, as what was typed may have been echoed just now.
    if t.packets {
        pty::set_packets(master, false)?;
    }
    while let Some(bytes) = read_some(master)? {
        t.output.extend(bytes);
    }
    t.stopped = may_stand && pty::events(peer)? & libc::POLLOUT == 0;
    if t.stopped {
        // In this order, whichever way it was stopped in.
        pty::set_flow(peer, false)?;
        pty::set_flow(peer, true)?;
    }
    Ok(())
}

/// Whether a line was ended by a character of its own.
fn ends_line(t: &Termios, line: &[u8]) -> bool {
    let Some(last) = line.last() else { return false };
    let character = |index: usize| t[CHARACTERS + index];
    let more = [character(libc::VEOL), character(libc::VEOL2)];
    *last == b'\n' || (*last != 0 && more.contains(last))
}

/// One read of what is there; none if nothing is.
fn read_some(fd: BorrowedFd<'_>) -> SysResult<Option<Vec<u8>>> {
    // Moves what is on its way into the buffer that is read.
    if pty::events(fd)? & libc::POLLIN == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; 8192];
    match read(fd, &mut bytes) {
        Ok(n) => {
            bytes.truncate(n);
            Ok(Some(bytes))
        }
        // Nothing; or the other end was closed and nothing is left.
        Err(nix::Error::EAGAIN | nix::Error::EIO) => Ok(None),
        Err(e) => Err(SysError::errno("read", "a terminal", e as i32)),
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> SysResult<()> {
    let failed = |e: nix::Error| SysError::errno("write", "a terminal", e as i32);
    let begin = Instant::now();
    while !bytes.is_empty() {
        if pty::events(fd)? & libc::POLLOUT == 0 {
            if begin.elapsed() > PATIENCE {
                return Err(failed(nix::Error::EAGAIN));
            }
            std::thread::yield_now();
            continue;
        }
        match write(fd, &bytes[..bytes.len().min(256)]) {
            Ok(n) => bytes = &bytes[n..],
            Err(nix::Error::EAGAIN) => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(())
}

/// Puts in what waits at both ends, and sets attributes and modes.
pub(crate) fn fill(
    master: BorrowedFd<'_>,
    peer: BorrowedFd<'_>,
    t: &Terminal,
    termios: &Termios,
) -> SysResult<()> {
    if !t.output.is_empty() {
        pty::set_attributes(peer, &plain(termios, 0))?;
        write_all(peer, &t.output)?;
    }
    if !t.lines.is_empty() || !t.typed.is_empty() {
        // Ends a line where the end-of-file character did: a byte that none of them has.
        let used = |b: &u8| t.typed.contains(b) || t.lines.iter().any(|l| l.bytes.contains(b));
        let end = (1..=u8::MAX).filter(|b| *b != b'\n').find(|b| !used(b)).unwrap_or(4);
        let mut mode = plain(termios, if is_canonical(termios) { libc::ICANON } else { 0 });
        if is_canonical(termios) {
            mode[CHARACTERS + libc::VEOF] = end;
            for other in [libc::VEOL, libc::VEOL2] {
                mode[CHARACTERS + other] = termios[CHARACTERS + other];
            }
        }
        pty::set_attributes(peer, &mode)?;
        for line in &t.lines {
            pty::feed(peer, &line.bytes)?;
            if line.end_of_file {
                pty::feed(peer, &[end])?;
            }
        }
        pty::feed(peer, &t.typed)?;
    }
    if t.stopped {
        stop(peer, termios)?;
    }
    pty::set_attributes(peer, termios)?;
    if t.packets {
        pty::set_packets(master, true)?;
    }
    Ok(())
}

/// Stops output as it was: by the character for it, so that another lets it go on.
fn stop(peer: BorrowedFd<'_>, termios: &Termios) -> SysResult<()> {
    if flags(termios, IFLAG) & libc::IXON == 0 {
        return pty::set_flow(peer, false);
    }
    const STOP: u8 = 0x13;
    let canonical = flags(termios, LFLAG) & libc::ICANON;
    let mut mode = plain(termios, canonical);
    set_flags(&mut mode, IFLAG, libc::IXON);
    mode[CHARACTERS + libc::VSTOP] = STOP;
    pty::set_attributes(peer, &mode)?;
    pty::feed(peer, &[STOP])
}

/// What its other end is like, given whether anybody is known to have it.
pub(crate) fn other_end(master: BorrowedFd<'_>, is_open: bool) -> SysResult<OtherEnd> {
    Ok(match is_open {
        true => OtherEnd::Open,
        false if pty::events(master)? & libc::POLLHUP != 0 => OtherEnd::Closed,
        false => OtherEnd::New,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let options = File::options().read(true).write(true).open("/dev/ptmx");
        let master = OwnedFd::from(options.expect("a terminal"));
        pty::set_locked(master.as_fd(), false).expect("unlocked");
        let peer = open_peer(master.as_fd(), false).expect("its other end");
        (master, peer)
    }

    /// Takes everything out and puts it into another terminal.
    fn moved(from: &(OwnedFd, OwnedFd), t: &mut Terminal) -> (OwnedFd, OwnedFd) {
        let (master, peer) = (from.0.as_fd(), from.1.as_fd());
        let termios = pty::attributes(master).expect("attributes");
        drain(master, peer, t, &termios).expect("drained");
        let to = pair();
        fill(to.0.as_fd(), to.1.as_fd(), t, &termios).expect("filled");
        to
    }

    fn next(fd: &OwnedFd) -> Option<Vec<u8>> {
        read_some(fd.as_fd()).expect("read")
    }

    #[test]
    fn lines_stay_lines_and_what_is_typed_can_be_corrected() {
        let from = pair();
        // The last word is corrected, two lines are ended by ^D, and one has a ^C that was quoted.
        write_all(from.0.as_fd(), b"one\nno end\x04\x04a\x16\x03b\nhalf typet").expect("written");
        let mut t = Terminal::default();
        let to = moved(&from, &mut t);
        assert_eq!((t.lines.len(), t.typed.as_slice()), (4, &b"half typet"[..]));
        let echoed = next(&to.0).expect("an echo");
        assert!(echoed.starts_with(b"one\r\nno end"), "{echoed:?}");
        assert_eq!(next(&to.1).as_deref(), Some(&b"one\n"[..]));
        assert_eq!(next(&to.1).as_deref(), Some(&b"no end"[..]));
        assert_eq!(next(&to.1).as_deref(), Some(&b""[..]), "the end of the file");
        assert_eq!(next(&to.1).as_deref(), Some(&b"a\x03b\n"[..]));
        assert_eq!(next(&to.1), None, "it is not complete");
        write_all(to.0.as_fd(), b"\x7fd\n").expect("written");
        assert_eq!(next(&to.1).as_deref(), Some(&b"half typed\n"[..]));
    }

    #[test]
    fn output_is_moved_byte_for_byte_and_what_is_stopped_stays_so() {
        let from = pair();
        let bytes: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        let mut raw = pty::attributes(from.1.as_fd()).expect("attributes");
        set_flags(&mut raw, OFLAG, 0);
        pty::set_attributes(from.1.as_fd(), &raw).expect("set");
        write_all(from.1.as_fd(), &bytes).expect("written");
        write_all(from.0.as_fd(), b"\x13").expect("^S");
        let mut t = Terminal::default();
        let to = moved(&from, &mut t);
        assert!(t.stopped);
        assert_eq!(pty::events(to.1.as_fd()).expect("events") & libc::POLLOUT, 0);
        let mut got = Vec::new();
        while let Some(more) = next(&to.0) {
            got.extend(more);
        }
        assert!(got == bytes, "{} bytes", got.len());
        write_all(to.0.as_fd(), b"\x11").expect("^Q");
        write_all(to.1.as_fd(), b"goes on").expect("it goes on");
    }

    #[test]
    fn without_lines_nothing_is_added_to_what_was_typed() {
        let from = pair();
        let mut raw = pty::attributes(from.1.as_fd()).expect("attributes");
        set_flags(&mut raw, LFLAG, 0);
        set_flags(&mut raw, IFLAG, 0);
        pty::set_attributes(from.1.as_fd(), &raw).expect("set");
        write_all(from.0.as_fd(), b"\0\x03\x04\x13\r\n\xff").expect("written");
        let mut t = Terminal { packets: true, ..Terminal::default() };
        let to = moved(&from, &mut t);
        assert_eq!(next(&to.1).as_deref(), Some(&b"\0\x03\x04\x13\r\n\xff"[..]));
        assert_eq!(pty::attributes(to.0.as_fd()).expect("attributes"), raw);
        assert!(pty::has_packets(to.0.as_fd()).expect("asked"));
    }
}
