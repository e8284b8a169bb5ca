//! The live line: what a long command is doing now, on a terminal, and nothing anywhere else.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// How often the line changes at most.
const STEP: Duration = Duration::from_millis(100);

/// One line at the bottom of a terminal that is written over and over.
#[derive(Debug)]
pub(super) struct Progress {
    enabled: bool,
    shown: bool,
    last: Option<Instant>,
}

impl Progress {
    /// A line on standard error, if that is a terminal.
    pub(super) fn new() -> Self {
        Self { enabled: stderr().is_terminal(), shown: false, last: None }
    }

    /// Shows a text, at once.
    pub(super) fn show(&mut self, text: &str) {
        if self.enabled {
            // A longer text would wrap, and then could not be written over.
            let text: String = text.chars().take(width().saturating_sub(1)).collect();
            // A terminal that takes no text has nobody to tell that to.
            let _ = write!(stderr(), "\r\x1b[2K{text}").and_then(|()| stderr().flush());
            self.shown = true;
            self.last = Some(Instant::now());
        }
    }

    /// Shows a text, unless the line has just been changed.
    pub(super) fn update(&mut self, text: impl FnOnce() -> String) {
        if self.enabled && self.last.is_none_or(|last| last.elapsed() >= STEP) {
            self.show(&text());
        }
    }

    /// Takes the line away, to print something in its place.
    pub(super) fn clear(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "\r\x1b[2K").and_then(|()| stderr().flush());
            self.shown = false;
            self.last = None;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(80)
}
