//! Whether a live cluster has what a chain ends with, by its content.
//!
//! Its numbers may let it go on where its content does not: after a restore whose log has grown as long as the old one, and on a
//! member whose data is damaged. Most members tell the one from the other.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use etcd_client::EventType;
use etcd_format::mvcc::KeyValue;
use proto::backup::ObjectMeta;
use tokio::time::Instant;

use crate::catalog::{Chain, Delta, History, ObjectName, Timeline};
use crate::delta::COMPARED;
use crate::etcd::{Etcd, EtcdFlags, Listed};
use crate::object::RevisionDigests;
use crate::store::Store;
use crate::{Class, Error, Result};

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

/// A digest of each revision of a delta, the last so many at most.
pub(super) async fn revisions(
    store: &Store,
    name: &ObjectName,
    delta: &Delta,
    most: i64,
) -> Result<BTreeMap<i64, u64>> {
    let object = store.get_whole(name, delta.size).await?;
    let first = delta.last.saturating_sub(most).saturating_add(1);
    Ok(RevisionDigests::of_delta(name, &object, &store.location(name), first, delta.last)?.into_map())
}

/// The same digests of what etcd sends of these revisions.
pub(super) async fn live_revisions(etcd: &Etcd, first: i64, last: i64) -> Result<BTreeMap<i64, u64>> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
