//! What the server holds: strings by key, in shards with a lock each.
//!
//! Invariant: a command on several keys locks all their shards, in ascending order, before it
//! touches one, so it is atomic and two such commands cannot wait for each other.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

const SHARDS: usize = 64;

pub(super) type Map = HashMap<Box<[u8]>, Vec<u8>>;

/// All keys and values of a server.
#[derive(Debug)]
pub struct Store {
    shards: Vec<Mutex<Map>>,
}

/// A copy of a store at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<Map>);

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.all().iter().map(|shard| shard.len()).sum()
    }

    /// Whether it holds no keys.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all keys.
    pub fn clear(&self) {
        self.all().iter_mut().for_each(|shard| shard.clear());
    }

    /// A copy of all that it holds, as of one moment.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.all().iter().map(|shard| (**shard).clone()).collect())
    }

    /// Goes back to a snapshot, in one moment: what a restart from an old copy does.
    pub fn restore(&self, snapshot: &Snapshot) {
        for (shard, old) in self.all().iter_mut().zip(&snapshot.0) {
            (**shard).clone_from(old);
        }
    }

    /// The shard that holds a key, locked.
    pub(super) fn shard(&self, key: &[u8]) -> MutexGuard<'_, Map> {
        lock(&self.shards[index(key)])
    }

    /// The shards that hold these keys, locked.
    pub(super) fn shards<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) -> Shards<'_> {
        let mut wanted = [false; SHARDS];
        keys.for_each(|key| wanted[index(key)] = true);
        Shards((0..SHARDS).map(|at| wanted[at].then(|| lock(&self.shards[at]))).collect())
    }

    fn all(&self) -> Vec<MutexGuard<'_, Map>> {
        self.shards.iter().map(lock).collect()
    }
}

/// Several shards, locked together.
pub(super) struct Shards<'a>(Vec<Option<MutexGuard<'a, Map>>>);

impl Shards<'_> {
    /// The map for a key, which must be among those that were asked for.
    pub(super) fn of(&mut self, key: &[u8]) -> &mut Map {
        self.0[index(key)].as_mut().expect("the shard of a key of the same command is locked")
    }
}

fn lock(shard: &Mutex<Map>) -> MutexGuard<'_, Map> {
    // A map stays whole when a thread that held it panics: no change of ours is in two steps.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn index(key: &[u8]) -> usize {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish() as usize % SHARDS
}
