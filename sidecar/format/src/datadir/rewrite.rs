//! A database written anew: compacted, in key order, without free pages; front to back, as etcd sends its snapshot.

use std::collections::BTreeMap;
use std::io::{self, Write};

use crate::bolt::{Builder, Db, Finished};
use crate::mvcc::{
    CompactionFilter, FINISHED_COMPACT, HashRules, KEY_BUCKET, KeyValue, META_BUCKET, RowKey, SCHEDULED_COMPACT,
};
use crate::{Error, ReadAt, Result};

/// A database that is to be written anew. What it will look like is known before the first byte is written.
#[derive(Debug)]
pub struct Rewrite<'d, R> {
    db: &'d Db<R>,
    filter: Option<CompactionFilter>,
    compact_revision: i64,
    rules: HashRules,
    built: Built,
}

/// What a pass over the rows makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Built {
    finished: Finished,
    rows: u64,
}

impl<'d, R: ReadAt> Rewrite<'d, R> {
    /// Compacts at a revision, by the rules of an etcd version; 0 leaves every row. `finished` says up to where each key has
    /// one row only.
    pub fn plan(db: &'d Db<R>, compact_revision: i64, finished: i64, rules: HashRules) -> Result<Self> {
        let filter = if compact_revision > finished {
            Some(CompactionFilter::new(db, compact_revision, compact_revision, finished)?)
        } else {
            None
        };
        let builder = Builder::create(io::sink(), db.meta().page_size)?;
        let built = build(db, filter.as_ref(), compact_revision, rules, builder)?.0;
        Ok(Self { db, filter, compact_revision, rules, built })
    }

    /// Bytes of the database.
    pub fn size(&self) -> u64 {
        self.built.finished.file_size()
    }

    /// Rows in the key bucket.
    pub fn rows(&self) -> u64 {
        self.built.rows
    }

    /// Writes the database.
    pub fn write<W: Write>(&self, out: W) -> Result<W> {
        let builder = Builder::create_known(out, &self.built.finished)?;
        let (built, out) = build(self.db, self.filter.as_ref(), self.compact_revision, self.rules, builder)?;
        if built == self.built { Ok(out) } else { Err(Error::corrupt(0, "database changed while it was being read")) }
    }
}

fn build<R: ReadAt, W: Write>(
    db: &Db<R>,
    filter: Option<&CompactionFilter>,
    compact_revision: i64,
    rules: HashRules,
    mut builder: Builder<W>,
) -> Result<(Built, W)> {
    let mut rows = 0;
    let mut names = Vec::new();
    let mut root = db.root();
    while let Some(row) = root.next()? {
        names.push(row.key.to_vec());
    }
    for name in &names {
        builder.start(name)?;
        let Some(bucket) = db.bucket(name)? else { continue };
        if name == META_BUCKET {
            let mut meta: BTreeMap<_, _> = db.rows(META_BUCKET)?.into_iter().collect();
            if compact_revision > 0 {
                meta.insert(SCHEDULED_COMPACT.into(), RowKey::first_of(compact_revision).to_vec());
                meta.insert(FINISHED_COMPACT.into(), RowKey::first_of(compact_revision).to_vec());
            }
            meta.iter().try_for_each(|(key, value)| builder.push(key, value))?;
            continue;
        }
        let is_key = name == KEY_BUCKET;
        let mut cursor = db.cursor(&bucket);
        let mut ordinal = 0;
        while let Some(row) = cursor.next()? {
            if is_key {
                let key = RowKey::decode(row.key).ok_or_else(|| Error::corrupt(0, "row key is not a revision"))?;
                let is_last_tombstone = key.tombstone && key.main == compact_revision;
                if let Some(filter) = filter.filter(|_| key.main <= compact_revision) {
                    let stays = filter.keeps(ordinal, key, &KeyValue::decode(row.value)?)
                        || is_last_tombstone && rules.keeps_tombstone_at_compaction;
                    ordinal += 1;
                    if !stays {
                        continue;
                    }
                }
                rows += 1;
            }
            builder.push(row.key, row.value)?;
        }
    }
    let (finished, out) = builder.finish()?;
    Ok((Built { finished, rows }, out))
}
