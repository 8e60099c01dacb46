//! What an etcd holds, to be compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, GetOptions, SortOrder, SortTarget};
use etcd_format::bolt::Db;
use etcd_format::mvcc::{self, KeyValue, RowKey};

use crate::etcd::Member;

/// A key with everything etcd says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Vec<u8>,
    /// Create revision, mod revision, version, lease.
    pub numbers: (i64, i64, i64, i64),
}

/// Every key with what it holds.
pub type Keys = BTreeMap<Vec<u8>, Entry>;

/// The state at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The revision.
    pub revision: i64,
    /// Every key.
    pub keys: Keys,
    /// HashKV and the compaction revision it was taken at.
    pub hash: (u32, i64),
    /// Granted TTL of every lease.
    pub leases: BTreeMap<i64, i64>,
}

/// Reads everything at the current revision.
pub async fn read(client: &mut Client) -> Result<State> {
    let revision = client.status().await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    let keys = keys_at(client, revision).await?;
    // Revision 0 is the current one; old releases refuse to hash at a revision that is exactly the compaction.
    let hash = client.hash_kv(0).await?;
    let hash = (hash.hash(), hash.compact_version().max(0));
    let ids: Vec<i64> = client.leases().await?.leases().iter().map(etcd_client::LeaseStatus::id).collect();
    let mut leases = BTreeMap::new();
    for id in ids {
        let lease = client.lease_time_to_live(id, None).await?;
        leases.insert(id, lease.granted_ttl());
    }
    Ok(State { revision, keys, hash, leases })
}

/// Reads every key as it was at a revision.
pub async fn keys_at(client: &mut Client, revision: i64) -> Result<Keys> {
    let mut keys = BTreeMap::new();
    let mut from = vec![0];
    let mut kv = client.kv_client().max_decoding_message_size(1 << 30);
    loop {
        let options = GetOptions::new()
            .with_from_key()
            .with_revision(revision)
            .with_limit(2000)
            .with_sort(SortTarget::Key, SortOrder::Ascend);
        let page = kv.get(from.clone(), Some(options)).await?;
        for kv in page.kvs() {
            let numbers = (kv.create_revision(), kv.mod_revision(), kv.version(), kv.lease());
            keys.insert(kv.key().to_vec(), Entry { value: kv.value().to_vec(), numbers });
            from = kv.key().to_vec();
            from.push(0);
        }
        if !page.more() {
            return Ok(keys);
        }
    }
}

/// Reads what a data directory holds without an etcd: current revision, keys, and the leases that have a record.
pub fn of_directory(data_dir: &Path) -> Result<(i64, Keys, BTreeSet<i64>)> {
    let db = Db::open(std::fs::File::open(data_dir.join("member/snap/db"))?)?;
    let (mut revision, mut keys) = (1, BTreeMap::new());
    for (row, value) in db.rows(mvcc::KEY_BUCKET)? {
        let row = RowKey::decode(&row).context("a row key")?;
        let kv = KeyValue::decode(&value)?;
        revision = row.main;
        if row.tombstone {
            keys.remove(kv.key);
        } else {
            let numbers = (kv.create_revision, kv.mod_revision, kv.version, kv.lease);
            keys.insert(kv.key.to_vec(), Entry { value: kv.value.to_vec(), numbers });
        }
    }
    let lease = |(key, _): (Vec<u8>, _)| Ok(i64::from_be_bytes(key.as_slice().try_into().context("a lease id")?));
    let leases = db.rows(mvcc::LEASE_BUCKET)?.into_iter().map(lease).collect::<Result<_>>()?;
    Ok((revision, keys, leases))
}

/// Starts etcd on a member's data, reads everything and stops it.
pub async fn of(member: &Member) -> Result<State> {
    let mut etcd = member.start().await?;
    let state = read(&mut etcd.client().await?).await?;
    etcd.stop()?;
    Ok(state)
}

/// Fails where two states differ in anything, saying where. A lease that a full snapshot had and that ended since comes back
/// without keys and ends again; the workload says which those may be.
pub fn same(expected: &State, found: &State) -> Result<()> {
    same_keys(expected, found)?;
    let mut leases = found.leases.clone();
    leases.retain(|id, _| !crate::workload::ends(*id) || expected.leases.contains_key(id));
    ensure!(expected.leases == leases, "leases {:?} instead of {:?}", found.leases, expected.leases);
    ensure!(expected.hash == found.hash, "HashKV {:?} instead of {:?}", found.hash, expected.hash);
    Ok(())
}

/// The same of revision and keys alone.
pub fn same_keys(expected: &State, found: &State) -> Result<()> {
    ensure!(expected.revision == found.revision, "revision {} instead of {}", found.revision, expected.revision);
    for (key, entry) in &expected.keys {
        let there = found.keys.get(key);
        ensure!(
            there == Some(entry),
            "key {} is {:?} instead of {:?}",
            key.escape_ascii(),
            there.map(|entry| (entry.value.len(), entry.numbers)),
            (entry.value.len(), entry.numbers)
        );
    }
    ensure!(expected.keys.len() == found.keys.len(), "{} keys instead of {}", found.keys.len(), expected.keys.len());
    Ok(())
}
