//! Labs in real namespaces: deployed, used, broken, mended, destroyed. Needs root.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netns_tools::impair;
use netns_tools::lab::fault::Victims;
use netns_tools::lab::{Lab, LabError, LinkTask};
use netns_tools::links::Network;
use netns_tools::namespace::Namespace;
use netns_tools::topology::{Endpoint, Topology};

/// Tells a copy of this test program to be the process of a link.
const LINK: &str = "NILICON_TEST_LINK";
/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not arrive to have arrived.
const SILENCE: Duration = Duration::from_millis(300);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static NUMBER: AtomicUsize = AtomicUsize::new(0);

/// A lab with a name of its own that is gone after the test, however that ends.
struct TestLab {
    topology: Topology,
    _turn: MutexGuard<'static, ()>,
}

impl TestLab {
    fn new(text: &str) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{}-{number}", std::process::id());
        let topology = Topology::parse("test", &text.replace("LAB", &name)).unwrap();
        Self { topology, _turn: turn }
    }

    fn name(&self) -> &str {
        &self.topology.name
    }

    fn deploy(&self) -> Lab {
        Lab::deploy(&self.topology, link_process).unwrap()
    }

    fn namespaces(&self) -> Vec<String> {
        Namespace::list(&Namespace::name_of(self.name(), ""))
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        let done = Lab::destroy(self.name());
        if !std::thread::panicking() {
            assert!(done.problems.is_empty(), "{done:?}");
        }
    }
}

/// This program again, as [`link_process_entry`].
fn link_process(task: &LinkTask) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "link_process_entry", "--nocapture"]);
    command.env(LINK, format!("{}:{}", task.lab, task.index));
    command
}

/// The process of a link, if it was started as one; as a test it does nothing.
#[test]
fn link_process_entry() {
    if let Ok(task) = std::env::var(LINK) {
        let (lab, index) = task.split_once(':').unwrap();
        let counts = impair::run_link(lab, index.parse().unwrap()).unwrap();
        println!("ended in order: {counts:?}");
    }
}

fn no_link_process(task: &LinkTask) -> Command {
    panic!("{task:?} is not impaired")
}

fn end(text: &str) -> Endpoint {
    text.parse().unwrap()
}

const LAN: &str = "\
name: LAB
nodes:
  alpha: { kind: host }
  beta: { kind: host }
  lan: { kind: bridge }
links:
  - endpoints: [alpha:eth0, lan:alpha]
    addresses: { alpha: 10.77.0.1/24 }
  - endpoints: [beta:eth0, lan:beta]
    addresses: { beta: 10.77.0.2/24 }
  - endpoints: [alpha:repl, beta:repl]
    addresses: { alpha: 10.78.0.1/30, beta: 10.78.0.2/30 }
    mtu: 9000
";

const IMPAIRED: &str = "\
name: LAB
nodes:
  alpha: { kind: host }
  beta: { kind: host }
links:
  - endpoints: [alpha:repl, beta:repl]
    addresses: { alpha: 10.78.0.1/30, beta: 10.78.0.2/30 }
    impair: { delay: 5ms, jitter: 1ms, loss: 20%, seed: 3 }
";

/// Whether bytes get from one node to another and back over TCP.
fn tcp_works(lab: &Lab, from: &str, to: &str, address: &str) -> bool {
    let listener =
        lab.namespace(to).unwrap().enter(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&target, SILENCE);
    let Ok(mut client) = lab.namespace(from).unwrap().enter(connect).unwrap() else { return false };
    let mut server = listener.accept().unwrap().0;
    client.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    server.read_exact(&mut heard).unwrap();
    heard == *b"ping"
}

/// Waits until TCP works: after an outage a neighbour may have to be found again.
fn until_tcp_works(lab: &Lab, from: &str, to: &str, address: &str) {
    let start = Instant::now();
    while !tcp_works(lab, from, to, address) {
        assert!(start.elapsed() < PATIENCE, "{from} does not reach {to}");
    }
    println!("{from} reaches {to} at {address} after {:?}", start.elapsed());
}

/// Sockets of alpha and beta, each connected to the other over the link between them.
fn udp_pair(lab: &Lab) -> (UdpSocket, UdpSocket) {
    let bind = |node: &str, address: &str| {
        let bound = lab.namespace(node).unwrap().enter(|| UdpSocket::bind((address, 4000)));
        bound.unwrap().unwrap()
    };
    let (alpha, beta) = (bind("alpha", "10.78.0.1"), bind("beta", "10.78.0.2"));
    alpha.connect("10.78.0.2:4000").unwrap();
    beta.connect("10.78.0.1:4000").unwrap();
    (alpha, beta)
}

/// Sends until something arrives.
fn until_it_arrives(from: &UdpSocket, to: &UdpSocket) {
    to.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let _ = from.send(b"hello");
        if to.recv(&mut [0; 16]).is_ok() {
            break;
        }
        assert!(Instant::now() < deadline, "nothing arrives");
    }
    while to.recv(&mut [0; 16]).is_ok() {}
}

fn nothing_arrives(from: &UdpSocket, to: &UdpSocket) {
    for _ in 0..20 {
        from.send(b"hello").expect("a cut link gives no error");
    }
    to.set_read_timeout(Some(SILENCE)).unwrap();
    assert!(to.recv(&mut [0; 16]).is_err(), "something arrived");
}

#[test]
fn deploying_twice_is_deploying_once() {
    let test = TestLab::new(LAN);
    let lab = Lab::deploy(&test.topology, no_link_process).unwrap();
    let first = lab.inspect().unwrap();
    assert_eq!(first.nodes.len(), 3);
    let alpha = first.nodes[0].interfaces.as_ref().unwrap();
    let repl = alpha.iter().find(|interface| interface.name == "repl").unwrap();
    assert!(repl.ready && !repl.cut && repl.mtu == 9000, "{repl:?}");
    assert_eq!(repl.addresses.len(), 1, "no IPv6 noise: {repl:?}");

    let again = Lab::deploy(&test.topology, no_link_process).unwrap();
    assert_eq!(again.inspect().unwrap(), first);
    assert!(Lab::list().contains(&test.name().to_owned()));
    assert_eq!(Lab::open(test.name()).unwrap().topology(), &test.topology);

    let mut wrong = test.topology.clone();
    wrong.links[2].endpoints.pop();
    let refused = Lab::deploy(&wrong, no_link_process);
    assert!(matches!(refused, Err(LabError::Topology(_))), "{refused:?}");
    let mut other = test.topology.clone();
    other.links[2].mtu = 1500;
    let refused = Lab::deploy(&other, no_link_process);
    assert!(matches!(refused, Err(LabError::Different { .. })), "{refused:?}");
}

#[test]
fn a_half_deployed_lab_is_completed() {
    let test = TestLab::new(LAN);
    Lab::deploy(&test.topology, no_link_process).unwrap();
    Network::open(&Namespace::open(&Namespace::name_of(test.name(), "alpha")).unwrap())
        .unwrap()
        .delete("eth0")
        .unwrap();
    Namespace::delete(&Namespace::name_of(test.name(), "beta")).unwrap();
    let lab = Lab::deploy(&test.topology, no_link_process).unwrap();
    until_tcp_works(&lab, "alpha", "beta", "10.77.0.2");
    until_tcp_works(&lab, "alpha", "beta", "10.78.0.2");
}

#[test]
fn nodes_reach_each_other_across_the_bridge() {
    let test = TestLab::new(LAN);
    let lab = test.deploy();
    until_tcp_works(&lab, "alpha", "beta", "10.77.0.2");
    until_tcp_works(&lab, "beta", "alpha", "10.77.0.1");
    let outside = TcpListener::bind("10.77.0.2:0");
    assert!(outside.is_err(), "the address is only in its namespace");
}

#[test]
fn iproute2_knows_the_namespaces() {
    let test = TestLab::new(LAN);
    test.deploy();
    let path = Namespace::path_of(&Namespace::name_of(test.name(), "alpha"));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(mounts.contains(path.to_str().unwrap()), "{mounts}");
}

#[test]
fn a_cut_link_is_silent_and_heals() {
    let test = TestLab::new(LAN);
    let lab = test.deploy();
    let (alpha, beta) = udp_pair(&lab);
    until_it_arrives(&alpha, &beta);
    lab.cut_link(&end("alpha:repl")).unwrap();
    nothing_arrives(&alpha, &beta);
    nothing_arrives(&beta, &alpha);
    until_tcp_works(&lab, "alpha", "beta", "10.77.0.2");
    lab.heal_link(&end("beta:repl")).unwrap();
    until_it_arrives(&alpha, &beta);

    lab.cut_node("alpha").unwrap();
    nothing_arrives(&alpha, &beta);
    assert!(!tcp_works(&lab, "alpha", "beta", "10.77.0.2"));
    lab.heal_node("alpha").unwrap();
    until_it_arrives(&beta, &alpha);
    until_tcp_works(&lab, "alpha", "beta", "10.77.0.2");
    let unknown = lab.cut_link(&end("alpha:nothing"));
    assert!(matches!(unknown, Err(LabError::Unknown { .. })), "{unknown:?}");
}

#[test]
fn a_host_without_power_is_silent_at_once() {
    let test = TestLab::new(LAN);
    let lab = test.deploy();
    let script = "while :; do sleep 1000 & sleep 0.01; done";
    let alpha = lab.namespace("alpha").unwrap();
    let mut breeder = alpha.spawn(Command::new("sh").args(["-c", script])).unwrap();
    let mut outside = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut beta = lab.namespace("beta").unwrap().spawn(Command::new("sleep").arg("1000")).unwrap();

    // A connection whose far end is on the host: its death must not be announced.
    let listener = lab.namespace("beta").unwrap().enter(|| TcpListener::bind("10.78.0.2:0"));
    let listener = listener.unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    let connected = alpha.enter(|| TcpStream::connect(target)).unwrap().unwrap();
    let mut server = listener.accept().unwrap().0;
    let mut holder = alpha
        .spawn(
            Command::new("sleep")
                .arg("1000")
                .stdin(Stdio::from(std::os::fd::OwnedFd::from(connected))),
        )
        .unwrap();

    assert!(lab.kill_host("alpha", &Victims::default()).unwrap() >= 2);
    assert!(breeder.wait().unwrap().code().is_none());
    assert!(holder.wait().unwrap().code().is_none());
    assert!(lab.inspect().unwrap().nodes[0].pids.is_empty());
    assert!(outside.try_wait().unwrap().is_none(), "a process outside was killed");
    assert!(beta.try_wait().unwrap().is_none(), "a process of another node was killed");
    server.set_read_timeout(Some(SILENCE)).unwrap();
    let heard = server.read(&mut [0; 1]).unwrap_err();
    assert_eq!(heard.kind(), std::io::ErrorKind::WouldBlock, "a dead host speaks");

    lab.heal_node("alpha").unwrap();
    until_tcp_works(&lab, "beta", "alpha", "10.78.0.1");
    outside.kill().unwrap();
    outside.wait().unwrap();
    beta.kill().unwrap();
    beta.wait().unwrap();
}

#[test]
fn an_impaired_link_delays_and_loses() {
    const FRAMES: u32 = 1000;
    let test = TestLab::new(IMPAIRED);
    let lab = test.deploy();
    let (alpha, beta) = udp_pair(&lab);
    until_it_arrives(&alpha, &beta);

    let start = Instant::now();
    let listen = std::thread::spawn(move || {
        let mut arrived = Vec::new();
        let mut buffer = [0; 16];
        beta.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        while let Ok(12) = beta.recv(&mut buffer) {
            let sent = u64::from_be_bytes(buffer[4..12].try_into().unwrap());
            arrived.push(start.elapsed() - Duration::from_nanos(sent));
        }
        (arrived, beta)
    });
    for number in 0..FRAMES {
        let mut frame = number.to_be_bytes().to_vec();
        frame.extend((start.elapsed().as_nanos() as u64).to_be_bytes());
        alpha.send(&frame).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    let (mut arrived, beta) = listen.join().unwrap();
    arrived.sort();
    println!("median {:?}, slowest {:?}", arrived[arrived.len() / 2], arrived.last());
    let fastest = arrived.first().unwrap();
    assert!(*fastest >= Duration::from_millis(4), "delay less jitter, but {fastest:?}");
    // Five standard deviations about 800 of 1000.
    assert!((737..=863).contains(&arrived.len()), "{} arrived", arrived.len());

    lab.cut_link(&end("alpha:repl")).unwrap();
    nothing_arrives(&alpha, &beta);
    lab.heal_link(&end("alpha:repl")).unwrap();
    until_it_arrives(&beta, &alpha);
}

#[test]
fn the_process_of_a_link_is_kept_and_replaced() {
    let test = TestLab::new(IMPAIRED);
    let lab = test.deploy();
    let first = lab.process("link-0").unwrap().expect("it runs");
    let before = lab.inspect().unwrap();
    test.deploy();
    assert_eq!(lab.process("link-0").unwrap(), Some(first), "the same one");
    assert_eq!(lab.inspect().unwrap(), before);

    first.signal(nix::sys::signal::Signal::SIGTERM);
    let deadline = Instant::now() + PATIENCE;
    while first.is_alive() {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::yield_now();
    }
    let log = std::fs::read_to_string(lab.directory().join("link-0.log")).unwrap();
    assert!(log.contains("ended in order"), "{log}");
    test.deploy();
    let (alpha, beta) = udp_pair(&lab);
    until_it_arrives(&alpha, &beta);

    let mut agent = Command::new("sleep").arg("1000").spawn().unwrap();
    lab.register_process(&Lab::agent_name("alpha"), agent.id()).unwrap();
    assert!(lab.kill_agent("alpha").unwrap());
    agent.wait().unwrap();
    assert!(!lab.kill_agent("alpha").unwrap());
    assert!(lab.kill_process("link-0").unwrap());
    assert!(!lab.kill_process("link-0").unwrap());
}

#[test]
fn a_link_process_that_fails_is_named() {
    let test = TestLab::new(IMPAIRED);
    let error = Lab::deploy(&test.topology, |_| Command::new("false")).unwrap_err();
    assert!(error.to_string().contains("alpha:repl"), "{error}");
    let error = Lab::deploy(&test.topology, |_| Command::new("/no/such/program")).unwrap_err();
    assert!(error.to_string().contains("cannot be started"), "{error}");
    test.deploy();
}

#[test]
fn destroy_leaves_nothing() {
    let test = TestLab::new(IMPAIRED);
    let lab = test.deploy();
    let agent = lab.namespace("alpha").unwrap().spawn(Command::new("sleep").arg("1000"));
    let mut agent = agent.unwrap();
    lab.register_process("agent-alpha", agent.id()).unwrap();
    let cgroup = netns_tools::cgroup::Cgroup::create(test.name(), "alpha", "redis").unwrap();
    let mut contained = Command::new("sleep").arg("1000").spawn().unwrap();
    cgroup.add(contained.id() as i32).unwrap();
    assert_eq!(test.namespaces().len(), 2);

    let done = Lab::destroy(test.name());
    assert_eq!((done.namespaces, done.problems.len()), (2, 0), "{done:?}");
    assert!(done.processes >= 3, "{done:?}");
    agent.wait().unwrap();
    contained.wait().unwrap();
    assert!(test.namespaces().is_empty());
    assert!(!lab.directory().exists());
    assert!(!cgroup.path().exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&Namespace::name_of(test.name(), "")), "{mounts}");
    assert!(matches!(Lab::open(test.name()), Err(LabError::NotDeployed { .. })));

    let nothing = Lab::destroy(test.name());
    assert_eq!((nothing.processes, nothing.namespaces), (0, 0), "{nothing:?}");
    assert!(nothing.problems.is_empty(), "{nothing:?}");
}

#[test]
fn a_reused_process_number_is_not_killed() {
    let test = TestLab::new(LAN);
    let lab = test.deploy();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    lab.register_process("agent-alpha", child.id()).unwrap();
    let path = lab.directory().join("pids.json");
    let list = std::fs::read_to_string(&path).unwrap();
    let start = lab.processes().unwrap()[0].process.start_time;
    std::fs::write(&path, list.replace(&start.to_string(), &(start - 1).to_string())).unwrap();
    Lab::destroy(test.name());
    assert!(child.try_wait().unwrap().is_none(), "it was killed for another's deeds");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_lab_leaves_labs_with_a_longer_name_alone() {
    let test = TestLab::new(LAN);
    test.deploy();
    let mut longer = test.topology.clone();
    longer.name.push_str("-x");
    let kept = TestLab2(Lab::deploy(&longer, no_link_process).unwrap());
    Lab::destroy(test.name());
    until_tcp_works(&kept.0, "alpha", "beta", "10.77.0.2");
}

struct TestLab2(Lab);

impl Drop for TestLab2 {
    fn drop(&mut self) {
        Lab::destroy(self.0.name());
    }
}

#[test]
fn the_examples_deploy() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../topologies");
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue;
        }
        let mut test = TestLab::new(IMPAIRED);
        let name = test.topology.name.clone();
        test.topology = Topology { name, ..Topology::load(&path).unwrap() };
        let start = Instant::now();
        let lab = test.deploy();
        println!("{} is deployed after {:?}", path.display(), start.elapsed());
        for protect in &test.topology.protect {
            let address = test.topology.replication_address(protect, &protect.backup).unwrap();
            until_tcp_works(&lab, &protect.primary, &protect.backup, &address.to_string());
        }
        assert!(lab.inspect().unwrap().processes.iter().all(|process| process.alive));
    }
}

#[test]
fn sysctls_and_routes_stay_inside() {
    let test = TestLab::new(LAN);
    let lab = test.deploy();
    let alpha = lab.namespace("alpha").unwrap();
    let before = std::fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl").unwrap();
    alpha.set_sysctl("net.ipv4.ip_default_ttl", "77").unwrap();
    assert_eq!(alpha.sysctl("net.ipv4.ip_default_ttl").unwrap(), "77");
    assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl").unwrap(), before);
    let error = alpha.set_sysctl("net.ipv4.no_such", "1").unwrap_err().to_string();
    assert!(error.contains("net.ipv4.no_such") && error.contains("alpha"), "{error}");

    let network = lab.network("alpha").unwrap();
    for _ in 0..2 {
        network.set_default_route("eth0", "10.77.0.254".parse().unwrap()).unwrap();
        assert_eq!(
            network.default_gateways().unwrap(),
            ["10.77.0.254".parse::<std::net::IpAddr>().unwrap()]
        );
    }
    network.set_mac("eth0", "02:00:00:00:00:07".parse().unwrap()).unwrap();
    assert_eq!(network.get("eth0").unwrap().mac, Some("02:00:00:00:00:07".parse().unwrap()));
    let error = network.set_up("eth7").unwrap_err().to_string();
    assert!(error.contains("eth7") && error.contains("alpha"), "{error}");
}
