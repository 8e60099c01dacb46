//! A full snapshot and the deltas after it made into a new full snapshot, without any etcd.
//!
//! The chain is put together in a scratch directory as a restore does, checked, and written anew from there: in key order,
//! compacted as far as etcd was, front to back into the store. It gets its name when what arrived was read back and is
//! whole.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use bytes::Bytes;
use chrono::Utc;
use etcd_format::bolt::Db;
use etcd_format::datadir::{Rewrite, Scratch, Severity, Staged, Verify, WantHash, verify_database};
use etcd_format::mvcc::{HashRequest, HashRules};
use proto::backup::ObjectMeta;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Chain, Layout, ObjectName, PREDECESSOR, Timeline};
use crate::container::{self, FRAME_BYTES, FromTail, LAYOUT};
use crate::object::FullWriter;
use crate::restore::{Aside, PieceReader, Pieces, Recorded, Stoppable, fetch, from_store, recorded_hash};
use crate::retention::ABANDONED_AFTER;
use crate::store::{self, Store, Upload};
use crate::verify::{self, Level};
use crate::{Error, Result};

/// Pieces of a frame's size waiting to be compressed.
const PIECES_AHEAD: usize = 1;

/// What to compact, and how far.
#[derive(Debug, Clone)]
pub struct Settings {
    /// This timeline rather than the newest.
    pub timeline: Option<Timeline>,
    /// Compact at the last revision: of each key only its newest value stays. Otherwise as far as etcd was compacted.
    pub discard_history: bool,
    /// Where the scratch directory is made; it takes as much room as the database.
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
    let now_ms = Utc::now().timestamp_millis();
    let staging = ObjectName::Uploading { timeline, unix_ms: now_ms, random: rand::random() };
    let mut upload = store.upload(staging);
    let uploaded = async {
        while let Some(bytes) = compressed_out.recv().await {
            upload.write(bytes).await?;
        }
        drop(compressed_out);
        let mut merged = merging.await.map_err(|error| Error::task(&error))??;
        let name = layout.full(timeline, merged.revision, unix_ms);
        tracing::debug!("everything is uploaded, read it back");
        read_back(store, &mut upload, &name, stop).await?;
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
        Some(wanted) => catalog.timelines.get(&wanted).map(|history| (wanted, history)),
        None => catalog.newest_restorable(),
    };
    let chain = found.and_then(|(timeline, history)| Some((timeline, history.newest_chain()?)));
    let (timeline, chain) = chain.ok_or_else(|| match wanted {
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

/// Reads what was uploaded. Each frame has a checksum of what was built; the predecessor's layout has the sha256 alone.
async fn read_back(store: &Store, upload: &mut Upload, name: &ObjectName, stop: &CancellationToken) -> Result<()> {
    let (location, name, stop) = (store.location(name), *name, stop.clone());
    let ours = !matches!(name, ObjectName::Gardener(_));
    match upload.stage().await? {
        store::Staged::InMemory(bytes) => {
            let size = bytes.len() as u64;
            let known = match ours.then(|| container::meta_from_tail(&location, size, &bytes, &bytes)).transpose()? {
                Some(FromTail::Meta(meta)) => {
                    let frames = container::frames_in_tail(&location, size, &bytes)?;
                    Some((*meta, frames.map_err(|_| Error::Bug { what: "frames of a whole object".into() })?))
                }
                Some(FromTail::Need(_)) => return Err(Error::Bug { what: "metadata of a whole object".into() }),
                None => None,
            };
            let check = move || verify::check(known, bytes.as_ref(), &name, &location, Level::Bytes);
            tokio::task::spawn_blocking(check).await.map_err(|error| Error::task(&error))?
        }
        store::Staged::At(staging, size) => {
            let known = if ours {
                let meta = store.meta(&staging, size).await?.unwrap_or_default();
                Some((meta, store.frames(&staging, size).await?))
            } else {
                None
            };
            let (feeder, mut received) = fetch(store.clone(), vec![(staging, size)], stop.clone());
            let checked = tokio::task::spawn_blocking(move || {
                let source = Stoppable::new(PieceReader::new(&mut received), &stop);
                verify::check(known, source, &name, &location, Level::Bytes)
            });
            let checked = checked.await.map_err(|error| Error::task(&error))?;
            feeder.abort();
            checked
        }
    }
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
        let dir = tempfile::Builder::new().prefix("sidecar-compact-").tempdir_in(work_dir);
        let dir = dir.map_err(Error::io("make a directory in", work_dir.display()))?;
        let place = dir.path().display().to_string();
        let staged = Staged::create(Scratch, &dir.path().join("data"), false).map_err(Error::format(&place))?;
        let (cluster_id, recorded) = (self.full.cluster_id, recorded_hash(&self.full));
        let mut aside = Aside { cluster_id, recorded, ..Aside::default() };
        let tail = from_store(&staged, &self.named, &mut received, None, &mut aside, &self.stop, &|_| {})?;
        let restored = tail.finish_as_snapshot(&aside.lease_ttls, &aside.live_leases).map_err(Error::format(&place))?;
        tracing::debug!(revision = restored.revision, "the chain is put together");
        let path = staged.layout().db();
        let name = path.display().to_string();
        let db = Db::open(File::open(&path).map_err(Error::io("open", &name))?).map_err(Error::format(&name))?;
        let hash = recorded_at(aside.recorded, restored.compaction.revision()).map(|recorded| HashRequest {
            revision: recorded.hash.revision,
            compact_revision: recorded.hash.compact_revision.max(0),
            clean_up_to: restored.compaction.finished,
            rules: recorded.rules,
        });
        let options = Verify { hash: hash.map(WantHash::At), compaction: Some(restored.compaction) };
        let revision = restored.revision;
        let known = if self.discard_history { revision } else { aside.compact_revision.min(revision) };
        let (clean_up_to, rules) = (restored.compaction.finished, HashRules::of(&self.last.etcd_version));
        let compact_revision = known.max(restored.compaction.revision());
        // What is open stays readable, and nothing is left behind however this ends.
        drop(staged);
        drop(dir);
        let (checked, rewrite) = std::thread::scope(|scope| {
            let rewrite = scope.spawn(|| Rewrite::plan(&db, compact_revision, clean_up_to, rules));
            (verify_database(&db, &options), rewrite.join())
        });
        let (summary, findings) = checked.map_err(Error::format(&name))?;
        let mut corrupt = findings.iter().filter(|finding| finding.severity == Severity::Corrupt);
        // Leases without a record are the snapshot's own; a restore gives them one.
        if let Some(finding) = corrupt.nth(summary.dangling_leases.len()) {
            return Err(Error::corrupt(format!("what was merged is not sound, nothing is uploaded: {}", finding.what)));
        }
        if let (Some(found), Some(recorded)) = (summary.hash, aside.recorded)
            && !found.may_be(recorded.hash.hash)
        {
            return Err(Error::corrupt(format!(
                "merged rows have hash {} at revision {}; etcd's own hash, recorded with the backup, is {}: the backup does not hold what etcd held",
                found.hash, found.revision, recorded.hash.hash
            )));
        }
        let rewrite = rewrite.map_err(|_| Error::Bug { what: "the planning thread ended unexpectedly".into() })?;
        let mut rewrite = rewrite.map_err(Error::format(&name))?;
        if summary.superseded_rows > 0 {
            // What is at or below the finished compaction is not one row a key: every row must be looked at.
            rewrite = Rewrite::plan(&db, compact_revision, 0, rules).map_err(Error::format(&name))?;
        }
        tracing::debug!(rows = rewrite.rows(), bytes = rewrite.size(), "it is sound, and what to write is known");
        let hash_kv = aside
            .recorded
            .map(|recorded| recorded.hash)
            .filter(|hash| (hash.revision, hash.compact_revision.max(0)) == (revision, compact_revision));
        let trailer = ObjectMeta {
            first_revision: revision,
            last_revision: revision,
            compact_revision,
            auth_revision: summary.auth_revision,
            content_bytes: rewrite.size() + 32,
            hash_kv,
            ..ObjectMeta::default()
        };
        self.write(&rewrite, &trailer, out).map_err(|error| match error {
            Error::Format { source, .. } => Error::format(&name)(source),
            error => error,
        })?;
        Ok(Compacted {
            object: None,
            revision,
            compact_revision,
            rows: rewrite.rows(),
            db_size: rewrite.size(),
            bytes: 0,
            leases_with_guessed_ttl: restored.guessed_leases.iter().map(|id| format!("{id:x}")).collect(),
            hash_compared: summary.hash.is_some(),
        })
    }

    /// Reading rows and building pages has one thread, compressing another.
    fn write(&self, rewrite: &Rewrite<'_, File>, trailer: &ObjectMeta, out: &mpsc::Sender<Bytes>) -> Result<()> {
        let meta = ObjectMeta {
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
        };
        let (to_compress, pieces) = sync_channel::<Vec<u8>>(PIECES_AHEAD);
        std::thread::scope(|scope| {
            let compressing = scope.spawn(move || {
                let mut send = |bytes| out.blocking_send(bytes).map_err(|_| Error::Cancelled);
                FullWriter::new(self.layout, &meta)?.write_all_frames(&pieces, &mut send)
            });
            let snapshot = Snapshot { sha: Sha256::new(), piece: Vec::new(), out: to_compress };
            let built = rewrite.write(snapshot).map_err(Error::format("compact")).and_then(Snapshot::finish);
            let writer =
                compressing.join().map_err(|_| Error::Bug { what: "compressing ended unexpectedly".into() })?;
            // Of the two errors that of the thread that ended first says why.
            let writer = writer?;
            built?;
            out.blocking_send(writer.finish(trailer)?).map_err(|_| Error::Cancelled)
        })
    }
}

/// A hash that rows compacted so far can reproduce.
fn recorded_at(recorded: Option<Recorded>, compact_revision: i64) -> Option<Recorded> {
    recorded.filter(|recorded| recorded.hash.compact_revision.max(0) >= compact_revision)
}

/// Hashes what it passes on in pieces.
struct Snapshot {
    sha: Sha256,
    piece: Vec<u8>,
    out: SyncSender<Vec<u8>>,
}

impl Snapshot {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(FRAME_BYTES));
        self.out.send(piece).map_err(|_| io::Error::other("compressing has ended"))
    }

    /// Adds the sha256, as etcd does.
    fn finish(mut self) -> Result<()> {
        self.sha.update(&self.piece);
        let digest = std::mem::take(&mut self.sha).finalize();
        if self.piece.len() + digest.len() > FRAME_BYTES {
            self.send().map_err(Error::io("compress", "a full snapshot"))?;
        }
        self.piece.extend_from_slice(&digest);
        self.send().map_err(Error::io("compress", "a full snapshot"))
    }
}

impl Write for Snapshot {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Pieces are whole frames.
        let taken = bytes.len().min(FRAME_BYTES - self.piece.len());
        self.piece.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        if self.piece.len() == FRAME_BYTES {
            self.sha.update(&self.piece);
            self.send()?;
        }
        Ok(taken)
    }

    /// What is not a whole frame yet waits for the sha256.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
