//! Whether a store is still the one that a cluster is backed up to.

use crate::catalog::Timeline;
use crate::store::Store;
use crate::{Class, Error, Result};

/// Whose store it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whose {
    /// That of our backups, or nothing says otherwise.
    Ours,
    /// Another cluster's: ours may come back. Says what shows that.
    Anothers(String),
    /// That of our backups, in which our timeline is another cluster's. Says which.
    OursElsewhere(String),
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
        match self.look(store).await? {
            Whose::Ours => Ok(()),
            Whose::Anothers(what) => Err(Error::missing(what)),
            Whose::OursElsewhere(what) => Err(Error::Elsewhere { what }),
        }
    }

    /// Looks which clusters' timelines there are.
    pub(super) async fn look(self, store: &Store) -> Result<Whose> {
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
        let (timeline, Some(theirs)) = there else { return Ok(Whose::Ours) };
        if theirs == self.cluster_id {
            return Ok(Whose::Ours);
        }
        let url = store.url();
        // Begun in what lay below a mount that has come back, ours has a number that another's has there; the newest is ours.
        if let Some((newest, _)) = store.catalog().await?.newest().filter(|(newest, _)| *newest != timeline)
            && store.begun_with(newest).await? == Some(self.cluster_id)
        {
            return Ok(Whose::OursElsewhere(format!(
                "{url}: timeline {timeline} is of cluster {theirs:x} there, and ours is {newest}: it goes on in that"
            )));
        }
        Ok(Whose::Anothers(format!(
            "{url}: another store was put in its place, whose timeline {timeline} is of cluster {theirs:x}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Description;

    #[tokio::test]
    async fn whose_a_store_is_its_timelines_tell() -> Result<()> {
        let store = Store::from_parts(std::sync::Arc::new(object_store::memory::InMemory::new()), "p");
        let own = Own { timeline: 1, cluster_id: 7, is_described: true };
        assert_eq!(own.look(&store).await?, Whose::Ours);
        let describe = |timeline, cluster_id: &str| Description {
            layout: 1,
            timeline,
            parent: timeline - 1,
            fork_revision: 0,
            reason: String::new(),
            cluster_id: cluster_id.into(),
            created: "2026-11-30T00:00:00Z".into(),
        };
        store.put_description(&describe(1, "8")).await?;
        assert!(matches!(own.look(&store).await?, Whose::Anothers(what) if what.contains("of cluster 8")));
        assert_eq!(own.check(&store).await.map_err(|error| error.class()), Err(Class::Missing));
        // A mount has come back, with what was begun below it beside.
        store.put_description(&describe(2, "7")).await?;
        assert!(matches!(own.look(&store).await?, Whose::OursElsewhere(what) if what.contains("ours is 2")));
        assert!(matches!(own.check(&store).await, Err(Error::Elsewhere { .. })));
        assert_eq!(Own { timeline: 2, ..own }.look(&store).await?, Whose::Ours);
        // Another cluster went on after ours.
        store.put_description(&describe(3, "8")).await?;
        assert!(matches!(own.look(&store).await?, Whose::Anothers(_)));
        Ok(())
    }
}
