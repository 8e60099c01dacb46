//! The content of a delta object: whole revisions in order, then what was known when it was closed.
//!
//! The records are those of `proto/backup/backup.proto`. Changes are collected in batches of some MiB, so that a revision of
//! any number of changes takes no more memory than a batch and its largest change.

mod batch;

use std::collections::BTreeSet;
use std::io::BufRead;

use bytes::Bytes;
use etcd_format::mvcc::KeyValue;
use etcd_format::put_varint;
use etcd_format::wire::{Field, Fields};
use proto::Message;
use proto::backup::{DeltaEnd, ObjectMeta};

use crate::container::{LAYOUT, Mark, Writer};
use crate::{Error, Result};
use batch::{BATCH_BYTES, Batch, Expanded};

/// Two histories whose last so many revisions are equal are taken for the same.
pub const COMPARED: i64 = 64;

/// No record is larger than this: a batch and a change as large as etcd's client takes one.
const MOST_RECORD_BYTES: u64 = (512 << 20) + 2 * BATCH_BYTES as u64;

/// Collects changes into one object, compressed as they come.
#[derive(Debug)]
pub struct Builder {
    writer: Writer,
    first: i64,
    last: i64,
    revisions: u64,
    events: u64,
    leases: BTreeSet<i64>,
    /// Whole revisions that are not written yet.
    whole: Batch,
    /// What is not written yet of the last revision, which may not be whole.
    newest: Batch,
    /// Where in what is written the last revision begins, when some of it is there.
    newest_begins: Option<Mark>,
    /// Changes before the last revision.
    events_before: u64,
}

impl Builder {
    /// Begins with the revision after `last`.
    pub fn new(last: i64) -> Result<Self> {
        Ok(Self {
            writer: Writer::for_delta(),
            first: last.saturating_add(1),
            last,
            revisions: 0,
            events: 0,
            leases: BTreeSet::new(),
            whole: Batch::default(),
            newest: Batch::default(),
            newest_begins: None,
            events_before: 0,
        })
    }

    /// Last revision begun.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// First revision.
    pub fn first(&self) -> i64 {
        self.first
    }

    /// Number of changes so far.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Bytes of content so far, before compression, about.
    pub fn content_bytes(&self) -> u64 {
        self.writer.content_bytes() + (self.whole.bytes() + self.newest.bytes()) as u64
    }

    /// Leases that the puts refer to.
    pub fn leases(&self) -> &BTreeSet<i64> {
        &self.leases
    }

    /// Begins a revision, which must follow the last one.
    pub fn revision(&mut self, main: i64, received_unix_ms: i64) -> Result<()> {
        if main != self.last.saturating_add(1) {
            let gap = etcd_format::Error::Gap { have: self.last, next: main };
            return Err(Error::format("events from etcd")(gap));
        }
        // Together they must not be more than a batch.
        if self.whole.size() + self.newest.size() > BATCH_BYTES {
            self.whole.write(&mut self.writer)?;
        }
        self.whole.append(&mut self.newest);
        if self.whole.is_due() {
            self.whole.write(&mut self.writer)?;
        }
        self.newest_begins = None;
        self.events_before = self.events;
        self.last = main;
        self.revisions += 1;
        self.newest.begin(main, received_unix_ms);
        Ok(())
    }

    /// Takes the last revision back: it did not arrive whole.
    pub fn cut_last_revision(&mut self) -> Result<()> {
        if self.revisions > 0 {
            self.newest.clear();
            if let Some(mark) = self.newest_begins.take() {
                self.writer.rollback(mark);
            }
            self.events = self.events_before;
            self.revisions -= 1;
            self.last -= 1;
        }
        Ok(())
    }

    /// Adds a put to the revision begun.
    pub fn put(&mut self, kv: &KeyValue<'_>) -> Result<()> {
        if kv.lease != 0 {
            self.leases.insert(kv.lease);
        }
        self.newest.put(kv);
        self.added()
    }

    /// Adds a delete to the revision begun.
    pub fn delete(&mut self, key: &[u8]) -> Result<()> {
        self.newest.delete(key);
        self.added()
    }

    fn added(&mut self) -> Result<()> {
        self.events += 1;
        if self.newest.size() >= BATCH_BYTES {
            self.whole.write(&mut self.writer)?;
            self.newest_begins.get_or_insert_with(|| self.writer.mark());
            self.newest.write(&mut self.writer)?;
        }
        Ok(())
    }

    /// Closes the object. Counts and revisions of `end` and `meta` are filled in here.
    pub fn finish(mut self, end: DeltaEnd, meta: ObjectMeta) -> Result<Vec<Bytes>> {
        let compact_revision = end.compact_revision;
        let end = DeltaEnd { revisions: self.revisions, events: self.events, ..end };
        if self.whole.size() + self.newest.size() > BATCH_BYTES {
            self.whole.write(&mut self.writer)?;
        }
        self.whole.append(&mut self.newest);
        self.whole.write(&mut self.writer)?;
        let end = end.encode_to_vec();
        let mut framed = Vec::new();
        put_varint(&mut framed, 4 << 3 | 2);
        put_varint(&mut framed, end.len() as u64);
        let mut length = Vec::new();
        put_varint(&mut length, (framed.len() + end.len()) as u64);
        for part in [length, framed, end] {
            self.writer.write(&part)?;
        }
        let meta = ObjectMeta {
            layout: LAYOUT,
            first_revision: self.first,
            last_revision: self.last,
            compact_revision,
            content_bytes: self.writer.content_bytes(),
            ..meta
        };
        self.writer.finish_with_leading_meta(&meta)
    }
}

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub enum Record<'a> {
    /// A revision begins.
    Revision {
        /// Main revision.
        main: i64,
        /// When its events were received.
        received_unix_ms: i64,
    },
    /// An encoded `KeyValue`.
    Put(&'a [u8]),
    /// A key.
    Delete(&'a [u8]),
    /// The end, which agreed with what came before.
    End(DeltaEnd),
}

fn corrupt(name: &str, offset: u64, what: &str) -> Error {
    Error::corrupt(format!("{name}: {what} (at offset {offset} of the decompressed content)"))
}

/// Reads records from a decompressed delta.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    name: String,
    offset: u64,
    record: Vec<u8>,
    /// What is left of the batch in `record`.
    batch: Expanded,
    revisions: u64,
    last: Option<i64>,
    events: u64,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// `name` is for messages.
    pub fn new(source: R, name: impl Into<String>) -> Self {
        let (record, batch) = (Vec::new(), Expanded::default());
        Self { source, name: name.into(), offset: 0, record, batch, revisions: 0, last: None, events: 0, ended: false }
    }

    fn corrupt(&self, what: &str) -> Error {
        corrupt(&self.name, self.offset, what)
    }

    fn read_error(&self, error: std::io::Error) -> Error {
        match error.downcast::<Error>() {
            Ok(ours) => ours,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.corrupt("content ends inside a record")
            }
            Err(source) => Error::Io { op: "read", path: self.name.clone(), source },
        }
    }

    fn read_length(&mut self) -> Result<Option<u64>> {
        let (mut length, mut at) = (0u64, 0u32);
        loop {
            let byte = match self.source.fill_buf() {
                Ok(rest) => rest.first().copied(),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.read_error(error)),
            };
            let Some(byte) = byte else {
                return if at == 0 { Ok(None) } else { Err(self.corrupt("content ends inside a length")) };
            };
            self.source.consume(1);
            let low = u64::from(byte & 0x7f);
            length |= low.checked_shl(7 * at).unwrap_or(0);
            at += 1;
            if at == 10 && byte > 1 {
                return Err(self.corrupt("length of a record is malformed"));
            }
            if byte & 0x80 == 0 {
                self.offset += u64::from(at);
                return Ok(Some(length));
            }
        }
    }

    /// Reads the next `length` bytes into `record`.
    fn read_record(&mut self, length: u64) -> Result<()> {
        self.record.clear();
        // One large value must not stay allocated for the rest of the run.
        self.record.shrink_to(1 << 20);
        let mut left = length;
        while left > 0 {
            let taken = match self.source.fill_buf() {
                Ok(rest) => {
                    let taken = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.record.extend_from_slice(rest.get(..taken).unwrap_or_default());
                    taken
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.read_error(error)),
            };
            if taken == 0 {
                return Err(self.corrupt("content ends inside a record"));
            }
            self.source.consume(taken);
            left -= taken as u64;
        }
        Ok(())
    }

    /// The next record; `None` after the end. An object without its end is an error.
    #[expect(clippy::should_implement_trait, reason = "lends from itself, which Iterator cannot")]
    pub fn next(&mut self) -> Result<Option<Record<'_>>> {
        while self.batch.is_empty() {
            let Some(length) = self.read_length()? else {
                let cut = "object has no end record: it was cut short";
                return if self.ended { Ok(None) } else { Err(self.corrupt(cut)) };
            };
            if self.ended {
                return Err(self.corrupt("content goes on after its end record"));
            }
            if length > MOST_RECORD_BYTES {
                return Err(self.corrupt(&format!("record of {length} bytes is larger than any record")));
            }
            self.read_record(length)?;
            self.offset += length;
            if let Some(end) = self.record()? {
                return Ok(Some(Record::End(end)));
            }
        }
        let (name, offset) = (&self.name, self.offset);
        let record = self.batch.next(&self.record).map_err(|what| corrupt(name, offset, what))?;
        match record {
            Some(Record::Revision { main, .. }) => {
                if let Some(last) = self.last.filter(|last| Some(main) != last.checked_add(1)) {
                    return Err(corrupt(name, offset, &format!("revision {main} follows revision {last}")));
                }
                self.last = Some(main);
                self.revisions += 1;
            }
            Some(Record::Put(_) | Record::Delete(_)) => self.events += 1,
            Some(Record::End(_)) | None => {}
        }
        Ok(record)
    }

    /// Takes in what is in `record`: a batch, or the end, which is returned.
    fn record(&mut self) -> Result<Option<DeltaEnd>> {
        let malformed = |source| Error::Format {
            what: format!("{}: record before offset {} of the decompressed content", self.name, self.offset),
            source,
        };
        let Some(Field::Bytes(number, content)) = Fields::new(&self.record).next().map_err(malformed)? else {
            return Err(self.corrupt("record has no content"));
        };
        match number {
            4 => {
                let end = DeltaEnd::decode(content)
                    .map_err(|error| self.corrupt(&format!("end record cannot be decoded: {error}")))?;
                if (end.revisions, end.events) != (self.revisions, self.events) {
                    let text = format!(
                        "end record counts {} revisions and {} changes, there are {} and {}",
                        end.revisions, end.events, self.revisions, self.events
                    );
                    return Err(self.corrupt(&text));
                }
                self.ended = true;
                Ok(Some(end))
            }
            5 => {
                self.batch = Expanded::decode(&self.record, content).map_err(|what| self.corrupt(what))?;
                Ok(None)
            }
            other => {
                Err(self
                    .corrupt(&format!("record of unknown kind {other}: another version of sidecar wrote the object")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;
    use etcd_format::{put_bytes_field, put_varint_field};
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut builder = Builder::new(4).unwrap();
        builder.revision(5, 1000).unwrap();
        builder
            .put(&KeyValue { key: b"a", create_revision: 5, mod_revision: 5, version: 1, value: b"1", lease: 7 })
            .unwrap();
        builder.delete(b"b").unwrap();
        builder.revision(6, 1001).unwrap();
        builder.delete(b"a").unwrap();
        assert!(builder.revision(8, 1002).is_err());
        let end = DeltaEnd { compact_revision: 3, ..DeltaEnd::default() };
        builder.finish(end, ObjectMeta::default()).unwrap().concat()
    }

    fn read(object: &[u8]) -> Result<Vec<String>> {
        let mut reader = Reader::new(BufReader::new(crate::container::Reader::new(object, "test")?), "test");
        let mut records = Vec::new();
        while let Some(record) = reader.next()? {
            records.push(format!("{record:?}"));
        }
        Ok(records)
    }

    #[test]
    fn what_is_written_is_read_and_every_flip_is_noticed_or_harmless() {
        let object = sample();
        let records = read(&object).unwrap();
        assert_eq!(records.len(), 6);
        assert!(
            records[1].starts_with("Put")
                && records[2].starts_with("Delete")
                && records[3] == "Revision { main: 6, received_unix_ms: 1001 }"
                && records[5].contains("compact_revision: 3")
        );
        for at in 0..object.len() {
            let mut damaged = object.clone();
            damaged[at] ^= 0x21;
            if let Ok(read) = read(&damaged) {
                assert_eq!(read, records, "byte {at}");
            }
            if let Ok(read) = read(&object[..at]) {
                assert_eq!(read, records, "cut at {at}");
            }
        }
    }

    #[test]
    fn a_revision_that_did_not_arrive_whole_is_taken_back() {
        let mut builder = Builder::new(4).unwrap();
        builder.revision(5, 1000).unwrap();
        builder.delete(b"a").unwrap();
        builder.revision(6, 1000).unwrap();
        for n in 0..100_000u32 {
            builder.delete(&[b"a long name of a key".as_slice(), &n.to_be_bytes()].concat()).unwrap();
        }
        builder.cut_last_revision().unwrap();
        assert_eq!((builder.last(), builder.events()), (5, 1));
        let object = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
        assert_eq!(read(&object).unwrap().len(), 3);
    }

    /// A revision larger than a batch is written in parts and can still be taken back.
    #[test]
    fn a_revision_of_several_batches_is_taken_back_or_kept() {
        for keep in [true, false] {
            let mut builder = Builder::new(4).unwrap();
            builder.revision(5, 1000).unwrap();
            builder.delete(b"a").unwrap();
            builder.revision(6, 1000).unwrap();
            let changes = 3 * BATCH_BYTES / (1 << 20);
            for n in 0..changes {
                let value = vec![n as u8; 1 << 20];
                let kv =
                    KeyValue { key: b"k", create_revision: 6, mod_revision: 6, version: 1, value: &value, lease: 0 };
                builder.put(&kv).unwrap();
            }
            if !keep {
                builder.cut_last_revision().unwrap();
            }
            builder.revision(builder.last() + 1, 1001).unwrap();
            builder.delete(b"z").unwrap();
            let object = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
            let records = read(&object).unwrap();
            // Three revisions, or two, and the end.
            assert_eq!(records.len(), if keep { 3 + 2 + changes + 1 } else { 2 + 2 + 1 });
            let puts: Vec<_> = records.iter().filter(|record| record.starts_with("Put")).collect();
            for (n, put) in puts.iter().enumerate() {
                assert!(put.ends_with(&format!("{n}, {n}])")), "put {n} is another");
            }
        }
    }

    /// An object with one record, of this content.
    fn object_of(kind: u64, content: &[u8]) -> Vec<u8> {
        let mut record = Vec::new();
        put_varint(&mut record, kind << 3 | 2);
        put_varint(&mut record, content.len() as u64);
        record.extend_from_slice(content);
        let mut framed = Vec::new();
        put_varint(&mut framed, record.len() as u64);
        framed.extend_from_slice(&record);
        let mut writer = Writer::for_delta();
        writer.write(&framed).unwrap();
        writer.finish_with_leading_meta(&ObjectMeta { layout: LAYOUT, ..ObjectMeta::default() }).unwrap().concat()
    }

    fn batch_of(lists: [&[u8]; 4]) -> Vec<u8> {
        let mut content = Vec::new();
        put_varint_field(&mut content, 1, 5);
        for (number, list) in lists.into_iter().enumerate() {
            put_bytes_field(&mut content, number as u32 + 2, list);
        }
        content
    }

    /// Lists that compress to nothing must not become gigabytes.
    #[test]
    fn lists_of_more_changes_than_any_batch_has_are_refused() {
        let zeros = vec![0; 10 << 20];
        let ones = [[0x80, 0x80, 0x80, 0x80, 0x08].as_slice(), &zeros].concat();
        for (lists, said) in [
            ([&[0][..], &[], &zeros, &[]], "key without changes"),
            ([&[0], &zeros, &ones, &[]], "more changes than any"),
            ([&zeros, &[], &[], &[]], "revision without changes"),
            ([&[0], &zeros, &[1, 0], &[]], "names more changes than it has"),
        ] {
            let refused = read(&object_of(5, &batch_of(lists))).map_err(|error| error.to_string());
            assert!(refused.as_ref().is_err_and(|text| text.contains(said)), "{said}: {refused:?}");
        }
    }

    /// Values that follow others of their key, in several batches.
    #[test]
    fn many_versions_of_many_keys_round_trip() {
        let mut builder = Builder::new(1).unwrap();
        let mut expected = Vec::new();
        for n in 0..3000i64 {
            let (key, value) = (format!("/key/{}", n * 7 % 300), vec![(n % 251) as u8; 10_000]);
            builder.revision(n + 2, 1000 + n).unwrap();
            let kv = KeyValue {
                key: key.as_bytes(),
                create_revision: n % 300 + 2,
                mod_revision: n + 2,
                version: n / 300 + 1,
                value: &value,
                lease: n % 3,
            };
            builder.put(&kv).unwrap();
            let mut encoded = Vec::new();
            kv.encode(&mut encoded);
            expected.push(encoded);
        }
        let object = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
        let source = BufReader::new(crate::container::Reader::new(object.as_slice(), "test").unwrap());
        let mut reader = Reader::new(source, "test");
        let mut puts = 0;
        while let Some(record) = reader.next().unwrap() {
            if let Record::Put(put) = record {
                assert!(put == expected[puts], "put {puts}");
                puts += 1;
            }
        }
        assert_eq!(puts, expected.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever comes in goes out, in order.
        #[test]
        fn revisions_round_trip(
            revisions in prop::collection::vec(
                (any::<i64>(), prop::collection::vec((0..30u8, any::<bool>(), any::<Vec<u8>>()), 1..20)),
                1..40,
            )
        ) {
            let mut builder = Builder::new(9).unwrap();
            let mut expected = Vec::new();
            for (n, (time, changes)) in revisions.iter().enumerate() {
                let main = 10 + n as i64;
                builder.revision(main, *time).unwrap();
                expected.push(format!("{:?}", Record::Revision { main, received_unix_ms: *time }));
                for (key, is_put, value) in changes {
                    let lease = i64::from(key % 2) * 300;
                    let key = vec![*key; usize::from(*key) % 5 * 40 + 1];
                    if *is_put {
                        // Some follow the one before, some do not.
                        let version = if value.len() % 3 == 0 { 7 } else { n as i64 };
                        let mod_revision = main - i64::from(value.len() % 7 == 6);
                        let kv = KeyValue { key: &key, create_revision: 1, mod_revision, version, value, lease };
                        let mut encoded = Vec::new();
                        kv.encode(&mut encoded);
                        builder.put(&kv).unwrap();
                        expected.push(format!("{:?}", Record::Put(&encoded)));
                    } else {
                        builder.delete(&key).unwrap();
                        expected.push(format!("{:?}", Record::Delete(&key)));
                    }
                }
            }
            let object = builder.finish(DeltaEnd::default(), ObjectMeta::default()).unwrap().concat();
            let mut records = read(&object).unwrap();
            prop_assert!(records.pop().is_some_and(|end| end.starts_with("End")));
            let differs = records.iter().zip(&expected).find(|(found, expected)| found != expected);
            prop_assert_eq!(differs, None);
            prop_assert_eq!(records.len(), expected.len());
        }

        /// Damage under a checksum that fits, as a writer's error would leave it.
        #[test]
        fn a_batch_with_a_flipped_bit_never_panics(at in 0..200usize, bit in 0..8u32) {
            let object = sample();
            let mut content = Vec::new();
            let mut source = crate::container::Reader::new(object.as_slice(), "test").unwrap();
            std::io::Read::read_to_end(&mut source, &mut content).unwrap();
            let at = at % content.len();
            content[at] ^= 1 << bit;
            let mut reader = Reader::new(content.as_slice(), "test");
            while let Ok(Some(_)) = reader.next() {}
        }

        #[test]
        fn arbitrary_batches_never_panic(
            heads in prop::collection::vec(0..4u8, 0..12), order in prop::collection::vec(0..4u8, 0..12),
            keys in prop::collection::vec(prop_oneof![0..12u8, Just(0xff)], 0..24), changes: Vec<u8>,
        ) {
            let _ = read(&object_of(5, &batch_of([&heads, &order, &keys, &changes])));
        }

        #[test]
        fn arbitrary_content_never_panics(bytes: Vec<u8>) {
            let mut reader = Reader::new(bytes.as_slice(), "test");
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
