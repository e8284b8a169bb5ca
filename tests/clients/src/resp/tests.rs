//! Round trips, every split of the stream, garbage, and limits.

use super::*;
use proptest::prelude::*;

fn commands(stream: &[u8], pieces: &[usize]) -> Result<Vec<Vec<Bytes>>, RespError> {
    let mut decoder = CommandDecoder::new(Limits::default());
    let mut found = Vec::new();
    for piece in cut(stream, pieces) {
        decoder.feed(piece);
        while let Some(command) = decoder.next_command()? {
            found.push(command);
        }
    }
    Ok(found)
}

fn replies(stream: &[u8], pieces: &[usize], limits: Limits) -> Result<Vec<Reply>, RespError> {
    let mut decoder = ReplyDecoder::new(limits);
    let mut found = Vec::new();
    for piece in cut(stream, pieces) {
        decoder.feed(piece);
        while let Some(reply) = decoder.next_reply()? {
            found.push(reply);
        }
    }
    Ok(found)
}

/// Cuts a stream into pieces of these lengths and the rest.
fn cut<'a>(mut stream: &'a [u8], pieces: &[usize]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    for &len in pieces {
        let (head, tail) = stream.split_at(len.min(stream.len()));
        parts.push(head);
        stream = tail;
    }
    parts.push(stream);
    parts
}

fn any_reply() -> impl Strategy<Value = Reply> {
    let line = "[ -~]{0,20}".prop_map(Bytes::from);
    let leaf = prop_oneof![
        line.clone().prop_map(Reply::Simple),
        line.prop_map(Reply::Error),
        any::<i64>().prop_map(Reply::Integer),
        proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|data| Reply::Bulk(data.map(Bytes::from))),
        Just(Reply::Array(None)),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        proptest::collection::vec(inner, 0..5).prop_map(|items| Reply::Array(Some(items)))
    })
}

fn any_command() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..6)
}

proptest! {
    #[test]
    fn replies_survive_encoding_and_any_split(
        sent in proptest::collection::vec(any_reply(), 1..5),
        pieces in proptest::collection::vec(0usize..9, 0..60),
    ) {
        let mut out = BytesMut::new();
        sent.iter().for_each(|reply| reply.encode(&mut out));
        prop_assert_eq!(replies(&out, &pieces, Limits::default()).unwrap(), sent.clone());
        prop_assert_eq!(replies(&out, &vec![1; out.len()], Limits::default()).unwrap(), sent);
    }

    #[test]
    fn commands_survive_encoding_and_any_split(
        sent in proptest::collection::vec(any_command(), 1..5),
        pieces in proptest::collection::vec(0usize..9, 0..60),
    ) {
        let mut out = BytesMut::new();
        for command in &sent {
            put_command(&mut out, &command.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }
        prop_assert_eq!(&commands(&out, &pieces).unwrap(), &sent);
        for at in 0..out.len() {
            prop_assert_eq!(&commands(&out, &[at]).unwrap(), &sent);
        }
    }

    #[test]
    fn garbage_gives_the_same_values_or_errors_however_it_is_cut(
        stream in proptest::collection::vec(
            prop_oneof![any::<u8>(), proptest::sample::select(b"*$+-:\r\n0123".to_vec())], 0..200),
        pieces in proptest::collection::vec(0usize..9, 0..60),
    ) {
        prop_assert_eq!(commands(&stream, &pieces), commands(&stream, &[]));
        prop_assert_eq!(
            replies(&stream, &pieces, Limits::default()),
            replies(&stream, &[], Limits::default())
        );
    }
}

#[test]
fn inline_commands_and_empty_lines() {
    let found =
        commands(b"\r\nPING\r\n  set  a 'b c'\"d\\\"\"\n*0\r\n*-1\r\n*1\r\n$4\r\nPING\r\n", &[]);
    let expected: Vec<Vec<Bytes>> = vec![
        vec!["PING".into()],
        vec!["set".into(), "a".into(), "b cd\"".into()],
        vec!["PING".into()],
    ];
    assert_eq!(found.unwrap(), expected);
    assert_eq!(commands(b"get \"a\r\n", &[]), Err(RespError::UnbalancedQuotes));
}

#[test]
fn line_breaks_in_a_status_cannot_break_the_framing() {
    let mut out = BytesMut::new();
    Reply::Error("ERR a\r\n+OK".into()).encode(&mut out);
    let found = replies(&out, &[], Limits::default()).unwrap();
    assert_eq!(found, [Reply::Error("ERR a  +OK".into())]);
}

#[test]
fn each_limit_is_an_error() {
    let limits = Limits { line: 8, bulk: 10, elements: 4, message: 40, depth: 2 };
    let error = |stream: &[u8]| replies(stream, &[], limits).unwrap_err();
    assert_eq!(error(b"+1234567890"), RespError::LineTooLong { limit: 8 });
    assert_eq!(error(b"$11\r\n"), RespError::BulkTooLarge { len: 11, limit: 10 });
    assert_eq!(error(b"*3\r\n*2\r\n"), RespError::TooManyElements { count: 5, limit: 4 });
    assert_eq!(error(b"*1\r\n*1\r\n*1\r\n"), RespError::TooDeep { limit: 2 });
    let long = b"*4\r\n$10\r\n0123456789\r\n$10\r\n0123456789\r\n$10\r\n0123456789\r\n";
    assert_eq!(error(long), RespError::MessageTooLarge { limit: 40 });
    assert_eq!(error(b"$1\r\nab\r\n"), RespError::BulkEnd);
    assert_eq!(error(b"+a\n"), RespError::LineEnd);
    assert_eq!(error(b"!"), RespError::UnknownType { byte: b'!' });
    assert_eq!(error(b":+1\r\n"), RespError::BadNumber { what: "an integer reply" });
}

#[test]
fn an_error_stays() {
    let mut decoder = ReplyDecoder::new(Limits::default());
    decoder.feed(b"?\r\n");
    let first = decoder.next_reply().unwrap_err();
    decoder.feed(b"+OK\r\n");
    assert_eq!(decoder.next_reply(), Err(first));
}
