//! Where a session goes on: in a timeline, after a revision, or with a full snapshot.

use std::collections::HashMap;

use chrono::{DateTime, SecondsFormat, Utc};
use tokio::time::Instant;

use super::super::auth::AuthWatch;
use super::super::closing::{Known, Position};
use super::super::comparison::{ChainEnd, Comparison};
use super::super::own::{Own, Whose};
use super::super::pending::Pending;
use super::super::requests::Asked;
use super::super::timeline::{self, Decision, Seen};
use super::super::{Settings, now_ms};
use super::tasks::Due;
use super::{Session, Tip, warn_of_hole};
use crate::catalog::{Catalog, Description, History, Layout, ObjectName, PREDECESSOR, Timeline};
use crate::container::LAYOUT;
use crate::etcd::{Etcd, Status};
use crate::kinship;
use crate::retention::ABANDONED_AFTER;
use crate::store::Store;
use crate::{Class, Error, Result};

/// Clocks that differ by less are taken to agree.
const MOST_AHEAD_MS: i64 = 30_000;

impl<'s> Session<'s> {
    /// Finds out where to go on: from what the store has, and from what etcd is. `before` is the cluster that this run has backed
    /// up already.
    pub async fn begin(
        settings: &'s Settings,
        mut etcd: Etcd,
        status: Status,
        before: Option<(u64, Timeline)>,
    ) -> Result<Self> {
        let store = &settings.store;
        let catalog = store.catalog().await?;
        let newest_ms = catalog.newest().and_then(|(_, history)| history.times().max()).unwrap_or_default();
        if newest_ms > now_ms().saturating_add(MOST_AHEAD_MS) {
            let newest = DateTime::from_timestamp_millis(newest_ms).unwrap_or_default();
            tracing::warn!(%newest, "the newest backup is of a time to come: a clock is or was wrong, and times of backups and retention go by it");
        }
        let later = etcd.status().await?;
        let known = Known { position: Position::between(&status, &later), db_size: status.db_size, ..Known::default() };
        let status_revision = status.revision;
        let mut session = Self {
            settings,
            pending: Pending::after(status.revision, settings.delta_max_bytes)?,
            early_ttls: HashMap::new(),
            home: status.revision,
            asked: Asked::default(),
            etcd,
            status,
            timeline: 1,
            tip: Tip::None,
            next_full: None,
            due: None,
            auth: AuthWatch::default(),
            known,
            base: None,
            newest: None,
            last_final: None,
            lost: false,
            began_after: status_revision,
            hole_upto: 0,
            is_silent: false,
            unsaved: None,
            is_described: false,
            is_anothers: false,
        };
        match settings.layout {
            Layout::Steward => session.find_timeline(&catalog, before).await?,
            Layout::GardenerV2 => session.find_predecessor(&catalog).await?,
        }
        remove_abandoned(store, &catalog).await;
        let backed_up_to = if let Tip::At(tip) = session.tip { Some(tip) } else { None };
        if let Some(tip) = backed_up_to {
            session.pending = Pending::after(tip, settings.delta_max_bytes)?;
            session.home = tip;
            let chain = catalog.timelines.get(&session.timeline).and_then(History::newest_chain);
            let full = chain.as_ref().map(|chain| (chain.full.revision, chain.full.unix_ms));
            let delta = chain.as_ref().and_then(|chain| chain.deltas.last()).map(|delta| (delta.last, delta.unix_ms));
            let deltas = chain.as_ref().map_or(0, |chain| chain.deltas.len());
            settings.metrics.found(full, delta, deltas, tip);
        } else {
            settings.metrics.found(None, None, 0, 0);
            session.due = Some((Due::NoChain, Instant::now()));
        }
        tracing::info!(
            endpoint = session.etcd.endpoint(),
            version = session.status.version,
            revision = session.status.revision,
            timeline = session.timeline,
            backed_up_to,
            "connected"
        );
        Ok(session)
    }

    async fn find_timeline(&mut self, catalog: &Catalog, before: Option<(u64, Timeline)>) -> Result<()> {
        let store = &self.settings.store;
        let seen = timeline::look(store, catalog).await?;
        if let Some((cluster_id, timeline)) = before.filter(|(before, _)| *before == self.status.cluster_id) {
            // It is the same cluster still. Where the store is not, whoever owns that would find ours to be the newest there.
            match (Own { timeline, cluster_id, is_described: true }).look(store).await? {
                Whose::Ours => {}
                Whose::Anothers(what) => return Err(Error::missing(what)),
                Whose::OursElsewhere(what) => tracing::warn!("{what}"),
            }
        }
        match timeline::decide(seen.as_ref(), &self.status) {
            Decision::Continue { timeline } => {
                self.timeline = timeline;
                self.is_described = match &seen {
                    Some(seen) if seen.begun_with.is_none() => self.describe_again(seen).await,
                    seen => seen.is_some(),
                };
                match (catalog.timelines.get(&timeline), &seen) {
                    (Some(history), Some(seen)) => self.resume(history, seen.newer_is_damaged).await,
                    _ => Ok(()),
                }
            }
            Decision::Begin { timeline, parent, ref reason } => {
                self.check_kinship(catalog, seen.as_ref()).await?;
                self.begin_timeline(timeline, parent, catalog.timelines.get(&parent), reason).await
            }
        }
    }

    /// Fails where a timeline would be begun in a store that nothing says is for this cluster's backups.
    async fn check_kinship(&self, catalog: &Catalog, seen: Option<&Seen>) -> Result<()> {
        let (store, ours) = (&self.settings.store, self.status.cluster_id);
        let Some(data_dir) = &self.settings.data_dir else { return Ok(()) };
        let (theirs, timeline) = match seen {
            Some(seen) => match seen.foreign_cluster(ours) {
                Some(theirs) => (theirs, seen.timeline),
                None => return Ok(()),
            },
            None => (0, PREDECESSOR),
        };
        let live = self.status.revision;
        let whose = match (theirs, self.beyond_us(catalog, timeline)) {
            (1.., _) => format!("timeline {timeline} is of cluster {theirs:x}"),
            // Nothing says of which cluster it is: it may well be ours, where that has all of it.
            (0, Some(last)) => format!("backups reach revision {last}, which etcd, at {live}, does not have"),
            (0, None) => return Ok(()),
        };
        if kinship::is_kin(store, catalog, ours, data_dir).await? {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "{}: its {whose}, and nothing shows that cluster {ours:x} was restored from there: nothing is backed up into it. Give a prefix of its own; or, if its backups are to follow those, take the first with `sidecar snapshot --once full`",
            store.url()
        )))
    }

    /// Where a timeline ends, when that is more than etcd has.
    fn beyond_us(&self, catalog: &Catalog, timeline: Timeline) -> Option<i64> {
        let last = catalog.timelines.get(&timeline).and_then(History::last_revision)?;
        (last > self.status.revision).then_some(last)
    }

    /// A timeline whose description is gone, and whose newest object is of this cluster, gets one again: by it another's data is
    /// told from its own.
    async fn describe_again(&self, seen: &Seen) -> bool {
        let store = &self.settings.store;
        let is_ours = seen.newest.as_ref().is_some_and(|newest| newest.cluster_id == self.status.cluster_id);
        if !is_ours || !matches!(store.description(seen.timeline).await, Ok(None)) {
            return false;
        }
        tracing::warn!(timeline = seen.timeline, "the description of the timeline is missing; it is written again");
        let description = self.description(seen.timeline, 0, 0, "its first description was missing");
        let put = store.put_description(&description).await;
        put.inspect_err(|error| tracing::warn!(%error, "the timeline stays without a description")).is_ok()
    }

    fn description(&self, timeline: Timeline, parent: Timeline, fork_revision: i64, reason: &str) -> Description {
        Description {
            layout: LAYOUT,
            timeline,
            parent,
            fork_revision,
            reason: reason.to_owned(),
            cluster_id: format!("{:x}", self.status.cluster_id),
            created: Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
        }
    }

    /// The predecessor's layout has one history, and nothing in it says of which cluster.
    async fn find_predecessor(&mut self, catalog: &Catalog) -> Result<()> {
        self.timeline = PREDECESSOR;
        let Some(history) = catalog.timelines.get(&PREDECESSOR) else { return Ok(()) };
        if let Some(last) = self.beyond_us(catalog, PREDECESSOR) {
            let live = self.status.revision;
            return Err(self.no_timelines(&format!("etcd is at revision {live}, the backup at {last}")));
        }
        self.resume(history, false).await
    }

    fn no_timelines(&self, what: &str) -> Error {
        let url = self.settings.store.url();
        Error::precondition(format!(
            "{what}: store {url} holds another history, and the layout gardener-v2 cannot keep two apart; give another prefix, or leave --layout out"
        ))
    }

    async fn begin_timeline(
        &mut self,
        timeline: Timeline,
        parent: Timeline,
        history: Option<&History>,
        reason: &str,
    ) -> Result<()> {
        let store = &self.settings.store;
        let mut fork_revision = 0;
        if let Some(history) = history {
            let found = timeline::fork_revision(store, &mut self.etcd, parent, history, self.status.revision).await;
            fork_revision = found.unwrap_or_else(|error| {
                tracing::warn!(%error, "it cannot be found out where the new timeline parts from the one before");
                0
            });
            tracing::warn!(
                timeline,
                parent,
                fork_revision,
                reason,
                "begin a new timeline; nothing of the one before is touched"
            );
        } else {
            tracing::info!(timeline, "begin the first timeline");
        }
        let description = self.description(timeline, parent, fork_revision, reason);
        store.put_description(&description).await.map_err(|error| match error.class() {
            // Its content has the time: another writer began the timeline in the same moment.
            Class::Precondition => Error::Unanswered {
                what: format!("another backup of this cluster began timeline {timeline} at the same time; look again"),
            },
            _ => error,
        })?;
        (self.timeline, self.is_described) = (timeline, true);
        self.next_full = None;
        Ok(())
    }

    /// Finds where to go on in a timeline. Without a chain that can be trusted there is no tip, and a full is taken.
    async fn resume(&mut self, history: &History, newer_is_damaged: bool) -> Result<()> {
        let Some(chain) = history.newest_chain() else { return Ok(()) };
        if let Some(newest) = history.fulls.iter().map(|full| full.unix_ms).max() {
            self.schedule_after(newest);
        }
        if let Some(gap) = chain.gap {
            tracing::error!(after = gap.after, before = gap.before, "revisions are missing in the store");
            return Ok(());
        }
        let store = &self.settings.store;
        let compared = async {
            let full = store.meta(&chain.full.name(self.timeline), chain.full.size).await?;
            if newer_is_damaged {
                return Ok::<_, Error>((full, None));
            }
            let end = ChainEnd { store, timeline: self.timeline, history, chain: &chain, full: full.as_ref() };
            let compared = end.compare(&mut self.etcd, (&self.settings.etcd, &self.settings.others)).await?;
            Ok((full, Some(compared)))
        };
        let (full, compared) = match compared.await {
            Ok(compared) => compared,
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "an object that the chain needs is damaged; a full snapshot is taken");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if let Some(Comparison::Differs(reason)) = &compared {
            if self.settings.layout == Layout::GardenerV2 {
                return Err(self.no_timelines(reason));
            }
            let parent = self.timeline;
            return self.begin_timeline(parent.saturating_add(1), parent, Some(history), reason).await;
        }
        if let Some(Comparison::Damaged { why, intact }) = compared {
            let ours = self.status.member_id;
            return Err(Error::Diverged {
                what: format!(
                    "the data of member {ours:x} is damaged: {why}. Member {intact:x} has what the backups have. Nothing is backed up from {ours:x}: stop its etcd, move its member directory away and start it again, and it gets everything from the others"
                ),
                intact,
            });
        }
        self.follow_chain(&chain);
        if let Some(full) = full {
            self.auth = AuthWatch::since(&full);
            self.known.compact_revision = full.compact_revision;
        } else {
            // What users and roles were then is not written down; changes from now on are noticed.
            self.auth.rebase(&mut self.etcd).await;
        }
        self.tip = match compared {
            Some(Comparison::Same) => Tip::At(chain.last),
            Some(Comparison::Impossible { compacted }) => Tip::Unproven(unproven(chain.last, compacted)),
            _ => Tip::None,
        };
        Ok(())
    }
}

/// Removes what uploads left behind that were never finished, once it is known that the store is ours.
async fn remove_abandoned(store: &Store, catalog: &Catalog) {
    let abandoned_ms = now_ms() - i64::try_from(ABANDONED_AFTER.as_millis()).unwrap_or(i64::MAX);
    for (name, _) in &catalog.uploading {
        if matches!(name, ObjectName::Uploading { unix_ms, .. } if *unix_ms < abandoned_ms) {
            match store.delete(name).await {
                Ok(()) => tracing::info!(object = %name, "remove an upload that was never finished"),
                Err(error) => tracing::warn!(%error, "an upload that was never finished stays"),
            }
        }
    }
    store.remove_abandoned_files(ABANDONED_AFTER).await;
}

/// Says that etcd has compacted what would prove that it continues the chain that ends at `have`.
fn unproven(have: i64, compacted: i64) -> Error {
    if compacted > have {
        warn_of_hole(have, compacted);
        return Error::Compacted { have, compacted };
    }
    let what = if compacted == have {
        format!(
            "etcd has compacted, up to revision {compacted}, what would prove that it continues the backup, which ends there"
        )
    } else {
        format!(
            "the backup ends with a full snapshot, of revision {have}, that has no hash: nothing proves that etcd continues it"
        )
    };
    tracing::warn!("{what}; a full snapshot is due");
    Error::precondition(format!("{what}; take a full snapshot with --once full"))
}
