//! What is known before it is decided: of the data, of the backups, of the others.

use std::path::Path;
use std::time::{Duration, Instant};

use etcd_format::datadir::{self, Answered, Severity, Verdict, Verify, WantHash};
use etcd_format::membership::{ClusterId, MemberId};
use etcd_format::wal;
use proto::backup::ObjectMeta;

use super::cluster::{self, Serving};
use super::decision::{Backups, Damaged, Data, Differs, Facts, Live, Part, Sound};
use super::recovery::Recovery;
use super::{Member, Settings};
use crate::catalog::{Catalog, Timeline};
use crate::store::Store;
use crate::{Class, Error, Result, kinship, restore};

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

/// A data directory that was looked at.
pub(super) struct Checked {
    /// Which directory the member was.
    pub(super) there: Option<(u64, u64)>,
    /// Keeps an etcd from starting on it.
    pub(super) held: datadir::Hold,
    pub(super) verdict: Option<Verdict>,
    /// What etcd had answered for its hash when the newest backups were taken.
    answers: Vec<Answer>,
    /// What the store had, and what the data is beside it; listed anew from time to time.
    pub(super) listed: Option<(Instant, Data, Backups)>,
}

impl Checked {
    /// Checks what is there.
    pub(super) async fn of(settings: &Settings, there: Option<(u64, u64)>, held: datadir::Hold) -> Result<Self> {
        let answers = answers(settings.store.as_ref()).await;
        let verdict = check(&settings.member.data_dir, &answers).await?;
        Ok(Self { there, held, verdict, answers, listed: None })
    }
}

/// What a data directory is beside a store, what that has, and which minor's schema the data has. Fails where an etcd runs on it.
pub async fn look_into(member: &Member, store: Option<&Store>) -> Result<(Data, Backups, Option<datadir::Minor>)> {
    let answers = answers(store).await;
    let verdict = check(&member.data_dir, &answers).await?;
    let schema = verdict.as_ref().and_then(|verdict| verdict.summary.as_ref()).and_then(|summary| summary.schema);
    let (mut data, mut backups) = (data_in(verdict.as_ref(), member), Backups::NotConfigured);
    if let Some(store) = store {
        // What is wrong with them others say.
        backups = look_at(store, member, &mut data, verdict.as_ref(), &answers).await.unwrap_or(backups);
        data = data.judged(&backups);
    }
    Ok((data, backups, schema))
}

fn data_in(verdict: Option<&Verdict>, member: &Member) -> Data {
    match verdict {
        Some(verdict) if !verdict.never_ran => data_of(verdict, member),
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
pub(super) async fn observe(
    settings: &Settings,
    checked: &mut Checked,
    recovery: &mut Recovery,
) -> (Facts, Option<Serving>, bool) {
    let member = &settings.member;
    let verdict = checked.verdict.as_ref();
    let mut data = data_in(verdict, member);
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
fn data_of(verdict: &Verdict, member: &Member) -> Data {
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
                of_another: of_another(verdict, member),
                differs: None,
            })
        }
    }
}

/// The member of the configured cluster whose data it is, where that is not ours. One that was renamed has no such name.
fn of_another(verdict: &Verdict, member: &Member) -> Option<String> {
    let name = verdict.name.as_ref().filter(|name| **name != member.name)?;
    member.cluster.members().iter().any(|configured| configured.name == *name).then(|| name.clone())
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

/// What stands in the way of everything but looking.
fn cannot_write(dir: &Path) -> Option<String> {
    let errno = rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).err().filter(|_| dir.exists())?;
    Some(format!(
        "{} cannot be written from here ({errno}): nothing could be restored, and etcd must be able to",
        dir.display()
    ))
}
