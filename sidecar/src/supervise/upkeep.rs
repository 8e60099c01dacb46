//! What is done from time to time: old backups go, long tails of deltas are merged, the newest chain is restored to see that
//! it can be, databases are defragmented, and alarms are seen to. Each is a task of its own; only the leader's do anything.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use croner::Cron;

use super::membership::Gone;
use super::{Supervisor, defragment};
use crate::compact;
use crate::etcd::{Alarm, Etcd, EtcdFlags, Role};
use crate::gc::collect;
use crate::restore;
use crate::retention::Retention;
use crate::snapshotter::Kind;
use crate::store::Store;
use crate::{Error, Result};

/// How often it is looked whether a tail of deltas has grown long, and whether a cron schedule has come due.
const LOOK_PERIOD: Duration = Duration::from_secs(30);
/// Between two times that a cluster without space is seen to.
const NO_SPACE_PERIOD: Duration = Duration::from_secs(600);
/// How often alarms are asked for.
const ALARM_PERIOD: Duration = Duration::from_secs(15);

/// What is done, and when.
#[derive(Debug, Clone, Default)]
pub struct Upkeep {
    /// Which backups go, and how often that is looked at.
    pub retention: Option<(Retention, Duration)>,
    /// How many deltas may follow a full snapshot, and where they are merged.
    pub compaction: Option<(usize, PathBuf)>,
    /// When the newest chain is restored, and where to.
    pub verification: Option<(Cron, PathBuf)>,
    /// When databases are defragmented, and from which free share on.
    pub defragmentation: Option<(Cron, f64)>,
    /// Whether a cluster that has run out of space is compacted and defragmented.
    pub resolve_no_space: bool,
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
        if let Some((retention, period)) = upkeep.retention {
            let store = store.clone();
            supervisor.repeat("delete backups that newer ones replace", When::Every(period), move |this| {
                let store = store.clone();
                async move { this.collect(&store, retention).await }
            });
        }
        if let Some((most, work_dir)) = upkeep.compaction {
            let store = store.clone();
            supervisor.repeat("merge deltas", When::Every(LOOK_PERIOD), move |this| {
                let (store, work_dir) = (store.clone(), work_dir.clone());
                async move { this.merge_when_long(&store, most, &work_dir).await }
            });
        }
        if let Some((cron, work_dir)) = upkeep.verification {
            supervisor.repeat(
                "restore the newest chain to see that it can be",
                When::Cron(Box::new(cron)),
                move |this| {
                    let (store, work_dir) = (store.clone(), work_dir.clone());
                    async move { this.drill(&store, &work_dir).await }
                },
            );
        }
    }
    if let Some((cron, share)) = upkeep.defragmentation {
        supervisor.repeat("defragment", When::Cron(Box::new(cron)), move |this| async move {
            let _one = this.heavy.lock().await;
            let started = Instant::now();
            let done = defragment::cluster(&this.settings.etcd, share, &this.settings.quiet).await;
            this.settings.metrics.defragmented(done.is_ok(), started.elapsed());
            done.map(drop)
        });
    }
    if let Some(after) = supervisor.settings.remove_members_after {
        let gone = Arc::<tokio::sync::Mutex<Gone>>::default();
        supervisor.repeat("remove members that are gone", When::Every(Gone::period(after)), move |this| {
            let gone = gone.clone();
            async move {
                let (mut etcd, _) = Etcd::connect(&this.settings.etcd).await?;
                gone.lock().await.remove(&this.settings.initialize, after, &mut etcd).await
            }
        });
    }
    supervisor.repeat("see to alarms", When::Every(ALARM_PERIOD), |this| async move { this.see_to_alarms().await });
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

impl Supervisor {
    /// Does something from time to time while its member leads, and gives it up when it no longer does.
    fn repeat<F, W>(self: &Arc<Self>, what: &'static str, when: When, work: W)
    where
        F: Future<Output = Result<()>> + Send + 'static,
        W: Fn(Arc<Self>) -> F + Send + Sync + 'static,
    {
        let this = self.clone();
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(when.wait()) => {}
                    () = this.stop.cancelled() => return,
                }
                if !this.leads() {
                    continue;
                }
                // An etcd that does not answer, as while it is defragmented, still leads for all that is known.
                let gone = async {
                    while !matches!(this.observed.borrow().role, Some(Role::Follower | Role::Learner)) {
                        tokio::time::sleep(super::ROLE_PERIOD).await;
                    }
                };
                tokio::select! {
                    done = work(this.clone()) => match done {
                        Ok(()) => {}
                        Err(Error::Cancelled) => return,
                        Err(error) => tracing::error!(%error, "could not {what}; it is tried again at the next time"),
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

    async fn collect(&self, store: &Store, retention: Retention) -> Result<()> {
        let _one = self.heavy.lock().await;
        let collected = collect(store, retention, false, &self.stop.child_token()).await?;
        for damaged in &collected.damaged {
            tracing::error!("a backup is damaged: {damaged}");
        }
        self.settings.metrics.collected(collected.deleted, collected.failed.len() as u64);
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
        let chain = catalog.newest_restorable().and_then(|(_, history)| history.newest_chain());
        if chain.is_none_or(|chain| chain.deltas.len() < most) {
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
        let compacted = compact::compact(store, &settings, &stop).await?;
        tracing::info!(object = compacted.object, revision = compacted.revision, "deltas are merged");
        Ok(compacted)
    }

    /// Restores the newest chain, and publishes what came of it.
    pub async fn drill(&self, store: &Store, work_dir: &Path) -> Result<()> {
        let _one = self.heavy.lock().await;
        let catalog = store.catalog().await?;
        let newest = catalog.newest_restorable();
        let Some((timeline, chain)) = newest.and_then(|(timeline, history)| Some((timeline, history.newest_chain()?)))
        else {
            return Ok(());
        };
        let stop = self.stop.child_token();
        let _gone = stop.clone().drop_guard();
        let started = Instant::now();
        let (revision, hashes) = restore::replay(store, timeline, chain, work_dir, &stop).await?;
        let (seconds, unix_ms) = (started.elapsed().as_secs_f64(), Utc::now().timestamp_millis());
        tracing::info!(revision, seconds, ?hashes, "the newest chain was restored and is whole");
        self.settings.metrics.verified(revision, unix_ms, seconds);
        self.observed.send_modify(|observed| observed.verified = Some(Verified { revision, unix_ms, seconds, hashes }));
        Ok(())
    }

    async fn see_to_alarms(&self) -> Result<()> {
        let (mut etcd, status) = Etcd::connect(&self.settings.etcd).await?;
        let alarms = etcd.alarms().await?;
        self.observed.send_if_modified(|observed| {
            let is_new = observed.alarms != alarms;
            if is_new {
                for (id, alarm) in &alarms {
                    tracing::error!(member = format!("{id:x}"), alarm = alarm.name(), "the cluster has an alarm");
                }
                observed.alarms.clone_from(&alarms);
            }
            is_new
        });
        if !alarms.iter().any(|(_, alarm)| *alarm == Alarm::NoSpace) || !self.settings.upkeep.resolve_no_space {
            return Ok(());
        }
        tracing::warn!("etcd has run out of space: it is compacted and defragmented");
        // What is compacted can no longer be received.
        if self.settings.backup.is_some() {
            self.take(Kind::Delta).await?;
        }
        etcd.compact(status.revision).await?;
        // One that is not well must not keep the others from writing.
        for member in etcd.members().await?.into_iter().filter(|member| member.id != status.member_id) {
            let flags = EtcdFlags { endpoints: member.client_urls.clone(), ..self.settings.etcd.clone() };
            let defragmented = async { Etcd::connect(&flags).await?.0.defragment().await };
            if let Err(error) = defragmented.await {
                tracing::warn!(%error, name = member.name, "a member is not defragmented");
            }
        }
        {
            // Nobody can write anyway, so the leader leads on.
            let _quiet = self.settings.quiet.lock().await;
            etcd.defragment().await?;
        }
        for (member, _) in alarms.iter().filter(|(_, alarm)| *alarm == Alarm::NoSpace) {
            etcd.disarm_no_space(*member).await?;
        }
        tracing::info!("there is space again");
        // Where what is live is more than the quota, it would be the same again.
        tokio::time::sleep(NO_SPACE_PERIOD).await;
        Ok(())
    }
}
