//! Unix sockets.

use super::{Kind, Stage};
use nix::sys::socket::sockopt::{PassCred, PeerCredentials, RcvBuf, ReceiveTimeout, SndBuf};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag,
    SockType, UnixAddr, accept, bind, connect, getpeername, getsockname, getsockopt, listen, recv,
    recvfrom, recvmsg, send, sendmsg, sendto, setsockopt, shutdown, socket, socketpair,
};
use replicator::sys::pidfd;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

pub const KINDS: &[Kind] = &[
    ("unix stream pair", pair),
    ("unix seqpacket and datagram pairs with messages", messages),
    ("unix pair half shut", half_shut),
    ("unix pair with a closed peer", closed_peer),
    ("unix connection by path", by_path),
    ("unix connection by abstract name", by_abstract_name),
    ("unix connection whose listener was closed", listener_gone),
    ("unix listener with pending connections", pending),
    ("unix listener opened and closed between epochs", between_epochs),
    ("unix socket whose path was deleted", path_deleted),
    ("unix relative path", relative_path),
    ("unix datagrams with names", datagrams),
    ("unix datagram to a closed peer", datagram_to_closed),
    ("unix descriptors in flight", in_flight),
    ("unix sockets in flight with their own queue", sockets_in_flight),
    ("unix peer credentials", credentials),
    ("unix message credentials", message_credentials),
    ("unix socket options", options),
    ("unix socket without name or peer", idle),
];

fn two(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("a pair")
}

fn one(kind: SockType) -> OwnedFd {
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket")
}

fn say(fd: &impl AsRawFd, text: &[u8]) {
    assert_eq!(send(fd.as_raw_fd(), text, MsgFlags::MSG_NOSIGNAL).expect("sent"), text.len());
}

/// One message, or what there is of a stream.
fn hear(fd: &impl AsRawFd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let n = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).expect("received");
    bytes.truncate(n);
    bytes
}

fn nothing(fd: &impl AsRawFd) {
    let mut bytes = [0; 16];
    let got = recv(fd.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT);
    assert_eq!(got, Err(nix::Error::EAGAIN), "there is nothing to read");
}

fn name(fd: &impl AsRawFd) -> Option<Vec<u8>> {
    bytes_of(&getsockname::<UnixAddr>(fd.as_raw_fd()).expect("a name"))
}

fn peer_name(fd: &impl AsRawFd) -> Option<Vec<u8>> {
    bytes_of(&getpeername::<UnixAddr>(fd.as_raw_fd()).expect("a peer"))
}

fn bytes_of(a: &UnixAddr) -> Option<Vec<u8>> {
    let path = a.path().map(|p| p.as_os_str().as_encoded_bytes().to_vec());
    path.or_else(|| a.as_abstract().map(|n| [b"\0", n].concat()))
}

fn here(file: &str) -> String {
    let directory = std::env::current_dir().expect("a directory");
    directory.join(file).to_str().expect("text").to_owned()
}

fn talk(a: &impl AsRawFd, b: &impl AsRawFd) {
    for (from, to) in [(a.as_raw_fd(), b.as_raw_fd()), (b.as_raw_fd(), a.as_raw_fd())] {
        say(&from, b"are you there");
        assert_eq!(hear(&to), b"are you there");
    }
}

fn pair(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    let long: Vec<u8> = (0..150_000u32).map(|i| (i / 7) as u8).collect();
    say(&a, b"early ");
    stage.first();
    say(&a, b"late");
    setsockopt(&b, SndBuf, &400_000).expect("set");
    say(&b, &long);
    stage.last();
    assert_eq!(hear(&b), b"early late");
    assert!(hear(&a) == long);
    nothing(&a);
    nothing(&b);
    assert_eq!((name(&a), peer_name(&b)), (None, None));
    talk(&a, &b);
    drop(a);
    assert_eq!(hear(&b), b"", "the end");
}

fn messages(stage: &Stage) {
    let seq = two(SockType::SeqPacket);
    let gram = two(SockType::Datagram);
    for (a, _) in [&seq, &gram] {
        say(a, b"one");
        say(a, &[2; 5000]);
    }
    stage.first();
    for (a, b) in [&seq, &gram] {
        assert_eq!(hear(b), b"one");
        say(a, b"three");
        say(b, b"back");
    }
    stage.last();
    for (a, b) in [&seq, &gram] {
        assert_eq!(hear(b), [2; 5000]);
        assert_eq!(hear(b), b"three");
        nothing(b);
        assert_eq!(hear(a), b"back");
        nothing(a);
        talk(a, b);
    }
}

fn half_shut(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    let (c, d) = two(SockType::SeqPacket);
    say(&a, b"the last of a");
    shutdown(a.as_raw_fd(), Shutdown::Write).expect("shut");
    stage.first();
    shutdown(d.as_raw_fd(), Shutdown::Read).expect("shut");
    stage.last();
    assert_eq!(hear(&b), b"the last of a");
    assert_eq!(hear(&b), b"");
    let flags = MsgFlags::MSG_NOSIGNAL;
    assert_eq!(send(a.as_raw_fd(), b"x", flags), Err(nix::Error::EPIPE));
    say(&b, b"on");
    assert_eq!(hear(&a), b"on");
    assert_eq!(send(c.as_raw_fd(), b"x", flags), Err(nix::Error::EPIPE));
    say(&d, b"on");
    assert_eq!(hear(&c), b"on");
}

fn closed_peer(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    let (c, d) = two(SockType::Stream);
    say(&a, b"last words");
    drop(a);
    stage.first();
    say(&c, b"not read by d");
    say(&d, b"read by c");
    drop(d);
    stage.last();
    assert_eq!(hear(&b), b"last words");
    assert_eq!(hear(&b), b"");
    let mut buf = [0; 16];
    assert_eq!(send(b.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL), Err(nix::Error::EPIPE));
    assert_eq!(hear(&c), b"read by c");
    let first = recv(c.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT);
    assert_eq!(first, Err(nix::Error::ECONNRESET), "d had not read all");
    assert_eq!(hear(&c), b"");
}

fn by_path(stage: &Stage) {
    let path = here("by-path");
    let listener = UnixListener::bind(&path).expect("bound");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).expect("set");
    std::os::unix::fs::chown(&path, Some(12), Some(34)).expect("set");
    let connect = || {
        let a = UnixStream::connect(&path).expect("connected");
        (a, listener.accept().expect("accepted").0)
    };
    let (mut a, b) = connect();
    let bound = one(SockType::Stream);
    let own = here("by-path-client");
    bind(bound.as_raw_fd(), &UnixAddr::new(own.as_str()).expect("a name")).expect("bound");
    connect_to(&bound, &path);
    let (server, address) = listener.accept().expect("accepted");
    assert_eq!(address.as_pathname(), Some(own.as_ref()));
    a.write_all(b"first").expect("written");
    stage.first();
    let (mut c, d) = connect();
    c.write_all(b"second").expect("written");
    stage.last();
    let bytes = path.clone().into_bytes();
    for fd in [listener.as_raw_fd(), b.as_raw_fd(), d.as_raw_fd(), server.as_raw_fd()] {
        assert_eq!(name(&fd), Some(bytes.clone()));
    }
    for fd in [&a, &c] {
        assert_eq!((name(fd), peer_name(fd)), (None, Some(bytes.clone())));
    }
    assert_eq!(name(&bound), Some(own.clone().into_bytes()));
    assert_eq!(peer_name(&server), Some(own.clone().into_bytes()));
    assert_eq!((hear(&b), hear(&d)), (b"first".to_vec(), b"second".to_vec()));
    talk(&a, &b);
    talk(&bound, &server);
    let file = std::fs::metadata(&path).expect("there");
    assert!(file.file_type().is_socket());
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid()), (0o640, 12, 34));
    let (e, f) = connect();
    talk(&e, &f);
    assert!(std::fs::metadata(own).expect("there").file_type().is_socket());
}

fn connect_to(fd: &OwnedFd, path: &str) {
    connect(fd.as_raw_fd(), &UnixAddr::new(path).expect("a name")).expect("connected");
}

fn by_abstract_name(stage: &Stage) {
    let address = SocketAddr::from_abstract_name(b"kinds\0with zero").expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("bound");
    let connect = || {
        let a = UnixStream::connect_addr(&address).expect("connected");
        (a, listener.accept().expect("accepted").0)
    };
    let (a, b) = connect();
    stage.first();
    say(&b, b"to a");
    stage.last();
    assert_eq!(name(&b), Some(b"\0kinds\0with zero".to_vec()));
    assert_eq!(peer_name(&a), name(&listener));
    assert_eq!(hear(&a), b"to a");
    talk(&a, &b);
    let (c, d) = connect();
    talk(&c, &d);
    let again = UnixListener::bind_addr(&address).expect_err("the name is taken");
    assert_eq!(again.kind(), std::io::ErrorKind::AddrInUse);
}

fn listener_gone(stage: &Stage) {
    let path = here("listener-gone");
    let listener = UnixListener::bind(&path).expect("bound");
    let a = UnixStream::connect(&path).expect("connected");
    let b = listener.accept().expect("accepted").0;
    let orphan = UnixStream::connect(&path).expect("connected");
    drop(listener.accept().expect("accepted").0);
    stage.first();
    drop(listener);
    std::fs::remove_file(&path).expect("removed");
    // Another socket has the path today.
    let new = UnixListener::bind(&path).expect("bound");
    stage.last();
    let bytes = Some(path.clone().into_bytes());
    assert_eq!(
        (name(&b), peer_name(&a), peer_name(&orphan)),
        (bytes.clone(), bytes.clone(), bytes)
    );
    talk(&a, &b);
    assert_eq!(hear(&orphan), b"");
    let c = UnixStream::connect(&path).expect("connected");
    talk(&c, &new.accept().expect("accepted").0);
    let left: Vec<_> = std::fs::read_dir(".").expect("a directory").flatten().collect();
    assert!(!left.iter().any(|f| f.file_name().to_string_lossy().starts_with(".nilicon")));
}

fn pending(stage: &Stage) {
    let path = here("pending");
    let listener = one(SockType::SeqPacket);
    bind(listener.as_raw_fd(), &UnixAddr::new(path.as_str()).expect("a name")).expect("bound");
    listen(&listener, Backlog::new(2).expect("a number")).expect("listens");
    let asker = || {
        let fd = one(SockType::SeqPacket);
        connect_to(&fd, &path);
        fd
    };
    let first = asker();
    stage.first();
    let second = asker();
    let third = asker();
    stage.last();
    for fd in [&first, &second, &third] {
        assert_eq!(peer_name(fd), Some(path.clone().into_bytes()));
    }
    let late = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK, None);
    let late = late.expect("a socket");
    let address = UnixAddr::new(path.as_str()).expect("a name");
    assert_eq!(connect(late.as_raw_fd(), &address), Err(nix::Error::EAGAIN), "the backlog");
    for fd in [&first, &second, &third] {
        let accepted = owned(accept(listener.as_raw_fd()).expect("accepted"));
        talk(fd, &accepted);
    }
}

fn between_epochs(stage: &Stage) {
    let (old, new) = (here("between-old"), here("between-new"));
    let first = UnixListener::bind(&old).expect("bound");
    let a = UnixStream::connect(&old).expect("connected");
    let b = first.accept().expect("accepted").0;
    stage.first();
    drop((a, b, first));
    std::fs::remove_file(&old).expect("removed");
    let second = UnixListener::bind(&new).expect("bound");
    let c = UnixStream::connect(&new).expect("connected");
    stage.last();
    assert!(UnixStream::connect(&old).is_err());
    let d = second.accept().expect("accepted").0;
    talk(&c, &d);
}

fn path_deleted(stage: &Stage) {
    let path = here("path-deleted");
    let listener = UnixListener::bind(&path).expect("bound");
    let gram = UnixDatagram::bind(here("path-deleted-gram")).expect("bound");
    let sender = UnixDatagram::unbound().expect("made");
    sender.connect(here("path-deleted-gram")).expect("connected");
    stage.first();
    std::fs::remove_file(&path).expect("removed");
    std::fs::remove_file(here("path-deleted-gram")).expect("removed");
    stage.last();
    assert_eq!(name(&listener), Some(path.clone().into_bytes()));
    assert!(!std::path::Path::new(&path).exists());
    assert_eq!(peer_name(&sender), Some(here("path-deleted-gram").into_bytes()));
    say(&sender, b"by connection");
    assert_eq!(hear(&gram), b"by connection");
}

fn relative_path(stage: &Stage) {
    let listener = UnixListener::bind("relative").expect("bound");
    let a = UnixStream::connect("relative").expect("connected");
    let b = listener.accept().expect("accepted").0;
    stage.first();
    stage.last();
    assert_eq!(name(&listener), Some(b"relative".to_vec()));
    assert_eq!(peer_name(&a), Some(b"relative".to_vec()));
    talk(&a, &b);
    let c = UnixStream::connect(here("relative")).expect("connected");
    talk(&c, &listener.accept().expect("accepted").0);
}

fn datagrams(stage: &Stage) {
    let path = here("datagrams");
    let receiver = UnixDatagram::bind(&path).expect("bound");
    let known = one(SockType::Datagram);
    bind(known.as_raw_fd(), &UnixAddr::new_abstract(b"known").expect("a name")).expect("bound");
    let connected = UnixDatagram::unbound().expect("made");
    connected.connect(&path).expect("connected");
    let to = UnixAddr::new(path.as_str()).expect("a name");
    let gone_path = here("datagrams-gone");
    let gone = UnixDatagram::bind(&gone_path).expect("bound");
    sendto(known.as_raw_fd(), b"known", &to, MsgFlags::empty()).expect("sent");
    stage.first();
    say(&connected, b"nameless");
    gone.send_to(b"from the gone", &path).expect("sent");
    drop(gone);
    std::fs::remove_file(&gone_path).expect("removed");
    sendto(known.as_raw_fd(), b"again", &to, MsgFlags::empty()).expect("sent");
    stage.last();
    let expected = [
        (&b"known"[..], Some(b"\0known".to_vec())),
        (b"nameless", None),
        (b"from the gone", Some(gone_path.into_bytes())),
        (b"again", Some(b"\0known".to_vec())),
    ];
    for (text, from) in expected {
        let mut bytes = [0; 64];
        let (n, address) =
            recvfrom::<UnixAddr>(receiver.as_raw_fd(), &mut bytes).expect("received");
        assert_eq!((&bytes[..n], address.and_then(|a| bytes_of(&a))), (text, from));
    }
    nothing(&receiver);
    assert_eq!(peer_name(&connected), Some(path.clone().into_bytes()));
    say(&connected, b"on");
    assert_eq!(hear(&receiver), b"on");
    sendto(known.as_raw_fd(), b"on", &to, MsgFlags::empty()).expect("sent");
    assert_eq!(hear(&receiver), b"on");
}

fn datagram_to_closed(stage: &Stage) {
    let path = here("datagram-closed");
    let receiver = UnixDatagram::bind(&path).expect("bound");
    let sender = UnixDatagram::unbound().expect("made");
    sender.connect(&path).expect("connected");
    let (a, b) = two(SockType::Datagram);
    say(&b, b"left behind");
    stage.first();
    drop(receiver);
    drop(b);
    stage.last();
    let refused = Err(nix::Error::ECONNREFUSED);
    assert_eq!(send(sender.as_raw_fd(), b"x", MsgFlags::empty()), refused);
    assert_eq!(hear(&a), b"left behind");
    assert_eq!(send(a.as_raw_fd(), b"x", MsgFlags::empty()), refused);
}

/// A number that the kernel just gave us.
fn owned(number: RawFd) -> OwnedFd {
    let me = pidfd::open(std::process::id() as i32).expect("a handle");
    let copy = pidfd::get_fd(me.as_fd(), number).expect("a copy");
    nix::unistd::close(number).expect("closed");
    copy
}

fn give(socket: &impl AsRawFd, text: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let iov = [IoSlice::new(text)];
    let sent = sendmsg::<UnixAddr>(socket.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None);
    assert_eq!(sent.expect("sent"), text.len());
}

/// What is read at once, and the descriptors that come with it.
fn take(socket: &impl AsRawFd) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = [0; 256];
    let mut space = nix::cmsg_space!([RawFd; 16]);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags);
    let got = got.expect("received");
    let mut fds = Vec::new();
    for control in got.cmsgs().expect("whole") {
        if let ControlMessageOwned::ScmRights(all) = control {
            fds.extend(all.into_iter().map(owned));
        }
    }
    let n = got.bytes;
    (bytes[..n].to_vec(), fds)
}

fn in_flight(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    let (c, d) = two(SockType::Datagram);
    let mut shared = std::fs::File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open("in-flight")
        .expect("a file");
    shared.write_all(b"0123456789").expect("written");
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
    give(&a, b"a file and a pipe", &[shared.as_raw_fd(), read.as_raw_fd()]);
    drop(read);
    stage.first();
    nix::unistd::write(&write, b"through the pipe").expect("written");
    say(&a, b" and words");
    give(&c, b"one", &[write.as_raw_fd()]);
    give(&c, b"two", &[shared.as_raw_fd(), shared.as_raw_fd()]);
    drop(write);
    shared.seek(SeekFrom::Start(3)).expect("sought");
    stage.last();
    let (text, fds) = take(&b);
    assert_eq!((text.as_slice(), fds.len()), (&b"a file and a pipe"[..], 2));
    assert_eq!(take(&b).0, b" and words");
    let mut file = std::fs::File::from(fds[0].try_clone().expect("a copy"));
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "3456789");
    assert_eq!(shared.stream_position().expect("a position"), 10, "one description");
    let mut buf = [0; 64];
    let n = nix::unistd::read(&fds[1], &mut buf).expect("read");
    assert_eq!(&buf[..n], b"through the pipe");
    let (text, writers) = take(&d);
    assert_eq!((text.as_slice(), writers.len()), (&b"one"[..], 1));
    nix::unistd::write(&writers[0], b"once more").expect("written");
    let n = nix::unistd::read(&fds[1], &mut buf).expect("read");
    assert_eq!(&buf[..n], b"once more");
    drop(writers);
    assert_eq!(nix::unistd::read(&fds[1], &mut buf).expect("read"), 0, "nobody else writes");
    assert_eq!(take(&d).1.len(), 2);
}

fn sockets_in_flight(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    let (c, d) = two(SockType::Stream);
    let (e, f) = two(SockType::Datagram);
    give(&c, b"inner", &[e.as_raw_fd()]);
    say(&f, b"to e");
    drop(e);
    stage.first();
    // d travels through b, and e through d.
    give(&a, b"outer", &[d.as_raw_fd()]);
    drop(d);
    stage.last();
    let (text, mut fds) = take(&b);
    assert_eq!((text.as_slice(), fds.len()), (&b"outer"[..], 1));
    let d = fds.remove(0);
    let (text, mut fds) = take(&d);
    assert_eq!((text.as_slice(), fds.len()), (&b"inner"[..], 1));
    let e = fds.remove(0);
    assert_eq!(hear(&e), b"to e");
    talk(&e, &f);
    talk(&c, &d);
}

fn credentials(stage: &Stage) {
    let me = std::process::id() as i32;
    let (a, _b) = two(SockType::Stream);
    let path = here("credentials");
    let listener = UnixListener::bind(&path).expect("bound");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).expect("set");
    std::fs::set_permissions(here("."), PermissionsExt::from_mode(0o755)).expect("set");
    // Another user connects.
    let exe = std::env::current_exe().expect("a path");
    let mut child = Command::new(exe)
        .args([CLIENT, "--exact", "--nocapture", "--test-threads=1"])
        .env(CLIENT, &path)
        .uid(4711)
        .gid(4712)
        .spawn()
        .expect("a child");
    let server = listener.accept().expect("accepted").0;
    assert_eq!(hear_when_there(&server), b"ready");
    stage.first();
    stage.last();
    let seen = |fd: BorrowedFd<'_>| {
        let c = getsockopt(&fd, PeerCredentials).expect("credentials");
        (c.pid(), c.uid(), c.gid())
    };
    assert_eq!(seen(a.as_fd()), (me, 0, 0));
    assert_eq!(seen(server.as_fd()), (child.id() as i32, 4711, 4712));
    say(&server, b"who am I to you");
    let answer = String::from_utf8(hear_when_there(&server)).expect("text");
    assert_eq!(answer, format!("{me} 0 0"));
    child.wait().expect("its end");
}

fn hear_when_there(socket: &UnixStream) -> Vec<u8> {
    let mut bytes = [0; 64];
    let n = (&mut &*socket).read(&mut bytes).expect("read");
    bytes[..n].to_vec()
}

/// The test, and the variable, that is the program of a child.
pub const CLIENT: &str = "unix_client";

/// A client of another user: connects, and tells who the other side is when asked.
pub fn client(path: &str) {
    let socket = UnixStream::connect(path).expect("connected");
    say(&socket, b"ready");
    let asked = hear_when_there(&socket);
    if asked.is_empty() {
        // The original is being killed, and the other side went first.
        return;
    }
    assert_eq!(asked, b"who am I to you");
    let c = getsockopt(&socket, PeerCredentials).expect("credentials");
    say(&socket, format!("{} {} {}", c.pid(), c.uid(), c.gid()).as_bytes());
}

fn message_credentials(stage: &Stage) {
    let (a, b) = two(SockType::Datagram);
    setsockopt(&b, PassCred, &true).expect("set");
    say(&a, b"from me");
    stage.first();
    stage.last();
    assert!(getsockopt(&b, PassCred).expect("got"));
    let mut bytes = [0; 64];
    let mut space = nix::cmsg_space!(libc::ucred);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg::<UnixAddr>(b.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty());
    let mut found = None;
    for control in got.expect("received").cmsgs().expect("whole") {
        if let ControlMessageOwned::ScmCredentials(c) = control {
            found = Some((c.pid(), c.uid(), c.gid()));
        }
    }
    assert_eq!(found, Some((std::process::id() as i32, 0, 0)));
}

fn options(stage: &Stage) {
    let (a, b) = two(SockType::Stream);
    setsockopt(&a, SndBuf, &100_000).expect("set");
    setsockopt(&a, RcvBuf, &50_000).expect("set");
    let time = nix::sys::time::TimeVal::new(3, 500_000);
    setsockopt(&a, ReceiveTimeout, &time).expect("set");
    stage.first();
    setsockopt(&b, PassCred, &true).expect("set");
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&b, nix::fcntl::FcntlArg::F_SETFL(flags)).expect("set");
    stage.last();
    assert_eq!(getsockopt(&a, SndBuf).expect("got"), 200_000);
    assert_eq!(getsockopt(&a, RcvBuf).expect("got"), 100_000);
    assert_eq!(getsockopt(&a, ReceiveTimeout).expect("got"), time);
    assert!(getsockopt(&b, PassCred).expect("got") && !getsockopt(&a, PassCred).expect("got"));
    let flag = |fd| {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).expect("flags");
        flags & libc::O_NONBLOCK != 0
    };
    assert!(flag(&b) && !flag(&a));
}

fn idle(stage: &Stage) {
    let stream = one(SockType::Stream);
    let bound = one(SockType::Stream);
    bind(bound.as_raw_fd(), &UnixAddr::new_abstract(b"idle").expect("a name")).expect("bound");
    stage.first();
    let gram = one(SockType::Datagram);
    stage.last();
    assert_eq!((name(&stream), name(&gram)), (None, None));
    assert_eq!(name(&bound), Some(b"\0idle".to_vec()));
    assert_eq!(send(gram.as_raw_fd(), b"x", MsgFlags::empty()), Err(nix::Error::ENOTCONN));
    listen(&bound, Backlog::new(5).expect("a number")).expect("listens");
    connect(stream.as_raw_fd(), &UnixAddr::new_abstract(b"idle").expect("a name"))
        .expect("connected");
    talk(&stream, &owned(accept(bound.as_raw_fd()).expect("accepted")));
}
