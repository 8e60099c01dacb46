//! `sidecar compact`.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use super::{Output, StoreFlag, print};
use crate::Result;
use crate::catalog::Timeline;
use crate::compact::{Compacted, Settings, compact};
use crate::human::bytes;
use crate::store::{Open, Store};

/// Make the newest full snapshot and the deltas after it into a new full snapshot, without any etcd.
///
/// A restore from it has less to replay. It is compacted as far as etcd was, checked before it is uploaded, and read back
/// before it gets its name. Nothing is deleted: that is for `sidecar gc`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
    /// Compact this timeline rather than the newest.
    #[arg(long, value_name = "N")]
    timeline: Option<Timeline>,
    /// Compact at the last revision: of each key only its newest value stays. A sidecar that goes on from there takes a full
    /// snapshot first: nothing is left to show that its etcd is the same.
    #[arg(long)]
    discard_history: bool,
    /// Where the database is put together; as much room as it takes is needed there. What it makes is removed.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    work_dir: PathBuf,
}

pub(super) async fn run(args: Args, output: Output, stop: CancellationToken) -> Result<u8> {
    let store = Store::open(&args.store.store, Open::Existing)?;
    let settings = Settings { timeline: args.timeline, discard_history: args.discard_history, work_dir: args.work_dir };
    let compacted = compact(&store, &settings, &stop).await?;
    print(output, &compacted, |compacted| table(compacted, &store))?;
    Ok(0)
}

fn table(compacted: &Compacted, store: &Store) -> String {
    let Some(object) = &compacted.object else {
        return format!("nothing to do: a full snapshot has revision {}, the last there is", compacted.revision);
    };
    let mut text = format!(
        "full snapshot of revision {} ({}) is {}\n  {} of database, {} rows, compacted at revision {}\n",
        compacted.revision,
        bytes(compacted.bytes),
        store.location(object),
        bytes(compacted.db_size),
        compacted.rows,
        compacted.compact_revision
    );
    for lease in &compacted.leases_with_guessed_ttl {
        text.push_str(&format!("remark: the TTL of lease {lease} is not in the backup; it got 60 s\n"));
    }
    text.push_str(if compacted.hash_compared {
        "verified: the merged rows have the HashKV that etcd itself answered\n"
    } else {
        "not verified against etcd's own HashKV: the backup has none\n"
    });
    text
}
