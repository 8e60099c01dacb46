//! From a store, or a snapshot file, to a data directory that etcd starts on.
//!
//! [`choose`] decides what a [`Plan`] reads, up to where, which can be printed; [`execute`] carries it out: objects are fetched ahead in
//! order, decompressed, the database placed page by page, the changes appended as rows, log and members written, the
//! result verified while it is synced, and only then put in its place.

mod append;
mod origin;
mod pieces;
mod point;
mod progress;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use etcd_format::ReadAt;
use etcd_format::bolt::Db;
use etcd_format::datadir::{
    Change, Disk, Minor, RealDisk, Restored, Revision, Severity, Spec, Staged, Summary, Tail, Verdict, Verify, WantHash,
};
use etcd_format::membership::NewCluster;
use etcd_format::mvcc::{self, Compaction, HashRequest, HashRules};
use proto::backup::{HashKv, ObjectMeta};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use pieces::Decompressed;
pub(crate) use pieces::{PieceReader, Pieces, Stoppable, fetch};

pub use append::{Appended, append, compare_end, is_of_its_log};
pub use origin::Origin;
pub use point::{AtTime, Choice, Upto, choose};
pub use progress::{Far, Progress};

use crate::catalog::{Chain, ObjectName, Timeline};
use crate::container::{self, FromTail};
use crate::delta::Record;
use crate::object::{Content, Records, check_full_revision};
use crate::pace::Pace;
use crate::scratch::Scratch;
use crate::store::Store;
use crate::{Error, Result, room};

/// What to restore from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A chain in a store.
    Chain {
        /// The timeline it is in.
        timeline: Timeline,
        /// The objects.
        chain: Chain,
        /// The revision to end at; the last when `None`.
        upto: Option<i64>,
        /// How that revision was found, when a time was asked for.
        at_time: Option<AtTime>,
        /// See [`Origin::passed_over`].
        passed_over: Option<(Timeline, String)>,
    },
    /// A file as `etcdctl snapshot save` writes it, or one of our full snapshots.
    File {
        /// Where it is.
        path: PathBuf,
        /// Whether it may lack its sha256.
        skip_hash_check: bool,
    },
}

/// A member to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// Name of the member.
    pub name: String,
    /// Its data directory.
    pub data_dir: PathBuf,
}

/// Everything a restore will do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What is read.
    pub source: Source,
    /// What is written.
    pub targets: Vec<Target>,
    /// The cluster that the members form.
    pub cluster: NewCluster,
    /// The minor that is to run on it; that of the data when `None`.
    pub minor: Option<Minor>,
    /// See [`Spec::bump_revision`].
    pub bump_revision: i64,
    /// Whether a member that is there moves aside.
    pub replace: bool,
}

/// About how much larger rows are in a database than in a delta: for a pace, not for more.
const DELTA_EXPANDS: u64 = 6;

/// What was proved of a restored directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// Revision of the HashKV that was compared; `None` when there was none to compare with.
    pub hash_revision: Option<i64>,
    /// Why there was none.
    pub hash_missing: Option<&'static str>,
    /// The hash that etcd gave and that was found again.
    pub hash: Option<u32>,
    /// Rows checked.
    pub rows: u64,
    /// Keys that exist.
    pub keys: u64,
    /// Lease records.
    pub leases: u64,
}

/// A restore that succeeded.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Current revision.
    pub revision: i64,
    /// The last revision that the backup has; the current one unless it was raised.
    pub backup_revision: i64,
    /// Revision of the snapshot it started from.
    pub snapshot_revision: i64,
    /// Changes appended after it.
    pub events: u64,
    /// Size of the database in bytes.
    pub db_size: u64,
    /// Minor of etcd that the data is for.
    pub etcd_minor: String,
    /// The new cluster's id.
    pub cluster_id: String,
    /// The members made.
    pub members: Vec<Target>,
    /// What moved aside for them.
    pub replaced: Vec<PathBuf>,
    /// Leases that live keys need and whose TTL was not in the backup.
    pub leases_with_guessed_ttl: Vec<String>,
    /// Leases that live keys of the snapshot refer to and that had no record there: they got one, of ten years.
    pub orphaned_leases: Vec<String>,
    /// How the revision was found, when a time was asked for.
    pub at_time: Option<AtTime>,
    /// Where the gap is that the restore was told to end before.
    pub gap_after: Option<i64>,
    /// What was proved.
    pub proof: Proof,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// Carries a plan out. Either every member is in place and verified, or nothing is left behind. `admit` is asked in the last
/// moment before members are put in place.
#[tracing::instrument(name = "restore", skip_all)]
pub async fn execute(
    plan: Plan,
    store: Option<Store>,
    stop: CancellationToken,
    progress: impl Fn(Progress) + Send + Sync + 'static,
    admit: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Outcome> {
    let mut full = ObjectMeta::default();
    let (objects, feeder) = match (&plan.source, store) {
        (Source::Chain { timeline, chain, .. }, Some(store)) => {
            let objects = chain.objects(*timeline);
            if let Some((name, _)) = objects.iter().find(|(_, size)| *size == 0) {
                return Err(Error::corrupt(format!("{}: object is empty", store.location(name))));
            }
            if let Some((name, size)) = objects.first() {
                full = store.meta(name, *size).await?.unwrap_or_default();
            }
            let (feeder, received) = fetch(store.clone(), objects.clone(), stop.clone());
            let named = objects.iter().map(|(name, _)| (*name, store.location(name))).collect();
            (Objects::Store { named, received }, Some(feeder))
        }
        (Source::File { path, skip_hash_check }, _) => {
            (Objects::File { path: path.clone(), skip_hash_check: *skip_hash_check }, None)
        }
        (Source::Chain { .. }, None) => return Err(Error::Bug { what: "a chain without its store".into() }),
    };
    progress(Progress::Snapshot(Some(full.content_bytes).filter(|bytes| *bytes > 0)));
    let assemble = move || assemble(&plan, objects, &full, &stop, &progress, admit);
    let assembled = tokio::task::spawn_blocking(assemble).await;
    if let Some(feeder) = feeder {
        feeder.abort();
    }
    assembled.map_err(|error| Error::task(&error))?
}

/// A recorded hash and the version whose rules made it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recorded {
    pub hash: HashKv,
    pub rules: HashRules,
}

impl Recorded {
    /// It again, of rows of which each key has one only up to `clean_up_to`.
    pub fn request(&self, clean_up_to: i64) -> HashRequest {
        let Self { hash, rules } = self;
        let compact_revision = hash.compact_revision.max(0);
        HashRequest { revision: hash.revision, compact_revision, clean_up_to, rules: *rules }
    }
}

pub(crate) fn recorded_hash(meta: &ObjectMeta) -> Option<Recorded> {
    meta.hash_kv.map(|hash| Recorded { hash, rules: HashRules::of(&meta.etcd_version) })
}

enum Objects {
    Store { named: Vec<(ObjectName, String)>, received: Pieces },
    File { path: PathBuf, skip_hash_check: bool },
}

/// An error of the source that travelled through a reader comes out as itself.
fn unwrap_source(what: &str) -> impl FnOnce(etcd_format::Error) -> Error {
    let what = what.to_owned();
    move |error| match error {
        etcd_format::Error::Io { op, path, source } => match source.downcast::<Error>() {
            Ok(ours) => ours,
            Err(source) => Error::Format { what, source: etcd_format::Error::Io { op, path, source } },
        },
        source => Error::Format { what, source },
    }
}

/// What the deltas say beside the changes.
#[derive(Debug, Default)]
pub(crate) struct Aside {
    pub cluster_id: u64,
    pub compact_revision: i64,
    pub lease_ttls: BTreeMap<i64, i64>,
    pub live_leases: BTreeSet<i64>,
    pub recorded: Option<Recorded>,
}

fn assemble(
    plan: &Plan,
    objects: Objects,
    full: &ObjectMeta,
    stop: &CancellationToken,
    progress: &dyn Fn(Progress),
    admit: impl FnOnce() -> Result<()>,
) -> Result<Outcome> {
    let started = Instant::now();
    let first = plan.targets.first().ok_or_else(|| Error::Bug { what: "a plan without a member".into() })?;
    let in_dir = |dir: &Path| Error::format(format!("restore into {}", dir.display()));
    let staged = Staged::create(RealDisk, &first.data_dir, plan.replace).map_err(in_dir(&first.data_dir))?;
    let mut others = Vec::new();
    for target in plan.targets.iter().skip(1) {
        others.push((
            target,
            Staged::create(RealDisk, &target.data_dir, plan.replace).map_err(in_dir(&target.data_dir))?,
        ));
    }
    // What an earlier one left is gone, and what is there stays beside until it is done.
    room::need(plan.targets.iter().map(|target| target.data_dir.as_path()), full.content_bytes)?;
    let mut aside = Aside { recorded: recorded_hash(full), cluster_id: full.cluster_id, ..Aside::default() };
    let tail = match objects {
        Objects::File { path, skip_hash_check } => {
            aside.recorded = recorded_in_file(&path)?;
            base_from_file(&staged, &path, skip_hash_check, stop, progress)?
        }
        Objects::Store { named, mut received } => {
            let upto = if let Source::Chain { upto, .. } = plan.source { upto } else { None };
            from_store(&staged, &named, &mut received, upto, &mut aside, stop, progress)?
        }
    };
    let mut restored = tail.finish(&spec(plan, &aside)).map_err(in_dir(&first.data_dir))?;
    staged.write_log(&plan.cluster, &first.name).map_err(in_dir(&first.data_dir))?;
    progress(Progress::Verify);
    let (proof, orphaned_leases) = prove(&staged, &mut restored, aside.recorded)?;
    if !others.is_empty() {
        progress(Progress::Members(others.len() as u64));
    }
    let mut members = Vec::new();
    for (target, other) in others {
        let copied = other.copy_database(&staged).and_then(|()| {
            other.write_log(&plan.cluster, &target.name)?;
            other.sync_database()?;
            other.layout().verify(&Verify { hash: None, compaction: Some(restored.compaction) })
        });
        sound(&copied.map_err(in_dir(&target.data_dir))?)?;
        members.push(other);
    }
    members.push(staged);
    let origin = Origin::of_plan(plan, aside.cluster_id, restored.revision);
    members.iter().try_for_each(|member| origin.write(member))?;
    // The last moment: from here on it is done, and said to be.
    if stop.is_cancelled() {
        return Err(Error::Cancelled);
    }
    admit()?;
    let stamp = chrono::Utc::now().format("%Y%m%dT%H%M%S%.3fZ").to_string();
    let replaced = Staged::commit(members, &stamp).map_err(Error::format("put what was restored in its place"))?;
    Ok(Outcome {
        revision: restored.revision.saturating_add(plan.bump_revision),
        backup_revision: restored.revision,
        snapshot_revision: restored.base_revision,
        events: restored.events,
        db_size: restored.db_size,
        etcd_minor: restored.minor.to_string(),
        cluster_id: plan.cluster.id().to_string(),
        members: plan.targets.clone(),
        replaced,
        leases_with_guessed_ttl: restored.guessed_leases.iter().map(|id| format!("{id:x}")).collect(),
        orphaned_leases: orphaned_leases.iter().map(|id| format!("{id:x}")).collect(),
        at_time: if let Source::Chain { at_time, .. } = plan.source { at_time } else { None },
        gap_after: None,
        proof,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Restores a chain into a temporary directory under `work_dir`, checks it, and compares every HashKV recorded with its
/// objects. Returns the last revision and those whose hash was compared. Leaves nothing behind. `pace` is that at which the
/// database is written.
#[tracing::instrument(skip_all, fields(timeline))]
pub(crate) async fn replay(
    store: &Store,
    timeline: Timeline,
    chain: Chain,
    work_dir: &Path,
    pace: Option<Arc<Pace>>,
    stop: &CancellationToken,
) -> Result<(i64, Vec<i64>)> {
    let mut recorded = Vec::new();
    let mut compacted = None;
    for (name, size) in chain.objects(timeline) {
        let Some(meta) = store.meta(&name, size).await? else { continue };
        let compacted = *compacted.get_or_insert(meta.compact_revision);
        // Rows that the snapshot no longer has cannot be hashed as they were.
        recorded.extend(recorded_hash(&meta).filter(|recorded| recorded.hash.compact_revision.max(0) >= compacted));
    }
    let dir = Scratch::new(work_dir, "sidecar-verify-")?;
    let cluster = NewCluster::parse("default=http://localhost:2380", "verify").map_err(Error::format("a cluster"))?;
    let data_dir = dir.path().join("data");
    let targets = vec![Target { name: "default".to_owned(), data_dir: data_dir.clone() }];
    let appended =
        Mutex::new(chain.deltas.iter().map(|delta| delta.size * DELTA_EXPANDS).collect::<Vec<_>>().into_iter());
    let keep_pace = move |progress| {
        let Some(pace) = &pace else { return };
        match progress {
            Progress::Bytes(bytes) => pace.pass_blocking(bytes),
            Progress::Delta => {
                let next = appended.lock().unwrap_or_else(PoisonError::into_inner).next();
                pace.pass_blocking(next.unwrap_or(0));
            }
            _ => {}
        }
    };
    let source = Source::Chain { timeline, chain, upto: None, at_time: None, passed_over: None };
    let plan = Plan { source, targets, cluster, minor: None, bump_revision: 0, replace: false };
    let outcome = execute(plan, Some(store.clone()), stop.clone(), keep_pace, || Ok(())).await?;
    let compared = tokio::task::spawn_blocking(move || compare_hashes(&data_dir, &recorded));
    let hashes = compared.await.map_err(|error| Error::task(&error))??;
    Ok((outcome.revision, hashes))
}

/// Computes HashKV at each recorded point whose rows are still there, and fails where one differs.
fn compare_hashes(data_dir: &Path, recorded: &[Recorded]) -> Result<Vec<i64>> {
    let path = data_dir.join("member/snap/db");
    let name = path.display().to_string();
    let db = Db::open(File::open(&path).map_err(Error::io("open", &name))?).map_err(Error::format(&name))?;
    // Rows are as compacted as those of the snapshot, whatever compaction etcd is to finish when it starts.
    let finished = Compaction::read(&db).map_err(Error::format(&name))?.finished;
    let mut hashes = Vec::new();
    for recorded in recorded {
        let hash = recorded.hash;
        let request = recorded.request(finished);
        let mut found = mvcc::hash_kv(&db, request).map_err(Error::format(&name))?;
        if !found.may_be(hash.hash) {
            // Rows that a raised revision left: the quick way to hash does not hold.
            let slowly = HashRequest { clean_up_to: 0, ..request };
            found = mvcc::hash_kv(&db, slowly).map_err(Error::format(&name))?;
        }
        if !found.may_be(hash.hash) {
            return Err(Error::corrupt(format!(
                "HashKV at revision {} (compacted at {}) is {}; etcd itself had answered {}",
                hash.revision, request.compact_revision, found.hash, hash.hash
            )));
        }
        hashes.push(hash.revision);
    }
    Ok(hashes)
}

fn spec(plan: &Plan, aside: &Aside) -> Spec {
    Spec {
        cluster: plan.cluster.clone(),
        target: plan.minor,
        compact_revision: aside.compact_revision,
        lease_ttls: aside.lease_ttls.clone(),
        live_leases: aside.live_leases.clone(),
        bump_revision: plan.bump_revision,
    }
}

/// The hash that one of our full snapshots has; a plain snapshot has none.
fn recorded_in_file(path: &Path) -> Result<Option<Recorded>> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(Error::io("open", &name))?;
    let size = file.metadata().map_err(Error::io("look at", &name))?.len();
    let read = |from: u64, to: u64| {
        let mut bytes = vec![0; (to - from) as usize];
        ReadAt::read_exact_at(&file, &mut bytes, from).map_err(Error::io("read", &name))?;
        Ok::<_, Error>(bytes)
    };
    let head = read(0, size.min(64 << 10))?;
    if !container::is_compressed(&head) {
        return Ok(None);
    }
    let mut want = 64 << 10;
    loop {
        match container::meta_from_tail(&name, size, &head, &read(size.saturating_sub(want), size)?) {
            Ok(FromTail::Meta(meta)) => return Ok(recorded_hash(&meta)),
            Ok(FromTail::Need(more)) if more > want && want < size => want = more.min(size),
            // Any zstd file may be restored, also one that somebody else compressed.
            Ok(FromTail::Need(_)) | Err(_) => return Ok(None),
        }
    }
}

fn base_from_file(
    staged: &Staged<RealDisk>,
    path: &Path,
    skip_hash: bool,
    stop: &CancellationToken,
    progress: &dyn Fn(Progress),
) -> Result<Tail<RealDisk>> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(Error::io("open", &name))?;
    let mut file = Stoppable::new(file, stop);
    let mut magic = Vec::new();
    file.by_ref().take(4).read_to_end(&mut magic).map_err(Error::io("read", &name))?;
    let mut source: Box<dyn Read> = if container::is_compressed(&magic) {
        Box::new(container::Reader::new(io::Cursor::new(magic).chain(file), &name)?)
    } else {
        Box::new(io::Cursor::new(magic).chain(file))
    };
    let base = staged.write_base(&mut source, !skip_hash, &mut |bytes| progress(Progress::Bytes(bytes)));
    base.map_err(unwrap_source(&name))?.into_tail().map_err(Error::format(&name))
}

pub(crate) fn from_store<D: Disk>(
    staged: &Staged<D>,
    named: &[(ObjectName, String)],
    received: &mut Pieces,
    upto: Option<i64>,
    aside: &mut Aside,
    stop: &CancellationToken,
    progress: &dyn Fn(Progress),
) -> Result<Tail<D>> {
    let Some(((full_name, location), deltas)) = named.split_first() else {
        return Err(Error::Bug { what: "a chain without objects".into() });
    };
    let mut source = Content::open(full_name, Stoppable::new(PieceReader::new(received), stop), location)?;
    let base = staged.write_base(&mut source, true, &mut |bytes| progress(Progress::Bytes(bytes)));
    let mut tail = base.map_err(unwrap_source(location))?.into_tail().map_err(Error::format(location))?;
    let base_revision = tail.last_revision();
    check_full_revision(full_name, location, base_revision)?;
    if let Some(upto) = upto.filter(|upto| *upto < base_revision) {
        return Err(Error::missing(format!(
            "{location}: it has revision {base_revision} already, later than its name says and than revision {upto}; --full-revision starts from an older full snapshot"
        )));
    }
    append_deltas(&mut tail, deltas, received, (upto, base_revision), aside, stop, progress)?;
    Ok(tail)
}

/// Appends what deltas have beyond `base_revision`, up to a revision.
pub(crate) fn append_deltas<D: Disk>(
    tail: &mut Tail<D>,
    deltas: &[(ObjectName, String)],
    received: &mut Pieces,
    (upto, base_revision): (Option<i64>, i64),
    aside: &mut Aside,
    stop: &CancellationToken,
    progress: &dyn Fn(Progress),
) -> Result<()> {
    progress(Progress::Deltas(deltas.len() as u64));
    // Decompressing and appending are about as much work, so each has a thread.
    std::thread::scope(|scope| {
        let (ahead, mut arriving) = pieces::decompressed();
        scope.spawn(move || ahead.run(deltas, received, stop));
        for (name, location) in deltas {
            append_delta(tail, arriving.next()?, (name, location), upto, aside)?;
            let (found, expected) = (tail.last_revision(), name.revisions().map_or(0, |(_, last)| last));
            // A full of the predecessor's may go beyond the first deltas after it.
            if found != upto.map_or(expected, |upto| expected.min(upto)).max(base_revision) {
                return Err(Error::corrupt(format!(
                    "{location}: its name says that it ends at revision {expected}, its content ends at {found}; it was renamed"
                )));
            }
            progress(Progress::Delta);
        }
        Ok(())
    })
}

/// Appends what a delta has beyond the tail, up to a revision. Of a delta that goes on beyond that, what it says beside its
/// changes is of a later moment; only the TTLs of its leases are of use.
fn append_delta<D: Disk>(
    tail: &mut Tail<D>,
    delta: Decompressed<'_>,
    (name, location): (&ObjectName, &str),
    upto: Option<i64>,
    aside: &mut Aside,
) -> Result<()> {
    let recorded = delta.meta().and_then(recorded_hash);
    if let Some(cluster_id) = delta.meta().map(|meta| meta.cluster_id).filter(|id| *id != aside.cluster_id) {
        let full = aside.cluster_id;
        return Err(Error::corrupt(format!(
            "{location}: delta is of cluster {cluster_id:x}, the full snapshot before it of cluster {full:x}"
        )));
    }
    let mut reader = Records::new(name, delta, location);
    let (mut wanted, mut beyond) = (false, false);
    while let Some(record) = reader.next()? {
        match record {
            Record::Revision { main, .. } if upto.is_some_and(|upto| main > upto) => (wanted, beyond) = (false, true),
            Record::Revision { main, .. } => {
                wanted = tail.revision(main).map_err(Error::format(location))? == Revision::Next;
            }
            Record::Put(_) | Record::Delete(_) if !wanted => {}
            Record::Put(value) => tail.change(Change::Put(value)).map_err(Error::format(location))?,
            Record::Delete(key) => tail.change(Change::Delete(key)).map_err(Error::format(location))?,
            Record::End(end) => {
                let known = end.leases.iter().filter(|lease| lease.ttl > 0);
                aside.lease_ttls.extend(known.clone().map(|lease| (lease.id, lease.ttl)));
                if beyond {
                    continue;
                }
                aside.compact_revision = aside.compact_revision.max(end.compact_revision);
                aside.live_leases =
                    if end.leases_complete { known.map(|lease| lease.id).collect() } else { BTreeSet::new() };
            }
        }
    }
    aside.recorded = recorded.filter(|_| !beyond).or(aside.recorded);
    Ok(())
}

/// Verifies the staged member while its database is synced; adds records of leases that it turns out to lack.
fn prove(
    staged: &Staged<RealDisk>,
    restored: &mut Restored,
    recorded: Option<Recorded>,
) -> Result<(Proof, BTreeSet<i64>)> {
    let usable = recorded.filter(|recorded| recorded.hash.compact_revision.max(0) >= restored.compaction.revision());
    let request = usable.map(|recorded| recorded.request(restored.compaction.finished));
    // The rows are as compacted as those of the snapshot, whatever compaction etcd is to finish when it starts: every
    // appended row is checked.
    let options = Verify { hash: request.map(WantHash::At), compaction: Some(restored.compaction) };
    let layout = staged.layout();
    let dir = layout.member().display().to_string();
    let verify = || -> Result<Verdict> {
        let (verdict, synced) = std::thread::scope(|scope| {
            let synced = scope.spawn(|| staged.sync_database());
            let verdict = layout.verify(&options);
            (verdict, synced.join())
        });
        synced
            .map_err(|_| Error::Bug { what: "the syncing thread ended unexpectedly".into() })?
            .map_err(Error::format(&dir))?;
        verdict.map_err(Error::format(&dir))
    };
    let mut verdict = verify()?;
    let orphaned = verdict.summary.as_ref().map(|summary| summary.dangling_leases.clone()).unwrap_or_default();
    if !orphaned.is_empty() {
        tracing::warn!(
            leases = orphaned.len(),
            "the snapshot has live keys whose leases have no record; records of ten years are added"
        );
        restored.db_size = staged.add_orphaned_leases(&orphaned).map_err(Error::format(&dir))?;
        verdict = verify()?;
    }
    let summary = sound(&verdict)?;
    if summary.revision != restored.revision {
        return Err(Error::corrupt(format!(
            "restored database is at revision {}, it should be at {}",
            summary.revision, restored.revision
        )));
    }
    Ok((Proof::of(summary, recorded, usable)?, orphaned))
}

impl Proof {
    /// Of rows that were checked, with the hash that is recorded of them and that hash when they can reproduce it.
    fn of(summary: &Summary, recorded: Option<Recorded>, usable: Option<Recorded>) -> Result<Self> {
        if let (Some(recorded), Some(found)) = (usable, summary.hash)
            && !found.may_be(recorded.hash.hash)
        {
            return Err(Error::corrupt(format!(
                "restored rows have hash {} at revision {} (compacted at {}); etcd's own hash, recorded with the backup, is {}: the backup does not hold what etcd held",
                found.hash, found.revision, found.compact_revision, recorded.hash.hash
            )));
        }
        Ok(Self {
            hash_revision: usable.map(|recorded| recorded.hash.revision),
            hash_missing: match (recorded, usable) {
                (_, Some(_)) => None,
                (Some(_), None) => Some("etcd compacted between the recorded hash and the snapshot"),
                (None, None) => Some("the backup has no hash"),
            },
            hash: usable.map(|recorded| recorded.hash.hash),
            rows: summary.rows,
            keys: summary.live_keys,
            leases: summary.leases,
        })
    }
}

fn sound(verdict: &Verdict) -> Result<&Summary> {
    let worst = verdict.findings.iter().find(|finding| finding.severity == Severity::Corrupt);
    match (worst, &verdict.summary) {
        (None, Some(summary)) => Ok(summary),
        (Some(finding), _) => Err(Error::corrupt(format!(
            "the restored member is not sound, so it was not put in place: {} ({}{}); `sidecar list` shows other full snapshots, --full-revision starts from one",
            finding.what,
            finding.path.file_name().unwrap_or_default().to_string_lossy(),
            finding.offset.map(|offset| format!(", offset {offset}")).unwrap_or_default()
        ))),
        (None, None) => Err(Error::corrupt("the restored database could not be read to its end")),
    }
}
