//! Whether a live cluster continues the history that the store has.

use proto::backup::ObjectMeta;

use super::comparison::{live_revisions, revisions};
use crate::catalog::{Catalog, Delta, History, PREDECESSOR, Timeline};
use crate::etcd::{Etcd, Status};
use crate::store::Store;
use crate::{Class, Result};

/// Damaged objects that are passed over before the search is given up.
const MOST_LOOKS: usize = 16;

/// The newest object of the newest timeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// The timeline.
    pub timeline: Timeline,
    /// Metadata of its newest full or delta that can be read; `None` when it has none yet.
    pub newest: Option<ObjectMeta>,
    /// Id of the cluster that the timeline was begun with, where that is known.
    pub begun_with: Option<u64>,
    /// A newer one cannot be read, so nothing should be built upon the chain.
    pub newer_is_damaged: bool,
}

impl Seen {
    /// The cluster that the timeline is of, when that is another; 0 where nothing says of which it is.
    pub fn foreign_cluster(&self, cluster_id: u64) -> Option<u64> {
        // What it was begun with counts before its newest object: one of ours that went astray does not make it ours.
        let newest = self.newest.as_ref().map(|newest| newest.cluster_id);
        self.begun_with.into_iter().chain(newest).find(|theirs| *theirs != cluster_id)
    }
}

/// Where backups of this cluster go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Into the timeline there is.
    Continue {
        /// Which.
        timeline: Timeline,
    },
    /// Into a new one.
    Begin {
        /// Its number.
        timeline: Timeline,
        /// The one before it, 0 for none.
        parent: Timeline,
        /// Why.
        reason: String,
    },
}

/// Decides by what never goes back in the life of a cluster: its id, its term, its revision, and the distance between raft
/// index and revision, which grows because every revision takes an entry of the log and not every entry makes a revision.
/// A restore starts the log anew, so the distance falls.
///
/// `live` must have been asked after a linearizable read: a member that lags looks like one that was restored.
pub fn decide(seen: Option<&Seen>, live: &Status) -> Decision {
    let Some(seen) = seen else {
        return Decision::Begin { timeline: 1, parent: 0, reason: "first backup into this store".into() };
    };
    let begin = |reason| Decision::Begin { timeline: seen.timeline.saturating_add(1), parent: seen.timeline, reason };
    if let Some(theirs) = seen.foreign_cluster(live.cluster_id) {
        let ours = live.cluster_id;
        return begin(match theirs {
            0 => format!("nothing says whether the backups in the store are of cluster {ours:x}"),
            _ => format!("cluster {ours:x} is not the cluster {theirs:x} whose backups the store has"),
        });
    }
    let Some(newest) = &seen.newest else { return Decision::Continue { timeline: seen.timeline } };
    if live.revision < newest.last_revision {
        return begin(format!(
            "etcd is at revision {}, the backup at {}: this etcd was restored from an earlier point",
            live.revision, newest.last_revision
        ));
    }
    let distance = |index: u64, revision: i64| i128::from(index) - i128::from(revision);
    let log_is_younger = distance(live.raft_index, live.revision) < distance(newest.raft_index, newest.last_revision);
    if log_is_younger || live.raft_term < newest.raft_term {
        return begin(format!(
            "raft log of this etcd (term {}, index {}) is not the one that was backed up (term {}, index {}): this etcd was restored",
            live.raft_term, live.raft_index, newest.raft_term, newest.raft_index
        ));
    }
    Decision::Continue { timeline: seen.timeline }
}

/// Reads what [`decide`] needs from the store: the metadata of the newest object that can be read.
pub async fn look(store: &Store, catalog: &Catalog) -> Result<Option<Seen>> {
    let Some((timeline, history)) = catalog.newest().filter(|(timeline, _)| *timeline != PREDECESSOR) else {
        return Ok(None);
    };
    let fulls = history.fulls.iter().map(|full| (full.revision, full.unix_ms, full.name(timeline), full.size));
    let deltas = history.deltas.iter().map(|delta| (delta.last, delta.unix_ms, delta.name(timeline), delta.size));
    let mut objects: Vec<_> = fulls.chain(deltas).collect();
    objects.sort_unstable_by_key(|(last, unix_ms, ..)| std::cmp::Reverse((*last, *unix_ms)));
    let mut seen = Seen { timeline, newest: None, begun_with: None, newer_is_damaged: false };
    seen.begun_with = store.begun_with(timeline).await?;
    for (_, _, name, size) in objects.into_iter().take(MOST_LOOKS) {
        match store.meta(&name, size).await {
            Ok(meta) => {
                seen.newest = meta;
                break;
            }
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "a backup object is damaged; look at the one before it");
                seen.newer_is_damaged = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(seen))
}

/// The last revision that the live etcd shares with a timeline; 0 when that cannot be known, because etcd has compacted it or
/// because the timeline has neither deltas there nor a full snapshot with a hash.
pub async fn fork_revision(
    store: &Store,
    etcd: &mut Etcd,
    timeline: Timeline,
    history: &History,
    live: i64,
) -> Result<i64> {
    let compacted = etcd.compact_revision(0).await?;
    let whose = store.begun_with(timeline).await?;
    let comparable = |delta: &&Delta| delta.first > compacted && delta.first <= live;
    let deltas: Vec<Delta> = history.deltas.iter().filter(comparable).copied().collect();
    // Two histories agree up to where they part and never after.
    let (mut agree, mut differ, mut fork) = (0, deltas.len(), 0);
    while agree < differ {
        let middle = agree.midpoint(differ);
        let Some(delta) = deltas.get(middle) else { break };
        let shared = shared_with(store, etcd, timeline, (delta, whose), live).await?;
        fork = shared.unwrap_or_default().max(fork);
        if shared == Some(delta.last) {
            agree = middle + 1;
        } else {
            differ = middle;
        }
    }
    let upto = deltas.get(differ).map_or(live, |delta| delta.last.min(live));
    Ok(fork.max(shared_full(store, etcd, timeline, history, (fork, upto, compacted)).await))
}

/// The newest full snapshot of these revisions whose rows the live etcd has, by their hash; 0 when there is none.
async fn shared_full(
    store: &Store,
    etcd: &mut Etcd,
    timeline: Timeline,
    history: &History,
    (after, upto, compacted): (i64, i64, i64),
) -> i64 {
    let fulls = history.fulls.iter().rev().filter(|full| full.revision > after && full.revision <= upto);
    for full in fulls.take(MOST_LOOKS) {
        // One that cannot be read tells nothing.
        let meta = store.meta(&full.name(timeline), full.size).await.ok().flatten();
        let recorded = meta.and_then(|meta| meta.hash_kv);
        // Each answer costs etcd a walk over its database.
        let Some(recorded) = recorded.filter(|recorded| recorded.compact_revision.max(0) == compacted) else {
            continue;
        };
        if let Ok(live) = etcd.hash_kv(recorded.revision).await
            && (live.hash, live.compact_revision) == (recorded.hash, compacted)
        {
            return full.revision;
        }
    }
    0
}

/// The last revision of a delta up to which the live etcd has the same.
async fn shared_with(
    store: &Store,
    etcd: &Etcd,
    timeline: Timeline,
    (delta, whose): (&Delta, Option<u64>),
    live: i64,
) -> Result<Option<i64>> {
    let name = delta.name(timeline);
    if let (Some(whose), Some(meta)) = (whose, store.meta(&name, delta.size).await?)
        && whose != meta.cluster_id
    {
        // It went astray.
        return Ok(None);
    }
    let expected = revisions(store, &name, delta, i64::MAX).await?;
    let found = live_revisions(etcd, delta.first, delta.last.min(live)).await?;
    let same = expected.iter().take_while(|(revision, digest)| found.get(revision) == Some(digest));
    Ok(same.last().map(|(revision, _)| *revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(cluster_id: u64, revision: i64, raft_index: u64) -> Status {
        Status {
            role: crate::etcd::Role::Leader,
            cluster_id,
            revision,
            version: "3.6.0".into(),
            raft_term: 2,
            raft_index,
            raft_applied_index: raft_index,
            ..Status::default()
        }
    }

    fn seen(last_revision: i64, raft_index: u64) -> Seen {
        Seen {
            timeline: 3,
            newest: Some(ObjectMeta { cluster_id: 7, last_revision, raft_index, ..ObjectMeta::default() }),
            begun_with: None,
            newer_is_damaged: false,
        }
    }

    fn begins(seen: &Seen, live: &Status) -> bool {
        matches!(decide(Some(seen), live), Decision::Begin { timeline: 4, parent: 3, .. })
    }

    #[test]
    fn the_same_cluster_continues() {
        for status in [live(7, 100, 150), live(7, 200, 250), live(7, 200, 900)] {
            assert_eq!(decide(Some(&seen(100, 150)), &status), Decision::Continue { timeline: 3 });
        }
    }

    #[test]
    fn another_cluster_and_a_restored_one_begin_anew() {
        assert!(begins(&seen(100, 150), &live(8, 200, 300)));
        assert!(begins(&seen(100, 150), &live(7, 99, 150)));
        // Restored to the very revision of the backup, then written to until both numbers are past those recorded.
        assert!(begins(&seen(100, 150), &live(7, 100, 4)));
        assert!(begins(&seen(100, 150), &live(7, 500, 404)));
    }

    #[test]
    fn an_empty_timeline_is_only_for_the_cluster_it_was_begun_with() {
        let seen = |begun_with| Seen { newest: None, begun_with: Some(begun_with), ..seen(0, 0) };
        assert_eq!(decide(Some(&seen(7)), &live(7, 1, 1)), Decision::Continue { timeline: 3 });
        assert!(begins(&seen(8), &live(7, 1, 1)));
    }

    #[test]
    fn what_went_astray_into_anothers_timeline_does_not_make_it_ours() {
        let astray = Seen { begun_with: Some(8), ..seen(100, 150) };
        assert!(begins(&astray, &live(7, 100, 150)));
        assert!(!begins(&Seen { begun_with: Some(7), ..astray }, &live(7, 100, 150)));
    }

    #[test]
    fn an_empty_store_begins_the_first_timeline() {
        assert!(matches!(decide(None, &live(7, 1, 1)), Decision::Begin { timeline: 1, parent: 0, .. }));
    }
}
