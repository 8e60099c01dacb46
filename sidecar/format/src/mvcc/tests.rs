use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::bolt::{Builder, Visited};
use crate::mvcc::history::CompactionFilter;

fn database(rows: &[(Vec<u8>, Vec<u8>)], compaction: Compaction) -> Vec<u8> {
    let mut builder = Builder::create(Vec::new(), 1024).unwrap();
    builder.start(KEY_BUCKET).unwrap();
    for (key, value) in rows {
        builder.push(key, value).unwrap();
    }
    builder.start(META_BUCKET).unwrap();
    for (name, main) in [(FINISHED_COMPACT, compaction.finished), (SCHEDULED_COMPACT, compaction.scheduled)] {
        if main > 0 {
            builder.push(name, &RowKey::first_of(main)).unwrap();
        }
    }
    let (finished, mut file) = builder.finish().unwrap();
    let metas = finished.metas().concat();
    file[..metas.len()].copy_from_slice(&metas);
    file
}

/// A store that does what etcd does, in memory: the model the tests compare with.
#[derive(Default, Clone)]
struct Model {
    rows: BTreeMap<Vec<u8>, Vec<u8>>,
    live: BTreeMap<u8, (i64, i64)>,
    revision: i64,
}

impl Model {
    fn apply(&mut self, txn: &BTreeMap<u8, bool>) {
        let main = self.revision.max(1) + 1;
        let mut sub = 0;
        for (key, is_put) in txn {
            let name = [b'k', *key];
            let mut value = Vec::new();
            let tombstone = !is_put;
            if tombstone {
                if self.live.remove(key).is_none() {
                    continue;
                }
                KeyValue { key: &name, ..KeyValue::default() }.encode(&mut value);
            } else {
                let (create, version) =
                    self.live.get(key).map_or((main, 1), |(create, version)| (*create, version + 1));
                self.live.insert(*key, (create, version));
                KeyValue { key: &name, create_revision: create, mod_revision: main, version, value: b"v", lease: 0 }
                    .encode(&mut value);
            }
            self.rows.insert(RowKey { main, sub, tombstone }.encode().to_vec(), value);
            sub += 1;
            self.revision = main;
        }
    }

    fn compacted(&self, at: i64) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut newest = BTreeMap::new();
        for (key, value) in &self.rows {
            if RowKey::decode(key).unwrap().main <= at {
                newest.insert(KeyValue::decode(value).unwrap().key.to_vec(), key.clone());
            }
        }
        let keep: HashSet<_> = newest.into_values().collect();
        let rows = self.rows.iter().filter(|(key, _)| {
            let row = RowKey::decode(key).unwrap();
            row.main > at || (keep.contains(*key) && (!row.tombstone || row.main == at))
        });
        rows.map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// Number of keys that exist at a revision.
fn model_keys_at(model: &Model, revision: i64) -> usize {
    let mut live = BTreeMap::new();
    for (row, value) in &model.rows {
        let row = RowKey::decode(row).unwrap();
        if row.main <= revision {
            live.insert(KeyValue::decode(value).unwrap().key.to_vec(), !row.tombstone);
        }
    }
    live.into_values().filter(|live| *live).count()
}

fn history() -> impl Strategy<Value = Vec<BTreeMap<u8, bool>>> {
    prop::collection::vec(prop::collection::btree_map(0..12u8, prop::bool::weighted(0.7), 1..4), 1..60)
}

/// Few keys, deleted as often as put: there are moments without any key.
fn short_history() -> impl Strategy<Value = Vec<BTreeMap<u8, bool>>> {
    prop::collection::vec(prop::collection::btree_map(0..3u8, any::<bool>(), 1..3), 1..12)
}

fn check(file: &[u8], slots: usize) -> Counted {
    let db = Db::open(file).unwrap();
    let check = CheckRows { leases: HashSet::new(), table_slots: slots, compaction: None };
    check_rows(&db, &check, Visited::new(db.meta()), &mut |_, _| {}).unwrap().0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn key_values_round_trip(key: Vec<u8>, value: Vec<u8>, numbers: [i64; 4]) {
        let [create_revision, mod_revision, version, lease] = numbers;
        let kv = KeyValue { key: &key, value: &value, create_revision, mod_revision, version, lease };
        let mut out = Vec::new();
        kv.encode(&mut out);
        prop_assert_eq!(KeyValue::decode(&out).unwrap(), kv);
    }

    #[test]
    fn row_keys_sort_as_their_bytes(a in (0..i64::MAX, 0..i64::MAX, any::<bool>()), b in (0..i64::MAX, 0..i64::MAX, any::<bool>())) {
        let key = |(main, sub, tombstone)| RowKey { main, sub, tombstone };
        prop_assert_eq!(key(a).cmp(&key(b)), key(a).encode().cmp(&key(b).encode()));
        prop_assert_eq!(RowKey::decode(&key(a).encode()), Some(key(a)));
    }

    #[test]
    fn arbitrary_row_bytes_never_panic(key: Vec<u8>, value: Vec<u8>) {
        let _ = RowKey::decode(&key);
        let _ = KeyValue::decode(&value);
    }

    /// The hash of the uncompacted rows as of compaction C equals the hash of the rows that a compaction at C leaves.
    #[test]
    fn hash_sees_through_compaction(txns in prop_oneof![history(), short_history()], at in 0..60i64, up in 0..60i64) {
        let mut model = Model::default();
        for txn in &txns {
            model.apply(txn);
        }
        prop_assume!(model.revision > 1);
        let at = 1 + at % model.revision;
        let revision = at + up % (model.revision - at + 1);
        let rules = HashRules { keeps_tombstone_at_compaction: true };
        let whole = database(&model.rows.clone().into_iter().collect::<Vec<_>>(), Compaction::default());
        let compaction = Compaction { scheduled: at, finished: at };
        let compacted = database(&model.compacted(at).into_iter().collect::<Vec<_>>(), compaction);
        let whole_db = Db::open(&whole).unwrap();
        let compacted_db = Db::open(&compacted).unwrap();
        let request = HashRequest { revision, compact_revision: at, clean_up_to: 0, rules };
        let live = hash_kv(&compacted_db, HashRequest { clean_up_to: at, ..request }).unwrap();
        prop_assert_eq!(live.if_compacted, None);
        let whole = hash_kv(&whole_db, request).unwrap();
        prop_assert!(whole.may_be(live.hash), "{whole:?} is not {live:?}");
        prop_assert!(hash_kv(&compacted_db, request).unwrap().may_be(live.hash));
        // Only a store without keys leaves it open.
        prop_assert!(whole.if_compacted.is_none() || model_keys_at(&model, revision) == 0);
        prop_assert_eq!(check(&compacted, 1 << 21).problems, vec![]);
        // The filter itself, also when its keys do not fit.
        for slots in [1 << 21, 1 << 3] {
            let filter = CompactionFilter::with_table_slots(&whole_db, at, at, 0, slots).unwrap();
            let kept = model.rows.iter().enumerate().filter(|(ordinal, (key, value))| {
                let key = RowKey::decode(key).unwrap();
                let kv = KeyValue::decode(value).unwrap();
                filter.keeps(*ordinal as u64, key, &kv) || (key.tombstone && key.main == at)
            });
            let kept: BTreeMap<_, _> = kept.map(|(_, (k, v))| (k.clone(), v.clone())).collect();
            prop_assert_eq!(kept, model.compacted(at));
        }
    }

    /// A whole history has no problems; one row less has. Only the hash can notice the loss of the last change of a
    /// transaction whose key never changes again or is deleted next, and of the last row of all.
    #[test]
    fn every_missing_row_is_noticed(txns in history(), pick: prop::sample::Index) {
        let mut model = Model::default();
        for txn in &txns {
            model.apply(txn);
        }
        prop_assume!(!model.rows.is_empty());
        let mut rows: Vec<_> = model.rows.clone().into_iter().collect();
        for slots in [1 << 21, 1 << 3] {
            let counted = check(&database(&rows, Compaction::default()), slots);
            prop_assert_eq!(&counted.problems, &vec![]);
            prop_assert_eq!(counted.live_keys, model.live.len() as u64);
            prop_assert_eq!(counted.revision, model.revision);
        }
        let index = pick.index(rows.len());
        let (removed, value) = rows.remove(index);
        let removed = RowKey::decode(&removed).unwrap();
        let after = rows.get(index).map(|(key, _)| RowKey::decode(key).unwrap());
        let last_change = removed.sub > 0 && after.is_some_and(|after| after.main != removed.main);
        let kv = KeyValue::decode(&value).unwrap();
        let next = rows[index..].iter().find(|(_, value)| KeyValue::decode(value).unwrap().key == kv.key);
        let leaves_no_trace = next.is_none_or(|(next, _)| RowKey::decode(next).unwrap().tombstone && kv.version > 1);
        let silent = after.is_none() || (last_change && leaves_no_trace);
        prop_assert_eq!(check(&database(&rows, Compaction::default()), 1 << 21).problems.is_empty(), silent);
    }
}

#[test]
fn rules_follow_the_patch_release() {
    let keeps = |version| HashRules::of(version).keeps_tombstone_at_compaction;
    assert_eq!(
        ["3.4.33", "3.4.34", "3.5.15", "3.5.16", "3.6.0", "3.7.3"].map(keeps),
        [false, true, false, true, true, true]
    );
}
