//! Who restores a cluster of several members that all lost their data: exactly one.
//!
//! A member that lost its data and finds nobody serving says so in the store, again and again, each time under a new name:
//! where nothing may be overwritten that works too. Only when every member is seen to say so, which is when a name appears,
//! is the cluster lost: until then one that is merely away may have data that is newer than the backups. Who then creates the
//! object that is named after the timeline restores it, also after a crash; the others wait for its cluster and join it. No
//! clocks are compared.
//!
//! ```text
//! <prefix>/recovery/lost/<member>/<run>-<beat>     while that member has no data and nobody serves
//! <prefix>/recovery/t<timeline:08>.json            created once: who restores that timeline
//! <prefix>/recovery/begins/<member>/<run>          where nothing is to be restored: that run of that member begins anew
//! ```
//!
//! Where there is nothing to restore yet, all begin anew. Who sees first that all lost their data tells the others before it
//! does so, for then it is no longer one of those who say that they did.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::catalog::Timeline;
use crate::store::Store;
use crate::{Error, Result};

/// Between two looks.
pub(super) const PERIOD: Duration = Duration::from_secs(3);
/// Who has not said anything for so long may have ended.
const FRESH: Duration = Duration::from_secs(15);
/// So many reports that could not be deleted are tried again.
const MOST_LEFT: usize = 8;
/// Between two reports where the ones before cannot be deleted.
const SELDOM: Duration = Duration::from_secs(10);

/// What is in each report; that it is there is what counts.
const REPORT: &str = "this member has no data that etcd can start on, and no other member serves\n";
/// The same of what lets a member begin anew.
const BEGINS: &str = "every member was seen to have lost its data, and nothing is there to restore\n";

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Restorer {
    member: String,
}

/// What a member without data knows of the others.
#[derive(Debug, Clone)]
pub(super) struct Recovery {
    member: String,
    others: Vec<String>,
    /// Makes the reports of this run differ from those of another.
    run: String,
    beats: u64,
    /// When the next is due.
    due: Option<Instant>,
    /// How long a look at the others took: what it finds is as old as that.
    looking: Duration,
    /// Reports that could not be deleted yet; where nothing may be, the newest of them.
    left: Vec<String>,
    /// What each of the others has said, and when more of it was seen.
    seen: BTreeMap<String, (BTreeSet<String>, Option<Instant>)>,
}

impl Recovery {
    /// Of a member among these.
    pub(super) fn new(member: &str, members: impl Iterator<Item = String>) -> Self {
        let others = members.filter(|other| other != member).collect();
        let run = format!("{}-{}", std::process::id(), chrono::Utc::now().timestamp_micros());
        let (looking, seen) = (Duration::ZERO, BTreeMap::new());
        Self { member: member.to_owned(), others, run, beats: 0, due: None, looking, left: Vec::new(), seen }
    }

    /// Says that ours has no data; how many members, ours among them, are seen to say so.
    pub(super) async fn report(&mut self, store: &Store) -> Result<usize> {
        let started = Instant::now();
        if self.due.is_none_or(|due| due <= started) {
            let before = self.beat();
            self.beats += 1;
            store.create_note(&self.beat(), Bytes::from_static(REPORT.as_bytes())).await?;
            if self.beats > 1 {
                self.take_back(store, before).await;
            }
            self.due = Some(started + if self.left.is_empty() { PERIOD } else { SELDOM });
        }
        for other in &self.others {
            let said = store.notes(&lost(other)).await?;
            self.seen = observe(std::mem::take(&mut self.seen), other, said.into_iter().collect(), Instant::now());
        }
        self.looking = started.elapsed();
        Ok(1 + self.fresh(Instant::now()))
    }

    /// Deletes a report, and those that could not be deleted before.
    async fn take_back(&mut self, store: &Store, report: String) {
        let had_left = !self.left.is_empty();
        let mut failed = None;
        for report in std::mem::take(&mut self.left).into_iter().chain([report]) {
            if let Err(error) = store.remove_note(&report).await {
                failed = Some(error);
                self.left.push(report);
            }
        }
        if let Some(error) = failed.filter(|_| !had_left) {
            tracing::warn!(%error, "reports of lost data cannot be deleted and pile up in the store, if slowly");
        }
        let too_many = self.left.len().saturating_sub(MOST_LEFT);
        drop(self.left.drain(..too_many));
    }

    /// Lets the others, all of whom were seen to have lost their data, begin anew.
    pub(super) async fn let_begin(&self, store: &Store) -> Result<()> {
        for (other, (said, _)) in &self.seen {
            let runs: BTreeSet<_> = said.iter().filter_map(|report| run_of(report)).collect();
            for run in runs {
                store.create_note(&begins(other, run), Bytes::from_static(BEGINS.as_bytes())).await?;
            }
        }
        Ok(())
    }

    /// Whether another member saw that all, ours in this run among them, had lost their data.
    pub(super) async fn may_begin(&self, store: &Store) -> Result<bool> {
        Ok(self.beats > 0 && store.note(&begins(&self.member, &self.run)).await?.is_some())
    }

    /// The name of the last report.
    fn beat(&self) -> String {
        format!("{}/{}-{:08}", lost(&self.member), self.run, self.beats)
    }

    fn fresh(&self, now: Instant) -> usize {
        let fresh = FRESH + 3 * self.looking;
        let is_fresh = |at: &Instant| now.saturating_duration_since(*at) < fresh;
        self.seen.values().filter(|(_, changed)| changed.as_ref().is_some_and(is_fresh)).count()
    }

    /// Makes ours the one that restores a timeline, unless another is: who, and where that is said.
    pub(super) async fn begin(&self, store: &Store, timeline: Timeline) -> Result<Option<String>> {
        let name = claim(timeline);
        let ours = Restorer { member: self.member.clone() };
        let json = serde_json::to_vec(&ours).map_err(|error| Error::Bug { what: format!("claim: {error}") })?;
        if store.create_note(&name, json.into()).await? {
            return Ok(None);
        }
        let location = store.location(&name);
        let gone =
            || Error::Unanswered { what: format!("{location}: who was to restore has given up; it is asked again") };
        let there = store.note(&name).await?.ok_or_else(gone)?;
        let there: Restorer = serde_json::from_slice(&there)
            .map_err(|error| Error::corrupt(format!("{location}: it does not say who restores: {error}")))?;
        let is_one_of_us = self.others.contains(&there.member);
        let remark = if is_one_of_us { "" } else { ", which is no member of this cluster: delete that object" };
        Ok((there != ours).then(|| format!("{} ({location}{remark})", there.member)))
    }

    /// Leaves it to another member to restore a timeline, because ours cannot.
    pub(super) async fn give_up(&self, store: &Store, timeline: Timeline) {
        match store.remove_note(&claim(timeline)).await {
            Ok(()) => tracing::warn!("another member may restore the cluster"),
            Err(error) => tracing::warn!(%error, "no other member can restore the cluster"),
        }
    }

    /// Takes back what ours said.
    pub(super) async fn end(mut self, store: &Store) {
        if self.beats == 0 {
            return;
        }
        let last = [self.beat(), begins(&self.member, &self.run)];
        for note in std::mem::take(&mut self.left).into_iter().chain(last) {
            if let Err(error) = store.remove_note(&note).await {
                tracing::debug!(%error, note, "what was said of lost data is not taken back");
            }
        }
    }
}

fn claim(timeline: Timeline) -> String {
    format!("recovery/t{timeline:08}.json")
}

fn lost(member: &str) -> String {
    format!("recovery/lost/{}", one_name(member))
}

fn begins(member: &str, run: &str) -> String {
    format!("recovery/begins/{}/{run}", one_name(member))
}

/// Whatever a member is called.
fn one_name(member: &str) -> String {
    url::form_urlencoded::byte_serialize(member.as_bytes()).collect()
}

/// The run that a report is of.
fn run_of(report: &str) -> Option<&str> {
    Some(report.rsplit('/').next()?.rsplit_once('-')?.0)
}

fn observe(
    mut seen: BTreeMap<String, (BTreeSet<String>, Option<Instant>)>,
    other: &str,
    said: BTreeSet<String>,
    now: Instant,
) -> BTreeMap<String, (BTreeSet<String>, Option<Instant>)> {
    match seen.get_mut(other) {
        // Taken back.
        _ if said.is_empty() => drop(seen.remove(other)),
        // It may be there since years.
        None => drop(seen.insert(other.to_owned(), (said, None))),
        Some(before) => {
            let at = if said.is_subset(&before.0) { before.1 } else { Some(now) };
            *before = (said, at);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_counts() {
        let mut recovery = Recovery::new("a", ["a", "b", "c"].map(str::to_owned).into_iter());
        assert_eq!(recovery.others, ["b", "c"]);
        let now = Instant::now();
        let mut say = |other: &str, said: Option<&'static str>, at: u64| {
            let said = said.map(str::to_owned).into_iter().collect();
            let at = now + Duration::from_secs(at);
            recovery.seen = observe(std::mem::take(&mut recovery.seen), other, said, at);
            recovery.fresh(at)
        };
        assert_eq!(say("b", Some("1"), 0), 0);
        assert_eq!(say("b", Some("1"), 3), 0);
        assert_eq!(say("b", Some("2"), 6), 1);
        assert_eq!(say("c", Some("1"), 6), 1);
        assert_eq!(say("c", Some("2"), 9), 2);
        assert_eq!(say("c", Some("3"), 22), 1);
        assert_eq!(say("c", None, 23), 0);
        assert_eq!(say("c", Some("3"), 24), 0);
    }

    #[tokio::test]
    async fn one_of_three_restores() -> Result<()> {
        let store = Store::from_parts(std::sync::Arc::new(object_store::memory::InMemory::new()), "p");
        let members = ["a", "b", "c"];
        let of = |member| Recovery::new(member, members.map(str::to_owned).into_iter());
        let begun = futures::future::try_join_all(members.map(|member| {
            let store = &store;
            async move { of(member).begin(store, 3).await }
        }));
        let begun = begun.await?;
        let ours: Vec<_> = begun.iter().zip(members).filter(|(other, _)| other.is_none()).collect();
        assert_eq!(ours.len(), 1, "{begun:?}");
        let restorer = ours[0].1;
        assert!(begun.iter().flatten().all(|other| other.starts_with(restorer)), "{begun:?}");
        assert_eq!(of(restorer).begin(&store, 3).await?, None, "it goes on after a crash");
        assert_eq!(of("c").begin(&store, 4).await?, None, "another loss is another restore");
        of("c").give_up(&store, 4).await;
        assert_eq!(of("a").begin(&store, 4).await?, None, "who cannot leaves it to another");
        let stranger = Recovery::new("d", ["d".to_owned()].into_iter()).begin(&store, 4).await?;
        assert!(stranger.as_ref().is_some_and(|who| who.contains("delete that object")), "{stranger:?}");
        let (mut a, mut b) = (of("a"), of("b"));
        tokio::time::pause();
        a.report(&store).await?;
        assert_eq!((b.report(&store).await?, a.report(&store).await?), (1, 1));
        tokio::time::advance(PERIOD).await;
        assert_eq!((a.report(&store).await?, b.report(&store).await?), (1, 2));
        tokio::time::advance(PERIOD).await;
        assert_eq!(a.report(&store).await?, 2);
        assert!(!b.may_begin(&store).await?);
        a.let_begin(&store).await?;
        assert!(b.may_begin(&store).await? && !a.may_begin(&store).await? && !of("b").may_begin(&store).await?);
        a.end(&store).await;
        assert_eq!(b.report(&store).await?, 1);
        assert!(b.may_begin(&store).await?, "also when who said so has begun");
        b.end(&store).await;
        assert_eq!(store.notes("recovery/begins/b").await?.len(), 0);
        Ok(())
    }
}
