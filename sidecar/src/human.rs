//! Sizes and times as a person reads them, the same wherever they are said.

use chrono::{DateTime, SecondsFormat};

/// Such as `1.50 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}

/// Of milliseconds since 1970, such as `2026-11-22T18:00:00Z`.
pub(crate) fn time(unix_ms: i64) -> String {
    DateTime::from_timestamp_millis(unix_ms)
        .map(|time| time.to_rfc3339_opts(SecondsFormat::Secs, true))
        .unwrap_or_default()
}
