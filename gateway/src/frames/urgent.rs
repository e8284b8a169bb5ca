//! A lock that somebody in a hurry gets next.
//!
//! The standard mutex lets a thread that unlocks and locks again in a loop keep everybody else
//! out for long. Here a data-path thread loops like that, and the stop thread, which has frozen a
//! container, must not wait. The stop thread says that it comes; the loop sees it after the frame
//! in hand and steps aside.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A mutex with a place at the front of its queue.
#[derive(Debug)]
pub(crate) struct UrgentLock<T> {
    value: Mutex<T>,
    /// Held by the urgent one from before it waits until it has done.
    turnstile: Mutex<()>,
    /// Set only while the turnstile is held, so that whoever sees it can wait there.
    coming: AtomicBool,
}

/// Access taken with [`UrgentLock::lock_urgent`].
#[derive(Debug)]
pub(crate) struct UrgentGuard<'a, T> {
    // Fields drop in this order: the value first, then the way is free for the others.
    value: MutexGuard<'a, T>,
    _coming: Coming<'a>,
    _turnstile: MutexGuard<'a, ()>,
}

#[derive(Debug)]
struct Coming<'a>(&'a AtomicBool);

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl<T> UrgentLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), turnstile: Mutex::new(()), coming: AtomicBool::new(false) }
    }

    /// Waits for whoever is at it now, and for nobody else.
    pub(crate) fn lock_urgent(&self) -> UrgentGuard<'_, T> {
        let turnstile = self.turnstile.lock().unwrap_or_else(PoisonError::into_inner);
        self.coming.store(true, Ordering::Release);
        let coming = Coming(&self.coming);
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        UrgentGuard { value, _coming: coming, _turnstile: turnstile }
    }

    /// Waits for everybody, the urgent ones first.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        while self.is_wanted() {
            drop(self.turnstile.lock().unwrap_or_else(PoisonError::into_inner));
        }
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an urgent one waits or works: a holder in a loop should let go.
    pub(crate) fn is_wanted(&self) -> bool {
        self.coming.load(Ordering::Acquire)
    }
}

impl<T> Deref for UrgentGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for UrgentGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_urgent_one_gets_in_beside_a_busy_loop() {
        let lock = Arc::new(UrgentLock::new(0u64));
        let stop = Arc::new(AtomicBool::new(false));
        let busy = {
            let (lock, stop) = (lock.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let mut value = lock.lock();
                    while !lock.is_wanted() && !stop.load(Ordering::Relaxed) {
                        *value += 1; // would go on for ever
                    }
                }
            })
        };
        for _ in 0..200 {
            let value = lock.lock_urgent();
            let seen = *value;
            std::thread::yield_now();
            assert_eq!(seen, *value, "nobody else is in");
        }
        stop.store(true, Ordering::Relaxed);
        busy.join().unwrap();
    }
}
