//! Making a data directory out of a snapshot and the changes after it.
//!
//! The order of calls is in the types: [`Staged::create`] → [`Staged::write_base`] → [`Staged::append_to`] → changes →
//! [`Tail::finish`] → [`Staged::write_log`] → (verify) → [`Staged::commit`]. A `Staged` that is dropped before its commit
//! leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use proto::Message;
use proto::disk::{HardState, Lease, Metadata};
use sha2::{Digest, Sha256};

use super::Layout;
use super::disk::{Disk, DiskWriter};
use crate::bolt::{Builder, Db, MAX_PAGE_SIZE, Meta};
use crate::membership::{CLUSTER_BUCKET, MEMBERS_BUCKET, MEMBERS_REMOVED_BUCKET, NewCluster};
use crate::mvcc::{
    self, ALARM_BUCKET, ALL_BUCKETS, CONF_STATE, CONSISTENT_INDEX, Compaction, FINISHED_COMPACT, Fingerprints,
    KEY_BUCKET, KeyValue, LEASE_BUCKET, LeaseTracker, META_BUCKET, RowKey, SCHEDULED_COMPACT, STORAGE_VERSION, TERM,
};
use crate::snap::{self, SnapName};
use crate::wal::{self, SegmentName};
use crate::{Error, ReadAt, Result};

/// Size of the sha256 that etcd appends to a snapshot.
const HASH_SIZE: u64 = 32;
/// Granted to a lease that a live key refers to and that nothing else is known of: long enough for its owner to come back
/// and renew it, short enough to go when it does not.
const UNKNOWN_LEASE_TTL: i64 = 60;
const RESTORING: &str = "member.restoring";
/// Lies in a staged member until it is whole. Without it, what is staged is a member that was replaced and not moved on yet.
const UNFINISHED: &str = "unfinished";

/// A minor version of etcd whose data this code knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Minor {
    /// 3.4
    V3_4,
    /// 3.5
    V3_5,
    /// 3.6
    V3_6,
    /// 3.7
    V3_7,
}

impl Minor {
    /// All, oldest first.
    pub const ALL: [Self; 4] = [Self::V3_4, Self::V3_5, Self::V3_6, Self::V3_7];

    /// Parses `3.6` as well as `3.6.16`.
    pub fn parse(version: &str) -> Result<Self> {
        let mut parts = version.trim_start_matches('v').split('.');
        let minor = (parts.next(), parts.next());
        Self::ALL.into_iter().find(|known| minor == (Some("3"), known.as_str().strip_prefix("3."))).ok_or_else(|| {
            Error::invalid(format!("etcd version {version:?} is not supported; supported are 3.4, 3.5, 3.6 and 3.7"))
        })
    }

    /// Such as `3.6`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V3_4 => "3.4",
            Self::V3_5 => "3.5",
            Self::V3_6 => "3.6",
            Self::V3_7 => "3.7",
        }
    }

    /// The oldest minor that has what this database has, by the keys of its meta bucket.
    pub fn of_schema<R: ReadAt>(db: &Db<R>) -> Result<Self> {
        if let Some(version) = db.get(META_BUCKET, STORAGE_VERSION)? {
            return Self::parse(&String::from_utf8_lossy(&version));
        }
        let since_3_5 = db.get(META_BUCKET, TERM)?.is_some() || db.get(META_BUCKET, CONF_STATE)?.is_some();
        Ok(if since_3_5 { Self::V3_5 } else { Self::V3_4 })
    }
}

impl std::fmt::Display for Minor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

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

/// A member directory that is being made beside its final place.
#[derive(Debug)]
pub struct Staged<'d, D: Disk + ?Sized> {
    disk: &'d D,
    data_dir: PathBuf,
    layout: Layout,
    /// Directories made for this restore, outermost first.
    made: Vec<PathBuf>,
    /// Whether what lies in the staging directory is ours to remove.
    owns_staging: bool,
    /// Held so that no two restores work on one directory.
    lock: Option<File>,
}

impl<'d, D: Disk + ?Sized> Staged<'d, D> {
    /// Prepares to fill `data_dir`. What an earlier restore left unfinished there is removed. A directory with anything
    /// else in it is refused, unless `replace`; its member then moves aside when this one is committed.
    pub fn create(disk: &'d D, data_dir: &Path, replace: bool) -> Result<Self> {
        let mut staged = Self {
            disk,
            data_dir: data_dir.to_owned(),
            layout: Layout::of_member(data_dir.join(RESTORING)),
            made: Vec::new(),
            owns_staging: false,
            lock: None,
        };
        staged.make_data_dir()?;
        staged.lock()?;
        staged.check_empty(replace)?;
        for dir in [staged.layout.member().to_owned(), staged.layout.snap(), staged.layout.wal()] {
            disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
            staged.owns_staging = true;
            if dir == staged.layout.member() {
                let mark = dir.join(UNFINISHED);
                disk.create_file(&mark).map_err(Error::io("create", &mark))?;
            }
        }
        Ok(staged)
    }

    fn make_data_dir(&mut self) -> Result<()> {
        let missing: Vec<_> = self
            .data_dir
            .ancestors()
            .take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists())
            .map(Path::to_owned)
            .collect();
        for dir in missing.into_iter().rev() {
            self.disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
            self.made.push(dir);
        }
        Ok(())
    }

    fn lock(&mut self) -> Result<()> {
        use rustix::fs::{FlockOperation, flock};
        let dir = &self.data_dir;
        let file = File::open(dir).map_err(Error::io("open", dir))?;
        // A file system without locks does not stop a restore.
        if flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(Error::precondition(format!("another restore works on {}; wait for it", dir.display())));
        }
        self.lock = Some(file);
        Ok(())
    }

    fn check_empty(&self, replace: bool) -> Result<()> {
        let dir = &self.data_dir;
        for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let name = entry.map_err(Error::io("list", dir))?.file_name();
            match name.to_str() {
                Some(RESTORING) => self.clear_staging(&dir.join(RESTORING))?,
                Some("lost+found") => {}
                Some(name) if name.starts_with("member.replaced-") => {}
                _ if replace => {}
                _ => {
                    return Err(Error::precondition(format!(
                        "data directory {} is not empty: it has {}; choose another, or move the old member aside with --replace",
                        dir.display(),
                        name.to_string_lossy()
                    )));
                }
            }
        }
        if replace { super::verify::check_not_in_use(&Layout::new(dir)) } else { Ok(()) }
    }

    /// Removes an unfinished restore; keeps a replaced member that a crash left under that name.
    fn clear_staging(&self, staging: &Path) -> Result<()> {
        if !staging.join(UNFINISHED).exists() && staging.join("snap/db").exists() {
            let free =
                (0..1000).map(|n| self.data_dir.join(format!("member.replaced-found-{n}"))).find(|path| !path.exists());
            let Some(aside) = free else { return Ok(()) };
            return self.disk.rename(staging, &aside).map_err(Error::io("move the replaced member to", &aside));
        }
        self.disk.remove_dir_all(staging).map_err(Error::io("remove the unfinished restore", staging))
    }

    /// Where the member is being made.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes the database of a snapshot from `source`, all but its first two pages, and checks its length and sha256.
    ///
    /// `source` gives etcd's snapshot: the database, then the sha256 of it. Without `require_hash` the sha256 may be
    /// missing, as in a copy of a stopped member's `db`. `progress` is told how many bytes were taken.
    pub fn write_base(
        &self,
        source: &mut dyn Read,
        require_hash: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Base<'d, D>> {
        let path = self.layout.db();
        let file = self.disk.create_file(&path).map_err(Error::io("create", &path))?;
        let head = read_head(source)?;
        let meta = newest_meta(&head)?;
        let head_size = 2 * u64::from(meta.page_size);
        if meta.file_size() < head_size {
            return Err(Error::corrupt(
                0,
                format!("snapshot claims to be {} bytes long, less than its two meta pages", meta.file_size()),
            ));
        }
        let mut out = DiskWriter::new(self.disk, file, head_size).map_err(Error::io("start writing", &path))?;
        let mut sha = Sha256::new();
        sha.update(&head);
        let mut left = meta.file_size() - head_size;
        let mut taken = head_size;
        // Hashing and writing have a thread of their own: decompressing is as much work as both.
        let (sha, out) = std::thread::scope(|scope| -> Result<_> {
            let (full, filled) = sync_channel::<Vec<u8>>(2);
            let (empty, emptied) = sync_channel::<Vec<u8>>(4);
            let path = &path;
            let writer = scope.spawn(move || -> Result<_> {
                while let Ok(buffer) = filled.recv() {
                    sha.update(&buffer);
                    io::Write::write_all(&mut out, &buffer).map_err(Error::io("write", path))?;
                    let _ = empty.try_send(buffer);
                }
                Ok((sha, out))
            });
            while left > 0 {
                let mut buffer = emptied.try_recv().unwrap_or_default();
                let want = left.min(1 << 20);
                buffer.resize(want as usize, 0);
                source.read_exact(&mut buffer).map_err(read_error(taken, left))?;
                left -= want;
                taken += want;
                progress(want);
                if full.send(buffer).is_err() {
                    break;
                }
            }
            drop(full);
            writer.join().unwrap_or_else(|_| Err(Error::invalid("the writing thread ended unexpectedly")))
        })?;
        let digest: [u8; 32] = sha.finalize().into();
        check_trailer(source, &digest, meta.file_size(), require_hash)?;
        let file = out.into_file().map_err(Error::io("write", &path))?;
        Ok(Base { disk: self.disk, path, file, head, meta })
    }

    /// Copies the finished database of another member of the same cluster.
    pub fn copy_database(&self, from: &Self) -> Result<()> {
        let (source, path) = (from.layout.db(), self.layout.db());
        let mut input = File::open(&source).map_err(Error::io("open", &source))?;
        let file = self.disk.create_file(&path).map_err(Error::io("create", &path))?;
        let mut out = DiskWriter::new(self.disk, file, 0).map_err(Error::io("start writing", &path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = input.read(&mut buffer).map_err(Error::io("read", &source))?;
            let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
            io::Write::write_all(&mut out, bytes).map_err(Error::io("write", &path))?;
        }
        out.into_file().map(drop).map_err(Error::io("write", &path))
    }

    /// Writes log and raft snapshot of the member `name` of `cluster`.
    pub fn write_log(&self, cluster: &NewCluster, name: &str) -> Result<()> {
        let member = cluster.member(name)?;
        let members = cluster.members();
        let count = members.len() as u64;
        let metadata = Metadata { node_id: Some(member.id.0), cluster_id: Some(cluster.id().0) };
        let vote = members.first().map(|member| member.id.0);
        let state = HardState { term: Some(1), vote, commit: Some(count) };
        let conf_state = cluster.conf_state();
        let segment = wal::first_segment(metadata, &cluster.conf_changes(), state, &conf_state);
        let snapshot = SnapName { term: 1, index: count };
        let files = [
            (self.layout.wal().join(SegmentName { seq: 0, index: 0 }.to_string()), segment),
            (self.layout.snap().join(snapshot.to_string()), snap::encode(members, &conf_state, snapshot)),
        ];
        for (path, bytes) in files {
            let file = self.disk.create_file(&path).map_err(Error::io("create", &path))?;
            self.disk.write_at(&file, &bytes, 0).map_err(Error::io("write", &path))?;
            self.disk.sync_file(&file).map_err(Error::io("sync", &path))?;
        }
        Ok(())
    }

    /// Makes the database durable. May run while it is being verified.
    pub fn sync_database(&self) -> Result<()> {
        let path = self.layout.db();
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        self.disk.sync_file(&file).map_err(Error::io("sync", &path))
    }

    /// Puts the member in its place and returns where the one before it went, if there was one. `stamp` makes that name
    /// unique, such as a time. [`Staged::sync_database`] must have been called.
    pub fn commit(mut self, stamp: &str) -> Result<Option<PathBuf>> {
        let mark = self.layout.member().join(UNFINISHED);
        self.disk.remove_file(&mark).map_err(Error::io("remove", &mark))?;
        for dir in [self.layout.snap(), self.layout.wal(), self.layout.member().to_owned(), self.data_dir.clone()] {
            self.disk.sync_dir(&dir).map_err(Error::io("sync", &dir))?;
        }
        for dir in &self.made {
            let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            self.disk.sync_dir(parent).map_err(Error::io("sync", parent))?;
        }
        let (from, to) = (self.layout.member().to_owned(), self.data_dir.join("member"));
        let mut replaced = None;
        if to.exists() {
            let aside = self.data_dir.join(format!("member.replaced-{stamp}"));
            if aside.exists() {
                return Err(Error::precondition(format!("{} exists already; move it away", aside.display())));
            }
            match self.disk.exchange(&from, &to) {
                Ok(()) => {
                    // From here on the restored member is in place and what `from` names is the old one: keep it.
                    self.owns_staging = false;
                    self.disk.rename(&from, &aside).map_err(Error::io("move the replaced member to", &aside))?;
                }
                // A file system that cannot swap names: for a moment there is no member, and both lie beside.
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                    self.disk.rename(&to, &aside).map_err(Error::io("move the replaced member to", &aside))?;
                    self.disk.rename(&from, &to).map_err(Error::io("move the restored member to", &to))?;
                    self.owns_staging = false;
                }
                Err(error) => return Err(Error::io("swap in the restored member at", &to)(error)),
            }
            replaced = Some(aside);
        } else {
            self.disk.rename(&from, &to).map_err(Error::io("move the restored member to", &to))?;
            self.owns_staging = false;
        }
        self.made.clear();
        self.disk.sync_dir(&self.data_dir).map_err(Error::io("sync", &self.data_dir))?;
        Ok(replaced)
    }
}

impl<D: Disk + ?Sized> Drop for Staged<'_, D> {
    fn drop(&mut self) {
        // Best effort: what cannot be removed now is removed by the next restore.
        if self.owns_staging {
            let _ = self.disk.remove_dir_all(self.layout.member());
        }
        for dir in self.made.iter().rev() {
            let _ = self.disk.remove_dir(dir);
        }
    }
}

/// What the source of a snapshot says passes through as [`Error::Io`]; only its early end is damage.
fn read_error(offset: u64, left: u64) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        if source.kind() == io::ErrorKind::UnexpectedEof && source.get_ref().is_none_or(|inner| !inner.is::<Error>()) {
            Error::corrupt(offset, format!("snapshot ends early: {left} more bytes were to come"))
        } else {
            Error::Io { op: "read", path: "snapshot".into(), source }
        }
    }
}

/// Reads both meta pages.
fn read_head(source: &mut dyn Read) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    source.take(1024).read_to_end(&mut head).map_err(read_error(0, 1024))?;
    let page_size = Meta::decode(&head, 0)?.page_size.min(MAX_PAGE_SIZE);
    let rest = u64::from(page_size) * 2 - head.len() as u64;
    source.take(rest).read_to_end(&mut head).map_err(read_error(1024, rest))?;
    if (head.len() as u64) < u64::from(page_size) * 2 {
        return Err(Error::Truncated {
            what: "meta pages of the snapshot",
            offset: 0,
            need: u64::from(page_size) * 2,
            have: head.len() as u64,
        });
    }
    Ok(head)
}

/// The meta in force. In a snapshot both say the same; in a copy of a member's `db` either may be the newer one.
fn newest_meta(head: &[u8]) -> Result<Meta> {
    let first = Meta::decode(head, 0)?;
    let offset = u64::from(first.page_size);
    let second = head.get(first.page_size as usize..).map(|page| Meta::decode(page, offset));
    Ok(match second {
        Some(Ok(second)) if second.page_size == first.page_size && second.txid > first.txid => second,
        _ => first,
    })
}

/// What follows the database: its sha256, or, in a copy of a live file, pages beyond the high-water mark.
fn check_trailer(source: &mut dyn Read, digest: &[u8; 32], size: u64, require_hash: bool) -> Result<()> {
    let mut trailer = Vec::new();
    source.take(HASH_SIZE + 1).read_to_end(&mut trailer).map_err(read_error(size, HASH_SIZE))?;
    if trailer.len() as u64 == HASH_SIZE {
        if trailer == digest {
            return Ok(());
        }
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        return Err(Error::Checksum {
            what: "snapshot (first 8 bytes of its sha256)",
            offset: 0,
            expected: number(&trailer),
            actual: number(digest),
        });
    }
    if require_hash {
        let have = match trailer.len() {
            0 => "no sha256 follows it".to_owned(),
            33 => "more than a sha256 follows it".to_owned(),
            some => format!("only {some} of 32 bytes of its sha256 follow it"),
        };
        return Err(Error::corrupt(
            size,
            format!("snapshot is not whole: {have}; a copy of a stopped member's db needs --skip-hash-check"),
        ));
    }
    Ok(())
}

/// The database of a snapshot, on disk but for its first two pages.
#[derive(Debug)]
pub struct Base<'d, D: Disk + ?Sized> {
    disk: &'d D,
    path: PathBuf,
    file: File,
    head: Vec<u8>,
    meta: Meta,
}

impl<'d, D: Disk + ?Sized> Base<'d, D> {
    /// Size of the database in bytes.
    pub fn size(&self) -> u64 {
        self.meta.file_size()
    }

    /// Opens the tree for appending.
    pub fn into_tail(self) -> Result<Tail<'d, D>> {
        let read = self.file.try_clone().map_err(Error::io("open again", &self.path))?;
        let db = Db::open(HeadInMemory { head: self.head, size: self.meta.file_size(), file: read })?;
        let out = DiskWriter::new(self.disk, self.file, self.meta.file_size())
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
struct HeadInMemory {
    head: Vec<u8>,
    size: u64,
    file: File,
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
pub struct Tail<'d, D: Disk + ?Sized> {
    disk: &'d D,
    path: PathBuf,
    db: Db<HeadInMemory>,
    builder: Builder<DiskWriter<'d, D>>,
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
    /// Current revision of the restored store.
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

impl<D: Disk + ?Sized> Tail<'_, D> {
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

    /// Writes the small buckets as the new cluster needs them, the root, and the metas.
    pub fn finish(mut self, spec: &Spec) -> Result<Restored> {
        let minor = spec.target.map_or_else(|| self.schema(), Ok)?;
        let (added_leases, guessed_leases) = self.write_leases(spec)?;
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
        let (finished, out) = self.builder.finish()?;
        let file = out.into_file().map_err(Error::io("write", &self.path))?;
        self.disk.write_at(&file, &finished.metas().concat(), 0).map_err(Error::io("write", &self.path))?;
        Ok(Restored {
            revision: self.revision,
            base_revision: self.base_revision,
            events: self.events,
            compaction: self.compaction,
            added_leases,
            guessed_leases,
            db_size: finished.file_size(),
            minor,
        })
    }

    /// Every lease a live key refers to gets a record: without one, a put with `ignore_lease` on such a key panics etcd.
    fn write_leases(&mut self, spec: &Spec) -> Result<(BTreeSet<i64>, BTreeSet<i64>)> {
        let missing = self.leases.missing();
        let unrecorded = spec.live_leases.iter().copied().filter(|id| !self.leases.is_recorded(*id));
        let ttl = |id| spec.lease_ttls.get(&id).copied().unwrap_or(0);
        let added: BTreeMap<i64, i64> = missing.into_iter().chain(unrecorded).map(|id| (id, ttl(id))).collect();
        let guessed = added.iter().filter(|(_, ttl)| **ttl <= 0).map(|(id, _)| *id).collect();
        let record = |id: i64, ttl: i64| {
            let ttl = if ttl > 0 { ttl } else { UNKNOWN_LEASE_TTL };
            Lease { id: Some(id), ttl: Some(ttl), remaining_ttl: None }.encode_to_vec()
        };
        self.builder.start(LEASE_BUCKET)?;
        // Keys are the ids as unsigned big-endian numbers.
        let mut more =
            added.iter().map(|(id, ttl)| (*id as u64, *ttl)).collect::<BTreeMap<_, _>>().into_iter().peekable();
        if let Some(root) = self.db.bucket(LEASE_BUCKET)? {
            let mut cursor = self.db.cursor(&root);
            while let Some(row) = cursor.next()? {
                while let Some((id, ttl)) = more.next_if(|(id, _)| id.to_be_bytes().as_slice() < row.key) {
                    self.builder.push(&id.to_be_bytes(), &record(id as i64, ttl))?;
                }
                // An id that was revoked and granted anew has another TTL by now.
                let regranted =
                    lease_id(row.key).and_then(|id| Some((id, *spec.lease_ttls.get(&id).filter(|ttl| **ttl > 0)?)));
                match regranted.filter(|(_, ttl)| Lease::decode(row.value).is_ok_and(|lease| lease.ttl() != *ttl)) {
                    Some((id, ttl)) => self.builder.push(row.key, &record(id, ttl))?,
                    None => self.builder.push(row.key, row.value)?,
                }
            }
        }
        for (id, ttl) in more {
            self.builder.push(&id.to_be_bytes(), &record(id as i64, ttl))?;
        }
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
            meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(scheduled));
        }
        if spec.bump_revision > 0 {
            let bumped = self.revision.checked_add(spec.bump_revision);
            let bumped = bumped.ok_or_else(|| {
                Error::invalid(format!("revision {} cannot be raised by {}", self.revision, spec.bump_revision))
            })?;
            // Old releases raise the current revision to the finished compaction only, so both are set.
            meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(bumped));
            meta.insert(FINISHED_COMPACT.into(), RowKey::first_of(bumped));
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

    fn put_bucket(&mut self, name: &[u8], rows: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<()> {
        self.builder.start(name)?;
        rows.iter().try_for_each(|(key, value)| self.builder.push(key, value))
    }
}
