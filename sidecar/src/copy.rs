//! From one store to another, in the layout that the objects have or in another, each verified as it passes.
//!
//! Objects go in the order of their revisions, so that what has arrived when a run is cut short is a chain; the next run
//! leaves out what is there. Deltas are read ahead; a full snapshot streams through.

use std::io::{BufReader, Read};
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::Utc;
use etcd_format::SnapshotScan;
use etcd_format::mvcc::KeyValue;
use futures::StreamExt;
use proto::backup::{DeltaEnd, GrantedLease, ObjectMeta};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Description, Full, History, Layout, ObjectName, PREDECESSOR, Timeline};
use crate::container::{self, LAYOUT};
use crate::delta::{self, Builder, Record};
use crate::object::{Content, FullWriter, check_full_revision, delta_in_memory};
use crate::restore::{PieceReader, Stoppable, fetch};
use crate::store::{Store, Upload};
use crate::verify::{self, Level};
use crate::{Class, Error, Result, gardener};

/// Deltas in memory at once.
const DELTAS_AHEAD: usize = 4;
/// A source is asked for its final snapshot so often.
const FINAL_PERIOD: Duration = Duration::from_secs(5);
/// Compressed bytes handed on at once.
const PIECE_BYTES: usize = 512 << 10;

/// What to copy.
#[derive(Debug, Clone, Copy, Default)]
pub struct Selection {
    /// This timeline alone.
    pub timeline: Option<Timeline>,
    /// What any moment since then needs, in Unix milliseconds: the last full snapshot before it, and everything after.
    pub since_unix_ms: Option<i64>,
    /// What to write; as it is when `None`.
    pub layout: Option<Layout>,
}

/// What was copied.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Copied {
    /// Objects copied.
    pub copied: u64,
    /// Their bytes at the destination.
    pub bytes: u64,
    /// Objects that were there already.
    pub already_there: u64,
    /// Why others were not copied: they are damaged, or something else has their name.
    pub problems: Vec<String>,
}

/// Copies. Damaged objects are left out and are in the result; any other trouble ends it, to be run again.
pub async fn copy(from: &Store, to: &Store, selection: Selection, stop: &CancellationToken) -> Result<Copied> {
    let (source, destination) = (from.catalog().await?, to.catalog().await?);
    let mut copied = Copied::default();
    let timelines = timelines(from, &source, selection)?;
    for (timeline, history) in timelines {
        let job = Job { from, to, layout: selection.layout, timeline, stop };
        job.describe(&destination).await?;
        job.timeline(&history, &destination, &mut copied).await?;
    }
    Ok(copied)
}

/// Waits until the newest full snapshot of the source is marked as the last of its cluster, but no longer than that; whether it
/// is. Deltas may follow it: leases end even where nobody writes.
pub async fn wait_for_final(
    from: &Store,
    timeline: Option<Timeline>,
    most: Duration,
    stop: &CancellationToken,
) -> Result<bool> {
    let (started, mut has_answered) = (Instant::now(), false);
    loop {
        match has_final(from, timeline).await {
            Ok(true) => return Ok(true),
            Ok(false) => {
                has_answered = true;
                tracing::info!("the source has no final snapshot yet");
            }
            Err(error) if error.class().passes(has_answered) => {
                tracing::warn!(%error, "whether there is a final snapshot cannot be told");
            }
            Err(error) => return Err(error),
        }
        let left = most.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        tokio::select! {
            () = tokio::time::sleep(FINAL_PERIOD.min(left)) => {}
            () = stop.cancelled() => return Err(Error::Cancelled),
        }
    }
}

async fn has_final(from: &Store, timeline: Option<Timeline>) -> Result<bool> {
    let catalog = from.catalog().await?;
    let found = match timeline {
        Some(timeline) => catalog.timelines.get(&timeline).map(|history| (timeline, history)),
        None => catalog.newest_restorable(),
    };
    let Some((timeline, history)) = found else { return Ok(false) };
    // The schedule may have taken one more of the same. One with more is of a cluster that went on, or came back.
    let newest = history.fulls.last().map(|full| full.revision);
    for full in history.fulls.iter().filter(|full| Some(full.revision) == newest) {
        let name = full.name(timeline);
        let meta = match from.meta(&name, full.size).await {
            Ok(meta) => meta,
            // It is not copied either.
            Err(error) if error.class() == Class::Corrupt => None,
            Err(error) => return Err(error),
        };
        if name.is_marked_final() || meta.is_some_and(|meta| meta.is_final) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What of each timeline is to be copied.
fn timelines(from: &Store, source: &Catalog, selection: Selection) -> Result<Vec<(Timeline, History)>> {
    let wanted = |timeline: Timeline| selection.timeline.is_none_or(|wanted| wanted == timeline);
    let chosen: Vec<_> = source.timelines.iter().filter(|(timeline, _)| wanted(**timeline)).collect();
    if chosen.is_empty() {
        let what = selection.timeline.map_or_else(|| "no backups".to_owned(), |wanted| format!("no timeline {wanted}"));
        return Err(Error::missing(format!("store {} has {what}", from.url())));
    }
    let converted = |timeline: Timeline| selection.layout.is_some_and(|layout| is_converted(timeline, layout));
    if chosen.len() > 1 && chosen.iter().any(|(timeline, _)| converted(**timeline)) {
        return Err(Error::invalid(format!(
            "store {} has {} timelines, and in another layout only one can be written: choose it with --timeline",
            from.url(),
            chosen.len()
        )));
    }
    let since = |history: &History| {
        let Some(since) = selection.since_unix_ms else { return history.clone() };
        let before = history.fulls.iter().rev().find(|full| full.unix_ms <= since);
        let from = before.or_else(|| history.fulls.first()).map_or(0, |full| full.revision);
        History {
            fulls: history.fulls.iter().filter(|full| full.revision >= from).copied().collect(),
            deltas: history.deltas.iter().filter(|delta| delta.last > from).copied().collect(),
        }
    };
    Ok(chosen.into_iter().map(|(timeline, history)| (*timeline, since(history))).collect())
}

fn is_converted(timeline: Timeline, layout: Layout) -> bool {
    (timeline == PREDECESSOR) != (layout == Layout::GardenerV2)
}

/// One timeline on its way.
struct Job<'j> {
    from: &'j Store,
    to: &'j Store,
    layout: Option<Layout>,
    timeline: Timeline,
    stop: &'j CancellationToken,
}

impl Job<'_> {
    /// The layout that it is converted to; `None` when it stays what it is.
    fn converted(&self) -> Option<Layout> {
        self.layout.filter(|layout| is_converted(self.timeline, *layout))
    }

    /// The timeline that it is at the destination.
    fn target(&self) -> Timeline {
        match self.converted() {
            None => self.timeline,
            Some(Layout::Steward) => 1,
            Some(Layout::GardenerV2) => PREDECESSOR,
        }
    }

    /// Says where the timeline comes from, or finds that the destination has it from there. The predecessor's layout has one
    /// history: what is copied into it is described beside it, where it does not look.
    async fn describe(&self, destination: &Catalog) -> Result<()> {
        let timeline = self.target();
        let there = self.to.description(timeline).await?;
        let described = if self.converted().is_some() || timeline == PREDECESSOR {
            let created = there.as_ref().map_or_else(|| Utc::now().to_rfc3339(), |there| there.created.clone());
            let reason = format!("copied from {}, timeline {}", self.from.url(), self.timeline);
            let cluster_id = String::new();
            Some(Description { layout: LAYOUT, timeline, parent: 0, fork_revision: 0, reason, cluster_id, created })
        } else {
            match self.from.description(timeline).await {
                // What it says of the timeline's origin is lost; the backups are not.
                Err(error) if error.class() == Class::Corrupt => {
                    tracing::error!(%error, "the timeline is copied without it");
                    return Ok(());
                }
                described => described?,
            }
        };
        let is_taken = destination.timelines.get(&timeline).is_some_and(|there| there.times().next().is_some());
        match (described, there) {
            (Some(described), None) if timeline != PREDECESSOR || !is_taken => {
                self.to.put_description(&described).await
            }
            (described, there) if described == there || (there.is_none() && timeline != PREDECESSOR) => Ok(()),
            _ => Err(Error::precondition(format!(
                "store {} has another timeline {timeline} than {}: copy to another prefix",
                self.to.url(),
                self.from.url()
            ))),
        }
    }

    async fn timeline(&self, history: &History, destination: &Catalog, copied: &mut Copied) -> Result<()> {
        let fulls = history.fulls.iter().map(|full| (full.revision, 0, full.name(self.timeline), full.size));
        let deltas = history.deltas.iter().map(|delta| (delta.last, 1, delta.name(self.timeline), delta.size));
        let mut objects: Vec<_> = fulls.chain(deltas).collect();
        objects.sort_unstable_by_key(|(last, kind, ..)| (*last, *kind));
        let mut wanted = Vec::new();
        for (_, _, name, size) in objects {
            match self.find(&name, size, destination) {
                None => wanted.push((name, size)),
                Some(Ok(())) => copied.already_there += 1,
                Some(Err(error)) => copied.problems.push(error.to_string()),
            }
        }
        // Deltas are read ahead up to the next full: while that streams nobody would wait for them.
        let mut deltas = Vec::new();
        for (name, size) in wanted {
            if !name.is_full() {
                deltas.push((name, size));
                continue;
            }
            self.deltas(std::mem::take(&mut deltas), copied).await?;
            if let Some(full) = history.fulls.iter().find(|full| full.name(self.timeline) == name) {
                self.put(self.full(*full), copied).await?;
            }
        }
        self.deltas(deltas, copied).await
    }

    async fn deltas(&self, deltas: Vec<(ObjectName, u64)>, copied: &mut Copied) -> Result<()> {
        let ready = deltas.into_iter().map(|(name, size)| self.delta(name, size));
        let mut ready = std::pin::pin!(futures::stream::iter(ready).buffered(DELTAS_AHEAD));
        while let Some(next) = ready.next().await {
            let put = async {
                let (name, content) = next?;
                self.to.put_new(&name, &content).await?;
                Ok((name, content.iter().map(Bytes::len).sum::<usize>() as u64))
            };
            self.put(put, copied).await?;
        }
        Ok(())
    }

    /// Notes what became of an object.
    async fn put(&self, put: impl Future<Output = Result<(ObjectName, u64)>>, copied: &mut Copied) -> Result<()> {
        if self.stop.is_cancelled() {
            return Err(Error::Cancelled);
        }
        match put.await {
            Ok((name, size)) => {
                tracing::info!(object = %name, bytes = size, "copied");
                copied.copied += 1;
                copied.bytes += size;
                Ok(())
            }
            Err(error) if error.class() == Class::Corrupt => {
                tracing::error!(%error, "an object is not copied");
                copied.problems.push(error.to_string());
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the destination has it; an error when what is there cannot be it.
    fn find(&self, name: &ObjectName, size: u64, destination: &Catalog) -> Option<Result<()>> {
        let there = destination.timelines.get(&self.target())?;
        let (first, last) = name.revisions().unwrap_or_default();
        if self.converted().is_some() {
            // Sizes differ between layouts; an object has its name only when it is whole.
            let gardener = self.target() == PREDECESSOR;
            let same_time = |unix_ms: i64, other: i64| unix_ms == other || gardener && unix_ms / 1000 == other / 1000;
            let unix_ms = name.unix_ms();
            let found = if name.is_full() {
                there.fulls.iter().any(|full| full.revision >= last && same_time(full.unix_ms, unix_ms))
            } else {
                there.deltas.iter().any(|delta| (delta.first, delta.last) == (first, last))
            };
            return found.then_some(Ok(()));
        }
        let sizes = there.fulls.iter().map(|full| (full.name(self.timeline), full.size));
        let mut sizes = sizes.chain(there.deltas.iter().map(|delta| (delta.name(self.timeline), delta.size)));
        let (_, found) = sizes.find(|(other, _)| other == name)?;
        Some(if found == size {
            Ok(())
        } else {
            Err(Error::precondition(format!(
                "{}: it has {found} bytes, the one to copy has {size}: one of the two is damaged; look with `sidecar verify`, and delete the damaged one",
                self.to.location(name)
            )))
        })
    }

    async fn delta(&self, name: ObjectName, size: u64) -> Result<(ObjectName, Vec<Bytes>)> {
        if size == 0 {
            return Err(Error::corrupt(format!("{}: object is empty", self.from.location(&name))));
        }
        let meta = self.from.meta(&name, size).await?;
        let frames = if meta.is_some() { Some(self.from.frames(&name, size).await?) } else { None };
        let object = self.from.get_whole(&name, size).await?;
        let (location, converted, unix_ms) = (self.from.location(&name), self.converted(), name.unix_ms());
        let target = self.target();
        let made = tokio::task::spawn_blocking(move || {
            verify::check(meta.zip(frames), object.as_slice(), &name, &location, Level::Decode)?;
            let (first, last) = name.revisions().unwrap_or_default();
            match converted {
                None => Ok((name, vec![object.into()])),
                Some(Layout::GardenerV2) => {
                    let content = BufReader::new(container::Reader::new(object.as_slice(), &location)?);
                    let encoded = gardener::encode(&mut delta::Reader::new(content, &location))?;
                    if encoded.is_too_large_to_replay {
                        tracing::warn!(object = %name, "it has a revision that the predecessor's restore cannot replay");
                    }
                    Ok((Layout::GardenerV2.delta(target, first, last, unix_ms), vec![encoded.object]))
                }
                Some(Layout::Steward) => {
                    let content = rebuilt(&name, &object, &location, unix_ms)?;
                    Ok((Layout::Steward.delta(target, first, last, unix_ms), content))
                }
            }
        });
        made.await.map_err(|error| Error::task(&error))?
    }

    /// Streams a full snapshot. It gets its name only when everything of it was read and found whole.
    async fn full(&self, full: Full) -> Result<(ObjectName, u64)> {
        let name = full.name(self.timeline);
        let staging = ObjectName::Uploading {
            timeline: self.target(),
            unix_ms: Utc::now().timestamp_millis(),
            random: rand::random(),
        };
        let mut upload = self.to.upload(staging);
        let streamed = tokio::select! {
            streamed = self.stream(&full, &name, &mut upload) => streamed,
            () = self.stop.cancelled() => Err(Error::Cancelled),
        };
        let named = match streamed {
            Ok((revision, is_final)) => {
                let (target, unix_ms) = (self.target(), full.unix_ms);
                let name = self.converted().map_or(name, |layout| {
                    let name = layout.full(target, revision, unix_ms);
                    if is_final { name.marked_final() } else { name }
                });
                upload.finish(&name).await.map(|size| (name, size))
            }
            Err(error) => Err(error),
        };
        if named.is_err() {
            upload.abort().await;
        }
        named
    }

    /// Returns the revision that it has, and whether it is marked as the last of its cluster.
    async fn stream(&self, full: &Full, name: &ObjectName, upload: &mut Upload) -> Result<(i64, bool)> {
        if full.size == 0 {
            return Err(Error::corrupt(format!("{}: object is empty", self.from.location(name))));
        }
        let ours = match self.from.meta(name, full.size).await? {
            Some(meta) => Some((meta, self.from.frames(name, full.size).await?)),
            None => None,
        };
        let is_final = name.is_marked_final() || ours.as_ref().is_some_and(|(meta, _)| meta.is_final);
        let (feeder, mut pieces) = fetch(self.from.clone(), vec![(*name, full.size)], self.stop.clone());
        let (location, stop, object) = (self.from.location(name), self.stop.clone(), *name);
        let Some(layout) = self.converted() else {
            // Whoever checks gets the same bytes as the destination.
            let (to_check, mut checked) = mpsc::channel(2);
            let checking = tokio::task::spawn_blocking(move || {
                let source = Stoppable::new(PieceReader::new(&mut checked), &stop);
                verify::check(ours, source, &object, &location, Level::Decode)
            });
            while let Some(piece) = pieces.recv().await {
                let piece = piece?;
                if let Some(bytes) = &piece {
                    upload.write(bytes.clone()).await?;
                }
                if to_check.send(Ok(piece)).await.is_err() {
                    break;
                }
            }
            drop(to_check);
            feeder.abort();
            checking.await.map_err(|error| Error::task(&error))??;
            return Ok((full.revision, is_final));
        };
        let (compressed, mut compressed_out) = mpsc::channel(2);
        let started_unix_ms = full.unix_ms;
        let meta = ours.map(|(meta, _)| meta);
        let converting = tokio::task::spawn_blocking(move || {
            let source = Stoppable::new(PieceReader::new(&mut pieces), &stop);
            let content = Content::open(&object, source, &location)?;
            let theirs = || ObjectMeta { layout: LAYOUT, started_unix_ms, is_final, ..ObjectMeta::default() };
            let meta = meta.unwrap_or_else(theirs);
            convert(content, layout, &meta, &object, &location, &compressed)
        });
        while let Some(bytes) = compressed_out.recv().await {
            upload.write(bytes).await?;
        }
        feeder.abort();
        converting.await.map_err(|error| Error::task(&error))?.map(|revision| (revision, is_final))
    }
}

/// Compresses a full snapshot anew, and checks it; returns its revision.
fn convert(
    mut content: impl Read,
    layout: Layout,
    meta: &ObjectMeta,
    name: &ObjectName,
    location: &str,
    out: &mpsc::Sender<Bytes>,
) -> Result<i64> {
    let mut scan = SnapshotScan::new(name.revisions().map_or(0, |(_, last)| last));
    let mut writer = FullWriter::new(layout, meta)?;
    let mut buffer = vec![0; 128 << 10];
    loop {
        let read = content.read(&mut buffer);
        let read = read.map_err(|error| error.downcast().unwrap_or_else(Error::io("read", location)))?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        scan.push(bytes).map_err(Error::format(location))?;
        writer.write(bytes)?;
        if writer.ready() >= PIECE_BYTES && out.blocking_send(writer.take()).is_err() {
            return Err(Error::Cancelled);
        }
    }
    let scanned = scan.finish().map_err(Error::format(location))?;
    check_full_revision(name, location, scanned.revision)?;
    let trailer = ObjectMeta {
        first_revision: scanned.revision,
        last_revision: scanned.revision,
        compact_revision: scanned.compaction.revision(),
        auth_revision: scanned.auth_revision,
        content_bytes: scanned.bytes,
        ..ObjectMeta::default()
    };
    let _ = out.blocking_send(writer.finish(&trailer)?);
    Ok(scanned.revision)
}

/// A delta of the predecessor's as one of ours.
fn rebuilt(name: &ObjectName, object: &[u8], location: &str, unix_ms: i64) -> Result<Vec<Bytes>> {
    let (first, _) = name.revisions().unwrap_or_default();
    let mut builder = Builder::new(first - 1)?;
    let mut records = delta_in_memory(name, object, location)?;
    while let Some(record) = records.next()? {
        match record {
            Record::Revision { main, received_unix_ms } => builder.revision(main, received_unix_ms)?,
            Record::Put(value) => builder.put(&KeyValue::decode(value).map_err(Error::format(location))?)?,
            Record::Delete(key) => builder.delete(key)?,
            Record::End(_) => {}
        }
    }
    let leases = builder.leases().iter().map(|id| GrantedLease { id: *id, ttl: 0 }).collect();
    let end = DeltaEnd { leases, ..DeltaEnd::default() };
    builder.finish(end, ObjectMeta { started_unix_ms: unix_ms, ..ObjectMeta::default() })
}
