//! What is done from time to time: old backups go, long tails of deltas are merged, the newest chain is restored to see that
//! it can be, databases are defragmented, and alarms are seen to. Each is a task of its own; only the leader's do anything.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use croner::Cron;
use tracing::Instrument;

use super::membership::Gone;
use super::{Supervisor, defragment};
use crate::compact;
use crate::etcd::{Alarm, Etcd, EtcdFlags, Role, Status};
use crate::gc::collect;
use crate::metrics;
use crate::restore;
use crate::retention::Retention;
use crate::snapshotter::Kind;
use crate::store::Store;
use crate::{Error, Result};

/// How often it is looked whether a tail of deltas has grown long, and whether a cron schedule has come due.
const LOOK_PERIOD: Duration = Duration::from_secs(30);
/// How often it is looked whether the store is ours alone,
const WHOSE_PERIOD: Duration = Duration::from_secs(30);
/// in so many of its newest timelines.
const MOST_TIMELINES: usize = 8;
/// After something has failed, it is tried again after so long, and with each further time after twice as long up to this.
const LEAST_BACKOFF: Duration = Duration::from_secs(30);
const MOST_BACKOFF: Duration = Duration::from_secs(4 * 3600);
/// Between two times that a cluster without space is seen to.
const NO_SPACE_PERIOD: Duration = Duration::from_secs(600);
/// How often it is looked whether there is space.
const ALARM_PERIOD: Duration = Duration::from_secs(15);
/// Between two times that a database is defragmented out of turn, should that not have made it smaller.
const URGENT_PERIOD: Duration = Duration::from_secs(3600);

/// What is done, and when.
#[derive(Debug, Clone, Default)]
pub struct Upkeep {
    /// Which backups go, and how often that is looked at.
    pub retention: Option<(Retention, Duration)>,
    /// How many deltas may follow a full snapshot, and where they are merged.
    pub compaction: Option<(usize, PathBuf)>,
    /// When the newest chain is restored, and where to.
    pub verification: Option<(Cron, PathBuf)>,
    /// When databases are defragmented.
    pub defragmentation: Option<Defragmentation>,
    /// Whether a cluster that has run out of space is compacted and defragmented.
    pub resolve_no_space: bool,
}

/// When databases are defragmented.
#[derive(Debug, Clone)]
pub struct Defragmentation {
    /// When it is looked at them.
    pub cron: Cron,
    /// From which free share on.
    pub least_free_share: f64,
    /// From which free share on at any time; 0 for never.
    pub urgent_free_share: f64,
}

/// A chain that was restored.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// The last revision.
    pub revision: i64,
    /// When.
    pub unix_ms: i64,
    /// How long it took.
    pub seconds: f64,
    /// Revisions whose HashKV was found again.
    pub hashes: Vec<i64>,
}

/// Begins what there is to do.
pub(super) fn start(supervisor: &Arc<Supervisor>) {
    let upkeep = supervisor.settings.upkeep.clone();
    if let Some(store) = supervisor.settings.initialize.store.clone() {
        let looked = store.clone();
        supervisor.repeat(
            "look whose the newest backups are",
            When::Every(WHOSE_PERIOD),
            Lasts::WhileLeading,
            move |this| {
                let store = looked.clone();
                async move { this.look_whose(&store).await }
            },
        );
        if let Some((retention, period)) = upkeep.retention {
            let store = store.clone();
            supervisor.repeat(
                "delete backups that newer ones replace",
                When::Every(period),
                Lasts::WhileLeading,
                move |this| {
                    let store = store.clone();
                    async move { this.collect(&store, retention).await }
                },
            );
        }
        if let Some((most, work_dir)) = upkeep.compaction {
            let store = store.clone();
            supervisor.repeat("merge deltas", When::Every(LOOK_PERIOD), Lasts::WhileLeading, move |this| {
                let (store, work_dir) = (store.clone(), work_dir.clone());
                async move { this.merge_when_long(&store, most, &work_dir).await }
            });
        }
        if let Some((cron, work_dir)) = upkeep.verification {
            supervisor.repeat(
                "restore the newest chain to see that it can be",
                When::Cron(Box::new(cron)),
                Lasts::WhileLeading,
                move |this| {
                    let (store, work_dir) = (store.clone(), work_dir.clone());
                    async move { this.drill(&store, &work_dir).await }
                },
            );
        }
    }
    if let Some(Defragmentation { cron, least_free_share, urgent_free_share }) = upkeep.defragmentation {
        supervisor.repeat("defragment", When::Cron(Box::new(cron)), Lasts::ToItsEnd, move |this| async move {
            this.defragment_all(least_free_share).await
        });
        supervisor.repeat(
            "defragment what is mostly free",
            When::Every(LOOK_PERIOD),
            Lasts::ToItsEnd,
            move |this| async move { this.defragment_urgently(least_free_share, urgent_free_share).await },
        );
    }
    if let Some(after) = supervisor.settings.remove_members_after {
        let gone = Arc::<tokio::sync::Mutex<Gone>>::default();
        supervisor.repeat(
            "remove members that are gone",
            When::Every(Gone::period(after)),
            Lasts::WhileLeading,
            move |this| {
                let gone = gone.clone();
                async move {
                    let (mut etcd, _) = Etcd::connect(&this.settings.etcd).await?;
                    gone.lock().await.remove(&this.settings.initialize, after, &mut etcd).await
                }
            },
        );
    }
    if upkeep.resolve_no_space {
        supervisor.repeat("make space", When::Every(ALARM_PERIOD), Lasts::WhileFull, |this| async move {
            this.make_space().await
        });
    }
}

#[derive(Debug, Clone)]
enum When {
    Every(Duration),
    Cron(Box<Cron>),
}

impl When {
    /// How long it is until the next time.
    fn wait(&self) -> Duration {
        match self {
            Self::Every(period) => *period,
            Self::Cron(cron) => {
                let now = chrono::Local::now();
                let next = cron.find_next_occurrence(&now, false).ok();
                // A clock that is set meanwhile is noticed at the next.
                next.and_then(|next| (next - now).to_std().ok()).unwrap_or(Duration::from_secs(3600))
            }
        }
    }
}

/// How long what was begun goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lasts {
    /// Given up when the member no longer leads.
    WhileLeading,
    /// The same, and it cannot wait: nobody can write.
    WhileFull,
    /// It hands leadership over itself, and ends by itself where another leads.
    ToItsEnd,
}

impl Lasts {
    fn most_backoff(self) -> Duration {
        if self == Self::WhileFull { LEAST_BACKOFF } else { MOST_BACKOFF }
    }
}

impl Supervisor {
    /// Does something from time to time while its member leads.
    fn repeat<F, W>(self: &Arc<Self>, what: &'static str, when: When, lasts: Lasts, work: W)
    where
        F: Future<Output = Result<()>> + Send + 'static,
        W: Fn(Arc<Self>) -> F + Send + Sync + 'static,
    {
        let this = self.clone();
        self.tasks.spawn(async move {
            // What fails for a lasting reason is not tried as often as it is looked at.
            let mut backoff = Duration::ZERO;
            loop {
                tokio::select! {
                    () = tokio::time::sleep(when.wait().max(backoff)) => {}
                    () = this.stop.cancelled() => return,
                }
                if !this.leads() {
                    continue;
                }
                // An etcd that does not answer, as while it is defragmented, still leads for all that is known.
                let gone = async {
                    let is_over = |role| matches!(role, Some(Role::Follower | Role::Learner));
                    while lasts == Lasts::ToItsEnd || !is_over(this.observed.borrow().role) {
                        tokio::time::sleep(super::ROLE_PERIOD).await;
                    }
                };
                tokio::select! {
                    done = Error::caught(work(this.clone())).instrument(tracing::info_span!("upkeep", what)) => match done {
                        Ok(()) => backoff = Duration::ZERO,
                        Err(Error::Cancelled) => return,
                        Err(error) => {
                            tracing::error!(%error, "could not {what}; it is tried again at the next time");
                            backoff = (backoff * 2).clamp(LEAST_BACKOFF, MOST_BACKOFF).min(lasts.most_backoff());
                        }
                    },
                    () = gone => tracing::info!("the member no longer leads: it is left to the leader to {what}"),
                    () = this.stop.cancelled() => return,
                }
            }
        });
    }

    fn leads(&self) -> bool {
        self.observed.borrow().role == Some(Role::Leader)
    }

    /// Whether the newest timeline says that it is of our cluster: another's backups are not ours to delete or merge.
    async fn is_newest_ours(&self, store: &Store) -> Result<bool> {
        let Some(ours) = self.observed.borrow().status.as_ref().map(|status| status.cluster_id) else {
            return Ok(false);
        };
        let catalog = store.catalog().await?;
        let Some((newest, history)) = catalog.newest() else { return Ok(true) };
        let is_ours = store.whose(newest, history).await? == Some(ours);
        if !is_ours {
            tracing::warn!(
                newest,
                "nothing says that the newest backups are of this cluster: they are left as they are"
            );
        }
        Ok(is_ours)
    }

    /// Notices that another cluster has begun to back up where ours does: a restore would take what is newest there.
    async fn look_whose(&self, store: &Store) -> Result<()> {
        let Some(ours) = self.observed.borrow().status.as_ref().map(|status| status.cluster_id) else { return Ok(()) };
        // A store that cannot be listed is said already.
        let Some(Ok(catalog)) = self.listed().await else { return Ok(()) };
        let (mut newest, mut shared) = (None, None);
        for (timeline, history) in catalog.timelines.iter().rev().take(MOST_TIMELINES) {
            match store.whose(*timeline, history).await {
                // What came before ours is what ours was restored from.
                Ok(Some(whose)) if whose == ours => {
                    shared = newest;
                    break;
                }
                Ok(Some(theirs)) => newest = newest.or(Some((*timeline, theirs))),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, timeline, "whose a timeline is cannot be told");
                    return Ok(());
                }
            }
        }
        let shared = shared.map(|(timeline, theirs)| {
            format!(
                "timeline {timeline} of store {} was begun after ours by cluster {theirs:x}, and a restore takes the newest: give each cluster a prefix of its own, and move that timeline away",
                store.url()
            )
        });
        let is_new = self.observed.borrow().shared.is_none();
        self.observed.send_modify(|observed| observed.shared.clone_from(&shared));
        if let Some(shared) = shared.filter(|_| is_new) {
            tracing::error!("{shared}");
        }
        Ok(())
    }

    async fn collect(&self, store: &Store, retention: Retention) -> Result<()> {
        let _one = self.heavy.lock().await;
        if !self.is_newest_ours(store).await? {
            return Ok(());
        }
        let store = &self.in_the_background(store);
        let collected = collect(store, retention, false, &self.stop.child_token()).await?;
        for damaged in &collected.damaged {
            tracing::error!("a backup is damaged: {damaged}");
        }
        for (object, is_gone) in &collected.ended {
            let kind = if object.is_full() { metrics::Kind::Full } else { metrics::Kind::Incr };
            self.settings.metrics.collected(kind, *is_gone);
        }
        tracing::info!(
            deleted = collected.deleted,
            bytes = collected.freed_bytes,
            failed = collected.failed.len(),
            "looked which backups can go"
        );
        Ok(())
    }

    async fn merge_when_long(&self, store: &Store, most: usize, work_dir: &Path) -> Result<()> {
        let catalog = store.catalog().await?;
        if catalog.newest_chain().is_none_or(|(_, chain)| chain.deltas.len() < most)
            || !self.is_newest_ours(store).await?
        {
            return Ok(());
        }
        self.compact(false, work_dir).await.map(drop)
    }

    /// Merges the newest chain.
    pub async fn compact(&self, discard_history: bool, work_dir: &Path) -> Result<compact::Compacted> {
        let store = self.store()?;
        let _one = self.heavy.lock().await;
        let settings = compact::Settings { timeline: None, discard_history, work_dir: work_dir.to_owned() };
        let stop = self.stop.child_token();
        let _gone = stop.clone().drop_guard();
        let store = self.in_the_background(store);
        // A task of its own: who asked for it may go away, and what it has uploaded is then to be removed.
        let merging = self.tasks.spawn(async move { compact::compact(&store, &settings, &stop).await });
        let compacted = merging.await.map_err(|error| Error::task(&error))??;
        tracing::info!(object = compacted.object, revision = compacted.revision, "deltas are merged");
        Ok(compacted)
    }

    /// Restores the newest chain, and publishes what came of it.
    pub async fn drill(&self, store: &Store, work_dir: &Path) -> Result<()> {
        let _one = self.heavy.lock().await;
        let catalog = store.catalog().await?;
        let Some((timeline, chain)) = catalog.newest_chain() else { return Ok(()) };
        let stop = self.stop.child_token();
        let _gone = stop.clone().drop_guard();
        let pace = self.pace();
        let started = Instant::now();
        let replayed = restore::replay(store, timeline, chain, work_dir, pace.clone(), &stop).await;
        self.settings.metrics.drilled(replayed.is_ok());
        let (revision, hashes) = replayed?;
        // A restore in earnest keeps to no pace: what is left is how long its own work took.
        let waited = pace.map_or(Duration::ZERO, |pace| pace.waited());
        let (seconds, unix_ms) =
            (started.elapsed().saturating_sub(waited).as_secs_f64(), Utc::now().timestamp_millis());
        tracing::info!(revision, seconds, ?hashes, "the newest chain was restored and is whole");
        self.settings.metrics.verified(revision, unix_ms, seconds);
        self.observed.send_modify(|observed| observed.verified = Some(Verified { revision, unix_ms, seconds, hashes }));
        Ok(())
    }

    async fn defragment_all(&self, least_free_share: f64) -> Result<()> {
        let (_heavy, _one) = (self.heavy.lock().await, self.defragmenting.lock().await);
        let settings = &self.settings;
        defragment::cluster(&settings.etcd, least_free_share, &settings.quiet, &settings.metrics).await.map(drop)
    }

    async fn defragment_urgently(&self, least_free_share: f64, urgent_free_share: f64) -> Result<()> {
        let is_urgent = |status: &Status| defragment::is_urgent(status, urgent_free_share);
        // The others have the same rows, and about as much that is free.
        if !self.observed.borrow().status.as_ref().is_some_and(is_urgent) {
            return Ok(());
        }
        self.defragment_all(least_free_share).await?;
        tokio::select! {
            () = tokio::time::sleep(URGENT_PERIOD) => {}
            () = self.stop.cancelled() => {}
        }
        Ok(())
    }

    async fn make_space(&self) -> Result<()> {
        if !self.observed.borrow().alarms().iter().any(|(_, alarm)| *alarm == Alarm::NoSpace) {
            return Ok(());
        }
        let (mut etcd, status) = Etcd::connect(&self.settings.etcd).await?;
        tracing::warn!("etcd has run out of space: it is compacted and defragmented");
        // What is compacted can no longer be received.
        if self.settings.backup.is_some() {
            self.take(Kind::Delta).await?;
        }
        // What reads the store does not hold this up.
        let defragmenting = self.defragmenting.lock().await;
        etcd.compact(status.revision).await?;
        // One that is not well must not keep the others from writing.
        let mut done = Vec::new();
        for member in etcd.members().await?.into_iter().filter(|member| member.id != status.member_id) {
            let flags = EtcdFlags { endpoints: member.client_urls.clone(), ..self.settings.etcd.clone() };
            let defragmented = async {
                let _quiet = self.settings.quiet.lock().await;
                Etcd::connect(&flags).await?.0.defragment().await
            };
            match defragmented.await {
                Ok(()) => done.push(member.id),
                Err(error) => tracing::warn!(%error, name = member.name, "a member is not defragmented"),
            }
        }
        {
            // Nobody can write anyway, so the leader leads on.
            let _quiet = self.settings.quiet.lock().await;
            etcd.defragment().await?;
            done.push(status.member_id);
        }
        for (member, _) in status.alarms.iter().filter(|(id, alarm)| *alarm == Alarm::NoSpace && done.contains(id)) {
            etcd.disarm_no_space(*member).await?;
        }
        tracing::info!("there is space again");
        drop(defragmenting);
        // Where what is live is more than the quota, it would be the same again.
        tokio::time::sleep(NO_SPACE_PERIOD).await;
        Ok(())
    }
}
