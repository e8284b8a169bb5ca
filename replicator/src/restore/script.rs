//! A batch of remote system calls with their arguments in memory and a name for each.
//!
//! Arguments that live in memory (paths, structures) are collected here and written into the
//! scratch area of the process in one go before the calls are made.

use crate::sys::memory;
use crate::sys::remote::{Batch, Call, DATA, DATA_LEN, MAX_CALLS};
use crate::sys::{SysError, SysResult};

/// Calls to be made together by one thread, in order.
#[derive(Debug, Default)]
pub(super) struct Script {
    batch: Batch,
    data: Vec<u8>,
    names: Vec<(&'static str, String)>,
}

impl Script {
    /// Whether this many more bytes of arguments and calls fit into one round.
    pub(super) fn has_room(&self, bytes: usize, calls: usize) -> bool {
        self.data.len() + bytes + 64 <= DATA_LEN && self.batch.len() + calls <= MAX_CALLS
    }

    /// Whether there is nothing to run.
    pub(super) fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Puts bytes into the scratch area; gives their address there.
    pub(super) fn data(&mut self, bytes: &[u8]) -> u64 {
        let at = self.data.len().next_multiple_of(16);
        self.data.resize(at, 0);
        self.data.extend(bytes);
        DATA + at as u64
    }

    /// Puts words into the scratch area; gives their address there.
    pub(super) fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.data(&bytes)
    }

    /// Puts a text with its closing zero byte into the scratch area.
    pub(super) fn text(&mut self, text: &str) -> u64 {
        let at = self.data(text.as_bytes());
        self.data.push(0);
        at
    }

    /// Adds a call; gives the index of its result.
    pub(super) fn call(&mut self, name: &'static str, number: i64, args: &[u64]) -> usize {
        self.call_on(name, String::new(), number, args)
    }

    /// Adds a call whose object an error should name.
    pub(super) fn call_on(
        &mut self,
        name: &'static str,
        object: String,
        number: i64,
        args: &[u64],
    ) -> usize {
        self.names.push((name, object));
        self.batch.push(Call::new(number, args))
    }

    /// Makes the calls in a stopped thread. Gives their results, -errno included.
    pub(super) fn run(&mut self, tid: i32) -> SysResult<Vec<i64>> {
        self.run_spawning(tid, &mut Vec::new())
    }

    /// As [`Script::run`], see [`Batch::run_spawning`].
    pub(super) fn run_spawning(&mut self, tid: i32, born: &mut Vec<i32>) -> SysResult<Vec<i64>> {
        if !self.data.is_empty() {
            memory::write(tid, DATA, &self.data)?;
            self.data.clear();
        }
        let results = self.batch.run_spawning(tid, born).map(<[i64]>::to_vec);
        self.names.clear();
        results
    }

    /// Makes the calls; the first that failed is an error.
    pub(super) fn run_ok(&mut self, tid: i32) -> SysResult<Vec<i64>> {
        self.run_ok_spawning(tid, &mut Vec::new())
    }

    /// As [`Script::run_ok`], see [`Batch::run_spawning`].
    pub(super) fn run_ok_spawning(&mut self, tid: i32, born: &mut Vec<i32>) -> SysResult<Vec<i64>> {
        let names = std::mem::take(&mut self.names);
        let results = self.run_spawning(tid, born)?;
        match results.iter().position(|r| (-4095..0).contains(r)) {
            None => Ok(results),
            Some(at) => Err(named(&names[at], tid, -results[at] as i32)),
        }
    }
}

fn named((name, object): &(&'static str, String), tid: i32, errno: i32) -> SysError {
    let object = if object.is_empty() { format!("tid {tid}") } else { object.clone() };
    SysError::errno(name, object, errno)
}
