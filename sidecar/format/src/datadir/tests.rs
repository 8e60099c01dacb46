use std::cell::Cell;
use std::fs::File;
use std::io::{self, Cursor};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;
use crate::bolt::Builder;
use crate::membership::NewCluster;
use crate::mvcc::{self, HashRules, KeyValue, RowKey};

/// etcd's snapshot of a small store: `count` puts, each in a revision of its own.
fn snapshot(count: i64) -> Vec<u8> {
    let mut builder = Builder::create(Vec::new(), 4096).unwrap();
    builder.start(mvcc::KEY_BUCKET).unwrap();
    for main in 2..2 + count {
        let mut value = Vec::new();
        let key = format!("key {main}");
        KeyValue {
            key: key.as_bytes(),
            create_revision: main,
            mod_revision: main,
            version: 1,
            value: &[b'v'; 90],
            lease: 0,
        }
        .encode(&mut value);
        builder.push(&RowKey::first_of(main), &value).unwrap();
    }
    builder.start(mvcc::META_BUCKET).unwrap();
    builder.push(mvcc::CONSISTENT_INDEX, &100u64.to_be_bytes()).unwrap();
    builder.push(mvcc::TERM, &4u64.to_be_bytes()).unwrap();
    let (finished, mut file) = builder.finish().unwrap();
    let metas = finished.metas().concat();
    file[..metas.len()].copy_from_slice(&metas);
    let digest = Sha256::digest(&file);
    file.extend_from_slice(&digest);
    file
}

fn spec() -> Spec {
    Spec {
        cluster: NewCluster::parse("default=http://localhost:2380", "etcd-cluster").unwrap(),
        target: None,
        compact_revision: 0,
        lease_ttls: [(7, 100)].into(),
        live_leases: [7].into(),
        bump_revision: 0,
    }
}

/// Members that were set aside.
fn kept_names(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let entries = entries.map(|entry| entry.unwrap().path());
    entries.filter(|path| path.to_string_lossy().contains("member.replaced-")).collect()
}

/// Their revisions.
fn kept(dir: &Path) -> Vec<i64> {
    kept_names(dir)
        .into_iter()
        .map(|path| {
            Layout::of_member(path).verify(&Verify::default()).unwrap().summary.map_or(0, |summary| summary.revision)
        })
        .collect()
}

fn restore(disk: &impl Disk, dir: &Path, snapshot: &[u8], replace: bool) -> crate::Result<Restored> {
    restore_as(disk, dir, snapshot, replace, "stamp")
}

/// A whole restore: a snapshot, one more revision with a leased key, and the swap.
fn restore_as(disk: &impl Disk, dir: &Path, snapshot: &[u8], replace: bool, stamp: &str) -> crate::Result<Restored> {
    let (staged, restored) = stage(disk, dir, snapshot, replace)?;
    Staged::commit(vec![staged], stamp)?;
    Ok(restored)
}

/// All of it but the swap.
fn stage<D: Disk>(disk: &D, dir: &Path, snapshot: &[u8], replace: bool) -> crate::Result<(Staged<D>, Restored)> {
    let staged = Staged::create(disk.clone(), dir, replace)?;
    let mut tail = staged.write_base(&mut Cursor::new(snapshot), true, &mut |_| {})?.into_tail()?;
    let main = tail.last_revision() + 1;
    assert_eq!(tail.revision(main)?, Revision::Next);
    let mut value = Vec::new();
    KeyValue { key: b"more", create_revision: main, mod_revision: main, version: 1, value: b"v", lease: 7 }
        .encode(&mut value);
    tail.change(Change::Put(&value))?;
    let restored = tail.finish(&spec())?;
    staged.write_log(&spec().cluster, "default")?;
    staged.sync_database()?;
    Ok((staged, restored))
}

fn verdict(dir: &Path) -> Option<Verdict> {
    verify(dir, &Verify { hash: Some(WantHash::Current(HashRules::of("3.6.0"))), compaction: None }).unwrap()
}

#[test]
fn a_restored_directory_is_sound_and_has_everything() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a/b");
    let restored = restore(&RealDisk, &target, &snapshot(50), false).unwrap();
    assert_eq!((restored.base_revision, restored.revision, restored.events), (51, 52, 1));
    assert_eq!(restored.added_leases, [7].into());
    assert!(restored.guessed_leases.is_empty());
    let verdict = verdict(&target).unwrap();
    assert_eq!(verdict.findings, vec![]);
    let summary = verdict.summary.unwrap();
    assert_eq!((summary.revision, summary.live_keys, summary.leases, summary.consistent_index), (52, 51, 1, 1));
}

#[test]
fn a_snapshot_that_is_not_whole_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let whole = snapshot(50);
    let target = dir.path().join("new/data");
    for cut in [0, 1, 1000, 4096, 8192, whole.len() - 33, whole.len() - 32, whole.len() - 1] {
        restore(&RealDisk, &target, &whole[..cut], false).unwrap_err();
        assert!(!dir.path().join("new").exists(), "cut at {cut}");
    }
    let mut flipped = whole.clone();
    for at in (0..whole.len()).step_by(97) {
        flipped[at] ^= 0x40;
        assert!(restore(&RealDisk, &target, &flipped, false).is_err(), "byte {at}");
        flipped[at] ^= 0x40;
    }
    assert!(!dir.path().join("new").exists());
}

#[test]
fn a_gap_in_revisions_is_refused_and_known_ones_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let staged = Staged::create(RealDisk, &dir.path().join("data"), false).unwrap();
    let mut tail = staged.write_base(&mut Cursor::new(snapshot(5)), true, &mut |_| {}).unwrap().into_tail().unwrap();
    assert_eq!(tail.revision(6).unwrap(), Revision::Known);
    assert!(matches!(tail.revision(8), Err(crate::Error::Gap { have: 6, next: 8 })));
    assert_eq!(tail.revision(7).unwrap(), Revision::Next);
    assert!(tail.change(Change::Put(b"")).is_err());
    assert!(tail.change(Change::Delete(b"")).is_err());
}

/// A disk that fails after some operations: for good, because its machine loses power and with it what was not synced, or
/// once.
#[derive(Clone)]
struct FailingDisk {
    left: Arc<AtomicU64>,
    once: bool,
    unsynced: Arc<Mutex<Vec<(u64, File)>>>,
}

impl FailingDisk {
    fn after(operations: u64) -> Self {
        Self { left: Arc::new(operations.into()), once: false, unsynced: Arc::default() }
    }

    fn step(&self) -> io::Result<()> {
        let after = if self.once { u64::MAX } else { 0 };
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_err() {
            self.left.store(after, Ordering::SeqCst);
        }
        left.map(drop).map_err(|_| io::Error::other("power is gone"))
    }

    fn inode(file: &File) -> u64 {
        use std::os::unix::fs::MetadataExt;
        file.metadata().map_or(0, |metadata| metadata.ino())
    }

    /// What was written and not synced is gone.
    fn lose_unsynced(&self) {
        for (_, file) in self.unsynced.lock().unwrap().drain(..) {
            file.set_len(0).unwrap();
        }
    }
}

impl Disk for FailingDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.step()?;
        RealDisk.create_file(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        self.unsynced.lock().unwrap().push((Self::inode(file), file.try_clone()?));
        RealDisk.write_at(file, bytes, offset)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.step()?;
        let inode = Self::inode(file);
        self.unsynced.lock().unwrap().retain(|(unsynced, _)| *unsynced != inode);
        RealDisk.sync_file(file)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.exchange(a, b)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.remove_dir_all(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        RealDisk.remove_dir(path)
    }
}

/// After every number of disk operations: the directory has the old member or the new one, whole, and the next restore
/// works.
#[test]
fn power_loss_at_any_operation_leaves_the_old_member_or_the_new_one() {
    for had_one in [false, true] {
        let finished = Cell::new(false);
        let mut operations = 0;
        let (mut old, mut new) = (0, 0);
        while !finished.get() {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("data");
            if had_one {
                restore(&RealDisk, &target, &snapshot(3), false).unwrap();
            }
            let disk = FailingDisk::after(operations);
            finished.set(restore(&disk, &target, &snapshot(50), had_one).is_ok());
            disk.lose_unsynced();
            let there = if target.exists() { verdict(&target) } else { None };
            match there.map(|verdict| (verdict.findings, verdict.summary.map(|summary| summary.revision))) {
                None => assert!(!had_one, "the old member is gone after {operations} operations"),
                Some((findings, revision)) => {
                    assert_eq!(findings, vec![], "after {operations} operations");
                    match revision {
                        Some(5) if had_one => old += 1,
                        Some(52) => new += 1,
                        other => panic!("revision {other:?} after {operations} operations"),
                    }
                }
            }
            // Whatever is left, the next restore finds its way, and what was replaced is kept.
            if !finished.get() {
                let replace = target.join("member").exists();
                restore_as(&RealDisk, &target, &snapshot(50), replace, "again").unwrap();
                assert_eq!(verdict(&target).unwrap().findings, vec![]);
                assert!(!target.join("member.restoring").exists());
            }
            assert_eq!(kept(&target).contains(&5), had_one, "the old member is lost after {operations} operations");
            operations += 1;
        }
        assert!(operations > 15 && new >= 1 && (old > 10 || !had_one), "{operations} operations, {old} old, {new} new");
    }
}

/// Several members are put in place all or none, whichever operation fails.
#[test]
fn members_are_committed_together() {
    for had_one in [false, true] {
        let mut operations = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            let targets = ["a", "b", "c"].map(|name| dir.path().join(name));
            if had_one {
                for target in &targets {
                    restore(&RealDisk, target, &snapshot(3), false).unwrap();
                }
            }
            let disk = FailingDisk { once: true, ..FailingDisk::after(u64::MAX) };
            let stage = |target| stage(&disk, target, &snapshot(50), had_one).unwrap().0;
            let members = targets.iter().map(|target| stage(target)).collect();
            disk.left.store(operations, Ordering::SeqCst);
            let committed = Staged::commit(members, "stamp");
            for target in &targets {
                let found = if target.exists() { verdict(target) } else { None };
                let revision = found.map(|verdict| verdict.summary.unwrap().revision);
                let expected = if committed.is_ok() { Some(52) } else { had_one.then_some(5) };
                assert_eq!(revision, expected, "{} after {operations} operations", target.display());
                assert!(committed.is_ok() || kept_names(target).is_empty());
            }
            if committed.is_ok() {
                break;
            }
            operations += 1;
        }
        assert!(operations > 15, "{operations} operations");
    }
}

/// Every byte of every file changed, every length cut: a finding, an error, or the same content.
#[test]
fn damage_anywhere_in_a_directory_is_noticed_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    restore(&RealDisk, dir.path(), &snapshot(12), false).unwrap();
    let whole = verdict(dir.path()).unwrap();
    let mut files = Vec::new();
    for sub in ["wal", "snap"] {
        for entry in std::fs::read_dir(dir.path().join("member").join(sub)).unwrap() {
            files.push(entry.unwrap().path());
        }
    }
    assert_eq!(files.len(), 3);
    let check = |what: &str| match verify(
        dir.path(),
        &Verify { hash: Some(WantHash::Current(HashRules::of("3.6.0"))), compaction: None },
    ) {
        Ok(Some(verdict)) if verdict.severity().is_none() => {
            let (found, expected) = (verdict.summary.unwrap(), whole.summary.clone().unwrap());
            // Pages carry no checksum in bbolt: a change within a value or a key shows in the hash alone.
            let same = found.revision == expected.revision && found.rows == expected.rows;
            assert!(same, "{what}: {found:?}");
        }
        _ => {}
    };
    for path in files {
        let bytes = std::fs::read(&path).unwrap();
        let is_db = path.ends_with("db");
        // Zeros in the padding of pages are many and alike.
        for at in (0..bytes.len()).filter(|at| !is_db || bytes[*at] != 0 || at % 7 == 0) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x11;
            std::fs::write(&path, &damaged).unwrap();
            check(&format!("{} byte {at}", path.display()));
        }
        for length in (0..bytes.len()).step_by(if is_db { 61 } else { 1 }) {
            std::fs::write(&path, &bytes[..length]).unwrap();
            check(&format!("{} cut at {length}", path.display()));
        }
        std::fs::write(&path, &bytes).unwrap();
    }
    assert_eq!(verdict(dir.path()).unwrap(), whole);
}

/// What etcd leaves in the first moments of its life, and what is told of it.
#[test]
fn what_has_hardly_begun_is_told_from_what_has() {
    use crate::wal::SegmentWriter;
    use proto::Message;
    use proto::disk::{ConfChange, HardState, Metadata, WalSnapshot};

    type Log = Option<Vec<u8>>;
    type Case<'c> = (Option<&'c [u8]>, &'c Log, bool, bool, Severity, u64);

    fn segment(build: fn(&mut SegmentWriter)) -> Vec<u8> {
        let mut segment = SegmentWriter::begin(Metadata { node_id: Some(1), cluster_id: Some(2) });
        build(&mut segment);
        segment.out
    }
    fn joins(segment: &mut SegmentWriter, commit: u64) {
        let change = ConfChange { id: Some(0), r#type: Some(0), node_id: Some(1), context: Some(b"{}".to_vec()) };
        segment.entry(crate::wal::ENTRY_CONF_CHANGE, (1, 1), change.encode_to_vec());
        segment.state(HardState { term: Some(1), vote: Some(1), commit: Some(commit) });
    }
    fn put(segment: &mut SegmentWriter, index: u64) {
        // A put, as raft is asked for it.
        segment.entry(0, (index, 2), crate::wal::request(4));
    }
    fn received(segment: &mut SegmentWriter) {
        segment.state(HardState { term: Some(3), vote: Some(0), commit: Some(500) });
        segment.snapshot(&WalSnapshot { index: Some(500), term: Some(3), conf_state: None });
    }
    let mut builder = Builder::create(Vec::new(), 4096).unwrap();
    for bucket in [mvcc::KEY_BUCKET, mvcc::META_BUCKET] {
        builder.start(bucket).unwrap();
    }
    let (finished, mut young) = builder.finish().unwrap();
    let metas = finished.metas().concat();
    young[..metas.len()].copy_from_slice(&metas);

    let begun: Log = Some(segment(|_| {}));
    let uncommitted: Log = Some(segment(|segment| joins(segment, 0)));
    let committed: Log = Some(segment(|segment| joins(segment, 1)));
    let written: Log = Some(segment(|segment| {
        joins(segment, 1);
        put(segment, 2);
        put(segment, 3);
    }));
    let of_leader: Log = Some(segment(received));
    let (none, empty): (Option<&[u8]>, Option<&[u8]>) = (None, Some(&[]));
    let young = Some(young.as_slice());
    let (corrupt, repairable) = (Severity::Corrupt, Severity::Repairable);
    // Database, log, whether the leader's database lies beside; whether it never ran, the worst finding, entries to apply.
    let cases: [Case<'_>; 13] = [
        (none, &None, false, true, corrupt, 0),
        (empty, &None, false, true, corrupt, 0),
        (young, &None, false, true, corrupt, 0),
        (none, &begun, false, true, corrupt, 0),
        (young, &begun, false, true, corrupt, 0),
        (young, &uncommitted, false, true, repairable, 0),
        (none, &committed, false, false, corrupt, 0),
        (empty, &committed, false, false, repairable, 0),
        (young, &committed, false, false, repairable, 0),
        (young, &written, false, false, repairable, 2),
        (young, &of_leader, false, false, corrupt, 0),
        (young, &of_leader, true, false, repairable, 0),
        (none, &of_leader, false, false, corrupt, 0),
    ];
    for (number, (db, log, has_received, never_ran, severity, unapplied)) in cases.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let member = dir.path().join("member");
        std::fs::create_dir_all(member.join("snap")).unwrap();
        std::fs::create_dir_all(member.join("wal")).unwrap();
        if let Some(db) = db {
            std::fs::write(member.join("snap/db"), db).unwrap();
        }
        if let Some(log) = log {
            std::fs::write(member.join("wal/0000000000000000-0000000000000000.wal"), log).unwrap();
        }
        if has_received {
            std::fs::write(member.join(format!("snap/{:016x}.snap.db", 500)), "what the leader sent").unwrap();
        }
        let verdict = verify(dir.path(), &Verify::default()).unwrap().unwrap();
        assert_eq!(
            (verdict.never_ran, verdict.severity(), verdict.unapplied),
            (never_ran, Some(severity), unapplied),
            "case {number}: {verdict:?}"
        );
    }
}
