//! Pseudo terminals in a checkpoint.

use serde::{Deserialize, Serialize};

/// A pseudo terminal, with the description of its controlling end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its number: N of /dev/pts/N.
    pub index: u32,
    /// What its controlling end was opened as.
    pub path: String,
    /// Attributes: struct termios2 as bytes.
    #[serde(with = "serde_bytes")]
    pub attributes: Vec<u8>,
    /// Rows, columns and pixels.
    pub window: [u16; 4],
    /// TIOCPKT
    pub packets: bool,
    /// TIOCSPTLCK
    pub locked: bool,
    /// TIOCEXCL
    pub exclusive: bool,
    /// Permission bits, user and group of its other end.
    pub owner: (u32, u32, u32),
    /// Whether its other end is open.
    pub other: OtherEnd,
    /// Complete lines that wait to be read at the other end, in canonical mode.
    pub lines: Vec<Line>,
    /// What else was typed: the line that is not complete; all, without canonical mode.
    pub typed: Vec<u8>,
    /// What waits to be read at the controlling end.
    pub output: Vec<u8>,
    /// Output stands still (^S).
    pub stopped: bool,
    /// The session that it controls; 0 for none.
    pub session: i32,
    /// The foreground group; 0 for one without members.
    pub foreground: i32,
    /// Processes of the session that have given it up (TIOCNOTTY).
    pub without: Vec<i32>,
}

/// A line in canonical mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its bytes, with what ended it, unless that was the end-of-file character.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// It was ended by the end-of-file character.
    pub end_of_file: bool,
}

/// The end that programs take for a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OtherEnd {
    /// It was not opened yet.
    #[default]
    New,
    /// Somebody has it.
    Open,
    /// It was open, and is no more.
    Closed,
}
