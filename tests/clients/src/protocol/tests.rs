//! Each language by itself: what is sent, and that answers are the same however the stream is cut.

use super::*;
use proptest::prelude::*;

fn asked(protocol: Protocol, requests: &[Request<'_>]) -> (Dialogue, String) {
    let mut dialogue = Dialogue::new(protocol);
    requests.iter().for_each(|request| dialogue.put(*request));
    let sent = String::from_utf8(dialogue.out.to_vec()).unwrap();
    (dialogue, sent)
}

/// The answers in a stream that comes in pieces of `piece` bytes.
fn answers(dialogue: &mut Dialogue, stream: &[u8], piece: usize) -> Vec<Answer> {
    let mut all = Vec::new();
    for bytes in stream.chunks(piece) {
        dialogue.buffer_mut().extend_from_slice(bytes);
        while let Some(answer) = dialogue.answer().unwrap() {
            all.push(answer);
        }
    }
    all
}

fn value(text: &str) -> Answer {
    Answer::Value(Some(Bytes::copy_from_slice(text.as_bytes())))
}

const ALL: [Request<'static>; 6] = [
    Request::Get(b"a"),
    Request::Set(b"a", b"one\r\ntwo"),
    Request::Get(b"a"),
    Request::Reset(b"n"),
    Request::Increment(b"n"),
    Request::Get(b"n"),
];

fn expected() -> Vec<Answer> {
    let nil = Answer::Value(None);
    vec![nil, Answer::Done, value("one\r\ntwo"), Answer::Done, Answer::Number(1), value("1")]
}

const MEMCACHED: &[u8] = b"END\r\nSTORED\r\nVALUE a 0 8\r\none\r\ntwo\r\nEND\r\nSTORED\r\n1\r\n\
    VALUE n 0 1\r\n1\r\nEND\r\n";

const HTTP: &[u8] = b"HTTP/1.1 404 Not Found\r\nX-Sequence: 1\r\nContent-Length: 2\r\n\r\nno\
    HTTP/1.1 204 No Content\r\nx-sequence:2\r\n\r\n\
    HTTP/1.1 200 OK\r\nContent-Length: 8\r\nX-Sequence: 3\r\n\r\none\r\ntwo\
    HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nX-Sequence: 4\r\n\r\n\
    HTTP/1.1 200 OK\r\nX-Sequence: 5\r\nContent-Length: 1\r\n\r\n1\
    HTTP/1.1 200 OK\r\nX-Sequence: 6\r\nContent-Length: 1\r\n\r\n1";

#[test]
fn memcached_is_asked_in_its_words() {
    let (_, sent) = asked(Protocol::Memcached, &ALL);
    let lines = "get a\r\nset a 0 0 8\r\none\r\ntwo\r\nget a\r\nset n 0 0 1\r\n0\r\nincr n 1\r\n";
    assert_eq!(sent, format!("{lines}get n\r\n"));
}

#[test]
fn every_request_of_http_has_its_number() {
    let (_, sent) = asked(Protocol::Http, &ALL[..2]);
    let first = "GET /a HTTP/1.1\r\nHost: nilicon\r\nX-Sequence: 1\r\n\r\n";
    let second = "PUT /a HTTP/1.1\r\nHost: nilicon\r\nX-Sequence: 2\r\nContent-Length: 8\r\n\r\n";
    assert_eq!(sent, format!("{first}{second}one\r\ntwo"));
}

proptest! {
    #[test]
    fn answers_are_the_same_in_pieces_of_any_size(piece in 1usize..80) {
        for (protocol, stream) in [(Protocol::Memcached, MEMCACHED), (Protocol::Http, HTTP)] {
            let mut dialogue = asked(protocol, &ALL).0;
            prop_assert_eq!(answers(&mut dialogue, stream, piece), expected());
        }
    }

    #[test]
    fn no_bytes_make_a_language_panic(stream: Vec<u8>, piece in 1usize..80, heads: bool) {
        for protocol in [Protocol::Resp, Protocol::Memcached, Protocol::Http] {
            let mut dialogue = asked(protocol, &ALL).0;
            let head: &[u8] = match (heads, protocol) {
                (false, _) => b"",
                (_, Protocol::Resp) => b"$5\r\n",
                (_, Protocol::Memcached) => b"VALUE a 0 5\r\n",
                (_, Protocol::Http) => b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Sequence: 1\r\n",
            };
            let whole = [head, &stream].concat();
            'stream: for bytes in whole.chunks(piece) {
                dialogue.buffer_mut().extend_from_slice(bytes);
                loop {
                    match dialogue.answer() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
            }
        }
    }
}

/// An answer that belongs to another request says what it is, and is not taken for right.
#[test]
fn an_answer_to_another_request_is_none() {
    let sets = [Request::Set(b"a", b"1"), Request::Set(b"b", b"2")];
    let mut http = asked(Protocol::Http, &sets).0;
    let doubled = b"HTTP/1.1 204 No Content\r\nX-Sequence: 1\r\n\r\n".repeat(2);
    let got = answers(&mut http, &doubled, 7);
    assert_eq!(got[0], Answer::Done);
    let Answer::Other(text) = &got[1] else { panic!("{got:?}") };
    assert_eq!(text, "HTTP 204, an answer to request 1 in the place of 2");

    let mut http = asked(Protocol::Http, &sets).0;
    let unnumbered = answers(&mut http, b"HTTP/1.1 204 No Content\r\n\r\n", 100);
    assert!(matches!(&unnumbered[0], Answer::Other(text) if text.contains("no request")));

    let mut memcached = asked(Protocol::Memcached, &[Request::Get(b"a"), Request::Get(b"b")]).0;
    let stream = b"VALUE b 0 1\r\nx\r\nEND\r\nSTORED\r\n";
    let got = answers(&mut memcached, stream, 100);
    assert!(got.iter().all(|answer| matches!(answer, Answer::Other(_))), "{got:?}");
}

#[test]
fn refusals_are_told_and_do_not_end_the_connection() {
    let mut memcached = asked(Protocol::Memcached, &ALL[1..3]).0;
    let stream = b"SERVER_ERROR out of memory storing object\r\nEND\r\n";
    let got = answers(&mut memcached, stream, 100);
    assert!(matches!(&got[0], Answer::Other(text) if text.contains("out of memory")), "{got:?}");
    assert_eq!(got[1], Answer::Value(None));

    let mut http = asked(Protocol::Http, &ALL[..1]).0;
    let stream = b"HTTP/1.1 503 Busy\r\nX-Sequence: 1\r\nContent-Length: 4\r\n\r\nbusy";
    let got = answers(&mut http, stream, 100);
    assert!(matches!(&got[0], Answer::Other(text) if text.contains("503")), "{got:?}");
}

#[test]
fn what_has_lost_its_framing_is_an_error() {
    let bad: [(Protocol, &[u8]); 6] = [
        (Protocol::Memcached, b"VALUE a 0 3\r\nabcd\r\nEND\r\n"),
        (Protocol::Memcached, b"VALUE a 0 -3\r\n"),
        (Protocol::Http, b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (Protocol::Http, b"HTTP/1.1 200 OK\r\n\r\n"),
        (Protocol::Http, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (Protocol::Http, b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"),
    ];
    for (protocol, stream) in bad {
        let mut dialogue = asked(protocol, &ALL[..1]).0;
        dialogue.buffer_mut().extend_from_slice(stream);
        assert!(dialogue.answer().is_err(), "{}", stream.escape_ascii());
    }
    let mut endless = asked(Protocol::Http, &ALL[..1]).0;
    endless.buffer_mut().extend_from_slice(&vec![b'x'; 70_000]);
    assert!(matches!(endless.answer(), Err(ProtocolError::TooLong { .. })));
}
