//! A database written anew: compacted, in key order, without free pages; front to back, as etcd sends its snapshot.

use std::collections::BTreeMap;
use std::io::Write;

use crate::bolt::{Builder, Db, Finished};
use crate::mvcc::{
    CompactionFilter, FINISHED_COMPACT, HashRules, KEY_BUCKET, KeyValue, META_BUCKET, RowKey, SCHEDULED_COMPACT,
};
use crate::{Error, ReadAt, Result};

/// Writes a database anew. It is shown every row of the key bucket in order, for instance by a check, and takes the other
/// buckets itself. Pages 0 and 1 are left zero: what belongs there is known at the end.
#[derive(Debug)]
pub struct Rewrite<'d, R, W> {
    db: &'d Db<R>,
    filter: Option<CompactionFilter>,
    compact_revision: i64,
    rules: HashRules,
    builder: Builder<W>,
    /// Rows shown.
    seen: u64,
    rows: u64,
    failed: Option<Error>,
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Rewritten {
    /// Pages 0 and 1, and the size.
    pub finished: Finished,
    /// Rows in the key bucket.
    pub rows: u64,
}

impl<'d, R: ReadAt, W: Write> Rewrite<'d, R, W> {
    /// Compacts at a revision, by the rules of an etcd version; 0 leaves every row. `finished` says up to where each key has
    /// one row only; 0 is always right.
    pub fn new(db: &'d Db<R>, compact_revision: i64, finished: i64, rules: HashRules, out: W) -> Result<Self> {
        let filter = if compact_revision > finished {
            Some(CompactionFilter::new(db, compact_revision, compact_revision, finished)?)
        } else {
            None
        };
        let mut builder = Builder::create(out, db.meta().page_size)?;
        copy_buckets(db, compact_revision, &mut builder, |name| name < KEY_BUCKET)?;
        builder.start(KEY_BUCKET)?;
        Ok(Self { db, filter, compact_revision, rules, builder, seen: 0, rows: 0, failed: None })
    }

    /// Takes the next row. What is wrong with one is told at the end.
    pub fn row(&mut self, key: &[u8], value: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.take(key, value).err();
        }
    }

    fn take(&mut self, row_key: &[u8], value: &[u8]) -> Result<()> {
        let ordinal = self.seen;
        self.seen += 1;
        let key = RowKey::decode(row_key).ok_or_else(|| Error::corrupt(0, "row key is not a revision"))?;
        if let Some(filter) = self.filter.as_ref().filter(|_| key.main <= self.compact_revision) {
            let is_last_tombstone = key.tombstone && key.main == self.compact_revision;
            let stays = filter.keeps(ordinal, key, &KeyValue::decode(value)?)
                || is_last_tombstone && self.rules.keeps_tombstone_at_compaction;
            if !stays {
                return Ok(());
            }
        }
        self.rows += 1;
        self.builder.push(row_key, value)
    }

    /// Shows it all rows, in a pass of its own.
    pub fn all_rows(&mut self) -> Result<()> {
        let Some(bucket) = self.db.bucket(KEY_BUCKET)? else { return Ok(()) };
        let mut cursor = self.db.cursor(&bucket);
        while let Some(row) = cursor.next()? {
            self.row(row.key, row.value);
        }
        Ok(())
    }

    /// Every row has been shown.
    pub fn finish(self) -> Result<(Rewritten, W)> {
        let Self { db, compact_revision, mut builder, rows, failed, .. } = self;
        failed.map_or(Ok(()), Err)?;
        copy_buckets(db, compact_revision, &mut builder, |name| name > KEY_BUCKET)?;
        let (finished, out) = builder.finish()?;
        Ok((Rewritten { finished, rows }, out))
    }
}

/// Copies the buckets that are chosen by name; the meta bucket learns of the compaction.
fn copy_buckets<R: ReadAt, W: Write>(
    db: &Db<R>,
    compact_revision: i64,
    builder: &mut Builder<W>,
    chosen: impl Fn(&[u8]) -> bool,
) -> Result<()> {
    let mut names = Vec::new();
    let mut root = db.root();
    while let Some(row) = root.next()? {
        names.push(row.key.to_vec());
    }
    for name in names.iter().filter(|name| chosen(name)) {
        builder.start(name)?;
        if name == META_BUCKET {
            let mut meta: BTreeMap<_, _> = db.rows(META_BUCKET)?.into_iter().collect();
            if compact_revision > 0 {
                meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(compact_revision).to_vec());
                meta.insert(FINISHED_COMPACT.into(), RowKey::first_of(compact_revision).to_vec());
            }
            meta.iter().try_for_each(|(key, value)| builder.push(key, value))?;
            continue;
        }
        let Some(bucket) = db.bucket(name)? else { continue };
        let mut cursor = db.cursor(&bucket);
        while let Some(row) = cursor.next()? {
            builder.push(row.key, row.value)?;
        }
    }
    Ok(())
}
