//! Whether one cluster's backups may follow another's in the same store.
//!
//! A prefix given by mistake, or another volume in the place of ours, has the backups of a cluster that we know nothing of. A
//! timeline of ours would be the newest there, and whoever restores that cluster would get ours. So a cluster has to show that it
//! comes from what a store has: by a timeline that it has begun there, or by a note that a restore left in the data directory,
//! or the joining of a cluster that was restored.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use chrono::Utc;
use etcd_format::datadir::Note;
use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, History, PREDECESSOR, Timeline};
use crate::restore::Origin;
use crate::store::Store;
use crate::{Error, Result};

/// A timeline that has begun and got nothing for so long has been given up.
const BEGINS_WITHIN_MS: i64 = 3_600_000;

/// Lies in the data directory of a member that has joined a cluster, for the time until that has backups of its own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Joined {
    cluster_id: u64,
    /// The timelines that the store had then, with the cluster that each is of, hexadecimal.
    timelines: BTreeMap<Timeline, String>,
}

impl Joined {
    fn of(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&Note::Joined.read(dir)?).ok()
    }

    /// What the store does not tell is left out: it is asked for the sake of a start that there may never be.
    pub(crate) async fn now(cluster_id: u64, store: &Store) -> Self {
        let mut timelines = BTreeMap::new();
        let told = async {
            for (timeline, history) in store.catalog().await?.timelines.iter().filter(|(of, _)| **of != PREDECESSOR) {
                if let Some(theirs) = store.whose(*timeline, history).await? {
                    timelines.insert(*timeline, format!("{theirs:x}"));
                }
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = told.await {
            tracing::warn!(%error, "the member does not take down all that the store had when it joined");
        }
        Self { cluster_id, timelines }
    }

    /// Whether that cluster lived when those were among the backups: then it is not theirs, and not older than they are.
    fn knows(&self, cluster_id: u64, timeline: Timeline, backups_of: Option<u64>) -> bool {
        let theirs = backups_of.map(|id| format!("{id:x}"));
        self.cluster_id == cluster_id && theirs.is_some() && self.timelines.get(&timeline) == theirs.as_ref()
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let json =
            serde_json::to_vec(self).map_err(|error| Error::Bug { what: format!("describe a join: {error}") })?;
        // As etcd makes it.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(Error::io("create", dir.display()))?;
        Note::Joined.write(dir, &json).map_err(Error::format("say what was joined"))
    }
}

/// Whether the member was restored, or joined, when this timeline, of that cluster, was there; where neither says of which, it may
/// have been. What is sound is kept for that.
pub(crate) fn may_follow(data_dir: &Path, ours: u64, timeline: Timeline, theirs: Option<u64>) -> bool {
    let is_ours = theirs.is_none_or(|theirs| theirs == ours);
    Origin::of(data_dir).is_some_and(|origin| match origin.timeline {
        None => !is_ours,
        Some(from) => from == timeline && origin.is_of(theirs) || origin.passed_over(timeline, theirs),
    }) || Joined::of(data_dir).is_some_and(|joined| joined.knows(ours, timeline, theirs))
}

/// Whether a note proves it: numbers of timelines are the same in every store, so they prove nothing by themselves. `has` tells
/// whether the timeline has an object.
fn follows(data_dir: &Path, ours: u64, timeline: Timeline, theirs: Option<u64>, has: impl Fn(&str) -> bool) -> bool {
    let is_from = |origin: Origin| match (origin.cluster(), theirs) {
        (Some(of), Some(theirs)) => of == theirs && origin.timeline.is_none_or(|from| from == timeline),
        _ => origin.timeline == Some(timeline) && origin.object.as_deref().is_some_and(&has),
    };
    Origin::of(data_dir).is_some_and(|origin| origin.passed_over(timeline, theirs) || is_from(origin))
        || Joined::of(data_dir).is_some_and(|joined| joined.knows(ours, timeline, theirs))
}

/// Whether backups of the cluster `ours` may follow what the store has, though its newest are another's: what could be restored
/// last must be its own, or what it comes from. Newer timelines that were only begun stand in nobody's way.
pub(crate) async fn is_kin(store: &Store, catalog: &Catalog, ours: u64, data_dir: &Path) -> Result<bool> {
    for (timeline, history) in catalog.timelines.iter().rev() {
        let theirs = store.whose(*timeline, history).await?;
        if theirs == Some(ours) {
            return Ok(true);
        }
        if !history.fulls.is_empty() {
            let has = |object: &str| history.fulls.iter().any(|full| full.name(*timeline).to_string() == object);
            return Ok(follows(data_dir, ours, *timeline, theirs, has));
        }
    }
    // Nothing can be restored: another cluster's first full snapshot may be on its way.
    let mut times: Vec<_> = catalog.uploading.iter().map(|(name, _)| name.unix_ms()).collect();
    times.extend(catalog.timelines.values().flat_map(History::times));
    for timeline in catalog.timelines.keys() {
        // No store lists what is still on its way.
        let created = store.description(*timeline).await?.and_then(|described| described.created_unix_ms());
        times.extend(created);
    }
    let newest_ms = times.into_iter().max();
    let since_ms = newest_ms.map(|newest_ms| Utc::now().timestamp_millis().saturating_sub(newest_ms));
    Ok(since_ms.is_none_or(|since_ms| since_ms > BEGINS_WITHIN_MS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Description;

    const OURS: u64 = 7;
    const THEIRS: u64 = 8;

    fn note(dir: &Path, origin: &Origin) -> Result<()> {
        let json = serde_json::to_vec(origin).unwrap_or_default();
        std::fs::write(dir.join("member/origin.json"), json).map_err(Error::io("write", dir.display()))
    }

    #[tokio::test]
    async fn what_another_has_just_begun_is_not_ours_to_follow() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("make", "a directory"))?;
        let store = Store::from_parts(std::sync::Arc::new(object_store::memory::InMemory::new()), "p");
        for (timeline, created, is_kin_then) in
            [(1, Utc::now() - chrono::TimeDelta::hours(2), true), (2, Utc::now(), false)]
        {
            store
                .put_description(&Description {
                    layout: 1,
                    timeline,
                    parent: 0,
                    fork_revision: 0,
                    reason: String::new(),
                    cluster_id: format!("{THEIRS:x}"),
                    created: created.to_rfc3339(),
                })
                .await?;
            assert_eq!(is_kin(&store, &store.catalog().await?, OURS, dir.path()).await?, is_kin_then, "{created}");
        }
        Ok(())
    }

    #[test]
    fn only_what_leads_to_the_backups_is_followed_by_ours() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("make", "a directory"))?;
        let dir = dir.path();
        std::fs::create_dir_all(dir.join("member")).map_err(Error::io("make", dir.display()))?;
        let object = "t00000002/full/00000000000000000005-1700000000000.db.zst";
        let has = |timeline, theirs| follows(dir, OURS, timeline, theirs, |name| name == object);
        assert!(!has(2, Some(THEIRS)));

        let joined = |timeline, of: u64| {
            let timelines = BTreeMap::from([(timeline, format!("{of:x}"))]);
            Joined { cluster_id: OURS, timelines }.write(dir)
        };
        joined(2, THEIRS)?;
        assert!(has(2, Some(THEIRS)) && !has(3, Some(THEIRS)) && !has(2, Some(9)));
        assert!(!follows(dir, 9, 2, Some(THEIRS), |_| true), "it is of another that joined");
        joined(9, 9)?;

        let restored = |timeline, of: u64| Origin {
            timeline,
            cluster_id: format!("{of:x}"),
            revision: 5,
            object: timeline.map(|_| object.to_owned()),
            passed_over: None,
        };
        note(dir, &restored(Some(2), THEIRS))?;
        assert!(has(2, Some(THEIRS)) && !has(2, Some(9)) && !has(3, Some(THEIRS)));
        // Somebody chose it though there was a newer one.
        note(dir, &Origin { passed_over: Some((4, "9".into())), ..restored(Some(2), THEIRS) })?;
        assert!(has(4, Some(9)) && !has(4, Some(10)) && may_follow(dir, OURS, 4, Some(9)));
        // Where nothing says of which cluster they are, such as the predecessor's, the object must be there.
        note(dir, &restored(Some(2), 0))?;
        assert!(has(2, None) && !follows(dir, OURS, 2, None, |_| false) && may_follow(dir, OURS, 2, None));
        // Of a file, when its log said of which cluster it was.
        note(dir, &restored(None, THEIRS))?;
        assert!(has(3, Some(THEIRS)) && !has(3, Some(9)));
        note(dir, &restored(None, 0))?;
        assert!(!has(3, Some(THEIRS)) && may_follow(dir, OURS, 3, Some(THEIRS)));
        Ok(())
    }
}
