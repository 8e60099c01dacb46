//! What may be deleted from a store, and why. Pure.
//!
//! A full snapshot and the deltas up to the next one are a *stream*. The policies are the predecessor's: each says which full
//! snapshots stay; the deltas of a stream go when a newer full snapshot has taken their place for as long as is asked for.
//!
//! # Invariants
//! - Nothing goes that is newer than the newest full snapshot that was verified, nor what its chain needs. Without one
//!   nothing goes at all.
//! - What the newest chain needs stays, and the last stream of every timeline stays as long as its full snapshot does: that
//!   of one that was left, by a restore to an earlier point, for a week at least.
//! - A delta that stays because it is young keeps the full snapshot and the deltas that it builds upon.
//! - What is not known to be a backup is not in a plan.
//!
//! Deleting part of a plan, in whatever order, takes nothing from what stays: nothing of that needs what goes.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Timelike};
use serde::Serialize;

use crate::catalog::{Catalog, Full, History, ObjectName, Restorable, Timeline};

/// Uploads that stayed unfinished for so long have no writer any more.
pub const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
const WEEK_MS: i64 = 7 * DAY_MS;

/// Which full snapshots stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The newest so many.
    LimitBased {
        /// How many.
        max_backups: usize,
    },
    /// All of the current hour, the newest of each hour of the day, of each of the seven days before, and of each of the four
    /// weeks before that.
    Exponential,
}

/// What is to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Which full snapshots.
    pub policy: Policy,
    /// Deltas younger than this stay, so that any point in time since then can be restored.
    pub deltas: Duration,
}

/// What becomes of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Its name, relative to the store.
    #[serde(serialize_with = "as_text")]
    pub object: ObjectName,
    /// Its bytes.
    pub bytes: u64,
    /// Whether it goes.
    pub delete: bool,
    /// Why.
    pub reason: &'static str,
}

fn as_text<S: serde::Serializer>(name: &ObjectName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

/// Decides over everything in a store. `verified` is the newest full snapshot that was found to be whole.
pub fn plan(catalog: &Catalog, retention: Retention, verified: Option<(Timeline, Full)>, now_ms: i64) -> Vec<Decision> {
    let mut decisions = Vec::new();
    let mut decide = |object: ObjectName, bytes: u64, verdict: Verdict| {
        let (delete, reason) = match verdict {
            Verdict::Keep(reason) => (false, reason),
            Verdict::Delete(reason) => (true, reason),
        };
        decisions.push(Decision { object, bytes, delete, reason });
    };
    let protected = protected(catalog);
    let newest = catalog.newest_restorable().map(|(timeline, _)| timeline);
    let mut fulls = by_policy(catalog, retention.policy, now_ms);
    for (timeline, history) in &catalog.timelines {
        let windows = windows(history, retention.deltas, now_ms);
        let is_abandoned = newest != Some(*timeline) && recently(history, now_ms);
        let mut stays_full = Vec::new();
        for full in &history.fulls {
            let name = full.name(*timeline);
            let by_policy = fulls.pop().unwrap_or(Verdict::Keep("no policy says otherwise"));
            let verdict = match verified {
                None => Verdict::Keep("no full snapshot was verified"),
                Some(anchor) if (*timeline, full.revision) >= (anchor.0, anchor.1.revision) => {
                    Verdict::Keep("nothing newer is verified")
                }
                _ if protected.contains(&name) => Verdict::Keep("the newest chain needs it"),
                _ if windows.iter().any(|window| full.revision == window.from) => {
                    Verdict::Keep("young deltas build upon it")
                }
                _ if is_abandoned && history.fulls.last() == Some(full) => {
                    Verdict::Keep("its timeline was left less than a week ago")
                }
                _ => by_policy,
            };
            stays_full.push(matches!(verdict, Verdict::Keep(_)));
            decide(name, full.size, verdict);
        }
        for delta in &history.deltas {
            let name = delta.name(*timeline);
            // The stream it is of: that of the newest full that does not have all of it.
            let stream = history.fulls.partition_point(|full| full.revision < delta.last).checked_sub(1);
            let is_last = stream.is_some_and(|stream| stream + 1 == history.fulls.len());
            let verdict = match verified {
                None => Verdict::Keep("no full snapshot was verified"),
                Some(anchor) if (*timeline, delta.last) > (anchor.0, anchor.1.revision) => {
                    Verdict::Keep("it follows the newest verified full snapshot")
                }
                _ if protected.contains(&name) => Verdict::Keep("the newest chain needs it"),
                _ if windows.iter().any(|window| delta.last > window.from && delta.first <= window.to) => {
                    Verdict::Keep("it is young, or a younger one builds upon it")
                }
                _ if is_last && stream.and_then(|stream| stays_full.get(stream)) == Some(&true) => {
                    Verdict::Keep("it is of the last stream of its timeline")
                }
                _ if is_last => Verdict::Delete("its full snapshot goes"),
                _ if stream.is_none() => Verdict::Delete("no full snapshot is before it"),
                _ => Verdict::Delete("a newer full snapshot has taken its place"),
            };
            decide(name, delta.size, verdict);
        }
    }
    for (name, bytes) in &catalog.uploading {
        let ObjectName::Uploading { unix_ms, .. } = name else { continue };
        let abandoned = now_ms.saturating_sub(*unix_ms) >= as_ms(ABANDONED_AFTER);
        let verdict = if abandoned {
            Verdict::Delete("an upload that was never finished")
        } else {
            Verdict::Keep("an upload that may be under way")
        };
        decide(*name, *bytes, verdict);
    }
    decisions
}

#[derive(Debug, Clone, Copy)]
enum Verdict {
    Keep(&'static str),
    Delete(&'static str),
}

fn as_ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What the chain to the latest state needs.
fn protected(catalog: &Catalog) -> BTreeSet<ObjectName> {
    let objects = catalog.newest_chain().map(|(timeline, chain)| chain.objects(timeline));
    objects.into_iter().flatten().map(|(name, _)| name).collect()
}

/// Revisions that are to stay restorable: from a full snapshot to where its chain ends.
#[derive(Debug, Clone, Copy)]
struct Window {
    from: i64,
    to: i64,
}

/// For each run of revisions without a gap that has young deltas: the full snapshot upon which these build, and all after it.
fn windows(history: &History, keep: Duration, now_ms: i64) -> Vec<Window> {
    if keep.is_zero() {
        return Vec::new();
    }
    let since = now_ms.saturating_sub(as_ms(keep));
    let runs = history.restorable();
    let window = |(at, run): (usize, &Restorable)| {
        // What was there when the time began, and all that came after.
        let is_last = at + 1 == runs.len();
        let young = history.deltas.iter().filter(|delta| delta.unix_ms > since);
        let young =
            young.filter(|delta| delta.last > run.first && delta.first <= run.last).map(|delta| delta.first).min();
        if young.is_none() && run.last_unix_ms < since && !is_last {
            return None;
        }
        let of_run = |full: &&Full| (run.first..=run.last).contains(&full.revision);
        let newest = |fits: &dyn Fn(&Full) -> bool| {
            let found = history.fulls.iter().rev().filter(of_run).find(|full| fits(full));
            found.map_or(run.first, |full| full.revision)
        };
        // By the time, and by what young deltas build upon: clocks are set back.
        let by_time = newest(&|full| full.unix_ms <= since);
        let by_deltas = young.map_or(by_time, |first| newest(&|full| full.revision < first));
        Some(Window { from: by_time.min(by_deltas), to: run.last })
    };
    runs.iter().enumerate().filter_map(window).collect()
}

/// Whether a timeline was still written to not long ago. What somebody restored away from may be missed.
fn recently(history: &History, now_ms: i64) -> bool {
    let Some(full) = history.fulls.last() else { return false };
    let after = history.deltas.iter().filter(|delta| delta.last > full.revision).map(|delta| delta.unix_ms);
    let last = after.max().unwrap_or(full.unix_ms).max(full.unix_ms);
    now_ms.saturating_sub(last) < WEEK_MS
}

/// What a policy says of each full snapshot; the last is of the oldest.
fn by_policy(catalog: &Catalog, policy: Policy, now_ms: i64) -> Vec<Verdict> {
    let fulls: Vec<Full> =
        catalog.timelines.values().rev().flat_map(|history| history.fulls.iter().rev()).copied().collect();
    let mut taken = BTreeSet::new();
    let mut verdict = |(at, full): (usize, &Full)| match policy {
        _ if at == 0 => {
            taken.insert(Bucket::of(full.unix_ms, now_ms));
            Verdict::Keep("it is the newest")
        }
        Policy::LimitBased { max_backups } if at < max_backups => Verdict::Keep("it is one of the newest"),
        Policy::LimitBased { .. } => Verdict::Delete("there are enough newer ones"),
        // By the order of revisions, so that a clock that was set back does not matter.
        Policy::Exponential => Bucket::of(full.unix_ms, now_ms).verdict(&mut taken),
    };
    fulls.iter().enumerate().map(&mut verdict).collect()
}

/// Of each of these the newest full snapshot stays. Days and weeks end at the end of this day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Bucket {
    ThisHour,
    Hour(i64),
    Day(i64),
    Week(i64),
    Older,
}

impl Bucket {
    fn of(unix_ms: i64, now_ms: i64) -> Self {
        let now = DateTime::from_timestamp_millis(now_ms).unwrap_or_default();
        let into_day = i64::from(now.num_seconds_from_midnight()) * 1000 + i64::from(now.timestamp_subsec_millis());
        let end_of_day = now_ms.saturating_sub(into_day).saturating_add(DAY_MS - 1);
        let age = |unix_ms: i64| end_of_day.saturating_sub(unix_ms).max(0);
        match age(unix_ms) {
            age_ms if age_ms / HOUR_MS <= age(now_ms) / HOUR_MS => Self::ThisHour,
            age_ms if age_ms < DAY_MS => Self::Hour(age_ms / HOUR_MS),
            age_ms if age_ms < 8 * DAY_MS => Self::Day(age_ms / DAY_MS),
            age_ms if age_ms < 5 * WEEK_MS => Self::Week((age_ms - DAY_MS) / WEEK_MS),
            _ => Self::Older,
        }
    }

    fn verdict(self, taken: &mut BTreeSet<Self>) -> Verdict {
        let is_newest = taken.insert(self);
        match self {
            Self::ThisHour => Verdict::Keep("it is of this hour"),
            Self::Hour(_) if is_newest => Verdict::Keep("it is the newest of its hour"),
            Self::Hour(_) => Verdict::Delete("a newer one is of the same hour"),
            Self::Day(_) if is_newest => Verdict::Keep("it is the newest of its day"),
            Self::Day(_) => Verdict::Delete("a newer one is of the same day"),
            Self::Week(_) if is_newest => Verdict::Keep("it is the newest of its week"),
            Self::Week(_) => Verdict::Delete("a newer one is of the same week"),
            Self::Older => Verdict::Delete("it is older than five weeks"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::catalog::Delta;

    /// 2026-11-22T12:30:00Z.
    const NOW: i64 = 1_795_350_600_000;

    const NO_DELTAS: Duration = Duration::ZERO;

    /// (timeline, first, last, hours ago); first 0 for a full.
    fn catalog(objects: &[(Timeline, i64, i64, i64)]) -> Catalog {
        Catalog::new(objects.iter().map(|(timeline, first, last, hours)| {
            let (timeline, unix_ms) = (*timeline, NOW - hours * HOUR_MS);
            let name = match first {
                0 => ObjectName::Full { timeline, revision: *last, unix_ms },
                first => ObjectName::Delta { timeline, first: *first, last: *last, unix_ms },
            };
            (name.to_string(), 1)
        }))
    }

    fn newest(catalog: &Catalog) -> Option<(Timeline, Full)> {
        catalog.newest_restorable().and_then(|(timeline, history)| Some((timeline, *history.fulls.last()?)))
    }

    fn kept(catalog: &Catalog, policy: Policy, deltas: Duration) -> Vec<(i64, i64)> {
        let plan = plan(catalog, Retention { policy, deltas }, newest(catalog), NOW);
        let kept = plan.iter().filter(|decision| !decision.delete);
        let mut kept: Vec<_> = kept
            .filter_map(|decision| {
                let (first, last) = decision.object.revisions()?;
                Some(if decision.object.is_full() { (0, last) } else { (first, last) })
            })
            .collect();
        kept.sort_unstable_by_key(|(first, last)| (*last, *first));
        kept
    }

    #[test]
    fn the_newest_so_many_stay_and_deltas_of_older_streams_go() {
        let catalog = catalog(&[
            (1, 0, 10, 50),
            (1, 11, 20, 49),
            (1, 0, 20, 48),
            (1, 21, 30, 47),
            (1, 0, 30, 46),
            (1, 31, 40, 45),
            (1, 35, 50, 44),
        ]);
        assert_eq!(
            kept(&catalog, Policy::LimitBased { max_backups: 2 }, NO_DELTAS),
            [(0, 20), (0, 30), (31, 40), (35, 50)]
        );
        assert_eq!(kept(&catalog, Policy::LimitBased { max_backups: 0 }, NO_DELTAS), [(0, 30), (31, 40), (35, 50)]);
        // Deltas of the last 48 hours, and what they build upon.
        let two_days = Duration::from_secs(48 * 3600);
        let expected = [(0, 20), (0, 30), (21, 30), (31, 40), (35, 50)];
        assert_eq!(kept(&catalog, Policy::LimitBased { max_backups: 1 }, two_days), expected);
    }

    #[test]
    fn young_deltas_beyond_a_hole_keep_the_full_that_they_build_upon() {
        let catalog = catalog(&[(1, 0, 100, 10), (1, 101, 150, 9), (1, 0, 200, 8), (1, 201, 250, 7), (1, 0, 300, 6)]);
        let day = Duration::from_secs(24 * 3600);
        let expected = [(0, 100), (101, 150), (0, 200), (201, 250), (0, 300)];
        assert_eq!(kept(&catalog, Policy::LimitBased { max_backups: 1 }, day), expected);
    }

    #[test]
    fn of_each_hour_day_and_week_one_stays() {
        let hours = [0, 0, 1, 1, 2, 13, 14, 36, 37, 60, 24 * 9, 24 * 10, 24 * 17, 24 * 40];
        let objects: Vec<_> =
            (1..).zip(hours.iter().rev()).map(|(revision, hours)| (1, 0, revision * 10, *hours)).collect();
        let catalog = catalog(&objects);
        let kept: Vec<i64> = kept(&catalog, Policy::Exponential, NO_DELTAS)
            .iter()
            .map(|(_, last)| hours[hours.len() - *last as usize / 10])
            .rev()
            .collect();
        assert_eq!(kept, [0, 0, 1, 2, 13, 37, 24 * 9, 24 * 17]);
    }

    #[test]
    fn the_last_stream_of_an_abandoned_timeline_stays_with_its_full() {
        let left_at = |ago: i64| {
            let in_first = [(1, 0, 10, ago + 10), (1, 11, 20, ago + 9), (1, 0, 20, ago + 8), (1, 21, 30, ago + 7)];
            catalog(&[in_first.as_slice(), &[(2, 0, 25, 40), (2, 26, 40, 39)]].concat())
        };
        let recent = kept(&left_at(40), Policy::LimitBased { max_backups: 1 }, NO_DELTAS);
        assert_eq!(recent, [(0, 20), (0, 25), (21, 30), (26, 40)]);
        let catalog = left_at(24 * 8);
        let two = Policy::LimitBased { max_backups: 2 };
        assert_eq!(kept(&catalog, two, NO_DELTAS), [(0, 20), (0, 25), (21, 30), (26, 40)]);
        let one = Policy::LimitBased { max_backups: 1 };
        assert_eq!(kept(&catalog, one, NO_DELTAS), [(0, 25), (26, 40)]);
    }

    #[test]
    fn nothing_newer_than_what_is_verified_goes() {
        let catalog =
            catalog(&[(1, 0, 10, 9), (1, 11, 20, 8), (1, 0, 20, 7), (1, 21, 30, 6), (1, 0, 30, 5), (1, 31, 40, 4)]);
        let retention = Retention { policy: Policy::LimitBased { max_backups: 1 }, deltas: NO_DELTAS };
        let fulls = &catalog.timelines[&1].fulls;
        let deleted =
            |verified| plan(&catalog, retention, verified, NOW).iter().filter(|decision| decision.delete).count();
        assert_eq!(deleted(None), 0);
        assert_eq!(deleted(Some((1, fulls[0]))), 0);
        assert_eq!(deleted(Some((1, fulls[1]))), 2);
        assert_eq!(deleted(Some((1, fulls[2]))), 4);
    }

    #[test]
    fn unfinished_uploads_go_when_they_are_old() {
        let upload =
            |hours| ObjectName::Uploading { timeline: 1, unix_ms: NOW - hours * HOUR_MS, random: 7 }.to_string();
        let catalog = Catalog::new([(upload(1), 5), (upload(30), 5), ("v2/notes".to_owned(), 1)]);
        let decisions = plan(&catalog, Retention { policy: Policy::Exponential, deltas: NO_DELTAS }, None, NOW);
        assert_eq!(decisions.iter().map(|decision| decision.delete).collect::<Vec<_>>(), [true, false]);
    }

    proptest! {
        /// Whatever is deleted of a plan: what could be restored of the newest chain and from each full that stays still can.
        #[test]
        fn what_stays_can_be_restored(
            fulls in prop::collection::vec((1..3u32, 1..60i64, 0..2000i64), 1..8),
            deltas in prop::collection::vec((1..3u32, 1..60i64, 0..9i64, 0..2000i64), 0..25),
            max_backups in 0..5usize,
            exponential: bool,
            hours in 0..100u64,
            executed in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut objects: Vec<_> = fulls.iter().map(|(timeline, revision, ago)| (*timeline, 0, *revision, *ago)).collect();
            objects.extend(deltas.iter().map(|(timeline, first, more, ago)| (*timeline, *first, first + more, *ago)));
            let before = catalog(&objects);
            let policy = if exponential { Policy::Exponential } else { Policy::LimitBased { max_backups } };
            let retention = Retention { policy, deltas: Duration::from_secs(hours * 3600) };
            let decisions = plan(&before, retention, newest(&before), NOW);
            let goes = |name: &ObjectName| {
                decisions.iter().zip(executed.iter().cycle()).any(|(decision, executed)| decision.object == *name && decision.delete && *executed)
            };
            let left = Catalog::new(decisions.iter().filter(|decision| !goes(&decision.object)).map(|decision| (decision.object.to_string(), 1)));
            let (timeline, history) = before.newest_restorable().unwrap();
            let chain = history.newest_chain().unwrap();
            let (after_timeline, after) = left.newest_restorable().unwrap();
            prop_assert_eq!((after_timeline, after.newest_chain().unwrap().last), (timeline, chain.last));
            // And every young delta that could be restored still can.
            for (timeline, history) in &before.timelines {
                let reaches = |history: &History, delta: &Delta| {
                    history.restorable().iter().any(|run| run.first < delta.last && delta.last <= run.last && run.first <= delta.first)
                };
                let young = |delta: &&Delta| delta.unix_ms > NOW - i64::try_from(hours).unwrap() * HOUR_MS;
                for delta in history.deltas.iter().filter(young).filter(|delta| reaches(history, delta)) {
                    let after = left.timelines.get(timeline).unwrap();
                    prop_assert!(after.deltas.contains(delta) && reaches(after, delta), "{:?} of {:?}", delta, timeline);
                }
            }
            // A second run finds nothing more to delete once the first has run whole.
            let kept = Catalog::new(decisions.iter().filter(|decision| !decision.delete).map(|decision| (decision.object.to_string(), 1)));
            let again = plan(&kept, retention, newest(&kept), NOW);
            prop_assert!(again.iter().all(|decision| !decision.delete), "{:?}", again);
        }
    }
}
