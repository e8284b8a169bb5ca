//! Files that are part of each checkpoint: after a failover they are those of the moment that the
//! memory is of.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nilicon_tests::{Bed, OBEDIENT, Sketch, is_installed, nilicon, tell, until};
use serde_json::Value;

/// Redis with an append-only file in a replicated volume; the test puts its directory for `@`.
const REDIS_AOF: &str = "command: [redis-server, --port, \"6379\", --bind, 0.0.0.0, --save, \"\", \
    --protected-mode, \"no\", --dir, @/seen, --appendonly, \"yes\", --appendfsync, RULE]\n    \
    ready: { tcp: 6379 }\n    volume-directory: @/kept\n    volumes:\n      \
    - { path: @/seen, kind: replicated }";

/// A server that adds a row to a database for each connection and answers with their number and what
/// the database's own check says; the test puts the directory of the volume for `@`, and how it is
/// written for MODE.
const DATABASE: &str = "\
import socket, sqlite3
database = sqlite3.connect('@/data.db', isolation_level=None)
database.execute('pragma journal_mode=MODE')
database.execute('create table if not exists rows (n integer primary key)')
server = socket.create_server(('0.0.0.0', 7000))
while True:
    peer, _ = server.accept()
    peer.recv(64)
    database.execute('insert into rows default values')
    count = database.execute('select count(*) from rows').fetchone()[0]
    check = database.execute('pragma integrity_check').fetchone()[0]
    peer.sendall(f'{count} {check}'.encode())
    peer.close()
";

/// A lab of it.
fn bed(tag: &str, rule: &str, loaded: bool) -> Bed {
    let sketch = Sketch::of(&REDIS_AOF.replace("RULE", rule));
    let bed = Bed::new(tag, &if loaded { sketch.loaded() } else { sketch });
    bed.write(&bed.text().replace('@', &bed.directory().display().to_string()));
    bed
}

/// The directories of a host's volumes.
fn kept(bed: &Bed, host: &str) -> Vec<PathBuf> {
    let base = bed.directory().join("kept").join(&bed.name).join(host).join("store");
    let entries = std::fs::read_dir(&base).expect("the host has volumes");
    let paths = entries.map(|entry| entry.expect("an entry").path().join("tree"));
    paths.filter(|path| path.is_dir()).collect()
}

/// All that a reader sees of a tree: kind, mode, owner, time of the last change, contents.
fn seen(root: &Path) -> BTreeMap<PathBuf, (u32, u32, i64, i64, Vec<u8>)> {
    let mut all = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(inside) = todo.pop() {
        let path = root.join(&inside);
        let meta = path.symlink_metadata().expect("it is there");
        let kind = meta.file_type();
        let mut contents = Vec::new();
        if kind.is_dir() {
            let entries = std::fs::read_dir(&path).expect("it can be listed");
            todo.extend(entries.map(|e| inside.join(e.expect("an entry").file_name())));
        } else if kind.is_symlink() {
            contents = path.read_link().expect("a link").into_os_string().into_encoded_bytes();
        } else if !kind.is_fifo() && !kind.is_socket() {
            contents = std::fs::read(&path).expect("it can be read");
        }
        let time = (meta.mtime(), meta.mtime_nsec());
        all.insert(inside, (meta.mode(), meta.uid(), time.0, time.1, contents));
    }
    all
}

/// What redis-check-aof says of the append-only files in a directory of Redis.
fn check_aof(directory: &Path) -> String {
    let manifest = directory.join("appendonlydir/appendonly.aof.manifest");
    let done = std::process::Command::new("redis-check-aof").arg(&manifest).output();
    let done = done.expect("redis-check-aof runs");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{}: {text}", manifest.display());
    text
}

fn redis(bed: &Bed, command: &[&str]) -> String {
    let line: Vec<&str> =
        ["redis-cli", "-h", "10.77.0.10"].iter().chain(command).copied().collect();
    bed.exec("client", &line).expect_success().stdout.trim().to_owned()
}

/// What the container sees of its volume where it runs.
fn inside(bed: &Bed, store: &Value) -> PathBuf {
    let host = store["primary"].as_str().unwrap_or_else(|| panic!("it runs nowhere: {store:#}"));
    let group = format!("/{}/{host}", bed.name);
    let processes = std::fs::read_dir("/proc").expect("processes");
    let mut roots = processes.map(|entry| entry.expect("an entry").path()).filter(|process| {
        let groups = std::fs::read_to_string(process.join("cgroup")).unwrap_or_default();
        groups.contains(&group)
    });
    let process = roots.next().unwrap_or_else(|| panic!("no process in {group}"));
    let at = bed.directory().join("seen");
    process.join("root").join(at.strip_prefix("/").expect("a path"))
}

/// VO-4, VO-5
#[test]
fn an_append_only_file_is_of_the_moment_that_the_memory_is_of() {
    if !is_installed("redis-server") || !is_installed("redis-check-aof") {
        return;
    }
    for rule in ["always", "everysec"] {
        let bed = bed(&format!("aof{}", &rule[..2]), rule, true);
        let faults = ["--duration", "5s", "--fault", "kill-host:alpha@2s", "-o", "json"];
        let report = bed.run("run", &faults).expect_success().json();
        assert_eq!(report["recovered"], true, "{report:#}");
        for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
            assert_eq!(report["clients"][0][figure], 0, "{rule}: {figure}: {report:#}");
        }
        assert_eq!(report["failover"]["host"], "beta", "{report:#}");
        bed.expect_gone();
    }
}

/// VO-4, VO-5
#[test]
fn the_files_of_both_hosts_are_the_same_and_whole() {
    if !is_installed("redis-server") || !is_installed("redis-check-aof") {
        return;
    }
    let bed = bed("vol", "always", false);
    bed.deploy();
    for i in 0..50 {
        assert_eq!(redis(&bed, &["set", &format!("key{i}"), &format!("value{i}")]), "OK");
    }
    // A rewrite makes, renames and removes files while they are open.
    redis(&bed, &["bgrewriteaof"]);
    let done = |info: String| info.contains("aof_rewrite_in_progress:0").then_some(());
    until("the rewrite to end", || done(redis(&bed, &["info", "persistence"])));
    assert_eq!(redis(&bed, &["set", "last", "of all"]), "OK");
    let store = bed.store().expect("it runs");
    let (here, there) = (kept(&bed, "alpha"), kept(&bed, "beta"));
    assert_eq!((here.len(), there.len()), (1, 1));
    let primary = seen(&inside(&bed, &store));
    assert!(primary.len() > 3, "{:?}", primary.keys());
    assert!(primary == seen(&here[0]), "the primary's directory is not what the container sees");
    // It was acknowledged, so the backup has it; it is carried out in a moment.
    until("the backup to be as far", || (seen(&there[0]) == primary).then_some(()));
    check_aof(&there[0]);
    let done = nilicon(&["volume", "verify", &bed.file]).expect_success();
    assert!(done.stdout.contains("the same on alpha and beta"), "{done}");

    bed.fault("kill-host:alpha");
    let store = bed.until_store("it runs on beta", |store| {
        store["primary"] == "beta" && store["phase"] != "promoting"
    });
    assert_eq!(redis(&bed, &["get", "last"]), "of all");
    assert_eq!(redis(&bed, &["get", "key49"]), "value49");
    assert_eq!(redis(&bed, &["set", "after", "the failover"]), "OK");
    assert!(seen(&inside(&bed, &store)) == seen(&there[0]), "the container sees other files");
    let done = nilicon(&["volume", "verify", &bed.file]);
    assert_eq!(done.code, Some(1), "the old primary's files are behind: {done}");
    assert!(done.stdout.contains("appendonly.aof"), "{done}");
    check_aof(&there[0]);

    // The old primary comes back, and gets a full copy, with what came later.
    bed.fault("revive-host:alpha");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!(redis(&bed, &["set", "more", "of it"]), "OK");
    until("the new backup to be as far", || (seen(&here[0]) == seen(&there[0])).then_some(()));
    check_aof(&here[0]);
    bed.destroy();
}

/// What is in a tmpfs of its own is carried as memory is; nothing of it is on a disk.
#[test]
fn an_ephemeral_volume_goes_on_with_the_container() {
    if !is_installed("redis-server") {
        return;
    }
    let sketch =
        Sketch::of(&REDIS_AOF.replace("RULE", "always").replace("replicated", "ephemeral"));
    let bed = Bed::new("tmp", &sketch);
    bed.write(&bed.text().replace('@', &bed.directory().display().to_string()));
    bed.deploy();
    assert_eq!(redis(&bed, &["set", "a", "b"]), "OK");
    let before = seen(&inside(&bed, &bed.store().expect("it runs")));
    bed.fault("kill-host:alpha");
    let store = bed.until_store("it runs on beta", |store| {
        store["primary"] == "beta" && store["phase"] != "promoting"
    });
    assert_eq!(redis(&bed, &["get", "a"]), "b");
    let after = seen(&inside(&bed, &store));
    let contents = |all: &BTreeMap<PathBuf, (u32, u32, i64, i64, Vec<u8>)>| {
        all.iter().map(|(path, seen)| (path.clone(), seen.0, seen.4.clone())).collect::<Vec<_>>()
    };
    assert_eq!(contents(&before), contents(&after));
    assert!(before.len() > 3, "{:?}", before.keys());
    assert!(!bed.directory().join("kept").exists());
    bed.destroy();
}

/// VO-5: a database whose index of the log is shared memory in a file of the volume.
#[test]
fn a_database_in_wal_mode_goes_on_whole() {
    a_database_goes_on_whole("wal");
}

/// VO-5: a database whose journal is made and removed in each transaction.
#[test]
fn a_database_with_a_rollback_journal_goes_on_whole() {
    a_database_goes_on_whole("delete");
}

fn a_database_goes_on_whole(mode: &str) {
    if !is_installed("python3") {
        return;
    }
    let sketch = Sketch::of(
        "command: [python3, @/server.py]\n    ready: { tcp: 7000 }\n    \
         volume-directory: @/kept\n    volumes:\n      - { path: @/seen, kind: replicated }",
    );
    let bed = Bed::new(&format!("db{}", &mode[..2]), &sketch);
    let directory = bed.directory().display().to_string();
    bed.write(&bed.text().replace('@', &directory));
    let program = DATABASE.replace('@', &format!("{directory}/seen")).replace("MODE", mode);
    std::fs::write(bed.directory().join("server.py"), program).expect("written");
    let ask = |word: &str| tell(&bed, word);
    bed.deploy();
    // Whether it accepts was asked by a connection of its own.
    let first = ask("add");
    let base: u64 = first.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    for n in 1..20 {
        assert_eq!(ask("add"), format!("{} ok", base + n));
    }
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    for n in 20..40 {
        assert_eq!(ask("add"), format!("{} ok", base + n));
    }
    bed.fault("revive-host:alpha");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!(ask("add"), format!("{} ok", base + 40));
    bed.destroy();
}

/// The example of this name, with its files in the test's directory and its fault earlier; it is run.
fn example(tag: &str, name: &str, change: &[(&str, &str)]) -> (Bed, nilicon_tests::Done) {
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies");
    let bed = Bed::new(tag, &Sketch::of(REDIS_AOF));
    let text = std::fs::read_to_string(format!("{examples}/{name}.topo.yml")).expect("it");
    let directory = bed.directory().display().to_string();
    let listed = format!("volume-directory: {directory}/kept\n    volumes:");
    let mut text = text.replace("workdir: services", &format!("workdir: {examples}/services"));
    let mine = [
        (format!("name: {name}\n"), format!("name: {}\n", bed.name)),
        ("volumes:".to_owned(), listed),
        ("{ at: 4s, ".to_owned(), "{ at: 2s, ".to_owned()),
    ];
    let others = change.iter().map(|(old, new)| ((*old).to_owned(), (*new).to_owned()));
    for (old, new) in mine.into_iter().chain(others) {
        assert!(text.contains(&old), "there is no `{old}`");
        text = text.replace(&old, &new);
    }
    bed.write(&text);
    let done = bed.run("run", &["--duration", "5s", "-o", "json"]);
    bed.expect_gone();
    (bed, done)
}

/// What is in the report of a run that kept all it had promised, and whose files were found whole.
fn is_whole(report: &Value) {
    assert_eq!(report["recovered"], true, "{report:#}");
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(report["clients"][0][figure], 0, "{figure}: {report:#}");
    }
    assert!(report["clients"][0]["acknowledged_writes"].as_u64() > Some(20), "{report:#}");
    assert_eq!(report["failover"]["host"], "beta", "{report:#}");
    let files = serde_json::json!({ "compared": 0, "checked": 1, "wrong": [] });
    assert_eq!(report["files"], files, "{report:#}");
}

/// VO-5: a tree of processes with shared memory of three kinds and its log of what it will write. What
/// was answered is there, pg_amcheck finds nothing, and what pgbench has moved adds up.
#[test]
fn postgres_goes_on_whole() {
    // Debian has the server in no PATH.
    let server = Path::new("/usr/lib/postgresql").is_dir() || is_installed("postgres");
    if !server || !["pgbench", "psql", "python3", "setpriv"].into_iter().all(is_installed) {
        return;
    }
    is_whole(&example("pg", "postgres", &[]).1.expect_success().json());
}

/// VO-5, with what a database's own check finds.
#[test]
fn sqlite_under_load_goes_on_whole() {
    if !is_installed("python3") {
        return;
    }
    for name in ["sqlite", "sqlite-wal"] {
        is_whole(&example(name, name, &[]).1.expect_success().json());
    }
}

/// VO-16, under load.
#[test]
fn a_root_goes_on_whole() {
    if !is_installed("redis-server") || !is_installed("redis-check-aof") {
        return;
    }
    is_whole(&example("whole", "root", &[]).1.expect_success().json());
}

/// VO-14
#[test]
fn a_run_whose_check_fails_is_no_success() {
    if !is_installed("python3") {
        return;
    }
    let check = "python3 -c \"import sqlite3; d = sqlite3.connect('data.db');";
    // It sees the files, where the program is, and may write.
    let told = "test -f data.db && echo x > new && ls \"$WORKDIR/tables.py\"; exit 3 #";
    let done = example("bad", "sqlite", &[(check, told)]).1;
    assert_eq!(done.code, Some(1), "{done}");
    let report = done.json();
    let wrong = report["files"]["wrong"][0].as_str().unwrap_or_default();
    assert!(wrong.contains("/srv/sqlite on beta are not whole"), "{report:#}");
    assert!(wrong.contains("exit status: 3") && wrong.contains("/tables.py"), "{report:#}");
}

/// VO-5: Nginx writes a line for each request to a log in a volume. After the loss of its host each
/// line is whole, and there is one for each write that a client was told of.
#[test]
fn nginx_goes_on_with_its_access_log() {
    if !is_installed("nginx") {
        return;
    }
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies");
    let bed = Bed::new("nlog", &Sketch::of(REDIS_AOF));
    let text = std::fs::read_to_string(format!("{examples}/nginx-log.topo.yml")).expect("it");
    let directory = bed.directory().display().to_string();
    let listed = format!("volume-directory: {directory}/kept\n    volumes:");
    let changed = [
        ("name: nginx-log\n", format!("name: {}\n", bed.name)),
        ("workdir: services", format!("workdir: {examples}/services")),
        ("volumes:", listed),
        ("{ at: 4s, ", "{ at: 2s, ".to_owned()),
    ];
    bed.write(&changed.iter().fold(text, |text, (old, new)| {
        assert!(text.contains(old), "there is no `{old}`");
        text.replace(old, new)
    }));
    let report = bed.run("run", &["--duration", "5s", "-o", "json"]).expect_success().json();
    assert_eq!(report["recovered"], true, "{report:#}");
    let client = &report["clients"][0];
    for figure in ["lost_writes", "wrong_replies", "broken_connections"] {
        assert_eq!(client[figure], 0, "{figure}: {report:#}");
    }
    let log = kept(&bed, "beta")[0].join("access.log");
    let log = std::fs::read_to_string(log).expect("the log of the survivor");
    let whole = |line: &&str| line.starts_with("10.77.0.1 ") && line.ends_with(" end");
    let torn: Vec<&str> = log.lines().filter(|line| !whole(line)).collect();
    assert!(torn.is_empty(), "{torn:?}");
    let writes = log.lines().filter(|line| line.contains(" PUT ")).count() as u64;
    let acknowledged = client["acknowledged_writes"].as_u64().expect("a number");
    assert!(acknowledged > 20 && writes >= acknowledged, "{writes} of {acknowledged}: {report:#}");
    bed.expect_gone();
}

/// VO-16: a container whose root is a volume: what it changes anywhere goes along, whether it was a file of the
/// host or not, and nothing of the host is touched.
#[test]
fn what_is_written_anywhere_in_a_root_goes_along() {
    if !is_installed("python3") {
        return;
    }
    let sketch = Sketch::of(
        "command: [python3, @/server.py]\n    ready: { tcp: 7000 }\n    \
         volume-directory: @/kept\n    volumes:\n      - { path: /, kind: replicated }\n      \
         - { path: @/memory, kind: ephemeral }\n      - { path: @/fixed, kind: read-only }\n      \
         - { path: @/shared, kind: shared }\n      - { path: @/inner, kind: replicated }",
    );
    let bed = Bed::new("root", &sketch);
    let here = bed.directory().display().to_string();
    bed.write(&bed.text().replace('@', &here));
    let file = |name: &str, contents: &str| {
        let path = bed.directory().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        std::fs::write(path, contents).expect("written");
    };
    file("server.py", OBEDIENT);
    for (name, contents) in [
        ("seen/gone", "of the host"),
        ("seen/changed", "of the host"),
        ("seen/held", "of the host"),
        ("seen/moved/inner", "of the host"),
        ("fixed/it", "fixed"),
        ("shared/it", "shared"),
    ] {
        file(name, contents);
    }
    // But for times of directories: a spare makes files without a name where they had theirs.
    let of_host = || -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let all = seen(&bed.directory().join("seen")).into_iter();
        all.map(|(path, (mode, .., contents))| (path, (mode, contents))).collect()
    };
    let before = of_host();
    let ask = |told: &str| tell(&bed, &told.replace('@', &here));
    // Far from the test's own directory.
    let far = format!("/etc/nilicon-test-{}", std::process::id());
    bed.deploy();
    for told in [
        "os.remove('@/seen/gone')",
        "os.rename('@/seen/moved', '@/seen/elsewhere')",
        "open('@/seen/changed', 'a').write(', and more')",
        "open('@/seen/new', 'w').write('new')",
        // Files without a name: one of its own, and one that was the host's.
        "held = open('@/seen/unnamed', 'w+'); held.write('unnamed'); held.flush(); os.unlink('@/seen/unnamed')",
        "other = open('@/seen/held', 'r+'); other.write('IT'); other.flush(); os.unlink('@/seen/held')",
        "sock = socket.socket(socket.AF_UNIX); sock.bind('@/seen/sock'); sock.listen(1)",
        "os.chdir('@/seen/elsewhere')",
        // Watches of a directory of its own, and of one of the host.
        "libc = __import__('ctypes').CDLL(None); watch = libc.inotify_init(); os.set_blocking(watch, False)",
        "os.mkdir('@/seen/elsewhere/mine')",
        "assert libc.inotify_add_watch(watch, b'@/seen/elsewhere/mine', 0x100) == 1",
        "assert libc.inotify_add_watch(watch, b'@/fixed/..', 0x100) == 2",
        "open('@/memory/it', 'w').write('memory')",
        "open('@/shared/it', 'a').write(', for both')",
        "open('@/inner/it', 'w').write('inner')",
        "first = paths()",
    ] {
        let answer = ask(told);
        assert!(!answer.contains("Error"), "{told}: {answer}");
    }
    assert_eq!(ask(&format!("open('{far}', 'w').write('far')")), "3");
    let looks = [
        ("sorted(os.listdir('@/seen'))", "['changed', 'elsewhere', 'new', 'sock']"),
        ("open('@/seen/changed').read()", "of the host, and more"),
        ("(held.seek(0), held.read())[1]", "unnamed"),
        ("(other.seek(0), other.read())[1]", "IT the host"),
        ("os.getcwd()", "@/seen/elsewhere"),
        ("open('inner').read()", "of the host"),
        ("open('@/memory/it').read()", "memory"),
        ("open('@/fixed/it').read()", "fixed"),
        ("open('@/shared/it').read()", "shared, for both"),
        ("open('@/inner/it').read()", "inner"),
        ("(open('mine/own', 'w'), os.read(watch, 999)[16:19], os.unlink('mine/own'))[1]", "b'own'"),
        (
            "(open('@/theirs', 'w'), os.read(watch, 999)[16:22], os.unlink('@/theirs'))[1]",
            "b'theirs'",
        ),
        // It is listening still, and programs of the host can be started.
        (
            "(c := socket.socket(socket.AF_UNIX), c.connect('@/seen/sock'), sock.accept(), 'heard')[3]",
            "heard",
        ),
        ("subprocess.check_output(['cat', '@/seen/new']).decode()", "new"),
        // Its program and its libraries have the paths that they had.
        ("[p for p in first if p not in paths()]", "[]"),
    ];
    let look = |when: &str| {
        for (told, wanted) in looks {
            assert_eq!(ask(told), wanted.replace('@', &here), "{when}: {told}");
        }
        assert_eq!(ask(&format!("open('{far}').read()")), "far", "{when}");
    };
    look("at first");
    assert_eq!(of_host(), before, "the host's own files");
    assert!(!Path::new(&far).exists());

    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    look("on beta");
    assert_eq!(ask("open('@/seen/new', 'a').write(' there')"), "6");
    bed.fault("revive-host:alpha");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    assert_eq!(ask("open('@/seen/new').read()"), "new there");
    ask("open('@/seen/new', 'w').write('new')");

    // And back, from a host where programs were mapped before its root was there.
    bed.fault("kill-host:beta");
    bed.until_store("it is back", |s| s["primary"] == "alpha" && s["phase"] != "promoting");
    look("on alpha again");
    bed.fault("revive-host:beta");
    bed.until_store("it is protected", |store| store["protected"] == true);
    assert_eq!(of_host(), before, "the host's own files");

    // Whoever maps what was copied up maps the copy, or what is below: it cannot be told.
    ask("kept = open('@/seen/changed', 'rb')");
    ask("view = __import__('mmap').mmap(kept.fileno(), 0, flags=2, prot=1)");
    let store = bed.until_store("it is refused", |store| store["protected"] == false);
    let reason = store["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains("a file of the host that was written to") && reason.contains("mapping"),
        "{store:#}"
    );
    bed.destroy();
}
