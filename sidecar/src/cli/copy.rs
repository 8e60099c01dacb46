//! `sidecar copy`.

use tokio_util::sync::CancellationToken;

use super::{Output, StoreFlag, parse_time, print};
use crate::catalog::{Layout, Timeline};
use crate::copy::{Copied, Selection, copy, wait_for_final};
use crate::human::bytes;
use crate::store::{Environment, Open, Store};
use crate::{Class, Result};

/// Copy backups to another store, each verified on its way.
///
/// What is there already is left out, so a run that was cut short is run again. What is damaged is not copied: exit code 10.
/// Where the source needs other credentials than the destination, give them with SOURCE_ before the name of each variable,
/// such as SOURCE_AWS_ACCESS_KEY_ID.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
    /// Where to, as a URL like --store.
    #[arg(long, value_name = "URL")]
    to: String,
    /// Copy this timeline only.
    #[arg(long, value_name = "N")]
    timeline: Option<Timeline>,
    /// Copy what it takes to restore any moment since this time, such as 2026-11-22T18:00:00Z.
    #[arg(long, value_name = "RFC3339", value_parser = parse_time)]
    since: Option<i64>,
    /// Write this layout, whatever the source has; one timeline at a time. From gardener-v2 to ours it becomes timeline 1.
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Wait until the newest full snapshot of the source is one that was taken as the last of its cluster (`final`), but no longer
    /// than this. What there is by then is copied all the same: exit code 11 where that one is missing.
    #[arg(long, value_name = "DURATION", value_parser = proto::config::parse_duration)]
    wait_for_final: Option<std::time::Duration>,
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let source = Environment::of_process().for_source();
    let from = Store::open_in(&source, &args.store.store, Open::Existing)?;
    let to = Store::open(&args.to, Open::Create)?;
    let is_final_missing = match args.wait_for_final {
        Some(most) => !wait_for_final(&from, args.timeline, most, &stop).await?,
        None => false,
    };
    let selection = Selection { timeline: args.timeline, since_unix_ms: args.since, layout: args.layout };
    let copied = copy(&from, &to, selection, &stop).await?;
    print(output, &copied, table)?;
    if is_final_missing {
        tracing::error!(
            source = from.url(),
            "the source has no final snapshot: later changes may be missing; copy again when it has"
        );
    }
    Ok(match (copied.problems.is_empty(), is_final_missing) {
        (false, _) => Class::Corrupt.exit_code(),
        (true, true) => Class::Missing.exit_code(),
        (true, false) => 0,
    })
}

fn table(copied: &Copied) -> String {
    let mut text = format!(
        "copied {} objects, {}; {} were there already\n",
        copied.copied,
        bytes(copied.bytes),
        copied.already_there
    );
    for problem in &copied.problems {
        text.push_str(&format!("NOT COPIED: {problem}\n"));
    }
    text
}
