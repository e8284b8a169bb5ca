//! The commands: each reads its arguments, acts on the store, appends one reply.
//!
//! Enough for redis-cli and redis-benchmark to work unmodified; what is not known is answered
//! with an error, as Redis does.

use super::Shared;
use super::store::Map;
use crate::resp::{parse_integer, put_array, put_bulk, put_integer, put_line, put_nil};
use bytes::{Bytes, BytesMut};
use std::sync::atomic::Ordering;

/// Longest value that APPEND may make.
const MAX_VALUE: usize = 64 << 20;
/// Most keys that one DEBUG POPULATE makes.
const MAX_POPULATE: usize = 100_000_000;

/// What becomes of the connection after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// It goes on.
    Continue,
    /// It closes once the replies are sent.
    Close,
    /// The server stops.
    Shutdown,
}

type Outcome = Result<(), String>;

/// Executes one command (at least one argument) and appends its reply.
pub(super) fn execute(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Flow {
    let name = args[0].to_ascii_uppercase();
    let rest = &args[1..];
    let outcome = match name.as_slice() {
        b"QUIT" => {
            put_line(out, b'+', b"OK");
            return Flow::Close;
        }
        b"SHUTDOWN" => return Flow::Shutdown,
        b"PING" | b"ECHO" => echo(&name, rest, out),
        b"GET" => get(shared, rest, out),
        b"SET" => set(shared, rest, out),
        b"DEL" | b"UNLINK" | b"EXISTS" => count(shared, &name, rest, out),
        b"INCR" | b"INCRBY" | b"DECR" => increment(shared, &name, rest, out),
        b"APPEND" => append(shared, rest, out),
        b"MSET" => set_many(shared, rest, out),
        b"MGET" => get_many(shared, rest, out),
        b"DBSIZE" => {
            put_integer(out, shared.store.len() as i64);
            Ok(())
        }
        b"FLUSHALL" | b"FLUSHDB" => {
            shared.store.clear();
            ok(out)
        }
        b"SELECT" => match rest {
            [index] if &index[..] == b"0" => ok(out),
            _ => Err("ERR DB index is out of range".into()),
        },
        b"INFO" => {
            put_bulk(out, info(shared).as_bytes());
            Ok(())
        }
        b"CLIENT" => client(rest, out),
        b"COMMAND" => {
            put_array(out, 0);
            Ok(())
        }
        b"CONFIG" => config(rest, out),
        b"DEBUG" => debug(shared, rest, out),
        _ => Err(format!("ERR unknown command '{}'", printable(&args[0]))),
    };
    if let Err(message) = outcome {
        put_line(out, b'-', message.as_bytes());
    }
    Flow::Continue
}

fn ok(out: &mut BytesMut) -> Outcome {
    put_line(out, b'+', b"OK");
    Ok(())
}

fn arity(name: &str) -> Outcome {
    Err(format!("ERR wrong number of arguments for '{name}' command"))
}

fn put_value(out: &mut BytesMut, value: Option<&Vec<u8>>) {
    match value {
        Some(value) => put_bulk(out, value),
        None => put_nil(out),
    }
}

fn echo(name: &[u8], args: &[Bytes], out: &mut BytesMut) -> Outcome {
    match args {
        [] if name == b"PING" => put_line(out, b'+', b"PONG"),
        [text] => put_bulk(out, text),
        _ => return arity("echo"),
    }
    Ok(())
}

fn get(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let [key] = args else { return arity("get") };
    put_value(out, shared.store.shard(key).get(&key[..]));
    Ok(())
}

fn set(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let [key, value, options @ ..] = args else { return arity("set") };
    let (mut if_absent, mut if_present) = (false, false);
    for option in options {
        match option.to_ascii_uppercase().as_slice() {
            b"NX" => if_absent = true,
            b"XX" => if_present = true,
            _ => return Err("ERR syntax error".into()),
        }
    }
    if if_absent && if_present {
        return Err("ERR syntax error".into());
    }
    let mut map = shared.store.shard(key);
    let present = map.contains_key(&key[..]);
    if (if_absent && present) || (if_present && !present) {
        put_nil(out);
        return Ok(());
    }
    put(&mut map, key, value);
    ok(out)
}

/// Stores copies: a slice of the receive buffer would keep all of that buffer alive.
fn put(map: &mut Map, key: &[u8], value: &[u8]) {
    match map.get_mut(key) {
        Some(old) => {
            old.clear();
            old.extend_from_slice(value);
        }
        None => {
            map.insert(key.into(), value.to_vec());
        }
    }
}

fn count(shared: &Shared, name: &[u8], keys: &[Bytes], out: &mut BytesMut) -> Outcome {
    if keys.is_empty() {
        return arity("del");
    }
    let mut shards = shared.store.shards(keys.iter().map(|key| &key[..]));
    let hits = keys.iter().filter(|key| match name {
        b"EXISTS" => shards.of(key).contains_key(&key[..]),
        _ => shards.of(key).remove(&key[..]).is_some(),
    });
    put_integer(out, hits.count() as i64);
    Ok(())
}

fn increment(shared: &Shared, name: &[u8], args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let not_a_number = || "ERR value is not an integer or out of range".to_owned();
    let (key, by) = match (name, args) {
        (b"INCR", [key]) => (key, 1),
        (b"DECR", [key]) => (key, -1),
        (b"INCRBY", [key, by]) => (key, parse_integer(by).ok_or_else(not_a_number)?),
        _ => return arity("incr"),
    };
    let mut map = shared.store.shard(key);
    let old = match map.get(&key[..]) {
        Some(value) => parse_integer(value).ok_or_else(not_a_number)?,
        None => 0,
    };
    let new = old
        .checked_add(by)
        .ok_or_else(|| "ERR increment or decrement would overflow".to_owned())?;
    put(&mut map, key, new.to_string().as_bytes());
    put_integer(out, new);
    Ok(())
}

fn append(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let [key, tail] = args else { return arity("append") };
    let mut map = shared.store.shard(key);
    let value = map.entry(key[..].into()).or_default();
    if value.len() + tail.len() > MAX_VALUE {
        return Err("ERR string exceeds maximum allowed size".into());
    }
    value.extend_from_slice(tail);
    put_integer(out, value.len() as i64);
    Ok(())
}

fn set_many(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let (pairs, rest) = args.as_chunks::<2>();
    if pairs.is_empty() || !rest.is_empty() {
        return arity("mset");
    }
    let mut shards = shared.store.shards(pairs.iter().map(|[key, _]| &key[..]));
    for [key, value] in pairs {
        put(shards.of(key), key, value);
    }
    ok(out)
}

fn get_many(shared: &Shared, keys: &[Bytes], out: &mut BytesMut) -> Outcome {
    if keys.is_empty() {
        return arity("mget");
    }
    let mut shards = shared.store.shards(keys.iter().map(|key| &key[..]));
    put_array(out, keys.len());
    for key in keys {
        put_value(out, shards.of(key).get(&key[..]));
    }
    Ok(())
}

fn client(args: &[Bytes], out: &mut BytesMut) -> Outcome {
    match args.first().map(|sub| sub.to_ascii_uppercase()).as_deref() {
        Some(b"ID") => put_integer(out, 1),
        Some(b"GETNAME") => put_nil(out),
        Some(b"LIST" | b"INFO") => put_bulk(out, b""),
        Some(b"SETNAME" | b"SETINFO" | b"NO-EVICT" | b"NO-TOUCH") => return ok(out),
        _ => return Err("ERR unknown subcommand of CLIENT".into()),
    }
    Ok(())
}

/// CONFIG GET knows the settings that redis-benchmark prints: nothing is ever saved.
fn config(args: &[Bytes], out: &mut BytesMut) -> Outcome {
    match args {
        [sub, names @ ..] if sub.eq_ignore_ascii_case(b"GET") => {
            let known = |name: &Bytes| match name.to_ascii_lowercase().as_slice() {
                b"save" => Some(("save", "")),
                b"appendonly" => Some(("appendonly", "no")),
                _ => None,
            };
            let found: Vec<_> = names.iter().filter_map(known).collect();
            put_array(out, 2 * found.len());
            for (name, value) in found {
                put_bulk(out, name.as_bytes());
                put_bulk(out, value.as_bytes());
            }
            Ok(())
        }
        _ => Err("ERR only CONFIG GET is known".into()),
    }
}

/// DEBUG POPULATE count [prefix [size]]: makes keys `prefix:0` and so on with values `value:0` and
/// so on, padded with zero bytes to the size; keys that exist stay.
fn debug(shared: &Shared, args: &[Bytes], out: &mut BytesMut) -> Outcome {
    let populate = args.first().is_some_and(|sub| sub.eq_ignore_ascii_case(b"POPULATE"));
    let [_, count, options @ ..] = args else { return arity("debug") };
    if !populate || options.len() > 2 {
        return Err("ERR only DEBUG POPULATE count [prefix [size]] is known".into());
    }
    let range = || "ERR value is out of range".to_owned();
    let number = |text: &[u8], most: usize| {
        parse_integer(text)
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| *number <= most)
            .ok_or_else(range)
    };
    let count = number(count, MAX_POPULATE)?;
    let prefix: &[u8] = options.first().map_or(b"key", |prefix| prefix);
    let size = options.get(1).map(|size| number(size, MAX_VALUE)).transpose()?;
    for at in 0..count {
        let key = [prefix, format!(":{at}").as_bytes()].concat();
        let mut value = format!("value:{at}").into_bytes();
        if let Some(size) = size {
            value.resize(size, 0);
        }
        shared.store.shard(&key).entry(key.into()).or_insert(value);
    }
    ok(out)
}

fn info(shared: &Shared) -> String {
    format!(
        "# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nprocess_id:{}\r\n\
         tcp_port:{}\r\n# Clients\r\nconnected_clients:{}\r\n# Keyspace\r\n\
         db0:keys={},expires=0,avg_ttl=0\r\n",
        std::process::id(),
        shared.address.port(),
        shared.connections.load(Ordering::Relaxed),
        shared.store.len(),
    )
}

/// The start of an argument, fit for an error message.
fn printable(text: &[u8]) -> String {
    text[..text.len().min(64)].escape_ascii().to_string()
}
