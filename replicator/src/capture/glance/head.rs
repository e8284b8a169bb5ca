//! Places in the head of a row ([`super::row`]).

use std::ops::Range;

/// When it was made; not there in rows that a later look has written.
pub(super) const TIME: usize = 0;
pub(super) const FD: usize = 8;
pub(super) const TID: usize = 12;
pub(super) const FLAGS: usize = 16;
pub(super) const IS_TCP: usize = 20;
pub(super) const FILE: usize = 24;
pub(super) const OPERATIONS: usize = 32;
pub(super) const INODE: usize = 40;
pub(super) const LOCKS: usize = 48;
pub(super) const POSITION: usize = 56;
pub(super) const PRIVATE: usize = 64;
pub(super) const OWNER: usize = 72;
pub(super) const CLOEXEC: usize = 80;
/// The first epoll instance that watches the file, by which number, for what.
pub(super) const WATCHER: usize = 88;
pub(super) const WATCHED_AS: usize = 96;
/// struct epoll_event is packed.
pub(super) const EVENTS: usize = 100;
pub(super) const EVENT_DATA: usize = 104;
pub(super) const WATCHED: Range<usize> = WATCHER..EVENT_DATA + 8;
/// Addresses of the thread, the inode, the list of who watches the file, and the first in it.
pub(super) const TASK: usize = 112;
pub(super) const INODE_AT: usize = 120;
pub(super) const WATCHERS: usize = 128;
pub(super) const FIRST: usize = 136;
/// What the file would be if it were an epoll instance or an eventfd.
pub(super) const EPOLL_REFERENCES: usize = 144;
pub(super) const EVENTFD_FLAGS: usize = 148;
pub(super) const EVENTFD_COUNT: usize = 152;
/// Of a TCP socket: its struct tcp_sock, and its struct ipv6_pinfo.
pub(super) const SOCKET: usize = EVENTFD_COUNT;
pub(super) const IPV6: usize = ENTRY;
/// Of all others: entry and directory of its name, and what says whether the name is still there.
pub(super) const ENTRY: usize = 160;
pub(super) const PARENT: usize = 168;
pub(super) const NAME: usize = 176;
pub(super) const HASHED: usize = 184;
/// What it would be if it were a pipe.
pub(super) const PIPE_HEAD: usize = 192;
pub(super) const PIPE_TAIL: usize = 196;
pub(super) const PIPE_SLOTS: usize = 200;
pub(super) const LEN: usize = 208;
