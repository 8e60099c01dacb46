//! `sidecar snapshot`.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use croner::Cron;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Output, StoreFlag, print};
use crate::catalog::Layout;
use crate::etcd::EtcdFlags;
use crate::human::bytes;
use crate::snapshotter::{self, DELTA_BYTES, DELTA_PERIODS, Kind, Settings, Taken, TakenDelta};
use crate::store::{Open, Store};
use crate::{Error, Result};

/// Back up a running etcd: a full snapshot when one is due, and deltas for ever.
///
/// Goes on from what the store has. SIGTERM flushes the pending delta and ends.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// Take one snapshot and exit. A delta has everything since the last backup.
    #[arg(long, value_enum, value_name = "KIND")]
    once: Option<Once>,
    /// When full snapshots are due, in cron's five fields, local time. One is also taken when there is none, when etcd
    /// compacted ahead of the deltas, and when users, roles or auth change. Empty for no schedule.
    #[arg(long, default_value = "0 */1 * * *", value_name = "CRON")]
    full_schedule: String,
    /// What to write: `gardener-v2` is for gardener/etcd-backup-restore to read, without the metadata, hashes, TTLs of leases
    /// and timelines of our own.
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// How often a delta is uploaded, when anything changed; such as 20s, 5m, 500ms.
    #[arg(long, default_value = "20s", value_parser = parse_period, value_name = "DURATION")]
    delta_period: Duration,
    /// Upload a delta early when it reaches so many bytes before compression; such as 10485760, 512KiB, 10MiB.
    #[arg(long, default_value = "10MiB", value_parser = parse_bytes, value_name = "BYTES")]
    delta_max_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Once {
    /// A full snapshot.
    Full,
    /// A full snapshot, marked as the last of a cluster that goes elsewhere.
    Final,
    /// A delta.
    Delta,
}

fn parse_period(text: &str) -> Result<Duration, String> {
    let duration = proto::config::parse_duration(text)?;
    if !DELTA_PERIODS.contains(&duration) {
        return Err("it must be from 100ms to 24h".into());
    }
    Ok(duration)
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| "it must be a number of bytes, such as 10MiB".to_owned())?;
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return Err("its unit must be B, KiB or MiB".into()),
    };
    let bytes: u64 = number.checked_mul(factor).ok_or("it is too large")?;
    if !DELTA_BYTES.contains(&bytes) {
        return Err("it must be from 1KiB to 128MiB".into());
    }
    Ok(bytes)
}

/// `None` for no schedule; `field` is where it was given.
pub(super) fn parse_schedule(field: &str, text: &str) -> Result<Option<Cron>> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let cron = Cron::from_str(text)
        .map_err(|error| Error::invalid(format!("{field} {text:?} is not a cron schedule: {error}")))?;
    cron.find_next_occurrence(&chrono::Local::now(), false)
        .map_err(|_| Error::invalid(format!("{field} {text:?} never comes")))?;
    Ok(Some(cron))
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let full_schedule = parse_schedule("--full-schedule", &args.full_schedule)?;
    let settings = Settings {
        etcd: args.etcd,
        others: Vec::new(),
        store: Store::open(&args.store.store, Open::Create)?,
        layout: args.layout,
        data_dir: None,
        full_schedule,
        delta_period: args.delta_period,
        delta_max_bytes: args.delta_max_bytes,
        full_bytes_per_second: None,
        quiet: Arc::default(),
        metrics: Arc::default(),
    };
    let kind = match args.once {
        None => {
            snapshotter::run(&settings, &stop, &mut snapshotter::nobody()).await?;
            return Ok(0);
        }
        Some(Once::Full) => Kind::Full,
        Some(Once::Final) => Kind::Final,
        Some(Once::Delta) => Kind::Delta,
    };
    let taken = snapshotter::once(&settings, kind, &stop).await?;
    let value = match &taken {
        Taken::Full(full) => json!({
            "kind": "full", "object": settings.store.location(&full.name), "revision": full.revision, "bytes": full.size, "dbBytes": full.db_size,
        }),
        Taken::Deltas(deltas) => {
            let delta = |delta: &TakenDelta| {
                let (first, last) = delta.name.revisions().unwrap_or_default();
                json!({
                    "object": settings.store.location(&delta.name), "firstRevision": first, "lastRevision": last,
                    "events": delta.events, "bytes": delta.size,
                })
            };
            json!({ "kind": "delta", "deltas": deltas.iter().map(delta).collect::<Vec<_>>() })
        }
        Taken::Nothing(revision) => json!({ "kind": "none", "revision": revision }),
    };
    print(output, &value, |_| match &taken {
        Taken::Full(full) => format!(
            "full snapshot of revision {} ({}) is {}",
            full.revision,
            bytes(full.size),
            settings.store.location(&full.name)
        ),
        Taken::Deltas(deltas) => {
            let line = |delta: &TakenDelta| {
                let place = settings.store.location(&delta.name);
                format!("delta of {} changes ({}) is {place}\n", delta.events, bytes(delta.size))
            };
            deltas.iter().map(line).collect()
        }
        Taken::Nothing(revision) => {
            format!("nothing to do: the backup has revision {revision}, which is etcd's current one")
        }
    })?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_that_never_come_are_refused() {
        assert!(parse_schedule("x", " ").is_ok_and(|schedule| schedule.is_none()));
        assert!(parse_schedule("x", "0 3 29 2 *").is_ok_and(|schedule| schedule.is_some()));
        for text in ["0 0 30 2 *", "0 0 31 4,6 *", "61 * * * *", "hourly"] {
            assert_eq!(
                parse_schedule("x", text).map_err(|error| error.class()).err(),
                Some(crate::Class::Invalid),
                "{text}"
            );
        }
    }

    #[test]
    fn durations_and_sizes_are_parsed() {
        assert_eq!(parse_period("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_period("5m"), Ok(Duration::from_secs(300)));
        assert!(
            ["", "5", "s", "5d", "5w", "99999999999999999999s", "1ms", "48h", "1.5s"]
                .iter()
                .all(|text| parse_period(text).is_err())
        );
        assert_eq!(parse_bytes("10MiB"), Ok(10 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(["", "MiB", "1", "1TiB", "999999999999999999999"].iter().all(|text| parse_bytes(text).is_err()));
    }
}
