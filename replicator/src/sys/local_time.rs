//! The time of day in the zone of this machine: localtime_r(3).

/// Hours, minutes and seconds of a Unix time here; in UTC if the zone cannot be told.
pub fn of_day(unix_seconds: i64) -> (u8, u8, u8) {
    // SAFETY: tm is plain old data, for which all zeroes are valid.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: the call reads one time_t and writes one struct tm, both live here.
    if unsafe { libc::localtime_r(&unix_seconds, &mut parts) }.is_null() {
        let day = unix_seconds.rem_euclid(86_400);
        return ((day / 3600) as u8, (day / 60 % 60) as u8, (day % 60) as u8);
    }
    (parts.tm_hour as u8, parts.tm_min as u8, parts.tm_sec as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_do_not_depend_on_the_zone() {
        let (hours, minutes, seconds) = of_day(1_700_000_042);
        assert_eq!(seconds, 2);
        assert!(hours < 24 && minutes < 60);
    }
}
