//! Volumes that cannot be as the topology says: a disk that is full, a backup's directory that cannot be
//! written, by its mount or by its own rights, a damaged journal, read-only files that differ, a file that
//! is in no volume, files that are older than the other host's. Each is one clear error, and what `inspect`
//! says of protection is true meanwhile and afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use nilicon_tests::{Bed, Sketch, is_installed, until};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

/// A server that keeps what it is told in a file; the test puts its directory for `@`.
const KEEPER: &str = "\
import socket
kept = open('@/seen/kept', 'ab', buffering=0)
server = socket.create_server(('0.0.0.0', 7000))
while True:
    peer, _ = server.accept()
    told = peer.recv(64).decode()
    if told:
        try:
            kept.write(b'x' * int(told))
            peer.sendall(str(kept.tell()).encode())
        except OSError as error:
            peer.sendall(str(error).encode())
    peer.close()
";

/// A lab with this server, whose container has these volumes, each a line of YAML.
fn bed(tag: &str, program: &str, volumes: &[&str], protection: &str) -> Bed {
    let list: String = volumes.iter().map(|v| format!("\n      - {v}")).collect();
    let mut sketch = Sketch::of(&format!(
        "command: [python3, @/server.py]\n    ready: {{ tcp: 7000 }}\n    \
         volume-directory: @/base\n    volumes:{list}"
    ));
    sketch.protection = protection.to_owned();
    let bed = Bed::new(tag, &sketch);
    let directory = bed.directory().display().to_string();
    bed.write(&bed.text().replace('@', &directory));
    let program = program.replace('@', &directory);
    fs::write(bed.directory().join("server.py"), program).expect("written");
    fs::create_dir(bed.directory().join("fixed")).expect("made");
    fs::write(bed.directory().join("fixed/file"), "as it is").expect("written");
    bed
}

/// Where the files of a host are.
fn base(bed: &Bed, host: &str) -> PathBuf {
    bed.directory().join("base").join(&bed.name).join(host).join("store")
}

/// Has the server write so many bytes; gives the size of its file.
fn tell(bed: &Bed, bytes: usize) -> usize {
    let said = ask(bed, bytes);
    said.parse().unwrap_or_else(|_| panic!("no number: {said}"))
}

/// Has the server write so many bytes; gives what it answers.
fn ask(bed: &Bed, bytes: usize) -> String {
    let call = "import socket, sys; s = socket.create_connection(('10.77.0.10', 7000)); \
                s.sendall(sys.argv[1].encode()); print(s.recv(64).decode())";
    let done = bed.exec("client", &["python3", "-c", call, &bytes.to_string()]);
    done.expect_success().stdout.trim().to_owned()
}

/// A small file system, until its owner goes.
struct Disk(PathBuf);

impl Disk {
    fn new(at: &Path) -> Self {
        fs::create_dir_all(at).expect("a directory");
        let none = MsFlags::empty();
        mount(Some("small"), at, Some("tmpfs"), none, Some("size=2m")).expect("a tmpfs");
        Self(at.to_owned())
    }

    fn change(&self, flags: MsFlags, size: &str) {
        let flags = flags | MsFlags::MS_REMOUNT;
        // While a file there is open for writing, it cannot become read-only.
        until("nobody to write there", || {
            match mount(None::<&str>, &self.0, None::<&str>, flags, Some(size)) {
                Err(Errno::EBUSY) => None,
                done => {
                    done.expect("changed");
                    Some(())
                }
            }
        });
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Waits until `inspect` says this somewhere.
fn until_said(bed: &Bed, words: &[&str]) {
    until(&format!("inspect to say {words:?}"), || {
        let said = bed.inspect().to_string();
        words.iter().all(|word| said.contains(word)).then_some(())
    });
}

/// VO-11
#[test]
fn a_backup_without_room_says_so_and_is_one_again_when_it_has_some() {
    if !is_installed("python3") {
        return;
    }
    let bed = bed("full", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    let disk = Disk::new(&base(&bed, "beta"));
    bed.deploy();
    assert_eq!(tell(&bed, 1000), 1000);
    // The answer waits for a backup that has the bytes.
    let call = "import socket; s = socket.create_connection(('10.77.0.10', 7000)); \
                s.sendall(b'3000000'); print(s.recv(64).decode())";
    let waiting = bed.start_exec("client", &["python3", "-c", call]);
    until_said(&bed, &["the disk is full"]);
    let store = bed.until_store("it is not protected", |store| store["protected"] == false);
    assert_eq!(store["primary"], "alpha", "{store:#}");
    disk.change(MsFlags::empty(), "size=64m");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    let done = waiting.wait(std::time::Duration::from_secs(60)).expect_success();
    assert_eq!(done.stdout.trim(), "3001000");

    disk.change(MsFlags::MS_RDONLY, "size=64m");
    let waiting = bed.start_exec("client", &["python3", "-c", call]);
    until_said(&bed, &["Read-only file system", "it must be writable on both hosts"]);
    bed.until_store("it is not protected", |store| store["protected"] == false);
    disk.change(MsFlags::empty(), "size=64m");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    let done = waiting.wait(std::time::Duration::from_secs(60)).expect_success();
    assert_eq!(done.stdout.trim(), "6001000");

    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 6_001_005);
    bed.destroy();
}

/// A large volume goes ahead of the first checkpoint: where that finds no room, nothing of it stays.
#[test]
fn a_backup_without_room_for_a_copy_says_so_and_gets_one_when_it_has_some() {
    if !is_installed("python3") {
        return;
    }
    let program = "\
import os
if not os.path.exists('@/seen/large'):
    with open('@/seen/large', 'wb') as file:
        for _ in range(150):
            file.write(os.urandom(1_000_000))
"
    .to_owned()
        + KEEPER;
    let bed = bed("copy", &program, &["{ path: @/seen, kind: replicated }"], "");
    let disk = Disk::new(&base(&bed, "beta"));
    disk.change(MsFlags::empty(), "size=100m");
    let deploying = bed.start("deploy", &[]);
    until("the lab to be there", || bed.run("inspect", &[]).code.filter(|code| *code == 0));
    until_said(&bed, &["writing a copy of file", "the disk is full"]);
    let store = bed.store().expect("it is there");
    assert_eq!((&store["protected"], &store["primary"]), (&false.into(), &"alpha".into()));
    disk.change(MsFlags::empty(), "size=600m");
    deploying.wait(std::time::Duration::from_secs(60)).expect_success();
    assert_eq!(tell(&bed, 1000), 1000);
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 1005);
    let volumes = fs::read_dir(base(&bed, "beta")).expect("it is there").flatten();
    let inside = volumes.filter_map(|entry| fs::read_dir(entry.path()).ok()).flatten().flatten();
    let left = inside.filter(|entry| entry.file_name().to_string_lossy().starts_with("seed"));
    assert_eq!(left.count(), 0, "what came ahead is done with");
    bed.destroy();
}

/// The program hears of a full disk where it runs, as on any other; it stays protected.
#[test]
fn a_program_hears_of_a_full_disk_and_stays_protected() {
    if !is_installed("python3") {
        return;
    }
    let bed = bed("room", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    let disk = Disk::new(&base(&bed, "alpha"));
    bed.deploy();
    assert_eq!(tell(&bed, 1000), 1000);
    // What fits of the first is written.
    let mut all = (0..6).map(|_| ask(&bed, 3_000_000));
    let said = all.find(|said| said.parse::<usize>().is_err()).unwrap_or_default();
    assert!(said.contains("No space left on device"), "{said}");
    disk.change(MsFlags::empty(), "size=64m");
    let size = tell(&bed, 1);
    assert!(size > 1000, "{size}");
    let store = bed.store().expect("it runs");
    assert_eq!((&store["protected"], &store["generation"]), (&true.into(), &1.into()), "{store:#}");
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), size + 5);
    bed.destroy();
}

/// A directory that nothing can be changed in, until its owner goes.
struct Fixed(PathBuf);

impl Fixed {
    fn new(at: &Path) -> Self {
        Self::set(at, "+i");
        Self(at.to_owned())
    }

    fn set(at: &Path, flag: &str) {
        let done = std::process::Command::new("chattr").arg(flag).arg(at).status();
        assert!(done.expect("chattr runs").success(), "chattr {flag} {}", at.display());
    }
}

impl Drop for Fixed {
    fn drop(&mut self) {
        Self::set(&self.0, "-i");
    }
}

/// Not even root may write there: a directory with the immutable flag, or one of a file server that
/// takes root for nobody.
#[test]
fn a_backup_that_may_not_write_says_so_and_is_one_again_when_it_may() {
    if !is_installed("python3") || !is_installed("chattr") {
        return;
    }
    let bed = bed("may", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    bed.deploy();
    assert_eq!(tell(&bed, 1000), 1000);
    let fixed = Fixed::new(&base(&bed, "beta"));
    let call = "import socket; s = socket.create_connection(('10.77.0.10', 7000)); \
                s.sendall(b'5'); print(s.recv(64).decode())";
    let waiting = bed.start_exec("client", &["python3", "-c", call]);
    until_said(&bed, &["Operation not permitted", "a directory that root may write"]);
    let store = bed.until_store("it is not protected", |store| store["protected"] == false);
    assert_eq!(store["primary"], "alpha", "{store:#}");
    drop(fixed);
    bed.until_store("it is protected again", |store| store["protected"] == true);
    let done = waiting.wait(std::time::Duration::from_secs(60)).expect_success();
    assert_eq!(done.stdout.trim(), "1005");
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 1010);
    bed.destroy();
}

#[test]
fn a_damaged_journal_is_named_and_nothing_begins() {
    if !is_installed("python3") {
        return;
    }
    let bed = bed("jour", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    let at = base(&bed, "alpha");
    fs::create_dir_all(&at).expect("made");
    let name = "journal-0000000000000001-0000000000000001";
    fs::write(at.join(name), "no journal at all, but for its name; it is longer than its head")
        .expect("written");
    let done = bed.run("deploy", &[]);
    assert_ne!(done.code, Some(0), "{done}");
    let said = format!("{}{}", done.stderr, done.stdout).replace('\n', " ");
    assert!(said.contains("is damaged"), "{done}");
    assert!(said.contains(name), "{done}");
    bed.destroy();
    // At the backup it is of no account: a full copy takes its place, and that of other files.
    fs::rename(at.join(name), bed.directory().join(name)).expect("moved");
    let there = base(&bed, "beta");
    fs::create_dir_all(&there).expect("made");
    fs::rename(bed.directory().join(name), there.join(name)).expect("moved");
    bed.deploy();
    assert_eq!(tell(&bed, 7), 7);
    until("the journal to be gone", || (!there.join(name).exists()).then_some(()));
    bed.destroy();
}

/// VO-12
#[test]
fn read_only_files_that_differ_are_named_and_protection_waits_until_they_do_not() {
    if !is_installed("python3") {
        return;
    }
    let program = "import os
try:
    open('@/fixed/new', 'w')
    raise SystemExit('it can be written')
except OSError as error:
    assert error.errno == 30, error
"
    .to_owned()
        + KEEPER;
    let volumes = ["{ path: @/seen, kind: replicated }", "{ path: @/fixed, kind: read-only }"];
    let bed = bed("fixed", &program, &volumes, "");
    bed.deploy();
    assert_eq!(tell(&bed, 7), 7);
    // Both hosts of a lab see the same files, so they are changed between the looks of both.
    bed.fault("kill-host:beta");
    let file = bed.directory().join("fixed/file");
    let time = fs::metadata(&file).and_then(|m| m.modified()).expect("a time");
    let put = |text: &str| {
        fs::write(&file, text).expect("written");
        let file = fs::File::options().write(true).open(&file).expect("there");
        file.set_modified(time).expect("set");
    };
    put("as it isn't");
    bed.fault("revive-host:beta");
    until_said(&bed, &["is not the same on both hosts", "/file: "]);
    assert_eq!(bed.store().expect("it runs")["protected"], false);
    put("as it is");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 12);
    bed.destroy();
}

/// Both hosts have lost power, and the files of one of them are older. It does not begin with them, though
/// it is the primary, and says what to do. Where the newer ones are it begins with these.
#[test]
fn of_two_hosts_that_begin_again_the_one_with_the_newer_files_may() {
    if !is_installed("python3") {
        return;
    }
    let bed = bed("older", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    bed.deploy();
    assert_eq!(tell(&bed, 1000), 1000);
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 1005);
    bed.fault("kill-host:beta");
    for host in ["alpha", "beta"] {
        // What is in /run is gone as well.
        let noted = bed.state().join(format!("{host}.store.generation"));
        fs::remove_file(noted).expect("it was noted there");
        bed.fault(&format!("revive-host:{host}"));
    }
    until_said(&bed, &["are of generation 1", "has run elsewhere in generation 2"]);
    let store = bed.store().expect("it is known");
    assert_eq!((&store["primary"], &store["phase"]), (&Value::Null, &"failed".into()), "{store:#}");
    bed.destroy();

    let hosts = "primary: alpha\n    backup: beta";
    assert!(bed.text().contains(hosts));
    bed.write(&bed.text().replace(hosts, "primary: beta\n    backup: alpha"));
    bed.deploy();
    assert_eq!(tell(&bed, 5), 1010);
    let store = bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!((&store["primary"], &store["generation"]), (&"beta".into(), &3.into()), "{store:#}");
    // Its copy is as new now.
    bed.fault("kill-host:beta");
    bed.until_store("it runs on alpha", |s| s["primary"] == "alpha" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 1015);
    bed.destroy();
}

/// VO-13
#[test]
fn a_file_that_is_written_to_in_no_volume_is_refused_by_name() {
    if !is_installed("python3") {
        return;
    }
    let program = "log = open('@/log', 'a')\n".to_owned() + KEEPER;
    let volume = "{ path: @/seen, kind: replicated }";
    let here = bed("home", &program, &[volume], "on-unprotectable: stop");
    let done = here.run("deploy", &[]);
    assert_ne!(done.code, Some(0), "{done}");
    let said =
        format!("{}{}", done.stderr, done.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(said.contains("open for writing and in no volume"), "{done}");
    assert!(said.contains(&here.directory().join("log").display().to_string()), "{done}");
    drop(here);
    // A volume of any kind that holds it is a way out.
    let volumes = ["{ path: @/seen, kind: replicated }", "{ path: @/logs, kind: shared }"];
    let program = "log = open('@/logs/log', 'a')\n".to_owned() + KEEPER;
    let bed = bed("homes", &program, &volumes, "");
    fs::create_dir(bed.directory().join("logs")).expect("made");
    bed.deploy();
    assert_eq!(tell(&bed, 7), 7);
    bed.destroy();
}

/// Keeps all that an agent has open, as a thread of it does that cannot end, kills it, and says how many ends of connections
/// to the kernel's FUSE were among it, and how many of these nobody has ended.
const HOLDER: &str = "\
import ctypes, os, select, sys
call = ctypes.CDLL(None).syscall
pid = int(sys.argv[1])
handle = os.pidfd_open(pid)
numbers = [int(n) for n in os.listdir(f'/proc/{pid}/fd')]
def kind(n):
    try: return os.readlink(f'/proc/{pid}/fd/{n}')
    except FileNotFoundError: return ''
kinds = {n: kind(n) for n in numbers}
kept = {n: call(438, handle, n, 0) for n in numbers}
held = [kept[n] for n in numbers if kinds[n] == '/dev/fuse']
os.kill(pid, 9)
ended = 0
for fd in held:
    poll = select.poll()
    poll.register(fd, 0)
    ended += len(poll.poll(20000))
print(len(held), len(held) - ended)
";

/// VO-9: a connection whose server is dead is ended, even if the dead process still has it.
#[test]
fn who_waits_for_the_server_of_a_killed_agent_does_not_wait_for_ever() {
    if !is_installed("python3") {
        return;
    }
    let bed = bed("guard", KEEPER, &["{ path: @/seen, kind: replicated }"], "");
    bed.deploy();
    assert_eq!(tell(&bed, 5), 5);
    let inspected = bed.inspect();
    let nodes = inspected["nodes"].as_array().expect("nodes");
    let alpha = nodes.iter().find(|node| node["name"] == "alpha").expect("alpha");
    let agent = alpha["agent_pid"].as_u64().unwrap_or_else(|| panic!("no agent: {alpha:#}"));
    let guards = || {
        let all = fs::read_dir("/proc").expect("processes").flatten();
        let of = |path: PathBuf| fs::read(path.join("cmdline")).unwrap_or_default();
        all.filter(|entry| {
            let words = of(entry.path());
            let mut words = words.split(|byte| *byte == 0).skip(1);
            words.next() == Some(b"__volume-guard")
                && words.next() == Some(agent.to_string().as_bytes())
        })
        .count()
    };
    assert_eq!(guards(), 1);
    // A process that dies closes its files in the thread that ends last. That is not to be the one by which
    // the guard learns of it.
    let tasks = format!("/proc/{agent}/task");
    let tasks = fs::read_dir(tasks).expect("threads").flatten().map(|entry| entry.path());
    let watched = |task: &PathBuf| fs::read(task.join("comm")).is_ok_and(|name| name == b"guard\n");
    let watched: Vec<PathBuf> = tasks.filter(watched).collect();
    assert_eq!(watched.len(), 1, "{watched:?}");
    until("the watched thread to have no descriptors", || {
        (fs::read_dir(watched[0].join("fd")).ok()?.count() == 0).then_some(())
    });
    let done =
        std::process::Command::new("python3").args(["-c", HOLDER, &agent.to_string()]).output();
    let said = String::from_utf8(done.expect("it runs").stdout).expect("text");
    let (held, left) = said.trim().split_once(' ').expect("two numbers");
    assert!(held.parse::<usize>().expect("a number") > 0, "{said}");
    assert_eq!(left, "0", "connections that nobody has ended");
    until("the guard to end", || (guards() == 0).then_some(()));
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(tell(&bed, 5), 10);
    bed.destroy();
}
