//! Deletes from a store what a [`plan`] says: see [`retention`](crate::retention).

use chrono::Utc;
use futures::StreamExt;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Full, ObjectName, Timeline};
use crate::retention::{Decision, Retention, emptied, plan};
use crate::store::Store;
use crate::verify::{Level, content};
use crate::{Class, Error, Result};

/// Deletions under way at once.
const AT_ONCE: usize = 16;

/// What a collection decided and did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Collected {
    /// The newest full snapshot that was read to its end and found whole; nothing newer was to go.
    pub verified: Option<String>,
    /// What was decided of each object.
    pub decisions: Vec<Decision>,
    /// Objects deleted.
    pub deleted: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Why others that were to go are still there.
    pub failed: Vec<String>,
}

/// Decides, and unless it is a dry run deletes. What fails to be deleted is left for the next run and is in the result.
pub async fn collect(
    store: &Store,
    retention: Retention,
    dry_run: bool,
    stop: &CancellationToken,
) -> Result<Collected> {
    let catalog = store.catalog().await?;
    let now_ms = Utc::now().timestamp_millis();
    let newest = fulls(&catalog).next();
    // Reading a full snapshot costs something: only when that makes a difference.
    let anything = plan(&catalog, retention, newest, now_ms).iter().any(|decision| decision.delete);
    let verified = if anything { newest_whole(store, &catalog, stop).await? } else { newest };
    let decisions = plan(&catalog, retention, verified, now_ms);
    let empty = emptied(&catalog, &decisions);
    let name = verified.filter(|_| anything).map(|(timeline, full)| full.name(timeline).to_string());
    let mut collected = Collected { verified: name, decisions, deleted: 0, freed_bytes: 0, failed: Vec::new() };
    if dry_run {
        return Ok(collected);
    }
    let going: Vec<_> = collected.decisions.iter().filter(|decision| decision.delete).cloned().collect();
    let deleting = futures::stream::iter(going)
        .take_until(stop.cancelled())
        .map(|decision| async move { (store.delete(&decision.object).await, decision) })
        .buffer_unordered(AT_ONCE);
    let mut deleting = std::pin::pin!(deleting);
    while let Some((deleted, decision)) = deleting.next().await {
        match deleted {
            Ok(()) => {
                collected.deleted += 1;
                collected.freed_bytes += decision.bytes;
            }
            Err(error) => collected.failed.push(error.to_string()),
        }
    }
    if stop.is_cancelled() {
        return Err(Error::Cancelled);
    }
    // The description goes last: while it is there, so may be objects that the next run finds.
    if collected.failed.is_empty() {
        for timeline in empty {
            if let Err(error) = store.delete(&ObjectName::Timeline { timeline }).await {
                collected.failed.push(error.to_string());
            }
        }
    }
    Ok(collected)
}

/// Full snapshots, the newest first.
fn fulls(catalog: &Catalog) -> impl Iterator<Item = (Timeline, Full)> + '_ {
    let timelines = catalog.timelines.iter().rev();
    timelines.flat_map(|(timeline, history)| history.fulls.iter().rev().map(|full| (*timeline, *full)))
}

async fn newest_whole(store: &Store, catalog: &Catalog, stop: &CancellationToken) -> Result<Option<(Timeline, Full)>> {
    for (timeline, full) in fulls(catalog) {
        match content(store, full.name(timeline), full.size, Level::Decode, stop).await {
            Ok(()) => return Ok(Some((timeline, full))),
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "a full snapshot is damaged; nothing is deleted for its sake");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
