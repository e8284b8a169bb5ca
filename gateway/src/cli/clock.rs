//! The time of day, for people.

use std::time::{SystemTime, UNIX_EPOCH};

use replicator::sys::local_time;

/// The time of day here: 12:01:03.
pub(super) fn time_of_day() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (hours, minutes, seconds) = local_time::of_day(now as i64);
    format!("{hours:02}:{minutes:02}:{seconds:02}")
}
