//! Files, pipes, locks, and descriptors that tell of events.

use super::{Kind, Stage};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::SignalFd;
use nix::sys::stat::{Mode, fstat};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::{mkfifo, pipe2};
use replicator::sys::{inotify, locks, pidfd};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::{Child, Command};
use std::time::Duration;

pub const KINDS: &[Kind] = &[
    ("files by path with their offsets", by_path),
    ("directory with its offset", directory),
    ("file opened with O_PATH", path_only),
    ("file deleted while open", deleted),
    ("file without a name (O_TMPFILE)", temporary),
    ("memfd with seals", memfd),
    ("null, zero, full and random", devices),
    ("pipe in packet mode", packets),
    ("pipe with its size", sizes),
    ("named pipe with contents", fifo),
    ("signalfd", signals),
    ("inotify", watches),
    ("pidfd", handles),
    ("timerfd with all flags", timers),
    ("namespaces", namespaces),
    ("flock", flocks),
    ("POSIX locks", posix_locks),
    ("locks of a description", open_locks),
    ("lease", lease),
    ("owner and signal of a descriptor", owner),
];

fn make(name: &str) -> File {
    let mut options = File::options();
    options.create(true).truncate(true).read(true).write(true).open(name).expect("a file")
}

fn flags(fd: impl AsFd) -> i32 {
    fcntl(fd, FcntlArg::F_GETFL).expect("flags")
}

fn text(file: &mut File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    text
}

fn by_path(stage: &Stage) {
    let mut file = make("by-path-file");
    file.write_all(b"0123456789").expect("written");
    let mut log = File::options().append(true).open("by-path-file").expect("opened");
    stage.first();
    file.seek(SeekFrom::Start(7)).expect("sought");
    log.write_all(b"ab").expect("written");
    let closed = make("by-path-closed");
    drop(closed);
    stage.last();
    assert_eq!(text(&mut file), "789ab");
    log.write_all(b"!").expect("written");
    assert_eq!(text(&mut file), "!");
    assert!(flags(&log) & libc::O_APPEND != 0 && flags(&file) & libc::O_APPEND == 0);
}

fn directory(stage: &Stage) {
    std::fs::create_dir("directory").expect("made");
    // More than is listed at once.
    for i in 0..3000 {
        make(&format!("directory/a-file-with-a-long-name-{i}"));
    }
    let mut listing = std::fs::read_dir("directory").expect("opened");
    let mut seen = std::collections::BTreeSet::new();
    let mut next = || listing.next().map(|e| e.expect("an entry").file_name());
    seen.extend((0..3).map_while(|_| next()));
    stage.first();
    seen.extend((0..3).map_while(|_| next()));
    stage.last();
    while let Some(name) = next() {
        assert!(seen.insert(name), "listed twice");
    }
    assert_eq!(seen.len(), 3000);
}

fn path_only(stage: &Stage) {
    make("path-only").write_all(b"x").expect("written");
    std::os::unix::fs::symlink("path-only", "path-only-link").expect("linked");
    let file = open("path-only", OFlag::O_PATH, Mode::empty()).expect("opened");
    let link = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let link = open("path-only-link", link, Mode::empty()).expect("opened");
    stage.first();
    stage.last();
    assert!(flags(&file) & libc::O_PATH != 0);
    assert_eq!(nix::unistd::read(&file, &mut [0]), Err(nix::Error::EBADF));
    let inode = std::fs::metadata("path-only").expect("there").ino();
    assert_eq!(fstat(&file).expect("stat").st_ino, inode);
    let kind = fstat(&link).expect("stat").st_mode & libc::S_IFMT;
    assert_eq!(kind, libc::S_IFLNK);
}

fn deleted(stage: &Stage) {
    let mut file = make("deleted");
    file.write_all(b"nobody finds me").expect("written");
    file.set_permissions(PermissionsExt::from_mode(0o600)).expect("set");
    std::fs::remove_file("deleted").expect("removed");
    // A second description of the same file.
    let mut reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("opened");
    stage.first();
    file.write_all(b", still").expect("written");
    reader.seek(SeekFrom::Start(7)).expect("sought");
    stage.last();
    assert_eq!(text(&mut reader), "finds me, still");
    file.write_all(b"!").expect("written");
    assert_eq!(text(&mut reader), "!");
    let stat = fstat(&file).expect("stat");
    assert_eq!((stat.st_nlink, stat.st_mode & 0o7777, stat.st_size), (0, 0o600, 23));
}

fn temporary(stage: &Stage) {
    let mut options = File::options();
    let mut file =
        options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(".").expect("made");
    stage.first();
    file.write_all(&vec![7; 100_000]).expect("written");
    file.set_len(200_000).expect("set");
    stage.last();
    assert_eq!(file.stream_position().expect("a position"), 100_000);
    file.rewind().expect("sought");
    let mut all = Vec::new();
    file.read_to_end(&mut all).expect("read");
    assert!(all.len() == 200_000 && all[..100_000].iter().all(|b| *b == 7));
    assert!(all[100_000..].iter().all(|b| *b == 0));
}

fn memfd(stage: &Stage) {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create("contents", flags).expect("made"));
    let plain = memfd_create("plain", MFdFlags::MFD_CLOEXEC).expect("made");
    file.write_all(b"sealed in").expect("written");
    stage.first();
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    stage.last();
    assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS).expect("seals"), seals.bits());
    assert_eq!(fcntl(&plain, FcntlArg::F_GET_SEALS).expect("seals"), SealFlag::F_SEAL_SEAL.bits());
    assert_eq!(file.stream_position().expect("a position"), 9);
    assert!(file.write_all(b"x").is_err());
    file.rewind().expect("sought");
    assert_eq!(text(&mut file), "sealed in");
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("a link");
    assert_eq!(link.to_str(), Some("/memfd:contents (deleted)"));
}

fn devices(stage: &Stage) {
    let open = |name: &str| File::options().read(true).write(true).open(name).expect("opened");
    let mut null = open("/dev/null");
    let mut zero = open("/dev/zero");
    stage.first();
    let mut full = open("/dev/full");
    let mut random = open("/dev/urandom");
    stage.last();
    assert_eq!(text(&mut null), "");
    let mut bytes = [1; 4];
    zero.read_exact(&mut bytes).expect("read");
    assert_eq!(bytes, [0; 4]);
    let error = full.write(b"x").expect_err("full");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let mut bytes = [0; 32];
    random.read_exact(&mut bytes).expect("read");
    assert_ne!(bytes, [0; 32]);
}

#[track_caller]
fn read(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 200_000];
    let n = nix::unistd::read(fd, &mut bytes).expect("read");
    bytes.truncate(n);
    bytes
}

fn write(fd: &OwnedFd, bytes: &[u8]) {
    assert_eq!(nix::unistd::write(fd, bytes).expect("written"), bytes.len());
}

fn packets(stage: &Stage) {
    let (a, b) = pipe2(OFlag::O_DIRECT | OFlag::O_NONBLOCK).expect("a pipe");
    write(&b, b"one");
    stage.first();
    write(&b, &[2; 4000]);
    write(&b, b"three");
    stage.last();
    assert!(flags(&b) & libc::O_DIRECT != 0);
    let mut short = [0; 2];
    assert_eq!(nix::unistd::read(&a, &mut short), Ok(2), "the rest of a packet is lost");
    assert_eq!(read(&a), [2; 4000]);
    assert_eq!(read(&a), b"three");
    write(&b, b"x");
    write(&b, b"y");
    assert_eq!(read(&a), b"x");
}

fn sizes(stage: &Stage) {
    let (a, b) = pipe2(OFlag::O_NONBLOCK).expect("a pipe");
    let (c, d) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    fcntl(&a, FcntlArg::F_SETPIPE_SZ(1 << 18)).expect("set");
    let long: Vec<u8> = (0..150_000u32).map(|i| (i / 3) as u8).collect();
    write(&b, &long);
    stage.first();
    fcntl(&c, FcntlArg::F_SETPIPE_SZ(4096)).expect("set");
    drop(d);
    stage.last();
    assert_eq!(fcntl(&b, FcntlArg::F_GETPIPE_SZ), Ok(1 << 18));
    assert_eq!(fcntl(&c, FcntlArg::F_GETPIPE_SZ), Ok(4096));
    assert!(read(&a) == long);
    assert_eq!(nix::unistd::read(&a, &mut [0]), Err(nix::Error::EAGAIN));
    assert_eq!(read(&c), b"", "nobody writes any more");
}

fn fifo(stage: &Stage) {
    mkfifo("fifo", Mode::from_bits_truncate(0o600)).expect("made");
    let a = open("fifo", OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
        .expect("opened");
    let b = open("fifo", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()).expect("opened");
    write(&b, b"in the ");
    stage.first();
    write(&b, b"fifo");
    let both = open("fifo", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).expect("opened");
    stage.last();
    assert_eq!(read(&a), b"in the fifo");
    assert_eq!(nix::unistd::read(&a, &mut [0]), Err(nix::Error::EAGAIN));
    write(&both, b"x");
    assert_eq!(read(&a), b"x");
    drop((b, both));
    // A child that is being started holds copies for a moment.
    while nix::unistd::read(&a, &mut [0]) == Err(nix::Error::EAGAIN) {
        std::thread::yield_now();
    }
    assert_eq!(read(&a), b"");
}

fn signals(stage: &Stage) {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR2);
    mask.thread_block().expect("blocked");
    let fd = SignalFd::new(&mask).expect("made");
    stage.first();
    raise(Signal::SIGUSR2).expect("raised");
    stage.last();
    let info = fd.read_signal().expect("read").expect("a signal");
    assert_eq!(info.ssi_signo, Signal::SIGUSR2 as u32);
    let line = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()));
    let mask = format!("sigmask:\t{:016x}", 1 << (Signal::SIGUSR2 as i32 - 1));
    assert!(line.expect("fdinfo").contains(&mask));
}

/// Number and flags of each event that waits.
fn events(instance: &OwnedFd) -> Vec<(i32, u32)> {
    let mut bytes = [0; 4096];
    let n = match nix::unistd::read(instance, &mut bytes) {
        Err(nix::Error::EAGAIN) => 0,
        other => other.expect("read"),
    };
    let mut rest = &bytes[..n];
    let mut all = Vec::new();
    while let Some(head) = rest.first_chunk::<16>() {
        let word = |i: usize| u32::from_ne_bytes(head[i..i + 4].try_into().expect("four bytes"));
        all.push((word(0) as i32, word(4)));
        rest = &rest[16 + word(12) as usize..];
    }
    all
}

fn watches(stage: &Stage) {
    for name in ["watched-a", "watched-b", "watched-c"] {
        std::fs::create_dir(name).expect("made");
    }
    let instance = inotify::new().expect("made");
    let add = |path, mask| inotify::add(instance.as_fd(), path, mask).expect("watched");
    let a = add("watched-a", libc::IN_CREATE | libc::IN_MOVED_TO);
    let b = add("watched-b", libc::IN_CREATE);
    stage.first();
    inotify::remove(instance.as_fd(), b).expect("removed");
    assert_eq!(events(&instance), [(b, libc::IN_IGNORED)]);
    let c = add("watched-c", libc::IN_DELETE);
    std::fs::rename("watched-c", "watched-d").expect("moved");
    stage.last();
    assert_eq!(events(&instance), []);
    make("watched-a/new");
    make("watched-b/new");
    make("watched-d/new");
    std::fs::remove_file("watched-d/new").expect("removed");
    assert_eq!(events(&instance), [(a, libc::IN_CREATE), (c, libc::IN_DELETE)]);
}

fn sleeper() -> Child {
    Command::new("sleep").arg("1000").spawn().expect("a child")
}

fn ended(handle: &OwnedFd) -> bool {
    let mut one = [PollFd::new(handle.as_fd(), PollFlags::POLLIN)];
    poll(&mut one, PollTimeout::ZERO).expect("poll") == 1
}

fn handles(stage: &Stage) {
    let mut lives = sleeper();
    let alive = pidfd::open(lives.id() as i32).expect("a handle");
    let own = pidfd::open(std::process::id() as i32).expect("a handle");
    stage.first();
    let mut dies = sleeper();
    let dead = pidfd::open(dies.id() as i32).expect("a handle");
    dies.kill().expect("killed");
    dies.wait().expect("its end");
    stage.last();
    assert!(ended(&dead) && !ended(&alive) && !ended(&own));
    let line = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", alive.as_raw_fd()));
    assert!(line.expect("fdinfo").contains(&format!("Pid:\t{}\n", lives.id())));
    lives.kill().expect("killed");
    let mut one = [PollFd::new(alive.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut one, PollTimeout::NONE), Ok(1));
    lives.wait().expect("its end");
}

fn timers(stage: &Stage) {
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    let new = |clock| TimerFd::new(clock, TimerFlags::TFD_NONBLOCK).expect("a timer");
    let boot = new(ClockId::CLOCK_BOOTTIME);
    boot.set(Expiration::IntervalDelayed(hour, hour), TimerSetTimeFlags::empty()).expect("set");
    let real = new(ClockId::CLOCK_REALTIME);
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).expect("now");
    let absolute = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
    let flags = absolute | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    real.set(Expiration::OneShot(now + hour), flags).expect("set");
    stage.first();
    let late = new(ClockId::CLOCK_MONOTONIC);
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("now");
    let short = TimeSpec::from_duration(Duration::from_millis(1));
    late.set(Expiration::OneShot(now + short), absolute).expect("set");
    let mut one = [PollFd::new(late.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut one, PollTimeout::NONE), Ok(1));
    stage.last();
    let left = |timer: &TimerFd| match timer.get().expect("got").expect("armed") {
        Expiration::OneShot(t) | Expiration::IntervalDelayed(t, _) => Duration::from(t),
        Expiration::Interval(t) => Duration::from(t),
    };
    for timer in [&boot, &real] {
        let left = left(timer).as_secs();
        assert!((3000..=3600).contains(&left), "{left} s are left");
    }
    let Some(Expiration::IntervalDelayed(_, every)) = boot.get().expect("got") else {
        panic!("not periodic");
    };
    assert_eq!(Duration::from(every).as_secs(), 3600);
    let info = |t: &TimerFd| {
        let path = format!("/proc/self/fdinfo/{}", t.as_fd().as_raw_fd());
        std::fs::read_to_string(path).expect("fdinfo")
    };
    assert!(info(&boot).contains("clockid: 7") && info(&real).contains("clockid: 0"));
    assert!(info(&real).contains("settime flags: 03"));
    assert!(info(&late).contains("ticks: 1"));
    late.wait().expect("has expired");
}

fn namespaces(stage: &Stage) {
    let names = ["net", "mnt", "uts", "ipc", "pid", "user", "time"];
    let open = |name: &&str| File::open(format!("/proc/self/ns/{name}")).expect("opened");
    let files: Vec<File> = names.iter().map(open).collect();
    stage.first();
    stage.last();
    for (name, file) in names.iter().zip(&files) {
        let ours = std::fs::metadata(format!("/proc/self/ns/{name}")).expect("there").ino();
        assert_eq!(file.metadata().expect("stat").ino(), ours, "{name}");
    }
}

/// What another program is told when it wants the lock: 0 if it gets it.
fn tried(python: &str) -> String {
    let out = Command::new("python3").args(["-c", python]).output().expect("python3");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

fn flocks(stage: &Stage) {
    let (shared, exclusive) = (make("flock-shared"), make("flock-exclusive"));
    locks::flock(shared.as_fd(), false).expect("locked");
    stage.first();
    locks::flock(exclusive.as_fd(), true).expect("locked");
    stage.last();
    let again = |name, exclusive| locks::flock(File::open(name).expect("open").as_fd(), exclusive);
    again("flock-shared", false).expect("shared");
    assert_eq!(again("flock-shared", true).expect_err("held").code(), libc::EWOULDBLOCK);
    assert_eq!(again("flock-exclusive", false).expect_err("held").code(), libc::EWOULDBLOCK);
    drop((shared, exclusive));
    // A child that is being started holds a copy for a moment.
    while again("flock-exclusive", true).is_err() {
        std::thread::yield_now();
    }
}

fn posix_locks(stage: &Stage) {
    let file = make("posix-lock");
    let lock = |lock: libc::flock| fcntl(&file, FcntlArg::F_SETLK(&lock));
    lock(locks::range(true, 0, Some(9))).expect("locked");
    lock(locks::range(false, 100, None)).expect("locked");
    stage.first();
    lock(locks::range(true, 20, Some(29))).expect("locked");
    let mut free = locks::range(true, 5, Some(9));
    free.l_type = libc::F_UNLCK as libc::c_short;
    lock(free).expect("unlocked");
    stage.last();
    let script = "import fcntl\n\
        f = open('posix-lock', 'r+')\n\
        def held(kind, start, n):\n\
        \x20 try: fcntl.lockf(f, kind | fcntl.LOCK_NB, n, start)\n\
        \x20 except OSError: return 1\n\
        \x20 fcntl.lockf(f, fcntl.LOCK_UN, n, start); return 0\n\
        print(held(fcntl.LOCK_SH, 0, 5), held(fcntl.LOCK_EX, 5, 15), held(fcntl.LOCK_SH, 29, 1),\n\
        \x20 held(fcntl.LOCK_EX, 500, 1), held(fcntl.LOCK_SH, 500, 1))";
    assert_eq!(tried(script), "1 0 1 1 0");
}

fn open_locks(stage: &Stage) {
    let file = make("open-lock");
    stage.first();
    locks::lock_open(file.as_fd(), &locks::range(true, 3, Some(8))).expect("locked");
    stage.last();
    let other = File::options().read(true).write(true).open("open-lock").expect("opened");
    let lock = |a, b| locks::lock_open(other.as_fd(), &locks::range(true, a, Some(b)));
    lock(0, 2).expect("free");
    assert_eq!(lock(8, 9).expect_err("held").code(), libc::EAGAIN);
}

fn lease(stage: &Stage) {
    make("lease-read");
    let read = File::open("lease-read").expect("opened");
    locks::set_lease(read.as_fd(), libc::F_RDLCK).expect("leased");
    stage.first();
    let write = make("lease-write");
    locks::set_lease(write.as_fd(), libc::F_WRLCK).expect("leased");
    stage.last();
    assert_eq!(locks::lease(read.as_fd()).expect("got"), libc::F_RDLCK);
    assert_eq!(locks::lease(write.as_fd()).expect("got"), libc::F_WRLCK);
    let me = std::process::id() as i32;
    assert_eq!(locks::owner(write.as_fd()).expect("got"), (1, me, 0));
}

fn owner(stage: &Stage) {
    let (a, _b) = pipe2(OFlag::O_NONBLOCK).expect("a pipe");
    let me = std::process::id() as i32;
    let child = sleeper();
    let (c, _d) = pipe2(OFlag::O_NONBLOCK).expect("a pipe");
    locks::set_owner(a.as_fd(), 1, me, libc::SIGRTMIN() + 3).expect("set");
    stage.first();
    locks::set_owner(c.as_fd(), 1, child.id() as i32, 0).expect("set");
    fcntl(&c, FcntlArg::F_SETFL(OFlag::O_ASYNC | OFlag::O_NONBLOCK)).expect("set");
    stage.last();
    assert_eq!(locks::owner(a.as_fd()).expect("got"), (1, me, libc::SIGRTMIN() + 3));
    assert_eq!(locks::owner(c.as_fd()).expect("got"), (1, child.id() as i32, 0));
    assert!(flags(&c) & libc::O_ASYNC != 0);
    end(child);
}

fn end(mut child: Child) {
    child.kill().expect("killed");
    child.wait().expect("its end");
}
