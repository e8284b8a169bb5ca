use super::*;
use crate::frames::announce::gratuitous_arp;
use proptest::prelude::*;

const US: Mac = Mac([2, 0, 0, 0, 0, 1]);
const PEER: Mac = Mac([2, 0, 0, 0, 0, 2]);
const ROUTER: Mac = Mac([2, 0, 0, 0, 0, 9]);

fn net() -> LocalNet {
    LocalNet {
        mac: US,
        addresses: vec![("10.0.0.1".parse().unwrap(), 24), ("fd00::1".parse().unwrap(), 64)],
        gateways: vec!["10.0.0.254".parse().unwrap()],
    }
}

fn connection(remote: &str) -> Connection {
    let remote: SocketAddr = remote.parse().unwrap();
    let local = if remote.is_ipv4() { "10.0.0.1:80" } else { "[fd00::1]:80" };
    Connection {
        local: local.parse().unwrap(),
        remote,
        snd_una: 1000,
        rcv_nxt: u32::MAX,
        window: 500,
        timestamp: Some(77),
    }
}

fn answer_of(c: &Connection, seq: u32, ack: u32) -> PeerSegment {
    PeerSegment {
        to_mac: US,
        from_mac: PEER,
        to: c.local,
        from: c.remote,
        seq,
        ack,
        window: 321,
        timestamp: None,
    }
}

#[test]
fn a_probe_resolves_asks_and_understands() {
    let c = connection("10.0.0.2:5000");
    let mut probe = PeerProbe::new(net(), [c]);
    let t0 = Instant::now();

    let who_has = probe.due(t0);
    assert_eq!(who_has.len(), 1);
    assert_eq!(wire::read_neighbour(&who_has[0]), Some((c.local.ip(), US)));
    assert_eq!(who_has[0][HEADER + 12..HEADER + 14], [8, 6]);
    assert!(probe.due(t0).is_empty(), "asked already");
    assert_eq!(probe.next_deadline(), Some(t0 + ASK_AGAIN));

    let [_, reply] = gratuitous_arp(PEER, "10.0.0.2".parse().unwrap());
    assert!(!probe.observe(&reply), "the container's kernel may want it too");
    let probes = probe.due(t0);
    assert_eq!(probes.len(), 1);
    assert_eq!(destination(&probes[0]), Some(PEER));
    let segment = wire::read_tcp(&probes[0]).unwrap();
    assert_eq!((segment.seq, segment.ack, segment.bare), (999, Some(u32::MAX), true));
    assert!(probe.due(t0 + Duration::from_millis(500)).is_empty(), "the peer stays silent");
    assert_eq!(probe.due(t0 + PROBE_AGAIN).len(), 1);

    assert!(!probe.is_done());
    assert!(probe.observe(&answer_of(&c, 0, 1234).ack().unwrap()));
    assert!(probe.is_done());
    assert_eq!(probe.answers().next().unwrap().1, Answer::Alive { rcv_nxt: 1234, window: 321 });
    // One that was on its way before says less, and is no news.
    probe.observe(&answer_of(&c, 0, 1100).ack().unwrap());
    assert_eq!(probe.answers().next().unwrap().1, Answer::Alive { rcv_nxt: 1234, window: 321 });
    assert!(probe.due(t0 + 9 * PROBE_AGAIN).is_empty() && probe.next_deadline().is_none());
}

#[test]
fn a_reset_means_gone_unless_it_is_stale() {
    let c = connection("10.0.0.2:5000");
    let mut probe = PeerProbe::new(net(), [c]);
    probe.observe(&answer_of(&c, c.rcv_nxt.wrapping_sub(5), 0).rst().unwrap());
    assert!(!probe.is_done());
    let keep = !probe.observe(&answer_of(&c, c.rcv_nxt, 0).rst().unwrap());
    assert!(keep, "the container must see it");
    assert_eq!(probe.answers().next().unwrap().1, Answer::Gone);
}

#[test]
fn frames_of_others_and_old_acknowledgements_answer_nothing() {
    let c = connection("10.0.0.2:5000");
    let mut probe = PeerProbe::new(net(), [c]);
    let other = connection("10.0.0.2:5001");
    assert!(!probe.observe(&answer_of(&other, 0, 2000).ack().unwrap()));
    assert!(!probe.observe(&answer_of(&c, 0, 999).ack().unwrap()));
    assert!(!probe.is_done());
    assert!(!probe.observe(&answer_of(&c, 0, 1000).fin().unwrap()), "the container must see it");
    assert!(probe.is_done(), "but its acknowledgement counts");
}

#[test]
fn off_the_link_the_router_takes_the_probe() {
    let far = connection("192.168.7.7:443");
    let mut probe = PeerProbe::new(net(), [far, connection("192.168.7.8:443")]);
    let t0 = Instant::now();
    assert_eq!(probe.due(t0).len(), 1, "one question for both");
    let [request, _] = gratuitous_arp(ROUTER, "10.0.0.254".parse().unwrap());
    probe.observe(&request);
    let probes = probe.due(t0);
    assert_eq!(probes.iter().filter_map(|f| destination(f)).collect::<Vec<_>>(), [ROUTER; 2]);
}

#[test]
fn frames_received_before_save_the_question() {
    let c = connection("192.168.7.7:443");
    let mut probe = PeerProbe::new(net(), [c]);
    let mut seen = answer_of(&c, 0, 0);
    seen.from_mac = ROUTER;
    probe.learn_from(&seen.ack().unwrap());
    assert_eq!(destination(&probe.due(Instant::now())[0]), Some(ROUTER));
}

#[test]
fn ipv6_asks_by_neighbour_solicitation() {
    let c = connection("[fd00::2]:5000");
    let mut probe = PeerProbe::new(net(), [c]);
    let t0 = Instant::now();
    let question = probe.due(t0);
    assert_eq!(destination(&question[0]), Some(Mac([0x33, 0x33, 0xff, 0, 0, 2])));
    let advert = crate::frames::announce::neighbour_advertisement(PEER, "fd00::2".parse().unwrap());
    probe.observe(&advert);
    let probes = probe.due(t0);
    assert_eq!(wire::read_tcp(&probes[0]).unwrap().to, c.remote);
    assert_eq!(destination(&probes[0]), Some(PEER));
}

#[test]
fn addresses_in_ipv6_form_are_what_they_are() {
    let mut c = connection("10.0.0.2:5000");
    c.local = "[::ffff:10.0.0.1]:80".parse().unwrap();
    c.remote = "[::ffff:10.0.0.2]:5000".parse().unwrap();
    let mut probe = PeerProbe::new(net(), [c]);
    probe.learn(c.remote.ip(), PEER);
    assert_eq!(probe.due(Instant::now()).len(), 1);
    probe.observe(&answer_of(&connection("10.0.0.2:5000"), 0, 1000).ack().unwrap());
    assert!(probe.is_done());
}

#[test]
fn a_checkpoint_gives_a_connection() {
    let c = TcpConnection {
        local: "10.0.0.1:80".parse().unwrap(),
        remote: "10.0.0.2:5000".parse().unwrap(),
        state: replicator::image::net::TcpState::Established,
        write_seq: 10,
        rcv_nxt: 5,
        send_queue: vec![0; 30],
        receive_queue: vec![],
        window: [0, 0, 0, 65536, 0],
        mss: 1460,
        sack: true,
        window_scale: Some((7, 8)),
        timestamp: Some(u32::MAX),
        options: Default::default(),
        shut_read: false,
        error: false,
    };
    let got = Connection::of_checkpoint(&c, Duration::from_millis(11));
    assert_eq!(got.snd_una, 10u32.wrapping_sub(30));
    assert_eq!((got.window, got.timestamp), (256, Some(10)));
}

#[test]
fn a_neighbour_that_asks_for_the_container_is_told() {
    let mut probe = PeerProbe::new(net(), []);
    let v4 = question((PEER, "10.0.0.2".parse().unwrap()), "10.0.0.1".parse().unwrap()).unwrap();
    let v6 = question((PEER, "fd00::2".parse().unwrap()), "fd00::1".parse().unwrap()).unwrap();
    let other = question((PEER, "10.0.0.2".parse().unwrap()), "10.0.0.3".parse().unwrap());
    assert!(probe.observe(&v4) && probe.observe(&v6) && !probe.observe(&other.unwrap()));
    let replies = probe.due(Instant::now());
    let told: Vec<_> = replies.iter().filter_map(|f| wire::read_neighbour(f)).collect();
    assert_eq!(told, [("10.0.0.1".parse().unwrap(), US), ("fd00::1".parse().unwrap(), US)]);
    assert!(replies.iter().all(|f| destination(f) == Some(PEER)));
    for _ in 0..2 * MAX_REPLIES {
        probe.observe(&v4);
    }
    assert_eq!(probe.due(Instant::now()).len(), MAX_REPLIES);
}

proptest! {
    #[test]
    fn prefixes_are_compared_as_bits(a: u32, b: u32, prefix in 0u8..=40) {
        let (x, y) = (IpAddr::V4(a.into()), IpAddr::V4(b.into()));
        let shift = 32 - u32::from(prefix.min(32));
        let want = a.checked_shr(shift).unwrap_or(0) == b.checked_shr(shift).unwrap_or(0);
        prop_assert_eq!(same_prefix(x, y, prefix), want);
    }

    #[test]
    fn garbage_never_panics_a_probe(frames in prop::collection::vec(
        prop::collection::vec(any::<u8>(), 0..120), 0..20,
    )) {
        let mut probe = PeerProbe::new(net(), [connection("10.0.0.2:5000")]);
        for frame in frames {
            probe.observe(&frame);
        }
        prop_assert!(!probe.is_done());
    }
}
