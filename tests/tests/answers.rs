//! Answers so long that much of each waits in the send queue of its connection when a stop comes.

use nilicon_tests::{Bed, EMBEDDED, Sketch, is_installed};

/// Asks for 512 KB on each of eight connections, again and again.
const READERS: &str = r#"
import socket, threading
def ask(one, line):
    one.sendall(line)
    return one.makefile("rb")
first = socket.create_connection(("10.77.0.10", 6379))
assert ask(first, b"*3\r\n$3\r\nSET\r\n$4\r\nlong\r\n$524288\r\n" + b"x" * 524288 + b"\r\n").readline() == b"+OK\r\n"
def read():
    one = socket.create_connection(("10.77.0.10", 6379))
    for _ in range(150):
        answers = ask(one, b"GET long\r\n")
        assert answers.readline() == b"$524288\r\n"
        assert answers.read(524290) == b"x" * 524288 + b"\r\n"
all = [threading.Thread(target=read) for _ in range(8)]
for one in all: one.start()
for one in all: one.join()
print("all")
"#;

/// Segments that the kernel of the container has sent again.
fn sent_again(bed: &Bed) -> u64 {
    let text = bed.exec("store", &["cat", "/proc/self/net/snmp"]).expect_success().stdout;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut all = names.split(' ').zip(values.split(' '));
    let (_, value) = all.find(|(name, _)| *name == "RetransSegs").expect("it is counted");
    value.parse().expect("a number")
}

/// What the kernel wants to send while repair mode shows a send queue counts as sent and is not, and is sent again when
/// the client misses it: 9,000 to 22,000 segments in this test. So also queues of hundreds of kilobytes are read without
/// it.
#[test]
fn stops_do_not_make_long_answers_be_sent_again() {
    if !is_installed("python3") {
        return;
    }
    let bed = Bed::new("answers", &Sketch::of(EMBEDDED));
    bed.deploy();
    bed.until_store("it is protected", |store| store["protected"] == true);
    let done = bed.exec("client", &["python3", "-c", READERS]).expect_success();
    assert_eq!(done.stdout.trim(), "all");
    let found = sent_again(&bed);
    println!("{found} segments of 1,200 long answers were sent again");
    assert!(found < 1000, "{found} segments of 1,200 long answers were sent again");
    bed.destroy();
}
