//! Deletes from a store what a [`plan`] says: see [`retention`](crate::retention).

use chrono::Utc;
use futures::StreamExt;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Full, History, ObjectName, PREDECESSOR, Timeline};
use crate::retention::{ABANDONED_AFTER, Decision, Retention, plan};
use crate::store::Store;
use crate::verify::{Level, content};
use crate::{Class, Error, Result};

/// Deletions under way at once.
const AT_ONCE: usize = 16;

/// What a collection decided and did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Collected {
    /// The newest full snapshot, ours and the predecessor's, that was read to its end and found whole: nothing newer was to
    /// go. None when nothing was to go anyway.
    pub verified: Vec<String>,
    /// What is wrong with newer ones.
    pub damaged: Vec<String>,
    /// What was decided of each object.
    pub decisions: Vec<Decision>,
    /// Objects deleted.
    pub deleted: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Why others that were to go are still there.
    pub failed: Vec<String>,
    /// Each that was to go, and whether it did.
    #[serde(skip)]
    pub ended: Vec<(ObjectName, bool)>,
}

/// Decides, and unless it is a dry run deletes. What fails to be deleted is left for the next run and is in the result.
#[tracing::instrument(skip_all)]
pub async fn collect(
    store: &Store,
    retention: Retention,
    dry_run: bool,
    stop: &CancellationToken,
) -> Result<Collected> {
    let catalog = store.catalog().await?;
    store.remove_abandoned_files(ABANDONED_AFTER).await;
    let mut collected = Collected {
        verified: Vec::new(),
        damaged: Vec::new(),
        decisions: Vec::new(),
        deleted: 0,
        freed_bytes: 0,
        failed: Vec::new(),
        ended: Vec::new(),
    };
    // What the predecessor wrote is neither older nor newer than what we did: somebody may have gone back to it.
    let (theirs, ours) = catalog.timelines.into_iter().partition(|(timeline, _)| *timeline == PREDECESSOR);
    let theirs = Catalog { timelines: theirs, ..Catalog::default() };
    let ours = Catalog { timelines: ours, uploading: catalog.uploading, foreign: Vec::new() };
    for catalog in [theirs, ours] {
        decide(store, &catalog, retention, stop, &mut collected).await?;
    }
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
        collected.ended.push((decision.object, deleted.is_ok()));
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
    Ok(collected)
}

async fn decide(
    store: &Store,
    catalog: &Catalog,
    retention: Retention,
    stop: &CancellationToken,
    collected: &mut Collected,
) -> Result<()> {
    // Ages are those that the backups had when the last of them was taken: a clock that is ahead, or a cluster that sleeps,
    // must not make all of them old.
    let last_ms = catalog.timelines.values().flat_map(History::times).max().unwrap_or(i64::MAX);
    let now_ms = Utc::now().timestamp_millis().min(last_ms);
    let newest = fulls(catalog).next();
    // Reading a full snapshot costs something: only when that makes a difference.
    let anything = plan(catalog, retention, newest, now_ms).iter().any(|decision| decision.delete);
    let verified = if anything { newest_whole(store, catalog, stop, &mut collected.damaged).await? } else { newest };
    let name = verified.filter(|_| anything).map(|(timeline, full)| full.name(timeline).to_string());
    collected.verified.extend(name);
    collected.decisions.extend(plan(catalog, retention, verified, now_ms));
    Ok(())
}

/// Full snapshots, the newest first.
fn fulls(catalog: &Catalog) -> impl Iterator<Item = (Timeline, Full)> + '_ {
    let timelines = catalog.timelines.iter().rev();
    timelines.flat_map(|(timeline, history)| history.fulls.iter().rev().map(|full| (*timeline, *full)))
}

async fn newest_whole(
    store: &Store,
    catalog: &Catalog,
    stop: &CancellationToken,
    damaged: &mut Vec<String>,
) -> Result<Option<(Timeline, Full)>> {
    for (timeline, full) in fulls(catalog) {
        match content(store, full.name(timeline), full.size, Level::Decode, stop).await {
            Ok(_) => return Ok(Some((timeline, full))),
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "a full snapshot is damaged; nothing is deleted for its sake");
                damaged.push(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
