//! Which chain a restore reads, and at which revision it ends.

use std::path::Path;

use serde::Serialize;

use super::Source;
use crate::catalog::{Catalog, Delta, History, Timeline};
use crate::delta::Record;
use crate::object::delta_in_memory;
use crate::store::Store;
use crate::{Error, Result};

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice {
    /// Another timeline than the one that has what is asked for.
    pub timeline: Option<Timeline>,
    /// Start from the full snapshot of this revision, for when a newer one is damaged.
    pub full_revision: Option<i64>,
    /// End before a gap, when the latest state is asked for.
    pub accept_gap: bool,
    /// Where to end.
    pub upto: Upto,
}

/// Where a restore ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Upto {
    /// At the last revision there is.
    #[default]
    Latest,
    /// At this revision.
    Revision(i64),
    /// At the last revision that was received by this time, in Unix milliseconds.
    Time(i64),
}

/// The revision that was current at a time, as far as a backup can tell: it knows when the sidecar received each change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AtTime {
    /// The revision.
    pub revision: i64,
    /// When it was received; `None` when only a full snapshot has it, or an earlier delta.
    pub received_unix_ms: Option<i64>,
    /// When the next one was received; `None` when the backup has none.
    pub next_unix_ms: Option<i64>,
}

/// Chooses what to read for a choice. Reads names, and for a time the one delta that was open then.
pub async fn choose(store: &Store, catalog: &Catalog, choice: &Choice) -> Result<Source> {
    let url = store.url();
    warn_of_lookalikes(catalog);
    let (timeline, history) = choose_timeline(store, catalog, choice).await?;
    let at_time = match choice.upto {
        Upto::Time(unix_ms) => Some(at_time(store, timeline, history, unix_ms).await?),
        Upto::Latest | Upto::Revision(_) => None,
    };
    let upto = match choice.upto {
        Upto::Latest => None,
        Upto::Revision(revision) => Some(revision),
        Upto::Time(_) => at_time.map(|at| at.revision),
    };
    let chain = match (choice.full_revision, upto) {
        (Some(revision), upto) => {
            let full = history.fulls.iter().rev().find(|full| full.revision == revision);
            full.map(|full| history.chain_from(*full).upto(upto.unwrap_or(i64::MAX)))
        }
        (None, Some(upto)) => history.chain_to(upto),
        (None, None) => history.newest_chain(),
    };
    let chain = chain.ok_or_else(|| {
        let which = match (choice.full_revision, upto) {
            (Some(revision), _) => format!("of revision {revision}"),
            (None, Some(upto)) => format!("at or before revision {upto}"),
            (None, None) => "to start from".to_owned(),
        };
        let oldest = history.fulls.first().map(|full| format!("; its oldest is of revision {}", full.revision));
        Error::missing(format!(
            "timeline {timeline} of store {url} has no full snapshot {which}{}",
            oldest.unwrap_or_default()
        ))
    })?;
    if let Some(upto) = upto.filter(|upto| *upto < chain.full.revision) {
        let full = chain.full.revision;
        return Err(Error::invalid(format!(
            "revision {upto} is before the full snapshot of revision {full}: choose an older one"
        )));
    }
    let reached = upto.is_some_and(|upto| chain.last >= upto);
    if let Some(gap) = chain.gap.filter(|_| !reached) {
        let (first, last, after) = (gap.after + 1, gap.before - 1, gap.after);
        let what = format!("backups of revisions {first} to {last} are missing in timeline {timeline} of store {url}");
        if let Some(upto) = upto {
            return Err(Error::missing(format!(
                "revision {upto} cannot be restored: {what}; the last one before that is {after}"
            )));
        }
        if !choice.accept_gap {
            return Err(Error::missing(format!(
                "{what}: a restore can reach revision {after} but none of the later ones; give --accept-gap to restore up to there"
            )));
        }
        tracing::warn!(after, before = gap.before, "restore ends before the gap");
    } else if let Some(upto) = upto.filter(|_| !reached) {
        return Err(Error::missing(format!(
            "timeline {timeline} of store {url} ends at revision {}, before revision {upto}",
            chain.last
        )));
    }
    let passed_over = passed_over(store, catalog, timeline).await;
    Ok(Source::Chain { timeline, chain, upto, at_time, passed_over })
}

/// The newest timeline, when that is another than the chosen one; what it does not tell is no reason not to restore.
async fn passed_over(store: &Store, catalog: &Catalog, chosen: Timeline) -> Option<(Timeline, String)> {
    let (newest, history) = catalog.newest_restorable().filter(|(newest, _)| *newest > chosen)?;
    let whose = store.whose(newest, history).await;
    let whose =
        whose.inspect_err(|error| tracing::warn!(%error, newest, "it is not known whose the newest timeline is"));
    Some((newest, format!("{:x}", whose.ok()??)))
}

fn warn_of_lookalikes(catalog: &Catalog) {
    let looks_like_one = |name: &str| Path::new(name).extension().is_some_and(|extension| extension == "zst");
    for (name, _) in catalog.foreign.iter().filter(|(name, _)| looks_like_one(name)) {
        tracing::warn!(object = name, "leave out an object that looks like a backup and is not named like one");
    }
}

/// The timeline that has what is asked for: the newest, or the one that it forks from when that is where the revision or the
/// time lies.
async fn choose_timeline<'c>(store: &Store, catalog: &'c Catalog, choice: &Choice) -> Result<(Timeline, &'c History)> {
    let url = store.url();
    if let Some(wanted) = choice.timeline {
        let history = catalog.timelines.get(&wanted).ok_or_else(|| {
            Error::missing(format!("store {url} has no timeline {wanted}; `sidecar list` shows those it has"))
        })?;
        return Ok((wanted, history));
    }
    let (newest, history) = catalog.newest_restorable().ok_or_else(|| nothing_to_restore(catalog, url))?;
    if let Some((later, _)) = catalog.newest().filter(|(later, _)| *later > newest) {
        tracing::warn!(
            timeline = newest,
            later,
            "the newest timeline has no full snapshot yet; restore from one before"
        );
    }
    let reach = |history: &History| history.newest_chain().map_or(0, |chain| chain.last);
    let further = catalog.timelines.iter().rev().find(|(_, other)| reach(other) > reach(history));
    if let Some((other, there)) = further.filter(|_| choice.upto == Upto::Latest) {
        tracing::warn!(
            timeline = newest,
            revision = reach(history),
            other,
            other_revision = reach(there),
            "an older timeline reaches further than the newest, which is of a cluster that was restored to an earlier point or began empty; --timeline restores the older one"
        );
    }
    match choice.upto {
        Upto::Latest => Ok((newest, history)),
        Upto::Time(unix_ms) => {
            let began = |history: &History| history.fulls.iter().map(|full| full.unix_ms).min();
            let found =
                catalog.timelines.iter().rev().find(|(_, history)| began(history).is_some_and(|at| at <= unix_ms));
            found.map(|(timeline, history)| (*timeline, history)).ok_or_else(|| {
                let oldest = catalog.timelines.values().filter_map(began).min().unwrap_or_default();
                let (asked, oldest) = (crate::human::time(unix_ms), crate::human::time(oldest));
                Error::missing(format!("nothing is of {asked}: the oldest full snapshot in store {url} is of {oldest}"))
            })
        }
        Upto::Revision(revision) => {
            let (mut timeline, mut history) = (newest, history);
            // A timeline has what its fulls reach back to; before that it shares what its parent has up to the fork.
            while history.fulls.first().is_none_or(|full| full.revision > revision) {
                // The predecessor's backups are no timeline with a parent.
                let Some(description) = store.description(timeline).await? else { break };
                let parent = catalog.timelines.get(&description.parent);
                let Some(parent_history) = parent else { break };
                if revision > description.fork_revision {
                    let fork = match description.fork_revision {
                        0 => "it is not known where the two part".to_owned(),
                        fork => format!("the two part after revision {fork}"),
                    };
                    return Err(Error::missing(format!(
                        "timeline {timeline} of store {url} has no backup of revision {revision}; what timeline {} has under that number may be another history, {fork}; name it with --timeline {} to restore that",
                        description.parent, description.parent
                    )));
                }
                (timeline, history) = (description.parent, parent_history);
            }
            Ok((timeline, history))
        }
    }
}

fn nothing_to_restore(catalog: &Catalog, url: &str) -> Error {
    let what = if catalog.timelines.values().any(|history| !history.deltas.is_empty()) {
        "has deltas but no full snapshot".to_owned()
    } else if !catalog.timelines.is_empty() {
        "has no full snapshot yet".to_owned()
    } else if catalog.foreign.is_empty() {
        "is empty; check bucket and prefix".to_owned()
    } else {
        format!("has {} objects but none of ours; check the prefix", catalog.foreign.len())
    };
    Error::missing(format!("nothing to restore: store {url} {what}"))
}

/// Finds the last revision that was received by a time.
async fn at_time(store: &Store, timeline: Timeline, history: &History, unix_ms: i64) -> Result<AtTime> {
    let Some(delta) = history.deltas.iter().find(|delta| delta.unix_ms >= unix_ms) else {
        // Every delta was closed by then.
        let last = history.deltas.iter().map(|delta| delta.last).max();
        let revision = known_between(store, history, unix_ms, last, None)?;
        return Ok(AtTime { revision, received_unix_ms: None, next_unix_ms: None });
    };
    let mut times = revision_times(store, timeline, delta).await?;
    let mut next_unix_ms = times.iter().map(|(_, received)| *received).find(|received| *received > unix_ms);
    if next_unix_ms.is_none()
        && let Some(after) = history.deltas.iter().find(|after| after.last > delta.last)
    {
        next_unix_ms = revision_times(store, timeline, after).await?.first().map(|(_, received)| *received);
    }
    times.retain(|(_, received)| *received <= unix_ms);
    if times.is_empty()
        && let Some(before) = history.deltas.iter().rev().find(|before| before.last.saturating_add(1) == delta.first)
    {
        times = revision_times(store, timeline, before).await?;
    }
    let last = times.last().copied();
    let revision = match last {
        Some((revision, _)) => revision,
        None => known_between(store, history, unix_ms, None, Some(delta.first - 1))?,
    };
    Ok(AtTime { revision, received_unix_ms: last.map(|(_, received)| received), next_unix_ms })
}

/// The revision at a time that no delta covers: that of what was taken last by then (`before`, or a full snapshot), when what
/// was taken next (`after`, or a full snapshot) has the same. What changed between two that differ nobody knows.
fn known_between(
    store: &Store,
    history: &History,
    unix_ms: i64,
    before: Option<i64>,
    after: Option<i64>,
) -> Result<i64> {
    let url = store.url();
    let upto = after.unwrap_or(i64::MAX);
    let fulls = || history.fulls.iter().map(|full| (full.revision, full.unix_ms <= unix_ms));
    let by_then = fulls().filter(|(full, is_by_then)| *is_by_then && *full <= upto).map(|(full, _)| full);
    let later = fulls().filter(|(_, is_by_then)| !is_by_then).map(|(full, _)| full);
    let (by_then, later) = (by_then.chain(before).max(), later.chain(after).min());
    match (by_then, later) {
        (Some(before), Some(after)) if before < after => Err(Error::missing(format!(
            "the time lies between revisions {before} and {after}, and what changed between the two is not in store {url}: restore one of them with --revision, or give another time"
        ))),
        (Some(revision), _) => Ok(revision),
        (None, _) if fulls().any(|(_, is_by_then)| is_by_then) => Err(Error::missing(format!(
            "the times in store {url} go back and forth, as of a clock that was wrong, so that this one cannot be found: name a revision with --revision (`sidecar list` shows which there are)"
        ))),
        (None, _) => Err(Error::missing(format!(
            "nothing was backed up by that time: the oldest full snapshot in store {url} is of a later one"
        ))),
    }
}

/// The revisions of a delta and when each was received. A clock that was set back in between does not make times go back.
async fn revision_times(store: &Store, timeline: Timeline, delta: &Delta) -> Result<Vec<(i64, i64)>> {
    let name = delta.name(timeline);
    let (object, location) = (store.get_whole(&name, delta.size).await?, store.location(&name));
    let mut reader = delta_in_memory(&name, &object, &location)?;
    let mut times: Vec<(i64, i64)> = Vec::new();
    while let Some(record) = reader.next()? {
        if let Record::Revision { main, received_unix_ms } = record {
            let latest = times.last().map_or(received_unix_ms, |(_, before)| received_unix_ms.max(*before));
            times.push((main, latest));
        }
    }
    Ok(times)
}
