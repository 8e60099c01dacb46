//! What is in a store: object names, and which objects together make a restorable chain. Pure.
//!
//! ```text
//! t<timeline:08>/full/<revision:020>-<unix ms:013>.db.zst
//! t<timeline:08>/delta/<first:020>-<last:020>-<unix ms:013>.delta.zst
//! t<timeline:08>/timeline.json
//! t<timeline:08>/full/uploading-<unix ms:013>-<random:016x>      a full on its way to its name
//! v1/…, v2/…                                                     the predecessor's, see [`gardener`]
//! ```
//!
//! What the predecessor wrote counts as timeline 0: a history like any other, which the first of ours may fork from.
//! Overlap is legal: two writers, or a full newer than the first delta. A gap is not: it is named with both revisions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, gardener};

/// Number of a timeline, from 1. Every restore that becomes a live cluster begins one.
pub type Timeline = u32;

/// The timeline that the predecessor's backups count as.
pub const PREDECESSOR: Timeline = 0;

/// How objects are named and made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// Ours.
    #[default]
    Steward,
    /// That of gardener/etcd-backup-restore: JSON and gzip, without metadata, timelines, TTLs of leases and hashes.
    #[value(name = "gardener-v2")]
    GardenerV2,
}

impl Layout {
    /// Name of a full snapshot.
    pub fn full(self, timeline: Timeline, revision: i64, unix_ms: i64) -> ObjectName {
        match self {
            Self::Steward => ObjectName::Full { timeline, revision, unix_ms },
            Self::GardenerV2 => ObjectName::Gardener(gardener::Name::full(revision, unix_ms / 1000)),
        }
    }

    /// Name of a delta.
    pub fn delta(self, timeline: Timeline, first: i64, last: i64, unix_ms: i64) -> ObjectName {
        match self {
            Self::Steward => ObjectName::Delta { timeline, first, last, unix_ms },
            Self::GardenerV2 => ObjectName::Gardener(gardener::Name::delta(first, last, unix_ms / 1000)),
        }
    }

    /// The finest difference between two names' times, in milliseconds.
    pub fn tick_ms(self) -> i64 {
        match self {
            Self::Steward => 1,
            Self::GardenerV2 => 1000,
        }
    }
}

/// What the name of an object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObjectName {
    /// A full snapshot.
    Full {
        /// Its timeline.
        timeline: Timeline,
        /// The revision it has.
        revision: i64,
        /// When it was begun.
        unix_ms: i64,
    },
    /// The changes of some revisions.
    Delta {
        /// Its timeline.
        timeline: Timeline,
        /// First revision.
        first: i64,
        /// Last revision.
        last: i64,
        /// When it was closed.
        unix_ms: i64,
    },
    /// Where a timeline comes from.
    Timeline {
        /// Which.
        timeline: Timeline,
    },
    /// A full snapshot that is being uploaded, or was when its writer died.
    Uploading {
        /// Its timeline.
        timeline: Timeline,
        /// When it was begun.
        unix_ms: i64,
        /// Tells two writers apart.
        random: u64,
    },
    /// A full snapshot or a delta of the predecessor's.
    Gardener(gardener::Name),
}

impl ObjectName {
    /// Whether it names a full snapshot.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. }) || matches!(self, Self::Gardener(name) if name.is_full())
    }

    /// Whether its name marks it as the last of its cluster.
    pub fn is_marked_final(&self) -> bool {
        matches!(self, Self::Gardener(name) if name.is_final())
    }

    /// The same, marked as the last of its cluster where a name tells that; ours have it in their metadata.
    #[must_use]
    pub fn marked_final(self) -> Self {
        if let Self::Gardener(name) = self { Self::Gardener(name.marked_final()) } else { self }
    }

    /// When it was begun or closed, in Unix milliseconds; 0 of a description.
    pub fn unix_ms(&self) -> i64 {
        match self {
            Self::Full { unix_ms, .. } | Self::Delta { unix_ms, .. } | Self::Uploading { unix_ms, .. } => *unix_ms,
            Self::Gardener(name) => name.unix_ms(),
            Self::Timeline { .. } => 0,
        }
    }

    /// First and last revision of a full snapshot or a delta. A full of the predecessor's may have later ones.
    pub fn revisions(&self) -> Option<(i64, i64)> {
        match self {
            Self::Full { revision, .. } => Some((*revision, *revision)),
            Self::Delta { first, last, .. } => Some((*first, *last)),
            Self::Gardener(name) if name.is_full() => Some((name.last(), name.last())),
            Self::Gardener(name) => Some((name.first(), name.last())),
            Self::Timeline { .. } | Self::Uploading { .. } => None,
        }
    }

    /// `None` when the name, relative to the store's prefix, is not one of ours.
    pub fn parse(name: &str) -> Option<Self> {
        let (timeline, rest) = name.split_once('/')?;
        let Some(timeline) = timeline.strip_prefix('t') else { return gardener::Name::parse(name).map(Self::Gardener) };
        let timeline: Timeline = decimal(timeline, 8)?.try_into().ok()?;
        let parsed = if rest == "timeline.json" {
            Self::Timeline { timeline }
        } else if let Some(rest) = rest.strip_prefix("full/uploading-") {
            let (unix_ms, random) = rest.split_once('-')?;
            let random = u64::from_str_radix(random, 16).ok()?;
            Self::Uploading { timeline, unix_ms: decimal(unix_ms, 13)?, random }
        } else if let Some(rest) = rest.strip_prefix("full/") {
            let (revision, unix_ms) = rest.strip_suffix(".db.zst")?.split_once('-')?;
            Self::Full { timeline, revision: decimal(revision, 20)?, unix_ms: decimal(unix_ms, 13)? }
        } else {
            let mut parts = rest.strip_prefix("delta/")?.strip_suffix(".delta.zst")?.split('-');
            let (first, last, unix_ms) =
                (decimal(parts.next()?, 20)?, decimal(parts.next()?, 20)?, decimal(parts.next()?, 13)?);
            if parts.next().is_some() || first > last || first < 1 {
                return None;
            }
            Self::Delta { timeline, first, last, unix_ms }
        };
        // Only the one spelling: what this prints is what it came from.
        (parsed.to_string() == name).then_some(parsed)
    }
}

fn decimal(text: &str, width: usize) -> Option<i64> {
    (text.len() >= width && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full { timeline, revision, unix_ms } => {
                write!(f, "t{timeline:08}/full/{revision:020}-{unix_ms:013}.db.zst")
            }
            Self::Delta { timeline, first, last, unix_ms } => {
                write!(f, "t{timeline:08}/delta/{first:020}-{last:020}-{unix_ms:013}.delta.zst")
            }
            Self::Timeline { timeline } => write!(f, "t{timeline:08}/timeline.json"),
            Self::Uploading { timeline, unix_ms, random } => {
                write!(f, "t{timeline:08}/full/uploading-{unix_ms:013}-{random:016x}")
            }
            Self::Gardener(name) => name.fmt(f),
        }
    }
}

/// A full snapshot in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// The revision it has.
    pub revision: i64,
    /// When it was begun.
    pub unix_ms: i64,
    /// Bytes of the object.
    pub size: u64,
    /// Its name, when it is the predecessor's. `revision` is then the least that it may have.
    pub gardener: Option<gardener::Name>,
}

impl Full {
    /// Its name in a timeline.
    pub fn name(&self, timeline: Timeline) -> ObjectName {
        let ours = ObjectName::Full { timeline, revision: self.revision, unix_ms: self.unix_ms };
        self.gardener.map_or(ours, ObjectName::Gardener)
    }
}

/// A delta in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// First revision.
    pub first: i64,
    /// Last revision.
    pub last: i64,
    /// When it was closed.
    pub unix_ms: i64,
    /// Bytes of the object.
    pub size: u64,
    /// Its name, when it is the predecessor's.
    pub gardener: Option<gardener::Name>,
}

impl Delta {
    /// Its name in a timeline.
    pub fn name(&self, timeline: Timeline) -> ObjectName {
        let ours = ObjectName::Delta { timeline, first: self.first, last: self.last, unix_ms: self.unix_ms };
        self.gardener.map_or(ours, ObjectName::Gardener)
    }
}

/// The objects of one timeline.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Full snapshots, by revision.
    pub fulls: Vec<Full>,
    /// Deltas, by first and then last revision.
    pub deltas: Vec<Delta>,
}

/// Where a timeline comes from: the content of `timeline.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Layout version: 1.
    pub layout: u32,
    /// The timeline.
    pub timeline: Timeline,
    /// The one that it forks from; 0 for none, or for the predecessor's backups where there are some.
    pub parent: Timeline,
    /// Last revision that it shares with its parent; 0 when that is not known.
    pub fork_revision: i64,
    /// Why it was begun.
    pub reason: String,
    /// Id of the cluster, hexadecimal.
    pub cluster_id: String,
    /// When it was begun, RFC 3339.
    pub created: String,
}

impl Description {
    /// When it was begun, in Unix milliseconds; `None` where it does not say so.
    pub fn created_unix_ms(&self) -> Option<i64> {
        chrono::DateTime::parse_from_rfc3339(&self.created).ok().map(|created| created.timestamp_millis())
    }
}

/// Revisions that no object has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The last revision before it.
    pub after: i64,
    /// The first revision after it.
    pub before: i64,
}

/// Revisions that can be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restorable {
    /// The first of them.
    pub first: i64,
    /// When its full snapshot was begun.
    pub first_unix_ms: i64,
    /// The last of them.
    pub last: i64,
    /// When the object that has it was closed.
    pub last_unix_ms: i64,
}

/// A full snapshot and the deltas that follow it without a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Where it starts.
    pub full: Full,
    /// What follows; each reaches further than the one before.
    pub deltas: Vec<Delta>,
    /// The last revision it reaches.
    pub last: i64,
    /// What is missing right after it, when there are deltas beyond.
    pub gap: Option<Gap>,
}

impl Chain {
    /// Names and sizes of its objects, in order.
    pub fn objects(&self, timeline: Timeline) -> Vec<(ObjectName, u64)> {
        let deltas = self.deltas.iter().map(|delta| (delta.name(timeline), delta.size));
        std::iter::once((self.full.name(timeline), self.full.size)).chain(deltas).collect()
    }

    /// Without what is not needed to reach a revision. Its last delta may go beyond.
    #[must_use]
    pub fn upto(mut self, revision: i64) -> Self {
        let mut last = self.full.revision;
        self.deltas.retain(|delta| {
            let needed = last < revision;
            if needed {
                last = delta.last;
            }
            needed
        });
        if last >= revision {
            self.gap = None;
        }
        self.last = last;
        self
    }

    /// Bytes of its objects.
    pub fn size(&self) -> u64 {
        self.full.size + self.deltas.iter().map(|delta| delta.size).sum::<u64>()
    }
}

impl History {
    /// Runs of deltas without a gap, ascending: first and last revision, and when the delta with the last was closed.
    fn runs(&self) -> Vec<(i64, i64, i64)> {
        let mut runs: Vec<(i64, i64, i64)> = Vec::new();
        for delta in &self.deltas {
            match runs.last_mut() {
                Some(run) if delta.first <= run.1.saturating_add(1) => {
                    (run.1, run.2) = (run.1, run.2).max((delta.last, delta.unix_ms));
                }
                _ => runs.push((delta.first, delta.last, delta.unix_ms)),
            }
        }
        runs
    }

    /// The last revision that the chain from each full reaches, and when what has it was taken.
    fn reaches(&self) -> impl Iterator<Item = (&Full, i64, i64)> {
        let runs = self.runs();
        self.fulls.iter().map(move |full| {
            let joining = runs.partition_point(|run| run.0 <= full.revision.saturating_add(1));
            match runs.get(joining.wrapping_sub(1)) {
                Some(run) if run.1 > full.revision => (full, run.1, run.2),
                _ => (full, full.revision, full.unix_ms),
            }
        })
    }

    /// The chain that starts at `full`, and the gap where it ends early.
    pub fn chain_from(&self, full: Full) -> Chain {
        let mut chain = Chain { full, deltas: Vec::new(), last: full.revision, gap: None };
        let mut furthest: Option<Delta> = None;
        // Deltas come by first revision: of all that join on to what is there the one that reaches furthest is taken.
        for delta in &self.deltas {
            if delta.first > chain.last.saturating_add(1) {
                if let Some(taken) = furthest.take().filter(|taken| taken.last > chain.last) {
                    chain.last = taken.last;
                    chain.deltas.push(taken);
                }
                if delta.first > chain.last.saturating_add(1) {
                    chain.gap = Some(Gap { after: chain.last, before: delta.first });
                    return chain;
                }
            }
            if furthest.is_none_or(|before| (delta.last, delta.unix_ms) > (before.last, before.unix_ms)) {
                furthest = Some(*delta);
            }
        }
        if let Some(taken) = furthest.filter(|taken| taken.last > chain.last) {
            chain.last = taken.last;
            chain.deltas.push(taken);
        }
        chain
    }

    /// The chain that reaches furthest; of those that reach equally far the one with the newest full snapshot, which has
    /// the least to replay.
    pub fn newest_chain(&self) -> Option<Chain> {
        let best = self.reaches().max_by_key(|(full, last, _)| (*last, full.revision, full.unix_ms));
        best.map(|(full, ..)| self.chain_from(*full))
    }

    /// The chain with the least to replay to reach a revision; when none does, one that comes nearest. `None` when no full
    /// snapshot is at or before it.
    pub fn chain_to(&self, revision: i64) -> Option<Chain> {
        let mut nearest: Option<Chain> = None;
        for full in self.fulls.iter().rev().filter(|full| full.revision <= revision) {
            let chain = self.chain_from(*full).upto(revision);
            if chain.last >= revision {
                return Some(chain);
            }
            if nearest.as_ref().is_none_or(|nearest| chain.last > nearest.last) {
                nearest = Some(chain);
            }
        }
        nearest
    }

    /// The runs of revisions that can be restored, ascending: each from a full snapshot to where its chain ends.
    pub fn restorable(&self) -> Vec<Restorable> {
        let mut runs: Vec<Restorable> = Vec::new();
        for (full, last, last_unix_ms) in self.reaches() {
            match runs.last_mut() {
                Some(run) if full.revision <= run.last => {
                    if last > run.last {
                        (run.last, run.last_unix_ms) = (last, last_unix_ms);
                    }
                }
                _ => {
                    runs.push(Restorable { first: full.revision, first_unix_ms: full.unix_ms, last, last_unix_ms });
                }
            }
        }
        runs
    }

    /// Every gap between what the deltas and fulls hold.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut ends: Vec<(i64, i64)> = self.fulls.iter().map(|full| (full.revision, full.revision)).collect();
        ends.extend(self.deltas.iter().map(|delta| (delta.first, delta.last)));
        ends.sort_unstable();
        let mut gaps = Vec::new();
        let mut last = None;
        for (first, end) in ends {
            if let Some(after) = last.filter(|last: &i64| first > last.saturating_add(1)) {
                gaps.push(Gap { after, before: first });
            }
            last = last.max(Some(end));
        }
        gaps
    }

    /// When each of its objects was begun or closed.
    pub fn times(&self) -> impl Iterator<Item = i64> + '_ {
        self.fulls.iter().map(|full| full.unix_ms).chain(self.deltas.iter().map(|delta| delta.unix_ms))
    }

    /// The last revision that any of them has, whether it can be restored or not.
    pub fn last_revision(&self) -> Option<i64> {
        let revisions = self.fulls.iter().map(|full| full.revision).chain(self.deltas.iter().map(|delta| delta.last));
        revisions.max()
    }

    /// Bytes of all objects.
    pub fn size(&self) -> u64 {
        self.fulls.iter().map(|full| full.size).chain(self.deltas.iter().map(|delta| delta.size)).sum()
    }
}

/// Notes of members that lost their data, under a prefix of backups.
const RECOVERY: &str = "recovery/";

/// Everything under a store's prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    /// By number.
    pub timelines: BTreeMap<Timeline, History>,
    /// Fulls whose upload did not finish (yet).
    pub uploading: Vec<(ObjectName, u64)>,
    /// Names that are not ours, with sizes. They are listed and never touched.
    pub foreign: Vec<(String, u64)>,
}

impl Catalog {
    /// Takes an object out, by its name.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let before = self.count();
        for (timeline, history) in &mut self.timelines {
            let timeline = *timeline;
            history.fulls.retain(|full| full.name(timeline).to_string() != name);
            history.deltas.retain(|delta| delta.name(timeline).to_string() != name);
        }
        if self.count() < before { Ok(()) } else { Err(Error::missing(format!("the store has no object {name}"))) }
    }

    fn count(&self) -> usize {
        self.timelines.values().map(|history| history.fulls.len() + history.deltas.len()).sum()
    }

    /// Whether a directory at the top is one of ours.
    pub fn is_timeline(name: &str) -> bool {
        name.strip_prefix('t').and_then(|number| decimal(number, 8)).is_some()
    }

    /// Sorts a listing: names relative to the prefix, and sizes.
    pub fn new(listing: impl IntoIterator<Item = (String, u64)>) -> Self {
        let mut catalog = Self::default();
        // A store may list an object twice that was written meanwhile; retention counts it once.
        let listing: BTreeMap<String, u64> = listing.into_iter().collect();
        for (name, size) in listing {
            match ObjectName::parse(&name) {
                Some(ObjectName::Full { timeline, revision, unix_ms }) => {
                    catalog.timelines.entry(timeline).or_default().fulls.push(Full {
                        revision,
                        unix_ms,
                        size,
                        gardener: None,
                    });
                }
                Some(ObjectName::Delta { timeline, first, last, unix_ms }) => {
                    catalog.timelines.entry(timeline).or_default().deltas.push(Delta {
                        first,
                        last,
                        unix_ms,
                        size,
                        gardener: None,
                    });
                }
                Some(ObjectName::Gardener(name)) => {
                    let history = catalog.timelines.entry(PREDECESSOR).or_default();
                    let (first, last, unix_ms, gardener) = (name.first(), name.last(), name.unix_ms(), Some(name));
                    if name.is_full() {
                        history.fulls.push(Full { revision: last, unix_ms, size, gardener });
                    } else {
                        history.deltas.push(Delta { first, last, unix_ms, size, gardener });
                    }
                }
                Some(ObjectName::Timeline { timeline }) => drop(catalog.timelines.entry(timeline).or_default()),
                Some(uploading @ ObjectName::Uploading { .. }) => catalog.uploading.push((uploading, size)),
                None if name.starts_with(RECOVERY) => {}
                None => catalog.foreign.push((name, size)),
            }
        }
        for history in catalog.timelines.values_mut() {
            history.fulls.sort_unstable_by_key(|full| (full.revision, full.unix_ms));
            history.deltas.sort_unstable_by_key(|delta| (delta.first, delta.last, delta.unix_ms));
        }
        catalog
    }

    /// The newest chain of the newest timeline from which something can be restored.
    pub fn newest_chain(&self) -> Option<(Timeline, Chain)> {
        let (timeline, history) = self.newest_restorable()?;
        Some((timeline, history.newest_chain()?))
    }

    /// The newest timeline from which something can be restored.
    pub fn newest_restorable(&self) -> Option<(Timeline, &History)> {
        self.timelines
            .iter()
            .rev()
            .find(|(_, history)| !history.fulls.is_empty())
            .map(|(timeline, history)| (*timeline, history))
    }

    /// The newest timeline of all.
    pub fn newest(&self) -> Option<(Timeline, &History)> {
        self.timelines.iter().next_back().map(|(timeline, history)| (*timeline, history))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn history(fulls: &[i64], deltas: &[(i64, i64)]) -> History {
        let fulls = fulls.iter().map(|revision| ObjectName::Full { timeline: 1, revision: *revision, unix_ms: 1 });
        let deltas = deltas.iter().map(|(first, last)| ObjectName::Delta {
            timeline: 1,
            first: *first,
            last: *last,
            unix_ms: 1,
        });
        let catalog = Catalog::new(fulls.chain(deltas).map(|name| (name.to_string(), 1)));
        catalog.timelines.get(&1).cloned().unwrap_or_default()
    }

    #[test]
    fn overlaps_join_and_gaps_are_named() {
        let chain = history(&[10], &[(5, 12), (11, 20), (15, 18), (21, 22), (25, 30)]).newest_chain().unwrap();
        assert_eq!((chain.last, chain.gap), (22, Some(Gap { after: 22, before: 25 })));
        assert_eq!(chain.deltas.iter().map(|d| d.last).collect::<Vec<_>>(), [20, 22]);
    }

    #[test]
    fn a_later_full_makes_a_gap_harmless() {
        let chain = history(&[10, 24], &[(11, 20), (25, 30)]).newest_chain().unwrap();
        assert_eq!((chain.full.revision, chain.last, chain.gap), (24, 30, None));
    }

    #[test]
    fn what_is_restorable_ends_at_gaps() {
        let runs = |history: History| history.restorable().iter().map(|run| (run.first, run.last)).collect::<Vec<_>>();
        assert_eq!(runs(history(&[10, 15, 24], &[(11, 20), (25, 30)])), [(10, 20), (24, 30)]);
        assert_eq!(runs(history(&[10, 21], &[(11, 20), (21, 30)])), [(10, 30)]);
        assert_eq!(runs(history(&[5], &[(11, 20)])), [(5, 5)]);
        assert_eq!(runs(history(&[], &[(11, 20)])), []);
    }

    #[test]
    fn the_newest_full_of_equal_chains_is_taken() {
        let chain = history(&[10, 15], &[(11, 20)]).newest_chain().unwrap();
        assert_eq!(chain.full.revision, 15);
    }

    proptest! {
        /// Against the plain way: one revision at a time.
        #[test]
        fn the_newest_chain_is_the_one_that_reaches_furthest(
            fulls in prop::collection::vec(1..60i64, 1..5),
            deltas in prop::collection::vec((1..60i64, 0..9i64), 0..25),
        ) {
            let deltas: Vec<_> = deltas.into_iter().map(|(first, more)| (first, first + more)).collect();
            let history = history(&fulls, &deltas);
            let reach = |from: i64| {
                (from..200).find(|at| !deltas.iter().any(|(first, last)| (*first..=*last).contains(&(at + 1)))).unwrap_or(from)
            };
            let chain = history.newest_chain().unwrap();
            let best = fulls.iter().map(|full| (reach(*full), *full)).max().unwrap();
            prop_assert_eq!((chain.last, chain.full.revision), best);
            let beyond = deltas.iter().filter(|(_, last)| *last > chain.last).map(|(first, _)| *first).min();
            prop_assert_eq!(chain.gap, beyond.map(|before| Gap { after: chain.last, before }));
            let mut at = chain.full.revision;
            for delta in &chain.deltas {
                prop_assert!(delta.first <= at + 1 && delta.last > at);
                at = delta.last;
            }
        }
    }

    #[test]
    fn a_chain_to_a_revision_has_no_more_than_it_needs() {
        let history = history(&[10, 24], &[(11, 20), (21, 22), (25, 30), (31, 40)]);
        let to = |revision| {
            let chain = history.chain_to(revision)?;
            Some((chain.full.revision, chain.deltas.len(), chain.last, chain.gap.is_some()))
        };
        assert_eq!(to(9), None);
        assert_eq!(to(10), Some((10, 0, 10, false)));
        assert_eq!(to(15), Some((10, 1, 20, false)));
        assert_eq!(to(22), Some((10, 2, 22, false)));
        assert_eq!(to(23), Some((10, 2, 22, true)));
        assert_eq!(to(26), Some((24, 1, 30, false)));
        assert_eq!(to(41), Some((24, 2, 40, false)));
    }

    #[test]
    fn without_a_full_there_is_no_chain() {
        assert_eq!(history(&[], &[(1, 2)]).newest_chain(), None);
    }

    #[test]
    fn names_that_are_not_ours_are_foreign() {
        let names = [
            "t00000001/full/1-2.db.zst",
            "t00000001/delta/00000000000000000009-00000000000000000002-0000000000001.delta.zst",
            "t00000001/full/00000000000000000002-0000000000001.db.zst.tmp",
            "t1/timeline.json",
            "x",
            "",
            "t00000001/other/x",
        ];
        assert_eq!(Catalog::new(names.map(|name| (name.to_owned(), 0))).foreign.len(), names.len());
        assert!(Catalog::new([("recovery/t00000001.json".to_owned(), 14)]).foreign.is_empty());
    }

    proptest! {
        #[test]
        fn names_round_trip(timeline in 1u32.., a in 1..i64::MAX, b in 1..i64::MAX, unix_ms in 0..9_999_999_999_999i64, random: u64) {
            for name in [
                ObjectName::Full { timeline, revision: a, unix_ms },
                ObjectName::Delta { timeline, first: a.min(b), last: a.max(b), unix_ms },
                ObjectName::Timeline { timeline },
                ObjectName::Uploading { timeline, unix_ms, random },
            ] {
                prop_assert_eq!(ObjectName::parse(&name.to_string()), Some(name));
            }
        }

        #[test]
        fn arbitrary_names_never_panic(name: String) {
            let _ = ObjectName::parse(&name);
        }
    }
}
