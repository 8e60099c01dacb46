//! Before etcd starts: looks at the data directory and the store, decides what the one needs of the other, and does it.
//!
//! # Invariants
//! - Always the full check, and never under a running etcd.
//! - What is replaced moves aside, and of what lies there a few stay. Sound data is never replaced.
//! - Nothing begins anew where a store cannot be asked whether there is a backup.

mod aside;
mod cluster;
mod decision;
mod member;
mod recovery;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::Utc;
use etcd_format::datadir::{self, Answered, Severity, Verdict, Verify, WantHash};
use etcd_format::membership::{ClusterId, MemberId};
use etcd_format::wal;
use proto::backup::ObjectMeta;
use tokio_util::sync::CancellationToken;

pub use decision::{Backups, Cause, Damaged, Data, Decision, Differs, Facts, Live, Part, Place, Sound, decide};
pub use member::Member;

use cluster::Serving;
use recovery::Recovery;

use crate::catalog::{Catalog, Timeline};
use crate::etcd::EtcdFlags;
use crate::kinship::{self, Joined};
use crate::metrics::Metrics;
use crate::restore::{self, Choice, Far, Plan, Progress, Source, Target};
use crate::store::Store;
use crate::{Class, Error, Result};

/// Entries without a revision, such as grants of leases, that etcd may have written between the last event of a delta and the
/// moment that its position was asked for.
const SLACK: i128 = 16;

/// Newest objects that are asked for a hash of the data,
const MOST_RECORDED: usize = 8;
/// and how long: the data is there, and waits.
const RECORDED_DEADLINE: Duration = Duration::from_secs(5);
/// When that differs, how long it is compared with the backups in detail.
const COMPARE_DEADLINE: Duration = Duration::from_secs(30);

/// While others are waited for, the store is listed so often.
const LISTING_PERIOD: Duration = Duration::from_secs(30);

/// What an initialization goes by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whose data it is.
    pub member: Member,
    /// Where backups are; none for only the check.
    pub store: Option<Store>,
    /// How the other members are reached; none in a cluster of one.
    pub others: Option<EtcdFlags>,
    /// See [`Facts::may_start_empty`].
    pub may_start_empty: bool,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What was done.
    pub done: Decision,
    /// Why.
    pub reason: String,
    /// Revision of the data; 0 when there is none.
    pub revision: i64,
    /// Where what was there lies now.
    pub moved_to: Option<PathBuf>,
    /// Whether nothing was looked at because an etcd runs on the data.
    pub in_use: bool,
    /// The members of the cluster that it joins, as its etcd wants them.
    pub joins: Option<String>,
    /// What was found.
    pub cause: Option<Cause>,
    /// What etcd is to have once it has applied its log, where the data was kept for that.
    pub owes: Option<Owed>,
}

/// What is to come of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// The last revision of the backups.
    pub revision: i64,
    /// Raft index of the log's last entry.
    pub log_end: u64,
}

impl Outcome {
    /// Nothing is touched, because something runs on the data.
    pub fn in_use(why: &dyn std::fmt::Display) -> Self {
        let (done, reason) = (Decision::Refuse { may_pass: true }, format!("nothing is touched: {why}"));
        Self { done, reason, revision: 0, moved_to: None, in_use: true, joins: None, cause: None, owes: None }
    }
}

/// Told to whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The data is being checked.
    Check,
    /// It is, and the other members and the store are asked.
    Ask,
    /// Why it is, and what is done.
    Decided(Decision, String),
    /// What is waited for.
    Wait(String),
    /// How far it is being restored or appended.
    Restore(Far),
}

impl Step {
    /// A word for what is being done.
    pub fn phase(&self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Ask => "ask",
            Self::Decided(..) => "decided",
            Self::Wait(_) => "wait",
            Self::Restore(far) => far.phase,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Check => f.write_str("the data is being checked"),
            Self::Ask => f.write_str("the data is checked; the other members and the store are asked"),
            Self::Decided(decision, why) => write!(f, "{}: {why}", decision.name()),
            Self::Wait(why) => f.write_str(why),
            Self::Restore(far) => far.fmt(f),
        }
    }
}

/// Looks, decides and acts.
#[tracing::instrument(skip_all, fields(member = settings.member.name))]
pub async fn initialize(
    settings: &Settings,
    stop: &CancellationToken,
    see: Arc<dyn Fn(Step) + Send + Sync>,
) -> Result<Outcome> {
    let names = settings.member.cluster.members().iter().map(|member| member.name.clone());
    let mut recovery = Recovery::new(&settings.member.name, names);
    let ended = until_decided(settings, stop, &see, &mut recovery).await;
    if let Some(store) = &settings.store {
        recovery.end(store).await;
    }
    ended
}

async fn until_decided(
    settings: &Settings,
    stop: &CancellationToken,
    see: &Arc<dyn Fn(Step) + Send + Sync>,
    recovery: &mut Recovery,
) -> Result<Outcome> {
    let dir = &settings.member.data_dir;
    let mut checked: Option<Checked> = None;
    let (mut told, mut waits_for) = (String::new(), String::new());
    loop {
        // Damage does not heal; but somebody may put something else in its place.
        let there = identity(dir);
        if checked.as_ref().is_none_or(|checked| checked.there != there) {
            if waits_for.is_empty() {
                see(Step::Check);
            }
            // From here on no etcd starts on it until it is known what becomes of it.
            let held = datadir::hold(dir).and_then(|held| {
                datadir::Staged::clear_leftovers(datadir::RealDisk, dir)?;
                Ok(held)
            });
            let held = match held {
                Err(error @ etcd_format::Error::Precondition { .. }) => return Ok(Outcome::in_use(&error)),
                held => held.map_err(Error::format(dir.display().to_string()))?,
            };
            let answers = answers(settings.store.as_ref()).await;
            let verdict = check(dir, &answers).await?;
            checked = Some(Checked { there, held, verdict, answers, listed: None });
            if waits_for.is_empty() {
                // Members without a quorum, or a store that is slow, take their time to say so.
                see(Step::Ask);
            }
        }
        let Some(now) = &mut checked else { return Err(Error::Bug { what: "nothing was checked".into() }) };
        let (facts, serving, is_recent) = observe(settings, now, recovery).await;
        let revision = if let Data::Sound(sound) = &facts.data { sound.revision } else { 0 };
        let (decision, reason) = decide(&facts);
        if !matches!(decision, Decision::Wait | Decision::Join) && !is_recent {
            // Nothing of the store's is done by an old listing.
            now.listed = None;
            continue;
        }
        if reason != told {
            tracing::info!(?decision, reason, "decided what becomes of the data");
            see(Step::Decided(decision, reason.clone()));
            (told, waits_for) = (reason.clone(), String::new());
        }
        let outcome = Outcome {
            done: decision,
            reason,
            revision,
            moved_to: None,
            in_use: false,
            joins: None,
            cause: Some(Cause::of(&facts)),
            owes: owed(&facts, decision, now.verdict.as_ref().map_or(0, |verdict| verdict.log_end)),
        };
        if decision == Decision::Append {
            // It locks the database itself, against others of its kind too.
            drop(std::mem::take(&mut now.held));
        }
        let wait = match act(settings, Seen { facts: &facts, there }, serving, recovery, outcome, stop, see).await? {
            Acted::Done(outcome) => {
                // Where nothing was got from elsewhere, what was there may be all there is.
                if matches!(outcome.done, Decision::Restore | Decision::Join) && outcome.moved_to.is_some() {
                    aside::tidy(dir, Utc::now()).await;
                }
                return Ok(outcome);
            }
            Acted::Wait(why) => why,
        };
        if wait != waits_for {
            see(Step::Wait(wait.clone()));
            waits_for = wait;
        }
        tokio::select! {
            () = tokio::time::sleep(recovery::PERIOD) => {}
            () = stop.cancelled() => return Err(Error::Cancelled),
        }
    }
}

/// A data directory that was looked at.
struct Checked {
    /// Which directory the member was.
    there: Option<(u64, u64)>,
    /// Keeps an etcd from starting on it.
    held: datadir::Hold,
    verdict: Option<Verdict>,
    /// What etcd had answered for its hash when the newest backups were taken.
    answers: Vec<Answer>,
    /// What the store had, and what the data is beside it; listed anew from time to time.
    listed: Option<(Instant, Data, Backups)>,
}

/// The revision that etcd is to have when it has applied its log, where that alone reaches the backups: a transaction whose
/// condition does not hold is an entry without a revision.
fn owed(facts: &Facts, decision: Decision, log_end: u64) -> Option<Owed> {
    match (&facts.data, &facts.backups) {
        (Data::Sound(sound), Backups::Upto { last, .. })
            if decision == Decision::Keep
                && facts.replicas <= 1
                && sound.voters <= 1
                && !sound.restored_since
                && sound.revision < *last =>
        {
            Some(Owed { revision: *last, log_end })
        }
        _ => None,
    }
}

enum Acted {
    Done(Outcome),
    /// It cannot be done yet, and why.
    Wait(String),
}

/// What is there as it was looked at.
struct Seen<'s> {
    facts: &'s Facts,
    /// Which directory the member was.
    there: Option<(u64, u64)>,
}

async fn act(
    settings: &Settings,
    seen: Seen<'_>,
    serving: Option<Serving>,
    recovery: &Recovery,
    outcome: Outcome,
    stop: &CancellationToken,
    see: &Arc<dyn Fn(Step) + Send + Sync>,
) -> Result<Acted> {
    let (dir, facts) = (&settings.member.data_dir, seen.facts);
    let from = settings.store.as_ref().map(|store| Refill { settings, store, stop, see: see.clone() });
    // Where nothing was, nothing is moved: what is there by now somebody else has made.
    let aside = || if seen.there.is_none() { Ok(None) } else { aside::move_member(dir).map(Some) };
    let done = match (outcome.done, from) {
        (Decision::Append, Some(from)) => from.append(outcome).await?,
        (Decision::Restore, Some(from)) => match from.restore(facts.replicas, recovery, outcome).await? {
            Ok(outcome) => outcome,
            Err(restorer) => {
                return Ok(Acted::Wait(format!(
                    "the cluster is restored by member {restorer}; when that serves, this one joins it"
                )));
            }
        },
        (Decision::Append | Decision::Restore, None) => {
            return Err(Error::Bug { what: "a restore without a store".into() });
        }
        (Decision::Join, _) => {
            let serving = serving.ok_or_else(|| Error::Bug { what: "a cluster to join that does not serve".into() })?;
            match serving.join(&settings.member, &settings.metrics).await {
                // Such as when another learner is on its way, or too few members are up to change anything.
                Err(error) => return Ok(Acted::Wait(format!("{}; not yet: {error}", outcome.reason))),
                Ok(cluster) => {
                    let joined = match (facts.live, &settings.store) {
                        (Live::Serves { cluster_id, .. }, Some(store)) => Some(Joined::now(cluster_id, store).await),
                        _ => None,
                    };
                    let moved_to = aside()?;
                    joined.map_or(Ok(()), |joined| joined.write(dir))?;
                    Outcome { moved_to, joins: Some(cluster), ..outcome }
                }
            }
        }
        (Decision::Bootstrap, _) => {
            if let (Backups::Begun, Live::Nobody, Some(store)) = (&facts.backups, facts.live, &settings.store) {
                recovery.let_begin(store).await?;
            }
            Outcome { moved_to: aside()?, ..outcome }
        }
        (Decision::Keep | Decision::Refuse { .. }, _) => outcome,
        (Decision::Wait, _) => return Ok(Acted::Wait(outcome.reason)),
    };
    Ok(Acted::Done(done))
}

/// What stands in the way of everything but looking.
fn cannot_write(dir: &Path) -> Option<String> {
    let errno = rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).err().filter(|_| dir.exists())?;
    Some(format!(
        "{} cannot be written from here ({errno}): nothing could be restored, and etcd must be able to",
        dir.display()
    ))
}

/// Which directory the member is; `None` when there is none.
fn identity(dir: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(dir.join("member")).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// What a data directory is beside a store, what that has, and which minor's schema the data has. Fails where an etcd runs on it.
pub async fn look_into(member: &Member, store: Option<&Store>) -> Result<(Data, Backups, Option<datadir::Minor>)> {
    let answers = answers(store).await;
    let verdict = check(&member.data_dir, &answers).await?;
    let schema = verdict.as_ref().and_then(|verdict| verdict.summary.as_ref()).and_then(|summary| summary.schema);
    let (mut data, mut backups) = (data_in(verdict.as_ref()), Backups::NotConfigured);
    if let Some(store) = store {
        // What is wrong with them others say.
        backups = look_at(store, member, &mut data, verdict.as_ref(), &answers).await.unwrap_or(backups);
        data = data.judged(&backups);
    }
    Ok((data, backups, schema))
}

fn data_in(verdict: Option<&Verdict>) -> Data {
    match verdict {
        Some(verdict) if !verdict.never_ran => data_of(verdict),
        _ => Data::Absent,
    }
}

async fn check(dir: &Path, answers: &[Answer]) -> Result<Option<Verdict>> {
    if !dir.try_exists().map_err(Error::io("look at", dir.display()))? {
        return Ok(None);
    }
    let (checked, place) = (dir.to_owned(), dir.display().to_string());
    let answered: Vec<Answered> = answers.iter().map(|answer| answer.answered).collect();
    let options = Verify { hash: (!answered.is_empty()).then_some(WantHash::First(answered)), compaction: None };
    let verdict = tokio::task::spawn_blocking(move || datadir::verify(&checked, &options));
    verdict.await.map_err(|error| Error::task(&error))?.map_err(Error::format(format!("check {place}")))
}

/// What etcd answered for its hash when a backup was taken.
#[derive(Debug, Clone, Copy)]
struct Answer {
    /// The timeline of the backup.
    timeline: Timeline,
    answered: Answered,
    hash: u32,
}

impl Answer {
    fn of(timeline: Timeline, meta: &ObjectMeta) -> Option<Self> {
        let recorded = restore::recorded_hash(meta)?;
        let by = (MemberId(meta.member_id), ClusterId(meta.cluster_id));
        Some(Self { timeline, answered: Answered { by, request: recorded.request(0) }, hash: recorded.hash.hash })
    }
}

/// The hashes of the newest backups, so that the check computes one of them as it passes; none when the store does not tell in
/// time, for the data is checked without it too.
async fn answers(store: Option<&Store>) -> Vec<Answer> {
    let Some(store) = store else { return Vec::new() };
    let newest = async {
        let catalog = store.catalog().await?;
        let Some((timeline, history)) = catalog.newest_restorable() else { return Ok(Vec::new()) };
        let fulls = history.fulls.iter().map(|full| (full.revision, full.name(timeline), full.size));
        let deltas = history.deltas.iter().map(|delta| (delta.last, delta.name(timeline), delta.size));
        let mut objects: Vec<_> = fulls.chain(deltas).collect();
        objects.sort_unstable_by_key(|(last, ..)| std::cmp::Reverse(*last));
        objects.truncate(MOST_RECORDED);
        let metas = objects.iter().map(|(_, name, size)| store.meta(name, *size));
        let metas = futures::future::join_all(metas).await;
        // One that cannot be read is for others to speak of.
        let metas = metas.into_iter().filter_map(|meta| meta.ok().flatten());
        Ok::<_, Error>(metas.filter_map(|meta| Answer::of(timeline, &meta)).collect())
    };
    match tokio::time::timeout(RECORDED_DEADLINE, newest).await {
        Ok(Ok(answers)) => answers,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the hash of the data is not compared with the backups'");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!("the store does not tell in time: the hash of the data is not compared with the backups'");
            Vec::new()
        }
    }
}

/// What is known now, the cluster to join, and whether the store was listed for it.
async fn observe(
    settings: &Settings,
    checked: &mut Checked,
    recovery: &mut Recovery,
) -> (Facts, Option<Serving>, bool) {
    let member = &settings.member;
    let verdict = checked.verdict.as_ref();
    let mut data = data_in(verdict);
    let replicas = member.cluster.members().len();
    let (live, serving) = match &settings.others {
        None => (Live::Nobody, None),
        Some(others) => {
            let is_sound = matches!(data, Data::Sound(_));
            let data_id = verdict.filter(|_| is_sound).and_then(|verdict| verdict.member).map(|(id, _)| id.0);
            cluster::look(others, member, data_id).await
        }
    };
    let mut is_recent = true;
    let mut backups = match (&settings.store, &checked.listed) {
        (None, _) => Backups::NotConfigured,
        (Some(_), Some((at, known, backups))) if at.elapsed() < LISTING_PERIOD => {
            (data, is_recent) = (known.clone(), false);
            backups.clone()
        }
        (Some(store), _) => match look_at(store, member, &mut data, verdict, &checked.answers).await {
            Ok(backups) => {
                checked.listed = Some((Instant::now(), data.clone(), backups.clone()));
                backups
            }
            Err(error) if error.class() == Class::Corrupt => Backups::Damaged { why: error.to_string() },
            Err(error) => Backups::Unknown { why: error.to_string() },
        },
    };
    let differs = matches!(&data, Data::Sound(sound) if sound.differs.is_some());
    let data = data.judged(&backups);
    if differs && matches!(data, Data::Sound(_)) {
        tracing::warn!("the data is of another history than the backups: its last revisions are not theirs");
    }
    let is_lost = data.is_lost() && replicas > 1;
    let mut lost = 0;
    if let (Some(store), true, Backups::Upto { .. } | Backups::Begun) = (&settings.store, is_lost, &backups) {
        let counted = async {
            // One that has begun by then listens already.
            if backups == Backups::Begun && recovery.may_begin(store).await? {
                return Ok(replicas);
            }
            if live == Live::Nobody { recovery.report(store).await } else { Ok(0) }
        };
        match counted.await {
            Ok(members) => lost = members,
            Err(error) => backups = Backups::Unknown { why: error.to_string() },
        }
    }
    let (is_existing, may_start_empty) = (member.is_existing(), settings.may_start_empty);
    let cannot_write = cannot_write(&member.data_dir);
    (Facts { data, backups, replicas, is_existing, live, lost, may_start_empty, cannot_write }, serving, is_recent)
}

/// What a check found, in the terms of the decision.
fn data_of(verdict: &Verdict) -> Data {
    let of = |wanted| verdict.findings.iter().filter(move |finding| finding.severity == wanted);
    let evidence = |wanted| {
        let texts: Vec<_> =
            of(wanted).take(3).map(|finding| format!("{} in {}", finding.what, finding.path.display())).collect();
        texts.join("; ")
    };
    // A key whose lease has no record never expires, and etcd runs on it: that is no reason to put older data in its place.
    let leases = verdict.summary.as_ref().map_or(0, |summary| summary.dangling_leases.len());
    let is_damaged = of(Severity::Corrupt).count() > leases;
    let damaged = |evidence: String| {
        let part = of(Severity::Corrupt).next().map_or(Part::Database, |finding| part_of(&finding.path));
        let cluster_id = verdict.member.map(|(_, cluster)| cluster.0);
        let voters = voters_of(verdict);
        Data::Damaged(Damaged { part, evidence, cluster_id, voters, restored_since: false, only_here: None })
    };
    match (&verdict.summary, verdict.severity()) {
        (_, Some(Severity::Corrupt)) if is_damaged => damaged(evidence(Severity::Corrupt)),
        (None, _) => damaged("its database could not be read".into()),
        (Some(summary), severity) => {
            Data::Sound(Sound {
                cluster_id: verdict.member.map_or(0, |(_, cluster)| cluster.0),
                revision: summary.revision,
                // Not only what is known to be committed: a cluster of one commits what it finds when it starts.
                unapplied: verdict.unapplied,
                repairs: (severity == Some(Severity::Repairable)).then(|| evidence(Severity::Repairable)),
                restored_since: false,
                voters: voters_of(verdict),
                differs: None,
            })
        }
    }
}

/// Voting members of the cluster; one where nothing says so.
fn voters_of(verdict: &Verdict) -> usize {
    verdict.members.as_ref().map_or(1, |members| members.voters.len().max(1))
}

/// What a file of a member belongs to.
fn part_of(path: &Path) -> Part {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "wal" => Part::Log,
        _ if wal::SegmentName::parse(name).is_some() => Part::Log,
        _ if name == "db" || name.ends_with(".snap.db") => Part::Database,
        _ => Part::Snapshots,
    }
}

async fn look_at(
    store: &Store,
    member: &Member,
    data: &mut Data,
    verdict: Option<&Verdict>,
    answers: &[Answer],
) -> Result<Backups> {
    let catalog = store.catalog().await?;
    let Some((timeline, history)) = catalog.newest_restorable() else {
        // Somebody backed something up here.
        let has_deltas = catalog.timelines.values().any(|history| !history.deltas.is_empty());
        let why = "the store has deltas and no full snapshot".to_owned();
        let has_begun = !catalog.timelines.is_empty() || !catalog.uploading.is_empty();
        return Ok(match (has_deltas, has_begun) {
            (true, _) => Backups::Unknown { why },
            (false, true) => Backups::Begun,
            (false, false) => Backups::Empty,
        });
    };
    let Some(chain) = history.newest_chain() else {
        return Err(Error::Bug { what: "a timeline that can be restored has no chain".into() });
    };
    // Beyond a gap too: what is there was acknowledged, and data that lacks it is behind, whether it can be appended or not.
    let last = history.last_revision().unwrap_or(0).max(chain.last);
    let cluster_id = match store.cluster_of(timeline).await? {
        // One that cannot be read does not say.
        None => {
            store.meta(&chain.full.name(timeline), chain.full.size).await.ok().flatten().map(|meta| meta.cluster_id)
        }
        described => described,
    };
    let cluster_id = cluster_id.filter(|id| *id != 0);
    let ours = match data {
        Data::Absent => None,
        Data::Sound(sound) => Some((sound.cluster_id, &mut sound.restored_since)),
        Data::Damaged(damaged) => damaged.cluster_id.map(|id| (id, &mut damaged.restored_since)),
    };
    if let Some((ours, restored_since)) = ours {
        // Its own backups have not begun: those that there are it comes from, or somebody put it in their place.
        let is_of_newest = is_of_newest(store, &catalog, timeline, ours).await?;
        *restored_since = is_of_newest || kinship::may_follow(&member.data_dir, ours, timeline, cluster_id);
    }
    if let (Data::Sound(sound), Some(verdict)) = (&mut *data, verdict)
        && let Some((term, _)) = verdict.raft
        && !sound.restored_since
        && sound.revision < last
        // Without that nothing in the data says that somebody restored it, and appending has a proof of its own.
        && verdict.began_restored
    {
        let log_end = (verdict.log_end, term);
        let is_its_log = restore::is_of_its_log(store, timeline, history, sound.revision, log_end, SLACK).await?;
        sound.restored_since = is_its_log == Some(false);
    }
    if let (Data::Sound(sound), Some(verdict)) = (data, verdict)
        && let Some(evidence) = differs(verdict, timeline, answers)
        && let (Some((term, _)), Some(summary)) = (verdict.raft, &verdict.summary)
        // Of a log that is not the one backed up, other rows are to be expected.
        && restore::is_of_its_log(store, timeline, history, sound.revision, (summary.consistent_index, term), 0).await?
            == Some(true)
    {
        let range = (summary.compact_revision, sound.revision);
        let compare = restore::compare_end(store, (timeline, sound.cluster_id), history, &member.data_dir, range);
        match tokio::time::timeout(COMPARE_DEADLINE, compare).await {
            Ok(Ok(agree)) => sound.differs = Some(Differs { evidence, agree }),
            // For want of a store nothing is kept from starting.
            Ok(Err(error)) => tracing::warn!(%error, evidence, "the data cannot be compared with the backups"),
            Err(_) => tracing::warn!(evidence, "the data cannot be compared with the backups in time"),
        }
    }
    Ok(Backups::Upto { last, timeline, cluster_id })
}

/// How what etcd had answered for its hash differs from what its rows give now: a bit has flipped, or it is another history.
/// Nothing else in a database would show the first.
fn differs(verdict: &Verdict, timeline: Timeline, answers: &[Answer]) -> Option<String> {
    let found = verdict.summary.as_ref()?.hash.filter(|found| found.is_definite)?;
    let is_same = |answer: &&Answer| {
        let Answered { by, request } = answer.answered;
        Some(by) == verdict.member
            && (request.revision, request.compact_revision) == (found.revision, found.compact_revision)
    };
    let recorded = answers.iter().find(is_same).filter(|answer| answer.timeline == timeline)?.hash;
    (!found.may_be(recorded)).then(|| {
        format!(
            "the hash of its rows at revision {} is {}, etcd's own was {recorded}, as recorded with the backups",
            found.revision, found.hash
        )
    })
}

/// Whether a timeline after the one that can be restored was begun with that cluster: its first full is on its way.
async fn is_of_newest(store: &Store, catalog: &Catalog, restorable: Timeline, cluster_id: u64) -> Result<bool> {
    let Some((newest, _)) = catalog.newest().filter(|(newest, _)| *newest > restorable) else { return Ok(false) };
    Ok(store.cluster_of(newest).await? == Some(cluster_id))
}

/// A member that gets from the store what it lacks.
struct Refill<'s> {
    settings: &'s Settings,
    store: &'s Store,
    stop: &'s CancellationToken,
    see: Arc<dyn Fn(Step) + Send + Sync>,
}

impl Refill<'_> {
    fn watch(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let (see, far) = (self.see.clone(), Mutex::new(Far::default()));
        move |progress| {
            let mut far = far.lock().unwrap_or_else(PoisonError::into_inner);
            far.see(progress);
            see(Step::Restore(far.clone()));
        }
    }

    /// Asked in the last moment before what was restored is put in its place: it took a while, and somebody may have brought
    /// the others back.
    fn still_alone(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (others, member) = (self.settings.others.clone(), self.settings.member.clone());
        let runtime = tokio::runtime::Handle::current();
        move || {
            let Some(others) = others else { return Ok(()) };
            match runtime.block_on(cluster::look(&others, &member, None)).0 {
                Live::Nobody => Ok(()),
                live => Err(Error::Unanswered {
                    what: format!(
                        "members of the cluster are back while it was restored ({live:?}); nothing is put in place"
                    ),
                }),
            }
        }
    }

    async fn append(self, outcome: Outcome) -> Result<Outcome> {
        match restore::append(self.store, &self.settings.member.data_dir, None, self.stop, self.watch()).await {
            Ok(appended) => Ok(Outcome { revision: appended.revision, ..outcome }),
            // What the backups do not show to be theirs may be all there is of it: a person decides which of the two counts.
            Err(error) if matches!(error.class(), Class::Precondition | Class::Missing | Class::Corrupt) => {
                let advice = "move the member directory away to have it restored";
                let reason = format!("{}; it cannot be appended to: {error}; {advice}", outcome.reason);
                Ok(Outcome { done: Decision::Refuse { may_pass: false }, reason, ..outcome })
            }
            Err(error) => Err(error),
        }
    }

    /// Restores the member as a cluster of its own, which those of several join; or says which of them does.
    async fn restore(
        self,
        replicas: usize,
        recovery: &Recovery,
        outcome: Outcome,
    ) -> Result<std::result::Result<Outcome, String>> {
        let source = restore::choose(self.store, &self.store.catalog().await?, &Choice::default()).await?;
        let claimed = match &source {
            Source::Chain { timeline, .. } if replicas > 1 => Some(*timeline),
            _ => None,
        };
        if let Some(timeline) = claimed
            && let Some(restorer) = recovery.begin(self.store, timeline).await?
        {
            return Ok(Err(restorer));
        }
        let member = &self.settings.member;
        let plan = Plan {
            source,
            targets: vec![Target { name: member.name.clone(), data_dir: member.data_dir.clone() }],
            cluster: member.restored_cluster(Utc::now().timestamp_micros())?,
            minor: None,
            bump_revision: 0,
            replace: true,
        };
        let admit = self.still_alone();
        let restored = restore::execute(plan, Some(self.store.clone()), self.stop.clone(), self.watch(), admit).await;
        let restored = match (restored, claimed) {
            (Ok(restored), Some(timeline)) => {
                // A store that ignores conditions may have let another in.
                if let Some(restorer) = recovery.begin(self.store, timeline).await? {
                    aside::move_member(&member.data_dir)?;
                    return Ok(Err(restorer));
                }
                restored
            }
            (Err(error), Some(timeline)) if !matches!(error.class(), Class::Transient | Class::Cancelled) => {
                recovery.give_up(self.store, timeline).await;
                return Err(error);
            }
            (restored, _) => restored?,
        };
        Ok(Ok(Outcome { revision: restored.revision, moved_to: restored.replaced.into_iter().next(), ..outcome }))
    }
}
