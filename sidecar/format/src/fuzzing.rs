//! One function a decoder that takes any bytes: what the fuzz targets run, and what the suite runs over their corpora.
//!
//! None may panic, loop for ever, or allocate more than its input justifies.

use crate::bolt::{Db, Meta};
use crate::datadir::{Verify, WantHash, verify_database};
use crate::membership::{NewCluster, read_members};
use crate::mvcc::{HashRules, KeyValue, RowKey};
use crate::wire::Fields;
use crate::{SnapshotScan, snap, wal};

/// A decoder by name.
pub type Target = (&'static str, fn(&[u8]));

/// Every decoder.
pub const TARGETS: [Target; 6] = [
    ("database", database),
    ("snapshot_stream", snapshot_stream),
    ("row", row),
    ("log", log),
    ("snap", raft_snapshot),
    ("membership", membership),
];

/// A database file: everything that is read of one.
pub fn database(bytes: &[u8]) {
    let _ = Meta::decode(bytes, 0);
    let Ok(db) = Db::open(bytes) else { return };
    let options = Verify { hash: Some(WantHash::Current(HashRules::of("3.6.0"))), compaction: None };
    let _ = verify_database(&db, &options);
    let _ = read_members(&db);
}

/// etcd's snapshot as it streams by.
pub fn snapshot_stream(bytes: &[u8]) {
    let mut scan = SnapshotScan::new(1);
    if bytes.chunks(997).try_for_each(|piece| scan.push(piece)).is_ok() {
        let _ = scan.finish();
    }
}

/// Key and value of a row.
pub fn row(bytes: &[u8]) {
    let (key, value) = bytes.split_at(bytes.len().min(18));
    if let Some(key) = RowKey::decode(key) {
        assert!(RowKey::decode(&key.encode()) == Some(key), "a row key does not round-trip");
    }
    if let Ok(kv) = KeyValue::decode(value) {
        let mut out = Vec::new();
        kv.encode(&mut out);
        assert!(KeyValue::decode(&out).is_ok_and(|again| again == kv), "a row value does not round-trip");
    }
    let mut fields = Fields::new(bytes);
    while let Ok(Some(_)) = fields.next() {}
}

/// A log segment.
pub fn log(bytes: &[u8]) {
    let _ = wal::read_segment(bytes);
}

/// A raft snapshot file.
pub fn raft_snapshot(bytes: &[u8]) {
    if let Ok(snapshot) = snap::decode(bytes) {
        let _ = snap::member_ids(&snapshot);
    }
}

/// `--initial-cluster` and names of files.
pub fn membership(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = NewCluster::parse(&text, "token");
    let _ = wal::SegmentName::parse(&text);
    let _ = snap::SnapName::parse(&text);
}
