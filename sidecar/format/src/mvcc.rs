//! Rows of the `key` bucket: their keys and values, what makes a sequence of them a history, and etcd's hashes over them.
//!
//! # Invariants
//! - A row's key is its revision; rows therefore sort in the order in which they were written.
//! - Nothing here keeps all keys in memory: what must remember keys keeps 64-bit fingerprints in a table of bounded size
//!   and makes further passes over the rows when they do not fit.

mod history;
mod keys;
mod row;

pub use history::{
    CheckRows, CompactionFilter, Counted, HashRequest, HashRules, HashedKv, Problem, backend_hash, check_rows, hash_kv,
};
pub use keys::{Fingerprints, LeaseTracker};
pub use row::{KeyValue, RowKey};

use crate::bolt::Db;
use crate::cursor::u64_be;
use crate::{Error, ReadAt, Result};

/// Name of the bucket that holds the rows.
pub const KEY_BUCKET: &[u8] = b"key";
/// Name of the bucket that holds consistent index, compaction revisions and storage version.
pub const META_BUCKET: &[u8] = b"meta";
/// Name of the bucket that holds the leases.
pub const LEASE_BUCKET: &[u8] = b"lease";
/// Name of the bucket that holds whether auth is on, and its revision.
pub const AUTH_BUCKET: &[u8] = b"auth";
/// Name of the bucket that holds raised alarms.
pub const ALARM_BUCKET: &[u8] = b"alarm";
/// Every bucket that a started etcd has.
pub const ALL_BUCKETS: [&[u8]; 10] = [
    b"alarm",
    b"auth",
    b"authRoles",
    b"authUsers",
    b"cluster",
    b"key",
    b"lease",
    b"members",
    b"members_removed",
    b"meta",
];

/// Key of the applied raft index in [`META_BUCKET`].
pub const CONSISTENT_INDEX: &[u8] = b"consistent_index";
/// Key of the applied raft term in [`META_BUCKET`], since 3.5.
pub const TERM: &[u8] = b"term";
/// Key of the raft voters in [`META_BUCKET`], since 3.5.
pub const CONF_STATE: &[u8] = b"confState";
/// Key of the compaction that was begun last in [`META_BUCKET`].
pub const SCHEDULED_COMPACT: &[u8] = b"scheduledCompactRev";
/// Key of the compaction that was finished last in [`META_BUCKET`].
pub const FINISHED_COMPACT: &[u8] = b"finishedCompactRev";
/// Key of the schema version in [`META_BUCKET`], since 3.6.
pub const STORAGE_VERSION: &[u8] = b"storageVersion";
/// Key of the auth revision in [`AUTH_BUCKET`].
pub const AUTH_REVISION: &[u8] = b"authRevision";

/// How far a store is compacted; 0 means never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compaction {
    /// The compaction begun last. Rows up to here may already be missing.
    pub scheduled: i64,
    /// The compaction finished last. Rows up to here are reduced to one a key.
    pub finished: i64,
}

impl Compaction {
    /// Reads both revisions.
    pub fn read<R: ReadAt>(db: &Db<R>) -> Result<Self> {
        let read = |name: &[u8]| -> Result<i64> {
            let Some(value) = db.get(META_BUCKET, name)? else { return Ok(0) };
            match RowKey::decode(&value) {
                Some(key) if !key.tombstone => Ok(key.main),
                _ => Err(Error::corrupt(0, format!("meta {} is not a revision", name.escape_ascii()))),
            }
        };
        Ok(Self { scheduled: read(SCHEDULED_COMPACT)?, finished: read(FINISHED_COMPACT)? })
    }

    /// The revision below which etcd answers "compacted".
    pub fn revision(&self) -> i64 {
        self.scheduled.max(self.finished)
    }
}

/// The current revision: that of the last row, or of the compaction when that is later.
pub fn current_revision<R: ReadAt>(db: &Db<R>) -> Result<i64> {
    let compaction = Compaction::read(db)?;
    let last = match db.bucket(KEY_BUCKET)? {
        Some(root) => db.last(&root)?,
        None => None,
    };
    let last = match last {
        Some((key, _)) => {
            RowKey::decode(&key)
                .ok_or_else(|| Error::corrupt(0, "last row of the key bucket has no revision for a key"))?
                .main
        }
        None => 1,
    };
    Ok(last.max(compaction.revision()).max(1))
}

/// A big-endian number of the meta or auth bucket; `None` when it is not there.
pub fn read_u64<R: ReadAt>(db: &Db<R>, bucket: &[u8], key: &[u8]) -> Result<Option<u64>> {
    match db.get(bucket, key)? {
        None => Ok(None),
        Some(value) if value.len() == 8 => Ok(u64_be(&value, 0)),
        Some(value) => Err(Error::corrupt(
            0,
            format!("{} in bucket {} is {} bytes long, not 8", key.escape_ascii(), bucket.escape_ascii(), value.len()),
        )),
    }
}

#[cfg(test)]
mod tests;
