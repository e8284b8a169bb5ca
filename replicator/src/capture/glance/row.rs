//! A row: what a glance shows of one descriptor.
//!
//! ```text
//! | head: number, flags, file, inode, who watches it, ... | of a TCP socket: its fields |
//! ```
//! Its addresses stand for things of the kernel while the process is stopped, and lead a later look to them
//! ([`super::again`]).

use super::head;
use super::sockets::Tcp;

/// What was seen of one descriptor.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Row<'a> {
    pub(super) head: &'a [u8],
    /// If it is a TCP socket.
    pub(in crate::capture) tcp: Option<Tcp<'a>>,
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Row<'_> {
    /// The descriptor.
    pub(in crate::capture) fn number(&self) -> i32 {
        u32_at(self.head, head::FD) as i32
    }

    /// Flags as fdinfo shows them, O_CLOEXEC included.
    pub(in crate::capture) fn flags(&self) -> i32 {
        let flags = u32_at(self.head, head::FLAGS) as i32 & !libc::O_CLOEXEC;
        match u64_at(self.head, head::CLOEXEC) {
            0 => flags,
            _ => flags | libc::O_CLOEXEC,
        }
    }

    /// Stands for the open file description while the process is stopped.
    pub(in crate::capture) fn file(&self) -> u64 {
        u64_at(self.head, head::FILE)
    }

    /// If it is a TCP socket: where it is in the kernel's memory.
    pub(in crate::capture) fn socket(&self) -> u64 {
        u64_at(self.head, head::SOCKET)
    }

    /// Stands for the kind of file.
    pub(in crate::capture) fn operations(&self) -> u64 {
        u64_at(self.head, head::OPERATIONS)
    }

    pub(in crate::capture) fn inode(&self) -> u64 {
        u64_at(self.head, head::INODE)
    }

    pub(in crate::capture) fn position(&self) -> u64 {
        u64_at(self.head, head::POSITION)
    }

    /// Whether anybody has ever locked the file.
    pub(in crate::capture) fn may_be_locked(&self) -> bool {
        u64_at(self.head, head::LOCKS) != 0
    }

    /// Whether anybody may be told of its events (F_SETOWN).
    pub(in crate::capture) fn may_tell(&self) -> bool {
        u64_at(self.head, head::OWNER) != 0
    }

    /// The first epoll instance that watches the file, by which number, events and data. Another
    /// that watches it too is short of an entry then.
    pub(in crate::capture) fn watcher(&self) -> Option<(u64, i32, u32, u64)> {
        let by = u64_at(self.head, head::WATCHER);
        let number = u32_at(self.head, head::WATCHED_AS) as i32;
        let events = u32_at(self.head, head::EVENTS);
        (by != 0).then(|| (by, number, events, u64_at(self.head, head::EVENT_DATA)))
    }

    /// If it is an epoll instance: what stands for it, and how many files it watches.
    pub(in crate::capture) fn as_epoll(&self) -> (u64, usize) {
        let references = u32_at(self.head, head::EPOLL_REFERENCES) as usize;
        (u64_at(self.head, head::PRIVATE), references.wrapping_sub(1))
    }

    /// Stands for its name, if it is a file with a path: for the name itself, that it is there, and
    /// the directory that it is in, not for those above.
    pub(in crate::capture) fn name(&self) -> [u64; 4] {
        let [entry, parent, name, hashed] =
            [head::ENTRY, head::PARENT, head::NAME, head::HASHED].map(|at| u64_at(self.head, at));
        [entry, parent, name, u64::from(hashed != 0)]
    }

    /// If it is a pipe that is empty: how many bytes it may hold.
    pub(in crate::capture) fn as_empty_pipe(&self) -> Option<u32> {
        let [first, behind, slots] =
            [head::PIPE_HEAD, head::PIPE_TAIL, head::PIPE_SLOTS].map(|at| u32_at(self.head, at));
        // Of anything else these are what happens to lie there.
        (first == behind).then(|| slots.checked_mul(4096)).flatten()
    }

    /// If it is an eventfd: its count, and whether it is a semaphore.
    pub(in crate::capture) fn as_eventfd(&self) -> (u64, bool) {
        let flags = u32_at(self.head, head::EVENTFD_FLAGS) as i32;
        (u64_at(self.head, head::EVENTFD_COUNT), flags & libc::EFD_SEMAPHORE != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_another_file_is_no_pipe_and_no_panic() {
        let garbage = [0xff; head::LEN];
        assert_eq!(Row { head: &garbage, tcp: None }.as_empty_pipe(), None);
    }
}
