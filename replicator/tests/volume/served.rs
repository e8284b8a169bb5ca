//! What the processes that use a served volume meet, and who serves it: its options, stores through
//! mappings, its end, and why it cannot be mounted.

use crate::process::{Process, thread_in_namespace};
use crate::{Scratch, cannot, open};
use nix::fcntl::OFlag;
use replicator::sys::file_range;
use replicator::volume::{Fsync, Ino, ServeOptions, Served, Volumes};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    let file = File::from(served.open(ino, OFlag::O_RDONLY).expect("it opens"));
    file_range::write_back(&file).expect("it is written back");
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
