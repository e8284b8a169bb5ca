//! What a process holds, one line an object: for `image show` and `check`.

use replicator::image::{Description, Kind, Mapping, Process, Source, State};
use serde::Serialize;

/// An object, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Object {
    /// Mapping, descriptor, ...
    pub(super) kind: &'static str,
    /// Which one, and what it is.
    pub(super) what: String,
}

/// Everything that an image has of a process but its threads.
pub(super) fn of_process(state: &State, process: &Process) -> Vec<Object> {
    let mut all = Vec::new();
    all.extend(process.mappings.iter().map(|m| Object { kind: "mapping", what: mapping(m) }));
    for fd in &process.fds {
        let description = state.descriptions.get(fd.description as usize);
        let what = description.map_or_else(String::new, |d| self::description(state, d));
        let kind = if description.is_some_and(is_socket) { "socket" } else { "descriptor" };
        all.push(Object { kind, what: format!("{} {what}", fd.number) });
    }
    all
}

fn is_socket(d: &Description) -> bool {
    let name = variant(&d.kind);
    ["tcp", "inet", "unix", "datagram", "netlink"].iter().any(|family| name.starts_with(family))
}

fn mapping(m: &Mapping) -> String {
    let flag = |bit: u8, name| if m.prot & bit != 0 { name } else { '-' };
    let prot: String = [flag(1, 'r'), flag(2, 'w'), flag(4, 'x')].iter().collect();
    let source = match &m.source {
        Source::File { path, offset, shared, .. } => {
            format!("{path} at {offset:#x}{}", if *shared { ", shared" } else { "" })
        }
        other => variant(other),
    };
    format!("{:#x}-{:#x} {prot} {source}", m.start, m.end)
}

fn description(state: &State, d: &Description) -> String {
    match &d.kind {
        Kind::File { path, offset } => format!("{path} at {offset}"),
        Kind::Pipe(at) => {
            let held = state.pipes.get(*at as usize).map_or(0, |p| p.contents.len());
            format!("pipe {at}, {held} bytes in it")
        }
        Kind::TcpListener(l) => format!("tcp listener {}", l.local),
        Kind::Tcp(c) => format!("tcp {} - {}, {:?}", c.local, c.remote, c.state),
        other => variant(other),
    }
}

/// The name of an enum's variant, in small letters: kinds that are added later have one, too.
fn variant(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
    let mut out = String::new();
    for c in text[..end].chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push(' ');
        }
        out.extend(c.to_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_have_their_names() {
        assert_eq!(variant(&Kind::EventFd { count: 3, semaphore: false }), "event fd");
        assert_eq!(variant(&Source::Anonymous), "anonymous");
        assert_eq!(variant(&Kind::Pipe(3)), "pipe");
    }
}
