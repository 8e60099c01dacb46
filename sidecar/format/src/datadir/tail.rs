//! The database of a new member: a snapshot's pages as they are, the changes after it as rows at the tail, the small
//! buckets as the new cluster needs them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::path::PathBuf;

use proto::Message;
use proto::disk::Lease;

use super::disk::{Disk, DiskWriter};
use super::{Minor, Staged};
use crate::bolt::{Builder, Db, Finished, Meta};
use crate::membership::{CLUSTER_BUCKET, MEMBERS_BUCKET, MEMBERS_REMOVED_BUCKET, NewCluster};
use crate::mvcc::{
    self, ALARM_BUCKET, ALL_BUCKETS, CONF_STATE, CONSISTENT_INDEX, Compaction, FINISHED_COMPACT, Fingerprints,
    KEY_BUCKET, KeyValue, LEASE_BUCKET, LeaseTracker, META_BUCKET, RowKey, SCHEDULED_COMPACT, STORAGE_VERSION, TERM,
};
use crate::{Error, ReadAt, Result};

/// Granted to a lease that a live key refers to and that nothing else is known of: long enough for its owner to come back
/// and renew it, short enough to go when it does not.
const UNKNOWN_LEASE_TTL: i64 = 60;
/// Granted to a lease that a key of the snapshot refers to and that had no record there either: in the cluster it comes from
/// the key never expires, so ten years.
const ORPHANED_LEASE_TTL: i64 = 315_360_000;

/// Major and minor number, for comparison; 0 for what is not a number.
fn major_minor(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// What a restored member is to be.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The cluster that it belongs to.
    pub cluster: NewCluster,
    /// The minor that is to run on the data; that of the data when `None`.
    pub target: Option<Minor>,
    /// Compaction revision of the source at the end of the changes; 0 when unknown. etcd finishes that compaction when it
    /// starts.
    pub compact_revision: i64,
    /// Granted TTLs of leases, as far as they are known.
    pub lease_ttls: BTreeMap<i64, i64>,
    /// Leases that exist at the end of the changes, whether or not a key refers to them.
    pub live_leases: BTreeSet<i64>,
    /// Raise the current revision by so much and mark all below compacted; 0 for not.
    pub bump_revision: i64,
}

/// One change of a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// An encoded [`KeyValue`].
    Put(&'a [u8]),
    /// A key.
    Delete(&'a [u8]),
}

/// Whether a revision is one to append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revision {
    /// It follows what is there: its changes are wanted.
    Next,
    /// It is there already: its changes are to be skipped.
    Known,
}

/// The database of a snapshot, on disk but for its first two pages.
#[derive(Debug)]
pub struct Base<D: Disk> {
    disk: D,
    path: PathBuf,
    file: File,
    head: Vec<u8>,
    meta: Meta,
}

impl<D: Disk> Base<D> {
    pub(super) fn new(disk: D, path: PathBuf, file: File, head: Vec<u8>, meta: Meta) -> Self {
        Self { disk, path, file, head, meta }
    }

    /// Opens the tree for appending.
    pub fn into_tail(self) -> Result<Tail<D>> {
        let read = self.file.try_clone().map_err(Error::io("open again", &self.path))?;
        let db = Db::open(HeadInMemory { head: self.head, size: self.meta.file_size(), file: read })?;
        let out = DiskWriter::new(&self.disk, self.file, self.meta.file_size())
            .map_err(Error::io("start writing", &self.path))?;
        let mut builder = Builder::append(&db, out)?;
        builder.resume(&db, KEY_BUCKET)?;
        let mut recorded = HashSet::new();
        if let Some(root) = db.bucket(LEASE_BUCKET)? {
            let mut cursor = db.cursor(&root);
            while let Some(row) = cursor.next()? {
                recorded.extend(lease_id(row.key));
            }
        }
        let revision = mvcc::current_revision(&db)?;
        Ok(Tail {
            disk: self.disk,
            path: self.path,
            compaction: Compaction::read(&db)?,
            base_revision: revision,
            revision,
            sub: 0,
            open: false,
            events: 0,
            row: Vec::new(),
            fingerprints: Fingerprints::default(),
            leases: LeaseTracker::new(recorded),
            db,
            builder,
        })
    }
}

fn lease_id(key: &[u8]) -> Option<i64> {
    key.try_into().ok().map(i64::from_be_bytes)
}

/// A file whose first bytes are still in memory.
#[derive(Debug)]
pub(super) struct HeadInMemory {
    head: Vec<u8>,
    size: u64,
    file: File,
}

impl HeadInMemory {
    pub(super) fn new(head: Vec<u8>, size: u64, file: File) -> Self {
        Self { head, size, file }
    }
}

impl ReadAt for HeadInMemory {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let head = self.head.len() as u64;
        if offset >= head {
            return self.file.read_exact_at(buf, offset);
        }
        let (in_head, after) = buf.split_at_mut(buf.len().min((head - offset) as usize));
        self.head.read_exact_at(in_head, offset)?;
        if after.is_empty() { Ok(()) } else { self.file.read_exact_at(after, head) }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

/// Takes the changes after the snapshot and writes them as rows.
#[derive(Debug)]
pub struct Tail<D: Disk> {
    disk: D,
    path: PathBuf,
    db: Db<HeadInMemory>,
    builder: Builder<DiskWriter>,
    compaction: Compaction,
    base_revision: i64,
    revision: i64,
    sub: i64,
    open: bool,
    events: u64,
    row: Vec<u8>,
    fingerprints: Fingerprints,
    leases: LeaseTracker,
}

/// What became of a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Last revision that was written; the current one unless [`Spec::bump_revision`] raises it.
    pub revision: i64,
    /// Last revision that the snapshot had.
    pub base_revision: i64,
    /// Changes appended after it.
    pub events: u64,
    /// How far the rows are compacted. The meta bucket may say more: etcd then finishes that compaction when it starts.
    pub compaction: Compaction,
    /// Leases for which a record was added.
    pub added_leases: BTreeSet<i64>,
    /// Of those, the ones whose TTL is not known.
    pub guessed_leases: BTreeSet<i64>,
    /// Size of the database in bytes.
    pub db_size: u64,
    /// The minor the data is for.
    pub minor: Minor,
}

impl<D: Disk> Tail<D> {
    /// Last revision written so far.
    pub fn last_revision(&self) -> i64 {
        self.revision
    }

    /// The minor of the snapshot's schema.
    pub fn schema(&self) -> Result<Minor> {
        Minor::of_schema(&self.db)
    }

    /// Begins a revision. One that is known already is to be skipped; one that does not follow is an [`Error::Gap`].
    pub fn revision(&mut self, main: i64) -> Result<Revision> {
        if main <= self.revision {
            self.open = false;
            return Ok(Revision::Known);
        }
        if main != self.revision.saturating_add(1) {
            return Err(Error::Gap { have: self.revision, next: main });
        }
        self.revision = main;
        self.sub = 0;
        self.open = true;
        Ok(Revision::Next)
    }

    /// Adds the next change of the revision begun.
    pub fn change(&mut self, change: Change<'_>) -> Result<()> {
        let main = self.revision;
        if !self.open {
            return Err(Error::invalid("a change was given outside of a revision"));
        }
        let key = RowKey { main, sub: self.sub, tombstone: matches!(change, Change::Delete(_)) };
        let (user_key, lease, value) = match change {
            Change::Put(value) => {
                let kv = KeyValue::decode(value)?;
                if kv.mod_revision != main || kv.key.is_empty() {
                    return Err(Error::corrupt(
                        0,
                        format!("a put of revision {main} says that it is of revision {}", kv.mod_revision),
                    ));
                }
                (kv.key, kv.lease, value)
            }
            Change::Delete([]) => return Err(Error::corrupt(0, format!("a delete of revision {main} has no key"))),
            Change::Delete(user_key) => {
                self.row.clear();
                KeyValue { key: user_key, ..KeyValue::default() }.encode(&mut self.row);
                (user_key, 0, self.row.as_slice())
            }
        };
        self.leases.observe(self.fingerprints.of(user_key), lease);
        self.builder.push(&key.encode(), value)?;
        self.sub += 1;
        self.events += 1;
        Ok(())
    }

    /// Writes what the changes brought beside rows, and leaves the rest as the snapshot had it: a snapshot of a later
    /// revision.
    pub fn finish_as_snapshot(
        mut self,
        lease_ttls: &BTreeMap<i64, i64>,
        live_leases: &BTreeSet<i64>,
    ) -> Result<Restored> {
        let minor = self.schema()?;
        let leases = self.write_leases(lease_ttls, live_leases)?;
        self.write_out(minor, leases)
    }

    /// Writes the small buckets as the new cluster needs them, the root, and the metas.
    pub fn finish(mut self, spec: &Spec) -> Result<Restored> {
        let minor = spec.target.map_or_else(|| self.schema(), Ok)?;
        let leases = self.write_leases(&spec.lease_ttls, &spec.live_leases)?;
        self.write_meta(spec, minor)?;
        self.write_members(spec, minor)?;
        self.builder.start(ALARM_BUCKET)?;
        for name in ALL_BUCKETS {
            if ![
                KEY_BUCKET,
                LEASE_BUCKET,
                META_BUCKET,
                MEMBERS_BUCKET,
                MEMBERS_REMOVED_BUCKET,
                CLUSTER_BUCKET,
                ALARM_BUCKET,
            ]
            .contains(&name)
                && self.db.bucket(name)?.is_none()
            {
                self.builder.start(name)?;
            }
        }
        self.write_out(minor, leases)
    }

    fn write_out(self, minor: Minor, leases: (BTreeSet<i64>, BTreeSet<i64>)) -> Result<Restored> {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        let file = self.db.source().file.try_clone().map_err(Error::io("open again", &path))?;
        let (restored, finished) = self.write_pages(minor, leases)?;
        disk.write_at(&file, &finished.metas().concat(), 0).map_err(Error::io("write", &path))?;
        Ok(restored)
    }

    /// Writes all pages but the metas.
    pub(super) fn write_pages(
        self,
        minor: Minor,
        (added_leases, guessed_leases): (BTreeSet<i64>, BTreeSet<i64>),
    ) -> Result<(Restored, Finished)> {
        let (finished, out) = self.builder.finish()?;
        out.into_file().map_err(Error::io("write", &self.path))?;
        let restored = Restored {
            revision: self.revision,
            base_revision: self.base_revision,
            events: self.events,
            compaction: self.compaction,
            added_leases,
            guessed_leases,
            db_size: finished.file_size(),
            minor,
        };
        Ok((restored, finished))
    }

    pub(super) fn db(&self) -> &Db<HeadInMemory> {
        &self.db
    }

    pub(super) fn disk(&self) -> &D {
        &self.disk
    }

    /// Every lease a live key refers to gets a record: without one, a put with `ignore_lease` on such a key panics etcd.
    pub(super) fn write_leases(
        &mut self,
        ttls: &BTreeMap<i64, i64>,
        live: &BTreeSet<i64>,
    ) -> Result<(BTreeSet<i64>, BTreeSet<i64>)> {
        let missing = self.leases.missing();
        let unrecorded = live.iter().copied().filter(|id| !self.leases.is_recorded(*id));
        let ttl = |id| ttls.get(&id).copied().unwrap_or(0);
        let added: BTreeMap<i64, i64> = missing.into_iter().chain(unrecorded).map(|id| (id, ttl(id))).collect();
        let guessed = added.iter().filter(|(_, ttl)| **ttl <= 0).map(|(id, _)| *id).collect();
        push_leases(&mut self.builder, &self.db, &added, ttls)?;
        Ok((added.into_keys().collect(), guessed))
    }

    fn write_meta(&mut self, spec: &Spec, minor: Minor) -> Result<()> {
        let mut meta: BTreeMap<Vec<u8>, Vec<u8>> = self.db.rows(META_BUCKET)?.into_iter().collect();
        let members = spec.cluster.members();
        meta.insert(CONSISTENT_INDEX.into(), (members.len() as u64).to_be_bytes().into());
        if minor >= Minor::V3_5 {
            meta.insert(TERM.into(), 1u64.to_be_bytes().into());
            let voters: Vec<u64> = members.iter().map(|member| member.id.0).collect();
            let conf_state = serde_json::json!({ "voters": voters, "auto_leave": false });
            meta.insert(CONF_STATE.into(), conf_state.to_string().into());
        } else {
            meta.remove(TERM);
            meta.remove(CONF_STATE);
        }
        // A newer minor migrates the schema by itself; an older one refuses a storage version above its own.
        match meta.get(STORAGE_VERSION) {
            Some(_) if minor <= Minor::V3_5 => drop(meta.remove(STORAGE_VERSION)),
            Some(version) if Minor::parse(&String::from_utf8_lossy(version))? > minor => {
                meta.insert(STORAGE_VERSION.into(), format!("{minor}.0").into());
            }
            _ => {}
        }
        let scheduled = spec.compact_revision.min(self.revision).max(self.compaction.scheduled);
        if scheduled > self.compaction.scheduled {
            meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(scheduled).to_vec());
        }
        if spec.bump_revision > 0 {
            let bumped = self.revision.checked_add(spec.bump_revision);
            let bumped = bumped.ok_or_else(|| {
                Error::invalid(format!("revision {} cannot be raised by {}", self.revision, spec.bump_revision))
            })?;
            // Old releases raise the current revision to the finished compaction only, so both are set.
            meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(bumped).to_vec());
            meta.insert(FINISHED_COMPACT.into(), RowKey::first_of(bumped).to_vec());
        }
        self.put_bucket(META_BUCKET, &meta)
    }

    fn write_members(&mut self, spec: &Spec, minor: Minor) -> Result<()> {
        let members = spec
            .cluster
            .members()
            .iter()
            .map(|member| (member.id.to_string().into_bytes(), member.to_json().into_bytes()));
        self.put_bucket(MEMBERS_BUCKET, &members.collect())?;
        self.put_bucket(MEMBERS_REMOVED_BUCKET, &BTreeMap::new())?;
        let mut cluster: BTreeMap<Vec<u8>, Vec<u8>> = self.db.rows(CLUSTER_BUCKET)?.into_iter().collect();
        // A downgrade under way in the old cluster would stop 3.5 from starting.
        cluster.remove(b"downgrade".as_slice());
        // Also a version below all that are supported: etcd writes 3.0.0 until every member has reported.
        let version =
            cluster.get(b"clusterVersion".as_slice()).map(|version| major_minor(&String::from_utf8_lossy(version)));
        if version.is_some_and(|version| version > major_minor(minor.as_str())) {
            cluster.clear();
        }
        self.put_bucket(CLUSTER_BUCKET, &cluster)
    }

    pub(super) fn put_bucket(&mut self, name: &[u8], rows: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<()> {
        self.builder.start(name)?;
        rows.iter().try_for_each(|(key, value)| self.builder.push(key, value))
    }
}

fn lease_record(id: i64, ttl: i64) -> Vec<u8> {
    let ttl = if ttl > 0 { ttl } else { UNKNOWN_LEASE_TTL };
    Lease { id: Some(id), ttl: Some(ttl), remaining_ttl: None }.encode_to_vec()
}

/// Writes the lease bucket anew: the records that `db` has, and those `added`. Where `known` has another TTL than a record,
/// the id was revoked and granted anew.
fn push_leases<W: io::Write, R: ReadAt>(
    builder: &mut Builder<W>,
    db: &Db<R>,
    added: &BTreeMap<i64, i64>,
    known: &BTreeMap<i64, i64>,
) -> Result<()> {
    builder.start(LEASE_BUCKET)?;
    // Keys are the ids as unsigned big-endian numbers.
    let mut more = added.iter().map(|(id, ttl)| (*id as u64, *ttl)).collect::<BTreeMap<_, _>>().into_iter().peekable();
    if let Some(root) = db.bucket(LEASE_BUCKET)? {
        let mut cursor = db.cursor(&root);
        while let Some(row) = cursor.next()? {
            while let Some((id, ttl)) = more.next_if(|(id, _)| id.to_be_bytes().as_slice() < row.key) {
                builder.push(&id.to_be_bytes(), &lease_record(id as i64, ttl))?;
            }
            let ttl = lease_id(row.key).and_then(|id| Some((id, *known.get(&id).filter(|ttl| **ttl > 0)?)));
            match ttl.filter(|(_, ttl)| Lease::decode(row.value).is_ok_and(|lease| lease.ttl() != *ttl)) {
                Some((id, ttl)) => builder.push(row.key, &lease_record(id, ttl))?,
                None => builder.push(row.key, row.value)?,
            }
        }
    }
    for (id, ttl) in more {
        builder.push(&id.to_be_bytes(), &lease_record(id as i64, ttl))?;
    }
    Ok(())
}

impl<D: Disk> Staged<D> {
    /// Adds records of leases to the finished database and returns its new size.
    ///
    /// For leases that only keys of the snapshot refer to: that they lack a record shows when every row has been read.
    pub fn add_orphaned_leases(&self, leases: &BTreeSet<i64>) -> Result<u64> {
        let leases = leases.iter().map(|id| (*id, ORPHANED_LEASE_TTL)).collect();
        let path = self.layout().db();
        let open = |write| File::options().read(true).write(write).open(&path).map_err(Error::io("open", &path));
        let db = Db::open(open(false)?)?;
        let out = DiskWriter::new(&self.disk, open(true)?, db.meta().file_size());
        let mut builder = Builder::append(&db, out.map_err(Error::io("start writing", &path))?)?;
        push_leases(&mut builder, &db, &leases, &BTreeMap::new())?;
        let (finished, out) = builder.finish()?;
        let file = out.into_file().map_err(Error::io("write", &path))?;
        self.disk.write_at(&file, &finished.metas().concat(), 0).map_err(Error::io("write", &path))?;
        Ok(finished.file_size())
    }
}
