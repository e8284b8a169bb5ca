//! A look at many descriptors in pieces, of which a helper takes some.
//!
//! Invariant: the memory that programs share is touched by nobody here from [`Pieces::offer`] to [`Pieces::end`]; each runner has
//! a head of its own.

use super::{COUNT, HEAD_LEN, LOOPBACK, NEXT, OPEN, TABLE_LEN, TASK, TID, TIME};
use crate::capture::glance::row::{u32_at, u64_at};
use crate::capture::helpers::{Help, wait_until};
use crate::sys::pagemap::Buffer;
use crate::sys::{SysResult, bpf};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Entries of a piece, and how many are shared with a helper: it is awake after some 20 us.
const PIECE: usize = 64;
pub(super) const MANY: usize = 4 * PIECE;
/// No piece is begun any more.
const OVER: usize = usize::MAX / 2;

/// The table of a process: its length, and its bits for open numbers.
pub(super) type Table = (u32, Vec<u8>);

/// A program that looks, and the head by which it is asked.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) head: bpf::Shared,
    program: OwnedFd,
}

impl Runner {
    pub(super) fn new(assemble: impl FnOnce(i32) -> Vec<u8>) -> SysResult<Self> {
        let head = bpf::Shared::new(HEAD_LEN)?;
        let program = bpf::load(&assemble(head.map().as_raw_fd()))?;
        Ok(Self { head, program })
    }

    pub(super) fn put(&mut self, at: usize, word: u32) {
        self.head.bytes()[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }

    /// Says of which thread it is.
    pub(super) fn ask_of(&mut self, task: u64) {
        self.head.bytes()[TASK..TASK + 8].copy_from_slice(&task.to_ne_bytes());
    }

    /// Looks at these entries. Says whether the program has come to the last of them.
    pub(super) fn run(&mut self, from: usize, to: usize) -> SysResult<bool> {
        self.put(NEXT, from as u32);
        self.put(COUNT, to as u32);
        self.head.run(self.program.as_fd(), LOOPBACK)?;
        Ok(u32_at(self.head.bytes(), NEXT) as usize == to)
    }

    /// Whether the table is that of the process and has the same numbers in it.
    pub(super) fn is_same_table(&mut self, pid: i32, (len, open): &Table) -> bool {
        let bytes = self.head.bytes();
        u32_at(bytes, TID) as i32 == pid
            && u32_at(bytes, TABLE_LEN) == *len
            && bytes[OPEN..OPEN + open.len()] == open[..]
    }

    /// When all was read.
    pub(super) fn time(&mut self) -> u64 {
        u64_at(self.head.bytes(), TIME)
    }
}

/// A look that is under way, in pieces.
#[derive(Debug)]
pub(in crate::capture) struct Pieces {
    pid: i32,
    /// What the helper looks with, and what the table must be.
    helper: Mutex<(Runner, Table)>,
    next: AtomicUsize,
    /// Entries in all.
    count: AtomicUsize,
    /// Helpers at work.
    active: AtomicUsize,
    /// A piece could not be looked at, or not where everything was.
    failed: AtomicBool,
}

impl Pieces {
    /// For the process with this host pid; the helper looks with this.
    pub(super) fn new(pid: i32, helper: Runner) -> Arc<Self> {
        Arc::new(Self {
            pid,
            helper: Mutex::new((helper, Table::default())),
            next: AtomicUsize::new(OVER),
            count: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        })
    }

    /// Tells the helper of which thread it is and what its table must be. No look is under way.
    pub(super) fn ask_of(&self, task: u64, table: &Table) {
        let mut helper = self.helper.lock().unwrap_or_else(PoisonError::into_inner);
        helper.0.ask_of(task);
        helper.1.clone_from(table);
    }

    /// So many entries may be looked at from now on.
    pub(super) fn offer(&self, count: usize) {
        self.failed.store(false, Ordering::SeqCst);
        self.count.store(count, Ordering::SeqCst);
        self.next.store(0, Ordering::SeqCst);
    }

    /// Whether the helper has looked at all that it took, to its end.
    pub(super) fn are_whole(&self) -> bool {
        !self.failed.load(Ordering::SeqCst)
    }

    /// The next piece, if there is one left.
    pub(super) fn claim(&self) -> Option<(usize, usize)> {
        let from = self.next.fetch_add(1, Ordering::SeqCst).checked_mul(PIECE)?;
        let count = self.count.load(Ordering::SeqCst);
        (from < count).then(|| (from, count.min(from + PIECE)))
    }

    /// No piece is begun any more, and none is under way.
    pub(super) fn end(&self) {
        self.next.store(OVER, Ordering::SeqCst);
        wait_until(|| self.active.load(Ordering::SeqCst) == 0);
    }
}

impl Help for Pieces {
    fn is_worth_it(&self) -> bool {
        self.count.load(Ordering::SeqCst) >= MANY
    }

    fn help(&self, _: &mut Buffer) {
        self.active.fetch_add(1, Ordering::SeqCst);
        let mut helper = self.helper.lock().unwrap_or_else(PoisonError::into_inner);
        let (runner, table) = &mut *helper;
        while let Some((from, to)) = self.claim() {
            let whole = matches!(runner.run(from, to), Ok(true));
            if !whole || !runner.is_same_table(self.pid, table) {
                self.failed.store(true, Ordering::SeqCst);
            }
        }
        drop(helper);
        self.active.fetch_sub(1, Ordering::SeqCst);
    }
}
