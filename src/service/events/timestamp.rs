//! `google.protobuf.Timestamp` with its proto3 JSON form.
//!
//! The crate that generates the JSON code has its own type, which writes `+00:00` where the proto3 JSON
//! mapping requires `Z`.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

/// 0001-01-01T00:00:00Z, the first timestamp of proto3 JSON.
const SECONDS_MIN: i64 = -62_135_596_800;
/// 9999-12-31T23:59:59Z, the last.
const SECONDS_MAX: i64 = 253_402_300_799;

/// The current Unix time, ms.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Reads a Unix time in seconds, or an RFC 3339 timestamp, rounded down.
pub fn unix_s_of(text: &str) -> Option<u64> {
    text.parse().ok().or_else(|| {
        let time: prost_types::Timestamp = text.parse().ok()?;
        u64::try_from(time.seconds).ok()
    })
}

/// A point in time, as on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub struct Timestamp {
    /// Unix time, seconds.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// 0 to 999,999,999.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl Timestamp {
    /// Unix time in milliseconds, rounded down and saturated.
    pub fn unix_ms(self) -> i64 {
        self.seconds.saturating_mul(1000).saturating_add(i64::from(self.nanos / 1_000_000))
    }

    /// Whether proto3 JSON can express it.
    pub(super) fn is_valid(self) -> bool {
        (SECONDS_MIN..=SECONDS_MAX).contains(&self.seconds)
            && (0..1_000_000_000).contains(&self.nanos)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32 }
    }
}

impl Serialize for Timestamp {
    /// # Errors
    /// Outside the years 1 to 9999, or nanoseconds out of range.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !self.is_valid() {
            return Err(ser::Error::custom("timestamp out of range"));
        }
        let text = prost_types::Timestamp { seconds: self.seconds, nanos: self.nanos };
        serializer.collect_str(&text)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    /// # Errors
    /// Not an RFC 3339 timestamp.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let parsed: prost_types::Timestamp = text.parse().map_err(de::Error::custom)?;
        Ok(Self { seconds: parsed.seconds, nanos: parsed.nanos })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_utc_with_z_and_the_digits_needed() {
        for (seconds, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (1_700_000_000, 120_000_000, "2023-11-14T22:13:20.120Z"),
            (SECONDS_MIN, 0, "0001-01-01T00:00:00Z"),
            (SECONDS_MAX, 999_999_999, "9999-12-31T23:59:59.999999999Z"),
        ] {
            let timestamp = Timestamp { seconds, nanos };
            let json = serde_json::to_string(&timestamp).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), timestamp);
        }
    }

    #[test]
    fn timestamp_out_of_range_is_refused() {
        for (seconds, nanos) in [(SECONDS_MIN - 1, 0), (SECONDS_MAX + 1, 0), (0, -1), (i64::MAX, 0)]
        {
            assert!(serde_json::to_string(&Timestamp { seconds, nanos }).is_err());
        }
    }

    #[test]
    fn seconds_are_read_from_a_number_or_a_text() {
        assert_eq!(unix_s_of("1700000000"), Some(1_700_000_000));
        assert_eq!(unix_s_of("2023-11-14T22:13:20Z"), Some(1_700_000_000));
        assert_eq!(unix_s_of("2023-11-14T23:13:20.5+01:00"), Some(1_700_000_000));
        for text in ["yesterday", "-5", "1e9", "", "1969-12-31T00:00:00Z"] {
            assert_eq!(unix_s_of(text), None, "{text}");
        }
    }

    #[test]
    fn milliseconds_round_down() {
        assert_eq!(Timestamp { seconds: 1, nanos: 1_999_999 }.unix_ms(), 1001);
        assert_eq!(Timestamp { seconds: -1, nanos: 999_000_000 }.unix_ms(), -1);
        assert_eq!(Timestamp { seconds: i64::MAX, nanos: 0 }.unix_ms(), i64::MAX);
    }
}
