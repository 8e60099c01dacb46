//! A full snapshot and the deltas after it made into a new full snapshot, without any etcd.
//!
//! The chain is put together in a scratch directory as a restore does, and written anew while it is checked: in key order,
//! compacted as far as etcd was. When it is sound, what was written is decompressed, hashed and uploaded; it gets its name
//! when the store gives back what was sent.

mod spool;

use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use chrono::Utc;
use etcd_format::bolt::Db;
use etcd_format::datadir::{self, Finding, Rewrite, Severity, Staged, Summary, Verify, WantHash, verify_and_see};
use etcd_format::mvcc::HashRules;
use proto::backup::ObjectMeta;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Chain, Layout, ObjectName, PREDECESSOR, Timeline};
use crate::container::LAYOUT;
use crate::object::FullWriter;
use crate::restore::{Aside, Pieces, Recorded, fetch, from_store, recorded_hash};
use crate::retention::ABANDONED_AFTER;
use crate::scratch::Scratch;
use crate::store::{Store, Upload};
use crate::{Error, Result};
use spool::Spool;

/// What to compact, and how far.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This timeline rather than the newest.
    pub timeline: Option<Timeline>,
    /// Compact at the last revision: of each key only its newest value stays. Otherwise as far as etcd was compacted.
    pub discard_history: bool,
    /// Where the scratch directory is made; it takes as much room as the database, and as the new full snapshot.
    pub work_dir: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Compacted {
    /// The new full snapshot; `None` when there was nothing to merge.
    pub object: Option<String>,
    /// Its revision.
    pub revision: i64,
    /// Its compaction revision.
    pub compact_revision: i64,
    /// Its rows.
    pub rows: u64,
    /// Bytes of its database.
    pub db_size: u64,
    /// Bytes of the object.
    pub bytes: u64,
    /// Leases that live keys need and whose TTL was not in the backup: they got 60 s.
    pub leases_with_guessed_ttl: Vec<String>,
    /// Whether etcd's own hash, recorded with the last delta, was found again in what was merged.
    pub hash_compared: bool,
}

/// Merges the newest chain. What is there stays; `gc` deletes what the new full snapshot replaces.
#[tracing::instrument(skip_all)]
pub async fn compact(store: &Store, settings: &Settings, stop: &CancellationToken) -> Result<Compacted> {
    let catalog = store.catalog().await?;
    let (timeline, chain) = newest_chain(store, &catalog, settings.timeline)?;
    let objects = chain.objects(timeline);
    let (full, last) = (meta_of(store, objects.first()).await?, meta_of(store, objects.last()).await?);
    let compacted_to = full.compact_revision;
    if chain.deltas.is_empty() && (!settings.discard_history || compacted_to >= chain.last) {
        return Ok(Compacted {
            object: None,
            revision: chain.last,
            compact_revision: compacted_to,
            rows: 0,
            db_size: 0,
            bytes: 0,
            leases_with_guessed_ttl: Vec::new(),
            hash_compared: false,
        });
    }
    let now_ms = Utc::now().timestamp_millis();
    let staging = ObjectName::Uploading { timeline, unix_ms: now_ms, random: rand::random() };
    check_unchanged(store, &catalog, timeline, staging).await?;
    let layout = if timeline == PREDECESSOR { Layout::GardenerV2 } else { Layout::Steward };
    // It has the state of that time, whenever it is made, which `restore --time` and retention go by; and it sorts after what
    // it is made of.
    let unix_ms = chain.deltas.last().map_or(chain.full.unix_ms, |delta| delta.unix_ms) + layout.tick_ms();
    let (feeder, received) = fetch(store.clone(), objects.clone(), stop.clone());
    let (compressed, mut compressed_out) = mpsc::channel(2);
    let merge = Merge {
        named: objects.iter().map(|(name, _)| (*name, store.location(name))).collect(),
        full,
        last,
        layout,
        unix_ms,
        discard_history: settings.discard_history,
        stop: stop.clone(),
    };
    let work_dir = settings.work_dir.clone();
    let merging = tokio::task::spawn_blocking(move || merge.run(received, &work_dir, &compressed));
    let mut upload = store.upload(staging);
    let uploaded = async {
        let mut sent = Sha256::new();
        while let Some(bytes) = compressed_out.recv().await {
            sent.update(&bytes);
            upload.write(bytes).await?;
        }
        drop(compressed_out);
        let mut merged = merging.await.map_err(|error| Error::task(&error))??;
        tracing::debug!("everything is uploaded, read it back");
        read_back(store, &mut upload, sent, stop).await?;
        check_unchanged(store, &catalog, timeline, staging).await?;
        let free = |attempt| layout.full(timeline, merged.revision, unix_ms + attempt * layout.tick_ms());
        let (name, size) = upload.finish_as(free).await?;
        merged.object = Some(name.to_string());
        merged.bytes = size;
        Ok(merged)
    };
    let uploaded = tokio::select! {
        uploaded = uploaded => uploaded,
        () = stop.cancelled() => Err(Error::Cancelled),
    };
    feeder.abort();
    if uploaded.is_err() {
        upload.abort().await;
    }
    uploaded
}

fn newest_chain(store: &Store, catalog: &Catalog, wanted: Option<Timeline>) -> Result<(Timeline, Chain)> {
    let url = store.url();
    let found = match wanted {
        Some(wanted) => catalog.timelines.get(&wanted).and_then(|history| Some((wanted, history.newest_chain()?))),
        None => catalog.newest_chain(),
    };
    let (timeline, chain) = found.ok_or_else(|| match wanted {
        Some(wanted) => Error::missing(format!("store {url} has no full snapshot in timeline {wanted}")),
        None => Error::missing(format!("nothing to compact: store {url} has no full snapshot")),
    })?;
    if let Some(gap) = chain.gap {
        return Err(Error::missing(format!(
            "backups of revisions {} to {} are missing in timeline {timeline} of store {url}: what lies beyond cannot be merged; take a full snapshot",
            gap.after + 1,
            gap.before - 1
        )));
    }
    Ok((timeline, chain))
}

/// A full snapshot that was taken meanwhile, or is being taken, may have users and roles that this one has not; it must not
/// come after that one.
async fn check_unchanged(store: &Store, before: &Catalog, timeline: Timeline, own: ObjectName) -> Result<()> {
    let now = store.catalog().await?;
    let fulls = |catalog: &Catalog| catalog.timelines.get(&timeline).map_or(0, |history| history.fulls.len());
    let abandoned_ms = Utc::now().timestamp_millis() - i64::try_from(ABANDONED_AFTER.as_millis()).unwrap_or(i64::MAX);
    let is_under_way = |name: &ObjectName| {
        let of_timeline = matches!(name, ObjectName::Uploading { timeline: other, .. } if *other == timeline);
        of_timeline && *name != own && name.unix_ms() > abandoned_ms
    };
    if fulls(&now) != fulls(before) || now.uploading.iter().any(|(name, _)| is_under_way(name)) {
        return Err(Error::precondition(format!(
            "a full snapshot is being taken, or was, in timeline {timeline} of store {}: there is no need to compact what is before it; try again later",
            store.url()
        )));
    }
    Ok(())
}

async fn meta_of(store: &Store, object: Option<&(ObjectName, u64)>) -> Result<ObjectMeta> {
    let Some((name, size)) = object else { return Ok(ObjectMeta::default()) };
    if *size == 0 {
        return Err(Error::corrupt(format!("{}: object is empty", store.location(name))));
    }
    Ok(store.meta(name, *size).await?.unwrap_or_default())
}

/// Compares what the store has with what was sent, which was decompressed before. What waits in memory is put at once.
async fn read_back(store: &Store, upload: &mut Upload, sent: Sha256, stop: &CancellationToken) -> Result<()> {
    let Some((staging, size)) = upload.stage().await? else { return Ok(()) };
    let (feeder, mut received) = fetch(store.clone(), vec![(staging, size)], stop.clone());
    let mut found = Sha256::new();
    while let Some(piece) = received.recv().await {
        found.update(piece?.unwrap_or_default());
    }
    feeder.abort();
    if found.finalize() == sent.finalize() {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "{}: the store does not give back what was uploaded; nothing is changed, try again",
        store.location(&staging)
    )))
}

/// Everything that the merging thread works with.
struct Merge {
    named: Vec<(ObjectName, String)>,
    full: ObjectMeta,
    last: ObjectMeta,
    layout: Layout,
    unix_ms: i64,
    discard_history: bool,
    stop: CancellationToken,
}

impl Merge {
    fn run(self, mut received: Pieces, work_dir: &Path, out: &mpsc::Sender<Bytes>) -> Result<Compacted> {
        let dir = Scratch::new(work_dir, "sidecar-compact-")?;
        let place = dir.path().display().to_string();
        let staged =
            Staged::create(datadir::Scratch, &dir.path().join("data"), false).map_err(Error::format(&place))?;
        let (cluster_id, recorded) = (self.full.cluster_id, recorded_hash(&self.full));
        let mut aside = Aside { cluster_id, recorded, ..Aside::default() };
        let tail = from_store(&staged, &self.named, &mut received, None, &mut aside, &self.stop, &|_| {})?;
        let restored = tail.finish_as_snapshot(&aside.lease_ttls, &aside.live_leases).map_err(Error::format(&place))?;
        tracing::debug!(revision = restored.revision, "the chain is put together");
        let path = staged.layout().db();
        let name = path.display().to_string();
        let db = Db::open(File::open(&path).map_err(Error::io("open", &name))?).map_err(Error::format(&name))?;
        let hash = recorded_at(aside.recorded, restored.compaction.revision())
            .map(|recorded| recorded.request(restored.compaction.finished));
        let options = Verify { hash: hash.map(WantHash::At), compaction: Some(restored.compaction) };
        let revision = restored.revision;
        let known = if self.discard_history { revision } else { aside.compact_revision.min(revision) };
        let (clean_up_to, rules) = (restored.compaction.finished, HashRules::of(&self.last.etcd_version));
        let compact_revision = known.max(restored.compaction.revision());
        // What is open stays readable, and nothing is left behind however this ends.
        drop(staged);
        drop(dir);
        let mut checked = None;
        let mut compacted = Spool::fill(work_dir, |pieces| {
            let rewrite = Rewrite::new(&db, compact_revision, clean_up_to, rules, pieces);
            let mut rewrite = rewrite.map_err(Error::format(&name))?;
            let found = verify_and_see(&db, &options, &mut |key, value| rewrite.row(key, value));
            // What is wrong with the rows comes before what is wrong with writing them.
            let (summary, findings) = found.map_err(Error::format(&name))?;
            check_sound(&summary, &findings)?;
            checked = Some(summary);
            rewrite.finish().map_err(Error::format(&name))
        })?;
        let summary = checked.ok_or_else(|| Error::Bug { what: "a database was not checked".into() })?;
        if summary.revision != revision {
            return Err(Error::corrupt(format!(
                "the backup is named up to revision {revision}, what it holds ends at {}",
                summary.revision
            )));
        }
        if let (Some(found), Some(recorded)) = (summary.hash, aside.recorded)
            && !found.may_be(recorded.hash.hash)
        {
            return Err(Error::corrupt(format!(
                "merged rows have hash {} at revision {}; etcd's own hash, recorded with the backup, is {}: the backup does not hold what etcd held",
                found.hash, found.revision, recorded.hash.hash
            )));
        }
        if summary.superseded_rows > 0 {
            // What is at or below the finished compaction is not one row a key: every row must be looked at.
            drop(compacted);
            compacted = Spool::fill(work_dir, |pieces| {
                let rewrite = Rewrite::new(&db, compact_revision, 0, rules, pieces);
                rewrite
                    .and_then(|mut rewrite| rewrite.all_rows().and_then(|()| rewrite.finish()))
                    .map_err(Error::format(&name))
            })?;
        }
        drop(db);
        let (rewritten, spool) = compacted;
        let db_size = rewritten.finished.file_size();
        tracing::debug!(rows = rewritten.rows, bytes = db_size, "it is sound, and written anew");
        let hash_kv = aside
            .recorded
            .map(|recorded| recorded.hash)
            .filter(|hash| (hash.revision, hash.compact_revision.max(0)) == (revision, compact_revision));
        let trailer = ObjectMeta {
            first_revision: revision,
            last_revision: revision,
            compact_revision,
            auth_revision: summary.auth_revision,
            content_bytes: db_size + 32,
            hash_kv,
            ..ObjectMeta::default()
        };
        let mut writer = FullWriter::new(self.layout, &self.leading_meta())?;
        spool.empty(&rewritten.finished.metas().concat(), &mut writer, &mut |bytes| {
            out.blocking_send(bytes).map_err(|_| Error::Cancelled)
        })?;
        out.blocking_send(writer.finish(&trailer)?).map_err(|_| Error::Cancelled)?;
        Ok(Compacted {
            object: None,
            revision,
            compact_revision,
            rows: rewritten.rows,
            db_size,
            bytes: 0,
            leases_with_guessed_ttl: restored.guessed_leases.iter().map(|id| format!("{id:x}")).collect(),
            hash_compared: summary.hash.is_some(),
        })
    }

    fn leading_meta(&self) -> ObjectMeta {
        ObjectMeta {
            layout: LAYOUT,
            cluster_id: self.last.cluster_id,
            member_id: self.last.member_id,
            etcd_version: self.last.etcd_version.clone(),
            raft_term: self.last.raft_term,
            raft_index: self.last.raft_index,
            started_unix_ms: self.unix_ms,
            auth_fingerprint: self.full.auth_fingerprint,
            auth_state: self.full.auth_state,
            ..ObjectMeta::default()
        }
    }
}

fn check_sound(summary: &Summary, findings: &[Finding]) -> Result<()> {
    let mut corrupt = findings.iter().filter(|finding| finding.severity == Severity::Corrupt);
    // Leases without a record are the snapshot's own; a restore gives them one.
    match corrupt.nth(summary.dangling_leases.len()) {
        Some(finding) => {
            Err(Error::corrupt(format!("what was merged is not sound, nothing is uploaded: {}", finding.what)))
        }
        None => Ok(()),
    }
}

/// A hash that rows compacted so far can reproduce.
fn recorded_at(recorded: Option<Recorded>, compact_revision: i64) -> Option<Recorded> {
    recorded.filter(|recorded| recorded.hash.compact_revision.max(0) >= compact_revision)
}
