//! Percentiles, and numbers as people read them.

use serde::Serialize;

/// What matters of many measurements.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Spread<T> {
    /// Median.
    pub(super) p50: T,
    /// 99 %.
    pub(super) p99: T,
    /// The largest.
    pub(super) max: T,
}

impl<T: Copy + Default + PartialOrd> Spread<T> {
    /// The spread of the values; all zero if there are none.
    pub(super) fn of(values: impl IntoIterator<Item = T>) -> Self {
        let values = sorted(values);
        let at = |percent| percentile(&values, percent);
        Self { p50: at(50.0), p99: at(99.0), max: at(100.0) }
    }
}

/// The median; zero if there are no values.
pub(super) fn median<T: Copy + Default + PartialOrd>(values: impl IntoIterator<Item = T>) -> T {
    percentile(&sorted(values), 50.0)
}

fn sorted<T: PartialOrd>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    values
}

/// The smallest value that at least `percent` of the sorted values do not exceed.
fn percentile<T: Copy + Default>(sorted: &[T], percent: f64) -> T {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

/// A count with its thousands set apart: 48,210.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time in microseconds in the unit that reads best.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        100_000..10_000_000 => format!("{:.0} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// A time in milliseconds in the unit that reads best.
pub(super) fn millis(ms: f64) -> String {
    micros((ms.max(0.0) * 1e3) as u64)
}

/// A number of bytes in the unit that reads best.
pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.0} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_percentiles() {
        let spread = Spread::of((1..=200u64).rev());
        assert_eq!(spread, Spread { p50: 100, p99: 198, max: 200 });
        assert_eq!(Spread::of([7.5]), Spread { p50: 7.5, p99: 7.5, max: 7.5 });
        assert_eq!(Spread::<u64>::of([]), Spread::default());
        assert_eq!(median([3, 1, 2u64]), 2);
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
        assert_eq!(micros(480), "480 us");
        assert_eq!(micros(6_150), "6.2 ms");
        assert_eq!(millis(141.2), "141 ms");
        assert_eq!(micros(12_300_000), "12.3 s");
        assert_eq!(bytes(23_400), "23 kB");
    }

    proptest! {
        #[test]
        fn a_percentile_has_its_share_of_values_at_or_below_it(
            values in prop::collection::vec(0u64..1000, 1..300),
        ) {
            let spread = Spread::of(values.iter().copied());
            let share = |limit: u64| {
                values.iter().filter(|v| **v <= limit).count() as f64 / values.len() as f64
            };
            prop_assert!(values.contains(&spread.p50) && values.contains(&spread.p99));
            prop_assert!(share(spread.p50) >= 0.5 && share(spread.p99) >= 0.99);
            prop_assert_eq!(Some(&spread.max), values.iter().max());
            let below = values.iter().filter(|v| **v < spread.p99).count() as f64;
            prop_assert!(below < 0.99 * values.len() as f64);
        }
    }
}
