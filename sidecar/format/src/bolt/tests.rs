use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Buckets = BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>;

fn build(buckets: &Buckets, page_size: u32) -> Vec<u8> {
    let mut builder = Builder::create(Vec::new(), page_size).unwrap();
    for (name, rows) in buckets {
        builder.start(name).unwrap();
        for (key, value) in rows {
            builder.push(key, value).unwrap();
        }
    }
    seal(builder)
}

fn seal(builder: Builder<Vec<u8>>) -> Vec<u8> {
    let (finished, mut file) = builder.finish().unwrap();
    let metas = finished.metas().concat();
    file[..metas.len()].copy_from_slice(&metas);
    assert_eq!(file.len() as u64, finished.file_size());
    file
}

fn read(file: &[u8]) -> Result<Buckets> {
    let db = Db::open(file)?;
    let visited = db.check_small_buckets(&[], Visited::new(db.meta()))?;
    visited.check_free_pages(db.meta())?;
    let mut buckets = Buckets::new();
    let mut root = db.root();
    while let Some(row) = root.next()? {
        buckets.insert(row.key.to_vec(), db.rows(row.key)?.into_iter().collect());
    }
    Ok(buckets)
}

fn rows() -> impl Strategy<Value = BTreeMap<Vec<u8>, Vec<u8>>> {
    let key =
        prop_oneof![4 => prop::collection::vec(any::<u8>(), 1..20), 1 => prop::collection::vec(any::<u8>(), 1..900)];
    let value = prop_oneof![8 => 0..100usize, 1 => 0..5000usize].prop_map(|size| vec![b'v'; size]);
    prop::collection::btree_map(key, value, 0..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_built_is_read(a in rows(), b in rows(), shift in 0..7u32) {
        let buckets: Buckets = [(b"a".to_vec(), a), (b"b".to_vec(), b), (b"empty".to_vec(), BTreeMap::new())].into();
        prop_assert_eq!(read(&build(&buckets, MIN_PAGE_SIZE << shift)).unwrap(), buckets);
    }

    #[test]
    fn appended_rows_follow_those_that_were_there(all in rows(), other in rows(), split in 0..300usize, shift in 0..4u32) {
        let (base, more): (Vec<_>, Vec<_>) = all.iter().enumerate().partition(|(index, _)| *index < split);
        let base: BTreeMap<_, _> = base.into_iter().map(|(_, (k, v))| (k.clone(), v.clone())).collect();
        let buckets: Buckets = [(b"key".to_vec(), base), (b"other".to_vec(), other.clone())].into();
        let mut file = build(&buckets, MIN_PAGE_SIZE << shift);
        let tail = {
            let db = Db::open(&file).unwrap();
            let mut builder = Builder::append(&db, Vec::new()).unwrap();
            builder.resume(&db, b"key").unwrap();
            for (_, (key, value)) in more {
                builder.push(key, value).unwrap();
            }
            builder.start(b"small").unwrap();
            builder.push(b"k", b"v").unwrap();
            builder.finish().unwrap()
        };
        file.extend_from_slice(&tail.1);
        let metas = tail.0.metas().concat();
        file[..metas.len()].copy_from_slice(&metas);
        let expected: Buckets =
            [(b"key".to_vec(), all), (b"other".to_vec(), other), (b"small".to_vec(), [(b"k".to_vec(), b"v".to_vec())].into())].into();
        prop_assert_eq!(read(&file).unwrap(), expected);
    }

    #[test]
    fn seek_finds_the_first_row_at_or_above(all in rows(), key in prop::collection::vec(any::<u8>(), 1..20)) {
        let file = build(&[(b"a".to_vec(), all.clone())].into(), 1024);
        let db = Db::open(&file).unwrap();
        let mut cursor = db.cursor(&db.bucket(b"a").unwrap().unwrap());
        cursor.seek(&key).unwrap();
        let mut found = Vec::new();
        while let Some(row) = cursor.next().unwrap() {
            found.push(row.key.to_vec());
        }
        prop_assert_eq!(found, all.range(key..).map(|(k, _)| k.clone()).collect::<Vec<_>>());
        let last = db.last(&db.bucket(b"a").unwrap().unwrap()).unwrap();
        prop_assert_eq!(last, all.into_iter().next_back());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        let _ = read(&bytes);
    }
}

/// Many rows, small pages: several levels, and at every count the last branch page of each level must have two children.
#[test]
fn no_branch_page_has_a_single_child_at_any_size() {
    for count in (0..400u32).chain([4000, 4001, 4002, 4003]) {
        let rows = (0..count).map(|n| (n.to_be_bytes().to_vec(), vec![b'x'; 400])).collect::<BTreeMap<_, _>>();
        let buckets: Buckets = [(b"a".to_vec(), rows)].into();
        assert_eq!(read(&build(&buckets, 1024)).unwrap(), buckets, "{count} rows");
    }
}

/// Every byte changed, every length cut: an error, or the same rows.
#[test]
fn damage_is_noticed_or_harmless() {
    let rows = (0..40u32).map(|n| (n.to_be_bytes().to_vec(), vec![n as u8; 60])).collect::<BTreeMap<_, _>>();
    let buckets: Buckets = [(b"a".to_vec(), rows), (b"b".to_vec(), [(b"k".to_vec(), b"v".to_vec())].into())].into();
    let file = build(&buckets, 1024);
    for at in 0..file.len() {
        let mut damaged = file.clone();
        damaged[at] ^= 0x55;
        // Values carry no checksum in bbolt: structure must hold, content is for the layers above.
        if let Ok(read) = read(&damaged) {
            assert_eq!(read.values().map(BTreeMap::len).sum::<usize>(), 41, "byte {at}");
        }
        assert!(super::Db::open(&file[..at]).is_err(), "cut at {at}");
    }
}

/// No memory is taken for pages that a header claims and nothing fills.
#[test]
fn a_page_that_says_to_be_large_is_refused() {
    let rows = (0..9000u32).map(|n| (n.to_be_bytes().to_vec(), vec![b'x'; 60])).collect::<BTreeMap<_, _>>();
    let large: Buckets = [(b"a".to_vec(), [(b"k".to_vec(), vec![b'v'; 600_000])].into())].into();
    assert_eq!(read(&build(&large, 1024)).unwrap(), large, "one that is large is read");
    let mut file = build(&[(b"a".to_vec(), rows)].into(), 1024);
    let mut damaged = build(&large, 1024);
    let leaf = (2..700).find(|page| damaged[page * 1024 + 12..][..2] != [0, 0]).unwrap();
    damaged[leaf * 1024 + 11] = 0xff;
    assert!(read(&damaged).unwrap_err().is_corruption());
    let leaf = (2..100).find(|page| file[page * 1024 + 8] == 2).unwrap();
    file[leaf * 1024 + 12..][..4].copy_from_slice(&400u32.to_le_bytes());
    let refused = read(&file).unwrap_err();
    assert!(refused.is_corruption() && refused.to_string().contains("its content needs"), "{refused}");
}

#[test]
fn rows_that_do_not_ascend_are_refused() {
    let mut builder = Builder::create(Vec::new(), 4096).unwrap();
    assert!(builder.push(b"k", b"").is_err());
    builder.start(b"a").unwrap();
    builder.push(b"k", b"").unwrap();
    assert!(builder.push(b"k", b"").is_err());
    assert!(builder.push(b"", b"").is_err());
}

#[test]
fn the_older_meta_serves_when_the_newer_is_torn() {
    let buckets: Buckets = [(b"a".to_vec(), [(b"k".to_vec(), b"v".to_vec())].into())].into();
    let mut file = build(&buckets, 4096);
    file[20] ^= 1;
    assert_eq!(read(&file).unwrap(), buckets);
    file[4096 + 20] ^= 1;
    assert!(read(&file).unwrap_err().is_corruption());
}
