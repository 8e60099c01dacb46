//! Whether a store is still the one that a cluster is backed up to.

use crate::catalog::Timeline;
use crate::store::Store;
use crate::{Class, Error, Result};

/// Whose store it is now.
pub(super) fn anothers(store: &Store, timeline: Timeline, theirs: u64) -> String {
    let url = store.url();
    format!("{url}: another store was put in its place, whose timeline {timeline} is of cluster {theirs:x}")
}

/// A timeline, and of which cluster it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Own {
    pub timeline: Timeline,
    pub cluster_id: u64,
    /// Whether its description was there.
    pub is_described: bool,
}

impl Own {
    /// Somebody may have put another cluster's store in the place of ours since the last look: fails where that is so.
    pub(super) async fn check(self, store: &Store) -> Result<()> {
        match self.others(store).await? {
            Some((timeline, theirs)) => Err(Error::missing(anothers(store, timeline, theirs))),
            None => Ok(()),
        }
    }

    /// A timeline of another cluster's that shows that the store is that one's, if there is one.
    pub(super) async fn others(self, store: &Store) -> Result<Option<(Timeline, u64)>> {
        let cluster_of = async |timeline| match store.cluster_of(timeline).await {
            // It says nothing, then.
            Err(error) if error.class() == Class::Corrupt => Ok((timeline, Some(self.cluster_id))),
            cluster_id => cluster_id.map(|cluster_id| (timeline, cluster_id)),
        };
        let mut there = cluster_of(self.timeline).await?;
        if self.is_described && there.1.is_none() {
            // It has no such timeline, or has lost that description: another tells.
            if let Some((newest, _)) = store.catalog().await?.newest() {
                there = cluster_of(newest).await?;
            }
        }
        let (timeline, cluster_id) = there;
        Ok(cluster_id.filter(|theirs| *theirs != self.cluster_id).map(|theirs| (timeline, theirs)))
    }
}
