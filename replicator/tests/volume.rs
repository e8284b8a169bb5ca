//! Volumes on the real kernel: processes work in a mount namespace of their own on a volume that is
//! served through FUSE, are stopped at any moment, and what a checkpoint brings to another
//! directory is what they had, byte by byte, wherever its commit is killed. Needs root.
//!
//! `NILICON_SEEDS` sets the number of seeds of the torture. The processes are this program again, with
//! their part in `NILICON_PART`.

use nix::fcntl::{FallocateFlags, OFlag, RenameFlags, fallocate, renameat2};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use replicator::sys::xattr;
use replicator::volume::{Fsync, Ino, ServeOptions, Served, Volumes};
use replicator::{Epoch, Generation};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const PART: &str = "NILICON_PART";
const ID: &str = "trusted.nilicon.id";

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("nilicon-files-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("a directory for the test");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cannot() -> bool {
    let may = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !may {
        eprintln!("not run: needs root and /dev/fuse");
    }
    !may
}

/// This program again, as somebody else. It ends with its owner.
struct Process {
    child: Child,
    _input: ChildStdin,
    _output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a part and waits until it says that it is ready.
    fn start(part: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "part", "--nocapture", "-q"])
            .env(PART, part)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let input = child.stdin.take().expect("a pipe");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let ready = output.by_ref().lines().map_while(Result::ok).any(|l| l.ends_with("ready"));
        assert!(ready, "{part} gets ready");
        Self { child, _input: input, _output: output }
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Stops all its threads, wherever they are outside the kernel.
    fn stop(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGSTOP).expect("it is there");
        let status = waitpid(Pid::from_raw(self.pid()), Some(WaitPidFlag::WUNTRACED));
        assert!(matches!(status, Ok(WaitStatus::Stopped(..))), "{status:?}");
    }

    fn run(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGCONT).expect("it is there");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What this program is when it was started by itself; in a run of the tests it is nothing.
#[test]
fn part() {
    let Ok(part) = std::env::var(PART) else { return };
    let words: Vec<&str> = part.split(' ').collect();
    match words[..] {
        ["hold"] => hold(),
        ["work", holder, at, seed] => {
            work(holder, Path::new(at), seed.parse().expect("a number"));
        }
        ["commit", base, payload, epoch] => {
            let volumes = Volumes::open(Path::new(base), &["data".into()], false).expect("opens");
            let payload = fs::read(payload).expect("a payload");
            println!("ready");
            let epoch = Epoch(epoch.parse().expect("a number"));
            volumes.commit(Generation::FIRST, epoch, &payload).expect("it is carried out");
        }
        _ => panic!("no part: {part}"),
    }
}

/// Has a mount namespace of its own until its input ends.
fn hold() {
    // The first thread's namespace is the process's, so it is a process of one thread that does it.
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
    println!("{} ready", nix::unistd::gettid());
    let _ = io::stdin().read_to_end(&mut Vec::new());
}

/// Works on the files of a volume until it is killed.
fn work(holder: &str, at: &Path, seed: u64) {
    unshare(CloneFlags::CLONE_FS).expect("a working directory of its own");
    let namespace = File::open(format!("/proc/{holder}/ns/mnt")).expect("a namespace");
    setns(namespace, CloneFlags::CLONE_NEWNS).expect("entered");
    std::env::set_current_dir(at).expect("the volume");
    println!("ready");
    let mut busy = Busy { rng: fastrand::Rng::with_seed(seed), open: Vec::new() };
    loop {
        // Whether an operation succeeds is its own affair; what it did is to arrive.
        let _ = busy.act();
    }
}

struct Busy {
    rng: fastrand::Rng,
    open: Vec<File>,
}

impl Busy {
    fn path(&mut self) -> PathBuf {
        let mut path = PathBuf::from(".");
        for _ in 0..self.rng.u8(0..3) {
            path.push(format!("d{}", self.rng.u8(0..3)));
        }
        let kind = if self.rng.u8(0..4) == 0 { 'd' } else { 'f' };
        path.join(format!("{kind}{}", self.rng.u8(0..4)))
    }

    fn opened(&mut self) -> Option<&File> {
        if self.open.is_empty() {
            None
        } else {
            Some(&self.open[self.rng.usize(0..self.open.len())])
        }
    }

    fn act(&mut self) -> io::Result<()> {
        let (path, other) = (self.path(), self.path());
        let (size, offset) = (self.rng.usize(1..9000), self.rng.u64(0..60_000));
        let bytes = vec![self.rng.u8(1..); size];
        match self.rng.u8(0..30) {
            0..4 => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(self.rng.bool());
                let file = options.mode(0o640).open(&path)?;
                file.write_all_at(&bytes, offset)?;
                self.open.push(file);
                // Some go on without a name.
                if self.rng.u8(0..4) == 0 {
                    fs::remove_file(&path)?;
                }
            }
            4 | 5 => fs::create_dir(&path)?,
            6 => match self.rng.u8(0..3) {
                0 => std::os::unix::fs::symlink("some/where", &path)?,
                1 => mknod(&path, SFlag::S_IFIFO, Mode::S_IRUSR, 0)?,
                _ => mknod(&path, SFlag::S_IFSOCK, Mode::S_IRUSR, 0)?,
            },
            7 => fs::hard_link(&path, &other)?,
            8 | 9 => fs::remove_file(&path)?,
            10 => fs::remove_dir(&path)?,
            11 | 12 => {
                let flags = [
                    RenameFlags::empty(),
                    RenameFlags::RENAME_NOREPLACE,
                    RenameFlags::RENAME_EXCHANGE,
                ];
                let flags = flags[self.rng.usize(0..3)];
                renameat2(nix::fcntl::AT_FDCWD, &path, nix::fcntl::AT_FDCWD, &other, flags)?;
            }
            13 => OpenOptions::new().write(true).open(&path)?.set_len(offset)?,
            14 => fs::set_permissions(&path, fs::Permissions::from_mode(self.rng.u32(0..0o7777)))?,
            15 => {
                let owner = Some(self.rng.u32(0..9));
                std::os::unix::fs::lchown(&path, owner, owner)?;
            }
            16 => {
                let name = OsStr::new(if self.rng.bool() { "trusted.a" } else { "user.b" });
                let result = match self.rng.u8(0..3) {
                    0 => xattr::remove(&path, name),
                    _ => xattr::set(&path, name, &bytes[..bytes.len().min(200)], 0),
                };
                result.map_err(|e| e.source)?;
            }
            17 => {
                let time = std::time::UNIX_EPOCH + Duration::from_millis(self.rng.u64(0..1 << 40));
                File::open(&path)?.set_modified(time)?;
            }
            18 => {
                let flags = [
                    FallocateFlags::empty(),
                    FallocateFlags::FALLOC_FL_KEEP_SIZE,
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                ];
                let flags = flags[self.rng.usize(0..3)];
                if let Some(file) = self.opened() {
                    fallocate(file, flags, offset as i64, size as i64)?;
                }
            }
            19 => {
                let mut from = File::open(&path)?;
                io::copy(&mut from, &mut OpenOptions::new().append(true).open(&other)?)?;
            }
            20 if self.open.len() > 8 => {
                let last = self.rng.usize(0..self.open.len());
                drop(self.open.swap_remove(last));
            }
            21 => fs::read_dir(path.parent().unwrap_or(&path))?.try_for_each(|e| e.map(drop))?,
            22 => {
                if let Some(file) = self.opened() {
                    file.sync_data()?;
                }
            }
            23 => {
                OpenOptions::new().append(true).open(&path)?.write_all(&bytes)?;
            }
            _ => {
                if let Some(file) = self.opened() {
                    file.write_all_at(&bytes, offset)?;
                    // What was just written is what is read.
                    let mut read = vec![0; 1];
                    file.read_exact_at(&mut read, offset)?;
                }
            }
        }
        Ok(())
    }
}

/// All that a checkpoint promises of one name.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    ino: u64,
    mode: u32,
    owner: (u32, u32),
    links: u64,
    size: u64,
    mtime: (i64, i64),
    target: Option<PathBuf>,
    xattrs: Vec<(OsString, Vec<u8>)>,
    bytes: u64,
}

type Tree = BTreeMap<PathBuf, Entry>;

/// One file. `by_attribute`: its number is in its attribute, as on the disk.
fn entry(full: &Path, by_attribute: bool) -> io::Result<Entry> {
    let meta = fs::symlink_metadata(full)?;
    let kind = meta.file_type();
    let mut xattrs = Vec::new();
    let mut ino = meta.ino();
    for name in xattr::list(full).map_err(|e| e.source)? {
        let value = xattr::get(full, &name).map_err(|e| e.source)?;
        if name == ID {
            assert!(by_attribute, "the number is nobody's business");
            ino = u64::from_le_bytes(value.try_into().expect("eight bytes"));
        } else {
            xattrs.push((name, value));
        }
    }
    xattrs.sort();
    let bytes = if kind.is_file() { fs::read(full)? } else { Vec::new() };
    Ok(Entry {
        ino,
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        links: if kind.is_dir() { 0 } else { meta.nlink() },
        size: if kind.is_file() { meta.size() } else { 0 },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        target: if kind.is_symlink() { Some(fs::read_link(full)?) } else { None },
        xattrs,
        bytes: xxhash_rust::xxh3::xxh3_64(&bytes),
    })
}

/// Everything under `root`.
fn tree(root: &Path, by_attribute: bool) -> Tree {
    let mut all = Tree::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let entry = entry(&full, by_attribute).expect("it can be read");
        if entry.mode & libc::S_IFMT == libc::S_IFDIR {
            let names = fs::read_dir(&full).expect("it can be read");
            todo.extend(names.map(|e| path.join(e.expect("an entry").file_name())));
        }
        all.insert(path, entry);
    }
    all
}

/// Files without a name. They may go while they are looked at.
fn loose(base: &Path) -> Tree {
    let root = base.join("data/loose");
    let names = fs::read_dir(&root).expect("it can be read");
    let read = |name: OsString| match entry(&root.join(&name), true) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        // Its place there is no link.
        other => Some((name.into(), Entry { links: 0, ..other.expect("it can be read") })),
    };
    names.filter_map(|e| read(e.expect("an entry").file_name())).collect()
}

/// The two parts of a volume on the disk: files with names, and files that are only open.
fn on_disk(base: &Path) -> (Tree, Tree) {
    (tree(&base.join("data/tree"), true), loose(base))
}

fn same(what: &str, got: &Tree, expected: &Tree) {
    for (path, entry) in expected {
        assert_eq!(got.get(path), Some(entry), "{what}: {path:?}");
    }
    let more: Vec<_> = got.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{what}: {more:?} should not be there");
}

fn open(base: &Path) -> Volumes {
    Volumes::open(base, &["data".into()], false).expect("the volume opens")
}

/// Commits in a process that is killed somewhere, until one gets through.
fn commit_killed(rng: &mut fastrand::Rng, base: &Path, payload: &Path, epoch: u64) {
    let part = format!("commit {} {} {epoch}", base.display(), payload.display());
    let was = on_disk(base);
    for _ in 0..rng.u8(1..3) {
        let process = Process::start(&part);
        std::thread::sleep(Duration::from_micros(rng.u64(0..6000)));
        drop(process);
        let journal = base.join("journal").exists();
        drop(open(base));
        if !journal && on_disk(base) == was {
            continue;
        }
        return;
    }
    let bytes = fs::read(payload).expect("a payload");
    open(base).commit(Generation::FIRST, Epoch(epoch), &bytes).expect("it is carried out");
}

fn torture(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (here, there) = (Scratch::new(), Scratch::new());
    let primary = open(&here.0);
    drop(open(&there.0));
    let holder = Process::start("hold");
    let at = here.0.join("at");
    let volume = primary.list()[0].clone();
    let mut served = Served::start("data", volume, ServeOptions::default()).expect("served");
    let namespace = thread_in_namespace(&holder);
    served.attach(namespace, &at).expect("mounted");
    let workers: Vec<Process> = (0..3)
        .map(|i| Process::start(&format!("work {namespace} {} {}", at.display(), seed * 3 + i)))
        .collect();
    let payload = there.0.join("payload");
    for epoch in 1..=3 {
        if epoch == 1 || rng.u8(0..5) == 0 {
            primary.begin_full();
        }
        for _ in 0..rng.u8(0..3) {
            std::thread::sleep(Duration::from_millis(rng.u64(1..20)));
            primary.precopy().expect("it can be read");
        }
        std::thread::sleep(Duration::from_millis(rng.u64(1..20)));
        workers.iter().for_each(Process::stop);
        // While they stand still, the kernel may forget files that nobody has open any more.
        let most = loose(&here.0);
        primary.seal().expect("it can be read");
        let now = on_disk(&here.0);
        let seen =
            PathBuf::from(format!("/proc/{namespace}/root")).join(at.strip_prefix("/").expect("/"));
        let seen = tree(&seen, false);
        same(&format!("seed {seed}, epoch {epoch}, through the mount"), &seen, &now.0);
        workers.iter().for_each(Process::run);
        let mut part = Vec::new();
        primary.take(&mut part);
        fs::write(&payload, part).expect("written");
        commit_killed(&mut rng, &there.0, &payload, epoch);
        let got = on_disk(&there.0);
        same(&format!("seed {seed}, epoch {epoch}"), &got.0, &now.0);
        for (path, entry) in &now.1 {
            assert_eq!(got.1.get(path), Some(entry), "seed {seed}, epoch {epoch}, open {path:?}");
        }
        for (path, entry) in &got.1 {
            assert_eq!(most.get(path), Some(entry), "seed {seed}, epoch {epoch}, no more {path:?}");
        }
    }
    // Served there, files without a name are found by their numbers.
    let backup = open(&there.0);
    let volume = backup.list()[0].clone();
    let other = Served::start("data", volume, ServeOptions::default()).expect("served");
    for (name, entry) in on_disk(&there.0).1 {
        if entry.mode & libc::S_IFMT == libc::S_IFREG {
            let file = other.open(Ino(entry.ino), OFlag::O_RDWR).expect("opened by number");
            let mut bytes = Vec::new();
            File::from(file).read_to_end(&mut bytes).expect("read");
            assert_eq!(xxhash_rust::xxh3::xxh3_64(&bytes), entry.bytes, "seed {seed}: {name:?}");
        }
    }
    // Workers that are in the middle of something do not keep a server from ending.
    drop(served);
    drop(workers);
}

/// The thread of the holder that has a namespace of its own: threads of one process may differ.
fn thread_in_namespace(holder: &Process) -> i32 {
    let link = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("a namespace");
    let ours = link(std::process::id() as i32);
    let tasks = fs::read_dir(format!("/proc/{}/task", holder.pid())).expect("threads");
    tasks
        .filter_map(|t| t.ok()?.file_name().to_str()?.parse().ok())
        .find(|tid| link(*tid) != ours)
        .expect("one has")
}

/// VO-8
#[test]
fn what_processes_had_at_the_stop_is_what_arrives() {
    if cannot() {
        return;
    }
    let seeds = std::env::var("NILICON_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(6);
    let first = std::env::var("NILICON_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    (first..first + seeds).for_each(torture);
}

/// A volume that is served at `HERE/at`, in a namespace that ends with the test.
struct Mounted {
    served: Option<Served>,
    volumes: Volumes,
    seen: PathBuf,
    _holder: Process,
    here: Scratch,
}

fn mounted(options: ServeOptions) -> Mounted {
    let here = Scratch::new();
    let volumes = open(&here.0);
    let holder = Process::start("hold");
    let pid = thread_in_namespace(&holder);
    let mut served = Served::start("data", volumes.list()[0].clone(), options).expect("served");
    let at = here.0.join("some/where");
    served.attach(pid, &at).expect("mounted, and the directories made");
    let again = served.attach(pid, &at).expect_err("once").to_string();
    assert!(again.contains("mounted already"), "{again}");
    let seen = PathBuf::from(format!("/proc/{pid}/root{}", at.display()));
    Mounted { served: Some(served), volumes, seen, _holder: holder, here }
}

#[test]
fn a_read_only_volume_refuses_changes() {
    if cannot() {
        return;
    }
    let m = mounted(ServeOptions { read_only: true, ..ServeOptions::default() });
    let error = fs::write(m.seen.join("a"), "x").expect_err("read-only");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
}

/// VO-10
#[test]
fn stores_through_a_mapping_are_written_when_asked_for() {
    if cannot() || !Path::new("/usr/bin/python3").exists() {
        return;
    }
    let m = mounted(ServeOptions::default());
    fs::write(m.seen.join("a"), vec![0; 10_000]).expect("written");
    let script = "import mmap,os,sys\n\
        f=os.open(sys.argv[1],os.O_RDWR)\n\
        m=mmap.mmap(f,10000)\n\
        m[5000:5005]=b'hello'\n\
        print('ready',flush=True)\n\
        sys.stdin.read()";
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", script])
        .arg(m.seen.join("a"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    let mut line = String::new();
    let out = python.stdout.take().expect("a pipe");
    BufReader::new(out).read_line(&mut line).expect("it is ready");
    let ino = Ino(fs::metadata(m.seen.join("a")).expect("it is there").ino());
    let served = m.served.as_ref().expect("it is served");
    served.flush(ino).expect("it is written back");
    let bytes = fs::read(m.here.0.join("data/tree/a")).expect("on the disk");
    assert_eq!(&bytes[5000..5005], b"hello");
    drop(python.stdin.take());
    python.wait().expect("it ends");
    assert_eq!(m.volumes.list().len(), 1);
}

/// VO-9
#[test]
fn a_server_ends_while_files_are_open_and_work_is_done() {
    if cannot() {
        return;
    }
    let mut m = mounted(ServeOptions { fsync: Fsync::Local, ..ServeOptions::default() });
    let path = m.seen.join("a");
    let file = File::create(&path).expect("made");
    let writer = std::thread::spawn(move || {
        // It ends when the server is gone, and not before.
        loop {
            if let Err(e) = file.write_all_at(&[1; 4096], 0).and_then(|()| file.sync_data()) {
                return e.raw_os_error();
            }
        }
    });
    while fs::metadata(&path).is_ok_and(|meta| meta.len() == 0) {
        std::thread::yield_now();
    }
    drop(m.served.take());
    let error = writer.join().expect("it ends");
    assert!(matches!(error, Some(libc::ENOTCONN | libc::ECONNABORTED)), "{error:?}");
    assert!(fs::read_dir(&m.seen).expect("an empty directory").next().is_none(), "unmounted");
}

#[test]
fn a_mount_that_cannot_be_says_why() {
    if cannot() {
        return;
    }
    let here = Scratch::new();
    let volumes = open(&here.0);
    let options = ServeOptions::default();
    let mut served = Served::start("data", volumes.list()[0].clone(), options).expect("served");
    fs::write(here.0.join("file"), "").expect("written");
    let holder = Process::start("hold");
    let pid = thread_in_namespace(&holder);
    let error = served.attach(pid, &here.0.join("file")).expect_err("no directory").to_string();
    assert!(error.contains("file") && error.contains("mounting"), "{error}");
    let error = served.attach(i32::MAX, Path::new("/x")).expect_err("nobody").to_string();
    assert!(error.contains("mounting"), "{error}");
}

/// A file system of 400 KiB, in a mount namespace that only this thread has.
fn small_disk(at: &Path) {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a namespace");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
    fs::create_dir(at).expect("a directory");
    let none = MsFlags::empty();
    mount(Some("small"), at, Some("tmpfs"), none, Some("size=400k")).expect("a tmpfs");
}

/// VO-11
#[test]
fn a_full_disk_is_one_error_and_no_damage() {
    if cannot() {
        return;
    }
    let there = Scratch::new();
    let scratch = Scratch::new();
    let base = scratch.0.join("small");
    std::thread::scope(|s| {
        let inside = || {
            small_disk(&base);
            let primary = open(&base);
            let holder = Process::start("hold");
            let pid = thread_in_namespace(&holder);
            let at = scratch.0.join("at");
            let volume = primary.list()[0].clone();
            let mut served =
                Served::start("data", volume, ServeOptions::default()).expect("served");
            served.attach(pid, &at).expect("mounted");
            let seen = PathBuf::from(format!("/proc/{pid}/root{}", at.display()));
            // The program hears of it, and what it has is what arrives.
            fs::write(seen.join("a"), [1; 100_000]).expect("there is room");
            let error = fs::write(seen.join("b"), vec![2; 400_000]).expect_err("no room");
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            primary.begin_full();
            primary.seal().expect("it can be read");
            let mut payload = Vec::new();
            primary.take(&mut payload);
            let backup = open(&there.0);
            backup.commit(Generation::FIRST, Epoch(1), &payload).expect("there is room");
            same("written as far as it went", &on_disk(&there.0).0, &on_disk(&base).0);
            drop(served);

            // A backup without room says so, and has what it had.
            fs::remove_dir_all(base.join("data")).expect("removed");
            let full = open(&base);
            let before = on_disk(&base).0;
            let error =
                full.commit(Generation::FIRST, Epoch(1), &[payload.clone(), payload].concat());
            let error = error.expect_err("no room").to_string();
            assert!(error.contains("the disk is full"), "{error}");
            drop(full);
            drop(open(&base));
            same("nothing of it", &on_disk(&base).0, &before);
        };
        s.spawn(inside).join().expect("no panic inside");
    });
}
