//! While a container stands still its own processors have nothing to do: a thread on them takes part in what a stop
//! looks through.
//!
//! Invariant: nothing waits for a helper that has not begun. Work lies in pieces, and whoever is done first takes the next
//! one, so that a helper that gets no processor delays a stop by one piece at most.

use crate::sys::pagemap::Buffer;
use crate::sys::sched;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Real-time priority of a helper: that of the stop thread.
const PRIORITY: i32 = 20;
/// How often a piece that somebody else has begun is looked at before its helper may need our
/// processor, and for how long it then gets it.
const PATIENCE: u32 = 1_000;
const PAUSE: Duration = Duration::from_micros(20);
/// How often it is looked whether the container has moved to other processors.
const FOLLOW: Duration = Duration::from_secs(1);

/// Work in pieces that several threads can take.
pub(super) trait Help: Send + Sync + std::fmt::Debug {
    /// Whether a helper is awake before all of it is done anyhow.
    fn is_worth_it(&self) -> bool;

    /// A helper is about to be woken for it.
    fn is_called(&self) {}

    /// Takes pieces until there are no more, or whoever asked for it wants no help any more.
    fn help(&self, scratch: &mut Buffer);
}

/// Waits for a helper that is in the middle of a piece.
pub(super) fn wait_until(is_done: impl Fn() -> bool) {
    let mut looks = 0;
    while !is_done() {
        // To whoever has the same priority; sleeping lets those of a lower one on.
        looks += 1;
        match looks < PATIENCE {
            true => std::thread::yield_now(),
            false => std::thread::sleep(PAUSE),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The thread that helps, if there is a processor for it, and where it belongs: a container may be given
/// other processors at any time.
#[derive(Debug)]
pub(super) struct Helpers {
    root: i32,
    helper: Option<Helper>,
    places: Option<(CpuSet, CpuSet)>,
    looked: Instant,
}

impl Helpers {
    /// For a container whose first process has this host pid, and the calling thread.
    pub(super) fn of(root: i32) -> Self {
        let places = places(root);
        let helper = places.and_then(|(theirs, ours)| Helper::at(theirs, ours));
        Self { root, helper, places, looked: Instant::now() }
    }

    /// Moves it to where the container runs now; looks now and then only. Not for a stop: it may
    /// start a thread.
    pub(super) fn follow(&mut self) {
        if self.looked.elapsed() < FOLLOW {
            return;
        }
        self.looked = Instant::now();
        let now = places(self.root);
        if now.is_some() && now != self.places {
            *self = Self::of(self.root);
        }
    }

    /// Has it take part in some work, if that is worth its while.
    pub(super) fn call(&self, work: &Arc<impl Help + 'static>) {
        if let Some(helper) = self.helper.as_ref().filter(|_| work.is_worth_it()) {
            work.is_called();
            helper.call(work.clone());
        }
    }
}

/// A thread that helps.
#[derive(Debug)]
struct Helper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    order: Mutex<Order>,
    come: Condvar,
}

#[derive(Debug, Default)]
struct Order {
    works: VecDeque<Arc<dyn Help>>,
    end: bool,
}

impl Helper {
    /// One that runs at these processors. None where that leaves but one for it and a caller at
    /// `ours`.
    fn at(theirs: CpuSet, ours: CpuSet) -> Option<Self> {
        let either = |cpu| {
            let has = |set: &CpuSet| set.is_set(cpu).unwrap_or(false);
            has(&theirs) || has(&ours)
        };
        if (0..CpuSet::count()).filter(|cpu| either(*cpu)).count() < 2 {
            return None;
        }
        let shared = Arc::<Shared>::default();
        let for_thread = shared.clone();
        let run = move || {
            let placed = sched_setaffinity(Pid::from_raw(0), &theirs);
            if let Err(error) = placed {
                tracing::debug!(%error, "the helper is not where the container is");
            }
            if let Err(error) = sched::set_fifo(PRIORITY) {
                tracing::debug!(%error, "the helper is not real-time");
            }
            help(&for_thread);
        };
        let thread = std::thread::Builder::new().name("scan".into()).spawn(run);
        match thread {
            Ok(thread) => Some(Self { shared, thread: Some(thread) }),
            Err(error) => {
                tracing::debug!(%error, "stops scan alone");
                None
            }
        }
    }

    fn call(&self, work: Arc<dyn Help>) {
        let mut order = lock(&self.shared.order);
        // It had no processor: nobody waits for these any more, or again for the same.
        order.works.retain(|old| Arc::strong_count(old) > 1 && !Arc::ptr_eq(old, &work));
        order.works.push_back(work);
        drop(order);
        self.shared.come.notify_one();
    }
}

fn help(shared: &Shared) {
    let mut scratch = Buffer::default();
    let mut order = lock(&shared.order);
    loop {
        if order.end {
            return;
        }
        let Some(work) = order.works.pop_front() else {
            order = shared.come.wait(order).unwrap_or_else(|e| e.into_inner());
            continue;
        };
        drop(order);
        work.help(&mut scratch);
        drop(work);
        order = lock(&shared.order);
    }
}

/// The processors of a process, and of the calling thread.
fn places(pid: i32) -> Option<(CpuSet, CpuSet)> {
    let of = |pid| sched_getaffinity(Pid::from_raw(pid)).ok();
    Some((of(pid)?, of(0)?))
}

impl Drop for Helper {
    fn drop(&mut self) {
        lock(&self.shared.order).end = true;
        self.shared.come.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has not panicked: nothing in it does.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[test]
    fn a_helper_follows_to_other_processors() {
        let me = nix::unistd::gettid();
        let all = sched_getaffinity(me).expect("known");
        let set: Vec<usize> = (0..CpuSet::count()).filter(|c| all.is_set(*c) == Ok(true)).collect();
        let [first, .., last] = set[..] else {
            println!("skipped: one processor");
            return;
        };
        let only = |cpu| {
            let mut set = CpuSet::new();
            set.set(cpu).expect("a processor");
            set
        };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a child");
        let root = child.id() as i32;
        let place = |pid: Pid, cpu| sched_setaffinity(pid, &only(cpu)).expect("placed");
        place(me, first);
        place(Pid::from_raw(root), first);
        let mut helpers = Helpers::of(root);
        assert!(helpers.helper.is_none(), "one processor for both");
        place(Pid::from_raw(root), last);
        helpers.looked -= FOLLOW;
        helpers.follow();
        assert!(helpers.helper.is_some(), "one for each");
        place(Pid::from_raw(root), first);
        helpers.follow();
        assert!(helpers.helper.is_some(), "it looks now and then");
        helpers.looked -= FOLLOW;
        helpers.follow();
        assert!(helpers.helper.is_none(), "one for both again");
        child.kill().expect("ended");
        child.wait().expect("gone");
        sched_setaffinity(me, &all).expect("as before");
    }

    /// Holds whoever helps with it until it is told to go on.
    #[derive(Debug, Default)]
    struct Work {
        begun: AtomicUsize,
        may_end: AtomicBool,
    }

    impl Help for Work {
        fn is_worth_it(&self) -> bool {
            true
        }

        fn help(&self, _: &mut Buffer) {
            self.begun.fetch_add(1, Ordering::SeqCst);
            wait_until(|| self.may_end.load(Ordering::SeqCst));
        }
    }

    #[test]
    fn a_helper_that_is_late_does_the_same_once_and_nothing_for_nobody() {
        let all = sched_getaffinity(Pid::from_raw(0)).expect("known");
        let Some(helper) = Helper::at(all, all) else {
            println!("skipped: one processor");
            return;
        };
        let [first, again, gone] = [(); 3].map(|()| Arc::<Work>::default());
        let forgotten = Arc::downgrade(&gone);
        helper.call(first.clone());
        wait_until(|| first.begun.load(Ordering::SeqCst) == 1);
        again.may_end.store(true, Ordering::SeqCst);
        helper.call(gone);
        (0..3).for_each(|_| helper.call(again.clone()));
        let held = (Arc::strong_count(&again), forgotten.strong_count());
        first.may_end.store(true, Ordering::SeqCst);
        assert_eq!(held, (2, 0));
        wait_until(|| Arc::strong_count(&again) == 1);
        assert_eq!(again.begun.load(Ordering::SeqCst), 1);
        // As at each stop: it is called again once it has done it.
        helper.call(again.clone());
        wait_until(|| again.begun.load(Ordering::SeqCst) == 2);
    }
}
