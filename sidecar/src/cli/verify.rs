//! `sidecar verify`.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use super::{Output, StoreFlag, print};
use crate::Result;
use crate::catalog::Timeline;
use crate::human::bytes;
use crate::store::{Open, Store};
use crate::verify::{Journal, Level, Look, Report, verify};

/// Prove that backups are whole and can be restored.
///
/// Exit code 0 when all is well, 10 when something is damaged, 11 when revisions are missing before the
/// latest state.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
    /// How thoroughly to look.
    #[arg(long, value_enum, default_value_t = Level::Decode)]
    level: Level,
    /// Look at this timeline only.
    #[arg(long, value_name = "N")]
    timeline: Option<Timeline>,
    /// Where a replay restores to; as much room as the database takes is needed there. What it makes is removed.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    work_dir: PathBuf,
    /// Note in this file what is found whole, and leave out what it has already: a run that was cut short is run again with
    /// the same file and goes on.
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let store = Store::open(&args.store.store, Open::Existing)?;
    let look = Look { timeline: args.timeline, level: args.level, work_dir: &args.work_dir };
    let mut journal = args.resume.as_deref().map(Journal::open).transpose()?.unwrap_or_default();
    let report = verify(&store, look, &mut journal, &stop).await?;
    print(output, &report, table)?;
    Ok(report.class().map_or(0, crate::Class::exit_code))
}

fn table(report: &Report) -> String {
    let mut text = format!("looked at {} objects", report.objects);
    if report.level > Level::Names {
        text.push_str(&format!(", read {}", bytes(report.bytes)));
        if report.known > 0 {
            text.push_str(&format!("; {} were found whole before", report.known));
        }
    }
    text.push('\n');
    for chain in &report.replayed {
        text.push_str(&format!(
            "timeline {}: replayed revision {} to {}, HashKV is what etcd answered at {} revisions\n",
            chain.timeline,
            chain.full_revision,
            chain.revision,
            chain.hashes.len()
        ));
    }
    for remark in &report.remarks {
        text.push_str(&format!("remark: {remark}\n"));
    }
    for problem in &report.problems {
        let kind = if problem.is_gap { "GAP" } else { "DAMAGED" };
        text.push_str(&format!("{kind}: {}: {}\n", problem.at, problem.what));
    }
    if report.problems.is_empty() {
        text.push_str("all is well\n");
    }
    text
}
