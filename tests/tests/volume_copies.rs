//! Volumes that are larger than what a host would hold in memory: a new backup gets their files ahead of the first
//! checkpoint.

use nilicon_tests::{Bed, OBEDIENT, Sketch, is_installed, nilicon, tell, until};
use serde_json::Value;

/// Makes files of 400 MB in all, of bytes that cannot be packed, and begins to change them for ever.
const FILL: &str = "\
import hashlib, random, threading, time
os.makedirs('@/seen/small', exist_ok=True)
for n in range(2000):
    open(f'@/seen/small/{n}', 'wb').write(os.urandom(10_000))
for n in range(4):
    with open(f'@/seen/large{n}', 'wb') as file:
        for _ in range(95):
            file.write(os.urandom(1_000_000))
with open('@/seen/holes', 'wb') as file:
    file.truncate(1 << 31)
    file.seek(1 << 30)
    file.write(b'in the middle')
busy = True
def change():
    dice = random.Random(7)
    while busy:
        for n in range(4):
            with open(f'@/seen/large{n}', 'r+b') as file:
                file.seek(dice.randrange(90_000_000))
                file.write(dice.randbytes(5000))
        name = f'@/seen/small/{dice.randrange(2000)}'
        os.rename(name, name + '.new')
        open(name, 'wb').write(dice.randbytes(3000))
        os.unlink(name + '.new')
        time.sleep(0.002)
changer = threading.Thread(target=change)
changer.start()
def sums():
    names = sorted(os.path.join(at, name) for at, _, all in os.walk('@/seen') for name in all)
    found = hashlib.sha256()
    for name in names:
        found.update(name.encode())
        with open(name, 'rb') as file:
            if name.endswith('holes'):
                file.seek(1 << 30)
                found.update(file.read(13) + str(os.fstat(file.fileno()).st_size).encode())
            else:
                found.update(file.read())
    return len(names), found.hexdigest()
";

/// The most memory that a host's agent has had, in MB.
fn most_memory(bed: &Bed, host: &str) -> u64 {
    let inspected = bed.inspect();
    let nodes = inspected["nodes"].as_array().expect("nodes");
    let node = nodes.iter().find(|node| node["name"] == host).expect("the host");
    let pid = node["agent_pid"].as_u64().unwrap_or_else(|| panic!("no agent: {node:#}"));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1000
}

/// VO-19
#[test]
fn a_new_backup_gets_large_volumes_while_they_are_written_to() {
    if !is_installed("python3") {
        return;
    }
    let sketch = Sketch::of(
        "command: [python3, @/server.py]\n    ready: { tcp: 7000 }\n    volume-directory: @/kept\n    \
         volumes:\n      - { path: @/seen, kind: replicated }",
    );
    let bed = Bed::new("large", &sketch);
    let here = bed.directory().display().to_string();
    bed.write(&bed.text().replace('@', &here));
    std::fs::write(bed.directory().join("server.py"), OBEDIENT).expect("written");
    let ask = |told: &str| tell(&bed, &told.replace('@', &here));
    let protected = |store: &Value| store["protected"] == true;
    bed.deploy();
    assert_eq!(ask(FILL), "done");
    bed.until_store("it is protected", protected);
    // A backup that begins with nothing.
    bed.fault("kill-host:beta");
    let there = bed.directory().join("kept").join(&bed.name).join("beta");
    std::fs::remove_dir_all(&there).expect("it was there");
    bed.fault("revive-host:beta");
    until("the copy to be told of", || {
        bed.inspect().to_string().contains("a new backup gets its files").then_some(())
    });
    bed.until_store("it is protected again", protected);
    // At the primary its own memory is in it: 400 MB at once would be in both.
    for host in ["alpha", "beta"] {
        let memory = most_memory(&bed, host);
        assert!(memory < 300, "the agent of {host} has had {memory} MB");
    }
    ask("busy = False");
    ask("changer.join()");
    let before = ask("sums()");
    assert!(before.starts_with("(2005, "), "{before}");
    let same = |done: nilicon_tests::Done| done.code == Some(0);
    until("both hosts to have the same", || {
        same(nilicon(&["volume", "verify", &bed.file])).then_some(())
    });
    let store = there.join("store");
    let entries = std::fs::read_dir(&store).expect("it is there").flatten();
    let left = entries.filter(|e| e.file_name().to_string_lossy().starts_with("journal"));
    assert_eq!(left.count(), 0, "nothing waits to be carried out");
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(ask("sums()"), before);
    bed.destroy();
}
