//! What cannot be protected is refused before protection starts, by name, with what to do about
//! it (CP-3). Each is a Python program that makes one such thing; needs root and Python 3.

use nix::sys::wait::{WaitPidFlag, waitpid};
use replicator::Epoch;
use replicator::capture::{CaptureError, Capturer, NoBoundary, Refusal, warm_up};
use replicator::image::State;
use replicator::image::pages::PageSet;
use replicator::sys::pty;
use replicator::sys::unix_diag::UnixDiag;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the processes of a group may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

const COMMON: &str = "
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def give_up(what):
    print('skipped:', what, flush=True)
    sys.exit(0)
def call(number, *args):
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        give_up(f'call {number}: {os.strerror(ctypes.get_errno())}')
    return result
def mapped(flags, fd=-1, length=2 << 20):
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(length), 3, flags, fd, ctypes.c_long(0))
    if at in (None, ctypes.c_void_p(-1).value):
        give_up(f'mmap: {os.strerror(ctypes.get_errno())}')
    return at
def option(s, level, name, value):
    try:
        s.setsockopt(level, name, value)
    except OSError as e:
        give_up(e)
def family(*args):
    try:
        return socket.socket(*args)
    except OSError as e:
        give_up(e)
def nested(flags, deeper=False):
    told, tells = os.pipe()
    if os.fork() == 0:
        os.close(told)
        call(272, flags)
        if not deeper or os.fork() == 0:
            os.write(tells, b'x')
        # The end of the test is the end of its standard input.
        os.read(0, 1)
        os._exit(0)
    os.close(tells)
    if os.read(told, 1) != b'x':
        sys.exit(0)
def run_and_delete(program):
    import subprocess, tempfile
    fd, path = tempfile.mkstemp()
    os.write(fd, program)
    os.fchmod(fd, 0o700)
    os.close(fd)
    try:
        # It ends when the test does: it reads what we read.
        subprocess.Popen([path], stdout=subprocess.DEVNULL)
    except OSError as e:
        give_up(e)
    finally:
        os.unlink(path)
def cloned(flags):
    if call(56, flags | 17, 0, 0, 0, 0) == 0:
        os.read(0, 1)
        os._exit(0)
def filter():
    global code
    code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xffff))
    return struct.pack('HxxxxxxQ', 1, ctypes.addressof(code))
";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // We may trace it: then the end of each other thread is told before its own.
        let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let pid = self.0.id() as i32;
        while waitpid(None, Some(ours)).is_ok_and(|s| s.pid().is_none_or(|p| p.as_raw() != pid)) {}
        let _ = self.0.wait();
    }
}

/// Starts the program; none if the kernel does not have what it wants.
fn start(name: &str, script: &str) -> Option<Killed> {
    let script = format!("{COMMON}\n{script}\nprint('ready', flush=True)\nos.read(0, 1)");
    let child = Command::new("python3")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(child) = child else {
        println!("kind {name} skipped: python3 is not installed");
        return None;
    };
    let mut child = Killed(child);
    let mut line = String::new();
    let mut output = BufReader::new(child.0.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("a line");
    if line != "ready\n" {
        output.read_to_string(&mut line).expect("the rest");
        assert!(line.starts_with("skipped"), "{name}: {line}");
        println!("kind {name} {}", line.trim());
        return None;
    }
    Some(child)
}

/// Its first checkpoint must be refused with words of the object and of the reason, and with a way
/// out; a survey must say the same.
fn refused(name: &str, script: &str, object: &str, reason: &str) {
    let Some(child) = start(name, script) else { return };
    let pid = child.0.id() as i32;
    let diag = || UnixDiag::open().expect("diag");
    let surveyed = Capturer::adopt_gently(pid, diag()).and_then(|mut capturer| {
        let found = capturer.survey(false)?.refusals;
        capturer.detach()?;
        Ok(found)
    });
    let taken = Capturer::adopt(pid, diag()).and_then(|mut capturer| {
        let (mut state, mut pages) = (State::default(), PageSet::default());
        capturer.prepare()?;
        capturer.precopy()?;
        capturer.stop(Epoch(1), &mut NoBoundary, &mut state, &mut pages).map(drop)
    });
    let named =
        |refusal: &Refusal| refusal.object.contains(object) && refusal.reason.contains(reason);
    let found = match taken.expect_err("it cannot be protected") {
        CaptureError::Unsupported { object, reason } => Refusal { object, reason },
        other => panic!("{name}: not a refusal: {other}"),
    };
    assert!(named(&found), "{name}: {}: {}", found.object, found.reason);
    assert!(found.remedy().is_some(), "{name} has no way out: {}", found.reason);
    let surveyed = match surveyed {
        // It cannot even be looked at.
        Err(CaptureError::Unsupported { object, reason }) => vec![Refusal { object, reason }],
        other => other.expect("a survey"),
    };
    assert!(surveyed.iter().any(named), "{name}: a survey says {surveyed:?}");
    println!("kind {name} ok");
}

#[test]
fn terminal_whose_other_end_is_outside() {
    // Ours, and the program has what is made of it.
    let path = File::options().read(true).write(true).open("/dev/ptmx");
    let master = path.expect("a terminal");
    pty::set_locked(master.as_fd(), false).expect("unlocked");
    let index = pty::index(master.as_fd()).expect("a number");
    let script = format!("fd = os.open('/dev/pts/{index}', os.O_RDWR | os.O_NOCTTY)");
    refused("terminal_whose_other_end_is_outside", &script, "descriptor", "other end is outside");
}

#[test]
fn semaphores_that_are_to_be_undone_are_told_of() {
    // Not refused: the values are carried over, and most programs only guard against a crash.
    let script = |flags| {
        format!(
            "
call(272, 0x8000000)
semaphores = call(64, 0, 2, 0o1600)
call(65, semaphores, ctypes.create_string_buffer(struct.pack('HhH', 1, 3, {flags})), 1)
print('ready', flush=True)
# Its pipes end at us, who are outside of the tree.
null = os.open('/dev/null', os.O_RDWR)
for number in range(3):
    os.dup2(null, number)
while True:
    call(34)"
        )
    };
    for (flags, is_told) in [(0, false), (0x1000, true)] {
        let name = "semaphores_that_are_to_be_undone";
        let Some(child) = start(name, &script(flags)) else { return };
        let pid = child.0.id() as i32;
        let last = format!("/proc/{pid}/fd/2");
        while !std::fs::read_link(&last).is_ok_and(|to| to.ends_with("null")) {
            assert!(std::path::Path::new(&last).exists(), "it has ended");
        }
        let held = Capturer::adopt_gently(pid, UnixDiag::open().expect("diag"));
        let held = held.and_then(Capturer::hold).expect("captured");
        let told = held.notes.iter().any(|note| note.contains("SEM_UNDO"));
        assert_eq!(held.state.semaphores[0].values, [0, 3]);
        held.release().expect("let go");
        assert!(told == is_told || !warm_up(), "flags {flags:#x}: {told}");
    }
}

macro_rules! refusals {
    ($($name:ident: $script:expr => $object:expr, $reason:expr;)*) => {
        $(#[test] fn $name() { refused(stringify!($name), $script, $object, $reason); })*
    };
}

refusals! {
    io_uring: "call(425, 4, ctypes.create_string_buffer(120))" => "descriptor", "io_uring";
    native_aio: "call(206, 8, ctypes.byref(ctypes.c_ulong()))" => "mapping", "io_setup";
    packet_socket: "s = family(socket.AF_PACKET, socket.SOCK_RAW, 0)" => "descriptor", "packet socket";
    filter_of_a_datagram_socket: "
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
option(s, 1, 26, filter())" => "descriptor", "filter";
    filter_of_a_tcp_socket: "
s = socket.socket()
option(s, 1, 26, filter())
s.bind(('127.0.0.1', 0))
s.listen()" => "descriptor", "filter";
    filter_of_a_unix_socket: "
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
option(s, 1, 26, filter())" => "descriptor", "filter";
    mptcp: "s = family(socket.AF_INET, socket.SOCK_STREAM, 262)" => "descriptor", "MPTCP";
    tcp_md5: "
s = socket.socket()
option(s, 6, 14, struct.pack('HH4s120xxxHI80s', 2, 0, bytes([127, 0, 0, 1]), 3, 0, b'key')[:216].ljust(216, b'\\0'))
s.bind(('127.0.0.1', 0))
s.listen()" => "descriptor", "MD5";
    protection_key: "
key = call(330, 0, 0)
at = mapped(0x22)
call(329, at, 4096, 3, key)" => "mapping", "protection key";
    memory_that_grows_down: "mapped(0x122)" => "mapping", "grows down";
    perf: "
attr = ctypes.create_string_buffer(struct.pack('IIQ', 1, 112, 0), 112)
call(298, attr, 0, -1, -1, 0)" => "descriptor", "perf";
    bpf_map: "
attr = ctypes.create_string_buffer(struct.pack('IIII', 2, 4, 8, 1), 72)
call(321, 0, attr, 72)" => "descriptor", "BPF";
    userfaultfd: "call(323, 0)" => "descriptor", "userfaultfd";
    fanotify: "call(300, 0, 0)" => "descriptor", "fanotify";
    huge_pages: "mapped(0x44022)" => "mapping", "MAP_HUGETLB";
    huge_memfd: "
fd = call(319, b'huge', 4)
os.ftruncate(fd, 2 << 20)
mapped(0x4001, fd)" => "descriptor", "MFD_HUGETLB";
    huge_memfd_by_descriptor: "
fd = call(319, b'huge', 4)
os.ftruncate(fd, 2 << 20)" => "descriptor", "MFD_HUGETLB";
    seccomp_filter_with_a_listener: "
call(157, 38, 1, 0, 0, 0)
program = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in program))
argument = struct.pack('HxxxxxxQ', len(program), ctypes.addressof(code))
call(317, 1, 0, ctypes.create_string_buffer(argument))" => "tid", "listener";
    seccomp_listener: "
program = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in program))
argument = struct.pack('HxxxxxxQ', len(program), ctypes.addressof(code))
told, tells = os.pipe()
holder, mine = socket.socketpair()
if os.fork() == 0:
    fd = call(317, 1, 8, ctypes.create_string_buffer(argument))
    socket.send_fds(mine, [b'x'], [fd])
    os._exit(0)
holder.recv(1, socket.MSG_PEEK)
fd = socket.recv_fds(holder, 1, 1)[1]
os.wait()" => "descriptor", "seccomp";
    posix_message_queue: "
name = b'nilicon-refused-%d' % os.getpid()
call(240, name, os.O_RDWR | os.O_CREAT, 0o600, 0)
call(241, name)" => "descriptor", "POSIX message queue";
    posix_message_queue_with_a_name: "
call(272, 0x8000000) # Its ipc namespace goes with it.
name = b'nilicon-refused'
call(240, name, os.O_RDWR | os.O_CREAT, 0o600, 0)" => "descriptor", "POSIX message queue";
    shared_table_of_descriptors: "cloned(0x400)" => "pid", "table of descriptors";
    shared_working_directory: "cloned(0x200)" => "pid", "working directory";
    shared_memory_of_processes: "
stack = mapped(0x22)
standard = ctypes.c_void_p.in_dll(libc, 'stdin')
# It waits for the end of the test as well.
wait = ctypes.cast(libc.getc, ctypes.c_void_p)
assert libc.clone(wait, ctypes.c_void_p(stack + (2 << 20)), 0x100 | 17, standard) > 0" => "pid", "shares its memory";
    thread_with_descriptors_of_its_own: "
import threading
apart, end = threading.Event(), threading.Event()
def leave():
    call(272, 0x400)
    apart.set()
    end.wait()
threading.Thread(target=leave, daemon=True).start()
apart.wait()" => "thread", "table of descriptors of its own";
    traced_by_a_debugger: "
told, tells = os.pipe()
if os.fork() == 0:
    call(101, 0, 0, 0, 0)
    os.write(tells, b'x')
    os.read(0, 1)
    os._exit(0)
os.read(told, 1)" => "pid", "debugger";
    program_whose_file_is_deleted: "
with open('/bin/cat', 'rb') as f:
    run_and_delete(f.read())" => "pid", "file of its program";
    program_of_32_bits: "
# read(0, stack, 1), then exit.
code = bytes.fromhex('b80300000031db89e1ba01000000cd80b801000000cd80')
base, at = 0x8048000, 84
header = b'\\x7fELF\\x01\\x01\\x01' + bytes(9)
header += struct.pack('HHIIIIIHHHHHH', 2, 3, 1, base + at, 52, 0, 0, 52, 32, 1, 0, 0, 0)
header += struct.pack('IIIIIIII', 1, 0, base, base, at + len(code), at + len(code), 5, 4096)
run_and_delete(header + code)" => "pid", "32 bits";
    memory_that_may_not_become_executable: "call(157, 65, 1, 0, 0, 0)" => "pid", "PR_SET_MDWE";
    time_stamp_counter_forbidden: "call(157, 26, 2, 0, 0, 0)" => "thread", "PR_SET_TSC";
    processor_identification_forbidden: "call(158, 0x1012, 0)" => "thread", "ARCH_SET_CPUID";
    nested_user_namespace: "nested(0x10000000)" => "pid", "user namespace";
    nested_pid_namespace: "nested(0x20000000, deeper=True)" => "pid", "pid_for_children";
    nested_network_namespace: "nested(0x40000000)" => "pid", "net namespace";
    nested_mount_namespace: "nested(0x20000)" => "pid", "mnt namespace";
    pid_namespace_of_children_to_come: "nested(0x20000000)" => "pid", "pid_for_children";
}

/// A group below ours for the time of a test.
struct Group(PathBuf);

impl Group {
    fn make() -> Option<Self> {
        let all = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let ours = all.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let is_unified = |m: &&&str| Path::new(m).join("cgroup.controllers").exists();
        let base = Path::new(mounts.iter().find(is_unified)?).join(ours);
        let path = base.join(format!("nilicon-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok().map(|()| Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let begin = Instant::now();
        while std::fs::remove_dir(&self.0).is_err() && begin.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
    }
}

#[test]
fn control_group_of_its_own() {
    let Some(group) = Group::make() else {
        return println!("kind control_group_of_its_own skipped: no unified hierarchy to write to");
    };
    let script = format!(
        "told, tells = os.pipe()\nif os.fork() == 0:\n    os.close(told)\n    open('{}/cgroup.procs', \
         'w').write('0')\n    os.write(tells, b'x')\n    os.read(0, 1)\n    os._exit(0)\nos.read(told, 1)",
        group.0.display()
    );
    refused("control_group_of_its_own", &script, "pid", "control group");
}

const NETWORK: &str = "
import ctypes, fcntl, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x40000000) == 0
s = socket.socket()
def address(text):
    fcntl.ioctl(s, 0x8916, struct.pack('16sHH4s8x', b'lo', 2, 0, socket.inet_aton(text)))
for text in (None, '10.9.9.9', '0.0.0.0'):
    if text: address(text)
    os.write(1, b'x')
    os.read(0, 1)
";

#[test]
fn settings_of_the_network() {
    let started = Command::new("python3")
        .args(["-c", NETWORK])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(child) = started else {
        return println!("kind settings_of_the_network skipped: python3 is not installed");
    };
    let mut child = Killed(child);
    let mut to = child.0.stdin.take().expect("piped");
    let mut from = child.0.stdout.take().expect("piped");
    let mut wait = || from.read_exact(&mut [0]).expect("it says so");
    wait();
    let pid = child.0.id() as i32;
    let mut capturer = Capturer::adopt(pid, UnixDiag::open().expect("diag")).expect("adopted");
    capturer.watch_network().expect("watched");
    let mut epoch = 0;
    let mut stop = || {
        epoch += 1;
        let (mut state, mut pages) = (State::default(), PageSet::default());
        capturer.prepare()?;
        capturer.precopy()?;
        capturer.stop(Epoch(epoch), &mut NoBoundary, &mut state, &mut pages).map(drop)
    };
    stop().expect("nothing has changed");
    to.write_all(b"x").expect("told");
    wait();
    for _ in 0..2 {
        match stop().expect_err("it has another address") {
            CaptureError::Unsupported { object, reason } => {
                assert_eq!(object, "the address 10.9.9.9/8 of lo");
                assert!(reason.contains("; say in the topology"), "{reason}");
            }
            other => panic!("not a refusal: {other}"),
        }
    }
    to.write_all(b"x").expect("told");
    wait();
    stop().expect("it is as it was");
    println!("kind settings_of_the_network ok");
}
