//! Closing a delta: what etcd is asked beside its events, and the upload.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use proto::backup::{DeltaEnd, GrantedLease, HashKv, ObjectMeta};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::now_ms;
use super::own::{Own, Whose};
use crate::catalog::{History, Layout, ObjectName};
use crate::delta::{self, Builder};
use crate::etcd::{Etcd, Status};
use crate::metrics::Metrics;
use crate::store::Store;
use crate::{Class, Error, Result};
use crate::{container, gardener};

/// So many leases are asked about again at once,
const LEASES_AGAIN: usize = 512;
/// and not more often than this: each question is a request to etcd's leader.
const LEASES_PERIOD: Duration = Duration::from_secs(10);
/// Leases listed in each delta; with more, only those that its puts refer to are.
const MOST_LEASES: usize = 20_000;
/// How long a question to etcd may take that a delta can do without,
const QUESTION: Duration = Duration::from_secs(120);
/// and how long all of them, at the end of a run.
const LAST_QUESTIONS: Duration = Duration::from_secs(5);
/// HashKV makes etcd walk its database. A database up to this size is walked in a moment, so each delta gets a hash;
const SMALL_DB_BYTES: i64 = 64 << 20;
/// a larger one is walked not more often than this, and at the end of a run.
const HASH_PERIOD: Duration = Duration::from_secs(600);

/// A delta that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenDelta {
    /// Name of the object.
    pub name: ObjectName,
    /// Number of changes in it.
    pub events: u64,
    /// Bytes of the object.
    pub size: u64,
    /// Whether it has a revision that the predecessor's restore cannot replay, when it is to be read by that.
    pub is_too_large_to_replay: bool,
}

/// Where a cluster stands in its raft log; see [`super::timeline::decide`].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Position {
    pub term: u64,
    /// Applied raft index minus revision, a lower bound: the index is asked for before the revision.
    pub distance: i64,
}

impl Position {
    pub(super) fn between(earlier: &Status, later: &Status) -> Self {
        let distance = i64::try_from(earlier.raft_applied_index).unwrap_or(i64::MAX).saturating_sub(later.revision);
        Self { term: earlier.raft_term, distance }
    }

    pub(super) fn mark(self, meta: &mut ObjectMeta, last_revision: i64) {
        meta.raft_term = self.term;
        meta.raft_index = u64::try_from(last_revision.saturating_add(self.distance)).unwrap_or(0);
    }
}

/// What outlives one delta.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Granted TTLs of leases seen.
    pub ttls: HashMap<i64, i64>,
    pub compact_revision: i64,
    pub position: Position,
    pub db_size: i64,
    pub last_hash: Option<Instant>,
    /// When leases were asked about again, and the last of them.
    pub leases_asked: Option<Instant>,
    pub lease_cursor: i64,
}

/// What is asked of etcd when a delta is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// Everything.
    All,
    /// Everything that is answered quickly, and the hash: the run ends.
    Last,
    /// Nothing: etcd is gone.
    Nothing,
}

/// What closing a delta needs.
pub(super) struct CloseJob {
    pub etcd: Etcd,
    pub store: Store,
    pub layout: Layout,
    pub own: Own,
    /// The object that it follows; none while the first full snapshot is on its way.
    pub follows: Option<ObjectName>,
    pub meta: ObjectMeta,
    pub builder: Builder,
    pub ask: Ask,
    pub metrics: Arc<Metrics>,
}

/// A question that the delta can do without.
async fn ask<T>(until: Instant, what: &str, question: impl Future<Output = Result<T>>) -> Option<T> {
    match tokio::time::timeout_at(until, question).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::debug!(%error, "{what} is not known");
            None
        }
        Err(_) => {
            tracing::debug!("{what} is not known in time");
            None
        }
    }
}

/// Asks etcd what belongs next to the events, and uploads until it is done. An etcd that does not answer costs the delta
/// nothing but those answers.
#[tracing::instrument(name = "delta", skip_all, fields(timeline = job.own.timeline, first = job.builder.first(), last = job.builder.last()))]
pub(super) async fn close_delta(
    mut job: CloseJob,
    mut known: Known,
    stop: CancellationToken,
) -> (Result<TakenDelta>, Known) {
    let last = job.builder.last();
    let mut end = DeltaEnd { compact_revision: known.compact_revision, ..DeltaEnd::default() };
    let mut leases = None;
    if job.ask != Ask::Nothing {
        let (asks, limit) = (job.ask, Instant::now() + LAST_QUESTIONS);
        let until = || if asks == Ask::Last { limit } else { Instant::now() + QUESTION };
        let etcd = &mut job.etcd;
        leases = ask(until(), "leases", async { Ok(leases_of(etcd, &job.builder, &mut known).await) }).await;
        if let Some(revision) = ask(until(), "compaction revision", etcd.compact_revision(known.compact_revision)).await
        {
            known.compact_revision = revision;
            end.compact_revision = revision;
        }
        let position = async {
            let earlier = etcd.status().await?;
            Ok((earlier, etcd.status().await?))
        };
        if let Some((earlier, later)) = ask(until(), "raft index", position).await {
            known.position = Position::between(&earlier, &later);
            known.db_size = later.db_size;
        }
        if known.hash_is_due(job.ask)
            && let Some(live) = ask(until(), "hash", etcd.hash_kv(last)).await
        {
            known.last_hash = Some(Instant::now());
            job.meta.hash_kv =
                Some(HashKv { hash: live.hash, revision: last, compact_revision: live.compact_revision });
        }
    }
    // What was answered in time is remembered, also when not all was.
    (end.leases, end.leases_complete) =
        leases.unwrap_or_else(|| (job.builder.leases().iter().map(|id| known.granted(*id)).collect(), false));
    known.position.mark(&mut job.meta, last);
    let uploaded = upload_delta(job, end, &stop).await;
    (uploaded, known)
}

impl Known {
    fn hash_is_due(&self, ask: Ask) -> bool {
        ask == Ask::Last
            || self.db_size < SMALL_DB_BYTES
            || self.last_hash.is_none_or(|last| last.elapsed() >= HASH_PERIOD)
    }

    fn granted(&self, id: i64) -> GrantedLease {
        GrantedLease { id, ttl: self.ttls.get(&id).copied().unwrap_or(0) }
    }
}

async fn upload_delta(job: CloseJob, end: DeltaEnd, stop: &CancellationToken) -> Result<TakenDelta> {
    let CloseJob { store, layout, own, follows, builder, meta, metrics, .. } = job;
    let (first, last, mut unix_ms) = (builder.first(), builder.last(), now_ms());
    let events = builder.events();
    let made = tokio::task::spawn_blocking(move || make(builder, layout, end, meta)).await;
    let (content, is_too_large_to_replay) = made.map_err(|error| Error::task(&error))??;
    let size = content.iter().map(Bytes::len).sum::<usize>() as u64;
    loop {
        let name = layout.delta(own.timeline, first, last, unix_ms);
        // Or says why not, when it must not be put there at all.
        let put = || async {
            match own.look(&store).await? {
                Whose::Ours => {}
                Whose::Anothers(what) => return Err(Error::missing(what)),
                Whose::OursElsewhere(what) => return Ok(Some(what)),
            }
            if !leads_to(&store, own, follows, first).await? {
                let url = store.url();
                return Ok(Some(format!("{url}: what came before revision {first} is there no longer")));
            }
            store.put_new(&name, &content).await.map(|()| None)
        };
        match store.persist("upload of a delta", stop, |error| metrics.interrupted(error), put).await {
            Ok(None) => return Ok(TakenDelta { name, events, size, is_too_large_to_replay }),
            Ok(Some(why)) => {
                return Err(Error::missing(format!("{why}; revisions from {first} on are taken again from etcd")));
            }
            // Another writer closed the same revisions in the same moment, which is legal.
            Err(error) if error.class() == Class::Precondition && unix_ms < now_ms() + 1000 * layout.tick_ms() => {
                unix_ms += layout.tick_ms();
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether the store has all that comes before a delta. It may have been away since that was put, and something else in its
/// place: what went there leaves a hole, and what is put behind a hole cannot be restored.
async fn leads_to(store: &Store, own: Own, follows: Option<ObjectName>, first: i64) -> Result<bool> {
    let Some(follows) = follows else { return Ok(true) };
    if store.exists(&follows).await? {
        return Ok(true);
    }
    // A compaction may have taken its place, and a collection it.
    let catalog = store.catalog().await?;
    let chain = catalog.timelines.get(&own.timeline).and_then(History::newest_chain);
    Ok(chain.is_some_and(|chain| chain.last >= first - 1))
}

/// The object, and whether it has a revision too large for the predecessor.
fn make(builder: Builder, layout: Layout, end: DeltaEnd, meta: ObjectMeta) -> Result<(Vec<Bytes>, bool)> {
    let content = builder.finish(end, meta)?;
    if layout == Layout::Steward {
        return Ok((content, false));
    }
    let name = "the delta to be uploaded";
    let container = container::Reader::new(io::Cursor::new(content.concat()), name)?;
    let encoded = gardener::encode(&mut delta::Reader::new(io::BufReader::new(container), name))?;
    Ok((vec![encoded.object], encoded.is_too_large_to_replay))
}

/// Granted TTLs of leases, 0 for those that are gone; and whether all are known.
pub(super) async fn ttls_of(etcd: &Etcd, ids: Vec<i64>) -> (Vec<(i64, i64)>, bool) {
    let asked = futures::stream::iter(ids.into_iter().map(|id| {
        let mut etcd = etcd.clone();
        async move { etcd.lease_ttl(id).await.map(|ttl| (id, ttl)) }
    }));
    let answers: Vec<Result<(i64, i64)>> = asked.buffer_unordered(16).collect().await;
    let known = |answer: Result<(i64, i64)>| {
        answer.inspect_err(|error| tracing::debug!(%error, "a lease's TTL is not known")).ok()
    };
    let asked = answers.len();
    let known: Vec<_> = answers.into_iter().filter_map(known).collect();
    let all = known.len() == asked;
    (known, all)
}

/// The leases to record with a delta. Those that its puts refer to are always among them.
async fn leases_of(etcd: &mut Etcd, builder: &Builder, known: &mut Known) -> (Vec<GrantedLease>, bool) {
    let ttls = &mut known.ttls;
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
    ids.sort_unstable();
    ids.dedup();
    // An id may be revoked and granted anew with another TTL. Its puts show that; of the others some are asked about again
    // each time, in turn.
    let (own, other): (Vec<i64>, Vec<i64>) = ids.iter().partition(|id| builder.leases().contains(id));
    let (seen, unseen): (Vec<i64>, Vec<i64>) = other.into_iter().partition(|id| ttls.contains_key(id));
    let most = if known.leases_asked.is_none_or(|at| at.elapsed() >= LEASES_PERIOD) { LEASES_AGAIN } else { 0 };
    if most > 0 {
        known.leases_asked = Some(Instant::now());
    }
    let turn = seen.partition_point(|id| *id <= known.lease_cursor);
    let again: Vec<i64> = seen.iter().cycle().skip(turn).take(seen.len().min(most)).copied().collect();
    known.lease_cursor = again.last().copied().unwrap_or(known.lease_cursor);
    let unknown: Vec<i64> = own.into_iter().chain(unseen).chain(again).collect();
    let (answers, all) = ttls_of(etcd, unknown).await;
    complete &= all;
    for (id, ttl) in answers {
        // Gone: not remembered, an id may be granted again.
        let _ = if ttl == 0 { ttls.remove(&id) } else { ttls.insert(id, ttl) };
    }
    let leases: BTreeMap<i64, i64> = ids.into_iter().map(|id| (id, ttls.get(&id).copied().unwrap_or(0))).collect();
    (leases.into_iter().map(|(id, ttl)| GrantedLease { id, ttl }).collect(), complete)
}

pub(super) fn log_delta(taken: &TakenDelta) {
    if let Some((first, last)) = taken.name.revisions() {
        tracing::info!(first, last, events = taken.events, bytes = taken.size, "delta is in the store");
    }
}
