//! `sidecar gc`.

use std::time::Duration;

use clap::ValueEnum;
use tokio_util::sync::CancellationToken;

use super::{Output, StoreFlag, columns, print};
use crate::gc::{Collected, collect};
use crate::human::bytes;
use crate::retention::{Policy, Retention};
use crate::store::{Open, Store};
use crate::{Class, Error, Result};

/// Delete backups that newer ones have replaced.
///
/// The newest full snapshot is read to its end first; nothing goes that is newer than one that was found whole, nor what
/// the latest state needs. What is not a backup is never touched. Ages count from the newest backup. Exit code 10 when a
/// full snapshot is damaged.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
    /// Which full snapshots stay: the newest so many, or all of this hour, one for each hour of the day, for each of seven
    /// days, and for each of four weeks.
    #[arg(long, value_enum, default_value_t = PolicyFlag::Exponential)]
    policy: PolicyFlag,
    /// Full snapshots that stay with the policy limit-based; 7 when not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_backups: Option<u32>,
    /// Deltas younger than this stay, with what they build upon, so that any point in time since can be restored; such as 0s,
    /// 12h, 7d. Those after the newest full snapshot always stay.
    #[arg(long, default_value = "0s", value_parser = proto::config::parse_duration, value_name = "DURATION")]
    delta_retention: Duration,
    /// Print what would become of each object and delete nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PolicyFlag {
    #[value(alias = "Exponential")]
    Exponential,
    #[value(alias = "LimitBased")]
    LimitBased,
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let store = Store::open(&args.store.store, Open::Existing)?;
    let policy = match args.policy {
        PolicyFlag::Exponential if args.max_backups.is_some() => {
            return Err(Error::invalid("--max-backups goes with --policy limit-based"));
        }
        PolicyFlag::Exponential => Policy::Exponential,
        PolicyFlag::LimitBased => Policy::LimitBased { max_backups: args.max_backups.unwrap_or(7) as usize },
    };
    let retention = Retention { policy, deltas: args.delta_retention };
    let collected = collect(&store, retention, args.dry_run, &stop).await?;
    print(output, &collected, |collected| table(collected, args.dry_run))?;
    Ok(match (collected.damaged.is_empty(), collected.failed.is_empty()) {
        (false, _) => Class::Corrupt.exit_code(),
        (true, false) => 1,
        (true, true) => 0,
    })
}

fn table(collected: &Collected, dry_run: bool) -> String {
    let mut rows = vec![["", "OBJECT", "SIZE", "WHY"].map(str::to_owned).to_vec()];
    for decision in &collected.decisions {
        let verb = match (decision.delete, dry_run) {
            (true, true) => "would delete",
            (true, false) => "delete",
            (false, _) => "keep",
        };
        let object = decision.object.to_string();
        rows.push(vec![verb.to_owned(), object, bytes(decision.bytes), decision.reason.to_owned()]);
    }
    let mut text = columns(&rows);
    for verified in &collected.verified {
        text.push_str(&format!("{verified} was read and is whole\n"));
    }
    for damaged in &collected.damaged {
        text.push_str(&format!("DAMAGED: {damaged}\n"));
    }
    for failed in &collected.failed {
        text.push_str(&format!("NOT DELETED: {failed}\n"));
    }
    if !dry_run {
        text.push_str(&format!("deleted {} objects, {}\n", collected.deleted, bytes(collected.freed_bytes)));
    }
    text
}
