//! `sidecar doctor`.

use serde::Serialize;

use super::serve::{ConfigFlags, check, open_store, settings};
use super::{Output, columns, print};
use crate::doctor::{Finding, Health, examine};
use crate::store::{Open, Store};
use crate::{Class, Result};

/// Check a store, or all that a configuration names, against reality, and explain what it finds.
///
/// Of a configuration: certificates and their time, the store, etcd, the data directory and the room for a restore, the clock.
/// In the store it writes, reads and deletes small objects of its own, whose names no backup has. Exit code 12 when backups or
/// restores would fail or not be safe.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where backups are, as for the other commands. Not looked at with a configuration, which says where.
    #[arg(long, env = "SIDECAR_STORE", value_name = "URL", required_unless_present = "config")]
    store: Option<String>,
    #[command(flatten)]
    config: ConfigFlags,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// What was checked.
    subject: String,
    findings: Vec<Finding>,
}

pub(super) async fn run(args: Args, output: Output) -> Result<u8> {
    let report = if let (false, Some(url)) = (args.config.is_given(), args.store) {
        let store = Store::open(&url, Open::Existing)?;
        Report { subject: store.url().to_owned(), findings: store.examine().await? }
    } else {
        let config = args.config.read()?;
        check(&config)?;
        let (store, not_opened) = match open_store(&config) {
            Ok(store) => (store, None),
            Err(error) => (None, Some(error)),
        };
        let settings = settings(&config, store)?;
        Report { subject: args.config.place(), findings: examine(&config, &settings, not_opened.as_ref()).await }
    };
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
        rows.push(vec![health.to_owned(), finding.what.to_string(), finding.found.clone()]);
    }
    columns(&rows)
}
