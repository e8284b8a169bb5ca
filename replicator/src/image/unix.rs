//! Unix sockets in a checkpoint.

use super::net::RawOptions;
use serde::{Deserialize, Serialize};

/// A unix socket that a description refers to, or that another one is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// What it is bound to.
    pub name: Option<UnixName>,
    /// What it is connected to.
    pub link: UnixLink,
    /// RCV_SHUTDOWN 1 | SEND_SHUTDOWN 2
    pub shut: u8,
    /// What waits to be read here, oldest first.
    pub queue: Vec<UnixMessage>,
    /// SO_PEERCRED; of a listening socket those that connecting sockets will see.
    pub peer: UnixCredentials,
    /// Its options.
    pub options: RawOptions,
}

/// What a unix socket is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixName {
    /// As bind(2) was called with it: a path, or zero and an abstract name.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// Of a path that is not absolute: the directory it was bound in, if that is known.
    pub directory: Option<String>,
    /// Mode, user and group of the socket's file; none if the path does not lead to it (any more).
    pub file: Option<(u32, u32, u32)>,
}

/// What a unix socket is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixLink {
    /// Nothing.
    #[default]
    None,
    /// It listens.
    Listening {
        /// What listen(2) was called with.
        backlog: u32,
        /// The sockets whose connections wait to be accepted, in order: indices into
        /// [`super::State::unix_sockets`].
        pending: Vec<u32>,
    },
    /// The socket with this index in [`super::State::unix_sockets`].
    Peer(u32),
    /// A connection that waits to be accepted by the listening socket that names it.
    Pending,
    /// A socket that was closed.
    Closed {
        /// The name it had.
        name: Option<Vec<u8>>,
        /// It had unread data, and the next call tells so (ECONNRESET).
        reset: bool,
    },
}

/// Pid in the container (0: of a process that has ended), user and group.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[allow(missing_docs, reason = "named as in struct ucred")]
pub struct UnixCredentials {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// What was written at once to a datagram or seqpacket socket; a piece of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// Its bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// The name of the sender of a datagram.
    pub from: Option<Vec<u8>>,
    /// Descriptors that travel with it (SCM_RIGHTS): indices into
    /// [`super::State::descriptions`].
    pub rights: Vec<u32>,
    /// Who sent it, if the receiver asks for that (SO_PASSCRED).
    pub credentials: Option<UnixCredentials>,
}
