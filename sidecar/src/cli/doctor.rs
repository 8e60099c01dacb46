//! `sidecar doctor`.

use serde::Serialize;

use super::{Output, StoreFlag, columns, print};
use crate::store::{Finding, Health, Open, Store};
use crate::{Class, Result};

/// Check that a store does what backups need of it, and explain what it finds.
///
/// Writes, reads and deletes small objects of its own, whose names no backup has. Exit code 12 when backups would not be safe
/// there.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    store: String,
    findings: Vec<Finding>,
}

pub(super) async fn run(args: Args, output: Output) -> Result<u8> {
    let store = Store::open(&args.store.store, Open::Existing)?;
    let report = Report { store: store.url().to_owned(), findings: store.examine().await? };
    print(output, &report, table)?;
    let bad = report.findings.iter().any(|finding| finding.health == Health::Bad);
    Ok(if bad { Class::Precondition.exit_code() } else { 0 })
}

fn table(report: &Report) -> String {
    let mut rows = vec![["", "WHAT", "FOUND"].map(str::to_owned).to_vec()];
    for finding in &report.findings {
        let health = match finding.health {
            Health::Good => "ok",
            Health::Remark => "remark",
            Health::Bad => "BAD",
        };
        rows.push(vec![health.to_owned(), finding.what.to_owned(), finding.found.clone()]);
    }
    columns(&rows)
}
