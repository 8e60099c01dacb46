//! Whether a live cluster continues the history that the store has.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use etcd_client::EventType;
use etcd_format::mvcc::KeyValue;
use proto::backup::ObjectMeta;
use tokio::time::Instant;

use crate::catalog::{Catalog, Chain, Delta, History, ObjectName, PREDECESSOR, Timeline};
use crate::etcd::{Etcd, EtcdFlags, Listed, Status};
use crate::kinship::begun_with;
use crate::object::RevisionDigests;
use crate::store::Store;
use crate::{Class, Error, Result};

/// Damaged objects that are passed over before the search is given up.
const MOST_LOOKS: usize = 16;

/// The newest object of the newest timeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// The timeline.
    pub timeline: Timeline,
    /// Metadata of its newest full or delta that can be read; `None` when it has none yet.
    pub newest: Option<ObjectMeta>,
    /// Id of the cluster that the timeline was begun with, where that is known.
    pub begun_with: Option<u64>,
    /// A newer one cannot be read, so nothing should be built upon the chain.
    pub newer_is_damaged: bool,
}

impl Seen {
    /// The cluster that the timeline is of, when that is another; 0 where nothing says of which it is.
    pub fn foreign_cluster(&self, cluster_id: u64) -> Option<u64> {
        // What it was begun with counts before its newest object: one of ours that went astray does not make it ours.
        let newest = self.newest.as_ref().map(|newest| newest.cluster_id);
        self.begun_with.into_iter().chain(newest).find(|theirs| *theirs != cluster_id)
    }
}

/// Where backups of this cluster go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Into the timeline there is.
    Continue {
        /// Which.
        timeline: Timeline,
    },
    /// Into a new one.
    Begin {
        /// Its number.
        timeline: Timeline,
        /// The one before it, 0 for none.
        parent: Timeline,
        /// Why.
        reason: String,
    },
}

/// Decides by what never goes back in the life of a cluster: its id, its term, its revision, and the distance between raft
/// index and revision, which grows because every revision takes an entry of the log and not every entry makes a revision.
/// A restore starts the log anew, so the distance falls.
///
/// `live` must have been asked after a linearizable read: a member that lags looks like one that was restored.
pub fn decide(seen: Option<&Seen>, live: &Status) -> Decision {
    let Some(seen) = seen else {
        return Decision::Begin { timeline: 1, parent: 0, reason: "first backup into this store".into() };
    };
    let begin = |reason| Decision::Begin { timeline: seen.timeline.saturating_add(1), parent: seen.timeline, reason };
    if let Some(theirs) = seen.foreign_cluster(live.cluster_id) {
        let ours = live.cluster_id;
        return begin(match theirs {
            0 => format!("nothing says whether the backups in the store are of cluster {ours:x}"),
            _ => format!("cluster {ours:x} is not the cluster {theirs:x} whose backups the store has"),
        });
    }
    let Some(newest) = &seen.newest else { return Decision::Continue { timeline: seen.timeline } };
    if live.revision < newest.last_revision {
        return begin(format!(
            "etcd is at revision {}, the backup at {}: this etcd was restored from an earlier point",
            live.revision, newest.last_revision
        ));
    }
    let distance = |index: u64, revision: i64| i128::from(index) - i128::from(revision);
    let log_is_younger = distance(live.raft_index, live.revision) < distance(newest.raft_index, newest.last_revision);
    if log_is_younger || live.raft_term < newest.raft_term {
        return begin(format!(
            "raft log of this etcd (term {}, index {}) is not the one that was backed up (term {}, index {}): this etcd was restored",
            live.raft_term, live.raft_index, newest.raft_term, newest.raft_index
        ));
    }
    Decision::Continue { timeline: seen.timeline }
}

/// Reads what [`decide`] needs from the store: the metadata of the newest object that can be read.
pub async fn look(store: &Store, catalog: &Catalog) -> Result<Option<Seen>> {
    let Some((timeline, history)) = catalog.newest().filter(|(timeline, _)| *timeline != PREDECESSOR) else {
        return Ok(None);
    };
    let fulls = history.fulls.iter().map(|full| (full.revision, full.unix_ms, full.name(timeline), full.size));
    let deltas = history.deltas.iter().map(|delta| (delta.last, delta.unix_ms, delta.name(timeline), delta.size));
    let mut objects: Vec<_> = fulls.chain(deltas).collect();
    objects.sort_unstable_by_key(|(last, unix_ms, ..)| std::cmp::Reverse((*last, *unix_ms)));
    let mut seen = Seen { timeline, newest: None, begun_with: None, newer_is_damaged: false };
    seen.begun_with = begun_with(store, timeline).await?;
    for (_, _, name, size) in objects.into_iter().take(MOST_LOOKS) {
        match store.meta(&name, size).await {
            Ok(meta) => {
                seen.newest = meta;
                break;
            }
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                tracing::error!(%error, "a backup object is damaged; look at the one before it");
                seen.newer_is_damaged = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(seen))
}

/// What the live etcd's own content says of a chain that its numbers let it continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// It has what the chain ends with.
    Same,
    /// It holds another history, and how that shows.
    Differs(String),
    /// It should hold the same, and another member does, whose id this is.
    Damaged {
        /// How that shows.
        why: String,
        /// The other.
        intact: u64,
    },
    /// There is nothing left to compare: etcd compacted it.
    Impossible {
        /// Up to this revision.
        compacted: i64,
    },
}

/// The end of a chain, to be found again in a live etcd.
#[derive(Debug, Clone, Copy)]
pub struct ChainEnd<'c> {
    /// Where it is.
    pub store: &'c Store,
    /// The timeline that it is in.
    pub timeline: Timeline,
    /// All of that.
    pub history: &'c History,
    /// The chain.
    pub chain: &'c Chain,
    /// Metadata of its full snapshot.
    pub full: Option<&'c ObjectMeta>,
}

/// What one member has of it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Has {
    /// The same.
    Same(By),
    /// Something else: how that shows, and a number that is equal where what they have is.
    Other { by: By, why: String, own: u64 },
    /// Nothing that could be compared; compacted up to this revision.
    Nothing { compacted: i64 },
}

/// How members are compared. One that is compared by its last events alone may differ in others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Hash,
    Events,
}

impl ChainEnd<'_> {
    /// Compares what etcd itself says of the last revision backed up: its hash, where one was recorded with it and no
    /// compaction came between; and the events of the last revisions, where the chain ends in a delta and they are not
    /// compacted. Where that differs the other members are asked, and most of them decide. Fails while they do not.
    pub async fn compare(&self, etcd: &mut Etcd, (flags, endpoints): (&EtcdFlags, &[String])) -> Result<Comparison> {
        let (by, why, own) = match self.find_in(etcd).await? {
            Has::Same(_) => return Ok(Comparison::Same),
            Has::Nothing { compacted } => return Ok(Comparison::Impossible { compacted }),
            Has::Other { by, why, own } => (by, why, own),
        };
        let ours = etcd.status().await?.member_id;
        let mut others = Vec::new();
        for other in etcd.members().await?.into_iter().filter(|other| other.id != ours && !other.is_learner) {
            let found = async { self.find_in(&mut reach(flags, &other, endpoints).await?).await };
            let votes = match found.await {
                Ok(Has::Same(found_by)) if found_by == by => Vote::AsBackedUp,
                Ok(Has::Other { by: found_by, own: theirs, .. }) if found_by == by && theirs == own => Vote::AsOurs,
                Ok(_) => Vote::Neither,
                Err(error) => {
                    tracing::warn!(%error, name = other.name, "a member is not compared with the backups");
                    Vote::Neither
                }
            };
            others.push((other.id, votes));
        }
        let settled = settle(&others).ok_or_else(|| Error::Unanswered {
            what: format!(
                "{why}, and the other members do not settle whether it is this one that is wrong: see that they run and can be reached at their client URLs"
            ),
        })?;
        Ok(match settled {
            Settled::Damaged { intact } => Comparison::Damaged { why, intact },
            Settled::Restored => Comparison::Differs(format!("{why}: this etcd was restored")),
            Settled::OthersDamaged(ids) => Comparison::Differs(format!(
                "{why}, as it still is on member {ids}, and most members have something else: the data of that member is damaged, and so are the backups of it"
            )),
        })
    }

    /// The same, of one member.
    async fn find_in(&self, etcd: &mut Etcd) -> Result<Has> {
        let Self { store, timeline, history, chain, full } = *self;
        // A full that was made of the deltas before it has what they end with.
        let ends_with = || history.deltas.iter().rev().find(|delta| delta.last == chain.last);
        let last = chain.deltas.last().or_else(ends_with);
        let name = last.map(|delta| delta.name(timeline));
        let recorded = match (name, last) {
            (Some(name), Some(delta)) => store.meta(&name, delta.size).await?.and_then(|meta| meta.hash_kv),
            _ => full.and_then(|full| full.hash_kv),
        };
        if let Some(recorded) = recorded.filter(|recorded| recorded.revision == chain.last) {
            match etcd.hash_kv(recorded.revision).await {
                Ok(live) if live.compact_revision == recorded.compact_revision.max(0) => {
                    if live.hash == recorded.hash {
                        return Ok(Has::Same(By::Hash));
                    }
                    let (revision, own, theirs) = (chain.last, live.hash, recorded.hash);
                    let why = format!("HashKV at revision {revision} is {own}, it was {theirs} when it was backed up");
                    return Ok(Has::Other { by: By::Hash, why, own: own.into() });
                }
                Err(error) if error.class() == Class::Transient => return Err(error),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "no hash to compare with"),
            }
        }
        // Releases that drop a tombstone at the compaction revision no longer have all of that revision.
        let compacted = etcd.compact_revision(0).await?;
        let nothing = Has::Nothing { compacted };
        let (Some(name), Some(delta)) = (name, last) else { return Ok(nothing) };
        if compacted >= chain.last {
            return Ok(nothing);
        }
        let mut expected = revisions(store, &name, delta, COMPARED).await?;
        expected.retain(|revision, _| *revision > compacted);
        let Some(first) = expected.keys().next().copied() else { return Ok(nothing) };
        let found = match live_revisions(etcd, first, chain.last).await {
            Ok(found) => found,
            Err(Error::Compacted { compacted, .. }) => return Ok(Has::Nothing { compacted }),
            Err(error) => return Err(error),
        };
        let differs = expected.iter().find(|(revision, digest)| found.get(revision) != Some(digest));
        Ok(differs.map_or(Has::Same(By::Events), |(revision, _)| {
            let why = format!("revision {revision} of this etcd is not the one that was backed up");
            let mut hasher = DefaultHasher::new();
            found.hash(&mut hasher);
            Has::Other { by: By::Events, why, own: hasher.finish() }
        }))
    }
}

/// That member: at the client URLs that it is listed with, or at one of these endpoints. A URL may lead to another.
async fn reach(flags: &EtcdFlags, member: &Listed, endpoints: &[String]) -> Result<Etcd> {
    let mut last = Error::precondition("it has no client URL");
    for endpoint in member.client_urls.iter().chain(endpoints) {
        let flags = EtcdFlags { endpoints: vec![endpoint.clone()], ..flags.clone() };
        match Etcd::connect(&flags).await {
            Ok((etcd, status)) if status.member_id == member.id => return Ok(etcd),
            Ok((_, status)) => {
                last = Error::precondition(format!("{endpoint} leads to member {:x}", status.member_id));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// What another member has, beside one that has not what was backed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vote {
    AsBackedUp,
    AsOurs,
    /// Something else, or it cannot be told.
    Neither,
}

/// Who is wrong.
#[derive(Debug, PartialEq, Eq)]
enum Settled {
    /// We are; this one is not.
    Damaged { intact: u64 },
    /// Nobody: all have another history now than was backed up.
    Restored,
    /// These are, and with them what was backed up.
    OthersDamaged(String),
}

/// A cluster that was restored differs from its backups as a whole; where members differ from each other, most of them are right.
fn settle(others: &[(u64, Vote)]) -> Option<Settled> {
    let quorum = others.len().div_ceil(2) + 1;
    let of = |wanted| others.iter().filter(move |(_, vote)| *vote == wanted).map(|(id, _)| *id);
    let as_backed_up: Vec<_> = of(Vote::AsBackedUp).collect();
    if of(Vote::AsOurs).count() + 1 >= quorum {
        let ids: Vec<_> = as_backed_up.iter().map(|id| format!("{id:x}")).collect();
        return Some(if ids.is_empty() { Settled::Restored } else { Settled::OthersDamaged(ids.join(", ")) });
    }
    let intact = as_backed_up.first().copied()?;
    (as_backed_up.len() >= quorum).then_some(Settled::Damaged { intact })
}

/// Revisions that are compared.
const COMPARED: i64 = 64;

/// A digest of each revision of a delta, the last so many at most.
async fn revisions(store: &Store, name: &ObjectName, delta: &Delta, most: i64) -> Result<BTreeMap<i64, u64>> {
    let object = store.get_whole(name, delta.size).await?;
    let first = delta.last.saturating_sub(most).saturating_add(1);
    Ok(RevisionDigests::of_delta(name, &object, &store.location(name), first, delta.last)?.into_map())
}

/// The same digests of what etcd sends of these revisions.
async fn live_revisions(etcd: &Etcd, first: i64, last: i64) -> Result<BTreeMap<i64, u64>> {
    let mut watch = etcd.watch(first).await?;
    let (mut digests, mut seen) = (RevisionDigests::default(), 0);
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        let message = tokio::time::timeout_at(limit, etcd.next_message(&mut watch, first - 1)).await;
        let message = message.map_err(|_| Error::Unanswered { what: "etcd sent no events to compare".into() })??;
        for event in &message.events {
            let Some(kv) = &event.kv else { continue };
            if kv.mod_revision > last {
                return Ok(digests.into_map());
            }
            let mut value = Vec::new();
            let is_put = event.r#type() == EventType::Put;
            let bytes = if is_put {
                let (create_revision, mod_revision, version, lease) =
                    (kv.create_revision, kv.mod_revision, kv.version, kv.lease);
                KeyValue { key: &kv.key, create_revision, mod_revision, version, value: &kv.value, lease }
                    .encode(&mut value);
                value.as_slice()
            } else {
                &kv.key
            };
            digests.add(kv.mod_revision, is_put, bytes);
            seen = kv.mod_revision;
        }
        if !message.fragment && seen == last {
            break;
        }
    }
    Ok(digests.into_map())
}

/// The last revision that the live etcd shares with a timeline; 0 when that cannot be known, because etcd has compacted it or
/// because the timeline has neither deltas there nor a full snapshot with a hash.
pub async fn fork_revision(
    store: &Store,
    etcd: &mut Etcd,
    timeline: Timeline,
    history: &History,
    live: i64,
) -> Result<i64> {
    let compacted = etcd.compact_revision(0).await?;
    let whose = begun_with(store, timeline).await?;
    let comparable = |delta: &&Delta| delta.first > compacted && delta.first <= live;
    let deltas: Vec<Delta> = history.deltas.iter().filter(comparable).copied().collect();
    // Two histories agree up to where they part and never after.
    let (mut agree, mut differ, mut fork) = (0, deltas.len(), 0);
    while agree < differ {
        let middle = agree.midpoint(differ);
        let Some(delta) = deltas.get(middle) else { break };
        let shared = shared_with(store, etcd, timeline, (delta, whose), live).await?;
        fork = shared.unwrap_or_default().max(fork);
        if shared == Some(delta.last) {
            agree = middle + 1;
        } else {
            differ = middle;
        }
    }
    let upto = deltas.get(differ).map_or(live, |delta| delta.last.min(live));
    Ok(fork.max(shared_full(store, etcd, timeline, history, (fork, upto, compacted)).await))
}

/// The newest full snapshot of these revisions whose rows the live etcd has, by their hash; 0 when there is none.
async fn shared_full(
    store: &Store,
    etcd: &mut Etcd,
    timeline: Timeline,
    history: &History,
    (after, upto, compacted): (i64, i64, i64),
) -> i64 {
    let fulls = history.fulls.iter().rev().filter(|full| full.revision > after && full.revision <= upto);
    for full in fulls.take(MOST_LOOKS) {
        // One that cannot be read tells nothing.
        let meta = store.meta(&full.name(timeline), full.size).await.ok().flatten();
        let recorded = meta.and_then(|meta| meta.hash_kv);
        // Each answer costs etcd a walk over its database.
        let Some(recorded) = recorded.filter(|recorded| recorded.compact_revision.max(0) == compacted) else {
            continue;
        };
        if let Ok(live) = etcd.hash_kv(recorded.revision).await
            && (live.hash, live.compact_revision) == (recorded.hash, compacted)
        {
            return full.revision;
        }
    }
    0
}

/// The last revision of a delta up to which the live etcd has the same.
async fn shared_with(
    store: &Store,
    etcd: &Etcd,
    timeline: Timeline,
    (delta, whose): (&Delta, Option<u64>),
    live: i64,
) -> Result<Option<i64>> {
    let name = delta.name(timeline);
    if let (Some(whose), Some(meta)) = (whose, store.meta(&name, delta.size).await?)
        && whose != meta.cluster_id
    {
        // It went astray.
        return Ok(None);
    }
    let expected = revisions(store, &name, delta, i64::MAX).await?;
    let found = live_revisions(etcd, delta.first, delta.last.min(live)).await?;
    let same = expected.iter().take_while(|(revision, digest)| found.get(revision) == Some(digest));
    Ok(same.last().map(|(revision, _)| *revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(cluster_id: u64, revision: i64, raft_index: u64) -> Status {
        Status {
            role: crate::etcd::Role::Leader,
            cluster_id,
            revision,
            version: "3.6.0".into(),
            raft_term: 2,
            raft_index,
            raft_applied_index: raft_index,
            ..Status::default()
        }
    }

    fn seen(last_revision: i64, raft_index: u64) -> Seen {
        Seen {
            timeline: 3,
            newest: Some(ObjectMeta { cluster_id: 7, last_revision, raft_index, ..ObjectMeta::default() }),
            begun_with: None,
            newer_is_damaged: false,
        }
    }

    fn begins(seen: &Seen, live: &Status) -> bool {
        matches!(decide(Some(seen), live), Decision::Begin { timeline: 4, parent: 3, .. })
    }

    #[test]
    fn the_same_cluster_continues() {
        for status in [live(7, 100, 150), live(7, 200, 250), live(7, 200, 900)] {
            assert_eq!(decide(Some(&seen(100, 150)), &status), Decision::Continue { timeline: 3 });
        }
    }

    #[test]
    fn another_cluster_and_a_restored_one_begin_anew() {
        assert!(begins(&seen(100, 150), &live(8, 200, 300)));
        assert!(begins(&seen(100, 150), &live(7, 99, 150)));
        // Restored to the very revision of the backup, then written to until both numbers are past those recorded.
        assert!(begins(&seen(100, 150), &live(7, 100, 4)));
        assert!(begins(&seen(100, 150), &live(7, 500, 404)));
    }

    #[test]
    fn an_empty_timeline_is_only_for_the_cluster_it_was_begun_with() {
        let seen = |begun_with| Seen { newest: None, begun_with: Some(begun_with), ..seen(0, 0) };
        assert_eq!(decide(Some(&seen(7)), &live(7, 1, 1)), Decision::Continue { timeline: 3 });
        assert!(begins(&seen(8), &live(7, 1, 1)));
    }

    #[test]
    fn what_went_astray_into_anothers_timeline_does_not_make_it_ours() {
        let astray = Seen { begun_with: Some(8), ..seen(100, 150) };
        assert!(begins(&astray, &live(7, 100, 150)));
        assert!(!begins(&Seen { begun_with: Some(7), ..astray }, &live(7, 100, 150)));
    }

    #[test]
    fn most_members_decide_who_is_wrong() {
        use Vote::{AsBackedUp, AsOurs, Neither};
        let settle = |votes: &[Vote]| settle(&(1..).zip(votes.iter().copied()).collect::<Vec<_>>());
        assert_eq!(settle(&[]), Some(Settled::Restored));
        assert_eq!(settle(&[AsOurs, AsOurs]), Some(Settled::Restored));
        assert_eq!(settle(&[AsOurs, Neither]), Some(Settled::Restored));
        assert_eq!(settle(&[AsBackedUp, AsBackedUp]), Some(Settled::Damaged { intact: 1 }));
        assert_eq!(settle(&[Neither, AsBackedUp, AsBackedUp, AsBackedUp]), Some(Settled::Damaged { intact: 2 }));
        // Whom the backups are of may be the one that is damaged.
        assert_eq!(settle(&[AsBackedUp, AsOurs]), Some(Settled::OthersDamaged("1".into())));
        for undecided in [
            &[AsBackedUp] as &[_],
            &[AsOurs],
            &[Neither],
            &[AsBackedUp, Neither],
            &[Neither, Neither],
            &[AsBackedUp, AsBackedUp, AsOurs, Neither],
        ] {
            let is_decided = settle(undecided);
            // Two members that are alike are a quorum of two.
            assert_eq!(is_decided.is_some(), undecided == [AsOurs], "{undecided:?}: {is_decided:?}");
        }
    }

    #[test]
    fn an_empty_store_begins_the_first_timeline() {
        assert!(matches!(decide(None, &live(7, 1, 1)), Decision::Begin { timeline: 1, parent: 0, .. }));
    }
}
