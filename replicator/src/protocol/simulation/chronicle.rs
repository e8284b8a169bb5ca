//! What happened in a run, one line an event, for those who look at it.
//!
//! It belongs to the thread and not to the world, so that it is still there when a check has ended the
//! run in a panic. Invariant: it keeps at most as many lines as it was begun with, the newest; with
//! none, no line is even made.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Duration;

/// How a host is called.
pub(super) fn name_of(host: usize) -> &'static str {
    if host == 0 { "alpha" } else { "beta" }
}

#[derive(Debug, Default)]
struct Chronicle {
    most: usize,
    now: Duration,
    lines: VecDeque<String>,
}

thread_local! {
    static CHRONICLE: RefCell<Chronicle> = RefCell::default();
}

/// Begins anew, with room for so many lines.
pub(super) fn begin(most: usize) {
    CHRONICLE.set(Chronicle { most, ..Chronicle::default() });
}

/// All that is kept; nothing is kept from now on.
pub(super) fn end() -> Vec<String> {
    CHRONICLE.take().lines.into()
}

/// It is so late now.
pub(super) fn is(now: Duration) {
    CHRONICLE.with_borrow_mut(|chronicle| chronicle.now = now);
}

/// Whether any lines are kept.
pub(super) fn is_kept() -> bool {
    CHRONICLE.with_borrow(|chronicle| chronicle.most > 0)
}

/// Writes a line, if any are kept.
pub(super) fn note(line: impl FnOnce() -> String) {
    let (most, now) = CHRONICLE.with_borrow(|chronicle| (chronicle.most, chronicle.now));
    if most == 0 {
        return;
    }
    let line = format!("{:>7} ms  {}", now.as_millis(), line());
    CHRONICLE.with_borrow_mut(|chronicle| {
        if chronicle.lines.len() >= most {
            chronicle.lines.pop_front();
        }
        chronicle.lines.push_back(line);
    });
}
