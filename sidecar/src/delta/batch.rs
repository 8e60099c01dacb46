//! Changes in an order that compresses: all of one key next to each other.
//!
//! Most changes of a Kubernetes cluster differ little from the value that the key had before, which lies far back in the
//! order of revisions; and of a put that follows another of its key, all but the value is known from that. The encoding is
//! that of `DeltaBatch` in `proto/backup/backup.proto`.

use etcd_format::mvcc::KeyValue;
use etcd_format::wire::{Field, Fields};
use etcd_format::{put_bytes_field, put_varint, put_varint_field};

use super::Record;
use crate::Result;
use crate::container::{Effort, Writer};

/// A batch is written when it has so many bytes; with its lists it fits one frame of a delta.
pub(super) const BATCH_BYTES: usize = 11 << 20;
/// One of changes that come fast is written when it has so many: then memory counts for more than size.
const FAST_BATCH_BYTES: usize = 2 << 20;
/// Changes that come at up to so many bytes in a millisecond, over so many more milliseconds than they took, are slow: there is
/// time to compress them well.
const SLOW_BYTES_PER_MS: u64 = 2000;
const SLOW_MS: u64 = 500;
/// What a change takes beside its bytes, in memory.
const CHANGE_OVERHEAD: usize = size_of::<Change>();
/// Revisions and changes of a batch, together; a writer is far below.
const MOST_ITEMS: usize = 1 << 18;
const _: () = assert!(BATCH_BYTES / CHANGE_OVERHEAD < MOST_ITEMS);

/// How a change is stored, by the low bits of its entry in the list of keys.
const WHOLE: u64 = 0;
const DELETE: u64 = 1;
/// A put whose value alone is stored.
const FOLLOWS: u64 = 2;

#[derive(Debug, Clone, Copy)]
struct Change {
    start: usize,
    length: usize,
    key_start: usize,
    key_length: usize,
    put: Option<Put>,
}

#[derive(Debug, Clone, Copy)]
struct Put {
    value_start: usize,
    value_length: usize,
    numbers: Numbers,
    /// Whether its modification revision is that of the head before it.
    of_head: bool,
}

/// What a put has in common with the next one of its key, but that its version is one higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbers {
    create_revision: i64,
    version: i64,
    lease: i64,
}

impl Numbers {
    fn of(kv: &KeyValue<'_>) -> Self {
        Self { create_revision: kv.create_revision, version: kv.version, lease: kv.lease }
    }

    fn next(self) -> Self {
        Self { version: self.version.wrapping_add(1), ..self }
    }
}

impl Change {
    /// How it is stored after another change of its key, and which of its bytes.
    fn stored(&self, before: Option<&Self>) -> (u64, usize, usize) {
        let Some(put) = self.put else { return (DELETE, self.start, self.length) };
        let before = before.and_then(|before| before.put);
        if put.of_head && before.is_some_and(|before| before.numbers.next() == put.numbers) {
            (FOLLOWS, put.value_start, put.value_length)
        } else {
            (WHOLE, self.start, self.length)
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Head {
    main: i64,
    received_unix_ms: i64,
    /// Changes before it.
    begins: usize,
}

/// Revisions and changes as they came.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    changes: Vec<Change>,
    heads: Vec<Head>,
}

impl Batch {
    /// Bytes of its changes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes that it takes in memory, about.
    pub(super) fn size(&self) -> usize {
        self.bytes.len() + (self.changes.len() + self.heads.len()) * CHANGE_OVERHEAD
    }

    /// Whether its changes came so slowly, by when they were received, that there is time for them.
    fn is_slow(&self) -> bool {
        let (Some(first), Some(last)) = (self.heads.first(), self.heads.last()) else { return false };
        let took = last.received_unix_ms.saturating_sub(first.received_unix_ms);
        let took = u64::try_from(took).unwrap_or(0).saturating_add(SLOW_MS);
        self.size() as u64 <= took.saturating_mul(SLOW_BYTES_PER_MS)
    }

    /// Whether it is to be written before more comes.
    pub(super) fn is_due(&self) -> bool {
        self.size() >= BATCH_BYTES || self.size() >= FAST_BATCH_BYTES && !self.is_slow()
    }

    pub(super) fn begin(&mut self, main: i64, received_unix_ms: i64) {
        self.heads.push(Head { main, received_unix_ms, begins: self.changes.len() });
    }

    pub(super) fn put(&mut self, kv: &KeyValue<'_>) {
        let start = self.bytes.len();
        kv.encode(&mut self.bytes);
        // The key is the first field, a lease the last, the value before it.
        let key_start = start + 1 + varint_bytes(kv.key.len() as u64);
        let lease_bytes = if kv.lease == 0 { 0 } else { 1 + varint_bytes(kv.lease as u64) };
        let put = Put {
            value_start: self.bytes.len().saturating_sub(lease_bytes + kv.value.len()),
            value_length: kv.value.len(),
            numbers: Numbers::of(kv),
            of_head: self.heads.last().is_some_and(|head| head.main == kv.mod_revision),
        };
        self.push(start, key_start, kv.key.len(), Some(put));
    }

    pub(super) fn delete(&mut self, key: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(key);
        self.push(start, start, key.len(), None);
    }

    fn push(&mut self, start: usize, key_start: usize, key_length: usize, put: Option<Put>) {
        let length = self.bytes.len() - start;
        self.changes.push(Change { start, length, key_start, key_length, put });
    }

    /// Takes over everything of another, which is empty then.
    pub(super) fn append(&mut self, other: &mut Self) {
        let (bytes, changes) = (self.bytes.len(), self.changes.len());
        self.bytes.append(&mut other.bytes);
        let moved = |change: Change| Change {
            start: change.start + bytes,
            key_start: change.key_start + bytes,
            put: change.put.map(|put| Put { value_start: put.value_start + bytes, ..put }),
            ..change
        };
        self.changes.extend(other.changes.drain(..).map(moved));
        self.heads.extend(other.heads.drain(..).map(|head| Head { begins: head.begins + changes, ..head }));
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.changes.clear();
        self.heads.clear();
        // One large revision must not stay allocated for the rest of the delta.
        self.bytes.shrink_to(FAST_BATCH_BYTES);
    }

    fn key(&self, change: usize) -> &[u8] {
        let change = self.changes.get(change);
        change
            .and_then(|change| self.bytes.get(change.key_start..change.key_start + change.key_length))
            .unwrap_or_default()
    }

    /// Writes it as a record of kind 5, unless there is nothing in it, and empties it.
    pub(super) fn write(&mut self, writer: &mut Writer) -> Result<()> {
        if self.changes.is_empty() && self.heads.is_empty() {
            return Ok(());
        }
        let effort = if self.is_slow() { Effort::Thorough } else { Effort::Quick };
        let mut sorted: Vec<u32> = (0..self.changes.len() as u32).collect();
        sorted.sort_unstable_by(|a, b| self.key(*a as usize).cmp(self.key(*b as usize)).then(a.cmp(b)));
        let (mut groups, mut group_of, mut stored) = (Vec::new(), vec![0u32; sorted.len()], Vec::new());
        let mut stored_bytes = 0;
        let of_one_key = sorted.chunk_by(|a, b| self.key(*a as usize) == self.key(*b as usize));
        for (number, group) in of_one_key.enumerate() {
            put_varint(&mut groups, group.len() as u64);
            let mut before = None;
            for index in group {
                let Some(change) = self.changes.get(*index as usize) else { continue };
                let (kind, start, length) = change.stored(before);
                put_varint(&mut groups, (length as u64) << 2 | kind);
                stored.push((start, length));
                stored_bytes += length;
                before = Some(change);
                if let Some(group) = group_of.get_mut(*index as usize) {
                    *group = number as u32;
                }
            }
        }
        drop(sorted);
        let mut order = Vec::new();
        for group in group_of {
            put_varint(&mut order, u64::from(group));
        }
        let mut content = Vec::new();
        put_varint_field(&mut content, 1, self.heads.first().map_or(0, |head| head.main as u64));
        put_bytes_field(&mut content, 2, &self.encode_heads());
        put_bytes_field(&mut content, 3, &order);
        put_bytes_field(&mut content, 4, &groups);
        put_varint(&mut content, 5 << 3 | 2);
        put_varint(&mut content, stored_bytes as u64);
        let mut framed = Vec::new();
        put_varint(&mut framed, 5 << 3 | 2);
        put_varint(&mut framed, (content.len() + stored_bytes) as u64);
        let mut length = Vec::new();
        put_varint(&mut length, (framed.len() + content.len() + stored_bytes) as u64);
        for part in [&length, &framed, &content] {
            writer.write(part)?;
        }
        for (start, length) in stored {
            writer.write(self.bytes.get(start..start + length).unwrap_or_default())?;
        }
        self.clear();
        writer.end_frame_with(effort)
    }

    fn encode_heads(&self) -> Vec<u8> {
        let mut heads = Vec::new();
        put_varint(&mut heads, self.heads.first().map_or(self.changes.len(), |head| head.begins) as u64);
        let mut before = 0i64;
        for (index, head) in self.heads.iter().enumerate() {
            let ends = self.heads.get(index + 1).map_or(self.changes.len(), |next| next.begins);
            let later = head.received_unix_ms.wrapping_sub(before);
            put_varint(&mut heads, (later << 1 ^ later >> 63) as u64);
            put_varint(&mut heads, (ends - head.begins) as u64);
            before = head.received_unix_ms;
        }
        heads
    }
}

#[derive(Debug, Clone, Copy)]
enum Item {
    Revision { main: i64, received_unix_ms: i64 },
    Change { start: u32, length: u32, group: u32, kind: u8 },
}

/// A batch that was read, in its original order.
#[derive(Debug, Default)]
pub(super) struct Expanded {
    items: Vec<Item>,
    next: usize,
    /// Where the changes lie in the record.
    changes_at: usize,
    /// The revision that the next change is of, when it begins here.
    main: i64,
    /// Key, and numbers of the newest put, of each group.
    newest: Vec<Option<(std::ops::Range<usize>, Numbers)>>,
    /// The last put, when only its value was stored.
    put: Vec<u8>,
}

/// Reads varints to their end.
struct Varints<'a>(&'a [u8]);

impl Varints<'_> {
    fn next(&mut self) -> Option<u64> {
        let mut value = 0;
        for (index, byte) in self.0.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                self.0 = self.0.get(index + 1..)?;
                return Some(value);
            }
        }
        None
    }

    fn next_or(&mut self, what: &'static str) -> Result<u64, &'static str> {
        self.next().ok_or(what)
    }
}

impl Expanded {
    /// Decodes the content of a record of kind 5; says what is wrong with it otherwise. `record` is what holds it.
    pub(super) fn decode(record: &[u8], content: &[u8]) -> Result<Self, &'static str> {
        let (mut main, mut heads, mut order, mut groups, mut changes) = (0, &[][..], &[][..], &[][..], &[][..]);
        let mut fields = Fields::new(content);
        while let Some(field) = fields.next().map_err(|_| "batch cannot be decoded")? {
            match field {
                Field::Varint(1, value) => main = value as i64,
                Field::Bytes(2, bytes) => heads = bytes,
                Field::Bytes(3, bytes) => order = bytes,
                Field::Bytes(4, bytes) => groups = bytes,
                Field::Bytes(5, bytes) => changes = bytes,
                _ => return Err("batch has a field that is not known"),
            }
        }
        let (placed, group_ends) = Self::place(groups, changes.len())?;
        let mut group_at: Vec<usize> = std::iter::once(0).chain(group_ends.iter().copied()).collect();
        let mut in_order = Vec::with_capacity(placed.len());
        let mut numbers = Varints(order);
        while !numbers.0.is_empty() {
            if in_order.len() == placed.len() {
                return Err("batch names more changes than it has");
            }
            let group = numbers.next_or("order of a batch is cut short")? as usize;
            let end = *group_ends.get(group).ok_or("batch names a key that it does not have")?;
            let at = group_at.get_mut(group).filter(|at| **at < end).ok_or("batch names a key too often")?;
            in_order.extend(placed.get(*at));
            *at += 1;
        }
        if in_order.len() != placed.len() {
            return Err("batch does not name every change");
        }
        let mut items = Vec::with_capacity(in_order.len());
        let mut rest = in_order.into_iter();
        let mut take = |count: u64, items: &mut Vec<Item>| {
            for _ in 0..count {
                items.push(rest.next().ok_or("revisions of a batch have more changes than it has")?);
            }
            Ok::<(), &'static str>(())
        };
        let mut numbers = Varints(heads);
        take(numbers.next_or("revisions of a batch are cut short")?, &mut items)?;
        let mut received_unix_ms = 0i64;
        while !numbers.0.is_empty() {
            let later = numbers.next_or("revisions of a batch are cut short")?;
            if items.len() >= MOST_ITEMS {
                return Err("batch has more revisions than any");
            }
            received_unix_ms = received_unix_ms.wrapping_add((later >> 1) as i64 ^ -((later & 1) as i64));
            items.push(Item::Revision { main, received_unix_ms });
            main = main.wrapping_add(1);
            match numbers.next_or("revisions of a batch are cut short")? {
                0 => return Err("batch has a revision without changes"),
                count => take(count, &mut items)?,
            }
        }
        if rest.next().is_some() {
            return Err("batch has changes of no revision");
        }
        let changes_at = record.len() - changes.len();
        if !record.ends_with(changes) {
            return Err("batch does not end with its changes");
        }
        let newest = vec![None; group_ends.len()];
        Ok(Self { items, next: 0, changes_at, main: 0, newest, put: Vec::new() })
    }

    /// Where each change lies, in the order of groups, and where each group ends among them.
    fn place(groups: &[u8], bytes: usize) -> Result<(Vec<Item>, Vec<usize>), &'static str> {
        let (mut placed, mut ends, mut start) = (Vec::new(), Vec::new(), 0usize);
        let mut numbers = Varints(groups);
        while !numbers.0.is_empty() {
            let count = numbers.next_or("keys of a batch are cut short")?;
            if count == 0 {
                return Err("batch has a key without changes");
            }
            for _ in 0..count {
                if placed.len() >= MOST_ITEMS {
                    return Err("batch has more changes than any");
                }
                let number = numbers.next_or("keys of a batch are cut short")?;
                let (length, kind) = ((number >> 2) as usize, (number & 3) as u8);
                let end = start.checked_add(length).filter(|end| *end <= bytes && u32::try_from(*end).is_ok());
                let end = end.ok_or("changes of a batch are cut short")?;
                let group = ends.len() as u32;
                placed.push(Item::Change { start: start as u32, length: length as u32, group, kind });
                start = end;
            }
            ends.push(placed.len());
        }
        if start == bytes { Ok((placed, ends)) } else { Err("batch has more bytes than changes") }
    }

    /// Whether nothing is left of it.
    pub(super) fn is_empty(&self) -> bool {
        self.next >= self.items.len()
    }

    /// The next record, out of the one that holds the batch; or what is wrong with it.
    pub(super) fn next<'r>(&'r mut self, record: &'r [u8]) -> Result<Option<Record<'r>>, &'static str> {
        let Some(item) = self.items.get(self.next).copied() else { return Ok(None) };
        self.next += 1;
        let (start, length, group, kind) = match item {
            Item::Revision { main, received_unix_ms } => {
                self.main = main;
                return Ok(Some(Record::Revision { main, received_unix_ms }));
            }
            Item::Change { start, length, group, kind } => (start as usize, length as usize, group as usize, kind),
        };
        let start = self.changes_at + start;
        let bytes = record.get(start..start + length).unwrap_or_default();
        let newest = self.newest.get_mut(group).ok_or("batch names a key that it does not have")?;
        match u64::from(kind) {
            DELETE => {
                *newest = None;
                Ok(Some(Record::Delete(bytes)))
            }
            WHOLE => {
                let kv = KeyValue::decode(bytes).map_err(|_| "batch has a put that cannot be decoded")?;
                let key_start = start + 1 + varint_bytes(kv.key.len() as u64);
                let key = key_start..key_start + kv.key.len();
                if record.get(key.clone()) != Some(kv.key) {
                    return Err("batch has a put that is not encoded as etcd does");
                }
                *newest = Some((key, Numbers::of(&kv)));
                Ok(Some(Record::Put(bytes)))
            }
            FOLLOWS if self.main > 0 => {
                let (key, numbers) = newest.as_mut().ok_or("batch has a value without the put that it follows")?;
                *numbers = numbers.next();
                let Numbers { create_revision, version, lease } = *numbers;
                let key = record.get(key.clone()).unwrap_or_default();
                self.put.clear();
                KeyValue { key, create_revision, mod_revision: self.main, version, value: bytes, lease }
                    .encode(&mut self.put);
                Ok(Some(Record::Put(&self.put)))
            }
            _ => Err("batch has a change of unknown kind"),
        }
    }
}

/// Bytes that a varint takes.
fn varint_bytes(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}
