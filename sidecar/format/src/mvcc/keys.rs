//! Remembering keys in little memory.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::BuildHasher;

/// 64-bit fingerprints of keys, seeded at random so that nobody can choose keys that collide.
#[derive(Debug, Default, Clone)]
pub struct Fingerprints(RandomState);

impl Fingerprints {
    /// The fingerprint of a key; never 0.
    pub fn of(&self, key: &[u8]) -> u64 {
        self.0.hash_one(key).max(1)
    }
}

/// Fingerprint to a number, open addressing, of bounded size.
///
/// When it would outgrow its bound it keeps only one partition of the fingerprints, half as large, and says so; the
/// caller then makes one pass for each partition.
#[derive(Debug)]
pub(crate) struct KeyTable {
    slots: Vec<(u64, u64)>,
    used: usize,
    most: usize,
    partition: u64,
    partitions: u64,
}

impl KeyTable {
    /// Bound of one table: 2^21 slots of 16 bytes, 32 MiB.
    pub const MOST_SLOTS: usize = 1 << 21;

    pub fn new(partition: u64, partitions: u64, most: usize) -> Self {
        Self { slots: vec![(0, 0); most.min(1 << 10)], used: 0, most, partition, partitions }
    }

    /// Into how many partitions the keys had to be cut.
    pub fn partitions(&self) -> u64 {
        self.partitions
    }

    /// Whether this pass is about that key. The low bits choose the slot, the high ones the partition.
    pub fn covers(&self, fingerprint: u64) -> bool {
        (fingerprint >> 32) % self.partitions == self.partition
    }

    fn slot(&self, fingerprint: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut index = fingerprint as usize & mask;
        while self.slots.get(index).is_some_and(|slot| slot.0 != 0 && slot.0 != fingerprint) {
            index = (index + 1) & mask;
        }
        index
    }

    pub fn get(&self, fingerprint: u64) -> Option<u64> {
        self.slots.get(self.slot(fingerprint)).filter(|slot| slot.0 != 0).map(|slot| slot.1)
    }

    /// Sets the value of a covered key.
    pub fn set(&mut self, fingerprint: u64, value: u64) {
        if self.used * 4 >= self.slots.len() * 3 {
            self.grow();
            if !self.covers(fingerprint) {
                return;
            }
        }
        let index = self.slot(fingerprint);
        if let Some(slot) = self.slots.get_mut(index) {
            self.used += usize::from(slot.0 == 0);
            *slot = (fingerprint, value);
        }
    }

    fn grow(&mut self) {
        let size = (self.slots.len() * 2).min(self.most);
        if size == self.slots.len() {
            self.partitions *= 2;
        }
        let old = std::mem::replace(&mut self.slots, vec![(0, 0); size]);
        self.used = 0;
        for (fingerprint, value) in old {
            if fingerprint != 0 && self.covers(fingerprint) {
                let index = self.slot(fingerprint);
                if let Some(slot) = self.slots.get_mut(index) {
                    *slot = (fingerprint, value);
                    self.used += 1;
                }
            }
        }
        // A partition that did not shrink (all fingerprints alike) is cut again.
        if self.used * 4 >= self.slots.len() * 3 && self.partitions < 1 << 20 {
            self.grow();
        }
    }

    pub fn values(&self) -> impl Iterator<Item = u64> {
        self.slots.iter().filter(|slot| slot.0 != 0).map(|slot| slot.1)
    }
}

/// Finds the leases that live keys need but that have no record. Rows are shown to it in order.
#[derive(Debug)]
pub struct LeaseTracker {
    recorded: HashSet<i64>,
    /// Live keys whose lease has no record.
    dangling: HashMap<u64, i64>,
}

impl LeaseTracker {
    /// `recorded` are the leases that have a record.
    pub fn new(recorded: HashSet<i64>) -> Self {
        Self { recorded, dangling: HashMap::new() }
    }

    /// Shows the next row of a key: its lease, or 0 when it has none or deletes the key.
    pub fn observe(&mut self, fingerprint: u64, lease: i64) {
        if lease != 0 && !self.recorded.contains(&lease) {
            self.dangling.insert(fingerprint, lease);
        } else if !self.dangling.is_empty() {
            self.dangling.remove(&fingerprint);
        }
    }

    /// Whether a lease has a record.
    pub fn is_recorded(&self, lease: i64) -> bool {
        self.recorded.contains(&lease)
    }

    /// Leases that a live key refers to and that have no record.
    pub fn missing(&self) -> BTreeSet<i64> {
        self.dangling.values().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_overflows_keeps_one_partition_and_says_so() {
        let fingerprints = Fingerprints::default();
        let all: Vec<u64> = (0..5000u32).map(|n| fingerprints.of(&n.to_be_bytes())).collect();
        let mut seen = 0;
        let mut partition = 0;
        loop {
            let mut table = KeyTable::new(partition, if partition == 0 { 1 } else { 4 }, 1 << 11);
            for fingerprint in &all {
                if table.covers(*fingerprint) {
                    table.set(*fingerprint, fingerprint ^ 1);
                }
            }
            assert_eq!(table.partitions(), 4);
            seen += all.iter().filter(|f| table.covers(**f) && table.get(**f) == Some(**f ^ 1)).count();
            partition += 1;
            if partition == table.partitions() {
                break;
            }
        }
        assert_eq!(seen, all.len());
    }

    #[test]
    fn only_leases_of_live_keys_are_missing() {
        let mut tracker = LeaseTracker::new([7].into());
        tracker.observe(1, 7);
        tracker.observe(2, 8);
        tracker.observe(3, 9);
        tracker.observe(3, 0);
        assert_eq!(tracker.missing(), [8].into());
    }
}
