//! Whether a data directory is sound, with evidence.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use proto::Message;
use proto::disk::Lease;

use super::{Layout, Minor};
use crate::bolt::{Db, Visited};
use crate::membership::{self, ClusterId, MemberId};
use crate::mvcc::{
    self, ALARM_BUCKET, AUTH_BUCKET, AUTH_REVISION, CONSISTENT_INDEX, CheckRows, Compaction, Counted, HashRequest,
    HashRules, HashedKv, KEY_BUCKET, LEASE_BUCKET, META_BUCKET, TERM,
};
use crate::snap::{self, SnapName};
use crate::wal::{self, Log, Tail};
use crate::{Error, ReadAt, Result};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing; etcd runs.
    Remark,
    /// A trace of a crash that etcd removes by itself when it starts.
    Repairable,
    /// etcd would not start, or would serve wrong data.
    Corrupt,
}

impl std::fmt::Display for Severity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Remark => "remark",
            Self::Repairable => "repairable",
            Self::Corrupt => "corrupt",
        })
    }
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub what: String,
    /// In which file or directory.
    pub path: PathBuf,
    /// Where in that file, when there is a place.
    pub offset: Option<u64>,
}

/// Numbers of a database that was walked to its end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// Current revision.
    pub revision: i64,
    /// Compaction revision, 0 when never compacted.
    pub compact_revision: i64,
    /// Rows in the key bucket.
    pub rows: u64,
    /// Keys that exist.
    pub live_keys: u64,
    /// Lease records.
    pub leases: u64,
    /// Leases that live keys refer to and that have no record; each is a finding too.
    pub dangling_leases: BTreeSet<i64>,
    /// Rows at or below the finished compaction that are not the only one of their key; `--bump-revision` leaves such.
    pub superseded_rows: u64,
    /// Auth revision, 0 when auth was never touched.
    pub auth_revision: u64,
    /// Applied raft index.
    pub consistent_index: u64,
    /// Size of the database in bytes.
    pub db_size: u64,
    /// Of those, bytes in pages that are in use.
    pub db_size_in_use: u64,
    /// The oldest minor that has this schema.
    pub schema: Option<Minor>,
    /// HashKV, when it was asked for.
    pub hash: Option<HashedKv>,
}

/// What [`verify`] makes of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// Everything found, in the order of looking.
    pub findings: Vec<Finding>,
    /// The database's numbers; `None` when it could not be walked to its end.
    pub summary: Option<Summary>,
    /// Whose directory it is, as the log says.
    pub member: Option<(MemberId, ClusterId)>,
    /// What that member is called, where the database says so; 3.4 keeps that elsewhere.
    pub name: Option<String>,
    /// Raft term and commit index, as the log says.
    pub raft: Option<(u64, u64)>,
    /// Entries of the log that the database lacks and that may make a revision.
    pub unapplied: u64,
    /// Index of the last entry of the log.
    pub log_end: u64,
    /// Whether the log still shows that it began with a restore.
    pub began_restored: bool,
    /// Members of the cluster, as the log says.
    pub members: Option<wal::Members>,
    /// Whether no etcd got far enough on it to begin: it has nothing, and etcd would wait for ever for a cluster that there
    /// is not.
    pub never_ran: bool,
}

impl Verdict {
    /// The worst finding's; `None` when there is none.
    pub fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    fn add(&mut self, severity: Severity, path: &Path, offset: Option<u64>, what: impl Into<String>) {
        self.findings.push(Finding { severity, what: what.into(), path: path.to_owned(), offset });
    }

    /// Takes an error for a finding when the bytes are at fault, and passes others on.
    fn take<T>(&mut self, path: &Path, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_corruption() || matches!(error, Error::Unsupported { .. }) => {
                let offset = match &error {
                    Error::Corrupt { offset, .. }
                    | Error::Truncated { offset, .. }
                    | Error::Checksum { offset, .. } => Some(*offset),
                    _ => None,
                };
                let what = match error {
                    Error::Corrupt { what, .. } => what,
                    other => other.to_string(),
                };
                self.add(Severity::Corrupt, path, offset, what);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Which HashKV [`verify`] computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WantHash {
    /// What a live etcd with these rows answers, by the rules of its version.
    Current(HashRules),
    /// At another revision or compaction.
    At(HashRequest),
    /// The first of these that the rows can answer; none where they can answer none.
    First(Vec<Answered>),
}

/// What a member was asked for its hash once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    /// Which member. The hash of another says nothing of this one: it may be the other that is damaged.
    pub by: (MemberId, ClusterId),
    /// The question.
    pub request: HashRequest,
}

impl WantHash {
    fn request<R: ReadAt>(&self, db: &Db<R>) -> Result<Option<HashRequest>> {
        match self {
            Self::Current(rules) => HashRequest::current(db, *rules).map(Some),
            Self::At(request) => Ok(Some(*request)),
            Self::First(answered) => {
                let (compaction, last) = (Compaction::read(db)?, mvcc::current_revision(db)?);
                let can_answer = |request: &&HashRequest| {
                    request.compact_revision >= compaction.revision()
                        && (request.compact_revision..=last).contains(&request.revision)
                };
                let request = answered.iter().map(|answered| &answered.request).find(can_answer);
                Ok(request.map(|request| HashRequest { clean_up_to: compaction.finished, ..*request }))
            }
        }
    }
}

/// What [`verify`] is to do.
#[derive(Debug, Clone, Default)]
pub struct Verify {
    /// Compute HashKV.
    pub hash: Option<WantHash>,
    /// How far the rows are compacted, when that is not what the meta bucket says.
    pub compaction: Option<Compaction>,
}

impl Verify {
    /// Without what other members were asked.
    fn of_member(&self, member: Option<(MemberId, ClusterId)>) -> Self {
        let mut options = self.clone();
        if let Some(WantHash::First(answered)) = &mut options.hash {
            answered.retain(|answered| Some(answered.by) == member);
        }
        options
    }
}

/// A database that no etcd can open as long as this is held: one that starts waits.
#[derive(Debug, Default)]
pub struct Hold {
    _file: Option<File>,
}

/// Holds the database in a data directory, if there is one. Fails when a running etcd holds it.
pub fn hold(data_dir: &Path) -> Result<Hold> {
    use rustix::fs::{FlockOperation, flock};
    let path = Layout::new(data_dir).db();
    let Ok(file) = File::open(&path) else { return Ok(Hold { _file: None }) };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::precondition(format!(
            "{} is in use: an etcd runs on this data directory; stop it first",
            path.display()
        ))),
        // Where there are no locks, etcd has none either.
        _ => Ok(Hold { _file: Some(file) }),
    }
}

/// Checks everything in a data directory that can be checked without its etcd: log, raft snapshots, database pages, rows,
/// leases, and that they agree. `None` when there is no member in it.
///
/// Fails only when it cannot read, or when an etcd runs on the directory; damage is in the verdict.
pub fn verify(data_dir: &Path, options: &Verify) -> Result<Option<Verdict>> {
    let layout = Layout::new(data_dir);
    if !data_dir.is_dir() {
        return Err(Error::precondition(format!("{} is not a directory", data_dir.display())));
    }
    if !layout.member().try_exists().map_err(Error::io("look at", layout.member()))? {
        return Ok(None);
    }
    let _held = hold(data_dir)?;
    verify_member(&layout, options).map(Some)
}

impl Layout {
    /// [`verify`] of a member directory that may not be in its place yet.
    pub fn verify(&self, options: &Verify) -> Result<Verdict> {
        verify_member(self, options)
    }
}

fn verify_member(layout: &Layout, options: &Verify) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let log = verify_log(layout, &mut verdict)?;
    let snapshots = verify_snapshots(layout, log.as_ref(), &mut verdict)?;
    if let Some(log) = &log {
        let (start, conf_state) = start_of(log, snapshots.as_ref());
        verdict.members = Some(log.members_at(&conf_state, start.index(), u64::MAX));
    }
    let path = layout.db();
    // etcd creates its database, then its log, then writes into that who its members are.
    let has_begun = log.as_ref().map_or_else(
        || has_entries(&layout.wal()),
        |log| {
            let committed = log.state.commit();
            let has_members = log.member_changes.iter().any(|change| change.index <= committed);
            has_members || log.newest_snapshot().is_some_and(|snapshot| snapshot.index() > 0)
        },
    );
    if !path.exists() {
        verdict.never_ran = !has_begun;
        verdict.add(Severity::Corrupt, &path, None, "the database is missing");
        return Ok(verdict);
    }
    let file = File::open(&path).map_err(Error::io("open", &path))?;
    let size = file.metadata().map_err(Error::io("look at", &path))?.len();
    if size == 0 {
        verdict.never_ran = !has_begun;
        verify_young(&path, size, log.as_ref(), &mut verdict);
        return Ok(verdict);
    }
    let opened = Db::open(file);
    let Some(db) = verdict.take(&path, opened)? else { return Ok(verdict) };
    if is_young(&db).unwrap_or(false) {
        let visited = db.check_small_buckets(&[KEY_BUCKET], Visited::new(db.meta()));
        if verdict.take(&path, visited)?.is_some() {
            verdict.never_ran = !has_begun;
            verify_young(&path, size, log.as_ref(), &mut verdict);
        }
        return Ok(verdict);
    }
    let checked = verify_database(&db, &options.of_member(verdict.member));
    if let Some((summary, findings)) = verdict.take(&path, checked)? {
        verdict.findings.extend(findings.into_iter().map(|finding| Finding { path: path.clone(), ..finding }));
        if let Some(log) = &log {
            verdict.unapplied = log.key_changes_after(summary.consistent_index);
            let agreed = verify_agreement(&db, &summary, log, snapshots.as_ref(), &path, &mut verdict);
            verdict.take(&path, agreed)?;
        }
        verdict.summary = Some(summary);
    }
    Ok(verdict)
}

/// Whether anything is in a directory, or cannot be told.
fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir)
        .map_or_else(|error| error.kind() != std::io::ErrorKind::NotFound, |mut entries| entries.next().is_some())
}

/// Whether nothing was ever committed to a database but the buckets that etcd creates first.
fn is_young<R: ReadAt>(db: &Db<R>) -> Result<bool> {
    let is_empty = |bucket| db.bucket(bucket)?.map_or(Ok(true), |root| Ok::<_, Error>(db.last(&root)?.is_none()));
    Ok(is_empty(KEY_BUCKET)?
        && is_empty(LEASE_BUCKET)?
        && mvcc::read_u64(db, META_BUCKET, CONSISTENT_INDEX)?.unwrap_or(0) == 0
        // As which it begins.
        && mvcc::read_u64(db, AUTH_BUCKET, AUTH_REVISION)?.unwrap_or(0) <= 1)
}

/// etcd commits what it applies a while later, and a log that reaches back to the beginning has all of it.
fn verify_young(path: &Path, db_size: u64, log: Option<&Log>, verdict: &mut Verdict) {
    let reaches_back = log.is_some_and(|log| {
        let is_first = log.segments.first().is_some_and(|segment| (segment.seq, segment.index) == (0, 0));
        let starts_at = log.newest_snapshot().map_or(0, proto::disk::WalSnapshot::index);
        is_first && starts_at == 0 && log.terms.first().is_some_and(|run| run.0 <= 1)
    });
    let is_received = !reaches_back && log.is_some_and(|log| verify_received(path, log, verdict));
    if reaches_back {
        let what = "nothing has been committed to the database yet; etcd fills it from the log, which has all of it";
        verdict.add(Severity::Repairable, path, None, what);
    }
    if reaches_back || is_received {
        verdict.unapplied = log.map_or(0, |log| log.key_changes_after(0));
        verdict.summary = Some(Summary { revision: 1, db_size, ..Summary::default() });
    } else {
        let what = "nothing has been committed to the database, and the log does not reach back to its beginning";
        verdict.add(Severity::Corrupt, path, None, what);
    }
}

fn verify_log(layout: &Layout, verdict: &mut Verdict) -> Result<Option<Log>> {
    let dir = layout.wal();
    if !dir.is_dir() {
        verdict.add(Severity::Corrupt, &dir, None, "the log directory is missing");
        return Ok(None);
    }
    let log = match wal::read(&dir) {
        Ok(log) => log,
        Err(damage) => return verdict.take(&damage.path, Err(damage.error)),
    };
    if let Tail::Torn { path, offset, what } = &log.tail {
        let what = format!("the log ends in a record that a crash cut ({what}); etcd drops it when it starts");
        verdict.add(Severity::Repairable, path, Some(*offset), what);
    }
    verdict.member = Some((MemberId(log.metadata.node_id()), ClusterId(log.metadata.cluster_id())));
    verdict.raft = Some((log.state.term(), log.state.commit()));
    verdict.log_end = log.last_index();
    verdict.began_restored = log.began_restored();
    Ok(Some(log))
}

/// Decodes the raft snapshots and returns the newest that the log knows.
fn verify_snapshots(
    layout: &Layout,
    log: Option<&Log>,
    verdict: &mut Verdict,
) -> Result<Option<(SnapName, proto::disk::Snapshot)>> {
    let dir = layout.snap();
    let mut names = Vec::new();
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            verdict.add(
                Severity::Corrupt,
                &dir,
                None,
                "the snapshot directory, in which the database lies, is missing",
            );
            return Ok(None);
        }
        Err(error) => return Err(Error::io("list", &dir)(error)),
    };
    for entry in entries {
        names.extend(entry.map_err(Error::io("list", &dir))?.file_name().to_str().and_then(SnapName::parse));
    }
    names.sort_unstable();
    let mut broken: Option<PathBuf> = None;
    for name in names.into_iter().rev() {
        let path = dir.join(name.to_string());
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let known = log.is_none_or(|log| {
            log.snapshots.iter().any(|record| (record.term(), record.index()) == (name.term, name.index))
        });
        match snap::decode(&bytes).and_then(|snapshot| snap::member_ids(&snapshot).map(|_| snapshot)) {
            Ok(snapshot) if known => {
                if let Some(path) = broken {
                    verdict.add(
                        Severity::Repairable,
                        &path,
                        None,
                        "raft snapshot is damaged; etcd sets it aside and starts from an older one",
                    );
                }
                let metadata = snapshot.metadata.as_ref();
                if metadata.is_some_and(|metadata| (metadata.term(), metadata.index()) != (name.term, name.index)) {
                    verdict.add(
                        Severity::Corrupt,
                        &path,
                        None,
                        "raft snapshot has another term or index than its name",
                    );
                }
                return Ok(Some((name, snapshot)));
            }
            Ok(_) => verdict.add(Severity::Remark, &path, None, "raft snapshot is not in the log; etcd ignores it"),
            Err(_) => broken = broken.or(Some(path)),
        }
    }
    if let Some(path) = broken {
        let what = "raft snapshot is damaged; etcd sets it aside and reads the log from its beginning, where it still reaches back";
        verdict.add(Severity::Repairable, &path, None, what);
    }
    Ok(None)
}

/// Checks a database by itself: pages, rows, leases, meta bucket; and computes its HashKV when asked to.
///
/// The walk that checks and the one that hashes run side by side. Errors are structural damage that ends the walk.
pub fn verify_database<R: ReadAt>(db: &Db<R>, options: &Verify) -> Result<(Summary, Vec<Finding>)> {
    verify_and_see(db, options, &mut |_, _| {})
}

/// [`verify_database`], which shows key and value of each row of the key bucket to `see`, in order.
pub fn verify_and_see<R: ReadAt>(
    db: &Db<R>,
    options: &Verify,
    see: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(Summary, Vec<Finding>)> {
    let (checked, hashed) = std::thread::scope(|scope| {
        let hash = options.hash.as_ref().map(|want| {
            scope.spawn(move || {
                let Some(request) = want.request(db)? else { return Ok(None) };
                mvcc::hash_kv(db, request).map(|hash| Some((request, hash)))
            })
        });
        let checked = check_database(db, options, see);
        let hashed = hash
            .map(|hash| hash.join().unwrap_or_else(|_| Err(Error::invalid("the hashing thread ended unexpectedly"))));
        (checked, hashed)
    });
    let (mut summary, mut findings, counted) = checked?;
    match hashed {
        // Superseded rows below the compaction: the quick way to hash does not hold.
        Some(Ok(Some((request, _)))) if counted.superseded_rows > 0 => {
            summary.hash = Some(mvcc::hash_kv(db, HashRequest { clean_up_to: 0, ..request })?);
        }
        Some(Ok(Some((_, hash)))) => summary.hash = Some(hash),
        // Rows that do not decode are findings already.
        Some(Err(error)) if error.is_corruption() && !findings.is_empty() => {}
        Some(Err(error)) => return Err(error),
        Some(Ok(None)) | None => {}
    }
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Ok((summary, findings))
}

fn check_database<R: ReadAt>(
    db: &Db<R>,
    options: &Verify,
    see: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(Summary, Vec<Finding>, Counted)> {
    let mut findings = Vec::new();
    let mut find =
        |severity, offset, what: String| findings.push(Finding { severity, what, path: PathBuf::new(), offset });
    if let Some(offset) = db.spoiled_meta() {
        let what = "meta page is not valid; etcd uses the other one, which may be of the commit before".to_owned();
        find(Severity::Repairable, Some(offset), what);
    }
    let visited = db.check_small_buckets(&[KEY_BUCKET], Visited::new(db.meta()))?;
    let leases = read_leases(db)?;
    let check = CheckRows { compaction: options.compaction, ..CheckRows::new(leases) };
    let (counted, visited) = mvcc::check_rows(db, &check, visited, see)?;
    visited.check_free_pages(db.meta())?;
    for problem in &counted.problems {
        find(Severity::Corrupt, Some(problem.offset), problem.what.clone());
    }
    if counted.problem_count > counted.problems.len() as u64 {
        find(
            Severity::Corrupt,
            None,
            format!("{} more problems with rows", counted.problem_count - counted.problems.len() as u64),
        );
    }
    for lease in &counted.dangling_leases {
        let what = format!(
            "a live key is attached to lease {lease:x}, which has no record: the key never expires, and a put with ignore_lease on it panics etcd"
        );
        find(Severity::Corrupt, None, what);
    }
    if counted.superseded_rows > 0 {
        let what = format!(
            "{} rows at or below the finished compaction are superseded; the next compaction takes them",
            counted.superseded_rows
        );
        find(Severity::Remark, None, what);
    }
    let consistent_index = mvcc::read_u64(db, META_BUCKET, CONSISTENT_INDEX)?.unwrap_or(0);
    if consistent_index == 0 {
        find(
            Severity::Corrupt,
            None,
            "the database does not know its raft index (consistent_index is missing or 0)".into(),
        );
    }
    for (alarm, _) in db.rows(ALARM_BUCKET)? {
        let alarm = proto::disk::AlarmMember::decode(alarm.as_slice()).unwrap_or_default();
        let kind = match alarm.alarm() {
            1 => "NOSPACE",
            2 => "CORRUPT",
            _ => "unknown",
        };
        find(
            Severity::Remark,
            None,
            format!(
                "alarm {kind} of member {:x} is raised; etcd refuses writes until it is disarmed",
                alarm.member_id()
            ),
        );
    }
    let summary = Summary {
        revision: counted.revision,
        compact_revision: counted.compaction.revision(),
        rows: counted.rows,
        live_keys: counted.live_keys,
        leases: check.leases.len() as u64,
        dangling_leases: counted.dangling_leases.clone(),
        superseded_rows: counted.superseded_rows,
        auth_revision: mvcc::read_u64(db, AUTH_BUCKET, AUTH_REVISION)?.unwrap_or(0),
        consistent_index,
        db_size: db.meta().file_size(),
        db_size_in_use: (visited.count() + 2).saturating_mul(u64::from(db.meta().page_size)),
        schema: Some(Minor::of_schema(db)?),
        hash: None,
    };
    Ok((summary, findings, counted))
}

fn read_leases<R: ReadAt>(db: &Db<R>) -> Result<HashSet<i64>> {
    let mut leases = HashSet::new();
    let Some(root) = db.bucket(LEASE_BUCKET)? else { return Ok(leases) };
    let mut cursor = db.cursor(&root);
    while let Some(row) = cursor.next()? {
        let id = row.key.try_into().map(i64::from_be_bytes).ok();
        let lease = Lease::decode(row.value).ok();
        match (id, lease) {
            (Some(id), Some(lease)) if lease.id() == id && lease.ttl() > 0 => drop(leases.insert(id)),
            _ => {
                return Err(Error::corrupt(
                    0,
                    format!("lease record {} does not decode to a lease of that id", row.key.escape_ascii()),
                ));
            }
        }
    }
    Ok(leases)
}

/// Whether the database that the leader sent with the snapshot that the log starts from lies beside; etcd then takes that.
fn verify_received(path: &Path, log: &Log, verdict: &mut Verdict) -> bool {
    let at = log.newest_snapshot().map_or(0, proto::disk::WalSnapshot::index);
    let received = path.with_file_name(format!("{at:016x}.snap.db"));
    if at == 0 || !received.exists() {
        return false;
    }
    let what = format!("the database is behind the one its leader sent at raft index {at}; etcd takes that at start");
    verdict.add(Severity::Repairable, &received, None, what);
    true
}

/// Log, raft snapshot and database must tell one story.
fn verify_agreement<R: ReadAt>(
    db: &Db<R>,
    summary: &Summary,
    log: &Log,
    snapshot: Option<&(SnapName, proto::disk::Snapshot)>,
    path: &Path,
    verdict: &mut Verdict,
) -> Result<()> {
    let applied = summary.consistent_index;
    let start = log.newest_snapshot().cloned().unwrap_or_default();
    if start.index() > applied {
        let at = start.index();
        if !verify_received(path, log, verdict) {
            let what = format!(
                "the database is at raft index {applied}, behind the snapshot at {at} that the log starts from; etcd would panic"
            );
            verdict.add(Severity::Corrupt, path, None, what);
        }
    }
    if applied > log.last_index() {
        let what = format!(
            "the database is at raft index {applied}, past the end of the log at {}; etcd would skip entries",
            log.last_index()
        );
        verdict.add(Severity::Corrupt, path, None, what);
    }
    let term = mvcc::read_u64(db, META_BUCKET, TERM)?;
    if let Some(term) =
        term.filter(|term| *term > log.state.term() || log.term_at(applied).is_some_and(|logged| logged != *term))
    {
        let what = format!("the database says term {term} for raft index {applied}, which the log contradicts");
        verdict.add(Severity::Corrupt, path, None, what);
    }
    let reaches_back = |index: u64| log.terms.first().is_none_or(|run| run.0 <= index.saturating_add(1));
    let loadable = snapshot.map_or(0, |(name, _)| name.index);
    if summary.schema != Some(Minor::V3_7) && loadable < start.index() && !reaches_back(loadable) {
        let what = format!("raft snapshot {} is missing", SnapName { term: start.term(), index: start.index() });
        verdict.add(Severity::Corrupt, path.parent().unwrap_or(path), None, what);
    }
    verify_members(db, summary, log, &start, snapshot, path, verdict)
}

/// The snapshot that etcd starts from, and who was a member then. A log of 3.4 does not have that; the snapshot itself has.
fn start_of(
    log: &Log,
    snapshot: Option<&(SnapName, proto::disk::Snapshot)>,
) -> (proto::disk::WalSnapshot, proto::disk::ConfState) {
    let start = log.newest_snapshot().cloned().unwrap_or_default();
    let from_file = || snapshot.and_then(|(_, snapshot)| snapshot.metadata.clone()?.conf_state);
    let conf_state = start.conf_state.clone().or_else(from_file).unwrap_or_default();
    (start, conf_state)
}

fn verify_members<R: ReadAt>(
    db: &Db<R>,
    summary: &Summary,
    log: &Log,
    start: &proto::disk::WalSnapshot,
    snapshot: Option<&(SnapName, proto::disk::Snapshot)>,
    path: &Path,
    verdict: &mut Verdict,
) -> Result<()> {
    let (_, conf_state) = start_of(log, snapshot);
    let expected = log.members_at(&conf_state, start.index(), summary.consistent_index).all();
    let local = log.metadata.node_id();
    if !expected.is_empty() && !expected.contains(&local) {
        let what = format!("this member, {local:x}, was removed from its cluster; etcd refuses to start it");
        verdict.add(Severity::Remark, path, None, what);
    }
    // 3.4 keeps its members elsewhere and its own restore leaves this bucket stale.
    if summary.schema == Some(Minor::V3_4) || expected.is_empty() {
        return Ok(());
    }
    let members = membership::read_members(db)?;
    let recorded: BTreeSet<u64> = members.iter().map(|member| member.id.0).collect();
    let ours = members.into_iter().find(|member| member.id.0 == local);
    verdict.name = ours.map(|ours| ours.name).filter(|name| !name.is_empty());
    let configured: BTreeSet<u64> = conf_state.voters.iter().chain(&conf_state.learners).copied().collect();
    for id in expected.difference(&recorded) {
        // An addition that etcd refused when it applied the entry stays in the log.
        let severity = if configured.contains(id) { Severity::Corrupt } else { Severity::Remark };
        verdict.add(
            severity,
            path,
            None,
            format!("member {id:x} of the raft configuration has no record in the members bucket"),
        );
    }
    for id in recorded.difference(&expected) {
        let severity = if summary.schema == Some(Minor::V3_7) { Severity::Corrupt } else { Severity::Remark };
        let what = format!(
            "member {id:x} in the members bucket is not in the raft configuration; etcd 3.7 would take it for a voter"
        );
        verdict.add(severity, path, None, what);
    }
    Ok(())
}
