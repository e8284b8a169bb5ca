//! A container with so much memory that its stops look for written pages where it has faulted
//! (docs/decisions.md, 79), and that changes its mappings all the time, so that some of these stops come to nothing.

use nilicon_tests::{Bed, Relay, Sketch, is_installed, until};
use serde_json::Value;

const RELAY: &str = env!("CARGO_BIN_EXE_relay");

/// Counts the lines that come in, and keeps what it counts all over its memory.
const PROGRAM: &str = "import mmap, socket, threading, time
memory = mmap.mmap(-1, 320 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), 4096):
    memory[at] = 1
def restless():
    while True:
        mmap.mmap(-1, 1 << 16).close()
        time.sleep(0.01)
threading.Thread(target=restless, daemon=True).start()
server = socket.create_server(('', 6379))
while True:
    client = server.accept()[0].makefile('rwb')
    count = 0
    for line in client:
        count += 1
        places = [(n, n * 7919 % 80000 * 4096) for n in [count, 1, count // 2 or 1]]
        memory[places[0][1]:places[0][1] + 8] = count.to_bytes(8, 'little')
        held = sum(memory[place:place + 8] == n.to_bytes(8, 'little') for n, place in places)
        client.write(b'%d %d\\r\\n' % (count, held))
        client.flush()
    client.close()
";

/// How often the primary's journal has left numbers of epochs out: their stops came to nothing.
fn left_out(bed: &Bed) -> usize {
    let text = std::fs::read_to_string(bed.state().join("alpha.store.epochs")).expect("a journal");
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let epochs: Vec<u64> =
        records.map(|record| record["epoch"].as_u64().expect("a number")).collect();
    epochs.windows(2).filter(|two| two[1] > two[0] + 1).count()
}

#[test]
fn a_large_and_restless_container_loses_nothing_when_stops_come_to_nothing() {
    if !is_installed("python3") {
        return;
    }
    let bed =
        Bed::new("large", &Sketch::of("command: [python3, large.py]\n    ready: { tcp: 6379 }"));
    std::fs::write(bed.directory().join("large.py"), PROGRAM).expect("a program");
    let text = bed.text();
    let workdir = format!("    workdir: {}\n    address:", bed.directory().display());
    bed.write(&text.replace("    address:", &workdir));
    bed.deploy();
    let mut client = bed.connect(RELAY, "client", "10.77.0.10:6379");
    let mut count = 0;
    let mut ask = |client: &mut Relay| {
        count += 1;
        assert_eq!(client.ask("."), format!("{count} 3"));
    };
    until("stops that come to nothing", || {
        (0..50).for_each(|_| ask(&mut client));
        (left_out(&bed) > 2).then_some(())
    });
    bed.until_store("it is protected", |store| store["protected"] == true);
    bed.fault("kill-host:alpha");
    (0..50).for_each(|_| ask(&mut client));
    bed.until_store("beta has it", |store| store["primary"] == "beta");
    drop(client);
    bed.destroy();
    bed.expect_gone();
}
