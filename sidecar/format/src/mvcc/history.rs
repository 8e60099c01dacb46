//! Rows in sequence: whether they are a history that etcd can have written, and etcd's hashes over them.

use std::collections::BTreeSet;

use super::keys::{Fingerprints, KeyTable, LeaseTracker};
use super::{Compaction, KEY_BUCKET, KeyValue, META_BUCKET, RowKey};
use crate::bolt::{Cursor, Db, Visited};
use crate::{Error, ReadAt, Result};

/// Problems kept of each kind of check; the rest is only counted.
const MOST_PROBLEMS: usize = 20;

/// Something in the rows that etcd would not have written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, with revision and, where it helps, the key.
    pub what: String,
    /// Where in the database file.
    pub offset: u64,
}

/// What [`check_rows`] found.
#[derive(Debug, Default)]
pub struct Counted {
    /// Rows in the key bucket.
    pub rows: u64,
    /// Current revision.
    pub revision: i64,
    /// How far the store is compacted.
    pub compaction: Compaction,
    /// Keys that exist at the current revision.
    pub live_keys: u64,
    /// Leases that live keys refer to and that have no record.
    pub dangling_leases: BTreeSet<i64>,
    /// Rows at or below the finished compaction that a compaction would have taken: left by `--bump-revision`, taken by the
    /// next compaction.
    pub superseded_rows: u64,
    /// What is wrong, the first twenty.
    pub problems: Vec<Problem>,
    /// How much is wrong.
    pub problem_count: u64,
    /// Of that, breaks in the history of a key.
    chain_problems: u64,
}

impl Counted {
    fn report(&mut self, offset: u64, what: impl FnOnce() -> String) {
        self.problem_count += 1;
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(Problem { what: what(), offset });
        }
    }
}

/// What [`check_rows`] goes by.
#[derive(Debug)]
pub struct CheckRows {
    /// Lease ids that have a record.
    pub leases: std::collections::HashSet<i64>,
    /// Bound on the slots of the key table; see [`CheckRows::new`].
    pub table_slots: usize,
    /// How far the rows are compacted, when that is not what the meta bucket says.
    pub compaction: Option<Compaction>,
}

impl CheckRows {
    /// Uses at most 32 MiB to remember keys; with more keys than fit it reads the rows more than once.
    pub fn new(leases: std::collections::HashSet<i64>) -> Self {
        Self { leases, table_slots: KeyTable::MOST_SLOTS, compaction: None }
    }
}

/// Reads the whole key bucket in order and checks that it is a history: every revision there, every sub revision there,
/// version and create revision of each key in sequence, compacted rows reduced to one a key.
///
/// Pages walked are added to `visited`, and each row's key and value are shown to `see`, once. Structural damage ends the
/// walk with an error; wrong rows are counted as [`Problem`]s. Memory does not grow with the number of rows.
pub fn check_rows<R: ReadAt>(
    db: &Db<R>,
    check: &CheckRows,
    visited: Visited,
    see: &mut dyn FnMut(&[u8], &[u8]),
) -> Result<(Counted, Visited)> {
    let compaction = check.compaction.map_or_else(|| Compaction::read(db), Ok)?;
    let Some(root) = db.bucket(KEY_BUCKET)? else {
        return Err(Error::corrupt(0, "database has no key bucket"));
    };
    let fingerprints = Fingerprints::default();
    let walk = |partition, partitions| {
        Walk::new(check, compaction, fingerprints.clone(), KeyTable::new(partition, partitions, check.table_slots))
    };
    let mut cursor = db.cursor(&root).visiting(visited);
    let mut first = walk(0, 1);
    first.run(&mut cursor, see)?;
    let visited = cursor.into_visited();
    let mut partitions = first.keys.partitions();
    let mut counted = first.finish();
    if partitions > 1 {
        // The first pass has seen everything but the chains of keys that did not fit. They are walked one partition at a
        // time; one that overflows cuts all of them anew.
        let chains = 'cut: loop {
            let mut chains = Counted::default();
            let cut = partitions;
            for partition in 0..cut {
                let mut walk = walk(partition, cut);
                walk.only_chains = true;
                walk.run(&mut db.cursor(&root), &mut |_, _| {})?;
                if walk.keys.partitions() > cut {
                    partitions = walk.keys.partitions();
                    continue 'cut;
                }
                chains.live_keys += walk.live_keys();
                chains.superseded_rows += walk.counted.superseded_rows;
                chains.problem_count += walk.counted.problem_count;
                chains.problems.append(&mut walk.counted.problems);
            }
            break chains;
        };
        counted.problems.retain(|problem| !problem.what.starts_with(CHAIN));
        counted.problem_count = counted.problem_count - counted.chain_problems + chains.problem_count;
        counted.problems.extend(chains.problems);
        counted.problems.truncate(MOST_PROBLEMS);
        counted.live_keys = chains.live_keys;
        counted.superseded_rows = chains.superseded_rows;
        return Ok((counted, visited));
    }
    // A fingerprint collision looks like a broken chain. Another seed tells them apart.
    if counted.problem_count > 0 && counted.problems.iter().all(|problem| problem.what.starts_with(CHAIN)) {
        let keys = KeyTable::new(0, 1, check.table_slots);
        let mut walk = Walk::new(check, compaction, Fingerprints::default(), keys);
        walk.run(&mut db.cursor(&root), &mut |_, _| {})?;
        if walk.counted.problem_count == 0 {
            counted.problems.clear();
            counted.problem_count = 0;
        }
    }
    Ok((counted, visited))
}

const CHAIN: &str = "history of key";
const DEAD: u64 = 0;

/// What a key's next put must continue: create revision and version, folded.
fn state(kv: &KeyValue<'_>) -> u64 {
    let mixed = (kv.create_revision as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (kv.version as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    mixed.max(1)
}

struct Walk {
    compaction: Compaction,
    fingerprints: Fingerprints,
    keys: KeyTable,
    leases: LeaseTracker,
    last: Option<RowKey>,
    /// Main revision that the next row must have if it begins a revision.
    next_main: i64,
    only_chains: bool,
    counted: Counted,
}

impl Walk {
    fn new(check: &CheckRows, compaction: Compaction, fingerprints: Fingerprints, keys: KeyTable) -> Self {
        Self {
            compaction,
            fingerprints,
            keys,
            leases: LeaseTracker::new(check.leases.clone()),
            last: None,
            // A new store is at revision 1 without a row for it.
            next_main: compaction.revision().max(1).saturating_add(1),
            only_chains: false,
            counted: Counted { compaction, ..Counted::default() },
        }
    }

    fn run<R: ReadAt>(&mut self, cursor: &mut Cursor<'_, R>, see: &mut dyn FnMut(&[u8], &[u8])) -> Result<()> {
        loop {
            let Some(row) = cursor.next()? else { return Ok(()) };
            see(row.key, row.value);
            self.counted.rows += 1;
            let (problem, breaks) = match RowKey::decode(row.key) {
                None => (Some(format!("row key {} is not a revision", row.key.escape_ascii())), None),
                Some(key) => {
                    let found = self.row(key, row.value);
                    self.last = Some(key);
                    found
                }
            };
            let offset = cursor.offset();
            if let Some(what) = problem.filter(|_| !self.only_chains) {
                self.counted.report(offset, || what);
            }
            if let Some(what) = breaks {
                self.counted.chain_problems += 1;
                self.counted.report(offset, || what);
            }
        }
    }

    /// Takes the next row; returns what is wrong with it, and how it breaks the history of its key.
    fn row(&mut self, key: RowKey, value: &[u8]) -> (Option<String>, Option<String>) {
        let decoded = match KeyValue::decode(value) {
            Ok(kv) => Self::row_problem(key, &kv, value, self.compaction).map_or(Ok(kv), Err),
            Err(error) => Err(error.to_string()),
        };
        let density = if self.only_chains { None } else { self.density(key) };
        match decoded {
            Err(what) => (Some(format!("row {}.{}: {what}", key.main, key.sub)), None),
            Ok(kv) if kv.key.is_empty() => (density, None),
            Ok(kv) => {
                let fingerprint = self.fingerprints.of(kv.key);
                if !self.only_chains {
                    self.leases.observe(fingerprint, kv.lease);
                }
                let what = if self.keys.covers(fingerprint) { self.chain(key, &kv, fingerprint) } else { None };
                let name = || kv.key.escape_ascii();
                let at = |what| format!("{CHAIN} {} breaks at revision {}.{}: {what}", name(), key.main, key.sub);
                (density, what.map(at))
            }
        }
    }

    /// What a row says of itself.
    fn row_problem(key: RowKey, kv: &KeyValue<'_>, value: &[u8], compaction: Compaction) -> Option<String> {
        if kv.key.is_empty() {
            // `snapshot restore --bump-revision` leaves one empty row at the revision it marks compacted.
            // It stays for ever, also when later compactions pass it.
            let is_bump = value.is_empty() && key.sub == 0 && !key.tombstone && key.main <= compaction.revision();
            return (!is_bump).then(|| "its value has no key".to_owned());
        }
        if key.tombstone {
            let only_key = kv.create_revision == 0
                && kv.mod_revision == 0
                && kv.version == 0
                && kv.lease == 0
                && kv.value.is_empty();
            return (!only_key).then(|| "it is a tombstone with more than a key".to_owned());
        }
        if kv.mod_revision != key.main {
            return Some(format!("its value says that it is of revision {}", kv.mod_revision));
        }
        if kv.create_revision < 1 || kv.create_revision > kv.mod_revision || kv.version < 1 {
            return Some(format!("create revision {} and version {} are impossible", kv.create_revision, kv.version));
        }
        if (kv.version == 1) != (kv.create_revision == kv.mod_revision) {
            return Some(format!("version {} does not fit create revision {}", kv.version, kv.create_revision));
        }
        None
    }

    /// What a row says of the rows before it with the same key.
    fn chain(&mut self, key: RowKey, kv: &KeyValue<'_>, fingerprint: u64) -> Option<String> {
        let before = self.keys.get(fingerprint);
        self.keys.set(fingerprint, if key.tombstone { DEAD } else { state(kv) });
        if key.main <= self.compaction.finished {
            let superseded = before.is_some() || (key.tombstone && key.main != self.compaction.finished);
            self.counted.superseded_rows += u64::from(superseded);
            return None;
        }
        if key.main <= self.compaction.revision() {
            // A compaction that was begun may have taken any row before this one.
            return None;
        }
        let alive = before.filter(|before| *before != DEAD);
        if key.tombstone {
            return alive.is_none().then(|| "deleted while it does not exist".to_owned());
        }
        match alive {
            None => (kv.version != 1).then(|| format!("version {} of a key that does not exist", kv.version)),
            Some(before) => {
                let expected = state(&KeyValue { version: kv.version.wrapping_sub(1), ..*kv });
                (kv.version == 1 || before != expected)
                    .then(|| format!("version {} does not follow the row before it", kv.version))
            }
        }
    }

    /// What is missing between a row and the one before it.
    fn density(&mut self, key: RowKey) -> Option<String> {
        if key.main <= self.compaction.revision() {
            return None;
        }
        let expected_sub = match self.last {
            Some(last) if last.main == key.main => last.sub.saturating_add(1),
            _ => 0,
        };
        let begins = expected_sub == 0;
        let expected_main = if begins { self.next_main } else { key.main };
        self.next_main = key.main.saturating_add(1);
        (key.main != expected_main || key.sub != expected_sub).then(|| {
            format!(
                "row {}.{} stands where {expected_main}.{expected_sub} belongs: rows are missing",
                key.main, key.sub
            )
        })
    }

    fn live_keys(&self) -> u64 {
        self.keys.values().filter(|state| *state != DEAD).count() as u64
    }

    fn finish(mut self) -> Counted {
        let last = self.last.map_or(1, |last| last.main);
        self.counted.revision = last.max(self.compaction.revision());
        if self.compaction.finished > self.compaction.scheduled {
            let (finished, scheduled) = (self.compaction.finished, self.compaction.scheduled);
            self.counted.report(0, || format!("finished compaction {finished} is above the scheduled one {scheduled}"));
        }
        if last < self.compaction.scheduled && self.compaction.scheduled != self.compaction.finished {
            let scheduled = self.compaction.scheduled;
            self.counted.report(0, || format!("last row is of revision {last}, below the scheduled compaction {scheduled}: rows are missing at the end"));
        }
        self.counted.live_keys = self.live_keys();
        self.counted.dangling_leases = self.leases.missing();
        self.counted
    }
}

/// What differs between versions in how rows are hashed and compacted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashRules {
    /// A tombstone exactly at the compaction revision stays in the database and out of the hash: since 3.4.34, 3.5.16.
    pub keeps_tombstone_at_compaction: bool,
}

impl HashRules {
    /// The rules of an etcd version such as `3.5.12`; the newest when it cannot be read.
    pub fn of(version: &str) -> Self {
        let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().ok());
        let parsed = (numbers.next().flatten(), numbers.next().flatten(), numbers.next().flatten());
        let old = matches!(
            parsed,
            (Some(3), Some(4), Some(0..=33)) | (Some(3), Some(5), Some(0..=15)) | (Some(3), Some(0..=3), _)
        );
        Self { keeps_tombstone_at_compaction: !old }
    }
}

/// The answer to HashKV, computed from the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashedKv {
    /// CRC-32C over the rows.
    pub hash: u32,
    /// The hash once that compaction has taken its rows, where that may differ: while no key exists at the revision, etcd
    /// hashes whatever rows there are.
    pub if_compacted: Option<u32>,
    /// Revision up to which rows were hashed.
    pub revision: i64,
    /// Compaction revision that was assumed; 0 when never compacted.
    pub compact_revision: i64,
    /// False while no key exists at the revision: what etcd answered then depends on how far it had got with compacting.
    pub is_definite: bool,
}

impl HashedKv {
    /// Whether a live etcd with these rows may have answered that.
    pub fn may_be(&self, live: u32) -> bool {
        self.hash == live || self.if_compacted == Some(live)
    }
}

/// Which rows a compaction leaves.
///
/// `upto` is the revision whose view decides: of each key only its newest row at or below `upto` counts. The decision
/// applies to rows at or below `applies_to`. A compaction at C uses C for both; HashKV(rev) uses rev and the compaction
/// revision.
#[derive(Debug)]
pub struct CompactionFilter {
    upto: i64,
    applies_to: i64,
    finished: i64,
    fingerprints: Fingerprints,
    decided: Decided,
    keeps_any: bool,
}

#[derive(Debug)]
enum Decided {
    /// Newest revision of each key that changed after the finished compaction; lowest bit set when it is a tombstone.
    Newest(KeyTable),
    /// When those keys do not fit: one bit for each row up to `applies_to`, set when it goes.
    Dropped(Vec<u64>),
}

impl CompactionFilter {
    /// Makes one pass over the rows above the finished compaction, and more when their keys do not fit 32 MiB.
    ///
    /// `finished` says up to where each key has one row only, a put; 0 is always right.
    pub fn new<R: ReadAt>(db: &Db<R>, upto: i64, applies_to: i64, finished: i64) -> Result<Self> {
        Self::with_table_slots(db, upto, applies_to, finished, KeyTable::MOST_SLOTS)
    }

    pub(super) fn with_table_slots<R: ReadAt>(
        db: &Db<R>,
        upto: i64,
        applies_to: i64,
        finished: i64,
        slots: usize,
    ) -> Result<Self> {
        let mut filter = Self {
            upto,
            applies_to,
            finished,
            fingerprints: Fingerprints::default(),
            decided: Decided::Newest(KeyTable::new(0, 1, slots)),
            keeps_any: false,
        };
        let table = filter.newest_rows(db, KeyTable::new(0, 1, slots))?;
        let mut partitions = table.partitions();
        if partitions == 1 {
            filter.keeps_any = table.values().any(|newest| newest & 1 == 0);
            filter.decided = Decided::Newest(table);
        } else {
            drop(table);
            // One partition at a time; one that overflows cuts all of them anew.
            let dropped = 'cut: loop {
                let mut dropped = Vec::new();
                filter.keeps_any = false;
                let cut = partitions;
                for partition in 0..cut {
                    let table = filter.newest_rows(db, KeyTable::new(partition, cut, slots))?;
                    if table.partitions() > cut {
                        partitions = table.partitions();
                        continue 'cut;
                    }
                    filter.keeps_any |= table.values().any(|newest| newest & 1 == 0);
                    filter.decided = Decided::Newest(table);
                    filter.mark_dropped(db, &mut dropped)?;
                    filter.decided = Decided::Dropped(Vec::new());
                }
                break dropped;
            };
            filter.decided = Decided::Dropped(dropped);
        }
        if !filter.keeps_any {
            filter.keeps_any = filter.finds_kept_row(db)?;
        }
        Ok(filter)
    }

    fn newest_rows<R: ReadAt>(&self, db: &Db<R>, mut table: KeyTable) -> Result<KeyTable> {
        let Some(root) = db.bucket(KEY_BUCKET)? else { return Ok(table) };
        let mut cursor = db.cursor(&root);
        cursor.seek(&RowKey::first_of(self.finished.saturating_add(1)))?;
        while let Some(row) = cursor.next()? {
            let (key, kv) = decode_row(row.key, row.value)?;
            if key.main > self.upto {
                break;
            }
            let fingerprint = self.fingerprints.of(kv.key);
            if table.covers(fingerprint) {
                table.set(fingerprint, (key.main as u64) << 1 | u64::from(key.tombstone));
            }
        }
        Ok(table)
    }

    fn mark_dropped<R: ReadAt>(&self, db: &Db<R>, dropped: &mut Vec<u64>) -> Result<()> {
        self.each_row_it_applies_to(db, |ordinal, keeps| {
            let word = (ordinal / 64) as usize;
            if word >= dropped.len() {
                dropped.resize(word + 1, 0);
            }
            if !keeps && let Some(bits) = dropped.get_mut(word) {
                *bits |= 1 << (ordinal % 64);
            }
            true
        })
    }

    fn finds_kept_row<R: ReadAt>(&self, db: &Db<R>) -> Result<bool> {
        let mut found = false;
        self.each_row_it_applies_to(db, |_, keeps| {
            found = keeps;
            !found
        })?;
        Ok(found)
    }

    fn each_row_it_applies_to<R: ReadAt>(&self, db: &Db<R>, mut see: impl FnMut(u64, bool) -> bool) -> Result<()> {
        let Some(root) = db.bucket(KEY_BUCKET)? else { return Ok(()) };
        let mut cursor = db.cursor(&root);
        let mut ordinal = 0;
        while let Some(row) = cursor.next()? {
            let (key, kv) = decode_row(row.key, row.value)?;
            if key.main > self.applies_to.max(self.finished) || !see(ordinal, self.is_newest(ordinal, key, &kv)) {
                break;
            }
            ordinal += 1;
        }
        Ok(())
    }

    /// Whether the row is the newest of its key at `upto`, and a put. `ordinal` counts all rows of the bucket.
    fn is_newest(&self, ordinal: u64, key: RowKey, kv: &KeyValue<'_>) -> bool {
        match &self.decided {
            Decided::Newest(table) => {
                let fingerprint = self.fingerprints.of(kv.key);
                if !table.covers(fingerprint) {
                    return true;
                }
                match table.get(fingerprint) {
                    Some(newest) => newest == (key.main as u64) << 1,
                    None => !key.tombstone,
                }
            }
            Decided::Dropped(bits) => {
                bits.get((ordinal / 64) as usize).is_none_or(|word| word >> (ordinal % 64) & 1 == 0)
            }
        }
    }

    /// Whether the row stays: it is above `applies_to`, or the newest of its key and a put. A tombstone exactly at the
    /// compaction revision is up to the caller's [`HashRules`].
    pub fn keeps(&self, ordinal: u64, key: RowKey, kv: &KeyValue<'_>) -> bool {
        key.main > self.applies_to || self.is_newest(ordinal, key, kv)
    }
}

fn decode_row<'a>(key: &[u8], value: &'a [u8]) -> Result<(RowKey, KeyValue<'a>)> {
    let key = RowKey::decode(key)
        .ok_or_else(|| Error::corrupt(0, format!("row key {} is not a revision", key.escape_ascii())))?;
    let value = KeyValue::decode(value)?;
    Ok((key, value))
}

/// What [`hash_kv`] is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashRequest {
    /// Revision up to which rows are hashed.
    pub revision: i64,
    /// Compaction revision to assume; 0 for never compacted.
    pub compact_revision: i64,
    /// Up to where each key has one row only.
    pub clean_up_to: i64,
    /// What the etcd version does.
    pub rules: HashRules,
}

impl HashRequest {
    /// What a live etcd with this database answers without being given a revision.
    pub fn current<R: ReadAt>(db: &Db<R>, rules: HashRules) -> Result<Self> {
        let compaction = Compaction::read(db)?;
        let revision = super::current_revision(db)?;
        Ok(Self { revision, compact_revision: compaction.revision(), clean_up_to: compaction.finished, rules })
    }
}

/// Computes what etcd answers to HashKV.
///
/// Errors when the rows cannot answer: a compaction older than that of the rows, or a revision below the compaction.
pub fn hash_kv<R: ReadAt>(db: &Db<R>, request: HashRequest) -> Result<HashedKv> {
    let HashRequest { revision, compact_revision, clean_up_to, rules } = request;
    let compact = compact_revision.max(0);
    if compact < clean_up_to {
        return Err(Error::invalid(format!(
            "rows are compacted at revision {clean_up_to}; no hash as of compaction {compact} can be computed"
        )));
    }
    if revision < compact {
        return Err(Error::invalid(format!("revision {revision} is below the compaction {compact}")));
    }
    // Never compacted: every row counts, and nothing needs to be known of the keys.
    let filter = if compact > 0 { Some(CompactionFilter::new(db, revision, compact, clean_up_to)?) } else { None };
    let hidden = |key: RowKey| rules.keeps_tombstone_at_compaction && key.main == compact && key.tombstone;
    let hash = hash_rows(db, revision, |ordinal, key, kv| {
        let drops = |filter: &CompactionFilter| filter.keeps_any && !filter.keeps(ordinal, key, kv);
        hidden(key) || (key.main <= compact && filter.as_ref().is_some_and(drops))
    })?;
    let is_definite = filter.as_ref().is_none_or(|filter| filter.keeps_any);
    let mut if_compacted = None;
    if compact > clean_up_to && filter.is_some_and(|filter| !filter.keeps_any) {
        let finished = CompactionFilter::new(db, compact, compact, clean_up_to)?;
        if_compacted = Some(hash_rows(db, revision, |ordinal, key, kv| !finished.keeps(ordinal, key, kv))?);
    }
    Ok(HashedKv { hash, if_compacted, revision, compact_revision: compact, is_definite })
}

fn hash_rows<R: ReadAt>(db: &Db<R>, revision: i64, skips: impl Fn(u64, RowKey, &KeyValue<'_>) -> bool) -> Result<u32> {
    let mut hash = crc32c::crc32c(KEY_BUCKET);
    let Some(root) = db.bucket(KEY_BUCKET)? else { return Ok(hash) };
    let mut cursor = db.cursor(&root);
    let mut ordinal = 0;
    while let Some(row) = cursor.next()? {
        let (key, kv) = decode_row(row.key, row.value)?;
        if key.main > revision {
            break;
        }
        if !skips(ordinal, key, &kv) {
            hash = crc32c::crc32c_append(hash, row.key);
            hash = crc32c::crc32c_append(hash, row.value);
        }
        ordinal += 1;
    }
    Ok(hash)
}

/// The hash of `snapshot status`: every bucket's name and rows, in order. With `ignore`, those keys of the meta bucket are
/// left out, which gives Maintenance.Hash of the version that ignores them.
pub fn backend_hash<R: ReadAt>(db: &Db<R>, ignore: &[&[u8]]) -> Result<u32> {
    let mut buckets = BTreeSet::new();
    let mut root = db.root();
    while let Some(row) = root.next()? {
        buckets.insert(row.key.to_vec());
    }
    let mut hash = 0;
    for name in &buckets {
        hash = crc32c::crc32c_append(hash, name);
        let Some(bucket) = db.bucket(name)? else { continue };
        let mut cursor = db.cursor(&bucket);
        while let Some(row) = cursor.next()? {
            if name.as_slice() != META_BUCKET || !ignore.contains(&row.key) {
                hash = crc32c::crc32c_append(hash, row.key);
                hash = crc32c::crc32c_append(hash, row.value);
            }
        }
    }
    Ok(hash)
}
