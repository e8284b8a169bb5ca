//! Programs that map files of volumes: a spare maps them when it has the volumes, in its takeover.

use nilicon_tests::{Bed, OBEDIENT, Sketch, is_installed, tell};
use serde_json::Value;

/// VO-5
#[test]
fn programs_and_libraries_in_a_volume_go_on() {
    programs_go_on("prog", "@/seen");
}

/// VO-5, VO-16
#[test]
fn programs_and_libraries_written_to_a_root_go_on() {
    programs_go_on("progr", "/");
}

/// Runs the server by a copy of Python in the volume. What is called python3 may be a script.
const START: &str = "\
mkdir -p @/seen
export PYTHONHOME=$(python3 -c \"
import os, shutil, sys
shutil.copy(os.path.realpath(sys.executable), '@/seen/own')
print(sys.base_prefix)\")
exec @/seen/own @/server.py
";

/// The program itself, another one, a library, and data that is mapped privately and to be read are files of
/// the volume at `path`. They go on as they were, when they have got another name, and when they have none.
fn programs_go_on(tag: &str, path: &str) {
    if !is_installed("python3") {
        return;
    }
    let sketch = Sketch::of(&format!(
        "command: [sh, @/start]\n    ready: {{ tcp: 7000 }}\n    volume-directory: @/kept\n    \
         volumes:\n      - {{ path: {path}, kind: replicated }}"
    ));
    let bed = Bed::new(tag, &sketch);
    let here = bed.directory().display().to_string();
    bed.write(&bed.text().replace('@', &here));
    for (name, contents) in [("server.py", OBEDIENT), ("start", START)] {
        std::fs::write(bed.directory().join(name), contents.replace('@', &here)).expect("written");
    }
    let ask = |told: &str| tell(&bed, &told.replace('@', &here));
    bed.deploy();
    for told in [
        "import ctypes, mmap, shutil",
        "shutil.copy('/bin/sleep', '@/seen/sleep')",
        "child = subprocess.Popen(['@/seen/sleep', '600'])",
        "shutil.copy(next(p for p in paths() if 'libm.so' in p), '@/seen/lib.so')",
        "lib = ctypes.CDLL('@/seen/lib.so'); lib.cos.restype = ctypes.c_double",
        "open('@/seen/data', 'wb').write(b'a' * 4096 + b'b' * 4096 + b'c' * 4096)",
        "reader, writer = os.open('@/seen/data', os.O_RDONLY), os.open('@/seen/data', os.O_RDWR)",
        "private = mmap.mmap(reader, 0, flags=mmap.MAP_PRIVATE, prot=3)",
        "shared = mmap.mmap(reader, 0, flags=mmap.MAP_SHARED, prot=1)",
        "private[4096:4100] = b'mine'",
        "os.pwrite(writer, b'new', 8192)",
        "libc = ctypes.CDLL(None); toggled = mmap.mmap(writer, 0)",
        "held = ctypes.c_char.from_buffer(toggled); at = ctypes.c_void_p(ctypes.addressof(held))",
        // Larger than what is copied as memory.
        "big = open('@/seen/big', 'w+b'); big.truncate(300 << 20)",
        "large = mmap.mmap(big.fileno(), 0); large[7:11] = b'here'; large[200 << 20] = 65",
    ] {
        let answer = ask(told);
        assert!(!answer.contains("Error"), "{told}: {answer}");
    }
    bed.until_store("it is protected", |store| store["protected"] == true);
    // Not seen by whoever does not look at the names: nothing is mapped anew.
    ask("os.rename('@/seen/lib.so', '@/seen/moved.so')");
    ask("open('@/seen/lib.so', 'w').write('no library')");
    // Through a mapping that can only be read again whenever anybody looks.
    let toggle = |word: &str| {
        let told = format!(
            "libc.mprotect(at, 12288, 3), toggled.__setitem__(slice(200, 204), b'{word}'), \
             libc.mprotect(at, 12288, 1)"
        );
        assert_eq!(ask(&told), "(0, None, 0)");
    };
    let look = |when: &str, toggled: &str| {
        let toggled = format!("(b'{toggled}', b'{toggled}')");
        for (told, wanted) in [
            ("toggled[200:204], shared[200:204]", &*toggled),
            ("large[6:12], large[200 << 20]", "(b'\\x00here\\x00', 65)"),
            ("big.seek(7), big.read(4)", "(7, b'here')"),
            ("os.readlink('/proc/self/exe')", "@/seen/own"),
            ("child.poll()", "None"),
            ("os.readlink(f'/proc/{child.pid}/exe')", "@/seen/sleep"),
            ("lib.cos(ctypes.c_double(0))", "1.0"),
            ("any('moved.so' in p for p in paths())", "True"),
            (
                "private[0:4], private[4096:4101], private[8192:8196]",
                "(b'aaaa', b'mineb', b'newc')",
            ),
            ("shared[4096:4100], shared[8192:8196]", "(b'bbbb', b'newc')"),
            (
                "os.pwrite(writer, b'then', 9000), shared[9000:9004], private[9000:9004]",
                "(4, b'then', b'then')",
            ),
        ] {
            assert_eq!(ask(told), wanted.replace('@', &here), "{when}: {told}");
        }
    };
    toggle("once");
    look("at first", "once");
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    look("on beta", "once");
    bed.fault("revive-host:alpha");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    toggle("then");
    // Without a name it is memory.
    ask("os.unlink('@/seen/moved.so')");
    bed.until_store("it is protected without it", |store| store["protected"] == true);
    bed.fault("kill-host:beta");
    bed.until_store("it is back", |s| s["primary"] == "alpha" && s["phase"] != "promoting");
    look("on alpha again", "then");
    bed.fault("revive-host:beta");
    bed.until_store("it is protected", |store| store["protected"] == true);
    bed.destroy();
}

/// VO-5, VO-17: etcd, whose file (bbolt) is mapped to be read and written by write(2).
#[test]
fn etcd_goes_on_whole() {
    if !is_installed("etcd") || !is_installed("python3") {
        return;
    }
    let sketch = Sketch::of(
        "command: [etcd, --data-dir, @/seen/etcd, --listen-client-urls, 'http://0.0.0.0:7000', \
         --advertise-client-urls, 'http://10.77.0.10:7000', --snapshot-count, '50']\n    \
         ready: { tcp: 7000, timeout: 30s }\n    volume-directory: @/kept\n    volumes:\n      \
         - { path: @/seen, kind: replicated }",
    );
    let bed = Bed::new("etcd", &sketch);
    bed.write(&bed.text().replace('@', &bed.directory().display().to_string()));
    let ask = |call: &str, body: &str| -> Value {
        let program = "import sys, urllib.request; \
            r = urllib.request.Request('http://10.77.0.10:7000/v3/kv/' + sys.argv[1], sys.argv[2].encode()); \
            print(urllib.request.urlopen(r, timeout=30).read().decode())";
        let done = bed.exec("client", &["python3", "-c", program, call, body]).expect_success();
        serde_json::from_str(&done.stdout).expect("JSON")
    };
    // Keys and values are in base 64: k00 to k59.
    let key = |n: u32| {
        let text = format!("k{n:02}");
        let bits = text.bytes().fold(0u32, |bits, byte| bits << 8 | u32::from(byte));
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |at: u32| char::from(digits[(bits >> at & 63) as usize]);
        [18, 12, 6, 0].map(digit).iter().collect::<String>()
    };
    let put = |n: u32| {
        let body = format!(r#"{{"key": "{0}", "value": "{0}"}}"#, key(n));
        let answer = ask("put", &body);
        answer["header"]["revision"].as_str().expect("a revision").parse::<u32>().expect("it")
    };
    let all = || ask("range", &format!(r#"{{"key": "{}", "range_end": "bA=="}}"#, key(0)));
    bed.deploy();
    bed.until_store("it is protected", |store| store["protected"] == true);
    let base = put(0);
    (1..20).for_each(|n| assert_eq!(put(n), base + n));
    bed.fault("kill-host:alpha");
    bed.until_store("it runs on beta", |s| s["primary"] == "beta" && s["phase"] != "promoting");
    assert_eq!(all()["count"], "20");
    (20..40).for_each(|n| assert_eq!(put(n), base + n));
    bed.fault("revive-host:alpha");
    bed.until_store("it is protected again", |store| store["protected"] == true);
    (40..60).for_each(|n| assert_eq!(put(n), base + n));
    bed.fault("kill-host:beta");
    bed.until_store("it is back", |s| s["primary"] == "alpha" && s["phase"] != "promoting");
    let found = all();
    let keys: Vec<&str> = found["kvs"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|pair| pair["value"].as_str().expect("a value"))
        .collect();
    assert_eq!(keys, (0..60).map(key).collect::<Vec<_>>(), "{found:#}");
    bed.fault("revive-host:beta");
    bed.until_store("it is protected", |store| store["protected"] == true);
    bed.destroy();
}
