//! Pseudo terminals whose two ends are in the container.

use super::{Kind, Stage};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, tcgetattr, tcsetattr,
};
use nix::unistd::{getpgid, read, tcgetpgrp, write};
use replicator::sys::pty;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Child, Command, Stdio};

pub const KINDS: &[Kind] = &[
    ("terminal with lines, typed and output", contents),
    ("terminal with its attributes and size", attributes),
    ("terminal in packet mode", packets),
    ("terminal without lines (raw)", raw),
    ("terminal that is locked and was never opened", locked),
    ("terminal whose other end was closed", closed),
    ("terminal that is opened between epochs", late),
    ("terminal that controls a session", controlling),
];

fn open_master() -> File {
    File::options().read(true).write(true).open("/dev/ptmx").expect("a terminal")
}

/// Both ends; reading them does not wait.
fn pair() -> (File, File) {
    let master = open_master();
    pty::set_locked(master.as_fd(), false).expect("unlocked");
    let peer = pty::peer(master.as_fd(), libc::O_RDWR | libc::O_NONBLOCK).expect("its other end");
    (master, File::from(peer))
}

fn ready(fd: impl AsFd, patience: u16) -> PollFlags {
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
    poll(&mut polled, PollTimeout::from(patience)).expect("polled");
    polled[0].revents().expect("known flags")
}

/// What one read gives; none if nothing is there.
fn next(fd: &File) -> Option<Vec<u8>> {
    if !ready(fd, 0).contains(PollFlags::POLLIN) {
        return None;
    }
    let mut bytes = vec![0; 8192];
    let n = read(fd, &mut bytes).expect("read");
    bytes.truncate(n);
    Some(bytes)
}

/// All that is there.
fn all(fd: &File) -> Vec<u8> {
    std::iter::from_fn(|| next(fd)).flatten().collect()
}

fn contents(stage: &Stage) {
    let (mut master, mut peer) = pair();
    master.write_all(b"first\nno end\x04half typet").expect("written");
    peer.write_all(b"a prompt> ").expect("written");
    let mut other = pair();
    stage.first();
    assert_eq!(next(&peer).as_deref(), Some(&b"first\n"[..]), "as it was");
    master.write_all(b"\x7fd").expect("written");
    other.0.write_all(b"one line\nanother\n").expect("written");
    stage.last();
    assert_eq!(next(&peer).as_deref(), Some(&b"no end"[..]));
    assert_eq!(next(&peer), None, "the line is not complete");
    let shown = all(&master);
    let text = String::from_utf8_lossy(&shown);
    assert!(text.contains("first\r\nno end") && text.contains("a prompt> "), "{text:?}");
    master.write_all(b"\x7f!\n").expect("written");
    assert_eq!(next(&peer).as_deref(), Some(&b"half type!\n"[..]));
    assert_eq!(next(&other.1).as_deref(), Some(&b"one line\n"[..]));
    assert_eq!(next(&other.1).as_deref(), Some(&b"another\n"[..]));
    assert_eq!(all(&other.0), b"one line\r\nanother\r\n");
}

fn attributes(stage: &Stage) {
    let (master, peer) = pair();
    let index = pty::index(master.as_fd()).expect("a number");
    let path = format!("/dev/pts/{index}");
    let mut t = tcgetattr(&peer).expect("attributes");
    t.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&peer, SetArg::TCSANOW, &t).expect("set");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o604)).expect("set");
    stage.first();
    t.control_chars[SpecialCharacterIndices::VINTR as usize] = 7;
    t.input_flags.insert(InputFlags::IUTF8);
    tcsetattr(&peer, SetArg::TCSANOW, &t).expect("set");
    pty::set_window(master.as_fd(), &[33, 132, 5, 6]).expect("set");
    let raw = pty::attributes(peer.as_fd()).expect("attributes");
    stage.last();
    assert_eq!(pty::attributes(peer.as_fd()).expect("attributes"), raw);
    assert_eq!(pty::window(peer.as_fd()).expect("a size"), [33, 132, 5, 6]);
    assert_eq!(pty::index(master.as_fd()).expect("a number"), index);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", peer.as_raw_fd())).expect("a link");
    assert_eq!(link.to_str(), Some(path.as_str()));
    assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o604);
    assert_ne!(status(&peer) & libc::O_NONBLOCK, 0);
    assert_eq!(status(&master) & libc::O_NONBLOCK, 0);
}

fn status(file: &File) -> i32 {
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL).expect("flags")
}

fn packets(stage: &Stage) {
    let (master, mut peer) = pair();
    pty::set_packets(master.as_fd(), true).expect("set");
    stage.first();
    peer.write_all(b"output").expect("written");
    stage.last();
    assert!(pty::has_packets(master.as_fd()).expect("asked"));
    assert_eq!(next(&master).as_deref(), Some(&b"\0output"[..]));
    let mut t = tcgetattr(&peer).expect("attributes");
    t.input_flags.remove(InputFlags::IXON);
    tcsetattr(&peer, SetArg::TCSANOW, &t).expect("set");
    // TIOCPKT_NOSTOP
    assert_eq!(next(&master).as_deref(), Some(&[16][..]));
}

fn raw(stage: &Stage) {
    let (mut master, mut peer) = pair();
    let mut t = tcgetattr(&peer).expect("attributes");
    nix::sys::termios::cfmakeraw(&mut t);
    tcsetattr(&peer, SetArg::TCSANOW, &t).expect("set");
    let bytes: Vec<u8> = (0..=255).cycle().take(3000).collect();
    master.write_all(&bytes).expect("written");
    stage.first();
    peer.write_all(&bytes).expect("written");
    master.write_all(b"\x03\x13").expect("written");
    stage.last();
    assert_eq!(all(&peer), [&bytes[..], b"\x03\x13"].concat());
    assert_eq!(all(&master), bytes);
}

fn locked(stage: &Stage) {
    let master = open_master();
    stage.first();
    stage.last();
    assert!(pty::is_locked(master.as_fd()).expect("asked"));
    pty::set_locked(master.as_fd(), false).expect("unlocked");
    assert!(!ready(&master, 0).contains(PollFlags::POLLHUP), "it was never opened");
    let mut peer = File::from(pty::peer(master.as_fd(), libc::O_RDWR).expect("opened"));
    peer.write_all(b"x").expect("written");
    assert_eq!(next(&master).as_deref(), Some(&b"x"[..]));
}

fn closed(stage: &Stage) {
    let (mut master, mut peer) = pair();
    peer.write_all(b"last words").expect("written");
    stage.first();
    drop(peer);
    stage.last();
    assert_eq!(next(&master).as_deref(), Some(&b"last words"[..]));
    assert!(ready(&master, 0).contains(PollFlags::POLLHUP));
    let error = master.read(&mut [0]).expect_err("nobody is there");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

fn late(stage: &Stage) {
    let early = pair();
    stage.first();
    drop(early);
    let (mut master, peer) = pair();
    master.write_all(b"later\n").expect("written");
    stage.last();
    assert_eq!(next(&peer).as_deref(), Some(&b"later\n"[..]));
}

/// A program that answers each line, in a session that the terminal controls.
struct Session {
    master: File,
    child: Child,
}

impl Session {
    fn start(script: &str) -> Self {
        let (master, peer) = pair();
        let peer = OwnedFd::from(peer);
        // What reads its lines must wait for them.
        let flags = nix::fcntl::OFlag::O_RDWR;
        nix::fcntl::fcntl(&peer, nix::fcntl::FcntlArg::F_SETFL(flags)).expect("set");
        let end = || Stdio::from(peer.try_clone().expect("dup"));
        let child = Command::new("setsid")
            // Whoever started us may ignore ^C or the end of its terminal, and a shell cannot change that for itself.
            .args(["-c", "env", "--default-signal=INT,HUP", "sh", "-c", script])
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("setsid starts");
        Self { master, child }
    }

    /// Waits until the terminal shows this.
    fn shows(&self, text: &str) {
        let mut shown = Vec::new();
        assert!(self.has_shown(text, &mut shown, 60_000), "{:?}", String::from_utf8_lossy(&shown));
    }

    /// Reads what it shows until this is there, or nothing new comes for so many milliseconds.
    fn has_shown(&self, text: &str, shown: &mut Vec<u8>, patience: u16) -> bool {
        while !String::from_utf8_lossy(shown).contains(text) {
            if ready(&self.master, patience).is_empty() {
                return false;
            }
            let mut bytes = [0; 256];
            let n = read(&self.master, &mut bytes).expect("read");
            shown.extend_from_slice(&bytes[..n]);
        }
        true
    }
}

fn controlling(stage: &Stage) {
    // The shell ignores what interrupts its foreground group, and so tells of it.
    let script = "trap 'echo interrupted' INT; echo ready; while read x; do echo \"got $x\"; done; \
                  echo over; read y < /dev/null; exit 7";
    let mut early = Session::start(script);
    early.shows("ready");
    stage.first();
    let late = Session::start("echo ready; sh -c 'read x; echo \"child got $x\"'; sleep 600");
    late.shows("ready");
    early.master.write_all(b"one\n").expect("written");
    early.shows("got one");
    stage.last();
    let group =
        getpgid(Some(nix::unistd::Pid::from_raw(early.child.id() as i32))).expect("a group");
    let stat = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    for session in [&early, &late] {
        let text = stat(session.child.id());
        let words: Vec<&str> = text[text.rfind(')').expect("a name") + 2..].split(' ').collect();
        let index = pty::index(session.master.as_fd()).expect("a number");
        assert_eq!(words[4], (136 << 8 | index).to_string(), "its terminal: {text}");
        assert_eq!(words[5], session.child.id().to_string(), "the foreground group: {text}");
    }
    assert_eq!(tcgetpgrp(&early.master).expect("a group"), group);
    early.master.write_all(b"two\n").expect("written");
    early.shows("got two");
    // ^C reaches the foreground group. A shell that is just about to read hears of it, but tells only when
    // the next one ends its read.
    let mut shown = Vec::new();
    for tries in 1.. {
        early.master.write_all(b"\x03").expect("written");
        if early.has_shown("interrupted", &mut shown, 2_000) {
            break;
        }
        assert!(tries < 10, "{:?}", String::from_utf8_lossy(&shown));
    }
    // A child of the leader, born after it had the terminal.
    write(&late.master, b"word\n").expect("written");
    late.shows("child got word");
    // The end of the terminal is the end of the session.
    let Session { master, mut child } = late;
    drop(master);
    let status = child.wait().expect("waited");
    assert!(!status.success(), "SIGHUP: {status}");
    early.child.kill().expect("killed");
    early.child.wait().expect("waited");
}
