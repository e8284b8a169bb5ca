//! Quantities as a topology file writes them: `10ms`, `100MB`, `1gbit`, `0.1%`, `64..1024`.
//!
//! Every type reads from a string ([`FromStr`]), prints a string that reads back to the same
//! value ([`Display`](fmt::Display)), and has its pattern in the JSON schema.

use std::borrow::Cow;
use std::fmt;
use std::ops::{Deref, RangeInclusive};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A text that is not a quantity of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {wanted}")]
pub struct BadValue {
    /// What the file says.
    pub text: String,
    /// What would be accepted, with an example.
    pub wanted: &'static str,
}

impl BadValue {
    pub(crate) fn new(text: &str, wanted: &'static str) -> Self {
        Self { text: text.to_owned(), wanted }
    }
}

/// Reads any scalar as text and hands it to [`FromStr`], so that `150` and `"150"` are the same.
struct Scalar<T>(&'static str, std::marker::PhantomData<T>);

impl<T: FromStr<Err = BadValue>> de::Visitor<'_> for Scalar<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

pub(super) fn from_scalar<'de, T, D>(deserializer: D, wanted: &'static str) -> Result<T, D::Error>
where
    T: FromStr<Err = BadValue>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_any(Scalar(wanted, std::marker::PhantomData))
}

/// Gives a type that has `FromStr<Err = BadValue>`, `Display` and a constant `WANTED` its serde
/// and schema implementations.
macro_rules! text_type {
    ($type:ty, $name:literal, $kinds:expr, $pattern:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::topology::units::from_scalar(deserializer, Self::WANTED)
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": $kinds,
                    "pattern": $pattern,
                    "description": Self::WANTED,
                })
            }
        }
    };
}
pub(super) use text_type;

/// Splits `12.5ms` into 12.5 and `ms`.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    number.is_finite().then(|| (number, text[end..].trim()))
}

/// The largest unit of `units` that divides `value` without a rest.
fn exact_unit<'a>(value: u64, units: &[(u64, &'a str)]) -> (u64, &'a str) {
    units
        .iter()
        .find(|(size, _)| value != 0 && value.is_multiple_of(*size))
        .map_or((value, units[units.len() - 1].1), |(size, name)| (value / size, *name))
}

/// Multiplies, refusing what does not fit.
fn scaled(number: f64, unit: u64) -> Option<u64> {
    let value = (number * unit as f64).round();
    (value < u64::MAX as f64).then_some(value as u64)
}

/// A span of time, to the nanosecond: `50us`, `10ms`, `5s`, `2m`, `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Period(pub Duration);

const TIME_UNITS: [(u64, &str); 6] = [
    (3_600_000_000_000, "h"),
    (60_000_000_000, "m"),
    (1_000_000_000, "s"),
    (1_000_000, "ms"),
    (1_000, "us"),
    (1, "ns"),
];

impl Period {
    const WANTED: &str = "a time such as 50us, 10ms, 5s or 2m";

    /// Whole milliseconds, for defaults.
    pub const fn ms(ms: u64) -> Self {
        Self(Duration::from_millis(ms))
    }
}

impl Deref for Period {
    type Target = Duration;

    fn deref(&self) -> &Duration {
        &self.0
    }
}

impl FromStr for Period {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(text, Self::WANTED);
        let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
        if number == 0.0 && unit.is_empty() {
            return Ok(Self::default());
        }
        let (nanos, _) = TIME_UNITS
            .iter()
            .find(|(_, name)| *name == unit || (*name == "us" && unit == "µs"))
            .ok_or_else(bad)?;
        scaled(number, *nanos).map(|n| Self(Duration::from_nanos(n))).ok_or_else(bad)
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX);
        let (number, unit) = exact_unit(nanos, &TIME_UNITS);
        write!(f, "{number}{unit}")
    }
}

text_type!(Period, "Period", ["string", "integer"], r"^[0-9.]+ *(ns|us|µs|ms|s|m|h)$|^0$");

/// A number of bytes: `4096`, `100MB` (millions), `64MiB` (powers of two).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(pub u64);

const SIZE_UNITS: [(u64, &str); 7] = [
    (1 << 30, "GiB"),
    (1_000_000_000, "GB"),
    (1 << 20, "MiB"),
    (1_000_000, "MB"),
    (1 << 10, "KiB"),
    (1_000, "KB"),
    (1, "B"),
];

impl Size {
    const WANTED: &str = "a size such as 150, 100MB or 64MiB";
}

impl FromStr for Size {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(text, Self::WANTED);
        let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
        let (bytes, _) = SIZE_UNITS
            .iter()
            .find(|(_, name)| name.eq_ignore_ascii_case(if unit.is_empty() { "B" } else { unit }))
            .ok_or_else(bad)?;
        scaled(number, *bytes).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = exact_unit(self.0, &SIZE_UNITS);
        write!(f, "{number}{}", if unit == "B" { "" } else { unit })
    }
}

text_type!(Size, "Size", ["string", "integer"], r"^[0-9.]+ *([KMGkmg]i?)?[Bb]?$");

/// A size, or a range to draw sizes from evenly: `150`, `64..1024` (both ends included).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SizeRange {
    /// The smallest, in bytes.
    pub min: u64,
    /// The largest, in bytes.
    pub max: u64,
}

impl SizeRange {
    const WANTED: &str = "a size or a range of sizes such as 150 or 64..1KiB";

    /// The sizes as a Rust range.
    pub fn range(self) -> RangeInclusive<u64> {
        self.min..=self.max
    }
}

impl FromStr for SizeRange {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = |_| BadValue::new(text, Self::WANTED);
        let (low, high) = text.split_once("..").unwrap_or((text, text));
        let min = low.parse::<Size>().map_err(bad)?.0;
        let max = high.trim_start_matches('=').parse::<Size>().map_err(bad)?.0;
        if min <= max {
            Ok(Self { min, max })
        } else {
            Err(BadValue::new(text, "a range whose first size is the smaller one"))
        }
    }
}

impl fmt::Display for SizeRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Size(self.min))?;
        if self.max == self.min { Ok(()) } else { write!(f, "..{}", Size(self.max)) }
    }
}

text_type!(SizeRange, "SizeRange", ["string", "integer"], r"^[0-9.]+.*$");

/// A link's speed in bits per second: `500kbit`, `10mbit`, `1gbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitRate(pub u64);

const RATE_UNITS: [(u64, &str); 4] =
    [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit"), (1, "bit")];

impl BitRate {
    const WANTED: &str = "a rate above zero such as 500kbit, 10mbit or 1gbit";
}

impl FromStr for BitRate {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(text, Self::WANTED);
        let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
        let (bits, _) =
            RATE_UNITS.iter().find(|(_, name)| name.eq_ignore_ascii_case(unit)).ok_or_else(bad)?;
        scaled(number, *bits).filter(|rate| *rate > 0).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = exact_unit(self.0, &RATE_UNITS);
        write!(f, "{number}{unit}")
    }
}

text_type!(BitRate, "BitRate", ["string"], r"^[0-9.]+ *([kKmMgG]?)[bB]it$");

/// A part of a whole, from 0 to 1: `0.5`, `50%`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Ratio(f64);

impl Ratio {
    const WANTED: &str = "a part of a whole such as 0.1% or 0.5 (from 0 to 1)";

    /// A ratio, if `part` is from 0 to 1.
    pub fn new(part: f64) -> Option<Self> {
        (0.0..=1.0).contains(&part).then_some(Self(part))
    }

    /// The ratio as a number from 0 to 1.
    pub const fn get(self) -> f64 {
        self.0
    }

    pub(super) const fn tenth() -> Self {
        Self(0.1)
    }

    pub(super) const fn half() -> Self {
        Self(0.5)
    }
}

impl FromStr for Ratio {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let part = match number_and_unit(text) {
            Some((number, "%")) => number / 100.0,
            Some((number, "")) => number,
            _ => f64::NAN,
        };
        Self::new(part).ok_or_else(|| BadValue::new(text, Self::WANTED))
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

text_type!(Ratio, "Ratio", ["string", "number"], r"^[0-9.]+ *%?$");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_read_as_people_write_them() {
        assert_eq!("10ms".parse(), Ok(Period::ms(10)));
        assert_eq!("2.5 s".parse(), Ok(Period::ms(2500)));
        assert_eq!("0".parse(), Ok(Period::ms(0)));
        assert_eq!("50us".parse(), Ok(Period(Duration::from_micros(50))));
        assert_eq!("100MB".parse(), Ok(Size(100_000_000)));
        assert_eq!("64 MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("150".parse(), Ok(Size(150)));
        assert_eq!("64..1KiB".parse(), Ok(SizeRange { min: 64, max: 1024 }));
        assert_eq!("1gbit".parse(), Ok(BitRate(1_000_000_000)));
        assert_eq!("0.1%".parse::<Ratio>().unwrap().get(), 0.001);
    }

    #[test]
    fn an_error_shows_the_text_and_an_example() {
        let error = "10 parsecs".parse::<Period>().unwrap_err();
        assert_eq!(error.to_string(), "`10 parsecs` is not a time such as 50us, 10ms, 5s or 2m");
        for bad in ["", "ms", "-1ms", "1e9s", "10", "..", "99999999999999999999h"] {
            assert!(bad.parse::<Period>().is_err(), "{bad}");
        }
        assert!("120%".parse::<Ratio>().is_err());
        assert!("0mbit".parse::<BitRate>().is_err());
        assert!("9..3".parse::<SizeRange>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(n in 0u64..1 << 52) {
            let period = Period(Duration::from_nanos(n));
            prop_assert_eq!(period.to_string().parse(), Ok(period));
            prop_assert_eq!(Size(n).to_string().parse(), Ok(Size(n)));
            prop_assert_eq!(BitRate(n + 1).to_string().parse(), Ok(BitRate(n + 1)));
            let range = SizeRange { min: n / 2, max: n };
            prop_assert_eq!(range.to_string().parse(), Ok(range));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}") {
            let _ = (text.parse::<Period>(), text.parse::<SizeRange>(), text.parse::<Ratio>());
        }
    }
}
