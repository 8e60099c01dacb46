//! Bringing an intact member that is merely behind up to date: only what it misses is read and written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use etcd_format::datadir::{Behind, Facts, RealDisk, WantHash, changes};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Aside, Pieces, Progress, Proof, append_deltas, fetch, recorded_hash};
use crate::catalog::{Catalog, Chain, Delta, Full, History, ObjectName, Timeline};
use crate::delta::COMPARED;
use crate::object::RevisionDigests;
use crate::store::Store;
use crate::{Error, Result};

/// A member that was brought up to date.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Appended {
    /// Its data directory.
    pub data_dir: PathBuf,
    /// The timeline that it follows.
    pub timeline: Timeline,
    /// Revision that it had.
    pub from_revision: i64,
    /// Revision that it has.
    pub revision: i64,
    /// Changes appended.
    pub events: u64,
    /// Bytes of its database.
    pub db_size: u64,
    /// Leases that live keys need and whose TTL was not in the backup.
    pub leases_with_guessed_ttl: Vec<String>,
    /// What was proved; `None` when there was nothing to append.
    pub proof: Option<Proof>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// Appends to the member in `data_dir` what it misses of a store's newest timeline, or of another. Refuses, with an error of
/// class [`Precondition`](crate::Class::Precondition), what is not provably of the same history; the member is then what it
/// was.
#[tracing::instrument(skip_all)]
pub async fn append(
    store: &Store,
    data_dir: &Path,
    timeline: Option<Timeline>,
    stop: &CancellationToken,
    progress: impl Fn(Progress) + Send + 'static,
) -> Result<Appended> {
    let started = Instant::now();
    let place = data_dir.display().to_string();
    let opened = blocking({
        let (place, data_dir) = (place.clone(), data_dir.to_owned());
        move || Behind::open(RealDisk, &data_dir).map_err(Error::format(place))
    });
    let behind = opened.await?;
    let facts = behind.facts().clone();
    let catalog = store.catalog().await?;
    let (timeline, history) = find_timeline(store, &catalog, timeline)?;
    let chain = chain_after(store, timeline, history, &facts)?;
    let behind = check_same_history(store, timeline, history, data_dir, behind).await?;
    let mut appended = Appended {
        data_dir: data_dir.to_owned(),
        timeline,
        from_revision: facts.revision,
        revision: facts.revision,
        events: 0,
        db_size: 0,
        leases_with_guessed_ttl: Vec::new(),
        proof: None,
        seconds: 0.0,
    };
    if chain.deltas.is_empty() {
        return Ok(appended);
    }
    check_auth(store, timeline, history, &facts).await?;
    check_log(store, timeline, history, &facts).await?;
    let objects: Vec<_> = chain.objects(timeline).into_iter().skip(1).collect();
    let named = objects.iter().map(|(name, _)| (*name, store.location(name))).collect();
    let (feeder, received) = fetch(store.clone(), objects, stop.clone());
    let work = Work { behind, place, named, facts, stop: stop.clone() };
    let done = blocking(move || work.run(received, &progress)).await;
    feeder.abort();
    let (restored, proof) = done?;
    appended.revision = restored.revision;
    appended.events = restored.events;
    appended.db_size = restored.db_size;
    appended.leases_with_guessed_ttl = restored.guessed_leases.iter().map(|id| format!("{id:x}")).collect();
    appended.proof = Some(proof);
    appended.seconds = started.elapsed().as_secs_f64();
    Ok(appended)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::task(&error))?
}

fn find_timeline<'c>(store: &Store, catalog: &'c Catalog, wanted: Option<Timeline>) -> Result<(Timeline, &'c History)> {
    let url = store.url();
    if let Some(wanted) = wanted {
        let found = catalog.timelines.get(&wanted).map(|history| (wanted, history));
        return found.ok_or_else(|| Error::missing(format!("store {url} has no timeline {wanted}")));
    }
    let what = format!("store {url} has no full snapshot, so nothing can be told from it");
    catalog.newest_restorable().ok_or_else(|| Error::missing(what))
}

/// The deltas that the member misses, as a chain that begins with it.
fn chain_after(store: &Store, timeline: Timeline, history: &History, facts: &Facts) -> Result<Chain> {
    let url = store.url();
    let member = Full { revision: facts.revision, unix_ms: 0, size: 0, gardener: None };
    let chain = history.chain_from(member);
    if let Some(gap) = chain.gap {
        let (first, last) = (gap.after + 1, gap.before - 1);
        return Err(Error::missing(format!(
            "the member is at revision {}; deltas of revisions {first} to {last} are missing in timeline {timeline} of store {url}: restore it whole",
            facts.revision
        )));
    }
    let furthest = history.newest_chain().map_or(chain.last, |newest| newest.last);
    if facts.revision > furthest {
        return Err(Error::precondition(format!(
            "the member is at revision {}, ahead of timeline {timeline} of store {url}, which ends at {furthest}",
            facts.revision
        )));
    }
    if chain.last < furthest {
        let (have, last) = (facts.revision, chain.last);
        return Err(Error::missing(format!(
            "the member is at revision {have}; deltas lead from there to {last} but the backup has revision {furthest}: restore it whole"
        )));
    }
    let after_log = facts.revision.saturating_add(i64::try_from(facts.unapplied).unwrap_or(i64::MAX));
    if facts.unapplied > 0 && after_log > chain.last {
        return Err(Error::precondition(format!(
            "the member's log has {} entries that its database lacks, which may lead beyond revision {}, where the backup ends: start etcd on it, it is not behind",
            facts.unapplied, chain.last
        )));
    }
    Ok(chain)
}

/// Users and roles are in full snapshots only.
async fn check_auth(store: &Store, timeline: Timeline, history: &History, facts: &Facts) -> Result<()> {
    let Some(full) = history.fulls.last() else { return Ok(()) };
    let meta = store.meta(&full.name(timeline), full.size).await?;
    if meta.is_some_and(|meta| meta.auth_revision > facts.auth_revision) {
        return Err(Error::precondition(
            "users or roles have changed since the member stopped, which no delta holds: restore it whole",
        ));
    }
    Ok(())
}

/// Entries of the log that the database lacks are taken to be in the deltas. They are not when the log is of a restore since.
async fn check_log(store: &Store, timeline: Timeline, history: &History, facts: &Facts) -> Result<()> {
    if facts.unapplied == 0
        || is_of_its_log(store, timeline, history, facts.revision, facts.applied, 0).await? == Some(true)
    {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "the member's log has {} entries that its database lacks, and nothing shows that the backup has them: start etcd on it, or restore it whole",
        facts.unapplied
    )))
}

/// Whether a member at a revision, whose database has applied (index, term) of its log, has the log that was backed up. It has
/// not when it was restored since: its index is then nearer to the revision than it was when that was backed up, as
/// `timeline::decide` has it; by more than `slack`. `None` when no backup up to the revision tells.
pub async fn is_of_its_log(
    store: &Store,
    timeline: Timeline,
    history: &History,
    revision: i64,
    (applied, term): (u64, u64),
    slack: i128,
) -> Result<Option<bool>> {
    let fulls = history.fulls.iter().map(|full| (full.revision, full.name(timeline), full.size));
    let deltas = history.deltas.iter().map(|delta| (delta.last, delta.name(timeline), delta.size));
    let before = fulls.chain(deltas).filter(|(last, ..)| *last <= revision).max_by_key(|(last, ..)| *last);
    let Some((_, name, size)) = before else { return Ok(None) };
    let distance = |index: u64, revision: i64| i128::from(index) - i128::from(revision);
    let meta = store.meta(&name, size).await?;
    Ok(meta.map(|meta| {
        let lacks = distance(meta.raft_index, meta.last_revision) - distance(applied, revision);
        lacks <= slack && term >= meta.raft_term
    }))
}

/// Of the last revisions of the member in a data directory, between its compaction and its own, those that the backup has too, in
/// order: whether each is the same there.
pub async fn compare_end(
    store: &Store,
    (timeline, cluster_id): (Timeline, u64),
    history: &History,
    data_dir: &Path,
    (compacted, revision): (i64, i64),
) -> Result<Vec<bool>> {
    let lowest = (revision - COMPARED + 1).max(compacted + 1);
    let mut agree = BTreeMap::new();
    for delta in history.deltas.iter().filter(|delta| delta.first <= revision && delta.last >= lowest) {
        if store.meta(&delta.name(timeline), delta.size).await?.is_some_and(|meta| meta.cluster_id != cluster_id) {
            // It went astray.
            continue;
        }
        agree.extend(agreement(store, timeline, *delta, data_dir, (lowest, revision)).await?);
    }
    Ok(agree.into_values().collect())
}

/// Of the revisions of a delta within a range, whether each is the same in the member in a data directory.
async fn agreement(
    store: &Store,
    timeline: Timeline,
    delta: Delta,
    data_dir: &Path,
    (lowest, highest): (i64, i64),
) -> Result<BTreeMap<i64, bool>> {
    let (name, data_dir) = (delta.name(timeline), data_dir.to_owned());
    let object = store.get_whole(&name, delta.size).await?;
    let location = store.location(&name);
    let (first, last) = (delta.first.max(lowest), delta.last.min(highest));
    blocking(move || {
        let expected = RevisionDigests::of_delta(&name, &object, &location, first, last)?.into_map();
        let mut found = RevisionDigests::default();
        let see = &mut |main, is_put, bytes: &[u8]| found.add(main, is_put, bytes);
        changes(&data_dir, first, last, see).map_err(Error::format("compare the member"))?;
        let found = found.into_map();
        Ok(expected.iter().map(|(revision, digest)| (*revision, found.get(revision) == Some(digest))).collect())
    })
    .await
}

/// Compares the last revisions of the member with what the backup has under the same numbers.
async fn check_same_history(
    store: &Store,
    timeline: Timeline,
    history: &History,
    data_dir: &Path,
    behind: Behind<RealDisk>,
) -> Result<Behind<RealDisk>> {
    let facts = behind.facts().clone();
    let at = facts.revision;
    let other = |how: String| {
        let url = store.url();
        Error::precondition(format!(
            "the member holds another history than timeline {timeline} of store {url}: {how}; restore it whole"
        ))
    };
    let lowest = (at - COMPARED + 1).max(facts.compaction.revision() + 1);
    let overlaps = |delta: &&Delta| delta.first <= at && delta.last >= lowest;
    let deltas: Vec<Delta> = history.deltas.iter().filter(overlaps).copied().collect();
    if deltas.iter().any(|delta| delta.last >= at) && at >= lowest {
        for delta in deltas {
            check_cluster(store, &delta.name(timeline), delta.size, facts.cluster_id).await?;
            let agree = agreement(store, timeline, delta, data_dir, (lowest, at)).await?;
            if let Some((revision, _)) = agree.iter().find(|(_, agrees)| !**agrees) {
                return Err(other(format!("revision {revision} differs")));
            }
        }
        return Ok(behind);
    }
    // Where the last thing of the member is a full snapshot's revision: by the hash that was recorded with it.
    for full in history.fulls.iter().filter(|full| full.revision == at) {
        let name = full.name(timeline);
        let Some(meta) = store.meta(&name, full.size).await? else { continue };
        let Some(recorded) = recorded_hash(&meta) else { continue };
        let compact_revision = recorded.hash.compact_revision.max(0);
        if recorded.hash.revision != at || compact_revision < facts.compaction.revision() {
            continue;
        }
        check_cluster(store, &name, full.size, facts.cluster_id).await?;
        let request = recorded.request(facts.clean_up_to);
        let (found, behind) = blocking(move || {
            let found = behind.hash_kv(request).map_err(Error::format("compare the member"))?;
            Ok((found, behind))
        })
        .await?;
        return if found.may_be(recorded.hash.hash) {
            Ok(behind)
        } else {
            Err(other(format!("HashKV at revision {at} is {}, etcd's own was {}", found.hash, recorded.hash.hash)))
        };
    }
    Err(Error::precondition(format!(
        "nothing in store {} shows that the member, at revision {at}, is of the same history: no delta has that revision, and no full snapshot its hash; restore it whole",
        store.url()
    )))
}

async fn check_cluster(store: &Store, name: &ObjectName, size: u64, cluster_id: u64) -> Result<()> {
    match store.meta(name, size).await?.map(|meta| meta.cluster_id) {
        Some(theirs) if theirs != cluster_id => Err(Error::precondition(format!(
            "the member is of cluster {cluster_id:x}, {} of cluster {theirs:x}: restore it whole",
            store.location(name)
        ))),
        _ => Ok(()),
    }
}

/// Everything that the appending thread works with.
struct Work {
    behind: Behind<RealDisk>,
    place: String,
    named: Vec<(ObjectName, String)>,
    facts: Facts,
    stop: CancellationToken,
}

impl Work {
    fn run(self, mut received: Pieces, progress: &dyn Fn(Progress)) -> Result<(etcd_format::datadir::Restored, Proof)> {
        let fail = || Error::format(format!("append to {}", self.place));
        let (tail, held) = self.behind.into_tail().map_err(fail())?;
        // Declared after it, so that nothing writes any more when an error drops them.
        let mut tail = tail;
        let mut aside = Aside { cluster_id: self.facts.cluster_id, ..Aside::default() };
        let base_revision = self.facts.revision;
        append_deltas(&mut tail, &self.named, &mut received, (None, base_revision), &mut aside, &self.stop, progress)?;
        let appended = tail.finish_behind(held, aside.compact_revision, &aside.lease_ttls, &aside.live_leases);
        let appended = appended.map_err(fail())?;
        progress(Progress::Verify);
        let recorded = aside.recorded;
        let usable =
            recorded.filter(|recorded| recorded.hash.compact_revision.max(0) >= self.facts.compaction.revision());
        let hash = usable.map(|recorded| WantHash::At(recorded.request(self.facts.clean_up_to)));
        let summary = appended.check(hash).map_err(fail())?;
        let proof = Proof::of(&summary, recorded, usable)?;
        if self.stop.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok((appended.commit().map_err(fail())?, proof))
    }
}
