//! Threads that are to stop and do not get there, because somebody else has the processor, are real-time until they have.
//!
//! A thread stops by itself, on its way out of the kernel. Where others want its processor it first has to wait for its turn,
//! milliseconds for each of them, and where its share is used up (cpu.max) until the next period, 100 ms and
//! more. What it is to do takes microseconds. So if nobody has stopped for a while, whoever is left goes before all ordinary
//! threads (SCHED_FIFO), and is what it was before again when all have stopped.
//!
//! Invariants: nothing of this is left when the freeze is over, and no thread runs its program as what it is not: it
//! goes from the kernel straight to its stop. What it changes itself on the way (a system call that it finishes) stays
//! changed. What it makes on the way is as if it had been what it was.

use crate::image::task::Scheduling;
use crate::sys::alarm::Alarm;
use crate::sys::{SysError, sched};
use std::time::Duration;

/// For how long nobody may have stopped. A thread that has a processor is there within some 20 us.
const PERIOD: Duration = Duration::from_micros(150);

/// The flag of a thread whose children begin as ordinary ones (SCHED_FLAG_RESET_ON_FORK).
const RESET_ON_FORK: u64 = 1;
const FIFO: u32 = libc::SCHED_FIFO as u32;

#[derive(Debug, Default)]
pub(super) struct Haste {
    /// None before the first freeze, and where there is none to be had.
    alarm: Option<Alarm>,
    /// How many had stopped when it was last looked.
    before: usize,
    /// Threads that were made real-time, and what they were.
    raised: Vec<(i32, Scheduling)>,
    /// Threads that these made since, and what they are to be.
    made: Vec<(i32, Scheduling)>,
}

impl Haste {
    /// A freeze begins: what the calling thread waits in ends now and then.
    pub(super) fn begin(&mut self) {
        self.before = 0;
        if self.alarm.is_none() {
            self.alarm = Alarm::new().map_err(tell).ok();
        }
        self.set(PERIOD);
    }

    fn set(&mut self, period: Duration) {
        let set = self.alarm.as_ref().map(|alarm| alarm.ring_every(period));
        if let Some(Err(error)) = set {
            tell(error);
            self.alarm = None;
        }
    }

    /// Whether what the calling thread waits in ends now and then.
    pub(super) fn rings(&self) -> bool {
        self.alarm.is_some()
    }

    /// It was waited for a while, and so many have stopped. Raises those that are left if they are as many as before and the
    /// calling thread is real-time itself.
    pub(super) fn look(&mut self, stopped: usize, left: impl Iterator<Item = i32>) {
        if std::mem::replace(&mut self.before, stopped) != stopped {
            return;
        }
        let Ok(me) = sched::attributes(0) else { return };
        if me.policy != FIFO {
            return;
        }
        for tid in left {
            if self.raised.iter().all(|(raised, _)| *raised != tid)
                && let Some(was) = raise(tid, me.priority as i32)
            {
                self.raised.push((tid, was));
            }
        }
    }

    /// One of the threads has made another one, which has not run yet.
    pub(super) fn made(&mut self, maker: i32, new: i32) {
        if let Some((_, was)) = self.raised.iter().find(|(tid, _)| *tid == maker) {
            self.made.push((new, child_of(was)));
        }
    }

    /// A thread has replaced the program of its process, and has the number of the main thread from now on, which is gone.
    pub(super) fn renamed(&mut self, former: i32, now: i32) {
        if former != now {
            self.raised.retain(|(tid, _)| *tid != now);
            for (tid, _) in self.raised.iter_mut().filter(|(tid, _)| *tid == former) {
                *tid = now;
            }
        }
    }

    /// The freeze is over: everybody is what it was before, or what it was made by itself meanwhile.
    pub(super) fn end(&mut self) {
        self.set(Duration::ZERO);
        for (tid, was) in self.raised.drain(..) {
            lower(tid, &was);
        }
        for (tid, attributes) in self.made.drain(..) {
            set(tid, &attributes);
        }
    }
}

fn tell(error: SysError) {
    tracing::debug!(%error, "stops wait for threads without a processor");
}

/// Makes an ordinary thread real-time. What it was; none if it is none, or is gone, or its group has no time for real-time threads
/// (cpu.rt_runtime_us).
fn raise(tid: i32, priority: i32) -> Option<Scheduling> {
    let was = sched::attributes(tid).ok()?;
    let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
    if !ordinary.contains(&(was.policy as i32)) {
        return None;
    }
    if let Err(error) = sched::set_fifo_of(tid, priority) {
        tracing::trace!(%error, "it waits for its turn");
        return None;
    }
    Some(was)
}

fn lower(tid: i32, was: &Scheduling) {
    let now = sched::attributes(tid);
    // Otherwise it is gone, or has made something else of itself.
    if now.is_ok_and(|now| now.policy == FIFO && now.flags & RESET_ON_FORK != 0) {
        // That is told of a real-time thread by another call only, and may have been changed.
        let nice = sched::nice_of(tid).unwrap_or(was.nice);
        set(tid, &Scheduling { nice, ..*was });
    }
}

fn set(tid: i32, attributes: &Scheduling) {
    match sched::set_attributes(tid, attributes) {
        Err(error) if !error.is_gone() => {
            tracing::warn!(%error, "a thread of the container stays real-time");
        }
        _ => {}
    }
}

/// What a thread is that an ordinary one makes: see "Resetting scheduling policy for child processes" of sched(7).
fn child_of(maker: &Scheduling) -> Scheduling {
    match maker.flags & RESET_ON_FORK {
        0 => *maker,
        _ => Scheduling { flags: maker.flags & !RESET_ON_FORK, nice: maker.nice.max(0), ..*maker },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDINARY: Scheduling = Scheduling {
        policy: 0,
        flags: 0,
        nice: -5,
        priority: 0,
        runtime: 0,
        deadline: 0,
        period: 0,
    };

    #[test]
    fn what_is_made_meanwhile_is_what_it_would_have_been() {
        assert_eq!(child_of(&ORDINARY), ORDINARY);
        let batch = Scheduling { policy: libc::SCHED_BATCH as u32, nice: 7, ..ORDINARY };
        assert_eq!(child_of(&batch), batch);
        let reset = Scheduling { flags: RESET_ON_FORK, ..ORDINARY };
        assert_eq!(child_of(&reset), Scheduling { nice: 0, ..ORDINARY });
        let reset = Scheduling { flags: RESET_ON_FORK, ..batch };
        assert_eq!(child_of(&reset), batch);
    }

    #[test]
    fn who_replaces_its_program_is_known_by_its_new_number() {
        let other = Scheduling { nice: 4, ..ORDINARY };
        let mut haste =
            Haste { raised: vec![(7, ORDINARY), (8, other), (9, ORDINARY)], ..Haste::default() };
        haste.renamed(9, 9);
        haste.renamed(8, 7);
        assert_eq!(haste.raised, [(7, other), (9, ORDINARY)]);
    }

    /// Runs `f` with the number of a thread that sleeps, and which is asked for what it is afterwards.
    fn with_thread(prepare: impl FnOnce() + Send, f: impl FnOnce(i32)) -> (Scheduling, i32) {
        let (tell, told) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                prepare();
                tell.send(nix::unistd::gettid().as_raw()).expect("somebody listens");
                let _ = gone.recv();
                let nice = sched::nice_of(0).expect("its own");
                (sched::attributes(0).expect("its own"), nice)
            });
            f(told.recv().expect("it runs"));
            drop(go);
            thread.join().expect("no panic")
        })
    }

    #[test]
    fn a_thread_is_what_it_was_when_it_has_stopped_or_what_it_has_made_of_itself() {
        std::thread::spawn(|| {
            if let Err(error) = sched::set_fifo(1) {
                println!("skipped: {error}");
                return;
            }
            let class = |tid| sched::attributes(tid).expect("it is there").policy;
            let raised = |tid: i32, haste: &mut Haste| {
                haste.begin();
                haste.look(0, [tid].into_iter());
                assert_eq!(class(tid), FIFO);
            };
            let mut haste = Haste::default();
            let nice = || sched::set_nice(3).expect("less is always allowed");
            let mut was = ORDINARY;
            let now = with_thread(nice, |tid| {
                was = sched::attributes(tid).expect("it is there");
                // One has stopped since it was last looked.
                haste.begin();
                haste.look(1, [tid].into_iter());
                assert_eq!(class(tid), 0);
                raised(tid, &mut haste);
                haste.end();
            });
            assert_eq!((was.nice, now), (3, (was, 3)));
            // It calls nice(2) or sched_setattr(2) meanwhile.
            let now = with_thread(nice, |tid| {
                raised(tid, &mut haste);
                sched::set_nice_of(tid, 5).expect("less is always allowed");
                haste.end();
            });
            assert_eq!((now.0.policy, now.1), (0, 5));
            let batch = Scheduling { policy: libc::SCHED_BATCH as u32, nice: 3, ..was };
            let now = with_thread(nice, |tid| {
                raised(tid, &mut haste);
                sched::set_attributes(tid, &batch).expect("less is always allowed");
                haste.end();
            });
            assert_eq!(now.0.policy, batch.policy);
            // A real-time thread waits for no ordinary one.
            let now = with_thread(
                || sched::set_fifo(2).expect("it may"),
                |tid| {
                    haste.begin();
                    haste.look(0, [tid].into_iter());
                    assert!(haste.raised.is_empty());
                    haste.end();
                },
            );
            assert_eq!((now.0.policy, now.0.priority), (FIFO, 2));
        })
        .join()
        .expect("no panic");
    }
}
