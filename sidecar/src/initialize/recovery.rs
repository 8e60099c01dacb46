//! Who restores a cluster of several members that all lost their data: exactly one.
//!
//! A member that lost its data and finds nobody serving says so in the store, again and again, in an object of its own. Only
//! when every member is seen to say so, which is when its object changes, is the cluster lost: until then one that is merely
//! away may have data that is newer than the backups. Who then creates the object that is named after the timeline restores
//! it, also after a crash; the others wait for its cluster and join it. No clocks are compared.
//!
//! ```text
//! <prefix>/recovery/lost-<member>.json      rewritten while that member has no data and nobody serves
//! <prefix>/recovery/t<timeline:08>.json     created once: who restores that timeline
//! ```

use std::collections::BTreeMap;
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

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'r> {
    member: &'r str,
    /// Another in each report and each run.
    beat: String,
    what: &'static str,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Restorer {
    member: String,
}

/// What a member without data knows of the others.
#[derive(Debug)]
pub(super) struct Recovery {
    member: String,
    others: Vec<String>,
    /// Makes the reports of this run differ from those of another.
    run: String,
    beats: u64,
    /// What each of the others said last, and when that was seen to change.
    seen: BTreeMap<String, (Bytes, Option<Instant>)>,
}

impl Recovery {
    /// Of a member among these.
    pub(super) fn new(member: &str, members: impl Iterator<Item = String>) -> Self {
        let others = members.filter(|other| other != member).collect();
        let run = format!("{}-{}", std::process::id(), chrono::Utc::now().timestamp_micros());
        Self { member: member.to_owned(), others, run, beats: 0, seen: BTreeMap::new() }
    }

    /// Says that ours has no data; how many members, ours among them, are seen to say so.
    pub(super) async fn report(&mut self, store: &Store) -> Result<usize> {
        self.beats += 1;
        let beat = format!("{}-{}", self.run, self.beats);
        let what = "this member has no data that etcd can start on, and no other member serves";
        let report = Report { member: &self.member, beat, what };
        let json =
            serde_json::to_vec_pretty(&report).map_err(|error| Error::Bug { what: format!("report: {error}") })?;
        store.put_note(&name_of(&self.member), json.into()).await?;
        for other in &self.others {
            let said = store.note(&name_of(other)).await?;
            self.seen = observe(std::mem::take(&mut self.seen), other, said, Instant::now());
        }
        Ok(1 + self.fresh(Instant::now()))
    }

    fn fresh(&self, now: Instant) -> usize {
        let is_fresh = |at: &Instant| now.saturating_duration_since(*at) < FRESH;
        self.seen.values().filter(|(_, changed)| changed.as_ref().is_some_and(is_fresh)).count()
    }

    /// Makes ours the one that restores a timeline, unless another is: who.
    pub(super) async fn begin(&self, store: &Store, timeline: Timeline) -> Result<Option<String>> {
        let name = format!("recovery/t{timeline:08}.json");
        let ours = Restorer { member: self.member.clone() };
        let json = serde_json::to_vec(&ours).map_err(|error| Error::Bug { what: format!("claim: {error}") })?;
        if store.create_note(&name, json.into()).await? {
            return Ok(None);
        }
        let there = store.note(&name).await?.unwrap_or_default();
        let there: Restorer = serde_json::from_slice(&there).map_err(|error| {
            Error::corrupt(format!("{}: it does not say who restores: {error}", store.location(&name)))
        })?;
        Ok((there != ours).then_some(there.member))
    }

    /// Takes back what ours said.
    pub(super) async fn end(self, store: &Store) {
        if self.beats > 0
            && let Err(error) = store.remove_note(&name_of(&self.member)).await
        {
            tracing::debug!(%error, "what was said of lost data is not taken back");
        }
    }
}

fn name_of(member: &str) -> String {
    // Whatever a member is called, it is one name.
    let member: String = url::form_urlencoded::byte_serialize(member.as_bytes()).collect();
    format!("recovery/lost-{member}.json")
}

fn observe(
    mut seen: BTreeMap<String, (Bytes, Option<Instant>)>,
    other: &str,
    said: Option<Bytes>,
    now: Instant,
) -> BTreeMap<String, (Bytes, Option<Instant>)> {
    match (said, seen.get_mut(other)) {
        // Taken back.
        (None, _) => drop(seen.remove(other)),
        // It may be there since years.
        (Some(said), None) => drop(seen.insert(other.to_owned(), (said, None))),
        (Some(said), Some(before)) if said != before.0 => *before = (said, Some(now)),
        (Some(_), Some(_)) => {}
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
            let said = said.map(|said| Bytes::from_static(said.as_bytes()));
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
        assert!(begun.iter().flatten().all(|other| other == restorer), "{begun:?}");
        assert_eq!(of(restorer).begin(&store, 3).await?, None, "it goes on after a crash");
        assert_eq!(of("c").begin(&store, 4).await?, None, "another loss is another restore");
        Ok(())
    }
}
