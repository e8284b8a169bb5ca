use super::*;
use proptest::prelude::*;

const MACS: (Mac, Mac) = (Mac([2, 0, 0, 0, 0, 2]), Mac([2, 0, 0, 0, 0, 1]));

fn addresses() -> Key {
    ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:4000".parse().unwrap())
}

struct Say<'a> {
    control: TcpControl,
    seq: u32,
    ack: Option<u32>,
    payload: &'a [u8],
    options: bool,
}

fn frame(from: SocketAddr, to: SocketAddr, say: &Say<'_>) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: from.port(),
        dst_port: to.port(),
        control: say.control,
        seq_number: TcpSeqNumber(say.seq as i32),
        ack_number: say.ack.map(|n| TcpSeqNumber(n as i32)),
        window_len: 500,
        window_scale: say.options.then_some(7),
        max_seg_size: say.options.then_some(1400),
        sack_permitted: say.options,
        sack_ranges: [None; 3],
        timestamp: say.options.then(|| TcpTimestampRepr::new(say.seq, 0)),
        payload: say.payload,
    };
    wire::tcp(MACS, from.ip(), to.ip(), &repr).unwrap()
}

/// A tracker after SYN and SYN-ACK, with 100 and 900 as first sequence numbers.
fn answered(t0: Instant) -> Tracker {
    let (local, remote) = addresses();
    let mut t = Tracker::default();
    let syn = Say { control: TcpControl::Syn, seq: 100, ack: None, payload: &[], options: true };
    let syn = frame(remote, local, &syn);
    assert!(may_begin(&syn));
    t.inbound(&syn, t0);
    assert!(t.snapshot(t0).is_empty(), "our kernel has not answered");
    let syn_ack =
        Say { control: TcpControl::Syn, seq: 900, ack: Some(101), payload: &[], options: true };
    let syn_ack = frame(local, remote, &syn_ack);
    assert!(!may_begin(&syn_ack));
    t.outbound(&syn_ack, t0);
    t
}

fn data(seq: u32, payload: &[u8], control: TcpControl) -> Vec<u8> {
    let (local, remote) = addresses();
    frame(remote, local, &Say { control, seq, ack: Some(901), payload, options: false })
}

#[test]
fn a_connection_is_known_from_its_handshake_until_it_is_accepted() {
    let t0 = Instant::now();
    let mut t = answered(t0);
    let young = t.snapshot(t0 + Duration::from_millis(30)).remove(0);
    assert!(!young.acknowledged);
    assert_eq!((young.client_isn, young.server_isn, young.mss), (100, 900, 1400));
    assert_eq!((young.window_scale, young.sack), (Some((7, 7)), true));
    assert_eq!(young.timestamp, Some((100, 930)));
    t.inbound(&data(101, b"", TcpControl::None), t0);
    t.inbound(&data(101, b"hello ", TcpControl::Psh), t0);
    t.inbound(&data(101, b"hello ", TcpControl::Psh), t0);
    t.inbound(&data(200, b"out of order", TcpControl::Psh), t0);
    t.inbound(&data(104, b"lo world", TcpControl::Fin), t0);
    let young = t.snapshot(t0).remove(0);
    assert_eq!((young.received.as_slice(), young.fin), (&b"hello world"[..], true));
    assert!(young.acknowledged);
    let frames = segments(&young, Mac([2, 0, 0, 0, 0, 1]), Duration::ZERO);
    assert_eq!(frames.len(), 3);
    let (local, remote) = addresses();
    let word =
        Say { control: TcpControl::Psh, seq: 901, ack: Some(112), payload: b"x", options: false };
    t.outbound(&frame(local, remote, &word), t0);
    assert!(t.is_empty() && t.bytes == 0, "it speaks, so it was accepted");
}

#[test]
fn resets_and_descriptors_end_it_and_a_new_syn_begins_anew() {
    let t0 = Instant::now();
    let (local, remote) = addresses();
    let mut t = answered(t0);
    t.forget(local, remote);
    assert!(t.is_empty());
    let mut t = answered(t0);
    t.inbound(&data(101, b"", TcpControl::Rst), t0);
    assert!(t.is_empty());
    let mut t = answered(t0);
    let again = Say { control: TcpControl::Syn, seq: 7, ack: None, payload: &[], options: false };
    t.inbound(&frame(remote, local, &again), t0);
    assert!(!t.is_empty() && t.snapshot(t0).is_empty());
    let t = answered(t0);
    assert!(t.snapshot(t0 + GIVEN_UP).is_empty(), "the kernel has given it up");
}

#[test]
fn bounds_drop_and_count() {
    let t0 = Instant::now();
    let mut t = answered(t0);
    let part = vec![7; 60_000];
    let mut seq = 101;
    while !t.is_empty() {
        t.inbound(&data(seq, &part, TcpControl::None), t0);
        seq += part.len() as u32;
    }
    assert_eq!((t.dropped(), t.bytes), (1, 0));
    assert!(seq as usize > MAX_BYTES);
}

proptest! {
    #[test]
    fn whatever_order_segments_come_in_the_stream_is_a_prefix_of_what_was_sent(
        cuts in prop::collection::vec((0usize..400, 1usize..80), 1..40),
    ) {
        let t0 = Instant::now();
        let sent: Vec<u8> = (0..500).map(|i| (i % 251) as u8).collect();
        let mut t = answered(t0);
        for (at, len) in cuts {
            t.inbound(&data(101 + at as u32, &sent[at..at + len], TcpControl::None), t0);
            let young = t.snapshot(t0).remove(0);
            prop_assert!(sent.starts_with(&young.received));
            prop_assert_eq!(t.bytes, young.received.len());
        }
    }

    #[test]
    fn noise_never_panics(frame in prop::collection::vec(any::<u8>(), 0..120)) {
        let now = Instant::now();
        let mut t = answered(now);
        may_begin(&frame);
        t.inbound(&frame, now);
        t.outbound(&frame, now);
    }
}
