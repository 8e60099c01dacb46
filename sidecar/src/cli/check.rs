//! `sidecar check`.

use std::path::PathBuf;

use etcd_format::datadir::{self, Severity, Verdict, Verify, WantHash};
use etcd_format::mvcc::HashRules;
use serde_json::{Value, json};

use super::{Output, print};
use crate::human::bytes;
use crate::{Class, Error, Result};

/// Check a stopped member's data directory for corruption.
///
/// Reads everything and changes nothing: the log and its checksums, raft snapshots, every page of the database, every row's
/// place in its key's history, leases, and whether all of these agree. bbolt keeps no checksums, so a byte changed within a
/// value shows in HashKV alone: compare that with another member's.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The data directory, the one that has `member` in it.
    #[arg(long, env = "ETCD_DATA_DIR", value_name = "DIR")]
    data_dir: PathBuf,
    /// Version of etcd whose rules HashKV follows, such as 3.5.12; releases before 3.4.34 and 3.5.16 differ.
    #[arg(long, default_value = "3.7", value_name = "VERSION")]
    etcd_version: String,
}

pub(super) async fn run(args: Args, output: Output) -> Result<u8> {
    datadir::Minor::parse(&args.etcd_version).map_err(Error::format("--etcd-version"))?;
    let options = Verify { hash: Some(WantHash::Current(HashRules::of(&args.etcd_version))), compaction: None };
    let dir = args.data_dir.clone();
    let verdict = tokio::task::spawn_blocking(move || datadir::verify(&dir, &options))
        .await
        .map_err(|error| Error::task(&error))?;
    let name = args.data_dir.display().to_string();
    let verdict = verdict.map_err(Error::format(format!("check {name}")))?;
    let verdict = verdict.ok_or_else(|| {
        let what = if args.data_dir.join("snap").is_dir() {
            "it looks like the member directory itself; give the one above it"
        } else {
            "no etcd has run on it"
        };
        Error::missing(format!("{name} has no member directory: {what}"))
    })?;
    print(output, &value(&verdict), |_| table(&name, &verdict))?;
    Ok(if verdict.severity() == Some(Severity::Corrupt) { Class::Corrupt.exit_code() } else { 0 })
}

fn result(verdict: &Verdict) -> &'static str {
    match verdict.severity() {
        Some(Severity::Corrupt) => "corrupt",
        Some(Severity::Repairable) => "repairable",
        Some(Severity::Remark) | None => "intact",
    }
}

fn value(verdict: &Verdict) -> Value {
    let findings: Vec<Value> = verdict
        .findings
        .iter()
        .map(|finding| {
            json!({
                "severity": finding.severity.to_string(), "what": finding.what,
                "file": finding.path.display().to_string(), "offset": finding.offset,
            })
        })
        .collect();
    let summary = verdict.summary.as_ref().map(|summary| {
        json!({
            "revision": summary.revision, "compactRevision": summary.compact_revision, "rows": summary.rows, "keys": summary.live_keys,
            "leases": summary.leases, "consistentIndex": summary.consistent_index, "dbSize": summary.db_size, "dbSizeInUse": summary.db_size_in_use,
            "schema": summary.schema.map(|minor| minor.to_string()), "hashKv": summary.hash.map(|hash| hash.hash),
        })
    });
    json!({
        "result": result(verdict),
        "findings": findings,
        "summary": summary,
        "memberId": verdict.member.map(|(member, _)| member.to_string()),
        "clusterId": verdict.member.map(|(_, cluster)| cluster.to_string()),
        "raftTerm": verdict.raft.map(|(term, _)| term),
        "raftCommit": verdict.raft.map(|(_, commit)| commit),
    })
}

fn table(name: &str, verdict: &Verdict) -> String {
    let mut text = format!("{name}: {}\n", result(verdict));
    for finding in &verdict.findings {
        let offset = finding.offset.map(|offset| format!(" at offset {offset}")).unwrap_or_default();
        text.push_str(&format!(
            "  {}: {}\n    in {}{offset}\n",
            finding.severity,
            finding.what,
            finding.path.display()
        ));
    }
    if let Some((member, cluster)) = verdict.member {
        text.push_str(&format!("  member {member} of cluster {cluster}\n"));
    }
    if let Some(summary) = &verdict.summary {
        text.push_str(&format!(
            "  revision {}, compacted at {}; {} keys in {} rows, {} leases; db {} ({} in use)\n",
            summary.revision,
            summary.compact_revision,
            summary.live_keys,
            summary.rows,
            summary.leases,
            bytes(summary.db_size),
            bytes(summary.db_size_in_use)
        ));
        if let Some(hash) = summary.hash {
            text.push_str(&format!("  HashKV {} at revision {}\n", hash.hash, hash.revision));
        }
    }
    text
}
