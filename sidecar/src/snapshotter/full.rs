//! One full snapshot: etcd's stream, scanned and compressed as it passes, into the store.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use etcd_format::{Scanned, SnapshotScan};
use proto::backup::{HashKv, ObjectMeta};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::closing::Position;
use super::own::Own;
use crate::catalog::{Layout, ObjectName};
use crate::etcd::Etcd;
use crate::object::FullWriter;
use crate::pace::Pace;
use crate::store::{Store, Upload};
use crate::{Error, Result};

/// etcd sends 32 KiB at a time; work is handed on in larger pieces.
const PIECE_BYTES: usize = 512 << 10;
/// Pieces waiting for each worker.
const PIECES_AHEAD: usize = 4;

/// A full snapshot that is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenFull {
    /// Name of the object.
    pub name: ObjectName,
    /// The revision it has.
    pub revision: i64,
    /// When it was begun.
    pub unix_ms: i64,
    /// Auth revision it has.
    pub auth_revision: u64,
    /// Bytes of the object.
    pub size: u64,
    /// Bytes of etcd's snapshot.
    pub db_size: u64,
    /// Whether it is marked as the last of its cluster.
    pub is_final: bool,
}

pub(super) fn log_full(taken: &TakenFull) {
    tracing::info!(
        revision = taken.revision,
        bytes = taken.size,
        db_bytes = taken.db_size,
        "full snapshot is in the store"
    );
}

/// What taking one needs.
pub(super) struct Job {
    pub etcd: Etcd,
    pub store: Store,
    pub layout: Layout,
    pub own: Own,
    pub meta: ObjectMeta,
    pub bytes_per_second: Option<u64>,
    pub quiet: Arc<tokio::sync::Mutex<()>>,
}

/// Takes a full snapshot. When it fails or is stopped, what was uploaded is removed.
#[tracing::instrument(name = "full", skip_all, fields(timeline = job.own.timeline))]
pub(super) async fn take(mut job: Job, stop: &CancellationToken) -> Result<TakenFull> {
    let unix_ms = job.meta.started_unix_ms;
    let staging = ObjectName::Uploading { timeline: job.own.timeline, unix_ms, random: rand::random() };
    let mut upload = job.store.upload(staging);
    let quiet = job.quiet.clone();
    let transferred = tokio::select! {
        result = async {
            job.own.check(&job.store).await?;
            let _quiet = quiet.lock().await;
            transfer(&mut job, &mut upload).await
        } => result,
        () = stop.cancelled() => Err(Error::Cancelled),
    };
    let scanned = match transferred {
        Ok(scanned) => scanned,
        Err(error) => {
            upload.abort().await;
            return Err(error);
        }
    };
    let name = |attempt| {
        let unix_ms = unix_ms + attempt * job.layout.tick_ms();
        let name = job.layout.full(job.own.timeline, scanned.revision, unix_ms);
        if job.meta.is_final { name.marked_final() } else { name }
    };
    let finished = tokio::select! {
        result = async {
            job.own.check(&job.store).await?;
            upload.finish_as(name).await
        } => result,
        () = stop.cancelled() => Err(Error::Cancelled),
    };
    let (name, size) = match finished {
        Ok(finished) => finished,
        Err(error) => {
            upload.abort().await;
            return Err(error);
        }
    };
    Ok(TakenFull {
        name,
        revision: scanned.revision,
        unix_ms,
        auth_revision: scanned.auth_revision,
        size,
        db_size: scanned.bytes,
        is_final: job.meta.is_final,
    })
}

async fn transfer(job: &mut Job, upload: &mut Upload) -> Result<Scanned> {
    let before = job.etcd.status().await?;
    let later = job.etcd.status().await?;
    let position = Position::between(&before, &later);
    let (to_scan, scan_in) = mpsc::channel::<Bytes>(PIECES_AHEAD);
    let (to_compress, compress_in) = mpsc::channel::<Bytes>(PIECES_AHEAD);
    let (compressed, mut compressed_out) = mpsc::channel::<Bytes>(2);
    let scanning = tokio::task::spawn_blocking(move || scan(scan_in, before.revision));
    let (layout, meta) = (job.layout, job.meta.clone());
    let compressing = tokio::task::spawn_blocking(move || compress(compress_in, &compressed, layout, &meta));
    let pace = job.bytes_per_second.map(Pace::new);
    let receive = receive(&mut job.etcd, pace, to_scan, to_compress);
    let send = async {
        while let Some(bytes) = compressed_out.recv().await {
            upload.write(bytes).await?;
        }
        Ok(())
    };
    // Both ends at once. When one fails the other is dropped, and the workers end because their channels do.
    tokio::try_join!(receive, send)?;
    let scanned = scanning.await.map_err(|error| Error::task(&error))?;
    let writer = compressing.await.map_err(|error| Error::task(&error))??;
    let scanned = scanned.map_err(Error::format("snapshot from etcd"))?;
    let mut trailer = ObjectMeta {
        first_revision: scanned.revision,
        last_revision: scanned.revision,
        compact_revision: scanned.compaction.revision(),
        auth_revision: scanned.auth_revision,
        content_bytes: scanned.bytes,
        hash_kv: live_hash(&mut job.etcd, &scanned).await,
        ..ObjectMeta::default()
    };
    position.mark(&mut trailer, scanned.revision);
    upload.write(writer.finish(&trailer)?).await?;
    Ok(scanned)
}

/// Hands etcd's bytes to both workers. Reads to the end of the stream: the sha256 comes after the last announced byte.
async fn receive(
    etcd: &mut Etcd,
    pace: Option<Pace>,
    to_scan: mpsc::Sender<Bytes>,
    to_compress: mpsc::Sender<Bytes>,
) -> Result<()> {
    let mut stream = etcd.snapshot().await?;
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    loop {
        let message = etcd.next_piece(&mut stream).await?;
        if let Some(message) = &message {
            if message.blob().is_empty() && message.remaining_bytes() > 0 {
                // A server that failed to read its database goes on sending nothing for ever.
                return Err(Error::corrupt(
                    "etcd stopped in the middle of its snapshot: it sends empty pieces; look at its log and disk",
                ));
            }
            piece.extend_from_slice(message.blob());
        }
        if piece.len() >= PIECE_BYTES || message.is_none() {
            let bytes = piece.split().freeze();
            // What is not read etcd does not send: whoever writes to it has the disk and the processor meanwhile.
            if let Some(pace) = &pace {
                pace.pass(bytes.len() as u64).await;
            }
            // A worker that ended early has the better error to tell.
            if to_scan.send(bytes.clone()).await.is_err() || to_compress.send(bytes).await.is_err() {
                return Ok(());
            }
        }
        if message.is_none() {
            return Ok(());
        }
    }
}

fn scan(mut pieces: mpsc::Receiver<Bytes>, least_revision: i64) -> Result<Scanned, etcd_format::Error> {
    let mut scan = SnapshotScan::new(least_revision);
    while let Some(piece) = pieces.blocking_recv() {
        scan.push(&piece)?;
    }
    scan.finish()
}

fn compress(
    mut pieces: mpsc::Receiver<Bytes>,
    out: &mpsc::Sender<Bytes>,
    layout: Layout,
    meta: &ObjectMeta,
) -> Result<FullWriter> {
    let mut writer = FullWriter::new(layout, meta)?;
    while let Some(piece) = pieces.blocking_recv() {
        writer.write(&piece)?;
        if writer.ready() >= PIECE_BYTES && out.blocking_send(writer.take()).is_err() {
            return Err(Error::Cancelled);
        }
    }
    Ok(writer)
}

/// The live HashKV at the snapshot's revision, when the snapshot's rows can reproduce it.
async fn live_hash(etcd: &mut Etcd, scanned: &Scanned) -> Option<HashKv> {
    match etcd.hash_kv(scanned.revision).await {
        // A hash that etcd remembers from before a compaction is of rows that are gone.
        Ok(live) if live.compact_revision < scanned.compaction.revision() => None,
        Ok(live) => {
            Some(HashKv { hash: live.hash, revision: scanned.revision, compact_revision: live.compact_revision })
        }
        Err(error) => {
            tracing::debug!(%error, "no hash is recorded with this full snapshot");
            None
        }
    }
}
