//! Files that each real etcd minor wrote, and what etcd said of them. `cargo run --package tests --bin golden` makes them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop where it finds the fault"
)]

use std::path::{Path, PathBuf};

use etcd_format::bolt::Db;
use etcd_format::datadir::{Minor, Verify, WantHash, verify, verify_database};
use etcd_format::membership::NewCluster;
use etcd_format::mvcc::{HashRequest, HashRules, backend_hash, hash_kv};
use etcd_format::wal;
use etcd_format::{SnapshotScan, snap};
use proto::disk::{ConfChange, HardState, Metadata};
use serde_json::Value;

const VERSIONS: [(&str, &str); 4] = [("3.4", "3.4.23"), ("3.5", "3.5.35"), ("3.6", "3.6.16"), ("3.7", "3.7.3")];

fn golden(minor: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(minor)
}

fn decompressed(path: &Path) -> Vec<u8> {
    let file = std::fs::File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
    zstd::stream::decode_all(file).unwrap()
}

fn expected(minor: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(minor).join("expected.json")).unwrap()).unwrap()
}

/// Lays a golden member out as a data directory.
fn lay_out(from: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["snap", "wal"] {
        std::fs::create_dir_all(dir.path().join("member").join(sub)).unwrap();
        for entry in std::fs::read_dir(from.join(sub)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap();
            std::fs::write(dir.path().join("member").join(sub).join(name), decompressed(&path)).unwrap();
        }
    }
    dir
}

#[test]
fn live_directories_are_sound_and_hash_as_etcd_says() {
    for (minor, version) in VERSIONS {
        let expected = expected(minor);
        let dir = lay_out(&golden(minor).join("live"));
        let rules = HashRules::of(version);
        let options = Verify { hash: Some(WantHash::Current(rules)), compaction: None };
        let verdict = verify(dir.path(), &options).unwrap().unwrap();
        assert_eq!(verdict.findings, vec![], "{minor}");
        let summary = verdict.summary.unwrap();
        assert_eq!(summary.revision, expected["revision"].as_i64().unwrap(), "{minor}");
        // A young cluster has not migrated its schema yet.
        assert!(summary.schema.unwrap() <= Minor::parse(minor).unwrap(), "{minor}");
        let (member, cluster) = verdict.member.unwrap();
        assert_eq!(
            (member.to_string(), cluster.to_string()),
            (text(&expected["memberId"]), text(&expected["clusterId"]))
        );
        let derived = NewCluster::parse(&format!("default={}", text(&expected["peerUrl"])), "etcd-cluster").unwrap();
        assert_eq!((derived.members()[0].id, derived.id()), (member, cluster), "{minor}");
        let db = Db::open(std::fs::File::open(dir.path().join("member/snap/db")).unwrap()).unwrap();
        let current = HashRequest::current(&db, rules).unwrap();
        for hash in expected["hashes"].as_array().unwrap() {
            let request = HashRequest { revision: hash["revision"].as_i64().unwrap(), ..current };
            let computed = hash_kv(&db, request).unwrap();
            assert_eq!(u64::from(computed.hash), hash["hash"].as_u64().unwrap(), "{minor} at {}", request.revision);
            assert_eq!(computed.compact_revision, hash["compactRevision"].as_i64().unwrap());
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn snapshots_scan_and_hash_as_etcds_tools_say() {
    for (minor, _) in VERSIONS {
        let expected = expected(minor);
        let snapshot = decompressed(&golden(minor).join("snapshot.db.zst"));
        // Cut anywhere, the scan sees the same.
        for piece in [1, 511, 4096, 5000, snapshot.len()] {
            let mut scan = SnapshotScan::new(5);
            snapshot.chunks(piece).for_each(|piece| scan.push(piece).unwrap());
            let scanned = scan.finish().unwrap();
            assert_eq!(scanned.revision, expected["revision"].as_i64().unwrap());
            assert_eq!((scanned.compaction.scheduled, scanned.compaction.finished), (14, 14));
            assert_eq!(scanned.bytes, snapshot.len() as u64);
        }
        let mut scan = SnapshotScan::new(1_000_000);
        scan.push(&snapshot).unwrap();
        assert!(scan.finish().is_err(), "{minor}: a snapshot older than the member was taken");
        let db = Db::open(&snapshot).unwrap();
        assert_eq!(
            u64::from(backend_hash(&db, &[]).unwrap()),
            expected["snapshotStatusHash"].as_u64().unwrap(),
            "{minor}"
        );
    }
}

/// What etcd's own restore makes is sound to us, and its log is ours to the byte where its writer spells zeros out.
#[test]
fn restored_directories_are_sound_and_our_log_is_theirs() {
    let initial = "m1=http://10.0.0.1:2380,m2=http://10.0.0.2:2380,m2=http://10.0.0.2:2381";
    let cluster = NewCluster::parse(initial, "golden").unwrap();
    for (minor, _) in VERSIONS {
        let dir = lay_out(&golden(minor).join("restored"));
        let verdict = verify(dir.path(), &Verify::default()).unwrap().unwrap();
        let worst = verdict.findings.iter().find(|finding| !finding.what.contains("consistent_index"));
        assert_eq!(worst, None, "{minor}");
        let (member, id) = verdict.member.unwrap();
        assert_eq!((member, id), (cluster.member("m1").unwrap().id, cluster.id()), "{minor}");
        let log = wal::read(&dir.path().join("member/wal")).unwrap();
        let contexts =
            |changes: Vec<ConfChange>| changes.iter().map(|change| change.context().to_vec()).collect::<Vec<_>>();
        let theirs = log.member_changes.iter().map(|change| change.change.clone()).collect();
        assert_eq!(contexts(theirs), contexts(cluster.conf_changes()), "{minor}");
        if ["3.5", "3.6"].contains(&minor) {
            let metadata = Metadata { node_id: Some(member.0), cluster_id: Some(id.0) };
            let state = HardState { term: Some(1), vote: Some(cluster.members()[0].id.0), commit: Some(2) };
            let ours = wal::first_segment(metadata, &cluster.conf_changes(), state, &cluster.conf_state());
            let theirs = std::fs::read(dir.path().join("member/wal/0000000000000000-0000000000000000.wal")).unwrap();
            assert_eq!(ours, theirs[..ours.len()], "{minor}");
            assert!(theirs[ours.len()..].iter().all(|byte| *byte == 0), "{minor}: their log goes on");
        }
        let name = "member/snap/0000000000000001-0000000000000002.snap";
        let theirs = snap::decode(&std::fs::read(dir.path().join(name)).unwrap()).unwrap();
        assert_eq!(
            snap::member_ids(&theirs).unwrap(),
            cluster.members().iter().map(|member| member.id.0).collect::<Vec<_>>()
        );
    }
}

/// Every byte of a real database changed: an error, a finding, or rows that are still a history.
#[test]
fn damage_in_a_real_database_never_panics() {
    for (minor, _) in VERSIONS {
        let mut whole = decompressed(&golden(minor).join("live/snap/db.zst"));
        // etcd grows the file by 16 MiB at a time.
        let size = Db::open(&whole).unwrap().meta().file_size();
        whole.truncate(usize::try_from(size).unwrap());
        let options = Verify { hash: Some(WantHash::Current(HashRules::of(minor))), compaction: None };
        let sound = verify_database(&Db::open(&whole).unwrap(), &Verify::default()).unwrap().0;
        let mut unnoticed = 0;
        for at in (0..whole.len()).filter(|at| whole[*at] != 0 || at % 61 == 0) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x81;
            let Ok(db) = Db::open(&damaged) else { continue };
            if let Ok((summary, findings)) = verify_database(&db, &options)
                && findings.is_empty()
            {
                // A damaged newer meta makes bbolt, and us, open the commit before it.
                assert!(summary.revision <= sound.revision, "{minor} byte {at}");
                unnoticed += 1;
            }
        }
        assert!(unnoticed > 0, "bbolt has no checksum over free pages and values");
    }
}

#[test]
fn minors_are_known_by_both_spellings() {
    for (minor, version) in VERSIONS {
        assert_eq!(Minor::parse(minor).unwrap(), Minor::parse(version).unwrap());
    }
    assert!(["3", "3.3", "3.8.0", "4.4", "", "x"].iter().all(|version| Minor::parse(version).is_err()));
}
