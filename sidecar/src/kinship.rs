//! Whether one cluster's backups may follow another's in the same store.
//!
//! A prefix given by mistake, or another volume in the place of ours, has the backups of a cluster that we know nothing of. A
//! timeline of ours would be the newest there, and whoever restores that cluster would get ours. So a cluster has to show that it
//! comes from what a store has: by a timeline that it has begun there, or by a note that a restore left in the data directory,
//! or the joining of a cluster that was restored.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use etcd_format::datadir::Note;
use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, PREDECESSOR, Timeline};
use crate::restore::Origin;
use crate::store::Store;
use crate::{Class, Error, Result};

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

    /// `None` when the store does not tell: it is asked for the sake of a start that there may never be.
    pub(crate) async fn now(cluster_id: u64, store: &Store) -> Option<Self> {
        let catalog = store.catalog().await.ok()?;
        let mut timelines = BTreeMap::new();
        for timeline in catalog.timelines.keys().filter(|timeline| **timeline != PREDECESSOR) {
            let described = store.description(*timeline).await.ok()??;
            timelines.insert(*timeline, described.cluster_id);
        }
        Some(Self { cluster_id, timelines })
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

/// Whether a note in the data directory says that this timeline, of that cluster, was there when the member of `ours` was
/// restored or joined.
pub(crate) fn is_noted(data_dir: &Path, ours: u64, timeline: Timeline, theirs: Option<u64>) -> bool {
    let is_of_theirs = theirs.is_none_or(|theirs| theirs == ours);
    Origin::of(data_dir).is_some_and(|origin| match origin.timeline {
        None => !is_of_theirs,
        Some(from) => from == timeline && origin.is_of(theirs),
    }) || Joined::of(data_dir).is_some_and(|joined| joined.knows(ours, timeline, theirs))
}

/// Whether backups of the cluster `ours` may follow what the store has, though its newest are another's.
pub(crate) async fn is_kin(store: &Store, catalog: &Catalog, ours: u64, data_dir: &Path) -> Result<bool> {
    if catalog.timelines.values().all(|history| history.fulls.is_empty() && history.deltas.is_empty()) {
        return Ok(true);
    }
    for timeline in catalog.timelines.keys().rev() {
        let theirs = begun_with(store, *timeline).await?;
        if theirs == Some(ours) || is_noted(data_dir, ours, *timeline, theirs) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The cluster that a timeline was begun with, where its description can be read.
pub(crate) async fn begun_with(store: &Store, timeline: Timeline) -> Result<Option<u64>> {
    match store.cluster_of(timeline).await {
        Err(error) if error.class() == Class::Corrupt => Ok(None),
        cluster_id => cluster_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u64 = 7;
    const THEIRS: u64 = 8;

    #[test]
    fn only_what_leads_to_the_backups_makes_kin() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("make", "a directory"))?;
        let dir = dir.path();
        std::fs::create_dir_all(dir.join("member")).map_err(Error::io("make", dir.display()))?;
        assert!(!is_noted(dir, OURS, 2, Some(THEIRS)));
        let joined = |timeline, of: u64| {
            let timelines = BTreeMap::from([(timeline, format!("{of:x}"))]);
            Joined { cluster_id: OURS, timelines }.write(dir)
        };
        joined(2, THEIRS)?;
        assert!(is_noted(dir, OURS, 2, Some(THEIRS)));
        assert!(!is_noted(dir, OURS, 3, Some(THEIRS)) && !is_noted(dir, OURS, 2, Some(9)));
        assert!(!is_noted(dir, 9, 2, Some(THEIRS)), "it is of another that joined");
        let restored = |timeline, of: &str| {
            let origin = Origin { timeline, cluster_id: of.to_owned(), revision: 5 };
            let json = serde_json::to_vec(&origin).unwrap_or_default();
            std::fs::write(dir.join("member/origin.json"), json).map_err(Error::io("write", dir.display()))
        };
        joined(9, 9)?;
        restored(Some(2), "8")?;
        assert!(is_noted(dir, OURS, 2, Some(THEIRS)) && !is_noted(dir, OURS, 2, Some(9)));
        assert!(!is_noted(dir, OURS, 3, Some(THEIRS)));
        // Of a plain file nothing is known.
        restored(None, "0")?;
        assert!(is_noted(dir, OURS, 3, Some(THEIRS)) && !is_noted(dir, OURS, 3, Some(OURS)));
        Ok(())
    }
}
