//! Whether backups are what they say: from a look at their names to a replay of everything.
//!
//! Memory is bounded by the size of a frame; only a replay needs disk, as much as the database.

mod journal;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use etcd_format::SnapshotScan;
use etcd_format::mvcc::KeyValue;
use proto::backup::ObjectMeta;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, Chain, History, ObjectName, PREDECESSOR, Timeline};
use crate::container::CheckedReader;
use crate::delta::Record;
use crate::object::{Content, Records, check_full_revision};
use crate::restore::{self, PieceReader, Stoppable};
use crate::store::Store;
use crate::{Class, Error, Result};

pub use journal::Journal;

/// How thoroughly to look. Each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Names alone: that the latest state can be restored.
    Names,
    /// Every byte: frames, checksums, seek tables, metadata; and that each object is of the cluster that its timeline is of.
    Bytes,
    /// Every record: snapshots are whole and of the revision they are named after, deltas hold every revision in order.
    Decode,
    /// Every chain is restored into a temporary directory, checked, and its HashKV compared with every one recorded.
    Replay,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// URL of the object, or of the timeline.
    pub at: String,
    /// What is wrong.
    pub what: String,
    /// Whether it is a gap rather than damage.
    pub is_gap: bool,
}

/// A chain that was replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// Its timeline.
    pub timeline: Timeline,
    /// The snapshot it starts from.
    pub full_revision: i64,
    /// The last revision it reached.
    pub revision: i64,
    /// Revisions whose HashKV was found to be what etcd had answered.
    pub hashes: Vec<i64>,
}

/// What was looked at and found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// How thoroughly.
    pub level: Level,
    /// Objects looked at.
    pub objects: u64,
    /// Of those, what an earlier run had found whole.
    pub known: u64,
    /// Their bytes, as far as they were read.
    pub bytes: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What is worth knowing.
    pub remarks: Vec<String>,
    /// Chains that were replayed.
    pub replayed: Vec<Replayed>,
}

impl Report {
    /// What the worst of the problems means to a caller; `None` when all is well.
    pub fn class(&self) -> Option<Class> {
        let damaged = self.problems.iter().any(|problem| !problem.is_gap);
        let class = if damaged { Class::Corrupt } else { Class::Missing };
        (!self.problems.is_empty()).then_some(class)
    }
}

/// What to look at, and how.
#[derive(Debug, Clone, Copy)]
pub struct Look<'l> {
    /// This timeline alone.
    pub timeline: Option<Timeline>,
    /// How thoroughly.
    pub level: Level,
    /// Where a replay restores to.
    pub work_dir: &'l Path,
}

/// Looks at everything in a store, or at one timeline. Damage is in the report; an error means that it could not look.
#[tracing::instrument(skip_all)]
pub async fn verify(store: &Store, look: Look<'_>, journal: &mut Journal, stop: &CancellationToken) -> Result<Report> {
    let Look { timeline, level, work_dir } = look;
    let catalog = store.catalog().await?;
    let (problems, remarks, replayed) = (Vec::new(), Vec::new(), Vec::new());
    let mut report = Report { level, objects: 0, known: 0, bytes: 0, problems, remarks, replayed };
    if let Some(wanted) = timeline.filter(|wanted| !catalog.timelines.contains_key(wanted)) {
        return Err(Error::missing(format!("store {} has no timeline {wanted}", store.url())));
    }
    let looked_at = || catalog.timelines.iter().filter(|(number, _)| timeline.is_none_or(|wanted| wanted == **number));
    names(store, &catalog, looked_at(), &mut report);
    for (timeline, history) in looked_at() {
        let fulls = history.fulls.iter().map(|full| (full.name(*timeline), full.size));
        let objects: Vec<_> =
            fulls.chain(history.deltas.iter().map(|delta| (delta.name(*timeline), delta.size))).collect();
        report.objects += objects.len() as u64;
        if level >= Level::Bytes {
            let cluster_id = match store.cluster_of(*timeline).await {
                Err(error) if error.class() == Class::Corrupt => {
                    let at = store.location(&ObjectName::Timeline { timeline: *timeline });
                    report.problems.push(Problem { at, what: error.to_string(), is_gap: false });
                    None
                }
                cluster_id => cluster_id?,
            };
            contents(store, objects, cluster_id, level, stop, journal, &mut report).await?;
        }
    }
    if level == Level::Replay {
        for (timeline, history) in looked_at() {
            for full in &history.fulls {
                let chain = chain_alone(history, history.chain_from(*full));
                let (url, last) = (store.location(&full.name(*timeline)), chain.last);
                if journal.has_chain(&url, last) {
                    continue;
                }
                let before = report.problems.len();
                replay(store, *timeline, chain, work_dir, stop, &mut report).await?;
                if report.problems.len() == before {
                    journal.add_chain(&url, last)?;
                }
            }
        }
    }
    Ok(report)
}

/// A chain up to the next full snapshot, from where another one starts; the last goes to its end.
fn chain_alone(history: &History, chain: Chain) -> Chain {
    let next = history.fulls.iter().map(|full| full.revision).find(|revision| *revision > chain.full.revision);
    match next.filter(|next| chain.last >= *next) {
        Some(next) => chain.upto(next),
        None => chain,
    }
}

fn names<'c>(
    store: &Store,
    catalog: &Catalog,
    timelines: impl Iterator<Item = (&'c Timeline, &'c History)>,
    report: &mut Report,
) {
    if catalog.newest_restorable().is_none() {
        let what = "there is no full snapshot: nothing can be restored".to_owned();
        report.problems.push(Problem { at: store.url().to_owned(), what, is_gap: true });
    }
    for (timeline, history) in timelines {
        let place = if *timeline == PREDECESSOR { String::new() } else { format!("t{timeline:08}/") };
        let at = store.location(&place);
        let unreachable = history.newest_chain().and_then(|chain| chain.gap);
        for gap in history.gaps() {
            let mut what = format!("revisions {} to {} are in no object", gap.after + 1, gap.before - 1);
            // One that a later full snapshot spans costs points in time, not the latest state.
            if unreachable == Some(gap) {
                what.push_str(", and no full snapshot after them");
                report.problems.push(Problem { at: at.clone(), what, is_gap: true });
            } else {
                report.remarks.push(format!("{at}: {what}: none of them can be restored"));
            }
        }
    }
}

/// Reads objects to their ends.
async fn contents(
    store: &Store,
    objects: Vec<(ObjectName, u64)>,
    cluster_id: Option<u64>,
    level: Level,
    stop: &CancellationToken,
    journal: &mut Journal,
    report: &mut Report,
) -> Result<()> {
    for (name, size) in objects {
        if stop.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let at = store.location(&name);
        if journal.has_object(level, &at, size) {
            report.known += 1;
            continue;
        }
        report.bytes += size;
        let found = match content(store, name, size, level, stop).await {
            Ok(Some(meta)) => is_of_timeline(&meta, cluster_id, &at),
            found => found.map(|_| ()),
        };
        match found {
            Ok(()) => journal.add_object(level, &at, size)?,
            Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
                report.problems.push(Problem { at, what: error.to_string(), is_gap: false });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A delta in another cluster's timeline is whole, and no restore takes it.
fn is_of_timeline(meta: &ObjectMeta, cluster_id: Option<u64>, at: &str) -> Result<()> {
    match cluster_id.filter(|_| meta.cluster_id != 0) {
        Some(cluster_id) if cluster_id != meta.cluster_id => Err(Error::corrupt(format!(
            "{at}: it is of cluster {:x}, its timeline of cluster {cluster_id:x}: it was put into another's store",
            meta.cluster_id
        ))),
        _ => Ok(()),
    }
}

/// Reads one object to its end, at least every byte of it. Returns its metadata, where it has any.
pub(crate) async fn content(
    store: &Store,
    name: ObjectName,
    size: u64,
    level: Level,
    stop: &CancellationToken,
) -> Result<Option<ObjectMeta>> {
    let location = store.location(&name);
    if size == 0 {
        return Err(Error::corrupt(format!("{location}: object is empty")));
    }
    let ours = match store.meta(&name, size).await? {
        Some(meta) => Some((meta, store.frames(&name, size).await?)),
        None => None,
    };
    let (feeder, mut received) = restore::fetch(store.clone(), vec![(name, size)], stop.clone());
    let (stop, meta) = (stop.clone(), ours.as_ref().map(|(meta, _)| meta.clone()));
    let checked = tokio::task::spawn_blocking(move || {
        check(ours, Stoppable::new(PieceReader::new(&mut received), &stop), &name, &location, level)
    });
    let checked = checked.await.map_err(|error| Error::task(&error))?;
    feeder.abort();
    checked.map(|()| meta)
}

/// Reads an object to its end. `ours` are metadata and frames of one of ours.
pub(crate) fn check(
    ours: Option<(ObjectMeta, Vec<(u32, u32)>)>,
    source: impl Read,
    name: &ObjectName,
    location: &str,
    level: Level,
) -> Result<()> {
    let Some((meta, frames)) = ours else {
        // The predecessor's have no checksums but the one at the end of their content.
        return records(&mut BufReader::new(Content::open(name, source, location)?), name, location);
    };
    let mut reader = CheckedReader::new(source, location, frames)?;
    let found = if level < Level::Decode {
        reader.check_all()?
    } else {
        records(&mut reader, name, location)?;
        reader.content_bytes()
    };
    let said = meta.content_bytes;
    if said != found {
        return Err(Error::corrupt(format!("{location}: it has {found} bytes of content, its metadata says {said}")));
    }
    Ok(())
}

/// Reads an object's content to its end and compares it with its name.
fn records(reader: &mut impl BufRead, name: &ObjectName, location: &str) -> Result<()> {
    if name.is_full() { full(reader, name, location) } else { delta(reader, name, location) }
}

fn drain(reader: &mut impl BufRead, name: &str, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    loop {
        let bytes = reader.fill_buf().map_err(|error| error.downcast().unwrap_or_else(Error::io("read", name)))?;
        if bytes.is_empty() {
            return Ok(());
        }
        take(bytes)?;
        let length = bytes.len();
        reader.consume(length);
    }
}

fn full(reader: &mut impl BufRead, name: &ObjectName, location: &str) -> Result<()> {
    let mut scan = SnapshotScan::new(name.revisions().map_or(0, |(_, last)| last));
    drain(reader, location, &mut |bytes| scan.push(bytes).map_err(Error::format(location)))?;
    check_full_revision(name, location, scan.finish().map_err(Error::format(location))?.revision)
}

fn delta(reader: &mut impl BufRead, object: &ObjectName, name: &str) -> Result<()> {
    let mut records = Records::new(object, reader, name);
    let (first, last) = object.revisions().unwrap_or_default();
    let mut at = first - 1;
    while let Some(record) = records.next()? {
        match record {
            Record::Revision { main, .. } if Some(main) == at.checked_add(1) => at = main,
            Record::Revision { main, .. } => {
                return Err(Error::corrupt(format!("{name}: revision {main} follows revision {at}")));
            }
            Record::Put(value) => {
                let kv = KeyValue::decode(value).map_err(Error::format(name))?;
                if kv.mod_revision != at || kv.key.is_empty() {
                    return Err(Error::corrupt(format!(
                        "{name}: a put of revision {at} says that it is of revision {}",
                        kv.mod_revision
                    )));
                }
            }
            Record::Delete([]) => {
                return Err(Error::corrupt(format!("{name}: a delete of revision {at} has no key")));
            }
            Record::Delete(_) | Record::End(_) => {}
        }
    }
    if at != last {
        return Err(Error::corrupt(format!("{name}: it is named up to revision {last}, its content ends at {at}")));
    }
    Ok(())
}

/// Restores a chain into a temporary directory and compares every HashKV that was recorded along it.
async fn replay(
    store: &Store,
    timeline: Timeline,
    chain: Chain,
    work_dir: &Path,
    stop: &CancellationToken,
    report: &mut Report,
) -> Result<()> {
    let at = store.location(&chain.full.name(timeline));
    let full_revision = chain.full.revision;
    match restore::replay(store, timeline, chain, work_dir, None, stop).await {
        Ok((revision, hashes)) => report.replayed.push(Replayed { timeline, full_revision, revision, hashes }),
        Err(error) if matches!(error.class(), Class::Corrupt | Class::Missing) => {
            report.problems.push(Problem { at, what: error.to_string(), is_gap: false });
        }
        Err(error) => return Err(error),
    }
    Ok(())
}
