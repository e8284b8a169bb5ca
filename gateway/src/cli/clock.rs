//! The time of day, for people.

use std::time::{SystemTime, UNIX_EPOCH};

use replicator::sys::local_time;

/// The time of day here: 12:01:03.
pub(super) fn time_of_day() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (hours, minutes, seconds) = local_time::of_day(now as i64);
    format!("{hours:02}:{minutes:02}:{seconds:02}")
}

/// Date and time in UTC: 2026-03-01 12:01:03.
pub(super) fn date_and_time(at: SystemTime) -> String {
    let unix = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut year, mut day) = (1970, unix / 86_400);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let days_of = |year| if is_leap(year) { 366 } else { 365 };
    while day >= days_of(year) {
        day -= days_of(year);
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    let second = unix % 86_400;
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02}:{:02}", day + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |unix| date_and_time(UNIX_EPOCH + Duration::from_secs(unix));
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_735_689_599), "2024-12-31 23:59:59");
        assert_eq!(date(1_772_366_463), "2026-03-01 12:01:03");
    }
}
