//! One row: its key and its value.

use crate::cursor::{put_bytes_field, put_varint_field, u64_be};
use crate::wire::{Field, Fields};
use crate::{Error, Result};

/// Key of a row.
///
/// | offset | type | field |
/// |---|---|---|
/// | 0 | u64 big-endian | main revision, top bit clear |
/// | 8 | u8 | `_` |
/// | 9 | u64 big-endian | sub revision, top bit clear |
/// | 17 | u8 | `t`, only of a tombstone |
///
/// Byte order and the order of this type agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// Revision of the transaction.
    pub main: i64,
    /// Position of the change in its transaction, from 0.
    pub sub: i64,
    /// Whether the row deletes its key.
    pub tombstone: bool,
}

impl RowKey {
    /// `None` when the bytes are not a row key.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let tombstone = match bytes.len() {
            17 => false,
            18 if bytes.last() == Some(&b't') => true,
            _ => return None,
        };
        if bytes.get(8) != Some(&b'_') {
            return None;
        }
        let main = i64::try_from(u64_be(bytes, 0)?).ok()?;
        let sub = i64::try_from(u64_be(bytes, 9)?).ok()?;
        Some(Self { main, sub, tombstone })
    }

    /// The bytes in the database.
    pub fn encode(&self) -> RowKeyBytes {
        let [m0, m1, m2, m3, m4, m5, m6, m7] = self.main.to_be_bytes();
        let [s0, s1, s2, s3, s4, s5, s6, s7] = self.sub.to_be_bytes();
        let bytes = [m0, m1, m2, m3, m4, m5, m6, m7, b'_', s0, s1, s2, s3, s4, s5, s6, s7, b't'];
        RowKeyBytes { bytes, tombstone: self.tombstone }
    }

    /// The first row key of a revision, for [`crate::bolt::Cursor::seek`].
    pub fn first_of(main: i64) -> RowKeyBytes {
        Self { main: main.max(0), sub: 0, tombstone: false }.encode()
    }
}

/// An encoded [`RowKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowKeyBytes {
    bytes: [u8; 18],
    tombstone: bool,
}

impl std::ops::Deref for RowKeyBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let (key, _) = self.bytes.split_at(17);
        if self.tombstone { &self.bytes } else { key }
    }
}

/// Value of a row: `mvccpb.KeyValue`. A tombstone's has only the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyValue<'a> {
    /// The user's key.
    pub key: &'a [u8],
    /// Revision of the put that created the key.
    pub create_revision: i64,
    /// Revision of this put.
    pub mod_revision: i64,
    /// Number of puts since the key was created, from 1.
    pub version: i64,
    /// The user's value.
    pub value: &'a [u8],
    /// Lease the key is attached to, or 0.
    pub lease: i64,
}

impl<'a> KeyValue<'a> {
    /// Decodes a row's value; fields that etcd does not know are an error.
    pub fn decode(bytes: &'a [u8]) -> Result<Self> {
        let mut kv = Self::default();
        let mut fields = Fields::new(bytes);
        while let Some(field) = fields.next()? {
            match field {
                Field::Bytes(1, key) => kv.key = key,
                Field::Varint(2, value) => kv.create_revision = value as i64,
                Field::Varint(3, value) => kv.mod_revision = value as i64,
                Field::Varint(4, value) => kv.version = value as i64,
                Field::Bytes(5, value) => kv.value = value,
                Field::Varint(6, value) => kv.lease = value as i64,
                Field::Varint(number, _) | Field::Bytes(number, _) => {
                    return Err(Error::corrupt(
                        0,
                        format!("row value has field {number}, which KeyValue does not have"),
                    ));
                }
            }
        }
        Ok(kv)
    }

    /// Appends the bytes that etcd stores: ascending fields, zero and empty ones left out.
    pub fn encode(&self, out: &mut Vec<u8>) {
        if !self.key.is_empty() {
            put_bytes_field(out, 1, self.key);
        }
        let numbers = [(2, self.create_revision), (3, self.mod_revision), (4, self.version)];
        for (number, value) in numbers.into_iter().filter(|(_, value)| *value != 0) {
            put_varint_field(out, number, value as u64);
        }
        if !self.value.is_empty() {
            put_bytes_field(out, 5, self.value);
        }
        if self.lease != 0 {
            put_varint_field(out, 6, self.lease as u64);
        }
    }
}
