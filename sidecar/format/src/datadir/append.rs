//! An intact member that is merely behind: what it misses is appended to its database, and everything else stays.
//!
//! bbolt never overwrites a page that is in use, and neither does this: rows go behind the end of what the meta in force
//! knows, and a new meta in the other slot makes all of them valid at once. A crash before that leaves the member as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::tail::HeadInMemory;
use super::{Base, Layout, Restored, Severity, Summary, Tail, Verify, WantHash, verify_database};
use crate::bolt::{Db, Meta};
use crate::mvcc::{
    self, CONSISTENT_INDEX, Compaction, HashRequest, HashedKv, KEY_BUCKET, META_BUCKET, RowKey, SCHEDULED_COMPACT, TERM,
};
use crate::{Error, Result, wal};

/// A member that may be appended to. While it is held no etcd starts on it.
#[derive(Debug)]
pub struct Behind<D: Disk> {
    disk: D,
    path: PathBuf,
    file: File,
    facts: Facts,
}

/// What is known of a member that is behind.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its cluster.
    pub cluster_id: u64,
    /// Current revision of its database.
    pub revision: i64,
    /// How far it is compacted.
    pub compaction: Compaction,
    /// Its auth revision.
    pub auth_revision: u64,
    /// Revisions that its log may add to those of the database when etcd starts.
    pub unapplied: u64,
    /// Up to where each key has one row only.
    pub clean_up_to: i64,
    /// Raft index and term that its database has applied.
    pub applied: (u64, u64),
    /// Index and term of the last entry of its log.
    last_entry: (u64, u64),
    /// The segment that has it.
    last_segment: PathBuf,
}

/// The changes of some revisions of the member in a data directory, in order: revision, whether it is a put, and the row's value
/// or the key.
pub fn changes(data_dir: &Path, first: i64, last: i64, see: &mut dyn FnMut(i64, bool, &[u8])) -> Result<()> {
    let path = Layout::new(data_dir).db();
    let db = Db::open(File::open(&path).map_err(Error::io("open", &path))?)?;
    let Some(root) = db.bucket(KEY_BUCKET)? else { return Ok(()) };
    let mut cursor = db.cursor(&root);
    cursor.seek(&RowKey::first_of(first))?;
    while let Some(row) = cursor.next()? {
        let Some(key) = RowKey::decode(row.key).filter(|key| key.main <= last) else { break };
        if key.tombstone {
            see(key.main, false, mvcc::KeyValue::decode(row.value)?.key);
        } else {
            see(key.main, true, row.value);
        }
    }
    Ok(())
}

impl<D: Disk> Behind<D> {
    /// Looks whether the member in a data directory can be appended to: it is sound, the only one of its cluster, and its
    /// log has nothing that only etcd could apply. Otherwise an [`Error::Precondition`] that says what stands in the way.
    pub fn open(disk: D, data_dir: &Path) -> Result<Self> {
        use rustix::fs::{FlockOperation, flock};
        let refuse = |what: String| Error::precondition(format!("{}: {what}", data_dir.display()));
        if !data_dir.is_dir() {
            return Err(refuse("it is not a directory".into()));
        }
        let layout = Layout::new(data_dir);
        let path = layout.db();
        if !path.exists() {
            return Err(refuse("there is no member to append to".into()));
        }
        let file = File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(refuse("an etcd runs on this data directory; stop it first".into()));
            }
            Err(errno) => {
                return Err(refuse(format!(
                    "it cannot be locked against an etcd that starts ({errno}); restore it whole"
                )));
            }
        }
        let verdict = layout.verify(&Verify::default())?;
        if let Some(finding) = verdict.findings.iter().find(|finding| finding.severity == Severity::Corrupt) {
            return Err(refuse(format!("the member is damaged, so it must be restored whole: {}", finding.what)));
        }
        let log = wal::read(&layout.wal()).map_err(|damage| damage.error)?;
        let summary = verdict.summary.unwrap_or_default();
        let count = verdict.members.as_ref().map_or(0, |members| members.all().len());
        if count != 1 {
            return Err(refuse(format!("it is one of {count} members; the others bring it up to date when it starts")));
        }
        let (applied, last) = (summary.consistent_index, log.last_index());
        if log.other_changes > applied {
            return Err(refuse(
                "its log has changes of members, users or roles that its database lacks; start etcd on it first".into(),
            ));
        }
        let db = Db::open(file.try_clone().map_err(Error::io("open again", &path))?)?;
        let facts = Facts {
            cluster_id: log.metadata.cluster_id(),
            revision: summary.revision,
            compaction: Compaction::read(&db)?,
            auth_revision: summary.auth_revision,
            unapplied: last.saturating_sub(applied),
            clean_up_to: if summary.superseded_rows > 0 { 0 } else { Compaction::read(&db)?.finished },
            applied: (applied, log.term_at(applied).unwrap_or_else(|| log.state.term())),
            last_entry: (last.max(applied), log.term_at(last).unwrap_or_default()),
            last_segment: log.segments.last().map_or_else(|| layout.wal(), |name| layout.wal().join(name.to_string())),
        };
        Ok(Self { disk, path, file, facts })
    }

    /// What is known of it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    fn db(&self) -> Result<Db<File>> {
        Db::open(self.file.try_clone().map_err(Error::io("open again", &self.path))?)
    }

    /// HashKV of its rows.
    pub fn hash_kv(&self, request: HashRequest) -> Result<HashedKv> {
        mvcc::hash_kv(&self.db()?, request)
    }

    /// Opens it for appending.
    pub fn into_tail(self) -> Result<(Tail<D>, Held)> {
        let meta = *self.db()?.meta();
        let mut head = vec![0; 2 * meta.page_size as usize];
        self.file.read_exact_at(&mut head, 0).map_err(Error::io("read", &self.path))?;
        let lock = self.file.try_clone().map_err(Error::io("open again", &self.path))?;
        let length = lock.metadata().map_err(Error::io("measure", &self.path))?.len();
        let held = Held { file: lock, path: self.path.clone(), facts: self.facts, length, committed: false };
        Ok((Base::new(self.disk, self.path, self.file, head, meta).into_tail()?, held))
    }
}

/// Keeps a member from being started while it is appended to. Dropped without a commit, it gives back the room that was
/// taken; whatever still writes must be dropped before it.
#[derive(Debug)]
pub struct Held {
    file: File,
    path: PathBuf,
    facts: Facts,
    /// Length of the file before.
    length: u64,
    committed: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: what lies behind the last page that is in use harms nobody.
            let _ = self.file.set_len(self.length);
        }
    }
}

/// Rows that are written and not valid yet.
#[derive(Debug)]
pub struct Appended<D: Disk> {
    disk: D,
    held: Held,
    meta: Meta,
    restored: Restored,
}

impl<D: Disk> Tail<D> {
    /// Writes what the changes brought, and has the database say that it has everything in its log.
    pub fn finish_behind(
        mut self,
        held: Held,
        compact_revision: i64,
        lease_ttls: &BTreeMap<i64, i64>,
        live_leases: &BTreeSet<i64>,
    ) -> Result<Appended<D>> {
        let minor = self.schema()?;
        let leases = self.write_leases(lease_ttls, live_leases)?;
        let (index, term) = held.facts.last_entry;
        let mut meta: BTreeMap<Vec<u8>, Vec<u8>> = self.db().rows(META_BUCKET)?.into_iter().collect();
        meta.insert(CONSISTENT_INDEX.into(), index.to_be_bytes().into());
        if term > 0 && meta.contains_key(TERM) {
            meta.insert(TERM.into(), term.to_be_bytes().into());
        }
        let scheduled = compact_revision.min(self.last_revision());
        if scheduled > held.facts.compaction.revision() {
            meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(scheduled).to_vec());
        }
        self.put_bucket(META_BUCKET, &meta)?;
        let disk = self.disk().clone();
        let (restored, finished) = self.write_pages(minor, leases)?;
        Ok(Appended { disk, held, meta: finished.next_meta(), restored })
    }
}

impl<D: Disk> Appended<D> {
    /// Checks the database as it will be. Fails when anything is wrong with it.
    pub fn check(&self, hash: Option<WantHash>) -> Result<Summary> {
        let page_size = self.meta.page_size as usize;
        let mut head = vec![0; 2 * page_size];
        self.held.file.read_exact_at(&mut head, 0).map_err(Error::io("read", &self.held.path))?;
        let slot = (self.meta.txid % 2) as usize;
        let page = self.meta.encode(slot as u64);
        head.splice(slot * page_size..(slot + 1) * page_size, page);
        let file = self.held.file.try_clone().map_err(Error::io("open again", &self.held.path))?;
        let db = Db::open(HeadInMemory::new(head, self.meta.file_size(), file))?;
        // Rows are as compacted as they were, whatever compaction etcd is to finish when it starts.
        let options = Verify { hash, compaction: Some(self.held.facts.compaction) };
        let (summary, findings) = verify_database(&db, &options)?;
        match findings.into_iter().find(|finding| finding.severity == Severity::Corrupt) {
            None => Ok(summary),
            Some(finding) => Err(Error::corrupt(finding.offset.unwrap_or_default(), finding.what)),
        }
    }

    /// Makes it so. After an error the member is what it was.
    pub fn commit(mut self) -> Result<Restored> {
        let path = &self.held.path;
        let slot = self.meta.txid % 2;
        // The database is to say that it has what the log ends with: that must not be lost after it.
        let segment = &self.held.facts.last_segment;
        let log = File::open(segment).map_err(Error::io("open", segment))?;
        self.disk.sync_file(&log).map_err(Error::io("sync", segment))?;
        let log_dir = segment.parent().unwrap_or(segment);
        self.disk.sync_dir(log_dir).map_err(Error::io("sync", log_dir))?;
        self.disk.sync_file(&self.held.file).map_err(Error::io("sync", path))?;
        let page = self.meta.encode(slot);
        let at = slot * u64::from(self.meta.page_size);
        let mut before = vec![0; page.len()];
        self.held.file.read_exact_at(&mut before, at).map_err(Error::io("read", path))?;
        let written =
            self.disk.write_at(&self.held.file, &page, at).and_then(|()| self.disk.sync_file(&self.held.file));
        if let Err(error) = written {
            // Whether it is on the disk is not known: the old meta is put back, best effort.
            let _ = self.disk.write_at(&self.held.file, &before, at);
            let restored = self.disk.sync_file(&self.held.file);
            // Where even that is not known to have worked, the new pages must stay.
            self.held.committed = restored.is_err();
            return Err(Error::io("write the meta page of", &self.held.path)(error));
        }
        self.held.committed = true;
        Ok(self.restored)
    }
}
