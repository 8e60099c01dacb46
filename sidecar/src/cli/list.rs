//! `sidecar list`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Output, StoreFlag, columns, print};
use crate::catalog::{Catalog, Description, History, PREDECESSOR, Timeline};
use crate::human::{bytes, time};
use crate::store::{Open, Store};
use crate::{Class, Result};

/// Show what a store holds: chains, gaps, and what can be restored.
///
/// Lists names, and reads where each timeline comes from; nothing is decompressed.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    store: StoreFlag,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listing {
    store: String,
    timelines: Vec<TimelineListing>,
    unfinished_uploads: Vec<Foreign>,
    foreign: Vec<Foreign>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TimelineListing {
    timeline: Timeline,
    /// The one that it forks from; `None` for the first, or when nothing says so.
    parent: Option<Timeline>,
    /// Last revision shared with the parent; `None` when it is not known.
    fork_revision: Option<i64>,
    reason: Option<String>,
    /// Id of the cluster that it was begun with.
    cluster_id: Option<String>,
    created: Option<String>,
    bytes: u64,
    fulls: Vec<Object>,
    deltas: Vec<Object>,
    gaps: Vec<Range>,
    /// What can be restored: each run of revisions from a full snapshot to where its chain ends.
    restorable: Vec<Window>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    name: String,
    first_revision: i64,
    last_revision: i64,
    time: String,
    bytes: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Range {
    first_missing: i64,
    last_missing: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Window {
    first_revision: i64,
    last_revision: i64,
    first_time: String,
    last_time: String,
}

#[derive(Serialize)]
struct Foreign {
    name: String,
    bytes: u64,
}

pub(super) async fn run(args: Args, output: Output) -> Result<u8> {
    let store = Store::open(&args.store.store, Open::Existing)?;
    let catalog = store.catalog().await?;
    let mut descriptions = BTreeMap::new();
    for timeline in catalog.timelines.keys() {
        match store.description(*timeline).await {
            Ok(found) => drop(found.and_then(|found| descriptions.insert(*timeline, found))),
            Err(error) if error.class() == Class::Corrupt => tracing::warn!(%error, "a timeline's origin is not known"),
            Err(error) => return Err(error),
        }
    }
    print(output, &listing(store.url(), &catalog, &descriptions), table)?;
    Ok(0)
}

fn listing(url: &str, catalog: &Catalog, descriptions: &BTreeMap<Timeline, Description>) -> Listing {
    let timelines = catalog.timelines.iter().map(|(timeline, history)| {
        let description = descriptions.get(timeline);
        TimelineListing {
            parent: description
                .map(|description| description.parent)
                .filter(|parent| catalog.timelines.contains_key(parent)),
            fork_revision: description.map(|description| description.fork_revision).filter(|fork| *fork > 0),
            reason: description.map(|description| description.reason.clone()),
            cluster_id: description.map(|description| description.cluster_id.clone()),
            created: description.map(|description| description.created.clone()),
            ..timeline_listing(*timeline, history)
        }
    });
    Listing {
        store: url.to_owned(),
        timelines: timelines.collect(),
        unfinished_uploads: catalog
            .uploading
            .iter()
            .map(|(name, bytes)| Foreign { name: name.to_string(), bytes: *bytes })
            .collect(),
        foreign: catalog.foreign.iter().map(|(name, bytes)| Foreign { name: name.clone(), bytes: *bytes }).collect(),
    }
}

fn timeline_listing(timeline: Timeline, history: &History) -> TimelineListing {
    let full = |full: &crate::catalog::Full| Object {
        name: full.name(timeline).to_string(),
        first_revision: full.revision,
        last_revision: full.revision,
        time: time(full.unix_ms),
        bytes: full.size,
    };
    let delta = |delta: &crate::catalog::Delta| Object {
        name: delta.name(timeline).to_string(),
        first_revision: delta.first,
        last_revision: delta.last,
        time: time(delta.unix_ms),
        bytes: delta.size,
    };
    let window = |run: crate::catalog::Restorable| Window {
        first_revision: run.first,
        last_revision: run.last,
        first_time: time(run.first_unix_ms),
        last_time: time(run.last_unix_ms),
    };
    TimelineListing {
        timeline,
        parent: None,
        fork_revision: None,
        reason: None,
        cluster_id: None,
        created: None,
        bytes: history.size(),
        fulls: history.fulls.iter().map(full).collect(),
        deltas: history.deltas.iter().map(delta).collect(),
        gaps: history
            .gaps()
            .into_iter()
            .map(|gap| Range { first_missing: gap.after + 1, last_missing: gap.before - 1 })
            .collect(),
        restorable: history.restorable().into_iter().map(window).collect(),
    }
}

fn table(listing: &Listing) -> String {
    let mut text = String::new();
    let mut say = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    if listing.timelines.is_empty() {
        say(format!("{}: no backups", listing.store));
    }
    for timeline in &listing.timelines {
        let whose = if timeline.timeline == PREDECESSOR { " (gardener/etcd-backup-restore)" } else { "" };
        say(format!(
            "timeline {}{whose}: {} full, {} delta, {}",
            timeline.timeline,
            timeline.fulls.len(),
            timeline.deltas.len(),
            bytes(timeline.bytes)
        ));
        if let (Some(cluster), Some(created)) = (&timeline.cluster_id, &timeline.created) {
            say(format!("  of cluster {cluster}, begun {created}"));
        }
        if let Some(parent) = timeline.parent {
            let fork = timeline.fork_revision.map(|fork| format!(" after revision {fork}")).unwrap_or_default();
            say(format!("  forks from timeline {parent}{fork}: {}", timeline.reason.as_deref().unwrap_or_default()));
        }
        let mut rows = vec![["  KIND", "REVISIONS", "TIME", "SIZE"].map(str::to_owned).to_vec()];
        let mut objects: Vec<(&str, &Object)> = timeline.fulls.iter().map(|object| ("  full", object)).collect();
        objects.extend(timeline.deltas.iter().map(|object| ("  delta", object)));
        objects.sort_by_key(|(kind, object)| (object.last_revision, *kind));
        for (kind, object) in objects {
            let revisions = match object {
                Object { first_revision, last_revision, .. } if first_revision == last_revision => {
                    last_revision.to_string()
                }
                Object { first_revision, last_revision, .. } => format!("{first_revision}-{last_revision}"),
            };
            rows.push(vec![kind.to_owned(), revisions, object.time.clone(), bytes(object.bytes)]);
        }
        columns(&rows).lines().for_each(|line| say(line.to_owned()));
        for gap in &timeline.gaps {
            say(format!("  GAP: revisions {} to {} are in no object", gap.first_missing, gap.last_missing));
        }
        if timeline.restorable.is_empty() {
            say("  restorable: nothing, there is no full snapshot".to_owned());
        }
        for window in &timeline.restorable {
            say(format!(
                "  restorable: revisions {} to {}, {} to {}",
                window.first_revision, window.last_revision, window.first_time, window.last_time
            ));
        }
    }
    for upload in &listing.unfinished_uploads {
        say(format!("unfinished upload: {} ({})", upload.name, bytes(upload.bytes)));
    }
    for foreign in &listing.foreign {
        // Anybody may have named it, for a terminal too.
        say(format!("not ours: {} ({})", foreign.name.escape_debug(), bytes(foreign.bytes)));
    }
    text
}
