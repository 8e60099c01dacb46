//! Moves what etcd has into the store: a full snapshot when one is due, and deltas all the while.
//!
//! One task watches every key from the revision after the last one backed up. What it receives goes, compressed, into a
//! delta in memory; the delta is closed by period or size and uploaded while the next one fills. A full snapshot runs
//! beside that and stops nothing.
//!
//! # Invariants
//! - The cursor comes from the store's listing or from etcd, never from an earlier run's memory.
//! - A delta ends only where etcd's message ended a revision.
//! - At most two deltas are in memory. While the store does not take one and the next is full, the watch is not read:
//!   etcd keeps the events. Should it compact them away, a full snapshot follows and the gap is reported.

mod full;
mod timeline;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use croner::Cron;
use etcd_client::{EventType, WatchResponse, WatchStream};
use etcd_format::mvcc::KeyValue;
use futures::StreamExt;
use proto::backup::{DeltaEnd, GrantedLease, HashKv, ObjectMeta};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use full::TakenFull;
pub use timeline::{Decision, Seen, decide};

use crate::catalog::{ObjectName, Timeline};
use crate::delta::Builder;
use crate::etcd::{Etcd, EtcdFlags, Status};
use crate::store::Store;
use crate::{Class, Error, Result};

/// Leases listed in each delta; with more, only those that its puts refer to are.
const MOST_LEASES: usize = 20_000;
/// How long an ending run may take to bring its last delta home.
const FLUSH_DEADLINE: Duration = Duration::from_secs(25);
/// Uploads that stayed unfinished for so long have no writer any more.
const ABANDONED_AFTER_MS: i64 = 24 * 3600 * 1000;
/// A member that lags gets so long to reach the revision that is backed up already.
const CATCH_UP: Duration = Duration::from_secs(10);
/// Users and roles are looked at so often.
const AUTH_PERIOD: Duration = Duration::from_secs(10);
/// HashKV makes etcd walk its database. A database up to this size is walked in a moment, so each delta gets a hash;
const SMALL_DB_BYTES: i64 = 64 << 20;
/// a larger one is walked not more often than this, and at the end of a run.
const HASH_PERIOD: Duration = Duration::from_secs(600);

/// What a run goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where etcd is.
    pub etcd: EtcdFlags,
    /// Where backups go.
    pub store: Store,
    /// When full snapshots are due; `None` for only when needed.
    pub full_schedule: Option<Cron>,
    /// A delta is closed at least so often, when there is anything in it.
    pub delta_period: Duration,
    /// A delta is closed when its content reaches so many bytes.
    pub delta_max_bytes: u64,
}

/// What `--once` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A full snapshot.
    Full,
    /// Everything since the last backup, as a delta.
    Delta,
}

/// What `--once` took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    /// A full snapshot.
    Full(TakenFull),
    /// A delta.
    Delta(TakenDelta),
    /// Nothing changed since the last backup, which has this revision.
    Nothing(i64),
}

/// A delta that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenDelta {
    /// Name of the object.
    pub name: ObjectName,
    /// Number of changes in it.
    pub events: u64,
    /// Bytes of the object.
    pub size: u64,
}

fn now_ms() -> i64 {
    Utc::now().timestamp_millis()
}

/// Takes one snapshot and returns.
pub async fn once(settings: &Settings, kind: Kind, stop: &CancellationToken) -> Result<Taken> {
    let (etcd, status) = Etcd::connect(&settings.etcd).await?;
    let mut session = Session::begin(settings, etcd, status, stop).await?;
    match kind {
        Kind::Full => {
            let job = session.full_job();
            Ok(Taken::Full(full::take(job, stop).await?))
        }
        Kind::Delta => {
            let Some(tip) = session.tip else {
                let what = "no full snapshot of this cluster is in the store that a delta could follow; take one with --once full";
                return Err(Error::precondition(what));
            };
            session.delta_once(tip, stop).await
        }
    }
}

/// Backs up until `stop` is cancelled. Trouble with etcd or the store is waited out; only what cannot pass ends the run.
pub async fn run(settings: &Settings, stop: &CancellationToken) -> Result<()> {
    let mut delay = Duration::from_millis(500);
    let mut began = false;
    while !stop.is_cancelled() {
        let started = Instant::now();
        let ended = match Etcd::connect(&settings.etcd).await {
            Ok((etcd, status)) => match Session::begin(settings, etcd, status, stop).await {
                Ok(session) => {
                    began = true;
                    session.run(stop).await
                }
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        let error = match ended {
            Ok(()) => return Ok(()),
            Err(Error::Cancelled) if stop.is_cancelled() => return Ok(()),
            Err(error) => error,
        };
        let passes = match error.class() {
            Class::Transient => true,
            // Worth waiting out once it has worked; at the start it is a mistake somebody wants to hear of.
            Class::Denied | Class::Missing | Class::Machine | Class::Corrupt => began,
            Class::Precondition | Class::Invalid | Class::Cancelled | Class::Bug => false,
        };
        if !passes {
            return Err(error);
        }
        if started.elapsed() > Duration::from_secs(60) {
            delay = Duration::from_millis(500);
        }
        tracing::warn!(%error, retry_in = ?delay, "backup is interrupted; go on from what the store has");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = stop.cancelled() => {}
        }
        delay = (delay * 2).min(Duration::from_secs(15));
    }
    Ok(())
}

/// What outlives one delta.
#[derive(Debug, Default)]
struct Known {
    /// Granted TTLs of leases seen.
    ttls: HashMap<i64, i64>,
    compact_revision: i64,
    /// Raft term and applied index, from before the first event of the delta under way.
    raft: (u64, u64),
    last_hash: Option<Instant>,
}

/// One connection's worth of backing up.
struct Session<'s> {
    settings: &'s Settings,
    etcd: Etcd,
    status: Status,
    timeline: Timeline,
    /// Last revision in the store's chain; `None` when there is no chain to continue.
    tip: Option<i64>,
    /// When the newest full was begun.
    last_full_ms: Option<i64>,
    /// Auth revision of the newest full.
    full_auth: Option<u64>,
    known: Known,
}

/// Why a full snapshot is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    NoChain,
    Schedule,
    AuthChanged,
    Compacted,
}

enum Done {
    Delta(Result<TakenDelta>, Box<Known>),
    Full(Result<TakenFull>),
}

impl<'s> Session<'s> {
    async fn begin(
        settings: &'s Settings,
        mut etcd: Etcd,
        mut status: Status,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let store = &settings.store;
        let catalog = store.catalog().await?;
        for (name, _) in &catalog.uploading {
            if matches!(name, ObjectName::Uploading { unix_ms, .. } if *unix_ms < now_ms() - ABANDONED_AFTER_MS) {
                tracing::info!(object = %name, "remove an upload that was never finished");
                store.remove_uploading(name).await?;
            }
        }
        let deadline = Instant::now() + CATCH_UP;
        let seen = timeline::look(store, &catalog).await?;
        let decision = loop {
            let decision = decide(seen.as_ref(), &status);
            let may_pass = matches!(&decision, Decision::Begin { lag: true, .. })
                && Instant::now() < deadline
                && !stop.is_cancelled();
            if !may_pass {
                break decision;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
            status = etcd.status().await?;
        };
        let known = Known { raft: (status.raft_term, status.raft_applied_index), ..Known::default() };
        let mut session =
            Self { settings, etcd, status, timeline: 1, tip: None, last_full_ms: None, full_auth: None, known };
        match decision {
            Decision::Continue { timeline } => {
                session.timeline = timeline;
                let history = catalog.timelines.get(&timeline).cloned().unwrap_or_default();
                if let Some(chain) = history.newest_chain() {
                    let newest = history.fulls.iter().map(|full| full.unix_ms).max();
                    session.tip = chain.gap.is_none().then_some(chain.last);
                    session.last_full_ms = newest;
                    if let Some(gap) = chain.gap {
                        tracing::error!(
                            after = gap.after,
                            before = gap.before,
                            "revisions are missing in the store: a full snapshot is taken"
                        );
                    }
                    let full =
                        ObjectName::Full { timeline, revision: chain.full.revision, unix_ms: chain.full.unix_ms };
                    let meta = store.meta(&full, chain.full.size).await?;
                    session.full_auth = Some(meta.auth_revision);
                    session.known.compact_revision = meta.compact_revision;
                }
            }
            Decision::Begin { timeline, parent, ref reason, .. } => {
                if parent == 0 {
                    tracing::info!(timeline, "begin the first timeline");
                } else {
                    tracing::warn!(
                        timeline,
                        parent,
                        reason,
                        "begin a new timeline; nothing of the one before is touched"
                    );
                }
                let json = timeline::describe(timeline, parent, reason, &session.status)?;
                store.put_timeline(timeline, json).await?;
                session.timeline = timeline;
            }
        }
        tracing::info!(
            endpoint = session.etcd.endpoint(),
            version = session.status.version,
            revision = session.status.revision,
            timeline = session.timeline,
            backed_up_to = session.tip,
            "connected"
        );
        Ok(session)
    }

    fn meta(&self) -> ObjectMeta {
        ObjectMeta {
            layout: 1,
            cluster_id: self.status.cluster_id,
            member_id: self.status.member_id,
            etcd_version: self.status.version.clone(),
            raft_term: self.known.raft.0,
            raft_index: self.known.raft.1,
            started_unix_ms: now_ms(),
            ..ObjectMeta::default()
        }
    }

    fn full_job(&self) -> full::Job {
        full::Job {
            etcd: self.etcd.clone(),
            store: self.settings.store.clone(),
            timeline: self.timeline,
            meta: self.meta(),
        }
    }

    async fn delta_once(&mut self, tip: i64, stop: &CancellationToken) -> Result<Taken> {
        let target = self.status.revision;
        if target <= tip {
            return Ok(Taken::Nothing(tip));
        }
        let mut watch = self.etcd.watch(tip + 1).await?;
        let mut builder = Builder::new(tip)?;
        let mut whole = true;
        while builder.last() < target || !whole {
            let message = tokio::select! {
                message = watch.message() => message.map_err(|source| self.etcd.stream_error("read the watch", source))?,
                () = stop.cancelled() => return Err(Error::Cancelled),
                () = tokio::time::sleep(Duration::from_secs(60)) => {
                    return Err(Error::precondition(format!("etcd is at revision {target} but sent nothing after {} for a minute", builder.last())));
                }
            };
            let Some(message) = message else { return Err(watch_ended(&self.etcd)) };
            if message.canceled() {
                return Err(cancelled_watch(&self.etcd, &message, builder.last()));
            }
            whole = take_events(&mut builder, message)?;
        }
        let job = self.close_job(builder, true);
        let known = std::mem::take(&mut self.known);
        let (taken, _) = close_delta(job, known, stop.clone()).await;
        taken.map(Taken::Delta)
    }

    fn close_job(&self, builder: Builder, final_hash: bool) -> CloseJob {
        let hash_due = final_hash
            || self.status.db_size < SMALL_DB_BYTES
            || self.known.last_hash.is_some_and(|last| last.elapsed() >= HASH_PERIOD);
        CloseJob {
            etcd: self.etcd.clone(),
            store: self.settings.store.clone(),
            timeline: self.timeline,
            meta: self.meta(),
            builder,
            hash_due,
            is_last: final_hash,
        }
    }

    fn schedule_due(&self, now: chrono::DateTime<Utc>) -> bool {
        let (Some(cron), Some(last)) = (&self.settings.full_schedule, self.last_full_ms) else { return false };
        let last = chrono::DateTime::from_timestamp_millis(last).unwrap_or_default().with_timezone(&chrono::Local);
        // A clock that was set back must not stop full snapshots.
        let last = last.min(now.with_timezone(&chrono::Local));
        cron.find_next_occurrence(&last, false).is_ok_and(|next| next <= now)
    }

    async fn run(mut self, stop: &CancellationToken) -> Result<()> {
        let tasks_stop = CancellationToken::new();
        let _stop_tasks = tasks_stop.clone().drop_guard();
        let mut tasks: JoinSet<Done> = JoinSet::new();
        let result = self.follow(stop, &tasks_stop, &mut tasks).await;
        // A full that is under way is given up and cleaned up; a delta on its way is waited for.
        tasks_stop.cancel();
        let drain = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(FLUSH_DEADLINE, drain).await.is_err() {
            tracing::warn!("an upload did not end within {FLUSH_DEADLINE:?}");
        }
        result
    }

    async fn follow(
        &mut self,
        stop: &CancellationToken,
        tasks_stop: &CancellationToken,
        tasks: &mut JoinSet<Done>,
    ) -> Result<()> {
        self.known.last_hash = Some(Instant::now());
        let start = self.tip.unwrap_or(self.status.revision);
        let mut watch = self.etcd.watch(start + 1).await?;
        let mut builder = Builder::new(start)?;
        let mut whole = true;
        let mut due = if self.tip.is_none() { Some(Due::NoChain) } else { None };
        let (mut full_running, mut delta_running) = (false, false);
        let mut full_retry: Option<Instant> = None;
        let mut rotate = tokio::time::interval(self.settings.delta_period);
        rotate.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut watch_auth = AuthWatch::default();
        let mut auth_tick =
            tokio::time::interval(AUTH_PERIOD.min(self.settings.delta_period.max(Duration::from_secs(1))));
        auth_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rotation_wanted = false;
        loop {
            if due.is_none() && self.schedule_due(Utc::now()) {
                due = Some(Due::Schedule);
            }
            if let Some(why) = due.filter(|_| !full_running && full_retry.is_none_or(|at| at <= Instant::now())) {
                due = None;
                full_running = true;
                tracing::info!(?why, "take a full snapshot");
                let (job, stop) = (self.full_job(), tasks_stop.clone());
                tasks.spawn(async move { Done::Full(full::take(job, &stop).await) });
            }
            let big = builder.content_bytes() >= self.settings.delta_max_bytes;
            if whole && (rotation_wanted || big) && !delta_running {
                rotation_wanted = false;
                if builder.events() > 0 {
                    let next = Builder::new(builder.last())?;
                    let job = self.close_job(std::mem::replace(&mut builder, next), false);
                    let (known, stop) = (std::mem::take(&mut self.known), tasks_stop.clone());
                    delta_running = true;
                    tasks.spawn(async move {
                        let (taken, known) = close_delta(job, known, stop).await;
                        Done::Delta(taken, Box::new(known))
                    });
                }
            }
            // Back-pressure: with one delta on its way and the next one full, events stay with etcd.
            let read = !(whole && delta_running && big);
            tokio::select! {
                message = watch.message(), if read => {
                    let message = message.map_err(|source| self.etcd.stream_error("read the watch", source))?;
                    let Some(message) = message else { return Err(watch_ended(&self.etcd)) };
                    if !message.canceled() {
                        whole = take_events(&mut builder, message)?;
                        continue;
                    }
                    if message.compact_revision() == 0 {
                        return Err(cancelled_watch(&self.etcd, &message, builder.last()));
                    }
                    (watch, builder) = self.restart_after_compaction(builder, message.compact_revision(), stop).await?;
                    whole = true;
                    due = Some(Due::Compacted);
                }
                _ = rotate.tick() => rotation_wanted = true,
                _ = auth_tick.tick() => {
                    if watch_auth.changed(&mut self.etcd, self.full_auth).await {
                        due = due.or(Some(Due::AuthChanged)).filter(|_| !full_running);
                    }
                }
                Some(done) = tasks.join_next() => match done.map_err(|error| Error::task(&error))? {
                    Done::Delta(taken, known) => {
                        delta_running = false;
                        self.known = *known;
                        log_delta(&taken?);
                    }
                    Done::Full(Ok(taken)) => {
                        full_running = false;
                        full_retry = None;
                        self.tip = Some(taken.revision);
                        self.last_full_ms = Some(taken.unix_ms);
                        self.full_auth = Some(taken.auth_revision);
                        watch_auth.rebase();
                        log_full(&taken);
                    }
                    Done::Full(Err(error)) => {
                        full_running = false;
                        let passes = matches!(error.class(), Class::Transient | Class::Denied | Class::Missing | Class::Machine | Class::Corrupt);
                        if !passes {
                            return Err(error);
                        }
                        tracing::error!(%error, "full snapshot failed; deltas go on, it is tried again in 15 s");
                        full_retry = Some(Instant::now() + Duration::from_secs(15));
                        due = Some(if self.tip.is_none() { Due::NoChain } else { Due::Schedule });
                    }
                },
                () = stop.cancelled() => break,
                // Wakes up to look at the schedule and at retries.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
        self.flush(builder, whole, delta_running, tasks).await
    }

    /// Brings the last delta home. Events of a revision that etcd had not sent whole yet are left to the next run.
    async fn flush(
        &mut self,
        builder: Builder,
        whole: bool,
        delta_running: bool,
        tasks: &mut JoinSet<Done>,
    ) -> Result<()> {
        let deadline = Instant::now() + FLUSH_DEADLINE;
        let mut waiting = delta_running;
        while waiting {
            match tokio::time::timeout_at(deadline, tasks.join_next()).await {
                Ok(Some(Ok(Done::Delta(taken, known)))) => {
                    self.known = *known;
                    log_delta(&taken?);
                    waiting = false;
                }
                Ok(Some(_)) => {}
                Ok(None) => waiting = false,
                Err(_) => {
                    return Err(Error::precondition(
                        "the store did not take the last delta in time; the next run continues from what it has",
                    ));
                }
            }
        }
        if builder.events() == 0 || !whole {
            tracing::info!("stopped; nothing was pending");
            return Ok(());
        }
        tracing::info!(first = builder.first(), last = builder.last(), "stopping; flush the pending delta");
        let job = self.close_job(builder, true);
        let closing = close_delta(job, std::mem::take(&mut self.known), CancellationToken::new());
        match tokio::time::timeout_at(deadline, closing).await {
            Ok((taken, _)) => {
                log_delta(&taken?);
                Ok(())
            }
            Err(_) => Err(Error::precondition(
                "the store did not take the last delta in time; the next run continues from what it has",
            )),
        }
    }

    async fn restart_after_compaction(
        &mut self,
        builder: Builder,
        compacted: i64,
        stop: &CancellationToken,
    ) -> Result<(WatchStream, Builder)> {
        let have = builder.last();
        tracing::error!(
            backed_up_to = have,
            compacted,
            "etcd compacted revisions that are in no delta yet; a full snapshot is taken, and no point in time between can be restored"
        );
        if builder.events() > 0 {
            let job = self.close_job(builder, false);
            let (taken, known) = close_delta(job, std::mem::take(&mut self.known), stop.clone()).await;
            self.known = known;
            log_delta(&taken?);
        }
        self.status = self.etcd.status().await?;
        self.tip = None;
        self.known.raft = (self.status.raft_term, self.status.raft_applied_index);
        let now = self.status.revision;
        Ok((self.etcd.watch(now + 1).await?, Builder::new(now)?))
    }
}

fn watch_ended(etcd: &Etcd) -> Error {
    etcd.stream_error("read the watch", tonic::Status::unavailable("the watch ended").into())
}

fn cancelled_watch(etcd: &Etcd, message: &WatchResponse, have: i64) -> Error {
    if message.compact_revision() > 0 {
        return Error::Compacted { have, compacted: message.compact_revision() };
    }
    etcd.stream_error(
        "watch",
        tonic::Status::unavailable(format!("etcd cancelled the watch: {}", message.cancel_reason())).into(),
    )
}

/// Adds a message's events; returns whether the message ended its last revision.
fn take_events(builder: &mut Builder, message: WatchResponse) -> Result<bool> {
    let message = message.0;
    let received = now_ms();
    for event in message.events {
        let is_put = event.r#type() == EventType::Put;
        let Some(kv) = event.kv else { return Err(Error::corrupt("etcd sent an event without a key")) };
        if kv.mod_revision > builder.last() {
            builder.revision(kv.mod_revision, received)?;
        } else if kv.mod_revision < builder.last() || kv.mod_revision < builder.first() {
            continue;
        }
        if is_put {
            builder.put(&KeyValue {
                key: &kv.key,
                create_revision: kv.create_revision,
                mod_revision: kv.mod_revision,
                version: kv.version,
                value: &kv.value,
                lease: kv.lease,
            })?;
        } else {
            builder.delete(&kv.key)?;
        }
    }
    Ok(!message.fragment)
}

/// Notices that users, roles or whether auth is on have changed since the newest full snapshot.
#[derive(Debug, Default)]
struct AuthWatch {
    fingerprint: Option<u64>,
    off: bool,
}

impl AuthWatch {
    async fn changed(&mut self, etcd: &mut Etcd, full_auth: Option<u64>) -> bool {
        if self.off {
            return false;
        }
        let looked = match etcd.auth_revision().await {
            Ok(Some(revision)) => Ok(full_auth.is_some_and(|full| full != revision)),
            Ok(None) => etcd
                .auth_fingerprint()
                .await
                .map(|now| self.fingerprint.replace(now).is_some_and(|before| before != now)),
            Err(error) => Err(error),
        };
        looked.unwrap_or_else(|error| {
            if error.class() == Class::Denied {
                self.off = true;
                tracing::warn!(%error, "this user may not see auth changes; they are backed up with the next scheduled full snapshot only");
            }
            false
        })
    }

    fn rebase(&mut self) {
        self.fingerprint = None;
    }
}

/// What closing a delta needs.
struct CloseJob {
    etcd: Etcd,
    store: Store,
    timeline: Timeline,
    meta: ObjectMeta,
    builder: Builder,
    hash_due: bool,
    is_last: bool,
}

/// Asks etcd what belongs next to the events, and uploads until it is done. An etcd that does not answer costs the delta
/// nothing but those answers.
async fn close_delta(mut job: CloseJob, mut known: Known, stop: CancellationToken) -> (Result<TakenDelta>, Known) {
    let etcd = &mut job.etcd;
    match etcd.compact_revision(known.compact_revision).await {
        Ok(revision) => known.compact_revision = revision,
        Err(error) => tracing::debug!(%error, "compaction revision is not known"),
    }
    let (leases, leases_complete) = leases_of(etcd, &job.builder, &mut known.ttls).await;
    let mut meta = job.meta.clone();
    if job.hash_due {
        match etcd.hash_kv(job.builder.last()).await {
            Ok(live) => {
                known.last_hash = Some(Instant::now());
                meta.hash_kv = Some(HashKv {
                    hash: live.hash,
                    revision: job.builder.last(),
                    compact_revision: live.compact_revision,
                });
            }
            Err(error) => tracing::debug!(%error, "no hash is recorded with this delta"),
        }
    }
    match etcd.status().await {
        Ok(status) => known.raft = (status.raft_term, status.raft_applied_index),
        Err(error) => tracing::debug!(%error, "raft index is not known"),
    }
    let end = DeltaEnd { compact_revision: known.compact_revision, leases, leases_complete, ..DeltaEnd::default() };
    let uploaded = upload_delta(job, end, meta, &stop).await;
    (uploaded, known)
}

async fn upload_delta(job: CloseJob, end: DeltaEnd, meta: ObjectMeta, stop: &CancellationToken) -> Result<TakenDelta> {
    let CloseJob { store, timeline, builder, is_last, .. } = job;
    let name = ObjectName::Delta { timeline, first: builder.first(), last: builder.last(), unix_ms: now_ms() };
    let events = builder.events();
    let content =
        tokio::task::spawn_blocking(move || builder.finish(end, meta)).await.map_err(|error| Error::task(&error))??;
    let size = content.iter().map(Bytes::len).sum::<usize>() as u64;
    let never = CancellationToken::new();
    let stop = if is_last { &never } else { stop };
    store.persist("upload of a delta", stop, || store.put_new(&name, &content)).await?;
    Ok(TakenDelta { name, events, size })
}

/// The leases to record with a delta. Those that its puts refer to are always among them.
async fn leases_of(etcd: &mut Etcd, builder: &Builder, ttls: &mut HashMap<i64, i64>) -> (Vec<GrantedLease>, bool) {
    let listed = etcd.leases().await.inspect_err(|error| tracing::debug!(%error, "leases are not listed"));
    let (mut ids, mut complete) = match listed {
        Ok(ids) if ids.len() <= MOST_LEASES => (ids, true),
        _ => (Vec::new(), false),
    };
    if complete {
        let there: std::collections::HashSet<i64> = ids.iter().copied().collect();
        ttls.retain(|id, _| there.contains(id) || builder.leases().contains(id));
    } else if ttls.len() > 2 * MOST_LEASES {
        ttls.clear();
    }
    ids.extend(builder.leases());
    let unknown: Vec<i64> = ids.iter().copied().filter(|id| !ttls.contains_key(id)).collect();
    let asked = futures::stream::iter(unknown.into_iter().map(|id| {
        let mut etcd = etcd.clone();
        async move { etcd.lease_ttl(id).await.map(|ttl| (id, ttl)) }
    }));
    let mut asked = asked.buffer_unordered(16);
    while let Some(answer) = asked.next().await {
        match answer {
            Ok((id, ttl)) => drop(ttls.insert(id, ttl)),
            Err(error) => {
                complete = false;
                tracing::debug!(%error, "a lease's TTL is not known");
            }
        }
    }
    let leases: BTreeMap<i64, i64> = ids.into_iter().map(|id| (id, ttls.get(&id).copied().unwrap_or(0))).collect();
    (leases.into_iter().map(|(id, ttl)| GrantedLease { id, ttl }).collect(), complete)
}

fn log_delta(taken: &TakenDelta) {
    if let ObjectName::Delta { first, last, .. } = taken.name {
        tracing::info!(first, last, events = taken.events, bytes = taken.size, "delta is in the store");
    }
}

fn log_full(taken: &TakenFull) {
    tracing::info!(
        revision = taken.revision,
        bytes = taken.size,
        db_bytes = taken.db_size,
        "full snapshot is in the store"
    );
}
